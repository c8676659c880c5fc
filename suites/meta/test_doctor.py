"""The doctor answers quickly and says what is so; the captured environment tells nothing private."""

import io
import json
import os
import resource
import subprocess
import sys
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from harness import doctor, environment
from harness.doctor import Finding, _interpreter, can_run_main_job, diagnose, print_doctor, verdict

ROOT = Path(__file__).resolve().parents[2]

RANGES = [
    "torch>=2.11",
    "transformers<6,>=99",
    "no-such-package>=1",
    "rich>=13; sys_platform == 'plan9'",
    "modal<1.7,>=1.6; extra == 'modal'",
    "nothing-here; extra == 'test'",
    "deepseek-v32-verify[test]; extra == 'all'",
]


@pytest.fixture
def ranges(monkeypatch):
    """Stand in for the installed metadata; `ranges(list)` sets the requirements."""

    def declare(requirements):
        own = Message()
        own["Requires-Python"] = ">=3.11"
        for extra in ("modal", "test", "all"):
            own["Provides-Extra"] = extra
        monkeypatch.setattr(metadata, "requires", lambda _: requirements)
        monkeypatch.setattr(metadata, "metadata", lambda _: own)

    return declare


def test_packages_are_judged_by_the_declared_ranges(ranges):
    ranges(RANGES)
    found = {item.name: item for item in diagnose() if item.area in (doctor.REQUIRED, doctor.OPTIONAL)}
    assert found["python"].state == "ok"
    assert found["torch"].state == "ok"
    assert (found["transformers"].state, found["transformers"].area) == ("limited", doctor.REQUIRED)
    assert found["no-such-package"].state == "missing"
    assert found["modal"].area == found["nothing-here"].area == doctor.OPTIONAL
    assert "[test]" in found["nothing-here"].advice
    assert not {"rich", "deepseek-v32-verify"} & set(found)


def test_the_exit_code_says_whether_the_main_job_can_run(ranges):
    file = io.StringIO()
    console = Console(file=file, width=60)
    ranges(["torch>=2.11", "nothing-here; extra == 'test'"])
    assert print_doctor(console) == 0
    lines = file.getvalue().splitlines()
    assert lines[-1].startswith("the main job can run here · missing: nothing-here")
    assert all(len(line.rstrip()) <= 60 for line in lines[:-1])
    assert "\x1b" not in file.getvalue()
    ranges(["torch>=99"])
    assert print_doctor(console) == 3
    assert file.getvalue().splitlines()[-1].startswith("the main job cannot run here")


def test_missing_metadata_is_said(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", absent)
    findings = diagnose()
    assert findings[0].name == "deepseek-v32-verify"
    assert findings[0].state == "missing"
    assert "ranges of the packages are not known" in findings[0].detail
    assert not can_run_main_job(findings)


def test_every_finding_that_asks_for_something_says_what(ranges):
    ranges(RANGES)
    findings = diagnose()
    names = {item.name for item in findings}
    assert {"CPU path", "GPU", "Triton interpreter", "Triton compile", "Modal", "fast Hadamard"} <= names
    assert {"cores", "memory"} <= names
    for item in findings:
        assert item.advice or item.state != "missing" or item.name == "GPU"
        assert item.advice == "" or item.advice.endswith(".")


@pytest.mark.parametrize(
    ("triton", "numpy", "state"),
    [
        ("3.6.0", "2.4.6", "limited"),
        ("3.6.0", "2.3.5", "ok"),
        ("3.7.0", "2.5.5", "ok"),
        ("3.9.0", "2.4.6", "ok"),
        ("3.6.0", "", "ok"),
    ],
)
def test_an_interpreter_that_this_numpy_breaks_is_limited(triton, numpy, state):
    found = _interpreter(triton, numpy)
    assert found.state == state
    assert bool(found.advice) is (state == "limited")


def test_the_token_is_never_shown(monkeypatch):
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-secret")
    text = repr(diagnose())
    assert "token yes" in text
    assert "secret" not in text


def test_verdict_names_what_is_missing():
    findings = [
        Finding("packages", "a", "ok", ""),
        Finding("x", "b", "limited", ""),
        Finding("x", "c", "missing", ""),
    ]
    assert verdict(findings) == "the main job can run here · missing: c · limited: b"


def test_the_doctor_is_quick_and_plain():
    script = (
        "import sys; from rich.console import Console; from harness.doctor import print_doctor; "
        "code = print_doctor(Console()); assert 'transformers' not in sys.modules; sys.exit(code)"
    )
    # Processor time, because a loaded machine says nothing about the doctor, which waits for nobody.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert done.returncode in (0, 3), done.stderr
    assert "\x1b" not in done.stdout
    able = "the main job can run here" if done.returncode == 0 else "the main job cannot run here"
    assert done.stdout.splitlines()[-1].startswith(able)


def test_the_environment_is_json_and_complete(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    found = environment.capture([f"{ROOT}/x", "--seed", "3"], seeds={"weights": 3})
    json.dumps(found, allow_nan=False)
    assert found["command"] == ["./x", "--seed", "3"]
    assert found["seeds"] == {"weights": 3}
    assert found["variables"]["OMP_NUM_THREADS"] == "2"
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["torch"]["matmul_precision"] in ("highest", "high", "medium")
    assert found["cpu"]["usable"] >= 1
    assert found["started"].endswith("+00:00")
    assert environment.capture(git={"commit": "abc", "dirty": False})["git"]["commit"] == "abc"


def test_the_environment_tells_nothing_private(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MODAL_TOKEN_SECRET", "as-secret")
    monkeypatch.setenv("HOME", "/srv/people/somebody")
    command = [
        "/srv/people/somebody/v/bin/v32",
        "--out=/srv/people/somebody",
        "/home/else/x",
        "/Users/else/y",
    ]
    found = environment.capture(command)
    assert found["command"] == ["~/v/bin/v32", "--out=~", "~/x", "~/y"]
    text = json.dumps(found)
    assert not any(part in text for part in ("secret", "somebody", "else/"))
    node = os.uname().nodename
    assert len(node) < 4 or node not in text


def test_nothing_heavy_is_imported_by_the_environment():
    script = (
        "import sys; from harness.environment import capture; assert capture()['torch'] == {}; "
        "assert not {'torch', 'numpy', 'transformers', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_outside_a_clone_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.git_state() is None
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert environment.git_state() == {"commit": None, "dirty": False}
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(environment, "ROOT", tmp_path / "inner")
    assert environment.git_state() is None
    monkeypatch.setenv("PATH", "")
    assert environment.git_state() is None


def test_a_missing_compiler_is_said_with_what_to_do(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++ -O1")
    (finding,) = [finding for finding in doctor.diagnose() if finding.name == doctor.NATIVE]
    assert (finding.state, finding.detail) == ("limited", "no C++ compiler")
    assert "CXX" in finding.advice
    monkeypatch.setenv("CXX", f"{sys.executable} -O1")
    (finding,) = [finding for finding in doctor.diagnose() if finding.name == doctor.NATIVE]
    assert finding.state == "ok"
