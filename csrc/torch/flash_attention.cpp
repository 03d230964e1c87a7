// flash_attention: from torch tensors to the launchers. Schemas: grokkernels/ops/flash_attention.py.
#include "flash_attention.h"

#include <cstring>
#include <limits>
#include <vector>

#include "torch/column.h"

namespace grokkernels {
namespace {

// x as the kernels read it: any strides whose last dim is dense, else a copy.
Tensor readable(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.numel() == 0 || x.size(last) == 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

// Elements from one entry of a dim to the next; of a dim of one entry that is nobody's, and 0 here.
int64_t step(const Tensor& x, int64_t d) { return x.size(d) == 1 ? 0 : x.stride(d); }

// x as the CUDA kernels read it: as flash_attention.h says. A tensor that is not so is copied, padded with zeros; a
// dense one that begins between two vectors too, which torch's contiguous would leave where it is.
Tensor readable_by_cuda(const Tensor& x) {
  const int64_t last = x.dim() - 1, vector = 16 / static_cast<int64_t>(x.element_size());
  if (x.numel() == 0) return x;
  bool fits = x.size(last) % vector == 0 && x.stride(last) == 1 && step(x, last - 2) <= kFlashAttentionRowStride &&
              begins_aligned(x);
  for (int64_t d = 0; d < last; ++d) fits = fits && step(x, d) % vector == 0;
  if (fits) return x;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = (x.size(last) + vector - 1) / vector * vector;
  Tensor copy = new_tensor({sizes.data(), sizes.size()}, x.scalar_type(), x);
  check(step(copy, last - 2) <= kFlashAttentionRowStride, "a row of all heads holds more than ",
        kFlashAttentionRowStride, " elements");
  if (sizes.back() != x.size(last)) torch::stable::zero_(copy);
  Tensor filled = torch::stable::narrow(copy, last, 0, x.size(last));
  torch::stable::copy_(filled, x);
  return copy;
}

Tensor readable_by_kernel(const Tensor& x) { return kHostMemory ? readable(x) : readable_by_cuda(x); }

AttentionTensor view(const Tensor& x) {
  const int64_t d = x.dim();
  return {x.const_data_ptr(), d == 4 ? step(x, 0) : 0, step(x, d - 3), step(x, d - 2)};
}

template <typename T>
const T* integers(const std::optional<Tensor>& t, ScalarType dtype, int64_t count, const char* name) {
  if (!t.has_value()) return nullptr;
  check_dtype(*t, dtype, name);
  check_shape(*t, {count}, name);
  return static_cast<const T*>(t->const_data_ptr());
}

// Every offset inside the tensor and none before the one to its left: nothing is read or written outside.
void check_offsets(const int32_t* offsets, int64_t batch, int64_t total, const char* name) {
  check(offsets[0] == 0, name, " must start at 0, got ", offsets[0]);
  for (int64_t b = 0; b < batch; ++b)
    check(offsets[b] <= offsets[b + 1], name, " must not fall, got ", offsets[b], " before ", offsets[b + 1]);
  check(offsets[batch] <= total, name, " must end at ", total, " rows or before, got ", offsets[batch]);
}

// The inputs of both passes, kept alive while a kernel reads them.
struct Inputs {
  Tensor q, k, v;
  std::optional<Tensor> cu_seqlens_q, cu_seqlens_k, q_start, sinks, alibi_slopes;
  FlashAttentionProblem problem;

  bool packed() const { return cu_seqlens_q.has_value(); }
};

Inputs inputs(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cu_seqlens_q,
              const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& q_start,
              const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi_slopes, bool causal, double scale,
              double softcap, int64_t left, int64_t right, int64_t temperature_len) {
  Inputs in{readable_by_kernel(q), readable_by_kernel(k), readable_by_kernel(v),
            dense(cu_seqlens_q),   dense(cu_seqlens_k),   dense(q_start),
            dense(sinks),          dense(alibi_slopes),   {}};
  const bool packed = cu_seqlens_q.has_value();
  check(packed == cu_seqlens_k.has_value(), "cu_seqlens_q and cu_seqlens_k come together");
  const int64_t dims = packed ? 3 : 4;
  check(q.dim() == dims && k.dim() == dims && v.dim() == dims, "q, k and v must have ", dims, " dims");
  check(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "q, k and v must have one dtype");
  FlashAttentionProblem& p = in.problem;
  p.dtype = native_dtype(q, "q");
  p.queries = q.size(dims - 3);
  p.keys = k.size(dims - 3);
  p.heads = q.size(dims - 2);
  p.kv_heads = k.size(dims - 2);
  p.dim = q.size(dims - 1);
  p.value_dim = v.size(dims - 1);
  check(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "the heads of q must be a multiple of those of k");
  check(p.dim >= 1 && p.value_dim >= 1, "the head dims must be at least 1");
  check(p.queries <= std::numeric_limits<int32_t>::max() / p.heads && p.keys <= std::numeric_limits<int32_t>::max(),
        "the sequences are too long");
  if (packed) {
    check(in.cu_seqlens_q->numel() >= 1, "cu_seqlens_q must have at least one entry");
    p.batch = in.cu_seqlens_q->numel() - 1;
    p.cu_seqlens_q = integers<int32_t>(in.cu_seqlens_q, ScalarType::Int, p.batch + 1, "cu_seqlens_q");
    p.cu_seqlens_k = integers<int32_t>(in.cu_seqlens_k, ScalarType::Int, p.batch + 1, "cu_seqlens_k");
    if constexpr (kHostMemory) {  // a CUDA kernel clamps them
      check_offsets(p.cu_seqlens_q, p.batch, p.queries, "cu_seqlens_q");
      check_offsets(p.cu_seqlens_k, p.batch, p.keys, "cu_seqlens_k");
    }
    check_shape(k, {p.keys, p.kv_heads, p.dim}, "k");
    check_shape(v, {p.keys, p.kv_heads, p.value_dim}, "v");
  } else {
    p.batch = q.size(0);
    check_shape(k, {p.batch, p.keys, p.kv_heads, p.dim}, "k");
    check_shape(v, {p.batch, p.keys, p.kv_heads, p.value_dim}, "v");
  }
  p.q_start = integers<int64_t>(in.q_start, ScalarType::Long, p.batch, "q_start");
  if (in.sinks.has_value()) {
    check_dtype(*in.sinks, ScalarType::Float, "sinks");
    check_shape(*in.sinks, {p.heads}, "sinks");
    p.sinks = data_or_null<float>(in.sinks);
  }
  if (in.alibi_slopes.has_value()) {
    check_dtype(*in.alibi_slopes, ScalarType::Float, "alibi_slopes");
    const bool per_sequence = in.alibi_slopes->dim() == 2;
    check(in.alibi_slopes->numel() == (per_sequence ? p.batch : 1) * p.heads &&
              in.alibi_slopes->size(in.alibi_slopes->dim() - 1) == p.heads,
          "alibi_slopes must have shape (H,) or (B, H)");
    p.alibi_slopes = data_or_null<float>(in.alibi_slopes);
    p.alibi_batch_stride = per_sequence ? p.heads : 0;
  }
  p.q = view(in.q);
  p.k = view(in.k);
  p.v = view(in.v);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.left = left;
  p.right = causal ? 0 : right;
  p.temperature_len = temperature_len;
  return in;
}

Tensor new_lse(const Inputs& in) {
  const FlashAttentionProblem& p = in.problem;
  return in.packed() ? new_tensor({p.heads, p.queries}, ScalarType::Float, in.q)
                     : new_tensor({p.batch, p.heads, p.queries}, ScalarType::Float, in.q);
}

// Rows of a packed tensor that belong to no sequence are zero.
void clear_rows_after(const int32_t* offsets, int64_t batch, const Tensor& x) {
  if (offsets == nullptr || x.numel() == 0) return;
  const int64_t row = x.stride(0) * static_cast<int64_t>(x.element_size());
  std::memset(static_cast<char*>(x.mutable_data_ptr()) + offsets[batch] * row, 0,
              static_cast<size_t>((x.size(0) - offsets[batch]) * row));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& q_start, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& alibi_slopes, bool causal, double scale, double softcap, int64_t left, int64_t right,
    int64_t temperature_len) {
  const Inputs in = inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, q_start, sinks, alibi_slopes, causal, scale, softcap,
                           left, right, temperature_len);
  const FlashAttentionProblem& p = in.problem;
  Tensor o = in.packed() ? new_tensor({p.queries, p.heads, p.value_dim}, q.scalar_type(), q)
                         : new_tensor({p.batch, p.queries, p.heads, p.value_dim}, q.scalar_type(), q);
  Tensor lse = new_lse(in), top = new_lse(in), inv = new_lse(in);
  float* lse_data = static_cast<float*>(lse.mutable_data_ptr());
  float* top_data = static_cast<float*>(top.mutable_data_ptr());
  float* inv_data = static_cast<float*>(inv.mutable_data_ptr());
  if constexpr (kHostMemory) clear_rows_after(p.cu_seqlens_q, p.batch, o);
  if (kHostMemory && in.packed())  // a CUDA kernel writes these rows itself
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t t = p.cu_seqlens_q[p.batch]; t < p.queries; ++t) {
        lse_data[h * p.queries + t] = -std::numeric_limits<float>::infinity();
        top_data[h * p.queries + t] = inv_data[h * p.queries + t] = 0.0f;
      }
  GK_LAUNCH(flash_attention_fwd, q)
  ({.problem = p, .o = o.mutable_data_ptr(), .lse = lse_data, .top = top_data, .inv = inv_data});
  return {o, lse, top, inv};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_bwd(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& o, const Tensor& top, const Tensor& inv, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& q_start, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& alibi_slopes, bool causal, double scale, double softcap, int64_t left, int64_t right,
    int64_t temperature_len) {
  const Inputs in = inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, q_start, sinks, alibi_slopes, causal, scale, softcap,
                           left, right, temperature_len);
  const FlashAttentionProblem& p = in.problem;
  const Tensor dy = readable_by_kernel(dout), y = readable(o), top_in = dense(top), inv_in = dense(inv);
  const std::optional<Tensor> dl = dense(dlse);
  for (const Tensor* t : {&dout, &o}) {
    const char* name = t == &dout ? "dout" : "o";
    check(t->scalar_type() == q.scalar_type(), name, " must have the dtype of q");
    if (in.packed())
      check_shape(*t, {p.queries, p.heads, p.value_dim}, name);
    else
      check_shape(*t, {p.batch, p.queries, p.heads, p.value_dim}, name);
  }
  Tensor delta = new_lse(in);
  for (const Tensor* t : {&top_in, &inv_in}) {
    const char* name = t == &top_in ? "top" : "inv";
    check_dtype(*t, ScalarType::Float, name);
    check(t->numel() == delta.numel(), name, " must have shape (B, H, T) or (H, total_q)");
  }
  if (dl.has_value()) {
    check_dtype(*dl, ScalarType::Float, "dlse");
    check(dl->numel() == delta.numel(), "dlse must have the shape of top");
  }
  Tensor dq = new_like(q);
  Tensor dk = new_like(k);
  Tensor dv = new_like(v);
  Tensor dsinks = new_tensor({in.sinks.has_value() ? p.heads : 0}, ScalarType::Float, q);
  Tensor workspace = new_tensor(
      {kHostMemory ? flash_attention_bwd_workspace(p) : flash_attention_bwd_workspace_cuda(p)}, ScalarType::Float, q);
  if constexpr (kHostMemory) {
    clear_rows_after(p.cu_seqlens_q, p.batch, dq);
    clear_rows_after(p.cu_seqlens_k, p.batch, dk);
    clear_rows_after(p.cu_seqlens_k, p.batch, dv);
  }
  GK_LAUNCH(flash_attention_bwd, q)
  ({.problem = p,
    .o = view(y),
    .dout = view(dy),
    .top = static_cast<const float*>(top_in.const_data_ptr()),
    .inv = static_cast<const float*>(inv_in.const_data_ptr()),
    .dlse = data_or_null<float>(dl),
    .dq = dq.mutable_data_ptr(),
    .dk = dk.mutable_data_ptr(),
    .dv = dv.mutable_data_ptr(),
    .dsinks = in.sinks.has_value() ? static_cast<float*>(dsinks.mutable_data_ptr()) : nullptr,
    .delta = static_cast<float*>(delta.mutable_data_ptr()),
    .workspace = static_cast<float*>(workspace.mutable_data_ptr())});
  return {dq, dk, dv, dsinks};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grokkernels, GK_DISPATCH_KEY, m) {
  m.impl(GK_OVERLOAD("flash_attention_fwd"), TORCH_BOX(&flash_attention_fwd));
  m.impl(GK_OVERLOAD("flash_attention_bwd"), TORCH_BOX(&flash_attention_bwd));
}

}  // namespace grokkernels
