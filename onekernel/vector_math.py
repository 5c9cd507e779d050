"""Sine, exponential, power and their like as LLVM IR, for one world or for a vector of worlds.

A processor has instructions for +, -, *, / and square roots, but none for `sin`. A mathematics
library computes such functions for one number at a time; a kernel that computes 16 worlds in the 16
lanes of a vector register needs them for 16 numbers at once. So they are written here, out of the
instructions that every processor and every NVIDIA GPU has, in the language that LLVM compiles:

    text, declarations = define("sin", 16)  # define internal <16 x float> @ok.sin.v16(...
    text, declarations = define("sin", 1)  # define internal float @ok.sin.v1(float %x) ...

How to read this file. A `Function` collects instructions, and a `Value` is the result of one of
them: `a * b` does not multiply anything now, it writes the instruction that will. So each function
below (`exponential`, `arc_tangent`, ...) reads like the mathematics that it is. Nearly all of them
take the same three steps:

1. reduce: bring x into a small range by an identity, e.g. exp(x) = 2^n exp(x - n ln 2);
2. approximate: there, a polynomial is as good as the function itself in float32;
3. reconstruct: undo step 1, e.g. multiply by 2^n, and set right what is special (0, infinity, NaN).

They do not branch, since all lanes of a vector do the same thing at the same time: both sides of a
choice are computed, and `select` takes one or the other in each lane. The two exceptions are
`when_any` and `repeat_while_any`; they, too, give each lane what it would have got alone.

Accuracy. The error is at most 2 units in the last place (ulp) for every float32 argument; it is
measured in tests/test_onekernel_math.py. `fmod` is exact. `erf_inv` is the approximation that XLA
uses, so that random normal numbers agree with JAX's within 2 ulp (nearly always to the bit); like
XLA's, it is about 3 ulp off in the middle of its range, and up to 65 ulp close to -1 and 1.
0, infinities and NaN give what JAX gives on a CPU, which is what the C standard says, the sign of 0
included. The number of lanes does not change a result, to the bit.

Subnormal numbers (below 1.2e-38): some threads, XLA's among them, tell the processor to take them
for 0, others do not. The functions leave it at that: a subnormal argument counts as itself or as 0,
and a subnormal result may come out as 0. A subnormal divisor of `fmod` always counts as 0.

Coefficients of polynomials are our own fits unless another source is named: near-minimax in
relative error (least squares at Chebyshev points, reweighted until the error is level), rounded to
float32 one by one, from the lowest power up, with the rest fitted anew each time. "High" and "low"
parts of a constant or a result are float32 numbers of which the exact sum is meant: the second
holds what does not fit into the 24 bits of the first.
"""

import inspect
import math
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np

# --- Constants ------------------------------------------------------------------------------------


def float32_parts(number: Fraction, count: int) -> list[float]:
    """`count` float32 numbers whose sum is `number`: each is what the ones before it leave.

    They are cut off, not rounded, to have the same sign: x - 0 * part is x then, also if x is -0.
    """
    parts = []
    for _ in range(count):
        part = np.float32(float(number))
        if abs(Fraction(float(part))) > abs(number):
            part = np.nextafter(part, np.float32(0))
        parts.append(float(part))
        number -= Fraction(float(part))
    return parts


PI = Fraction("3.14159265358979323846264338327950288")
LN2 = Fraction("0.69314718055994530941723212145817657")

PI_HIGH, PI_LOW = float32_parts(PI, 2)
HALF_PI_HIGH, HALF_PI_MIDDLE, HALF_PI_LOW = float32_parts(PI / 2, 3)
LN2_HIGH, LN2_LOW = float32_parts(LN2, 2)
TWO_LOG2_E_HIGH, TWO_LOG2_E_LOW = float32_parts(2 / LN2, 2)
THIRD_HIGH, THIRD_LOW = float32_parts(Fraction(1, 3), 2)

# The first 224 bits of 1 / (2 pi) after the binary point.
INVERSE_TWO_PI_BITS = 0x28BE60DB9391054A7F09D5F47D4D377036D8A5664F10E4107F9458EA

# A float32 has 24 bits, and 1.5 * 2^23 uses them all: what is added to it is rounded to an integer,
# and that integer stands in the last bits of the sum.
ROUNDING = 1.5 * 2.0**23
ROUNDING_BITS = 0x4B400000

SMALLEST_NORMAL = 2.0**-126
INFINITY = math.inf
NAN = math.nan

# --- The builder: instructions and their results --------------------------------------------------

# LLVM's name of an element type, as it stands in the names of LLVM's built-in functions.
SUFFIXES = {"float": "f32", "double": "f64", "i32": "i32", "i64": "i64", "i1": "i1"}
FLOATS = ("float", "double")


