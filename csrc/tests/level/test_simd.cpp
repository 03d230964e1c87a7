// csrc/cpu/simd.h and simd_math.h against double precision, at the level this file is compiled for:
// CMakeLists.txt builds it once per level.
//
// Exits with 0 when everything holds, 1 when a check failed, 77 when this machine lacks the level's instructions.
// Buffers end where their data ends, so -fsanitize=address sees any access beyond a tail.
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/runtime/level.h"
#include "cpu/simd_math.h"
#include "tests/check.h"

#define GK_STRING_(x) #x
#define GK_STRING(x) GK_STRING_(x)

namespace cpu = grokkernels::cpu;
using cpu::kLanes;
using cpu::vf;
using cpu::vi;
using grokkernels::bfloat16;
using grokkernels::float16;
using grokkernels::float_bits;
using grokkernels::float_from_bits;
using grokkernels::to_float;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int kRandom = 1 << 20;

uint64_t random_state = 0x9e3779b97f4a7c15u;
uint32_t random_bits() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<uint32_t>((random_state * 0x2545f4914f6cdd1du) >> 32);
}
float uniform(float low, float high) {
  return low + (high - low) * (static_cast<float>(random_bits() >> 8) * 0x1p-24f);
}

// The distance of neighbouring floats around x, 2^-149 in the denormal range.
double ulp_of(double x) {
  const double a = std::fabs(x);
  if (a < 0x1p-126) return 0x1p-149;
  int exponent;
  std::frexp(a, &exponent);
  return std::ldexp(1.0, exponent - 24);
}

struct Error {
  double ulp = 0, absolute = 0, relative = 0;
  float ulp_at = 0;
};

// Compares one result with the exact one; false for a wrong NaN or infinity.
bool add_error(Error& error, float x, float got, double exact) {
  if (std::isnan(exact)) return std::isnan(got);
  if (std::isinf(exact)) return static_cast<double>(got) == exact;
  if (std::isinf(got) && std::fabs(exact) > 0x1.ffffffp127) return std::signbit(got) == std::signbit(exact);
  if (!std::isfinite(got)) return false;
  const double difference = std::fabs(static_cast<double>(got) - exact);
  const double ulp = difference / ulp_of(exact);
  if (ulp > error.ulp) {
    error.ulp = ulp;
    error.ulp_at = x;
  }
  if (difference > error.absolute) error.absolute = difference;
  if (std::fabs(exact) >= 0x1p-126 && difference / std::fabs(exact) > error.relative) {
    error.relative = difference / std::fabs(exact);
  }
  return true;
}

// Random points in [low, high], random magnitudes of either sign inside it, its ends, and special values.
std::vector<float> sweep(float low, float high) {
  std::vector<float> points = {low, high};
  const float special[] = {0.0f,      -0.0f,  0x1p-149f,       -0x1p-149f,      0x1p-127f, 0x1p-126f,
                           1.0f,      -1.0f,  0x1.fffffep-1f,  0x1.000002p0f,   0.93f,     0.930001f,
                           10.0f,     -10.0f, -14.0f,          14.0f,           15.0f,     -15.0f,
                           3.999999f, 4.0f,   0x1.fffffep127f, -0x1.fffffep127f};
  for (float x : special) {
    if (x >= low && x <= high) points.push_back(x);
  }
  for (int i = 0; i < kRandom; ++i) points.push_back(uniform(low, high));
  for (int i = 0; i < kRandom; ++i) {
    const float x = float_from_bits(random_bits());
    if (x >= low && x <= high) points.push_back(x);
  }
  while (points.size() % kLanes) points.push_back(low);
  return points;
}

