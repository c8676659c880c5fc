"""`v32 golden`: exit codes, one sentence for wrong usage, directories that are whole or not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import main
from harness.goldens import cli, export
from harness.goldens.constants import Constant

ROOT = Path(__file__).resolve().parents[2]
READER = Path(__file__).with_name("read_plain.py")


def golden(*words):
    """The exit code of a command, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main(["golden", *map(str, words)])
    return ended.value.code


def everything_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_export_check_and_update_agree(tmp_path, one_build, capsys):
    target = tmp_path / "deep" / "vectors"
    assert golden("export", target) == 0
    assert capsys.readouterr().out.startswith("exported 17 files · 274 tensors · 68 constants · ")
    before = everything_in(tmp_path)
    assert golden("check", target) == 0
    assert capsys.readouterr().out.startswith("agrees · 274 tensors · 68 constants · ")
    assert golden("update", target) == 0
    assert capsys.readouterr().out == f"unchanged · {target} is what the reference computes\n"
    assert everything_in(tmp_path) == before


def test_an_empty_directory_is_filled(tmp_path, one_build, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert golden("export", ".") == 0
    assert len(list(tmp_path.iterdir())) == 17


def test_check_tells_and_update_mends(directory, one_build, capsys):
    fresh = everything_in(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "index_topk": 8}))
    (directory / "text.inputs.safetensors").unlink()
    assert golden("check", directory) == 1
    *sentences, verdict = capsys.readouterr().out.splitlines()
    assert "config field index_topk is 16, stored 8 (config.json)." in sentences
    assert any(s.startswith("text.inputs.safetensors is missing") for s in sentences)
    assert verdict == f"differs · 3 differences in {directory} · v32 golden update {directory} accepts what is meant"
    assert golden("update", directory) == 0
    *same, verdict = capsys.readouterr().out.splitlines()
    assert same == sentences
    assert verdict == f"updated · 3 differences written to {directory}"
    assert everything_in(directory) == fresh


