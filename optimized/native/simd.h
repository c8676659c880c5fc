// Vectors of the widest kind the compiler was told about, exp and log on them, and the one matrix micro-kernel.
//
// Vectors are those of GCC and Clang (vector_size), so the same source serves AVX-512, AVX2, SSE and NEON; the
// few intrinsics below have a portable twin. Comparisons keep NaN: a maximum takes its second operand if either
// is NaN, so the operand that may be NaN always comes second.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
// For a loop over tiles whose sums would not stay in registers within a large caller.
#define KEPT_APART inline __attribute__((noinline))
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace native {

// WIDTH floats in a vector; a tile of the micro-kernel is at most MAX_COLUMNS vectors wide.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, MAX_COLUMNS = 4;
constexpr bool MANY_REGISTERS = true;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, MAX_COLUMNS = 3;
constexpr bool MANY_REGISTERS = false;
#elif defined(__aarch64__)
constexpr int WIDTH = 4, MAX_COLUMNS = 4;
constexpr bool MANY_REGISTERS = true;
#else
constexpr int WIDTH = 4, MAX_COLUMNS = 3;
constexpr bool MANY_REGISTERS = false;
#endif

// Rows that whole vectors are loaded from or stored to are padded to a multiple of this, whatever the CPU.
constexpr int ALIGNMENT = 16;

// Rows of a tile that is `columns` vectors wide: enough sums in flight to hide the latency of a multiply-add,
// few enough to stay in registers.
constexpr int tile_rows(int columns) { return columns == 1 || (columns == 2 && MANY_REGISTERS) ? 8 : 4; }

typedef float Floats __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));
typedef float LooseFloats __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

INLINE Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }
INLINE Ints load(const int32_t* from) { return *reinterpret_cast<const LooseInts*>(from); }
INLINE void store(float* to, Floats value) { *reinterpret_cast<LooseFloats*>(to) = value; }
INLINE void store(int32_t* to, Ints value) { *reinterpret_cast<LooseInts*>(to) = value; }
INLINE Floats broadcast(float value) { return value - Floats{}; }
INLINE Ints broadcast(int32_t value) { return value - Ints{}; }

// The two floats at `from`, repeated over the vector.
INLINE Floats broadcast_pair(const float* from) {
    typedef int64_t Pairs __attribute__((vector_size(WIDTH * 4)));
    int64_t both;
    std::memcpy(&both, from, sizeof both);
    return (Floats)(both + Pairs{});
}

// `low` in the lower half of the lanes, `high` in the upper.
INLINE Floats halves(float low, float high) {
    Ints upper;
    for (int i = 0; i < WIDTH; ++i) upper[i] = i < WIDTH / 2 ? 0 : -1;
    return upper ? broadcast(high) : broadcast(low);
}

INLINE Floats maximum(Floats a, Floats may_be_nan) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, may_be_nan);
#else
    return a > may_be_nan ? a : may_be_nan;
#endif
}

INLINE Floats minimum(Floats a, Floats may_be_nan) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, may_be_nan);
#else
    return a < may_be_nan ? a : may_be_nan;
#endif
}

INLINE Ints maximum(Ints a, Ints b) { return a > b ? a : b; }
INLINE Ints minimum(Ints a, Ints b) { return a < b ? a : b; }

// 1 / x where x > 0, else 1: what makes weights that sum to x sum to 1, and leaves those alone that sum to 0 or NaN.
INLINE Floats share_of(Floats x) { return x > Floats{} ? 1.0f / x : broadcast(1.0f); }

INLINE Floats relu(Floats x) { return maximum(Floats{}, x); }

