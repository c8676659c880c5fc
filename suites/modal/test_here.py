"""Shards without Modal: how one is run, kept, tried again, put into one record, and taken up by --resume."""

import json
import re
import shutil
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
from rich.console import Console

from harness.bench.command import Request as BenchRequest
from harness.checks import CHECKS, FAMILIES
from harness.dispatch import fan_out as fanning
from harness.dispatch.command import (
    Settings,
    Training,
    bench_on_modal,
    dispatch,
    settings_for,
    shipped,
    suite_shards,
    verify_on_modal,
)
from harness.dispatch.fan_out import InfrastructureError, Place
from harness.dispatch.keeping import Kept
from harness.dispatch.local import log_tail, run_shard
from harness.dispatch.merging import About, write_record
from harness.dispatch.modal import RESULTS_VARIABLE, gpu_list, has_cuda_error, in_container, with_init_here
from harness.dispatch.shards import FILES, PACKAGES, End, Piece, Shard, fingerprint, verify_shards
from harness.environment import ROOT
from harness.verify import Request as VerifyRequest
from reports.records import RunWriter, Status, read_run
from suites.gpu import training_of

from . import command

LIMIT = 60.0


def stand_in(name: str, on_gpu: bool = False) -> Shard:
    return Shard(name, "stand-in", (name,), module="suites.modal.command", on_gpu=on_gpu)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(fanning, "PAUSE", 0.0)
    monkeypatch.setattr(fanning, "NETWORK_PAUSE", 0.0)
    monkeypatch.setattr("harness.dispatch.command.fingerprint", lambda: "code")
    monkeypatch.setattr("harness.dispatch.command.git_state", lambda: None)
    return tmp_path


