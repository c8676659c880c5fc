"""Chat-style fine-tuning: labels of turns, whole documents packed into rows, and the loss of the documents alone.

Letters: B rows, L tokens of a row.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from reference import Decisions
from reference.packing import PaddingCollator, chat_document, pack
from suites.support import EXACT, SEED, assert_same, both_models, both_modes, build, text

USER, ASSISTANT, END, PAD = 259, 260, 257, 258
LENGTH = 64
COLLATE = PaddingCollator(PAD)


def conversation(seed, sizes):
    """Turns of bytes, the user's first; the assistant's are scored, with their end marker."""
    ids, turns = text(sum(sizes) + 1, seed)[0, 1:].split(list(sizes)), []
    for i, part in enumerate(ids):
        turns.append(([USER if i % 2 == 0 else ASSISTANT], False))
        turns.append(([*part.tolist(), END], i % 2 == 1))
    return turns


# Of 33, 24, 55, 12, 19 and 40 tokens: four rows of 64.
SIZES = ((9, 20), (4, 16), (10, 17, 8, 12), (3, 5), (5, 10), (18, 18))
DOCUMENTS = [chat_document(conversation(seed, sizes)) for seed, sizes in enumerate(SIZES)]


def alone(document):
    """A document as a batch of its own."""
    return {name: torch.tensor([values]) for name, values in document.items()}


def targets(labels):
    """How many labels are scored: the first of a row never is."""
    return int((labels[:, 1:] != -100).sum())


def test_the_assistants_turns_are_scored_and_nothing_else():
    document = chat_document([([259, 1, 2], False), ([260], False), ([7, 8, 257], True), ([259, 3], False)])
    assert document["input_ids"] == [259, 1, 2, 260, 7, 8, 257, 259, 3]
    assert document["labels"] == [-100, -100, -100, -100, 7, 8, 257, -100, -100]


def test_a_conversation_without_tokens_is_refused():
    with pytest.raises(ValueError, match="chat_document: turns holds no token"):
        chat_document([([], True)])


def test_rows_hold_whole_documents_that_count_from_0_and_score_no_first_token():
    rows = pack([{"input_ids": [9] * n, "labels": [i] * n} for i, n in enumerate((3, 4, 2))], 6)
    assert rows == [
        {"input_ids": [9] * 3, "labels": [-100, 0, 0], "position_ids": [0, 1, 2]},
        {"input_ids": [9] * 6, "labels": [-100, 1, 1, 1, -100, 2], "position_ids": [0, 1, 2, 3, 0, 1]},
    ]


@given(st.lists(st.integers(1, 20), max_size=30))
def test_every_document_is_in_one_row_and_no_two_rows_would_fit_into_one(sizes):
    rows = pack([{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate(sizes)], 20)
    placed = [[(i, row["input_ids"].count(i)) for i in sorted(set(row["input_ids"]))] for row in rows]
    assert sorted(document for row in placed for document in row) == list(enumerate(sizes))
    lengths = [len(row["input_ids"]) for row in rows]
    assert max(lengths, default=0) <= 20
    # A row is begun only by a document that fits into none there is: at most one row is half empty.
    assert sum(length <= 10 for length in lengths) <= 1


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({"input_ids": [1] * 65, "labels": [1] * 65}, "document 1 has 65 tokens; it must have 1 to 64"),
        ({"input_ids": [], "labels": []}, "document 1 has 0 tokens; it must have 1 to 64"),
        ({"input_ids": [1, 2], "labels": [1]}, "document 1 has 2 tokens and 1 labels; the numbers must be equal"),
    ],
    ids=["long", "empty", "labels"],
)
def test_a_document_that_does_not_fit_is_refused(document, sentence):
    with pytest.raises(ValueError, match=f"^pack: {sentence}"):
        pack([DOCUMENTS[0], document], LENGTH)


def test_a_batch_is_padded_on_the_right():
    batch = COLLATE(pack([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}], 2))
    assert {name: x.tolist() for name, x in batch.items()} == {
        "input_ids": [[5, 6], [7, 258]], "labels": [[-100, 6], [-100, -100]], "position_ids": [[0, 1], [0, 0]],
        "attention_mask": [[1, 1], [1, 0]],
    }  # fmt: skip
    with pytest.raises(ValueError, match="PaddingCollator: no rows were given"):
        COLLATE([])


BATCHES = {
    "padded rows": lambda documents: COLLATE(pack(documents, LENGTH)),
    "one flat row": lambda documents: DataCollatorWithFlattening()(documents),
    "cu_seq_lens_q": lambda documents: DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_position_ids=False
    )(documents),
}
every_batch = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


def sums(model, batches):
    """Σ over targets of the LM loss, Σ over rows of the KL, and the gradient of both sums, of several batches."""
    model.zero_grad()
    lm = kl = 0.0
    for batch in batches:
        out = model(**batch, output_indexer_kl_loss=True)
        rows = int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        lm, kl = lm + out.lm_loss * targets(batch["labels"]), kl + out.indexer_kl_loss * rows
    (lm + kl).backward()
    return lm.detach(), kl.detach(), {n: p.grad for n, p in model.named_parameters()}


def assert_same_sums(ours, theirs):
    assert_same(ours[0], theirs[0])
    assert_same(ours[1], theirs[1])
    for name, gradient in theirs[2].items():
        assert_same(ours[2][name], gradient)


@both_models
@both_modes
@every_batch
def test_packed_documents_have_the_losses_and_gradients_of_each_alone(model_class, sparse, batch):
    model = build(model_class, use_sparse_attention=sparse)
    separate = sums(model, [alone(document) for document in DOCUMENTS])
    assert_same_sums(sums(model, [batch(DOCUMENTS)]), separate)
    # The mean of a batch weighs each document by what is scored of it.
    weights = [targets(torch.tensor([document["labels"]])) for document in DOCUMENTS]
    assert weights == [21, 17, 31, 6, 11, 19]
    with torch.no_grad():
        mean = model(**batch(DOCUMENTS)).lm_loss
        each = [model(**alone(document)).lm_loss for document in DOCUMENTS]
    assert_same(mean, sum(w * loss for w, loss in zip(weights, each, strict=True)) / sum(weights))
    # By how much depends on the text, which is Python's own.
    assert (mean - sum(each) / len(each)).abs() > 1e5 * EXACT


def first_labels_kept(batch):
    starts = (batch["position_ids"] == 0) & (batch["attention_mask"] == 1)
    return batch | {"labels": torch.where(starts, batch["input_ids"], batch["labels"])}


FAULTS = {
    "one document a row": lambda batch: batch | {"position_ids": torch.arange(batch["labels"].shape[1])[None]},
    "first labels kept": first_labels_kept,
    "everything scored": lambda batch: (
        batch | {"labels": batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)}
    ),
}


@both_models
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_documents_that_run_together_and_labels_that_are_not_masked_would_be_seen(model_class, fault):
    model = build(model_class)
    separate = sums(model, [alone(document) for document in DOCUMENTS])
    wrong = fault(COLLATE(pack(DOCUMENTS, LENGTH)))
    with pytest.raises(AssertionError):
        assert_same_sums(sums(model, [wrong]), separate)


@both_models
def test_packed_documents_select_what_each_selects_alone(model_class):
    model = build(model_class)
    batch = COLLATE(pack(DOCUMENTS, LENGTH))
    with torch.no_grad():
        packed = model(**batch, output_decisions=True).decisions.packed(batch["attention_mask"])
        order = [d for row in pack([d | {"labels": [i] * len(d["labels"])} for i, d in enumerate(DOCUMENTS)], LENGTH)
                 for d in dict.fromkeys(x for x in row["labels"] if x >= 0)]  # fmt: skip
        each = Decisions.cat(model(**alone(DOCUMENTS[i]), output_decisions=True).decisions for i in order)
    for ours, theirs in zip(packed, each, strict=True):
        assert torch.equal(ours.topk_indices, theirs.topk_indices)
        assert (ours.expert_indices is None) == (theirs.expert_indices is None)
        assert ours.expert_indices is None or torch.equal(ours.expert_indices, theirs.expert_indices)


def stepped(model_class, rows, batch, accumulate, **overrides):
    """A model after one step of the stock Trainer on packed rows."""
    model = build(model_class, indexer_kl_coef=0.5, **overrides)
    arguments = TrainingArguments(
        output_dir=str(Path.cwd() / "out"), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=0.0, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, seed=SEED,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=COLLATE).train()
    return model


@both_models
@both_modes
def test_the_stock_trainer_makes_of_packed_rows_the_step_of_separate_documents(
    model_class, sparse, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    separate = [row for document in DOCUMENTS for row in pack([document], LENGTH)]
    packed = pack(DOCUMENTS, LENGTH)
    assert len(packed) == 4
    one = stepped(model_class, separate, 6, 1, use_sparse_attention=sparse)
    for batch, accumulate in ((4, 1), (1, 4)):
        other = stepped(model_class, packed, batch, accumulate, use_sparse_attention=sparse)
        for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12, msg=name)
    start = build(model_class, use_sparse_attention=sparse)
    assert not any(torch.equal(a, b) for a, b in zip(one.parameters(), start.parameters(), strict=True))
