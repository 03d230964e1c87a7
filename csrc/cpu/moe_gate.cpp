// moe_gate on the CPU. The mathematics and its sources: grokkernels/reference/moe_gate.py.
//
// logits (N, E), kLanes rows at a time, transposed so that a lane is a row and a vector is one expert of kLanes rows.
// Then softmax, top-k and losses need no sum across lanes, E needs no tail, and top-k is an insertion into K sorted
// vectors (in registers for K <= 8) without a branch: the same work for any E and K, from 8 experts to 1024. Rows past
// the last are copies of it whose results are dropped.
//
// Losses and counts are summed over fixed blocks of rows, which depend on N alone, then over the blocks in order: the
// result is the same for every run and every number of threads.
#include "moe_gate.h"

#include "common/philox.h"
#include "cpu/launch.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/simd_math.h"
#include "cpu/transpose.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {
namespace {

constexpr float kSmallest = 1e-20f;  // a sum that something is divided by is at least this
constexpr float kInfinity = __builtin_inff();

// ---------------------------------------------------------------------------------------- tiles: (E or K, kLanes)
// floats

vf at(const float* tile, int64_t i) { return load(tile + i * kLanes); }
vi at(const int32_t* tile, int64_t i) { return load(tile + i * kLanes); }
void put(float* tile, int64_t i, vf x) { store(tile + i * kLanes, x); }
void put(int32_t* tile, int64_t i, vi x) { store(tile + i * kLanes, x); }

// Tiles of the calling thread, in one piece of scratch memory.
struct Tiles {
  explicit Tiles(int64_t experts) : size(experts * kLanes), next(scratch<float>(3, 7 * size)) {}
  float* take() {
    next += size;
    return next - size;
  }
  int64_t size;
  float* next;
};

// Of one row, as parallel.h counts it: measured, a row of 128 experts of which 8 are chosen takes about 80 ns.
int64_t row_cost(const MoeGateOptions& g) { return g.experts * (2 + g.top_k / 8) + 16; }

// Rows [row, row + rows) as z (E, kLanes), what the softmax sees, and unless slope is null dz/dlogits.
template <typename T>
void load_tile(const MoeGateOptions& g, int64_t row, int rows, float* z, float* slope) {
  const T* logits = static_cast<const T*>(g.logits);
  for (int64_t e = 0; e < g.experts; e += kLanes) {
    const int n = static_cast<int>(g.experts - e < kLanes ? g.experts - e : kLanes);
    vf v[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const T* x = logits + (row + (i < rows ? i : rows - 1)) * g.logits_stride + e;
      v[i] = n == kLanes ? load(x) : load_n(x, n);
    }
    transpose(v);
    for (int i = 0; i < kLanes; ++i)
      if (i < n) put(z, e + i, v[i]);
  }
  if (g.jitter == 0.0f && g.softcap == 0.0f && slope == nullptr) return;
  for (int64_t e = 0; e < g.experts; ++e) {
    vf v = at(z, e), s = set1(1.0f);
    if (g.jitter != 0.0f) {
      float u[kLanes];
      for (int i = 0; i < kLanes; ++i) u[i] = philox_uniform((row + i) * g.experts + e, g.seed);
      s = 1.0f + g.jitter * (2.0f * load(u) - 1.0f);
      v = v * s;
    }
    if (g.softcap != 0.0f) {
      const vf t = tanh(v / g.softcap);
      v = g.softcap * t;
      s = s * (1.0f - t * t);
    }
    put(z, e, v);
    if (slope != nullptr) put(slope, e, s);
  }
}

// The sum of term(i), i < n, in short runs: the error does not grow with n for the sizes met here.
template <typename Term>
vf sum_over(int64_t n, const Term& term) {
  constexpr int64_t kRun = 32;
  vf total = zero();
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = begin + kRun < n ? begin + kRun : n;
    vf sum[4] = {zero(), zero(), zero(), zero()};
    int64_t i = begin;
    for (; i + 4 <= end; i += 4)
      for (int u = 0; u < 4; ++u) sum[u] = sum[u] + term(i + u);
    for (; i < end; ++i) sum[0] = sum[0] + term(i);
    total = total + ((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  return total;
}

struct Scores {
  vmask routed;  // rows that exist and whose logsumexp is finite
  vf largest;    // of z
  vf log;        // of the sum of exp(z - largest): logsumexp(z) is largest + log
  vf total;      // sum over the experts of the scores
};

// softmax (E, kLanes) of z, and the scores: the same tile, or for the sigmoid another. All 0, and z too, where a row is
// not routed, so that no NaN goes further.
Scores score(const MoeGateOptions& g, int rows, float* z, float* softmax, float* scores) {
  const int64_t experts = g.experts;
  vf largest = set1(-kInfinity);
  for (int64_t e = 0; e < experts; ++e) largest = max(at(z, e), largest);
  const vf denominator = sum_over(experts, [&](int64_t e) {
    const vf x = exp_nonpositive(at(z, e) - largest);
    put(softmax, e, x);
    return x;
  });

  Scores s;
  s.largest = largest;
  s.log = log(denominator);
  s.routed = (abs(largest + s.log) < kInfinity) & (lane_index() < rows);
  if (any(~s.routed)) {
    s.largest = select(s.routed, s.largest, zero());
    s.log = select(s.routed, s.log, zero());
    for (int64_t e = 0; e < experts; ++e) put(z, e, select(s.routed, at(z, e), zero()));
    for (int64_t e = 0; e < experts; ++e) put(softmax, e, select(s.routed, at(softmax, e), zero()));
  }
  const vf divisor = select(s.routed, denominator, set1(1.0f));
  for (int64_t e = 0; e < experts; ++e) put(softmax, e, at(softmax, e) / divisor);
  s.total = set1(1.0f);
  if (g.sigmoid)
    s.total = sum_over(experts, [&](int64_t e) {
      const vf x = select(s.routed, sigmoid(at(z, e)), zero());
      put(scores, e, x);
      return x;
    });
  return s;
}

// ------------------------------------------------------------------------------------------------------------------
// top-k

// index (count, kLanes): the largest of values (n, kLanes) in each lane, in falling order, the lower index first among
// equals; values are not NaN. Slots start as NaN, which every value is better than.
template <int kSlots>
void largest_in_registers(const float* values, int64_t n, int64_t count, int32_t* index) {
  vf best[kSlots];
  vi where[kSlots];
  for (int j = 0; j < kSlots; ++j) {
    best[j] = set1(__builtin_nanf(""));
    where[j] = set1(-1);
  }
  for (int64_t i = 0; i < n; ++i) {
    const vf v = at(values, i);
    const vi here = set1(static_cast<int32_t>(i));
    vmask better[kSlots];
    for (int j = 0; j < kSlots; ++j) better[j] = ~(v <= best[j]);
    for (int j = kSlots - 1; j > 0; --j) {
      best[j] = select(better[j], select(better[j - 1], best[j - 1], v), best[j]);
      where[j] = select(better[j], select(better[j - 1], where[j - 1], here), where[j]);
    }
    best[0] = select(better[0], v, best[0]);
    where[0] = select(better[0], here, where[0]);
  }
  for (int j = 0; j < kSlots; ++j)
    if (j < count) put(index, j, where[j]);
}

void largest_in_memory(const float* values, int64_t n, int64_t count, float* best, int32_t* index) {
  for (int64_t j = 0; j < count; ++j) {
    put(best, j, set1(__builtin_nanf("")));
    put(index, j, set1(-1));
  }
  for (int64_t i = 0; i < n; ++i) {
    const vf v = at(values, i);
    const vi here = set1(static_cast<int32_t>(i));
    int64_t j = i < count ? i : count - 1;
    vmask better = ~(v <= at(best, j));
    for (; j > 0 && any(better); --j) {
      const vmask above = ~(v <= at(best, j - 1));
      put(best, j, select(better, select(above, at(best, j - 1), v), at(best, j)));
      put(index, j, select(better, select(above, at(index, j - 1), here), at(index, j)));
      better = above;
    }
    if (j == 0) {
      put(best, 0, select(better, v, at(best, 0)));
      put(index, 0, select(better, here, at(index, 0)));
    }
  }
}

void largest(const float* values, int64_t n, int64_t count, float* best, int32_t* index) {
  if (count == 1) return largest_in_registers<1>(values, n, count, index);
  if (count == 2) return largest_in_registers<2>(values, n, count, index);
  if (count <= 4) return largest_in_registers<4>(values, n, count, index);
  if (count <= 8) return largest_in_registers<8>(values, n, count, index);
  largest_in_memory(values, n, count, best, index);
}

// choice (E, kLanes) becomes -infinity outside the topk_groups best groups of each lane. A group's score is its best
// value, with a bias the sum of its two best. groups, best and index are tiles to work in.
void limit_groups(const MoeGateFwdParams& p, float* choice, float* groups, float* best, int32_t* index) {
  const int64_t size = p.gate.experts / p.num_groups;
  for (int64_t g = 0; g < p.num_groups; ++g) {
    vf first = set1(-kInfinity), second = first;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) {
      const vf v = at(choice, e);
      second = max(second, min(first, v));
      first = max(first, v);
    }
    put(groups, g, p.bias != nullptr && size > 1 ? first + second : first);
  }
  largest(groups, p.num_groups, p.topk_groups, best, index);
  for (int64_t g = 0; g < p.num_groups; ++g) {
    vmask allowed = vmask{};
    for (int64_t j = 0; j < p.topk_groups; ++j) allowed = allowed | (at(index, j) == static_cast<int32_t>(g));
    for (int64_t e = g * size; e < (g + 1) * size; ++e)
      put(choice, e, select(allowed, at(choice, e), set1(-kInfinity)));
  }
}

// ----------------------------------------------------------------------------------------------------------------
// weights

// What the weights of the chosen are before `renormalize`, as weights (K, kLanes). An index of -1 gives a 0.
void chosen_weights(const MoeGateOptions& g, const float* z, const float* scores, const int32_t* index,
                    float* weights) {
  const float* from = g.topk_first ? z : scores;
  for (int64_t k = 0; k < g.top_k; ++k)
    for (int i = 0; i < kLanes; ++i) {
      const int64_t expert = index[k * kLanes + i];
      weights[k * kLanes + i] = expert < 0 ? 0.0f : from[expert * kLanes + i];
    }
  if (!g.topk_first) return;
  vf largest = set1(-kInfinity);
  for (int64_t k = 0; k < g.top_k; ++k) largest = max(largest, at(weights, k));
  const vf sum = sum_over(g.top_k, [&](int64_t k) {
    const vf x = exp_nonpositive(at(weights, k) - largest);
    put(weights, k, x);
    return x;
  });
  for (int64_t k = 0; k < g.top_k; ++k) put(weights, k, at(weights, k) / sum);
}

// ----------------------------------------------------------------------------------------------------------------
// forward

struct Blocks {
  explicit Blocks(int64_t tokens) {
    rows = (tokens + 255) / 256;  // no more than 256 blocks: their sums stay small
    rows = rows < 64 ? 64 : (rows + kLanes - 1) / kLanes * kLanes;
    count = (tokens + rows - 1) / rows;
  }
  int64_t rows, count;
};

// Sums over the rows of each block.
struct Partials {
  Partials(int64_t blocks, int64_t experts)
      : share(scratch<float>(0, blocks * experts)),
        counts(scratch<int32_t>(1, blocks * experts)),
        losses(scratch<double>(2, 2 * blocks)) {}
  float* share;     // (blocks, E): the scores, divided by each row's total
  int32_t* counts;  // (blocks, E)
  double* losses;   // (blocks, 2): lse^2, tokens routed
};

template <typename T>
void forward_block(const MoeGateFwdParams& p, const Blocks& blocks, int64_t block, const Partials& partials) {
  const MoeGateOptions& g = p.gate;
  const int64_t experts = g.experts, top_k = g.top_k;
  Tiles tiles(experts);
  float *z = tiles.take(), *softmax = tiles.take(), *scores = g.sigmoid ? tiles.take() : softmax;
  float *choice = tiles.take(), *best = tiles.take(), *share = tiles.take(), *weights = tiles.take();
  int32_t* index = scratch<int32_t>(4, experts * kLanes);
  int32_t* counts = partials.counts + block * experts;
  for (int64_t e = 0; e < experts; ++e) put(share, e, zero());
  for (int64_t e = 0; e < experts; ++e) counts[e] = 0;
  double square = 0.0, routed = 0.0;

  const int64_t end = blocks.rows * (block + 1) < g.tokens ? blocks.rows * (block + 1) : g.tokens;
  for (int64_t row = blocks.rows * block; row < end; row += kLanes) {
    const int rows = static_cast<int>(end - row < kLanes ? end - row : kLanes);
    load_tile<T>(g, row, rows, z, nullptr);
    const Scores s = score(g, rows, z, softmax, scores);
    for (int i = 0; i < rows; ++i) {
      const double lse = static_cast<double>(s.largest[i]) + static_cast<double>(s.log[i]);
      square += lse * lse;
      routed += s.routed[i] != 0 ? 1.0 : 0.0;
    }
    if (g.sigmoid) {
      const vf total = max(s.total, set1(kSmallest));
      for (int64_t e = 0; e < experts; ++e) put(share, e, at(share, e) + at(scores, e) / total);
    } else {
      for (int64_t e = 0; e < experts; ++e) put(share, e, at(share, e) + at(scores, e));
    }

    const float* order = g.topk_first ? z : scores;
    if (p.bias != nullptr) {  // a NaN counts as infinity, as in the reference's sort
      for (int64_t e = 0; e < experts; ++e) {
        const vf biased = at(order, e) + p.bias[e];
        put(choice, e, select(biased == biased, biased, set1(kInfinity)));
      }
      order = choice;
    }
    if (p.num_groups > 1) {
      if (order != choice)
        for (int64_t e = 0; e < experts; ++e) put(choice, e, at(order, e));
      limit_groups(p, choice, weights, best, index);
      order = choice;
    }
    largest(order, experts, top_k, best, index);

    chosen_weights(g, z, scores, index, weights);
    vf sum = set1(1.0f);
    if (g.renormalize) sum = max(sum_over(top_k, [&](int64_t k) { return at(weights, k); }), set1(kSmallest));
    for (int64_t k = 0; k < top_k; ++k) {
      put(weights, k, select(s.routed, at(weights, k) / sum * g.routed_scale, zero()));
      put(index, k, select(s.routed, at(index, k), set1(-1)));
    }
    for (int i = 0; i < rows; ++i)
      for (int64_t k = 0; k < top_k; ++k) {
        const int32_t expert = index[k * kLanes + i];
        p.weights[(row + i) * top_k + k] = weights[k * kLanes + i];
        p.indices[(row + i) * top_k + k] = expert;
        if (expert >= 0) ++counts[expert];
      }
  }

  for (int64_t e = 0; e < experts; ++e) partials.share[block * experts + e] = reduce_add(at(share, e));
  partials.losses[2 * block] = square;
  partials.losses[2 * block + 1] = routed;
}

template <typename T>
void forward(const MoeGateFwdParams& p) {
  const int64_t experts = p.gate.experts;
  const Blocks blocks(p.gate.tokens);
  const Partials partials(blocks.count, experts);
  parallel_range(blocks.count, blocks.rows * row_cost(p.gate), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) forward_block<T>(p, blocks, block, partials);
  });

