// rotary on the CPU. Su et al., "RoFormer" (2021).
//
// q and k (B, T, H, D) token by token in one region: a token's row of the tables is read once and serves all its heads,
// of q and of k. The positions are made explicit and checked first, so that no loop below can leave the tables.
// Interleaved pairs need no shuffle across lanes: y = x * (c0 c0 c1 c1 ..) + swapped(x) * (-s0 s0 -s1 s1 ..), with the
// spread tables built once per token.
#include "rotary.h"

#include "cpu/launch.h"
#include "cpu/loops.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {
namespace {

// The row of the tables for each of the B * T tokens. Returns the first token without one, or -1.
int64_t table_rows(const RotaryParams& p, int64_t* rows) {
  const int64_t total = p.batch * p.tokens;
  if (p.position_per_token) {
    for (int64_t n = 0; n < total; ++n) rows[n] = p.positions[n];
  } else {
    for (int64_t s = 0; s < p.sequences; ++s) {
      const int64_t begin = p.cu_seqlens == nullptr ? s * p.tokens : p.cu_seqlens[s];
      const int64_t end = p.cu_seqlens == nullptr ? begin + p.tokens : p.cu_seqlens[s + 1];
      const int64_t first = p.positions == nullptr ? p.offset : p.positions[s];
      for (int64_t n = begin; n < end; ++n) rows[n] = first + (n - begin);
    }
  }
  const uint64_t limit = static_cast<uint64_t>(p.max_position);
  bool inside = true;
  for (int64_t n = 0; n < total; ++n) inside &= static_cast<uint64_t>(rows[n]) < limit;
  if (inside) return -1;
  int64_t n = 0;
  while (static_cast<uint64_t>(rows[n]) < limit) ++n;
  return n;
}

// x[1], x[0], x[3], x[2], ...: each pair as one 64-bit lane, rotated by half.
vf swap_pairs(vf x) {
  using vu64 [[gnu::vector_size(4 * kLanes)]] = uint64_t;
  const vu64 u = reinterpret_cast<vu64>(x);
  return reinterpret_cast<vf>((u << 32) | (u >> 32));
}

// What does not turn: D - R elements.
template <typename T>
void copy(const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i];
}

// Pairs (i, i + half).
template <bool kStream, typename T>
void turn_halves(const T* x, T* y, const float* cos, const float* sin, int64_t half) {
  int64_t first = 0;
  for (; first + 2 * kLanes <= half; first += 2 * kLanes) {
    const VfPair a = fetch_pair(x + first), b = fetch_pair(x + half + first);
    const VfPair c = load_pair(cos + first), s = load_pair(sin + first);
    put_pair<kStream>(y + first, fnma(b.first, s.first, a.first * c.first),
                      fnma(b.second, s.second, a.second * c.second));
    put_pair<kStream>(y + half + first, fma(a.first, s.first, b.first * c.first),
                      fma(a.second, s.second, b.second * c.second));
  }
  for_vectors(first, half, [&](int64_t i, auto n) {
    const vf a = load_n(x + i, n), b = load_n(x + half + i, n);
    const vf c = load_n(cos + i, n), s = load_n(sin + i, n);
    store_n(y + i, fnma(b, s, a * c), n);
    store_n(y + half + i, fma(a, s, b * c), n);
  });
}

// Pairs (2i, 2i + 1), with the spread tables.
template <bool kStream, typename T>
void turn_neighbours(const T* x, T* y, const float* cos, const float* sin, int64_t rotated) {
  int64_t first = 0;
  for (; first + 2 * kLanes <= rotated; first += 2 * kLanes) {
    const VfPair v = fetch_pair(x + first), c = load_pair(cos + first), s = load_pair(sin + first);
    put_pair<kStream>(y + first, fma(swap_pairs(v.first), s.first, v.first * c.first),
                      fma(swap_pairs(v.second), s.second, v.second * c.second));
  }
  for_vectors(first, rotated, [&](int64_t i, auto n) {
    const vf v = load_n(x + i, n);
    store_n(y + i, fma(swap_pairs(v), load_n(sin + i, n), v * load_n(cos + i, n)), n);
  });
}

