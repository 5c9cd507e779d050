"""Every primitive that `onekernel` compiles, against JAX itself.

A primitive is one of the operations that JAX takes a function apart into: `add`, `sort`, `while`
and so on. A case below is a small function of ONE world, which uses a family of primitives and
returns a result for each, by name. The expected numbers are XLA's: `jax.jit(jax.vmap(function))`.
The compiled function has to give the same ones for all worlds at once, and then, to the bit, in
batches of 1, 5, 16 and 37 worlds and for one world without `vmap`.

What "the same" means:

- Integers, bools, keys, selections and moved data: the same bits. Any NaN equals any other NaN.
- Floats that are computed: as many units in the last place (ulp) as the case says. A number that
  is as close to the true value as that is right too, since JAX's own functions err by a few ulp.
- XLA treats numbers below 1.2e-38 (denormals) as zero, sometimes. So they count as zeros here.

`onekernel.Fallback`, the warning that a function runs by XLA instead, fails every test: without a
kernel there would be nothing to compare.
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax import lax
from quick import quick_jit

import onekernel

pytestmark = pytest.mark.filterwarnings("error::onekernel.Fallback")

SMALLEST_NORMAL = 1.1754944e-38  # float32's; what is smaller counts as zero
OVERFLOW = 2.0**128  # stands for infinity where a distance is taken
BATCHES = {1: 36, 5: 11, 16: 3, 37: 0}  # worlds in a batch -> the first of them in the whole
WORLDS = 37  # of most cases
MANY_WORLDS = 2051  # of the cases with a number or two a world; no multiple of any vector's length
FEW_WORLDS = 17  # of the cases with large arrays
ROWS = 2000  # of large arrays; with three columns, more than what is taken apart into scalars
IN_MEMORY = (256,)  # scalar limits of a program that is too large for the first of the usual ones
INT_MIN = -(2**31)
INT_MAX = 2**31 - 1

SPECIAL_FLOATS = np.array(
    [0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, -1.0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 2.0, 3.0]
    + [1e-40, -1e-40, SMALLEST_NORMAL, -SMALLEST_NORMAL, 3.4028235e38, -3.4028235e38]
    + [0.49999997, 0.99999994, 8388609.0, -4194304.5, 16777216.0, 2147483648.0, -2147483648.0]
    + [4294967296.0, -3e9, 1e-20, 1e20, -1e20, 3.1415927, -1.5707964, 88.5, -87.5, 7.0],
    np.float32,
)
SPECIAL_INTEGERS = np.array(
    [0, 1, -1, 2, -2, 3, 7, -7, 10, 31, 32, 33, -33, 64, 255, 65536, 16777217, -16777219]
    + [INT_MAX, INT_MAX - 1, INT_MIN, INT_MIN + 1, 0x55555555, -0x55555556],
    np.int32,
)


# ---- Inputs: each maker takes a random generator and a number of worlds ---------------------


def wide(generator, shape):
    """Floats of every size: a third each within (-1, 1), within (-12, 12) and up to 1e37."""
    near_zero = generator.uniform(-1, 1, shape)
    medium = generator.uniform(-12, 12, shape)
    magnitude = 10.0 ** generator.uniform(-37, 37, shape)
    huge = magnitude * generator.choice([-1, 1], shape)
    kind = generator.integers(0, 3, shape)
    return np.choose(kind, [near_zero, medium, huge]).astype(np.float32)


def sprinkle(generator, values, special):
    """Half of the values replaced by special ones."""
    picked = generator.choice(special, values.shape)
    return np.where(generator.random(values.shape) < 0.5, picked, values)


def floats(*shape):
    """Floats of every size and special ones, [worlds, *shape]."""

    def make(generator, worlds):
        return sprinkle(generator, wide(generator, (worlds, *shape)), SPECIAL_FLOATS)

    return make


def between(low, high, *shape):
    """Floats in [low, high), [worlds, *shape]."""

    def make(generator, worlds):
        return generator.uniform(low, high, (worlds, *shape)).astype(np.float32)

    return make


def with_nan(low, high, *shape):
    """As `between`, with a NaN or an infinity in every third world."""

    def make(generator, worlds):
        values = between(low, high, *shape)(generator, worlds)
        for world in range(0, worlds, 3):
            flat = values[world].reshape(-1)
            flat[generator.integers(flat.size)] = generator.choice([np.nan, np.inf, -np.inf])
        return values

    return make


def tied(*shape):
    """Floats of few different values: equal ones, zeros of both signs, infinities, some NaNs."""

    def make(generator, worlds):
        values = [-2.0, -1.0, -0.0, 0.0, 1.0, 1.0, 2.0, np.inf, -np.inf]
        picked = generator.choice(values, (worlds, *shape))
        return np.where(generator.random(picked.shape) < 0.07, np.nan, picked).astype(np.float32)

    return make


def integers(*shape):
    """Integers of every size and special ones, int32 [worlds, *shape]."""

    def make(generator, worlds):
        values = generator.integers(INT_MIN, INT_MAX, (worlds, *shape), np.int32)
        values >>= generator.integers(0, 31, values.shape, np.int32)
        return sprinkle(generator, values, SPECIAL_INTEGERS)

    return make


def unsigned(*shape):
    """As `integers`, the same bits as uint32."""
    return lambda generator, worlds: integers(*shape)(generator, worlds).view(np.uint32)


def indices(low, high, *shape):
    """Integers in [low, high), int32 [worlds, *shape]."""
    return lambda generator, worlds: generator.integers(low, high, (worlds, *shape), np.int32)


def bools(*shape):
    return lambda generator, worlds: generator.random((worlds, *shape)) < 0.5


def pairs(special, make_random):
    """Two values a world, [worlds, 2]: first every pair of special values, then random ones."""

    def make(generator, worlds):
        grid = np.array(list(itertools.product(special, repeat=2)), special.dtype)
        grid = grid[generator.permutation(len(grid))]
        rest = make_random(2)(generator, worlds)
        return np.concatenate([grid, rest])[:worlds]

    return make


def keys(*shape):
    """Random number generators' keys, [worlds, *shape]."""

    def make(generator, worlds):
        return jax.random.split(jax.random.key(generator.integers(1000)), (worlds, *shape))

    return make


def positive_definite(size, *batch):
    """Symmetric matrices with eigenvalues of at least one, [worlds, *batch, size, size]."""

    def make(generator, worlds):
        root = generator.normal(size=(worlds, *batch, size, size))
        return (root @ root.swapaxes(-1, -2) + np.eye(size)).astype(np.float32)

    return make


# ---- Comparison ----------------------------------------------------------------------------


def flushed(array):
    """The array with denormals turned into zeros of the same sign; other types unchanged."""
    array = np.asarray(array)
    if array.dtype != np.float32:
        return array
    return np.where(np.abs(array) < SMALLEST_NORMAL, np.copysign(np.float32(0), array), array)


def plain(array):
    """A NumPy array of what JAX returned; of keys, their bits."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array)


def same_bits(got, expected):
    """Where two arrays are the same to the bit, or both NaN."""
    if got.dtype != np.float32:
        return got == expected
    bits = np.asarray(got).view(np.int32) == np.asarray(expected).view(np.int32)
    return bits | (np.isnan(got) & np.isnan(expected))


def within(got, expected, ulp, share):
    """Where floats differ by at most `ulp` units in the last place, or by a share of the largest.

    The largest is the largest finite magnitude of the same world's result.
    """
    got = np.clip(flushed(got).astype(np.float64), -OVERFLOW, OVERFLOW)
    expected = np.clip(flushed(expected).astype(np.float64), -OVERFLOW, OVERFLOW)
    magnitude = np.clip(np.abs(expected), SMALLEST_NORMAL, 2.0**127)
    unit = np.spacing(np.where(np.isnan(magnitude), 1, magnitude).astype(np.float32))

    finite = np.where(np.isfinite(expected) & (np.abs(expected) < OVERFLOW), expected, 0)
    others = tuple(range(1, expected.ndim))
    largest = np.abs(finite).max(axis=others, keepdims=True, initial=0)
    allowed = ulp * unit.astype(np.float64) + share * largest + SMALLEST_NORMAL
    return (np.abs(got - expected) <= allowed) | (np.isnan(got) & np.isnan(expected))


def by_xla(function, arguments):
    """XLA's own results for a batch of worlds."""
    return quick_jit(jax.vmap(function))(*arguments)


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of one world and how its results are compared.

    function: takes one world's arrays, returns arrays by name.
    inputs: makers of its arguments.
    worlds: how many worlds there are.
    ulp: None for the same bits; else units in the last place for its floats, or those by name.
    share: an error of this share of the largest number of a result is allowed as well.
    truth: float64 functions by a result's name, for results that JAX does not get exactly right.
    scalar_limits: onekernel's, of elements of arrays that are taken apart into scalars.
    """

    function: Callable
    inputs: tuple
    worlds: int
    ulp: float | dict | None
    share: float
    truth: dict
    scalar_limits: tuple = onekernel.api.SCALAR_LIMITS


CASES = {}


def case(*inputs, **others):
    """Enter a function into the cases; others: fields of its Case."""
    usual = {"worlds": WORLDS, "ulp": None, "share": 0.0, "truth": {}}

    def enter(function):
        assert function.__name__ not in CASES
        CASES[function.__name__] = Case(function, inputs, **usual | others)
        return function

    return enter


def describe(name, wrong, arguments, got, expected):
    """A line for each of the first wrong numbers of a result, with the world that it is of."""
    lines = [f"{name}: {np.count_nonzero(wrong)} of {wrong.size} wrong"]
    for where in np.argwhere(wrong)[:4]:
        where = tuple(where)
        world = where[0]
        inputs = ", ".join(
            np.array2string(plain(x)[world].reshape(-1)[:12], threshold=12) for x in arguments
        )
        lines.append(f"  at {where}: got {got[where]!r}, expected {expected[where]!r} of {inputs}")
    return "\n".join(lines)


def differences(checked: Case, arguments, got: dict, expected: dict):
    """What is wrong with a result, in words: a list that is empty if nothing is."""
    found = []
    reference_of_flushed = None
    assert got.keys() == expected.keys()
    for name in expected:
        mine = got[name]
        reference = expected[name]
        if (mine.dtype, mine.shape) != (reference.dtype, reference.shape):
            found.append(
                f"{name}: {mine.dtype}{mine.shape}, not {reference.dtype}{reference.shape}"
            )
            continue
        mine = plain(mine)
        reference = plain(reference)
        ulp = checked.ulp.get(name) if isinstance(checked.ulp, dict) else checked.ulp
        compare = functools.partial(within, ulp=ulp, share=checked.share)
        if mine.dtype != np.float32 or ulp is None:
            compare = lambda a, b: same_bits(flushed(a), flushed(b))  # noqa: E731

        right = compare(mine, reference)
        if not right.all() and name in checked.truth:
            exact = [np.asarray(x, np.float64) for x in arguments]
            with np.errstate(all="ignore"):
                truth = checked.truth[name](*exact).astype(np.float32)
            right |= compare(mine, truth)
        if not right.all():
            if reference_of_flushed is None:
                zeros = [x if x.dtype != np.float32 else flushed(x) for x in arguments]
                reference_of_flushed = by_xla(checked.function, zeros)
            right |= compare(mine, plain(reference_of_flushed[name]))
        if not right.all():
            found.append(describe(name, ~right, arguments, mine, reference))
    return found


@pytest.fixture(scope="module", autouse=True)
def no_kept_kernels():
    """Compile in every run: a kernel that an earlier run left on the disk would test less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEKERNEL_CACHE", "0")
        yield


