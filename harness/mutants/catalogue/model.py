"""Bugs of what DSA sits on, MLA, YaRN, gate, norms, cache: catalogue groups D16 and E (spec 5.2)."""

from ..mutant import bug

ATTENTION, ROPE, MOE, MODEL, CACHE, LAYOUT, FP8 = (
    "reference/attention.py",
    "reference/rope.py",
    "reference/moe.py",
    "reference/model.py",
    "reference/cache.py",
    "reference/layout.py",
    "reference/fp8.py",
)
OPTIMIZED, EXPERTS, HADAMARD, NORM = (
    "optimized/model.py",
    "optimized/experts.py",
    "optimized/ops/hadamard.py",
    "optimized/norm.py",
)
_SCALE = 'scale *= yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2'
_FACTOR = "return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)"
_CHOSEN = "weights = scores_NX.gather(-1, experts_NT.long())"
_DROPPED = "biased = groups_NGX.masked_fill(~kept[..., None], -torch.inf).flatten(-2)"
_BIASED = "biased = scores_NX + self.e_score_correction_bias.to(scores_NX.dtype)\n"
_GROUP = "group_score = groups_NGX.sort(-1, descending=True).values[..., :2].sum(-1)"
_NORM = "wide = at_least_fp32(x)\n        normed"
_ROUND = 'if self.config.kv_latent_precision == "fp8":\n            c_kv = fp8_round_trip(c_kv)'
_LATENT = "c_kv = self.kv_a_layernorm(latent)\n"
_PE = "k_pe = rotate_interleaved(k_pe, cos, sin)"
_SPARSE = "if self.config.use_sparse_attention:\n            most_visible"
_KEYS_CACHED = "index_k = self.indexer.keys(x, cos, sin)"
_UPDATE = "setattr(self, name, new if held is None else torch.cat((held, new), 1))"
_PADS = "x_BLM = x_BLM.masked_fill(~layout.real_BL[..., None], 0.0)"
_RAMP = 'return inv_freq / rope_parameters["factor"] * ramp + inv_freq * (1 - ramp)'
_TURN = "turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)\n    return turned.flatten(-2).to(x.dtype)"
_EXPERT = "gate, up = F.linear(x_NM[token], gate_up[expert]).chunk(2, dim=-1)"
_ADDED = "out = out.index_add(0, token, at_least_fp32(y) * weights_NT[token, place, None])"
_ROUTED = "out = (routed + at_least_fp32(self.shared_experts(x_NM))).to(x_BLM.dtype)"
_SPLIT = "k_nope, v = expanded.split([self.nope_dim, self.v_dim], dim=-1)"
_FOLLOWING = "return position + following"

