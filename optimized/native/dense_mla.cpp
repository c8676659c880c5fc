// Attention over all visible keys, forward and backward, a block of rows of one head after another.
//
// The forward pass keeps a running maximum over tiles of keys, as flash attention does. The backward pass knows
// lse; it walks over the keys twice per block, first for P, dP and Delta, then for the three gradients, because
// dS = P (dP - Delta) needs Delta complete. Between the two P is divided by its sum, which the rounding of lse has
// moved off 1: see sparse_mla.cpp.
//
// A product over keys or rows hides some of them by a weight of 0, so what it sums must be finite: v and, in the
// backward pass, `clean_k` come with 0 for what is not, and so do the rows that are packed here. The caller puts NaN
// where such an entry is visible. Logits and dP belong to one key and row each, and are overwritten where hidden.

#include <atomic>
#include <cmath>

#include "rows.h"
#include "threads.h"

namespace native {
namespace {

constexpr int TILE_KEYS = 64;

struct Shape {
    int64_t L, S, K, H, D, V;
    int64_t padded_d() const { return round_up(D, ALIGNMENT); }
    int64_t padded_v() const { return round_up(V, ALIGNMENT); }
};

// One block of `rows` rows, from row `first` of the batch entry, of head `head`.
struct Block {
    const int32_t *bounds, *indices;
    int rows;
};

class Forward {
public:
    Forward(const Shape& shape, float scale)
        : shape(shape), scale(scale), visible(shape.S), packed(shape.D * LANES), weights(TILE_KEYS * LANES),
          sums(shape.V * LANES) {}

    // q, out and lse of the block's first row and head; k [S, D] and v [S, V] of the head.
    void block(const Block& block, const float* q, const float* k, const float* v, float* out, float* lse) {
        visible.set(block.bounds, block.indices, shape.K, block.rows);
        pack_columns(q, shape.H * shape.D, block.rows, shape.D, scale, packed);
        std::memset(sums, 0, shape.V * LANES * sizeof(float));
        for (int n = 0; n < N; ++n) {
            top[n] = broadcast(-INF);
            total[n] = Floats{};
        }
        for (int64_t first = visible.low; first < visible.high; first += TILE_KEYS) {
            int64_t last = first + TILE_KEYS < visible.high ? first + TILE_KEYS : visible.high;
            if (!visible.none(first, last)) tile(k, v, first, last);
        }
        write(block.rows, out, lse);
    }

private:
    void tile(const float* k, const float* v, int64_t first, int64_t last) {
        bool whole = visible.all(first, last);
        Floats highest[N];
        for (int n = 0; n < N; ++n) highest[n] = top[n];
        for (int64_t s = first; s < last; s += M) {
            const float* keys[M];
            key_rows(k, shape.D, s, last, keys);
            Floats logits[M][N];
            row_dots(keys, packed, shape.D, logits);
            for (int m = 0; m < M && s + m < last; ++m)
                for (int n = 0; n < N; ++n) {
                    Floats logit = logits[m][n];
                    if (!whole) logit = where(visible[s + m] >> (n * WIDTH), logit, broadcast(-INF));
                    store(weights + (s - first + m) * LANES + n * WIDTH, logit);
                    highest[n] = maximum(highest[n], logit);
                }
        }
        for (int n = 0; n < N; ++n) {
            // Where all is -inf so far, exp(-inf - 0) is the 0 that is wanted; -inf - -inf would be NaN.
            Floats shift = highest[n] == -INF ? Floats{} : highest[n];
            Floats sum = {};
            for (int64_t i = n * WIDTH; i < (last - first) * LANES; i += LANES) {
                Floats weight = exp(load(weights + i) - shift);
                store(weights + i, weight);
                sum += weight;
            }
            if (any(top[n] != highest[n])) {
                Floats factor = exp(top[n] - shift);
                total[n] *= factor;
                for (int64_t i = n * WIDTH; i < shape.V * LANES; i += LANES)
                    store(sums + i, load(sums + i) * factor);
            }
            total[n] += sum;
            top[n] = highest[n];
        }
        sum_over_keys(v + first * shape.V, shape.V, weights, last - first, shape.V, sums);
    }

    void write(int rows, float* out, float* lse) const {
        for (int r = 0; r < rows; ++r) {
            float highest = top[r / WIDTH][r % WIDTH], divisor = total[r / WIDTH][r % WIDTH];
            bool sees = false;
            for (int64_t s = visible.low; s < visible.high && !sees; ++s) sees = visible[s] >> r & 1;
            // Of visible keys whose logits are all -inf: the softmax is not defined.
            lse[r * shape.H] = !sees ? -INF : highest == -INF ? NOT_A_NUMBER : highest + std::log(divisor);
            for (int64_t i = 0; i < shape.V; ++i)
                out[r * shape.H * shape.V + i] = sees ? sums[i * LANES + r] / divisor : 0.0f;
        }
    }