class Runs:
    """Runs well-behaved stand-ins in this process, `crash` in one of its own, and remembers which it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []

    def place(self, run_name: str) -> Place:
        def run(shard):
            self.asked.append(shard.name)
            out = self.folder / "results" / run_name / shard.name
            if shard.name.endswith(("crash", "exhaust", "cut")):
                yield from run_shard(shard, out, LIMIT)
                return
            code = command.main(shard.name, out)
            yield End("", code, 2.0, (out / "run.jsonl").read_text(), "a log", ("H100",), "ta-1")

        return Place("here", run, 1)

    def __call__(self, *names: str, resume: bool = False, price: float | None = None) -> int:
        settings = Settings((), int(LIMIT), price, resume, self.folder / "out")
        return dispatch([stand_in(name) for name in names], settings, self.place, Console(quiet=True))

    def record(self):
        return read_run(self.folder / "out")


def statuses(run) -> dict[str, Status]:
    return {verdict.check: verdict.status for verdict in run.verdicts}


def test_a_shard_that_fails_to_work_loses_nothing_of_the_others(here):
    runs = Runs(here)
    assert runs("fine", "crash", "exhaust", "garbage") == 3
    run = runs.record()
    assert run.complete
    found = statuses(run)
    assert found["fine.first"] is found["fine.last"] is found["crash.first"] is Status.VERIFIED
    errors = {verdict.check: verdict for verdict in run.verdicts if verdict.status is Status.ERROR}
    assert set(errors) == {"shard.crash", "shard.exhaust", "shard.garbage"}
    assert "killed by SIGSEGV" in errors["shard.crash"].reason
    assert "ran out of memory" in errors["shard.exhaust"].reason
    assert "Tried to allocate" in errors["shard.exhaust"].data["traceback"]
    assert "damaged" in errors["shard.garbage"].reason
    assert all(error.reproduce for error in errors.values())


@pytest.mark.parametrize(("behaviour", "code"), [("fine", 0), ("fail", 1), ("slower", 4)])
def test_the_exit_code_is_that_of_the_command(behaviour, code, here):
    assert Runs(here)(behaviour) == code


def test_a_command_that_does_not_end_is_stopped_and_what_it_wrote_is_kept(here):
    *pieces, end = run_shard(stand_in("hang"), here / "out", limit=12)
    assert "12 s, its time limit" in end.problem
    assert "hang.first" in "".join(piece.text for piece in pieces)
    # It was asked to end before it was ended, so its record has its last line.
    assert '"ended":"interrupted"' in end.record


def test_resume_runs_only_what_is_missing_and_the_record_is_the_same(here):
    runs = Runs(here)
    assert runs("fine", "once-crash") == 3
    assert runs("fine", "once-crash", resume=True) == 0
    assert runs.asked == ["fine", "once-crash", "once-crash"]
    assert set(statuses(runs.record())) == {"fine.first", "fine.last", "once-crash.first", "once-crash.last"}
    assert runs("fine", "once-crash", resume=True) == 0
    assert len(runs.asked) == 3


def test_resume_keeps_no_answer_of_another_code(here, monkeypatch):
    runs = Runs(here)
    runs("fine")
    monkeypatch.setattr("harness.dispatch.command.fingerprint", lambda: "another")
    runs("fine", resume=True)
    assert runs.asked == ["fine", "fine"]


def test_without_resume_everything_is_run_again(here):
    runs = Runs(here)
    runs("fine")
    runs("fine")
    assert runs.asked == ["fine", "fine"]


def test_the_cost_is_seconds_times_the_price_of_the_gpus_that_were_asked_for(here):
    settings = Settings(("H200:2",), int(LIMIT), 3600.0, False, here / "out")
    # As a training on two GPUs, and a step beside it that asks for none.
    shards = [replace(stand_in("fine", on_gpu=True), ranks=2), stand_in("slower")]
    dispatch(shards, settings, Runs(here).place, Console(quiet=True))
    facts = {event.data["shard"]: event.data for event in read_run(here / "out").events if event.kind == "shard"}
    assert (facts["fine"]["gpu_asked"], facts["fine"]["seconds"], facts["fine"]["cost"]) == (["H200:2"], 2.0, 4.0)
    assert (facts["slower"]["gpu_asked"], facts["slower"]["seconds"], facts["slower"]["cost"]) == ([], 2.0, None)


def test_no_price_and_no_gpu_is_no_cost(here):
    runs = Runs(here)
    runs("fine", price=3600.0)
    (event,) = [event for event in runs.record().events if event.kind == "shard"]
    assert (event.data["gpu_asked"], event.data["cost"]) == ([], None)


def written(folder: Path, device: str, gpu: list[str]) -> None:
    """The record of a shard that ran on such a machine."""
    folder.mkdir(parents=True)
    with RunWriter(folder / "run.jsonl", {"device": device, "subject": device, "environment": {"gpu": gpu}}):
        pass


@pytest.mark.parametrize("names", list(permutations(("download", "layers", "other"))), ids="-".join)
def test_the_merged_record_is_of_the_machine_with_the_gpu_in_whatever_order_shards_stand(names, here):
    kept = Kept(here)
    machines = {"download": ("cpu", []), "layers": ("cuda", ["H200"]), "other": ("cuda", [])}
    shards = [stand_in(name, on_gpu=name != "download") for name in names]
    # A shard that asked for a GPU and reports none is no witness of it.
    for shard in shards:
        written(kept.folder(shard), *machines[shard.name])
    write_record(shards, kept, About("here", ("H200", "H100"), LIMIT, None, ("modal", "run"), None))
    header = read_run(here).header
    assert (header["device"], header["environment"]["gpu"]) == ("cuda", ["H200"])
    # All else is still the first one's.
    assert header["subject"] == machines[names[0]][0]


def scripted(here, *attempts):
    """The end of a shard whose attempts are lists of items; an exception among them is raised."""
    left = list(attempts)

    def run(shard):
        for item in left.pop(0):
            if isinstance(item, BaseException):
                raise item
            yield item

    kept, shard = Kept(here), stand_in("scripted")
    kept.begin([shard], "code", "name", resume=False)
    fanning.fan_out([shard], Place("nowhere", run, 1), kept, Console(quiet=True), lambda: None)
    return kept.ended(shard), kept, len(attempts) - len(left)


WHOLE = (
    '{"record":"header","schema":1,"subject":"x"}\n'
    '{"record":"footer","ended":"complete","exit_code":0}\n'
)  # fmt: skip


def test_a_machine_that_fails_is_replaced(here):
    end, _, tries = scripted(here, [InfrastructureError("gone")], [Piece(0, WHOLE), End("", 0, record=WHOLE)])
    assert (end.problem, end.attempts, tries) == ("", 2, 2)


def test_a_machine_that_always_fails_is_given_up(here):
    end, _, tries = scripted(here, *[[InfrastructureError("gone")]] * 3)
    assert "gone" in end.problem
    assert tries == 1 + fanning.RETRIES


def test_a_download_that_was_cut_is_tried_again_and_what_waits_for_it_runs(here):
    settings = Settings((), int(LIMIT), None, False, here / "out")
    runs = Runs(here)
    shards = [stand_in("once-cut"), replace(stand_in("fine"), after="once-cut")]
    assert dispatch(shards, settings, runs.place, Console(quiet=True)) == 0
    assert runs.asked == ["once-cut", "once-cut", "fine"]
    attempts = {e.data["shard"]: e.data["attempts"] for e in runs.record().events if e.kind == "shard"}
    assert attempts == {"once-cut": 2, "fine": 1}


def test_a_network_that_stays_away_is_given_up_with_its_own_word(here):
    runs = Runs(here)
    assert runs("cut") == 3
    assert len(runs.asked) == 1 + fanning.RETRIES
    (error,) = [verdict for verdict in runs.record().verdicts if verdict.status is Status.ERROR]
    assert "its download was cut" in error.reason
    assert "refused" not in error.reason


@pytest.mark.parametrize("wrong", [ValueError("a bug"), SystemExit(0), KeyboardInterrupt()])
def test_what_is_not_the_machine_is_not_tried_again(wrong, here):
    end, _, tries = scripted(here, [wrong])
    assert type(wrong).__name__ in end.problem
    assert tries == 1


@pytest.mark.parametrize(("items", "said"), [(["<html>"], "<html>"), ([], "without saying how it ended")])
def test_an_answer_that_is_none_is_an_error(items, said, here):
    end, *_ = scripted(here, items)
    assert said in end.problem


def test_a_container_that_takes_over_does_not_garble_the_record(here):
    # The platform leaves out as many pieces of the second container as it has passed on of the first one's.
    first, second = Piece(0, WHOLE[:30]), Piece(44, WHOLE[44:])
    end, kept, _ = scripted(here, [first, second, End("", 0, record=WHOLE)])
    assert end.problem == ""
    assert (kept.folder(stand_in("scripted")) / "run.jsonl").read_text() == WHOLE


def test_a_log_does_not_show_the_token(here, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nobodysBusiness")
    end = list(run_shard(stand_in("tell"), here / "out", LIMIT))[-1]
    assert "the token is <HF_TOKEN>" in end.log
    assert "hf_nobodysBusiness" not in end.log + end.problem
    assert log_tail(here / "out" / "log.txt") == end.log


def test_a_cuda_error_is_seen_in_log_and_record():
    assert has_cuda_error(End("", log="RuntimeError: CUDA error: an illegal memory access was encountered"))
    assert has_cuda_error(End("", record='{"reason":"CUDA error: device-side assert triggered"}'))
    assert not has_cuda_error(End("", record='{"device":"cuda"}', log="all is well"))


def test_the_families_of_verify_are_its_shards():
    shards = verify_shards(("--config", "tiny"), "all", (), True)
    assert [shard.name for shard in shards] == [f"verify-{family}" for family in FAMILIES]
    some = verify_shards((), "kl,parity.logits", (), True)
    assert [shard.words[-1] for shard in some] == ["parity.logits", "kl"]
    assert {check.family for check in CHECKS} == set(FAMILIES)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"suites": ["speed"]}, "'speed'; allowed are verify, kernels, bench, sft"),
        ({"suites": []}, "--suite is empty"),
        ({"config": "huge"}, "'huge'"),
        ({"checks": "nonsense"}, "'nonsense'"),
        ({"checks": ","}, "--checks must name something"),
        ({"subject": "nowhere.py:factory"}, "nowhere.py, which cannot be read"),
        ({"suites": ["kernels"], "gpu": ()}, "--gpu is none"),
    ],
)
def test_a_request_that_cannot_be_run_is_refused_before_it_costs_anything(changed, said):
    given = {"suites": ["verify"], "config": "tiny", "subject": "optimized", "checks": "all", "dtype": "auto",
             "seed": 0, "gpu": ("H100",), **changed}  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(said)):
        suite_shards(**given)


def test_sft_goes_on_from_what_an_earlier_attempt_left():
    (shard,) = suite_shards(["sft"], "tiny", "optimized", "all", "auto", 0, ("H100",))
    assert shard.resumes
    assert shard.words[:3] == ("train", "--stage", "sft")
    assert "--resume" in shard.words


def test_sft_on_several_gpus_is_one_shard_of_as_many_ranks():
    (shard,) = suite_shards(["sft"], "tiny", "optimized", "all", "auto", 0, gpu_list("H200:8,H100:8"))
    assert shard.ranks == 8
    assert shard.launch[:6] == ("torch.distributed.run", "--standalone", "--nproc-per-node", "8", "-m", "harness.cli")
    assert shard.launch[-2:] == ("--parallel", "fsdp=8")
    assert shard.command.startswith(
        "python -m torch.distributed.run --standalone --nproc-per-node 8 -m harness.cli train"
    )


def test_a_stage_starts_from_what_is_on_the_volume_and_shares_the_work_as_asked():
    training = Training("warmup", "20260101-000000-abcdef/dense", "fsdp=2,ep=2")
    (shard,) = suite_shards(["sft"], "tiny", "optimized", "all", "auto", 3, gpu_list("H200:4"), training)
    assert (shard.name, shard.suite, shard.ranks, shard.resumes) == ("warmup", "sft", 4, True)
    assert " ".join(shard.words) == (
        "train --stage warmup --init 20260101-000000-abcdef/dense --seed 3 --resume --device cuda --parallel fsdp=2,ep=2"
    )


@pytest.mark.parametrize(
    ("training", "gpu", "config", "said"),
    [
        (Training("cooldown"), "H200", "tiny", "--stage is 'cooldown'; allowed are dense, warmup, sparse, sft"),
        (Training(init="HERE"), "H200", "tiny", "which does not travel to Modal"),
        (Training(init="RUN/dense"), "H200", "medium", "--config medium cannot be given with --init"),
        (Training(parallel="fsdp=4"), "H200:8", "tiny", "--parallel fsdp=4 is for 4 ranks, and --gpu asks for 8 GPUs;"),
        (Training(parallel="fsdp=2"), "none", "tiny", "--parallel fsdp=2 is for 2 ranks, and --gpu asks for no GPU;"),
        (Training(parallel="fsdp=1"), "H200", "tiny", "--gpu asks for 1 GPU;"),
        (Training(parallel="pp=2"), "H200:2", "tiny", "'pp' which is no axis"),
        (Training(parallel="ep=7"), "H200:7", "tiny", "n_routed_experts is 8, which ep · tp = 7 does not divide"),
    ],
)
def test_a_training_that_cannot_be_is_refused_here(training, gpu, config, said, here):
    training = replace(training, init=training.init.replace("HERE", str(here)))
    with pytest.raises(ValueError, match=re.escape(said)):
        suite_shards(["sft"], config, "optimized", "all", "auto", 0, gpu_list(gpu), training)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((True, "dense", "", "", True), "--stage is 'dense', and --sft is stage sft"),
        ((False, "", "RUN/dense", "", False), "--init is 'RUN/dense', which belongs to a training"),
        ((False, "", "", "fsdp=2", False), "--parallel is 'fsdp=2', which belongs to a training"),
    ],
)
def test_flags_of_a_training_belong_to_one(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        training_of(*given)
    assert training_of(True, "sft", "a/b", "", True) == Training("sft", "a/b", "")


def test_a_container_finds_what_a_training_starts_from(here, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "cache"))
    model = here / "cache" / "models--acme--model"
    (model / "snapshots" / "0123").mkdir(parents=True)
    (model / "snapshots" / "0123" / "config.json").touch()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123")
    (here / "results" / "RUN" / "dense").mkdir(parents=True)

    def found(name):
        shard = Shard("sft", "sft", ("train", "--init", name, "--resume"), on_gpu=False)
        return with_init_here(shard, here / "results").words[2:]

    assert found("RUN/dense") == (str(here / "results" / "RUN" / "dense"), "--resume")
    assert found("acme/model") == (str(model / "snapshots" / "0123"), "--resume")
    assert with_init_here(stand_in("fine"), here) == stand_in("fine")
    monkeypatch.setenv(RESULTS_VARIABLE, str(here / "results"))
    for name in ("acme/other", "RUN/dense/2/3"):
        (end,) = in_container(Shard("sft", "sft", ("train", "--init", name), on_gpu=False), "name", LIMIT)
        assert f"--init is {name!r}, which is no folder on the Volume v32-results" in end.problem


@pytest.mark.slow
def test_such_a_shard_runs_here_on_two_ranks(tmp_path):
    words = ("train", "--stage", "sft", "--config", "tiny", "--steps", "2", "--seq-len", "64", "--batch", "2")
    *_, end = run_shard(Shard("sft", "sft", (*words, "--parallel", "fsdp=2"), ranks=2), tmp_path, 300)
    assert (end.problem, end.exit_code) == ("", 0), end.log
    assert read_run(tmp_path).header["training"]["parallel"]["dp"] == 2


def test_gpus_that_a_shard_would_not_use_are_not_asked_for(tmp_path, capsys):
    settings = settings_for("H200:8", 60, None, False, tmp_path / "out", "gpu")
    shards = suite_shards(["verify"], "tiny", "optimized", "finite", "auto", 0, settings.gpu)
    assert dispatch(shards, settings, None, Console(quiet=True)) == 2
    assert "--gpu asks for 8 GPUs, and" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "H100:9", "H100:8,H200", "none:2", "none,H100", "H 100", ";rm"])
def test_a_gpu_that_modal_does_not_have_is_refused(text):
    with pytest.raises(ValueError, match="--gpu is"):
        gpu_list(text)


def test_gpus_are_taken_in_the_order_in_which_they_are_wanted():
    assert gpu_list("H200, H100!,A100-80GB") == ("H200", "H100!", "A100-80GB")
    assert gpu_list("H200:8,H100:8") == ("H200:8", "H100:8")
    assert gpu_list("none") == ()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"timeout": 5}, "--timeout is 5"),
        ({"timeout": 1e9}, "--timeout is 1e+09"),
        ({"price": -1.0}, "--price is -1.0"),
        ({"resume": True}, "--resume needs --out"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed, said):
    given = {"gpu": "H100", "timeout": 60, "price": None, "resume": False, "out": None, "name": "gpu", **changed}
    with pytest.raises(ValueError, match=re.escape(said)):
        settings_for(**given)


def test_a_subject_of_ones_own_travels_with_its_shard(here):
    (here / "mine.py").write_text("def factory(): ...\n")
    assert shipped(f"{here}/mine.py:factory") == ("mine.py:factory", (("mine.py", "def factory(): ...\n"),))
    assert shipped("optimized") == ("optimized", ())


def test_the_fingerprint_is_of_code_and_goldens(here):
    copy = here / "copy"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    before = fingerprint(copy)
    golden = next((copy / "suites" / "golden").rglob("*.safetensors"))
    golden.write_bytes(golden.read_bytes() + b" ")
    assert fingerprint(copy) != before


def test_what_is_kept_of_a_shard_can_be_read_like_any_run(here):
    runs = Runs(here)
    runs("fine")
    folder = here / "out" / "shards" / "fine"
    assert read_run(folder).complete
    assert json.loads((folder / "end.json").read_text())["problem"] == ""
    assert (folder / "log.txt").read_text() == "a log"


@pytest.fixture
def sent(monkeypatch):
    """What `--on modal` would send, without Modal."""
    found = []
    monkeypatch.setattr(
        "harness.dispatch.command._on_modal", lambda name, shards, settings, console: found.extend(shards())
    )
    return found


def test_verify_on_modal_sends_what_was_asked_for(sent, here):
    asked = VerifyRequest(
        config="small", checks="kl", dtype="bfloat16", seed=3, overrides=("index_topk=8",), cases="text"
    )
    verify_on_modal(asked, Settings(("H100",), 60, None, False, here), Console(quiet=True))
    (shard,) = sent
    assert shard.on_gpu
    assert shard.command == (
        "v32 verify --device cuda --config small --cases text --dtype bfloat16 --seed 3 --set index_topk=8 --checks kl"
    )


def test_bench_on_modal_is_one_shard_because_its_samples_are_paired(sent, here):
    asked = BenchRequest(lengths="512", passes="fwd", floors=True, against="none")
    bench_on_modal(asked, Settings((), 60, None, False, here), Console(quiet=True))
    (shard,) = sent
    assert not shard.on_gpu
    assert shard.command == "v32 bench --against none --lengths 512 --pass fwd --floors"


def test_a_checkpoint_of_this_machine_does_not_travel(sent, here):
    with pytest.raises(ValueError, match="does not travel"):
        verify_on_modal(VerifyRequest(checkpoint=here), Settings((), 60, None, False, here), Console(quiet=True))
