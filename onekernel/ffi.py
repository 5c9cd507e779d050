"""How XLA calls foreign code, and handlers that it can call, in LLVM IR.

XLA's FFI hands a function, the handler, a pointer to a "call frame", a C struct with the pointers
to all operands and results. A handler is usually written in C++ against XLA's header; ours is a few
lines of LLVM IR, so no compiler is needed on the user's machine. `handler_ir` writes what every
handler does, and is given what a CPU's and a GPU's do differently; `Loader` puts the machine code
into memory and tells XLA of it; a `Gate` stands for code that is still being compiled.

The header: jax.ffi.include_dir(), xla/ffi/api/c_api.h. Its structs only grow at their ends within a
version, so offsets stay; tests/test_onekernel_cuda.py compares all of them with the header.
"""

import ctypes
import threading
from collections.abc import Callable

import jax
import llvmlite.binding as llvm

from onekernel import cache, machine_code

HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)  # of the call frame; null, or an error

# Where fields stand in XLA's structs, in bytes.
FRAME_EXTENSION = 8
FRAME_API = 16
FRAME_CONTEXT = 24
FRAME_STAGE = 32
FRAME_ARGUMENTS = 72
FRAME_RESULTS = 112
EXTENSION_METADATA = 24
METADATA_MAJOR_VERSION = 24
METADATA_MINOR_VERSION = 28
METADATA_TRAITS = 32
BUFFER_DATA = 24
BUFFER_DIMENSIONS = 40
API_ERROR_CREATE = 48
API_STREAM_GET = 80
ERROR_MESSAGE = 16
ERROR_CODE = 24
ERROR_SIZE = 28
STREAM_CONTEXT = 16
STREAM_STREAM = 24
STREAM_SIZE = 32

# Values of XLA's constants.
STAGE_EXECUTE = 3
API_MAJOR_VERSION = 0
API_MINOR_VERSION = 3
CODE_INTERNAL = 13
MAY_BE_RECORDED = 1  # trait: each call launches the same work, so a CUDA graph may hold it


def load(name: str, base: str, offset: int, kind: str = "ptr") -> list[str]:
    """Reads the field at an offset from base: %name, and its address %name.place."""
    return [
        f"%{name}.place = getelementptr i8, ptr {base}, i64 {offset}",
        f"%{name} = load {kind}, ptr %{name}.place",
    ]


def store(name: str, base: str, offset: int, value: str) -> list[str]:
    """Writes the field at an offset from base; value: with its type. %name.place is its address."""
    return [
        f"%{name}.place = getelementptr i8, ptr {base}, i64 {offset}",
        f"store {value}, ptr %{name}.place",
    ]


def entry_ir(traits: int = 0) -> list[str]:
    """The begin of a handler, up to where it is to do its work; it may jump to the label `done`,
    which has to follow."""
    return [
        "define ptr @handler(ptr %frame) {",
        *load("extension", "%frame", FRAME_EXTENSION),
        "%asked = icmp ne ptr %extension, null",
        "br i1 %asked, label %describe, label %stages",
        "describe:",  # XLA asks for the version of its interface that the handler was written for
        *load("metadata", "%extension", EXTENSION_METADATA),
        *store("major", "%metadata", METADATA_MAJOR_VERSION, f"i32 {API_MAJOR_VERSION}"),
        *store("minor", "%metadata", METADATA_MINOR_VERSION, f"i32 {API_MINOR_VERSION}"),
        *store("traits", "%metadata", METADATA_TRAITS, f"i32 {traits}"),
        "ret ptr null",
        "stages:",
        *load("stage", "%frame", FRAME_STAGE, "i32"),
        f"%execute = icmp eq i32 %stage, {STAGE_EXECUTE}",
        "br i1 %execute, label %run, label %done",
        "run:",
    ]


def handler_ir(
    operands: int, results: int, batched: bool, work: list[str], traits: int = 0
) -> list[str]:
    """The function that XLA calls, `@handler`; its argument is the call frame, %frame.

    operands, results: their numbers, without the scratch memory, which is one result more; batched:
    whether the results have an axis of worlds, their first; work: the instructions that do the
    handler's work; traits: bits that tell XLA what the handler may be used for.

    `work` may use %operandI, %resultI and %scratch, pointers to the arrays, %operandI.place and so
    on, the addresses of these pointers in XLA's own structs, and %worlds, the number of worlds
    (i64). It ends with a jump to the label `done`, or returns an error.
    """

    def data(name: str, table: str, index: int) -> list[str]:
        return [
            *load(f"{name}.buffer", table, 8 * index),
            *load(name, f"%{name}.buffer", BUFFER_DATA),
        ]

    lines = [
        *entry_ir(traits),
        *load("arguments", "%frame", FRAME_ARGUMENTS),
        *load("results", "%frame", FRAME_RESULTS),
    ]
    for i in range(operands):
        lines += data(f"operand{i}", "%arguments", i)
    for i in range(results):
        lines += data(f"result{i}", "%results", i)
    lines += data("scratch", "%results", results)
    if batched:
        lines += load("dimensions", "%result0.buffer", BUFFER_DIMENSIONS)
        lines += load("worlds", "%dimensions", 0, "i64")
    else:
        lines.append("%worlds = add i64 0, 1")
    return [*lines, *work, "done:", "ret ptr null", "}"]


