"""XLA's options for references in tests: a fifth of the usual time to compile, the same numbers but
for rounding.

LLVM's optimiser is left out, and fusions are written by XLA's older emitter, whose code is shorter.
Kernels of `onekernel` are compiled as they are for users, whatever these options say."""

import jax

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


def quick_jit(function):
    """As jax.jit, but quickly compiled."""
    return jax.jit(function, compiler_options=QUICK)
