"""GPUs by what their makers' data sheets say: memory, dense bf16 rate, memory bandwidth, links. Nothing here was measured.

Sources, all public: NVIDIA A100 (data sheet of June 2021), H100 (data sheet of 2023, SXM), H200 (data sheet of 2024, SXM),
B200 (data sheets of HGX B200 and DGX B200, 2024). Rates with sparsity in the sheets are halved. Links: NVLink's rate in
the sheets counts both directions, so that one is half of it; a node of 8 GPUs has one network port for each, of 200 Gb/s in
DGX A100 and of 400 Gb/s in DGX H100, H200 and B200 (their data sheets and user guides).
"""

import re
from dataclasses import dataclass
from typing import Self

GPUS_A_NODE = 8


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. memory: bytes. flops: of dense bf16 products a second. bandwidth, nvlink, network: bytes a second, links
    in one direction."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    nvlink: float
    network: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40", 40e9, 312e12, 1.555e12, 300e9, 25e9),
        Gpu("A100", 80e9, 312e12, 2.039e12, 300e9, 25e9),
        Gpu("H100", 80e9, 989.5e12, 3.35e12, 450e9, 50e9),
        Gpu("H200", 141e9, 989.5e12, 4.8e12, 450e9, 50e9),
        Gpu("B200", 180e9, 2250e12, 8.0e12, 900e9, 50e9),
    )
}
_MOST = 65536


@dataclass(frozen=True, slots=True)
class Cluster:
    """So many of one GPU, 8 a node."""

    gpu: Gpu
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """What `text` such as `64xH200` names; `H200` is one of them.

        Raises:
            ValueError: another form, an unknown GPU, or a number that no cluster has.
        """
        found = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?([A-Za-z0-9-]+)", text.strip())
        if found is None:
            raise ValueError(f"--gpus is {text!r}; it must be a number and a type, such as 64xH200.")
        count, name = int(found[1] or 1), found[2].upper()
        if name not in GPUS:
            raise ValueError(f"--gpus names {found[2]!r}; known are {', '.join(GPUS)}.")
        if not 1 <= count <= _MOST:
            raise ValueError(f"--gpus asks for {count}; it must be 1 to {_MOST}.")
        return cls(GPUS[name], count)

    def link(self, first: int, last: int) -> float:
        """Bytes a second between ranks `first` and `last`: NVLink within a node, else the network."""
        return self.gpu.nvlink if first // GPUS_A_NODE == last // GPUS_A_NODE else self.gpu.network

    def __str__(self) -> str:
        return f"{self.count} x {self.gpu.name}"
