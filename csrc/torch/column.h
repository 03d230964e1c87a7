// Which column of the grid this file is compiled for. csrc/torch/<op>.cpp is the same for all of them and is compiled
// once for each: into grokkernels._C for the CPU kernels, into _C_cuda for the CUDA ones, and into _C_emulated for the
// CUDA ones on the emulated device. setup.py defines one of GK_COLUMN_CPU, GK_COLUMN_CUDA and GK_COLUMN_EMULATED.
//
//   GK_LAUNCH(rms_norm_fwd, x)({...})         rms_norm_fwd_cpu(params), or rms_norm_fwd_cuda(params, the stream of x)
//   STABLE_TORCH_LIBRARY_IMPL(grokkernels, GK_DISPATCH_KEY, m) { m.impl(GK_OVERLOAD("rms_norm_fwd"), ...); }
//   kHostMemory                               whether this code may read what tensors hold (CUDA's lies on the device,
//                                             and the emulated column keeps to what CUDA can do)
#pragma once

#include "common/device.h"
#include "torch/tensor.h"

#if defined(GK_COLUMN_CPU)
#define GK_DISPATCH_KEY CPU
#define GK_OVERLOAD(name) name ".native"
#define GK_LAUNCH(name, tensor) name##_cpu
#elif defined(GK_COLUMN_EMULATED)
#define GK_DISPATCH_KEY CPU
#define GK_OVERLOAD(name) name ".emulated"
#define GK_LAUNCH(name, tensor) ::grokkernels::OnStream(name##_cuda, tensor)
#elif defined(GK_COLUMN_CUDA)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#define GK_DISPATCH_KEY CUDA
#define GK_OVERLOAD(name) name ".native"
#define GK_LAUNCH(name, tensor) ::grokkernels::OnStream(name##_cuda, tensor)
#else
#error "define GK_COLUMN_CPU, GK_COLUMN_CUDA or GK_COLUMN_EMULATED"
#endif

namespace grokkernels {

#if defined(GK_COLUMN_CPU)
inline constexpr bool kHostMemory = true;
#else
inline constexpr bool kHostMemory = false;
#endif

// Memory that a kernel of the CUDA column works in. The CPU's have scratch of their own and get none, not
// even an empty tensor.
class Workspace {
 public:
  Workspace(int64_t count, ScalarType dtype, const Tensor& like) {
    if (!kHostMemory && count > 0) tensor_ = new_tensor({count}, dtype, like);
  }
  template <typename T>
  T* data() const {
    return tensor_.has_value() ? static_cast<T*>(tensor_->mutable_data_ptr()) : nullptr;
  }

 private:
  std::optional<Tensor> tensor_;
};

#if !defined(GK_COLUMN_CPU)

#if defined(GK_COLUMN_CUDA)
// Makes the tensor's device the current one, and names its current stream.
class DeviceOf {
 public:
  explicit DeviceOf(const Tensor& t) : index_(t.get_device()) {
    if (aoti_torch_create_cuda_guard(index_, &guard_) != AOTI_TORCH_SUCCESS)
      throw std::runtime_error("grokkernels: the tensor's device cannot be made the current one");
  }
  ~DeviceOf() { aoti_torch_delete_cuda_guard(guard_); }
  DeviceOf(const DeviceOf&) = delete;
  DeviceOf& operator=(const DeviceOf&) = delete;

  Stream stream() const {
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(index_, &stream) == AOTI_TORCH_SUCCESS, "the device has no stream");
    return stream;
  }

 private:
  int32_t index_;
  CUDAGuardHandle guard_ = nullptr;
};
#else
struct DeviceOf {
  explicit DeviceOf(const Tensor&) {}
  Stream stream() const { return nullptr; }
};
#endif

// A launcher with the device and the stream it is to run on.
template <typename Params>
class OnStream {
 public:
  OnStream(void (*launcher)(const Params&, Stream), const Tensor& t) : launcher_(launcher), device_(t) {}
  void operator()(const Params& params) const { launcher_(params, device_.stream()); }

 private:
  void (*launcher_)(const Params&, Stream);
  DeviceOf device_;
};
#endif

}  // namespace grokkernels
