"""`v32 bench`: what it refuses, what it keeps when something ends early, what it measures, and that a floor can fail.

Where only the processes matter, a worker without torch stands in for the real one.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from rich.console import Console

from harness.bench import command, process
from harness.bench.command import Request
from harness.bench.point import MACHINE, Point
from harness.bench.process import Worker, WorkerError
from reference import DeepseekV32Config
from reports.markdown import markdown
from reports.records import RecordError, Status, read_run, run_exit_code, verdict_line
from reports.terminal import render
from reports.timings import timings
from suites.meta.test_cli import refused, v32

TINY = {**DeepseekV32Config.preset("tiny").to_dict(), "dtype": None}
FWD = Point("optimized", "fwd", 48, 1, "float32", "cpu", 1, 0, TINY)
# Obeys the protocol; what STAND_IN says of a contestant is what goes wrong with it.
STAND_IN = """
import json, os, sys, time
point = json.loads(sys.stdin.readline())
how = json.loads(os.environ.get("STAND_IN", "{}")).get(point["contestant"], "")
def say(**answer): print(json.dumps(answer), flush=True)
if how == "does not start": sys.exit("no such thing")
if how == "does not answer": time.sleep(600)
say(backend="torch", weights_mib=1.0, rejected={"one NaN": True}, memory="none")
for number, _ in enumerate(iter(sys.stdin.readline, "")):
    if point["contestant"] == "machine":
        say(gflops=100.0)
        continue
    if how == "dies" and number == 2: os.kill(os.getpid(), 9)
    if how == "raises" and number == 0: say(error="RuntimeError: not enough memory", traceback="line\\nline")
    length = point["length"] / 512
    say(seconds=length * (9.0 if how == "slow" else 1.0) * 1.01 ** number, wall=length, peak_mib=10 * length, checksum=1.0)
