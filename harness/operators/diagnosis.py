"""What is wrong with a kernel, in words: tried against known faults, then factors, then where the wrong numbers lie.

Letters: B batch, L query rows, S key slots, H attention heads, J indexer heads, K selected keys, D, E, V channels.
"""

import math
from collections.abc import Iterator

import torch

from reference.indexer import select_topk, selected_mask

from ..metrics import Errors, errors
from .bench import PLAIN, UPSTREAM, Call
from .faults import faults, other_bounds, score_faults
from .plain import visible_keys
from .selection import Wrong

# The axes of what is judged, by the name of an output or the suffix of an argument.
_AXES = {"out": "BLHV", "lse": "BLH", "I": "BLS", "kl": "BL", "kl_sum": ""}
_WORDS = {
    "B": "batch entry", "L": "row", "S": "slot", "H": "head", "J": "indexer head", "D": "channel", "E": "channel",
    "V": "channel",
}  # fmt: skip
_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
# A fault that leaves less than this share of the mean error is named, even if rounding or another fault is left.
_EXPLAINED = 0.1
_PLURAL = {"batch entry": "batch entries"}


def explain_tensor(
    call: Call, name: str, label: str, actual: torch.Tensor, expected: torch.Tensor, allowed: Errors
) -> str:
    """Why `actual`, an output or gradient of `call`, is not `expected`: one clause that begins with `label`."""
    if actual.shape != expected.shape:
        return f"{label} has shape {tuple(actual.shape)}; it must be {tuple(expected.shape)}"
    axes = _AXES.get(name, name.rpartition("_")[2])
    seeing = _seeing(call)
    if not bool(torch.isfinite(actual).all()):
        return f"{label} {_not_finite(call, actual, axes, seeing)}"
    a = actual.double()
    if not bool((a != 0).any()):
        why = "no gradient arrives" if name in call.wrt else "nothing is written"
        return f"{label} is 0 everywhere: {why}"
    if "L" in axes and axes[:2] == "BL" and _only_rows(a, expected, ~seeing):
        return f"{label}: rows without keys are not 0"
    if (sentence := _known_factor(call, a, expected, allowed)) or (sentence := _rounded(a, expected, allowed)):
        return f"{label} {sentence}"
    off = float((a - expected).abs().mean())
    nearest, share = "", _EXPLAINED
    for sentence, run in faults(call, gradients=name in call.wrt):
        wrong = run().get(name)
        if wrong is None or wrong.shape != expected.shape:
            continue
        if errors(a, wrong).used(allowed) <= 1:
            return f"{label}: {sentence}"
        left = float((a - wrong).abs().mean()) / off
        nearest, share = (sentence, left) if left < share else (nearest, share)
    if nearest:
        return f"{label}, for the most part: {nearest}"
    return f"{label} {_factor(a, expected, allowed) or _where(call, a, expected, axes, allowed, seeing)}"


def explain_lse(call: Call, label: str, actual: torch.Tensor, expected: torch.Tensor, allowed: float) -> str:
    """Why a logsumexp is not what it should be, off by more than `allowed` nats."""
    if actual.shape != expected.shape:
        return f"{label} has shape {tuple(actual.shape)}; it must be {tuple(expected.shape)}"
    a, finite = actual.double(), torch.isfinite(expected)
    if bool((a[~finite] != -torch.inf).any()) and bool((~finite).any()):
        value = float(a[~finite][a[~finite] != -torch.inf][0])
        return f"{label} of rows without keys is {value:.4g}; it must be −inf"
    if not bool(torch.isfinite(a[finite]).all()):
        return f"{label} is not finite in {int((~torch.isfinite(a[finite])).sum())} entries that see keys"

    def near(wrong: torch.Tensor) -> bool:
        if not bool(torch.isfinite(wrong[finite]).all()):
            return False
        return float((a - wrong)[finite].abs().max()) <= allowed + 1e-6 * float(wrong[finite].abs().max())

    base = math.log(2)
    for sentence, wrong in (
        (f"is off by a factor {1 / base:.4f}: looks like base 2, it must be the natural logarithm", expected / base),
        (f"is off by a factor {base:.4f}: a natural logarithm was multiplied by ln 2", expected * base),
        ("is ln 2 too large", expected + base),
        ("is ln 2 too small", expected - base),
        ("has the wrong sign", -expected),
        ("is the sum of exponentials, without the logarithm", expected.exp()),
        ("is 0 everywhere: nothing is written", torch.zeros_like(expected)),
    ):
        if near(wrong):
            return f"{label} {sentence}"
    for name, dtype in _LOW.items():
        if bool((a.to(dtype).double() == a)[finite].all()) and near(expected.to(dtype).double()):
            return f"{label} is rounded to {name}"
    for sentence, run in faults(call, gradients=False):
        found = run().get("lse")
        if found is not None and near(found):
            return f"{label}: {sentence}"
    off = float((a - expected)[finite].abs().max())
    wrong_rows = ((a - expected).abs() > allowed) & finite
    return f"{label} is off by up to {off:.3g} nats{_extent(wrong_rows, 'BLH'[: a.dim()])}"


