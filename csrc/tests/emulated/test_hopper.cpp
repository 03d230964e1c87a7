// Hopper's half of the vocabulary on the emulated device: what each instruction does, that mistakes are named, and that
// neither depends on the order in which things happen to run.
#include <cmath>
#include <string>
#include <vector>

#include "emulated/runtime/device.h"
#include "tests/check.h"
#include "tests/emulated/hopper.h"

using namespace grokkernels;
using namespace grokkernels::tests;

namespace {

uint32_t state = 1;
float number() {  // eighths in [-2, 2): products and their sums are exact
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int>(state >> 27) - 16) / 8.0f;
}

uint16_t bits_of(float x, DType dtype) { return dtype == DType::bfloat16 ? to_bfloat16(x).bits : to_float16(x).bits; }

struct Operands {
  std::vector<float> a, b, d, wanted;  // a (64, 64), b (64, cols)
  alignas(128) uint16_t a_bits[64 * 64], b_bits[64 * 128];

  explicit Operands(const ProductParams& p) : a(64 * 64), b(64 * static_cast<size_t>(p.cols)) {
    const size_t cols = static_cast<size_t>(p.cols);
    for (float& x : a) x = number();
    for (float& x : b) x = number();
    d.resize(64 * cols);
    for (float& x : d) x = p.accumulate ? number() : std::nanf("");
    wanted.resize(64 * cols);
    for (size_t i = 0; i < 64; ++i)
      for (size_t j = 0; j < cols; ++j) {
        float sum = p.accumulate ? d[i * cols + j] : 0.0f;
        for (size_t k = 0; k < 64; ++k) sum += a[i * 64 + k] * b[k * cols + j];
        wanted[i * cols + j] = sum;
      }
    for (size_t i = 0; i < 64; ++i)
      for (size_t k = 0; k < 64; ++k)
        a_bits[p.a_transposed ? k * 64 + i : i * 64 + k] = bits_of(a[i * 64 + k], p.dtype);
    for (size_t k = 0; k < 64; ++k)
      for (size_t j = 0; j < cols; ++j)
        b_bits[p.b_transposed ? k * cols + j : j * 64 + k] = bits_of(b[k * cols + j], p.dtype);
  }
};

ProductParams with(ProductParams p, Operands& o) {
  p.a = o.a_bits;
  p.b = o.b_bits;
  p.d = o.d.data();
  return p;
}

void check_product(const ProductParams& p) {
  Operands o(p);
  product(with(p, o), nullptr);
  if (!CHECK(o.d == o.wanted))
    std::printf("  swizzle %d, transposed %d %d, registers %d, %d columns\n", static_cast<int>(p.swizzle),
                p.a_transposed, p.b_transposed, p.a_in_registers, p.cols);
}

void check_products() {
  for (const DType dtype : {DType::bfloat16, DType::float16})
    for (const int cols : {64, 128})
      for (const bool b_transposed : {false, true})
        for (const int a : {0, 1, 2})
          check_product({dtype, Swizzle::bytes_128, a == 1, b_transposed, a == 2, cols == 128, cols, {}, {}, {}});
  check_product({DType::bfloat16, Swizzle::bytes_64, false, true, false, true, 64, {}, {}, {}});
  check_product({DType::float16, Swizzle::bytes_32, true, false, false, false, 64, {}, {}, {}});
  check_product({DType::bfloat16, Swizzle::none, false, true, false, true, 64, {}, {}, {}});
}

std::string words_of(Mistake which) {
  ProductParams p{DType::bfloat16, Swizzle::bytes_128, false, false, false, true, 64, {}, {}, {}};
  Operands o(p);
  try {
    mistake(which, with(p, o), nullptr);
  } catch (const emulated::Error& error) {
    return error.what();
  }
  return o.d == o.wanted ? "right" : std::isnan(o.d[0]) ? "NaN" : "wrong";
}

void check_mistake(Mistake which, const char* words) {
  const std::string found = words_of(which);
  if (!CHECK(found.find(words) != std::string::npos)) std::printf("  %s\n", found.c_str());
}

