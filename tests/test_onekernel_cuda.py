"""Kernels for NVIDIA GPUs, tested without one.

What is tested: the numbers that each thread computes, the PTX that LLVM makes of its code, the
handler that XLA calls, and what is asked of NVIDIA's driver. `grid` plays the GPU: it runs a kernel
on the CPU, for one thread after the other. Functions that note what they are asked play the driver
and XLA. Where there is a GPU, `test_on_a_gpu` uses it.
"""

import ctypes
import functools
import hashlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_oracle import evaluate
from jax import lax
from mujoco import mjx
from quick import quick_jit

import onekernel
import ppo_mjx
from onekernel import api, cpu, cuda, ffi, machine_code

WORLDS = 150  # two blocks of 64 threads and a part of a third
NAMES = ("control_and_memory", "every_operation", "half_cheetah")
# It takes longest; its kernel runs below too, without the CUDA part.
SOME_SLOW = (*NAMES[:2], pytest.param(NAMES[2], marks=pytest.mark.slow))


@pytest.fixture(autouse=True)
def no_stored_kernels(monkeypatch):
    monkeypatch.setenv("ONEKERNEL_CACHE", "0")


# ---- Programs --------------------------------------------------------------------------------

TABLE = np.sin(np.arange(600, dtype=np.float32))


def control_and_memory(x, count, flags, shared, own):
    """Loops of different lengths, branches, and arrays in memory: constants, arguments, results."""
    table = jnp.asarray(TABLE)

    def turn(state):
        value, left, total = state
        value = jnp.where(left % 2 == 0, jnp.sin(value) + 0.1 * x, value / (1.0 + value * value))
        value = lax.cond(flags[1], lambda: value, lambda: value + table[left * 70])
        return value, left - 1, total + jnp.sum(value)

    value, _, total = lax.while_loop(lambda state: state[1] > 0, turn, (x, count % 7, 0.0))
    picked = table[(count * 37) % 600] + shared[count % 500] + own[(count * 11) % 500]

    def series():
        return lax.fori_loop(1, 6, lambda i, sum_: sum_ + i / (1.0 + total * total), picked)

    chosen = lax.cond(flags[0], series, lambda: jnp.sqrt(jnp.abs(total)))
    memory = (2.0 * own).at[count % 500].add(chosen)
    memory, _ = lax.scan(
        lambda memory, i: (memory.at[i * 7].add(value[i % 4]), None), memory, jnp.arange(20)
    )
    return value, chosen, memory, memory[(count + 1) % 500] > 0.0, flags ^ (count > 3)


def control_arguments(worlds):
    draw = np.random.default_rng(0)
    return (
        draw.normal(size=(worlds, 4)).astype(np.float32),
        draw.integers(0, 50, worlds).astype(np.int32),
        draw.integers(0, 2, (worlds, 3)).astype(bool),
        draw.normal(size=500).astype(np.float32),
        draw.normal(size=(worlds, 500)).astype(np.float32),
    )


def every_operation(x, y, i, j, u, v, key):
    """All that the graph knows, on floats x and y, integers i and j, unsigned ones u and v."""
    unit = x / (1.0 + jnp.abs(x))
    distance = jnp.abs(x) + 1.5
    floats = [
        x + y, x - y, x * y, x / y, -x, jnp.maximum(x, y), jnp.minimum(x, y), jnp.maximum(x, 0.5),
        jnp.sqrt(distance), lax.rsqrt(distance), jnp.abs(x), jnp.floor(x), jnp.ceil(x),
        jnp.round(x), lax.rem(x, y), jnp.where(i < j, x, y), lax.pow(distance, unit),
        jnp.sin(x), jnp.cos(x), jnp.tan(unit), jnp.arcsin(unit), jnp.arccos(unit), jnp.arctan(x),
        jnp.arctan2(x, y), jnp.sinh(unit), jnp.cosh(unit), jnp.tanh(x), jnp.arcsinh(x),
        jnp.arccosh(distance), jnp.arctanh(unit), jnp.exp(x), jnp.exp2(x), jnp.expm1(x),
        jnp.log(distance), jnp.log1p(distance), jax.nn.sigmoid(x), jnp.cbrt(x), lax.erf(x),
        lax.erf_inv(0.9 * unit), i.astype(jnp.float32), u.astype(jnp.float32),
        (x < y).astype(jnp.float32), lax.bitcast_convert_type(i % 1000, jnp.float32),
    ]  # fmt: skip
    integers = [
        i + j, i - j, i * j, -i, lax.div(i, j), lax.rem(i, j), lax.div(i, j % 3), jnp.minimum(i, j),
        jnp.maximum(i, j), i & j, i | j, i ^ j, ~i, jnp.abs(i), lax.shift_left(i, j % 40),
        lax.shift_right_logical(i, j % 40), lax.shift_right_arithmetic(i, j % 40),
        lax.population_count(i), lax.clz(i), (1e6 * x).astype(jnp.int32), x.astype(jnp.int32),
        (1e20 * x).astype(jnp.int32), lax.bitcast_convert_type(x, jnp.int32),
        (i < j).astype(jnp.int32),
    ]  # fmt: skip
    unsigned = [
        u + v, u - v, u * v, lax.div(u, v), lax.rem(u, v % 3), jnp.minimum(u, v), jnp.maximum(u, v),
        lax.shift_right_logical(u, v % 40), lax.clz(u), (1e9 * x).astype(jnp.uint32),
        jax.random.bits(key), i.astype(jnp.uint32),
    ]  # fmt: skip
    truths = [
        x < y, x <= y, x == y, x != y, i < j, i <= j, i == j, i != j, u < v, u <= v, u == v,
        (x < y) & (i < j), (x < y) | (u < v), (x < y) ^ (i < j), ~(x < y), jnp.isfinite(x / y),
    ]  # fmt: skip
    return tuple(jnp.stack(values) for values in (floats, integers, unsigned, truths))


