// gated_activation on the CPU: y = act(gate) * up. Shazeer, "GLU Variants Improve Transformer" (2020).
//
// One pass over memory in each direction; the backward pass takes the activation and its slope from one evaluation.
// Tensors without gaps are one long row, cut into blocks, so that any shape spreads over the cores.
#include "gated_activation.h"

#include "cpu/activation.h"
#include "cpu/launch.h"
#include "cpu/loops.h"
#include "cpu/parallel.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {
namespace {

constexpr int64_t kBlock = 4096;  // elements, whole cache lines

// Floats touched, and the arithmetic of an exponential in the same unit.
constexpr int64_t kForwardCost = 6, kBackwardCost = 9;

// body(row, begin, end) over blocks of columns of all rows.
template <typename Body>
void over_blocks(int64_t rows, int64_t cols, int64_t cost, const Body& body) {
  const int64_t per_row = (cols + kBlock - 1) / kBlock;
  parallel_range(rows * per_row, cost * (cols < kBlock ? cols : kBlock), [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t begin = item % per_row * kBlock;
      body(item / per_row, begin, begin + kBlock < cols ? begin + kBlock : cols);
    }
    stream_fence();
  });
}

template <typename T, Activation kKind, bool kStream>
void forward(const GatedActivationFwdParams& p) {
  over_blocks(p.rows, p.cols, kForwardCost, [&](int64_t row, int64_t begin, int64_t end) {
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
    const T* up = static_cast<const T*>(p.up) + row * p.up_stride;
    T* y = static_cast<T*>(p.y) + row * p.cols;
    int64_t c = begin;
    for (; c + 2 * kLanes <= end; c += 2 * kLanes) {
      const VfPair g = fetch_pair(gate + c), u = fetch_pair(up + c);
      put_pair<kStream>(y + c, value_and_slope<kKind>(g.first).value * u.first,
                        value_and_slope<kKind>(g.second).value * u.second);
    }
    for_vectors(c, end, [&](int64_t i, auto n) {
      store_n(y + i, value_and_slope<kKind>(load_n(gate + i, n)).value * load_n(up + i, n), n);
    });
  });
}

template <typename T, Activation kKind, bool kStream>
void backward(const GatedActivationBwdParams& p) {
  over_blocks(p.rows, p.cols, kBackwardCost, [&](int64_t row, int64_t begin, int64_t end) {
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_stride;
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
    const T* up = static_cast<const T*>(p.up) + row * p.up_stride;
    T* dgate = static_cast<T*>(p.dgate) + row * p.cols;
    T* dup = static_cast<T*>(p.dup) + row * p.cols;
    int64_t c = begin;
    for (; c + 2 * kLanes <= end; c += 2 * kLanes) {
      const VfPair d = fetch_pair(dy + c), g = fetch_pair(gate + c), u = fetch_pair(up + c);
      const ValueAndSlope first = value_and_slope<kKind>(g.first), second = value_and_slope<kKind>(g.second);
      put_pair<kStream>(dup + c, d.first * first.value, d.second * second.value);
      put_pair<kStream>(dgate + c, d.first * u.first * first.slope, d.second * u.second * second.slope);
    }
    for_vectors(c, end, [&](int64_t i, auto n) {
      const vf d = load_n(dy + i, n);
      const ValueAndSlope act = value_and_slope<kKind>(load_n(gate + i, n));
      store_n(dup + i, d * act.value, n);
      store_n(dgate + i, d * load_n(up + i, n) * act.slope, n);
    });
  });
}

// Runs f.template operator()<T, kind>() for a runtime dtype and kind.
template <typename F>
void with_types(DType dtype, Activation kind, const F& f) {
  GK_SWITCH_DTYPE(dtype, T, with_activation(kind, [&]<Activation kKind>() { f.template operator()<T, kKind>(); }));
}

}  // namespace

void gated_activation_fwd(const GatedActivationFwdParams& params) {
  GatedActivationFwdParams p = params;
  if (p.gate_stride == p.cols && p.up_stride == p.cols) p.cols *= p.rows, p.rows = 1;
  with_types(p.dtype, p.kind, [&]<typename T, Activation kKind>() {
    const int64_t bytes = p.rows * p.cols * static_cast<int64_t>(sizeof(T));
    if (should_stream(static_cast<T*>(p.y), p.rows == 1 ? 0 : p.cols, bytes))
      forward<T, kKind, true>(p);
    else
      forward<T, kKind, false>(p);
  });
}

void gated_activation_bwd(const GatedActivationBwdParams& params) {
  GatedActivationBwdParams p = params;
  if (p.dy_stride == p.cols && p.gate_stride == p.cols && p.up_stride == p.cols) p.cols *= p.rows, p.rows = 1;
  with_types(p.dtype, p.kind, [&]<typename T, Activation kKind>() {
    const int64_t bytes = 2 * p.rows * p.cols * static_cast<int64_t>(sizeof(T));
    const int64_t stride = p.rows == 1 ? 0 : p.cols;
    if (should_stream(static_cast<T*>(p.dgate), stride, bytes) && should_stream(static_cast<T*>(p.dup), stride, bytes))
      backward<T, kKind, true>(p);
    else
      backward<T, kKind, false>(p);
  });
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(gated_activation_fwd, GatedActivationFwdParams);
GK_CPU_LAUNCHER(gated_activation_bwd, GatedActivationBwdParams);
