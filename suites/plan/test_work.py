"""Operations are those that `v32 bench` counts; what is sent follows from the layout; layouts are all there are."""

from dataclasses import replace
from math import prod

import pytest

from harness.bench.flops import model_flop
from harness.bench.point import TRAINING, WARM_UP
from harness.plan.hardware import GPUS, Cluster
from harness.plan.layouts import every_layout, ranked
from harness.plan.step import Step
from harness.plan.work import kl_flop, work
from optimized.distributed.layout import ParallelLayout
from reference import DeepseekV32Config

ONE, MANY = Cluster.parse("1xH200"), Cluster.parse("64xH200")
LENGTHS = (1024, 4096, 32768)


def flop(step, *without):
    return sum(value for part, value in work(step, ONE).flop.items() if part not in without)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("preset", ["bench", "v32"])
def test_the_sums_are_those_of_the_benchmark(preset, length):
    config = DeepseekV32Config.preset(preset)
    dense = Step(config, length, 2, False, "model", backend="triton")
    assert flop(dense) == pytest.approx(model_flop(config, TRAINING, length, 2, dense=True), rel=1e-9)
    warm_up = Step(config, length, 2, False, "indexer", backend="triton")
    assert flop(warm_up, "head") == pytest.approx(model_flop(config, WARM_UP, length, 2, dense=True), rel=1e-9)
    sparse = Step(config, length, 2, True, "model", backend="triton")
    if sparse.path == "gathered" and length > config.index_topk:
        assert flop(sparse) == pytest.approx(model_flop(config, TRAINING, length, 2, dense=False), rel=1e-9)


def test_the_dense_kl_grows_as_the_square_of_the_length_and_the_selected_one_does_not():
    config = DeepseekV32Config.preset("v32")

    def grows(dense):
        short, long = (Step(config, n, 1, not dense, "indexer", backend="triton") for n in (65536, 131072))
        return kl_flop(long, dense=dense) / kl_flop(short, dense=dense)

    assert grows(True) == pytest.approx(4, rel=1e-3)
    assert 1.95 < grows(False) < 2.05
    step = Step(config, 131072, 1, False, "indexer", backend="triton")
    # Of the survey of kernels: per pair the target, H (N + R), and five products of the indexer's width.
    pairs = 131072 * 131073 / 2
    assert kl_flop(step, dense=True) == pytest.approx(61 * pairs * 2 * (128 * 192 + 5 * 64 * 128), rel=1e-9)


def test_checkpointing_computes_the_forward_twice_and_no_more():
    config = DeepseekV32Config.preset("v32")
    once = Step(config, 4096, 1, False, "model", backend="triton")
    twice = replace(once, checkpointing=True)
    assert flop(twice, "head") / flop(once, "head") == pytest.approx(4 / 3, rel=0.02)
    assert work(twice, ONE).flop["head"] == work(once, ONE).flop["head"]


@pytest.mark.parametrize("axis", ["dp", "cp", "ep", "tp"])
def test_each_axis_sends_its_own_and_divides_the_work(axis):
    config = DeepseekV32Config.preset("v32")
    alone = Step(config, 65536, 1, True, "all", "bfloat16", True, "triton")
    many = replace(alone, layout=ParallelLayout(**{axis: 8}))
    eight = Cluster.parse("8xH200")
    sent = work(many, eight).sent
    assert sum(work(alone, ONE).sent.values()) == 0
    own = {
        "dp": (),
        "cp": ("latents (cp)",),
        "ep": ("pairs of tokens and experts (ep)",),
        "tp": ("sums over heads and columns (tp)",),
    }
    assert set(sent) == {*own[axis], *(() if axis == "tp" else ("weights and gradients (FSDP)",))}
    before, after = work(alone, ONE).flop, work(many, eight).flop
    shares = {part: after[part] / before[part] for part in before}
    if axis != "tp":
        expected = 1 if axis in ("dp", "ep") else 1 / 8
        assert all(share == pytest.approx(expected, rel=1e-6) for share in shares.values())
    else:
        # The indexer, the gate, latents and the head are computed by every rank of tp.
        assert shares["attention"] == shares["dense FFN"] == 1 / 8
        assert shares["index scores and selection"] == shares["head"] == 1
        assert 1 / 8 < shares["KL of the indexer"] < 1


def test_a_group_that_leaves_its_node_is_bound_by_the_network():
    config = DeepseekV32Config.preset("v32")
    step = Step(config, 65536, 1, True, "all", "bfloat16", True, "triton")
    inside = work(replace(step, layout=ParallelLayout(ep=8)), Cluster.parse("8xH200"))
    across = work(replace(step, layout=ParallelLayout(ep=16)), Cluster.parse("16xH200"))
    assert across.seconds["communication"] > 5 * inside.seconds["communication"]


@pytest.mark.parametrize("world", [1, 2, 12, 64])
def test_layouts_are_all_there_are_once(world):
    found = list(every_layout(world))
    assert len(set(found)) == len(found)
    assert all(layout.world == world for layout in found)
    expected = sum(
        prod((a, b, c, d)) == world
        for a in range(1, world + 1) if world % a == 0
        for b in range(1, world // a + 1)
        for c in range(1, world // a // b + 1)
        for d in (world // a // b // c,)
    )  # fmt: skip
    assert len(found) == expected


def test_what_fits_comes_first_and_faster_first_and_the_rest_says_why():
    step = Step(DeepseekV32Config.preset("v32"), 131072, 1, False, "indexer", "bfloat16", False, "triton", on_gpu=True)
    found = ranked(step, MANY, 0.1)
    fit = [one for one in found if not one.why]
    assert fit
    assert found[: len(fit)] == fit
    speeds = [one.tokens_a_second for one in fit]
    assert speeds == sorted(speeds, reverse=True)
    room = GPUS["H200"].memory * 0.9
    for one in found[len(fit) :]:
        assert one.why.endswith(".")
        assert one.memory is None or one.memory.total > room
    assert all(one.memory.total <= room for one in fit)
