"""Optimizer steps and checkpoints of several ranks: equal to one process, whoever wrote and whoever reads."""

from pathlib import Path

import pytest
import torch

from harness.ranks.parity import apart, model_for
from harness.ranks.world import run_world
from optimized import DeepseekV32ForCausalLM
from optimized.distributed import load_checkpoint, save_checkpoint
from suites.distributed import steps

MODULE = "suites.distributed.steps"
# fp64: four steps of AdamW and Muon, whose bf16 iteration is of equal bits only where its input is equal to rounding.
# Measured: 4.2e-14 in the weights, 1.2e-15 in losses and norms.
CLOSE = 1e-10
Saved = dict[str, dict[str, float]]


def wrong(answers: Saved) -> dict[str, float]:
    return {f"{layout}: {name}": x for layout, row in answers.items() for name, x in row.items() if not x <= CLOSE}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Saved]:
    """Checkpoints of two ranks after two steps, and how far four steps went from one process's."""
    folder = tmp_path_factory.mktemp("two-ranks")
    return folder, run_world(2, folder / "out.json", MODULE, "save", str(folder), "fsdp=2", "tp=2")


def test_steps_on_two_ranks_are_those_of_one_process(saved: tuple[Path, Saved]) -> None:
    _, answers = saved
    assert set(answers) == {"fsdp=2", "tp=2"}
    assert wrong(answers) == {}


@pytest.mark.parametrize("layout", ["fsdp=2", "tp=2"])
def test_one_process_goes_on_from_two_ranks(saved: tuple[Path, Saved], layout: str) -> None:
    folder, _ = saved
    expected, weights = steps.prepare([])
    rows, found = steps.loaded_alone(folder / layout)
    pairs = [pair for row, right in zip(rows, expected[steps.SAVED_AT :], strict=True) for pair in zip(row, right, strict=True)]  # fmt: skip
    assert max(abs(a - b) / abs(b) for a, b in pairs) <= CLOSE
    assert max(apart(found[name], x) for name, x in weights.items()) <= CLOSE


def test_the_export_of_two_ranks_is_an_official_checkpoint(saved: tuple[Path, Saved]) -> None:
    folder, _ = saved
    _, weights = steps.prepare([])
    model = DeepseekV32ForCausalLM.from_pretrained(folder / "official tp=2", dtype=torch.float64)
    assert max(apart(x.double(), weights[name]) for name, x in model.state_dict().items()) <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("written_by", ["fsdp=2", "tp=2"])
def test_four_ranks_go_on_from_two(saved: tuple[Path, Saved], written_by: str) -> None:
    folder, _ = saved
    shared = folder / steps.SHARED
    shared.unlink(missing_ok=True)
    shared.symlink_to(folder / written_by)
    layouts = ("fsdp=2,tp=2", "cp=2,ep=2")
    answers = run_world(4, folder / "four.json", MODULE, "load", str(folder), *layouts)
    assert set(answers) == set(layouts)
    assert wrong(answers) == {}


@pytest.mark.slow
def test_two_ranks_go_on_from_four(tmp_path: Path) -> None:
    layouts = ("fsdp=2,ep=2", "ep=2,tp=2")
    assert wrong(run_world(4, tmp_path / "four.json", MODULE, "save", str(tmp_path), *layouts)) == {}
    for layout in layouts:
        shared = tmp_path / steps.SHARED
        shared.unlink(missing_ok=True)
        shared.symlink_to(tmp_path / layout)
        answers = run_world(2, tmp_path / "two.json", MODULE, "load", str(tmp_path), "cp=2", "ep=2", "tp=2")
        assert wrong(answers) == {}


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = model_for(steps.PLAIN)
    own = {f"model.{name}": x for name, x in model.state_dict().items()}
    missing = dict(list(own.items())[1:])
    changes: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "missing": (missing, "lacks tensor 'model.model.embed_tokens.weight'"),
        "unknown": (
            {**own, "model.other": torch.zeros(2)},
            "holds tensor 'model.other', which the model does not have",
        ),
        "shape": ({**own, "model.model.norm.weight": torch.zeros(2)}, "'model.model.norm.weight' is torch.float32"),
        "optimizer": ({**own, "optimizer.7.exp_avg.model.norm.weight": torch.zeros(2)}, "optimizer 7 kept 'exp_avg'"),
    }
    for name, (tensors, sentence) in changes.items():
        save_checkpoint(tmp_path / name, tensors)
        with pytest.raises(ValueError, match=sentence.replace(".", r"\.")):
            load_checkpoint(tmp_path / name, model, steps.optimizers_of(model, torch.optim.Muon))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        save_checkpoint(tmp_path / "file", own)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_checkpoint(tmp_path / "nowhere", model)
