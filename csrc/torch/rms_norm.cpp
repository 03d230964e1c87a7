// rms_norm: from torch tensors to the launchers. Schemas: grokkernels/ops/rms_norm.py.
#include "rms_norm.h"

#include "torch/norm_workspace.h"

namespace grokkernels {
namespace {

DType weight_dtype(const Tensor& weight, const Tensor& x, int64_t cols) {
  check_shape(weight, {cols}, "weight");
  check(weight.scalar_type() == ScalarType::Float || weight.scalar_type() == x.scalar_type(),
        "weight must be float32 or have the dtype of x");
  return native_dtype(weight, "weight");
}

std::tuple<Tensor, std::optional<Tensor>, Tensor> forward(const Tensor& x, const std::optional<Tensor>& residual,
                                                          const Tensor& weight, double eps, bool zero_centered) {
  const Rows xr = rows_of(x);
  const Tensor w = dense(weight);
  const DType wdtype = weight_dtype(w, x, xr.cols);
  Tensor y = new_like(x);
  std::optional<Tensor> h;
  if (residual.has_value()) h = new_like(x);
  Tensor rstd = new_tensor({xr.rows}, ScalarType::Float, x);
  std::optional<Rows> rr;
  if (residual.has_value()) {
    check(residual->scalar_type() == x.scalar_type() && residual->numel() == x.numel() &&
              residual->size(residual->dim() - 1) == xr.cols,
          "residual must have the shape and dtype of x");
    rr = rows_of(*residual);
  }
  const Workspace sums = norm_sums(norm_plan(xr.rows, xr.cols), xr);
  GK_LAUNCH(rms_norm_fwd, x)
  ({.dtype = native_dtype(x, "x"),
    .weight_dtype = wdtype,
    .rows = xr.rows,
    .cols = xr.cols,
    .x = xr.data,
    .residual = rr ? rr->data : nullptr,
    .weight = w.const_data_ptr(),
    .y = y.mutable_data_ptr(),
    .h = h.has_value() ? h->mutable_data_ptr() : nullptr,
    .rstd = static_cast<float*>(rstd.mutable_data_ptr()),
    .x_stride = xr.stride,
    .residual_stride = rr ? rr->stride : 0,
    .eps = static_cast<float>(eps),
    .zero_centered = zero_centered,
    .sums = sums.data<float>()});
  return {y, h, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const Tensor& weight, double eps, bool zero_centered) {
  auto [y, h, rstd] = forward(x, std::nullopt, weight, eps, zero_centered);
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                    double eps, bool zero_centered) {
  auto [y, h, rstd] = forward(x, residual, weight, eps, zero_centered);
  return {y, *h, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const std::optional<Tensor>& dh, const Tensor& x,
                                        const Tensor& weight, const Tensor& rstd, bool zero_centered) {
  const Rows xr = rows_of(x), dyr = rows_of(dy);
  const Tensor w = dense(weight), r = dense(rstd);
  const DType wdtype = weight_dtype(w, x, xr.cols);
  check(dyr.rows == xr.rows && dyr.cols == xr.cols && dy.scalar_type() == x.scalar_type(),
        "dy must have the shape and dtype of x");
  check_dtype(r, ScalarType::Float, "rstd");
  check_shape(r, {xr.rows}, "rstd");
  std::optional<Rows> dhr;
  if (dh.has_value()) {
    dhr = rows_of(*dh);
    check(dhr->rows == xr.rows && dhr->cols == xr.cols && dh->scalar_type() == x.scalar_type(),
          "dh must have the shape and dtype of x");
  }
  Tensor dx = new_like(x);
  Tensor dweight = new_like(w);
  const NormPlan plan = norm_plan(xr.rows, xr.cols);
  const Workspace sums = norm_sums(plan, xr), partial = norm_floats(plan.chunks * xr.cols, x);
  GK_LAUNCH(rms_norm_bwd, x)
  ({.dtype = native_dtype(x, "x"),
    .weight_dtype = wdtype,
    .rows = xr.rows,
    .cols = xr.cols,
    .dy = dyr.data,
    .dh = dhr ? dhr->data : nullptr,
    .x = xr.data,
    .weight = w.const_data_ptr(),
    .rstd = static_cast<const float*>(r.const_data_ptr()),
    .dx = dx.mutable_data_ptr(),
    .dweight = dweight.mutable_data_ptr(),
    .dy_stride = dyr.stride,
    .dh_stride = dhr ? dhr->stride : 0,
    .x_stride = xr.stride,
    .zero_centered = zero_centered,
    .sums = sums.data<float>(),
    .partial = partial.data<float>()});
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grokkernels, GK_DISPATCH_KEY, m) {
  m.impl(GK_OVERLOAD("rms_norm_fwd"), TORCH_BOX(&rms_norm_fwd));
  m.impl(GK_OVERLOAD("add_rms_norm_fwd"), TORCH_BOX(&add_rms_norm_fwd));
  m.impl(GK_OVERLOAD("rms_norm_bwd"), TORCH_BOX(&rms_norm_bwd));
}

}  // namespace grokkernels
