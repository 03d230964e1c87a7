// flash_attention, backward, for Hopper: bfloat16 and float16, head dims up to 128, tiles brought by the copy engine,
// products by wgmma.
//
// Two kernels, each with one output and no atomics, so that every run gives the same bits. Both recompute
// p = exp(score - top) * inv and ds = p * (dout.v - delta) * d score / d q.k:
//   dk, dv   a block owns 128 keys of one (sequence, kv head) and walks over the query heads of the group and their
//            rows. Scores are multiplied transposed, keys by queries, so that p and ds are left operands as they lie:
//            dv += p^T dout, dk += ds^T q.
//   dq       a block owns 128 rows of one (sequence, query head) and walks over the keys: dq += ds k.
// A producer warp keeps a ring of the walked-over tiles filled; two warpgroups consume, 64 keys or rows each. A tile is
// an operand in both ways: (rows x dim) for the scores, (dim x rows) for the gradients.
#include <device/barrier.cuh>
#include <device/warpgroup.cuh>

#include "cuda/flash_attention/launchers.h"
#include "cuda/flash_attention/rows.cuh"
#include "cuda/flash_attention/scores.cuh"
#include "cuda/matrix_tile.cuh"

namespace grokkernels {
namespace {

using namespace attention;

constexpr int kOwned = 128, kOwnedByGroup = 64;  // keys (dk, dv) or rows (dq) of a block
constexpr int kThreads = 384, kConsumers = 256, kStages = 2;
constexpr int kGroupBarrier = 1;  // named barriers of the two consumers

template <typename T, int kDim, Scores kScores>
struct Shape {
  // Rows (dk, dv) or keys (dq) of a walked-over tile: fewer where the scores' own arithmetic wants registers.
  static constexpr int kWalked = kScores == Scores::plain ? 64 : 32;
  using Owned = MatrixTile<T, kOwned, kDim, false>;
  using Walked = MatrixTile<T, kWalked, kDim, false>;       // as an operand of the scores
  using WalkedAcross = MatrixTile<T, kDim, kWalked, true>;  // the same memory, as one of the gradients
  static_assert(Walked::kBytes == WalkedAcross::kBytes);
  using OwnedQueries = QueryTable<kScores, kOwned>;
  using WalkedQueries = QueryTable<kScores, kWalked>;
  static constexpr uint32_t kRing = 2 * Owned::kBytes;
  static constexpr uint32_t kBars = kRing + kStages * 2 * Walked::kBytes;
  static constexpr uint32_t kTables = kBars + 64;
  // dk, dv: the walked-over queries and what is saved of them, by stage. dq: the owned ones.
  static constexpr uint32_t kStageTable = WalkedQueries::kBytes + 3 * kWalked * 4;
  static constexpr uint32_t kShared =
      kTables + (kStages * kStageTable > OwnedQueries::kBytes ? kStages * kStageTable
                                                              : static_cast<uint32_t>(OwnedQueries::kBytes));
};

// Shared memory: two owned tiles, a ring of two walked-over ones, barriers.
template <typename T, int kDim, Scores kScores>
struct Place90 {
  using S = Shape<T, kDim, kScores>;
  static constexpr int kWalked = S::kWalked;
  uint32_t base;

  GK_DEVICE typename S::Owned owned(int which) const { return {base + which * S::Owned::kBytes}; }
  GK_DEVICE typename S::Walked walked(int stage, int which) const {
    return {base + S::kRing + (2 * stage + which) * S::Walked::kBytes};
  }
  GK_DEVICE typename S::WalkedAcross across(int stage, int which) const { return {walked(stage, which).base}; }
  GK_DEVICE uint32_t owned_full() const { return base + S::kBars; }
  GK_DEVICE uint32_t full(int stage) const { return base + S::kBars + 8 + 8 * stage; }
  GK_DEVICE uint32_t free(int stage) const { return base + S::kBars + 24 + 8 * stage; }
  GK_DEVICE typename S::WalkedQueries queries(int stage) const { return {base + S::kTables + stage * S::kStageTable}; }
  // top in powers of two, inv and delta of the walked-over queries
  GK_DEVICE uint32_t saved(int stage, int which, int row) const {
    return base + S::kTables + stage * S::kStageTable + S::WalkedQueries::kBytes + 4 * (which * kWalked + row);
  }

