"""`v32 bench`: from a request to verified contestants, paired samples, growth, floors, records and a report."""

import json
import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from rich.console import Console

from reports.files import begin_in, finish
from reports.records import RUN_FILE, RunWriter, Verdict
from reports.schema import FAILING, Status
from reports.terminal import Progress, print_line
from reports.timings import FAMILY, QUANTITIES

from .. import verify
from ..environment import capture
from ..runner import Oracles, Plan, run, select_checks
from ..verify import USAGE_ERROR, command_line, one_sentence
from .fits import doublings, power_law
from .paired import LEAST_SAMPLES, Series, measure
from .point import (
    DTYPES,
    FORWARD,
    MACHINE,
    OPERATOR_PASSES,
    PASSES,
    TRAINING,
    WARM_UP,
    Point,
    is_operator,
    operator_of,
)
from .process import Worker, WorkerError
from .subjects import DENSE_FLASH, called, contestant_subject, not_applicable
from .targets import Medians, Target, applicable, floor_verdict, judge, medians_of

NONE = "none"
# Seven samples of what takes seconds; three of what takes minutes.
MANY, FEW, FEW_BEYOND = 7, 3, 2048
SHORTEST = 8
# What must hold before a pass is timed: its choices, then its arithmetic given the choices.
CHECKS_BEFORE = {
    FORWARD: ("choices.keys", "choices.experts", "parity.logits"),
    TRAINING: ("choices.keys", "choices.experts", "parity.logits", "parity.lm_gradients"),
    WARM_UP: ("kl.loss", "kl.gradients"),
}


def checks_before(pass_: str) -> tuple[str, ...]:
    """The checks that a contestant must pass before a pass of it is timed."""
    if not is_operator(pass_):
        return CHECKS_BEFORE[pass_]
    name = f"operators.{called(pass_)}"
    backward = (f"{name}_gradients",) if operator_of(pass_)[1] else ()
    return (name, *(() if name.endswith("kl") else (f"{name}_lse",)), *backward)


@dataclass(frozen=True, slots=True)
class Request:
    """What `v32 bench` was asked for, as it was typed; `repeats` None: seven, or three above 2048 tokens."""

    config: str = "bench"
    subject: str = "optimized"
    against: str = "transformers"
    lengths: str = "512,1024,2048"
    passes: str = "fwd,fwd+bwd"
    backend: str | None = None
    batch: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    repeats: int | None = None
    floors: bool = False
    timeout: float = 900.0
    peak_tflops: float | None = None
    seed: int = 0
    overrides: tuple[str, ...] = ()
    out: Path = Path("runs/bench")


@dataclass(frozen=True, slots=True)
class Contest:
    """A request, checked: who is measured, on what. `plan` verifies the subject; the others share its case."""

    request: Request
    plan: Plan
    passes: tuple[str, ...]
    lengths: tuple[int, ...]
    contestants: tuple[str, ...]
    floors: tuple[Target, ...]

    @property
    def subject(self) -> str:
        """The contestant that is compared with the others."""
        return self.contestants[0]

    def groups(self) -> Iterator[list[Point]]:
        """The points that are measured together: a pass and length, from short to long."""
        r = self.request
        fields = json.loads(self.plan.config.to_json_string(use_diff=False))
        for length in self.lengths:
            for pass_ in self.passes:
                point = Point(self.subject, pass_, length, r.batch, r.dtype, r.device, r.threads, r.seed, fields)
                yield [point.of(name) for name in self.contestants]

    def repeats(self, length: int) -> int:
        """Samples of each point at a length."""
        return self.request.repeats or (MANY if length <= FEW_BEYOND else FEW)

    def checks(self, contestant: str) -> list[str]:
        """The checks that a contestant must pass before it is timed."""
        if contestant == DENSE_FLASH:
            # Another model, of which the harness has no reference; its worker asserts the kernel it is named after.
            return []
        wanted = [check for p in self.passes if not_applicable(contestant, p) is None for check in checks_before(p)]
        return list(dict.fromkeys(wanted))

    def reproduce(self, points: Iterable[Point]) -> str:
        """The command that measures the group of `points` again."""
        first = next(iter(points))
        return self.command(str(first.length), first.pass_)

    def command(self, lengths: str | None = None, pass_: str | None = None) -> str:
        """The command of the request, or of a part of it."""
        r = self.request
        words = ["v32", "bench", "--config", r.config, "--lengths", lengths or r.lengths, "--pass", pass_ or r.passes,
                 "--against", r.against]  # fmt: skip
        for flag, value, default in (
            ("--subject", r.subject, "optimized"), ("--backend", r.backend, None), ("--batch", r.batch, 1),
            ("--device", r.device, "cpu"), ("--dtype", r.dtype, "float32"), ("--threads", r.threads, 1),
            ("--repeats", r.repeats, None), ("--seed", r.seed, 0),
        ):  # fmt: skip
            words += [] if value == default else [flag, str(value)]
        for entry in r.overrides:
            words += ["--set", entry]
        return shlex.join(words + (["--floors"] if r.floors else []))


