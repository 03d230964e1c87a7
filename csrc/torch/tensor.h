// What every csrc/torch/<op>.cpp needs: torch's stable tensor, checks that name the argument, and rows.
//
// The contract in grokkernels/ops/<op>.py has refused bad input before a call gets here; the checks in these files
// guard the memory of those who call torch.ops.grokkernels.* directly.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/dtypes.h"

namespace grokkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message << "grokkernels: ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) refuse(parts...);
}

// The sizes of a tensor, spelled only when a message is written.
struct ShapeText {
  const Tensor& tensor;
};

inline ShapeText shape_text(const Tensor& t) { return {t}; }

inline std::ostream& operator<<(std::ostream& out, const ShapeText& shape) {
  out << "(";
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) out << (i ? ", " : "") << shape.tensor.size(i);
  return out << ")";
}

inline DType native_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      check(false, name, " must be float32, bfloat16 or float16");
      __builtin_unreachable();
  }
}

inline void check_dtype(const Tensor& t, ScalarType dtype, const char* name) {
  check(t.scalar_type() == dtype, name, " has a dtype this kernel does not take");
}

inline void check_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == shape.begin()[i];
  if (same) return;
  std::string wanted;
  for (int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  refuse(name, " must have shape (", wanted, "), got ", shape_text(t));
}

// Without content, on the device of `like`. The shim itself: torch::stable::new_empty of 2.10 packs its arguments into
// lists for the dispatcher, which takes more than a microsecond.
inline Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, const Tensor& like) {
  int32_t as_number = static_cast<int32_t>(dtype);
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()),
                                                          &as_number, nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}
inline Tensor new_tensor(std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& like) {
  return new_tensor(torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype, like);
}
// As x, dense.
inline Tensor new_like(const Tensor& x) { return new_tensor(x.sizes(), x.scalar_type(), x); }

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Whether a tensor begins where a vector of 16 bytes may. New ones do; slices of them need not.
inline bool begins_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

// Dense and in whole vectors, for kernels that read a tensor so without asking.
inline Tensor dense_vectors(const Tensor& t) {
  if (t.is_contiguous() && begins_aligned(t)) return t;
  Tensor copy = new_like(t);
  torch::stable::copy_(copy, t);
  return copy;
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(dense(*t)) : std::nullopt;
}

// A tensor (..., C) seen as rows: its data, the rows N, the columns C and the elements from one row to the next.
// Only a tensor whose rows are not evenly spaced or not dense is copied.
struct Rows {
  Tensor tensor;  // keeps the memory alive
  const void* data;
  int64_t rows, cols, stride;
};

inline Rows rows_of(const Tensor& t) {
  check(t.dim() >= 1, "a tensor of at least one dimension is needed");
  const int64_t cols = t.size(t.dim() - 1);
  const int64_t rows = cols == 0 ? 0 : t.numel() / cols;
  if (rows == 0) return {t, t.const_data_ptr(), rows, cols, cols};
  bool even = cols == 1 || t.stride(t.dim() - 1) == 1;
  std::optional<int64_t> stride;  // of the innermost leading dim that has more than one entry; 0 where it is expanded
  int64_t span = 0;               // stride the next leading dim outward must have
  for (int64_t d = t.dim() - 2; d >= 0 && even; --d) {
    if (t.size(d) == 1) continue;
    even = !stride.has_value() || t.stride(d) == span;
    if (!stride.has_value()) stride = t.stride(d);
    span = t.stride(d) * t.size(d);
  }
  if (even) return {t, t.const_data_ptr(), rows, cols, stride.value_or(cols)};
  const Tensor copy = torch::stable::contiguous(t);
  return {copy, copy.const_data_ptr(), rows, cols, cols};
}

template <typename T = void>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

}  // namespace grokkernels