def test_update_keeps_what_is_not_its_own_and_removes_what_an_earlier_one_wrote(directory, one_build):
    fresh = everything_in(directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"]["old.safetensors"] = {"bytes": 3, "sha256": "0" * 64, "meaning": "Of an earlier version."}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    (directory / "old.safetensors").write_bytes(b"old")
    (directory / "notes").mkdir()
    (directory / "notes" / "mine.txt").write_text("mine")
    (directory / "__init__.py").write_text('"""Mine."""\n')
    assert golden("update", directory) == 0
    assert everything_in(directory) == {**fresh, "notes/mine.txt": b"mine", "__init__.py": b'"""Mine."""\n'}
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_update_works_through_a_link(directory, one_build, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(directory, target_is_directory=True)
    (directory / "config.json").unlink()
    assert golden("update", link) == 0
    assert link.is_symlink()
    assert (directory / "config.json").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_nothing(tmp_path, one_build, monkeypatch, capsys, error):
    written = []

    def failing(descriptor):
        written.append(descriptor)
        if len(written) == 5:
            raise error

    monkeypatch.setattr(export.os, "fsync", failing)
    code = golden("export", tmp_path / "vectors")
    said = capsys.readouterr().err
    if error is KeyboardInterrupt:
        assert code == 130
    else:
        assert code == 2
        assert (
            said
            == f"v32 golden export: DIR is {tmp_path / 'vectors'}, which cannot be written: No space left on device.\n"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing_rename", [1, 2])
def test_an_interrupted_update_leaves_the_old_directory(directory, one_build, monkeypatch, failing_rename):
    (directory / "config.json").write_text("{}")
    before = everything_in(directory.parent)
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == failing_rename:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    assert golden("update", directory) == 130
    assert everything_in(directory.parent) == before
    assert len(calls) >= failing_rename


@pytest.mark.parametrize("command", ["check", "update"])
def test_a_directory_that_holds_no_export_is_refused(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, sentence in (
        ("missing", "which does not exist; v32 golden export writes one."),
        ("file", "which is a file; it must be a directory with an export."),
        ("empty", "which has no manifest.json: it holds no export."),
    ):
        assert golden(command, tmp_path / name) == 2
        said = capsys.readouterr()
        assert (said.out, said.err) == ("", f"v32 golden {command}: DIR is {tmp_path / name}, {sentence}\n")


def test_an_export_takes_the_place_of_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("")
    before = everything_in(tmp_path)
    for name, sentence in (
        ("file", "which is a file; it must be missing or an empty directory."),
        ("folder", "which is not empty; v32 golden update rewrites an earlier export."),
    ):
        assert golden("export", tmp_path / name) == 2
        assert capsys.readouterr().err == f"v32 golden export: DIR is {tmp_path / name}, {sentence}\n"
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("words", [["export"], ["check", "a", "b"], ["check", "--nonsense"], ["forget", "x"]])
def test_wrong_words_are_refused_in_one_sentence(words, capsys):
    assert golden(*words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("v32: ")
    assert said.err.count("\n") == 1


def test_a_place_that_cannot_be_written_is_refused(tmp_path, one_build, capsys):
    (tmp_path / "file").write_text("")
    assert golden("export", tmp_path / "file" / "vectors") == 2
    assert "which cannot be written: " in capsys.readouterr().err


def test_without_the_committed_vectors_a_directory_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "COMMITTED", tmp_path / "none")
    assert golden("check") == 2
    assert "DIR is not given, and its default" in capsys.readouterr().err


def test_a_reference_that_contradicts_the_specification_exports_nothing(
    tmp_path, one_build, vectors, monkeypatch, capsys
):
    monkeypatch.setattr(
        Constant, "disagreement", lambda self: f"constant {self.name}: wrong." if self.name == "kl.mean" else None
    )
    assert golden("export", tmp_path / "vectors") == 1
    assert capsys.readouterr().out == (
        "constant kl.mean: wrong.\nnot exported: the reference disagrees with the specification\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_update_refuses_a_reference_that_contradicts_the_specification(directory, one_build, monkeypatch, capsys):
    before = everything_in(directory.parent)
    monkeypatch.setattr(
        Constant, "disagreement", lambda self: f"constant {self.name}: wrong." if self.name == "kl.mean" else None
    )
    assert golden("update", directory) == 1
    assert capsys.readouterr().out.endswith("not updated: the reference disagrees with the specification\n")
    assert everything_in(directory.parent) == before


def test_a_flood_of_differences_is_cut_unless_all_are_asked_for(directory, one_build, monkeypatch, capsys):
    monkeypatch.setattr(cli, "MOST_SHOWN", 3)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["config"] = dict.fromkeys(manifest["config"], "?")
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert golden("check", directory) == 1
    lines = capsys.readouterr().out.splitlines()
    number = len(manifest["config"])
    assert lines[3] == f"… and {number - 3} more; --all shows them"
    assert len(lines) == 5
    assert golden("check", directory, "--all") == 1
    assert len(capsys.readouterr().out.splitlines()) == number + 1


def test_help_loads_no_model():
    code = (
        "import sys, harness.cli as cli\n"
        "try: cli.main(['golden', '--help'])\n"
        "except SystemExit as end: print('code', end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "code 0 False"
    assert all(command in done.stdout for command in ("export", "check", "update"))


def read_plainly(directory):
    code = f"import runpy, sys; sys.argv = ['', {str(directory)!r}]\ntry: runpy.run_path({str(READER)!r}, run_name='__main__')\n"
    code += "finally: print('torch' in sys.modules, 'safetensors' in sys.modules)"
    return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60)


def test_a_reader_without_torch_recomputes_index_scores(directory):
    done = read_plainly(cli.COMMITTED)
    assert done.stderr == ""
    assert done.returncode == 0
    scores, chosen, imported = done.stdout.splitlines()
    assert scores.startswith("index_scores.0: off by ")
    assert chosen == "topk_indices.0: 0 of 40 rows differ"
    assert imported == "False False"


def test_the_reader_without_torch_can_fail(directory):
    path = directory / "text.sparse.layer0.safetensors"
    content = bytearray(path.read_bytes())
    data = 8 + int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8:data])["index_w"]["data_offsets"]
    # No head weights: every score is 0, and every tie goes to the lowest index.
    content[data + begin : data + end] = bytes(end - begin)
    path.write_bytes(bytes(content))
    done = read_plainly(directory)
    assert done.returncode == 1
    assert "topk_indices.0: 0 of" not in done.stdout
