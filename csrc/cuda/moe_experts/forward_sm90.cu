// moe_experts on Hopper, first half: hidden (M, F) = act(x gate_e^T) * (x up_e^T) for the M = N * K rows in expert
// order, for bfloat16 and float16; see gemm_sm90.cuh for the product and forward.cu for every other case. The second
// half, down (M, C) = hidden down_e^T, is grouped_mm's product.
//
// A tile is 128 rows and 128 columns of gate beside the same 128 of up, one wgmma of 256 columns; a thread gets both
// numbers of a place, and the activation is applied before they leave its registers. The copy engine brings gate and
// up; rows of x are gathered by the copying warpgroup with cp.async into the same swizzled slots, so that no permuted
// copy of x exists: the idea of SonicMoE (Guo et al. 2025). In a cluster of two blocks one brings gate and the other
// up, for both.
#include <device/async.cuh>

#include "cuda/activation.cuh"
#include "cuda/gemm.cuh"
#include "cuda/gemm_sm90.cuh"
#include "cuda/groups.cuh"
#include "cuda/moe_experts/forward_sm90.h"

namespace grokkernels {
namespace {

using namespace device;

constexpr int kHalf = 128;                                      // columns of gate in a tile, and of up
constexpr int kGatherRegisters = 56, kActivateRegisters = 224;  // of a thread: 56 + 2 * 224 = 3 * 168

template <typename T, int kCluster>
using Gemm = WarpgroupGemm<T, false, false, 2 * kHalf, kCluster>;

// Copies rows of x into the left operand of the ring's slots: 128 threads, eight to a row of 128 bytes. A slot is said
// to be full when its copies have landed, which is kBehind steps later: each thread waits for its own, makes them
// visible to wgmma, and arrives.
template <typename T, typename Product>
class Gather {
 public:
  using Ring = typename Product::Ring;

  GK_DEVICE explicit Gather(const Ring& ring) : behind_(ring) {}

  // The rows begin .. end of the order, 128 at most.
  GK_DEVICE void start(const T* x, int64_t stride, int cols, const int32_t* token_of, int begin, int end) {
    x_ = x + chunk() * 8;
    stride_ = stride;
    cols_ = cols;
    inside_ = 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = begin + first_row() + i * kRowStep;
      inside_ |= static_cast<unsigned>(row < end) << i;
      token_[i] = row < end ? token_of[row] : 0;
    }
  }

  GK_DEVICE void copy(const Ring& ring, int step) {
    const int depth = step * Product::kStep;
    const bool deep = depth + chunk() * 8 < cols_;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const uint32_t row = static_cast<uint32_t>(first_row() + i * kRowStep);
      copy_async_16(swizzled(ring.left().base + row * 128 + static_cast<uint32_t>(chunk()) * 16, Swizzle::bytes_128),
                    x_ + token_[i] * stride_ + depth, deep && (inside_ >> i & 1) != 0);
    }
    copy_async_commit();
    if (under_way_ == kBehind) {
      copy_async_wait<kBehind>();
      arrive();
    } else {
      ++under_way_;
    }
  }

  GK_DEVICE void finish() {
    copy_async_wait<0>();
    for (; under_way_ > 0; --under_way_) arrive();
  }

 private:
  static constexpr int kBehind = 2;
  static constexpr int kRowStep = 128 / 8, kCopies = Product::kRows / kRowStep;
  static_assert(kBehind + 2 <=
                Product::kSlots);  // the multiplying warps hold two slots, the last one until the next is full

  static GK_DEVICE int chunk() { return static_cast<int>(threadIdx.x) % 8; }
  static GK_DEVICE int first_row() { return static_cast<int>(threadIdx.x) / 8; }

  GK_DEVICE void arrive() {
    fence_proxy_async();
    mbarrier_arrive(behind_.full());
    behind_.next();
  }

  Ring behind_;  // the slot whose copies are waited for next
  int under_way_ = 0;
  const T* x_;
  int64_t stride_;
  int cols_, token_[kCopies];
  unsigned inside_;
};

// One tile of a warpgroup: hidden, and gate and up where the backward pass will ask for them.
template <Activation kKind, typename T, typename Product>
GK_DEVICE void activate_tile(const float (&sum)[kHalf], const MoeExpertsFwdParams& p, int row, int row_end, int col) {
  const int cols = static_cast<int>(p.hidden_cols), count = cols - col;
  const bool wide = cols % 8 == 0;
  const auto first = [](int j) { return j * 8; };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + Product::row_of(half);
    const int64_t place = int64_t{r} * cols + col;
    const auto gate = [&](int j, float& a, float& b) {
      a = sum[4 * j + 2 * half];
      b = sum[4 * j + 2 * half + 1];
    };
    const auto up = [&](int j, float& a, float& b) { gate(j + kHalf / 8, a, b); };
    store_tile_row<kHalf / 8>(static_cast<T*>(p.hidden) + place, r < row_end, wide, count, first,
                              [&](int j, float& a, float& b) {
                                float gate_a, gate_b, up_a, up_b;
                                gate(j, gate_a, gate_b);
                                up(j, up_a, up_b);
                                a = activate<kKind>(gate_a) * up_a;
                                b = activate<kKind>(gate_b) * up_b;
                              });
    if (p.gate == nullptr) continue;
    store_tile_row<kHalf / 8>(static_cast<T*>(p.gate) + place, r < row_end, wide, count, first, gate);
    store_tile_row<kHalf / 8>(static_cast<T*>(p.up) + place, r < row_end, wide, count, first, up);
  }
}

