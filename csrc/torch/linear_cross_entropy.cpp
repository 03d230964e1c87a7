// linear_cross_entropy: from torch tensors to the launchers. Schemas: grokkernels/ops/linear_cross_entropy.py.
#include "linear_cross_entropy.h"

#include <string>

#include "torch/column.h"
#include "torch/loss.h"

namespace grokkernels {
namespace {

Rows checked_rows(const Tensor& x, const Tensor& weight) {
  check(x.dim() == 2 && weight.dim() == 2 && x.size(1) >= 1 && weight.size(0) >= 1 && x.size(1) == weight.size(1),
        "x must have shape (N, C) and weight (V, C), got ", shape_text(x), " and ", shape_text(weight));
  check(x.scalar_type() == weight.scalar_type(), "x and weight must have the same dtype");
  check(x.size(0) <= INT32_MAX, "x must have fewer than 2^31 rows");
  return rows_of(x);
}

std::tuple<Tensor, Tensor> linear_cross_entropy_fwd(const Tensor& x, const Tensor& weight, const Tensor& targets,
                                                    double softcap, double logit_scale, double z_loss,
                                                    double label_smoothing, int64_t ignore_index,
                                                    const std::string& reduction) {
  const Rows xr = checked_rows(x, weight);
  const LossOptions options = loss_options(softcap, logit_scale, z_loss, label_smoothing, ignore_index, reduction);
  Tensor loss = options.reduction == Reduction::none ? new_tensor({xr.rows}, ScalarType::Float, x)
                                                     : new_tensor({}, ScalarType::Float, x);
  Tensor lse = new_tensor({xr.rows}, ScalarType::Double, x);
  const bool per_row = options.reduction == Reduction::none;
  const Workspace row_losses(per_row ? 0 : xr.rows, ScalarType::Float, x), list(xr.rows + 1, ScalarType::Int, x);
  const Workspace target_z(xr.rows, ScalarType::Float, x);
  const Workspace partials(linear_cross_entropy_workspace(xr.rows, weight.size(0)), ScalarType::Byte, x);
  GK_LAUNCH(linear_cross_entropy_fwd, x)
  ({.dtype = native_dtype(x, "x"),
    .rows = xr.rows,
    .width = xr.cols,
    .cols = weight.size(0),
    .x = xr.data,
    .weight = weight.const_data_ptr(),
    .x_stride = xr.stride,
    .weight_stride = {weight.stride(0), weight.stride(1)},
    .targets = targets_of(targets, xr.rows, weight.size(0), ignore_index),
    .options = options,
    .loss = static_cast<float*>(loss.mutable_data_ptr()),
    .lse = static_cast<double*>(lse.mutable_data_ptr()),
    .row_losses = per_row ? static_cast<float*>(loss.mutable_data_ptr()) : row_losses.data<float>(),
    .index = list.data<int32_t>(),
    .target_z = target_z.data<float>(),
    .partials = partials.data<void>()});
  return {loss, lse};
}

std::tuple<Tensor, Tensor> linear_cross_entropy_bwd(const Tensor& dloss, const Tensor& x, const Tensor& weight,
                                                    const Tensor& targets, const Tensor& lse, bool need_dx,
                                                    bool need_dweight, double softcap, double logit_scale,
                                                    double z_loss, double label_smoothing, int64_t ignore_index,
                                                    const std::string& reduction) {
  const Rows xr = checked_rows(x, weight);
  const int64_t vocabulary = weight.size(0);
  const LossOptions options = loss_options(softcap, logit_scale, z_loss, label_smoothing, ignore_index, reduction);
  const bool per_row = options.reduction == Reduction::none;
  check_dtype(dloss, ScalarType::Float, "dloss");
  per_row ? check_shape(dloss, {xr.rows}, "dloss") : check_shape(dloss, {}, "dloss");
  const Tensor statistics = dense(lse);
  check_dtype(statistics, ScalarType::Double, "lse");
  check_shape(statistics, {xr.rows}, "lse");
  auto output = [](bool needed, const Tensor& like) {
    return needed ? new_like(like) : new_tensor({0}, like.scalar_type(), like);
  };
  Tensor dx = output(need_dx, x), dweight = output(need_dweight, weight);
  const int64_t held = linear_cross_entropy_columns(xr.rows, vocabulary,
                                                    kHostMemory ? kLinearCrossEntropyHost : kLinearCrossEntropyDevice);
  Tensor dlogits =
      new_tensor({xr.rows * linear_cross_entropy_stride(held)}, kHostMemory ? ScalarType::Float : x.scalar_type(), x);
  const Workspace list(xr.rows + 1, ScalarType::Int, x), scales(3, ScalarType::Float, x);
  Tensor dx_sum = new_tensor({need_dx ? xr.rows * xr.cols : 0}, ScalarType::Float, x);
  GK_LAUNCH(linear_cross_entropy_bwd, x)
  ({.dtype = native_dtype(x, "x"),
    .rows = xr.rows,
    .width = xr.cols,
    .cols = vocabulary,
    .x = xr.data,
    .weight = weight.const_data_ptr(),
    .x_stride = xr.stride,
    .weight_stride = {weight.stride(0), weight.stride(1)},
    .targets = targets_of(targets, xr.rows, vocabulary, ignore_index),
    .options = options,
    .dloss = static_cast<const float*>(dloss.const_data_ptr()),
    .dloss_stride = per_row ? dloss.stride(0) : 0,
    .lse = static_cast<const double*>(statistics.const_data_ptr()),
    .dx = need_dx ? dx.mutable_data_ptr() : nullptr,
    .dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr,
    .dlogits = dlogits.mutable_data_ptr(),
    .dx_sum = static_cast<float*>(dx_sum.mutable_data_ptr()),
    .index = list.data<int32_t>(),
    .scales = scales.data<float>()});
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grokkernels, GK_DISPATCH_KEY, m) {
  m.impl(GK_OVERLOAD("linear_cross_entropy_fwd"), TORCH_BOX(&linear_cross_entropy_fwd));
  m.impl(GK_OVERLOAD("linear_cross_entropy_bwd"), TORCH_BOX(&linear_cross_entropy_bwd));
}

}  // namespace grokkernels
