"""Where a walk by layers has its files from, and what it takes: a hub on this machine, the disk, memory by measurement."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.layerwise import source
from harness.layerwise.calibrate import write_calibrated
from harness.layerwise.needs import PROCESS_BYTES
from harness.layerwise.source import Missing, check_disk, gigabytes, locate, look_up
from reference import DeepseekV32Config
from reports.records import read_run

from .hub import COMMIT, NAME, Hub

ROOT = Path(__file__).parents[2]
# 51 MB a layer in bf16, nearly all of it experts.
LARGE = {
    "hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 32, "num_hidden_layers": 8,
    "first_k_dense_replace": 0,
}  # fmt: skip


def ran(*words: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.loopback
@pytest.mark.slow
def test_a_download_that_was_cut_goes_on_and_what_it_brought_is_walked(tmp_path):
    model, home, out = tmp_path / "model", tmp_path / "home", tmp_path / "out"
    write_calibrated(model, DeepseekV32Config.preset("tiny"), 3, shard_size="200KB")
    (model / "modeling.py").write_text("raise SystemExit('code of the hub was run')")
    weights = sorted(path.name for path in model.glob("*.safetensors"))
    command = ("harness.layerwise", "download", NAME, "--out", str(out))
    with Hub(model, cut=weights[0]) as hub:
        cut = ran(*command, **hub.environment(home))
    assert cut.returncode == 3, cut.stderr
    assert "the hub's answer was cut" in cut.stderr.splitlines()[-1]
    with Hub(model) as hub:
        whole = ran(*command, **hub.environment(home))
        fetched = {path.rpartition("/")[2] for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path}
    assert whole.returncode == 0, whole.stderr
    # Whole files stay, and what is no weight, config or tokenizer never comes.
    assert fetched == {weights[0]}
    (event,) = read_run(out).events
    assert (event.data["commit"], event.data["checkpoint"]) == (COMMIT, NAME)
    assert event.data["downloaded_bytes"] == (model / weights[0]).stat().st_size
    walked = ran(
        "harness.layerwise", "walk", NAME, "--downloaded", "--until", "1", "--out", str(tmp_path / "walk"),
        HF_HUB_OFFLINE="1", HF_HOME=str(home),
    )  # fmt: skip
    assert walked.returncode == 0, walked.stderr
    assert read_run(tmp_path / "walk").header["checkpoint"]["commit"] == COMMIT


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No hub, and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("downloaded", [True, False])
def test_without_a_network_a_sentence_says_so(downloaded, offline):
    with pytest.raises(ValueError, match="neither the hub nor its cache gives it.*Where there is no network"):
        locate(NAME, downloaded=downloaded)
    assert look_up(NAME) is None


def test_what_the_cache_has_needs_no_network(offline):
    folder = offline / f"models--{NAME.replace('/', '--')}"
    write_calibrated(folder / "snapshots" / COMMIT, DeepseekV32Config.preset("tiny"), 3)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    found = locate(NAME)
    assert (found.directory, found.hub_id, found.commit) == (folder / "snapshots" / COMMIT, NAME, COMMIT)
    assert locate(NAME, COMMIT).commit == COMMIT


@pytest.mark.parametrize("name", ["no such/name here", "a/b/c"])
def test_what_is_no_name_is_refused(name, offline):
    with pytest.raises(ValueError, match="no name that a model on the hub can have"):
        locate(name)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="a file; it must be the folder"):
        locate(str(tmp_path / "model.safetensors"))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(source, "look_up", lambda *_: Missing(700 * 10**9, 690 * 10**9, COMMIT))
    monkeypatch.setattr(source, "_snapshot", lambda *_, **__: pytest.fail("something was fetched"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 500 * 10**9}))
    told = []
    with pytest.raises(ValueError, match=r"needs 692 GB of disk.*500 GB are free.*HF_HOME"):
        locate(NAME, announce=told.append)
    assert told[0].missing_bytes == 690 * 10**9
    check_disk(490 * 10**9, tmp_path / "not" / "there" / "yet", NAME)


def test_sizes_are_readable():
    assert [gigabytes(n) for n in (5e3, 3.2e6, 4.5e8, 1.25e9, 6.886e11)] == [
        "5.0 kB",
        "3.2 MB",
        "0.5 GB",
        "1.2 GB",
        "689 GB",
    ]


@pytest.mark.perf
@pytest.mark.slow
def test_the_peak_is_about_one_layer_however_many_there_are(tmp_path):
    write_calibrated(tmp_path / "small", DeepseekV32Config.preset("tiny"), 3)
    write_calibrated(tmp_path / "large", DeepseekV32Config.preset("tiny", **LARGE), 3, shard_size="20MB")
    # What is freed goes back at once; else the allocator keeps pieces of a layer's size, which a real layer's are not.
    done = ran("suites.checkpoints.layerwise_memory", str(tmp_path), MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr
    two, eight, kept, peak, needed, layer = (int(n) for n in done.stdout.split()[-6:])
    print(
        f"2 layers {two:,}, 8 layers {eight:,}, kept {kept:,}, in all {peak:,}, said {needed:,}, a layer {layer:,} bytes"
    )
    assert layer > 50_000_000
    # As it was read, and the subject's own; more layers are more records and reports, and no more weights.
    assert two > 1.5 * layer
    assert eight < two + 0.7 * layer
    assert kept > eight + 5 * layer
    # What was said before it started was enough, and beside Python's own part not far too much.
    assert peak < needed
    assert 0.5 * eight < needed - PROCESS_BYTES < 4 * eight