def explain_selection(call: Call, indices: torch.Tensor, found: Wrong, margin: float) -> str:
    """Why a selection of keys is wrong."""
    a = call.to(torch.float64).arguments
    scores_of = a["q_BLJE"], a["k_BSE"], a["w_BLJ"]
    bounds, k, slots = a["bounds_BL2"], a["k"], a["k_BSE"].shape[1]
    if found.shape:
        shape = (*bounds.shape[:2], min(k, slots))
        return f"indices are {indices.dtype} of shape {tuple(indices.shape)}; they must be torch.int32 of shape {shape}"
    visible, start, end = visible_keys(bounds, slots), bounds[..., :1], bounds[..., 1:]
    first: list[str] = []
    if found.range:
        first.append(f"{found.range} indices are out of range: −1 to {slots - 1} are allowed")
    if found.future:
        first.append(
            f"selects future keys: {found.future} of them, the first in {_first((indices >= end) & (indices >= 0))}"
        )
    if found.past:
        first.append(
            f"crosses documents: {found.past} keys lie before their row's start, the first in {_first((indices < start) & (indices >= 0))}"
        )
    if found.repeated:
        first.append(f"names a key twice in a row, {found.repeated} times")
    if found.order:
        first.append(f"{found.order} rows are not ascending with −1 at the tail")
    named = (indices >= 0).sum(-1)
    if found.count and not (found.future or found.past or found.repeated):
        first.append(_count(named, visible.sum(-1).clamp_max(k), k))
    for sentence, wrong in _wrong_sets(call, scores_of, visible, k):
        if torch.equal(wrong, indices):
            return "; ".join([*first, sentence])
    if not first:
        first.append(
            f"{found.missing} keys above the boundary are missing and {found.extra} below it are selected, "
            f"by more than the margin of {margin:.2g}"
        )
    return "; ".join(first)


def _count(named: torch.Tensor, wanted: torch.Tensor, k: int) -> str:
    off = named - wanted
    full = wanted == k
    if bool((off[full] == -1).all()) and bool(full.any()):
        return f"k − 1 = {k - 1} keys are selected where {k} must be"
    wrong = off != 0
    return f"{int(wrong.sum())} rows hold another number of keys than min(k, visible), the first {_first(wrong)}"


def _wrong_sets(
    call: Call, scores_of: tuple[torch.Tensor, ...], visible: torch.Tensor, k: int
) -> Iterator[tuple[str, torch.Tensor]]:

    slots = visible.shape[-1]
    exact = PLAIN["index_scores"](*scores_of)
    position = torch.arange(slots, device=exact.device).expand_as(exact).to(exact)
    everywhere = torch.ones_like(visible)
    yield "the lowest scores are selected", select_topk(-exact, visible, k)
    yield "the most recent keys are selected, whatever their scores", select_topk(position, visible, k)
    yield "the first keys are selected, whatever their scores", select_topk(-position, visible, k)
    yield "every row selects by the next row's scores", select_topk(exact.roll(-1, 1), visible, k)
    yield "row 0's scores are used for every row", select_topk(exact[:, :1].expand_as(exact), visible, k)
    unmasked = selected_mask(select_topk(exact, everywhere, k), slots) & visible
    yield (
        "the top-k is taken before the mask: hidden keys take up places",
        select_topk(torch.zeros_like(exact), unmasked, min(k, slots)),
    )
    yield "the top-k is taken without the mask", select_topk(exact, everywhere, k)
    for sentence, bounds in other_bounds(call):
        yield sentence, select_topk(exact, visible_keys(bounds, slots), k)
    for sentence, function in score_faults():
        yield sentence, select_topk(function(*scores_of), visible, k)


