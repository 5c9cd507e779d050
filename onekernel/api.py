"""`compile`: how a JAX function of one world becomes, for JAX, one operation on all worlds.

The function is traced when it is first called with arguments of new types, as jax.jit does. What
JAX then sees is a primitive of our own, `onekernel_p`, that stands for the whole function.
jax.vmap turns it into the same primitive with an axis of worlds, jit and scan leave it alone,
and when a program is compiled for a platform it becomes a call of a kernel there: made now, or
found in the cache."""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib.metadata
import io
import math
import pathlib
import pickle
import sys
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval
from jax.sharding import NamedSharding, PartitionSpec

from onekernel import arrays, cache, cpu, cuda, fingerprint, primitives
from onekernel.arrays import Keys, Memory, Scalars, kind_of
from onekernel.graph import KINDS, Graph, TooLarge
from onekernel.trace import Builder, Unsupported, rule

# A program of at most this number of scalars is taken apart altogether.
MOST_NODES = 270_000
# A larger one is tried again with arrays of more elements than this in memory: than the first of
# these numbers, as any program, then than the next.
SCALAR_LIMITS = (4096, 256, 64)
# Elements of an operand that are read up front; a larger one is read where it is used.
LARGEST_INPUT = 4096

PLATFORMS = {"cpu": cpu, "cuda": cuda}


class Fallback(UserWarning):
    """A function that onekernel cannot compile is run by XLA, in the ordinary way."""


def compile(function):
    """Turns a function of one world into one kernel for all worlds.

        step = onekernel.compile(env.step)
        states = jax.vmap(step)(states, actions)

    function: a pure function of pytrees of arrays (float32, int32, uint32, bool, PRNG keys) that
    returns such pytrees; settings go by closure or functools.partial. It is of one world: compile
    it, then vmap it, never the other way round. It is traced for each new combination of shapes and
    types. Returns a function of the same signature. Under jax.vmap it is
    one kernel for all worlds; without it, for one. It works under jit, scan, shard_map and nested
    vmap, and with arguments that all worlds share (in_axes None). The original is its attribute
    `function`.

    What cannot be compiled (a primitive, float64, an argument that is no array, a platform) goes by
    XLA as if `compile` were not there, and one warning for each combination of shapes and types, a
    `Fallback`, says what it is and where. Gradients are refused
    with a TypeError: differentiate `compiled.function`."""
    return Compiled(function)


class Compiled:
    """See `compile`."""

    def __init__(self, function):
        self.function = function
        self.kernels: dict = {}
        self.others: set[str] = set()  # arguments that are no arrays, as they were warned of
        functools.update_wrapper(self, function, updated=())

    def __repr__(self) -> str:
        return f"onekernel.compile({self.function!r})"

    def __call__(self, *args, **kwargs):
        if jax.config.jax_disable_jit:  # as jax.jit
            return self.function(*args, **kwargs)
        leaves, tree = jax.tree.flatten((args, kwargs))
        try:
            signature = Signature.of(leaves, tree)
        except TypeError:  # something that is no array; where JAX wants one, it says so
            self.warn_of_others(args, kwargs)
            return self.function(*args, **kwargs)
        if signature in self.kernels:
            kernel = self.kernels[signature]
        else:
            kernel = self.kernel(signature)
        if kernel is None:
            return self.function(*args, **kwargs)
        flat = []
        for leaf, impl in zip(leaves, signature.impls, strict=True):
            flat.append(jnp.asarray(leaf) if impl is None else jax.random.key_data(leaf))
        flat.extend(kernel.captured)
        results = onekernel_p.bind(*flat, kernel=kernel, mapped=(False,) * len(flat), batched=False)
        return kernel.assemble(results)

    def kernel(self, signature: "Signature") -> "Kernel | None":
        """The kernel for arguments of these types; None if the function has to go by XLA."""
        try:
            kernel = Kernel(self.function, signature)
        except Unsupported as error:
            self.warn(str(error))
            kernel = None
        if kernel is None or not kernel.captured:  # what it captured belongs to this call alone
            self.kernels[signature] = kernel
        return kernel

    def warn(self, reason: str) -> None:
        """For a method that the call of the function calls."""
        name = getattr(self.function, "__qualname__", repr(self.function))
        warnings.warn(
            f"onekernel cannot compile {name}: {reason}; it runs by XLA", Fallback, stacklevel=4
        )

    def warn_of_others(self, args, kwargs) -> None:
        """Once for each place and type, of arguments that are no arrays."""
        others = []
        for (group, *path), leaf in jax.tree_util.tree_leaves_with_path((args, kwargs)):
            try:
                jax.typeof(leaf)
            except TypeError:
                place = ("args", "kwargs")[group.idx] + jax.tree_util.keystr(path)
                others.append(f"{place} is no array but of type {type(leaf).__name__}")
        reason = ", ".join(others)
        if reason not in self.others:
            self.others.add(reason)
            self.warn(reason)