template <typename F, typename G>
Error measure(const char* name, F function, G exact, float low, float high) {
  const std::vector<float> points = sweep(low, high);
  Error error;
  for (size_t i = 0; i < points.size(); i += kLanes) {
    float results[kLanes];
    cpu::store(results, function(cpu::load(&points[i])));
    for (int j = 0; j < kLanes; ++j) {
      const float x = points[i + j];
      if (!CHECK(add_error(error, x, results[j], exact(static_cast<double>(x))))) {
        std::printf("  %s(%a) = %a, exact %a\n", name, x, results[j], exact(x));
      }
    }
  }
  std::printf("%-16s on [%11.5g, %11.5g]: %7.3f ulp (at %a), absolute %.2e, relative %.2e\n", name, low, high,
              error.ulp, error.ulp_at, error.absolute, error.relative);
  return error;
}

template <typename F>
float at(F function, float x) {
  return function(cpu::set1(x))[0];
}

bool same(float a, float b) { return std::isnan(a) ? std::isnan(b) : float_bits(a) == float_bits(b); }

template <typename F>
void check_at(const char* name, F function, float x, float expected) {
  const float got = at(function, x);
  if (!CHECK(same(got, expected))) std::printf("  %s(%a) = %a, expected %a\n", name, x, got, expected);
}

// ------------------------------------------------------------------------------------------------------- conversions

// Correct rounding by definition: of all finite values of the type, the nearest, ties to even bits.
template <typename T>
uint16_t nearest_by_search(float x) {
  const uint16_t infinity = std::is_same_v<T, bfloat16> ? 0x7f80 : 0x7c00;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double a = std::fabs(static_cast<double>(x));
  uint16_t low = 0, high = infinity;  // the type's low <= a < high
  if (std::isinf(x)) return sign | infinity;
  while (high - low > 1) {
    const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
    (static_cast<double>(to_float(T{middle})) <= a ? low : high) = middle;
  }
  const double below = to_float(T{low});
  const double above = high == infinity ? 2 * below - to_float(T{static_cast<uint16_t>(low - 1)}) : to_float(T{high});
  const bool up = a - below > above - a || (a - below == above - a && (low & 1));
  return sign | (up ? high : low);
}

// Whether the vectors round x to zero although T has a denormal for it: from level avx512bf16 on the processor does.
template <typename T>
bool underflows(float x) {
  return GK_CPU_LEVEL_NUMBER >= 4 && std::is_same_v<T, bfloat16> && std::fabs(x) < 0x1p-126f;
}

template <typename T>
void check_narrowing_of(const float* values) {  // kLanes of them
  T by_vector[kLanes];
  cpu::store(by_vector, cpu::load(values));
  for (int j = 0; j < kLanes; ++j) {
    const float x = values[j];
    const uint16_t scalar = grokkernels::from_float<T>(x).bits;
    bool right = by_vector[j].bits == (underflows<T>(x) ? scalar & 0x8000 : scalar);
    if (std::isnan(x)) {
      const float back = to_float(T{scalar});
      right = right && std::isnan(back) && (float_bits(back) & 0x00400000u) && std::signbit(back) == std::signbit(x);
    } else {
      right = right && scalar == nearest_by_search<T>(x);
    }
    if (!CHECK(right)) std::printf("  narrowing %a: scalar %04x, vector %04x\n", x, scalar, by_vector[j].bits);
  }
}

