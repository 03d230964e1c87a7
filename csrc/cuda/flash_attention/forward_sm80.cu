// flash_attention, forward, with mma.sync and cp.async: sm_80 and newer.
// Dao, "FlashAttention-2" (2023), with the running maximum and sum of Milakov and Gimelshein (2018).
//
// A block owns kRows folded query rows of one (sequence, kv head) and walks over its keys from the last tile to the
// first; a warp owns kBlocks blocks of 16 rows, with their part of o in registers. Scores stay in registers too: an
// accumulator is the left operand of p v as it lies. There is one tile of k and one of v in shared memory, and each is
// refilled while the other is multiplied.
//
// Tiles that every row of the block sees whole go through a loop without a single mask; tiles at the edge of what is
// seen go through the same code with masks.
#include "cuda/flash_attention/finish.cuh"
#include "cuda/flash_attention/launchers.h"
#include "cuda/flash_attention/rows.cuh"
#include "cuda/flash_attention/scores.cuh"

namespace grokkernels {
namespace {

using namespace attention;

// In powers of two: o and the sum are brought to a larger maximum when a row's has grown by more than this. exp2 of it
// is exact enough as a p in every dtype, and for most tiles there is nothing to do.
constexpr float kGrowth = 8.0f;

template <typename T, int kDim, Scores kScores>
struct Shape {
  static constexpr bool kNarrow = sizeof(T) == 2;
  static constexpr int kWarps = kNarrow && kDim > 128 ? 8 : 4;
  static constexpr int kBlocks = kNarrow && kDim <= 128 && kScores == Scores::plain ? 2 : 1;  // of a warp
  // Warps that share their rows and keep a part of the columns of o each: where one's registers would not hold them.
  static constexpr int kParts = !kNarrow && kDim > 128 ? 2 : 1;
  static constexpr int kRows = kWarps / kParts * kBlocks * 16;
  static constexpr int kKeys = kNarrow ? (kDim > 192 ? 32 : 64) : (kDim > 64 ? 32 : 64);
  static constexpr int kThreads = kWarps * 32;
  // Steps of q.k written out: all, but for products of floats, which are long, and 256 columns, which would spill.
  static constexpr int kUnroll = !kNarrow ? 4 : kDim > 192 ? 8 : kDim / 16;
  template <int kTileRows>
  using AnyTile = std::conditional_t<kNarrow && kDim <= 128, PaddedTile<T, kTileRows, kDim>, Tile<T, kTileRows, kDim>>;
  using Queries = AnyTile<kRows>;
  using Keys = AnyTile<kKeys>;
  static constexpr int kShared = Queries::kBytes + 2 * Keys::kBytes + QueryTable<kScores, kRows>::kBytes + 24;
  static_assert(kShared <= 99 * 1024);
};

template <typename T, int kDim, Scores kScores>
__global__ void __launch_bounds__(Shape<T, kDim, kScores>::kThreads, 1)
    flash_attention_fwd_kernel(const __grid_constant__ FlashAttentionFwdParams params, int tiles, int k_stride,
                               int v_stride) {
  using S = Shape<T, kDim, kScores>;
  constexpr int kBlocks = S::kBlocks, kKeys = S::kKeys, kKeyBlocks = kKeys / 8, kColumns = kDim / 8 / S::kParts;
  const FlashAttentionProblem& p = params.problem;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int group = static_cast<int>(p.heads / p.kv_heads);

  // the block's rows
  const int number = static_cast<int>(blockIdx.x) % tiles, rest = static_cast<int>(blockIdx.x) / tiles;
  const int kv_head = rest % static_cast<int>(p.kv_heads);
  // the last rows first: under a causal mask they have the most to do
  Place place{rest / static_cast<int>(p.kv_heads), tiles - 1 - number};
  if (packed) place = packed_place(p.cu_seqlens_q, p.queries, group, S::kRows, static_cast<int>(p.batch), place.tile);
  const Sequence s(p, place.b);
  const int first_row = place.tile * S::kRows, count = least(s.queries * group - first_row, S::kRows);
  if (place.tile < 0 || count <= 0) return;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
  const int warp_row = warp / S::kParts * kBlocks * 16;        // in the tile
  const int first_column = warp % S::kParts * (8 * kColumns);  // of v and o
  const uint32_t shared = shared_address(dynamic_shared());
  const typename S::Queries q_tile{shared};
  const typename S::Keys k_tile{shared + S::Queries::kBytes}, v_tile{k_tile.base + S::Keys::kBytes};
  const typename S::Keys v_part{v_tile.base + static_cast<uint32_t>(first_column * static_cast<int>(sizeof(T)))};
  const typename S::Queries o_part{q_tile.base + static_cast<uint32_t>(first_column * static_cast<int>(sizeof(T)))};
  const QueryTable<kScores, S::kRows> queries{v_tile.base + S::Keys::kBytes};
  for (int i = static_cast<int>(threadIdx.x); i < S::kRows; i += S::kThreads) {
    const int row = first_row + least(i, count - 1);
    queries.store(i, p, s, row / group, kv_head * group + row % group);
  }
  // the keys that any row sees, and those that all see
  const KeyRange early = s.visible(first_row / group), late = s.visible((first_row + count - 1) / group);
  // What is needed again after the loop, or rarely, waits in shared memory: the loop takes all registers.
  const uint32_t kept = queries.base + queries.kBytes;
  if (threadIdx.x == 0) {
    store_shared_8(kept, {{static_cast<uint32_t>(early.begin), static_cast<uint32_t>(late.end)}});
    store_shared_8(kept + 8, {{static_cast<uint32_t>(place.b), static_cast<uint32_t>(kv_head)}});
    store_shared_8(kept + 16, {{static_cast<uint32_t>(first_row), static_cast<uint32_t>(count)}});
  }
  const int first = shuffle(early.begin / kKeys, 0);
  const int last = shuffle(early.begin < late.end ? (late.end - 1) / kKeys : -1, 0);
  // Tiles [whole, whole_end) need no mask, nor do the copies they start for the tile before them. Where a warp has no
  // row there are none, so that it may rest.
  int whole = shuffle((late.begin + kKeys - 1) / kKeys, 0), whole_end = shuffle(early.end / kKeys, 0);
  if (whole > first) ++whole;
  if (any(count <= S::kRows - kBlocks * 16)) whole_end = whole;

  const Share<typename S::Queries, S::kRows, S::kThreads> q_share(threadIdx.x);
  const Share<typename S::Keys, kKeys, S::kThreads> share(threadIdx.x);
  const int chunks = static_cast<int>((p.dim + kVector<T> - 1) / kVector<T>);
  const int value_chunks = static_cast<int>((p.value_dim + kVector<T> - 1) / kVector<T>);
  const char* k = share.from(row_of<T>(p.k, s, s.first_key + last * kKeys, kv_head), k_stride);
  const char* v = share.from(row_of<T>(p.v, s, s.first_key + last * kKeys, kv_head), v_stride);

  const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim) - first_column;
  const ScoreRule<kScores> rule(p);
  const float growth = kGrowth / rule.factor;
  float o[kBlocks][kColumns][4], top[kBlocks][2], sum[kBlocks][2];
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[m][r] = -INFINITY;
      sum[m][r] = 0.0f;
    }
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[m][n][e] = 0.0f;

