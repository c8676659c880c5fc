// Functions of single elements.

#include "simd.h"

namespace native {

// Whether none of `count` floats is infinite or NaN.
EXPORT int all_finite(const float* x, int64_t count, int64_t) {
    Floats zeros[4] = {};
    int64_t i = 0;
    for (; i + 4 * WIDTH <= count; i += 4 * WIDTH)
        for (int n = 0; n < 4; ++n) zeros[n] += load(x + i + n * WIDTH) * 0.0f;
    float zero = sum_of_lanes((zeros[0] + zeros[1]) + (zeros[2] + zeros[3]));
    for (; i < count; ++i) zero += x[i] * 0.0f;
    return zero == 0.0f;
}

// The exponential and the logarithm that the operators use, for tests against others; `count` a multiple of
// ALIGNMENT.
EXPORT void exp_of(const float* x, int64_t count, float* y, int64_t) {
    for (int64_t i = 0; i < count; i += WIDTH) store(y + i, exp(load(x + i)));
}
EXPORT void log_of(const float* x, int64_t count, float* y, int64_t) {
    for (int64_t i = 0; i < count; i += WIDTH) store(y + i, log(load(x + i)));
}

}  // namespace native