# ---- One number in, one number out ----------------------------------------------------------


@case(floats(), worlds=MANY_WORLDS)
def exact_float_functions(x):
    return {
        "neg": -x,
        "sign": lax.sign(x),
        "abs": lax.abs(x),
        "floor": lax.floor(x),
        "ceil": lax.ceil(x),
        "round_away": lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO),
        "round_even": lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN),
        "is_finite": lax.is_finite(x),
        "isnan": jnp.isnan(x),
        "isinf": jnp.isinf(x),
        "trunc": jnp.trunc(x),
        "nan_to_num": jnp.nan_to_num(x),
        "neg_of_neg": lax.neg(lax.neg(x)),
        "abs_of_neg": lax.abs(-x),
    }


ELEMENTARY = {  # name -> the function in JAX, in float64
    "exponentials": {
        "exp": (lax.exp, np.exp),
        "exp2": (lax.exp2, np.exp2),
        "expm1": (lax.expm1, np.expm1),
        "logistic": (lax.logistic, scipy.special.expit),
    },
    "logarithms": {
        "log": (lax.log, np.log),
        "log1p": (lax.log1p, np.log1p),
    },
    "inverse_trigonometric": {
        "asin": (lax.asin, np.arcsin),
        "acos": (lax.acos, np.arccos),
        "atan": (lax.atan, np.arctan),
    },
    "hyperbolic": {
        "sinh": (lax.sinh, np.sinh),
        "cosh": (lax.cosh, np.cosh),
        "tanh": (lax.tanh, np.tanh),
    },
    "inverse_hyperbolic": {
        "asinh": (lax.asinh, np.arcsinh),
        "acosh": (lax.acosh, np.arccosh),
        "atanh": (lax.atanh, np.arctanh),
    },
    "roots": {
        "sqrt": (lax.sqrt, np.sqrt),
        "rsqrt": (lax.rsqrt, lambda x: 1 / np.sqrt(x)),
        "cbrt": (lax.cbrt, np.cbrt),
    },
    "powers": {
        "square": (lax.square, np.square),
        "integer_pow_3": (lambda x: lax.integer_pow(x, 3), lambda x: x**3),
        "integer_pow_4": (lambda x: lax.integer_pow(x, 4), lambda x: x**4),
        "integer_pow_7": (lambda x: lax.integer_pow(x, 7), lambda x: x**7),
        "integer_pow_-1": (lambda x: lax.integer_pow(x, -1), lambda x: 1 / x),
        "integer_pow_-2": (lambda x: lax.integer_pow(x, -2), lambda x: x**-2.0),
        "integer_pow_0": (lambda x: lax.integer_pow(x, 0), lambda x: x**0),
        "to_the_half": (lambda x: x**0.5, lambda x: x**0.5),
        "to_the_1.7": (lambda x: x**1.7, lambda x: x ** np.float64(np.float32(1.7))),
    },
    "error_functions": {
        "erf": (lax.erf, scipy.special.erf),
        "erf_inv": (lax.erf_inv, scipy.special.erfinv),
    },
}
TRIGONOMETRIC = {
    "sin": (lax.sin, np.sin),
    "cos": (lax.cos, np.cos),
    "tan": (lax.tan, np.tan),
}


def apply_table(x, *, table):
    """Each function of a table at the same number."""
    return {name: function(x) for name, (function, _) in table.items()}


def enter_table(name, table, make):
    """Enter a table of elementary functions as a case: 4 ulp of JAX or of the true value."""
    truth = {key: exact for key, (_, exact) in table.items()}
    function = functools.partial(apply_table, table=table)
    ulp = {key: 4 for key in table} | {"sqrt": 1, "square": 1}
    CASES[name] = Case(function, (make,), MANY_WORLDS, ulp, 0.0, truth)


for group, functions in ELEMENTARY.items():
    enter_table(group, functions, floats())


def angles(largest):
    """Angles up to so many radians, with multiples of a quarter turn and special floats."""

    def make(generator, worlds):
        uniform = generator.uniform(-largest, largest, worlds)
        turns = np.round(uniform / (np.pi / 2)) * (np.pi / 2)
        small = generator.uniform(-4, 4, worlds)
        kind = generator.integers(0, 3, worlds)
        chosen = np.choose(kind, [uniform, turns, small]).astype(np.float32)
        special = SPECIAL_FLOATS[~(np.abs(SPECIAL_FLOATS) > largest) | np.isinf(SPECIAL_FLOATS)]
        chosen[: len(special)] = special
        return chosen

    return make


enter_table("trigonometric", TRIGONOMETRIC, angles(1e4))
enter_table("trigonometric_of_large_angles", TRIGONOMETRIC, angles(1e30))


# ---- Two numbers ---------------------------------------------------------------------------


@case(
    pairs(SPECIAL_FLOATS, floats),
    worlds=MANY_WORLDS,
    ulp=1,
)
def float_arithmetic(pair):
    x, y = pair
    return {
        "add": lax.add(x, y),
        "sub": lax.sub(x, y),
        "mul": lax.mul(x, y),
        "div": lax.div(x, y),
        "max": lax.max(x, y),
        "min": lax.min(x, y),
        "neg_of_sub": lax.neg(lax.sub(x, y)),
        "sub_of_neg": lax.sub(x, lax.neg(y)),
    }


@case(pairs(SPECIAL_FLOATS, floats), worlds=MANY_WORLDS, ulp=0)
def float_remainder(pair):
    return {"rem": lax.rem(pair[0], pair[1])}


@case(between(-50, 50), between(-5, 5), worlds=MANY_WORLDS, ulp=0)
def float_remainder_of_moderate_numbers(x, y):
    return {"rem": lax.rem(x, y)}


def float_pow(pair):
    """Powers that are neither 0 nor infinite by rounding alone, and all special ones."""
    return {"pow": lax.pow(pair[0], pair[1])}


def bases_and_exponents(generator, worlds):
    """Every pair of special floats, then bases in (0, 20) and exponents in (-8, 8), [worlds, 2]."""
    values = pairs(SPECIAL_FLOATS, floats)(generator, worlds)
    special = len(SPECIAL_FLOATS) ** 2
    values[special:, 0] = generator.uniform(0, 20, worlds - special)
    values[special:, 1] = generator.uniform(-8, 8, worlds - special)
    return values


CASES["float_pow"] = Case(
    function=float_pow,
    inputs=(bases_and_exponents,),
    worlds=MANY_WORLDS,
    ulp=4,
    share=0.0,
    truth={"pow": lambda pair: np.power(pair[:, 0], pair[:, 1])},
)


@case(floats(), indices(-9, 10), worlds=MANY_WORLDS, ulp=8)
def float_to_an_integer_power(x, n):
    return {"pow": lax.pow(x, n)}


@case(
    pairs(SPECIAL_FLOATS, floats),
    worlds=MANY_WORLDS,
    ulp=4,
    truth={"atan2": lambda pair: np.arctan2(pair[:, 0], pair[:, 1])},
)
def float_atan2(pair):
    return {"atan2": lax.atan2(pair[0], pair[1])}


@case(
    between(-10, 10),
    between(-10, 10),
    worlds=MANY_WORLDS,
    ulp=2,
    truth={"fma": lambda x, y: x * y + x},
)
def numpy_arithmetic(x, y):
    quotient, remainder = jnp.divmod(x, y)
    return {
        "mod": jnp.mod(x, y),
        "floor_divide": jnp.floor_divide(x, y),
        "quotient": quotient,
        "remainder": remainder,
        "heaviside": jnp.heaviside(x, y),
        "fma": x * y + x,
        "hypot": jnp.hypot(x, y),
        "copysign": jnp.copysign(x, y),
        "two_digits": jnp.round(x, 2),
        "deg2rad": jnp.deg2rad(x),
        "reciprocal": 1.0 / x,
        "third": x / 3.0,
    }


def comparisons(x, y):
    return {
        "eq": lax.eq(x, y),
        "ne": lax.ne(x, y),
        "lt": lax.lt(x, y),
        "le": lax.le(x, y),
        "gt": lax.gt(x, y),
        "ge": lax.ge(x, y),
        "select": lax.select(x < y, x, y),
    }


@case(pairs(SPECIAL_FLOATS, floats), worlds=MANY_WORLDS)
def float_comparisons(pair):
    return comparisons(pair[0], pair[1])


@case(pairs(SPECIAL_INTEGERS, integers), worlds=MANY_WORLDS)
def int_comparisons(pair):
    return comparisons(pair[0], pair[1])


@case(pairs(SPECIAL_INTEGERS.view(np.uint32), unsigned), worlds=MANY_WORLDS)
def uint_comparisons(pair):
    return comparisons(pair[0], pair[1])


@case(bools(), bools())
def bool_functions(x, y):
    return comparisons(x, y) | {
        "and": x & y,
        "or": x | y,
        "xor": x ^ y,
        "not": ~x,
        "max": lax.max(x, y),
        "min": lax.min(x, y),
        "add": jnp.add(x, y),
        "mul": jnp.multiply(x, y),
        "float": x * 2.5 + y,
    }


def integer_functions(x, y):
    """Arithmetic that wraps around, division as XLA defines it for every pair, and bits."""
    return {
        "add": lax.add(x, y),
        "sub": lax.sub(x, y),
        "mul": lax.mul(x, y),
        "div": lax.div(x, y),
        "rem": lax.rem(x, y),
        "max": lax.max(x, y),
        "min": lax.min(x, y),
        "and": x & y,
        "or": x | y,
        "xor": x ^ y,
        "not": ~x,
        "shift_left": lax.shift_left(x, y),
        "shift_right_logical": lax.shift_right_logical(x, y),
        "shift_right_arithmetic": lax.shift_right_arithmetic(x, y),
        "population_count": lax.population_count(x),
        "clz": lax.clz(x),
        "integer_pow_3": lax.integer_pow(x, 3),
        "neg": -x,
        "neg_of_sub": -(x - y),
        "sub_of_neg": x - (-y),
        "floor_divide": x // y,
        "mod": x % y,
        "div_by_3": lax.div(x, jnp.array(3, x.dtype)),
        "rem_by_8": lax.rem(x, jnp.array(8, x.dtype)),
        "div_by_0": lax.div(x, jnp.array(0, x.dtype)),
        "rem_by_0": lax.rem(x, jnp.array(0, x.dtype)),
        "shift_by_33": lax.shift_right_logical(x, jnp.array(33, x.dtype)),
        "times_0": x * 0,
        "minus_itself": x - x,
    }


