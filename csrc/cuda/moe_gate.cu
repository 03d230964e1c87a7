// moe_gate: weights, indices (N, K), counts (E) and two losses from logits (N, E), and the gradient of the logits. The
// mathematics and its sources: grokkernels/reference/moe_gate.py.
//
// One idea: a row never leaves the registers of kWidth lanes of a warp, a power of two; lane l holds the experts
// v * kWidth + l. A row of 8 experts takes two lanes, one of 128 a warp, and up to 1024 are held with more of them in
// each lane. Maximum, sums and each of the K choices are butterflies over the row's lanes. A choice is made by the key
// (value, then lower index), so equal scores go to the lower expert whatever lane holds it; what decides it is float32
// arithmetic in the reference's order.
//
// Counts and losses are summed per lane over the rows of a block, per block into a work space, and over the blocks in a
// second kernel, in an order that the shape alone decides: the same bits for every run and device. (Rows in sub-warps
// are vLLM's and TensorRT-LLM's idea too.)
#include <device/convert.cuh>
#include <device/core.cuh>
#include <device/memory.cuh>
#include <device/warp.cuh>

#include "common/philox.h"
#include "cuda/reduce.cuh"
#include "moe_gate.h"

namespace grokkernels {
namespace {

using namespace device;

constexpr int kThreads = static_cast<int>(kMoeGateThreads), kWarps = kThreads / 32;
constexpr float kSmallest = 1e-20f;  // a sum that something is divided by is at least this
constexpr float kInfinity = __builtin_inff();

// Blocks that a multiprocessor is to hold at least, about as many as the registers for kEach experts in a lane allow:
// 3 of 4, 2 of 8, 1 of 16 and 32.
template <int kEach>
constexpr int kBlocks = kEach <= 8 ? 4 - kEach / 4 : 1;

// ------------------------------------------------------------------------------------------------- logits to scores

// The row's elements that this lane holds, -infinity past the last expert; and back.
template <int kWidth, int kEach, typename T>
GK_DEVICE void load_lane(const T* row, int lane, int experts, float (&x)[kEach]) {
#pragma unroll
  for (int v = 0; v < kEach; ++v) x[v] = v * kWidth + lane < experts ? widen(row[v * kWidth + lane]) : -kInfinity;
}

template <int kWidth, int kEach, typename T>
GK_DEVICE void store_lane(T* row, int lane, int experts, const float (&x)[kEach]) {
#pragma unroll
  for (int v = 0; v < kEach; ++v)
    if (v * kWidth + lane < experts) row[v * kWidth + lane] = narrow<T>(x[v]);
}

// x becomes z of a row, what the softmax sees, -infinity past the last expert; or with kSlope dz/dlogits.
template <bool kSlope, int kWidth, int kEach>
GK_DEVICE void load_row(const MoeGateOptions& g, int64_t row, int lane, float (&x)[kEach]) {
  const int experts = static_cast<int>(g.experts);
  GK_SWITCH_DTYPE(g.dtype, T,
                  load_lane<kWidth>(static_cast<const T*>(g.logits) + row * g.logits_stride, lane, experts, x));
  if (!kSlope && g.jitter == 0.0f && g.softcap == 0.0f) return;
#pragma unroll
  for (int v = 0; v < kEach; ++v) {
    const int e = v * kWidth + lane;
    float slope = 1.0f;
    if (g.jitter != 0.0f) {
      slope = 1.0f + g.jitter * (2.0f * philox_uniform(static_cast<uint64_t>(row * g.experts + e), g.seed) - 1.0f);
      x[v] *= slope;
    }
    if (g.softcap != 0.0f) {
      const float t = tanhf(x[v] / g.softcap);
      x[v] = e < experts ? g.softcap * t : -kInfinity;
      slope *= 1.0f - t * t;
    }
    if constexpr (kSlope) x[v] = slope;
  }
}

struct Scores {
  bool routed;        // the row exists and its logsumexp is finite
  float largest;      // of z
  float denominator;  // the sum of exp(z - largest)
  float log;          // of it: logsumexp(z) is largest + log
  float total;        // sum over the experts of the scores
};

// The scores: softmax(z), or sigmoid(z). All 0, and z too, where a row is not routed, so that no NaN goes further.
template <int kWidth, int kEach>
GK_DEVICE Scores score(const MoeGateOptions& g, bool exists, int lane, float (&z)[kEach], float (&scores)[kEach]) {
  Scores s;
  s.largest = -kInfinity;
#pragma unroll
  for (int v = 0; v < kEach; ++v) s.largest = fmaxf(s.largest, z[v]);
  s.largest = warp_max<kWidth>(s.largest);
  s.denominator = 0.0f;
#pragma unroll
  for (int v = 0; v < kEach; ++v) {
    scores[v] = expf(z[v] - s.largest);
    s.denominator += scores[v];
  }
  s.denominator = warp_sum<kWidth>(s.denominator);
  s.log = logf(s.denominator);
  s.routed = exists && fabsf(s.largest + s.log) < kInfinity;
  if (!s.routed) {
    s.largest = s.log = 0.0f;
    s.denominator = 1.0f;
#pragma unroll
    for (int v = 0; v < kEach; ++v) z[v] = scores[v] = 0.0f;
  }
  s.total = 1.0f;
  if (g.sigmoid) {
    float total = 0.0f;
#pragma unroll
    for (int v = 0; v < kEach; ++v) {
      scores[v] = s.routed && v * kWidth + lane < g.experts ? 1.0f / (1.0f + expf(-z[v])) : 0.0f;
      total += scores[v];
    }
    s.total = warp_sum<kWidth>(total);
  } else {
#pragma unroll
    for (int v = 0; v < kEach; ++v) scores[v] /= s.denominator;
  }
  return s;
}

// ---------------------------------------------------------------------------------------------------------- forward

// choice becomes -infinity outside the topk_groups best groups of the row. A group's score is its best value, with a
// bias the sum of its two best. A lane scores whole groups, out of shared memory: values (E) and groups (num_groups),
// of this row alone; a group is taken when fewer than topk_groups are better.
template <int kWidth, int kEach>
GK_DEVICE void limit_groups(const MoeGateFwdParams& p, int lane, float (&choice)[kEach], float* values, float* groups) {
  const int experts = static_cast<int>(p.gate.experts), count = static_cast<int>(p.num_groups), size = experts / count;
#pragma unroll
  for (int v = 0; v < kEach; ++v)
    if (v * kWidth + lane < experts) values[v * kWidth + lane] = choice[v];
  sync_warp();
#pragma unroll 1
  for (int g = lane; g < count; g += kWidth) {
    float first = -kInfinity, second = first;
    int at = g % size;  // a start of its own, so that lanes do not meet in one bank
    for (int i = 0; i < size; ++i) {
      const float x = values[g * size + at];
      second = fmaxf(second, fminf(first, x));
      first = fmaxf(first, x);
      at = at + 1 < size ? at + 1 : 0;
    }
    const float sum = p.bias != nullptr && size > 1 ? first + second : first;
    groups[g] = sum == sum ? sum : kInfinity;
  }
  sync_warp();
#pragma unroll 1
  for (int g = lane; g < count; g += kWidth) {
    int better = 0;
    for (int other = 0; other < count; ++other)
      better += groups[other] > groups[g] || (groups[other] == groups[g] && other < g);
    values[g] = better < p.topk_groups ? 1.0f : 0.0f;
  }
  sync_warp();
#pragma unroll
  for (int v = 0; v < kEach; ++v) {
    const int e = v * kWidth + lane;
    if (e < experts && values[e / size] == 0.0f) choice[v] = -kInfinity;
  }
  sync_warp();
}

// The choices of a row, spread over its lanes: lane l holds numbers l, l + kWidth, ... The first is in registers, where
// K is at most kWidth all are; the others lie in the row's outputs.
template <int kWidth>
struct Chosen {
  int lane, count;
  float* weights;    // (K)
  int32_t* indices;  // (K)
  float weight = 0.0f;
  int32_t index = -1;

