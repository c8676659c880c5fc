"""`modal run suites/gpu.py --checkpoint NAME`: a download on the Volume, then a walk by layers that survives its container."""

import re
import sys

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from rich.console import Console

from harness.dispatch import fan_out as fanning
from harness.dispatch.checkpoint import TIMEOUT, announced, checkpoint_shards
from harness.dispatch.command import dispatch, layerwise_on_modal, settings_for
from harness.dispatch.fan_out import Place
from harness.dispatch.local import CUT, run_shard, was_cut
from harness.dispatch.modal import HUB_VOLUME
from harness.dispatch.shards import End, Shard
from harness.layerwise.calibrate import write_calibrated
from harness.layerwise.command import Request, verify_layers
from harness.layerwise.source import DEFAULT_REVISION, CutError, Missing, UnreachableError, locate
from reference import DeepseekV32Config
from reports.records import Status, read_run
from suites.checkpoints.hub import COMMIT, NAME, Hub
from suites.gpu import early

from . import command
from .conftest import run
from .loopback import Loopback

# Kills its container once, in the second layer: the machine that went away.
SUBJECT = """
import os
import signal
from pathlib import Path

from harness.subjects import load_weights
from optimized import DeepseekV32ForCausalLM

calls = 0


def factory(config, state_dict, *, device, dtype):
    global calls
    calls += 1
    mark = Path(os.environ["V32_RESULTS"]) / "killed"
    if calls == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return load_weights(DeepseekV32ForCausalLM, config, state_dict, device, dtype)


factory.capabilities = frozenset({"tape"})
"""


@pytest.mark.loopback
def test_a_checkpoint_is_downloaded_and_walked_and_a_container_that_dies_costs_no_layer(tmp_path):
    # The Volume with a model in the hub's cache: containers here have no network.
    cache = tmp_path / "server" / f"vo-{HUB_VOLUME}" / "huggingface" / "hub" / f"models--{NAME.replace('/', '--')}"
    write_calibrated(cache / "snapshots" / COMMIT, DeepseekV32Config.preset("tiny"), 3, shard_size="100KB")
    (cache / "refs").mkdir()
    (cache / "refs" / DEFAULT_REVISION).write_text(COMMIT)
    (tmp_path / "mine.py").write_text(SUBJECT)
    out = tmp_path / "out"
    with Loopback(tmp_path / "server", containers=1) as server:
        ended = run(
            server, "run", "suites/gpu.py", "--checkpoint", NAME, "--gpu", "none", "--dtype", "float32",
            "--subject", f"{tmp_path}/mine.py:factory", "--out", str(out), HF_HUB_OFFLINE="1",
        )  # fmt: skip
    assert ended.code == 0, ended.text
    # What it needs is said before anything runs; nobody could be asked, so it is what V3.2 needs.
    assert (
        ended.text.index("689 GB of disk") < ended.text.index("2 shards on Modal") < ended.text.index("layers: began")
    )
    assert ended.text.index("download: no verdict") < ended.text.index("layers: began")
    assert "agrees with the reference in 3 of 3 layers" in ended.text.splitlines()[-1]
    found = read_run(out)
    attempts = {event.data["shard"]: event.data["attempts"] for event in found.events if event.kind == "shard"}
    assert attempts == {"download": 1, "layers": 2}
    assert (out / "shards" / "layers" / "log.txt").read_text().count("--resume: 1 of 3 layers are done") == 1
    assert {verdict.status for verdict in found.verdicts} == {Status.VERIFIED}
    places = [(verdict.check, verdict.case) for verdict in found.verdicts]
    assert len(places) == len(set(places)) == 17
    assert found.header["checkpoint"]["commit"] == COMMIT
    assert found.header["needs"]["disk_bytes"] > 0
    (fetched,) = [event.data for event in found.events if event.kind == "download"]
    assert fetched["commit"] == COMMIT
    rpcs = [name for name, request in server.requests if getattr(request, "volume_id", "") == f"vo-{HUB_VOLUME}"]
    assert "VolumeReload" in rpcs[rpcs.index("VolumeCommit") :]


