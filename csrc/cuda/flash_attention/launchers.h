// The implementations that launch.cu chooses from.
#pragma once

#include "flash_attention.h"

namespace grokkernels {

void flash_attention_fwd_sm80(const FlashAttentionFwdParams& params, Stream stream);
void flash_attention_bwd_sm80(const FlashAttentionBwdParams& params, Stream stream);

// Hopper's: true, or false and nothing done where they cannot run: float32, nothing to do, strides that the copy engine
// does not take; the backward also head dims above 128, sinks and general scores.
bool flash_attention_fwd_sm90(const FlashAttentionFwdParams& params, Stream stream);
// dq, dk and dv, from delta.
bool flash_attention_bwd_gradients_sm90(const FlashAttentionBwdParams& params, Stream stream);

}  // namespace grokkernels