MUTANTS = [
    bug("D16", "dense-decode", "optimized", "One token at a time attends to every key.", "the training guide's fork; TensorRT-LLM #9376",
        (OPTIMIZED, _SPARSE, "if self.config.use_sparse_attention and t.q_nope_BLHN.shape[1] > 1:\n            most_visible")),
    bug("D16", "index-keys-not-cached-in-prefill", "optimized", "The keys of all chunks but the newest are empty.", "the training guide's fork",
        (CACHE, _UPDATE, 'kept = held if held is None or name != "k_idx" else held * 0\n            '
                         "setattr(self, name, new if kept is None else torch.cat((kept, new), 1))")),
    bug("D16", "k-of-the-chunk", "optimized", "k is bounded by the rows of the call, not by the keys.", "the training guide's fork (S17)",
        (OPTIMIZED, "bounds_BL2,\n                self.config.index_topk,", "bounds_BL2,\n                min(self.config.index_topk, t.q_nope_BLHN.shape[1]),")),
    bug("B18", "masked-path-without-its-mask", "optimized", "The masked path attends to every visible key.", "ik_llama.cpp #2063",
        (OPTIMIZED, 'mask_BLK = used_BLK if path == "masked" else None', "mask_BLK = None")),
    bug("D04", "kl-of-the-masked-path-over-the-whole-row", "optimized", "On the masked path the KL runs over every visible key.",
        "the training guide's fork", (OPTIMIZED, 'None if path == "dense" else used_BLK, backend', 'used_BLK if path == "gathered" else None, backend')),
    bug("", "dense-path-one-key-too-long", "optimized", "A row with k + 1 visible keys attends to all of them.", "generic",
        (OPTIMIZED, "most_visible <= self.config.index_topk", "most_visible <= self.config.index_topk + 1")),
    bug("", "dense-path-decided-by-the-chunk", "optimized", "The dense path is taken when the rows of a call are few, whatever the cache holds.",
        "the training guide's fork (S17)", (OPTIMIZED, "most_visible <= self.config.index_topk", "rows_of(bounds_BL2) <= self.config.index_topk"),
        (OPTIMIZED, "@torch.no_grad()\n@without_autocast\ndef _target_rows", "def rows_of(bounds_BL2):\n    return bounds_BL2.shape[1]\n\n\n@torch.no_grad()\n@without_autocast\ndef _target_rows")),
    bug("", "short-rows-filled-with-the-next-document", "optimized", "Where all keys are selected, a row takes k from its start on.", "generic",
        (OPTIMIZED, "return torch.where(slots_BLK < end_BL1, slots_BLK, -1).to(torch.int32)",
         "return torch.where(slots_BLK < bounds_BL2.amax(), slots_BLK, -1).to(torch.int32)")),
    bug("", "grouped-experts-in-sorted-order", "optimized", "The experts' outputs are not put back in the order of the tokens.", "generic",
        (EXPERTS, "y_NTM = y_PM[place_P].unflatten(0, (-1, top))", "y_NTM = y_PM.unflatten(0, (-1, top))")),
    bug("", "grouped-experts-offset-by-one", "optimized", "Each group begins where the one before it begins.", "generic",
        (EXPERTS, "inner_PF = swiglu(", "counts_X = counts_X.roll(1)\n        inner_PF = swiglu(")),
    bug("", "grouped-gate-and-up-swapped", "optimized", "up_proj's rows come first.", "generic",
        (EXPERTS, ".chunk(2, dim=-1))", ".roll(self.down_proj.shape[-1], -1).chunk(2, dim=-1))")),
    bug("", "grouped-weight-gradient-of-the-next-expert", "optimized", "Each expert's gradient is its neighbour's.", "generic",
        (EXPERTS, "self.gate_up_proj, counts_X)", "self.gate_up_proj.detach() + (self.gate_up_proj - self.gate_up_proj.detach()).roll(1, 0), counts_X)")),
    bug("A13", "butterfly-of-another-sign", "optimized", "The last round of the butterfly subtracts the other way.", "spec 5.1, neighbour of A12",
        (HADAMARD, "x = torch.stack((a + b, a - b), -2).flatten(-3)", "x = torch.stack((a + b, a - b if half > 1 else b + a), -2).flatten(-3)")),
    bug("D16", "positions-restart-in-each-chunk", "optimized", "A chunk's positions count from 0.", "generic",
        (LAYOUT, _FOLLOWING, "return position + 0 * following")),
    bug("E01", "no-mscale-in-the-softmax-scale", "optimized", "m² is missing.", "onnxruntime/mobius #548; transformers #47435",
        (ROPE, _SCALE, "scale *= 1.0")),
    bug("E01", "mscale-not-squared", "optimized", "m instead of m².", "spec 5.2 E01", (ROPE, _SCALE, _SCALE.replace(" ** 2", ""))),
    bug("E03", "inflated-rotation", "optimized", "cos and sin carry YaRN's single factor instead of the ratio.", "kekzl/imp #880",
        (ROPE, _FACTOR, "return yarn_mscale(factor, mscale)")),
    bug("E04", "weights-from-biased-scores", "optimized", "The bias enters the routed weights.", "vLLM #12002; transformers #41647",
        (MOE, _CHOSEN, "weights = (scores_NX + self.e_score_correction_bias.to(scores_NX.dtype)).gather(-1, experts_NT.long())")),
    bug("E05", "dropped-groups-masked-with-0", "optimized", "0 instead of −inf.", "vLLM #13474; DeepSeek-V3 #741",
        (MOE, _DROPPED, _DROPPED.replace("-torch.inf", "0.0"))),
    bug("E05", "group-score-of-the-best-expert", "optimized", "A group counts for its best expert alone.", "spec 1.7",
        (MOE, _GROUP, "group_score = groups_NGX.amax(-1)")),
    bug("E08", "router-bias-in-bfloat16", "optimized", "The bias is rounded to bf16.", "DeepSeek-V3 4592be4",
        (MOE, _BIASED, _BIASED.replace(".to(scores_NX.dtype)", ".bfloat16().to(scores_NX.dtype)"))),
    bug("E09", "norm-in-the-model-s-dtype", "optimized", "RMSNorm squares and sums in bf16.", "DeepSeek-V3 adecc0e",
        (NORM, "wide = at_least_fp32(x)\n        rstd", "wide = x\n        rstd")),
    bug("E09", "norm-in-the-model-s-dtype-in-the-reference", "reference", "RMSNorm squares and sums in bf16.", "DeepSeek-V3 adecc0e",
        (MOE, _NORM, "wide = x\n        normed")),
    bug("", "norm-gradient-without-its-mean", "optimized", "dx is that of a plain scaling.", "generic",
        (NORM, "g.sub_(normed.mul_(mean))", "g")),
    bug("E09", "norm-eps-of-another-model", "optimized", "eps is 1e-5.", "transformers #44261, #44346; torchtitan #4395",
        (MOE, "self.eps = eps\n", "self.eps = 1e-5\n")),
    bug("E10", "no-latent-round-trip", "optimized", "The KV latent is not rounded to FP8.", "DeepSeek's first release",
        (ATTENTION, _ROUND, "")),
    bug("E10", "round-trip-before-the-norm", "reference", "The latent is rounded before its norm.", "spec 5.2 E10",
        (ATTENTION, _LATENT, 'if self.config.kv_latent_precision == "fp8":\n            latent = fp8_round_trip(latent)\n'
                             "        c_kv = self.kv_a_layernorm(latent)\n"),
        (ATTENTION, 'c_kv = self.kv_a_layernorm(latent)\n        if self.config.kv_latent_precision == "fp8":\n            c_kv = fp8_round_trip(c_kv)',
         "c_kv = self.kv_a_layernorm(latent)")),
    bug("E10", "rope-keys-rounded-too", "reference", "k_pe goes through FP8.", "spec 5.2 E10",
        (ATTENTION, _PE, _PE + '\n        if self.config.kv_latent_precision == "fp8":\n            k_pe = fp8_round_trip(k_pe)')),
    bug("E13", "padding-not-silenced", "reference", "What stands in padding reaches the layers.", "sglang #26133", (MODEL, _PADS, "pass")),
    bug("", "half-split-rope-in-mla", "optimized", "MLA turns the indexer's pairs.", "spec 1.5",
        (ROPE, 'even, odd = at_least_fp32(x[..., 0::2]), at_least_fp32(x[..., 1::2])', "even, odd = at_least_fp32(x).chunk(2, dim=-1)"),
        (ROPE, _TURN, "return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1).to(x.dtype)")),
    bug("", "no-yarn", "optimized", "Frequencies are not stretched.", "spec 5.1 (measured)", (ROPE, _RAMP, "return inv_freq")),
    bug("", "yarn-ramp-reversed", "optimized", "Fast frequencies are stretched instead of slow ones.", "generic",
        (ROPE, _RAMP, "return inv_freq / rope_parameters[\"factor\"] * (1 - ramp) + inv_freq * ramp")),
    bug("", "angles-in-bfloat16", "optimized", "Angles are computed in the model's dtype.", "transformers, several models",
        (ROPE, "angles = positions_BL[..., None].float() * self.inv_freq", "angles = (positions_BL[..., None].to(dtype) * self.inv_freq.to(dtype)).float()")),
    bug("", "rope-keys-not-turned", "optimized", "k_pe knows no positions.", "generic", (ATTENTION, _PE, "k_pe = k_pe * 1")),
    bug("", "rope-keys-without-gradient", "optimized", "k_pe is detached.", "generic", (ATTENTION, _PE, "k_pe = rotate_interleaved(k_pe, cos, sin).detach()")),
    bug("", "values-and-keys-swapped", "reference", "kv_b_proj is split values first.", "generic",
        (ATTENTION, _SPLIT, "v, k_nope = expanded.split([self.v_dim, self.nope_dim], dim=-1)")),
    bug("", "latent-not-normalised", "optimized", "kv_a_layernorm is left out.", "generic", (ATTENTION, _LATENT, "c_kv = latent * 1\n")),
    bug("", "no-routed-scaling-factor", "optimized", "Routed weights sum to 1.", "generic", (MOE, "return weights * self.scale", "return weights")),
    bug("", "routed-weights-not-normalised", "optimized", "norm_topk_prob is not read.", "generic",
        (MOE, "if self.normalise:", "if self.normalise is None:")),
    bug("", "softmax-router", "optimized", "Softmax instead of sigmoid.", "spec 1.1 (the demo's default)",
        (MOE, ".sigmoid()", ".softmax(-1)")),
    bug("", "no-shared-expert", "optimized", "The shared expert is left out.", "generic",
        (MOE, _ROUTED, "out = (routed + 0 * at_least_fp32(self.shared_experts(x_NM))).to(x_BLM.dtype)")),
    bug("", "gate-and-up-swapped", "reference", "up_proj's rows come first.", "generic",
        (MOE, _EXPERT, _EXPERT.replace("gate, up =", "up, gate ="))),
    bug("", "an-expert-s-tokens-lost", "reference", "Tokens beyond an expert's capacity are dropped.", "generic",
        (MOE, _ADDED, "kept = (torch.arange(len(token), device=token.device) < 2 * len(x_NM) // len(gate_up))[:, None]\n            "
                      + _ADDED.replace("weights_NT[token, place, None])", "weights_NT[token, place, None] * kept)"))),
    bug("", "replayed-experts-not-used", "optimized", "The tape is accepted, the model's own experts are used.", "generic",
        (MOE, "used_NT = own_NT if replayed_BLT is None else torch.where(real_N1, replayed_BLT.flatten(0, 1), own_NT)", "used_NT = own_NT")),
    bug("", "residual-of-the-normed-input", "optimized", "The residual adds what the norm has changed.", "generic",
        (MODEL, "normed = self.post_attention_layernorm(x_BLM)\n", "normed = x_BLM = self.post_attention_layernorm(x_BLM)\n")),
    bug("", "no-final-norm", "optimized", "The head reads the residual stream.", "generic", (MODEL, "x_BLM = self.norm(x_BLM)\n", "x_BLM = x_BLM * 1\n")),
    bug("", "cache-of-the-first-row", "optimized", "All batch rows continue the first row's cache.", "generic",
        (CACHE, _UPDATE, "setattr(self, name, new if held is None else torch.cat((held[:1].expand_as(held), new), 1))")),
    bug("", "last-cached-token-overwritten", "optimized", "Each chunk is written one slot too early.", "generic",
        (CACHE, _UPDATE, "setattr(self, name, new if held is None else torch.cat((held[:, :-1], new[:, :1], new), 1))")),
]  # fmt: skip