class Value:
    """The result of an instruction: a number of type `kind` in each lane.

    Operators write the instruction of that name; the other operand may be a Python number. Integers
    are signed in comparisons and in >>, the rest is the same for signed and unsigned ones.
    """

    __hash__ = None  # == writes an instruction

    def __init__(self, function: "Function", kind: str, text: str):
        self.function = function
        self.kind = kind
        self.text = text  # a name such as %7, or a literal

    def _binary(
        self, float_operation: str, integer_operation: str, other, swapped=False
    ) -> "Value":
        operation = float_operation if self.kind in FLOATS else integer_operation
        other = self.function.value(other, self.kind)
        left, right = (other, self) if swapped else (self, other)
        type_ = self.function.type(self.kind)
        return self.function.write(self.kind, f"{operation} {type_} {left.text}, {right.text}")

    def _compare(self, float_predicate: str, integer_predicate: str, other) -> "Value":
        if self.kind in FLOATS:
            operation = f"fcmp {float_predicate}"
        else:
            operation = f"icmp {integer_predicate}"
        other = self.function.value(other, self.kind)
        type_ = self.function.type(self.kind)
        return self.function.write("i1", f"{operation} {type_} {self.text}, {other.text}")

    def __add__(self, other):
        return self._binary("fadd", "add", other)

    def __sub__(self, other):
        return self._binary("fsub", "sub", other)

    def __mul__(self, other):
        return self._binary("fmul", "mul", other)

    def __truediv__(self, other):
        return self._binary("fdiv", "", other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other):
        return self._binary("fsub", "sub", other, swapped=True)

    def __rtruediv__(self, other):
        return self._binary("fdiv", "", other, swapped=True)

    def __neg__(self):
        if self.kind in FLOATS:
            return self.function.write(
                self.kind, f"fneg {self.function.type(self.kind)} {self.text}"
            )
        return 0 - self

    def __and__(self, other):
        return self._binary("", "and", other)

    def __or__(self, other):
        return self._binary("", "or", other)

    def __xor__(self, other):
        return self._binary("", "xor", other)

    def __invert__(self):
        return self ^ -1

    def __lshift__(self, other):
        return self._binary("", "shl", other)

    def __rshift__(self, other):
        return self._binary("", "ashr", other)

    def shifted_right(self, other):
        """>> of an unsigned integer: zeros come in from the left."""
        return self._binary("", "lshr", other)

    # A comparison with a NaN is false, except !=.

    def __lt__(self, other):
        return self._compare("olt", "slt", other)

    def __le__(self, other):
        return self._compare("ole", "sle", other)

    def __gt__(self, other):
        return self._compare("ogt", "sgt", other)

    def __ge__(self, other):
        return self._compare("oge", "sge", other)

    def __eq__(self, other):
        return self._compare("oeq", "eq", other)

    def __ne__(self, other):
        return self._compare("une", "ne", other)


class Function:
    """The instructions of one function while they are written, for `width` lanes."""

    def __init__(self, width: int):
        self.width = width
        self.lines: list[str] = []
        self.declarations: set[str] = set()
        self.block = "entry"  # name of the basic block (instructions without a jump) written to now
        self.names = 0

    # Writing

    def type(self, kind: str) -> str:
        """<16 x float> for "float", or float where there is but one lane."""
        return kind if self.width == 1 else f"<{self.width} x {kind}>"

    def new_name(self) -> str:
        self.names += 1
        return str(self.names)

    def write(self, kind: str, instruction: str) -> Value:
        name = "%t" + self.new_name()
        self.lines.append(f"  {name} = {instruction}")
        return Value(self, kind, name)

    def value(self, number, kind: str) -> Value:
        """A Python number as the same literal in all lanes; a Value as it is."""
        if isinstance(number, Value):
            return number
        if kind == "float":
            number = float(np.float32(number))
        if kind in FLOATS:  # LLVM writes both as the bits of a double
            literal = "0x" + struct.pack(">d", number).hex().upper()
        elif kind == "i1":
            literal = "true" if number else "false"
        else:
            literal = str(number)
        return Value(self, kind, literal if self.width == 1 else f"splat ({kind} {literal})")

    def intrinsic(self, name: str, *arguments: Value) -> Value:
        """A call of a function built into LLVM, one that processors have instructions for."""
        kind = arguments[0].kind
        type_ = self.type(kind)
        lanes = "" if self.width == 1 else f"v{self.width}"
        called = f"@llvm.{name}.{lanes}{SUFFIXES[kind]}"
        self.declarations.add(f"declare {type_} {called}({', '.join([type_] * len(arguments))})")
        operands = ", ".join(f"{type_} {argument.text}" for argument in arguments)
        return self.write(kind, f"call {type_} {called}({operands})")

    # Floating point

    def fma(self, a, b, c) -> Value:
        """a * b + c, rounded once."""
        return self.intrinsic("fma", *(self.value(x, "float") for x in (a, b, c)))

    def magnitude(self, x: Value) -> Value:
        return self.intrinsic("fabs", x)

    def with_sign_of(self, x, sign: Value) -> Value:
        """|x| with the sign of `sign`."""
        return self.intrinsic("copysign", self.value(x, "float"), sign)

    def square_root(self, x: Value) -> Value:
        return self.intrinsic("sqrt", x)

    def truncated(self, x: Value) -> Value:
        """The integer part of x: x rounded towards 0, as a float32."""
        return self.intrinsic("trunc", x)

    def polynomial(self, x: Value, *coefficients: float) -> Value:
        """c0 + c1 x + c2 x^2 + ... by Horner's rule."""
        result = coefficients[-1]
        for coefficient in reversed(coefficients[:-1]):
            result = self.fma(result, x, coefficient)
        return result

    def either_is_nan(self, x: Value, y: Value) -> Value:
        return x._compare("uno", "", y)

    # Choices and conversions

    def select(self, condition: Value, if_true, if_false) -> Value:
        """In each lane, one or the other."""
        kinds = [side.kind for side in (if_true, if_false) if isinstance(side, Value)]
        kind = kinds[0] if kinds else "float"
        operands = [self.value(side, kind) for side in (if_true, if_false)]
        type_ = self.type(kind)
        return self.write(
            kind,
            f"select {self.type('i1')} {condition.text}, "
            f"{type_} {operands[0].text}, {type_} {operands[1].text}",
        )

    def at_most(self, x: Value, limit: float) -> Value:
        """min(x, limit); NaN if x is NaN."""
        return self.select(x > limit, limit, x)

    def at_least(self, x: Value, limit: float) -> Value:
        """max(x, limit); NaN if x is NaN."""
        return self.select(x < limit, limit, x)

    def converted(self, x: Value, conversion: str, kind: str) -> Value:
        """One of LLVM's conversions: sitofp, zext, trunc, ..."""
        return self.write(kind, f"{conversion} {self.type(x.kind)} {x.text} to {self.type(kind)}")

    def bits(self, x: Value) -> Value:
        """The bits of a float32: sign, exponent plus 127 in 8 bits, 23 bits of the mantissa."""
        return self.converted(x, "bitcast", "i32")

    def from_bits(self, x: Value) -> Value:
        return self.converted(x, "bitcast", "float")

    def power_of_2(self, n: Value) -> Value:
        """2^n for an integer n from -126 to 127."""
        return self.from_bits((n + 127) << 23)

    # Branches, the only places where the numbers decide what is computed

    def any_lane(self, condition: Value) -> str:
        """The name of a single truth value: whether the condition holds in some lane."""
        if self.width == 1:
            return condition.text
        mask = f"i{self.width}"
        packed = self.write("mask", f"bitcast {self.type('i1')} {condition.text} to {mask}")
        return self.write("mask", f"icmp ne {mask} {packed.text}, 0").text

    def start_block(self, label: str):
        self.lines.append(f"{label}:")
        self.block = label

    def when_any(
        self, condition: Value, compute: Callable[[], list[Value]], otherwise: list[Value]
    ) -> list[Value]:
        """In lanes where the condition holds `compute()`, in the others `otherwise`.

        `compute` is skipped if the condition holds nowhere.
        """
        number = self.new_name()
        before = self.block
        self.lines.append(
            f"  br i1 {self.any_lane(condition)}, label %some{number}, label %join{number}"
        )
        self.start_block(f"some{number}")
        chosen = [
            self.select(condition, new, old) for new, old in zip(compute(), otherwise, strict=True)
        ]
        after = self.block
        self.lines.append(f"  br label %join{number}")
        self.start_block(f"join{number}")
        return [  # phi: a value that depends on the block that one comes from
            self.write(
                old.kind,
                f"phi {self.type(old.kind)} [ {old.text}, %{before} ], [ {new.text}, %{after} ]",
            )
            for new, old in zip(chosen, otherwise, strict=True)
        ]

    def repeat_while_any(
        self, start: Value, unfinished: Callable[[Value], Value], step: Callable[[Value], Value]
    ) -> Value:
        """`step` again and again until no lane is unfinished; a finished lane remains as it is."""
        number = self.new_name()
        before = self.block
        self.lines.append(f"  br label %test{number}")
        self.start_block(f"test{number}")
        # The phi's second source is known only after the step is written; its line is put in then.
        place = len(self.lines)
        state = Value(self, start.kind, f"%state{number}")
        condition = unfinished(state)
        self.lines.append(
            f"  br i1 {self.any_lane(condition)}, label %step{number}, label %done{number}"
        )
        self.start_block(f"step{number}")
        following = self.select(condition, step(state), state)
        self.lines.append(f"  br label %test{number}")
        self.lines.insert(
            place,
            f"  {state.text} = phi {self.type(start.kind)} "
            f"[ {start.text}, %{before} ], [ {following.text}, %{self.block} ]",
        )
        self.start_block(f"done{number}")
        return state


