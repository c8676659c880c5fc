"""A checkpoint of the hub on Modal: one shard downloads it to the Volume, then one walks its layers on a GPU.

Not a shard for a range of layers each: a layer's input is what all layers before it made, and one GPU that walks them
keeps that on the results Volume, so that an attempt which was cut goes on from its last layer.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .command import shipped
from .shards import CHECKPOINT, Shard

if TYPE_CHECKING:
    from ..layerwise.command import Request

# Of each of the two steps: 690 GB at 100 MB a second are two hours.
TIMEOUT = 6 * 3600
DOWNLOAD, LAYERS = "download", "layers"
# The published model's folders are called so; where the hub cannot be asked, its sizes are assumed.
PRESET = "v32"
_OWN = ("checkpoint", "subject", "device", "downloaded", "resume", "out")


def checkpoint_shards(request: "Request", on_gpu: bool) -> list[Shard]:
    """The two shards of a walk; with `request.device` left to the GPU.

    Raises:
        ValueError: a folder of this machine, or a subject or a setting that cannot be.
    """
    from ..layerwise.command import check_settings

    if Path(request.checkpoint).exists():
        raise ValueError(
            f"--checkpoint is {request.checkpoint!r}, a folder of this machine, which does not travel to Modal: "
            "give a name on the hub, or a folder on the Volume."
        )
    check_settings(replace(request, device="cpu"))
    subject, files = shipped(request.subject)
    words = ["walk", request.checkpoint, "--downloaded", "--resume", "--subject", subject]
    for item in fields(request):
        value = getattr(request, item.name)
        if item.name not in _OWN and value != item.default:
            words += [f"--{item.name.replace('_', '-')}", str(value)]
    words += ["--device", "cuda"] if on_gpu else []
    revision = () if request.revision is None else ("--revision", request.revision)
    module = "harness.layerwise"
    return [
        Shard(DOWNLOAD, CHECKPOINT, ("download", request.checkpoint, *revision), module=module, on_gpu=False),
        Shard(
            LAYERS, CHECKPOINT, tuple(words), module=module, on_gpu=on_gpu, resumes=True, files=files, after=DOWNLOAD
        ),
    ]


def announced(request: "Request", on_gpu: bool) -> str:
    """What the run will need of disk, memory and time, as far as it is known before anything has been downloaded.

    Raises:
        ValueError: a walk that the model's config, where the hub gives it, does not allow.
    """
    import torch

    from reference import DeepseekV32Config

    from ..layerwise.command import check_config, size_of
    from ..layerwise.needs import needs_of, official_bytes
    from ..layerwise.source import config_of, look_up
    from ..runner import DTYPES

    missing = look_up(request.checkpoint, request.revision)
    known = config_of(request.checkpoint, request.revision) if missing is not None else None
    config = known or DeepseekV32Config.preset(PRESET)
    if known is not None:
        batch, length, layers = check_config(request, known, request.checkpoint)
    else:
        # Another model's number of layers is no reason to refuse this one's.
        assumed = min(request.until or config.num_hidden_layers, config.num_hidden_layers)
        batch, length, layers = size_of(replace(request, until=assumed), config)
    total = missing.total_bytes if missing is not None else official_bytes(config, next_token_layer=True)
    needs = needs_of(
        config, DTYPES.get(request.dtype, torch.bfloat16), "cuda" if on_gpu else "cpu", batch, length, layers,
        disk_bytes=total, read_bytes=int(total * layers / config.num_hidden_layers), missing_bytes=total,
    )  # fmt: skip
    whose = "" if known is not None else " (by the sizes of DeepSeek-V3.2, because the hub cannot be asked from here)"
    return f"{request.checkpoint}{whose}: {needs.sentence()} What the Volume has is not downloaded again."