def check_request(request: Request) -> Contest:
    """What a request amounts to.

    Raises:
        ValueError: anything that cannot be done, as one sentence that names the argument.
    """
    passes = _words(request.passes)
    for name in passes:
        if name not in (*PASSES, *OPERATOR_PASSES):
            raise ValueError(
                f"--pass names {name!r}; allowed are {', '.join(PASSES)}, and of operators {', '.join(OPERATOR_PASSES)}, "
                "separated by commas."
            )
    lengths = sorted({_length(word) for word in _words(request.lengths)})
    if not passes or not lengths:
        raise ValueError("--pass and --lengths must each name something.")
    if request.dtype not in DTYPES:
        raise ValueError(f"--dtype is {request.dtype!r}; allowed is one of {', '.join(DTYPES)}.")
    if request.threads < 1:
        raise ValueError(f"--threads is {request.threads}; it must be 1 or more.")
    if request.batch < 1:
        raise ValueError(f"--batch is {request.batch}; it must be 1 or more.")
    if request.repeats is not None and request.repeats < LEAST_SAMPLES:
        raise ValueError(f"--repeats is {request.repeats}; it must be {LEAST_SAMPLES} or more.")
    if not 0 < request.timeout < float("inf"):
        raise ValueError(f"--timeout is {request.timeout}; it must be a number of seconds above 0.")
    if request.peak_tflops is not None and not 0 < request.peak_tflops < float("inf"):
        raise ValueError(f"--peak-tflops is {request.peak_tflops}; it must be a number of TFLOP/s above 0.")
    # Of the passes' own text only a prefix is verified, in the shape that `v32 verify` takes.
    plan = verify.plan_for(
        verify.Request(
            config=request.config, subject=request.subject, checks="all", cases="text,causal", batch=1, device=request.device,
            dtype=request.dtype, backend=request.backend, seed=request.seed, overrides=request.overrides,
        )
    )  # fmt: skip
    verify.check_length(lengths[-1], plan.config, "--lengths", SHORTEST)
    peers = [] if request.against == NONE else _words(request.against)
    if not peers and request.against != NONE:
        raise ValueError(f"--against is empty; it must name a contestant, or be {NONE}.")
    subject = request.subject if request.backend is None else f"{request.subject}:{request.backend}"
    contestants = (subject, *peers)
    if repeated := [name for i, name in enumerate(contestants) if name in contestants[:i]]:
        raise ValueError(f"--against names {repeated[0]!r}, which is measured already; name each contestant once.")
    for name in contestants:
        if name != DENSE_FLASH:
            _resolved(name)
    if all(not_applicable(subject, pass_) for pass_ in passes):
        raise ValueError(
            f"--pass is {request.passes!r}, but {subject} cannot run it: {not_applicable(subject, passes[0])}."
        )
    return Contest(
        request, plan, tuple(passes), tuple(lengths), contestants, _floors(request, plan, passes, lengths, peers)
    )


def _resolved(name: str) -> None:
    try:
        contestant_subject(name)
    except ValueError as error:
        raise ValueError(f"{one_sentence(error)} --against also takes {DENSE_FLASH} and optimized:BACKEND.") from error


