"""What is measured: one pass of one contestant at one length; and the words that name its parts.

A pass is "fwd" (logits of every token, no gradients, no cache), "fwd+bwd" (LM loss of every token, gradients of every
parameter), "kl" (the dense warm-up step: dense attention, everything frozen but the indexer, its KL loss, backward), or
one operator by itself.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from reference import DeepseekV32Config

FORWARD, TRAINING, WARM_UP = "fwd", "fwd+bwd", "kl"
PASSES = (FORWARD, TRAINING, WARM_UP)
# A single operator at the model's sizes, alone or with its backward: "op:sparse_mla", "op:sparse_mla+bwd".
OPERATOR, BACKWARD = "op:", "+bwd"
OPERATORS = ("indexer_topk", "sparse_mla", "dense_mla", "indexer_kl", "indexer_kl_selected")
OPERATOR_PASSES = tuple(
    OPERATOR + name + backward
    for name in OPERATORS
    for backward in ("", BACKWARD)
    if not (name == "indexer_topk" and backward)
)
DTYPES = ("float32", "bfloat16")
# The contestant that measures the machine itself.
MACHINE = "machine"


def is_operator(pass_: str) -> bool:
    """Whether a pass is of a single operator."""
    return pass_.startswith(OPERATOR)


def operator_of(pass_: str) -> tuple[str, bool]:
    """The name of a pass's operator, and whether its backward is a part of the pass."""
    return pass_.removeprefix(OPERATOR).removesuffix(BACKWARD), pass_.endswith(BACKWARD)


@dataclass(frozen=True, slots=True)
class Point:
    """One cell of the table. `config` holds the fields of a DeepseekV32Config, as its `to_dict` gives them.

    `contestant` is what `harness.bench.subjects.build` takes; `length` counts tokens a row, `threads` those of torch.
    """

    contestant: str
    pass_: str
    length: int
    batch: int
    dtype: str
    device: str
    threads: int
    seed: int
    config: dict[str, Any]

    @property
    def case(self) -> str:
        """The point without its contestant, as reports name it."""
        batch = f", B {self.batch}" if self.batch > 1 else ""
        return f"{self.pass_}, L {self.length}{batch}"

    def of(self, contestant: str) -> "Point":
        """The same point of another contestant."""
        return replace(self, contestant=contestant)

    def model_config(self) -> DeepseekV32Config:
        """The config that the contestants are built from: dense attention in the warm-up step."""
        fields = dict(self.config)
        if self.pass_ == WARM_UP:
            fields["use_sparse_attention"] = False
        return DeepseekV32Config(**fields)

    def to_json(self) -> str:
        """One line, from which `from_json` makes the same point."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Point":
        """The point of a line."""
        return cls(**json.loads(line))
