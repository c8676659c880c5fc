"""A probe of the official checkpoint layout: what a model writes is what the published files hold, and reads the same back.

The layout is written out here by hand (spec 4.1, 4.2), and FP8 is decoded by numpy from its bits: nothing of the
project's own code for files is asked.

Letters: O rows (outputs), I columns (inputs), P and Q their blocks of 128.
"""

import importlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import nn

from reference import DeepseekV32Config, DeepseekV32ForCausalLM
from reports.schema import Measure, NullCandidate

from ..checks.base import Answer, Bench, whole_model_check

Array = npt.NDArray[Any]
BLOCK = 128
INDEX = "model.safetensors.index.json"
FP8, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
QUANTISATION = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [BLOCK, BLOCK]}
# Several blocks and ragged edges in every direction, two layers, one of them with experts.
SIZES: dict[str, Any] = {
    "hidden_size": 192, "q_lora_rank": 144, "kv_lora_rank": 128, "intermediate_size": 160, "moe_intermediate_size": 136,
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
}  # fmt: skip
# e4m3: a sign, four bits of exponent (bias 7), three of mantissa; all ones is NaN, and there is no infinity.
_CODES = np.arange(256)
_EXPONENT, _MANTISSA = (_CODES >> 3) & 15, _CODES & 7
E4M3: Array = np.where(_CODES < 128, 1.0, -1.0) * np.where(
    _EXPONENT > 0, (1 + _MANTISSA / 8) * 2.0 ** (_EXPONENT - 7), _MANTISSA / 8 * 2.0**-6
)
E4M3[(_CODES & 127) == 127] = np.nan
LARGEST = 448.0


def layout(config: DeepseekV32Config, format: str) -> dict[str, torch.dtype]:
    """Every tensor of the official files, without scales, and its dtype."""
    linear = FP8 if format == "fp8" else BF16
    mlp = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    found = {"model.embed_tokens.weight": BF16, "model.norm.weight": BF16, "lm_head.weight": BF16}
    for i in range(config.num_hidden_layers):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        found |= {f"{layer}.{name}": BF16 for name in norms}
        found |= {f"{attention}.{name}.weight": BF16 for name in ("q_a_layernorm", "kv_a_layernorm")}
        projections = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
        found |= {f"{attention}.{name}.weight": linear for name in projections}
        found |= {f"{attention}.indexer.{name}.weight": linear for name in ("wq_b", "wk")}
        found |= {f"{attention}.indexer.k_norm.{name}": FP32 for name in ("weight", "bias")}
        found[f"{attention}.indexer.weights_proj.weight"] = BF16
        if i < config.first_k_dense_replace:
            found |= {f"{layer}.mlp.{name}": linear for name in mlp}
            continue
        found |= {f"{layer}.mlp.gate.weight": BF16, f"{layer}.mlp.gate.e_score_correction_bias": FP32}
        found |= {f"{layer}.mlp.shared_experts.{name}": linear for name in mlp}
        found |= {f"{layer}.mlp.experts.{e}.{name}": linear for e in range(config.n_routed_experts) for name in mlp}
    return found


