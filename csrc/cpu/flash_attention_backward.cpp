// flash_attention, backward, on the CPU: gradients of q, k, v and the sinks in tiles, O(T) memory.
// Dao et al., "FlashAttention" (2022): p is formed anew from q, k and the softmax's statistics.
//
//   p = exp(s - top) * inv   delta = rowsum(dout * o) - dlse   dp = dout v^T   ds = p (dp - delta) ds/d(q.k)
//   dv = p^T dout   dq = ds k   dk = ds^T q   dsink = -sum over rows of p_sink (rowsum(p * dp) - dlse)
//
// Of few query rows the forward pass adds up the scores in another order (flash_attention_few.h). So p of a row is
// taken from its scores here alone: a pass before all others forms them and dp, keeps both, and gives the row's sums of
// p, which then becomes one, and of p * dp, which is delta. In float32 those scores are summed in double: a few rounded
// scores are all that errors come from, and have nobody to average out with. delta is this sum too where a panel's rows
// see one block of keys: o is rounded, and where a softmax is almost all on one key dp - delta is no more than that.
//
// A task owns one block of keys of one (sequence, kv head): it transposes its k and v once, walks over panels of query
// rows and keeps dk and dv to itself. dq is added up across tasks, panel by panel, each key block waiting for its turn:
// the block before it. Tasks start in the order of the blocks, so whoever is waited for is already running; under a
// causal mask each block also starts one panel later than the one before it, and hardly any ever waits. Every sum thus
// has one order, whatever the batch, the threads and the timing: gradients repeat bit for bit.
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

constexpr int64_t kKeys = kFlashAttentionKeys;    // keys of a task
constexpr int64_t kPanel = kFlashAttentionPanel;  // query rows taken at a time
static_assert(kKeys % kLanes == 0 && kPanel % kTileRows == 0);

struct Arena {
  int64_t stride, value_stride;  // D and Dv in whole vectors
  float *keys, *keys_transposed, *values_transposed, *dk, *dv;
  float *queries, *dout, *p, *ds;

  explicit Arena(const FlashAttentionProblem& problem)
      : stride(round_up(problem.dim, kLanes)), value_stride(round_up(problem.value_dim, kLanes)) {
    const int64_t widest = most(stride, value_stride);
    float* next = scratch<float>(0, 4 * kKeys * (stride + value_stride) + kPanel * (2 * widest + 2 * kKeys));
    auto take = [&](int64_t size) {
      float* mine = next;
      next += size;
      return mine;
    };
    keys = take(kKeys * stride);
    keys_transposed = take(stride * kKeys);
    values_transposed = take(value_stride * kKeys);
    dk = take(kKeys * stride);
    dv = take(kKeys * value_stride);
    queries = take(kPanel * widest);
    dout = take(kPanel * widest);
    p = take(kPanel * kKeys);
    ds = take(kPanel * kKeys);
  }
};

// Panel `panel` of a sequence with `rows` folded rows, and the blocks of keys that any of its rows sees.
struct Panel {
  int64_t first, count;
  KeyRange seen;  // none when begin >= end

  GK_ALWAYS_INLINE Panel(const Sequence& s, int64_t group, int64_t rows, int64_t panel)
      : first(panel * kPanel),
        count(least(kPanel, rows - panel * kPanel)),
        seen(s.visible(first / group, (first + count - 1) / group)) {}
  GK_ALWAYS_INLINE bool sees(int64_t block) const {
    return seen.begin < seen.end && block >= seen.begin / kKeys && block <= last_block();
  }
  GK_ALWAYS_INLINE int64_t first_block() const { return seen.begin / kKeys; }
  GK_ALWAYS_INLINE int64_t last_block() const { return (seen.end - 1) / kKeys; }
};

// Where a block of keys and a panel of rows meet: the folded rows of q, dout, k and v, and the five products of them.
struct Operands {
  const FlashAttentionProblem& p;
  FoldedRows q, dout, k, v;
};

// The products on float32 tiles.
struct FloatProducts {
  static constexpr int64_t kStep = kLanes;  // at whose multiples the keys of a product begin
  const Operands& x;
  const Arena& arena;

