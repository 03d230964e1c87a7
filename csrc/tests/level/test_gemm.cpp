// csrc/cpu/gemm.h against double precision, at the level this file is compiled for:
//
//   flags="-std=c++20 -O3 -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror -I../.."
//   g++ $flags -DGK_CPU_LEVEL=baseline test_gemm.cpp ../../cpu/runtime/*.cpp
//   g++ $flags -DGK_CPU_LEVEL=avx2 -march=x86-64-v3 test_gemm.cpp ../../cpu/runtime/*.cpp
//   g++ $flags -DGK_CPU_LEVEL=avx512 -march=x86-64-v4 test_gemm.cpp ../../cpu/runtime/*.cpp
//   g++ $flags -DGK_CPU_LEVEL=avx512bf16 -march=x86-64-v4 -mavx512bf16 test_gemm.cpp ../../cpu/runtime/*.cpp
//   g++ $flags -DGK_CPU_LEVEL=amx $(grep ^amx ../../cpu/levels.txt | cut -c4-) test_gemm.cpp ../../cpu/runtime/*.cpp
//
// Exits with 0 when everything holds, 1 when a check failed, 77 when this machine lacks the level's instructions.
// Buffers end where their data ends, so -fsanitize=address sees any access beyond a tail.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/runtime/level.h"
#include "tests/check.h"

#define GK_STRING_(x) #x
#define GK_STRING(x) GK_STRING_(x)

namespace cpu = grokkernels::cpu;
using grokkernels::bfloat16;
using grokkernels::float16;
using grokkernels::from_float;
using grokkernels::to_float;

namespace {

uint64_t random_state = 0x9e3779b97f4a7c15u;
uint32_t random_bits() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<uint32_t>((random_state * 0x2545f4914f6cdd1du) >> 32);
}
float uniform() { return static_cast<float>(random_bits() >> 8) * 0x1p-23f - 1.0f; }

enum Layout { kRowMajor, kColumnMajor, kSpread, kGatheredRows, kGatheredColumns, kLayouts };

// A matrix with its memory. Spread leaves gaps between any two elements; gathered takes rows (columns) out of a pool.
template <typename T>
struct Matrix {
  std::vector<T> data;
  std::vector<int32_t> index;
  cpu::Strided<T> view;

  Matrix(int64_t rows, int64_t cols, Layout layout) {
    const int64_t pool_rows = layout == kGatheredRows ? rows + 3 : rows;
    const int64_t pool_cols = layout == kGatheredColumns ? cols + 3 : cols;
    const bool by_column = layout == kColumnMajor || layout == kGatheredColumns;
    const int64_t gap = layout == kSpread ? 2 : 1;
    const int64_t row = by_column ? 1 : pool_cols * gap, col = by_column ? pool_rows : gap;
    data.resize(pool_rows > 0 && pool_cols > 0 ? (pool_rows - 1) * row + (pool_cols - 1) * col + 1 : 0);
    for (T& x : data) x = from_float<T>(uniform());
    view = {data.data(), row, col};
    if (layout == kGatheredRows) {
      for (int64_t i = 0; i < rows; ++i) index.push_back(static_cast<int32_t>(random_bits() % pool_rows));
      view.rows = index.data();
    } else if (layout == kGatheredColumns) {
      for (int64_t j = 0; j < cols; ++j) index.push_back(static_cast<int32_t>(random_bits() % pool_cols));
      view.cols = index.data();
    }
  }
  double at(int64_t i, int64_t j) const {
    return to_float(view.data[(view.rows ? view.rows[i] : i) * view.row + (view.cols ? view.cols[j] : j) * view.col]);
  }
};

template <typename TA, typename TB>
void test_product(int64_t m, int64_t n, int64_t k, Layout layout_a, Layout layout_b, bool accumulate) {
  const Matrix<TA> a(m, k, layout_a);
  const Matrix<TB> b(k, n, layout_b);
  const int64_t ldc = n + 5;
  std::vector<float> c(m > 0 ? (m - 1) * ldc + n : 0);
  for (float& x : c) x = uniform();
  const std::vector<float> before = c;
  cpu::gemm(m, n, k, a.view, b.view, c.data(), ldc, accumulate);
  // Half an ulp of what a sum of magnitudes reaches, once per term of a block and once per block.
  const double steps = static_cast<double>((k < cpu::kDepth ? k : cpu::kDepth) + k / cpu::kDepth + 2);
  bool close = true, kept = true;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double exact = accumulate ? static_cast<double>(before[i * ldc + j]) : 0.0;
      double magnitude = std::fabs(exact);
      for (int64_t p = 0; p < k; ++p) {
        exact += a.at(i, p) * b.at(p, j);
        magnitude += std::fabs(a.at(i, p) * b.at(p, j));
      }
      close = close && std::fabs(c[i * ldc + j] - exact) <= steps * 0x1p-23 * magnitude;
    }
    for (int64_t j = n; j < ldc && i + 1 < m; ++j) kept = kept && c[i * ldc + j] == before[i * ldc + j];
  }
  if (!CHECK(close)) std::printf("  m %ld n %ld k %ld layouts %d %d\n", long(m), long(n), long(k), layout_a, layout_b);
  CHECK(kept);  // what lies between the rows of c

  // A row does not depend on its neighbours: the same bits in a smaller batch that is not streamed.
  constexpr int64_t kFew = cpu::kStreamRows + 1;
  if (m <= kFew) return;
  std::vector<float> few(before.begin() + (m - kFew) * ldc, before.end());
  cpu::gemm(kFew, n, k, a.view.from(m - kFew, 0), b.view, few.data(), ldc, accumulate);
  bool same = true;
  for (size_t i = 0; i < few.size(); ++i) same = same && few[i] == c[(m - kFew) * ldc + i];
  CHECK(same);
}

