"""`v32 verify --checkpoint ID --layerwise`: from a request to a walk, its record, a report and an exit code."""

import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import transformers
from rich.console import Console

from optimized import implementations
from reference import DeepseekV32Config
from reports.files import begin_in, finish
from reports.records import JSON, RUN_FILE, Measurement, RecordError, RunWriter, read_run
from reports.terminal import Progress, print_line
from reports.text import duration

from ..environment import capture, without_paths
from ..runner import DTYPES
from ..subjects import Subject, resolve_subject, with_backend
from ..verify import AUTO, HUGE, SMALL, USAGE_ERROR, check_length, command_line, device_of, length_for, one_sentence
from .judge import FAMILY, stages_of
from .layer import LayerFiles
from .needs import Needs, Rates, measure_rates, memory_warning, needs_of
from .progress import (
    LAYER_EVENT,
    STATE_FILE,
    State,
    identity_of,
    open_record,
    read_before,
    restore,
    save,
    take_over,
)
from .source import CutError, Source, config_of, locate
from .tokens import tokens
from .walk import Walk

NOTHING_VERIFIED, INTERRUPTED = 3, 130
# Rows enough that a wrong selection shows, in a model whose index_topk is small.
SHORTEST = 96
REFERENCE = "reference (fp64), layer by layer"
NEEDS_CAPABILITIES = ("model", "tape")


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for, as it was typed. `until`: how many layers are walked, all unless told.

    `downloaded`: all files of a model of the hub are in its cache, and the hub is not asked.
    """

    checkpoint: str
    revision: str | None = None
    subject: str = "optimized"
    seq_len: int | None = None
    batch: int | None = None
    device: str = "cpu"
    dtype: str = AUTO
    backend: str | None = None
    seed: int = 0
    until: int | None = None
    downloaded: bool = False
    resume: bool = False
    out: Path = Path("runs/layerwise")

    def command(self, until: int) -> str:
        """The command that walks as far as layer `until`, that one left out."""
        words = ["python", "-m", "harness.layerwise", "walk", without_paths(self.checkpoint)]
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("checkpoint", "until", "downloaded", "resume", "out") or value == item.default:
                continue
            words += [f"--{item.name.replace('_', '-')}", str(value)]
        return shlex.join([*words, "--until", str(until)])


@dataclass(frozen=True, slots=True)
class Job:
    """A request, checked: nothing but headers has been read."""

    request: Request
    source: Source
    walk: Walk
    ids_BL: torch.Tensor
    text: dict[str, JSON]
    layers: int
    needs: Needs
    rates: Rates
    identity: dict[str, JSON]


def check_settings(request: Request) -> tuple[Subject, torch.device, str]:
    """The subject, the device and the dtype's name; refuses what can be refused before the files are looked at.

    Raises:
        ValueError: anything that cannot be done, as one sentence that names the argument.
    """
    device = device_of(request.device)
    name = "bfloat16" if request.dtype == AUTO else request.dtype
    if name not in DTYPES:
        raise ValueError(f"--dtype is {request.dtype!r}; with --layerwise it must be one of {', '.join(DTYPES)}.")
    subject = resolve_subject(request.subject)
    if lacking := [capability for capability in NEEDS_CAPABILITIES if capability not in subject.capabilities]:
        raise ValueError(
            f"--subject is {request.subject!r}, which does not declare {lacking[0]}: --layerwise replays choices layer by layer."
        )
    if request.backend is not None:
        subject = with_backend(subject, request.backend, device)
    if not 0 <= request.seed < 2**31:
        raise ValueError(f"--seed is {request.seed}; it must be 0 … 2³¹ − 1.")
    if request.batch is not None and request.batch < 1:
        raise ValueError(f"--batch is {request.batch}; it must be 1 or more.")
    if request.seq_len is not None and request.seq_len < 8:
        raise ValueError(f"--seq-len is {request.seq_len}; it must be 8 or more.")
    if request.until is not None and request.until < 1:
        raise ValueError(f"--until is {request.until}; it must be 1 or more.")
    return subject, device, name


def size_of(request: Request, config: DeepseekV32Config) -> tuple[int, int, int]:
    """Rows, tokens a row and layers of a walk.

    Raises:
        ValueError: more layers than there are, or a length that the model has no positions for.
    """
    layers = config.num_hidden_layers if request.until is None else request.until
    if layers > config.num_hidden_layers:
        raise ValueError(f"--until is {layers}; it must be 1 … {config.num_hidden_layers}, the number of layers.")
    length = request.seq_len if request.seq_len is not None else max(length_for(config), SHORTEST)
    check_length(length, config)
    large = config.n_routed_experts * config.moe_intermediate_size * config.hidden_size > HUGE
    return request.batch if request.batch is not None else 1 if large else 2, length, layers


def check_config(request: Request, config: DeepseekV32Config, name: str) -> tuple[int, int, int]:
    """Rows, tokens a row and layers of a walk through the checkpoint `name`, which has this config.

    Raises:
        ValueError: a walk of it that cannot be.
    """
    if not config.use_sparse_attention:
        raise ValueError(f"Checkpoint {name}: use_sparse_attention is False; --layerwise judges selections.")
    return size_of(request, config)


def job_for(request: Request) -> Job:
    """The job of a request; a model of the hub is downloaded as far as it is missing.

    Raises:
        CutError: the hub's answer was cut; the same request goes on with the download.
        ValueError: anything that cannot be done, as one sentence that names the argument.
    """
    subject, device, name = check_settings(request)
    if not request.downloaded and not Path(request.checkpoint).exists():
        # A walk that cannot be is refused by this small file, and not after hours of a download.
        known = config_of(request.checkpoint, request.revision)
        if known is not None:
            check_config(request, known, request.checkpoint)
    source = locate(request.checkpoint, request.revision, downloaded=request.downloaded)
    files = LayerFiles(source.directory, DTYPES[name], device)
    config = files.config
    batch, length, layers = check_config(request, config, str(source.directory))
    if files.stored_bytes(layers - 1) < SMALL and device.type == "cpu":
        # The barrier at the end of each operation costs more threads than such a layer has work for.
        torch.set_num_threads(1)
    ids_BL, text = tokens(source.directory, config, batch, length, request.seed)
    rates = measure_rates(files)
    read = sum(files.stored_bytes(layer) for layer in range(layers))
    needs = needs_of(
        config, DTYPES[name], device.type, batch, length, layers,
        disk_bytes=files.stored_bytes(), read_bytes=read, rates=rates,
    )  # fmt: skip
    identity = {
        "checkpoint": identity_of(source, source.directory), "subject": request.subject, "backend": request.backend,
        "dtype": name, "device": device.type, "seed": request.seed, "tokens": [batch, length],
    }  # fmt: skip
    walk = Walk(subject, files, request.seed, lambda layer: request.command(layer + 1))
    return Job(request, source, walk, ids_BL, text, layers, needs, rates, identity)


def verify_layers(request: Request, console: Console) -> int:
    """Run the request; returns the exit code. The record is written as it goes, the report at the end."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    errors = Console(stderr=True)
    try:
        _check_out(request)
        job = job_for(request)
        state = _state_of(job) if request.resume else None
        begin_in(request.out)
    except CutError as error:
        print_line(errors, f"v32 verify: {one_sentence(error)}")
        return NOTHING_VERIFIED
    except ValueError as error:
        print_line(errors, f"v32 verify: {one_sentence(error)}")
        return USAGE_ERROR
    print_line(console, f"{_named(job.source)}: {job.needs.sentence()}")
    if warning := memory_warning(job.needs, job.walk.files.device):
        print_line(console, warning)
    try:
        _walked(job, state, console)
    except KeyboardInterrupt:
        finish(request.out, console)
        print_line(console, f"Interrupted. {_how_to_go_on(request)}")
        return INTERRUPTED
    except torch.OutOfMemoryError as error:
        finish(request.out, console)
        print_line(errors, f"v32 verify: {one_sentence(error)} {_how_to_go_on(request)}")
        return NOTHING_VERIFIED
    except ValueError as error:
        if not isinstance(error, RecordError) and (request.out / RUN_FILE).exists():
            finish(request.out, console)
        print_line(errors, f"v32 verify: {one_sentence(error)}")
        return USAGE_ERROR
    except OSError as error:
        why = error.strerror or one_sentence(error)
        print_line(errors, f"v32 verify: {request.out} cannot be written: {why.rstrip('.')}. {_how_to_go_on(request)}")
        return NOTHING_VERIFIED
    return finish(request.out, console)


