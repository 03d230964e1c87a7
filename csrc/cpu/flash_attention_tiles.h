// What both passes of flash_attention on the CPU share: sequences, which keys a query sees, and tiles in float32.
//
// Rows: the G = H / Hkv query heads that share a kv head are folded into the query rows, row = t * G + (head in group),
// so that k and v are read once per kv head.
#pragma once

#include <cstdint>

#include "cpu/launch.h"
#include "cpu/simd.h"
#include "cpu/simd_math.h"
#include "cpu/transpose.h"
#include "flash_attention.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

GK_ALWAYS_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
GK_ALWAYS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
GK_ALWAYS_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct KeyRange {
  int64_t begin, end;
};

// Sequence b of the problem.
struct Sequence {
  int64_t b;
  int64_t queries, keys;           // T, S
  int64_t first_query, first_key;  // its first row where sequences are packed, else 0
  int64_t start;                   // position of its first query
  int64_t left, right;

  GK_ALWAYS_INLINE Sequence(const FlashAttentionProblem& p, int64_t index) : b(index) {
    const bool packed = p.cu_seqlens_q != nullptr;
    first_query = packed ? p.cu_seqlens_q[b] : 0;
    first_key = packed ? p.cu_seqlens_k[b] : 0;
    queries = packed ? p.cu_seqlens_q[b + 1] - first_query : p.queries;
    keys = packed ? p.cu_seqlens_k[b + 1] - first_key : p.keys;
    start = p.q_start != nullptr ? p.q_start[b] : keys - queries;
    left = p.left;
    right = p.right;
  }

  // The keys that query t sees; both ends grow with t.
  GK_ALWAYS_INLINE KeyRange visible(int64_t t) const {
    const int64_t i = start + t;
    const int64_t begin = left < 0 || i - left < 0 ? 0 : least(i - left, keys);
    const int64_t end = right < 0 || i + right >= keys ? keys : most(i + right + 1, 0);
    return {begin, end};
  }
  // The keys that any of the queries first .. last sees; nothing in between is unseen.
  GK_ALWAYS_INLINE KeyRange visible(int64_t first, int64_t last) const {
    return {visible(first).begin, visible(last).end};
  }
};

// Offset of (sequence, head)'s first entry in lse, whose entries lie one apart.
GK_ALWAYS_INLINE int64_t lse_offset(const FlashAttentionProblem& p, const Sequence& s, int64_t head) {
  return p.cu_seqlens_q != nullptr ? head * p.queries + s.first_query : (s.b * p.heads + head) * p.queries;
}

// The rows of one sequence and kv head in a tensor: `group` adjacent heads from `head` on, folded.
struct FoldedRows {
  const void* data;
  int64_t offset;  // elements
  int64_t row_stride, head_stride, group;

  GK_ALWAYS_INLINE int64_t at(int64_t row) const {
    return group == 1 ? offset + row * row_stride : offset + row / group * row_stride + row % group * head_stride;
  }
};

GK_ALWAYS_INLINE FoldedRows folded(const AttentionTensor& x, const Sequence& s, int64_t first_row, int64_t head,
                                   int64_t group) {
  return {x.data, s.b * x.batch_stride + first_row * x.row_stride + head * x.head_stride, x.row_stride, x.head_stride,
          group};
}

