"""`modal run` to its end, offline: the client as it is installed, the container's real runtime, and our dispatch between.

One run with an ill-behaved shard of each kind answers most questions, because each run uploads the project.
"""

import signal
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from harness.cli import main
from harness.dispatch.keeping import Kept
from harness.dispatch.modal import HUB_CACHE, HUB_VOLUME, MARGIN, REMOTE_ROOT, RESULTS, RESULTS_VOLUME, pins
from harness.dispatch.shards import Shard, source_files
from reports.records import Status, read_run, verdict_line

from .conftest import ROOT, TOKEN, run, start, until
from .loopback import GPU, Loopback

pytestmark = pytest.mark.loopback
MEETING = ("meet-a", "meet-b", "meet-c")
ILL = ("die", "crash", "exhaust", "hang", "garbage")
ALL = (*MEETING, "fail", "cuda", "once-die", *ILL, "fine")
LIMIT = 20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Loopback(tmp_path_factory.mktemp("loopback"), containers=3) as found:
        yield found


@pytest.fixture(scope="module")
def everything(server, tmp_path_factory):
    """One run of every behaviour: how the client ended, and the folder of its record."""
    out = tmp_path_factory.mktemp("everything")
    words = ("--gpu", "H200,H100", "--timeout", str(LIMIT), "--price", "3.95", "--out", str(out))
    return run(server, "run", "-m", "suites.modal.entry", "--behaviours", ",".join(ALL), *words), out


def shards(out):
    """What the record says of each shard."""
    return {event.data["shard"]: event.data for event in read_run(out).events if event.kind == "shard"}


def test_a_failing_check_is_the_exit_code(everything):
    ended, out = everything
    assert ended.code == 1
    assert read_run(out).footer["exit_code"] == 1
    assert "FAILED: fail.second (float32)" in ended.text.splitlines()[-1]
    assert (out / "report.md").read_text().startswith("## verified ")


def test_three_shards_run_together(everything):
    found = shards(everything[1])
    assert all(found[name]["problem"] == "" for name in MEETING)
    assert len({found[name]["container"] for name in MEETING}) == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("die", "its container died"),
        ("crash", "killed by SIGSEGV"),
        ("exhaust", "ran out of memory"),
        ("hang", f"stopped after {LIMIT} s, its time limit"),
        ("garbage", "is damaged"),
    ],
)
def test_a_shard_that_does_not_work_is_an_error_with_its_log(name, said, everything):
    run_ = read_run(everything[1])
    (error,) = [verdict for verdict in run_.verdicts if verdict.check == f"shard.{name}"]
    assert error.status is Status.ERROR
    assert said in error.reason
    assert error.data["traceback"]
    # What it answered before is not lost either.
    assert f"{name}.first" in {verdict.check for verdict in run_.verdicts if verdict.status is Status.VERIFIED}


def test_the_others_lose_nothing(everything):
    run_ = read_run(everything[1])
    assert run_.complete
    found = {verdict.check for verdict in run_.verdicts}
    assert {f"{name}.{part}" for name in set(ALL) - set(ILL) for part in ("first", "last")} <= found
    assert {check for check in found if check.startswith("shard.")} == {f"shard.{name}" for name in ILL}


def test_a_container_that_dies_is_replaced_and_only_that(everything):
    attempts = {name: facts["attempts"] for name, facts in shards(everything[1]).items()}
    assert attempts == {**dict.fromkeys(ALL, 1), "once-die": 2, "die": 3}


def test_a_container_is_retired_after_a_cuda_error(everything, server):
    found = shards(everything[1])
    retired = found["cuda"]["container"]
    assert retired in server.retired
    asked = [call for call in server.calls.values() if call.container == retired]
    # The container had served a shard before, and served none after.
    assert max(asked, key=lambda call: int(call.id.removeprefix("fc-"))).chunks
    assert [name for name, facts in found.items() if facts["container"] == retired][-1] == "cuda"