@case(pairs(SPECIAL_INTEGERS, integers), worlds=MANY_WORLDS)
def int_functions(pair):
    x, y = pair
    return integer_functions(x, y) | {
        "abs": lax.abs(x),
        "sign": lax.sign(x),
        "div_by_-1": lax.div(x, jnp.int32(-1)),
        "rem_by_-1": lax.rem(x, jnp.int32(-1)),
        "div_by_-4": lax.div(x, jnp.int32(-4)),
    }


@case(pairs(SPECIAL_INTEGERS.view(np.uint32), unsigned), worlds=MANY_WORLDS)
def uint_functions(pair):
    x, y = pair
    return integer_functions(x, y) | {"sign": lax.sign(x)}


# ---- Constants: the compiler may work them out itself, and has to do so as XLA does ----------


@case(floats(), worlds=MANY_WORLDS, ulp=1)
def float_identities(x):
    """Operations with 0, 1 and infinity that look as if they could be left out. What is left out,
    though JAX has NaN there, is in test_a_constant_zero_wins."""
    return {
        "times_1": x * 1.0,
        "times_-1": x * -1.0,
        "times_2": x * 2.0,
        "plus_0": x + 0.0,
        "minus_0": x - 0.0,
        "0_minus": 0.0 - x,
        "over_itself": x / x,
        "over_1": x / 1.0,
        "over_0": x / 0.0,
        "over_-0": x / -0.0,
        "over_infinity": x / jnp.inf,
        "1_over": 1.0 / x,
        "max_infinity": lax.max(x, jnp.float32(jnp.inf)),
        "min_infinity": lax.min(x, jnp.float32(-jnp.inf)),
        "max_itself": lax.max(x, x),
        "max_nan": lax.max(x, jnp.float32(jnp.nan)),
        "eq_itself": x == x,
        "ne_itself": x != x,
        "le_itself": x <= x,
        "lt_infinity": x < jnp.inf,
        "ge_-infinity": x >= -jnp.inf,
        "below_nan": x < jnp.nan,
        "both_branches": jnp.where(x > 0, x, x),
        "pow_0": lax.pow(x, jnp.float32(0)),
        "pow_1": lax.pow(x, jnp.float32(1)),
        "pow_2": lax.pow(x, jnp.float32(2)),
        "1_pow": lax.pow(jnp.float32(1), x),
        "log_of_exp_sign": jnp.sign(lax.exp(x)),
    }


def test_a_constant_zero_wins():
    """Infinity and NaN times a constant zero are zero, and so are they minus themselves, as
    docs/onekernel.md says; JAX has NaN."""

    def products(x):
        dot = jnp.stack([x, jnp.float32(2.0)]) @ jnp.array([0.0, 1.0])
        return x * 0.0, 0.0 * x, x * -0.0, 0.0 / x, dot - 2, x - x, x + -x

    for result in jax.vmap(onekernel.compile(products))(jnp.array([np.nan, np.inf, -np.inf, 3.0])):
        np.testing.assert_array_equal(result, 0)


def test_division_by_large_constants():
    """By their reciprocals, unless those are subnormal, as of more than 2^126 = 8.5e37: kernels take
    such a factor for 0, and so does XLA."""
    numbers = np.array([3e38, -1e38, 8.6e37, 1.0, np.inf, np.nan], np.float32)
    for by in (3.0, 2.0**126, -(2.0**126), 8.6e37, 3e38, -3.4e38):
        result = jax.vmap(onekernel.compile(lambda x, by=by: x / by))(numbers)
        expected = flushed(numbers / np.float32(by))
        np.testing.assert_allclose(flushed(result), expected, rtol=2e-7, err_msg=str(by))


def operations_on_constants(bad, whole, some):
    """Operations that a compiler works out itself where their operands are constants.

    bad: floats that are hard to convert, [8]; whole, some: int32 [24], the second ones small.
    """
    bits = whole.view(jnp.uint32)
    return {
        "int_div": lax.div(whole, some),
        "int_rem": lax.rem(whole, some),
        "int_add": whole + INT_MAX,
        "int_mul": whole * 16777217,
        "int_neg": -whole,
        "int_abs": abs(whole),
        "int_shift_left": lax.shift_left(whole, some),
        "int_shift_right": lax.shift_right_arithmetic(whole, some),
        "int_shift_right_logical": lax.shift_right_logical(whole, some),
        "int_floor_divide": whole // some,
        "int_power": lax.integer_pow(whole, 3),
        "int_sum": whole.sum(),
        "uint_sub": bits - jnp.uint32(7),
        "uint_mul": bits * bits,
        "uint_div": lax.div(bits, some.view(jnp.uint32)),
        "uint_less": bits < bits[::-1],
        "uint_to_float": bits.astype(jnp.float32),
        "int_to_float": whole.astype(jnp.float32),
        "int_to_bool": whole.astype(bool),
        "population_count": lax.population_count(bits),
        "clz": lax.clz(whole),
        "float_to_int": bad.astype(jnp.int32),
        "float_to_uint": bad.astype(jnp.uint32),
        "float_to_bool": bad.astype(bool),
        "float_bits": lax.bitcast_convert_type(bad[1:], jnp.int32),
        "float_of_bits": lax.bitcast_convert_type(whole, jnp.float32),
        "max": jnp.max(bad),
        "argmax": jnp.argmax(bad),
        "sort": jnp.sort(bad),
        "floor": jnp.floor(bad),
        "round": jnp.round(bad),
        "sign": jnp.sign(bad),
        "product": bad * bad[::-1],
        "over_zero": bad / bad[7],
        "times_zero": bad * bad[7],
        "minus_infinity": bad - bad[1],
    }


def functions_of_constants(numbers, positive):
    """Elementary functions that a compiler works out itself where their operands are constants."""
    return {
        "sin": jnp.sin(numbers),
        "cos": jnp.cos(numbers),
        "tan": jnp.tan(numbers),
        "exp": jnp.exp(numbers),
        "exp2": jnp.exp2(numbers),
        "log": jnp.log(positive),
        "log1p": jnp.log1p(positive),
        "expm1": jnp.expm1(numbers),
        "sqrt": jnp.sqrt(positive),
        "rsqrt": lax.rsqrt(positive),
        "cbrt": jnp.cbrt(numbers),
        "asin": jnp.asin(numbers),
        "acos": jnp.acos(numbers),
        "atan": jnp.atan(numbers),
        "atan2": jnp.atan2(numbers, positive),
        "sinh": jnp.sinh(numbers),
        "cosh": jnp.cosh(numbers),
        "tanh": jnp.tanh(numbers),
        "asinh": jnp.asinh(numbers),
        "acosh": jnp.acosh(positive),
        "atanh": jnp.atanh(numbers),
        "logistic": jax.nn.sigmoid(numbers),
        "erf": lax.erf(numbers),
        "erf_inv": lax.erf_inv(numbers),
        "pow": positive**1.3,
        "negative_pow": numbers**1.3,
        "rem": lax.rem(numbers, jnp.float32(0.25)),
        "third": numbers / 3,
        "dot": numbers @ numbers,
        "normalised": numbers / jnp.linalg.norm(numbers),
    }


BAD_FLOATS = np.array([np.nan, np.inf, -np.inf, -1.5, 3e9, 5e9, 2.7, -0.0], np.float32)
SMALL_INTEGERS = np.array([1, 0, -1, 33, 2, 31, -5, 7] * 3, np.int32)
FRACTIONS = np.array([0.3, -0.7, 1.0, 0.0, 0.9, -1.0], np.float32)
POSITIVE = np.array([0.3, 2.0, 1e-3, 1e5, 0.0, np.inf], np.float32)


@pytest.mark.parametrize(
    ("function", "values", "ulp"),
    [
        (operations_on_constants, (BAD_FLOATS, SPECIAL_INTEGERS, SMALL_INTEGERS), None),
        (operations_on_constants, (BAD_FLOATS, SPECIAL_INTEGERS[::-1], SMALL_INTEGERS), None),
        (functions_of_constants, (FRACTIONS, POSITIVE), 4),
    ],
    ids=["operations", "operations_on_others", "functions"],
)
def test_constants_are_worked_out_as_data_are(function, values, ulp):
    """What XLA computes of data is what the compiler has to compute of constants.

    XLA's own constant folding is no reference: it crashes on INT_MIN / -1.
    """
    step = onekernel.compile(lambda n: function(*(jnp.asarray(x) for x in values)) | {"n": n})
    got = jax.vmap(step)(jnp.arange(3))
    assert (got.pop("n") == jnp.arange(3)).all()

    # The first world is enough: the others have the same constants.
    checked = Case(function, (), 1, ulp, 0.0, {})
    first = {name: value[:1] for name, value in got.items()}
    arguments = [np.asarray(x)[None] for x in values]
    expected = by_xla(function, arguments)
    found = differences(checked, arguments, first, expected)
    assert not found, "\n" + "\n".join(found)


# ---- Choice and conversion -----------------------------------------------------------------


@case(floats(4), floats(4), floats(4), bools(4), bools(), indices(0, 3, 4), indices(0, 3))
def select_and_clamp(x, y, z, mask, flag, which, one):
    return {
        "bools": lax.select_n(mask, x, y),
        "one_bool": lax.select_n(flag, x, y),
        "integers": lax.select_n(which, x, y, z),
        "one_integer": lax.select_n(one, x, y, z),
        "of_bools": lax.select_n(mask, x > y, y > z),
        "of_integers": lax.select_n(mask, which, which * 3),
        "of_one_case": lax.select_n(jnp.zeros(4, jnp.int32), x),
        "constant_predicate": lax.select(jnp.array([True, False, True, False]), x, y),
        "constant_cases": jnp.where(mask, 1.5, -2.5),
        "where_nan": jnp.where(jnp.isnan(x), 0.0, x),
    }


@case(floats(6), floats(6), floats(6), floats(), floats(), ulp=0)
def clamp_of_floats(low, x, high, one_low, one_high):
    return {
        "arrays": lax.clamp(low, x, high),
        "numbers": lax.clamp(one_low, x, one_high),
        "constants": lax.clamp(-1.0, x, 1.0),
        "clip": jnp.clip(x, -2.0, one_high),
    }


@case(integers(6), integers(6), integers(6), unsigned(6))
def clamp_of_integers(low, x, high, u):
    return {
        "arrays": lax.clamp(low, x, high),
        "constants": lax.clamp(-5, x, 5),
        "unsigned": lax.clamp(jnp.uint32(3), u, jnp.uint32(0x80000000)),
    }


