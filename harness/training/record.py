"""The record of a training run, in one file across any number of processes: no step twice, none missing."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from reports.live import LiveTraining
from reports.records import RUN_FILE, RunWriter, Verdict, read_run
from reports.schema import Event
from reports.strict_json import JSON
from reports.training import STARTED, STEP

from .loop import Listener

NOTE = "note"
# Under this name until it holds all that is kept of the record before: a kill in between loses nothing.
_NEXT = f".{RUN_FILE}.next"


class Recorder(Listener):
    """Writes what a run reports to `out`/run.jsonl, and shows it.

    A run that goes on takes the steps before its state over from the record that is there; what an earlier process did
    beyond its last state is done again, and recorded again in its place.
    """

    def __init__(
        self, out: Path, header: Mapping[str, JSON], stack: ExitStack, live: LiveTraining, subject: str, reproduce: str
    ) -> None:  # fmt: skip
        self.out, self.header, self.stack, self.live = out, header, stack, live
        self.subject, self.reproduce = subject, reproduce

    def began(self, step: int, facts: Mapping[str, JSON]) -> None:
        """Open the record.

        Raises:
            ValueError: it lacks a step that the state has done.
            RecordError: what is there is no record.
        """
        kept = self._kept(step) if step else []
        header = {**self.header, "training": {**self.header["training"], **facts}}
        path = self.out / (_NEXT if step else RUN_FILE)
        self.writer = self.stack.enter_context(RunWriter(path, header))
        for event in kept:
            self.writer.event(event.kind, **event.data)
        self.writer.event(STARTED, step=step)
        if step:
            # The writer holds the file itself, whatever its name.
            os.replace(path, self.out / RUN_FILE)
        self.live.note(_who_trains(facts["parameters"]))
        self.live.begin(step)

    def _kept(self, step: int) -> list[Event]:
        found = [e for e in read_run(self.out).events if e.kind in (STEP, STARTED) and e.data["step"] < step]
        there = {event.data["step"] for event in found if event.kind == STEP}
        missing = next((i for i in range(step) if i not in there), None)
        if missing is not None:
            raise ValueError(
                f"--resume: {self.out / RUN_FILE} lacks step {missing}, which the state has done; "
                "put the record back, or start again in another folder."
            )
        return found

    def noted(self, sentence: str) -> None:
        """Record and show a sentence."""
        self.writer.event(NOTE, text=sentence)
        self.live.note(sentence)

    def stepped(self, values: Mapping[str, JSON]) -> None:
        """Record and show a step."""
        self.writer.event(STEP, **values)
        self.live.step(values)

    def judged(self, verdict: Verdict) -> None:
        """Record a verdict, with the command that reproduces it."""
        self.writer.write(replace(verdict, subject=self.subject, reproduce=self.reproduce))


def _who_trains(parameters: Mapping[str, JSON]) -> str:
    """`trainable_report` in one line."""
    total, training = (sum(column) for column in zip(*parameters.values(), strict=True))
    groups = " · ".join(f"{group} {trains:,}/{count:,}" for group, (count, trains) in parameters.items())
    return f"{training:,} of {total:,} parameters train: {groups}"
