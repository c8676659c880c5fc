"""`v32 train` as a user meets it: stages one after another, kills, wrong use, and what is left on disk."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from rich.console import Console

from harness.cli import main
from harness.training import command, loop, state
from harness.training.command import Request, job_for
from harness.training.stages import Phase, stage_for
from harness.verify import checkpoint_state
from optimized import DeepseekV32ForCausalLM
from reference import DeepseekV32Config
from reports.live import LiveTraining
from reports.markdown import markdown
from reports.records import RunWriter, read_run, run_exit_code
from reports.schema import Event, Run
from reports.training import training
from suites.support import assert_same, text

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--steps", "6", "--seq-len", "64", "--batch", "2", "--save-every", "2", "--measure-every", "2")


@pytest.fixture(autouse=True)
def _as_before():
    """The command silences transformers and takes one thread for its whole process, which is this one."""
    before, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def v32(*words):
    """The exit code of a command, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return ended.value.code


def trained(stage, out, *more):
    return v32("train", "--stage", stage, *SMALL, "--out", str(out), *more)


def steps_of(out):
    """(step, losses, norms) of the record, in its order."""
    return [
        (e.data["step"], e.data["lm_loss"], e.data["kl_loss"], e.data["gradient_norms"])
        for e in read_run(out).events
        if e.kind == "step"
    ]


