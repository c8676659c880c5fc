// The indexer's loss over the selected keys of each row, and its closed-form gradients, one row after another.
//
// Lanes are heads: indexer heads for the scores and their gradients, attention heads for the target p.

#include <vector>

#include "gather.h"
#include "threads.h"

namespace native {
namespace {

// Key strides are multiples of WIDTH with zeros behind E and D.
struct Shape {
    int64_t K, J, E, index_stride, H, D, stride;
};

struct Row {
    const float *iq, *w, *q, *lse;
    const float *ik, *k;
    const int32_t* indices;
    int32_t low, high;
};

class Divergence {
public:
    Divergence(const Shape& shape, float scale)
        : shape(shape), scale(scale), index_lanes(shape.J), lanes(shape.H),
          index_packed(index_lanes.packed_size(shape.E)), packed(lanes.packed_size(shape.D)),
          relus(index_lanes.array_size(shape.K)), weights(lanes.array_size(shape.K)), scores(shape.K + WIDTH),
          targets(shape.K + WIDTH), iq_rows(shape.J * shape.index_stride), diq_sums(shape.J * shape.index_stride),
          lse_lanes(lanes.period()), w_lanes(index_lanes.period()), dw_lanes(index_lanes.period()),
          slots(shape.K + 1) {}

    static int64_t floats(const Shape& shape) {
        return Lanes(shape.J).array_size(shape.K) + Lanes(shape.H).array_size(shape.K);
    }

    // Returns the divergence of a row and, if wanted, writes its gradients of iq and w.
    float prepare(const Row& row, float* diq, float* dw) {
        keys = valid_slots(row.indices, shape.K, row.low, row.high, slots);
        if (diq) {
            std::memset(diq, 0, shape.J * shape.E * sizeof(float));
            std::memset(dw, 0, shape.J * sizeof(float));
        }
        if (keys == 0) return 0.0f;
        index_lanes.pack(row.iq, shape.E, 1.0f, index_packed);
        dots(row.ik, shape.index_stride, slots, keys, index_packed, shape.E, index_lanes, relus);
        for (int64_t i = 0; i < int64_t{keys} * index_lanes.count; i += WIDTH) store(relus + i, relu(load(relus + i)));
        for (int i = 0; i < keys; ++i) scores[i] = weighted_lanes(relus + i * index_lanes.count, row.w, shape.J);
        target(row);
        float divergence = compare();
        if (diq) gradients(row, diq, dw);
        return divergence;
    }

    // dik += dI w 1[a > 0] iq for the keys that `thread` owns; `chosen` has room for K + 1.
    void add_to_keys(float* dik, int thread, int threads, int32_t* chosen) const {
        int count = keys_of_thread(slots, keys, thread, threads, chosen);
        KeyGradient gradient{relus, iq_rows, relus, iq_rows, shape.index_stride, 0};
        scatter_add(gradient, index_lanes, slots, chosen, count, dik, shape.index_stride);
    }

private:
    static float weighted_lanes(const float* x, const float* factors, int64_t count) {
        Floats sums = {};
        int64_t i = 0;
        for (; i + WIDTH <= count; i += WIDTH) sums += load(factors + i) * load(x + i);
        float total = i > 0 ? sum_of_lanes(sums) : 0.0f;
        for (; i < count; ++i) total += factors[i] * x[i];
        return total;
    }

    static float sum_of(const float* x, int64_t count) {
        Floats sums = {};
        int64_t i = 0;
        for (; i + WIDTH <= count; i += WIDTH) sums += load(x + i);
        float total = i > 0 ? sum_of_lanes(sums) : 0.0f;
        for (; i < count; ++i) total += x[i];
        return total;
    }

    // p, the heads' sum of exp(z - lse), divided by its own sum.
    void target(const Row& row) {
        lanes.pack(row.q, shape.D, scale, packed);
        dots(row.k, shape.stride, slots, keys, packed, shape.D, lanes, weights);
        lanes.spread(row.lse, INF, lse_lanes);
        int64_t size = int64_t{keys} * lanes.count, period = lanes.period();
        for (int64_t lane = 0; lane < period; lane += WIDTH) {
            Floats shift = load(lse_lanes + lane);
            for (int64_t i = lane; i < size; i += period) store(weights + i, exp(load(weights + i) - shift));
        }
        for (int i = 0; i < keys; ++i) targets[i] = sum_of(weights + i * lanes.count, shape.H);
        float share = share_of(broadcast(sum_of(targets, keys)))[0];
        for (int i = 0; i < keys; ++i) targets[i] *= share;
    }

