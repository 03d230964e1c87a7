// flash_attention, forward, on the CPU: o = softmax(scores) v in tiles, O(T) memory.
// Dao et al., "FlashAttention" (2022), with the running maximum and sum of Milakov and Gimelshein (2018).
//
// A task owns up to kRows query rows of one (sequence, kv head) and walks over blocks of keys. It transposes its
// queries once; scores are then formed key by key with the lanes along the rows, so keys and values are only widened,
// never transposed, and the softmax's maxima and sums need no reduction across lanes. Within a block of keys, panels of
// rows small enough for the first-level cache go through scores, softmax and p v in turn. A panel computes the keys it
// sees and no others, and looks at masks only where some of its rows see a key that others do not.
//
// Few rows and many keys (decoding): the keys are cut into chunks that are tasks of their own, and whoever finishes the
// last one merges all, in order. The cut of keys depends on the sequence's own sizes alone, never on the batch or the
// threads, so neither do the results; that of rows does, and does not matter.
#include <type_traits>

#include "cpu/flash_attention_few.h"
#include "cpu/flash_attention_tiles.h"
#include "cpu/gemm_tile.h"
#include "cpu/launch.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/simd_math.h"
#include "flash_attention.h"
#if defined(GK_SIMD_BFLOAT16)
#include "cpu/gemm_bfloat16.h"
#endif

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int64_t kRows = 1088;                    // query rows of a task at most; no power of two, see groups.h
constexpr int64_t kKeys = 96;                      // keys of a block
constexpr int64_t kPanel = kTileVectors * kLanes;  // rows whose scores (kKeys, kPanel) stay in the first-level cache
constexpr int64_t kMinChunk = 10 * kKeys;          // keys of a chunk where a tile of rows meets many, at least
constexpr int64_t kChunkPerRow = 16;               // ... and per row: partial results stay below 1/16 of v
constexpr int64_t kTilesKeys = 128, kTilesPanel = 64;  // the same where products are the processor's own
static_assert(kKeys % kTileRows == 0 && kLanes % kTileRows == 0);

// Whether products are the processor's own (below).
bool on_tiles([[maybe_unused]] const FlashAttentionProblem& p) {
#if defined(GK_SIMD_BFLOAT16)
  return p.dtype == DType::bfloat16 && p.dim <= kTilesDepth;
#else
  return false;
#endif
}

// One unit of work: rows [tile * tile_rows, ...) of (sequence, kv head) against keys [chunk * chunk_keys, ...). Where
// rows are few it takes `heads` kv heads.
struct Task {
  int32_t sequence, kv_head, heads, tile, chunk;
};

// Rows of a task, in steps of a panel: all of them pack the same k and v once, so the more the better, as long as every
// thread has `tasks`. Packing is dear beside products so fast; elsewhere it is a copy, and many tasks balance better.
struct TileRows {
  int64_t step, least, most, tasks;

  explicit TileRows(const FlashAttentionProblem& p) {
    const bool tiles = on_tiles(p);
    step = tiles ? kTilesPanel : kPanel;
    least = 4 * step;
    most = tiles ? kRows : 8 * step;
    tasks = tiles ? 4 : 12;
  }
};

// How the rows and keys of one sequence are cut; the same for all its kv heads.
struct Cut {
  bool few;
  int64_t rows, tile_rows, tiles, chunks, chunk_keys;

  Cut(const FlashAttentionProblem& p, const Sequence& s, const TileRows& limit) {
    rows = s.queries * (p.heads / p.kv_heads);
    few = rows > 0 && rows <= kFewRows;
    tiles = (rows + limit.most - 1) / limit.most;
    tile_rows = round_up((rows + most(tiles, 1) - 1) / most(tiles, 1), limit.step);
    chunk_keys = most(s.keys, 1);
    if (few)
      chunk_keys = least(chunk_keys, round_up(least(most(s.keys / 16, 8 * kFewKeys), 32 * kFewKeys), kFewKeys));
    else if (rows <= limit.least)
      chunk_keys = least(chunk_keys, round_up(most(kMinChunk, kChunkPerRow * rows), kKeys));
    chunks = most((s.keys + chunk_keys - 1) / chunk_keys, 1);
  }

  // Whether tasks leave states that `merge` may have to put together.
  bool partial() const { return tiles > 0 && (few || chunks > 1); }
};

