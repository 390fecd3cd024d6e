"""Small kernels written in PTX by hand, for instructions that Triton seldom emits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .program import Program

HEADER = ".version 8.7\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 global_smem[];\n"
NAMES = "abcdefgh"


def assemble(body: str, pointers: int, threads: int = 32, registers: str = "", shared_bytes: int = 0) -> Program:
    """Return a kernel with so many pointer parameters; %p0, %p1 … hold them, %tid the thread's number."""
    parameters = ",\n".join(f"\t.param .u64 probe_param_{k}" for k in range(pointers))
    loads = "\n".join(f"\tld.param.b64 %p{k}, [probe_param_{k}];" for k in range(pointers))
    text = (
        f"{HEADER}.visible .entry probe(\n{parameters}\n)\n.reqntid {threads}\n{{\n"
        f"\t.reg .b64 %p<{pointers}>;\n\t.reg .b32 %tid, %r<16>;\n\t.reg .b64 %rd<16>;\n\t.reg .pred %q<8>;\n"
        f"{registers}\n{loads}\n\tmov.u32 %tid, %tid.x;\n{body}\n\tret;\n}}\n"
    )
    return Program(text, shared_bytes)


def apply(code: str, *sources: NDArray[Any], result: Any, fuzz: int | None = None) -> NDArray[Any]:
    """Run `code` once per element, with sources in %a, %b, … and the result in %z.

    `result` is its dtype. %q0 holds for odd threads.
    """
    count = len(sources[0])
    threads = -(-count // 32) * 32
    padded = [np.resize(source, threads) for source in sources]
    output = np.zeros(threads, result)
    lines, declared = [], []
    for k, source in enumerate([*padded, output]):
        name, bits = NAMES[k] if k < len(sources) else "z", 8 * source.itemsize
        declared.append(f"\t.reg .b{max(bits, 16)} %{name};")
        lines.append(f"\tmad.wide.u32 %rd{k}, %tid, {source.itemsize}, %p{k};")
        if name != "z":
            lines.append(f"\tld.global.b{bits} %{name}, [%rd{k}];")
    last = len(sources)
    lines += ["\tand.b32 %r1, %tid, 1;", "\tsetp.ne.s32 %q0, %r1, 0;", f"\t{code}"]
    lines += [f"\tst.global.b{8 * output.itemsize} [%rd{last}], %z;"]
    program = assemble("\n".join(lines), last + 1, threads, "\n".join(declared))
    program.launch([*padded, output], (1,), fuzz=fuzz)
    return output[:count]
