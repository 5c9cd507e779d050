"""onekernel: write one world, run thousands.

    step = onekernel.compile(env.step)           # a pure JAX function of ONE world
    states = jax.vmap(step)(states, actions)     # one kernel for all worlds, on a CPU or a GPU

docs/onekernel.md says how it works and what it cannot do. The files, in the order of the work:
trace.py and primitives.py take the traced function apart into scalars (arrays.py: how values are
held meanwhile), graph.py is what they become, codegen.py writes it down for LLVM (vector_math.py:
sine and the like; layout.py, staging.py, slots.py: what lies where in memory; parts.py: large
kernels in pieces), cpu.py, machine_code.py and cuda.py make it machine code that XLA can call
(ffi.py), cache.py and fingerprint.py remember it, api.py is `compile`. mjx.py is a lean constraint
solver for MuJoCo XLA, hfield.py spheres on uneven ground. dense.py stands apart: `dot_general`,
products of small matrices for the layers of networks on CPUs."""

import importlib

from onekernel.api import Fallback, compile
from onekernel.dense import dot_general

__all__ = ["Fallback", "compile", "dot_general"]
__version__ = "0.1.0"


def __getattr__(name: str):
    """mjx and hfield, which need MuJoCo, are imported when they are first asked for."""
    if name in ("hfield", "mjx"):
        return importlib.import_module(f"onekernel.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