def operation_arguments(worlds):
    draw = np.random.default_rng(1)
    floats = draw.normal(size=(2, worlds)).astype(np.float32) * 3
    integers = draw.integers(-(2**31), 2**31, (4, worlds))
    integers[:, : worlds // 2] %= 50
    integers[1, :3] = (0, -1, 0)
    integers[0, :3] = (-(2**31), -(2**31), 7)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), worlds))
    return (
        *floats,
        *integers[:2].astype(np.int32),
        *integers[2:].astype(np.uint32),
        np.asarray(keys),
    )


def with_raw_key(x, y, i, j, u, v, key):
    return every_operation(x, y, i, j, u, v, jax.random.wrap_key_data(key))


@functools.cache
def half_cheetah():
    """A physics step of one world, and arguments for WORLDS of them, many in contact."""
    env = ppo_mjx.Env(ppo_mjx.Args(env_id="HalfCheetah"))
    model = env.model.replace(opt=env.model.opt.replace(iterations=4, ls_iterations=8))

    def step(position, velocity, warmstart, control):
        data = env.template.replace(
            qpos=position, qvel=velocity, qacc_warmstart=warmstart, ctrl=control
        )
        data = mjx.step(model, data)
        return data.qpos, data.qvel, data.qacc_warmstart

    draw = np.random.default_rng(2)
    shape = (WORLDS, model.nv)
    position = np.asarray(model.qpos0) + 0.2 * draw.normal(size=(WORLDS, model.nq))
    position[:, 1] -= draw.uniform(0, 0.2, WORLDS)  # height: in the ground up to 20 cm
    arguments = (
        position,
        draw.normal(size=shape),
        np.zeros(shape),
        draw.uniform(-1, 1, (WORLDS, model.nu)),
    )
    return step, tuple(argument.astype(np.float32) for argument in arguments)


