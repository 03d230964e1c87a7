// flash_attention, backward, with mma.sync and cp.async: sm_80 and newer.
// Dao et al., "FlashAttention" (2022): p is formed anew from q, k and the softmax's statistics.
//
//   p = exp(s - top) * inv   delta = rowsum(dout * o) - dlse   dp = dout v^T   ds = p (dp - delta) ds/d(q.k)
//   dv = p^T dout   dq = ds k   dk = ds^T q   dsink = -sum over rows of p_sink (rowsum(p * dp) - dlse)
//
// One kernel in two roles. A block owns rows of one side, which it keeps in shared memory, and walks over the tiles of
// the other side that they have to do with: for dq it owns queries and walks over keys, for dk and dv it owns keys and
// walks over queries. Scores and dp have the owned rows as their rows in either role, so p and ds are left operands of
// the last products as they lie in registers, and each output is added up by one warp in one order. Nothing is added
// atomically: gradients repeat bit for bit, at the price of forming s and dp twice, 7 products instead of 5.
#include "cuda/flash_attention/launchers.h"
#include "cuda/flash_attention/rows.cuh"
#include "cuda/flash_attention/scores.cuh"

namespace grokkernels {
namespace {

using namespace attention;

enum class Role { dq, dk_dv, dk, dv };

template <typename T, int kDim, Scores kScores, Role kRole>
struct Shape {
  static constexpr bool kNarrow = sizeof(T) == 2;
  static constexpr bool kOwnsKeys = kRole != Role::dq;
  static constexpr bool kFirst = kRole != Role::dv;                           // dq or dk
  static constexpr bool kSecond = kRole == Role::dk_dv || kRole == Role::dv;  // dv
  static constexpr int kWarps = 4, kThreads = kWarps * 32;
  // Warps that share their rows and keep a part of the columns each: where one's registers would not hold them.
  static constexpr int kParts = !kNarrow && kDim > 64 ? 2 : 1;
  static constexpr int kOwn = kWarps / kParts * 16;  // rows of the block
  // of the other side's tiles: as many as registers hold
  static constexpr int kOther = kNarrow ? (kDim <= 64 && kScores == Scores::plain ? 64 : 32) : (kDim <= 128 ? 32 : 16);
  template <int kRows>
  using AnyTile = std::conditional_t<kNarrow && kDim <= 128, PaddedTile<T, kRows, kDim>, Tile<T, kRows, kDim>>;
  using Own = AnyTile<kOwn>;
  using Other = AnyTile<kOther>;
  using Queries = QueryTable<kScores, kOwnsKeys ? kOther : kOwn>;
  static constexpr int kStatistics = 12 * (kOwnsKeys ? kOther : kOwn);
  static constexpr int kStage = 2 * Other::kBytes;
  static constexpr int kFixed = 2 * Own::kBytes;
  static constexpr int kTables = Queries::kBytes + kStatistics;
  static constexpr int kStages = kFixed + 2 * (kStage + kTables) <= 99 * 1024 ? 2 : 1;
  static constexpr int kShared = kFixed + kStages * (kStage + kTables);
  static constexpr int kUnroll = kNarrow ? kDim / 16 : 2;
  static_assert(kShared <= 99 * 1024);
};

// What p and ds of a query need beside its scores; see FlashAttentionBwdParams.
struct Statistics {
  float shift, inv, delta;  // shift: top * log2(e)
};

// The rows of a table of them, at a shared address.
template <int kRows>
struct StatisticsTable {
  uint32_t base;
  GK_DEVICE void store(int row, float shift, float inv, float delta) const {
    store_shared_4(base + 4 * row, float_to_bits(shift));
    store_shared_4(base + 4 * (kRows + row), float_to_bits(inv));
    store_shared_4(base + 4 * (2 * kRows + row), float_to_bits(delta));
  }
  GK_DEVICE Statistics load(int row) const {
    return {bits_to_float(load_shared_4(base + 4 * row)), bits_to_float(load_shared_4(base + 4 * (kRows + row))),
            bits_to_float(load_shared_4(base + 4 * (2 * kRows + row)))};
  }
};

template <typename T, int kDim, Scores kScores, Role kRole>
__global__ void __launch_bounds__(Shape<T, kDim, kScores, kRole>::kThreads, 1)
    flash_attention_bwd_kernel(const __grid_constant__ FlashAttentionBwdParams params, int tiles) {
  using S = Shape<T, kDim, kScores, kRole>;
  constexpr bool kOwnsKeys = S::kOwnsKeys;
  constexpr int kOther = S::kOther, kBlocks = kOther / 8, kColumns = kDim / 8 / S::kParts;
  constexpr int kQueries = kOwnsKeys ? kOther : S::kOwn;
  const FlashAttentionProblem& p = params.problem;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int group = static_cast<int>(p.heads / p.kv_heads);

  // the rows the block owns: folded queries, or keys
  const int number = static_cast<int>(blockIdx.x) % tiles, rest = static_cast<int>(blockIdx.x) / tiles;
  const int kv_head = rest % static_cast<int>(p.kv_heads);
  // under a causal mask the last queries and the first keys have the most to do
  Place place{rest / static_cast<int>(p.kv_heads), kOwnsKeys ? number : tiles - 1 - number};
  if (packed)
    place = kOwnsKeys ? packed_place(p.cu_seqlens_k, p.keys, 1, S::kOwn, static_cast<int>(p.batch), place.tile)
                      : packed_place(p.cu_seqlens_q, p.queries, group, S::kOwn, static_cast<int>(p.batch), place.tile);
  const Sequence s(p, place.b);
  const int first = place.tile * S::kOwn;
  const int count = least((kOwnsKeys ? s.keys : s.queries * group) - first, S::kOwn);
  if (place.tile < 0 || count <= 0) return;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
  const int warp_row = warp / S::kParts * 16, first_column = warp % S::kParts * (8 * kColumns);

  // what they have to do with on the other side, and the part of it that needs no mask
  KeyRange other, whole{0, 0}, own_valid{0, count};
  if constexpr (kOwnsKeys) {
    const KeyRange seen_by = s.seen_by(first, first + count - 1);
    other = {seen_by.begin * group, seen_by.end * group};
    if (other.begin < other.end) {
      // A key that no query sees is not read.
      own_valid = {most(s.visible(0).begin - first, 0), least(s.visible(s.queries - 1).end - first, count)};
      // queries that see the whole tile
      whole = {s.right < 0 ? 0 : clamp(first + S::kOwn - 1 - s.right - s.start, 0, s.queries),
               s.left < 0 ? s.queries : clamp(first + s.left - s.start + 1, 0, s.queries)};
      whole = {whole.begin * group, first + S::kOwn <= s.keys ? whole.end * group : 0};
    }
  } else {
    const KeyRange early = s.visible(first / group), late = s.visible((first + count - 1) / group);
    other = {early.begin, late.end};
    whole = {late.begin, early.end};
  }

  const uint32_t shared = shared_address(dynamic_shared());
  const typename S::Own own_first{shared}, own_second{shared + S::Own::kBytes};
  const uint32_t stages = shared + S::kFixed, tables = stages + S::kStages * S::kStage;
  const auto query_table = [&](int stage) {
    return typename S::Queries{tables + static_cast<uint32_t>(kOwnsKeys ? stage * S::kTables : 0)};
  };
  const auto statistics_table = [&](int stage) {
    return StatisticsTable<kQueries>{query_table(stage).base + S::Queries::kBytes};
  };
  const auto first_tile = [&](int stage) {
    return typename S::Other{stages + static_cast<uint32_t>(stage * S::kStage)};
  };
  const auto second_tile = [&](int stage) { return typename S::Other{first_tile(stage).base + S::Other::kBytes}; };
  const Share<typename S::Own, S::kOwn, S::kThreads> own_share(threadIdx.x);
  const Share<typename S::Other, kOther, S::kThreads> share(threadIdx.x);
  const int chunks = static_cast<int>((p.dim + kVector<T> - 1) / kVector<T>);
  const int value_chunks = static_cast<int>((p.value_dim + kVector<T> - 1) / kVector<T>);
  const int k_stride = static_cast<int>(p.k.row_stride * static_cast<int64_t>(sizeof(T)));
  const int v_stride = static_cast<int>(p.v.row_stride * static_cast<int64_t>(sizeof(T)));

  // Queries first_row + i, i < kQueries, into the tables of a stage; there are rows up to `end`.
  const auto fill_tables = [&](int stage, int first_row, int end) {
    for (int i = static_cast<int>(threadIdx.x); i < kQueries; i += S::kThreads) {
      const int row = least(first_row + i, end - 1), head = kv_head * group + row % group;
      const int64_t at = lse_offset(p, s, head) + row / group;
      query_table(stage).store(i, p, s, row / group, head);
      statistics_table(stage).store(i, params.top[at] * kLog2E, params.inv[at], params.delta[at]);
    }
  };
  const auto copy_other = [&](int stage, int from) {
    if constexpr (kOwnsKeys) {
      fill_tables(stage, from, other.end);
      copy_folded<T>(first_tile(stage), share, p.q, s, kv_head, group, from, other.end - from, chunks);
      copy_folded<T>(second_tile(stage), share, params.dout, s, kv_head, group, from, other.end - from, value_chunks);
    } else {
      const KeyRange valid{0, other.end - from};
      copy_rows<true>(first_tile(stage), share, share.from(row_of<T>(p.k, s, s.first_key + from, kv_head), k_stride),
                      k_stride, valid, chunks);
      copy_rows<true>(second_tile(stage), share, share.from(row_of<T>(p.v, s, s.first_key + from, kv_head), v_stride),
                      v_stride, valid, value_chunks);
    }
    copy_async_commit();
  };

  const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);
  const ScoreRule<kScores> rule(p);
  float first_sum[S::kFirst ? kColumns : 1][4], second_sum[S::kSecond ? kColumns : 1][4];  // dq or dk; dv
#pragma unroll
  for (int d = 0; d < kColumns; ++d)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if constexpr (S::kFirst) first_sum[d][e] = 0.0f;
      if constexpr (S::kSecond) second_sum[d][e] = 0.0f;
    }
  float sink_share[2] = {0.0f, 0.0f};  // rowsum(p * dp) of the rows g and g + 8