"""


@pytest.fixture(autouse=True)
def _as_loud_as_before():
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stand_in(monkeypatch, here):
    """Workers are stand-ins, and nothing is verified first; `stand_in(name=how)` says what goes wrong with whom."""
    Path("stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(process, "COMMAND", (sys.executable, str(here / "stand_in.py")))
    monkeypatch.setattr(command, "CHECKS_BEFORE", dict.fromkeys(command.CHECKS_BEFORE, ()))

    def spoil(**how):
        monkeypatch.setenv("STAND_IN", json.dumps({name.replace("_", "-"): word for name, word in how.items()}))

    spoil()
    return spoil


def bench(**fields):
    """A run of stand-ins: exit code and records."""
    request = Request(**{"config": "tiny", "lengths": "512", "passes": "fwd", "out": Path("run"), **fields})
    code = command.bench(request, Console(file=open(os.devnull, "w")))  # noqa: SIM115
    return code, read_run("run")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--config", "huge"], "'huge'; available: tiny, mini, bench, small, medium"),
        (["--lengths", "512,4"], "--lengths names '4'; lengths are numbers of tokens, 8 or more"),
        (["--lengths", "512,10000000"], "--lengths is 10000000; the model has positions for 163840 tokens"),
        (["--lengths", "many"], "'many'"),
        (["--lengths", "-512"], "-512"),
        (["--lengths", ","], "--pass and --lengths must each name something"),
        (["--pass", "bwd"], "--pass names 'bwd'; allowed are fwd, fwd+bwd, kl"),
        (["--pass", ""], "--pass and --lengths must each name something"),
        (["--against", "nobody"], "'nobody'"),
        (["--against", ","], "--against is empty"),
        (["--against", "optimized"], "--against names 'optimized', which is measured already"),
        (["--against", "optimized:vulkan"], "'vulkan'"),
        (["--against", "missing.py:factory"], "missing.py, which does not exist"),
        (["--subject", "transformers", "--against", "none", "--pass", "kl"], "transformers cannot run it"),
        (["--backend", "vulkan"], "'vulkan'"),
        (["--backend", "torch", "--subject", "reference"], "has no operators to choose"),
        (["--dtype", "float16"], "--dtype is 'float16'; allowed is one of float32, bfloat16"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--batch", "0"], "--batch is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--repeats", "2"], "--repeats is 2; it must be 3 or more"),
        (["--pass", "op:softmax"], "of operators op:indexer_topk"),
        (
            ["--pass", "op:sparse_mla", "--subject", "transformers", "--against", "none"],
            "it offers no operator sparse_mla",
        ),
        (["--peak-tflops", "0"], "--peak-tflops is 0"),
        (["--timeout", "0"], "--timeout is 0"),
        (["--timeout", "nan"], "--timeout is nan"),
        (["--seed", "-1"], "--seed is -1"),
        (["--set", "topk=3"], "'topk'"),
        (["--set", "n_group=3"], "n_group is 3"),
        (["--config", "tiny", "--floors"], "--floors: no floor is on record for these points"),
        (["--dtype", "bfloat16", "--floors"], "--floors: no floor is on record"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage_is_refused_in_one_sentence(words, named, here, capsys):
    assert named in refused(capsys, "bench", *words, "--out", "run")


def test_a_place_that_cannot_be_written_is_refused_in_one_sentence(here, capsys):
    Path("file").write_text("mine")
    assert v32("bench", "--config", "tiny", "--out", "file/run") == 2
    assert "--out is file/run, which cannot be a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("dies", "was killed by SIGKILL: out of memory, most likely"),
        ("raises", "RuntimeError: not enough memory"),
        ("does not start", "ended with exit code 1"),
        ("does not answer", "gave no answer within 3 s"),
    ],
)
def test_a_worker_that_ends_is_an_error_and_takes_nothing_else_with_it(how, sentence, stand_in):
    stand_in(transformers=how)
    code, run = bench(against="transformers,reference", lengths="512,1024", timeout=3.0)
    assert code == 3
    assert run.complete
    assert "ERROR: bench.transformers" in verdict_line(run)
    by_subject = {
        name: [v for v in run.verdicts if v.subject == name] for name in ("optimized", "transformers", "reference")
    }
    assert [v.status for v in by_subject["transformers"]] == [Status.ERROR] * 2
    assert all(sentence in v.reason for v in by_subject["transformers"])
    assert [v.status for v in by_subject["optimized"] + by_subject["reference"]] == [Status.VERIFIED] * 4
    counts = {(m.subject, m.data["point"]["length"]): len(m.samples) for m in run.measurements if m.name == "time"}
    assert {counts[name, n] for name in ("optimized", "reference") for n in (512, 1024)} == {7}
    # What it had measured before it was killed is kept.
    assert counts.get(("transformers", 512), 0) == (2 if how == "dies" else 0)
    assert sentence in markdown(run)


def test_what_a_dead_worker_wrote_last_is_in_the_report(stand_in):
    stand_in(transformers="does not start")
    _, run = bench()
    assert "no such thing" in markdown(run)


def test_the_contestants_are_asked_in_turn(stand_in):
    _, run = bench(against="transformers,reference", lengths="512", repeats=4)
    at = {m.subject: m.data["point"]["at"] for m in run.measurements if m.name in ("time", "matmul rate")}
    order = [name for _, name in sorted((when, name) for name, whens in at.items() for when in whens)]
    assert order == [MACHINE, "optimized", "transformers", "reference"] * 4


def test_seven_samples_of_short_points_and_three_of_long_ones(stand_in):
    _, run = bench(lengths="2048,4096", against="none")
    assert {m.data["point"]["length"]: len(m.samples) for m in run.measurements if m.name == "time"} == {
        2048: 7,
        4096: 3,
    }


def test_ctrl_c_keeps_what_has_come_and_ends_the_workers(stand_in, monkeypatch):
    inner, pids, calls = Worker.run, set(), []

    def interrupted(self):
        pids.add(self.pid)
        calls.append(self.point.contestant)
        if calls.count("transformers") == 10:
            raise KeyboardInterrupt
        return inner(self)

    monkeypatch.setattr(Worker, "run", interrupted)
    code, run = bench(lengths="512,1024")
    assert code != 0
    assert run.footer["ended"] == "interrupted"
    samples = {(m.subject, m.data["point"]["length"]): len(m.samples) for m in run.measurements if m.name == "time"}
    assert samples == {
        ("optimized", 512): 7,
        ("transformers", 512): 7,
        ("optimized", 1024): 3,
        ("transformers", 1024): 2,
    }
    assert "This report is not of a whole run" in Path("run/report.md").read_text()
    assert len(pids) == 5
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_run_cut_at_any_byte_still_gives_a_report(stand_in):
    stand_in(reference="dies")
    _, run = bench(against="transformers,reference", lengths="512,1024,2048", config="bench")
    whole = Path("run/run.jsonl").read_bytes()
    full = markdown(run)
    for part in ("Time and memory", "Growth with the length", "Floors", "of the rate"):
        assert part in full
    for size in [*range(0, len(whole), 211), len(whole) - 1]:
        Path("cut.jsonl").write_bytes(whole[:size])
        try:
            cut = read_run("cut.jsonl")
        except RecordError:
            assert size < 40
            continue
        assert not cut.complete or size == len(whole) - 1
        assert markdown(cut)
        with open(os.devnull, "w") as nowhere:
            render(cut, Console(file=nowhere, width=80))


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_table_fits_the_terminal(width, stand_in, capsys):
    _, run = bench(against="transformers,dense-flash", lengths="512,1024,2048", config="bench")
    render(run, Console(width=width))
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines[:-1]) <= width
    assert lines[-1] == verdict_line(run)


def test_a_slow_subject_misses_its_floor(stand_in):
    fields = {"config": "bench", "lengths": "512,1024,2048", "floors": True}
    stand_in(transformers="slow")
    code, run = bench(**fields)
    assert (code, run_exit_code(run)) == (0, 0)
    assert verdict_line(run).endswith("every floor is met")
    stand_in()
    code, run = bench(**fields)
    assert code == 1
    missed = [v for v in run.verdicts if v.status is Status.FAILED]
    assert [(v.check, v.case) for v in missed] == [
        ("bench.floor", "fwd at L 512: 1.5 times as fast as transformers"),
        ("bench.floor", "fwd at L 2048: 5 times as fast as transformers"),
    ]
    assert all(null.rejected for v in missed for null in v.nulls)
    # The same numbers without --floors are only reported.
    code, run = bench(**{**fields, "floors": False})
    assert code == 0
    cells = timings(run).floor_cells()
    assert [row[2] for row in cells] == ["no", "no", "yes"]


def test_a_floor_whose_points_were_not_measured_is_not_met_in_silence(stand_in):
    stand_in(transformers="dies")
    code, run = bench(config="bench", floors=True)
    assert code == 3
    assert [v.status for v in run.verdicts if v.check == "bench.floor"] == [Status.SKIPPED]
    assert timings(run).floor_cells()[0][2] == "not measured"


def test_a_contestant_that_is_not_verified_is_not_timed(stand_in, monkeypatch):
    monkeypatch.setattr(command, "CHECKS_BEFORE", {"fwd": ("parity.logits",)})
    Path("wrong.py").write_text(
        "from harness.subjects import resolve_subject\n"
        "def factory(config, state, *, device, dtype):\n"
        "    model = resolve_subject('reference').build(config, state, device, dtype)\n"
        "    model.lm_head.weight.data *= 1.04\n"
        "    return model\n"
        "factory.capabilities = {'tape'}\n"
    )
    code, run = bench(against="wrong.py:factory")
    assert code == 1
    statuses = {v.check: v.status for v in run.verdicts if v.subject == "wrong.py:factory"}
    assert statuses == {"parity.logits": Status.FAILED, "bench.wrong.py:factory": Status.SKIPPED}
    assert {m.subject for m in run.measurements if m.name == "time"} == {"optimized"}
    code, run = bench(subject="wrong.py:factory", against="reference")
    assert code == 1
    assert not [m for m in run.measurements if m.name == "time"]


def test_what_a_peer_cannot_run_is_not_applicable(stand_in):
    code, run = bench(passes="kl", against="transformers,dense-flash,reference")
    assert code == 0
    reasons = {v.subject: v.reason for v in run.verdicts if v.status is Status.NOT_APPLICABLE}
    assert set(reasons) == {"transformers", "dense-flash"}
    assert "it has no indexer" in reasons["dense-flash"]


def test_a_given_peak_replaces_the_measured_rate(stand_in):
    shares = []
    # The stand-in's machine has 100 GFLOP/s.
    for given, rate in ((None, 100.0), (0.02, 20.0)):
        _, run = bench(config="bench", against="none", repeats=3, peak_tflops=given)
        [row] = timings(run).cells()
        shares.append(float(row[-1].rstrip("%")))
        assert shares[-1] == pytest.approx(100 * float(row[-2]) / rate, abs=1)
    assert shares[1] > 4 * shares[0] > 0
    assert "the given peak of 0.02 TFLOP/s" in markdown(run)


def test_a_real_process_answers_and_one_that_is_killed_is_named():
    asked = Worker(replace(FWD, contestant="transformers", pass_="fwd+bwd"), 120)
    try:
        assert asked.ready["rejected"] == {"one NaN": True, "zeros": True, "no gradients": True}
        first, second = asked.run(), asked.run()
        assert first["checksum"] == second["checksum"] > 0
        assert 0 < first["seconds"] < 60
        assert 0 < first["peak_mib"] < 500
        os.kill(asked.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="killed by SIGKILL"):
            asked.run()
    finally:
        asked.close()
