// The indexer's loss over all visible keys (or those of a mask), and its closed-form gradients, a block of rows
// after another.
//
// Two walks over the keys of a block: the first finds the logsumexp of the scores, and the target up to the factor that
// makes it sum to 1; the second recomputes the scores and has all that a key's divergence and gradients take. Operands
// must be finite (a weight of 0 hides a key in the products).

#include <atomic>

#include "rows.h"
#include "threads.h"

namespace native {
namespace {

// Bytes of relu(a) that a tile of keys may take, for all indexer heads; and the least keys that keep products busy.
constexpr int64_t TILE_BYTES = 32 * 1024, LEAST_KEYS = 16, MOST_KEYS = 64;

struct Inputs {
    const float *iq, *ik, *w, *q, *k, *lse;
    const int32_t *bounds, *indices;
    float scale;
    int64_t L, S, K, J, E, H, D;
    // From a key of k to the next one, and from a head to the next (0 if heads share keys).
    int64_t key_stride, head_stride;
    int64_t padded_e() const { return round_up(E, ALIGNMENT); }
};

// All null if gradients are not wanted. `ik` [B, S, padded E] is added to.
struct Gradients {
    float *iq, *ik, *w;
};

class Divergence {
public:
    Divergence(const Inputs& in, bool wanted)
        : in(in), wanted(wanted), visible(in.S), iq_columns(in.J * in.E * LANES), iq_rows(LANES * in.J * in.padded_e()),
          w_columns(in.J * LANES), q_columns(in.H * in.D * LANES), lse_columns(in.H * LANES),
          diq_columns(in.J * in.E * LANES), dw_columns(in.J * LANES), relus(in.J * tile_keys() * LANES),
          scores(tile_keys() * LANES), targets(in.S * LANES), dik(wanted ? in.S * in.padded_e() : 0) {}

    // Rows first, ..., first + rows - 1 of all, which belong to batch entry b. Memory that blocks share is only
    // written when it is the turn of `ticket`.
    void block(int64_t b, int64_t first, int rows, float* kl, const Gradients& grads, Turnstile& turn, int64_t ticket) {
        pack(first, rows);
        const float *ik = in.ik + b * in.S * in.E, *k = in.k + b * in.S * in.key_stride;
        if (wanted) {
            std::memset(dik + visible.low * in.padded_e(), 0,
                        (visible.high - visible.low) * in.padded_e() * sizeof(float));
            std::memset(diq_columns, 0, in.J * in.E * LANES * sizeof(float));
            std::memset(dw_columns, 0, in.J * LANES * sizeof(float));
        }
        for (int n = 0; n < N; ++n) {
            top[n] = broadcast(-INF);
            total[n] = divergence[n] = mass[n] = Floats{};
        }
        for_tiles([&](int64_t from, int64_t to) {
            find_lse(ik, from, to);
            find_target(k, from, to);
        });
        for (int n = 0; n < N; ++n) {
            float lanes[WIDTH];
            for (int i = 0; i < WIDTH; ++i) lanes[i] = top[n][i] + std::log(total[n][i]);
            score_lse[n] = load(lanes);
            share[n] = share_of(mass[n]);
        }
        for_tiles([&](int64_t from, int64_t to) { compare(ik, from, to); });
        for (int r = 0; r < rows; ++r) kl[first + r] = divergence[r / WIDTH][r % WIDTH];
        if (wanted) write(b, first, rows, grads, turn, ticket);
    }

private:
    int64_t tile_keys() const {
        int64_t keys = TILE_BYTES / (in.J * LANES * static_cast<int64_t>(sizeof(float))) / M * M;
        return keys < LEAST_KEYS ? LEAST_KEYS : keys > MOST_KEYS ? MOST_KEYS : keys;
    }

    template <class Body>
    void for_tiles(Body body) {
        for (int64_t first = visible.low; first < visible.high; first += tile_keys()) {
            int64_t last = first + tile_keys() < visible.high ? first + tile_keys() : visible.high;
            if (!visible.none(first, last)) body(first, last);
        }
    }

