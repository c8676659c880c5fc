"""manifest.json: what each file and tensor of an export is, in words and numbers that need no Python to read."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .inputs import CASES, LENGTH, MODES, PRESET, SEED, SPEC_VERSION, TEXT
from .record import GRADIENT_COLUMNS
from .tolerances import tolerance
from .vectors import CONFIG_FILE, CONSTANTS_FILE, LETTERS, WEIGHTS_FILE, Golden, Vectors

MANIFEST_FILE = "manifest.json"
FORMAT, FORMAT_VERSION = "v32-golden", 1
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.int32: "I32"}
# What says where an export was made and may differ between two that agree.
UNCOMPARED = ("written_with", "files")


class ManifestError(ValueError):
    """manifest.json cannot be read; the message is a sentence."""


def manifest_of(vectors: Vectors, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The manifest of `files`, which hold `vectors`. Keys come in the order in which they are explained to readers."""
    return {
        **described(vectors),
        "written_with": {"torch": torch.__version__, "deepseek-v32-verify": _own_version()},
        "files": {
            name: {"bytes": len(content), "sha256": sha256(content), "meaning": _file_meaning(name)}
            for name, content in files.items()
        },
    }


def described(vectors: Vectors) -> dict[str, Any]:
    """All of the manifest that must be the same wherever the export is made."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spec": SPEC_VERSION,
        "recipe": {
            "model": f"preset {PRESET}: config.json, and model.safetensors in fp32, computed with in fp64",
            "seed": SEED,
            "length": LENGTH,
            "text": [row[: LENGTH - 1].decode("ascii") for row in TEXT],
        },
        "config": vectors.config,
        "cases": CASES,
        "modes": MODES,
        "letters": LETTERS,
        "projection_vector": "cos(i + 1), i from 0, in radians; tensors are flattened in row-major order",
        "judged": {
            "entry": "|actual - stored| <= tolerance, each entry; -inf and inf must stand in the same places",
            "gradient row": "|actual - stored| <= tolerance times the row's stored sum of magnitudes for the columns sum, "
            "sum of magnitudes and projection, times its stored l2 norm for the others",
        },
        "gradient_columns": list(GRADIENT_COLUMNS),
        "gradient_rows": vectors.gradient_rows,
        "tensors": [_entry(golden) for golden in vectors.goldens],
    }


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """JSON with one line for each entry of a list or mapping on the top level; ASCII, the same for the same manifest."""
    parts = []
    for key, value in manifest.items():
        if isinstance(value, Mapping):
            lines = [f"  {json.dumps(name)}: {json.dumps(item, allow_nan=False)}" for name, item in value.items()]
            body = "{\n" + ",\n".join(lines) + "\n }"
        elif isinstance(value, list):
            body = "[\n" + ",\n".join(f"  {json.dumps(item, allow_nan=False)}" for item in value) + "\n ]"
        else:
            body = json.dumps(value, allow_nan=False)
        parts.append(f" {json.dumps(key)}: {body}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read_manifest(content: bytes) -> dict[str, Any]:
    """The manifest in `content`, its shape checked as far as the comparison relies on it.

    Raises:
        ManifestError: it is no JSON, or no manifest of this format.
    """
    try:
        manifest = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise ManifestError(f"{MANIFEST_FILE} is not JSON: {error}.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ManifestError(f"{MANIFEST_FILE} is not the manifest of golden vectors: it lacks format {FORMAT!r}.")
    files, tensors = manifest.get("files"), manifest.get("tensors")
    whole = isinstance(files, dict) and all(
        isinstance(f, dict) and isinstance(f.get("bytes"), int) and isinstance(f.get("sha256"), str)
        for f in files.values()
    )
    if not whole:
        raise ManifestError(f"{MANIFEST_FILE} is damaged: files must give bytes and sha256 of each file.")
    if not isinstance(tensors, list) or not all(
        isinstance(t, dict) and isinstance(t.get("file"), str) and isinstance(t.get("name"), str) for t in tensors
    ):
        raise ManifestError(f"{MANIFEST_FILE} is damaged: tensors must give file and name of each tensor.")
    return manifest


def sha256(content: bytes) -> str:
    """The hash of a file's content, 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _entry(golden: Golden) -> dict[str, Any]:
    return {
        "file": golden.file,
        "name": golden.name,
        "dtype": DTYPES[golden.value.dtype],
        "shape": list(golden.value.shape),
        "letters": golden.letters,
        "meaning": golden.meaning,
        "tolerance": tolerance(golden.rule, golden.value),
        "judged": golden.rule.judged,
    }


def _file_meaning(name: str) -> str:
    fixed = {
        CONFIG_FILE: "The model's config; with model.safetensors this directory is a checkpoint that transformers loads.",
        WEIGHTS_FILE: "The weights of every case, by their published names.",
        CONSTANTS_FILE: "Constants of the specification with their golden values, one a line.",
    }
    if name in fixed:
        return fixed[name]
    case, what, *rest = name.split(".")
    if what == "inputs":
        return f"Tokens, mask, positions and labels of case {case}."
    of = "Intermediate tensors of the first layer" if rest[0] == "layer0" else "Outputs"
    return f"{of} of case {case}, {what}."


def _own_version() -> str:
    try:
        return version("deepseek-v32-verify")
    except PackageNotFoundError:
        return "unknown"
