"""What a training step reads: a pure function of the seed and the step, so that resuming needs nothing but the step.

Text comes from the sources of the Python standard library, byte by byte. Every tenth file is held out: evaluation
reads those, and draws its tasks from a stream of its own.

Letters: B rows, L tokens.
"""

import hashlib
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from reference import DeepseekV32Config

from .tasks import KINDS, ROWS, SHORTEST, VOCABULARY, Source

_EVERY = 10
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of one length.

    input_ids_BL: int64. labels_BL: int64, −100 where nothing is scored; not shifted, the model shifts.
    attention_mask_BL: int64 of 0/1; position_ids_BL: int64, from 0 in each document; both None where each row is
    one document without padding. kinds: what each row is, of `KINDS`.
    """

    input_ids_BL: Tensor
    labels_BL: Tensor
    attention_mask_BL: Tensor | None
    position_ids_BL: Tensor | None
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sources:
    """The text to train on and the text held out, each with the SHA-256 of its bytes."""

    train: bytes
    held_out: bytes
    train_sha256: str
    held_out_sha256: str


@cache
def sources() -> Sources:
    """The top-level modules of the running Python's standard library in name order, every tenth one held out.

    Raises:
        RuntimeError: this Python ships no sources.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    held = b"".join(path.read_bytes() for path in files[_EVERY - 1 :: _EVERY])
    train = b"".join(path.read_bytes() for i, path in enumerate(files) if i % _EVERY != _EVERY - 1)
    if len(held) < 100_000:
        raise RuntimeError("This Python has no standard-library sources to read text from; use one that ships them.")
    return Sources(train, held, hashlib.sha256(train).hexdigest(), hashlib.sha256(held).hexdigest())


class Mixture:
    """The batches of one training run."""

    def __init__(self, config: DeepseekV32Config, seed: int) -> None:
        """`config` says how far back answers stand (`index_topk`) and must hold the markers; `seed` is any integer.

        Raises:
            ValueError: a vocabulary without room for the markers.
        """
        _check_vocabulary(config)
        self.index_topk, self.seed = config.index_topk, seed

    def batch(self, step: int, *, length: int, batch_size: int, shares: Mapping[str, float]) -> Batch:
        """The batch of `step`: `batch_size` rows of `length` tokens, of each kind as many as its share says.

        Shares are relative. Rows are dealt to the kinds evenly over the whole run, so that small batches are fair too.

        Raises:
            ValueError: a negative step, no rows, rows that are too short, an unknown kind, shares that are negative
                or all zero.
        """
        if step < 0:
            raise ValueError(f"step is {step}; it must be 0 or more.")
        kinds = _kinds(step, batch_size, shares)
        generator = _generator("train", self.seed, step)
        return _batch(sources().train, kinds, length, self.index_topk, generator)


def held_out(config: DeepseekV32Config, kind: str, *, seed: int, length: int, count: int) -> Batch:
    """`count` rows of one kind that no `Mixture` of any seed gives: other files, and another stream of tasks.

    Raises:
        ValueError: as `Mixture` and `Mixture.batch`.
    """
    _check_vocabulary(config)
    kinds = _kinds(0, count, {kind: 1.0})
    return _batch(sources().held_out, kinds, length, config.index_topk, _generator(f"held-out {kind}", seed, 0))


def _batch(corpus: bytes, kinds: list[str], length: int, index_topk: int, generator: torch.Generator) -> Batch:
    if length < SHORTEST:
        raise ValueError(f"length is {length}; it must be {SHORTEST} or more.")
    source = Source(corpus, length, index_topk, generator)
    rows = [ROWS[kind](source) for kind in kinds]
    ids, labels = (torch.tensor([getattr(row, name) for row in rows]) for name in ("ids", "labels"))
    mask = positions = None
    if "chat" in kinds:
        mask = torch.tensor([row.real for row in rows]).long()
        positions = torch.tensor([row.positions for row in rows])
    return Batch(ids, labels, mask, positions, tuple(kinds))


def _kinds(step: int, batch_size: int, shares: Mapping[str, float]) -> list[str]:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more.")
    for kind, share in shares.items():
        if kind not in KINDS:
            raise ValueError(f"shares names {kind!r}; allowed are {', '.join(KINDS)}.")
        if not 0 <= share < float("inf"):
            raise ValueError(f"shares[{kind!r}] is {share}; it must be a finite number of 0 or more.")
    total = sum(shares.values())
    if total == 0:
        raise ValueError(f"shares is {dict(shares)}; at least one kind needs a share above 0.")
    names = [kind for kind in KINDS if shares.get(kind, 0) > 0]
    kinds: list[str] = []
    for row in range(step * batch_size, (step + 1) * batch_size):
        # Steps of the golden ratio visit the unit interval evenly, whatever stretch of them a batch takes.
        place, upper = (row * _GOLDEN) % 1.0, 0.0
        for kind in names:
            upper += shares[kind] / total
            if place < upper or kind == names[-1]:
                kinds.append(kind)
                break
    return kinds


def _generator(stream: str, seed: int, step: int) -> torch.Generator:
    digest = hashlib.sha256(f"{stream}/{seed}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _check_vocabulary(config: DeepseekV32Config) -> None:
    if config.vocab_size < VOCABULARY:
        raise ValueError(
            f"vocab_size is {config.vocab_size}, but bytes and markers need token ids up to {VOCABULARY - 1}: "
            f"it must be {VOCABULARY} or more."
        )
