"""Runs a plan of checks: modes × cases × dtypes, the costly oracle of each case shared by all of them.

A mode is "sparse" or "dense" for checks of one forward and backward, "whole" for checks that build models of their
own, "operators" for checks of single operators.
"""

import gc
import shlex
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from reference import DeepseekV32Config
from reports.schema import Measure, NullCandidate, Status, Verdict

from .cases import CASE_NAMES, Case, build_case
from .checks import CHECKS, FAMILIES, Answer, Bench, Check, NotExposed, Oracle, SubjectError
from .checks.whole import changed
from .operators import OPERATOR_CASES, OperatorBench, build_operator_case
from .subjects import CAPABILITIES, Subject

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Dense mode differs in the attention alone: a plain and a packed case show it.
DENSE_CASES = ("text", "packed", "left-padded")
_MODEL = frozenset({"model"})
_MODE_NEEDS = {"sparse": _MODEL, "dense": _MODEL | {"dense-mode"}, "whole": _MODEL, "operators": frozenset[str]()}


class Sink(Protocol):
    """Where a run reports to while it runs."""

    def start(self, check: str, case: str = "", dtype: str = "") -> None:
        """A check begins."""

    def done(self, verdict: Verdict) -> None:
        """A verdict is there."""


@dataclass(frozen=True)
class Plan:
    """What is to be run. `config_name` and `options` go into the commands that reproduce a failure.

    `lean`: the model is so large that the reference runs some rows at a time, and only the indexer is trained.
    """

    subject: Subject
    config: DeepseekV32Config
    state: dict[str, torch.Tensor]
    seed: int
    length: int
    batch: int
    device: torch.device
    dtypes: tuple[str, ...]
    cases: tuple[str, ...]
    checks: tuple[Check, ...]
    config_name: str = "tiny"
    options: tuple[str, ...] = ()
    operator_cases: tuple[str, ...] = OPERATOR_CASES
    lean: bool = False

    def steps(self) -> Iterator[tuple[str, str, str, list[Check]]]:
        """(mode, case, dtype, checks) in the order in which they run."""
        for mode in ("sparse", "dense"):
            for case in self.cases:
                if mode == "dense" and case not in DENSE_CASES:
                    continue
                for dtype in self.dtypes:
                    if checks := [c for c in self.checks if c.concerns(mode, case, DTYPES[dtype])]:
                        yield mode, case, dtype, checks
        for dtype in self.dtypes:
            if checks := [c for c in self.checks if c.concerns("whole", "text", DTYPES[dtype])]:
                yield "whole", "text", dtype, checks
        for case in self.operator_cases:
            for dtype in self.dtypes:
                if checks := [c for c in self.checks if c.concerns("operators", case, DTYPES[dtype])]:
                    yield "operators", case, dtype, checks

    def __len__(self) -> int:
        return sum(len(checks) for *_, checks in self.steps())


def select_checks(names: Iterable[str]) -> tuple[Check, ...]:
    """The checks called `names`: a check, a family, or "all".

    Raises:
        ValueError: a name that is neither.
    """
    wanted = [name for name in names if name]
    for name in wanted:
        if name != "all" and name not in FAMILIES and name not in {c.name for c in CHECKS}:
            raise ValueError(
                f"Unknown check {name!r}; families are all, {', '.join(FAMILIES)}; "
                f"checks are {', '.join(c.name for c in CHECKS)}."
            )
    return tuple(c for c in CHECKS if "all" in wanted or c.family in wanted or c.name in wanted)


