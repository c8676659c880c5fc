"""What a walk by layers takes of disk, memory and time, said before it starts.

Memory: a layer's weights in the run's dtype twice (as read, and the subject's own copy), its other weights than the
experts' once more in fp64, one expert in fp64, and the activations, of which the fp64 reference's are the largest. Time:
what must be read at the rate that was measured on these files, and matrix products at the rates that were measured on
this device; the first layer's own time then takes the place of the estimate.

Letters: B batch, L rows = S key slots, M hidden_size, H heads, N nope dim, V v_head_dim, J indexer heads.
"""

import time
from dataclasses import asdict, dataclass
from math import prod

import torch
from transformers.initialization import no_init_weights

from reference import DeepseekV32Config, DeepseekV32ForCausalLM
from reference.checkpoint import is_fp32, is_quantised, official_parts
from reference.fp8_blocks import scale_shape
from reports.strict_json import JSON
from reports.text import duration

from ..bench.flops import model_flop
from ..bench.point import FORWARD
from ..environment import memory_gib
from ..rowwise import ROWS
from .layer import LayerFiles, one_layer
from .source import gigabytes

# Python with torch, and the tables of what is where.
PROCESS_BYTES = 2 << 30
# Tensors of [B, L, S] and of [B, L, M] in fp64 that stand at the same time while a stage is judged.
_JUDGED_AT_ONCE = 8
# Of matrices for the rate of products: large enough for a rate, small enough for a slow core.
_SIDE = {"cpu": 768, "cuda": 8192}
_READ_TO_MEASURE = 256 << 20
# Assumed where nothing can be measured yet: what a network disk gives one reader.
ASSUMED_RATE = 1e9


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes of files read and dequantised a second; FLOP/s of products in fp64 and in the run's dtype."""

    reading: float
    fp64: float
    dtype: float


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes and seconds. `seconds` is None before rates are measured; `device_bytes` is 0 where the CPU computes."""

    disk_bytes: int
    missing_bytes: int
    read_bytes: int
    layers: int
    layer_bytes: int
    host_bytes: int
    device_bytes: int
    flop: float
    seconds: float | None = None

    def facts(self) -> dict[str, JSON]:
        """For a record."""
        return asdict(self)

    def sentence(self) -> str:
        """For a reader."""
        to_come = f", {gigabytes(self.missing_bytes)} of it to be downloaded" if self.missing_bytes else ""
        memory = f"{gigabytes(self.host_bytes)} of memory"
        if self.device_bytes:
            memory = f"{gigabytes(self.device_bytes)} of GPU memory and {memory}"
        once = self.read_bytes / ASSUMED_RATE
        takes = (
            f"about {duration(self.seconds)}" if self.seconds is not None
            else f"{duration(once)} for each pass over the files at 1 GB/s, which is assumed until it can be measured"
        )  # fmt: skip
        return (
            f"{self.layers} layers, {gigabytes(self.layer_bytes)} the largest: {gigabytes(self.disk_bytes)} of disk{to_come}; "
            f"{memory}; {takes}."
        )


def needs_of(
    config: DeepseekV32Config, dtype: torch.dtype, device: str, batch: int, length: int, layers: int, *,
    disk_bytes: int, read_bytes: int, missing_bytes: int = 0, rates: Rates | None = None,
) -> Needs:  # fmt: skip
    """What a walk over `layers` layers takes on a device of type `device`."""
    parameters = [_layer_parameters(config, index) for index in {0, layers - 1}]
    most, experts = max(parameters)
    memory = 2 * most * dtype.itemsize + 8 * (most - experts) + _activations(config, batch, length)
    memory += 8 * 3 * config.hidden_size * config.moe_intermediate_size
    table = config.vocab_size * config.hidden_size
    # The head reads a table of the vocabulary in its dtype, and multiplies in fp32.
    memory = max(memory, table * (dtype.itemsize + 4))
    once = layers * model_flop(one_layer(config, layers - 1, batch * length), FORWARD, length, batch, dense=True)
    seconds = None
    if rates is not None:
        # The reference meets every pair of a row and a key, of which model_flop counts the causal half.
        seconds = read_bytes / rates.reading + 2 * once / rates.fp64 + 3 * once / rates.dtype
    on_gpu = device == "cuda"
    return Needs(
        disk_bytes, missing_bytes, read_bytes, layers, most * dtype.itemsize,
        host_bytes=PROCESS_BYTES + (table * dtype.itemsize if on_gpu else memory),
        device_bytes=memory if on_gpu else 0, flop=5 * once, seconds=seconds,
    )  # fmt: skip


def _layer_parameters(config: DeepseekV32Config, index: int) -> tuple[int, int]:
    """Parameters of a layer, and how many of them are routed experts'."""
    with torch.device("meta"), no_init_weights():
        held = DeepseekV32ForCausalLM(one_layer(config, index, 1)).model.layers.state_dict()
    counts = {name: tensor.numel() for name, tensor in held.items()}
    return sum(counts.values()), sum(n for name, n in counts.items() if ".experts." in name)


