"""The kill matrix: every mutant, and every right subject on seeds of its own, through all checks.

A pass is one subject on one seed. The oracle of a seed is made once in each process, and serves every mutant.
"""

import atexit
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

import optimized
from reference import DeepseekV32Config
from reports.interrupts import interruptions, remember, stop_if_interrupted
from reports.schema import FAILING, Status, Verdict

from ..cases import CASE_NAMES, calibrated_state
from ..checks import CHECKS
from ..operators import OPERATOR_CASES
from ..plugged import DEEPSEEK, GLM, MODULES, plugged, transformers_as_it_was
from ..runner import Oracles, Plan, run
from ..subjects import Subject, on_backend, operator_capabilities, optimized_operators, ours, resolve_subject
from ..verify import length_for
from .catalogue import MUTANTS
from .mutant import Mutant
from .patching import patched_copy
from .ranked import needs_ranks

T = TypeVar("T")

CONFIG = "tiny"
# The weights and the text that mutants are tried on; budgets were set on seeds 0-19, false alarms are counted elsewhere.
SEED = 0
HELD_OUT = range(1000, 1100)
# Right subjects by turns, "@" before an implementation of the operators. Ten, so that each meets every case of 7 and of 13.
RIGHT = (
    "optimized", "reference", "optimized", "transformers-plugged", "optimized@torch",
    "optimized", "reference", "glm-plugged", "optimized", "reference",
)  # fmt: skip
# Enough for every check to meet what it looks for, and few enough for all mutants: `v32 verify` runs the rest.
CASES = ("text", "packed", "fp8")
# bf16 shows faults of the model's own dtype and nothing else.
BF16_CASES = ("text",)
OF_OPERATORS = ("documents", "chunk", "duplicate-keys", "many-keys", "odd-shapes")
BF16_OF_OPERATORS = ("causal",)
# Key slots and cases where the interpreter runs the operators, one batch entry: some milliseconds a row. Odd shapes have
# many batch entries, and only the checks against fp64 see them.
INTERPRETED_LENGTH = 24
INTERPRETED = ("documents", "duplicate-keys", "many-keys")
ODD_SHAPES, ODD_SHAPES_FAMILY = ("odd-shapes",), "operators"


@dataclass(frozen=True, slots=True)
class Pass:
    """What all checks said of one subject on one seed: the worst status of each check, and why a check failed."""

    subject: str
    seed: int
    statuses: dict[str, Status]
    reasons: dict[str, str] = field(default_factory=dict)
    verdicts: int = 0
    seconds: float = 0.0

    @property
    def kills(self) -> list[str]:
        """The checks that failed the subject."""
        return [check for check, status in self.statuses.items() if status is Status.FAILED]

    @property
    def alarms(self) -> list[str]:
        """The checks that did not verify it although it is right."""
        return [check for check, status in self.statuses.items() if status in FAILING]


class _Quiet:
    def start(self, check: str, case: str = "", dtype: str = "") -> None:
        """Nothing."""

    def done(self, verdict: Verdict) -> None:
        """Nothing."""


@contextmanager
def mutant_subject(mutant: Mutant) -> Iterator[Subject]:
    """The subject built from our own code with `mutant`'s patches, while the block lasts."""
    with patched_copy(mutant.patches) as copy:
        package = getattr(copy, mutant.of)
        if class_name := plugged_class(mutant):
            with transformers_as_it_was():
                yield plugged(f"mutant:{mutant.name}", class_name, package)
            return
        operators = optimized_operators(package.ops) if mutant.of == "optimized" and _has_operators(mutant) else {}
        subject = ours(f"mutant:{mutant.name}", package.DeepseekV32ForCausalLM, operators)
        if mutant.backend is not None:
            subject = on_backend(subject, mutant.backend)
        yield only_operators(subject, mutant) if mutant.backend == "triton" else subject


# Faults of the plug-in are tried on transformers' models.
PLUG_IN = "optimized/plug_in/"
# What the operators are made of.
OPERATOR_FOLDERS = ("optimized/ops/", "optimized/native/", "optimized/kernels/")


