"""The configuration: what is accepted, what is refused, what survives a file, and the presets' sizes."""

import json
from dataclasses import fields

import pytest
import torch

from reference import PRESETS, DeepseekV32Config, DeepseekV32ForCausalLM, freeze_indexer, train_only_indexer
from reference.config import DERIVED_FIELDS, FIXED_FIELDS, YARN
from reference.rope import rotary_factor, softmax_scale, yarn_inv_freq
from reference.training import is_indexer, parameter_group, trainable_report
from suites.support import MODELS, both_models, tiny


def test_an_unknown_field_is_refused_with_the_nearest_known_one():
    with pytest.raises(ValueError, match="Unknown config field 'index_top_k'; did you mean 'index_topk'"):
        DeepseekV32Config(index_top_k=16)


def test_a_field_like_no_other_is_refused_too():
    with pytest.raises(ValueError, match="Unknown config field 'zzz'; see DeepseekV32Config"):
        DeepseekV32Config(zzz=1)


@both_models
def test_a_misspelt_attribute_is_refused_when_a_model_is_built(model_class):
    config = tiny()
    config.use_sparse_atention = False
    with pytest.raises(ValueError, match="'use_sparse_atention'; did you mean 'use_sparse_attention'"):
        model_class(config)


@both_models
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("index_topk", 0, "Config field index_topk is 0; it must be an integer of at least 1"),
        ("n_group", 3, r"Config field n_group is 3; it must be a divisor of n_routed_experts \(8\)"),
        ("num_attention_heads", 8, "Config field num_key_value_heads is 4"),
        ("indexer_kl_coef", float("nan"), "Config field indexer_kl_coef is nan"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}, "'default' or 'yarn'"),
        ("scoring_func", "softmax", "Config field scoring_func is 'softmax'; it must be 'sigmoid'"),
    ],
)
def test_a_value_assigned_later_is_checked_when_a_model_is_built(model_class, name, value, sentence):
    config = tiny()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=sentence):
        model_class(config)


