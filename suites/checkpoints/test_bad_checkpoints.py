"""Official checkpoints that are wrong, one thing each: one sentence that names it, and nothing is loaded.

What bf16 and fp32 files can have wrong is in test_official_layout.py; here it is FP8, its scales, and what is no
checkpoint at all.
"""

import json
import re

import numpy as np
import pytest
import torch

import optimized
import reference
from suites.checkpoints import official
from suites.support import both_models

WEIGHT = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"
SCALE = f"{WEIGHT}_scale_inv"
EXPERT = "model.layers.1.mlp.experts.7.down_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound():
    """The tensors of a sound checkpoint."""
    return official.official_tensors()


def assert_refused(path, sentence, model_class=reference.DeepseekV32ForCausalLM, **kwargs):
    """`sentence` as text, in which … stands for anything."""
    with pytest.raises(ValueError, match=re.escape(sentence).replace("…", ".*")) as caught:
        model_class.from_pretrained(path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")


def with_value(raw, place, value):
    values = raw.values().copy()
    values[place] = value
    return official.Raw.of(raw.dtype, values)


DAMAGES = {
    "a missing weight": (lambda t: t.pop(WEIGHT), f"lacks tensor '{WEIGHT}' of shape [144, 192]"),
    "a missing expert": (lambda t: t.pop(EXPERT), f"lacks tensor '{EXPERT}' of shape [192, 72]"),
    "a missing scale": (lambda t: t.pop(SCALE), f"lacks scale '{SCALE}' of shape [2, 2]: its weight is stored as F8"),
    "an extra tensor": (
        lambda t: t.update({"model.layers.1.mlp.experts.8.up_proj.weight": t[EXPERT]}),
        "holds tensor 'model.layers.1.mlp.experts.8.up_proj.weight', which this model does not have",
    ),
    "an extra scale": (
        lambda t: t.update({"model.layers.1.mlp.gate.weight_scale_inv": t[SCALE]}),
        "holds scale 'model.layers.1.mlp.gate.weight_scale_inv', but its weight is stored as BF16, which has none",
    ),
    "a scale of nothing": (
        lambda t: t.update({"model.layers.1.mlp.gate_proj.weight_scale_inv": t[SCALE]}),
        "holds tensor 'model.layers.1.mlp.gate_proj.weight_scale_inv', which this model does not have",
    ),
    "a bf16 weight that keeps its scale": (
        lambda t: t.update({WEIGHT: t[WEIGHT].cast("BF16")}),
        f"holds scale '{SCALE}', but its weight is stored as BF16, which has none",
    ),
    "a weight of another shape": (
        lambda t: t.update({WEIGHT: t[WEIGHT].reshaped(144, 128)}),
        f"tensor '{WEIGHT}' has shape [144, 128]; its config asks for [144, 192]",
    ),
    "a weight of whole blocks": (
        lambda t: t.update({WEIGHT: t[WEIGHT].reshaped(256, 256)}),
        f"tensor '{WEIGHT}' has shape [256, 256]; its config asks for [144, 192]",
    ),
    "a scale without the edge blocks": (
        lambda t: t.update({SCALE: t[SCALE].reshaped(1, 1)}),
        f"scale '{SCALE}' has shape [1, 1]; a weight of shape [144, 192] has [2, 2]",
    ),
    "a scale a row": (
        lambda t: t.update({SCALE: t[SCALE].reshaped(144, 1)}),
        f"scale '{SCALE}' has shape [144, 1]; a weight of shape [144, 192] has [2, 2]",
    ),
    "a flat scale": (lambda t: t.update({SCALE: t[SCALE].reshaped(4)}), f"scale '{SCALE}' has shape [4]; a weight"),
    "a bf16 scale": (lambda t: t.update({SCALE: t[SCALE].cast("BF16")}), f"scale '{SCALE}' is stored as BF16; it must"),
    "a scale of exponents": (
        lambda t: t.update({SCALE: t[SCALE].cast("F8_E8M0")}),
        f"scale '{SCALE}' is stored as F8_E8M0; it must be F32",
    ),
    "e5m2": (
        lambda t: t.update({WEIGHT: t[WEIGHT].cast("F8_E5M2")}),
        f"tensor '{WEIGHT}' is stored as F8_E5M2; it must be one of F64, F32, F16, BF16, F8_E4M3",
    ),
    "int8": (lambda t: t.update({EXPERT: t[EXPERT].cast("I8")}), f"tensor '{EXPERT}' is stored as I8; it must be"),
    "an FP8 gate": (
        lambda t: t.update({"model.layers.1.mlp.gate.weight": t["model.layers.1.mlp.gate.weight"].cast("F8_E4M3")}),
        "tensor 'model.layers.1.mlp.gate.weight' is stored as F8_E4M3; it must be one of F64, F32, F16, BF16.",
    ),
    "an FP8 norm": (
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].cast("F8_E4M3")}),
        "tensor 'model.norm.weight' is stored as F8_E4M3; it must be one of F64, F32, F16, BF16.",
    ),
    **{
        f"a scale of {value}": (
            lambda t, value=value: t.update({SCALE: with_value(t[SCALE], (1, 0), value)}),
            f"Scale '{SCALE}' holds {value} at block [1, 0]; scales must be finite and above 0",
        )
        for value in (float("nan"), float("inf"), -float("inf"), 0.0, -1.0)
    },
    "a decoder layer too many": (
        lambda t: t.pop("model.layers.3.eh_proj.weight"),
        "holds tensor 'model.layers.3.…', which this model does not have",
    ),
}  # fmt: skip


