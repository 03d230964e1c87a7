"""A PTX interpreter: runs what nvcc makes of a kernel, with numpy, so that the inline PTX itself is judged.

    module = ptx.parse(ptx.compile(source_or_path, arch="compute_80"))
    kernel = module.kernel("rms_norm_fwd_kernel")     # a regular expression on the mangled or the demangled name
    memory = ptx.Memory()
    x, y = memory.put(array), memory.alloc(array.nbytes)
    ptx.run(kernel, grid=(2, 1, 1), block=(128, 1, 1), shared_bytes=0, args=[x, y, 64, 1e-5], memory=memory)
    memory.get(y, np.float32, array.shape)

An argument is an int, a float, a numpy scalar, or bytes for a struct by value (`struct.pack`, a ctypes structure).
bfloat16 lies in memory as uint16: `ptx.bf16(x)` and `ptx.from_bf16(bits)` convert.

A CUtensorMap by value is `memory.tensor_map(address, shape, strides, box, itemsize, swizzle)`.

What it does not know, it refuses, and names the line: `ptx.UnknownInstruction`, raised where such an instruction is
reached; `ptx.unknown(kernel)` lists them all without running. What a program does wrong is a `ptx.PtxError`: a register
used before it is written or while a wgmma is about to write it, an access out of bounds or misaligned, a missing
fence.proxy.async, a deadlock. Memory starts as NaN; asynchronous copies and products arrive as late as they may
(`delay_copies`), or at random times (`seed`).

Its limits: all lanes that can go on do so together, so it sees few races between warps; blocks run one after another,
so a cluster has one block and nothing waits for another block; approximations are exact, tensor cores sum in float64.
"""

from .block import Block
from .compiler import compile, nvcc
from .interpreter import run, unknown
from .memory import Memory
from .numerics import bf16, from_bf16
from .parser import Kernel, Module, parse
from .types import PtxError, UnknownInstruction

__all__ = [
    "Block",
    "Kernel",
    "Memory",
    "Module",
    "PtxError",
    "UnknownInstruction",
    "bf16",
    "compile",
    "from_bf16",
    "nvcc",
    "parse",
    "run",
    "unknown",
]
