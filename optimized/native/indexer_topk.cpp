// Index scores, their exact top-k and their logsumexp.
//
// A block of rows walks over panels of transposed keys, so that a tile of q . k over 4 heads stays in registers,
// goes through relu and is added, times the head's weight, to a row of scores. Then each row is searched on its
// own while it is still in the cache.

#include <atomic>

#include "simd.h"
#include "threads.h"

namespace native {
namespace {

constexpr int PANEL = MAX_COLUMNS * WIDTH;
constexpr int BLOCK_ROWS = 8;
constexpr int HEADS = tile_rows(MAX_COLUMNS);

// Transposes keys [S, E] into panels [S / PANEL, E, PANEL], with zeros behind the last key.
void pack_keys(const float* k, int64_t S, int64_t E, float* packed) {
    for (int64_t first = 0; first < S; first += PANEL, packed += E * PANEL) {
        int64_t count = S - first < PANEL ? S - first : PANEL;
        for (int64_t e = 0; e < E; ++e)
            for (int64_t s = 0; s < PANEL; ++s) packed[e * PANEL + s] = s < count ? k[(first + s) * E + e] : 0.0f;
    }
}

// scores[s] = sum over heads j of w[j] * relu(q[j] . k[s]) for one panel of keys.
void score_panel(const float* q, const float* w, int J, int64_t E, const float* panel, float* scores) {
    Floats total[MAX_COLUMNS] = {};
    for (int j = 0; j < J; j += HEADS) {
        const float* heads[HEADS];
        for (int m = 0; m < HEADS; ++m) heads[m] = q + (j + m < J ? j + m : J - 1) * E;
        Floats dots[HEADS][MAX_COLUMNS] = {};
        multiply_add(heads, 1, [&](int64_t e) { return panel + e * PANEL; }, E, dots);
#pragma GCC unroll 8
        for (int m = 0; m < HEADS; ++m) {
            if (j + m >= J) break;
            Floats weight = broadcast(w[j + m]);
            for (int n = 0; n < MAX_COLUMNS; ++n) total[n] += weight * relu(dots[m][n]);
        }
    }
    for (int n = 0; n < MAX_COLUMNS; ++n) store(scores + n * WIDTH, total[n]);
}

// Integers in the order of the floats: -0.0 and 0.0 alike, NaN of any sign the largest.
INLINE Ints order_of(Floats x) {
    Floats positive_zero = x + 0.0f;
    Ints raw = (Ints)positive_zero;
    Ints order = raw ^ ((raw >> 31) & 0x7FFFFFFF);
    return x == x ? order : broadcast(std::numeric_limits<int32_t>::max());
}

INLINE float float_of(int32_t order) {
    int32_t raw = order ^ ((order >> 31) & 0x7FFFFFFF);
    float x;
    std::memcpy(&x, &raw, sizeof x);
    return x;
}

// The best keys seen so far, in the order of their slots, and room for as many again before it is tidied up.
class Candidates {
public:
    explicit Candidates(int k)
        : k(k), capacity(2 * k + 1024), order(capacity + 2 * WIDTH), slot(capacity + 2 * WIDTH) {}

    // Writes the slots of the k highest of n > k scores, ascending.
    void select(const float* scores, int start, int n, int32_t* indices) {
        count = 0;
        // No score is below it by comparison, so all are taken until there is a first bar.
        float bar = NOT_A_NUMBER;
        for (int s = 0; s < n;) {
            int block = n - s < 4 * WIDTH ? n - s : 4 * WIDTH;
            if (count + block > capacity) {
                int32_t lowest = keep_best();
                // Later keys lose every tie, so only higher scores are of interest; above NaN there is none.
                if (lowest == HIGHEST) break;
                bar = float_of(lowest);
            }
            if (block == 4 * WIDTH && !passes_any(scores + s, bar)) {
                s += block;
                continue;
            }
            for (int end = s + block; s < end; s += WIDTH) take(scores + s, start + s, end - s, bar);
        }
        keep_best();
        std::memcpy(indices, slot, k * sizeof(int32_t));
    }

private:
    static INLINE bool passes_any(const float* scores, float bar) {
        Floats level = broadcast(bar);
        Ints none = (load(scores) <= level) & (load(scores + WIDTH) <= level) & (load(scores + 2 * WIDTH) <= level) &
                    (load(scores + 3 * WIDTH) <= level);
        return any(~none);
    }

    // Appends those of up to WIDTH scores that are above the bar, or NaN. Reads WIDTH scores in any case.
    INLINE void take(const float* scores, int first_slot, int valid, float bar) {
        Ints lane;
        for (int i = 0; i < WIDTH; ++i) lane[i] = i;
        Floats x = load(scores);
        put(bits_of(~(x <= broadcast(bar)) & (lane < valid)), order_of(x), lane + first_slot);
    }

    // Appends the lanes whose bits are set. Writes whole vectors.
    INLINE void put(uint32_t which, Ints orders, Ints slots) {
#if defined(__AVX512F__)
        __mmask16 mask = static_cast<__mmask16>(which);
        _mm512_storeu_si512(order + count, _mm512_maskz_compress_epi32(mask, (__m512i)orders));
        _mm512_storeu_si512(slot + count, _mm512_maskz_compress_epi32(mask, (__m512i)slots));
        count += __builtin_popcount(which);
#else
        for (int i = 0; i < WIDTH; ++i) {
            order[count] = orders[i];
            slot[count] = slots[i];
            count += which >> i & 1;
        }
#endif
    }

