"""A stored export against what the reference computes now: every difference a sentence."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from reports.strict_json import loads

from .constants import Constant, disagreements, shown
from .manifest import DTYPES, MANIFEST_FILE, UNCOMPARED, ManifestError, described, read_manifest, sha256
from .record import GRADIENT_COLUMNS, official_tensors
from .tolerances import RULES, limits
from .vectors import CONFIG_FILE, CONSTANTS_FILE, LETTERS, WEIGHTS_FILE, Golden, Vectors, build_vectors, recipe_state


@dataclass(frozen=True, slots=True)
class Stored:
    """What a directory holds: its manifest, or why there is none, and the content of each file that can be read."""

    manifest: dict[str, Any]
    damage: str | None
    contents: dict[str, bytes]

    @property
    def names(self) -> frozenset[str]:
        """The files that the manifest says were exported, and itself."""
        return frozenset({MANIFEST_FILE, *self.manifest.get("files", ())})

    def tensors(self, file: str) -> dict[str, torch.Tensor] | None:
        """The tensors of a file; None when it is missing or damaged."""
        content = self.contents.get(file)
        if content is None:
            return None
        try:
            return safetensors.torch.load(content)
        # A header that promises what does not follow may also fail where torch builds the tensor.
        except (SafetensorError, ValueError, RuntimeError, KeyError):
            return None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was computed now, and what the stored export has otherwise."""

    vectors: Vectors
    sentences: list[str]


def read_stored(directory: Path, wanted: Iterable[str] = ()) -> Stored:
    """Everything that `directory` holds of an export: the files that its manifest names, and those `wanted`."""
    content = _content(directory / MANIFEST_FILE)
    manifest: dict[str, Any] = {}
    damage = None
    try:
        manifest = read_manifest(content or b"")
    except ManifestError as error:
        damage = str(error)
    # A name with a folder in it is no name of an export, and must not be followed out of it.
    names = [name for name in {*manifest.get("files", ()), *wanted} if Path(name).name == name]
    held = {name: found for name in sorted(names) if (found := _content(directory / name)) is not None}
    return Stored(manifest, damage, held)


def compare(directory: Path) -> Comparison:
    """Compute every vector again, on the stored weights if they are the recipe's, and compare.

    Weights that are missing, damaged or altered are told as such, and everything else is judged on the recipe's, so
    that one wrong weight is one difference.
    """
    stored = read_stored(directory)
    vectors = build_vectors(_trusted_weights(stored))
    if stored.damage is not None:
        # Without a manifest the files can still be looked at.
        stored = Stored({}, stored.damage, read_stored(directory, _files(vectors)).contents)
    return Comparison(vectors, list(differences(stored, vectors)))


def differences(stored: Stored, vectors: Vectors) -> Iterator[str]:
    """One sentence for each way in which `stored` is not `vectors`: constants, manifest, files, config, tensors."""
    yield from disagreements(vectors.constants)
    if stored.damage is not None:
        yield stored.damage
    else:
        yield from _manifest_differences(stored.manifest, described(vectors))
    yield from _file_differences(stored, vectors)
    yield from _config_differences(stored, vectors)
    yield from _constant_differences(stored, vectors)
    for file in _files(vectors):
        if file.endswith(".safetensors"):
            yield from _tensor_differences(file, stored, [g for g in vectors.goldens if g.file == file], vectors)


def _files(vectors: Vectors) -> list[str]:
    return [CONFIG_FILE, CONSTANTS_FILE, *dict.fromkeys(golden.file for golden in vectors.goldens)]


def _trusted_weights(stored: Stored) -> dict[str, torch.Tensor] | None:
    held = stored.tensors(WEIGHTS_FILE)
    recipe = official_tensors(recipe_state())
    if held is None or held.keys() != recipe.keys():
        return None
    for name, value in recipe.items():
        found = held[name]
        if found.dtype != value.dtype or found.shape != value.shape:
            return None
        off = (found.double() - value.double()).abs()
        if not bool((off <= limits(RULES["weight"], value)).all()):
            return None
    return held


