"""Official checkpoints in FP8: loaded as numpy reads them, saved again, and what is said about it.

The files come from suites/checkpoints/official.py, which shares no code with the loader.
"""

import json
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

import optimized
import reference
from reference.fp8_blocks import quantize_blocks
from suites.checkpoints import official
from suites.support import both_models, text

L = 40
PACKAGES = {"reference": reference, "optimized": optimized}
both_packages = pytest.mark.parametrize("package", list(PACKAGES.values()), ids=list(PACKAGES))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints by name, with the fp32 numbers that they mean."""
    root = tmp_path_factory.mktemp("official")
    made = {
        "fp8": official.official_tensors(),
        "any scale": official.official_tensors(power_of_two=False),
        "bf16": official.official_tensors(fp8=False),
    }
    return {
        name: SimpleNamespace(path=official.write_checkpoint(root / name, tensors), true=official.true_values(tensors))
        for name, tensors in made.items()
    }


def by_official_name(model):
    """The model's tensors as files name them."""
    found = {}
    for name, tensor in model.state_dict().items():
        prefix, _, leaf = name.rpartition(".")
        if not prefix.endswith(".experts"):
            found[name] = tensor
            continue
        for e, stack in enumerate(tensor):
            if leaf == "down_proj":
                found[f"{prefix}.{e}.down_proj.weight"] = stack
            else:
                found[f"{prefix}.{e}.gate_proj.weight"], found[f"{prefix}.{e}.up_proj.weight"] = stack.chunk(2)
    return found


def differing(model, true):
    """Names of the tensors whose numbers are not `true`, rounded to the model's dtype by numpy."""
    found = by_official_name(model)
    assert found.keys() == true.keys()
    wrong = set()
    for name, tensor in found.items():
        if tensor.dtype == torch.bfloat16:
            same = np.array_equal(tensor.view(torch.uint16).numpy(), official.to_bf16(true[name]))
        else:
            same = np.array_equal(tensor.double().numpy(), true[name].astype(np.float64))
        wrong |= set() if same else {name}
    return wrong


def sentences(caplog, word):
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


def test_the_written_checkpoint_has_every_ragged_case(written):
    shapes = {w.shape for n, w in written["fp8"].true.items() if n.split(".")[-2] in official.QUANTISED}
    rests = {(rows % 128 == 0, columns % 128 == 0) for rows, columns in shapes}
    assert (False, False) in rests and (False, True) in rests
    assert any(rows < 128 for rows, _ in shapes) and any(rows > 128 and rows % 128 for rows, _ in shapes)
    index = json.loads((written["fp8"].path / "model.safetensors.index.json").read_text())["weight_map"]
    scales = [n for n in index if n.endswith("_scale_inv")]
    # Some scale lies in another shard than its weight.
    assert any(index[n] != index[n.removesuffix("_scale_inv")] for n in scales)


@both_models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_number_is_the_one_that_numpy_reads(model_class, dtype, written):
    model = model_class.from_pretrained(written["fp8"].path, dtype=dtype)
    assert differing(model, written["fp8"].true) == set()
    assert not hasattr(model.config, "quantization_config")


@both_models
def test_without_a_dtype_the_configs_is_taken(model_class, written):
    model = model_class.from_pretrained(written["fp8"].path)
    kept = {n: t.dtype for n, t in model.state_dict().items() if t.dtype != torch.bfloat16}
    assert set(kept.values()) == {torch.float32}
    assert all("k_norm" in n or "e_score_correction_bias" in n for n in kept)
    assert len(kept) == 3 * 2 + 2


