// The activations of gated units, in the order in which contracts number them.
#pragma once

namespace grokkernels {

enum class Activation : int { gelu_tanh, gelu, silu, relu };

}  // namespace grokkernels
