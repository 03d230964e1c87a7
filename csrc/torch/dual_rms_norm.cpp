// dual_rms_norm: from torch tensors to the launchers. Schemas: grokkernels/ops/dual_rms_norm.py.
#include "dual_rms_norm.h"

#include "torch/norm_workspace.h"

namespace grokkernels {
namespace {

DType weight_dtype(const Tensor& post_weight, const Tensor& pre_weight, const Tensor& x, int64_t cols) {
  check_shape(post_weight, {cols}, "post_weight");
  check_shape(pre_weight, {cols}, "pre_weight");
  const ScalarType dtype = post_weight.scalar_type();
  check(dtype == pre_weight.scalar_type() && (dtype == ScalarType::Float || dtype == x.scalar_type()),
        "both weights must be float32 or have the dtype of x");
  return native_dtype(post_weight, "post_weight");
}

Rows rows_like(const Tensor& t, const Tensor& x, const char* name) {
  const Rows r = rows_of(t);
  check(t.scalar_type() == x.scalar_type() && t.numel() == x.numel() && t.size(t.dim() - 1) == x.size(x.dim() - 1),
        name, " must have the shape and dtype of x");
  return r;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dual_rms_norm_fwd(const Tensor& x, const Tensor& residual,
                                                             const Tensor& post_weight, const Tensor& pre_weight,
                                                             double eps, bool zero_centered) {
  const Rows xr = rows_of(x), rr = rows_like(residual, x, "residual");
  const Tensor post = dense(post_weight), pre = dense(pre_weight);
  Tensor y = new_like(x);
  Tensor h = new_like(x);
  Tensor post_rstd = new_tensor({xr.rows}, ScalarType::Float, x);
  Tensor pre_rstd = new_tensor({xr.rows}, ScalarType::Float, x);
  const Workspace sums = norm_sums(norm_plan(xr.rows, xr.cols), xr);
  GK_LAUNCH(dual_rms_norm_fwd, x)
  ({.dtype = native_dtype(x, "x"),
    .weight_dtype = weight_dtype(post, pre, x, xr.cols),
    .rows = xr.rows,
    .cols = xr.cols,
    .x = xr.data,
    .residual = rr.data,
    .post_weight = post.const_data_ptr(),
    .pre_weight = pre.const_data_ptr(),
    .y = y.mutable_data_ptr(),
    .h = h.mutable_data_ptr(),
    .post_rstd = static_cast<float*>(post_rstd.mutable_data_ptr()),
    .pre_rstd = static_cast<float*>(pre_rstd.mutable_data_ptr()),
    .x_stride = xr.stride,
    .residual_stride = rr.stride,
    .eps = static_cast<float>(eps),
    .zero_centered = zero_centered,
    .sums = sums.data<float>()});
  return {y, h, post_rstd, pre_rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dual_rms_norm_bwd(const Tensor& dy, const std::optional<Tensor>& dh,
                                                             const Tensor& x, const Tensor& h,
                                                             const Tensor& post_weight, const Tensor& pre_weight,
                                                             const Tensor& post_rstd, const Tensor& pre_rstd,
                                                             bool zero_centered) {
  const Rows xr = rows_of(x), hr = rows_like(h, x, "h"), dyr = rows_like(dy, x, "dy");
  std::optional<Rows> dhr;
  if (dh.has_value()) dhr = rows_like(*dh, x, "dh");
  const Tensor post = dense(post_weight), pre = dense(pre_weight);
  const Tensor post_r = dense(post_rstd), pre_r = dense(pre_rstd);
  check_dtype(post_r, ScalarType::Float, "post_rstd");
  check_dtype(pre_r, ScalarType::Float, "pre_rstd");
  check_shape(post_r, {xr.rows}, "post_rstd");
  check_shape(pre_r, {xr.rows}, "pre_rstd");
  Tensor dx = new_like(x);
  Tensor dresidual = new_like(x);
  Tensor dpost = new_like(post);
  Tensor dpre = new_like(pre);
  const NormPlan plan = norm_plan(xr.rows, xr.cols);
  const Workspace sums = norm_sums(plan, xr), partial = norm_floats(2 * plan.chunks * xr.cols, x);
  GK_LAUNCH(dual_rms_norm_bwd, x)
  ({.dtype = native_dtype(x, "x"),
    .weight_dtype = weight_dtype(post, pre, x, xr.cols),
    .rows = xr.rows,
    .cols = xr.cols,
    .dy = dyr.data,
    .dh = dhr ? dhr->data : nullptr,
    .x = xr.data,
    .h = hr.data,
    .post_weight = post.const_data_ptr(),
    .pre_weight = pre.const_data_ptr(),
    .post_rstd = static_cast<const float*>(post_r.const_data_ptr()),
    .pre_rstd = static_cast<const float*>(pre_r.const_data_ptr()),
    .dx = dx.mutable_data_ptr(),
    .dresidual = dresidual.mutable_data_ptr(),
    .dpost_weight = dpost.mutable_data_ptr(),
    .dpre_weight = dpre.mutable_data_ptr(),
    .dy_stride = dyr.stride,
    .dh_stride = dhr ? dhr->stride : 0,
    .x_stride = xr.stride,
    .h_stride = hr.stride,
    .zero_centered = zero_centered,
    .sums = sums.data<float>(),
    .partial = partial.data<float>()});
  return {dx, dresidual, dpost, dpre};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grokkernels, GK_DISPATCH_KEY, m) {
  m.impl(GK_OVERLOAD("dual_rms_norm_fwd"), TORCH_BOX(&dual_rms_norm_fwd));
  m.impl(GK_OVERLOAD("dual_rms_norm_bwd"), TORCH_BOX(&dual_rms_norm_bwd));
}

}  // namespace grokkernels
