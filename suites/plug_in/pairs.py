"""The same weights in transformers' own model and in the one that is plugged in, for both families.

`glm-shared` has three layers of which the last one takes the selection of the one before it. Needs no pytest: the other
version of transformers runs this without.
"""

from typing import Any

import torch
import transformers
from transformers import GlmMoeDsaConfig

import optimized
from harness.cases import calibrated_state
from harness.plugged import DEEPSEEK, GLM, config_for
from harness.upstream import with_weights
from reference import DeepseekV32Config

FAMILIES = {"deepseek": DEEPSEEK, "glm": GLM, "glm-shared": GLM}
SHARED_TYPES = ["full", "full", "shared"]
SEED = 3
CPU = torch.device("cpu")


def reference_config(family: str, **overrides: Any) -> DeepseekV32Config:
    """The reference's config of the same sizes: the preset `tiny`, 3 layers, 16 keys a row."""
    return DeepseekV32Config.preset("tiny", indexer_rope_interleaved=FAMILIES[family] == GLM, **overrides)


def config_of(family: str, **overrides: Any) -> Any:
    """transformers' config of a family, the calibrated sizes of `tiny`."""
    config = config_for(FAMILIES[family], reference_config(family, **overrides))
    if family == "glm-shared":
        fields = {**config.to_dict(), "indexer_types": SHARED_TYPES}
        config = GlmMoeDsaConfig(**fields, attn_implementation="sdpa")
    return config


def weights_of(family: str, **overrides: Any) -> dict[str, torch.Tensor]:
    """Calibrated weights, without the indexers that a family lacks."""
    state = calibrated_state(reference_config(family, **overrides), SEED)
    if family == "glm-shared":
        state = {n: t for n, t in state.items() if not n.startswith("model.layers.2.self_attn.indexer.")}
    return state


def construct(family: str) -> type[Any]:
    """The class that transformers' module holds at this moment."""
    found: type[Any] = getattr(transformers, FAMILIES[family])
    return found


def built(family: str, *, plugged: bool, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A model of transformers on calibrated weights, in eval mode."""
    config = config_of(family, **overrides)
    if plugged:
        with optimized.plug_into_transformers():
            model = construct(family)(config)
    else:
        model = construct(family)(config)
    return with_weights(model, weights_of(family, **overrides), CPU, dtype).eval()


def pair(family: str, **overrides: Any) -> tuple[Any, Any]:
    """(transformers' own, plugged in), the same weights."""
    return built(family, plugged=False, **overrides), built(family, plugged=True, **overrides)
