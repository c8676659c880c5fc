"""Measures how much of each budget a right subject uses: `python -m harness.calibrate`, where budgets.py gets its numbers.

Seeds from 1000 on are kept for counting false alarms, and are refused here.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from reference import DeepseekV32Config
from reports.schema import Status, Verdict

from .cases import CASE_NAMES, calibrated_state
from .runner import DTYPES, Plan, run, select_checks
from .subjects import resolve_subject
from .verify import length_for

HELD_OUT = 1000


class Quiet:
    """A sink that keeps nothing."""

    def start(self, check: str, case: str = "", dtype: str = "") -> None:
        """Nothing."""

    def done(self, verdict: Verdict) -> None:
        """Nothing."""


def used_budgets(
    subject: str, seeds: Iterable[int], checks: str = "all", config_name: str = "tiny"
) -> tuple[dict[tuple[str, str, str], float], list[Verdict]]:
    """Largest share of each budget used over `seeds`, by (check, dtype, measure), and the verdicts that did not verify.

    Raises:
        ValueError: a seed that is kept for counting false alarms.
    """
    shares: dict[tuple[str, str, str], float] = defaultdict(float)
    others = []
    for seed in seeds:
        if seed >= HELD_OUT:
            raise ValueError(f"seed is {seed}; seeds from {HELD_OUT} on never set a budget.")
        config = DeepseekV32Config.preset(config_name)
        plan = Plan(
            resolve_subject(subject), config, calibrated_state(config, seed), seed, length_for(config, config_name), 2,
            torch.device("cpu"), tuple(DTYPES), CASE_NAMES, select_checks(checks.split(",")),
        )  # fmt: skip
        for verdict in run(plan, Quiet()):
            if verdict.status is not Status.VERIFIED:
                others.append(verdict)
            for measure in verdict.measures:
                if measure.budget:
                    key = (verdict.check, verdict.dtype, measure.name)
                    shares[key] = max(shares[key], measure.used or 0.0)
    return dict(shares), others


def main(
    subject: Annotated[str, typer.Option(help="A right subject.")] = "optimized",
    seeds: Annotated[int, typer.Option(help="Seeds 0 … n − 1.")] = 20,
    checks: Annotated[str, typer.Option(help="Families or checks.")] = "all",
) -> None:
    """Print the largest share of each budget that the subject uses, and every verdict that is not `verified`."""
    torch.set_num_threads(1)
    console = Console()
    shares, others = used_budgets(subject, range(seeds), checks)
    table = Table("check", "dtype", "measure", "largest share used", box=None)
    for (check, dtype, measure), share in sorted(shares.items()):
        table.add_row(check, dtype, measure, f"{share:.2f}")
    console.print(table)
    for verdict in others:
        console.print(f"{verdict.status}: {verdict.reproduce}: {verdict.reason}", markup=False)
    console.print(f"{subject}, {seeds} seeds: {len(others)} verdicts are not verified")


if __name__ == "__main__":
    typer.run(main)