class Program:
    """A function of one world, arguments for WORLDS of them, its graph, and its kernel's text."""

    def __init__(self, function, arguments, mapped=None, limits=api.SCALAR_LIMITS):
        self.function = function
        self.arguments = arguments
        self.mapped = mapped or [True] * len(arguments)
        own = [x[0] if is_own else x for x, is_own in zip(arguments, self.mapped, strict=True)]
        leaves, tree = jax.tree.flatten((tuple(own), {}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(api, "SCALAR_LIMITS", limits)
            traced = api.Kernel(function, api.Signature.of(leaves, tree))
            self.graph = traced.graph("cuda")
        self.sizes = [x.size for x in own]
        self.shapes = [(WORLDS, *shape) for shape in traced.out_shapes]
        self.dtypes = traced.out_dtypes
        self.text, self.scratch = cuda.kernel_ir(
            self.graph, self.mapped, self.sizes, len(self.shapes), True
        )

    def vmapped(self, function):
        return jax.vmap(function, in_axes=[0 if is_own else None for is_own in self.mapped])

    @functools.cached_property
    def expected(self) -> list[np.ndarray]:
        """The results, by NumPy."""
        flat = evaluate(self.graph, self.arguments, self.mapped, WORLDS)
        return [x.reshape(shape) for x, shape in zip(flat, self.shapes, strict=True)]

    @functools.cached_property
    def ptx(self) -> bytes:
        return cuda.compile_ir(self.text, 90)


@functools.cache
def program(name: str) -> Program:
    if name == "control_and_memory":
        mapped = [True, True, True, False, True]
        limits = (64,)  # arrays of more elements are to stay in memory
        return Program(control_and_memory, control_arguments(WORLDS), mapped, limits)
    if name == "every_operation":
        return Program(with_raw_key, operation_arguments(WORLDS))
    return Program(*half_cheetah())


def assert_close(got, expected, name: str) -> None:
    """Equal but for rounding. A robot's contacts amplify it, in a few worlds much."""
    assert len(got) == len(expected)
    for mine, other in zip(map(np.asarray, got), expected, strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        if mine.dtype != np.float32:
            np.testing.assert_array_equal(mine, other)
        elif name == "half_cheetah":
            error = np.abs(mine - other) / (1.0 + np.abs(other))
            assert np.median(error) < 1e-5 and error.max() < 1e-2
        else:
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=2e-6)


# ---- XLA's side: structs as its header has them, and a call ----------------------------------

C_TYPES = {"size_t": ctypes.c_size_t, "int64_t": ctypes.c_int64}  # others are enums or int


@functools.cache
def header() -> str:
    path = pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h")
    return re.sub(r"//.*", "", path.read_text())


@functools.cache
def structure(name: str):
    """A struct of XLA's header for ctypes."""
    fields = []
    for declaration in re.search(rf"struct {name} {{(.*?)\n}}", header(), re.S)[1].split(";"):
        words = re.findall(r"\w+", declaration)
        if not words:
            continue
        if "*" in declaration or words[0] == "_XLA_FFI_API_STRUCT_FIELD":
            fields.append((words[-1], ctypes.c_void_p))
        elif f"struct {words[0]} {{" in header():
            fields.append((words[-1], structure(words[0])))
        else:
            fields.append((words[-1], C_TYPES.get(words[0], ctypes.c_int)))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def offset(name: str, path: str) -> int:
    """Of a field, "a.b" for b in the struct a, in bytes."""
    kind = structure(name)
    total = 0
    for field in path.split("."):
        total += getattr(kind, field).offset
        kind = dict(kind._fields_)[field]
    return total


OFFSETS = {
    "FRAME_EXTENSION": ("XLA_FFI_CallFrame", "extension_start"),
    "FRAME_API": ("XLA_FFI_CallFrame", "api"),
    "FRAME_CONTEXT": ("XLA_FFI_CallFrame", "ctx"),
    "FRAME_STAGE": ("XLA_FFI_CallFrame", "stage"),
    "FRAME_ARGUMENTS": ("XLA_FFI_CallFrame", "args.args"),
    "FRAME_RESULTS": ("XLA_FFI_CallFrame", "rets.rets"),
    "EXTENSION_METADATA": ("XLA_FFI_Metadata_Extension", "metadata"),
    "METADATA_MAJOR_VERSION": ("XLA_FFI_Metadata", "api_version.major_version"),
    "METADATA_MINOR_VERSION": ("XLA_FFI_Metadata", "api_version.minor_version"),
    "METADATA_TRAITS": ("XLA_FFI_Metadata", "traits"),
    "BUFFER_DATA": ("XLA_FFI_Buffer", "data"),
    "BUFFER_DIMENSIONS": ("XLA_FFI_Buffer", "dims"),
    "API_ERROR_CREATE": ("XLA_FFI_Api", "XLA_FFI_Error_Create"),
    "API_STREAM_GET": ("XLA_FFI_Api", "XLA_FFI_Stream_Get"),
    "ERROR_MESSAGE": ("XLA_FFI_Error_Create_Args", "message"),
    "ERROR_CODE": ("XLA_FFI_Error_Create_Args", "errc"),
    "STREAM_CONTEXT": ("XLA_FFI_Stream_Get_Args", "ctx"),
    "STREAM_STREAM": ("XLA_FFI_Stream_Get_Args", "stream"),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_fields_stand_where_the_header_has_them(name):
    assert getattr(ffi, name) == offset(*OFFSETS[name])


def test_sizes_and_values_are_those_of_the_header():
    values = dict(re.findall(r"(XLA_FFI_\w+) = (\w+(?: << \d+)?)", header()))
    versions = dict(re.findall(r"#define (XLA_FFI_API_M\w+) (\d+)", header()))
    # A struct's size, as XLA counts, ends with its last field.
    assert ffi.ERROR_SIZE == ffi.ERROR_CODE + ctypes.sizeof(ctypes.c_int)
    assert ffi.STREAM_SIZE == ffi.STREAM_STREAM + ctypes.sizeof(ctypes.c_void_p)
    assert ffi.STAGE_EXECUTE == int(values["XLA_FFI_ExecutionStage_EXECUTE"])
    assert ffi.CODE_INTERNAL == int(values["XLA_FFI_Error_Code_INTERNAL"])
    assert values["XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE"] == "1u << 0"
    assert ffi.MAY_BE_RECORDED == 1
    assert ffi.API_MAJOR_VERSION == int(versions["XLA_FFI_API_MAJOR"])
    assert ffi.API_MINOR_VERSION <= int(versions["XLA_FFI_API_MINOR"])


CONTEXT, STREAM, REFUSAL, ERROR = 0x1111, 0x2222, 0x3333, 0x4444
XlaFunction = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


class Call:
    """XLA, while it calls a handler with these arrays.

    message, code: of the error that the handler made, if any.
    """

    def __init__(self, operands=(), results=(), stage=ffi.STAGE_EXECUTE, has_stream=True):
        self.has_stream = has_stream
        self.message = None
        self.code = None
        self.kept = [operands, results]
        self.api = structure("XLA_FFI_Api")()
        self.api.XLA_FFI_Stream_Get = self.function(self.get_stream)
        self.api.XLA_FFI_Error_Create = self.function(self.create_error)
        self.frame = structure("XLA_FFI_CallFrame")()
        self.frame.api = ctypes.addressof(self.api)
        self.frame.ctx = CONTEXT
        self.frame.stage = stage
        self.frame.args.args = self.buffers(operands)
        self.frame.rets.rets = self.buffers(results)

    def function(self, method) -> int:
        pointer = XlaFunction(method)
        self.kept.append(pointer)
        return ctypes.cast(pointer, ctypes.c_void_p).value

    def buffers(self, arrays) -> int:
        """The address of a table of pointers to XLA_FFI_Buffer structs."""
        table = (ctypes.c_void_p * len(arrays))()
        for index, array in enumerate(arrays):
            dimensions = (ctypes.c_int64 * array.ndim)(*array.shape)
            buffer = structure("XLA_FFI_Buffer")()
            buffer.data = array.ctypes.data
            buffer.rank = array.ndim
            buffer.dims = ctypes.addressof(dimensions)
            table[index] = ctypes.addressof(buffer)
            self.kept += [dimensions, buffer]
        self.kept.append(table)
        return ctypes.addressof(table)

    def get_stream(self, address):
        query = structure("XLA_FFI_Stream_Get_Args").from_address(address)
        assert (query.struct_size, query.extension_start, query.ctx) == (32, None, CONTEXT)
        query.stream = STREAM
        return None if self.has_stream else REFUSAL

    def create_error(self, address):
        report = structure("XLA_FFI_Error_Create_Args").from_address(address)
        assert (report.struct_size, report.extension_start) == (28, None)
        self.message = ctypes.string_at(report.message).decode()
        self.code = report.errc
        return ERROR

    def run(self, handler) -> int | None:
        """What the handler returns: None, or the address of an error."""
        return handler(ctypes.addressof(self.frame))


# ---- NVIDIA's side: a driver, and a GPU that runs one thread after the other -----------------

LIBRARY, KERNEL = 0x5555, 0x6666
OUT_OF_MEMORY = 2
ERROR_WORDS = {OUT_OF_MEMORY: b"out of memory", 218: b"a PTX JIT compilation failed"}


class FakeDriver:
    """libcuda, as far as it is used. asked: the names and arguments of what was called, in order.

    version: of CUDA; capabilities: of the GPUs; active: the GPUs that the process uses; failures:
    the error numbers of the functions that fail; grid: what runs a kernel; lacks: a function that
    is not there.
    """

    def __init__(
        self,
        version=12_080,
        capabilities=(90,),
        active=(0,),
        failures=None,
        grid=None,
        lacks="",
    ):
        self.asked = []
        self.version = version
        self.capabilities = capabilities
        self.active = active
        self.failures = failures or {}
        self.grid = grid
        for name, types in cuda.SIGNATURES.items():
            if name != lacks:
                kind = ctypes.CFUNCTYPE(ctypes.c_int, *types)
                setattr(self, name, kind(functools.partial(self.answer, name)))

    def answer(self, name, *arguments):
        self.asked.append((name, arguments))
        if hasattr(self, f"do_{name}"):
            getattr(self, f"do_{name}")(*arguments)
        return self.failures.get(name, 0)

    def calls(self, name) -> list[tuple]:
        return [arguments for called, arguments in self.asked if called == name]

    def do_cuGetErrorString(self, error, out):
        out[0] = ERROR_WORDS[error]

    def do_cuDriverGetVersion(self, out):
        out[0] = self.version

    def do_cuDeviceGetCount(self, out):
        out[0] = len(self.capabilities)

    def do_cuDeviceGet(self, out, ordinal):
        out[0] = 10 + ordinal

    def do_cuDeviceGetAttribute(self, out, attribute, device):
        major, minor = divmod(self.capabilities[device - 10], 10)
        out[0] = {75: major, 76: minor}[attribute]

    def do_cuDevicePrimaryCtxGetState(self, device, flags, is_active):
        is_active[0] = device - 10 in self.active

    def do_cuDevicePrimaryCtxRetain(self, out, device):
        out[0] = 100 + device

    def do_cuLibraryLoadData(self, out, code, options, values, count, *rest):
        assert (options[:2], count, values[1]) == ([5, 6], 2, cuda.ERROR_LOG_SIZE)
        assert [bool(argument) for argument in rest] == [False] * 3
        self.code = ctypes.string_at(code)
        if "cuLibraryLoadData" in self.failures:
            ctypes.memmove(values[0], b"ptxas error: line 7\0", 20)
        out[0] = LIBRARY

    def do_cuLibraryGetKernel(self, out, library, name):
        assert (library, name) == (LIBRARY, b"kernel")
        out[0] = KERNEL

    def do_cuLaunchKernel(self, kernel, blocks, y, z, threads, *rest):
        if self.grid is not None:
            self.grid(rest[4], blocks, threads)


@pytest.fixture
def install(monkeypatch):
    """Makes a FakeDriver this machine's driver; returns the cuda.Driver for it."""

    def install(fake: FakeDriver) -> cuda.Driver:
        driver = cuda.Driver(fake)
        monkeypatch.setattr(cuda, "driver", lambda: driver)
        monkeypatch.setattr(cuda, "unavailable", lambda: "")
        return driver

    return install


@pytest.fixture
def handler(monkeypatch, install):
    """Loads PTX by a FakeDriver, as cuda.register does; returns the handler that XLA is given."""

    def load(fake: FakeDriver, ptx=b".maxntid 64\n", operands=1, results=1, batched=True):
        registered = {}
        monkeypatch.setattr(
            jax.ffi,
            "register_ffi_target",
            lambda name, capsule, platform: registered.update({name: platform}),
        )
        install(fake)
        loader = cuda.Loader()
        loader.add("target", ptx, operands, results, batched)
        assert registered == {"target": "CUDA"}
        kept.append(loader)
        return loader.loaded["target"][1]

    kept = []
    return load


REGISTERS = ("ctaid.x", "ntid.x", "tid.x")  # number and size of the block, number of the thread
GRID = """
define void @grid(ptr %table, i32 %blocks, i32 %threads) {
entry:
  {read}
  store i32 %threads, ptr @ntid.x
  br label %thread
thread:
  %index = phi i32 [ 0, %entry ], [ %next, %thread ]
  %block = udiv i32 %index, %threads
  %number = urem i32 %index, %threads
  store i32 %block, ptr @ctaid.x
  store i32 %number, ptr @tid.x
  call void @kernel({arguments})
  %next = add i32 %index, 1
  %all = mul i32 %blocks, %threads
  %more = icmp ult i32 %next, %all
  br i1 %more, label %thread, label %end
end:
  ret void
}
"""


def grid(text: str):
    """A kernel's text as a function for this machine: (address of the table of the parameters'
    addresses, blocks, threads of a block) runs all threads."""
    text = text.replace("define ptx_kernel void", "define internal void")
    for register in REGISTERS:
        function = f"i32 @llvm.nvvm.read.ptx.sreg.{register}()"
        text = text.replace(f"declare {function}", f"@{register} = internal global i32 0")
        text = text.replace(f"call {function}", f"load i32, ptr @{register}")
    types = ["ptr"] * (re.search(r"void @kernel\((.*)\)", text)[1].count("%") - 1) + ["i64"]
    read = []
    for index, kind in enumerate(types):
        read += [
            f"%entry{index} = getelementptr ptr, ptr %table, i64 {index}",
            f"%place{index} = load ptr, ptr %entry{index}",
            f"%value{index} = load {kind}, ptr %place{index}",
        ]
    arguments = ", ".join(f"{kind} %value{index}" for index, kind in enumerate(types))
    text += GRID.replace("{read}", "\n  ".join(read)).replace("{arguments}", arguments)
    engine = ffi.load_object(machine_code.compile_module(text))
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function = kind(engine.get_function_address("grid"))
    function.engine = engine  # the code lives as long as that
    return function


# ---- Numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME_SLOW)
def test_threads_compute_what_the_graph_means(name, handler):
    """From the PTX and the handler to the results, with the CPU in the GPU's place."""
    made = program(name)
    fake = FakeDriver(grid=grid(made.text))
    run = handler(fake, made.ptx, len(made.arguments), len(made.shapes))
    operands = [np.ascontiguousarray(argument) for argument in made.arguments]
    results = [
        np.full(shape, 7).astype(dtype)
        for shape, dtype in zip(made.shapes, made.dtypes, strict=True)
    ]
    size = cuda.scratch_size(made.scratch, WORLDS)
    memory = np.full(size + 4096, 0xFF, np.uint8)
    assert Call(operands, [*results, memory[:size]]).run(run) is None
    assert (memory[size:] == 0xFF).all()  # nothing is written behind it
    assert_close(results, made.expected, name)


def test_worlds_share_no_scratch_memory():
    """Threads run side by side on a GPU, so many equal worlds have to touch as much as one each."""
    made = program("control_and_memory")
    run = grid(made.text)
    most = 70
    arguments = [
        np.repeat(x[:1], most, axis=0) if own else x
        for x, own in zip(made.arguments, made.mapped, strict=True)
    ]
    results = [
        np.zeros((most, *shape[1:]), dtype)
        for shape, dtype in zip(made.shapes, made.dtypes, strict=True)
    ]

    def touched(worlds: int) -> int:
        """Bytes that hold the same afterwards, whatever they held before."""
        after = []
        for before in (0x00, 0xFF):
            scratch = np.full(cuda.scratch_size(made.scratch, most), before, np.uint8)
            places = [array.ctypes.data for array in (*arguments, *results, scratch)]
            values = np.array([*places, worlds], np.int64)
            table = values.ctypes.data + 8 * np.arange(len(values))
            run(table.ctypes.data, 3, 32)
            after.append(scratch)
        return int((after[0] == after[1]).sum())

    one = touched(1)
    assert 0 < one <= made.scratch
    for worlds in (2, 32, 33, most):
        assert touched(worlds) == worlds * one


@pytest.mark.parametrize("name", SOME_SLOW)
def test_kernels_for_cpus_compute_what_the_graph_means(name):
    made = program(name)
    text, scratch = cpu.kernel_ir(made.graph, made.mapped, made.sizes, len(made.shapes), True)
    target = "oracle_" + hashlib.sha256(text.encode()).hexdigest()[:16]
    cpu.register(target, cpu.compile_ir(text), len(made.arguments), len(made.shapes), True)
    kinds = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in zip(made.shapes, made.dtypes, strict=True)
    ]
    kinds.append(jax.ShapeDtypeStruct((cpu.scratch_size(scratch, WORLDS),), np.uint8))
    with jax.default_device(jax.devices("cpu")[0]):
        *results, _ = jax.ffi.ffi_call(target, kinds)(*map(jnp.asarray, made.arguments))
    assert_close(results, made.expected, name)


@pytest.mark.parametrize("name", NAMES[:2])  # the robot would take XLA long to compile
def test_the_graph_means_what_jax_computes(name):
    made = program(name)
    with jax.default_device(jax.devices("cpu")[0]):
        results = quick_jit(made.vmapped(made.function))(*made.arguments)
    assert_close(results, made.expected, name)


@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name):
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    assert cuda.unavailable() == ""
    made = program(name)
    compiled = jax.jit(made.vmapped(onekernel.compile(made.function)))
    for _ in range(3):  # from the second time on XLA may replay a recorded CUDA graph
        assert_close(compiled(*made.arguments), made.expected, name)


# ---- PTX -------------------------------------------------------------------------------------


GENERATIONS = [(name, generation) for name in NAMES[:2] for generation in (70, 80, 90, 120)]


@pytest.mark.parametrize(
    ("name", "generation"), [*GENERATIONS, pytest.param(NAMES[2], 90, marks=pytest.mark.slow)]
)
def test_ptx(name, generation):
    """The robot's kernel takes LLVM seconds, and has no operation that the others have not."""
    made = program(name)
    ptx = (made.ptx if generation == 90 else cuda.compile_ir(made.text, generation)).decode()
    assert re.search(r"\.target (\w+)", ptx)[1] == f"sm_{generation}"
    assert float(re.search(r"\.version ([\d.]+)", ptx)[1]) >= 8.1
    entry = re.search(r"\.visible \.entry kernel\((.*?)\)\n(.*?)\{", ptx, re.S)
    assert entry[1].count(".param .u64") == len(made.arguments) + len(made.shapes) + 2
    # Without the second line the driver's compiler gave G1's kernel 32 registers a thread.
    threads = 64 if name == "every_operation" else 32  # the others use much memory
    assert entry[2].split("\n")[:2] == [f".maxntid {threads}", ".minnctapersm 1"]
    assert ".extern" not in ptx  # it calls nothing from elsewhere
    assert not re.search(r"\.(approx|ftz|full)\b", ptx)
    assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx and "fma.rn.f32" in ptx
    # Arguments are read as what nobody writes, and all memory is known to be the GPU's own.
    assert "ld.global.nc" in ptx and "st.global" in ptx
    assert not re.search(r"\b(ld|st)\.(b|u|s|f)\d", ptx)


def test_tables_become_constant_memory():
    ptx = program("control_and_memory").ptx.decode()
    assert re.search(r"\.global \.align 4 \.b8 table\d+\[2400\] = \{", ptx)


def test_a_kernel_may_have_more_parameters_than_older_ptx_allows():
    def function(*numbers):
        return tuple(2.0 * number for number in numbers)

    made = Program(function, tuple(np.ones((260, WORLDS), np.float32)))
    ptx = cuda.compile_ir(made.text, 70).decode()
    assert "kernel_param_521" in ptx and ".version 8.1" in ptx


def test_scratch_memory_is_for_whole_warps():
    assert cuda.scratch_size(12, 1) == cuda.scratch_size(12, 32) == 12 * 32
    assert cuda.scratch_size(12, 33) == 12 * 64
    assert cuda.scratch_size(0, 5) > 0  # an array of no bytes might have no address


def test_large_kernels_run_in_small_blocks():
    assert cuda.threads_of_a_block(100, 0) == 64
    assert cuda.threads_of_a_block(50_000, 0) == 32
    assert cuda.threads_of_a_block(100, 100_000) == 32


# ---- The handler -----------------------------------------------------------------------------


def world_arrays(worlds):
    return [np.zeros((worlds, 3), np.float32)], [np.zeros((worlds, 2)), np.zeros(8, np.uint8)]


@pytest.mark.parametrize("worlds, blocks", [(1, 1), (63, 1), (64, 1), (65, 2), (4096, 64)])
def test_launch(worlds, blocks, handler):
    fake = FakeDriver()
    run = handler(fake)
    operands, results = world_arrays(worlds)
    seen = []

    def look(table, *_):
        addresses = ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))[:4]
        seen.extend(ctypes.c_int64.from_address(address).value for address in addresses)

    fake.grid = look
    assert Call(operands, results).run(run) is None
    (arguments,) = fake.calls("cuLaunchKernel")
    assert arguments[:9] == (KERNEL, blocks, 1, 1, 64, 1, 1, 0, STREAM)
    assert not arguments[10]
    assert seen == [*(array.ctypes.data for array in (*operands, *results)), worlds]


