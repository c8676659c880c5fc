"""What a rollout chose, replayed in training: log-probabilities agree to the arithmetic, and a free run's do not.

A rollout computes token by token, from a cache, padded on the left, in another process and by either model; training
computes whole sequences, packed or padded on the right. Both round differently, and in bf16 that flips choices, each of
which is larger than all rounding. With the rollout's choices replayed, what is left is rounding: as much as the
reference's own in that precision (harness/budgets.py), measured from the reference in fp64 on the same choices.

Letters: B sequences, N tokens of a sequence.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from harness.budgets import budget
from harness.metrics import Errors, errors
from reference import Decisions, DeepseekV32ForCausalLM, LatentCache, LayerDecisions, attention
from reference.decisions import record_decisions
from reference.indexer import select_topk
from suites.support import MODELS, build, text

PAD = 258
PROMPTS = (40, 33, 26)
NEW = 24
ROOT = Path(__file__).parents[2]
both_packages = pytest.mark.parametrize("package", MODELS)


def prompts():
    """`[3, 40]` prompts of unequal length, padded on the left, and their mask."""
    ids, mask = torch.full((3, 40), PAD), torch.zeros(3, 40, dtype=torch.long)
    for row, n in enumerate(PROMPTS):
        ids[row, 40 - n :], mask[row, 40 - n :] = text(n, row)[0], 1
    return ids, mask


def log_probs(model, inputs, decisions):
    """Of every vocabulary entry behind every real token, `[tokens, W]` in fp64."""
    mask = inputs.get("attention_mask")
    with torch.no_grad():
        logits = model(**inputs, decisions=decisions, use_cache=False).logits
    found = logits.double().log_softmax(-1)
    return found.flatten(0, 1) if mask is None else found[mask.bool()]


def roll_out(package, dtype):
    """`generate` from padded prompts, NEW tokens each."""
    model = build(MODELS[package], dtype)
    ids, mask = prompts()
    with record_decisions(model) as recording:
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    sequences = out.sequences
    mask = torch.cat((mask, torch.ones(3, NEW, dtype=torch.long)), 1)
    inputs = {"input_ids": sequences[:, :-1], "attention_mask": mask[:, :-1]}
    return inputs, recording.decisions(sequences), torch.stack(out.logits, 1).double().log_softmax(-1)


def allowed_of(inputs, tape, dtype):
    """The exact log-probabilities on `tape`, and what `dtype` may be off."""
    exact = log_probs(build(DeepseekV32ForCausalLM), inputs, tape)
    own = errors(log_probs(build(DeepseekV32ForCausalLM, dtype), inputs, tape), exact)
    return exact, budget("logits", dtype, own, exact.numel())


def within(found, exact, allowed: Errors):
    return errors(found, exact).used(allowed) <= 1


def written(rows, inputs):
    """Of the log-probabilities of all real rows those that chose the NEW tokens, `[B, NEW, W]`."""
    counts = inputs["attention_mask"].sum(1).tolist()
    return torch.stack([part[-NEW:] for part in rows.split(counts)])


@pytest.fixture(scope="module")
def rollouts():
    torch.manual_seed(0)
    return {
        (package, dtype): roll_out(package, dtype) for package in MODELS for dtype in (torch.float32, torch.bfloat16)
    }


@both_packages
@pytest.mark.parametrize("trainer", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_replayed_choices_give_the_rollouts_log_probabilities(package, trainer, dtype, rollouts):
    inputs, tape, of_rollout = rollouts[package, dtype]
    exact, allowed = allowed_of(inputs, tape, dtype)
    of_training = log_probs(build(MODELS[trainer], dtype).train(), inputs, tape)
    assert within(of_training, exact, allowed)
    # The decode, from a cache, is judged by the same: so the two are as near to each other as either to the exact.
    assert within(of_rollout, written(exact, inputs), allowed)
    assert errors(written(of_training, inputs), of_rollout).used(allowed.plus(allowed)) <= 1


def other(package):
    return next(name for name in MODELS if name != package)


def shifted(tape):
    """The choices of the row before in each row."""

    def moved(x):
        return torch.cat((x[:, :1], x[:, :-1]), 1)

    return Decisions(tuple(layer.map(moved) for layer in tape))


def only(tape, kind):
    """The tape without its other kind of choice, which the model then makes."""
    return Decisions(tuple(LayerDecisions(**{kind: getattr(layer, kind)}) for layer in tape))


def keys_only_shifted(tape):
    """Keys of the row before, which may be fewer and are never later; experts as they were."""
    return Decisions(
        tuple(map(LayerDecisions, (d.topk_indices for d in shifted(tape)), (d.expert_indices for d in tape)))
    )


WRONG = {
    "free run": lambda tape: None,
    "own experts": lambda tape: only(tape, "topk_indices"),
    "own keys": lambda tape: only(tape, "expert_indices"),
    "keys shifted": keys_only_shifted,
}


@both_packages
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_other_choices_than_the_rollouts_do_not_pass(package, wrong, rollouts):
    # Where one engine wrote and another trains, in bf16, their own choices differ.
    inputs, tape, _ = rollouts[package, torch.bfloat16]
    exact, allowed = allowed_of(inputs, tape, torch.bfloat16)
    model = build(MODELS[other(package)], torch.bfloat16)
    # A left-padded row has no row before its first: it keeps its own choices.
    first = inputs["attention_mask"].cumsum(1) == 1
    if (changed := wrong(tape)) is not None:
        changed = Decisions(
            tuple(
                LayerDecisions(*(kept_at(first, new, old) for new, old in zip(fields(new), fields(old), strict=True)))
                for new, old in zip(changed, tape, strict=True)
            )
        )
    assert not within(log_probs(model, inputs, changed), exact, allowed)


def fields(layer):
    return layer.topk_indices, layer.expert_indices


def kept_at(rows_BL, new, old):
    return None if new is None else torch.where(rows_BL[..., None], old, new)


@both_packages
@pytest.mark.parametrize("shape", ["packed", "micro-batches", "right-padded"])
def test_a_tape_replays_in_the_shape_of_the_training_batch(package, shape, rollouts):
    inputs, tape, _ = rollouts[package, torch.bfloat16]
    exact, allowed = allowed_of(inputs, tape, torch.bfloat16)
    model, mask = build(MODELS[other(package)], torch.bfloat16), inputs["attention_mask"]
    if shape == "packed":
        real = mask.bool()
        batch = {"input_ids": inputs["input_ids"][real][None], "position_ids": (mask.cumsum(1) - 1)[real][None]}
        found = log_probs(model, batch, tape.packed(mask))
    elif shape == "micro-batches":
        parts = [({name: x[i : i + 1] for name, x in inputs.items()}, tape.batch(i, i + 1)) for i in range(3)]
        found = torch.cat([log_probs(model, *part) for part in parts])
    else:
        order = mask.sort(dim=1, descending=True, stable=True).indices
        batch = {name: x.gather(1, order) for name, x in inputs.items()}
        moved = Decisions(tuple(layer.map(lambda x: x.gather(1, order[..., None].expand_as(x))) for layer in tape))
        found = log_probs(model, batch, moved)
    assert within(found, exact, allowed)


ELSEWHERE = """
import torch
from safetensors.torch import save_file
from suites.training.test_rl_replay import roll_out

