"""Stages of training on ranks, through the loop of `v32 train`, against one process: steps, verdicts, states.

arguments: a folder for states, then pairs of a stage and a layout
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from harness.ranks.parity import Question, apart, largest, model_for
from harness.training import metrics
from harness.training.data import Mixture
from harness.training.loop import Trained, batch_of, train
from harness.training.stages import Phase, Stage, stage_for
from harness.training.state import FOLDER
from optimized import DeepseekV32Config
from optimized.distributed import ParallelLayout, full_state_dict, parallelize

STEPS, SAVED_AT = 4, 2
# Of sequences of 64 tokens, when no more is measured.
MEASURED = 9


def stage_called(name: str) -> Stage:
    """A stage of a few steps with everything on: ramp, clipping, Muon and router bias where the recipe has them."""
    stage = stage_for(name, DeepseekV32Config.preset("tiny"))
    shares = stage.phases[0].shares
    return replace(stage, phases=(Phase(STEPS, 64, 5, shares),), ramp=2, clip=0.5)


def run(model: Any, name: str, *, out: Path | None = None, resume: bool = False) -> Trained:
    """The stage on `model`, with a state after every second step below `out`."""
    mixture = Mixture(DeepseekV32Config.preset("tiny"), 0)
    stage = stage_called(name)
    return train(model, stage, mixture, out=out, resume=resume, save_every=SAVED_AT, measure_every=2, stop_early=False)


def measured_on_few_rows(model: Any, name: str) -> dict[str, float]:
    """The indexer's numbers when tensors may hold no more than `MEASURED` rows of a sequence."""
    stage, mixture = stage_called(name), Mixture(DeepseekV32Config.preset("tiny"), 0)
    before, metrics.LARGEST = metrics.LARGEST, MEASURED * 65
    try:
        quality = metrics.measure_indexer(model, batch_of(stage, mixture, 0), sparse=stage.sparse)
    finally:
        metrics.LARGEST = before
    values = quality.values()
    layers = values.pop("captured_layers")
    return {**values, **{f"captured, layer {i}": value for i, value in enumerate(layers)}}


def told(trained: Trained) -> list[dict[str, float]]:
    """What each step says of the computation, but for norms."""
    names = ("step", "lm_loss", "kl_loss", "captured")
    return [{name: step[name] for name in names if step.get(name) is not None} for step in trained.steps]


def norms(trained: Trained) -> list[dict[str, float]]:
    """The gradients' norms of each step, which one process takes in fp32."""
    return [step["gradient_norms"] for step in trained.steps]


def distance(found: list[dict[str, float]], expected: list[dict[str, float]]) -> float:
    """The largest relative difference; infinite where rows do not have the same numbers."""
    if [list(row) for row in found] != [list(row) for row in expected]:
        return float("inf")
    pairs = [(row[name], right[name]) for row, right in zip(found, expected, strict=True) for name in row]
    return max(abs(a - b) / max(abs(b), 1e-300) if a != b else 0.0 for a, b in pairs)


def fresh(stage: str) -> Any:
    """The plain model that every stage starts from, in fp64."""
    return model_for(Question("", sparse=stage == "sparse"))


def forget_the_last(out: Path) -> None:
    """Leave the state after `SAVED_AT` steps to go on from."""
    shutil.rmtree(out / FOLDER / f"step-{STEPS:08d}")


def prepare(arguments: list[str]) -> Any:
    """One process's steps, verdicts and weights, of every stage asked for."""
    torch.set_num_threads(1)
    folder, *pairs = arguments
    expected = {}
    for stage in dict.fromkeys(pairs[::2]):
        trained = run(fresh(stage), stage, out=Path(folder) / stage)
        forget_the_last(Path(folder) / stage)
        weights = {name: x.detach().clone() for name, x in trained.model.state_dict().items()}
        verdicts = [(v.check, v.status.value) for v in trained.verdicts]
        few = measured_on_few_rows(fresh(stage), stage)
        expected[stage] = told(trained), norms(trained), verdicts, weights, few
    return expected


def last_forgotten(rank: int, out: Path) -> None:
    """`forget_the_last`, by the first rank, while the others wait."""
    torch.distributed.barrier()
    if rank == 0:
        forget_the_last(out)
    torch.distributed.barrier()


def farthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """How far the tensor that is farthest from its expected value is from that."""
    return max(apart(found[name], x) for name, x in expected.items())


def on_rank(rank: int, prepared: Any, arguments: list[str]) -> dict[str, dict[str, Any]]:
    """How far each stage on each layout is from one process, and a resumed run from one that was not."""
    folder, *pairs = arguments
    answers = {}
    for stage, layout in zip(pairs[::2], pairs[1::2], strict=True):
        rows, expected_norms, verdicts, weights, few = prepared[stage]
        out = Path(folder) / f"{stage} {layout}"

        def parallel(stage: str = stage, layout: str = layout) -> Any:
            return parallelize(fresh(stage), ParallelLayout.parse(layout))

        trained = run(parallel(), stage, out=out)
        found = full_state_dict(trained.model)
        last_forgotten(rank, out)
        again = run(parallel(), stage, out=out, resume=True)
        last_forgotten(rank, out)
        # What one process wrote, which all layouts of the stage go on from.
        from_one = run(parallel(), stage, out=Path(folder) / stage, resume=True)
        after = full_state_dict(from_one.model)
        last_forgotten(rank, Path(folder) / stage)
        answers[f"{stage} {layout}"] = {
            "rows": largest(distance(told(trained), rows)),
            "weights": largest(farthest(found, weights) if rank == 0 else 0.0),
            "norms": largest(distance(norms(trained), expected_norms)),
            "resumed": largest(distance(told(again) + norms(again), (told(trained)[SAVED_AT:] + norms(trained)[SAVED_AT:]))),
            "from one process": largest(distance(told(from_one), rows[SAVED_AT:])),
            "weights from one process": largest(farthest(after, weights) if rank == 0 else 0.0),
            "few rows": largest(distance([measured_on_few_rows(parallel(), stage)], [few])),
            "verdicts": [(v.check, v.status.value) for v in trained.verdicts] == verdicts,
            "statuses": sorted({v.status.value for v in trained.verdicts}),
        }  # fmt: skip
    return answers