  GK_DEVICE void put(int k, int32_t expert, float x) {
    if (k % kWidth != lane) return;
    if (k < kWidth) {
      weight = x;
      index = expert;
    } else {
      weights[k] = x;
      indices[k] = expert;
    }
  }
  // Replaces each weight of this lane by f(weight).
  template <typename Function>
  GK_DEVICE void each(const Function& f) {
    if (lane < count) weight = f(weight);
#pragma unroll 1
    for (int k = lane + kWidth; k < count; k += kWidth) weights[k] = f(weights[k]);
  }
  GK_DEVICE float sum() {
    float total = 0.0f;
    each([&](float x) {
      total += x;
      return x;
    });
    return warp_sum<kWidth>(total);
  }
};

template <int kWidth, int kEach>
__global__ void __launch_bounds__(kThreads, kBlocks<kEach>)
    moe_gate_fwd_kernel(const __grid_constant__ MoeGateFwdParams p) {
  constexpr int kRows = kThreads / kWidth;  // of a block at a time
  const MoeGateOptions& g = p.gate;
  const int experts = static_cast<int>(g.experts), top_k = static_cast<int>(g.top_k);
  double* scratch = reinterpret_cast<double*>(dynamic_shared());  // (2, kWarps)
  int* counts = reinterpret_cast<int*>(scratch + 2 * kWarps);     // (E)
  float* space = reinterpret_cast<float*>(counts + experts);      // limit_groups': (kRows, E + num_groups); at the end
                                                                  // (kWarps, E)
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWidth, of_block = thread / kWidth;
  if (blockIdx.x == 0 && thread == 0) *p.work.ticket = 0;
  for (int e = thread; e < experts; e += kThreads) counts[e] = 0;
  sync_threads();

  float share[kEach];
#pragma unroll
  for (int v = 0; v < kEach; ++v) share[v] = 0.0f;
  double square = 0.0;  // the row's lanes hold the same
  int routed = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < g.tokens;
       first += static_cast<int64_t>(gridDim.x) * kRows) {
    const bool exists = first + of_block < g.tokens;
    const int64_t row = exists ? first + of_block : g.tokens - 1;
    float z[kEach], scores[kEach], choice[kEach];
    load_row<false, kWidth>(g, row, lane, z);
    const Scores s = score<kWidth>(g, exists, lane, z, scores);
    const double lse = static_cast<double>(s.largest) + static_cast<double>(s.log);
    square += lse * lse;
    routed += s.routed ? 1 : 0;
    const float total = fmaxf(s.total, kSmallest);
#pragma unroll
    for (int v = 0; v < kEach; ++v) {
      share[v] += g.sigmoid ? scores[v] / total : scores[v];
      if (g.topk_first) scores[v] = z[v];  // from here on the numbers that choose, and that weights are made of
      choice[v] = scores[v];
    }

    if (p.bias != nullptr) {
#pragma unroll
      for (int v = 0; v < kEach; ++v) {  // a NaN counts as infinity, as in the reference's sort
        const float biased = choice[v] + (v * kWidth + lane < experts ? p.bias[v * kWidth + lane] : 0.0f);
        choice[v] = biased == biased ? biased : kInfinity;
      }
    }
    if (p.num_groups > 1) {
      float* values = space + of_block * (experts + static_cast<int>(p.num_groups));
      limit_groups<kWidth>(p, lane, choice, values, values + experts);
    }

    Chosen<kWidth> chosen{lane, top_k, p.weights + row * top_k, p.indices + row * top_k};
    uint32_t taken = 0;  // a bit for each of this lane's experts
#pragma unroll
    for (int v = 0; v < kEach; ++v) taken |= v * kWidth + lane < experts ? 0u : 1u << v;
#pragma unroll 1
    for (int k = 0; k < top_k; ++k) {
      constexpr int kNone = 1 << 30;
      float best = -kInfinity, weight = 0.0f;
      int where = kNone;
#pragma unroll
      for (int v = 0; v < kEach; ++v) {
        if ((taken >> v & 1) == 0 && (choice[v] > best || where == kNone)) {
          best = choice[v];
          weight = scores[v];
          where = v * kWidth + lane;
        }
      }
#pragma unroll
      for (int mask = kWidth / 2; mask > 0; mask /= 2) {
        const float other = shuffle_xor(best, mask, kWidth);
        const int there = shuffle_xor(where, mask, kWidth);
        if (other > best || (other == best && there < where)) {
          best = other;
          where = there;
        }
      }
      weight = shuffle(weight, where % kWidth, kWidth);  // its lane's own best is the row's
      if (where % kWidth == lane) taken |= 1u << where / kWidth;
      if (exists) chosen.put(k, where, weight);
    }

    if (!exists) chosen.count = 0;
    if (g.topk_first) {
      float largest = -kInfinity;
      chosen.each([&](float x) {
        largest = fmaxf(largest, x);
        return x;
      });
      largest = warp_max<kWidth>(largest);
      chosen.each([&](float x) { return expf(x - largest); });
      const float sum = chosen.sum();
      chosen.each([&](float x) { return x / sum; });
    }
    const float sum = g.renormalize ? fmaxf(chosen.sum(), kSmallest) : 1.0f;
    chosen.each([&](float x) { return s.routed ? x / sum * g.routed_scale : 0.0f; });
#pragma unroll 1
    for (int k = lane; k < chosen.count; k += kWidth) {
      const int32_t expert = k == lane ? chosen.index : chosen.indices[k];
      if (k == lane) chosen.weights[k] = chosen.weight;
      chosen.indices[k] = s.routed ? expert : -1;
      if (s.routed) atomic_add(&counts[expert], 1);
    }
  }