  if (last >= first) {
    copy_folded<T>(q_tile, q_share, p.q, s, kv_head, group, first_row, count, chunks);
    copy_rows<true>(k_tile, share, k, k_stride, {early.begin - last * kKeys, late.end - last * kKeys}, chunks);
    copy_async_commit();
    k -= static_cast<int64_t>(k_stride) * kKeys;
  }

  // One tile of keys. kMasked: some row does not see all of it. There, and among floats, whose products are long,
  // blocks of 8 keys and columns that are not there are left out.
  const auto step = [&](int n, auto kMasked) {
    const int key = n * kKeys;  // the first one's
    constexpr bool kSparse = kMasked || !S::kNarrow;
    KeyRange valid{0, kKeys};  // rows of the tile that are read
    bool active = true;        // this warp sees any of them
    copy_async_wait<0>();
    sync_threads();  // k is there, and v of the tile before is no longer read
    if constexpr (kMasked) {
      const Words2 seen = load_shared_8(kept);
      valid = {static_cast<int>(seen.word[0]) - key, static_cast<int>(seen.word[1]) - key};
      active = any(warp_row < static_cast<int>(load_shared_4(kept + 20)) &&
                   queries.keys(warp_row).begin < key + kKeys && queries.keys(warp_row + kBlocks * 16 - 1).end > key);
    }
    copy_rows<kMasked>(v_tile, share, v, v_stride, valid, value_chunks);
    copy_async_commit();
    v -= static_cast<int64_t>(v_stride) * kKeys;

    float scores[kBlocks][kKeyBlocks][4];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int j = 0; j < kKeyBlocks; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[m][j][e] = 0.0f;
    if (active) {
#pragma unroll S::kUnroll
      for (int c = 0; c < kDim; c += kDepth<T>) {
        if (kSparse && c >= dim) break;
        uint32_t a[kBlocks][4];
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) load_left(q_tile, warp_row + 16 * m, c, a[m]);
#pragma unroll
        for (int j = 0; j < kKeyBlocks; j += 2) {
          if (kSparse && 8 * j >= valid.end) break;
          uint32_t b[2][2];
          load_right(k_tile, 8 * j, c, b);
#pragma unroll
          for (int m = 0; m < kBlocks; ++m) {
            multiply_add<T>(scores[m][j], a[m], b[0]);
            multiply_add<T>(scores[m][j + 1], a[m], b[1]);
          }
        }
      }
    }
    copy_async_wait<0>();
    sync_threads();  // v is there, and k no longer read
    copy_rows<kMasked>(k_tile, share, k, k_stride, {valid.begin + kKeys, valid.end + kKeys}, n > first ? chunks : 0);
    copy_async_commit();
    k -= static_cast<int64_t>(k_stride) * kKeys;
    if (!active) return;

