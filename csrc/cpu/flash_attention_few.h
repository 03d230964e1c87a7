// A few query rows against many keys (decoding): k and v are read once, at the speed of memory, and never copied.
//
// A key's rows for all kv heads lie side by side. So a task takes a stretch of keys for many heads at once, block by
// block, and asks for the next block meanwhile. Lanes run along D in the products and along the keys in the softmax.
// Where the processor multiplies bfloat16 itself, they take pairs of D for the scores and pairs of keys for v, with p
// rounded; at level amx several rows go through the matrix unit instead, as one tile that is mostly empty.
#pragma once

#include <type_traits>

#include "cpu/flash_attention_tiles.h"
#include "cpu/loops.h"
#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/simd_math.h"
#include "cpu/transpose.h"
#if defined(GK_SIMD_AMX)
#include "cpu/amx.h"
#endif

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

inline constexpr int64_t kFewRows = kFlashAttentionFewRows;
inline constexpr int64_t kFewKeys = 64;  // of a block

// The running softmax of a kv head's rows.
struct State {
  float* o;    // (rows, value_stride), not yet divided by sum
  float* top;  // (rows) largest score so far
  float* sum;  // (rows) of exp(score - top)
};

namespace few {

// Up to kFewKeys rows of k or v.
template <typename T>
struct Block {
  const T* rows;
  int64_t stride, keys, dim;
};

// Asks for the rows of k and v of a whole block, one kv head's at a time, in the order of memory: key by key, for all
// heads of the task. So the processor's own prefetching, which has more lines under way than instructions can have,
// finds streams to follow. Whoever computes asks for a few now and then: many at once would stop it.
template <typename T>
class Ahead {
 public:
  Ahead(const Block<T>& k, const Block<T>& v, int64_t k_head, int64_t v_head, int64_t heads)
      : k_(k), v_(v), k_head_(k_head), v_head_(v_head), heads_(heads) {}

  // Allows `count` more rows to be asked for.
  void allow(int64_t count) { allowed_ += count; }
  void rest() { some(allowed_); }
  GK_ALWAYS_INLINE void some(int64_t count) {
    for (; count > 0 && allowed_ > 0; --count) next();
  }

 private:
  GK_ALWAYS_INLINE void next() {
    --allowed_;
    ask(k_.rows + key_ * k_.stride + head_ * k_head_, k_.dim);
    ask(v_.rows + key_ * v_.stride + head_ * v_head_, v_.dim);
    if (++head_ == heads_) {
      head_ = 0;
      ++key_;
    }
  }
  GK_ALWAYS_INLINE static void ask(const T* row, int64_t dim) {
    for (int64_t c = 0; c < dim; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + c, 0, 2);
  }

  Block<T> k_, v_;
  int64_t k_head_, v_head_, heads_, key_ = 0, head_ = 0, allowed_ = 0;
};

// f(kRows, r) for all rows, as many at once as share what is loaded: four, then two, then one.
template <typename F>
GK_ALWAYS_INLINE void for_row_groups(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) f(std::integral_constant<int, 4>(), r);
  for (; r + 2 <= rows; r += 2) f(std::integral_constant<int, 2>(), r);
  if (r < rows) f(std::integral_constant<int, 1>(), r);
}

// scores[r][n ..] = scale q[r] k[n ..] for kRows rows and kLanes / kRows keys, so that one tree adds up all lanes. Keys
// past the last one are the last one again.
template <int kRows, typename T>
GK_ALWAYS_INLINE void dots(const Block<T>& k, int64_t n, const typename Products<T, T>::Other* q, int64_t q_stride,
                           float scale, float* scores) {
  using P = Products<T, T>;
  constexpr int kKeys = kLanes / kRows;
  const T* key[kKeys];
  for (int i = 0; i < kKeys; ++i) key[i] = k.rows + least(n + i, k.keys - 1) * k.stride;
  vf sum[kLanes] = {};
  for (int64_t c = 0; c < k.dim; c += P::kStep) {
    vf row[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) row[r] = P::other(q + r * q_stride + c);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      const vf x = P::first(key[i] + c, k.dim - c);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r * kKeys + i] = P::add(x, row[r], sum[r * kKeys + i]);
    }
  }
  float all[kLanes];
  store(all, sums_of_lanes(sum) * scale);
  for (int r = 0; r < kRows; ++r) __builtin_memcpy(scores + r * kFewKeys + n, all + r * kKeys, kKeys * sizeof(float));
}

