"""Real text without a download: the sources of the Python standard library, byte by byte.

Letters: B batch, L bytes.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

BOS, EOS, PAD = 256, 257, 258


@dataclass(frozen=True, slots=True)
class Corpus:
    """The concatenated sources and what identifies them in a record."""

    data: bytes
    files: int
    sha256: str


@cache
def standard_library() -> Corpus:
    """The top-level modules of the running Python's standard library, in name order.

    Raises:
        RuntimeError: this Python ships no sources.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data = b"".join(path.read_bytes() for path in files)
    if len(data) < 1_000_000:
        raise RuntimeError("This Python has no standard-library sources to read text from; use one that ships them.")
    return Corpus(data, len(files), hashlib.sha256(data).hexdigest())


def text_batch(batch: int, length: int, seed: int) -> torch.Tensor:
    """`[B, L]` int64: `batch` excerpts of `length` − 1 bytes behind a BOS, at places drawn from `seed`.

    Raises:
        ValueError: `length` is as much as all of the text, or more.
    """
    corpus = standard_library().data
    if length >= len(corpus):
        raise ValueError(f"length is {length}; the text has {len(corpus)} bytes, and a row must be shorter.")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(corpus) - length, (batch,), generator=generator).tolist()
    rows = [[BOS, *corpus[start : start + length - 1]] for start in starts]
    return torch.tensor(rows, dtype=torch.long)
