"""Checks of a whole model: sparse attention with k ≥ L is dense attention, and who gets gradient in which training mode."""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from reference import Decisions, DeepseekV32Config, LayerDecisions, freeze_indexer, train_only_indexer
from reference.training import parameter_group
from reports.schema import Measure, NullCandidate

from ..budgets import SPARSE_IS_DENSE, scale
from ..metrics import errors, rejected
from ..observe import observe
from .base import Answer, Bench, Oracle, State, whole_model_check
from .parity import judge_tensor

MOST_LAYERS = 2


_CHANGED: dict[str, DeepseekV32Config] = {}


def changed(config: DeepseekV32Config, **fields: object) -> DeepseekV32Config:
    """A copy of `config` with `fields` replaced; what was made once is copied, which takes a tenth of the time."""
    wanted = {**config.to_dict(), **fields}
    key = repr(wanted)
    if key not in _CHANGED:
        _CHANGED[key] = DeepseekV32Config(**wanted)
    return deepcopy(_CHANGED[key])


def shallow(config: DeepseekV32Config) -> DeepseekV32Config:
    """A copy of `config` with at most MOST_LAYERS layers, one of them with experts if any is.

    For what runs a model many times: with all layers of a large model each module would be of gigabytes.
    """
    layers = min(config.num_hidden_layers, max(MOST_LAYERS, config.first_k_dense_replace + 1))
    return changed(config, num_hidden_layers=layers)


def weights_for(config: DeepseekV32Config, state: State) -> State:
    """What a model of `config` holds of `state`, the weights of one with at least as many layers."""
    return {name: tensor for name, tensor in state.items() if layer_of(name) < config.num_hidden_layers}