  if (other.begin < other.end) {
    if constexpr (kOwnsKeys) {
      const char* k = own_share.from(row_of<T>(p.k, s, s.first_key + first, kv_head), k_stride);
      const char* v = own_share.from(row_of<T>(p.v, s, s.first_key + first, kv_head), v_stride);
      copy_rows<true>(own_first, own_share, k, k_stride, own_valid, chunks);
      copy_rows<true>(own_second, own_share, v, v_stride, own_valid, value_chunks);
    } else {
      fill_tables(0, first, first + count);
      copy_folded<T>(own_first, own_share, p.q, s, kv_head, group, first, count, chunks);
      copy_folded<T>(own_second, own_share, params.dout, s, kv_head, group, first, count, value_chunks);
    }
    copy_other(0, other.begin);
  }

  int stage = 0;
  for (int from = other.begin; from < other.end; from += kOther) {
    copy_async_wait<0>();
    sync_threads();
    const bool more = from + kOther < other.end;
    if constexpr (S::kStages == 2)
      if (more) copy_other(1 - stage, from + kOther);
    const typename S::Other other_first = first_tile(stage), other_second = second_tile(stage);
    const typename S::Queries queries = query_table(stage);
    const StatisticsTable<kQueries> statistics = statistics_table(stage);

    // whether any of this warp's rows has to do with the tile, and whether some have not
    const bool masked = from < whole.begin || from + kOther > whole.end;
    bool active = warp_row < count;
    if constexpr (kOwnsKeys) {
      if (masked)
        active =
            active && queries.keys(0).begin < first + warp_row + 16 && queries.keys(kOther - 1).end > first + warp_row;
    } else {
      if (masked)
        active = active && queries.keys(warp_row).begin < from + kOther && queries.keys(warp_row + 15).end > from;
    }
    const auto step = [&](auto kMasked) {
      constexpr bool kSparse = kMasked || !S::kNarrow;
      const int there = other.end - from;  // rows of the tile
      float scores[kBlocks][4], dp[kBlocks][4];
#pragma unroll
      for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[j][e] = dp[j][e] = 0.0f;
      const auto multiply = [&](float(&d)[kBlocks][4], const typename S::Own& own, const typename S::Other& tile,
                                int columns) {
#pragma unroll S::kUnroll
        for (int c = 0; c < kDim; c += kDepth<T>) {
          if (kSparse && c >= columns) break;
          uint32_t a[4];
          load_left(own, warp_row, c, a);
#pragma unroll
          for (int j = 0; j < kBlocks; j += 2) {
            if (kSparse && 8 * j >= there) break;
            uint32_t b[2][2];
            load_right(tile, 8 * j, c, b);
            multiply_add<T>(d[j], a, b[0]);
            multiply_add<T>(d[j + 1], a, b[1]);
          }
        }
      };
      multiply(scores, own_first, other_first, dim);
      if constexpr (S::kFirst) multiply(dp, own_second, other_second, value_dim);

      // scores -> p, dp -> ds divided by the scale
      const auto gradient = [&](float& score, float& dp, const Query& query, const Statistics& row, int key,
                                float distance) {
        float slope;
        const float raw = rule.raw_and_slope(score, query, distance, slope);
        score = exp2_approx(fmaf(raw, rule.factor, -row.shift)) * row.inv;
        if (kMasked && (key < query.keys.begin || key >= query.keys.end)) score = 0.0f;
        const float share = score * dp;
        dp = score * (dp - row.delta) * slope;
        return share;
      };
      if constexpr (kOwnsKeys) {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int i = 8 * j + 2 * t + e;
            Query query = queries.load(i);
            const Statistics row = statistics.load(i);
            if (kMasked && from + i >= other.end) query.keys = {0, 0};
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int key = first + warp_row + g + 8 * r;
              gradient(scores[j][2 * r + e], dp[j][2 * r + e], query, row, key,
                       static_cast<float>(query.position - key));
            }
          }
      } else {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const Query query = queries.load(warp_row + g + 8 * r);
          const Statistics row = statistics.load(warp_row + g + 8 * r);
          const float distance = static_cast<float>(query.position - from - 2 * t);
#pragma unroll
          for (int j = 0; j < kBlocks; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              sink_share[r] += gradient(scores[j][2 * r + e], dp[j][2 * r + e], query, row, from + 8 * j + 2 * t + e,
                                        distance - static_cast<float>(8 * j + e));
        }
      }

