"""Every command that a document shows, in a block or in running text, is run, or stands in `NOT_RUN` with the reason.

What takes minutes is run with a smaller model or on fewer inputs, and `SHORTER` says so. Commands that come to the same
are run once.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from harness.cli import app

from .commands import DOCUMENTS, ROOT, Command, in_blocks, inline

# Words of a documented command and what a test runs in their place.
SHORTER = {
    "--config small": "--config tiny",
    "--config medium": "--config tiny",
    "--config mini": "--config tiny",
    "v32 mutants --only C": "v32 mutants --only C01,C05 --seeds 0",
    "v32 mutants --only A --seeds 0": "v32 mutants --only A01,A15 --seeds 0",
    "v32 bench --lengths 512,1024": "v32 bench --lengths 64,128 --repeats 3 --config tiny",
    "--checks operators,probes": "--checks operators --seq-len 40",
    "v32 verify --subject transformers": "v32 verify --subject transformers --checks choices",
    "--backend triton --seq-len 40 --cases text,packed": "--backend triton --seq-len 40 --cases text --checks parity",
    "--suite verify,kernels,bench": "--suite bench --gpu none",
    "--gpu H200,H100 --price 3.95": "--gpu none --checks finite",
    "--on modal --gpu H200": "--on modal --gpu none --checks finite",
    "modal run suites/gpu.py --config tiny": "modal run suites/gpu.py --config tiny --gpu none --checks finite",
    "--sft --gpu H200:8": "--sft",
    "modal run suites/gpu.py --sft": "modal run suites/gpu.py --sft --gpu none",
    "v32 verify --on modal": "v32 verify --on modal --gpu none --checks finite",
    "v32 bench --on modal": "v32 bench --on modal --gpu none --lengths 64,128 --repeats 3 --config tiny",
    "--checkpoint harness/training/mini": "--checkpoint harness/training/mini --checks parity,kl --cases text",
    "--subject this_file.py:factory": "--subject this_file.py:factory --checks choices,kl --cases text",
    "torchrun --nproc-per-node 4": "torchrun --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0",
    "--parallel fsdp=2,cp=2": "--parallel cp=2 --steps 40 --seq-len 64 --batch 2",
}
# Each command that is not run here, and why. Where another test runs it, or the same, the reason ends with that test.
NOT_RUN = {
    "make setup": "it builds the environment that the tests run in; CI starts with it",
    "make test": "it is what runs this test",
    "make test ARGS=suites/meta/test_house.py": "it is what runs this test",
    'make test ARGS="-k planted -x" WORKERS=0': "it is what runs this test",
    "make test ARGS=suites/kernels": "it is what runs this test",
    "make lint": "its three commands read this tree only, and CI runs them",
    "make verify": "it may rebuild the environment, and then runs `v32 verify`, as README.md's `v32 verify --config tiny` does",
    'make verify ARGS="--config small"': "it may rebuild the environment, and then runs README.md's `v32 verify --config small`",
    "make kernels": "more than 10 minutes: "
    "suites/kernels/test_compile.py::test_all_of_our_kernels_compile_within_their_budgets",
    "v32 kernels --target sm_90a": "more than 10 minutes: "
    "suites/kernels/test_compile.py::test_all_of_our_kernels_compile_within_their_budgets",
    ".venv/bin/ruff check --fix": "it changes the tree",
    ".venv/bin/ruff format": "it changes the tree",
    "pip install -e '.[modal]'": "it changes the environment that the tests run in",
    "pip install fast-hadamard-transform": "it changes the environment that the tests run in, and needs CUDA",
    "modal setup": "it asks for an account",
    "modal volume get v32-results RUN/sft/checkpoint": "RUN is a run in an account",
    "modal run suites/gpu.py --checkpoint deepseek-ai/DeepSeek-V3.2-Exp": "689 GB, of a small one here: "
    "suites/modal/test_checkpoint.py::"
    "test_a_checkpoint_is_downloaded_and_walked_and_a_container_that_dies_costs_no_layer",
    "v32 bench --device cuda": "it needs a GPU",
    "v32 bench --config bench --lengths 512,1024,2048,4096,8192 --pass fwd,fwd+bwd --against transformers,dense-flash "
    "--floors": "more than 10 minutes: suites/perf/test_bench.py::test_the_floors_of_all_lengths_hold",
    "v32 bench --lengths 512,1024,2048,4096,8192 --against transformers,dense-flash --floors": "more than 10 minutes: "
    "suites/perf/test_bench.py::test_the_floors_of_all_lengths_hold",
    "v32 recipe --seeds 1 --no-faults": "more than 10 minutes, shorter here: "
    "suites/training/test_recipe_command.py::test_the_table_is_trained_recorded_and_shown",
    "v32 train --stage sft": "named as what `modal run suites/gpu.py --sft` runs, which is run",
    "v32 report RUN": "RUN is a reader's own; README.md's `v32 report runs/<time>-verify` is run",
    "v32 verify --subject FILE.py:NAME": "FILE and NAME are a reader's own; that of README.md is run",
    "v32 verify --checkpoint": "an option without its value",
    "v32 verify --checkpoint FOLDER --layerwise": "FOLDER is a reader's own: "
    "suites/checkpoints/test_layerwise.py::test_every_stage_of_every_layer_is_verified",
    "pytest suites/modal": "it is what runs those tests",
    "python -m harness.goldens.measure": "minutes, for one seed here: "
    "suites/golden/test_vectors.py::test_tolerances_are_some_ten_times_what_a_right_model_needs",
    "python block.py": "each block of that document: suites/parity/test_findings.py::test_a_block_runs_by_itself",
}
# transformers' own bf16 is found wrong: findings 18 and 19. The others fail in what their documents say.
ENDS_WITH = {
    "v32 plan --config v32 --seq-len 65536 --stage sparse --gpus 128xH200 --parallel cp=8,ep=16 --no-checkpointing": 1,
    "v32 verify --subject transformers": 1,
    "v32 verify --subject this_file.py:factory": 1,
}
# Example subjects by file: the document that holds one, and how its block starts.
EXAMPLES = {
    "my_model.py": ("docs/subjects.md", "# my_model.py"),
    "my_kernels.py": ("docs/subjects.md", "# my_kernels.py"),
    "this_file.py": ("README.md", "from harness.subjects import load_weights"),
}

BLOCKS = [command for document in DOCUMENTS for command in in_blocks(document)]
COMMANDS = [*BLOCKS, *(command for document in DOCUMENTS for command in inline(document))]
RUNNABLE = ("v32", "modal", "torchrun")


def named(command):
    return f"{command.document}:{command.line} {command.text}"


def entrypoint_flags():
    """The flags that `modal run suites/gpu.py` takes: one for each parameter of its entry."""
    tree = ast.parse((ROOT / "suites/gpu.py").read_text("utf-8"))
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    return {f"--{argument.arg.replace('_', '-')}" for argument in main.args.args}


def v32_command(words):
    """The command of `v32` that the words name, and the words left for it.

    Raises:
        KeyError: there is none of this name.
    """
    found, rest = typer.main.get_command(app), list(words)
    while hasattr(found, "commands") and rest:
        found = found.commands[rest.pop(0)]
    return found, rest


def flags(command):
    """The flags that a command of a document may have; torchrun's own are torchrun's to refuse."""
    program, *words = command.words
    if program == "modal":
        return entrypoint_flags()
    if program == "torchrun":
        words = words[words.index("harness.cli") + 1 :]
    found, _ = v32_command(words)
    return {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)}


def asked(command):
    words = command.words
    return {word for word in words[words.index("-m") if "torchrun" in words else 0 :] if word.startswith("--")}


def is_accounted_for(command):
    """Whether the runner of this file can run it as it stands, or the table says why not."""
    return command.text in NOT_RUN or (not command.is_template and command.words[0] in RUNNABLE)


@pytest.mark.parametrize("command", COMMANDS, ids=named)
def test_a_command_is_run_or_says_why_not(command):
    assert is_accounted_for(command), "Give its reason in NOT_RUN, or write it so that it can be run."


@pytest.mark.parametrize("command", COMMANDS, ids=named)
def test_a_command_is_one(command):
    program, *words = command.words
    if program == "make":
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif program == "modal" and words[0] == "run":
        assert "suites/gpu.py" in words or "suites.gpu" in words
        assert asked(command) <= flags(command)
    elif program in ("v32", "torchrun"):
        assert asked(command) <= flags(command)
        if program == "v32" and command.text not in NOT_RUN:
            found, rest = v32_command(words)
            found.make_context(found.name, rest)
    else:
        assert command.text in NOT_RUN


def test_a_command_that_is_none_is_noticed():
    def shown(text):
        return Command("README.md", 1, text)

    assert not asked(shown("v32 verify --seqlen 3")) <= flags(shown("v32 verify --seqlen 3"))
    wrong = shown("torchrun --nproc-per-node 2 -m harness.cli train --stage sparse --paralel cp=2")
    assert asked(wrong) - flags(wrong) == {"--paralel"}
    with pytest.raises(KeyError):
        v32_command(["frobnicate"])
    assert not asked(shown("modal run suites/gpu.py --length 3")) <= entrypoint_flags()
    for text in ("v32 golden export DIR", "v32 verify --checkpoint FOLDER", "make dist", "pip install torch"):
        assert not is_accounted_for(shown(text)), text
    assert is_accounted_for(shown("v32 verify --seed 3"))
    assert [shown(text).is_name for text in ("v32 golden check", "make lint", "modal run", "v32 report RUN")] == [
        True, True, True, False,
    ]  # fmt: skip


def test_the_tables_of_this_file_name_only_what_is_documented():
    texts = [command.text for command in COMMANDS]
    for words in SHORTER:
        assert any(words in text for text in texts if text not in NOT_RUN), words
    assert {*NOT_RUN, *ENDS_WITH} <= set(texts)
    for reason in NOT_RUN.values():
        for path, name in re.findall(r"(suites/\S+\.py)::(\w+)", reason):
            assert f"def {name}(" in (ROOT / path).read_text("utf-8"), reason
        for same in re.findall(r"`([^`]+)`", reason):
            assert same == "v32 verify" or (same in texts and same not in NOT_RUN), reason


def shorter(text):
    """What is run in place of a documented command."""
    for words, fewer in SHORTER.items():
        text = text.replace(words, fewer)
    return text


def example(name):
    """The source of an example subject, as its document gives it."""
    document, start = EXAMPLES[name]
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text("utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(start)]
    return found


def program_of(words):
    """The words with the program of this environment in front, and with this tree's files."""
    found = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    return [str(ROOT / word) if word in ("suites/gpu.py", "harness/training/mini") else word for word in found]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of a reader's own, with the example subjects and two runs to compare."""
    folder = tmp_path_factory.mktemp("reader")
    for name in EXAMPLES:
        (folder / name).write_text(example(name))
    return folder


