"""Tell whether tracing a Python function again would give the same result, without tracing it.

JAX traces a function: it runs the Python code once, with stand-ins for the arrays, and records what
is computed. For a robot's physics that takes seconds. A later process may skip it and take the
compiled kernel from the disk, provided that nothing has changed which the recording depends on.
`fingerprint(function)` names all of that in one hash:

- The function's code, its defaults, what it closes over, and the global names that it reads; then
  the same for every function, class and object that is reached so. Python finds globals by name
  when the code runs, so the names come from the bytecode, and their values from the module.
- Code of installed packages (JAX, MuJoCo, ...) and of Python itself is not walked function by
  function. It counts by version, and by size and time of each source file, as people edit installed
  packages in place. On top of that comes what is bound to the names in the packages' loaded modules
  (see `_Bindings`), as people replace functions of a package while a program runs.
- The settings of JAX that change what is traced, the backend, and onekernel's own source.

A wrong "nothing has changed" would run yesterday's physics in today's experiment. So whatever is
not known to be safe gives None, and the caller traces: an object of a kind that is not listed here,
code that reads files, clocks or the environment, a package edited since the program started.
The other mistake, a new fingerprint though nothing of importance changed, costs only a trace.

Nothing that differs from process to process gets in: no addresses, no `hash`, no order of sets.
"""

import collections
import contextlib
import dataclasses
import dis
import enum
import functools
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import operator
import os
import pathlib
import platform
import re
import struct
import sys
import sysconfig
import time
import types
import typing

import jax
import numpy as np

_log = logging.getLogger(__name__)
_import_time = time.time()
_OWN_FOLDER = os.path.dirname(os.path.abspath(__file__))
_MAX_OBJECTS = 300_000  # in one walk; a robot's environment reaches a few thousand
_MAX_DEPTH = 20  # of sets within sets


class _Unknown(Exception):
    """Something was reached whose influence on a trace cannot be known."""


def fingerprint(function, structure: jax.tree_util.PyTreeDef | None = None) -> str | None:
    """A hash that changes whenever what `function` computes, when JAX traces it, may have changed.

    function: what JAX could trace: a function, bound method, functools.partial, wrapper of JAX or
        object with `__call__`. Its result may depend on nothing but its arguments and what it
        reaches.
    structure: of the arguments, so that the code of their classes counts as well. Their shapes and
        types do not; nor does the machine's CPU. The caller adds these to its key.

    Returns 64 hexadecimal digits, the same in every process, or None if that cannot be promised.
    Why, the logger `onekernel.fingerprint` says at level DEBUG.
    """
    try:
        walk = _Walk()
        walk.run(_settings())
        walk.run(function)
        walk.run(structure)
        walk.finish()
        return walk.text.hexdigest()
    except _Unknown as reason:
        _log.debug("%r has no fingerprint: %s", function, reason)
    except Exception:  # of an object's own code, which must not stop the program: in doubt, trace
        _log.debug("%r has no fingerprint", function, exc_info=True)
    return None


# ---- Whose code it is ----------------------------------------------------------------------------

_USER = "the user's"  # walked function by function; editable installs are the user's as well
_STDLIB = "Python's own"
_SITE_FOLDERS = ("site-packages", "dist-packages")
_STDLIB_FOLDERS = tuple(
    {
        form(folder) + os.sep
        for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
        for form in (os.path.abspath, os.path.realpath)
    }
)


@functools.cache
def _owner_of_file(path: str) -> str:
    """_USER, _STDLIB, or the folder of an installed package (of a single module, the file)."""
    if path.startswith("<frozen "):
        return _STDLIB
    path = os.path.abspath(path)
    parts = path.split(os.sep)
    for index in reversed(range(len(parts) - 1)):
        if parts[index] in _SITE_FOLDERS:
            return os.sep.join(parts[: index + 2])
    if path.startswith(_OWN_FOLDER + os.sep):
        return _OWN_FOLDER
    return _STDLIB if path.startswith(_STDLIB_FOLDERS) else _USER


def _owner_of_module(name: str) -> str | None:
    """The same for a loaded module. None if it is not loaded, or nobody knows where it is from."""
    module = sys.modules.get(name)
    if module is None:
        return None
    if name == "__main__":
        return _USER
    file = vars(module).get("__file__")
    if isinstance(file, str):
        return _owner_of_file(file)
    if name.partition(".")[0] in sys.stdlib_module_names:
        return _STDLIB
    for folder in vars(module).get("__path__", ()):  # of a namespace package
        return _owner_of_file(os.path.join(folder, "__init__.py"))
    parent = name.rpartition(".")[0]  # modules inside of a compiled module have no file
    return _owner_of_module(parent) if parent else None


def _by_name(module: str, name: str):
    """What `name`, perhaps with dots, is bound to in a loaded module; None if to nothing."""
    if module not in sys.modules:
        return None
    first, *rest = name.split(".")
    value = vars(sys.modules[module]).get(first)
    for part in rest:
        if not isinstance(value, type):
            return None
        value = next((vars(base)[part] for base in value.__mro__ if part in vars(base)), None)
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value


def _address(value) -> tuple[str, str] | None:
    """Module and name of a function, class or the like that is found there; None if it is not."""
    attributes = _instance_dict(value)
    if isinstance(value, type | types.FunctionType) or attributes is None:
        module = getattr(value, "__module__", None)
        name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    else:  # an instance has some of these from its class: they say nothing about itself
        module = attributes.get("__module__")
        name = attributes.get("__qualname__") or attributes.get("__name__")
    if isinstance(module, str) and isinstance(name, str) and _by_name(module, name) is value:
        return module, name
    return None


def _wraps_user_code(value) -> bool:
    """Whether the user's code is behind a wrapper, which may have copied another one's name."""
    for _ in range(100):
        if isinstance(value, types.FunctionType) and _owner_of_function(value) == _USER:
            return True
        value = getattr(value, "__wrapped__", None)
        if value is None:
            return False
    return True


