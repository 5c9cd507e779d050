"""A kernel for the CPU: the function over all worlds, and machine code by LLVM.

The handler that XLA calls (see ffi.py) is in the same module as the kernel and calls it.
"""

import functools

import llvmlite.binding as llvm

from onekernel import ffi, slots, vector_math
from onekernel.codegen import Emitter
from onekernel.graph import Graph


@functools.cache
def host() -> tuple[str, str]:
    """The name of this machine's processor, as LLVM has it, and its features."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


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
    memory, lines = slots.in_memory(emitter.lines, "body", width)
    arguments = [
        *(f"ptr noalias %operand{i}" for i in range(len(sizes))),
        *(f"ptr noalias %result{i}" for i in range(results)),
        "ptr noalias %scratch",
        "i64 %worlds",
    ]
    lanes = ", ".join(f"i64 {lane}" for lane in range(width))
    vector = f"<{width} x i64>"
    spread = (
        f"shufflevector {vector} {{}}, {vector} zeroinitializer, <{width} x i32> zeroinitializer"
    )
    minimum = f"llvm.smin.v{width}i64"
    emitter.declarations.add(f"declare {vector} @{minimum}({vector}, {vector})")
    # Worlds that do not fill a vector: the lanes left over compute the last world once more.
    kernel = [
        f"define internal void @kernel({', '.join(arguments)}) {vector_math.SUBNORMALS} {{",
        "entry:",
        *memory,
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
    functions = emitter.called_functions()
    handler = handler_ir(len(sizes), results, batched)
    text = "\n".join(
        [*emitter.tables, *sorted(emitter.declarations), *functions, *kernel, *handler]
    )
    return text, 4 * width * max(1, emitter.scratch_size)


def handler_ir(operands: int, results: int, batched: bool) -> list[str]:
    """The function that XLA calls, `@handler`; its argument is the call frame."""
    arguments = [
        *(f"ptr %operand{i}" for i in range(operands)),
        *(f"ptr %result{i}" for i in range(results)),
        "ptr %scratch",
        "i64 %worlds",
    ]
    work = [f"call void @kernel({', '.join(arguments)})", "br label %done"]
    return ffi.handler_ir(operands, results, batched, work)


def compile_ir(text: str) -> bytes:
    """Machine code for this processor, as an object file.

    LLVM's optimiser is left out: what it would find, the graph has found already, and it takes
    longer than the code generator. With the small code model a constant is read by one
    instruction, relative to the code's own place."""
    cpu, features = host()
    module = llvm.parse_assembly(text)
    module.verify()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(
        cpu=cpu, features=features, opt=2, reloc="pic", codemodel="small"
    )
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    return machine.emit_object(module)


loader = ffi.Loader("cpu")


def register(name: str, code: bytes, operands: int, results: int, batched: bool) -> None:
    """Makes a kernel known to XLA under this name."""
    loader.register(name, code)