@pytest.mark.parametrize(("name", "official"), FIXED_FIELDS.items())
def test_a_fixed_field_takes_its_official_value_and_no_other(name, official):
    assert isinstance(tiny(**{name: official}), DeepseekV32Config)
    other = {bool: True, int: 2, str: "softmax"}[type(official)]
    with pytest.raises(ValueError, match=f"Config field {name} is {other!r}; it must be {official!r}"):
        tiny(**{name: other})


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("n_group", 3, r"n_group is 3; it must be a divisor of n_routed_experts \(8\)"),
        ("n_group", 8, "n_group is 8; it must be such that each group holds 2 experts or more"),
        ("topk_group", 5, r"topk_group is 5; it must be at most n_group \(4\)"),
        ("topk_group", 0, "topk_group is 0; it must be an integer of at least 1"),
        ("num_experts_per_tok", 5, "num_experts_per_tok is 5; it must be at most the 4 experts of the kept groups"),
        ("num_key_value_heads", 2, r"num_key_value_heads is 2; it must be num_attention_heads \(4\)"),
        ("qk_rope_head_dim", 15, "qk_rope_head_dim is 15; it must be even"),
        ("index_head_dim", 8, r"index_head_dim is 8; it must be at least qk_rope_head_dim \(16\)"),
        ("indexer_precision", "int8", "indexer_precision is 'int8'; it must be 'native' or 'fp8'"),
        ("kv_latent_precision", "bf16", "kv_latent_precision is 'bf16'; it must be 'native' or 'fp8'"),
        ("indexer_kl_coef", -0.1, "indexer_kl_coef is -0.1; it must be a finite number of at least 0"),
        ("indexer_kl_coef", float("inf"), "indexer_kl_coef is inf; it must be a finite number"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'; it must be 'silu'"),
        ("attention_bias", True, "attention_bias is True; it must be False"),
        ("mlp_bias", True, "mlp_bias is True; it must be False"),
        ("attention_dropout", 0.1, "attention_dropout is 0.1; it must be 0"),
        ("mlp_layer_types", ["sparse"] * 3, r"mlp_layer_types is .*first_k_dense_replace \(1\) dense layers"),
        ("rope_parameters", {**YARN, "rope_type": "llama3"}, "'llama3'; it must be 'default' or 'yarn'"),
        ("rope_parameters", {**YARN, "beta_quick": 1.0}, "rope_parameters is 'beta_quick'; it must be made of"),
        ("rope_parameters", {**YARN, "factor": 0.5}, r"rope_parameters\['factor'\] is 0.5"),
    ],
)  # fmt: skip
def test_a_value_that_no_model_can_have_is_refused_in_one_sentence(field, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_sparse_attention", "yes"),
        ("detach_indexer_input", 1),
        ("hidden_size", 64.0),
        ("index_topk", True),
        ("q_lora_rank", None),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(field, value):
    # The sentence may be transformers' own; the class must be ValueError's, and the field be named.
    with pytest.raises(ValueError, match=field):
        tiny(**{field: value})


@pytest.mark.parametrize("width", [48, 192])
def test_fp8_refuses_widths_that_its_blocks_do_not_cover(width):
    with pytest.raises(ValueError, match="indexer_precision is 'fp8'|index_head_dim is 48; .*a power of two"):
        tiny(indexer_precision="fp8", index_head_dim=width)


def test_key_value_heads_follow_the_heads():
    assert DeepseekV32Config(num_attention_heads=4).num_key_value_heads == 4
    assert tiny(num_attention_heads=8).num_key_value_heads == 8
    assert DeepseekV32Config().num_key_value_heads == 128


def test_the_configs_rope_parameters_are_its_own():
    given = dict(YARN)
    config = tiny(rope_parameters=given)
    config.rope_parameters["factor"] = 2.0
    assert given == YARN
    assert tiny().rope_parameters["factor"] == 40.0


# Every field of the model at a value that is not its default. The rest has one legal value, is derived, or is
# transformers' bookkeeping.
CHANGED = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 6, "n_shared_experts": 2, "n_routed_experts": 12,
    "routed_scaling_factor": 1.5, "kv_lora_rank": 20, "q_lora_rank": 28, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "qk_nope_head_dim": 10, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 5, "norm_topk_prob": False,
    "max_position_embeddings": 5000, "initializer_range": 0.03, "rms_norm_eps": 1e-5, "use_cache": False,
    "pad_token_id": 7, "bos_token_id": 8, "eos_token_id": 9, "tie_word_embeddings": True, "index_topk": 11,
    "index_head_dim": 16, "index_n_heads": 5, "first_k_dense_replace": 2, "use_sparse_attention": False,
    "detach_indexer_input": False, "indexer_kl_coef": 0.125, "indexer_rope_interleaved": True,
    "indexer_precision": "fp8", "kv_latent_precision": "fp8", "output_hidden_states": True,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 5000.0, "factor": 8.0, "original_max_position_embeddings": 512,
        "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9, "attention_factor": 1.1,
    },
}  # fmt: skip
UNCHANGEABLE = {
    *DERIVED_FIELDS, "hidden_act", "attention_bias", "mlp_bias", "attention_dropout", "transformers_version",
    "architectures", "return_dict", "dtype", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id",
    "problem_type", "output_router_logits",
}  # fmt: skip


def test_the_list_of_changed_fields_misses_none():
    assert {f.name for f in fields(DeepseekV32Config)} - UNCHANGEABLE == set(CHANGED)
    defaults = DeepseekV32Config()
    assert [name for name, value in CHANGED.items() if getattr(defaults, name) == value] == []


def assert_unchanged(config):
    assert {name: getattr(config, name) for name in CHANGED} == CHANGED


def test_every_field_survives_a_dictionary():
    assert_unchanged(DeepseekV32Config.from_dict(DeepseekV32Config(**CHANGED).to_dict()))


def test_every_field_survives_a_file(tmp_path):
    DeepseekV32Config(**CHANGED).save_pretrained(tmp_path)
    assert_unchanged(DeepseekV32Config.from_pretrained(tmp_path))


