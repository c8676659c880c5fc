"""The recipe: what each stage trains, on what, for how long and how fast.

The default numbers are measured, not derived; see `harness/training/table.py` for what they reach.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from reference import DeepseekV32Config
from reference.training import Trains

from .tasks import KINDS, SHORTEST

STAGES = ("dense", "warmup", "sparse", "sft")


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a stage with data of one shape; a curriculum is several of them.

    `shares` are relative: how much of the rows is text, copy, retrieval, chat.
    """

    steps: int
    length: int
    batch_size: int
    shares: Mapping[str, float]

    def __post_init__(self) -> None:
        _at_least("Phase.steps", self.steps, 1)
        _at_least("Phase.length", self.length, SHORTEST)
        _at_least("Phase.batch_size", self.batch_size, 1)
        for kind, share in self.shares.items():
            if kind not in KINDS:
                raise ValueError(f"Phase.shares names {kind!r}; allowed are {', '.join(KINDS)}.")
            if not 0 <= share < math.inf:
                raise ValueError(f"Phase.shares[{kind!r}] is {share}; it must be a finite number of 0 or more.")
        if not sum(self.shares.values()):
            raise ValueError(f"Phase.shares is {dict(self.shares)}; at least one kind needs a share above 0.")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of training.

    name: of `STAGES`. sparse: whether attention reads the indexer's selection or every visible key.
    trains: `"model"` is all but the indexer. lr: AdamW's, for what has no rate of its own. lr_matrices: Muon's, for
    2-D matrices of the layers; None trains them by AdamW. lr_indexer: AdamW's for the indexer; None where it does not
    train. kl_coef: weight of the KL loss; 0 switches it off. ramp: steps of linear growth of all rates. betas,
    weight_decay: AdamW's, weight_decay Muon's also. clip: largest norm of each group's gradient, None for no limit.
    bias_rate: step of the router's balancing bias, 0 leaves it (report of V3, section 2.1.2).

    Raises:
        ValueError: a value that no stage can have, by its name.
    """

    name: str
    phases: tuple[Phase, ...]
    sparse: bool
    trains: Trains
    lr: float
    lr_matrices: float | None = None
    lr_indexer: float | None = None
    kl_coef: float = 0.0
    ramp: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float | None = None
    bias_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in STAGES:
            raise ValueError(f"Stage.name is {self.name!r}; allowed are {', '.join(STAGES)}.")
        if not self.phases:
            raise ValueError("Stage.phases is empty; a stage needs at least one phase.")
        if self.trains not in ("model", "indexer", "all"):
            raise ValueError(f"Stage.trains is {self.trains!r}; allowed are 'model', 'indexer', 'all'.")
        for name, rate in (("lr", self.lr), ("lr_matrices", self.lr_matrices), ("lr_indexer", self.lr_indexer)):
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"Stage.{name} is {rate}; it must be a finite number above 0.")
        for name, value in (
            ("kl_coef", self.kl_coef), ("weight_decay", self.weight_decay), ("bias_rate", self.bias_rate),
        ):  # fmt: skip
            if not 0 <= value < math.inf:
                raise ValueError(f"Stage.{name} is {value}; it must be a finite number of 0 or more.")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"Stage.clip is {self.clip}; it must be None or a finite number above 0.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"Stage.betas is {self.betas}; both must be 0 or more and below 1.")
        _at_least("Stage.ramp", self.ramp, 0)
        # The LM loss never reaches the indexer, so that it trains on the KL or not at all.
        if (self.trains == "model") != (self.lr_indexer is None) or (self.trains == "model") != (self.kl_coef == 0):
            raise ValueError(
                f"Stage.trains is {self.trains!r} with lr_indexer {self.lr_indexer} and kl_coef {self.kl_coef}; "
                "'model' takes None and 0, 'indexer' and 'all' a rate and a weight above 0."
            )

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """The phase that `step` falls into, steps counted from 0.

        Raises:
            ValueError: a step outside the stage.
        """
        left = step
        for phase in self.phases:
            if 0 <= left < phase.steps:
                return phase
            left -= phase.steps
        raise ValueError(f"step is {step}; stage {self.name} has steps 0 … {self.steps - 1}.")


# Half of the tokens text, a quarter each copying and retrieval; a curriculum starts with mostly the latter two.
MIXED = {"text": 2.0, "copy": 1.0, "retrieval": 1.0}
TASKS_FIRST = {"text": 1.0, "copy": 2.0, "retrieval": 2.0}


def full_length(config: DeepseekV32Config) -> int:
    """Tokens a row: 8·index_topk, long enough for answers more than 2·index_topk back, and four of the shortest rows."""
    return max(8 * config.index_topk, 4 * SHORTEST)


def stage_for(name: str, config: DeepseekV32Config) -> Stage:
    """The measured recipe of stage `name`, in lengths that fit `config.index_topk`.

    Raises:
        ValueError: an unknown name.
    """
    length = full_length(config)
    if name == "dense":
        # Copying and retrieval start within 300 steps at a quarter of the length; at half of it they had not by then.
        return Stage(
            name,
            (Phase(500, length // 4, 32, TASKS_FIRST), Phase(200, length // 2, 16, TASKS_FIRST), Phase(450, length, 16, MIXED)),
            sparse=False, trains="model", lr=3e-3, lr_matrices=0.02, ramp=50, clip=1.0, bias_rate=1e-3,
        )  # fmt: skip
    if name == "warmup":
        return Stage(
            name, (Phase(400, length, 8, MIXED),), sparse=False, trains="indexer", lr=5e-3, lr_indexer=5e-3,
            kl_coef=1.0, ramp=20,
        )  # fmt: skip
    if name == "sparse":
        return Stage(
            name, (Phase(200, length, 16, MIXED),), sparse=True, trains="all", lr=3e-4, lr_indexer=1e-3,
            kl_coef=1.0, ramp=20, clip=1.0,
        )  # fmt: skip
    if name == "sft":
        return Stage(
            name, (Phase(200, length, 16, {"chat": 1.0}),), sparse=True, trains="model", lr=3e-4, ramp=20, clip=1.0,
        )  # fmt: skip
    raise ValueError(f"Unknown stage {name!r}; available: {', '.join(STAGES)}.")


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}.")
