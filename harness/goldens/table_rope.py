"""Constants of RoPE and YaRN (spec 1.5).

Letters: R rope lanes, P positions.
"""

import math
from typing import Any

import torch

from reference import DeepseekV32Config
from reference.rope import (
    RotaryTable,
    rotary_factor,
    rotate_half_split,
    rotate_interleaved,
    softmax_scale,
    yarn_inv_freq,
    yarn_mscale,
)

from . import plain
from .constants import Constant
from .inputs import PRESET

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# 4097 is the first position beyond the original context, 163839 the last of the model's.
POSITIONS = (1, 4097, 5000, 163_839)
# f'_i as the sheet prints it, and half a unit of its last digit or of fp32, as a share.
PRINTED_FREQUENCIES = (
    (10, 0.0562341325, 1.2e-7), (11, 0.0390069266, 1.2e-7), (16, 0.0055, 1.2e-7), (22, 1.778279e-4, 3e-7),
    (23, 3.3338036e-5, 1.2e-7), (31, 3.3338036e-6, 1.2e-7),
)  # fmt: skip


def constants() -> list[Constant]:
    """The frequencies, where YaRN begins and ends, the softmax scale, angles and both rotations."""
    v32 = DeepseekV32Config.preset("v32")
    return [*_parameters(v32), *_frequencies(v32), *_scales(v32), *_rotations(v32)]


def _parameters(v32: DeepseekV32Config) -> list[Constant]:
    names = (
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    )
    return [
        Constant(
            "rope.parameters", "1.5", f"The parameters of the table, in this order: {', '.join(names)}.",
            [v32.rope[name] for name in names], [10000.0, 40.0, 4096, 32.0, 1.0, 1.0, 1.0], "spec 1.1 and 1.5",
            arithmetic="exact",
        ),
        Constant(
            "rope.max_position", "1.5", "max_position_embeddings: factor times the original context.",
            v32.max_position_embeddings, 163840, "spec 1.1: 40 x 4096", arithmetic="exact",
        ),
        Constant(
            "rope.lanes", "1.5", "Rope lanes of a head, the same in MLA and in the indexer; half as many frequencies.",
            v32.qk_rope_head_dim, 64, "spec 1.1", arithmetic="exact",
        ),
    ]  # fmt: skip


def _frequencies(v32: DeepseekV32Config) -> list[Constant]:
    plain_table = yarn_inv_freq(PLAIN_ROPE, 64)
    table = yarn_inv_freq(v32.rope, 64)
    tiny = yarn_inv_freq(DeepseekV32Config.preset(PRESET).rope, 16)
    kept = int((table == plain_table).sum()) - 1
    divided = int((~torch.isclose(table, plain_table / 40, rtol=2.4e-7, atol=0)).sum())
    indices = [i for i, _, _ in PRINTED_FREQUENCIES]
    table_is_data = "The table is data, computed in fp32: use these numbers. Far positions show their last digit."
    return [
        Constant(
            "rope.plain_inv_freq", "1.5", "f_i = 10000^(-2i/64), i = 0 ... 31, before YaRN, radians a token.",
            plain_table.tolist(), [10000.0 ** (-2 * i / 64) for i in range(32)], "closed form 10000^(-2i/64)",
            within=1.2e-7, relative=True, arithmetic="fp32",
        ),
        Constant(
            "rope.correction_index", "1.5", "64 ln(4096 / (2 pi r)) / (2 ln 10000) for r = 32 and r = 1 rotations.",
            [plain.correction_index(32), plain.correction_index(1)], [10.472, 22.513], "spec 1.5", within=5e-4,
            given={"rotations": [32, 1]},
        ),
        Constant(
            "rope.low_high", "1.5",
            "The last frequency that YaRN leaves as it is, and the first that it divides by 40 wholly (spec: low, high).",
            [kept, divided], [10, 23], "spec 1.5: floor(10.472), ceil(22.513)", arithmetic="exact",
        ),
        Constant(
            "rope.inv_freq", "1.5", f"f'_i of YaRN, i = 0 ... 31, radians a token. {table_is_data}",
            table.tolist(), plain.yarn_inv_freq(64), "plain.yarn_inv_freq", within=3e-7, relative=True, arithmetic="fp32",
        ),
        *[
            Constant(
                f"rope.inv_freq_{i}", "1.5", f"f'_{i} of YaRN as the sheet prints it.", float(table[i]), printed,
                "spec 1.5", within=share, relative=True, arithmetic="fp32",
            )
            for i, printed, share in PRINTED_FREQUENCIES
        ],
        Constant(
            "rope.ramp", "1.5", f"(f_i - f'_i) / (f_i - f_i/40) for i = {indices}: clamp((i - 10) / 13, 0, 1).",
            [float((plain_table[i].double() - table[i].double()) / (plain_table[i].double() * (39 / 40))) for i in indices],
            [min(max((i - 10) / 13, 0.0), 1.0) for i in indices], "spec 1.5: (i - 10) / 13", within=1e-6,
            given={"indices": indices}, arithmetic="fp32",
        ),
        Constant(
            "rope.inv_freq_of_the_vectors", "1.5",
            f"f'_i, i = 0 ... 7, of the model of these vectors (16 rope lanes). {table_is_data}",
            tiny.tolist(), plain.yarn_inv_freq(16), "plain.yarn_inv_freq(16)", within=3e-7, relative=True,
            arithmetic="fp32",
        ),
    ]  # fmt: skip


