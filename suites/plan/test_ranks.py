"""What each of two ranks takes is what is planned for a rank: FSDP2, context, expert and tensor parallelism, by gloo."""

import json

import pytest

from harness.plan.command import TOLERANCE
from harness.plan.memory import memory
from harness.ranks.world import run_world

from .ranks import steps

KINDS = (
    ("sparse", True, "float32"),
    ("warmup", False, "float32"),
    ("dense", False, "float32"),
    ("sparse", True, "bfloat16"),
)
QUESTIONS = [[layout, *kind] for layout in ("dp=2", "cp=2", "ep=2", "tp=2") for kind in KINDS]
NAMES = [" ".join(map(str, question)) for question in QUESTIONS]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Bytes of the fullest rank, by question; the world runs once."""
    out = tmp_path_factory.mktemp("ranks") / "out.json"
    return dict(zip(NAMES, run_world(2, out, "suites.plan.ranks", json.dumps(QUESTIONS)), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_takes_what_is_planned(measured, name):
    step = steps([QUESTIONS[NAMES.index(name)]])[0]
    planned, true = memory(step), measured[name]
    assert planned.weights == pytest.approx(true["weights"], rel=1e-3)
    assert planned.growth + planned.communication == pytest.approx(true["growth"], rel=TOLERANCE)


@pytest.mark.slow
def test_a_rank_does_not_take_what_the_whole_model_does(measured):
    """The plan of one process is no plan of two ranks, in either direction."""
    for name, question in zip(NAMES, QUESTIONS, strict=True):
        alone = memory(steps([["dp=1", *question[1:]]])[0])
        assert abs(alone.weights / measured[name]["weights"] - 1) > TOLERANCE
