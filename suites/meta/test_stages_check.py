"""The check of stages: a bug shows in the layer and stage where it sits, and nowhere after it that it does not concern."""

import pytest
import torch

from harness.cases import build_case
from harness.checks.choices import layout_of
from harness.checks.stages import turned_since_the_start
from harness.replayed import IN_LAYERS, POINTS, Point
from harness.runner import Oracles, run
from harness.subjects import ALL, Subject, resolve_subject
from reference import DeepseekV32Config
from reference.rope import RotaryTable
from reports.records import Run, Status
from reports.stages import first_beyond, stage_errors
from suites.meta.test_verify import ROOT, Silent, plan_of

GAIN = 1.04
# Where each bug of the catalogue sits: layer, None outside the layers, and stage.
PLACES = {
    "A01-interleaved-indexer-rope": (0, "RoPE"),
    "A02-interleaved-rope-of-queries": (0, "RoPE"),
    "A03-interleaved-rope-of-keys": (0, "RoPE"),
    "A08-rope-lanes-at-the-end": (0, "RoPE"),
    "A09-k-norm-without-bias": (0, "projection"),
    "A11-unnormalised-query-latent": (0, "projection"),
    "A14-head-weights-in-bfloat16": (0, "index scores"),
    "A15-no-relu": (0, "index scores"),
    "A17-no-head-dim-scale": (0, "index scores"),
    "B12-off-by-one-k": (0, "selection"),
    "B20-sink-always-kept": (0, "selection"),
    "D10-reversed-kl": (None, "loss"),
    "E01-no-mscale-in-the-softmax-scale": (0, "attention"),
    "E03-inflated-rotation": (0, "RoPE"),
    "E04-weights-from-biased-scores": (1, "MoE"),
    # On these weights a 0 changes no choice of layer 1.
    "E05-dropped-groups-masked-with-0": (2, "MoE"),
    "E09-norm-eps-of-another-model": (0, "projection"),
    "half-split-rope-in-mla": (0, "RoPE"),
    "rope-keys-not-turned": (0, "RoPE"),
    "gate-and-up-swapped": (1, "MoE"),
    "layer-skipped": (1, "attention"),
    "no-final-norm": (None, "loss"),
    "residual-of-the-normed-input": (0, "MoE"),
    "wrong-eps-of-k-norm": (0, "projection"),
}
# Every MoE layer has the bug; which of them has a token that meets it depends on how torch's version breaks a tie.
EITHER = {"E05-dropped-groups-masked-with-0": {1, 2}}
# What must stay within its budget, as everything does that is not named here: the stages that a bug leaves alone.
ALONE = {
    "A01-interleaved-indexer-rope": {"projection", "index scores", "attention", "MoE"},
    "A15-no-relu": {"projection", "attention", "MoE"},
    "B12-off-by-one-k": {"projection", "RoPE", "index scores", "attention", "MoE", "loss"},
    "E01-no-mscale-in-the-softmax-scale": {"projection", "index scores", "selection", "MoE"},
    "gate-and-up-swapped": {"projection", "RoPE", "index scores", "selection", "attention", "loss"},
    "layer-skipped": {"projection", "RoPE", "index scores", "selection", "MoE", "loss"},
}


@pytest.fixture(scope="module")
def oracles():
    return Oracles()


def verdict_on(subject, oracles=None, dtype="float32", case="text"):
    plan = plan_of(subject, checks=["parity.stages"], cases=(case,), batch=2, dtypes=(dtype,))
    (verdict,) = run(plan, Silent(), oracles)
    return verdict


def errors_in(verdict):
    return stage_errors(Run(header={}, verdicts=(verdict,)))


def place(verdict):
    found = first_beyond(errors_in(verdict))
    return found and (found.layer, found.stage)


def beyond(verdict):
    return {(error.layer, error.stage) for error in errors_in(verdict) if not error.used <= 1}


@pytest.mark.parametrize("name", PLACES)
def test_the_first_stage_beyond_its_budget_is_where_the_bug_sits(name, oracles):
    verdict = verdict_on(resolve_subject(f"mutant:{name}"), oracles)
    assert verdict.status is Status.FAILED
    layer, stage = place(verdict)
    assert stage == PLACES[name][1]
    assert layer in EITHER.get(name, {PLACES[name][0]})
    where = f"{stage} of layer {layer}" if layer is not None else stage
    assert verdict.reason.startswith(f"the first stage beyond its budget is {where}: ")
    assert not {stage for _, stage in beyond(verdict)} & ALONE.get(name, set())


@pytest.mark.parametrize("name", ["A01-interleaved-indexer-rope", "E04-weights-from-biased-scores", "A15-no-relu"])
def test_the_place_is_found_in_bfloat16_and_in_packed_rows_too(name, oracles):
    verdict = verdict_on(resolve_subject(f"mutant:{name}"), oracles, "bfloat16", "packed")
    assert place(verdict) == PLACES[name]


def changed_reference(change):
    """The reference, as it is after `change(model)`."""

    def factory(config, state_dict, *, device, dtype):
        model = resolve_subject("reference").factory(config, state_dict, device=device, dtype=dtype)
        return change(model) or model

    return Subject("changed", factory, ALL, "test_stages_check.py:changed")