template <typename T>
void test_conversions() {
  constexpr bool kIsBf16 = std::is_same_v<T, bfloat16>;
  std::vector<T> all(65536);
  for (int i = 0; i < 65536; ++i) all[i].bits = static_cast<uint16_t>(i);

  for (int i = 0; i < 65536; i += kLanes) {  // widening: every value, scalar and vector, by definition
    float wide[kLanes];
    T back[kLanes];
    cpu::store(wide, cpu::load(&all[i]));
    cpu::store(back, cpu::load(&all[i]));
    for (int j = 0; j < kLanes; ++j) {
      const int bits = i + j;
      const int fraction_bits = kIsBf16 ? 7 : 10;
      const int bias = kIsBf16 ? 127 : 15;
      const int exponent = (bits & 0x7fff) >> fraction_bits;
      const int fraction = bits & ((1 << fraction_bits) - 1);
      const bool special = exponent == 2 * bias + 1;
      double exact = special ? (fraction ? NAN : INFINITY)
                             : std::ldexp(fraction + (exponent ? 1 << fraction_bits : 0),
                                          (exponent ? exponent : 1) - bias - fraction_bits);
      if (bits & 0x8000) exact = -exact;
      const float scalar = to_float(all[i + j]);
      CHECK(float_bits(scalar) == float_bits(wide[j]));
      if (std::isnan(exact)) {
        CHECK(std::isnan(scalar) && std::signbit(scalar) == ((bits & 0x8000) != 0));
        CHECK(back[j].bits == (bits | 1 << (fraction_bits - 1)));
      } else {
        CHECK(static_cast<double>(scalar) == exact && std::signbit(scalar) == std::signbit(exact));
        CHECK(back[j].bits == (underflows<T>(scalar) ? bits & 0x8000 : bits));
      }
    }
  }

  // Narrowing: each value, its neighbours, the ties to the next value and their neighbours; then random bits.
  const auto check_values = [](std::vector<float>& values) {
    while (values.size() % kLanes) values.push_back(0.0f);
    for (size_t i = 0; i < values.size(); i += kLanes) check_narrowing_of<T>(&values[i]);
  };
  std::vector<float> values;
  for (int i = 0; i < 65536; ++i) {
    const float x = to_float(all[i]);
    const float next = to_float(all[(i + 1) & 0xffff]);
    const float tie = std::isfinite(x) && std::isfinite(next) ? x + (next - x) / 2 : kNaN;
    for (float y : {x, tie}) {
      for (int d = -1; d <= 1; ++d) values.push_back(float_from_bits(float_bits(y) + d));
    }
  }
  for (float y :
       {65504.0f, 65519.996f, 65520.0f, 65536.0f, 0x1.fep127f, 0x1.fefffep127f, 0x1.ffp127f, 0x1.fffffep127f, 0x1p-24f,
        0x1p-25f, 0x1.000002p-25f, 0x1.8p-24f, 0x1p-14f, 0x1.ffep-15f, 0x1.fffp-15f, 0x1p-149f, kInfinity, kNaN}) {
    values.push_back(y);
    values.push_back(-y);
  }
  values.push_back(float_from_bits(0x7f800001u));  // a signalling NaN whose payload is lost to rounding
  values.push_back(float_from_bits(0xffffffffu));
  for (int i = 0; i < kRandom; ++i) values.push_back(float_from_bits(random_bits()));
  for (int i = 0; i < kRandom; ++i)
    values.push_back(std::ldexp(uniform(-2.0f, 2.0f), static_cast<int>(random_bits() % 45) - 27));
  check_values(values);
}

// --------------------------------------------------------------------------------------------------------------- tails

// A heap block of exactly n elements, so that the address sanitizer fences both sides.
template <typename T>
struct Exact {
  explicit Exact(int n) : p(static_cast<T*>(std::malloc(n * sizeof(T)))) {}
  ~Exact() { std::free(p); }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  T* p;
};

template <typename T>
void test_tails() {
  const auto value = [](int i) { return grokkernels::from_float<T>(static_cast<float>(i + 1) * 1.25f); };
  for (int n = 0; n <= kLanes; ++n) {
    for (int offset = 0; offset < 3; ++offset) {  // every alignment a kernel can meet
      Exact<T> source(n + offset), target(n + offset);
      for (int i = 0; i < n + offset; ++i) {
        source.p[i] = value(i);
        target.p[i] = grokkernels::from_float<T>(-7.0f);
      }
      for (float fill : {0.0f, -kInfinity}) {
        const vf v = cpu::load_n(source.p + offset, n, fill);
        for (int i = 0; i < kLanes; ++i) {
          const float expected = i < n ? to_float(value(i + offset)) : fill;
          if (!CHECK(v[i] == expected)) std::printf("  load_n n %d lane %d: %g, expected %g\n", n, i, v[i], expected);
        }
        cpu::store_n(target.p + offset, v, n);
      }
      for (int i = 0; i < n + offset; ++i) {
        CHECK(to_float(target.p[i]) == (i < offset ? -7.0f : to_float(value(i))));
      }
    }
    // Inside a larger buffer: nothing beyond n is written.
    T block[2 * kLanes];
    for (T& x : block) x = grokkernels::from_float<T>(-7.0f);
    cpu::store_n(block + 1, cpu::set1(3.0f), n);
    for (int i = 0; i < 2 * kLanes; ++i) CHECK(to_float(block[i]) == (i >= 1 && i < 1 + n ? 3.0f : -7.0f));
  }
}