def _activations(config: DeepseekV32Config, batch: int, length: int) -> int:
    """Bytes of the fp64 reference's largest tensors, ROWS rows of a head's probabilities among them."""
    c = config
    rows = min(ROWS, length)
    slices = batch * rows * length * (3 * c.num_attention_heads + 2 * c.index_n_heads)
    expanded = batch * length * c.num_attention_heads * 2 * (c.qk_nope_head_dim + c.v_head_dim + c.qk_rope_head_dim)
    kept = _JUDGED_AT_ONCE * batch * length * (length + c.hidden_size)
    return 8 * (slices + expanded + kept)


def official_bytes(config: DeepseekV32Config, *, next_token_layer: bool) -> int:
    """Bytes of tensors in the published layout in FP8, by the config alone.

    next_token_layer: with the layer behind the last, which predicts further tokens and which the published files hold.
    """
    with torch.device("meta"), no_init_weights():
        parts = official_parts(DeepseekV32ForCausalLM(config).state_dict())
    sizes = {name: _official_size(name, part.shape) for name, part in parts.items()}
    total = sum(sizes.values())
    if next_token_layer:
        # A layer like the last, an embedding and a head of its own, and the projection of two states to one.
        last = f"model.layers.{config.num_hidden_layers - 1}."
        total += sum(size for name, size in sizes.items() if name.startswith(last) or ".layers." not in name)
        total += 2 * 2 * config.hidden_size**2
    return total


def _official_size(name: str, shape: tuple[int, ...]) -> int:
    if is_quantised(name):
        rows, columns = shape
        return prod(shape) + 4 * prod(scale_shape((rows, columns)))
    return prod(shape) * (4 if is_fp32(name) else 2)


def measure_rates(files: LayerFiles) -> Rates:
    """The rates on these files and this device: some tensors of the last layer are read, and three products made."""
    device, dtype = files.device, files.dtype
    last = f"model.layers.{files.config.num_hidden_layers - 1}."
    done, started = 0, time.perf_counter()
    for name, stored in files.checkpoint.tensors.items():
        if name.startswith(last):
            stored.read().to(device)
            done += stored.size
            if done >= _READ_TO_MEASURE:
                break
    reading = done / (time.perf_counter() - started)
    return Rates(reading, _product_rate(torch.float64, device), _product_rate(dtype, device))


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    side = _SIDE[device.type]
    x = torch.ones(side, side, dtype=dtype, device=device)
    best = float("inf")
    # The first one warms up.
    for _ in range(3):
        started = time.perf_counter()
        # Reading an entry waits for the device.
        float((x @ x)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def memory_warning(needs: Needs, device: torch.device) -> str:
    """A sentence where the memory that is there is less than what is needed, else an empty text."""
    if device.type == "cuda":
        there, needed, where = torch.cuda.get_device_properties(device).total_memory, needs.device_bytes, "the GPU"
    else:
        gib = memory_gib()
        there, needed, where = 0 if gib is None else int(gib * 2**30), needs.host_bytes, "this machine"
    if not there or needed <= there:
        return ""
    return (
        f"{where[0].upper()}{where[1:]} has {gigabytes(there)} of memory, less than the {gigabytes(needed)} that this takes by estimate: "
        "it may not come to its end. A smaller --seq-len, --batch 1 or --dtype bfloat16 take less."
    )
