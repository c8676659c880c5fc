"""`v32 train`: from a request to a stage, its model, a record that survives a kill, a report and a checkpoint."""

import json
import math
import shlex
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from rich.console import Console
from torch import nn

import optimized
import reference
from reference import DeepseekV32Config
from reference.checkpoint import read_config
from reference.training import LORA_MODULES, LoraPart, add_lora, lora_parts, merge_lora
from reports.files import begin_in, finish
from reports.live import LiveTraining
from reports.records import RUN_FILE, RecordError, read_run
from reports.strict_json import JSON
from reports.terminal import print_line

from .. import verify
from ..environment import capture
from ..runner import DTYPES
from ..verify import SMALL, USAGE_ERROR, command_line, one_sentence
from .data import Mixture, sources
from .loop import MEASURE_EVERY, SAVE_EVERY, Listener, Trained, train
from .ranks import RankLost, connected, is_first, layout_of, on_first, own_device
from .record import Recorder
from .stages import STAGES, Phase, Stage, stage_for
from .state import states
from .tasks import SHORTEST

if TYPE_CHECKING:
    from optimized.distributed import ParallelLayout

CHECKPOINT, ADAPTER = "checkpoint", "adapter"
NOTHING_VERIFIED, INTERRUPTED = 3, 130
MODELS: dict[str, Any] = {"optimized": optimized.DeepseekV32ForCausalLM, "reference": reference.DeepseekV32ForCausalLM}
# What a stage starts from, besides a random model.
BEFORE = {"warmup": "dense", "sparse": "warmup", "sft": "sparse"}


@dataclass(frozen=True, slots=True)
class Request:
    """What `v32 train` was asked for, as it was typed; None leaves a number to the stage's recipe."""

    stage: str
    config: str | None = None
    model: str = "optimized"
    init: Path | None = None
    attention: str | None = None
    lora: str = ""
    rank: int = 8
    steps: int | None = None
    seq_len: int | None = None
    batch: int | None = None
    lr: float | None = None
    lr_matrices: float | None = None
    lr_indexer: float | None = None
    dtype: str = "float32"
    device: str = "cpu"
    parallel: str = ""
    seed: int = 0
    save_every: int = SAVE_EVERY
    measure_every: int = MEASURE_EVERY
    overrides: tuple[str, ...] = ()
    resume: bool = False
    out: Path = Path("runs/train")

    def command(self, **changes: Any) -> str:
        """The command of this request, with `changes`; it names its folder."""
        asked = replace(self, **changes)
        words = [*_program(asked.parallel), "train", "--stage", asked.stage]
        for item in fields(asked):
            value = getattr(asked, item.name)
            if item.name in ("stage", "out", "resume", "overrides") or value == item.default:
                continue
            words += [f"--{item.name.replace('_', '-')}", str(value)]
        for entry in asked.overrides:
            words += ["--set", entry]
        return shlex.join([*words, *(["--resume"] if asked.resume else []), "--out", str(asked.out)])


@dataclass(frozen=True, slots=True)
class Job:
    """A request, checked."""

    request: Request
    config: DeepseekV32Config
    stage: Stage
    lora: tuple[LoraPart, ...]
    device: torch.device
    weights: Path | None
    layout: "ParallelLayout | None" = None

    def model(self) -> nn.Module:
        """The model that the stage starts from: of a checkpoint, or drawn from the seed; with adapters where asked for.

        With a layout it is this rank's part of it, and the process group must be running.

        Raises:
            ValueError: a checkpoint that is not one of this model.
        """
        model_class, dtype = MODELS[self.request.model], DTYPES[self.request.dtype]
        torch.manual_seed(self.request.seed)
        if self.weights is not None:
            model = model_class.from_pretrained(self.weights, dtype=dtype)
        else:
            model = model_class(self.config)
        model = model.to(self.device, dtype)
        torch.manual_seed(self.request.seed)
        if self.layout is not None:
            from optimized.distributed import parallelize

            return parallelize(model, self.layout)
        adapted: nn.Module = add_lora(model, self.lora, rank=self.request.rank) if self.lora else model
        return adapted