  // k for dq; zeros where the block at `key` has no key that is seen.
  void load_block(int64_t key, KeyRange range) const {
    for (int64_t i = 0; i < kKeys * arena.stride; ++i) arena.keys[i] = 0.0f;
    GK_SWITCH_DTYPE(x.p.dtype, T, {
      load_rows<T>(x.k, range.begin, range.end - range.begin, x.p.dim, arena.keys + (range.begin - key) * arena.stride,
                   arena.stride);
    });
  }
  // k and v for `scores`.
  void load_scored_block(int64_t key, KeyRange range) const {
    GK_SWITCH_DTYPE(x.p.dtype, T, {
      load_columns<T>(x.k, key, kKeys, range, x.p.dim, arena.keys_transposed, kKeys);
      load_columns<T>(x.v, key, kKeys, range, x.p.value_dim, arena.values_transposed, kKeys);
    });
  }
  void load_panel(const Panel& panel) const {
    GK_SWITCH_DTYPE(x.p.dtype, T, {
      load_rows<T>(x.q, panel.first, panel.count, x.p.dim, arena.queries, arena.stride);
      load_rows<T>(x.dout, panel.first, panel.count, x.p.value_dim, arena.dout, arena.value_stride);
    });
  }
  // Scaled q.k in arena.p and dout.v in arena.ds, for keys `first` .. `first` + count of the block.
  void scores(const Panel& panel, int64_t first, int64_t count) const {
    const float scale = score_scale(x.p), one = 1.0f;
    gemm<Into::kWrite, false, 2>(panel.count, count / kLanes, x.p.dim, arena.queries, arena.stride,
                                 arena.keys_transposed + first, kKeys, arena.p + first, kKeys, &scale);
    gemm<Into::kWrite, false, 2>(panel.count, count / kLanes, x.p.value_dim, arena.dout, arena.value_stride,
                                 arena.values_transposed + first, kKeys, arena.ds + first, kKeys, &one);
  }
  void add_dk_dv(const Panel& panel, int64_t first, int64_t count) const {
    gemm<Into::kAdd, true, 2>(count, arena.value_stride / kLanes, panel.count, arena.p + first, kKeys, arena.dout,
                              arena.value_stride, arena.dv + first * arena.value_stride, arena.value_stride);
    gemm<Into::kAdd, true, 2>(count, arena.stride / kLanes, panel.count, arena.ds + first, kKeys, arena.queries,
                              arena.stride, arena.dk + first * arena.stride, arena.stride);
  }
  void add_dq(const Panel& panel, int64_t first, int64_t count, float* sum, bool begin) const {
    const float* keys = arena.keys + first * arena.stride;
    const float one = 1.0f;
    if (begin)
      gemm<Into::kWrite, false, 2>(panel.count, arena.stride / kLanes, count, arena.ds + first, kKeys, keys,
                                   arena.stride, sum, arena.stride, &one);
    else
      gemm<Into::kAdd, false, 2>(panel.count, arena.stride / kLanes, count, arena.ds + first, kKeys, keys, arena.stride,
                                 sum, arena.stride);
  }
  // delta[r] = dout . o of a panel's rows, added up in the order in which `gemm` adds up dp.
  void dots(const FoldedRows& o, const Panel& panel, float* delta) const {
    float *o_columns = arena.queries, *dout_columns = arena.dout;  // (Dv, kPanel)
    const KeyRange valid{panel.first, panel.first + panel.count};
    const int64_t padded = round_up(panel.count, kLanes);
    GK_SWITCH_DTYPE(x.p.dtype, T, {
      load_columns<T>(o, panel.first, padded, valid, x.p.value_dim, o_columns, kPanel);
      load_columns<T>(x.dout, panel.first, padded, valid, x.p.value_dim, dout_columns, kPanel);
    });
    for (int64_t r = 0; r < panel.count; r += kLanes) {
      vf sum[2] = {vf{}, vf{}};
      for (int64_t c = 0; c < x.p.value_dim; ++c)
        sum[c % 2] = fma(load(dout_columns + c * kPanel + r), load(o_columns + c * kPanel + r), sum[c % 2]);
      store(delta + r, sum[0] + sum[1]);
    }
  }
};

#if defined(GK_SIMD_BFLOAT16)
// The processor's own products of bfloat16 (strips.h): s and dp from the tensors as they are, the others with p and ds
// rounded. Every operand is a panel twice, in the form of a left and of a right one, or along the other of its dims.
struct TileProducts {
  static constexpr int64_t kStep = kTileDepth;  // ds k sums over keys
  const Operands& x;
  const Arena& arena;
  bfloat16 *keys, *values, *keys_right, *queries, *dout, *queries_right, *dout_right, *left, *dense;

