"""`v32 bench` under pytest-benchmark: the same command and records as on the command line, held to its floors.

What pytest-benchmark times is the whole command; the samples of the passes are in the record, and their medians in the
benchmark's extra information. Records stay in the folder that `--basetemp` names.
"""

from pathlib import Path

import pytest
import transformers
from rich.console import Console

from harness.bench.command import Request, bench
from reports.records import Status, read_run, verdict_line
from reports.timings import timings

pytestmark = pytest.mark.perf

# Burns a second of CPU time in each forward, and computes what the reference does.
SLOW = """
import time
from harness.subjects import ALL, resolve_subject

def factory(config, state, *, device, dtype):
    model = resolve_subject("reference").build(config, state, device, dtype)
    inner = model.forward

    def forward(*args, **kwargs):
        end = time.process_time() + 1.0
        while time.process_time() < end:
            pass
        return inner(*args, **kwargs)

    model.forward = forward
    return model

factory.capabilities = ALL - {"model"}
"""


@pytest.fixture(autouse=True)
def _as_loud_as_before():
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.fixture
def measured(benchmark, tmp_path):
    """Runs a request once; returns its exit code and its run, whose medians are in the benchmark's information."""

    def run(**fields):
        request = Request(out=tmp_path / "run", **fields)
        code = benchmark.pedantic(bench, args=(request, Console(width=120)), rounds=1, iterations=1)
        records = read_run(request.out)
        assert records.complete, verdict_line(records)
        found = timings(records)
        if found is not None:
            for row in found.rows:
                for quantity in ("seconds", "peak_mib", "gflops"):
                    if (value := row.middle(quantity)) is not None:
                        benchmark.extra_info[f"{row.contestant}, {row.case}, {quantity}"] = value
        return code, records

    return run


def test_the_floors_at_512_hold(measured):
    code, run = measured(lengths="512", against="transformers,dense-flash", floors=True)
    assert code == 0, verdict_line(run)
    floors = [verdict for verdict in run.verdicts if verdict.check == "bench.floor"]
    assert [verdict.status for verdict in floors] == [Status.VERIFIED] * 2
    for measurement in run.measurements:
        assert len(measurement.samples) == 7


def test_a_slow_subject_misses_the_floors(measured, tmp_path):
    path = Path(tmp_path / "slow.py")
    path.write_text(SLOW)
    code, run = measured(lengths="512", subject=f"{path}:factory", floors=True, repeats=3)
    assert code == 1
    floors = [verdict for verdict in run.verdicts if verdict.check == "bench.floor"]
    assert [verdict.status for verdict in floors] == [Status.FAILED] * 2


@pytest.mark.slow
def test_the_floors_of_all_lengths_hold(measured):
    lengths = "512,1024,2048,4096,8192"
    code, run = measured(lengths=lengths, against="transformers,dense-flash", floors=True)
    assert code == 0, verdict_line(run)


@pytest.mark.slow
def test_the_floors_of_the_indexer_at_its_true_width_hold(measured):
    wide = ("index_n_heads=64", "index_head_dim=128")
    code, run = measured(lengths="2048", passes="fwd", batch=2, overrides=wide, floors=True)
    assert code == 0, verdict_line(run)


@pytest.mark.slow
def test_the_dense_warm_up_step_holds_no_square_of_the_length(measured):
    code, run = measured(lengths="4096,8192,16384,32768", passes="kl", against="none", floors=True)
    assert code == 0, verdict_line(run)
    growth = {event.data["quantity"]: event.data["exponent"] for event in run.events if event.kind == "growth"}
    # A tensor of L x L would bring 2.
    assert growth["peak growth"] <= 1.1
