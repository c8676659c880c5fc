"""Bugs that need several ranks to show: losses and targets over ranks, context parallelism, exchanged tokens (spec 5.2).

No check of one process can see them: `harness.mutants.ranked` compares each on two ranks with one process.
"""

from ..mutant import bug

ROWS, COLLECTIVES, PARTS, MODEL, PARALLELIZE, GRADIENTS = (
    f"optimized/distributed/{name}.py" for name in ("rows", "collectives", "parts", "model", "parallelize", "gradients")
)
_COUNT = "count = total((targets_BL != -100).sum(), data) if num_items is None"
_KL_SUM = "out.indexer_kl_sum = sum_over(out.indexer_kl_sum, data)"
_NUM_ROWS = "out.num_rows = total(out.num_rows, data)"
_TARGETS = "targets_BL = targets_BS[:, rows_L].to(logits_BLW.device)"
_HEAD_SUM = 'return total(p, self.ranks.group("tp")) / self.ranks.layout.tp'
_KL = 'kl_sum, _ = indexer_kl(*inputs, backend="torch", sum_heads=self._mean_of_ranks)\n        return kl_sum'
_SELECT = 'return first_rank_s(super()._select(t, index_k_BSE, layout, ask), self.ranks.group("tp"))'
_CHOOSE = 'return first_rank_s(super().choose(scores_NX), self.ranks.group("tp"))'
_SHARED = "t = replace(t, c_kv_BSC=share(t.c_kv_BSC, tp), k_pe_BSR=share(t.k_pe_BSR, tp))"
_PLACED = "placed_PM = y_PM.new_zeros(len(expert_P), y_PM.shape[1]).index_copy(0, order_P, y_PM)"
_OWN_GRADIENT = "dx_BW = every.unflatten(0, (group.size(), -1))[group.rank()].clone()"

MUTANTS = [
    bug("D01", "lm-loss-as-a-mean-of-means", "optimized", "Each rank divides by its own targets, and ranks are averaged.",
        "Megatron-LM #4070", (MODEL, _COUNT, "count = (targets_BL != -100).sum() * data.size() if num_items is None")),
    bug("D01", "kl-rows-counted-locally", "optimized", "The KL is divided by the rank's own rows.", "Megatron-LM #5244",
        (MODEL, _NUM_ROWS, "out.num_rows = out.num_rows * data.size()")),
    bug("D01", "gradients-averaged-over-ranks", "optimized", "FSDP divides what is divided by the tokens already.",
        "Megatron-LM #4070", (PARALLELIZE, "set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(float(data.size()))")),
    bug("D02", "kl-too-small-by-the-ranks-of-cp", "optimized", "The KL is averaged over the ranks of a sequence.",
        "Megatron-LM #3674 (review)", (MODEL, _KL_SUM, _KL_SUM + " / self.ranks.layout.cp")),
    bug("D11", "target-of-a-rank-s-heads", "optimized", "p is that of the rank's own heads.", "spec 5.2 D11",
        (PARTS, _HEAD_SUM, "return p")),
    bug("D11", "divergence-before-the-sum-over-heads", "optimized", "Each rank takes the KL of its heads; the KLs are averaged.",
        "spec 5.2 D11", (PARTS, _KL, 'kl_sum, _ = indexer_kl(*inputs, backend="torch")\n'
                                     '        return sum_over(kl_sum, self.ranks.group("tp")) / self.ranks.layout.tp')),
    bug("D11", "sum-over-ranks-of-a-temporary", "optimized", "The reduced copy is thrown away.", "Megatron-LM (code reading)",
        (COLLECTIVES, "dist.all_reduce(summed, group=group)", "dist.all_reduce(summed.clone(), group=group)")),
    bug("B14", "a-selection-for-each-rank-of-tp", "optimized", "Ranks that round otherwise select otherwise.", "aiter #4415",
        (PARTS, _SELECT, "return super()._select(t, index_k_BSE, layout, ask)")),
    bug("B14", "an-expert-choice-for-each-rank-of-tp", "optimized", "The same for experts.", "neighbour of B14",
        (PARTS, _CHOOSE, "return super().choose(scores_NX)")),
    bug("B07", "positions-local-to-the-rank", "optimized", "A rank's positions count from the sequence's first.", "generic",
        (ROWS, "layout.positions_BL[:, rows_L]", "layout.positions_BL[:, : len(rows_L)]")),
    bug("B05", "bounds-local-to-the-rank", "optimized", "Visibility and selection go by local rows.", "neighbour of B05",
        (ROWS, "layout.bounds_BL2[:, rows_L]", "layout.bounds_BL2[:, : len(rows_L)]")),
    bug("", "latents-in-the-order-of-ranks", "optimized", "Gathered rows are not put in the order of the sequence.", "generic",
        (COLLECTIVES, ".index_select(1, split.place_S)", "[:, : len(split.place_S)]")),
    bug("", "gradient-of-gathered-latents-not-summed", "optimized", "A key learns from the queries of its own rank only.", "generic",
        (COLLECTIVES, "_reduce_scatter(dx_BW, every, group=group)", _OWN_GRADIENT)),
    bug("", "labels-shifted-within-a-rank", "optimized", "The label of a stretch's last row is not the next token's.", "generic",
        (MODEL, _TARGETS, "targets_BL = F.pad(labels_BS[:, rows_L][:, 1:], (0, 1), value=-100)")),
    bug("", "pads-predict-on-ranks", "optimized", "The first real token is scored on padding.", "generic",
        (MODEL, "labels_BS[:, 1:].masked_fill(~real_BL[:, :-1], -100)", "labels_BS[:, 1:]")),
    bug("", "tokens-back-in-the-order-of-experts", "optimized", "What returns is not put in its token's place.", "generic",
        (PARTS, _PLACED, _PLACED.replace("order_P, y_PM)", "order_P.sort().values, y_PM)"))),
    bug("", "exchanged-gradients-lost", "optimized", "The gradient of a token stays on the rank of its expert.", "generic",
        (COLLECTIVES, "return _moved(dy_Q, ctx.received, ctx.sent, ctx.group), None, None, None",
         "return _moved(0 * dy_Q, ctx.received, ctx.sent, ctx.group), None, None, None")),
    bug("", "router-learns-from-local-experts", "optimized", "The gradient of routed weights is not summed over tp.", "generic",
        (PARTS, "x_NM, weights_NT = share(x_NM, tp), share(weights_NT, tp)", "x_NM = share(x_NM, tp)")),
    bug("", "q-latent-learns-from-local-heads", "optimized", "The gradient of the q latent is not summed over tp.", "generic",
        (PARTS, 'return super().forward(share(x, self.ranks.group("tp")))', "return super().forward(x)")),
    bug("", "rope-key-learns-from-local-heads", "optimized", "The gradient of k_pe is not summed over tp.", "generic",
        (PARTS, _SHARED, "t = replace(t, c_kv_BSC=share(t.c_kv_BSC, tp))")),
    bug("", "norm-of-own-shards", "optimized", "Each rank clips by the norm of what it holds.", "generic",
        (GRADIENTS, "dist.all_reduce(value, group=mesh.get_group(axis))", "mesh.get_group(axis)")),
]  # fmt: skip