def _instance_dict(value) -> dict | None:
    """`value.__dict__`, whatever the class does to attributes; None if there is none."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        return None
    return found if type(found) is dict else None


def _owner_of_function(function: types.FunctionType) -> str:
    """By the file of its code, as decorators copy the name of the module onto other functions."""
    path = function.__code__.co_filename
    if not path.startswith("<") or path.startswith("<frozen "):
        return _owner_of_file(path)
    # Made from a string, like the methods of data classes: known only if it is where it says.
    address = _address(function)
    return (address and _owner_of_module(address[0])) or _USER


# ---- What code reads -----------------------------------------------------------------------------

# Modules, global names and attributes through which a trace could depend on more than the program.
_IMPURE_MODULES = frozenset(
    """ctypes datetime ftplib genericpath glob http importlib io linecache multiprocessing nt os
    pkgutil posix random runpy secrets select shutil signal socket sqlite3 ssl subprocess tempfile
    time urllib uuid _datetime _io _random _socket""".split()
)
_IMPURE_GLOBALS = frozenset("open input eval exec globals breakpoint __import__ compile".split())
_IMPURE_ATTRIBUTES = frozenset(
    """environ from_file from_xml_path fromfile genfromtxt getenv import_module imread is_dir is_file
    isatty iterdir load_module loadtxt memmap open read_bytes read_csv read_text urandom""".split()
)
_IMPURE_FUNCTIONS = frozenset(["load", "fromregex", "DataSource"])  # of NumPy and JAX
# Names through which a trace could depend on how many devices or processes there are.
_DEVICE_NAMES = frozenset(
    """devices local_devices device_count local_device_count process_index process_count
    make_mesh""".split()
)
# What only prints, or ends the program: no trace comes out of it, or the same one.
_HARMLESS = frozenset([("os", "_exit"), ("sys", "stdout"), ("sys", "stderr")])
# Names through which an object could make another of its class, and so run __init__.
_CLASS_NAMES = frozenset(["type", "__class__"])
# Functions that do so for whatever they are given, where names alone do not show it.
_COPIERS = frozenset([("dataclasses", "replace"), ("copy", "replace")])
_LOADS_GLOBAL = frozenset(["LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"])
_LOADS_ATTRIBUTE = frozenset(["LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"])


class _Reads(typing.NamedTuple):
    """What a code object and those within it read from outside."""

    # Global names, each with the attributes taken of it at once: ("jnp", "linalg", "norm").
    chains: tuple[tuple[str, ...], ...]
    imports: tuple[tuple[int, str, str | None], ...]  # level, module, name in it
    names: frozenset[str]  # of all globals and attributes


@functools.lru_cache(maxsize=10_000)
def _reads(code: types.CodeType) -> _Reads:
    """Take the names from the bytecode. `_Unknown` if it changes globals, or reads impure names."""
    chains: dict[tuple[str, ...], None] = {}  # as an ordered set
    imports: dict[tuple[int, str, str | None], None] = {}
    names = set()
    chain: tuple[str, ...] = ()  # that ends with the last instruction, and may go on
    imported = (0, "")  # level and name of the module of the last import
    before: list = [None, None]  # the arguments of the last two instructions
    for instruction in dis.get_instructions(code):
        operation = instruction.opname
        argument = instruction.argval
        if operation == "EXTENDED_ARG":
            continue
        if operation in _LOADS_ATTRIBUTE:
            names.add(argument)
            if chain:
                chain = (*chain, argument)
        else:
            if chain:
                chains[chain] = None
            chain = ()
        if operation in _LOADS_GLOBAL:
            names.add(argument)
            chain = (argument,)
        elif operation == "IMPORT_NAME":
            level, from_list = before
            imported = (level, argument)
            if not from_list:
                imports[(*imported, None)] = None
        elif operation == "IMPORT_FROM":
            imports[(*imported, argument)] = None
        elif operation in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            raise _Unknown(f"{code.co_name} changes the global name {argument}")
        before = [before[1], argument]
    if impure := names & _IMPURE_ATTRIBUTES:
        raise _Unknown(f"{code.co_name} reads {sorted(impure)[0]}")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _reads(constant)
            chains |= dict.fromkeys(inner.chains)
            imports |= dict.fromkeys(inner.imports)
            names |= inner.names
    return _Reads(tuple(chains), tuple(imports), frozenset(names))


# ---- The walk over everything that is reached ----------------------------------------------------


class _Methods(typing.NamedTuple):
    """A class as its instances need it: they exist already, so __init__ will not run for them, nor
    will a cached property whose value they hold."""

    of: type


class _Nothing:
    """Written where there is no value: an empty cell, a name that is not bound."""


_NOTHING = _Nothing()


class _Bound(typing.NamedTuple):
    """What the user's code finds under a name in a module of a package or of Python."""

    module: str
    name: str
    value: object