template <int kRows, typename T>
GK_ALWAYS_INLINE void score_rows(const Block<T>& k, Ahead<T>& ahead, const typename Products<T, T>::Other* q,
                                 int64_t q_stride, float scale, float* scores) {
  for (int64_t n = 0; n < k.keys; n += kLanes / kRows) {
    ahead.some(kLanes / kRows / 2);
    dots<kRows>(k, n, q, q_stride, scale, scores);
  }
}

// scores (rows, kFewKeys) = scale q k^T, while the next block comes nearer.
template <typename T>
[[gnu::noinline]] void score(const Block<T>& k, Ahead<T>& ahead, const typename Products<T, T>::Other* q,
                             int64_t q_stride, int64_t rows, float scale, float* scores) {
  for_row_groups(
      rows, [&](auto group, int64_t r) __attribute__((always_inline)) {
        score_rows<decltype(group)::value>(k, ahead, q + r * q_stride, q_stride, scale, scores + r * kFewKeys);
      });
}

// o[r] = rescale[r] o[r] + p[r] v for kRows rows and, from c on, kVectors vectors of columns, of which the last may be
// cut.
template <int kRows, int kVectors, typename T, typename Count>
GK_ALWAYS_INLINE void weigh(const Block<T>& v, Ahead<T>& ahead, int64_t c, Count lanes, const float* p,
                            const float* rescale, float* o, int64_t value_stride) {
  vf sum[kRows][kVectors] = {};
  for (int64_t n = 0; n < v.keys; ++n) {
    if (n % 4 == 0) ahead.some(1);
    for (int u = 0; u < kVectors; ++u) {
      const vf x = load_n(v.rows + n * v.stride + c + u * kLanes, lanes);
      for (int r = 0; r < kRows; ++r) sum[r][u] = fma(set1(p[r * kFewKeys + n]), x, sum[r][u]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int u = 0; u < kVectors; ++u) {
      float* at = o + r * value_stride + c + u * kLanes;
      store(at, fma(load(at), set1(rescale[r]), sum[r][u]));
    }
}

// All columns of kRows rows.
template <int kRows, typename T>
GK_ALWAYS_INLINE void weigh_rows(const Block<T>& v, Ahead<T>& ahead, const float* p, const float* rescale, float* o,
                                 int64_t value_stride) {
  constexpr int kVectors = kRows == 1 ? 8 : 4;  // of 32 registers
  int64_t c = 0;
  for (; c + kVectors * kLanes <= v.dim; c += kVectors * kLanes)
    weigh<kRows, kVectors>(v, ahead, c, Full{}, p, rescale, o, value_stride);
  for_vectors(c, v.dim,
              [&](int64_t i, auto lanes) { weigh<kRows, 1>(v, ahead, i, lanes, p, rescale, o, value_stride); });
}

// o (rows, value_stride) = rescale o + p v.
template <typename T>
[[gnu::noinline]] void add_values(const Block<T>& v, Ahead<T>& ahead, const float* p, const float* rescale,
                                  int64_t rows, float* o, int64_t value_stride) {
  for_row_groups(
      rows, [&](auto group, int64_t r) __attribute__((always_inline)) {
        weigh_rows<decltype(group)::value>(v, ahead, p + r * kFewKeys, rescale + r, o + r * value_stride, value_stride);
      });
}

#if defined(GK_SIMD_BFLOAT16)
// p (rows, kFewKeys) rounded, in place of its first half; sum is brought up to date as that of p was.
inline void round_weights(float* p, const float* rescale, int64_t rows, float* sum) {
  for (int64_t r = 0; r < rows; ++r) {
    bfloat16* rounded = reinterpret_cast<bfloat16*>(p + r * kFewKeys);
    vf total = zero();
    for (int64_t n = 0; n < kFewKeys; n += 2 * kLanes) {
      const VfPair x = load_pair(p + r * kFewKeys + n);
      store_pair(rounded + n, x.first, x.second);
      const VfPair y = load_pair(rounded + n);
      total = total + y.first + y.second;
    }
    sum[r] = sum[r] * rescale[r] + reduce_add(total);
  }
}

// `weigh` of kSets times 2 kLanes columns with p rounded: a lane adds the products of two keys at once.
template <int kRows, int kSets>
GK_ALWAYS_INLINE void weigh_pairs(const Block<bfloat16>& v, Ahead<bfloat16>& ahead, int64_t c, const float* p,
                                  const float* rescale, float* o, int64_t value_stride) {
  vf low[kRows][kSets] = {}, high[kRows][kSets] = {};  // the first and the second four of every eight columns
  for (int64_t n = 0; n < v.keys; n += 2) {
    if (n % 4 == 0) ahead.some(1);
    const bfloat16* row = v.rows + n * v.stride + c;
#pragma GCC unroll 4
    for (int u = 0; u < kSets; ++u) {
      const __m512i even = _mm512_loadu_si512(row + u * 2 * kLanes);
      const __m512i odd = n + 1 < v.keys ? _mm512_loadu_si512(row + v.stride + u * 2 * kLanes) : _mm512_setzero_si512();
      const vf first = reinterpret_cast<vf>(_mm512_unpacklo_epi16(even, odd));
      const vf second = reinterpret_cast<vf>(_mm512_unpackhi_epi16(even, odd));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        int32_t two;
        __builtin_memcpy(&two, reinterpret_cast<const bfloat16*>(p + r * kFewKeys) + n, sizeof(two));
        const vf weights = as_float(set1(two));
        low[r][u] = detail::add_pairs(weights, first, low[r][u]);
        high[r][u] = detail::add_pairs(weights, second, high[r][u]);
      }
    }
  }
  const vi first = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23}, second = first + 8;
  const auto in_order = [](vf x, vi index, vf y) __attribute__((always_inline)) {
    return reinterpret_cast<vf>(_mm512_permutex2var_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512i>(index),
                                                       reinterpret_cast<__m512>(y)));
  };
  for (int r = 0; r < kRows; ++r)
    for (int u = 0; u < kSets; ++u) {
      float* at = o + r * value_stride + c + u * 2 * kLanes;
      const vf factor = set1(rescale[r]);
      store(at, fma(load(at), factor, in_order(low[r][u], first, high[r][u])));
      store(at + kLanes, fma(load(at + kLanes), factor, in_order(low[r][u], second, high[r][u])));
    }
}