# --- Definitions ----------------------------------------------------------------------------------

# Tells LLVM that the processor may or may not take subnormal numbers for 0.
SUBNORMALS = '"denormal-fp-math"="dynamic,dynamic"'

BODIES: dict[str, Callable[..., Value]] = {}
FUNCTIONS: dict[str, int] = {}  # name -> number of arguments


def elementary(name: str):
    """Make the decorated function the body of `name`."""

    def register(body: Callable[..., Value]) -> Callable[..., Value]:
        BODIES[name] = body
        FUNCTIONS[name] = len(inspect.signature(body).parameters) - 1
        return body

    return register


def function_name(name: str, width: int) -> str:
    """The name that a definition has in LLVM IR, without the @ in front."""
    return f"ok.{name}.v{width}"


def define(name: str, width: int, inline: bool = False) -> tuple[str, set[str]]:
    """The LLVM IR of a function of FUNCTIONS.

    name: one of FUNCTIONS.
    width: number of lanes. Argument and result are <width x float>, or float if width is 1.
    inline: put a copy of the function wherever it is called. A kernel with many calls is smaller
        and compiles faster without. Its own attributes should have SUBNORMALS in them then.

    Returns the definition and the declarations (lines `declare ...`) that it needs.
    """
    function = Function(width)
    type_ = function.type("float")
    names = ["%x", "%y"][: FUNCTIONS[name]]
    result = BODIES[name](function, *(Value(function, "float", argument) for argument in names))
    return _definition(function, function_name(name, width), names, type_, result.text, inline)


def define_sincos(width: int, inline: bool = False) -> tuple[str, set[str]]:
    """The same for the function that returns both, to the bit what "sin" and "cos" return.

    Its name is function_name("sincos", width), its result a structure {sin x, cos x}.
    """
    function = Function(width)
    type_ = function.type("float")
    sin_x, cos_x = sine_and_cosine(function, Value(function, "float", "%x"))
    pair = f"{{ {type_}, {type_} }}"
    half = function.write("pair", f"insertvalue {pair} poison, {type_} {sin_x.text}, 0")
    both = function.write("pair", f"insertvalue {pair} {half.text}, {type_} {cos_x.text}, 1")
    return _definition(function, function_name("sincos", width), ["%x"], pair, both.text, inline)


