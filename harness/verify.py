"""`v32 verify`: from a request to a plan, a record file, a report and an exit code."""

import ast
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console

from optimized import implementations
from reference import DeepseekV32Config, DeepseekV32ForCausalLM
from reference.checkpoint import read_config
from reports.files import begin_in, finish
from reports.records import RUN_FILE, RunWriter
from reports.terminal import Progress, print_line

from .cases import calibrated_state
from .environment import capture
from .runner import DTYPES, Plan, run, select_cases, select_checks
from .subjects import resolve_subject, with_backend
from .text import standard_library

USAGE_ERROR = 2
# Long enough to choose from, short enough for a CPU; a multiple of index_topk would hide an off-by-one.
LENGTHS = {"tiny": 96}
# A large model's gradients are large too: without a choice of cases, a plain and a packed one are run.
LARGE_CASES = ("text", "packed")
AUTO = "auto"
LARGE = 50_000_000
# From here on a CPU runs one sequence in fp32, and the reference some rows at a time; `--batch`, `--dtype`, `--cases` ask
# for more.
HUGE = 500_000_000
SMALL = 5_000_000


@dataclass(frozen=True)
class Request:
    """What `v32 verify` was asked for, as it was typed."""

    config: str = "tiny"
    subject: str = "optimized"
    checks: str = "all"
    cases: str = AUTO
    seq_len: int | None = None
    batch: int | None = None
    device: str = "cpu"
    dtype: str = AUTO
    backend: str | None = None
    seed: int = 0
    overrides: tuple[str, ...] = ()
    checkpoint: Path | None = None
    out: Path = Path("runs/verify")


def plan_for(request: Request) -> Plan:
    """The plan of a request.

    Raises:
        ValueError: anything that cannot be done, as one sentence that names the argument.
    """
    device = device_of(request.device)
    asked = ",".join(DTYPES) if request.dtype == AUTO else request.dtype
    dtypes = tuple(name for name in asked.split(",") if name)
    for name in dtypes:
        if name not in DTYPES:
            raise ValueError(f"--dtype names {name!r}; allowed are {', '.join(DTYPES)}, separated by a comma.")
    if not dtypes:
        raise ValueError(f"--dtype is empty; allowed are {', '.join(DTYPES)}, separated by a comma.")
    checks = select_checks(request.checks.split(","))
    cases, operator_cases = select_cases(["all"] if request.cases == AUTO else request.cases.split(","))
    if not checks or not (cases or operator_cases):
        raise ValueError("--checks and --cases must each name something; all stands for every one.")
    if request.batch is not None and request.batch < 1:
        raise ValueError(f"--batch is {request.batch}; it must be 1 or more.")
    if not 0 <= request.seed < 2**31:
        raise ValueError(f"--seed is {request.seed}; it must be 0 … 2³¹ − 1.")
    subject = resolve_subject(request.subject)
    if request.backend is not None:
        subject = with_backend(subject, request.backend, device)
    config, options = config_of(request)
    config = subject.configured(config)
    length = request.seq_len if request.seq_len is not None else length_for(config, request.config)
    check_length(length, config)
    if config.vocab_size < 259:
        raise ValueError(
            f"vocab_size is {config.vocab_size}, but the text holds token ids up to 258 (bytes, bos, eos, pad): "
            "it must be 259 or more."
        )
    if request.checkpoint is not None:
        state = checkpoint_state(request.checkpoint)
    else:
        state = calibrated_state(config, request.seed)
    size = sum(t.numel() for t in state.values())
    lean = size > HUGE and device.type == "cpu"
    batch = request.batch if request.batch is not None else 1 if lean else 2
    if request.cases == AUTO and size > LARGE:
        cases = LARGE_CASES[:1] if lean else LARGE_CASES
    if request.dtype == AUTO and lean:
        dtypes = dtypes[:1]
    if request.backend is not None:
        options = (*options, "--backend", request.backend)
    if request.device != "cpu":
        options = (*options, "--device", request.device)
    return Plan(
        subject, config, state, request.seed, length, batch, device, dtypes, cases, checks,
        config_name=request.config, options=options, operator_cases=operator_cases, lean=lean,
    )  # fmt: skip


def device_of(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        ValueError: no such device, or none here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is {name!r}; allowed are cpu, cuda and cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}; allowed are cpu, cuda and cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name!r}, but torch finds no CUDA device here.")
    return device


