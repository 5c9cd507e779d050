"""The elementary functions of kernels: accuracy, special values, numbers of lanes, GPU code."""

import ctypes
import functools
import platform

import jax
import llvmlite.binding as llvm
import numpy as np
import pytest
import scipy.special
from jax import lax

from onekernel.vector_math import FUNCTIONS, define, define_sincos, function_name

# The exact result (in float64), JAX's function, and the largest error in units of the last place
# (ulp) that is allowed; it is a little more than what millions of random arguments show.
REFERENCES = {
    "sin": (np.sin, lax.sin, 1.6),
    "cos": (np.cos, lax.cos, 1.6),
    "tan": (np.tan, lax.tan, 1.9),
    "exp": (np.exp, lax.exp, 1.1),
    "exp2": (np.exp2, lax.exp2, 1.0),
    "log": (np.log, lax.log, 1.0),
    "log1p": (np.log1p, lax.log1p, 1.5),
    "expm1": (np.expm1, lax.expm1, 1.6),
    "tanh": (np.tanh, lax.tanh, 1.5),
    "sinh": (np.sinh, lax.sinh, 1.8),
    "cosh": (np.cosh, lax.cosh, 1.6),
    "logistic": (scipy.special.expit, lax.logistic, 1.8),
    "atan2": (np.arctan2, lax.atan2, 1.6),
    "atan": (np.arctan, lax.atan, 1.5),
    "asin": (np.arcsin, lax.asin, 1.3),
    "acos": (np.arccos, lax.acos, 1.3),
    "asinh": (np.arcsinh, lax.asinh, 1.9),
    "acosh": (np.arccosh, lax.acosh, 1.9),
    "atanh": (np.arctanh, lax.atanh, 1.2),
    "pow": (np.power, lax.pow, 1.0),
    "cbrt": (np.cbrt, lax.cbrt, 0.8),
    "fmod": (np.fmod, lax.rem, 0.0),
    "erf": (scipy.special.erf, lax.erf, 1.2),
    "erf_inv": (scipy.special.erfinv, lax.erf_inv, 70.0),  # the approximation that XLA has, too
}
WIDTHS = (1, 4, 8, 16)
SMALLEST_NORMAL = 2.0**-126

# Subnormal numbers are not among them: a processor may take them for 0, and JAX's CPU threads do.
SPECIAL = np.float32(
    "0 -0 inf -inf nan 1 -1 2 -2 0.5 -0.5 1.5 -1.5 3 -3 4 88.6 -87 89 -89 104 -104 128 -150 65536"
    " 0.9999999 1.0000001 1e10 -1e10 1e30 -1e30 3.4e38 -3.4e38 1e-5 -1e-5 1e-30 -1e-30"
    " 1.2e-38".split()
)
# The float32 numbers that are closest to a multiple of pi / 2 without being one.
NEAR_QUARTER_TURNS = np.float32(
    [16367173 * 2.0**72, 10741887 * 2.0**11, 16573937 * 2.0**-16, 10057457 * 2.0**62]
)

# LLVM IR that runs a function over arrays of n numbers, n being a multiple of the width. `sincos`
# writes its cosines behind the sines.
LOOP = """
define void @run_{name}(ptr %x, ptr %y, ptr %out, i64 %n) {{
entry:
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %next, %loop ]
  %x_at = getelementptr float, ptr %x, i64 %i
  %y_at = getelementptr float, ptr %y, i64 %i
  %out_at = getelementptr float, ptr %out, i64 %i
  %a = load {type}, ptr %x_at, align 4
  %b = load {type}, ptr %y_at, align 4
  {call}
  %next = add i64 %i, {width}
  %more = icmp ult i64 %next, %n
  br i1 %more, label %loop, label %done
done:
  ret void
}}
"""
CALL = """%r = call {type} @{function}({arguments})
  store {type} %r, ptr %out_at, align 4"""
CALL_SINCOS = """%r = call {{ {type}, {type} }} @{function}({type} %a)
  %s = extractvalue {{ {type}, {type} }} %r, 0
  %c = extractvalue {{ {type}, {type} }} %r, 1
  %behind = getelementptr float, ptr %out_at, i64 %n
  store {type} %s, ptr %out_at, align 4
  store {type} %c, ptr %behind, align 4"""

# x86's control word of floating point, without and with "subnormal numbers are 0" as XLA sets it.
X86_CONTROL = """
declare void @llvm.x86.sse.ldmxcsr(ptr)
define void @set_control(ptr %word) {
  call void @llvm.x86.sse.ldmxcsr(ptr %word)
  ret void
}
"""
CONTROL_DEFAULT = 0x1F80
CONTROL_FLUSH = 0x9FC0
IS_X86 = platform.machine() in ("x86_64", "AMD64")


