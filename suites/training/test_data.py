"""The training data: pure in seed and step, held-out apart, and answers that a window of recent keys cannot give.

Letters: B rows, L tokens.
"""

from collections import Counter
from itertools import pairwise

import pytest
import torch

from harness.training.data import Mixture, held_out, sources
from harness.training.tasks import ASSISTANT, KINDS, SEP, UNSCORED, VOCABULARY
from reference import DeepseekV32Config
from suites.support import tiny

MIXED = dict.fromkeys(KINDS, 1.0)
FAR_TASKS = ("copy", "retrieval")


def batch(seed=0, step=0, config=None, length=128, batch_size=16, shares=MIXED):
    return Mixture(config or tiny(), seed).batch(step, length=length, batch_size=batch_size, shares=shares)


def documents(b):
    """Ids and labels of each row, as lists."""
    return list(zip(b.input_ids_BL.tolist(), b.labels_BL.tolist(), strict=True))


def nearest_evidence(kind, ids, place):
    """How far before the row that predicts `ids[place]` the nearest token stands that tells the answer."""
    if kind == "copy":
        period = ids.index(SEP) - 1
        return (place - 1) - (place - period)
    told = [i + 1 for i in range(2, place - 1) if ids[i] == ids[place - 1]]
    assert ids[told[-1]] == ids[place]
    return place - 1 - told[-1]


def test_a_batch_is_a_function_of_seed_and_step():
    first, again = batch(3, 5), batch(3, 5)
    assert torch.equal(first.input_ids_BL, again.input_ids_BL)
    assert torch.equal(first.labels_BL, again.labels_BL)
    assert torch.equal(first.position_ids_BL, again.position_ids_BL)
    assert first.kinds == again.kinds
    for other in (batch(3, 6), batch(4, 5)):
        assert not torch.equal(first.input_ids_BL, other.input_ids_BL)


def test_the_order_of_asking_does_not_matter():
    mixture = Mixture(tiny(), 0)
    ask = {"length": 64, "batch_size": 4, "shares": MIXED}
    expected = [mixture.batch(step, **ask).input_ids_BL for step in range(3)]
    for step in (2, 0, 1):
        assert torch.equal(mixture.batch(step, **ask).input_ids_BL, expected[step])


def test_no_random_number_of_torch_is_drawn():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batch()
    assert torch.equal(torch.rand(3), expected)


def test_rows_are_dealt_as_the_shares_say():
    shares = {"text": 2.0, "copy": 1.0, "retrieval": 1.0}
    dealt = Counter(
        kind for step in range(40) for kind in batch(step=step, batch_size=5, length=32, shares=shares).kinds
    )
    assert all(abs(dealt[kind] - 200 * share / 4) <= 2 for kind, share in shares.items())


def test_held_out_text_is_in_no_file_that_is_trained_on():
    found = sources()
    rows = held_out(tiny(), "text", seed=0, length=128, count=8).input_ids_BL[:, 1:].tolist()
    for row in rows:
        assert bytes(row) in found.held_out
        assert bytes(row) not in found.train
    for row, kind in zip(batch(length=128).input_ids_BL.tolist(), batch(length=128).kinds, strict=True):
        if kind == "text":
            assert bytes(row[1:]) in found.train


@pytest.mark.parametrize("kind", FAR_TASKS)
def test_held_out_tasks_are_not_trained_on(kind):
    config = tiny()
    apart = held_out(config, kind, seed=0, length=128, count=4).input_ids_BL.tolist()
    trained = [row for step in range(4) for row in batch(step=step, shares={kind: 1.0}).input_ids_BL.tolist()]
    assert not [row for row in apart if row in trained]


@pytest.mark.parametrize("preset", ["tiny", "mini"])
@pytest.mark.parametrize("kind", FAR_TASKS)
def test_answers_stand_more_than_two_windows_back(kind, preset):
    config = DeepseekV32Config.preset(preset)
    k = config.index_topk
    scored = 0
    for ids, labels in documents(held_out(config, kind, seed=1, length=8 * k, count=8)):
        for place, label in enumerate(labels):
            if label == UNSCORED:
                continue
            assert label == ids[place]
            assert nearest_evidence(kind, ids, place) > 2 * k
            scored += 1
    assert scored > 14 * k


@pytest.mark.parametrize("kind", FAR_TASKS)
def test_a_window_cannot_see_the_answer_and_the_check_would_notice(kind):
    # Of a row made for a fifth of the keys, some answers stand within the window of the whole number.
    near = held_out(tiny(index_topk=3), kind, seed=1, length=128, count=8)
    distances = [
        nearest_evidence(kind, ids, place)
        for ids, labels in documents(near)
        for place, label in enumerate(labels)
        if label != UNSCORED
    ]
    assert 6 < min(distances) <= 32


@pytest.mark.parametrize("length", [32, 33, 64, 127, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_every_length_has_answers_and_exactly_that_many_tokens(kind, length):
    b = batch(length=length, shares={kind: 1.0}, batch_size=6)
    assert b.input_ids_BL.shape == b.labels_BL.shape == (6, length)
    assert b.input_ids_BL.dtype == b.labels_BL.dtype == torch.int64
    assert b.input_ids_BL.max() < VOCABULARY
    assert ((b.labels_BL != UNSCORED).sum(-1) > 0).all()
    scored = b.labels_BL != UNSCORED
    assert torch.equal(b.labels_BL[scored], b.input_ids_BL[scored])


def test_chat_is_packed_and_only_the_assistant_is_scored():
    b = batch(shares={"chat": 1.0}, length=128)
    for ids, labels, positions, mask in zip(
        b.input_ids_BL.tolist(),
        b.labels_BL.tolist(),
        b.position_ids_BL.tolist(),
        b.attention_mask_BL.tolist(),
        strict=True,
    ):
        real = sum(mask)
        assert mask == [1] * real + [0] * (128 - real)
        starts = [i for i in range(real) if positions[i] == 0]
        for start, end in pairwise([*starts, real]):
            assert positions[start:end] == list(range(end - start))
            turn = ids.index(ASSISTANT, start, end)
            assert labels[start : turn + 1] == [UNSCORED] * (turn + 1 - start)
            assert labels[turn + 1 : end] == ids[turn + 1 : end]
            assert ids[turn + 1 : end - 1] == ids[start + 1 : turn]
        assert labels[real:] == [UNSCORED] * (128 - real)
    assert max(positions.count(0) for positions in b.position_ids_BL.tolist()) > 1


def test_without_chat_there_is_neither_mask_nor_position():
    b = batch(shares={"text": 1.0, "copy": 1.0})
    assert b.attention_mask_BL is None
    assert b.position_ids_BL is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"step": -1}, "step is -1; it must be 0 or more"),
        ({"length": 31}, "length is 31; it must be 32 or more"),
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"shares": {"prose": 1.0}}, "shares names 'prose'; allowed are text, copy, retrieval, chat"),
        ({"shares": {"text": -1.0}}, r"shares\['text'\] is -1.0; it must be a finite number of 0 or more"),
        ({"shares": {"text": 0.0}}, "at least one kind needs a share above 0"),
        ({"shares": {}}, "at least one kind needs a share above 0"),
        ({"config": tiny(vocab_size=263)}, "vocab_size is 263.* it must be 264 or more"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        batch(**change)
