// merge_attention_states: from torch tensors to the launchers. Schemas: grokkernels/ops/merge_attention_states.py.
#include "merge_attention_states.h"

#include "torch/column.h"

namespace grokkernels {
namespace {

MergeStrides row_strides(const Tensor& o) { return {o.stride(0), o.stride(1), o.stride(2)}; }
MergeStrides statistic_strides(const Tensor& lse) { return {lse.stride(0), lse.stride(2), lse.stride(1)}; }

// o (B, T, H, D) with a dense last dim, checked.
Tensor rows(const Tensor& o, const Tensor& like, const char* name) {
  check_dtype(o, like.scalar_type(), name);
  check_shape(o, {like.size(0), like.size(1), like.size(2), like.size(3)}, name);
  return o.size(3) == 1 || o.stride(3) == 1 ? o : torch::stable::contiguous(o);
}

const float* statistics(const Tensor& lse, const Tensor& o, const char* name) {
  check_dtype(lse, ScalarType::Float, name);
  check_shape(lse, {o.size(0), o.size(2), o.size(1)}, name);
  return static_cast<const float*>(lse.const_data_ptr());
}

std::tuple<Tensor, Tensor> merge_attention_states_fwd(const Tensor& o1, const Tensor& lse1, const Tensor& o2,
                                                      const Tensor& lse2) {
  check(o1.dim() == 4, "o1 must have shape (B, T, H, D), got ", shape_text(o1));
  const Tensor r1 = rows(o1, o1, "o1"), r2 = rows(o2, o1, "o2");
  Tensor o = new_like(o1);
  Tensor lse = new_like(lse1);
  GK_LAUNCH(merge_attention_states_fwd, o1)
  ({.dtype = native_dtype(o1, "o1"),
    .batch = o1.size(0),
    .tokens = o1.size(1),
    .heads = o1.size(2),
    .dim = o1.size(3),
    .o1 = r1.const_data_ptr(),
    .o2 = r2.const_data_ptr(),
    .lse1 = statistics(lse1, o1, "lse1"),
    .lse2 = statistics(lse2, o1, "lse2"),
    .o = o.mutable_data_ptr(),
    .lse = static_cast<float*>(lse.mutable_data_ptr()),
    .o1_stride = row_strides(r1),
    .o2_stride = row_strides(r2),
    .lse1_stride = statistic_strides(lse1),
    .lse2_stride = statistic_strides(lse2)});
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_attention_states_bwd(const Tensor& dout,
                                                                      const std::optional<Tensor>& dlse,
                                                                      const Tensor& o1, const Tensor& lse1,
                                                                      const Tensor& o2, const Tensor& lse2) {
  check(o1.dim() == 4, "o1 must have shape (B, T, H, D), got ", shape_text(o1));
  const Tensor r1 = rows(o1, o1, "o1"), r2 = rows(o2, o1, "o2"), r = rows(dout, o1, "dout");
  Tensor do1 = new_like(o1);
  Tensor do2 = new_like(o1);
  Tensor dlse1 = new_like(lse1);
  Tensor dlse2 = new_like(lse2);
  GK_LAUNCH(merge_attention_states_bwd, o1)
  ({.dtype = native_dtype(o1, "o1"),
    .batch = o1.size(0),
    .tokens = o1.size(1),
    .heads = o1.size(2),
    .dim = o1.size(3),
    .dout = r.const_data_ptr(),
    .dlse = dlse.has_value() ? statistics(*dlse, o1, "dlse") : nullptr,
    .o1 = r1.const_data_ptr(),
    .o2 = r2.const_data_ptr(),
    .lse1 = statistics(lse1, o1, "lse1"),
    .lse2 = statistics(lse2, o1, "lse2"),
    .do1 = do1.mutable_data_ptr(),
    .do2 = do2.mutable_data_ptr(),
    .dlse1 = static_cast<float*>(dlse1.mutable_data_ptr()),
    .dlse2 = static_cast<float*>(dlse2.mutable_data_ptr()),
    .dout_stride = row_strides(r),
    .dlse_stride = dlse.has_value() ? statistic_strides(*dlse) : MergeStrides{},
    .o1_stride = row_strides(r1),
    .o2_stride = row_strides(r2),
    .lse1_stride = statistic_strides(lse1),
    .lse2_stride = statistic_strides(lse2)});
  return {do1, do2, dlse1, dlse2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grokkernels, GK_DISPATCH_KEY, m) {
  m.impl(GK_OVERLOAD("merge_attention_states_fwd"), TORCH_BOX(&merge_attention_states_fwd));
  m.impl(GK_OVERLOAD("merge_attention_states_bwd"), TORCH_BOX(&merge_attention_states_bwd));
}

}  // namespace grokkernels
