"""What the probes of models share: an experiment that two sides run, and how its outcome is judged.

An experiment is a function `(Side, Notes) -> None`: it runs a model in two ways that must give the same numbers, and
notes both. The subject's differences are judged against those of the reference in the same dtype, which runs the same
experiment: budget = factor · own + floor, as everywhere. What the experiment notes as null candidates are numbers of
the same model that must not be accepted as the same.

Letters: B batch, L rows, S key slots, K chosen keys, T chosen experts, N compared rows, W vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from reference import Decisions, DeepseekV32Config, LayerDecisions
from reports.schema import Measure, NullCandidate

from ..budgets import Rule, scale
from ..cases import Case, build_case
from ..checks.base import Answer, Bench, Check, State, whole_model_check
from ..checks.choices import layout_of
from ..checks.whole import changed, shallow, weights_for
from ..metrics import SIDES, Errors, errors, rejected
from ..observe import Observation, observe
from ..subjects import ALL, Subject, resolve_subject
from .model_budgets import FLIPS, FREE, FREE_LOSSES, LOSSES, POSITIONS, SHAPES

GradientsOf = Mapping[str, torch.Tensor | None]
# Probes run at several times index_topk, many times; with the published 2048 keys each forward would be of thousands of
# tokens.
LEAST_KEYS, MOST_KEYS = 8, 16
GAIN = "4 % gain"
# By kind, two tensors that must not pass for the same.
Nulls = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
OwnErrors = dict[str, Errors]
_NONE = Errors(*[0.0] * len(SIDES))


class Notes:
    """What one side saw in an experiment. The reference's are its own errors, and the subject's are judged by them."""

    def __init__(self, own: OwnErrors | None = None) -> None:
        self.errors: OwnErrors = {}
        self._own = own
        self._worst = dict.fromkeys(SIDES, (0.0, ""))
        self._largest: dict[str, Measure] = {}
        self._accepted: dict[str, list[str]] = {}
        self._beyond: list[str] = []

    def same(
        self, name: str, actual: torch.Tensor, expected: torch.Tensor, rule: Rule, nulls: Nulls | None = None,
        *, gain: bool = True,
    ) -> None:  # fmt: skip
        """Two tensors `[N, W]` that must be equal up to `rule`; `gain`: so nearly that 4 % more must be noticed.

        Where all is 0, nothing is 4 % more: such a comparison rests on its other null candidates.
        """
        actual, expected = actual.detach(), expected.detach()
        found = errors(actual, expected)
        assert name not in self.errors, f"{name} is noted twice"
        self.errors[name] = found
        if self._own is None:
            return
        # What the reference never met, such as a gradient where it has none, is judged by the floor.
        allowed = scale(rule, self._own.get(name, _NONE), expected.numel())
        shares = {side: _share(found, allowed, side) for side in SIDES}
        for side, share in shares.items():
            self._worst[side] = max(self._worst[side], (share, name))
        if (top := max(shares.values())) > 1:
            self._beyond.append(f"{name} ({top:.3g} times its budget)")
        if gain and bool((expected != 0).any()):
            nulls = {**(nulls or {}), GAIN: (expected * 1.04, expected)}
        for kind, (wrong, right) in (nulls or {}).items():
            self._reject(kind, name, rejected(wrong.detach(), right.detach(), allowed))

    def count(
        self, name: str, where: str, value: float, allowed: float, nulls: Mapping[str, float] | None = None
    ) -> None:
        """A number that must not exceed `allowed`; of one name the report shows the largest. `nulls`: of wrong things."""
        held = self._largest.get(name)
        if held is None or not value <= held.value:
            self._largest[name] = Measure(name, value, allowed)
        if not value <= allowed:
            self._beyond.append(f"{where}: {name} {value:.3g}, at most {allowed:.3g} allowed")
        for kind, wrong in (nulls or {}).items():
            self._reject(kind, where, not wrong <= allowed)

    def _reject(self, kind: str, where: str, seen: bool) -> None:
        self._accepted.setdefault(kind, []).extend([] if seen else [where])

    def same_gradients(
        self,
        name: str,
        actual: GradientsOf,
        expected: GradientsOf,
        rule: Rule,
        nulls: Mapping[str, GradientsOf] | None = None,
    ) -> None:
        """Gradients that must be equal, parameter by parameter; one that reaches nothing counts as zeros."""
        for parameter, gradient in expected.items():
            found = actual.get(parameter)
            if gradient is None and found is None:
                continue
            a, e = _or_zeros(found, gradient), _or_zeros(gradient, found)
            wrong = {kind: (_or_zeros(g.get(parameter), e), e) for kind, g in (nulls or {}).items()}
            self.same(f"{name}, {parameter}", a, e, rule, wrong)

    def few_flips(
        self, where: str, actual: Decisions | None, expected: Decisions | None, rows_BL: torch.Tensor
    ) -> None:
        """Choices of `rows_BL` that must be the same but for near ties; nothing when the subject reports none.

        Null candidate: the next row's choices.
        """
        if actual is None or expected is None:
            return
        nulls = {}
        if rows_BL.shape[1] > 1:
            moved = Decisions(tuple(LayerDecisions(*(_next_row(x) for x in _choices(d))) for d in expected))
            nulls["the next row's choices"] = share_flipped(moved, expected, rows_BL)
        self.count("rows that choose otherwise", where, share_flipped(actual, expected, rows_BL), FLIPS, nulls)

    def rows(
        self, side: "Side", name: str, seen: Observation, case: Case, rows_BL: torch.Tensor,
        expected_NW: torch.Tensor, tape: Decisions | None, nulls: Nulls | None = None,
    ) -> None:  # fmt: skip
        """Rows of a run on `tape` that must be `expected`; what it would itself have chosen must be the tape's."""
        actual = seen.logits[rows_BL]
        # First tokens are all the same, and so are rows of length 1.
        several = int(rows_BL.sum(1).max()) > 1
        moved = {"rows moved": (actual.roll(1, 0), expected_NW)} if several else {}
        self.same(name, actual, expected_NW, side.shapes, {**moved, **(nulls or {})})
        self.few_flips(name, seen.decisions, tape, rows_BL)
        self.count("unreachable keys", name, unreachable(seen.decisions, case, side.device), 0.0)

    def answer(self) -> Answer:
        """The subject's notes as a check's answer."""
        measures = [Measure(f"{side}, share of budget", share, 1.0) for side, (share, _) in self._worst.items()]
        found = [*(measures if self.errors else []), *self._largest.values()]
        nulls = [NullCandidate(kind, not at, f"in {at[0]}" if at else "") for kind, at in self._accepted.items()]
        more = f" and {len(self._beyond) - 3} more" if len(self._beyond) > 3 else ""
        return Answer(found, nulls, f"not the same: {'; '.join(self._beyond[:3])}{more}" if self._beyond else "")