torch.manual_seed(11)
inputs, tape, log_probs = roll_out("optimized", torch.bfloat16)
tape.save("tape.safetensors")
save_file({**{n: x.contiguous() for n, x in inputs.items()}, "log_probs": log_probs}, "rollout.safetensors")
"""


def test_choices_recorded_in_another_process_replay_from_its_files(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, env=environment, check=True)
    tape, held = Decisions.load(tmp_path / "tape.safetensors"), load_file(tmp_path / "rollout.safetensors")
    of_rollout = held.pop("log_probs")
    exact, allowed = allowed_of(held, tape, torch.bfloat16)
    of_training = log_probs(build(MODELS["reference"], torch.bfloat16), held, tape)
    assert within(of_training, exact, allowed)
    assert errors(written(of_training, held), of_rollout).used(allowed.plus(allowed)) <= 1


@both_packages
def test_indices_of_another_engine_replay_as_plain_tensors(package, rollouts):
    inputs, tape, _ = rollouts[package, torch.bfloat16]

    def foreign(x):
        # As a kernel leaves them: best first, with room that is not used.
        order = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)).argsort(-1)
        return torch.nn.functional.pad(x.gather(-1, order), (3, 0), value=-1).long()

    topk = [foreign(layer.topk_indices) for layer in tape]
    experts = [None if d.expert_indices is None else d.expert_indices.flip(-1) for d in tape]
    plain = Decisions.from_indices(topk, experts)
    assert {x.dtype for layer in plain for x in fields(layer) if x is not None} == {torch.int32}
    model = build(MODELS[other(package)], torch.bfloat16)
    assert torch.equal(log_probs(model, inputs, plain), log_probs(model, inputs, tape))
    assert [d.expert_indices for d in Decisions.from_indices(topk)] == [None] * 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([torch.zeros(1, 2, 2)],), "topk_indices, layer 0 is torch.float32; it must be of an integer dtype"),
        (([None, None], [None, torch.zeros(1, 2, 2).bool()]), "expert_indices, layer 1 is torch.bool"),
        (([None], [None, None]), "topk_indices has 1 layers and expert_indices 2; the numbers must be equal"),
    ],
    ids=["float", "bool", "layers"],
)
def test_indices_that_are_none_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=f"^from_indices: {sentence}"):
        Decisions.from_indices(*arguments)


def of_decode(model):
    """Every tensor of the tape of a prefill and 8 steps."""
    ids, cache, tapes = text(48, 4), LatentCache(model.config), []
    with torch.no_grad():
        for part in ids.split([40, *[1] * 8], 1):
            tapes.append(model(part, past_key_values=cache, output_decisions=True).decisions)
    return [x for layer in Decisions.cat(tapes) for x in fields(layer) if x is not None]


@both_packages
@pytest.mark.parametrize("heads", [16, 4], ids=["few ties", "many ties"])
def test_twenty_runs_select_bitwise_the_same(package, heads):
    # With few heads many scores are exactly 0, and which of them are taken is by index alone.
    model = build(MODELS[package], torch.bfloat16, index_n_heads=heads)
    first = of_decode(model)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(of_decode(model), first, strict=True))


def test_a_choice_among_equals_that_is_drawn_would_be_seen(monkeypatch):
    def drawn(scores_BLS, visible_BLS, k):
        order = torch.randperm(scores_BLS.shape[-1])
        chosen = select_topk(scores_BLS[..., order], visible_BLS[..., order], k)
        slots = torch.where(chosen < 0, scores_BLS.shape[-1], order[chosen.clamp_min(0)])
        slots = slots.sort(-1).values
        return torch.where(slots == scores_BLS.shape[-1], -1, slots).int()

    monkeypatch.setattr(attention, "select_topk", drawn)
    model = build(DeepseekV32ForCausalLM, torch.bfloat16, index_n_heads=4)
    first = of_decode(model)
    assert any(not torch.equal(a, b) for _ in range(3) for a, b in zip(of_decode(model), first, strict=True))


def recorded(model, **settings):
    """Sequences and their tape."""
    with record_decisions(model) as recording:
        sequences = model.generate(**{"max_new_tokens": 8, "do_sample": False, **settings})
    return sequences, recording.decisions(sequences)


def own_tape(model, inputs):
    with torch.no_grad():
        return model(**inputs, output_decisions=True, use_cache=False).decisions


def assert_same_tape(a, b):
    for ours, theirs in zip((x for d in a for x in fields(d)), (x for d in b for x in fields(d)), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


GENERATING = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "several sequences a prompt": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


@both_packages
@pytest.mark.parametrize("how", GENERATING.values(), ids=GENERATING)
def test_a_recording_of_generate_is_the_tape_of_its_sequences(package, how):
    # In fp64, where a decode and a forward choose alike.
    model = build(MODELS[package])
    sequences, tape = recorded(model, input_ids=text(30), **how)
    assert sequences.shape == (how.get("num_return_sequences", 1), 38)
    assert_same_tape(tape, own_tape(model, {"input_ids": sequences[:, :-1]}))


@both_packages
def test_a_recording_of_padded_prompts_that_end_early_is_the_tape_of_its_real_rows(package):
    model = build(MODELS[package])
    ids, mask = prompts()
    # The token that the first sequence writes third ends it.
    ending = int(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)[0, -1])
    sequences, tape = recorded(model, input_ids=ids, attention_mask=mask, eos_token_id=ending, pad_token_id=PAD)
    assert sequences[0, 43:].tolist() == [PAD] * (sequences.shape[1] - 43)
    real = torch.cat((mask.bool(), sequences[:, 40:] != PAD), 1)[:, :-1]
    inputs = {"input_ids": sequences[:, :-1], "attention_mask": real.long()}
    assert_same_tape(tape.packed(real), own_tape(model, inputs).packed(real))


@both_packages
def test_a_model_under_adapters_is_recorded(package):
    model = get_peft_model(build(MODELS[package]), LoraConfig(r=4, target_modules=["q_b_proj", "indexer.wk"]))
    sequences, tape = recorded(model, input_ids=text(30))
    assert_same_tape(tape, own_tape(model, {"input_ids": sequences[:, :-1]}))


def test_after_a_recording_the_model_is_as_before():
    model = build(DeepseekV32ForCausalLM)
    with pytest.raises(RuntimeError, match="stop"), record_decisions(model):
        raise RuntimeError("stop")
    assert model(text(5)).decisions is None


def test_what_was_not_recorded_is_refused():
    model = build(DeepseekV32ForCausalLM)
    with record_decisions(model) as recording:
        sequences = model.generate(input_ids=text(30, batch=2), max_new_tokens=4, do_sample=False)
    other_sequences = sequences.clone()
    other_sequences[1, 31] = (other_sequences[1, 31] + 1) % 256
    for wrong, sentence in (
        (other_sequences, "the tokens recorded are not those of sequences"),
        (sequences[:1], "the tokens recorded are not those of sequences"),
        (torch.cat((sequences, sequences), 1), "33 tokens were recorded, but sequences of shape (2, 68) need 67"),
        (sequences[:, :1], "sequences of shape (2, 1) need 0, at least 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            recording.decisions(wrong)


def test_beams_that_were_moved_about_are_refused():
    model = build(DeepseekV32ForCausalLM)
    with pytest.raises(ValueError, match="record one generate\\(\\) at a time, without beam search"):
        recorded(model, input_ids=text(30), num_beams=4, num_return_sequences=4)


def test_a_forward_without_token_ids_cannot_be_recorded():
    model = build(DeepseekV32ForCausalLM)
    embedded = model.get_input_embeddings()(text(5))
    with record_decisions(model), pytest.raises(ValueError, match="record_decisions: a forward was given no input_ids"):
        model(inputs_embeds=embedded)


def test_a_module_that_makes_no_decisions_cannot_be_recorded():
    with (
        pytest.raises(ValueError, match="record_decisions: Linear holds no model whose forward"),
        record_decisions(torch.nn.Linear(2, 2)),
    ):
        pass