template <typename T>
void test_pairs_and_streams() {
  alignas(64) T source[2 * kLanes];
  alignas(64) T target[4 * kLanes];
  float wide[2 * kLanes];
  for (int i = 0; i < 2 * kLanes; ++i) source[i] = grokkernels::from_float<T>(i % 5 == 4 ? -0.1f * i : 1.0f + i);
  const cpu::VfPair pair = cpu::load_pair(source);
  cpu::store(wide, pair.first);
  cpu::store(wide + kLanes, pair.second);
  for (int i = 0; i < 2 * kLanes; ++i) CHECK(wide[i] == to_float(source[i]));

  const auto check_target = [&](const T* p, int n) {
    for (int i = 0; i < n; ++i) CHECK(to_float(p[i]) == to_float(source[i]));
    for (T& x : target) x = grokkernels::from_float<T>(-7.0f);
  };
  cpu::store_pair(target + 1, pair.first, pair.second);
  check_target(target + 1, 2 * kLanes);
  cpu::stream_store_pair(target, pair.first, pair.second);
  cpu::stream_store_pair(target + 2 * kLanes, pair.first, pair.second);
  cpu::stream_fence();
  CHECK(to_float(target[2 * kLanes]) == to_float(source[0]));
  check_target(target, 2 * kLanes);
  cpu::stream_store(target, pair.first);
  cpu::stream_fence();
  check_target(target, kLanes);

  // The pair and single stores round alike, also NaN and the largest numbers.
  for (int i = 0; i < kRandom / 16; ++i) {
    float values[2 * kLanes];
    for (float& x : values) x = float_from_bits(random_bits());
    const vf first = cpu::load(values), second = cpu::load(values + kLanes);
    T singles[2 * kLanes], pairs[2 * kLanes];
    cpu::store(singles, first);
    cpu::store(singles + kLanes, second);
    cpu::store_pair(pairs, first, second);
    CHECK(std::memcmp(singles, pairs, sizeof singles) == 0);
  }
}

// ---------------------------------------------------------------------------------------------------------- arithmetic