    Shape shape;
    float scale;
    Visibility visible;
    Scratch<float> packed, weights, sums;
    Floats top[N], total[N];
};

class Backward {
public:
    Backward(const Shape& shape, float scale)
        : shape(shape), scale(scale), visible(shape.S), q_columns(shape.D * LANES),
          dout_columns(shape.V * LANES), q_rows(LANES * shape.padded_d()),
          dout_rows(LANES * shape.padded_v()), dq_columns(shape.D * LANES), weights(shape.S * LANES),
          dlogits(shape.S * LANES) {}

    // q, lse, dout and dq of the block's first row and head; k and clean_k [S, D], v [S, V] and the gradients that
    // are added to, dk [S, padded D] and dv [S, padded V], of the head.
    void block(const Block& block, const float* q, const float* k, const float* clean_k, const float* v,
               const float* lse, const float* dout, float* dq, float* dk, float* dv) {
        visible.set(block.bounds, block.indices, shape.K, block.rows);
        pack_columns(q, shape.H * shape.D, block.rows, shape.D, scale, q_columns);
        pack_columns(dout, shape.H * shape.V, block.rows, shape.V, 1.0f, dout_columns);
        pack_rows(q, shape.H * shape.D, block.rows, shape.D, scale, q_rows, shape.padded_d());
        pack_rows(dout, shape.H * shape.V, block.rows, shape.V, 1.0f, dout_rows, shape.padded_v());
        std::memset(dq_columns, 0, shape.D * LANES * sizeof(float));
        for (int i = 0; i < LANES; ++i) {
            // Missing rows get weights of exp(0 - inf) = 0.
            shift[i / WIDTH][i % WIDTH] = i < block.rows ? lse[i * shape.H] : INF;
        }
        for (int n = 0; n < N; ++n) delta[n] = total[n] = Floats{};
        for_tiles([&](int64_t first, int64_t last) { recompute(k, v, first, last); });
        for (int n = 0; n < N; ++n) {
            share[n] = share_of(total[n]);
            delta[n] *= share[n];
        }
        for_tiles([&](int64_t first, int64_t last) {
            float *weight = weights + (first - visible.low) * LANES, *dlogit = dlogits + (first - visible.low) * LANES;
            finish_dlogits(first, last, weight, dlogit);
            sum_over_keys(clean_k + first * shape.D, shape.D, dlogit, last - first, shape.D, dq_columns);
            sum_over_rows(dlogit, last - first, q_rows, block.rows, shape.padded_d(), dk + first * shape.padded_d());
            sum_over_rows(weight, last - first, dout_rows, block.rows, shape.padded_v(),
                             dv + first * shape.padded_v());
        });
        for (int r = 0; r < block.rows; ++r)
            for (int64_t i = 0; i < shape.D; ++i)
                dq[r * shape.H * shape.D + i] = dq_columns[i * LANES + r] * scale;
    }

private:
    template <class Body>
    void for_tiles(Body body) {
        for (int64_t first = visible.low; first < visible.high; first += TILE_KEYS) {
            int64_t last = first + TILE_KEYS < visible.high ? first + TILE_KEYS : visible.high;
            if (!visible.none(first, last)) body(first, last);
        }
    }

    // P and dP of a tile, kept until Delta is known.
    void recompute(const float* k, const float* v, int64_t first, int64_t last) {
        bool whole = visible.all(first, last);
        for (int64_t s = first; s < last; s += M) {
            const float *keys[M], *values[M];
            key_rows(k, shape.D, s, last, keys);
            key_rows(v, shape.V, s, last, values);
            float *weight = weights + (s - visible.low) * LANES, *dlogit = dlogits + (s - visible.low) * LANES;
            int valid = static_cast<int>(last - s < M ? last - s : M);
            Floats sums[M][N];
            row_dots(keys, q_columns, shape.D, sums);
            for (int m = 0; m < valid; ++m)
                for (int n = 0; n < N; ++n) {
                    Floats p = exp(sums[m][n] - shift[n]);
                    if (!whole) p = where(visible[s + m] >> (n * WIDTH), p, Floats{});
                    total[n] += p;
                    store(weight + m * LANES + n * WIDTH, p);
                }
            row_dots(values, dout_columns, shape.V, sums);
            for (int m = 0; m < valid; ++m)
                for (int n = 0; n < N; ++n) {
                    Floats dp = sums[m][n];
                    if (!whole) dp = where(visible[s + m] >> (n * WIDTH), dp, Floats{});
                    store(dlogit + m * LANES + n * WIDTH, dp);
                    delta[n] += load(weight + m * LANES + n * WIDTH) * dp;
                }
        }
    }

