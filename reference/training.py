"""Who trains in which stage, and on which loss (report section 2.1; spec 3).

    stage                          who trains             loss
    dense, from scratch            "model"                LM
    dense warm-up                  "indexer"              KL over every visible key (eq. 3)
    sparse                         "all"                  LM to the model, KL over the selected set (eq. 4) to the indexer
    fine-tuning, dense or sparse   "model"                LM; the indexer is frozen

In place of whole weights, low-rank adapters on some of them may train (LoRA, by peft): on attention and routed
experts where the model trains, on the indexer where that does.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from .outputs import CausalLMOutput

Trains = Literal["model", "indexer", "all"]
LoraPart = Literal["attention", "experts", "indexer"]

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


# The modules that an adapter is put on; routed experts are stacked parameters, not modules.
LORA_MODULES: dict[LoraPart, tuple[str, ...]] = {
    "attention": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    "experts": (),
    "indexer": ("indexer.wq_b", "indexer.wk", "indexer.weights_proj"),
}
LORA_PARAMETERS: dict[LoraPart, tuple[str, ...]] = {
    "attention": (),
    "experts": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    "indexer": (),
}


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


def set_trainable(model: nn.Module, trains: Trains) -> None:
    """Have all but the indexer require gradient (`"model"`), nothing but the indexer, or everything (`"all"`).

    Raises:
        ValueError: another word.
    """
    if trains == "model":
        freeze_indexer(model)
    elif trains == "indexer":
        train_only_indexer(model)
    elif trains == "all":
        model.requires_grad_(True)
    else:
        raise ValueError(f"trains is {trains!r}; it must be 'model', 'indexer' or 'all'.")


def training_loss(out: CausalLMOutput, trains: Trains, kl_coef: float) -> torch.Tensor:
    """What a stage minimises: `lm_loss`, `kl_coef` · `indexer_kl_loss`, or their sum, by who trains.

    With `detach_indexer_input` the two losses of a sum share no parameter: LM goes to the model, KL to the indexer.

    Raises:
        ValueError: the forward was not asked for a loss that is needed (labels, `output_indexer_kl_loss`).
    """
    total = None
    for wanted, name, weight in (
        (trains != "indexer", "lm_loss", 1.0), (trains != "model", "indexer_kl_loss", kl_coef),
    ):  # fmt: skip
        if not wanted:
            continue
        loss = getattr(out, name)
        if loss is None:
            raise ValueError(
                f"out holds no {name}, which is trained on where trains is {trains!r}; ask the forward for it."
            )
        total = weight * loss if total is None else total + weight * loss.to(total.device)
    assert total is not None
    return total


def lora_parts(trains: Trains) -> tuple[LoraPart, ...]:
    """The parts of a model that adapters may be put on, by who trains."""
    model: tuple[LoraPart, ...] = ("attention", "experts")
    return {"model": model, "indexer": ("indexer",), "all": (*model, "indexer")}[trains]


def add_lora(model: nn.Module, parts: Iterable[LoraPart], *, rank: int = 8, alpha: float = 16.0) -> nn.Module:
    """The model with adapters on `parts`, everything else frozen: W + alpha / rank · B·A, B starting at 0.

    The adapters have the dtype of the weights. `merge_lora` gives the plain model back.

    Raises:
        ValueError: no part, one that is not of `LORA_MODULES`, or a rank below 1.
    """
    from peft import LoraConfig, get_peft_model

    chosen = list(dict.fromkeys(parts))
    if not chosen or any(part not in LORA_MODULES for part in chosen):
        raise ValueError(f"parts is {chosen!r}; it must name one or more of {', '.join(LORA_MODULES)}.")
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be 1 or more.")
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),
        lora_dropout=0.0,
        target_modules=[name for part in chosen for name in LORA_MODULES[part]],
        target_parameters=[name for part in chosen for name in LORA_PARAMETERS[part]],
    )
    adapted: nn.Module = get_peft_model(cast(Any, model), config, autocast_adapter_dtype=False)
    return adapted


def merge_lora(model: nn.Module) -> nn.Module:
    """The plain model with the adapters of `add_lora` added into its weights; a model without adapters as it is."""
    if not hasattr(model, "merge_and_unload"):
        return model
    merged: nn.Module = cast(Any, model).merge_and_unload()
    return merged


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


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter once, then every buffer that a checkpoint holds, by name."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters())
    every = dict(model.named_parameters(remove_duplicate=False))
    held = model.state_dict(keep_vars=True)
    return {**found, **{name: tensor for name, tensor in held.items() if name not in every}}


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