  GK_DEVICE void init_barriers() const {
    if (threadIdx.x == 0) {
      mbarrier_init(owned_full(), 1);
      for (int stage = 0; stage < kStages; ++stage) {
        mbarrier_init(full(stage), 32);
        mbarrier_init(free(stage), kConsumers / 32);
      }
      fence_mbarrier_init();
    }
    sync_threads();
  }
};

// The four tensors, each (dim, rows, heads, sequence) or packed (dim, rows, heads).
struct Maps {
  TensorMap q, k, v, dout;
};

template <typename Tile>
GK_DEVICE void load_tile(const Tile& tile, const TensorMap& map, uint32_t barrier, int row, int head, int b,
                         bool packed) {
  if (packed)
    tile.load(map, barrier, row, 0, head);
  else
    tile.load(map, barrier, row, 0, head, b);
}

// Rows of a tile from `valid` on are another sequence's: they become zero, since 0 times infinity is not.
template <typename Tile>
GK_DEVICE void clear_rows(const Tile& tile, int valid, int thread) {
  for (int chunk = valid * 8 + thread; chunk < Tile::kPanelRows * 8; chunk += 128)
    for (int panel = 0; panel < Tile::kPanels; ++panel)
      store_shared_16(tile.base + panel * Tile::kPanelBytes + chunk * 16, {{0, 0, 0, 0}});
}

// 16 x kWalked accumulators as the left operands of the gradients' products.
template <typename T, int kWalked>
GK_DEVICE void round_operand(const float (&x)[kWalked / 2], uint32_t (&a)[kWalked / 16][4]) {
#pragma unroll
  for (int c = 0; c < kWalked / 16; ++c)
#pragma unroll
    for (int e = 0; e < 4; ++e) a[c][e] = narrow_pair<T>(x[8 * c + 2 * e], x[8 * c + 2 * e + 1]);
}

// Rows `first` .. of a dense tensor (.., heads, cols) out of a warp's 16 rows of accumulators times `factor`.
template <typename T, int kDim>
GK_DEVICE void write_rows(const float (&x)[kDim / 2], float factor, T* first, int64_t row_stride, int count, int cols) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = g + 8 * r;
    if (row >= count) continue;
    T* out = first + row * row_stride;
    const bool pairs = cols % 2 == 0 && reinterpret_cast<uintptr_t>(out) % 4 == 0;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      const int col = 8 * j + 2 * t;
      const float low = x[4 * j + 2 * r] * factor, high = x[4 * j + 2 * r + 1] * factor;
      if (pairs && col < cols) {
        *reinterpret_cast<uint32_t*>(out + col) = narrow_pair<T>(low, high);
      } else {
        if (col < cols) out[col] = narrow<T>(low);
        if (col + 1 < cols) out[col + 1] = narrow<T>(high);
      }
    }
  }
}