  static bool take(const FlashAttentionProblem& p) {
    return p.dtype == DType::bfloat16 && p.dim <= kTilesDepth && p.value_dim <= kTilesDepth;
  }
  TileProducts(const Operands& operands, const Arena& a) : x(operands), arena(a) {
    constexpr int64_t kStride = detail::kStripStride;
    const int64_t widest = most(a.stride, a.value_stride);
    bfloat16* next = scratch<bfloat16>(
        5, (3 * kKeys + 3 * kPanel + 2 * a.stride + a.value_stride) * kStride + kKeys * most(widest, kKeys));
    const auto lines = [&](int64_t count) {
      bfloat16* mine = next;
      next += count * kStride;
      return mine;
    };
    keys = lines(kKeys);
    values = lines(kKeys);
    left = lines(most(kKeys, kPanel));
    queries = lines(kPanel);
    dout = lines(kPanel);
    keys_right = lines(a.stride);
    queries_right = lines(a.stride);
    dout_right = lines(a.value_stride);
    dense = lines(0);
  }

  // Rows first .. first + count, dense; rows of several heads are no matrix.
  Strided<bfloat16> rows(const FoldedRows& from, int64_t first, int64_t count, int64_t cols, int64_t at = 0) const {
    for (int64_t i = 0; i < count; ++i)
      __builtin_memcpy(dense + (at + i) * cols, static_cast<const bfloat16*>(from.data) + from.at(first + i), cols * 2);
    return {dense, cols, 1};
  }
  // Of the block at `key`, zeros where no key is seen.
  Strided<bfloat16> block_rows(const FoldedRows& from, int64_t key, KeyRange range, int64_t cols) const {
    __builtin_memset(dense, 0, kKeys * cols * 2);
    return rows(from, range.begin, range.end - range.begin, cols, range.begin - key);
  }
  void load_block(int64_t key, KeyRange range) const {
    pack_b(block_rows(x.k, key, range, x.p.dim), kKeys, x.p.dim, keys_right);
  }
  void load_scored_block(int64_t key, KeyRange range) const {
    pack_b(block_rows(x.k, key, range, x.p.dim).transposed(), x.p.dim, kKeys, keys);
    pack_b(block_rows(x.v, key, range, x.p.value_dim).transposed(), x.p.value_dim, kKeys, values);
  }
  void load_panel(const Panel& panel) const {
    const Strided<bfloat16> q = rows(x.q, panel.first, panel.count, x.p.dim);
    pack_a(q, panel.count, x.p.dim, queries);
    pack_b(q, panel.count, x.p.dim, queries_right);
    const Strided<bfloat16> d = rows(x.dout, panel.first, panel.count, x.p.value_dim);
    pack_a(d, panel.count, x.p.value_dim, dout);
    pack_b(d, panel.count, x.p.value_dim, dout_right);
  }
  void scores(const Panel& panel, int64_t first, int64_t count) const {
    const int64_t skipped = first * detail::kStripStride;
    configure_tiles();
    multiply_panels(panel.count, count, x.p.dim, queries, keys + skipped, arena.p + first, kKeys, false);
    multiply_panels(panel.count, count, x.p.value_dim, dout, values + skipped, arena.ds + first, kKeys, false);
    release_tiles();
    const vf scale = set1(score_scale(x.p));
    for (int64_t r = 0; r < panel.count; ++r)
      for (int64_t c = first; c < first + count; c += kLanes)
        store(arena.p + r * kKeys + c, load(arena.p + r * kKeys + c) * scale);
  }
  // A tile (kPanel, kKeys) of float32, rounded.
  Strided<bfloat16> rounded(const Panel& panel, int64_t first, int64_t count, const float* tile) const {
    for (int64_t r = 0; r < panel.count; ++r)
      for (int64_t c = first; c < first + count; c += kLanes) store(dense + r * kKeys + c, load(tile + r * kKeys + c));
    return {dense + first, kKeys, 1};
  }
  void add_dk_dv(const Panel& panel, int64_t first, int64_t count) const {
    configure_tiles();
    pack_a(rounded(panel, first, count, arena.p).transposed(), count, panel.count, left);
    multiply_panels(count, x.p.value_dim, panel.count, left, dout_right, arena.dv + first * arena.value_stride,
                    arena.value_stride, true);
    pack_a(rounded(panel, first, count, arena.ds).transposed(), count, panel.count, left);
    multiply_panels(count, x.p.dim, panel.count, left, queries_right, arena.dk + first * arena.stride, arena.stride,
                    true);
    release_tiles();
    pack_a(Strided<bfloat16>{dense + first, kKeys, 1}, panel.count, count, left);  // ds, for dq
  }
  void add_dq(const Panel& panel, int64_t first, int64_t count, float* sum, bool begin) const {
    configure_tiles();
    multiply_panels(panel.count, x.p.dim, count, left, keys_right + first * kTileLines, sum, arena.stride, !begin);
    release_tiles();
  }
  // The diagonals of dout o^T, so that the order is that of dp.
  void dots(const FoldedRows& o, const Panel& panel, float* delta) const {
    pack_a(rows(x.dout, panel.first, panel.count, x.p.value_dim), panel.count, x.p.value_dim, dout);
    pack_b(rows(o, panel.first, panel.count, x.p.value_dim).transposed(), x.p.value_dim, panel.count, values);
    configure_tiles();
    for (int64_t r = 0; r < panel.count; r += kTileLines) {
      float all[kTileLines][kTileLines];
      const int64_t count = least(panel.count - r, kTileLines), skipped = r * detail::kStripStride;
      multiply_panels(count, count, x.p.value_dim, dout + skipped, values + skipped, all[0], kTileLines, false);
      for (int64_t i = 0; i < count; ++i) delta[r + i] = all[i][i];
    }
    release_tiles();
  }
};
#endif

