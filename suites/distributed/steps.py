"""Some optimizer steps on ranks, against one process, from a fresh start or from a checkpoint of another world.

argument 0: what to do, "save" or "load"; 1: the folder; then layouts, one after another
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.ranks.parity import ROWS, Question, apart, batch_for, largest, model_for
from optimized.distributed import (
    ParallelLayout,
    ShardedMuon,
    checkpoint_tensors,
    clip_gradients,
    full_state_dict,
    load_checkpoint,
    parallelize,
    plain_model,
    save_checkpoint,
)

LIMIT = 0.3
SAVED_AT, STEPS = 2, 4
PLAIN, SHARED = Question(""), "shared"


def optimizers_of(model: nn.Module, muon: type[torch.optim.Muon]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention, AdamW for the rest."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() == 2 and ".self_attn." in name and ".indexer." not in name]
    held = {id(p) for p in matrices}
    rest = [p for p in named.values() if id(p) not in held]
    return [muon(matrices, lr=0.01, weight_decay=0.1), torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.1)]


def batch_at(step: int) -> dict[str, Tensor]:
    """A batch of its own for every step."""
    batch = batch_for("left-padded")
    return {**batch, "input_ids": (batch["input_ids"] + step) % 256, "labels": batch["labels"].roll(step, 1)}


def trained(
    model: Any, optimizers: list[torch.optim.Optimizer], steps: range, clip: Any, mine: slice
) -> list[list[float]]:
    """Loss and norm of the gradient of each step."""
    rows = []
    for step in steps:
        out = model(**{name: x[mine] for name, x in batch_at(step).items()}, use_cache=False)
        out.loss.backward()
        norm = float(clip([p for p in model.parameters() if p.grad is not None], LIMIT))
        rows.append([float(out.loss.detach()), norm])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return rows


def prepare(arguments: list[str]) -> Any:
    """One process's losses, norms and weights, to the end."""
    torch.set_num_threads(1)
    model = model_for(PLAIN)
    rows = trained(model, optimizers_of(model, torch.optim.Muon), range(STEPS), nn.utils.clip_grad_norm_, slice(None))
    return rows, {name: x.detach().clone() for name, x in model.state_dict().items()}


def on_rank(rank: int, prepared: Any, arguments: list[str]) -> dict[str, dict[str, float]]:
    """How far each layout is from one process, in each row and in the weights at the end."""
    expected, weights = prepared
    what, folder, *layouts = arguments
    answers = {}
    for layout in layouts:
        model = parallelize(model_for(PLAIN), ParallelLayout.parse(layout))
        optimizers = optimizers_of(model, ShardedMuon)
        mine = model.ranks.batch_rows(ROWS)
        first, kept = 0, Path(folder) / (SHARED if what == "load" else layout)
        if what == "load":
            first = SAVED_AT
            more = load_checkpoint(kept, model, optimizers)
            assert set(more) == {"step"} and int(more["step"]) == SAVED_AT
        rows = trained(model, optimizers, range(first, SAVED_AT), clip_gradients, mine)
        if what == "save":
            save_checkpoint(kept, {**checkpoint_tensors(model, optimizers), "step": torch.tensor(SAVED_AT)})
        rows += trained(model, optimizers, range(SAVED_AT, STEPS), clip_gradients, mine)
        found = full_state_dict(model)
        plain = plain_model(model)
        answer = {
            "rows": max(abs(a - b) / abs(b) for row, right in zip(rows, expected[first:], strict=True) for a, b in zip(row, right, strict=True)),
            "weights": max((apart(found[name], x) for name, x in weights.items()), default=0.0) if rank == 0 else 0.0,
            "keys": float(rank == 0 and list(found) != list(weights)),
        }  # fmt: skip
        if plain is not None:
            plain.save_pretrained(Path(folder) / f"official {layout}")
        answers[layout] = {name: largest(value) for name, value in answer.items()}
    return answers


def loaded_alone(folder: Path) -> tuple[list[list[float]], dict[str, Tensor]]:
    """What one process without ranks makes of a checkpoint of several."""
    model = model_for(PLAIN)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizers = optimizers_of(model, torch.optim.Muon)
    load_checkpoint(folder, model, optimizers)
    rows = trained(model, optimizers, range(SAVED_AT, STEPS), nn.utils.clip_grad_norm_, slice(None))
    return rows, {name: x.detach() for name, x in model.state_dict().items()}
