"""`v32 kernels`: compiles every kernel for every target, holds it against its budget, writes records and a report."""

import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from reports.files import begin_in, files_written, write_reports
from reports.records import (
    JSON,
    RUN_FILE,
    Run,
    RunWriter,
    Verdict,
    read_run,
    run_exit_code,
    verdict_line,
)
from reports.schema import Measure, NullCandidate, Status
from reports.terminal import Progress, plain_line, print_line, shown
from reports.view import failing, failure_details, flat

from ..environment import capture
from ..verify import USAGE_ERROR, command_line, one_sentence
from . import worker
from .budgets import (
    ALLOWANCES,
    LARGE_HMMA,
    NO_TENSOR_CORES,
    TARGETS,
    budget_for,
    measures,
    null_candidates,
    within,
)
from .worker import Job, Listing, Outcome

FAMILY = "kernels"
CANNOT = 3
# From this width on, a terminal has room for wider gaps between columns.
WIDE = 110
_HEADS = ("", "registers", "stack", "shared memory", "tensor cores", "spills", "")


@dataclass(frozen=True, slots=True)
class Request:
    """What `v32 kernels` was asked for, as it was typed. `modules`: where specs are; none for `optimized.kernels`."""

    target: str = "all"
    only: str = "all"
    jobs: int = 0
    out: Path = Path("runs/kernels")
    modules: tuple[str, ...] = ()


def targets_of(request: Request) -> tuple[str, ...]:
    """The targets asked for, in the order of `TARGETS`.

    Raises:
        ValueError: a target that is unknown, or a number out of range.
    """
    wanted = [word for word in request.target.split(",") if word]
    for word in wanted:
        if word != "all" and word not in TARGETS:
            raise ValueError(f"--target names {word!r}; targets are all, {', '.join(TARGETS)}, separated by commas.")
    if not wanted:
        raise ValueError(f"--target is empty; targets are all, {', '.join(TARGETS)}, separated by commas.")
    if request.jobs < 0:
        raise ValueError(f"--jobs is {request.jobs}; it must be 0 (one a core) or more.")
    return tuple(target for target in TARGETS if "all" in wanted or target in wanted)


def chosen_of(request: Request, listing: Listing) -> tuple[list[Job], dict[str, str]]:
    """The jobs that --only names, and the problems of modules that it does not exclude.

    Raises:
        ValueError: a name that is unknown, or none at all.
    """
    wanted = {word for word in request.only.split(",") if word}
    if "all" in wanted:
        return list(listing.jobs), listing.problems
    modules = {name.rpartition(".")[2]: name for name in (*(job.module for job in listing.jobs), *listing.problems)}
    names = dict.fromkeys(job.kernel for job in listing.jobs)
    if unknown := sorted(wanted - modules.keys() - names.keys()):
        known = f"modules are all, {', '.join(modules)}; kernels are {', '.join(names)}"
        raise ValueError(f"--only names {unknown[0]!r}; {known}.")
    if not wanted:
        raise ValueError("--only is empty; it must name a kernel, a module of kernels, or all.")
    named = {modules[word] for word in wanted & modules.keys()}
    jobs = [job for job in listing.jobs if job.kernel in wanted or job.module in named]
    return jobs, {name: problem for name, problem in listing.problems.items() if name in named}


def kernels(request: Request, console: Console) -> int:
    """Run the request; returns the exit code. Records are written as they come, the report at the end."""
    errors = Console(stderr=True)
    try:
        targets = targets_of(request)
    except ValueError as error:
        print_line(errors, f"v32 kernels: {error}")
        return USAGE_ERROR
    if find_spec("triton") is None:
        print_line(errors, "v32 kernels: triton is not installed, and nothing compiles without it; see v32 doctor.")
        return CANNOT
    width = request.jobs or cores()
    with _pool(width) as pool:
        try:
            listing = pool.submit(worker.list_jobs, request.modules, targets).result()
        except (BrokenProcessPool, ImportError, RuntimeError) as error:
            print_line(errors, f"v32 kernels: Triton cannot compile here, see v32 doctor: {one_sentence(error)}")
            return CANNOT
        try:
            jobs, problems = chosen_of(request, listing)
            begin_in(request.out)
        except ValueError as error:
            print_line(errors, f"v32 kernels: {error}")
            return USAGE_ERROR
        command = command_line("kernels")
        header = {
            "subject": f"{len({job.kernel for job in jobs})} kernels",
            "claim": "every kernel compiles within its budget",
            "config": "the dims of V3.2",
            "device": f"none; compiled for {', '.join(targets)}",
            "toolchains": listing.toolchains,
            "command": " ".join(command),
            "environment": capture(command),
        }
        try:
            with (
                RunWriter(request.out / RUN_FILE, header) as writer,
                Progress(console, total=len(jobs) + len(problems)) as progress,
            ):
                for module, problem in problems.items():
                    verdict = module_verdict(module, problem)
                    writer.write(verdict)
                    progress.done(verdict)
                outcomes = _outcomes(pool, width, jobs)
                for job in jobs:
                    progress.start(f"{FAMILY}.{job.kernel}.{job.target}")
                    verdict = verdict_of(job, next(outcomes), listing.toolchains[job.target])
                    writer.write(verdict)
                    progress.done(verdict)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            return _finish(request.out, console) or 130
        except OSError as error:
            print_line(errors, f"v32 kernels: {request.out} cannot be written: {error.strerror or error}.")
            return CANNOT
    return _finish(request.out, console)


