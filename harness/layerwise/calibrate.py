"""Measures how much of the layers' budgets a right subject uses: `python -m harness.layerwise calibrate`.

The numbers of "layer …" in budgets.py are from here: calibrated weights, written and read back in the official FP8.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import reference
from reference import DeepseekV32Config, DeepseekV32ForCausalLM
from reports.schema import Status, Verdict

from ..calibrate import HELD_OUT
from ..cases import calibrated_state
from ..runner import DTYPES
from ..subjects import load_weights, resolve_subject, with_backend
from ..verify import length_for
from .layer import LayerFiles
from .tokens import tokens
from .walk import Walk


def used_budgets(
    backend: str | None, seeds: Iterable[int], config_name: str = "tiny"
) -> tuple[dict[tuple[str, str, str], float], list[Verdict]]:
    """Largest share of each budget used over `seeds`, by (stage, dtype, measure), and the verdicts that did not verify.

    Raises:
        ValueError: a seed that is kept for counting false alarms, or a backend that there is not.
    """
    shares: dict[tuple[str, str, str], float] = defaultdict(float)
    others = []
    subject = resolve_subject("optimized")
    subject = subject if backend is None else with_backend(subject, backend)
    for seed in seeds:
        if seed >= HELD_OUT:
            raise ValueError(f"seed is {seed}; seeds from {HELD_OUT} on never set a budget.")
        with TemporaryDirectory() as folder:
            directory = Path(folder) / "checkpoint"
            write_calibrated(directory, DeepseekV32Config.preset(config_name), seed)
            for dtype in DTYPES.values():
                files = LayerFiles(directory, dtype, torch.device("cpu"))
                walk = Walk(subject, files, seed, str)
                ids_BL, _ = tokens(directory, files.config, 2, max(length_for(files.config), 96), seed)
                x_BLM = walk.embedded(ids_BL)
                for layer in range(files.config.num_hidden_layers):
                    walked = walk.layer(layer, x_BLM)
                    x_BLM = walked.next_BLM
                    for verdict in map(walked.verdict, walked.stages):
                        if verdict.status is not Status.VERIFIED:
                            others.append(verdict)
                        for measure in verdict.measures:
                            if measure.budget:
                                key = (verdict.check, verdict.dtype, measure.name)
                                shares[key] = max(shares[key], measure.used or 0.0)
    return dict(shares), others


def write_calibrated(directory: Path, config: DeepseekV32Config, seed: int, shard_size: int | str = "5GB") -> None:
    """A checkpoint with calibrated weights in the official layout, linear layers in FP8."""
    model = load_weights(
        DeepseekV32ForCausalLM, config, calibrated_state(config, seed), torch.device("cpu"), torch.float32
    )
    assert isinstance(model, DeepseekV32ForCausalLM)
    reference.save_official(model, directory, "fp8", shard_size=shard_size)
