"""The lightning indexer's selection: index scores (report eq. 1) and their exact top-k, as in eq. 2.

Shape legend: B batch, L query rows, S key slots, J indexer heads, E indexer head dim, K selected keys,
C queries in a chunk, n key slots that a chunk visits.

    I[t, s] = sum_j w[t, j] * relu(q[t, j] . k[s])

The selection is exact and unique: the k highest scores among a row's visible keys, ties to the lowest index,
-0.0 equal to 0.0, NaN above +inf (so that it is selected and seen). To get there the scores are mapped to
integers of the same order, where all of this is plain comparison, and the k-th largest integer becomes a
threshold.
"""

import torch
from torch import Tensor

from optimized.ops.backend import (
    carve,
    check_bounds,
    check_tensor,
    chunk_rows,
    compute_dtype,
    implementation,
    opaque,
    register,
    row_chunks,
    visible_keys,
    without_autocast,
)

# From this many keys on, the threshold is searched in two levels, over groups of this size.
GROUPED_SEARCH_KEYS = 2048
GROUP = 8


@opaque
def indexer_topk(
    q_BLJE: Tensor, k_BSE: Tensor, w_BLJ: Tensor, bounds_BL2: Tensor, k: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k visible keys with the highest index scores of every query row (report eq. 1, the set of eq. 2).

    Args:
        q_BLJE, k_BSE, w_BLJ: indexer queries, keys and head weights with all scales folded in; fp16, bf16,
            fp32 or fp64, mixed as you like. Scores are computed in fp32, or in fp64 if any of the three is
            fp64.
        bounds_BL2: int32 or int64, the half-open range [start, end) of key slots that each row may see;
            start == end is a row without keys.
        k: how many keys to select, 1 or more.
        backend: name of the implementation, None for the device's default.

    Returns:
        indices_BLK: int32, K = min(k, S) absolute key slots, ascending, -1 at the tail of rows with fewer
        keys.
        lse_BL: natural logsumexp of I over the row's visible keys (all of them, not the selected ones), fp32
            (fp64 if computed in fp64), -inf for rows without keys.

    Neither output is differentiable. Raises ValueError for shapes, dtypes, devices or bounds that do not fit,
    k < 1, or a backend that does not exist.
    """
    sizes: dict[str, int] = {}
    device = q_BLJE.device
    check_tensor("q_BLJE", q_BLJE, "BLJE", sizes, device)
    check_tensor("k_BSE", k_BSE, "BSE", sizes, device)
    check_tensor("w_BLJ", w_BLJ, "BLJ", sizes, device)
    check_bounds(bounds_BL2, sizes, device)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}, but it must be an integer of at least 1.")
    run = implementation("indexer_topk", backend, device)
    with torch.no_grad(), without_autocast(device):
        indices_BLK, lse_BL = run(q_BLJE, k_BSE, w_BLJ, bounds_BL2, k)
    return indices_BLK, lse_BL


@register("indexer_topk", "torch")
def _indexer_topk_torch(
    q_BLJE: Tensor, k_BSE: Tensor, w_BLJ: Tensor, bounds_BL2: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    B, L, J, _ = q_BLJE.shape
    S = k_BSE.shape[1]
    dtype = compute_dtype(q_BLJE.dtype, k_BSE.dtype, w_BLJ.dtype)
    rows = chunk_rows(L, J * S, dtype)
    indices_BLK = torch.full((B, L, min(k, S)), -1, dtype=torch.int32, device=q_BLJE.device)
    lse_BL = torch.full((B, L), -torch.inf, dtype=dtype, device=q_BLJE.device)
    keys_BSE = k_BSE.to(dtype)
    buffer = keys_BSE.new_empty(rows * J * S)
    for chunk in row_chunks(bounds_BL2, rows):
        b, first, last, low, high = chunk
        visible_Cn = visible_keys(bounds_BL2, None, chunk)
        score_Cn, _ = index_scores(
            q_BLJE[b, first:last].to(dtype), keys_BSE[b, low:high], w_BLJ[b, first:last].to(dtype), buffer
        )
        selected_Cn = visible_Cn if high - low <= k else select_topk(score_Cn, visible_Cn, k)
        _write_positions(selected_Cn, low, indices_BLK[b, first:last])
        lse_BL[b, first:last] = score_Cn.masked_fill_(~visible_Cn, -torch.inf).logsumexp(-1)
    return indices_BLK, lse_BL


def index_scores(q_CJE: Tensor, k: Tensor, w_CJ: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """I_Cn of eq. 1, and relu(q . k) as CJn, which lives in the flat `buffer`. All in one dtype, unmasked.

    `k` is [n, E], keys that all rows of the chunk share, or [C, n, E], keys gathered for each row.
    """
    C, J, E = q_CJE.shape
    n = k.shape[-2]
    relu_CJn = carve(buffer, C, J, n)
    if k.ndim == 2:
        torch.mm(q_CJE.reshape(C * J, E), k.T, out=relu_CJn.view(C * J, n))
    else:
        torch.bmm(q_CJE, k.mT, out=relu_CJn)
    torch.relu_(relu_CJn)
    return torch.bmm(w_CJ.unsqueeze(1), relu_CJn).squeeze(1), relu_CJn


def select_topk(score_Cn: Tensor, visible_Cn: Tensor, k: int) -> Tensor:
    """bool [C, n]: the k highest visible scores of each row, or all visible ones if fewer; k <= n."""
    order_Cn = _order(score_Cn)
    hidden = torch.iinfo(order_Cn.dtype).min
    order_Cn.masked_fill_(~visible_Cn, hidden)
    # No visible key maps to the lowest integer, so a threshold above it keeps hidden keys out of short rows.
    threshold_C1 = _kth_largest(order_Cn, k).clamp_(min=hidden + 1)
    selected_Cn = order_Cn >= threshold_C1
    tied_R = (selected_Cn.sum(-1) > k).nonzero().squeeze(-1)
    if len(tied_R):
        order_Rn, threshold_R1 = order_Cn[tied_R], threshold_C1[tied_R]
        above_Rn, equal_Rn = order_Rn > threshold_R1, order_Rn == threshold_R1
        room_R1 = k - above_Rn.sum(-1, keepdim=True)
        selected_Cn[tied_R] = above_Rn | (equal_Rn & (equal_Rn.cumsum(-1) <= room_R1))
    return selected_Cn


def _order(score_Cn: Tensor) -> Tensor:
    """Integers of the scores' width in the scores' order: -0.0 and 0.0 alike, NaN (of any sign) the largest.

    IEEE floats of one sign compare as their bits do; the bits of negative ones, sign excepted, are flipped.
    """
    integer, bits = (torch.int64, 64) if score_Cn.dtype == torch.float64 else (torch.int32, 32)
    largest = torch.iinfo(integer).max
    # Adding zero makes -0.0 positive and leaves every other value as it is.
    raw_Cn = (score_Cn + 0.0).view(integer)
    order_Cn = raw_Cn ^ ((raw_Cn >> (bits - 1)) & largest)
    return order_Cn.masked_fill_(score_Cn.isnan(), largest)


def _kth_largest(order_Cn: Tensor, k: int) -> Tensor:
    """[C, 1]: the k-th largest integer of each row, duplicates counted.

    Long rows are searched in two levels, exactly: fewer than k groups have a maximum above the k-th largest
    value, so the k groups of the highest maxima hold all values above it, and at least one equal to it for
    every place that is left.
    """
    C, n = order_Cn.shape
    groups = n // GROUP
    if n < GROUPED_SEARCH_KEYS or groups < 2 * k:
        return order_Cn.topk(k, sorted=False).values.amin(-1, keepdim=True)
    # A group is a column of this view: its members lie `groups` apart, which is quickest to reduce.
    grouped_CGg = order_Cn[:, : groups * GROUP].unflatten(1, (GROUP, groups))
    best_Ck = grouped_CGg.amax(1).topk(k, sorted=False).indices
    inside_Cm = grouped_CGg.gather(2, best_Ck.unsqueeze(1).expand(C, GROUP, k)).flatten(1)
    candidates_Cm = torch.cat([inside_Cm, order_Cn[:, groups * GROUP :]], dim=1)
    return candidates_Cm.topk(k, sorted=False).values.amin(-1, keepdim=True)


def _write_positions(selected_Cn: Tensor, low: int, indices_CK: Tensor) -> None:
    """Writes low + the columns that are set in a row, ascending, to the front of that row of `indices_CK`."""
    row_m, column_m = selected_Cn.nonzero(as_tuple=True)
    count_C = selected_Cn.sum(-1)
    place_m = torch.arange(len(row_m), device=row_m.device) - (count_C.cumsum(0) - count_C)[row_m]
    indices_CK[row_m, place_m] = (column_m + low).to(indices_CK.dtype)
