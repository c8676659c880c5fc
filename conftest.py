"""What every suite shares: Hypothesis profiles, the device, the seed, threads, and who is skipped."""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a GPU the Triton kernels are interpreted. Triton reads this when it is first imported, which torch puts off.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A first forward compiles and allocates, so a deadline for one example would only measure the machine.
settings.register_profile("dev", max_examples=20, deadline=None)
# Derandomized: two CI runs of one commit judge the same examples.
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("thorough", max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PROFILES = ("dev", "ci", "thorough")

SEED = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device that the suites run on: cpu, cuda or cuda:N")


def pytest_configure(config: pytest.Config) -> None:
    profile = os.environ.get("V32_HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
    if profile not in PROFILES:
        raise pytest.UsageError(f"V32_HYPOTHESIS_PROFILE is {profile!r}, but the profiles are {', '.join(PROFILES)}.")
    settings.load_profile(profile)

    device = config.getoption("--device")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device is {device!r}, but the suites run on cpu, cuda or cuda:N.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device is {device!r}, but torch finds no CUDA device on this machine.")

    # Workers that each take every core slow one another down.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="This test needs a CUDA device, and torch finds none.")
    no_network = pytest.mark.skip(reason="This test reaches beyond this machine; set V32_NETWORK=1 to run it.")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("network") and os.environ.get("V32_NETWORK") != "1":
            item.add_marker(no_network)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device named by --device."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def seed() -> int:
    """The seed that every test starts from."""
    return SEED


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    """Seed every generator before each test, so that no test depends on the order of the others."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
