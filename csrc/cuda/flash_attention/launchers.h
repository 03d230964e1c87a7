// The implementations that launch.cu chooses from.
#pragma once

#include "flash_attention.h"

namespace grokkernels {

void flash_attention_fwd_sm80(const FlashAttentionFwdParams& params, Stream stream);
void flash_attention_bwd_sm80(const FlashAttentionBwdParams& params, Stream stream);

}  // namespace grokkernels
