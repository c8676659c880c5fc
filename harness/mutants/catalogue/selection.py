"""Bugs of visibility and of the top-k: catalogue group B (spec 5.2)."""

from ..mutant import bug

INDEXER, ATTENTION, LAYOUT, CACHE = (
    "reference/indexer.py",
    "reference/attention.py",
    "reference/layout.py",
    "reference/cache.py",
)
TOPK, BACKEND, SPARSE, MODEL = (
    "optimized/ops/indexer_topk.py",
    "optimized/ops/backend.py",
    "optimized/ops/sparse_mla.py",
    "optimized/model.py",
)
_CHOOSE = "slots_BLK = select_topk(scores_BLS, visible_BLS, self.config.index_topk)"
_END = "end_BL = compact_BS[:, -length:] + 1"
_START = "start_BL = begin.gather(1, document_BS[:, -length:] + 1)"
_CANDIDATES = "candidates_BLS = selected_mask(layout.to_slots(used_BLK), layout.num_slots)\n        k_nope_BSHN"
_OPERATOR_K = """bounds_BL2,
                self.config.index_topk,"""
_SELECTED = "selected_Cn = visible_Cn if high - low <= k else select_topk(score_Cn, visible_Cn, k)"
_TIED = "selected_Cn[tied_R] = above_Rn | (equal_Rn & (equal_Rn.cumsum(-1) <= room_R1))"
_ORDER = "order_Cn = _order(score_Cn)"
_SPLIT = """valid_CK = indices_CK >= 0
    if bool(valid_CK.all()):"""
_INDICES = "indices_BLK = torch.full((B, L, min(k, S)), -1, dtype=torch.int32, device=q_BLJE.device)"
_SPARSE = "if self.config.use_sparse_attention:\n            assert scores_BLS is not None"
_SLOTS = "descending = torch.sort(scores_BLS + 0.0, dim=-1, descending=True, stable=True).indices"

