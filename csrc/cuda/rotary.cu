// rotary: rotary position embedding of q and k (B, T, H, D) in one launch. Su et al., "RoFormer" (2021).
//
// One block per token. A thread takes a unit of two 16-byte vectors whose pairs share their columns of the tables, and
// the same unit of head after head, of q and of k, so that its cosines and sines are read once. It has read both
// vectors before it writes either: in place needs nothing else. Nothing is known on the host about positions: a token
// without a row in the tables, or in no sequence, gets NaN in what turns, and nothing is read for it outside.
#include "cuda/vector.cuh"
#include "rotary.h"

namespace grokkernels {
namespace {

using namespace device;

constexpr int kThreads = 128, kHeads = 2;  // heads that a thread reads before it writes

// The row of the tables for token `token` of sequence `batch`; or of a packed tensor. Below 0: none.
GK_DEVICE int64_t table_row(const RotaryParams& p, int64_t batch, int64_t token) {
  if (p.position_per_token) {
    const int64_t row = p.positions[batch * p.tokens + token];
    return row < p.max_position ? row : -1;
  }
  int64_t sequence = batch, place = token;
  if (p.cu_seqlens != nullptr) {
    int64_t end = p.sequences;  // the last sequence that begins at or before the token is in [sequence, end)
    while (end - sequence > 1) {
      const int64_t middle = sequence + (end - sequence) / 2;
      (p.cu_seqlens[middle] <= token ? sequence : end) = middle;
    }
    if (end == 0 || token < p.cu_seqlens[sequence] || token >= p.cu_seqlens[sequence + 1]) return -1;
    place -= p.cu_seqlens[sequence];
  }
  // Of any position whatever, without overflow.
  const uint64_t first = static_cast<uint64_t>(p.positions == nullptr ? p.offset : p.positions[sequence]);
  const int64_t row = static_cast<int64_t>(first + static_cast<uint64_t>(place));
  return row < p.max_position ? row : -1;
}

// kWidth elements as they are in memory, a whole vector or one.
template <int kWidth, typename T>
struct Elements {
  std::conditional_t<kWidth == 1, T, Words4> raw;

