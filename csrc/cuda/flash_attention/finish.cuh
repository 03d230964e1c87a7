// What is left to do for a row when all its keys have been seen: the sink, the division, the statistics.
#pragma once

#include "cuda/flash_attention/scores.cuh"

namespace grokkernels::attention {

// Of folded row `row` of sequence s with running maximum `top` (raw) and sum `total` of exp2(factor * (raw - top)):
// what its o is multiplied by. `there`: the row exists; `writes`: this thread also writes its lse, top and inv. `top`
// is given to the backward pass in natural units and `inv` belongs to its rounded value, so that exp2(factor * raw -
// top * log2(e)) * inv is p there.
template <Scores kScores>
GK_DEVICE float finish_row(const FlashAttentionFwdParams& params, const ScoreRule<kScores>& rule, const Sequence& s,
                           int row, int group, int first_head, float top, float total, bool there, bool writes) {
  const FlashAttentionProblem& p = params.problem;
  const int head = first_head + row % group;
  const bool sink = p.sinks != nullptr && !s.outside && there;
  const float sink_score = sink ? p.sinks[head] : -INFINITY;
  const float largest = top * rule.factor * kLn2;  // -infinity where no key is seen
  float highest = fmaxf(largest, sink_score);
  const bool dead = highest == -INFINITY;
  if (dead) highest = 0.0f;
  const float shift = highest * kLog2E;
  const float scaled = exp2_approx(fmaf(top, rule.factor, -shift));
  const float denominator = fmaf(total, scaled, sink ? exp2_approx(fmaf(sink_score, kLog2E, -shift)) : 0.0f);
  if (there && writes) {
    const int64_t at = lse_offset(p, s, head) + row / group;
    params.lse[at] = dead ? -INFINITY : highest + logf(denominator);
    params.top[at] = highest;
    params.inv[at] = dead ? 0.0f : 1.0f / denominator;
  }
  return dead ? 0.0f : scaled / denominator;
}

}  // namespace grokkernels::attention
