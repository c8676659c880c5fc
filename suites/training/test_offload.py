"""accelerate's device maps: a model whose weights lie on the CPU or on disk until they are needed.

Weights then arrive with a module's forward, and only with that: who reads a parameter from outside finds nothing.

Letters: L tokens.
"""

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model

from suites.support import SEED, assert_same, both_models, both_modes, build, text

L = 40
# fp32 weights come back from a file bit for bit, and the same operations follow.
SAME = 0.0


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved(model_class, dtype=torch.float32, **overrides):
    model = build(model_class, dtype, **overrides)
    model.save_pretrained("checkpoint")
    return model


def auto(model_class, megabytes, **kwargs):
    """What `device_map="auto"` makes of a machine with that little memory: the rest of the model lies on disk."""
    return model_class.from_pretrained(
        "checkpoint", device_map="auto", max_memory={"cpu": f"{megabytes}MB"}, offload_folder="offload", **kwargs
    )


def asked(model, **kwargs):
    with torch.no_grad():
        out = model(text(L), output_indexer_kl_loss=True, output_indexer_scores="visible", **kwargs)
    return out.logits, out.indexer_kl_loss, *out.indexer_scores


def assert_same_answers(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b, SAME)


def on_meta(model):
    return {n for n, p in model.named_parameters() if p.is_meta}


@both_models
@both_modes
def test_an_automatic_map_leaves_the_rest_on_disk_and_computes_the_same(model_class, sparse):
    whole = saved(model_class, use_sparse_attention=sparse)
    model = auto(model_class, 0.75)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    # A layer lies in one place as a whole.
    assert all(name.count(".") <= 2 for name in model.hf_device_map)
    offloaded = on_meta(model)
    assert any("experts" in name for name in offloaded)
    assert offloaded < {n for n, _ in model.named_parameters()}
    assert_same_answers(asked(model), asked(whole))
    # Nothing stays behind.
    assert on_meta(model) == offloaded


@both_models
@both_modes
def test_a_map_that_offloads_everything_to_disk_computes_the_same(model_class, sparse):
    whole = saved(model_class, use_sparse_attention=sparse)
    model = model_class.from_pretrained("checkpoint", device_map={"": "disk"}, offload_folder="offload")
    assert len(on_meta(model)) == len(list(model.named_parameters()))
    assert_same_answers(asked(model), asked(whole))


@both_models
@both_modes
def test_a_bf16_model_that_is_offloaded_to_the_cpu_computes_the_same(model_class, sparse):
    saved(model_class, use_sparse_attention=sparse)
    model = model_class.from_pretrained("checkpoint", dtype=torch.bfloat16)
    expected = asked(model)
    offloaded = cpu_offload(model, torch.device("cpu"))
    assert on_meta(offloaded)
    assert_same_answers(asked(offloaded), expected)


@both_models
def test_an_offloaded_model_generates_the_same(model_class):
    whole = saved(model_class)
    model = auto(model_class, 0.75)
    prompt = text(24, batch=2)
    settings = {"input_ids": prompt, "max_new_tokens": 8, "do_sample": False}
    assert model.generate(**settings).tolist() == whole.generate(**settings).tolist()


@both_models
def test_an_offloaded_weight_that_is_another_would_be_seen(model_class):
    whole = saved(model_class)
    expected = asked(whole)
    with torch.no_grad():
        whole.model.layers[2].self_attn.kv_b_proj.weight[0, 0] += 0.01
    whole.save_pretrained("checkpoint")
    with pytest.raises(AssertionError):
        assert_same_answers(asked(auto(model_class, 0.75)), expected)


@both_models
def test_an_adapter_is_offloaded_with_its_model(model_class):
    # Adapters of stacked experts are not: PEFT reads the stack before accelerate has brought it, and raises.
    config = LoraConfig(r=4, target_modules=["q_b_proj", "kv_b_proj", "o_proj", "indexer.wq_b"], lora_dropout=0.0)
    adapted = get_peft_model(build(model_class, torch.float32), config)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    expected = asked(adapted)
    offloaded = cpu_offload(adapted, torch.device("cpu"))
    assert len(on_meta(offloaded)) > 50
    assert_same_answers(asked(offloaded), expected)