template <int kRows>
GK_ALWAYS_INLINE void weigh_rows_in_pairs(const Block<bfloat16>& v, Ahead<bfloat16>& ahead, const float* p,
                                          const float* rescale, float* o, int64_t value_stride) {
  constexpr int kSets = kRows == 4 ? 2 : 4;  // of 32 registers
  int64_t c = 0;
  for (; c + kSets * 2 * kLanes <= v.dim; c += kSets * 2 * kLanes)
    weigh_pairs<kRows, kSets>(v, ahead, c, p, rescale, o, value_stride);
  for (; c < v.dim; c += 2 * kLanes) weigh_pairs<kRows, 1>(v, ahead, c, p, rescale, o, value_stride);
}

// `add_values` with p rounded; columns in whole sets.
[[gnu::noinline]] inline void add_values_in_pairs(const Block<bfloat16>& v, Ahead<bfloat16>& ahead, const float* p,
                                                  const float* rescale, int64_t rows, float* o, int64_t value_stride) {
  for_row_groups(
      rows, [&](auto group, int64_t r) __attribute__((always_inline)) {
        weigh_rows_in_pairs<decltype(group)::value>(v, ahead, p + r * kFewKeys, rescale + r, o + r * value_stride,
                                                    value_stride);
      });
}
#endif

