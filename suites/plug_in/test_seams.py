"""The way in and the way out: what transformers holds while the plug-in is in, and bit for bit what it held before."""

import copy
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v32 import modeling_deepseek_v32
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa
from transformers.monkey_patching import (
    clear_patch_mapping,
    get_patch_mapping,
    register_patch_mapping,
    unregister_patch_mapping,
)

import optimized
from harness.text import text_batch
from optimized.plug_in import TESTED_VERSIONS, deepseek_v32, glm_moe_dsa, registry
from optimized.plug_in.registry import check_version
from suites.plug_in.pairs import FAMILIES, built, config_of, construct, weights_of

ROOT = Path(__file__).resolve().parents[2]
MODELING = (modeling_deepseek_v32, modeling_glm_moe_dsa)
families = pytest.mark.parametrize("family", list(FAMILIES))
two_families = pytest.mark.parametrize("family", ["deepseek", "glm"])


def state_of_transformers():
    """Everything of transformers that the plug-in may touch, by name."""
    found = {("patches", name): cls for name, cls in get_patch_mapping().items()}
    for module in list(sys.modules.values()):
        name = getattr(module, "__name__", "")
        if not name.startswith("transformers"):
            continue
        for key, value in list(vars(module).items()):
            if "DeepseekV32" in key or "GlmMoeDsa" in key or key == "__dir__":
                found[name, key] = value
    for modeling in MODELING:
        for key, cls in vars(modeling).items():
            if isinstance(cls, type) and cls.__module__ == modeling.__name__:
                found |= {(key, attribute): value for attribute, value in vars(cls).items()}
                recorded = vars(cls).get("_can_record_outputs", {})
                found |= {(key, "recorded", output): target for output, target in recorded.items()}
    return found


def changed_entries(before, after):
    """Names whose value is another object now.

    Not counted: what transformers remembers of its own sources, and lazy names that it has looked up meanwhile.
    """
    names = {name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)}
    looked_up = {n for n in names - before.keys() if getattr(after[n], "__module__", "").startswith("transformers.")}
    return {name for name in names - looked_up if not str(name[-1]).endswith("_cached_value")}


def test_nothing_is_left_behind():
    before = state_of_transformers()
    plug = optimized.plug_into_transformers()
    for family in FAMILIES:
        AutoModelForCausalLM.from_config(config_of(family))
        construct(family)(config_of(family))
    inside = state_of_transformers()
    plug.unplug()
    assert changed_entries(before, state_of_transformers()) == set()
    # The comparison sees both seams.
    seen = changed_entries(before, inside)
    assert {name for where, name in seen if where == "patches"} == {*deepseek_v32.PARTS, *glm_moe_dsa.PARTS}
    assert {where for where, name in seen if name == "__init__"} == {
        *FAMILIES.values(), "DeepseekV32Model", "GlmMoeDsaModel",
    }  # fmt: skip