@dataclasses.dataclass(frozen=True)
class Signature:
    """The types of a call's arguments, and what else decides how JAX traces a function."""

    tree: object
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    weak: tuple[bool, ...]
    impls: tuple[object, ...]  # of PRNG keys; None for other arrays
    settings: tuple

    @staticmethod
    def of(leaves, tree) -> "Signature":
        shapes = []
        dtypes = []
        weak = []
        impls = []
        for leaf in leaves:
            aval = jax.typeof(leaf)
            impl = key_impl(leaf)
            shapes.append(tuple(aval.shape))
            dtypes.append(np.dtype(aval.dtype).name if impl is None else "key")
            weak.append(bool(getattr(aval, "weak_type", False)))
            impls.append(impl)
        config = jax.config
        settings = (
            config.jax_enable_x64,
            config.jax_default_matmul_precision,
            config.jax_numpy_dtype_promotion,
            config.jax_numpy_rank_promotion,
            config.jax_threefry_partitionable,
            str(config.jax_default_prng_impl),
        )
        return Signature(tree, *map(tuple, (shapes, dtypes, weak, impls)), settings)

    def structs(self) -> list:
        """The arguments' types, for tracing."""
        structs = []
        for shape, dtype, weak, impl in zip(
            self.shapes, self.dtypes, self.weak, self.impls, strict=True
        ):
            if impl is None:
                structs.append(jax.ShapeDtypeStruct(shape, np.dtype(dtype), weak_type=weak))
            else:
                key = jax.eval_shape(lambda impl=impl: jax.random.key(0, impl=impl))
                structs.append(jax.ShapeDtypeStruct(shape, key.dtype))
        return structs

    def text(self) -> str:
        """The same for the same types in any process; without the tree, which `fingerprint` takes care of."""
        return repr(
            (self.shapes, self.dtypes, self.weak, [str(impl) for impl in self.impls], self.settings)
        )


@functools.cache
def versions() -> str:
    """Of what decides how a program is traced and compiled."""
    names = ("jax", "jaxlib", "llvmlite", "numpy")
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


@functools.cache
def source_hash(file: str) -> str:
    """Of a file of a platform's: how it has text compiled is in no text."""
    return hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()


class StructureReader(pickle.Unpickler):
    """Reads the structure of a function's results. It loads no module for the classes in it: those
    that the function returns belong to modules that are here already."""

    def find_class(self, module: str, name: str):
        if module not in sys.modules:
            raise pickle.UnpicklingError(f"{module} is not loaded")
        return super().find_class(module, name)