@case(floats(), integers(), unsigned(), bools(), worlds=MANY_WORLDS)
def conversion(x, n, u, flag):
    return {
        "float_to_int": x.astype(jnp.int32),
        "float_to_uint": x.astype(jnp.uint32),
        "float_to_bool": x.astype(bool),
        "int_to_float": n.astype(jnp.float32),
        "int_to_uint": n.astype(jnp.uint32),
        "int_to_bool": n.astype(bool),
        "uint_to_float": u.astype(jnp.float32),
        "uint_to_int": u.astype(jnp.int32),
        "uint_to_bool": u.astype(bool),
        "bool_to_float": flag.astype(jnp.float32),
        "bool_to_int": flag.astype(jnp.int32),
        "bool_to_uint": flag.astype(jnp.uint32),
        "float_bits": lax.bitcast_convert_type(x, jnp.int32),
        "float_bits_unsigned": lax.bitcast_convert_type(x, jnp.uint32),
        "float_of_bits": lax.bitcast_convert_type(u, jnp.float32),
        "float_of_int_bits": n.view(jnp.float32),
        "int_of_uint_bits": lax.bitcast_convert_type(u, jnp.int32),
        "there_and_back": lax.bitcast_convert_type(u, jnp.float32).view(jnp.uint32),
        "to_itself": x.astype(jnp.float32),
        "mixed": n + flag,
    }


# ---- Moving data ---------------------------------------------------------------------------


@case(floats(3, 4), integers(2, 3, 2), bools(5))
def shapes(x, n, flags):
    return {
        "broadcast_in_dim": lax.broadcast_in_dim(x, (2, 3, 4, 2), (1, 2)),
        "broadcast": jnp.broadcast_to(x[:, :1], (3, 5)),
        "broadcast_scalar": jnp.broadcast_to(n[1, 2, 0], (2, 3)),
        "reshape": x.reshape(2, 6),
        "reshape_of_transpose": x.T.reshape(2, 6),
        "ravel": n.ravel(),
        "squeeze": x[:, None, :1].squeeze(),
        "expand_dims": jnp.expand_dims(x, (0, 2)),
        "transpose": n.transpose(2, 0, 1),
        "swapaxes": n.swapaxes(0, 2),
        "rev": lax.rev(n, (0, 2)),
        "flip": jnp.flip(flags),
        "roll": jnp.roll(x, 5),
        "roll_rows": jnp.roll(x, -1, axis=0),
        "tile": jnp.tile(x, (2, 1)),
        "repeat": jnp.repeat(x, 2, axis=1),
        "stack": jnp.stack([x[0], x[2], x[1]], axis=1),
        "tril": jnp.tril(x),
        "diag": jnp.diag(x[:, :3]),
        "diagonal_matrix": jnp.diag(x[0]),
        "rot90": jnp.rot90(x),
        "copy": jnp.copy(x),
        "split": jnp.split(n, 3, axis=1)[1],
        "outer_where": jnp.where(flags[:, None], x[0], x[1]),
    }


@case(floats(6, 4), integers(7), bools(5))
def slices(x, n, flags):
    return {
        "slice": x[1:4, 2:],
        "stride": lax.slice(x, (0, 1), (6, 4), (2, 3)),
        "negative_stride": n[::-2],
        "empty": n[3:3],
        "row": x[2],
        "last": x[-1, -1],
        "column": x[:, 1],
        "concatenate": jnp.concatenate([x[:2, :3], x[3:, 1:], x[2:3, :3]]),
        "concatenate_columns": jnp.concatenate([x, x[:, :1]], axis=1),
        "stack": jnp.stack([x[:, 0], 2 * x[:, 1], x[:, 2]]),
        "stack_columns": jnp.stack([x, -x], axis=1),
        "stack_scalars": jnp.stack([n[0], n[3]]),
        "unstack": jnp.unstack(x)[1],
        "unstack_columns": jnp.unstack(x, axis=1)[2],
        "append_constant": jnp.append(n, 9),
        "of_bools": jnp.concatenate([flags, ~flags[1:3]]),
        "pad": jnp.pad(n, (1, 2)),
        "pad_edge": jnp.pad(n, 2, mode="edge"),
        "pad_interior": lax.pad(x, x[0, 0], ((1, 0, 2), (0, 2, 1))),
        "pad_negative": lax.pad(x, jnp.float32(9), ((-1, -2, 0), (2, -1, 0))),
        "pad_negative_interior": lax.pad(x, x[1, 1], ((-2, 1, 1), (-1, -1, 2))),
        "iota": lax.iota(jnp.int32, 4) + n[:4],
        "iota_float": lax.broadcasted_iota(jnp.float32, (3, 4), 1),
        "iota_unsigned": lax.broadcasted_iota(jnp.uint32, (3, 2), 0),
        "arange": jnp.arange(1, 9, 2),
        "eye": jnp.where(jnp.eye(4) == 1, x[:4], 0.0),
        "linspace": jnp.linspace(0.0, 1.0, 5),
    }


@case(floats(5, 4), integers(6), bools(5), indices(-3, 9), indices(-4, 7), unsigned())
def dynamic_slices(x, n, flags, i, j, u):
    """Starts are often out of range: `dynamic_slice` moves them into it."""
    return {
        "number": lax.dynamic_slice(n, (i,), (1,)),
        "part": lax.dynamic_slice(n, (j,), (4,)),
        "block": lax.dynamic_slice(x, (i, j), (2, 3)),
        "rows": lax.dynamic_slice(x, (j, 0), (3, 4)),
        "columns": lax.dynamic_slice(x, (1, j), (3, 2)),
        "whole": lax.dynamic_slice(x, (i, j), (5, 4)),
        "constant_start": lax.dynamic_slice(x, (7, -2), (2, 2)),
        "unsigned_start": lax.dynamic_slice(n, (u,), (2,)),
        "of_bools": lax.dynamic_slice(flags, (j,), (2,)),
        "of_a_constant": lax.dynamic_slice(jnp.arange(30).reshape(6, 5), (i, j), (2, 2)),
        "index_in_dim": lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False),
        "update_number": lax.dynamic_update_slice(n, jnp.array([7]), (i,)),
        "update_block": lax.dynamic_update_slice(x, x[:2, :3] + 1, (i, j)),
        "update_row": lax.dynamic_update_index_in_dim(x, x[0], j, axis=0),
        "update_column": lax.dynamic_update_index_in_dim(x, x[:, 3], j, axis=1),
        "update_bools": lax.dynamic_update_slice(flags, jnp.array([True, False]), (j,)),
        "update_constant_start": lax.dynamic_update_slice(x, x[3:, 2:], (9, 1)),
        "update_of_a_constant": lax.dynamic_update_slice(jnp.zeros((4, 4)), x[:2, :2], (j, i)),
    }


# ---- Reductions, order, sorting ------------------------------------------------------------


@case(with_nan(0.5, 2.0, 3, 5), with_nan(-1, 1, 4), ulp=8, share=3e-7)
def float_sums(x, y):
    return {
        "sum": x.sum(),
        "sum_rows": x.sum(0),
        "sum_columns": x.sum(1, keepdims=True),
        "sum_of_signs": y.sum(),
        "mean": x.mean(0),
        "prod": x.prod(),
        "prod_rows": x.prod(0),
        "norm": jnp.linalg.norm(y),
        "norm_rows": jnp.linalg.norm(x, axis=0),
        "cumsum": jnp.cumsum(x, 1),
        "cumsum_flat": jnp.cumsum(y),
        "cumsum_reverse": lax.cumsum(x, 0, reverse=True),
        "cumprod": jnp.cumprod(x, 0),
        "cumprod_reverse": lax.cumprod(y, 0, reverse=True),
        "variance": x.var(1),
        "weighted": (x * jnp.arange(1.0, 6.0)).sum(),
    }


@case(between(-30, 30, 6), with_nan(-5, 5, 3, 4), ulp=8, share=5e-7)
def logarithmic_sums(x, y):
    return {
        "logsumexp": jax.nn.logsumexp(x),
        "logsumexp_rows": jax.nn.logsumexp(y, axis=0),
        "softmax": jax.nn.softmax(x),
        "log_softmax": jax.nn.log_softmax(x),
    }


@case(tied(3, 5), integers(3, 4), unsigned(4), bools(3, 4), ulp=0)
def extremes(x, n, u, flags):
    return {
        "max": x.max(),
        "min": x.min(),
        "max_rows": x.max(0),
        "min_columns": x.min(1),
        "nanmax": jnp.nanmax(x),
        "ptp": n.max(0) - n.min(0),
        "unsigned_max": u.max(),
        "unsigned_min": u.min(),
        "argmax": jnp.argmax(x),
        "argmin": jnp.argmin(x),
        "argmax_rows": jnp.argmax(x, 0),
        "argmin_columns": jnp.argmin(x, 1, keepdims=True),
        "argmax_integers": jnp.argmax(n, 1),
        "argmin_unsigned": jnp.argmin(u),
        "argmax_bools": jnp.argmax(flags, 0),
        "argmax_unsigned_index": lax.argmax(x, 1, jnp.uint32),
        "cummax": lax.cummax(x, 1),
        "cummin": lax.cummin(x, 0),
        "cummax_reverse": lax.cummax(x, 1, reverse=True),
        "cummin_integers": lax.cummin(n, 1),
        "all": flags.all(),
        "any": flags.any(0),
        "all_columns": flags.all(1),
        "any_of_empty": flags[:0].any(),
        "any_nan": jnp.isnan(x).any(),
    }


@case(integers(3, 4), unsigned(5), bools(3, 4))
def integer_sums(n, u, flags):
    return {
        "sum": n.sum(),
        "sum_rows": n.sum(0),
        "prod": n.prod(1),
        "unsigned_sum": u.sum(),
        "unsigned_prod": u.prod(),
        "count": flags.sum(),
        "count_rows": flags.sum(0),
        "count_nonzero": jnp.count_nonzero(n),
        "cumsum": jnp.cumsum(n, 0),
        "cumsum_of_bools": jnp.cumsum(flags[0]),
        "cumprod": jnp.cumprod(n, 1),
        "cumsum_unsigned": lax.cumsum(u, 0, reverse=True),
        "cummax_unsigned": lax.cummax(u, 0),
        "bitwise_and": lax.reduce_and(n, (0,)),
        "bitwise_or": lax.reduce_or(n, (1,)),
        "sum_of_empty": n[:0].sum(0),
    }


@case(tied(9), floats(8), tied(2, 5), integers(7), unsigned(5), bools(6))
def sort_one(x, y, rows, n, u, flags):
    return {
        "floats": jnp.sort(x),
        "wide_floats": jnp.sort(y),
        "descending": jnp.sort(x, descending=True),
        "columns": lax.sort(rows, dimension=1),
        "rows": lax.sort(rows, dimension=0),
        "integers": jnp.sort(n),
        "unsigned": jnp.sort(u),
        "bools": jnp.sort(flags),
        "one": jnp.sort(x[:1]),
        "median": jnp.median(n),
    }