void test_arithmetic() {
  for (int n = 0; n < kLanes; ++n) CHECK(cpu::lane_index()[n] == n);
  CHECK(float_bits(cpu::set1(-0.0f)[kLanes - 1]) == 0x80000000u);

  for (int i = 0; i < 20000; ++i) {
    float a[kLanes], b[kLanes], c[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      a[j] = uniform(-9.0f, 9.0f);
      b[j] = uniform(-9.0f, 9.0f);
      c[j] = uniform(-9.0f, 9.0f);
    }
    const vf va = cpu::load(a), vb = cpu::load(b), vc = cpu::load(c);
    const vf fma = cpu::fma(va, vb, vc), fnma = cpu::fnma(va, vb, vc), low = cpu::min(va, vb), high = cpu::max(va, vb);
    const vf chosen = cpu::select(va < vb, vc, va), size = cpu::abs(va), whole = cpu::round(va * 1000.0f);
    const vi rounded = cpu::round_to_int(va * 1000.0f), truncated = cpu::truncate_to_int(va),
             picked = cpu::select(va < vb, rounded, truncated);
    const vf root = cpu::sqrt(size), inverse = cpu::rsqrt(size), signed_size = cpu::with_sign(size, vb);
    double sum = 0;
    float largest = a[0], smallest = a[0];
    for (int j = 0; j < kLanes; ++j) {
#if defined(GK_SIMD_FMA)
      CHECK(fma[j] == std::fma(a[j], b[j], c[j]) && fnma[j] == std::fma(-a[j], b[j], c[j]));
#else
      volatile float product = a[j] * b[j];
      CHECK(fma[j] == product + c[j] && fnma[j] == c[j] - product);
#endif
      CHECK(low[j] == (a[j] < b[j] ? a[j] : b[j]) && high[j] == (a[j] > b[j] ? a[j] : b[j]));
      CHECK(chosen[j] == (a[j] < b[j] ? c[j] : a[j]) && size[j] == std::fabs(a[j]));
      volatile float thousandfold = a[j] * 1000.0f;
      CHECK(rounded[j] == std::lrint(thousandfold) && whole[j] == std::nearbyint(thousandfold));
      CHECK(truncated[j] == static_cast<int>(a[j]) && picked[j] == (a[j] < b[j] ? rounded[j] : truncated[j]));
      CHECK(root[j] == std::sqrt(std::fabs(a[j])));
      const double exact = 1.0 / std::sqrt(std::fabs(static_cast<double>(a[j])));
      CHECK(std::fabs(inverse[j] - exact) <= 1.5 * ulp_of(exact));
      CHECK(signed_size[j] == std::copysign(a[j], b[j]));
      sum += a[j];
      largest = a[j] > largest ? a[j] : largest;
      smallest = a[j] < smallest ? a[j] : smallest;
    }
    CHECK(std::fabs(cpu::reduce_add(va) - sum) <= 1e-5);
    CHECK(cpu::reduce_max(va) == largest && cpu::reduce_min(va) == smallest);
  }

  for (int lane = 0; lane < kLanes; ++lane) {  // each lane counts in a reduction
    vf v = cpu::set1(-1.0f);
    v[lane] = 5.0f;
    CHECK(cpu::reduce_max(v) == 5.0f && cpu::reduce_min(-v) == -5.0f && cpu::reduce_add(v) == 6.0f - kLanes);
    CHECK(cpu::any(v > 4.0f) && !cpu::all(v > 4.0f) && cpu::all(v > -2.0f) && !cpu::any(v > 6.0f));
  }

  const vf nan = cpu::set1(kNaN), one = cpu::set1(1.0f);  // the documented NaN behaviour: the second operand
  CHECK(cpu::max(nan, one)[0] == 1.0f && std::isnan(cpu::max(one, nan)[0]));
  CHECK(cpu::min(nan, one)[0] == 1.0f && std::isnan(cpu::min(one, nan)[0]));
  const auto round = [](vf x) { return cpu::round(x); };
  for (float x :
       {0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 0x1.fffffep22f, 0x1p23f, -0x1.8p30f, 0x1p100f, kInfinity, -kInfinity}) {
    CHECK(at(round, x) == std::nearbyint(x));
  }
  CHECK(std::isnan(at(round, kNaN)));
  const auto rsqrt = [](vf x) { return cpu::rsqrt(x); };
  check_at("rsqrt", rsqrt, 0.0f, kInfinity);
  check_at("rsqrt", rsqrt, kInfinity, 0.0f);
  check_at("rsqrt", rsqrt, -1.0f, kNaN);
}

// -------------------------------------------------------------------------------------------------------
// transcendentals

constexpr double kPi = 3.14159265358979323846;