class _Walk:
    """Visits what is reached, each object once, in an order that the program determines.

    For each it writes the kind, the object's own data and the number of its children; then follow
    the children. So the text can be read in one way only, and two different graphs of objects
    cannot give the same text. An object that was visited before is written as its number.
    """

    def __init__(self, whole: "_Walk | None" = None):
        """whole: the walk that this is a part of, which has a text and numbers of its own."""
        self.text = hashlib.sha256()
        self.numbers: dict[tuple[str, int], int] = {}
        self.alive: list = []  # what has a number, or its id could become that of another object
        self.stack: list = []
        self.depth: int = whole.depth + 1 if whole else 0
        self.count: list[int] = whole.count if whole else [0]  # of all objects, in all parts
        self.modules: dict[str, types.ModuleType] = whole.modules if whole else {}  # installed ones
        self.names: set[str] = whole.names if whole else set()  # that the user's code reads
        self.without_init: dict[type, None] = whole.without_init if whole else {}

    def run(self, value) -> None:
        """Visit `value` and all behind it. Without recursion, as chains of objects can be long."""
        self.stack.append(value)
        while self.stack:
            self.count[0] += 1
            if self.count[0] > _MAX_OBJECTS:
                raise _Unknown("it reaches too many objects")
            self.visit(self.stack.pop())

    def digest_of(self, value) -> str:
        """A hash of `value` alone, whatever was visited before."""
        if self.depth > _MAX_DEPTH:
            raise _Unknown("sets within sets, too deep")
        part = _Walk(self)
        part.run(value)
        return part.text.hexdigest()

    def write(self, kind: str, *data: str | bytes, children=()) -> None:
        """Write one object, and note that its children come next."""
        for item in (kind, *data, str(len(children))):
            encoded = item.encode(errors="surrogatepass") if isinstance(item, str) else item
            self.text.update(b"%d:" % len(encoded))
            self.text.update(encoded)
        self.stack.extend(reversed(children))

    def is_repeated(self, value, aspect: str = "") -> bool:
        """Whether it was visited before, and is now written as its number; if not, number it."""
        key = (aspect, id(value))
        if key in self.numbers:
            self.write("again", str(self.numbers[key]))
            return True
        self.numbers[key] = len(self.numbers)
        self.alive.append(value)
        return False

    def reach(self, module_name: str) -> None:
        """Note a module whose code may run: of an installed package, or of Python itself."""
        owner = _owner_of_module(module_name)
        if owner == _STDLIB:
            if module_name.partition(".")[0] in _IMPURE_MODULES:
                raise _Unknown(f"it uses the module {module_name}")
        elif owner not in (_USER, None):
            if module_name.startswith("numpy.random"):
                raise _Unknown("it uses NumPy's random numbers")
            self.modules[module_name] = sys.modules[module_name]

    def visit(self, value) -> None:
        kind = type(value)
        visit = _VISITS.get(kind)
        if visit is None:
            visit = next((v for base, v in _VISITS_OF_DERIVED if issubclass(kind, base)), None)
        (visit or _Walk.visit_other)(self, value)

    # Plain data

    def visit_nothing(self, value: _Nothing) -> None:
        self.write("nothing")

    def visit_atom(self, value) -> None:
        self.write(type(value).__name__, str(value))

    def visit_bytes(self, value: bytes) -> None:
        self.write("bytes", value)

    def visit_float(self, value: float) -> None:
        self.write("float", struct.pack("<d", value))

    def visit_complex(self, value: complex) -> None:
        self.write("complex", struct.pack("<dd", value.real, value.imag))

    def visit_by_repr(self, value) -> None:
        self.write(type(value).__name__, repr(value))

    def visit_tuple(self, value: tuple) -> None:
        """Never as a number: which equal tuples are one object, Python decides as it likes."""
        self.write("tuple", children=value)

    def visit_list(self, value) -> None:
        """list, deque: with their length limit, as they may contain themselves by their number."""
        if not self.is_repeated(value):
            extent = str(getattr(value, "maxlen", None))
            self.write(type(value).__name__, extent, children=list(value))

    def visit_dict(self, value) -> None:
        """dict, OrderedDict, mappingproxy: in their order, which a trace may depend on."""
        if value is sys.modules:
            raise _Unknown("it uses the table of all modules")
        if not self.is_repeated(value):
            self.write(type(value).__name__, children=_flat(value.items()))

    def visit_namespace(self, value: types.SimpleNamespace) -> None:
        if not self.is_repeated(value):
            self.write("namespace", children=_flat(vars(value).items()))

    def visit_logger(self, value: logging.Logger) -> None:
        """What it logs changes no trace."""
        self.write("logger", value.name)

    def visit_set(self, value) -> None:
        self.write(type(value).__name__, *sorted(self.digest_of(item) for item in value))

    def visit_slice(self, value: slice | range) -> None:
        self.write(type(value).__name__, children=[value.start, value.stop, value.step])

    def visit_pattern(self, value: re.Pattern) -> None:
        self.write("pattern", str(value.flags), children=[value.pattern])

    def visit_path(self, value: pathlib.PurePath) -> None:
        self.write("path", type(value).__name__, str(value))

    def visit_enum(self, value: enum.Enum) -> None:
        self.write("enum", str(value._name_), children=[_Methods(type(value)), value._value_])

    # Arrays

    def visit_dtype(self, value: np.dtype) -> None:
        self.write("dtype", repr(value))

    def visit_numpy(self, value: np.ndarray | np.generic, kind: str = "numpy") -> None:
        if value.dtype.hasobject:
            if not self.is_repeated(value):
                self.write("objects", repr(value.shape), children=list(value.flat))
            return
        content = hashlib.sha256(value.tobytes()).digest()
        scalar = str(isinstance(value, np.generic))
        self.write(kind, scalar, repr(value.dtype), repr(value.shape), content)

    def visit_subclass_of_array(self, value: np.ndarray) -> None:
        raise _Unknown(f"an array of type {type(value)}")

    def visit_jax_array(self, value: jax.Array) -> None:
        if isinstance(value, jax.core.Tracer):
            raise _Unknown("a value that is being traced")
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            with jax.ensure_compile_time_eval():
                data = np.asarray(jax.random.key_data(value))
            self.write("key", str(jax.random.key_impl(value)), children=[data])
            return
        weak = bool(getattr(value, "weak_type", False))  # decides on the type of what it meets
        self.visit_numpy(np.asarray(value), f"jax, weak {weak}")

    def visit_treedef(self, value: jax.tree_util.PyTreeDef) -> None:
        node = value.node_data()
        if node is None:
            self.write("leaf")
        else:
            kind, data = node
            self.write("tree", children=[kind, data, *value.children()])

    # Modules, and what is found in them

    def visit_module(self, value: types.ModuleType) -> None:
        """A module that the code does more with than take a named attribute."""
        owner = _owner_of_module(value.__name__)
        if owner is not None and owner != _USER:
            self.reach(value.__name__)
            self.write("module", value.__name__)
        elif not self.is_repeated(value):
            items = [item for item in vars(value).items() if not _is_dunder(item[0])]
            self.write("user's module", children=_flat(items))

    def visit_address(self, module: str, name: str) -> None:
        """A function or class that is where a package or Python defined it."""
        if name in _IMPURE_FUNCTIONS and module.partition(".")[0] in ("numpy", "jax"):
            raise _Unknown(f"it uses {module}.{name}")
        if (module, name) in _COPIERS:
            self.names.add("__class__")
        self.reach(module)
        self.write("of package", module, name)

    def visit_bound(self, value: _Bound) -> None:
        """By what it is. JAX's own objects, such as primitives, and compiled ones hide what they
        are, but users do not change them: by their place, as the package's files make them."""
        if (value.module, value.name) in _HARMLESS:
            self.write("harmless", value.module, value.name)
            return
        self.reach(value.module)
        content = value.value
        kind = type(content)
        if not issubclass(kind, type) and _address(content) is None:
            from_jax = kind.__module__.partition(".")[0] in ("jax", "jaxlib")
            opaque = _instance_dict(content) is None and kind not in _VISITS
            if (from_jax and not isinstance(content, jax.Array)) or (
                opaque and _owner_of_module(kind.__module__) not in (_USER, None)
            ):
                self.write("bound", value.module, value.name, kind.__qualname__)
                return
        self.stack.append(content)

    # Code

    def visit_code(self, value: types.CodeType) -> None:
        """What it does, and not where it stands: file and line numbers do not count."""
        counts = (value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount)
        self.write(
            "code",
            repr((value.co_name, counts, value.co_flags)),
            repr((value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)),
            value.co_code,
            getattr(value, "co_exceptiontable", b""),
            children=value.co_consts,
        )

    def visit_function(self, value: types.FunctionType) -> None:
        if address := self.package_address(value):
            self.visit_address(*address)
            return
        if self.is_repeated(value):
            return
        children = [value.__code__, value.__defaults__, value.__kwdefaults__]
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:
                content = _NOTHING
            makes_none = name == "__class__" or _is_generated(value)
            is_looked_at = makes_none and isinstance(content, type)
            children.append(_Methods(content) if is_looked_at else content)
        children += _flat(item for item in vars(value).items() if item[0] not in _NOT_HASHED)
        if _owner_of_function(value) == _USER:
            children += self.read_from_outside(value)
        else:  # a package made it when it was called, perhaps around functions of the user
            self.reach(value.__globals__["__name__"])
        self.write("function", children=children)

    def read_from_outside(self, function: types.FunctionType) -> list:
        """The names that the code reads from its module, each with its value."""
        reads = _reads(function.__code__)
        if not _is_generated(function):
            self.names |= reads.names
        found = []
        scope = function.__globals__
        for name, *attributes in reads.chains:
            if name in scope:
                value = _follow(scope[name], attributes)
            elif name not in function.__builtins__:
                value = _NOTHING  # at most the code of a branch that is never taken reads it
            elif name in _IMPURE_GLOBALS:
                raise _Unknown(f"{function.__qualname__} uses {name}()")
            else:
                value = function.__builtins__[name]
            found += [".".join([name, *attributes]), value]
        for level, name, attribute in reads.imports:
            module_name = importlib.util.resolve_name("." * level + name, scope.get("__package__"))
            module = sys.modules.get(module_name)
            if module is None:
                raise _Unknown(f"{function.__qualname__} imports {module_name}, not yet loaded")
            found += [module_name, _follow(module, [attribute] if attribute else [])]
            if not attribute:  # `import a.b` gives the code `a`
                found.append(sys.modules[module_name.partition(".")[0]])
        return found

    def visit_method(self, value: types.MethodType) -> None:
        self.write("method", children=[value.__func__, value.__self__])

    def visit_builtin(self, value: types.BuiltinFunctionType) -> None:
        """A compiled function, or the method of a built-in object, as in `[].append`."""
        if address := _address(value):
            self.visit_address(*address)
        elif value.__self__ is None or isinstance(value.__self__, types.ModuleType):
            raise _Unknown(f"the compiled function {value.__qualname__}")
        else:
            self.write("built-in method", value.__name__, children=[value.__self__])

    def visit_descriptor(self, value) -> None:
        kind = type(value).__name__
        self.write(kind, value.__name__, children=[_Methods(value.__objclass__)])

    def visit_tuple_field(self, value) -> None:
        """What a named tuple's class has for a field: the place in the tuple."""
        self.write("tuple field", str(value.__reduce__()[1][0]))

    def visit_property(self, value: property) -> None:
        self.write("property", children=[value.fget, value.fset, value.fdel])

    def visit_static_method(self, value: staticmethod | classmethod) -> None:
        self.write(type(value).__name__, children=[value.__func__])

    def visit_cached_property(self, value: functools.cached_property) -> None:
        self.write("cached property", str(value.attrname), children=[value.func])

    def visit_partial(self, value: functools.partial) -> None:
        """functools.partial, and jax.tree_util.Partial, which derives from it."""
        if not self.is_repeated(value):
            parts = [_Methods(type(value)), value.func, value.args, value.keywords]
            self.write("partial", children=parts + _flat(vars(value).items()))

    def visit_operator(self, value) -> None:
        """operator.itemgetter and the like, which say what they are only for pickle."""
        self.write("operator", children=list(value.__reduce__()))

    def visit_cache(self, value) -> None:
        """A function under functools.cache."""
        if address := self.package_address(value):
            self.visit_address(*address)
        elif not self.is_repeated(value):
            self.write("cache", children=[value.__wrapped__])

    def visit_jit(self, value) -> None:
        if address := self.package_address(value):
            self.visit_address(*address)
        elif not self.is_repeated(value):
            settings = value._jit_info._asdict()
            for name in ("fun_sourceinfo", "fun_signature"):  # file and line; what the code says
                settings.pop(name, None)
            self.write("jit", children=[value.__wrapped__, settings])

    def package_address(self, value) -> tuple[str, str] | None:
        """The address of what an installed package or Python, not the user, defined."""
        address = _address(value)
        if address is None or _owner_of_module(address[0]) in (_USER, None):
            return None
        return None if _wraps_user_code(value) else address

    # Classes and their instances

    def visit_class(self, value: type) -> None:
        """A class that code can name, and so construct."""
        if _is_package_class(value):
            self.visit_address(value.__module__, value.__qualname__)
        elif not self.is_repeated(value):
            constructors = [
                vars(base)[name]
                for base in value.__mro__
                for name in ("__new__", "__init__")
                if name in vars(base)
            ]
            properties = _cached_properties(value, {})
            self.write("constructors", children=[_Methods(value), *constructors, *properties])

    def visit_methods(self, value: _Methods) -> None:
        kind = value.of
        if _is_package_class(kind):
            self.visit_address(kind.__module__, kind.__qualname__)
            return
        if not kind.__flags__ & _HEAP_TYPE:  # compiled
            if kind.__module__ != "builtins":
                raise _Unknown(f"the compiled class {kind}")
            self.write("built-in class", kind.__qualname__)
            return
        if self.is_repeated(kind, "methods"):
            return
        self.without_init[kind] = None
        children = [type(kind), *(_Methods(base) for base in kind.__bases__)]
        children.append(_pytree_functions(kind))
        if issubclass(kind, enum.Enum):
            children += _flat((name, item._value_) for name, item in kind.__members__.items())
        for name, item in vars(kind).items():
            if name in _NOT_HASHED or name in ("__new__", "__init__"):
                continue
            if issubclass(kind, enum.Enum) and not isinstance(item, _CODE_IN_CLASSES):
                continue  # the members, and what the enum module derives from them
            if isinstance(item, functools.cached_property):
                item = _NOTHING  # an instance without its value leads to it
            elif isinstance(item, classmethod):  # it is given the class, and may construct one
                children.append(kind)
            children += [name, item]
        self.write("class", kind.__qualname__, children=children)

    def visit_field(self, value: dataclasses.Field) -> None:
        settings = (value.name, value.init, value.compare, value.kw_only, value._field_type.name)
        defaults = [value.default, value.default_factory, value.metadata]
        self.write("field", repr(settings), children=defaults)

    def visit_derived(self, value) -> None:
        """An instance of a class derived from a built-in one: its data, and its attributes."""
        if self.is_repeated(value):
            return
        if not _is_plain(type(value)) and type(value) is not collections.defaultdict:
            raise _Unknown(f"an object of the compiled type {type(value)}")
        base = next(base for base in _BUILTIN_DATA if isinstance(value, base))
        plain = _BUILTIN_DATA[base](value)
        parts = [_Methods(type(value)), plain, *_attributes(value)]
        self.write(
            "derived", children=parts + _cached_properties(type(value), _instance_dict(value))
        )

    def visit_mujoco_model(self, value) -> None:
        mujoco = sys.modules["mujoco"]
        content = np.zeros(mujoco.mj_sizeModel(value), np.uint8)
        mujoco.mj_saveModel(value, None, content)
        self.reach("mujoco")
        self.write("MjModel", hashlib.sha256(content.tobytes()).digest())

    def visit_other(self, value) -> None:
        kind = type(value)
        module = kind.__module__
        if isinstance(value, jax.Array | jax.core.Tracer):
            self.visit_jax_array(value)
        elif address := self.package_address(value):
            self.visit_address(*address)
        elif isinstance(value, jax.Device):
            self.write("device", repr((value.platform, value.device_kind, value.id)))
        elif module == "typing":
            self.write("type hint", repr(value))
        elif _owner_of_module(module) == _OWN_FOLDER and hasattr(value, "__wrapped__"):
            # A compiled function. The kernels that it holds follow from the function.
            self.write("compiled", kind.__qualname__, children=[value.__wrapped__])
        elif module == "mujoco._structs" and kind.__name__ == "MjModel":
            self.visit_mujoco_model(value)
        elif module == "mujoco._enums":
            self.write("MuJoCo's enum", kind.__name__, str(int(value)))
        elif module == "unittest.mock" or isinstance(value, jax.sharding.Mesh):
            raise _Unknown(f"an object of type {kind}")
        elif not _is_plain(kind):
            raise _Unknown(f"an object of the compiled type {kind}")
        elif not self.is_repeated(value):
            properties = _cached_properties(kind, _instance_dict(value))
            self.write("instance", children=[_Methods(kind), *_attributes(value), *properties])

    # The end

    def finish(self) -> None:
        """Add what the objects visited so far depend on besides: classes, packages, devices."""
        bindings = _Bindings()
        has_constructors = False
        while True:
            bindings.follow(self.modules)
            if bindings.strays:
                strays = sorted(bindings.strays, key=operator.itemgetter(0))
                bindings.strays = []
                self.run(tuple(strays))
            elif self.names & _CLASS_NAMES and not has_constructors:
                has_constructors = True
                self.run(tuple(self.without_init))
            else:
                break
        self.run(tuple(bindings.digests()))
        packages = {_owner_of_module(name) for name in bindings.lines}
        for package in sorted(packages):
            name = os.path.basename(package)
            self.run((name, _version(name), _files_of(package)))
        if self.names & _DEVICE_NAMES:
            self.run([(d.platform, d.device_kind, d.id, d.process_index) for d in jax.devices()])
            self.run((jax.process_index(), jax.process_count()))


