// What every kernel of flash_attention asks of its problem: which sequence a block serves, which keys a query sees,
// where rows lie in memory.
//
// Rows: the G = H / Hkv query heads that share a kv head are folded into the query rows, row = t * G + (head in group),
// so that k and v are read once for all of them.
#pragma once

#include <device/core.cuh>

#include "flash_attention.h"

namespace grokkernels::attention {

GK_DEVICE int least(int a, int b) { return a < b ? a : b; }
GK_DEVICE int most(int a, int b) { return a > b ? a : b; }
GK_DEVICE int clamp(int64_t x, int low, int high) { return x < low ? low : x > high ? high : static_cast<int>(x); }

// An entry of cu_seqlens. The host cannot look at it, so whatever stands there leads to no row outside the tensor.
GK_DEVICE int offset_at(const int32_t* offsets, int b, int64_t total) {
  return clamp(offsets[b], 0, static_cast<int>(total));
}

struct KeyRange {
  int begin, end;
};

// Sequence b of the problem; the last one of packed sequences, b == batch, is the rows that belong to none.
struct Sequence {
  int b;
  int queries, keys;               // T, S
  int64_t first_query, first_key;  // its first row where sequences are packed, else 0
  int64_t start;                   // position of its first query
  int64_t left, right;
  bool outside;  // belongs to none: sees nothing and is not seen

  GK_DEVICE Sequence(const FlashAttentionProblem& p, int index) : b(index) {
    queries = static_cast<int>(p.queries);
    keys = static_cast<int>(p.keys);
    first_query = first_key = start = 0;
    left = p.left;
    right = p.right;
    outside = index == p.batch;
    if (p.cu_seqlens_q != nullptr) {
      first_query = offset_at(p.cu_seqlens_q, b, p.queries);
      first_key = offset_at(p.cu_seqlens_k, b, p.keys);
      if (!outside) {
        queries = offset_at(p.cu_seqlens_q, b + 1, p.queries);
        keys = offset_at(p.cu_seqlens_k, b + 1, p.keys);
      }
      queries = most(queries - static_cast<int>(first_query), 0);
      keys = most(keys - static_cast<int>(first_key), 0);
    }
    if (!outside) start = p.q_start != nullptr ? p.q_start[b] : keys - queries;
  }

  // The keys that query t sees; both ends grow with t.
  GK_DEVICE KeyRange visible(int t) const {
    if (outside) return {0, 0};
    const int64_t i = start + t;
    return {left < 0 ? 0 : clamp(i - left, 0, keys), right < 0 ? keys : clamp(i + right + 1, 0, keys)};
  }

  // The queries that see any of the keys [first, last]; a query in between may see none of them, where keys end.
  GK_DEVICE KeyRange seen_by(int first, int last) const {
    if (outside) return {0, 0};
    return {right < 0 ? 0 : clamp(first - right - start, 0, queries),
            left < 0 ? queries : clamp(last + left - start + 1, 0, queries)};
  }
};

// Where a block stands: tile `tile` of sequence b. Tiles of packed sequences are numbered through: those of sequence b
// begin at offsets[b] * group / rows + b, which leaves room for every sequence's last, partly filled tile and is known
// without a sum over the sequences before.
struct Place {
  int b, tile;
};

inline int64_t packed_tiles(int64_t total, int64_t group, int64_t rows, int64_t batch) {
  return total * group / rows + batch + 1;
}

GK_DEVICE Place packed_place(const int32_t* offsets, int64_t total, int group, int rows, int batch, int number) {
  const auto first_tile = [&](int b) { return offset_at(offsets, b, total) * group / rows + b; };
  int low = 0, high = batch;  // the last sequence whose first tile is not after `number`
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first_tile(middle) <= number)
      low = middle;
    else
      high = middle - 1;
  }
  return {low, number - first_tile(low)};
}

// Offset of (sequence, head)'s first entry in lse, whose entries lie one apart.
GK_DEVICE int64_t lse_offset(const FlashAttentionProblem& p, const Sequence& s, int head) {
  return p.cu_seqlens_q != nullptr ? head * p.queries + s.first_query : (s.b * p.heads + head) * p.queries;
}

// The first element of row `row` (of the sequence) and head `head`.
template <typename T>
GK_DEVICE const T* row_of(const AttentionTensor& x, const Sequence& s, int64_t first_row, int head) {
  return static_cast<const T*>(x.data) + s.b * x.batch_stride + first_row * x.row_stride + head * x.head_stride;
}

// Offset of the same in a dense tensor (B, rows, heads, cols), or packed (rows, heads, cols).
GK_DEVICE int64_t dense_offset(bool packed, const Sequence& s, int64_t first_row, int64_t rows, int64_t heads, int head,
                               int64_t cols) {
  return (((packed ? 0 : s.b) * rows + first_row) * heads + head) * cols;
}

}  // namespace grokkernels::attention
