"""Downloads a checkpoint of the hub into its cache, and records what came: the step before a walk, where no GPU waits."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from reports.files import begin_in
from reports.records import RUN_FILE, RunWriter
from reports.terminal import print_line

from ..environment import capture
from ..verify import USAGE_ERROR, one_sentence
from .command import NOTHING_VERIFIED, typed
from .layer import LayerFiles
from .source import CutError, Missing, gigabytes, locate

EVENT = "download"


@dataclass(frozen=True, slots=True)
class Request:
    """What is downloaded: a model of the hub, at a branch, tag or commit; where the record goes."""

    checkpoint: str
    revision: str | None = None
    out: Path = Path("runs/download")


def download(request: Request, console: Console) -> int:
    """Fetch what is missing; returns the exit code, 0 when every tensor of the config is there in its whole size.

    What was fetched stays when it is cut, and the next call goes on there.
    """
    started, fetched = time.monotonic(), 0

    def announce(missing: Missing) -> None:
        nonlocal fetched
        fetched = missing.missing_bytes
        whole, part = gigabytes(missing.total_bytes), gigabytes(missing.missing_bytes)
        print_line(console, f"{request.checkpoint}: {whole}, {part} of it to be downloaded.")

    try:
        begin_in(request.out)
        source = locate(request.checkpoint, request.revision, announce=announce)
        # Headers alone; a file that was cut is named here, and not by the walk.
        files = LayerFiles(source.directory, torch.bfloat16, torch.device("cpu"))
    except ValueError as error:
        print_line(Console(stderr=True), f"{one_sentence(error)}")
        # What the network ended is no wrong request.
        return NOTHING_VERIFIED if isinstance(error, CutError) else USAGE_ERROR
    command = typed()
    seconds = round(time.monotonic() - started, 3)
    with RunWriter(request.out / RUN_FILE, {"environment": capture(command)}) as writer:
        writer.event(
            EVENT, checkpoint=request.checkpoint, commit=source.commit, bytes=files.stored_bytes(),
            downloaded_bytes=fetched, seconds=seconds, tensors=len(files.checkpoint.tensors),
        )  # fmt: skip
    print_line(
        console, f"{request.checkpoint}: {gigabytes(files.stored_bytes())} are here, commit {source.commit or 'none'}."
    )
    return 0