def _check_out(request: Request) -> None:
    if (request.out / STATE_FILE).exists() and not request.resume:
        raise ValueError(
            f"--out is {str(request.out)!r}, which holds a walk that was begun; add --resume to go on with it, or name another folder."
        )


def _state_of(job: Job) -> State | None:
    """What the walk in `--out` has done; None where it has not done a layer.

    Raises:
        ValueError: the folder holds another run, or the walk is farther than `--until`, which would drop its layers.
    """
    out = job.request.out
    state = restore(out, job.identity)
    if state is None and (out / RUN_FILE).exists():
        # Empty where the process died before its first line.
        header = read_run(out).header
        if header and header.get("reference") != REFERENCE:
            raise ValueError(
                f"--resume: {out / RUN_FILE} is of {header.get('command', 'another run')!r}, and not of a walk; "
                "name the --out of a walk, or a new one."
            )
    if state is not None and state.layer > job.layers:
        raise ValueError(
            f"--until is {job.layers}, but the walk in {out} has done {state.layer} layers; ask for as many or more, or "
            "name another --out."
        )
    return state


def _walked(job: Job, state: State | None, console: Console) -> None:
    """Walk the layers behind `state`, and record each as it is done."""
    out, walk = job.request.out, job.walk
    done = 0 if state is None else state.layer
    before = read_before(out, done) if done else None
    with ExitStack() as stack:
        writer = stack.enter_context(open_record(out, _header(job), done))
        if before is not None:
            take_over(out, writer, before, done)
            print_line(
                console, f"--resume: {done} of {job.layers} layers are done; the walk goes on from layer {done}."
            )
        steps = sum(len(stages_of(walk.config, layer)) for layer in range(done, job.layers))
        shown = stack.enter_context(Progress(console, total=steps))
        x_BLM = walk.embedded(job.ids_BL) if state is None else state.x_BLM.to(walk.files.device)
        started = time.perf_counter()
        for layer in range(done, job.layers):
            x_BLM = _one(job, layer, x_BLM, writer, shown)
            save(out, State(layer + 1, x_BLM), job.identity)
            spent = (time.perf_counter() - started) / (layer + 1 - done)
            if layer + 1 < job.layers:
                shown.note(
                    f"layer {layer}: {duration(spent)} a layer, about {duration(spent * (job.layers - layer - 1))} to go"
                )
        if job.layers == walk.config.num_hidden_layers:
            for measurement in _losses(job, x_BLM):
                writer.write(measurement)