def _manifest_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for key, value in here.items():
        if key == "tensors":
            yield from _entry_differences(there["tensors"], value)
        elif key == "config":
            yield from _field_differences("config field", value, there.get(key), MANIFEST_FILE)
        elif isinstance(value, Mapping):
            yield from _field_differences(f"{key}:", value, there.get(key), MANIFEST_FILE)
        elif there.get(key) != value:
            yield f"{key} is {shown(value)}, stored {shown(there.get(key))} ({MANIFEST_FILE})."
    for key in there:
        if key not in here and key not in UNCOMPARED:
            yield f"{MANIFEST_FILE} holds {key}, which is not part of it now."


def _entry_differences(there: list[dict[str, Any]], here: list[dict[str, Any]]) -> Iterator[str]:
    stored = {(entry["file"], entry["name"]): entry for entry in there}
    for entry in here:
        old = stored.pop((entry["file"], entry["name"]), None)
        label = f"{entry['name']} in {entry['file']}"
        if old is None:
            yield f"{label} is not listed ({MANIFEST_FILE})."
            continue
        for name, value in entry.items():
            if old.get(name) != value:
                yield f"{label}: its {name} is {shown(value)}, stored {shown(old.get(name))} ({MANIFEST_FILE})."
    for file, name in stored:
        yield f"{name} in {file} is listed, and is not part of the vectors now ({MANIFEST_FILE})."


def _field_differences(label: str, here: Mapping[str, Any], there: Any, file: str) -> Iterator[str]:
    if not isinstance(there, Mapping):
        yield f"{label.removesuffix(':')} is missing ({file})."
        return
    for name, value in here.items():
        if name not in there:
            yield f"{label} {name} is {shown(value)}, stored nothing ({file})."
        elif isinstance(value, Mapping) and isinstance(there[name], Mapping):
            yield from _field_differences(f"{label} {name}:", value, there[name], file)
        # 1 and 1.0 and True are equal in Python, and another thing to a reader in another language.
        elif value != there[name] or type(value) is not type(there[name]):
            yield f"{label} {name} is {shown(value)}, stored {shown(there[name])} ({file})."
    for name in there:
        if name not in here:
            yield f"{label} {name} is not part of it now, stored {shown(there[name])} ({file})."


def _file_differences(stored: Stored, vectors: Vectors) -> Iterator[str]:
    listed = stored.manifest.get("files", {})
    for name in _files(vectors):
        content, entry = stored.contents.get(name), listed.get(name)
        if stored.damage is None and entry is None:
            yield f"{name} is not listed ({MANIFEST_FILE})."
        if content is None:
            yield f"{name} is missing" + (f" (sha256 {entry['sha256'][:16]}…)." if entry else ".")
        elif entry is not None:
            yield from _content_differences(name, content, entry)
    for name in listed:
        if name not in _files(vectors):
            yield f"{name} is listed, and is not part of the vectors now ({MANIFEST_FILE})."


def _content_differences(name: str, content: bytes, entry: Mapping[str, Any]) -> Iterator[str]:
    found = sha256(content)
    hashes = f"sha256 is {found[:16]}…, the manifest says {entry['sha256'][:16]}…"
    if len(content) < entry["bytes"]:
        yield f"{name} is truncated: it has {len(content)} of {entry['bytes']} bytes; {hashes}."
    elif len(content) > entry["bytes"]:
        yield f"{name} is longer than it was: it has {len(content)} instead of {entry['bytes']} bytes; {hashes}."
    elif found != entry["sha256"]:
        yield f"{name} was altered: {hashes}."


