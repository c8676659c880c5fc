"""Layouts of ranks, shares of rows, and what is refused before anything is divided."""

import pytest
import torch

from optimized import DeepseekV32Config, DeepseekV32ForCausalLM
from optimized.distributed import ParallelLayout, parallelize
from optimized.distributed.layout import SIZES, Ranks
from optimized.distributed.rows import cut_layout, split_rows
from optimized.ops import indexer_kl
from reference import DeepseekV32ForCausalLM as ReferenceModel
from reference.layout import build_layout

CPU = torch.device("cpu")


def test_a_layout_is_read_from_a_word() -> None:
    assert ParallelLayout.parse("fsdp=2, cp=2") == ParallelLayout(dp=2, cp=2)
    layout = ParallelLayout.parse("tp=4,ep=2,dp=3")
    assert (layout.world, layout.data, layout.batches, layout.expert_parts) == (24, 6, 6, 8)
    assert set(SIZES) == {"dp", "cp", "ep", "tp"}


@pytest.mark.parametrize("given", [{"dp": 0}, {"tp": -1}, {"cp": 1.0}, {"ep": True}, {"rows": "shuffled"}])
def test_a_layout_that_is_none_is_refused(given: dict[str, object]) -> None:
    name = next(iter(given))
    with pytest.raises(ValueError, match=f"ParallelLayout.{name} is"):
        ParallelLayout(**given)


@pytest.mark.parametrize(
    ("layout", "changes", "sentence"),
    [
        (ParallelLayout(tp=3), {}, "config.num_attention_heads is 4, which tp = 3 does not divide"),
        (ParallelLayout(tp=8), {"num_attention_heads": 8, "moe_intermediate_size": 36}, "n_shared_experts is 36"),
        (ParallelLayout(dp=5, tp=2), {}, "config.q_lora_rank is 48, which dp · cp · ep = 5 does not divide"),
        (ParallelLayout(ep=3), {}, "config.n_routed_experts is 8, which ep · tp = 3 does not divide"),
        (ParallelLayout(ep=8, dp=7), {}, "config.2 · moe_intermediate_size is 64, which dp · cp = 7 does not divide"),
    ],
)
def test_a_config_that_does_not_divide_is_refused(
    layout: ParallelLayout, changes: dict[str, int], sentence: str
) -> None:
    plain = DeepseekV32Config.preset("tiny").to_dict()
    plain.pop("num_key_value_heads", None)
    config = DeepseekV32Config(**{**plain, **changes})
    with pytest.raises(ValueError, match=sentence):
        layout.check(config, layout.world)
    with pytest.raises(ValueError, match="ranks; 1000 are running"):
        layout.check(config, 1000)


def test_every_config_divides_by_one() -> None:
    for name in ("tiny", "bench", "small", "medium", "v32"):
        ParallelLayout().check(DeepseekV32Config.preset(name), 1)
    ParallelLayout(dp=4, cp=2, tp=2, ep=4).check(DeepseekV32Config.preset("v32"), 64)


@pytest.mark.parametrize("order", ["balanced", "contiguous"])
@pytest.mark.parametrize(("length", "parts"), [(41, 4), (40, 4), (8, 4), (7, 1), (129, 3)])
def test_rows_are_shared_out_once_each(order: str, length: int, parts: int) -> None:
    splits = [split_rows(length, parts, part, order, CPU) for part in range(parts)]
    assert sorted(torch.cat([split.own_L for split in splits]).tolist()) == list(range(length))
    side_by_side = torch.full((parts * splits[0].widest,), -1)
    for part, split in enumerate(splits):
        assert split.own_L.tolist() == sorted(split.own_L.tolist())
        side_by_side[part * split.widest : part * split.widest + len(split.own_L)] = split.own_L
    assert all(side_by_side[split.place_S].tolist() == list(range(length)) for split in splits)


def test_balanced_rows_meet_equal_numbers_of_keys() -> None:
    met = {
        order: [int((split_rows(64, 4, part, order, CPU).own_L + 1).sum()) for part in range(4)]
        for order in ("balanced", "contiguous")
    }
    assert len(set(met["balanced"])) == 1
    assert max(met["contiguous"]) > 6 * min(met["contiguous"])


def test_a_sequence_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="input_ids has 7 tokens a row; with cp = 4 and balanced rows it needs 8"):
        split_rows(7, 4, 0, "balanced", CPU)


def test_a_cut_layout_sees_what_its_rows_saw() -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    positions = torch.cat((torch.arange(5), torch.arange(7))).expand(2, -1)
    whole = build_layout(2, 12, CPU, attention_mask=mask, position_ids=positions)
    rows_L = torch.tensor([1, 4, 9])
    cut = cut_layout(whole, rows_L)
    assert torch.equal(cut.visible_BLS(), whole.visible_BLS()[:, rows_L])
    assert torch.equal(cut.real_BL, whole.real_BL[:, rows_L])
    assert torch.equal(cut.positions_BL, whole.positions_BL[:, rows_L])
    assert cut.num_slots == 12


def test_rows_of_a_batch_go_to_ranks_that_hold_different_ones() -> None:
    class Second(Ranks):
        def place(self, axis: str) -> int:
            return {"dp": 1, "ep": 0}[axis]

    ranks = Second(ParallelLayout(dp=2, ep=2, tp=2), None, None, None)  # type: ignore[arg-type]
    assert ranks.batch == 2
    assert ranks.batch_rows(8) == slice(4, 6)
    assert ranks.batch_rows(5) == slice(3, 4)
    with pytest.raises(ValueError, match="batch has 3 rows; with dp · ep = 4"):
        ranks.batch_rows(3)


def test_what_cannot_be_parallel_is_refused() -> None:
    config = DeepseekV32Config.preset("tiny")
    with torch.device("meta"):
        plain, other = DeepseekV32ForCausalLM(config), ReferenceModel(config)
    with pytest.raises(ValueError, match="needs a process group"):
        parallelize(plain, ParallelLayout())
    with pytest.raises(ValueError, match="model is a reference.model.DeepseekV32ForCausalLM"):
        parallelize(other, ParallelLayout())


def test_a_sum_over_heads_needs_the_implementation_that_has_a_place_for_it() -> None:
    q, k, w = torch.randn(1, 3, 2, 4), torch.randn(1, 3, 4), torch.randn(1, 3, 2)
    bounds = torch.tensor([[[0, 1], [0, 2], [0, 3]]])
    lse = torch.logsumexp(torch.randn(1, 3, 2, 3), -1)
    called = []

    def heads(p: torch.Tensor) -> torch.Tensor:
        called.append(p.shape)
        return p

    plain = indexer_kl(q, k, w, q, k, lse, bounds, 0.5, backend="torch")
    summed = indexer_kl(q, k, w, q, k, lse, bounds, 0.5, backend="torch", sum_heads=heads)
    assert torch.equal(plain[1], summed[1]) and called == [(3, 3)]
    with pytest.raises(ValueError, match="sum_heads is given with backend"):
        indexer_kl(q, k, w, q, k, lse, bounds, 0.5, backend="native", sum_heads=heads)
