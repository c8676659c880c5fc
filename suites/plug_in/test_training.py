"""The indexer's training inside transformers: both losses and stages, the stock Trainer, adapters.

Letters: L tokens.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import reference
from harness.cases import build_case
from harness.subjects import load_weights
from harness.text import text_batch
from reference.training import is_indexer, train_only_indexer
from suites.plug_in.pairs import CPU, FAMILIES, built, reference_config, weights_of
from suites.plug_in.yardstick import assert_near, upstream

families = pytest.mark.parametrize("family", list(FAMILIES))
both_modes = pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
L = 40
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize("family", ["deepseek", "glm"])
@both_modes
@pytest.mark.parametrize("name", ["left-padded", "packed"])
def test_the_loss_and_its_gradients_are_the_references(family, sparse, name):
    overrides = {"use_sparse_attention": sparse}
    config = reference_config(family, **overrides)
    oracle, in_fp32 = (
        load_weights(reference.DeepseekV32ForCausalLM, config, weights_of(family), CPU, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    ours = built(family, plugged=True, **overrides)
    wrong = []
    for seed in (5, 6, 7):
        case = build_case(name, config, seed=seed, length=60)
        found = []
        for model in (oracle, in_fp32, ours):
            model.zero_grad()
            out = model(**case.inputs(), output_indexer_kl_loss=True)
            out.indexer_kl_loss.backward()
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            found.append({"the loss": out.indexer_kl_loss.detach()[None], **gradients})
        # The yardstick of every tensor is the reference's own error in fp32.
        expected, rounded, actual = found
        assert (
            actual.keys() == expected.keys() == {"the loss"} | {n for n, _ in ours.named_parameters() if is_indexer(n)}
        )
        try:
            for part, tensor in expected.items():
                assert_near(actual[part], tensor, (rounded[part], tensor), name=part)
        except AssertionError as error:
            wrong.append(str(error))
    # Where a dot product lies within rounding of the ReLU's kink, or two keys of the last place, right gradients differ:
    # of three inputs one may.
    assert len(wrong) <= 1, wrong


@families
def test_the_loss_is_one_of_the_indexers_alone_unless_it_is_attached(family):
    case = build_case("text", reference_config(family), seed=5, length=L)
    for detached in (True, False):
        model = built(family, plugged=True, detach_indexer_input=detached)
        model(**case.inputs(), output_indexer_kl_loss=True).indexer_kl_loss.backward()
        reached = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert {n for n, _ in model.named_parameters() if is_indexer(n)} <= reached
        assert any(not is_indexer(n) for n in reached) is not detached


@families
def test_a_coefficient_adds_the_loss_and_none_leaves_the_output_as_it_was(family):
    case = build_case("text", reference_config(family), seed=5, length=L)
    asked = {**case.inputs(), "labels": case.labels}
    plain, weighted = built(family, plugged=True), built(family, plugged=True, indexer_kl_coef=0.5)
    with torch.no_grad():
        theirs, bare, out = built(family, plugged=False)(**asked), plain(**asked), weighted(**asked)
        shared = weighted(**asked, num_items_in_batch=7)
    assert list(bare.keys()) == list(theirs.keys())
    torch.testing.assert_close(out.loss, out.lm_loss + 0.5 * out.indexer_kl_loss)
    torch.testing.assert_close(out.lm_loss, bare.loss)
    torch.testing.assert_close(shared.indexer_kl_loss, out.indexer_kl_loss * case.input_ids.numel() / 7)
    tuples = weighted(**asked, return_dict=False)
    assert torch.equal(tuples[0], out.loss)


@pytest.mark.parametrize("name", ["outptu_indexer_kl_loss", "output_indexer_loss", "output_index_kl_loss"])
def test_a_misspelt_request_for_the_loss_is_refused(name):
    model, ids = built("deepseek", plugged=True), text_batch(1, L, 1)
    with pytest.raises(TypeError, match=f"'{name}', which nobody reads; the name is 'output_indexer_kl_loss'"):
        model(ids, **{name: True})
    # What transformers reads is not taken for it.
    model(ids, output_router_logits=False, output_hidden_states=True, cu_seq_lens_k=None)


@families
def test_a_trainers_warm_up_lowers_the_kl_and_moves_nothing_but_indexers(family, tmp_path):
    model = built(family, plugged=True, use_sparse_attention=False, indexer_kl_coef=1.0)
    train_only_indexer(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [{"input_ids": ids, "labels": ids} for ids in text_batch(16, L, 7)]
    batch = {"input_ids": torch.stack([row["input_ids"] for row in rows[:4]])}
    with torch.no_grad():
        before = float(model(**batch).indexer_kl_loss)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=16, learning_rate=3e-3, logging_steps=4,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", lr_scheduler_type="constant", seed=7,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    with torch.no_grad():
        after = float(model(**batch).indexer_kl_loss)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert after < 0.9 * before
    assert logged[-1] < logged[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {n for n in start if is_indexer(n)}


@families
def test_adapters_on_attention_and_indexer_train(family):
    names = ["kv_b_proj", "q_b_proj", "indexer.wq_b", "indexer.wk", "indexer.weights_proj"]
    plain = built(family, plugged=True)
    case = build_case("text", reference_config(family), seed=5, length=L)
    with torch.no_grad():
        expected = plain(**case.inputs()).logits
        two_right_ones = tuple(upstream(family, kind)(**case.inputs()).logits for kind in ("eager", "sdpa"))
    model = get_peft_model(plain, LoraConfig(r=4, target_modules=names)).train()
    with torch.no_grad():
        unadapted = model(**case.inputs()).logits
        second = {n: p for n, p in model.named_parameters() if "lora_B" in n}
        assert not any(bool(p.any()) for p in second.values())
        for parameter in second.values():
            parameter.fill_(0.01)
        adapted = model(**case.inputs()).logits
        for parameter in second.values():
            parameter.zero_()
    # Adapters start as nothing, and are felt as soon as they are something.
    assert_near(unadapted, expected, two_right_ones, {"adapted": adapted})
    out = model(**case.inputs(), labels=case.labels, output_indexer_kl_loss=True)
    out.indexer_kl_loss.backward(retain_graph=True)
    of_kl = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert of_kl
    assert all("lora_B" in n and ".indexer." in n for n in of_kl)
    out.lm_loss.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert second.keys() == reached