def _config_differences(stored: Stored, vectors: Vectors) -> Iterator[str]:
    content = stored.contents.get(CONFIG_FILE)
    if content is None:
        return
    try:
        there = loads(content)
    except ValueError as error:
        yield f"{CONFIG_FILE} is not JSON: {error}."
        return
    yield from _field_differences("config field", vectors.config, there, CONFIG_FILE)


def _constant_differences(stored: Stored, vectors: Vectors) -> Iterator[str]:
    content = stored.contents.get(CONSTANTS_FILE)
    if content is None:
        return
    try:
        entries = loads(content)
        if not isinstance(entries, list):
            raise ValueError("it is no list of constants")
        there = {constant.name: constant for constant in map(Constant.from_json, entries)}
    except ValueError as error:
        yield f"{CONSTANTS_FILE} cannot be read: {error}."
        return
    # Stored and back, because JSON knows no tuples.
    for constant in (Constant.from_json(loads(c.as_json().encode())) for c in vectors.constants):
        old = there.pop(constant.name, None)
        said = f"constant {constant.name} is missing." if old is None else constant.change(old)
        if said is not None:
            yield said
    for name in there:
        yield f"constant {name} is stored, and is not one of them now."


def _tensor_differences(file: str, stored: Stored, goldens: list[Golden], vectors: Vectors) -> Iterator[str]:
    if file not in stored.contents:
        return
    held = stored.tensors(file)
    if held is None:
        yield f"{file} cannot be read as safetensors; its {len(goldens)} tensors were not compared."
        return
    for golden in goldens:
        found = held.pop(golden.name, None)
        label = f"{golden.name} of {golden.owner}"
        if found is None:
            yield f"{label} is missing in {file}."
        elif found.dtype != golden.value.dtype or found.shape != golden.value.shape:
            yield (
                f"{label} is {DTYPES[golden.value.dtype]} of shape {list(golden.value.shape)}, stored "
                f"{DTYPES.get(found.dtype, str(found.dtype))} of shape {list(found.shape)}."
            )
        elif (said := value_difference(golden, found, vectors.gradient_rows)) is not None:
            yield f"{label}: {said}"
    for name in held:
        yield f"{name} in {file} is not part of the vectors now."


def value_difference(golden: Golden, stored: torch.Tensor, gradient_rows: Mapping[str, list[str]]) -> str | None:
    """The worst entry of `stored`, and how many are off by more than is allowed; None when none is.

    Infinite entries must be infinite in both, of the same sign.
    """
    here, there = golden.value.double(), stored.double()
    allowed = limits(golden.rule, here)
    # inf − inf is no number; where both are equal they are not off at all.
    off = torch.where(here == there, 0.0, (here - there).abs())
    wrong = ~(off <= allowed)
    count = int(wrong.sum())
    if not count:
        return None
    # What is no number or infinitely far is worst; so is anything where nothing is allowed.
    excess = torch.where(wrong, (off / allowed).nan_to_num(nan=torch.inf), 0.0)
    ties = torch.where(excess == excess.max(), off.nan_to_num(nan=torch.inf), -1.0)
    at = tuple(int(i) for i in torch.unravel_index(ties.argmax(), ties.shape))
    numbers = (
        f"is {float(here[at]):.9g}, stored {float(there[at]):.9g}, off by {float(off[at]):.3g}, "
        f"allowed {float(allowed[at]):.3g}"
    )
    entries = f"{count} of {off.numel()} entries differ"
    return f"{_place(golden, at, gradient_rows)} {numbers}; {entries}."


def _place(golden: Golden, at: tuple[int, ...], gradient_rows: Mapping[str, list[str]]) -> str:
    words = []
    for letter, index in zip(golden.letters, at, strict=True):
        if letter == "G":
            words.append(f"of {gradient_rows[golden.name.partition('.')[2]][index]}")
        elif letter == "U":
            words.append(GRADIENT_COLUMNS[index])
        elif letter == "1":
            words.append("it")
        else:
            words.append(f"{LETTERS[letter]} {index}")
    return ", ".join(words)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