def test_launch_without_an_axis_of_worlds(handler):
    fake = FakeDriver()
    run = handler(fake, b".maxntid 32\n", batched=False)
    seen = []
    fake.grid = lambda table, *_: seen.append(
        ctypes.c_int64.from_address(ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))[3]).value
    )
    assert Call([np.zeros(3)], [np.zeros(0), np.zeros(8)]).run(run) is None
    assert fake.calls("cuLaunchKernel")[0][1:7] == (1, 1, 1, 32, 1, 1)
    assert seen == [1]


def test_nothing_is_launched_for_no_worlds(handler):
    fake = FakeDriver()
    assert Call(*world_arrays(0)).run(handler(fake)) is None
    assert not fake.calls("cuLaunchKernel")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_nothing_is_launched_before_the_execution(stage, handler):
    fake = FakeDriver()
    assert Call(*world_arrays(5), stage=stage).run(handler(fake)) is None
    assert not fake.calls("cuLaunchKernel")


def test_a_failed_launch_is_an_error_in_the_drivers_words(handler):
    fake = FakeDriver(failures={"cuLaunchKernel": OUT_OF_MEMORY})
    call = Call(*world_arrays(5))
    assert call.run(handler(fake)) == ERROR
    assert call.message == "onekernel: the kernel's launch failed: out of memory (CUDA error 2)"
    assert call.code == ffi.CODE_INTERNAL