// Scores of one row -> exp(score - top), zero past the last key; gives the factor that o must be multiplied by.
[[gnu::noinline]] inline float softmax(const FlashAttentionProblem& p, const RowFacts& facts, int64_t key, int64_t keys,
                                       float* scores, float& top, float& sum) {
  constexpr float kInfinity = __builtin_inff();
  const FullScores full(p);
  const bool masked = key < facts.begin || key + keys > facts.end;
  vf largest = set1(top);
  for (int64_t n = 0; n < kFewKeys; n += kLanes) {
    const vi j = lane_index() + static_cast<int32_t>(key + n);
    vf s = full(load(scores + n), j, set1(facts.position), set1(facts.temperature), set1(facts.slope));
    if (masked) s = select((j >= facts.begin) & (j < facts.end), s, set1(-kInfinity));
    if (n + kLanes > keys) s = select(j < static_cast<int32_t>(key + keys), s, set1(-kInfinity));
    store(scores + n, s);
    largest = max(s, largest);
  }
  const float before = top;
  top = reduce_max(largest);
  const float reference = top == -kInfinity ? 0.0f : top;  // no key yet: exp(-infinity - 0) = 0, and never NaN
  vf total = zero();
  for (int64_t n = 0; n < kFewKeys; n += kLanes) {
    const vf e = exp_nonpositive(load(scores + n) - reference);
    store(scores + n, e);
    total = total + e;
  }
  const float rescale = exp_nonpositive(set1(before - reference))[0];
  sum = sum * rescale + reduce_add(total);
  return rescale;
}

#if defined(GK_SIMD_AMX)
inline constexpr int64_t kQueriesPanel = kTileLines * kTilesDepth;  // elements

inline bool on_tiles(const FlashAttentionProblem& p, int64_t rows) {
  return p.dtype == DType::bfloat16 && rows > 1 && p.dim % kTileDepth == 0 && p.dim <= kTilesDepth &&
         p.value_dim % kTileLines == 0;
}

// The rows of a kv head as right operands, a tile for each kTileDepth of D.
inline void pack_queries(const FoldedRows& q, int64_t rows, int64_t dim, bfloat16* panel) {
  alignas(64) bfloat16 dense[kFewRows * kTilesDepth];
  for (int64_t r = 0; r < rows; ++r)
    __builtin_memcpy(dense + r * dim, static_cast<const bfloat16*>(q.data) + q.at(r), static_cast<size_t>(dim) * 2);
  pack_b(Strided<bfloat16>{dense, dim, 1}.transposed(), dim, rows, panel);
}

// `score` of a whole block: tiles of k are left operands where they lie. They give (keys, rows), which is transposed.
[[gnu::noinline]] inline void score_on_tiles(const Block<bfloat16>& k, Ahead<bfloat16>& ahead, const bfloat16* queries,
                                             int64_t rows, float scale, float* scores) {
  for (int64_t n = 0; n < kFewKeys; n += kTileLines) {
    tile_zero<0>();
    for (int64_t c = 0; c < k.dim; c += kTileDepth) {
      tile_load<4>(k.rows + n * k.stride + c, k.stride * 2);
      tile_load<6>(queries + c * kTileLines, 64);
      tile_dot<0, 4, 6>();
      ahead.some(2);
    }
    alignas(64) float tile[kTileLines * kLanes];
    tile_store<0>(tile, 64);
    vf x[kLanes];
    for (int i = 0; i < kLanes; ++i) x[i] = load(tile + i * kLanes);
    transpose(x);
    for (int64_t r = 0; r < rows; ++r) store(scores + r * kFewKeys + n, x[r] * scale);
  }
}

