// adamw: from lists of torch tensors to the launchers. Schemas: grokkernels/ops/adamw.py.
#include "adamw.h"

#include <algorithm>
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

bool on_one_device(const Tensor& a, const Tensor& b) { return a.device() == b.device(); }

// What the update reads or writes while it runs, as bytes that are all the tensor's own.
struct Piece {
  uintptr_t begin, end;
  const char* list;
  size_t index;
  bool written;
};

// What is written to lies apart from everything else: chunks of tensors are updated in no order.
void check_apart(std::vector<Piece>& pieces) {
  std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.begin < b.begin; });
  for (size_t i = 0, last = 0, written = 0; i < pieces.size(); ++i) {  // of those before, the one that ends last
    const Piece& p = pieces[i];
    if (i > 0)
      for (const Piece& before : {pieces[last], pieces[p.written ? last : written]})
        check(p.begin >= before.end || !(p.written || before.written), before.list, "[", before.index, "] and ", p.list,
              "[", p.index, "] must not share memory, as one of them is written to");
    if (i == 0 || p.end > pieces[last].end) last = i;
    if (!pieces[written].written || (p.written && p.end > pieces[written].end)) written = i;
  }
}

void adamw(const std::vector<Tensor> params, const std::vector<Tensor> grads, const std::vector<Tensor> exp_avgs,
           const std::vector<Tensor> exp_avg_sqs, const std::vector<Tensor> steps, const std::optional<Tensor> norm,
           double lr, double beta1, double beta2, double eps, double weight_decay, double max_norm, bool maximize) {
  const size_t count = params.size();
  check(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count && steps.size() == count,
        "the lists of adamw must have the same length");
  if (count == 0) return;
  if (norm.has_value()) {
    check_dtype(*norm, ScalarType::Float, "norm");
    check_shape(*norm, {}, "norm");
    check(on_one_device(*norm, params[0]), "norm must be where the parameters are");
  }
  std::vector<AdamwTensor> tensors;
  std::vector<Tensor> copies;
  tensors.reserve(count);
  copies.reserve(count);
  std::vector<Piece> pieces;
  pieces.reserve(5 * count);
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
    check(on_one_device(p, params[0]) && on_one_device(grads[i], p) && on_one_device(exp_avgs[i], p) &&
              on_one_device(exp_avg_sqs[i], p) && on_one_device(steps[i], p),
          "the tensors of adamw must be on one device");
    const DType dtype = native_dtype(p, "params");
    check(grads[i].scalar_type() == p.scalar_type() && grads[i].numel() == p.numel(),
          "grads must have the shapes and dtypes of params");
    Tensor g = grads[i];
    if (!laid_out_alike(p, g)) {
      g = torch::stable::empty_like(p);
      torch::stable::copy_(g, grads[i]);
      copies.push_back(g);
    }
    const auto piece = [&](const Tensor& t, const char* list) {
      const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
      const uintptr_t bytes = static_cast<uintptr_t>(t.numel()) * t.element_size();
      if (bytes > 0) pieces.push_back({begin, begin + bytes, list, i, &t != &g});
    };
    piece(p, "params");
    piece(g, "grads");
    piece(exp_avgs[i], "exp_avgs");
    piece(exp_avg_sqs[i], "exp_avg_sqs");
    piece(steps[i], "steps");
    tensors.push_back({.dtype = dtype,
                       .numel = p.numel(),
                       .first_chunk = chunks,
                       .param = p.mutable_data_ptr(),
                       .grad = g.const_data_ptr(),
                       .exp_avg = static_cast<float*>(exp_avgs[i].mutable_data_ptr()),
                       .exp_avg_sq = static_cast<float*>(exp_avg_sqs[i].mutable_data_ptr()),
                       .step = static_cast<float*>(steps[i].mutable_data_ptr())});
    chunks += (p.numel() + kTensorChunk - 1) / kTensorChunk;
  }
  check_apart(pieces);
  const Tensor workspace = new_tensor({static_cast<int64_t>(count), 4}, ScalarType::Float, params[0]);
  GK_LAUNCH(adamw, params[0])
  ({.tensors = tensors.data(),
    .count = static_cast<int64_t>(count),
    .chunks = chunks,
    .steps = static_cast<AdamwStep*>(workspace.mutable_data_ptr()),
    .norm = data_or_null<float>(norm),
    .max_norm = max_norm,
    .maximize = maximize,
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
    check(on_one_device(t, tensors[0]), "the tensors of global_norm must be on one device");
    copies.push_back(fills_memory(t) ? t : torch::stable::contiguous(t));
    parts.push_back({.dtype = native_dtype(t, "tensors"),
                     .numel = t.numel(),
                     .first_chunk = chunks,
                     .data = copies.back().const_data_ptr()});
    chunks += (t.numel() + kTensorChunk - 1) / kTensorChunk;
  }
  Tensor norm = new_tensor({}, ScalarType::Float, tensors[0]);
  const Tensor partials = new_tensor({chunks}, ScalarType::Double, tensors[0]);
  GK_LAUNCH(global_norm, tensors[0])
  ({.tensors = parts.data(),
    .count = static_cast<int64_t>(parts.size()),
    .chunks = chunks,
    .partials = static_cast<double*>(partials.mutable_data_ptr()),
    .norm = static_cast<float*>(norm.mutable_data_ptr())});
  return norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grokkernels, GK_DISPATCH_KEY, m) {
  m.impl(GK_OVERLOAD("adamw"), TORCH_BOX(&adamw));
  m.impl(GK_OVERLOAD("global_norm"), TORCH_BOX(&global_norm));
}

}  // namespace grokkernels
