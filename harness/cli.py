"""The command line: `v32 verify`, `v32 bench`, `v32 mutants`, `v32 train`, `v32 golden`, `v32 kernels`, `v32 plan`,
`v32 compare`, `v32 report`, `v32 doctor`.

Exit codes, the first that applies: 2 wrong usage · 1 any check failed or vacuous · 3 any error, or nothing verified ·
4 slower or less accurate than the baseline · 0.
"""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from reports.files import REPORT_FILES, write_reports
from reports.interrupts import interruptions, remembered
from reports.records import RecordError, read_run, run_exit_code, write_text_atomically
from reports.terminal import print_line, render

from .environment import without_paths
from .goldens.cli import golden_app

if TYPE_CHECKING:
    from .dispatch.command import Settings

USAGE_ERROR = 2
INTERRUPTED = 130
# The base of every error in a command line. typer exports only its leaves, and ships click in one version and not in
# another.
CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]

# Where a command runs; the rest of these belongs to --on modal.
On = Annotated[
    str, typer.Option("--on", help="local, or modal: on Modal's machines, with the same records and reports.")
]
Gpu = Annotated[
    str | None, typer.Option(help="On Modal: GPUs from the most wanted on, or none; default V32_GPU, else H100.")
]
ShardTimeout = Annotated[
    float | None, typer.Option(help="On Modal: seconds that each of the parts that run at once may take; default 3600.")
]
Price = Annotated[float | None, typer.Option(help="On Modal: US$ an hour of the GPU; then the record has the cost.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="On Modal, and with --layerwise: run only what is missing in --out.")
]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Verify implementations of DeepSeek V3.2 (sparse attention, indexer, MoE) against a readable reference.",
)
app.add_typer(golden_app, name="golden")


@app.callback()
def commands() -> None:
    """Verify implementations of DeepSeek V3.2 against a readable reference."""


@app.command()
def verify(
    config: Annotated[str, typer.Option(help="A preset: tiny, mini, bench, small, medium.")] = "tiny",
    subject: Annotated[
        str,
        typer.Option(
            help="optimized, reference, transformers, transformers-eager, transformers-plugged, glm-plugged, or FILE.py:factory."
        ),
    ] = "optimized",
    checks: Annotated[str, typer.Option(help="Families or checks, separated by commas; all for every one.")] = "all",
    cases: Annotated[
        str, typer.Option(help="Cases, separated by commas; all for every one; auto: fewer of a large model.")
    ] = "auto",
    seq_len: Annotated[int | None, typer.Option(help="Tokens a row; the default is well above index_topk.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a batch; 2, or 1 of a huge model on a CPU.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, both separated by a comma; auto: float32 of a huge model on a CPU.")
    ] = "auto",
    backend: Annotated[
        str | None, typer.Option(help="The optimized model's operators: torch, native, triton; default by device.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and text.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a config field: name=value.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Config and weights from a local checkpoint directory instead of a preset.")
    ] = None,
    layerwise: Annotated[
        bool,
        typer.Option("--layerwise", help="Walk a --checkpoint, which may be a name on the hub, one layer at a time."),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="With --layerwise: branch, tag or commit on the hub.")] = None,
    until: Annotated[int | None, typer.Option(help="With --layerwise: how many layers are walked.")] = None,
    on: On = "local",
    gpu: Gpu = None,
    shard_timeout: ShardTimeout = None,
    price: Price = None,
    resume: Resume = False,
    out: Annotated[
        Path | None, typer.Option(help="Where run.jsonl and report.md go; default runs/<time>-verify.")
    ] = None,
) -> None:
    """Compare a subject with the reference on real text: choices, arithmetic, KL, gradients, training."""
    from .verify import Request
    from .verify import verify as run_verify

    folder = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-verify"
    if layerwise:
        _goes_with_layerwise(checkpoint, resume, out, [(config, "tiny", "--config"), (checks, "all", "--checks"),
                             (cases, "auto", "--cases"), (set_, None, "--set")])  # fmt: skip
        from .dispatch.checkpoint import TIMEOUT
        from .dispatch.command import layerwise_on_modal
        from .layerwise.command import Request as Walk
        from .layerwise.command import verify_layers

        walk = Walk(
            checkpoint=checkpoint or "", revision=revision, subject=subject, seq_len=seq_len, batch=batch,
            device=device, dtype=dtype, backend=backend, seed=seed, until=until, resume=resume, out=folder,
        )  # fmt: skip
        limit = TIMEOUT if shard_timeout is None and on == "modal" else shard_timeout
        place = _elsewhere(on, gpu, limit, price, resume and on == "modal", out, "verify")
        if place is not None:
            raise typer.Exit(layerwise_on_modal(walk, place, Console()))
        raise typer.Exit(verify_layers(walk, Console()))
    for flag in (flag for flag, value in (("--revision", revision), ("--until", until)) if value is not None):
        raise typer.BadParameter(f"{flag} belongs to --layerwise.")
    settings = _elsewhere(on, gpu, shard_timeout, price, resume, out, "verify")
    request = Request(
        config=config, subject=subject, checks=checks, cases=cases, seq_len=seq_len, batch=batch, device=device,
        dtype=dtype, backend=backend, seed=seed, overrides=tuple(set_ or ()),
        checkpoint=Path(checkpoint) if checkpoint is not None else None, out=folder,
    )  # fmt: skip
    if settings is not None:
        from .dispatch.command import verify_on_modal

        raise typer.Exit(verify_on_modal(request, settings, Console()))
    raise typer.Exit(run_verify(request, Console()))