def program(width: int, inline: bool = False) -> str:
    """LLVM IR of all functions and of a loop for each."""
    type_ = "float" if width == 1 else f"<{width} x float>"
    declarations = set()
    parts = []
    for name in [*FUNCTIONS, "sincos"]:
        if name == "sincos":
            text, needed = define_sincos(width, inline)
            call = CALL_SINCOS.format(type=type_, function=function_name(name, width))
        else:
            text, needed = define(name, width, inline)
            arguments = ", ".join(f"{type_} {x}" for x in ["%a", "%b"][: FUNCTIONS[name]])
            call = CALL.format(type=type_, function=function_name(name, width), arguments=arguments)
        declarations |= needed
        parts.append(text)
        parts.append(LOOP.format(name=name, type=type_, call=call, width=width))
    return "\n".join([*sorted(declarations), *parts])


def optimised(text: str, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    module = llvm.parse_assembly(text)
    module.triple = machine.triple
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    return module


@functools.cache
def compiled(width: int, inline: bool = False) -> llvm.ExecutionEngine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )
    text = program(width, inline) + (X86_CONTROL if IS_X86 else "")
    engine = llvm.create_mcjit_compiler(optimised(text, machine), machine, use_lmm=True)
    engine.finalize_object()
    return engine


def evaluate(name, x, y=None, width=16, inline=False, flush=False) -> np.ndarray:
    """The function of float32 arrays [n]; for "sincos" the result is [2, n].

    flush: let the processor take subnormal numbers for 0 (x86 only).
    """
    engine = compiled(width, inline)
    run = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, ctypes.c_int64)(
        engine.get_function_address(f"run_{name}")
    )
    padding = -len(x) % width
    x = np.pad(np.float32(x), (0, padding))
    y = x if y is None else np.pad(np.float32(y), (0, padding))
    out = np.empty((2 if name == "sincos" else 1, len(x)), np.float32)
    if not flush:
        run(x.ctypes.data, y.ctypes.data, out.ctypes.data, len(x))
    else:
        set_control = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
            engine.get_function_address("set_control")
        )
        flushing = ctypes.c_uint32(CONTROL_FLUSH)
        default = ctypes.c_uint32(CONTROL_DEFAULT)
        set_control(ctypes.addressof(flushing))
        run(x.ctypes.data, y.ctypes.data, out.ctypes.data, len(x))
        set_control(ctypes.addressof(default))
    out = out[:, : len(x) - padding]
    return out if name == "sincos" else out[0]


def random_bits(rng: np.random.Generator, n: int) -> np.ndarray:
    """float32 numbers of all magnitudes, both signs, infinities and NaN."""
    return rng.integers(0, 2**32, n, dtype=np.uint32).view(np.float32)


@functools.cache
@np.errstate(invalid="ignore")
def arguments(count: int) -> list[np.ndarray]:
    """Arguments for functions of one or two, from all ranges where something happens."""
    rng = np.random.default_rng(0)
    n = 20_000
    near_1 = 1 - rng.choice([-1, 1], n) * np.exp(-rng.uniform(0, 16, n))
    if count == 1:
        ranges = [rng.uniform(-size, size, n) for size in (1, 5, 100, 1e3, 7e4, 1e6)]
        parts = [(random_bits(rng, 4 * n),), *((x,) for x in ranges), (near_1,), (-near_1,)]
        parts += [(SPECIAL,), (NEAR_QUARTER_TURNS,)]
    else:
        small = rng.uniform(-10, 10, (2, n))
        base = rng.uniform(0.7, 1.42, n)
        full_range = rng.uniform(-126, 128, n) / np.log2(base)  # base**full_range: all magnitudes
        parts = [
            random_bits(rng, 4 * n).reshape(2, -1),
            small,
            (small[0], np.round(2 * small[1])),  # integer and half-integer powers
            (np.exp(rng.uniform(-85, 85, n)), rng.uniform(-3, 3, n)),
            np.exp(rng.uniform(-85, 85, (2, n))),
            (near_1, np.exp(rng.uniform(0, 16, n))),
            (base, full_range),
            [x.ravel() for x in np.meshgrid(SPECIAL, SPECIAL)],
        ]
    return [np.concatenate(column).astype(np.float32) for column in zip(*parts, strict=True)]