    // The divergence; afterwards `scores` holds dI = softmax(I) - p.
    float compare() {
        float lse = logsumexp(scores, keys);
        // Behind the last key: softmax 0, p 0, nothing to sum.
        for (int i = keys; i < round_up(keys, WIDTH); ++i) {
            scores[i] = -INF;
            targets[i] = 0.0f;
        }
        Floats total = {};
        for (int i = 0; i < keys; i += WIDTH) {
            Floats p = load(targets + i), log_softmax = load(scores + i) - lse;
            total += p == Floats{} ? Floats{} : p * (log(p) - log_softmax);
            store(scores + i, exp(log_softmax) - p);
        }
        return sum_of_lanes(total);
    }

    // From dI in `scores`: dw, da = dI w 1[a > 0] in place of relu(a), and diq.
    void gradients(const Row& row, float* diq, float* dw) {
        int64_t period = index_lanes.period(), size = int64_t{keys} * index_lanes.count;
        scores[keys] = 0.0f;
        for (int64_t i = size; i < round_up(size, period); ++i) relus[i] = 0.0f;
        index_lanes.spread(row.w, 0.0f, w_lanes);
        for (int64_t lane = 0; lane < period; lane += WIDTH) {
            Floats weight = load(w_lanes + lane), sums = {};
            for (int64_t i = lane; i < size; i += period) {
                const float* own = scores + i / index_lanes.count;
                Floats dscore = index_lanes.folded ? halves(own[0], own[1]) : broadcast(own[0]);
                Floats a = load(relus + i);
                sums += dscore * a;
                store(relus + i, dscore * (a > Floats{} ? weight : Floats{}));
            }
            store(dw_lanes + lane, sums);
        }
        for (int j = 0; j < shape.J; ++j)
            dw[j] = index_lanes.folded ? dw_lanes[j] + dw_lanes[j + index_lanes.count] : dw_lanes[j];
        for (int j = 0; j < shape.J; ++j)
            for (int64_t e = 0; e < shape.index_stride; ++e)
                iq_rows[j * shape.index_stride + e] = e < shape.E ? row.iq[j * shape.E + e] : 0.0f;
        std::memset(diq_sums, 0, shape.J * shape.index_stride * sizeof(float));
        weighted_sum(relus, index_lanes, row.ik, shape.index_stride, slots, keys, shape.index_stride, diq_sums,
                     shape.index_stride);
        for (int j = 0; j < shape.J; ++j)
            std::memcpy(diq + j * shape.E, diq_sums + j * shape.index_stride, shape.E * sizeof(float));
    }

    Shape shape;
    float scale;
    Lanes index_lanes, lanes;
    int keys = 0;
    Scratch<float> index_packed, packed, relus, weights, scores, targets, iq_rows, diq_sums, lse_lanes, w_lanes,
        dw_lanes;
    Scratch<int32_t> slots;
};

}  // namespace

// iq [B, L, J, E], ik [B, S, index_stride], w [B, L, J], q [B, L, H, D], k [B, S, stride], lse [B, L, H],
// bounds [B, L, 2], indices [B, L, K] -> kl [B, L] and, unless null, diq and dw like iq and w, and dik like ik,
// which is added to.
EXPORT void indexer_kl_selected(const float* iq, const float* ik, const float* w, const float* q, const float* k,
                                const float* lse, const int32_t* bounds, const int32_t* indices, float scale,
                                int64_t B, int64_t L, int64_t S, int64_t K, int64_t J, int64_t E,
                                int64_t index_stride, int64_t H, int64_t D, int64_t stride, float* kl, float* diq,
                                float* dik, float* dw, int64_t threads) {
    Shape shape{K, J, E, index_stride, H, D, stride};
    int64_t rows = B * L;
    if (threads > rows) threads = rows;
    int64_t wave = rows_in_wave(Divergence::floats(shape), static_cast<int>(threads));
    std::vector<std::unique_ptr<Divergence>> states;
    for (int64_t i = 0; i < wave; ++i) states.push_back(std::make_unique<Divergence>(shape, scale));
    Barrier barrier(static_cast<int>(threads));
    on_threads(static_cast<int>(threads), [&](int thread) {
        Scratch<int32_t> chosen(K + 1);
        for (int64_t first = 0; first < rows; first += wave) {
            int64_t last = first + wave < rows ? first + wave : rows;
            for (int64_t row = first + thread; row < last; row += threads) {
                Row inputs{iq + row * J * E,
                           w + row * J,
                           q + row * H * D,
                           lse + row * H,
                           ik + row / L * S * index_stride,
                           k + row / L * S * stride,
                           indices + row * K,
                           bounds[2 * row],
                           bounds[2 * row + 1]};
                kl[row] = states[row - first]->prepare(inputs, diq ? diq + row * J * E : nullptr,
                                                       dw ? dw + row * J : nullptr);
            }
            barrier.wait();
            if (dik)
                for (int64_t row = first; row < last; ++row)
                    states[row - first]->add_to_keys(dik + row / L * S * index_stride, thread,
                                                     static_cast<int>(threads), chosen);
            barrier.wait();
        }
    });
}

}  // namespace native
