// flash_attention, forward, for Hopper: bfloat16 and float16, k and v brought by the copy engine, products by wgmma.
// Shah, Bikshandi, Zhang, Thakkar, Ramani and Dao, "FlashAttention-3" (2024).
//
// A block owns 128 folded query rows of one (sequence, kv head). One warp is the producer: it keeps a ring of tiles of
// keys and values filled. Two warpgroups consume, 64 rows each, and take turns: while one multiplies, the other does
// its softmax (two named barriers, "ping-pong"). Within a warpgroup the scores of the next tile are multiplied together
// with p v of this one, so that its softmax hides behind a product too. p stays in registers.
//
// Tiles that every row of the block sees whole have no mask code; tiles at the edge go through the same code with
// masks.
#include <device/async.cuh>
#include <device/barrier.cuh>
#include <device/warpgroup.cuh>

#include "cuda/flash_attention/finish.cuh"
#include "cuda/flash_attention/launchers.h"
#include "cuda/flash_attention/rows.cuh"
#include "cuda/flash_attention/scores.cuh"
#include "cuda/matrix_tile.cuh"

namespace grokkernels {
namespace {

using namespace attention;

constexpr float kGrowth =
    8.0f;  // as in forward_sm80.cu: o is rescaled when a maximum has grown by more, in powers of 2
constexpr int kRows = 128, kGroupRows = 64;
constexpr int kThreads = 384, kConsumers = 256;
constexpr int kStages = 2;
enum Barriers { kEveryone, kTurn, kGroup = kTurn + 2, kBothGroups = kGroup + 2 };  // named barriers

// Number i of a walk uses this stage of the ring, and waits for this phase of its barriers. (Signed, each would take
// four instructions.)
GK_DEVICE int stage_of(int i) { return static_cast<int>(static_cast<unsigned>(i) % kStages); }
GK_DEVICE uint32_t parity_of(int i) { return static_cast<unsigned>(i) / kStages & 1; }

template <typename T, int kDim>
struct Shape {
  static constexpr int kKeys = kDim == 256 ? 64 : 128;
  using Queries = MatrixTile<T, kRows, kDim, false>;
  using Keys = MatrixTile<T, kKeys, kDim, false>;
  using Values = MatrixTile<T, kDim, kKeys, true>;
  using Out = Tile<T, kRows, kDim>;  // takes the place of the queries in the end
  static_assert(Out::kBytes == static_cast<int>(Queries::kBytes));
  static constexpr uint32_t kRing = Queries::kBytes;  // k and v, by stage
  static constexpr uint32_t kBars = kRing + kStages * (Keys::kBytes + Values::kBytes);
  static constexpr uint32_t kKept = kBars + 64;  // what is needed again after the loop
  static constexpr uint32_t kTable = kKept + 16;
  template <Scores kScores>
  static constexpr uint32_t kShared = kTable + QueryTable<kScores, kRows>::kBytes;
};

// The ring's places and barriers.
template <typename T, int kDim>
struct Ring {
  using S = Shape<T, kDim>;
  uint32_t base;  // of shared memory

