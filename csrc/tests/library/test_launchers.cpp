// The torch-free library as a C++ program uses it: a launcher at every level this machine has, on a pool of its own.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/runtime/level.h"
#include "cpu/runtime/pool.h"
#include "cpu/runtime/scratch.h"
#include "rms_norm.h"
#include "tests/check.h"

namespace {

using namespace grokkernels;

constexpr int kThreads = 3;
// Two products and the scale itself round once each: four roundings of half an ulp, and one to spare.
constexpr double kAllowed = 5 * 0x1p-24;

// Three threads, each with an equal range: what any program can lend.
const cpu::Pool kPool = {
    [] { return kThreads; },
    [](int64_t n, cpu::RangeFn fn, void* context) {
      std::vector<std::thread> threads;
      for (int t = 0; t < kThreads; ++t)
        threads.emplace_back([=] { fn(n * t / kThreads, n * (t + 1) / kThreads, context); });
      for (std::thread& thread : threads) thread.join();
    },
};

// Largest relative error of one element.
double worst_error(int64_t rows, int64_t cols) {
  std::vector<float> x(rows * cols), weight(cols), y(rows * cols, NAN), rstd(rows, NAN);
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(0.37 * static_cast<double>(i));
  for (int64_t c = 0; c < cols; ++c) weight[c] = 1.0f + 0.001f * static_cast<float>(c);
  rms_norm_fwd_cpu({.dtype = DType::float32,
                    .weight_dtype = DType::float32,
                    .rows = rows,
                    .cols = cols,
                    .x = x.data(),
                    .residual = nullptr,
                    .weight = weight.data(),
                    .y = y.data(),
                    .h = nullptr,
                    .rstd = rstd.data(),
                    .x_stride = cols,
                    .residual_stride = 0,
                    .eps = 1e-5f,
                    .zero_centered = false,
                    .sums = nullptr});
  double worst = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    double squares = 0.0;
    for (int64_t c = 0; c < cols; ++c) squares += double(x[r * cols + c]) * x[r * cols + c];
    const double scale = 1.0 / std::sqrt(squares / static_cast<double>(cols) + 1e-5);
    for (int64_t c = 0; c < cols; ++c) {
      const double expected = x[r * cols + c] * scale * weight[c];
      const double error = std::fabs(y[r * cols + c] - expected) / (std::fabs(expected) + 1e-30);
      worst = error > worst || std::isnan(error) ? error : worst;
    }
  }
  return worst;
}

}  // namespace

int main() {
  for (const bool lent : {false, true}) {
    if (lent) cpu::set_pool(kPool);
    CHECK(cpu::num_threads() == (lent ? kThreads : 1));
    for (int level = 0; level <= cpu::highest_level(); ++level) {
      cpu::set_level(cpu::level_name(level));
      CHECK(cpu::level() == level);
      for (const int64_t cols : {1, 15, 16, 257, 5000}) CHECK(worst_error(67, cols) < kAllowed);
    }
  }

  // A kernel called from inside a region of the pool: nested use.
  std::atomic<int> right{0};
  cpu::run_region(
      kThreads,
      [](int64_t begin, int64_t end, void* raw) {
        for (int64_t i = begin; i < end; ++i) *static_cast<std::atomic<int>*>(raw) += worst_error(67, 257) < kAllowed;
      },
      &right);
  CHECK(right == kThreads);

  bool refused = false;
  try {
    cpu::set_level("avx1024");
  } catch (const std::exception&) {
    refused = true;
  }
  CHECK(refused);

  // A slot keeps its memory while it is large enough, and other slots are other memory.
  void* first = cpu::scratch_bytes(0, 1000);
  CHECK(cpu::scratch_bytes(0, 500) == first);
  CHECK(cpu::scratch_bytes(1, 500) != first);
  CHECK(reinterpret_cast<uintptr_t>(cpu::scratch_bytes(2, 100000)) % 64 == 0);
  return tests::check_result();
}
