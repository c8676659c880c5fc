"""The vectors as the reference computes them now, once for all tests, and an export that a test may damage."""

import shutil

import pytest

from harness.goldens import compare
from harness.goldens.export import export_files
from harness.goldens.vectors import build_vectors


@pytest.fixture(scope="session")
def vectors():
    return build_vectors()


@pytest.fixture(scope="session")
def _exported(vectors, tmp_path_factory):
    directory = tmp_path_factory.mktemp("golden") / "fresh"
    directory.mkdir()
    for name, content in export_files(vectors).items():
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture
def directory(_exported, tmp_path):
    """A fresh export of the test's own."""
    return shutil.copytree(_exported, tmp_path / "export")


@pytest.fixture
def one_build(monkeypatch, vectors):
    """Commands and comparisons use the vectors that are built already."""
    monkeypatch.setattr("harness.goldens.vectors.build_vectors", lambda: vectors)
    monkeypatch.setattr(compare, "build_vectors", lambda _weights: vectors)
