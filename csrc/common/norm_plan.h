// How the CUDA column deals the rows of a norm (N, C) out to threads: known to csrc/torch too, which makes the
// workspaces.
#pragma once

#include <cstdint>

namespace grokkernels {

inline constexpr int kNormThreads = 512;  // of a block, at most
inline constexpr int kNormElements = 16;  // of a row, in the registers of one thread: rows of 8192 stay there

struct NormPlan {
  int lanes;              // threads of a row, or of a piece of one: 8, 16, 32, or whole warps
  int groups;             // rows that a block takes at a time
  int span, pieces;       // columns that those threads hold, and how many times that a row is
  int64_t steps, chunks;  // backward: each block takes groups * steps rows, and N rows are so many blocks
};

// At most 64 rows are added up in one float.
inline NormPlan norm_plan(int64_t rows, int64_t cols) {
  const int64_t wanted = (cols + kNormElements - 1) / kNormElements;
  NormPlan plan{};
  plan.lanes = 8;
  while (plan.lanes < 32 && plan.lanes < wanted) plan.lanes *= 2;
  if (wanted > 32) plan.lanes = static_cast<int>(wanted < kNormThreads ? (wanted + 31) / 32 * 32 : kNormThreads);
  plan.groups = plan.lanes > 32 ? 1 : 256 / plan.lanes;
  plan.span = plan.lanes * kNormElements;
  plan.pieces = static_cast<int>((cols + plan.span - 1) / plan.span);
  plan.steps = rows / (512 * plan.groups);  // about 512 blocks, each with a row of partial weight gradients
  plan.steps = plan.steps < 1 ? 1 : plan.steps > 64 ? 64 : plan.steps;
  plan.chunks = (rows + plan.groups * plan.steps - 1) / (plan.groups * plan.steps);
  return plan;
}

}  // namespace grokkernels
