// One query row against rows of keys that are named by slots: what `sparse_mla` and the selected-set KL share.
//
// The lanes of a vector are heads, so a key is a scalar that meets the same element of all heads' queries: keys
// are read where they lie, nothing is gathered or transposed, and whatever is done per head (maximum, exp, sums)
// is plain arithmetic on vectors. Arrays of that layout are called [key][lanes].

#pragma once

#include "simd.h"

namespace native {

// Room behind the last key of a [key][lanes] array, because tiles and vectors are written whole.
constexpr int SPARE_KEYS = 8;

// Long sums are cut at this many terms, so that the panel that a tile is multiplied with stays in the first cache.
constexpr int CHUNK = 64;

// How heads lie in lanes. With half a vector of heads or less, the other half would idle: then the dot product is
// folded, even elements in even lanes and odd ones in odd lanes, and two keys share a vector afterwards.
struct Lanes {
    int heads, count;
    bool folded;

    explicit Lanes(int64_t H) : heads(static_cast<int>(H)) {
        folded = WIDTH >= 8 && H <= WIDTH / 2;
        count = folded ? WIDTH / 2 : static_cast<int>(round_up(H, WIDTH));
    }
    // Floats until the pattern of heads repeats on a vector's border, and how many keys these are.
    int period() const { return folded ? WIDTH : count; }
    int64_t array_size(int64_t keys) const { return (keys + SPARE_KEYS) * count; }
    // Elements of the queries that are packed; keys must be readable up to there.
    int64_t depth(int64_t width) const { return folded ? round_up(width, 2) : width; }
    int64_t packed_size(int64_t width) const { return depth(width) * (folded ? WIDTH / 2 : count); }

    // Transposes x [H, width], times `factor`, to what `dots` multiplies keys with.
    void pack(const float* x, int64_t width, float factor, float* packed) const {
        if (!folded) {
            transpose(x, width, heads, width, factor, packed, count);
            return;
        }
        std::memset(packed, 0, packed_size(width) * sizeof(float));
        for (int h = 0; h < heads; ++h)
            for (int64_t i = 0; i < width; ++i) packed[i / 2 * WIDTH + 2 * h + i % 2] = x[h * width + i] * factor;
    }

    // Copies H values, `fill` in lanes without a head, in the pattern that arrays of this layout repeat.
    void spread(const float* x, float fill, float* period_values) const {
        for (int i = 0; i < period(); ++i) period_values[i] = i % count < heads ? x[i % count] : fill;
    }
};

// The two-element fold: lanes of a and b summed in pairs, a's sums first.
INLINE Floats sum_pairs(Floats a, Floats b) {
    Floats result;
#if defined(__AVX512F__)
    __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    result = _mm512_permutex2var_ps(a, even, b) + _mm512_permutex2var_ps(a, odd, b);
#else
    for (int i = 0; i < WIDTH / 2; ++i) {
        result[i] = a[2 * i] + a[2 * i + 1];
        result[i + WIDTH / 2] = b[2 * i] + b[2 * i + 1];
    }
#endif
    return result;
}

INLINE void prefetch(const float* row, int64_t width) {
    for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(row + i);
}

// dots[key][lanes] = packed heads . rows[slots[key]], for `keys` rows that are `stride` apart.
inline void dots(const float* rows, int64_t stride, const int32_t* slots, int keys, const float* packed,
                 int64_t width, const Lanes& lanes, float* out) {
    int64_t depth = lanes.depth(width);
    if (lanes.folded) {
        constexpr int M = tile_rows(1);
        for (int i = 0; i < keys; i += M) {
            const float* key[M];
            for (int m = 0; m < M; ++m) key[m] = rows + slots[i + m < keys ? i + m : keys - 1] * stride;
            Floats sums[M] = {};
            for (int64_t d = 0; d < depth; d += 2) {
                Floats queries = load(packed + d * (WIDTH / 2));
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) sums[m] += broadcast_pair(key[m] + d) * queries;
            }
            for (int m = 0; m < M; m += 2) store(out + (i + m) * (WIDTH / 2), sum_pairs(sums[m], sums[m + 1]));
        }
        return;
    }
    for_panels(lanes.count / WIDTH, [&](auto columns, int first) {
        constexpr int N = columns, M = tile_rows(N);
        for (int64_t begin = 0; begin < depth; begin += CHUNK) {
            int64_t length = depth - begin < CHUNK ? depth - begin : CHUNK;
            const float* panel = packed + begin * lanes.count + first * WIDTH;
            for (int i = 0; i < keys; i += M) {
                const float* key[M];
                for (int m = 0; m < M; ++m) key[m] = rows + slots[i + m < keys ? i + m : keys - 1] * stride + begin;
                Floats sums[M][N] = {};
                float* target = out + i * lanes.count + first * WIDTH;
                if (begin > 0)
                    for (int m = 0; m < M; ++m)
                        for (int n = 0; n < N; ++n) sums[m][n] = load(target + m * lanes.count + n * WIDTH);
                multiply_add(key, 1, [&](int64_t d) { return panel + d * lanes.count; }, length, sums);
                for (int m = 0; m < M; ++m)
                    for (int n = 0; n < N; ++n) store(target + m * lanes.count + n * WIDTH, sums[m][n]);
            }
        }
    });
}

