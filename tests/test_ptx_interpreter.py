"""The PTX interpreter (tests/ptx), against numpy and torch: snippets that nvcc compiles, then run on random data."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import ptx
from tests.ptx.cases import CASES, TYPES, N, asm_kernel, inputs, t_bf16

SNIPPETS = Path(ptx.__file__).parent


def compiled(source: str | Path, arch: str = "compute_80") -> ptx.Module:
    if ptx.nvcc() is None:
        pytest.skip("no nvcc: neither CUDA_HOME nor PATH nor pip has one")
    return ptx.parse(ptx.compile(source, arch))


@pytest.fixture(scope="module")
def table() -> ptx.Module:
    return compiled("".join(asm_kernel(f"case_{i}", *c[:3], *c[4:]) for i, c in enumerate(CASES)), "compute_90")


def launch(kernel: ptx.Kernel, arrays, out_shape, out_dtype, extra=(), *, block=N, grid=1, shared=0, **options):
    """Runs a kernel that takes the arrays, then one output, then the rest; the output comes back."""
    memory = ptx.Memory()
    addresses = [memory.put(a) for a in arrays]
    out = memory.alloc(int(np.prod(out_shape)) * np.dtype(out_dtype).itemsize)
    ptx.run(kernel, grid, block, shared, [*addresses, out, *extra], memory, **options)
    return memory.get(out, out_dtype, out_shape)


@pytest.mark.parametrize("i", range(len(CASES)), ids=[c[0][:60] for c in CASES])
def test_instruction(table, i):
    _, result, kinds, reference, *_ = CASES[i]
    arrays = inputs(kinds, np.random.default_rng(i))
    if CASES[i][0].split(".")[0] in ("lg2", "rsqrt", "sqrt"):
        arrays = [np.abs(arrays[0])]
    if result == "R" and CASES[i][0].startswith(("bfe", "bfi", "shf")):
        arrays[-1] %= 40
    if "f16x2" in CASES[i][0] and "cvt" not in CASES[i][0]:
        arrays = inputs("P" * len(arrays), np.random.default_rng(i))
    out = launch(table.kernel(f"^case_{i}$"), arrays, N, TYPES[result][1])
    with np.errstate(all="ignore"):
        want = np.asarray(reference(*arrays)).astype(TYPES[result][1])
    if ".approx" in CASES[i][0]:
        np.testing.assert_allclose(out, want, rtol=3e-7)
    else:
        np.testing.assert_array_equal(out, want)
        if result == "f":
            ok = ~np.isnan(want)
            np.testing.assert_array_equal(np.signbit(out[ok]), np.signbit(want[ok]))


def test_fma_rounds_once(table):
    """Halfway between two floats but for a summand that float64 would lose."""
    x = np.full(N, 1 + 2.0**-12, np.float32)
    z = np.where(np.arange(N) % 2, 2.0**-60, -(2.0**-60)).astype(np.float32)
    i = next(i for i, case in enumerate(CASES) if case[0] == "fma.rn.f32")
    got = launch(table.kernel(f"^case_{i}$"), [x, x, z], N, np.float32)
    np.testing.assert_array_equal(got, np.float32(1 + 2.0**-11) + np.where(z > 0, np.float32(2.0**-23), np.float32(0)))


@pytest.fixture(scope="module", params=["compute_80", "compute_100"])
def kernels(request) -> ptx.Module:
    """Two architectures, because nvcc has a front end for each that writes in a style of its own."""
    return compiled(SNIPPETS / "snippets_sm80.cu", request.param)


def test_struct_by_value_shuffles_and_barrier(kernels):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 200)).astype(np.float32)
    memory = ptx.Memory()
    y = memory.alloc(12)
    q, t = (0.5, 1.5, 2.5, 3.5), list(range(8))
    params = struct.pack("<QQif8x4f8i", memory.put(x), y, 200, 0.25, *q, *t)
    ptx.run(kernels.kernel("row_sum"), 3, 64, 0, [params], memory)
    want = x.astype(np.float64).sum(1) * 0.25 + 2.5 * np.arange(3) + [1, 2, 4]
    np.testing.assert_allclose(memory.get(y, np.float32, 3), want, rtol=1e-5)


def test_divergent_paths(kernels):
    x = np.random.default_rng(1).integers(-50, 5000, N).astype(np.int32)
    memory = ptx.Memory()
    out = memory.put(np.full(N, 123456, np.int32))
    ptx.run(kernels.kernel("paths"), 1, N, 0, [memory.put(x), out], memory)
    want = []
    for v in x.tolist():
        a, first = 0, v
        while v > 0:
            a += v
            v = v - 3 if v & 1 else v // 2
            if a > 10000:
                break
        case = first & 7
        a = [a + 3, a * 5, a ^ 0x55, a - 11, -a, a << 3, a | 0x1000, None][case]
        want.append(123456 if a is None else a + first * ((first >> 3) & 7))
    assert memory.get(out, np.int32, N).tolist() == want


def test_warp_collectives(kernels):
    x = np.random.default_rng(2).integers(0, 100, 64).astype(np.int32)
    out = launch(kernels.kernel("collectives"), [x], (10, 64), np.int32, block=64)
    for w in (0, 1):
        v, got = x[32 * w : 32 * w + 32], out[:, 32 * w : 32 * w + 32]
        lane = np.arange(32)
        assert (got[0] == np.where(lane % 16 >= 3, v[np.maximum(lane - 3, 0)], v)).all()
        assert (got[1] == np.where(lane % 8 + 5 < 8, v[np.minimum(lane + 5, 31)], v)).all()
        assert (got[2] == v[v & 31]).all()
        assert (got[3].view(np.uint32) == sum(int(b & 1) << i for i, b in enumerate(v))).all()
        assert (got[4] == int((v == 77).any()) + 2).all()
        assert got[5].view(np.uint32).tolist() == [sum(1 << i for i in range(32) if (v[i] ^ a) & 3 == 0) for a in v]
        assert (got[6] == v.sum()).all()
        assert (got[7] == v.max()).all()
        assert (got[8] == np.where(lane < 16, v[lane ^ 1], 16)).all()
        assert (got[9] == (x & 1).sum()).all()


def test_atomics(kernels):
    x = np.random.default_rng(3).integers(0, 1000, N).astype(np.int32)
    memory = ptx.Memory()
    out = memory.put(np.zeros(8, np.int32))
    ptx.run(kernels.kernel("atomics"), 1, N, 0, [memory.put(x), out], memory)
    got = memory.get(out, np.int32, 8)
    assert got[0] == x.sum()
    assert got[1] == x.max()
    assert got[2] == np.bitwise_or.reduce(x)
    assert got[3:4].view(np.float32)[0] == x.sum()
    assert got[4] == N % 7
    assert got[5] == N
    assert got[6] == x.sum()


def test_named_barriers_and_a_spin_lock(kernels):
    out = launch(kernels.kernel("handover"), [], 65, np.int32, block=N)
    assert (out[:32] == 10).all()
    assert (out[32:64] == 11).all()
    assert out[64] == 3


def test_barriers_by_number(kernels):
    x = np.arange(128, dtype=np.int32)
    kernel = kernels.kernel("barrier_by_number")
    assert (launch(kernel, [x], 128, np.int32, [0], block=128, shared=512) == x ^ 32).all()
    with pytest.raises(ptx.PtxError, match="differs between the threads of a warp"):
        launch(kernel, [x], 128, np.int32, [1], block=128, shared=512)


def test_vectors_and_halves(kernels):
    x = np.random.default_rng(4).standard_normal((N, 4)).astype(np.float32)
    got = launch(kernels.kernel("vectors"), [x], (N, 4), np.float32)
    b = t_bf16(x[:, :2]).float().numpy()
    h = x[:, 2:].astype(np.float16).astype(np.float64)
    square = t_bf16(b[:, 1] * b[:, 1]).float().numpy()
    np.testing.assert_array_equal(got[:, 0], b[:, 0] + square)
    np.testing.assert_array_equal(got[:, 1], (h[:, 0] * h[:, 1] + h[:, 0]).astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(got[:, 2:], x[:, 2:])


def test_libdevice_math(kernels):
    x = np.random.default_rng(5).standard_normal(N).astype(np.float32)
    got = launch(kernels.kernel("math"), [x], (10, N), np.float32)
    v = x.astype(np.float64)
    erf = torch.erf(torch.from_numpy(v)).numpy()
    sine = np.sin((x * np.float32(1000)).astype(np.float64))
    want = [np.exp(v), np.log(abs(v)), sine, np.tanh(v), abs(v) ** 1.7, erf, v / (1 + v * v), v * v / 3 + np.exp(v)]
    want += [1 / np.sqrt(abs(v)), np.fmod(x, np.float32(0.3))]
    np.testing.assert_allclose(got, np.stack(want), rtol=2e-6, atol=1e-7)


def test_out_of_bounds_shared_access_raises(kernels):
    kernel = kernels.kernel("out_of_shared")
    assert (launch(kernel, [], 32, np.int32, [0], block=32, shared=128) == 1).all()
    with pytest.raises(ptx.PtxError, match=r"line \d+: `st\.shared.*out of bounds"):
        launch(kernel, [], 32, np.int32, [1], block=32, shared=128)
    assert (launch(kernel, [], 32, np.int32, [-1], block=32, shared=128) == -1).all()


def test_out_of_bounds_and_misaligned_global_access_raises(kernels):
    with pytest.raises(ptx.PtxError, match="misaligned global"):
        launch(kernels.kernel("misaligned"), [], 4, np.int32, [4], block=1)
    with pytest.raises(ptx.PtxError, match="out of bounds"):
        launch(kernels.kernel("misaligned"), [], 4, np.int32, [16], block=1)


def test_unwritten_register_raises(kernels):
    with pytest.raises(ptx.PtxError, match="read before it is written"):
        launch(kernels.kernel("unwritten"), [], N, np.int32)


def test_threads_that_left(kernels):
    x = np.random.default_rng(11).integers(0, 100, 40).astype(np.int32)
    memory = ptx.Memory()
    out = memory.put(np.full(80, -1, np.int32))
    ptx.run(kernels.kernel("leavers"), 1, 40, 0, [memory.put(x), out], memory)
    got = memory.get(out, np.int32, (2, 40))
    for warp in (slice(0, 32), slice(32, 40)):
        stay = x[warp] % 2 == 0
        assert (got[0, warp][stay] == x[warp][stay].sum()).all()
        assert (got[1, warp][stay] == x[warp][stay][0]).all()
        assert (got[:, warp][:, ~stay] == -1).all()


def test_calls_of_a_function(kernels):
    def power(a, b, n):
        return (b, a) if n < 0 else (a**n, a**n + b)

    x, i = np.arange(64, dtype=np.int32) % 9, np.arange(64)
    got = launch(kernels.kernel("function_twice"), [x], 64, np.int64, block=64)
    pairs = [power(*power(int(v), int(k), int(v) - 4), int(k) % 2) for v, k in zip(x, i, strict=True)]
    assert got.tolist() == [a + 3 * b for a, b in pairs]


def test_a_call_is_an_error_where_it_is_reached(kernels):
    assert (launch(kernels.kernel("calls"), [], 32, np.int32, [2], block=32) == 2).all()
    with pytest.raises(ptx.UnknownInstruction, match="a call is not known"):
        launch(kernels.kernel("calls"), [], 32, np.int32, [3], block=32)


def test_atomics_of_halves_and_ignored_copies(kernels):
    memory = ptx.Memory()
    x, out = np.arange(1, 33, dtype=np.int32), memory.put(np.zeros(40, np.int32))
    ptx.run(kernels.kernel("halves_and_ignored"), 1, 32, 256, [memory.put(x), out], memory)
    got = memory.get(out, np.int32, 40)
    count = np.array([11, 11, 10])
    np.testing.assert_array_equal(got[:3].view(np.float16).reshape(3, 2), np.stack([count, 2 * count], 1))
    np.testing.assert_array_equal(ptx.from_bf16(got[3:6]).reshape(3, 2), np.stack([count, count / 2], 1))
    np.testing.assert_array_equal(got[8:], np.where(np.arange(32) < 16, 0, x))


def test_generic_addresses(kernels):
    x = np.arange(64, dtype=np.int32)
    i = np.arange(64)
    got = launch(kernels.kernel("generic"), [x], 64, np.int32, block=64)
    np.testing.assert_array_equal(got, 2 * np.choose(i % 3, [x, 100 + i, 5 + i % 2]))


def test_table_jump(kernels):
    x = np.random.default_rng(12).integers(0, 3, N).astype(np.int32)
    np.testing.assert_array_equal(launch(kernels.kernel("table_jump"), [x], N, np.int32), 7 + x)


def test_copy_of_an_unwritten_register_is_no_use_of_it():
    text = "mov.b32 %r3, %r2; mov.b32 %r4, %r3"
    ptx.run(ptx.parse(HAND_WRITTEN.replace("LINE", text)).kernel(), 1, 32)
    with pytest.raises(ptx.PtxError, match="%r4 is read before it is written"):
        ptx.run(ptx.parse(HAND_WRITTEN.replace("LINE", f"{text}; add.s32 %r5, %r4, 1")).kernel(), 1, 32)


HAND_WRITTEN = """.version 9.0
.target sm_80
.address_size 64
.visible .entry k()
{
.reg .f32 %f<3>; .reg .b32 %r<9>; .reg .pred %p<2>; .reg .b64 %rd<2>;
mov.f32 %f1, 0f3F800000; mov.u32 %r1, 1;
LINE;
ret;
}
"""
UNKNOWN = [
    ("vadd.s32.s32.s32 %r2, %r1, %r1", "instruction 'vadd' is not known"),
    ("add.rn.sometimes.f32 %f2, %f1, %f1", r"modifier \.sometimes is not known"),
    ("add.f8 %f2, %f1, %f1", "type 'f8' is not known"),
    ("add.f32 %f2, %f1, 1", r"an integer literal as \.f32 is not known"),
    ("add.s32 %rd1, %r1, %r1", r"%rd1, a \.b64 register, as \.s32, is not known"),
    ("add.s32 %r2, %f1, %p1", r"%p1, a \.pred register, as \.s32, is not known"),
    ("fma.f32 %f2, %f1, %f1, %f1", "a form without rounding is not known"),
    ("setp.xx.s32 %p1, %r1, %r1", r"a form without any of \.eq.* is not known"),
    ("ld.global.L3::often.u32 %r2, [%rd1]", r"modifier \.L3::often is not known"),
    ("cp.async.cg.shared.global [%r1], [%rd1], 4", "a copy of 4 bytes is not known"),
    (
        "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%f1}, {%f1}, {%f1}, {%f1}",
        "a form without any of .* is not known",
    ),
    ("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r2}, [%r1]", r"1 registers for \.x2 is not known"),
    ("mov.u32 %r2, %sometimes", "%sometimes is not known"),
    ("mov.u32 %r2, nowhere", "nowhere is not known"),
    ("cvt.rn.e4m3x2.f32 %r2, %f1, %f1", r"a form without \.satfinite is not known"),
    ("bra nowhere", "target .* is not known"),
]


@pytest.mark.parametrize(("line", "why"), UNKNOWN, ids=[line.split()[0] for line, _ in UNKNOWN])
def test_unknown_raises_and_names_the_line(line, why):
    with pytest.raises(ptx.PtxError, match=r"line 8: `.*`: .*" + why):
        ptx.run(ptx.parse(HAND_WRITTEN.replace("LINE", line)).kernel(), 1, 32)


@pytest.mark.parametrize("arch", ["sm90a", "sm100a"])
def test_known_forms(arch):
    text = (SNIPPETS / f"forms_{arch}.ptx").read_text(encoding="utf-8")
    assert ptx.unknown(ptx.parse(text).kernel()) == []


def test_unknown_is_an_error_only_where_it_is_reached():
    kernel = ptx.parse(
        HAND_WRITTEN.replace("LINE", "setp.ne.u32 %p1, %r1, 1; @%p1 vadd.s32.s32.s32 %r2, %r1, %r1")
    ).kernel()
    assert len(ptx.unknown(kernel)) == 1
    ptx.run(kernel, 1, 32)


def test_deadlock_is_told(kernels):
    with pytest.raises(ptx.PtxError, match=r"deadlock: 32 threads from 0 at line \d+: `bar.sync 3, 64`"):
        launch(kernels.kernel("half_a_barrier"), [], 1, np.int32, block=64)


@pytest.mark.parametrize("seed", [None, 0])
def test_async_copy(kernels, seed):
    x = np.random.default_rng(6).integers(-100, 100, 4 * 64).astype(np.int32)
    kernel = kernels.kernel("async_copyILb1E")
    got = launch(kernel, [x], 5 * 64, np.int32, [202], block=64, shared=4096, seed=seed)
    np.testing.assert_array_equal(got[:256], np.where(np.arange(256) < 202, x, 0))
    np.testing.assert_array_equal(got[256:], x[:64])


def test_async_copy_without_its_wait(kernels):
    x = np.arange(256, dtype=np.int32)
    kernel = kernels.kernel("async_copyILb0E")
    late = launch(kernel, [x], 5 * 64, np.int32, [256], block=64, shared=4096)
    assert (late[:256] == x).all()
    assert (late[256:] == -1).all()
    early = launch(kernel, [x], 5 * 64, np.int32, [256], block=64, shared=4096, delay_copies=False)
    assert (early[256:] == x[:64]).all()


def test_ldmatrix(kernels):
    x = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    got = launch(kernels.kernel("matrices"), [x], (32, 8, 2), np.uint16, block=32, shared=512)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        assert (got[lane, :4] == x[:, g, 2 * t : 2 * t + 2]).all()
        assert (got[lane, 4:] == x[:, 2 * t : 2 * t + 2, g]).all()


# What a lane's elements of A and B are, as the PTX ISA lists them for each shape: element -> (row, column).
A_PLACES = {
    ("16", 16): lambda i, g, t: (g + 8 * (i in (2, 3, 6, 7)), 2 * t + i % 2 + 8 * (i >= 4)),
    ("16", 8): lambda i, g, t: (g + 8 * (i >= 2), 2 * t + i % 2),
    ("32", 8): lambda i, g, t: (g + 8 * (i in (1, 3)), t + 4 * (i >= 2)),
    ("32", 4): lambda i, g, t: (g + 8 * i, t),
    ("8", 32): lambda i, g, t: (g + 8 * (i in (4, 5, 6, 7, 12, 13, 14, 15)), 4 * t + i % 4 + 16 * (i >= 8)),
    ("8", 16): lambda i, g, t: (g + 8 * (i >= 4), 4 * t + i % 4),
}
B_PLACES = {
    ("16", 16): lambda i, g, t: (2 * t + i % 2 + 8 * (i >= 2), g),
    ("16", 8): lambda i, g, t: (2 * t + i, g),
    ("32", 8): lambda i, g, t: (t + 4 * i, g),
    ("32", 4): lambda i, g, t: (t, g),
    ("8", 32): lambda i, g, t: (4 * t + i % 4 + 16 * (i >= 4), g),
    ("8", 16): lambda i, g, t: (4 * t + i, g),
}
MMA = [
    ("m16n8k16", "f32", "bf16", "bf16"),
    ("m16n8k8", "f32", "bf16", "bf16"),
    ("m16n8k16", "f32", "f16", "f16"),
    ("m16n8k16", "f16", "f16", "f16"),
    ("m16n8k8", "f32", "f16", "f16"),
    ("m16n8k8", "f32", "tf32", "tf32"),
    ("m16n8k4", "f32", "tf32", "tf32"),
    ("m16n8k32", "s32", "s8", "u8"),
    ("m16n8k16", "s32", "u8", "u8"),
    ("m16n8k32", "f32", "e4m3", "e5m2"),
    ("m16n8k32", "f16", "e5m2", "e4m3"),
]
ELEMENTS = {
    "bf16": (2, torch.bfloat16), "f16": (2, torch.float16), "tf32": (4, torch.float32), "s8": (1, torch.int8),
    "u8": (1, torch.uint8), "e4m3": (1, torch.float8_e4m3fn), "e5m2": (1, torch.float8_e5m2),
}  # fmt: skip


def mma_registers(row) -> tuple[int, int, int]:
    """How many registers A, B and C have."""
    shape, d, a, _ = row
    k, size = int(shape.split("k")[1]), ELEMENTS[a][0]
    return 16 * k * size // 128, 8 * k * size // 128, 2 if d == "f16" else 4


def mma_kernel(i: int, row) -> str:
    shape, d, a, b = row
    na, nb, nc = mma_registers(row)
    kind, constraint = {"f32": ("float", "f"), "f16": ("unsigned", "r"), "s32": ("int", "r")}[d]
    place = iter(range(99))
    lists = ["{" + ",".join(f"%{next(place)}" for _ in range(n)) + "}" for n in (nc, na, nb, nc)]
    given = [f'"r"(a[lane * {na} + {j}])' for j in range(na)] + [f'"r"(b[lane * {nb} + {j}])' for j in range(nb)]
    given += [f'"{constraint}"(c[lane * {nc} + {j}])' for j in range(nc)]
    results = ", ".join(f'"={constraint}"(d[lane * {nc} + {j}])' for j in range(nc))
    return (
        f'extern "C" __global__ void mma_{i}(const unsigned* a, const unsigned* b, const {kind}* c, {kind}* d) {{'
        f" int lane = threadIdx.x;"
        f' asm volatile("mma.sync.aligned.{shape}.row.col.{d}.{a}.{b}.{d} {", ".join(lists)};"'
        f" : {results} : {', '.join(given)}); }}\n"
    )


@pytest.fixture(scope="module")
def products() -> ptx.Module:
    return compiled("".join(mma_kernel(i, row) for i, row in enumerate(MMA)), "compute_89")


@pytest.mark.parametrize("i", range(len(MMA)), ids=["-".join(row) for row in MMA])
def test_mma(products, i):
    shape, d, a, b = MMA[i]
    k = int(shape.split("k")[1])
    na, nb, _ = mma_registers(MMA[i])
    gen = torch.Generator().manual_seed(i)
    fragments, matrices = [], []
    for kind, count, places, size in ((a, na, A_PLACES, (16, k)), (b, nb, B_PLACES, (k, 8))):
        itemsize, dtype = ELEMENTS[kind]
        if dtype in (torch.int8, torch.uint8):
            low = -128 if dtype == torch.int8 else 0
            matrix = torch.randint(low, low + 256, size, dtype=dtype, generator=gen)
        else:
            matrix = torch.randn(size, generator=gen).to(dtype)
        raw = matrix.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[itemsize]).numpy()
        place = places[str(8 * itemsize), k]
        lanes = [[raw[place(e, lane // 4, lane % 4)] for e in range(4 * count // itemsize)] for lane in range(32)]
        fragments.append(np.array(lanes, raw.dtype).view(np.uint32))
        values = matrix.double().numpy()
        if kind == "tf32":
            values = (raw & ~0x1FFF).view(np.float32).astype(np.float64)
        matrices.append(values)
    dtype = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[d]
    c = (torch.randn((16, 8), generator=gen).numpy() * 100).astype(dtype)
    at = [[(lane // 4 + 8 * (e >= 2), lane % 4 * 2 + e % 2) for e in range(4)] for lane in range(32)]
    c_lanes = np.array([[c[p] for p in lane] for lane in at])
    got = launch(products.kernel(f"^mma_{i}$"), [*fragments, c_lanes], (32, 4), dtype, block=32)
    want = matrices[0] @ matrices[1] + c
    want = np.array([[want[p] for p in lane] for lane in at])
    np.testing.assert_allclose(got, want, rtol={"f32": 1e-6, "f16": 1e-3, "s32": 0}[d], atol=1e-6)


@pytest.mark.parametrize("seed", [None, 1])
def test_gemm_matches_float64(kernels, seed):
    rng = np.random.default_rng(7)
    a, b = (ptx.bf16(rng.standard_normal((64, 128))) for _ in range(2))
    kernel = kernels.kernel("gemmILb1E")
    got = launch(kernel, [a, b], (64, 64), np.float32, [128], block=128, shared=20480, seed=seed)
    want = ptx.from_bf16(a).astype(np.float64) @ ptx.from_bf16(b).astype(np.float64).T
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_gemm_without_its_wait_is_wrong(kernels):
    rng = np.random.default_rng(7)
    a, b = (ptx.bf16(rng.standard_normal((64, 128))) for _ in range(2))
    got = launch(kernels.kernel("gemmILb0E"), [a, b], (64, 64), np.float32, [128], block=128, shared=20480)
    assert np.isnan(got).any()


@pytest.fixture(scope="module")
def hopper() -> ptx.Module:
    return compiled(SNIPPETS / "snippets_sm90.cu", "compute_90a")


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_pipeline_of_bulk_copies(hopper, seed):
    x = np.random.default_rng(8).integers(0, 1000, (7, 64)).astype(np.int32)
    got = launch(hopper.kernel("pipeline"), [x], (7, 64), np.int32, [7, 0], block=96, shared=1024, seed=seed)
    np.testing.assert_array_equal(got, x + 1)


def test_pipeline_with_planted_faults(hopper):
    x = np.random.default_rng(8).integers(0, 1000, (7, 64)).astype(np.int32)

    def run(fault):
        return launch(hopper.kernel("pipeline"), [x], (7, 64), np.int32, [7, fault], block=96, shared=1024)

    with pytest.raises(ptx.PtxError, match=r"arrivals at an mbarrier that expects 0 more|the block ends while"):
        run(1)
    with pytest.raises(ptx.PtxError, match="deadlock"):
        run(2)
    with pytest.raises(ptx.PtxError, match="arrivals at an mbarrier"):
        run(3)
    with pytest.raises(ptx.PtxError, match=r"arrivals at an mbarrier that expects 0 more|the block ends while"):
        run(4)


def test_bulk_store(hopper):
    x = np.arange(256, dtype=np.int32)
    for wait, fence in ((1, 1), (2, 2)):
        got = launch(hopper.kernel("bulk_store"), [x], 256, np.int32, [wait, fence], block=64, shared=1024)
        np.testing.assert_array_equal(got, 2 * x)
    with pytest.raises(ptx.PtxError, match="may still read its shared memory"):
        launch(hopper.kernel("bulk_store"), [x], 256, np.int32, [0, 1], block=64, shared=1024)
    with pytest.raises(ptx.PtxError, match=r"no fence\.proxy\.async came between"):
        launch(hopper.kernel("bulk_store"), [x], 256, np.int32, [1, 0], block=64, shared=1024)


def test_bulk_reductions(hopper):
    x = np.random.default_rng(13).standard_normal(256).astype(np.float32)
    memory = ptx.Memory()
    out, tensor = memory.put(np.ones(256, np.float32)), memory.put(np.full(256, 2, np.float32))
    map = memory.tensor_map(tensor, (16, 16), (64,), (16, 16), 4, dtype=np.float32)
    ptx.run(hopper.kernel("bulk_add"), 1, 64, 1024, [memory.put(x), out, map], memory)
    np.testing.assert_array_equal(memory.get(out, np.float32, 256), x + np.float32(1))
    np.testing.assert_array_equal(memory.get(tensor, np.float32, 256), x + np.float32(2))


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_tensor_tile(hopper, swizzle):
    """A tile of 8 rows that hangs over two edges: zeros outside, 16-byte units swizzled, the store clipped."""
    width = (swizzle or 96) // 2
    x = np.random.default_rng(9).integers(1, 1000, (20, 88)).astype(np.uint16)
    memory = ptx.Memory()
    target, out = memory.put(np.zeros_like(x)), memory.alloc(16 * width)
    maps = [memory.tensor_map(a, (88, 20), (176,), (width, 8), 2, swizzle) for a in (memory.put(x), target)]
    at_x, at_y = 88 - width + 3, -2
    ptx.run(hopper.kernel("4tile"), 1, 64, 4096, [*maps, out, 8 * width, at_x, at_y], memory)
    padded = np.zeros((24, 88 + width), np.uint16)
    padded[2:22, :88] = x
    want = padded[:8, at_x : at_x + width].reshape(8, -1, 8)
    units = want.shape[1]
    swizzled = np.empty_like(want)
    for row in range(8):
        for unit in range(units):
            # Which 128-byte line of its pattern the row is in, when lines hold 128 / swizzle rows.
            line = row * swizzle // 128 if swizzle else 0
            swizzled[row, unit ^ (line & (units - 1) if swizzle else 0)] = want[row, unit]
    np.testing.assert_array_equal(memory.get(out, np.uint16, (8, units, 8)), swizzled)
    stored = np.zeros_like(x)
    stored[:6, at_x:] = 2 * x[:6, at_x:]
    np.testing.assert_array_equal(memory.get(target, np.uint16, x.shape), stored)


def shared_layout(span: int, mn_major: bool) -> tuple[tuple, bytes]:
    """A (64, 64) bf16 matrix in boxes of `span` bytes: the box, and the kernel's struct Layout. 16: no swizzle."""
    width, rows = span // 2, 64
    boxes, panel = 64 // width, rows * span
    if mn_major:  # a box has 64 rows of k; a step of 16 of them
        offsets = [16 * span * k for k in range(4)]
        leading, stride = (128, panel) if span == 16 else (panel, 8 * span)
    else:  # a step of k is 32 bytes
        offsets = [32 * k // span * panel + 32 * k % span for k in range(4)]
        leading, stride = (panel if span == 16 else 16), 8 * span
    kind = {16: 0, 128: 1, 64: 2, 32: 3}[span]
    descriptor = leading >> 4 << 16 | stride >> 4 << 32 | kind << 62
    return (width, 64), struct.pack("<6iQ", boxes, width, *offsets, descriptor)


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("span", [16, 32, 64, 128])
@pytest.mark.parametrize(("a_major", "b_major", "registers"), [(0, 0, 0), (1, 1, 0), (0, 1, 1)])
def test_wgmma(hopper, span, a_major, b_major, registers, seed):
    rng = np.random.default_rng(10)
    a, b = (ptx.bf16(rng.standard_normal((64, 64))) for _ in range(2))  # (m, k) and (n, k)
    got = run_product(hopper, a, b, span, a_major, b_major, registers, 0, seed=seed)
    want = ptx.from_bf16(a).astype(np.float64) @ ptx.from_bf16(b).astype(np.float64).T
    np.testing.assert_allclose(got, np.stack([want, want]) * (1 if registers else -1), atol=1e-5)


def run_product(hopper, a, b, span, a_major, b_major, registers, fault, **options):
    memory = ptx.Memory()
    maps, layouts = [], []
    for matrix, major in ((a, a_major), (b, b_major)):
        box, layout = shared_layout(span, bool(major))
        address = memory.put(matrix.T if major else matrix)
        maps.append(memory.tensor_map(address, (64, 64), (128,), box, 2, span if span > 16 else 0))
        layouts.append(layout)
    out = memory.alloc(2 * 64 * 64 * 4)
    kernel = hopper.kernel(f"productILb{a_major}ELb{b_major}ELb{registers}E")
    ptx.run(kernel, 1, 256, 16384 + 8, [*maps, memory.put(a), out, *layouts, fault], memory, **options)
    return memory.get(out, np.float32, (2, 64, 64))


def test_wgmma_with_planted_faults(hopper):
    a, b = (ptx.bf16(np.ones((64, 64))) for _ in range(2))
    with pytest.raises(ptx.PtxError, match="read while a wgmma that writes it is in flight"):
        run_product(hopper, a, b, 128, 0, 0, 0, 1)
    with pytest.raises(ptx.PtxError, match=r"no wgmma\.fence"):
        run_product(hopper, a, b, 128, 0, 0, 0, 2)


WGMMA = [
    ("m64n8k16", "f32", "f16", "f16"),
    ("m64n8k16", "f16", "f16", "f16"),
    ("m64n8k16", "f32", "bf16", "bf16"),
    ("m64n8k8", "f32", "tf32", "tf32"),
    ("m64n8k32", "f32", "e4m3", "e5m2"),
    ("m64n8k32", "f16", "e5m2", "e4m3"),
    ("m64n8k32", "s32", "s8", "u8"),
]


def wgmma_kernel(shape: str, d: str, a: str, b: str) -> str:
    """A of 64 rows and B of 8, of 32 bytes each, without swizzle; twice the product, the second time onto the first."""
    registers = 2 if d == "f16" else 4
    word = "b32" if d == "f16" else d
    scales = "" if d == "s32" else ", 1, 1" + (", 0, 0" if shape.endswith("k16") else "")
    product = ",".join(f"d{i}" for i in range(registers))
    product = f"wgmma.mma_async.sync.aligned.{shape}.{d}.{a}.{b} {{{product}}}, a, b"
    copies = "".join(f"ld.global.u16 h, [image+{2 * i}]; st.shared.u16 [to+{2 * i}], h;\n" for i in range(9))
    stores = "".join(f"st.global.{word} [out+{4 * i}], d{i};\n" for i in range(registers))
    return f"""
.version 9.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 from, .param .u64 into)
{{
.shared .align 128 .b8 tile[2304];
.reg .b64 image, out, a, b, at; .reg .b32 t, to, start; .reg .b16 h; .reg .pred p;
.reg .{word} d<{registers}>;
ld.param.u64 image, [from]; ld.param.u64 out, [into];
mov.u32 t, %tid.x; mov.u32 start, tile;
mul.wide.u32 at, t, 18; add.s64 image, image, at; mad.lo.u32 to, t, 18, start;
{copies}
mul.wide.u32 at, t, {4 * registers}; add.s64 out, out, at;
fence.proxy.async.shared::cta;
bar.sync 0;
shr.u32 start, start, 4; cvt.u64.u32 at, start;
or.b64 a, at, {1024 >> 4 << 16 | 128 >> 4 << 32};
add.s64 at, at, {2048 >> 4}; or.b64 b, at, {128 >> 4 << 16 | 128 >> 4 << 32};
wgmma.fence.sync.aligned;
setp.ne.u32 p, start, start;
{product}, p{scales};
{product}, 1{scales};
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
{stores}
ret;
}}
"""


@pytest.mark.parametrize("row", WGMMA, ids=["-".join(row) for row in WGMMA])
def test_wgmma_of_every_type(row):
    _, d, *kinds = row
    gen = torch.Generator().manual_seed(3)
    images, values = [], []
    for kind, rows in zip(kinds, (64, 8), strict=True):
        itemsize, dtype = ELEMENTS[kind]
        if dtype in (torch.int8, torch.uint8):
            low = -128 if dtype == torch.int8 else 0
            matrix = torch.randint(low, low + 256, (rows, 32), dtype=dtype, generator=gen)
        else:
            matrix = torch.randn((rows, 32 // itemsize), generator=gen).to(dtype)
        raw = matrix.view(torch.uint8).numpy()
        images.append(raw.reshape(rows, 2, 16).transpose(1, 0, 2).reshape(-1))
        if kind == "tf32":
            matrix = (matrix.view(torch.int32) & ~0x1FFF).view(torch.float32)
        values.append(matrix.double().numpy())
    want = 2 * values[0] @ values[1].T
    dtype = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[d]
    kernel = ptx.parse(wgmma_kernel(*row)).kernel()
    assert ptx.unknown(kernel) == []
    got = launch(kernel, [np.concatenate(images)], (128, 4), dtype, block=128)
    for thread in range(128):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        rows, columns = 16 * warp + g + np.array([0, 0, 8, 8]), 2 * t + np.array([0, 1, 0, 1])
        np.testing.assert_allclose(
            got[thread], want[rows, columns], rtol={"f32": 1e-6, "f16": 2e-3, "s32": 0}[d], atol=1e-5
        )


def test_wgmma_without_the_fence_between_proxies():
    text = wgmma_kernel(*WGMMA[0]).replace("fence.proxy.async.shared::cta;", "")
    with pytest.raises(ptx.PtxError, match=r"wgmma.*no fence\.proxy\.async came between"):
        launch(ptx.parse(text).kernel(), [np.zeros(2304, np.uint8)], (128, 4), np.float32, block=128)
