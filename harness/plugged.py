"""transformers' own models with our operators plugged in, as subjects: `deepseek_v32` and GLM-5's `glm_moe_dsa`.

They are judged by the reference, as every subject is. GLM-5's differs from DeepSeek's in two ways that the reference can
take part in or not: its indexer rotates interleaved pairs, which the reference does under `indexer_rope_interleaved`;
and its layers may share indexers, which the reference does not do. So `glm-plugged` has an indexer in every layer, and
`suites/plug_in` compares models that share them with transformers' own.

Letters: B batch, L rows, K chosen keys.
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GlmMoeDsaConfig
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config as UpstreamConfig
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm

import optimized
from optimized.plug_in.attention import OWN_FIELDS
from reference import DeepseekV32Config
from reference.attention import Ask, Found, Projected
from reference.layout import Layout

from .subjects import Factory, Subject
from .upstream import Taped, TapeRun, upstream_fields, with_weights

# It has no FP8 path, and transformers' norms and router stay in fp32 where a model is in fp64.
PLUGGED_CAPABILITIES = frozenset(
    {
        "model", "tape", "indexer-kl", "detach-switch", "dense-mode", "packing", "padding", "cache", "checkpointing",
        "bitwise", "plug-in",
    }
)  # fmt: skip


DEEPSEEK, GLM = "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"
MODULES = {DEEPSEEK: "deepseek_v32", GLM: "glm_moe_dsa"}


class TapedPlugged(Taped):
    """Mixed in before a causal LM that is plugged in: the tape reaches its selection where attention asks for it."""

    def _tape_selection(self, attention: Any, layer_idx: int) -> None:
        inner = attention.attend

        def attend(
            t: Projected, layout: Layout, ask: Ask, replayed_BLK: torch.Tensor | None
        ) -> tuple[torch.Tensor, Found]:
            assert replayed_BLK is None
            run: TapeRun = self._run(layer_idx)
            relative = None if run.replay is None else run.replay[layer_idx].topk_indices
            out, found = inner(t, layout, ask, None if relative is None else layout.from_relative(relative))
            if found.topk_BLK is not None:
                run.own[layer_idx]["topk_indices"] = layout.to_relative(found.topk_BLK)
            return out, found

        attention.attend = attend


def config_for(class_name: str, config: DeepseekV32Config) -> Any:
    """The config of transformers' class of that name, of the same sizes, with our own fields that the plug-in honours.

    `indexer_rope_interleaved` is left out where it says what the class does anyway.
    """
    own = {name: getattr(config, name) for name in OWN_FIELDS}
    is_glm = class_name == GLM
    if config.indexer_rope_interleaved != is_glm:
        own["indexer_rope_interleaved"] = config.indexer_rope_interleaved
    if is_glm:
        own["indexer_types"] = ["full"] * config.num_hidden_layers
    made: Any = GlmMoeDsaConfig if is_glm else UpstreamConfig
    return made(**upstream_fields(config), **own, attn_implementation="sdpa")


def plugged_factory(class_name: str, package: Any = optimized) -> Factory:
    """A subject factory for transformers' class of that name, plugged in by `package`: ours, or a changed copy of it."""

    def factory(
        config: DeepseekV32Config,
        state_dict: Mapping[str, torch.Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> nn.Module:
        with package.plug_into_transformers():
            family = importlib.import_module(f"{package.__name__}.plug_in.{MODULES[class_name]}")
            taped: Any = type(class_name, (TapedPlugged, getattr(family, class_name)), {"plug_in": package})
            model = taped(config_for(class_name, config))
        return with_weights(model, state_dict, device, dtype)

    return factory


def plugged(name: str, class_name: str, package: Any = optimized) -> Subject:
    """The subject called `name`: transformers' class, plugged in by `package`."""
    is_glm = class_name == GLM
    capabilities = PLUGGED_CAPABILITIES | ({"shared-indexers"} if is_glm else set())
    overrides = {"indexer_rope_interleaved": True} if is_glm else {}
    return Subject(name, plugged_factory(class_name, package), capabilities, name, overrides=overrides)


@contextmanager
def transformers_as_it_was() -> Iterator[None]:
    """Puts back at its end what a faulty plug-in leaves behind: constructors, and tables of recorded outputs."""
    models = [
        getattr(m, name)
        for m, name in ((deepseek, DEEPSEEK), (glm, GLM), (deepseek, "DeepseekV32Model"), (glm, "GlmMoeDsaModel"))
    ]
    inits = [(model, model.__init__) for model in models]
    tables = [(model._can_record_outputs, dict(model._can_record_outputs)) for model in models]
    try:
        yield
    finally:
        for model, init in inits:
            model.__init__ = init
        for table, entries in tables:
            table.clear()
            table.update(entries)