def test_a_name_that_is_looked_up_inside_is_the_original_afterwards():
    """transformers' lazy modules remember what they find, and there may be several of its top-level module."""
    program = """
import transformers
import optimized
with optimized.plug_into_transformers():
    inside = transformers.DeepseekV32ForCausalLM
import transformers as again
assert inside is transformers.DeepseekV32ForCausalLM is again.DeepseekV32ForCausalLM
assert inside.__module__.startswith("transformers."), inside.__module__
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)


@families
def test_a_model_is_what_it_was_built_as(family):
    ids = text_batch(2, 40, 1)
    before = built(family, plugged=False)
    with torch.no_grad():
        expected = before(ids).logits
        with optimized.plug_into_transformers():
            assert torch.equal(before(ids).logits, expected)
            inside = construct(family)(config_of(family)).eval()
            inside.load_state_dict(weights_of(family))
            ours = inside(ids).logits
        assert torch.equal(inside(ids).logits, ours)
        assert inside(ids, output_indexer_kl_loss=True).indexer_kl_loss > 0
        assert torch.equal(before(ids).logits, expected)
        assert torch.equal(built(family, plugged=False)(ids).logits, expected)
    assert not torch.equal(ours, expected)
    assert type(before) is type(built(family, plugged=False)) is not type(inside)


@two_families
def test_attentions_are_recorded_as_before(family):
    """Loading under a patch mapping rewrites the table of recorded outputs of the class that all models share."""
    config = config_of(family)
    config._attn_implementation = "eager"
    ids = text_batch(1, 20, 1)

    class Mine(construct(family)):
        pass

    with optimized.plug_into_transformers():
        Mine._from_config(config_of(family))
    out = construct(family)(copy.deepcopy(config))(ids, output_attentions=True)
    assert [a.shape for a in out.attentions] == [(1, 4, 20, 20)] * 3


@two_families
def test_classes_imported_before_build_ours(family):
    held = construct(family)
    backbone = getattr(transformers, FAMILIES[family].replace("ForCausalLM", "Model"))
    with optimized.plug_into_transformers():
        model, bare = held(config_of(family)), backbone(config_of(family))
        assert isinstance(model, held)
        assert type(model) is type(built(family, plugged=True))
        assert type(bare) is type(model.model)
        assert type(held._from_config(config_of(family))) is type(model)
    assert type(held(config_of(family))) is held
    assert type(model) is not held


@two_families
def test_names_parameters_and_plans_stay_theirs(family):
    theirs, ours = built(family, plugged=False), built(family, plugged=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [type(m).__name__ for m in ours.modules() if "Wide" not in type(m).__name__] == [
        type(m).__name__
        for a, m in zip(ours.modules(), theirs.modules(), strict=True)
        if "Wide" not in type(a).__name__
    ]
    for plan in ("tp_plan", "ep_plan", "pp_plan"):
        assert getattr(ours, plan, None) == getattr(theirs, plan, None)
    assert ours._no_split_modules == theirs._no_split_modules
    assert ours.config._experts_implementation == theirs.config._experts_implementation
    ours.set_experts_implementation("eager")
    assert ours.config._experts_implementation == "eager"


@two_families
def test_checkpoints_travel_both_ways(family, tmp_path):
    ids = text_batch(1, 40, 1)
    theirs, ours = built(family, plugged=False), built(family, plugged=True)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    plain = construct(family).from_pretrained(tmp_path / "ours").eval()
    with optimized.plug_into_transformers():
        plugged = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert type(plain) is type(theirs)
    assert type(plugged) is type(ours)
    assert plain.config.architectures == [FAMILIES[family]] == plugged.config.architectures
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, theirs(ids).logits)
        assert torch.equal(plugged(ids).logits, ours(ids).logits)


@two_families
def test_a_model_that_is_read_in_bf16_keeps_its_key_norm_in_fp32(family, tmp_path):
    theirs = built(family, plugged=False)
    theirs.save_pretrained(tmp_path)
    with optimized.plug_into_transformers():
        plugged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    plain = construct(family).from_pretrained(tmp_path, dtype=torch.bfloat16)
    true, kept, rounded = (model.model.layers[0].self_attn.indexer.k_norm for model in (theirs, plugged, plain))
    for name in ("weight", "bias"):
        assert torch.equal(getattr(kept, name), getattr(true, name))
        # transformers' own rounds it: docs/findings-transformers.md, 18.
        assert torch.equal(getattr(rounded, name), getattr(true, name).bfloat16())
    assert plugged.dtype == torch.bfloat16
    assert torch.equal(plugged.to(torch.float16).model.layers[0].self_attn.indexer.k_norm.weight, true.weight)


def test_our_classes_build_nothing_while_the_plug_in_is_out():
    for cls in (deepseek_v32.DeepseekV32Model, deepseek_v32.DeepseekV32ForCausalLM):
        with pytest.raises(RuntimeError, match="which is not in: its parts would be transformers' own"):
            cls(config_of("deepseek"))


def test_a_mapping_that_somebody_cleared_is_no_obstacle():
    before = state_of_transformers()
    with optimized.plug_into_transformers():
        clear_patch_mapping()
    assert changed_entries(before, state_of_transformers()) == set()


def test_calls_nest_and_the_last_one_restores():
    def plugged_in():
        return type(construct("deepseek")(config_of("deepseek"))) is deepseek_v32.DeepseekV32ForCausalLM

    before = state_of_transformers()
    outer = optimized.plug_into_transformers()
    with optimized.plug_into_transformers() as inner:
        assert plugged_in()
    assert plugged_in()
    inner.unplug()
    assert plugged_in()
    outer.unplug()
    assert not plugged_in()
    outer.unplug()
    assert changed_entries(before, state_of_transformers()) == set()


def test_an_error_inside_restores_as_well():
    before = state_of_transformers()
    config = config_of("deepseek")
    config.hidden_size = -1
    for build in (AutoModelForCausalLM.from_config, construct("deepseek")):
        with pytest.raises(RuntimeError), optimized.plug_into_transformers():
            build(config)
    assert changed_entries(before, state_of_transformers()) == set()


def test_a_patch_of_somebody_else_is_refused_and_kept():
    register_patch_mapping({"GlmMoeDsaAttention": torch.nn.Linear})
    try:
        before = state_of_transformers()
        with pytest.raises(ValueError, match="entry of somebody else for GlmMoeDsaAttention"):
            optimized.plug_into_transformers()
        assert changed_entries(before, state_of_transformers()) == set()
    finally:
        unregister_patch_mapping(["GlmMoeDsaAttention"])
    with optimized.plug_into_transformers():
        pass


@pytest.mark.parametrize("version", ["5.16.4", "5.24.0", "5.23.0.dev0", "4.57.1", "6.0.0"])
def test_other_versions_are_refused(version, monkeypatch):
    monkeypatch.setattr(registry.transformers, "__version__", version)
    before = state_of_transformers()
    sentence = rf"transformers is {re.escape(version)}, but plug_into_transformers is tested on releases 5.17 to 5.23"
    with pytest.raises(RuntimeError, match=sentence):
        optimized.plug_into_transformers()
    assert changed_entries(before, state_of_transformers()) == set()


def test_the_tested_versions_are_those_of_the_project():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    asked = next(r for r in map(Requirement, pyproject["project"]["dependencies"]) if r.name == "transformers")
    lowest, highest = TESTED_VERSIONS
    assert f">={lowest[0]}.{lowest[1]}" in str(asked.specifier)
    pinned = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned
    assert Version(pinned[1]).release[:2] == highest
    for edge in TESTED_VERSIONS:
        check_version(".".join(map(str, (*edge, 1))))