def _definition(
    function: Function, name: str, arguments: list[str], result_type: str, result: str, inline: bool
) -> tuple[str, set[str]]:
    type_ = function.type("float")
    parameters = ", ".join(f"{type_} {argument}" for argument in arguments)
    # It touches no memory and comes to an end, so LLVM may share, move and drop calls.
    inlining = "alwaysinline" if inline else "noinline"
    attributes = f"{inlining} nounwind willreturn memory(none) {SUBNORMALS}"
    lines = [
        f"define internal {result_type} @{name}({parameters}) {attributes} {{",
        "entry:",
        *function.lines,
        f"  ret {result_type} {result}",
        "}",
    ]
    return "\n".join(lines) + "\n", function.declarations


# --- Sine, cosine, tangent ------------------------------------------------------------------------

# Up to here x - k pi/2 is accurate in float32 with pi/2 in three parts.
LARGE_ANGLE = 2.0**16


def reduced_angle(f: Function, x: Value) -> tuple[Value, Value, Value]:
    """x = quadrant * pi/2 + r + r_low + a multiple of 2 pi, with |r| <= pi/4 (or slightly more).

    Returns quadrant (an int32 of which the last two bits count), r, and r_low, its rounding error.
    """
    shifted = f.fma(x, 2 / math.pi, ROUNDING)
    k = shifted - ROUNDING
    # Cody and Waite. `rest` is exact: it is a multiple of 2^-24 and smaller than 1.
    rest = f.fma(k, -HALF_PI_HIGH, x)
    r = f.fma(k, -HALF_PI_LOW, f.fma(k, -HALF_PI_MIDDLE, rest))
    # The same once more, with the rounding error of each operation.
    product = k * HALF_PI_MIDDLE
    product_low = f.fma(k, HALF_PI_LOW, f.fma(k, HALF_PI_MIDDLE, -product))
    difference = rest - product
    difference_low = (rest - difference) - product
    r_low = (difference - r) + (difference_low - product_low)
    return f.when_any(
        (f.magnitude(x) > LARGE_ANGLE) & (f.magnitude(x) < INFINITY),
        lambda: reduced_large_angle(f, x),
        otherwise=[f.bits(shifted), r, r_low],
    )


def reduced_large_angle(f: Function, x: Value) -> list[Value]:
    """The same for finite |x| above 2^16.

    |x| is an integer m of 32 bits times 2^(b - 158), b being the bits of its exponent. Of the
    product with 1 / (2 pi), in turns, only the fraction counts. So those bits of 1 / (2 pi) that
    contribute whole turns are left out. 96 bits from there on are enough: they give the fraction to
    64 bits, while no float32 is closer than 2^-32 turns to a multiple of a quarter turn.

    Source: M. Payne and R. Hanek, Radian reduction for trigonometric functions, 1983.
    """
    bits = f.bits(f.magnitude(x))
    mantissa = ((bits & 0x7FFFFF) | 0x800000) << 8

    # The words of 32 bits that are needed. b - 126 is from 17 to 128, hence the word 0 in front.
    words = [0] + [(INVERSE_TWO_PI_BITS >> shift) & 0xFFFFFFFF for shift in range(192, -1, -32)]
    position = bits.shifted_right(23) - 126
    first = position >> 5
    window = []
    for offset in range(4):
        word = f.value(words[offset], "i32")
        for index in range(1, 5):
            word = f.select(first == index, words[index + offset], word)
        window.append(word)
    fraction = [
        f.intrinsic("fshl", high, low, position & 31)  # the upper half of (high, low) << shift
        for high, low in zip(window[:-1], window[1:], strict=True)
    ]

    # Long multiplication, of which only the 64 bits behind the point are kept.
    m = f.converted(mantissa, "zext", "i64")
    high, middle, low = (m * f.converted(word, "zext", "i64") for word in fraction)
    turns = (high << 32) + middle + low.shifted_right(32)  # in units of 2^-64

    quarter = (turns + (1 << 61)).shifted_right(62)
    rest = turns - (quarter << 62)
    angle = f.converted(rest, "sitofp", "double") * (2 * math.pi / 2.0**64)
    r = f.converted(angle, "fptrunc", "float")
    r_low = f.converted(angle - f.converted(r, "fpext", "double"), "fptrunc", "float")
    quadrant = f.converted(quarter, "trunc", "i32")
    negative = x < 0.0
    return [
        f.select(negative, -quadrant, quadrant),
        f.select(negative, -r, r),
        f.select(negative, -r_low, r_low),
    ]


def sine_and_cosine(f: Function, x: Value) -> tuple[Value, Value]:
    quadrant, r, r_low = reduced_angle(f, x)
    z = r * r
    tail = f.polynomial(z, -1.6666654e-01, 8.332106e-03, -1.9507883e-04)
    sin_r = f.with_sign_of(f.fma(r * z, tail, r), r)  # a sine of -0 would be +0
    tail = f.polynomial(z, -0.5, 4.1666646e-02, -1.3887298e-03, 2.4430085e-05)
    cos_r = f.fma(z, tail, 1.0)

    # A quarter turn exchanges them, half a turn changes both signs.
    odd = (quadrant & 1) != 0
    sin_sign = (quadrant & 2) << 30
    cos_sign = ((quadrant + 1) & 2) << 30
    sin_x = f.from_bits(f.bits(f.select(odd, cos_r, sin_r)) ^ sin_sign)
    cos_x = f.from_bits(f.bits(f.select(odd, sin_r, cos_r)) ^ cos_sign)
    return sin_x, cos_x