MUTANTS = [
    bug("B01", "future-keys-without-a-mask", "reference", "Without padding no causal mask is made, and the future is chosen.",
        "transformers #48363; flash-sparse-attention #146; vmlx-swift #429",
        (ATTENTION, _CHOOSE, "every = visible_BLS if layout.padded else torch.ones_like(visible_BLS)\n"
                             "        slots_BLK = select_topk(scores_BLS, every, self.config.index_topk)")),
    bug("B02", "top-k-before-the-mask", "reference", "The future takes places in the top-k and is masked afterwards.",
        "transformers #45820; ms-swift #8085",
        (ATTENTION, _CHOOSE, "slots_BLK = select_topk(scores_BLS, torch.ones_like(visible_BLS), self.config.index_topk)\n"
                             "        seen = visible_BLS.gather(-1, slots_BLK.clamp_min(0).long())\n"
                             "        slots_BLK = torch.where(seen, slots_BLK, scores_BLS.shape[-1]).sort(-1).values\n"
                             "        slots_BLK = torch.where(slots_BLK == scores_BLS.shape[-1], -1, slots_BLK).int()")),
    bug("B03", "mask-offset-after-the-update", "reference", "The cache's offset is read after it has grown by the chunk.",
        "mlx-swift-lm #61",
        (LAYOUT, _END, "late = length if num_slots > length else 0\n"
                       "    end_BL = (compact_BS[:, -length:] + 1 + late).clamp_max(num_slots)")),
    bug("B04", "diagonal-masked", "optimized", "The end of a row's range is its own position.", "spec 5.2 B04",
        (LAYOUT, _END, "end_BL = compact_BS[:, -length:]")),
    bug("B04", "one-key-too-many", "optimized", "Each row sees its successor.", "spec 5.2 B04",
        (LAYOUT, _END, "end_BL = (compact_BS[:, -length:] + 2).clamp_max(num_slots)")),
    bug("B05", "row-starts-ignored", "optimized", "The operator reads the end of each row's range, and not its start.",
        "sglang #11629, #12582, #12583",
        (BACKEND, "visible_Cn = (slots_n >= start_C1) & (slots_n < end_C1)", "visible_Cn = (slots_n < end_C1) & (start_C1 >= 0)")),
    bug("B07", "documents-not-kept-apart", "reference", "Positions that restart do not start a document.",
        "PaddleFleet #1321",
        (LAYOUT, "begins_BS = real_BS & ((previous < 0) | ~follows)", "begins_BS = real_BS & (previous < 0) & follows")),
    bug("B08", "k-larger-than-the-keys", "reference", "k keys are asked for where there are fewer.",
        "NeMo Automodel #3035; slime",
        (INDEXER, "order = descending.gather(-1, torch.argsort(hidden.byte(), dim=-1, stable=True))[..., : min(k, width)]",
         "order = descending.gather(-1, torch.argsort(hidden.byte(), dim=-1, stable=True)).narrow(-1, 0, k)")),
    bug("B10", "no-key-read-as-slot-0", "optimized", "−1 is read as the first key.", "tokenspeed #528; flashinfer #5095",
        (SPARSE, _SPLIT, "valid_CK = indices_CK >= -1\n    indices_CK = indices_CK.clamp(min=0)\n"
                         "    if bool(valid_CK.all()):")),
    bug("B10", "no-key-read-as-the-last", "optimized", "−1 is read as the last key, as Python does.", "tokenspeed #528",
        (SPARSE, "index_CK, invalid_CK = split_selection(indices_BLK[here])\n                if index_CK.shape[1] == 0:",
         "index_CK, invalid_CK = split_selection(indices_BLK[here] % kv_BSD.shape[1])\n"
         "                if index_CK.shape[1] == 0:")),
    bug("B11", "stale-index-buffer", "optimized", "The index buffer outlives the call and is not cleared.",
        "vLLM #32172, #32175; DSpark issue 2",
        (TOPK, _INDICES, "shape = (B, L, min(k, S))\n    wide = _KEPT.get(B)\n"
                         "    if wide is None or wide.shape[1] < L or wide.shape[2] < shape[2]:\n"
                         "        wide = _KEPT[B] = torch.full(shape, -1, dtype=torch.int32, device=q_BLJE.device)\n"
                         "    indices_BLK = wide[:, :L, : shape[2]].clone()\n    _KEPT[B][:, :L, : shape[2]] = 0"),
        (TOPK, "GROUP = 8\n", "GROUP = 8\n_KEPT: dict = {}\n")),
    bug("B12", "half-precision-sort-keys", "optimized", "Keys are sorted by fp16 scores.", "sglang #37591, #35257; TileLang #2513",
        (TOPK, _ORDER, "order_Cn = _order(score_Cn.half().to(score_Cn.dtype))")),
    bug("B12", "half-of-k-copied", "optimized", "Half of the selected keys never leave the buffer.", "sglang #23761 (review)",
        (TOPK, "_write_positions(selected_Cn, low, indices_BLK[b, first:last])",
         "half = selected_Cn & (selected_Cn.cumsum(-1) <= max(k // 2, 1))\n"
         "        _write_positions(half, low, indices_BLK[b, first:last])")),
    bug("B12", "off-by-one-k", "optimized", "k − 1 keys are selected.", "harness 1.3 (measured)",
        (MODEL, _OPERATOR_K, "bounds_BL2,\n                self.config.index_topk - 1,")),
    bug("B13", "unordered-ties", "optimized", "Which of equal scores is taken depends on a race.",
        "sglang #31115; omlx #2243; vLLM #55122",
        (TOPK, _TIED, "race = torch.rand(equal_Rn.shape, device=equal_Rn.device) * equal_Rn\n"
                      "        rank = race.argsort(-1, descending=True).argsort(-1)\n"
                      "        selected_Cn[tied_R] = above_Rn | (equal_Rn & (rank < room_R1))")),
    bug("B13", "highest-index-first", "optimized", "Equal scores go to the highest index.", "spec 2, ties",
        (TOPK, _TIED, "late = equal_Rn.flip(-1).cumsum(-1).flip(-1) <= room_R1\n"
                      "        selected_Cn[tied_R] = above_Rn | (equal_Rn & late)")),
    bug("B16", "index-topk-of-another-model", "reference", "A default wins over the checkpoint's index_topk.",
        "TensorRT-LLM #14931", (ATTENTION, _CHOOSE, _CHOOSE.replace("self.config.index_topk", "512"))),
    bug("B18", "selection-ignored-by-one-backend", "reference", "This path attends to every visible key.",
        "ik_llama.cpp #2063", (ATTENTION, _CANDIDATES, "candidates_BLS = visible_BLS\n        k_nope_BSHN")),
    bug("B18", "masked-form-ignores-indices", "optimized", "dense_mla with indices forgets them.", "ik_llama.cpp #2063",
        (BACKEND, "return visible_Cn & selected_Cn", "return visible_Cn | (visible_Cn & selected_Cn)")),
    bug("B19", "dense-flag-active-in-decode", "reference", "The mode depends on train() and eval().", "MaxText #3633",
        (ATTENTION, _SPARSE, "if self.config.use_sparse_attention and self.training:\n            assert scores_BLS is not None")),
    bug("B20", "sink-always-kept", "reference", "The first key of a document is always selected.",
        "mlx-lm #1443 (a false fix)",
        (ATTENTION, _CHOOSE, "first = layout.compact_BS[:, None] == layout.bounds_BL2[..., :1]\n"
                             "        slots_BLK = select_topk(scores_BLS.masked_fill(first, torch.inf), visible_BLS, self.config.index_topk)")),
    bug("", "copies-the-tape", "reference", "What it is told to choose it reports as its own choice, over a wrong indexer.",
        "generic",
        (ATTENTION, "found.topk_BLK = layout.to_relative(found.topk_BLK)",
         "found.topk_BLK = layout.to_relative(found.topk_BLK if replayed_BLK is None else replayed_BLK)"),
        (INDEXER, "self.rotate = rotate_interleaved if config.indexer_rope_interleaved else rotate_half_split",
         "self.rotate = rotate_interleaved")),
    bug("", "most-recent-keys", "reference", "A sliding window instead of the indexer's choice.", "harness 1.3 (measured)",
        (ATTENTION, _CHOOSE, "recent = torch.arange(scores_BLS.shape[-1], device=scores_BLS.device).expand_as(scores_BLS)\n"
                             "        slots_BLK = select_topk(recent.to(scores_BLS.dtype), visible_BLS, self.config.index_topk)")),
    bug("", "lowest-scores-chosen", "reference", "The sort runs the wrong way.", "harness 1.3 (measured)",
        (INDEXER, _SLOTS, _SLOTS.replace("scores_BLS + 0.0", "-scores_BLS"))),
    bug("", "one-choice-for-all-rows", "reference", "The last row's scores decide for all.",
        "transformers #45758 (a union of selections); harness 1.3",
        (ATTENTION, _CHOOSE, "slots_BLK = select_topk(scores_BLS[:, -1:].expand_as(scores_BLS), visible_BLS, self.config.index_topk)")),
    bug("", "random-keys", "reference", "The indexer is not asked.", "harness 1.3 (measured)",
        (ATTENTION, _CHOOSE, "slots_BLK = select_topk(torch.rand_like(scores_BLS), visible_BLS, self.config.index_topk)")),
    bug("D14", "replayed-keys-not-used", "reference", "The tape is accepted and the model's own keys are used.",
        "Megatron #5384; miles (index replay)",
        (ATTENTION, "used_BLK = own_BLK if replayed_BLK is None else replayed_BLK\n            candidates", "used_BLK = own_BLK\n            candidates")),
]  # fmt: skip
