"""What a trained model can do under a selection of keys, on data that it never saw.

    dense       every visible key                    indexer    what the model's own indexer selects
    best        the top k of the attention mass p    untrained  what a freshly initialised indexer selects
    recent      the k last visible keys              random     k visible keys at random

Each selection is a ranking of the visible keys by scores. Those of `best`, `recent` and `random` are replayed through
`decisions=`, those of the two indexers are the model's own choices in sparse mode. Attention mass p is always that of
the dense model, so that all rows of a table are judged by one target:

    recall    Σ_t Σ_{s in S_t} p / Σ_t Σ_{s in best_t} p    left out   1 − mean_t Σ_{s in S_t} p
    captured  1 − KL(p ‖ softmax I) / KL(p ‖ uniform), on every visible key

Letters: B rows, L tokens, S key slots, K selected keys.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from reference import Decisions
from reference.decisions import LayerDecisions
from reference.indexer import select_topk
from reference.training import is_indexer

from .data import Batch, held_out
from .metrics import LayerQuality, attention_mode, indexer_tensors, layer_quality
from .stages import full_length

SELECTIONS = ("dense", "best", "indexer", "untrained", "recent", "random")
# Of `SELECTIONS`, those whose scores are an indexer's, so that a KL can be told.
INDEXERS = ("indexer", "untrained")
TASKS = ("text", "copy", "retrieval")
# Rows of a task, how many of them attention mass is measured on, and how many go through the model at a time.
COUNT, JUDGED, ROWS = 16, 8, 8


@dataclass(frozen=True, slots=True)
class Answers:
    """Loss in nats a scored token, the share of them that has the highest logit, and their number."""

    loss: float
    accuracy: float
    scored: int


@dataclass(frozen=True, slots=True)
class Mass:
    """Attention mass that `k` selected keys hold, a layer each: as a share of the best possible, and what is left out."""

    k: int
    recall: tuple[float, ...]
    left_out: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A model under one selection. KLs are in nats a row, a layer each; empty where the scores are no indexer's.

    masses: one a number of keys, none for `dense`. answers: by task.
    """

    selection: str
    kl: tuple[float, ...]
    captured: tuple[float, ...]
    masses: tuple[Mass, ...]
    answers: Mapping[str, Answers]

    def recall(self, k: int) -> float:
        """Mean over the layers at `k` keys; 1 for `dense`.

        Raises:
            ValueError: `k` was not measured.
        """
        if self.selection == "dense":
            return 1.0
        found = {mass.k: mass.recall for mass in self.masses}
        if k not in found:
            raise ValueError(f"k is {k}; measured are {', '.join(map(str, found))}.")
        return sum(found[k]) / len(found[k])


@dataclass(frozen=True, slots=True)
class TaskData:
    """Held-out rows of one task, and what the dense model makes of them: raw scores I and mass p, a layer each."""

    batch: Batch
    scores_BLS: tuple[Tensor, ...]
    mass_BLS: tuple[Tensor, ...]


def evaluate(
    model: nn.Module, selections: Sequence[str] = SELECTIONS, *, seed: int = 0, length: int | None = None,
    count: int = COUNT, ks: Sequence[int] = (),
) -> list[Evaluation]:  # fmt: skip
    """Evaluate `model` under each of `selections`, in that order, on the same rows.

    Args:
        model: one of our two models; its mode and config are as they were when this ends.
        seed: of the held-out rows, the random selection and the untrained indexer.
        length: tokens a row, 8·index_topk unless given. count: rows of each task.
        ks: numbers of keys at which attention mass is measured besides index_topk.

    Raises:
        ValueError: an unknown selection, a `k` or `length` that selects everything, or what `held_out` refuses.
    """
    config = cast(Any, model).config
    length = full_length(config) if length is None else length
    for name in selections:
        if name not in SELECTIONS:
            raise ValueError(f"selections names {name!r}; allowed are {', '.join(SELECTIONS)}.")
    widths = sorted({config.index_topk, *ks})
    if widths[0] < 1 or widths[-1] >= length:
        raise ValueError(f"ks and index_topk are {widths}; each must be 1 or more and below length ({length}).")
    data = {task: observe(model, held_out(config, task, seed=seed, length=length, count=count)) for task in TASKS}
    stranger = untrained(model, seed) if "untrained" in selections else model
    found = []
    for name in selections:
        subject = stranger if name == "untrained" else model
        if name == "untrained":
            ranked = {task: observe(subject, part.batch).scores_BLS for task, part in data.items()}
        else:
            ranked = {task: ranking(name, part, seed) for task, part in data.items()}
        replayed = name in ("best", "recent", "random")
        answers = {
            task: answer(subject, part.batch, sparse=name != "dense", ranking=ranked[task] if replayed else None)
            for task, part in data.items()
        }
        kl, captured, masses = (
            ((), (), ()) if name == "dense" else judge_ranking(ranked, data, widths, name in INDEXERS)
        )
        found.append(Evaluation(name, kl, captured, masses, answers))
    return found