// A task's scratch.
struct Arena {
  int64_t value_stride;
  float *queries, *keys, *values, *scores, *rescale, *temperature, *slope;
  int32_t *begin, *end, *position;
  State state;

  explicit Arena(const FlashAttentionProblem& p) : value_stride(round_up(p.value_dim, kLanes)) {
    const int64_t sizes[] = {round_up(p.dim, kLanes) * kRows,       // q transposed
                             (kKeys + kTileRows) * p.dim + kLanes,  // k
                             kKeys * value_stride,                  // v
                             (kKeys + kTileRows) * kPanel,          // scores, then p, transposed
                             kRows * value_stride,                  // o
                             8 * kRows};
    int64_t total = 0;
    for (int64_t size : sizes) total += round_up(size, 16);
    float* next = scratch<float>(0, total);
    auto take = [&](int64_t size) {
      float* mine = next;
      next += round_up(size, 16);
      return mine;
    };
    queries = take(sizes[0]);
    keys = take(sizes[1]);
    values = take(sizes[2]);
    scores = take(sizes[3]);
    state.o = take(sizes[4]);
    state.top = take(kRows);
    state.sum = take(kRows);
    rescale = take(kRows);
    temperature = take(kRows);
    slope = take(kRows);
    begin = reinterpret_cast<int32_t*>(take(kRows));
    end = reinterpret_cast<int32_t*>(take(kRows));
    position = reinterpret_cast<int32_t*>(take(kRows));
  }
};

// Scale, softcap, temperature, ALiBi and masks on scores (keys, kStride) of `vectors` vectors of rows; key is the first
// one's position. A product that scales its sums leaves nothing to scale here.
template <int64_t kStride, bool kScale>
[[gnu::noinline]] void adjust(const FlashAttentionProblem& p, const Arena& arena, int64_t row, int64_t vectors,
                              int64_t key, int64_t count, float* scores, bool masked) {
  const float scale = score_scale(p);
  const FullScores full(p);
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t r = row + v * kLanes;
    const vi begin = load(arena.begin + r), end = load(arena.end + r), position = load(arena.position + r);
    const vf temperature = load(arena.temperature + r), slope = load(arena.slope + r);
    for (int64_t n = 0; n < count; ++n) {
      const vi j = set1(static_cast<int32_t>(key + n));
      float* at = scores + n * kStride + v * kLanes;
      vf s = full(kScale ? load(at) * scale : load(at), j, position, temperature, slope);
      if (masked) s = select((j >= begin) & (j < end), s, set1(-kInfinity));
      store(at, s);
    }
  }
}

// scores -> exp(score - top), with top, sum and the factor that o must be multiplied by brought up to date.
[[gnu::noinline]] void softmax(const Arena& arena, int64_t row, int64_t vectors, int64_t count, float* scores) {
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t r = row + v * kLanes;
    float* at = scores + v * kLanes;
    const vf before = load(arena.state.top + r);
    vf top = before, other = before;
    int64_t n = 0;
    for (; n + 2 <= count; n += 2) {
      top = max(load(at + n * kPanel), top);
      other = max(load(at + (n + 1) * kPanel), other);
    }
    if (n < count) top = max(load(at + n * kPanel), top);
    top = max(other, top);
    const vf reference = select(top == -kInfinity, vf{}, top);  // no key yet: exp(-infinity - 0) = 0, and never NaN
    const vf rescale = exp_nonpositive(before - reference);
    vf sum[2] = {vf{}, vf{}};
    for (n = 0; n + 2 <= count; n += 2)
      for (int u = 0; u < 2; ++u) {
        const vf e = exp_nonpositive(load(at + (n + u) * kPanel) - reference);
        store(at + (n + u) * kPanel, e);
        sum[u] = sum[u] + e;
      }
    if (n < count) {
      const vf e = exp_nonpositive(load(at + n * kPanel) - reference);
      store(at + n * kPanel, e);
      sum[0] = sum[0] + e;
    }
    store(arena.state.top + r, top);
    store(arena.state.sum + r, fma(load(arena.state.sum + r), rescale, sum[0] + sum[1]));
    store(arena.rescale + r, rescale);
  }
}

