"""Probes of the configuration: what is asked for besides does not change the logits, what is configured does (spec A06,
B16, B19).

Letters: B batch, L rows, W vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from reference import Decisions, DeepseekV32Config

from ..cases import Case
from ..checks.base import Answer, Bench, Check, whole_model_check
from ..subjects import ALL, resolve_subject
from .model_budgets import CHANGES, CHOICES_CHANGED, CONTENT, LOSSES
from .model_decode import keys_of
from .model_sides import Notes, Side, feed, only_experts, only_keys, probe
from .model_training import loss_of


def stages(side: Side, notes: Notes) -> None:
    """Logits are those of the mode, whatever is asked for: KL loss, its coefficient, labels, training or evaluation,
    prefill or decode. And loss = lm_loss + coefficient · indexer_kl_loss."""
    k = keys_of(side)
    fields: dict[str, Any] = {"index_topk": k}
    case = side.case(length=3 * k, **fields)
    modes = {sparse: side.see(side.model(use_sparse_attention=sparse, **fields), case) for sparse in side.modes}
    for sparse, base in modes.items():
        # A tape of dense mode holds experts alone.
        expected_NW = base.logits.flatten(0, 1)
        other = {"the other mode": (modes[not sparse].logits.flatten(0, 1), expected_NW)} if len(modes) == 2 else {}
        for coef in (0.0, 0.5) if "indexer-kl" in side.can else (0.0,):
            model = side.model(use_sparse_attention=sparse, indexer_kl_coef=coef, **fields)
            for training in (True, False):
                model.train(training)
                for asked, wants in _requests(side, case, training).items():
                    name = f"{'sparse' if sparse else 'dense'}, coefficient {coef}, {'train' if training else 'eval'}, {asked}"
                    out = _forward(side, model, case, base.decisions, wants)
                    notes.same(name, out.logits.flatten(0, 1), expected_NW, CONTENT, other)
                    if "labels" in wants and "indexer-kl" in side.can:
                        _loss_adds_up(notes, name, out, coef)
            if "cache" in side.can:
                # After training, and with the flags of another stage: decode is still decode.
                name = f"{'sparse' if sparse else 'dense'}, coefficient {coef}, decode"
                seen, _ = feed(side, model, case, [2 * k, *[1] * 2, k - 2], tape=base.decisions, kl=coef > 0)
                notes.same(name, seen.logits.flatten(0, 1), expected_NW, side.shapes, other)


def _requests(side: Side, case: Case, training: bool) -> dict[str, dict[str, Any]]:
    labels = {"labels": case.labels.to(side.device)}
    kl = {"output_indexer_kl_loss": True} if "indexer-kl" in side.can else {}
    found: dict[str, dict[str, Any]] = {"nothing asked": {}, "labels and KL": {**labels, **kl}}
    return {**found, "labels": labels, "KL": kl} if training else found


def _forward(side: Side, model: nn.Module, case: Case, tape: Decisions | None, wants: Mapping[str, Any]) -> Any:
    replayed = {} if tape is None else {"decisions": tape.to(side.device)}
    with torch.no_grad():
        return model(**case.inputs(side.device), **wants, **replayed)


def _loss_adds_up(notes: Notes, name: str, out: Any, coef: float) -> None:
    lm_loss = loss_of(out).detach()
    kl_loss = getattr(out, "indexer_kl_loss", None)
    total = lm_loss if coef == 0 or kl_loss is None else lm_loss + coef * kl_loss.detach()
    nulls = {} if coef == 0 else {"LM loss alone": (lm_loss[None], total[None])}
    notes.same(f"{name}, loss", out.loss.detach()[None], total[None], LOSSES, nulls)


@dataclass(frozen=True, slots=True)
class Field:
    """Another value of a part of the config.

    `frees`: what must be chosen anew for it to act, "keys" or "experts"; "" when it acts on a tape.
    `reads`: the output that it changes. `needs`: what a subject must declare for it.
    """

    name: str
    values: dict[str, Any]
    frees: str = ""
    reads: str = "logits"
    needs: frozenset[str] = frozenset()


def fields_of(config: DeepseekV32Config) -> list[Field]:
    """Every field that changes the computation and no shape, at another value than `config`'s."""
    rope = dict(config.rope)
    found = [
        Field("rms_norm_eps", {"rms_norm_eps": config.rms_norm_eps + 0.1}),
        Field("index_topk", {"index_topk": max(config.index_topk // 2, 1)}, frees="keys"),
        Field("routed_scaling_factor", {"routed_scaling_factor": 2 * config.routed_scaling_factor}),
        Field("norm_topk_prob", {"norm_topk_prob": not config.norm_topk_prob}),
        Field("rope_theta", {"rope_parameters": {**rope, "rope_theta": rope["rope_theta"] / 20}}),
        Field(
            "indexer_rope_interleaved", {"indexer_rope_interleaved": not config.indexer_rope_interleaved},
            reads="kl_loss", needs=frozenset({"indexer-kl"}),
        ),
    ]  # fmt: skip
    groups = _other_groups(config)
    if groups is not None:
        found.append(Field("n_group and topk_group", groups, frees="experts"))
    if config.num_experts_per_tok > 1:
        found.append(
            Field("num_experts_per_tok", {"num_experts_per_tok": config.num_experts_per_tok - 1}, frees="experts")
        )
    if rope["rope_type"] == "yarn":
        for name, value in (
            ("factor", rope["factor"] * 8),
            ("mscale_all_dim", 0.5 * (rope.get("mscale_all_dim") or 2.0)),
            ("mscale", 2 * (rope.get("mscale") or 1.0)),
            ("beta_fast", 4 * (rope.get("beta_fast") or 32)),
            ("original_max_position_embeddings", rope["original_max_position_embeddings"] // 8),
        ):
            found.append(Field(f"rope: {name}", {"rope_parameters": {**rope, name: value}}))
        found.append(
            Field("rope: rope_type", {"rope_parameters": {"rope_type": "default", "rope_theta": rope["rope_theta"]}})
        )
    for name in ("indexer_precision", "kv_latent_precision"):
        reads = "kl_loss" if name == "indexer_precision" else "logits"
        needs = {"fp8", "indexer-kl"} if reads == "kl_loss" else {"fp8"}
        found.append(
            Field(name, {name: "fp8" if getattr(config, name) == "native" else "native"}, "", reads, frozenset(needs))
        )
    return found


def _other_groups(config: DeepseekV32Config) -> dict[str, Any] | None:
    if config.n_group > 1:
        return {"n_group": 1, "topk_group": 1}
    return None


def changes(side: Side, fields: list[Field], tapes: dict[str, Decisions | None], case: Case) -> dict[str, torch.Tensor]:
    """By field, what changing it does to the output that it changes, with the choices of `tapes` replayed."""
    found = {}
    model = side.model()
    bases: dict[tuple[str, str], Any] = {}
    for field in fields:
        tape, kl = tapes[field.frees], field.reads == "kl_loss"
        if (field.frees, field.reads) not in bases:
            bases[field.frees, field.reads] = getattr(side.see(model, case, tape=tape, kl=kl), field.reads)
        base = bases[field.frees, field.reads]
        other = side.see(
            side.model(**field.values), replace(case, config=side.config_of(**field.values)), tape=tape, kl=kl
        )
        change = getattr(other, field.reads) - base
        found[field.name] = change.flatten(0, 1) if change.dim() > 1 else change[None]
    return found


def config(bench: Bench) -> Answer:
    """Each field of the config, changed, changes the output as it changes the reference's in fp64.

    A field that is parsed and never read changes nothing.
    """
    subject = Side(bench, bench.subject)
    fields = [field for field in fields_of(subject.config) if field.needs <= subject.can]
    case = subject.case(length=3 * subject.k)

    def of_reference() -> tuple[dict[str, Decisions | None], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        low, exact = (Side(bench, resolve_subject("reference"), dtype) for dtype in (bench.dtype, torch.float64))
        tape = exact.see(exact.model(), case).decisions
        tapes = {"": tape, "keys": only_experts(tape), "experts": only_keys(tape)}
        return tapes, changes(exact, fields, tapes, case), changes(low, fields, tapes, case)

    tapes, expected, low = bench.oracle.remember(("probes.config", subject.can & ALL), of_reference)
    found = bench.of_subject(lambda: changes(subject, fields, tapes, case))
    own = Notes()
    seen = Notes(own.errors)
    for notes, of_fields in ((own, low), (seen, found)):
        for field in fields:
            e = expected[field.name]
            exactly = not field.frees and "tape" in subject.can and "fp8" not in field.needs
            notes.same(
                field.name, of_fields[field.name], e, CHANGES if exactly else CHOICES_CHANGED,
                {"no change": (torch.zeros_like(e), e)}, gain=exactly,
            )  # fmt: skip
    return seen.answer()


CHECKS: list[Check] = [
    probe("stages", stages),
    whole_model_check("probes.config", "probes", config),
]
