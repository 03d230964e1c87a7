// cross_entropy: from torch tensors to the launchers. Schemas: grokkernels/ops/cross_entropy.py.
#include "cross_entropy.h"

#include <string>

#include "torch/column.h"
#include "torch/loss.h"

namespace grokkernels {
namespace {

std::tuple<Tensor, Tensor> cross_entropy_fwd(const Tensor& logits, const Tensor& targets, double softcap,
                                             double logit_scale, double z_loss, double label_smoothing,
                                             int64_t ignore_index, const std::string& reduction) {
  check(logits.dim() == 2 && logits.size(1) >= 1, "logits must have shape (N, V) with V >= 1");
  const Rows x = rows_of(logits);
  const LossOptions options = loss_options(softcap, logit_scale, z_loss, label_smoothing, ignore_index, reduction);
  Tensor loss = options.reduction == Reduction::none ? new_tensor({x.rows}, ScalarType::Float, logits)
                                                     : new_tensor({}, ScalarType::Float, logits);
  Tensor lse = new_tensor({x.rows}, ScalarType::Double, logits);
  const Workspace partials(cross_entropy_workspace(x.rows, x.cols), ScalarType::Byte, logits);
  const bool per_row = options.reduction == Reduction::none;
  const Workspace row_losses(per_row ? 0 : x.rows, ScalarType::Float, logits);
  GK_LAUNCH(cross_entropy_fwd, logits)
  ({.dtype = native_dtype(logits, "logits"),
    .rows = x.rows,
    .cols = x.cols,
    .logits = x.data,
    .logits_stride = x.stride,
    .targets = targets_of(targets, x.rows, x.cols, ignore_index),
    .options = options,
    .loss = static_cast<float*>(loss.mutable_data_ptr()),
    .lse = static_cast<double*>(lse.mutable_data_ptr()),
    .partials = partials.data<void>(),
    .row_losses = per_row ? static_cast<float*>(loss.mutable_data_ptr()) : row_losses.data<float>()});
  return {loss, lse};
}

Tensor cross_entropy_bwd(const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& lse,
                         double softcap, double logit_scale, double z_loss, double label_smoothing,
                         int64_t ignore_index, const std::string& reduction) {
  check(logits.dim() == 2 && logits.size(1) >= 1, "logits must have shape (N, V) with V >= 1");
  const Rows x = rows_of(logits);
  const LossOptions options = loss_options(softcap, logit_scale, z_loss, label_smoothing, ignore_index, reduction);
  const bool per_row = options.reduction == Reduction::none;
  check_dtype(dloss, ScalarType::Float, "dloss");
  per_row ? check_shape(dloss, {x.rows}, "dloss") : check_shape(dloss, {}, "dloss");
  const Tensor statistics = dense(lse);
  check_dtype(statistics, ScalarType::Double, "lse");
  check_shape(statistics, {x.rows}, "lse");
  Tensor dlogits = new_like(logits);
  const Workspace divisor(1, ScalarType::Float, logits);
  GK_LAUNCH(cross_entropy_bwd, logits)
  ({.dtype = native_dtype(logits, "logits"),
    .rows = x.rows,
    .cols = x.cols,
    .logits = x.data,
    .logits_stride = x.stride,
    .targets = targets_of(targets, x.rows, x.cols, ignore_index),
    .options = options,
    .dloss = static_cast<const float*>(dloss.const_data_ptr()),
    .dloss_stride = per_row ? dloss.stride(0) : 0,
    .lse = static_cast<const double*>(statistics.const_data_ptr()),
    .dlogits = dlogits.mutable_data_ptr(),
    .divisor = divisor.data<float>()});
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grokkernels, GK_DISPATCH_KEY, m) {
  m.impl(GK_OVERLOAD("cross_entropy_fwd"), TORCH_BOX(&cross_entropy_fwd));
  m.impl(GK_OVERLOAD("cross_entropy_bwd"), TORCH_BOX(&cross_entropy_bwd));
}

}  // namespace grokkernels
