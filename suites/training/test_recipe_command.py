"""`v32 recipe`: rows as they are ready, the table in the report, and one sentence for what cannot be done."""

from dataclasses import replace

import pytest

from harness.cli import main
from harness.training import recipe
from harness.training.faults import fault_called
from reports.records import read_run
from reports.schema import Status
from suites.support import tiny
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


@pytest.mark.parametrize("given_up", ["dense", "warmup"])
def test_a_loss_that_is_not_finite_ends_the_run_in_one_sentence(given_up, tmp_path, monkeypatch, capsys):
    def diverging(name, config):
        stage = two_steps(name, config)
        rate = {
            "lr": 1e30,
            "lr_matrices": stage.lr_matrices and 1e30,
            "lr_indexer": stage.lr_indexer and 1e30,
            "clip": None,
        }
        return replace(stage, ramp=0, **(rate if name == given_up else {}))

    made = []

    def second_diverges(config, seed, *, stages, **more):
        made.append(one_seed(config, seed, stages=diverging, **more) if seed else done)
        return made[-1]

    one_seed = recipe.one_seed
    done = one_seed(tiny(), 0, faults=(), count=1, stages=two_steps)
    monkeypatch.setattr(recipe, "one_seed", second_diverges)
    assert v32("--config", "tiny", "--seeds", "3", "--no-faults", "--out", str(tmp_path)) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("v32 recipe: Seed 1, recipe: Step ") and said.endswith("is not finite; no update was made.")
    run = read_run(tmp_path)
    assert run.footer is not None and len(made) == 1
    last = run.verdicts[-1]
    assert (last.check, last.case, last.status) == ("train.losses", f"{given_up}, seed 1", Status.FAILED)
    assert all(null.rejected for null in last.nulls) and "is not finite" in last.reason
    # What the seed before has shown is kept.
    assert len(run.verdicts) == 5
    assert {len(m.samples) for m in run.measurements} == {1}
    assert "is not finite" in (tmp_path / "report.md").read_text()


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