#if defined(GK_SIMD_BFLOAT16)
// bfloat16 on the processor's own products (strips.h):
//
//   scores (keys, rows) = k q^T      o^T (Dv, rows) = o^T rescale + v^T p
//
// Lanes run along the rows throughout, so the softmax is as above, and p, made pair by pair of keys, is a right operand
// as it is. p is rounded to bfloat16; o is divided by the sum of what was rounded, so that weights that sum to one are
// what the errors move between keys, and lse is made of the sum before rounding.
static_assert(kRows % kTilesPanel == 0 && kTilesKeys <= kTilesDepth);

// softmax above, of scores (keys, kTilesPanel) times a scale >= 0, with p as a panel of b, zero up to a whole tile, and
// its sum as it was rounded.
[[gnu::noinline]] void softmax_on_tiles(const Arena& arena, int64_t row, int64_t vectors, int64_t keys,
                                        const float* scores, float scale, bfloat16* panel, float* rounded) {
  constexpr float kLog2E = 1.44269504f, kSlack = 1.0f;
  const vf factor = set1(scale * kLog2E);
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t r = row + v * kLanes;
    const float* at = scores + v * kLanes;
    vf top[2] = {set1(-kInfinity), set1(-kInfinity)};
    for (int64_t n = 0; n < keys; ++n) top[n % 2] = max(load(at + n * kTilesPanel), top[n % 2]);
    // The reference moves only where p would exceed e^kSlack: o is seldom rescaled, and nothing can overflow.
    const vf before = load(arena.state.top + r), largest = max(top[0], top[1]) * scale;
    const vf now = select(largest - before > kSlack, largest, before);
    const vf reference = select(now == -kInfinity, vf{}, now);  // as above
    const vf shift = reference * -kLog2E;
    const auto e_at = [&](int64_t n) __attribute__((always_inline)) {
      return exp2(fma(load(at + n * kTilesPanel), factor, shift));
    };
    vf sum[2] = {vf{}, vf{}}, rounded_sum[2] = {vf{}, vf{}};
    for (int64_t n = 0; n < round_up(keys, kTileDepth); n += 2) {
      const vf even = n < keys ? e_at(n) : zero(), odd = n + 1 < keys ? e_at(n + 1) : zero();
      const int64_t place = v * kLanes * detail::kStripStride + n * kTileLines;
      const vf pairs = detail::pair_elements(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even)));
      store(reinterpret_cast<float*>(panel + place), pairs);
      const vi bits = as_int(pairs);  // of each lane: even below, odd above
      sum[0] = sum[0] + even;
      sum[1] = sum[1] + odd;
      rounded_sum[0] = rounded_sum[0] + as_float(bits << 16);
      rounded_sum[1] = rounded_sum[1] + as_float(bits & ~0xffff);
    }
    const vf rescale = exp_nonpositive(before - reference);
    store(arena.state.top + r, now);
    store(arena.state.sum + r, fma(load(arena.state.sum + r), rescale, sum[0] + sum[1]));
    store(rounded + r, fma(load(rounded + r), rescale, rounded_sum[0] + rounded_sum[1]));
    store(arena.rescale + r, rescale);
  }
}