@contextlib.contextmanager
def no_collection():
    """Without Python's garbage collector, which would look again and again through the many small
    objects that a trace consists of, and which all stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Kernel:
    """A function, traced for arguments of certain types.

    captured: traced values of an enclosing jit or vmap that the function uses; they are operands
    like its arguments. out_shapes, out_dtypes: of its flat results, keys as their words. Tracing
    is put off until it is needed if the cache knows the results' types and the kernel that was
    made of the function before."""

    def __init__(self, function, signature: Signature):
        self.function = function
        self.signature = signature
        self.lock = threading.RLock()
        self.captured: list = []
        self.closed = None
        self.graphs: dict = {}
        self.targets: dict = {}
        self.key = None
        for dtype in signature.dtypes:
            if dtype != "key" and np.dtype(dtype) not in KINDS:
                raise Unsupported(f"arguments of type {dtype}")
        # Without a cache to look into, there is no need to know the function again.
        mark = fingerprint.fingerprint(function, signature.tree) if cache.folder() else None
        if mark is not None:
            # A file that runs as the script and one that is imported have classes of their own, and
            # the results' structure may hold them.
            module = str(getattr(function, "__module__", None))
            text = "\n".join((mark, module, signature.text(), versions()))
            self.key = hashlib.sha256(text.encode()).hexdigest()
            if self.restore():
                return
        with no_collection():
            self.trace()
            self.graph(default_platform())  # is everything in it known?
        if self.key is not None and not self.captured:
            self.keep()

    # What the cache knows of the function

    def keep(self) -> None:
        """Leaves the results' types to later processes."""
        try:
            tree = pickle.dumps(self.out_tree)
        except Exception:  # noqa: BLE001, a pytree's class may refuse in any way
            self.key = None
            return
        impls = [None if impl is None else str(impl) for impl in self.out_impls]
        header = {"shapes": self.out_shapes, "dtypes": self.out_dtypes, "impls": impls}
        cache.store(f"trace {self.key}", cache.pack(header, [tree]))

    def restore(self) -> bool:
        """Takes the results' types from the cache; whether they were there."""
        entry = cache.load(f"trace {self.key}")
        if entry is None:
            return False
        try:
            header, (tree,) = cache.unpack(entry)
            self.out_tree = StructureReader(io.BytesIO(tree)).load()
            self.out_shapes = [tuple(shape) for shape in header["shapes"]]
            self.out_dtypes = header["dtypes"]
            self.out_impls = header["impls"]
        except Exception:  # noqa: BLE001, an entry that cannot be read is as good as none
            return False
        return True

    # Tracing

    def trace(self) -> None:
        with self.lock:
            if self.closed is not None:
                return
            self.out_impls = []

            def flat(*leaves):
                args, kwargs = jax.tree.unflatten(self.signature.tree, leaves)
                results, self.out_tree = jax.tree.flatten(self.function(*args, **kwargs))
                self.out_impls = [key_impl(result) for result in results]
                return results

            closed = jax.make_jaxpr(flat)(*self.signature.structs())
            if closed.jaxpr.effects:
                names = ", ".join(str(effect) for effect in closed.jaxpr.effects)
                raise Unsupported(f"side effects ({names})")
            outs = [variable.aval for variable in closed.jaxpr.outvars]
            self.out_shapes = []
            self.out_dtypes = []
            for aval, impl in zip(outs, self.out_impls, strict=True):
                if impl is not None:
                    self.out_shapes.append((*aval.shape, *key_shape(impl)))
                    self.out_dtypes.append("uint32")
                    continue
                if aval.dtype not in KINDS:
                    raise Unsupported(f"results of type {aval.dtype}")
                self.out_shapes.append(tuple(aval.shape))
                self.out_dtypes.append(aval.dtype.name)
            self.consts = list(closed.consts)
            self.captured_places = [
                i for i, const in enumerate(self.consts) if isinstance(const, jax.core.Tracer)
            ]
            self.captured = [jnp.asarray(self.consts[i]) for i in self.captured_places]
            needed, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(outs), instantiate=True)
            self.jaxpr = needed
            self.closed = closed

    def operand_shapes(self) -> list[tuple[tuple[int, ...], str]]:
        """Of the flat operands: shape of one world's, keys as their words; and kind."""
        shapes = []
        for shape, dtype, impl in zip(
            self.signature.shapes, self.signature.dtypes, self.signature.impls, strict=True
        ):
            if impl is None:
                shapes.append((shape, KINDS[np.dtype(dtype)]))
            else:
                shapes.append(((*shape, *key_shape(impl)), "u"))
        for value in self.captured:
            shapes.append((tuple(value.shape), KINDS[np.dtype(value.dtype)]))
        return shapes

    def graph(self, platform: str) -> Graph:
        with self.lock:
            self.trace()
            if platform not in self.graphs:
                self.graphs[platform] = self.build(platform)
            return self.graphs[platform]

    def build(self, platform: str) -> Graph:
        for scalar_limit in SCALAR_LIMITS:
            graph = Graph(MOST_NODES)
            builder = Builder(graph, scalar_limit, platform)
            try:
                self.fill(builder)
            except TooLarge:
                continue
            return graph
        raise Unsupported(f"a program of more than {MOST_NODES} scalars")

    def fill(self, builder: Builder) -> None:
        """Takes the whole function apart, results included."""
        graph = builder.graph
        operands = []
        for number, (shape, kind) in enumerate(self.operand_shapes()):
            size = math.prod(shape)
            if size > min(LARGEST_INPUT, builder.scalar_limit):
                buffer = graph.buffer("input", kind, size, operand=number)
                operands.append(Memory(buffer, kind, shape, arrays.contiguous_strides(shape)))
                continue
            nodes = [graph.pinned("input", kind, extra=(number, i)) for i in range(size)]
            operands.append(Scalars(np.array(nodes, np.int64).reshape(shape), kind))
        count = len(self.signature.shapes)
        arguments = []
        for value, impl in zip(operands[:count], self.signature.impls, strict=True):
            arguments.append(value if impl is None else primitives.as_keys(builder, value, impl))
        consts = list(self.consts)
        for place, value in zip(self.captured_places, operands[count:], strict=True):
            consts[place] = value
        results = builder.evaluate(self.jaxpr, consts, arguments)
        for number, result in enumerate(results):
            value = primitives.base_array(builder, result) if isinstance(result, Keys) else result
            kind = kind_of(value)
            buffer = graph.buffer("output", kind, math.prod(value.shape), operand=number)
            strides = arrays.contiguous_strides(value.shape)
            target = Memory(buffer, kind, value.shape, strides)
            builder.last_loop = None
            if builder.platform == "cpu" and isinstance(value, Scalars):
                # Each takes an instruction there (see staging.py); a loop would need them in memory.
                builder.copy_into(target, value, unrolled=builder.scalar_limit)
            else:
                builder.copy_into(target, value)

    # Machine code

    def target(self, platform: str, mapped: tuple[bool, ...], batched: bool) -> tuple[str, int]:
        """The name by which XLA knows the kernel on a platform, and the scratch memory that it
        needs (see the platform's module)."""
        with self.lock:
            choice = (platform, mapped, batched)
            if choice not in self.targets:
                self.targets[choice] = self.make_target(*choice)
            return self.targets[choice]

    def make_target(self, platform: str, mapped, batched) -> tuple[str, int]:
        module = PLATFORMS[platform]
        identity = " ".join((module.identity(), str(mapped), str(batched), versions()))
        found = None
        if self.key is not None:
            found = self.load_code(f"code {self.key} {identity}")
        if found is None:
            graph = self.graph(platform)
            sizes = [math.prod(shape) for shape, _ in self.operand_shapes()]
            text, scratch = module.kernel_ir(
                graph, list(mapped), sizes, len(self.out_shapes), batched
            )
            sources = [source_hash(file) for file in module.SOURCES]
            digest = hashlib.sha256(
                "\n".join((text, module.identity(), versions(), *sources)).encode()
            )
            name = f"onekernel_{digest.hexdigest()[:32]}"
            places = [f"kernel {name}"]
            if self.key is not None:
                places.append(f"code {self.key} {identity}")
            found = self.load_code(places[0])
            if found is not None:
                keep_code(places[1:], *found)
            else:
                found = (name, scratch, start_compiling(module, text, places, name, scratch))
        name, scratch, code = found
        module.register(name, code, len(self.operand_shapes()), len(self.out_shapes), batched)
        return name, scratch

    @staticmethod
    def load_code(key: str) -> tuple[str, int, bytes] | None:
        entry = cache.load(key)
        if entry is None:
            return None
        try:
            header, (code,) = cache.unpack(entry)
            return header["name"], header["scratch"], code
        except Exception:  # noqa: BLE001, an entry that cannot be read is as good as none
            return None

    # For JAX

    def assemble(self, results):
        leaves = []
        for result, impl in zip(results, self.out_impls, strict=True):
            leaves.append(result if impl is None else jax.random.wrap_key_data(result, impl=impl))
        return jax.tree.unflatten(self.out_tree, leaves)

    def by_xla(self, *operands):
        """The flat results of one world, by the function's own primitives."""
        self.trace()
        count = len(self.signature.shapes)
        arguments = []
        for value, impl in zip(operands[:count], self.signature.impls, strict=True):
            arguments.append(value if impl is None else jax.random.wrap_key_data(value, impl=impl))
        consts = list(self.consts)
        for place, value in zip(self.captured_places, operands[count:], strict=True):
            consts[place] = value
        results = jax.core.eval_jaxpr(self.closed.jaxpr, consts, *arguments)
        return [
            result if impl is None else jax.random.key_data(result)
            for result, impl in zip(results, self.out_impls, strict=True)
        ]