def test_an_error_of_xla_is_handed_back(handler):
    fake = FakeDriver()
    assert Call(*world_arrays(5), has_stream=False).run(handler(fake)) == REFUSAL
    assert not fake.calls("cuLaunchKernel")


def test_the_handler_describes_itself(handler):
    fake = FakeDriver()
    call = Call(*world_arrays(5))
    metadata = structure("XLA_FFI_Metadata")()
    extension = structure("XLA_FFI_Metadata_Extension")()
    extension.metadata = ctypes.addressof(metadata)
    call.frame.extension_start = ctypes.addressof(extension)
    metadata.api_version.major_version = 9
    assert call.run(handler(fake)) is None
    assert metadata.api_version.major_version == 0
    assert metadata.api_version.minor_version == 3
    assert metadata.traits == 1  # may be recorded in a CUDA graph
    assert not fake.calls("cuLaunchKernel")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA has to run on the CPU")
def test_xla_itself_takes_the_errors(install):
    """XLA on a CPU, which has no streams, calls the handler; and one that only makes an error."""
    install(FakeDriver())
    failing = [
        *ffi.load("api", "%frame", ffi.FRAME_API),
        f"%status = add i32 {OUT_OF_MEMORY}, 0",
        *cuda.error_ir(),
    ]
    constants = cuda.handler_ir(1, 1, True, KERNEL, 64).split("define")[0]
    texts = {
        "no_stream": cuda.handler_ir(1, 1, True, KERNEL, 64),
        "failing": constants + "\n".join(ffi.handler_ir(1, 1, True, failing)),
    }
    for name, text in texts.items():
        cpu.loader.register(name, cpu.compile_ir(text))
        kinds = [jax.ShapeDtypeStruct((5, 2), np.float32), jax.ShapeDtypeStruct((8,), np.uint8)]
        with pytest.raises(jax.errors.JaxRuntimeError) as error:
            jax.block_until_ready(jax.ffi.ffi_call(name, kinds)(jnp.ones((5, 3))))
        expected = "GPU context" if name == "no_stream" else "failed: out of memory (CUDA error 2)"
        assert expected in str(error.value)


