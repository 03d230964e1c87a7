// The matrix products of moe_experts' backward pass on Hopper's own instructions: backward_sm90.cu. Each returns false,
// and does nothing, where the copy engine cannot take the operands as they lie.
#pragma once

#include "moe_experts.h"

namespace grokkernels {

// dgate, dup, scaled_hidden and dots from dy, gate, up, token_of and weight_of.
bool moe_experts_dhidden_sm90(const MoeExpertsBwdParams& params, Stream stream);
// dx_rows from dgate and dup.
bool moe_experts_dx_sm90(const MoeExpertsBwdParams& params, Stream stream);
// dgate_proj, dup_proj and ddown_proj.
bool moe_experts_wgrad_sm90(const MoeExpertsBwdParams& params, Stream stream);

}  // namespace grokkernels