def select_cases(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of cases of models, and of operators, validated; "all" stands for every one.

    Raises:
        ValueError: an unknown case.
    """
    wanted = [name for name in names if name]
    for name in wanted:
        if name != "all" and name not in (*CASE_NAMES, *OPERATOR_CASES):
            raise ValueError(
                f"Unknown case {name!r}; available: all, {', '.join(CASE_NAMES)}; "
                f"of operators: {', '.join(OPERATOR_CASES)}."
            )
    of_models, of_operators = (
        tuple(c for c in known if "all" in wanted or c in wanted) for known in (CASE_NAMES, OPERATOR_CASES)
    )
    return of_models, of_operators


# Mode, case, dtype, tokens a row and rows.
Key = tuple[str, str, str, int, int]


@dataclass(slots=True)
class Oracles:
    """What does not depend on the subject, for the next subject on the same weights and seed."""

    models: dict[Key, Oracle] = field(default_factory=dict)
    benches: dict[Key, OperatorBench] = field(default_factory=dict)


def run(plan: Plan, sink: Sink, oracles: Oracles | None = None) -> Iterator[Verdict]:
    """Run the plan; one verdict a check, as each is reached.

    `oracles` keeps everything that does not depend on the subject; without it each oracle is freed before the next.
    """
    oracle: Oracle | None = None
    held: Key | None = None
    lacking: set[tuple[str, str]] = set()
    for mode, case_name, dtype, checks in plan.steps():
        key = (mode, case_name, dtype, plan.length, plan.batch)
        if mode == "operators":
            oracle = held = None
            kept = None if oracles is None else oracles.benches.get(key)
            if kept is None:
                case = build_operator_case(case_name, plan.config, seed=plan.seed, length=plan.length, batch=plan.batch)
                kept = OperatorBench(case, plan.subject, DTYPES[dtype], plan.device)
            if oracles is not None:
                oracles.benches[key] = kept
            yield from _judged(checks, kept.of_another(plan.subject), mode, plan, sink, lacking)
            continue
        if held != key or oracle is None:
            held = key
            # The previous oracle's gradients are freed before the next is made.
            oracle = None if oracles is None else oracles.models.get(held)
            if oracle is None:
                oracle = Oracle(_case(plan, mode, case_name), plan.state, plan.device, DTYPES[dtype], plan.lean)
            if oracles is not None:
                oracles.models[held] = oracle
        bench = Bench(oracle, plan.subject, DTYPES[dtype])
        yield from _judged(checks, bench, mode, plan, sink, lacking)


def _judged(
    checks: Iterable[Check], bench: Bench | OperatorBench, mode: str, plan: Plan, sink: Sink,
    lacking: set[tuple[str, str]],
) -> Iterator[Verdict]:  # fmt: skip
    for check in checks:
        missing = missing_capability(check, bench.case.needs, mode, plan.subject)
        if missing is not None:
            # Said once a check, not once a case and dtype.
            if (check.name, missing) in lacking:
                continue
            lacking.add((check.name, missing))
        sink.start(check.name, f"{bench.case.name}, {mode}", str(bench.dtype).removeprefix("torch."))
        verdict = judge(check, bench, mode, plan, missing)
        # Shown once the caller has taken it: what a Ctrl-C made of a check is neither recorded nor shown.
        yield verdict
        sink.done(verdict)


def _case(plan: Plan, mode: str, name: str) -> Case:
    config = changed(plan.config, use_sparse_attention=mode != "dense")
    return build_case(name, config, seed=plan.seed, length=plan.length, batch=plan.batch)


def missing_capability(check: Check, case_needs: frozenset[str], mode: str, subject: Subject) -> str | None:
    """The first capability that `check` needs here and `subject` does not declare."""
    needs = check.needs | case_needs | _MODE_NEEDS[mode]
    # A subject that has no model lacks that first, whatever else a model would need.
    return "model" if "model" in needs - subject.capabilities else min(needs - subject.capabilities, default=None)


def judge(check: Check, bench: Bench | OperatorBench, mode: str, plan: Plan, missing: str | None = None) -> Verdict:
    """Run one check and turn what it answers, or raises, into a verdict; `missing` makes it not applicable."""
    started = time.perf_counter()
    answer = Answer([], [])
    data: dict[str, object] = {}
    if missing is not None:
        status = Status.NOT_APPLICABLE
        answer = Answer([], [], f"the subject does not declare {missing}: {CAPABILITIES[missing]}")
    elif plan.lean and check.too_large:
        status, answer = Status.SKIPPED, Answer([], [], check.too_large)
    else:
        try:
            answer = check.run(bench)
            status = status_of(answer.measures, answer.nulls)
        except NotExposed as error:
            status, answer = Status.NOT_APPLICABLE, Answer([], [], str(error))
        except SubjectError as error:
            # A declared capability that breaks is the subject's failure, not the harness's.
            status, answer = Status.FAILED, Answer([], [], str(error))
            data["traceback"] = "".join(traceback.format_exception(error.__cause__))
        except Exception as error:
            status, answer = Status.ERROR, Answer([], [], f"{type(error).__name__}: {error}")
            data["traceback"] = traceback.format_exc()
        if "traceback" in data:
            # In torch 2.11 the next backward goes on with what is left of one that raised, for as long as that lives.
            gc.collect()
    return Verdict(
        check=check.name,
        family=check.family,
        subject=plan.subject.name,
        case=f"{bench.case.name}, {mode}",
        status=status,
        dtype=str(bench.dtype).removeprefix("torch."),
        device=str(plan.device),
        reason=answer.reason or why_vacuous(answer.nulls, status),
        measures=tuple(answer.measures),
        nulls=tuple(answer.nulls),
        seconds=time.perf_counter() - started,
        reproduce=reproduce(plan, check, bench),
        data={**answer.data, **data},
    )


def status_of(measures: list[Measure], nulls: list[NullCandidate]) -> Status:
    """failed beats vacuous beats verified; a check without any budget or any null candidate proves nothing."""
    if not all(measure.within for measure in measures if measure.budget is not None):
        return Status.FAILED
    judged = any(measure.budget is not None for measure in measures)
    if not judged or not nulls or not all(null.rejected for null in nulls):
        return Status.VACUOUS
    return Status.VERIFIED


def why_vacuous(nulls: list[NullCandidate], status: Status) -> str:
    """Which null candidates a vacuous check accepted, in words; empty for any other status."""
    if status is not Status.VACUOUS:
        return ""
    accepted = [f"{n.kind}{f' ({n.detail})' if n.detail else ''}" for n in nulls if not n.rejected]
    return f"null candidates were accepted: {'; '.join(accepted)}" if accepted else "the check had nothing to reject"


def reproduce(plan: Plan, check: Check, bench: Bench | OperatorBench) -> str:
    """The command that runs this one check again."""
    words = [
        "v32", "verify", "--config", plan.config_name, "--subject", plan.subject.spec.split(" --backend ")[0],
        "--checks", check.name, "--cases", bench.case.name, "--dtype", str(bench.dtype).removeprefix("torch."),
        "--seq-len", str(plan.length), "--batch", str(plan.batch), "--seed", str(plan.seed), *plan.options,
    ]  # fmt: skip
    return shlex.join(words)
