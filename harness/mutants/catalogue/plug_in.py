"""Bugs of the plug-in into transformers, tried on transformers' own models (spec 5.2).

Those that are patched in glm_moe_dsa.py are tried on GLM-5's, all others on `deepseek_v32`.
"""

from ..mutant import bug

REGISTRY, ATTENTION, MODELS, GLM = (
    "optimized/plug_in/registry.py",
    "optimized/plug_in/attention.py",
    "optimized/plug_in/models.py",
    "optimized/plug_in/glm_moe_dsa.py",
)
_FILLED = "filled = 0 if cache is None else int(cache.get_seq_length())"

MUTANTS = [
    bug("A06", "plugged-glm-loses-interleaved-rope", "optimized", "GLM-5's indexer rotates half-split pairs.",
        "transformers #46372; ik_llama.cpp #2099; TensorRT-LLM #12010",
        (GLM, "    interleaved = True\n", "    interleaved = False\n")),
    bug("", "plugged-shared-indexers-of-the-first-layer", "optimized", "Layers that share an indexer all read the first one's.", "generic",
        (GLM, "plugged.selection.topk_BLK = prev_topk_indices", "plugged.selection.topk_BLK = _FIRST[0]"),
        (GLM, "        return out_BLM, None, selection_BLK",
         "        _FIRST[:] = [selection_BLK] if self.layer_idx == 0 else _FIRST\n        return out_BLM, None, selection_BLK"),
        (GLM, "upstream_base = upstream.", "_FIRST: list = []\nupstream_base = upstream.")),
    bug("D07", "plugged-indexer-under-no-grad", "optimized", "The indexer runs without gradients, as in transformers.", "transformers #48863; VeOmni #1134",
        (ATTENTION, "with torch.set_grad_enabled(torch.is_grad_enabled() and ask.reads_indexer):", "with torch.no_grad():")),
    bug("D06", "plugged-input-not-detached", "optimized", "The KL reaches the backbone through the indexer's input.", "the guide's fork; MaxText #3415",
        (ATTENTION, "if detached else (x_BLM, q_latent_BLQ)", "if not detached else (x_BLM, q_latent_BLQ)")),
    bug("A14", "plugged-head-weights-in-the-models-dtype", "optimized", "Head weights are rounded to bf16.", "sglang #13459; axolotl #3832",
        (ATTENTION, "        self.weights_proj.__class__ = WideLinear\n", "")),
    bug("B01", "plugged-mask-ignored", "optimized", "Padding is attended to.", "transformers #48363",
        (MODELS, "x_BLM.device, attention_mask=attention_mask,", "x_BLM.device, attention_mask=None,")),
    bug("B03", "plugged-static-cache-taken-as-full", "optimized", "A static cache's length is taken for that of the text.", "mlx-swift-lm #61",
        (MODELS, _FILLED, f"{_FILLED}\n    filled = filled and max(filled, cache.get_max_length())")),
    bug("B07", "plugged-cache-forgets-documents", "optimized", "Packed documents are one as soon as there is a cache.", "docs/findings-transformers.md, 1",
        (MODELS, "attention_mask=attention_mask, position_ids=position_ids,\n            cu",
         "attention_mask=attention_mask, position_ids=None if use_cache else position_ids,\n            cu")),
    bug("B19", "plugged-dense-switch-unread", "optimized", "use_sparse_attention is accepted and not read.", "docs/findings-transformers.md, 15",
        (ATTENTION, "return getattr(self._config, name, OWN_FIELDS[name])", "return OWN_FIELDS[name]")),
    bug("D01", "plugged-kl-averaged-over-layers", "optimized", "A layer's gradient falls with the number of layers.", "Megatron #4070, #5244",
        (MODELS, "torch.stack(sums).sum()", "torch.stack(sums).mean()")),
    bug("", "plugged-table-of-outputs-left-behind", "optimized", "unplug leaves our classes in the table that all models record by.", "transformers' patch_output_recorders",
        (REGISTRY, "            undo.callback(_put_back, recorded, dict(recorded))\n", "            dict(recorded)\n")),
    bug("", "plugged-constructor-left-behind", "optimized", "unplug leaves the wrapped constructors.", "generic",
        (REGISTRY, 'undo.callback(setattr, original, "__init__", original.__init__)', "original.__init__")),
]  # fmt: skip
