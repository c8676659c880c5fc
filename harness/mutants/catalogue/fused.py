"""Bugs of the fused kernels, in Triton and in C++: catalogue group C and its neighbours (spec 5.2).

Those in Triton are tried on single operators, because the interpreter runs them; those in C++ on the whole model.
"""

from ..mutant import bug

FORWARD, BACKWARD, SEGMENTS, LOGITS, RADIX, KL, DENSE = (
    "optimized/kernels/sparse_mla_forward.py",
    "optimized/kernels/sparse_mla_backward.py",
    "optimized/kernels/segment_sum.py",
    "optimized/kernels/index_logits.py",
    "optimized/kernels/radix_topk.py",
    "optimized/kernels/indexer_kl.py",
    "optimized/kernels/dense_mla_forward.py",
)
_SLOT = "slot = tl.load(index_ptr + position, mask=position < K, other=-1)\n        is_key = slot >= 0"
_DKV = "dkv_BSD = torch.zeros(kv_BSD.shape, dtype=torch.float32, device=device) if needs_dkv else None"
_LSE = "(top + tl.log2(divisor)) * LN2"

C_TOPK, C_GATHER, C_SPARSE, C_SPARSE_PY, C_DENSE = (
    "optimized/native/indexer_topk.cpp",
    "optimized/native/gather.h",
    "optimized/native/sparse_mla.cpp",
    "optimized/native/sparse_mla.py",
    "optimized/native/dense_mla.cpp",
)

TRITON = [
    bug("C01", "triton-nan-in-rows-without-keys", "optimized", "The running maximum of a block without keys stays −inf.", "vLLM #48366",
        (FORWARD, "subtracted = tl.where(new_top == -INF, 0.0, new_top)", "subtracted = new_top")),
    bug("C03", "triton-tail-of-dkv-lost", "optimized", "The last lanes of dkv are never written.", "TileLang #1588",
        (BACKWARD, "inside = (column < LAST)[None, :]\n    total", "inside = (column < LAST - 8)[None, :]\n    total")),
    bug("C03", "triton-lost-updates-of-dkv", "optimized", "Rows that share a key overwrite each other's gradient.", "TileLang #1588",
        (SEGMENTS, "total += share.to(tl.float32) * times[:, None]",
         "total = tl.where(more[:, None], share.to(tl.float32) * times[:, None], total)")),
    bug("C05", "triton-dirty-gradient-buffer", "optimized", "dkv is accumulated into memory that nobody cleared.", "TileLang b9a5907 (#2010)",
        (BACKWARD, _DKV, "dkv_BSD = _KEPT.setdefault(kv_BSD.shape, torch.zeros(kv_BSD.shape, device=device)) if needs_dkv else None"),
        (BACKWARD, "MAX_CHUNK_ROWS = 512\n", "MAX_CHUNK_ROWS = 512\n_KEPT: dict = {}\n")),
    bug("C08", "triton-tail-lanes-of-odd-heads", "optimized", "Lanes beyond a multiple of 16 are left out of the scores.", "DeepGEMM #379, #392, #433",
        (LOGITS, "mask=(lanes < WIDTH)[None, :]", "mask=(lanes < WIDTH // 16 * 16)[None, :]")),
    bug("C09", "triton-lse-in-base-2", "optimized", "The LSE is returned in base 2.", "FlashMLA's prefill contract",
        (FORWARD, _LSE, "(top + tl.log2(divisor))")),
    bug("B10", "triton-no-key-read-as-slot-0", "optimized", "−1 is followed as if it were slot 0.", "tokenspeed #528; flashinfer #5095",
        (FORWARD, _SLOT, _SLOT.replace("other=-1)", "other=0)").replace("slot >= 0", "position < K\n        slot = tl.maximum(slot, 0)"))),
    bug("B12", "triton-last-bin-missed", "optimized", "What shares the threshold's first 24 bits is not selected.", "TileLang #2513",
        (RADIX, "threshold ^= SIGN\n    taken", "threshold = (threshold | 255) ^ SIGN\n    taken")),
    bug("B13", "triton-highest-index-first", "optimized", "Of equal scores the last ones of a block are taken.", "omlx #2243; sglang #31115",
        (RADIX, "rank = tied[:, None] + tl.cumsum(equal.to(tl.int32), 1)", "rank = tied[:, None] + tl.cumsum(equal.to(tl.int32), 1, reverse=True)")),
    bug("B05", "triton-row-starts-ignored", "optimized", "The scorer's logsumexp reads the end of each row's range, and not its start.", "sglang #11629",
        (LOGITS, "visible = (key[None, :] >= start[:, None]) & (key", "visible = (key[None, :] >= 0 * start[:, None]) & (key")),
    bug("D10", "triton-kl-of-the-other-side", "optimized", "dI is that of the reversed divergence's sign.", "Open-Superintelligence-Lab #7",
        (KL, "di = tl.where(visible, tl.exp(log_softmax) - p, 0.0)", "di = tl.where(visible, p - tl.exp(log_softmax), 0.0)")),
    bug("", "triton-sum-not-rescaled", "optimized", "When the maximum grows, what was summed before is not made smaller.", "generic",
        (FORWARD, "shrink = tl.exp2(top - subtracted)", "shrink = tl.exp2(tl.minimum(top - top, 0.0))")),
    bug("", "triton-delta-dropped", "optimized", "dS = P·dP, without Δ.", "generic",
        (BACKWARD, "ds = p * (dp - delta[:, None]) * scale", "ds = p * dp * scale")),
    bug("B18", "triton-masked-form-ignores-indices", "optimized", "dense_mla with indices forgets them.", "ik_llama.cpp #2063",
        (DENSE, "visible &= ((words >> (column % 32)) & 1) != 0", "visible &= words == words")),
]  # fmt: skip