def error_in_ulp(result: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """|result - exact| in units of the last place of a float32 of that magnitude.

    A subnormal result may be 0. What is not a number or infinite in float32 has to be so.
    """
    magnitude = np.abs(exact)
    exponent = np.floor(np.log2(np.clip(magnitude, SMALLEST_NORMAL, None)))
    error = np.abs(result.astype(np.float64) - exact) / np.exp2(exponent - 23)
    error = np.where((magnitude < SMALLEST_NORMAL) & (result == 0), 0, error)
    infinite = magnitude >= 2.0**128 * (1 - 2.0**-25)
    error = np.where(infinite, np.where(result == np.copysign(np.inf, exact), 0, np.inf), error)
    return np.where(np.isnan(exact), np.where(np.isnan(result), 0, np.inf), error)


def is_same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether the bits are the same; NaN has many."""
    return (a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))


@pytest.mark.parametrize("name", FUNCTIONS)
@np.errstate(all="ignore")
def test_accuracy(name):
    """All magnitudes, the ranges of interest, and the special values."""
    x = arguments(FUNCTIONS[name])
    exact_function, _, bound = REFERENCES[name]
    exact = exact_function(*(column.astype(np.float64) for column in x))
    error = error_in_ulp(evaluate(name, *x), exact)
    if name == "fmod":  # a subnormal divisor counts as 0
        error = error[np.abs(x[1]) >= SMALLEST_NORMAL]
    worst = np.argmax(error)
    assert error[worst] <= bound, [column[worst] for column in x]


def test_special_values_are_those_of_jax():
    """0 and its sign, infinities, NaN, and finite numbers roughly."""
    one = [SPECIAL]
    two = [x.ravel() for x in np.meshgrid(SPECIAL, SPECIAL)]
    cases = {name: one if count == 1 else two for name, count in FUNCTIONS.items()}
    in_jax = jax.jit(lambda cases: {name: REFERENCES[name][1](*x) for name, x in cases.items()})
    for name, wanted in in_jax(cases).items():
        result = evaluate(name, *cases[name])
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-37, err_msg=name)
        signed = ~np.isnan(result)
        np.testing.assert_array_equal(
            np.signbit(result)[signed], np.signbit(wanted)[signed], err_msg=name
        )


def test_erf_inv_is_that_of_jax():
    """Random normal numbers are made of it."""
    x = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    wanted = np.asarray(jax.jit(lax.erf_inv)(x))
    result = evaluate("erf_inv", x)
    assert error_in_ulp(result, wanted.astype(np.float64)).max() <= 2
    assert (result == wanted).mean() > 0.95


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_lanes_do_not_matter(width, inline):
    """A result does not depend, to the bit, on the number of lanes and on what is in the others."""
    rng = np.random.default_rng(0)
    chosen = {count: [x[::8] for x in arguments(count)] for count in (1, 2)}
    for name in [*FUNCTIONS, "sincos"]:
        x = chosen[FUNCTIONS.get(name, 1)]
        order = rng.permutation(len(x[0]))
        one_by_one = evaluate(name, *x, width=1)
        together = evaluate(name, *(column[order] for column in x), width=width, inline=inline)
        assert is_same(one_by_one[..., order], together).all(), name


def test_sincos_is_sin_and_cos():
    (x,) = arguments(1)
    sin_x, cos_x = evaluate("sincos", x)
    assert is_same(sin_x, evaluate("sin", x)).all()
    assert is_same(cos_x, evaluate("cos", x)).all()


@pytest.mark.skipif(not IS_X86, reason="sets the control word of x86")
@pytest.mark.parametrize("name", FUNCTIONS)
@np.errstate(invalid="ignore")
def test_flushing_subnormal_numbers_changes_nothing_else(name):
    """XLA's threads take subnormal numbers for 0."""
    x = arguments(FUNCTIONS[name])
    plain = evaluate(name, *x)
    flushing = evaluate(name, *x, flush=True)
    normal = np.all([~(np.abs(column) < SMALLEST_NORMAL) | (column == 0) for column in x], axis=0)
    normal &= ~(np.abs(plain) < SMALLEST_NORMAL)
    if name == "fmod":  # see its docstring
        normal &= np.abs(x[1]) > 2.0**-102
    assert is_same(plain, flushing)[normal].all()
    if FUNCTIONS[name] == 1:
        result = evaluate(name, np.float32([1e-40, -1e-40]), flush=True)
        as_zero = evaluate(name, np.float32([0.0, -0.0]))
        assert (is_same(result, as_zero) | (np.abs(result - as_zero) < SMALLEST_NORMAL)).all()


@pytest.mark.parametrize("gpu", ["sm_70", "sm_90"])
def test_gpu_code_calls_no_library(gpu):
    """NVIDIA's assembly language comes out, and nothing in it is to be found elsewhere."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple("nvptx64-nvidia-cuda").create_target_machine(cpu=gpu, opt=2)
    assembly = machine.emit_assembly(optimised(program(1), machine))
    assert f".target {gpu}" in assembly
    assert ".extern" not in assembly
    # A product and a sum are not joined, and nothing is approximate: results are those of a CPU.
    assert "mul.rn.f32" in assembly and "mul.f32" not in assembly
    assert ".approx" not in assembly and ".ftz" not in assembly