  GK_DEVICE typename S::Keys keys(int stage) const { return {base + S::kRing + stage * S::Keys::kBytes}; }
  GK_DEVICE typename S::Values values(int stage) const {
    return {base + S::kRing + kStages * S::Keys::kBytes + stage * S::Values::kBytes};
  }
  GK_DEVICE uint32_t keys_full(int stage) const { return base + S::kBars + 8 * stage; }
  GK_DEVICE uint32_t values_full(int stage) const { return base + S::kBars + 16 + 8 * stage; }
  GK_DEVICE uint32_t keys_free(int stage) const { return base + S::kBars + 32 + 8 * stage; }
  GK_DEVICE uint32_t values_free(int stage) const { return base + S::kBars + 48 + 8 * stage; }
};

// Tiles [first, last] of keys, walked from the last to the first. Number i of the walk uses stage i % kStages in its
// round i / kStages.
struct Walk {
  int first, last;
  GK_DEVICE int count() const { return last - first + 1; }
};

template <typename T, int kDim>
GK_DEVICE void produce(const Ring<T, kDim>& ring, const TensorMap& k_map, const TensorMap& v_map, Walk walk,
                       const Sequence& s, int kv_head, bool packed) {
  using S = Shape<T, kDim>;
  const auto load = [&](auto tile, const TensorMap& map, uint32_t full, int key) {
    mbarrier_arrive_expect(full, tile.kBytes);
    constexpr bool kValues = std::is_same_v<decltype(tile), typename S::Values>;
    const int side = kValues ? 0 : key, depth = kValues ? key : 0;
    if (packed)
      tile.load(map, full, side, depth, kv_head);
    else
      tile.load(map, full, side, depth, kv_head, s.b);
  };
  for (int i = 0; i < walk.count(); ++i) {
    const int stage = stage_of(i);
    const uint32_t free = parity_of(i) ^ 1;
    const int key = static_cast<int>(s.first_key) + (walk.last - i) * S::kKeys;
    mbarrier_wait(ring.keys_free(stage), free);
    load(ring.keys(stage), k_map, ring.keys_full(stage), key);
    mbarrier_wait(ring.values_free(stage), free);
    load(ring.values(stage), v_map, ring.values_full(stage), key);
  }
}

template <typename T, int kDim, Scores kScores>
__global__ void __launch_bounds__(kThreads, 1)
    flash_attention_fwd_sm90_kernel(const __grid_constant__ FlashAttentionFwdParams params,
                                    const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                                    int tiles) {
  using S = Shape<T, kDim>;
  constexpr int kKeys = S::kKeys, kScoreRegisters = kKeys / 2, kOutRegisters = kDim / 2;
  const FlashAttentionProblem& p = params.problem;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int group = static_cast<int>(p.heads / p.kv_heads);

  // the block's rows, and the tiles of keys that any of them sees
  const int number = static_cast<int>(blockIdx.x) % tiles, rest = static_cast<int>(blockIdx.x) / tiles;
  const int kv_head = rest % static_cast<int>(p.kv_heads);
  Place place{rest / static_cast<int>(p.kv_heads), tiles - 1 - number};
  if (packed) place = packed_place(p.cu_seqlens_q, p.queries, group, kRows, static_cast<int>(p.batch), place.tile);
  const Sequence s(p, place.b);
  const int first_row = place.tile * kRows, count = least(s.queries * group - first_row, kRows);
  if (place.tile < 0 || count <= 0) return;
  const KeyRange early = s.visible(first_row / group), late = s.visible((first_row + count - 1) / group);
  const Walk walk{early.begin / kKeys, early.begin < late.end ? (late.end - 1) / kKeys : early.begin / kKeys - 1};

  const uint32_t shared = shared_address(dynamic_shared());
  const Ring<T, kDim> ring{shared};
  const QueryTable<kScores, kRows> queries{shared + S::kTable};
  if (threadIdx.x == 0) {
    store_shared_8(shared + S::kKept, {{static_cast<uint32_t>(place.b), static_cast<uint32_t>(kv_head)}});
    store_shared_8(shared + S::kKept + 8, {{static_cast<uint32_t>(first_row), static_cast<uint32_t>(count)}});
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(ring.keys_full(stage), 1);
      mbarrier_init(ring.values_full(stage), 1);
      mbarrier_init(ring.keys_free(stage), kConsumers / 32);
      mbarrier_init(ring.values_free(stage), kConsumers / 32);
    }
    fence_mbarrier_init();
  }
  sync_threads();

  const int wg = warpgroup_id();
  if (wg == 2) {
    registers_give<24>();
    if (threadIdx.x == kConsumers) produce(ring, k_map, v_map, walk, s, kv_head, packed);
    return;
  }
  registers_take<240>();

