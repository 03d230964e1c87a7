// Workspaces of the norm kernels of the CUDA column; nothing for the others.
#pragma once

#include "common/norm_plan.h"
#include "torch/column.h"

namespace grokkernels {

inline Workspace norm_floats(int64_t count, const Tensor& like) { return {count, ScalarType::Float, like}; }

// For the sums of rows that are cut into pieces.
inline Workspace norm_sums(const NormPlan& plan, const Rows& x) {
  return norm_floats(plan.pieces > 1 ? x.rows * plan.pieces : 0, x.tensor);
}

}  // namespace grokkernels