# ---- The driver ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fake, reason",
    [
        (FakeDriver(lacks="cuLibraryLoadData"), "too old: it lacks cuLibraryLoadData"),
        (FakeDriver(version=11_080), "too old: for CUDA 11.8, and 12.1 is needed"),
        (FakeDriver(capabilities=()), "knows no GPU"),
        (FakeDriver(capabilities=(90, 61)), "a GPU is too old: compute capability 6.1"),
        (FakeDriver(failures={"cuInit": OUT_OF_MEMORY}), "cuInit: out of memory"),
    ],
)
def test_machines_that_cannot_run_kernels(fake, reason):
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        cuda.Driver(fake)


def test_a_machine_without_a_driver(monkeypatch):
    def nothing(name):
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", nothing)
    cuda.driver.cache_clear()
    cuda.unavailable.cache_clear()
    try:
        assert cuda.unavailable() == "no NVIDIA driver (libcuda.so.1)"
        assert cuda.identity() == "cuda sm_70"
    finally:
        cuda.unavailable.cache_clear()


@pytest.mark.parametrize(
    "capabilities, generation", [((90,), 90), ((103,), 100), ((121, 87), 86), ((75, 90), 75)]
)
def test_code_is_for_the_oldest_gpu_of_the_machine(capabilities, generation, install):
    install(FakeDriver(capabilities=capabilities))
    assert cuda.identity() == f"cuda sm_{generation}"


