"""Bugs of the losses and of who trains: catalogue group D (spec 5.2)."""

from ..mutant import bug

ATTENTION, LOSSES, MODEL = "reference/attention.py", "reference/losses.py", "reference/model.py"
KL, OPTIMIZED = "optimized/ops/indexer_kl.py", "optimized/model.py"
_ROWS = (
    "rows = out.num_rows if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)\n            kl_loss"
)
_SCORES = "candidate_scores = scores_BLS.masked_fill(~candidates_BLS, -torch.inf)"
_DETACHED = "(x_BLM.detach(), q_latent.detach()) if self.config.detach_indexer_input else (x_BLM, q_latent)"
_GRAD = """# Dense mode without a reader computes no indexer at all, but a cache may be read in sparse mode later.
        with torch.set_grad_enabled(torch.is_grad_enabled() and ask.reads_indexer):"""
_KL = "kl = torch.xlogy(target, target).sum(-1) - (target * finite).sum(-1) + lse * mass"
_SUMMED = "summed = probs_BHLS.detach().sum(1)"
_MASS = "mass = summed.sum(-1, keepdim=True)"
_KL_SUM = "found.kl_sum = kl_rows(candidate_scores, found.kl_target_BLS).sum()"
_MEAN = "return weight_CHn.sub_(lse_CH.unsqueeze(-1)).exp_().mean(1)"
_SUMS = "indexer_kl_sum=sum(s.to(x_BLM.device) for s in kl_sums) if ask.kl_loss else None,"
_LABELS = "labels = labels_BL[:, 1:].masked_fill(~(real_BL[:, 1:] & real_BL[:, :-1]), -100)"
_COUNT = "count = (labels != -100).sum() if num_items is None else torch.as_tensor(num_items)"
_DSCORE = "dscore_Cn = score_Cn.exp_().sub_(p_Cn).masked_fill_(hidden_Cn, 0)"
_DIK = "dik_BSE[b].index_add_(0, keys.slot_CK.flatten(), dkey_CKE.flatten(0, 1))"
_DW = "dw_BLJ[b, first:last] = torch.bmm(relu_CJn, dscore_Cn.unsqueeze(-1)).squeeze(-1)"

