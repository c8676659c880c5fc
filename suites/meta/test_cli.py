"""The command line: wrong use ends in one sentence, a run that is cut off can be read, and the last line is the verdict.

Most of it runs in this process, through the same entry point; signals, streams and exit codes need one of their own.
"""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from harness import runner
from harness.cases import calibrated_state
from harness.checks import Check
from harness.cli import main
from harness.dispatch.local import hears_ctrl_c
from harness.subjects import load_weights
from harness.verify import checkpoint_state
from reference import DeepseekV32Config, DeepseekV32ForCausalLM
from reports.files import REPORT_FILES
from reports.records import read_run, run_exit_code, verdict_line
from reports.schema import Status

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SMALL = ("--checks", "finite,parity.logits", "--cases", "text", "--dtype", "float32", "--seq-len", "32", "--batch", "1")


@pytest.fixture(autouse=True)
def _as_loud_as_before():
    """`v32 verify` silences transformers for its whole process, which is this one."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def v32(*words):
    """The exit code of a command, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return ended.value.code


def process(*words, cwd, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "harness.cli", *words], cwd=cwd, env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hears_ctrl_c,
    )  # fmt: skip


def refused(capsys, *words):
    """The one sentence with which a command is refused; nothing else may be said or written."""
    assert v32(*words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith("\n")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    assert not Path("run").exists()
    return said.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--config", "huge"], "'huge'; available: tiny, mini, bench, small, medium"),
        (["--nonsense"], "--nonsense"),
        (["extra"], "extra"),
        (["--set", "topk=3"], "'topk'"),
        (["--set", "index_topk"], "it must be name=value"),
        (["--set", "n_group=3"], "n_group is 3; it must be a divisor of n_routed_experts (8)"),
        (["--set", "num_hidden_layers=0"], "num_hidden_layers is 0"),
        (["--set", "qk_rope_head_dim=15"], "qk_rope_head_dim is 15"),
        (["--set", "vocab_size=100"], "vocab_size"),
        (["--set", "scoring_func=softmax"], "scoring_func"),
        (["--checks", "speed"], "'speed'; families are all, finite"),
        (["--checks", ","], "--checks"),
        (["--cases", "poems"], "'poems'; available: all, text"),
        (["--dtype", "float16"], "'float16'; allowed are float32, bfloat16"),
        (["--dtype", ""], "--dtype is empty"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--device", "meta"], "--device is 'meta'"),
        (["--backend", "vulkan"], "'vulkan'"),
        (["--backend", "torch", "--subject", "transformers"], "has no operators to choose"),
        (["--seq-len", "3"], "--seq-len is 3; it must be 8 or more"),
        (["--seq-len", "10000000"], "--seq-len is 10000000; the model has positions for 163840 tokens"),
        (["--seq-len", "long"], "--seq-len"),
        (["--batch", "0"], "--batch is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--seed", "1.5"], "--seed"),
        (["--subject", "nobody"], "'nobody'; available: optimized, reference"),
        (["--subject", "missing.py:factory"], "missing.py, which does not exist"),
        (["--checkpoint", "nowhere"], "'nowhere', which is not a directory"),
        (["--layerwise"], "--layerwise needs --checkpoint"),
        (["--layerwise", "--checkpoint", "nowhere", "--checks", "kl"], "--checks does not go with --layerwise"),
        (["--layerwise", "--checkpoint", ".", "--on", "modal"], "a folder of this machine, which does not travel"),
        (["--layerwise", "--checkpoint", "nowhere", "--dtype", "int8"], "--dtype is 'int8'"),
        (["--until", "2"], "--until belongs to --layerwise"),
        (["--on", "mars"], "--on is 'mars'; allowed are local and modal"),
        (["--gpu", "H100"], "--gpu belongs to --on modal"),
        (["--shard-timeout", "60"], "--shard-timeout belongs to --on modal"),
        (["--price", "4"], "--price belongs to --on modal"),
        (["--resume"], "--resume belongs to --on modal or --layerwise"),
        (["--on", "modal", "--gpu", "H100:9"], "--gpu is 'H100:9'"),
        (["--on", "modal", "--shard-timeout", "1"], "--shard-timeout is 1"),
        (["--on", "modal", "--price", "0"], "--price is 0"),
        (["--on", "modal", "--checks", "speed"], "'speed'"),
    ],
)
def test_wrong_usage_is_refused_in_one_sentence(words, named, here, capsys):
    assert named in refused(capsys, "verify", *words, "--out", "run")


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ("index_topk=abc", "index_topk"),
        ("index_topk=None", "index_topk"),
        ("hidden_size=64.5", "hidden_size"),
        ("vocab_size=320.0", "vocab_size"),
        ("num_attention_heads=True", "num_attention_heads"),
        ("use_sparse_attention=1", "use_sparse_attention"),
        ("rms_norm_eps=small", "rms_norm_eps"),
        ("indexer_kl_coef=nan", "indexer_kl_coef"),
        ("rope_parameters=5", "rope_parameters"),
        ("pad_token_id=9999", "pad_token_id"),
        ("dtype=float99", "dtype"),
    ],
)
def test_a_config_value_of_the_wrong_type_is_refused_in_one_sentence(entry, named, here, capsys):
    assert named in refused(capsys, "verify", "--set", entry, *SMALL, "--out", "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Here there is a CUDA device to ask for.")
