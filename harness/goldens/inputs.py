"""The model and the tokens of the golden vectors: nothing in them depends on the machine.

Letters: B batch, L rows.
"""

from dataclasses import replace

import torch

from harness.cases import Case, build_case
from harness.text import BOS, PAD
from reference import DeepseekV32Config

# The date of the specification sheet that sections in this package refer to.
SPEC_VERSION = "2026-11-23"
PRESET = "tiny"
# Of seeds 0 to 149 the one whose choices are the clearest: no selection of keys is closer than 8e-4 to another one, none
# of experts closer than 1e-3, and no q·k that a ReLU reads is closer than 9e-5 to 0. A right model in fp32 makes the
# same choices without a tape, and no entry of its KL gradient jumps.
SEED = 100
# 2.5 times index_topk, so that most rows leave keys out, also in the longest packed document.
LENGTH = 40
# Not the standard library that other cases read: it is another one in every Python.
TEXT = (
    b"The indexer scores every visible key, and the sixteen best are kept.",
    b"A sparse row reads what it chose; a dense row reads all that it sees.",
)
CASES = {
    "text": "Two rows of text, positions from 0, nothing masked.",
    "packed": "Documents of 3, 7 and 30 tokens in each row; positions start again at 0 in each document.",
    "left-padded": "Row 0 begins with 8 pads (attention_mask 0); row 1 has none. Positions count real tokens from 0.",
    "offset-5000": "The text case with all positions moved by 5000, where YaRN's slow frequencies matter.",
}
MODES = {
    "sparse": "use_sparse_attention true: each row attends to its index_topk best keys.",
    "dense": "use_sparse_attention false: each row attends to every visible key.",
}


def golden_config(mode: str) -> DeepseekV32Config:
    """The preset, in one of `MODES`.

    Raises:
        KeyError: a mode that is not in `MODES`.
    """
    MODES[mode]
    return DeepseekV32Config.preset(PRESET, use_sparse_attention=mode == "sparse")


def golden_case(name: str, mode: str) -> Case:
    """The case called `name`, with the text of this file in place of the harness's own.

    Padding, positions, packed documents and labels that are left out are those of `harness.cases.build_case`.

    Raises:
        ValueError: a name that `build_case` does not know.
    """
    case = build_case(name, golden_config(mode), seed=SEED, length=LENGTH, batch=len(TEXT))
    ids_BL = torch.tensor([[BOS, *row[: LENGTH - 1]] for row in TEXT])
    return replace(
        case,
        input_ids=ids_BL.masked_fill(~case.real_BL, PAD),
        labels=torch.where(case.labels == -100, -100, ids_BL),
    )