def observe(model: nn.Module, batch: Batch) -> TaskData:
    """Raw index scores (−inf where not visible) and p `[B, L, S]` of every layer of the dense model."""
    parts = [indexer_tensors(model, part) for part in _parts(batch)]
    scores, mass = ([[layer[i] for layer in part] for part in parts] for i in (0, 1))
    return TaskData(batch, *(tuple(torch.cat(layer) for layer in zip(*x, strict=True)) for x in (scores, mass)))


def ranking(name: str, data: TaskData, seed: int) -> tuple[Tensor, ...]:
    """The scores `[B, L, S]` by which selection `name` ranks keys, a layer each, −inf where a key is not visible."""
    if name in ("dense", "indexer"):
        return data.scores_BLS
    generator = torch.Generator().manual_seed(seed)
    ranked = []
    for scores_BLS, mass_BLS in zip(data.scores_BLS, data.mass_BLS, strict=True):
        if name == "best":
            rank_BLS = mass_BLS
        elif name == "recent":
            rank_BLS = torch.arange(scores_BLS.shape[-1]).expand_as(scores_BLS).to(scores_BLS.dtype)
        else:
            rank_BLS = torch.rand(scores_BLS.shape, generator=generator)
        ranked.append(rank_BLS.masked_fill(scores_BLS == -torch.inf, -torch.inf))
    return tuple(ranked)


def tape(ranked: Sequence[Tensor], k: int) -> Decisions:
    """The decisions that keep the `k` best visible keys of each layer's ranking; experts stay the model's own.

    Rows are one document without padding: an index counted from the document's start is the key's slot.
    """
    return Decisions(tuple(LayerDecisions(select_topk(rank_BLS, rank_BLS != -torch.inf, k)) for rank_BLS in ranked))


@torch.no_grad()
def answer(model: nn.Module, batch: Batch, *, sparse: bool, ranking: Sequence[Tensor] | None = None) -> Answers:
    """Loss and accuracy on the scored tokens of `batch`; `ranking` replaces the model's own selection."""
    k = cast(Any, model).config.index_topk
    loss, right, scored, start = 0.0, 0, 0, 0
    with attention_mode(model, sparse=sparse):
        for part in _parts(batch):
            rows = slice(start, start + len(part.kinds))
            start = rows.stop
            replay = {} if ranking is None else {"decisions": tape([rank_BLS[rows] for rank_BLS in ranking], k)}
            logits = model(input_ids=part.input_ids_BL, use_cache=False, **replay).logits[:, :-1]
            labels = part.labels_BL[:, 1:]
            told = labels != -100
            loss += float(nn.functional.cross_entropy(logits[told].float(), labels[told], reduction="sum"))
            right += int((logits.argmax(-1) == labels)[told].sum())
            scored += int(told.sum())
    return Answers(loss / scored, right / scored, scored)


def untrained(model: nn.Module, seed: int) -> nn.Module:
    """A copy of `model` with every indexer as a new model has it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin: nn.Module = type(model)(copy.deepcopy(cast(Any, model).config))
    fresh = {name: tensor for name, tensor in twin.state_dict().items() if is_indexer(name)}
    twin.load_state_dict({**model.state_dict(), **fresh})
    return twin


def judge_ranking(
    ranked: Mapping[str, Sequence[Tensor]], data: Mapping[str, TaskData], ks: Sequence[int], told: bool
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[Mass, ...]]:
    """KL and captured of each layer where the rankings are an indexer's scores (`told`), and mass at each of `ks`.

    `ranked` and `data` are by task; all tasks count alike.
    """
    layers = len(next(iter(ranked.values())))
    qualities: dict[int, list[LayerQuality]] = {k: [] for k in ks}
    for layer in range(layers):
        scores_BLS = torch.cat([ranked[task][layer][:JUDGED] for task in data])
        mass_BLS = torch.cat([part.mass_BLS[layer][:JUDGED] for part in data.values()])
        for k in ks:
            qualities[k].append(layer_quality(scores_BLS, mass_BLS, k))
    # `evaluate` allows no k that selects everything, with which there would be neither.
    masses = tuple(
        Mass(k, tuple(cast(float, q.recall) for q in found), tuple(cast(float, q.left_out) for q in found))
        for k, found in qualities.items()
    )
    if not told:
        return (), (), masses
    first = qualities[ks[0]]
    return tuple(q.kl for q in first), tuple(q.captured for q in first), masses


def _parts(batch: Batch) -> Iterator[Batch]:
    for start in range(0, len(batch.kinds), ROWS):
        rows = slice(start, start + ROWS)
        yield Batch(batch.input_ids_BL[rows], batch.labels_BL[rows], None, None, batch.kinds[rows])
