// adamw: one step of Adam with decoupled weight decay over many tensors; global_norm: the norm of many tensors as one
// vector. 28 bytes per float32 parameter (read and write p, m, v, read g), 22 with 16-bit parameters; 4 or 2 for the
// norm. Clipping is a factor inside the update: gradients are never written.
//
// A block takes a chunk of kTensorChunk elements. The tables of tensors travel in the kernels' parameters, 64 tensors
// to a launch, so nothing is copied to the device beforehand and a captured graph holds all it needs. The host learns
// nothing: adamw_steps_kernel reads the norm, decides whether there is a step, raises the step counts, each of which
// belongs to one tensor, and leaves what an update needs of them; the updates that follow it in the stream read that.
//
// Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
#include "adamw.h"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace grokkernels {
namespace {

using namespace device;

constexpr int kThreads = 256, kReduceThreads = 1024;
constexpr int kBatch = 64, kStepBatch = 384;  // tensors of a launch
constexpr size_t kParameterBytes = 4096;      // what every device takes

struct StepBatch {
  float* step[kStepBatch];
  AdamwStep* steps;  // of this batch
  int count;
  const float* norm;
  double max_norm, sign, lr, beta1, beta2;
};
static_assert(sizeof(StepBatch) <= kParameterBytes);

// base^exponent of a count, by squaring: pow would be a call.
GK_DEVICE double power(double base, int exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent /= 2, base *= base)
    if (exponent % 2 != 0) result *= base;
  return result;
}

// A thread per tensor.
__global__ void __launch_bounds__(kThreads) adamw_steps_kernel(const __grid_constant__ StepBatch batch) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= batch.count) return;
  AdamwStep now{};
  const float norm = batch.norm != nullptr ? *batch.norm : 0.0f;
  if (fabsf(norm) <= __FLT_MAX__) {
    const float step = *batch.step[i] + 1.0f;
    *batch.step[i] = step;
    const double clip = batch.norm != nullptr ? batch.max_norm / (norm + 1e-6) : 1.0;
    const int made = static_cast<int>(fminf(step, 1e9f));
    now.step_size = static_cast<float>(batch.lr / (1.0 - power(batch.beta1, made)));
    now.root_correction = static_cast<float>(1.0 / sqrt(1.0 - power(batch.beta2, made)));
    now.grad_scale = static_cast<float>(batch.sign * (clip < 1.0 ? clip : 1.0));
    now.live = 1.0f;
  }
  batch.steps[i] = now;
}

// Tensors of one dtype, whose chunks are the blocks of a launch; `first_block` is their place among them.
template <typename Tensor>
struct Batch {
  Tensor tensor[kBatch];
  unsigned first_block[kBatch];
  int count = 0;
  unsigned blocks = 0;
};

struct UpdateTensor {
  int64_t numel;
  void* param;
  const void* grad;
  float *exp_avg, *exp_avg_sq;
  const AdamwStep* now;
};

struct SquareTensor {
  int64_t numel;
  const void* data;
  double* partials;  // one number for each of its chunks
};

struct Constants {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay;
};
static_assert(sizeof(Batch<UpdateTensor>) + sizeof(Constants) <= kParameterBytes);

// Which tensor this block belongs to, and which of its chunks the block is.
struct Chunk {
  int tensor;
  int64_t index, begin;
  int count;  // elements, from `begin`
};

template <typename Tensor>
GK_DEVICE Chunk chunk_of_block(const Batch<Tensor>& batch) {
  int low = 0, high = batch.count;  // first_block[low] <= blockIdx.x < first_block[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.first_block[middle] <= blockIdx.x)
      low = middle;
    else
      high = middle;
  }
  const int64_t index = blockIdx.x - batch.first_block[low], begin = index * kTensorChunk;
  const int64_t left = batch.tensor[low].numel - begin;
  return {low, index, begin, static_cast<int>(left < kTensorChunk ? left : kTensorChunk)};
}