    int count_above(int32_t level) const {
        Ints above = {};
#pragma GCC unroll 4
        for (int i = 0; i < count; i += WIDTH) above -= load(order + i) > level;
        int total = 0;
        for (int i = 0; i < WIDTH; ++i) total += above[i];
        return total;
    }

    // Leaves the k best of at least k candidates, ties to the first, and returns the lowest order among them.
    int32_t keep_best() {
        int64_t low = int64_t{lowest()} - 1;
        if (count == k) return static_cast<int32_t>(low + 1);
        for (int i = count; i < round_up(count, WIDTH); ++i) order[i] = LOWEST;
        Ints most = broadcast(LOWEST);
        for (int i = 0; i < count; i += WIDTH) most = maximum(most, load(order + i));
        // More than k are above `low`, fewer than k above `high`: until one level parts exactly k, or they meet
        // and `high` is the k-th largest value, of which only the first few are taken. Every second level is
        // guessed as if scores were spread evenly, which ends most searches early; the others halve the range.
        int64_t high = max_of_lanes(most);
        int above_low = count, above_high = 0;
        for (bool guess = true; high - low > 1 && above_high != k; guess = !guess) {
            int64_t middle = low + (high - low) / 2;
            if (guess) {
                float lower = float_of(static_cast<int32_t>(low + 1)), upper = float_of(static_cast<int32_t>(high));
                float share = (k - above_high) / static_cast<float>(above_low - above_high);
                int32_t level = order_of(broadcast(upper - (upper - lower) * share))[0];
                if (level > low && level < high) middle = level;
            }
            int above = count_above(static_cast<int32_t>(middle));
            if (above > k) {
                low = middle;
                above_low = above;
            } else {
                high = middle;
                above_high = above;
            }
        }
        return compact(static_cast<int32_t>(high), k - above_high);
    }

    // Keeps candidates above `level` and the first `ties` equal to it; returns the lowest order that is left.
    int32_t compact(int32_t level, int ties) {
        int all = count;
        count = 0;
        for (int i = 0; i < all; i += WIDTH) {
            Ints orders = load(order + i);
            uint32_t equal = ties > 0 ? bits_of(orders == level) : 0;
            for (; __builtin_popcount(equal) > ties; equal &= ~(1u << (31 - __builtin_clz(equal)))) {
            }
            ties -= __builtin_popcount(equal);
            put(bits_of(orders > level) | equal, orders, load(slot + i));
        }
        return lowest();
    }

    int32_t lowest() {
        for (int i = count; i < round_up(count, WIDTH); ++i) order[i] = HIGHEST;
        Ints least = broadcast(HIGHEST);
        for (int i = 0; i < count; i += WIDTH) least = minimum(least, load(order + i));
        return min_of_lanes(least);
    }

    // Of all orders; no score has the lowest.
    static constexpr int32_t LOWEST = std::numeric_limits<int32_t>::min();
    static constexpr int32_t HIGHEST = std::numeric_limits<int32_t>::max();

    int k, capacity, count = 0;
    Scratch<int32_t> order, slot;
};

}  // namespace

// q [B, L, J, E], k [B, S, E], w [B, L, J], bounds [B, L, 2] -> indices [B, L, min(K, S)], lse [B, L].
EXPORT void indexer_topk(const float* q, const float* k, const float* w, const int32_t* bounds, int64_t B,
                         int64_t L, int64_t S, int64_t J, int64_t E, int64_t K, int32_t* indices, float* lse,
                         int64_t threads) {
    if (K > S) K = S;
    int64_t row_length = round_up(S, PANEL);
    Scratch<float> packed(B * row_length * E);
    for (int64_t b = 0; b < B; ++b) pack_keys(k + b * S * E, S, E, packed + b * row_length * E);
    int64_t blocks_each = (L + BLOCK_ROWS - 1) / BLOCK_ROWS, blocks = B * blocks_each;
    std::atomic<int64_t> next{0};
    on_threads(static_cast<int>(threads < blocks ? threads : blocks), [&](int) {
        // A vector more than there are scores, because the search reads whole vectors from any start.
        Scratch<float> scores(BLOCK_ROWS * row_length + WIDTH);
        Candidates candidates(static_cast<int>(K));
        for (int64_t block; (block = next++) < blocks;) {
            int64_t b = block / blocks_each, first = b * L + block % blocks_each * BLOCK_ROWS;
            int64_t last = first + BLOCK_ROWS < (b + 1) * L ? first + BLOCK_ROWS : (b + 1) * L;
            int64_t low = S, high = 0;
            for (int64_t row = first; row < last; ++row) {
                int64_t start = bounds[2 * row], end = bounds[2 * row + 1];
                if (start == end) continue;
                low = start < low ? start : low;
                high = end > high ? end : high;
            }
            for (int64_t s = low / PANEL * PANEL; s < high; s += PANEL) {
                const float* panel = packed + (b * row_length + s) * E;
                for (int64_t row = first; row < last; ++row)
                    score_panel(q + row * J * E, w + row * J, static_cast<int>(J), E, panel,
                                scores + (row - first) * row_length + s);
            }
            for (int64_t row = first; row < last; ++row) {
                int32_t start = bounds[2 * row];
                int32_t n = bounds[2 * row + 1] - start;
                int32_t* chosen = indices + row * K;
                const float* mine = scores + (row - first) * row_length + start;
                lse[row] = n == 0 ? -INF : logsumexp(mine, n);
                if (n > K) {
                    candidates.select(mine, start, n, chosen);
                } else {
                    for (int64_t i = 0; i < K; ++i) chosen[i] = i < n ? start + static_cast<int32_t>(i) : -1;
                }
            }
        }
    });
}

}  // namespace native
