"""One process and several ranks compute the same: losses, gradients, scores, targets, selections, experts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.ranks.parity import EXACT, questions
from harness.ranks.world import run_world

from .variants import LAYOUTS, VARIANTS

Answers = dict[str, dict[str, float]]
MODULE = "harness.ranks.parity"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Answers]:
    """The answers of a world, which runs once for all its questions."""
    known: dict[tuple[int, str], Answers] = {}

    def answers(ranks: int, how_many: str) -> Answers:
        if (ranks, how_many) not in known:
            out = tmp_path_factory.mktemp("world") / "out.json"
            known[ranks, how_many] = run_world(ranks, out, MODULE, str(ranks), how_many)
        return known[ranks, how_many]

    return answers


def wrong(name: str, measures: dict[str, float]) -> dict[str, float]:
    # In fp32 measures are shares of a budget.
    limit = 1.0 if name.endswith("fp32") else EXACT
    return {measure: value for measure, value in measures.items() if not value <= limit}


FAST = [(ranks, q.name) for ranks in (1, 2, 4) for q in questions(ranks, all_of_them=False)]
SLOW = [(ranks, q.name) for ranks in (2, 4) for q in questions(ranks, all_of_them=True) if (ranks, q.name) not in FAST]


@pytest.mark.parametrize(("ranks", "name"), FAST)
def test_ranks_compute_what_one_process_does(world: Callable[[int, str], Answers], ranks: int, name: str) -> None:
    measures = world(ranks, "fast")[name]
    assert set(measures) >= {"loss", "lm loss", "kl loss", "logits", "gradients"}
    assert wrong(name, measures) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "name"), SLOW)
def test_every_division_of_every_input(world: Callable[[int, str], Answers], ranks: int, name: str) -> None:
    assert wrong(name, world(ranks, "all")[name]) == {}


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return run_world(2, tmp_path_factory.mktemp("variants") / "out.json", "suites.distributed.variants")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_out_of_the_ordinary(variants: Answers, variant: str) -> None:
    assert set(variants[variant]) == set(LAYOUTS)
    assert max(variants[variant].values()) <= EXACT


def test_a_rank_that_fails_is_reported(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit code 1"):
        run_world(2, tmp_path / "out.json", MODULE, "2", "fast", "one argument too many")
