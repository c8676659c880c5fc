"""Measures how far right models are from the golden tensors: `python -m harness.goldens.measure`, behind tolerances.py.

Both models on the tape of the vectors, in fp32 and fp64; the last is noise of another order of additions.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import optimized
import reference
from harness.subjects import load_weights
from reference import Decisions, LayerDecisions

from .inputs import CASES, MODES, golden_case, golden_config
from .record import record, record_first_layer
from .tolerances import limits
from .vectors import FULL, Golden, Vectors, build_vectors, recipe_state

MODELS: dict[str, type[Any]] = {
    "reference": reference.DeepseekV32ForCausalLM,
    "optimized": optimized.DeepseekV32ForCausalLM,
}


def largest_shares(vectors: Vectors, model_class: type[Any], dtype: torch.dtype) -> dict[str, tuple[float, str]]:
    """The largest share met of what each kind of tensor is judged by, and the tensor; all runs, on the tape."""
    held = {(golden.file, golden.name): golden for golden in vectors.goldens}
    found: dict[str, tuple[float, str]] = {}
    for name in CASES:
        for mode in MODES:
            model = load_weights(model_class, golden_config(mode), recipe_state(), torch.device("cpu"), dtype)
            case, file = golden_case(name, mode), f"{name}.{mode}"
            tape = _tape(held, f"{file}.safetensors", golden_config(mode).num_hidden_layers)
            seen = {(f"{file}.safetensors", n): t for n, t in record(model, case, tape).items()}
            if (name, mode) == FULL:
                first = record_first_layer(model, case, tape)
                seen |= {(f"{file}.layer0.safetensors", n): t for n, t in first.items()}
            for key, actual in seen.items():
                golden = held.get(key)
                if golden is not None and golden.kind != "choice":
                    found[golden.kind] = max(found.get(golden.kind, (0.0, "")), (share(golden, actual), golden.name))
    return found


def share(golden: Golden, actual: torch.Tensor) -> float:
    """The largest |actual − golden| of a tensor, as a share of what its rule judges by; 0 where that is 0 in both."""
    here, there = actual.double(), golden.value.double()
    off = torch.where(here == there, 0.0, (here - there).abs())
    if golden.rule.judged == "gradient row":
        size = limits(replace(golden.rule, float64=1.0), there)
    else:
        size = there[there.isfinite()].abs().max().expand(there.shape)
    return float(torch.where(off == 0, 0.0, off / size).max())


def _tape(held: Mapping[tuple[str, str], Golden], file: str, layers: int) -> Decisions:
    def choice(name: str, layer: int) -> torch.Tensor | None:
        golden = held.get((file, f"{name}.{layer}"))
        return None if golden is None else golden.value

    return Decisions(
        tuple(LayerDecisions(choice("topk_indices", i), choice("expert_indices", i)) for i in range(layers))
    )


def main() -> None:
    """Print a line for each kind of tensor, model and dtype."""
    torch.set_num_threads(1)
    table = Table("kind", "dtype", "model", "largest share", "tensor", box=None)
    vectors = build_vectors()
    for dtype in (torch.float32, torch.float64):
        for name, model_class in MODELS.items():
            for kind, (largest, tensor) in sorted(largest_shares(vectors, model_class, dtype).items()):
                table.add_row(kind, str(dtype).removeprefix("torch."), name, f"{largest:.1e}", tensor)
    Console().print(table)


if __name__ == "__main__":
    main()
