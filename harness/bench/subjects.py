"""The contestants: each built with the same calibrated weights where shapes allow.

- a subject of `v32 verify`: optimized, reference, FILE.py:factory, …; `optimized:NAME` runs the operators called NAME.
- `transformers`: its DeepseekV32 with sdpa, as it is. The subject of that name of `v32 verify` carries a decision tape,
  which costs time; here there is none.
- `dense-flash`: its DeepseekV3 (the same model without indexer and selection) with v_head_dim = qk_head_dim, because
  only then does SDPA on a CPU take its flash kernel instead of holding a matrix of scores a head.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.initialization import no_init_weights
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as upstream

from reference import DeepseekV32Config, train_only_indexer

from ..cases import calibrated_state
from ..subjects import Subject, resolve_subject, with_backend
from ..upstream import upstream_config
from .point import FORWARD, TRAINING, WARM_UP, Point, is_operator, operator_of

TRANSFORMERS, DENSE_FLASH = "transformers", "dense-flash"
# What an SDPA kernel that holds no matrix of scores is called, on a CPU and on a GPU.
FLASH_KERNEL = "scaled_dot_product_flash_attention"
_KL_NEEDS = frozenset({"dense-mode", "indexer-kl"})


def contestant_subject(name: str) -> Subject:
    """The subject of `v32 verify` behind a contestant; for `transformers` that with the tape, which verifies it.

    Raises:
        ValueError: nothing of that name, or no such backend.
    """
    spec, colon, backend = name.partition(":")
    if spec == "optimized" and colon:
        return with_backend(resolve_subject(spec), backend)
    return resolve_subject(name)


def not_applicable(name: str, pass_: str) -> str | None:
    """Why the contestant cannot run a pass, None where it can."""
    if name == DENSE_FLASH:
        return (
            None
            if pass_ in (FORWARD, TRAINING)
            else "it has no indexer, and its attention is not an operator by itself"
        )
    subject = contestant_subject(name)
    if is_operator(pass_):
        wanted = called(pass_)
        return None if wanted in subject.operators else f"it offers no operator {wanted}"
    if subject.factory is None:
        return "it has operators, but no model"
    missing = sorted(_KL_NEEDS - subject.capabilities) if pass_ == WARM_UP else []
    return f"it does not declare {missing[0]}" if missing else None


def called(pass_: str) -> str:
    """The operator that a pass calls."""
    return operator_of(pass_)[0].removesuffix("_selected")


def build(point: Point) -> nn.Module:
    """The contestant's model, in the mode and with the trainable parameters of the point's pass."""
    config, device, dtype = point.model_config(), torch.device(point.device), getattr(torch, point.dtype)
    if point.contestant == TRANSFORMERS:
        state = calibrated_state(config, point.seed)
        with no_init_weights():
            model: Any = upstream.DeepseekV32ForCausalLM(upstream_config(config, "sdpa"))
        model = _loaded(model, state, device, dtype)
        model.model.rotary_emb = upstream.DeepseekV32RotaryEmbedding(config=model.config).to(device)
    elif point.contestant == DENSE_FLASH:
        model = _dense_flash(config, point.seed, device, dtype)
    else:
        subject = contestant_subject(point.contestant)
        model = subject.build(config, calibrated_state(config, point.seed), device, dtype)
    if point.pass_ == WARM_UP:
        train_only_indexer(model)
    return cast(nn.Module, model.train(point.pass_ != FORWARD))


def flash_config(config: DeepseekV32Config) -> DeepseekV32Config:
    """`config` with the values as wide as queries and keys."""
    return DeepseekV32Config(**{**config.to_dict(), "v_head_dim": config.qk_nope_head_dim + config.qk_rope_head_dim})


def _dense_flash(config: DeepseekV32Config, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
    wide = flash_config(config)
    # A tensor depends on its name, shape and seed only: all but kv_b_proj and o_proj are those of the other contestants.
    state = {name: t for name, t in calibrated_state(wide, seed).items() if ".indexer." not in name}
    known = DeepseekV3Config().to_dict()
    fields = {name: value for name, value in wide.to_dict().items() if name in known and name not in _DERIVED}
    made: Any = DeepseekV3Config
    with no_init_weights():
        model: Any = DeepseekV3ForCausalLM(made(**fields, num_nextn_predict_layers=0, attn_implementation="sdpa"))
    model = _loaded(model, state, device, dtype)
    model.model.rotary_emb = DeepseekV3RotaryEmbedding(config=model.config).to(device)
    return model


_DERIVED = ("model_type", "transformers_version", "architectures", "num_nextn_predict_layers", "num_mtp_layers")


def _loaded(model: Any, state: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> Any:
    """`model` with the weights of `state` in `dtype`; the router bias stays in fp32, as its from_pretrained keeps it."""
    model.load_state_dict(dict(state), strict=True)
    model = model.to(device, dtype).requires_grad_(True)
    if dtype.itemsize < 4:
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.data = state[name].to(device)
    return model