def stand_in(name: str, after: str = "") -> Shard:
    return Shard(name, "stand-in", (name,), module="suites.modal.command", after=after)


def test_a_shard_that_waits_is_run_after_the_other_and_not_without_it(tmp_path):
    asked = []

    def ran(shard):
        asked.append(shard.name)
        if shard.name == "crash":
            yield End("it was killed")
            return
        code = command.main(shard.name, tmp_path / "records" / shard.name)
        yield End("", code, 1.0, (tmp_path / "records" / shard.name / "run.jsonl").read_text(), "")

    def dispatched(*shards, resume=False):
        settings = settings_for("none", 60, None, resume, tmp_path / "out", "stand-in")
        asked.clear()
        return dispatch(shards, settings, lambda _: Place("here", ran, 4), Console(quiet=True))

    assert dispatched(stand_in("fine", after="slower"), stand_in("slower")) == 4
    assert asked == ["slower", "fine"]
    assert dispatched(stand_in("fine", after="slower"), stand_in("slower"), resume=True) == 4
    assert asked == []
    assert dispatched(stand_in("fine", after="crash"), stand_in("crash")) == 3
    assert asked == ["crash"]
    (error,) = [v for v in read_run(tmp_path / "out").verdicts if v.check == "shard.fine"]
    assert "it waits for crash, which did not do its work" in error.reason


def test_the_shards_of_a_checkpoint_hold_what_was_asked_for():
    download, layers = checkpoint_shards(
        Request(NAME, revision="v1", subject="reference", dtype="float32", seed=3, until=2), on_gpu=True
    )
    assert download.command == f"python -m harness.layerwise download {NAME} --revision v1"
    assert layers.command == (
        f"python -m harness.layerwise walk {NAME} --downloaded --resume --subject reference --revision v1 "
        "--dtype float32 --seed 3 --until 2 --device cuda"
    )
    assert (download.on_gpu, layers.on_gpu, layers.after, layers.resumes) == (False, True, "download", True)


def test_a_folder_of_this_machine_does_not_travel(tmp_path, capsys):
    assert (
        layerwise_on_modal(Request(str(tmp_path)), settings_for("none", 60, None, False, tmp_path, "x"), Console()) == 2
    )
    assert "does not travel to Modal" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--dtype is 'int8'"):
        checkpoint_shards(Request(NAME, dtype="int8"), on_gpu=False)


@pytest.mark.parametrize(
    ("words", "seconds"),
    [((), 3600), (("--checkpoint", NAME), TIMEOUT), (("--checkpoint", NAME, "--timeout", "60"), 60)],
)
def test_a_checkpoint_has_hours_unless_told(words, seconds):
    assert early(list(words))[1] == seconds


# The package of the transport has another name in other versions of the hub's client.
TRANSPORT = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]


def answered(status: int, kind=HfHubHTTPError):
    request = TRANSPORT.Request("GET", "https://hub")
    return kind("the hub's words", response=TRANSPORT.Response(status, request=request))


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TRANSPORT.ConnectError("no route"), CutError),
        (TRANSPORT.ReadTimeout("too slow"), CutError),
        (TRANSPORT.RemoteProtocolError("the peer closed the connection"), CutError),
        (ConnectionResetError(104, "reset by peer"), CutError),
        (TimeoutError("large file"), CutError),
        (RuntimeError("Data processing error"), CutError),
        (OSError("Consistency check failed: file should be of size 9 but has size 4"), CutError),
        (answered(503), CutError),
        (answered(429), CutError),
        (caused(LocalEntryNotFoundError("it was not found"), answered(504)), CutError),
        (caused(LocalEntryNotFoundError("it was not found"), TRANSPORT.ConnectTimeout("too slow")), CutError),
        (LocalEntryNotFoundError("outgoing traffic has been disabled"), UnreachableError),
        (caused(LocalEntryNotFoundError("offline"), OfflineModeIsEnabled("offline")), UnreachableError),
        (answered(401), UnreachableError),
        (answered(403, GatedRepoError), UnreachableError),
        (answered(404, RepositoryNotFoundError), UnreachableError),
        (OSError(28, "No space left on device"), UnreachableError),
        (PermissionError(13, "Permission denied"), UnreachableError),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, Exception) else given.__name__,
)
def test_a_network_that_failed_is_told_apart_from_a_hub_that_refused(error, kind, monkeypatch, capsys, tmp_path):
    def raises(*_, **__):
        raise error

    monkeypatch.setattr("harness.layerwise.source.snapshot_download", raises)
    with pytest.raises(UnreachableError) as found:
        locate(NAME)
    assert type(found.value) is kind
    # The dispatcher has a command's last line alone.
    assert was_cut(2, f"{found.value}\n") == (kind is CutError)
    out = tmp_path / "out"
    assert verify_layers(Request(NAME, out=out), Console(quiet=True)) == (3 if kind is CutError else 2)
    said = capsys.readouterr().err
    assert (CUT in said and "the same command goes on" in said) == (kind is CutError)
    assert "Traceback" not in said and not out.exists()