  GK_DEVICE void load(const T* p) {
    if constexpr (kWidth == 1)
      raw = *p;
    else
      raw = load_16(p);
  }
  GK_DEVICE void widen(float (&x)[kWidth]) const {
    if constexpr (kWidth == 1)
      x[0] = device::widen(raw);
    else
      unpack(raw, x, T{});
  }
  GK_DEVICE static void store(T* p, const float (&x)[kWidth]) {
    if constexpr (kWidth == 1)
      *p = narrow<T>(x[0]);
    else
      store_vector(p, x);
  }
};

// kWidth neighbouring columns of a table.
template <int kWidth>
GK_DEVICE void load_table(const float* p, float (&x)[kWidth]) {
  if constexpr (kWidth == 1) {
    x[0] = *p;
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; j += 4) {
      const Words4 words = load_16_readonly(p + j);
#pragma unroll
      for (int k = 0; k < 4; ++k) x[j + k] = bits_to_float(words.word[k]);
    }
  }
}

GK_DEVICE void turn(float& a, float& b, float cos, float sin) {
  const float first = fmaf(-b, sin, a * cos);
  b = fmaf(a, sin, b * cos);
  a = first;
}

template <typename T, bool kInterleaved, int kWidth>
__global__ void __launch_bounds__(kThreads, 6) rotary_kernel(const __grid_constant__ RotaryParams p) {
  const unsigned tokens = static_cast<unsigned>(p.tokens);
  const int64_t batch = blockIdx.x / tokens, token = blockIdx.x % tokens;
  const int64_t half = p.rotated / 2, row = table_row(p, batch, token);
  const int64_t heads = p.q.heads + (p.k.x == nullptr ? 0 : p.k.heads);
  const auto of_head = [&](int64_t head, const T*& x, T*& y) {
    const bool is_k = head >= p.q.heads;
    const RotaryTensor& t = is_k ? p.k : p.q;
    const int64_t h = is_k ? head - p.q.heads : head;
    x = static_cast<const T*>(t.x) + batch * t.x_batch + token * t.x_token + h * t.x_head;
    y = static_cast<T*>(t.y) + batch * t.y_batch + token * t.y_token + h * t.y_head;
  };

  for (int64_t unit = threadIdx.x; unit < half / kWidth; unit += blockDim.x) {
    float cos[kWidth], sin[kWidth];
    if (row >= 0) {
      load_table(p.cos + row * half + unit * kWidth, cos);
      load_table(p.sin + row * half + unit * kWidth, sin);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) cos[j] = sin[j] = bits_to_float(0x7FC00000u);
    }
    if (p.inverse) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sin[j] = -sin[j];
    }
    const int64_t one = kInterleaved ? 2 * unit * kWidth : unit * kWidth;
    const int64_t other = one + (kInterleaved ? kWidth : half);
    for (int64_t begin = threadIdx.y; begin < heads; begin += kHeads * blockDim.y) {
      Elements<kWidth, T> ones[kHeads], others[kHeads];
      T* y[kHeads];
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        const int64_t head = begin + i * blockDim.y;
        if (head >= heads) break;
        const T* x;
        of_head(head, x, y[i]);
        ones[i].load(x + one);
        others[i].load(x + other);
      }
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        if (begin + i * blockDim.y >= heads) break;
        float a[kWidth], b[kWidth];
        ones[i].widen(a);
        others[i].widen(b);
        if constexpr (kInterleaved && kWidth > 1) {
#pragma unroll
          for (int j = 0; j < kWidth / 2; ++j) {
            turn(a[2 * j], a[2 * j + 1], cos[j], sin[j]);
            turn(b[2 * j], b[2 * j + 1], cos[kWidth / 2 + j], sin[kWidth / 2 + j]);
          }
        } else {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) turn(a[j], b[j], cos[j], sin[j]);
        }
        Elements<kWidth, T>::store(y[i] + one, a);
        Elements<kWidth, T>::store(y[i] + other, b);
      }
    }
  }

  for (int64_t head = threadIdx.y; head < heads; head += blockDim.y) {  // what does not turn
    const T* x;
    T* y;
    of_head(head, x, y);
    if (x == y) continue;
    for (int64_t c = p.rotated + threadIdx.x * kWidth; c < p.dim; c += blockDim.x * kWidth) {
      Elements<kWidth, T> some;
      some.load(x + c);
      float v[kWidth];
      some.widen(v);
      some.store(y + c, v);
    }
  }
}

// Whether a tensor can be read and written in 16-byte vectors.
template <typename T>
bool aligned(const RotaryTensor& t) {
  return t.x == nullptr || (vectorizable<T>(t.x, t.x_head) && vectorizable<T>(t.y, t.y_head) &&
                            (t.x_batch | t.x_token | t.y_batch | t.y_token) % kVector<T> == 0);
}

template <typename T, bool kInterleaved, int kWidth>
void turn_all(const RotaryParams& p, Stream stream) {
  const int64_t units = p.rotated / 2 / kWidth, heads = p.q.heads + (p.k.x == nullptr ? 0 : p.k.heads);
  const int64_t x = units < 1 ? 1 : units > 64 ? 64 : units;
  const int64_t y = heads < kThreads / x ? heads : kThreads / x;
  launch(rotary_kernel<T, kInterleaved, kWidth>,
         {.grid = {static_cast<unsigned>(heads == 0 ? 0 : p.batch * p.tokens)},
          .block = {static_cast<unsigned>(x), static_cast<unsigned>(y)}},
         stream, p);
}

template <typename T, bool kInterleaved>
void turn_any(const RotaryParams& p, Stream stream) {
  const int64_t half = p.rotated / 2;
  const bool vectors = aligned<T>(p.q) && aligned<T>(p.k) && vectorizable<T>(p.cos, half) &&
                       vectorizable<T>(p.sin, half) && p.dim % kVector<T> == 0;
  if (vectors)
    turn_all<T, kInterleaved, kVector<T>>(p, stream);
  else
    turn_all<T, kInterleaved, 1>(p, stream);
}

}  // namespace

void rotary_cuda(const RotaryParams& p, Stream stream) {
  GK_SWITCH_DTYPE(p.dtype, T, {
    if (p.interleaved)
      turn_any<T, true>(p, stream);
    else
      turn_any<T, false>(p, stream);
  });
}

}  // namespace grokkernels