template <typename TA, typename TB>
void test_types() {
  constexpr int64_t kCols = cpu::kTileCols, kRows = cpu::kTileRows, kBlock = cpu::kBlockRows, kDepth = cpu::kDepth;
  const int64_t shapes[][3] = {{1, 1, 1},
                               {0, 5, 3},
                               {3, 0, 3},
                               {3, 5, 0},
                               {kRows, kCols, cpu::kLanes},         // one tile
                               {kRows - 1, kCols - 1, 17},          // tails of each kind
                               {kRows + 1, kCols + 1, kDepth + 1},  // two blocks of k
                               {2 * kRows + 3, 2 * kCols + 7, 33},  // several tiles
                               {kBlock + 2, 3, kDepth - 1},         // two blocks of a
                               {1, kCols + 9, 2 * kDepth + 19},
                               {cpu::kStreamRows, 13, kDepth + 5}};  // the most rows that are streamed
  for (const auto& [m, n, k] : shapes)
    for (int layout_a = 0; layout_a < kLayouts; ++layout_a)
      for (int layout_b = 0; layout_b < kLayouts; ++layout_b)
        test_product<TA, TB>(m, n, k, Layout(layout_a), Layout(layout_b), (layout_a + layout_b) % 2 == 1);
}

#if defined(GK_SIMD_BFLOAT16)
// The shapes where the panels of strips.h begin and end: one and two strips of rows and of columns, whole and not,
// whole and broken tiles of the sum, two panels of it, two blocks of rows and of columns; rows that read dense columns
// in place, one, three and six strips of them, and the first that copy them.
void test_tiles() {
  constexpr int64_t kLines = cpu::kTileLines, kDepth = cpu::kTilesDepth;
  const int64_t shapes[][3] = {{kLines, kLines, cpu::kTileDepth},
                               {5, kLines + 1, 1},
                               {kLines + 1, 3, cpu::kTileDepth + 1},
                               {2 * kLines, 2 * kLines, 2 * cpu::kTileDepth - 1},
                               {3 * kLines - 1, 5 * kLines + 7, kDepth},
                               {2 * kLines + 5, cpu::kTilesBlockCols + 9, kDepth + 33},
                               {kLines - 3, 2 * kLines, kDepth + cpu::kTileDepth},
                               {3 * kLines - 2, 4 * kLines, 2 * cpu::kTileDepth},
                               {cpu::kMostInPlace, 2 * kLines, 3 * cpu::kTileDepth},
                               {cpu::kMostInPlace + 3, 20 * kLines + 5, 2 * kDepth + 33},
                               {cpu::kTilesBlockRows + 7, 2 * kLines + 1, 2 * kDepth + 31}};
  for (const auto& [m, n, k] : shapes)
    for (int layout_a = 0; layout_a < kLayouts; ++layout_a)
      for (int layout_b = 0; layout_b < kLayouts; ++layout_b)
        for (const bool accumulate : {false, true})
          test_product<bfloat16, bfloat16>(m, n, k, Layout(layout_a), Layout(layout_b), accumulate);
}

// What lies beside an operand, NaN here, is no part of a product.
void test_neighbours() {
  constexpr int64_t kSize = 37, kPitch = 64;
  std::vector<bfloat16> a(kPitch * kPitch, from_float<bfloat16>(NAN)), b = a;
  for (int64_t i = 0; i < kSize; ++i)
    for (int64_t j = 0; j < kSize; ++j) a[i * kPitch + j] = b[i * kPitch + j] = from_float<bfloat16>(1.0f);
  const cpu::Strided<bfloat16> left{a.data(), kPitch, 1}, right{b.data(), kPitch, 1};
  for (const auto& x : {left, left.transposed()})
    for (const auto& y : {right, right.transposed()}) {
      std::vector<float> c(kSize * kSize);
      cpu::gemm(kSize, kSize, kSize, x, y, c.data(), kSize, false);
      bool right_sum = true;
      for (const float sum : c) right_sum = right_sum && sum == static_cast<float>(kSize);
      CHECK(right_sum);
    }
}
#endif

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
#if defined(GK_SIMD_BFLOAT16)
  test_tiles();
  test_neighbours();
#endif
  std::printf("level %s, tile %d x %d\n", GK_STRING(GK_CPU_LEVEL), cpu::kTileRows, cpu::kTileCols);
  test_types<float, float>();
  test_types<bfloat16, bfloat16>();
  test_types<float16, float16>();
  test_types<float, bfloat16>();
  test_types<bfloat16, float>();
  test_types<float, float16>();
  return grokkernels::tests::check_result();
}
