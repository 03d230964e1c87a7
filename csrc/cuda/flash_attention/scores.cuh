// From q.k to the score, its slope and the softmax, on accumulators as the tensor cores leave them.
//
// An accumulator block is 16 rows by 8 columns per entry: with g = lane / 4 and t = lane % 4, [0] and [1] are row g,
// columns 2t and 2t + 1, [2] and [3] the row 8 below (mma.sync's layout, and wgmma's).
//
// Exponentials are powers of two: exp(score - top) = exp2(factor * raw - shift), where `raw` is what the tensor cores
// leave behind after `transform`, and `factor`, positive, brings what was left out: so a plain score costs one
// multiply-add and one exponential.
#pragma once

#include <device/convert.cuh>
#include <device/core.cuh>
#include <device/math.cuh>
#include <device/memory.cuh>

#include "cuda/flash_attention/problem.cuh"
#include "cuda/reduce.cuh"

namespace grokkernels::attention {

using namespace device;

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// What stands between q.k and the score. One kernel is compiled for each, so that options left out cost nothing.
enum class Scores {
  plain,    // a positive scale
  softcap,  // softcap * tanh(scale / softcap * q.k)
  general,  // any scale, then softcap, temperature and ALiBi where they are given
};

inline Scores scores_of(const FlashAttentionProblem& p) {
  if (p.temperature_len > 0 || p.alibi_slopes != nullptr) return Scores::general;
  if (p.softcap > 0.0f) return Scores::softcap;
  return p.scale > 0.0f ? Scores::plain : Scores::general;
}

// tanh to about one unit in the last place, without a branch: x + x^3 p(x^2) (a fit on [0, 0.55]), and
// 1 - 2 / (1 + e^2|x|) beyond. tanh.approx errs by 2^-11, which a cap of 30 turns into an error of 0.015 of the score.
GK_DEVICE float tanh_accurate(float x) {
  const float square = x * x;
  float p = fmaf(square, -0.006615754682570696f, 0.021312745288014412f);
  p = fmaf(p, square, -0.053910065442323685f);
  p = fmaf(p, square, 0.13333117961883545f);
  p = fmaf(p, square, -0.3333333134651184f);
  const float near = fmaf(x * square, p, x);
  const float far = fmaf(-2.0f, reciprocal_approx(1.0f + exp2_approx(fabsf(x) * (2.0f * kLog2E))), 1.0f);
  return fabsf(x) < 0.55f ? near : copysignf(far, x);
}

// What a query's scores depend on, beside q and k.
struct Query {
  KeyRange keys;      // it sees
  int position;       // and what follows: of general scores alone
  float temperature;  // 1 where there is none
  float slope;        // 0 where there is none
};

// The queries of a tile's rows, found once and read from shared memory where they are needed.
template <Scores kScores, int kRows>
struct QueryTable {
  static constexpr int kBytes = kRows * (kScores == Scores::general ? 20 : 8);
  uint32_t base;

  // Query t of the sequence, and the query head it belongs to.
  GK_DEVICE void store(int row, const FlashAttentionProblem& p, const Sequence& s, int t, int head) const {
    const KeyRange keys = s.visible(t);
    store_shared_8(base + 8 * row, {{static_cast<uint32_t>(keys.begin), static_cast<uint32_t>(keys.end)}});
    if constexpr (kScores == Scores::general) {
      const int64_t i = s.start + t;
      const bool hot = p.temperature_len > 0 && i > p.temperature_len;
      const float temperature =
          hot ? log2f(static_cast<float>(i)) / log2f(static_cast<float>(p.temperature_len)) : 1.0f;
      const float slope =
          p.alibi_slopes == nullptr || s.outside ? 0.0f : p.alibi_slopes[s.b * p.alibi_batch_stride + head];
      store_shared_4(base + 8 * kRows + 4 * row, static_cast<uint32_t>(clamp(i, -(1 << 30), 1 << 30)));
      store_shared_4(base + 12 * kRows + 4 * row, float_to_bits(temperature));
      store_shared_4(base + 16 * kRows + 4 * row, float_to_bits(slope));
    }
  }

  GK_DEVICE KeyRange keys(int row) const {
    const Words2 range = load_shared_8(base + 8 * row);
    return {static_cast<int>(range.word[0]), static_cast<int>(range.word[1])};
  }

  GK_DEVICE Query load(int row) const {
    Query query{keys(row), 0, 1.0f, 0.0f};
    if constexpr (kScores == Scores::general) {
      query.position = static_cast<int>(load_shared_4(base + 8 * kRows + 4 * row));
      query.temperature = bits_to_float(load_shared_4(base + 12 * kRows + 4 * row));
      query.slope = bits_to_float(load_shared_4(base + 16 * kRows + 4 * row));
    }
    return query;
  }
};

// The numbers of the scores that are the same for all rows.
template <Scores kScores>
struct ScoreRule {
  float in;      // q.k is multiplied by it first (softcap: the argument of tanh)
  float cap;     // general: 0 where there is none
  float factor;  // score * log2(e) = factor * raw

  GK_DEVICE explicit ScoreRule(const FlashAttentionProblem& p) {
    in = p.softcap > 0.0f ? p.scale / p.softcap : p.scale;
    cap = p.softcap;
    factor = kScores == Scores::plain ? p.scale * kLog2E : kScores == Scores::softcap ? cap * kLog2E : kLog2E;
  }

  // q.k -> raw, for a key that lies `distance` positions before the query.
  GK_DEVICE float raw(float qk, const Query& row, float distance) const {
    if constexpr (kScores == Scores::plain) return qk;
    if constexpr (kScores == Scores::softcap) return tanh_accurate(qk * in);
    float x = qk * in;
    if (cap > 0.0f) x = cap * tanh_accurate(x);
    return fmaf(-row.slope, fabsf(distance), x * row.temperature);
  }

  // The same, with d score / d q.k divided by the scale.
  GK_DEVICE float raw_and_slope(float qk, const Query& row, float distance, float& slope) const {
    slope = 1.0f;
    if constexpr (kScores == Scores::plain) return qk;
    float x = qk * in;
    if (kScores == Scores::softcap || cap > 0.0f) {
      const float t = tanh_accurate(x);
      slope = fmaf(-t, t, 1.0f);
      if constexpr (kScores == Scores::softcap) return t;
      x = cap * t;
    }
    slope *= row.temperature;
    return fmaf(-row.slope, fabsf(distance), x * row.temperature);
  }
};

}  // namespace grokkernels::attention