@both_models
@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damaged_tensors_are_named(model_class, damage, sound, tmp_path):
    change, sentence = DAMAGES[damage]
    tensors = dict(sound)
    change(tensors)
    official.write_checkpoint(tmp_path, tensors, official.official_config())
    assert_refused(tmp_path, sentence, model_class)


@pytest.mark.parametrize("place", [(0, 0), (1, 1)])
def test_a_bad_scale_of_one_expert_is_found_wherever_it_is(place, sound, tmp_path):
    name = "model.layers.2.mlp.experts.5.up_proj.weight_scale_inv"
    tensors = dict(sound)
    assert tensors[name].shape == (1, 2)
    tensors[name] = with_value(tensors[name], (0, place[1]), np.nan)
    official.write_checkpoint(tmp_path, tensors)
    for placing in ({}, {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off"}):
        assert_refused(tmp_path, f"Scale '{name}' holds nan at block [0, {place[1]}]", **placing)


QUANTIZATIONS = {
    "none": (None, f"'…{'.weight'}' is stored as F8_E4M3, but its config has no quantization_config that says so"),
    "another method": ({"quant_method": "gptq"}, "quantization_config has quant_method 'gptq'; this version reads 'fp8'"),
    "other blocks": (
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        "quantization_config has weight_block_size [64, 64]; this version reads [128, 128]",
    ),
    "no blocks": ({"quant_method": "fp8"}, "quantization_config has weight_block_size None; this version reads [128, 128]"),
    "another format": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"},
        "quantization_config has fmt 'e5m2'; this version reads 'e4m3'",
    ),
    "a word": ("fp8", "quantization_config is 'fp8'; it must be an object"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(QUANTIZATIONS))
def test_a_config_that_does_not_fit_fp8_is_named(case, sound, tmp_path):
    said, sentence = QUANTIZATIONS[case]
    config = official.official_config(fp8=False) | ({} if said is None else {"quantization_config": said})
    official.write_checkpoint(tmp_path, sound, config)
    assert_refused(tmp_path, sentence)


def test_a_config_of_fewer_layers_is_refused_rather_than_the_rest_passed_over(sound, tmp_path):
    official.write_checkpoint(tmp_path, sound)
    assert_refused(tmp_path, "holds tensor 'model.layers.2.…', which this model does not have", num_hidden_layers=2)


@pytest.fixture
def directory(sound, tmp_path):
    """A sound checkpoint, for damage."""
    return official.write_checkpoint(tmp_path / "checkpoint", sound)


@both_models
def test_a_shard_that_is_gone_is_named(model_class, directory):
    (directory / "model-00003-of-000006.safetensors").unlink()
    assert_refused(directory, "Checkpoint file …model-00003-of-000006.safetensors is missing", model_class)


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_shard_that_is_cut_is_named(left, directory):
    shard = directory / "model-00003-of-000006.safetensors"
    shard.write_bytes(shard.read_bytes()[:left])
    assert_refused(directory, "Checkpoint file …model-00003-of-000006.safetensors")


def test_a_tensor_with_fewer_bytes_than_its_shape_takes_is_named(directory, sound):
    shard = directory / "model-00001-of-000006.safetensors"
    index = json.loads((directory / INDEX).read_text())["weight_map"]
    held = {name: sound[name] for name, file in index.items() if file == shard.name}
    name = next(iter(held))
    held[name] = official.Raw(held[name].dtype, held[name].shape, held[name].data[:-2])
    official.write_file(shard, held)
    assert_refused(directory, f"is damaged: tensor '{name}' has … bytes, which is not what BF16 of shape")


def test_a_shard_that_is_cut_after_it_was_checked_is_named(directory, monkeypatch):
    shard = directory / "model-00003-of-000006.safetensors"
    inspect = reference.streaming.inspect_checkpoint

    def then_cut(*args):
        checked = inspect(*args)
        shard.write_bytes(shard.read_bytes()[:-1])
        return checked

    monkeypatch.setattr("reference.streaming.inspect_checkpoint", then_cut)
    assert_refused(directory, "model-00003-of-000006.safetensors has been cut since its header was read")


def change_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def test_an_index_that_does_not_name_a_tensor_is_refused(directory):
    change_index(directory, lambda places: places.pop(SCALE))
    assert_refused(directory, f"holds tensor '{SCALE}', but the index does not name it")


def test_an_index_that_places_a_tensor_elsewhere_is_refused(directory):
    first = "model-00001-of-000006.safetensors"
    change_index(directory, lambda places: places.update({SCALE: first}))
    assert_refused(directory, f"the index places tensor '{SCALE}' in {first}, which does not hold it")


def test_a_tensor_in_two_shards_is_refused(directory, sound):
    index = json.loads((directory / INDEX).read_text())["weight_map"]
    first = "model-00001-of-000006.safetensors"
    held = {name: sound[name] for name, file in index.items() if file == first}
    official.write_file(directory / first, {**held, SCALE: sound[SCALE]})
    assert_refused(directory, f"{first} holds tensor '{SCALE}', but the index places it in {index[SCALE]}")


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/etc/passwd", "pytorch_model.bin", "sub/a.safetensors"])
def test_an_index_that_leads_elsewhere_is_refused(place, directory):
    change_index(directory, lambda places: places.update({SCALE: place}))
    assert_refused(directory, f"places tensor '{SCALE}' in '{place}'; it must be a .safetensors file beside the index")


def test_an_index_that_is_gone_is_named(directory):
    (directory / INDEX).unlink()
    assert_refused(directory, "holds model-00001-of-000006.safetensors, but neither …: the index is missing")


def test_a_file_beside_an_index_is_refused(directory, sound):
    official.write_file(directory / "model.safetensors", sound)
    assert_refused(directory, "holds model.safetensors and model.safetensors.index.json: one of the two is left over")


def test_a_checkpoint_in_a_part_for_each_rank_is_refused(directory):
    (directory / "shard-00000-model-00001-of-00001.safetensors").write_bytes(b"")
    assert_refused(directory, "is a distributed one, in a part for each rank")


class Bomb:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was read')",))


@both_models
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "weights.pkl"])
def test_a_pickle_is_named_and_never_read(model_class, name, directory):
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    torch.save(Bomb(), directory / name)
    sentence = f"holds {name}, which is a pickle and never read: convert it to safetensors first"
    assert_refused(directory, sentence, model_class)
    assert_refused(
        directory, "use_safetensors is False; this model reads safetensors", model_class, use_safetensors=False
    )


