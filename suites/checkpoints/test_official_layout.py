"""Checkpoints in the official layout: what is written, who reads it, and one sentence for each that is damaged.

A damaged checkpoint is a sound one with one thing wrong, so that nothing else can be what is refused.
"""

import json
import re
import shutil
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers import DeepseekV32ForCausalLM as UpstreamForCausalLM

from harness.upstream import upstream_config
from reference import DeepseekV32Config, DeepseekV32ForCausalLM
from suites.support import assert_same, both_models, build, text, tiny

L = 40
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.3.gate_proj.weight"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound checkpoint in one file."""
    path = tmp_path_factory.mktemp("sound")
    build(DeepseekV32ForCausalLM, torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The same in several files with an index."""
    path = tmp_path_factory.mktemp("shards")
    build(DeepseekV32ForCausalLM, torch.float32).save_pretrained(path, max_shard_size="200KB")
    return path


@pytest.fixture
def copy(sound, tmp_path):
    """A copy of the sound checkpoint, for damage."""
    return shutil.copytree(sound, tmp_path / "copy")


@pytest.fixture
def shards_copy(shards, tmp_path):
    """A copy of the checkpoint in shards, for damage."""
    return shutil.copytree(shards, tmp_path / "copy")


def edit(path, change, metadata=("format", "pt")):
    """Rewrite a safetensors file after `change` of its dictionary of tensors."""
    tensors = load_file(path / FILE)
    change(tensors)
    save_file(tensors, path / FILE, metadata=dict([metadata]))


def assert_refused(path, sentence, model_class=DeepseekV32ForCausalLM, **kwargs):
    with pytest.raises(ValueError, match=sentence) as caught:
        model_class.from_pretrained(path, **kwargs)
    assert "\n" not in str(caught.value)


def test_files_hold_the_official_names_one_tensor_an_expert(sound):
    names = {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    }  # fmt: skip
    for i in range(3):
        layer = f"model.layers.{i}"
        names |= {f"{layer}.{norm}_layernorm.weight" for norm in ("input", "post_attention")}
        attention = (
            "q_a_proj",
            "q_a_layernorm",
            "q_b_proj",
            "kv_a_proj_with_mqa",
            "kv_a_layernorm",
            "kv_b_proj",
            "o_proj",
        )
        names |= {f"{layer}.self_attn.{leaf}.weight" for leaf in attention}
        names |= {
            f"{layer}.self_attn.indexer.{leaf}"
            for leaf in ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")
        }
        ffns = ["mlp"] if i == 0 else ["mlp.shared_experts", *(f"mlp.experts.{e}" for e in range(8))]
        names |= {f"{layer}.{ffn}.{leaf}_proj.weight" for ffn in ffns for leaf in ("gate", "up", "down")}
        if i > 0:
            names |= {f"{layer}.mlp.gate.weight", f"{layer}.mlp.gate.e_score_correction_bias"}
    assert set(load_file(sound / FILE)) == names


def test_an_experts_tensors_are_the_rows_of_the_stacked_ones(sound):
    experts = build(DeepseekV32ForCausalLM, torch.float32).model.layers[1].mlp.experts
    held = load_file(sound / FILE)
    for e in (0, 7):
        gate, up = experts.gate_up_proj[e].chunk(2)
        for leaf, expected in (("gate", gate), ("up", up), ("down", experts.down_proj[e])):
            assert torch.equal(held[f"model.layers.1.mlp.experts.{e}.{leaf}_proj.weight"], expected)


@both_models
def test_saving_and_loading_gives_the_same_model(model_class, tmp_path):
    model = build(model_class, torch.float32)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(loaded(text(L)).logits, model(text(L)).logits)


@both_models
def test_either_model_reads_what_the_other_wrote(model_class, sound):
    logits = model_class.from_pretrained(sound)(text(L)).logits
    assert_same(logits, build(model_class, torch.float32)(text(L)).logits, 0)


@both_models
def test_a_checkpoint_in_shards_is_the_same_model(model_class, shards, sound):
    files = sorted(path.name for path in shards.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((shards / INDEX).read_text())["weight_map"]
    assert set(index.values()) == set(files)
    assert index.keys() == load_file(sound / FILE).keys()
    whole, parts = (model_class.from_pretrained(path)(text(L)).logits for path in (sound, shards))
    assert torch.equal(whole, parts)


@both_models
def test_transformers_own_model_reads_our_file_and_computes_the_same(model_class, tmp_path):
    model = build(model_class, torch.float32)
    model.save_pretrained(tmp_path)
    theirs, info = UpstreamForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {kind: list(found) for kind, found in info.items() if found} == {}
    assert_same(theirs(text(L), use_cache=False).logits, model(text(L)).logits, 1e-5)


@both_models
def test_we_read_the_file_of_transformers_own_model_and_compute_the_same(model_class, tmp_path):
    theirs = UpstreamForCausalLM(upstream_config(tiny(), "sdpa")).eval()
    theirs.load_state_dict(build(DeepseekV32ForCausalLM, torch.float32).state_dict())
    theirs.save_pretrained(tmp_path)
    ours = model_class.from_pretrained(tmp_path)
    assert_same(ours(text(L)).logits, theirs(text(L), use_cache=False).logits, 1e-5)


def test_our_import_leaves_transformers_own_auto_class_alone(sound):
    assert type(AutoModelForCausalLM.from_pretrained(sound)) is UpstreamForCausalLM


@both_models
def test_an_fp64_file_is_read_in_its_dtype(model_class, tmp_path):
    model = build(model_class)
    model.save_pretrained(tmp_path)
    assert torch.equal(model_class.from_pretrained(tmp_path)(text(L)).logits, model(text(L)).logits)


@both_models
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_loading_in_bf16_keeps_the_keys_norm_and_the_router_bias_in_fp32(model_class, sound, argument):
    model = model_class.from_pretrained(sound, **{argument: torch.bfloat16})
    held = load_file(sound / FILE)
    kept = {n: t for n, t in model.state_dict().items() if t.dtype == torch.float32}
    assert set(kept) == {n for n in held if "k_norm" in n or "e_score_correction_bias" in n}
    assert len(kept) == 3 * 2 + 2
    assert all(torch.equal(tensor, held[name]) for name, tensor in kept.items())
    assert {t.dtype for n, t in model.state_dict().items() if n not in kept} == {torch.bfloat16}


@both_models
def test_a_bf16_model_survives_its_file(model_class, sound, tmp_path):
    model = model_class.from_pretrained(sound, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / FILE, "pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dictionary
    assert dtypes[EXPERT] == "BF16"
    assert dtypes["model.layers.1.mlp.gate.e_score_correction_bias"] == "F32"
    loaded = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded(text(L)).logits, model(text(L)).logits)


@both_models
def test_tied_embeddings_are_written_once_and_tied_again(model_class, tmp_path):
    model = build(model_class, torch.float32, tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / FILE)
    loaded = model_class.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(text(L)).logits, model(text(L)).logits)


@both_models
def test_tensors_of_the_mtp_layer_are_passed_over(model_class, copy):
    expected = model_class.from_pretrained(copy)(text(L)).logits
    mtp = ("enorm.weight", "eh_proj.weight", "embed_tokens.weight", "shared_head.head.weight",
           "self_attn.indexer.wk.weight", "mlp.experts.0.up_proj.weight")  # fmt: skip
    edit(copy, lambda tensors: tensors.update({f"model.layers.3.{leaf}": torch.ones(2, 2) for leaf in mtp}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, info = model_class.from_pretrained(copy, output_loading_info=True)
    assert torch.equal(model(text(L)).logits, expected)
    assert not info["unexpected_keys"]


def test_loading_info_comes_back_only_when_it_is_asked_for(sound):
    assert isinstance(DeepseekV32ForCausalLM.from_pretrained(sound), DeepseekV32ForCausalLM)
    model, info = DeepseekV32ForCausalLM.from_pretrained(sound, output_loading_info=True)
    assert isinstance(model, DeepseekV32ForCausalLM)
    assert not info["missing_keys"]


@both_models
@pytest.mark.parametrize(
    "name",
    [
        EXPERT,
        "lm_head.weight",
        "model.layers.2.self_attn.indexer.k_norm.bias",
        "model.layers.1.mlp.gate.e_score_correction_bias",
    ],
)
def test_a_missing_tensor_is_named(model_class, copy, name):
    edit(copy, lambda tensors: tensors.pop(name))
    assert_refused(copy, rf"lacks tensor '{re.escape(name)}' of shape \[", model_class)


@both_models
@pytest.mark.parametrize(
    "name",
    ["model.layers.2.self_attn.rotary.inv_freq", "model.layers.1.mlp.experts.8.up_proj.weight", "lm_head.bias",
     "model.layers.0.self_attn.indexer.q_b_proj.weight"],
)  # fmt: skip
def test_a_tensor_too_many_is_named(model_class, copy, name):
    edit(copy, lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    assert_refused(copy, f"holds tensor '{re.escape(name)}', which this model does not have", model_class)


@both_models
def test_a_renamed_tensor_is_named(model_class, copy):
    right, wrong = (f"model.layers.0.self_attn.indexer.{leaf}.weight" for leaf in ("wq_b", "q_b_proj"))
    edit(copy, lambda tensors: tensors.update({wrong: tensors.pop(right)}))
    assert_refused(copy, f"lacks tensor '{re.escape(right)}'", model_class)


@both_models
@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [(EXPERT, [64, 32], "[32, 64]"), ("model.norm.weight", [1], "[64]"), ("lm_head.weight", [319, 64], "[320, 64]")],
)
def test_a_tensor_of_another_shape_is_named(model_class, copy, name, shape, expected):
    edit(copy, lambda tensors: tensors.update({name: torch.ones(shape)}))
    sentence = f"tensor '{name}' has shape {shape}; its config asks for {expected}"
    assert_refused(copy, re.escape(sentence), model_class)


@both_models
def test_a_file_cut_within_its_tensors_names_the_first_that_is_cut(model_class, copy):
    whole = (copy / FILE).read_bytes()
    (copy / FILE).write_bytes(whole[:-1])
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    header.pop("__metadata__")
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    assert_refused(copy, rf"model.safetensors is truncated: tensor '{re.escape(last)}'", model_class)


@both_models
@pytest.mark.parametrize("left", [0, 7, 8, 1000], ids=["empty", "no length", "no header", "in its header"])
def test_a_file_cut_before_its_tensors_is_named(model_class, copy, left):
    (copy / FILE).write_bytes((copy / FILE).read_bytes()[:left])
    assert_refused(
        copy, "Checkpoint file .*model.safetensors (ends within its header|is not a safetensors file)", model_class
    )


@pytest.mark.parametrize(
    "header",
    [b"[1, 2]", b'{"model.norm.weight": 3}', b'{"model.norm.weight": {"dtype": "F32", "shape": [64]}}', b"{" * 8],
    ids=["a list", "a number for a tensor", "no offsets", "no JSON"],
)
def test_a_file_with_a_damaged_header_is_named(copy, header):
    (copy / FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(256))
    assert_refused(copy, "Checkpoint file .*model.safetensors")


def test_a_directory_without_weights_names_the_file_it_wants(copy):
    (copy / FILE).unlink()
    assert_refused(copy, "Checkpoint file .*model.safetensors is missing")


@both_models
def test_a_missing_shard_is_named(model_class, shards_copy):
    gone = sorted(shards_copy.glob("*.safetensors"))[1]
    gone.unlink()
    assert_refused(shards_copy, f"Checkpoint file .*{re.escape(gone.name)} is missing", model_class)


@both_models
def test_a_truncated_shard_is_named(model_class, shards_copy):
    cut = sorted(shards_copy.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-5])
    assert_refused(shards_copy, f"Checkpoint file .*{re.escape(cut.name)} is truncated: tensor '", model_class)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": {"lm_head.weight": 3}}'],
)
def test_a_broken_index_is_named(shards_copy, content):
    (shards_copy / INDEX).write_text(content)
    assert_refused(shards_copy, "Checkpoint index .*model.safetensors.index.json")


def test_an_index_that_lacks_a_tensor_is_refused_by_its_name(shards_copy):
    index = json.loads((shards_copy / INDEX).read_text())
    index["weight_map"].pop(EXPERT)
    (shards_copy / INDEX).write_text(json.dumps(index))
    assert_refused(shards_copy, f"holds tensor '{re.escape(EXPERT)}', but the index does not name it")


def test_an_index_that_places_a_tensor_in_the_wrong_file_is_refused_by_its_name(shards_copy):
    index = json.loads((shards_copy / INDEX).read_text())
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][EXPERT])
    index["weight_map"][EXPERT] = other
    (shards_copy / INDEX).write_text(json.dumps(index))
    assert_refused(shards_copy, f"places tensor '{re.escape(EXPERT)}' in {re.escape(other)}, which does not hold it")


@both_models
def test_a_directory_without_a_config_says_so(model_class, copy):
    (copy / "config.json").unlink()
    assert_refused(copy, "is not a checkpoint: it has no config.json", model_class)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_config_file_that_is_no_json_object_is_named(copy, content):
    (copy / "config.json").write_text(content)
    assert_refused(copy, "config.json")


def test_a_config_file_with_an_unknown_field_names_the_field(copy):
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**content, "use_sparse_atention": False}))
    assert_refused(copy, "Unknown config field 'use_sparse_atention'; did you mean 'use_sparse_attention'")


def test_a_given_config_serves_a_directory_without_one(copy):
    (copy / "config.json").unlink()
    assert DeepseekV32ForCausalLM.from_pretrained(copy, config=tiny()).config.hidden_size == 64


def test_a_given_config_of_other_sizes_is_refused_by_a_tensors_name(sound):
    assert_refused(sound, r"has shape \[320, 64\]; its config asks for \[320, 128\]", config=tiny(hidden_size=128))


def test_fields_of_the_config_can_be_given_beside_a_checkpoint(sound):
    model = DeepseekV32ForCausalLM.from_pretrained(sound, use_sparse_attention=False)
    assert model.config.use_sparse_attention is False


def test_a_config_of_another_class_is_refused():
    with pytest.raises(ValueError, match="config is a transformers.*; it must be a reference.DeepseekV32Config"):
        DeepseekV32ForCausalLM(upstream_config(tiny(), "sdpa"))


def test_a_path_that_does_not_exist_is_named():
    with pytest.raises((ValueError, OSError), match="no-such-directory"):
        DeepseekV32ForCausalLM.from_pretrained("./no-such-directory", local_files_only=True)


def test_the_checked_config_is_the_one_in_the_directory(sound):
    config = DeepseekV32Config.from_pretrained(sound)
    assert config.to_dict() | {"dtype": None, "architectures": None} == tiny().to_dict() | {
        "dtype": None, "architectures": None, "_name_or_path": config.to_dict().get("_name_or_path"),
    }  # fmt: skip
