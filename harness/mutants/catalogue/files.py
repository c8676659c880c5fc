"""Bugs of files in the official layout (spec 4.1, 4.2; catalogue D15): what a trainer exports is not what a server reads."""

from ..mutant import bug

NAMES, BLOCKS = "reference/checkpoint.py", "reference/fp8_blocks.py"
MODEL, PRECISION, MOE = "reference/model.py", "reference/precision.py", "reference/moe.py"
_WIDE = '_keep_in_fp32_modules_strict = ["e_score_correction_bias", "k_norm"]'
_SAVED = "scaled_OI = wide_OI / scale_PQ[p].repeat_interleave(BLOCK)[:columns]"

MUTANTS = [
    bug("D15", "index-keys-left-in-bf16", "reference", "An FP8 file holds indexer.wk in bf16, without scales.", "miles #1928",
        (NAMES, '"wq_b", "wk",', '"wq_b",')),
    bug("D15", "head-weights-in-fp8", "reference", "weights_proj is quantised with the other linear layers.", "miles #2014",
        (NAMES, '"wq_b", "wk",', '"wq_b", "wk", "weights_proj",')),
    bug("D15", "index-norm-in-bf16", "reference", "The index keys' norm is written in bf16, and rounded.", "neighbour of D15",
        (NAMES, '("k_norm.weight", "k_norm.bias", "e_score_correction_bias")', '("e_score_correction_bias",)')),
    bug("D15", "index-norm-read-in-bf16", "reference", "A model in bf16 reads the index keys' norm in bf16, and rounds it.",
        "transformers 5.23: docs/findings-transformers.md, 18", (PRECISION, "eps=eps, dtype=wide)", "eps=eps)"),
        (MODEL, _WIDE, _WIDE.replace(', "k_norm"', ""))),
    bug("E08", "router-bias-read-in-bf16", "reference", "A model in bf16 reads the router bias through bf16.", "DeepSeek-V3 4592be4",
        (MOE, "torch.zeros(config.n_routed_experts, dtype=torch.float32)", "torch.zeros(config.n_routed_experts)"),
        (MODEL, _WIDE, _WIDE.replace('"e_score_correction_bias", ', ""))),
    bug("D15", "scales-are-divisors", "reference", "Scales are stored and read as divisors: the two agree with each other only.",
        "spec 4.2: the name says inverse",
        (BLOCKS, _SAVED, f"{_SAVED}\n        scale_PQ[p] = 1 / scale_PQ[p]"),
        (BLOCKS, ".float() * scale_I", ".float() / scale_I")),
    bug("D15", "scales-read-by-the-first-column", "reference", "Every block of a row is read with the scale of the first.", "generic",
        (BLOCKS, "scale_I = scale_PQ[p].repeat_interleave(BLOCK)[:width]", "scale_I = scale_PQ[p, :1].repeat_interleave(width)")),
    bug("", "gate-and-up-exchanged-in-files", "reference", "Files hold up_proj under the name of gate_proj.", "generic",
        (NAMES, 'parts[f"{prefix}.{i}.gate_proj.weight"] = Part(name, (i, slice(half)), (half, columns))',
         'parts[f"{prefix}.{i}.gate_proj.weight"] = Part(name, (i, slice(half, rows)), (half, columns))')),
]  # fmt: skip