// The part of `attend` that depends on how products are made.
void attend_on_tiles(const FlashAttentionProblem& p, const Sequence& s, int64_t kv_head, int64_t first_row,
                     int64_t count, KeyRange range, const Arena& arena) {
  const int64_t group = p.heads / p.kv_heads, padded = round_up(count, kLanes), value_stride = arena.value_stride;
  const FoldedRows q = folded(p.q, s, s.first_query, kv_head * group, group);
  const FoldedRows k = folded(p.k, s, s.first_key, kv_head, 1), v = folded(p.v, s, s.first_key, kv_head, 1);
  constexpr int64_t kStride = detail::kStripStride;
  float* scores = scratch<float>(5, kTilesKeys * kTilesPanel + kRows * value_stride + kRows +
                                        (kRows + kTilesKeys + kTilesPanel + value_stride) * kStride / 2);
  float* o = scores + kTilesKeys * kTilesPanel;  // (Dv, kRows)
  float* rounded = o + kRows * value_stride;
  bfloat16* queries = reinterpret_cast<bfloat16*>(rounded + kRows);
  bfloat16* keys_panel = queries + kRows * kStride;
  bfloat16* values = keys_panel + kTilesKeys * kStride;
  bfloat16* probabilities = values + value_stride * kStride;
  for (int64_t i = p.value_dim * kRows; i < value_stride * kRows; ++i) o[i] = 0.0f;
  for (int64_t r = 0; r < padded; ++r) rounded[r] = arena.state.sum[r];
  bool started[kRows / kTilesPanel] = {};
  for (int64_t r = 0; r < count; r += kTileLines) {  // rows of several heads are no matrix: one row at a time
    bfloat16* dense = reinterpret_cast<bfloat16*>(scores);
    const int64_t rows = least(count - r, kTileLines);
    for (int64_t i = 0; i < rows; ++i)
      __builtin_memcpy(dense + i * p.dim, static_cast<const bfloat16*>(q.data) + q.at(first_row + r + i), p.dim * 2);
    pack_b(Strided<bfloat16>{dense, p.dim, 1}.transposed(), p.dim, rows, queries + r * kStride);
  }

  const float scale = score_scale(p);
  const bool plain = plain_scores(p);
  configure_tiles();
  for (int64_t block = range.begin; block < range.end; block += kTilesKeys) {
    const int64_t block_end = least(block + kTilesKeys, range.end);
    const Strided<bfloat16> k_block{static_cast<const bfloat16*>(k.data) + k.at(block), k.row_stride, 1};
    const Strided<bfloat16> v_block{static_cast<const bfloat16*>(v.data) + v.at(block), v.row_stride, 1};
    for (int64_t n = 0; n < block_end - block; n += kTileDepth) {
      const int64_t keys = least(block_end - block - n, kTileDepth);
      pack_a(k_block.from(n, 0), keys, p.dim, keys_panel + n * kStride);
      pack_a(v_block.transposed().from(0, n), p.value_dim, keys, values + n * kTileLines);
    }
    int64_t asked = 0;  // rows of the next block, which comes nearer meanwhile
    for (int64_t row = 0; row < count; row += kTilesPanel) {
      for (; asked * count < (row + kTilesPanel) * kTilesKeys && asked < kTilesKeys; ++asked) {
        prefetch_row(k_block.data + (kTilesKeys + asked) * k.row_stride, p.dim);
        prefetch_row(v_block.data + (kTilesKeys + asked) * v.row_stride, p.value_dim);
      }
      const int64_t rows = least(kTilesPanel, padded - row), vectors = rows / kLanes;
      const int64_t seen = most(block, arena.begin[row]), end = least(block_end, arena.end[row + rows - 1]);
      if (seen >= end) continue;
      const int64_t skipped = (seen - block) / kTileDepth * kTileDepth, begin = block + skipped, keys = end - begin;
      const bool masked = begin < arena.begin[row + rows - 1] || end > arena.end[row];
      multiply_panels(keys, rows, p.dim, keys_panel + skipped * kStride, queries + row * kStride, scores, kTilesPanel,
                      false);
      const bool adjusted = masked || !plain || scale < 0.0f;
      if (adjusted) adjust<kTilesPanel, true>(p, arena, row, vectors, begin, keys, scores, masked);
      softmax_on_tiles(arena, row, vectors, keys, scores, adjusted ? 1.0f : scale, probabilities, rounded);
      bool& begun = started[row / kTilesPanel];
      for (int64_t x = row; begun && x < row + rows; x += kLanes) {
        const vf rescale = load(arena.rescale + x);
        if (all(rescale == 1.0f)) continue;
        for (int64_t d = 0; d < p.value_dim; ++d) store(o + d * kRows + x, load(o + d * kRows + x) * rescale);
      }
      multiply_panels(p.value_dim, rows, keys, values + skipped * kTileLines, probabilities, o + row, kRows, begun);
      begun = true;
    }
  }
  release_tiles();
  for (int64_t r = 0; r < count; r += kLanes) {
    const bool begun = started[r / kTilesPanel];
    const vf divisor = load(rounded + r), ratio = select(divisor > 0.0f, load(arena.state.sum + r) / divisor, vf{});
    for (int64_t d = 0; d < value_stride; d += kLanes) {
      vf x[kLanes] = {};
      if (begun) {
        for (int i = 0; i < kLanes; ++i) x[i] = load(o + (d + i) * kRows + r) * ratio;
        transpose(x);
      }
      for (int i = 0; i < kLanes; ++i) store(arena.state.o + (r + i) * value_stride + d, x[i]);
    }
  }
}
#endif