def test_every_field_survives_a_models_checkpoint(tmp_path):
    DeepseekV32ForCausalLM(DeepseekV32Config(**CHANGED)).save_pretrained(tmp_path)
    assert_unchanged(DeepseekV32ForCausalLM.from_pretrained(tmp_path).config)


def test_derived_fields_are_left_out_of_the_dictionary():
    written = tiny().to_dict()
    assert [name for name in DERIVED_FIELDS if name in written] == []


@pytest.mark.parametrize("keep", [True, False], ids=["consistent", "as 5.17 writes"])
def test_derived_fields_of_other_versions_are_read(keep):
    derived = {
        "layer_types": ["indexed_attention" if keep else "full_attention"] * 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "head_dim": 16,
        "qk_head_dim": 32,
    }
    assert DeepseekV32Config.from_dict({**tiny().to_dict(), **derived}).to_dict() == tiny().to_dict()


# What the published config.json holds, at the sizes of `tiny`.
HUB = {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "torch_dtype": "bfloat16",
    "transformers_version": "4.44.2", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128,
    "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_shared_experts": 1, "n_routed_experts": 8, "ep_size": 1, "routed_scaling_factor": 2.5, "kv_lora_rank": 32,
    "q_lora_rank": 48, "qk_rope_head_dim": 16, "v_head_dim": 24, "qk_nope_head_dim": 16, "topk_method": "noaux_tc",
    "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2, "moe_layer_freq": 1, "first_k_dense_replace": 1,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "hidden_act": "silu", "initializer_range": 0.02,
    "rms_norm_eps": 1e-06, "use_cache": True, "max_position_embeddings": 163840, "tie_word_embeddings": False,
    "attention_bias": False, "attention_dropout": 0.0, "num_nextn_predict_layers": 1, "bos_token_id": 0,
    "eos_token_id": 1, "index_n_heads": 16, "index_head_dim": 32, "index_topk": 16, "rope_theta": 10000,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
}  # fmt: skip


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    return DeepseekV32Config.from_pretrained(tmp_path)


def test_a_published_config_file_is_read(hub):
    sizes = ("hidden_size", "index_topk", "n_group", "kv_lora_rank", "first_k_dense_replace", "v_head_dim")
    assert [getattr(hub, name) for name in sizes] == [HUB[name] for name in sizes]
    assert hub.dtype == torch.bfloat16


def test_rope_scaling_of_a_published_config_is_yarn(hub):
    assert softmax_scale(hub) == softmax_scale(tiny())
    assert rotary_factor(hub.rope_parameters) == 1.0
    assert torch.equal(yarn_inv_freq(hub.rope_parameters, 16), yarn_inv_freq(YARN, 16))


@both_models
def test_a_model_is_built_from_a_published_config(model_class, hub):
    assert model_class(hub)(torch.arange(20)[None]).logits.shape == (1, 20, 320)


def test_a_published_config_with_a_quantisation_is_read(tmp_path):
    block = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({**HUB, "quantization_config": block}))
    assert DeepseekV32Config.from_pretrained(tmp_path).index_topk == 16


# Columns: hidden and dense FFN, layers and the dense ones, heads, q and kv lora, nope rope v, indexer heads and dim,
# k, experts with their top and width, groups and those kept.
TABLE = {
    "tiny": (64, 128, 3, 1, 4, 48, 32, 16, 16, 24, 16, 32, 16, 8, 2, 32, 4, 2),
    "mini": (128, 256, 3, 1, 4, 96, 64, 32, 32, 32, 8, 64, 32, 8, 2, 64, 4, 2),
    "bench": (256, 512, 4, 1, 8, 128, 64, 32, 16, 32, 4, 32, 256, 8, 2, 128, 2, 1),
    "small": (1024, 2048, 8, 2, 16, 256, 128, 64, 64, 64, 16, 128, 256, 16, 4, 512, 4, 2),
    "medium": (2048, 4096, 4, 1, 128, 1536, 512, 128, 64, 128, 64, 128, 2048, 32, 8, 1024, 8, 4),
    "v32": (7168, 18432, 61, 3, 128, 1536, 512, 128, 64, 128, 64, 128, 2048, 256, 8, 2048, 8, 4),
}
COLUMNS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "first_k_dense_replace", "num_attention_heads",
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_n_heads",
    "index_head_dim", "index_topk", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group",
    "topk_group",
)  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_has_the_sizes_of_the_table(name):
    config = DeepseekV32Config.preset(name)
    assert tuple(getattr(config, column) for column in COLUMNS) == TABLE[name]
    assert config.rope_parameters == YARN
    assert (YARN["factor"], YARN["original_max_position_embeddings"]) == (40.0, 4096)
    assert config.max_position_embeddings == 163840
    assert config.num_key_value_heads == config.num_attention_heads


