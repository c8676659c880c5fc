"""What a check is: a function of a bench, answered by measures and rejected null candidates.

A bench holds one case in one dtype: the oracle (the reference in fp64, and the baseline, the reference in that
dtype) and the subject, all on the oracle's tape. The oracle does not depend on the subject, and serves any number.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import nn

from reference import Decisions, DeepseekV32Config
from reference.checkpoint import is_fp32
from reference.training import train_only_indexer
from reports.schema import Measure, NullCandidate

from ..cases import Case
from ..observe import Observation, observe
from ..rowwise import build_rowwise
from ..subjects import ALL, Subject, resolve_subject

State = dict[str, torch.Tensor]
# A thousand times the rounding of fp32: some latents and index entries of a tiny model change sides. With a tenth of
# it the optimized model used up to 1.35 of a budget (KL gradients, seed 14), with this at most 0.60 (seeds 0-19).
FP8_JITTER = 1e-4
# Half a unit in the last place of fp32: weights that far apart are the same to whoever computes in fp32.
ROUNDING = 2.0**-24
NEIGHBOURS = 8
T = TypeVar("T")


class SubjectError(Exception):
    """The subject raised where its declared capabilities say that it works."""


class NotExposed(Exception):
    """The subject declares what a check needs, but has nothing of what it looks at; the text says what."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a check found. Verified when every measure is within its budget and every null candidate was rejected."""

    measures: list[Measure]
    nulls: list[NullCandidate]
    reason: str = ""
    data: dict[str, Any] = field(default_factory=dict)


class Oracle:
    """The reference in fp64 on one case: the tape, and what everything is measured against.

    It holds the weights as rounded to the subject's dtype, so that what is compared is arithmetic: rounding of the
    weights is an error that all models share, and it would be most of a bf16 budget. What official files hold in fp32,
    and a model in bf16 must not round, is not rounded: the index keys' norm and the router bias.

    `lean` is for models that leave no room for the reference's L×S tensors, nor for gradients of all weights: the same
    formulas run some rows at a time, the fp64 model is not kept, and only the indexer is trainable.
    """

    def __init__(
        self, case: Case, state: State, device: torch.device, dtype: torch.dtype = torch.float32, lean: bool = False
    ) -> None:
        self.case, self.device, self.dtype, self.lean = case, device, dtype, lean
        self._remembered: dict[object, Any] = {}
        self.state = {n: t if is_fp32(n) else t.to(dtype).float() for n, t in state.items()}

    @property
    def model(self) -> nn.Module:
        """The reference in fp64."""
        if self.lean:
            return self._reference(self.state, torch.float64)
        return self._kept_model

    @cached_property
    def _kept_model(self) -> nn.Module:
        return self._reference(self.state, torch.float64)

    def _reference(self, state: State, dtype: torch.dtype) -> nn.Module:
        if not self.lean:
            return resolve_subject("reference").build(self.case.config, state, self.device, dtype)
        # What the last model leaves behind, in cycles, is as large as this one.
        gc.collect()
        return build_rowwise(self.case.config, state, self.device, dtype)

    @cached_property
    def free(self) -> Observation:
        """Its own choices: where the tape comes from."""
        return observe(self.model, self.case, ALL, gradients=False)

    @property
    def tape(self) -> Decisions:
        """The choices that every run of this case replays."""
        assert self.free.decisions is not None
        return self.free.decisions

    @cached_property
    def seen(self) -> Observation:
        """Outputs, gradients and scores on the tape."""
        # Before the model is built: of a lean oracle two would not fit.
        tape = self.tape
        return observe(self.model, self.case, ALL, tape=tape, scores=True, lm_gradients=not self.lean)

    def low(self) -> nn.Module:
        """The reference in the subject's dtype.

        Rounding to FP8 is a discrete choice too: an entry within rounding of a boundary falls on either side, and one
        that does moves by 6 %. In fp32 such flips are so few that the reference may have none where a subject has one.
        There its weights are moved by FP8_JITTER, so that it has some.
        """
        state = self.state
        if self.case.fp8 and self.dtype == torch.float32:
            generator = torch.Generator().manual_seed(self.case.seed)
            state = {
                name: x * (1 + FP8_JITTER * torch.randn(x.shape, generator=generator)) for name, x in state.items()
            }
        return self._reference(state, self.dtype)

    @cached_property
    def baseline(self) -> Observation:
        """The reference in the subject's dtype on the tape: the error of plain low precision."""
        return observe(self.low(), self.case, ALL, tape=self.tape, scores=True, lm_gradients=not self.lean)

    def neighbours(self) -> Iterator[Observation]:
        """The reference in the subject's dtype on the tape, with weights moved by ROUNDING: NEIGHBOURS runs, one at a time.

        One run is one draw of its errors. Where few tokens make most of a gradient, as under peaked attention, one
        rounding moves all of it, and a side of that draw may be a hundredth of what the next one has.
        """
        for i in range(NEIGHBOURS):
            generator = torch.Generator().manual_seed(NEIGHBOURS * self.case.seed + i)
            state = {n: x * (1 + ROUNDING * torch.randn(x.shape, generator=generator)) for n, x in self.state.items()}
            yield observe(
                self._reference(state, self.dtype), self.case, ALL, tape=self.tape, lm_gradients=not self.lean
            )

    @cached_property
    def baseline_free(self) -> Observation:
        """The reference in the subject's dtype choosing for itself."""
        return observe(self.low(), self.case, ALL, gradients=False)

    def remember(self, key: object, compute: Callable[[], T]) -> T:
        """What `compute` returns, computed once: for results of the reference alone, which every subject shares."""
        if key not in self._remembered:
            self._remembered[key] = compute()
        return cast(T, self._remembered[key])


