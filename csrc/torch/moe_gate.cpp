// moe_gate: from torch tensors to the launchers. Schemas: grokkernels/ops/moe_gate.py.
#include "moe_gate.h"

#include "torch/column.h"

namespace grokkernels {
namespace {

// The options as the schema spells them, beside the logits.
struct Spelled {
  int64_t top_k;
  bool sigmoid;
  double softcap;
  bool renormalize;
  double routed_scale;
  bool topk_first;
  double jitter;
  int64_t seed;
};

MoeGateOptions options(const Rows& logits, const Spelled& o) {
  check(logits.cols >= 1 && o.top_k >= 1 && o.top_k <= logits.cols, "top_k must be from 1 to the number of experts");
  check(kHostMemory || logits.cols <= kMoeGateMostExperts, "there may be ", kMoeGateMostExperts,
        " experts at most, got ", logits.cols);
  return {.dtype = native_dtype(logits.tensor, "logits"),
          .tokens = logits.rows,
          .experts = logits.cols,
          .top_k = o.top_k,
          .logits = logits.data,
          .logits_stride = logits.stride,
          .softcap = static_cast<float>(o.softcap),
          .jitter = static_cast<float>(o.jitter),
          .seed = static_cast<uint64_t>(o.seed),
          .routed_scale = static_cast<float>(o.routed_scale),
          .sigmoid = o.sigmoid,
          .topk_first = o.topk_first,
          .renormalize = o.renormalize};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_gate_fwd(const Tensor& logits, const std::optional<Tensor>& bias,
                                                                int64_t num_groups, int64_t topk_groups, int64_t top_k,
                                                                bool sigmoid, double softcap, bool renormalize,
                                                                double routed_scale, bool topk_first, double jitter,
                                                                int64_t seed) {
  const Rows rows = rows_of(logits);
  const MoeGateOptions gate =
      options(rows, {top_k, sigmoid, softcap, renormalize, routed_scale, topk_first, jitter, seed});
  check(num_groups >= 1 && gate.experts % num_groups == 0, "num_groups must divide the number of experts");
  check(topk_groups >= 1 && topk_groups <= num_groups, "topk_groups must be from 1 to num_groups");
  const std::optional<Tensor> b = dense(bias);
  if (b.has_value()) {
    check_dtype(*b, ScalarType::Float, "bias");
    check_shape(*b, {gate.experts}, "bias");
  }
  Tensor weights = new_tensor({gate.tokens, top_k}, ScalarType::Float, logits);
  Tensor indices = new_tensor({gate.tokens, top_k}, ScalarType::Int, logits);
  Tensor counts = new_tensor({gate.experts}, ScalarType::Int, logits);
  Tensor load_balance_loss = new_tensor({}, ScalarType::Float, logits);
  Tensor z_loss = new_tensor({}, ScalarType::Float, logits);
  const int64_t blocks = kHostMemory ? 0 : moe_gate_blocks(gate.tokens, gate.experts);
  const Workspace shares(blocks * gate.experts, ScalarType::Float, logits);
  const Workspace block_counts(blocks * gate.experts, ScalarType::Int, logits);
  const Workspace sums(2 * blocks + gate.experts, ScalarType::Double, logits), ticket(1, ScalarType::Int, logits);
  GK_LAUNCH(moe_gate_fwd, logits)
  ({.gate = gate,
    .bias = data_or_null<float>(b),
    .num_groups = num_groups,
    .topk_groups = topk_groups,
    .weights = static_cast<float*>(weights.mutable_data_ptr()),
    .indices = static_cast<int32_t*>(indices.mutable_data_ptr()),
    .counts = static_cast<int32_t*>(counts.mutable_data_ptr()),
    .load_balance_loss = static_cast<float*>(load_balance_loss.mutable_data_ptr()),
    .z_loss = static_cast<float*>(z_loss.mutable_data_ptr()),
    .work = {.shares = shares.data<float>(),
             .counts = block_counts.data<int32_t>(),
             .sums = sums.data<double>(),
             .ticket = ticket.data<int32_t>()}});
  return {weights, indices, counts, load_balance_loss, z_loss};
}

Tensor moe_gate_bwd(const std::optional<Tensor>& dweights, const std::optional<Tensor>& dload_balance_loss,
                    const std::optional<Tensor>& dz_loss, const Tensor& logits, const Tensor& indices,
                    const Tensor& counts, int64_t top_k, bool sigmoid, double softcap, bool renormalize,
                    double routed_scale, bool topk_first, double jitter, int64_t seed) {
  const Rows rows = rows_of(logits);
  const MoeGateOptions gate =
      options(rows, {top_k, sigmoid, softcap, renormalize, routed_scale, topk_first, jitter, seed});
  const Tensor i = dense(indices), c = dense(counts);
  check_dtype(i, ScalarType::Int, "indices");
  check_shape(i, {gate.tokens, top_k}, "indices");
  check_dtype(c, ScalarType::Int, "counts");
  check_shape(c, {gate.experts}, "counts");
  const std::optional<Tensor> dw = dense(dweights);
  if (dw.has_value()) {
    check_dtype(*dw, ScalarType::Float, "dweights");
    check_shape(*dw, {gate.tokens, top_k}, "dweights");
  }
  if (dload_balance_loss.has_value()) {
    check_dtype(*dload_balance_loss, ScalarType::Float, "dload_balance_loss");
    check_shape(*dload_balance_loss, {}, "dload_balance_loss");
  }
  if (dz_loss.has_value()) {
    check_dtype(*dz_loss, ScalarType::Float, "dz_loss");
    check_shape(*dz_loss, {}, "dz_loss");
  }
  Tensor dlogits = new_like(logits);
  GK_LAUNCH(moe_gate_bwd, logits)
  ({.gate = gate,
    .dweights = data_or_null<float>(dw),
    .dload_balance_loss = data_or_null<float>(dload_balance_loss),
    .dz_loss = data_or_null<float>(dz_loss),
    .indices = static_cast<const int32_t*>(i.const_data_ptr()),
    .counts = static_cast<const int32_t*>(c.const_data_ptr()),
    .dlogits = dlogits.mutable_data_ptr()});
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grokkernels, GK_DISPATCH_KEY, m) {
  m.impl(GK_OVERLOAD("moe_gate_fwd"), TORCH_BOX(&moe_gate_fwd));
  m.impl(GK_OVERLOAD("moe_gate_bwd"), TORCH_BOX(&moe_gate_bwd));
}

}  // namespace grokkernels