def test_what_is_no_fault_of_network_or_hub_is_not_hidden(monkeypatch):
    def raises(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr("harness.layerwise.source.snapshot_download", raises)
    with pytest.raises(TypeError, match="a bug"):
        locate(NAME)


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"until": 99}, "--until is 99; it must be 1 … 3"), ({"seq_len": 10**6}, "--seq-len is 1000000")],
)
def test_a_walk_that_cannot_be_is_refused_by_the_config_alone(asked, said, monkeypatch, capsys, tmp_path):
    fetched = []

    def download(name, *, allow_patterns, **how):
        fetched.append(allow_patterns)
        if allow_patterns != ["config.json"]:
            pytest.fail("more than the config was fetched")
        DeepseekV32Config.preset("tiny").save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    monkeypatch.setattr("harness.layerwise.source.snapshot_download", download)
    request = Request(NAME, out=tmp_path / "out", **asked)
    assert verify_layers(request, Console(quiet=True)) == 2
    assert said in capsys.readouterr().err
    assert fetched == [["config.json"]]
    # And on Modal before anything is sent there.
    monkeypatch.setattr("harness.layerwise.source.look_up", lambda *_: Missing(700 * 10**9, 690 * 10**9, COMMIT))
    with pytest.raises(ValueError, match=re.escape(said)):
        announced(request, on_gpu=True)


def test_what_the_hub_does_not_say_refuses_nothing_here(monkeypatch):
    monkeypatch.setattr("harness.layerwise.source.look_up", lambda *_: None)
    assert "by the sizes of DeepSeek-V3.2" in announced(Request(NAME, until=99), on_gpu=True)


@pytest.mark.loopback
@pytest.mark.slow
def test_a_download_that_the_hub_cuts_goes_on_in_the_next_attempt(tmp_path, monkeypatch):
    monkeypatch.setattr(fanning, "NETWORK_PAUSE", 0.0)
    model = tmp_path / "model"
    write_calibrated(model, DeepseekV32Config.preset("tiny"), 3, shard_size="200KB")
    weights = sorted(path.name for path in model.glob("*.safetensors"))
    download, _ = checkpoint_shards(Request(NAME), on_gpu=False)
    with Hub(model, cut=weights[0]) as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)

        def ran(shard):
            for item in run_shard(shard, tmp_path / "results", 300):
                if isinstance(item, End):
                    hub.cut = ""
                yield item

        def place(_):
            return Place("here", ran, 1)

        settings = settings_for("none", 300, None, False, tmp_path / "out", "stand-in")
        dispatch([download], settings, place, Console(quiet=True))
    found = read_run(tmp_path / "out")
    (facts,) = [event.data for event in found.events if event.kind == "shard"]
    assert (facts["attempts"], facts["problem"], facts["exit_code"]) == (2, "", 0)
    (event,) = [event.data for event in found.events if event.kind == "download"]
    # The second attempt had one file to fetch; the others had come whole.
    assert event["downloaded_bytes"] == (model / weights[0]).stat().st_size