NATIVE = [
    bug("C01", "native-nan-in-rows-without-keys", "optimized", "The running maximum of a head without keys stays −inf.", "vLLM #48366",
        (C_SPARSE, "Floats shift = highest == -INF ? Floats{} : highest;", "Floats shift = highest;"),
        (C_SPARSE, "lse[h] = keys == 0 ? -INF : softmax.lse(h);", "lse[h] = softmax.lse(h);"),
        (C_SPARSE, "float divisor = keys == 0 ? 1.0f : softmax.divisor(h);", "float divisor = softmax.divisor(h);")),
    bug("C03", "native-lost-updates-of-dkv", "optimized", "The last selected key of each row gets no gradient.", "TileLang #1588",
        (C_SPARSE, "scatter_add(gradient, lanes, slots, chosen, count, dkv, shape.stride);",
         "scatter_add(gradient, lanes, slots, chosen, count - 1, dkv, shape.stride);")),
    bug("C05", "native-dirty-gradient-buffer", "optimized", "dkv is accumulated into memory that nobody cleared.", "TileLang b9a5907 (#2010)",
        (C_SPARSE_PY, "dkv = torch.zeros_like(kv) if needs_dkv else None", "dkv = _KEPT.setdefault(kv.shape, torch.zeros_like(kv)) if needs_dkv else None"),
        (C_SPARSE_PY, "class _SparseMla(", "_KEPT: dict = {}\n\n\nclass _SparseMla(")),
    bug("C08", "native-tail-lanes-of-odd-heads", "optimized", "Lanes beyond a multiple of 16 are left out of the scores.", "DeepGEMM #379, #392, #433",
        (C_TOPK, "return panel + e * PANEL; }, E, dots);", "return panel + e * PANEL; }, E / 16 * 16, dots);")),
    bug("C09", "native-lse-in-base-2", "optimized", "The LSE is returned in base 2.", "FlashMLA's prefill contract",
        (C_SPARSE, "top[head] + std::log(divisor(head))", "(top[head] + std::log(divisor(head))) * 1.44269504f")),
    bug("B12", "native-coarse-threshold", "optimized", "The threshold is found to 16 bits of 32.", "sglang #37591",
        (C_TOPK, "for (bool guess = true; high - low > 1 &&", "for (bool guess = true; high - low > 65536 &&")),
    bug("B13", "native-highest-index-first", "optimized", "Of equal scores the last ones are taken.", "omlx #2243; sglang #31115",
        (C_TOPK, "equal &= ~(1u << (31 - __builtin_clz(equal)))", "equal &= equal - 1")),
    bug("B12", "native-tie-after-the-bar-was-raised", "optimized", "Later keys that equal the bar displace earlier ones.", "sglang #35257",
        (C_TOPK, "bar = float_of(lowest);", "bar = std::nextafter(float_of(lowest), -INF);"),
        (C_TOPK, "equal &= ~(1u << (31 - __builtin_clz(equal)))", "equal &= equal - 1")),
    bug("A15", "native-no-relu", "optimized", "Negative dot products count.", "mlx-lm #531",
        (C_TOPK, "total[n] += weight * relu(dots[m][n]);", "total[n] += weight * dots[m][n];")),
    bug("", "native-sum-not-rescaled", "optimized", "When the maximum grows, what was summed before is not made smaller.", "generic",
        (C_SPARSE, "if (softmax.absorb(logits, count) && first > 0)", "if (softmax.absorb(logits, count) && first < 0)")),
    bug("", "native-last-block-of-keys-lost", "optimized", "Keys after the last full block are left out.", "generic",
        (C_SPARSE, "int count = keys - first < BLOCK_KEYS ? keys - first : BLOCK_KEYS;",
         "int count = keys - first < BLOCK_KEYS && first > 0 ? 0 : keys - first < BLOCK_KEYS ? keys - first : BLOCK_KEYS;")),
    bug("", "native-delta-dropped", "optimized", "dS = P·dP, without Δ.", "generic",
        (C_SPARSE, "store(dlogits + i, load(weights + i) * (load(dlogits + i) - delta));", "store(dlogits + i, load(weights + i) * load(dlogits + i));")),
]  # fmt: skip

MUTANTS = [*TRITON, *NATIVE]
