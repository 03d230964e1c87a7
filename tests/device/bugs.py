"""Mistakes that kernels are written with, one place each: every one of them must be caught. See plant.py.

`old` is a place that small edits leave alone, and the case is the smallest that runs into the mistake.
"""

from __future__ import annotations

from tests.device.plant import Bug


def _rms_norm(kind: str, file: str, old: str, new: str, case: str, dtype: str = "bfloat16") -> Bug:
    return Bug(kind, file, old, new, "rms_norm.cu", "rms_norm", case, dtype)


def _cross_entropy(kind: str, old: str, new: str, case: str) -> Bug:
    return Bug(kind, "cross_entropy.cu", old, new, "cross_entropy.cu", "cross_entropy", case)


def _order(kind: str, old: str, new: str, case: str = "33x67 E=8 K=2 uneven") -> Bug:
    return Bug(kind, "expert_order.cu", old, new, "expert_order.cu", "moe_permute", case)


def _product(kind: str, file: str, old: str, new: str, case: str = "case((5,), 160, 72)") -> Bug:
    return Bug(kind, file, old, new, "grouped_mm/grouped_mm.cu", "grouped_mm", case)


def _hopper(kind: str, file: str, old: str, new: str, case: str = "case((100,), 1032, 136, mt=True)") -> Bug:
    """By default many more steps than the ring has slots."""
    source = "grouped_mm/grouped_mm_sm90.cu"
    return Bug(kind, file, old, new, source, "grouped_mm", case, "bfloat16", "sm_90")


def _attention(kind: str, file: str, old: str, new: str, case: str) -> Bug:
    file = f"flash_attention/{file}"
    return Bug(kind, file, old, new, file, "flash_attention", case, "bfloat16", f"sm_{file[-5:-3]}")


def _packed(kind: str, file: str, old: str, new: str) -> Bug:
    """Sequences that end within a tile: what follows is cleared by ordinary stores, and read by wgmma."""
    file = f"flash_attention/{file}"
    case = "case((30, 17), (30, 17), 1, 1, 64)"
    return Bug(kind, file, old, new, file, "flash_attention_varlen", case, "bfloat16", "sm_90")