MUTANTS = [
    bug("D01", "kl-not-divided-by-the-whole-batch", "optimized", "Each micro-batch divides the KL by its own rows.",
        "Megatron-LM #4070, #5244", (MODEL, _ROWS, "rows = out.num_rows\n            kl_loss")),
    bug("D01", "lm-loss-not-divided-by-the-whole-batch", "optimized", "The same for the LM loss.", "Megatron-LM #4070",
        (LOSSES, _COUNT, "count = (labels != -100).sum()")),
    bug("D04", "prediction-over-the-whole-row", "reference", "The target lives on S_t, the prediction on every visible key.",
        "the training guide's fork",
        (ATTENTION, _SCORES, "candidate_scores = scores_BLS.masked_fill(~visible_BLS, -torch.inf)")),
    bug("D05", "zero-times-infinity", "reference", "0·(−inf) in p·(log p − log q).", "the training guide's fork",
        (LOSSES, "finite = scores.masked_fill(~support, 0.0)", "finite = scores")),
    bug("D06", "input-not-detached", "optimized", "The KL loss trains the backbone.", "the fork's default; MaxText #3415",
        (ATTENTION, _DETACHED, "(x_BLM, q_latent)"),
        (ATTENTION, "x, latent_in = (\n", "x, latent_in = (  # noqa\n")),
    bug("D06", "only-the-latent-detached", "optimized", "The hidden state stays attached.", "the fork",
        (ATTENTION, "(x_BLM.detach(), q_latent.detach()) if", "(x_BLM, q_latent.detach()) if")),
    bug("D06", "target-not-detached", "reference", "The KL loss trains the attention.", "MaxText #3415; VeOmni; xtuner",
        (ATTENTION, _SUMMED, "summed = probs_BHLS.sum(1)"),
        (LOSSES, "target = target_BLS.detach().to(scores.dtype)", "target = target_BLS.to(scores.dtype)"),
        (LOSSES, _KL, "kl = (target * target.clamp_min(1e-30).log()).sum(-1) - (target * finite).sum(-1) + lse * mass")),
    bug("D06", "lm-loss-trains-the-indexer", "reference", "The same numbers, but attention depends on the indexer for autograd.",
        "spec 5.2 D06",
        (ATTENTION, "with torch.set_grad_enabled(torch.is_grad_enabled() and ask.reads_indexer):\n                scores_BLS", "with torch.enable_grad():\n                scores_BLS"),
        (ATTENTION, _GRAD, "with torch.enable_grad():"),
        (ATTENTION, "found = Found(topk_BLK=own_BLK)", "if scores_BLS is not None:\n            leak = scores_BLS.sum()\n"
                    "            out_BLHV = out_BLHV + (1e-6 * (leak - leak.detach())).to(out_BLHV.dtype)\n"
                    "        found = Found(topk_BLK=own_BLK)")),
    bug("D07", "indexer-under-no-grad", "optimized", "The indexer never trains.", "transformers #48863; VeOmni #1134; torchtitan #4802",
        (ATTENTION, _GRAD, "with torch.no_grad():")),
    bug("D07", "k-norm-bias-never-trained", "optimized", "k_norm's bias is left out of the graph.", "spec 5.2 D07",
        ("reference/precision.py", "self.bias.to(x.dtype), self.eps)", "self.bias.detach().to(x.dtype), self.eps)")),
    bug("D10", "reversed-kl", "reference", "KL(q ‖ p).", "spec 5.2 D10",
        (LOSSES, _KL, "logq = (finite - lse[..., None]).masked_fill(~support, -1e4)\n"
                      "    kl = (logq.exp() * (logq - target.clamp_min(1e-12).log())).sum(-1)")),
    bug("D10", "mean-over-the-keys", "reference", "kl_div's default mean divides by the row's keys.", "spec 5.2 D10",
        (ATTENTION, _KL_SUM, "found.kl_sum = (kl_rows(candidate_scores, found.kl_target_BLS) / candidates_BLS.sum(-1).clamp_min(1)).sum()")),
    bug("D10", "l2-instead-of-l1", "reference", "The target is normalised by its Euclidean length.", "spec 5.2 D10",
        (ATTENTION, _MASS, "mass = summed.square().sum(-1, keepdim=True).sqrt()")),
    bug("D10", "mean-of-logits", "reference", "The softmax of the heads' mean logit instead of the mean of softmaxes.",
        "spec 5.2 D10",
        (ATTENTION, _SUMMED, "summed = probs_BHLS.detach().clamp_min(1e-30).log().mean(1).exp()")),
    bug("D10", "softmax-over-the-queries", "reference", "The prediction is normalised along the wrong axis.",
        "Open-Superintelligence-Lab #7",
        (LOSSES, "lse = torch.logsumexp(scores.masked_fill(~valid[..., None], 0.0), -1)",
         "lse = torch.logsumexp(scores.masked_fill(~valid[..., None], 0.0), -2)[..., : scores.shape[-2]]")),
    bug("D11", "target-of-local-heads", "reference", "Half of the heads make the target.", "Megatron-LM, unfused path",
        (ATTENTION, _SUMMED, "summed = probs_BHLS.detach()[:, : max(self_heads // 2, 1)].sum(1)".replace("self_heads", "probs_BHLS.shape[1]"))),
    bug("D11", "target-of-one-head", "optimized", "The first head makes the target.", "recipe, measured",
        (KL, _MEAN, _MEAN.replace(".mean(1)", "[:, 0]"))),
    bug("", "renormalised-full-softmax", "reference", "The sparse target is gathered from a softmax over every visible key.",
        "Megatron #5776; Primus #992; maxtext #5033",
        (ATTENTION, "found.kl_target_BLS = attention_target(probs_BHLS)",
         "full = masked_attention(t.q_nope_BLHN, t.q_pe_BLHR, k_nope_BSHN, v_BSHV, t.k_pe_BSR, self.scale, visible_BLS)[1]\n"
         "            found.kl_target_BLS = attention_target(full * candidates_BLS[:, None])")),
    bug("", "kl-averaged-over-layers", "optimized", "A layer's gradient depends on how many layers there are.",
        "the training guide's fork", (MODEL, _SUMS, _SUMS.replace("for s in kl_sums)", "for s in kl_sums) / len(kl_sums)"))),
    bug("", "kl-of-the-last-layer-only", "optimized", "Only one layer's KL is returned.", "generic",
        (MODEL, _SUMS, "indexer_kl_sum=kl_sums[-1] if ask.kl_loss else None,")),
    bug("", "pad-rows-in-the-divisor", "optimized", "The KL is divided by all rows, padding among them.", "the training guide's fork",
        (MODEL, "num_rows=layout.real_BL.sum(),", "num_rows=torch.tensor(layout.real_BL.numel()),")),
    bug("", "kl-gradient-dropped-for-keys", "optimized", "wk and k_norm get no gradient in sparse mode.", "generic",
        (KL, _DIK, "dik_BSE[b].index_add_(0, keys.slot_CK.flatten(), 0 * dkey_CKE.flatten(0, 1))")),
    bug("", "kl-gradient-without-target", "optimized", "dI = softmax(I).", "generic",
        (KL, _DSCORE, "dscore_Cn = score_Cn.exp_().masked_fill_(hidden_Cn, 0)")),
    bug("", "head-weight-gradient-of-half-the-keys", "optimized", "dw sums over half of the keys.", "generic",
        (KL, _DW, "dw_BLJ[b, first:last] = torch.bmm(relu_CJn[..., ::2], dscore_Cn[:, ::2].unsqueeze(-1)).squeeze(-1)")),
    bug("", "labels-not-shifted", "optimized", "Each row predicts itself.", "generic",
        (LOSSES, "logits = at_least_fp32(logits_BLV[:, :-1]).flatten(0, 1)", "logits = at_least_fp32(logits_BLV[:, 1:]).flatten(0, 1)")),
    bug("", "labels-shifted-twice", "optimized", "The caller's labels are shifted already, and shifted again.", "generic",
        (LOSSES, _LABELS, "labels = torch.nn.functional.pad(labels_BL[:, 2:], (0, 1), value=-100).masked_fill("
                          "~(real_BL[:, 1:] & real_BL[:, :-1]), -100)")),
    bug("", "padding-counts-in-the-lm-loss", "optimized", "Labels under padding are scored.", "generic",
        (LOSSES, _LABELS, "labels = labels_BL[:, 1:].clamp_min(0)")),
]  # fmt: skip
