"""The record file of a run: what is written comes back, and any kind of end can be read."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reports.records import (
    Measure,
    Measurement,
    NullCandidate,
    RecordError,
    RunWriter,
    Status,
    Verdict,
    counts,
    exit_code,
    read_run,
    run_exit_code,
    verdict_line,
    write_text_atomically,
)

ROOT = Path(__file__).resolve().parents[2]
HEADER = {"subject": "optimized", "seed": 3, "dtypes": ["fp32"]}


def verdict(check="parity.logits", status=Status.VERIFIED, **fields):
    return Verdict(check, "parity", "optimized", "text-left-padded", status, **fields)


def full_verdict():
    return verdict(
        status=Status.FAILED,
        dtype="fp32",
        device="cpu",
        reason='row 3 · "worst" | <b>\n\ud800',
        measures=(
            Measure("max", math.nan, 1e-5, "abs"),
            Measure("mean", -math.inf),
            Measure("row", math.inf, 0.0),
        ),
        nulls=(NullCandidate("zeros", True), NullCandidate("stale buffer", False, "equal")),
        seconds=1.25,
        reproduce="v32 verify --seed 3",
        data={
            "curves": {"loss": [1.0, math.nan, math.inf]},
            "texts": ["nan", "\\nan", "-inf", "x"],
            "none": None,
        },
    )


def write_small(path, **header):
    with RunWriter(path, {**HEADER, **header}) as writer:
        writer.write(full_verdict())
        writer.write(Measurement("time", "optimized", "L 64", (1.0, math.nan, 2.0), "ms"))
        writer.event("received", device="cpu")
    return path.read_bytes()


def test_what_is_written_comes_back(tmp_path):
    write_small(tmp_path / "run.jsonl", limit=math.inf)
    run = read_run(tmp_path / "run.jsonl")
    # NaN is not equal to itself, so the texts are compared.
    assert repr(run.verdicts) == repr((full_verdict(),))
    assert repr(run.measurements[0].samples) == "(1.0, nan, 2.0)"
    assert run.header == {**HEADER, "limit": math.inf}
    assert (run.events[0].kind, run.events[0].data) == ("received", {"device": "cpu"})
    assert run.problem is None
    assert run.footer is not None
    assert run.footer["ended"] == "complete"
    assert run.footer["exit_code"] == 1
    assert run.footer["counts"]["failed"] == 1
    assert repr(read_run(tmp_path)) == repr(run)


def test_the_file_is_strict_json(tmp_path):
    def refuse(name):
        raise AssertionError(name)

    for line in write_small(tmp_path / "run.jsonl").splitlines():
        json.loads(line, parse_constant=refuse)


def test_cut_at_every_byte(tmp_path):
    content = write_small(tmp_path / "whole.jsonl")
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    path = tmp_path / "run.jsonl"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        run = read_run(path)
        if size == len(content) - 1:
            # Only the end of the last line is missing, and with it nothing of the record.
            assert run.complete
            continue
        assert not run.complete
        assert run.footer is None
        assert run_exit_code(run) in (1, 3)
        assert verdict_line(run).startswith("run did not end: ")
        assert len(run.verdicts) == (size >= ends[1] - 1)
        if size == 0 or (size not in ends and size + 1 not in ends):
            number = sum(end <= size for end in ends) + 1
            assert f"line {number}, " in str(run.problem)
            assert f"byte {size} " in str(run.problem)
        else:
            assert run.problem is None
        if size < ends[0] - 1:
            assert run.header == {}


def test_a_damaged_line_is_named_and_the_others_are_read(tmp_path):
    path = tmp_path / "run.jsonl"
    lines = write_small(path).splitlines(keepends=True)
    damages = (
        b"\x00" * 40,
        b"\xff{}",
        b"[]",
        b"",
        b"[" * 100_000,
        b'{"record":"new"}',
        b'{"record":"verdict","status":"fine"}',
        b'{"record":"verdict","check":NaN}',
        b'{"record":"event","kind":"x","at":"never"}',
        b'{"record":"footer","ended":"x"}',
        lines[0].strip(),
    )
    for damage in damages:
        path.write_bytes(b"".join([lines[0], damage + b"\n", *lines[1:]]))
        run = read_run(path)
        assert len(run.verdicts) == 1
        assert run.footer is not None
        assert str(run.problem).startswith(f"line 2, bytes {len(lines[0])} to ")
        assert not run.complete
        assert verdict_line(run).startswith("run is damaged: line 2")


def test_a_record_that_contradicts_itself_is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"measure max is nan"):
        verdict(measures=(Measure("max", math.nan, 1.0),))
    with pytest.raises(RecordError, match=r"null candidate zeros"):
        verdict(nulls=(NullCandidate("zeros", False),))
    path = tmp_path / "run.jsonl"
    with RunWriter(path, HEADER) as writer:
        writer.write(verdict(measures=(Measure("max", 1.0, 2.0),)))
    path.write_text(path.read_text().replace('"value":1.0', '"value":3.0'))
    assert "measure max is 3.0" in str(read_run(path).problem)


@pytest.mark.parametrize("content", [b"hello", b"\x89PNG\n", b"[1]\n", b'{"a": 1}', b'{"record":"verdict"}\n', b"\n"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordError, match="not a record file"):
        read_run(path)


def test_missing_file_and_unknown_version_are_refused(tmp_path):
    with pytest.raises(RecordError, match="cannot be read"):
        read_run(tmp_path / "none.jsonl")
    path = tmp_path / "run.jsonl"
    path.write_text('{"record":"header","schema":99}\n')
    with pytest.raises(RecordError, match=r"schema version 99; allowed is 1"):
        read_run(path)


def test_unknown_fields_are_ignored(tmp_path):
    path = tmp_path / "run.jsonl"
    write_small(path)
    path.write_text(path.read_text().replace('"check":', '"later":[1],"check":'))
    assert read_run(path).complete


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ([], 3),
        (["verified"], 0),
        (["verified", "skipped", "not-applicable"], 0),
        (["skipped", "not-applicable"], 3),
        (["verified", "error"], 3),
        (["verified", "error", "failed"], 1),
        (["verified", "vacuous"], 1),
    ],
)
def test_exit_codes(statuses, code):
    assert exit_code([Status(status) for status in statuses]) == code
    assert exit_code([Status(status) for status in statuses], usage_error=True) == 2


def test_measures():
    assert Measure("x", 1.0, 4.0).used == 0.25
    assert Measure("x", 1.0).used is None
    assert Measure("x", 0.0, 0.0).used == 0.0
    assert Measure("x", 1.0, 0.0).used == math.inf
    assert repr(Measure("x", math.nan, 0.0).used) == "nan"
    assert Measure("x", 4.0, 4.0).within
    assert not Measure("x", 4.1, 4.0).within
    assert not Measure("x", math.nan).within
    assert not Measure("x", 1.0, math.nan).within


@pytest.mark.parametrize(
    ("error", "ended", "code"),
    [(KeyboardInterrupt, "interrupted", 3), (OSError, "error", 3), (None, "complete", 4)],
)
def test_the_footer_says_how_the_run_ended(tmp_path, error, ended, code):
    def go():
        with RunWriter(tmp_path / "run.jsonl", HEADER) as writer:
            writer.verified_code = 4
            writer.write(verdict())
            if error is not None:
                raise error("stop")

    if error is None:
        go()
    else:
        with pytest.raises(error):
            go()
    run = read_run(tmp_path)
    assert run.footer is not None
    assert run.footer["ended"] == ended
    assert run.footer["exit_code"] == run_exit_code(run) == code
    assert run.complete == (error is None)
    assert list(counts(run)) == list(Status)
    assert verdict_line(run).startswith("verified 1" if error is None else f"run did not end: {ended} by")


def test_verdict_lines(tmp_path):
    def line(*verdicts, **header):
        with RunWriter(tmp_path / "run.jsonl", {**HEADER, **header}) as writer:
            for item in verdicts:
                writer.write(item)
        return verdict_line(read_run(tmp_path))

    assert line(verdict()) == (
        "verified 1 · failed 0 · vacuous 0 · error 0 · skipped 0 · not-applicable 0 — "
        "optimized agrees with the reference"
    )
    assert line(verdict(), claim="the mutants were killed").endswith("— the mutants were killed")
    assert line(verdict(status=Status.SKIPPED)).endswith("— nothing was verified")
    failed = [verdict(f"c{index}", Status.FAILED, dtype="fp32") for index in range(6)]
    assert line(verdict("e", Status.ERROR), *failed).endswith(
        "— FAILED: c0 (fp32), c1 (fp32), c2 (fp32), c3 (fp32), c4 (fp32); and 2 more"
    )
    assert line(verdict("a\nb", Status.ERROR)).endswith("— ERROR: a b")


def test_a_value_that_cannot_be_written_leaves_the_file_whole(tmp_path):
    with RunWriter(tmp_path / "run.jsonl", HEADER) as writer:
        with pytest.raises(RecordError, match=r"data\.x\[1\] is of type object"):
            writer.write(verdict(data={"x": [1, object()]}))
        writer.write(verdict())
    assert len(read_run(tmp_path).verdicts) == 1
    with pytest.raises(RecordError, match="not open"):
        writer.write(verdict())
    with pytest.raises(RecordError, match="key schema"):
        RunWriter(tmp_path / "run.jsonl", {"schema": 2})


def test_a_failed_write_is_taken_back(tmp_path, monkeypatch):
    write = os.write

    def full_disk(file, line):
        if len(line) > 20:
            return write(file, line[:20])
        raise OSError("No space left on device")

    with RunWriter(tmp_path / "run.jsonl", HEADER) as writer:
        writer.write(verdict())
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full_disk)
            with pytest.raises(OSError, match="No space"):
                writer.write(Measurement("t", "optimized", "x", ()))
    assert read_run(tmp_path).complete


def test_an_older_run_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "run.jsonl"
    write_small(path)
    old = path.stat().st_ino
    with RunWriter(path, HEADER, sync=True) as writer:
        assert path.stat().st_ino != old
        assert len(path.read_bytes().splitlines()) == 1
        writer.write(verdict())
        assert len(read_run(path).verdicts) == 1
    assert os.listdir(path.parent) == ["run.jsonl"]


KILLED = """
import sys
from reports.records import *
with RunWriter(sys.argv[1], {}) as writer:
    for step in range(10**9):
        writer.write(Verdict("c", "f", "s", str(step), Status.VERIFIED, reason="x" * 3000))
        if step == 20:
            print("going", flush=True)
"""


def test_a_killed_run_keeps_what_it_wrote(tmp_path):
    path = tmp_path / "run.jsonl"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"going\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    run = read_run(path)
    assert [item.case for item in run.verdicts] == [str(step) for step in range(len(run.verdicts))]
    assert len(run.verdicts) > 20
    assert run.footer is None
    lines = path.read_bytes().split(b"\n")
    assert len(lines) - 2 == len(run.verdicts)
    assert (run.problem is None) == (lines[-1] == b"")


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a" / "report.md"
    write_text_atomically(path, "old ·\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("stop")))
        with pytest.raises(OSError, match="stop"):
            write_text_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old ·\n"
    assert os.listdir(path.parent) == ["report.md"]
    write_text_atomically(path, "new")
    assert path.read_text() == "new"