INLINE float sum_of_lanes(Floats x) {
    float lanes[WIDTH];
    store(lanes, x);
    for (int width = WIDTH / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

template <class Vector>
INLINE auto max_of_lanes(Vector x) {
    auto top = x[0];
    for (int i = 1; i < WIDTH; ++i) top = top > x[i] ? top : x[i];
    return top;
}

INLINE int32_t min_of_lanes(Ints x) {
    int32_t least = x[0];
    for (int i = 1; i < WIDTH; ++i) least = least < x[i] ? least : x[i];
    return least;
}

// Bit i is set where lane i of a comparison's result is.
INLINE uint32_t bits_of(Ints mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#else
    uint32_t bits = 0;
    for (int i = 0; i < WIDTH; ++i) bits |= (mask[i] & 1u) << i;
    return bits;
#endif
}

INLINE bool any(Ints mask) { return bits_of(mask) != 0; }

// e^x to about one unit in the last place; results below the smallest normal number are 0, so that no
// denormal slows what follows down. exp(r) = 1 + r + r^2 g(r) with g of degree 4, the best one on |r| <= ln(2)/2
// for the relative error (3e-9).
INLINE Floats exp(Floats x) {
    constexpr float LOWEST = -87.33654f, HIGHEST = 88.8f;
    constexpr float LOG2_E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
    // Adding and taking away 1.5 * 2^23 rounds to a whole number, which is then also in the low bits.
    constexpr float ROUNDER = 12582912.0f;
    Floats clamped = maximum(broadcast(LOWEST), minimum(broadcast(HIGHEST), x));
    Floats shifted = clamped * LOG2_E + ROUNDER;
    Floats whole = shifted - ROUNDER;
    Floats r = clamped - whole * LN2_HIGH;
    r -= whole * LN2_LOW;
    Floats g = r * 1.381446622e-3f + 8.368780486e-3f;
    g = g * r + 4.166839423e-2f;
    g = g * r + 1.666652011e-1f;
    g = g * r + 4.999999341e-1f;
    Floats result = g * (r * r) + r;
    result += 1.0f;
#if defined(__AVX512F__)
    __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(LOWEST), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(counts, result, whole);
#else
    // Two factors, because 2^128 is no float.
    Ints power = (Ints)shifted - 0x4B400000;
    Ints half = power >> 1, rest = power - half;
    Ints first = (half + 127) << 23, second = (rest + 127) << 23;
    result = result * (Floats)first * (Floats)second;
    return x < LOWEST ? Floats{} : result;
#endif
}

// Natural logarithm of normal positive numbers, to about two units in the last place; NaN stays NaN.
// With x = 2^e m and m in [2/3, 4/3), log(m) = 2 atanh(s) for s = (m - 1) / (m + 1), |s| <= 1/5.
INLINE Floats log(Floats x) {
    constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
    Ints bits = (Ints)x;
    Ints exponent = (bits - 0x3F2AAAAB) >> 23;
    Ints mantissa = bits - (exponent << 23);
    Floats m = (Floats)mantissa;
    Floats e = __builtin_convertvector(exponent, Floats);
    Floats f = m - 1.0f;
    Floats s = f / (m + 1.0f);
    Floats s2 = s * s;
    Floats series = s2 * (2.0f / 9) + 2.0f / 7;
    series = series * s2 + 2.0f / 5;
    series = series * s2 + 2.0f / 3;
    // 2 s = f - s f keeps the digits of f.
    Floats result = f - s * (f - s2 * series);
    result += e * LN2_LOW;
    result += e * LN2_HIGH;
    return x == x ? result : x;
}

// Natural logsumexp, of n >= 1 scores.
inline float logsumexp(const float* scores, int64_t n) {
    Floats top = broadcast(-INF);
    int64_t whole = n / WIDTH * WIDTH;
    for (int64_t s = 0; s < whole; s += WIDTH) top = maximum(top, load(scores + s));
    Floats tail = broadcast(-INF);
    for (int64_t s = whole; s < n; ++s) tail[s - whole] = scores[s];
    float highest = max_of_lanes(maximum(top, tail));
    // With an infinite maximum the exponentials are infinite or 0 on their own; NaN finds its way as a summand.
    Floats shift = broadcast(std::isfinite(highest) ? highest : 0.0f);
    Floats total = exp(tail - shift), more = {};
    int64_t s = 0;
    for (; s + 2 * WIDTH <= whole; s += 2 * WIDTH) {
        total += exp(load(scores + s) - shift);
        more += exp(load(scores + s + WIDTH) - shift);
    }
    if (s < whole) total += exp(load(scores + s) - shift);
    return std::log(sum_of_lanes(total + more)) + shift[0];
}

// to[i][row] = x[row][i] * factor for i < width; `lanes`, a multiple of WIDTH, are 0 from `rows` on.
inline void transpose(const float* x, int64_t stride, int rows, int64_t width, float factor, float* to, int64_t lanes) {
    // So many elements of all rows at a time, to use up the cache lines that are read.
    constexpr int64_t BLOCK = 16;
    for (int64_t begin = 0; begin < width; begin += BLOCK) {
        int64_t end = begin + BLOCK < width ? begin + BLOCK : width;
        for (int64_t lane = 0; lane < lanes; lane += WIDTH) {
            const float* from = x + lane * stride;
            for (int64_t i = begin; i < end; ++i) {
                float column[WIDTH];
                if (lane + WIDTH <= rows) {
                    for (int r = 0; r < WIDTH; ++r) column[r] = from[r * stride + i];
                } else {
                    for (int r = 0; r < WIDTH; ++r) column[r] = lane + r < rows ? from[r * stride + i] : 0.0f;
                }
                store(to + i * lanes + lane, load(column) * factor);
            }
        }
    }
}

// Memory for temporaries on a cache line of its own, not initialised.
template <class T>
class Scratch {
public:
    explicit Scratch(int64_t count) {
        size_t bytes = (static_cast<size_t>(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
        memory.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
        if (!memory) throw std::bad_alloc();
    }
    operator T*() const { return memory.get(); }

private:
    struct Free {
        void operator()(T* pointer) const { std::free(pointer); }
    };
    std::unique_ptr<T, Free> memory;
};

// Has the compiler load `x` into a register once. GCC would rather read a vector anew for every multiply-add that it
// is an operand of, and then loads, not multiply-adds, are what takes the time.
INLINE void hold(Floats& x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#else
    (void)x;
#endif
}

// The micro-kernel: sums[m][n] += sum over i < depth of a[m][i * step] * row(i)[n], n counting vectors.
// Products are added one by one in the order of i, whatever the shape of the tile.
template <int M, int N, class Row>
INLINE void multiply_add(const float* const (&a)[M], int64_t step, Row row, int64_t depth, Floats (&sums)[M][N]) {
    for (int64_t i = 0; i < depth; ++i) {
        const float* b = row(i);
        Floats vectors[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            vectors[n] = load(b + n * WIDTH);
            hold(vectors[n]);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            Floats factor = broadcast(a[m][i * step]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sums[m][n] += factor * vectors[n];
        }
    }
}

// Calls body(constant<N>, first) for panels of N vectors, as equal as possible, that together are `vectors` wide.
template <class Body>
INLINE void for_panels(int vectors, Body body) {
    int panels = (vectors + MAX_COLUMNS - 1) / MAX_COLUMNS;
    for (int first = 0; panels > 0; --panels) {
        int n = (vectors - first + panels - 1) / panels;
        if (n == 1) body(std::integral_constant<int, 1>{}, first);
        if (n == 2) body(std::integral_constant<int, 2>{}, first);
        if (n == 3) body(std::integral_constant<int, 3>{}, first);
        if constexpr (MAX_COLUMNS > 3)
            if (n == 4) body(std::integral_constant<int, 4>{}, first);
        first += n;
    }
}

constexpr int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

}  // namespace native
