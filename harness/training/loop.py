"""The training loop: one stage of the recipe, from its first step or from a saved state, audited and measured.

A step is a function of the weights, the optimizers' state and the step's number: data and learning rates are functions
of the number, and nothing draws a random number. So a run that goes on from a state computes the same bits.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from reference.training import parameter_group, set_trainable, training_loss
from reports.schema import FAILING, Verdict
from reports.strict_json import JSON

from .audit import Audit, has_adapters, judge, parameter_counts
from .data import Batch, Mixture, sources
from .gradients import judge_gradients, model_inputs
from .metrics import measure_indexer, resident_mib
from .optimizers import build_optimizers, set_rates
from .ranks import clip, norm_of
from .stages import Stage
from .state import read_state, restore, save_state
from .verdicts import judge_indexer, judge_losses, not_finite, not_working

# A state every so many steps, a measurement of the indexer every so many.
SAVE_EVERY, MEASURE_EVERY = 25, 20
# Steps of a stage after which its indexer must tell more than nothing; a shorter stage is judged at its end only.
PATIENCE = 100


class Listener:
    """What a run reports to, while it runs; this one does not listen."""

    def began(self, step: int, facts: Mapping[str, JSON]) -> None:
        """The first step of this process is next, after `step` steps; `facts` are for the record's header."""

    def noted(self, sentence: str) -> None:
        """Something a reader of the record should know, after `began`."""

    def stepped(self, values: Mapping[str, JSON]) -> None:
        """A step is done."""

    def judged(self, verdict: Verdict) -> None:
        """A verdict is there."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A stage that has ended: what each step of this process gave, the verdicts, and in one sentence what broke it."""

    model: nn.Module
    steps: tuple[dict[str, JSON], ...]
    verdicts: tuple[Verdict, ...]
    problem: str | None = None

    def curve(self, name: str) -> list[float]:
        """A value of every step that has it, such as `lm_loss`."""
        return [row[name] for row in self.steps if row.get(name) is not None]


