"""What the suites of training share: short stages at `tiny`, in which every row selects."""

from dataclasses import replace

import torch

from harness.training.data import Mixture
from harness.training.loop import Listener, train
from harness.training.stages import Phase, stage_for
from reference.training import add_lora, lora_parts
from suites.support import SEED, build, tiny

# Four times index_topk, so that three rows of four choose.
LENGTH, BATCH = 64, 2
NAMES = ("dense", "warmup", "sparse", "sft")


def short(name, steps=4, length=LENGTH, batch=BATCH, **changes):
    """Stage `name` of the recipe in one phase of `steps`; its rates from the first step on."""
    stage = stage_for(name, tiny())
    phases = (Phase(steps, length, batch, stage.phases[-1].shares),)
    return replace(stage, **{"phases": phases, "ramp": 0, **changes})


def mixture(seed=0):
    return Mixture(tiny(), seed)


def batch_of(stage, step=0, seed=0):
    phase = stage.phase_at(step)
    return mixture(seed).batch(step, length=phase.length, batch_size=phase.batch_size, shares=phase.shares)


def adapted(model, stage, seed=SEED):
    """`model` with adapters on all that may have them in `stage`."""
    torch.manual_seed(seed)
    return add_lora(model, lora_parts(stage.trains), rank=2)


def model_for(model_class, dtype=torch.float32, lora_in=None, **overrides):
    """A model on calibrated weights, plain or with adapters for a stage."""
    model = build(model_class, dtype, **overrides)
    return model if lora_in is None else adapted(model, lora_in)


class Listening(Listener):
    """Keeps what it is told, and calls `at_step(values)` after each step."""

    def __init__(self, at_step=None):
        self.at_step, self.first, self.steps, self.verdicts = at_step, None, [], []
        self.notes = []

    def began(self, step, facts):
        self.first, self.facts = step, facts

    def noted(self, sentence):
        self.notes.append(sentence)

    def stepped(self, values):
        self.steps.append(values)
        if self.at_step is not None:
            self.at_step(values)

    def judged(self, verdict):
        self.verdicts.append(verdict)


class Killed(BaseException):
    """In place of SIGKILL: nothing catches it."""


def killed_after(step):
    """A listener that ends the process, as far as the loop can tell, when `step` is done."""

    def kill(values):
        if values["step"] == step:
            raise Killed

    return Listening(kill)


def losses(steps):
    """What must be equal bit for bit: losses and gradient norms of each step."""
    return [(row["step"], row["lm_loss"], row["kl_loss"], row["gradient_norms"]) for row in steps]


def run(model, stage, **settings):
    """`train` on the suites' data."""
    return train(model, stage, mixture(), **settings)
