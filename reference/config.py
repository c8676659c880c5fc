"""The configuration of DeepSeek V3.2 and its presets (report section 2; spec 1.1).

Field names are the published ones. What this class adds to transformers' `DeepseekV32Config` is the
training contract (`use_sparse_attention`, `detach_indexer_input`, `indexer_kl_coef`), two precisions
of the official inference path, and the habit of refusing what it does not know: upstream keeps any
misspelt field as an attribute that nothing reads.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from functools import cache, wraps
from typing import Any, ClassVar, Self

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig
from transformers.models.deepseek_v32.configuration_deepseek_v32 import (
    DeepseekV32Config as UpstreamDeepseekV32Config,
)

# Fields of the published config.json that have one legal value here.
FIXED_FIELDS: dict[str, Any] = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "ep_size": 1,
    "num_nextn_predict_layers": 1,
    # A field of transformers 5.23 that 5.17 does not know; the tape holds what the router chose.
    "output_router_logits": False,
}
# Recomputed from the other fields, and written differently by transformers 5.17 and 5.23.
DERIVED_FIELDS = ("layer_types", "mlp_layer_types", "head_dim", "qk_head_dim")
# Keys of a config.json that belong to transformers, not to the model.
BASE_KEYS = {
    "torch_dtype", "num_labels", "rope_scaling", "rope_theta", "name_or_path", "_name_or_path", "_commit_hash",
    "output_attentions", "attn_implementation", "_attn_implementation", "experts_implementation",
    "_experts_implementation", "quantization_config", "auto_map", "model_type", "num_experts", "num_local_experts",
    "base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan",
    "_attn_implementation_internal", "_experts_implementation_internal", "_output_attentions",
}  # fmt: skip

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
YARN_KEYS = {*YARN, "attention_factor", "type"}

# A byte-level vocabulary: 256 bytes, bos 256, eos 257, pad 258, rounded up.
_BYTES = {"vocab_size": 320, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
_TRUE_ATTENTION = {
    "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_BYTES, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "first_k_dense_replace": 1,
        "num_attention_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 24, "index_n_heads": 16, "index_head_dim": 32, "index_topk": 16,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 4, "topk_group": 2,
    },
    "mini": {
        **_BYTES, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "first_k_dense_replace": 1,
        "num_attention_heads": 4, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32, "v_head_dim": 32, "index_n_heads": 8, "index_head_dim": 64, "index_topk": 32,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 4, "topk_group": 2,
    },
    "bench": {
        **_BYTES, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "first_k_dense_replace": 1,
        "num_attention_heads": 8, "q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16, "v_head_dim": 32, "index_n_heads": 4, "index_head_dim": 32, "index_topk": 256,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_group": 2, "topk_group": 1,
    },
    "small": {
        **_BYTES, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8, "first_k_dense_replace": 2,
        "num_attention_heads": 16, "q_lora_rank": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64, "v_head_dim": 64, "index_n_heads": 16, "index_head_dim": 128, "index_topk": 256,
        "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 512, "n_group": 4, "topk_group": 2,
    },
    "medium": {
        **_BYTES, **_TRUE_ATTENTION, "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 4,
        "first_k_dense_replace": 1, "n_routed_experts": 32, "num_experts_per_tok": 8, "moe_intermediate_size": 1024,
        "n_group": 8, "topk_group": 4,
    },
    "v32": {
        **_TRUE_ATTENTION, "vocab_size": 129280, "bos_token_id": 0, "eos_token_id": 1, "hidden_size": 7168,
        "intermediate_size": 18432, "num_hidden_layers": 61, "first_k_dense_replace": 3, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4,
    },
}  # fmt: skip


def _errors_as_sentences(cls: type[Any]) -> type[Any]:
    """Values of a wrong type, in a call or an assignment, raise ValueError like everything else that is refused."""

    def guard(own: Callable[..., None]) -> Callable[..., None]:
        @wraps(own)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                own(self, *args, **kwargs)
            except StrictDataclassError as error:
                raise ValueError(f"DeepseekV32Config: {' '.join(str(error).split())}") from error

        return guarded

    for method in ("__init__", "__setattr__"):
        setattr(cls, method, guard(getattr(cls, method)))
    return cls


@cache
def _generation_fields() -> frozenset[str]:
    """What transformers may keep of a generation config; it takes a hundred times longer to find than to check."""
    found = (*GenerationConfig().to_dict(), *GenerationConfig._get_default_generation_params())
    return frozenset(found)


@_errors_as_sentences
@strict
class DeepseekV32Config(UpstreamDeepseekV32Config):
    """Sizes, training switches and precisions of one DeepSeek V3.2 model.

    Beyond transformers' fields:

    - `use_sparse_attention`: attend to the indexer's top-k (report eq. 2), or to every visible key.
    - `detach_indexer_input`: the indexer reads its inputs detached, so that its KL loss trains nothing else.
    - `indexer_kl_coef`: weight of the KL loss in `loss`; above 0 it switches the KL on.
    - `indexer_rope_interleaved`: False is V3.2 (half-split pairs); True is the layout of GLM-5.
    - `indexer_precision`, `kv_latent_precision`: `"native"`, or `"fp8"` for the official path's bytes.

    Raises:
        ValueError: an unknown field, or a value that no DeepSeek V3.2 model can have. One sentence that names
            the field, what was given and what is allowed.
    """

    # Objects and [B, L, S] tensors that Trainer must not gather at evaluation.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [  # type: ignore[misc]
        "past_key_values", "lm_loss", "indexer_kl_loss", "indexer_scores", "indexer_kl_targets", "decisions",
    ]  # fmt: skip

    use_sparse_attention: bool = True
    detach_indexer_input: bool = True
    indexer_kl_coef: float = 0.0
    indexer_rope_interleaved: bool = False
    indexer_precision: str = "native"
    kv_latent_precision: str = "native"

    def __post_init__(self, **kwargs: Any) -> None:
        known = self.known_fields()
        for name in kwargs:
            if name not in known:
                raise ValueError(f"Unknown config field {name!r}{_suggestion(name, known)}.")
        if self.mlp_layer_types is not None:
            self._check_mlp_layer_types()
        self.layer_types = None
        self.mlp_layer_types = None
        if self.num_key_value_heads in (None, type(self).num_key_value_heads):
            self.num_key_value_heads = self.num_attention_heads
        if isinstance(self.dtype, str) and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(
                f"Config field dtype is {self.dtype!r}; it must be the name of a torch dtype, such as 'bfloat16'."
            )
        # Own copy: transformers completes this dictionary in place.
        self.rope_parameters = dict(self.rope_parameters) if self.rope_parameters else None
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def known_fields(cls) -> set[str]:
        """Every name a config.json or a constructor call may hold."""
        return (
            {f.name for f in fields(cls)} | BASE_KEYS | set(FIXED_FIELDS) | set(DERIVED_FIELDS) | _generation_fields()
        )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The preset called `name` (see `PRESETS`), with YaRN (factor 40 on 4096), fields overridden by keyword.

        Raises:
            ValueError: no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}; available: {', '.join(PRESETS)}.")
        sizes: dict[str, Any] = {
            "max_position_embeddings": 163840,
            "rope_parameters": dict(YARN),
            **PRESETS[name],
        }
        sizes["num_key_value_heads"] = overrides.get("num_attention_heads", sizes["num_attention_heads"])
        return cls(**{**sizes, **overrides})

    def check(self) -> None:
        """Validate every field and their relations; called again whenever a model is built from this config.

        Raises:
            ValueError: the first violated rule, as one sentence.
        """
        known = self.known_fields()
        for name in vars(self):
            if not name.startswith("_") and name not in known:
                raise ValueError(f"Unknown config field {name!r}{_suggestion(name, known)}.")
        for name, official in FIXED_FIELDS.items():
            _require(getattr(self, name, official) == official, name, getattr(self, name, official), repr(official))
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
            "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
            "v_head_dim", "index_n_heads", "index_head_dim", "index_topk", "n_routed_experts", "n_shared_experts",
            "num_experts_per_tok", "n_group", "topk_group", "max_position_embeddings",
        ):  # fmt: skip
            _require(
                _is_int(getattr(self, name)) and getattr(self, name) >= 1,
                name,
                getattr(self, name),
                "an integer of at least 1",
            )
        _require(_is_int(self.first_k_dense_replace) and self.first_k_dense_replace >= 0,
                 "first_k_dense_replace", self.first_k_dense_replace, "an integer of at least 0")  # fmt: skip
        _require(self.num_key_value_heads == self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads,
                 f"num_attention_heads ({self.num_attention_heads}): MLA keeps one latent for all heads")  # fmt: skip
        _require(
            self.qk_rope_head_dim % 2 == 0,
            "qk_rope_head_dim",
            self.qk_rope_head_dim,
            "even: RoPE turns pairs",
        )
        _require(self.index_head_dim >= self.qk_rope_head_dim, "index_head_dim", self.index_head_dim,
                 f"at least qk_rope_head_dim ({self.qk_rope_head_dim}), whose lanes come first")  # fmt: skip
        _require(self.n_routed_experts % self.n_group == 0, "n_group", self.n_group,
                 f"a divisor of n_routed_experts ({self.n_routed_experts})")  # fmt: skip
        _require(
            self.topk_group <= self.n_group,
            "topk_group",
            self.topk_group,
            f"at most n_group ({self.n_group})",
        )
        group_size = self.n_routed_experts // self.n_group
        _require(group_size >= 2 or self.n_group == 1, "n_group", self.n_group,
                 "such that each group holds 2 experts or more: a group's score is the sum of its two best")  # fmt: skip
        _require(self.num_experts_per_tok <= self.topk_group * group_size, "num_experts_per_tok",
                 self.num_experts_per_tok, f"at most the {self.topk_group * group_size} experts of the kept groups")  # fmt: skip
        for name in (
            "use_sparse_attention",
            "detach_indexer_input",
            "indexer_rope_interleaved",
            "norm_topk_prob",
        ):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        for name in ("indexer_precision", "kv_latent_precision"):
            _require(getattr(self, name) in ("native", "fp8"), name, getattr(self, name), "'native' or 'fp8'")
        _require(isinstance(self.indexer_kl_coef, (int, float)) and math.isfinite(self.indexer_kl_coef)
                 and self.indexer_kl_coef >= 0, "indexer_kl_coef", self.indexer_kl_coef, "a finite number of at least 0")  # fmt: skip
        for name, block in (
            ("indexer_precision", self.index_head_dim),
            ("kv_latent_precision", self.kv_lora_rank),
        ):
            if getattr(self, name) == "fp8":
                _require(block < 128 or block % 128 == 0, name, "fp8",
                         f"for a width below 128 or a multiple of it (here {block}): scales cover 128 channels")  # fmt: skip
        if self.indexer_precision == "fp8":
            _require(self.index_head_dim & (self.index_head_dim - 1) == 0, "index_head_dim", self.index_head_dim,
                     "a power of two when indexer_precision is 'fp8': the Hadamard matrix has that size")  # fmt: skip
        _require(self.hidden_act == "silu", "hidden_act", self.hidden_act, "'silu'")
        for name in ("attention_bias", "mlp_bias"):
            _require(getattr(self, name) is False, name, getattr(self, name), "False: the model has no such biases")
        _require(self.attention_dropout == 0, "attention_dropout", self.attention_dropout, "0")
        _require(
            self.pad_token_id is None or 0 <= self.pad_token_id < self.vocab_size,
            "pad_token_id",
            self.pad_token_id,
            f"None, or an id below vocab_size ({self.vocab_size})",
        )
        self._check_rope()

    def _check_rope(self) -> None:
        rope = self.rope
        kind = rope.get("rope_type", "default")
        _require(kind in ("default", "yarn"), "rope_parameters['rope_type']", kind, "'default' or 'yarn'")
        for name in rope:
            _require(name in YARN_KEYS, "rope_parameters", name, f"made of {', '.join(sorted(YARN_KEYS))}")
        if kind == "yarn":
            for name in ("factor", "original_max_position_embeddings"):
                value = rope.get(name)
                _require(
                    isinstance(value, (int, float)) and value >= 1,
                    f"rope_parameters[{name!r}]",
                    value,
                    "a number of at least 1",
                )

    @property
    def rope(self) -> dict[str, Any]:
        """`rope_parameters`, which construction has completed."""
        assert self.rope_parameters is not None
        return self.rope_parameters

    def _check_mlp_layer_types(self) -> None:
        assert self.mlp_layer_types is not None
        expected = [self.is_moe_layer(i) for i in range(self.num_hidden_layers)]
        given = [kind == "sparse" for kind in self.mlp_layer_types]
        _require(given == expected, "mlp_layer_types", self.mlp_layer_types,
                 f"first_k_dense_replace ({self.first_k_dense_replace}) dense layers, then sparse ones")  # fmt: skip

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` (0-based) has experts; the first `first_k_dense_replace` are dense FFNs."""
        return layer_idx >= self.first_k_dense_replace

    def to_dict(self) -> dict[str, Any]:
        """As transformers', without the derived fields, which differ between its versions."""
        out: dict[str, Any] = super().to_dict()
        for name in DERIVED_FIELDS:
            out.pop(name, None)
        return out


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(holds: bool, name: str, given: Any, allowed: str) -> None:
    if not holds:
        raise ValueError(f"Config field {name} is {given!r}; it must be {allowed}.")


def _suggestion(name: str, known: set[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; see DeepseekV32Config for the fields there are"
