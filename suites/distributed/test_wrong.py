"""Known bugs of several ranks are seen: each is far from one process, where the unpatched copy is not."""

from pathlib import Path

import pytest

from harness.mutants.catalogue import MUTANTS as OF_ONE_PROCESS
from harness.mutants.catalogue.distributed import MUTANTS
from harness.mutants.patching import patched_sources

from .parity import EXACT, WRONG
from .world import run_world
from .wrong import RIGHT, SHOWN_BY, short

NAMES = [short(mutant.name) for mutant in MUTANTS]
# One of each kind: a loss over ranks, a target over heads, a sum of gradients, exchanged tokens.
FAST = [
    "lm-loss-as-a-mean-of-means", "divergence-before-the-sum-over-heads", "gradient-of-gathered-latents-not-summed",
    "tokens-back-in-the-order-of-experts", "a-selection-for-each-rank-of-tp",
]  # fmt: skip


def test_every_one_has_a_place_where_it_shows() -> None:
    assert set(SHOWN_BY) == {RIGHT, *NAMES}
    assert len(NAMES) == len(set(NAMES))
    assert not {m.name for m in MUTANTS} & {m.name for m in OF_ONE_PROCESS}
    for mutant in MUTANTS:
        assert patched_sources(mutant.patches), mutant.name


def seen(found: dict[str, dict[str, float]], names: list[str]) -> None:
    assert max(found[RIGHT].values()) <= EXACT
    assert {name: found[name] for name in names if not max(found[name].values()) >= WRONG} == {}


def test_one_bug_of_each_kind_is_seen(tmp_path: Path) -> None:
    seen(run_world(2, tmp_path / "out.json", "suites.distributed.wrong", *FAST), FAST)


@pytest.mark.slow
def test_every_bug_is_seen(tmp_path: Path) -> None:
    seen(run_world(2, tmp_path / "out.json", "suites.distributed.wrong"), NAMES)
