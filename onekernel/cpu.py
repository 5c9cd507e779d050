"""A kernel for the CPU: the function over all worlds, the handler that XLA calls, and machine code by LLVM.

XLA calls foreign code through its FFI: it hands a function a pointer to a "call frame", a C struct with
the pointers to all operands and results (header: jax.ffi.include_dir(), xla/ffi/api/c_api.h). A handler
is usually written in C++; ours is a few lines of LLVM IR in the same module as the kernel, so that no
compiler is needed on the user's machine.
"""

import ctypes
import functools
import threading

import jax
import llvmlite.binding as llvm

from onekernel.codegen import Emitter
from onekernel.graph import Graph

# Where fields stand in XLA's structs, in bytes.
FRAME_EXTENSION = 8
FRAME_STAGE = 32
FRAME_ARGUMENTS = 72
FRAME_RESULTS = 112
EXTENSION_METADATA = 24
METADATA_VERSION = 24
BUFFER_DATA = 24
BUFFER_DIMENSIONS = 40
STAGE_EXECUTE = 3
API_MINOR_VERSION = 3


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
    return ""


def scratch_size(scratch: int, worlds: int) -> int:
    """Bytes of scratch memory for a call: one vector of worlds uses them after the other."""
    return scratch


def kernel_ir(graph: Graph, mapped: list[bool], sizes: list[int], results: int, batched: bool, width: int | None = None):
    """The module's text, and the size of the scratch memory in bytes.

    mapped: of each operand, whether each world has its own; sizes: elements of one world's; results: their number,
    without the scratch memory, which is one more; batched: whether the results have an axis of worlds."""
    width = width or vector_width()
    emitter = Emitter(graph, width, mapped, sizes)
    emitter.emit()
    arguments = [
        *(f"ptr noalias %operand{i}" for i in range(len(sizes))),
        *(f"ptr noalias %result{i}" for i in range(results)),
        "ptr noalias %scratch",
        "i64 %worlds",
    ]
    lanes = ", ".join(f"i64 {lane}" for lane in range(width))
    vector = f"<{width} x i64>"
    spread = f"shufflevector {vector} {{}}, {vector} zeroinitializer, <{width} x i32> zeroinitializer"
    minimum = f"llvm.smin.v{width}i64"
    emitter.declarations.add(f"declare {vector} @{minimum}({vector}, {vector})")
    # Worlds that do not fill a vector: the lanes left over compute the last world once more.
    kernel = [
        f"define internal void @kernel({', '.join(arguments)}) {{",
        "entry:",
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
        *emitter.lines,
        "br label %next",
        "next:",
        f"%world.next = add i64 %world, {width}",
        "%more = icmp slt i64 %world.next, %worlds",
        "br i1 %more, label %body, label %end",
        "end:",
        "ret void",
        "}",
    ]
    functions = emitter.math_functions()
    handler = handler_ir(len(sizes), results, batched)
    text = "\n".join(
        [*emitter.tables, *sorted(emitter.declarations), *functions, *kernel, *handler]
    )
    return text, 4 * width * max(1, emitter.scratch_size)


def handler_ir(operands: int, results: int, batched: bool) -> list[str]:
    """The function that XLA calls, `@handler`; its argument is the call frame."""

    def field(name: str, base: str, offset: int, kind: str = "ptr") -> list[str]:
        return [
            f"%{name}.place = getelementptr i8, ptr {base}, i64 {offset}",
            f"%{name} = load {kind}, ptr %{name}.place",
        ]

    def data(name: str, table: str, index: int) -> list[str]:
        return [
            *field(f"{name}.buffer", table, 8 * index),
            *field(name, f"%{name}.buffer", BUFFER_DATA),
        ]

    lines = [
        "define ptr @handler(ptr %frame) {",
        *field("extension", "%frame", FRAME_EXTENSION),
        "%asked = icmp ne ptr %extension, null",
        "br i1 %asked, label %describe, label %stages",
        "describe:",  # XLA asks for the version of its interface that the handler was written for
        *field("metadata", "%extension", EXTENSION_METADATA),
        f"%major = getelementptr i8, ptr %metadata, i64 {METADATA_VERSION}",
        "store i32 0, ptr %major",
        f"%minor = getelementptr i8, ptr %metadata, i64 {METADATA_VERSION + 4}",
        f"store i32 {API_MINOR_VERSION}, ptr %minor",
        "ret ptr null",
        "stages:",
        *field("stage", "%frame", FRAME_STAGE, "i32"),
        f"%execute = icmp eq i32 %stage, {STAGE_EXECUTE}",
        "br i1 %execute, label %run, label %done",
        "run:",
        *field("arguments", "%frame", FRAME_ARGUMENTS),
        *field("results", "%frame", FRAME_RESULTS),
    ]
    for i in range(operands):
        lines += data(f"operand{i}", "%arguments", i)
    for i in range(results):
        lines += data(f"result{i}", "%results", i)
    lines += data("scratch", "%results", results)
    if batched:
        lines += field("dimensions", "%result0.buffer", BUFFER_DIMENSIONS)
        lines += field("worlds", "%dimensions", 0, "i64")
    else:
        lines.append("%worlds = add i64 0, 1")
    arguments = [
        *(f"ptr %operand{i}" for i in range(operands)),
        *(f"ptr %result{i}" for i in range(results)),
        "ptr %scratch",
        "i64 %worlds",
    ]
    lines += [
        f"call void @kernel({', '.join(arguments)})",
        "br label %done",
        "done:",
        "ret ptr null",
        "}",
    ]
    return lines


def compile_ir(text: str, level: int = 2) -> bytes:
    """Machine code for this processor, as an object file."""
    cpu, features = host()
    module = llvm.parse_assembly(text)
    module.verify()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=cpu, features=features, opt=level, reloc="pic", codemodel="jitdefault")
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=level)
    options.slp_vectorization = False
    options.loop_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return machine.emit_object(module)


class Loader:
    """Puts object code into memory and tells XLA of its handler. All that is loaded stays until the process ends, since
    XLA may call it for as long."""

    def __init__(self):
        self.lock = threading.Lock()
        self.loaded: dict[str, tuple] = {}

    def register(self, name: str, object_code: bytes) -> None:
        """Makes the handler in object_code the FFI target `name`."""
        with self.lock:
            if name in self.loaded:
                return
            host()
            machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
            empty = llvm.parse_assembly("")
            engine = llvm.create_mcjit_compiler(empty, machine)
            engine.add_object_file(llvm.ObjectFileRef.from_data(object_code))
            engine.finalize_object()
            address = engine.get_function_address("handler")
            function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
            self.loaded[name] = (engine, function)


loader = Loader()


def register(name: str, code: bytes, operands: int, results: int, batched: bool) -> None:
    """Makes a kernel known to XLA under this name."""
    loader.register(name, code)
