"""Faults of no catalogue that any implementation may have: what null candidates are made of, in real code."""

from ..mutant import bug

MODEL, OPTIMIZED, ATTENTION = "reference/model.py", "optimized/model.py", "reference/attention.py"
SPARSE, DENSE = "optimized/ops/sparse_mla.py", "optimized/ops/dense_mla.py"
_LOGITS = "logits_BLW = self.lm_head(hidden_BLM)"
_OUT = "return self.o_proj(out_BLHV.flatten(2)), found"
_SPARSE_OUT = 'out_BLHV = torch.einsum("blhc,hvc->blhv", out_BLHC, w_uv_HVC.to(dtype))'

MUTANTS = [
    bug("", "zero-output", "optimized", "The logits are zero.", "KernelBench #165", (MODEL, _LOGITS, _LOGITS + " * 0")),
    bug("", "copied-row", "optimized", "The last token's logits are its neighbour's.", "harness 1.3 (measured)",
        (MODEL, _LOGITS, _LOGITS + "\n        logits_BLW = torch.cat((logits_BLW[:, :-1], logits_BLW[:, -2:-1]), 1) if logits_BLW.shape[1] > 1 else logits_BLW")),
    bug("", "gain-of-4-percent", "optimized", "Attention is 4 % too large.", "harness 1.3 (measured)",
        (ATTENTION, _OUT, "return self.o_proj(out_BLHV.flatten(2)) * 1.04, found")),
    bug("", "dead-channel", "optimized", "Channel 5 of attention's output is 0.", "harness 1.3 (measured)",
        (ATTENTION, _OUT, "alive = (torch.arange(x_BLM.shape[-1], device=x_BLM.device) != 5).to(x_BLM.dtype)\n"
                          "        return self.o_proj(out_BLHV.flatten(2)) * alive, found")),
    bug("", "dead-head", "optimized", "The last head's output is 0.", "generic",
        (OPTIMIZED, _SPARSE_OUT, _SPARSE_OUT + "\n        out_BLHV = torch.cat((out_BLHV[:, :, :-1], out_BLHV[:, :, -1:] * 0), 2)")),
    bug("", "dropped-gradient", "optimized", "q_b_proj's gradient is lost.", "generic",
        (ATTENTION, "q = self.q_b_proj(q_latent).unflatten", "q = self.q_b_proj(q_latent).detach().unflatten")),
    bug("", "gradient-of-half-size", "optimized", "o_proj's gradient is halved.", "generic",
        (ATTENTION, _OUT, "out = self.o_proj(out_BLHV.flatten(2))\n        return 0.5 * out + 0.5 * out.detach(), found")),
    bug("", "one-not-a-number", "optimized", "One logit is NaN.", "generic",
        (MODEL, _LOGITS, _LOGITS + "\n        spot = torch.arange(logits_BLW.shape[-1], device=logits_BLW.device) == 7\n"
                                   "        logits_BLW = logits_BLW.masked_fill(spot, torch.nan)")),
    bug("", "stale-output-of-another-input", "optimized", "The second call returns the first call's logits.", "the wafer.ai and makora lists",
        (MODEL, _LOGITS, _LOGITS + "\n        kept = _KEPT.setdefault(logits_BLW.shape, logits_BLW.detach())\n"
                                   "        logits_BLW = logits_BLW + 0.05 * (kept - logits_BLW.detach())"),
        (MODEL, "use_official_names()\n", "use_official_names()\n_KEPT: dict = {}\n")),
    bug("", "noise-in-the-output", "optimized", "Dropout stays on.", "generic",
        (ATTENTION, _OUT, "return torch.nn.functional.dropout(self.o_proj(out_BLHV.flatten(2)), 0.01), found")),
    bug("", "layer-skipped", "optimized", "The middle layer's attention is left out.", "generic",
        (ATTENTION, _OUT, "return self.o_proj(out_BLHV.flatten(2)) * (self.layer_idx != 1), found")),
    bug("", "batch-rows-mixed", "optimized", "Attention's output belongs to the next batch row.", "generic",
        (ATTENTION, _OUT, "return self.o_proj(out_BLHV.flatten(2)).roll(1, 0), found")),
    bug("", "swapped-scales", "optimized", "Sparse attention takes the scale of plain 1/√D, dense that of YaRN.", "generic",
        (SPARSE, "run = implementation(\"sparse_mla\", backend, device)", "scale = float(sizes[\"D\"]) ** -0.5\n    run = implementation(\"sparse_mla\", backend, device)")),
]  # fmt: skip