// `add_values` of a whole block with p as two left operands, rounded and what rounding left, so that o is as good as
// with p in float32. v becomes a right operand by pairing its rows.
[[gnu::noinline]] inline void add_values_on_tiles(const Block<bfloat16>& v, Ahead<bfloat16>& ahead, const float* p,
                                                  const float* rescale, int64_t rows, float* o, int64_t value_stride) {
  static_assert(kFewKeys == 2 * kTileDepth);
  alignas(64) bfloat16 left[2][kTileElements] = {}, rest[2][kTileElements] = {}, right[2][kTileElements];
  alignas(64) float tile[kTileLines * kLanes], other[kTileLines * kLanes];
  for (int i = 0; i < 2; ++i)
    for (int64_t r = 0; r < rows; ++r) {
      const VfPair x = load_pair(p + r * kFewKeys + i * kTileDepth);
      store_pair(left[i] + r * kTileDepth, x.first, x.second);
      const VfPair rounded = load_pair(left[i] + r * kTileDepth);
      store_pair(rest[i] + r * kTileDepth, x.first - rounded.first, x.second - rounded.second);
    }
  tile_load<2>(left[0], 64);
  tile_load<3>(left[1], 64);
  tile_load<4>(rest[0], 64);
  tile_load<5>(rest[1], 64);
  for (int64_t c = 0; c < v.dim; c += kTileLines) {
    const Strided<bfloat16> columns{v.rows + c, v.stride, 1};
    pack_b(columns, kTileDepth, kTileLines, right[0]);
    pack_b(columns.from(kTileDepth, 0), kTileDepth, kTileLines, right[1]);
    tile_zero<0>();
    tile_zero<1>();
    tile_load<6>(right[0], 64);
    tile_load<7>(right[1], 64);
    tile_dot<0, 2, 6>();
    tile_dot<1, 3, 7>();
    tile_dot<0, 4, 6>();
    tile_dot<1, 5, 7>();
    ahead.some(4);
    tile_store<0>(tile, 64);
    tile_store<1>(other, 64);
    for (int64_t r = 0; r < rows; ++r) {
      float* at = o + r * value_stride + c;
      store(at, fma(load(at), set1(rescale[r]), load(tile + r * kLanes) + load(other + r * kLanes)));
    }
  }
}
#endif

// Of the states' rows before any key.
inline void begin(const FlashAttentionProblem& p, int64_t first_head, int64_t rows, bool with_sink, const State& state,
                  int64_t value_stride) {
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t r = 0; r < rows; ++r) {
    state.top[r] = with_sink && p.sinks != nullptr ? p.sinks[first_head + r % group] : -__builtin_inff();
    state.sum[r] = state.top[r] == -__builtin_inff() ? 0.0f : 1.0f;
  }
  for (int64_t i = 0; i < rows * value_stride; ++i) state.o[i] = 0.0f;
}

}  // namespace few

