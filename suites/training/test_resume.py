"""Exact resume: killed anywhere, a run goes on with the same bits; a state that is damaged or foreign is refused."""

import json
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.training import state as state_module
from harness.training.audit import digests
from harness.training.loop import train
from harness.training.state import FACTS, FOLDER, TENSORS, StateError, states
from optimized import DeepseekV32ForCausalLM
from reference import DeepseekV32ForCausalLM as ReferenceForCausalLM
from suites.training.runs import Killed, Listening, killed_after, losses, mixture, model_for, run, short

STEPS, EVERY = 6, 2


def settings(out, **more):
    return {"out": out, "save_every": EVERY, "stop_early": False, "measure_every": 2, **more}


def interrupted(stage, out, after, model_class=DeepseekV32ForCausalLM, dtype=torch.float32, lora=None):
    """Killed when step `after` is done, then gone on with by a new process's model; the steps that counted."""
    first = killed_after(after)
    with pytest.raises(Killed):
        run(model_for(model_class, dtype, lora), stage, **settings(out, listener=first))
    model = model_for(model_class, dtype, lora)
    second = Listening()
    run(model, stage, **settings(out, resume=True, listener=second))
    return first, second, model


def whole(stage, model_class=DeepseekV32ForCausalLM, dtype=torch.float32, lora=None):
    model = model_for(model_class, dtype, lora)
    return losses(run(model, stage, **settings(None)).steps), digests(model)


@pytest.mark.parametrize(
    ("name", "moments"), [("dense", (0, 2, 3, STEPS - 1)), ("warmup", (3,)), ("sparse", (4,)), ("sft", (3,))]
)
def test_a_killed_run_goes_on_with_the_same_bits(name, moments, tmp_path):
    stage = short(name, steps=STEPS, ramp=3)
    curve, weights = whole(stage)
    for after in moments:
        first, second, model = interrupted(stage, tmp_path / str(after), after)
        # In the last step the state is written when the step is done, and the process dies before.
        assert second.first == (after // EVERY) * EVERY
        assert losses(first.steps) == curve[: after + 1]
        assert losses(second.steps) == curve[second.first :]
        assert digests(model) == weights


@pytest.mark.parametrize(
    ("name", "model_class", "dtype", "lora"),
    [
        ("sparse", ReferenceForCausalLM, torch.float32, False),
        ("sparse", DeepseekV32ForCausalLM, torch.bfloat16, False),
        ("sparse", DeepseekV32ForCausalLM, torch.float32, True),
        ("warmup", DeepseekV32ForCausalLM, torch.float32, True),
    ],
    ids=["reference", "bf16", "lora", "lora warm-up"],
)
def test_so_does_any_model_that_trains(name, model_class, dtype, lora, tmp_path):
    stage = short(name, steps=4, ramp=2)
    adapters = stage if lora else None
    curve, weights = whole(stage, model_class, dtype, adapters)
    _, second, model = interrupted(stage, tmp_path, 2, model_class, dtype, adapters)
    assert losses(second.steps) == curve[second.first :]
    assert second.first == 2
    assert digests(model) == weights


@pytest.mark.parametrize("lost", ["optimizer.0.", "optimizer.1.exp_avg_sq", "model."])
def test_a_state_without_one_of_its_parts_would_show(lost, tmp_path, monkeypatch):
    stage = short("dense", steps=STEPS)
    curve, _ = whole(stage)
    keep = state_module._tensors

    def forget(model, optimizers):
        found = keep(model, optimizers)
        return {n: torch.zeros_like(t) if n.startswith(lost) else t for n, t in found.items()}

    monkeypatch.setattr(state_module, "_tensors", forget)
    _, second, _ = interrupted(stage, tmp_path, 3)
    assert losses(second.steps) != curve[second.first :]


def test_random_numbers_go_on_where_they_were(tmp_path):
    stage = short("dense", steps=4)
    drawn = []

    def draw(values):
        drawn.append(float(torch.rand(())))
        if values["step"] == 2:
            raise Killed

    with pytest.raises(Killed):
        run(model_for(DeepseekV32ForCausalLM), stage, **settings(tmp_path, listener=Listening(draw)))
    again = []
    torch.manual_seed(99)
    run(model_for(DeepseekV32ForCausalLM), stage,
        **settings(tmp_path, resume=True, listener=Listening(lambda values: again.append(float(torch.rand(()))))))  # fmt: skip
    assert again[0] == drawn[2]


@pytest.mark.parametrize(
    ("saved", "gpus", "device", "said"),
    [
        (1, 2, "cuda:1", "of GPU 1,"), (0, 2, "cuda:0", "of GPU 0, 1,"), (2, 2, "cuda:0", None), (2, 1, "cuda:0", None),
        (0, 1, "cpu", None), (1, 0, "cpu", None),
    ],
)  # fmt: skip
def test_generators_that_a_state_does_not_know_are_left_and_named(saved, gpus, device, said, monkeypatch):
    given = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, i: given.update({i: state}))
    state = torch.get_rng_state()
    random = {"cpu": state, **{f"cuda{i}": state + i for i in range(saved)}}
    notes = state_module._restore_random(Path("runs/x/state/step-00000002"), random, torch.device(device))
    assert {i: bool((held == state + i).all()) for i, held in given.items()} == dict.fromkeys(
        range(min(saved, gpus)), True
    )
    assert len(notes) == (said is not None)
    if said is not None:
        assert said in notes[0] and notes[0].endswith("but not bit for bit.")


