"""`v32 plan`: from a request to parameters, memory, work and layouts, checked against what this machine can check."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from rich.console import Console

from optimized import DeepseekV32ForCausalLM
from optimized.distributed.layout import ParallelLayout
from optimized.ops.backend import default_backend
from reference import DeepseekV32Config
from reference.training import LORA_MODULES, LoraPart, add_lora, lora_parts, set_trainable, trainable_report
from reports.files import begin_in, files_written, write_reports
from reports.records import RUN_FILE, RecordError, RunWriter, read_run, run_exit_code
from reports.schema import Measure, NullCandidate, Verdict
from reports.strict_json import JSON
from reports.terminal import print_line, render

from .. import verify
from ..environment import capture
from ..runner import status_of
from ..training.stages import STAGES, Stage, stage_for
from ..verify import USAGE_ERROR, command_line
from .hardware import Cluster
from .layouts import Candidate, candidate, ranked
from .measured import Fraction, fraction
from .memory import memory
from .parameters import by_group
from .step import ITEMSIZES, Step
from .work import kl_flop

FAMILY = "plan"
# What the memory model may be off by where it is measured.
TOLERANCE = 0.15
# Of the step that is measured on this machine in each run.
PROBE_PRESET, PROBE_LENGTH = "tiny", 512
_LAYOUTS_KEPT = 24


@dataclass(frozen=True, slots=True)
class Request:
    """What `v32 plan` was asked for, as it was typed."""

    config: str = "v32"
    seq_len: int = 4096
    batch: int = 1
    stage: str = "sparse"
    attention: str | None = None
    lora: str = ""
    rank: int = 8
    dtype: str = "bfloat16"
    gpus: str = "8xH200"
    parallel: str | None = None
    checkpointing: bool | None = None
    headroom: float = 0.1
    tokens: float | None = None
    price: float | None = None
    measured: Path | None = None
    check: bool = True
    checkpoint: Path | None = None
    overrides: tuple[str, ...] = ()
    out: Path | None = None

    def command(self) -> str:
        """The command of this request."""
        words = ["v32", "plan"]
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("overrides", "checkpointing", "check") or value == item.default:
                continue
            words += [f"--{item.name.replace('_', '-')}", str(value)]
        for entry in self.overrides:
            words += ["--set", entry]
        if self.checkpointing is not None:
            words.append("--checkpointing" if self.checkpointing else "--no-checkpointing")
        return shlex.join(words)


@dataclass(frozen=True, slots=True)
class Job:
    """A request, checked."""

    request: Request
    stage: Stage
    step: Step
    cluster: Cluster
    fixed: ParallelLayout | None
    fraction: Fraction | str | None


def job_for(request: Request) -> Job:
    """What a request amounts to.

    Raises:
        ValueError: anything that cannot be planned, as one sentence that names the argument.
    """
    if request.stage not in STAGES:
        raise ValueError(f"--stage is {request.stage!r}; allowed are {', '.join(STAGES)}.")
    if request.dtype not in ITEMSIZES:
        raise ValueError(f"--dtype is {request.dtype!r}; allowed are {', '.join(ITEMSIZES)}.")
    for name, number in (("batch", request.batch), ("rank", request.rank)):
        if number < 1:
            raise ValueError(f"--{name} is {number}; it must be 1 or more.")
    if not 0 <= request.headroom < 1:
        raise ValueError(f"--headroom is {request.headroom}; it must be 0 or more and below 1.")
    for name, amount in (("tokens", request.tokens), ("price", request.price)):
        if amount is not None and not 0 < amount < float("inf"):
            raise ValueError(f"--{name} is {amount}; it must be a number above 0.")
    if request.price is not None and request.tokens is None:
        raise ValueError(f"--price is {request.price}, which needs --tokens, the run that is paid for.")
    config = _config(request)
    verify.check_length(request.seq_len, config, shortest=1)
    stage = stage_for(request.stage, config)
    if request.attention is not None:
        if request.stage != "sft" or request.attention not in ("dense", "sparse"):
            raise ValueError(f"--attention is {request.attention!r}; it is dense or sparse, of stage sft alone.")
        stage = replace(stage, sparse=request.attention == "sparse")
    lora = _lora(request, stage)
    cluster = Cluster.parse(request.gpus)
    fixed = ParallelLayout.parse(request.parallel) if request.parallel is not None else None
    if fixed is not None:
        if fixed.world != cluster.count:
            raise ValueError(
                f"--parallel is {request.parallel!r}, a layout for {fixed.world} GPUs; --gpus is {cluster}: one GPU a rank."
            )
        fixed.check(config, cluster.count)
        if lora and fixed.world > 1:
            raise ValueError(
                "--lora is of one GPU: a parallel model takes no adapters; leave out --parallel or --lora."
            )
    if lora and cluster.count > 1:
        raise ValueError(f"--gpus is {cluster}; with --lora it must be one GPU: a parallel model takes no adapters.")
    # Where the indexer alone trains, checkpointing keeps more than it saves.
    checkpointing = request.checkpointing if request.checkpointing is not None else stage.trains != "indexer"
    step = Step(
        config, request.seq_len, request.batch, stage.sparse, stage.trains, request.dtype, checkpointing, "triton", "blas",
        on_gpu=True, muon=stage.lr_matrices is not None, lora=lora, rank=request.rank,
    )  # fmt: skip
    found = None
    if request.measured is not None:
        try:
            found = fraction(request.measured, cluster.gpu, request.dtype, warm_up=stage.trains == "indexer")
        except (RecordError, OSError) as error:
            raise ValueError(f"--measured is {request.measured}, which is no record of v32 bench: {error}") from error
    return Job(request, stage, step, cluster, fixed, found)


def _config(request: Request) -> DeepseekV32Config:
    asked = verify.Request(config=request.config, overrides=request.overrides, checkpoint=request.checkpoint)
    return verify.config_of(asked)[0]


def _lora(request: Request, stage: Stage) -> tuple[LoraPart, ...]:
    allowed = lora_parts(stage.trains)
    parts = [part for part in request.lora.split(",") if part]
    for part in parts:
        if part not in LORA_MODULES or part not in allowed:
            raise ValueError(f"--lora names {part!r}; of stage {stage.name} these train: {', '.join(allowed)}.")
    return tuple(part for part in allowed if part in parts)


def plan(request: Request, console: Console) -> int:
    """Run the request; returns the exit code: 1 where no layout fits."""
    errors = Console(stderr=True)
    try:
        job = job_for(request)
        if request.out is not None:
            begin_in(request.out)
    except ValueError as error:
        print_line(errors, f"v32 plan: {error}")
        return USAGE_ERROR
    found = ranked(job.step, job.cluster, request.headroom, job.fixed)
    verdicts = [parameters_verdict(job), fits_verdict(job, found)]
    if request.check:
        verdicts.insert(1, memory_verdict(job))
    if request.out is None:
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as folder:
            return _written(job, found, verdicts, Path(folder), console)
    try:
        code = _written(job, found, verdicts, request.out, console)
    except OSError as error:
        print_line(errors, f"v32 plan: {request.out} cannot be written: {error.strerror or error}.")
        return 3
    write_reports(request.out, read_run(request.out))
    print_line(console, files_written(request.out))
    return code


def _written(
    job: Job, found: Sequence[Candidate], verdicts: Sequence[Verdict], folder: Path, console: Console
) -> int:  # fmt: skip
    """Write the record, and show what it holds."""
    command = command_line("plan")
    header = {
        "subject": "optimized",
        "claim": "the plan's counts are the model's, and a layout fits",
        "config": job.request.config if job.request.checkpoint is None else str(job.request.checkpoint),
        "device": str(job.cluster),
        "dtypes": [job.request.dtype],
        "plan": document(job, found),
        "command": " ".join(command),
        "environment": capture(command, seeds={}),
    }
    with RunWriter(folder / RUN_FILE, header) as writer:
        for verdict in verdicts:
            writer.write(verdict)
    run = read_run(folder)
    render(run, console)
    return run_exit_code(run)


def document(job: Job, found: Sequence[Candidate]) -> dict[str, JSON]:
    """The plan as numbers: bytes, FLOP, seconds."""
    best, step = found[0], job.step
    groups = by_group(step.parameters)
    fitting = [one for one in found if not one.why]
    return {
        "stage": job.stage.name, "trains": step.trains, "path": step.path, "length": step.length, "batch": step.batch,
        "checkpointing": step.checkpointing, "dtype": step.dtype, "lora": list(step.lora),
        "gpu": asdict(job.cluster.gpu), "gpus": job.cluster.count, "headroom": job.request.headroom,
        "parameters": [{"group": group, "count": count, "trainable": trained} for group, (count, trained) in groups.items()],
        "layouts": [_numbers(one) for one in found[:_LAYOUTS_KEPT]], "layouts_tried": len(found), "layouts_that_fit": len(fitting),
        "kl": {"dense": kl_flop(step, dense=True), "selected": kl_flop(replace(step, sparse=True), dense=False)},
        "measured": None if job.fraction is None or isinstance(job.fraction, str) else asdict(job.fraction),
        "not_measured": job.fraction if isinstance(job.fraction, str) else None,
        "cost": _cost(job, best),
    }  # fmt: skip


def _numbers(one: Candidate) -> dict[str, JSON]:
    found: dict[str, JSON] = {"layout": one.name, "why": one.why}
    if one.memory is not None and one.work is not None:
        found |= {
            "memory": {**asdict(one.memory), "total": one.memory.total}, "flop": dict(one.work.flop),
            "sent": dict(one.work.sent), "seconds": {**one.work.seconds, "floor": one.work.floor},
            "tokens": one.tokens, "tokens_a_second": one.tokens_a_second,
        }  # fmt: skip
    return found


def _cost(job: Job, best: Candidate) -> JSON:
    """GPU hours of `--tokens` by the best layout at its floor, and what they cost."""
    if job.request.tokens is None or best.work is None or best.why:
        return None
    hours = job.request.tokens / best.tokens_a_second * job.cluster.count / 3600
    share = job.fraction.share if isinstance(job.fraction, Fraction) else None
    return {
        "tokens": job.request.tokens, "gpu_hours_at_floor": hours, "gpu_hours_measured": None if share is None else hours / share,
        "price": job.request.price,
    }  # fmt: skip


def parameters_verdict(job: Job) -> Verdict:
    """`plan.parameters`: counts by group are those of the model itself, built without memory for its weights."""
    step = job.step
    with torch.device("meta"):
        model: torch.nn.Module = DeepseekV32ForCausalLM(step.config)
        if step.lora:
            model = add_lora(model, step.lora, rank=step.rank)
        else:
            set_trainable(model, step.trains)
    true = {count.group: (count.parameters, count.trainable) for count in trainable_report(model)}
    own = by_group(step.parameters)

    def apart(counts: dict[str, tuple[int, int]]) -> int:
        return sum(
            abs(a - b)
            for group in {*true, *counts}
            for a, b in zip(true.get(group, (0, 0)), counts.get(group, (0, 0)), strict=True)
        )

    nulls = (
        NullCandidate("without the indexer", apart({g: n for g, n in own.items() if g != "indexer"}) > 0),
        NullCandidate("everything trains and nothing", apart({g: (n, n - t) for g, (n, t) in own.items()}) > 0),
        NullCandidate("a parameter more", apart({**own, "norms": (own["norms"][0] + 1, own["norms"][1])}) > 0),
    )
    measures = [Measure("parameters apart from the model's", apart(own), 0)]
    return _verdict("plan.parameters", job, measures, nulls, f"{sum(n for n, _ in true.values()):,} parameters")


def memory_verdict(job: Job) -> Verdict:
    """`plan.memory`: the same model of memory, for a small config of the same stage, against this machine's allocator."""
    # Its profiler costs a second of imports.
    from .measure import here, measure

    config = DeepseekV32Config.preset(PROBE_PRESET)
    probe = replace(
        job.step, config=config, length=PROBE_LENGTH, batch=1, dtype="float32",
        backend=default_backend(torch.device("cpu")), linear=here("float32"),
        on_gpu=False, layout=ParallelLayout(), lora=(),
    )  # fmt: skip
    planned, true = memory(probe), measure(probe, replace(stage_for(job.stage.name, config), sparse=probe.sparse))
    held = true.weights + true.optimizer

    def off(growth: float, state: float) -> float:
        return max(
            abs(growth / true.growth - 1), abs(state / true.optimizer - 1), abs((planned.weights + state) / held - 1)
        )

    every = sum(2 * parameter.count * probe.itemsize for parameter in probe.parameters)
    nulls = [
        NullCandidate("half of the activations", off(planned.growth / 2, planned.optimizer) > TOLERANCE),
        NullCandidate("activations half as large again", off(1.5 * planned.growth, planned.optimizer) > TOLERANCE),
    ]
    if probe.trains != "all":
        nulls.append(NullCandidate("optimizer state of frozen parameters", off(planned.growth, every) > TOLERANCE))
    measures = [Measure("planned over measured, − 1", off(planned.growth, planned.optimizer), TOLERANCE)]
    case = f"{PROBE_PRESET} at {PROBE_LENGTH} tokens on this CPU"
    return _verdict(
        "plan.memory", job, measures, tuple(nulls), f"measured peak growth {true.growth / 2**20:.1f} MiB", case
    )


def fits_verdict(job: Job, found: Sequence[Candidate]) -> Verdict:
    """`plan.fits`: some layout fits, the best one with the headroom that was asked for."""
    best = found[0]
    if best.memory is None:
        needed, reason = float("inf"), best.why
    else:
        needed, reason = best.memory.total / job.cluster.gpu.memory, best.why or f"best layout {best.name}"
    room = 1 - job.request.headroom
    tiny = replace(job.cluster, gpu=replace(job.cluster.gpu, memory=1e6))
    nulls = (
        NullCandidate(
            "GPUs of a megabyte", bool(candidate(job.step, best.layout, tiny, job.request.headroom).why), best.name
        ),
    )
    return _verdict("plan.fits", job, [Measure("share of a GPU's memory", needed, room)], nulls, reason)


def _verdict(
    check: str, job: Job, measures: Sequence[Measure], nulls: tuple[NullCandidate, ...], reason: str, case: str = ""
) -> Verdict:  # fmt: skip
    return Verdict(
        check, FAMILY, "optimized", case or f"{job.request.config}, stage {job.stage.name}",
        status_of(list(measures), list(nulls)), reason=reason, measures=tuple(measures), nulls=nulls,
        reproduce=job.request.command(),
    )  # fmt: skip
