"""Who trains in which stage (report section 2.1; spec 3).

Dense warm-up: attention dense, only the indexer trains, on its KL loss. Sparse stage: everything
trains, the model on the LM loss, the indexer on the KL over the selected set. Fine-tuning may freeze
the indexer.
"""

from dataclasses import dataclass

from torch import nn

GROUPS = (
    "embedding",
    "attention",
    "indexer",
    "gate",
    "experts",
    "FFN, shared experts",
    "norms",
    "head",
)


def is_indexer(parameter_name: str) -> bool:
    """Whether a parameter belongs to a Lightning Indexer."""
    return ".indexer." in f".{parameter_name}"


def freeze_indexer(model: nn.Module) -> None:
    """Leave the indexers as they are; everything else trains. Sparse fine-tuning with a frozen indexer."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_indexer(name))


def train_only_indexer(model: nn.Module) -> None:
    """Train the indexers and nothing else: the dense warm-up."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_indexer(name))


def parameter_group(parameter_name: str) -> str:
    """The group of `GROUPS` that a parameter is counted in."""
    name = f".{parameter_name}"
    if is_indexer(parameter_name):
        return "indexer"
    if "norm" in name.rsplit(".", 2)[-2]:
        return "norms"
    for part, group in (
        (".embed_tokens.", "embedding"),
        (".lm_head.", "head"),
        (".self_attn.", "attention"),
        (".mlp.gate.", "gate"),
        (".mlp.experts.", "experts"),
        (".mlp.", "FFN, shared experts"),
    ):
        if part in name:
            return group
    raise ValueError(f"parameter_group: {parameter_name!r} is not a parameter of DeepSeek V3.2.")


@dataclass(frozen=True, slots=True)
class GroupCount:
    """Parameters of one group: how many there are, and how many require gradient."""

    group: str
    parameters: int
    trainable: int


def trainable_report(model: nn.Module) -> list[GroupCount]:
    """Counts for each group that the model has, in the order of `GROUPS`."""
    counts = {group: [0, 0] for group in GROUPS}
    for name, parameter in model.named_parameters():
        count = counts[parameter_group(name)]
        count[0] += parameter.numel()
        count[1] += parameter.numel() if parameter.requires_grad else 0
    return [GroupCount(group, total, trainable) for group, (total, trainable) in counts.items() if total]
