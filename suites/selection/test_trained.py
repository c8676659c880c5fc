"""Weights that attend to something: the checks on the trained model of the repository, and what its indexer is worth."""

from collections import Counter

import pytest
import torch

from harness.runner import run
from harness.training import TRAINED
from harness.training.evaluate import evaluate
from harness.verify import Request, plan_for
from optimized import DeepseekV32ForCausalLM
from reports.schema import Status
from suites.meta.test_verify import Silent


def judged(subject, checks, backend=None):
    request = Request(
        checkpoint=TRAINED, subject=subject, checks=checks, cases="text,packed", dtype="float32", backend=backend
    )
    return list(run(plan_for(request), Silent()))


def test_the_checkpoint_is_small_and_of_the_preset():
    assert sum(path.stat().st_size for path in TRAINED.iterdir()) <= 8e6
    assert DeepseekV32ForCausalLM.from_pretrained(TRAINED).config.index_topk == 32


@pytest.mark.parametrize("backend", [None, "torch"])
def test_right_models_agree_on_trained_weights(backend):
    found = judged("optimized", "finite,choices,parity.logits,parity.lm_loss,parity.lm_gradients,kl,gradients", backend)
    assert Counter(v.status for v in found)[Status.VERIFIED] >= 24
    assert {v.status for v in found} == {Status.VERIFIED}, [(v.check, v.reason) for v in found]


@pytest.mark.parametrize(
    "mutant", ["A01-interleaved-indexer-rope", "A15-no-relu", "B05-row-starts-ignored", "gain-of-4-percent"]
)
def test_wrong_models_are_noticed_on_trained_weights(mutant):
    assert Status.FAILED in {v.status for v in judged(f"mutant:{mutant}", "parity,choices,kl")}


@pytest.fixture(scope="module")
def found():
    torch.set_num_threads(1)
    model = DeepseekV32ForCausalLM.from_pretrained(TRAINED, dtype=torch.float32)
    return {e.selection: e for e in evaluate(model, ("dense", "indexer", "recent", "random"), count=4)}


def test_the_trained_indexer_selects_what_attention_needs(found):
    indexer, dense = found["indexer"], found["dense"]
    assert indexer.recall(32) >= 0.95
    assert min(indexer.captured) >= 0.8
    for task in ("copy", "retrieval"):
        assert indexer.answers[task].accuracy >= dense.answers[task].accuracy - 0.02 >= 0.9
    assert indexer.answers["text"].loss <= 1.01 * dense.answers["text"].loss


@pytest.mark.parametrize("selection", ["recent", "random"])
def test_no_other_selection_does(found, selection):
    assert found[selection].recall(32) < 0.95
    for task in ("copy", "retrieval"):
        assert found[selection].answers[task].accuracy < 0.3
