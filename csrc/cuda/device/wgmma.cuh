// wgmma (sm_90a): the tensor cores of a warpgroup, with operands from shared memory, while its threads go on (PTX ISA,
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions").
//
// D (64 x N, float32) += A (64 x 16) B (16 x N), of bfloat16 or float16. All 128 threads of the warpgroup call
// together. Warp w of it, lane l, g = l / 4, t = l % 4, holds rows 16 w + g and 16 w + g + 8:
//   d[4 j], d[4 j + 1]      row 16 w + g, columns 8 j + 2 t and the next;  d[4 j + 2], d[4 j + 3]: the row 8 below
//   a[0..3] (from registers) as mma_m16n8k16 of device/matrix.cuh: two accumulators' pairs narrowed are an operand
// A and B from shared memory are named by matrix_descriptor (common/tensor_tiles.h); kTransposed: its side is dense,
// not its depth.
//
// wgmma_fence before the first wgmma and whenever registers it uses were touched by other instructions; what threads
// wrote to shared memory needs fence_proxy_async (device/tma.cuh) before. The operations run in order; from wgmma until
// the wait for its group d and a may not be touched, and shared memory not be written.
#pragma once

#include <device/core.cuh>

#include "common/tensor_tiles.h"

namespace grokkernels::device {

GK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The operations since the last commit become a group.
GK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kGroupsLeft groups are under way.
template <int kGroupsLeft>
GK_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
}

// Sums are read only after this, which follows their wait: without it the compiler may copy them before, and ptxas then
// lets no wgmma overlap ("serialized due to non wgmma instructions reading accumulator registers").
template <int kCount>
GK_DEVICE void wgmma_settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Operands of the instruction for N columns: %0 .. %(N / 2 - 1) are d; the numbers that follow are given by name.
#define GK_WGMMA_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define GK_WGMMA_NAMES_16 GK_WGMMA_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define GK_WGMMA_NAMES_24 GK_WGMMA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define GK_WGMMA_NAMES_32 GK_WGMMA_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define GK_WGMMA_NAMES_40 GK_WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define GK_WGMMA_NAMES_48 GK_WGMMA_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define GK_WGMMA_NAMES_56 GK_WGMMA_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define GK_WGMMA_NAMES_64 GK_WGMMA_NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define GK_WGMMA_NAMES_72 GK_WGMMA_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define GK_WGMMA_NAMES_80 GK_WGMMA_NAMES_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define GK_WGMMA_NAMES_88 GK_WGMMA_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define GK_WGMMA_NAMES_96 GK_WGMMA_NAMES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define GK_WGMMA_NAMES_104 GK_WGMMA_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define GK_WGMMA_NAMES_112 GK_WGMMA_NAMES_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define GK_WGMMA_NAMES_120 GK_WGMMA_NAMES_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define GK_WGMMA_NAMES_128 GK_WGMMA_NAMES_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define GK_WGMMA_D_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define GK_WGMMA_D_16 \
  GK_WGMMA_D_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define GK_WGMMA_D_24 \
  GK_WGMMA_D_16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define GK_WGMMA_D_32 \
  GK_WGMMA_D_24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define GK_WGMMA_D_40 \
  GK_WGMMA_D_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define GK_WGMMA_D_48 \
  GK_WGMMA_D_40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define GK_WGMMA_D_56 \
  GK_WGMMA_D_48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define GK_WGMMA_D_64 \
  GK_WGMMA_D_56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define GK_WGMMA_D_72 \
  GK_WGMMA_D_64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define GK_WGMMA_D_80 \
  GK_WGMMA_D_72, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define GK_WGMMA_D_88 \
  GK_WGMMA_D_80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define GK_WGMMA_D_96 \
  GK_WGMMA_D_88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define GK_WGMMA_D_104                                                                                         \
  GK_WGMMA_D_96, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), \
      "+f"(d[103])
#define GK_WGMMA_D_112                                                                                              \
  GK_WGMMA_D_104, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), \
      "+f"(d[111])
#define GK_WGMMA_D_120                                                                                              \
  GK_WGMMA_D_112, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), \
      "+f"(d[119])
#define GK_WGMMA_D_128                                                                                              \
  GK_WGMMA_D_120, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), \
      "+f"(d[127])

