// merge_attention_states on the CPU: o = s1 o1 + s2 o2, lse = log(e^lse1 + e^lse2), s_i = e^(lse_i - lse).
//
// Token by token; the shares of kLanes heads are computed at once, so that the exponentials cost little beside the rows
// they weigh. Where both states are dead (lse -inf) the shares are 0, the result is 0 with lse -inf, and so is every
// gradient. (The merge is that of online softmax: Milakov and Gimelshein, arXiv:1805.02867.)
#include "merge_attention_states.h"

#include "cpu/launch.h"
#include "cpu/loops.h"
#include "cpu/parallel.h"
#include "cpu/simd_math.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {
namespace {

constexpr float kInfinity = __builtin_inff();

// kLanes heads from `head` on, or what is left of them, of one token.
struct Heads {
  int64_t batch, token, head;
  int count;

  vf gather(const float* p, const MergeStrides& s) const {
    p += batch * s.batch + token * s.token + head * s.head;
    vf x = set1(-kInfinity);
    for (int i = 0; i < count; ++i) x[i] = p[i * s.head];
    return x;
  }
  void scatter(float* p, const MergeStrides& s, vf x) const {
    p += batch * s.batch + token * s.token + head * s.head;
    for (int i = 0; i < count; ++i) p[i * s.head] = x[i];
  }
  // The row of head i.
  template <typename T>
  T* row(T* p, const MergeStrides& s, int i) const {
    return p + batch * s.batch + token * s.token + (head + i) * s.head;
  }
};

struct Shares {
  vf first, second, lse;
};

Shares shares(vf lse1, vf lse2) {
  const vf larger = max(lse1, lse2);
  const vf top = select(larger == -kInfinity, zero(), larger);
  const vf first = exp(lse1 - top), second = exp(lse2 - top);
  const vf sum = first + second;
  const vmask dead = sum == 0.0f;
  const vf divisor = select(dead, set1(1.0f), sum);
  return {first / divisor, second / divisor, select(dead, set1(-kInfinity), top + log(sum))};
}

// body(heads) for all heads of all tokens. cost: floats touched per element of D.
template <typename Params, typename Body>
void over_heads(const Params& p, int64_t cost, const Body& body) {
  parallel_range(p.batch * p.tokens, p.heads * (p.dim + 8) * cost, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t head = 0; head < p.heads; head += kLanes) {
        const int64_t left = p.heads - head;
        body(Heads{n / p.tokens, n % p.tokens, head, static_cast<int>(left < kLanes ? left : kLanes)});
      }
    stream_fence();
  });
}

// Of contiguous (B, T, H, D) and (B, H, T).
template <typename Params>
MergeStrides dense_rows(const Params& p) {
  return {p.tokens * p.heads * p.dim, p.heads * p.dim, p.dim};
}
template <typename Params>
MergeStrides dense_statistics(const Params& p) {
  return {p.heads * p.tokens, 1, p.tokens};
}

template <typename T, bool kStream>
void forward(const MergeAttentionStatesFwdParams& p) {
  const MergeStrides rows = dense_rows(p), statistics = dense_statistics(p);
  over_heads(p, 3, [&](const Heads& heads) {
    const Shares s = shares(heads.gather(p.lse1, p.lse1_stride), heads.gather(p.lse2, p.lse2_stride));
    heads.scatter(p.lse, statistics, s.lse);
    for (int i = 0; i < heads.count; ++i) {
      const T* o1 = heads.row(static_cast<const T*>(p.o1), p.o1_stride, i);
      const T* o2 = heads.row(static_cast<const T*>(p.o2), p.o2_stride, i);
      T* o = heads.row(static_cast<T*>(p.o), rows, i);
      const vf first = set1(s.first[i]), second = set1(s.second[i]);
      int64_t d = 0;
      for (; d + 2 * kLanes <= p.dim; d += 2 * kLanes) {
        const VfPair x1 = fetch_pair(o1 + d), x2 = fetch_pair(o2 + d);
        put_pair<kStream>(o + d, fma(first, x1.first, second * x2.first), fma(first, x1.second, second * x2.second));
      }
      for_vectors(d, p.dim, [&](int64_t c, auto n) {
        store_n(o + c, fma(first, load_n(o1 + c, n), second * load_n(o2 + c, n)), n);
      });
    }
  });
}