@both_models
def test_a_pickle_beside_safetensors_is_never_read(model_class, directory):
    torch.save(Bomb(), directory / "pytorch_model.bin")
    model_class.from_pretrained(directory)
    assert_refused(
        directory, "use_safetensors is False; this model reads safetensors", model_class, use_safetensors=False
    )


@both_models
def test_code_beside_a_checkpoint_is_never_run(model_class, directory, caplog):
    config = official.official_config(auto_map={"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.C"})
    (directory / "config.json").write_text(json.dumps(config))
    for file in ("modeling.py", "custom_generate/generate.py"):
        (directory / file).parent.mkdir(exist_ok=True)
        (directory / file).write_text("raise SystemExit('code was run')")
    assert_refused(directory, "trust_remote_code is True; this model reads", model_class, trust_remote_code=True)
    model = model_class.from_pretrained(directory)
    assert type(model) is model_class
    assert "its config names code to run (auto_map), which is not run." in caplog.text
    reference.save_official(model, directory / "again")
    assert "auto_map" not in json.loads((directory / "again" / "config.json").read_text())


@pytest.mark.parametrize(
    ("argument", "value"), [("gguf_file", "model.gguf"), ("variant", "fp16"), ("use_safetensors", False)]
)
def test_an_argument_that_would_read_something_else_is_named(argument, value, directory):
    sentence = f"{argument} is {value!r}; this model reads safetensors in the official layout and nothing else"
    assert_refused(directory, sentence, **{argument: value})