    float largest[kBlocks][2];
    bool grown = false;
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      if constexpr (kScores != Scores::plain) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const Query query = queries.load(warp_row + 16 * m + g + 8 * r);
          const float distance = static_cast<float>(query.position - key - 2 * t);
#pragma unroll
          for (int j = 0; j < kKeyBlocks; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& x = scores[m][j][2 * r + e];
              x = rule.raw(x, query, distance - static_cast<float>(8 * j + e));
            }
        }
      }
      if constexpr (kMasked) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const KeyRange keys = queries.keys(warp_row + 16 * m + g + 8 * r);
          const int begin = keys.begin - key - 2 * t, end = keys.end - key - 2 * t;
#pragma unroll
          for (int j = 0; j < kKeyBlocks; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (8 * j + e < begin || 8 * j + e >= end) scores[m][j][2 * r + e] = -INFINITY;
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        largest[m][r] = scores[m][0][2 * r];
#pragma unroll
        for (int j = 0; j < kKeyBlocks; ++j)
          largest[m][r] = fmaxf(fmaxf(largest[m][r], scores[m][j][2 * r]), scores[m][j][2 * r + 1]);
        largest[m][r] = warp_max<4>(largest[m][r]);
        const bool mine = largest[m][r] - top[m][r] > growth;
        if (!mine) largest[m][r] = top[m][r];
        grown = grown || mine;
      }
    }
    if (any(grown)) {
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          // 1 where it stays; a row without a key so far is left alone
          const float rescale =
              kMasked && largest[m][r] == -INFINITY ? 1.0f : exp2_approx((top[m][r] - largest[m][r]) * rule.factor);
          sum[m][r] *= rescale;
#pragma unroll
          for (int d = 0; d < kColumns; ++d) {
            o[m][d][2 * r] *= rescale;
            o[m][d][2 * r + 1] *= rescale;
          }
        }
    }
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[m][r] = largest[m][r];
        const float shift = kMasked && top[m][r] == -INFINITY ? 0.0f : top[m][r] * rule.factor;
#pragma unroll
        for (int j = 0; j < kKeyBlocks; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = scores[m][j][2 * r + e];
            x = exp2_approx(fmaf(x, rule.factor, -shift));
            sum[m][r] += x;
          }
      }

#pragma unroll
    for (int j = 0; j < kKeys; j += kDepth<T>) {
      if (kSparse && j >= valid.end) break;
      uint32_t a[kBlocks][4];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) left_from_accumulators<T>(&scores[m][j / 8], a[m]);
