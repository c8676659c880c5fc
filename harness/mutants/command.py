"""`v32 mutants`: tries every known bug on every check, counts false alarms, writes records and a report."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from reports.files import begin_in, finish
from reports.records import RUN_FILE, RunWriter, Verdict
from reports.schema import FAILING, Measure, NullCandidate, Status
from reports.terminal import Progress, print_line

from ..checks import CHECKS
from ..environment import capture
from ..verify import USAGE_ERROR, command_line
from . import matrix, ranked
from .coverage import coverage
from .matrix import HELD_OUT, RIGHT, SEED, Pass, pass_of_mutant, pass_of_right, select_mutants
from .mutant import Mutant
from .patching import patched_sources

T = TypeVar("T")
FAMILY = "mutants"
# What a check says of a subject that it looked at.
JUDGED = frozenset({Status.VERIFIED, *FAILING})
CHECK_NAMES = (*(check.name for check in CHECKS), *ranked.CHECKS)


@dataclass(frozen=True, slots=True)
class Request:
    """What `v32 mutants` was asked for, as it was typed. `seeds` counts from 1000 on."""

    only: str = "all"
    without: str = ""
    seeds: int = len(HELD_OUT)
    jobs: int = 0
    out: Path = Path("runs/mutants")


def check_request(request: Request) -> tuple[list[Mutant], frozenset[str]]:
    """The mutants, and the checks that are turned off.

    Raises:
        ValueError: a name that is unknown, a number out of range, or a patch that does not fit the code of today.
    """
    mutants = select_mutants([word for word in request.only.split(",") if word])
    without = frozenset(word for word in request.without.split(",") if word)
    if unknown := sorted(without - set(CHECK_NAMES)):
        raise ValueError(f"--without names {unknown[0]!r}; checks are {', '.join(CHECK_NAMES)}.")
    if not mutants:
        raise ValueError("--only is empty; it must name a mutant, an entry such as A01, a group (A to E), or all.")
    if not 0 <= request.seeds <= len(HELD_OUT):
        raise ValueError(f"--seeds is {request.seeds}; it must be 0 … {len(HELD_OUT)}.")
    if request.jobs < 0:
        raise ValueError(f"--jobs is {request.jobs}; it must be 0 (one a core) or more.")
    for mutant in mutants:
        patched_sources(mutant.patches)
    return mutants, without


def mutants(request: Request, console: Console) -> int:
    """Run the request; returns the exit code. Records are written as they come, the report at the end."""
    errors = Console(stderr=True)
    try:
        chosen, without = check_request(request)
        begin_in(request.out)
    except ValueError as error:
        print_line(errors, f"v32 mutants: {error}")
        return USAGE_ERROR
    command = command_line("mutants")
    header = {
        "subject": f"{len(chosen)} mutants, {request.seeds} seeds of {' and '.join(dict.fromkeys(RIGHT))}",
        "claim": "every mutant is killed" + (", no right subject raises an alarm" if request.seeds else ""),
        "config": matrix.CONFIG,
        "device": "cpu",
        "seed": SEED,
        "without": sorted(without),
        "checks": [name for name in CHECK_NAMES if name not in without],
        "catalogue": [
            {"entry": entry, "mutants": list(names), "reason": reason} for entry, (names, reason) in coverage().items()
        ],
        "command": " ".join(command),
        "environment": capture(command, seeds={"mutants": SEED, "false alarms": HELD_OUT.start}),
    }
    total = len(chosen) + len(set(RIGHT[: request.seeds]))
    try:
        with RunWriter(request.out / RUN_FILE, header) as writer, Progress(console, total=total) as progress:
            for verdict in run_mutants(chosen, without, request.seeds, request.jobs, progress.start):
                writer.write(verdict)
                progress.done(verdict)
    except KeyboardInterrupt:
        return finish(request.out, console) or 130
    except OSError as error:
        print_line(errors, f"v32 mutants: {request.out} cannot be written: {error.strerror or error}.")
        return 3
    return finish(request.out, console)


def run_mutants(
    chosen: list[Mutant], without: frozenset[str], seeds: int, jobs: int, started: Callable[[str, str], None]
) -> Iterator[Verdict]:
    """One verdict a mutant, as each is done, and one a right subject at the end; `jobs` processes, 0 for one a core."""
    # Processes that start from here on interpret the Triton kernels: mutants are tried on the CPU. The interpreter's small
    # products are several times slower where numpy's BLAS shares them among threads.
    os.environ |= {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    with ProcessPoolExecutor(jobs or os.cpu_count(), get_context("spawn"), matrix.start_worker) as pool:

        def submit(work: Callable[..., T], *args: Any) -> Future[T]:
            return pool.submit(matrix.unless_interrupted, work, *args)

        try:
            alone, together = ([m for m in chosen if ranked.needs_ranks(m) is needed] for needed in (False, True))
            clean = {
                kind: submit(matrix.pass_of_unpatched, kind[0], without, kind[1])
                for kind in dict.fromkeys(map(_kind, alone))
            }
            # One world of ranks for all its mutants, and first, because it is the longest.
            world = submit(_timed, ranked.compared, [m.name for m in together]) if together else None
            killed = {submit(_timed, pass_of_mutant, m.name, without): m for m in alone}
            alarms = [submit(pass_of_right, seed, without) for seed in HELD_OUT[:seeds]]
            started("the model without a patch", "")
            unpatched = {kind: future.result() for kind, future in clean.items()}
            wrong: list[Pass] = []
            for done in as_completed(killed):
                found, seconds = done.result()
                wrong.append(found)
                yield verdict_of(killed[done], found, unpatched[_kind(killed[done])], seconds)
            if world is not None:
                distances, seconds = world.result()
                right = _ranked_pass("no patch", distances[""], without)
                for mutant in together:
                    wrong.append(_ranked_pass(mutant.name, distances[mutant.name], without))
                    yield verdict_of(mutant, wrong[-1], right, seconds / len(together))
            if alarms:
                example = max(wrong, key=lambda found: len(found.kills))
                passes = []
                for i, future in enumerate(as_completed(alarms)):
                    passes.append(future.result())
                    started("false alarms", f"{i + 1} of {seeds} seeds")
                for name in dict.fromkeys(RIGHT):
                    if of_name := [p for p in passes if p.subject == name]:
                        yield alarms_verdict(name, of_name, example)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _kind(mutant: Mutant) -> tuple[str | None, str | None]:
    """What the copy without a patch, which a mutant is compared with, must run on: operators, and transformers' class."""
    return mutant.backend, matrix.plugged_class(mutant)


