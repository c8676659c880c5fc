"""The vectors themselves: right models pass in fp32 and fp64, wrong tensors do not, and the promises of the page hold."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

import reference.attention
from harness.goldens.cli import COMMITTED
from harness.goldens.compare import compare
from harness.goldens.export import export_files
from harness.goldens.inputs import CASES, MODES, golden_case, golden_config
from harness.goldens.manifest import DTYPES, MANIFEST_FILE, read_manifest, sha256
from harness.goldens.measure import largest_shares
from harness.goldens.record import gradient_names, official_tensors, projection_vector, record, record_first_layer
from harness.goldens.tolerances import RULES, limits, tolerance
from harness.goldens.vectors import FULL, LETTERS, WEIGHTS_FILE, build_vectors, recipe_state
from harness.metrics import null_candidates
from harness.subjects import load_weights
from reference import DeepseekV32ForCausalLM
from suites.support import MODELS

RUNS = [(case, mode) for case in CASES for mode in MODES]
LARGEST_EXPORT = 2_200_000


@pytest.fixture(scope="module")
def files(vectors):
    return export_files(vectors)


def model_of(model_class, mode, dtype):
    return load_weights(model_class, golden_config(mode), recipe_state(), torch.device("cpu"), dtype)


def test_the_committed_vectors_are_what_the_reference_computes():
    assert compare(COMMITTED).sentences == []


def test_an_export_is_the_same_every_time(files):
    again = export_files(build_vectors())
    assert list(again) == list(files)
    assert {name: sha256(content) for name, content in again.items()} == {n: sha256(c) for n, c in files.items()}


def test_the_export_is_small(files):
    assert sum(map(len, files.values())) < LARGEST_EXPORT


def test_the_manifest_lists_every_file_and_tensor(files):
    manifest = read_manifest(files[MANIFEST_FILE])
    assert {MANIFEST_FILE, *manifest["files"]} == set(files)
    for name, entry in manifest["files"].items():
        assert (entry["bytes"], entry["sha256"]) == (len(files[name]), sha256(files[name]))
        assert entry["meaning"].endswith(".")
    held = {
        (file, name): (DTYPES[tensor.dtype], list(tensor.shape))
        for file, content in files.items()
        if file.endswith(".safetensors")
        for name, tensor in load(content).items()
    }
    listed = {(t["file"], t["name"]): (t["dtype"], t["shape"]) for t in manifest["tensors"]}
    assert listed == held
    for entry in manifest["tensors"]:
        assert len(entry["letters"]) == len(entry["shape"])
        assert set(entry["letters"]) <= set(LETTERS)
        assert entry["meaning"].endswith(".")
        assert set(entry["tolerance"]) == {"float64", "float32"}
        assert entry["judged"] in manifest["judged"]
    for loss, rows in manifest["gradient_rows"].items():
        table = held["text.sparse.safetensors", f"gradients.{loss}"]
        assert table == ("F64", [len(rows), len(manifest["gradient_columns"])])


def test_the_manifest_needs_no_reader_of_unicode_or_nan(files):
    for name in (MANIFEST_FILE, "config.json", "constants.json"):
        text = files[name].decode("ascii")
        json.loads(text, parse_constant=pytest.fail)


def test_the_directory_is_a_checkpoint():
    model = DeepseekV32ForCausalLM.from_pretrained(COMMITTED, dtype=torch.float32)
    assert model.config.to_diff_dict().get("index_topk") == golden_config("sparse").index_topk
    stored = load((COMMITTED / WEIGHTS_FILE).read_bytes())
    held = official_tensors(model.state_dict())
    assert held.keys() == stored.keys()
    assert all(torch.equal(held[name], stored[name]) for name in stored)


def test_the_stored_inputs_are_all_that_a_forward_needs(vectors):
    # As an implementer runs it: stored masks and positions, and not the case's own None.
    held = {(g.file, g.name): g.value for g in vectors.goldens}
    for case, mode in RUNS:
        given = {
            n: held[f"{case}.inputs.safetensors", n].long() for n in ("input_ids", "attention_mask", "position_ids")
        }
        with torch.no_grad():
            out = model_of(DeepseekV32ForCausalLM, mode, torch.float64)(
                **given, labels=held[f"{case}.inputs.safetensors", "labels"].long(), use_cache=False,
                output_indexer_kl_loss=True,
            )  # fmt: skip
        file = f"{case}.{mode}.safetensors"
        assert float(out.lm_loss) == pytest.approx(float(held[file, "lm_loss"]), rel=1e-12)
        assert float(out.indexer_kl_loss) == pytest.approx(float(held[file, "kl_loss"]), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_right_model_passes_without_a_tape(vectors, dtype):
    """Both models choose for themselves; every choice is the stored one and every number within its tolerance."""
    arithmetic = str(dtype).removeprefix("torch.")
    by_file = {}
    for golden in vectors.goldens:
        by_file.setdefault(golden.file, []).append(golden)
    for model_class in MODELS.values():
        for name, mode in RUNS:
            model, case = model_of(model_class, mode, dtype), golden_case(name, mode)
            held = record(model, case)
            too_far = [g.name for g in by_file[f"{name}.{mode}.safetensors"] if rejects(g, held[g.name], arithmetic)]
            assert too_far == []
            if (name, mode) == FULL:
                held = record_first_layer(model, case)
                goldens = by_file[f"{name}.{mode}.layer0.safetensors"]
                assert [g.name for g in goldens if rejects(g, held[g.name], arithmetic)] == []


def rejects(golden, actual, arithmetic="float32"):
    here, there = actual.double(), golden.value.double()
    off = torch.where(here == there, 0.0, (here - there).abs())
    return not bool((off <= limits(golden.rule, there, arithmetic)).all())


def test_every_tensor_rejects_wrong_ones_at_its_widest_tolerance(vectors):
    tried = 0
    for golden in vectors.goldens:
        finite = golden.value.double().masked_fill(~golden.value.double().isfinite(), 0.0)
        wrong = [(kind, candidate.reshape(finite.shape)) for kind, candidate in null_candidates(finite)]
        # Pad rows and hidden keys stay as they are: the wrong numbers stand where numbers are.
        wrong = [(k, c.where(golden.value.isfinite(), golden.value.double())) for k, c in wrong]
        accepted = [kind for kind, candidate in wrong if not rejects(golden, candidate)]
        assert accepted == [], f"{golden.file} {golden.name}"
        tried += len(wrong)
        # A mask of ones alone is all the same when rows move.
        assert wrong or not bool(golden.value.any())
    assert tried > 4 * len(vectors.goldens)


def test_a_choice_rejects_the_neighbouring_key(vectors):
    for golden in vectors.goldens:
        if golden.kind == "choice":
            wrong = golden.value.clone()
            wrong.flatten()[-1] += 1
            assert rejects(golden, wrong)


def test_choices_and_kinks_are_as_clear_as_promised(vectors, monkeypatch):
    margins = {"key_margins": [], "router_margins": []}
    for golden in vectors.goldens:
        if golden.kind == "margin":
            margins[golden.name].append(float(golden.value.min()))
    assert min(margins["key_margins"]) > 8e-4 * (1 - 1e-2)
    assert min(margins["router_margins"]) > 1e-3 * (1 - 1e-2)

    dots, scores = [], reference.attention.index_scores

    def spy(q_BLJE, k_BSE, w_BLJ):
        dots.append(torch.einsum("blje,bse->bljs", q_BLJE, k_BSE).detach())
        return scores(q_BLJE, k_BSE, w_BLJ)

    monkeypatch.setattr(reference.attention, "index_scores", spy)
    for name, mode in RUNS:
        dots.clear()
        model = model_of(DeepseekV32ForCausalLM, mode, torch.float64)
        with torch.no_grad():
            candidates = model(**golden_case(name, mode).inputs(), output_indexer_scores=True).indexer_scores
        for dots_BLJS, scores_BLS in zip(dots, candidates, strict=True):
            read = scores_BLS.isfinite()[:, :, None].expand_as(dots_BLJS)
            assert float(dots_BLJS[read].abs().min()) > 9e-5


def test_choices_are_not_trivial(vectors):
    held = {(g.file, g.name): g.value for g in vectors.goldens}
    for case in CASES:
        left_out = held[f"{case}.sparse.safetensors", "key_margins"].isfinite()
        assert left_out.any(-1).all()
        dense, sparse = (held[f"{case}.{mode}.safetensors", "lm_loss"] for mode in MODES)
        assert abs(float(dense - sparse)) > 1e-3


def test_visible_keys_are_those_from_the_documents_start_to_the_row(vectors):
    held = {(g.file, g.name): g.value for g in vectors.goldens}
    for case in CASES:
        start_BL = held[f"{case}.inputs.safetensors", "document_start"]
        rows = torch.arange(start_BL.shape[1])
        visible = (rows >= start_BL[..., None]) & (rows <= rows[:, None]) & (start_BL[..., None] >= 0)
        assert torch.equal(held[f"{case}.sparse.safetensors", "index_scores.0"].isfinite(), visible)


def test_gradient_summaries_are_of_the_gradients(vectors):
    held = {(g.file, g.name): g.value for g in vectors.goldens}
    case = golden_case("packed", "sparse")
    model = model_of(DeepseekV32ForCausalLM, "sparse", torch.float64)
    model(**case.inputs(), labels=case.labels).lm_loss.backward()
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    row = gradient_names(model)["lm"].index(name)
    grad = model.model.layers[1].mlp.experts.gate_up_proj.grad[3, 32:].numpy().ravel()
    expected = [
        grad.sum(), np.abs(grad).sum(), np.linalg.norm(grad), grad @ np.cos(np.arange(1, grad.size + 1)), *grad[:4],
    ]  # fmt: skip
    assert held["packed.sparse.safetensors", "gradients.lm"][row].tolist() == pytest.approx(expected, rel=1e-10)


def test_the_projection_sees_every_entry_and_every_exchange_of_neighbours():
    vector = projection_vector(25_000)
    assert vector[0] == torch.tensor(1.0, dtype=torch.float64).cos()
    assert float(vector.abs().min()) > 1e-6
    assert float(vector.diff().abs().min()) > 1e-6


@pytest.mark.parametrize(("largest", "allowed"), [(3.0, 6e-5), (3.01, 6.1e-5), (0.0, 0.0), (70.4, 1.5e-3)])
def test_tolerances_are_rounded_up_to_two_digits(largest, allowed):
    rule = replace(RULES["forward"], float32=2e-5)
    value = torch.tensor([-largest, torch.inf, 0.0], dtype=torch.float64)
    assert tolerance(rule, value)["float32"] == pytest.approx(allowed, rel=1e-12)


def test_tolerances_are_some_ten_times_what_a_right_model_needs(vectors):
    shares = {}
    for model_class in MODELS.values():
        for kind, (share, _) in largest_shares(vectors, model_class, torch.float32).items():
            shares[kind] = max(share, shares.get(kind, 0.0))
    assert shares.keys() == RULES.keys() - {"input", "choice", "weight"}
    assert all(4 * share < RULES[kind].float32 < 25 * share for kind, share in shares.items())


def test_the_page_names_every_letter_file_and_count(vectors):
    page = (Path(__file__).resolve().parents[2] / "docs" / "golden.md").read_text(encoding="utf-8")
    used = {letter for golden in vectors.goldens for letter in golden.letters}
    assert used <= set(LETTERS)
    assert [letter for letter in sorted(used) if f"`{letter}`" not in page] == []
    assert f"{len(vectors.constants)} constants" in page
    for name in (*(f"`{case}`" for case in CASES), "config.json", "text.sparse.layer0.safetensors", "read_plain.py"):
        assert name in page
