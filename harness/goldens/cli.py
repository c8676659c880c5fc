"""`v32 golden export`, `check` and `update`: exit code 0 fine, 1 differs, 2 wrong usage."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from reports.terminal import print_line

COMMITTED = Path(__file__).resolve().parents[2] / "suites" / "golden" / "vectors"
DIFFERS, USAGE_ERROR = 1, 2
# Sentences on a screen; a wrong constant or config shows in nearly every tensor.
MOST_SHOWN = 40

golden_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Golden vectors: export them for an implementation in any language, check them, update them.",
)

Directory = Annotated[
    Path | None, typer.Argument(metavar="[DIR]", show_default=False, help="Default: the vectors of this repository.")
]


@golden_app.command()
def export(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Missing or empty; docs/golden.md explains the files.")
    ],
) -> None:
    """Write golden vectors: weights, inputs, decisions, scores, losses, gradients, constants, and a manifest."""
    if directory.exists() and not directory.is_dir():
        raise _refused("export", f"DIR is {directory}, which is a file; it must be missing or an empty directory.")
    try:
        taken = directory.is_dir() and any(directory.iterdir())
    except OSError as error:
        raise _refused("export", f"DIR is {directory}, which cannot be read: {error.strerror or error}.") from None
    if taken:
        raise _refused(
            "export", f"DIR is {directory}, which is not empty; v32 golden update rewrites an earlier export."
        )
    from .export import SpecificationError, export_files, write_directory
    from .vectors import build_vectors

    started = _quick()
    vectors = build_vectors()
    try:
        files = export_files(vectors)
    except SpecificationError as error:
        print_line(Console(), str(error))
        print_line(Console(), "not exported: the reference disagrees with the specification")
        raise typer.Exit(DIFFERS) from None
    try:
        write_directory(directory, files)
    except OSError as error:
        raise _refused("export", f"DIR is {directory}, which cannot be written: {error.strerror or error}.") from None
    size = sum(map(len, files.values()))
    print_line(
        Console(),
        f"exported {len(files)} files · {len(vectors.goldens)} tensors · {len(vectors.constants)} constants · "
        f"{size:,} bytes to {directory} in {time.monotonic() - started:.1f} s",
    )


@golden_app.command()
def check(
    directory: Directory = None,
    all_: Annotated[bool, typer.Option("--all", help=f"Every difference, not the first {MOST_SHOWN} only.")] = False,
) -> None:
    """Compute every golden vector again and compare; differences are told in words."""
    directory = _existing("check", directory)
    from .compare import compare

    started = _quick()
    found = compare(directory)
    named = _named(directory)
    _tell(found.sentences, all_)
    seconds = f"{time.monotonic() - started:.1f} s"
    if found.sentences:
        command = f"v32 golden update {named}" if directory != COMMITTED else "v32 golden update"
        print_line(Console(), f"differs · {_counted(found.sentences)} in {named} · {command} accepts what is meant")
        raise typer.Exit(DIFFERS)
    print_line(
        Console(),
        f"agrees · {len(found.vectors.goldens)} tensors · {len(found.vectors.constants)} constants · {seconds} — "
        f"{named} is what the reference computes",
    )


@golden_app.command()
def update(
    directory: Directory = None,
    all_: Annotated[bool, typer.Option("--all", help=f"Every change, not the first {MOST_SHOWN} only.")] = False,
) -> None:
    """Rewrite an export as the reference computes it now, and say what changed; what agrees is left alone."""
    directory = _existing("update", directory)
    from .compare import compare, read_stored
    from .export import SpecificationError, export_files, replace_directory

    _quick()
    found = compare(directory)
    named = _named(directory)
    if not found.sentences:
        print_line(Console(), f"unchanged · {named} is what the reference computes")
        return
    _tell(found.sentences, all_)
    try:
        files = export_files(found.vectors)
        replace_directory(directory, files, read_stored(directory).names)
    except SpecificationError:
        print_line(Console(), "not updated: the reference disagrees with the specification")
        raise typer.Exit(DIFFERS) from None
    except OSError as error:
        raise _refused("update", f"DIR is {directory}, which cannot be written: {error.strerror or error}.") from None
    print_line(Console(), f"updated · {_counted(found.sentences)} written to {named}")


def _existing(command: str, directory: Path | None) -> Path:
    if directory is None:
        directory = COMMITTED
        if not directory.is_dir():
            raise _refused(command, f"DIR is not given, and its default {directory} does not exist; name a DIR.")
    if not directory.exists():
        raise _refused(command, f"DIR is {directory}, which does not exist; v32 golden export writes one.")
    if not directory.is_dir():
        raise _refused(command, f"DIR is {directory}, which is a file; it must be a directory with an export.")
    if not (directory / "manifest.json").exists():
        raise _refused(command, f"DIR is {directory}, which has no manifest.json: it holds no export.")
    return directory


def _named(directory: Path) -> Path:
    # The default is an absolute path, and most often lies below the working directory.
    return directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory


def _refused(command: str, sentence: str) -> typer.Exit:
    print_line(Console(stderr=True), f"v32 golden {command}: {sentence}")
    return typer.Exit(USAGE_ERROR)


def _tell(differences: list[str], everything: bool) -> None:
    shown = differences if everything else differences[:MOST_SHOWN]
    for sentence in shown:
        print_line(Console(), sentence)
    if len(shown) < len(differences):
        print_line(Console(), f"… and {len(differences) - len(shown)} more; --all shows them")


def _counted(differences: list[str]) -> str:
    return f"{len(differences)} difference{'s' if len(differences) != 1 else ''}"


def _quick() -> float:
    import torch

    # The barrier at the end of each operation costs more threads than this model has work for.
    torch.set_num_threads(1)
    return time.monotonic()