  sync_threads();
#pragma unroll
  for (int v = 0; v < kEach; ++v) {
#pragma unroll
    for (int mask = kWidth; mask < 32; mask *= 2) share[v] += shuffle_xor(share[v], mask);
    if (thread % 32 < kWidth && v * kWidth + lane < experts)
      space[thread / 32 * experts + v * kWidth + lane] = share[v];
  }
  square = block_sum<kThreads>(lane == 0 ? square : 0.0, scratch);
  routed = block_sum<kThreads>(lane == 0 ? routed : 0, reinterpret_cast<int*>(scratch + kWarps));
  const MoeGateWork& work = p.work;
  if (thread == 0) {
    work.sums[2 * blockIdx.x] = square;
    work.sums[2 * blockIdx.x + 1] = static_cast<double>(routed);
  }
  for (int e = thread; e < experts; e += kThreads) {
    float sum = space[e];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) sum += space[warp * experts + e];
    work.shares[blockIdx.x * g.experts + e] = sum;
    work.counts[blockIdx.x * g.experts + e] = counts[e];
  }
}

// Sums over the blocks of the forward kernel. A block has 32 experts, each the work of the same lane of kSumWarps
// warps; the block that ends last sums over the experts.
constexpr int kSumWarps = 16, kSumThreads = 32 * kSumWarps;