def config_of(request: Request) -> tuple[DeepseekV32Config, tuple[str, ...]]:
    """The config of a request, and the options that ask for it again.

    Raises:
        ValueError: an unknown preset or field, or a checkpoint that is none.
    """
    fields: dict[str, object] = {}
    options: list[str] = []
    for entry in request.overrides:
        name, equals, value = entry.partition("=")
        if not equals:
            raise ValueError(f"--set is {entry!r}; it must be name=value.")
        try:
            fields[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[name] = value
        options += ["--set", entry]
    if request.checkpoint is None:
        return DeepseekV32Config.preset(request.config, **fields), tuple(options)
    if not request.checkpoint.is_dir():
        raise ValueError(f"--checkpoint is {str(request.checkpoint)!r}, which is not a directory.")
    if fields:
        raise ValueError("--set cannot change the config of a --checkpoint; its weights have that shape.")
    return read_config(request.checkpoint), ("--checkpoint", str(request.checkpoint))


def length_for(config: DeepseekV32Config, name: str = "") -> int:
    """Tokens a row when nobody says: for the preset `name`, and for any config enough to tell a wrong selection."""
    # With no more than index_topk visible keys every one is selected. The longest packed document holds three quarters
    # of the tokens.
    return max(math.ceil(1.75 * config.index_topk) + 16, LENGTHS.get(name, 0))


def check_length(length: int, config: DeepseekV32Config, flag: str = "--seq-len", shortest: int = 8) -> None:
    """Refuse a row of `length` tokens that is too short to compare, or has more of them than the model has positions.

    Raises:
        ValueError: it is, as a sentence that names `flag`.
    """
    if length < shortest:
        raise ValueError(f"{flag} is {length}; it must be {shortest} or more.")
    if length > config.max_position_embeddings:
        raise ValueError(
            f"{flag} is {length}; the model has positions for {config.max_position_embeddings} tokens "
            "(max_position_embeddings)."
        )


def checkpoint_state(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a local checkpoint in fp32.

    Raises:
        ValueError: a tensor that is missing, unknown, truncated or wrongly shaped, by its name.
    """
    model = DeepseekV32ForCausalLM.from_pretrained(path, dtype=torch.float32)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def verify(request: Request, console: Console) -> int:
    """Run the request; returns the exit code. Records are written as they come, the report at the end."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        plan = plan_for(request)
        begin_in(request.out)
    except ValueError as error:
        print_line(Console(stderr=True), f"v32 verify: {one_sentence(error)}")
        return USAGE_ERROR
    if sum(t.numel() for t in plan.state.values()) < SMALL and plan.device.type == "cpu":
        # The barrier at the end of each operation costs more threads than such a model has work for.
        torch.set_num_threads(1)
    command = command_line("verify")
    header = {
        "subject": plan.subject.name,
        "reference": "reference (fp64)",
        "config": request.config if request.checkpoint is None else str(request.checkpoint),
        "config_fields": json.loads(plan.config.to_json_string(use_diff=False)),
        "capabilities": sorted(plan.subject.capabilities),
        "device_asked": request.device,
        "device": str(plan.device),
        "dtypes": list(plan.dtypes),
        "implementations": implementations_of(plan, request.backend),
        "seed": request.seed,
        "seq_len": plan.length,
        "batch": plan.batch,
        "text": {"source": "Python standard library", "files": standard_library().files,
                 "sha256": standard_library().sha256},
        "weights": "calibrated" if request.checkpoint is None else "checkpoint",
        "command": " ".join(command),
        "environment": capture(command, seeds={"weights and text": request.seed}),
    }  # fmt: skip
    try:
        with RunWriter(request.out / RUN_FILE, header) as writer, Progress(console, total=len(plan)) as progress:
            for verdict in run(plan, progress):
                writer.write(verdict)
    except KeyboardInterrupt:
        return finish(request.out, console) or 130
    except OSError as error:
        print_line(Console(stderr=True), f"v32 verify: {request.out} cannot be written: {error.strerror or error}.")
        return 3
    return finish(request.out, console)


def command_line(name: str) -> list[str]:
    """The command as it was typed; `v32 <name>` when another program runs it."""
    return ["v32", *sys.argv[1:]] if Path(sys.argv[0]).name == "v32" else ["v32", name]


def implementations_of(plan: Plan, backend: str | None) -> dict[str, dict[str, str]]:
    """What computes the parts of the optimized model in each dtype of a plan; empty for another subject."""
    if plan.subject.name != "optimized":
        return {}
    return {
        dtype: implementations(plan.config, plan.length, backend=backend, device=plan.device, dtype=DTYPES[dtype])
        for dtype in plan.dtypes
    }


def one_sentence(error: Exception) -> str:
    """An error's text on one line, without the stack of classes that some libraries prepend."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


__all__ = ["Request", "checkpoint_state", "plan_for", "verify"]
