"""What the ranks of a world compute, against one process: losses, gradients of every parameter, selections.

In fp64 another order of a sum is worth some 1e-16, and any other difference is far larger. In fp32, on the operators'
default implementation and the fp64 tape, ranks may be off as one process is, by the rule of `harness.budgets`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from optimized import DeepseekV32Config, DeepseekV32ForCausalLM

from ..budgets import RULES
from ..cases import build_case, calibrated_state

LENGTH, ROWS, KL_COEF = 41, 4, 0.5
# Largest relative difference: the right divisions stay below 4e-15 (gradients), the bugs of `wrong.py` above 1.2e-2.
EXACT, WRONG = 1e-10, 1e-4


@dataclass(frozen=True, slots=True)
class Question:
    """One division of one input: `layout` as `ParallelLayout.parse` reads it, `inputs` a case of the harness.

    disturbed: all ranks but the first would choose other keys and experts, as ranks may that round otherwise.
    """

    layout: str
    inputs: str = "text"
    sparse: bool = True
    rows: str = "balanced"
    path: str | None = None
    checkpointing: bool = False
    replay: bool = False
    disturbed: bool = False
    dtype: torch.dtype = torch.float64

    @property
    def name(self) -> str:
        """For a test's id."""
        words = [self.layout, self.inputs, "sparse" if self.sparse else "dense"]
        words += [word for word in (self.path, self.rows if self.rows != "balanced" else None) if word]
        words += ["checkpointing"] * self.checkpointing + ["replay"] * self.replay + ["disturbed"] * self.disturbed
        words += ["fp32"] * (self.dtype == torch.float32)
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Answer:
    """One process's."""

    loss: float
    lm_loss: float
    kl_loss: float
    gradients: dict[str, Tensor]
    topk: tuple[Tensor | None, ...]
    experts: tuple[Tensor | None, ...]
    targets: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]
    logits_BSW: Tensor
    decisions: Any


def batch_for(inputs: str) -> dict[str, Tensor]:
    """Rows of unequal numbers of targets and of real tokens, so that no mean of means is right by luck."""
    config = DeepseekV32Config.preset("tiny")
    case = build_case(inputs, config, seed=3, length=LENGTH, batch=ROWS)
    labels = case.labels.clone()
    # Of the first row little is scored, of the last all: ranks differ.
    labels[0, 5:] = -100
    labels[1, 20:] = -100
    batch = {"input_ids": case.input_ids, "labels": labels}
    if case.attention_mask is not None:
        mask = case.attention_mask.clone()
        mask[1, :7] = 0
        batch["attention_mask"] = mask
    if case.position_ids is not None:
        batch["position_ids"] = case.position_ids
    return batch


def model_for(question: Question, package: Any = None) -> Any:
    """The plain model of a question, in fp64 on the operators' torch implementation."""
    model_class = DeepseekV32ForCausalLM if package is None else package.DeepseekV32ForCausalLM
    config_class = DeepseekV32Config if package is None else package.DeepseekV32Config
    config = config_class.preset("tiny")
    config.use_sparse_attention, config.indexer_kl_coef = question.sparse, KL_COEF
    model: Any = model_class(config)
    model.load_state_dict(calibrated_state(DeepseekV32Config.preset("tiny"), 0))
    model = model.to(question.dtype).train()
    model.backend, model.attention_path = "torch" if question.dtype == torch.float64 else None, question.path
    if question.checkpointing:
        model.gradient_checkpointing_enable()
    return model


# What a forward is asked for, besides losses.
ASKED = {"use_cache": False, "output_decisions": True, "output_indexer_kl_target": True, "output_indexer_scores": True}


def alone(question: Question, decisions: Any = None) -> Answer:
    """One process's answer."""
    model = model_for(question)
    out = model(**batch_for(question.inputs), **ASKED, decisions=decisions)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Answer(
        float(out.loss.detach()), float(out.lm_loss.detach()), float(out.indexer_kl_loss.detach()), gradients,
        tuple(d.topk_indices for d in out.decisions), tuple(d.expert_indices for d in out.decisions),
        tuple(t.detach() for t in out.indexer_kl_targets), tuple(s.detach() for s in out.indexer_scores),
        out.logits.detach(), out.decisions,
    )  # fmt: skip


def tape_of(question: Question, expected: Answer) -> Any:
    """The choices that a question is answered on; None leaves them to the model."""
    if question.replay:
        return shuffled(expected.decisions)
    return expected.decisions if question.dtype == torch.float32 else None


