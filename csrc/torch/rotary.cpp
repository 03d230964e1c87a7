// rotary: from torch tensors to the launcher. Schemas: grokkernels/ops/rotary.py.
#include "rotary.h"

#include "torch/column.h"

namespace grokkernels {
namespace {

// x (B, T, H, D), or (total, H, D) as one batch entry, turned into y.
RotaryTensor rotary_tensor(const Tensor& x, Tensor& y) {
  const int64_t d = x.dim() - 3;  // of the tokens
  return {.x = x.const_data_ptr(),
          .y = y.mutable_data_ptr(),
          .heads = x.size(d + 1),
          .x_batch = d == 1 ? x.stride(0) : 0,
          .x_token = x.stride(d),
          .x_head = x.stride(d + 1),
          .y_batch = d == 1 ? y.stride(0) : 0,
          .y_token = y.stride(d),
          .y_head = y.stride(d + 1)};
}

Tensor dense_last_dim(const Tensor& x) {
  return x.size(x.dim() - 1) == 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

struct Options {
  const Tensor& cos;
  const Tensor& sin;
  const std::optional<Tensor>& positions;
  int64_t offset;
  const std::optional<Tensor>& cu_seqlens;
  bool interleaved, inverse;
};

// Turns q and k, which have a dense last dim, into qy and ky.
void turn(const Tensor& q, Tensor& qy, const std::optional<Tensor>& k, Tensor* ky, const Options& o) {
  const bool packed = q.dim() == 3;
  check(q.dim() == 3 || q.dim() == 4, "q must have shape (B, T, H, D) or (total, H, D), got ", shape_text(q));
  const int64_t dim = q.size(q.dim() - 1), tokens = q.size(q.dim() - 3), batch = packed ? 1 : q.size(0);
  if (k.has_value()) {
    check(k->dim() == q.dim() && k->size(0) == q.size(0) && k->size(k->dim() - 3) == tokens &&
              k->size(k->dim() - 1) == dim && k->scalar_type() == q.scalar_type(),
          "k must be like q but for the number of heads, got ", shape_text(*k));
  }
  const Tensor cos = dense(o.cos), sin = dense(o.sin);
  check_dtype(cos, ScalarType::Float, "cos");
  check_dtype(sin, ScalarType::Float, "sin");
  check(cos.dim() == 2 && 2 * cos.size(1) <= dim, "cos must have shape (max_position, R/2) with R <= ", dim, ", got ",
        shape_text(cos));
  check_shape(sin, {cos.size(0), cos.size(1)}, "sin");

  int64_t sequences = batch;
  const std::optional<Tensor> cu = dense(o.cu_seqlens), positions = dense(o.positions);
  const int32_t* starts = data_or_null<int32_t>(cu);
  if (cu.has_value()) {
    check_dtype(*cu, ScalarType::Int, "cu_seqlens");
    sequences = cu->numel() - 1;
    check(packed && sequences >= 0, "cu_seqlens goes with q (total, H, D) and has at least one entry");
    if constexpr (kHostMemory) {
      bool ordered = starts[0] == 0 && starts[sequences] == tokens;
      for (int64_t s = 0; s < sequences; ++s) ordered = ordered && starts[s] <= starts[s + 1];
      check(ordered, "cu_seqlens must rise from 0 to the ", tokens, " tokens of q");
    }
  } else {
    check(!packed, "q (total, H, D) needs cu_seqlens");
  }
  bool per_token = false;
  if (positions.has_value()) {
    check_dtype(*positions, ScalarType::Long, "positions");
    per_token = packed ? positions->numel() == tokens : positions->dim() == 2;
    check(positions->numel() == (per_token ? batch * tokens : sequences), "positions has shape ",
          shape_text(*positions), ", neither one entry per token nor one per sequence");
  }

  int64_t outside = -1;
  GK_LAUNCH(rotary, q)
  ({.dtype = native_dtype(q, "q"),
    .batch = batch,
    .tokens = tokens,
    .dim = dim,
    .rotated = 2 * cos.size(1),
    .max_position = cos.size(0),
    .q = rotary_tensor(q, qy),
    .k = k.has_value() ? rotary_tensor(*k, *ky) : RotaryTensor{},
    .cos = static_cast<const float*>(cos.const_data_ptr()),
    .sin = static_cast<const float*>(sin.const_data_ptr()),
    .positions = data_or_null<int64_t>(positions),
    .cu_seqlens = starts,
    .sequences = sequences,
    .offset = o.offset,
    .position_per_token = per_token,
    .interleaved = o.interleaved,
    .inverse = o.inverse,
    .outside = kHostMemory ? &outside : nullptr});
  check(outside < 0, "the position of token ", outside, " is outside the ", cos.size(0), " rows of cos and sin");
}

std::tuple<Tensor, Tensor> rotary_fwd(const Tensor& q, const std::optional<Tensor>& k, const Tensor& cos,
                                      const Tensor& sin, const std::optional<Tensor>& positions, int64_t offset,
                                      const std::optional<Tensor>& cu_seqlens, bool interleaved, bool inverse) {
  check(q.dim() >= 3 && (!k.has_value() || k->dim() >= 3), "q and k need at least three dimensions");
  Tensor qy = new_like(q);
  Tensor ky = k.has_value() ? new_like(*k) : new_tensor({0}, q.scalar_type(), q);
  const std::optional<Tensor> kx = k.has_value() ? std::optional<Tensor>(dense_last_dim(*k)) : std::nullopt;
  turn(dense_last_dim(q), qy, kx, &ky, {cos, sin, positions, offset, cu_seqlens, interleaved, inverse});
  return {qy, ky};
}

void rotary_inplace(Tensor q, std::optional<Tensor> k, const Tensor& cos, const Tensor& sin,
                    const std::optional<Tensor>& positions, int64_t offset, const std::optional<Tensor>& cu_seqlens,
                    bool interleaved, bool inverse) {
  check(q.dim() >= 3 && (!k.has_value() || k->dim() >= 3), "q and k need at least three dimensions");
  Tensor qy = dense_last_dim(q);  // q itself unless its last dim is strided
  std::optional<Tensor> ky = k.has_value() ? std::optional<Tensor>(dense_last_dim(*k)) : std::nullopt;
  turn(qy, qy, ky, ky ? &*ky : nullptr, {cos, sin, positions, offset, cu_seqlens, interleaved, inverse});
  if (qy.data_ptr() != q.data_ptr()) torch::stable::copy_(q, qy);
  if (ky && ky->data_ptr() != k->data_ptr()) torch::stable::copy_(*k, *ky);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grokkernels, GK_DISPATCH_KEY, m) {
  m.impl(GK_OVERLOAD("rotary_fwd"), TORCH_BOX(&rotary_fwd));
  m.impl(GK_OVERLOAD("rotary_inplace"), TORCH_BOX(&rotary_inplace));
}

}  // namespace grokkernels
