"""XLA's options in tests: a fifth of the usual time to compile, the same numbers but for rounding.

LLVM's optimiser is left out, fusions are written by XLA's older emitter, whose code is shorter, and
a program is one module for LLVM: in parts for several cores it would take a third longer in all.
Kernels of `onekernel` are compiled as they are for users, whatever these options say, but where a
test asks for `quick_kernels`."""

import contextlib

import jax

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# The same for all of a process, and for those that it starts; JAX's is for the first two.
ENVIRONMENT = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
}


def quick_jit(function):
    """As jax.jit, but quickly compiled, whatever the environment says."""
    return jax.jit(function, compiler_options=QUICK)


def quick_kernels(monkeypatch) -> None:
    """Kernels without LLVM's choice of registers, in this process; they leave no trace in the cache."""
    from llvmlite import binding as llvm  # which some machines have not

    from onekernel import machine_code

    create_target_machine = llvm.Target.create_target_machine

    def without(target, **options):
        return create_target_machine(target, **options | {"opt": 0})

    monkeypatch.setattr(llvm.Target, "create_target_machine", without)
    # Other processes, which large kernels are shared with, would not know of this.
    monkeypatch.setattr(machine_code, "count_cores", lambda: 1)
    monkeypatch.setenv("ONEKERNEL_CACHE", "0")


@contextlib.contextmanager
def optimised():
    """XLA's optimisations come back: for training that takes longer without them."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
