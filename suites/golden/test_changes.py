"""Every kind of change in a stored export is found, and told in words; null candidates of the comparison itself."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from harness.goldens.compare import compare, differences, read_stored, value_difference
from harness.goldens.export import export_files
from harness.goldens.manifest import MANIFEST_FILE, sha256
from harness.goldens.record import official_tensors
from harness.goldens.tolerances import limits
from harness.goldens.vectors import WEIGHTS_FILE, build_vectors, recipe_state

SPARSE = "packed.sparse.safetensors"


def told(directory, vectors):
    return list(differences(read_stored(directory), vectors))


def edit_manifest(directory, change):
    manifest = json.loads((directory / MANIFEST_FILE).read_text())
    change(manifest)
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest))


def edit_tensor(directory, file, name, change, *, with_hash=True):
    """Replace a tensor; with its hash in the manifest, as somebody would who means it."""
    path = directory / file
    tensors = load(path.read_bytes())
    tensors[name] = change(tensors[name].clone())
    rewrite(directory, file, tensors, with_hash=with_hash)


def rewrite(directory, file, tensors, *, with_hash=True):
    content = save(tensors, metadata={"format": "pt"})
    (directory / file).write_bytes(content)
    if with_hash:
        entry = {"bytes": len(content), "sha256": sha256(content)}
        edit_manifest(directory, lambda m: m["files"][file].update(entry))


def added(amount, *at):
    def change(tensor):
        tensor[at] += amount
        return tensor

    return change


def test_a_fresh_export_has_no_differences(directory, vectors):
    assert told(directory, vectors) == []
    assert compare(directory).sentences == []


@pytest.mark.parametrize(
    ("file", "name", "change", "sentence"),
    [
        (SPARSE, "logits_tail", added(0.01, 1, 0, 7),
         r"logits_tail of case packed, sparse: sequence 1, row 0, token 7 is \S+, stored \S+, off by 0.01, "
         r"allowed \S+e-07; 1 of 1280 entries differ\."),
        (SPARSE, "index_scores.0", added(1e-4, 0, 39, 30),
         r"index_scores.0 of case packed, sparse: sequence 0, row 39, key 30 is \S+, stored \S+, off by 0.0001, "
         r"allowed \S+; 1 of 3200 entries differ\."),
        (SPARSE, "index_scores.0", added(torch.inf, 0, 39, 30),
         r"index_scores.0 of case packed, sparse: sequence 0, row 39, key 30 is \S+, stored inf, off by inf, .*"),
        (SPARSE, "topk_indices.1", added(1, 0, 39, 15),
         r"topk_indices.1 of case packed, sparse: sequence 0, row 39, place 15 is \d+, stored \d+, off by 1, allowed 0; "
         r"1 of 1280 entries differ\."),
        (SPARSE, "lm_loss", added(1e-9, 0),
         r"lm_loss of case packed, sparse: it is 6\.\d+, stored 6\.\d+, off by 1e-09, allowed \S+; 1 of 1 entries differ\."),
        (SPARSE, "kl_rows", added(torch.nan, 2, 1, 5),
         r"kl_rows of case packed, sparse: layer 2, sequence 1, row 5 is \S+, stored nan, off by nan, .*"),
        (SPARSE, "gradients.lm", added(1e-3, 1, 2),
         r"gradients.lm of case packed, sparse: of model\.embed_tokens\.weight, l2 norm is \S+, stored \S+, off by "
         r"0.001, allowed \S+; 1 of 712 entries differ\."),
        ("text.inputs.safetensors", "input_ids", added(1, 0, 3),
         r"input_ids of the inputs of case text: sequence 0, row 3 is 101, stored 102, off by 1, allowed 0; 1 of 80 .*"),
        ("text.sparse.layer0.safetensors", "index_w", added(0.1, 4, 3),
         r"index_w of the first layer of case text, sparse: row 4, indexer head 3 is \S+, stored \S+, off by 0.1, .*"),
        (SPARSE, "router_scores.1", lambda t: t[..., :7].contiguous(),
         r"router_scores.1 of case packed, sparse is F32 of shape \[2, 40, 8\], stored F32 of shape \[2, 40, 7\]\."),
        (SPARSE, "kl_loss", lambda t: t.float(),
         r"kl_loss of case packed, sparse is F64 of shape \[1\], stored F32 of shape \[1\]\."),
    ],
)  # fmt: skip
def test_an_altered_tensor_is_told_by_its_place(directory, vectors, file, name, change, sentence):
    if name == "gradients.lm":
        assert vectors.gradient_rows["lm"][1] == "model.embed_tokens.weight"
    edit_tensor(directory, file, name, change)
    (said,) = told(directory, vectors)
    assert re.fullmatch(sentence, said), said


def test_an_altered_tensor_is_told_by_its_hash_too(directory, vectors):
    edit_tensor(directory, SPARSE, "logits_tail", added(0.01, 1, 0, 7), with_hash=False)
    by_hash, by_place = told(directory, vectors)
    assert re.fullmatch(
        rf"{re.escape(SPARSE)} was altered: sha256 is [0-9a-f]{{16}}…, the manifest says [0-9a-f]{{16}}….", by_hash
    )
    assert by_place.startswith("logits_tail of case packed, sparse:")


def test_a_change_too_small_to_matter_is_told_by_its_hash_alone(directory, vectors):
    edit_tensor(directory, SPARSE, "lm_loss", added(1e-13, 0), with_hash=False)
    assert [said.split(":")[0] for said in told(directory, vectors)] == [f"{SPARSE} was altered"]


def test_the_worst_entry_is_the_one_that_is_told(directory, vectors):
    edit_tensor(directory, SPARSE, "logits_tail", lambda t: added(0.3, 0, 1, 2)(added(0.01, 1, 0, 7)(t)))
    (said,) = told(directory, vectors)
    assert "sequence 0, row 1, token 2 is" in said
    assert said.endswith("2 of 1280 entries differ.")


def test_a_missing_file_is_named(directory, vectors):
    listed = json.loads((directory / MANIFEST_FILE).read_text())["files"][SPARSE]["sha256"]
    (directory / SPARSE).unlink()
    assert told(directory, vectors) == [f"{SPARSE} is missing (sha256 {listed[:16]}…)."]


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_a_truncated_file_is_named_with_its_sizes(directory, vectors, keep):
    content = (directory / SPARSE).read_bytes()
    (directory / SPARSE).write_bytes(content[:keep])
    by_hash, by_reading = told(directory, vectors)
    assert by_hash.startswith(f"{SPARSE} is truncated: it has {keep} of {len(content)} bytes; sha256 is ")
    assert by_reading == f"{SPARSE} cannot be read as safetensors; its 19 tensors were not compared."


def test_a_longer_file_is_named_with_its_sizes(directory, vectors):
    content = (directory / SPARSE).read_bytes()
    (directory / SPARSE).write_bytes(content + b"\0")
    assert told(directory, vectors)[0].startswith(
        f"{SPARSE} is longer than it was: it has {len(content) + 1} instead of {len(content)} bytes;"
    )


def test_a_wrong_hash_in_the_manifest_is_told(directory, vectors):
    edit_manifest(directory, lambda m: m["files"][SPARSE].update(sha256="0" * 64))
    (said,) = told(directory, vectors)
    assert said.startswith(f"{SPARSE} was altered: sha256 is ")
    assert said.endswith(f"the manifest says {'0' * 16}….")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m["config"].update(index_topk=32), "config field index_topk is 16, stored 32 (manifest.json)."),
        (lambda m: m["config"].update(index_topk=16.0), "config field index_topk is 16, stored 16 (manifest.json)."),
        (lambda m: m["config"]["rope_parameters"].update(factor=20.0),
         "config field rope_parameters: factor is 40, stored 20 (manifest.json)."),
        (lambda m: m["config"].pop("n_group"), "config field n_group is 4, stored nothing (manifest.json)."),
        (lambda m: m["config"].update(extra=1), "config field extra is not part of it now, stored 1 (manifest.json)."),
        (lambda m: m.pop("config"), "config field is missing (manifest.json)."),
        (lambda m: m.update(spec="2025-01-01"), "spec is 2026-11-23, stored 2025-01-01 (manifest.json)."),
        (lambda m: m.update(format_version=2), "format_version is 1, stored 2 (manifest.json)."),
        (lambda m: m["recipe"].update(seed=0), "recipe: seed is 100, stored 0 (manifest.json)."),
        (lambda m: m["gradient_columns"].reverse(),
         "gradient_columns is [sum, sum of magnitudes, l2 norm, projection, … 8 in all], stored [value 3, value 2, "
         "value 1, value 0, … 8 in all] (manifest.json)."),
        (lambda m: m.update(note="x"), "manifest.json holds note, which is not part of it now."),
        (lambda m: m["files"].pop(SPARSE), f"{SPARSE} is not listed (manifest.json)."),
        (lambda m: m["files"].update({"../x.json": {"bytes": 0, "sha256": ""}}),
         "../x.json is listed, and is not part of the vectors now (manifest.json)."),
    ],
)  # fmt: skip
def test_a_changed_manifest_is_told_field_by_field(directory, vectors, change, sentence):
    edit_manifest(directory, change)
    assert told(directory, vectors)[0] == sentence


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("tolerance", {"float64": 1.0, "float32": 1.0},
         r"lm_loss in packed.sparse.safetensors: its tolerance is \{float64: \S+, float32: \S+\}, stored \{float64: 1, "
         r"float32: 1\} \(manifest.json\)\."),
        ("shape", [2], r"lm_loss in packed.sparse.safetensors: its shape is \[1\], stored \[2\] \(manifest.json\)\."),
        ("dtype", "F32", r"lm_loss in packed.sparse.safetensors: its dtype is F64, stored F32 \(manifest.json\)\."),
        ("letters", "B", r"lm_loss in packed.sparse.safetensors: its letters is 1, stored B \(manifest.json\)\."),
        ("meaning", "?", r"lm_loss in packed.sparse.safetensors: its meaning is Next-.*, stored \? \(manifest.json\)\."),
        ("judged", "?", r"lm_loss in packed.sparse.safetensors: its judged is entry, stored \? \(manifest.json\)\."),
    ],
)  # fmt: skip
def test_a_changed_entry_of_a_tensor_is_told(directory, vectors, field, value, sentence):
    def change(manifest):
        (entry,) = [t for t in manifest["tensors"] if (t["file"], t["name"]) == (SPARSE, "lm_loss")]
        entry[field] = value

    edit_manifest(directory, change)
    (said,) = told(directory, vectors)
    assert re.fullmatch(sentence, said), said


def test_a_tensor_that_is_not_listed_or_not_stored_is_told(directory, vectors):
    tensors = load((directory / SPARSE).read_bytes())
    tensors["mine"] = tensors.pop("kl_loss")
    rewrite(directory, SPARSE, tensors)

    def change(manifest):
        for entry in manifest["tensors"]:
            if (entry["file"], entry["name"]) == (SPARSE, "kl_loss"):
                entry["name"] = "mine"

    edit_manifest(directory, change)
    assert told(directory, vectors) == [
        f"kl_loss in {SPARSE} is not listed (manifest.json).",
        f"mine in {SPARSE} is listed, and is not part of the vectors now (manifest.json).",
        f"kl_loss of case packed, sparse is missing in {SPARSE}.",
        f"mine in {SPARSE} is not part of the vectors now.",
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "manifest.json is not JSON: "),
        (b"\xff\xfe", "manifest.json is not JSON: "),
        (b"[]", "manifest.json is not the manifest of golden vectors: it lacks format 'v32-golden'."),
        (b'{"format": "v32-golden"}', "manifest.json is damaged: files must give bytes and sha256 of each file."),
        (b'{"format": "v32-golden", "files": {"a": 5}, "tensors": []}', "manifest.json is damaged: files must give"),
        (b'{"format": "v32-golden", "files": {}, "tensors": [5]}', "manifest.json is damaged: tensors must give"),
    ],
)
def test_a_damaged_manifest_is_told_and_the_files_are_compared_all_the_same(directory, one_build, content, sentence):
    edit_tensor(directory, SPARSE, "logits_tail", added(0.01, 1, 0, 7))
    (directory / MANIFEST_FILE).write_bytes(content)
    said = compare(directory).sentences
    assert said[0].startswith(sentence)
    assert [s.split(":")[0] for s in said[1:]] == ["logits_tail of case packed, sparse"]


def test_a_changed_config_file_is_told_field_by_field(directory, vectors):
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**fields, "index_topk": 2048, "q_lora_rank": 64}))
    assert told(directory, vectors)[1:] == [
        "config field q_lora_rank is 48, stored 64 (config.json).",
        "config field index_topk is 16, stored 2048 (config.json).",
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "config.json is not JSON: "),
        (b"[1]", "config field is missing (config.json)."),
    ],
)
def test_a_damaged_config_file_is_told(directory, vectors, content, sentence):
    (directory / "config.json").write_bytes(content)
    assert told(directory, vectors)[1].startswith(sentence)


def test_changed_constants_are_told(directory, vectors):
    constants = {c["name"]: c for c in json.loads((directory / "constants.json").read_text())}
    constants["rope.softmax_scale"]["value"] = 576**-0.5
    constants["indexer.fp8_payload"]["value"][7] ^= 1
    constants["kl.mean"]["within"] = 1.0
    constants.pop("gate.weights")
    constants["mine"] = {**constants["kl.mean"], "name": "mine"}
    (directory / "constants.json").write_text(json.dumps(list(constants.values())))
    said = told(directory, vectors)[1:]
    starts = (
        "constant rope.softmax_scale is 0.135233778861, stored 0.0416666666667, off by ",
        "constant indexer.fp8_payload, entry [7] is ",
        "constant gate.weights is missing.",
        "constant kl.mean: its within is 1e-14, stored 1.",
        "constant mine is stored, and is not one of them now.",
    )
    assert len(said) == len(starts)
    assert all(sentence.startswith(start) for sentence, start in zip(said, starts, strict=True)), said


@pytest.mark.parametrize("content", [b"{}", b"[5]", b"x", b'[{"name": "kl.mean"}]'])
def test_damaged_constants_are_told(directory, vectors, content):
    (directory / "constants.json").write_bytes(content)
    assert told(directory, vectors)[1].startswith("constants.json cannot be read: ")


def test_one_wrong_weight_is_one_difference(directory):
    name = "model.layers.1.self_attn.indexer.wk.weight"
    edit_tensor(directory, WEIGHTS_FILE, name, added(1e-3, 5, 6))
    (said,) = compare(directory).sentences
    assert re.fullmatch(
        rf"{re.escape(name)} of the weights: output 5, input 6 is \S+, stored \S+, off by 0.001, allowed \S+; 1 of 2048 "
        r"entries differ\.",
        said,
    )


def test_weights_that_another_machine_rounded_otherwise_are_computed_with(tmp_path):
    # 1e-7 in every weight moves fp64 results far beyond what is allowed; the stored weights are what counts.
    generator = torch.Generator().manual_seed(1)
    recipe = official_tensors(recipe_state())
    rounded = {n: w * (1 + 1e-7 * torch.randn(w.shape, generator=generator).clamp(-2, 2)) for n, w in recipe.items()}
    there = build_vectors(rounded)
    for name, content in export_files(there).items():
        (tmp_path / name).write_bytes(content)
    assert told(tmp_path, build_vectors()) != []
    assert compare(tmp_path).sentences == []


def test_a_constant_that_the_reference_loses_is_told(directory, vectors):
    broken = [replace(c, value=1.0) if c.name == "rope.softmax_scale" else c for c in vectors.constants]
    said = told(directory, replace(vectors, constants=broken))
    assert said[0].startswith("constant rope.softmax_scale: the reference gives 1, spec 1.5 says 0.1352337789")


def test_no_tensor_can_move_by_more_than_is_allowed(vectors):
    """The null candidates of the comparison: every tensor, one entry, a little more than its tolerance."""
    for golden in vectors.goldens:
        value = golden.value.double()
        finite = value.isfinite().flatten().nonzero()[-1]
        allowed = float(limits(golden.rule, value).flatten()[finite])
        for sign in (1, -1):
            moved = golden.value.clone()
            # Exact integers have no little.
            step = max(1.5 * allowed, 0.0) or 1
            moved.view(-1)[finite] += sign * step
            if bool((moved == golden.value).all()):
                # Where fp32 has no number so near, the next one is.
                moved.view(-1)[finite] = torch.nextafter(golden.value.view(-1)[finite], torch.tensor(sign * torch.inf))
            assert value_difference(golden, moved, vectors.gradient_rows) is not None, f"{golden.file} {golden.name}"
        assert value_difference(golden, golden.value, vectors.gradient_rows) is None


def test_infinities_must_stand_in_the_same_places(vectors):
    golden = next(g for g in vectors.goldens if g.name == "index_scores.0")
    hidden = golden.value == -torch.inf
    for wrong in (0.0, torch.inf, torch.nan, -1e30):
        moved = golden.value.masked_fill(hidden, wrong)
        said = value_difference(golden, moved, {})
        assert said is not None
        assert f"{int(hidden.sum())} of {hidden.numel()} entries differ" in said
