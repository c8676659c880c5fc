"""`v32 plan`: what it writes and shows, its exit codes, and one sentence for every request that cannot be planned."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.bench.point import TRAINING
from harness.cli import app
from harness.plan.command import Request, document, job_for, memory_verdict, parameters_verdict
from harness.plan.hardware import GPUS
from harness.plan.layouts import ranked
from harness.plan.measured import fraction
from reports.html import html
from reports.records import RunWriter, read_run
from reports.schema import Measurement, Status

ROOT = Path(__file__).parents[2]
QUICK = ("--config", "tiny", "--gpus", "2xH100", "--seq-len", "256", "--no-check")


def run(*words):
    return CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "200"})


def test_a_plan_is_recorded_reported_and_shown(tmp_path):
    result = run(*QUICK, "--stage", "warmup", "--tokens", "1e9", "--price", "4", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    for word in ("layouts that fit", "GiB", "indexer", "KL of the indexer", "tokens/s", "US$", "No fraction of a H100"):
        assert word in result.output, word
    found = read_run(tmp_path)
    plan = found.header["plan"]
    assert {one["layout"] for one in plan["layouts"]} == {
        "dp=2,cp=1,ep=1,tp=1", "dp=1,cp=2,ep=1,tp=1", "dp=1,cp=1,ep=2,tp=1", "dp=1,cp=1,ep=1,tp=2",
    }  # fmt: skip
    counts = {group["group"]: group["count"] for group in plan["parameters"]}
    assert sum(group["trainable"] for group in plan["parameters"]) == counts["indexer"]
    for name in ("report.md", "report.html", "junit.xml", "report.json"):
        assert (tmp_path / name).is_file()
    page = html(found)
    assert 'id="plan"' in page
    assert "Layouts that fit" in page
    assert "Layouts that fit" in (tmp_path / "report.md").read_text()


def test_nothing_is_written_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*QUICK).exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_what_fits_nowhere_fails_and_says_why():
    result = run("--config", "v32", "--gpus", "1xH200", "--stage", "sparse", "--seq-len", "4096", "--no-check")
    assert result.exit_code == 1
    assert "FAILED: plan.fits" in result.output
    assert re.search(r"A rank needs [\d.]+ GiB, most of all [\d.]+ GiB for", result.output)


def test_the_issue_s_example_fits():
    result = run("--config", "v32", "--seq-len", "131072", "--stage", "warmup", "--gpus", "64xH200", "--no-check")
    assert result.exit_code == 0, result.output
    assert "851,524,864" in result.output
    assert "84 layouts were tried on 64 x H200" in result.output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--gpus", "8xTPU"), "--gpus names 'TPU'; known are A100-40, A100, H100, H200, B200."),
        (("--gpus", "0xH200"), "--gpus asks for 0; it must be 1 to 65536."),
        (("--gpus", "eight"), "--gpus names 'eight'"),
        (("--gpus", "8 of H200"), "--gpus is '8 of H200'; it must be a number and a type, such as 64xH200."),
        (("--config", "v33"), "Unknown preset 'v33'"),
        (("--stage", "pretrain"), "--stage is 'pretrain'; allowed are dense, warmup, sparse, sft."),
        (("--dtype", "float8"), "--dtype is 'float8'; allowed are float32, bfloat16."),
        (("--seq-len", "200000"), "--seq-len is 200000; the model has positions for 163840 tokens"),
        (("--seq-len", "0"), "--seq-len is 0; it must be 1 or more."),
        (("--batch", "0"), "--batch is 0; it must be 1 or more."),
        (("--headroom", "1"), "--headroom is 1.0; it must be 0 or more and below 1."),
        (("--tokens", "-1"), "--tokens is -1.0; it must be a number above 0."),
        (("--parallel", "dp=3"), "--parallel is 'dp=3', a layout for 3 GPUs; --gpus is 2 x H100: one GPU a rank."),
        (("--price", "4"), "--price is 4.0, which needs --tokens, the run that is paid for."),
        (("--parallel", "pp=2"), "names 'pp' which is no axis"),
        (("--config", "tiny", "--gpus", "8xH200", "--parallel", "tp=8"), "config.num_attention_heads is 4, which tp = 8 does not divide."),
        (("--attention", "dense"), "--attention is 'dense'; it is dense or sparse, of stage sft alone."),
        (("--stage", "warmup", "--lora", "attention"), "--lora names 'attention'; of stage warmup these train: indexer."),
        (("--lora", "indexer"), "--gpus is 2 x H100; with --lora it must be one GPU"),
        (("--measured", "nowhere"), "--measured is nowhere, which is no record of v32 bench"),
        (("--set", "index_topk"), "--set is 'index_topk'; it must be name=value."),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused_in_one_sentence(words, sentence):
    result = run(*QUICK, *words)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_checks_of_a_run_verify_and_would_notice():
    job = job_for(Request(config="tiny", seq_len=256, stage="sparse", gpus="1xH100"))
    for verdict in (parameters_verdict(job), memory_verdict(job)):
        assert verdict.status is Status.VERIFIED, verdict
        assert verdict.nulls
        assert all(null.rejected for null in verdict.nulls)


def test_what_is_measured_leaves_the_terminal_alone():
    program = (
        "import torch; from harness.plan.measure import peak_of; assert peak_of(lambda: torch.ones(1000)).most >= 4000"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "USDT" not in done.stdout + done.stderr


def test_a_wrong_count_of_parameters_fails(monkeypatch):
    job = job_for(Request(config="tiny", seq_len=256, stage="warmup", gpus="1xH100"))
    monkeypatch.setitem(vars(job.step), "parameters", job.step.parameters[:-1])
    assert parameters_verdict(job).status is Status.FAILED


def test_adapters_are_planned_for_one_gpu():
    job = job_for(Request(config="medium", seq_len=4096, stage="sft", gpus="H100", lora="attention,experts"))
    plan = document(job, ranked(job.step, job.cluster, 0.1))
    assert plan["lora"] == ["attention", "experts"]
    memory = plan["layouts"][0]["memory"]
    assert memory["optimizer"] == 2 * memory["gradients"] < memory["weights"] / 50


def record_of_bench(folder, **changes):
    """A record of `v32 bench` on an H200, of one time of a training pass."""
    header = {
        "subject": "optimized", "config": "v32", "dtypes": ["bfloat16"], "bench": {"subject": "optimized"},
        "environment": {"gpu": [{"name": "NVIDIA H200"}]}, **changes,
    }  # fmt: skip
    point = {
        "quantity": "seconds",
        "contestant": "optimized",
        "pass": TRAINING,
        "length": 4096,
        "batch": 1,
        "flop": 4.0e14,
    }
    with RunWriter(folder / "run.jsonl", header) as writer:
        writer.write(Measurement("time", "optimized", "L 4096", (1.0,), "s", {"point": point}))
    return folder


def test_a_measured_share_is_one_of_the_same_gpu_and_dtype(tmp_path):
    record = record_of_bench(tmp_path)
    found = fraction(record, GPUS["H200"], "bfloat16", warm_up=False)
    assert found.share == pytest.approx(4.0e14 / GPUS["H200"].flops)
    assert "bfloat16 on " in found.on
    assert "not on H100" in fraction(record, GPUS["H100"], "bfloat16", warm_up=False)
    assert "was measured in bfloat16, not in float32" in fraction(record, GPUS["H200"], "float32", warm_up=False)
    assert "no time of the pass" in fraction(record, GPUS["H200"], "bfloat16", warm_up=True)
