"""`v32 train` on several ranks: the steps of one process, states that any world reads, and the death of a rank."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from harness.ranks.world import ROOT, run_world
from harness.training.command import Request, run_training
from harness.training.ranks import layout_of
from reports.records import read_run
from suites.distributed import training

MODULE = "suites.distributed.training"
# fp64. Measured: 2.3e-14 in the weights after four steps.
CLOSE = 1e-10
PAIRS = ("dense", "ep=2", "warmup", "tp=2", "sparse", "cp=2")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stages")
    return folder, run_world(2, folder / "out.json", MODULE, str(folder), *PAIRS)


@pytest.mark.parametrize("name", ["dense ep=2", "warmup tp=2", "sparse cp=2"])
def test_a_stage_on_two_ranks(stages: tuple[Path, dict[str, Any]], name: str) -> None:
    answer = stages[1][name]
    assert answer["rows"] <= CLOSE
    assert answer["weights"] <= CLOSE
    assert answer["norms"] <= 4 * torch.finfo(torch.float32).eps
    assert answer["few rows"] <= CLOSE, "rows of a long sequence, wherever they are computed"
    assert answer["resumed"] == 0, "bit for bit, on the same world"
    assert answer["from one process"] <= CLOSE
    assert answer["weights from one process"] <= CLOSE
    assert answer["verdicts"], "every verdict is that of one process"
    assert "verified" in answer["statuses"]


def test_one_process_goes_on_from_the_state_of_two_ranks(stages: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = stages
    expected = training.told(training.run(training.fresh("sparse"), "sparse"))
    again = training.run(training.fresh("sparse"), "sparse", out=folder / "sparse cp=2", resume=True)
    assert [step["step"] for step in again.steps] == [2, 3]
    assert training.distance(training.told(again), expected[training.SAVED_AT :]) <= CLOSE


@pytest.mark.parametrize(
    ("text", "running", "sentence"),
    [
        ("fsdp=2", None, "needs 2 ranks: start it by torchrun --nproc-per-node 2"),
        ("fsdp=2,cp=2", "2", "is for 4 ranks; 2 are running"),
        ("pp=2", "2", "names 'pp' which is no axis"),
        ("fsdp=2,dp=2", "4", "names 'dp' twice"),
        ("tp=0", "1", "gives tp the size '0'"),
        ("", "2", "2 ranks are running, but --parallel does not say how"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str, running: str | None, sentence: str
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if running is not None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", running)
    with pytest.raises(ValueError, match=sentence):
        layout_of(text)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_any_rank_that_ends_first_says_what_is_wrong(
    rank: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    request = Request(stage="sparse", parallel="fsdp=2,cp=2", out=tmp_path / "out")
    assert run_training(request, Console()) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said == "v32 train: --parallel fsdp=2,cp=2 is for 4 ranks; 2 are running."


def torchrun(ranks: int, request: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "suites.distributed.launch"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "V32_RANK_TIMEOUT": "300"}
    environment.pop("V32_HYPOTHESIS_PROFILE", None)
    return subprocess.run([*command, json.dumps(request)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)  # fmt: skip


def losses(out: Path) -> list[tuple[int, float, float]]:
    return [(e.data["step"], e.data["lm_loss"], e.data["kl_loss"]) for e in read_run(out).events if e.kind == "step"]


@pytest.mark.slow
def test_a_killed_rank_stops_the_others_and_the_run_goes_on(tmp_path: Path) -> None:
    request = {"stage": "sparse", "steps": 6, "seq_len": 64, "batch": 4, "save_every": 2, "measure_every": 100}
    whole = {**request, "parallel": "fsdp=2", "out": str(tmp_path / "whole")}
    done = torchrun(2, whole)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("verified 5") == 1, "the first rank alone prints"

    cut = {**request, "parallel": "fsdp=2", "out": str(tmp_path / "cut")}
    began = time.monotonic()
    killed = torchrun(2, {**cut, "killed": {"rank": 1, "step": 5}})
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    assert time.monotonic() - began < 300
    assert [step for step, *_ in losses(tmp_path / "cut")] == [0, 1, 2, 3, 4]

    again = torchrun(2, {**cut, "resume": True})
    assert again.returncode == 0, again.stderr[-3000:]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole"), "bit for bit, on the same world"


@pytest.mark.slow
def test_without_torchrun_a_killed_rank_is_reported_by_the_others(tmp_path: Path) -> None:
    from harness.ranks.world import free_port

    request = {"stage": "sparse", "steps": 6, "seq_len": 64, "batch": 4, "save_every": 2, "parallel": "fsdp=2",
               "out": str(tmp_path / "out"), "killed": {"rank": 1, "step": 3}}  # fmt: skip
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "suites.distributed.launch", json.dumps(request)], cwd=ROOT, text=True,
            env={**os.environ, **shared, "RANK": str(rank)}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=600)[1] for rank in ranks]
    assert ranks[1].returncode == -9
    assert ranks[0].returncode == 3
    assert "Rank 0 stops: another rank is gone or silent" in said[0]
    assert "--resume" in said[0] and "The state after 2 steps is kept" in said[0]