@case(tied(9), tied(2, 4), indices(-2, 3, 9), integers(9), indices(0, 4, 6))
def sort_several(x, rows, n, m, few):
    by_float = lax.sort((x, n, m), num_keys=1, is_stable=True)
    by_two = lax.sort((n, x, m), num_keys=2, is_stable=True)
    by_all = lax.sort((few, n[:6], m[:6]), num_keys=3)
    in_rows = lax.sort((rows, jnp.arange(8).reshape(2, 4)), dimension=1, num_keys=1)
    return {
        "by_float_0": by_float[0],
        "by_float_1": by_float[1],
        "by_float_2": by_float[2],
        "by_two_0": by_two[0],
        "by_two_1": by_two[1],
        "by_two_2": by_two[2],
        "by_all_0": by_all[0],
        "by_all_2": by_all[2],
        "rows_0": in_rows[0],
        "rows_1": in_rows[1],
        "argsort": jnp.argsort(x),
        "argsort_descending": jnp.argsort(n, descending=True, stable=True),
        "lexsort": jnp.lexsort((m, n)),
        "rank": jnp.argsort(jnp.argsort(n)),
    }


@case(between(-1, 1, 6), between(-2, 2, 4), integers(6), integers(4), keys(), ulp=4, share=1e-6)
def searches(x, y, n, m, key):
    """What compares by a total order, in which NaN is the largest."""
    return {
        "searchsorted": jnp.searchsorted(jnp.sort(x), y),
        "searchsorted_right": jnp.searchsorted(jnp.sort(x), x, side="right"),
        "searchsorted_integers": jnp.searchsorted(jnp.sort(n), m),
        "searchsorted_compare_all": jnp.searchsorted(jnp.sort(x), y, method="compare_all"),
        "interpolate": jnp.interp(y, jnp.linspace(-1.0, 1.0, 6), x),
        "digitize": jnp.digitize(y, jnp.array([-1.0, 0.0, 1.0])),
        "choice_with_odds": jax.random.choice(key, 3, (4,), p=jnp.array([0.2, 0.5, 0.3])),
    }


@case(between(-5, 5, 7), tied(2, 6), indices(-3, 4, 6), unsigned(5))
def top_k(x, rows, n, u):
    """NaNs and zeros of both signs are left out: XLA's own order of them differs by platform."""
    rows = jnp.where(jnp.isnan(rows) | (rows == 0), 3.0, rows)
    values, order = lax.top_k(x, 3)
    row_values, row_order = lax.top_k(rows, 2)
    integer_values, integer_order = lax.top_k(n, 4)
    return {
        "values": values,
        "order": order,
        "row_values": row_values,
        "row_order": row_order,
        "integer_values": integer_values,
        "integer_order": integer_order,
        "unsigned": lax.top_k(u, 5)[0],
        "all": lax.top_k(x, 7)[1],
        "smallest": -lax.top_k(-x, 2)[0],
    }


# ---- Gather and scatter --------------------------------------------------------------------


@case(floats(5, 4), integers(6), unsigned(4), bools(4), indices(-7, 9), indices(-9, 6))
def gather_one(x, n, u, flags, i, j):
    """Indices are often out of range; negative ones count from the end."""
    clip = {"mode": "clip"}
    fill = {"mode": "fill"}
    return {
        "number": n[i],
        "row": x[i],
        "column": x[:, j],
        "element": x[i, j],
        "constant_and_data": x[2, j],
        "unsigned_fill": u.at[i].get(**fill),
        "bool_fill": flags.at[i].get(**fill),
        "integer_fill": n.at[i].get(**fill),
        "float_fill": x.at[i, j].get(**fill),
        "float_fill_value": x.at[i].get(mode="fill", fill_value=-7.0),
        "clip": x.at[i, j].get(**clip),
        "row_clip": x.at[i].get(**clip),
        "wrap": jnp.take(x, i, axis=0, mode="wrap"),
        "take_fill": jnp.take(x, j, axis=1, **fill),
        "take_clip": jnp.take(n, i, **clip),
        "in_bounds": x.at[jnp.clip(i, 0, 4)].get(mode="promise_in_bounds"),
        "drop": n.at[i].get(mode="drop"),
        "of_a_constant": jnp.arange(12).reshape(4, 3)[i % 4, j % 3],
        "unsigned_index": n[jnp.abs(i).astype(jnp.uint32)],
        "of_bools": flags[i % 4],
    }


@case(floats(5, 4), integers(6), indices(-7, 9, 3), indices(-4, 4, 2, 2), bools(5))
def gather_many(x, n, i, j, flags):
    return {
        "numbers": n[i],
        "rows": x[i],
        "columns": x[:, j],
        "elements": x[i[:2], j[0]],
        "outer": x[i[:, None], j[0]],
        "two_dimensions": n[j],
        "clip": jnp.take(x, i, axis=0, mode="clip"),
        "wrap": jnp.take(x, i, axis=1, mode="wrap"),
        "fill": jnp.take(x, i, axis=0, mode="fill", fill_value=3.0),
        "flat": jnp.take(x, i + 8),
        "take_along_axis": jnp.take_along_axis(x, j[:1] % 4, axis=1),
        "constant_indices": x[jnp.array([4, 0, 4])],
        "constant_out_of_range": n[jnp.array([7, -8, 2])],
        "one_a_row": jax.vmap(lambda row, k: row[k])(x[:3], i),
        "part_of_each_row": jax.vmap(lambda row, k: lax.dynamic_slice(row, (k,), (2,)))(x[:3], i),
        "choose": jnp.choose(j[0], [x[0, :2], x[1, :2]], mode="clip"),
        "one_hot": jax.nn.one_hot(i, 4),
        "blocks": lax.gather(
            x,
            jnp.stack([i, i[::-1]], axis=1),
            lax.GatherDimensionNumbers((1, 2), (), (0, 1)),
            slice_sizes=(2, 3),
            mode="clip",
        ),
        "of_flags": flags[i],
    }


@case(floats(5, 4), integers(6), bools(4), indices(-7, 9), indices(-6, 6), floats())
def scatter_one(x, n, flags, i, j, y):
    return {
        "set": x.at[i, j].set(y),
        "set_row": x.at[i].set(x[0]),
        "set_column": x.at[:, j].set(y),
        "set_number": n.at[i].set(3),
        "set_bool": flags.at[i].set(True),
        "set_clip": n.at[i].set(4, mode="clip"),
        "set_drop": n.at[i].set(4, mode="drop"),
        "set_in_bounds": x.at[jnp.clip(i, 0, 4)].set(y, mode="promise_in_bounds"),
        "set_constant": x.at[1, 2].set(y),
        "set_constant_slice": x.at[1:3].set(y),
        "set_constant_stride": n.at[::2].set(5),
        "set_out_of_range": n.at[17].set(5),
        "min_number": n.at[i].min(-3),
        "max_number": n.at[i].max(3),
        "add_number": n.at[i].add(5),
        "multiply_number": n.at[i].multiply(-3),
        "subtract_number": n.at[i].subtract(3),
        "of_a_constant": jnp.zeros((3, 3)).at[i % 3, j % 3].set(y),
    }


@case(between(-2, 2, 5, 4), indices(-7, 9), indices(-6, 6), between(-3, 3), ulp=1)
def scatter_one_arithmetic(x, i, j, y):
    return {
        "add": x.at[i, j].add(y),
        "add_row": x.at[i].add(x[0]),
        "add_column": x.at[:, j].add(y),
        "subtract": x.at[i, j].subtract(y),
        "multiply": x.at[i].multiply(y),
        "divide": x.at[i].divide(y),
        "min": x.at[i, j].min(y),
        "max": x.at[:, j].max(y),
        "add_constant": x.at[1, 2].add(y),
        "multiply_constant": x.at[2:].multiply(y),
        "add_clip": x.at[i].add(y, mode="clip"),
    }


@case(between(-2, 2, 6), between(-2, 2, 3, 4), indices(-8, 9, 5), integers(6), ulp=2, share=1e-6)
def scatter_many(x, y, i, n):
    """Several numbers at once, some at the same place: there, `set` always sets the same number."""
    twice = jnp.array([2, 2, 0, 5, 2])
    return {
        "set": x.at[i].set(9.0),
        "set_of_different": x.at[jnp.array([3, 0, 4])].set(y[0, :3]),
        "set_reversed": x.at[::-1].set(x),
        "add": x.at[i].add(x[:5]),
        "add_at_constants": x.at[twice].add(x[:5]),
        "multiply": x.at[i].multiply(x[1:]),
        "multiply_at_constants": x.at[twice].multiply(x[:5]),
        "min": x.at[i].min(x[:5]),
        "max": x.at[i].max(x[1:]),
        "max_at_constants": x.at[twice].max(x[:5]),
        "integers_add": n.at[i].add(n[:5]),
        "integers_min": n.at[i].min(n[1:]),
        "integers_multiply": n.at[twice].multiply(n[:5]),
        "rows": y.at[i[:2]].add(1.0),
        "columns": y.at[:, i].add(2.0),
        "elements": y.at[i[:3] % 3, i[2:] % 4].add(1.5),
        "one_a_row": jax.vmap(lambda row, k: row.at[k].set(7.0))(y, i[:3]),
        "histogram": jnp.zeros(4, jnp.int32).at[i % 4].add(1),
        "bincount": jnp.bincount(i % 4, length=4),
        "segment_sum": jax.ops.segment_sum(x[:5], i % 3, num_segments=3),
        "segment_max": jax.ops.segment_max(x[:5], i % 3, num_segments=3),
        "inverse_permutation": jnp.zeros(6).at[jnp.argsort(x)].set(jnp.arange(6.0)),
    }


CONSTANT_TABLE = np.random.default_rng(0).normal(size=5000).astype(np.float32)
CONSTANT_ROWS = np.random.default_rng(1).normal(size=(2000, 3)).astype(np.float32)
CONSTANT_INTEGERS = np.random.default_rng(2).integers(-1000, 1000, 4096).astype(np.int32)


