// The Python module grokkernels._C: loading it registers the ops (the STABLE_TORCH_LIBRARY_IMPL blocks of the other
// files here) and gives what is not an op: how this library was built, the CPU level, the threads.
#include <pybind11/pybind11.h>

#include <atomic>
#include <string>
#include <vector>

#include "cpu/runtime/level.h"
#include "cpu/runtime/pool.h"
#include "machine_limits.h"

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

// Work for benchmarks to time. Addresses and counts of floats; the caller keeps the memory.
int64_t limit_fma(int64_t rounds) {
  double sink = 0;
  int64_t flops = 0;
  grokkernels::limit_fma_cpu({rounds, &sink, &flops});
  return sink == 0 ? 0 : flops;
}

double limit_read(uintptr_t x, int64_t count) {
  double sink = 0;
  grokkernels::limit_read_cpu({reinterpret_cast<const float*>(x), count, &sink});
  return sink;
}

void limit_copy(uintptr_t x, uintptr_t y, int64_t count) {
  grokkernels::limit_copy_cpu({reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), count});
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
  m.def("limit_fma", &limit_fma, py::arg("rounds"), "Nothing but multiply-adds, on all threads; how many FLOP.");
  m.def("limit_read", &limit_read, py::arg("x"), py::arg("count"), "Sums `count` floats at address x, on all threads.");
  m.def("limit_copy", &limit_copy, py::arg("x"), py::arg("y"), py::arg("count"),
        "Copies `count` floats from address x to y, aligned to 64 bytes, past the caches.");
  m.def("threads_used", &threads_used, "Ranges, one per thread, into which the pool cuts a parallel region.");
}
