"""The steps of a walk by layers as commands of their own, for shards: `python -m harness.layerwise download|walk`.

`v32 verify --checkpoint ID --layerwise` is both of them here and now. `calibrate` prints what budgets.py has from it.
"""

import time
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
Checkpoint = Annotated[str, typer.Argument(help="A folder, or a name on the hub.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Out = Annotated[Path | None, typer.Option(help="Where the record goes; default runs/<time>-COMMAND.")]


def _folder(name: str) -> Path:
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"


@app.command()
def download(checkpoint: Checkpoint, revision: Revision = None, out: Out = None) -> None:
    """Fetch what is missing of a checkpoint into the hub's cache."""
    from .download import Request
    from .download import download as run_download

    raise typer.Exit(run_download(Request(checkpoint, revision, out or _folder("download")), Console()))


@app.command()
def walk(
    checkpoint: Checkpoint,
    revision: Revision = None,
    subject: str = "optimized",
    seq_len: int | None = None,
    batch: int | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    backend: str | None = None,
    seed: int = 0,
    until: int | None = None,
    downloaded: Annotated[bool, typer.Option("--downloaded")] = False,
    resume: Annotated[bool, typer.Option("--resume")] = False,
    out: Out = None,
) -> None:
    """Compare a subject with the reference, layer by layer."""
    from .command import Request, verify_layers

    request = Request(
        checkpoint=checkpoint, revision=revision, subject=subject, seq_len=seq_len, batch=batch, device=device,
        dtype=dtype, backend=backend, seed=seed, until=until, downloaded=downloaded, resume=resume, out=out or _folder("layers"),
    )  # fmt: skip
    raise typer.Exit(verify_layers(request, Console()))


@app.command()
def calibrate(
    seeds: Annotated[int, typer.Option(help="Seeds from 0 on.")] = 20, backend: str | None = None, config: str = "tiny"
) -> None:
    """Print the largest share of each of the layers' budgets that the optimized model uses."""
    from .calibrate import used_budgets

    transformers.logging.set_verbosity_error()
    shares, others = used_budgets(backend, range(seeds), config)
    for (check, dtype, measure), share in sorted(shares.items()):
        typer.echo(f"{check:24} {dtype:9} {measure:8} {share:.2f}")
    for verdict in others:
        typer.echo(f"{verdict.status} {verdict.check} {verdict.case} {verdict.dtype} {verdict.reason}")


if __name__ == "__main__":
    app()
