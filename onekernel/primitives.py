"""What each of JAX's primitives does to scalars, constants and arrays in memory.

A rule takes the builder, the equation and its operands' values and returns its results' values. See
trace.py for how they are called and arrays.py for the forms that a value can have.
"""

import functools
import itertools
import math

import jax
import numpy as np
from jax.lax import GatherScatterMode

from onekernel import arrays
from onekernel.arrays import Keys, Memory, Scalars, kind_of
from onekernel.graph import DTYPES, KINDS, Graph
from onekernel.trace import SELECTED, Builder, Turn, Unsupported, map_keys, rule, stretched


def out_kind(equation) -> str:
    return KINDS[equation.outvars[0].aval.dtype]


def known(values) -> bool:
    return all(isinstance(value, np.ndarray) for value in values)


# Elementwise --------------------------------------------------------------------------------------

# How NumPy computes a primitive of constants, where it gives the same as JAX.
NUMPY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "abs": np.abs,
    "max": np.maximum,
    "min": np.minimum,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "sqrt": np.sqrt,
    "square": np.square,
    "floor": np.floor,
    "ceil": np.ceil,
    "is_finite": np.isfinite,
}


def elementwise(*names: str):
    """A rule for primitives whose result at an index depends on the operands at that index. The
    function that it decorates takes (graph, kind of the first operand, kind of the result,
    params, *nodes) and returns a node."""

    def register(function):
        @rule(*names)
        def apply(builder: Builder, equation, *values):
            name = equation.primitive.name
            kind = out_kind(equation)
            if known(values) and name in NUMPY:
                with np.errstate(all="ignore"):
                    result = NUMPY[name](*values)
                return [np.asarray(result, DTYPES[kind])]
            bound = functools.partial(
                function, builder.graph, kind_of(values[0]), kind, equation.params | {"name": name}
            )
            return [builder.elementwise(bound, kind, values, equation.outvars[0].aval.shape)]

        return function

    return register


# Primitives that are one method of the graph's, called with the kind and the operands.
METHODS = {
    "add": Graph.add,
    "add_any": Graph.add,
    "sub": Graph.sub,
    "mul": Graph.mul,
    "div": Graph.div,
    "rem": Graph.rem,
    "neg": Graph.neg,
    "max": Graph.max,
    "min": Graph.min,
    "and": Graph.logic_and,
    "or": Graph.logic_or,
    "xor": Graph.logic_xor,
    "not": Graph.logic_not,
}


@elementwise(*METHODS)
def method(graph, _, kind, params, *nodes):
    return METHODS[params["name"]](graph, kind, *nodes)


@elementwise("sign")
def sign(graph, _, kind, params, a):
    zero = graph.const(kind, 0.0 if kind == "f" else 0)
    one = graph.const(kind, 1.0 if kind == "f" else 1)
    positive = graph.select(
        kind, graph.compare("lt", kind, zero, a), one, a if kind == "f" else zero
    )
    if kind == "u":
        return positive
    return graph.select(kind, graph.compare("lt", kind, a, zero), graph.neg(kind, one), positive)


@elementwise("abs")
def abs_(graph, _, kind, params, a):
    if kind == "f":
        return graph.unary("abs", a)
    if kind == "u":
        return a
    negative = graph.compare("lt", kind, a, graph.const(kind, 0))
    return graph.select(kind, negative, graph.neg(kind, a), a)


