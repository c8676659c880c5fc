"""An example reader, without torch and without the safetensors package: it recomputes one layer's index scores.

    python read_plain.py DIR

A safetensors file is 8 bytes (the length of the header, little-endian), a JSON header that gives each tensor's dtype,
shape and place, and the numbers behind it. Exit codes: 0 everything agrees, 1 something differs.

Letters: L rows, S key slots, J indexer heads, E indexer head dim, K selected keys.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "I32": "<i4"}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file, by name."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(content[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def index_scores(q_LJE: np.ndarray, k_SE: np.ndarray, w_LJ: np.ndarray) -> np.ndarray:
    """I[t, s] = Σ_j w[t, j] · relu(q[t, j] · k[s]), fp64 `[L, S]`."""
    dots_LJS = q_LJE.astype(np.float64) @ k_SE.astype(np.float64).T
    return np.einsum("lj,ljs->ls", w_LJ.astype(np.float64), np.maximum(dots_LJS, 0.0))


def select(scores_LS: np.ndarray, start_L: np.ndarray, k: int) -> np.ndarray:
    """The k best visible keys of each row `[L, K]`: ascending from the document's start, lowest index first in a tie."""
    chosen_LK = np.full((len(scores_LS), k), -1)
    for row, (scores, start) in enumerate(zip(scores_LS, start_L, strict=True)):
        visible = scores[start : row + 1]
        best = np.sort(np.argsort(-visible, kind="stable")[:k])
        chosen_LK[row, : len(best)] = best
    return chosen_LK


def main(directory: Path) -> int:
    """Compare sequence 0 of the case text, sparse, layer 0; prints a line for each comparison."""
    manifest = json.loads((directory / "manifest.json").read_text(encoding="ascii"))
    tolerance = {(t["file"], t["name"]): t["tolerance"]["float32"] for t in manifest["tensors"]}
    layer = read_safetensors(directory / "text.sparse.layer0.safetensors")
    stored = read_safetensors(directory / "text.sparse.safetensors")
    inputs = read_safetensors(directory / "text.inputs.safetensors")

    scores_LS = index_scores(layer["index_q"], layer["index_k"], layer["index_w"])
    expected_LS = stored["index_scores.0"][0]
    visible_LS = np.isfinite(expected_LS)
    off = float(np.abs(scores_LS - expected_LS)[visible_LS].max())
    allowed = tolerance["text.sparse.safetensors", "index_scores.0"]
    print(f"index_scores.0: off by {off:.2g}, allowed {allowed:.2g}")

    chosen_LK = select(scores_LS, inputs["document_start"][0], manifest["config"]["index_topk"])
    differing = int((chosen_LK != stored["topk_indices.0"][0]).any(-1).sum())
    print(f"topk_indices.0: {differing} of {len(chosen_LK)} rows differ")
    return 0 if off <= allowed and differing == 0 else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
