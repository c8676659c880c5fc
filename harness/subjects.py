"""Subjects: implementations under test, and what each declares it can do.

A model's factory is called as `factory(config, state_dict, *, device, dtype)` and returns a module with the
reference's parameter names. Its forward takes the reference's keyword arguments, as far as its capabilities go,
and returns an object with `logits`, and `lm_loss` or `loss` when labels are given.

Who brings kernels instead of a model gives a function without parameters, `operators() -> dict`, with any of the
operators of `OPERATORS`. An operator says in its own attribute `capabilities` what it can do besides.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers.initialization import no_init_weights

import optimized
import optimized.ops
import reference
from reference import DeepseekV32Config
from reference.checkpoint import is_fp32

# What a subject may declare, and what a report says when it does not.
MODEL_CAPABILITIES: dict[str, str] = {
    "model": "builds a whole model by factory(config, state_dict, *, device, dtype)",
    "tape": "records and replays top-k keys and experts (output_decisions, decisions)",
    "indexer-kl": "computes the indexer's KL loss (output_indexer_kl_loss; divided by num_items_in_batch when given)",
    "detach-switch": "lets the indexer's input stay attached (detach_indexer_input=False)",
    "dense-mode": "attends to every visible key when use_sparse_attention is False",
    "packing": "keeps packed documents apart by their positions",
    "padding": "leaves padding out by its attention_mask",
    "cache": "continues from its own past_key_values, chunk by chunk and token by token",
    "checkpointing": "recomputes activations after gradient_checkpointing_enable()",
    "fp8": "simulates the official FP8 path (indexer_precision and kv_latent_precision set to 'fp8')",
    "fp64": "computes in fp64 throughout when built with that dtype",
    "official-files": "has a save_official in the package of its class, and a from_pretrained that reads its files",
    "bitwise": "gives the same bits when run again on the same input",
}
ALL = frozenset(MODEL_CAPABILITIES)
# What only models of transformers can declare.
PLUG_IN = {
    "plug-in": "was built by transformers while plug_into_transformers of its attribute plug_in was in",
    "shared-indexers": "is of a class of transformers whose layers may share an indexer",
}

# The operators, in the signatures of `optimized.ops`, and what each may declare besides.
OPERATORS: dict[str, tuple[str, ...]] = {
    "index_scores": ("backward",),
    "indexer_topk": ("tie-rule", "bitwise"),
    "sparse_mla": ("backward", "bitwise"),
    "dense_mla": ("backward", "bitwise"),
    "indexer_kl": ("backward", "bitwise"),
}
OPERATOR_EXTRAS: dict[str, str] = {
    "backward": "its outputs carry gradient to its inputs",
    "tie-rule": "takes the lowest index first among equal scores",
    "bitwise": "gives the same bits when run again on the same input",
}
CAPABILITIES: dict[str, str] = {
    **MODEL_CAPABILITIES,
    **PLUG_IN,
    **{name: f"offers {name} in its dictionary of operators" for name in OPERATORS},
    **{
        f"{name}:{extra}": f"declares that {name} {OPERATOR_EXTRAS[extra]}"
        for name, extras in OPERATORS.items()
        for extra in extras
    },
}

Operators = Mapping[str, Callable[..., Any]]


class Factory(Protocol):
    """Builds the subject's module with the reference's weights."""

    def __call__(
        self, config: DeepseekV32Config, state_dict: Mapping[str, torch.Tensor], *, device: torch.device, dtype: torch.dtype
    ) -> nn.Module: ...  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """An implementation under test: a model, operators, or both.

    `spec` is what `--subject` was given, for the command that reproduces a failure. `overrides` are fields of the config
    that it cannot do without: the reference runs with them too.
    """

    name: str
    factory: Factory | None
    capabilities: frozenset[str]
    spec: str
    operators: Operators = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def configured(self, config: DeepseekV32Config) -> DeepseekV32Config:
        """`config` with the subject's overrides."""
        return DeepseekV32Config(**{**config.to_dict(), **self.overrides}) if self.overrides else config

    def build(
        self,
        config: DeepseekV32Config,
        state: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> nn.Module:
        """The module in training mode, every parameter trainable."""
        assert self.factory is not None, "checks of models need the capability model"
        # Its own copy: a subject that changes its config must not change the reference's.
        module = self.factory(deepcopy(config), state, device=device, dtype=dtype)
        return module.train().requires_grad_(True)


def load_weights(
    model_class: type[Any], config: DeepseekV32Config, state: Mapping[str, torch.Tensor], device: torch.device,
    dtype: torch.dtype | None,
) -> nn.Module:  # fmt: skip
    """A model of `model_class` that holds copies of `state` in `dtype`; router bias and k_norm in at least fp32.

    With None for `dtype` it holds the tensors of `state` themselves, as far as they are on `device`.
    A class with a config class of its own (a copy of ours that was changed) gets the same fields in that.
    """
    if not isinstance(config, model_class.config_class):
        config = model_class.config_class(**config.to_dict())
    # Each weight is replaced below; on "meta" initialising them would take most of the time.
    with torch.device("meta"), no_init_weights():
        model = model_class(config)
    if dtype is None:
        held = {name: value.detach().to(device) for name, value in state.items()}
    else:
        wide = torch.promote_types(dtype, torch.float32)
        held = {
            name: value.detach().clone().to(device, wide if is_fp32(name) else dtype) for name, value in state.items()
        }
    model.load_state_dict(held, strict=True, assign=True)
    # The rotary table is not part of the state: it is computed where it is needed.
    model.model.rotary_emb.to_empty(device=device)
    return cast(nn.Module, model)


def recompute_activations(model: nn.Module) -> None:
    """Gradient checkpointing, by the name that every supported version of transformers knows."""
    with warnings.catch_warnings():
        # transformers 5.23 gives it a second name; both work.
        warnings.simplefilter("ignore", FutureWarning)
        cast(Any, model).gradient_checkpointing_enable()


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


def with_backend(subject: Subject, backend: str, device: torch.device | str = "cpu") -> Subject:
    """`subject` with the implementation of its operators chosen.

    Raises:
        ValueError: the subject has no operators to choose, not this implementation, or it cannot be used on `device`.
    """
    if subject.name != "optimized":
        raise ValueError(
            f"--backend is {backend!r}, but subject {subject.name!r} has no operators to choose; leave it out."
        )
    optimized.check_backend(backend, device)
    return on_backend(subject, backend)


def on_backend(subject: Subject, backend: str) -> Subject:
    """`subject`, the optimized model or a changed copy of it, on the implementation `backend` of its operators."""

    def factory(
        config: DeepseekV32Config,
        state_dict: Mapping[str, torch.Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> nn.Module:
        assert subject.factory is not None
        model = subject.factory(config, state_dict, device=device, dtype=dtype)
        cast(Any, model).backend = backend
        return model

    operators = {
        name: with_capabilities(partial(op, backend=backend), OPERATORS[name]) for name, op in subject.operators.items()
    }
    # Triton has no fp64 matrix product; the torch operators keep it.
    capabilities = subject.capabilities - ({"fp64"} if backend == "triton" else set())
    return Subject(subject.name, factory, capabilities, f"{subject.spec} --backend {backend}", operators)


def with_capabilities(operator: Callable[..., Any], extras: Iterable[str]) -> Callable[..., Any]:
    """`operator` under another name, declaring `extras`."""

    def declared(*args: Any, **kwargs: Any) -> Any:
        return operator(*args, **kwargs)

    declared.capabilities = frozenset(extras)  # type: ignore[attr-defined]
    return declared


def operator_capabilities(operators: Operators) -> frozenset[str]:
    """The names of `operators`, and name:extra for what each declares besides."""
    extras = {f"{name}:{extra}" for name, op in operators.items() for extra in getattr(op, "capabilities", ())}
    return frozenset(operators) | extras


def ours(name: str, model_class: type[Any], operators: Operators) -> Subject:
    """One of our own models, or a changed copy of it, with the operators that it is built of."""
    full = {op: with_capabilities(function, OPERATORS[op]) for op, function in operators.items()}
    return Subject(name, _ours(model_class), ALL | operator_capabilities(full), name, full)


def optimized_operators(package: Any = optimized.ops) -> Operators:
    """The operators of `optimized.ops`, or of a changed copy of it."""
    return {name: getattr(package, name) for name in OPERATORS if hasattr(package, name)}


def _builtins() -> dict[str, Subject]:
    from .operators.plain import reference_operators
    from .plugged import DEEPSEEK, GLM, plugged
    from .upstream import UPSTREAM_CAPABILITIES, upstream_factory

    return {
        "optimized": ours("optimized", optimized.DeepseekV32ForCausalLM, optimized_operators()),
        "reference": ours("reference", reference.DeepseekV32ForCausalLM, reference_operators()),
        "transformers": Subject("transformers", upstream_factory("sdpa"), UPSTREAM_CAPABILITIES, "transformers"),
        "transformers-eager": Subject(
            "transformers-eager", upstream_factory("eager"), UPSTREAM_CAPABILITIES, "transformers-eager"
        ),
        "transformers-plugged": plugged("transformers-plugged", DEEPSEEK),
        "glm-plugged": plugged("glm-plugged", GLM),
    }


def resolve_subject(spec: str) -> Subject:
    """The subject called `spec`: a built-in name, mutant:NAME, an entry point of `v32.subjects`, or `FILE.py:name`.

    Raises:
        ValueError: nothing of that name, a file that does not load, or capabilities that are not declared.
    """
    from .third_party import declared, from_file

    builtins = _builtins()
    if spec in builtins:
        return builtins[spec]
    if spec.startswith("mutant:"):
        from .mutants.matrix import lasting_mutant

        return lasting_mutant(spec.removeprefix("mutant:"))
    if ".py:" in spec:
        file, _, name = spec.rpartition(":")
        return declared(from_file(Path(file), name), spec)
    for entry in entry_points(group="v32.subjects"):
        if entry.name == spec:
            return declared(entry.load(), spec)
    raise ValueError(
        f"Unknown subject {spec!r}; available: {', '.join(builtins)}, mutant:NAME, "
        "an entry point of v32.subjects, or FILE.py:name."
    )