def test_a_kernel_is_loaded_on_the_gpus_in_use(install):
    fake = FakeDriver(capabilities=(90, 90, 90), active=(0, 2))
    install(fake)
    assert cuda.Loader().load_kernel(b"text") == KERNEL
    assert fake.code == b"text"  # up to the NUL that ends a C string
    expected = []
    for device in (10, 12):
        expected += [
            ("cuDevicePrimaryCtxRetain", device),
            ("cuCtxPushCurrent_v2", 100 + device),
            ("cuKernelGetFunction", KERNEL),
            ("cuCtxPopCurrent_v2", None),
            ("cuDevicePrimaryCtxRelease_v2", device),
        ]
    names = {name for name, _ in expected}
    steps = [
        (name, None if "Pop" in name else arguments[-1])
        for name, arguments in fake.asked
        if name in names
    ]
    assert steps == expected


def test_contexts_are_given_back_if_loading_fails(install):
    fake = FakeDriver(failures={"cuKernelGetFunction": OUT_OF_MEMORY})
    install(fake)
    with pytest.raises(RuntimeError, match="onekernel: cuKernelGetFunction: out of memory"):
        cuda.Loader().load_kernel(b"text")
    assert len(fake.calls("cuCtxPopCurrent_v2")) == 1
    assert len(fake.calls("cuDevicePrimaryCtxRelease_v2")) == 1


def test_refused_ptx_is_an_error_with_the_compilers_log(install):
    install(FakeDriver(failures={"cuLibraryLoadData": 218}))
    with pytest.raises(
        RuntimeError, match="PTX JIT compilation failed .*218.* ptxas error: line 7"
    ):
        cuda.Loader().load_kernel(b"text")
