"""Chat-style fine-tuning: which tokens are scored, and several documents in one row.

A row holds whole documents, one behind the other. Each counts its positions from 0, and that is what keeps them apart:
attention, selection and RoPE of a document are those of the document alone (see layout.py). What is left is the
loss. A label is scored on the row before it, so that a document's first token has none: it would be scored on the last
token of another document.

    rows = pack([chat_document(turns) for turns in conversations], length=4096)
    Trainer(model, args, train_dataset=rows, data_collator=PaddingCollator(pad_token_id))

Who wants one flat row a batch gives the documents themselves to transformers' `DataCollatorWithFlattening`.

Letters: B rows of a batch, L tokens of its longest row.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

IGNORED = -100


def chat_document(turns: Iterable[tuple[Sequence[int], bool]]) -> dict[str, list[int]]:
    """One conversation as `input_ids` and `labels`.

    Args:
        turns: of each turn its token ids, and whether they are scored: the assistant's are, its end marker included.

    Raises:
        ValueError: a conversation without tokens.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for tokens, scored in turns:
        input_ids.extend(tokens)
        labels.extend(tokens if scored else [IGNORED] * len(tokens))
    if not input_ids:
        raise ValueError("chat_document: turns holds no token; a document needs one at least.")
    return {"input_ids": input_ids, "labels": labels}


def pack(documents: Sequence[Mapping[str, Sequence[int]]], length: int) -> list[dict[str, list[int]]]:
    """Rows of up to `length` tokens, each of whole documents, as `input_ids`, `labels` and `position_ids`.

    Best fit, documents in the order given: each goes where it leaves the least room, so that rows depend on nothing else.

    Args:
        documents: `input_ids` and `labels` each, of one length; labels are −100 where nothing is scored.

    Raises:
        ValueError: a document that is empty, longer than `length`, or whose labels do not fit its tokens.
    """
    rows: list[dict[str, list[int]]] = []
    # Room left and number of each row, least room first.
    room: list[tuple[int, int]] = []
    for number, document in enumerate(documents):
        ids, labels = document["input_ids"], document["labels"]
        if not 1 <= len(ids) <= length:
            raise ValueError(
                f"pack: document {number} has {len(ids)} tokens; it must have 1 to {length}, the length of a row."
            )
        if len(labels) != len(ids):
            raise ValueError(
                f"pack: document {number} has {len(ids)} tokens and {len(labels)} labels; the numbers must be equal."
            )
        place = bisect_left(room, (len(ids), 0))
        left, chosen = room.pop(place) if place < len(room) else (length, len(rows))
        if chosen == len(rows):
            rows.append({"input_ids": [], "labels": [], "position_ids": []})
        insort(room, (left - len(ids), chosen))
        rows[chosen]["input_ids"].extend(ids)
        rows[chosen]["labels"].extend([IGNORED, *labels[1:]])
        rows[chosen]["position_ids"].extend(range(len(ids)))
    return rows


@dataclass(frozen=True, slots=True)
class PaddingCollator:
    """A batch of packed rows, padded on the right to the longest: `data_collator` of a stock Trainer."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """int64 `[B, L]` each: `input_ids`, `labels`, `position_ids` and `attention_mask`.

        Raises:
            ValueError: no rows.
        """
        if not rows:
            raise ValueError("PaddingCollator: no rows were given; a batch needs one at least.")
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values: Sequence[int], filling: int) -> list[int]:
            return [*values, *[filling] * (longest - len(values))]

        fillings = {"input_ids": self.pad_token_id, "labels": IGNORED, "position_ids": 0}
        batch = {name: torch.tensor([padded(row[name], fill) for row in rows]) for name, fill in fillings.items()}
        batch["attention_mask"] = torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows])
        return batch