      const auto add = [&](float(&sum)[kColumns][4], const float(&x)[kBlocks][4], const typename S::Other& tile,
                           int columns) {
        const typename S::Other part{tile.base + static_cast<uint32_t>(first_column * static_cast<int>(sizeof(T)))};
#pragma unroll
        for (int j = 0; j < kOther; j += kDepth<T>) {
          if (kSparse && j >= there) break;
          uint32_t a[4];
          left_from_accumulators<T>(&x[j / 8], a);
#pragma unroll
          for (int d = 0; d < kColumns; d += 2) {
            if (kSparse && 8 * d >= columns) break;
            uint32_t b[2][2];
            load_right_transposed(part, j, 8 * d, b);
            multiply_add<T>(sum[d], a, b[0]);
            multiply_add<T>(sum[d + 1], a, b[1]);
          }
        }
      };
      if constexpr (S::kSecond) add(second_sum, scores, other_second, value_dim - first_column);
      if constexpr (S::kFirst) add(first_sum, dp, other_first, dim - first_column);
    };
    if (any(active)) {
      if (masked)
        step(std::true_type{});
      else
        step(std::false_type{});
    }
    if constexpr (S::kStages == 2) {
      stage = 1 - stage;
    } else {
      sync_threads();
      if (more) copy_other(0, from + kOther);
    }
  }

  // the outputs, by way of the rows this warp (and the other with its rows) is done with
  sync_threads();
  const int mine = count - warp_row;
  const auto store = [&](void* data, const auto& sum, const typename S::Own& tile, int64_t cols, float scale) {
    const typename S::Own part{tile.base + static_cast<uint32_t>(first_column * static_cast<int>(sizeof(T)))};
    const int64_t heads = kOwnsKeys ? p.kv_heads : p.heads, rows = kOwnsKeys ? p.keys : p.queries;
    T* out = static_cast<T*>(data) + dense_offset(packed, s, kOwnsKeys ? s.first_key : s.first_query, rows, heads,
                                                  kOwnsKeys ? kv_head : kv_head * group, cols);
    const float factor[2] = {scale, scale};
    store_rows<T>(sum, factor, part, warp_row, mine, least(static_cast<int>(cols) - first_column, 8 * kColumns),
                  whole_chunks<T>(data, cols), [&](int i) {
                    const int row = first + warp_row + i;
                    const int64_t at = kOwnsKeys ? row * heads : row / group * heads + row % group;
                    return out + at * cols + first_column;
                  });
  };
  if constexpr (S::kFirst) store(kOwnsKeys ? params.dk : params.dq, first_sum, own_first, p.dim, p.scale);
  if constexpr (S::kSecond) store(params.dv, second_sum, own_second, p.value_dim, 1.0f);
  if constexpr (!kOwnsKeys) {
    if (p.sinks == nullptr) return;
    warp_sum_each<4>(sink_share);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = warp_row + g + 8 * r, row = first + i;
      if (t == 0 && first_column == 0 && i < count)
        params.workspace[lse_offset(p, s, kv_head * group + row % group) + row / group] = sink_share[r];
    }
  }
}