@pytest.fixture(scope="module")
def modal_here(tmp_path_factory):
    """What a command needs in its environment to find a Modal on this machine."""
    from suites.modal.loopback import Loopback

    with Loopback(tmp_path_factory.mktemp("modal"), containers=2) as server:
        yield server.client_environment()


def is_fast(command):
    """Whether it takes moments: then this process runs it, which has imported everything already."""
    return command.words[:2] == ["v32", "plan"]


def once(commands):
    """Each text once, the first document's; runs of one document stay in order."""
    seen = set()
    for command in commands:
        ran = shorter(command.text)
        if command.text not in NOT_RUN and ran not in seen:
            seen.add(ran)
            yield command


@pytest.mark.parametrize("command", filter(is_fast, once(COMMANDS)), ids=named)
def test_a_fast_command_runs(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, command.words[1:])
    assert done.exit_code == ENDS_WITH.get(command.text, 0), done.output


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in once(COMMANDS) if not is_fast(c)], ids=named)
def test_a_command_runs(command, place, request):
    ran = Command(command.document, command.line, shorter(command.text))
    environment = {**os.environ, **ran.variables, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if ran.words[0] == "modal" or "modal" in ran.words:
        environment |= request.getfixturevalue("modal_here")
    if "runs/before" in ran.words:
        for name in ("before", "after"):
            shutil.copytree(latest(place / "runs", "-verify"), place / "runs" / name, dirs_exist_ok=True)
    words = [str(latest(place / "runs", "-verify")) if "<time>" in word else word for word in program_of(ran.words)]
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == ENDS_WITH.get(command.text, 0), (
        f"{ran.text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )


def latest(runs, ending):
    """The newest run of a kind; the documents call it runs/<time>-verify."""
    return max(path for path in runs.iterdir() if path.name.endswith(ending))