def job_for(request: Request) -> Job:
    """What a request amounts to.

    Raises:
        ValueError: anything that cannot be done, as one sentence that names the argument.
    """
    if request.stage not in STAGES:
        raise ValueError(f"--stage is {request.stage!r}; allowed are {', '.join(STAGES)}.")
    if request.model not in MODELS:
        raise ValueError(f"--model is {request.model!r}; allowed are {', '.join(MODELS)}.")
    if request.dtype not in DTYPES:
        raise ValueError(f"--dtype is {request.dtype!r}; allowed are {', '.join(DTYPES)}.")
    for name, number, least in (
        ("steps", request.steps, 1), ("seq-len", request.seq_len, SHORTEST), ("batch", request.batch, 1),
        ("rank", request.rank, 1), ("save-every", request.save_every, 1), ("measure-every", request.measure_every, 1),
    ):  # fmt: skip
        if number is not None and number < least:
            raise ValueError(f"--{name} is {number}; it must be {least} or more.")
    for name, rate in (("lr", request.lr), ("lr-matrices", request.lr_matrices), ("lr-indexer", request.lr_indexer)):
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"--{name} is {rate}; it must be a finite number above 0.")
    if not 0 <= request.seed < 2**31:
        raise ValueError(f"--seed is {request.seed}; it must be 0 … 2³¹ − 1.")
    config, weights = _start(request)
    stage = _stage(request, config)
    lora = _lora(request, stage)
    if lora:
        # Adapters alone train; nothing balances the router under them.
        stage = replace(stage, bias_rate=0.0)
    # Refuses a vocabulary without the markers.
    Mixture(config, request.seed)
    layout = _layout(request, config, stage)
    device = own_device(verify.device_of(request.device)) if layout is not None else verify.device_of(request.device)
    return Job(request, config, stage, lora, device, weights, layout)


def _layout(request: Request, config: DeepseekV32Config, stage: Stage) -> "ParallelLayout | None":
    layout = layout_of(request.parallel)
    if layout is None:
        return None
    for name, value, plain in (("--model", request.model, "optimized"), ("--lora", request.lora, "")):
        if value != plain:
            raise ValueError(f"{name} is {value!r}, which --parallel does not know; leave one of them out.")
    layout.check(config, layout.world)
    fewest = min(phase.batch_size for phase in stage.phases)
    if fewest < layout.batches:
        raise ValueError(
            f"--batch is {fewest}; with --parallel {request.parallel} it must be {layout.batches} or more."
        )
    return layout


def _start(request: Request) -> tuple[DeepseekV32Config, Path | None]:
    if request.init is None:
        config, _ = verify.config_of(verify.Request(config=request.config or "tiny", overrides=request.overrides))
        return config, None
    if request.config is not None or request.overrides:
        given = "--config" if request.config is not None else "--set"
        raise ValueError(
            f"{given} cannot be given with --init, whose checkpoint holds the config; leave one of them out."
        )
    if not request.init.is_dir():
        raise ValueError(f"--init is {str(request.init)!r}, which is not a directory.")
    # The folder of an earlier stage holds its checkpoint.
    inner = request.init / CHECKPOINT
    weights = inner if inner.is_dir() else request.init
    if weights == request.init and states(request.init):
        raise ValueError(f"--init is {str(request.init)!r}, a run that has not ended: it has no {CHECKPOINT} yet.")
    return read_config(weights), weights


def _stage(request: Request, config: DeepseekV32Config) -> Stage:
    stage = stage_for(request.stage, config)
    if request.attention is not None:
        if request.attention not in ("dense", "sparse"):
            raise ValueError(f"--attention is {request.attention!r}; allowed are dense, sparse.")
        if stage.name != "sft":
            raise ValueError(f"--attention is a choice of stage sft; stage {stage.name} has one mode: leave it out.")
        stage = replace(stage, sparse=request.attention == "sparse")
    if request.lr_indexer is not None and stage.trains == "model":
        raise ValueError(f"--lr-indexer is given, but stage {stage.name} does not train the indexer: leave it out.")
    if request.lr_matrices is not None and stage.trains == "indexer":
        raise ValueError(f"--lr-matrices is given, but stage {stage.name} trains the indexer alone: leave it out.")
    phases = _shortened(stage, request.steps) if request.steps is not None else stage.phases
    phases = tuple(Phase(p.steps, request.seq_len or p.length, request.batch or p.batch_size, p.shares) for p in phases)
    steps = sum(phase.steps for phase in phases)
    stage = replace(stage, phases=phases, ramp=round(stage.ramp * steps / stage.steps))
    if request.lr is not None:
        # Where the indexer alone trains there is one rate.
        stage = replace(stage, lr=request.lr, lr_indexer=request.lr if stage.trains == "indexer" else stage.lr_indexer)
    if request.lr_matrices is not None:
        stage = replace(stage, lr_matrices=request.lr_matrices)
    if request.lr_indexer is not None:
        stage = replace(stage, lr_indexer=request.lr_indexer)
    return stage


