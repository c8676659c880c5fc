"""The page of a run: whole, offline, inert, small, and in an order that can be followed without seeing it."""

import itertools
import re
from html.parser import HTMLParser
from importlib import resources

import pytest

from reports.html import html
from reports.records import Event, Measurement, Run, Status, verdict_line
from suites.meta.test_reports import HEADER, HOSTILE, stored_run, verdict

VOID = {"meta", "link", "br", "img", "input", "hr"}
# Elements and attributes by which a page runs or fetches something.
ACTING = {"script", "iframe", "object", "embed", "form", "img", "video", "audio", "foreignobject"}


class Parsed(HTMLParser):
    """The elements of a page in their order, with the text of each; unbalanced tags raise."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, (tag, self.open[-1:])
        self.open.pop()

    def handle_data(self, data):
        for _, place in self.open:
            self.texts[place] = self.texts.get(place, "") + data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag):
        return [
            " ".join(self.texts.get(place, "").split()) for place, (name, _) in enumerate(self.elements) if name == tag
        ]


def point(contestant, pass_, length, quantity, value):
    names = {"seconds": ("time", "s"), "peak_mib": ("peak growth", "MiB")}
    data = {"contestant": contestant, "pass": pass_, "length": length, "quantity": quantity, "flop": 1e9}
    name, unit = names[quantity]
    return Measurement(name, contestant, f"{pass_}, L {length}", (value, value * 1.1, value), unit, {"point": data})


def bench_run():
    times = {"optimized": 1e-4, "dense-flash": 2e-4}
    points = tuple(
        point(who, "fwd", length, quantity, scale * length * (50 if quantity == "peak_mib" else 1))
        for who, scale in times.items() for length in (512, 2048, 8192) for quantity in ("seconds", "peak_mib")
    )  # fmt: skip
    growth = tuple(
        Event("growth", 1.0, {"contestant": who, "pass": "fwd", "quantity": quantity, "exponent": 1.02, "residual": 0.1,
                              "doublings": {}})
        for who in times for quantity in ("time", "peak growth")
    )  # fmt: skip
    floor = Event(
        "floor", 1.0, {"claim": "fwd at L 512: fast", "found": "2 times", "met": True, "judged": False, "source": "x"}
    )
    header = {**HEADER, "config_fields": {"index_topk": 256}, "bench": {"subject": "optimized"}}
    return stored_run(header=header, measurements=points, events=(*growth, floor))


def mutant(number, kinds):
    about = {
        "entry": "A01",
        "what": "wrong",
        "source": "a tracker",
        "killed_by": [f"check.{n}" for n in range(number % kinds)],
    }
    return verdict(f"mutants.A{number:03}-some-wrong-line", Status.VERIFIED, "mutants", data={"mutant": about})


@pytest.fixture(scope="module")
def full():
    return html(stored_run())


@pytest.fixture(scope="module")
def measured():
    return html(bench_run())


def test_the_verdict_comes_first_and_what_failed_follows(full):
    page = Parsed(full)
    assert page.text("h1") == ["✗ Failed"]
    assert verdict_line(stored_run()) in full
    order = ["2 to look at", "What ran where", "Budgets", "Loss and KL curves", "Who gets gradient", "Measurements",
             "Not checked", "All verdicts", "Environment"]  # fmt: skip
    found = [next(place for place, title in enumerate(page.text("h2")) if title.startswith(part)) for part in order]
    assert found == sorted(found)
    assert found[0] == 0
    assert page.text("h3") == [
        "✗ failed parity.grads (fp32) on text-left-padded",
        "∅ vacuous why (fp32) on text-left-padded",
    ]
    assert "beyond its budget: worst row 0.02 / 0.01" in full
    assert page.text("pre") == ["v32 verify --case 'why'"]


def test_a_verified_run_says_so():
    run = stored_run(verdicts=stored_run().verdicts[:1], footer={"ended": "complete", "exit_code": 0})
    page = Parsed(html(run))
    assert page.text("h1") == ["✓ Verified"]
    assert not any(title.endswith("to look at") for title in page.text("h2"))


@pytest.mark.parametrize("name", ["full", "measured"])
def test_nothing_runs_and_nothing_is_fetched(name, request):
    text = request.getfixturevalue(name)
    page = Parsed(text)
    assert {tag for tag, _ in page.elements} & ACTING == set()
    for tag, attributes in page.elements:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("href", "xlink:href", "src"):
                assert value.startswith("#") or value == "data:,", (tag, value)
    assert re.findall(r"(?:url\((?!#)|@import|https?://(?!www\.w3\.org/))", text) == []
    policy = next(item["content"] for item in page.all("meta") if item.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")


@pytest.mark.parametrize("name", ["full", "measured"])
def test_the_page_can_be_followed_without_seeing_it(name, request):
    page = Parsed(request.getfixturevalue(name))
    tags = [tag for tag, _ in page.elements]
    assert page.all("html")[0]["lang"] == "en"
    assert [tags.count(tag) for tag in ("main", "nav", "header", "footer", "h1")] == [1, 1, 1, 1, 1]
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {item["href"][1:] for item in page.all("a")}
    assert "content" in targets
    assert targets <= set(ids)
    assert next(place for place, tag in enumerate(tags) if tag == "a") < tags.index("nav")
    assert tags.count("caption") == tags.count("table") > 3
    assert {item.get("scope") for item in page.all("th")} == {"col", "row"}
    for _, attributes in page.elements:
        if "scroll" in attributes.get("class", ""):
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]


@pytest.mark.parametrize("name", ["full", "measured"])
def test_every_chart_has_a_description_and_a_table(name, request):
    page = Parsed(request.getfixturevalue(name))
    figures = sum(tag == "figure" for tag, _ in page.elements)
    assert figures >= 2
    pictures = page.all("svg")
    assert len(pictures) == figures
    for picture in pictures:
        assert picture["role"] == "img"
        assert len(picture["aria-label"]) > 20
    assert sum(text.startswith("Table: ") for text in page.text("summary")) == figures


def test_time_memory_and_the_guide(measured):
    page = Parsed(measured)
    assert "optimized ∝ L^1.02" in measured
    assert "growing as the length to the 1.02" in measured
    captions = page.text("caption")
    for caption in (
        "Floors, which only --floors judges",
        "Growth with the length",
        "Sparse or dense, by context length",
    ):
        assert caption in captions
    # The guide's claim beside what was measured.
    assert "Indexer overhead &gt; attention savings" in measured
    assert "fwd at 512: 2x the time, 2x the memory" in measured
    assert "fwd at 8192: 2x the time" in measured
    assert "268,435,456" not in measured
    assert f"{8192**2:,}" in measured


def test_where_two_models_part_is_said():
    layers = [{"layer": 0, "wrong": 0, "flips": 2, "margin": 0.1}, {"layer": 1, "wrong": 3, "flips": 0, "margin": 0.2}]
    staged = [{"layer": 0, "stage": stage, "error": error, "budget": 1.0}
              for stage, error in (("projection", 0.2), ("RoPE", 0.3), ("index scores", 4.0), ("attention", 9.0))]  # fmt: skip
    worst = {"model.layers.1.self_attn.indexer.wk.weight": 5.0, "lm_head.weight": 0.5}
    verdicts = (
        verdict("choices.keys", Status.FAILED, "choices", data={"layers": layers}),
        verdict("parity.stages", Status.FAILED, data={"stages": staged}),
        verdict("parity.lm_gradients", Status.FAILED, data={"worst_parameters": worst}),
    )
    text = html(stored_run(verdicts=verdicts))
    assert (
        "the first stage beyond its budget is index scores of layer 0 (fp32, text-left-padded), by parity.stages"
        in text
    )
    assert "layers.1.self_attn.indexer.wk.weight" in text
    assert "Error by layer and stage" in text
    assert "3 keys are wrong, 2 differ within the margin" in text
    # Without the measured stages, the selection is the first of which anything is known.
    assert "beyond its budget is selection of layer 1" in html(stored_run(verdicts=verdicts[:1]))


def test_hostile_text_is_inert():
    run = stored_run(HOSTILE, header={**HEADER, "subject": HOSTILE, "environment": {HOSTILE: HOSTILE}})
    text = html(run)
    page = Parsed(text)
    assert "script" not in {tag for tag, _ in page.elements}
    assert "&lt;script&gt;&amp;" in text
    for acting in ("\x1b", "\u202e", "\x00"):
        assert acting not in text
    text.encode("utf-8")


def test_a_training_run_shows_its_curves():
    events = tuple(
        Event(
            "step",
            float(step),
            {"step": step, "lm_loss": 5.0 - step, "kl_loss": 1.0, "gradient_norms": {"experts": 0.1}},
        )
        for step in range(4)
    )
    events = (*events, Event("note", 4.0, {"text": "its random numbers start anew"}))
    run = Run({**HEADER, "training": {"stage": "sparse", "steps": 4, "parameters": {"experts": [10, 5]}}}, events=events,
              verdicts=stored_run().verdicts[:1], footer={"ended": "complete", "exit_code": 0})  # fmt: skip
    page = Parsed(html(run))
    assert "Training, stage sparse" in page.text("h2")
    assert {"Loss", "KL of the indexer", "Norms of gradients"} <= set(page.text("figcaption"))
    assert "its random numbers start anew" in page.text("p")
    assert any("LM loss goes from 5 to 2 in 4 steps" in item["aria-label"] for item in page.all("svg"))


def test_data_of_another_shape_is_left_out():
    odd = (
        {
            "curves": 3,
            "layers": 5,
            "stages": [7, {"stage": "x"}, {"stage": "RoPE"}],
            "worst_parameters": [1],
            "mutant": 3,
        },
        {"layers": [{"layer": "a"}, 3], "worst_parameters": {"a": "b"}, "gradient_table": []},
    )
    run = stored_run(verdicts=tuple(verdict("choices.keys", Status.VERIFIED, data=data) for data in odd))
    assert Parsed(html(run)).text("h1") == ["✗ Failed"]


def test_an_empty_run_can_be_shown():
    run = Run(header={}, problem="line 1, which starts at byte 0, is cut at byte 0 and was left out.")
    assert Parsed(html(run)).text("h1") == ["✗ Did not end"]


@pytest.mark.slow
def test_a_large_run_stays_small_enough_to_be_sent():
    many = tuple(
        verdict(f"c{index % 90}", status, reason="why " * 500, reproduce="v32 verify " * 20)
        for index in range(1200)
        for status in (Status.VERIFIED, Status.FAILED)
    )
    text = html(stored_run(verdicts=many))
    assert len(text.encode()) < 2_000_000
    assert "more rows, in the record" in text
    assert "more, in the record" in text
    assert "failed 1200" in text


def test_the_kill_matrix_of_all_mutants_fits():
    mutants = tuple(mutant(number, 60) for number in range(191))
    run = stored_run(verdicts=mutants, header={**HEADER, "checks": [f"check.{n}" for n in range(90)]})
    text = html(run)
    assert len(text.encode()) < 1_000_000
    # Every sixtieth is killed by nothing.
    assert "Kill matrix: 187 of 191 mutants killed" in text
    assert "Nothing kills A000-some-wrong-line, A060-some-wrong-line" in text


def contrast(first, second):
    def luminance(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_every_colour_can_be_read_in_both_schemes():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    css = resources.files("reports").joinpath("templates/page.css.j2").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in css.split("@media (prefers", 1))
    assert set(light) == set(dark)
    for scheme in (light, dark):
        for name in ("ink", "quiet", "link", "good", "bad", "warn", *(f"series-{n}" for n in range(1, 7))):
            for ground in ("paper", "raised"):
                assert contrast(scheme[name], scheme[ground]) >= 4.5, (name, ground)


def test_a_page_is_a_function_of_its_records():
    assert html(bench_run()) == html(bench_run())
