"""Reports of stored runs: complete, inert to hostile text, and as wide as they may be."""

import io
import math
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from reports.markdown import markdown
from reports.records import Measure, Measurement, NullCandidate, Run, Status, Verdict, verdict_line
from reports.terminal import Progress, _fitting, render
from reports.text import clean, duration, number, percent, sparkline, spread

HOSTILE = "[bold]x[/] [/] | `code` ``` <script>&</script>\r\n\x1b[31m\u202eback\ud800 :smile: *a* _b_ \\"
HEADER = {
    "subject": "optimized",
    "config": "tiny",
    "device": "cpu",
    "dtypes": ["fp32", "bf16"],
    "seed": 0,
    "command": ["v32", "verify"],
    "environment": {
        "versions": {"torch": "2.13.0"},
        "cpu": {"cores": 2},
        "git": None,
        "torch": {"tf32": False},
    },
}
FOOTER = {"ended": "complete", "exit_code": 1}


def verdict(check, status, family="parity", **fields):
    return Verdict(check, family, "optimized", "text-left-padded", status, dtype="fp32", device="cpu", **fields)


def stored_run(text="why", **fields):
    curves = {"reference": [5.0 - index / 50 for index in range(200)], "subject": [5.0, math.nan, 3.0]}
    rows = [
        {"group": "indexer", "LM loss": "none", "L_I": "finite"},
        {"group": "experts", "LM loss": "finite"},
    ]
    table = {"columns": ["LM loss", "L_I"], "rows": rows}
    verdicts = (
        verdict(
            "parity.logits",
            Status.VERIFIED,
            measures=(Measure("max", 4.1e-6, 1e-5), Measure("mean", 1e-9, 1e-5)),
        ),
        verdict(
            "parity.grads",
            Status.FAILED,
            reason=text,
            measures=(Measure("worst row", 0.02, 0.01),),
            nulls=(NullCandidate("zeros", True), NullCandidate("dead channel", True)),
            reproduce=f"v32 verify --case '{text}'",
        ),
        verdict(text, Status.VACUOUS, nulls=(NullCandidate(text, False, text),), data={"traceback": text}),
        verdict("selection.keys", Status.SKIPPED, "selection", reason="no GPU"),
        verdict("selection.fp8", Status.NOT_APPLICABLE, "selection", reason="fp8 is not declared"),
        verdict("training.curve", Status.VERIFIED, "training", data={"curves": curves, "gradient_table": table}),
    )
    measurements = (Measurement("forward", "optimized", "L 64", (1.0, 3.0, 2.0), "ms"),)
    return Run(**{"header": HEADER, "verdicts": verdicts, "measurements": measurements, "footer": FOOTER, **fields})


def printed(run, width=100, **options):
    file = io.StringIO()
    render(run, Console(file=file, width=width, **options))
    return file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 109, 110, 200])
@pytest.mark.parametrize("text", ["a reason " * 30, HOSTILE, "one" * 100])
def test_nothing_is_wider_than_the_terminal(width, text):
    run = stored_run(text)
    lines = printed(run, width).splitlines()
    for line in lines:
        # Commands and the verdict are single lines, so that they can be copied.
        if not line.startswith(("$ ", "verified ", "vacuous: ")):
            assert cell_len(line.rstrip()) <= width
    assert lines[-1] == clean(verdict_line(run))
    assert "parity.logits" in "".join(lines)


def test_the_terminal_report_is_complete():
    text = printed(stored_run(), 160)
    for part in (
        "optimized",
        "fp32, bf16",
        "v32 verify",
        "4.1e-06 / 1e-05",
        "41%",
        "200%",
        "step 0",
        "step 199",
        "fp8 is not declared",
        "$ v32 verify --case 'why'",
        "beyond its budget: worst row 0.02 / 0.01",
        "accepted the null candidate",
    ):
        assert part in text
    assert "2 to look at" in text
    assert "who gets gradient" in text
    assert "1 to 3 ms" in text