@dataclass(slots=True)
class _Run:
    """What one call of `train` carries from step to step."""

    model: nn.Module
    stage: Stage
    mixture: Mixture
    optimizers: list[torch.optim.Optimizer]
    audit: Audit
    listener: Listener
    measure_every: int
    seconds: float = 0.0
    steps: list[dict[str, JSON]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def judged(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        self.listener.judged(verdict)


def batch_of(stage: Stage, mixture: Mixture, step: int) -> Batch:
    """What a stage reads in `step`."""
    phase = stage.phase_at(step)
    return mixture.batch(step, length=phase.length, batch_size=phase.batch_size, shares=phase.shares)


def train(
    model: nn.Module, stage: Stage, mixture: Mixture, *, seed: int = 0, out: Path | None = None, resume: bool = False,
    save_every: int = SAVE_EVERY, measure_every: int = MEASURE_EVERY, stop_early: bool = True,
    identity: Mapping[str, JSON] | None = None, listener: Listener | None = None,
) -> Trained:  # fmt: skip
    """Train `model` through `stage`, in place.

    On a CPU a run that is resumed computes the same bits as one that was not, with the same number of threads.

    Args:
        model: one of our two models, or one with adapters of `reference.training.add_lora`. Who trains, the mode of
            attention and its training mode are set here.
        seed: of torch's random numbers. mixture: the data, which has its own.
        out: where states go, in a folder `state`; None keeps nothing.
        resume: go on from the last state below `out`; from the start where there is none.
        save_every, measure_every: steps between two states, and between two measurements of the indexer.
        stop_early: end the stage when its indexer does not work (from `PATIENCE` steps on). A loss that is not finite
            always ends it.
        identity: what else makes this run another one than a run on the same weights, stage, seed and data.
        listener: told of everything as it happens.

    Raises:
        ValueError: a model that cannot be trained this way, or a state that is damaged or of another run.
        OSError: `out` cannot be written; the last state stays.
    """
    for name, value in (("save_every", save_every), ("measure_every", measure_every)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more.")
    listener = listener or Listener()
    _prepare(model, stage)
    torch.manual_seed(seed)
    audit = Audit.begin(model, stage)
    who = _identity(model, stage, mixture, seed, audit, identity or {})
    state = read_state(out, who) if out is not None and resume else None
    # Before the optimizers, whose counters of expert loads would count this forward.
    gradients = judge_gradients(model, stage, batch_of(stage, mixture, 0))
    run = _Run(model, stage, mixture, build_optimizers(model, stage), audit, listener, measure_every)
    first = 0
    notes: list[str] = []
    if state is not None:
        extra, notes = restore(state, model, run.optimizers)
        first, audit.steps, audit.gradients = state.step, state.step, extra["gradients"]
        run.seconds = extra["seconds"]
    recipe = {"recipe": who["stage"], "data": who["data"], "weights at the start": who["weights at the start"]}
    listener.began(first, {"parameters": parameter_counts(model), **recipe})
    for note in notes:
        listener.noted(note)
    run.judged(gradients)
    problem = None
    for step in range(first, stage.steps):
        values = _step(run, step)
        problem = _broken(values, stage, stop_early)
        run.steps.append(values)
        listener.stepped(values)
        if problem is not None:
            break
        if out is not None and ((step + 1) % save_every == 0 or step + 1 == stage.steps):
            save_state(
                out, step + 1, model, run.optimizers, who, {"gradients": audit.gradients, "seconds": run.seconds}
            )
    return _ended(run, problem)


def _prepare(model: nn.Module, stage: Stage) -> None:
    config = cast(Any, model).config
    if not config.detach_indexer_input:
        raise ValueError(
            "config.detach_indexer_input is False, with which the KL loss would train the model too; a stage needs True."
        )
    config.use_sparse_attention = stage.sparse
    # The loop weighs the losses itself, by who trains.
    config.indexer_kl_coef = 0.0
    model.train()
    if not has_adapters(name for name, _ in model.named_parameters()):
        set_trainable(model, stage.trains)
    elif stage.bias_rate:
        raise ValueError(
            f"stage.bias_rate is {stage.bias_rate}, but the model has adapters, which alone train; it must be 0."
        )


def _identity(
    model: nn.Module, stage: Stage, mixture: Mixture, seed: int, audit: Audit, more: Mapping[str, JSON]
) -> dict[str, JSON]:
    weights = hashlib.sha256(json.dumps(audit.start, sort_keys=True).encode()).hexdigest()
    config = json.loads(cast(Any, model).config.to_json_string(use_diff=False))
    return {
        **more,
        "stage": json.loads(json.dumps(asdict(stage))),
        "seed": seed,
        "data": {"seed": mixture.seed, "sha256": sources().train_sha256},
        "config": config,
        "weights at the start": weights,
    }


def _step(run: _Run, step: int) -> dict[str, JSON]:
    """One step: forward, backward, norms, clipping, update; and what it tells."""
    batch = batch_of(run.stage, run.mixture, step)
    # Before the update, so that these are of the same weights as the step's losses.
    measured = _measured(run, step, batch)
    started = time.perf_counter()
    set_rates(run.optimizers, run.stage, step)
    out = run.model(**model_inputs(run.model, run.stage, batch))
    training_loss(out, run.stage.trains, run.stage.kl_coef).backward()
    run.audit.after_backward(run.model)
    norms = _gradient_norms(run.model)
    values: dict[str, JSON] = {
        "step": step,
        "lm_loss": float(out.lm_loss.detach()),
        "kl_loss": None if out.indexer_kl_loss is None else float(out.indexer_kl_loss.detach()),
        "gradient_norms": norms,
    }
    # A step on what is not finite would spoil every weight, and the audit would name them all.
    if not_finite(values) is None:
        _update(run)
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    run.seconds += seconds
    tokens = batch.input_ids_BL.numel()
    values |= {
        "rates": {group["name"]: group["lr"] for o in run.optimizers for group in o.param_groups},
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": run.seconds,
        "rss_mib": resident_mib(),
        **measured,
    }
    return values


def _measured(run: _Run, step: int, batch: Batch) -> dict[str, JSON]:
    """The indexer's numbers, in every `measure_every`th step and the last; none in dense stages that do not train it."""
    reads = run.stage.sparse or run.stage.trains != "model"
    if not reads or (step % run.measure_every and step + 1 != run.stage.steps):
        return {}
    return measure_indexer(run.model, batch, sparse=run.stage.sparse).values()


def _gradient_norms(model: nn.Module) -> dict[str, float]:
    """The 2-norm of the gradient of each group of parameters that has one, before clipping."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            groups.setdefault(parameter_group(name), []).append(parameter.grad)
    return {group: norm_of(grads) for group, grads in groups.items()}


def _update(run: _Run) -> None:
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            # Each group by itself: the LM loss must not shorten the indexer's steps, nor the KL the model's.
            if run.stage.clip is not None and any(parameter.grad is not None for parameter in group["params"]):
                clip(group["params"], run.stage.clip)
        optimizer.step()


def _broken(values: Mapping[str, JSON], stage: Stage, stop_early: bool) -> str | None:
    step = values["step"]
    if (name := not_finite(values)) is not None:
        return f"Step {step} of stage {stage.name}: {name} is not finite; no update was made."
    # The last step is judged after its update, by the verdicts.
    if stop_early and PATIENCE <= step + 1 < stage.steps and stage.trains != "model" and "captured" in values:
        why = not_working(values)
        if why is not None:
            return f"Step {step} of stage {stage.name}: {why}."
    return None


def _ended(run: _Run, problem: str | None) -> Trained:
    broken, audited = judge(run.audit, run.model, run.optimizers)
    run.judged(judge_losses(type(run.model).__name__, run.stage, run.steps, run.audit.steps, problem))
    run.judged(audited)
    if run.stage.trains != "model":
        for verdict in judge_indexer(run.model, run.stage, batch_of(run.stage, run.mixture, run.stage.steps - 1)):
            run.judged(verdict)
    failed = [v for v in run.verdicts if v.status in FAILING]
    if problem is None and broken:
        problem = broken[0]
    elif problem is None and failed:
        accepted = ", ".join(null.kind for null in failed[0].nulls if not null.rejected)
        problem = f"{failed[0].check}: {failed[0].reason or f'it accepted a wrong answer: {accepted}'}"
    return Trained(run.model, tuple(run.steps), tuple(run.verdicts), problem)
