"""The parts of a layer that are divided: attention by rows and heads, FFNs by columns and rows, experts by expert.

    part                       cut by tp                          by cp                by ep (and tp)
    q_b_proj, kv_b_proj        rows, a head's together
    o_proj                     columns, Σ over ranks
    gate_proj, up_proj         rows
    down_proj                  columns, Σ over ranks
    c_kv, k_pe, indexer keys   gradients summed (not the keys')   all rows gathered
    indexer, gate, norms       replicated; choices of rank 0
    routed experts                                                                     whole experts, pairs exchanged

A parameter that is cut is a DTensor; what computes reads this rank's part of it.

Letters: B batch, L rows, S key slots, H this rank's heads, N nope dim (in `ParallelExperts` tokens), V v_head_dim,
C kv_lora_rank, M hidden_size, D width of a head, K selected keys, X experts, T chosen experts a token, P pairs of a
token and one of its experts, Q pairs that a rank receives.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from optimized.experts import Experts
from optimized.linear import Linear, linear
from optimized.model import DeepseekV32Attention
from optimized.ops import indexer_kl
from reference.attention import Ask, Found, Projected
from reference.cache import LatentCache
from reference.layout import Layout
from reference.moe import Gate, SwiGLU, swiglu
from reference.precision import at_least_fp32

from .collectives import exchange, first_rank_s, gather_slots, share, sum_over, total
from .layout import Ranks
from .rows import RowsLayout, split_rows


def own_part(x: Tensor) -> Tensor:
    """This rank's part of a parameter, whose gradient becomes that of the part; of one that is whole, all."""
    return x.to_local() if isinstance(x, DTensor) else x


class PartLinear(Linear):
    """A linear layer that computes with this rank's rows, or columns, of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """`[*, part of F]` of `[*, M]`, or a summand of `[*, F]` of `[*, part of M]`."""
        return linear(x, own_part(self.weight))


class HeadsLinear(PartLinear):
    """A layer that makes heads of something all ranks of tp hold."""

    ranks: Ranks

    def forward(self, x: Tensor) -> Tensor:
        """`[*, part of F]`."""
        return super().forward(share(x, self.ranks.group("tp")))


class SummedLinear(PartLinear):
    """A layer whose input is divided among the ranks of tp, by columns of the weight."""

    ranks: Ranks

    def forward(self, x: Tensor) -> Tensor:
        """`[*, F]`, the same on all ranks of tp."""
        return sum_over(super().forward(x), self.ranks.group("tp"))


class ParallelSwiGLU(SwiGLU):
    """w2(silu(w1 x) · w3 x), a part of the inner width on each rank of tp."""

    ranks: Ranks

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`."""
        x = share(x, self.ranks.group("tp"))
        return sum_over(self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x))), self.ranks.group("tp"))


class ParallelGate(Gate):
    """The gate of ranks that hold the same tokens: one choice for all of them."""

    ranks: Ranks

    def choose(self, scores_NX: Tensor) -> Tensor:
        """int32 `[N, T]`, as the first rank of tp chooses."""
        return first_rank_s(super().choose(scores_NX), self.ranks.group("tp"))