template <typename T, int kDim, Scores kScores>
__global__ void __launch_bounds__(kThreads, 1)
    flash_attention_bwd_dkv_sm90_kernel(const __grid_constant__ FlashAttentionBwdParams params,
                                        const __grid_constant__ Maps maps, int tiles) {
  using S = Shape<T, kDim, kScores>;
  constexpr int kWalked = S::kWalked, kScoreRegisters = kWalked / 2;
  const FlashAttentionProblem& p = params.problem;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int group = static_cast<int>(p.heads / p.kv_heads);

  // the block's keys, and the tiles of queries that see any of them
  const int number = static_cast<int>(blockIdx.x) % tiles, rest = static_cast<int>(blockIdx.x) / tiles;
  const int kv_head = rest % static_cast<int>(p.kv_heads);
  Place place{rest / static_cast<int>(p.kv_heads), number};
  if (packed) place = packed_place(p.cu_seqlens_k, p.keys, 1, kOwned, static_cast<int>(p.batch), number);
  const Sequence s(p, place.b);
  const int first_key = place.tile * kOwned, count = least(s.keys - first_key, kOwned);
  if (place.tile < 0 || count <= 0) return;
  const KeyRange seen_by = s.seen_by(first_key, first_key + count - 1);
  const int first = seen_by.begin / kWalked;
  const int walk = seen_by.begin < seen_by.end ? (seen_by.end - 1) / kWalked - first + 1 : 0;

  const Place90<T, kDim, kScores> at{shared_address(dynamic_shared())};
  at.init_barriers();
  const int wg = warpgroup_id(), lane = lane_id();
  if (wg == 2) {
    registers_give<40>();
    if (threadIdx.x >= kConsumers + 32) return;
    if (lane == 0) {
      mbarrier_arrive_expect(at.owned_full(), 2 * S::Owned::kBytes);
      const int row = static_cast<int>(s.first_key) + first_key;
      load_tile(at.owned(0), maps.k, at.owned_full(), row, kv_head, s.b, packed);
      load_tile(at.owned(1), maps.v, at.owned_full(), row, kv_head, s.b, packed);
    }
    for (int i = 0; i < group * walk; ++i) {
      const int stage = i % kStages, head = kv_head * group + i / walk, row = (first + i % walk) * kWalked;
      mbarrier_wait(at.free(stage), static_cast<uint32_t>(i / kStages + 1) & 1);
      const int64_t lse = lse_offset(p, s, head);
      for (int j = lane; j < kWalked; j += 32) {
        const int t = least(row + j, s.queries - 1);
        const bool inside = row + j < s.queries;
        at.queries(stage).store(j, p, s, t, head);
        store_shared_4(at.saved(stage, 0, j), float_to_bits(params.top[lse + t] * kLog2E));
        store_shared_4(at.saved(stage, 1, j), float_to_bits(inside ? params.inv[lse + t] : 0.0f));
        store_shared_4(at.saved(stage, 2, j), float_to_bits(params.delta[lse + t]));
      }
      if (lane == 0) {
        mbarrier_arrive_expect(at.full(stage), 2 * S::Walked::kBytes);
        const int from = static_cast<int>(s.first_query) + row;
        load_tile(at.walked(stage, 0), maps.q, at.full(stage), from, head, s.b, packed);
        load_tile(at.walked(stage, 1), maps.dout, at.full(stage), from, head, s.b, packed);
      } else {
        mbarrier_arrive(at.full(stage));
      }
    }
    return;
  }
  registers_take<232>();

  const int thread = static_cast<int>(threadIdx.x) % 128, warp = thread / 32, g = lane / 4, t = lane % 4;
  const ScoreRule<kScores> rule(p);
  float dk[kDim / 2], dv[kDim / 2];
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) dk[i] = dv[i] = 0.0f;
  const int own_key = first_key + wg * kOwnedByGroup + 16 * warp + g;  // and the one 8 on
  mbarrier_wait(at.owned_full(), 0);
  const typename S::Owned keys = at.owned(0), values = at.owned(1);

  const auto step = [&](int i, auto kMasked) {
    const int stage = i % kStages, row = (first + i % walk) * kWalked;
    mbarrier_wait(at.full(stage), static_cast<uint32_t>(i / kStages) & 1);
    const typename S::Walked q = at.walked(stage, 0), dout = at.walked(stage, 1);
    if (kMasked && packed && row + kWalked > s.queries) {
      clear_rows(q, s.queries - row, thread);
      clear_rows(dout, s.queries - row, thread);
      fence_proxy_async();
      named_barrier_sync(kGroupBarrier + wg, 128);
    }
    float scores[kScoreRegisters], ds[kScoreRegisters];
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c)
      wgmma<T, kWalked>(scores, keys.descriptor(c, wg * kOwnedByGroup), q.descriptor(c), c > 0);
    wgmma_commit();
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c)
      wgmma<T, kWalked>(ds, values.descriptor(c, wg * kOwnedByGroup), dout.descriptor(c), c > 0);
    wgmma_commit();
    wgmma_wait<1>();
    // p, rounded, is the first left operand; scores become p times d score / d q.k
    uint32_t weights[kWalked / 16][4], gradients[kWalked / 16][4];
#pragma unroll
    for (int j = 0; j < kWalked / 8; ++j) {
      float pair[2][2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + 2 * t + e;
        const Query query = at.queries(stage).load(column);
        const float top = bits_to_float(load_shared_4(at.saved(stage, 0, column)));
        const float inv = bits_to_float(load_shared_4(at.saved(stage, 1, column)));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int key = own_key + 8 * r;
          float& x = scores[4 * j + 2 * r + e];
          float slope;
          const float raw = rule.raw_and_slope(x, query, static_cast<float>(query.position - key), slope);
          float weight = exp2_approx(fmaf(raw, rule.factor, -top)) * inv;
          if (kMasked && (key < query.keys.begin || key >= query.keys.end)) weight = 0.0f;
          pair[r][e] = weight;
          x = weight * slope;
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) weights[j / 2][j % 2 * 2 + r] = narrow_pair<T>(pair[r][0], pair[r][1]);
    }
    if constexpr (kDim == 128 && kScores == Scores::plain)
      scheduling_fence(static_cast<uint32_t>(p.heads));  // all of p would not fit the registers
    else
      scheduling_fence(static_cast<uint32_t>(p.heads), scores);  // all of p beside v.dout
    wgmma_wait<0>();