GK_DEVICE bool is_aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Four neighbours: 16 bytes of the moments, and 8 of a 16-bit parameter, so that the lanes of a warp touch whole lines
// of either.
GK_DEVICE void load_four(const float* p, float (&x)[4]) { load_vector(p, x); }
GK_DEVICE void store_four(float* p, const float (&x)[4]) { store_vector(p, x); }

template <typename T>
GK_DEVICE void load_four(const T* p, float (&x)[4]) {
  const Words2 words = load_8(p);
  widen_pair<T>(words.word[0], x[0], x[1]);
  widen_pair<T>(words.word[1], x[2], x[3]);
}

template <typename T>
GK_DEVICE void store_four(T* p, const float (&x)[4]) {
  store_8(p, {{narrow_pair<T>(x[0], x[1]), narrow_pair<T>(x[2], x[3])}});
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    adamw_update_kernel(const __grid_constant__ Batch<UpdateTensor> batch, const __grid_constant__ Constants k) {
  const Chunk chunk = chunk_of_block(batch);
  const UpdateTensor& tensor = batch.tensor[chunk.tensor];
  const AdamwStep now = *tensor.now;
  if (now.live == 0.0f) return;
  T* p = static_cast<T*>(tensor.param) + chunk.begin;
  const T* g = static_cast<const T*>(tensor.grad) + chunk.begin;
  float* m = tensor.exp_avg + chunk.begin;
  float* v = tensor.exp_avg_sq + chunk.begin;

  auto step = [&](float& param, float grad, float& first, float& second) {
    grad *= now.grad_scale;
    first = fmaf(k.beta1, first, k.one_minus_beta1 * grad);
    second = fmaf(k.beta2, second, k.one_minus_beta2 * (grad * grad));
    const float denominator = fmaf(sqrtf(second), now.root_correction, k.eps);
    param = fmaf(-now.step_size, first / denominator, fmaf(-k.decay, param, param));
  };
  const bool aligned =
      is_aligned(p, 4 * sizeof(T)) && is_aligned(g, 4 * sizeof(T)) && is_aligned(m, 16) && is_aligned(v, 16);
  const int fours = aligned ? chunk.count / 4 : 0;
  for (int i = 4 * static_cast<int>(threadIdx.x); i < 4 * fours; i += 4 * kThreads) {
    float param[4], grad[4], first[4], second[4];
    load_four(p + i, param);
    load_four(g + i, grad);
    load_four(m + i, first);
    load_four(v + i, second);
#pragma unroll
    for (int j = 0; j < 4; ++j) step(param[j], grad[j], first[j], second[j]);
    store_four(p + i, param);
    store_vector_streaming(m + i, first);
    store_vector_streaming(v + i, second);
  }
  for (int i = 4 * fours + static_cast<int>(threadIdx.x); i < chunk.count; i += kThreads) {
    float param = widen(p[i]), first = m[i], second = v[i];
    step(param, widen(g[i]), first, second);
    p[i] = narrow<T>(param);
    m[i] = first;
    v[i] = second;
  }
}

// Squares are summed in float by a thread, at most eight to an accumulator, and in double from there on.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    global_norm_chunks_kernel(const __grid_constant__ Batch<SquareTensor> batch) {
  const Chunk chunk = chunk_of_block(batch);
  const SquareTensor& tensor = batch.tensor[chunk.tensor];
  const T* x = static_cast<const T*>(tensor.data) + chunk.begin;
  const bool aligned = is_aligned(x, 16);
  constexpr int kStride = kThreads * kVector<T>;
  float sum[kVector<T>] = {};
#pragma unroll
  for (int v = 0; v < kTensorChunk / kStride; ++v) {
    const int i = v * kStride + static_cast<int>(threadIdx.x) * kVector<T>;
    float element[kVector<T>];
    if (aligned && i + kVector<T> <= chunk.count)
      load_vector_streaming(x + i, element);
    else
      load_elements(x + i, chunk.count - i, element);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) sum[j] = fmaf(element[j], element[j], sum[j]);
  }
  double total = 0.0;
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) total += sum[j];
  total = block_sum<kThreads>(total, reinterpret_cast<double*>(dynamic_shared()));
  if (threadIdx.x == 0) tensor.partials[chunk.index] = total;
}

