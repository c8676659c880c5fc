"""The training guide's snippets, run as they stand, in both packages.

Of each snippet only the import lines change, the names of the indexer's tensors, which the guide gets wrong,
and comments such as "other config options", where a reader writes his own. Paths and hub names are
directories under the test's own, which hold a small checkpoint.

Letters: B batch, L tokens.
"""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from reference import DeepseekV32Config
from reference.training import is_indexer
from suites.support import SEED, assert_same, build, text, tiny

L = 40
ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/training.md")
both_packages = pytest.mark.parametrize("package", ["reference", "optimized"])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def model_class(package):
    return importlib.import_module(package).DeepseekV32ForCausalLM


def save_checkpoint(package, path, **overrides):
    model = build(model_class(package), torch.float32, **overrides)
    model.save_pretrained(path)
    return model


def run(snippet, package, **names):
    """Execute a snippet that imports from `{package}`; what it leaves behind."""
    space = {"torch": torch, **names}
    exec(snippet.replace("{package}", package), space)
    return space


def batches(count=3, batch=2):
    """Text with padding, as the guide's `dataloader` yields it."""
    rows = []
    for i, ids in enumerate(text(L, SEED, batch * count)):
        mask = torch.ones(L, dtype=torch.long)
        mask[: 5 * (i % 3)] = 0
        rows.append({"input_ids": ids.masked_fill(mask == 0, 258), "attention_mask": mask})
    return DataLoader(rows, batch_size=batch)


DENSE_MODE = """
from {package} import DeepseekV32Config, DeepseekV32ForCausalLM

config = DeepseekV32Config(
    use_sparse_attention=False,  # Disable sparse attention
    **other_config_options,
)
model = DeepseekV32ForCausalLM(config)
"""


@both_packages
def test_dense_mode(package):
    sizes = {name: value for name, value in tiny().to_dict().items() if name != "use_sparse_attention"}
    model = run(DENSE_MODE, package, other_config_options=sizes)["model"]
    assert isinstance(model, model_class(package))
    out = model(text(L), output_decisions=True)
    assert [layer.topk_indices for layer in out.decisions] == [None] * 3
    model.config.use_sparse_attention = True
    assert not torch.equal(model(text(L)).logits, out.logits)


FROZEN_INDEXER = """
from {package} import DeepseekV32ForCausalLM

model = DeepseekV32ForCausalLM.from_pretrained("path/to/checkpoint")

# Freeze indexer weights
for name, param in model.named_parameters():
    if "indexer" in name:
        param.requires_grad = False

# Verify indexer is frozen
indexer_params = sum(p.numel() for n, p in model.named_parameters() if "indexer" in n)
trainable_indexer = sum(p.numel() for n, p in model.named_parameters() if "indexer" in n and p.requires_grad)
print(f"Indexer parameters: {indexer_params:,} (trainable: {trainable_indexer:,})")
"""


@both_packages
def test_frozen_indexer_from_a_checkpoint(package, capsys):
    saved = save_checkpoint(package, "path/to/checkpoint")
    left = run(FROZEN_INDEXER, package)
    # 3 layers of wq_b 48 → 16·32, wk 64 → 32, k_norm 2·32, weights_proj 64 → 16.
    assert left["indexer_params"] == 3 * (48 * 512 + 64 * 32 + 64 + 64 * 16)
    assert "Indexer parameters: 83,136 (trainable: 0)" in capsys.readouterr().out
    model = left["model"]
    assert_same(model(text(L)).logits, saved(text(L)).logits, 0)
    model(text(L), labels=text(L)).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == {
        n for n, _ in model.named_parameters() if is_indexer(n)
    }


LOAD_FOR_SFT = """
from {package} import DeepseekV32ForCausalLM, DeepseekV32Config

def load_model_for_sft(model_path: str, freeze_indexer: bool = True):
    \"\"\"Load DeepSeek V3.2 for SFT training.\"\"\"
    model = DeepseekV32ForCausalLM.from_pretrained(
        model_path,
        torch_dtype=torch.bfloat16,
        device_map="auto",
    )

    if freeze_indexer:
        for name, param in model.named_parameters():
            if "indexer" in name:
                param.requires_grad = False

    return model
"""


