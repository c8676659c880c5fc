"""One forward and its backwards, observed: everything that the checks look at, from one run of a model.

Letters: B batch, L rows, S key slots, X experts.
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from reference import Decisions
from reference.moe import Gate

from .cases import Case

Gradients = dict[str, torch.Tensor | None]


@dataclass(slots=True)
class Observation:
    """What one model did on one case. Gradients are None where autograd reaches nothing."""

    logits: torch.Tensor
    lm_loss: torch.Tensor
    lm_grads: Gradients = field(default_factory=dict)
    kl_loss: torch.Tensor | None = None
    kl_grads: Gradients = field(default_factory=dict)
    decisions: Decisions | None = None
    # Of the reference only: raw I on visible keys, and the router's biased scores, a layer each.
    scores_BLS: list[torch.Tensor] = field(default_factory=list)
    router_BLX: list[torch.Tensor | None] = field(default_factory=list)


def observe(
    model: nn.Module,
    case: Case,
    capabilities: frozenset[str],
    *,
    tape: Decisions | None = None,
    gradients: bool = True,
    lm_gradients: bool = True,
    scores: bool = False,
) -> Observation:
    """Run `model` on `case`: a forward, the LM loss's gradients, and the KL loss's when it has one.

    Args:
        capabilities: what the model declares; nothing else is asked of it.
        tape: decisions to replay; needs the capability "tape".
        gradients: whether to run the backwards. lm_gradients: whether that of the LM loss is one of them.
        scores: also keep index scores, and of the reference the router's; the forward takes output_indexer_scores.
    """
    device = next(model.parameters()).device
    wants: dict[str, Any] = {}
    if "tape" in capabilities:
        wants["output_decisions"] = True
        if tape is not None:
            wants["decisions"] = tape.to(device)
    if "indexer-kl" in capabilities:
        wants["output_indexer_kl_loss"] = True
    if scores:
        wants["output_indexer_scores"] = "visible"
    with torch.set_grad_enabled(gradients), _RouterScores(model, scores) as router:
        out = model(**case.inputs(device), labels=case.labels.to(device), **wants)
    _check_output(out, case, capabilities)
    lm_loss = _field(out, "lm_loss")
    lm_loss = cast(torch.Tensor, out.loss) if lm_loss is None else lm_loss
    kl_loss = _field(out, "indexer_kl_loss")
    seen = Observation(
        logits=out.logits.detach(),
        lm_loss=lm_loss.detach(),
        kl_loss=None if kl_loss is None else kl_loss.detach(),
        decisions=_field(out, "decisions"),
    )
    if scores:
        seen.scores_BLS = [s.detach() for s in out.indexer_scores]
        seen.router_BLX = router.scores
    if gradients:
        names, parameters = zip(*model.named_parameters(), strict=True)
        if lm_gradients:
            seen.lm_grads = _backward(lm_loss, names, parameters, keep=kl_loss is not None)
        if kl_loss is not None:
            seen.kl_grads = _backward(kl_loss, names, parameters, keep=False)
    return seen


def _check_output(out: Any, case: Case, capabilities: frozenset[str]) -> None:
    """What was declared must be there, in its shape; whatever is wrong here is the model's failure."""
    expected = (*case.input_ids.shape, case.config.vocab_size)
    if tuple(out.logits.shape) != expected:
        raise ValueError(f"its logits have shape {tuple(out.logits.shape)}; they must have {expected}")
    if "indexer-kl" in capabilities and _field(out, "indexer_kl_loss") is None:
        raise ValueError("it declares indexer-kl, but its output has no indexer_kl_loss")
    if "tape" in capabilities:
        tape = _field(out, "decisions")
        if tape is None or len(tape) != case.config.num_hidden_layers:
            raise ValueError(
                f"it declares tape, but its output has no decisions of {case.config.num_hidden_layers} layers"
            )


def _field(out: Any, name: str) -> Any:
    return getattr(out, name, None)


def _backward(
    loss: torch.Tensor, names: tuple[str, ...], parameters: tuple[nn.Parameter, ...], keep: bool
) -> Gradients:
    wanted = [p for p in parameters if p.requires_grad]
    if not loss.requires_grad:
        return dict.fromkeys(names)
    grads = torch.autograd.grad(loss, wanted, retain_graph=keep, allow_unused=True)
    by_id = {id(p): g for p, g in zip(wanted, grads, strict=True)}
    return {name: by_id.get(id(p)) for name, p in zip(names, parameters, strict=True)}


class _RouterScores:
    """Records the biased router scores of each layer during one forward of the reference."""

    def __init__(self, model: nn.Module, active: bool) -> None:
        self.model, self.active = model, active
        self.scores: list[torch.Tensor | None] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "_RouterScores":
        if not self.active:
            return self
        # Of a subject only the index scores are wanted: it need not be made as the reference is.
        for i, layer in enumerate(getattr(getattr(self.model, "model", None), "layers", ())):
            self.scores.append(None)
            if isinstance(gate := getattr(getattr(layer, "mlp", None), "gate", None), Gate):
                self._handles.append(layer.mlp.register_forward_pre_hook(self._hook(i, gate)))
        return self

    def _hook(self, layer_idx: int, gate: Gate) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            with torch.no_grad():
                scores = gate(args[0].flatten(0, 1))
                biased = scores + gate.e_score_correction_bias.to(scores.dtype)
            self.scores[layer_idx] = biased.unflatten(0, args[0].shape[:2])

        return hook

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