    void pack(int64_t first, int rows) {
        visible.set(in.bounds + 2 * first, in.indices ? in.indices + first * in.K : nullptr, in.K, rows);
        const float *iq = in.iq + first * in.J * in.E, *q = in.q + first * in.H * in.D;
        for (int64_t j = 0; j < in.J; ++j) {
            pack_columns(iq + j * in.E, in.J * in.E, rows, in.E, 1.0f, iq_columns + j * in.E * LANES);
            pack_rows(iq + j * in.E, in.J * in.E, rows, in.E, 1.0f, iq_rows + j * LANES * in.padded_e(), in.padded_e());
        }
        for (int64_t h = 0; h < in.H; ++h)
            pack_columns(q + h * in.D, in.H * in.D, rows, in.D, in.scale, q_columns + h * in.D * LANES);
        pack_columns(in.w + first * in.J, in.J, rows, in.J, 1.0f, w_columns);
        pack_columns(in.lse + first * in.H, in.H, rows, in.H, 1.0f, lse_columns);
        // Missing rows get weights of exp(0 - inf) = 0.
        for (int64_t i = 0; i < in.H * LANES; ++i)
            if (i % LANES >= rows) lse_columns[i] = INF;
    }

    // I of M keys from s on; keeps relu(a) of all heads if `kept` is given, [J][tile_keys][LANES] from that key on.
    INLINE void score(const float* ik, int64_t s, int64_t last, float* kept, Floats (&sums)[M][N]) {
        const float* keys[M];
        key_rows(ik, in.E, s, last, keys);
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) sums[m][n] = Floats{};
        for (int64_t j = 0; j < in.J; ++j) {
            Floats a[M][N];
            row_dots(keys, iq_columns + j * in.E * LANES, in.E, a);
            for (int n = 0; n < N; ++n) {
                Floats weight = load(w_columns + j * LANES + n * WIDTH);
                for (int m = 0; m < M; ++m) {
                    Floats open = relu(a[m][n]);
                    sums[m][n] += weight * open;
                    if (kept) store(kept + (j * tile_keys() + m) * LANES + n * WIDTH, open);
                }
            }
        }
    }

    void find_lse(const float* ik, int64_t first, int64_t last) {
        bool whole = visible.all(first, last);
        Floats highest[N];
        for (int n = 0; n < N; ++n) highest[n] = top[n];
        for (int64_t s = first; s < last; s += M) {
            Floats sums[M][N];
            score(ik, s, last, nullptr, sums);
            for (int m = 0; m < M && s + m < last; ++m)
                for (int n = 0; n < N; ++n) {
                    if (!whole) sums[m][n] = where(visible[s + m] >> (n * WIDTH), sums[m][n], broadcast(-INF));
                    store(scores + (s + m - first) * LANES + n * WIDTH, sums[m][n]);
                    highest[n] = maximum(highest[n], sums[m][n]);
                }
        }
        for (int n = 0; n < N; ++n) {
            Floats shift = highest[n] == -INF ? Floats{} : highest[n], sum = {};
            for (int64_t i = n * WIDTH; i < (last - first) * LANES; i += LANES) sum += exp(load(scores + i) - shift);
            total[n] = total[n] * exp(top[n] - shift) + sum;
            top[n] = highest[n];
        }
    }

    // The heads' sum of exp(z - lse) of a tile, kept until its own sum is known.
    void find_target(const float* k, int64_t first, int64_t last) {
        bool whole = visible.all(first, last);
        for (int64_t s = first; s < last; s += M) {
            Floats p[M][N];
            target(k, s, last, p);
            for (int m = 0; m < M && s + m < last; ++m)
                for (int n = 0; n < N; ++n) {
                    if (!whole) p[m][n] = where(visible[s + m] >> (n * WIDTH), p[m][n], Floats{});
                    mass[n] += p[m][n];
                    store(targets + (s + m - visible.low) * LANES + n * WIDTH, p[m][n]);
                }
        }
    }

    // The same of M keys.
    INLINE void target(const float* k, int64_t s, int64_t last, Floats (&p)[M][N]) {
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) p[m][n] = Floats{};
        for (int64_t h = 0; h < in.H; ++h) {
            const float* keys[M];
            key_rows(k + h * in.head_stride, in.key_stride, s, last, keys);
            Floats logits[M][N];
            row_dots(keys, q_columns + h * in.D * LANES, in.D, logits);
            for (int n = 0; n < N; ++n) {
                Floats shift = load(lse_columns + h * LANES + n * WIDTH);
                for (int m = 0; m < M; ++m) p[m][n] += exp(logits[m][n] - shift);
            }
        }
    }