// One block.
__global__ void __launch_bounds__(kReduceThreads)
    global_norm_reduce_kernel(const double* partials, int64_t chunks, float* norm) {
  double total = 0.0;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kReduceThreads) total += partials[chunk];
  total = block_sum<kReduceThreads>(total, reinterpret_cast<double*>(dynamic_shared()));
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(total));
}

// Calls run(batch) for the tensors of this dtype, as many at a time as a batch holds; entry(i) is what it says of one.
template <typename Tensor, typename Source, typename Entry, typename Run>
void for_batches(DType dtype, const Source* tensors, int64_t count, const Entry& entry, const Run& run) {
  Batch<Tensor> batch{};
  for (int64_t i = 0; i < count; ++i) {
    if (tensors[i].dtype != dtype || tensors[i].numel == 0) continue;
    batch.tensor[batch.count] = entry(i);
    batch.first_block[batch.count++] = batch.blocks;
    batch.blocks += static_cast<unsigned>((tensors[i].numel + kTensorChunk - 1) / kTensorChunk);
    if (batch.count == kBatch) {
      run(batch);
      batch = {};
    }
  }
  if (batch.count > 0) run(batch);
}

constexpr DType kDtypes[] = {DType::float32, DType::bfloat16, DType::float16};

}  // namespace

void adamw_cuda(const AdamwParams& a, Stream stream) {
  for (int64_t begin = 0; begin < a.count; begin += kStepBatch) {
    StepBatch batch{.steps = a.steps + begin,
                    .count = static_cast<int>(a.count - begin < kStepBatch ? a.count - begin : kStepBatch),
                    .norm = a.norm,
                    .max_norm = a.max_norm,
                    .sign = a.maximize ? -1.0 : 1.0,
                    .lr = a.lr,
                    .beta1 = a.beta1,
                    .beta2 = a.beta2};
    for (int i = 0; i < batch.count; ++i) batch.step[i] = a.tensors[begin + i].step;
    launch(adamw_steps_kernel,
           {.grid = {static_cast<unsigned>((batch.count + kThreads - 1) / kThreads)}, .block = {kThreads}}, stream,
           batch);
  }
  const Constants k = {static_cast<float>(a.beta1), static_cast<float>(1.0 - a.beta1),
                       static_cast<float>(a.beta2), static_cast<float>(1.0 - a.beta2),
                       static_cast<float>(a.eps),   static_cast<float>(a.lr * a.weight_decay)};
  for (const DType dtype : kDtypes)
    for_batches<UpdateTensor>(
        dtype, a.tensors, a.count,
        [&](int64_t i) -> UpdateTensor {
          const AdamwTensor& t = a.tensors[i];
          return {t.numel, t.param, t.grad, t.exp_avg, t.exp_avg_sq, a.steps + i};
        },
        [&](const Batch<UpdateTensor>& batch) {
          GK_SWITCH_DTYPE(
              dtype, T,
              launch(adamw_update_kernel<T>, {.grid = {batch.blocks}, .block = {kThreads}}, stream, batch, k));
        });
}

void global_norm_cuda(const GlobalNormParams& a, Stream stream) {
  for (const DType dtype : kDtypes)
    for_batches<SquareTensor>(
        dtype, a.tensors, a.count,
        [&](int64_t i) -> SquareTensor {
          return {a.tensors[i].numel, a.tensors[i].data, a.partials + a.tensors[i].first_chunk};
        },
        [&](const Batch<SquareTensor>& batch) {
          GK_SWITCH_DTYPE(
              dtype, T,
              launch(global_norm_chunks_kernel<T>,
                     {.grid = {batch.blocks}, .block = {kThreads}, .shared_bytes = kThreads / 32 * 8}, stream, batch));
        });
  launch(global_norm_reduce_kernel, {.block = {kReduceThreads}, .shared_bytes = kReduceThreads / 32 * 8}, stream,
         a.partials, a.chunks, a.norm);
}

}  // namespace grokkernels
