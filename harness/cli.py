"""The command line: `v32 verify`, `v32 bench`, `v32 mutants`, `v32 golden`, `v32 kernels`, `v32 report`, `v32 doctor`.

Exit codes, the first that applies: 2 wrong usage · 1 any check failed or vacuous · 3 any error, or nothing verified · 0.
"""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from reports.markdown import markdown
from reports.records import RecordError, read_run, run_exit_code, write_text_atomically
from reports.terminal import print_line, render

from .goldens.cli import golden_app

USAGE_ERROR = 2
INTERRUPTED = 130
# The base of every error in a command line. typer exports only its leaves, and ships click in one version and not in
# another.
CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]

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
    config: Annotated[str, typer.Option(help="A preset: tiny, bench, small, medium.")] = "tiny",
    subject: Annotated[
        str, typer.Option(help="optimized, reference, transformers, transformers-eager, or FILE.py:factory.")
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
        Path | None, typer.Option(help="Config and weights from a local checkpoint directory instead of a preset.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where run.jsonl and report.md go; default runs/<time>-verify.")
    ] = None,
) -> None:
    """Compare a subject with the reference on real text: choices, arithmetic, KL, gradients, training."""
    from .verify import Request
    from .verify import verify as run_verify

    request = Request(
        config=config, subject=subject, checks=checks, cases=cases, seq_len=seq_len, batch=batch, device=device,
        dtype=dtype, backend=backend, seed=seed, overrides=tuple(set_ or ()), checkpoint=checkpoint,
        out=out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-verify",
    )  # fmt: skip
    raise typer.Exit(run_verify(request, Console()))


@app.command()
def bench(
    config: Annotated[str, typer.Option(help="A preset: tiny, bench, small, medium.")] = "bench",
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
        int | None, typer.Option(help="Samples of each point, 3 or more; default 7, above 2048 tokens 3.")
    ] = None,
    floors: Annotated[bool, typer.Option("--floors", help="Fail the run when a floor on record is missed.")] = False,
    peak_tflops: Annotated[
        float | None, typer.Option(help="The device's peak, to be compared with instead of a product measured here.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one pass, or building a model, may take.")] = 900.0,
    seed: Annotated[int, typer.Option(help="Seed of weights and text.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a config field: name=value.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where run.jsonl and report.md go; default runs/<time>-bench.")
    ] = None,
) -> None:
    """Time and memory of a verified subject against its peers, paired in one run, each in a process of its own."""
    from .bench.command import Request
    from .bench.command import bench as run_bench

    request = Request(
        config=config, subject=subject, against=against, lengths=lengths, passes=passes, backend=backend, batch=batch,
        device=device, dtype=dtype, threads=threads, repeats=repeats, floors=floors, peak_tflops=peak_tflops, timeout=timeout, seed=seed,
        overrides=tuple(set_ or ()), out=out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-bench",
    )  # fmt: skip
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
def report(
    run: Annotated[Path, typer.Argument(help="A run's directory, or its run.jsonl.")],
) -> None:
    """Rebuild report.md from a run's records, and show it on the terminal."""
    records = read_run(run)
    folder = run if run.is_dir() else run.parent
    console = Console()
    write_text_atomically(folder / "report.md", markdown(records))
    render(records, console)
    raise typer.Exit(run_exit_code(records))


@app.command()
def doctor() -> None:
    """Say what is installed, what can run here, and what to do about the rest."""
    from .doctor import print_doctor

    raise typer.Exit(print_doctor(Console()))


def main(arguments: list[str] | None = None) -> None:
    """Entry point: every wrong use ends in one sentence and exit code 2."""
    errors = Console(stderr=True)
    try:
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
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
