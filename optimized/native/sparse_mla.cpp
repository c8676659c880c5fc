// Attention of a query row over its selected keys, forward and backward, one row after another.
//
// The forward pass takes the selected keys in blocks that stay in the cache and keeps a running maximum, as flash
// attention does. The backward pass knows lse, so it recomputes P at once, up to a factor: rounding lse moves all
// weights of a head alike. Dividing by their sum takes that out; where one key has nearly all the weight, dP - Delta is
// so small a difference that the factor would be most of it. Gradients of keys are added where the keys lie, in the
// order of the rows.

#include <atomic>
#include <cmath>
#include <vector>

#include "gather.h"
#include "threads.h"

namespace native {
namespace {

constexpr int BLOCK_KEYS = 128;

struct Shape {
    int64_t K, H, D, V, stride;
    int64_t value_width() const { return round_up(V, WIDTH); }
};

// A running softmax per head, in lanes.
class OnlineSoftmax {
public:
    explicit OnlineSoftmax(const Lanes& lanes)
        : lanes(lanes), top(lanes.period()), total(lanes.period()), shrink(lanes.period()) {}

    void reset() {
        for (int i = 0; i < lanes.period(); ++i) {
            top[i] = -INF;
            total[i] = 0.0f;
        }
    }

    // Turns logits [key][lanes] into exp(logits - maximum so far). Returns whether what was summed before must be
    // multiplied by `factor(head)`.
    bool absorb(float* logits, int keys) {
        int64_t size = int64_t{keys} * lanes.count, period = lanes.period();
        for (int64_t i = size; i < round_up(size, period); ++i) logits[i] = -INF;
        if (lanes.folded) spread_maximum(logits, size);
        bool changed = false;
        for (int64_t lane = 0; lane < period; lane += WIDTH) {
            Floats before = load(top + lane), highest = before;
            if (lanes.folded) {
                highest = maximum(before, load(shrink));
            } else {
                for (int64_t i = lane; i < size; i += period) highest = maximum(highest, load(logits + i));
            }
            // Where all is -inf so far, exp(-inf - 0) is the 0 that is wanted; -inf - -inf would be NaN.
            Floats shift = highest == -INF ? Floats{} : highest;
            Floats sum = {};
            for (int64_t i = lane; i < size; i += period) {
                Floats weight = exp(load(logits + i) - shift);
                store(logits + i, weight);
                sum += weight;
            }
            Floats factor = exp(before - shift);
            changed |= any(before != highest);
            store(shrink + lane, factor);
            store(total + lane, load(total + lane) * factor + sum);
            store(top + lane, highest);
        }
        return changed;
    }

    float factor(int head) const { return shrink[head]; }
    float divisor(int head) const { return lanes.folded ? total[head] + total[head + lanes.count] : total[head]; }
    // Of a head with keys; NaN if all its logits are -inf.
    float lse(int head) const {
        return top[head] == -INF ? NOT_A_NUMBER : top[head] + std::log(divisor(head));
    }

private:
    // Folded: the maximum of each head, in both halves of `shrink`.
    void spread_maximum(const float* logits, int64_t size) {
        Floats highest = broadcast(-INF), swapped;
        for (int64_t i = 0; i < size; i += WIDTH) highest = maximum(highest, load(logits + i));
        for (int i = 0; i < WIDTH; ++i) swapped[i] = highest[(i + WIDTH / 2) % WIDTH];
        store(shrink, maximum(swapped, highest));
    }

    Lanes lanes;
    Scratch<float> top, total, shrink;
};

class Forward {
public:
    Forward(const Shape& shape, float scale)
        : shape(shape), scale(scale), lanes(shape.H), softmax(lanes), packed(lanes.packed_size(shape.D)),
          logits(lanes.array_size(BLOCK_KEYS)), sums(shape.H * shape.value_width()), slots(shape.K + 1) {}

