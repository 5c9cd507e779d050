"""Products of small matrices for CPUs, faster than XLA's where the left one is transposed.

A network's layers are products of some hundred rows by some hundred columns. XLA's own take long to
begin with such sizes: they bring blocks into another order first, as pays for large matrices.

    layer = flax.linen.Dense(256, dot_general=onekernel.dot_general)

How: a tile of the result, some rows by some vectors of columns, stays in registers until it is
done. Each turn of its loop reads a row of the right matrix, as vectors, and a number of each row of
the left one, and adds their products. Where the right matrix comes transposed, as in the gradient of
a layer's input, it is put in order first, in blocks, by shuffles.

Each number is summed in the order of the matrices, whatever their sizes: a row's result depends on
nothing but that row, to the bit. A call uses one thread (see docs/onekernel.md).
"""

import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from onekernel import cache, cpu, ffi, primitives
from onekernel.api import result_type, run_one, versions
from onekernel.trace import rule
from onekernel.vector_math import SUBNORMALS

# How the two matrices may lie, and the axis of each over which the products are summed.
LAYOUTS = {
    "plain": ((1,), (0,)),  # [M, K], [K, N]
    "left transposed": ((0,), (0,)),  # [K, M], [K, N]
    "right transposed": ((1,), (1,)),  # [M, K], [N, K]
}


def dot_general(
    lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **options
):
    """`jax.lax.dot_general`, with the same arguments, result and gradients.

    On CPUs it is this file's where it is a product [..., K] x [K, N] of float32, with N > 1, since
    XLA is good at a matrix by a vector. Everything else, and other devices, are XLA's.
    """
    (contracted, batched) = dimension_numbers
    ours = (
        tuple(map(tuple, contracted)) == ((lhs.ndim - 1,), (0,))
        and not any(map(len, batched))
        and rhs.ndim == 2
        and rhs.shape[1] > 1
        and lhs.ndim >= 2
        and lhs.dtype == rhs.dtype == jnp.float32
        and preferred_element_type in (None, jnp.float32)
        and precision is None
        and not options
        and min(lhs.size, rhs.size) > 0
    )
    if not ours:
        return jax.lax.dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, **options
        )
    rows = product_p.bind(lhs.reshape(-1, lhs.shape[-1]), rhs, layout="plain")
    return rows.reshape(*lhs.shape[:-1], rhs.shape[1])


# The primitive ------------------------------------------------------------------------------------

product_p = Primitive("onekernel_product")


def by_xla(lhs, rhs, *, layout: str):
    return jax.lax.dot_general(lhs, rhs, (LAYOUTS[layout], ((), ())))


@functools.cache
def jitted(layout: str):
    return jax.jit(functools.partial(product_p.bind, layout=layout))


@product_p.def_impl
def run(lhs, rhs, *, layout: str):
    by_primitives = functools.partial(by_xla, lhs, rhs, layout=layout)
    return run_one(jitted(layout), (lhs, rhs), by_primitives, "onekernel.dot_general")


@product_p.def_abstract_eval
def abstract_product(lhs, rhs, *, layout: str):
    return result_type(product_shape(lhs, rhs, layout), "float32", (lhs, rhs))


def product_shape(lhs, rhs, layout: str) -> tuple[int, int]:
    rows = lhs.shape[1] if layout == "left transposed" else lhs.shape[0]
    columns = rhs.shape[0] if layout == "right transposed" else rhs.shape[1]
    return rows, columns


def gradient_of_left(cotangent, lhs, rhs, *, layout: str):
    if layout == "left transposed":
        return product_p.bind(rhs, cotangent, layout="right transposed")
    transposed = "right transposed" if layout == "plain" else "plain"
    return product_p.bind(cotangent, rhs, layout=transposed)


def gradient_of_right(cotangent, lhs, rhs, *, layout: str):
    if layout == "right transposed":
        return product_p.bind(cotangent, lhs, layout="left transposed")
    transposed = "left transposed" if layout == "plain" else "plain"
    return product_p.bind(lhs, cotangent, layout=transposed)


ad.defbilinear(product_p, gradient_of_left, gradient_of_right)