// Scaled q.k of float32 tiles, added up in double.
void exact_scores(const FlashAttentionProblem& p, const Arena& arena, int64_t rows, int64_t first, int64_t count) {
  using vd [[gnu::vector_size(8 * kLanes)]] = double;
  constexpr int kTogether = 2;  // rows; one of them again where there are fewer
  const double scale = score_scale(p);
  for (int64_t r = 0; r < rows; r += kTogether)
    for (int64_t c = first; c < first + count; c += kLanes) {
      const float* q[kTogether];
      for (int i = 0; i < kTogether; ++i) q[i] = arena.queries + least(r + i, rows - 1) * arena.stride;
      vd sum[kTogether] = {};
      for (int64_t d = 0; d < p.dim; ++d) {
        const vd keys = __builtin_convertvector(load(arena.keys_transposed + d * kKeys + c), vd);
        for (int i = 0; i < kTogether; ++i) sum[i] += keys * static_cast<double>(q[i][d]);
      }
      for (int i = 0; i < kTogether; ++i)
        store(arena.p + least(r + i, rows - 1) * kKeys + c, __builtin_convertvector(sum[i] * scale, vf));
    }
}

// Calls f with the products that run here.
template <typename F>
void with_products(const Operands& operands, const Arena& arena, const F& f) {
#if defined(GK_SIMD_BFLOAT16)
  if (TileProducts::take(operands.p)) return f(TileProducts(operands, arena));
#endif
  f(FloatProducts{operands, arena});
}

// Of one row and some keys, lane by lane.
struct RowSums {
  vf p, p_dp;
};

// One row of scores -> p and, unless plain, the slope of the score in q.k, for the vectors [from, to) of its block of
// keys, which starts at `key`.
GK_ALWAYS_INLINE RowSums score_row(const FlashAttentionProblem& problem, bool plain, const RowFacts& facts, int64_t key,
                                   int64_t from, int64_t to, bool masked, float top, float inv, float* p,
                                   const float* dp, float* slopes) {
  const vf shift = set1(top);
  RowSums sums{vf{}, vf{}};
  for (int64_t v = from; v < to; ++v) {
    vf s = load(p + v * kLanes);
    const vi j = lane_index() + static_cast<int32_t>(key + v * kLanes);
    if (!plain) {
      vf slope = set1(problem.scale) * facts.temperature;
      if (problem.softcap > 0.0f) {
        const vf t = tanh(s);
        s = problem.softcap * t;
        slope = slope * fnma(t, t, set1(1.0f));
      }
      store(slopes + v * kLanes, slope);
      s = fnma(set1(facts.slope), abs(to_float(facts.position - j)), s * facts.temperature);
    }
    vf e = exp(s - shift) * inv, share = e * load(dp + v * kLanes);
    if (masked) {
      const vmask inside = (j >= facts.begin) & (j < facts.end);
      e = select(inside, e, vf{});
      share = select(inside, share, vf{});
    }
    sums.p = sums.p + e;
    sums.p_dp = sums.p_dp + share;
    store(p + v * kLanes, e);
  }
  return sums;
}

