"""How a world of ranks is divided: dp × cp × ep × tp, the meshes that follow, and what a config must divide by.

    dp   rows of the batch, parameters sharded (FSDP2)      cp   query rows of each sequence, latents gathered
    ep   routed experts, rows of the batch as well          tp   attention heads, columns and rows of the FFNs, experts

A rank's number counts tp fastest, then ep, cp, dp. To everything but the routed experts dp, cp and ep are one axis of
data, over which parameters are sharded and gradients summed; the experts are cut by ep and tp first, and their slices
are sharded over dp and cp.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from reference.config import DeepseekV32Config

RowOrder = Literal["balanced", "contiguous"]
SIZES = ("dp", "cp", "ep", "tp")
# Names that a size may be given by, besides its own.
OTHER_NAMES = {"fsdp": "dp"}


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Sizes of the four axes; their product is the number of ranks.

    rows: which query rows of a sequence a rank of cp holds. `"contiguous"` is one stretch; `"balanced"` is one stretch
    of the first half and its mirror image in the second, so that every rank meets as many visible keys.

    Raises:
        ValueError: a size below 1, or an unknown order of rows.
    """

    dp: int = 1
    cp: int = 1
    ep: int = 1
    tp: int = 1
    rows: RowOrder = "balanced"

    def __post_init__(self) -> None:
        for name in SIZES:
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"ParallelLayout.{name} is {size!r}; it must be an integer of at least 1.")
        if self.rows not in get_args(RowOrder):
            raise ValueError(f"ParallelLayout.rows is {self.rows!r}; allowed are {', '.join(get_args(RowOrder))}.")

    @classmethod
    def parse(cls, text: str) -> "ParallelLayout":
        """The layout that `text` such as `"fsdp=2,cp=2"` names; `fsdp` is another word for `dp`.

        Raises:
            ValueError: an unknown or repeated name, or a size that is no integer of at least 1.
        """
        sizes: dict[str, int] = {}
        for word in text.split(","):
            given, _, number = (part.strip() for part in word.partition("="))
            name = OTHER_NAMES.get(given, given)
            if name not in SIZES or name in sizes:
                why = "twice" if name in sizes else "which is no axis"
                raise ValueError(
                    f"layout {text!r} names {given!r} {why}; axes are fsdp (or dp), cp, ep, tp, each once."
                )
            if not number.isdecimal() or int(number) < 1:
                raise ValueError(f"layout {text!r} gives {given} the size {number!r}; it must be an integer above 0.")
            sizes[name] = int(number)
        return cls(**cast(dict[str, Any], sizes))

    @property
    def world(self) -> int:
        """Ranks that the layout is made for."""
        return self.dp * self.cp * self.ep * self.tp

    @property
    def data(self) -> int:
        """Ranks that hold different tokens, and shards of each parameter that tp does not cut."""
        return self.dp * self.cp * self.ep

    @property
    def batches(self) -> int:
        """Ranks that hold different rows of the batch."""
        return self.dp * self.ep

    @property
    def expert_parts(self) -> int:
        """Parts that the routed experts are cut into, before sharding."""
        return self.ep * self.tp

    def check(self, config: DeepseekV32Config, world: int) -> None:
        """Refuse a config that does not divide, or another number of ranks.

        Raises:
            ValueError: which size stands against what, as one sentence.
        """
        if self.world != world:
            sizes = " × ".join(f"{name} {getattr(self, name)}" for name in SIZES)
            raise ValueError(f"The layout {sizes} is for {self.world} ranks; {world} are running.")
        replicas = self.dp * self.cp
        shared = config.moe_intermediate_size * config.n_shared_experts
        divides: list[tuple[str, int, str, int]] = []
        if self.tp > 1:
            # A matrix that tp cuts by rows is sharded by columns, which only works in equal parts.
            divides += [
                ("tp", self.tp, "num_attention_heads", config.num_attention_heads),
                ("tp", self.tp, "intermediate_size", config.intermediate_size),
                ("tp", self.tp, "moe_intermediate_size · n_shared_experts", shared),
                ("dp · cp · ep", self.data, "q_lora_rank", config.q_lora_rank),
                ("dp · cp · ep", self.data, "kv_lora_rank", config.kv_lora_rank),
                ("dp · cp · ep", self.data, "hidden_size", config.hidden_size),
            ]
        if self.expert_parts > 1:
            divides += [
                ("ep · tp", self.expert_parts, "n_routed_experts", config.n_routed_experts),
                ("dp · cp", replicas, "2 · moe_intermediate_size", 2 * config.moe_intermediate_size),
                ("dp · cp", replicas, "hidden_size", config.hidden_size),
            ]
        for axis, size, name, number in divides:
            if number % size:
                raise ValueError(f"config.{name} is {number}, which {axis} = {size} does not divide.")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The running ranks as meshes, all over the same world in the same order.

    tokens: (data, tp), what every parameter but the routed experts is laid out on. experts: (replica, expert), what
    those are laid out on. axes: (dp, cp, ep, tp).
    """

    layout: ParallelLayout
    tokens: DeviceMesh
    experts: DeviceMesh
    axes: DeviceMesh

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along `axis` only: data, tp, replica, expert, dp, cp or ep."""
        for mesh in (self.axes, self.tokens, self.experts):
            if axis in (mesh.mesh_dim_names or ()):
                return mesh.get_group(axis)
        raise ValueError(f"axis is {axis!r}; allowed are data, tp, replica, expert, dp, cp, ep.")

    def place(self, axis: str) -> int:
        """This rank's number along `axis`, one of dp, cp, ep, tp."""
        return self.axes.get_local_rank(axis)

    @property
    def batch(self) -> int:
        """Which of `layout.batches` parts of a batch's rows this rank holds."""
        return self.place("dp") * self.layout.ep + self.place("ep")

    def batch_rows(self, rows: int) -> slice:
        """The rows of a batch of `rows` that this rank holds: part `batch` of equal parts, the first ones larger by one.

        Raises:
            ValueError: fewer rows than ranks that hold different ones.
        """
        parts = self.layout.batches
        if rows < parts:
            raise ValueError(f"batch has {rows} rows; with dp · ep = {parts} it needs one or more for each.")
        least, more = divmod(rows, parts)
        first = self.batch * least + min(self.batch, more)
        return slice(first, first + least + (self.batch < more))


def connect(layout: ParallelLayout, device: torch.device) -> Ranks:
    """The meshes of `layout` over the ranks of the default process group, which must have been started.

    Raises:
        ValueError: another number of ranks than the layout's.
    """
    world = dist.get_world_size()
    if world != layout.world:
        raise ValueError(f"The layout is for {layout.world} ranks; {world} are running.")
    shapes = (
        ((layout.data, layout.tp), ("data", "tp")),
        ((layout.dp * layout.cp, layout.expert_parts), ("replica", "expert")),
        (tuple(getattr(layout, name) for name in SIZES), SIZES),
    )
    tokens, experts, axes = (
        init_device_mesh(device.type, shape, mesh_dim_names=tuple(names)) for shape, names in shapes
    )
    return Ranks(layout, tokens, experts, axes)