#pragma unroll
    for (int j = 0; j < kWalked / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float delta = bits_to_float(load_shared_4(at.saved(stage, 2, 8 * j + 2 * t + e)));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int n = 4 * j + 2 * r + e;
          const float x = scores[n] * (ds[n] - delta);
          ds[n] = kMasked && scores[n] == 0.0f ? 0.0f : x;
        }
      }
    round_operand<T, kWalked>(ds, gradients);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kWalked / 16; ++c)
      wgmma<T, kDim, true>(dv, weights[c], at.across(stage, 1).descriptor(c), true);
#pragma unroll
    for (int c = 0; c < kWalked / 16; ++c)
      wgmma<T, kDim, true>(dk, gradients[c], at.across(stage, 0).descriptor(c), true);
    wgmma_commit();
    wgmma_wait<0>();
    sync_warp();
    if (lane == 0) mbarrier_arrive(at.free(stage));
  };

  for (int i = 0; i < group * walk; ++i) {
    const int row = (first + i % walk) * kWalked, last = row + kWalked - 1;
    const bool whole = last < s.queries && count == kOwned && s.visible(row).end >= first_key + kOwned &&
                       s.visible(last).begin <= first_key;
    if (whole)
      step(i, std::false_type{});
    else
      step(i, std::true_type{});
  }

  const int warp_key = wg * kOwnedByGroup + 16 * warp, left = count - warp_key;
  const auto out = [&](void* data, int64_t cols) {
    return static_cast<T*>(data) +
           dense_offset(packed, s, s.first_key + first_key + warp_key, p.keys, p.kv_heads, kv_head, cols);
  };
  write_rows<T, kDim>(dk, p.scale, out(params.dk, p.dim), p.kv_heads * p.dim, left, static_cast<int>(p.dim));
  write_rows<T, kDim>(dv, 1.0f, out(params.dv, p.value_dim), p.kv_heads * p.value_dim, left,
                      static_cast<int>(p.value_dim));
}

