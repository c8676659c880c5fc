"""Bugs of sparse attention kernels: catalogue group C (spec 5.2), in the operators as they are today."""

from ..mutant import bug

BACKEND, SPARSE, DENSE, TOPK, MODEL = (
    "optimized/ops/backend.py",
    "optimized/ops/sparse_mla.py",
    "optimized/ops/dense_mla.py",
    "optimized/ops/indexer_topk.py",
    "optimized/model.py",
)
_TOP = "top = logits.amax(-1, keepdim=True).masked_fill_(empty, 0)"
_SCATTER = "dkv_BSD[b].index_add_(0, index_CK.flatten(), dkey_CKD.flatten(0, 1))"
_DKV = "dkv_BSD = torch.zeros(kv_BSD.shape, dtype=dtype, device=kv_BSD.device) if needs_dkv else None"
_LSE = "lse_BLH[here] = lse_CH1.squeeze(-1)"
_CALL = "out_BLHC, lse_BLH = sparse_mla(q_BLHD, kv_BSD, indices_BLK, self.scale, self.latent_dim, backend=self.backend)"
_OUT = "out_BLHV = q_BLHD.new_zeros(B, L, H, d_v)\n        lse_BLH = torch.full((B, L, H), -torch.inf, dtype=dtype, device=q_BLHD.device)\n        keys"
_DELTA = "dlogit_CHK.sub_(torch.linalg.vecdot(weight_CHK, dlogit_CHK).unsqueeze(-1)).mul_(weight_CHK)"
_VALUES = "dkey_CKD[..., :d_v].baddbmm_(weight_CHK.mT, dout_CHV)"

