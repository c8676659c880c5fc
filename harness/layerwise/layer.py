"""Reads one layer of a checkpoint, and runs a model of that one layer on given hidden states.

A model of one layer is built like any other: by the subject's factory, from a config of one layer and a state with the
official names. Its embedding holds the layer's input, a row for each token, so that any model that takes token ids takes
hidden states. Its parts are looked into by hooks, and handed what they must share: keys and experts by the tape, the
attention's output by the hook on it, so that the feed-forward part is judged on the same input whoever computed it.

Letters: B batch, L rows, N = B·L, S key slots, M hidden_size, K selected keys, T chosen experts, X routed experts.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from transformers.initialization import no_init_weights

from reference import Decisions, DeepseekV32Config, DeepseekV32ForCausalLM
from reference.checkpoint import Checkpoint, inspect_checkpoint, read_config
from reference.decisions import LayerDecisions
from reference.moe import Gate
from reference.streaming import StreamedParameter, streamed_parameters

from ..checks.whole import changed

State = dict[str, torch.Tensor]
ATTENTION, FFN, LAYER = "model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.0"


class NoSuchPartError(ValueError):
    """A subject's module lacks a part that a walk looks into."""


class LayerFiles:
    """A checkpoint whose layers are read one at a time, in `dtype` on `device`; router bias and k_norm in fp32."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Check every header against the config.

        Raises:
            ValueError: the first tensor that is missing, unknown, truncated, wrongly typed or shaped, by its name.
        """
        self.config = without_quantization(read_config(directory))
        with torch.device("meta"), no_init_weights():
            skeleton = cast(Any, DeepseekV32ForCausalLM(self.config)).to(dtype).state_dict()
        self.checkpoint: Checkpoint = inspect_checkpoint(directory, skeleton, self.config)
        self.dtype, self.device = dtype, device
        # FP8 weights whose products the dtype does not hold exactly; it grows as layers are read.
        self.rounded: list[str] = []
        how = SimpleNamespace(device_map={"": device}, dtype_plan={"e_score_correction_bias": torch.float32})
        self._parameters: Mapping[str, StreamedParameter] = streamed_parameters(
            self.checkpoint, skeleton, how, self.rounded
        )

    def read(self, name: str) -> torch.Tensor:
        """One parameter, dequantised."""
        return self._parameters[name][...]

    def head(self) -> torch.Tensor:
        """The output head, which may be the embedding."""
        tied = self.config.tie_word_embeddings
        return self.read("model.embed_tokens.weight" if tied else "lm_head.weight")

    def layer(self, index: int, x_BLM: torch.Tensor) -> State:
        """The state of a model of that one layer, whose embedding holds its input `x_BLM`; nothing else is read.

        Raises:
            ValueError: a file that has been cut, or a scale that is NaN, infinite, zero or negative.
        """
        prefix = f"model.layers.{index}."
        state = {
            f"{LAYER}.{name.removeprefix(prefix)}": self.read(name)
            for name in self._parameters
            if name.startswith(prefix)
        }
        table_NM = x_BLM.to(self.device, self.dtype).flatten(0, 1)
        norm = torch.ones(self.config.hidden_size, dtype=self.dtype, device=self.device)
        return {**state, "model.embed_tokens.weight": table_NM, "model.norm.weight": norm, "lm_head.weight": table_NM}

    def stored_bytes(self, index: int | None = None) -> int:
        """Bytes of a layer in the files, or of all that a walk reads."""
        prefix = "" if index is None else f"model.layers.{index}."
        return sum(
            held.size
            for tensors in (self.checkpoint.tensors, self.checkpoint.scales)
            for name, held in tensors.items()
            if name.startswith(prefix)
        )


def without_quantization(config: DeepseekV32Config) -> DeepseekV32Config:
    """The config of what has been dequantised."""
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    return DeepseekV32Config(**fields)


def one_layer(config: DeepseekV32Config, index: int, rows: int) -> DeepseekV32Config:
    """The config of a model that consists of layer `index`, with a vocabulary of one entry for each row of its input."""
    return changed(
        config, num_hidden_layers=1, first_k_dense_replace=0 if config.is_moe_layer(index) else 1, vocab_size=rows,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip


@dataclass(slots=True)
class LayerRun:
    """What one model did in the layer; None where it has no such part, or was not asked for it."""

    attention_BLM: torch.Tensor | None = None
    ffn_BLM: torch.Tensor | None = None
    output_BLM: torch.Tensor | None = None
    scores_BLS: torch.Tensor | None = None
    router_BLX: torch.Tensor | None = None
    decisions: LayerDecisions = field(default_factory=LayerDecisions)
    # The attention's output in the run's dtype, which every model's feed-forward part gets.
    handed_BLM: torch.Tensor | None = None


@torch.no_grad()
def run_layer(
    model: nn.Module, ids_BL: torch.Tensor, dtype: torch.dtype, shared: LayerRun | None = None, *, router: bool = False
) -> LayerRun:
    """Run a model of one layer on rows `ids_BL` of its embedding, on the choices and the attention output of `shared`.

    Args:
        dtype: of the run: what is handed on is rounded to it. router: also the biased scores; the reference only.

    Raises:
        NoSuchPartError: the model lacks one of the modules that are looked into.
    """
    found = LayerRun()
    wants: dict[str, Any] = {"output_decisions": True}
    if "output_indexer_scores" in inspect.signature(model.forward).parameters:
        wants["output_indexer_scores"] = "visible"
    if shared is not None:
        wants["decisions"] = Decisions((shared.decisions,))
    with _watched(model, found, dtype, None if shared is None else shared.handed_BLM, router):
        out = model(input_ids=ids_BL, use_cache=False, **wants)
    scores = getattr(out, "indexer_scores", None)
    found.scores_BLS = None if scores is None else scores[0]
    found.decisions = out.decisions[0]
    return found


@contextmanager
def _watched(
    model: nn.Module, found: LayerRun, dtype: torch.dtype, handed_BLM: torch.Tensor | None, router: bool
) -> Iterator[None]:
    """Note what the parts give in `found`, and hand on `handed_BLM` in place of the attention's own output."""

    def attention(_: nn.Module, __: Any, output: Any) -> Any:
        found.attention_BLM = _first(output)
        found.handed_BLM = found.attention_BLM.to(dtype) if handed_BLM is None else handed_BLM
        passed = found.handed_BLM.to(found.attention_BLM.dtype)
        return (passed, *output[1:]) if isinstance(output, tuple) else passed

    def ffn(_: nn.Module, __: Any, output: Any) -> None:
        found.ffn_BLM = _first(output)

    def layer(_: nn.Module, __: Any, output: Any) -> None:
        found.output_BLM = _first(output)

    def gate(module: Any, _: Any, scores_NX: torch.Tensor) -> None:
        biased_NX = scores_NX + module.e_score_correction_bias.to(scores_NX.dtype)
        assert found.attention_BLM is not None
        found.router_BLX = biased_NX.unflatten(0, found.attention_BLM.shape[:2])

    hooks = [_part(model, name).register_forward_hook(hook) for name, hook in
             ((ATTENTION, attention), (FFN, ffn), (LAYER, layer))]  # fmt: skip
    if router:
        hooks += [module.register_forward_hook(gate) for module in model.modules() if isinstance(module, Gate)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _part(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise NoSuchPartError(
            f"A walk by layers looks into {ATTENTION} and {FFN}, and the subject's module has no {name}."
        ) from error


def _first(output: Any) -> torch.Tensor:
    """The hidden states in what a module returns, alone or in a tuple."""
    return (output[0] if isinstance(output, tuple) else output).detach()