@app.command()
def bench(
    config: Annotated[str, typer.Option(help="A preset: tiny, mini, bench, small, medium.")] = "bench",
    lengths: Annotated[str, typer.Option(help="Tokens a row, separated by commas.")] = "512,1024,2048",
    passes: Annotated[
        str,
        typer.Option(
            "--pass",
            help="fwd, fwd+bwd, kl (the dense warm-up step), or of one operator op:NAME or op:NAME+bwd; separated by commas.",
        ),
    ] = "fwd,fwd+bwd",
    against: Annotated[
        str,
        typer.Option(help="transformers, dense-flash, reference, optimized:BACKEND, FILE.py:factory; none for nobody."),
    ] = "transformers",
    subject: Annotated[str, typer.Option(help="Who is compared with them.")] = "optimized",
    backend: Annotated[str | None, typer.Option(help="The optimized model's operators; default by device.")] = None,
    batch: Annotated[int, typer.Option(help="Rows of a batch.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[int, typer.Option(help="Threads of torch in each process.")] = 1,
    repeats: Annotated[
        int | None,
        typer.Option(
            help="Samples of each point, 3 or more; default 7, above 2048 tokens 3. `v32 compare` judges 7 or more."
        ),
    ] = None,
    floors: Annotated[bool, typer.Option("--floors", help="Fail the run when a floor on record is missed.")] = False,
    peak_tflops: Annotated[
        float | None, typer.Option(help="The device's peak, to be compared with instead of a product measured here.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one pass, or building a model, may take.")] = 900.0,
    seed: Annotated[int, typer.Option(help="Seed of weights and text.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a config field: name=value.")] = None,
    on: On = "local",
    gpu: Gpu = None,
    shard_timeout: ShardTimeout = None,
    price: Price = None,
    resume: Resume = False,
    out: Annotated[
        Path | None, typer.Option(help="Where run.jsonl and report.md go; default runs/<time>-bench.")
    ] = None,
) -> None:
    """Time and memory of a verified subject against its peers, paired in one run, each in a process of its own."""
    from .bench.command import Request
    from .bench.command import bench as run_bench

    settings = _elsewhere(on, gpu, shard_timeout, price, resume, out, "bench")
    request = Request(
        config=config, subject=subject, against=against, lengths=lengths, passes=passes, backend=backend, batch=batch,
        device=device, dtype=dtype, threads=threads, repeats=repeats, floors=floors, peak_tflops=peak_tflops, timeout=timeout, seed=seed,
        overrides=tuple(set_ or ()), out=out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-bench",
    )  # fmt: skip
    if settings is not None:
        from .dispatch.command import bench_on_modal

        raise typer.Exit(bench_on_modal(request, settings, Console()))
    raise typer.Exit(run_bench(request, Console()))


@app.command()
def mutants(
    only: Annotated[
        str, typer.Option(help="Mutants, entries of the catalogue (A01) or groups (A), separated by commas.")
    ] = "all",
    without: Annotated[str, typer.Option(help="Checks to turn off, separated by commas.")] = "",
    seeds: Annotated[int, typer.Option(help="Seeds from 1000 on, on which right subjects must raise no alarm.")] = 100,
    jobs: Annotated[int, typer.Option(help="Processes; 0 for one a core.")] = 0,
    list_: Annotated[bool, typer.Option("--list", help="Name the mutants, and run nothing.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where run.jsonl and report.md go; default runs/<time>-mutants.")
    ] = None,
) -> None:
    """Try known bugs on every check: the kill matrix, and the false alarms on right subjects."""
    from .mutants.command import Request, print_list
    from .mutants.command import mutants as run_mutants

    if list_:
        print_list(Console())
        raise typer.Exit
    folder = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-mutants"
    raise typer.Exit(run_mutants(Request(only, without, seeds, jobs, folder), Console()))


@app.command()
def train(
    stage: Annotated[str, typer.Option(help="dense, warmup, sparse, sft.")],
    config: Annotated[str | None, typer.Option(help="A preset; default tiny, or the config of --init.")] = None,
    model: Annotated[str, typer.Option(help="optimized or reference.")] = "optimized",
    init: Annotated[
        Path | None, typer.Option(help="Start from these weights: the folder of an earlier stage, or a checkpoint.")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="dense or sparse; of stage sft, which has both.")] = None,
    lora: Annotated[
        str,
        typer.Option(help="Train adapters on attention, experts, indexer, separated by commas, in place of weights."),
    ] = "",
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    steps: Annotated[int | None, typer.Option(help="Steps of the whole stage; the default is the recipe's.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a row, in place of the recipe's.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a batch, in place of the recipe's.")] = None,
    lr: Annotated[float | None, typer.Option(help="AdamW's rate; of stage warmup the indexer's.")] = None,
    lr_matrices: Annotated[float | None, typer.Option(help="Muon's rate, for the layers' matrices.")] = None,
    lr_indexer: Annotated[float | None, typer.Option(help="The indexer's rate.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    parallel: Annotated[
        str, typer.Option(help="Under torchrun: how its ranks share the work, such as fsdp=2,cp=2; also ep and tp.")
    ] = "",
    save_every: Annotated[int, typer.Option(help="Steps between two saved states.")] = 25,
    measure_every: Annotated[int, typer.Option(help="Steps between two measurements of the indexer.")] = 20,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a config field: name=value.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last state in --out.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where record, report, states and checkpoint go; default runs/<time>-STAGE.")
    ] = None,
) -> None:
    """Train one stage of the recipe on real text, copying and retrieval: audited, measured, resumable."""
    from .training.command import Request, run_training

    if resume and out is None:
        raise typer.BadParameter("--resume needs --out, the folder of the run to go on with.")
    request = Request(
        stage=stage, config=config, model=model, init=init, attention=attention, lora=lora, rank=rank, steps=steps,
        seq_len=seq_len, batch=batch, lr=lr, lr_matrices=lr_matrices, lr_indexer=lr_indexer, dtype=dtype, device=device,
        seed=seed, parallel=parallel, save_every=save_every, measure_every=measure_every, overrides=tuple(set_ or ()), resume=resume,
        out=out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{stage}",
    )  # fmt: skip
    raise typer.Exit(run_training(request, Console()))


@app.command()
def kernels(
    target: Annotated[
        str, typer.Option(help="sm_80, sm_90a, sm_100a, separated by commas; all for every one.")
    ] = "all",
    only: Annotated[
        str, typer.Option(help="Kernels or their modules, separated by commas; all for every one.")
    ] = "all",
    jobs: Annotated[int, typer.Option(help="Processes; 0 for one a core.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Where run.jsonl and report.md go; default runs/<time>-kernels.")
    ] = None,
) -> None:
    """Compile every kernel for GPUs that need not be there, and hold what it takes against its budget."""
    from .kernels.command import Request
    from .kernels.command import kernels as run_kernels

    folder = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-kernels"
    raise typer.Exit(run_kernels(Request(target, only, jobs, folder), Console()))


@app.command()
def recipe(
    config: Annotated[str, typer.Option(help="A preset; mini is the smallest that learns retrieval.")] = "mini",
    seeds: Annotated[int, typer.Option(help="Seeds from 0 on; each takes 7 CPU minutes, 15 with the faults.")] = 3,
    faults: Annotated[bool, typer.Option(help="Also warm up with each known fault.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Where run.jsonl, report.md and weights go; default runs/<time>-recipe.")
    ] = None,
) -> None:
    """Train the recipe from nothing, and show what a warmed-up indexer is worth: the table of proof."""
    from .training.recipe import Request
    from .training.recipe import recipe as run_recipe

    folder = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-recipe"
    raise typer.Exit(run_recipe(Request(config, seeds, faults, folder), Console()))


@app.command()
def plan(
    config: Annotated[str, typer.Option(help="A preset: tiny, mini, bench, small, medium, v32.")] = "v32",
    seq_len: Annotated[int, typer.Option(help="Tokens a sequence.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences that a rank holds.")] = 1,
    stage: Annotated[str, typer.Option(help="dense, warmup, sparse, sft.")] = "sparse",
    attention: Annotated[str | None, typer.Option(help="dense or sparse; of stage sft, which has both.")] = None,
    lora: Annotated[
        str, typer.Option(help="Adapters on attention, experts, indexer, separated by commas, in place of weights.")
    ] = "",
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of weights, gradients and state: bfloat16 or float32.")] = "bfloat16",
    gpus: Annotated[
        str, typer.Option(help="Number and type, 8 a node: 64xH200; A100-40, A100, H100, H200, B200.")
    ] = "8xH200",
    parallel: Annotated[
        str | None, typer.Option(help="One layout, such as fsdp=8,cp=8,ep=1,tp=1; default: all, the fastest first.")
    ] = None,
    checkpointing: Annotated[
        bool | None, typer.Option("--checkpointing/--no-checkpointing", help="Default: in all stages but warmup.")
    ] = None,
    headroom: Annotated[float, typer.Option(help="Share of a GPU's memory to leave free.")] = 0.1,
    tokens: Annotated[float | None, typer.Option(help="Tokens of the whole run; then its GPU hours are given.")] = None,
    price: Annotated[
        float | None, typer.Option(help="US$ an hour of a GPU; with --tokens, what the run costs.")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="A record of v32 bench on this GPU: the share of its rate that was reached.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Measure a small step here, against the plan's memory.")] = True,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a config field: name=value.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="The config of a local checkpoint directory.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where run.jsonl and the reports go; default nowhere.")] = None,
) -> None:
    """What a training step takes before it is paid for: parameters, memory, work, time, and which layout of ranks fits."""
    from .plan.command import Request
    from .plan.command import plan as run_plan

    request = Request(
        config=config, seq_len=seq_len, batch=batch, stage=stage, attention=attention, lora=lora, rank=rank, dtype=dtype,
        gpus=gpus, parallel=parallel, checkpointing=checkpointing, headroom=headroom, tokens=tokens, price=price,
        measured=measured, check=check, checkpoint=checkpoint, overrides=tuple(set_ or ()), out=out,
    )  # fmt: skip
    raise typer.Exit(run_plan(request, Console()))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's directory, or its run.jsonl.")],
    out: Annotated[Path | None, typer.Option(help="Where the reports go; default beside the records.")] = None,
) -> None:
    """Rebuild report.md, report.html, junit.xml and report.json from a run's records, and show it on the terminal."""
    records = read_run(run)
    folder = out or (run if run.is_dir() else run.parent)
    console = Console()
    try:
        write_reports(folder, records)
    except OSError as error:
        raise typer.BadParameter(f"--out is {str(folder)!r}, which cannot be written: {error.strerror}.") from None
    print_line(console, f"Reports: {', '.join(str(folder / name) for name in REPORT_FILES)}")
    render(records, console)
    raise typer.Exit(run_exit_code(records))


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="The baseline: a run's directory, or its run.jsonl.")],
    after: Annotated[Path, typer.Argument(help="The run that is compared with it.")],
    out: Annotated[Path | None, typer.Option(help="Where compare.md and compare.html go; default nowhere.")] = None,
) -> None:
    """Two runs side by side: what changed, and whether the second is slower or less accurate; then the exit code is 4."""
    from reports.compare import compare as compare_runs
    from reports.compare_view import html, markdown
    from reports.compare_view import render as render_comparison

    found = compare_runs(read_run(before), read_run(after))
    console = Console()
    if out is not None:
        names = (without_paths(str(before)), without_paths(str(after)))
        try:
            write_text_atomically(out / "compare.md", markdown(found, names))
            write_text_atomically(out / "compare.html", html(found, names))
        except OSError as error:
            raise typer.BadParameter(f"--out is {str(out)!r}, which cannot be written: {error.strerror}.") from None
        print_line(console, f"Comparison: {out / 'compare.md'}, {out / 'compare.html'}")
    render_comparison(found, console)
    raise typer.Exit(found.exit_code)