@pytest.mark.parametrize("damage", ["a scale", "a payload", "experts in another order", "gate and up exchanged"])
def test_a_wrong_number_anywhere_would_be_seen(written, damage, tmp_path):
    tensors = official.official_tensors()
    names = {
        "a scale": "model.layers.2.mlp.experts.7.up_proj.weight_scale_inv",
        "a payload": "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    }
    if damage in names:
        values = tensors[names[damage]].values().copy()
        values.flat[-1] = values.flat[-1] * 2 if damage == "a scale" else values.flat[-1] ^ 1
        tensors[names[damage]] = official.Raw.of(tensors[names[damage]].dtype, values)
    else:
        pairs = {
            "experts in another order": ("1.gate_proj", "2.gate_proj"),
            "gate and up exchanged": ("1.gate_proj", "1.up_proj"),
        }
        for ending in (".weight", ".weight_scale_inv"):
            one, other = (f"model.layers.1.mlp.experts.{leaf}{ending}" for leaf in pairs[damage])
            tensors[one], tensors[other] = tensors[other], tensors[one]
    official.write_checkpoint(tmp_path, tensors)
    model = reference.DeepseekV32ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert 1 <= len(differing(model, written["fp8"].true)) <= 2


def test_both_models_compute_the_same_from_it(written):
    logits = [
        package.DeepseekV32ForCausalLM.from_pretrained(written["fp8"].path, dtype=torch.float64)(text(L)).logits
        for package in PACKAGES.values()
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-10)


@both_packages
@pytest.mark.parametrize(("first", "then"), [("fp8", "fp8"), ("fp8", "bf16"), ("bf16", "bf16")])
def test_loading_saving_and_loading_gives_the_same_logits(package, first, then, written, tmp_path):
    model = package.DeepseekV32ForCausalLM.from_pretrained(written[first].path)
    saved = package.save_official(model, tmp_path / "again", then, shard_size="200KB")
    assert saved.rounded == ()
    again = package.DeepseekV32ForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(text(L)).logits, model(text(L)).logits)
    assert differing(again, written[first].true) == set()


def test_loading_saving_and_loading_tells_a_lossy_writer(written, tmp_path, monkeypatch):
    def with_large_scales(weight):
        # Eight times what is needed: the smallest payloads lose their last bits.
        payload, scale = quantize_blocks(weight)
        return (payload.float() / 8).to(torch.float8_e4m3fn), scale * 8

    model = reference.DeepseekV32ForCausalLM.from_pretrained(written["fp8"].path)
    monkeypatch.setattr("reference.saving.quantize_blocks", with_large_scales)
    assert reference.save_official(model, tmp_path / "again", "fp8").rounded
    again = reference.DeepseekV32ForCausalLM.from_pretrained(tmp_path / "again")
    assert differing(again, written["fp8"].true)


def test_saved_fp8_files_are_read_alike_by_numpy(written, tmp_path):
    model = reference.DeepseekV32ForCausalLM.from_pretrained(written["fp8"].path)
    files = reference.save_official(model, tmp_path / "again", "fp8", shard_size="200KB").files
    tensors = {}
    for file in files:
        data = (tmp_path / "again" / file).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__")
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = official.Raw(entry["dtype"], tuple(entry["shape"]), data[begin:end])
    expected = official.official_tensors(mtp=False)
    assert {n: (t.dtype, t.shape) for n, t in tensors.items()} == {n: (t.dtype, t.shape) for n, t in expected.items()}
    found = official.true_values(tensors)
    assert all(np.array_equal(found[name], true) for name, true in written["fp8"].true.items())


def test_saved_directories_have_the_published_form(written, tmp_path):
    model = reference.DeepseekV32ForCausalLM.from_pretrained(written["fp8"].path)
    saved = reference.save_official(model, tmp_path / "again", "fp8", shard_size=200_000)
    assert len(saved.files) > 5
    assert saved.files[0] == f"model-00001-of-{len(saved.files):06d}.safetensors"
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(saved.files)
    sizes = []
    for file in saved.files:
        with safe_open(tmp_path / "again" / file, "pt") as held:
            assert {n for n, f in index["weight_map"].items() if f == file} == set(held.keys())
            sizes.append(sum(held.get_tensor(n).nbytes for n in held.keys()))  # noqa: SIM118 - not a dictionary
    assert max(sizes) <= 200_000
    assert index["metadata"]["total_size"] == saved.total_bytes == sum(sizes)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"] == official.official_config()["quantization_config"]
    assert config["architectures"] == ["DeepseekV32ForCausalLM"]
    assert not list(tmp_path.glob(".*"))