template <typename T, bool kInterleaved, bool kStream>
void turn_heads(const RotaryParams& p, const RotaryTensor& t, int64_t b, int64_t token, const float* cos,
                const float* sin) {
  if (t.x == nullptr) return;
  const T* x = static_cast<const T*>(t.x) + b * t.x_batch + token * t.x_token;
  T* y = static_cast<T*>(t.y) + b * t.y_batch + token * t.y_token;
  for (int64_t head = 0; head < t.heads; ++head, x += t.x_head, y += t.y_head) {
    if constexpr (kInterleaved)
      turn_neighbours<kStream>(x, y, cos, sin, p.rotated);
    else
      turn_halves<kStream>(x, y, cos, sin, p.rotated / 2);
    if (x != y) copy(x + p.rotated, y + p.rotated, p.dim - p.rotated);
  }
}

template <typename T, bool kInterleaved, bool kStream>
void turn(const RotaryParams& p, const int64_t* rows) {
  const int64_t half = p.rotated / 2;
  const float sign = p.inverse ? -1.0f : 1.0f;
  parallel_range(p.batch * p.tokens, (p.q.heads + p.k.heads) * p.dim, [&](int64_t begin, int64_t end) {
    float* spread = scratch<float>(1, 2 * p.rotated);  // this token's cos and sin in the order the loops read them
    for (int64_t n = begin; n < end; ++n) {
      const float* cos = p.cos + rows[n] * half;
      const float* sin = p.sin + rows[n] * half;
      float* c = spread;
      float* s = spread + p.rotated;
      if constexpr (kInterleaved) {
        for (int64_t i = 0; i < half; ++i) {
          c[2 * i] = c[2 * i + 1] = cos[i];
          s[2 * i] = -sign * sin[i];
          s[2 * i + 1] = sign * sin[i];
        }
      } else {
        for (int64_t i = 0; i < half; ++i) {
          c[i] = cos[i];
          s[i] = sign * sin[i];
        }
      }
      turn_heads<T, kInterleaved, kStream>(p, p.q, n / p.tokens, n % p.tokens, c, s);
      turn_heads<T, kInterleaved, kStream>(p, p.k, n / p.tokens, n % p.tokens, c, s);
    }
    stream_fence();
  });
}

// Whether what is written leaves the caches and may be written past them: not in place, where the lines are there
// already, and where each half of every head begins a cache line.
template <typename T>
bool streams(const RotaryParams& p) {
  const int64_t step = (p.interleaved ? p.rotated : p.rotated / 2) * static_cast<int64_t>(sizeof(T));
  const auto aligned = [&](const RotaryTensor& t) {
    return t.x == nullptr || (t.x != t.y && should_stream(static_cast<T*>(t.y), t.y_head, kStreamBytes) &&
                              (t.y_token | t.y_batch) * static_cast<int64_t>(sizeof(T)) % 64 == 0);
  };
  const int64_t bytes = p.batch * p.tokens * (p.q.heads + p.k.heads) * p.dim * static_cast<int64_t>(sizeof(T));
  return bytes >= kStreamBytes && step % 64 == 0 && aligned(p.q) && aligned(p.k);
}

}  // namespace

void rotary(const RotaryParams& p) {
  int64_t* rows = scratch<int64_t>(0, p.batch * p.tokens);
  *p.outside = table_rows(p, rows);
  if (*p.outside >= 0) return;
  GK_SWITCH_DTYPE(p.dtype, T, {
    const bool stream = streams<T>(p);
    if (p.interleaved)
      stream ? turn<T, true, true>(p, rows) : turn<T, true, false>(p, rows);
    else
      stream ? turn<T, false, true>(p, rows) : turn<T, false, false>(p, rows);
  });
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(rotary, RotaryParams);
