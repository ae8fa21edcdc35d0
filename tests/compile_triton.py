"""Compiles every Triton kernel for a GPU, which needs none: what the interpreter accepts the compiler may refuse.

python -m tests.compile_triton prints the name of each kernel that compiled. The compiler is asked directly, as nothing
in Triton's public interface does without a device, so this is only for the version that constraints.txt names.
"""

from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowprec.kernels import triton_backward, triton_forward

TARGET = GPUTarget("cuda", 90, 32)
NUMBERS = ("tiles", "blocks", "samples", "channels", "length", "count", "k", "candidates")
DATA = ("x", "y", "residual", "grad_y", "kept", "dx", "dresidual")
TYPES = {
    **dict.fromkeys(NUMBERS, "i32"),
    **dict.fromkeys(DATA, "*fp16"),
    "bits": "*u8", "codes": "*i32", "extremes": "*i64", "constant": "fp32", "eps": "fp32",
}  # fmt: skip


def compile_for_gpu(kernel: Any, **fixed: Any) -> None:
    """`fixed` holds the compile-time arguments, and None for the tensors that are not there."""
    constants = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "*fp32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    triton.compile(source, target=TARGET, options={"num_warps": 8, "enable_fp_fusion": True})
    print(kernel.__name__)


def main() -> None:
    for tile in ({"R": 64, "B": 128, "AXIS": 0}, {"R": 1, "B": 1024, "AXIS": 1}):
        compile_for_gpu(triton_forward.sum_kernel, **tile)
        compile_for_gpu(triton_forward.deviation_kernel, **tile)
        compile_for_gpu(triton_forward.extremes_kernel, K=16, **tile)
        absent = {"weight": None, "bias": None, "grad_mean": None, "grad_scale": None}
        for l1, from_output in product((True, False), repeat=2):
            flags = {"L1": l1, "RELU": True, "FROM_OUTPUT": from_output, "BITS": l1 or not from_output}
            bits = {"ACTIVE": not from_output, "SIGN": from_output and l1}
            left_out = {"residual": None, "dresidual": None} if from_output else absent
            compile_for_gpu(triton_forward.apply_kernel, **flags, **bits, **tile, **left_out)
            compile_for_gpu(triton_backward.gradient_sums_kernel, **flags, **tile)
            compile_for_gpu(triton_backward.dx_kernel, **flags, **tile, **left_out)
            if not l1:
                compile_for_gpu(triton_backward.extremes_dx_kernel, K=16, **flags, **tile)
    compile_for_gpu(triton_forward.choose_kernel, Q=4096)


if __name__ == "__main__":
    main()
