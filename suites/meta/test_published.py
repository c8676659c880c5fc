"""The committed reports are what their records give today, and the index says of each what the record says."""

import re
from pathlib import Path

import pytest

from reports.html import html
from reports.markdown import markdown
from reports.records import RUN_FILE, read_run, run_exit_code, verdict_line
from reports.text import clean

PUBLISHED = Path(__file__).parents[2] / "reports" / "published"
RUNS = sorted(path.parent.name for path in PUBLISHED.glob(f"*/{RUN_FILE}"))
README = (PUBLISHED / "README.md").read_text(encoding="utf-8")
# Where a chart stands is a matter of the fonts at hand.
CHART = re.compile(r"<svg.*?</svg>", re.DOTALL)


def test_the_index_names_every_run():
    assert len(RUNS) >= 5
    assert re.findall(r"^\| \[([\w-]+)\]\(\1/report\.md\)", README, re.MULTILINE) == RUNS


@pytest.mark.parametrize("name", RUNS)
def test_the_reports_are_those_of_the_record(name):
    run = read_run(PUBLISHED / name)
    again = f"rebuild it: v32 report reports/published/{name}"
    assert (PUBLISHED / name / "report.md").read_text(encoding="utf-8") == markdown(run), again
    committed = (PUBLISHED / name / "report.html").read_text(encoding="utf-8")
    assert CHART.sub("", committed) == CHART.sub("", html(run)), again
    # The test above would pass on a page without anything.
    assert len(CHART.sub("", committed)) > 5000


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ended_and_the_index_says_how(name):
    run = read_run(PUBLISHED / name)
    assert run.complete
    assert run_exit_code(run) == (1 if name == "transformers" else 0)
    (line,) = re.findall(rf"^\| \[{name}\].*$", README, re.MULTILINE)
    said = clean(verdict_line(run)).partition(" · ")[0]
    assert said in line
    assert f"`{run.header['command']}`" in line


@pytest.mark.parametrize("name", RUNS)
def test_a_record_says_nothing_of_the_machine_but_what_it_is(name):
    text = (PUBLISHED / name / RUN_FILE).read_text(encoding="utf-8")
    assert not re.search(r"/(?:home|root|tmp|Users|work)/", text)
