// moe_permute and moe_unpermute on the CPU: every pass goes over the tokens, reads a token's row once and reads or
// writes its K rows in expert order.
//
// Replaces argsort -> index_select and index_select -> multiply -> sum, with sums in float32 in the order k = 0, 1, ...
// A slot outside [0, N * K) is one that was dropped.
#include "moe_permute.h"

#include "cpu/expert_order.h"
#include "cpu/launch.h"
#include "cpu/loops.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {
namespace {

template <typename T, bool kStream>
void permute(const MoePermuteFwdParams& p) {
  const int64_t pairs = p.tokens * p.top_k;
  order_by_expert(p.indices, pairs, p.experts, p.capacity, p.slots, p.offsets);
  T* rows = static_cast<T*>(p.rows);
  parallel_range(p.tokens, (1 + p.top_k) * p.cols, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
      for (int64_t k = 0; k < p.top_k; ++k) {
        const int64_t slot = p.slots[token * p.top_k + k];
        if (slot >= 0) put_row<kStream>(rows + slot * p.cols, x, p.cols);
      }
    }
    stream_fence();
  });
  const int64_t used = p.experts == 0 ? 0 : p.offsets[p.experts - 1];
  parallel_range(pairs - used, p.cols, [&](int64_t begin, int64_t end) {
    for (int64_t row = used + begin; row < used + end; ++row) clear(rows + row * p.cols, p.cols);
  });
}

template <typename T, bool kStream>
void unpermute_backward(const MoeUnpermuteBwdParams& p) {
  const int64_t pairs = p.tokens * p.top_k;
  T* dy = static_cast<T*>(p.dy);
  // Rows that no slot names get no gradient: marked first, in the order of memory.
  uint8_t* named = scratch<uint8_t>(0, pairs);
  for (int64_t row = 0; row < pairs; ++row) named[row] = 0;
  for (int64_t i = 0; i < pairs; ++i)
    if (p.slots[i] >= 0 && p.slots[i] < pairs) named[p.slots[i]] = 1;
  parallel_range(pairs, p.cols, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      if (!named[row]) clear(dy + row * p.cols, p.cols);
  });
  parallel_range(p.tokens, (1 + 2 * p.top_k) * p.cols, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const T* dout = static_cast<const T*>(p.dout) + token * p.dout_stride;
      for (int64_t i = token * p.top_k; i < (token + 1) * p.top_k; ++i) {
        const int64_t slot = p.slots[i];
        p.dweights[i] = 0.0f;
        if (slot < 0 || slot >= pairs) continue;
        const T* y = static_cast<const T*>(p.y) + slot * p.y_stride;
        const vf weight = set1(p.weights[i]);
        double total = 0.0;  // emptied into per block, so that the error does not grow with the length of the row
        constexpr int64_t kBlock = 128 * kLanes;
        for (int64_t block = 0; block < p.cols; block += kBlock) {
          const int64_t length = p.cols - block < kBlock ? p.cols - block : kBlock;
          vf dot = zero();
          const auto product = [&](int64_t c, auto n) {
            const vf d = fetch_n(dout + c, n);
            dot = fma(d, fetch_n(y + c, n), dot);
            return d * weight;
          };
          T* to = dy + slot * p.cols;
          int64_t c = block;
          for (; c + 2 * kLanes <= block + length; c += 2 * kLanes) {
            const vf first = product(c, Full{}), second = product(c + kLanes, Full{});
            put_pair<kStream>(to + c, first, second);
          }
          for_vectors(c, block + length, [&](int64_t i, auto n) { store_n(to + i, product(i, n), n); });
          total += reduce_add(dot);
        }
        p.dweights[i] = static_cast<float>(total);
      }
    }
    stream_fence();
  });
}

}  // namespace

void moe_permute_fwd(const MoePermuteFwdParams& p) {
  GK_SWITCH_DTYPE(p.dtype, T, {
    if (should_stream(static_cast<T*>(p.rows), p.cols, p.tokens * p.top_k * p.cols * static_cast<int64_t>(sizeof(T))))
      permute<T, true>(p);
    else
      permute<T, false>(p);
  });
}

void moe_permute_bwd(const MoePermuteBwdParams& p) {
  GK_SWITCH_DTYPE(p.dtype, T,
                  (weighted_sum<false>(p.tokens, p.top_k, p.cols, static_cast<const T*>(p.drows), p.drows_stride,
                                       nullptr, p.slots, static_cast<T*>(p.dx))));
}

void moe_unpermute_fwd(const MoeUnpermuteFwdParams& p) {
  GK_SWITCH_DTYPE(p.dtype, T,
                  (weighted_sum<true>(p.tokens, p.top_k, p.cols, static_cast<const T*>(p.y), p.y_stride, p.weights,
                                      p.slots, static_cast<T*>(p.out))));
}

void moe_unpermute_bwd(const MoeUnpermuteBwdParams& p) {
  GK_SWITCH_DTYPE(p.dtype, T, {
    if (should_stream(static_cast<T*>(p.dy), p.cols, p.tokens * p.top_k * p.cols * static_cast<int64_t>(sizeof(T))))
      unpermute_backward<T, true>(p);
    else
      unpermute_backward<T, false>(p);
  });
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(moe_permute_fwd, MoePermuteFwdParams);
GK_CPU_LAUNCHER(moe_permute_bwd, MoePermuteBwdParams);
GK_CPU_LAUNCHER(moe_unpermute_fwd, MoeUnpermuteFwdParams);
GK_CPU_LAUNCHER(moe_unpermute_bwd, MoeUnpermuteBwdParams);