@both_models
def test_save_pretrained_after_fp8_writes_bf16_experts_one_by_one(model_class, written, tmp_path):
    model = model_class.from_pretrained(written["fp8"].path)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = model_class.from_pretrained(tmp_path)
    assert differing(again, written["fp8"].true) == set()
    with safe_open(tmp_path / "model.safetensors", "pt") as held:
        assert set(held.keys()) == set(written["fp8"].true)


@both_models
def test_the_layer_behind_the_last_is_skipped_and_said_so(model_class, written, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, info = model_class.from_pretrained(written["fp8"].path, output_loading_info=True)
    behind = [n for n in official.official_tensors() if f".layers.{official.LAYERS}." in n]
    said = sentences(caplog, "skipped")
    assert len(said) == 1
    assert f"{len(behind)} tensors of layer 3 are skipped" in said[0]
    assert not info["unexpected_keys"]


def test_nothing_is_said_where_nothing_is_skipped_or_rounded(tmp_path, caplog):
    official.write_checkpoint(tmp_path, official.official_tensors(mtp=False))
    reference.DeepseekV32ForCausalLM.from_pretrained(tmp_path)
    assert sentences(caplog, "Checkpoint") == []


def test_scales_that_are_no_powers_of_two_are_exact_in_fp32(written, caplog):
    model = reference.DeepseekV32ForCausalLM.from_pretrained(written["any scale"].path, dtype=torch.float32)
    assert differing(model, written["any scale"].true) == set()
    assert sentences(caplog, "round") == []


def test_scales_that_are_no_powers_of_two_are_rounded_in_bf16_and_said_so(written, caplog):
    model = reference.DeepseekV32ForCausalLM.from_pretrained(written["any scale"].path)
    # Rounded once, from the fp32 product.
    assert differing(model, written["any scale"].true) == set()
    said = sentences(caplog, "round")
    quantised = [n for n in written["any scale"].true if n.split(".")[-2] in official.QUANTISED]
    assert len(said) == 1
    assert f"{len(quantised)} FP8 weights, {min(quantised)!r} among them" in said[0]
    assert "make bfloat16 round their products; load in float32" in said[0]


def test_saving_what_a_format_does_not_hold_says_so(written, tmp_path, caplog):
    model = reference.DeepseekV32ForCausalLM.from_pretrained(written["any scale"].path, dtype=torch.float32)
    saved = reference.save_official(model, tmp_path / "again", "bf16")
    assert set(saved.rounded) == {n for n in written["any scale"].true if n.split(".")[-2] in official.QUANTISED}
    assert f"{len(saved.rounded)} tensors, {min(saved.rounded)!r} among them" in sentences(caplog, "rounded")[0]


@both_packages
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("freeze", [True, False])
def test_loading_for_sft(package, dtype, freeze, written):
    model = package.load_model_for_sft(written["fp8"].path, freeze_indexer=freeze, dtype=dtype)
    assert type(model) is package.DeepseekV32ForCausalLM
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert {p.requires_grad for n, p in model.named_parameters() if ".indexer." in n} == {not freeze}
    assert {p.requires_grad for n, p in model.named_parameters() if ".indexer." not in n} == {True}
    with torch.enable_grad():
        model.train()(text(L), labels=text(L)).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == {
        n for n, _ in model.named_parameters() if ".indexer." in n
    }
    assert differing(model, written["fp8"].true) == set()


def test_fields_of_the_config_can_be_given_for_sft(written):
    model = reference.load_model_for_sft(written["fp8"].path, use_sparse_attention=False)
    assert model.config.use_sparse_attention is False


@both_models
def test_the_guides_dense_option_loads_fp8_with_a_changed_config(model_class, written):
    config = reference.DeepseekV32Config.from_pretrained(written["fp8"].path)
    config.use_sparse_attention = False
    model = model_class.from_pretrained(written["fp8"].path, config=config, torch_dtype=torch.bfloat16)
    assert model.config.use_sparse_attention is False
    assert differing(model, written["fp8"].true) == set()
    # The caller's config is left as it is.
    assert config.quantization_config["quant_method"] == "fp8"


def test_a_config_of_fp8_files_is_not_written_to_bf16_ones(written, tmp_path):
    config = reference.DeepseekV32Config.from_pretrained(written["fp8"].path)
    reference.save_official(reference.DeepseekV32ForCausalLM(config), tmp_path / "new", "bf16")
    assert "quantization_config" not in json.loads((tmp_path / "new" / "config.json").read_text())


@both_packages
@pytest.mark.parametrize(
    "placing",
    [
        {"device_map": "auto"},
        {"device_map": {"": "disk"}},
        {"device_map": {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu",
                        "model.layers.1": "disk", "model.layers.2": "cpu", "model.norm": "cpu", "lm_head": "disk"}},
    ],
    ids=["auto", "disk", "one layer on disk"],
)  # fmt: skip
def test_a_device_map_computes_the_same_from_fp8(package, placing, written, tmp_path):
    expected = package.DeepseekV32ForCausalLM.from_pretrained(written["fp8"].path, dtype=torch.float32)(text(L)).logits
    model = package.load_model_for_sft(
        written["fp8"].path, dtype=torch.float32, offload_folder=tmp_path / "off", **placing
    )
    assert model.model.layers[1].mlp.gate.weight.is_meta == ("disk" in str(placing))
    torch.testing.assert_close(model(text(L)).logits, expected, rtol=0, atol=1e-5)
    # And it is saved from where it lies.
    assert reference.save_official(model, tmp_path / "again", "fp8").rounded == ()
    again = reference.DeepseekV32ForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert differing(again, written["fp8"].true) == set()


@both_packages
@pytest.mark.parametrize(("dtype", "memory"), [(torch.bfloat16, "1300KB"), (torch.float32, "2600KB")])
def test_memory_that_does_not_suffice_sends_layers_to_disk(dtype, memory, package, written, tmp_path):
    model = package.DeepseekV32ForCausalLM.from_pretrained(
        written["fp8"].path, torch_dtype=dtype, device_map="auto", max_memory={"cpu": memory},
        offload_folder=tmp_path,
    )  # fmt: skip
    assert "disk" in model.hf_device_map.values()
    k_norm, seen = model.model.layers[-1].self_attn.indexer.k_norm, {}
    assert k_norm.weight.is_meta
    forward = k_norm._old_forward
    k_norm._old_forward = lambda x: seen.update(weight=k_norm.weight, bias=k_norm.bias) or forward(x)
    expected = package.DeepseekV32ForCausalLM.from_pretrained(written["fp8"].path, dtype=dtype)(text(L)).logits
    assert torch.equal(model(text(L)).logits, expected)
    # The logits alone would not show that these, which stay fp32, came back rounded: rarely does it change a selection.
    for name, tensor in seen.items():
        true = written["fp8"].true[f"model.layers.{model.config.num_hidden_layers - 1}.self_attn.indexer.k_norm.{name}"]
        assert torch.equal(tensor, torch.from_numpy(true.copy()))
    assert set(seen) == {"weight", "bias"}


def test_a_checkpoint_can_be_replaced_while_its_model_lives(written, tmp_path):
    copy = shutil.copytree(written["bf16"].path, tmp_path / "copy")
    model = reference.DeepseekV32ForCausalLM.from_pretrained(copy)
    for file in copy.glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    assert differing(model, written["bf16"].true) == set()


@pytest.mark.parametrize(
    "asked", [{"local_files_only": True}, {"revision": "0" * 40}, {}], ids=["local", "commit", "offline"]
)
def test_a_name_on_the_hub_is_read_from_its_cache(asked, written, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--deepseek-ai--DeepSeek-V3.2" / "snapshots" / ("0" * 40)
    shutil.copytree(written["fp8"].path, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    model = reference.DeepseekV32ForCausalLM.from_pretrained("deepseek-ai/DeepSeek-V3.2", cache_dir=tmp_path, **asked)
    assert differing(model, written["fp8"].true) == set()
    assert model.config.name_or_path == "deepseek-ai/DeepSeek-V3.2"
