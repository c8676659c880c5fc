"""Known bugs of several ranks are seen: each is far from one process, where the unpatched copy is not."""

import pytest
from rich.console import Console

from harness.cli import main
from harness.mutants import command
from harness.mutants.catalogue.distributed import MUTANTS
from harness.mutants.matrix import lasting_mutant
from harness.mutants.ranked import CHECKS, COMPARED, compared, judged, needs_ranks
from harness.ranks.parity import EXACT, WRONG
from harness.ranks.wrong import SHOWN_BY, short
from reports.kills import kills
from reports.records import Status, read_run

NAMES = [mutant.name for mutant in MUTANTS]
# One of each kind: a loss over ranks, a target over heads, a sum of gradients, exchanged tokens.
FAST = [
    "D01-lm-loss-as-a-mean-of-means", "D11-divergence-before-the-sum-over-heads",
    "gradient-of-gathered-latents-not-summed", "tokens-back-in-the-order-of-experts", "B14-a-selection-for-each-rank-of-tp",
]  # fmt: skip


def test_every_one_has_a_place_where_it_shows() -> None:
    assert set(SHOWN_BY) == set(map(short, NAMES))
    assert all(map(needs_ranks, MUTANTS))


def seen(names: list[str]) -> None:
    found = compared(names)
    assert max(found[""].values()) <= EXACT
    assert {name: found[name] for name in names if not max(found[name].values()) >= WRONG} == {}


def test_one_bug_of_each_kind_is_seen() -> None:
    seen(FAST)


@pytest.mark.slow
def test_every_bug_is_seen() -> None:
    seen(NAMES)


def test_what_is_beyond_rounding_or_not_a_number_fails() -> None:
    distances = dict.fromkeys(COMPARED, 1e-15)
    assert set(judged(distances)[0].values()) == {Status.VERIFIED}
    for wrong in (2 * EXACT, float("nan"), float("inf")):
        statuses, reasons = judged(distances | {"kl loss": wrong})
        assert [check for check in CHECKS if statuses[check] is Status.FAILED] == ["ranks.kl_loss"] == list(reasons)


def test_one_process_is_no_place_for_them() -> None:
    with pytest.raises(ValueError, match="shows on several ranks only: v32 mutants --only B14-a-selection"):
        lasting_mutant("B14-a-selection-for-each-rank-of-tp")


@pytest.mark.slow
def test_they_stand_in_the_matrix(tmp_path) -> None:
    request = command.Request(only="D02,norm-of-own-shards", seeds=0, jobs=1, out=tmp_path)
    assert command.mutants(request, Console(quiet=True)) == 0
    rows = {row.name: row.killed_by for row in kills(read_run(tmp_path)).mutants}
    assert "ranks.kl_loss" in rows["D02-kl-too-small-by-the-ranks-of-cp"]
    assert rows["norm-of-own-shards"] == ("ranks.norm",)
    blind = (
        "--only",
        "norm-of-own-shards",
        "--seeds",
        "0",
        "--without",
        "ranks.norm",
        "--out",
        str(tmp_path / "blind"),
    )
    with pytest.raises(SystemExit) as ended:
        main(["mutants", *blind])
    assert ended.value.code == 1
