// The Python module grokkernels._C_cuda: loading it registers the CUDA kernels; it needs a CUDA torch, and no GPU.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "The CUDA kernels of grokkernels: how they were built. The ops themselves are torch.ops.grokkernels.*";
  m.attr("compiler") = GK_COMPILER;
  m.attr("architectures") = GK_CUDA_ARCHITECTURES;
}