// dp of one row -> ds.
GK_ALWAYS_INLINE void gradient_row(bool plain, const RowFacts& facts, int64_t key, int64_t from, int64_t to,
                                   bool masked, float scale, float delta, const float* p, const float* slopes,
                                   float* ds) {
  for (int64_t v = from; v < to; ++v) {
    const vf slope = plain ? set1(scale) : load(slopes + v * kLanes);
    vf g = load(p + v * kLanes) * (load(ds + v * kLanes) - delta) * slope;
    if (masked) {
      const vi j = lane_index() + static_cast<int32_t>(key + v * kLanes);
      g = select((j >= facts.begin) & (j < facts.end), g, vf{});
    }
    store(ds + v * kLanes, g);
  }
}

// Where a panel meets a block that starts at `key`: columns of the block's tiles, in whole vectors.
struct Columns {
  int64_t key, first, count;
};

// Everything of one launch that its tasks share.
struct Launch {
  const FlashAttentionBwdParams& params;
  const FlashAttentionProblem& p;
  int64_t group;
  const int64_t* panels_before;  // (B + 1) panels of one kv head before each sequence
  int32_t* turn;                 // (Hkv * panels) the block of keys that may add to a panel's dq now
  int64_t* few_before;           // (B) floats of few rows before each sequence's
  float* few_inv;                // (B * Hkv, kFewRows) 1 / sum of exp(score - top), of the scores formed here

  float* dq_sum(const Arena& arena, int64_t panel_index) const {
    return params.workspace + panel_index * kPanel * arena.stride;
  }
  int64_t panel_index(const Sequence& s, int64_t kv_head) const {
    return panels_before[s.b] * p.kv_heads + kv_head * (panels_before[s.b + 1] - panels_before[s.b]);
  }
  AttentionTensor dense_queries(int64_t cols) const {
    return {nullptr, p.cu_seqlens_q == nullptr ? p.queries * p.heads * cols : 0, p.heads * cols, cols};
  }
  AttentionTensor dense_keys(int64_t cols) const {
    return {nullptr, p.cu_seqlens_k == nullptr ? p.keys * p.kv_heads * cols : 0, p.kv_heads * cols, cols};
  }

  Operands operands(const Sequence& s, int64_t kv_head) const {
    return {p, folded(p.q, s, s.first_query, kv_head * group, group),
            folded(params.dout, s, s.first_query, kv_head * group, group), folded(p.k, s, s.first_key, kv_head, 1),
            folded(p.v, s, s.first_key, kv_head, 1)};
  }

  bool has_few_rows(const Sequence& s) const { return s.queries * group <= kFlashAttentionFewRows; }
  // Whether delta is the sum of p * dp.
  bool delta_of_products(const Sequence& s, const Panel& panel) const {
    return has_few_rows(s) || panel.first_block() == panel.last_block();
  }
  // q.k, and after it dp, of few rows and a block of keys: (rows, kKeys) each.
  float* few_tiles(const Sequence& s, int64_t kv_head, int64_t number) const {
    const int64_t blocks = (s.keys + kKeys - 1) / kKeys;
    return params.workspace + flash_attention_dq_floats(p) + few_before[s.b] +
           (kv_head * blocks + number) * 2 * s.queries * group * kKeys;
  }
  float inv_of(const Sequence& s, int64_t kv_head, int64_t row, int64_t at) const {
    return has_few_rows(s) ? few_inv[(s.b * p.kv_heads + kv_head) * kFlashAttentionFewRows + row] : params.inv[at];
  }

  // delta of the rows of one panel but for what comes from p * dp, else added up in the order in which dp is: where a
  // row sees one key the two cancel exactly. dq of a panel that sees no key is zero.
  void prepare(const Sequence& s, int64_t kv_head, int64_t panel_number) const {
    const int64_t rows = s.queries * group;
    const Panel panel(s, group, rows, panel_number);
    const FoldedRows o = folded(params.o, s, s.first_query, kv_head * group, group);
    const Arena arena(p);
    float delta[kPanel] = {};
    if (!delta_of_products(s, panel))
      with_products(operands(s, kv_head), arena, [&](const auto& products) { products.dots(o, panel, delta); });
    for (int64_t r = 0; r < panel.count; ++r) {
      const int64_t row = panel.first + r;
      const int64_t at = lse_offset(p, s, kv_head * group + row % group) + row / group;
      params.delta[at] = delta[r] - (params.dlse == nullptr ? 0.0f : params.dlse[at]);
    }
    int32_t& mine = turn[panel_index(s, kv_head) + panel_number];
    mine = static_cast<int32_t>(panel.first_block());
    if (panel.seen.begin < panel.seen.end) return;
    for (int64_t i = 0; i < kPanel * arena.stride; ++i) arena.queries[i] = 0.0f;
    store_dq(s, kv_head, panel, arena.queries, arena.stride);
  }