def test_buffers_on_the_disk_are_refused(directory, tmp_path):
    how = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off"}
    assert_refused(directory, "offload_buffers is True; it must be False", **how, offload_buffers=True)
    assert (
        reference.DeepseekV32ForCausalLM.from_pretrained(directory, **how, offload_buffers=False).device.type == "meta"
    )


@pytest.mark.parametrize("load", [reference.load_model_for_sft, optimized.load_model_for_sft])
def test_what_is_no_checkpoint_is_named(load, directory, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, sentence in (
        (empty, "is not a checkpoint: it has no config.json"),
        (directory / "config.json", "config.json is a file; a checkpoint is the directory"),
        (tmp_path / "none", "none' is not a directory, nor a name that a model on the hub can have."),
        ("./none", "'./none' is not a directory, nor a name that a model on the hub can have."),
        ("someone/none", "'someone/none' is not a directory, nor a model that the hub gives: "),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
            load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float8_e4m3fn, torch.int8, None])
def test_a_dtype_that_no_model_trains_in_is_named(dtype, directory):
    with pytest.raises(ValueError, match="dtype is .*; it must be torch.bfloat16, float16, float32 or float64"):
        reference.load_model_for_sft(directory, dtype=dtype)


def test_an_unknown_argument_is_not_passed_over(directory):
    with pytest.raises(TypeError, match="use_sparse_atention"):
        reference.DeepseekV32ForCausalLM.from_pretrained(directory, use_sparse_atention=False)


def test_what_cannot_be_saved_is_named(directory, tmp_path):
    model = reference.DeepseekV32ForCausalLM.from_pretrained(directory)
    for path, arguments, sentence in (
        (directory, {}, "already holds something; give a directory that is new or empty"),
        (directory / "config.json", {}, "already holds something"),
        (tmp_path / "x", {"format": "int8"}, "format is 'int8'; it must be 'bf16' or 'fp8'"),
        (tmp_path / "x", {"shard_size": "many"}, "shard_size is 'many'; it must be a number of bytes"),
        (tmp_path / "x", {"shard_size": 0}, "shard_size is 0; it must be at least 1 byte"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            reference.save_official(model, path, **arguments)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[7, 3, 3] = float("nan")
    with pytest.raises(ValueError, match=re.escape(f"Tensor '{EXPERT}' holds NaN or an infinity")):
        reference.save_official(model, tmp_path / "x", "fp8")
    # What is not complete is not there.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_a_model_with_adapters_is_not_saved(directory, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = reference.load_model_for_sft(directory)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["o_proj"]))
    for unmerged in (adapted, adapted.get_base_model()):
        with pytest.raises(ValueError, match="merge"):
            reference.save_official(unmerged, tmp_path / "x")
    reference.save_official(adapted.merge_and_unload(), tmp_path / "x")