def test_a_device_that_is_not_here_is_refused(here, capsys):
    assert "torch finds no CUDA device here" in refused(capsys, "verify", "--device", "cuda", "--out", "run")


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("def factory(:\n", "does not load: SyntaxError"),
        ("raise RuntimeError('two\\nlines')\n", "does not load: RuntimeError: two lines"),
        ("import sys\nsys.exit(5)\n", "does not load"),
        ("def other(*a, **k): ...\n", "has no factory called 'factory'"),
        ("factory = 5\n", "has no factory called 'factory'"),
        ("def factory(*a, **k): raise KeyError('x')\n", "raised KeyError"),
        ("def factory(*a, **k): ...\n", "declares no capabilities"),
        ("def factory(*a, **k): ...\nfactory.capabilities = {'magic'}\n", "declares 'magic'"),
        ("def factory(*a, **k): ...\nfactory.capabilities = 5\n", "capabilities"),
    ],
    ids=[
        "syntax", "raises", "exits", "other name", "no function", "factory raises", "undeclared", "unknown", "no set",
    ],
)  # fmt: skip
def test_a_subject_file_that_cannot_be_used_is_refused(source, named, here, capsys):
    Path("mine.py").write_text(source)
    assert named in refused(capsys, "verify", "--subject", "mine.py:factory", *SMALL, "--out", "run")


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_place_that_cannot_be_written_is_refused_in_one_sentence(out, here, capsys):
    Path("file").write_text("mine")
    assert v32("verify", *SMALL, "--out", out) in (2, 3)
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "file" in said.err
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["report", "nowhere"], "nowhere"),
        (["report", "junk.jsonl"], "is not a record file"),
        (["report", "."], "run.jsonl"),
        (["report"], "run"),
        (["frobnicate"], "frobnicate"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_use_of_other_commands_is_refused_in_one_sentence(words, named, here, capsys):
    Path("junk.jsonl").write_text("hello\n")
    assert named in refused(capsys, *words)
    assert not Path("report.md").exists()


def test_wrong_usage_in_a_process_of_its_own_says_nothing_else(tmp_path):
    # What a library warns of on the way would stand beside the sentence.
    done = process("verify", "--set", "n_group=3", "--out", "run", cwd=tmp_path)
    out, errors = done.communicate()
    assert (done.returncode, out, errors.count("\n")) == (2, "", 1)
    assert "n_group" in errors


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of calibrated tiny weights, as the reference saves it."""
    path = tmp_path_factory.mktemp("saved")
    config = DeepseekV32Config.preset("tiny")
    model = load_weights(
        DeepseekV32ForCausalLM, config, calibrated_state(config, 1), torch.device("cpu"), torch.float32
    )
    model.save_pretrained(path)
    return path


@pytest.fixture
def damaged(saved, here):
    """Writes a copy of the checkpoint, spoilt by `spoil(tensors, config)`, and returns its place."""

    def write(spoil=None):
        folder = here / "checkpoint"
        folder.mkdir()
        tensors = load_file(saved / "model.safetensors")
        config = json.loads((saved / "config.json").read_text())
        if spoil is not None:
            spoil(tensors, config)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


def test_the_weights_of_a_checkpoint_are_those_that_were_saved(saved):
    expected = calibrated_state(DeepseekV32Config.preset("tiny"), 1)
    state = checkpoint_state(saved)
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_checkpoint_is_verified(saved, here):
    assert v32("verify", "--checkpoint", str(saved), *SMALL, "--out", "run") == 0
    assert read_run("run").header["weights"] == "checkpoint"


def test_the_default_length_of_a_checkpoint_is_above_the_keys_it_selects(damaged):
    # Shorter, every key would be selected, and no wrong selection could be told from the right one.
    folder = damaged(lambda tensors, config: config.update(index_topk=128))
    code = v32("verify", "--checkpoint", str(folder), "--checks", "choices.keys", "--cases", "text", "--dtype",
               "float32", "--batch", "1", "--out", "run")  # fmt: skip
    assert code == 0
    assert read_run("run").header["seq_len"] > 128


def test_the_default_length_is_above_the_keys_that_set_selects(here):
    code = v32("verify", "--set", "index_topk=128", "--checks", "choices.keys", "--cases", "text", "--dtype",
               "float32", "--batch", "1", "--out", "run")  # fmt: skip
    assert code == 0


TENSOR = "model.layers.1.self_attn.indexer.wk.weight"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize("name", [TENSOR, EXPERT, "lm_head.weight"])
def test_a_checkpoint_without_a_tensor_is_refused_by_its_name(name, damaged, capsys):
    folder = damaged(lambda tensors, config: tensors.pop(name))
    assert name in refused(capsys, "verify", "--checkpoint", str(folder), "--out", "run")


@pytest.mark.parametrize("name", [TENSOR, EXPERT])
def test_a_checkpoint_with_a_tensor_of_another_shape_is_refused_by_its_name(name, damaged, capsys):
    folder = damaged(lambda tensors, config: tensors.update({name: tensors[name][:-1]}))
    sentence = refused(capsys, "verify", "--checkpoint", str(folder), "--out", "run")
    assert name in sentence
    assert "shape" in sentence


def test_a_checkpoint_with_a_tensor_too_many_is_refused_by_its_name(damaged, capsys):
    folder = damaged(lambda tensors, config: tensors.update({"model.extra": torch.ones(2)}))
    assert "'model.extra'" in refused(capsys, "verify", "--checkpoint", str(folder), "--out", "run")


def test_a_checkpoint_that_is_cut_off_is_refused(damaged, capsys):
    folder = damaged()
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    assert "truncated: tensor" in refused(capsys, "verify", "--checkpoint", str(folder), "--out", "run")


def test_a_checkpoint_whose_weights_are_no_tensors_is_refused(damaged, capsys):
    folder = damaged()
    (folder / "model.safetensors").write_bytes(b"hello, world" * 10)
    assert "model.safetensors" in refused(capsys, "verify", "--checkpoint", str(folder), "--out", "run")


def test_a_checkpoint_without_weights_is_refused(damaged, capsys):
    folder = damaged()
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refused(capsys, "verify", "--checkpoint", str(folder), "--out", "run")


def test_a_checkpoint_without_config_is_refused(damaged, capsys):
    folder = damaged()
    (folder / "config.json").unlink()
    assert "no config.json" in refused(capsys, "verify", "--checkpoint", str(folder), "--out", "run")


def test_a_checkpoint_whose_config_is_no_json_is_refused(damaged, capsys):
    folder = damaged()
    (folder / "config.json").write_text("{")
    assert "config.json" in refused(capsys, "verify", "--checkpoint", str(folder), "--out", "run")


@pytest.mark.parametrize(("field", "value"), [("topk", 3), ("index_topk", "many"), ("n_group", 3)])
def test_a_checkpoint_whose_config_does_not_hold_is_refused(field, value, damaged, capsys):
    folder = damaged(lambda tensors, config: config.update({field: value}))
    assert field in refused(capsys, "verify", "--checkpoint", str(folder), "--out", "run")


def test_set_does_not_change_the_config_of_a_checkpoint(saved, here, capsys):
    words = ("verify", "--checkpoint", str(saved), "--set", "index_topk=8", "--out", "run")
    assert "--set" in refused(capsys, *words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in a process of its own, its streams no terminal: (folder, exit code, output, errors)."""
    folder = tmp_path_factory.mktemp("finished")
    done = process("verify", *SMALL, "--out", "run", cwd=folder)
    out, errors = done.communicate()
    return folder / "run", done.returncode, out, errors


def test_a_verified_run_ends_with_0_and_its_verdict(finished):
    folder, code, out, errors = finished
    assert (code, errors) == (0, "")
    assert out.splitlines()[-1] == verdict_line(read_run(folder))
    assert out.splitlines()[-1].endswith("optimized agrees with the reference")


def test_output_that_is_no_terminal_has_no_escape_codes_and_a_line_for_each_verdict(finished):
    folder, _, out, _ = finished
    assert "\x1b" not in out
    assert "\r" not in out
    for verdict in read_run(folder).verdicts:
        assert any(line.startswith(f"{verdict.status}  {verdict.check}") for line in out.splitlines())


def test_report_rebuilds_the_same_file_and_returns_the_exit_code_of_the_run(finished, here, capsys):
    folder = here / "copy"
    folder.mkdir()
    (folder / "run.jsonl").write_bytes((finished[0] / "run.jsonl").read_bytes())
    assert v32("report", str(folder)) == 0
    assert (folder / "report.md").read_bytes() == (finished[0] / "report.md").read_bytes()
    assert capsys.readouterr().out.splitlines()[-1] == finished[2].splitlines()[-1]


def test_report_takes_the_record_file_itself(finished, here):
    (here / "run.jsonl").write_bytes((finished[0] / "run.jsonl").read_bytes())
    assert v32("report", "run.jsonl") == 0
    assert (here / "report.md").exists()


@pytest.mark.parametrize("left", [0.5, 0.9, 0.999])
def test_report_of_a_cut_file_says_where_it_ends_and_is_not_0(left, finished, here, capsys):
    content = (finished[0] / "run.jsonl").read_bytes()
    end = int(len(content) * left)
    assert content[end - 1 : end] != b"\n"
    Path("run.jsonl").write_bytes(content[:end])
    assert v32("report", "run.jsonl") == 3
    sentence = f"is cut at byte {end}"
    assert sentence in Path("report.md").read_text()
    assert sentence in capsys.readouterr().out.splitlines()[-1]


def test_report_of_a_file_without_footer_says_that_the_run_did_not_end(finished, here, capsys):
    lines = (finished[0] / "run.jsonl").read_bytes().splitlines(keepends=True)
    Path("run.jsonl").write_bytes(b"".join(lines[:-1]))
    assert v32("report", ".") == 3
    assert "run did not end" in Path("report.md").read_text()
    assert "run did not end" in capsys.readouterr().out.splitlines()[-1]


def test_a_failed_run_and_its_report_end_with_1(here, capsys):
    Path("zero.py").write_text(
        "from harness.subjects import resolve_subject\n"
        "def factory(config, state_dict, *, device, dtype):\n"
        "    model = resolve_subject('optimized').factory(config, state_dict, device=device, dtype=dtype)\n"
        "    model.lm_head.register_forward_hook(lambda module, args, out: out * 0)\n"
        "    return model\n"
    )
    assert v32("verify", "--subject", "zero.py:factory", *SMALL, "--out", "run") == 1
    assert capsys.readouterr().out.splitlines()[-1] == verdict_line(read_run("run"))
    before = Path("run/report.md").read_bytes()
    assert v32("report", "run") == 1
    assert Path("run/report.md").read_bytes() == before


def test_a_run_that_verifies_nothing_ends_with_3(here, capsys):
    code = v32("verify", "--subject", "transformers", "--checks", "kl", "--cases", "text", "--dtype", "float32",
               "--seq-len", "32", "--out", "run")  # fmt: skip
    assert code == 3
    assert {v.status for v in read_run("run").verdicts} == {Status.NOT_APPLICABLE}
    assert "nothing was verified" in capsys.readouterr().out.splitlines()[-1]


def test_a_run_with_an_error_ends_with_3(here, monkeypatch, capsys):
    def broken(bench):
        raise LookupError("nobody is here")

    monkeypatch.setattr(runner, "CHECKS", [Check("finite", "finite", broken)])
    assert v32("verify", "--checks", "finite", *SMALL[2:], "--out", "run") == 3
    assert "ERROR: finite" in capsys.readouterr().out.splitlines()[-1]
    assert "nobody is here" in Path("run/report.md").read_text()


def test_no_color_on_a_terminal_prints_no_colours(tmp_path):
    words = ("verify", *SMALL, "--out", "run")
    leader, follower = pty.openpty()
    environment = {**ENVIRONMENT, "NO_COLOR": "1", "TERM": "xterm-256color"}
    child = subprocess.Popen(
        [sys.executable, "-m", "harness.cli", *words], cwd=tmp_path, env=environment, stdin=follower, stdout=follower,
        stderr=follower, close_fds=True,
    )  # fmt: skip
    os.close(follower)
    shown = b""
    while select.select([leader], [], [], 120)[0]:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(leader)
    assert child.wait() == 0
    assert b"agrees with the reference" in shown
    colours = re.findall(rb"\x1b\[[0-9;]*m", shown)
    assert [code for code in colours if re.search(rb"[\[;](3[0-8]|4[0-8]|9\d|10\d)[;m]", code)] == []


def wait_for_lines(file, number, child):
    """Until the record file holds `number` whole lines."""
    until = time.monotonic() + 120
    while time.monotonic() < until and child.poll() is None:
        if file.exists() and file.read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.02)
    pytest.fail(f"{file} never held {number} lines: {child.communicate()}")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run that was killed after some verdicts, where an older report lay."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "run").mkdir()
    (folder / "run" / "report.md").write_text("an older report")
    child = process("verify", "--subject", "reference", "--out", "run", cwd=folder)
    wait_for_lines(folder / "run" / "run.jsonl", 4, child)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    return folder / "run"