@elementary("sin")
def sine(f: Function, x: Value) -> Value:
    return sine_and_cosine(f, x)[0]


@elementary("cos")
def cosine(f: Function, x: Value) -> Value:
    return sine_and_cosine(f, x)[1]


@elementary("tan")
def tangent(f: Function, x: Value) -> Value:
    quadrant, r, r_low = reduced_angle(f, x)
    z = r * r
    tail = f.polynomial(
        z,
        3.3333352e-01,
        1.3332573e-01,
        5.407073e-02,
        2.1224137e-02,
        1.0991174e-02,
        -1.12851914e-04,
        4.478506e-03,
    )
    t = f.with_sign_of(r + f.fma(r * z, tail, f.fma(r_low, z, r_low)), r)
    return f.select((quadrant & 1) != 0, -1.0 / t, t)


# --- Exponentials ---------------------------------------------------------------------------------


def nearest_integer(f: Function, x: Value, scale: float) -> tuple[Value, Value]:
    """The integer nearest to x * scale as float32 and as int32; |x * scale| must be below 2^22."""
    shifted = f.fma(x, scale, ROUNDING)
    return shifted - ROUNDING, f.bits(shifted) - ROUNDING_BITS


def reduced_exponential(f: Function, x: Value) -> tuple[Value, Value]:
    """exp(x) = 2^n (1 + p), n an integer, p from -0.3 to 0.42. Returns n and p."""
    n_float, n = nearest_integer(f, x, float(1 / LN2))
    r = f.fma(n_float, -LN2_LOW, f.fma(n_float, -LN2_HIGH, x))
    tail = f.polynomial(r, 4.9999997e-01, 1.6666546e-01, 4.166744e-02, 8.366289e-03, 1.387044e-03)
    return n, f.fma(r * r, tail, r)


def times_power_of_2(f: Function, x: Value, n: Value) -> Value:
    """x * 2^n for |n| <= 252, in two steps: 2^n alone may be out of range where x * 2^n is not."""
    half = n >> 1
    return x * f.power_of_2(half) * f.power_of_2(n - half)


@elementary("exp")
def exponential(f: Function, x: Value) -> Value:
    n, p = reduced_exponential(f, f.at_least(f.at_most(x, 89.0), -104.0))  # inf and 0 there
    return times_power_of_2(f, 1.0 + p, n)


def fractional_power_of_2(f: Function, x: Value) -> Value:
    """2^x for |x| <= 1/2."""
    tail = f.polynomial(
        x, 6.931472e-01, 2.4022648e-01, 5.55036e-02, 9.618506e-03, 1.3390812e-03, 1.5326496e-04
    )
    return f.fma(x, tail, 1.0)


@elementary("exp2")
def exponential_base_2(f: Function, x: Value) -> Value:
    x = f.at_least(f.at_most(x, 129.0), -151.0)  # inf and 0 there
    n_float, n = nearest_integer(f, x, 1.0)
    return times_power_of_2(f, fractional_power_of_2(f, x - n_float), n)


@elementary("expm1")
def exponential_minus_1(f: Function, x: Value) -> Value:
    n, p = reduced_exponential(f, f.at_least(f.at_most(x, 89.0), -25.0))  # inf and -1 there
    # 2^n (1 + p) - 1 = 2^n p + (2^n - 1), all of it halved, because 2^128 would be too large.
    half_scale = f.power_of_2(n - 1)
    result = 2.0 * f.fma(p, half_scale, half_scale - 0.5)
    return f.select(f.magnitude(x) < 2.0**-25, x, result)  # x itself, so that -0 remains -0


def half_exponential(f: Function, x: Value) -> Value:
    """exp(x) / 2 for x >= 0."""
    n, p = reduced_exponential(f, f.at_most(x, 90.0))
    return times_power_of_2(f, 1.0 + p, n - 1)


@elementary("sinh")
def hyperbolic_sine(f: Function, x: Value) -> Value:
    a = f.magnitude(x)
    z = a * a
    tail = f.polynomial(z, 1.6666667e-01, 8.333311e-03, 1.9842635e-04, 2.7839255e-06)
    near = f.fma(a * z, tail, a)
    half = half_exponential(f, a)
    far = half - 0.25 / half
    return f.with_sign_of(f.select(a < 1.0, near, far), x)


@elementary("cosh")
def hyperbolic_cosine(f: Function, x: Value) -> Value:
    half = half_exponential(f, f.magnitude(x))
    return half + 0.25 / half


@elementary("tanh")
def hyperbolic_tangent(f: Function, x: Value) -> Value:
    a = f.magnitude(x)
    z = a * a
    tail = f.polynomial(
        z, -3.333327e-01, 1.3331072e-01, -5.3708017e-02, 2.053366e-02, -5.585491e-03
    )
    near = f.fma(a * z, tail, a)
    half = half_exponential(f, f.at_most(a + a, 60.0))  # exp(2 a) / 2
    far = 1.0 - 1.0 / (half + 0.5)
    return f.with_sign_of(f.select(a < 0.625, near, far), x)


@elementary("logistic")
def logistic(f: Function, x: Value) -> Value:
    """1 / (1 + exp(-x))."""
    n, p = reduced_exponential(f, f.at_least(f.at_most(-x, 88.0), -88.0))
    scale = f.power_of_2(n)
    # 1 + 2^n (1 + p). If 2^n is so large that the 1 is lost from 1 + 2^n, it comes back in `lost`.
    total = 1.0 + scale
    lost = 1.0 - (total - scale)
    result = 1.0 / (total + f.fma(scale, p, f.select(n > 0, lost, 0.0)))
    return f.select(x < -88.0, 0.0, result)