Experiment = Callable[["Side", Notes], None]


class Side:
    """One implementation in an experiment, the subject or the reference. Both are asked what the subject declares.

    `config` is the case's, shallow, with LEAST_KEYS to MOST_KEYS keys a row, `k` of them.
    """

    def __init__(self, bench: Bench, subject: Subject, dtype: torch.dtype | None = None) -> None:
        self.subject, self.device, self.dtype = subject, bench.device, dtype or bench.dtype
        self.can, self.seed, self.state = bench.subject.capabilities, bench.case.seed, bench.oracle.state
        self.k = max(min(bench.case.config.index_topk, MOST_KEYS), LEAST_KEYS)
        self.config = changed(shallow(bench.case.config), index_topk=self.k, use_sparse_attention=True)

    @property
    def shapes(self) -> Rule:
        """What runs of different shapes may differ by: with a tape rounding, without one a flipped choice."""
        return SHAPES if "tape" in self.can else FREE

    @property
    def losses(self) -> Rule:
        """As `shapes`, for a loss."""
        return LOSSES if "tape" in self.can else FREE_LOSSES

    @property
    def positions(self) -> Rule:
        """As `shapes`, for the same tokens at other positions."""
        return POSITIONS if "tape" in self.can else FREE

    @property
    def modes(self) -> tuple[bool, ...]:
        """The values of use_sparse_attention that the subject knows."""
        return (True, False) if "dense-mode" in self.can else (True,)

    def config_of(self, **fields: object) -> DeepseekV32Config:
        """The probes' config with `fields` changed."""
        return changed(self.config, **fields)

    def model(self, *, state: State | None = None, dtype: torch.dtype | None = None, **fields: object) -> nn.Module:
        """A fresh model for `config` with `fields` changed, and the case's weights or `state`; fewer layers drop theirs."""
        config = self.config_of(**fields)
        weights = weights_for(config, self.state if state is None else state)
        return self.subject.build(config, weights, self.device, dtype or self.dtype)

    def case(self, name: str = "text", *, length: int, batch: int = 2, number: int = 0, **fields: object) -> Case:
        """A case on text of its own, `number` telling several apart."""
        return build_case(name, self.config_of(**fields), seed=10 * self.seed + number, length=length, batch=batch)

    def see(
        self, model: nn.Module, case: Case, *, tape: Decisions | None = None, kl: bool = False, gradients: bool = False
    ) -> Observation:
        """One forward, and the backwards if `gradients`; the KL only if `kl` and declared."""
        can = self.can if kl else self.can - {"indexer-kl"}
        return observe(model, case, can, tape=tape if "tape" in can else None, gradients=gradients)

    def generator(self, number: int = 0) -> torch.Generator:
        """A source of random numbers that depends on the case's seed and `number` only."""
        return torch.Generator().manual_seed(10 * self.seed + number)


