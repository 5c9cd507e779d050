"""A kernel for NVIDIA GPUs: PTX by LLVM, one thread a world, launched by a handler that XLA calls.

PTX is NVIDIA's assembly language for GPUs of any generation. LLVM makes it on any machine, and the
driver's library (libcuda, called through ctypes) compiles it for the GPU that is there, so no CUDA
toolkit is needed. The handler runs on the host whenever XLA gets to the operation: it asks XLA for
the stream, the queue of the GPU's work, and puts the kernel's launch there.

Division and square root are exact, subnormal numbers are kept, and a product and a sum become one
fused operation where the graph allows it (`contract`), as on a CPU.
"""

import ctypes
import functools
import re
import threading

import llvmlite.binding as llvm

from onekernel import cpu, ffi
from onekernel.codegen import MEMORY_TYPES, WARP, Emitter
from onekernel.graph import Graph

# Threads of a block, which runs on one multiprocessor (SM) of the GPU.
#
# An SM holds at most 32 blocks and 2048 threads, so 64 is the smallest block with which a small
# kernel can fill it. A kernel as large as a robot's step takes all of the 255 registers that a
# thread may have, so an SM's 65,536 hold 8 warps (groups of 32 threads), whatever the blocks. What
# does not fit into registers lies in the SM's cache. The more of it, the more it pays to have the
# warps on as many SMs as possible, one a block.
SOURCES = (__file__,)  # of how text is compiled
THREADS = 64
THREADS_OF_LARGE_KERNELS = WARP
LARGE_KERNEL = 16_000  # instructions
LARGE_SCRATCH = 4096  # bytes of a world

# The generations (compute capabilities) to make code for. A newer GPU runs code for an older one.
ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
# With PTX 8.1 a kernel may have 4095 parameters, 512 before. Some generations need a newer PTX.
PTX_VERSION = 81
FIRST_WITH_NEWER_PTX = 100
OLDEST_DRIVER = 12_010  # CUDA 12.1, as cuDriverGetVersion has it: the first that reads PTX 8.1

# Values of CUDA's constants (cuda.h).
COMPUTE_CAPABILITY_MAJOR = 75
COMPUTE_CAPABILITY_MINOR = 76
JIT_ERROR_LOG_BUFFER = 5
JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 6
ERROR_LOG_SIZE = 8192

# The driver --------------------------------------------------------------------------------------

_int_out = ctypes.POINTER(ctypes.c_int)
_unsigned_out = ctypes.POINTER(ctypes.c_uint)
_handle = ctypes.c_void_p
_handle_out = ctypes.POINTER(ctypes.c_void_p)

# Argument types of the functions used; all return an error number. cuda.h gives some names in short
# that have a version in the library, _v2.
SIGNATURES = {
    "cuInit": [ctypes.c_uint],
    "cuDriverGetVersion": [_int_out],
    "cuGetErrorString": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    "cuDeviceGetCount": [_int_out],
    "cuDeviceGet": [_int_out, ctypes.c_int],
    "cuDeviceGetAttribute": [_int_out, ctypes.c_int, ctypes.c_int],
    "cuDevicePrimaryCtxGetState": [ctypes.c_int, _unsigned_out, _int_out],
    "cuDevicePrimaryCtxRetain": [_handle_out, ctypes.c_int],
    "cuDevicePrimaryCtxRelease_v2": [ctypes.c_int],
    "cuCtxPushCurrent_v2": [_handle],
    "cuCtxPopCurrent_v2": [_handle_out],
    "cuLibraryLoadData": [
        _handle_out,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_int),
        _handle_out,
        ctypes.c_uint,
        ctypes.POINTER(ctypes.c_int),
        _handle_out,
        ctypes.c_uint,
    ],
    "cuLibraryGetKernel": [_handle_out, _handle, ctypes.c_char_p],
    "cuKernelGetFunction": [_handle_out, _handle],
    "cuLaunchKernel": [_handle, *[ctypes.c_uint] * 7, _handle, _handle_out, _handle_out],
}