@app.command()
def doctor() -> None:
    """Say what is installed, what can run here, and what to do about the rest."""
    from .doctor import print_doctor

    raise typer.Exit(print_doctor(Console()))


def _goes_with_layerwise(
    checkpoint: str | None, resume: bool, out: Path | None, others: list[tuple[object, object, str]]
) -> None:
    """Refuses what a walk by layers does not take: (given, default, flag)."""
    if checkpoint is None:
        raise typer.BadParameter("--layerwise needs --checkpoint, a folder or a name on the hub.")
    if resume and out is None:
        raise typer.BadParameter("--resume needs --out, the folder of the run to go on with.")
    for flag in (flag for given, default, flag in others if given != default):
        raise typer.BadParameter(f"{flag} does not go with --layerwise.")


def _elsewhere(
    on: str,
    gpu: str | None,
    shard_timeout: float | None,
    price: float | None,
    resume: bool,
    out: Path | None,
    name: str,
) -> "Settings | None":
    """How a command is dispatched to Modal; None where it runs here."""
    if on == "local":
        given = {"--gpu": gpu, "--shard-timeout": shard_timeout, "--price": price, "--resume": resume or None}
        for flag in (flag for flag, value in given.items() if value is not None):
            or_walk = " or --layerwise" if (flag, name) == ("--resume", "verify") else ""
            raise typer.BadParameter(f"{flag} belongs to --on modal{or_walk}, and this run is local.")
        return None
    if on != "modal":
        raise typer.BadParameter(f"--on is {on!r}; allowed are local and modal.")
    from .dispatch.command import DEFAULT_GPU, DEFAULT_TIMEOUT, GPU_VARIABLE, settings_for

    wanted = gpu if gpu is not None else os.environ.get(GPU_VARIABLE, DEFAULT_GPU)
    seconds = shard_timeout if shard_timeout is not None else DEFAULT_TIMEOUT
    try:
        return settings_for(wanted, seconds, price, resume, out, name, timeout_flag="--shard-timeout")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def main(arguments: list[str] | None = None) -> None:
    """Entry point: every wrong use ends in one sentence and exit code 2."""
    errors = Console(stderr=True)
    before = interruptions()
    try:
        with remembered():
            code = app(args=arguments, prog_name="v32", standalone_mode=False)
    except typer.Abort:
        code = INTERRUPTED
    except CommandLineError as error:
        print_line(errors, f"v32: {getattr(error, 'format_message', error.__str__)()}")
        code = USAGE_ERROR
    except RecordError as error:
        print_line(errors, f"v32: {error}")
        code = USAGE_ERROR
    except KeyboardInterrupt:
        print_line(errors, "v32: interrupted.")
        code = INTERRUPTED
    except Exception:
        # What a library made of Ctrl-C on its way up.
        if interruptions() == before:
            raise
        print_line(errors, "v32: interrupted.")
        code = INTERRUPTED
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