// The state of `count` rows over the keys in `range` that they see.
void attend(const FlashAttentionProblem& p, const Sequence& s, int64_t kv_head, int64_t first_row, int64_t count,
            KeyRange range, bool with_sink, const Arena& arena) {
  const int64_t group = p.heads / p.kv_heads, padded = round_up(count, kLanes);
  const FoldedRows q = folded(p.q, s, s.first_query, kv_head * group, group);
  const FoldedRows k = folded(p.k, s, s.first_key, kv_head, 1), v = folded(p.v, s, s.first_key, kv_head, 1);
  for (int64_t r = 0; r < padded; ++r) {
    const int64_t row = first_row + least(r, count - 1);
    const RowFacts facts = row_facts(p, s, kv_head, row);
    arena.begin[r] = facts.begin;
    arena.end[r] = facts.end;
    arena.position[r] = facts.position;
    arena.temperature[r] = facts.temperature;
    arena.slope[r] = facts.slope;
    const float sink = with_sink && p.sinks != nullptr ? p.sinks[kv_head * group + row % group] : -kInfinity;
    arena.state.top[r] = sink;
    arena.state.sum[r] = sink == -kInfinity ? 0.0f : 1.0f;
  }
  const KeyRange seen = s.visible(first_row / group, (first_row + count - 1) / group);
  // Blocks of keys begin at the same ones whatever rows a task has: sums do not depend on how rows are cut.
  const int64_t keys = on_tiles(p) ? kTilesKeys : kKeys;
  const int64_t unseen = most(seen.begin - range.begin, 0) / keys * keys;
  range = {range.begin + unseen, least(range.end, seen.end)};
  const bool none = range.begin >= range.end;
#if defined(GK_SIMD_BFLOAT16)
  if (!none && on_tiles(p)) return attend_on_tiles(p, s, kv_head, first_row, count, range, arena);
#endif
  for (int64_t i = 0; i < padded * arena.value_stride; ++i) arena.state.o[i] = 0.0f;
  if (none) return;
  const float scale = score_scale(p);
  const bool plain = plain_scores(p);
  GK_SWITCH_DTYPE(p.dtype, T, {
    load_columns<T>(q, first_row, padded, {first_row, first_row + count}, p.dim, arena.queries, kRows);
  });
  for (int64_t block = range.begin; block < range.end; block += kKeys) {
    const int64_t block_end = least(block + kKeys, range.end);
    GK_SWITCH_DTYPE(p.dtype, T, {
      load_rows<T>(k, block, block_end - block, p.dim, arena.keys, p.dim);
      load_rows<T>(v, block, block_end - block, p.value_dim, arena.values, arena.value_stride);
    });
    for (int64_t row = 0; row < count; row += kPanel) {
      const int64_t rows = least(kPanel, padded - row), vectors = rows / kLanes;
      // Of the panel's rows the first sees the least far and the last the farthest.
      const int64_t begin = most(block, arena.begin[row]), end = least(block_end, arena.end[row + rows - 1]);
      if (begin >= end) continue;
      const bool masked = begin < arena.begin[row + rows - 1] || end > arena.end[row];
      const int64_t keys = end - begin;
      gemm<Into::kWrite, false, 2>(keys, vectors, p.dim, arena.keys + (begin - block) * p.dim, p.dim,
                                   arena.queries + row, kRows, arena.scores, kPanel, &scale);
      if (masked || !plain) adjust<kPanel, false>(p, arena, row, vectors, begin, keys, arena.scores, masked);
      softmax(arena, row, vectors, keys, arena.scores);
      gemm<Into::kRescale, true, 1>(least(rows, count - row), arena.value_stride / kLanes, keys, arena.scores, kPanel,
                                    arena.values + (begin - block) * arena.value_stride, arena.value_stride,
                                    arena.state.o + row * arena.value_stride, arena.value_stride, arena.rescale + row);
    }
  }
}