class Driver:
    """NVIDIA's driver, through its library, libcuda. RuntimeError, with the reason, if kernels
    cannot run with it, or if one of its functions fails.

    devices: the GPUs' numbers in the driver; capability: the lowest of theirs, 90 for 9.0.
    """

    def __init__(self, library):
        self.library = library
        for name, types in SIGNATURES.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise RuntimeError(f"the NVIDIA driver is too old: it lacks {name}") from None
            function.argtypes = types
            function.restype = ctypes.c_int
        self.call("cuInit", 0)
        version = self.integer("cuDriverGetVersion")
        if version < OLDEST_DRIVER:
            raise RuntimeError(
                f"the NVIDIA driver is too old: for CUDA {cuda_version(version)}, and "
                f"{cuda_version(OLDEST_DRIVER)} is needed"
            )
        count = self.integer("cuDeviceGetCount")
        if not count:
            raise RuntimeError("the NVIDIA driver knows no GPU")
        self.devices = [self.integer("cuDeviceGet", ordinal) for ordinal in range(count)]
        self.capability = min(
            10 * self.integer("cuDeviceGetAttribute", COMPUTE_CAPABILITY_MAJOR, device)
            + self.integer("cuDeviceGetAttribute", COMPUTE_CAPABILITY_MINOR, device)
            for device in self.devices
        )
        if self.capability < ARCHITECTURES[0]:
            raise RuntimeError(
                f"a GPU is too old: compute capability {self.capability / 10}, and "
                f"{ARCHITECTURES[0] / 10} is needed"
            )

    def call(self, name: str, *arguments) -> None:
        error = getattr(self.library, name)(*arguments)
        if error:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(error, ctypes.byref(text))
            reason = text.value.decode() if text.value else "unknown"
            raise RuntimeError(f"{name}: {reason} (CUDA error {error})")

    def integer(self, name: str, *arguments) -> int:
        """What a function writes to its first argument, an int."""
        result = ctypes.c_int()
        self.call(name, ctypes.byref(result), *arguments)
        return result.value

    def handle(self, name: str, *arguments) -> ctypes.c_void_p:
        """What a function writes to its first argument, a handle."""
        result = ctypes.c_void_p()
        self.call(name, ctypes.byref(result), *arguments)
        return result

    def address(self, name: str) -> int:
        return ctypes.cast(getattr(self.library, name), ctypes.c_void_p).value


def cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def driver() -> Driver:
    """This machine's driver; RuntimeError, with the reason, if kernels cannot run."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise RuntimeError("no NVIDIA driver (libcuda.so.1)") from None
    return Driver(library)


@functools.cache
def unavailable() -> str:
    """Why this machine cannot run kernels; empty if it can."""
    try:
        driver()
    except RuntimeError as error:
        return str(error)
    return ""


# The kernel --------------------------------------------------------------------------------------


def architecture() -> int:
    """The newest generation that LLVM and all GPUs here know; without a GPU the oldest of all."""
    if unavailable():
        return ARCHITECTURES[0]
    return max(known for known in ARCHITECTURES if known <= driver().capability)


def identity() -> str:
    """What of this machine decides the code."""
    return f"cuda sm_{architecture()}"


def scratch_size(scratch: int, worlds: int) -> int:
    """Bytes of scratch memory for a call: for whole warps."""
    return max(1, scratch * WARP * -(-worlds // WARP))


def threads_of_a_block(instructions: int, scratch: int) -> int:
    """scratch: bytes of a world."""
    if instructions > LARGE_KERNEL or scratch > LARGE_SCRATCH:
        return THREADS_OF_LARGE_KERNELS
    return THREADS


def kernel_ir(
    graph: Graph, mapped: list[bool], sizes: list[int], results: int, batched: bool
) -> tuple[str, int]:
    """The module's text, and the size of a world's scratch memory in bytes.

    mapped: of each operand, whether each world has its own; sizes: elements of one world's;
    results: their number, without the scratch memory, which is one more; batched: whether the
    results have an axis of worlds (the kernel is the same with and without).
    """
    emitter = Emitter(graph, 1, mapped, sizes)
    emitter.emit()
    scratch = 4 * emitter.scratch_size
    threads = threads_of_a_block(len(emitter.lines), scratch)
    parameters = [
        *(f"ptr noalias readonly %operand{i}.start" for i in range(len(sizes))),
        *(f"ptr noalias %result{i}.start" for i in range(results)),
        "ptr noalias %scratch.start",
        "i64 %worlds",
    ]
    kernel = [
        f"define ptx_kernel void @kernel({', '.join(parameters)}) #0 {{",
        "entry:",
    ]
    for name, register in {"block": "ctaid.x", "size": "ntid.x", "thread": "tid.x"}.items():
        function = f"@llvm.nvvm.read.ptx.sreg.{register}"
        emitter.declarations.add(f"declare i32 {function}()")
        kernel.append(f"%{name}.i32 = call i32 {function}()")
        kernel.append(f"%{name} = zext i32 %{name}.i32 to i64")
    kernel += [
        "%first = mul i64 %block, %size",
        "%world = add i64 %first, %thread",
        "%some = icmp slt i64 %world, %worlds",
        "br i1 %some, label %body, label %end",
        "body:",
        *own_pointers(graph, mapped, sizes, emitter.scratch_size),
        *emitter.lines,
        "br label %end",
        "end:",
        "ret void",
        "}",
        # A block has at most that many threads, and one block on an SM is enough, so a thread may
        # have 255 registers. Without the second, NVIDIA's compiler gave the G1's kernel 32.
        f'attributes #0 = {{ "nvvm.maxntid"="{threads}" "nvvm.minctasm"="1" }}',
    ]
    functions = emitter.called_functions()
    text = "\n".join([*emitter.tables, *sorted(emitter.declarations), *functions, *kernel])
    return text, scratch


def own_pointers(graph: Graph, mapped: list[bool], sizes: list[int], scratch: int) -> list[str]:
    """Pointers to what is the world's own of each array, or to all of an array that worlds share.

    scratch: elements of a world's scratch memory. A warp's threads have the first element of each
    of them side by side, then the second, and so on: the GPU reads them at once.
    """
    arrays = {}  # of those that the kernel touches: kind, and elements from one world to the next
    for node, op in enumerate(graph.op):
        if op == "input":
            operand, _ = graph.extra[node]
            arrays[f"operand{operand}"] = (graph.kind[node], sizes[operand] * mapped[operand])
    for buffer in graph.buffers:
        if buffer.source == "input":
            size = buffer.size * mapped[buffer.operand]
            arrays[f"operand{buffer.operand}"] = (buffer.kind, size)
        elif buffer.source == "output":
            arrays[f"result{buffer.operand}"] = (buffer.kind, buffer.size)
    lines = []
    for name, (kind, size) in arrays.items():
        lines += [
            f"%{name}.index = mul i64 %world, {size}",
            f"%{name} = getelementptr {MEMORY_TYPES[kind]}, ptr %{name}.start, i64 %{name}.index",
        ]
    return [
        *lines,
        f"%lane = and i64 %world, {WARP - 1}",
        "%warp = sub i64 %world, %lane",
        f"%scratch.warp = mul i64 %warp, {scratch}",
        "%scratch.index = add i64 %scratch.warp, %lane",
        "%scratch = getelementptr i32, ptr %scratch.start, i64 %scratch.index",
    ]


def compile_ir(text: str, sm: int | None = None) -> bytes:
    """PTX. sm: the generation of GPUs to compile for (90 for 9.0); by default, `architecture()`.

    LLVM's optimiser is left out: what it would find, the graph has found already, and it reorders
    operations such that more values live at a time. After it, NVIDIA's compiler (12.9, for 9.0) put
    1.7 times as many loads of values that found no register into HalfCheetah's kernel with MJX's
    solver, and 1.1 times as many into the G1's.
    """
    sm = sm or architecture()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(text)
    module.verify()
    machine = llvm.Target.from_triple("nvptx64-nvidia-cuda").create_target_machine(
        cpu=f"sm_{sm}",
        features=f"+ptx{PTX_VERSION}" if sm < FIRST_WITH_NEWER_PTX else "",
        opt=3,
    )
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    return machine.emit_assembly(module).encode()


# NVIDIA's driver does most of the work when a kernel is loaded, so no other process compiles.
start_compiling = compile_ir


# The handler -------------------------------------------------------------------------------------


def launch_ir(operands: int, results: int, kernel: int, threads: int) -> list[str]:
    """What the handler does: launches the kernel on XLA's stream, with a thread for each world.

    kernel: the driver's handle of it. That and the addresses of the driver's functions belong to
    this process, so the handler is made anew in each.
    """
    launch = driver().address("cuLaunchKernel")
    parameters = [
        *(f"%operand{i}.place" for i in range(operands)),
        *(f"%result{i}.place" for i in range(results)),
        "%scratch.place",
        "%worlds.slot",
    ]
    lines = [
        "%worlds.slot = alloca i64",
        f"%parameters = alloca [{len(parameters)} x ptr]",
        f"%query = alloca [{ffi.STREAM_SIZE} x i8], align 8",
        "%is.empty = icmp eq i64 %worlds, 0",
        "br i1 %is.empty, label %done, label %ask",
        "ask:",
        *ffi.load("api", "%frame", ffi.FRAME_API),
        *ffi.load("context", "%frame", ffi.FRAME_CONTEXT),
        *ffi.load("stream.get", "%api", ffi.API_STREAM_GET),
        f"store i64 {ffi.STREAM_SIZE}, ptr %query",
        *ffi.store("query.extension", "%query", 8, "ptr null"),
        *ffi.store("query.context", "%query", ffi.STREAM_CONTEXT, "ptr %context"),
        *ffi.store("query.stream", "%query", ffi.STREAM_STREAM, "ptr null"),
        "%refusal = call ptr %stream.get(ptr %query)",
        "%is.granted = icmp eq ptr %refusal, null",
        "br i1 %is.granted, label %launch, label %refused",
        "refused:",
        "ret ptr %refusal",
        "launch:",
        *ffi.load("stream", "%query", ffi.STREAM_STREAM),
        "store i64 %worlds, ptr %worlds.slot",
    ]
    for index, place in enumerate(parameters):
        lines += ffi.store(f"parameter{index}", "%parameters", 8 * index, f"ptr {place}")
    arguments = [
        f"ptr inttoptr (i64 {kernel} to ptr)",
        *("i32 %blocks", "i32 1", "i32 1"),
        *(f"i32 {threads}", "i32 1", "i32 1"),
        "i32 0",  # bytes of shared memory
        "ptr %stream",
        "ptr %parameters",
        "ptr null",
    ]
    return [
        *lines,
        f"%worlds.up = add i64 %worlds, {threads - 1}",
        f"%blocks.i64 = udiv i64 %worlds.up, {threads}",
        "%blocks = trunc i64 %blocks.i64 to i32",
        f"%status = call i32 inttoptr (i64 {launch} to ptr)({', '.join(arguments)})",
        "%is.launched = icmp eq i32 %status, 0",
        "br i1 %is.launched, label %done, label %failed",
        "failed:",
        *error_ir(),
    ]


def error_ir() -> list[str]:
    """Returns an error to XLA in the driver's words; %status: its number there, %api: XLA's API."""
    describe = driver().address("cuGetErrorString")
    write = ctypes.cast(ctypes.CDLL(None).snprintf, ctypes.c_void_p).value
    size = 256
    return [
        "%reason.slot = alloca ptr",
        f"%message = alloca [{size} x i8]",
        f"%report = alloca [{ffi.ERROR_SIZE} x i8], align 8",
        "store ptr @unknown, ptr %reason.slot",
        f"call i32 inttoptr (i64 {describe} to ptr)(i32 %status, ptr %reason.slot)",
        "%reason = load ptr, ptr %reason.slot",
        f"call i32 (ptr, i64, ptr, ...) inttoptr (i64 {write} to ptr)"
        f"(ptr %message, i64 {size}, ptr @format, ptr %reason, i32 %status)",
        f"store i64 {ffi.ERROR_SIZE}, ptr %report",
        *ffi.store("report.extension", "%report", 8, "ptr null"),
        *ffi.store("report.message", "%report", ffi.ERROR_MESSAGE, "ptr %message"),
        *ffi.store("report.code", "%report", ffi.ERROR_CODE, f"i32 {ffi.CODE_INTERNAL}"),
        *ffi.load("error.create", "%api", ffi.API_ERROR_CREATE),
        "%error = call ptr %error.create(ptr %report)",
        "ret ptr %error",
    ]


def text_constant(name: str, text: str) -> str:
    """A C string."""
    content = text.encode() + b"\0"
    items = ", ".join(f"i8 {byte}" for byte in content)
    return f"@{name} = internal constant [{len(content)} x i8] [{items}]"


def handler_ir(operands: int, results: int, batched: bool, kernel: int, threads: int) -> str:
    """The handler's module, for the host."""
    work = launch_ir(operands, results, kernel, threads)
    return "\n".join(
        [
            text_constant("unknown", "unknown"),
            text_constant("format", "onekernel: the kernel's launch failed: %s (CUDA error %d)"),
            *ffi.handler_ir(operands, results, batched, work, ffi.MAY_BE_RECORDED),
        ]
    )


