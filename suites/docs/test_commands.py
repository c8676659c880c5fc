"""Every command that a document shows is one: its flags are there, and run as it stands it ends as the document says.

What takes minutes is run with a smaller model or on fewer inputs, and `SHORTER` says so; what a test cannot run has its
reason in `NOT_RUN`.
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
}
# Commands that other tests run whole, and where.
ELSEWHERE = {
    "v32 bench --config bench --lengths 512,1024,2048,4096,8192 --pass fwd,fwd+bwd --against transformers,dense-flash "
    "--floors": "suites/perf/test_bench.py::test_the_floors_of_all_lengths_hold",
    "v32 kernels --target sm_90a": "suites/kernels/test_compile.py::test_all_of_our_kernels_compile_within_their_budgets",
    "modal run suites/gpu.py --checkpoint deepseek-ai/DeepSeek-V3.2-Exp": "suites/modal/test_checkpoint.py::"
    "test_a_checkpoint_is_downloaded_and_walked_and_a_container_that_dies_costs_no_layer",
    "v32 recipe --seeds 1 --no-faults": "suites/training/test_recipe_command.py::test_the_table_is_trained_recorded_and_shown",
}
NOT_RUN = {
    "pip install -e '.[modal]'": "it changes the environment that the tests run in",
    "modal setup": "it asks for an account",
    ".venv/bin/ruff check --fix": "it changes the tree",
    ".venv/bin/ruff format": "it changes the tree",
}
# transformers' own bf16 is found wrong: findings 18 and 19.
ENDS_WITH = {"v32 verify --subject transformers": 1}
EXAMPLES = ("my_model.py", "my_kernels.py")

BLOCKS = [command for document in DOCUMENTS for command in in_blocks(document)]
INLINE = [command for document in DOCUMENTS for command in inline(document)]


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
    """The flags that a command of a document may have."""
    program, *words = command.words
    if program == "modal":
        return entrypoint_flags()
    found, _ = v32_command(words)
    return {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)}


def asked(command):
    return {word for word in command.words if word.startswith("--")}


@pytest.mark.parametrize("command", BLOCKS, ids=named)
def test_a_command_of_a_block_is_one(command):
    assert not command.is_template, "A reader cannot run it as it stands."
    program, *words = command.words
    if command.text in NOT_RUN:
        return
    if program == "make":
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif program == "modal":
        assert words[0] == "run" and ("suites/gpu.py" in words or "suites.gpu" in words)
        assert asked(command) <= flags(command)
    else:
        assert program == "v32"
        found, rest = v32_command(words)
        found.make_context(found.name, rest)


@pytest.mark.parametrize("command", INLINE, ids=named)
def test_a_command_in_running_text_has_the_flags_it_is_shown_with(command):
    program, *words = command.words
    if program == "make":
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    else:
        assert asked(command) <= flags(command)


def test_a_command_that_is_none_is_noticed(tmp_path):
    wrong = Command("README.md", 1, "v32 verify --seqlen 3")
    assert not asked(wrong) <= flags(wrong)
    with pytest.raises(KeyError):
        v32_command(["frobnicate"])
    assert not asked(Command("README.md", 1, "modal run suites/gpu.py --length 3")) <= entrypoint_flags()
    assert Command("README.md", 1, "v32 golden export DIR").is_template


def test_the_tables_of_this_file_name_only_what_is_documented():
    texts = [command.text for command in BLOCKS]
    for words in SHORTER:
        assert any(words in text for text in texts), words
    assert {*ELSEWHERE, *NOT_RUN, *ENDS_WITH} <= set(texts)
    for test in ELSEWHERE.values():
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text("utf-8"), test


def shorter(text):
    """What is run in place of a documented command."""
    for words, fewer in SHORTER.items():
        text = text.replace(words, fewer)
    return text


def example(name):
    """The source of an example subject, as docs/subjects.md gives it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/subjects.md").read_text("utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(f"# {name}")]
    return found


def program_of(words):
    """The words with the program of this environment in front, and with this tree's files."""
    found = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    return [str(ROOT / word) if word == "suites/gpu.py" else word for word in found]


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


def once(commands):
    """Each text once, the first document's; runs of one document stay in order."""
    seen = set()
    for command in commands:
        if command.words[0] != "make" and command.text not in {*NOT_RUN, *ELSEWHERE, *seen}:
            seen.add(command.text)
            yield command


@pytest.mark.slow
@pytest.mark.parametrize("command", once(BLOCKS), ids=named)
def test_a_command_of_a_block_runs(command, place, request):
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