  void store_dq(const Sequence& s, int64_t kv_head, const Panel& panel, const float* tile, int64_t stride) const {
    const FoldedRows rows = folded(dense_queries(p.dim), s, s.first_query, kv_head * group, group);
    GK_SWITCH_DTYPE(p.dtype, T, store_rows<T>(tile, stride, nullptr, panel.count, p.dim, params.dq, rows, panel.first));
  }

  // What the sink of `head` takes of the softmax of the row whose statistics lie at `at`.
  float sink_probability(int64_t head, int64_t at, float inv) const {
    const vf sink = set1(p.sinks[head]);
    return exp(sink - params.top[at])[0] * inv;
  }

  // The keys of block `number` that any query sees; a key that none sees is not read.
  KeyRange seen_of_block(const Sequence& s, int64_t number) const {
    KeyRange range{0, 0};
    if (s.queries > 0) range = s.visible(0, s.queries - 1);
    return {most(range.begin, number * kKeys), least(range.end, least((number + 1) * kKeys, s.keys))};
  }
  static Columns columns(const Panel& panel, KeyRange range, int64_t key, int64_t step) {
    const int64_t first = (most(panel.seen.begin, range.begin) - key) / step * step;
    return {key, first, round_up(least(panel.seen.end, range.end) - key, kLanes) - first};
  }

  // From q.k and dp, p of one panel against the keys [range) of a block, row by row: then(row of the panel, its place
  // in top, facts, whether keys are masked, slopes, sums).
  template <typename Then>
  void probabilities(const Sequence& s, int64_t kv_head, const Panel& panel, KeyRange range, const Columns& c,
                     const Arena& arena, bool few, const Then& then) const {
    const bool plain = plain_scores(p);
    const int64_t from = c.first / kLanes, to = (c.first + c.count) / kLanes;
    float slopes[kKeys];
    for (int64_t r = 0; r < panel.count; ++r) {
      const int64_t row = panel.first + r;
      RowFacts facts = row_facts(p, s, kv_head, row);
      facts.begin = static_cast<int32_t>(most(facts.begin, range.begin));
      facts.end = static_cast<int32_t>(least(facts.end, range.end));
      const bool masked = facts.begin > c.key + c.first || facts.end < c.key + c.first + c.count;
      const int64_t at = lse_offset(p, s, kv_head * group + row % group) + row / group;
      const float inv = few ? params.inv[at] : inv_of(s, kv_head, row, at);
      const RowSums sums = score_row(p, plain, facts, c.key, from, to, masked, params.top[at], inv, arena.p + r * kKeys,
                                     arena.ds + r * kKeys, slopes);
      then(r, at, facts, masked, slopes, sums);
    }
  }

  // p and ds. Each head's share of dsink is added to sink_parts: taken from p and dp, which are float32, not from the
  // rounded o.
  void scores(const Sequence& s, int64_t kv_head, const Panel& panel, KeyRange range, const Columns& c,
              const Arena& arena, double* sink_parts) const {
    const bool plain = plain_scores(p), whole = delta_of_products(s, panel) && !has_few_rows(s);
    const int64_t from = c.first / kLanes, to = (c.first + c.count) / kLanes;
    probabilities(
        s, kv_head, panel, range, c, arena, false,
        [&](int64_t r, int64_t at, const RowFacts& facts, bool masked, const float* slopes, const RowSums& sums)
            __attribute__((always_inline)) {
              const bool wanted = whole || p.sinks != nullptr;
              const float share = wanted ? reduce_add(sums.p_dp) : 0.0f;
              const float delta = whole ? share + params.delta[at] : params.delta[at];
              gradient_row(plain, facts, c.key, from, to, masked, p.scale, delta, arena.p + r * kKeys, slopes,
                           arena.ds + r * kKeys);
              if (p.sinks == nullptr) return;
              const int64_t row = panel.first + r, head = row % group;
              const float inv = inv_of(s, kv_head, row, at);
              sink_parts[head] += double{share} * double{sink_probability(kv_head * group + head, at, inv)};
            });
  }