__global__ void __launch_bounds__(kSumThreads)
    moe_gate_losses_kernel(const __grid_constant__ MoeGateFwdParams p, int blocks) {
  double* shares = reinterpret_cast<double*>(dynamic_shared());        // (kSumWarps, 32), then block_sum's scratch
  int64_t* counts = reinterpret_cast<int64_t*>(shares + kSumThreads);  // (kSumWarps, 32)
  int* last = reinterpret_cast<int*>(counts + kSumThreads);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t experts = p.gate.experts, e = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const MoeGateWork& work = p.work;
  double* balances = work.sums + 2 * blocks;
  double share = 0.0;
  int64_t count = 0;
  if (e < experts) {
#pragma unroll 4
    for (int b = warp; b < blocks; b += kSumWarps) {
      share += static_cast<double>(work.shares[b * experts + e]);
      count += work.counts[b * experts + e];
    }
  }
  shares[thread] = share;
  counts[thread] = count;
  sync_threads();
  if (warp == 0) {
    for (int w = 1; w < kSumWarps; ++w) {
      share += shares[w * 32 + lane];
      count += counts[w * 32 + lane];
    }
    if (e < experts) p.counts[e] = static_cast<int32_t>(count);
    const double balance = warp_sum(static_cast<double>(count) * share);
    if (lane == 0) {
      balances[blockIdx.x] = balance;
      fence_device();
      *last = atomic_add(work.ticket, 1) == static_cast<int>(gridDim.x) - 1 ? 1 : 0;
      fence_device();
    }
  }
  sync_threads();
  if (*last == 0) return;

  double square = 0.0, tokens = 0.0, balance = 0.0;
  for (int b = thread; b < blocks; b += kSumThreads) {
    square += work.sums[2 * b];
    tokens += work.sums[2 * b + 1];
  }
  square = block_sum<kSumThreads>(square, shares);
  tokens = block_sum<kSumThreads>(tokens, shares + kSumWarps);
  if (thread != 0) return;
  for (unsigned b = 0; b < gridDim.x; ++b) balance += balances[b];
  const double n = tokens > 0.0 ? tokens : 1.0;
  *p.load_balance_loss =
      static_cast<float>(static_cast<double>(experts) * balance / (n * n * static_cast<double>(p.gate.top_k)));
  *p.z_loss = static_cast<float>(square / n);
}