def test_the_records_of_a_killed_run_read_back(killed):
    found = read_run(killed)
    assert found.footer is None
    assert len(found.verdicts) >= 3
    assert run_exit_code(found) == 3


def test_no_older_report_stands_beside_the_records_of_a_killed_run(killed):
    assert not (killed / "report.md").exists()


def test_a_new_run_in_the_place_of_a_killed_one_is_clean_and_complete(killed, here):
    folder = here / "run"
    folder.mkdir()
    (folder / "run.jsonl").write_bytes((killed / "run.jsonl").read_bytes()[:-7])
    assert v32("verify", *SMALL, "--out", "run") == 0
    found = read_run(folder)
    assert found.complete
    assert {v.check for v in found.verdicts} == {"finite", "parity.logits"}
    assert sorted(path.name for path in folder.iterdir()) == sorted([*REPORT_FILES, "run.jsonl"])


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that was interrupted as by Ctrl-C: (folder, exit code, output, errors)."""
    folder = tmp_path_factory.mktemp("interrupted")
    child = process("verify", "--subject", "reference", "--out", "run", cwd=folder)
    wait_for_lines(folder / "run" / "run.jsonl", 4, child)
    child.send_signal(signal.SIGINT)
    out, errors = child.communicate(timeout=60)
    return folder / "run", child.returncode, out, errors


def test_an_interrupted_run_does_not_end_with_0(interrupted):
    _, code, _, errors = interrupted
    assert code not in (0, None)
    assert "Traceback" not in errors


def test_an_interrupted_run_has_a_footer_that_says_so(interrupted):
    found = read_run(interrupted[0])
    assert found.problem is None
    assert found.footer is not None
    assert found.footer["ended"] == "interrupted"
    assert len(found.verdicts) >= 3


def test_an_interrupted_run_has_a_report_that_says_so(interrupted):
    folder, _, out, _ = interrupted
    assert "run did not end" in (folder / "report.md").read_text()
    assert "run did not end" in out.splitlines()[-1]


def test_an_interrupt_is_recorded_as_such_and_not_as_an_error_of_a_check(interrupted):
    assert Status.ERROR not in {v.status for v in read_run(interrupted[0]).verdicts}