# Loading -----------------------------------------------------------------------------------------


class Loader(ffi.Loader):
    """Gives kernels to the driver, and their handlers to XLA."""

    def __init__(self):
        super().__init__("CUDA")
        self.kept: list = []  # what the driver may still write to
        self.loading = threading.Lock()

    def load_kernel(self, ptx: bytes) -> int:
        """The driver's handle of the kernel. RuntimeError, with its compiler's log, if it fails."""
        log = ctypes.create_string_buffer(ERROR_LOG_SIZE)
        options = (ctypes.c_int * 2)(JIT_ERROR_LOG_BUFFER, JIT_ERROR_LOG_BUFFER_SIZE_BYTES)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), ERROR_LOG_SIZE)
        self.kept += [log, options, values]
        nvidia = driver()
        try:
            # A library's kernels hold on all GPUs; a module, the older form, belongs to one.
            library = nvidia.handle(
                "cuLibraryLoadData", ptx + b"\0", options, values, 2, None, None, 0
            )
            kernel = nvidia.handle("cuLibraryGetKernel", library, b"kernel")
            self.load_on_devices(kernel)
        except RuntimeError as error:
            details = log.value.decode(errors="replace").strip()
            raise RuntimeError(f"onekernel: {error} {details}".rstrip()) from None
        return kernel.value

    def load_on_devices(self, kernel: ctypes.c_void_p) -> None:
        """Puts the kernel on the GPUs that this process uses. The driver would do so at the first
        launch, but XLA may be recording a CUDA graph then, which memory cannot be copied during."""
        nvidia = driver()
        for device in nvidia.devices:
            is_active = ctypes.c_int()
            nvidia.call(
                "cuDevicePrimaryCtxGetState",
                device,
                ctypes.byref(ctypes.c_uint()),
                ctypes.byref(is_active),
            )
            if not is_active.value:
                continue
            context = nvidia.handle("cuDevicePrimaryCtxRetain", device)
            try:
                nvidia.call("cuCtxPushCurrent_v2", context)
                try:
                    nvidia.handle("cuKernelGetFunction", kernel)
                finally:
                    nvidia.handle("cuCtxPopCurrent_v2")
            finally:
                nvidia.call("cuDevicePrimaryCtxRelease_v2", device)

    def add(self, name: str, ptx: bytes, operands: int, results: int, batched: bool) -> None:
        """Makes the kernel the FFI target `name`."""
        with self.loading:
            if name in self.loaded:
                return
            kernel = self.load_kernel(ptx)
            threads = int(re.search(rb"\.maxntid (\d+)", ptx).group(1))
            text = handler_ir(operands, results, batched, kernel, threads)
            self.register(name, cpu.compile_ir(text))


loader = Loader()


def register(name: str, code: bytes, operands: int, results: int, batched: bool) -> None:
    """Makes a kernel known to XLA under this name."""
    loader.add(name, code, operands, results, batched)
