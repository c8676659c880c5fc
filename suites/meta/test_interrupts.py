"""Ctrl-C ends a run as interrupted, also where what runs below makes another error of it, or nothing at all."""

import contextlib
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import transformers

from harness import cli, runner
from harness.checks import Check
from harness.cli import INTERRUPTED, main
from harness.mutants import matrix
from harness.subjects import resolve_subject
from reports.interrupts import interruptions, remembered
from reports.records import RunWriter, Status, Verdict, read_run

SMALL = ("--cases", "text", "--dtype", "float32", "--seq-len", "32", "--batch", "1", "--out", "run")


@pytest.fixture(autouse=True)
def hears(tmp_path, monkeypatch):
    """A terminal's process: one in the background may have been told to ignore Ctrl-C."""
    monkeypatch.chdir(tmp_path)
    verbosity, handler = transformers.logging.get_verbosity(), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def v32(*words):
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return ended.value.code


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def translated():
    """As a clean-up does that needs what the interrupted lines would have made."""
    try:
        ctrl_c()
    finally:
        raise UnboundLocalError("cannot access local variable")


def swallowed():
    with contextlib.suppress(BaseException):
        ctrl_c()


def verdict():
    return Verdict("finite", "finite", "reference", "text", Status.VERIFIED)


def record(path, *steps):
    with remembered(), RunWriter(path, {}) as writer:
        for step in steps:
            step(writer)


@pytest.mark.parametrize("lost", [ctrl_c, translated, swallowed])
@pytest.mark.parametrize("whose", ["harness", "subject"])
def test_a_run_whose_check_loses_the_interrupt_is_interrupted(monkeypatch, capsys, lost, whose):
    def check(bench):
        if whose == "harness":
            lost()
        else:
            bench.of_subject(lost)
        return runner.Answer([], [])

    checks = [Check(f"finite.{i}", "finite", check) for i in range(3)]
    monkeypatch.setattr(runner, "CHECKS", checks)
    assert v32("verify", "--subject", "reference", "--checks", "finite", *SMALL) == 3
    found = read_run("run")
    assert found.verdicts == ()
    assert found.footer is not None
    assert (found.footer["ended"], found.footer["exit_code"]) == ("interrupted", 3)
    assert "run did not end" in Path("run/report.md").read_text()
    captured = capsys.readouterr()
    assert "run did not end" in captured.out.splitlines()[-1]
    assert "error  finite" not in captured.out
    assert "Traceback" not in captured.err


def test_a_check_that_raises_without_an_interrupt_stays_an_error(monkeypatch):
    def check(bench):
        raise UnboundLocalError("cannot access local variable")

    monkeypatch.setattr(runner, "CHECKS", [Check("finite", "finite", check)])
    assert v32("verify", "--subject", "reference", "--checks", "finite", *SMALL) == 3
    found = read_run("run")
    assert found.footer is not None
    assert found.footer["ended"] == "complete"
    assert {v.status for v in found.verdicts} == {Status.ERROR}


@pytest.mark.parametrize("lost", [ctrl_c, translated, swallowed])
def test_an_interrupt_leaves_the_writers_block_as_such(tmp_path, lost):
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "run.jsonl", lambda writer: writer.write(verdict()), lambda writer: lost())
    found = read_run(tmp_path / "run.jsonl")
    assert found.footer is not None
    assert (found.footer["ended"], found.footer["reason"]) == ("interrupted", "KeyboardInterrupt")
    assert len(found.verdicts) == 1


@pytest.mark.parametrize("write", [lambda writer: writer.write(verdict()), lambda writer: writer.event("received")])
def test_nothing_is_recorded_after_an_interrupt_that_was_lost(tmp_path, write):
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "run.jsonl", lambda writer: swallowed(), write)
    found = read_run(tmp_path / "run.jsonl")
    assert (found.verdicts, found.events) == ((), ())


def test_the_next_run_of_a_process_is_not_interrupted(tmp_path):
    with remembered():
        swallowed()
        with RunWriter(tmp_path / "run.jsonl", {}) as writer:
            writer.write(verdict())
    assert read_run(tmp_path / "run.jsonl").complete


def test_an_error_that_was_an_interrupt_ends_a_command_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(cli, "read_run", lambda path: translated())
    assert v32("report", "somewhere") == INTERRUPTED
    assert capsys.readouterr().err == "v32: interrupted.\n"


def test_an_error_of_its_own_keeps_its_traceback(monkeypatch):
    def broken(path):
        raise LookupError("nobody is here")

    monkeypatch.setattr(cli, "read_run", broken)
    with pytest.raises(LookupError):
        main(["report", "somewhere"])


def test_a_worker_of_the_mutants_begins_nothing_after_ctrl_c():
    with ProcessPoolExecutor(1, get_context("spawn"), matrix.start_worker) as pool:
        assert pool.submit(matrix.unless_interrupted, abs, -1).result() == 1
        ended = [pool.submit(matrix.unless_interrupted, work) for work in (swallowed, os.getpid)]
        ended[0].result()
        with pytest.raises(KeyboardInterrupt):
            ended[1].result()


def test_a_pass_ends_with_the_check_that_was_interrupted(monkeypatch):
    ran = []

    def check(bench):
        ran.append(bench)
        return translated()

    monkeypatch.setattr(matrix, "CHECKS", [Check(f"finite.{i}", "finite", check) for i in range(3)])
    with remembered(), pytest.raises(KeyboardInterrupt):
        matrix.one_pass(resolve_subject("reference"), 0)
    assert len(ran) == 1


def test_pythons_handler_is_back_afterwards():
    with remembered():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_handler_is_left_alone():
    heard = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    before = interruptions()
    with remembered():
        ctrl_c()
    assert (heard, interruptions()) == ([signal.SIGINT], before)


def test_a_command_runs_in_another_thread_too():
    done = []

    def call():
        with remembered():
            done.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert done == [True]