def test_what_a_state_lacks_is_told_to_the_listener(tmp_path, monkeypatch):
    stopped(tmp_path)
    monkeypatch.setattr(state_module, "_restore_random", lambda *_: ["A sentence."])
    listener = Listening()
    going_on(tmp_path, listener=listener)
    assert listener.notes == ["A sentence."]


def test_a_finished_stage_that_is_resumed_trains_no_further(tmp_path):
    stage = short("warmup", steps=4)
    model = model_for(DeepseekV32ForCausalLM)
    done = run(model, stage, **settings(tmp_path))
    again = model_for(DeepseekV32ForCausalLM)
    found = run(again, stage, **settings(tmp_path, resume=True))
    assert found.steps == ()
    assert digests(again) == digests(model)
    assert [(v.check, v.status, v.data) for v in found.verdicts[2:]] == [
        (v.check, v.status, v.data) for v in done.verdicts[2:]
    ]


def test_a_resume_without_a_state_starts_at_the_first_step(tmp_path):
    listener = Listening()
    run(
        model_for(DeepseekV32ForCausalLM), short("dense", steps=2), **settings(tmp_path, resume=True, listener=listener)
    )
    assert listener.first == 0


def test_the_last_two_states_are_kept_as_safetensors_and_json(tmp_path):
    run(model_for(DeepseekV32ForCausalLM), short("dense", steps=7), **settings(tmp_path))
    assert [step for step, _ in states(tmp_path)] == [6, 7]
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {TENSORS, FACTS}


def stopped(tmp_path, **changes):
    """A run with states after 2 and 4 steps."""
    with pytest.raises(Killed):
        run(model_for(DeepseekV32ForCausalLM), short("dense", steps=STEPS, **changes),
            **settings(tmp_path, listener=killed_after(4)))  # fmt: skip
    return states(tmp_path)[-1][1]


def going_on(tmp_path, stage=None, **more):
    return run(
        model_for(DeepseekV32ForCausalLM),
        stage or short("dense", steps=STEPS),
        **settings(tmp_path, resume=True, **more),
    )


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(bytes(content))


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: cut(p / TENSORS), f"{TENSORS} does not have the bytes that {FACTS} names"),
        (lambda p: flip(p / TENSORS), f"{TENSORS} does not have the bytes that {FACTS} names"),
        (lambda p: (p / TENSORS).unlink(), f"{TENSORS} cannot be read"),
        (lambda p: (p / FACTS).unlink(), f"{FACTS} cannot be read as JSON"),
        (lambda p: cut(p / FACTS), f"{FACTS} cannot be read as JSON"),
        (lambda p: (p / FACTS).write_text("[]"), "is not of version 1"),
        (lambda p: rewrite(p / FACTS, version=2), "is not of version 1"),
        (lambda p: rewrite(p / FACTS, step=3), "does not have the content that its own digest names"),
        (lambda p: rewrite(p / FACTS, extra={}), "does not have the content that its own digest names"),
        (lambda p: p.rename(p.with_name("step-00000005")), f"{FACTS} says step 4"),
    ],
    ids=["cut", "bit", "no tensors", "no facts", "cut facts", "no object", "version", "step", "extra", "renamed"],
)
def test_a_damaged_state_is_refused_in_one_sentence(damage, said, tmp_path):
    damage(stopped(tmp_path))
    with pytest.raises(StateError) as refused:
        going_on(tmp_path)
    sentence = str(refused.value)
    assert said in sentence
    assert sentence.startswith(f"State {tmp_path}") and sentence.count("\n") == 0
    assert sentence.endswith("remove that folder to go on from step 2.")


def test_what_the_sentence_asks_for_works(tmp_path):
    curve, _ = whole(short("dense", steps=STEPS))
    last = stopped(tmp_path)
    cut(last / TENSORS)
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    listener = Listening()
    going_on(tmp_path, listener=listener)
    assert losses(listener.steps) == curve[2:]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 1}, "seed was 0, and is 1 now"),
        ({"stage": short("dense", steps=STEPS + 1)}, "stage.phases was"),
        ({"stage": short("dense", steps=STEPS, lr=1e-4)}, f"stage.lr was {short('dense').lr}, and is 0.0001 now"),
        ({"stage": short("sft", steps=STEPS)}, "config.use_sparse_attention was false, and is true now"),
        ({"identity": {"dtype": "bfloat16"}}, 'dtype was null, and is "bfloat16" now'),
    ],
    ids=["seed", "steps", "rate", "stage", "dtype"],
)
def test_a_state_of_another_run_is_refused(other, said, tmp_path):
    stopped(tmp_path)
    with pytest.raises(StateError) as refused:
        going_on(tmp_path, **other)
    assert str(refused.value).startswith(f"State {tmp_path}")
    assert "is of another run: " in str(refused.value)
    assert said in str(refused.value)