def _flat(items) -> list:
    """[a, b, c, d] of the pairs (a, b), (c, d)."""
    return [part for item in items for part in item]


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _is_generated(function: types.FunctionType) -> bool:
    """Whether it is like __eq__ of data classes, which looks at classes, but makes nothing."""
    return function.__code__.co_filename == "<string>" and _is_dunder(function.__name__)


def _follow(value, attributes: list[str]):
    """What code finds that takes these attributes of a global value, one after the other, as far as
    they are attributes of modules: those of objects count with their object."""
    place = None
    for attribute in attributes:
        if not isinstance(value, types.ModuleType):
            break
        module = value.__name__
        is_users = _owner_of_module(module) in (_USER, None)
        if module == __package__:  # which imports some of its modules when it is asked for them
            with contextlib.suppress(AttributeError, ImportError):
                getattr(value, attribute)
        if attribute in vars(value):
            value = vars(value)[attribute]
        elif is_users:
            raise _Unknown(f"{module} makes {attribute} when it is asked for it")
        else:
            value = _NOTHING  # not yet loaded
        place = None if is_users else (module, attribute)
    if place is None or isinstance(value, types.ModuleType):
        return value
    return _Bound(*place, value)


def _is_package_class(kind: type) -> bool:
    """Whether a class is found where it says, in an installed package or in Python."""
    address = _address(kind)
    return address is not None and _owner_of_module(address[0]) not in (_USER, None)