def shuffled(decisions: Any) -> Any:
    """A tape that no model would choose: each row's keys moved one back where it sees more than it selects."""
    topk = [None if d.topk_indices is None else (d.topk_indices - (d.topk_indices > 0).int()) for d in decisions]
    kept = [None if t is None else _distinct(t) for t in topk]
    return type(decisions).from_indices(kept, [d.expert_indices for d in decisions])


def _distinct(indices_BLK: Tensor) -> Tensor:
    ordered = indices_BLK.sort(-1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return ordered.masked_fill(again, -1)


def largest(value: float) -> float:
    """The largest of all ranks'."""
    held = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return float(held)


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected entry; infinite where one is not finite."""
    finite = expected.isfinite()
    if found.shape != expected.shape or not bool((found.isfinite() == finite).all()):
        return float("inf")
    difference = (found.detach() - expected).masked_fill(~finite, 0).abs().max()
    return float(difference / expected.masked_fill(~finite, 0).abs().max().clamp_min(1e-300))


def together(question: Question, expected: Answer, package: Any) -> dict[str, float]:
    """How far this world is from `expected`, by what was compared."""
    layout = replace(package.distributed.ParallelLayout.parse(question.layout), rows=question.rows)
    model = package.distributed.parallelize(model_for(question, package), layout)
    mine = model.ranks.batch_rows(ROWS)
    batch = {name: x[mine] for name, x in batch_for(question.inputs).items()}
    tape = tape_of(question, expected)
    tape = None if tape is None else tape.batch(mine.start, mine.stop)
    with disturbed(package) if question.disturbed and dist.get_rank() else nullcontext():
        out = model(**batch, **ASKED, decisions=tape)
        out.loss.backward()
    found = {
        "loss": abs(float(out.loss.detach()) - expected.loss) / abs(expected.loss),
        "lm loss": abs(float(out.lm_loss.detach()) - expected.lm_loss) / abs(expected.lm_loss),
        "kl loss": abs(float(out.indexer_kl_loss.detach()) - expected.kl_loss) / abs(expected.kl_loss),
        "logits": apart(out.logits, expected.logits_BSW[mine][:, model.own_rows(LENGTH)]),
        "scores": max(apart(a, b[mine]) for a, b in zip(out.indexer_scores, expected.scores, strict=True)),
        "targets": max(apart(a, b[mine]) for a, b in zip(out.indexer_kl_targets, expected.targets, strict=True)),
        "selections": float(sum(_differ(d.topk_indices, t, mine) for d, t in zip(out.decisions, expected.topk, strict=True))),
        "experts": float(sum(_differ(d.expert_indices, t, mine) for d, t in zip(out.decisions, expected.experts, strict=True))),
    }  # fmt: skip
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(torch.stack([g.norm() for g in expected.gradients.values()]).norm())
    found["norm"] = abs(float(package.distributed.global_norm(grads)) - norm) / norm
    worst, count = 0.0, 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None or name not in expected.gradients:
            worst = worst if (parameter.grad is None) == (name not in expected.gradients) else float("inf")
            continue
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        worst, count = max(worst, apart(grad, expected.gradients[name])), count + 1
    found["gradients"] = worst if count == len(expected.gradients) else float("inf")
    return {name: largest(value) for name, value in found.items()}


@contextmanager
def disturbed(package: Any) -> Iterator[None]:
    """This process's own choices, before ranks agree on one, are the first keys and the last experts there are."""
    attention, gate = package.model.DeepseekV32Attention, package.distributed.parts.Gate
    select, choose = attention._select, gate.choose

    def first_keys(self: Any, t: Any, index_k_BSE: Any, layout: Any, ask: Any) -> Tensor:
        return package.model.all_visible(layout.bounds_BL2, select(self, t, index_k_BSE, layout, ask).shape[-1])

    def last_experts(self: Any, scores_NX: Tensor) -> Tensor:
        experts = scores_NX.shape[1] - self.top_k + torch.arange(self.top_k)
        return experts.to(torch.int32).expand(len(scores_NX), -1).contiguous()

    attention._select, gate.choose = first_keys, last_experts
    try:
        yield
    finally:
        attention._select, gate.choose = select, choose


def _differ(found: Tensor | None, expected: Tensor | None, mine: slice) -> int:
    if found is None or expected is None:
        return int((found is None) != (expected is None))
    return int((found != expected[mine]).sum())


def questions(ranks: int, *, all_of_them: bool) -> list[Question]:
    """What a world of that size is asked; the first few by themselves, or all."""
    if ranks == 1:
        fast = [Question("fsdp=1", "left-padded"), Question("cp=1,tp=1,ep=1", "packed", sparse=False)]
        return fast
    if ranks == 2:
        fast = [
            Question("fsdp=2"), Question("fsdp=2", "left-padded", sparse=False),
            Question("cp=2", "left-padded"), Question("cp=2", "packed", sparse=False), Question("cp=2", "packed", path="gathered"),
            Question("tp=2", disturbed=True), Question("tp=2", "left-padded", sparse=False), Question("tp=2", "packed", path="gathered"),
            Question("ep=2", "left-padded"), Question("cp=2", "left-padded", checkpointing=True, rows="contiguous"),
            Question("cp=2", "packed", dtype=torch.float32), Question("tp=2", "left-padded", dtype=torch.float32),
        ]  # fmt: skip
        more = [
            Question(layout, inputs, sparse, path=path)
            for layout in ("fsdp=2", "cp=2", "tp=2", "ep=2")
            for inputs in ("text", "left-padded", "right-padded", "packed")
            for sparse, path in ((True, "gathered"), (True, "masked"), (False, None))
        ]
        more += [Question("cp=2", replay=True), Question("tp=2", "packed", replay=True), Question("ep=2", replay=True)]
        more += [Question(layout, "packed", checkpointing=True) for layout in ("fsdp=2", "tp=2", "ep=2")]
    else:
        fast = [
            Question("fsdp=2,cp=2", "left-padded"), Question("fsdp=2,ep=2"), Question("fsdp=2,tp=2", "packed"),
            Question("ep=2,tp=2", "left-padded", sparse=False),
        ]  # fmt: skip
        more = [
            Question(layout, inputs, sparse)
            for layout in ("fsdp=4", "cp=4", "tp=4", "ep=4", "fsdp=2,cp=2", "fsdp=2,ep=2", "fsdp=2,tp=2", "cp=2,tp=2", "cp=2,ep=2", "ep=2,tp=2")
            for inputs in ("left-padded", "packed")
            for sparse in (True, False)
        ]  # fmt: skip
        more += [Question("cp=2,tp=2", replay=True, checkpointing=True), Question("cp=4", "packed", rows="contiguous")]
    return list(dict.fromkeys([*fast, *more] if all_of_them else fast))


def expected_of(asked_for: list[Question]) -> dict[Question, Answer]:
    """One process's answers; those that differ in their division only are computed once."""
    known: dict[Question, Answer] = {}
    answers = {}
    for question in asked_for:
        plain = replace(
            question,
            layout="",
            rows="balanced",
            checkpointing=False,
            replay=False,
            disturbed=False,
            dtype=torch.float64,
        )
        if plain not in known:
            known[plain] = alone(plain)
        answers[question] = known[plain]
        if question.replay:
            replayed = replace(plain, replay=True)
            if replayed not in known:
                answer = alone(plain, shuffled(known[plain].decisions))
                known[replayed] = replace(answer, decisions=known[plain].decisions)
            answers[question] = known[replayed]
    return answers


def fp32_budgets(question: Question, expected: Answer) -> dict[str, float]:
    """How far ranks may be from fp64: one fp32 process's own distance by the rule of the harness's budgets."""
    one = alone(question, tape_of(question, expected))
    errors = {name: abs(getattr(one, field) - getattr(expected, field)) / abs(getattr(expected, field))
              for name, field in (("loss", "loss"), ("lm loss", "lm_loss"), ("kl loss", "kl_loss"))}  # fmt: skip
    errors["logits"] = apart(one.logits_BSW, expected.logits_BSW)
    errors["scores"] = max(map(apart, one.scores, expected.scores))
    errors["targets"] = max(map(apart, one.targets, expected.targets))
    errors["gradients"] = max(apart(one.gradients[name], x) for name, x in expected.gradients.items())
    rule = RULES["lm gradients", torch.float32]
    return {name: rule.factor * error + rule.floor.max for name, error in errors.items()}


def shares(found: dict[str, float], allowed: dict[str, float] | None) -> dict[str, float]:
    """Distances in fp64 as they are; in fp32 the share of the budget that each uses, where it has one."""
    return found if allowed is None else {name: found[name] / budget for name, budget in allowed.items()}


def prepare(arguments: list[str]) -> Any:
    """Import, and compute what one process answers."""
    import optimized
    import optimized.distributed

    torch.set_num_threads(1)
    ranks, how_many = arguments
    chosen = questions(int(ranks), all_of_them=how_many == "all")
    expected = expected_of(chosen)
    return (
        optimized,
        expected,
        {q: fp32_budgets(q, answer) for q, answer in expected.items() if q.dtype != torch.float64},
    )


def on_rank(_rank: int, prepared: Any, _arguments: list[str]) -> dict[str, dict[str, float]]:
    """Every question's answer."""
    package, expected, allowed = prepared
    return {
        question.name: shares(together(question, answer, package), allowed.get(question))
        for question, answer in expected.items()
    }