  double square = 0.0, tokens = 0.0, balance = 0.0;
  for (int64_t b = 0; b < blocks.count; ++b) {
    square += partials.losses[2 * b];
    tokens += partials.losses[2 * b + 1];
  }
  for (int64_t e = 0; e < experts; ++e) {
    double share = 0.0;
    int64_t count = 0;
    for (int64_t b = 0; b < blocks.count; ++b) {
      share += static_cast<double>(partials.share[b * experts + e]);
      count += partials.counts[b * experts + e];
    }
    p.counts[e] = static_cast<int32_t>(count);
    balance += static_cast<double>(count) * share;
  }
  const double n = tokens > 0.0 ? tokens : 1.0;
  *p.load_balance_loss =
      static_cast<float>(static_cast<double>(experts) * balance / (n * n * static_cast<double>(p.gate.top_k)));
  *p.z_loss = static_cast<float>(square / n);
}

// ---------------------------------------------------------------------------------------------------------------
// backward

// With r the chosen weights before renormalising, g the gradient of the weights times routed_scale, a_e that of a
// share:
//   dr = g, renormalised (g - sum(g r) / sum(r)) / sum(r);
//   dp_e = a_e plus dr where e was chosen, for the sigmoid with a_e through the division by the total;
//   softmax: dz = p (dp - sum(p dp)), sigmoid: dz = p (1 - p) dp; topk_first: chosen dz += r (dr - sum(r dr));
//   z loss: dz += 2 lse / tokens * softmax(z), all times dz/dlogits.
// The scores are computed again from the logits.
template <typename T>
void backward_rows(const MoeGateBwdParams& p, int64_t row, int rows, float dbalance, float dz_loss) {
  const MoeGateOptions& g = p.gate;
  const int64_t experts = g.experts, top_k = g.top_k;
  Tiles tiles(experts);
  float *z = tiles.take(), *softmax = tiles.take(), *scores = g.sigmoid ? tiles.take() : softmax;
  float *slope = tiles.take(), *dz = tiles.take(), *weights = tiles.take(), *dweights = tiles.take();
  int32_t* index = scratch<int32_t>(4, experts * kLanes);
  load_tile<T>(g, row, rows, z, slope);
  const Scores s = score(g, rows, z, softmax, scores);

  // a_e = dbalance * count_e
  const vf scale = dbalance / max(s.total, set1(kSmallest));
  vf mean = zero();
  if (g.sigmoid) {
    const vf sum = sum_over(experts, [&](int64_t e) { return at(scores, e) * static_cast<float>(p.counts[e]); });
    mean = select(s.total >= kSmallest, sum / max(s.total, set1(kSmallest)), zero());
  }
  for (int64_t e = 0; e < experts; ++e) put(dz, e, (static_cast<float>(p.counts[e]) - mean) * scale);

  auto scatter_add = [&](const float* values) {
    for (int64_t k = 0; k < top_k; ++k)
      for (int i = 0; i < kLanes; ++i)
        if (const int64_t expert = index[k * kLanes + i]; expert >= 0)
          dz[expert * kLanes + i] += values[k * kLanes + i];
  };
  if (p.dweights != nullptr) {
    for (int64_t k = 0; k < top_k; ++k)
      for (int i = 0; i < kLanes; ++i) {
        const int64_t from = (row + i) * top_k + k;
        const bool chosen = i < rows && p.indices[from] >= 0 && p.indices[from] < experts;
        index[k * kLanes + i] = chosen ? p.indices[from] : -1;
        dweights[k * kLanes + i] = chosen ? p.dweights[from] * g.routed_scale : 0.0f;
      }
    chosen_weights(g, z, scores, index, weights);
    if (g.renormalize) {
      const vf sum = sum_over(top_k, [&](int64_t k) { return at(weights, k); }),
               inverse = 1.0f / max(sum, set1(kSmallest));
      const vf along = sum_over(top_k, [&](int64_t k) { return at(dweights, k) * at(weights, k); });
      const vf dot = select(sum >= kSmallest, along * inverse, zero());
      for (int64_t k = 0; k < top_k; ++k) put(dweights, k, (at(dweights, k) - dot) * inverse);
    }
    if (g.topk_first) {
      const vf dot = sum_over(top_k, [&](int64_t k) { return at(dweights, k) * at(weights, k); });
      for (int64_t k = 0; k < top_k; ++k) put(dweights, k, at(weights, k) * (at(dweights, k) - dot));
    } else {
      scatter_add(dweights);
    }
  }

  const vf c = dz_loss * (s.largest + s.log);
  if (g.sigmoid) {
    for (int64_t e = 0; e < experts; ++e) {
      const vf x = at(scores, e);
      put(dz, e, fma(at(softmax, e), c, x * (1.0f - x) * at(dz, e)));
    }
  } else {
    const vf dot = sum_over(experts, [&](int64_t e) { return at(softmax, e) * at(dz, e); });
    for (int64_t e = 0; e < experts; ++e) put(dz, e, at(softmax, e) * (at(dz, e) - dot + c));
  }
  if (g.topk_first && p.dweights != nullptr) scatter_add(dweights);

  T* dlogits = static_cast<T*>(p.dlogits);
  for (int64_t e = 0; e < experts; e += kLanes) {
    const int n = static_cast<int>(experts - e < kLanes ? experts - e : kLanes);
    vf v[kLanes];
    for (int i = 0; i < kLanes; ++i) v[i] = i < n ? select(s.routed, at(dz, e + i) * at(slope, e + i), zero()) : zero();
    transpose(v);
    for (int i = 0; i < kLanes; ++i)
      if (i < rows) store_n(dlogits + (row + i) * experts + e, v[i], n);
  }
}

