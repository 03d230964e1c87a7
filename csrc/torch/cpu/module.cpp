// The Python module grokkernels._C: loading it registers the ops (the STABLE_TORCH_LIBRARY_IMPL blocks of the other
// files here) and gives what is not an op: how this library was built, the CPU level, the threads.
#include <pybind11/pybind11.h>

#include <atomic>
#include <string>
#include <vector>

#include "cpu/runtime/level.h"
#include "cpu/runtime/pool.h"

namespace py = pybind11;
namespace cpu = grokkernels::cpu;

namespace {

py::list cpu_levels() {
  py::list names;
  for (int level = 0; level <= cpu::highest_level(); ++level) names.append(cpu::level_name(level));
  return names;
}

// Into how many ranges, one per thread, the pool cuts a region: 1 where threading is off.
int threads_used() {
  struct Context {
    std::atomic<int> ranges{0};
  } context;
  cpu::run_region(
      cpu::num_threads(), [](int64_t, int64_t, void* raw) { ++static_cast<Context*>(raw)->ranges; }, &context);
  return context.ranges;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of grokkernels: facts and settings. The ops themselves are torch.ops.grokkernels.*";
  m.attr("compiler") = GK_COMPILER;
  m.attr("torch_target") = GK_TORCH_TARGET;
  m.attr("torch_built_with") = GK_TORCH_BUILT_WITH;
  m.def("cpu_levels", &cpu_levels, "Names of the CPU levels this machine can run, lowest first.");
  m.def("cpu_level", [] { return std::string(cpu::level_name(cpu::level())); }, "Name of the CPU level in use.");
  m.def(
      "set_cpu_level", [](const std::string& name) { cpu::set_level(name.c_str()); }, py::arg("name"),
      "Use this CPU level from now on. ValueError when the machine does not have it.");
  m.def("num_threads", &cpu::num_threads, "Threads the kernels may use now.");
  m.def("threads_used", &threads_used, "Ranges, one per thread, into which the pool cuts a parallel region.");
}