def probe(name: str, experiment: Experiment, needs: Iterable[str] = ()) -> Check:
    """A check of the family "probes" that runs `experiment` on the reference and on the subject."""

    def run(bench: Bench) -> Answer:
        def of_reference() -> OwnErrors:
            notes = Notes()
            experiment(Side(bench, resolve_subject("reference")), notes)
            return notes.errors

        # What both are asked depends on what the subject declares.
        seen = Notes(bench.oracle.remember((name, bench.subject.capabilities & ALL), of_reference))
        bench.of_subject(lambda: experiment(Side(bench, bench.subject), seen))
        return seen.answer()

    return whole_model_check(f"probes.{name}", "probes", run, frozenset(needs))


def _or_zeros(gradient: torch.Tensor | None, like: torch.Tensor | None) -> torch.Tensor:
    if gradient is not None:
        return gradient
    assert like is not None, "one of the two reaches the parameter"
    return torch.zeros_like(like)


def _share(found: Errors, allowed: Errors, side: str) -> float:
    share = getattr(found, side) / getattr(allowed, side)
    return share if share == share else math.inf


def only_experts(tape: Decisions | None) -> Decisions | None:
    """The tape without its keys: batches of tokens stay the same for each expert, and keys are chosen anew."""
    return None if tape is None else Decisions(tuple(LayerDecisions(None, d.expert_indices) for d in tape))


def only_keys(tape: Decisions | None) -> Decisions | None:
    """The tape without its experts."""
    return None if tape is None else Decisions(tuple(LayerDecisions(d.topk_indices, None) for d in tape))


def of_batch(tape: Decisions | None, rows: list[int]) -> Decisions | None:
    """The tape of some rows of the batch."""
    return each(tape, lambda x: x[rows])


def padded(tape: Decisions | None, before: int, after: int) -> Decisions | None:
    """The tape of the same rows with padding `before` and `after` them."""
    return each(tape, lambda x: nn.functional.pad(x, (0, 0, before, after), value=-1))


def stacked(tapes: Iterable[Decisions | None]) -> Decisions | None:
    """Tapes of equally many rows as one batch."""
    held = [tape for tape in tapes if tape is not None]
    if not held:
        return None
    layers = zip(*held, strict=True)
    return Decisions(tuple(LayerDecisions(*map(_stack, zip(*map(_choices, layer), strict=True))) for layer in layers))


def joined(tapes: Iterable[Decisions | None]) -> Decisions | None:
    """Tapes of consecutive rows as one."""
    held = [tape for tape in tapes if tape is not None]
    return Decisions.cat(held) if held else None