def batch(operands, axes, *, layout: str):
    """jax.vmap: more rows of a plain product are one with more rows; the rest is XLA's."""
    lhs, rhs = operands
    left, right = axes
    if layout == "plain" and right is None:
        lhs = jnp.moveaxis(lhs, left, 0)
        rows = product_p.bind(lhs.reshape(-1, lhs.shape[-1]), rhs, layout=layout)
        return rows.reshape(*lhs.shape[:2], rhs.shape[1]), 0
    return jax.vmap(functools.partial(by_xla, layout=layout), in_axes=axes)(lhs, rhs), 0


batching.primitive_batchers[product_p] = batch


def lower(lhs, rhs, *, layout: str):
    """On a CPU."""
    if cpu.unavailable():
        return by_xla(lhs, rhs, layout=layout)
    scratch = rhs.size if layout == "right transposed" else 1
    types = [
        jax.ShapeDtypeStruct(product_shape(lhs, rhs, layout), np.float32),
        jax.ShapeDtypeStruct((scratch,), np.float32),
    ]
    return jax.ffi.ffi_call(target(layout), types)(lhs, rhs)[0]


mlir.register_lowering(product_p, mlir.lower_fun(by_xla, multiple_results=False))
mlir.register_lowering(product_p, mlir.lower_fun(lower, multiple_results=False), platform="cpu")


@rule("onekernel_product")
def inline(builder, equation, lhs, rhs):
    """A product within a compiled function: a part of its kernel."""
    return primitives.traced(builder, functools.partial(by_xla, **equation.params), lhs, rhs)


# Machine code -------------------------------------------------------------------------------------


@functools.cache
def target(layout: str) -> str:
    """The name by which XLA knows the products of a layout; compiled, or from the cache."""
    text = module_ir(layout)
    digest = hashlib.sha256("\n".join((text, cpu.identity(), versions())).encode())
    name = f"onekernel_product_{digest.hexdigest()[:32]}"
    code = cache.load(f"kernel {name}")
    if code is None:
        code = cpu.compile_ir(text)
        cache.store(f"kernel {name}", code)
    cpu.loader.register(name, code)
    return name


def module_ir(layout: str, lanes: int | None = None) -> str:
    """The module with the handler for a layout, for vectors of so many lanes."""
    lanes = lanes or cpu.vector_width()
    registers = 16 if lanes == 8 else 32  # AVX2's; AVX-512's and NEON's
    most = 2 if registers == 16 else 4  # vectors of a tile
    lines = [declarations(lanes)]
    for vectors in range(1, most + 1):
        lines += panel_ir(vectors, lanes, registers)
    lines += product_ir(most, lanes)
    if layout == "right transposed":
        lines += transposition_ir(lanes)
    return "\n".join([*lines, *handler_ir(layout)])


def declarations(lanes: int) -> str:
    vector = f"<{lanes} x float>"
    mask = f"<{lanes} x i1>"
    return (
        f"declare {vector} @llvm.fma.v{lanes}f32({vector}, {vector}, {vector})\n"
        f"declare {vector} @llvm.masked.load.v{lanes}f32.p0(ptr, i32, {mask}, {vector})\n"
        f"declare void @llvm.masked.store.v{lanes}f32.p0({vector}, ptr, i32, {mask})\n"
        f"declare i64 @llvm.smin.i64(i64, i64)"
    )