@pytest.mark.parametrize("name", [name for name in TABLE if name != "v32"])
def test_a_small_preset_has_a_byte_vocabulary(name):
    config = DeepseekV32Config.preset(name)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (320, 256, 257, 258)


def test_v32_has_the_published_vocabulary():
    config = DeepseekV32Config.preset("v32")
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (129280, 0, 1)


def test_there_are_no_other_presets():
    assert list(PRESETS) == list(TABLE)
    with pytest.raises(ValueError, match="Unknown preset 'huge'; available: tiny, mini, bench, small, medium, v32"):
        DeepseekV32Config.preset("huge")


def test_a_presets_fields_can_be_overridden():
    assert tiny(index_topk=3, n_group=2).index_topk == 3


@pytest.fixture(scope="module", params=list(MODELS))
def v32(request):
    with torch.device("meta"):
        return MODELS[request.param](DeepseekV32Config.preset("v32"))


def test_v32s_indexers_have_the_published_number_of_parameters(v32):
    counts = [sum(p.numel() for n, p in v32.named_parameters() if f".{i}.self_attn.indexer." in n) for i in range(61)]
    assert counts == [13_959_424] * 61
    assert sum(p.numel() for n, p in v32.named_parameters() if is_indexer(n)) == 851_524_864


def test_v32_has_the_published_number_of_parameters(v32):
    assert sum(p.numel() for p in v32.parameters()) == 671_877_929_216
    biases = sum(b.numel() for n, b in v32.named_buffers() if n.endswith("e_score_correction_bias"))
    assert sum(p.numel() for p in v32.parameters()) + biases == 671_877_944_064


def test_the_report_counts_each_group_and_who_trains(v32):
    train_only_indexer(v32)
    counts = {count.group: (count.parameters, count.trainable) for count in trainable_report(v32)}
    assert counts["indexer"] == (851_524_864, 851_524_864)
    assert sum(trainable for _, trainable in counts.values()) == 851_524_864
    assert sum(parameters for parameters, _ in counts.values()) == 671_877_929_216
    assert counts["embedding"] == counts["head"] == (129280 * 7168, 0)
    # 187,107,328 a layer with its two latent norms, which the report counts among the norms.
    assert counts["attention"] == (61 * (187_107_328 - 1536 - 512), 0)
    assert counts["norms"] == (61 * (1536 + 512 + 2 * 7168) + 7168, 0)
    assert counts["gate"] == (58 * 256 * 7168, 0)
    assert counts["experts"] == (58 * 256 * 3 * 7168 * 2048, 0)
    assert counts[parameter_group("model.layers.0.mlp.up_proj.weight")] == (
        58 * 3 * 7168 * 2048 + 3 * 3 * 7168 * 18432,
        0,
    )


def test_freezing_the_indexer_leaves_all_else_trainable(v32):
    freeze_indexer(v32)
    counts = {count.group: count for count in trainable_report(v32)}
    assert counts["indexer"].trainable == 0
    assert sum(c.trainable for c in counts.values()) == 671_877_929_216 - 851_524_864


def test_both_models_have_the_same_state_keys_and_shapes():
    with torch.device("meta"):
        shapes = [{n: t.shape for n, t in c(tiny()).state_dict().items()} for c in MODELS.values()]
    assert shapes[0] == shapes[1]
    assert {n for n in shapes[0] if ".indexer." in n and ".0." in n} == {
        f"model.layers.0.self_attn.indexer.{leaf}"
        for leaf in ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")
    }