// o = state.o / sum and lse = top + log(sum); for a row without a key 0 and -infinity. Sums of 0 become 1.
void finish(const FlashAttentionFwdParams& params, const Sequence& s, int64_t kv_head, int64_t first_row, int64_t count,
            const State& state, int64_t value_stride) {
  const FlashAttentionProblem& p = params.problem;
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t r = 0; r < count; r += kLanes) {
    const int n = static_cast<int>(least(count - r, kLanes));
    const vf sum = load_n(state.sum + r, n), top = load_n(state.top + r, n);
    const vmask dead = sum == 0.0f;
    store_n(state.sum + r, select(dead, set1(1.0f), sum), n);
    float lse[kLanes], inv[kLanes];
    store(lse, select(dead, set1(-kInfinity), top + log(sum)));
    store(inv, select(dead, vf{}, 1.0f / sum));
    for (int i = 0; i < n; ++i) {
      const int64_t row = first_row + r + i;
      const int64_t at = lse_offset(p, s, kv_head * group + row % group) + row / group;
      params.lse[at] = lse[i];
      params.top[at] = inv[i] == 0.0f ? 0.0f : state.top[r + i];
      params.inv[at] = inv[i];
    }
  }
  const AttentionTensor o{nullptr, p.cu_seqlens_q == nullptr ? p.queries * p.heads * p.value_dim : 0,
                          p.heads * p.value_dim, p.value_dim};
  const FoldedRows rows = folded(o, s, s.first_query, kv_head * group, group);
  GK_SWITCH_DTYPE(p.dtype, T,
                  store_rows<T>(state.o, value_stride, state.sum, count, p.value_dim, params.o, rows, first_row));
}

// The states of all chunks into the first one's, in order.
void merge(const State& into, const State& from, int64_t rows, int64_t value_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const float top = into.top[r] > from.top[r] ? into.top[r] : from.top[r];
    if (top == -kInfinity) continue;
    float factors[kLanes] = {};
    factors[0] = into.top[r] - top;
    factors[1] = from.top[r] - top;
    store(factors, exp_nonpositive(load(factors)));
    into.top[r] = top;
    into.sum[r] = into.sum[r] * factors[0] + from.sum[r] * factors[1];
    float* x = into.o + r * value_stride;
    const float* y = from.o + r * value_stride;
    for (int64_t c = 0; c < value_stride; c += kLanes)
      store(x + c, fma(set1(factors[1]), load(y + c), set1(factors[0]) * load(x + c)));
  }
}

}  // namespace