  // Few rows against one block of keys: q.k and dp, kept, and sums (kFewRows, 2) of p and p * dp.
  void few_block(const Sequence& s, int64_t kv_head, int64_t number, double* sums) const {
    for (int64_t i = 0; i < 2 * kFlashAttentionFewRows; ++i) sums[i] = 0.0;
    const KeyRange range = seen_of_block(s, number);
    if (range.begin >= range.end) return;
    const Arena arena(p);
    const Panel panel(s, group, s.queries * group, 0);
    float* tiles = few_tiles(s, kv_head, number);
    with_products(operands(s, kv_head), arena, [&](const auto& products) {
      const Columns c = columns(panel, range, number * kKeys, products.kStep);
      products.load_scored_block(c.key, range);
      products.load_panel(panel);
      products.scores(panel, c.first, c.count);
      if (p.dtype == DType::float32) exact_scores(p, arena, panel.count, c.first, c.count);
      __builtin_memcpy(tiles, arena.p, panel.count * kKeys * sizeof(float));
      __builtin_memcpy(tiles + panel.count * kKeys, arena.ds, panel.count * kKeys * sizeof(float));
      probabilities(s, kv_head, panel, range, c, arena, true,
                    [&](int64_t r, int64_t, const RowFacts&, bool, const float*, const RowSums& row) {
                      sums[2 * r] = reduce_add(row.p);
                      sums[2 * r + 1] = reduce_add(row.p_dp);
                    });
    });
  }

  // few_inv and delta of few rows from the sums of all blocks, `stride` apart, in order.
  void finish_few(const Sequence& s, int64_t kv_head, const double* sums, int64_t stride) const {
    for (int64_t row = 0; row < s.queries * group; ++row) {
      const int64_t head = kv_head * group + row % group, at = lse_offset(p, s, head) + row / group;
      double total = p.sinks == nullptr ? 0.0 : sink_probability(head, at, params.inv[at]), products = 0.0;
      for (int64_t block = 0; block * kKeys < s.keys; ++block) {
        total += sums[block * stride + 2 * row];
        products += sums[block * stride + 2 * row + 1];
      }
      const double factor = total == 0.0 ? 0.0 : 1.0 / total;
      params.delta[at] += static_cast<float>(products * factor);
      few_inv[(s.b * p.kv_heads + kv_head) * kFlashAttentionFewRows + row] =
          static_cast<float>(params.inv[at] * factor);
    }
  }

  // dk and dv of one block of keys, and its share of dq.
  void block(const Sequence& s, int64_t kv_head, int64_t number, double* sink_parts) const {
    const int64_t rows = s.queries * group, panels = panels_before[s.b + 1] - panels_before[s.b];
    const int64_t key = number * kKeys, keys = least(kKeys, s.keys - key);
    const bool few = has_few_rows(s);
    const Arena arena(p);
    for (int64_t i = 0; i < kKeys * arena.stride; ++i) arena.dk[i] = 0.0f;
    for (int64_t i = 0; i < kKeys * arena.value_stride; ++i) arena.dv[i] = 0.0f;

    const KeyRange range = seen_of_block(s, number);
    if (range.begin < range.end)
      with_products(operands(s, kv_head), arena, [&](const auto& products) {
        products.load_block(key, range);
        if (!few) products.load_scored_block(key, range);
        for (int64_t i = 0; i < panels; ++i) {
          const Panel panel(s, group, rows, i);
          if (!panel.sees(number)) continue;
          const Columns c = columns(panel, range, key, products.kStep);
          products.load_panel(panel);
          if (few) {
            const float* tiles = few_tiles(s, kv_head, number);
            __builtin_memcpy(arena.p, tiles, panel.count * kKeys * sizeof(float));
            __builtin_memcpy(arena.ds, tiles + panel.count * kKeys, panel.count * kKeys * sizeof(float));
          } else {
            products.scores(panel, c.first, c.count);
          }
          scores(s, kv_head, panel, range, c, arena, sink_parts);
          products.add_dk_dv(panel, c.first, c.count);
          add_dq(s, kv_head, panel, panel_index(s, kv_head) + i, number, c.first, c.count, products);
        }
      });
    const FoldedRows dk = folded(dense_keys(p.dim), s, s.first_key, kv_head, 1);
    const FoldedRows dv = folded(dense_keys(p.value_dim), s, s.first_key, kv_head, 1);
    GK_SWITCH_DTYPE(p.dtype, T, {
      store_rows<T>(arena.dk, arena.stride, nullptr, keys, p.dim, params.dk, dk, key);
      store_rows<T>(arena.dv, arena.value_stride, nullptr, keys, p.value_dim, params.dv, dv, key);
    });
  }

  template <typename Products>
  void add_dq(const Sequence& s, int64_t kv_head, const Panel& panel, int64_t index, int64_t number, int64_t first,
              int64_t count, const Products& products) const {
    const Arena& arena = products.arena;
    float* sum = dq_sum(arena, index);
    while (__atomic_load_n(&turn[index], __ATOMIC_ACQUIRE) != number) yield();
    products.add_dq(panel, first, count, sum, number == panel.first_block());
    if (number == panel.last_block()) store_dq(s, kv_head, panel, sum, arena.stride);
    __atomic_store_n(&turn[index], static_cast<int32_t>(number + 1), __ATOMIC_RELEASE);
  }

