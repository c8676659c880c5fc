"""The table of shards: in every report of a run that has some, whole where one died, inert, and absent elsewhere."""

import json
import math

import pytest

from reports.html import html
from reports.markdown import markdown
from reports.records import Event, Run, RunWriter, Status, read_run
from reports.shards import COLUMNS, shards
from reports.summary import summary
from suites.meta.test_html import Parsed
from suites.meta.test_reports import HOSTILE, printed, stored_run, verdict

DIED = "its container died: worker lost"
DOWNLOAD = {
    "shard": "download", "gpu_asked": [], "gpu": [], "attempts": 1, "seconds": 7200.0, "cost": None, "exit_code": 0,
    "problem": "",
}  # fmt: skip
LAYERS = {
    "shard": "layers", "gpu_asked": ["H200", "H100"], "gpu": ["NVIDIA H100 80GB HBM3"], "attempts": 1, "seconds": 600.0,
    "cost": 0.6583, "exit_code": 1, "problem": "",
}  # fmt: skip
DEAD = {
    "shard": "verify-kl", "gpu_asked": ["H200"], "gpu": [], "attempts": 3, "seconds": 12.5, "cost": 0.0137,
    "exit_code": None, "problem": DIED,
}  # fmt: skip


def run_of(*facts) -> Run:
    return stored_run(events=tuple(Event("shard", float(at), dict(data)) for at, data in enumerate(facts)))


@pytest.fixture
def dispatched(tmp_path) -> Run:
    """A run whose third shard died, as it is read back from its record."""
    with RunWriter(tmp_path / "run.jsonl", {"subject": "optimized"}) as writer:
        for facts in (DOWNLOAD, LAYERS, DEAD):
            writer.event("shard", **facts)
        writer.write(verdict("shard.verify-kl", Status.ERROR, "dispatch", reason=DIED))
    return read_run(tmp_path)


def test_every_shard_stands_with_its_gpu_attempts_time_cost_and_end(dispatched):
    assert shards(dispatched).cells() == [
        ["download", "none", "none", "1", "2h00m", "-", "done", ""],
        ["layers", "H200, H100", "NVIDIA H100 80GB HBM3", "1", "10m00s", "0.66", "a check failed", ""],
        ["verify-kl", "H200", "none", "3", "12.5s", "0.01", "did not do its work", DIED],
        ["total", "", "", "-", "2h10m", "0.67", "", ""],
    ]


def test_the_page_has_the_table_beside_what_ran_where(dispatched):
    page = Parsed(html(dispatched))
    headings = page.text("h2")
    assert headings.index("Shards") == headings.index("What ran where") + 1
    assert set(COLUMNS) <= set(page.text("th"))
    cells = page.text("td")
    assert {"did not do its work", DIED, "3", "0.67", "2h10m"} <= set(cells)


def test_a_comment_has_the_table(dispatched):
    text = markdown(dispatched)
    assert "### Shards" in text
    assert f"| verify-kl | H200 | none | 3 | 12.5s | 0.01 | did not do its work | {DIED} |" in text
    assert r"| total |  |  | \- | 2h10m | 0.67 |  |  |" in text


@pytest.mark.parametrize("width", [60, 100, 200])
def test_a_terminal_has_the_table_and_a_narrow_one_what_is_most_needed(width, dispatched):
    text = printed(dispatched, width)
    lines = text.splitlines()
    first = lines.index("shards")
    table = "\n".join(lines[first : lines.index("", first)])
    assert "verify-kl" in table and "2h10m" in table and "0.67" in table
    assert ("what went wrong" in table) == ("H200, H100" in table) == (width == 200)
    # What went wrong is said by all of them.
    assert DIED in text


def test_programs_get_the_numbers(dispatched):
    found = json.loads(summary(dispatched))["shards"]
    assert [row["name"] for row in found["rows"]] == ["download", "layers", "verify-kl"]
    dead = found["rows"][2]
    assert (dead["attempts"], dead["seconds"], dead["gpu"], dead["problem"]) == (3, 12.5, [], DIED)
    assert found["seconds"] == pytest.approx(7812.5)
    assert found["cost"] == pytest.approx(0.672)


def test_without_a_price_there_is_no_cost():
    found = shards(run_of({**LAYERS, "cost": None}))
    assert found.cost is None
    assert [row[5] for row in found.cells()] == ["-", "-"]


def test_a_run_without_shards_shows_nothing():
    run = stored_run()
    assert shards(run) is None
    assert "Shards" not in Parsed(html(run)).text("h2")
    assert "### Shards" not in markdown(run)
    assert "shards" not in printed(run).splitlines()
    assert json.loads(summary(run))["shards"] is None


def test_hostile_text_in_a_shard_is_inert():
    run = run_of({**DEAD, "shard": HOSTILE, "gpu": [HOSTILE], "gpu_asked": [HOSTILE], "problem": HOSTILE})
    text = html(run)
    assert "<script>&</script>" not in text
    assert not Parsed(text).all("script")
    assert "\x1b" not in text and "\u202e" not in text
    assert "<script>" not in markdown(run)
    assert "\x1b" not in printed(run, 200) and "\u202e" not in printed(run, 200)


@pytest.mark.parametrize("wrong", [None, "three", True, math.nan, math.inf, 10**400, [1], {"a": 1}])
def test_numbers_that_are_none_are_left_out(wrong):
    run = run_of(dict.fromkeys(("shard", "gpu_asked", "gpu", "attempts", "seconds", "cost", "exit_code"), wrong))
    (row,) = shards(run).rows
    assert (row.attempts, row.seconds, row.cost, row.exit_code) == (None, None, None, None)
    for text in (html(run), markdown(run), printed(run)):
        assert "not known" in text
    json.loads(summary(run))