// out[head][0 .. width) += sum over keys of weights[key][head] * rows[slots[key]], width a multiple of WIDTH.
KEPT_APART void weighted_sum(const float* weights, const Lanes& lanes, const float* rows, int64_t stride,
                         const int32_t* slots, int keys, int64_t width, float* out, int64_t out_stride) {
    for (; keys > 0; keys -= CHUNK, slots += CHUNK, weights += CHUNK * lanes.count)
        for_panels(static_cast<int>(width / WIDTH), [&](auto columns, int first) {
            constexpr int N = columns, M = tile_rows(N);
            const float* panel = rows + first * WIDTH;
            for (int h = 0; h < lanes.heads; h += M) {
                const float* weight[M];
                for (int m = 0; m < M; ++m) weight[m] = weights + (h + m < lanes.heads ? h + m : lanes.heads - 1);
                Floats sums[M][N];
                float* target = out + h * out_stride + first * WIDTH;
                int valid = lanes.heads - h < M ? lanes.heads - h : M;
                for (int m = 0; m < M; ++m)
                    for (int n = 0; n < N; ++n)
                        sums[m][n] = load(target + (m < valid ? m : valid - 1) * out_stride + n * WIDTH);
                multiply_add(weight, lanes.count, [&](int64_t i) { return panel + slots[i] * stride; },
                             keys < CHUNK ? keys : CHUNK, sums);
                for (int m = 0; m < valid; ++m)
                    for (int n = 0; n < N; ++n) store(target + m * out_stride + n * WIDTH, sums[m][n]);
            }
        });
}

// What a row adds to the gradient of the keys that it sees: sum over heads of weights[key][head] * values[head],
// for one or two pairs of weights and values; the second pair only reaches the first `second_width` columns.
struct KeyGradient {
    const float* weights;
    const float* values;
    const float* second_weights;
    const float* second_values;
    // Multiples of WIDTH; the values' rows are as long.
    int64_t width, second_width;
};

// grad[slots[key]] += that, for the keys whose numbers are listed in `chosen`, one after another.
inline void scatter_add(const KeyGradient& from, const Lanes& lanes, const int32_t* slots, const int32_t* chosen,
                        int count, float* grad, int64_t stride) {
    auto add_columns = [&](int64_t begin, int64_t end, bool both, int head, int heads) {
        for_panels(static_cast<int>((end - begin) / WIDTH), [&](auto columns, int panel) {
            constexpr int N = columns, M = tile_rows(N);
            int64_t first = begin + panel * WIDTH;
            const float* values = from.values + first + head * from.width;
            const float* second_values = from.second_values + first + head * from.second_width;
            for (int i = 0; i < count; i += M) {
                const float *weight[M], *second[M];
                for (int m = 0; m < M; ++m) {
                    int64_t offset = int64_t{chosen[i + m < count ? i + m : count - 1]} * lanes.count + head;
                    weight[m] = from.weights + offset;
                    second[m] = from.second_weights + offset;
                }
                Floats sums[M][N] = {};
                multiply_add(weight, 1, [&](int64_t h) { return values + h * from.width; }, heads, sums);
                if (both)
                    multiply_add(second, 1, [&](int64_t h) { return second_values + h * from.second_width; }, heads,
                                 sums);
                for (int m = 0; m < M && i + m < count; ++m) {
                    float* target = grad + slots[chosen[i + m]] * stride + first;
                    for (int n = 0; n < N; ++n) store(target + n * WIDTH, load(target + n * WIDTH) + sums[m][n]);
                }
            }
        });
    };
    for (int head = 0; head < lanes.heads; head += CHUNK) {
        int heads = lanes.heads - head < CHUNK ? lanes.heads - head : CHUNK;
        add_columns(0, from.second_width, true, head, heads);
        add_columns(from.second_width, from.width, false, head, heads);
    }
}

// The slots of a row that name a key in [low, high), in the row's order; returns how many. `kept` has room for K + 1.
inline int valid_slots(const int32_t* indices, int64_t K, int32_t low, int32_t high, int32_t* kept) {
    int count = 0;
    for (int64_t i = 0; i < K; ++i) {
        kept[count] = indices[i];
        count += indices[i] >= low && indices[i] < high;
    }
    return count;
}

// The gradient of a key is summed in the order of rows, whatever the number of threads: slots are dealt out to
// the threads in runs, and each thread walks through all rows for its own. Lists in `chosen`, which
// has room for one more than `keys`, those of `thread`.
inline int keys_of_thread(const int32_t* slots, int keys, int thread, int threads, int32_t* chosen) {
    constexpr int RUN = 16;
    int count = 0;
    for (int i = 0; i < keys; ++i) {
        chosen[count] = i;
        count += threads == 1 || slots[i] / RUN % threads == thread;
    }
    return count;
}

// How many rows are prepared before their gradients of keys are added: one if a thread does both, else enough
// that meeting at the barrier costs little, and few enough that they stay in the cache.
inline int64_t rows_in_wave(int64_t floats_per_row, int threads) {
    constexpr int64_t WAVE_FLOATS = 1 << 20;
    if (threads == 1) return 1;
    int64_t rows = WAVE_FLOATS / floats_per_row;
    return rows < threads ? threads : rows > 64 ? 64 : rows;
}

}  // namespace native