class Bench:
    """One case in one dtype: oracle, baseline, subject. Everything is computed once, when it is first asked for."""

    def __init__(self, oracle: Oracle, subject: Subject, dtype: torch.dtype) -> None:
        self.oracle, self.subject, self.dtype = oracle, subject, dtype
        self.case, self.device = oracle.case, oracle.device

    @property
    def expected(self) -> Observation:
        """What the oracle saw."""
        return self.oracle.seen

    def reference(self) -> nn.Module:
        """The reference in this dtype."""
        return self.oracle.low()

    @property
    def baseline(self) -> Observation:
        """The error of plain low precision."""
        return self.oracle.baseline

    @property
    def baseline_free(self) -> Observation:
        """The reference in this dtype choosing for itself."""
        return self.oracle.baseline_free

    @cached_property
    def module(self) -> nn.Module:
        """The subject's module in this dtype."""
        return self.build(self.case.config)

    def build(self, config: DeepseekV32Config) -> nn.Module:
        """A fresh module of the subject for `config`, with the case's weights."""
        if self.oracle.lean:
            gc.collect()
        module = self.of_subject(lambda: self.subject.build(config, self.oracle.state, self.device, self.dtype))
        if self.oracle.lean:
            # Nothing else keeps what a backward would need.
            train_only_indexer(module)
        return module

    def of_subject(self, call: Callable[[], T]) -> T:
        """Run what the subject is answerable for.

        Raises:
            SubjectError: whatever it raised, named.
        """
        try:
            return call()
        except Exception as error:
            raise SubjectError(f"the subject raised {type(error).__name__}: {error}") from error

    @cached_property
    def seen(self) -> Observation:
        """The subject on the tape, if it takes one."""
        capabilities = self.subject.capabilities
        tape = self.oracle.tape if "tape" in capabilities else None
        lm_gradients = not self.oracle.lean
        return self.of_subject(
            lambda: observe(self.module, self.case, capabilities, tape=tape, lm_gradients=lm_gradients)
        )

    @cached_property
    def free(self) -> Observation:
        """The subject choosing for itself."""
        return self.of_subject(lambda: observe(self.module, self.case, self.subject.capabilities, gradients=False))


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its name, the family it is reported in, what a subject must declare, and in which modes it makes sense.

    Modes are "sparse" and "dense" (one forward and backward of a model), "whole" (the check builds models of its own)
    and "operators" (the bench is an `OperatorBench`). `only` narrows it to some cases and dtypes by name; empty means
    all. `except_for` lists the pairs of case and dtype in which it could judge nothing. `too_large`: why a lean plan
    leaves it out, or "".
    """

    name: str
    family: str
    run: Callable[[Any], Answer]
    needs: frozenset[str] = frozenset()
    modes: frozenset[str] = frozenset({"sparse", "dense"})
    only_cases: frozenset[str] = frozenset()
    only_dtypes: frozenset[torch.dtype] = frozenset()
    except_for: frozenset[tuple[str, torch.dtype]] = frozenset()
    too_large: str = ""

    def concerns(self, mode: str, case: str, dtype: torch.dtype) -> bool:
        """Whether this check is run at all in `mode`, on `case`, in `dtype`."""
        return (
            mode in self.modes
            and (not self.only_cases or case in self.only_cases)
            and (not self.only_dtypes or dtype in self.only_dtypes)
            and (case, dtype) not in self.except_for
        )


def whole_model_check(
    name: str, family: str, run: Callable[[Bench], Answer], needs: frozenset[str] = frozenset()
) -> Check:
    """A check that builds models of its own: once a run, in fp32."""
    return Check(name, family, run, needs, frozenset({"whole"}), only_dtypes=frozenset({torch.float32}))