def _one(job: Job, layer: int, x_BLM: torch.Tensor, writer: RunWriter, shown: Progress) -> torch.Tensor:
    """Walk one layer; returns the next one's input."""
    started, files = time.perf_counter(), job.walk.files
    dtype = str(files.dtype).removeprefix("torch.")
    shown.start(FAMILY, f"layer {layer}", dtype)
    walked = job.walk.layer(layer, x_BLM)
    for stage in walked.stages:
        shown.start(f"{FAMILY}.{stage}", f"layer {layer}", dtype)
        verdict = walked.verdict(stage)
        writer.write(verdict)
        shown.done(verdict)
    out_BLM = walked.next_BLM
    writer.event(
        LAYER_EVENT, layer=layer, seconds=round(time.perf_counter() - started, 3), read_bytes=files.stored_bytes(layer),
        rounded_weights=len(files.rounded), hidden_rms=float(out_BLM.double().square().mean().sqrt()),
    )  # fmt: skip
    files.rounded.clear()
    return out_BLM


def _losses(job: Job, x_BLM: torch.Tensor) -> Iterator[Measurement]:
    """The reference's loss on the text: no verdict, but a checkpoint that is right and text it knows give a low one."""
    config = job.walk.config
    loss = job.walk.lm_loss(x_BLM, job.ids_BL)
    said = {"loss_means": job.text["loss_means"], "uniform": torch.tensor(float(config.vocab_size)).log().item()}
    yield Measurement("lm loss", "reference", "text", (loss,), "nats", said)


def _header(job: Job) -> Mapping[str, JSON]:
    request, walk, command = job.request, job.walk, typed()
    config, device = walk.config, walk.files.device
    name = _named(job.source)
    made_of = implementations(
        config, job.ids_BL.shape[1], backend=request.backend, device=device, dtype=walk.files.dtype
    )
    return {
        "subject": walk.subject.name,
        "reference": REFERENCE,
        "claim": f"{walk.subject.name} agrees with the reference in {job.layers} of {config.num_hidden_layers} layers of {name}",
        "config": name,
        "config_fields": json.loads(config.to_json_string(use_diff=False)),
        "capabilities": sorted(walk.subject.capabilities),
        "device_asked": request.device,
        "device": str(device),
        "dtypes": [job.identity["dtype"]],
        "implementations": {job.identity["dtype"]: made_of} if walk.subject.name == "optimized" else {},
        "seed": request.seed,
        "seq_len": job.ids_BL.shape[1],
        "batch": job.ids_BL.shape[0],
        "text": job.text,
        "weights": "checkpoint",
        "checkpoint": {"name": name, "commit": job.source.commit, "bytes": job.needs.disk_bytes,
                       "skipped_tensors": len(walk.files.checkpoint.skipped), "identity": job.identity["checkpoint"]},
        "needs": {**job.needs.facts(), "reading_bytes_per_second": job.rates.reading},
        "command": without_paths(" ".join(command)),
        "environment": capture(command, seeds={"text": request.seed}),
    }  # fmt: skip


def typed() -> list[str]:
    """The command as it was typed, of the command line or of this package."""
    own = Path(sys.argv[0]).parent.name == "layerwise"
    return ["python", "-m", "harness.layerwise", *sys.argv[1:]] if own else command_line("verify")


def _named(source: Source) -> str:
    return source.hub_id or without_paths(str(source.directory))


def _how_to_go_on(request: Request) -> str:
    kept = "The layers that are done are kept" if (request.out / STATE_FILE).exists() else "No layer was done yet"
    return f"{kept}; the same command with --resume goes on."