# --- Logarithms -----------------------------------------------------------------------------------


def exponent_near(f: Function, x: Value) -> Value:
    """The integer n for which x / 2^n is from sqrt(1/2) to sqrt(2); x normal."""
    return (f.bits(x) - 0x3F3504F3) >> 23  # the bits of sqrt(1/2)


def normalised(f: Function, x: Value) -> tuple[Value, Value]:
    """x = 2^n m, m from sqrt(1/2) to sqrt(2); x > 0. Returns n (a float32) and m."""
    subnormal = x < SMALLEST_NORMAL
    x = f.select(subnormal, x * 2.0**25, x)
    n = exponent_near(f, x)
    m = f.from_bits(f.bits(x) - (n << 23))
    n = f.select(subnormal, n - 25, n)
    return f.converted(n, "sitofp", "float"), m


def logarithm_of_parts(f: Function, n: Value, fraction: Value, fraction_low=0.0) -> Value:
    """log(2^n (1 + fraction + fraction_low)), fraction from sqrt(1/2) - 1 to sqrt(2) - 1.

    fraction_low is at most a rounding error of fraction.
    """
    z = fraction * fraction
    tail = f.polynomial(
        fraction,
        3.333333e-01,
        -2.500082e-01,
        2.000124e-01,
        -1.6623402e-01,
        1.420161e-01,
        -1.3159753e-01,
        1.2762114e-01,
        -7.6358944e-02,
    )
    correction = f.fma(z, -0.5, f.fma(fraction * z, tail, fraction_low))
    return f.fma(n, LN2_HIGH, fraction + f.fma(n, LN2_LOW, correction))


def with_logarithms_limits(f: Function, argument: Value, result: Value) -> Value:
    """`result` where the argument is positive and finite; -inf at 0, NaN below; inf of inf."""
    special = f.select(argument == 0.0, -INFINITY, f.select(argument < 0.0, NAN, argument))
    return f.select((argument > 0.0) & (argument < INFINITY), result, special)


@elementary("log")
def logarithm(f: Function, x: Value) -> Value:
    n, m = normalised(f, x)
    return with_logarithms_limits(f, x, logarithm_of_parts(f, n, m - 1.0))


def logarithm_of_1_plus(
    f: Function, x: Value, x_low: Value | None = None, doublings: Value | float = 0.0
) -> Value:
    """log((1 + x + x_low) 2^doublings), x_low being at most a rounding error of x."""
    argument = 1.0 + x
    n = exponent_near(f, argument)
    # (1 + x) / 2^n - 1, rounded once. Above 2^64 the 1 does not count, and 2^-n might be subnormal.
    scale = f.power_of_2(-f.at_most(n, 100))
    fraction = f.fma(x, scale, scale - 1.0)
    m = f.from_bits(f.bits(argument) - (n << 23))
    fraction = f.select(argument > 2.0**64, m - 1.0, fraction)
    n_float = f.converted(n, "sitofp", "float") + doublings
    fraction_low = 0.0 if x_low is None else x_low * scale
    result = logarithm_of_parts(f, n_float, fraction, fraction_low)
    return with_logarithms_limits(f, argument, result)


@elementary("log1p")
def log1p(f: Function, x: Value) -> Value:
    return f.with_sign_of(logarithm_of_1_plus(f, x), x)


@elementary("asinh")
def area_hyperbolic_sine(f: Function, x: Value) -> Value:
    a = f.magnitude(x)
    huge = a > 2.0**30  # asinh(a) = log(2 a) there, and a * a might be infinite
    root = f.square_root(f.fma(a, a, 1.0))
    excess = f.select(huge, a, a + a * a / (1.0 + root))  # a + root - 1
    result = logarithm_of_1_plus(f, excess, doublings=f.select(huge, 1.0, 0.0))
    return f.with_sign_of(result, x)


@elementary("acosh")
def area_hyperbolic_cosine(f: Function, x: Value) -> Value:
    excess = x - 1.0
    huge = x > 2.0**30  # acosh(x) = log(2 x) there
    root = f.square_root(f.fma(excess, excess, excess + excess))  # sqrt(x^2 - 1)
    total = excess + root
    total_low = (root - total) + excess
    result = logarithm_of_1_plus(
        f,
        f.select(huge, x, total),
        x_low=f.select(huge, 0.0, total_low),
        doublings=f.select(huge, 1.0, 0.0),
    )
    return f.select(x < 1.0, NAN, result)


@elementary("atanh")
def area_hyperbolic_tangent(f: Function, x: Value) -> Value:
    a = f.magnitude(x)
    z = a * a
    tail = f.polynomial(
        z, 3.33333e-01, 2.0002615e-01, 1.422076e-01, 1.1841527e-01, 5.064747e-02, 1.7773864e-01
    )
    near = f.fma(a * z, tail, a)
    far = 0.5 * logarithm_of_1_plus(f, (a + a) / (1.0 - a))
    return f.with_sign_of(f.select(a < 0.5, near, far), x)


# --- Inverse trigonometric functions --------------------------------------------------------------


def arc_tangent_up_to_1(f: Function, x: Value) -> Value:
    """atan(x) for x from 0 to 1."""
    z = x * x
    tail = f.polynomial(
        z,
        -3.33333e-01,
        1.999853e-01,
        -1.4264016e-01,
        1.09508805e-01,
        -8.399306e-02,
        5.7881378e-02,
        -3.1096939e-02,
        1.0868624e-02,
        -1.7827946e-03,
    )
    return f.fma(x * z, tail, x)


