"""A kernel for the CPU: the function over all worlds, and machine code by LLVM.

The handler that XLA calls (see ffi.py) is in the same module as the kernel and calls it.
"""

import functools
from collections.abc import Callable

import llvmlite.binding as llvm

from onekernel import cache, ffi, machine_code, parts, slots, vector_math
from onekernel.codegen import Emitter
from onekernel.graph import Graph
from onekernel.machine_code import host

SOURCES = (__file__, machine_code.__file__)  # of how text is compiled


@functools.cache
def vector_width() -> int:
    """Worlds that fill a vector register of float32."""
    features = host()[1].split(",")
    if "+avx512f" in features:
        return 16
    if "+avx" in features:
        return 8
    return 4


def identity() -> str:
    """What of this machine decides the code."""
    return " ".join(("cpu", str(vector_width()), *host()))


def unavailable() -> str:
    """Why this machine cannot run kernels; empty if it can."""
    name, features = host()
    if llvm.get_default_triple().startswith("x86_64") and "+fma" not in features.split(","):
        return f"the processor ({name}) has no fused multiply-add"
    return ""


def scratch_size(scratch: int, worlds: int) -> int:
    """Bytes of scratch memory for a call: one vector of worlds uses them after the other."""
    return scratch


def kernel_ir(
    graph: Graph,
    mapped: list[bool],
    sizes: list[int],
    results: int,
    batched: bool,
    width: int | None = None,
):
    """The module's text, and the size of the scratch memory in bytes.

    mapped: of each operand, whether each world has its own; sizes: elements of one world's;
    results: their number, without the scratch memory, which is one more; batched: whether the
    results have an axis of worlds."""
    width = width or vector_width()
    emitter = Emitter(graph, width, mapped, sizes)
    emitter.emit()
    memory, places, lines = slots.in_memory(emitter.lines, "body", width, emitter.parts)
    arguments = {f"%{name}": "ptr noalias" for name in array_names(len(sizes), results)}
    own = arguments | {line.split()[0]: "ptr noalias" for line in memory}
    own["%lanes"] = f"<{width} x i64>"
    lines, functions = parts.divide(lines, emitter.parts, places, own, vector_math.SUBNORMALS)
    parameters = ", ".join(f"{kind} {name}" for name, kind in arguments.items())
    lanes = ", ".join(f"i64 {lane}" for lane in range(width))
    vector = f"<{width} x i64>"
    spread = (
        f"shufflevector {vector} {{}}, {vector} zeroinitializer, <{width} x i32> zeroinitializer"
    )
    minimum = f"llvm.smin.v{width}i64"
    emitter.declarations.add(f"declare {vector} @{minimum}({vector}, {vector})")
    # Worlds that do not fill a vector: the lanes left over compute the last world once more.
    kernel = [
        f"define internal void @kernel({parameters}, i64 %worlds) {vector_math.SUBNORMALS} {{",
        "entry:",
        *memory,
        *places.values(),
        "%last = sub i64 %worlds, 1",
        f"%last.one = insertelement {vector} zeroinitializer, i64 %last, i32 0",
        f"%last.all = {spread.format('%last.one')}",
        "%some = icmp sgt i64 %worlds, 0",
        "br i1 %some, label %body, label %end",
        "body:",
        "%world = phi i64 [0, %entry], [%world.next, %next]",
        f"%world.one = insertelement {vector} zeroinitializer, i64 %world, i32 0",
        f"%world.all = {spread.format('%world.one')}",
        f"%lanes.all = add {vector} %world.all, <{lanes}>",
        f"%lanes = call {vector} @{minimum}({vector} %lanes.all, {vector} %last.all)",
        *lines,
        "br label %next",
        "next:",
        f"%world.next = add i64 %world, {width}",
        "%more = icmp slt i64 %world.next, %worlds",
        "br i1 %more, label %body, label %end",
        "end:",
        "ret void",
        "}",
    ]
    handler = handler_ir(len(sizes), results, batched)
    text = parts.modules([*kernel, *handler], functions, emitter.definitions())
    return text, 4 * width * max(1, emitter.scratch_size)


def array_names(operands: int, results: int) -> list[str]:
    """The arguments of a kernel that are pointers."""
    return [
        *(f"operand{i}" for i in range(operands)),
        *(f"result{i}" for i in range(results)),
        "scratch",
    ]


def handler_ir(operands: int, results: int, batched: bool) -> list[str]:
    """The function that XLA calls, `@handler`; its argument is the call frame."""
    arguments = [f"ptr %{name}" for name in array_names(operands, results)]
    arguments.append("i64 %worlds")
    work = [f"call void @kernel({', '.join(arguments)})", "br label %done"]
    return ffi.handler_ir(operands, results, batched, work)


def compile_ir(text: str) -> bytes:
    """Machine code for this processor, as `ffi.Loader` takes it."""
    modules = text.split(parts.SEPARATOR)
    return cache.pack(parts.symbols(text), [machine_code.compile_module(one) for one in modules])


def start_compiling(text: str) -> bytes | Callable[[], bytes]:
    """What `compile_ir` gives, or, if that takes long, a function that waits for it while other
    processes compile."""
    if len(text) < machine_code.TEXT_OF_A_PROCESS:
        return compile_ir(text)
    finish = machine_code.start_modules(text.split(parts.SEPARATOR))
    return lambda: cache.pack(parts.symbols(text), finish())


loader = ffi.Loader("cpu")


def register(
    name: str, code: bytes | Callable[[], bytes], operands: int, results: int, batched: bool
) -> None:
    """Makes a kernel known to XLA under this name. code: see `start_compiling`."""
    if isinstance(code, bytes):
        loader.register(name, code)
    else:
        loader.register_early(name, code)
