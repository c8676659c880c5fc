"""The numbers of `v32 bench`: what a worker measures, what a pass needs, how things grow, and which floors apply."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.bench import operators, subjects, worker
from harness.bench.command import Request, check_request
from harness.bench.fits import doublings, power_law
from harness.bench.flops import model_flop, operator_flop
from harness.bench.point import OPERATOR_PASSES, Point
from harness.bench.subjects import build
from harness.bench.targets import TARGETS, Target, applicable, floor_verdict, judge
from harness.bench.worker import Contestant, Garbage, Machine, checked
from harness.subjects import resolve_subject
from harness.text import text_batch
from reference import DeepseekV32Config
from reports.schema import Status

TINY = DeepseekV32Config.preset("tiny")
FWD = Point("optimized", "fwd", 48, 1, "float32", "cpu", 1, 0, json.loads(TINY.to_json_string(use_diff=False)))
MIB = 2**20
# Of each operator the pass that does most.
EACH_OPERATOR = [pass_ for pass_ in OPERATOR_PASSES if f"{pass_}+bwd" not in OPERATOR_PASSES]


def test_a_point_survives_its_line():
    assert Point.from_json(FWD.to_json()) == FWD
    assert FWD.model_config().to_dict() == TINY.to_dict()
    assert not replace(FWD, pass_="kl").model_config().use_sparse_attention


@pytest.mark.parametrize("pass_", ["fwd", "fwd+bwd", "kl"])
def test_a_contestant_runs_its_pass_and_leaves_no_gradients(pass_):
    held = Contestant(replace(FWD, pass_=pass_))
    first, second = held.run(), held.run()
    assert first["checksum"] == second["checksum"]
    assert held.ready["backend"] == held.held.model.backend == held.ready["implementations"]["operators"]
    assert all(held.ready["rejected"].values())
    assert all(p.grad is None for p in held.held.model.parameters())
    trained = {name for name, p in held.held.model.named_parameters() if p.requires_grad}
    assert all(".indexer." in name for name in trained) == (pass_ == "kl")
    assert held.held.model.training == (pass_ != "fwd")


@pytest.mark.parametrize("contestant", ["transformers", "dense-flash", "optimized:torch", "reference"])
def test_every_contestant_holds_the_same_weights_where_shapes_allow(contestant):
    ours, theirs = build(FWD).state_dict(), build(FWD.of(contestant)).state_dict()
    apart = {name for name, tensor in theirs.items() if not torch.equal(tensor, ours[name])}
    if contestant == "dense-flash":
        assert {name for name in ours if ".indexer." not in name} == set(theirs)
        assert {name.split(".", 3)[-1] for name in apart} == {"self_attn.kv_b_proj.weight", "self_attn.o_proj.weight"}
        assert all(theirs[name].shape != ours[name].shape for name in apart)
    else:
        assert set(theirs) == set(ours)
        assert apart == set()


def test_transformers_without_a_tape_computes_the_same_bits():
    plain = build(FWD.of("transformers"))
    taped = resolve_subject("transformers").build(TINY, build(FWD).state_dict(), torch.device("cpu"), torch.float32)
    ids = text_batch(1, 48, 0)
    with torch.no_grad():
        expected = taped.eval()(input_ids=ids, use_cache=False).logits
        assert torch.equal(plain(input_ids=ids, use_cache=False).logits, expected)


def test_dense_flash_without_its_kernel_is_refused(monkeypatch):
    Contestant(FWD.of("dense-flash"))
    # With values narrower than queries SDPA holds the scores of all heads.
    monkeypatch.setattr(subjects, "flash_config", lambda config: config)
    with pytest.raises(RuntimeError, match="dense-flash did not take a flash kernel"):
        Contestant(FWD.of("dense-flash"))


@pytest.mark.parametrize("spoilt", ["nan", "inf", "zeros"])
def test_a_pass_with_garbage_as_output_is_refused(spoilt):
    held = Contestant(replace(FWD, pass_="fwd"))
    with torch.no_grad():
        held.held.model.lm_head.weight.mul_(float(spoilt) if spoilt != "zeros" else 0.0)
    with pytest.raises(Garbage, match="must be finite and not all zero"):
        held.run()


def test_a_backward_that_reaches_nothing_is_refused():
    with pytest.raises(Garbage, match="gradients sum to 0"):
        checked({"loss": torch.ones(())}, [])
    with pytest.raises(Garbage, match="gradients sum to nan"):
        checked({"loss": torch.ones(())}, [torch.ones(2), torch.tensor([math.nan])])
    assert checked({"loss": torch.ones(())}, [torch.ones(2)]) == 3


@pytest.mark.parametrize("mib", [64, 256])
def test_memory_that_is_freed_inside_a_pass_is_seen(mib):
    held = Contestant(FWD)
    before = held.run()["peak_mib"]
    inner = held.held.run_step

    def wasteful(model, ids):
        torch.ones(mib * MIB // 4).sum()
        return inner(model, ids)

    held.held.run_step = wasteful
    # The allocator may take up to 8 MiB beside it, in a process that has run much else.
    assert mib - 1 <= held.run()["peak_mib"] <= before + mib + 8
    held.held.run_step = inner
    # The mark is reset: what an earlier pass took does not stay.
    assert held.run()["peak_mib"] < before + 8


def test_without_a_mark_that_can_be_reset_the_answer_says_so(monkeypatch):
    monkeypatch.setattr(worker.Resident, "_reset", staticmethod(lambda: False))
    held = Contestant(FWD)
    assert "upper bound" in held.ready["memory"]
    assert held.run()["peak_mib"] >= 0


def test_time_that_a_pass_waits_is_not_cpu_time():
    held = Contestant(FWD)
    inner = held.held.run_step

    def waiting(model, ids):
        worker.time.sleep(0.5)
        return inner(model, ids)

    held.held.run_step = waiting
    found = held.run()
    assert found["wall"] > 0.5 > found["seconds"]


@pytest.mark.parametrize("pass_", EACH_OPERATOR)
@pytest.mark.parametrize("contestant", ["optimized", "reference"])
def test_an_operator_runs_by_itself(pass_, contestant):
    held = Contestant(replace(FWD, contestant=contestant, pass_=pass_))
    # Plain backwards add in any order when torch has several threads.
    assert held.run()["checksum"] == pytest.approx(held.run()["checksum"], rel=1e-6)
    assert all(held.ready["rejected"].values())
    assert (held.held.gradients() is None) == (not pass_.endswith("+bwd"))


@pytest.mark.parametrize("pass_", EACH_OPERATOR)
def test_operators_of_two_contestants_get_the_same_inputs_and_give_the_same_output(pass_):
    ours, theirs = (Contestant(replace(FWD, contestant=name, pass_=pass_)).run() for name in ("optimized", "reference"))
    assert ours["checksum"] == pytest.approx(theirs["checksum"], rel=1e-5)
    other = Contestant(replace(FWD, contestant="reference", pass_=pass_, seed=1)).run()
    assert other["checksum"] != pytest.approx(theirs["checksum"], rel=1e-4)


def test_drawn_indices_are_of_visible_keys_distinct_and_ascending():
    drawn = operators.Inputs(TINY, replace(FWD, batch=2)).indices().long()
    rows = torch.arange(48)[:, None]
    assert (drawn <= rows).all()
    assert ((drawn >= 0).sum(-1) == (rows[:, 0] + 1).clamp(max=TINY.index_topk)).all()
    kept = drawn >= 0
    assert ((drawn[..., 1:] > drawn[..., :-1]) | ~kept[..., 1:]).all()
    assert drawn.shape == (2, 48, TINY.index_topk)


def test_operators_need_what_the_design_says_they_do():
    released = DeepseekV32Config.preset("v32")
    causal, selected = 8192 * 8193 / 2, 1.47e7
    for pass_, expected in (
        ("op:indexer_topk", 16384 * causal),
        ("op:sparse_mla", 278528 * selected),
        ("op:sparse_mla+bwd", (278528 + 704512) * selected),
        ("op:dense_mla", 81920 * causal),
        ("op:dense_mla+bwd", (81920 + 212992) * causal),
        ("op:indexer_kl+bwd", (49152 + 5 * 16384) * causal),
        ("op:indexer_kl_selected", (147456 + 16384) * selected),
    ):
        assert operator_flop(released, pass_, 8192, 1) == pytest.approx(expected, rel=0.01), pass_


def test_the_machine_multiplies_at_the_rate_of_its_faster_library():
    machine = Machine(FWD)
    rates = machine.run()
    assert 0.1 < rates["blas_gflops"] <= rates["gflops"] < 1e6
    assert rates["gflops"] == max(rates[name] for name in machine.ready["libraries"])


# Each product of a single token is needed whole, so torch's own counter counts what `model_flop` does.
@pytest.mark.parametrize("pass_", ["fwd", "fwd+bwd"])
def test_products_of_a_single_token_are_those_that_torch_counts(pass_):
    config = DeepseekV32Config.preset("tiny", index_topk=1)
    model = resolve_subject("reference").build(config, build(FWD).state_dict(), torch.device("cpu"), torch.float32)
    ids = torch.ones(1, 1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        out = model(input_ids=ids, use_cache=False)
        if pass_ == "fwd+bwd":
            out.logits.sum().backward()
    needed = model_flop(config, pass_, 1, 1, dense=False)
    assert needed == pytest.approx(counter.get_total_flops(), rel=0.03)
    # It would notice a layer that is left out.
    fewer = DeepseekV32Config.preset("tiny", index_topk=1, num_hidden_layers=2)
    assert model_flop(fewer, pass_, 1, 1, dense=False) < 0.9 * needed


def test_attention_needs_what_the_design_says_it_does():
    config = DeepseekV32Config.preset("bench")
    flop = partial(model_flop, config, length=8192, batch=1)
    one = DeepseekV32Config.preset("bench", index_topk=255)
    causal, selected = 8192 * 8193 / 2, 8192 * 256 - 256 * 255 / 2
    # 4 layers; scores of 4 heads x 32 on every causal pair, 8 heads x (80 + 64) on every selected one.
    attention = 4 * (causal * 256 + selected * 2 * 8 * (80 + 64))
    assert attention / 4 == pytest.approx(13.4e9, rel=0.02)
    linear = model_flop(config, "fwd", 1, 8192, dense=False) - 8192 * 4 * (256 + 2 * 8 * (80 + 64))
    assert flop(pass_="fwd", dense=False) == pytest.approx(linear + attention)
    assert flop(pass_="fwd", dense=False) - model_flop(one, "fwd", 8192, 1, dense=False) == pytest.approx(
        4 * (8192 - 255) * 2 * 8 * (80 + 64)
    )
    assert flop(pass_="kl", dense=False) == flop(pass_="kl", dense=True)


def test_an_exponent_is_recovered_and_a_bend_shows_in_the_residual():
    lengths = [512, 1024, 2048, 4096]
    fit = power_law({n: 3e-4 * n**1.5 for n in lengths})
    assert fit.exponent == pytest.approx(1.5)
    assert fit.factor == pytest.approx(3e-4)
    assert fit.residual < 1e-9
    bent = power_law({n: n + n * n / 1448 for n in lengths})
    assert 1 < bent.exponent < 2
    assert bent.residual > 0.05
    assert power_law({512: 1.0, 1024: 2.0}) is None
    assert power_law({512: 1.0, 1024: 0.0, 2048: 2.0}) is None


def test_doublings():
    assert doublings({64: 1.0, 128: 3.0, 512: 4.0, 1024: 10.0}) == {64: 3.0, 512: 2.5}
    assert doublings({64: 1.0, 128: 3.0, 512: 4.0, 1024: 10.0}, least=512) == {512: 2.5}
    assert doublings({64: 0.0, 128: 3.0, 300: 1.0}) == {}


def medians(time=1.0, peak=1.0, growth=2.0):
    """Of an optimized model that is `time` and `peak` times what the floors at L 2048 and 8192 just allow."""
    found = {}
    for pass_, (times, mib) in {"fwd": ((5, 12), 300), "fwd+bwd": ((3, 12), 1300)}.items():
        for length, times_faster in zip((2048, 8192), times, strict=True):
            found["transformers", pass_, length] = {"seconds": 60.0, "peak_mib": 5000.0}
            found["optimized", pass_, length] = {
                "seconds": time * 60.0 / times_faster,
                "peak_mib": peak * mib / growth ** (13 - int(math.log2(length))),
            }
        found["optimized", pass_, 4096] = {"seconds": 1.0, "peak_mib": peak * mib / growth}
    return found


def floors(**fields):
    given = {
        "config": "bench",
        "overrides": {},
        "batch": 1,
        "passes": ["fwd", "fwd+bwd"],
        "lengths": [2048, 4096, 8192],
    }
    return applicable(**{**given, "peers": ["transformers"], "plain": True, **fields})


def test_the_floors_of_a_request():
    claims = [target.claim for target in TARGETS]
    assert len(set(claims)) == len(claims) - 1, "two settings share the words of one floor"
    assert all(target.source for target in TARGETS)
    assert len(floors()) == 8
    assert len(floors(peers=["transformers", "dense-flash"])) == 10
    assert len(floors(peers=[])) == 4
    assert len(floors(passes=["fwd"])) == 4
    assert [t.limit for t in floors(lengths=[512])] == [1.5, 1.1]
    wide = {"index_n_heads": 64, "index_head_dim": 128}
    assert [t.kind for t in floors(overrides=wide, batch=2, lengths=[2048])] == ["faster", "share of peak"]
    assert [t.limit for t in floors(passes=["kl"], lengths=[32768])] == [2048]
    for other in ({"config": "tiny"}, {"plain": False}, {"batch": 2}, {"overrides": {"index_topk": 8}}):
        assert floors(**other) == []


@pytest.mark.parametrize(
    ("worse", "missed"),
    [
        ({}, set()),
        ({"time": 1.02}, {"faster"}),
        ({"peak": 1.02}, {"peak"}),
        ({"growth": 2.35}, {"peak per doubling"}),
    ],
)
def test_a_floor_is_failed_by_what_is_two_per_cent_beyond_it(worse, missed):
    found = medians(**{"time": 0.99, "peak": 0.99, **worse})
    verdicts = [floor_verdict(t, "optimized", found, "cpu", "again") for t in floors()]
    assert {t.kind for t, v in zip(floors(), verdicts, strict=True) if v.status is Status.FAILED} == missed
    assert {v.status for v in verdicts} <= {Status.FAILED, Status.VERIFIED}
    assert all(null.rejected for v in verdicts for null in v.nulls)


def test_a_share_of_the_peers_memory():
    target = Target("share of peak", "fwd", 0.05, 64, "transformers")
    values = {("transformers", "fwd", 64): {"seconds": 1.0, "peak_mib": 100.0}}
    for mib, met in ((4.9, True), (5.1, False)):
        values["optimized", "fwd", 64] = {"seconds": 1.0, "peak_mib": mib}
        assert judge(target, "optimized", values).met is met
    del values["transformers", "fwd", 64]
    assert judge(target, "optimized", values) is None
    assert floor_verdict(target, "optimized", values, "cpu", "").status is Status.SKIPPED


def test_the_commands_of_the_floors_get_all_of_them():
    lengths = "512,1024,2048,4096,8192"
    contest = check_request(Request(lengths=lengths, against="transformers,dense-flash", floors=True))
    assert len(contest.floors) == 12
    assert [contest.repeats(length) for length in contest.lengths] == [7, 7, 7, 3, 3]
    wide = ("index_n_heads=64", "index_head_dim=128")
    assert len(check_request(Request(lengths="2048", batch=2, overrides=wide, floors=True)).floors) == 2
    assert len(check_request(Request(lengths="32768", passes="kl", against="none", floors=True)).floors) == 1
    assert {target.claim for target in TARGETS} == {
        target.claim
        for request in (
            Request(lengths=lengths, against="transformers,dense-flash"),
            Request(lengths="2048", batch=2, overrides=wide),
            Request(lengths="32768", passes="kl", against="none"),
        )
        for target in check_request(request).floors
    }
    with pytest.raises(ValueError, match="--floors: no floor is on record"):
        check_request(Request(lengths="2048", batch=2, floors=True))


def test_a_command_repeats_a_part_of_itself():
    overrides = ("index_topk=8",)
    contest = check_request(Request(config="tiny", lengths="64,32", batch=2, overrides=overrides, backend="torch"))
    assert contest.contestants == ("optimized:torch", "transformers")
    assert [(p.pass_, p.length) for p, _ in contest.groups()] == [(p, n) for n in (32, 64) for p in ("fwd", "fwd+bwd")]
    assert contest.command("32", "fwd") == (
        "v32 bench --config tiny --lengths 32 --pass fwd --against transformers --backend torch --batch 2 "
        "--set index_topk=8"
    )