def test_the_gpu_asked_for_and_received_its_seconds_and_their_cost_are_on_record(everything):
    facts = shards(everything[1])["fine"]
    assert facts["gpu_asked"] == ["H200", "H100"]
    assert facts["gpu"] == [GPU]
    assert facts["cost"] == pytest.approx(3.95 * facts["seconds"] / 3600, abs=1e-4)
    header = read_run(everything[1]).header
    assert header["device_asked"] == "Modal: H200, H100"
    assert header["command"].startswith("modal run -m suites.modal.entry --behaviours")
    assert header["environment"]["gpu"][0]["name"] == GPU


def test_shards_are_told_of_as_they_end(everything):
    text = everything[0].text
    assert text.index("fail: failed  fail.second") < text.index(f"[{len(ALL)} of {len(ALL)}]")
    assert "trying again" in text


def test_the_images_pins_are_the_projects(everything, server):
    commands = "\n".join(c for r in server.named("ImageGetOrCreate") for c in r.image.dockerfile_commands)
    (line,) = {line for line in commands.splitlines() if "uv pip install" in line}
    installed = {word.strip("'\"") for word in line.split() if "==" in word}
    tested = {line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"}
    # The CUDA build of torch brings the triton that it works with.
    assert installed == {line for line in tested if not line.startswith("triton==")} == set(pins())
    versions = {canonicalize_name(name): version for name, version in (line.split("==") for line in tested)}
    by_name = {canonicalize_name(pin.partition("==")[0]) for pin in installed}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in (
        *project["dependencies"],
        *project["optional-dependencies"]["test"],
        *project["optional-dependencies"]["modal"],
    ):
        asked = Requirement(text)
        name = canonicalize_name(asked.name)
        assert asked.specifier.contains(versions[name]), text
        assert name == "triton" or name in by_name


def test_the_container_gets_all_of_the_project_not_only_python(everything, server):
    sent = {file.filename for files in server.mounts.values() for file in files}
    assert {f"{REMOTE_ROOT}/{path.relative_to(ROOT).as_posix()}" for path in source_files()} == sent
    assert {path.rpartition(".")[2] for path in sent} >= {"py", "json", "safetensors", "cpp", "h", "toml", "txt"}


def test_gpus_limits_and_volumes_are_asked_for(everything, server):
    on_gpu = next(
        request for request in server.named("FunctionCreate")
        if request.function_data.ranked_functions[0].function.function_name == "on_gpu"
    ).function_data.ranked_functions  # fmt: skip
    assert [ranked.function.resources.gpu_config.gpu_type for ranked in on_gpu] == ["H200", "H100"]
    for ranked in on_gpu:
        function = ranked.function
        assert function.timeout_secs == LIMIT + MARGIN
        assert function.retry_policy.retries == 0
        mounts = {mount.mount_path: mount.volume_id for mount in function.volume_mounts}
        assert mounts == {HUB_CACHE: f"vo-{HUB_VOLUME}", RESULTS: f"vo-{RESULTS_VOLUME}"}
        # The token goes to the function that downloads alone.
        assert not function.secret_ids


def test_no_secret_is_on_the_wire_outside_its_own_message(everything, server):
    carrying = {name for name, request in server.requests if TOKEN.encode() in request.SerializeToString()}
    assert carrying == {"SecretGetOrCreate"}
    assert TOKEN not in everything[0].text
    assert not [path for path in everything[1].rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_ctrl_c_stops_the_remote_work_keeps_what_came_and_resume_runs_the_rest(server, tmp_path):
    out = tmp_path / "out"
    words = ("run", "-m", "suites.modal.entry", "--behaviours", "fine,once-hang", "--gpu", "none", "--out", str(out))
    kept = Kept(out)
    hanging = Shard("once-hang", "stand-in", ("once-hang",))
    client = start(server, *words)
    until(lambda: kept.ended(Shard("fine", "", ())) and (kept.folder(hanging) / "run.jsonl").exists())
    client.send_signal(signal.SIGINT)
    text, _ = client.communicate(timeout=60)
    assert client.returncode == 3
    assert "--resume runs the rest" in text
    until(lambda: all(process.returncode is not None for process in server.processes.values()), 30)
    interrupted = read_run(out)
    assert interrupted.footer["ended"] == "interrupted"
    assert {verdict.check for verdict in interrupted.verdicts} == {"fine.first", "fine.last", "once-hang.first"}

    before = len(server.calls)
    resumed = run(server, *words, "--resume")
    assert resumed.code == 0, resumed.text
    assert len(server.calls) == before + 1
    assert read_run(out).complete
    checks = {verdict.check for verdict in read_run(out).verdicts}
    assert checks == {"fine.first", "fine.last", "once-hang.first", "once-hang.last"}


def test_modals_own_time_limit_is_an_error_too(server, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "limit", 8)
    ended = run(
        server, "run", "-m", "suites.modal.entry", "--behaviours", "hang", "--gpu", "none", "--out", str(tmp_path)
    )
    assert ended.code == 3
    (error,) = [verdict for verdict in read_run(tmp_path).verdicts if verdict.status is Status.ERROR]
    assert "Modal stopped its container at the time limit" in error.reason


WRONG = """
from harness.subjects import load_weights
from optimized import DeepseekV32ForCausalLM


def factory(config, state_dict, *, device, dtype):
    state_dict = {name: tensor * 1.04 if "lm_head" in name else tensor for name, tensor in state_dict.items()}
    return load_weights(DeepseekV32ForCausalLM, config, state_dict, device, dtype)
"""


@pytest.mark.parametrize(
    ("program", "entry"),
    [("modal", ("run", str(ROOT / "suites" / "gpu.py"))), ("v32", ("verify", "--on", "modal"))],
    ids=["modal run", "v32 verify"],
)
def test_a_wrong_subject_is_found(program, entry, server, tmp_path):
    subject = tmp_path / "wrong.py"
    subject.write_text(WRONG)
    ended = run(
        server, *entry, "--gpu", "none", "--subject", f"{subject}:factory", "--checks", "parity.logits",
        "--dtype", "float32", "--out", str(tmp_path / "out"), program=program,
    )  # fmt: skip
    assert ended.code == 1, ended.text
    assert "FAILED: parity.logits" in ended.text.splitlines()[-1]
    run_ = read_run(tmp_path / "out")
    assert run_.header["command"].startswith(" ".join((program, *entry[:1])))
    assert {verdict.status for verdict in run_.verdicts} == {Status.FAILED}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpu", "H100:9"), "--gpu is 'H100:9'"),
        (("--timeout", "soon"), "--timeout is 'soon'"),
        (("--config", "huge", "--gpu", "none"), "'huge'"),
    ],
)
def test_wrong_use_is_refused_in_one_sentence(words, said, server):
    ended = run(server, "run", "suites/gpu.py", *words)
    assert ended.code == 2
    assert said in ended.text
    assert "Traceback" not in ended.text


@pytest.mark.slow
def test_tiny_ends_as_it_does_locally(server, tmp_path):
    there = run(
        server, "run", "suites/gpu.py", "--config", "tiny", "--out", str(tmp_path / "there"), patience=5400,
        V32_GPU="none",
    )  # fmt: skip
    with pytest.raises(SystemExit) as here:
        main(["verify", "--config", "tiny", "--out", str(tmp_path / "here")])
    assert there.code == here.value.code == 0, there.text
    local, remote = read_run(tmp_path / "here"), read_run(tmp_path / "there")

    def answers(run_):
        return sorted((v.check, v.family, v.subject, v.case, v.dtype, v.status) for v in run_.verdicts)

    assert answers(local) == answers(remote)
    assert verdict_line(local) == verdict_line(remote)
