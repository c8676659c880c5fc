"""What a training run does differently on several ranks, each started by torchrun with the same command.

    torchrun --nproc-per-node 4 -m harness.cli train --stage sparse --parallel fsdp=2,cp=2 --out DIR

Every rank reads the same batch and computes its part of it; losses, norms and verdicts are of all of them, the same on
each. The first rank alone writes records and the terminal. What is here for one process is what torch does.
"""

import gc
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .data import Batch

if TYPE_CHECKING:
    from optimized.distributed import ParallelLayout, Ranks

T = TypeVar("T")

# Seconds that a rank waits for the others before it gives up; V32_RANK_TIMEOUT says otherwise. A step is far shorter,
# but the first rank writes reports and checkpoints while the others wait.
PATIENCE = 600


class RankLost(RuntimeError):
    """Another rank died, or did not answer in time; one sentence."""


def ranks_of(model: nn.Module) -> "Ranks | None":
    """The ranks that a parallel model computes on; None for a model of one process."""
    return cast("Ranks | None", getattr(model, "ranks", None))


def is_first() -> bool:
    """Whether this process writes: the first rank, or the only one."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or int(os.environ.get("RANK", "0")) == 0


def layout_of(text: str) -> "ParallelLayout | None":
    """The layout that `--parallel` names, None without one; torchrun must have started as many ranks.

    Raises:
        ValueError: no layout, another number of ranks, or a process that torchrun did not start.
    """
    running = int(os.environ.get("WORLD_SIZE", "1"))
    if not text:
        if running > 1:
            raise ValueError(
                f"{running} ranks are running, but --parallel does not say how: give it, as fsdp={running}."
            )
        return None
    from optimized.distributed import ParallelLayout

    layout = ParallelLayout.parse(text)
    if "RANK" not in os.environ:
        raise ValueError(
            f"--parallel {text} needs {layout.world} ranks: start it by torchrun --nproc-per-node {layout.world} "
            "-m harness.cli train …"
        )
    if layout.world != running:
        raise ValueError(f"--parallel {text} is for {layout.world} ranks; {running} are running.")
    return layout


def own_device(device: torch.device) -> torch.device:
    """This rank's device of the type asked for: on several GPUs of a machine, the one of its local number."""
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


@contextmanager
def connected(layout: "ParallelLayout | None", device: torch.device) -> Iterator[None]:
    """The process group of a layout while the block lasts; nothing for None.

    Raises:
        RankLost: in place of whatever torch says when another rank is gone.
    """
    if layout is None:
        yield
        return
    patience = timedelta(seconds=float(os.environ.get("V32_RANK_TIMEOUT", PATIENCE)))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    rank = dist.get_rank()
    # Nothing here changes the model's outputs in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    try:
        yield
        dist.barrier()
    except RuntimeError as error:
        if not _is_of_another_rank(error):
            raise
        text = " ".join(str(error).split())
        raise RankLost(f"Rank {rank} stops: another rank is gone or silent ({text[:200]}).") from error
    # What still holds a group, in cycles, goes first: its threads must not outlive the interpreter.
    gc.collect()
    dist.destroy_process_group()