// --------------------------------------------------------------------------------------------------------- backward

// With r the chosen weights before renormalising, g the gradient of the weights times routed_scale, a_e that of a
// share:
//   dr = g, renormalised (g - sum(g r) / sum(r)) / sum(r);
//   dp_e = a_e plus dr where e was chosen, for the sigmoid with a_e through the division by the total;
//   softmax: dz = p (dp - sum(p dp)), sigmoid: dz = p (1 - p) dp; topk_first: chosen dz += r (dr - sum(r dr));
//   z loss: dz += 2 lse / tokens * softmax(z), all times dz/dlogits.
// The scores are computed again from the logits; what is known of a choice, its lane looks up for each of its experts.
template <int kWidth, int kEach>
__global__ void __launch_bounds__(kThreads, kBlocks<kEach>)
    moe_gate_bwd_kernel(const __grid_constant__ MoeGateBwdParams p) {
  constexpr int kRows = kThreads / kWidth;
  const MoeGateOptions& g = p.gate;
  const int experts = static_cast<int>(g.experts), top_k = static_cast<int>(g.top_k);
  double* scratch = reinterpret_cast<double*>(dynamic_shared());  // (kWarps)
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWidth, of_block = thread / kWidth;

  double choices = 0.0;
  for (int e = thread; e < experts; e += kThreads) choices += static_cast<double>(p.counts[e]);
  choices = block_sum<kThreads>(choices, scratch);
  const double k_choices = static_cast<double>(top_k), tokens = choices > 0.0 ? choices / k_choices : 1.0;
  const double dbalance = p.dload_balance_loss == nullptr ? 0.0 : static_cast<double>(*p.dload_balance_loss);
  const double dz_loss = p.dz_loss == nullptr ? 0.0 : static_cast<double>(*p.dz_loss);
  const float share_scale = static_cast<float>(dbalance * static_cast<double>(experts) / (tokens * tokens * k_choices));
  const float lse_scale = static_cast<float>(2.0 * dz_loss / tokens);

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < g.tokens;
       first += static_cast<int64_t>(gridDim.x) * kRows) {
    const bool exists = first + of_block < g.tokens;
    const int64_t row = exists ? first + of_block : g.tokens - 1;
    float z[kEach], scores[kEach], dz[kEach];
    load_row<false, kWidth>(g, row, lane, z);
    const Scores s = score<kWidth>(g, exists, lane, z, scores);

    // a_e = count_e, through the division by the total, times share_scale
    float mean = 0.0f;
#pragma unroll
    for (int v = 0; v < kEach; ++v) {
      dz[v] = v * kWidth + lane < experts ? static_cast<float>(p.counts[v * kWidth + lane]) : 0.0f;
      mean += scores[v] * dz[v];
    }
    const float total = fmaxf(s.total, kSmallest), scale = share_scale / total;
    if (g.sigmoid) {
      mean = warp_sum<kWidth>(mean);
      mean = s.total >= kSmallest ? mean / total : 0.0f;
    } else {
      mean = 0.0f;
    }
#pragma unroll
    for (int v = 0; v < kEach; ++v) dz[v] = (dz[v] - mean) * scale;

    float dr[kEach];
    if (p.dweights != nullptr) {
      uint32_t chosen = 0;  // a bit for each of this lane's experts
#pragma unroll
      for (int v = 0; v < kEach; ++v) dr[v] = 0.0f;
      for (int k = 0; k < top_k; ++k) {
        const int expert = p.indices[row * top_k + k];
        const float d = p.dweights[row * top_k + k] * g.routed_scale;
#pragma unroll
        for (int v = 0; v < kEach; ++v) {
          if (expert == v * kWidth + lane && expert < experts) {
            dr[v] += d;
            chosen |= 1u << v;
          }
        }
      }
      if (g.topk_first) {  // z becomes the softmax over the chosen
        float largest = -kInfinity, sum = 0.0f;
#pragma unroll
        for (int v = 0; v < kEach; ++v) largest = fmaxf(largest, (chosen >> v & 1) != 0 ? z[v] : -kInfinity);
        largest = warp_max<kWidth>(largest);
#pragma unroll
        for (int v = 0; v < kEach; ++v) {
          z[v] = (chosen >> v & 1) != 0 ? expf(z[v] - largest) : 0.0f;
          sum += z[v];
        }
        sum = warp_sum<kWidth>(sum);
#pragma unroll
        for (int v = 0; v < kEach; ++v) z[v] = (chosen >> v & 1) != 0 ? z[v] / sum : 0.0f;
      }
      const auto r = [&](int v) { return (chosen >> v & 1) == 0 ? 0.0f : g.topk_first ? z[v] : scores[v]; };
      float along = 0.0f, sum = 0.0f;
      if (g.renormalize) {
#pragma unroll
        for (int v = 0; v < kEach; ++v) {
          along += dr[v] * r(v);
          sum += r(v);
        }
        along = warp_sum<kWidth>(along);
        sum = warp_sum<kWidth>(sum);
        const float inverse = 1.0f / fmaxf(sum, kSmallest), dot = sum >= kSmallest ? along * inverse : 0.0f;
#pragma unroll
        for (int v = 0; v < kEach; ++v) dr[v] = (chosen >> v & 1) != 0 ? (dr[v] - dot) * inverse : 0.0f;
      }
      if (g.topk_first) {
        float dot = 0.0f;
#pragma unroll
        for (int v = 0; v < kEach; ++v) dot += dr[v] * r(v);
        dot = warp_sum<kWidth>(dot);
#pragma unroll
        for (int v = 0; v < kEach; ++v) dr[v] = r(v) * (dr[v] - dot);
      } else {
#pragma unroll
        for (int v = 0; v < kEach; ++v) dz[v] += dr[v];
      }
    }

    const float c = lse_scale * (s.largest + s.log);
    if (g.sigmoid) {
#pragma unroll
      for (int v = 0; v < kEach; ++v) {
        const float softmax = expf(z[v] - s.largest) / s.denominator;
        dz[v] = fmaf(softmax, c, scores[v] * (1.0f - scores[v]) * dz[v]);
      }
    } else {
      float dot = 0.0f;
#pragma unroll
      for (int v = 0; v < kEach; ++v) dot += scores[v] * dz[v];
      dot = warp_sum<kWidth>(dot);
#pragma unroll
      for (int v = 0; v < kEach; ++v) dz[v] = scores[v] * (dz[v] - dot + c);
    }
    if (g.topk_first && p.dweights != nullptr) {
#pragma unroll
      for (int v = 0; v < kEach; ++v) dz[v] += dr[v];
    }
    if (!exists) continue;
    if (g.jitter != 0.0f || g.softcap != 0.0f) {
      load_row<true, kWidth>(g, row, lane, z);  // from the caches: kept since above, the slopes would crowd registers
#pragma unroll
      for (int v = 0; v < kEach; ++v) dz[v] *= z[v];
    }
#pragma unroll
    for (int v = 0; v < kEach; ++v) dz[v] = s.routed ? dz[v] : 0.0f;
    GK_SWITCH_DTYPE(g.dtype, T, store_lane<kWidth>(static_cast<T*>(p.dlogits) + row * g.experts, lane, experts, dz));
  }
}