  // q, by the warpgroup that multiplies it, as the tensor cores want it
  const int thread = static_cast<int>(threadIdx.x) % 128, warp = thread / 32, lane = lane_id(), g = lane / 4,
            t = lane % 4;
  const typename S::Queries q_tile{shared};
  {
    constexpr int kChunks = kDim / 8;
    const int chunks = static_cast<int>((p.dim + 7) / 8);
    const T* head = row_of<T>(p.q, s, s.first_query, kv_head * group);
    for (int i = thread; i < kGroupRows * kChunks; i += 128) {
      const int row = wg * kGroupRows + i / kChunks, chunk = i % kChunks;
      const int folded = first_row + (row < count ? row : 0);
      const T* from = head + folded / group * p.q.row_stride + folded % group * p.q.head_stride + chunk * 8;
      const uint32_t to = q_tile.base + chunk / 8 * S::Queries::kPanelBytes + row * 128 + chunk % 8 * 16;
      copy_async_16(swizzled(to, Swizzle::bytes_128), from, row < count && chunk < chunks);
    }
    copy_async_commit();
    if (thread < kGroupRows) {
      const int row = wg * kGroupRows + thread, folded = first_row + least(row, count - 1);
      queries.store(row, p, s, folded / group, kv_head * group + folded % group);
    }
    copy_async_wait<0>();
    fence_proxy_async();
    named_barrier_sync(kGroup + wg, 128);
  }

  const ScoreRule<kScores> rule(p);
  const int own_row = wg * kGroupRows + 16 * warp;  // of the warp, in the tile
  float o[kOutRegisters], scores[kScoreRegisters];
  uint32_t weights[kKeys / 16][4];  // p, rounded
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, rescale[2] = {1.0f, 1.0f};
#pragma unroll
  for (int i = 0; i < kOutRegisters; ++i) o[i] = 0.0f;

  const auto start_scores = [&](int i) {
    const int stage = stage_of(i);
    mbarrier_wait(ring.keys_full(stage), parity_of(i));
    const typename S::Keys keys = ring.keys(stage);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c)
      wgmma<T, kKeys>(scores, q_tile.descriptor(c, wg * kGroupRows), keys.descriptor(c), c > 0);
    wgmma_commit();
  };