BUGS = [
    # Barriers and what lies in shared memory between them
    _rms_norm(
        "no barrier before others' numbers are read",
        "norm.cuh",
        "if (lane_id() == 0) scratch[threadIdx.x / 32] = x;\n  sync_threads();",
        "if (lane_id() == 0) scratch[threadIdx.x / 32] = x;",
        "4x1000",
    ),
    _rms_norm(
        "a buffer is written again while others read it",
        "rms_norm.cu",
        "shared_floats() + step % 2 * 32",
        "shared_floats()",
        "1100x520",
    ),
    _order(
        "no barrier between the lanes of a warp",
        "sync_warp();\n      if (here && (same & lower_lanes) == 0)",
        "if (here && (same & lower_lanes) == 0)",
        "40x24 E=4 K=2 uneven capacity=9",  # without, rows are written outside of their tensor and the process ends
    ),
    _order(
        "shared memory is read before it is written",
        "i < (2 + kWarps) * width; i += kThreads) begin[i] = 0;",
        "i < kWarps * width; i += kThreads) begin[i] = 0;",
    ),
    # Collectives and reductions
    _cross_entropy(
        "a lane stays away from a collective",
        "RowSum sum = merge_lanes(terms, mine);",
        "RowSum sum;\n  if (threadIdx.x % 32 != 5) sum = merge_lanes(terms, mine);",
        "3x7",
    ),
    _cross_entropy(
        "a thread stays away from a barrier",
        "if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;\n  sync_threads();",
        "if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;\n  if (threadIdx.x != 40) sync_threads();",
        "3x7",
    ),
    _cross_entropy(
        "the wrong warp's sum in a reduction",
        "merge_lanes<kWarps>(terms, sums[threadIdx.x % kWarps]);",
        "merge_lanes<kWarps>(terms, sums[threadIdx.x % kWarps / 2]);",
        "2x1029",
    ),
    # Edges
    _cross_entropy("no mask for the tail of a row", "if (count < kColumns) {", "if (count < 0) {", "4x67"),
    _rms_norm(
        "stores beyond the end",
        "columns.cuh",
        "if (has(i)) store_vector(",
        "store_vector(",
        "4x1000",
    ),
    # Copies into a ring of stages
    _product(
        "no wait for the first copies",
        "gemm.cuh",
        "copy_async_wait<kGemmStages - 1>();",
        "",
    ),
    _product(
        "the wait leaves one group too many",
        "gemm.cuh",
        "copy_async_wait<kGemmStages - 2>();",
        "copy_async_wait<kGemmStages - 1>();",
    ),
    _product(
        "no barrier before a stage is filled again",
        "gemm.cuh",
        "sync_threads();  // the next step has landed",
        "sync_warp();  // the next step has landed",
    ),
    _product(
        "one row's swizzle is that of the next", "tile.cuh", "(chunk ^ swizzle(row))", "(chunk ^ swizzle(row + 1))"
    ),
    # Hopper: the copy engine, mbarriers, wgmma
    _hopper(
        "a slot is released before it has been read",
        "gemm_sm90.cuh",
        "if (step > 0) release(before);\n      before = ring.empty();",
        "before = ring.empty();\n      if (step + 1 < steps) release(before);",
    ),
    _hopper(
        "a slot is filled again without a wait",
        "gemm_sm90.cuh",
        "mbarrier_wait(ring.empty(), ring.parity ^ 1);",
        "",
    ),
    _hopper(
        "a slot is read without a wait",
        "gemm_sm90.cuh",
        "mbarrier_wait(ring.full(), ring.parity);\n      fix(ring, step);\n      wgmma_fence();",
        "fix(ring, step);\n      wgmma_fence();",
    ),
    _hopper(
        "more bytes land than are expected",
        "gemm_sm90.cuh",
        "mbarrier_arrive_expect(ring.full(), kSlotBytes);",
        "mbarrier_arrive_expect(ring.full(), kSlotBytes - 128);",
    ),
    _hopper(
        "a wait for the wrong parity",
        "gemm_sm90.cuh",
        "mbarrier_wait(ring.empty(), ring.parity ^ 1);",
        "mbarrier_wait(ring.empty(), ring.parity);",
    ),
    _hopper(
        "an mbarrier counts too many arrivals",
        "gemm_sm90.cuh",
        "mbarrier_init(ring.empty(), kCluster * 8);",
        "mbarrier_init(ring.empty(), kCluster * 8 + 1);",
    ),
    _hopper(
        "the wait for wgmma leaves one group too many",
        "gemm_sm90.cuh",
        "wgmma_wait<1>();",
        "wgmma_wait<2>();",
    ),
    _hopper(
        "sums are read before wgmma has been waited for",
        "gemm_sm90.cuh",
        "wgmma_wait<0>();",
        "",
    ),
    _hopper("no wgmma_fence", "gemm_sm90.cuh", "wgmma_fence();", ""),
    _hopper(
        "a wrong stride in a matrix descriptor",
        "matrix_tile.cuh",
        "kPanelBytes, 8 * kWidth);",
        "kPanelBytes, 4 * kWidth);",
    ),
    _hopper(
        "shared memory is too small for its barriers",
        "gemm_sm90.cuh",
        "kSlots * (static_cast<int>(kSlotBytes) + 16)",
        "kSlots * static_cast<int>(kSlotBytes)",
    ),
    _hopper(
        "no mask for the rows of the next group",
        "grouped_mm/grouped_mm_sm90.cu",
        "if (left >= Gemm::kStep) return;",
        "return;",
        "case((40, 30), 136, 136)",
    ),
    _hopper(
        "warpgroups meet at a barrier that counts others",
        "gemm_sm90.cuh",
        "named_barrier_sync(1, 256);",
        "named_barrier_sync(1, 384);",
        "case((40, 30), 136, 136)",
    ),
    _hopper(
        "no barrier between a write and others' wgmma",
        "gemm_sm90.cuh",
        "named_barrier_sync(1, 256);",
        "",
        "case((40, 30), 136, 136)",
    ),
    _hopper(
        "more registers are asked for than there are",
        "gemm_sm90.cuh",
        "kMultiplyRegisters = 232;",
        "kMultiplyRegisters = 240;",
    ),
    _hopper(
        "half of a cluster leaves without the other",
        "gemm_sm90.cuh",
        "if constexpr (kCluster > 1) cluster_sync();\n  }\n\n  // By the copying",
        "}\n\n  // By the copying",
        "case((300,), 72, 264, mt=True)",
    ),
    _hopper(
        "a cluster's slot is released in one block only",
        "gemm_sm90.cuh",
        "mbarrier_arrive_cluster(map_shared_rank(empty, lane_id()));",
        "mbarrier_arrive_cluster(map_shared_rank(empty, 0));",
        "case((300,), 72, 264, mt=True)",
    ),
    # Proxies: wgmma and the copy engine do not see ordinary stores, nor mbarriers, without a fence
    _hopper(
        "no fence between clearing rows and wgmma",
        "gemm_sm90.cuh",
        "GK_DEVICE void rows_cleared() {\n  fence_proxy_async();",
        "GK_DEVICE void rows_cleared() {",
        "case((40, 30), 136, 136)",
    ),
    _hopper("no fence after an mbarrier's initialisation", "gemm_sm90.cuh", "fence_mbarrier_init();", ""),
    Bug(
        "no fence between gathered rows and wgmma",
        "moe_experts/gather_sm90.cuh",
        "fence_proxy_async();\n    mbarrier_arrive(behind_.full());",
        "mbarrier_arrive(behind_.full());",
        "moe_experts/forward_sm90.cu",
        "moe_experts",
        "case(14, 24, 64, 4, 2)",
        "bfloat16",
        "sm_90",
    ),
    _attention(
        "no fence between copied queries and wgmma",
        "forward_sm90.cu",
        "copy_async_wait<0>();\n    fence_proxy_async();",
        "copy_async_wait<0>();",
        "B1 T64 S97 H1/1 D128",
    ),
    _packed(
        "no fence between clearing values and wgmma",
        "forward_sm90.cu",
        "fence_proxy_async();\n      named_barrier_sync(kGroup + wg, 128);\n    }\n    wgmma_fence();",
        "named_barrier_sync(kGroup + wg, 128);\n    }\n    wgmma_fence();",
    ),
    _packed(
        "no fence between clearing queries and wgmma",
        "backward_sm90.cu",
        "clear_rows(dout, s.queries - row, thread);\n      fence_proxy_async();",
        "clear_rows(dout, s.queries - row, thread);",
    ),
    _packed(
        "no fence between clearing keys and wgmma",
        "backward_sm90.cu",
        "clear_rows(values, s.keys - key, thread);\n      fence_proxy_async();",
        "clear_rows(values, s.keys - key, thread);",
    ),
    _attention(
        "no fence after the initialisation of a ring",
        "backward_sm90.cu",
        "fence_mbarrier_init();",
        "",
        "B1 T64 S97 H1/1 D128",
    ),
    # Attention
    _attention(
        "keys are overwritten while others read them",
        "forward_sm80.cu",
        "sync_threads();  // v is there, and k no longer read",
        "sync_warp();  // v is there, and k no longer read",
        "B1 T49 S96 H2/1 D64",
    ),
    _attention(
        "values are released before they have been read",
        "forward_sm90.cu",
        "wgmma_wait<0>();\n    release(ring.values_free(stage_of(i)), i > 1);",
        "release(ring.values_free(stage_of(i)), i > 1);\n    wgmma_wait<0>();",
        "case(1, 128, 640, 1, 1, 64)",
    ),
    _attention(
        "nobody has the first turn",
        "forward_sm90.cu",
        "if (wg == 1) named_barrier_arrive(kTurn, kConsumers);",
        "",
        "B1 T64 S97 H1/1 D128",
    ),
]
