"""A checkpoint checked layer by layer: right ones verify, a fault is named by its layer and stage, a walk goes on."""

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import reference
from harness.layerwise.calibrate import write_calibrated
from harness.layerwise.command import Request, size_of, verify_layers
from harness.layerwise.judge import STAGES
from harness.layerwise.layer import LayerFiles
from harness.layerwise.needs import needs_of, official_bytes
from harness.layerwise.progress import STATE_FILE
from harness.layerwise.tokens import tokens
from harness.text import standard_library, text_batch
from reference import DeepseekV32Config
from reports.records import RunWriter, Status, read_run
from reports.stages import first_beyond, stage_errors

ROOT = Path(__file__).parents[2]
SEED = 3
LAYERS = 3
# Layer 0 of `tiny` has a dense FFN.
EVERY = {(0, stage) for stage in STAGES if stage != "routing"} | {(i, stage) for i in (1, 2) for stage in STAGES}

# Subjects as a user would write them: the optimized model, wrong in the second layer it is built for.
FAULTY = """
import torch

from harness.subjects import load_weights
from optimized import DeepseekV32ForCausalLM

calls = 0


def factory(config, state_dict, *, device, dtype):
    global calls
    calls += 1
    state = dict(state_dict)
    if calls == 2:
        {fault}
    model = load_weights(DeepseekV32ForCausalLM, config, state, device, dtype)
    if calls == 2:
        {after}
    return model


factory.capabilities = frozenset({{"tape", "indexer-kl"}})
"""
LAYER = "model.layers.0"
FAULTS = {
    "interleaved RoPE in the indexer": ("config.indexer_rope_interleaved = True", {"index_scores", "selection"}),
    "another block's scale on o_proj": (f"state['{LAYER}.self_attn.o_proj.weight'] = state['{LAYER}.self_attn.o_proj.weight'] * 2", {"attention"}),
    "one expert at half size": (
        f"state['{LAYER}.mlp.experts.down_proj'] = state['{LAYER}.mlp.experts.down_proj'] * torch.tensor([1, 0.5] + [1] * 6, dtype=dtype)[:, None, None]",
        {"ffn", "output"},
    ),
    "no router bias": (f"state['{LAYER}.mlp.gate.e_score_correction_bias'] = torch.zeros(8)", {"routing"}),
    "a factory that raises": ("raise RuntimeError('no kernel for this shape')", set(STAGES)),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Calibrated weights of `tiny` in the official FP8 layout, in several files."""
    directory = tmp_path_factory.mktemp("layerwise") / "checkpoint"
    write_calibrated(directory, DeepseekV32Config.preset("tiny"), SEED, shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


def walk(checkpoint: Path, out: Path, **asked) -> int:
    return verify_layers(Request(str(checkpoint), out=out, **asked), Console(quiet=True))


def answers(out: Path) -> dict[tuple[int, str], Status]:
    return {(v.data["layer"], v.check.removeprefix("layerwise.")): v.status for v in read_run(out).verdicts}


def faulty(folder: Path, fault: str = "pass", after: str = "pass") -> str:
    path = folder / "faulty.py"
    path.write_text(FAULTY.format(fault=fault, after=after))
    return f"{path}:factory"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_stage_of_every_layer_is_verified(dtype, checkpoint, tmp_path):
    assert walk(checkpoint, tmp_path, dtype=dtype) == 0
    run = read_run(tmp_path)
    assert answers(tmp_path) == dict.fromkeys(EVERY, Status.VERIFIED)
    assert all(verdict.nulls and all(null.rejected for null in verdict.nulls) for verdict in run.verdicts)
    assert run.header["claim"].startswith("optimized agrees with the reference in 3 of 3 layers")
    assert {(error.layer, error.stage) for error in stage_errors(run)} == {
        (layer, stage) for layer in range(LAYERS) for stage in ("index scores", "selection", "attention", "MoE")
    }


def test_the_hidden_states_and_the_loss_are_those_of_the_whole_model(checkpoint, tmp_path):
    walk(checkpoint, tmp_path, dtype="float32", batch=2)
    run = read_run(tmp_path)
    length = run.header["seq_len"]
    uniform = math.log(320)
    model = reference.DeepseekV32ForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    ids = text_batch(2, length, 0)
    with torch.no_grad():
        out = model(ids, labels=ids, output_hidden_states=True)
    (loss,) = [measurement.samples[0] for measurement in run.measurements if measurement.name == "lm loss"]
    assert loss == pytest.approx(float(out.lm_loss), rel=1e-4)
    assert loss > uniform
    seen = [event.data["hidden_rms"] for event in run.events if event.kind == "layer"]
    expected = [float(x.square().mean().sqrt()) for x in out.hidden_states[1:LAYERS]]
    assert seen[:-1] == pytest.approx(expected, rel=1e-4)


def test_trained_weights_are_verified_too_and_know_the_text(tmp_path):
    assert walk(ROOT / "harness" / "training" / "mini", tmp_path) == 0
    (loss,) = read_run(tmp_path).measurements
    assert loss.data["loss_means"]
    assert loss.data["uniform"] == pytest.approx(math.log(320))
    assert loss.samples[0] < 2


def test_transformers_own_model_is_walked_too_but_shows_no_scores(checkpoint, tmp_path):
    assert walk(checkpoint, tmp_path, subject="transformers", until=2) == 0
    found = answers(tmp_path)
    unseen = {place for place, status in found.items() if status is Status.NOT_APPLICABLE}
    assert unseen == {(0, "index_scores"), (1, "index_scores")}
    assert {status for place, status in found.items() if place not in unseen} == {Status.VERIFIED}


def test_a_subject_without_a_tape_is_refused(checkpoint, tmp_path, capsys):
    subject = faulty(tmp_path)
    path = tmp_path / "faulty.py"
    path.write_text(path.read_text().replace('{"tape", "indexer-kl"}', '{"padding"}'))
    assert walk(checkpoint, tmp_path / "out", subject=subject) == 2
    assert "does not declare tape" in capsys.readouterr().err


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_its_layer_and_stage_and_nothing_else_fails(fault, checkpoint, tmp_path):
    code, stages = FAULTS[fault]
    assert walk(checkpoint, tmp_path / "out", subject=faulty(tmp_path, code)) == 1
    found = answers(tmp_path / "out")
    assert {place for place, status in found.items() if status is Status.FAILED} == {(1, stage) for stage in stages}
    assert {status for place, status in found.items() if place[0] != 1} == {Status.VERIFIED}


def test_a_report_names_the_first_stage_that_is_wrong(checkpoint, tmp_path):
    walk(checkpoint, tmp_path / "out", subject=faulty(tmp_path, "config.indexer_rope_interleaved = True"))
    first = first_beyond(stage_errors(read_run(tmp_path / "out")))
    assert (first.layer, first.stage) == (1, "index scores")
    assert "--until 2" in next(v.reproduce for v in read_run(tmp_path / "out").verdicts if v.status is Status.FAILED)


def test_a_file_that_was_cut_is_refused_by_its_tensor(checkpoint, tmp_path, capsys):
    copy = copied(checkpoint, tmp_path)
    file = sorted(copy.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    assert walk(copy, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith("v32 verify: Checkpoint file")
    assert "is truncated: tensor" in said
    assert said.count("\n") == 1


def test_a_file_that_is_cut_during_the_walk_ends_it_and_what_was_done_stays(checkpoint, tmp_path, capsys):
    copy = copied(checkpoint, tmp_path)
    file = sorted(copy.glob("*.safetensors"))[-1]
    cut = faulty(tmp_path, f"open({str(file)!r}, 'r+b').truncate(100)")
    assert walk(copy, tmp_path / "out", subject=cut) == 2
    assert "has been cut since its header was read" in capsys.readouterr().err
    assert {layer for layer, _ in answers(tmp_path / "out")} == {0, 1}
    assert read_run(tmp_path / "out").footer["ended"] == "error"


def copied(checkpoint: Path, folder: Path) -> Path:
    copy = folder / "copy"
    copy.mkdir()
    for path in checkpoint.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_an_interrupted_walk_goes_on_and_gives_the_same_verdicts(checkpoint, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    right = faulty(tmp_path)
    assert walk(checkpoint, whole, subject=right) == 0
    interrupted = faulty(tmp_path, "raise KeyboardInterrupt")
    assert walk(checkpoint, cut, subject=interrupted) == 130
    assert read_run(cut).footer["ended"] == "interrupted"
    assert {layer for layer, _ in answers(cut)} == {0}
    assert right == faulty(tmp_path)
    assert walk(checkpoint, cut, subject=right, resume=True) == 0

    def told(out):
        return [(v.check, v.case, v.status, v.measures, v.nulls) for v in read_run(out).verdicts]

    assert told(cut) == told(whole)
    losses = [[m.samples for m in read_run(out).measurements] for out in (cut, whole)]
    assert losses[0] == losses[1]
    assert [event.data["layer"] for event in read_run(cut).events if event.kind == "layer"] == [0, 1, 2]


def test_a_walk_of_fewer_layers_is_extended(checkpoint, tmp_path):
    assert walk(checkpoint, tmp_path, until=1) == 0
    assert {layer for layer, _ in answers(tmp_path)} == {0}
    assert not read_run(tmp_path).measurements
    assert walk(checkpoint, tmp_path, resume=True) == 0
    assert answers(tmp_path).keys() == EVERY


def test_a_walk_that_is_farther_keeps_its_layers(checkpoint, tmp_path, capsys):
    assert walk(checkpoint, tmp_path, until=2) == 0
    before = (tmp_path / "run.jsonl").read_bytes()
    assert walk(checkpoint, tmp_path, until=1, resume=True) == 2
    assert "--until is 1, but the walk in" in capsys.readouterr().err
    assert (tmp_path / "run.jsonl").read_bytes() == before
    assert walk(checkpoint, tmp_path, resume=True) == 0
    assert answers(tmp_path).keys() == EVERY


def test_the_record_of_another_command_is_not_gone_on_with(checkpoint, tmp_path, capsys):
    with RunWriter(tmp_path / "run.jsonl", {"subject": "optimized", "command": "v32 plan"}):
        pass
    before = (tmp_path / "run.jsonl").read_bytes()
    assert walk(checkpoint, tmp_path, until=1, resume=True) == 2
    assert "is of 'v32 plan', and not of a walk" in capsys.readouterr().err
    assert (tmp_path / "run.jsonl").read_bytes() == before


def test_a_walk_that_was_cut_before_its_first_layer_begins_again(checkpoint, tmp_path):
    assert walk(checkpoint, tmp_path, until=1) == 0
    (tmp_path / STATE_FILE).unlink()
    assert walk(checkpoint, tmp_path, until=1, resume=True) == 0
    (tmp_path / STATE_FILE).unlink()
    (tmp_path / "run.jsonl").write_text("")
    assert walk(checkpoint, tmp_path, until=1, resume=True) == 0


def test_another_run_is_not_gone_on_with(checkpoint, tmp_path, capsys):
    walk(checkpoint, tmp_path, until=1)
    assert walk(checkpoint, tmp_path, until=1) == 2
    assert "add --resume" in capsys.readouterr().err
    assert walk(checkpoint, tmp_path, until=1, resume=True, seed=1) == 2
    assert "has seed 0, and this one 1" in capsys.readouterr().err
    state = (tmp_path / STATE_FILE).read_bytes()
    (tmp_path / STATE_FILE).write_bytes(state[: len(state) // 2])
    assert walk(checkpoint, tmp_path, until=1, resume=True) == 2
    assert "cannot be read as the state of a walk" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"dtype": "float16"}, "--dtype is 'float16'"),
        ({"until": 4}, "--until is 4; it must be 1 … 3"),
        ({"until": 0}, "--until is 0"),
        ({"seq_len": 4}, "--seq-len is 4"),
        ({"seq_len": 10**7}, "--seq-len is 10000000; the model has positions for 163840 tokens"),
        ({"batch": 0}, "--batch is 0"),
        ({"revision": "main"}, "is a folder, which has no revisions"),
        ({"backend": "fast"}, "fast"),
    ],
)
def test_wrong_use_is_refused_in_one_sentence(asked, said, checkpoint, tmp_path, capsys):
    assert walk(checkpoint, tmp_path / "out", **asked) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_row_that_sees_no_more_than_k_keys_proves_nothing(checkpoint, tmp_path):
    assert walk(checkpoint, tmp_path, seq_len=16, until=1) == 1
    (selection,) = [v for v in read_run(tmp_path).verdicts if v.check == "layerwise.selection"]
    assert selection.status is Status.VACUOUS
    assert "choose a larger --seq-len" in selection.reason


def test_disk_is_counted_as_it_is_written(checkpoint):
    config = DeepseekV32Config.preset("tiny")
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert official_bytes(config, next_token_layer=False) == index["metadata"]["total_size"]
    files = LayerFiles(checkpoint, torch.bfloat16, torch.device("cpu"))
    assert files.stored_bytes() == index["metadata"]["total_size"]


def test_the_published_checkpoint_fits_one_gpu_of_80_gb():
    config = DeepseekV32Config.preset("v32")
    total = official_bytes(config, next_token_layer=True)
    # 671 billion parameters, a layer of 14 billion behind them, and scales.
    assert 685e9 < total < 695e9
    batch, length, layers = size_of(Request("any"), config)
    needs = needs_of(config, torch.bfloat16, "cuda", batch, length, layers, disk_bytes=total, read_bytes=total)
    assert (batch, layers) == (1, 61)
    assert length > config.index_topk
    # Two copies of 11.5 billion parameters are 46 GB.
    assert 46e9 < needs.device_bytes < 75e9
    assert needs.host_bytes < 8e9
    assert "689 GB of disk" in needs.sentence()


def test_text_is_made_of_the_checkpoints_own_tokens(checkpoint, tmp_path):
    copy = copied(checkpoint, tmp_path)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.train_from_iterator(["import this, and that " * 50], trainers.BpeTrainer(vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    made.save(str(copy / "tokenizer.json"))
    config = reference.checkpoint.read_config(copy)
    ids, said = tokens(copy, config, 2, 40, 0)
    assert ids.shape == (2, 40)
    assert ids[:, 0].tolist() == [config.bos_token_id] * 2
    assert said["tokens"] == "tokenizer.json"
    assert said["loss_means"]
    with pytest.raises(ValueError, match="it belongs to another model"):
        tokens(copy, DeepseekV32Config.preset("tiny", vocab_size=40, bos_token_id=0, pad_token_id=None), 2, 40, 0)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        tokens(copy, config, 2, 40, 0)


def test_bytes_in_a_larger_vocabulary_make_no_loss_that_means_something(checkpoint):
    _, of_bytes = tokens(checkpoint, DeepseekV32Config.preset("tiny"), 1, 20, 0)
    _, of_v32 = tokens(checkpoint, DeepseekV32Config.preset("v32"), 1, 20, 0)
    assert (of_bytes["loss_means"], of_v32["loss_means"]) == (True, False)
    assert "tokenizer.json" in of_v32["tokens"]


def test_a_row_is_shorter_than_the_text():
    whole = len(standard_library().data)
    assert text_batch(1, whole - 1, 0).shape == (1, whole - 1)
    with pytest.raises(ValueError, match=f"length is {whole}; the text has {whole} bytes"):
        text_batch(1, whole, 0)