template <typename T>
void backward(const MoeGateBwdParams& p) {
  const MoeGateOptions& g = p.gate;
  int64_t chosen = 0;
  for (int64_t e = 0; e < g.experts; ++e) chosen += p.counts[e];
  const double top_k = static_cast<double>(g.top_k), tokens = chosen > 0 ? static_cast<double>(chosen) / top_k : 1.0;
  const double dbalance = p.dload_balance_loss == nullptr ? 0.0 : static_cast<double>(*p.dload_balance_loss);
  const double dz_loss = p.dz_loss == nullptr ? 0.0 : static_cast<double>(*p.dz_loss);
  const float share_scale = static_cast<float>(dbalance * static_cast<double>(g.experts) / (tokens * tokens * top_k));
  const float lse_scale = static_cast<float>(2.0 * dz_loss / tokens);
  parallel_range((g.tokens + kLanes - 1) / kLanes, kLanes * row_cost(g), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kLanes; row < end * kLanes && row < g.tokens; row += kLanes)
      backward_rows<T>(p, row, static_cast<int>(g.tokens - row < kLanes ? g.tokens - row : kLanes), share_scale,
                       lse_scale);
  });
}

}  // namespace

void moe_gate_fwd(const MoeGateFwdParams& p) { GK_SWITCH_DTYPE(p.gate.dtype, T, forward<T>(p)); }
void moe_gate_bwd(const MoeGateBwdParams& p) { GK_SWITCH_DTYPE(p.gate.dtype, T, backward<T>(p)); }

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(moe_gate_fwd, MoeGateFwdParams);
GK_CPU_LAUNCHER(moe_gate_bwd, MoeGateBwdParams);