@elementary("atan")
def arc_tangent(f: Function, x: Value) -> Value:
    a = f.magnitude(x)
    steep = a > 1.0
    angle = arc_tangent_up_to_1(f, f.select(steep, 1.0 / a, a))
    angle = f.select(steep, HALF_PI_HIGH - (angle - HALF_PI_MIDDLE), angle)
    return f.with_sign_of(angle, x)


@elementary("atan2")
def arc_tangent_of_ratio(f: Function, y: Value, x: Value) -> Value:
    """The angle of the point (x, y), from -pi to pi."""
    width = f.magnitude(x)
    height = f.magnitude(y)
    steep = height > width
    small = f.select(steep, width, height)
    large = f.select(steep, height, width)
    ratio = f.select(small == INFINITY, 1.0, small / large)
    ratio = f.select(small == 0.0, 0.0, ratio)
    angle = arc_tangent_up_to_1(f, ratio)
    angle = f.select(steep, HALF_PI_HIGH - (angle - HALF_PI_MIDDLE), angle)
    points_left = f.bits(x) < 0  # also if x is -0
    angle = f.select(points_left, PI_HIGH - (angle - PI_LOW), angle)
    return f.select(f.either_is_nan(x, y), NAN, f.with_sign_of(angle, y))


def arc_sine_or_complement(f: Function, a: Value) -> tuple[Value, Value, Value]:
    """asin(a) = s + tail where a < 1/2, acos(a) / 2 = asin(sqrt((1 - a) / 2)) = s + tail elsewhere.

    Returns s, tail, and whether it is the latter.
    """
    complement = a >= 0.5
    z = f.select(complement, f.fma(a, -0.5, 0.5), a * a)
    s = f.select(complement, f.square_root(z), a)
    tail = f.polynomial(
        z, 1.6666752e-01, 7.4953064e-02, 4.5469772e-02, 2.4180776e-02, 4.2166404e-02
    )
    return s, s * z * tail, complement


@elementary("asin")
def arc_sine(f: Function, x: Value) -> Value:
    s, tail, complement = arc_sine_or_complement(f, f.magnitude(x))
    far = HALF_PI_HIGH - 2.0 * s
    far_low = (HALF_PI_HIGH - far) - 2.0 * s
    far = far - (2.0 * tail - HALF_PI_MIDDLE - far_low)
    return f.with_sign_of(f.select(complement, far, s + tail), x)


@elementary("acos")
def arc_cosine(f: Function, x: Value) -> Value:
    s, tail, complement = arc_sine_or_complement(f, f.magnitude(x))
    angle = s + tail
    near_0 = HALF_PI_HIGH - (f.with_sign_of(angle, x) - HALF_PI_MIDDLE)
    twice = 2.0 * angle
    far = f.select(x < 0.0, PI_HIGH - (twice - PI_LOW), twice)
    return f.select(complement, far, near_0)


# --- Powers and roots -----------------------------------------------------------------------------


def logarithm_base_2_in_parts(f: Function, n: Value, m: Value) -> tuple[Value, Value]:
    """log2(2^n m) in two parts, with a relative error of about 2^-36; n and m as from `normalised`.

    log2(m) = 2 / ln 2 * (s + s^3 / 3 + s^5 / 5 + ...) with s = (m - 1) / (m + 1). What counts is
    carried along in two parts: a product is p = a * b plus fma(a, b, -p), exactly; a sum of a large
    and a small number is t = a + b plus (a - t) + b.
    """
    numerator = m - 1.0  # exact
    denominator = m + 1.0
    denominator_low = m - (denominator - 1.0)
    s = numerator / denominator
    remainder = f.fma(-s, denominator, numerator)
    s_low = f.fma(-s, denominator_low, remainder) / denominator

    z = s * s
    z_low = f.fma(s + s, s_low, f.fma(s, s, -z))

    rest = z * f.polynomial(z, 2.0000076e-01, 1.4273547e-01, 1.1709758e-01)
    tail = THIRD_HIGH + rest  # 1/3 + z / 5 + z^2 / 7 + ...
    tail_low = (THIRD_HIGH - tail) + rest + THIRD_LOW

    p = z * tail
    p_low = f.fma(z, tail_low, f.fma(z_low, tail, f.fma(z, tail, -p)))

    cubic = s * p
    cubic_low = f.fma(s, p_low, f.fma(s_low, p, f.fma(s, p, -cubic)))
    total = s + cubic
    total_low = (s - total) + cubic + (s_low + cubic_low)

    log_m = total * TWO_LOG2_E_HIGH
    log_m_low = f.fma(
        total,
        TWO_LOG2_E_LOW,
        f.fma(total_low, TWO_LOG2_E_HIGH, f.fma(total, TWO_LOG2_E_HIGH, -log_m)),
    )
    high = n + log_m
    return high, log_m - (high - n) + log_m_low