    // P of sum 1, and dS = P (dP - Delta) in place of dP.
    void finish_dlogits(int64_t first, int64_t last, float* weight, float* dlogit) {
        bool whole = visible.all(first, last);
        for (int64_t s = first; s < last; ++s)
            for (int n = 0; n < N; ++n) {
                int64_t i = (s - first) * LANES + n * WIDTH;
                Floats p = load(weight + i) * share[n], ds = p * (load(dlogit + i) - delta[n]);
                // Delta of a poisoned row is NaN, which 0 does not hide.
                if (!whole) ds = where(visible[s] >> (n * WIDTH), ds, Floats{});
                store(weight + i, p);
                store(dlogit + i, ds);
            }
    }

    Shape shape;
    float scale;
    Visibility visible;
    Scratch<float> q_columns, dout_columns, q_rows, dout_rows, dq_columns, weights, dlogits;
    Floats shift[N], total[N], share[N], delta[N];
};

void forward(const Shape& shape, int64_t B, const float* q, const float* k, const float* v, const int32_t* bounds,
             const int32_t* indices, float scale, float* out, float* lse, int threads) {
    const int64_t L = shape.L, S = shape.S, K = shape.K, H = shape.H, D = shape.D, V = shape.V;
    int64_t blocks = (L + LANES - 1) / LANES, items = B * H * blocks;
    std::atomic<int64_t> next{0};
    on_threads(static_cast<int>(threads < items ? threads : items), [&](int) {
        Forward state(shape, scale);
        for (int64_t item; (item = next++) < items;) {
            int64_t b = item / (H * blocks), h = item / blocks % H, first = b * L + item % blocks * LANES;
            int64_t rows = (b + 1) * L - first < LANES ? (b + 1) * L - first : LANES;
            Block block{bounds + 2 * first, indices ? indices + first * K : nullptr, static_cast<int>(rows)};
            state.block(block, q + (first * H + h) * D, k + (b * H + h) * S * D, v + (b * H + h) * S * V,
                        out + (first * H + h) * V, lse + first * H + h);
        }
    });
}

void backward(const Shape& shape, int64_t B, const float* q, const float* k, const float* clean_k, const float* v,
              const int32_t* bounds, const int32_t* indices, const float* lse, const float* dout, float scale,
              float* dq, float* dk, float* dv, int threads) {
    const int64_t L = shape.L, S = shape.S, K = shape.K, H = shape.H, D = shape.D, V = shape.V;
    int64_t items = B * H;
    std::atomic<int64_t> next{0};
    on_threads(static_cast<int>(threads < items ? threads : items), [&](int) {
        Backward state(shape, scale);
        for (int64_t item; (item = next++) < items;) {
            int64_t b = item / H, h = item % H;
            for (int64_t first = b * L; first < (b + 1) * L; first += LANES) {
                int64_t rows = (b + 1) * L - first < LANES ? (b + 1) * L - first : LANES;
                Block block{bounds + 2 * first, indices ? indices + first * K : nullptr, static_cast<int>(rows)};
                state.block(block, q + (first * H + h) * D, k + item * S * D, clean_k + item * S * D, v + item * S * V,
                            lse + first * H + h, dout + (first * H + h) * V, dq + (first * H + h) * D,
                            dk + item * S * shape.padded_d(),
                            dv + item * S * shape.padded_v());
            }
        }
    });
}

}  // namespace

// q [B, L, H, D], k [B, H, S, D], v [B, H, S, V], bounds [B, L, 2], indices [B, L, K] or null
// -> out [B, L, H, V], lse [B, L, H].
EXPORT void dense_mla_forward(const float* q, const float* k, const float* v, const int32_t* bounds,
                              const int32_t* indices, float scale, int64_t B, int64_t L, int64_t S, int64_t K,
                              int64_t H, int64_t D, int64_t V, float* out, float* lse, int64_t threads) {
    Shape shape{L, S, K, H, D, V};
    forward(shape, B, q, k, v, bounds, indices, scale, out, lse, static_cast<int>(threads));
}

// clean_k like k, dout [B, L, H, V] -> dq like q, and dk [B, H, S, D padded to ALIGNMENT] and dv [B, H, S, V padded],
// which are added to.
EXPORT void dense_mla_backward(const float* q, const float* k, const float* clean_k, const float* v,
                               const int32_t* bounds, const int32_t* indices, const float* lse, const float* dout,
                               float scale, int64_t B, int64_t L, int64_t S, int64_t K, int64_t H, int64_t D, int64_t V,
                               float* dq, float* dk, float* dv, int64_t threads) {
    Shape shape{L, S, K, H, D, V};
    backward(shape, B, q, k, clean_k, v, bounds, indices, lse, dout, scale, dq, dk, dv, static_cast<int>(threads));
}

}  // namespace native