def cores() -> int:
    """How many processes can compile at the same time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, get_context("spawn"), worker.start)


def _outcomes(pool: ProcessPoolExecutor, width: int, jobs: list[Job]) -> Iterator[Outcome]:
    """One outcome a job, in their order; `width` is the number of processes in `pool`."""
    waiting = deque(jobs)
    with ExitStack() as later:
        while waiting:
            futures = [pool.submit(worker.run_job, job) for job in waiting]
            try:
                for future in futures:
                    outcome = future.result()
                    waiting.popleft()
                    yield outcome
            except BrokenProcessPool:
                # A compiler that aborts takes all of the pool with it. Whose it was is only known where one runs at
                # a time: there it is the first without an outcome.
                if width == 1:
                    waiting.popleft()
                    yield Outcome(None, 0.0, "the compiler ended its process")
                width = 1
                pool = later.enter_context(_pool(width))


def verdict_of(job: Job, outcome: Outcome, toolchain: str) -> Verdict:
    """Verified when the kernel compiles within its budget, and the budget rejects every null candidate."""
    found = outcome.measured
    judged: tuple[Measure, ...] = ()
    nulls: tuple[NullCandidate, ...] = ()
    data: dict[str, JSON] = {"module": job.module, "kernel": job.kernel, "target": job.target}
    if found is None:
        status = Status.FAILED
        reason = f"does not compile: {outcome.problem}"
        if outcome.details:
            data["traceback"] = outcome.details
    else:
        budget = budget_for(
            job.kernel,
            job.target,
            toolchain,
            shared_memory=job.shared_memory,
            num_warps=job.num_warps,
            tensor_cores=job.tensor_cores,
        )
        judged, nulls = measures(found, budget), null_candidates(found, budget)
        accepted = [null for null in nulls if not null.rejected]
        status = Status.FAILED if not within(found, budget) else Status.VACUOUS if accepted else Status.VERIFIED
        allowance = ALLOWANCES.get((job.kernel, job.target, toolchain))
        reason = "" if allowance is None else allowance.why
        data["instructions"] = dict(found.instructions)
        data["loop_loads"], data["loop_stores"] = found.loop_loads, found.loop_stores
    return Verdict(
        check=f"{FAMILY}.{job.kernel}.{job.target}",
        family=FAMILY,
        subject=FAMILY,
        case=toolchain,
        status=status,
        reason=reason,
        measures=judged,
        nulls=nulls,
        seconds=outcome.seconds,
        reproduce=f"v32 kernels --only {job.kernel} --target {job.target}",
        data=data,
    )


def module_verdict(module: str, problem: str) -> Verdict:
    """The error of a module that could not be asked for its kernels."""
    return Verdict(
        check=f"{FAMILY}.{module.rpartition('.')[2]}",
        family=FAMILY,
        subject=FAMILY,
        case="",
        status=Status.ERROR,
        reason=f"{module} cannot say which kernels it has: {problem}",
        reproduce=f"v32 kernels --only {module.rpartition('.')[2]}",
    )


def _finish(out: Path, console: Console) -> int:
    records = read_run(out)
    write_reports(out, records)
    print_table(records, console)
    for verdict in failing(records):
        print_line(console, plain_line(verdict), "bold red")
        for line in failure_details(verdict)[1 if verdict.reason else 0 :]:
            console.print(shown(console, f"  {line}"), overflow="fold")
        print_line(console, f"$ {verdict.reproduce}")
        console.print()
    print_line(console, files_written(out))
    code = run_exit_code(records)
    print_line(console, verdict_line(records), "bold red" if code else "bold green")
    return code


def print_table(run: Run, console: Console) -> None:
    """Every kernel on every target, each number as measured / allowed; what is beyond is red."""
    by_kernel: dict[str, list[list[Text]]] = {}
    for verdict in run.verdicts:
        if verdict.data.get("kernel"):
            by_kernel.setdefault(flat(verdict.data["kernel"]), []).append(_row(verdict))
    everything = [row for rows in by_kernel.values() for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(_HEADS, *everything, strict=True)]

    def grid(rows: list[list[Text]]) -> Table:
        columns = (Column(min_width=width, no_wrap=True) for width in widths)
        table = Table.grid(*columns, padding=(0, 2 if console.width >= WIDE else 1, 0, 0))
        for row in rows:
            table.add_row(*row)
        return table

    legend = "bytes of stack a thread and of shared memory a block; spills: accesses to the stack by code in loops"
    console.print(shown(console, legend, "dim"), overflow="fold")
    console.print(grid([[Text(name, style="dim") for name in _HEADS]]))
    for kernel, rows in by_kernel.items():
        console.print(shown(console, kernel, "bold"), overflow="fold")
        console.print(grid(rows))
    console.print()


def _row(verdict: Verdict) -> list[Text]:
    found = {measure.name: measure for measure in verdict.measures}
    return [
        Text(f"  {flat(verdict.data['target'])}"),
        *(_cell(found.get(name)) for name in ("registers", "stack", "shared memory")),
        _tensor_cores(verdict.data.get("instructions"), found),
        _cell(found.get("spills in loops")),
        Text(verdict.status, style="green" if verdict.status is Status.VERIFIED else "bold red"),
    ]


def _tensor_cores(counted: JSON, measures: Mapping[str, Measure]) -> Text:
    text = ", ".join(f"{count} {opcode}" for opcode, count in counted.items()) if isinstance(counted, dict) else ""
    judged = [measures[name] for name in (NO_TENSOR_CORES, LARGE_HMMA) if name in measures]
    if all(measure.within for measure in judged):
        return Text(text)
    return Text(text or "none", style="bold red")


def _cell(measure: Measure | None) -> Text:
    if measure is None or measure.budget is None:
        return Text("")
    return Text(f"{measure.value:,.0f}/{measure.budget:,.0f}", style="" if measure.within else "bold red")
