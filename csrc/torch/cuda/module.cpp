// The Python module grokkernels._C_cuda: loading it registers the CUDA kernels; it needs a CUDA torch, and no GPU.
#include <cxxabi.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "common/launch_watch.h"
#include "common/tensor_tiles.h"

namespace py = pybind11;

namespace {

std::string demangled(const char* name) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> words(abi::__cxa_demangle(name, nullptr, nullptr, &status),
                                                          std::free);
  return status == 0 ? words.get() : name;
}

// Each launch is told to a Python function (name of the kernel, grid, block, shared bytes) and made where that answers
// True; None: every launch is made.
void set_watch(const py::object& function) {
  if (function.is_none()) {
    grokkernels::launch_watch() = nullptr;
    return;
  }
  PyObject* callable = function.inc_ref().ptr();  // kept for good: a launch may come from any thread at any time
  grokkernels::launch_watch() = [callable](const char* kernel, const grokkernels::LaunchShape& s) {
    const py::gil_scoped_acquire gil;
    const py::tuple grid = py::make_tuple(s.grid.x, s.grid.y, s.grid.z);
    const py::tuple block = py::make_tuple(s.block.x, s.block.y, s.block.z);
    return py::reinterpret_borrow<py::function>(callable)(demangled(kernel), grid, block, s.shared_bytes)
        .is(py::bool_(true));
  };
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() =
      "The CUDA kernels of grokkernels: how they were built, and who looks on. The ops are torch.ops.grokkernels.*";
  m.attr("compiler") = GK_COMPILER;
  m.attr("architectures") = GK_CUDA_ARCHITECTURES;
  m.def("set_watch", &set_watch, py::arg("function"),
        "Who is told of each launch, and answers whether it is made; None: nobody, and all are.");
  m.def(
      "take_refusal", [] { return grokkernels::last_tiles_refusal().exchange(nullptr); },
      "Why a tensor map was last refused; None when none was since the last question.");
}