def of_state(name: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the official tensor called `name` is a part of: experts are stacked, gate above up."""
    if name in state:
        return state[name]
    prefix, expert, projection, _ = name.rsplit(".", 3)
    if projection == "down_proj":
        return state[f"{prefix}.down_proj"][int(expert)]
    gate, up = state[f"{prefix}.gate_up_proj"][int(expert)].chunk(2)
    return gate if projection == "gate_proj" else up


def by_block(scale_PQ: Array, rows: int, columns: int) -> Array:
    """Each entry's scale, `[rows, columns]`."""
    whole: Array = scale_PQ.repeat(BLOCK, 0)[:rows].repeat(BLOCK, 1)[:, :columns]
    return whole


def smallest_powers(w_OI: Array) -> Array:
    """The smallest powers of two that bring each block's largest magnitude to 448 or below; `[P, Q]`."""
    rows, columns = w_OI.shape
    padded = np.zeros((-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK))
    padded[:rows, :columns] = abs(w_OI)
    amax_PQ = padded.reshape(len(padded) // BLOCK, BLOCK, -1, BLOCK).max((1, 3))
    exponents: Array = np.arange(-126, 128)
    fits = amax_PQ[..., None] <= LARGEST * 2.0**exponents
    powers: Array = 2.0 ** exponents[fits.argmax(-1)]
    return powers


class Files:
    """The tensors in a directory of the official layout, and what its index and config say."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text("utf-8"))
        places = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        self.tensors: dict[str, torch.Tensor] = {}
        self.misplaced = 0
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as held:
                for name in held.keys():  # noqa: SIM118 - it is no dict
                    self.tensors[name] = held.get_tensor(name)
                    self.misplaced += places.get(name) != path.name
        self.misplaced += len(places.keys() - self.tensors.keys())

    def values(self, name: str, scales: Callable[[Array], Array] = lambda s: s) -> Array:
        """The numbers that a tensor stands for in fp32; `scales` is how its scales are read."""
        held = self.tensors[name]
        if held.dtype != FP8:
            plain: Array = held.float().numpy()
            return plain
        payload_OI = E4M3[held.view(torch.uint8).numpy()]
        scale_PQ = scales(self.tensors[f"{name}_scale_inv"].numpy())
        decoded: Array = (payload_OI * by_block(scale_PQ, *payload_OI.shape)).astype(np.float32)
        return decoded


def weights(config: DeepseekV32Config, seed: int) -> dict[str, torch.Tensor]:
    """Random weights whose blocks of 128×128 are of different sizes, so that no block's scale serves another."""
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in DeepseekV32ForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, w in state.items():
        if w.dim() > 1:
            row, column = (torch.arange(n) // BLOCK for n in w.shape[-2:])
            state[name] = w * 2.0 ** -(3 * row[:, None] + 2 * column[None, :])
    return state


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Of weights that are rounded, which is what is looked at here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def written_by(model: nn.Module, folder: Path, format: str) -> Files:
    """The files that `save_official` of the package of the model's class makes."""
    for cls in type(model).__mro__:
        package: Any = importlib.import_module(cls.__module__.rpartition(".")[0] or cls.__module__)
        if hasattr(package, "save_official"):
            with _without_warnings():
                package.save_official(model, folder, format, shard_size="200KB")
            return Files(folder)
    raise ValueError(f"{type(model).__name__} is of no package that has save_official.")


def differing(found: dict[str, torch.Tensor], files: Files, names: dict[str, torch.dtype], **how: Any) -> float:
    """How many numbers of `found`, a model's state, are others than those that the files stand for."""
    return float(
        sum((of_state(n, found).float().numpy() != files.values(n, **how)).sum() for n in names)
    )  # fmt: skip


def rounded(files: Files, names: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """What a model in bf16 holds of the files' tensors: in bf16, but what the files have in fp32 stays so."""
    kept = {name: FP32 if dtype == FP32 else BF16 for name, dtype in names.items()}
    return {name: torch.from_numpy(files.values(name)).to(dtype) for name, dtype in kept.items()}


def differing_in_bf16(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(tensors of another dtype, other numbers) in `found`, a bf16 model's state, than `rounded` gives."""
    pairs = [(of_state(name, found), tensor) for name, tensor in expected.items()]
    return (
        float(sum(held.dtype != tensor.dtype for held, tensor in pairs)),
        float(sum(int((held.float() != tensor.float()).sum()) for held, tensor in pairs)),
    )


def official_files(bench: Bench) -> Answer:
    """Written in bf16 and FP8: names, dtypes, scales, numbers; read again by the class's from_pretrained, in fp32 and bf16.

    Nothing may differ but what FP8 rounds: half a step of three bits, or of the smallest subnormal of the block; and
    what a bf16 model rounds, which the index keys' norm and the router bias are not part of.
    """
    base = bench.case.config
    config = DeepseekV32Config(**{**base.to_dict(), **SIZES})
    state = bench.oracle.remember(("probes.official_files",), lambda: weights(config, bench.case.seed))

    def model() -> nn.Module:
        return bench.subject.build(config, state, torch.device("cpu"), torch.float32)

    measures, wrong = [], {}
    reasons: list[str] = []
    with TemporaryDirectory() as parent:
        for format in ("bf16", "fp8"):
            expected = layout(config, format)
            folder = Path(parent) / format

            def save(folder: Path = folder, format: str = format) -> tuple[Files, dict[torch.dtype, Any]]:
                built: Any = model()
                files = written_by(built, folder, format)
                read = type(built).from_pretrained
                return files, {dtype: read(folder, dtype=dtype).state_dict() for dtype in (FP32, BF16)}

            files, read = bench.of_subject(save)
            again = read[FP32]
            scales = {f"{name}_scale_inv": FP32 for name, dtype in expected.items() if dtype == FP8}
            names = expected | scales
            here = {name: tensor.dtype for name, tensor in files.tensors.items()}
            known = {name: dtype for name, dtype in expected.items() if here.get(name) == dtype}
            strange = sorted(
                (names.keys() ^ here.keys()) | {n for n in names.keys() & here.keys() if here[n] != names[n]}
            )
            beyond = {name: _beyond(name, files, of_state(name, state)) for name in known}
            as_bf16 = rounded(files, known)
            others, numbers = differing_in_bf16(read[BF16], as_bf16)
            reasons += [f"{format}: {strange[0]} is missing, extra or of another dtype"] if strange else []
            reasons += [f"{format}: {name} is not what the model was given" for name in beyond if beyond[name]][:1]
            counts = {
                "tensors missing, extra or in another file": len(names.keys() ^ here.keys()) + files.misplaced,
                "tensors of another dtype": sum(here[name] != names[name] for name in names.keys() & here.keys()),
                "numbers beyond rounding": sum(beyond.values()),
                "numbers that are read otherwise": differing(again, files, known),
                "tensors of another dtype, read in bf16": others,
                "numbers that are read otherwise in bf16": numbers,
            }
            if format == "fp8":
                told = files.config.get("quantization_config", {})
                counts["entries of quantization_config"] = sum(told.get(k) != v for k, v in QUANTISATION.items())
                wrong = _wrong(files, again, known) | _wrong_in_bf16(read[BF16], as_bf16)
            measures += [Measure(f"{format}: {what}", float(count), 0.0) for what, count in counts.items()]
    reasons += [f"{m.name}: {m.value:.0f}" for m in measures if m.value and not reasons]
    return Answer(measures, [NullCandidate(name, rejected) for name, rejected in wrong.items()], "; ".join(reasons))


def _beyond(name: str, files: Files, w: torch.Tensor) -> int:
    """How many numbers of the tensor called `name` are farther from `w` than one rounding takes them."""
    if files.tensors[name].dtype != FP8:
        return int((files.tensors[name] != w.to(files.tensors[name].dtype)).sum())
    w_OI = w.double().numpy()
    scale_PQ = smallest_powers(w_OI)
    allowed_OI = np.maximum(abs(w_OI) * 2.0**-4, by_block(scale_PQ, *w_OI.shape) * 2.0**-10)
    other = files.tensors[f"{name}_scale_inv"].numpy() != scale_PQ
    return int((abs(files.values(name) - w_OI) > allowed_OI).sum() + other.sum())


def _wrong(files: Files, again: dict[str, torch.Tensor], names: dict[str, torch.dtype]) -> dict[str, bool]:
    """Other ways to read scales, and whether each is told apart."""
    ways: dict[str, Callable[[Array], Array]] = {
        "scales read as divisors": lambda s: 1 / s,
        "scales read as exponents": lambda s: np.log2(s),
        "the scales of the blocks before": lambda s: np.roll(s, 1),
        "scales of columns and rows exchanged": lambda s: np.resize(s.T, s.shape),
        "no scales": np.ones_like,
    }
    return {name: differing(again, files, names, scales=way) > 0 for name, way in ways.items()}


def _wrong_in_bf16(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, bool]:
    """What a bf16 model could do to the tensors that stay in fp32, and whether each is told apart."""
    stay = {name for name, tensor in expected.items() if tensor.dtype == FP32}
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "fp32 tensors rounded": lambda w: w.to(BF16).float(),
        "fp32 tensors held in bf16": lambda w: w.to(BF16),
        "fp32 tensors left out": torch.zeros_like,
    }
    return {
        name: any(differing_in_bf16({**found, **{n: way(expected[n]) for n in stay}}, expected))
        for name, way in ways.items()
    }


CHECKS = [
    whole_model_check("probes.official_files", "probes", official_files, frozenset({"official-files"})),
]