def _is_of_another_rank(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors; these are the words of its transport and of torch's own waiting.
    words = ("gloo", "Connection", "Timed out", "timed out", "timeout", "NCCL")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def on_first(action: Callable[[], T]) -> T:
    """What `action` gives on the first rank, on all of them; what it raises there is raised everywhere.

    Raises:
        OSError, ValueError: as raised on the first rank.
    """
    if not dist.is_initialized():
        return action()
    answer: list[Any] = [None, None]
    if is_first():
        try:
            answer[0] = action()
        except (OSError, ValueError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return cast(T, answer[0])


def own_rows(model: nn.Module, batch: Batch) -> Batch:
    """The rows of `batch` that this rank computes; all of them in one process."""
    ranks = ranks_of(model)
    if ranks is None:
        return batch
    mine = ranks.batch_rows(len(batch.input_ids_BL))

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[mine]

    return replace(
        batch, input_ids_BL=batch.input_ids_BL[mine], labels_BL=batch.labels_BL[mine],
        attention_mask_BL=cut(batch.attention_mask_BL), position_ids_BL=cut(batch.position_ids_BL), kinds=batch.kinds[mine],
    )  # fmt: skip


def own_places(model: nn.Module, length: int, rows_R: Tensor) -> Tensor:
    """int64 `[W]`: where the rows `rows_R` of a sequence stand among the rows that this rank computes.

    Without context parallelism that is `rows_R`. With it each rank has some of them, W as many as the one with most:
    row 0 stands in for what a rank has less, so that all ranks make the same calls.
    """
    ranks = ranks_of(model)
    if ranks is None or ranks.layout.cp == 1:
        return rows_R
    parts = _divided(ranks, length, rows_R)
    own = parts[ranks.place("cp")][0]
    return torch.cat((own, own.new_zeros(max(len(places) for places, _ in parts) - len(own))))


def gather_rows(model: nn.Module, length: int, rows_R: Tensor | None, x_BW: Tensor) -> Tensor:
    """`[B, R, *]` of all ranks' answers at `own_places`, in the order of `rows_R`; all rows of the sequence where None."""
    ranks = ranks_of(model)
    if ranks is None or ranks.layout.cp == 1:
        return x_BW
    from optimized.distributed.collectives import gather_slots
    from optimized.distributed.rows import RowSplit

    rows_R = torch.arange(length) if rows_R is None else rows_R
    rows_R = rows_R.to(x_BW.device)
    parts = _divided(ranks, length, rows_R)
    widest = max(len(places) for places, _ in parts)
    place_R = torch.empty_like(rows_R)
    for i, (_, rows) in enumerate(parts):
        place_R[torch.searchsorted(rows_R, rows)] = torch.arange(len(rows), device=rows.device) + i * widest
    split = RowSplit(parts[ranks.place("cp")][1], place_R, widest)
    return gather_slots(x_BW, split, ranks.group("cp"))


def _divided(ranks: "Ranks", length: int, rows_R: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each rank of cp, where its own of `rows_R` stand among its rows, and which they are."""
    from optimized.distributed.rows import split_rows

    layout = ranks.layout
    found = []
    for part in range(layout.cp):
        own_L = split_rows(length, layout.cp, part, layout.rows, rows_R.device).own_L
        here = torch.isin(own_L, rows_R)
        found.append((here.nonzero().squeeze(-1), own_L[here]))
    return found


def whole(tensor: Tensor) -> Tensor:
    """`tensor` itself, or all of one that is spread over ranks, which must all ask."""
    return cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def largest_values(gradients: list[Tensor]) -> list[Tensor]:
    """The largest absolute value of each gradient, of all ranks."""
    if not any(hasattr(gradient, "to_local") for gradient in gradients):
        return list(torch._foreach_norm(gradients, float("inf"))) if gradients else []
    from optimized.distributed import largest_entries

    return largest_entries(gradients)


def norm_of(gradients: list[Tensor]) -> float:
    """The 2-norm of all `gradients` together, in fp32."""
    if not any(hasattr(gradient, "to_local") for gradient in gradients):
        return float(torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(gradients)])))
    from optimized.distributed import global_norm

    return float(global_norm(gradients))


def clip(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Shorten the gradients of `parameters` together to the norm `limit` at most."""
    parameters = list(parameters)
    if not any(hasattr(parameter, "to_local") for parameter in parameters):
        nn.utils.clip_grad_norm_(parameters, limit)
        return
    from optimized.distributed import clip_gradients

    clip_gradients(parameters, limit)


def total_load(model: nn.Module, load_X: Tensor) -> Tensor:
    """How many tokens each expert was given, of all ranks that hold different ones."""
    ranks = ranks_of(model)
    if ranks is None:
        return load_X
    load_X = load_X.clone()
    dist.all_reduce(load_X, group=ranks.group("data"))
    return load_X