  // Values past the end of a packed sequence are another sequence's: p is 0 there, but 0 times infinity is not.
  const auto start_out = [&](int i) {
    const int stage = stage_of(i), key = (walk.last - i) * kKeys;
    mbarrier_wait(ring.values_full(stage), parity_of(i));
    const typename S::Values values = ring.values(stage);
    if (packed && key + kKeys > s.keys) {
      constexpr int kInPanel = kKeys * 8;  // chunks
      for (int chunk = (s.keys - key) * 8 + thread; chunk < kInPanel; chunk += 128)
        for (int panel = 0; panel < S::Values::kPanels; ++panel)
          store_shared_16(values.base + panel * S::Values::kPanelBytes + chunk * 16, {{0, 0, 0, 0}});
      fence_proxy_async();
      named_barrier_sync(kGroup + wg, 128);
    }
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kKeys / 16; ++c) wgmma<T, kDim, true>(o, weights[c], values.descriptor(c), true);
    wgmma_commit();
  };

  const auto release = [&](uint32_t barrier, bool held = true) {
    sync_warp();
    if (lane == 0 && held) mbarrier_arrive(barrier);
  };

  // Scores to exponentials, with the running maximum and sum; what o must be multiplied by is left in `rescale`.
  const auto softmax = [&](int i, auto kMasked) {
    const int key = (walk.last - i) * kKeys;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (kScores != Scores::plain) {
        const Query query = queries.load(own_row + g + 8 * r);
        const float distance = static_cast<float>(query.position - key - 2 * t);
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = scores[4 * j + 2 * r + e];
            x = rule.raw(x, query, distance - static_cast<float>(8 * j + e));
          }
      }
      if constexpr (kMasked) {
        const KeyRange seen = queries.keys(own_row + g + 8 * r);
        const int begin = seen.begin - key - 2 * t, end = seen.end - key - 2 * t;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (8 * j + e < begin || 8 * j + e >= end) scores[4 * j + 2 * r + e] = -INFINITY;
      }
      float largest = scores[2 * r];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
        largest = fmaxf(fmaxf(largest, scores[4 * j + 2 * r]), scores[4 * j + 2 * r + 1]);
      largest = warp_max<4>(largest);
      const float fall = (top[r] - largest) * rule.factor;
      const bool grown = fall < -kGrowth;
      if (!grown) largest = top[r];
      rescale[r] = grown ? exp2_approx(fall) : 1.0f;
      top[r] = largest;
      const float shift = kMasked && largest == -INFINITY ? 0.0f : largest * rule.factor;
      float part = 0.0f;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = scores[4 * j + 2 * r + e];
          x = exp2_approx(fmaf(x, rule.factor, -shift));
          part += x;
        }
      sum[r] = fmaf(sum[r], rescale[r], part);
    }
  };

  const auto rescale_out = [&] {
    if (!any(rescale[0] != 1.0f || rescale[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < kOutRegisters; ++i) o[i] *= rescale[i / 2 % 2];
  };

  const auto round_weights = [&] {
#pragma unroll
    for (int c = 0; c < kKeys / 16; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) weights[c][e] = narrow_pair<T>(scores[8 * c + 2 * e], scores[8 * c + 2 * e + 1]);
  };

  // Tiles [whole, whole_end) need no mask.
  const int whole = (late.begin + kKeys - 1) / kKeys, whole_end = early.end / kKeys;
  const auto masked = [&](int i) { return walk.last - i < whole || walk.last - i >= whole_end; };

  // What number i of the walk waits for: p v of number i - 2, so that o can be rescaled and p of number i - 1 take the
  // place of the one before.
  const auto finish_before = [&](int i) {
    static_assert(kStages == 2);
    wgmma_wait<0>();
    release(ring.values_free(stage_of(i)), i > 1);
    rescale_out();
    round_weights();
  };

  // Number i of the walk, its scores beside p v of the one before. The softmax comes last and is under way with p v
  // until the next number's wait: within one turn of the loop ptxas would move that wait above the softmax.
  const auto step = [&](int i, auto kMasked) {
    finish_before(i);
    named_barrier_sync(kTurn + wg, kConsumers);
    start_scores(i);
    start_out(i - 1);
    named_barrier_arrive(kTurn + 1 - wg, kConsumers);
    wgmma_wait<1>();
    release(ring.keys_free(stage_of(i)));
    scheduling_fence(shared);  // the release does not wait for the softmax
    softmax(i, kMasked);
  };

  const int steps = walk.count();
  if (steps > 0) {
    if (wg == 1) named_barrier_arrive(kTurn, kConsumers);
    named_barrier_sync(kTurn + wg, kConsumers);
    start_scores(0);
    named_barrier_arrive(kTurn + 1 - wg, kConsumers);
    wgmma_wait<0>();
    release(ring.keys_free(0));
    softmax(0, std::true_type{});
    for (int i = 1; i < steps;) {
      for (; i < steps && masked(i); ++i) step(i, std::true_type{});
      for (; i < steps && !masked(i); ++i) step(i, std::false_type{});
    }
    finish_before(steps);
    start_out(steps - 1);
    wgmma_wait<0>();
    if (wg == 0) named_barrier_sync(kTurn, kConsumers);  // the turn that nobody takes
  }

  // o / sum, and the statistics; the queries' place takes the rows on their way out
  named_barrier_sync(kBothGroups, kConsumers);
  const Words2 at_sequence = load_shared_8(shared + S::kKept), at_rows = load_shared_8(shared + S::kKept + 8);
  const Sequence own(p, static_cast<int>(at_sequence.word[0]));
  const int own_head = static_cast<int>(at_sequence.word[1]) * group;  // the first
  const int tile_row = static_cast<int>(at_rows.word[0]), tile_rows = static_cast<int>(at_rows.word[1]);
  float factor[2];
  warp_sum_each<4>(sum);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = own_row + g + 8 * r;
    factor[r] = finish_row(params, rule, own, tile_row + i, group, own_head, top[r], sum[r], i < tile_rows, t == 0);
  }
  const int64_t o_offset = dense_offset(packed, own, own.first_query, p.queries, p.heads, own_head, p.value_dim);
  float blocks[kDim / 8][4];
#pragma unroll
  for (int i = 0; i < kOutRegisters; ++i) blocks[i / 4][i % 4] = o[i];
  store_rows<T>(blocks, factor, typename S::Out{shared}, own_row, tile_rows - own_row, static_cast<int>(p.value_dim),
                whole_chunks<T>(params.o, p.value_dim), [&](int i) {
                  const int row = tile_row + own_row + i;
                  return static_cast<T*>(params.o) + o_offset + (row / group * p.heads + row % group) * p.value_dim;
                });
}

