// moe_experts: from torch tensors to the launchers. Schemas: grokkernels/ops/moe_experts.py.
#include "moe_experts.h"

#include <limits>

#include "common/expert_order.h"
#include "torch/column.h"

namespace grokkernels {
namespace {

struct Shape {
  int64_t tokens, top_k, experts, cols, hidden_cols;
  int64_t rows() const { return tokens * top_k; }
};

Shape shape_of(const Tensor& x, const Tensor& gate_proj, const Tensor& up_proj, const Tensor& down_proj,
               const Tensor& weights) {
  check(x.dim() == 2 && gate_proj.dim() == 3 && weights.dim() == 2,
        "x, gate_proj and weights must be (N, C), (E, F, C) "
        "and (N, K), got ",
        shape_text(x), ", ", shape_text(gate_proj), " and ", shape_text(weights));
  const Shape s{x.size(0), weights.size(1), gate_proj.size(0), x.size(1), gate_proj.size(1)};
  check(s.rows() <= std::numeric_limits<int32_t>::max(), "N * K must be below 2^31, got ", s.rows());
  check_shape(gate_proj, {s.experts, s.hidden_cols, s.cols}, "gate_proj");
  check_shape(up_proj, {s.experts, s.hidden_cols, s.cols}, "up_proj");
  check_shape(down_proj, {s.experts, s.cols, s.hidden_cols}, "down_proj");
  check_shape(weights, {s.tokens, s.top_k}, "weights");
  check_dtype(weights, ScalarType::Float, "weights");
  for (const Tensor* t : {&gate_proj, &up_proj, &down_proj})
    check(t->scalar_type() == x.scalar_type(), "gate_proj, up_proj and down_proj must have the dtype of x");
  return s;
}

Activation activation_of(int64_t number) {
  check(number >= 0 && number <= static_cast<int64_t>(Activation::relu), "activation must be 0 to 3, got ", number);
  return static_cast<Activation>(number);
}

StackStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

ExpertWeights experts_of(const Tensor& gate_proj, const Tensor& up_proj, const Tensor& down_proj) {
  return {gate_proj.const_data_ptr(), up_proj.const_data_ptr(), down_proj.const_data_ptr(),
          strides_of(gate_proj),      strides_of(up_proj),      strides_of(down_proj)};
}

// Data and stride of (N, C) rows; those of rows_of where there is anything to read.
Rows tokens_of(const Tensor& t, const Shape& s, const Tensor& x, const char* name) {
  check_shape(t, {s.tokens, s.cols}, name);
  check(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  return rows_of(t);
}

template <typename T = void>
T* data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& gate_proj,
                                                           const Tensor& up_proj, const Tensor& down_proj,
                                                           const Tensor& weights, const Tensor& indices,
                                                           int64_t activation, std::optional<int64_t> capacity,
                                                           bool keep) {
  const Shape s = shape_of(x, gate_proj, up_proj, down_proj, weights);
  check_shape(indices, {s.tokens, s.top_k}, "indices");
  check_dtype(indices, ScalarType::Int, "indices");
  const Rows xr = tokens_of(x, s, x, "x");
  const Tensor w = dense(weights), chosen = dense(indices);
  const ScalarType dtype = x.scalar_type();
  Tensor y = new_tensor({s.tokens, s.cols}, dtype, x);
  Tensor gate = new_tensor({keep ? s.rows() : 0, s.hidden_cols}, dtype, x);
  Tensor up = new_tensor({keep ? s.rows() : 0, s.hidden_cols}, dtype, x);
  Tensor slots = new_tensor({s.tokens, s.top_k}, ScalarType::Int, x);
  Tensor offsets = new_tensor({s.experts}, ScalarType::Int, x);
  Tensor token_of = new_tensor({s.rows()}, ScalarType::Int, x);
  Tensor hidden = new_tensor({s.rows(), s.hidden_cols}, dtype, x);
  Tensor down = new_tensor({s.rows(), s.cols}, ScalarType::Float, x);
  const Workspace counts(expert_order_counts(s.rows(), s.experts), ScalarType::Int, x);
  GK_LAUNCH(moe_experts_fwd, x)
  ({.dtype = native_dtype(x, "x"),
    .activation = activation_of(activation),
    .tokens = s.tokens,
    .top_k = s.top_k,
    .experts = s.experts,
    .cols = s.cols,
    .hidden_cols = s.hidden_cols,
    .capacity = capacity.value_or(s.rows()),
    .x = xr.data,
    .experts_weights = experts_of(gate_proj, up_proj, down_proj),
    .weights = static_cast<const float*>(w.const_data_ptr()),
    .indices = static_cast<const int32_t*>(chosen.const_data_ptr()),
    .y = data(y),
    .gate = keep ? data(gate) : nullptr,
    .up = keep ? data(up) : nullptr,
    .slots = data<int32_t>(slots),
    .offsets = data<int32_t>(offsets),
    .token_of = data<int32_t>(token_of),
    .hidden = data(hidden),
    .down = data<float>(down),
    .counts = counts.data<int32_t>(),
    .x_stride = xr.stride});
  return {y, gate, up, slots, offsets};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& gate_proj,
                                                            const Tensor& up_proj, const Tensor& down_proj,
                                                            const Tensor& weights, const Tensor& gate, const Tensor& up,
                                                            const Tensor& slots, const Tensor& offsets,
                                                            int64_t activation) {
  const Shape s = shape_of(x, gate_proj, up_proj, down_proj, weights);
  check_shape(slots, {s.tokens, s.top_k}, "slots");
  check_dtype(slots, ScalarType::Int, "slots");
  check_shape(offsets, {s.experts}, "offsets");
  check_dtype(offsets, ScalarType::Int, "offsets");
  for (const Tensor* t : {&gate, &up}) {
    check_shape(*t, {s.rows(), s.hidden_cols}, "gate and up, as the forward pass keeps them,");
    check(t->scalar_type() == x.scalar_type(), "gate and up must have the dtype of x");
  }
  const Rows xr = tokens_of(x, s, x, "x"), dyr = tokens_of(dy, s, x, "dy");
  const Tensor w = dense(weights), slot = dense(slots), ends = dense(offsets);
  const Tensor g = dense_vectors(gate), u = dense_vectors(up);
  const ScalarType dtype = x.scalar_type();
  Tensor dx = new_tensor({s.tokens, s.cols}, dtype, x);
  Tensor dgate_proj = new_tensor({s.experts, s.hidden_cols, s.cols}, dtype, x);
  Tensor dup_proj = new_tensor({s.experts, s.hidden_cols, s.cols}, dtype, x);
  Tensor ddown_proj = new_tensor({s.experts, s.cols, s.hidden_cols}, dtype, x);
  Tensor dweights = new_tensor({s.tokens, s.top_k}, ScalarType::Float, x);
  Tensor token_of = new_tensor({s.rows()}, ScalarType::Int, x);
  Tensor weight_of = new_tensor({s.rows()}, ScalarType::Float, x);
  Tensor dgate = new_tensor({s.rows(), s.hidden_cols}, dtype, x);
  Tensor dup = new_tensor({s.rows(), s.hidden_cols}, dtype, x);
  Tensor scaled_hidden = new_tensor({s.rows(), s.hidden_cols}, dtype, x);
  constexpr int64_t kDotCols = kHostMemory ? kMoeDotCols : kMoeDotColsDevice;
  const int64_t parts = (s.hidden_cols + kDotCols - 1) / kDotCols;
  Tensor dots = new_tensor({s.rows(), parts}, ScalarType::Float, x);
  Tensor dx_rows = new_tensor({s.rows(), s.cols}, ScalarType::Float, x);
  GK_LAUNCH(moe_experts_bwd, x)
  ({.dtype = native_dtype(x, "x"),
    .activation = activation_of(activation),
    .tokens = s.tokens,
    .top_k = s.top_k,
    .experts = s.experts,
    .cols = s.cols,
    .hidden_cols = s.hidden_cols,
    .dy = dyr.data,
    .x = xr.data,
    .experts_weights = experts_of(gate_proj, up_proj, down_proj),
    .weights = static_cast<const float*>(w.const_data_ptr()),
    .slots = static_cast<const int32_t*>(slot.const_data_ptr()),
    .offsets = static_cast<const int32_t*>(ends.const_data_ptr()),
    .gate = g.const_data_ptr(),
    .up = u.const_data_ptr(),
    .dx = data(dx),
    .dgate_proj = data(dgate_proj),
    .dup_proj = data(dup_proj),
    .ddown_proj = data(ddown_proj),
    .dweights = data<float>(dweights),
    .token_of = data<int32_t>(token_of),
    .weight_of = data<float>(weight_of),
    .dgate = data(dgate),
    .dup = data(dup),
    .scaled_hidden = data(scaled_hidden),
    .dots = data<float>(dots),
    .dx_rows = data<float>(dx_rows),
    .dy_stride = dyr.stride,
    .x_stride = xr.stride});
  return {dx, dgate_proj, dup_proj, ddown_proj, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grokkernels, GK_DISPATCH_KEY, m) {
  m.impl(GK_OVERLOAD("moe_experts_fwd"), TORCH_BOX(&forward));
  m.impl(GK_OVERLOAD("moe_experts_bwd"), TORCH_BOX(&backward));
}

}  // namespace grokkernels