// p0 .. p6: the operand numbers after those of d.
#define GK_WGMMA_SHARED(n, half, type, p0, p1, p2, p3, p4)                                                             \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #p2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n               \
               "k16.f32." type "." type " {" GK_WGMMA_NAMES_##half "}, %" #p0 ", %" #p1 ", add, 1, 1, %" #p3 ", %" #p4 \
                                                                   ";\n}"                                              \
               : GK_WGMMA_D_##half                                                                                     \
               : "l"(a), "l"(b), "r"(add), "n"(kTransposedA), "n"(kTransposedB)                                        \
               : "memory")

#define GK_WGMMA_REGISTERS(n, half, type, p0, p1, p2, p3, p4, p5, p6)                                        \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #p5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n     \
               "k16.f32." type "." type " {" GK_WGMMA_NAMES_##half "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 \
                                                                   "}, %" #p4 ", add, 1, 1, %" #p6 ";\n}"    \
               : GK_WGMMA_D_##half                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kTransposedB)             \
               : "memory")

// The widths there are: N, N / 2, and the seven numbers from N / 2 on.
#define GK_WGMMA_WIDTHS(X)                       \
  X(16, 8, 8, 9, 10, 11, 12, 13, 14)             \
  X(32, 16, 16, 17, 18, 19, 20, 21, 22)          \
  X(48, 24, 24, 25, 26, 27, 28, 29, 30)          \
  X(64, 32, 32, 33, 34, 35, 36, 37, 38)          \
  X(80, 40, 40, 41, 42, 43, 44, 45, 46)          \
  X(96, 48, 48, 49, 50, 51, 52, 53, 54)          \
  X(112, 56, 56, 57, 58, 59, 60, 61, 62)         \
  X(128, 64, 64, 65, 66, 67, 68, 69, 70)         \
  X(144, 72, 72, 73, 74, 75, 76, 77, 78)         \
  X(160, 80, 80, 81, 82, 83, 84, 85, 86)         \
  X(176, 88, 88, 89, 90, 91, 92, 93, 94)         \
  X(192, 96, 96, 97, 98, 99, 100, 101, 102)      \
  X(208, 104, 104, 105, 106, 107, 108, 109, 110) \
  X(224, 112, 112, 113, 114, 115, 116, 117, 118) \
  X(240, 120, 120, 121, 122, 123, 124, 125, 126) \
  X(256, 128, 128, 129, 130, 131, 132, 133, 134)

// D += A B, or D = A B without `accumulate`; kN = 16, 32 .. 256.
template <typename T, int kN, bool kTransposedA = false, bool kTransposedB = false>
GK_DEVICE void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(sizeof(T) == 2 && kN % 16 == 0 && kN >= 16 && kN <= 256);
  const int add = accumulate;
#define GK_WGMMA(n, half, p0, p1, p2, p3, p4, p5, p6)       \
  if constexpr (kN == n) {                                  \
    if constexpr (std::is_same_v<T, bfloat16>)              \
      GK_WGMMA_SHARED(n, half, "bf16", p0, p1, p2, p3, p4); \
    else                                                    \
      GK_WGMMA_SHARED(n, half, "f16", p0, p1, p2, p3, p4);  \
  }
  GK_WGMMA_WIDTHS(GK_WGMMA)
#undef GK_WGMMA
}

// The same with A in registers.
template <typename T, int kN, bool kTransposedB = false>
GK_DEVICE void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(sizeof(T) == 2 && kN % 16 == 0 && kN >= 16 && kN <= 256);
  const int add = accumulate;
#define GK_WGMMA(n, half, p0, p1, p2, p3, p4, p5, p6)                  \
  if constexpr (kN == n) {                                             \
    if constexpr (std::is_same_v<T, bfloat16>)                         \
      GK_WGMMA_REGISTERS(n, half, "bf16", p0, p1, p2, p3, p4, p5, p6); \
    else                                                               \
      GK_WGMMA_REGISTERS(n, half, "f16", p0, p1, p2, p3, p4, p5, p6);  \
  }
  GK_WGMMA_WIDTHS(GK_WGMMA)
#undef GK_WGMMA
}

}  // namespace grokkernels::device