    // A tile's divergence and, if wanted, gradients.
    void compare(const float* ik, int64_t first, int64_t last) {
        bool whole = visible.all(first, last);
        for (int64_t s = first; s < last; s += M) {
            float* kept = relus + (s - first) * LANES;
            Floats sums[M][N];
            score(ik, s, last, wanted ? kept : nullptr, sums);
            for (int m = 0; m < M && s + m < last; ++m)
                for (int n = 0; n < N; ++n) {
                    uint64_t bits = whole ? ~uint64_t{0} : visible[s + m] >> (n * WIDTH);
                    Floats mine = load(targets + (s + m - visible.low) * LANES + n * WIDTH) * share[n];
                    Floats log_softmax = sums[m][n] - score_lse[n];
                    divergence[n] += mine == Floats{} ? Floats{} : mine * (log(mine) - log_softmax);
                    if (!wanted) continue;
                    score_gradient(where(bits, exp(log_softmax) - mine, Floats{}), bits, n, kept + m * LANES);
                }
        }
        if (!wanted) return;
        for (int64_t j = 0; j < in.J; ++j) {
            const float* da = relus + j * tile_keys() * LANES;
            sum_over_keys(ik + first * in.E, in.E, da, last - first, in.E, diq_columns + j * in.E * LANES);
            sum_over_rows(da, last - first, iq_rows + j * LANES * in.padded_e(), LANES, in.padded_e(),
                             dik + first * in.padded_e());
        }
    }

    // From dI of one key and vector of rows: dw, and da = dI w 1[a > 0] in place of relu(a).
    INLINE void score_gradient(Floats dscore, uint64_t bits, int n, float* kept) {
        for (int64_t j = 0; j < in.J; ++j) {
            float *open = kept + j * tile_keys() * LANES + n * WIDTH, *dw = dw_columns + j * LANES + n * WIDTH;
            // A hidden score may have overflowed, which 0 does not hide.
            Floats a = where(bits, load(open), Floats{});
            store(dw, load(dw) + dscore * a);
            store(open, dscore * (a > Floats{} ? load(w_columns + j * LANES + n * WIDTH) : Floats{}));
        }
    }

    void write(int64_t b, int64_t first, int rows, const Gradients& grads, Turnstile& turn, int64_t ticket) {
        for (int r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < in.J * in.E; ++i)
                grads.iq[(first + r) * in.J * in.E + i] = diq_columns[i * LANES + r];
            for (int64_t j = 0; j < in.J; ++j) grads.w[(first + r) * in.J + j] = dw_columns[j * LANES + r];
        }
        // Keys are shared by blocks, whose sums are added in the order of blocks, whoever computed them.
        turn.wait(ticket);
        float* shared = grads.ik + b * in.S * in.padded_e();
        for (int64_t i = visible.low * in.padded_e(); i < visible.high * in.padded_e(); ++i) shared[i] += dik[i];
        turn.pass();
    }

    Inputs in;
    bool wanted;
    Visibility visible;
    Scratch<float> iq_columns, iq_rows, w_columns, q_columns, lse_columns, diq_columns, dw_columns, relus, scores,
        targets, dik;
    Floats top[N], total[N], score_lse[N], mass[N], share[N], divergence[N];
};

void run(const Inputs& in, int64_t B, float* kl, const Gradients& grads, int threads) {
    int64_t blocks = (in.L + LANES - 1) / LANES, items = B * blocks;
    std::atomic<int64_t> next{0};
    Turnstile turn;
    on_threads(static_cast<int>(threads < items ? threads : items), [&](int) {
        Divergence state(in, grads.iq != nullptr);
        for (int64_t item; (item = next++) < items;) {
            int64_t b = item / blocks, first = b * in.L + item % blocks * LANES;
            int64_t rows = (b + 1) * in.L - first < LANES ? (b + 1) * in.L - first : LANES;
            state.block(b, first, static_cast<int>(rows), kl, grads, turn, item);
        }
    });
}

}  // namespace

// iq [B, L, J, E], ik [B, S, E], w [B, L, J], q [B, L, H, D], k [B, S, H, D] or [B, S, D], lse [B, L, H],
// bounds [B, L, 2], indices [B, L, K] or null -> kl [B, L] and, unless null, diq and dw like iq and w, and
// dik [B, S, E padded to ALIGNMENT], which is added to.
EXPORT void indexer_kl_dense(const float* iq, const float* ik, const float* w, const float* q, const float* k,
                             const float* lse, const int32_t* bounds, const int32_t* indices, float scale, int64_t B,
                             int64_t L, int64_t S, int64_t K, int64_t J, int64_t E, int64_t H, int64_t D,
                             int64_t heads_of_keys, float* kl, float* diq, float* dik, float* dw, int64_t threads) {
    Inputs in{iq, ik, w, q, k, lse, bounds, indices, scale, L, S, K, J, E, H, D,
              heads_of_keys * D, heads_of_keys == 1 ? 0 : D};
    run(in, B, kl, {diq, dik, dw}, static_cast<int>(threads));
}

}  // namespace native