template <typename T, int kCluster>
__global__ void __launch_bounds__(kWarpgroupGemmThreads, 1)
    moe_experts_gate_up_sm90_kernel(const __grid_constant__ MoeExpertsFwdParams p,
                                    const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up) {
  using Product = Gemm<T, kCluster>;
  const int rows = static_cast<int>(p.tokens * p.top_k), cols = static_cast<int>(p.hidden_cols);
  const int experts = static_cast<int>(p.experts), depth = static_cast<int>(p.cols);
  const int steps = (depth + Product::kStep - 1) / Product::kStep;
  const int rank = kCluster > 1 ? cluster_rank() : 0;
  const unsigned clusters = gridDim.x / kCluster;
  GroupTiles<Product::kRows * kCluster> tiles(p.offsets, experts, rows, (cols + kHalf - 1) / kHalf);
  GroupTile t;
  auto ring = Product::start(1 + 128);  // who asks for gate and up, and who gathers
  if (warpgroup_id() == 0) {
    registers_give<kGatherRegisters>();
    Gather<T, Product> gather(ring);
    for (unsigned i = blockIdx.x / kCluster; tiles.find(i, t); i += clusters) {
      gather.start(static_cast<const T*>(p.x), p.x_stride, depth, p.token_of, t.row + rank * Product::kRows, t.end);
      for (int step = 0; step < steps; ++step) {
        mbarrier_wait(ring.empty(), ring.parity ^ 1);
        if (threadIdx.x < 32 && elect_one()) {
          mbarrier_arrive_expect(ring.full(), Product::Right::kBytes);
          const auto half = [&](int which) {
            const TensorMap& map = which == 0 ? gate : up;
            const MatrixTile<T, kHalf, Product::kStep, false> to{ring.right().base +
                                                                 which * Product::Right::kBytes / 2};
            if constexpr (kCluster == 1)
              to.load(map, ring.full(), t.across * kHalf, step * Product::kStep, t.group);
            else
              to.load_multicast(map, ring.full(), (1 << kCluster) - 1, t.across * kHalf, step * Product::kStep,
                                t.group);
          };
          if (kCluster == 1 || rank == 0) half(0);
          if (kCluster == 1 || rank == 1) half(1);
        }
        gather.copy(ring, step);
        ring.next();
      }
    }
    gather.finish();
  } else {
    registers_take<kActivateRegisters>();
    for (unsigned i = blockIdx.x / kCluster; tiles.find(i, t); i += clusters) {
      const int row = t.row + rank * Product::kRows, col = t.across * kHalf;
      float sum[kHalf];
      Product::multiply(ring, steps, row + (warpgroup_id() - 1) * 64 < t.end, sum);
      switch (p.activation) {
        case Activation::gelu_tanh:
          activate_tile<Activation::gelu_tanh, T, Product>(sum, p, row, t.end, col);
          break;
        case Activation::gelu:
          activate_tile<Activation::gelu, T, Product>(sum, p, row, t.end, col);
          break;
        case Activation::silu:
          activate_tile<Activation::silu, T, Product>(sum, p, row, t.end, col);
          break;
        case Activation::relu:
          activate_tile<Activation::relu, T, Product>(sum, p, row, t.end, col);
          break;
      }
    }
    if (p.gate != nullptr)
      for (int row = rows_used(p.offsets, experts, rows) + static_cast<int>(blockIdx.x); row < rows; row += gridDim.x)
        for (int c = static_cast<int>(threadIdx.x) - 128; c < cols; c += 256) {
          static_cast<T*>(p.gate)[int64_t{row} * cols + c] = narrow<T>(0.0f);
          static_cast<T*>(p.up)[int64_t{row} * cols + c] = narrow<T>(0.0f);
        }
  }
  Product::finish();
}

template <typename T, int kCluster>
bool launch_gate_up(const MoeExpertsFwdParams& p, Stream stream) {
  using Product = Gemm<T, kCluster>;
  const ExpertWeights& w = p.experts_weights;
  const auto tiles = [&](const void* data, const StackStrides& s) {
    return matrix_tiles(p.dtype, data, p.cols, p.hidden_cols, p.experts, s.row, s.stack,
                        MatrixTile<T, kHalf, Product::kStep, false>::kBox);
  };
  const TensorTiles gate = tiles(w.gate, w.gate_strides), up = tiles(w.up, w.up_strides);
  if (tensor_tiles_refusal(gate) || tensor_tiles_refusal(up)) return false;
  const int64_t across = (p.hidden_cols + kHalf - 1) / kHalf;
  const int64_t most = most_group_tiles(p.tokens * p.top_k, p.experts, Product::kRows * kCluster, across);
  launch(moe_experts_gate_up_sm90_kernel<T, kCluster>,
         {.grid = {persistent_clusters(most, kCluster)},
          .block = {kWarpgroupGemmThreads},
          .shared_bytes = Product::kSharedBytes,
          .cluster = kCluster},
         stream, p, make_tensor_map(gate), make_tensor_map(up));
  return true;
}

template <typename T>
bool gate_up(const MoeExpertsFwdParams& p, Stream stream) {
  return p.tokens * p.top_k >= kLargeGroup * p.experts ? launch_gate_up<T, 2>(p, stream)
                                                       : launch_gate_up<T, 1>(p, stream);
}

}  // namespace

bool moe_experts_gate_up_sm90(const MoeExpertsFwdParams& p, Stream stream) {
  const ExpertWeights& w = p.experts_weights;
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_stride % 8 == 0 && p.cols % 8 == 0;
  if (!aligned || w.gate_strides.col != 1 || w.up_strides.col != 1) return false;
  if (p.dtype == DType::bfloat16) return gate_up<bfloat16>(p, stream);
  if (p.dtype == DType::float16) return gate_up<float16>(p, stream);
  return false;
}

}  // namespace grokkernels