def _stack(parts: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    held = [part for part in parts if part is not None]
    width = max((part.shape[-1] for part in held), default=0)
    return torch.cat([_widened(part, width) for part in held]) if held else None


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    return nn.functional.pad(x, (0, width - x.shape[-1]), value=-1)


def _choices(layer: LayerDecisions) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return layer.topk_indices, layer.expert_indices


def each(tape: Decisions | None, change: Callable[[torch.Tensor], torch.Tensor]) -> Decisions | None:
    """The tape with each of its tensors changed."""
    if tape is None:
        return None
    return Decisions(
        tuple(LayerDecisions(*(None if x is None else change(x) for x in _choices(layer))) for layer in tape)
    )


def _next_row(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.roll(-1, 1)


def flipped_BL(actual: LayerDecisions, expected: LayerDecisions) -> torch.Tensor:
    """Which rows of one layer chose other keys or other experts."""
    changed_rows = None
    for a, e in zip(_choices(actual), _choices(expected), strict=True):
        if a is None or e is None:
            continue
        width = max(a.shape[-1], e.shape[-1])
        differs = (_widened(a, width) != _widened(e, width)).any(-1)
        changed_rows = differs if changed_rows is None else changed_rows | differs
    assert changed_rows is not None, "a layer in sparse mode chooses keys"
    return changed_rows


def share_flipped(actual: Decisions, expected: Decisions, rows_BL: torch.Tensor) -> float:
    """The share of (layer, row) pairs, among `rows_BL`, whose choices differ."""
    flips = [
        flipped_BL(a, e)[rows_BL]
        for a, e in zip(actual, expected, strict=True)
        if any(x is not None for x in _choices(e))
    ]
    return float(torch.cat(flips).double().mean()) if flips else 0.0


def unreachable(decisions: Decisions | None, case: Case, device: torch.device) -> float:
    """How many of the reported keys of real rows lie outside their document, behind their row, or twice in the list."""
    if decisions is None:
        return 0.0
    bounds = layout_of(case, device).bounds_BL2
    visible_BL1 = (bounds[..., 1] - bounds[..., 0])[..., None]
    wrong = 0
    for layer in decisions:
        if (keys := layer.topk_indices) is None:
            continue
        ordered = keys.sort(-1).values
        wrong += int((((keys < -1) | (keys >= visible_BL1)) & (visible_BL1 > 0)).sum())
        wrong += int(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).sum())
    return float(wrong)


def feed(
    side: Side, model: nn.Module, case: Case, sizes: Iterable[int], *,
    tape: Decisions | None = None, cache: Any = None, kl: bool = False,
) -> tuple[Observation, Any]:  # fmt: skip
    """The case in chunks of `sizes` tokens through one cache, which comes back too; `kl_loss` is the mean over rows.

    Raises:
        ValueError: a subject that declares a cache and returns none.
    """
    wants: dict[str, Any] = {"output_decisions": True} if "tape" in side.can else {}
    if kl and "indexer-kl" in side.can:
        wants["output_indexer_kl_loss"] = True
    start, total, parts = 0, None, []
    with torch.no_grad():
        for size in sizes:
            stop = start + size
            chunk = replace(
                case, input_ids=case.input_ids[:, start:stop],
                attention_mask=None if case.attention_mask is None else case.attention_mask[:, :stop],
                position_ids=None if case.position_ids is None else case.position_ids[:, start:stop],
            )  # fmt: skip
            if tape is not None:
                wants["decisions"] = tape.rows(start, stop).to(side.device)
            out = model(**{**chunk.inputs(side.device), "use_cache": True}, past_key_values=cache, **wants)
            if (cache := getattr(out, "past_key_values", None)) is None:
                raise ValueError("it declares cache, but with use_cache=True its output has no past_key_values")
            parts.append((out.logits, getattr(out, "decisions", None)))
            if "output_indexer_kl_loss" in wants:
                rows = case.real_BL[:, start:stop].sum().to(side.device)
                total = out.indexer_kl_loss * rows + (0.0 if total is None else total)
            start = stop
    logits = torch.cat([part[0] for part in parts], 1)
    mean = None if total is None else total / case.real_BL[:, :start].sum().to(side.device)
    return Observation(logits, logits.new_zeros(()), kl_loss=mean, decisions=joined([part[1] for part in parts])), cache


def with_ids(case: Case, input_ids: torch.Tensor) -> Case:
    """The case with other tokens; the labels stay."""
    return replace(case, input_ids=input_ids)


def other_tokens(input_ids: torch.Tensor, where_BL: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`input_ids` with another byte at each place of `where_BL`."""
    moved = (input_ids + torch.randint(1, 256, input_ids.shape, generator=generator)) % 256
    return torch.where(where_BL, moved, input_ids)


def loudest(actual_BLW: torch.Tensor, expected_BLW: torch.Tensor, among_BL: torch.Tensor) -> torch.Tensor:
    """`[B, L]`, True at the row of each batch row, `among_BL`, whose logits differ most."""
    apart = (actual_BLW - expected_BLW).abs().amax(-1).masked_fill(~among_BL, -1.0)
    return torch.zeros_like(among_BL).scatter_(1, apart.argmax(1, keepdim=True), True) & among_BL