double sigmoid_exact(double x) { return 1.0 / (1.0 + std::exp(-x)); }
double gelu_u(double x) { return std::sqrt(8.0 / kPi) * (x + 0.044715 * x * x * x); }
double gelu_tanh_exact(double x) { return x == -INFINITY ? 0.0 : x * sigmoid_exact(gelu_u(x)); }
double gelu_tanh_slope_exact(double x) {
  const double s = sigmoid_exact(gelu_u(x)), other = sigmoid_exact(-gelu_u(x));
  return s + x * s * other * std::sqrt(8.0 / kPi) * (1.0 + 3.0 * 0.044715 * x * x);
}
double normal_exact(double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); }
double gelu_erf_slope_exact(double x) { return normal_exact(x) + x * std::exp(-0.5 * x * x) / std::sqrt(2.0 * kPi); }

#define GK_LAMBDA(expression) [](auto x) { return expression; }

void test_transcendentals() {
  const auto exp = GK_LAMBDA(cpu::exp(x));
  CHECK(measure("exp", exp, GK_LAMBDA(std::exp(x)), -87.3f, 88.7f).ulp <= 1.5);
  CHECK(measure("exp", exp, GK_LAMBDA(std::exp(x)), -110.0f, 95.0f).ulp <= 1.5);
  CHECK(measure("exp", exp, GK_LAMBDA(std::exp(x)), -kInfinity, kInfinity).ulp <= 1.5);
  check_at("exp", exp, -kInfinity, 0.0f);
  check_at("exp", exp, kInfinity, kInfinity);
  check_at("exp", exp, kNaN, kNaN);
  check_at("exp", exp, -kNaN, kNaN);
  check_at("exp", exp, 0.0f, 1.0f);
  check_at("exp", exp, -0.0f, 1.0f);
  check_at("exp", exp, 88.8f, kInfinity);
  check_at("exp", exp, -104.1f, 0.0f);

  const auto exp_nonpositive = GK_LAMBDA(cpu::exp_nonpositive(x));
  CHECK(measure("exp_nonpositive", exp_nonpositive, GK_LAMBDA(std::exp(x)), -kInfinity, 0.0f).ulp <= 1.5);
  CHECK(measure("exp_nonpositive", exp_nonpositive, GK_LAMBDA(std::exp(x)), -110.0f, 0.0f).ulp <= 1.5);
  check_at("exp_nonpositive", exp_nonpositive, -kInfinity, 0.0f);
  check_at("exp_nonpositive", exp_nonpositive, kNaN, kNaN);

  const auto reciprocal = GK_LAMBDA(cpu::reciprocal(x));
  CHECK(measure("reciprocal", reciprocal, GK_LAMBDA(1.0 / x), 1.0f, 0x1p60f).ulp <= 1.1);
  check_at("reciprocal", reciprocal, kNaN, kNaN);

  const auto exp2 = GK_LAMBDA(cpu::exp2(x));
  CHECK(measure("exp2", exp2, GK_LAMBDA(std::exp2(x)), -2.0f, 2.0f).ulp <= 1.5);
  CHECK(measure("exp2", exp2, GK_LAMBDA(std::exp2(x)), -155.0f, 135.0f).ulp <= 1.5);
  CHECK(measure("exp2", exp2, GK_LAMBDA(std::exp2(x)), -kInfinity, kInfinity).ulp <= 1.5);
  check_at("exp2", exp2, -kInfinity, 0.0f);
  check_at("exp2", exp2, kInfinity, kInfinity);
  check_at("exp2", exp2, kNaN, kNaN);
  for (int n = -149; n < 128; ++n) check_at("exp2", exp2, static_cast<float>(n), std::ldexp(1.0f, n));

  const auto log = GK_LAMBDA(cpu::log(x));
  CHECK(measure("log", log, GK_LAMBDA(std::log(x)), 0.5f, 2.0f).ulp <= 2.0);
  CHECK(measure("log", log, GK_LAMBDA(std::log(x)), -kInfinity, kInfinity).ulp <= 2.0);
  check_at("log", log, 0.0f, -kInfinity);
  check_at("log", log, -0.0f, -kInfinity);
  check_at("log", log, kInfinity, kInfinity);
  check_at("log", log, -kInfinity, kNaN);
  check_at("log", log, -0x1p-149f, kNaN);
  check_at("log", log, kNaN, kNaN);
  check_at("log", log, 1.0f, 0.0f);

  const auto tanh = GK_LAMBDA(cpu::tanh(x));
  CHECK(measure("tanh", tanh, GK_LAMBDA(std::tanh(x)), -1.0f, 1.0f).ulp <= 1.1);
  CHECK(measure("tanh", tanh, GK_LAMBDA(std::tanh(x)), -12.0f, 12.0f).ulp <= 1.1);
  CHECK(measure("tanh", tanh, GK_LAMBDA(std::tanh(x)), -kInfinity, kInfinity).ulp <= 1.1);
  check_at("tanh", tanh, kInfinity, 1.0f);
  check_at("tanh", tanh, -kInfinity, -1.0f);
  check_at("tanh", tanh, 0.0f, 0.0f);
  check_at("tanh", tanh, -0.0f, -0.0f);
  check_at("tanh", tanh, kNaN, kNaN);

  const auto erf = GK_LAMBDA(cpu::erf(x));
  CHECK(measure("erf", erf, GK_LAMBDA(std::erf(x)), -1.0f, 1.0f).ulp <= 2.0);
  CHECK(measure("erf", erf, GK_LAMBDA(std::erf(x)), -5.0f, 5.0f).ulp <= 2.0);
  CHECK(measure("erf", erf, GK_LAMBDA(std::erf(x)), -kInfinity, kInfinity).ulp <= 2.0);
  check_at("erf", erf, kInfinity, 1.0f);
  check_at("erf", erf, -kInfinity, -1.0f);
  check_at("erf", erf, 0.0f, 0.0f);
  check_at("erf", erf, -0.0f, -0.0f);
  check_at("erf", erf, kNaN, kNaN);
}

