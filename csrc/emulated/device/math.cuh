// Functions of one number, as csrc/cuda/device/math.cuh has them, computed exactly and rounded once.
#pragma once

#include <device/core.cuh>

namespace grokkernels::device {

// The hardware takes and gives zeros for denormals.
GK_DEVICE float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

GK_DEVICE float exp2_approx(float x) { return flush(std::exp2(flush(x))); }
GK_DEVICE float log2_approx(float x) { return flush(std::log2(flush(x))); }
GK_DEVICE float reciprocal_approx(float x) { return flush(1.0f / flush(x)); }
GK_DEVICE float rsqrt_approx(float x) { return flush(1.0f / std::sqrt(flush(x))); }
GK_DEVICE float tanh_approx(float x) { return std::tanh(x); }

}  // namespace grokkernels::device
