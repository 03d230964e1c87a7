// The Hopper form of the forward pass.
#pragma once

#include "flash_attention.h"

namespace grokkernels {

// Runs it and returns true, or returns false where it cannot: float32, no keys or queries, or strides that the copy
// engine does not take.
bool flash_attention_fwd_sm90(const FlashAttentionFwdParams& params, Stream stream);

}  // namespace grokkernels