def layer_of(name: str) -> int:
    """The layer that a tensor of a state belongs to, −1 outside the layers."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1


def sparse_is_dense(bench: Bench) -> Answer:
    """The subject in sparse mode with index_topk = L, against the fp64 reference in dense mode, on the same experts."""
    length = bench.case.input_ids.shape[1]
    dense_case = replace(bench.case, config=changed(bench.case.config, use_sparse_attention=False))
    oracle = bench.oracle.remember("dense", lambda: Oracle(dense_case, bench.oracle.state, bench.device, bench.dtype))
    real = bench.case.real_BL.to(bench.device)
    expected = oracle.seen.logits[real]
    allowed = scale(SPARSE_IS_DENSE, errors(oracle.baseline.logits[real], expected), expected.numel())

    def sparse_logits(topk: int) -> torch.Tensor:
        case = replace(bench.case, config=changed(bench.case.config, index_topk=topk, use_sparse_attention=True))
        experts_only = Decisions(tuple(LayerDecisions(None, d.expert_indices) for d in oracle.tape))
        module = bench.build(case.config)
        seen = bench.of_subject(
            lambda: observe(module, case, bench.subject.capabilities, tape=experts_only, gradients=False)
        )
        return seen.logits[real]

    measures, nulls = judge_tensor(sparse_logits(length), expected, allowed)
    halved = rejected(sparse_logits(max(length // 2, 1)), expected, allowed)
    return Answer(measures, [*nulls, NullCandidate("half the keys", halved)])


@dataclass(frozen=True, slots=True)
class Mode:
    """One training mode: what is set, what is frozen, which losses are used, and what the subject must declare."""

    name: str
    fields: dict[str, object]
    losses: tuple[str, ...]
    trains: str = "all"
    needs: frozenset[str] = frozenset()


_KL = frozenset({"indexer-kl"})
_DENSE = frozenset({"dense-mode"})
MODES = (
    Mode("dense, LM", {"use_sparse_attention": False}, ("lm",), needs=_DENSE),
    Mode("dense warm-up, KL", {"use_sparse_attention": False}, ("kl",), "indexer", _KL | _DENSE),
    Mode("sparse, LM", {"use_sparse_attention": True}, ("lm",)),
    Mode("sparse, LM, indexer frozen", {"use_sparse_attention": True}, ("lm",), "all but indexer"),
    Mode("sparse, KL", {"use_sparse_attention": True}, ("kl",), needs=_KL),
    Mode("sparse, LM + KL", {"use_sparse_attention": True}, ("lm", "kl"), needs=_KL),
    Mode("sparse, KL, input attached", {"use_sparse_attention": True, "detach_indexer_input": False}, ("kl",),
         needs=_KL | {"detach-switch"}),
)  # fmt: skip

BACKBONE = ("embedding", "attention", "gate", "experts", "FFN, shared experts", "norms", "head")
INDEXER = ("wq_b", "wk", "k_norm.weight", "k_norm.bias", "weights_proj")
Table = dict[str, dict[str, str]]


def expected_table() -> Table:
    """What must hold, column by column (design: who gets gradient)."""
    table: Table = {}
    for mode in MODES:
        backbone = "finite" if "lm" in mode.losses else "none"
        indexer = "finite" if "kl" in mode.losses else "none"
        column = {**dict.fromkeys(BACKBONE, backbone), **{f"indexer.{name}": indexer for name in INDEXER}}
        if mode.name == "sparse, KL, input attached":
            # The indexers' inputs lead back to everything below them, and never to the head.
            column.update({**dict.fromkeys(BACKBONE, "finite"), "head": "none"})
        table[mode.name] = column
    return table


def observed_table(bench: Bench) -> Table:
    """What the subject does, in the modes that it declares."""
    table: Table = {}
    for mode in MODES:
        if not mode.needs <= bench.subject.capabilities:
            continue
        case = replace(bench.case, config=changed(bench.case.config, **mode.fields))
        module = bench.build(case.config)
        if mode.trains == "indexer":
            train_only_indexer(module)
        elif mode.trains == "all but indexer":
            freeze_indexer(module)
        seen = bench.of_subject(partial(observe, module, case, bench.subject.capabilities))
        gradients = {
            name: [g for g in (seen.lm_grads.get(name) if "lm" in mode.losses else None,
                               seen.kl_grads.get(name) if "kl" in mode.losses else None) if g is not None]
            for name, _ in module.named_parameters()
        }  # fmt: skip
        table[mode.name] = summarise(module, gradients)
    return table


def summarise(module: nn.Module, gradients: dict[str, list[torch.Tensor]]) -> dict[str, str]:
    """none, zero, finite or NaN for each group. An indexer tensor is finite only if it is non-zero in every layer."""
    members: dict[str, list[str]] = {}
    for name, _ in module.named_parameters():
        group = parameter_group(name)
        if group == "indexer":
            leaf = name.split(".indexer.")[1]
            group = f"indexer.{leaf if leaf.startswith('k_norm') else leaf.removesuffix('.weight')}"
        members.setdefault(group, []).append(name)
    column = {}
    for group, names in members.items():
        states = {_state(gradients[name]) for name in names}
        if "NaN" in states:
            column[group] = "NaN"
        elif len(states) == 1:
            column[group] = states.pop()
        elif group.startswith("indexer."):
            column[group] = "some layers only"
        else:
            # A backbone group may hold tensors that a case does not reach, such as an expert nobody chose.
            column[group] = "finite" if "finite" in states else "zero"
    return column


def _state(gradients: list[torch.Tensor]) -> str:
    if not gradients:
        return "none"
    if not all(bool(torch.isfinite(g).all()) for g in gradients):
        return "NaN"
    return "finite" if any(bool((g != 0).any()) for g in gradients) else "zero"


def differences(found: Table, expected: Table) -> list[str]:
    """Cells of `found` that are not as expected, as sentences."""
    return [
        f"{mode}: {group} gets {value}, must get {expected[mode].get(group)}"
        for mode, column in found.items()
        for group, value in column.items()
        if value != expected[mode].get(group)
    ]


def who_gets_gradient(bench: Bench) -> Answer:
    """The gradient table, cell by cell; columns that the subject does not declare are left out by name."""
    expected, found = expected_table(), observed_table(bench)
    wrong = differences(found, expected)
    nulls = []
    for kind, mode, group, value in (
        ("LM loss reaches the indexer", "sparse, LM", "indexer.wk", "finite"),
        ("experts get no gradient", "sparse, LM", "experts", "none"),
        ("KL loss reaches the backbone", "sparse, KL", "attention", "finite"),
        ("k_norm.bias is never trained", "sparse, KL", "indexer.k_norm.bias", "none"),
        ("zero instead of None", "sparse, KL", "head", "zero"),
    ):
        if mode in found:
            planted = {**found, mode: {**found[mode], group: value}}
            nulls.append(NullCandidate(kind, len(differences(planted, expected)) > 0))
    rows = [{"group": g, **{m: found[m].get(g, "") for m in found}} for g in next(iter(found.values()))]
    left_out = [mode.name for mode in MODES if mode.name not in found]
    return Answer(
        [Measure("wrong cells", float(len(wrong)), 0.0)],
        nulls,
        "; ".join(wrong[:3]) or (f"not applicable: {'; '.join(left_out)}" if left_out else ""),
        {"gradient_table": {"columns": list(found), "rows": rows}, "left_out": left_out},
    )


CHECKS = [
    whole_model_check("identity.sparse_is_dense", "identity", sparse_is_dense, frozenset({"tape"})),
    whole_model_check("gradients.who", "gradients", who_gets_gradient),
]
