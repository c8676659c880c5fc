"""`v32 recipe`: the table of proof, trained from nothing: what a warmed-up indexer is worth, and which faults show."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console

from reference import DeepseekV32Config
from reports.files import begin_in, finish
from reports.records import RUN_FILE, RunWriter
from reports.terminal import Progress, print_line

from ..environment import capture
from ..verify import USAGE_ERROR, command_line
from .data import Mixture, sources
from .faults import FAULTS
from .stages import stage_for
from .table import COUNT, GivenUp, Table, measurements, notices, one_seed, verdicts

INTERRUPTED = 130
WEIGHTS = "weights"


@dataclass(frozen=True, slots=True)
class Request:
    """What `v32 recipe` was asked for, as it was typed. `seeds` counts from 0 on."""

    config: str = "mini"
    seeds: int = 3
    faults: bool = True
    out: Path = Path("runs/recipe")


def recipe(request: Request, console: Console) -> int:
    """Run the request; returns the exit code. The rows of a seed are written when it is done."""
    errors = Console(stderr=True)
    try:
        if request.seeds < 1:
            raise ValueError(f"--seeds is {request.seeds}; it must be 1 or more.")
        config = DeepseekV32Config.preset(request.config)
        # Refuses a vocabulary without the markers.
        Mixture(config, 0)
        begin_in(request.out)
    except ValueError as error:
        print_line(errors, f"v32 recipe: {error}")
        return USAGE_ERROR
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        _run(request, config, console)
    except KeyboardInterrupt:
        return finish(request.out, console, f"weights: {request.out / WEIGHTS}") or INTERRUPTED
    except GivenUp as error:
        print_line(errors, f"v32 recipe: {error}")
    except OSError as error:
        print_line(errors, f"v32 recipe: {request.out} cannot be written: {error.strerror or error}.")
        return 3
    return finish(request.out, console, f"weights: {request.out / WEIGHTS}")


def _run(request: Request, config: DeepseekV32Config, console: Console) -> None:
    command = command_line("recipe")
    faults = FAULTS if request.faults else ()
    header = {
        "subject": "optimized",
        "claim": "a warmed-up indexer selects what attention needs",
        "config": request.config,
        "device": "cpu",
        "dtypes": ["float32"],
        "recipe": {"index_topk": config.index_topk, "seeds": list(range(request.seeds))},
        "text": {"source": "Python standard library", "sha256": sources().train_sha256},
        "command": " ".join(command),
        "environment": capture(command, seeds={"weights and data": 0}),
    }
    with RunWriter(request.out / RUN_FILE, header) as writer, Progress(console, total=4 * request.seeds) as progress:
        done: list[Table] = []
        try:
            for seed in range(request.seeds):
                progress.start("train.recipe", f"seed {seed}")
                keep = request.out / WEIGHTS
                try:
                    done.append(one_seed(config, seed, faults=faults, count=COUNT, stages=stage_for, keep=keep))
                except GivenUp as error:
                    writer.write(error.verdict)
                    progress.done(error.verdict)
                    raise
                for verdict in verdicts(done[-1]):
                    writer.write(verdict)
                    progress.done(verdict)
        finally:
            # Also of a run that was interrupted or given up: the seeds that are done have their rows in the table.
            if done:
                whole = Table.joined(done)
                for measurement in (*measurements(whole), *notices(whole)):
                    writer.write(measurement)