void test_activations() {
  const auto sigmoid = GK_LAMBDA(cpu::sigmoid(x));
  CHECK(measure("sigmoid", sigmoid, sigmoid_exact, -20.0f, 20.0f).ulp <= 3.0);
  CHECK(measure("sigmoid", sigmoid, sigmoid_exact, -kInfinity, kInfinity).ulp <= 3.0);
  const auto sigmoid_slope = GK_LAMBDA(cpu::sigmoid_and_slope(x).slope);
  CHECK(measure("sigmoid'", sigmoid_slope, GK_LAMBDA(sigmoid_exact(x) * sigmoid_exact(-x)), -85.0f, 85.0f).ulp <= 5.0);
  check_at("sigmoid", sigmoid, kInfinity, 1.0f);
  check_at("sigmoid", sigmoid, -kInfinity, 0.0f);
  check_at("sigmoid", sigmoid, kNaN, kNaN);
  check_at("sigmoid", sigmoid, 0.0f, 0.5f);

  const auto silu = GK_LAMBDA(cpu::silu(x));
  const auto silu_slope = GK_LAMBDA(cpu::silu_and_slope(x).slope);
  const auto silu_slope_exact = GK_LAMBDA(sigmoid_exact(x) * (1.0 + x * sigmoid_exact(-x)));
  CHECK(measure("silu", silu, GK_LAMBDA(x * sigmoid_exact(x)), -85.0f, kInfinity).ulp <= 3.5);
  CHECK(measure("silu'", silu_slope, silu_slope_exact, -20.0f, 20.0f).absolute <= 3e-7);
  CHECK(measure("silu'", silu_slope, silu_slope_exact, -110.0f, 110.0f).absolute <= 3e-7);

  const auto gelu_tanh = GK_LAMBDA(cpu::gelu_tanh(x));
  const auto gelu_tanh_slope = GK_LAMBDA(cpu::gelu_tanh_and_slope(x).slope);
  CHECK(measure("gelu_tanh", gelu_tanh, gelu_tanh_exact, -1.0f, 20.0f).ulp <= 4.0);
  CHECK(measure("gelu_tanh", gelu_tanh, gelu_tanh_exact, -8.0f, 20.0f).relative <= 1e-5);
  CHECK(measure("gelu_tanh", gelu_tanh, gelu_tanh_exact, -100.0f, 0.0f).absolute <= 1e-7);
  CHECK(measure("gelu_tanh'", gelu_tanh_slope, gelu_tanh_slope_exact, -30.0f, 30.0f).absolute <= 4e-7);

  const auto gelu_erf = GK_LAMBDA(cpu::gelu_erf(x));
  const auto gelu_erf_slope = GK_LAMBDA(cpu::gelu_erf_and_slope(x).slope);
  const auto gelu_erf_exact = GK_LAMBDA(x == -INFINITY ? 0.0 : x * normal_exact(x));
  CHECK(measure("gelu_erf", gelu_erf, gelu_erf_exact, -1.0f, 20.0f).ulp <= 6.0);
  CHECK(measure("gelu_erf", gelu_erf, gelu_erf_exact, -12.0f, 20.0f).relative <= 6e-6);
  CHECK(measure("gelu_erf", gelu_erf, gelu_erf_exact, -100.0f, 0.0f).absolute <= 1e-7);
  CHECK(measure("gelu_erf'", gelu_erf_slope, gelu_erf_slope_exact, -30.0f, 30.0f).absolute <= 4e-7);

  const auto check_ends = [](const char* name, auto value_and_slope) {
    const auto value = [&](vf x) { return value_and_slope(x).value; };
    const auto slope = [&](vf x) { return value_and_slope(x).slope; };
    check_at(name, value, kInfinity, kInfinity);
    check_at(name, value, -kInfinity, -0.0f);
    check_at(name, value, -0x1.fffffep127f, -0.0f);
    check_at(name, value, 0x1.fffffep127f, 0x1.fffffep127f);
    check_at(name, value, 0.0f, 0.0f);
    check_at(name, value, -0.0f, -0.0f);
    check_at(name, value, kNaN, kNaN);
    check_at(name, slope, kInfinity, 1.0f);
    CHECK(at(slope, -kInfinity) == 0.0f);
    CHECK(std::fabs(at(slope, 0.0f) - 0.5f) <= 0x1p-23f);
    check_at(name, slope, kNaN, kNaN);
  };
  check_ends("silu", GK_LAMBDA(cpu::silu_and_slope(x)));
  check_ends("gelu_tanh", GK_LAMBDA(cpu::gelu_tanh_and_slope(x)));
  check_ends("gelu_erf", GK_LAMBDA(cpu::gelu_erf_and_slope(x)));
}