def _cached_properties(kind: type, held: dict | None) -> list[functools.cached_property]:
    """Those that an instance that holds these attributes would have to compute."""
    # An instance of a data class can make another one, which holds none.
    held = {} if held is None or hasattr(kind, "replace") else held
    found = [item for base in kind.__mro__ for item in vars(base).values()]
    properties = [item for item in found if type(item) is functools.cached_property]
    return [item for item in properties if item.attrname not in held]


def _pytree_functions(kind: type):
    """How JAX takes apart an instance of a class, and puts one together; None if it does not."""
    return jax._src.tree_util._registry.get(kind)  # there is no public way to ask


def _is_plain(kind: type) -> bool:
    """Whether instances hold nothing but their `__dict__`, their slots and the data of a built-in
    type: told by their size, as compiled classes have fields that Python does not see."""
    base = next(base for base in kind.__mro__ if not base.__flags__ & _HEAP_TYPE)
    if base is not object and base not in _BUILTIN_DATA:
        return False
    slots = sum(
        isinstance(item, types.MemberDescriptorType)
        for derived in kind.__mro__
        if derived.__flags__ & _HEAP_TYPE
        for item in vars(derived).values()
    )
    pointers = slots + _inline_pointers(kind) - _inline_pointers(base)
    return kind.__basicsize__ == base.__basicsize__ + pointers * struct.calcsize("P")


