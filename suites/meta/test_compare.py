"""`v32 compare`: a slowdown is found and named, equal runs are equal every time, and what cannot be judged is not."""

import itertools
import random

import pytest

from harness.cli import main
from reports.compare import LEAST_SAMPLES, compare
from reports.compare_view import html, markdown
from reports.ranks import mann_whitney
from reports.records import Measure, Measurement, NullCandidate, RunWriter, Status, Verdict, read_run
from suites.meta.test_reports import HOSTILE

TIMES = {("fwd", 512): 0.05, ("fwd", 2048): 0.2, ("fwd+bwd", 512): 0.15, ("fwd+bwd", 2048): 0.7}


def header(**changes):
    environment = {"cpu": {"model": "one", "cores": 2}, "gpu": [], "versions": {"torch": "2.13.0"}}
    return {"subject": "optimized", "config": "bench", "seed": 0, "device": "cpu", "environment": environment,
            "bench": {"subject": "optimized", "batch": 1}, **changes}  # fmt: skip


def point(contestant, pass_, length, quantity, samples, unit):
    data = {"contestant": contestant, "pass": pass_, "length": length, "quantity": quantity, "dtype": "float32"}
    names = {"seconds": "time", "wall": "wall time", "peak_mib": "peak growth", "gflops": "matmul rate"}
    return Measurement(names[quantity], contestant, f"{pass_}, L {length}", tuple(samples), unit, {"point": data})


def check(name="parity.logits", value=0.3, status=Status.VERIFIED, case="text", **fields):
    return Verdict(name, name.partition(".")[0], "optimized", case, status, dtype="float32", device="cpu",
                   measures=(Measure("max", value, 1.0),), nulls=(NullCandidate("zeros", True),), **fields)  # fmt: skip


def bench(path, seed, *, slower=(), larger=(), factor=1.5, load=1.0, samples=LEAST_SAMPLES, checks=None, **changes):
    """A run as a loaded machine measures it: noise with a tail, bursts of neighbours, and its own rate beside it.

    Of memory a process keeps more or less, the same in all of its samples.
    """
    draw, process = random.Random(seed), random.Random(f"memory of {seed}")

    def noisy(middle):
        burst = draw.uniform(1.2, 1.8) if draw.random() < 0.1 else 1.0
        return middle * load * burst * (1 + abs(draw.gauss(0, 0.05)))

    with RunWriter(path / "run.jsonl", header(**changes)) as writer:
        for verdict in [check()] if checks is None else checks:
            writer.write(verdict)
        for (pass_, length), time in TIMES.items():
            own = time * (factor if (pass_, length) in slower else 1.0)
            for contestant, middle in (("optimized", own), ("transformers", 3 * time)):
                found = [noisy(middle) for _ in range(samples)]
                writer.write(point(contestant, pass_, length, "seconds", found, "s"))
                writer.write(point(contestant, pass_, length, "wall", [2 * value for value in found], "s"))
                kept = process.uniform(-1.6, 1.6)
                peak = length / 50 * (factor if (pass_, length) in larger and contestant == "optimized" else 1.0)
                peaks = [peak + kept + draw.choice((0.0, 0.1, 0.4)) for _ in range(samples)]
                writer.write(point(contestant, pass_, length, "peak_mib", peaks, "MiB"))
            rates = [100 / load * (1 + draw.gauss(0, 0.03)) for _ in range(samples)]
            writer.write(point("machine", pass_, length, "gflops", rates, "GFLOP/s"))
    return path


def compared(*words):
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, words)])
    return ended.value.code


