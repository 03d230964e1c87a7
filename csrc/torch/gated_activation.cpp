// gated_activation: from torch tensors to the launchers. Schemas: grokkernels/ops/gated_activation.py.
#include "gated_activation.h"

#include "torch/column.h"

namespace grokkernels {
namespace {

Activation activation(int64_t kind) {
  check(kind >= 0 && kind <= static_cast<int64_t>(Activation::relu), "kind must be 0 to 3, got ", kind);
  return static_cast<Activation>(kind);
}

Rows rows_like(const Tensor& t, const Tensor& gate, const char* name) {
  bool same = t.dim() == gate.dim() && t.scalar_type() == gate.scalar_type();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == gate.size(d);
  check(same, name, " must have the shape and dtype of gate, got ", shape_text(t));
  return rows_of(t);
}

Tensor gated_activation_fwd(const Tensor& gate, const Tensor& up, int64_t kind) {
  const Rows g = rows_of(gate), u = rows_like(up, gate, "up");
  Tensor y = new_like(gate);
  GK_LAUNCH(gated_activation_fwd, gate)
  ({.dtype = native_dtype(gate, "gate"),
    .kind = activation(kind),
    .rows = g.rows,
    .cols = g.cols,
    .gate = g.data,
    .up = u.data,
    .y = y.mutable_data_ptr(),
    .gate_stride = g.stride,
    .up_stride = u.stride});
  return y;
}

std::tuple<Tensor, Tensor> gated_activation_bwd(const Tensor& dy, const Tensor& gate, const Tensor& up, int64_t kind) {
  const Rows g = rows_of(gate), u = rows_like(up, gate, "up"), d = rows_like(dy, gate, "dy");
  Tensor dgate = new_like(gate);
  Tensor dup = new_like(gate);
  GK_LAUNCH(gated_activation_bwd, gate)
  ({.dtype = native_dtype(gate, "gate"),
    .kind = activation(kind),
    .rows = g.rows,
    .cols = g.cols,
    .dy = d.data,
    .gate = g.data,
    .up = u.data,
    .dgate = dgate.mutable_data_ptr(),
    .dup = dup.mutable_data_ptr(),
    .dy_stride = d.stride,
    .gate_stride = g.stride,
    .up_stride = u.stride});
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grokkernels, GK_DISPATCH_KEY, m) {
  m.impl(GK_OVERLOAD("gated_activation_fwd"), TORCH_BOX(&gated_activation_fwd));
  m.impl(GK_OVERLOAD("gated_activation_bwd"), TORCH_BOX(&gated_activation_bwd));
}

}  // namespace grokkernels
