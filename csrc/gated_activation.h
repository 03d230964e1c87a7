// gated_activation: act(gate) * up, element by element.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/device.h"
#include "common/dtypes.h"

namespace grokkernels {

struct GatedActivationFwdParams {
  DType dtype;
  Activation kind;
  int64_t rows, cols;
  const void* gate;  // (rows, cols), rows gate_stride elements apart
  const void* up;    // (rows, cols), rows up_stride elements apart
  void* y;           // (rows, cols)
  int64_t gate_stride, up_stride;
};

struct GatedActivationBwdParams {
  DType dtype;
  Activation kind;
  int64_t rows, cols;
  const void* dy;  // each (rows, cols) with its stride between rows
  const void* gate;
  const void* up;
  void* dgate;  // (rows, cols)
  void* dup;    // (rows, cols)
  int64_t dy_stride, gate_stride, up_stride;
};

void gated_activation_fwd_cpu(const GatedActivationFwdParams& params);
void gated_activation_bwd_cpu(const GatedActivationBwdParams& params);
void gated_activation_fwd_cuda(const GatedActivationFwdParams& params, Stream stream);
void gated_activation_bwd_cuda(const GatedActivationBwdParams& params, Stream stream);

}  // namespace grokkernels
