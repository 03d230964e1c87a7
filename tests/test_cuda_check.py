"""tools/cuda_check.py and what it is made of, on stored words of the compiler; one tiny kernel is compiled."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))

import cuda_budget  # noqa: E402
import cuda_check  # noqa: E402
import cuda_toolkit  # noqa: E402
import ptxas  # noqa: E402
import sass  # noqa: E402
import sass_costs  # noqa: E402
import sass_schedule  # noqa: E402

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2gk4oneILi64EEEvPf' for 'sm_80'
ptxas info    : Function properties for _ZN2gk4oneILi64EEEvPf
    168 bytes stack frame, 208 bytes spill stores, 204 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 168 bytes cumulative stack size, 400 bytes cmem[0]
ptxas info    : Compile time = 146.651 ms
ptxas info    : Compiling entry function '_ZN2gk3twoEPf' for 'sm_80'
ptxas info    : Function properties for _ZN2gk3twoEPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers, used 1 barriers, 1040 bytes smem, 400 bytes cmem[0]
ptxas info    : Function properties for helper
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""

# A pipeline's consumer: a spin on a barrier, a product with a mask on one side, and the next turn's address far away.
SASS = """\
\t.section\t.text._ZN2gk4loopEPf,"ax",@progbits
        .global         _ZN2gk4loopEPf
_ZN2gk4loopEPf:
.text._ZN2gk4loopEPf:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
.L_x_0:
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5+0x8], R2 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   LDSM.16.M88.4 R8, [R20+0x800] ;
        /*0050*/                   HMMA.16816.F32.BF16 R24, R4, R8, R24 ;
        /*0060*/                   HMMA.16816.F32.BF16 R28, R4, R10, R28 ;
        /*0070*/                   BRA.U UP0, `(.L_x_2) ;
        /*0080*/                   FSEL R24, R24, -INF, !P1 ;
.L_x_2:
        /*0090*/                   MUFU.EX2 R3, R24 ;
        /*00a0*/               @P2 BRA `(.L_x_4) ;
        /*00b0*/                   CALL.REL.NOINC `($__internal_0_$slow) ;
        /*00c0*/                   STG.E.U16 desc[UR6][R2.64], R3 ;
        /*00d0*/                   EXIT ;
.L_x_4:
        /*00e0*/                   FFMA R3, R3, R3, R5 ;
        /*00f0*/                   BRA `(.L_x_0) ;
$__internal_0_$slow:
        /*0100*/                   IADD3 R1, R1, 0x8, RZ ;
        /*0110*/                   RET.REL.NODEC R6 `(_ZN2gk4loopEPf) ;
.L_x_9:
        /*0120*/                   BRA `(.L_x_9);