// The states, one per head, of the rows of `heads` kv heads from kv_head on, over the keys in `range` that they see.
template <typename T>
void attend_few(const FlashAttentionProblem& p, const Sequence& s, int64_t kv_head, int64_t heads, KeyRange range,
                bool with_sink, const State* states, int64_t value_stride) {
  const int64_t group = p.heads / p.kv_heads, rows = s.queries * group;
  using Element = typename Products<T, T>::Other;
  const int64_t q_stride = round_up(p.dim, Products<T, T>::kStep);
  float* scores = scratch<float>(0, kFewRows * kFewKeys + heads * rows * (q_stride + 1));
  float* rounded = scores + kFewRows * kFewKeys;
  Element* queries = reinterpret_cast<Element*>(rounded + heads * rows);
  RowFacts* facts = scratch<RowFacts>(5, heads * rows);
#if defined(GK_SIMD_AMX)
  const bool tiles = few::on_tiles(p, rows);
  bfloat16* panels = scratch<bfloat16>(7, tiles ? heads * few::kQueriesPanel : 0);
  if (tiles) configure_tiles();
#else
  [[maybe_unused]] constexpr bool tiles = false;
#endif
#if defined(GK_SIMD_BFLOAT16)
  // The processor's own products take p rounded: o is then multiplied by the sum of p over that of what was rounded, so
  // that weights still sum to one.
  const bool pairs = dtype_of<T> == DType::bfloat16 && !tiles && p.value_dim % (2 * kLanes) == 0;
#else
  constexpr bool pairs = false;
#endif
  for (int64_t h = 0; h < heads; ++h) {
    const FoldedRows q = folded(p.q, s, s.first_query, (kv_head + h) * group, group);
    Element* mine = queries + h * rows * q_stride;
    if constexpr (std::is_same_v<Element, float>) {
      load_rows<T>(q, 0, rows, p.dim, mine, q_stride);
    } else {
      __builtin_memset(mine, 0, static_cast<size_t>(rows * q_stride) * sizeof(Element));
      for (int64_t r = 0; r < rows; ++r)
        __builtin_memcpy(mine + r * q_stride, static_cast<const T*>(q.data) + q.at(r), static_cast<size_t>(p.dim) * 2);
    }
    for (int64_t r = 0; r < rows; ++r) facts[h * rows + r] = row_facts(p, s, kv_head + h, r);
    few::begin(p, (kv_head + h) * group, rows, with_sink, states[h], value_stride);
    for (int64_t r = 0; r < rows; ++r) rounded[h * rows + r] = states[h].sum[r];
#if defined(GK_SIMD_AMX)
    if (tiles) few::pack_queries(q, rows, p.dim, panels + h * few::kQueriesPanel);
#endif
  }
  const auto block_of = [&](const AttentionTensor& x, int64_t head, int64_t key, int64_t keys, int64_t dim) {
    const FoldedRows all = folded(x, s, s.first_key, head, 1);
    return few::Block<T>{static_cast<const T*>(all.data) + all.at(key), all.row_stride, keys, dim};
  };
  const KeyRange seen = s.visible(0, s.queries - 1);
  range = {most(range.begin, seen.begin), least(range.end, seen.end)};
  const float scale = score_scale(p);
  const auto ahead_from = [&](int64_t key) {
    return few::Ahead<T>(block_of(p.k, kv_head, key, 0, p.dim), block_of(p.v, kv_head, key, 0, p.value_dim),
                         p.k.head_stride, p.v.head_stride, heads);
  };
  few::Ahead<T> first = ahead_from(range.begin);
  first.allow(heads * least(kFewKeys, range.end - range.begin));
  first.rest();
  for (int64_t key = range.begin; key < range.end; key += kFewKeys) {
    const int64_t keys = least(kFewKeys, range.end - key);
    few::Ahead<T> ahead = ahead_from(key + kFewKeys);
    for (int64_t h = 0; h < heads; ++h) {
      const few::Block<T> k = block_of(p.k, kv_head + h, key, keys, p.dim);
      const few::Block<T> v = block_of(p.v, kv_head + h, key, keys, p.value_dim);
      const State& state = states[h];
      ahead.allow(kFewKeys);
      float rescale[kFewRows];
      const auto softmax = [&] {
        for (int64_t r = 0; r < rows; ++r)
          rescale[r] =
              few::softmax(p, facts[h * rows + r], key, keys, scores + r * kFewKeys, state.top[r], state.sum[r]);
      };
#if defined(GK_SIMD_AMX)
      if constexpr (dtype_of<T> == DType::bfloat16) {
        if (tiles && keys == kFewKeys) {
          few::score_on_tiles(k, ahead, panels + h * few::kQueriesPanel, rows, scale, scores);
          softmax();
          few::add_values_on_tiles(v, ahead, scores, rescale, rows, state.o, value_stride);
          ahead.rest();
          continue;
        }
      }
#endif
      few::score(k, ahead, queries + h * rows * q_stride, q_stride, rows, scale, scores);
      softmax();
#if defined(GK_SIMD_BFLOAT16)
      if constexpr (dtype_of<T> == DType::bfloat16) {
        if (pairs) {
          few::round_weights(scores, rescale, rows, rounded + h * rows);
          few::add_values_in_pairs(v, ahead, scores, rescale, rows, state.o, value_stride);
          ahead.rest();
          continue;
        }
      }
#endif
      few::add_values(v, ahead, scores, rescale, rows, state.o, value_stride);
      ahead.rest();
    }
  }
#if defined(GK_SIMD_AMX)
  if (tiles) release_tiles();
#endif
  for (int64_t i = 0; pairs && i < heads * rows; ++i) {
    const State& state = states[i / rows];
    const float ratio = rounded[i] > 0.0f ? state.sum[i % rows] / rounded[i] : 0.0f;
    for (int64_t c = 0; c < value_stride; ++c) state.o[i % rows * value_stride + c] *= ratio;
  }
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
