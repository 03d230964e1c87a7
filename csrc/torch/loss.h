// What the losses share on the way from torch: targets, checked to be inside the vocabulary, and options.
#pragma once

#include <string>

#include "cross_entropy.h"
#include "torch/column.h"

namespace grokkernels {

inline LossOptions loss_options(double softcap, double logit_scale, double z_loss, double label_smoothing,
                                int64_t ignore_index, const std::string& reduction) {
  check(reduction == "none" || reduction == "sum" || reduction == "mean", "reduction must be none, sum or mean, got ",
        reduction);
  return {.softcap = softcap,
          .logit_scale = logit_scale,
          .z_loss = z_loss,
          .label_smoothing = label_smoothing,
          .ignore_index = ignore_index,
          .reduction = reduction == "none"  ? Reduction::none
                       : reduction == "sum" ? Reduction::sum
                                            : Reduction::mean};
}

// Under torch.compile the contract cannot look at the numbers, so they are looked at here; on a device nobody does.
inline Targets targets_of(const Tensor& targets, int64_t rows, int64_t cols, int64_t ignore_index) {
  check_shape(targets, {rows}, "targets");
  const bool wide = targets.scalar_type() == ScalarType::Long;
  check(wide || targets.scalar_type() == ScalarType::Int, "targets must be int32 or int64");
  const Targets result{.data = targets.const_data_ptr(), .stride = targets.stride(0), .wide = wide};
  if constexpr (kHostMemory)
    for (int64_t row = 0; row < rows; ++row)
      check(result[row] == ignore_index || (result[row] >= 0 && result[row] < cols), "targets[", row, "] is ",
            result[row], "; allowed are 0 to ", cols - 1, " and ignore_index ", ignore_index);
  return result;
}

}  // namespace grokkernels