template <typename T, int kDim, Scores kScores>
__global__ void __launch_bounds__(kThreads, 1)
    flash_attention_bwd_dq_sm90_kernel(const __grid_constant__ FlashAttentionBwdParams params,
                                       const __grid_constant__ Maps maps, int tiles) {
  using S = Shape<T, kDim, kScores>;
  constexpr int kWalked = S::kWalked, kScoreRegisters = kWalked / 2;
  const FlashAttentionProblem& p = params.problem;
  const bool packed = p.cu_seqlens_q != nullptr;

  // the block's rows, and the tiles of keys that any of them sees
  const int number = static_cast<int>(blockIdx.x) % tiles, rest = static_cast<int>(blockIdx.x) / tiles;
  const int head = rest % static_cast<int>(p.heads), kv_head = head / static_cast<int>(p.heads / p.kv_heads);
  Place place{rest / static_cast<int>(p.heads), tiles - 1 - number};
  if (packed) place = packed_place(p.cu_seqlens_q, p.queries, 1, kOwned, static_cast<int>(p.batch), place.tile);
  const Sequence s(p, place.b);
  const int first_row = place.tile * kOwned, count = least(s.queries - first_row, kOwned);
  if (place.tile < 0 || count <= 0) return;
  const KeyRange early = s.visible(first_row), late = s.visible(first_row + count - 1);
  const int first = early.begin / kWalked;
  const int walk = early.begin < late.end ? (late.end - 1) / kWalked - first + 1 : 0;

  const Place90<T, kDim, kScores> at{shared_address(dynamic_shared())};
  const typename S::OwnedQueries queries{at.base + S::kTables};
  for (int i = static_cast<int>(threadIdx.x); i < kOwned; i += kThreads)
    queries.store(i, p, s, first_row + least(i, count - 1), head);
  at.init_barriers();
  const int wg = warpgroup_id(), lane = lane_id();
  if (wg == 2) {
    registers_give<40>();
    if (threadIdx.x >= kConsumers + 32) return;
    if (lane == 0) {
      mbarrier_arrive_expect(at.owned_full(), 2 * S::Owned::kBytes);
      const int row = static_cast<int>(s.first_query) + first_row;
      load_tile(at.owned(0), maps.q, at.owned_full(), row, head, s.b, packed);
      load_tile(at.owned(1), maps.dout, at.owned_full(), row, head, s.b, packed);
    }
    for (int i = 0; i < walk; ++i) {
      const int stage = i % kStages;
      mbarrier_wait(at.free(stage), static_cast<uint32_t>(i / kStages + 1) & 1);
      if (lane == 0) {
        mbarrier_arrive_expect(at.full(stage), 2 * S::Walked::kBytes);
        const int key = static_cast<int>(s.first_key) + (first + i) * kWalked;
        load_tile(at.walked(stage, 0), maps.k, at.full(stage), key, kv_head, s.b, packed);
        load_tile(at.walked(stage, 1), maps.v, at.full(stage), key, kv_head, s.b, packed);
      } else {
        mbarrier_arrive(at.full(stage));
      }
    }
    return;
  }
  registers_take<232>();

  const int thread = static_cast<int>(threadIdx.x) % 128, warp = thread / 32, g = lane / 4, t = lane % 4;
  const ScoreRule<kScores> rule(p);
  const int own_row = wg * kOwnedByGroup + 16 * warp + g;  // of the tile, and the one 8 on
  float dq[kDim / 2], top[2], inv[2], delta[2];
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) dq[i] = 0.0f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t lse = lse_offset(p, s, head) + first_row + least(own_row + 8 * r, count - 1);
    top[r] = params.top[lse] * kLog2E;
    inv[r] = params.inv[lse];
    delta[r] = params.delta[lse];
  }
  mbarrier_wait(at.owned_full(), 0);
  const typename S::Owned q = at.owned(0), dout = at.owned(1);

  const auto step = [&](int i, auto kMasked) {
    const int stage = i % kStages, key = (first + i) * kWalked;
    mbarrier_wait(at.full(stage), static_cast<uint32_t>(i / kStages) & 1);
    const typename S::Walked keys = at.walked(stage, 0), values = at.walked(stage, 1);
    if (kMasked && packed && key + kWalked > s.keys) {
      clear_rows(keys, s.keys - key, thread);
      clear_rows(values, s.keys - key, thread);
      fence_proxy_async();
      named_barrier_sync(kGroupBarrier + wg, 128);
    }
    float scores[kScoreRegisters], ds[kScoreRegisters];
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c)
      wgmma<T, kWalked>(scores, q.descriptor(c, wg * kOwnedByGroup), keys.descriptor(c), c > 0);
    wgmma_commit();
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c)
      wgmma<T, kWalked>(ds, dout.descriptor(c, wg * kOwnedByGroup), values.descriptor(c), c > 0);
    wgmma_commit();
    wgmma_wait<1>();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Query query = queries.load(own_row + 8 * r);
#pragma unroll
      for (int j = 0; j < kWalked / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = key + 8 * j + 2 * t + e;
          float& x = scores[4 * j + 2 * r + e];
          float slope;
          const float raw = rule.raw_and_slope(x, query, static_cast<float>(query.position - column), slope);
          x = exp2_approx(fmaf(raw, rule.factor, -top[r])) * inv[r] * slope;
          if (kMasked && (column < query.keys.begin || column >= query.keys.end)) x = 0.0f;
        }
    }
    scheduling_fence(static_cast<uint32_t>(p.heads), scores);  // all of p beside dout.v
    wgmma_wait<0>();
#pragma unroll
    for (int n = 0; n < kScoreRegisters; ++n) {
      const float x = scores[n] * (ds[n] - delta[n / 2 % 2]);
      ds[n] = kMasked && scores[n] == 0.0f ? 0.0f : x;
    }
    uint32_t gradients[kWalked / 16][4];
    round_operand<T, kWalked>(ds, gradients);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kWalked / 16; ++c)
      wgmma<T, kDim, true>(dq, gradients[c], at.across(stage, 0).descriptor(c), true);
    wgmma_commit();
    wgmma_wait<0>();
    sync_warp();
    if (lane == 0) mbarrier_arrive(at.free(stage));
  };

  for (int i = 0; i < walk; ++i) {
    const int key = (first + i) * kWalked;
    if (late.begin <= key && early.end >= key + kWalked)
      step(i, std::false_type{});
    else
      step(i, std::true_type{});
  }

  const int warp_row = wg * kOwnedByGroup + 16 * warp;
  T* out = static_cast<T*>(params.dq) +
           dense_offset(packed, s, s.first_query + first_row + warp_row, p.queries, p.heads, head, p.dim);
  write_rows<T, kDim>(dq, p.scale, out, p.heads * p.dim, count - warp_row, static_cast<int>(p.dim));
}