void flash_attention_fwd(const FlashAttentionFwdParams& params) {
  const FlashAttentionProblem& p = params.problem;
  const int64_t value_stride = round_up(p.value_dim, kLanes);

  TileRows limit(p);
  const auto tiles_of_all = [&] {
    int64_t tiles = 0;
    for (int64_t b = 0; b < p.batch; ++b) tiles += Cut(p, Sequence(p, b), limit).tiles * p.kv_heads;
    return tiles;
  };
  while (limit.most > limit.least && tiles_of_all() < limit.tasks * num_threads())
    limit.most = most(limit.most / 2 / limit.step * limit.step, limit.least);

  // Tasks by falling cost, in powers of two of the keys seen; where chunks are to be merged, room for their states.
  int64_t per_level[64] = {}, partial_rows = 0, total = 0;
  auto level_of = [](int64_t keys) { return 63 - __builtin_clzll(static_cast<uint64_t>(most(keys, 1))); };
  auto cost_level = [&](const Sequence& s, const Cut& cut, int64_t tile) {
    const int64_t group = p.heads / p.kv_heads;
    const KeyRange seen =
        s.visible(tile * cut.tile_rows / group, (least((tile + 1) * cut.tile_rows, cut.rows) - 1) / group);
    return level_of(least(seen.end - seen.begin, cut.chunk_keys));
  };
  int64_t cost = 0, few_chunks = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s(p, b);
    const Cut cut(p, s, limit);
    if (cut.few) few_chunks += cut.chunks;
    cost += cut.rows * p.kv_heads * s.keys;
  }
  // Kv heads of a task where rows are few: all, or fewer where there would be too few tasks.
  const int64_t wanted = few_chunks == 0 ? 1 : (4 * num_threads() + few_chunks - 1) / few_chunks;
  const int64_t few_heads = (p.kv_heads + wanted - 1) / wanted;
  auto ranges = [&](const Cut& cut) { return cut.few ? (p.kv_heads + few_heads - 1) / few_heads : p.kv_heads; };
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s(p, b);
    const Cut cut(p, s, limit);
    for (int64_t tile = 0; tile < cut.tiles; ++tile) per_level[cost_level(s, cut, tile)] += cut.chunks * ranges(cut);
    total += cut.tiles * cut.chunks * ranges(cut);
    if (cut.partial()) partial_rows += cut.chunks * p.kv_heads * cut.rows;
  }
  if (total == 0) return;
  Task* tasks = scratch<Task>(1, total);
  float* partials = scratch<float>(2, partial_rows * (value_stride + 2));
  int32_t* unfinished = scratch<int32_t>(3, p.batch * p.kv_heads);  // chunks of each (sequence, kv head)
  int64_t* partial_first = scratch<int64_t>(4, p.batch);            // rows of partials before each sequence's
  int64_t next[64];
  for (int64_t level = 63, at = 0; level >= 0; --level) {
    next[level] = at;
    at += per_level[level];
  }
  partial_rows = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s(p, b);
    const Cut cut(p, s, limit);
    partial_first[b] = partial_rows;
    if (cut.partial()) partial_rows += cut.chunks * p.kv_heads * cut.rows;
    for (int64_t head = 0; head < p.kv_heads; ++head)
      unfinished[b * p.kv_heads + head] = static_cast<int32_t>(cut.chunks);
    for (int64_t tile = cut.tiles - 1; tile >= 0; --tile)
      for (int64_t chunk = 0; chunk < cut.chunks; ++chunk)
        for (int64_t head = 0, step = cut.few ? few_heads : 1; head < p.kv_heads; head += step)
          tasks[next[cost_level(s, cut, tile)]++] = {static_cast<int32_t>(b), static_cast<int32_t>(head),
                                                     static_cast<int32_t>(least(step, p.kv_heads - head)),
                                                     static_cast<int32_t>(tile), static_cast<int32_t>(chunk)};
  }

  parallel_tasks(total, cost * (p.dim + p.value_dim) / (8 * total) + 1, [&](int64_t index) {
    const Task task = tasks[index];
    const Sequence s(p, task.sequence);
    const Cut cut(p, s, limit);
    const int64_t first_row = task.tile * cut.tile_rows, count = least(cut.tile_rows, cut.rows - first_row);
    const KeyRange range{task.chunk * cut.chunk_keys, least((task.chunk + 1) * cut.chunk_keys, s.keys)};
    auto partial = [&](int64_t head, int64_t chunk) {
      const int64_t before = partial_first[task.sequence] + (head * cut.chunks + chunk) * cut.rows;
      float* mine = partials + before * (value_stride + 2);
      return State{mine, mine + cut.rows * value_stride, mine + cut.rows * (value_stride + 1)};
    };
    if (cut.few) {
      State* states = scratch<State>(6, task.heads);
      for (int64_t h = 0; h < task.heads; ++h) states[h] = partial(task.kv_head + h, task.chunk);
      GK_SWITCH_DTYPE(p.dtype, T,
                      { attend_few<T>(p, s, task.kv_head, task.heads, range, task.chunk == 0, states, value_stride); });
    } else {
      const Arena arena(p);
      attend(p, s, task.kv_head, first_row, count, range, task.chunk == 0, arena);
      if (!cut.partial()) return finish(params, s, task.kv_head, first_row, count, arena.state, value_stride);
      const State mine = partial(task.kv_head, task.chunk);
      for (int64_t i = 0; i < count * value_stride; ++i) mine.o[i] = arena.state.o[i];
      for (int64_t r = 0; r < count; ++r) {
        mine.top[r] = arena.state.top[r];
        mine.sum[r] = arena.state.sum[r];
      }
    }
    for (int64_t head = task.kv_head; head < task.kv_head + task.heads; ++head) {
      if (__atomic_sub_fetch(&unfinished[task.sequence * p.kv_heads + head], 1, __ATOMIC_ACQ_REL) != 0) continue;
      const State all = partial(head, 0);
      for (int64_t chunk = 1; chunk < cut.chunks; ++chunk) merge(all, partial(head, chunk), count, value_stride);
      finish(params, s, head, first_row, count, all, value_stride);
    }
  });
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(flash_attention_fwd, FlashAttentionFwdParams);
