"""A record cut at any byte still gives all four reports, and each says where the record ends."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from harness.cli import main
from reports.files import REPORT_FILES, begin_in, write_reports
from reports.html import html
from reports.junit import junit
from reports.markdown import markdown
from reports.records import RunWriter, read_run
from reports.summary import summary
from suites.meta.test_reports import HEADER, HOSTILE, stored_run


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "run.jsonl"
    stored = stored_run(HOSTILE)
    with RunWriter(path, HEADER) as writer:
        # The curves are long, and a chart takes the time of many cuts.
        for item in (*stored.verdicts[:5], *stored.measurements):
            writer.write(item)
        writer.event("note", text=HOSTILE)
    return path.read_bytes()


def cuts(content, many):
    """The ends of all lines, some bytes to both sides, and `many` places between.

    Not the last byte of all: without the end of its last line a record has lost nothing.
    """
    ends = [place for place, byte in enumerate(content, 1) if byte == ord("\n")]
    around = {end + aside for end in ends for aside in (-2, -1, 0, 1)}
    return sorted({0, 1, *around, *range(1, len(content), len(content) // many)} & set(range(len(content) - 1)))


def test_every_report_says_where_a_cut_record_ends(record, tmp_path):
    path = tmp_path / "run.jsonl"
    for place in cuts(record, 100):
        path.write_bytes(record[:place])
        run = read_run(path)
        assert not run.complete
        said = f"cut at byte {place}" if run.problem else "the file has no footer"
        assert said in markdown(run)
        assert said in json.loads(summary(run))["problem"]
        error = ElementTree.fromstring(junit(run).encode()).find("testsuite[@name='run']/testcase/error")
        assert said in error.get("message")


def test_a_page_says_where_a_cut_record_ends(record, tmp_path):
    path = tmp_path / "run.jsonl"
    for place in cuts(record, 8)[::4]:
        path.write_bytes(record[:place])
        run = read_run(path)
        text = html(run)
        said = f"cut at byte {place}" if run.problem else "the file has no footer"
        head = text[: text.index("<nav")]
        assert said in head
        assert "This report is not of a whole run" in head
        assert "Verified" not in head


def test_a_whole_record_says_nothing_of_the_kind(record, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(record)
    run = read_run(path)
    assert run.complete
    assert json.loads(summary(run))["problem"] is None
    assert "not of a whole run" not in html(run) + markdown(run)
    assert ElementTree.fromstring(junit(run).encode()).find("testsuite[@name='run']") is None


def test_report_rebuilds_all_of_them(record, tmp_path, capsys):
    (tmp_path / "run.jsonl").write_bytes(record)
    for words, folder in (([], tmp_path), (["--out", str(tmp_path / "elsewhere")], tmp_path / "elsewhere")):
        with pytest.raises(SystemExit) as ended:
            main(["report", str(tmp_path), *words])
        assert ended.value.code == 1
        assert {path.name for path in folder.iterdir()} >= set(REPORT_FILES)
        assert str(folder / "report.html") in capsys.readouterr().out
    for name in REPORT_FILES:
        assert (tmp_path / name).read_bytes() == (tmp_path / "elsewhere" / name).read_bytes()


def test_a_place_that_cannot_be_written_is_refused_in_one_sentence(record, tmp_path, capsys):
    (tmp_path / "run.jsonl").write_bytes(record)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path), "--out", str(tmp_path / "file" / "x")])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.err.count("\n") == 1
    assert "--out" in said.err


def test_reports_of_an_earlier_run_are_removed(tmp_path):
    write_reports(tmp_path, stored_run(verdicts=()))
    (tmp_path / "mine.txt").touch()
    begin_in(tmp_path)
    begin_in(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
