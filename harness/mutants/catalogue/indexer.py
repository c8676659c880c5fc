"""Bugs of the Lightning Indexer's arithmetic: catalogue group A (spec 5.2)."""

from ..mutant import bug

INDEXER, ATTENTION, ROPE, FP8 = (
    "reference/indexer.py",
    "reference/attention.py",
    "reference/rope.py",
    "reference/fp8.py",
)
TOPK = "optimized/ops/indexer_topk.py"
_ROTATE = "self.rotate = rotate_interleaved if config.indexer_rope_interleaved else rotate_half_split"
_QUERIES = "return self._turn(q, cos[..., None, :], sin[..., None, :])"
_KEYS = "return self._turn(self.k_norm(k).to(k.dtype), cos, sin)"
_TURN = """pe, rest = x.split([self.rope_dim, self.head_dim - self.rope_dim], dim=-1)
        return torch.cat((self.rotate(pe, cos, sin), rest), dim=-1)"""
_WEIGHTS = "return self.weights_proj(x_BLM) * (self.n_heads**-0.5 * self.head_dim**-0.5)"
_QUANTIZED = "return fp8_round_trip(self.hadamard(x.to(torch.bfloat16))).to(x.dtype)"
_QUERY_QUANTIZED = "index_q = self.indexer.quantized(self.indexer.queries(latent_in, cos, sin))"
_SUM = 'return torch.einsum("bljs,blj->bls", dots_BLJS.relu(), at_least_fp32(w_BLJ))'
_ROUND_UP = "exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).int()"