@both_packages
@pytest.mark.parametrize("freeze", [True, False])
def test_loading_for_sft_in_bf16_with_a_device_map(package, freeze):
    saved = save_checkpoint(package, "checkpoint")
    model = run(LOAD_FOR_SFT, package)["load_model_for_sft"]("checkpoint", freeze)
    assert model.model.layers[0].self_attn.o_proj.weight.dtype == torch.bfloat16
    assert {p.requires_grad for n, p in model.named_parameters() if is_indexer(n)} == {not freeze}
    assert {p.requires_grad for n, p in model.named_parameters() if not is_indexer(n)} == {True}
    tape = saved(text(L), output_decisions=True).decisions
    exact = saved(text(L), decisions=tape).logits
    logits = model(text(L), decisions=tape).logits
    assert logits.dtype == torch.bfloat16
    assert 1e-4 < ((logits - exact).norm() / exact.norm()).item() < 0.1


DENSE_FROM_CHECKPOINT = """
from {package} import DeepseekV32ForCausalLM, DeepseekV32Config

config = DeepseekV32Config.from_pretrained(model_path)
config.use_sparse_attention = False  # Switch to dense attention

model = DeepseekV32ForCausalLM.from_pretrained(
    model_path,
    config=config,
    torch_dtype=torch.bfloat16,
)
"""


@both_packages
def test_switching_a_checkpoint_to_dense_attention(package):
    saved = save_checkpoint(package, "checkpoint")
    model = run(DENSE_FROM_CHECKPOINT, package, model_path="checkpoint")["model"]
    assert model.config.use_sparse_attention is False
    tape = model(text(L), output_decisions=True).decisions
    assert [layer.topk_indices for layer in tape] == [None] * 3
    saved.config.use_sparse_attention = False
    exact = saved(text(L), decisions=tape).logits
    assert ((model(text(L), decisions=tape).logits - exact).norm() / exact.norm()).item() < 0.1


KL_LOOP = """
from {package} import DeepseekV32ForCausalLM
from {package} import compute_indexer_kl_loss

model = DeepseekV32ForCausalLM.from_pretrained("deepseek-ai/DeepSeek-V3.2")

# Freeze all parameters except indexer
for name, param in model.named_parameters():
    if "indexer" not in name:
        param.requires_grad = False

optimizer = torch.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad],
    lr=1e-3  # From tech report
)

# Training loop
for batch in dataloader:
    outputs = model(
        input_ids=batch['input_ids'],
        attention_mask=batch['attention_mask'],
        output_indexer_scores=True,      # Return raw I_{t,s} scores
        output_indexer_kl_target=True,   # Return KL target p_{t,:}
    )

    # Compute KL loss using helper function
    kl_loss = compute_indexer_kl_loss(
        outputs.indexer_scores,
        outputs.indexer_kl_targets,
    )

    kl_loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@both_packages
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_indexer_training_with_the_kl_loss(package, sparse):
    saved = save_checkpoint(package, "deepseek-ai/DeepSeek-V3.2", use_sparse_attention=sparse)
    one = next(iter(batches()))
    left = run(KL_LOOP, package, dataloader=[one] * 3)
    model, before = left["model"], dict(saved.named_parameters())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if is_indexer(n)}
    first, last = (m(**one, output_indexer_kl_loss=True).indexer_kl_loss for m in (saved, model))
    assert last < 0.99 * first
    assert last < left["kl_loss"]


@both_packages
def test_the_curve_of_the_kl_loop_is_the_other_packages(package):
    save_checkpoint(package, "deepseek-ai/DeepSeek-V3.2")
    losses = [run(KL_LOOP, p, dataloader=batches())["kl_loss"] for p in ("reference", "optimized")]
    assert_same(losses[0], losses[1], 1e-4)


LORA = """
from peft import LoraConfig, get_peft_model

lora_config = LoraConfig(
    r=64,
    lora_alpha=16,
    target_modules=[
        "indexer.wq_b",
        "indexer.wk",
        "indexer.weights_proj",
    ],
    lora_dropout=0.0,
)