def _scales(v32: DeepseekV32Config) -> list[Constant]:
    unscaled = DeepseekV32Config.preset("v32", rope_parameters=dict(PLAIN_ROPE))
    tiny = DeepseekV32Config.preset(PRESET)
    return [
        Constant(
            "rope.mscale", "1.5", "m = 0.1 ln(40) + 1.", yarn_mscale(40.0, 1.0), 1.3688879454, "spec 1.5", within=5e-11,
        ),
        Constant(
            "rope.mscale_squared", "1.5", "m squared.", yarn_mscale(40.0, 1.0) ** 2, 1.8738542071, "spec 1.5", within=5e-11,
        ),
        Constant(
            "rope.softmax_scale", "1.5",
            "(128 + 64)^(-1/2) m^2: multiplies the whole logit, in the absorbed form too (not 576^(-1/2)).",
            softmax_scale(v32), 0.1352337789, "spec 1.5", within=5e-11,
        ),
        Constant(
            "rope.softmax_scale_without_yarn", "1.5", "(128 + 64)^(-1/2): m enters only when YaRN is active.",
            softmax_scale(unscaled), 0.0721687836, "closed form 192^(-1/2)", within=5e-11,
        ),
        Constant(
            "rope.softmax_scale_of_the_vectors", "1.5", "(16 + 16)^(-1/2) m^2, for the model of these vectors.",
            softmax_scale(tiny), 32**-0.5 * (0.1 * math.log(40) + 1) ** 2, "closed form", within=5e-11,
        ),
        Constant(
            "rope.cos_sin_factor", "1.5", "What cos and sin are multiplied by: mscale over mscale_all_dim.",
            rotary_factor(v32.rope), 1.0, "spec 1.5", arithmetic="exact",
        ),
    ]  # fmt: skip


def _rotations(v32: DeepseekV32Config) -> list[Constant]:
    rotary = RotaryTable(v32).double()
    table = yarn_inv_freq(v32.rope, 64).tolist()
    cos, sin = rotary(torch.tensor([POSITIONS]), torch.float64)
    turns = [plain.angles(p, table) for p in POSITIONS]
    # Values in sixteenths, exact in bf16, with no symmetry that would hide a swapped pair.
    x = [((7 * i * i + 3 * i + 1) % 61 - 30) / 16 for i in range(64)]
    unit = [1.0] + [0.0] * 63
    given: dict[str, Any] = {"positions": list(POSITIONS)}
    pairings = (
        ("interleaved", rotate_interleaved, plain.rotate_interleaved, 1, "MLA's q_pe and k_pe: pairs (2i, 2i + 1)"),
        ("half_split", rotate_half_split, plain.rotate_half_split, 32, "the indexer's q and k: pairs (i, i + 32)"),
    )
    return [
        Constant(
            "rope.cos", "1.5", "cos of position times f'_i, the product rounded to fp32 also in fp64, by position.",
            cos[0].tolist(), [[math.cos(a) for a in turn] for turn in turns], "plain.angles", within=1e-12, given=given,
        ),
        Constant(
            "rope.sin", "1.5", "sin of position times f'_i, the product rounded to fp32 also in fp64, by position.",
            sin[0].tolist(), [[math.sin(a) for a in turn] for turn in turns], "plain.angles", within=1e-12, given=given,
        ),
        *[
            Constant(
                f"rope.{name}_unit", "1.5",
                f"The first two lanes that the unit vector of lane 0 has at position 1 (lanes 0 and {partner}), {what}.",
                rotate(torch.tensor(unit).double(), cos[0, 0], sin[0, 0])[[0, partner]].tolist(),
                [0.5403023059, 0.8414709848], "closed form cos 1, sin 1", within=5e-11,
            )
            for name, rotate, _, partner, what in pairings
        ],
        *[
            Constant(
                f"rope.{name}", "1.5", f"A vector of 64 lanes turned at each position, {what}.",
                rotate(torch.tensor(x).double(), cos[0], sin[0]).tolist(), [again(x, turn) for turn in turns],
                f"plain.rotate_{name}", within=1e-12, given={**given, "x": x},
            )
            for name, rotate, again, _, what in pairings
        ],
    ]  # fmt: skip
