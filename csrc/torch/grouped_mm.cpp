// grouped_mm: from torch tensors to the launchers. Schemas: grokkernels/ops/grouped_mm.py.
#include "grouped_mm.h"

#include "torch/column.h"

namespace grokkernels {
namespace {

StackStrides matrix_strides(const Tensor& t) { return {0, t.stride(0), t.stride(1)}; }
StackStrides stack_strides(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

void check_operands(const Tensor& x, const Tensor& w, const Tensor& offsets) {
  check(x.dim() == 2 && w.dim() == 3, "x and w must have two and three dimensions, got ", shape_text(x), " and ",
        shape_text(w));
  check_shape(x, {x.size(0), w.size(1)}, "x");
  check_shape(offsets, {w.size(0)}, "offsets");
  check_dtype(offsets, ScalarType::Int, "offsets");
  check(w.scalar_type() == x.scalar_type(), "w must have the dtype of x");
}

Tensor grouped_mm(const Tensor& x, const Tensor& w, const Tensor& offsets) {
  check_operands(x, w, offsets);
  const Tensor ends = dense(offsets);
  Tensor y = new_tensor({x.size(0), w.size(2)}, x.scalar_type(), x);
  GK_LAUNCH(grouped_mm, x)
  ({.dtype = native_dtype(x, "x"),
    .rows = x.size(0),
    .depth = w.size(1),
    .cols = w.size(2),
    .groups = w.size(0),
    .x = x.const_data_ptr(),
    .w = w.const_data_ptr(),
    .offsets = static_cast<const int32_t*>(ends.const_data_ptr()),
    .y = y.mutable_data_ptr(),
    .x_strides = matrix_strides(x),
    .w_strides = stack_strides(w)});
  return y;
}

// dw lies in memory as w does: transposed when w's rows are the dense ones.
std::tuple<Tensor, Tensor> grouped_mm_bwd(const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor& offsets) {
  check_operands(x, w, offsets);
  check_shape(dy, {x.size(0), w.size(2)}, "dy");
  check(dy.scalar_type() == x.scalar_type(), "dy must have the dtype of x");
  const Tensor ends = dense(offsets);
  const DType dtype = native_dtype(x, "x");
  const int32_t* offsets_data = static_cast<const int32_t*>(ends.const_data_ptr());
  const int64_t rows = x.size(0), groups = w.size(0);
  Tensor dx = new_tensor({rows, w.size(1)}, x.scalar_type(), x);
  const StackStrides ws = stack_strides(w);
  GK_LAUNCH(grouped_mm, x)
  ({.dtype = dtype,
    .rows = rows,
    .depth = w.size(2),
    .cols = w.size(1),
    .groups = groups,
    .x = dy.const_data_ptr(),
    .w = w.const_data_ptr(),
    .offsets = offsets_data,
    .y = dx.mutable_data_ptr(),
    .x_strides = matrix_strides(dy),
    .w_strides = {ws.stack, ws.col, ws.row}});

  const bool transposed = ws.row == 1 && ws.col != 1;
  const Tensor& a = transposed ? dy : x;
  const Tensor& b = transposed ? x : dy;
  Tensor dw = new_tensor({groups, a.size(1), b.size(1)}, x.scalar_type(), x);
  GK_LAUNCH(grouped_mm_wgrad, x)
  ({.dtype = dtype,
    .rows = rows,
    .depth = a.size(1),
    .cols = b.size(1),
    .groups = groups,
    .x = a.const_data_ptr(),
    .dy = b.const_data_ptr(),
    .offsets = offsets_data,
    .dw = dw.mutable_data_ptr(),
    .x_strides = matrix_strides(a),
    .dy_strides = matrix_strides(b)});
  return {dx, transposed ? torch::stable::transpose(dw, 1, 2) : dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grokkernels, GK_DISPATCH_KEY, m) {
  m.impl(GK_OVERLOAD("grouped_mm"), TORCH_BOX(&grouped_mm));
  m.impl(GK_OVERLOAD("grouped_mm_bwd"), TORCH_BOX(&grouped_mm_bwd));
}

}  // namespace grokkernels