#pragma unroll
      for (int d = 0; d < kColumns; d += 2) {
        if (kSparse && 8 * d >= value_dim) break;
        uint32_t b[2][2];
        load_right_transposed(v_part, j, 8 * d, b);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          multiply_add<T>(o[m][d], a[m], b[0]);
          multiply_add<T>(o[m][d + 1], a[m], b[1]);
        }
      }
    }
  };

  sync_threads();  // what waits in shared memory is there, also where there is no tile
  for (int n = last; n >= first;) {
    for (; n >= first && (n < whole || n >= whole_end); --n) step(n, std::true_type{});
    if (n < whole_end)
      for (; n >= whole; --n) step(n, std::false_type{});
  }

  // o / sum, and the statistics
  const Words2 at_sequence = load_shared_8(kept + 8), at_rows = load_shared_8(kept + 16);
  const int own_head = static_cast<int>(at_sequence.word[1]) * group;  // the first
  const int own_row = static_cast<int>(at_rows.word[0]), own_count = static_cast<int>(at_rows.word[1]);
  const Sequence own(p, static_cast<int>(at_sequence.word[0]));
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) warp_sum_each<4>(sum[m]);
  const bool vectors = whole_chunks<T>(params.o, p.value_dim);
  const int64_t o_offset = dense_offset(packed, own, own.first_query, p.queries, p.heads, own_head, p.value_dim);
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = warp_row + 16 * m + g + 8 * r;
      factor[r] = finish_row(params, rule, own, own_row + i, group, own_head, top[m][r], sum[m][r], i < own_count,
                             t == 0 && first_column == 0);
    }
    const int columns = least(value_dim, 8 * kColumns);
    store_rows<T>(o[m], factor, o_part, warp_row + 16 * m, own_count - warp_row - 16 * m, columns, vectors, [&](int i) {
      const int row = own_row + warp_row + 16 * m + i;
      return static_cast<T*>(params.o) + o_offset + (row / group * p.heads + row % group) * p.value_dim + first_column;
    });
  }
}

template <typename T, int kDim, Scores kScores>
void run(const FlashAttentionFwdParams& params, Stream stream) {
  using S = Shape<T, kDim, kScores>;
  const FlashAttentionProblem& p = params.problem;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t group = p.heads / p.kv_heads;
  const int64_t tiles =
      packed ? packed_tiles(p.queries, group, S::kRows, p.batch) : (p.queries * group + S::kRows - 1) / S::kRows;
  const int64_t blocks = tiles * p.kv_heads * (packed ? 1 : p.batch);
  launch(flash_attention_fwd_kernel<T, kDim, kScores>,
         {.grid = {static_cast<unsigned>(blocks)}, .block = {S::kThreads}, .shared_bytes = S::kShared}, stream, params,
         static_cast<int>(tiles), static_cast<int>(p.k.row_stride * sizeof(T)),
         static_cast<int>(p.v.row_stride * sizeof(T)));
}

// Head dims up to kDim, by what their scores need.
template <typename T, int kDim>
void run(const FlashAttentionFwdParams& params, Stream stream) {
  const Scores scores = scores_of(params.problem);
  if constexpr (sizeof(T) == 2) {
    if (scores == Scores::plain) return run<T, kDim, Scores::plain>(params, stream);
    if (scores == Scores::softcap) return run<T, kDim, Scores::softcap>(params, stream);
  }
  run<T, kDim, Scores::general>(params, stream);
}

}  // namespace

void flash_attention_fwd_sm80(const FlashAttentionFwdParams& params, Stream stream) {
  const FlashAttentionProblem& p = params.problem;
  const int64_t dim = p.dim > p.value_dim ? p.dim : p.value_dim;
  const bool plain = p.dtype != DType::float32 && scores_of(p) == Scores::plain;
  GK_SWITCH_DTYPE(p.dtype, T, {
    if (dim <= 64) return run<T, 64>(params, stream);
    if constexpr (sizeof(T) == 2)
      if (plain && dim <= 96) return run<T, 96, Scores::plain>(params, stream);
    if (dim <= 128) return run<T, 128>(params, stream);
    if constexpr (sizeof(T) == 2)
      if (plain && dim <= 192) return run<T, 192, Scores::plain>(params, stream);
    run<T, 256>(params, stream);
  });
}

}  // namespace grokkernels
