"""docs/plan.md says what the commands in it say today."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.cli import app

TEXT = (Path(__file__).resolve().parents[2] / "docs/plan.md").read_text(encoding="utf-8")
COMMANDS = list(dict.fromkeys(re.findall(r"v32 plan --[^\n`|]+", TEXT)))
# The block that stands for the output of the first command, its lines shortened.
SHOWN = [" ".join(line.split()) for line in re.findall(r"\n\n```\n(.*?)```", TEXT, re.DOTALL)[0].splitlines() if line]


def output(command):
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], "--no-check"], env={"COLUMNS": "160"})
    assert result.exit_code in (0, 1), result.output
    return "\n".join(" ".join(line.split()) for line in result.output.splitlines())


def test_the_document_has_its_commands():
    assert len(COMMANDS) == 4
    assert len(SHOWN) == 14


def test_the_output_that_is_shown_is_the_commands():
    given = output(COMMANDS[0])
    assert [line for line in SHOWN if line not in given] == []


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_the_answers_are_the_commands(command):
    row = next(line for line in TEXT.splitlines() if line.startswith("|") and command in line)
    numbers = re.findall(r"\d+\.\d+", row.rsplit("|", 2)[1])
    assert numbers
    given = output(command)
    assert [number for number in numbers if number not in given] == []
