// grouped_mm on Hopper's own instructions: csrc/cuda/grouped_mm/grouped_mm_sm90.cu.
#pragma once

#include "grouped_mm.h"

namespace grokkernels {

// False, and nothing is done, where the copy engine cannot take the operands as they lie: float32, rows that are not
// 16-byte aligned, nothing to multiply.
bool grouped_mm_sm90(const GroupedMmParams& params, Stream stream);
// The same with y in float32, for w that is dense along its K.
bool grouped_mm_float_sm90(const GroupedMmParams& params, Stream stream);
bool grouped_mm_wgrad_sm90(const GroupedMmWgradParams& params, Stream stream);

}  // namespace grokkernels