def _seeing(call: Call) -> torch.Tensor:
    """Which rows `[B, L]` have keys; all of them where a call has neither bounds nor indices."""
    a = call.arguments
    if "bounds_BL2" in a:
        slots = next(x.shape[1] for n, x in a.items() if n in ("k_BSE", "k_BSHD", "ik_BSE"))
        return visible_keys(a["bounds_BL2"], slots, a.get("indices_BLK")).any(-1)
    if "indices_BLK" in a:
        return (a["indices_BLK"] >= 0).any(-1)
    return torch.ones(a["q_BLJE"].shape[:2], dtype=torch.bool, device=a["q_BLJE"].device)


def _only_rows(a: torch.Tensor, e: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether anything but 0 stands in `rows` (of which 0 is expected), and nothing is grossly wrong elsewhere."""
    if not bool(rows.any()) or not bool((a[rows] != 0).any()):
        return False
    return bool((e[rows] == 0).all()) and float((a - e)[~rows].abs().max()) <= 0.05 * float(e.abs().max())


def _not_finite(call: Call, actual: torch.Tensor, axes: str, seeing: torch.Tensor) -> str:
    bad = ~torch.isfinite(actual)
    count = int(bad.sum())
    if axes == "BLS" and bool((actual[bad] == -torch.inf).all()):
        return f"is −inf in {count} entries: it must be raw, without any mask"
    if axes[:2] == "BL":
        rows = bad.flatten(2).any(-1) if bad.dim() > 2 else bad
        if not bool((rows & seeing).any()):
            return "is not finite in rows without keys; it must be 0 there"
        indices = call.arguments.get("indices_BLK")
        if indices is not None and not bool((rows & ~(indices < 0).any(-1)).any()):
            return f"is not finite in {int(rows.sum())} rows, all of which hold −1 among their indices"
    return f"is not finite in {count} of {bad.numel()} entries{_extent(bad, axes)}"


def _known_factor(call: Call, a: torch.Tensor, e: torch.Tensor, allowed: Errors) -> str:
    """ "is off by a factor", where that is all and the factor has a meaning."""
    s = _gain(a, e)
    if s == 0 or not errors(a / s, e).used(allowed) <= 1:
        return ""
    known: list[tuple[float, str]] = [
        (-1.0, "the sign is reversed"),
        (1 / math.log(2), "looks like base 2"),
        (math.log(2), "looks like a logarithm to base 2 taken for a natural one"),
        (1 / UPSTREAM, "the incoming gradient is ignored"),
        *_factors_of(call),
    ]
    named = next((sentence for value, sentence in known if abs(s / value - 1) < 5e-3), "")
    return f"is off by a factor {s:.4f}: {named}" if named else ""


def _factor(a: torch.Tensor, e: torch.Tensor, allowed: Errors) -> str:
    """ "is 4 % too large", where that is all."""
    s = _gain(a, e)
    if s == 0 or not errors(a / s, e).used(allowed) <= 1:
        return ""
    if 0.75 < s < 1.5:
        return f"is {abs(s - 1) * 100:.2g} % too {'large' if s > 1 else 'small'} everywhere"
    return f"is off by a factor {s:.3g} everywhere"


def _gain(a: torch.Tensor, e: torch.Tensor) -> float:
    return float((a * e).sum() / e.square().sum()) if bool((e != 0).any()) else 0.0


def _rounded(a: torch.Tensor, e: torch.Tensor, allowed: Errors) -> str:
    """ "is rounded to bf16", of a tensor that is judged more finely than that."""
    for name, dtype in _LOW.items():
        eps = torch.finfo(dtype).eps
        if allowed.max < eps / 8 and torch.equal(a.to(dtype).double(), a) and errors(a, e).max <= eps:
            return f"is rounded to {name}"
    return ""


def _factors_of(call: Call) -> Iterator[tuple[float, str]]:
    a = call.arguments
    if "scale" in a:
        yield 1 / a["scale"], "the factor scale is missing"
        yield a["scale"], "the factor scale is there once too often"
    heads = next((x.shape[2] for n, x in a.items() if n in ("q_BLHD", "q_BLJE")), 1)
    if heads > 1:
        yield float(heads), "the number of heads is not divided by"
        yield 1 / heads, "it is the heads' mean, not their sum"
    if "ik_BSE" in a:
        rows = int(_seeing(call).sum())
        yield 1 / rows, "it is the mean over rows, not the sum"
        yield 1 / _seeing(call).numel(), "it is the mean over rows, not the sum"


def _where(call: Call, a: torch.Tensor, e: torch.Tensor, axes: str, allowed: Errors, seeing: torch.Tensor) -> str:
    """Where the wrong entries lie, if they lie somewhere in particular, and what stands there."""
    size = float(e.abs().max())
    off = (a - e).abs()
    # The rows may be at fault although no entry is: half of the largest error then marks what is wrong.
    bad = off > min(allowed.max * size, 0.5 * float(off.max()))
    extent = _extent(bad, axes)
    share = f"is off by {float(off.max()) / size:.2g} of its largest entry" if size else "is not 0"
    if not bool((a[bad] != 0).any()):
        share = "is dead (0)"
    elif axes[:1] == "B" and "S" in axes and "indices_BLK" in call.arguments and _several(call, bad):
        share = "misses repeated slots: those that several rows name are wrong, those that one row names are right,"
    elif _suffix(bad, axes, seeing):
        share = "is stale or never written in the last rows of a chunk: it"
    return f"{share}{extent}"


def _several(call: Call, bad: torch.Tensor) -> bool:
    """Whether exactly the slots are wrong that more than one row names (and some are named once)."""
    slots = bad.shape[1]
    times = selected_mask(call.arguments["indices_BLK"], slots).sum(1)
    wrong = bad.flatten(2).any(-1)
    return (
        bool((times == 1).any())
        and not bool((wrong & (times < 2)).any())
        and bool(wrong[times > 1].float().mean() > 0.9)
    )


def _suffix(bad: torch.Tensor, axes: str, seeing: torch.Tensor) -> bool:
    """Whether the wrong entries are in the last rows, and in nearly all of those that see keys."""
    if axes[:2] != "BL":
        return False
    rows = bad.flatten(2).any(-1) if bad.dim() > 2 else bad
    first = int(rows.any(0).nonzero()[0])
    last = rows[:, first:][seeing[:, first:]]
    return first > 0 and bool(last.float().mean() > 0.9)


def _extent(bad: torch.Tensor, axes: str) -> str:
    """ " in channel 17", " in rows 64 to 95 of batch entry 1": the axes on which not everything is wrong."""
    words = []
    for axis, letter in reversed(list(enumerate(axes))):
        others = [i for i in range(bad.dim()) if i != axis]
        hit = (bad.any(others) if others else bad) if bad.dim() > 1 else bad
        places = hit.nonzero().flatten().tolist()
        if not places or len(places) == len(hit):
            continue
        word = _WORDS[letter]
        if len(places) == 1:
            words.append(f"{word} {places[0]}")
        elif places == list(range(places[0], places[-1] + 1)):
            words.append(f"{_PLURAL.get(word, word + 's')} {places[0]} to {places[-1]}")
        elif len(places) <= 4:
            words.append(f"{_PLURAL.get(word, word + 's')} {', '.join(map(str, places))}")
        else:
            words.append(f"{len(places)} of {len(hit)} {_PLURAL.get(word, word + 's')}")
    return f" in {' of '.join(words)}" if words else ""


def _first(bad: torch.Tensor) -> str:
    place = bad.nonzero()[0].tolist()
    return f"batch entry {place[0]}, row {place[1]}"