def _floors(
    request: Request, plan: Plan, passes: list[str], lengths: list[int], peers: list[str]
) -> tuple[Target, ...]:
    changed = {name: getattr(plan.config, name) for name in (entry.partition("=")[0] for entry in request.overrides)}
    plain = (request.dtype, request.device, request.threads) == ("float32", "cpu", 1)
    found = applicable(request.config, changed, request.batch, passes, lengths, peers, plain=plain)
    if request.floors and not found:
        raise ValueError(
            "--floors: no floor is on record for these points; there are floors for --config bench in fp32 on one CPU "
            "thread, at lengths 512, 2048 and 8192 against transformers, and for others that the documentation lists."
        )
    return tuple(found)


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _length(word: str) -> int:
    if not word.isdecimal() or int(word) < SHORTEST:
        raise ValueError(f"--lengths names {word!r}; lengths are numbers of tokens, {SHORTEST} or more.")
    return int(word)


def bench(request: Request, console: Console) -> int:
    """Run the request; returns the exit code. Records are written as they come, the report at the end."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    errors = Console(stderr=True)
    try:
        contest = check_request(request)
        begin_in(request.out)
    except ValueError as error:
        print_line(errors, f"v32 bench: {one_sentence(error)}")
        return USAGE_ERROR
    torch.set_num_threads(request.threads)
    header = _header(contest)
    total = sum(len(group) for group in contest.groups()) + (len(contest.floors) if request.floors else 0)
    total += sum(len(contest.checks(name)) for name in contest.contestants)
    try:
        with RunWriter(request.out / RUN_FILE, header) as writer, Progress(console, total=total) as progress:
            _run(contest, writer, progress)
    except KeyboardInterrupt:
        return finish(request.out, console) or 130
    except OSError as error:
        print_line(errors, f"v32 bench: {request.out} cannot be written: {error.strerror or error}.")
        return 3
    return finish(request.out, console)


def _header(contest: Contest) -> dict[str, object]:
    request, command = contest.request, command_line("bench")
    environment = capture(command, seeds={"weights and text": request.seed})
    load = [round(value, 2) for value in os.getloadavg()]
    return {
        "subject": contest.subject,
        "claim": "every point that applies was measured" + (", and every floor is met" if request.floors else ""),
        "config": request.config,
        "config_fields": json.loads(contest.plan.config.to_json_string(use_diff=False)),
        "device_asked": request.device,
        "device": str(contest.plan.device),
        "dtypes": [request.dtype],
        "backend": request.backend or "default",
        "seed": request.seed,
        "bench": {
            "subject": contest.subject, "against": list(contest.contestants[1:]), "passes": list(contest.passes),
            "lengths": list(contest.lengths), "batch": request.batch, "threads": request.threads,
            "floors": request.floors, "peak_tflops": request.peak_tflops, "paired": "one live process a contestant, asked in turn: A B A B",
        },
        "command": " ".join(command),
        # What else runs on the machine is a part of the conditions.
        "environment": {**environment, "load_average": load},
    }  # fmt: skip


@dataclass(slots=True)
class _Out:
    """Contestants that are not timed, and why."""

    reasons: dict[str, str] = field(default_factory=dict)

    def why(self, point: Point, subject: str) -> tuple[Status, str] | None:
        if (missing := not_applicable(point.contestant, point.pass_)) is not None:
            return Status.NOT_APPLICABLE, f"{point.contestant} has no such pass: {missing}"
        if point.contestant in self.reasons:
            return Status.SKIPPED, f"{point.contestant} was not timed: {self.reasons[point.contestant]}"
        if subject in self.reasons:
            return Status.SKIPPED, f"{point.contestant} was not timed: {subject} is out, and it is what is compared"
        return None


def _run(contest: Contest, writer: RunWriter, progress: Progress) -> None:
    out = _Out()
    verified = set()
    for contestant, verdict in _verified(contest, progress):
        writer.write(verdict)
        if verdict.status in FAILING:
            out.reasons.setdefault(contestant, f"{verdict.check} {verdict.status}")
        elif verdict.status is Status.VERIFIED:
            verified.add(contestant)
    for contestant in contest.contestants:
        if contest.checks(contestant) and contestant not in verified:
            out.reasons.setdefault(contestant, "nothing of it could be verified")
    found: list[Series] = []
    with ExitStack() as stack:
        machine = None
        for group in contest.groups():
            points = []
            for point in group:
                why = out.why(point, contest.subject)
                if why is None:
                    points.append(point)
                else:
                    _say(writer, progress, _not_timed(point, *why))
            if points and machine is None:
                machine = _machine(points[0], contest, stack, writer)
            if points:
                found += _measured(contest, points, machine, writer, progress)
    medians = medians_of(found)
    for who, pass_, growth in _growth(medians):
        writer.event("growth", contestant=who, **{"pass": pass_}, **growth)
    _judge_floors(contest, medians, writer, progress)


def _verified(contest: Contest, progress: Progress) -> Iterator[tuple[str, Verdict]]:
    """What `v32 verify` says of each contestant, in the modes that are timed, before anything is."""
    oracles = Oracles()
    dense = not contest.plan.config.use_sparse_attention
    for name in contest.contestants:
        passes = [pass_ for pass_ in contest.passes if not_applicable(name, pass_) is None]
        checks = []
        for check in select_checks(contest.checks(name)) if contest.checks(name) else ():
            of = [pass_ for pass_ in passes if check.name in checks_before(pass_)]
            modes = frozenset("dense" if dense or pass_ == WARM_UP else "sparse" for pass_ in of) | {"operators"}
            checks.append(replace(check, modes=check.modes & modes))
        plan = replace(contest.plan, subject=contestant_subject(name), checks=tuple(checks)) if checks else None
        for verdict in () if plan is None else run(plan, _Named(progress, name), oracles):
            yield name, replace(verdict, subject=name)


@dataclass(frozen=True, slots=True)
class _Named:
    """A sink that says whose verdicts these are."""

    progress: Progress
    name: str

    def start(self, check: str, case: str = "", dtype: str = "") -> None:
        self.progress.start(check, f"{self.name}: {case}", dtype)

    def done(self, verdict: Verdict) -> None:
        self.progress.done(replace(verdict, case=f"{self.name}: {verdict.case}"))


def _machine(point: Point, contest: Contest, stack: ExitStack, writer: RunWriter) -> Worker | None:
    machine = Worker(point.of(MACHINE), contest.request.timeout)
    stack.callback(machine.close)
    try:
        assert machine.ready is not None
    except WorkerError as error:
        writer.event("no matmul rate", reason=str(error))
        return None
    return machine


def _measured(
    contest: Contest, points: list[Point], machine: Worker | None, writer: RunWriter, progress: Progress
) -> list[Series]:
    """The group's series, in the record whatever ends them."""
    series: list[Series] = []
    try:
        measure(points, contest.repeats(points[0].length), contest.request.timeout, series, progress.start, machine)
    finally:
        for one in series:
            for measurement in one.measurements():
                writer.write(measurement)
    of_points = [one for one in series if one.point.contestant != MACHINE]
    for one in of_points:
        _say(writer, progress, one.verdict(contest.reproduce(points)))
    return of_points