    void row(const float* q, const float* kv, const int32_t* indices, float* out, float* lse) {
        int keys = valid_slots(indices, shape.K, 0, std::numeric_limits<int32_t>::max(), slots);
        int64_t width = shape.value_width();
        softmax.reset();
        lanes.pack(q, shape.D, scale, packed);
        std::memset(sums, 0, shape.H * width * sizeof(float));
        for (int first = 0; first < keys; first += BLOCK_KEYS) {
            int count = keys - first < BLOCK_KEYS ? keys - first : BLOCK_KEYS;
            dots(kv, shape.stride, slots + first, count, packed, shape.D, lanes, logits);
            if (softmax.absorb(logits, count) && first > 0)
                for (int h = 0; h < shape.H; ++h)
                    for (int64_t v = 0; v < width; ++v) sums[h * width + v] *= softmax.factor(h);
            weighted_sum(logits, lanes, kv, shape.stride, slots + first, count, width, sums, width);
        }
        for (int h = 0; h < shape.H; ++h) {
            lse[h] = keys == 0 ? -INF : softmax.lse(h);
            float divisor = keys == 0 ? 1.0f : softmax.divisor(h);
            for (int64_t v = 0; v < shape.V; ++v) out[h * shape.V + v] = sums[h * width + v] / divisor;
        }
    }

private:
    Shape shape;
    float scale;
    Lanes lanes;
    OnlineSoftmax softmax;
    Scratch<float> packed, logits, sums;
    Scratch<int32_t> slots;
};

// One row of the backward pass: P and dS of its keys, until their share of dkv has been added.
class Backward {
public:
    Backward(const Shape& shape, float scale)
        : shape(shape), scale(scale), lanes(shape.H), q_packed(lanes.packed_size(shape.D)),
          dout_packed(lanes.packed_size(shape.V)), q_rows(shape.H * shape.stride),
          dout_rows(shape.H * shape.value_width()), weights(lanes.array_size(shape.K)),
          dlogits(lanes.array_size(shape.K)), dq_sums(shape.H * shape.stride), lse_lanes(lanes.period()),
          slots(shape.K + 1) {}

    static int64_t floats(const Shape& shape) { return 2 * Lanes(shape.H).array_size(shape.K); }

    // Computes P, dS = P (dP - Delta) and, if wanted, dq.
    void prepare(const float* q, const float* kv, const int32_t* indices, const float* lse, const float* dout,
                 float* dq) {
        keys = valid_slots(indices, shape.K, 0, std::numeric_limits<int32_t>::max(), slots);
        if (dq) std::memset(dq, 0, shape.H * shape.D * sizeof(float));
        if (keys == 0) return;
        lanes.pack(q, shape.D, scale, q_packed);
        lanes.pack(dout, shape.V, 1.0f, dout_packed);
        copy_rows(q, shape.D, scale, q_rows, shape.stride);
        copy_rows(dout, shape.V, 1.0f, dout_rows, shape.value_width());
        dots(kv, shape.stride, slots, keys, q_packed, shape.D, lanes, weights);
        dots(kv, shape.stride, slots, keys, dout_packed, shape.V, lanes, dlogits);
        // Lanes without a head get weights exp(0 - inf) = 0.
        lanes.spread(lse, INF, lse_lanes);
        softmax_backward();
        if (!dq) return;
        std::memset(dq_sums, 0, shape.H * shape.stride * sizeof(float));
        weighted_sum(dlogits, lanes, kv, shape.stride, slots, keys, shape.stride, dq_sums, shape.stride);
        for (int h = 0; h < shape.H; ++h)
            for (int64_t d = 0; d < shape.D; ++d) dq[h * shape.D + d] = dq_sums[h * shape.stride + d] * scale;
    }

    // dkv += dS' (scale q), and P' dout in the value columns, for the keys that `thread` owns; `chosen` has room
    // for K.
    void add_to_keys(float* dkv, int thread, int threads, int32_t* chosen) const {
        int count = keys_of_thread(slots, keys, thread, threads, chosen);
        KeyGradient gradient{dlogits, q_rows, weights, dout_rows, shape.stride, shape.value_width()};
        scatter_add(gradient, lanes, slots, chosen, count, dkv, shape.stride);
    }

private:
    void copy_rows(const float* x, int64_t width, float factor, float* to, int64_t stride) const {
        for (int h = 0; h < shape.H; ++h)
            for (int64_t i = 0; i < stride; ++i) to[h * stride + i] = i < width ? x[h * width + i] * factor : 0.0f;
    }