// With delta = dout . (o1 - o2):  do_i = s_i dout,  dlse1 = s1 (dlse + s2 delta),  dlse2 = s2 (dlse - s1 delta).
template <typename T, bool kStream>
void backward(const MergeAttentionStatesBwdParams& p) {
  const MergeStrides rows = dense_rows(p), statistics = dense_statistics(p);
  over_heads(p, 5, [&](const Heads& heads) {
    const Shares s = shares(heads.gather(p.lse1, p.lse1_stride), heads.gather(p.lse2, p.lse2_stride));
    vf delta = zero();
    for (int i = 0; i < heads.count; ++i) {
      const T* dout = heads.row(static_cast<const T*>(p.dout), p.dout_stride, i);
      const T* o1 = heads.row(static_cast<const T*>(p.o1), p.o1_stride, i);
      const T* o2 = heads.row(static_cast<const T*>(p.o2), p.o2_stride, i);
      T* do1 = heads.row(static_cast<T*>(p.do1), rows, i);
      T* do2 = heads.row(static_cast<T*>(p.do2), rows, i);
      const vf first = set1(s.first[i]), second = set1(s.second[i]);
      vf sum = zero();
      int64_t d = 0;
      for (; d + 2 * kLanes <= p.dim; d += 2 * kLanes) {
        const VfPair g = fetch_pair(dout + d), x1 = fetch_pair(o1 + d), x2 = fetch_pair(o2 + d);
        sum = fma(g.first, x1.first - x2.first, sum);
        sum = fma(g.second, x1.second - x2.second, sum);
        put_pair<kStream>(do1 + d, first * g.first, first * g.second);
        put_pair<kStream>(do2 + d, second * g.first, second * g.second);
      }
      for_vectors(d, p.dim, [&](int64_t c, auto n) {
        const vf g = load_n(dout + c, n);
        sum = fma(g, load_n(o1 + c, n) - load_n(o2 + c, n), sum);
        store_n(do1 + c, first * g, n);
        store_n(do2 + c, second * g, n);
      });
      delta[i] = reduce_add(sum);
    }
    const vf dlse = p.dlse == nullptr ? zero() : heads.gather(p.dlse, p.dlse_stride);
    heads.scatter(p.dlse1, statistics, s.first * fma(s.second, delta, dlse));
    heads.scatter(p.dlse2, statistics, s.second * fnma(s.first, delta, dlse));
  });
}

}  // namespace

void merge_attention_states_fwd(const MergeAttentionStatesFwdParams& p) {
  GK_SWITCH_DTYPE(p.dtype, T, {
    const int64_t bytes = p.batch * p.tokens * p.heads * p.dim * static_cast<int64_t>(sizeof(T));
    if (should_stream(static_cast<T*>(p.o), p.dim, bytes))
      forward<T, true>(p);
    else
      forward<T, false>(p);
  });
}

void merge_attention_states_bwd(const MergeAttentionStatesBwdParams& p) {
  GK_SWITCH_DTYPE(p.dtype, T, {
    const int64_t bytes = p.batch * p.tokens * p.heads * p.dim * static_cast<int64_t>(sizeof(T));
    if (should_stream(static_cast<T*>(p.do1), p.dim, bytes) && should_stream(static_cast<T*>(p.do2), p.dim, bytes))
      backward<T, true>(p);
    else
      backward<T, false>(p);
  });
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(merge_attention_states_fwd, MergeAttentionStatesFwdParams);
GK_CPU_LAUNCHER(merge_attention_states_bwd, MergeAttentionStatesBwdParams);