// k or v (B, S, Hkv, D) or packed (total, Hkv, D), with a box of one panel.
template <typename T, int kRowsOfBox>
TensorTiles tiles_of(const FlashAttentionProblem& p, const AttentionTensor& x, int64_t dim) {
  const bool packed = p.cu_seqlens_k != nullptr;
  return {.dtype = p.dtype,
          .data = x.data,
          .rank = packed ? 3 : 4,
          .size = {dim, p.keys, p.kv_heads, p.batch},
          .stride = {1, x.row_stride, x.head_stride, x.batch_stride},
          .box = {64, kRowsOfBox, 1, 1},
          .swizzle = Swizzle::bytes_128};
}

template <typename T, int kDim, Scores kScores>
bool run(const FlashAttentionFwdParams& params, Stream stream) {
  using S = Shape<T, kDim>;
  const FlashAttentionProblem& p = params.problem;
  const TensorTiles k = tiles_of<T, S::Keys::kPanelRows>(p, p.k, p.dim);
  const TensorTiles v = tiles_of<T, S::Values::kPanelRows>(p, p.v, p.value_dim);
  if (tensor_tiles_refusal(k) != nullptr || tensor_tiles_refusal(v) != nullptr) return false;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t group = p.heads / p.kv_heads;
  const int64_t tiles =
      packed ? packed_tiles(p.queries, group, kRows, p.batch) : (p.queries * group + kRows - 1) / kRows;
  const int64_t blocks = tiles * p.kv_heads * (packed ? 1 : p.batch);
  launch(flash_attention_fwd_sm90_kernel<T, kDim, kScores>,
         {.grid = {static_cast<unsigned>(blocks)}, .block = {kThreads}, .shared_bytes = S::template kShared<kScores>},
         stream, params, make_tensor_map(k), make_tensor_map(v), static_cast<int>(tiles));
  return true;
}

template <typename T, int kDim>
bool run(const FlashAttentionFwdParams& params, Stream stream) {
  switch (scores_of(params.problem)) {
    case Scores::plain:
      return run<T, kDim, Scores::plain>(params, stream);
    case Scores::softcap:
      return run<T, kDim, Scores::softcap>(params, stream);
    case Scores::general:
      return run<T, kDim, Scores::general>(params, stream);
  }
  return false;
}

template <typename T>
bool run(const FlashAttentionFwdParams& params, Stream stream) {
  const FlashAttentionProblem& p = params.problem;
  const int64_t dim = p.dim > p.value_dim ? p.dim : p.value_dim;
  if (dim <= 64) return run<T, 64>(params, stream);
  if (dim <= 128) return run<T, 128>(params, stream);
  return run<T, 256>(params, stream);
}

}  // namespace

bool flash_attention_fwd_sm90(const FlashAttentionFwdParams& params, Stream stream) {
  const FlashAttentionProblem& p = params.problem;
  if (p.queries == 0 || p.keys == 0 || p.batch == 0) return false;  // nothing to map
  if (p.dtype == DType::bfloat16) return run<bfloat16>(params, stream);
  if (p.dtype == DType::float16) return run<float16>(params, stream);
  return false;
}

}  // namespace grokkernels