// Rows lie far apart, where the hardware's prefetchers do not follow.
inline constexpr int64_t kRowsAhead = 8;
template <typename T>
GK_ALWAYS_INLINE void prefetch_row(const T* x, int64_t cols) {
  for (int64_t c = 0; c < cols; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(x + c);
}

// tile (count, stride) = rows first .. first + count in float32; columns from cols to the next whole vector are zero.
template <typename T>
void load_rows(const FoldedRows& rows, int64_t first, int64_t count, int64_t cols, float* tile, int64_t stride) {
  for (int64_t r = 0; r < count; ++r) {
    const T* x = static_cast<const T*>(rows.data) + rows.at(first + r);
    float* y = tile + r * stride;
    if (rows.group == 1) prefetch_row(x + kRowsAhead * rows.row_stride, cols);
    int64_t c = 0;
    for (; c + kLanes <= cols; c += kLanes) store(y + c, load(x + c));
    if (c < cols) store(y + c, load_n(x + c, static_cast<int>(cols - c)));
  }
}

// tile (cols, stride) = rows first .. first + count transposed, count in whole vectors. Rows outside `valid` (which
// holds at least one) are zero and not read.
template <typename T>
void load_columns(const FoldedRows& rows, int64_t first, int64_t count, KeyRange valid, int64_t cols, float* tile,
                  int64_t stride) {
  for (int64_t r = 0; r < count; r += kLanes) {
    const T* x[kLanes];
    for (int i = 0; i < kLanes; ++i)  // of a row outside read the nearest one inside, zeroed below
      x[i] = static_cast<const T*>(rows.data) + rows.at(least(most(first + r + i, valid.begin), valid.end - 1));
    const vi row = lane_index() + static_cast<int32_t>(r);
    const vmask inside =
        (row >= static_cast<int32_t>(valid.begin - first)) & (row < static_cast<int32_t>(valid.end - first));
    for (int64_t c = 0; c < cols; c += kLanes) {
      const int n = static_cast<int>(least(cols - c, kLanes));
      vf block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = n == kLanes ? load(x[i] + c) : load_n(x[i] + c, n);
      transpose(block);
      for (int i = 0; i < n; ++i) store(tile + (c + i) * stride + r, select(inside, block[i], vf{}));
    }
  }
}

// A tile's rows as the tensor's dtype: row i of the tile, divided by divisor[i] where divisors are given.
template <typename T>
void store_rows(const float* tile, int64_t stride, const float* divisor, int64_t count, int64_t cols, void* data,
                const FoldedRows& rows, int64_t first) {
  for (int64_t r = 0; r < count; ++r) {
    T* y = static_cast<T*>(data) + rows.at(first + r);
    const float* x = tile + r * stride;
    const vf d = set1(divisor == nullptr ? 1.0f : divisor[r]);
    int64_t c = 0;
    for (; c + kLanes <= cols; c += kLanes) store(y + c, load(x + c) / d);
    if (c < cols) store_n(y + c, load(x + c) / d, static_cast<int>(cols - c));
  }
}

// What the score of each row of a tile depends on, beside q and k.
struct RowFacts {
  int32_t begin, end;  // keys it sees
  int32_t position;
  float temperature;  // 1 where there is none
  float slope;        // 0 where there is none
};

// Whether scores need more than scale and masks.
GK_ALWAYS_INLINE bool plain_scores(const FlashAttentionProblem& p) {
  return p.softcap == 0.0f && p.temperature_len == 0 && p.alibi_slopes == nullptr;
}

// What q.k is multiplied by: with a softcap the argument of tanh.
GK_ALWAYS_INLINE float score_scale(const FlashAttentionProblem& p) {
  return p.softcap > 0.0f ? p.scale / p.softcap : p.scale;
}

// The scores of such a product, capped, with the temperature's factor and the ALiBi bias. (A copy of what it takes from
// the problem: a compiler cannot know that storing scores leaves the problem as it is.)
struct FullScores {
  float softcap;
  bool positional;

  GK_ALWAYS_INLINE explicit FullScores(const FlashAttentionProblem& p)
      : softcap(p.softcap), positional(p.temperature_len > 0 || p.alibi_slopes != nullptr) {}

  GK_ALWAYS_INLINE vf operator()(vf s, vi key, vi position, vf temperature, vf slope) const {
    if (softcap > 0.0f) s = softcap * tanh(s);
    return positional ? fnma(slope, abs(to_float(position - key)), s * temperature) : s;
  }
};

GK_ALWAYS_INLINE RowFacts row_facts(const FlashAttentionProblem& p, const Sequence& s, int64_t kv_head, int64_t row) {
  const int64_t group = p.heads / p.kv_heads, t = row / group, head = kv_head * group + row % group;
  const KeyRange keys = s.visible(t);
  const int64_t i = s.start + t;
  RowFacts facts{static_cast<int32_t>(keys.begin), static_cast<int32_t>(keys.end), static_cast<int32_t>(i), 1.0f, 0.0f};
  if (p.temperature_len > 0 && i > p.temperature_len)
    facts.temperature = static_cast<float>(__builtin_log2(static_cast<double>(i)) /
                                           __builtin_log2(static_cast<double>(p.temperature_len)));
  if (p.alibi_slopes != nullptr) facts.slope = p.alibi_slopes[s.b * p.alibi_batch_stride + head];
  return facts;
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
