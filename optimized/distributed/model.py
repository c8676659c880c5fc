"""The model of several ranks: each computes its rows, and losses are of the tokens and rows of all of them.

A rank is given whole sequences, those of its place along dp and ep, the same on all its ranks of cp and tp. Under cp it
computes some rows of each: `logits` and `hidden_states` are of those (`own_rows`), while decisions, scores and targets
are of all rows, gathered, without gradient. Loss values are the same on every rank. A rank's gradient is its own
share, and FSDP adds the shares up: a loss is a sum over the tokens (or KL rows) of all ranks over their number, never a
mean of means.

Letters: B batch, L this rank's rows, S rows of the whole sequence, W vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optimized.model import DeepseekV32ForCausalLM, DeepseekV32Model
from reference.attention import Ask
from reference.cache import LatentCache
from reference.decisions import Decisions
from reference.layout import build_layout
from reference.outputs import BackboneOutput
from reference.precision import at_least_fp32

from .collectives import gather_slots, sum_over, total
from .layout import Ranks
from .rows import RowSplit, cut_decisions, cut_layout, split_rows


def _own_split(ranks: Ranks, length: int, device: torch.device) -> RowSplit:
    return split_rows(length, ranks.layout.cp, ranks.place("cp"), ranks.layout.rows, device)


class ParallelModel(DeepseekV32Model):
    """Embedding, layers and final norm of this rank's rows."""

    ranks: Ranks

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LatentCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        decisions: Decisions | None = None,
        ask: Ask | None = None,
        output_hidden_states: bool = False,
        layout: Any = None,
    ) -> BackboneOutput:
        """As the reference's, of whole sequences; KL sum and number of rows are those of all ranks."""
        data = self.ranks.group("data")
        if self.ranks.layout.cp == 1:
            out = super().forward(
                input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cu_seq_lens_q,
                decisions, ask, output_hidden_states, layout,
            )  # fmt: skip
        else:
            if (input_ids is None) == (inputs_embeds is None):
                raise ValueError("Exactly one of input_ids and inputs_embeds must be given.")
            given = input_ids if input_ids is not None else inputs_embeds
            assert given is not None
            whole = build_layout(
                given.shape[0], given.shape[1], given.device,
                attention_mask=attention_mask, position_ids=position_ids, cu_seq_lens=cu_seq_lens_q,
            )  # fmt: skip
            split = _own_split(self.ranks, given.shape[1], given.device)
            rows_L = split.own_L
            out = super().forward(
                input_ids=None if input_ids is None else input_ids[:, rows_L],
                inputs_embeds=None if inputs_embeds is None else inputs_embeds[:, rows_L],
                past_key_values=past_key_values, use_cache=bool(use_cache), ask=ask,
                decisions=None if decisions is None else cut_decisions(decisions, rows_L),
                output_hidden_states=output_hidden_states, layout=cut_layout(whole, rows_L),
            )  # fmt: skip
            self._gather_answers(out, split)
        if out.indexer_kl_sum is not None:
            out.indexer_kl_sum = sum_over(out.indexer_kl_sum, data)
        assert out.num_rows is not None
        out.num_rows = total(out.num_rows, data)
        return out

    @torch.no_grad()
    def _gather_answers(self, out: BackboneOutput, split: RowSplit) -> None:
        """Put every row into what was asked for besides hidden states."""
        cp = self.ranks.group("cp")

        def every_row(x: Tensor) -> Tensor:
            return gather_slots(x, split, cp)

        if out.indexer_scores is not None:
            out.indexer_scores = tuple(every_row(x) for x in out.indexer_scores)
        if out.indexer_kl_targets is not None:
            out.indexer_kl_targets = tuple(every_row(x) for x in out.indexer_kl_targets)
        if out.decisions is not None:
            out.decisions = Decisions(tuple(layer.map(every_row) for layer in out.decisions))


class ParallelForCausalLM(DeepseekV32ForCausalLM):
    """DeepSeek V3.2 on several ranks; made of the optimized model by `parallelize`."""

    ranks: Ranks

    def own_rows(self, length: int) -> Tensor:
        """int64 `[L]`: the rows of a sequence of `length` tokens that this rank's `logits` are of."""
        return _own_split(self.ranks, length, self.device).own_L

    def _lm_loss(
        self, logits_BLW: Tensor, labels_BL: Tensor, real_BL: Tensor, num_items: int | Tensor | None
    ) -> Tensor:  # fmt: skip
        """Cross-entropy of this rank's rows, over the targets of all ranks.

        Labels and mask are of whole sequences `[B, S]`: the label of a row stands on the next token, which another
        rank may compute.
        """
        rows_L, data = self.own_rows(labels_BL.shape[1]), self.ranks.group("data")
        if (len(labels_BL), len(rows_L)) != logits_BLW.shape[:2]:
            raise ValueError(f"labels has shape {tuple(labels_BL.shape)}; it must be that of the tokens.")
        labels_BS = self._checked_classes(labels_BL).masked_fill(~real_BL, -100)
        targets_BS = F.pad(labels_BS[:, 1:].masked_fill(~real_BL[:, :-1], -100), (0, 1), value=-100)
        targets_BL = targets_BS[:, rows_L].to(logits_BLW.device)
        loss = F.cross_entropy(
            at_least_fp32(logits_BLW).flatten(0, 1), targets_BL.flatten(), ignore_index=-100, reduction="sum"
        )
        count = total((targets_BL != -100).sum(), data) if num_items is None else torch.as_tensor(num_items)
        return sum_over(loss, data) / count.to(device=loss.device, dtype=loss.dtype).clamp_min(1)