@case(indices(-6000, 6000), indices(0, 5000, 4), between(0, 60), between(0, 70), ulp=4, share=1e-6)
def constant_tables(i, many, x, y):
    """Tables that are too large to unroll: a height field, rows, integers."""
    table = jnp.asarray(CONSTANT_TABLE)
    heights = table[:4900].reshape(70, 70)
    row = jnp.floor(x).astype(jnp.int32)
    column = jnp.floor(y).astype(jnp.int32)
    square = lax.dynamic_slice(heights, (row, column), (2, 2))
    return {
        "number": table[i],
        "clip": jnp.take(table, i, mode="clip"),
        "wrap": jnp.take(table, i, mode="wrap"),
        "fill": jnp.take(table, i, mode="fill", fill_value=0.5),
        "many": table[many],
        "rows": jnp.asarray(CONSTANT_ROWS)[many % 2000],
        "column_of_rows": jnp.asarray(CONSTANT_ROWS)[many % 2000, many % 3],
        "integers": jnp.asarray(CONSTANT_INTEGERS)[many & 4095],
        "chain": jnp.asarray(CONSTANT_INTEGERS)[
            jnp.abs(jnp.asarray(CONSTANT_INTEGERS)[many & 4095])
        ],
        "part": lax.dynamic_slice(table, (i,), (3,)),
        "height": square[0, 0] * (row + 1 - x) * (column + 1 - y) + square[1, 1] * (x - row),
        "element": heights[row, column],
        "sum_in_loop": lax.fori_loop(0, 20, lambda k, total: total + table[many[0] // 2 + k], 0.0),
    }


@case(floats(300), integers(100, 3), indices(-400, 400), indices(0, 300, 5))
def tables_of_a_world(table, rows, i, many):
    return {
        "number": table[i],
        "clip": jnp.take(table, i, mode="clip"),
        "many": table[many],
        "part": lax.dynamic_slice(table, (i,), (4,)),
        "row": rows[many[0] % 100],
        "element": rows[many % 100, many % 3],
        "set": table.at[i].set(5.0),
        "set_many": table.at[many].set(-1.0),
        "row_add": rows.at[i].add(7),
        "update_part": lax.dynamic_update_slice(table, table[:3], (i,)),
    }


# ---- Linear algebra ------------------------------------------------------------------------


@case(bools(3, 4), bools(4, 2), bools(4), bools(ROWS, 3))
def dot_of_bools(a, b, v, large):
    """Whether any term has both; with an even number of such terms, too."""
    return {
        "matrix_matrix": a @ b,
        "matrix_vector": a @ v,
        "same": v @ v,
        "constant": jnp.ones((2, 4), bool) @ v,
        "counted": lax.dot(a, b, preferred_element_type=jnp.int32),
        "in_memory": large.T @ large,
    }


@case(
    between(-1, 1, 3, 4),
    between(-1, 1, 4, 5),
    between(-1, 1, 4),
    between(-1, 1, 2, 3, 4),
    ulp=4,
    share=1e-6,
)
def dot_general(a, b, v, batch):
    c = jnp.array([[0.0, 1.0, 0.0, 2.0], [0.5, 0.0, 0.0, -1.0]])
    return {
        "matrix_matrix": a @ b,
        "matrix_vector": a @ v,
        "vector_matrix": v @ b,
        "vector_vector": v @ a[0],
        "outer": jnp.outer(v, a[:, 0]),
        "transposed": a.T @ a,
        "batch": batch @ b,
        "batches": jnp.einsum("bij,bkj->bik", batch, batch),
        "batch_last": jnp.einsum(
            "ijb,kjb->bik", batch.transpose(1, 2, 0), batch.transpose(1, 2, 0)
        ),
        "batch_vector": jnp.einsum("bij,bj->bi", batch, batch[:, 0]),
        "two_contracted": jnp.tensordot(batch, a, axes=((1, 2), (0, 1))),
        "outer_of_three": jnp.einsum("i,j,k->ijk", v, a[:, 1], b[0]),
        "trace": jnp.einsum("ij,ij->", a, a),
        "constant": c @ b,
        "constant_right": a @ c.T,
        "highest": jnp.dot(a, b, precision=lax.Precision.HIGHEST),
        "float_of_integers": jnp.dot(
            jnp.arange(4), jnp.arange(4), preferred_element_type=jnp.float32
        ),
        "empty": a[:, :0] @ b[:0],
    }


@case(integers(3, 4), unsigned(4, 2), with_nan(-1, 1, 2, 3), with_nan(-1, 1, 3), ulp=4, share=1e-6)
def dot_of_integers_and_nan(n, u, x, v):
    return {
        "integers": n @ n.T,
        "unsigned": u.T @ u,
        "nan": x @ v,
        "nan_outer": jnp.outer(x[0], v),
    }


@case(
    positive_definite(1),
    positive_definite(3),
    positive_definite(6),
    positive_definite(3, 2),
    between(-1, 1, 6),
    ulp=4,
    share=2e-5,
)
def cholesky(one, three, six, batch, v):
    root = jnp.linalg.cholesky(six)
    return {
        "one": jnp.linalg.cholesky(one),
        "three": jnp.linalg.cholesky(three),
        "six": root,
        "batch": jnp.linalg.cholesky(batch),
        "not_symmetric": lax.linalg.cholesky(jnp.tril(three), symmetrize_input=False),
        "upper": jnp.linalg.cholesky(three, upper=True),
        "solve": jax.scipy.linalg.cho_solve((root, True), v),
        "solve_matrix": jax.scipy.linalg.cho_solve((root, True), jnp.stack([v, v + 1], axis=1)),
        "cho_factor": jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(six), v),
    }


def indefinite(generator, worlds):
    """Symmetric matrices of which every other is positive definite, [worlds, 3, 3]."""
    matrix = positive_definite(3)(generator, worlds)
    matrix[::2, 1, 1] = -1.0
    matrix[::6, 0, 0] = np.nan
    return matrix


@case(indefinite, ulp=4, share=2e-5)
def cholesky_of_what_has_no_root(matrix):
    """NaN to its end; JAX's is NaN from its beginning."""
    root = jnp.linalg.cholesky(matrix)
    return {"root": jnp.where(jnp.isnan(root[-1, -1]), jnp.nan, root)}


@case(
    positive_definite(4),
    between(-1, 1, 4, 2),
    between(-1, 1, 3, 4),
    between(-1, 1, 4),
    ulp=4,
    share=2e-5,
)
def triangular_solve(matrix, right, left, v):
    """Every way to call it; the half of the matrix that it must not read holds NaNs."""
    matrix = matrix / 4 + jnp.eye(4)
    triangles = {
        True: jnp.where(jnp.tri(4) > 0, matrix, jnp.nan),
        False: jnp.where(jnp.tri(4).T > 0, matrix, jnp.nan),
    }
    result = {}
    for lower, transpose, unit in itertools.product((True, False), repeat=3):
        options = {"lower": lower, "transpose_a": transpose, "unit_diagonal": unit}
        name = "_".join(key for key, value in options.items() if value)
        solve = functools.partial(lax.linalg.triangular_solve, triangles[lower], **options)
        result["left_" + name] = solve(right, left_side=True)
        result["right_" + name] = solve(left, left_side=False)
    solve = jax.scipy.linalg.solve_triangular
    result["vector"] = solve(triangles[True], v, lower=True)
    result["vector_transposed"] = solve(triangles[False], v, trans="T")
    return result


@case(
    between(-1, 1, 3),
    between(-1, 1, 3),
    between(-1, 1, 4, 3),
    between(-1, 1, 3, 3),
    ulp=4,
    share=2e-6,
)
def small_vectors(a, b, rows, matrix):
    return {
        "cross": jnp.cross(a, b),
        "cross_rows": jnp.cross(rows, b),
        "norm": jnp.linalg.norm(a),
        "norm_rows": jnp.linalg.norm(rows, axis=1),
        "norm_inf": jnp.linalg.norm(a, jnp.inf),
        "norm_1": jnp.linalg.norm(a, 1),
        "normalised": a / (jnp.linalg.norm(a) + 1e-6),
        "dot": jnp.vdot(a, b),
        "trace": jnp.trace(matrix),
        "kron": jnp.kron(a, b),
        "matrix_power": jnp.linalg.matrix_power(matrix, 3),
    }


# ---- Loops and branches --------------------------------------------------------------------


@case(indices(-2, 9), between(-1, 1, 3), indices(0, 100), ulp=4)
def while_loops(n, x, start):
    """Loops that every world leaves at a time of its own, some before the first turn."""

    def collatz(carry):
        value, steps = carry
        return jnp.where(value % 2 == 0, value // 2, 3 * value + 1), steps + 1

    def newton(carry):
        root, _ = carry
        return 0.5 * (root + (x[0] + 2) / root), root

    def fill(carry):
        i, values = carry
        return i + 1, values.at[i].set(values[i - 1] + x[1])

    number, steps = lax.while_loop(lambda c: c[0] > 1, collatz, (start, jnp.int32(0)))
    swapped = lax.while_loop(lambda c: c[0] > 0, lambda c: (c[0] - 1, c[2], c[1]), (n, x[0], x[1]))
    root, _ = lax.while_loop(lambda c: c[0] < 0.999 * c[1], newton, (x[0] + 2, 2 * x[0] + 4.1))
    nothing = lax.while_loop(lambda c: n < -5, lambda c: c + 1, x)
    power = lax.while_loop(lambda c: jnp.all(jnp.abs(c) < 8), lambda c: c * 2, x + 2)
    flag, count = lax.while_loop(lambda c: c[0], lambda c: (c[1] < n, c[1] + 1), (n > 0, 0))
    bits = lax.while_loop(lambda u: u > 1, lambda u: u >> 1, start.astype(jnp.uint32))
    _, filled = lax.while_loop(lambda c: c[0] < n, fill, (jnp.int32(1), jnp.zeros(9)))
    return {
        "number": number,
        "steps": steps,
        "swapped": jnp.stack(swapped[1:]),
        "root": root,
        "nothing": nothing,
        "power": power,
        "flag": flag,
        "count": count,
        "bits": bits,
        "filled": filled,
    }


@case(indices(-2, 7), between(-1, 1, 3), between(-0.5, 0.5, 3, 3), ulp=16, share=1e-6)
def fori_loops(n, x, matrix):
    def fibonacci(_, pair):
        return pair[1], pair[0] + pair[1]

    def nested(i, total):
        return lax.fori_loop(0, i, lambda j, inner: inner + i * x[1] + j, total)

    def shift(_, values):
        return jnp.roll(values, 1).at[0].add(0.25)

    def masked(i, values):
        return jnp.where(i % 2 == 0, jnp.sin(values), values + 0.5)

    return {
        "constant_bounds": lax.fori_loop(0, 5, lambda i, v: jnp.sin(v) + i, x),
        "dynamic_bounds": lax.fori_loop(0, n, lambda i, v: v * 0.9 + i, x),
        "dynamic_start": lax.fori_loop(n, 6, lambda i, v: v + i, jnp.int32(0)),
        "negative_start": lax.fori_loop(-3, 4, lambda i, v: v + i * i, n),
        "no_turn": lax.fori_loop(3, 3, lambda i, v: v * 0, x),
        "one_turn": lax.fori_loop(0, 1, lambda i, v: v + 1, x),
        "fibonacci": lax.fori_loop(0, n, fibonacci, (jnp.int32(0), jnp.int32(1)))[0],
        "matrix": lax.fori_loop(0, 6, lambda _, v: jnp.tanh(matrix @ v) + x, x),
        "nested": lax.fori_loop(0, n, nested, jnp.float32(0)),
        "shift": lax.fori_loop(0, 4, shift, x),
        "masked": lax.fori_loop(0, 5, masked, x),
        "many_turns": lax.fori_loop(0, 1000, lambda _, u: u * 1664525 + 1013904223, n),
        "unchanged": lax.fori_loop(0, 3, lambda _, c: (c[0], c[1] + c[0]), (x, x))[0],
        "unrolled": lax.fori_loop(0, 4, lambda i, v: v * x + i, x, unroll=True),
    }


@case(between(-1, 1, 6, 2), between(-1, 1, 2), integers(6), indices(0, 6), ulp=16, share=1e-6)
def scans(xs, start, numbers, stop):
    def filtered(carry, x):
        carry = 0.5 * carry + x
        return carry, jnp.sin(carry)

    def counted(total, x):
        return total + x, (total, x > 0)

    def inner(carry, x):
        carry, trace = lax.scan(lambda c, y: (c + y * x[0], c), carry, x)
        return carry, trace

    def branched(carry, x):
        carry = lax.cond(x[0] > 0, lambda c: c + x, lambda c: c * 0.5, carry)
        return carry, carry

    def windowed(buffer, x):
        buffer = jnp.concatenate([buffer[1:], x[:1]])
        return buffer, buffer.mean()

    def table_read(carry, k):
        return carry + xs[k % 6, 0], xs[stop]

    forward = lax.scan(filtered, start, xs)
    backward = lax.scan(filtered, start, xs, reverse=True)
    total, (before, positive) = lax.scan(counted, jnp.int32(0), numbers)
    without_xs = lax.scan(lambda c, _: (c * 0.9, c), start, length=4)
    without_ys = lax.scan(lambda c, x: (jnp.tanh(c + x), None), start, xs)
    without_carry = lax.scan(lambda _, x: (None, x * 2), None, xs)
    unrolled = lax.scan(filtered, start, xs, unroll=4)
    constant_xs = lax.scan(filtered, start, jnp.arange(8.0).reshape(4, 2))
    return {
        "carry": forward[0],
        "ys": forward[1],
        "reverse_carry": backward[0],
        "reverse_ys": backward[1],
        "total": total,
        "before": before,
        "positive": positive,
        "without_xs": without_xs[1],
        "without_ys": without_ys[0],
        "without_carry": without_carry[1],
        "unrolled": unrolled[1],
        "constant_xs": constant_xs[1],
        "none": lax.scan(filtered, start, xs[:0])[0],
        "none_ys": lax.scan(filtered, start, xs[:0])[1],
        "one": lax.scan(filtered, start, xs[:1])[1],
        "nested": lax.scan(inner, jnp.float32(0), xs)[1],
        "branched": lax.scan(branched, start, xs)[1],
        "windowed": lax.scan(windowed, jnp.zeros(3), xs)[1],
        "table_read": lax.scan(table_read, jnp.float32(0), jnp.arange(9))[1],
        "map": lax.map(jnp.cos, xs),
        "associative_scan": lax.associative_scan(jnp.add, xs),
    }


@case(bools(), indices(-2, 6), between(-1, 1, 3), indices(0, 5), ulp=16, share=1e-6)
def branches(flag, which, x, n):
    """Branches of all kinds; `switch` moves an index that is out of range into it."""

    def costly(v):
        return lax.fori_loop(0, n, lambda _, w: jnp.sin(w) + 0.1, v)

    three = (jnp.sin, lambda v: v + n, lambda v: v[::-1])
    inner = functools.partial(lax.cond, x[0] > 0, lambda v: v + 1, lambda v: v - 1)
    both = lax.cond(flag, lambda a, b: (a, b + 1), lambda a, b: (a * 2, b), x, n)
    return {
        "bool": lax.cond(flag, lambda v: v * 2, lambda v: v - 1, x),
        "integer": lax.cond(n, lambda v: v * 2, lambda v: v - 1, x),
        "float": lax.cond(x[0] > x[1], lambda: x[0], lambda: x[1]),
        "constants": lax.cond(flag, lambda: jnp.arange(3), lambda: jnp.full(3, 7)),
        "unchanged": lax.cond(flag, lambda v: v, lambda v: v, x),
        "one_unchanged": lax.cond(flag, lambda v: v, lambda v: -v, x),
        "two_results_0": both[0],
        "two_results_1": both[1],
        "switch": lax.switch(which, three, x),
        "switch_of_many": lax.switch(n, [lambda v, k=k: v[k % 3] + k for k in range(5)], x),
        "switch_of_one": lax.switch(which, [lambda v: v + 1], x),
        "constant_index": lax.switch(1, three, x),
        "nested": lax.cond(flag, inner, jnp.abs, x),
        "loop_inside": lax.cond(flag, costly, lambda v: v, x),
        "in_vmap": jax.vmap(lambda y: lax.cond(y > 0, lambda z: z * n, jnp.cos, y))(x),
        "of_bools": lax.cond(flag, lambda m: ~m, lambda m: m, x > 0),
    }


@case(indices(0, 5), indices(0, 5), between(-1, 1, 4), ulp=32, share=1e-6)
def nested_loops(n, m, x):
    """Loops in branches in loops, with numbers of turns that depend on the loop around them."""

    def outer(carry):
        i, v = carry
        v = lax.fori_loop(0, (i + m) % 4, lambda j, w: jnp.sin(w) + 0.1 * j * x, v)
        v = lax.cond(i % 2 == 0, lambda w: search(w, i), lambda w: w, v)
        return i + 1, v

    def search(v, i):
        found = lax.while_loop(lambda k: (k < 3) & (v[k] < 0.2 * i), lambda k: k + 1, jnp.int32(0))
        return v.at[found].add(0.5)

    def scan_body(total, row):
        total, kept = lax.scan(lambda t, y: (t * 0.5 + y, t), total, row)
        return total, kept.sum() + lax.while_loop(lambda t: t < n, lambda t: t + 2, 0)

    _, v = lax.while_loop(lambda c: c[0] < n, outer, (jnp.int32(0), x))
    return {
        "while": v,
        "scan": lax.scan(scan_body, jnp.float32(0), jnp.stack([x, x[::-1], x * 2]))[1],
        "triangle": lax.fori_loop(
            0, n, lambda i, t: lax.fori_loop(i, m, lambda j, u: u + i * j, t), jnp.int32(0)
        ),
    }


# ---- Functions within functions ------------------------------------------------------------


@jax.custom_jvp
def soft_abs(x):
    return jnp.sqrt(x * x + 0.01)


@soft_abs.defjvp
def soft_abs_jvp(primals, tangents):
    return soft_abs(primals[0]), tangents[0] * jnp.sign(primals[0])


@jax.custom_vjp
def clipped_identity(x):
    return x * 1.5


clipped_identity.defvjp(
    lambda x: (x * 1.5, x), lambda x, gradient: (jnp.clip(gradient, -1, 1) * x,)
)


@case(between(-3, 3, 4), between(-1, 1, 4, 4), ulp=8, share=1e-6)
def functions_in_functions(x, matrix):
    def energy(v):
        return 0.5 * v @ jnp.tanh(matrix @ v) + jax.nn.softplus(v).sum()

    swish = jax.checkpoint(lambda v: v * jax.nn.sigmoid(v))
    return {
        "relu": jax.nn.relu(x),
        "softplus": jax.nn.softplus(x),
        "elu": jax.nn.elu(x),
        "gelu": jax.nn.gelu(x),
        "silu": jax.nn.silu(x),
        "leaky_relu": jax.nn.leaky_relu(x),
        "custom_jvp": soft_abs(x),
        "custom_vjp": clipped_identity(x),
        "jit": jax.jit(lambda v: jnp.sin(v) + 1)(x),
        "jit_twice": jax.jit(jax.jit(lambda v: v @ matrix))(x),
        "checkpoint": swish(x),
        "stop_gradient": lax.stop_gradient(x) * 2,
        "device_put": jnp.stack(jax.device_put([x, jnp.arange(4.0)], jax.devices()[0])),
        "gradient": jax.grad(energy)(x),
        "gradient_of_checkpoint": jax.grad(lambda v: swish(v).sum())(x),
        "custom_jvp_gradient": jax.grad(lambda v: soft_abs(v).sum())(x),
        "custom_vjp_gradient": jax.grad(lambda v: clipped_identity(v).sum())(x),
        "jacobian": jax.jacfwd(lambda v: jnp.sin(matrix @ v))(x),
        "jvp": jnp.stack(jax.jvp(energy, (x,), (jnp.ones(4),))),
        "vmap": jax.vmap(lambda row: row @ x)(matrix),
        "vmap_of_outer": jax.vmap(jax.vmap(lambda a, b: a * b - a, (None, 0)), (0, None))(x, x),
        "gradient_of_loop": jax.grad(
            lambda v: lax.fori_loop(0, 3, lambda _, w: jnp.sin(matrix @ w), v).sum()
        )(x),
    }


# ---- Random numbers ------------------------------------------------------------------------


@case(keys(), indices(-5, 500), keys(2), ulp=4)
def random_numbers(key, n, two):
    """Integers, bits and keys are JAX's own to the bit; so are uniform floats, here to rounding."""
    first, second, third = jax.random.split(key, 3)
    folded = jax.random.fold_in(key, n)
    return {
        "split": jax.random.split(key),
        "stacked": jnp.stack([first, third]),
        "split_many": jax.random.split(key, (2, 3)),
        "fold_in": folded,
        "fold_in_constant": jax.random.fold_in(key, 7),
        "key_data": jax.random.key_data(second),
        "wrapped": jax.random.wrap_key_data(jax.random.key_data(third) + jnp.uint32(1)),
        "seed": jax.random.key(n),
        "constant_key": jax.random.bits(jax.random.key(3), (2,)),
        "bits": jax.random.bits(first, (3,)),
        "one": jax.random.bits(folded),
        "uniform": jax.random.uniform(first, (5,)),
        "uniform_between": jax.random.uniform(second, (2, 2), minval=-3.0, maxval=n + 4.5),
        "normal": jax.random.normal(second, (4,)),
        "randint": jax.random.randint(third, (5,), 0, 10),
        "randint_between": jax.random.randint(first, (), -7, n + 3),
        "bernoulli": jax.random.bernoulli(second, 0.3, (6,)),
        "exponential": jax.random.exponential(third, (3,)),
        "second_key": two[1],
        "selected_key": jax.random.bits(two[n % 2]),
        "of_many_keys": jax.vmap(jax.random.uniform)(two),
        "stacked_keys": jnp.stack([first, two[0]]),
        "chosen_key": jnp.where(n > 100, first, second),
    }


@case(keys(), between(-1, 1, 5), ulp=4)
def random_order(key, x):
    return {
        "permutation": jax.random.permutation(key, 6),
        "permutation_of": jax.random.permutation(key, x),
        "choice": jax.random.choice(key, 10, (3,)),
        "choice_without_replacement": jax.random.choice(key, 5, (3,), replace=False),
        "categorical": jax.random.categorical(key, x),
    }


@case(keys(), indices(0, 6), ulp=4)
def random_numbers_in_loops(key, n):
    """Keys that a loop carries, hands on and returns."""

    def draw(carry, _):
        key, total = carry
        key, use = jax.random.split(key)
        return (key, total + jax.random.uniform(use)), jax.random.randint(use, (), 0, 9)

    (after, total), drawn = lax.scan(draw, (key, jnp.float32(0)), length=4)
    waited = lax.while_loop(
        lambda c: jax.random.uniform(c[0]) > 0.4,
        lambda c: (jax.random.split(c[0])[0], c[1] + 1),
        (key, jnp.int32(0)),
    )
    return {
        "after": after,
        "total": total,
        "drawn": drawn,
        "waited_key": waited[0],
        "waited": waited[1],
        "folded": lax.fori_loop(0, n, lambda i, k: jax.random.fold_in(k, i), key),
        "branch": lax.cond(n > 2, lambda k: jax.random.split(k)[1], lambda k: k, key),
    }


def old_keys(generator, worlds):
    """Keys of the old kind: two uint32 a world, [worlds, 2]."""
    return generator.integers(0, 2**32, (worlds, 2), np.uint32)


@case(old_keys, ulp=4)
def random_numbers_of_old_keys(key):
    return {
        "split": jax.random.split(key),
        "fold_in": jax.random.fold_in(key, 3),
        "uniform": jax.random.uniform(key, (3,)),
    }


# ---- Large arrays: beyond a size, a compiler cannot write out every element --------------------


@case(between(-1, 1, 600, 14), worlds=FEW_WORLDS, ulp=4, share=3e-6, scalar_limits=IN_MEMORY)
def large_products(x):
    table = jnp.asarray(CONSTANT_TABLE[:280]).reshape(14, 20)
    square = x @ x.T
    return {
        "square": square,
        "row_sums": square.sum(1),
        "constant": x @ table,
        "vector": x @ table[:, 0],
        "gram": x.T @ x,
        "batch": jnp.einsum(
            "bij,bkj->bik", x[:80].reshape(20, 4, 14), x[80:140].reshape(20, 3, 14)
        ),
        "outer": jnp.outer(x[:, 0], x[:, 1])[::7, ::5],
    }


@case(floats(ROWS, 3), integers(ROWS, 3), worlds=FEW_WORLDS, ulp=4, share=1e-6)
def large_elementwise(x, n):
    y = jnp.clip(jnp.nan_to_num(x), -3, 3)
    return {
        "chain": jnp.where(x > 0, jnp.sin(y) * 2 + y[:, :1], jnp.exp(y)),
        "broadcast": y + jnp.arange(float(ROWS))[:, None],
        "broadcast_columns": y[:, 1:2] * jnp.array([1.0, 2.0, -3.0]),
        "integers": lax.div(n, jnp.int32(7)) + (n << 3),
        "bools": (n > 5) & (x < 1),
        "convert": n.astype(jnp.float32),
        "clamp": lax.clamp(-2.0, x, 2.0),
        "abs": jnp.abs(x),
    }


@case(
    with_nan(-1, 1, ROWS, 3),
    integers(ROWS, 3),
    bools(ROWS, 3),
    worlds=FEW_WORLDS,
    ulp=8,
    share=2e-5,
    truth={  # XLA forgets a NaN now and then
        "max": lambda x, n, flags: x.max(1),
        "min": lambda x, n, flags: x.min((1, 2)),
    },
)
def large_reductions(x, n, flags):
    return {
        "sum": x.sum(0),
        "sum_all": x.sum(),
        "max": x.max(0),
        "min": x.min(),
        "sum_integers": n.sum(),
        "argmin": jnp.argmin(n[:200]),  # of more, LLVM would take long
        "any": flags.any(),
        "count": flags.sum(),
        "mean": x.reshape(60, 100).mean(1),
        "cumsum_integers": jnp.cumsum(n, 0),
        "cummax": lax.cummax(n),
        "prod": n.reshape(20, 300).prod(1),
    }


@case(between(0, 1, ROWS, 3), worlds=FEW_WORLDS, ulp=8, share=2e-5)
def large_cumulative_sums(x):
    return {
        "cumsum": jnp.cumsum(x, 0),
        "reverse": lax.cumsum(x, 0, reverse=True),
        "columns": jnp.cumsum(x, 1),
    }


@case(between(-1, 1, 200, 3), worlds=FEW_WORLDS, ulp=8, share=2e-5)
def middle_sized_arrays(x):
    """Large, yet not too large to be taken apart: here a compiler may take very long."""
    return {
        "chain": jnp.sin(x) * 2 + x[:, :1],
        "transpose": x.T,
        "sum": x.sum(0),
        "argmax": jnp.argmax(x, 0),
    }


@case(floats(ROWS, 3), integers(80, 60), worlds=FEW_WORLDS)
def large_moves(x, n):
    return {
        "transpose": x.T,
        "reshape": x.reshape(3, ROWS),
        "transpose_reshape": n.T.reshape(-1),
        "rev": x[::-1],
        "stride": x[1::7, ::2],
        "concatenate": jnp.concatenate([x[900:], x[:600]]),
        "pad": jnp.pad(x, ((3, 4), (0, 1))),
        "roll": jnp.roll(x, 17, axis=0),
        "broadcast": jnp.broadcast_to(n[:, None, :30], (80, 2, 30)),
        "tile": jnp.tile(n, (2, 1)),
        "where": jnp.where(n % 2 == 0, n, -n),
        "iota": jnp.arange(4800).reshape(80, 60) + n,
        "swapaxes": x.reshape(20, 100, 3).transpose(2, 0, 1),
    }


@case(tied(64), floats(64), integers(64), worlds=FEW_WORLDS)
def large_sort(x, y, n):
    sorted_x, order = lax.sort((x, jnp.arange(64)), num_keys=1, is_stable=True)
    by_two = lax.sort((n % 5, x, n), num_keys=2, is_stable=True)
    values, places = lax.top_k(n, 8)
    return {
        "sorted": sorted_x,
        "order": order,
        "wide": jnp.sort(y),
        "by_two": by_two[2],
        "top_values": values,
        "top_places": places,
        "argsort": jnp.argsort(n),
    }


@case(
    floats(ROWS, 3),
    integers(300),
    indices(-2400, 2400, 50),
    indices(-20, 320, 40),
    indices(-100, 2100),
    worlds=FEW_WORLDS,
)
def large_gather_and_scatter(x, n, i, j, start):
    return {
        "rows": x[i],
        "clip": jnp.take(x, i, axis=0, mode="clip"),
        "elements": x[i, i % 3],
        "numbers": n[j],
        "add": n.at[j].add(j * 3),
        "set": n.at[j].set(-5),
        "max": n.at[j].max(n[:40]),
        "set_rows": x.at[i].set(2.5),
        "part": lax.dynamic_slice(x, (start, 1), (100, 2)),
        "update": lax.dynamic_update_slice(x, x[:100] * 2, (start, 0)),
        "constant_indices": x[jnp.arange(0, ROWS, 300)],
        "set_at_constants": x.at[jnp.arange(0, ROWS, 300)].set(0.0),
    }


@case(positive_definite(24), between(-1, 1, 24, 3), worlds=FEW_WORLDS, ulp=4, share=1e-4)
def large_cholesky(matrix, right):
    root = jnp.linalg.cholesky(matrix)
    return {
        "root": root,
        "solution": jax.scipy.linalg.cho_solve((root, True), right),
        "half": jax.scipy.linalg.solve_triangular(root, right, lower=True),
        "right": lax.linalg.triangular_solve(root, right.T, lower=True),
    }


@case(
    between(-1, 1, 400, 3),
    between(-1, 1, 200, 10),
    indices(0, 6),
    worlds=FEW_WORLDS,
    ulp=64,
    share=1e-5,
    scalar_limits=IN_MEMORY,
)
def large_loops(x, xs, n):
    def smooth(carry):
        i, v = carry
        return i + 1, 0.5 * (v + jnp.roll(v, 1, axis=0))

    def leaky(carry, row):
        carry = jnp.tanh(0.8 * carry + row)
        return carry, carry

    def visit(i, v):
        return v.at[i].set(v[i - 1] * 0.5 + v[i])

    carry, trace = lax.scan(leaky, jnp.zeros(10), xs)
    return {
        "while": lax.while_loop(lambda c: c[0] < n, smooth, (jnp.int32(0), x))[1],
        "scan_carry": carry,
        "scan_ys": trace,
        "reverse": lax.scan(leaky, jnp.zeros(10), xs, reverse=True)[1],
        "visit": lax.fori_loop(1, 400, visit, x),
        "cond": lax.cond(n > 2, lambda v: v * 2, lambda v: v[::-1], x),
        "long": lax.scan(lambda c, _: (c * 0.99 + 0.1, c), x[0], length=1000)[1],
        "map": lax.map(lambda row: row @ row, x),
    }


@case(keys(), worlds=FEW_WORLDS, ulp=4, scalar_limits=(64,))
def large_random_numbers(key):
    return {
        "normal": jax.random.normal(key, (40, 3)),
        "bits": jax.random.bits(key, (100,)),
        "split": jax.random.split(key, 20),
    }


# ---- The kernel itself ---------------------------------------------------------------------


# LLVM takes 20 and 7 seconds; large_moves and tables_of_a_world read and write by index in memory, too, and
# test_onekernel_dense.py has large products.
SLOW = ("large_gather_and_scatter", "large_products")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def test_primitive(name, monkeypatch):
    """The compiled function has JAX's numbers, and the same bits in every batch and alone."""
    checked = CASES[name]
    monkeypatch.setattr(onekernel.api, "SCALAR_LIMITS", checked.scalar_limits)
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    arguments = [make(generator, checked.worlds) for make in checked.inputs]
    step = onekernel.compile(checked.function)
    step_worlds = jax.jit(jax.vmap(step))

    expected = by_xla(checked.function, arguments)
    whole = step_worlds(*arguments)
    found = differences(checked, arguments, whole, expected)

    whole = {key: plain(value) for key, value in whole.items()}
    for size, first in BATCHES.items():
        if first + size > checked.worlds:
            continue
        part = step_worlds(*(x[first : first + size] for x in arguments))
        for key, value in part.items():
            if not same_bits(plain(value), whole[key][first : first + size]).all():
                found.append(f"{key}: other bits in a batch of {size}")
    alone = jax.jit(step)(*(x[7] for x in arguments))
    for key, value in alone.items():
        if not same_bits(plain(value), whole[key][7]).all():
            found.append(f"{key}: other bits without vmap")
    assert not found, "\n" + "\n".join(found)


def test_vmap_of_a_compiled_function_is_one_kernel():
    """XLA sees one call, and none of the operations that the call stands for."""

    def swing(x):
        return lax.fori_loop(0, 3, lambda _, v: jnp.sin(v) + 0.1, x)

    step_worlds = jax.jit(jax.vmap(onekernel.compile(swing)))
    program = step_worlds.lower(np.zeros((5, 3), np.float32)).as_text()
    assert program.count("stablehlo.custom_call") == 1, program
    assert "stablehlo.sine" not in program
    assert "stablehlo.while" not in program


def test_fallback_is_seen_here():
    """The warning that all the tests above rely on is an error in this file."""
    step = onekernel.compile(lambda x: jnp.nextafter(x, 2.0))
    with pytest.raises(onekernel.Fallback, match="nextafter"):
        step(jnp.float32(1))