// delta of every row of the tensor: eight lanes each.
constexpr int kDeltaThreads = 256, kDeltaLanes = 8;

template <typename T>
__global__ void __launch_bounds__(kDeltaThreads)
    flash_attention_bwd_delta_kernel(const __grid_constant__ FlashAttentionBwdParams params, int64_t rows) {
  const FlashAttentionProblem& p = params.problem;
  const int64_t i = (int64_t{blockIdx.x} * kDeltaThreads + threadIdx.x) / kDeltaLanes;  // as in lse
  const int lane = static_cast<int>(threadIdx.x) % kDeltaLanes;
  float sum = 0.0f;
  if (i < rows) {
    const int64_t t = i % p.queries, head = i / p.queries % p.heads, b = i / p.queries / p.heads;
    const auto row = [&](const AttentionTensor& x) {
      return static_cast<const T*>(x.data) + b * x.batch_stride + t * x.row_stride + head * x.head_stride;
    };
    const T *o = row(params.o), *dout = row(params.dout);
    const bool vectors = reinterpret_cast<uintptr_t>(o) % 16 == 0;
    for (int64_t c = lane * kVector<T>; c < p.value_dim; c += kDeltaLanes * kVector<T>) {
      float x[kVector<T>], y[kVector<T>];
      if (vectors && c + kVector<T> <= p.value_dim)
        load_vector(o + c, x);
      else
        load_elements(o + c, p.value_dim - c, x);
      load_vector(dout + c, y);  // padded with zeros
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) sum = fmaf(x[e], y[e], sum);
    }
  }
  sum = warp_sum<kDeltaLanes>(sum);
  if (i < rows && lane == 0) params.delta[i] = sum - (params.dlse == nullptr ? 0.0f : params.dlse[i]);
}

