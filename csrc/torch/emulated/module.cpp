// The Python module grokkernels._C_emulated: loading it registers the CUDA kernels, built for the emulated device,
// under
// `.emulated`; its functions are the device's settings and counters.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <string>

#include "common/tensor_tiles.h"
#include "emulated/runtime/device.h"

namespace py = pybind11;
namespace emulated = grokkernels::emulated;

namespace {

py::dict counters() {
  const emulated::Counters& c = emulated::counters();
  py::dict all;
  all["launches"] = c.launches.load();
  all["blocks"] = c.blocks.load();
  all["switches"] = c.switches.load();
  all["barriers"] = c.barriers.load();
  all["collectives"] = c.collectives.load();
  all["matrix_multiplies"] = c.matrix_multiplies.load();
  all["asynchronous_copies"] = c.asynchronous_copies.load();
  all["shared_matrix_loads"] = c.shared_matrix_loads.load();
  all["bank_conflicts"] = c.bank_conflicts.load();
  return all;
}

void reset_counters() {
  emulated::Counters& c = emulated::counters();
  for (auto* counter : {&c.launches, &c.blocks, &c.switches, &c.barriers, &c.collectives, &c.matrix_multiplies,
                        &c.asynchronous_copies, &c.shared_matrix_loads, &c.bank_conflicts})
    *counter = 0;
}

void set_architecture(int architecture) {
  if (architecture != 80 && architecture != 90)
    throw py::value_error("architecture must be 80 or 90, got " + std::to_string(architecture));
  emulated::settings().architecture = architecture;
}

void set_multiprocessors(int count) {
  if (count < 1) throw py::value_error("count must be 1 or more, got " + std::to_string(count));
  emulated::settings().multiprocessors = count;
}

// Launches go to a Python function (offset of the kernel in this library, grid, block, shared bytes, arguments as
// bytes), and to the device too where that answers True; None: to the device alone.
void set_executor(const py::object& function) {
  if (function.is_none()) {
    emulated::executor() = nullptr;
    return;
  }
  PyObject* callable = function.inc_ref().ptr();  // kept for good: a launch may come from any thread at any time
  emulated::executor() = [callable](const grokkernels::LaunchShape& s, const emulated::KernelCall& call) {
    const py::gil_scoped_acquire gil;
    Dl_info where;
    if (dladdr(call.kernel, &where) == 0) throw std::runtime_error("the kernel's library was not found");
    py::list arguments;
    for (const auto& [data, size] : call.arguments) arguments.append(py::bytes(static_cast<const char*>(data), size));
    const auto offset = static_cast<const char*>(call.kernel) - static_cast<const char*>(where.dli_fbase);
    const py::tuple grid = py::make_tuple(s.grid.x, s.grid.y, s.grid.z);
    const py::tuple block = py::make_tuple(s.block.x, s.block.y, s.block.z);
    return py::reinterpret_borrow<py::function>(callable)(offset, grid, block, s.shared_bytes, arguments)
        .is(py::bool_(true));
  };
}

}  // namespace

PYBIND11_MODULE(_C_emulated, m) {
  m.doc() = "The emulated device of grokkernels: settings and counters. The ops are torch.ops.grokkernels.*.emulated";
  m.attr("compiler") = GK_COMPILER;
  m.def(
      "architectures", [] { return py::make_tuple(80, 90); }, "Compute capabilities that can be emulated, times ten.");
  m.def("architecture", [] { return emulated::settings().architecture; }, "The one in use.");
  m.def("set_architecture", &set_architecture, py::arg("architecture"), "Answer as a chip of this kind: 80 or 90.");
  m.def("set_multiprocessors", &set_multiprocessors, py::arg("count"), "Answer as a chip with so many.");
  m.def("seed", [] { return emulated::settings().seed; }, "The seed in use.");
  m.def(
      "set_seed", [](uint64_t seed) { emulated::settings().seed = seed; }, py::arg("seed"),
      "0: threads in order and copies at their wait; any other: both at random, the same way for the same seed.");
  m.def("set_executor", &set_executor, py::arg("function"),
        "Who is given launches before the device, which runs them too where the answer is True; None: nobody.");
  m.def(
      "take_refusal", [] { return grokkernels::last_tiles_refusal().exchange(nullptr); },
      "Why a tensor map was last refused; None when none was since the last question.");
  m.def("counters", &counters, "What the device has done since the last reset, by name.");
  m.def("reset_counters", &reset_counters, "Start counting anew.");
}
