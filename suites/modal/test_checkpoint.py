"""`modal run suites/gpu.py --checkpoint NAME`: a download on the Volume, then a walk by layers that survives its container."""

import pytest
from rich.console import Console

from harness.dispatch.checkpoint import TIMEOUT, checkpoint_shards
from harness.dispatch.command import dispatch, layerwise_on_modal, settings_for
from harness.dispatch.fan_out import Place
from harness.dispatch.modal import HUB_VOLUME
from harness.dispatch.shards import End, Shard
from harness.layerwise.calibrate import write_calibrated
from harness.layerwise.command import Request
from harness.layerwise.source import DEFAULT_REVISION
from reference import DeepseekV32Config
from reports.records import Status, read_run
from suites.checkpoints.hub import COMMIT, NAME
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
    assert rpcs.index("VolumeCommit") < rpcs.index("VolumeReload")


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