// dsinks: a block per head adds up its rows in one order.
constexpr int kSinkThreads = 256;

__global__ void __launch_bounds__(kSinkThreads)
    flash_attention_bwd_sinks_kernel(const __grid_constant__ FlashAttentionBwdParams params, int64_t batch) {
  const FlashAttentionProblem& p = params.problem;
  const int64_t head = blockIdx.x;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < batch * p.queries; i += kSinkThreads) {
    const int64_t at = (i / p.queries * p.heads + head) * p.queries + i % p.queries;
    const float share = params.workspace[at] - (params.dlse == nullptr ? 0.0f : params.dlse[at]);
    sum -= static_cast<double>(expf(p.sinks[head] - params.top[at]) * params.inv[at]) * static_cast<double>(share);
  }
  sum = block_sum<kSinkThreads>(sum, reinterpret_cast<double*>(dynamic_shared()));
  if (threadIdx.x == 0) params.dsinks[head] = static_cast<float>(sum);
}

template <typename T, int kDim, Scores kScores, Role kRole>
void run(const FlashAttentionBwdParams& params, Stream stream) {
  using S = Shape<T, kDim, kScores, kRole>;
  const FlashAttentionProblem& p = params.problem;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t group = S::kOwnsKeys ? 1 : p.heads / p.kv_heads, rows = S::kOwnsKeys ? p.keys : p.queries;
  const int64_t tiles = packed ? packed_tiles(rows, group, S::kOwn, p.batch) : (rows * group + S::kOwn - 1) / S::kOwn;
  const int64_t blocks = tiles * p.kv_heads * (packed ? 1 : p.batch);
  launch(flash_attention_bwd_kernel<T, kDim, kScores, kRole>,
         {.grid = {static_cast<unsigned>(blocks)}, .block = {S::kThreads}, .shared_bytes = S::kShared}, stream, params,
         static_cast<int>(tiles));
}

