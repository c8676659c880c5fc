"""Known bugs planted in the reference: the committed vectors find each of them, in constants, in outputs, or in both."""

import pytest
import torch

import reference.attention
import reference.fp8
import reference.indexer
import reference.moe
import reference.rope
from harness.goldens.cli import COMMITTED
from harness.goldens.compare import compare
from reference.moe import Gate


def interleaved_indexer(monkeypatch):
    monkeypatch.setattr(reference.indexer, "rotate_half_split", reference.rope.rotate_interleaved)


def scale_without_yarn(monkeypatch):
    plain = lambda config: (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5  # noqa: E731
    monkeypatch.setattr(reference.attention, "softmax_scale", plain)


def eps_of_the_key_norm(monkeypatch):
    monkeypatch.setattr(reference.indexer, "K_NORM_EPS", 1e-5)


def no_relu(monkeypatch):
    def scores(q_BLJE, k_BSE, w_BLJ):
        return torch.einsum("blje,bse,blj->bls", q_BLJE, k_BSE, w_BLJ)

    monkeypatch.setattr(reference.attention, "index_scores", scores)


def target_of_the_strongest_head(monkeypatch):
    def target(probs_BHLS):
        strongest = probs_BHLS.detach().amax(1)
        return strongest / strongest.sum(-1, keepdim=True).clamp_min(1e-300)

    monkeypatch.setattr(reference.attention, "attention_target", target)


def scale_rounded_down(monkeypatch):
    def down(scale):
        return ((scale.float().view(torch.int32) >> 23) << 23).view(torch.float32)

    monkeypatch.setattr(reference.fp8, "power_of_two_at_least", down)


def biased_weights(monkeypatch):
    right = Gate.weights

    def weights(self, scores_NX, experts_NT):
        return right(self, scores_NX + self.e_score_correction_bias.to(scores_NX.dtype), experts_NT)

    monkeypatch.setattr(Gate, "weights", weights)


def group_by_its_best(monkeypatch):
    right = Gate.choose

    def choose(self, scores_NX):
        # With the lesser half of each group out of the way, the sum of two is the best.
        groups = scores_NX.unflatten(-1, (self.n_group, -1))
        lesser = groups < groups.amax(-1, keepdim=True)
        return right(self, torch.where(lesser, groups - 100.0, groups).flatten(-2))

    monkeypatch.setattr(Gate, "choose", choose)


@pytest.mark.parametrize(
    ("plant", "starts"),
    [
        (
            interleaved_indexer,
            ["index_q of the first layer", "index_k of the first layer", "index_scores.0 of case text"],
        ),
        (scale_without_yarn, ["attention_out of the first layer", "logits of case text, sparse"]),
        (
            eps_of_the_key_norm,
            ["constant indexer.k_norm_eps", "constant indexer.k_norm,", "index_k of the first layer"],
        ),
        (no_relu, ["index_scores.0 of case text, sparse", "topk_indices.0 of case packed, sparse"]),
        (target_of_the_strongest_head, ["kl_loss of case text, sparse", "gradients.kl of case packed, dense"]),
        (scale_rounded_down, ["constant indexer.fp8_scale", "constant indexer.fp8_key_scale"]),
        (biased_weights, ["constant gate.biased_weights", "logits_tail of case packed, dense"]),
        (group_by_its_best, ["constant gate.experts", "expert_indices.1 of case text, sparse"]),
    ],
)
def test_the_committed_vectors_find_a_bug_in_the_reference(monkeypatch, plant, starts):
    plant(monkeypatch)
    sentences = compare(COMMITTED).sentences
    assert [start for start in starts if not any(said.startswith(start) for said in sentences)] == []