// (B, rows, heads, dim) or packed (rows, heads, dim), with a box of one panel of a tile of `box_rows`.
TensorTiles tiles_of(const FlashAttentionProblem& p, const AttentionTensor& x, int64_t dim, int64_t rows, int64_t heads,
                     int box_rows) {
  return {.dtype = p.dtype,
          .data = x.data,
          .rank = p.cu_seqlens_q != nullptr ? 3 : 4,
          .size = {dim, rows, heads, p.batch},
          .stride = {1, x.row_stride, x.head_stride, x.batch_stride},
          .box = {64, box_rows, 1, 1},
          .swizzle = Swizzle::bytes_128};
}

template <typename T, int kDim, Scores kScores>
bool run(const FlashAttentionBwdParams& params, Stream stream) {
  using S = Shape<T, kDim, kScores>;
  constexpr int kWalked = S::kWalked;
  const FlashAttentionProblem& p = params.problem;
  const auto maps = [&](int query_rows, int key_rows, bool& refused) {
    const TensorTiles q = tiles_of(p, p.q, p.dim, p.queries, p.heads, query_rows);
    const TensorTiles dout = tiles_of(p, params.dout, p.value_dim, p.queries, p.heads, query_rows);
    const TensorTiles k = tiles_of(p, p.k, p.dim, p.keys, p.kv_heads, key_rows);
    const TensorTiles v = tiles_of(p, p.v, p.value_dim, p.keys, p.kv_heads, key_rows);
    for (const TensorTiles* t : {&q, &dout, &k, &v}) refused = refused || tensor_tiles_refusal(*t) != nullptr;
    return refused ? Maps{} : Maps{make_tensor_map(q), make_tensor_map(k), make_tensor_map(v), make_tensor_map(dout)};
  };
  bool refused = false;
  const Maps by_key = maps(kWalked, kOwned, refused), by_query = maps(kOwned, kWalked, refused);
  if (refused) return false;
  const bool packed = p.cu_seqlens_q != nullptr;
  const auto tiles = [&](int64_t rows) {
    return static_cast<int>(packed ? packed_tiles(rows, 1, kOwned, p.batch) : (rows + kOwned - 1) / kOwned);
  };
  const auto shape = [&](int64_t blocks) {
    return LaunchShape{.grid = {static_cast<unsigned>(blocks)}, .block = {kThreads}, .shared_bytes = S::kShared};
  };
  const int64_t sequences = packed ? 1 : p.batch;
  launch(flash_attention_bwd_dkv_sm90_kernel<T, kDim, kScores>, shape(tiles(p.keys) * p.kv_heads * sequences), stream,
         params, by_key, tiles(p.keys));
  launch(flash_attention_bwd_dq_sm90_kernel<T, kDim, kScores>, shape(tiles(p.queries) * p.heads * sequences), stream,
         params, by_query, tiles(p.queries));
  return true;
}

template <typename T, int kDim>
bool run(const FlashAttentionBwdParams& params, Stream stream) {
  switch (scores_of(params.problem)) {
    case Scores::plain:
      return run<T, kDim, Scores::plain>(params, stream);
    case Scores::softcap:
      return run<T, kDim, Scores::softcap>(params, stream);
    case Scores::general:  // would not fit the registers without spilling
      return false;
  }
  return false;
}

template <typename T>
bool run(const FlashAttentionBwdParams& params, Stream stream) {
  const FlashAttentionProblem& p = params.problem;
  const int64_t dim = p.dim > p.value_dim ? p.dim : p.value_dim;
  return dim <= 64 ? run<T, 64>(params, stream) : dim <= 128 && run<T, 128>(params, stream);
}

}  // namespace

bool flash_attention_bwd_gradients_sm90(const FlashAttentionBwdParams& params, Stream stream) {
  const FlashAttentionProblem& p = params.problem;
  if (p.queries == 0 || p.keys == 0 || p.batch == 0) return false;  // nothing to map
  if (p.dtype == DType::bfloat16) return run<bfloat16>(params, stream);
  if (p.dtype == DType::float16) return run<float16>(params, stream);
  return false;
}

}  // namespace grokkernels