MUTANTS = [
    bug("A01", "interleaved-indexer-rope", "optimized", "The indexer turns the pairs that MLA turns.",
        "DeepSeek-V3.2-Exp demo before 2025-11-17; sglang #13495; mlx-lm #1453; xllm #853",
        (INDEXER, _ROTATE, "self.rotate = rotate_interleaved")),
    bug("A02", "interleaved-rope-of-queries", "optimized", "A fused query path knows one pairing only.",
        "sglang #27705, #30088",
        (INDEXER, _QUERIES, "return torch.cat((rotate_interleaved(q[..., : self.rope_dim], cos[..., None, :], "
                            "sin[..., None, :]), q[..., self.rope_dim :]), -1)")),
    bug("A03", "interleaved-rope-of-keys", "optimized", "The layout fix is lost for the keys alone.",
        "vllm-ascend #4641, #5701, #7341",
        (INDEXER, _KEYS, "k = self.k_norm(k).to(k.dtype)\n        return torch.cat((rotate_interleaved("
                         "k[..., : self.rope_dim], cos, sin), k[..., self.rope_dim :]), -1)")),
    bug("A06", "rope-layout-flag-unread", "optimized", "indexer_rope_interleaved is accepted and never read.",
        "transformers #43858, #46842; ik_llama.cpp #2099; TensorRT-LLM #12010",
        (INDEXER, _ROTATE, "self.rotate = rotate_half_split")),
    bug("A07", "no-indexer-rope", "reference", "The indexer knows no positions.", "d9d #38 (review)",
        (INDEXER, _TURN, "return x")),
    bug("A08", "rope-lanes-at-the-end", "reference", "Rope lanes are taken from the end of each head.",
        "sglang #27705 (a switch for V3.2 against V4)",
        (INDEXER, _TURN, """rest, pe = x.split([self.head_dim - self.rope_dim, self.rope_dim], dim=-1)
        return torch.cat((rest, self.rotate(pe, cos, sin)), dim=-1)""")),
    bug("A09", "rms-norm-of-keys", "reference", "k_norm is an RMSNorm: the mean stays.",
        "transformers #43894, #43912; FastDeploy #7398",
        ("reference/precision.py",
         "return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)",
         "return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps) + self.bias.to(x.dtype)")),
    bug("A09", "k-norm-without-bias", "optimized", "k_norm's bias is dropped.", "transformers #43894",
        ("reference/precision.py",
         "return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)",
         "return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), 0 * self.bias.to(x.dtype), self.eps)")),
    bug("A09", "k-norm-after-rope", "reference", "The keys are turned first and normalised afterwards.",
        "spec 5.1 (measured)",
        (INDEXER, _KEYS, "return self.k_norm(self._turn(k, cos, sin)).to(k.dtype)")),
    bug("A11", "unnormalised-query-latent", "reference", "The indexer reads q_a_proj's output before its norm.",
        "Megatron-LM #3026; slime #2165",
        (ATTENTION, "(x_BLM.detach(), q_latent.detach()) if", "(x_BLM.detach(), self.q_a_proj(x_BLM).detach()) if")),
    bug("A12", "no-hadamard", "optimized", "A fused cast to FP8 drops the Hadamard rotation.",
        "TensorRT-LLM #11899, #13061", (INDEXER, _QUANTIZED, "return fp8_round_trip(x.to(torch.bfloat16)).to(x.dtype)")),
    bug("A13", "hadamard-on-queries-only", "reference", "The keys are not rotated.", "spec 5.1, neighbour of A12",
        (ATTENTION, "index_k = self.indexer.quantized(index_k)", "index_k = index_k")),
    bug("A13", "hadamard-not-orthonormal", "reference", "H without D^(-1/2): scores grow by D.",
        "spec 5.1, neighbour of A12", (FP8, "return (wide @ matrix * width**-0.5).to(x.dtype)",
                                       "return (wide @ matrix).to(x.dtype)")),
    bug("A14", "head-weights-in-bfloat16", "optimized", "weights_proj runs in bf16.", "sglang #13459; axolotl #3832",
        (INDEXER, _WEIGHTS, "w = torch.nn.functional.linear(x_BLM.bfloat16(), self.weights_proj.weight.bfloat16())\n"
                            "        return w.float() * (self.n_heads**-0.5 * self.head_dim**-0.5)")),
    bug("A14", "key-norm-in-the-models-dtype", "optimized", "k_norm's weight and bias are rounded to the model's dtype.",
        "transformers 5.17 to 5.23: docs/findings-transformers.md, 18",
        ("reference/precision.py", "x = at_least_fp32(x)\n        return F.layer_norm(x, self.normalized_shape, "
         "self.weight.to(x.dtype), self.bias.to(x.dtype)", "low, x = x.dtype, at_least_fp32(x)\n        return F.layer_norm(x, "
         "self.normalized_shape, self.weight.to(low).to(x.dtype), self.bias.to(low).to(x.dtype)")),
    bug("A15", "no-relu", "reference", "Negative dot products count.", "mlx-lm #531; ms-swift #8085",
        (INDEXER, _SUM, _SUM.replace("dots_BLJS.relu()", "dots_BLJS"))),
    bug("A15", "no-relu-in-the-operator", "optimized", "The same in the fused scores.", "mlx-lm #531",
        (TOPK, "torch.relu_(relu_CJn)", "pass")),
    bug("A15", "relu-after-the-head-sum", "reference", "ReLU of the sum instead of the sum of ReLUs.",
        "spec 5.1 (measured)",
        (INDEXER, _SUM, _SUM.replace("dots_BLJS.relu()", "dots_BLJS") + ".relu()")),
    bug("A15", "best-head-instead-of-sum", "reference", "The best head alone decides.", "mlx-lm #531",
        (INDEXER, _SUM, "return (dots_BLJS.relu() * at_least_fp32(w_BLJ)[..., None]).amax(2)")),
    bug("A15", "no-head-weights", "reference", "All heads count the same.", "spec 5.1 (measured)",
        (INDEXER, _WEIGHTS, "return torch.ones_like(self.weights_proj(x_BLM)) * self.head_dim**-0.5 / self.n_heads")),
    bug("A15", "softmaxed-head-weights", "reference", "Head weights go through a softmax.", "spec 5.1 (measured)",
        (INDEXER, _WEIGHTS, "return self.weights_proj(x_BLM).softmax(-1) * self.head_dim**-0.5")),
    bug("A15", "absolute-head-weights", "reference", "Head weights lose their sign.", "spec 5.1 (measured)",
        (INDEXER, _WEIGHTS, _WEIGHTS.replace("self.weights_proj(x_BLM)", "self.weights_proj(x_BLM).abs()"))),
    bug("A17", "no-head-count-scale", "optimized", "J^(-1/2) is missing: ranks stay, the KL's temperature is wrong.",
        "spec 5.2 A17", (INDEXER, _WEIGHTS, "return self.weights_proj(x_BLM) * self.head_dim**-0.5")),
    bug("A17", "no-head-dim-scale", "optimized", "E^(-1/2) is missing.", "spec 5.2 A17",
        (INDEXER, _WEIGHTS, "return self.weights_proj(x_BLM) * self.n_heads**-0.5")),
    bug("A18", "amax-clamped-from-above", "reference", "amax is clamped with min instead of max.",
        "DeepSeek-V3 b15f0db, 82f6008, adecc0e", (FP8, ".clamp_min(AMAX_FLOOR)", ".clamp_max(AMAX_FLOOR)")),
    bug("A19", "scale-rounded-after-the-payload", "reference", "The scale is rounded up, its payload is not made again.",
        "transformers #47030; sglang #39193",
        (FP8, "payload = (blocks / scale).clamp", "payload = (blocks / (amax * (1.0 / E4M3_MAX))).clamp")),
    bug("A22", "another-fp8-dialect", "reference", "The keys' bytes are read as e4m3fnuz: half of their value.",
        "vLLM #42893, #46730",
        (ATTENTION, "index_k = self.indexer.quantized(index_k)",
         "index_k = self.indexer.quantized(index_k) * (0.5 if self.indexer.fp8 else 1.0)")),
    bug("A24", "scale-rounded-down", "reference", "ue8m0 rounds down, values saturate.", "spec 5.2 A24",
        (FP8, _ROUND_UP, "exponent = (bits >> 23) & 0xFF")),
    bug("A24", "plain-scales", "optimized", "fp32 scales instead of powers of two.", "spec 5.1 (measured)",
        (FP8, "scale = power_of_two_at_least(amax * (1.0 / E4M3_MAX))", "scale = amax * (1.0 / E4M3_MAX)")),
    bug("A01", "queries-not-quantised", "optimized", "FP8 keys meet unquantised queries.", "spec 5.2 group A",
        (ATTENTION, _QUERY_QUANTIZED, "index_q = self.indexer.queries(latent_in, cos, sin)")),
    bug("", "wrong-eps-of-k-norm", "optimized", "k_norm has LayerNorm's default eps.", "the training guide's fork",
        (INDEXER, "K_NORM_EPS = 1e-6", "K_NORM_EPS = 1e-5")),
    bug("", "key-positions-off-by-one", "reference", "Each key stands one position later than its query.",
        "spec 5.1 (measured)",
        (INDEXER, _KEYS, "late = torch.arctan2(sin, cos)\n        one = self.k_norm.weight.new_ones(1)\n"
                         "        step = late[:, 1:2] - late[:, :1] if late.shape[1] > 1 else late * 0 + one\n"
                         "        return self._turn(self.k_norm(k).to(k.dtype), (late + step).cos(), (late + step).sin())")),
]  # fmt: skip