    void softmax_backward() {
        int64_t size = int64_t{keys} * lanes.count, period = lanes.period();
        // The second key of the last folded vector, if there is none.
        for (int64_t i = size; i < round_up(size, period); ++i) {
            weights[i] = -INF;
            dlogits[i] = 0.0f;
        }
        for (int64_t lane = 0; lane < period; lane += WIDTH) {
            Floats shift = load(lse_lanes + lane), delta = {}, total = {};
            for (int64_t i = lane; i < size; i += period) {
                Floats weight = exp(load(weights + i) - shift);
                store(weights + i, weight);
                total += weight;
                delta += weight * load(dlogits + i);
            }
            if (lanes.folded) {
                total += swapped_halves(total);
                delta += swapped_halves(delta);
            }
            Floats share = share_of(total);
            delta *= share;
            for (int64_t i = lane; i < size; i += period) {
                store(weights + i, load(weights + i) * share);
                store(dlogits + i, load(weights + i) * (load(dlogits + i) - delta));
            }
        }
    }

    static Floats swapped_halves(Floats x) {
        Floats swapped;
        for (int i = 0; i < WIDTH; ++i) swapped[i] = x[(i + WIDTH / 2) % WIDTH];
        return swapped;
    }

    Shape shape;
    float scale;
    Lanes lanes;
    int keys = 0;
    Scratch<float> q_packed, dout_packed, q_rows, dout_rows, weights, dlogits, dq_sums, lse_lanes;
    Scratch<int32_t> slots;
};

}  // namespace

// q [B, L, H, D], kv [B, S, stride] with zeros behind D, indices [B, L, K] -> out [B, L, H, V], lse [B, L, H].
EXPORT void sparse_mla_forward(const float* q, const float* kv, const int32_t* indices, float scale, int64_t B,
                               int64_t L, int64_t S, int64_t K, int64_t H, int64_t D, int64_t V, int64_t stride,
                               float* out, float* lse, int64_t threads) {
    constexpr int64_t ROWS = 16;
    Shape shape{K, H, D, V, stride};
    int64_t rows = B * L, blocks = (rows + ROWS - 1) / ROWS;
    std::atomic<int64_t> next{0};
    on_threads(static_cast<int>(threads < blocks ? threads : blocks), [&](int) {
        Forward forward(shape, scale);
        for (int64_t first; (first = ROWS * next++) < rows;)
            for (int64_t row = first; row < rows && row < first + ROWS; ++row)
                forward.row(q + row * H * D, kv + row / L * S * stride, indices + row * K, out + row * H * V,
                            lse + row * H);
    });
}

// dout [B, L, H, V] -> dq [B, L, H, D] and dkv [B, S, stride], which is added to; either may be null.
EXPORT void sparse_mla_backward(const float* q, const float* kv, const int32_t* indices, const float* lse,
                                const float* dout, float scale, int64_t B, int64_t L, int64_t S, int64_t K,
                                int64_t H, int64_t D, int64_t V, int64_t stride, float* dq, float* dkv,
                                int64_t threads) {
    Shape shape{K, H, D, V, stride};
    int64_t rows = B * L;
    if (threads > rows) threads = rows;
    int64_t wave = rows_in_wave(Backward::floats(shape), static_cast<int>(threads));
    std::vector<std::unique_ptr<Backward>> states;
    for (int64_t i = 0; i < wave; ++i) states.push_back(std::make_unique<Backward>(shape, scale));
    Barrier barrier(static_cast<int>(threads));
    on_threads(static_cast<int>(threads), [&](int thread) {
        Scratch<int32_t> chosen(K + 1);
        for (int64_t first = 0; first < rows; first += wave) {
            int64_t last = first + wave < rows ? first + wave : rows;
            for (int64_t row = first + thread; row < last; row += threads)
                states[row - first]->prepare(q + row * H * D, kv + row / L * S * stride, indices + row * K,
                                             lse + row * H, dout + row * H * V, dq ? dq + row * H * D : nullptr);
            barrier.wait();
            if (dkv)
                for (int64_t row = first; row < last; ++row)
                    states[row - first]->add_to_keys(dkv + row / L * S * stride, thread, static_cast<int>(threads),
                                                    chosen);
            barrier.wait();
        }
    });
}

}  // namespace native
