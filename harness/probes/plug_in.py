"""Probes of the plug-in: transformers is left as it was found, its static cache is read as far as it is filled, and
layers that share an indexer attend to what the nearest one before them selected.

They need a model of transformers that was plugged in, whose attribute `plug_in` is the package that did so.

Letters: B batch, L rows, W vocabulary.
"""

import sys
from dataclasses import replace
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import GlmMoeDsaConfig, StaticCache
from transformers.monkey_patching import get_patch_mapping

from reports.schema import Measure, NullCandidate

from ..budgets import scale
from ..cases import Case
from ..checks.base import Answer, Bench, whole_model_check
from ..metrics import SIDES, errors, rejected
from ..observe import Observation
from .model_budgets import SHAPES
from .model_decode import chunkings, keys_of
from .model_sides import Notes, Side, feed, probe

NAMES = ("DeepseekV32", "GlmMoeDsa")
# Slots of a static cache that stay empty behind the text.
SPARE = 11
GLM = "GlmMoeDsaForCausalLM"


def touched() -> dict[tuple[str, str], Any]:
    """What the plug-in may touch in transformers: patches, names of modules, attributes of classes, recorded outputs."""
    found: dict[tuple[str, str], Any] = {("patches", name): patch for name, patch in get_patch_mapping().items()}
    for module in list(sys.modules.values()):
        where = getattr(module, "__name__", "")
        if not where.startswith("transformers"):
            continue
        for name, value in list(vars(module).items()):
            if not name.startswith(NAMES):
                continue
            found[where, name] = value
            if isinstance(value, type) and value.__module__ == where:
                found |= {(name, key): held for key, held in vars(value).items() if not key.endswith("_cached_value")}
                found |= {(name, f"records {key}"): held for key, held in _recorded(value).items()}
    return found


def _recorded(cls: type[Any]) -> dict[str, Any]:
    return cast(dict[str, Any], vars(cls).get("_can_record_outputs", {}))


def differences(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> list[tuple[str, str]]:
    """What is another object in `after`; a lazy name of transformers that was looked up meanwhile is none."""
    names = {name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)}
    fresh = {n for n in names - before.keys() if getattr(after[n], "__module__", "").startswith("transformers.")}
    return sorted(names - fresh)


def restored(bench: Bench) -> Answer:
    """Plugs in, builds a model by from_config as transformers does it, and unplugs."""
    module: Any = bench.module
    before = touched()
    with module.plug_in.plug_into_transformers():
        # A class of a user, for which the shared tables of outputs are rewritten.
        derived: Any = type("Derived", (getattr(transformers, type(module).__name__),), {})
        derived._from_config(module.config)
        inside = touched()
    left = differences(before, touched())
    return Answer(
        [Measure("entries of transformers left changed", float(len(left)), 0.0)],
        [NullCandidate("transformers while the plug-in is in", bool(differences(before, inside)))],
        f"left behind: {left[:3]}" if left else "",
    )


def static_cache(side: Side, notes: Notes) -> None:
    """Chunks through a static cache with room to spare, padded on the left, against the uncached forward.

    The reference has one cache, which grows; its own differences are those of chunks through that.
    """
    k = keys_of(side)
    length = 3 * k + 1
    for sparse in side.modes:
        model = side.model(index_topk=k, use_sparse_attention=sparse).eval()
        case = side.case("left-padded", length=length, index_topk=k, use_sparse_attention=sparse)
        base = side.see(model, case)
        expected_NW = base.logits[case.real_BL]
        for name, sizes in chunkings(k, length).items():
            if name == "token by token":
                continue
            seen, _ = feed(side, model, case, sizes, tape=base.decisions, cache=_new_cache(side, model, length))
            where = f"{'sparse' if sparse else 'dense'}, {name}"
            notes.rows(side, where, seen, case, case.real_BL, expected_NW, base.decisions)
        notes.same(
            f"sparse is {sparse}", expected_NW, expected_NW, side.shapes,
            {"read as unpadded": (_unpadded(side, model, case).logits[case.real_BL], expected_NW)},
        )  # fmt: skip


def _unpadded(side: Side, model: nn.Module, case: Case) -> Observation:
    return side.see(model, replace(case, attention_mask=None))


def _new_cache(side: Side, model: nn.Module, length: int) -> Any:
    if side.subject.name == "reference":
        return None
    return StaticCache(cast(Any, model).config, max_cache_len=length + SPARE)


def shared_indexers(bench: Bench) -> Answer:
    """The layers from the third on share the second's indexer, against transformers' own of the same weights.

    The yardstick is how far transformers' two attentions lie apart. Null candidates: all layers share the first's
    indexer, and every key is selected.

    Raises:
        ValueError: a model of fewer than three layers.
    """
    module: Any = bench.module
    layers, ids = module.config.num_hidden_layers, bench.case.input_ids.to(bench.device)
    if layers < 3:
        raise ValueError(f"num_hidden_layers is {layers}; layers that share the second's indexer need 3 or more.")

    def logits(full: int = 2, attention: str = "sdpa", index_topk: int = module.config.index_topk) -> torch.Tensor:
        config: Any = GlmMoeDsaConfig
        types = ["full"] * full + ["shared"] * (layers - full)
        fields = {**module.config.to_dict(), "indexer_types": types, "index_topk": index_topk}
        model: Any = getattr(transformers, GLM)(config(**fields, attn_implementation=attention))
        # The layers that share have no place for their own indexers' weights.
        model.load_state_dict(bench.oracle.state, strict=False)
        with torch.no_grad():
            found: torch.Tensor = model.to(bench.device).eval()(ids, use_cache=False).logits.flatten(0, 1)
        return found

    def of_plugged() -> torch.Tensor:
        with module.plug_in.plug_into_transformers():
            return logits()

    expected, found = logits(), bench.of_subject(of_plugged)
    allowed = scale(SHAPES, errors(logits(attention="eager"), expected), expected.numel())
    seen = errors(found, expected)
    wrong = {"all share the first's": logits(full=1), "every key is selected": logits(index_topk=ids.shape[1])}
    return Answer(
        [Measure(f"{side} error", getattr(seen, side), getattr(allowed, side)) for side in SIDES],
        [NullCandidate(name, rejected(other, expected, allowed)) for name, other in wrong.items()],
    )


CHECKS = [
    whole_model_check("probes.plug_in_restored", "probes", restored, frozenset({"plug-in"})),
    probe("static_cache", static_cache, {"plug-in", "cache", "padding"}),
    whole_model_check("probes.shared_indexers", "probes", shared_indexers, frozenset({"shared-indexers"})),
]
