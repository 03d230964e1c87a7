// moe_permute and moe_unpermute: from torch tensors to the launchers. Schemas: grokkernels/ops/moe_permute.py.
#include "moe_permute.h"

#include <limits>

#include "common/expert_order.h"
#include "torch/column.h"

namespace grokkernels {
namespace {

struct Pairs {
  Tensor tensor;  // (N, K), dense
  int64_t tokens, top_k;
  const int32_t* data() const { return static_cast<const int32_t*>(tensor.const_data_ptr()); }
};

Pairs pairs_of(const Tensor& t, const char* name) {
  check_dtype(t, ScalarType::Int, name);
  check(t.dim() == 2, name, " must have shape (N, K), got ", shape_text(t));
  check(t.numel() <= std::numeric_limits<int32_t>::max(), name, " must have fewer than 2^31 elements, got ", t.numel());
  return {dense(t), t.size(0), t.size(1)};
}

// A matrix whose rows may be empty, unlike rows_of.
Rows matrix(const Tensor& t, int64_t rows, const char* name) {
  check(t.dim() == 2 && t.size(0) == rows, name, " must have ", rows, " rows, got shape ", shape_text(t));
  Rows r = rows_of(t);
  return {r.tensor, r.data, rows, t.size(1), r.stride};
}

std::tuple<Tensor, Tensor, Tensor> permute_fwd(const Tensor& x, const Tensor& indices, int64_t num_experts,
                                               std::optional<int64_t> capacity) {
  const Pairs in = pairs_of(indices, "indices");
  const Rows xr = matrix(x, in.tokens, "x");
  const int64_t pairs = in.tokens * in.top_k;
  check(num_experts >= 0, "num_experts must be at least 0, got ", num_experts);
  Tensor rows = new_tensor({pairs, xr.cols}, x.scalar_type(), x);
  Tensor slots = new_tensor({in.tokens, in.top_k}, ScalarType::Int, x);
  Tensor offsets = new_tensor({num_experts}, ScalarType::Int, x);
  const Workspace counts(expert_order_counts(pairs, num_experts), ScalarType::Int, x);
  GK_LAUNCH(moe_permute_fwd, x)
  ({.dtype = native_dtype(x, "x"),
    .tokens = in.tokens,
    .top_k = in.top_k,
    .cols = xr.cols,
    .experts = num_experts,
    .capacity = capacity.value_or(pairs),
    .x = xr.data,
    .indices = in.data(),
    .rows = rows.mutable_data_ptr(),
    .slots = static_cast<int32_t*>(slots.mutable_data_ptr()),
    .offsets = static_cast<int32_t*>(offsets.mutable_data_ptr()),
    .counts = counts.data<int32_t>(),
    .x_stride = xr.stride});
  return {rows, slots, offsets};
}

Tensor permute_bwd(const Tensor& drows, const Tensor& slots) {
  const Pairs in = pairs_of(slots, "slots");
  const Rows dr = matrix(drows, in.tokens * in.top_k, "drows");
  Tensor dx = new_tensor({in.tokens, dr.cols}, drows.scalar_type(), drows);
  GK_LAUNCH(moe_permute_bwd, drows)
  ({.dtype = native_dtype(drows, "drows"),
    .tokens = in.tokens,
    .top_k = in.top_k,
    .cols = dr.cols,
    .drows = dr.data,
    .slots = in.data(),
    .dx = dx.mutable_data_ptr(),
    .drows_stride = dr.stride});
  return dx;
}

Tensor weights_of(const Tensor& weights, const Pairs& in) {
  check_dtype(weights, ScalarType::Float, "weights");
  check_shape(weights, {in.tokens, in.top_k}, "weights");
  return dense(weights);
}

Tensor unpermute_fwd(const Tensor& y, const Tensor& weights, const Tensor& slots) {
  const Pairs in = pairs_of(slots, "slots");
  const Rows yr = matrix(y, in.tokens * in.top_k, "y");
  const Tensor w = weights_of(weights, in);
  Tensor out = new_tensor({in.tokens, yr.cols}, y.scalar_type(), y);
  GK_LAUNCH(moe_unpermute_fwd, y)
  ({.dtype = native_dtype(y, "y"),
    .tokens = in.tokens,
    .top_k = in.top_k,
    .cols = yr.cols,
    .y = yr.data,
    .weights = static_cast<const float*>(w.const_data_ptr()),
    .slots = in.data(),
    .out = out.mutable_data_ptr(),
    .y_stride = yr.stride});
  return out;
}

std::tuple<Tensor, Tensor> unpermute_bwd(const Tensor& dout, const Tensor& y, const Tensor& weights,
                                         const Tensor& slots) {
  const Pairs in = pairs_of(slots, "slots");
  const Rows yr = matrix(y, in.tokens * in.top_k, "y"), dr = matrix(dout, in.tokens, "dout");
  check(dr.cols == yr.cols && dout.scalar_type() == y.scalar_type(), "dout must have the columns and dtype of y");
  const Tensor w = weights_of(weights, in);
  Tensor dy = new_tensor({yr.rows, yr.cols}, y.scalar_type(), y);
  Tensor dweights = new_tensor({in.tokens, in.top_k}, ScalarType::Float, y);
  const Workspace named(in.tokens * in.top_k, ScalarType::Byte, y);
  GK_LAUNCH(moe_unpermute_bwd, y)
  ({.dtype = native_dtype(y, "y"),
    .tokens = in.tokens,
    .top_k = in.top_k,
    .cols = yr.cols,
    .dout = dr.data,
    .y = yr.data,
    .weights = static_cast<const float*>(w.const_data_ptr()),
    .slots = in.data(),
    .dy = dy.mutable_data_ptr(),
    .dweights = static_cast<float*>(dweights.mutable_data_ptr()),
    .named = named.data<uint8_t>(),
    .dout_stride = dr.stride,
    .y_stride = yr.stride});
  return {dy, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grokkernels, GK_DISPATCH_KEY, m) {
  m.impl(GK_OVERLOAD("moe_permute_fwd"), TORCH_BOX(&permute_fwd));
  m.impl(GK_OVERLOAD("moe_permute_bwd"), TORCH_BOX(&permute_bwd));
  m.impl(GK_OVERLOAD("moe_unpermute_fwd"), TORCH_BOX(&unpermute_fwd));
  m.impl(GK_OVERLOAD("moe_unpermute_bwd"), TORCH_BOX(&unpermute_bwd));
}

}  // namespace grokkernels
