"""The commands that the documents show: every line of a `sh` block, and every `v32 …` in running text."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`((?:\S+=\S+ )*(?:v32|modal run|make|torchrun) [^`]+)`(?!`)")
_VARIABLE = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)")
# What stands for something that a reader fills in: a flag to choose, a list cut short, a name in capitals.
_TEMPLATE = re.compile(r"…|\||<(?!time>)|\b(?:RUN|DIR|ID|NAME|FILE|NxTYPE)\b")


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
    """The commands in a document's running text and tables that are whole."""
    # Blocks are blanked, so that lines keep their numbers.
    text = (ROOT / document).read_text(encoding="utf-8")
    text = _BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)
    for match in _INLINE.finditer(text):
        command = Command(document, text.count("\n", 0, match.start()) + 1, " ".join(match[1].split()))
        if not command.is_template:
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
