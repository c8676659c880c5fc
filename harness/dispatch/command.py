"""From a request to shards, one record, a report and an exit code: what `suites/gpu.py` and `--on modal` call."""

import secrets
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from reports.files import begin_in, finish
from reports.terminal import print_line

from ..environment import git_state, without_paths
from .fan_out import Place, fan_out
from .keeping import Kept
from .merging import About, write_record
from .shards import SUITES, Shard, fingerprint, gpu_count, verify_shards

if TYPE_CHECKING:
    from ..bench.command import Request as BenchRequest
    from ..layerwise.command import Request as LayerwiseRequest
    from ..verify import Request as VerifyRequest

USAGE_ERROR, CANNOT = 2, 3
DEFAULT_GPU, DEFAULT_TIMEOUT, DEFAULT_CONFIG = "H100", 3600, "tiny"
# The default of --gpu, for those who always want another.
GPU_VARIABLE = "V32_GPU"
# Of a bench on a GPU: lengths at which a GPU has work, the GPU's own dtype.
BENCH_WORDS = ("--lengths", "2048,8192,32768", "--dtype", "bfloat16", "--against", "transformers,dense-flash")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run is dispatched, whatever it runs: GPUs from the most wanted on, seconds a shard, US$ an hour, folder."""

    gpu: tuple[str, ...]
    timeout: int
    price: float | None
    resume: bool
    out: Path


@dataclass(frozen=True, slots=True)
class Training:
    """What suite sft trains: a stage of the recipe, from random weights or from `init`, its ranks laid out by `parallel`.

    init: a folder on the results Volume, such as RUN/dense, or the name of a model that the hub's cache there has.
    """

    stage: str = "sft"
    init: str = ""
    parallel: str = ""


def settings_for(
    gpu: str,
    timeout: float,
    price: float | None,
    resume: bool,
    out: Path | None,
    name: str,
    timeout_flag: str = "--timeout",
) -> Settings:
    """Settings as they were typed, checked; `name` is that of the default folder, `timeout_flag` how the limit is asked for.

    Raises:
        ValueError: anything that cannot be done, as one sentence that names the argument.
    """
    try:
        from .modal import LONGEST, MARGIN, gpu_list
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Modal's GPUs need the package {error.name}, which is not installed: run `pip install -e '.[modal]'`, then `modal setup`."
        ) from error
    if not 10 <= timeout <= LONGEST - MARGIN:
        raise ValueError(f"{timeout_flag} is {timeout:g}; it must be 10 … {LONGEST - MARGIN} seconds for each shard.")
    if price is not None and not 0 < price < float("inf"):
        raise ValueError(f"--price is {price}; it must be US$ an hour, above 0.")
    if resume and out is None:
        raise ValueError("--resume needs --out, the folder of the run to go on with.")
    folder = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    return Settings(gpu_list(gpu), int(timeout), price, resume, folder)


def suite_shards(
    suites: Iterable[str],
    config: str,
    subject: str,
    checks: str,
    dtype: str,
    seed: int,
    gpu: Sequence[str],
    training: Training = Training(),
) -> list[Shard]:
    """The shards of whole suites, as `suites/gpu.py` is asked for them.

    Raises:
        ValueError: a suite, preset, check or stage that there is not, one that cannot run without a GPU, or a training
            that cannot be on these GPUs.
    """
    from reference import DeepseekV32Config

    DeepseekV32Config.preset(config)
    device = ("--device", "cuda") if gpu else ()
    found: list[Shard] = []
    for suite in dict.fromkeys(suites):
        if suite == "verify":
            named, files = shipped(subject)
            words = ("--config", config, "--subject", named, "--dtype", dtype, "--seed", str(seed), *device)
            found += verify_shards(words, checks, files, bool(gpu))
        elif suite == "kernels":
            if not gpu:
                raise ValueError("--suite names kernels, which run on a GPU, and --gpu is none.")
            words = ("verify", "--config", config, "--checks", "operators", "--backend", "triton", *device)
            found.append(Shard("kernels-run", suite, words))
            found.append(Shard("kernels-compiled", suite, ("kernels",), on_gpu=False))
        elif suite == "bench":
            lengths = BENCH_WORDS if gpu else ()
            found.append(Shard("bench", suite, ("bench", "--config", config, *lengths, *device), on_gpu=bool(gpu)))
        elif suite == "sft":
            found.append(training_shard(training, config, seed, gpu))
        else:
            raise ValueError(f"--suite names {suite!r}; allowed are {', '.join(SUITES)}, separated by commas.")
    if not found:
        raise ValueError(f"--suite is empty; allowed are {', '.join(SUITES)}, separated by commas.")
    return found


def training_shard(training: Training, config: str, seed: int, gpu: Sequence[str]) -> Shard:
    """The shard that trains a stage, on as many ranks as there are GPUs.

    Raises:
        ValueError: a stage that there is not, an `init` that does not travel or has a config of its own, or a layout for
            another number of ranks or another model.
    """
    from optimized.distributed import ParallelLayout
    from reference import DeepseekV32Config

    from ..training.stages import STAGES

    stage, init, ranks = training.stage, training.init, gpu_count(gpu)
    if stage not in STAGES:
        raise ValueError(f"--stage is {stage!r}; allowed are {', '.join(STAGES)}.")
    if init and Path(init).exists():
        raise ValueError(
            f"--init is {init!r}, a folder of this machine, which does not travel to Modal: give a folder on the Volume, "
            "such as RUN/dense, or the name of a model that --checkpoint has downloaded there."
        )
    if init and config != DEFAULT_CONFIG:
        raise ValueError(
            f"--config {config} cannot be given with --init, whose checkpoint holds the config; leave one of them out."
        )
    parallel = training.parallel or (f"fsdp={ranks}" if ranks > 1 else "")
    if parallel:
        layout = ParallelLayout.parse(parallel)
        if layout.world != ranks or ranks == 1:
            raise ValueError(
                f"--parallel {parallel} is for {layout.world} ranks, and --gpu asks for {ranks if gpu else 'no'} "
                f"GPU{'s' * (ranks > 1)}; it must be as many, and several, such as --gpu H200:{max(2, min(8, layout.world))}."
            )
        if not init:
            layout.check(DeepseekV32Config.preset(config), layout.world)
    # With --resume from the first attempt on: where there is no state yet it starts at the first step.
    words = ["train", "--stage", stage, *(["--init", init] if init else ["--config", config])]
    words += ["--seed", str(seed), "--resume", *(["--device", "cuda"] if gpu else [])]
    words += ["--parallel", parallel] if parallel else []
    return Shard(stage, "sft", tuple(words), on_gpu=bool(gpu), resumes=True, ranks=ranks)


def shipped(spec: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """A subject as it is named in the shard's own folder, and the file that is sent there; most need none.

    Raises:
        ValueError: a file that cannot be read.
    """
    path, colon, function = spec.partition(":")
    if not path.endswith(".py"):
        return spec, ()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--subject names {path}, which cannot be read: {error}.") from error
    return f"{Path(path).name}{colon}{function}", ((Path(path).name, text),)


def verify_on_modal(request: "VerifyRequest", settings: Settings, console: Console) -> int:
    """`v32 verify --on modal`: a shard for each family; returns the exit code."""

    def shards() -> list[Shard]:
        from ..runner import select_cases
        from ..verify import config_of

        if request.checkpoint is not None:
            raise ValueError(
                f"--checkpoint is {str(request.checkpoint)!r}, a folder of this machine, which does not travel to Modal; "
                "leave --on out, or name a --config."
            )
        config_of(request)
        select_cases([] if request.cases == "auto" else request.cases.split(","))
        named, files = shipped(request.subject)
        words = _words(request, settings, {"subject": named}, leave=("checks", "checkpoint"))
        return verify_shards(words, request.checks, files, bool(settings.gpu))

    return _on_modal("verify", shards, settings, console)


def bench_on_modal(request: "BenchRequest", settings: Settings, console: Console) -> int:
    """`v32 bench --on modal`: one shard, because its samples are paired; returns the exit code."""

    def shards() -> list[Shard]:
        named, files = shipped(request.subject)
        peers = [shipped(peer) for peer in request.against.split(",")]
        changed = {"subject": named, "against": ",".join(peer for peer, _ in peers)}
        files = tuple(dict([*files, *(file for _, more in peers for file in more)]).items())
        words = ("bench", *_words(request, settings, changed))
        return [Shard("bench", "bench", words, on_gpu=bool(settings.gpu), files=files)]

    return _on_modal("bench", shards, settings, console)


def layerwise_on_modal(request: "LayerwiseRequest", settings: Settings, console: Console) -> int:
    """`v32 verify --checkpoint ID --layerwise --on modal`: a download, then a walk; returns the exit code."""

    def shards() -> list[Shard]:
        from .checkpoint import announced, checkpoint_shards

        found = checkpoint_shards(request, bool(settings.gpu))
        print_line(console, announced(request, bool(settings.gpu)))
        return found

    return _on_modal("verify", shards, settings, console)


# Fields of a request whose flag is not their name.
_FLAGS = {"passes": "--pass"}


def _words(request: Any, settings: Settings, changed: dict[str, str], leave: Sequence[str] = ()) -> tuple[str, ...]:
    """The flags of a request that differ from the defaults; the device follows from the GPU asked for."""
    words: list[str] = ["--device", "cuda"] if settings.gpu else []
    for item in fields(request):
        value = changed.get(item.name, getattr(request, item.name))
        if item.name in ("out", "device", "overrides", *leave) or value == item.default:
            continue
        flag = _FLAGS.get(item.name, f"--{item.name.replace('_', '-')}")
        words += [flag] if value is True else [flag, str(value)]
    for entry in request.overrides:
        words += ["--set", entry]
    return tuple(words)


def _on_modal(name: str, shards: Any, settings: Settings, console: Console) -> int:
    import modal

    from .modal import cloud_for

    try:
        found = shards()
    except ValueError as error:
        print_line(Console(stderr=True), f"v32 {name}: {' '.join(str(error).split())}")
        return USAGE_ERROR
    cloud = cloud_for(settings.gpu, settings.timeout)
    running: AbstractContextManager[Any] = cloud.app.run()
    try:
        with modal.enable_output(), running:
            code = collect(found, settings, cloud.place, console)
    except modal.exception.Error as error:
        print_line(Console(stderr=True), f"v32 {name}: Modal refused: {' '.join(str(error).split())}")
        return CANNOT
    # After Modal's own last words, so that the verdict is the last line.
    return code or finish(settings.out, console)


def dispatch(shards: Sequence[Shard], settings: Settings, place_for: Any, console: Console) -> int:
    """Run `shards` at the place that `place_for(run name)` gives; returns the exit code of the one record they make."""
    return collect(shards, settings, place_for, console) or finish(settings.out, console)


def collect(shards: Sequence[Shard], settings: Settings, place_for: Any, console: Console) -> int:
    """Run `shards`, and write their one record as they end; returns `USAGE_ERROR` where it cannot be written, else 0."""
    count = gpu_count(settings.gpu)
    if wasteful := next((shard.name for shard in shards if shard.on_gpu and shard.ranks != count), None):
        error = f"--gpu asks for {count} GPUs, and {wasteful} runs on one; only a training, --sft or --stage, runs on several."
        print_line(Console(stderr=True), error)
        return USAGE_ERROR
    kept = Kept(settings.out)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    try:
        begin_in(settings.out)
        place: Place = place_for(kept.begin(shards, fingerprint(), name, settings.resume))
    except ValueError as error:
        print_line(Console(stderr=True), str(error))
        return USAGE_ERROR
    except OSError as error:
        print_line(Console(stderr=True), f"--out is {settings.out}, which cannot be written: {error.strerror}.")
        return USAGE_ERROR
    command = tuple(without_paths(word) for word in [Path(sys.argv[0]).name, *sys.argv[1:]])
    about = About(place.name, settings.gpu, settings.timeout, settings.price, command, git_state())
    missing = [shard for shard in shards if kept.ended(shard) is None]
    if kept_already := len(shards) - len(missing):
        print_line(
            console, f"--resume: {kept_already} of {len(shards)} shards are here already; {len(missing)} to run."
        )
    print_line(
        console,
        f"{len(missing)} shard{'s' * (len(missing) != 1)} on {place.name}, {', '.join(settings.gpu) or 'no GPU'}; records: {settings.out}",
    )
    try:
        fan_out(missing, place, kept, console, lambda: write_record(shards, kept, about))
    except KeyboardInterrupt:
        print_line(console, "Interrupted; what has come is kept, and --resume runs the rest.")
    write_record(shards, kept, about)
    return 0
