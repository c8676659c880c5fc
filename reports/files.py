"""The files that a run leaves beside its records, all of them made from the records alone."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from reports.junit import junit
from reports.markdown import markdown
from reports.records import RUN_FILE, Run, read_run, run_exit_code, write_text_atomically
from reports.summary import summary
from reports.terminal import print_line, render

MARKDOWN_FILE, HTML_FILE, JUNIT_FILE, JSON_FILE = "report.md", "report.html", "junit.xml", "report.json"
REPORT_FILES = (MARKDOWN_FILE, HTML_FILE, JUNIT_FILE, JSON_FILE)


def write_reports(folder: Path, run: Run) -> None:
    """Write `REPORT_FILES` into `folder`, each of them whole or not at all.

    Raises:
        OSError: a file cannot be written.
    """
    # The page's charts cost a second of imports, which a command that is only asked for help need not pay.
    from reports.html import html

    for name, make in ((MARKDOWN_FILE, markdown), (JUNIT_FILE, junit), (JSON_FILE, summary), (HTML_FILE, html)):
        write_text_atomically(folder / name, make(run))


def files_written(folder: Path) -> str:
    """The line that a command ends with: where its records are, and the reports beside them."""
    return f"Records: {folder / RUN_FILE} · reports: {', '.join(REPORT_FILES)}"


def finish(folder: Path, console: Console, *beside: str) -> int:
    """End a run: write the reports of the record in `folder`, say where they are and what is `beside` them, and show it.

    Returns:
        The exit code of the run.

    Raises:
        OSError: a file cannot be written.
    """
    run = read_run(folder)
    write_reports(folder, run)
    print_line(console, " · ".join((files_written(folder), *beside)))
    render(run, console)
    return run_exit_code(run)


def begin_in(folder: Path) -> None:
    """Make the folder of a run, and remove the reports of an earlier one, which must not stand beside new records.

    Raises:
        ValueError: it cannot be a folder, as a sentence that names `--out`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in REPORT_FILES:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"--out is {folder}, which cannot be a folder: {error.strerror}.") from error
