"""The Modal App: its image, its volumes, its two functions, and a `Place` that sends shards there.

The project is not built into the image but mounted, so that an edit needs no new build. What a container imports first
is light: torch is imported by the shard's own process, which may die without taking the container along.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import modal
import modal.exception
import modal.experimental
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from reports.text import one_line

from ..environment import ROOT, gpus
from .fan_out import InfrastructureError, Place
from .local import run_shard
from .shards import CHECKPOINT, FILES, LEFT_BEHIND, PACKAGES, End, Items, Piece, Shard, gpu_count

MINUTES = 60
APP_NAME = "v32"
PYTHON = "3.11"
# Where a container has the project, the hub's cache and the results.
REMOTE_ROOT, HUB_CACHE, RESULTS = "/root", "/cache", "/results"
HUB_VOLUME, RESULTS_VOLUME = "v32-hub-cache", "v32-results"
RESULTS_VARIABLE, TOKEN_VARIABLE = "V32_RESULTS", "HF_TOKEN"
# Modal's own limits: a function runs for a day at most, and it must outlive the command that it stops.
LONGEST, MARGIN = 24 * 60 * MINUTES, 2 * MINUTES
# More shards at once would wait for one another in most workspaces.
AT_ONCE = 10
ON_GPU, ON_CPU = "on_gpu", "on_cpu"
# The flag of a shard whose value names a folder on a Volume.
INIT = "--init"
# After any of these a GPU may answer wrongly, or not at all, to the next process too.
CUDA_ERRORS = ("CUDA error", "cudaError", "device-side assert", "illegal memory access", "CUBLAS_STATUS", "Xid")


def pins(root: Path = ROOT) -> list[str]:
    """The tested version of every package, as `constraints.txt` has it.

    Not triton's: the CUDA build of torch that Linux gets insists on one of its own, and brings it.
    """
    lines = (line.partition("#")[0].strip() for line in (root / "constraints.txt").read_text("utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("triton==")]


def image(root: Path = ROOT) -> modal.Image:
    """Python, the tested packages, a compiler for the native operators and for Triton's launchers; the project on top."""
    built = (
        modal.Image.debian_slim(python_version=PYTHON)
        .apt_install("g++", "git")
        .uv_pip_install(*pins(root))
        # A broken image fails while it is built, not on a GPU's time.
        .run_commands("python -c 'import accelerate, safetensors, torch, transformers, triton, typer'")
        .env({
            "HF_HOME": f"{HUB_CACHE}/huggingface", RESULTS_VARIABLE: RESULTS, "PYTHONPATH": REMOTE_ROOT,
            "TOKENIZERS_PARALLELISM": "false",
        })
    )  # fmt: skip
    for name in PACKAGES:
        built = built.add_local_dir(root / name, f"{REMOTE_ROOT}/{name}", ignore=LEFT_BEHIND)
    for name in FILES:
        built = built.add_local_file(root / name, f"{REMOTE_ROOT}/{name}")
    return built


def gpu_list(text: str) -> tuple[str, ...]:
    """`--gpu`: names from the most wanted on, separated by commas, `H200:8` for eight of them; `none` for no GPU.

    Raises:
        ValueError: a text that names no GPU as Modal names them.
    """
    names = tuple(word.strip() for word in text.split(",") if word.strip())
    if names == ("none",):
        return ()
    for name in names or ("",):
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*!?(:[1-8])?", name) or name.partition(":")[0] == "none":
            raise ValueError(
                f"--gpu is {text!r}; it must be Modal's names of GPUs from the most wanted on, such as H200,H100, "
                "or of several, up to eight, such as H200:8, or none."
            )
    if len({gpu_count([name]) for name in names}) > 1:
        raise ValueError(f"--gpu is {text!r}; all names must ask for the same number of GPUs.")
    return names


@dataclass(frozen=True, slots=True)
class Cloud:
    """An App for one choice of GPUs and time limit: a decorator takes them, and a later choice takes no list."""

    app: modal.App
    functions: dict[str, modal.Function]
    gpu: tuple[str, ...]
    timeout: int

    def place(self, run_name: str) -> Place:
        """Where shards of the run `run_name` are sent; the App must be running."""

        def send(shard: Shard) -> Items:
            function = self.functions[ON_GPU if shard.on_gpu else ON_CPU]
            yield from function.remote_gen(shard, run_name, self.timeout)

        # What Modal raises for a machine that went away. A time limit is the command's own doing.
        infrastructure = (
            modal.exception.InternalFailure, modal.exception.RemoteError, modal.exception.ConnectionError,
            modal.exception.InternalError, modal.exception.ServiceError, InfrastructureError,
        )  # fmt: skip
        return Place("Modal", send, AT_ONCE, infrastructure, _described)


