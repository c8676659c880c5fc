"""What is sent and what comes back: a shard, the pieces of its record, and how it ended."""

import hashlib
import json
import shlex
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

from ..environment import ROOT

SUITES = ("verify", "kernels", "bench", "sft")
# What is asked for by its own flag, and reads and writes the hub's cache.
CHECKPOINT = "checkpoint"
# What a shard's process needs of this project, and so what a container is sent.
PACKAGES = ("reference", "optimized", "reports", "harness", "suites")
FILES = ("pyproject.toml", "constraints.txt", "conftest.py")
# What tools leave behind, and reports of runs that are over; nothing else, so that goldens, templates and C++ come along.
LEFT_BEHIND = ("**/__pycache__", "**/*.pyc", "**/.*", "**/published")


@dataclass(frozen=True, slots=True)
class Shard:
    """One command of ours: `python -m module words --out FOLDER`, with `files` (name and text) beside it.

    `on_gpu` False: it asks for no GPU. `resumes`: it goes on from what an earlier attempt left in its folder. `after`: it
    waits for the shard of that name, and is not run where that one did not do its work. `ranks`: processes that torchrun
    starts, each on a GPU of its own.
    """

    name: str
    suite: str
    words: tuple[str, ...]
    module: str = "harness.cli"
    on_gpu: bool = True
    resumes: bool = False
    files: tuple[tuple[str, str], ...] = ()
    after: str = ""
    ranks: int = 1

    @property
    def launch(self) -> tuple[str, ...]:
        """The module, and all that comes before `--out`."""
        if self.ranks == 1:
            return (self.module, *self.words)
        torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks))
        return (*torchrun, "-m", self.module, *self.words)

    @property
    def command(self) -> str:
        """The command as a user would type it."""
        if self.module == "harness.cli" and self.ranks == 1:
            return shlex.join(["v32", *self.words])
        return shlex.join(["python", "-m", *self.launch])

    @property
    def identity(self) -> dict[str, object]:
        """What must be equal for an earlier answer to be this shard's."""
        return json.loads(json.dumps({"launch": self.launch, "files": self.files}))


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a shard's record file: `text` begins at byte `at` of it. At 0 the file has begun anew."""

    at: int
    text: str


@dataclass(frozen=True, slots=True)
class End:
    """How a shard ended. `record` is its whole file, `log` the end of what it printed.

    `problem` is one sentence about a command that did not do its work, empty when it came to its own end; with
    `infrastructure` the fault is the network's, and another attempt goes on from what this one left.
    """

    problem: str
    exit_code: int | None = None
    seconds: float = 0.0
    record: str | None = None
    log: str = ""
    gpu: tuple[str, ...] = ()
    container: str = ""
    attempts: int = 1
    infrastructure: bool = False

    def to_json(self) -> str:
        """Everything but the record, which has a file of its own."""
        return json.dumps({**asdict(self), "record": None})

    @classmethod
    def from_json(cls, text: str) -> "End":
        """What `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "gpu": tuple(fields["gpu"])})


# What running a shard gives: pieces of its record as it grows, then its end.
Items: TypeAlias = Generator[Piece | End, None, None]


def gpu_count(gpu: Sequence[str]) -> int:
    """How many GPUs each of these names asks for: 8 for H200:8; 1 where there are none."""
    return int(gpu[0].partition(":")[2] or 1) if gpu else 1


def source_files(root: Path = ROOT) -> Iterable[Path]:
    """The files of the project that a shard's process can read, in a fixed order."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            inside = path.relative_to(root)
            if path.is_file() and not any(
                part in ("__pycache__", "published") or part.startswith(".") for part in inside.parts
            ):
                yield path
    yield from (root / name for name in FILES)


def fingerprint(root: Path = ROOT) -> str:
    """A hash of the project's code, goldens and versions: answers of two codes are never put into one record."""
    found = hashlib.sha256()
    for path in source_files(root):
        content = path.read_bytes()
        found.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()


def verify_shards(words: Sequence[str], checks: str, files: tuple[tuple[str, str], ...], on_gpu: bool) -> list[Shard]:
    """`v32 verify` with `words`, one shard for each family that `checks` touches.

    Raises:
        ValueError: a check that there is not.
    """
    # Imports torch, which a container's first process must not need.
    from ..runner import select_checks

    by_family: dict[str, list[str]] = {}
    for check in select_checks(checks.split(",")):
        by_family.setdefault(check.family, []).append(check.name)
    if not by_family:
        raise ValueError("--checks must name something; all stands for every one.")
    whole = {family: [c.name for c in select_checks([family])] for family in by_family}
    found = []
    for family, names in by_family.items():
        chosen = family if names == whole[family] else ",".join(names)
        line = ("verify", *words, "--checks", chosen)
        found.append(Shard(f"verify-{family}", "verify", line, on_gpu=on_gpu, files=files))
    return found