def panel_ir(vectors: int, lanes: int, registers: int) -> list[str]:
    """@panel.V: all rows of some columns of the result, V vectors, the last one under a mask.

    to, left, right: the arrays, the latter two's first column; rows, columns, summed: of the whole
    product; row, step: from a number of `left` to the one of the next row, and of the next turn.
    """
    height = min(8, (registers - 1 - vectors) // vectors)
    return [
        f"define internal void @panel.{vectors}(ptr %to, ptr %left, ptr %right, i64 %rows, "
        f"i64 %columns, i64 %summed, i64 %row, i64 %step, <{lanes} x i1> %mask) "
        f"noinline nounwind {SUBNORMALS} {{",
        "entry:",
        f"%last.tile = sub i64 %rows, {height}",
        "%last.one = sub i64 %rows, 1",
        f"%many = icmp sge i64 %rows, {height}",
        "br i1 %many, label %tile, label %one",
        # The last tile may begin among the rows of the one before, and computes them once more.
        *tile_ir("tile", height, vectors, lanes),
        *tile_ir("one", 1, vectors, lanes),
        "end:",
        "ret void",
        "}",
    ]


def name_in(label: str, what: str, *numbers: int) -> str:
    """The name of a value in the loop of this label."""
    return ".".join((f"%{label}", what, *map(str, numbers)))


def tile_ir(label: str, height: int, vectors: int, lanes: int) -> list[str]:
    """The loop over tiles of so many rows, from %LABEL to %end."""
    vector = f"<{lanes} x float>"
    masked = f"<{lanes} x i1> %mask"
    tiles = [(i, j) for i in range(height) for j in range(vectors)]
    name = functools.partial(name_in, label)
    first = name("first")
    lines = [
        f"{label}:",
        f"{name('wanted')} = phi i64 [0, %entry], [{name('next')}, %{label}.store]",
        f"{first} = call i64 @llvm.smin.i64(i64 {name('wanted')}, i64 %last.{label})",
    ]
    for i in range(height):
        lines += [
            f"{name('number', i)} = add i64 {first}, {i}",
            f"{name('offset', i)} = mul i64 {name('number', i)}, %row",
            f"{name('left', i)} = getelementptr float, ptr %left, i64 {name('offset', i)}",
        ]
    lines += [
        f"br label %{label}.sum",
        f"{label}.sum:",
        f"{name('k')} = phi i64 [0, %{label}], [{name('k.next')}, %{label}.sum]",
        f"{name('at')} = phi i64 [0, %{label}], [{name('at.next')}, %{label}.sum]",
        f"{name('from')} = phi ptr [%right, %{label}], [{name('from.next')}, %{label}.sum]",
    ]
    for i, j in tiles:
        old, new = name("old", i, j), name("new", i, j)
        lines.append(f"{old} = phi {vector} [zeroinitializer, %{label}], [{new}, %{label}.sum]")
    for j in range(vectors):
        place = f"{name('place', j)}"
        lines.append(f"{place} = getelementptr float, ptr {name('from')}, i64 {lanes * j}")
        if j < vectors - 1:
            lines.append(f"{name('b', j)} = load {vector}, ptr {place}, align 4")
        else:
            lines.append(
                f"{name('b', j)} = call {vector} @llvm.masked.load.v{lanes}f32.p0(ptr {place}, "
                f"i32 4, {masked}, {vector} zeroinitializer)"
            )
    for i in range(height):
        lines += [
            f"{name('a.place', i)} = getelementptr float, ptr {name('left', i)}, i64 {name('at')}",
            f"{name('a', i)} = load float, ptr {name('a.place', i)}, align 4",
            f"{name('a.one', i)} = insertelement {vector} poison, float {name('a', i)}, i32 0",
            f"{name('a.all', i)} = shufflevector {vector} {name('a.one', i)}, {vector} poison, "
            f"<{lanes} x i32> zeroinitializer",
        ]
        for j in range(vectors):
            lines.append(
                f"{name('new', i, j)} = call {vector} @llvm.fma.v{lanes}f32({vector} "
                f"{name('a.all', i)}, {vector} {name('b', j)}, {vector} {name('old', i, j)})"
            )
    lines += [
        f"{name('k.next')} = add i64 {name('k')}, 1",
        f"{name('at.next')} = add i64 {name('at')}, %step",
        f"{name('from.next')} = getelementptr float, ptr {name('from')}, i64 %columns",
        f"{name('more')} = icmp slt i64 {name('k.next')}, %summed",
        f"br i1 {name('more')}, label %{label}.sum, label %{label}.store",
        f"{label}.store:",
    ]
    lines += store_ir(label, height, vectors, lanes)
    return [
        *lines,
        f"{name('next')} = add i64 {name('wanted')}, {height}",
        f"{name('again')} = icmp slt i64 {name('next')}, %rows",
        f"br i1 {name('again')}, label %{label}, label %end",
    ]


def store_ir(label: str, height: int, vectors: int, lanes: int) -> list[str]:
    """A tile's way from its registers into the result."""
    vector = f"<{lanes} x float>"
    masked = f"<{lanes} x i1> %mask"
    tiles = [(i, j) for i in range(height) for j in range(vectors)]
    name = functools.partial(name_in, label)
    lines = []
    for i in range(height):
        lines += [
            f"{name('to.offset', i)} = mul i64 {name('number', i)}, %columns",
            f"{name('to', i)} = getelementptr float, ptr %to, i64 {name('to.offset', i)}",
        ]
    for i, j in tiles:
        place, value = name("to", i, j), f"{vector} {name('new', i, j)}"
        lines.append(f"{place} = getelementptr float, ptr {name('to', i)}, i64 {lanes * j}")
        if j < vectors - 1:
            lines.append(f"store {value}, ptr {place}, align 4")
        else:
            lines.append(
                f"call void @llvm.masked.store.v{lanes}f32.p0({value}, ptr {place}, i32 4, {masked})"
            )
    return lines


def mask_ir(name: str, count: str, lanes: int) -> list[str]:
    """%NAME: the first `count` lanes (i64)."""
    numbers = ", ".join(f"i64 {lane}" for lane in range(lanes))
    vector = f"<{lanes} x i64>"
    return [
        f"%{name}.one = insertelement {vector} poison, i64 {count}, i32 0",
        f"%{name}.all = shufflevector {vector} %{name}.one, {vector} poison, "
        f"<{lanes} x i32> zeroinitializer",
        f"%{name} = icmp slt {vector} <{numbers}>, %{name}.all",
    ]


def product_ir(most: int, lanes: int) -> list[str]:
    """@product: the whole result, panel by panel of at most `most` vectors."""
    arguments = "i64 %rows, i64 %columns, i64 %summed, i64 %row, i64 %step"
    lines = [
        f"define internal void @product(ptr %to, ptr %left, ptr %right, {arguments}) "
        f"noinline nounwind {SUBNORMALS} {{",
        "entry:",
        "br label %columns.loop",
        "columns.loop:",
        "%column = phi i64 [0, %entry], [%column.next, %columns.next]",
        "%rest = sub i64 %columns, %column",
        f"%count = call i64 @llvm.smin.i64(i64 %rest, i64 {most * lanes})",
        f"%rounded = add i64 %count, {lanes - 1}",
        f"%vectors = udiv i64 %rounded, {lanes}",
        "%before = sub i64 %vectors, 1",
        f"%full = mul i64 %before, {lanes}",
        "%in.last = sub i64 %count, %full",
        *mask_ir("mask", "%in.last", lanes),
        "%panel.to = getelementptr float, ptr %to, i64 %column",
        "%panel.right = getelementptr float, ptr %right, i64 %column",
        "switch i64 %vectors, label %columns.next ["
        + " ".join(f"i64 {v}, label %panel.{v}" for v in range(1, most + 1))
        + "]",
    ]
    for vectors in range(1, most + 1):
        lines += [
            f"panel.{vectors}:",
            f"call void @panel.{vectors}(ptr %panel.to, ptr %left, ptr %panel.right, {arguments}, "
            f"<{lanes} x i1> %mask)",
            "br label %columns.next",
        ]
    return [
        *lines,
        "columns.next:",
        f"%column.next = add i64 %column, {most * lanes}",
        "%more = icmp slt i64 %column.next, %columns",
        "br i1 %more, label %columns.loop, label %end",
        "end:",
        "ret void",
        "}",
    ]


def transposition_ir(lanes: int) -> list[str]:
    """@transpose: [rows, columns] -> [columns, rows], in square blocks."""
    vector = f"<{lanes} x float>"
    lines = [
        "define internal void @transpose(ptr %to, ptr %of, i64 %rows, i64 %columns) "
        "noinline nounwind {",
        "entry:",
        "%last.row = sub i64 %rows, 1",
        "%last.column = sub i64 %columns, 1",
        "br label %down",
        "down:",
        "%row = phi i64 [0, %entry], [%row.next, %down.next]",
        "%rows.left = sub i64 %rows, %row",
        *mask_ir("row.mask", "%rows.left", lanes),
        "br label %across",
        "across:",
        "%column = phi i64 [0, %down], [%column.next, %across]",
        "%columns.left = sub i64 %columns, %column",
        *mask_ir("column.mask", "%columns.left", lanes),
    ]
    for i in range(lanes):  # past the end, the last row once more
        lines += [
            f"%wanted{i} = add i64 %row, {i}",
            f"%row{i} = call i64 @llvm.smin.i64(i64 %wanted{i}, i64 %last.row)",
            f"%start{i} = mul i64 %row{i}, %columns",
            f"%offset{i} = add i64 %start{i}, %column",
            f"%place{i} = getelementptr float, ptr %of, i64 %offset{i}",
            f"%v{i}.0 = call {vector} @llvm.masked.load.v{lanes}f32.p0(ptr %place{i}, i32 4, "
            f"<{lanes} x i1> %column.mask, {vector} zeroinitializer)",
        ]
    stages = int(math.log2(lanes))
    for stage in range(stages):  # each exchanges a bit of the row's number with one of the lane's
        bit = 1 << stage
        for i in range(lanes):
            low, high = i & ~bit, i | bit
            if i == low:
                picks = [lane if not lane & bit else lanes + lane - bit for lane in range(lanes)]
            else:
                picks = [lane + bit if not lane & bit else lanes + lane for lane in range(lanes)]
            order = ", ".join(f"i32 {pick}" for pick in picks)
            lines.append(
                f"%v{i}.{stage + 1} = shufflevector {vector} %v{low}.{stage}, {vector} "
                f"%v{high}.{stage}, <{lanes} x i32> <{order}>"
            )
    for i in range(lanes):  # the last columns first: what is past the end is overwritten
        k = lanes - 1 - i
        lines += [
            f"%to.wanted{k} = add i64 %column, {k}",
            f"%to.column{k} = call i64 @llvm.smin.i64(i64 %to.wanted{k}, i64 %last.column)",
            f"%to.start{k} = mul i64 %to.column{k}, %rows",
            f"%to.offset{k} = add i64 %to.start{k}, %row",
            f"%to.place{k} = getelementptr float, ptr %to, i64 %to.offset{k}",
            f"call void @llvm.masked.store.v{lanes}f32.p0({vector} %v{k}.{stages}, "
            f"ptr %to.place{k}, i32 4, <{lanes} x i1> %row.mask)",
        ]
    return [
        *lines,
        f"%column.next = add i64 %column, {lanes}",
        "%more.columns = icmp slt i64 %column.next, %columns",
        "br i1 %more.columns, label %across, label %down.next",
        "down.next:",
        f"%row.next = add i64 %row, {lanes}",
        "%more.rows = icmp slt i64 %row.next, %rows",
        "br i1 %more.rows, label %down, label %end",
        "end:",
        "ret void",
        "}",
    ]


def handler_ir(layout: str) -> list[str]:
    """The function that XLA calls. It reads all sizes from the operands, and so serves any."""
    work = []
    for operand in (0, 1):
        work += ffi.load(f"sizes{operand}", f"%operand{operand}.buffer", ffi.BUFFER_DIMENSIONS)
        for axis in (0, 1):
            work += ffi.load(f"size{operand}.{axis}", f"%sizes{operand}", 8 * axis, "i64")
    rows = "%size0.0"
    summed = "%size0.1"
    columns = "%size1.1"
    right = "%operand1"
    row = summed  # numbers from one of the left matrix to the next row's
    step = "1"  # and to the next one of its row
    if layout == "left transposed":
        rows = "%size0.1"
        summed = "%size0.0"
        row = "1"
        step = rows
    if layout == "right transposed":
        columns = "%size1.0"
        right = "%scratch"
        work.append("call void @transpose(ptr %scratch, ptr %operand1, i64 %size1.0, i64 %size1.1)")
    work += [
        f"call void @product(ptr %result0, ptr %operand0, ptr {right}, i64 {rows}, "
        f"i64 {columns}, i64 {summed}, i64 {row}, i64 {step})",
        "br label %done",
    ]
    return ffi.handler_ir(2, 1, False, work)
