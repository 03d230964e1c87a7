// flash_attention on CUDA: the launchers, which pick the kernels for the device's architecture.
#include <device/core.cuh>

#include "cuda/flash_attention/launchers.h"

namespace grokkernels {

void flash_attention_fwd_cuda(const FlashAttentionFwdParams& params, Stream stream) {
  if (device::device_architecture() / 10 == 9 && flash_attention_fwd_sm90(params, stream)) return;
  flash_attention_fwd_sm80(params, stream);
}

void flash_attention_bwd_cuda(const FlashAttentionBwdParams& params, Stream stream) {
  flash_attention_bwd_sm80(params, stream);
}

}  // namespace grokkernels
