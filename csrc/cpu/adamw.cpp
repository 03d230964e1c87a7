// adamw on the CPU: one pass over the memory of all tensors, 28 bytes per float32 parameter (read and write p, m, v,
// read g) and 22 with 16-bit parameters. Clipping is a factor inside the update: gradients are never written.
//
// Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
#include "adamw.h"

#include "cpu/launch.h"
#include "cpu/loops.h"
#include "cpu/parallel.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {
namespace {

// body(tensor, begin, end, chunk) over the elements of chunks [first, last) of all tensors.
template <typename Tensor, typename Body>
void for_chunks(const Tensor* tensors, int64_t count, int64_t first, int64_t last, const Body& body) {
  int64_t i = 0;
  for (int64_t chunk = first; chunk < last; ++chunk) {
    while (i + 1 < count && tensors[i + 1].first_chunk <= chunk) ++i;
    const int64_t begin = (chunk - tensors[i].first_chunk) * kTensorChunk;
    const int64_t left = tensors[i].numel - begin;
    body(tensors[i], begin, begin + (left < kTensorChunk ? left : kTensorChunk), chunk);
  }
}

// Raises the step counts and says what the update of each tensor needs; false when the norm is not finite.
bool make_steps(const AdamwParams& a) {
  double grad_scale = a.maximize ? -1.0 : 1.0;
  if (a.norm != nullptr) {
    if (!__builtin_isfinite(*a.norm)) return false;
    const double clip = a.max_norm / (*a.norm + 1e-6);
    grad_scale *= clip < 1.0 ? clip : 1.0;
  }
  for (int64_t i = 0; i < a.count; ++i) {
    const float step = *a.tensors[i].step += 1.0f;
    const double correction = 1.0 - __builtin_pow(a.beta2, step);
    a.steps[i] = {static_cast<float>(a.lr / (1.0 - __builtin_pow(a.beta1, step))),
                  static_cast<float>(1.0 / __builtin_sqrt(correction)), static_cast<float>(grad_scale), 1.0f};
  }
  return true;
}

struct Constants {
  vf beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay;
};

template <typename T>
void update(const AdamwTensor& tensor, const AdamwStep& now, int64_t begin, int64_t end, const Constants& k) {
  T* p = static_cast<T*>(tensor.param);
  const T* g = static_cast<const T*>(tensor.grad);
  float* m = tensor.exp_avg;
  float* v = tensor.exp_avg_sq;
  const vf step_size = set1(now.step_size), root_correction = set1(now.root_correction);
  const vf grad_scale = set1(now.grad_scale);

  auto step = [&](vf& param, vf grad, vf& first, vf& second) {
    grad = grad * grad_scale;
    first = fma(k.beta1, first, k.one_minus_beta1 * grad);
    second = fma(k.beta2, second, k.one_minus_beta2 * (grad * grad));
    const vf denominator = fma(sqrt(second), root_correction, k.eps);
    param = fnma(step_size, first / denominator, fnma(k.decay, param, param));
  };
  int64_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    VfPair param = fetch_pair(p + i);
    const VfPair grad = fetch_pair(g + i);
    VfPair first = fetch_pair(m + i), second = fetch_pair(v + i);
    step(param.first, grad.first, first.first, second.first);
    step(param.second, grad.second, first.second, second.second);
    store_pair(p + i, param.first, param.second);
    store_pair(m + i, first.first, first.second);
    store_pair(v + i, second.first, second.second);
  }
  for (; i < end; i += kLanes) {
    const int n = static_cast<int>(end - i < kLanes ? end - i : kLanes);
    vf param = load_n(p + i, n), first = load_n(m + i, n), second = load_n(v + i, n);
    step(param, load_n(g + i, n), first, second);
    store_n(p + i, param, n);
    store_n(m + i, first, n);
    store_n(v + i, second, n);
  }
}

// Four accumulators hide the latency of the fused multiply-add; they end in a double every eight steps, so that the
// roundings of the sum stay below those of the result.
template <typename T>
double sum_of_squares(const T* x, int64_t n) {
  constexpr int64_t kBlock = 32 * kLanes;
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    vf sum[4] = {zero(), zero(), zero(), zero()};
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes)
      for (int u = 0; u < 4; ++u) {
        const vf v = load(x + i + u * kLanes);
        sum[u] = fma(v, v, sum[u]);
      }
    for (; i < end; i += kLanes) {
      const vf v = load_n(x + i, static_cast<int>(end - i < kLanes ? end - i : kLanes));
      sum[0] = fma(v, v, sum[0]);
    }
    total += reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  return total;
}

}  // namespace

void adamw(const AdamwParams& a) {
  if (!make_steps(a)) return;
  const Constants k = {set1(static_cast<float>(a.beta1)), set1(static_cast<float>(1.0 - a.beta1)),
                       set1(static_cast<float>(a.beta2)), set1(static_cast<float>(1.0 - a.beta2)),
                       set1(static_cast<float>(a.eps)),   set1(static_cast<float>(a.lr * a.weight_decay))};
  parallel_range(a.chunks, kTensorChunk * 7, [&](int64_t first, int64_t last) {
    for_chunks(a.tensors, a.count, first, last, [&](const AdamwTensor& tensor, int64_t begin, int64_t end, int64_t) {
      GK_SWITCH_DTYPE(tensor.dtype, T, update<T>(tensor, a.steps[&tensor - a.tensors], begin, end, k));
    });
  });
}

// Squares are summed per chunk, and the chunks in order: the same result with any number of threads.
void global_norm(const GlobalNormParams& a) {
  parallel_range(a.chunks, kTensorChunk, [&](int64_t first, int64_t last) {
    for_chunks(
        a.tensors, a.count, first, last, [&](const NormTensor& tensor, int64_t begin, int64_t end, int64_t chunk) {
          GK_SWITCH_DTYPE(tensor.dtype, T,
                          a.partials[chunk] = sum_of_squares(static_cast<const T*>(tensor.data) + begin, end - begin));
        });
  });
  double total = 0.0;
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) total += a.partials[chunk];
  *a.norm = static_cast<float>(__builtin_sqrt(total));
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(adamw, AdamwParams);
GK_CPU_LAUNCHER(global_norm, GlobalNormParams);