def test_a_slowdown_is_found_and_named(tmp_path, capsys):
    before = bench(tmp_path / "a", 1, samples=15)
    after = bench(tmp_path / "b", 2, slower=[("fwd+bwd", 2048)], samples=15)
    assert compared(before, after, "--out", tmp_path / "out") == 4
    last = capsys.readouterr().out.splitlines()[-1]
    assert "SLOWER OR LESS ACCURATE: optimized, fwd+bwd, L 2048, time, float32 1." in last
    assert "512" not in last
    for name in ("compare.md", "compare.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "fwd+bwd, L 2048" in text
        assert "worse" in text


@pytest.mark.parametrize("samples", [LEAST_SAMPLES, 15])
def test_equal_runs_are_equal_twenty_times_of_twenty(samples, tmp_path):
    for number in range(20):
        before, after = (bench(tmp_path / f"{first + number}", first + number, samples=samples) for first in (100, 900))
        assert compare(read_run(before), read_run(after)).exit_code == 0


def test_a_slowdown_is_found_twenty_times_of_twenty_and_nothing_else(tmp_path):
    # With 7 samples a neighbour's burst in the faster run can hide it: that leaves no p below 0.002.
    for number in range(20):
        slower = list(TIMES)[number % 4]
        before = bench(tmp_path / f"a{number}", 100 + number, samples=15)
        after = bench(tmp_path / f"b{number}", 900 + number, samples=15, slower=[slower])
        found = compare(read_run(before), read_run(after))
        assert [name.split(", ")[1:3] for name in found.worse] == [[slower[0], f"L {slower[1]}"]]


def test_more_memory_is_found_and_what_a_process_keeps_is_not(tmp_path):
    before = bench(tmp_path / "a", 1, samples=15)
    found = compare(read_run(before), read_run(bench(tmp_path / "b", 2, samples=15, larger=[("fwd", 2048)])))
    assert [name.split(", ")[1:4] for name in found.worse] == [["fwd", "L 2048", "peak growth"]]
    # Half as much again of 10 MiB is less than what two processes of one program can differ by.
    found = compare(read_run(before), read_run(bench(tmp_path / "c", 3, samples=15, larger=[("fwd", 512)])))
    assert found.exit_code == 0
    assert any("by which processes of one program differ" in drift.why for drift in found.times)


def test_what_slows_the_whole_machine_is_no_regression(tmp_path):
    before, after = bench(tmp_path / "a", 1, samples=15), bench(tmp_path / "b", 2, load=1.6, samples=15)
    found = compare(read_run(before), read_run(after))
    assert found.exit_code == 0
    times = [drift for drift in found.times if ", time" in drift.name and drift.name.startswith("optimized")]
    assert all("the machine's own rate changed" in drift.why for drift in times)
    # On a slower machine a slower subject is still seen.
    slower = bench(tmp_path / "c", 3, load=1.6, slower=[("fwd", 512)], samples=15)
    assert len(compare(read_run(before), read_run(slower)).worse) == 1


def test_a_small_or_uncertain_slowdown_is_not_judged_as_one(tmp_path):
    before = bench(tmp_path / "a", 1)
    assert compared(before, bench(tmp_path / "b", 2, slower=list(TIMES), factor=1.05)) == 0
    few = bench(tmp_path / "c", 1, samples=6), bench(tmp_path / "d", 2, samples=6, slower=list(TIMES), factor=3.0)
    found = compare(*map(read_run, few))
    assert found.exit_code == 0
    assert {drift.why for drift in found.times if drift.name.startswith("optimized") and "wall" not in drift.name} == {
        "6 samples a side; a judgement takes 7"
    }


def test_a_slower_peer_is_nobodys_regression(tmp_path):
    before = bench(tmp_path / "a", 1)
    run = read_run(before)
    found = compare(run, read_run(bench(tmp_path / "b", 2)))
    peers = [drift for drift in found.times if drift.name.startswith("transformers")]
    assert {drift.word for drift in peers} == {"not judged"}
    assert not any(drift.name.startswith("machine") for drift in found.times)


@pytest.mark.parametrize(
    ("after", "code", "said"),
    [
        ([check(value=0.32)], 0, "nothing is slower or less accurate"),
        ([check(value=0.6)], 4, "parity.logits, optimized, float32, share of budget 2x"),
        ([check(value=1.2, status=Status.FAILED)], 4, "parity.logits on text is failed"),
        ([check(status=Status.ERROR, reason="boom")], 4, "parity.logits on text is error"),
        ([check(status=Status.SKIPPED)], 4, "parity.logits on text is skipped"),
        ([check(value=0.1)], 0, "1 better"),
    ],
)
def test_accuracy_and_answers(after, code, said, tmp_path, capsys):
    assert compared(bench(tmp_path / "a", 1), bench(tmp_path / "b", 1, checks=after)) == code
    assert said in capsys.readouterr().out.splitlines()[-1]


def test_a_small_share_of_a_budget_may_grow(tmp_path):
    before, after = (bench(tmp_path / str(share), 1, checks=[check(value=share)]) for share in (0.001, 0.05))
    assert compared(before, after) == 0


def test_a_check_that_failed_already_is_not_a_regression(tmp_path):
    runs = [bench(tmp_path / name, 1, checks=[check(value=2.0, status=Status.FAILED)]) for name in "ab"]
    assert compared(*runs) == 0


@pytest.mark.parametrize("after", [Status.SKIPPED, Status.NOT_APPLICABLE])
def test_a_check_that_no_longer_looks_is_a_regression(tmp_path, capsys, after):
    before = bench(tmp_path / "a", 1, checks=[check(), check("kl.loss")])
    blind = [check(), check("kl.loss", status=after)]
    assert compared(before, bench(tmp_path / "b", 1, checks=blind)) == 4
    assert "kl.loss" in capsys.readouterr().out
    # On another machine it may have to be left out.
    other = {"cpu": {"model": "two", "cores": 2}, "gpu": []}
    assert compared(before, bench(tmp_path / "c", 1, checks=blind, environment=other)) == 0


def test_missing_and_new_checks_are_named(tmp_path, capsys):
    before = bench(tmp_path / "a", 1, checks=[check(), check("kl.loss")])
    after = bench(tmp_path / "b", 1, checks=[check(), check("probes.tape")])
    assert compared(before, after, "--out", tmp_path) == 0
    text = (tmp_path / "compare.md").read_text()
    assert text.index("Missing from the second run") < text.index("kl.loss")
    assert text.index("New in the second run") < text.index("probes.tape")


def test_other_hardware_and_versions_are_flagged_and_times_then_not_judged(tmp_path, capsys):
    other = {"cpu": {"model": "two", "cores": 2}, "gpu": [], "versions": {"torch": "2.11.0"}}
    before, after = bench(tmp_path / "a", 1), bench(tmp_path / "b", 2, slower=list(TIMES), environment=other)
    assert compared(before, after) == 0
    out = capsys.readouterr().out
    assert "different hardware: times and memory are not judged" in out
    assert "cpu.model" in out
    assert "versions.torch" in out
    # Accuracy has nothing to do with it.
    worse = bench(tmp_path / "c", 2, checks=[check(value=0.9)], environment=other)
    assert compared(before, worse) == 4


def test_other_inputs_are_not_judged_at_all(tmp_path, capsys):
    before, after = bench(tmp_path / "a", 1), bench(tmp_path / "b", 2, checks=[check(value=0.9)], config="tiny")
    assert compared(before, after) == 3
    assert "nothing could be judged: the inputs differ" in capsys.readouterr().out.splitlines()[-1]


def test_a_run_that_did_not_end_is_never_equal(tmp_path, capsys):
    before, after = bench(tmp_path / "a", 1), bench(tmp_path / "b", 2)
    content = (after / "run.jsonl").read_bytes()
    (after / "run.jsonl").write_bytes(content[: len(content) - 100])
    assert compared(before, after) == 3
    assert "the second run did not end" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "named"),
    [(["a", "nowhere"], "nowhere"), (["a"], "AFTER"), (["a", "other"], "no check and no measurement in common"),
     (["a", "a", "--out", "file/x"], "--out")],
)  # fmt: skip
def test_wrong_use_is_refused_in_one_sentence(words, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bench(tmp_path / "a", 1)
    (tmp_path / "file").touch()
    with RunWriter(tmp_path / "other" / "run.jsonl", header()) as writer:
        writer.write(check("probes.tape", case="elsewhere"))
    assert compared(*words) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert named.lower() in said.err.lower()


def test_hostile_texts_are_inert(tmp_path):
    runs = [bench(tmp_path / name, 1, checks=[check(HOSTILE, case=HOSTILE, reason=HOSTILE, status=status)], subject=HOSTILE + name)
            for name, status in (("a", Status.VERIFIED), ("b", Status.FAILED))]  # fmt: skip
    found = compare(*map(read_run, runs))
    page, text = html(found, (HOSTILE, "b")), markdown(found, (HOSTILE, "b"))
    assert found.exit_code == 4
    for shown in (page, text):
        assert "<script" not in shown
        assert "\x1b" not in shown
        shown.encode("utf-8")
    assert "&lt;script&gt;" in page


def brute_force(first, second):
    pooled = [*first, *second]
    ranks = [sum(other < value for other in pooled) + sum(other <= value for other in pooled) + 1 for value in pooled]
    middle = sum(ranks) * len(first) / len(pooled)
    far = abs(sum(ranks[: len(first)]) - middle)
    deals = list(itertools.combinations(ranks, len(first)))
    return sum(abs(sum(deal) - middle) >= far - 1e-9 for deal in deals) / len(deals)


def test_the_rank_test_counts_every_deal():
    draw = random.Random(0)
    for _ in range(150):
        first, second = ([draw.randint(0, 6) for _ in range(draw.randint(1, 6))] for _ in range(2))
        assert mann_whitney(first, second) == pytest.approx(brute_force(first, second))
    assert mann_whitney(range(7), range(7, 14)) == pytest.approx(2 / 3432)
    assert mann_whitney([1.0] * 7, [1.0] * 9) == 1.0


@pytest.mark.parametrize(("first", "second"), [([], [1.0]), ([1.0], []), ([1.0], [float("nan")])])
def test_the_rank_test_refuses_what_has_no_rank(first, second):
    with pytest.raises(ValueError, match="samples"):
        mann_whitney(first, second)
