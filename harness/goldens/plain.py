"""The formulas of the constants a second time, in plain Python: no torch, no numpy, lists of numbers.

Each is short enough to be written again in another language. They are the second opinion on the reference where the
specification prints no number.

Letters: R rope lanes, D channels, S keys.
"""

import math
import struct
from collections.abc import Sequence

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4


def fp32(x: float) -> float:
    """`x` rounded to fp32, to nearest, ties to even."""
    rounded: float = struct.unpack("<f", struct.pack("<f", x))[0]
    return rounded


def bf16(x: float) -> float:
    """An fp32 number rounded to bf16, to nearest, ties to even: half of the dropped 16 bits is added first."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    bits += 0x7FFF + ((bits >> 16) & 1)
    rounded: float = struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]
    return rounded


def yarn_inv_freq(
    lanes: int,
    theta: float = 10000.0,
    factor: float = 40.0,
    context: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> list[float]:
    """R/2 angular frequencies in radians a token, R = `lanes`; see `reference.rope.yarn_inv_freq` (spec 1.5)."""
    low = max(math.floor(correction_index(beta_fast, lanes, theta, context)), 0)
    high = min(math.ceil(correction_index(beta_slow, lanes, theta, context)), lanes - 1)
    table = []
    for i in range(lanes // 2):
        f = theta ** (-2 * i / lanes)
        ramp = min(max((i - low) / max(high - low, 0.001), 0.0), 1.0)
        table.append(f / factor * ramp + f * (1 - ramp))
    return table


def correction_index(rotations: float, lanes: int = 64, theta: float = 10000.0, context: int = 4096) -> float:
    """The index in the table, not yet rounded, that turns `rotations` times over the original context (spec 1.5)."""
    return lanes * math.log(context / (2 * math.pi * rotations)) / (2 * math.log(theta))


def angles(position: int, inv_freq: Sequence[float]) -> list[float]:
    """R/2 angles: the products with an fp32 table, rounded to fp32 in every precision of the model (spec 1.5)."""
    return [fp32(position * f) for f in inv_freq]


def rotate_interleaved(x: Sequence[float], turn: Sequence[float]) -> list[float]:
    """R lanes with pairs (2i, 2i + 1) turned by R/2 angles; the result is interleaved again. MLA's q_pe and k_pe."""
    out: list[float] = []
    for i, angle in enumerate(turn):
        a, b = x[2 * i], x[2 * i + 1]
        out += [a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)]
    return out


def rotate_half_split(x: Sequence[float], turn: Sequence[float]) -> list[float]:
    """R lanes with pairs (i, i + R/2) turned by R/2 angles. The indexer's q and k."""
    half = len(turn)
    out = [0.0] * (2 * half)
    for i, angle in enumerate(turn):
        a, b = x[i], x[i + half]
        out[i], out[i + half] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return out


def hadamard_sign(row: int, column: int) -> int:
    """Entry of Sylvester's Hadamard matrix: −1 where the two indices share an odd number of bits, else 1."""
    return -1 if (row & column).bit_count() % 2 else 1


def hadamard_rotate(x: Sequence[float]) -> list[float]:
    """x·H·D^(-1/2) in fp32 for D channels of bf16 whose sums are exact in fp32, rounded to bf16 (spec 2, step 6)."""
    width = len(x)
    factor = fp32(width**-0.5)
    sums = [sum(hadamard_sign(i, j) * x[i] for i in range(width)) for j in range(width)]
    return [bf16(fp32(s * factor)) for s in sums]


def ue8m0(scale: float) -> float:
    """A positive normal fp32 number rounded up to a power of two by its bits: exponent, + 1 if any mantissa bit."""
    (bits,) = struct.unpack("<I", struct.pack("<f", scale))
    exponent = (bits >> 23) + (1 if bits & 0x7FFFFF else 0)
    return math.ldexp(1.0, exponent - 127)


def e4m3_byte(x: float) -> int:
    """The e4m3 byte (sign, 4 bits of exponent with bias 7, 3 of mantissa) nearest to `x` within ±448, ties to even."""
    sign = 0x80 if math.copysign(1.0, x) < 0 else 0
    size = min(abs(x), E4M3_MAX)
    # Below 2^-6 numbers are subnormal: the step stays 2^-9.
    exponent = max(math.frexp(size)[1] - 1, -6) if size else -6
    # round() takes ties to even, and a mantissa that rounds up to 16 carries into the exponent by itself.
    steps = round(math.ldexp(size, 3 - exponent))
    return sign | (steps + ((exponent + 6) << 3))


def quantize(x: Sequence[float]) -> tuple[list[int], float]:
    """Payload bytes and ue8m0 scale of one block of D ≤ 128 channels (spec 2, step 7)."""
    amax = max(max(map(abs, x)), fp32(AMAX_FLOOR))
    scale = ue8m0(fp32(amax * fp32(1.0 / E4M3_MAX)))
    return [e4m3_byte(v / scale) for v in x], scale


def kl(target: Sequence[float], scores: Sequence[float]) -> float:
    """KL(p ‖ softmax(I)) of one row of S keys in nats; −inf scores are outside, and so must the target be (spec 3)."""
    top = max(scores)
    lse = top + math.log(sum(math.exp(s - top) for s in scores))
    return sum(p * (math.log(p) - (s - lse)) for p, s in zip(target, scores, strict=True) if p > 0)


def index_scores(q_JE: Sequence[Sequence[float]], k_SE: Sequence[Sequence[float]], w_J: Sequence[float]) -> list[float]:
    """I[s] = Σ_j w[j] · max(q[j]·k[s], 0) for S keys, J heads, E lanes (spec 2, step 10)."""
    return [
        sum(w * max(sum(a * b for a, b in zip(q, k, strict=True)), 0.0) for q, w in zip(q_JE, w_J, strict=True))
        for k in k_SE
    ]