  // dsink from the shares of all blocks, `parts` (blocks, B * Hkv, G), and from dlse, in one order.
  void sink(int64_t head, const double* parts, int64_t blocks) const {
    double total = 0.0;
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t b = 0; b < p.batch; ++b)
        total -= parts[((block * p.batch + b) * p.kv_heads + head / group) * group + head % group];
    if (params.dlse != nullptr)
      for (int64_t b = 0; b < p.batch; ++b) {
        const Sequence s(p, b);
        const int64_t at = lse_offset(p, s, head);
        for (int64_t t = 0; t < s.queries; ++t)
          total += double{sink_probability(head, at + t, inv_of(s, head / group, t * group + head % group, at + t))} *
                   double{params.dlse[at + t]};
      }
    params.dsinks[head] = static_cast<float>(total);
  }
};

}  // namespace

void flash_attention_bwd(const FlashAttentionBwdParams& params) {
  const FlashAttentionProblem& p = params.problem;
  const int64_t group = p.heads / p.kv_heads;
  int64_t* panels_before = scratch<int64_t>(1, p.batch + 1);
  int64_t most_blocks = 0, most_panels = 0, cost = 0;
  panels_before[0] = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s(p, b);
    const int64_t panels = (s.queries * group + kPanel - 1) / kPanel;
    panels_before[b + 1] = panels_before[b] + panels;
    most_panels = most(most_panels, panels);
    most_blocks = most(most_blocks, (s.keys + kKeys - 1) / kKeys);
    cost += s.queries * p.heads * s.keys;
  }
  const int64_t heads = p.batch * p.kv_heads;
  int32_t* turn = scratch<int32_t>(2, panels_before[p.batch] * p.kv_heads);
  int64_t* few_before = scratch<int64_t>(4, p.batch);
  float* few_inv = scratch<float>(6, heads * kFlashAttentionFewRows);
  bool any_few = false;
  for (int64_t b = 0, floats = 0; b < p.batch; ++b) {
    const Sequence s(p, b);
    few_before[b] = floats;
    floats += flash_attention_few_floats(p, s.queries, s.keys);
    any_few = any_few || s.queries * group <= kFlashAttentionFewRows;
  }
  const Launch launch{params, p, group, panels_before, turn, few_before, few_inv};

  parallel_range(heads * most_panels, kPanel * p.value_dim * 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Sequence s(p, i / most_panels / p.kv_heads);
      if (i % most_panels < panels_before[s.b + 1] - panels_before[s.b])
        launch.prepare(s, i / most_panels % p.kv_heads, i % most_panels);
    }
  });
  const int64_t tasks = heads * most_blocks;
  if (any_few) {
    constexpr int64_t kSums = 2 * kFlashAttentionFewRows;
    double* sums = scratch<double>(7, tasks * kSums);
    parallel_tasks(tasks, cost * (p.dim + p.value_dim) / (8 * most(tasks, 1)) + 1, [&](int64_t i) {
      const Sequence s(p, i % heads / p.kv_heads);
      if (launch.has_few_rows(s) && i / heads * kKeys < s.keys)
        launch.few_block(s, i % heads % p.kv_heads, i / heads, sums + i * kSums);
    });
    for (int64_t i = 0; i < heads; ++i) {
      const Sequence s(p, i / p.kv_heads);
      if (launch.has_few_rows(s)) launch.finish_few(s, i % p.kv_heads, sums + i * kSums, heads * kSums);
    }
  }

  // Blocks in ascending order, every head's first block before any second one: see the top.
  double* sink_parts = scratch<double>(3, tasks * group);
  parallel_tasks(tasks, cost * (p.dim + p.value_dim) / (4 * most(tasks, 1)) + 1, [&](int64_t i) {
    const Sequence s(p, i % heads / p.kv_heads);
    for (int64_t h = 0; h < group; ++h) sink_parts[i * group + h] = 0.0;
    if (i / heads * kKeys < s.keys) launch.block(s, i % heads % p.kv_heads, i / heads, sink_parts + i * group);
  });
  if (params.dsinks != nullptr)
    for (int64_t head = 0; head < p.heads; ++head) launch.sink(head, sink_parts, most_blocks);
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(flash_attention_bwd, FlashAttentionBwdParams);
