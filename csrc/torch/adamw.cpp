// adamw: from lists of torch tensors to the launchers. Schemas: grokkernels/ops/adamw.py.
#include "adamw.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "torch/column.h"

namespace grokkernels {
namespace {

// Whether the elements fill one piece of memory, in whatever order of the dims.
bool fills_memory(const Tensor& t) {
  if (t.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (auto [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool laid_out_alike(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d) || (a.size(d) != 1 && a.stride(d) != b.stride(d) && a.numel() > 0)) return false;
  return true;
}

void adamw(const std::vector<Tensor> params, const std::vector<Tensor> grads, const std::vector<Tensor> exp_avgs,
           const std::vector<Tensor> exp_avg_sqs, const std::vector<Tensor> steps, const std::optional<Tensor> norm,
           double lr, double beta1, double beta2, double eps, double weight_decay, double max_norm, bool maximize) {
  const size_t count = params.size();
  check(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count && steps.size() == count,
        "the lists of adamw must have the same length");
  double grad_scale = maximize ? -1.0 : 1.0;
  if (norm.has_value()) {
    check_dtype(*norm, ScalarType::Float, "norm");
    check_shape(*norm, {}, "norm");
    const float value = *static_cast<const float*>(norm->const_data_ptr());
    if (!std::isfinite(value)) return;
    grad_scale *= std::min(1.0, max_norm / (value + 1e-6));
  }
  std::vector<AdamwTensor> tensors;
  std::vector<Tensor> copies;
  tensors.reserve(count);
  copies.reserve(count);
  int64_t chunks = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& p = params[i];
    check(fills_memory(p), "params[", i, "] has gaps or overlaps in memory");
    check(laid_out_alike(p, exp_avgs[i]) && laid_out_alike(p, exp_avg_sqs[i]),
          "the moments must have the shape and strides of their parameter");
    check_dtype(exp_avgs[i], ScalarType::Float, "exp_avgs");
    check_dtype(exp_avg_sqs[i], ScalarType::Float, "exp_avg_sqs");
    check_dtype(steps[i], ScalarType::Float, "steps");
    check_shape(steps[i], {}, "steps");
    const DType dtype = native_dtype(p, "params");
    check(grads[i].scalar_type() == p.scalar_type() && grads[i].numel() == p.numel(),
          "grads must have the shapes and dtypes of params");
    Tensor g = grads[i];
    if (!laid_out_alike(p, g)) {
      g = torch::stable::empty_like(p);
      torch::stable::copy_(g, grads[i]);
      copies.push_back(g);
    }
    tensors.push_back({.dtype = dtype,
                       .numel = p.numel(),
                       .first_chunk = chunks,
                       .param = p.mutable_data_ptr(),
                       .grad = g.const_data_ptr(),
                       .exp_avg = static_cast<float*>(exp_avgs[i].mutable_data_ptr()),
                       .exp_avg_sq = static_cast<float*>(exp_avg_sqs[i].mutable_data_ptr()),
                       .step_size = 0.0,
                       .root_correction = 0.0});
    chunks += (p.numel() + kTensorChunk - 1) / kTensorChunk;
  }
  for (size_t i = 0; i < count; ++i) {  // only now that nothing can be refused any more
    float& step = *static_cast<float*>(steps[i].mutable_data_ptr());
    step += 1.0f;
    tensors[i].step_size = lr / (1.0 - std::pow(beta1, step));
    tensors[i].root_correction = 1.0 / std::sqrt(1.0 - std::pow(beta2, step));
  }
  GK_LAUNCH(adamw, params[0])
  ({.tensors = tensors.data(),
    .count = static_cast<int64_t>(count),
    .chunks = chunks,
    .grad_scale = grad_scale,
    .lr = lr,
    .beta1 = beta1,
    .beta2 = beta2,
    .eps = eps,
    .weight_decay = weight_decay});
}

Tensor global_norm(const std::vector<Tensor> tensors) {
  check(!tensors.empty(), "global_norm needs at least one tensor");
  std::vector<NormTensor> parts;
  std::vector<Tensor> copies;
  int64_t chunks = 0;
  for (const Tensor& t : tensors) {
    copies.push_back(fills_memory(t) ? t : torch::stable::contiguous(t));
    parts.push_back({.dtype = native_dtype(t, "tensors"),
                     .numel = t.numel(),
                     .first_chunk = chunks,
                     .data = copies.back().const_data_ptr()});
    chunks += (t.numel() + kTensorChunk - 1) / kTensorChunk;
  }
  Tensor norm = new_tensor({}, ScalarType::Float, tensors[0]);
  GK_LAUNCH(global_norm, tensors[0])
  ({.tensors = parts.data(),
    .count = static_cast<int64_t>(parts.size()),
    .chunks = chunks,
    .norm = static_cast<float*>(norm.mutable_data_ptr())});
  return norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grokkernels, GK_DISPATCH_KEY, m) {
  m.impl(GK_OVERLOAD("adamw"), TORCH_BOX(&adamw));
  m.impl(GK_OVERLOAD("global_norm"), TORCH_BOX(&global_norm));
}

}  // namespace grokkernels