def test_a_state_of_other_data_weights_or_config_is_refused(tmp_path):
    stopped(tmp_path)
    stage = short("dense", steps=STEPS)
    with pytest.raises(StateError, match="data.seed was 0, and is 5 now"):
        train(model_for(DeepseekV32ForCausalLM), stage, mixture(5), **settings(tmp_path, resume=True))
    moved = model_for(DeepseekV32ForCausalLM)
    moved.lm_head.weight.data[0, 0] += 1e-3
    with pytest.raises(StateError, match="weights at the start was"):
        run(moved, stage, **settings(tmp_path, resume=True))
    with pytest.raises(StateError, match="config.index_topk was 16, and is 8 now"):
        run(model_for(DeepseekV32ForCausalLM, index_topk=8), stage, **settings(tmp_path, resume=True))
    unbalanced = replace(stage, bias_rate=0.0)
    with pytest.raises(StateError, match="is of another run"):
        run(model_for(DeepseekV32ForCausalLM, lora_in=stage), unbalanced, **settings(tmp_path, resume=True))


def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path):
    path = stopped(tmp_path)
    tensors = load_file(path / TENSORS)
    for change, said in (
        (lambda t: t.pop("model.lm_head.weight"), "'lm_head.weight'"),
        (lambda t: t.update({"model.lm_head.weight": torch.zeros(2)}), "'lm_head.weight' is torch.float32 [2]"),
        (lambda t: t.update({"optimizer.0.momentum_buffer.nobody": torch.zeros(2)}), "'nobody'"),
    ):
        changed = dict(tensors)
        change(changed)
        save_file(changed, path / TENSORS)
        facts = json.loads((path / FACTS).read_text())
        facts.pop("sha256")
        facts["tensors_sha256"] = state_module._sha256(path / TENSORS)
        (path / FACTS).write_text(json.dumps({**facts, "sha256": state_module._checksum(facts)}))
        with pytest.raises(StateError) as refused:
            going_on(tmp_path)
        assert said in str(refused.value)


@pytest.mark.parametrize("moment", ["tensors", "facts", "rename", "clean"])
def test_a_kill_while_a_state_is_written_leaves_the_one_before(moment, tmp_path, monkeypatch):
    curve, _ = whole(short("dense", steps=STEPS))
    calls = []

    def dying(function, real):
        def call(*given, **more):
            calls.append(function)
            if len(calls) == 3:
                raise Killed
            return real(*given, **more)

        return call

    targets = {
        "tensors": (state_module, "_write_tensors"), "facts": (state_module, "_write"), "rename": (Path, "rename"),
        "clean": (state_module, "states"),
    }  # fmt: skip
    owner, name = targets[moment]
    # SIGKILL does not clean up either.
    monkeypatch.setattr(state_module.shutil, "rmtree", lambda *given, **more: None)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, dying(name, getattr(owner, name)))
        with pytest.raises(Killed):
            run(model_for(DeepseekV32ForCausalLM), short("dense", steps=STEPS), **settings(tmp_path))
    monkeypatch.undo()
    left = sorted(os.listdir(tmp_path / FOLDER))
    assert any(entry.startswith(".step-00000006.") for entry in left) == (moment != "clean")
    listener = Listening()
    going_on(tmp_path, listener=listener)
    assert losses(listener.steps) == curve[listener.first :]
    assert listener.first == (6 if moment == "clean" else 4)
    assert not any(entry.endswith(".tmp") for entry in os.listdir(tmp_path / FOLDER)) or moment == "clean"


def test_a_disk_that_takes_no_more_leaves_the_states_that_are_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    def fill(values):
        if values["step"] == 2:
            monkeypatch.setattr(state_module, "_write_tensors", full)

    with pytest.raises(OSError, match="No space left"):
        run(
            model_for(DeepseekV32ForCausalLM),
            short("dense", steps=STEPS),
            **settings(tmp_path, listener=Listening(fill)),
        )
    assert os.listdir(tmp_path / FOLDER) == ["step-00000002"]


def test_ties_are_saved_once(tmp_path):
    stage = short("dense", steps=2)
    model = model_for(DeepseekV32ForCausalLM)
    model.lm_head.weight = model.model.embed_tokens.weight
    run(model, stage, **settings(tmp_path))
    saved = load_file(states(tmp_path)[-1][1] / TENSORS)
    assert "model.lm_head.weight" not in saved and "model.model.embed_tokens.weight" in saved


def test_the_identity_holds_every_field_of_the_stage(tmp_path):
    stage = short("dense", steps=2)
    run(model_for(DeepseekV32ForCausalLM), stage, **settings(tmp_path))
    facts = json.loads((states(tmp_path)[-1][1] / FACTS).read_text())
    assert set(facts["identity"]["stage"]) == {field.name for field in fields(stage)}