def keep_code(places: list[str], name: str, scratch: int, code: bytes) -> None:
    """Leaves a kernel to later processes, under these keys."""
    for place in places:
        cache.store(place, cache.pack({"name": name, "scratch": scratch}, [code]))


def start_compiling(module, text: str, places: list[str], name: str, scratch: int):
    """The code of a kernel for the platform of that module, also left to later processes under
    those keys; or a function that does this, since it is still being compiled."""
    code = module.start_compiling(text)
    if isinstance(code, bytes):
        keep_code(places, name, scratch, code)
        return code

    def finish() -> bytes:
        compiled = code()
        keep_code(places, name, scratch, compiled)
        return compiled

    return finish


def key_impl(value):
    """The PRNG implementation of a key array; None for another value."""
    dtype = jax.typeof(value).dtype
    is_key = jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    return jax.random.key_impl(value) if is_key else None


@functools.cache
def key_shape(impl) -> tuple[int, ...]:
    """Of the words of one PRNG key."""
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl))).shape


def default_platform() -> str:
    name = jax.default_backend()
    return "cuda" if name == "gpu" else name if name in PLATFORMS else "cpu"


# The primitive ------------------------------------------------------------------------------------

onekernel_p = Primitive("onekernel")
onekernel_p.multiple_results = True


