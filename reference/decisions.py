"""The decision tape: the discrete choices of one forward, recorded or replayed.

A forward of V3.2 chooses keys (top-k of the index scores) and experts. One flipped choice hides or
fakes every number behind it, so two models are compared by replaying one tape in both.

Indices count from the row's own document start, pads left out: a tape's values do not depend on
padding, packing, chunking or cache.

Letters: B batch, L rows, K chosen keys, T chosen experts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = "v32-decisions-1"


@dataclass(frozen=True, slots=True, eq=False)
class LayerDecisions:
    """One layer's choices.

    topk_indices: int32 `[B, L, K]`, ascending, −1 at the tail and in pad rows; None in dense mode.
    expert_indices: int32 `[B, L, T]`, ascending, −1 in pad rows; None in dense-FFN layers.
    """

    topk_indices: torch.Tensor | None = None
    expert_indices: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "LayerDecisions":
        """The same choices on another device."""
        return LayerDecisions(*(None if x is None else x.to(device) for x in (self.topk_indices, self.expert_indices)))


@dataclass(frozen=True, slots=True, eq=False)
class Decisions:
    """All layers' choices, indexable and iterable by layer."""

    layers: tuple[LayerDecisions, ...]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer_idx: int) -> LayerDecisions:
        return self.layers[layer_idx]

    def __iter__(self) -> Iterator[LayerDecisions]:
        return iter(self.layers)

    def to(self, device: torch.device | str) -> "Decisions":
        """The same tape on another device."""
        return Decisions(tuple(layer.to(device) for layer in self.layers))

    def rows(self, start: int, stop: int) -> "Decisions":
        """The tape of rows [start, stop): what a chunk of a prefill, or one step of a decode, replays."""
        return Decisions(
            tuple(
                LayerDecisions(*(None if x is None else x[:, start:stop] for x in (d.topk_indices, d.expert_indices)))
                for d in self.layers
            )
        )

    @staticmethod
    def cat(tapes: Iterable["Decisions"]) -> "Decisions":
        """Tapes of consecutive chunks, joined along the rows; narrower top-k lists are filled with −1."""
        per_layer = zip(*(tape.layers for tape in tapes), strict=True)
        return Decisions(
            tuple(
                LayerDecisions(_cat([d.topk_indices for d in chunk]), _cat([d.expert_indices for d in chunk]))
                for chunk in per_layer
            )
        )

    def save(self, path: str | Path) -> None:
        """Write the tape as safetensors."""
        tensors = {}
        for i, layer in enumerate(self.layers):
            for name in ("topk_indices", "expert_indices"):
                if (value := getattr(layer, name)) is not None:
                    tensors[f"layers.{i}.{name}"] = value.contiguous().cpu()
        save_file(tensors, str(path), metadata={"format": FORMAT, "layers": str(len(self.layers))})

    @staticmethod
    def load(path: str | Path) -> "Decisions":
        """Read a tape written by `save`.

        Raises:
            ValueError: the file is not a decision tape, or it is damaged.
        """
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(
                        f"{path} is not a decision tape: its format is {metadata.get('format')!r}, not {FORMAT!r}."
                    )
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as a decision tape: {error}.") from error
        names = ("topk_indices", "expert_indices")
        layers = metadata.get("layers", "")
        if not layers.isdecimal():
            raise ValueError(f"{path} is not a decision tape: its number of layers is {layers!r}.")
        return Decisions(
            tuple(LayerDecisions(*(held.get(f"layers.{i}.{name}") for name in names)) for i in range(int(layers)))
        )


def check_topk_replay(relative_BLK: torch.Tensor, visible_BL: torch.Tensor, layer_idx: int) -> None:
    """Refuse a replayed selection that this layout cannot hold.

    Args:
        visible_BL: number of visible keys a row (0 for pad rows, which are not looked at).

    Raises:
        ValueError: wrong shape or dtype, an index that is out of range, repeated, out of order or after a −1,
            or a real row without a key.
    """
    name = f"decisions, layer {layer_idx}: topk_indices"
    if relative_BLK.dim() != 3 or relative_BLK.shape[:2] != visible_BL.shape:
        raise ValueError(f"{name} has shape {tuple(relative_BLK.shape)}; it must be {[*visible_BL.shape, 'k']}.")
    if relative_BLK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {relative_BLK.dtype}; it must be int32 or int64.")
    real = (visible_BL > 0)[..., None]
    before, after = relative_BLK[..., :-1], relative_BLK[..., 1:]
    ascending = ((after > before) & (before >= 0)) | (after == -1)
    in_range = (relative_BLK >= -1) & (relative_BLK < visible_BL[..., None])
    if bool((~(in_range | ~real)).any()):
        raise ValueError(f"{name} holds an index outside its row's document, or after its row's own position.")
    if bool((~(ascending | ~real)).any()):
        raise ValueError(f"{name} must be ascending without repeats, with −1 only at the tail.")
    if bool((~((relative_BLK >= 0).any(-1, keepdim=True) | ~real)).any()):
        raise ValueError(f"{name} leaves a real row without any key.")


def check_expert_replay(
    experts_BLT: torch.Tensor, real_BL: torch.Tensor, top: int, n_experts: int, layer_idx: int
) -> None:
    """Refuse replayed experts that are missing, repeated or unknown in a real row.

    Raises:
        ValueError: wrong shape or dtype, an index outside 0 … n_experts − 1, or a repeat.
    """
    name = f"decisions, layer {layer_idx}: expert_indices"
    if tuple(experts_BLT.shape) != (*real_BL.shape, top):
        raise ValueError(f"{name} has shape {tuple(experts_BLT.shape)}; it must be {[*real_BL.shape, top]}.")
    if experts_BLT.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {experts_BLT.dtype}; it must be int32 or int64.")
    chosen = experts_BLT[real_BL]
    if bool(((chosen < 0) | (chosen >= n_experts)).any()):
        raise ValueError(f"{name} holds an expert outside 0 … {n_experts - 1} in a real row.")
    ordered = chosen.sort(-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError(f"{name} names an expert twice in one row.")


def _cat(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    held = [p for p in parts if p is not None]
    if not held:
        return None
    if len(held) != len(parts):
        raise ValueError("decisions: chunks of one layer must all hold choices, or none of them.")
    width = max(p.shape[-1] for p in held)
    return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[-1]), value=-1) for p in held], 1)