@elementwise(
    *("sqrt", "floor", "ceil", "sin", "cos", "tan", "exp", "exp2", "log", "log1p", "expm1", "tanh"),
    *("asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "cbrt", "logistic"),
    *("rsqrt", "erf", "erf_inv"),
)
def function_of_one(graph, _, kind, params, a):
    return graph.unary(params["name"], a)


@elementwise("round")
def round_(graph, _, kind, params, a):
    if int(params["rounding_method"]) == 1:  # to even
        return graph.unary("rint", a)
    # Away from zero: from the floor of |x| on by one, where at least a half is left.
    size = graph.unary("abs", a)
    below = graph.unary("floor", size)
    half = graph.compare("le", "f", graph.const("f", 0.5), graph.sub("f", size, below))
    nearest = graph.add(
        "f", below, graph.select("f", half, graph.const("f", 1.0), graph.const("f", 0.0))
    )
    sign_bit = graph.logic_and("i", graph.bitcast(a, "i"), graph.const("i", -(1 << 31)))
    return graph.bitcast(graph.logic_or("i", graph.bitcast(nearest, "i"), sign_bit), "f")


@elementwise("is_finite")
def is_finite(graph, kind, _, params, a):
    if kind != "f":
        return graph.const("b", True)
    return graph.compare("lt", "f", graph.unary("abs", a), graph.const("f", math.inf))


@elementwise("square")
def square(graph, _, kind, params, a):
    return graph.mul(kind, a, a)


@elementwise("integer_pow")
def integer_pow(graph, _, kind, params, a):
    exponent = params["y"]
    power = None
    base = a
    rest = abs(exponent)
    while rest:
        if rest & 1:
            power = base if power is None else graph.mul(kind, power, base)
        rest >>= 1
        if rest:
            base = graph.mul(kind, base, base)
    if power is None:
        return graph.const(kind, 1.0 if kind == "f" else 1)
    return power if exponent > 0 else graph.div(kind, graph.const(kind, 1.0), power)


@elementwise("pow")
def pow_(graph, kind, _, params, a, b):
    if graph.kind[b] != "f":
        b = graph.convert(b, "f")
    exponent = graph.value[b]
    if exponent == 1:
        return a
    if exponent == 2:
        return graph.mul("f", a, a)
    return graph.emit("pow", "f", a, b)


@elementwise("atan2")
def atan2(graph, _, kind, params, a, b):
    return graph.emit("atan2", "f", a, b)


@elementwise("lt", "le", "gt", "ge", "eq", "ne")
def compare(graph, kind, _, params, a, b):
    name = params["name"]
    if name in ("gt", "ge"):
        return graph.compare("lt" if name == "gt" else "le", kind, b, a)
    return graph.compare(name, kind, a, b)


@elementwise("lt_to", "le_to", "eq_to")
def compare_totally(graph, kind, _, params, a, b):
    """In IEEE's total order: -NaN, -inf, ..., -0, 0, ..., inf, NaN."""
    name = params["name"].removesuffix("_to")
    if kind == "f":
        a, b = (
            total_order_key(graph, graph.bitcast(a, "i")),
            total_order_key(graph, graph.bitcast(b, "i")),
        )
        kind = "i"
    return graph.compare(name, kind, a, b)


def total_order_key(graph, bits: int) -> int:
    """An int32 that grows with the float of these bits; of negative floats, as integers, the
    larger is the smaller."""
    flipped = graph.logic_xor("i", bits, graph.const("i", 0x7FFFFFFF))
    return graph.select("i", graph.compare("lt", "i", bits, graph.const("i", 0)), flipped, bits)


@elementwise("shift_left", "shift_right_logical", "shift_right_arithmetic")
def shift(graph, _, kind, params, a, b):
    op = {"shift_left": "shl", "shift_right_logical": "lshr", "shift_right_arithmetic": "ashr"}
    return graph.shift(op[params["name"]], kind, a, b)


@elementwise("population_count", "clz")
def count_bits(graph, _, kind, params, a):
    return graph.emit(params["name"], kind, a)


@elementwise("convert_element_type")
def convert_element_type(graph, _, kind, params, a):
    return graph.convert(a, kind)


@elementwise("bitcast_convert_type")
def bitcast_convert_type(graph, _, kind, params, a):
    return graph.bitcast(a, kind)


@elementwise("clamp")
def clamp(graph, _, kind, params, low, x, high):
    return graph.min(kind, graph.max(kind, x, low), high)


@rule("reduce_precision")
def reduce_precision(builder, equation, value):
    if (equation.params["exponent_bits"], equation.params["mantissa_bits"]) != (8, 23):
        raise Unsupported("reduce_precision to less than float32")
    return [value]


@rule("select_n")
def select_n(builder, equation, which, *cases):
    if isinstance(cases[0], Keys):
        words = zip(*(case.words for case in cases), strict=True)
        chosen = [select_n(builder, equation, which, *word)[0] for word in words]
        return [Keys(chosen, cases[0].impl)]
    graph = builder.graph
    kind = kind_of(cases[0])

    def choose(index, *nodes):
        if graph.kind[index] == "b":
            return graph.select(kind, index, nodes[1], nodes[0])
        chosen = nodes[-1]
        for number in reversed(range(len(nodes) - 1)):
            here = graph.compare(
                "eq", graph.kind[index], index, graph.const(graph.kind[index], number)
            )
            chosen = graph.select(kind, here, nodes[number], chosen)
        return chosen

    if known((which, *cases)):
        return [np.choose(which.astype(np.int32), cases).astype(DTYPES[kind])]
    return [builder.elementwise(choose, kind, [which, *cases], equation.outvars[0].aval.shape)]


# Moving elements ----------------------------------------------------------------------------------


def movement(*names: str):
    """A rule for primitives that move the elements of one array; of a key array, those of each word."""

    def register(function):
        @rule(*names)
        def apply(builder, equation, value, *rest):
            return [map_keys(lambda word: function(builder, equation, word, *rest), value)]

        return function

    return register


@movement("reshape", "squeeze", "expand_dims")
def reshape(builder, equation, value):
    return builder.reshape(value, equation.outvars[0].aval.shape)


@movement("transpose")
def transpose(builder, equation, value):
    return arrays.transpose(value, equation.params["permutation"])


@movement("broadcast_in_dim")
def broadcast_in_dim(builder, equation, value):
    params = equation.params
    return arrays.broadcast_in_dim(value, params["shape"], params["broadcast_dimensions"])


@movement("slice")
def slice_(builder, equation, value):
    params = equation.params
    steps = params["strides"] or [1] * len(value.shape)
    return arrays.slice_(value, params["start_indices"], params["limit_indices"], steps)


@movement("rev")
def rev(builder, equation, value):
    return arrays.reverse(value, equation.params["dimensions"])


@movement("copy", "copy_p", "pvary", "reshard", "sharding_constraint", "stop_gradient")
def copy(builder, equation, value):
    return value


@rule("device_put", "optimization_barrier")  # the kernel runs where its worlds are
def hand_on(builder, equation, *values):
    return list(values)


def join(builder, values, axis: int):
    """Arrays, or key arrays, one after the other along an axis."""
    if isinstance(values[0], Keys):
        words = zip(*(value.words for value in values), strict=True)
        return Keys([builder.join(list(word), axis) for word in words], values[0].impl)
    return builder.join(list(values), axis)


def cut(value, axis: int, sizes) -> list:
    """Pieces of an array, or of a key array, along an axis."""
    pieces = []
    start = 0
    for size in sizes:
        starts = [0] * len(value.shape)
        limits = list(value.shape)
        starts[axis] = start
        limits[axis] = start = start + size
        steps = [1] * len(value.shape)
        piece = map_keys(
            lambda word, s=starts, e=limits, d=steps: arrays.slice_(word, s, e, d), value
        )
        pieces.append(piece)
    return pieces


@rule("concatenate")
def concatenate(builder, equation, *values):
    return [join(builder, values, equation.params["dimension"])]


@rule("split")
def split(builder, equation, value):
    return cut(value, equation.params["axis"], equation.params["sizes"])


@rule("stack")  # of JAX 0.10; before, jnp.stack is a concatenation
def stack(builder, equation, *values):
    axis = equation.params["axis"]

    def expand(word):
        return builder.reshape(word, (*word.shape[:axis], 1, *word.shape[axis:]))

    return [join(builder, [map_keys(expand, value) for value in values], axis)]


@rule("unstack")
def unstack(builder, equation, value):
    axis = equation.params["axis"]

    def squeeze(word):
        return builder.reshape(word, (*word.shape[:axis], *word.shape[axis + 1 :]))

    return [map_keys(squeeze, piece) for piece in cut(value, axis, [1] * value.shape[axis])]


@rule("tile")
def tile(builder, equation, value):
    for axis, count in enumerate(equation.params["reps"]):
        if count != 1:
            value = builder.join([value] * count, axis)
    return [value]


@rule("pad")
def pad(builder, equation, value, filler):
    shape = equation.outvars[0].aval.shape
    config = equation.params["padding_config"]
    # Where each of the result's elements comes from along each axis; -1: from nowhere.
    sources = []
    for (low, _, interior), size, out_size in zip(config, value.shape, shape, strict=True):
        places = np.arange(out_size) - low
        inside = (places >= 0) & (places % (interior + 1) == 0) & (places // (interior + 1) < size)
        sources.append(np.where(inside, places // (interior + 1), -1))
    if isinstance(value, Memory):
        if any(low < 0 or high < 0 or interior for low, high, interior in config):
            value = builder.scalars(value)
        else:
            target = builder.new_memory(shape, value.kind)
            filled = arrays.broadcast_in_dim(filler, shape, ())
            builder.copy_into(target, filled)
            builder.last_loop = None
            starts = [low for low, _, _ in config]
            limits = [low + size for low, size in zip(starts, value.shape, strict=True)]
            builder.copy_into(arrays.slice_(target, starts, limits, [1] * len(shape)), value)
            builder.last_loop = None
            builder.values_in_memory_forget([target])
            return [target]
    grid = np.meshgrid(*sources, indexing="ij") if sources else []
    inside = np.all([axis >= 0 for axis in grid], axis=0) if grid else np.True_
    places = tuple(np.maximum(axis, 0) for axis in grid)
    if known((value, filler)):
        picked = value[places] if value.size else np.zeros(shape, value.dtype)
        return [np.where(inside, picked, filler).astype(value.dtype)]
    value = builder.scalars(value)
    filler = builder.scalars(filler)
    picked = value.ids[places] if value.ids.size else np.zeros(shape, np.int64)
    return [Scalars(np.where(inside, picked, filler.ids), value.kind)]


@rule("iota")
def iota(builder, equation):
    params = equation.params
    shape = params["shape"]
    along = [1] * len(shape)
    along[params["dimension"]] = shape[params["dimension"]]
    numbers = np.arange(shape[params["dimension"]]).astype(params["dtype"]).reshape(along)
    return [np.broadcast_to(numbers, shape)]


@rule("platform_index")
def platform_index(builder, equation):
    for number, names in enumerate(equation.params["platforms"]):
        if names is None or builder.platform in names:
            return [np.int32(number) * np.ones((), np.int32)]
    raise Unsupported(f"code without a branch for {builder.platform}")


# Reductions ---------------------------------------------------------------------------------------


def reduce(builder: Builder, value, axes, combine, kind):
    """combine(node, node) over the elements along axes, from the first to the last."""
    kept = [axis for axis in range(len(value.shape)) if axis not in axes]
    rows = arrays.transpose(value, [*kept, *axes])
    out_shape = tuple(value.shape[axis] for axis in kept)
    reduced_shape = tuple(value.shape[axis] for axis in axes)
    if math.prod(value.shape) <= builder.scalar_limit:
        ids = builder.scalars(rows).ids.reshape(math.prod(out_shape), math.prod(reduced_shape))
        results = [functools.reduce(combine, row) for row in ids.tolist()]
        return Scalars(np.array(results, np.int64).reshape(out_shape), kind)

    def term(operands, outer, inner):
        return builder.read(operands[0], (*outer, *inner))

    return contract(builder, out_shape, reduced_shape, [rows], term, combine, kind)


def contract(builder: Builder, out_shape, reduced_shape, operands, term, combine, kind):
    """The array whose element at `outer` combines term(operands, outer, inner) for all `inner`
    in reduced_shape."""
    graph = builder.graph
    outs = math.prod(out_shape)
    accumulated = outs <= 1024 and math.prod(reduced_shape) > 64
    out_looped = [] if accumulated else builder.looped_axes(out_shape)
    # Elements that are combined in one go are written out, if they are few.
    reduced_looped = builder.looped_axes(
        reduced_shape, 64 if not accumulated else max(1, 1024 // outs)
    )
    joint = [*out_looped, *(len(out_shape) + axis for axis in reduced_looped)]
    operands = [builder.ready(operand, joint) for operand in operands]
    first = tuple(0 for _ in reduced_shape)

    def combined(outer_indices):
        """One result for each of outer_indices."""
        if not reduced_looped:
            results = []
            for outer in outer_indices:
                terms = [term(operands, outer, inner) for inner in np.ndindex(reduced_shape)]
                results.append(functools.reduce(combine, terms))
            return results

        def turn(inner, carry):
            return [
                combine(before, term(operands, outer, inner))
                for before, outer in zip(carry, outer_indices, strict=True)
            ]

        starts = [
            neutral(graph, combine, kind, term(operands, outer, first)) for outer in outer_indices
        ]
        return builder.fold(reduced_shape, reduced_looped, starts, turn)

    if not out_looped:
        results = combined(list(np.ndindex(out_shape)))
        value = Scalars(np.array(results, np.int64).reshape(out_shape), kind)
        if outs > builder.scalar_limit:
            return builder.memory(value)
        return value
    target = builder.new_memory(out_shape, kind, out_looped[0])

    def body(index):
        (result,) = combined([index])
        builder.write(target, index, result)

    def turn_of_rows(index, carry):
        body(index)
        return carry

    if reduced_looped:
        builder.fold(out_shape, out_looped, [], turn_of_rows)
        builder.last_loop = None
    else:
        builder.for_each(out_shape, out_looped, operands, [target], body)
    return target


def neutral(graph, combine, kind, example):
    """What `combine` leaves alone."""
    name = combine.__name__
    if name == "add":
        return graph.const(kind, 0.0 if kind == "f" else 0)
    if name == "mul":
        return graph.const(kind, 1.0 if kind == "f" else 1)
    if name == "and":
        return graph.const(kind, True if kind == "b" else -1)
    if name in ("or", "xor"):
        return graph.const(kind, False if kind == "b" else 0)
    return example


def combiner(graph, name: str, kind: str):
    """A function of two nodes, with the name that `neutral` knows it by."""
    operation = {
        "add": graph.add,
        "mul": graph.mul,
        "max": graph.max,
        "min": graph.min,
        "and": graph.logic_and,
        "or": graph.logic_or,
        "xor": graph.logic_xor,
    }[name]

    def combine(a, b):
        return operation(kind, a, b)

    combine.__name__ = name
    return combine


REDUCTIONS = {
    "reduce_sum": ("add", np.add),
    "reduce_prod": ("mul", np.multiply),
    "reduce_max": ("max", np.maximum),
    "reduce_min": ("min", np.minimum),
    "reduce_and": ("and", np.bitwise_and),
    "reduce_or": ("or", np.bitwise_or),
    "reduce_xor": ("xor", np.bitwise_xor),
}


@rule(*REDUCTIONS)
def reduction(builder, equation, value):
    axes = tuple(equation.params["axes"])
    kind = out_kind(equation)
    name, ufunc = REDUCTIONS[equation.primitive.name]
    if not axes:
        return [value]
    empty = any(value.shape[axis] == 0 for axis in axes)
    if empty or (known((value,)) and (kind == "b" or name in ("max", "min"))):
        constant = value if known((value,)) else np.zeros(value.shape, DTYPES[kind])
        if empty:
            fill = {"mul": 1, "and": True if kind == "b" else -1}.get(name, 0)
            if name in ("max", "min"):
                fill = lowest(kind) if name == "max" else highest(kind)
            shape = equation.outvars[0].aval.shape
            return [np.full(shape, fill).astype(DTYPES[kind])]
        return [np.asarray(ufunc.reduce(constant, axis=axes), DTYPES[kind])]
    if kind == "b" and name in ("max", "min"):
        name = "or" if name == "max" else "and"
    return [reduce(builder, value, axes, combiner(builder.graph, name, kind), kind)]


def lowest(kind: str):
    return {"f": -math.inf, "i": -(1 << 31), "u": 0, "b": False}[kind]


def highest(kind: str):
    return {"f": math.inf, "i": (1 << 31) - 1, "u": (1 << 32) - 1, "b": True}[kind]


@rule("argmax", "argmin")
def argument_of_extreme(builder, equation, value):
    """The first NaN's place, if there is one; else the first extreme's."""
    graph = builder.graph
    (axis,) = equation.params["axes"]
    kind = kind_of(value)
    index_kind = out_kind(equation)
    larger = equation.primitive.name == "argmax"
    rows = builder.scalars(
        arrays.transpose(value, [*(i for i in range(len(value.shape)) if i != axis), axis])
    )
    shape = rows.shape[:-1]
    results = np.empty(shape, np.int64)
    for index in np.ndindex(shape):
        best, *others = rows.ids[index].tolist()
        place = graph.const(index_kind, 0)
        for number, node in enumerate(others, 1):
            better = (
                graph.compare("lt", kind, best, node)
                if larger
                else graph.compare("lt", kind, node, best)
            )
            if kind == "f":
                new_nan = graph.compare("ne", kind, node, node)
                old_nan = graph.compare("ne", kind, best, best)
                better = graph.logic_or("b", better, new_nan)
                better = graph.logic_and("b", better, graph.logic_not("b", old_nan))
            best = graph.select(kind, better, node, best)
            place = graph.select(index_kind, better, graph.const(index_kind, number), place)
        results[index] = place
    return [Scalars(results, index_kind)]


CUMULATIVE = {"cumsum": "add", "cumprod": "mul", "cummax": "max", "cummin": "min"}


@rule(*CUMULATIVE)
def cumulative(builder, equation, value):
    axis = equation.params["axis"]
    kind = kind_of(value)
    combine = combiner(builder.graph, CUMULATIVE[equation.primitive.name], kind)
    backwards = equation.params["reverse"]
    if isinstance(value, Memory) or math.prod(value.shape) > builder.scalar_limit:
        return [cumulative_in_memory(builder, value, axis, combine, backwards)]
    moved = np.moveaxis(builder.scalars(value).ids, axis, 0)
    rows = moved.reshape(len(moved), -1).tolist()
    if backwards:
        rows.reverse()
    results = rows[:1]
    for row in rows[1:]:
        results.append(
            [combine(before, node) for before, node in zip(results[-1], row, strict=True)]
        )
    if backwards:
        results.reverse()
    ids = np.array(results, np.int64).reshape(moved.shape)
    return [Scalars(np.moveaxis(ids, 0, axis), kind)]


def cumulative_in_memory(builder, value, axis, combine, backwards):
    """A loop along the axis for each of the other elements."""
    kind = kind_of(value)
    graph = builder.graph
    if backwards:
        value = arrays.reverse(value, [axis])
    value = builder.memory(value)
    target = builder.new_memory(value.shape, kind)
    others = tuple(1 if i == axis else size for i, size in enumerate(value.shape))
    looped = builder.looped_axes(others)

    def line(outer, carry):
        def turn(inner, before):
            index = tuple(inner[0] if i == axis else place for i, place in enumerate(outer))
            after = combine(before[0], builder.read(value, index))
            builder.write(target, index, after)
            return [after]

        first = builder.read(
            value, tuple(0 if i == axis else place for i, place in enumerate(outer))
        )
        builder.fold((value.shape[axis],), [0], [neutral(graph, combine, kind, first)], turn)
        return carry

    builder.fold(others, looped, [], line)
    builder.last_loop = None
    return arrays.reverse(target, [axis]) if backwards else target


# Linear algebra -----------------------------------------------------------------------------------


@rule("dot_general")
def dot_general(builder, equation, a, b):
    (a_axes, b_axes), (a_batch, b_batch) = equation.params["dimension_numbers"]
    kind = out_kind(equation)
    graph = builder.graph
    a_free = [axis for axis in range(len(a.shape)) if axis not in a_axes and axis not in a_batch]
    b_free = [axis for axis in range(len(b.shape)) if axis not in b_axes and axis not in b_batch]
    batch_shape = tuple(a.shape[axis] for axis in a_batch)
    a_shape = tuple(a.shape[axis] for axis in a_free)
    b_shape = tuple(b.shape[axis] for axis in b_free)
    sum_shape = tuple(a.shape[axis] for axis in a_axes)
    # JAX multiplies integers with floats in one step.
    a = arrays.transpose(converted(builder, a, kind), [*a_batch, *a_free, *a_axes])
    b = arrays.transpose(converted(builder, b, kind), [*b_batch, *b_free, *b_axes])
    out_shape = (*batch_shape, *a_shape, *b_shape)
    terms = math.prod(sum_shape)
    if terms == 0 or math.prod(out_shape) == 0:
        return [np.zeros(out_shape, DTYPES[kind])]
    # JAX's product of truth values is whether there is a term with both.
    add = combiner(graph, "or" if kind == "b" else "add", kind)
    multiply = combiner(graph, "and" if kind == "b" else "mul", kind)
    in_memory = isinstance(a, Memory) or isinstance(b, Memory)
    size = max(math.prod(a.shape), math.prod(b.shape), math.prod(out_shape))
    if size <= builder.scalar_limit and not (in_memory and terms * math.prod(out_shape) > 4096):
        rows = builder.scalars(a).ids.reshape(math.prod(batch_shape), math.prod(a_shape), terms)
        columns = builder.scalars(b).ids.reshape(math.prod(batch_shape), math.prod(b_shape), terms)
        results = []
        for batch_rows, batch_columns in zip(rows.tolist(), columns.tolist(), strict=True):
            for row, column in itertools.product(batch_rows, batch_columns):
                results.append(dot(graph, kind, row, column, multiply, add))
        return [Scalars(np.array(results, np.int64).reshape(out_shape), kind)]

    # Both with all of the result's axes, so that one index does for both; those they lack are
    # repetitions.
    rank = len(out_shape)
    batch_axes = list(range(len(batch_shape)))
    a_out = list(range(len(batch_shape), len(batch_shape) + len(a_shape)))
    b_out = list(range(len(batch_shape) + len(a_shape), rank))
    sums = list(range(rank, rank + len(sum_shape)))
    full = (*out_shape, *sum_shape)
    a = arrays.broadcast_in_dim(a, full, [*batch_axes, *a_out, *sums])
    b = arrays.broadcast_in_dim(b, full, [*batch_axes, *b_out, *sums])

    def term(operands, outer, inner):
        left, right = operands
        return multiply(builder.read(left, (*outer, *inner)), builder.read(right, (*outer, *inner)))

    return [contract(builder, out_shape, sum_shape, [a, b], term, add, kind)]


def converted(builder, value, kind: str):
    """value as an array of another type."""
    if kind_of(value) == kind:
        return value
    return builder.elementwise(
        lambda node: builder.graph.convert(node, kind), kind, [value], value.shape
    )


def dot(graph, kind, row, column, multiply, add) -> int:
    total = None
    for a, b in zip(row, column, strict=True):
        product = multiply(a, b)
        if graph.op[product] == "const" and graph.value[product] == 0:
            continue
        total = product if total is None else add(total, product)
    return neutral(graph, add, kind, None) if total is None else total


@rule("cholesky")
def cholesky(builder, equation, matrix):
    """Column by column. Where a matrix is not positive definite, its factor is NaN from that
    column on (JAX's is NaN altogether)."""
    batch = matrix.shape[:-2]
    if isinstance(matrix, Memory) and math.prod(matrix.shape[-2:]) > 40 * 40:
        rows = matrix.shape[-1]
        raise Unsupported(f"cholesky of a matrix of {rows} rows that stays in memory")
    ids = builder.scalars(matrix).ids
    factor = np.empty(matrix.shape, np.int64)
    for index in np.ndindex(batch):
        factor[index] = cholesky_of_one(builder.graph, ids[index].tolist())
    return [Scalars(factor, "f")]


def cholesky_of_one(graph, matrix) -> list[list[int]]:
    size = len(matrix)
    zero = graph.const("f", 0.0)
    factor = [[zero] * size for _ in range(size)]
    for j in range(size):
        pivot = matrix[j][j]
        for k in range(j):
            pivot = graph.sub("f", pivot, graph.mul("f", factor[j][k], factor[j][k]))
        factor[j][j] = graph.unary("sqrt", pivot)
        inverse = graph.reciprocal(factor[j][j])
        for i in range(j + 1, size):
            rest = matrix[i][j]
            for k in range(j):
                rest = graph.sub("f", rest, graph.mul("f", factor[i][k], factor[j][k]))
            factor[i][j] = graph.mul("f", rest, inverse)
    return factor


@rule("triangular_solve")
def triangular_solve(builder, equation, a, b):
    params = equation.params
    graph = builder.graph
    a = builder.scalars(a).ids
    b = builder.scalars(b).ids
    lower = params["lower"]
    if not params["left_side"]:  # x a = b is a' x' = b'
        a = np.swapaxes(a, -1, -2)
        b = np.swapaxes(b, -1, -2)
        lower = not lower
    if params["transpose_a"]:
        a = np.swapaxes(a, -1, -2)
        lower = not lower
    solution = np.empty(b.shape, np.int64)
    size = a.shape[-1]
    order = range(size) if lower else range(size - 1, -1, -1)
    for index in np.ndindex(b.shape[:-2]):
        matrix = a[index].tolist()
        inverses = [graph.reciprocal(matrix[i][i]) for i in range(size)]
        for column in range(b.shape[-1]):
            done: list[int] = []
            for i in order:
                rest = int(b[index][i, column])
                for k in done:
                    rest = graph.sub(
                        "f", rest, graph.mul("f", matrix[i][k], int(solution[index][k, column]))
                    )
                if not params["unit_diagonal"]:
                    rest = graph.mul("f", rest, inverses[i])
                solution[index][i, column] = rest
                done.append(i)
    if not params["left_side"]:
        solution = np.swapaxes(solution, -1, -2)
    return [Scalars(solution, "f")]


# Sorting ------------------------------------------------------------------------------------------


def sort_key(graph, kind: str, node: int) -> int:
    """An int32 or uint32 in whose order JAX sorts: -0 is 0, and NaN is the largest."""
    if kind == "b":
        return graph.convert(node, "i")
    if kind != "f":
        return node
    nan = graph.compare("ne", "f", node, node)
    zero = graph.compare("eq", "f", node, graph.const("f", 0.0))
    bits = graph.bitcast(node, "i")
    bits = graph.select("i", zero, graph.const("i", 0), bits)
    bits = graph.select("i", nan, graph.const("i", 0x7FC00000), bits)
    return total_order_key(graph, bits)


def before(graph, kinds, left, right) -> int:
    """Whether the keys `left` come before the keys `right`, by the first that differs."""
    result = graph.const("b", False)
    for kind, a, b in reversed(list(zip(kinds, left, right, strict=True))):
        less = graph.compare("lt", kind, a, b)
        same = graph.compare("eq", kind, a, b)
        result = graph.logic_or("b", less, graph.logic_and("b", same, result))
    return result


def sort_rows(graph, keys, key_kinds, columns, column_kinds):
    """Sorts lists of nodes by a network of exchanges (Batcher's odd-even merge sort). keys:
    lists; the last one, the place, makes all keys differ, so that the sort is stable."""
    count = len(keys[0])
    keys = [list(key) for key in keys]
    columns = [list(column) for column in columns]
    for low, high in merge_network(count):
        left = [key[low] for key in keys]
        right = [key[high] for key in keys]
        swap = before(graph, key_kinds, right, left)
        lists = itertools.chain(
            zip(keys, key_kinds, strict=True), zip(columns, column_kinds, strict=True)
        )
        for nodes, kind in lists:
            a = nodes[low]
            b = nodes[high]
            nodes[low] = graph.select(kind, swap, b, a)
            nodes[high] = graph.select(kind, swap, a, b)
    return columns


def merge_network(count: int):
    """Pairs of places to compare, in order, for `count` items."""
    size = 1
    while size < count:
        step = size
        while step >= 1:
            for start in range(step % size, count - step, 2 * step):
                for i in range(min(step, count - start - step)):
                    if (i + start) // (2 * size) == (i + start + step) // (2 * size):
                        yield i + start, i + start + step
            step //= 2
        size *= 2


@rule("sort")
def sort(builder, equation, *operands):
    params = equation.params
    axis = params["dimension"]
    count = operands[0].shape[axis]
    num_keys = params["num_keys"]
    graph = builder.graph
    kinds = [kind_of(operand) for operand in operands]
    permutation = [*(i for i in range(len(operands[0].shape)) if i != axis), axis]
    back = np.argsort(permutation)
    rows = [arrays.transpose(operand, permutation) for operand in operands]
    if count > 32 or math.prod(rows[0].shape) > builder.scalar_limit:
        results = sort_in_memory(builder, rows, kinds, num_keys, count)
        return [arrays.transpose(result, back) for result in results]
    ids = [builder.scalars(row).ids for row in rows]
    results = [np.empty(row.shape, np.int64) for row in rows]
    key_kinds = [key_kind(kind) for kind in kinds[:num_keys]]
    places = [graph.const("i", number) for number in range(count)]
    for index in np.ndindex(rows[0].shape[:-1]):
        columns = [array[index].tolist() for array in ids]
        keys = [
            [sort_key(graph, kind, node) for node in column]
            for kind, column in zip(kinds[:num_keys], columns, strict=False)
        ]
        done = sort_rows(graph, [*keys, places], [*key_kinds, "i"], columns, kinds)
        for result, column in zip(results, done, strict=True):
            result[index] = column
    return [
        arrays.transpose(Scalars(result, kind), back)
        for result, kind in zip(results, kinds, strict=True)
    ]


def key_kind(kind: str) -> str:
    return "u" if kind == "u" else "i"


def sort_in_memory(builder, rows, kinds, num_keys, keep, descending=False):
    """Each element goes to the place that is the number of elements before it. The first `keep`
    places are kept."""
    graph = builder.graph
    shape = rows[0].shape
    count = shape[-1]
    keys = [
        builder.memory(
            builder.elementwise(
                functools.partial(sort_key, graph, kind), key_kind(kind), [row], shape
            )
        )
        for kind, row in zip(kinds[:num_keys], rows, strict=False)
    ]
    kinds_of_keys = [key.kind for key in keys]
    rows = [builder.memory(row) for row in rows]
    out_shape = (*shape[:-1], keep)
    targets = [builder.new_memory(out_shape, kind) for kind in kinds]
    builder.last_loop = None

    def place(index, carry):
        *outer, own = index
        own_node = own.node if isinstance(own, Turn) else graph.const("i", own)
        mine = [builder.read(key, index) for key in keys]

        def count_before(inner, counted):
            (other,) = inner
            other_node = other.node if isinstance(other, Turn) else graph.const("i", other)
            theirs = [builder.read(key, (*outer, other)) for key in keys]
            left, right = (mine, theirs) if descending else (theirs, mine)
            earlier = before(graph, kinds_of_keys, left, right)
            same = graph.const("b", True)
            for kind, a, b in zip(kinds_of_keys, mine, theirs, strict=True):
                same = graph.logic_and("b", same, graph.compare("eq", kind, a, b))
            first = graph.logic_and("b", same, graph.compare("lt", "i", other_node, own_node))
            one = graph.convert(graph.logic_or("b", earlier, first), "i")
            return [graph.add("i", counted[0], one)]

        (rank,) = builder.fold((count,), [0], [graph.const("i", 0)], count_before)
        kept = graph.compare("lt", "i", rank, graph.const("i", keep))
        inside = graph.min("i", rank, graph.const("i", keep - 1))
        for row, target in zip(rows, targets, strict=True):
            address = builder.address(target, (*outer, Turn(inside)))
            graph.store(target.buffer, address, builder.read(row, index), kept)
        return carry

    builder.fold(shape, builder.looped_axes(shape, 1), [], place)
    builder.last_loop = None
    builder.values_in_memory_forget(targets)
    return targets


@rule("top_k")
def top_k(builder, equation, value):
    """The largest, in falling order; of equal ones those that stand first."""
    params = equation.params
    keep = params["k"]
    axis = params.get("axis", -1) % len(value.shape)
    if axis != len(value.shape) - 1:
        raise Unsupported("top_k along another axis than the last")
    graph = builder.graph
    kind = kind_of(value)
    index_kind = KINDS[equation.outvars[1].aval.dtype]
    count = value.shape[-1]
    if count > 32 or math.prod(value.shape) > builder.scalar_limit:
        places = np.broadcast_to(np.arange(count, dtype=DTYPES[index_kind]), value.shape)
        return sort_in_memory(
            builder, [value, places], [kind, index_kind], 1, keep, descending=True
        )
    ids = builder.scalars(value).ids
    values = np.empty((*value.shape[:-1], keep), np.int64)
    places = np.empty_like(values)
    numbers = [graph.const(index_kind, number) for number in range(count)]
    for index in np.ndindex(value.shape[:-1]):
        row = ids[index].tolist()
        keys = [graph.logic_not(key_kind(kind), sort_key(graph, kind, node)) for node in row]
        order = [graph.const("i", number) for number in range(count)]
        kinds = [key_kind(kind), "i"]
        done = sort_rows(graph, [keys, order], kinds, [row, numbers], [kind, index_kind])
        values[index] = done[0][:keep]
        places[index] = done[1][:keep]
    return [Scalars(values, kind), Scalars(places, index_kind)]


# Elements at computed places ----------------------------------------------------------------------


def as_index(graph, node: int, high: int) -> int:
    """An index as an int32; of an uint32, all that are above `high` become one of them."""
    if graph.kind[node] == "u":
        node = graph.min("u", node, graph.const("u", high + 1))
    return graph.convert(node, "i")


def pick(builder: Builder, operand, places: list) -> int:
    """operand[places]; each of places is an integer or a node (in a Turn), inside of the range."""
    unknown = [axis for axis, place in enumerate(places) if isinstance(place, Turn)]
    graph = builder.graph
    if not unknown:
        return builder.read(operand, tuple(places))
    size = operand.shape[unknown[0]]
    if not isinstance(operand, Memory) and len(unknown) == 1 and size <= SELECTED:
        axis = unknown[0]
        node = places[axis].node
        chosen = None
        kind = kind_of(operand)
        for number in reversed(range(size)):
            candidate = builder.read(
                operand, tuple(number if i == axis else p for i, p in enumerate(places))
            )
            if chosen is None:
                chosen = candidate
            else:
                here = graph.compare("eq", "i", node, graph.const("i", number))
                chosen = graph.select(kind, here, candidate, chosen)
        return chosen
    held = builder.memory(operand)
    return graph.load(held.buffer, builder.address(held, tuple(places)))


def place_of(graph, node: int):
    value = graph.value[node]
    return Turn(node) if value is None else value


def clamped(graph, node: int, high: int) -> int:
    zero = graph.const("i", 0)
    return graph.min("i", graph.max("i", node, zero), graph.const("i", high))


@rule("dynamic_slice")
def dynamic_slice(builder, equation, operand, *starts):
    if isinstance(operand, Keys):
        words = [dynamic_slice(builder, equation, word, *starts)[0] for word in operand.words]
        return [Keys(words, operand.impl)]
    graph = builder.graph
    sizes = equation.params["slice_sizes"]
    nodes = []
    for start, size, whole in zip(starts, sizes, operand.shape, strict=True):
        index = as_index(graph, builder.read(start, ()), whole - size)
        nodes.append(clamped(graph, index, whole - size))
    places = [place_of(graph, node) for node in nodes]
    if not any(isinstance(place, Turn) for place in places):
        limits = [place + size for place, size in zip(places, sizes, strict=True)]
        return [arrays.slice_(operand, places, limits, [1] * len(sizes))]
    large = math.prod(sizes) > builder.scalar_limit
    if isinstance(operand, Memory) or large or math.prod(operand.shape) > builder.scalar_limit:
        held = builder.memory(operand)
        base = held.base if held.base >= 0 else graph.const("i", 0)
        for node, stride in zip(nodes, held.strides, strict=True):
            base = graph.add("i", base, graph.mul("i", node, graph.const("i", stride)))
        return [Memory(held.buffer, held.kind, tuple(sizes), held.strides, held.offset, base)]
    ids = np.empty(sizes, np.int64)
    for index in np.ndindex(*sizes):
        ids[index] = pick(
            builder, operand, [shifted(graph, p, i) for p, i in zip(places, index, strict=True)]
        )
    return [Scalars(ids, kind_of(operand))]


def shifted(graph, place, by: int):
    if isinstance(place, Turn):
        return Turn(graph.add("i", place.node, graph.const("i", by)))
    return place + by


@rule("dynamic_update_slice")
def dynamic_update_slice(builder, equation, operand, update, *starts):
    if isinstance(operand, Keys):
        words = zip(operand.words, update.words, strict=True)
        results = [dynamic_update_slice(builder, equation, *word, *starts)[0] for word in words]
        return [Keys(results, operand.impl)]
    graph = builder.graph
    places = []
    for start, size, whole in zip(starts, update.shape, operand.shape, strict=True):
        index = as_index(graph, builder.read(start, ()), whole - size)
        places.append(place_of(graph, clamped(graph, index, whole - size)))
    targets = []
    for index in np.ndindex(update.shape):
        moved = [shifted(graph, place, by) for place, by in zip(places, index, strict=True)]
        targets.append((moved, graph.const("b", True), index))
    if math.prod(update.shape) > builder.scalar_limit:
        known_places = not any(isinstance(place, Turn) for place in places)
        target = builder.copied(operand)
        builder.last_loop = None
        part = target
        if known_places:
            limits = [p + size for p, size in zip(places, update.shape, strict=True)]
            part = arrays.slice_(target, places, limits, [1] * len(places))
        else:
            base = graph.const("i", 0)
            for place, stride in zip(places, target.strides, strict=True):
                node = place.node if isinstance(place, Turn) else graph.const("i", place)
                base = graph.add("i", base, graph.mul("i", node, graph.const("i", stride)))
            part = Memory(
                target.buffer, target.kind, update.shape, target.strides, target.offset, base
            )
        builder.copy_into(part, update)
        builder.last_loop = None
        builder.values_in_memory_forget([target])
        return [target]
    return [write_elements(builder, operand, update, targets, lambda old, new: new)]


def write_elements(builder, operand, update, targets, combine):
    """operand after operand[place] = combine(operand[place], update[index]) for each (place,
    condition, index) in targets, in order. place: integers or nodes, inside of the range;
    condition: the node under which to write."""
    graph = builder.graph
    kind = kind_of(operand)
    unknown = any(isinstance(place, Turn) for places, _, _ in targets for place in places)
    choices = max(
        (
            math.prod(
                size
                for place, size in zip(places, operand.shape, strict=True)
                if isinstance(place, Turn)
            )
            for places, _, _ in targets
        ),
        default=0,
    )
    in_memory = isinstance(operand, Memory) or math.prod(operand.shape) > builder.scalar_limit
    if not in_memory and (not unknown or choices * len(targets) <= 4096):
        ids = np.array(builder.scalars(operand).ids)
        for places, condition, index in targets:
            new = builder.read(update, index)
            candidates = [
                range(size) if isinstance(place, Turn) else [place]
                for place, size in zip(places, operand.shape, strict=True)
            ]
            for spot in itertools.product(*candidates):
                here = condition
                for place, number in zip(places, spot, strict=True):
                    if isinstance(place, Turn):
                        same = graph.compare("eq", "i", place.node, graph.const("i", number))
                        here = graph.logic_and("b", here, same)
                if graph.value[here] is False:
                    continue
                old = int(ids[spot])
                ids[spot] = graph.select(kind, here, combine(old, new), old)
        return Scalars(ids, kind)
    target = builder.copied(operand)
    builder.last_loop = None
    builder.values_in_memory_forget([target])
    for places, condition, index in targets:
        new = builder.read(update, index)
        address = builder.address(target, tuple(places))
        old = graph.load(target.buffer, address)
        graph.store(target.buffer, address, combine(old, new), condition)
    builder.values_in_memory_forget([target])
    if math.prod(operand.shape) <= builder.scalar_limit:
        return builder.scalars(target)
    return target


def index_positions(builder, indices, batch_index, start_index_map, window, operand_shape, mode):
    """Where a gather or scatter finds its window for one index vector: for each axis of the
    operand an integer or a node, and the node that says whether the window lies inside."""
    graph = builder.graph
    places: list = [0] * len(operand_shape)
    inside = graph.const("b", True)
    for component, axis in enumerate(start_index_map):
        node = builder.read(indices, (*batch_index, component))
        high = operand_shape[axis] - window[axis]
        node = as_index(graph, node, high)
        if mode == GatherScatterMode.FILL_OR_DROP:
            above = graph.compare("le", "i", graph.const("i", 0), node)
            below = graph.compare("le", "i", node, graph.const("i", high))
            inside = graph.logic_and("b", inside, graph.logic_and("b", above, below))
        places[axis] = place_of(graph, clamped(graph, node, high))
    return places, inside


@rule("gather")
def gather(builder, equation, operand, indices):
    if isinstance(operand, Keys):
        words = [gather(builder, equation, word, indices)[0] for word in operand.words]
        return [Keys(words, operand.impl)]
    params = equation.params
    numbers = params["dimension_numbers"]
    window = params["slice_sizes"]
    mode = GatherScatterMode.from_any(params["mode"])
    out_shape = equation.outvars[0].aval.shape
    graph = builder.graph
    kind = kind_of(operand)
    batch_axes = [axis for axis in range(len(out_shape)) if axis not in numbers.offset_dims]
    hidden = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window_axes = [axis for axis in range(len(operand.shape)) if axis not in hidden]
    if isinstance(indices, np.ndarray) and not isinstance(operand, Memory):
        return [
            gather_known(
                operand, indices, numbers, window, mode, out_shape, params["fill_value"], builder
            )
        ]
    fill = None
    if mode == GatherScatterMode.FILL_OR_DROP:
        fill = graph.const(kind, fill_constant(kind, params["fill_value"]))
    if isinstance(operand, Memory) or math.prod(operand.shape) > builder.scalar_limit:
        operand = builder.memory(operand)

    def element(index) -> int:
        batch_index = tuple(index[axis] for axis in batch_axes)
        places, inside = index_positions(
            builder, indices, batch_index, numbers.start_index_map, window, operand.shape, mode
        )
        for axis, batch in zip(
            numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
        ):
            places[axis] = batch_index[batch]
        for axis, out_axis in zip(window_axes, numbers.offset_dims, strict=True):
            place = places[axis]
            step = index[out_axis]
            if isinstance(step, Turn):
                base = place.node if isinstance(place, Turn) else graph.const("i", place)
                places[axis] = Turn(graph.add("i", base, step.node))
            else:
                places[axis] = shifted(graph, place, step)
        node = pick(builder, operand, places)
        return node if fill is None else graph.select(kind, inside, node, fill)

    if math.prod(out_shape) <= builder.scalar_limit:
        ids = np.empty(out_shape, np.int64)
        for index in np.ndindex(out_shape):
            ids[index] = element(index)
        return [Scalars(ids, kind)]
    looped = builder.looped_axes(out_shape)
    operand = builder.memory(operand)
    indices = builder.memory(indices)
    target = builder.new_memory(out_shape, kind, looped[0] if looped else 0)
    builder.last_loop = None
    builder.for_each(
        out_shape, looped, [], [target], lambda index: builder.write(target, index, element(index))
    )
    return [target]


def gather_known(operand, indices, numbers, window, mode, out_shape, fill_value, builder):
    """A gather whose indices are constants: elements are only rearranged."""
    batch_axes = [axis for axis in range(len(out_shape)) if axis not in numbers.offset_dims]
    hidden = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window_axes = [axis for axis in range(len(operand.shape)) if axis not in hidden]
    grid = np.indices(out_shape)
    batch_index = tuple(grid[axis] for axis in batch_axes)
    places = [np.zeros(out_shape, np.int64) for _ in operand.shape]
    inside = np.ones(out_shape, bool)
    for component, axis in enumerate(numbers.start_index_map):
        start = indices[(*batch_index, component)].astype(np.int64)
        high = operand.shape[axis] - window[axis]
        inside &= (start >= 0) & (start <= high)
        places[axis] = np.clip(start, 0, high)
    for axis, batch in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        places[axis] = batch_index[batch]
    for axis, out_axis in zip(window_axes, numbers.offset_dims, strict=True):
        places[axis] = places[axis] + grid[out_axis]
    places = tuple(places)
    fills = mode == GatherScatterMode.FILL_OR_DROP and not inside.all()
    if isinstance(operand, np.ndarray):
        picked = operand[places]
        if fills:
            fill = fill_constant(KINDS[operand.dtype], fill_value)
            picked = np.where(inside, picked, np.asarray(fill).astype(operand.dtype))
        return picked
    ids = operand.ids[places]
    if fills:
        fill = builder.graph.const(operand.kind, fill_constant(operand.kind, fill_value))
        ids = np.where(inside, ids, fill)
    return Scalars(ids, operand.kind)


def fill_constant(kind: str, value):
    """What a gather gives outside of the range, where the caller has not said."""
    if value is not None:
        value = np.asarray(value).astype(DTYPES[kind]).item()
        return value
    return {"f": math.nan, "i": -(1 << 31), "u": (1 << 32) - 1, "b": True}[kind]


def scattering(*names: str):
    def register(combine):
        @rule(*names)
        def apply(builder, equation, operand, indices, updates):
            # `x.at[i].apply(f)` is a scatter, too, with f in place of what a scatter does.
            if names == ("scatter",) and equation.params["update_jaxpr"] is not None:
                raise Unsupported("scatter by a function, as of x.at[i].apply")
            if isinstance(operand, Keys):
                words = zip(operand.words, updates.words, strict=True)
                results = [apply(builder, equation, a, indices, b)[0] for a, b in words]
                return [Keys(results, operand.impl)]
            kind = kind_of(operand)
            bound = functools.partial(combine, builder.graph, kind)
            return [scatter(builder, equation, operand, indices, updates, bound)]

        return combine

    return register


def scatter(builder, equation, operand, indices, updates, combine):
    params = equation.params
    numbers = params["dimension_numbers"]
    mode = GatherScatterMode.from_any(params["mode"])
    graph = builder.graph
    hidden = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window_axes = [axis for axis in range(len(operand.shape)) if axis not in hidden]
    batch_axes = [
        axis for axis in range(len(updates.shape)) if axis not in numbers.update_window_dims
    ]
    window = [1] * len(operand.shape)
    for axis, update_axis in zip(window_axes, numbers.update_window_dims, strict=True):
        window[axis] = updates.shape[update_axis]
    if mode == GatherScatterMode.CLIP or mode == GatherScatterMode.PROMISE_IN_BOUNDS:
        checked = mode
    else:
        checked = GatherScatterMode.FILL_OR_DROP
    if isinstance(operand, Memory) or isinstance(updates, Memory):
        if math.prod(updates.shape) > builder.scalar_limit:
            return scatter_in_memory(
                builder,
                operand,
                indices,
                updates,
                combine,
                numbers,
                window,
                window_axes,
                batch_axes,
                checked,
            )
    targets = []
    starts: dict = {}
    for index in np.ndindex(updates.shape):
        batch_index = tuple(index[axis] for axis in batch_axes)
        if batch_index not in starts:
            starts[batch_index] = index_positions(
                builder,
                indices,
                batch_index,
                numbers.scatter_dims_to_operand_dims,
                window,
                operand.shape,
                checked,
            )
        places, inside = starts[batch_index]
        places = list(places)
        for axis, batch in zip(
            numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
        ):
            places[axis] = batch_index[batch]
        for axis, update_axis in zip(window_axes, numbers.update_window_dims, strict=True):
            places[axis] = shifted(graph, places[axis], index[update_axis])
        if graph.value[inside] is not False:
            targets.append((places, inside, index))
    return write_elements(builder, operand, updates, targets, combine)


def scatter_in_memory(
    builder, operand, indices, updates, combine, numbers, window, window_axes, batch_axes, mode
):
    """The same as a loop over the updates, in their order."""
    graph = builder.graph
    target = builder.copied(operand)
    builder.last_loop = None
    indices = builder.memory(indices)
    updates = builder.memory(updates)
    builder.values_in_memory_forget([target])

    def step(index, carry):
        batch_index = tuple(index[axis] for axis in batch_axes)
        places, inside = index_positions(
            builder,
            indices,
            batch_index,
            numbers.scatter_dims_to_operand_dims,
            window,
            operand.shape,
            mode,
        )
        for axis, batch in zip(
            numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
        ):
            places[axis] = batch_index[batch]
        for axis, update_axis in zip(window_axes, numbers.update_window_dims, strict=True):
            by = index[update_axis]
            if isinstance(by, Turn):
                base = places[axis]
                base = base.node if isinstance(base, Turn) else graph.const("i", base)
                places[axis] = Turn(graph.add("i", base, by.node))
            else:
                places[axis] = shifted(graph, places[axis], by)
        address = builder.address(target, tuple(places))
        new = builder.read(updates, index)
        old = graph.load(target.buffer, address)
        graph.store(target.buffer, address, combine(old, new), inside)
        return carry

    builder.fold(updates.shape, builder.looped_axes(updates.shape), [], step)
    builder.last_loop = None
    builder.values_in_memory_forget([target])
    return target


@scattering("scatter")
def scatter_set(graph, kind, old, new):
    return new


@scattering("scatter-add", "scatter_add")
def scatter_add(graph, kind, old, new):
    return graph.logic_or("b", old, new) if kind == "b" else graph.add(kind, old, new)


@scattering("scatter-sub", "scatter_sub")
def scatter_sub(graph, kind, old, new):
    return graph.sub(kind, old, new)


@scattering("scatter-mul", "scatter_mul")
def scatter_mul(graph, kind, old, new):
    return graph.logic_and("b", old, new) if kind == "b" else graph.mul(kind, old, new)


@scattering("scatter-min", "scatter_min")
def scatter_min(graph, kind, old, new):
    return graph.min(kind, old, new)


@scattering("scatter-max", "scatter_max")
def scatter_max(graph, kind, old, new):
    return graph.max(kind, old, new)


# Programs inside of programs ----------------------------------------------------------------------


@rule(
    *(
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "checkpoint",
    ),
    *("remat", "remat2", "custom_vmap_call", "composite", "custom_lin"),
)
def call(builder, equation, *values):
    params = equation.params
    inner = next(
        params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call") if name in params
    )
    if hasattr(inner, "consts"):
        return builder.evaluate(inner.jaxpr, inner.consts, list(values))
    return builder.evaluate(inner, (), list(values))


@rule("scan")
def scan(builder, equation, *values):
    return builder.scan(equation, *values)


@rule("while")
def while_(builder, equation, *values):
    return builder.while_loop(equation, *values)


@rule("cond")
def cond(builder, equation, index, *operands):
    return builder.branch(equation.params["branches"], index, list(operands))


# Random numbers: the threefry generator, with the same bits as JAX's ------------------------------


def as_keys(builder, words, impl) -> Keys:
    """A key array of its words, which stand along the last axis."""
    rank = len(words.shape) - 1
    moved = arrays.transpose(words, [rank, *range(rank)])
    return Keys([builder.row(moved, i) for i in range(words.shape[-1])], impl)


def base_array(builder, keys: Keys):
    """The words of a key array as one array, along its last axis."""
    last = len(keys.shape)
    return builder.join([builder.reshape(word, (*word.shape, 1)) for word in keys.words], last)


@rule("random_wrap")
def random_wrap(builder, equation, words):
    return [as_keys(builder, words, equation.params["impl"])]


@rule("random_unwrap")
def random_unwrap(builder, equation, keys):
    return [base_array(builder, keys)]


@rule("random_clone")
def random_clone(builder, equation, keys):
    return [keys]


@rule("random_seed")
def random_seed(builder, equation, seeds):
    """The key of a seed of 32 bits: 0 and the seed."""
    impl = equation.params["impl"]
    require_threefry(impl)
    low = converted(builder, seeds, "u")
    high = arrays.broadcast_in_dim(np.zeros((), np.uint32), seeds.shape, ())
    return [Keys([high, low], impl)]


@rule("random_split")
def random_split(builder, equation, keys):
    return [Keys(count_with(builder, keys, equation.params["shape"]), keys.impl)]


@rule("random_fold_in")
def random_fold_in(builder, equation, keys, messages):
    require_threefry(keys.impl)
    shape = equation.outvars[0].aval.shape
    zero = np.zeros((), np.uint32)
    values = [*keys.words, zero, converted(builder, messages, "u")]
    return [Keys(threefry(builder, values, shape), keys.impl)]


@rule("random_bits")
def random_bits(builder, equation, keys):
    if equation.params["bit_width"] != 32:
        raise Unsupported(f"random bits of width {equation.params['bit_width']}")
    high, low = count_with(builder, keys, equation.params["shape"])
    graph = builder.graph
    return [
        builder.elementwise(functools.partial(graph.logic_xor, "u"), "u", [high, low], high.shape)
    ]


def require_threefry(impl) -> None:
    if "threefry2x32" not in str(getattr(impl, "name", impl)):
        raise Unsupported(f"random numbers by {impl}")
    if not jax.config.jax_threefry_partitionable:
        raise Unsupported("random numbers without jax_threefry_partitionable")


def count_with(builder, keys: Keys, shape) -> list:
    """The hashes of 0, 1, 2 ... in an array of this shape, for each key: two words each."""
    require_threefry(keys.impl)
    full = (*keys.shape, *shape)
    own = range(len(keys.shape))
    words = [arrays.broadcast_in_dim(word, full, own) for word in keys.words]
    numbers = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    numbers = arrays.broadcast_in_dim(numbers, full, range(len(keys.shape), len(full)))
    return threefry(builder, [*words, np.zeros((), np.uint32), numbers], full)


@rule("threefry2x32")
def threefry2x32(builder, equation, *values):
    return threefry(builder, values, equation.outvars[0].aval.shape)


def threefry(builder, values, shape) -> list:
    """The hash of two words x, y under a key of two words; values: key and words, of this shape or
    without axes.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011): Threefry-2x32 with
    20 rounds."""
    graph = builder.graph

    def outputs(a, b, x, y):
        parity = graph.logic_xor("u", graph.logic_xor("u", a, b), graph.const("u", 0x1BD11BDA))
        keys = [a, b, parity]
        x = graph.add("u", x, keys[0])
        y = graph.add("u", y, keys[1])
        for group in range(5):
            for turn in (13, 15, 26, 6) if group % 2 == 0 else (17, 29, 16, 24):
                x = graph.add("u", x, y)
                left = graph.shift("shl", "u", y, graph.const("u", turn))
                right = graph.shift("lshr", "u", y, graph.const("u", 32 - turn))
                y = graph.logic_xor("u", graph.logic_or("u", left, right), x)
            x = graph.add("u", x, keys[(group + 1) % 3])
            number = graph.const("u", group + 1)
            y = graph.add("u", y, graph.add("u", keys[(group + 2) % 3], number))
        return x, y

    values = [
        stretched(value, shape) if value.shape else arrays.broadcast_in_dim(value, shape, ())
        for value in values
    ]
    if math.prod(shape) > builder.scalar_limit:
        functions = [lambda *nodes, i=i: outputs(*nodes)[i] for i in range(2)]
        return builder.looped_elementwise(functions, ["u", "u"], values, shape)
    columns = [builder.scalars(value).ids.reshape(-1).tolist() for value in values]
    pairs = [outputs(*nodes) for nodes in zip(*columns, strict=True)]
    results = []
    for which in range(2):
        ids = np.array([pair[which] for pair in pairs], np.int64).reshape(shape)
        results.append(Scalars(ids, "u"))
    return results


@rule("iota_2x32_shape")
def iota_2x32_shape(builder, equation):
    shape = equation.params["shape"]
    low = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    return [np.zeros(shape, np.uint32), low]


def traced(builder, function, *values):
    """The results of a JAX function of these values."""
    shapes = [jax.ShapeDtypeStruct(value.shape, DTYPES[kind_of(value)]) for value in values]
    closed = jax.make_jaxpr(function)(*shapes)
    return builder.evaluate(closed.jaxpr, closed.consts, list(values))