// The scalar conversions are usable in constant expressions.
static_assert(grokkernels::to_bfloat16(1.00390625f).bits == 0x3f80);
static_assert(grokkernels::to_float16(65520.0f).bits == 0x7c00);
static_assert(grokkernels::to_float(float16{0x0001}) == 0x1p-24f);
static_assert(grokkernels::size_of(grokkernels::dtype_of<bfloat16>) == 2);

}  // namespace

int main() {
#if defined(GK_SIMD_AMX)
  if (cpu::highest_level() < cpu::kAmx) return 77;
#elif defined(GK_SIMD_BFLOAT16)
  if (!__builtin_cpu_supports("avx512bf16")) return 77;
#elif defined(GK_SIMD_AVX512)
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) return 77;
#elif defined(GK_SIMD_AVX2)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 77;
#endif
  std::printf("level %s, %d lanes\n", GK_STRING(GK_CPU_LEVEL), kLanes);
  test_conversions<bfloat16>();
  test_conversions<float16>();
  test_tails<float>();
  test_tails<bfloat16>();
  test_tails<float16>();
  test_pairs_and_streams<float>();
  test_pairs_and_streams<bfloat16>();
  test_pairs_and_streams<float16>();
  test_arithmetic();
  test_transcendentals();
  test_activations();
  return grokkernels::tests::check_result();
}
