"""The one door to Pallas: which backend, how it is interpreted, and its warning.

Kernels are written for the Triton backend: one source that XLA compiles for a CPU when interpreted and
that lowers to CUDA. JAX has announced that it will replace that backend; when it does, this file changes.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax

# Interpreting imports the TPU interpreter when it is first used, which changes what the trace depends on:
# the first program would be compiled twice (JAX 0.11.2).
import jax.experimental.pallas.tpu
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# It comes while a program is lowered, far from any call of ours that could catch it.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One kernel as a platform runs it.

    Attributes:
        kernel: takes the references of the operands, then that of the output.
        grid: programs along each axis.
        num_warps: warps per program; not for a CPU.
        num_stages: depth of the software pipeline; not for a CPU.
    """

    kernel: Callable[..., None]
    grid: tuple[int, ...]
    num_warps: int = 4
    num_stages: int = 2


def launch(cpu: Launch, gpu: Launch, operands: Sequence[jax.Array], name: str) -> jax.Array:
    """Runs a kernel that fills in the last operand, in place where that is donated or a temporary.

    A CPU interprets `cpu`: the kernel becomes an XLA loop over the grid. Other platforms compile `gpu`.
    The choice is made for the platform that the program is lowered for, not for the one it is traced on.
    """
    last = operands[-1]

    def bind(chosen: Launch, interpret: bool) -> Callable[..., jax.Array]:
        anywhere = pl.BlockSpec(memory_space=pl.ANY)
        return pl.pallas_call(
            chosen.kernel,
            out_shape=jax.ShapeDtypeStruct(last.shape, last.dtype),
            grid=chosen.grid,
            in_specs=[anywhere] * len(operands),
            out_specs=anywhere,
            input_output_aliases={len(operands) - 1: 0},
            compiler_params=triton.CompilerParams(num_warps=chosen.num_warps, num_stages=chosen.num_stages),
            interpret=interpret,
            name=name,
        )

    return lax.platform_dependent(*operands, cpu=bind(cpu, True), default=bind(gpu, False))