model = get_peft_model(model, lora_config)
"""


def train_adapters_at_random(model, name=""):
    """B, which starts at 0, drawn at random in the adapters whose name holds `name`."""
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n and name in n):
            parameter.normal_(std=0.3)
    return model


@both_packages
def test_lora_leaves_the_outputs_as_they_are_at_first(package):
    plain = build(model_class(package))
    adapted = run(LORA, package, model=build(model_class(package)))["model"]
    assert_same(adapted(text(L)).logits, plain(text(L)).logits)


@both_packages
def test_the_kl_reaches_the_lora_weights_of_all_three_projections(package):
    model = run(LORA, package, model=build(model_class(package)))["model"]
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 3 * 3 * 2
    model(text(L), output_indexer_kl_loss=True).indexer_kl_loss.backward()
    # A starts random and B at 0, so that only B has a gradient other than 0 in the first step.
    reached = {n for n, p in trainable.items() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {n for n in trainable if "lora_B" in n}
    assert {n for n, p in model.named_parameters() if p.grad is not None} <= set(trainable)


@both_packages
@pytest.mark.parametrize("name", ["wq_b", "wk", "weights_proj"])
def test_lora_weights_change_what_the_indexer_scores(package, name):
    model = run(LORA, package, model=build(model_class(package)))["model"]
    before = model(text(L), output_indexer_scores="visible").indexer_scores[0]
    train_adapters_at_random(model, f"indexer.{name}.")
    after = model(text(L), output_indexer_scores="visible").indexer_scores[0]
    assert (after - before)[before.isfinite()].abs().max() > 1e-3


@both_packages
def test_merged_lora_computes_what_the_adapters_did(package):
    model = train_adapters_at_random(run(LORA, package, model=build(model_class(package)))["model"])
    asked = {"output_indexer_scores": "visible", "output_indexer_kl_loss": True}
    adapted = model(text(L), **asked)
    merged = model.merge_and_unload()
    plain = build(model_class(package))
    assert isinstance(merged, model_class(package))
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in plain.named_parameters()}
    seen = adapted.indexer_scores[2].isfinite()
    out = merged(text(L), **asked)
    assert_same(out.indexer_scores[2][seen], adapted.indexer_scores[2][seen])
    assert_same(out.logits, adapted.logits)
    assert (plain(text(L), **asked).indexer_kl_loss - out.indexer_kl_loss).abs() > 1e-2


VERIFYING = """
from {package} import DeepseekV32Config, DeepseekV32ForCausalLM
import torch

# Quick sanity check
config = DeepseekV32Config(
    vocab_size=100,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    use_sparse_attention=True,
)
model = DeepseekV32ForCausalLM(config)
x = torch.randint(0, 100, (1, 32))
out = model(x)
print(f"Output shape: {out.logits.shape}")  # Should be [1, 32, 100]
"""


@both_packages
def test_verifying_the_installation(package, capsys):
    left = run(VERIFYING, package)
    assert "Output shape: torch.Size([1, 32, 100])" in capsys.readouterr().out
    assert left["out"].logits.isfinite().all()
    assert left["config"].num_key_value_heads == 4


@both_packages
def test_gradient_checkpointing_is_enabled_as_the_guide_says(package):
    model = build(model_class(package)).train()
    model.gradient_checkpointing_enable()
    passes = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *call: passes.append(call))
    model(text(L), labels=text(L)).loss.backward()
    # Once forward, and again on the way back.
    assert len(passes) == 2
    assert model.model.layers[0].self_attn.o_proj.weight.grad.abs().max() > 0


@both_packages
def test_the_guides_stages_follow_one_another(package):
    # Warm-up in dense mode trains the indexer alone; then the model trains sparse, with the indexer frozen.
    save_checkpoint(package, "deepseek-ai/DeepSeek-V3.2", use_sparse_attention=False)
    warm = run(KL_LOOP, package, dataloader=batches())["model"]
    warm.config.use_sparse_attention = True
    warm.save_pretrained("path/to/checkpoint")
    model = run(FROZEN_INDEXER, package)["model"].train()
    assert model.config.use_sparse_attention is True
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = []
    for _ in range(3):
        out = model(text(L, batch=2), labels=text(L, batch=2))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.loss.detach()))
    assert losses[2] < losses[1] < losses[0]
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert still == {n for n in before if is_indexer(n)}


def test_the_guides_hub_name_is_not_asked_of_the_network_when_a_directory_has_it():
    save_checkpoint("reference", "deepseek-ai/DeepSeek-V3.2")
    config = DeepseekV32Config.from_pretrained("deepseek-ai/DeepSeek-V3.2", local_files_only=True)
    assert config.hidden_size == 64


def snippets():
    for document in DOCUMENTS:
        for i, snippet in enumerate(
            re.findall(r"```python\n(.*?)```", (ROOT / document).read_text("utf-8"), re.DOTALL)
        ):
            yield pytest.param(snippet, id=f"{document} {i}")


@pytest.mark.parametrize("snippet", snippets())
def test_each_python_snippet_of_the_documents_runs(snippet):
    run(snippet, "reference")
