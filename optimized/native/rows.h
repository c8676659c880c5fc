// A block of query rows against all keys that any of them sees: what `dense_mla` and the dense KL share.
//
// The lanes of a vector are query rows, so a key is a scalar that meets the same element of all rows' queries:
// keys are read where they lie, and whatever is done per row (maximum, exp, sums) is plain arithmetic on vectors.
// Which rows see a key is one 64-bit mask per key, bit r for row r of the block.

#pragma once

#include "simd.h"

namespace native {

// A block has N vectors of rows, and meets M keys at a time.
constexpr int N = MAX_COLUMNS, M = tile_rows(N), LANES = N * WIDTH;

static_assert(LANES <= 64, "A mask has 64 bits.");

// `x` where the row's bit is set, else `hidden`; `bits` are those of the vector's first row and following.
INLINE Floats where(uint64_t bits, Floats x, Floats hidden) {
#if defined(__AVX512F__)
    return _mm512_mask_mov_ps(hidden, static_cast<__mmask16>(bits), x);
#else
    Ints bit;
    for (int i = 0; i < WIDTH; ++i) bit[i] = 1 << i;
    return (broadcast(static_cast<int32_t>(bits & ((1u << WIDTH) - 1))) & bit) != 0 ? x : hidden;
#endif
}

// Which rows of one block see which keys.
class Visibility {
public:
    explicit Visibility(int64_t S) : masks(S + 1) {}

    // `bounds` [rows, 2] and, unless null, `indices` [rows, K] of the block.
    void set(const int32_t* bounds, const int32_t* indices, int64_t K, int rows) {
        low = std::numeric_limits<int64_t>::max();
        high = 0;
        every_row = rows == 64 ? ~uint64_t{0} : (uint64_t{1} << rows) - 1;
        for (int r = 0; r < rows; ++r) {
            int64_t start = bounds[2 * r], end = bounds[2 * r + 1];
            if (start == end) continue;
            low = start < low ? start : low;
            high = end > high ? end : high;
        }
        if (low > high) low = high;
        std::memset(masks + low, 0, (high - low + 1) * sizeof(uint64_t));
        for (int r = 0; r < rows; ++r) {
            int64_t start = bounds[2 * r], end = bounds[2 * r + 1];
            uint64_t bit = uint64_t{1} << r;
            if (indices) {
                for (int64_t i = 0; i < K; ++i) {
                    int64_t slot = indices[r * K + i];
                    if (slot >= start && slot < end) masks[slot] |= bit;
                }
            } else if (start < end) {
                // Marks where the row begins and ends to see; the running xor below fills what lies between.
                masks[start] ^= bit;
                masks[end] ^= bit;
            }
        }
        if (!indices)
            for (int64_t s = low + 1; s < high; ++s) masks[s] ^= masks[s - 1];
    }

    // Whether any row sees any key of a tile, and whether all rows see all of them.
    bool none(int64_t first, int64_t last) const {
        uint64_t seen = 0;
        for (int64_t s = first; s < last; ++s) seen |= masks[s];
        return seen == 0;
    }
    bool all(int64_t first, int64_t last) const {
        uint64_t seen = every_row;
        for (int64_t s = first; s < last; ++s) seen &= masks[s];
        return seen == every_row;
    }
    uint64_t operator[](int64_t s) const { return masks[s]; }

    // The keys that are visited.
    int64_t low = 0, high = 0;

private:
    Scratch<uint64_t> masks;
    uint64_t every_row = 0;
};

// x [rows] of `width` floats, `stride` apart, to columns [width][LANES], times `factor`; 0 for missing rows.
inline void pack_columns(const float* x, int64_t stride, int rows, int64_t width, float factor, float* packed) {
    transpose(x, stride, rows, width, factor, packed, LANES);
}

// The same to rows [LANES][padded], 0 behind `width` and for what is not finite.
inline void pack_rows(const float* x, int64_t stride, int rows, int64_t width, float factor, float* packed,
                      int64_t padded) {
    for (int r = 0; r < LANES; ++r)
        for (int64_t i = 0; i < padded; ++i) {
            float value = r < rows && i < width ? x[r * stride + i] * factor : 0.0f;
            packed[r * padded + i] = std::isfinite(value) ? value : 0.0f;
        }
}

// sums[m] = keys[m] . all rows' queries, for a tile of keys; `packed` are columns.
INLINE void row_dots(const float* const (&keys)[M], const float* packed, int64_t width, Floats (&sums)[M][N]) {
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) sums[m][n] = Floats{};
    multiply_add(keys, 1, [&](int64_t i) { return packed + i * LANES; }, width, sums);
}

// The addresses of keys first, first + 1, ..., the last one repeated where there are fewer.
template <int COUNT>
INLINE void key_rows(const float* keys, int64_t stride, int64_t first, int64_t last, const float* (&rows)[COUNT]) {
    for (int m = 0; m < COUNT; ++m) rows[m] = keys + (first + m < last ? first + m : last - 1) * stride;
}

// out[i][LANES] += sum over keys of keys[s][i] * weights[s][LANES], for i < width.
inline void sum_over_keys(const float* keys, int64_t stride, const float* weights, int64_t count, int64_t width,
                          float* out) {
    for (int64_t i = 0; i < width; i += M) {
        const float* columns[M];
        for (int m = 0; m < M; ++m) columns[m] = keys + (i + m < width ? i + m : width - 1);
        Floats sums[M][N];
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n)
                sums[m][n] = load(out + (i + m < width ? i + m : width - 1) * LANES + n * WIDTH);
        multiply_add(columns, stride, [&](int64_t s) { return weights + s * LANES; }, count, sums);
        for (int m = 0; m < M && i + m < width; ++m)
            for (int n = 0; n < N; ++n) store(out + (i + m) * LANES + n * WIDTH, sums[m][n]);
    }
}

// out[s][0 .. padded) += sum over rows of weights[s][row] * values[row], for `count` keys; `values` are rows.
inline void sum_over_rows(const float* weights, int64_t count, const float* values, int rows, int64_t padded,
                          float* out) {
    for_panels(static_cast<int>(padded / WIDTH), [&](auto columns, int first) {
        constexpr int C = columns, KEYS = tile_rows(C);
        for (int64_t s = 0; s < count; s += KEYS) {
            const float* weight[KEYS];
            key_rows(weights, LANES, s, count, weight);
            Floats sums[KEYS][C];
            float* target = out + s * padded + first * WIDTH;
            for (int m = 0; m < KEYS; ++m)
                for (int c = 0; c < C; ++c)
                    sums[m][c] = load(target + (s + m < count ? m : count - 1 - s) * padded + c * WIDTH);
            multiply_add(weight, 1, [&](int64_t r) { return values + r * padded + first * WIDTH; }, rows, sums);
            for (int m = 0; m < KEYS && s + m < count; ++m)
                for (int c = 0; c < C; ++c) store(target + m * padded + c * WIDTH, sums[m][c]);
        }
    });
}

}  // namespace native