def _ranked_pass(name: str, distances: dict[str, float], without: frozenset[str]) -> Pass:
    statuses, reasons = ranked.judged(distances)
    return Pass(name, SEED, {check: found for check, found in statuses.items() if check not in without}, reasons)


def _timed(run: Callable[..., T], *args: Any) -> tuple[T, float]:
    began = time.perf_counter()
    return run(*args), time.perf_counter() - began


def verdict_of(mutant: Mutant, found: Pass, unpatched: Pass, seconds: float) -> Verdict:
    """Verified when some check failed the mutant that verifies the same copy without its patch."""
    killers = [check for check in found.kills if unpatched.statuses.get(check) is Status.VERIFIED]
    first = f": {found.reasons[killers[0]]}" if killers else ""
    return Verdict(
        check=f"{FAMILY}.{mutant.name}",
        family=FAMILY,
        subject=mutant.of,
        case=mutant.what,
        status=Status.VERIFIED if killers else Status.FAILED,
        dtype="",
        device="cpu",
        reason=f"failed by {len(killers)} checks{first}" if killers else "no check failed it: a check is missing",
        measures=(Measure("survived", 0.0 if killers else 1.0, 0.0), Measure("checks that failed it", len(killers))),
        nulls=(NullCandidate("the same copy without the patch", not unpatched.alarms, ", ".join(unpatched.alarms)),),
        seconds=seconds,
        reproduce=_reproduce(mutant),
        data={
            "mutant": {
                "entry": mutant.entry,
                "what": mutant.what,
                "source": mutant.source,
                "killed_by": list(killers),
                "patches": [{"file": p.file, "old": p.old, "new": p.new} for p in mutant.patches],
            },
            "reasons": {check: found.reasons[check] for check in killers},
        },
    )


def _reproduce(mutant: Mutant) -> str:
    if ranked.needs_ranks(mutant):
        return f"v32 mutants --only {mutant.name} --seeds 0"
    return f"{'TRITON_INTERPRET=1 ' if mutant.backend == 'triton' else ''}v32 verify --subject mutant:{mutant.name}"


def alarms_verdict(name: str, passes: list[Pass], wrong: Pass) -> Verdict:
    """Verified when no check failed, was vacuous or raised on a right subject; a mutant's pass must count as alarms."""
    alarms = [f"seed {found.seed}, {found.reasons[check]}" for found in passes for check in found.alarms]
    count = sum(found.verdicts for found in passes)
    judging = {check for found in passes for check, status in found.statuses.items() if status in JUDGED}
    silent = sorted({check for found in passes for check in found.statuses} - judging)
    return Verdict(
        check=f"{FAMILY}.false_alarms",
        family=FAMILY,
        subject=name,
        case=f"{name}, seeds {passes[0].seed} … {max(found.seed for found in passes)}" if passes else name,
        status=Status.FAILED if alarms else Status.VERIFIED,
        device="cpu",
        reason=f"{len(alarms)} false alarms of {count} verdicts" + "".join(f"; {a}" for a in alarms[:3]),
        measures=(
            Measure("false alarms", float(len(alarms)), 0.0),
            Measure("seeds", float(len(passes))),
            Measure("verdicts", float(count)),
            Measure("checks that judged it", float(len(judging))),
        ),
        nulls=(NullCandidate(f"the pass of {wrong.subject}", bool(wrong.alarms)),),
        seconds=sum(found.seconds for found in passes),
        data={"alarms": list(alarms), "checks_that_did_not_apply": list(silent)},
    )


def print_list(console: Console) -> None:
    """Every mutant by name: what is wrong, and where it is on record."""
    for mutant in matrix.MUTANTS:
        print_line(console, f"{mutant.name}: {mutant.what} ({mutant.source})")
