"""A changed copy of our own code: patches of a few lines, applied to the sources and imported under another name.

The oracle must stay right while its twin goes wrong. So `reference` and `optimized` are copied to a temporary
folder, patched there, and imported as subpackages of a package of their own; nothing of the running code changes.
"""

import importlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("reference", "optimized")
_OWN_IMPORT = re.compile(rf"^(\s*(?:from|import)\s+)({'|'.join(PACKAGES)})\b", re.MULTILINE)
_numbers = count()


@dataclass(frozen=True, slots=True)
class Patch:
    """Replace `old`, which `file` holds exactly once, by `new`."""

    file: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        """`text` with the patch.

        Raises:
            ValueError: `old` does not occur exactly once, so that the patch no longer says what it changes.
        """
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"A patch of {self.file} must match exactly once, but {self.old!r} occurs {found} times.")
        return text.replace(self.old, self.new)


@dataclass(frozen=True, slots=True)
class Copy:
    """The imported twins of our two packages."""

    reference: Any
    optimized: Any


def patched_sources(patches: Iterable[Patch]) -> dict[str, str]:
    """The whole text of each file that `patches` change, by its path in the repository.

    Raises:
        ValueError: a patch that does not match exactly once.
    """
    texts: dict[str, str] = {}
    for patch in patches:
        texts[patch.file] = patch.apply(texts.get(patch.file) or (ROOT / patch.file).read_text(encoding="utf-8"))
    return texts


@contextmanager
def patched_copy(patches: Iterable[Patch]) -> Iterator[Copy]:
    """Our packages with `patches` applied, importable until the block ends.

    Raises:
        ValueError: a patch that does not match exactly once.
    """
    changed = patched_sources(patches)
    name = f"v32_copy_{next(_numbers)}"
    with tempfile.TemporaryDirectory(prefix="v32-mutant-") as folder:
        top = Path(folder) / name
        for package in PACKAGES:
            shutil.copytree(ROOT / package, top / package, ignore=shutil.ignore_patterns("__pycache__"))
        for own, text in changed.items():
            (top / own).write_text(text, encoding="utf-8")
        for file in top.rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            file.write_text(_OWN_IMPORT.sub(rf"\g<1>{name}.\g<2>", text), encoding="utf-8")
        (top / "__init__.py").touch()
        sys.path.insert(0, folder)
        try:
            importlib.invalidate_caches()
            yield Copy(*(importlib.import_module(f"{name}.{package}") for package in PACKAGES))
        finally:
            sys.path.remove(folder)
            for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
                del sys.modules[module]