"""

HGMMA_REGISTERS = sass.Instruction("", "HGMMA.64x128x16.F32.BF16", "R56, R120, gdesc[UR12].tnspB, R56")
HGMMA_SHARED = sass.Instruction("", "HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR12], R24")


def test_ptxas_numbers() -> None:
    kernels, complaints = ptxas.parse(PTXAS)
    assert kernels == [
        ptxas.Resources("_ZN2gk4oneILi64EEEvPf", 255, 0, 168, 208, 204),
        ptxas.Resources("_ZN2gk3twoEPf", 22, 1040, 8, 0, 0),
    ]
    assert complaints == []


def test_ptxas_complaints_that_it_calls_information() -> None:
    for words in (
        "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to a function call in 'f'",
        "(C7517) warpgroup.wait is injected in around line 78 by compiler to allow use of registers defined by GMMA",
    ):
        assert ptxas.parse(f"{PTXAS}ptxas info    : {words}\n")[1] == [words]


@pytest.mark.parametrize(
    ("whole", "short"),
    [
        ("void gk::fwd<128, 2, true>(__nv_bfloat16 const*, float*)", "fwd<128, 2, true>"),
        ("void a::b::fwd<__nv_bfloat16, (int)64, 8ul>(a::Params<int>)", "fwd<bf16, 64, 8>"),
        ("void a::(anonymous namespace)::fwd<__half, (a::Activation)1>(int)", "fwd<half, Activation(1)>"),
        ("void a::fwd<a::Tile<(int)64, float> >(int)", "fwd<Tile<64, float> >"),
        ("a::plain(float*)", "plain"),
    ],
)
def test_short_names(whole: str, short: str) -> None:
    assert ptxas.short(whole) == short


def test_names_that_would_be_the_same_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptxas, "demangle", lambda names: names)
    assert cuda_check.kernel_names(["a::f(int)", "b::f(int)", "b::g(int)"]) == ["a::f(int)", "b::f(int)", "g"]


def test_sass_instructions_and_labels() -> None:
    (function,) = sass.parse(SASS)
    assert function.name == "_ZN2gk4loopEPf"
    assert len(function.instructions) == 19
    assert function.instructions[3] == sass.Instruction("@!P0", "BRA", "`(.L_x_1)")
    assert function.labels[".L_x_1"] == 2
    assert function.labels["$__internal_0_$slow"] == 16


def test_loops_follow_the_branches_not_the_addresses() -> None:
    (function,) = sass.parse(SASS)
    # The spin shares its head with the loop around it and counts as a part of it; what only a call reaches does not.
    assert [sorted(loop) for loop in sass.loops(function)] == [[2, 3, 4, 5, 6, 7, 8, 9, 10, 14, 15]]


def test_a_function_without_a_loop_counts_whole() -> None:
    (function,) = sass.parse(SASS.replace("BRA `(.L_x_0)", "EXIT").replace("BRA `(.L_x_1)", "EXIT"))
    assert sass.loops(function) == []
    assert sass_costs.main_loop(function, "80").instructions == 19


def test_main_loop_counts() -> None:
    (function,) = sass.parse(SASS)
    loop = sass_costs.main_loop(function, "80")
    assert loop is not None
    assert (loop.instructions, loop.tensor, loop.per_tensor) == (11, 2, 5.5)
    assert loop.pipes["tensor"] == 2 * 16 * 8 * 16 / 256
    assert (loop.pipes["shared"], loop.pipes["mufu"], loop.pipes["fma"], loop.pipes["issue"]) == (16, 8, 2, 11)
    assert loop.bound == "shared"
    assert sass_costs.main_loop(function, "120").bound == "tensor"


def test_of_two_versions_of_a_loop_the_leaner_is_the_main_one() -> None:
    lean = "".join(f"HMMA.16816.F32 R{n}, R4, R8, R24 ;\n" for n in range(4))
    masked = lean + "FSEL R24, R24, -INF, !P1 ;\n" * 4
    epilogue = "HMMA.16816.F32 R0, R4, R8, R24 ;\n"
    lines, at = ["\t.section\t.text.f,"], 0
    for number, body in enumerate((masked, lean, epilogue)):
        lines.append(f".L_x_{number}:")
        for line in [*body.splitlines(), f"@P0 BRA `(.L_x_{number}) ;"]:
            lines.append(f"        /*{at:04x}*/   {line}")
            at += 16
    (function,) = sass.parse("\n".join(lines))
    assert len(sass.loops(function)) == 3
    loop = sass_costs.main_loop(function, "90a")
    assert loop is not None
    assert (loop.instructions, loop.tensor) == (5, 4)


def test_wgmma_reads_shared_memory() -> None:
    assert sass_costs.cycles(HGMMA_REGISTERS, "90a") == {"tensor": 64, "shared": 128 * 16 * 2 / 128}
    assert sass_costs.cycles(HGMMA_SHARED, "90a") == {"tensor": 64, "shared": (128 + 64) * 16 * 2 / 128}


@pytest.mark.parametrize(
    ("name", "pipe", "cost"),
    [
        ("LDSM.16.MT88.4", "shared", 16),
        ("LDSM.16.M88.2", "shared", 8),
        ("LDS.128", "shared", 16),
        ("STS.U16", "shared", 4),
        ("LDGSTS.E.BYPASS.128", "shared", 16),
        ("MUFU.EX2", "mufu", 8),
        ("FFMA", "fma", 1),
        ("IMAD.WIDE", "fma", 2),
        ("FFMA2", "fma", 2),
        ("HFMA2.BF16", "fma", 1),
        ("FMNMX3", "alu", 2),
        ("ISETP.GE.AND", "alu", 2),
        ("SHFL.BFLY", "shuffle", 4),
    ],
)
def test_costs(name: str, pipe: str, cost: float) -> None:
    assert sass_costs.cycles(sass.Instruction("", name, ""), "90a") == {pipe: cost}


def test_width_of_memory_accesses() -> None:
    (function,) = sass.parse(SASS)
    assert sass_costs.wide_share(function) == 16 / 18
    (function,) = sass.parse(SASS.replace("LDSM.16.M88.4 R8, [R20+0x800]", "LDG.E.64 R8, desc[UR6][R8.64]"))
    assert sass_costs.wide_share(function) == 16 / 26
    assert sass_costs.wide_share(sass.Function("f", [])) is None


# --- the schedule ---

# The loop of an attention: scores in one group, p v of the tile before in another, which the softmax may run beside.
SCORES_AND_VALUES = """\
.L_x_0:
WARPGROUP.ARRIVE
HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT
HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24, gsb0
WARPGROUP.ARRIVE
HGMMA.64x64x16.F32.BF16 R56, R120, gdesc[UR16].tnspB, R56, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x1
"""
RELEASE_KEYS = "@!P5 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR18+0x28020], RZ\n"
RELEASE_VALUES = "@!P5 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR18+0x28030], RZ\n"
SOFTMAX = "FMNMX R2, R24, R25, !PT\nFFMA R24, R24, R3, -R2\nMUFU.EX2 R24, R24\nIMAD.MOV.U32 R5, RZ, RZ, R6\n"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0\n"
ROUND = "F2FP.BF16.F32.PACK_AB R120, R25, R24\n"
AGAIN = "@P0 BRA `(.L_x_0)\nEXIT\n"


def function_of(code: str) -> sass.Function:
    lines, at = ["\t.section\t.text.f,"], 0
    for line in code.splitlines():
        lines.append(line if line.endswith(":") else f"        /*{at:04x}*/   {line} ;")
        at += 16
    (function,) = sass.parse("\n".join(lines))
    return function


def schedule_of(code: str) -> tuple[str, str, int | None]:
    (one,) = sass_schedule.schedules(function_of(code))
    assert one.products == 3
    return f"{one.mufu.beside}/{one.mufu.all}", f"{one.arithmetic.beside}/{one.arithmetic.all}", one.late


def test_a_softmax_before_the_last_wait_is_beside_products() -> None:
    code = SCORES_AND_VALUES + RELEASE_KEYS + SOFTMAX + WAIT + RELEASE_VALUES + ROUND + AGAIN
    assert schedule_of(code) == ("1/1", "3/4", 0)


def test_a_wait_that_was_moved_up_leaves_nothing_beside_products() -> None:
    code = SCORES_AND_VALUES + RELEASE_KEYS + WAIT + RELEASE_VALUES + SOFTMAX + ROUND + AGAIN
    assert schedule_of(code) == ("0/1", "0/4", 0)


def test_a_group_is_under_way_until_the_wait_of_the_next_turn() -> None:
    before, loop = ".L_x_0:\n", SCORES_AND_VALUES.removeprefix(".L_x_0:\n")
    code = before + WAIT + RELEASE_VALUES + ROUND + loop + RELEASE_KEYS + SOFTMAX + AGAIN
    assert schedule_of(code) == ("1/1", "3/4", 0)


def test_a_way_around_the_products_counts() -> None:
    skipped = SCORES_AND_VALUES.replace(".L_x_0:\n", ".L_x_0:\n@P1 BRA `(.L_x_1)\n") + ".L_x_1:\n"
    code = skipped + SOFTMAX + WAIT + AGAIN
    assert schedule_of(code) == ("0/1", "0/3", None)


def test_a_release_that_was_moved_down_is_late() -> None:
    code = SCORES_AND_VALUES + SOFTMAX + RELEASE_KEYS + WAIT + RELEASE_VALUES + ROUND + AGAIN
    assert schedule_of(code) == ("1/1", "3/4", 4)
    # by the shortest way to it
    skipped = SCORES_AND_VALUES + "@P1 BRA `(.L_x_1)\n" + SOFTMAX + ".L_x_1:\n" + RELEASE_KEYS + WAIT + AGAIN
    assert schedule_of(skipped) == ("1/1", "3/3", 1)


def test_every_version_of_the_loop_has_a_schedule() -> None:
    good = SCORES_AND_VALUES + SOFTMAX + WAIT + "@P0 BRA `(.L_x_0)\n"
    hoisted = (SCORES_AND_VALUES + WAIT + SOFTMAX + "@P0 BRA `(.L_x_0)\n").replace(".L_x_0", ".L_x_1")
    epilogue = ".L_x_2:\nHGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24, gsb0\n@P0 BRA `(.L_x_2)\nEXIT\n"
    found = sass_schedule.schedules(function_of(good + hoisted + epilogue))
    assert [one.mufu for one in found] == [sass_schedule.Share(1, 1), sass_schedule.Share(0, 1)]
    assert sass_schedule.schedules(sass.parse(SASS)[0]) == []  # mma.sync: nothing is under way


def test_the_worst_version_of_the_loop_is_what_a_kernel_is_held_to() -> None:
    good = SCORES_AND_VALUES + SOFTMAX + RELEASE_KEYS + WAIT + "@P0 BRA `(.L_x_0)\n"
    hoisted = (SCORES_AND_VALUES + WAIT + SOFTMAX + RELEASE_KEYS + AGAIN).replace(".L_x_0", ".L_x_1")
    kernel = cuda_check.inspect("f", ptxas.Resources("f"), function_of(good + hoisted), "90a")
    shown = cuda_check.cells(kernel)
    assert (shown["mufu beside"], shown["math beside"], shown["late"]) == ("1/1 0/1", "100% 0%", "4 4")
    (one,) = cuda_check.Compiled("attention", "90a", 1.0, [kernel]).measured()
    assert (one.mufu_beside, one.math_beside, one.late) == (0, 0, 4)


# --- the budget ---

ONE = cuda_budget.Measured("rms_norm fwd<bf16>", "80", 41, 128, 0, 0, None)
TENSOR = cuda_budget.Measured("grouped_mm fwd", "90a", 168, 0, 0, 0, 3.40)
WHOLE = [("rms_norm", "80"), ("grouped_mm", "90a")]


def budget(*measured: cuda_budget.Measured) -> cuda_budget.Budget:
    fresh = cuda_budget.Budget("", {})
    fresh.replace(measured, WHOLE, "13.0.88")
    return fresh


def test_a_fresh_budget_holds() -> None:
    fresh = budget(ONE, TENSOR)
    assert fresh.kernels["rms_norm fwd<bf16>"]["80"] == {"registers": 48, "shared": 128}
    assert fresh.kernels["grouped_mm fwd"]["90a"] == {"registers": 168, "per_tensor": 3.47}
    assert fresh.failures([ONE, TENSOR], WHOLE) == []


def test_each_number_over_its_budget_is_one_line() -> None:
    fresh = budget(ONE, TENSOR)
    assert fresh.failures([replace(ONE, registers=49), TENSOR], WHOLE) == [
        "rms_norm fwd<bf16> on sm_80: 49 registers, 48 allowed"
    ]
    assert fresh.failures([replace(ONE, shared=256), TENSOR], WHOLE) == [
        "rms_norm fwd<bf16> on sm_80: 256 bytes of static shared memory, 128 allowed"
    ]
    assert fresh.failures([ONE, replace(TENSOR, per_tensor=3.5)], WHOLE) == [
        "grouped_mm fwd on sm_90a: 3.5 instructions per tensor instruction, 3.47 allowed"
    ]
    assert fresh.failures([ONE, replace(TENSOR, per_tensor=None)], WHOLE) == [
        "grouped_mm fwd on sm_90a: no tensor instructions any more"
    ]


def test_spills_need_an_allowance_with_a_reason() -> None:
    spilled = replace(ONE, spill=16, stack=8)
    fresh = budget(spilled)
    assert fresh.failures([spilled], WHOLE) == [
        "rms_norm fwd<bf16> on sm_80: 16 bytes spilled, 0 allowed",
    ]
    assert fresh.failures([replace(ONE, stack=8)], WHOLE) == [
        "rms_norm fwd<bf16> on sm_80: 8 bytes of local memory, 0 allowed",
    ]
    fresh.kernels[ONE.kernel]["80"] |= {"spill": 16}
    assert fresh.failures([spilled], WHOLE) == [
        "rms_norm fwd<bf16> on sm_80: cuda_budget.json allows spills or stack and gives no reason"
    ]
    fresh.kernels[ONE.kernel]["80"] |= {"reason": "outside the loop"}
    assert fresh.failures([spilled], WHOLE) == []
    fresh.replace([spilled], WHOLE, "13.0.88")  # a hand's allowance outlives --write
    assert fresh.failures([spilled], WHOLE) == []


def test_a_kernel_may_not_lose_overlap() -> None:
    overlapping = replace(TENSOR, mufu_beside=100, math_beside=62, late=7)
    fresh = budget(ONE, overlapping)
    kept = {"registers": 168, "per_tensor": 3.47, "mufu_beside": 100, "math_beside": 62, "late": 8}
    assert fresh.kernels["grouped_mm fwd"]["90a"] == kept
    assert fresh.failures([ONE, overlapping], WHOLE) == []
    assert fresh.failures([ONE, replace(overlapping, late=8, math_beside=70)], WHOLE) == []
    assert fresh.failures([ONE, replace(overlapping, mufu_beside=64)], WHOLE) == [
        "grouped_mm fwd on sm_90a: 64 % of the exponentials beside products, 100 wanted"
    ]
    assert fresh.failures([ONE, replace(overlapping, math_beside=None)], WHOLE) == [
        "grouped_mm fwd on sm_90a: 0 % of the arithmetic beside products, 62 wanted"
    ]
    assert fresh.failures([ONE, replace(overlapping, late=234)], WHOLE) == [
        "grouped_mm fwd on sm_90a: 234 instructions from a wait to a release, 8 allowed"
    ]
    assert cuda_budget.over(overlapping, {}) == []  # a file of one's own has no budget


def test_new_and_gone_kernels() -> None:
    fresh = budget(ONE)
    assert fresh.failures([], WHOLE) == [
        "rms_norm fwd<bf16> on sm_80 is in cuda_budget.json but no kernel any more: --write removes it"
    ]
    assert fresh.failures([], [("rms_norm", "90a")]) == []  # not compiled this time
    assert fresh.failures([ONE, replace(TENSOR, spill=4)], WHOLE) == [
        "grouped_mm fwd on sm_90a: 4 bytes spilled, 0 allowed",
        "grouped_mm has kernels that are not in cuda_budget.json, --write puts them there: fwd",
    ]


def test_write_touches_what_was_compiled_alone(tmp_path: Path) -> None:
    fresh = budget(ONE, TENSOR)
    fresh.replace([], [("rms_norm", "80")], "13.1.0")
    assert list(fresh.kernels) == ["grouped_mm fwd"]
    fresh.write(tmp_path / "budget.json")
    assert cuda_budget.Budget.read(tmp_path / "budget.json") == fresh
    assert cuda_budget.Budget.read(tmp_path / "none.json") == cuda_budget.Budget("", {})


def test_attention_is_set_beside_flash_attention_2() -> None:
    def kernel(name: str, instructions: int) -> cuda_check.Kernel:
        loop = sass_costs.Loop(instructions, 256, {"issue": instructions})
        return cuda_check.Kernel(name, ptxas.Resources(name), instructions, loop, None)

    kernels = [
        kernel("flash_attention_fwd_kernel<bfloat16, 64, 128>", 512),
        kernel("flash_attention_fwd_kernel<bfloat16, 128, 64, true>", 870),
        kernel("flash_attention_fwd_kernel<float16, 128, 64, false>", 880),
        kernel("flash_attention_bwd_kernel<bfloat16, 128, 64>", 600),
    ]
    results = [
        cuda_check.Compiled("flash_attention/forward_sm80", arch, 1.0, kernels if arch == "80" else kernels[:1])
        for arch in ("80", "90a")
    ]
    (line,) = cuda_check.anchors(results)
    assert ": 3.40, 0 bytes spilled (flash_attention/forward_sm80 flash_attention_fwd_kernel<bfloat16, 128" in line
    assert cuda_check.anchors(results[1:]) == []


# --- the toolkit ---


def test_architectures() -> None:
    every = cuda_toolkit.architectures(Path("csrc/cuda/rms_norm.cu"))
    assert every == [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ("80", "90a", "100", "120")]
    hopper = ["-gencode=arch=compute_90a,code=sm_90a"]
    assert cuda_toolkit.architectures(Path("csrc/cuda/flash_attention/forward_sm90.cu")) == hopper
    assert cuda_toolkit.architectures(Path("csrc/cuda/flash_attention/forward_sm90.cu"), "8.0") == hopper
    assert cuda_toolkit.architectures(Path("a.cu"), "8.9 12.0+PTX") == [
        "-gencode=arch=compute_89,code=sm_89",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert cuda_toolkit.architecture_numbers(Path("a.cu"), "Ampere;8.0") == [("80", False), ("86", True)]


@pytest.mark.parametrize(("text", "words"), [("7.5", "'7.5' in '7.5' is older"), ("fast", "'fast' in 'fast' is none")])
def test_architectures_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cuda_toolkit.architectures(Path("a.cu"), text)


def fake_nvcc(folder: Path, release: str) -> Path:
    """A toolkit whose compiler says its version and nothing else."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    (folder / "bin" / "nvcc.profile").touch()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    return nvcc