def gate_ir() -> str:
    """The module of a handler that calls the function at the address in @target, which may change
    from one call to the next."""
    return "\n".join(
        [
            "@target = dso_local global ptr null",
            *entry_ir(),
            "%target.now = load atomic ptr, ptr @target acquire, align 8",
            "%error = call ptr %target.now(ptr %frame)",
            "ret ptr %error",
            "done:",
            "ret ptr null",
            "}",
        ]
    )


def report(frame: int, message: str) -> int | None:
    """An error that a handler may return, so that XLA raises it. frame: the call frame's address."""
    api = ctypes.c_void_p.from_address(frame + FRAME_API).value
    create = HANDLER(ctypes.c_void_p.from_address(api + API_ERROR_CREATE).value)
    text = ctypes.create_string_buffer(message.encode())
    arguments = ctypes.create_string_buffer(ERROR_SIZE)
    ctypes.c_size_t.from_buffer(arguments).value = ERROR_SIZE
    ctypes.c_void_p.from_buffer(arguments, ERROR_MESSAGE).value = ctypes.addressof(text)
    ctypes.c_int.from_buffer(arguments, ERROR_CODE).value = CODE_INTERNAL
    return create(ctypes.addressof(arguments))


def load_object(code: bytes) -> llvm.ExecutionEngine:
    """Puts an object file's code and data into memory.

    With llvmlite's own memory manager they lie close together. The small code model of
    machine_code.py relies on it: without it LLVM ends the process when they do not. It has no
    memory for calls of functions in other object files.
    """
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine, use_lmm=True)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def load_handler(code: bytes) -> tuple[list[llvm.ExecutionEngine], int]:
    """Puts all modules of a handler (see cpu.compile_ir) into memory. Returns their owners, and the
    handler's address."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    header, modules = cache.unpack(code)
    engines = [load_object(module) for module in modules]
    addresses = {}
    for engine, functions in zip(engines, header["functions"], strict=True):
        for symbol in functions:
            addresses[symbol] = engine.get_function_address(symbol)
    for engine, calls in zip(engines, header["calls"], strict=True):
        for symbol in calls:
            variable = engine.get_global_value_address(f"{symbol}_address")
            ctypes.c_void_p.from_address(variable).value = addresses[symbol]
    return engines, addresses["handler"]


class Gate:
    """A handler that XLA may know before its code is compiled, and compile programs around. Its
    first call waits for the code, and raises what comes of it.

    address: of the handler. It calls `first_call` until there is code, and then that."""

    def __init__(self, finish: Callable[[], bytes]):
        """finish: waits for the code, which is as `load_handler` takes it."""
        self.finish = finish
        self.lock = threading.Lock()  # several devices may call at once
        self.handler = None
        self.callback = HANDLER(self.first_call)
        self.engine = load_object(machine_code.compile_module(gate_ir()))
        self.address = self.engine.get_function_address("handler")
        place = self.engine.get_global_value_address("target")
        self.target = ctypes.c_void_p.from_address(place)
        self.target.value = ctypes.cast(self.callback, ctypes.c_void_p).value

    def first_call(self, frame: int) -> int | None:
        try:
            with self.lock:
                if self.handler is None:
                    self.engines, address = load_handler(self.finish())
                    self.handler = HANDLER(address)
                    self.finish = None  # with all that was to be compiled
                    self.target.value = address
        except BaseException as error:  # noqa: BLE001, C cannot pass it on, not even Ctrl-C's
            return report(frame, f"onekernel: {type(error).__name__}: {error}")
        return self.handler(frame)


class Loader:
    """Puts handlers into memory and tells XLA of them, for one of its platforms ("cpu" or "CUDA").
    All that is loaded stays until the process ends, since XLA may call it for as long."""

    def __init__(self, platform: str):
        self.platform = platform
        self.lock = threading.Lock()
        self.loaded: dict[str, tuple] = {}

    def register(self, name: str, code: bytes) -> None:
        """Makes the handler in the code (see cpu.compile_ir) the FFI target `name`."""
        with self.lock:
            if name not in self.loaded:
                self.tell_xla(name, *load_handler(code))

    def register_early(self, name: str, finish: Callable[[], bytes]) -> None:
        """Makes `name` an FFI target while its code is still being compiled. finish: waits for the
        code, which is as `register` takes it."""
        with self.lock:
            if name not in self.loaded:
                gate = Gate(finish)
                self.tell_xla(name, gate, gate.address)

    def tell_xla(self, name: str, owners, address: int) -> None:
        """Makes the function at this address an FFI target. owners: of what it needs."""
        function = HANDLER(address)
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform=self.platform)
        self.loaded[name] = (owners, function)
