"""What a mutant is: our own code with one known bug, and the public record of that bug."""

from dataclasses import dataclass

from .patching import Patch

# Where the implementations of the operators live.
PLACES = {"torch": "optimized/ops/", "triton": "optimized/kernels/", "native": "optimized/native/"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One known bug as patches of a few lines.

    entry: the bug's number in the catalogue of public bugs (spec 5.2), or "" for a kind of fault that is in no list.
    of: which of the two models is built from the changed copy, "reference" or "optimized".
    source: where the bug is on record, or "generic".
    backend: the implementation of the operators that is patched and must run, or None where no operator is.
    """

    name: str
    entry: str
    of: str
    what: str
    source: str
    patches: tuple[Patch, ...]
    backend: str | None = None


def bug(entry: str, name: str, of: str, what: str, source: str, *patches: tuple[str, str, str]) -> Mutant:
    """A mutant called `<entry>-<name>`, with its patches as (file, old, new)."""
    full = f"{entry}-{name}" if entry else name
    places = {name for file, *_ in patches for name, place in PLACES.items() if file.startswith(place)}
    return Mutant(full, entry, of, what, source, tuple(Patch(*p) for p in patches), min(places, default=None))
