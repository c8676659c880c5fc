"""The commands that the documents show: every line of a `sh` block, and every `v32 …` and its like in running text.

Running text also names commands without meaning that they be typed: `v32 report`, `make lint`. Those are left out; with
an argument it is a command.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
_FENCED = re.compile(r"^```\w*\n.*?^```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(
    r"(?<!`)`((?:[A-Z]\w*=\S+ )*(?:\.venv/bin/)?(?:v32|modal|make|torchrun|python|pip|pytest|ruff|mypy)\s[^`]+)`(?!`)"
)
# What follows a program's name without being an argument.
_SUBCOMMAND = re.compile(r"[a-z][a-z-]*")
_VARIABLE = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)")
# What stands for something that a reader fills in: a flag to choose, a list cut short, a name in capitals.
_TEMPLATE = re.compile(r"…|\||<(?!time>)|\b(?:RUN|DIR|FOLDER|ID|NAME|FILE|NxTYPE)\b")


@dataclass(frozen=True, slots=True)
class Command:
    """A command as a document shows it: `text` without its comment."""

    document: str
    line: int
    text: str

    @property
    def variables(self) -> dict[str, str]:
        """The environment that it sets in front."""
        found = {}
        for word in shlex.split(self.text):
            match = _VARIABLE.fullmatch(word)
            if match is None:
                break
            found[match[1]] = match[2]
        return found

    @property
    def words(self) -> list[str]:
        """The program and its arguments."""
        return shlex.split(self.text)[len(self.variables) :]

    @property
    def is_name(self) -> bool:
        """Whether it is a program and subcommands of it, with nothing to run them on."""
        program, *words = self.words
        most = {"v32": 2, "modal": 1, "make": 1, ".venv/bin/v32": 2}.get(program, 0)
        return len(words) <= most and all(_SUBCOMMAND.fullmatch(word) for word in words)

    @property
    def is_template(self) -> bool:
        """Whether a reader must fill something in before it is a command."""
        return bool(_TEMPLATE.search(self.text))


def in_blocks(document: str) -> Iterator[Command]:
    """The commands of a document's `sh` blocks, in order; `a && b` is two."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for block in _BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1)) + 1
        for number, line in enumerate(block[1].splitlines()):
            for part in _without_comment(line).split("&&"):
                if part.strip():
                    yield Command(document, first + number, part.strip())


def inline(document: str) -> Iterator[Command]:
    """The commands in a document's running text and tables; what is a name only is none."""
    # Blocks are blanked, so that lines keep their numbers.
    text = (ROOT / document).read_text(encoding="utf-8")
    text = _FENCED.sub(lambda block: "\n" * block[0].count("\n"), text)
    for match in _INLINE.finditer(text):
        command = Command(document, text.count("\n", 0, match.start()) + 1, " ".join(match[1].split()))
        if not command.is_name:
            yield command


def _without_comment(line: str) -> str:
    """The line up to a # that no quote holds, as a shell reads it."""
    lexer = shlex.shlex(line, posix=False, punctuation_chars=False)
    lexer.whitespace_split = True
    lexer.commenters = ""
    words = []
    for word in lexer:
        if word.startswith("#"):
            break
        words.append(word)
    return " ".join(words)