// Runs launch_with<kWidth, kEach>() for the shape that `experts` experts need.
template <typename Launch>
void for_shape(int64_t experts, const Launch& launch_with) {
  if (experts <= 8) return launch_with.template operator()<2, 4>();
  if (experts <= 16) return launch_with.template operator()<4, 4>();
  if (experts <= 32) return launch_with.template operator()<8, 4>();
  if (experts <= 64) return launch_with.template operator()<16, 4>();
  if (experts <= 128) return launch_with.template operator()<32, 4>();
  if (experts <= 256) return launch_with.template operator()<32, 8>();
  if (experts <= 512) return launch_with.template operator()<32, 16>();
  return launch_with.template operator()<32, 32>();
}

}  // namespace

void moe_gate_fwd_cuda(const MoeGateFwdParams& p, Stream stream) {
  const int64_t experts = p.gate.experts, blocks = moe_gate_blocks(p.gate.tokens, experts);
  const int64_t rows = kThreads / moe_gate_width(experts);
  const int64_t groups = p.num_groups > 1 ? rows * (experts + p.num_groups) : 0, sums = kWarps * experts;
  const int64_t bytes = 8 * 2 * kWarps + 4 * (experts + (groups > sums ? groups : sums));
  for_shape(experts, [&]<int kWidth, int kEach>() {
    launch(moe_gate_fwd_kernel<kWidth, kEach>,
           {.grid = {static_cast<unsigned>(blocks)}, .block = {kThreads}, .shared_bytes = static_cast<size_t>(bytes)},
           stream, p);
  });
  launch(moe_gate_losses_kernel,
         {.grid = {static_cast<unsigned>((experts + 31) / 32)},
          .block = {kSumThreads},
          .shared_bytes = 16 * kSumThreads + 16},
         stream, p, static_cast<int>(blocks));
}

void moe_gate_bwd_cuda(const MoeGateBwdParams& p, Stream stream) {
  const int64_t experts = p.gate.experts, rows = kThreads / moe_gate_width(experts);
  const int64_t wanted = (p.gate.tokens + rows - 1) / rows, most = int64_t{8} * device_multiprocessors();
  for_shape(experts, [&]<int kWidth, int kEach>() {
    launch(moe_gate_bwd_kernel<kWidth, kEach>,
           {.grid = {static_cast<unsigned>(wanted < most ? wanted : most)},
            .block = {kThreads},
            .shared_bytes = 8 * kWarps},
           stream, p);
  });
}

}  // namespace grokkernels