def plugged_class(mutant: Mutant) -> str | None:
    """transformers' class that a fault of the plug-in is tried on; None for every other fault."""
    if not any(patch.file.startswith(PLUG_IN) for patch in mutant.patches):
        return None
    return GLM if any(Path(patch.file).stem == MODULES[GLM] for patch in mutant.patches) else DEEPSEEK


def _has_operators(mutant: Mutant) -> bool:
    """Whether its operators are others than the unpatched ones: they import nothing from beside their folders."""
    return not mutant.patches or any(patch.file.startswith(OPERATOR_FOLDERS) for patch in mutant.patches)


# Which operator a kernel's module is a part of, by the beginning of its name.
KERNELS = {
    "sparse_mla": "sparse_mla", "segment_sum": "sparse_mla", "dense_mla": "dense_mla", "indexer_kl": "indexer_kl",
    "index_logits": "indexer_topk", "radix_topk": "indexer_topk",
}  # fmt: skip


def only_operators(subject: Subject, mutant: Mutant) -> Subject:
    """What of `subject` the interpreter has time for: no model, and of the operators those that `mutant` patches."""
    stems = [Path(patch.file).stem for patch in mutant.patches]
    patched = {name for stem in stems for prefix, name in KERNELS.items() if stem.startswith(prefix)}
    kept = {name: op for name, op in subject.operators.items() if not stems or name in patched}
    return replace(subject, factory=None, capabilities=operator_capabilities(kept), operators=kept)


def lasting_mutant(name: str) -> Subject:
    """The subject of the mutant called `name`, for as long as this process lives.

    Raises:
        ValueError: there is no such mutant, or the implementation that it is a bug of cannot run here.
    """
    mutant = mutant_called(name)
    if needs_ranks(mutant):
        raise ValueError(f"Mutant {name!r} shows on several ranks only: v32 mutants --only {name} --seeds 0")
    if mutant.backend is not None:
        optimized.check_backend(mutant.backend)
    held = ExitStack()
    atexit.register(held.close)
    return held.enter_context(mutant_subject(mutant))


def plans(subject: Subject, seed: int, without: frozenset[str], number: int | None = None) -> Iterator[Plan]:
    """The plans of one pass: fp32, then bf16.

    With a `number` cases take turns, so that as many passes as there are cases run every one of them.
    """
    config, state = _case_of(seed)
    config = subject.configured(config)
    checks = tuple(check for check in CHECKS if check.name not in without)
    of_dtypes: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "float32": (CASES, OF_OPERATORS),
        "bfloat16": (BF16_CASES, BF16_OF_OPERATORS),
    }
    if number is not None:
        operators = _turn(OPERATOR_CASES, number), _turn(OPERATOR_CASES, number + 5)
        of_dtypes = {
            "float32": ((_turn(CASE_NAMES, number),), operators),
            "bfloat16": ((_turn(CASE_NAMES, number + 3),), operators),
        }
    cpu = torch.device("cpu")
    if subject.factory is None:
        interpreted = partial(Plan, subject, config, state, seed, INTERPRETED_LENGTH, 1, cpu, ("float32",), ())
        yield interpreted(checks, operator_cases=INTERPRETED)
        odd = tuple(check for check in checks if check.family == ODD_SHAPES_FAMILY)
        yield interpreted(odd, operator_cases=ODD_SHAPES)
        return
    for dtype, (of_models, of_operators) in of_dtypes.items():
        yield Plan(
            subject, config, state, seed, length_for(config, CONFIG), 2, cpu, (dtype,), of_models, checks,
            operator_cases=of_operators,
        )  # fmt: skip


def _turn(names: tuple[str, ...], number: int) -> str:
    return names[number % len(names)]


@cache
def _case_of(seed: int) -> tuple[DeepseekV32Config, dict[str, torch.Tensor]]:
    config = DeepseekV32Config.preset(CONFIG)
    return config, calibrated_state(config, seed)