def weights_of(out):
    return (Path(out) / "checkpoint" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The folder of a dense stage, long enough for a warm-up to have something to learn."""
    folder = tmp_path_factory.mktemp("runs")
    code = v32(
        "train", "--stage", "dense", "--steps", "60", "--seq-len", "64", "--batch", "4", "--out", str(folder / "dense")
    )
    assert code == 0
    return folder / "dense"


def test_a_stage_leaves_record_report_and_checkpoint(dense):
    run = read_run(dense)
    assert run.complete and run_exit_code(run) == 0
    assert [step for step, *_ in steps_of(dense)] == list(range(60))
    assert run.header["training"]["parameters"]["indexer"] == [83136, 0]
    report = (dense / "report.md").read_text()
    for words in ("Training, stage dense: 60 of 60 steps", "| LM loss |", "| gradient, attention |", "| memory, MiB |",
                  "### Parameters", "| indexer | 83,136 | 0 |", "### Tensors that moved", "gets gradient"):  # fmt: skip
        assert words in report, words
    config = DeepseekV32Config.from_pretrained(dense / "checkpoint")
    assert config.use_sparse_attention is False
    assert set(checkpoint_state(dense / "checkpoint")) == set(DeepseekV32ForCausalLM(config).state_dict())


def test_stages_follow_one_another(dense, here, capsys):
    assert v32("train", "--stage", "warmup", "--steps", "30", "--seq-len", "64", "--batch", "4", "--init", str(dense),
               "--measure-every", "10", "--out", "warmup") == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "83,136 of 331,632 parameters train: embedding 0/20,480 · attention 0/70,656 · indexer 83,136/83,136" in said
    assert "captured" in said and "step 30/30" in said and "Checkpoint: warmup/checkpoint" in said
    assert DeepseekV32Config.from_pretrained("warmup/checkpoint").use_sparse_attention is True
    before, after = (checkpoint_state(Path(folder) / "checkpoint") for folder in (dense, "warmup"))
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n in before if ".indexer." in n}
    assert trained("sparse", "sparse", "--init", "warmup") == 0
    assert trained("sft", "sft", "--init", "sparse/checkpoint") == 0
    assert trained("sft", "sft-dense", "--init", "sparse", "--attention", "dense") == 0
    assert DeepseekV32Config.from_pretrained("sft/checkpoint").use_sparse_attention is True
    assert DeepseekV32Config.from_pretrained("sft-dense/checkpoint").use_sparse_attention is False
    checks = {v.check for v in read_run("sparse").verdicts}
    assert {"train.captured", "train.selection", "train.audit", "train.gradients", "train.losses"} == checks
    assert v32("verify", "--checkpoint", "sft/checkpoint", "--checks", "finite", "--cases", "text", "--dtype", "float32",
               "--out", "verified") == 0  # fmt: skip


def test_adapters_are_saved_by_themselves_and_merged(dense, here):
    assert trained("sft", "lora", "--init", str(dense), "--lora", "attention,experts", "--rank", "4") == 0
    base = DeepseekV32ForCausalLM.from_pretrained(dense / "checkpoint")
    merged = DeepseekV32ForCausalLM.from_pretrained("lora/checkpoint")
    base.config.use_sparse_attention = True
    adapted = PeftModel.from_pretrained(base, "lora/adapter").eval()
    plain = DeepseekV32ForCausalLM.from_pretrained(dense / "checkpoint").eval()
    ids = text(14)
    assert_same(adapted(input_ids=ids).logits, merged.eval()(ids).logits, 1e-5)
    assert (plain(ids).logits - merged(ids).logits).abs().max() > 1e-3
    run = read_run("lora")
    assert run.header["training"]["lora"] == ["attention", "experts"]
    assert {row["group"]: row["moved"] for row in run.verdicts[2].data["audit"]["rows"]}["attention"] == "0"


def test_a_warm_up_of_a_random_model_is_allowed_but_said_and_fails(here, capsys):
    assert trained("warmup", "out") == 1
    said = capsys.readouterr()
    assert "No --init: stage warmup starts from random weights" in said.out
    assert "v32 train: train.captured: the indexer tells no more than a uniform guess" in said.err
    assert "The stage failed: no checkpoint was saved." in said.out
    assert not Path("out/checkpoint").exists()


def interrupting(monkeypatch, step, error=KeyboardInterrupt):
    """Have the run end when `step` is about to begin."""
    own = loop._step

    def stop(run, at):
        if at == step:
            raise error
        return own(run, at)

    monkeypatch.setattr(loop, "_step", stop)


def test_ctrl_c_keeps_the_last_state_and_says_how_to_go_on(here, monkeypatch, capsys):
    assert trained("dense", "whole") == 0
    with monkeypatch.context() as patched:
        interrupting(patched, 3)
        assert trained("dense", "out", "--seed", "0") == 130
    said = capsys.readouterr().out
    asked = next(line for line in said.splitlines() if line.startswith("Interrupted."))
    assert asked.startswith(
        "Interrupted. The state after 2 steps is kept; go on with: v32 train --stage dense --steps 6 "
    )
    assert asked.endswith("--resume --out out")
    assert "run did not end: interrupted" in said
    assert v32(*asked.partition(": v32 ")[2].split()) == 0
    assert steps_of("out") == steps_of("whole")
    assert weights_of("out") == weights_of("whole")
    run = read_run("out")
    assert run.complete
    assert [e.data["step"] for e in run.events if e.kind == "started"] == [0, 2]
    assert "resumed after 2" in (Path("out") / "report.md").read_text()


def test_what_was_done_beyond_the_state_is_recorded_once(here, monkeypatch):
    assert trained("dense", "whole") == 0
    for at in (1, 5, 5):
        with monkeypatch.context() as patched:
            interrupting(patched, at)
            assert trained("dense", "out", "--resume") == 130
        # A killed process also leaves half a line.
        with open("out/run.jsonl", "ab") as file:
            file.write(b'{"record":"event","kind":"st')
    assert trained("dense", "out", "--resume") == 0
    assert steps_of("out") == steps_of("whole")


def test_a_kill_while_the_record_is_taken_over_loses_nothing(here, monkeypatch):
    assert trained("dense", "whole") == 0
    with monkeypatch.context() as patched:
        interrupting(patched, 5)
        assert trained("dense", "out") == 130

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("harness.training.record.os.replace", die)
        with pytest.raises(Killed):
            main(["train", "--stage", "dense", *SMALL, "--out", "out", "--resume"])
    assert trained("dense", "out", "--resume") == 0
    assert steps_of("out") == steps_of("whole")


def test_a_record_that_lacks_a_step_is_refused(here, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        interrupting(patched, 3)
        assert trained("dense", "out") == 130
    lines = Path("out/run.jsonl").read_text().splitlines(keepends=True)
    Path("out/run.jsonl").write_text("".join(line for line in lines if '"step":1,' not in line))
    capsys.readouterr()
    assert trained("dense", "out", "--resume") == 2
    assert "out/run.jsonl lacks step 1, which the state has done" in capsys.readouterr().err


def test_a_finished_stage_that_is_resumed_says_the_same(here):
    assert trained("dense", "out") == 0
    before = weights_of("out"), steps_of("out")
    # Killed between the last state and the checkpoint.
    shutil.rmtree("out/checkpoint")
    assert trained("dense", "out", "--resume") == 0
    assert (weights_of("out"), steps_of("out")) == before


def test_a_run_is_not_overwritten(here, capsys):
    assert trained("dense", "out") == 0
    before = weights_of("out")
    capsys.readouterr()
    assert trained("dense", "out", "--seed", "5") == 2
    said = capsys.readouterr()
    assert said.err == (
        "v32 train: --out is 'out', which holds a run that has done 6 steps; add --resume to go on with it, or name another "
        "folder.\n"
    )
    assert weights_of("out") == before


def test_the_record_of_another_command_is_not_gone_on_with(here, capsys):
    with RunWriter(Path("out/run.jsonl"), {"subject": "optimized", "command": "v32 plan"}):
        pass
    before = Path("out/run.jsonl").read_bytes()
    assert trained("dense", "out", "--resume") == 2
    assert "out/run.jsonl is of 'v32 plan', and not of a training" in capsys.readouterr().err
    assert Path("out/run.jsonl").read_bytes() == before


def test_a_training_that_was_cut_before_its_first_state_begins_again(here):
    assert trained("dense", "out") == 0
    shutil.rmtree("out/state")
    assert trained("dense", "out", "--resume") == 0
    assert len(steps_of("out")) == 6


def test_a_state_of_another_run_ends_with_one_sentence(here, capsys):
    assert trained("dense", "out") == 0
    record = (here / "out" / "run.jsonl").read_bytes()
    capsys.readouterr()
    assert trained("dense", "out", "--resume", "--seed", "5") == 2
    said = capsys.readouterr().err
    assert said.startswith("v32 train: State out/state/step-00000006 is of another run: ")
    assert said.count("\n") == 1
    assert (here / "out" / "run.jsonl").read_bytes() == record


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--stage", "cold"], "--stage is 'cold'; allowed are dense, warmup, sparse, sft"),
        ([], "--stage"),
        (["--stage", "dense", "--config", "huge"], "'huge'; available: tiny"),
        (
            ["--stage", "dense", "--model", "transformers"],
            "--model is 'transformers'; allowed are optimized, reference",
        ),
        (["--stage", "dense", "--dtype", "float16"], "--dtype is 'float16'; allowed are float32, bfloat16"),
        (["--stage", "dense", "--device", "tpu"], "--device is 'tpu'"),
        (["--stage", "dense", "--steps", "0"], "--steps is 0; it must be 1 or more"),
        (["--stage", "dense", "--seq-len", "16"], "--seq-len is 16; it must be 32 or more"),
        (["--stage", "dense", "--batch", "0"], "--batch is 0"),
        (["--stage", "dense", "--lr", "0"], "--lr is 0.0; it must be a finite number above 0"),
        (["--stage", "dense", "--lr", "nan"], "--lr is nan"),
        (["--stage", "dense", "--lr-indexer", "1"], "stage dense does not train the indexer"),
        (["--stage", "warmup", "--lr-matrices", "1"], "stage warmup trains the indexer alone"),
        (["--stage", "dense", "--seed", "-1"], "--seed is -1"),
        (["--stage", "dense", "--save-every", "0"], "--save-every is 0"),
        (["--stage", "dense", "--measure-every", "0"], "--measure-every is 0"),
        (
            ["--stage", "dense", "--lora", "indexer"],
            "'indexer'; stage dense does not train it; allowed here are attention",
        ),
        (["--stage", "warmup", "--lora", "attention"], "'attention'; stage warmup does not train it"),
        (["--stage", "sft", "--lora", "gate"], "--lora names 'gate'; allowed here are attention, experts"),
        (["--stage", "sft", "--lora", ","], "which names nothing"),
        (["--stage", "sft", "--lora", "experts", "--rank", "0"], "--rank is 0"),
        (["--stage", "sparse", "--attention", "dense"], "stage sparse has one mode"),
        (["--stage", "sft", "--attention", "some"], "--attention is 'some'; allowed are dense, sparse"),
        (["--stage", "dense", "--init", "nowhere"], "--init is 'nowhere', which is not a directory"),
        (["--stage", "dense", "--init", "."], "has no config.json"),
        (["--stage", "dense", "--init", ".", "--config", "tiny"], "--config cannot be given with --init"),
        (["--stage", "dense", "--init", ".", "--set", "index_topk=8"], "--set cannot be given with --init"),
        (["--stage", "dense", "--set", "vocab_size=262"], "vocab_size is 262"),
        (["--stage", "dense", "--set", "topk=8"], "'topk'"),
        (["--stage", "dense", "--resume"], "--resume needs --out"),
    ],
)
def test_wrong_use_ends_with_one_sentence(words, named, here, capsys):
    out = [] if "--resume" in words else ["--out", "out"]
    assert v32("train", *words, *out) == 2
    said = capsys.readouterr()
    assert named in said.err
    assert said.err.count("\n") == 1 and said.out == ""
    assert not Path("out").exists()


def test_the_folder_of_a_run_that_has_not_ended_is_no_start(here, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        interrupting(patched, 3)
        assert trained("dense", "out") == 130
    capsys.readouterr()
    assert trained("warmup", "next", "--init", "out") == 2
    assert "--init is 'out', a run that has not ended: it has no checkpoint yet" in capsys.readouterr().err


def test_a_place_that_is_no_folder_is_refused(here, capsys):
    Path("file").write_text("")
    assert trained("dense", "file/out") == 2
    assert "--out is file/out, which cannot be a folder" in capsys.readouterr().err


def test_a_full_disk_ends_with_one_sentence_and_keeps_the_state(here, monkeypatch, capsys):
    whole = state._write_tensors

    def full(path, tensors):
        if "00000004" in str(path):
            raise OSError(28, "No space left on device")
        whole(path, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(state, "_write_tensors", full)
        assert trained("dense", "out") == 3
    said = capsys.readouterr().err
    assert said.startswith(
        "v32 train: out cannot be written: No space left on device. The state after 2 steps is kept; go on"
    )
    assert said.count("\n") == 1
    assert trained("dense", "out", "--resume") == 0


def test_what_safetensors_cannot_write_is_an_error_of_the_disk(here, monkeypatch, capsys):
    def full(*_):
        raise state.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state, "save_file", full)
    assert trained("dense", "out") == 3
    assert "No space left on device" in capsys.readouterr().err


def test_a_shortened_stage_keeps_its_proportions(monkeypatch):
    phases = tuple(Phase(steps, 64, 2, {"text": 1.0}) for steps in (900, 60, 640))
    monkeypatch.setattr(
        command, "stage_for", lambda name, config: replace(stage_for(name, config), phases=phases, ramp=50)
    )
    job = job_for(Request("dense", steps=16))
    assert [phase.steps for phase in job.stage.phases] == [9, 1, 6]
    assert [phase.steps for phase in job_for(Request("dense", steps=2)).stage.phases] == [1, 1]
    assert [phase.steps for phase in job_for(Request("dense", steps=1)).stage.phases] == [1]
    assert [job_for(Request("dense", steps=steps)).stage.ramp for steps in (16, 3200)] == [0, 100]
    assert job_for(Request("dense")).stage.phases == phases


def test_a_rate_is_the_one_of_who_trains():
    assert job_for(Request("warmup", lr=1e-3)).stage.lr_indexer == 1e-3
    sparse = job_for(Request("sparse", lr=1e-4, lr_indexer=2e-3)).stage
    assert (sparse.lr, sparse.lr_indexer) == (1e-4, 2e-3)
    assert job_for(Request("dense", lr_matrices=0.01)).stage.lr_matrices == 0.01


def test_the_model_is_drawn_from_the_seed_and_in_the_dtype_asked_for_but_for_its_key_norm():
    first, second, other = (job_for(Request("dense", seed=seed)).model().lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    for name, p in job_for(Request("dense", dtype="bfloat16")).model().named_parameters():
        assert p.dtype == (torch.float32 if "k_norm" in name else torch.bfloat16)


def test_a_reproducing_command_names_what_is_not_the_default():
    request = Request("sft", lora="experts", lr=1e-4, overrides=("index_topk=8",), attention="dense", out=Path("a b"))
    assert request.command(resume=True) == (
        "v32 train --stage sft --attention dense --lora experts --lr 0.0001 --set index_topk=8 --resume --out 'a b'"
    )
    assert Request("dense", out=Path("x")).command() == "v32 train --stage dense --out x"


def event(step, **values):
    return Event("step", 0.0, {"step": step, **values})


def test_curves_of_a_record():
    events = [
        event(s, lm_loss=4.0 - s, kl_loss=None, gradient_norms={"head": float(s)}, **({"captured": s / 10} if s % 2 == 0 else {}))
        for s in range(5)
    ]  # fmt: skip
    run = Run({"training": {"stage": "warmup", "steps": 9}}, events=(Event("started", 0.0, {"step": 0}), *events))
    found = training(run)
    ((title, columns, rows), *rest) = found.tables(3)
    assert title == "training, stage warmup: 5 of 9 steps"
    # The steps at which every curve has a value.
    assert columns == ["curve", "", "step 0", "step 2", "step 4"]
    assert [row[0] for row in rows] == ["LM loss", "captured", "gradient, head"]
    assert [row[2:] for row in rows] == [["4", "2", "0"], ["0", "0.2", "0.4"], ["0", "2", "4"]]
    assert rest == []
    assert "| captured |" in markdown(run)
    assert training(Run({})) is None
    assert training(Run({"training": {"stage": "dense", "steps": 9}})).tables(3) == []


def test_a_record_with_other_kinds_of_values_is_still_shown():
    odd = [
        event(0, lm_loss="high", gradient_norms=3),
        Event("step", 0.0, {"step": "one"}),
        event(1, lm_loss=float("nan")),
    ]
    run = Run({"training": {"stage": ["<b>"], "parameters": {"x": 3}}}, events=tuple(odd))
    assert "LM loss" in markdown(run)


def test_the_live_view_is_a_picture_on_a_terminal_and_lines_elsewhere():
    values = {"step": 0, "lm_loss": 2.5, "kl_loss": None, "captured": 0.5, "tokens_per_second": 1e3, "seconds": 2.0}
    plain = Console(width=100, force_terminal=False, record=True)
    with LiveTraining(plain, "warmup", 2) as live:
        live.begin(0)
        live.step(values)
    assert plain.export_text() == "step 1/2  LM 2.5  captured 0.5  tokens/s 1000  2.0s\n"
    terminal = Console(width=100, force_terminal=True, force_interactive=True, record=True)
    with LiveTraining(terminal, "warmup", 2) as live:
        live.step(values)
        terminal.print(live._picture())
    shown = terminal.export_text()
    assert "1/2" in shown and "captured" in shown and "▁" in shown


@pytest.mark.slow
def test_all_stages_killed_midway_and_at_each_boundary_end_in_the_same_bits(tmp_path):
    """SIGKILL to a process of its own: in the first steps, midway, in the last step, and after the last state."""
    options = ["--steps", "40", "--seq-len", "64", "--batch", "4", "--save-every", "10", "--measure-every", "10"]
    before = {"whole": [], "killed": []}
    for stage in ("dense", "warmup", "sparse", "sft"):
        for kind in ("whole", "killed"):
            out = tmp_path / f"{kind}-{stage}"
            words = [
                sys.executable,
                "-m",
                "harness.cli",
                "train",
                "--stage",
                stage,
                *options,
                *before[kind],
                "--out",
                str(out),
            ]
            if kind == "killed":
                for moment in (0, 17, 39):
                    killed_at(words, out, moment)
            process = subprocess.run([*words, "--resume"], cwd=ROOT, env=environment(), capture_output=True, text=True)
            assert process.returncode == 0, process.stderr
            if kind == "killed":
                # As if killed when the last state was written and the checkpoint was not.
                shutil.rmtree(out / "checkpoint")
                subprocess.run([*words, "--resume"], cwd=ROOT, env=environment(), check=True, capture_output=True)
            before[kind] = ["--init", str(out)]
        whole, killed = (tmp_path / f"{kind}-{stage}" for kind in before)
        assert steps_of(whole) == steps_of(killed), stage
        assert weights_of(whole) == weights_of(killed), stage


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def killed_at(words, out, step):
    """Run a command and kill it without warning as soon as `step` is in its record."""
    process = subprocess.Popen(
        [*words, "--resume"], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(6000):
            record = out / "run.jsonl"
            if record.exists() and f'"step":{step},'.encode() in record.read_bytes():
                break
            assert process.poll() is None, "ended before it was killed"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