class ParallelExperts(Experts):
    """The routed experts of which this rank holds some: each pair of a token and an expert goes to the expert's rank.

    Ranks of ep hold different tokens and exchange pairs; ranks of tp hold the same, and each takes the pairs of its own
    experts, and of those of its row of ep.
    """

    ranks: Ranks

    def forward(self, x_NM: Tensor, experts_NT: Tensor, weights_NT: Tensor) -> Tensor:
        """As the reference's: Σ over a token's experts of weight · expert(x), `[N, M]` in at least fp32."""
        tp, ep = self.ranks.group("tp"), self.ranks.group("ep")
        gate_up, down = own_part(self.gate_up_proj), own_part(self.down_proj)
        x_NM, weights_NT = share(x_NM, tp), share(weights_NT, tp)
        held, top = len(gate_up), experts_NT.shape[1]
        expert_P = experts_NT.flatten().long()
        mine_P = expert_P // held % tp.size() == self.ranks.place("tp")
        order_P = torch.argsort(torch.where(mine_P, expert_P, self.gate_up_proj.shape[0]), stable=True)
        order_P = order_P[: int(mine_P.sum())]
        # Of each rank of ep, how many pairs each of its experts gets from here, and from there.
        owner_P, inner_P = expert_P[order_P] // (held * tp.size()), expert_P[order_P] % held
        counts = torch.bincount(owner_P * held + inner_P, minlength=ep.size() * held).view(ep.size(), held)
        coming = exchange(counts, [1] * ep.size(), [1] * ep.size(), ep)
        sent, received = counts.sum(1).tolist(), coming.sum(1).tolist()

        x_QM = exchange(x_NM[order_P // top], sent, received, ep)
        inner_Q = torch.arange(held, device=x_NM.device).repeat(ep.size()).repeat_interleave(coming.flatten())
        y_QM = _computed(gate_up, down, x_QM, inner_Q)
        y_PM = exchange(y_QM, received, sent, ep)

        # In the order of the tokens, so that a token's experts are summed in the same order for any division.
        placed_PM = y_PM.new_zeros(len(expert_P), y_PM.shape[1]).index_copy(0, order_P, y_PM)
        out_NM = (at_least_fp32(placed_PM.unflatten(0, (-1, top))) * weights_NT[..., None]).sum(1)
        return sum_over(out_NM, tp)


def _computed(gate_up: Tensor, down: Tensor, x_QM: Tensor, expert_Q: Tensor) -> Tensor:
    """`[Q, M]`: each row by its expert of the given stacks, in the dtype of x."""
    if not len(x_QM):
        # Without a pair the stacks still take part: a rank that had no gradient for them would leave the others waiting.
        nothing = gate_up.flatten()[:0].sum() + down.flatten()[:0].sum()
        return x_QM + nothing
    own = Experts.__new__(Experts)
    nn.Module.__init__(own)
    # This rank's experts as a block of their own, for this call: results of a computation, and no parameters.
    own.__dict__.update(gate_up_proj=gate_up, down_proj=down)
    weight_Q1 = at_least_fp32(x_QM.new_ones(len(x_QM), 1))
    return own(x_QM, expert_Q[:, None], weight_Q1).to(x_QM.dtype)


class ParallelAttention(DeepseekV32Attention):
    """MLA and indexer of this rank's rows (cp) and heads (tp)."""

    ranks: Ranks

    def project(
        self, x_BLM: Tensor, rotary: tuple[Tensor, Tensor], cache: LatentCache | None, ask: Ask
    ) -> Projected:  # fmt: skip
        """As the reference's, of this rank's rows and heads."""
        if cache is not None and self.ranks.layout.cp > 1:
            raise ValueError(
                "past_key_values: a cache cannot be filled under context parallelism; use_cache must be False."
            )
        return super().project(x_BLM, rotary, cache, ask)

    def attend(
        self, t: Projected, layout: Layout, ask: Ask, replayed_BLK: Tensor | None
    ) -> tuple[Tensor, Found]:  # fmt: skip
        """As the optimized model's, over the keys of all rows."""
        t = self._every_key(t, layout)
        tp = self.ranks.group("tp")
        t = replace(t, c_kv_BSC=share(t.c_kv_BSC, tp), k_pe_BSR=share(t.k_pe_BSR, tp))
        return super().attend(t, layout, ask, replayed_BLK)

    def _every_key(self, t: Projected, layout: Layout) -> Projected:
        """`t` with the latents, rope keys and indexer keys of the whole sequence: all that a key is made of."""
        if not isinstance(layout, RowsLayout):
            return t
        group, sizes = self.ranks.group("cp"), self.ranks.layout
        split = split_rows(layout.num_slots, sizes.cp, self.ranks.place("cp"), sizes.rows, layout.rows_L.device)
        widths = [t.c_kv_BSC.shape[-1], t.k_pe_BSR.shape[-1]]
        latent = gather_slots(torch.cat((t.c_kv_BSC, t.k_pe_BSR), -1), split, group)
        c_kv_BSC, k_pe_BSR = latent.split(widths, -1)
        # By itself: the losses of the model and of the indexer share no path, not even one with a gradient of 0.
        index_k = None if t.index_k_BSE is None else gather_slots(t.index_k_BSE, split, group)
        return replace(t, c_kv_BSC=c_kv_BSC, k_pe_BSR=k_pe_BSR, index_k_BSE=index_k)

    def _select(self, t: Projected, index_k_BSE: Tensor | None, layout: Layout, ask: Ask) -> Tensor:
        """One selection for the ranks of tp: the indexer is replicated, but rounding need not be."""
        return first_rank_s(super()._select(t, index_k_BSE, layout, ask), self.ranks.group("tp"))

    def _kl_sum(self, *inputs: Any, backend: str | None) -> Tensor:
        """Σ over rows of the KL; with heads on several ranks by the implementation that can add their p up."""
        if self.ranks.layout.tp == 1:
            return super()._kl_sum(*inputs, backend=backend)
        kl_sum, _ = indexer_kl(*inputs, backend="torch", sum_heads=self._mean_of_ranks)
        return kl_sum

    def _mean_of_ranks(self, p: Tensor) -> Tensor:
        return total(p, self.ranks.group("tp")) / self.ranks.layout.tp

    def _target_rows(self, q_BCHD: Tensor, k: Tensor, lse_BCH: Tensor) -> Tensor:
        return self._mean_of_ranks(super()._target_rows(q_BCHD, k, lse_BCH))

    def up_projections(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """W_uk `[H, N, C]` and W_uv `[H, V, C]` of this rank's heads."""
        if self.ranks.layout.tp == 1:
            return super().up_projections(like)
        w_uk, w_uv = (
            own_part(self.kv_b_proj.weight).unflatten(0, (self.n_heads, -1)).split([self.nope_dim, self.v_dim], 1)
        )
        return w_uk, w_uv
