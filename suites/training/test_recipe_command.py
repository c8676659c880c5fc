"""`v32 recipe`: rows as they are ready, the table in the report, and one sentence for what cannot be done."""

import pytest

from harness.cli import main
from harness.training import recipe
from harness.training.faults import fault_called
from reports.records import read_run
from suites.training.test_table import two_steps


def v32(*words):
    with pytest.raises(SystemExit) as ended:
        main(["recipe", *words])
    return ended.value.code


@pytest.mark.slow
def test_the_table_is_trained_recorded_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "stage_for", two_steps)
    monkeypatch.setattr(recipe, "COUNT", 2)
    monkeypatch.setattr(recipe, "FAULTS", (fault_called("no ReLU"),))
    # Two steps teach nothing, and the run says so.
    assert v32("--config", "tiny", "--seeds", "2", "--out", str(tmp_path)) == 1
    run = read_run(tmp_path)
    assert run.footer is not None
    assert len(run.verdicts) == 8
    assert {len(m.samples) for m in run.measurements} == {2}
    page = (tmp_path / "report.md").read_text()
    for text in (
        "After the warm-up, by selection",
        "| indexer |",
        "| recent |",
        "dense trained equally long",
        "no ReLU",
    ):
        assert text in page, text
    assert "Which numbers notice a fault" in page
    assert "What the recipe is worth" in (tmp_path / "report.html").read_text()
    assert "captured" in capsys.readouterr().out
    assert (tmp_path / "weights" / "seed1" / "sparse" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--config", "huge"), "huge"),
        (("--seeds", "0"), "--seeds is 0; it must be 1 or more."),
        (("--seeds", "1", "--out", "/dev/null/x"), "cannot be a folder"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(words, sentence, capsys):
    assert v32(*words) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
