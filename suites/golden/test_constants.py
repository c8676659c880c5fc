"""The constants: each agrees with a second opinion, each would be seen to change, and the sheet's numbers are all there."""

import ast
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.goldens import plain
from harness.goldens.constants import Constant, all_constants, disagreements, first_difference
from reference.fp8 import hadamard_rotate, quantize_e4m3
from reports.strict_json import loads

CONSTANTS = all_constants()
each_constant = pytest.mark.parametrize("constant", CONSTANTS, ids=lambda c: c.name)
# Every number with a golden value that spec 1.5 and 2 print, as they print it.
PRINTED = (
    10_000.0, 40.0, 4096, 32.0, 1.0, 10.472, 22.513, 10, 23, 163_840,
    0.0562341325, 0.0390069266, 0.0055, 1.778279e-4, 3.3338036e-5, 3.3338036e-6,
    1.3688879454, 1.8738542071, 0.1352337789,
    64, 128, 2048, 1e-6, 448.0, 1e-4, 2.0**-8, 2.0**-7, 2.0**-22, 2.0, 132, 0.0110485435, 16_384, 81_920, 278_528,
)  # fmt: skip


def leaves(value):
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


def moved(value, constant):
    """`value` with one finite number moved by a little: the next integer, or just beyond what is allowed."""
    if isinstance(value, list):
        place = max(range(len(value)), key=lambda i: any(math.isfinite(leaf) for leaf in leaves(value[i])))
        return [moved(item, constant) if i == place else item for i, item in enumerate(value)]
    if constant.arithmetic == "exact" and isinstance(value, int):
        return value + 1
    allowed = constant.within * (abs(value) if constant.relative else 1.0)
    return value + max(2.5 * allowed, 1e-9 * abs(value), 1e-15)


@each_constant
def test_the_reference_agrees_with_the_second_opinion(constant):
    assert constant.disagreement() is None


@each_constant
def test_a_value_that_is_a_little_off_is_rejected(constant):
    said = replace(constant, value=moved(constant.value, constant)).disagreement()
    assert said is not None
    assert said.startswith(f"constant {constant.name}")
    assert constant.source in said


@each_constant
def test_an_expected_value_that_is_a_little_off_is_rejected(constant):
    assert replace(constant, expected=moved(constant.expected, constant)).disagreement() is not None


@each_constant
def test_what_is_allowed_is_little(constant):
    largest = max(abs(leaf) for leaf in leaves(constant.expected) if math.isfinite(leaf))
    # The correction indices are printed with five digits.
    assert constant.within <= 5e-5 * (1.0 if constant.relative else max(largest, 1e-300))


@each_constant
def test_a_stored_value_that_is_a_little_off_is_told(constant):
    stored = Constant.from_json(loads(constant.as_json().encode()))
    again = Constant.from_json(loads(constant.as_json().encode()))
    assert again.change(stored) is None
    said = again.change(replace(stored, value=moved(stored.value, replace(constant, within=5e-7, relative=True))))
    assert said is not None
    assert f"constant {constant.name}" in said
    assert "stored" in said


def test_every_printed_number_is_an_expected_value():
    sections = [c for c in CONSTANTS if c.section in ("1.5", "2")]
    held = [leaf for c in sections for leaf in leaves(c.expected)]
    assert [number for number in PRINTED if number not in held] == []


def test_names_are_unique_and_texts_are_ascii():
    names = [c.name for c in CONSTANTS]
    assert len(set(names)) == len(names)
    assert all((c.meaning + c.source + c.name).isascii() and c.meaning.endswith(".") for c in CONSTANTS)


def test_a_disagreement_is_a_sentence_with_its_source():
    constant = next(c for c in CONSTANTS if c.name == "rope.softmax_scale")
    # What one gets with the width of the absorbed form.
    wrong = replace(constant, value=576**-0.5 * 1.8738542071)
    assert disagreements([constant, wrong]) == [
        "constant rope.softmax_scale: the reference gives 0.0780772586292, spec 1.5 says 0.1352337789, off by 0.0572, "
        "allowed 5e-11."
    ]


@pytest.mark.parametrize(
    ("actual", "expected", "found"),
    [
        ([1.0, 2.0], [1.0, 2.0], None),
        ([1.0, 2.0], [1.0], ("", [1.0, 2.0], [1.0], 0.0)),
        ([1.0], 1.0, ("", [1.0], 1.0, 0.0)),
        ([[1, 2], [3, 5]], [[1, 2], [3, 4]], (", entry [1, 1]", 5, 4, 0.0)),
        ([math.nan, math.inf], [math.nan, math.inf], None),
        (math.inf, -math.inf, ("", math.inf, -math.inf, 0.0)),
        (math.nan, 1.0, ("", math.nan, 1.0, 0.0)),
        (True, 1.5, ("", True, 1.5, 0.0)),
        ("1", 1, ("", "1", 1, 0.0)),
        (None, 1, ("", None, 1, 0.0)),
    ],
)
def test_nested_lists_are_compared_entry_by_entry(actual, expected, found):
    assert str(first_difference(actual, expected, lambda _: 0.0)) == str(found)


@pytest.mark.parametrize("entry", [5, {}, {"name": "x"}, None])
def test_what_is_no_constant_is_refused(entry):
    with pytest.raises(ValueError, match="a constant in it has other fields"):
        Constant.from_json(entry)


def test_the_second_opinion_imports_nothing_but_the_standard_library():
    tree = ast.parse(Path(plain.__file__).read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"math", "struct", "collections.abc"}


def test_plain_bytes_are_torchs():
    x = torch.cat([torch.randn(2000) * torch.logspace(-4, 2, 2000), torch.arange(-512, 512) / 512.0])
    bytes_ = x.to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    assert [plain.e4m3_byte(v) for v in x.tolist()] == bytes_
    assert [plain.bf16(v) for v in x.tolist()] == x.bfloat16().tolist()


@pytest.mark.parametrize("size", [1e-6, 0.03, 1.0, 70.0])
def test_plain_quantisation_is_the_references(size):
    x = (torch.randn(128) * size).tolist()
    payload, scale = quantize_e4m3(torch.tensor([x]))
    assert plain.quantize(x) == (payload.view(torch.uint8)[0].tolist(), float(scale))


def test_plain_rotation_is_the_references_on_exact_sums():
    x = (torch.randint(-200, 200, (128,)) / 64).bfloat16()
    assert plain.hadamard_rotate(x.tolist()) == hadamard_rotate(x).tolist()


def test_the_fp8_key_shows_a_missing_rotation():
    held = {c.name: c for c in CONSTANTS}
    key = held["indexer.fp8_payload"].given["k"]
    assert [plain.bf16(v) for v in key] == key
    payload, scale = plain.quantize(key)
    assert payload != held["indexer.fp8_payload"].value
    assert scale != held["indexer.fp8_key_scale"].value
