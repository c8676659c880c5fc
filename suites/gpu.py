"""The suites on Modal's GPUs: `modal run suites/gpu.py --config tiny`, or `modal run -m suites.gpu --config tiny`.

    modal run suites/gpu.py --config medium --gpu H200,H100 --timeout 3600
    modal run suites/gpu.py --sft
    modal run suites/gpu.py --stage warmup --init RUN/dense
    modal run suites/gpu.py --checkpoint deepseek-ai/DeepSeek-V3.2-Exp
    modal run suites/gpu.py --suite verify,kernels,bench --out runs/all
    modal run suites/gpu.py --suite verify,kernels,bench --out runs/all --resume

docs/modal.md says what each flag does and what comes back.
"""

import os
import sys
from argparse import ArgumentParser
from pathlib import Path

from rich.console import Console

from harness.dispatch import checkpoint as of_checkpoint
from harness.dispatch.command import (
    DEFAULT_CONFIG,
    DEFAULT_GPU,
    DEFAULT_TIMEOUT,
    GPU_VARIABLE,
    USAGE_ERROR,
    Training,
    dispatch,
    settings_for,
    suite_shards,
)
from harness.dispatch.modal import cloud_for
from harness.dispatch.shards import Shard
from reports.terminal import print_line


def refused(error: ValueError) -> SystemExit:
    """Says in one sentence what cannot be done."""
    print_line(Console(stderr=True), f"suites/gpu.py: {' '.join(str(error).split())}")
    return SystemExit(USAGE_ERROR)


def early(arguments: list[str]) -> tuple[str, float]:
    """--gpu and --timeout, which the decorators need before Modal has parsed the command line.

    Raises:
        ValueError: a --timeout that is no number.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gpu", default=os.environ.get(GPU_VARIABLE, DEFAULT_GPU))
    parser.add_argument("--timeout")
    parser.add_argument("--checkpoint")
    found, _ = parser.parse_known_args(arguments)
    usual = of_checkpoint.TIMEOUT if found.checkpoint else DEFAULT_TIMEOUT
    try:
        return found.gpu, float(usual if found.timeout is None else found.timeout)
    except ValueError:
        raise ValueError(f"--timeout is {found.timeout!r}; it must be a number of seconds.") from None


def training_of(sft: bool, stage: str, init: str, parallel: str, trains: bool) -> Training:
    """What --sft or --stage trains.

    Raises:
        ValueError: two stages, or a flag of a training where there is none.
    """
    if sft and stage not in ("", "sft"):
        raise ValueError(f"--stage is {stage!r}, and --sft is stage sft; leave one of them out.")
    for flag, value in (("--init", init), ("--parallel", parallel)):
        if value and not trains:
            raise ValueError(f"{flag} is {value!r}, which belongs to a training: give --sft or --stage with it.")
    return Training(stage or "sft", init, parallel)


def walk_of(name: str, revision: str, subject: str, dtype: str, seed: int, on_gpu: bool) -> list[Shard]:
    """The shards of a checkpoint, announced on the terminal.

    Raises:
        ValueError: anything that cannot be done.
    """
    # Brings torch, which a container's first process must not need.
    from harness.layerwise.command import Request

    request = Request(checkpoint=name, revision=revision or None, subject=subject, dtype=dtype, seed=seed)
    found = of_checkpoint.checkpoint_shards(request, on_gpu)
    print_line(Console(), of_checkpoint.announced(request, on_gpu))
    return found


try:
    GPU, TIMEOUT = early(sys.argv[1:])
    asked = settings_for(GPU, TIMEOUT, None, False, None, "gpu")
except ValueError as error:
    raise refused(error) from None
cloud = cloud_for(asked.gpu, asked.timeout)
app = cloud.app


@app.local_entrypoint()
def main(
    config: str = DEFAULT_CONFIG,
    suite: str = "",
    sft: bool = False,
    stage: str = "",
    init: str = "",
    parallel: str = "",
    checkpoint: str = "",
    revision: str = "",
    subject: str = "optimized",
    checks: str = "all",
    dtype: str = "auto",
    seed: int = 0,
    gpu: str = GPU,
    timeout: float = TIMEOUT,
    price: float = 0.0,
    resume: bool = False,
    out: str = "",
):
    """Run suites of --config on a GPU; without --suite, --sft, --stage and --checkpoint that is verify."""
    try:
        settings = settings_for(gpu, timeout, price or None, resume, Path(out) if out else None, "gpu")
        suites = [word.strip() for word in suite.split(",") if word.strip()] + (["sft"] if sft or stage else [])
        training = training_of(sft, stage, init, parallel, "sft" in suites)
        shards = []
        if suites or not checkpoint:
            shards = suite_shards(suites or ["verify"], config, subject, checks, dtype, seed, settings.gpu, training)
        if checkpoint:
            shards += walk_of(checkpoint, revision, subject, dtype, seed, bool(settings.gpu))
    except ValueError as error:
        raise refused(error) from None
    sys.exit(dispatch(shards, settings, cloud.place, Console()))