def _shortened(stage: Stage, steps: int) -> list[Phase]:
    """The stage's phases in the same proportions, `steps` together; what would have none is left out."""
    found, done, before = [], 0, 0
    for phase in stage.phases:
        before += phase.steps
        end = round(steps * before / stage.steps)
        if end > done:
            found.append(replace(phase, steps=end - done))
        done = end
    return found


def _lora(request: Request, stage: Stage) -> tuple[LoraPart, ...]:
    chosen = [word.strip() for word in request.lora.split(",") if word.strip()]
    allowed = lora_parts(stage.trains)
    for part in chosen:
        if part not in allowed:
            why = f"; stage {stage.name} does not train it" if part in LORA_MODULES else ""
            raise ValueError(f"--lora names {part!r}{why}; allowed here are {', '.join(allowed)}, separated by commas.")
    if request.lora and not chosen:
        raise ValueError(f"--lora is {request.lora!r}, which names nothing; allowed here are {', '.join(allowed)}.")
    return tuple(cast(LoraPart, part) for part in dict.fromkeys(chosen))


def _program(parallel: str) -> list[str]:
    """What starts a command on as many ranks as `parallel` needs."""
    if not parallel:
        return ["v32"]
    from optimized.distributed import ParallelLayout

    return ["torchrun", "--nproc-per-node", str(ParallelLayout.parse(parallel).world), "-m", "harness.cli"]