def test_plain_output_has_no_escape_codes(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert "\x1b" not in printed(stored_run(HOSTILE))
    assert "\x1b" in printed(stored_run(), force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3\dm", printed(stored_run(), force_terminal=True))


def test_hostile_text_is_inert_on_a_terminal():
    text = printed(stored_run(HOSTILE), 200, force_terminal=True, color_system="standard")
    assert "[bold]x[/] [/]" in text
    assert ":smile:" in text
    assert "\x1b[31mback" not in text
    assert "\u202e" not in text
    text.encode("utf-8")


def test_an_ascii_terminal_gets_ascii():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    render(stored_run(HOSTILE), Console(file=stream, width=80))
    stream.flush()


def test_progress_elsewhere_is_a_line_a_verdict():
    file = io.StringIO()
    console = Console(file=file, width=40, force_terminal=False)
    with Progress(console, total=2) as progress:
        for item in stored_run(HOSTILE).verdicts[:2]:
            progress.start(item.check, item.case, item.dtype)
            progress.done(item)
        progress.note("received: cpu")
    first, second, note = file.getvalue().splitlines()
    assert first == "verified  parity.logits  fp32  text-left-padded  0.41 of budget  0.0s"
    assert second.startswith("failed  parity.grads  fp32  text-left-padded  2.00 of budget  0.0s  [bold]x[/]")
    assert note == "received: cpu"
    assert "\x1b" not in first + second


@pytest.mark.parametrize("width", [60, 200])
def test_progress_on_a_terminal_is_a_bar(width):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system="standard")
    with Progress(console, total=6) as progress:
        for item in stored_run(HOSTILE).verdicts:
            progress.start(item.check, item.case, item.dtype)
            progress.done(item)
    text = file.getvalue()
    assert "6/6" in text
    # Verdicts that need no reading leave no line behind.
    assert "failed  parity.grads" in text
    assert "verified  parity.logits" not in text


def test_markdown_is_complete():
    text = markdown(stored_run())
    assert text.startswith("## verified 2 · failed 1 · vacuous 1")
    order = [
        "**subject:** optimized",
        "2 to look at",
        "```\nv32 verify --case 'why'\n```",
        "### parity",
        "### Who gets gradient",
        "| experts | finite |  |",
        "### Curves",
        "### Measurements",
        "### Not checked",
        "no GPU",
        "| parity.grads | zeros, dead channel | yes |",
        "<details><summary>Environment",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "| torch.tf32 | no |" in text
    assert "no: why" in text


def test_hostile_text_is_inert_in_markdown():
    text = markdown(stored_run(HOSTILE))
    assert "\x1b" not in text
    assert "\u202e" not in text
    text.encode("utf-8")
    # The fence is longer than any run of backticks in the command.
    fence = re.findall(r"^(`{4,})\nv32 verify", text, re.MULTILINE)[0]
    body, outside = text.split(fence)[1], "".join(text.split(fence)[::2])
    assert "```" in body
    assert "<script>" not in outside
    assert "&lt;script&gt;&amp;" in outside
    assert not re.search(r"(?<!\\)`", outside)
    tables = [line for line in outside.splitlines() if line.startswith("| ")]
    for line in tables:
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1
        assert cells in (2, 3, 4, 6, 7, 9)
    assert any("vacuous" in line and line.count("[bold") == line.count("\\[bold") == 1 for line in tables)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"footer": None}, "the file has no footer"),
        (
            {"footer": None, "problem": "line 3, which starts at byte 90, is cut at byte 97."},
            "cut at byte 97",
        ),
        (
            {"footer": {"ended": "interrupted", "reason": "KeyboardInterrupt"}},
            "interrupted by KeyboardInterrupt",
        ),
    ],
)
def test_a_run_that_did_not_end_says_so_first(fields, said):
    run = stored_run(**fields)
    first = markdown(run).split("\n\n")[:2]
    assert "did not end" in first[0]
    assert said in first[0]
    assert said in first[1]
    assert printed(run).splitlines()[-1].startswith("run did not end: ")


@pytest.mark.parametrize("reason", ["# title", "- item", "1. item", "+ item", "#"])
def test_a_reason_does_not_start_a_block(reason):
    text = markdown(stored_run(reason))
    assert f"\n- {reason}" not in text
    assert f"\n- {reason[0]}\\" in text or f"\n- \\{reason[0]}" in text


def test_an_empty_run_can_be_shown():
    run = Run(header={}, problem="line 1, which starts at byte 0, is cut at byte 0 and was left out.")
    assert printed(run).startswith("run did not end")
    assert markdown(run).startswith("## run did not end")


def test_data_of_another_shape_is_left_out():
    odd = (
        {"curves": 3, "gradient_table": []},
        {"curves": {"a": ["x"], "b": []}, "gradient_table": {"rows": 1}},
    )
    verdicts = tuple(verdict("c", Status.VERIFIED, data=data) for data in odd)
    run = stored_run(verdicts=verdicts)
    assert "### Curves" not in markdown(run)
    assert "who gets" not in printed(run)


def test_a_large_run_still_fits_a_comment():
    many = tuple(
        verdict(f"c{index}", status, reason="why " * 500, reproduce="v32 verify")
        for index in range(3000)
        for status in (Status.VERIFIED, Status.FAILED, Status.SKIPPED)
    )
    text = markdown(stored_run(verdicts=many))
    assert len(text) < 65_000
    assert "more, in the record" in text
    assert "verified 3000 · failed 3000" in text


def test_texts():
    expected = ["0%", "<1%", "41%", "100%", "101%", "320%", "1e+05x", "inf"]
    shares = (0.0, 0.004, 0.41, 1.0, 1.0001, 3.2, 1e5, math.inf)
    assert [percent(value) for value in shares] == expected
    assert [number(value) for value in (0.0, 12.0, 4.1234e-6, math.nan)] == ["0", "12", "4.12e-06", "nan"]
    assert [duration(value) for value in (1.23, 59.96, 185, 7800)] == ["1.2s", "1m00s", "3m05s", "2h10m"]
    assert sparkline([0.0, 1.0, math.nan, 1.0]) == "▁█!█"
    assert sparkline([1e308, -1e308]) == "█▁"
    assert sparkline([math.nan, math.inf]) == "!!"
    assert spread(200, 5) == [0, 50, 100, 149, 199]


def test_a_table_too_wide_for_a_terminal_is_turned_and_loses_nothing():
    columns = ["", *(f"loss, text {i}" for i in range(12))]
    cells = [[name, *(f"{name}{i:06}" for i in range(12))] for name in ("dense", "untrained", "random keys")]
    assert list(_fitting(columns, cells, 1000)) == [(columns, cells)]
    parts = list(_fitting(columns, cells, 36))
    assert len(parts) > 1
    found = {
        (name, row[0]): cell
        for names, rows in parts
        for row in rows
        for name, cell in zip(names[1:], row[1:], strict=True)
    }
    assert found == {(row[0], name): cell for row in cells for name, cell in zip(columns[1:], row[1:], strict=True)}
    for names, rows in parts:
        assert sum(max(map(len, column)) for column in zip(names, *rows, strict=True)) <= 36 or len(names) == 2
    # Few columns are prose, which folds.
    assert list(_fitting(["a", "why"], [["x", "y" * 90]], 36)) == [(["a", "why"], [["x", "y" * 90]])]