@elementary("pow")
def power(f: Function, x: Value, y: Value) -> Value:
    """2^(y log2 |x|) and a sign. The exponent, up to 128, needs 7 bits more than float32 has."""
    a = f.magnitude(x)
    log_high, log_low = logarithm_base_2_in_parts(f, *normalised(f, a))
    log_high = f.select(a == 0.0, -INFINITY, f.select(a == INFINITY, INFINITY, log_high))
    exponent = y * log_high
    exponent_low = f.fma(y, log_low, f.fma(y, log_high, -exponent))
    n_float, n = nearest_integer(f, exponent, 1.0)
    result = fractional_power_of_2(f, (exponent - n_float) + exponent_low)
    result = times_power_of_2(f, result, n)
    result = f.select(exponent > 129.0, INFINITY, f.select(exponent < -151.0, 0.0, result))

    is_integer = f.truncated(y) == y  # infinities, too: they count as even
    half = 0.5 * y
    is_odd = is_integer & (f.truncated(half) != half)
    result = f.select(is_odd, f.with_sign_of(result, x), result)
    undefined = (x < 0.0) & (x > -INFINITY) & ~is_integer
    result = f.select(undefined | f.either_is_nan(x, y), NAN, result)
    is_one = (x == 1.0) | (y == 0.0) | ((x == -1.0) & (f.magnitude(y) == INFINITY))
    return f.select(is_one, 1.0, result)


@elementary("cbrt")
def cube_root(f: Function, x: Value) -> Value:
    # Scaled by 2^24, so that neither a nor a cube of its root is subnormal or infinite.
    large = f.magnitude(x) >= 1.0
    a = f.magnitude(x) * f.select(large, 2.0**-24, 2.0**24)

    # The bits, read as an integer, are roughly a logarithm (plus 127); a third of it is the root's.
    third = f.write("i32", f"udiv {f.type('i32')} {f.bits(a).text}, {f.value(3, 'i32').text}")
    root = f.from_bits(third + 0x2A51067F)

    # Halley's method: each step triples the number of correct digits, from about 1.5.
    for _ in range(2):
        square = root * root
        cube = square * root
        shortfall = f.fma(-square, root, a)
        root = f.fma(root, shortfall / (cube + cube + a), root)

    root = root * f.select(large, 2.0**8, 2.0**-8)
    root = f.select((a > 0.0) & (a < INFINITY), root, a)  # 0, infinity and NaN are their own roots
    return f.with_sign_of(root, x)


@elementary("fmod")
def remainder(f: Function, x: Value, y: Value) -> Value:
    """What is left of x after division by y, with the sign of x (C's fmod, XLA's rem). Exact.

    This is long division: y is scaled by a power of 2 to bring the quotient below 2^23, a multiple
    of that is taken from x, and so on until x is smaller than y. The differences are exact, but for
    one case: where subnormal numbers count as 0, an x closer than 2^-126 to a multiple of y counts
    as that multiple.
    """
    dividend = f.magnitude(x)
    divisor = f.magnitude(y)
    valid = (dividend < INFINITY) & (divisor >= SMALLEST_NORMAL)
    dividend = f.select(valid, dividend, 0.0)
    divisor = f.select(valid, divisor, 1.0)
    divisor_bits = f.bits(divisor)

    def subtract_multiple(rest: Value) -> Value:
        exponents_apart = f.bits(rest).shifted_right(23) - divisor_bits.shifted_right(23)
        k = f.at_least(exponents_apart - 22, 0)
        multiple = f.from_bits(divisor_bits + (k << 23))  # 2^k * divisor
        quotient = f.truncated(rest / multiple)
        new_rest = f.fma(-quotient, multiple, rest)
        # The division may have been rounded up to the next integer.
        return f.select(new_rest < 0.0, new_rest + multiple, new_rest)

    rest = f.repeat_while_any(dividend, lambda rest: rest >= divisor, subtract_multiple)
    return f.select(valid, f.with_sign_of(rest, x), NAN)


# --- Error function -------------------------------------------------------------------------------


@elementary("erf")
def error_function(f: Function, x: Value) -> Value:
    a = f.magnitude(x)
    z = a * a
    tail = f.polynomial(
        z,
        1.2837917e-01,
        -3.7612626e-01,
        1.1283579e-01,
        -2.6853347e-02,
        5.187162e-03,
        -7.997853e-04,
        7.806903e-05,
    )
    near = f.fma(a, tail, a)
    # Further out, the logarithm of 1 - erf is close to a polynomial. From 4 on erf is 1.
    log_complement = f.polynomial(
        f.at_most(a, 4.0),
        -3.205745e-04,
        -1.1271716e00,
        -6.380123e-01,
        -1.0321806e-01,
        2.188952e-02,
        -2.9600644e-03,
        1.8759712e-04,
    )
    n, p = reduced_exponential(f, log_complement)
    scale = f.power_of_2(n)
    far = 1.0 - f.fma(p, scale, scale)
    return f.with_sign_of(f.select(a < 1.0, near, far), x)


@elementary("erf_inv")
def inverse_error_function(f: Function, x: Value) -> Value:
    """x times a polynomial in w = -log(1 - x^2).

    Source: M. Giles, Approximating the erfinv function, 2012: his coefficients, XLA's steps.
    """
    w = -logarithm_of_1_plus(f, -(x * x))
    central = w < 5.0
    w = f.select(central, w - 2.5, f.square_root(w) - 3.0)
    coefficients = [  # |x| < 0.9966, beyond
        (1.50140941, 2.83297682),
        (0.246640727, 1.00167406),
        (-0.00417768164, 0.00943887047),
        (-0.00125372503, -0.0076224613),
        (0.00021858087, 0.00573950773),
        (-4.39150654e-06, -0.00367342844),
        (-3.5233877e-06, 0.00134934322),
        (3.43273939e-07, 0.000100950558),
        (2.81022636e-08, -0.000200214257),
    ]
    ratio = f.polynomial(w, *(f.select(central, *pair) for pair in coefficients))
    return x * f.select(f.magnitude(x) == 1.0, INFINITY, ratio)