def run_training(request: Request, console: Console) -> int:
    """Run the request; returns the exit code. The record is written as it goes, report and checkpoint at the end."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Of several ranks the first alone is heard, until one is lost.
    errors = Console(stderr=True, quiet=not is_first())
    console = console if is_first() else Console(quiet=True)
    try:
        job = job_for(request)
        _check_out(request)
    except ValueError as error:
        # Each rank says so: torchrun stops all of them once one has ended, and the first may not have spoken yet.
        print_line(Console(stderr=True), f"v32 train: {one_sentence(error)}")
        return USAGE_ERROR
    try:
        with connected(job.layout, job.device):
            return _run(job, console, errors)
    except RankLost as error:
        print_line(Console(stderr=True), f"v32 train: {error} {_how_to_go_on(request)}")
        return NOTHING_VERIFIED


def _run(job: Job, console: Console, errors: Console) -> int:
    request = job.request
    try:
        model = job.model()
        on_first(lambda: begin_in(request.out))
    except ValueError as error:
        print_line(errors, f"v32 train: {one_sentence(error)}")
        return USAGE_ERROR
    if job.device.type == "cpu" and sum(p.numel() for p in model.parameters()) < SMALL:
        # The barrier at the end of each operation costs more threads than such a model has work for.
        torch.set_num_threads(1)
    for note in _notes(job):
        print_line(console, note)
    try:
        trained = _trained(job, model, console)
        if trained.problem is None:
            _save_checkpoint(job, trained, console)
        else:
            print_line(console, "The stage failed: no checkpoint was saved.")
    except KeyboardInterrupt:
        if is_first():
            finish(request.out, console)
        print_line(console, f"Interrupted. {_how_to_go_on(request)}")
        return INTERRUPTED
    except (ValueError, RecordError) as error:
        print_line(errors, f"v32 train: {one_sentence(error)}")
        return USAGE_ERROR
    except OSError as error:
        why = error.strerror or one_sentence(error)
        print_line(errors, f"v32 train: {request.out} cannot be written: {why.rstrip('.')}. {_how_to_go_on(request)}")
        return NOTHING_VERIFIED
    code = on_first(lambda: finish(request.out, console))
    if trained.problem is not None:
        print_line(errors, f"v32 train: {trained.problem}")
    return code


def _check_out(request: Request) -> None:
    found = states(request.out)
    if found and not request.resume:
        raise ValueError(
            f"--out is {str(request.out)!r}, which holds a run that has done {found[-1][0]} steps; "
            "add --resume to go on with it, or name another folder."
        )
    if request.resume and not found and (request.out / RUN_FILE).exists():
        # Empty where the process died before its first line.
        header = read_run(request.out).header
        if header and "training" not in header:
            raise ValueError(
                f"--resume: {request.out / RUN_FILE} is of {header.get('command', 'another run')!r}, and not of a training; "
                "name the --out of a training, or a new one."
            )


def _notes(job: Job) -> list[str]:
    """What a user may not have meant, and should know."""
    found = []
    if job.weights is None and job.stage.name != "dense":
        found.append(
            f"No --init: stage {job.stage.name} starts from random weights, whose attention is nearly even; "
            f"--init takes the folder of a {BEFORE[job.stage.name]} run."
        )
    if job.request.resume and not states(job.request.out):
        found.append(f"--resume: {job.request.out} holds no state; the stage starts at its first step.")
    return found


def _trained(job: Job, model: nn.Module, console: Console) -> Trained:
    request = job.request
    lora = {"parts": list(job.lora), "rank": request.rank} if job.lora else None
    identity: dict[str, JSON] = {"model": request.model, "dtype": request.dtype, "lora": lora}
    with ExitStack() as stack:
        listener = Listener()
        if is_first():
            live = stack.enter_context(LiveTraining(console, job.stage.name, job.stage.steps))
            listener = Recorder(request.out, _header(job), stack, live, request.model, request.command(resume=True))
        return train(
            model, job.stage, Mixture(job.config, request.seed), seed=request.seed, out=request.out,
            resume=request.resume, save_every=request.save_every, measure_every=request.measure_every,
            identity=identity, listener=listener,
        )  # fmt: skip


def _header(job: Job) -> Mapping[str, JSON]:
    request, command = job.request, command_line("train")
    return {
        "subject": request.model,
        "claim": f"stage {job.stage.name} trained whom it should, and nobody else",
        "config": request.config or ("tiny" if job.weights is None else str(request.init)),
        "config_fields": json.loads(job.config.to_json_string(use_diff=False)),
        "device_asked": request.device,
        "device": str(job.device),
        "dtypes": [request.dtype],
        "seed": request.seed,
        "text": {"source": "Python standard library", "sha256": sources().train_sha256},
        "weights": "random" if job.weights is None else "checkpoint",
        "training": {
            "stage": job.stage.name,
            "steps": job.stage.steps,
            "lora": list(job.lora),
            **({} if job.layout is None else {"parallel": asdict(job.layout)}),
        },
        "command": " ".join(command),
        "environment": capture(command, seeds={"weights and data": request.seed}),
    }


def _save_checkpoint(job: Job, trained: Trained, console: Console) -> None:
    """The weights in the official names, adapters merged in; the adapters also by themselves, as peft reads them."""
    out = job.request.out
    if job.lora:
        _replace_folder(out / ADAPTER, lambda folder: cast(Any, trained.model).save_pretrained(folder))
    model = cast(Any, merge_lora(trained.model) if job.layout is None else _gathered(trained.model))
    if model is None:
        return
    # A warmed-up indexer is there to be used; after a dense stage there is none yet.
    model.config.use_sparse_attention = job.stage.sparse or job.stage.trains != "model"
    _replace_folder(out / CHECKPOINT, model.save_pretrained)
    print_line(console, f"Checkpoint: {out / CHECKPOINT}" + (f" · adapter: {out / ADAPTER}" if job.lora else ""))


def _gathered(model: nn.Module) -> nn.Module | None:
    """The plain model on the first rank, None on the others."""
    from optimized.distributed import plain_model

    return plain_model(cast(Any, model))


def _replace_folder(folder: Path, save: Any) -> None:
    partial = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    save(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _how_to_go_on(request: Request) -> str:
    found = states(request.out)
    kept = f"The state after {found[-1][0]} steps is kept" if found else "No state was written yet"
    return f"{kept}; go on with: {request.command(resume=True)}"
