"""Subjects: implementations under test, and what each declares it can do.

A subject's factory is called as `factory(config, state_dict, *, device, dtype)` and returns a module with the
reference's parameter names. Its forward takes the reference's keyword arguments, as far as its capabilities go,
and returns an object with `logits`, and `lm_loss` or `loss` when labels are given.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

import optimized
import reference
from reference import DeepseekV32Config

# What a subject may declare, and what a report says when it does not.
CAPABILITIES: dict[str, str] = {
    "tape": "records and replays top-k keys and experts (output_decisions, decisions)",
    "indexer-kl": "computes the indexer's KL loss (output_indexer_kl_loss)",
    "detach-switch": "lets the indexer's input stay attached (detach_indexer_input=False)",
    "dense-mode": "attends to every visible key when use_sparse_attention is False",
    "packing": "keeps packed documents apart by their positions",
    "padding": "leaves padding out by its attention_mask",
}
ALL = frozenset(CAPABILITIES)


class Factory(Protocol):
    """Builds the subject's module with the reference's weights."""

    def __call__(
        self, config: DeepseekV32Config, state_dict: Mapping[str, torch.Tensor], *, device: torch.device, dtype: torch.dtype
    ) -> nn.Module: ...  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """An implementation under test. `spec` is what `--subject` was given, for the command that reproduces a failure."""

    name: str
    factory: Factory
    capabilities: frozenset[str]
    spec: str

    def build(
        self,
        config: DeepseekV32Config,
        state: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> nn.Module:
        """The module in training mode, every parameter trainable."""
        # Its own copy: a subject that changes its config must not change the reference's.
        module = self.factory(DeepseekV32Config(**config.to_dict()), state, device=device, dtype=dtype)
        return module.train().requires_grad_(True)


def load_weights(
    model_class: type[Any], config: DeepseekV32Config, state: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> nn.Module:  # fmt: skip
    """A model of `model_class` that holds copies of `state` in `dtype`, the router bias in at least fp32."""
    with torch.device("meta"):
        model = model_class(config)
    bias_dtype = torch.promote_types(dtype, torch.float32)
    copies = {
        name: value.detach().clone().to(device, bias_dtype if name.endswith("e_score_correction_bias") else dtype)
        for name, value in state.items()
    }
    model.load_state_dict(copies, strict=True, assign=True)
    # The rotary table is not part of the state: it is computed where it is needed.
    model.model.rotary_emb.to_empty(device=device)
    return cast(nn.Module, model)


def _ours(model_class: type[Any]) -> Factory:
    def factory(
        config: DeepseekV32Config,
        state_dict: Mapping[str, torch.Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> nn.Module:
        return load_weights(model_class, config, state_dict, device, dtype)

    return factory


def with_backend(subject: Subject, backend: str) -> Subject:
    """`subject` with the implementation of its operators chosen.

    Raises:
        ValueError: the subject has no operators to choose, or not this implementation.
    """
    if subject.name != "optimized":
        raise ValueError(
            f"--backend is {backend!r}, but subject {subject.name!r} has no operators to choose; leave it out."
        )

    def factory(
        config: DeepseekV32Config,
        state_dict: Mapping[str, torch.Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> nn.Module:
        model = subject.factory(config, state_dict, device=device, dtype=dtype)
        cast(Any, model).backend = backend
        return model

    optimized.check_backend(backend)
    return Subject(subject.name, factory, subject.capabilities, f"{subject.spec} --backend {backend}")


def _builtins() -> dict[str, Subject]:
    from .upstream import UPSTREAM_CAPABILITIES, upstream_factory

    return {
        "optimized": Subject("optimized", _ours(optimized.DeepseekV32ForCausalLM), ALL, "optimized"),
        "reference": Subject("reference", _ours(reference.DeepseekV32ForCausalLM), ALL, "reference"),
        "transformers": Subject("transformers", upstream_factory("sdpa"), UPSTREAM_CAPABILITIES, "transformers"),
        "transformers-eager": Subject(
            "transformers-eager", upstream_factory("eager"), UPSTREAM_CAPABILITIES, "transformers-eager"
        ),
    }


def resolve_subject(spec: str) -> Subject:
    """The subject called `spec`: a built-in name, an entry point of `v32.subjects`, or `FILE.py:name`.

    Raises:
        ValueError: nothing of that name, a file that does not load, or capabilities that are not declared.
    """
    builtins = _builtins()
    if spec in builtins:
        return builtins[spec]
    if ".py:" in spec:
        file, _, name = spec.rpartition(":")
        return _declared(_from_file(Path(file), name), spec)
    for entry in entry_points(group="v32.subjects"):
        if entry.name == spec:
            return _declared(entry.load(), spec)
    raise ValueError(
        f"Unknown subject {spec!r}; available: {', '.join(builtins)}, an entry point of v32.subjects, or FILE.py:factory."
    )


def _from_file(path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise ValueError(f"--subject names the file {path}, which does not exist.")
    module_spec = importlib.util.spec_from_file_location(f"v32_subject_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"--subject names the file {path}, which is not a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--subject: {path} does not load: {type(error).__name__}: {error}.") from error
    if not callable(factory := getattr(module, name, None)):
        raise ValueError(f"--subject: {path} has no factory called {name!r}.")
    return cast(Callable[..., Any], factory)


def _declared(factory: Callable[..., Any], spec: str) -> Subject:
    """The factory with its capabilities: its own attribute, or that of the module it builds.

    A module derived from the reference's class can do all that the reference can, unless it says otherwise.
    """
    declared = getattr(factory, "capabilities", None)
    if declared is None:
        config = DeepseekV32Config.preset("tiny")
        with torch.device("meta"):
            state = reference.DeepseekV32ForCausalLM(config).state_dict()
        try:
            zeros = {name: torch.zeros(tensor.shape) for name, tensor in state.items()}
            module = factory(config, zeros, device=torch.device("cpu"), dtype=torch.float32)
        except Exception as error:
            raise ValueError(
                f"--subject {spec}: calling it as factory(config, state_dict, device=, dtype=) raised "
                f"{type(error).__name__}: {error}."
            ) from error
        declared = getattr(module, "capabilities", None)
        if declared is None and isinstance(module, reference.DeepseekV32ForCausalLM):
            declared = ALL
    if declared is None:
        raise ValueError(
            f"--subject {spec} declares no capabilities; give the factory or its module an attribute "
            f"capabilities = frozenset({{…}}) with any of {', '.join(CAPABILITIES)}."
        )
    if not isinstance(declared, (set, frozenset, list, tuple)):
        raise ValueError(f"--subject {spec}: its capabilities are {declared!r}; they must be a set of names.")
    if unknown := sorted(map(str, set(declared) - ALL)):
        raise ValueError(f"--subject {spec} declares {unknown[0]!r}; capabilities are {', '.join(CAPABILITIES)}.")
    return Subject(spec.rpartition(":")[2] or spec, cast(Factory, factory), frozenset(declared), spec)