def cloud_for(gpu: Sequence[str], timeout: int, app: str = APP_NAME) -> Cloud:
    """The App with its functions: on one of `gpu` (most wanted first; none: without), each shard for `timeout` seconds."""
    own = modal.App(app, include_source=False)
    common: dict[str, Any] = {
        "image": image(),
        "volumes": {HUB_CACHE: volume(HUB_VOLUME), RESULTS: volume(RESULTS_VOLUME)},
        "timeout": min(timeout + MARGIN, LONGEST),
    }
    # The token goes to the function that downloads, and to no other.
    token = (
        [modal.Secret.from_dict({TOKEN_VARIABLE: os.environ[TOKEN_VARIABLE]})] if TOKEN_VARIABLE in os.environ else []
    )
    functions = {ON_CPU: own.function(name=ON_CPU, cpu=2.0, secrets=token, **common)(in_container)}
    if gpu:
        functions[ON_GPU] = own.function(name=ON_GPU, gpu=list(gpu), **common)(in_container)
    return Cloud(own, functions, tuple(gpu), timeout)


def volume(name: str) -> modal.Volume:
    """One of the project's Volumes, made when it is not there."""
    return modal.Volume.from_name(name, create_if_missing=True)


def in_container(shard: Shard, run_name: str, limit: float) -> Items:
    """Runs in the container: the shard's command, its record and log on the results Volume and sent back as they grow."""
    received = tuple(str(gpu["name"]) for gpu in gpus())
    if shard.on_gpu and not received:
        modal.experimental.stop_fetching_inputs()
        raise InfrastructureError("a GPU was asked for, and the container has none")
    if shard.suite == CHECKPOINT:
        # A container that is used again would not see what another one, or another attempt, has downloaded since.
        volume(HUB_VOLUME).reload()
    results = Path(os.environ[RESULTS_VARIABLE])
    try:
        shard = with_init_here(shard, results)
    except ValueError as error:
        yield End(problem=str(error), gpu=received, container=os.environ.get("MODAL_TASK_ID", ""))
        return
    for item in run_shard(shard, results / run_name / shard.name, limit):
        if isinstance(item, Piece):
            yield item
            continue
        if shard.suite == CHECKPOINT:
            # Before the answer, because the shard that waits for this one reads what it has downloaded.
            volume(HUB_VOLUME).commit()
        yield replace(item, gpu=received, container=os.environ.get("MODAL_TASK_ID", ""))
        # After the answer is out, so that nothing that goes wrong here can lose it.
        if has_cuda_error(item):
            modal.experimental.stop_fetching_inputs()


def with_init_here(shard: Shard, results: Path) -> Shard:
    """The shard with the folder that its --init stands for in this container: one in `results`, or in the hub's cache.

    Raises:
        ValueError: neither of them has it.
    """
    if INIT not in shard.words:
        return shard
    place = shard.words.index(INIT) + 1
    name = shard.words[place]
    folder = results / name
    if not folder.is_dir():
        try:
            config = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            # Not a name that the hub could have: a folder was meant.
            config = None
        if not isinstance(config, str):
            raise ValueError(
                f"{INIT} is {name!r}, which is no folder on the Volume {RESULTS_VOLUME}, and no model in the hub's cache on "
                f"{HUB_VOLUME}, where --checkpoint puts one."
            )
        folder = Path(config).parent
    return replace(shard, words=(*shard.words[:place], str(folder), *shard.words[place + 1 :]))


def has_cuda_error(end: End) -> bool:
    """Whether a shard met an error after which its GPU cannot be trusted."""
    return any(words in text for text in (end.log, end.record or "") for words in CUDA_ERRORS)


def _described(error: BaseException) -> str:
    """What happened on Modal, in a sentence."""
    said = one_line(str(error))
    if isinstance(error, modal.exception.FunctionTimeoutError):
        return f"Modal stopped its container at the time limit: {said}"
    if isinstance(error, (modal.exception.InternalFailure, modal.exception.RemoteError)):
        return f"its container died: {said or type(error).__name__}"
    return f"{type(error).__name__}: {said}"