def _inline_pointers(kind: type) -> int:
    """How many of the pointers to `__dict__` and to weak references lie within an instance."""
    has_dict = kind.__dictoffset__ > 0 or kind.__dictoffset__ == -struct.calcsize("P")
    return has_dict + (kind.__weakrefoffset__ > 0)


def _attributes(value) -> list:
    """What an instance holds: names and values, of its `__dict__` and of its slots."""
    held = [(k, v) for k, v in (_instance_dict(value) or {}).items() if k not in _NOT_HASHED]
    linen = sys.modules.get("flax.linen")
    if linen and isinstance(value, linen.Module):  # Flax numbers its modules, one after the other
        fields = {field.name for field in dataclasses.fields(value)}
        held = [item for item in held if item[0] in fields]
    for base in type(value).__mro__:
        for name, member in vars(base).items():
            if isinstance(member, types.MemberDescriptorType):
                try:
                    held.append((name, member.__get__(value)))
                except AttributeError:  # a slot without a value
                    held.append((name, _NOTHING))
    return _flat(held)


_HEAP_TYPE = 1 << 9  # flag of classes that were made at run time, as those of Python code are
# Made by Python, by compilers of classes or by caches; texts for people: no part of what code does.
_NOT_HASHED = frozenset(
    """__module__ __name__ __qualname__ __doc__ __dict__ __weakref__ __annotations__ __annotate__
    __annotate_func__ __annotations_cache__ __firstlineno__ __static_attributes__
    __abstractmethods__ _abc_impl __orig_bases__ __parameters__ __type_params__""".split()
)
_CODE_IN_CLASSES = (
    types.FunctionType,
    property,
    staticmethod,
    classmethod,
    functools.cached_property,
)
_BUILTIN_DATA = {  # the built-in part of an instance of a derived class
    dict: lambda value: dict(dict.items(value)),
    list: lambda value: list(list.__iter__(value)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
    str: str.__str__,
    bytes: lambda value: bytes(bytes.__iter__(value)),
    int: int.__int__,
    float: float.__float__,
    complex: complex.__complex__,
}
_VISITS = {
    _Nothing: _Walk.visit_nothing,
    _Methods: _Walk.visit_methods,
    _Bound: _Walk.visit_bound,
    type(None): _Walk.visit_atom,
    bool: _Walk.visit_atom,
    int: _Walk.visit_atom,
    str: _Walk.visit_atom,
    type(Ellipsis): _Walk.visit_atom,
    type(NotImplemented): _Walk.visit_atom,
    bytes: _Walk.visit_bytes,
    float: _Walk.visit_float,
    complex: _Walk.visit_complex,
    types.GenericAlias: _Walk.visit_by_repr,
    types.UnionType: _Walk.visit_by_repr,
    tuple: _Walk.visit_tuple,
    list: _Walk.visit_list,
    collections.deque: _Walk.visit_list,
    dict: _Walk.visit_dict,
    collections.OrderedDict: _Walk.visit_dict,
    types.MappingProxyType: _Walk.visit_dict,
    types.SimpleNamespace: _Walk.visit_namespace,
    set: _Walk.visit_set,
    frozenset: _Walk.visit_set,
    slice: _Walk.visit_slice,
    range: _Walk.visit_slice,
    re.Pattern: _Walk.visit_pattern,
    np.ndarray: _Walk.visit_numpy,
    np.memmap: _Walk.visit_numpy,
    type(jax.tree_util.tree_structure(0)): _Walk.visit_treedef,
    types.CodeType: _Walk.visit_code,
    types.FunctionType: _Walk.visit_function,
    types.MethodType: _Walk.visit_method,
    types.BuiltinFunctionType: _Walk.visit_builtin,
    types.MethodWrapperType: _Walk.visit_builtin,
    types.GetSetDescriptorType: _Walk.visit_descriptor,
    types.MemberDescriptorType: _Walk.visit_descriptor,
    types.WrapperDescriptorType: _Walk.visit_descriptor,
    types.MethodDescriptorType: _Walk.visit_descriptor,
    types.ClassMethodDescriptorType: _Walk.visit_descriptor,
    type(_Methods.of): _Walk.visit_tuple_field,
    property: _Walk.visit_property,
    staticmethod: _Walk.visit_static_method,
    classmethod: _Walk.visit_static_method,
    functools.cached_property: _Walk.visit_cached_property,
    operator.attrgetter: _Walk.visit_operator,
    operator.itemgetter: _Walk.visit_operator,
    operator.methodcaller: _Walk.visit_operator,
    type(functools.cache(len)): _Walk.visit_cache,
    type(jax.jit(len)): _Walk.visit_jit,
    dataclasses.Field: _Walk.visit_field,
}
_VISITS_OF_DERIVED = [
    (types.ModuleType, _Walk.visit_module),
    (type, _Walk.visit_class),
    (enum.Enum, _Walk.visit_enum),
    (np.generic, _Walk.visit_numpy),
    (np.ndarray, _Walk.visit_subclass_of_array),
    (np.dtype, _Walk.visit_dtype),
    (functools.partial, _Walk.visit_partial),
    (pathlib.PurePath, _Walk.visit_path),
    (logging.Logger, _Walk.visit_logger),
    *((base, _Walk.visit_derived) for base in _BUILTIN_DATA),
]


# ---- What packages bind to their names -----------------------------------------------------------


class _Bindings:
    """What the names in loaded modules of installed packages are bound to.

    A program can replace a function of a package, as `unittest.mock.patch` does, or change a table
    or a constant in it. The package's files say nothing of that. So the modules' names are looked
    through, each time anew: which functions and classes they are bound to, which numbers and texts,
    and what one level of tables, wrappers and classes holds. What turns out to be the user's code,
    a stray, is to be walked as such.

    This begins with the modules that the user's code names, and goes on to those that they lead to.
    Packages that do not use JAX lead nowhere: they may compute constants, but they trace nothing.

    JAX loads some of its modules when they are first needed, fills tables then, and leaves loop
    variables behind. None of it changes a trace, so in its modules only functions and classes count
    that are bound to their own names; the rest is looked through for strays.
    """

    def __init__(self):
        self.lines: dict[str, list[str]] = {}  # of each module that counts
        self.strays: list[tuple[str, object]] = []  # with the places where they were found
        self.owners: dict[str | None, str | None] = {}  # of modules, and of files
        self.uses_jax: dict[str, bool] = {}  # by the package
        # By the id of a class: what it is, and the modules that it leads to.
        self.classes: dict[int, tuple[str, dict[str, None]]] = {}
        self.led_to: dict[str, None] = {}  # modules that what is looked at leads to, in order
        self.aside: dict[str, None] = {}  # modules to look through for strays alone
        self.searched: set[str] = set()  # and those that were

    def follow(self, modules: dict[str, types.ModuleType]) -> None:
        """Look through modules, and through those that they lead to."""
        names = dict(modules)
        while names:
            name, _ = names.popitem()
            if name not in self.lines:
                self.lines[name], led_to = self.look_through(name)
                names |= led_to
        while self.aside:
            name, _ = self.aside.popitem()
            if name not in self.lines and name not in self.searched:
                self.searched.add(name)
                self.aside |= self.look_through(name)[1]

    def look_through(self, module: str) -> tuple[list[str], dict[str, None]]:
        """What the names in a module are bound to, and the modules that they lead to."""
        lines = []
        led_to: dict[str, None] = {}
        owner = self.owner_of_module(module)
        goes_on = self.does_use_jax(owner)
        is_jax = module.partition(".")[0] in ("jax", "jaxlib")
        for name, value in list(vars(sys.modules[module]).items()):
            if name.startswith("__") or module == _LISTENERS:
                continue
            if owner == _OWN_FOLDER and not isinstance(value, _DEFINITIONS):
                continue  # onekernel's tables of what it compiled
            place = f"{module}.{name}"
            self.led_to = {}
            line = f"{name}={self.describe(value, place, 0)}"
            is_module = type(value) is types.ModuleType
            # A package has its modules as names once they are loaded; of jaxlib, some are so late.
            is_part = is_module and (value.__name__ == place or value.__name__[:7] == "jaxlib.")
            if not is_jax:
                counts = leads = not is_part
            else:
                counts = _is_bound_to_own_name(value, name)
                leads = counts or (is_module and not is_part)
            if counts:
                lines.append(line)
            if goes_on:
                (led_to if leads else self.aside).update(self.led_to)
        return lines, led_to

    def does_use_jax(self, package: str) -> bool:
        if package not in self.uses_jax:
            self.uses_jax[package] = any(
                type(value) is types.ModuleType and value.__name__.partition(".")[0] == "jax"
                for name, module in list(sys.modules.items())
                if self.owner_of_module(name) == package
                for value in list(vars(module).values())
            )
        return self.uses_jax[package]

    def owner_of_module(self, name: str | None) -> str | None:
        if name not in self.owners:
            self.owners[name] = _owner_of_module(name) if isinstance(name, str) else None
        return self.owners[name]

    def owner_of_function(self, function: types.FunctionType) -> str:
        path = function.__code__.co_filename
        if path.startswith("<"):
            return _owner_of_function(function)
        if path not in self.owners:
            self.owners[path] = _owner_of_function(function)
        return self.owners[path]

    def lead_to(self, name: str | None) -> None:
        if self.owner_of_module(name) not in _LEADING_NOWHERE:
            self.led_to[name] = None

    def describe(self, value, place: str, depth: int) -> str:
        """What a value is, in short. place: where it was found. depth: how far behind a name."""
        kind = type(value)
        if kind is types.FunctionType:
            return self.describe_function(value, place, depth)
        if kind in _CONSTANTS:
            return repr(value)
        if issubclass(kind, type):
            return self.describe_class(value, place)
        if issubclass(kind, types.ModuleType):
            self.lead_to(value.__name__)
            return value.__name__
        if kind is types.BuiltinFunctionType or kind is np.ufunc:
            return value.__name__
        if depth == _MAX_BINDING_DEPTH:
            return kind.__qualname__
        if kind in _CONTAINERS:
            return self.describe_container(value, place) if depth == 0 else _describe_data(value)
        if kind in _WRAPPERS:
            return "wrapped " + self.describe(value.__wrapped__, place, depth + 1)
        if issubclass(kind, functools.partial):
            parts = (value.func, *value.args, *value.keywords.values())
            return "partial " + self.describe_all(parts, place, depth)
        return self.describe_instance(value, place, depth)

    def describe_all(self, values, place: str, depth: int) -> str:
        return repr([self.describe(value, f"{place}[]", depth + 1) for value in list(values)])

    def describe_container(self, value, place: str) -> str:
        """A table by its keys and values. Entries for a class are no part of it: packages keep such
        tables of all classes that a program defines."""
        if isinstance(value, set | frozenset):
            return _describe_data(value)
        if not isinstance(value, dict):
            return self.describe_all(value, place, 0)
        entries = []
        for key, item in list(value.items()):
            entry = self.describe(item, f"{place}[]", 1)
            if not isinstance(key, type):
                entries.append((_describe_data(key), entry))
        return repr(entries)

    def describe_function(self, function: types.FunctionType, place: str, depth: int) -> str:
        owner = self.owner_of_function(function)
        if owner == _OWN_FOLDER:  # and what it holds is for onekernel's own use
            return "onekernel's"
        if owner == _USER:
            self.strays.append((place, function))
            return "user's"
        self.lead_to(function.__globals__.get("__name__"))
        text = f"{function.__module__}.{function.__qualname__}:{function.__code__.co_firstlineno}"
        for cell in function.__closure__ or () if depth < _MAX_BINDING_DEPTH else ():
            try:
                text += " " + self.describe(cell.cell_contents, place, depth + 1)
            except ValueError:
                text += " empty"
        return text

    def describe_class(self, kind: type, place: str) -> str:
        owner = self.owner_of_module(kind.__module__)
        if owner == _USER:
            self.strays.append((place, kind))
            return "user's"
        if id(kind) not in self.classes:
            text = name = f"{kind.__module__}.{kind.__qualname__}"
            led_to = self.led_to
            self.led_to = {}
            if owner != _STDLIB:
                members = [
                    f"{key}={self.describe_member(item, f'{name}.{key}')}"
                    for key, item in list(vars(kind).items())
                    if not key.startswith("__") or type(item) is types.FunctionType
                ]
                if not name.startswith("jax"):
                    content = "\n".join(members).encode(errors="surrogatepass")
                    text += hashlib.sha256(content).hexdigest()
            self.led_to = {}  # what the methods lead to, their modules lead to as well
            for base in kind.__mro__:
                self.lead_to(base.__module__)
            self.classes[id(kind)] = (text, self.led_to)
            self.led_to = led_to
        text, led_to = self.classes[id(kind)]
        self.led_to.update(led_to)
        return text

    def describe_member(self, item, place: str) -> str:
        """What a class has: a method, or a constant. Tables in it may be caches."""
        function = item.__func__ if type(item) in (staticmethod, classmethod) else item
        if type(function) is types.FunctionType:
            return self.describe_function(function, place, _MAX_BINDING_DEPTH)
        return _describe_data(item) if type(item) not in (dict, list, set) else ""

    def describe_instance(self, value, place: str, depth: int) -> str:
        kind = type(value)
        if kind.__module__ == "unittest.mock":
            raise _Unknown(f"{place} is a mock")
        if self.owner_of_module(kind.__module__) == _USER:
            self.strays.append((place, value))
            return "user's"
        self.lead_to(kind.__module__)
        if depth == 0 and (held := _instance_dict(value)):
            self.describe_all(held.values(), place, depth)  # for the strays in it
        return _describe_data(value)

    def digests(self) -> list[tuple[str, str]]:
        """Each module that was looked through, and a hash of what was found."""
        return [
            (name, hashlib.sha256(repr(lines).encode(errors="surrogatepass")).hexdigest())
            for name, lines in sorted(self.lines.items())
        ]


def _describe_data(value, depth: int = 0) -> str:
    """Numbers, texts, enums, arrays and containers of them, by value; of the rest, what it is."""
    kind = type(value)
    if kind in _CONSTANTS:
        return repr(value)
    if kind in _CONTAINERS and depth < _MAX_DATA_DEPTH:
        if kind is dict:
            value = list(value.items())
        items = [_describe_data(item, depth + 1) for item in list(value)]
        return repr(sorted(items) if kind in (set, frozenset) else items)
    if issubclass(kind, enum.Enum):
        return f"{kind.__qualname__}.{value._name_}"
    if kind is np.ndarray and not value.dtype.hasobject:
        return hashlib.sha256(value.tobytes()).hexdigest()
    return kind.__qualname__


def _is_bound_to_own_name(value, name: str) -> bool:
    """Whether it is a function or class that was defined by this name."""
    is_definition = isinstance(value, type | types.FunctionType | types.BuiltinFunctionType)
    return (is_definition or type(value) in _WRAPPERS) and value.__name__ == name


_LISTENERS = "jax._src.monitoring"  # its functions are told of events, and change no trace
_LEADING_NOWHERE = frozenset([_USER, _STDLIB, None])
_DEFINITIONS = (types.ModuleType, types.FunctionType, type)
_MAX_BINDING_DEPTH = 3
_MAX_DATA_DEPTH = 6
_CONSTANTS = frozenset([type(None), bool, int, float, complex, str, bytes])
_CONTAINERS = frozenset([dict, list, tuple, set, frozenset])
_WRAPPERS = (type(functools.cache(len)), type(jax.jit(len)))


# ---- Packages and settings -----------------------------------------------------------------------


@functools.cache
def _process_start() -> float:
    """When this process started, in seconds since 1970; if the system does not tell, a later time.

    Linux counts it in ticks since the system started.
    """
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        age = uptime - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return _import_time
    return min(time.time() - age, _import_time) if ticks > 0 and age >= 0 else _import_time


@functools.cache
def _files_of(package: str) -> str:
    """A hash of size and time of all code of an installed package: Python's and compiled.

    package: its folder, or the file if it is one module. What was read once holds for the process,
    as its modules are loaded. `_Unknown` if a file is newer than the process: which one was loaded?
    """
    suffixes = tuple(importlib.machinery.SOURCE_SUFFIXES + importlib.machinery.EXTENSION_SUFFIXES)
    package = os.path.realpath(package)
    folders = [package] if os.path.isdir(package) else []
    files = [] if folders else [package]
    seen = {package}  # links could lead around in a circle
    while folders:
        for entry in os.scandir(folders.pop()):
            if entry.name.endswith(suffixes):
                files.append(entry.path)
            elif entry.is_dir():
                path = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                if path not in seen:
                    seen.add(path)
                    folders.append(path)
    facts = []
    for file in sorted(files):
        status = os.stat(file)
        if max(status.st_mtime, status.st_ctime) > _process_start():
            raise _Unknown(f"{file} is newer than this process")
        facts.append((file, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(facts).encode(errors="surrogateescape")).hexdigest()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none of this name"


@functools.cache
def _versions() -> list[tuple[str, str]]:
    """Of Python, of the packages that trace, and of onekernel, whose version is its source."""
    found = [("python", sys.version), ("implementation", platform.python_implementation())]
    for name in ("jax", "jaxlib", "numpy", "mujoco", "mujoco-mjx"):
        found.append((name, _version(name)))
    _files_of(_OWN_FOLDER)  # raises if the files are not those of this process
    for file in sorted(pathlib.Path(_OWN_FOLDER).rglob("*.py")):
        name = file.relative_to(_OWN_FOLDER).as_posix()
        found.append((name, hashlib.sha256(file.read_bytes()).hexdigest()))
    return found


# Settings of JAX, by parts of their names, that say where and how it runs and not what it traces;
# and those of compilers for which JAX has settings as soon as they are loaded.
_SETTINGS_OF_RUNNING = re.compile(
    "cache|color|cross_host|distributed|dump|effort|guard|log_|logging|memory_fitting|mosaic|num_cpu"
    "|optimization|pallas|pgle|platform|preemption|profil|proxy|recover|share_binary|timeout"
    "|traceback|transfer|triton|visible"
)


def _settings() -> list:
    """What every trace depends on: versions, JAX's settings in this thread, the backend."""
    settings = [
        (name, repr(getattr(jax.config, name, None)))
        for name in sorted(jax.config.values)
        if not _SETTINGS_OF_RUNNING.search(name)
    ]
    device = jax.devices()[0]
    return [_versions(), settings, jax.default_backend(), device.device_kind, sys.flags.optimize]
