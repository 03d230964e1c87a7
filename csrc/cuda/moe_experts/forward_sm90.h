// The first half of moe_experts on Hopper's own instructions: csrc/cuda/moe_experts/forward_sm90.cu.
#pragma once

#include "moe_experts.h"

namespace grokkernels {

// hidden, and gate and up where they are kept, from x, token_of and offsets. False, and nothing is done, where the copy
// engine cannot take the operands as they lie.
bool moe_experts_gate_up_sm90(const MoeExpertsFwdParams& params, Stream stream);

}  // namespace grokkernels