void check_mistakes() {
  check_mistake(Mistake::none, "right");
  check_mistake(Mistake::expects_more_bytes, "deadlock");
  check_mistake(Mistake::expects_more_bytes,
                "warp 0 waits: lanes 0-31: an mbarrier at offset 16384, parity 0 (pending: 0 arrivals, 16 bytes)");
  check_mistake(Mistake::reads_early, "NaN");
  check_mistake(Mistake::no_fence, "without a wgmma_fence");
  check_mistake(Mistake::lanes_differ, "the lanes of a warp do not agree");
  check_mistake(Mistake::warps_differ, "do not issue the same wgmma");
  check_mistake(Mistake::returns_early, "returns before it has waited for its wgmma");
  check_mistake(Mistake::misaligned, "is not a multiple of 1024");
  check_mistake(Mistake::no_registers, "registers_take waits for ever");
  check_mistake(Mistake::cluster_returns_early, "the block that holds this shared memory has returned");
  check_mistake(Mistake::plain_load_from_cluster, "an address of the block's own shared memory is expected");
  check_mistake(Mistake::no_proxy_fence, "bulk_store: thread 0 wrote shared address 256 by ordinary means");
}

void check_exchange() {
  std::vector<float> x(256), y(256);
  for (float& v : x) v = number();
  exchange(x.data(), y.data(), nullptr);
  for (size_t i = 0; i < 256; ++i) CHECK(y[i] == x[i] + x[(i + 64) % 256] + x[i % 64] + (i < 64 ? 4.0f : 0.0f));
}

void check_copies() {
  constexpr size_t kRows = 21, kCols = 76;
  alignas(16) static float x[kRows * kCols], y[kRows * kCols], sum[kRows * kCols], twice[3 * 3 * 256];
  for (size_t i = 0; i < kRows * kCols; ++i) {
    x[i] = number();
    y[i] = std::nanf("");
    sum[i] = 1.0f;
  }
  copy_boxes({x, y, sum, twice, kRows, kCols}, nullptr);
  for (size_t i = 0; i < kRows * kCols; ++i) {
    const bool twice_more = i / kCols < 8 && i % kCols < 32;  // by the blocks of the multicast
    CHECK(y[i] == x[i] && sum[i] == 1.0f + x[i] * (twice_more ? 3.0f : 1.0f));
  }
  for (size_t box = 0; box < 9; ++box)
    for (size_t i = 0; i < 256; ++i) {
      const size_t place = (i / 4 ^ (i / 32 % 8)) * 4 + i % 4;  // the swizzle of 128 bytes, in floats
      const size_t row = box / 3 * 8 + i / 32, col = box % 3 * 32 + i % 32;
      CHECK(twice[box * 256 + place] == (row < kRows && col < kCols ? 2.0f * x[row * kCols + col] : 0.0f));
    }
}

void check_ring() {
  std::vector<float> x(1024), y(1024);
  for (float& v : x) v = number();
  ring(x.data(), y.data(), 1024, nullptr);
  for (size_t i = 0; i < 1024; ++i) CHECK(y[i] == x[i / 128 * 128 + 127 - i % 128]);
}

void check_refusals() {
  float data[64];
  const auto why = [](TensorTiles t) {
    const char* words = tensor_tiles_refusal(t);
    return std::string(words ? words : "");
  };
  TensorTiles good{DType::float32,
                   reinterpret_cast<char*>(data) + (16 - reinterpret_cast<uintptr_t>(data) % 16) % 16,
                   2,
                   {8, 4},
                   {1, 8},
                   {8, 4},
                   Swizzle::none};
  CHECK(why(good).empty());
  TensorTiles bad = good;
  bad.data = static_cast<const char*>(good.data) + 4;
  CHECK(why(bad) == "the tensor does not start at a multiple of 16 bytes");
  bad = good;
  bad.stride[1] = 9;
  CHECK(why(bad) == "the tensor's strides are not multiples of 16 bytes");
  bad.size[1] = 1;
  CHECK(why(bad).empty());
  bad = good;
  bad.box[0] = 5;
  CHECK(why(bad) == "a box's rows are not multiples of 16 bytes");
  bad = good;
  bad.swizzle = Swizzle::bytes_64;
  CHECK(why(bad) == "a box's rows are not as long as its swizzle");
  bad = good;
  bad.box[1] = 257;
  CHECK(why(bad) == "a box has 1 to 256 elements in every dimension");
}

}  // namespace

int main() {
  emulated::settings().architecture = 90;
  check_refusals();
  for (uint64_t seed = 0; seed < 12; ++seed) {
    emulated::settings().seed = seed;
    check_products();
#if !defined(__SANITIZE_THREAD__)  // to it, the threads of a launch that was stopped race with what comes after
    check_mistakes();
#endif
    check_exchange();
    check_copies();
    check_ring();
  }
  return check_result();
}
