"""The decision tape: the discrete choices of one forward, recorded or replayed.

A forward of V3.2 chooses keys (top-k of the index scores) and experts. One flipped choice hides or
fakes every number behind it, so two models are compared by replaying one tape in both.

Indices count from the row's own document start, pads left out: a tape's values do not depend on
padding, packing, chunking or cache. So what a rollout chose, token by token, is replayed when its tokens are
trained on in one forward (`record_decisions`; spec 3.5).

Letters: B batch, L rows, K chosen keys, T chosen experts; N tokens of a sequence.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "LayerDecisions":
        """`fn` of each tensor that there is."""
        return LayerDecisions(*(None if x is None else fn(x) for x in (self.topk_indices, self.expert_indices)))


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
        return self._map(lambda x: x.to(device))

    def rows(self, start: int, stop: int) -> "Decisions":
        """The tape of rows [start, stop): what a chunk of a prefill, or one step of a decode, replays."""
        return self._map(lambda x: x[:, start:stop])

    def batch(self, start: int, stop: int) -> "Decisions":
        """The tape of batch entries [start, stop): what one micro-batch replays."""
        return self._map(lambda x: x[start:stop])

    def packed(self, real_BL: torch.Tensor) -> "Decisions":
        """The tape of the rows where `real_BL` is true, one after another as a batch of one: for packed training."""
        return self._map(lambda x: x[real_BL.to(x.device, torch.bool)][None])

    def _map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "Decisions":
        return Decisions(tuple(layer.map(fn) for layer in self.layers))

    @staticmethod
    def from_indices(
        topk_indices: Sequence[torch.Tensor | None], expert_indices: Sequence[torch.Tensor | None] | None = None
    ) -> "Decisions":
        """The tape of another engine's choices, given as one tensor a layer, or None where the model shall choose.

        Args:
            topk_indices: integer `[B, L, K]` each, in any order, −1 for none; counted from the row's document start.
            expert_indices: integer `[B, L, T]` each, in any order; none at all when left out.

        Raises:
            ValueError: different numbers of layers, or indices that are no integers.
        """
        experts = [None] * len(topk_indices) if expert_indices is None else expert_indices
        if len(experts) != len(topk_indices):
            raise ValueError(
                f"from_indices: topk_indices has {len(topk_indices)} layers and expert_indices {len(experts)}; the numbers must be equal."
            )
        return Decisions(tuple(map(LayerDecisions, _ordered(topk_indices, "topk"), _ordered(experts, "expert"))))

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


class Recording:
    """What one run through a cache chose: filled by `record_decisions`, read by `decisions`."""

    def __init__(self) -> None:
        self._tokens: list[torch.Tensor] = []
        self._tapes: list[Decisions] = []
        self._noted = 0

    def add(self, start: int, tokens_BL: torch.Tensor, tape: Decisions) -> None:
        """Note a forward of tokens behind the first `start`; what was noted there before is forgotten.

        A forward without a cache begins again at 0, and one after rejected drafts where the cache was cut.
        """
        while self._noted > start:
            last, tape_of_last = self._tokens.pop(), self._tapes.pop()
            self._noted -= last.shape[1]
            if self._noted < start:
                self._note(last[:, : start - self._noted], tape_of_last.rows(0, start - self._noted))
        self._note(tokens_BL.cpu(), tape.to("cpu"))

    def _note(self, tokens_BL: torch.Tensor, tape: Decisions) -> None:
        self._tokens.append(tokens_BL)
        self._tapes.append(tape)
        self._noted += tokens_BL.shape[1]

    def decisions(self, sequences_BN: torch.Tensor) -> Decisions:
        """The tape of `sequences[:, :-1]`, on the CPU: of every row that predicts a token of `sequences`.

        Args:
            sequences_BN: what `generate` returned, prompt and padding included.

        Raises:
            ValueError: other tokens were computed than those, as in a beam search, which moves rows about.
        """
        rows = sequences_BN.shape[1] - 1
        if self._noted < rows or rows < 1:
            raise ValueError(
                f"decisions: {self._noted} tokens were recorded, but sequences of shape {tuple(sequences_BN.shape)} need {rows}, at least 1."
            )
        tokens_BL = torch.cat(self._tokens, 1)[:, :rows]
        if not torch.equal(tokens_BL, sequences_BN[:, :-1].cpu()):
            raise ValueError(
                "decisions: the tokens recorded are not those of sequences; record one generate() at a time, without beam search."
            )
        return Decisions.cat(self._tapes).rows(0, rows)


@contextmanager
def record_decisions(model: torch.nn.Module) -> Iterator[Recording]:
    """Record what `model`, or the model in a wrapper such as PEFT's, chooses in the forwards within, as of `generate`:

        with record_decisions(model) as recording:
            sequences = model.generate(prompt, max_new_tokens=100)
        tape = recording.decisions(sequences)  # then: model(sequences[:, :-1], decisions=tape)

    Raises:
        ValueError: no part of `model` records decisions, or a forward is given no `input_ids`.
    """
    inner = next((m for m in model.modules() if "output_decisions" in inspect.signature(m.forward).parameters), None)
    if inner is None:
        raise ValueError(f"record_decisions: {type(model).__name__} holds no model whose forward has output_decisions.")
    recording, start = Recording(), 0

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not args and kwargs.get("input_ids") is None:
            raise ValueError("record_decisions: a forward was given no input_ids, by which its rows are told apart.")
        nonlocal start
        past = kwargs.get("past_key_values")
        start = 0 if past is None else past.get_seq_length()
        return args, {**kwargs, "output_decisions": True}

    def after(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        recording.add(start, args[0] if args else kwargs["input_ids"], out.decisions)

    hooks = (
        inner.register_forward_pre_hook(before, with_kwargs=True),
        inner.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield recording
    finally:
        for hook in hooks:
            hook.remove()


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


def _ordered(indices: Sequence[torch.Tensor | None], what: str) -> list[torch.Tensor | None]:
    """int32, ascending, −1 at the tail."""
    ordered: list[torch.Tensor | None] = []
    for layer, x in enumerate(indices):
        if x is not None and (x.is_floating_point() or x.dtype == torch.bool):
            raise ValueError(
                f"from_indices: {what}_indices, layer {layer} is {x.dtype}; it must be of an integer dtype."
            )
        if x is not None:
            last = torch.iinfo(torch.int64).max
            x = x.long()
            x = x.masked_fill(x == -1, last).sort(-1).values
            x = x.masked_fill(x == last, -1).to(torch.int32)
        ordered.append(x)
    return ordered


def _cat(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    held = [p for p in parts if p is not None]
    if not held:
        return None
    if len(held) != len(parts):
        raise ValueError("decisions: chunks of one layer must all hold choices, or none of them.")
    width = max(p.shape[-1] for p in held)
    return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[-1]), value=-1) for p in held], 1)