def result_types(*avals, kernel: Kernel, mapped, batched):
    lead = ()
    if batched:
        lead = next((aval.shape[0],) for aval, own in zip(avals, mapped, strict=True) if own)
    shapes = zip(kernel.out_shapes, kernel.out_dtypes, strict=True)
    return [result_type((*lead, *shape), dtype, avals) for shape, dtype in shapes]


def result_type(shape: tuple[int, ...], dtype: str, operands) -> jax.core.ShapedArray:
    """Of an array that is computed from operands of these types."""
    varying = frozenset().union(*(getattr(aval, "vma", ()) for aval in operands))
    extra = {}
    if varying:  # under shard_map: a result differs between devices if any operand does
        mesh = next(aval.sharding.mesh for aval in operands if aval.vma)
        extra["vma"] = varying
        extra["sharding"] = NamedSharding(mesh, PartitionSpec(*(None for _ in shape)))
    return jax.core.ShapedArray(shape, np.dtype(dtype), **extra)


onekernel_p.def_abstract_eval(result_types)


@functools.lru_cache(maxsize=4096)
def jitted(kernel: Kernel, mapped, batched):
    return jax.jit(
        lambda *operands: onekernel_p.bind(*operands, kernel=kernel, mapped=mapped, batched=batched)
    )


@onekernel_p.def_impl
def run(*operands, kernel: Kernel, mapped, batched):
    def by_primitives():
        kernel.trace()
        with jax.disable_jit():
            xla_call(kernel, mapped, batched, operands)

    name = getattr(kernel.function, "__qualname__", "function")
    return run_one(jitted(kernel, mapped, batched), operands, by_primitives, name)


def run_one(program, operands, by_primitives, name: str):
    """The results of a jitted program that is one primitive, under JAX's settings for debugging.

    Those would have it call itself without end: jax_disable_jit takes the program for a function
    of several primitives, and so do jax_debug_nans and jax_debug_infs where they find something.
    by_primitives: computes the same by XLA, one primitive at a time, and raises JAX's
    FloatingPointError where the first NaN or infinity arises.
    """
    config = jax.config
    finds = {"nan": config.jax_debug_nans and np.isnan, "inf": config.jax_debug_infs and np.isinf}
    if not (config.jax_disable_jit or any(finds.values())):
        return program(*operands)
    with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
        results = program(*operands)
    for kind, find in finds.items():
        for result in jax.tree.leaves(results):
            parts = result.addressable_shards if find and result.dtype == np.float32 else ()
            if any(find(part.data).any() for part in parts):
                by_primitives()
                raise FloatingPointError(f"invalid value ({kind}) encountered in {name}")
    return results