def planted(point, layer):
    """A gain at `point` of one layer, seen by all that comes after it."""

    def larger(own):
        return (own[0] * GAIN, *own[1:]) if isinstance(own, tuple) else own * GAIN

    def change(model):
        module = model.get_submodule(f"model.layers.{layer}.{point.path}".rstrip("."))
        if point.before:
            module.register_forward_pre_hook(lambda _, args: larger(args))
        else:
            module.register_forward_hook(lambda _, __, own: larger(own))

    return changed_reference(change)


@pytest.mark.parametrize("point", IN_LAYERS, ids=lambda point: point.name)
def test_a_gain_planted_anywhere_in_a_layer_shows_there_and_in_no_other_stage(point: Point, oracles):
    verdict = verdict_on(planted(point, 1), oracles)
    assert verdict.status is Status.FAILED
    # Heads' outputs are judged with their rotation too, which is RoPE's only when they are right without it.
    assert beyond(verdict) == {(1, point.stage)}
    assert f": {point.name}, " in verdict.reason


def test_transformers_shows_no_scores_and_no_kl_loss_which_is_said_by_name(oracles):
    verdict = verdict_on(resolve_subject("transformers"), oracles)
    assert verdict.status is Status.VERIFIED, verdict.reason
    assert [text.split(" (")[0] for text in verdict.data["left_out"]] == ["index scores", "kl loss"]
    assert verdict.reason.startswith("left out: index scores (forward takes no output_indexer_scores); ")
    stages = {entry["stage"] for entry in verdict.data["stages"]}
    assert stages == {"projection", "RoPE", "selection", "attention", "MoE", "loss"}


def without_scores(model):
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)


def test_without_scores_keys_tell_the_indexer_s_rotation(oracles):
    wrong = resolve_subject("mutant:A01-interleaved-indexer-rope")

    def factory(*args, **kwargs):
        model = wrong.factory(*args, **kwargs)
        without_scores(model)
        return model

    verdict = verdict_on(Subject("mute", factory, wrong.capabilities, "mute"), oracles)
    assert place(verdict) == (0, "RoPE")
    assert "keys, wrong keys" in verdict.reason


def unregistered(path):
    """Calls the module at `path` past its hooks, as a fused implementation does."""

    def change(model):
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        module = getattr(owner, name)
        delattr(owner, name)
        setattr(owner, name, module.forward)

    return change


@pytest.mark.parametrize(
    ("path", "name", "lost"),
    [
        (
            "model.layers.1.self_attn.q_a_layernorm",
            "q latent of layer 1 (self_attn.q_a_layernorm is not called)",
            set(),
        ),
        ("model.layers.0.mlp", "FFN's output of layer 0 (mlp is not called)", set()),
        ("model.rotary_emb", "angles (model.rotary_emb is not called)", {"RoPE"}),
        ("model.norm", "final norm (model.norm is not called)", set()),
    ],
)
def test_what_a_subject_does_not_expose_is_left_out_by_name_and_the_rest_is_judged(path, name, lost, oracles):
    verdict = verdict_on(changed_reference(unregistered(path)), oracles)
    assert verdict.status is Status.VERIFIED, verdict.reason
    assert name in verdict.data["left_out"]
    assert name in verdict.reason
    every = {"projection", "RoPE", "index scores", "selection", "attention", "MoE", "loss"}
    assert {entry["stage"] for entry in verdict.data["stages"]} == every - lost


class Wrapped(torch.nn.Module):
    """A model under a name of its own: nothing has its official name."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **kwargs):
        return self.inner(**kwargs)


def test_a_subject_that_exposes_nothing_is_not_applicable():
    verdict = verdict_on(changed_reference(Wrapped))
    assert verdict.status is Status.NOT_APPLICABLE
    assert "no module with an official name" in verdict.reason


def test_a_module_of_another_shape_is_left_out():
    def change(model):
        module = model.get_submodule("model.layers.2.self_attn.indexer.wk")
        module.register_forward_hook(lambda _, __, own: torch.cat((own, own), -1))
        norm = model.get_submodule("model.layers.2.self_attn.indexer.k_norm")
        norm.register_forward_pre_hook(lambda _, args: (args[0].chunk(2, -1)[0],))

    verdict = verdict_on(changed_reference(change))
    assert verdict.status is Status.VERIFIED, verdict.reason
    assert verdict.data["left_out"][0].startswith(
        "index keys before their norm of layer 2 (self_attn.indexer.wk gives a tensor of shape"
    )


def test_the_guide_for_subjects_names_every_module_that_is_looked_at():
    guide = (ROOT / "docs/subjects.md").read_text("utf-8")
    for point in POINTS.values():
        name = point.path.removeprefix("self_attn.") or "model.layers.N"
        assert f"`{name}`" in guide, point


@pytest.mark.parametrize("case", ["left-padded", "packed"])
def test_angles_are_compared_from_where_a_document_starts(case):
    config = DeepseekV32Config.preset("tiny")
    case = build_case(case, config, seed=0, length=48)
    layout, table = layout_of(case, torch.device("cpu")), RotaryTable(config)

    def angles(positions):
        return torch.cat(table(positions, torch.float64), -1)

    real = layout.real_BL
    here, moved, faster = (
        turned_since_the_start(angles(positions), layout)[real]
        for positions in (layout.positions_BL, layout.positions_BL + 17, layout.positions_BL * 2)
    )
    assert float((here - moved).abs().max()) < 1e-5
    assert float((here - faster).abs().max()) > 0.5