def test_find_nvcc_takes_the_first_that_is_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(cuda_toolkit.sysconfig, "get_path", lambda kind: str(tmp_path / "site"))
    assert cuda_toolkit.find_nvcc() is None
    packaged = fake_nvcc(tmp_path / "site" / "nvidia" / "cu13", "13.0")
    assert cuda_toolkit.find_nvcc() == packaged
    on_path = fake_nvcc(tmp_path / "cuda", "12.9")
    monkeypatch.setenv("PATH", f"{on_path.parent}:/usr/bin:/bin")
    assert cuda_toolkit.find_nvcc() == on_path
    home = fake_nvcc(tmp_path / "home", "12.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert cuda_toolkit.find_nvcc() == home
    old = fake_nvcc(tmp_path / "old", "12.4")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    assert cuda_toolkit.version(old) == (12, 4)
    assert cuda_toolkit.find_nvcc() == on_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert cuda_toolkit.find_nvcc() == on_path


def test_a_wrapper_script_leads_to_its_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fake_nvcc(tmp_path / "cuda", "13.0")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f"#!/bin/sh\n[ $1 = --dryrun ] && echo '#$ _HERE_={real.parent}' >&2\n")
    wrapper.chmod(0o755)
    assert cuda_toolkit.behind_wrapper(wrapper) == real
    link = tmp_path / "link"
    link.symlink_to(real)
    assert cuda_toolkit.behind_wrapper(link) == real


def test_nothing_to_compile_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_toolkit, "find_nvcc", lambda: None)
    with pytest.raises(SystemExit, match=r"needs nvcc and found none .* pip install 'grokkernels\[cuda\]'"):
        cuda_check.main([])


TINY = """\
__global__ void tiny(const float4* x, float4* y, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[i];
}
"""


def nvcc_or_skip() -> Path:
    nvcc = cuda_toolkit.find_nvcc()
    if nvcc is None:
        pytest.skip(f"no nvcc: {cuda_check.INSTALL_NVCC}")
    return nvcc


def test_a_tiny_kernel_from_source_to_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if cuda_check.find_nvdisasm(nvcc_or_skip()) is None:
        pytest.skip(f"no nvdisasm: {cuda_check.INSTALL_NVDISASM}")
    source = tmp_path / "file.cu"
    source.write_text(TINY)
    assert cuda_check.main([str(source), "--arch", "80"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny "))
    assert row.split()[1] == "80"
    assert row.split()[-1] == "100%"
    source.write_text(TINY.replace("y[i] = x[i]", "int unused; y[i] = x[i]"))
    assert cuda_check.main([str(source), "--arch", "80"]) == 1
    assert 'variable "unused" was declared but never referenced' in capsys.readouterr().out
