"""Plain PyTorch, one file per op: together these files are the mathematics, and the oracle for every other backend.

Every differentiable function here is differentiated by PyTorch's autograd and works in float64. Statistics, softmaxes
and accumulations are float32 (float64 for float64 input); results come back in the input's dtype.
"""