MUTANTS = [
    bug("C01", "nan-in-rows-without-keys", "optimized", "The running maximum of a row without keys stays −inf.",
        "vLLM #48366", (BACKEND, _TOP, "top = logits.amax(-1, keepdim=True)")),
    bug("C03", "lost-updates-of-dkv", "optimized", "Rows that share a key overwrite each other's gradient.",
        "TileLang #1588", (SPARSE, _SCATTER, "dkv_BSD[b][index_CK.flatten()] += dkey_CKD.flatten(0, 1)")),
    bug("C03", "tail-of-dkv-lost", "optimized", "The last lanes of dkv are never written.", "TileLang #1588",
        (SPARSE, _SCATTER, "dkey_CKD[..., D // 8 * 8 - 8 :] = 0\n                " + _SCATTER)),
    bug("C05", "dirty-gradient-buffer", "optimized", "dkv is accumulated into memory that nobody cleared.",
        "TileLang b9a5907 (#2010)",
        (SPARSE, _DKV, "if needs_dkv and kv_BSD.shape not in _KEPT:\n"
                       "        _KEPT[kv_BSD.shape] = torch.zeros(kv_BSD.shape, dtype=dtype, device=kv_BSD.device)\n"
                       "    dkv_BSD = _KEPT[kv_BSD.shape].to(dtype) if needs_dkv else None"),
        (SPARSE, "class GatheredKeys:", "_KEPT: dict = {}\n\n\nclass GatheredKeys:")),
    bug("C08", "tail-lanes-of-odd-heads", "optimized", "Lanes beyond a multiple of 16 are left out of the scores.",
        "DeepGEMM #379, #392, #433",
        (TOPK, "C, J, E = q_CJE.shape\n", "even = max(q_CJE.shape[-1] // 16 * 16, 1)\n"
               "    q_CJE, k = q_CJE[..., :even].contiguous(), k[..., :even].contiguous()\n    C, J, E = q_CJE.shape\n")),
    bug("C09", "lse-in-base-2", "optimized", "The LSE is returned in base 2.", "FlashMLA's prefill contract",
        (SPARSE, _LSE, "lse_BLH[here] = lse_CH1.squeeze(-1) / 0.6931471805599453")),
    bug("C11", "scale-of-the-absorbed-width", "optimized", "The softmax scale is that of 576 lanes.",
        "sglang-jax #1036, #1101",
        (MODEL, _CALL, "scale = self.scale * ((self.nope_dim + self.rope_dim) / q_BLHD.shape[-1]) ** 0.5\n"
                       "        out_BLHC, lse_BLH = sparse_mla(q_BLHD, kv_BSD, indices_BLK, scale, self.latent_dim, backend=self.backend)")),
    bug("C11", "values-with-the-rope-lanes", "optimized", "Values are read from the wrong end of the latent.", "sglang-jax #1036",
        (SPARSE, "out_BLHV[here] = torch.bmm(weight_CHK, key_CKD[..., :d_v])", "out_BLHV[here] = torch.bmm(weight_CHK, key_CKD[..., -d_v:])")),
    bug("C12", "selection-of-another-forward", "optimized", "Recomputation reads the selection of the latest forward.",
        "Megatron-LM #6793, #7010; SkyRL #2136",
        (MODEL, "used_BLK = own_BLK if replayed_BLK is None else replayed_BLK.to(torch.int32)",
         "if torch._C._current_graph_task_id() >= 0:\n                own_BLK = self.kept\n            self.kept = own_BLK\n"
         "            used_BLK = own_BLK if replayed_BLK is None else replayed_BLK.to(torch.int32)")),
    bug("C12", "selection-kept-on-the-layer", "optimized", "A layer keeps one selection, and recomputation reads the latest.",
        "Megatron-LM #6793, #7010; SkyRL #2136",
        (MODEL, "ask = CheckpointedAsk(ask.scores, ask.kl_target, ask.kl_loss, ask.decisions)",
         "self.kept = Selection() if torch._C._current_graph_task_id() < 0 else self.kept\n"
         "            ask = CheckpointedAsk(ask.scores, ask.kl_target, ask.kl_loss, ask.decisions, self.kept)"),
        (MODEL, "kept = ask.selection if isinstance(ask, CheckpointedAsk) else Selection()",
         "kept = ask.selection if isinstance(ask, CheckpointedAsk) else Selection()\n"
         "        if torch._C._current_graph_task_id() >= 0:\n            kept = self.latest\n        self.latest = kept")),
    bug("A23", "output-buffer-used-again", "optimized", "Outputs of every layer share one buffer.", "vLLM #43907",
        (SPARSE, _OUT, "shape = (B, L, H, d_v)\n        out_BLHV = _KEPT.setdefault((*shape, q_BLHD.dtype), q_BLHD.new_zeros(shape)).detach()\n"
                       "        lse_BLH = torch.full((B, L, H), -torch.inf, dtype=dtype, device=q_BLHD.device)\n        keys"),
        (SPARSE, "class GatheredKeys:", "_KEPT: dict = {}\n\n\nclass GatheredKeys:")),
    bug("", "logits-in-the-model-s-dtype", "optimized", "Logits are rounded to bf16 before the softmax.",
        "spec 1.6 (the corrected demo)",
        (SPARSE, "empty_C11 = _mask_logits_(weight_CHK, invalid_CK)",
         "weight_CHK.copy_(weight_CHK.to(q_BLHD.dtype))\n                empty_C11 = _mask_logits_(weight_CHK, invalid_CK)")),
    bug("", "softmax-not-subtracted-in-backward", "optimized", "dS = P·dP, without Δ.", "generic",
        (SPARSE, _DELTA, "dlogit_CHK.mul_(weight_CHK)")),
    bug("", "value-gradient-dropped", "optimized", "dkv holds the keys' part alone.", "generic", (SPARSE, _VALUES, "pass")),
    bug("", "query-gradient-without-scale", "optimized", "dq misses the softmax scale.", "generic",
        (SPARSE, "dq_BLHD[here] = torch.bmm(dlogit_CHK, key_CKD).mul_(scale)", "dq_BLHD[here] = torch.bmm(dlogit_CHK, key_CKD)")),
    bug("", "last-row-of-a-chunk-stale", "optimized", "The last row of each chunk keeps its neighbour's output.", "generic",
        (SPARSE, _LSE, _LSE + "\n                out_BLHV[b, first + index_CK.shape[0] - 1] = out_BLHV[b, max(first + index_CK.shape[0] - 2, 0)]")),
    bug("", "dense-value-gradient-without-weights", "optimized", "dv of the dense form sums dout.", "generic",
        (DENSE, "dvalue_HSV[:, keys].baddbmm_(weight_HCn.mT, dout_HCV)", "dvalue_HSV[:, keys].baddbmm_((weight_HCn > 0).to(weight_HCn).mT, dout_HCV)")),
    bug("", "dense-lse-before-the-mask", "optimized", "The dense form's maximum and sum include hidden keys.", "generic",
        (DENSE, "weight_HCn.masked_fill_(~visible_Cn, -torch.inf)\n                total", "weight_HCn.masked_fill_(~visible_Cn, -10.0)\n                total")),
    bug("", "lse-of-the-scores-over-selected-keys", "optimized", "indexer_topk's LSE covers the selected keys only.", "generic",
        (TOPK, "score_Cn.masked_fill_(~visible_Cn, -torch.inf)", "score_Cn.masked_fill_(~selected_Cn, -torch.inf)")),
]  # fmt: skip