def batch(operands, axes, *, kernel: Kernel, mapped, batched):
    """jax.vmap: of a function of one world, one of many; of one of many worlds, one of all their
    worlds."""
    outer_mapped = [axis is not None for axis in axes]
    moved = [
        jnp.moveaxis(operand, axis, 0) if own else operand
        for operand, axis, own in zip(operands, axes, outer_mapped, strict=True)
    ]
    count = len(kernel.out_shapes)
    if not batched:
        results = onekernel_p.bind(*moved, kernel=kernel, mapped=tuple(outer_mapped), batched=True)
        return results, [0] * count
    outer = next(operand.shape[0] for operand, own in zip(moved, outer_mapped, strict=True) if own)
    inner = next(
        operand.shape[1 if own_outer else 0]
        for operand, own_outer, own in zip(moved, outer_mapped, mapped, strict=True)
        if own
    )
    both = []
    for operand, own_outer, own in zip(moved, outer_mapped, mapped, strict=True):
        if own_outer or own:
            if not own:
                operand = jnp.expand_dims(operand, 1)
            elif not own_outer:
                operand = jnp.expand_dims(operand, 0)
            operand = jnp.broadcast_to(operand, (outer, inner, *operand.shape[2:]))
            operand = operand.reshape(outer * inner, *operand.shape[2:])
        both.append(operand)
    any_mapped = tuple(a or b for a, b in zip(outer_mapped, mapped, strict=True))
    results = onekernel_p.bind(*both, kernel=kernel, mapped=any_mapped, batched=True)
    return [result.reshape(outer, inner, *result.shape[1:]) for result in results], [0] * count


batching.primitive_batchers[onekernel_p] = batch


def refuse_gradient(primals, tangents, *, kernel: Kernel, **_):
    name = getattr(kernel.function, "__qualname__", "function")
    raise TypeError(
        f"onekernel: a compiled function has no gradients. Differentiate the original: "
        f"onekernel.compile({name}).function"
    )


ad.primitive_jvps[onekernel_p] = refuse_gradient


def lower(platform: str | None, *operands, kernel: Kernel, mapped, batched):
    """What the primitive becomes in a program for a platform; None: any other platform."""
    worlds = 1
    if batched:
        worlds = next(x.shape[0] for x, own in zip(operands, mapped, strict=True) if own)
    if platform is None or not kernel.out_shapes:
        return xla_call(kernel, mapped, batched, operands)
    module = PLATFORMS[platform]
    problem = module.unavailable()
    if problem:
        warn_once(f"onekernel: {problem}; {platform} runs compiled functions by XLA")
        return xla_call(kernel, mapped, batched, operands)
    name, scratch = kernel.target(platform, mapped, batched)
    lead = (worlds,) if batched else ()
    types = [
        jax.ShapeDtypeStruct((*lead, *shape), np.dtype(dtype))
        for shape, dtype in zip(kernel.out_shapes, kernel.out_dtypes, strict=True)
    ]
    types.append(jax.ShapeDtypeStruct((module.scratch_size(scratch, worlds),), np.uint8))
    return jax.ffi.ffi_call(name, types)(*operands)[:-1]


def xla_call(kernel: Kernel, mapped, batched, operands):
    if not batched:
        return kernel.by_xla(*operands)
    axes = [0 if own else None for own in mapped]
    return jax.vmap(kernel.by_xla, in_axes=axes)(*operands)


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, Fallback, stacklevel=2)


for name in (None, *PLATFORMS):
    lowering = mlir.lower_fun(functools.partial(lower, name), multiple_results=True)
    mlir.register_lowering(onekernel_p, lowering, platform=name)


@rule("onekernel")
def inline(builder: Builder, equation, *values):
    """A compiled function within a compiled function: a part of its kernel."""
    params = equation.params

    def by_xla(*operands):
        return xla_call(params["kernel"], params["mapped"], params["batched"], operands)

    return primitives.traced(builder, by_xla, *values)