def _not_timed(point: Point, status: Status, reason: str) -> Verdict:
    return Verdict(
        f"{FAMILY}.{point.contestant}",
        FAMILY,
        point.contestant,
        point.case,
        status,
        point.dtype,
        point.device,
        reason=reason,
    )


def _say(writer: RunWriter, progress: Progress, verdict: Verdict) -> None:
    writer.write(verdict)
    progress.done(verdict)


def _growth(medians: Medians) -> Iterator[tuple[str, str, dict[str, object]]]:
    """For each contestant and pass, how its time and its peak grow with the length."""
    for who, pass_ in dict.fromkeys((who, pass_) for who, pass_, _ in medians):
        for quantity in ("seconds", "peak_mib"):
            values = {n: m[quantity] for (w, p, n), m in medians.items() if (w, p) == (who, pass_)}
            fit, doubled = power_law(values), doublings(values)
            if doubled:
                yield who, pass_, {
                    "quantity": QUANTITIES[quantity],
                    "exponent": None if fit is None else fit.exponent,
                    "residual": None if fit is None else fit.residual,
                    "doublings": {str(length): ratio for length, ratio in doubled.items()},
                }  # fmt: skip


def _judge_floors(contest: Contest, medians: Medians, writer: RunWriter, progress: Progress) -> None:
    for target in contest.floors:
        judged = judge(target, contest.subject, medians)
        writer.event(
            "floor",
            claim=target.claim,
            found="" if judged is None else judged.text,
            met=None if judged is None else judged.met,
            judged=contest.request.floors,
            source=target.source,
        )
        if contest.request.floors:
            device = contest.request.device
            _say(writer, progress, floor_verdict(target, contest.subject, medians, device, contest.command()))