template <typename T, int kDim, Scores kScores>
void run(const FlashAttentionBwdParams& params, Stream stream) {
  run<T, kDim, kScores, Role::dq>(params, stream);
  if constexpr (kDim <= 128) {
    run<T, kDim, kScores, Role::dk_dv>(params, stream);
  } else {  // registers do not hold both
    run<T, kDim, kScores, Role::dk>(params, stream);
    run<T, kDim, kScores, Role::dv>(params, stream);
  }
}

template <typename T, int kDim>
void run(const FlashAttentionBwdParams& params, Stream stream) {
  if constexpr (sizeof(T) == 2)
    if (scores_of(params.problem) == Scores::plain) return run<T, kDim, Scores::plain>(params, stream);
  run<T, kDim, Scores::general>(params, stream);
}

}  // namespace

void flash_attention_bwd_sm80(const FlashAttentionBwdParams& params, Stream stream) {
  const FlashAttentionProblem& p = params.problem;
  const int64_t dim = p.dim > p.value_dim ? p.dim : p.value_dim;
  const int64_t batch = p.cu_seqlens_q == nullptr ? p.batch : 1, rows = batch * p.heads * p.queries;
  GK_SWITCH_DTYPE(p.dtype, T, {
    const int64_t blocks = (rows * kDeltaLanes + kDeltaThreads - 1) / kDeltaThreads;
    launch(flash_attention_bwd_delta_kernel<T>, {.grid = {static_cast<unsigned>(blocks)}, .block = {kDeltaThreads}},
           stream, params, rows);
    const bool hopper = device_architecture() / 10 == 9 && params.dsinks == nullptr;
    if (hopper && flash_attention_bwd_gradients_sm90(params, stream)) return;
    if (dim <= 64)
      run<T, 64>(params, stream);
    else if (dim <= 128)
      run<T, 128>(params, stream);
    else
      run<T, 256>(params, stream);
  });
  if (params.dsinks != nullptr)
    launch(flash_attention_bwd_sinks_kernel,
           {.grid = {static_cast<unsigned>(p.heads)}, .block = {kSinkThreads}, .shared_bytes = 128}, stream, params,
           batch);
}

}  // namespace grokkernels
