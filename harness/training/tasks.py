"""The rows that a model learns from: text, copying, key–value retrieval, chat.

Text alone cannot tell an indexer from a window of recent keys. So copying and retrieval ask for tokens that stand
more than 2·index_topk back, and only these answers are scored: who selects recent keys cannot give them. In rows
shorter than 8·index_topk, which a curriculum starts with, an answer stands at least a quarter of the row back.

    copy       BOS COPY  x₁ … xₙ SEP  x₁ … xₙ SEP …               scored: every x after the first SEP
    retrieval  BOS FIND  a₁ b₁ a₂ b₂ … aₙ bₙ  gap  SEP  aᵢ bᵢ aⱼ bⱼ …   scored: every b after SEP
    chat       USER request ASSISTANT answer EOS, several documents a row     scored: answer and EOS

The x are the 128 bytes of ASCII, distinct as long as there are no more than 128. The keys a are distinct letters (bytes
64 … 127), the values b signs (32 … 63): what a key stands for is told by its row alone, never by the weights. No key is
asked for twice, since the first answer would tell the second. Small alphabets, because with all 256 bytes neither task
starts to be learned within a thousand steps.

Letters: L tokens of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from harness.text import BOS, EOS, PAD

COPY, FIND, SEP, USER, ASSISTANT = range(259, 264)
# The smallest vocabulary that holds the bytes, the three tokens of harness/text.py and these markers.
VOCABULARY = 264
KINDS = ("text", "copy", "retrieval", "chat")
# The smallest row in which every task has an answer to score.
SHORTEST = 32
UNSCORED = -100
_ASCII = 128
# Where keys and values begin in ASCII, and how many there are of each.
_KEYS, _KEY_COUNT, _VALUES, _VALUE_COUNT = 64, 64, 32, 32
_GAP = ord("\n")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of L tokens.

    ids: token ids. labels: the id itself where it is scored, −100 elsewhere; not shifted. positions: counted from
    each document's start. real: False in the padding behind the last document.
    """

    ids: list[int]
    labels: list[int]
    positions: list[int]
    real: list[bool]


@dataclass(frozen=True, slots=True)
class Source:
    """What a row is made from: the text, its length, index_topk, and the random numbers, which it draws in order."""

    corpus: bytes
    length: int
    index_topk: int
    generator: torch.Generator

    @property
    def back(self) -> int:
        """Every answer stands farther back than this, counted from the row that predicts it.

        2·index_topk from `length` 8·index_topk on, a quarter of `length` below.
        """
        return min(2 * self.index_topk, self.length // 4)

    def number(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def order(self, count: int) -> list[int]:
        """0 … `count` − 1 in random order."""
        return torch.randperm(count, generator=self.generator).tolist()

    def excerpt(self, count: int) -> list[int]:
        """`count` bytes of the text in a row, from anywhere."""
        start = self.number(0, len(self.corpus) - count)
        return list(self.corpus[start : start + count])


def text_row(source: Source) -> Row:
    """`length` − 1 bytes of the text behind a BOS; every byte is scored."""
    ids = [BOS, *source.excerpt(source.length - 1)]
    return _whole(ids, [UNSCORED, *ids[1:]])


def copy_row(source: Source) -> Row:
    """Random bytes, then the same again until the row is full."""
    length = source.length
    count = source.number(source.back + 1, length // 2 - 2)
    letters: list[int] = []
    while len(letters) < count:
        letters += source.order(_ASCII)
    period = [*letters[:count], SEP]
    ids = [BOS, COPY, *period * (length // len(period) + 1)][:length]
    first = 2 + len(period)
    return _whole(ids, [x if place >= first and x != SEP else UNSCORED for place, x in enumerate(ids)])


def retrieval_row(source: Source) -> Row:
    """Pairs of a key and a value, then keys that are asked for, each with its value."""
    length, back = source.length, source.back
    pairs = min(_KEY_COUNT, (length - 4) // 4)
    keys = [_KEYS + place for place in source.order(_KEY_COUNT)[:pairs]]
    values = [_VALUES + source.number(0, _VALUE_COUNT - 1) for _ in keys]
    # Wide enough that half of the pairs can be asked for at once, and that the questions end with the row.
    gap = max(0, back + 2 - pairs, length - 3 - 4 * pairs)
    ids = [BOS, FIND, *(x for pair in zip(keys, values, strict=True) for x in pair), *[_GAP] * gap, SEP]
    labels = [UNSCORED] * len(ids)
    open_pairs = list(range(pairs))
    while len(ids) + 2 <= length:
        # The key at len(ids) predicts the value; that of pair i stands at 3 + 2·i.
        askable = sum(3 + 2 * pair < len(ids) - back for pair in open_pairs)
        asked = open_pairs.pop(source.number(0, askable - 1))
        ids += [keys[asked], values[asked]]
        labels += [UNSCORED, values[asked]]
    tail = length - len(ids)
    return _whole([*ids, *[EOS] * tail], [*labels, *[UNSCORED] * tail])


def chat_row(source: Source) -> Row:
    """Packed conversations, each a document of its own: the user quotes a passage, the assistant says it again.

    The passages are up to a third of the row long; what no further document fits into is padding.
    """
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    while True:
        passage = source.excerpt(source.number(4, source.length // 3))
        document = [USER, *passage, ASSISTANT, *passage, EOS]
        if len(ids) + len(document) > source.length:
            break
        ids += document
        labels += [*[UNSCORED] * (len(passage) + 2), *passage, EOS]
        positions += range(len(document))
    tail = source.length - len(ids)
    return Row(
        [*ids, *[PAD] * tail], [*labels, *[UNSCORED] * tail], [*positions, *[0] * tail],
        [*[True] * len(ids), *[False] * tail],
    )  # fmt: skip


ROWS: dict[str, Callable[[Source], Row]] = {
    "text": text_row, "copy": copy_row, "retrieval": retrieval_row, "chat": chat_row,
}  # fmt: skip


def _whole(ids: list[int], labels: list[int]) -> Row:
    return Row(ids, labels, list(range(len(ids))), [True] * len(ids))