def one_pass(
    subject: Subject, seed: int, without: frozenset[str] = frozenset(), oracles: Oracles | None = None,
    number: int | None = None,
) -> Pass:  # fmt: skip
    """Every check on `subject`, but those named in `without`; `number` as in `plans`."""
    statuses: dict[str, Status] = {}
    reasons: dict[str, str] = {}
    count, seconds, before = 0, 0.0, interruptions()
    for plan in plans(subject, seed, without, number):
        for verdict in run(plan, _Quiet(), oracles):
            stop_if_interrupted(before)
            count, seconds = count + 1, seconds + verdict.seconds
            held = statuses.get(verdict.check)
            if held is None or _severity(verdict.status) > _severity(held):
                statuses[verdict.check] = verdict.status
                if verdict.status in FAILING:
                    reasons[verdict.check] = f"{verdict.reproduce} — {verdict.reason}"
    return Pass(subject.name, seed, statuses, reasons, count, seconds)


_ORDER = (Status.NOT_APPLICABLE, Status.SKIPPED, Status.VERIFIED, Status.ERROR, Status.VACUOUS, Status.FAILED)


def _severity(status: Status) -> int:
    return _ORDER.index(status)


# What a worker process keeps between passes, by the config that a subject asks for.
_ORACLES: dict[tuple[tuple[str, object], ...], Oracles] = {}


def _oracles_of(subject: Subject) -> Oracles:
    return _ORACLES.setdefault(tuple(sorted(subject.overrides.items())), Oracles())


def start_worker() -> None:
    """Prepare a process that runs passes: one thread, and nothing printed; Ctrl-C reaches it as well as the command."""
    remember()
    torch.set_num_threads(1)
    # Where a mutant divides by nothing, numpy says so beside the interpreter's result, which the checks judge.
    warnings.filterwarnings("ignore", module="triton.runtime.interpreter")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def unless_interrupted(work: Callable[..., T], *args: Any) -> T:
    """What `work` answers, in a worker. After Ctrl-C it begins nothing more: a pool hands on what it has handed out."""
    stop_if_interrupted(0)
    return work(*args)


def pass_of_mutant(name: str, without: frozenset[str] = frozenset()) -> Pass:
    """The pass of the mutant called `name`, on SEED."""
    with mutant_subject(mutant_called(name)) as subject:
        return one_pass(subject, SEED, without, _oracles_of(subject))


def pass_of_unpatched(
    backend: str | None = None, without: frozenset[str] = frozenset(), class_name: str | None = None
) -> Pass:
    """The pass of a copy without any patch: what a check says of it, it would say of a mutant for no reason.

    On the implementation `backend` of its operators, or in transformers' class `class_name`: a mutant is compared with
    the copy that runs as it does.
    """
    if class_name is not None:
        with patched_copy(()) as copy, transformers_as_it_was():
            subject = plugged("mutant:none", class_name, copy.optimized)
            return one_pass(subject, SEED, without, _oracles_of(subject))
    with mutant_subject(Mutant("none", "", "optimized", "no patch", "", (), backend)) as subject:
        return one_pass(subject, SEED, without, _oracles_of(subject))


def pass_of_right(seed: int, without: frozenset[str] = frozenset()) -> Pass:
    """The pass of the right subject whose turn it is on `seed`, under the name that it has in `RIGHT`."""
    number = seed - HELD_OUT.start
    name = RIGHT[number % len(RIGHT)]
    spec, _, backend = name.partition("@")
    subject = resolve_subject(spec)
    found = one_pass(on_backend(subject, backend) if backend else subject, seed, without, None, number)
    return replace(found, subject=name)


def mutant_called(name: str) -> Mutant:
    """The mutant of that name.

    Raises:
        ValueError: there is none.
    """
    for mutant in MUTANTS:
        if mutant.name == name:
            return mutant
    raise ValueError(f"There is no mutant {name!r}; `v32 mutants --list` names them.")


def select_mutants(names: list[str]) -> list[Mutant]:
    """Mutants by name, by entry of the catalogue (A01), or by group (A); "all" stands for every one.

    Raises:
        ValueError: a word that names nothing.
    """
    for word in names:
        if word != "all" and not any(_named(mutant, word) for mutant in MUTANTS):
            raise ValueError(
                f"--only names {word!r}; it must be a mutant, an entry such as A01, a group (A, B, C, D, E), or all."
            )
    return [mutant for mutant in MUTANTS if "all" in names or any(_named(mutant, word) for word in names)]


def _named(mutant: Mutant, word: str) -> bool:
    return word in (mutant.name, mutant.entry) or (len(word) == 1 and mutant.entry.startswith(word))
