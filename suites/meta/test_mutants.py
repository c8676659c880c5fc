"""The mutants, their matrix and their command: known bugs are applied where they say, and every one is noticed."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import optimized
from harness.cases import CASE_NAMES, build_case, calibrated_state
from harness.checks import CHECKS
from harness.cli import main
from harness.mutants import command, matrix
from harness.mutants.catalogue import MUTANTS
from harness.mutants.coverage import ENTRIES, OTHERWISE, coverage
from harness.mutants.matrix import Pass, mutant_called, mutant_subject, select_mutants
from harness.mutants.mutant import bug
from harness.mutants.patching import ROOT, Patch, patched_copy, patched_sources
from harness.runner import Oracles, run
from harness.subjects import resolve_subject
from reference import DeepseekV32Config
from reference.rope import rotary_factor
from reports.html import html
from reports.kills import catalogue_cells, kills
from reports.markdown import markdown
from reports.records import Run, Status, read_run
from suites.meta.test_verify import Silent, plan_of

NONE = bug("", "no-patch", "optimized", "nothing", "none")


def passed(seed=0, **statuses):
    by_name = {name.replace("__", "."): status for name, status in statuses.items()}
    return Pass("x", seed, by_name, {name: "why" for name, status in by_name.items() if status is not Status.VERIFIED})


def test_every_patch_matches_exactly_once_and_leaves_python():
    for mutant in MUTANTS:
        for file, text in patched_sources(mutant.patches).items():
            if file.endswith(".py"):
                compile(text, file, "exec")
            assert text != (ROOT / file).read_text(encoding="utf-8"), mutant.name


def test_mutants_have_names_of_their_own_a_reason_and_a_source():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 65
    for mutant in MUTANTS:
        assert mutant.what.endswith(".")
        assert mutant.source
        assert mutant.of in ("reference", "optimized")
        assert mutant.patches


def test_every_entry_of_the_catalogue_has_a_mutant_or_a_reason():
    assert len(ENTRIES) == len(set(ENTRIES)) == 69
    assert {mutant.entry for mutant in MUTANTS} - {""} <= set(ENTRIES)
    for entry, (names, reason) in coverage().items():
        assert bool(names) != bool(reason), entry
    assert set(OTHERWISE) <= set(ENTRIES)


def test_a_patch_that_no_longer_says_what_it_changes_is_refused():
    with pytest.raises(ValueError, match="must match exactly once, but 'no such text' occurs 0 times"):
        patched_sources([Patch("reference/rope.py", "no such text", "")])
    with pytest.raises(ValueError, match="must match exactly once"):
        patched_sources([Patch("reference/rope.py", "torch", "")])


def test_a_copy_without_patches_computes_the_same_bits():
    config = DeepseekV32Config.preset("tiny")
    state, cpu = calibrated_state(config, 5), torch.device("cpu")
    case = build_case("text", config, seed=5, length=40)
    with mutant_subject(NONE) as subject:
        copied = subject.build(config, state, cpu, torch.float32)
        out = copied(**case.inputs(), output_indexer_kl_loss=True)
    assert not isinstance(copied, optimized.DeepseekV32ForCausalLM)
    ours = optimized.DeepseekV32ForCausalLM
    own = matrix.ours("own", ours, {}).build(config, state, cpu, torch.float32)
    expected = own(**case.inputs(), output_indexer_kl_loss=True)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.indexer_kl_loss, expected.indexer_kl_loss)


def test_a_patched_copy_changes_nothing_of_the_running_code():
    before = set(sys.modules)
    patch = Patch("reference/rope.py", "return yarn_mscale(factor, mscale)", "return 7 * yarn_mscale(factor, mscale)")
    with patched_copy([patch]) as copy:
        yarn = {"rope_type": "yarn", "factor": 40, "mscale": 1, "mscale_all_dim": 1}
        assert copy.reference.rope.rotary_factor(yarn) == pytest.approx(7)
        assert rotary_factor(yarn) == pytest.approx(1)
    assert "reference.rope" in before
    assert matrix.DeepseekV32Config.__module__ == "reference.config"
    assert not [name for name in set(sys.modules) - before if name.startswith("v32_copy")]


# One of each kind, with the families that must notice: the whole matrix is `v32 mutants`.
QUICK = {
    "A01-interleaved-indexer-rope": {"choices", "kl"},
    "A11-unnormalised-query-latent": {"choices", "kl"},
    "A17-no-head-dim-scale": {"kl"},
    "B01-future-keys-without-a-mask": {"choices"},
    "B07-documents-not-kept-apart": {"choices", "parity", "kl"},
    "B10-no-key-read-as-slot-0": {"parity"},
    "B12-off-by-one-k": {"choices"},
    "C03-lost-updates-of-dkv": {"parity"},
    "C09-lse-in-base-2": {"kl"},
    "D04-prediction-over-the-whole-row": {"kl"},
    "D06-input-not-detached": {"kl", "gradients"},
    "D07-indexer-under-no-grad": {"kl", "gradients"},
    "D10-reversed-kl": {"kl"},
    "E01-no-mscale-in-the-softmax-scale": {"parity"},
    "E05-dropped-groups-masked-with-0": {"choices"},
    "gain-of-4-percent": {"parity"},
    "dead-channel": {"parity"},
    "copied-row": {"parity"},
}


@pytest.fixture(scope="module")
def oracles():
    return Oracles()


@pytest.mark.parametrize("name", QUICK)
def test_a_mutant_is_failed_by_the_families_that_must_see_it(name, oracles):
    with mutant_subject(mutant_called(name)) as subject:
        plan = plan_of(subject, checks=("choices", "parity", "kl", "gradients"), without={"dense"})
        failed = {v.family for v in run(plan, Silent(), oracles) if v.status is Status.FAILED}
    assert QUICK[name] <= failed


def test_the_unpatched_copy_is_failed_by_nothing(oracles):
    with mutant_subject(NONE) as subject:
        plan = plan_of(subject, checks=("choices", "parity", "kl", "gradients"), without={"dense"})
        assert [v.check for v in run(plan, Silent(), oracles) if v.status is not Status.VERIFIED] == []


def test_operators_are_made_of_nothing_beside_their_folders():
    """So that a mutant which patches something else need not be tried on them."""
    for folder in matrix.OPERATOR_FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for line in path.read_text("utf-8").splitlines():
                if (found := re.match(r"\s*(?:from|import) (reference|optimized)[.\w]*", line)) is not None:
                    name = found[0].split()[-1].replace(".", "/") + "/"
                    assert name.startswith(matrix.OPERATOR_FOLDERS), f"{path}: {line}"
    with mutant_subject(mutant_called("A01-interleaved-indexer-rope")) as subject:
        assert not subject.operators
    with mutant_subject(mutant_called("C03-native-lost-updates-of-dkv")) as subject:
        assert subject.operators


def test_what_is_kept_of_one_length_does_not_serve_another():
    kept = Oracles()
    subject = resolve_subject("reference")
    for length in (24, 40):
        plan = replace(plan_of(subject, checks=["operators"], cases=()), operator_cases=("causal",), length=length)
        assert {v.status for v in run(plan, Silent(), kept)} <= {Status.VERIFIED, Status.NOT_APPLICABLE}
    assert {bench.case.sizes.slots for bench in kept.benches.values()} == {24, 40}


def test_a_pass_keeps_the_worst_status_of_each_check():
    found = passed(a__b=Status.FAILED, c__d=Status.VERIFIED, e__f=Status.VACUOUS, g__h=Status.ERROR)
    assert found.kills == ["a.b"]
    assert found.alarms == ["a.b", "e.f", "g.h"]


def test_a_mutant_that_no_check_fails_is_a_failure():
    mutant, clean = MUTANTS[0], passed(a__b=Status.VERIFIED)
    survivor = command.verdict_of(mutant, passed(a__b=Status.VERIFIED), clean, 1.0)
    assert survivor.status is Status.FAILED
    assert "a check is missing" in survivor.reason
    killed = command.verdict_of(mutant, passed(a__b=Status.FAILED), clean, 1.0)
    assert killed.status is Status.VERIFIED
    assert killed.data["mutant"]["killed_by"] == ["a.b"]


def test_a_check_that_fails_the_unpatched_copy_kills_nothing():
    mutant = MUTANTS[0]
    found = command.verdict_of(mutant, passed(a__b=Status.FAILED), passed(a__b=Status.FAILED), 1.0)
    assert found.status is Status.FAILED


def test_vacuous_or_raising_checks_kill_nothing():
    found = passed(a__b=Status.VACUOUS, c__d=Status.ERROR)
    verdict = command.verdict_of(MUTANTS[0], found, passed(a__b=Status.VERIFIED, c__d=Status.VERIFIED), 1.0)
    assert verdict.status is Status.FAILED


@pytest.mark.parametrize("status", [Status.FAILED, Status.VACUOUS, Status.ERROR])
def test_any_status_but_verified_on_a_right_subject_is_a_false_alarm(status):
    wrong = passed(a__b=Status.FAILED)
    alarm = command.alarms_verdict("optimized", [passed(1000), passed(1001, a__b=status)], wrong)
    assert alarm.status is Status.FAILED
    assert alarm.measures[0].value == 1
    assert "seed 1001" in alarm.reason
    quiet = command.alarms_verdict("optimized", [passed(1000), passed(1001)], wrong)
    assert quiet.status is Status.VERIFIED


def test_mutants_are_selected_by_name_entry_and_group():
    assert [m.name for m in select_mutants(["B20"])] == ["B20-sink-always-kept"]
    assert {m.entry for m in select_mutants(["C"])} == {m.entry for m in MUTANTS if m.entry.startswith("C")}
    assert len(select_mutants(["all"])) == len(MUTANTS)
    with pytest.raises(ValueError, match="--only names 'Z99'"):
        select_mutants(["Z99"])


def test_a_patch_that_no_longer_fits_is_named_before_anything_runs(monkeypatch):
    stale = bug("", "stale", "reference", "What was there once.", "generic", ("reference/moe.py", "what was there", ""))
    monkeypatch.setattr(matrix, "MUTANTS", [*MUTANTS, stale])
    with pytest.raises(
        ValueError, match="A patch of reference/moe.py must match exactly once, but 'what was there' occurs 0"
    ):
        command.check_request(command.Request(only="stale"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--only", "nobody"], "--only names 'nobody'"),
        (["--only", ""], "--only is empty"),
        (["--without", "parity"], "--without names 'parity'"),
        (["--seeds", "101"], "--seeds is 101; it must be 0 … 100."),
        (["--jobs", "-1"], "--jobs is -1"),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_2(words, sentence, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["mutants", *words, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_list_names_every_mutant(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["mutants", "--list"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(MUTANTS)


@pytest.mark.slow
def test_the_command_writes_a_matrix_that_loses_a_mutant_with_its_only_check(tmp_path):
    request = command.Request(only="A17", seeds=0, jobs=1, out=tmp_path)
    assert command.mutants(request, Console(quiet=True)) == 0
    found = kills(read_run(tmp_path))
    assert found.survivors == ()
    killers = {name for row in found.mutants for name in row.killed_by}
    assert "kl.loss" in killers
    text = (tmp_path / "report.md").read_text()
    assert "2 of 2 mutants killed" in text
    assert "A17-no-head-dim-scale" in text
    without = replace(request, without=",".join(killers), out=tmp_path / "blind")
    assert command.mutants(without, Console(quiet=True)) == 1
    assert kills(read_run(tmp_path / "blind")).survivors == tuple(row.name for row in found.mutants)


def run_of(*killed_by, checks=("a", "b", "c")):
    verdicts = tuple(
        command.verdict_of(
            mutant,
            passed(**dict.fromkeys(names, Status.FAILED)),
            passed(**dict.fromkeys(checks, Status.VERIFIED)),
            1.0,
        )
        for mutant, names in zip(MUTANTS, killed_by, strict=False)
    )
    header = {"checks": list(checks), "catalogue": [{"entry": "A01", "mutants": ["m"], "reason": ""}]}
    return Run(header, verdicts)


def test_the_matrix_names_redundant_checks_and_sole_killers():
    found = kills(run_of(["a"], ["a", "b"]))
    rows = {row.name: row for row in found.checks}
    assert (rows["a"].kills, rows["a"].redundant, rows["a"].alone) == (2, False, (MUTANTS[0].name,))
    assert (rows["b"].kills, rows["b"].redundant) == (1, True)
    assert (rows["c"].kills, rows["c"].redundant) == (0, True)
    assert found.survivors == ()
    lines = found.lines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[1:] == ["●", "·", "·"]


def test_turning_a_needed_check_off_leaves_a_survivor():
    whole, blind = kills(run_of(["a"], ["a", "b"])), kills(run_of([], ["b"], checks=("b", "c")))
    needed = [row.name for row in whole.checks if not row.redundant]
    assert needed == ["a"]
    assert blind.survivors == (MUTANTS[0].name,)


def test_the_report_shows_matrix_mutants_and_catalogue():
    run_ = run_of(["a"], [])
    text = markdown(run_)
    assert "1 of 2 mutants killed" in text
    assert MUTANTS[1].name in text
    assert "redundant here" in text
    assert catalogue_cells(run_) == [["A01", "m"]]
    assert kills(Run({})) is None
    assert "False alarms on right subjects were not counted." in text
    clean, loud = ({"a": Status.VERIFIED, "b": Status.VERIFIED}, {"a": Status.FAILED, "b": Status.VERIFIED})
    alarms = tuple(
        command.alarms_verdict(name, [replace(passed(**statuses), verdicts=2)], passed(**loud))
        for name, statuses in (("optimized", clean), ("reference", loud))
    )
    counted = replace(run_, verdicts=(*run_.verdicts, *alarms))
    assert "False alarms on right subjects: 1 of 4 verdicts, 2 seeds." in markdown(counted)
    assert "False alarms on right subjects: 1 of 4 verdicts, 2 seeds." in html(counted)


def test_records_of_mutants_hold_the_patches(tmp_path):
    verdict = run_of(["a"]).verdicts[0]
    json.dumps(verdict.data)
    assert verdict.data["mutant"]["patches"][0]["file"] == MUTANTS[0].patches[0].file


def test_checks_known_to_the_matrix_are_those_of_the_harness():
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_reasons_of_entries_without_a_mutant_promise_nothing():
    for entry, reason in OTHERWISE.items():
        assert not re.search(r"\byet\b|\bstep\b|\blater\b", reason), entry


def test_every_kind_of_right_subject_meets_every_case():

    held_out = len(matrix.HELD_OUT)
    for place in range(len(matrix.RIGHT)):
        numbers = range(place, held_out, len(matrix.RIGHT))
        assert {number % len(CASE_NAMES) for number in numbers} == set(range(len(CASE_NAMES)))


def test_an_alarm_verdict_names_checks_that_never_looked():
    right = [passed(1000, a__b=Status.NOT_APPLICABLE, c__d=Status.VERIFIED)]
    verdict = command.alarms_verdict("optimized", right, passed(a__b=Status.FAILED))
    assert verdict.data["checks_that_did_not_apply"] == ["a.b"]
    assert {m.name: m.value for m in verdict.measures}["checks that judged it"] == 1
