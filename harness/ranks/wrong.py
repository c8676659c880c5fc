"""Every known bug of several ranks, on two of them, against one process.

arguments: names of mutants, or none for all
"""

from contextlib import ExitStack
from typing import Any

import torch

from ..mutants.catalogue.distributed import MUTANTS
from ..mutants.patching import patched_copy
from .parity import Question, expected_of, together

CP, CP_DENSE = Question("cp=2", "left-padded"), Question("cp=2", "packed", sparse=False)
TP = Question("tp=2", disturbed=True)
EP, DATA = Question("ep=2"), Question("fsdp=2", "left-padded")
RIGHT = "no patch"
# Where each shows, by its name without the entry of the catalogue; the copy without a patch is asked all that the chosen are.
SHOWN_BY: dict[str, Question] = {
    "lm-loss-as-a-mean-of-means": DATA,
    "kl-rows-counted-locally": DATA,
    "gradients-averaged-over-ranks": DATA,
    "kl-too-small-by-the-ranks-of-cp": CP_DENSE,
    "target-of-a-rank-s-heads": TP,
    "divergence-before-the-sum-over-heads": TP,
    "sum-over-ranks-of-a-temporary": DATA,
    "a-selection-for-each-rank-of-tp": TP,
    "an-expert-choice-for-each-rank-of-tp": TP,
    "positions-local-to-the-rank": CP,
    "bounds-local-to-the-rank": CP,
    "latents-in-the-order-of-ranks": CP,
    "gradient-of-gathered-latents-not-summed": CP,
    "labels-shifted-within-a-rank": CP,
    "pads-predict-on-ranks": CP,
    "tokens-back-in-the-order-of-experts": EP,
    "exchanged-gradients-lost": EP,
    "router-learns-from-local-experts": TP,
    "q-latent-learns-from-local-heads": TP,
    "rope-key-learns-from-local-heads": TP,
    "norm-of-own-shards": DATA,
}


def short(name: str) -> str:
    """A mutant's name without its entry."""
    entry, _, rest = name.partition("-")
    return rest if entry[1:].isdecimal() else name


def prepare(arguments: list[str]) -> Any:
    """The changed copies, imported, and one process's answers to what shows them."""
    torch.set_num_threads(1)
    held = ExitStack()
    copies = {}
    chosen = {short(mutant.name): mutant.patches for mutant in MUTANTS}
    for name, patches in {RIGHT: (), **chosen}.items():
        if not arguments or name in arguments or name == RIGHT:
            copies[name] = held.enter_context(patched_copy(patches)).optimized
            __import__(f"{copies[name].__name__}.distributed")
    asked = {name: [SHOWN_BY[name]] for name in copies if name != RIGHT}
    asked[RIGHT] = list(dict.fromkeys(question for questions in asked.values() for question in questions))
    return copies, asked, expected_of(asked[RIGHT]), held


def on_rank(_rank: int, prepared: Any, _arguments: list[str]) -> dict[str, dict[str, float]]:
    """How far each is from one process, by what was compared: the largest over what it was asked."""
    copies, asked, expected, _ = prepared
    answers = {}
    for name, package in copies.items():
        found = [together(question, expected[question], package) for question in asked[name]]
        answers[name] = {what: max(measures[what] for measures in found) for what in found[0]}
    return answers
