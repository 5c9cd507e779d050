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
import dis
import enum
import functools
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
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
_MAX_NODES = 300_000  # objects in one walk; a robot's environment has a few thousand


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
        walk.run(_own_part())
        walk.run(function)
        walk.run(structure)
        walk.finish()
        return walk.digest()
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
    """_USER, _STDLIB, or of an installed package the folder that it is in (of a module, the file)."""
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
    """The same for a loaded module. None if no such module is loaded."""
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
    return _owner_of_module(parent) if parent else _USER


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
    """ctypes datetime ftplib genericpath glob http importlib io linecache multiprocessing nt os _io pkgutil posix
    random runpy secrets select shutil signal socket sqlite3 ssl subprocess tempfile time urllib uuid
    _random _socket _datetime""".split()
)
_IMPURE_GLOBALS = frozenset("open input eval exec globals breakpoint __import__ compile".split())
_IMPURE_ATTRIBUTES = frozenset(
    """environ getenv read_text read_bytes urandom fromfile loadtxt genfromtxt memmap load_module
    import_module is_file is_dir iterdir""".split()
)
_IMPURE_NUMPY = ("load", "fromregex", "DataSource")
# Names through which a trace could depend on how many devices or processes there are.
_DEVICE_NAMES = frozenset(
    """devices local_devices device_count local_device_count process_index process_count
    make_mesh""".split()
)
# Names through which an object could make another of its class, and so run __init__.
_CLASS_NAMES = frozenset(["type", "__class__"])


_LOADS_GLOBAL = frozenset(["LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"])
_LOADS_ATTRIBUTE = frozenset(["LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"])


class _Reads(typing.NamedTuple):
    """What a code object and those within it read from outside."""

    chains: tuple[tuple[str, ...], ...]  # ("jnp", "linalg", "norm"): a global name, attributes of it
    imports: tuple[tuple[int, str, str | None], ...]  # level, module, name in it
    names: frozenset[str]  # all attributes and globals by name


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
    """A class as its instances need it: they exist already, so __init__ will not run for them."""

    of: type


class _Bound(typing.NamedTuple):
    """A value that code of the user finds under a name in a module of a package."""

    module: str
    name: str
    value: object


_ATOMS = frozenset([type(None), bool, int, str, bytes, type(Ellipsis), type(NotImplemented)])
# Made by Python, by the compiler of classes or by caches: no part of what a class does.
_CLASS_SKIPPED = frozenset(
    """__module__ __doc__ __dict__ __weakref__ __annotations__ __annotate__ __annotate_func__
    __annotations_cache__ __firstlineno__ __static_attributes__ __abstractmethods__ _abc_impl
    __orig_bases__ __parameters__ __type_params__ __qualname__ __classcell__""".split()
)
_INSTANCE_SKIPPED = frozenset("__module__ __doc__ __annotations__ __annotate__ __name__".split())
_DESCRIPTORS = (
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.MethodWrapperType,
)
_OPERATORS = (operator.attrgetter, operator.itemgetter, operator.methodcaller)


class _Walk:
    """Visits what is reached, each object once, in an order that the program determines.

    What is written for each is its kind, its own data and the number of its children; then follow
    the children. So the text can be read in one way only, and two different graphs of objects
    cannot give the same one. An object that was visited before is written as its number.
    """

    def __init__(self, parent: "_Walk | None" = None):
        """parent: the walk that this one is a part of, apart from the text and the numbers."""
        self.text = hashlib.sha256()
        self.numbers: dict[tuple[bool, int], int] = {}
        self.alive: list = []  # all that has a number, or its id could become another object's
        self.stack: list = []
        self.modules: dict[str, types.ModuleType] = parent.modules if parent else {}
        self.names: set[str] = parent.names if parent else set()
        self.with_methods: dict[type, None] = parent.with_methods if parent else {}
        self.count: list[int] = parent.count if parent else [0]
        self.depth: int = parent.depth + 1 if parent else 0

    def digest(self) -> str:
        return self.text.hexdigest()

    def run(self, value) -> None:
        """Visit `value` and everything behind it. Without recursion: chains of objects can be long."""
        self.stack.append(value)
        while self.stack:
            self.count[0] += 1
            if self.count[0] > _MAX_NODES:
                raise _Unknown("it reaches too many objects")
            self.visit(self.stack.pop())

    def digest_of(self, value) -> str:
        """A hash of `value` alone, whatever was visited before."""
        if self.depth > 20:
            raise _Unknown("sets within sets, too deep")
        part = _Walk(self)
        part.run(value)
        return part.digest()

    def write(self, kind: str, *data: str | bytes, children=()) -> None:
        """Write one object, and put its children on the stack, the first on top."""
        for item in (kind, *data, str(len(children))):
            encoded = item.encode(errors="surrogatepass") if isinstance(item, str) else item
            self.text.update(b"%d:" % len(encoded))
            self.text.update(encoded)
        self.stack.extend(reversed(children))

    def is_repeated(self, value, methods: bool = False) -> bool:
        """Whether it was visited before, and so is written as a number; else give it one."""
        key = (methods, id(value))
        if key in self.numbers:
            self.write("again", str(self.numbers[key]))
            return True
        self.numbers[key] = len(self.numbers)
        self.alive.append(value)
        return False

    def visit(self, value) -> None:
        kind = type(value)
        if kind in _ATOMS:
            self.write(kind.__name__, value if kind is bytes else str(value))
        elif kind in _VISITS:
            _VISITS[kind](self, value)
        else:
            for general, visit in _VISITS_OF_SUBCLASSES:
                if issubclass(kind, general):
                    visit(self, value)
                    return
            self.visit_other(value)

    # -- plain data

    def visit_float(self, value: float) -> None:
        self.write("float", struct.pack("<d", value))

    def visit_complex(self, value: complex) -> None:
        self.write("complex", struct.pack("<dd", value.real, value.imag))

    def visit_by_repr(self, value) -> None:
        self.write(type(value).__name__, repr(value))

    def visit_path(self, value: pathlib.PurePath) -> None:
        self.write("path", type(value).__name__, str(value))

    def visit_sequence(self, value) -> None:
        """tuple, list: a list may contain itself, a tuple may be shared or not as Python likes."""
        if type(value) is list and self.is_repeated(value):
            return
        self.write(type(value).__name__, children=list(value))

    def visit_slice(self, value) -> None:
        """slice and range."""
        self.write(type(value).__name__, children=[value.start, value.stop, value.step])

    def visit_set(self, value) -> None:
        self.write(type(value).__name__, *sorted(self.digest_of(item) for item in value))

    def visit_dict(self, value) -> None:
        """Dictionaries and views of them, in their order, which a trace may depend on."""
        if not self.is_repeated(value):
            items = list(value.items())
            self.write("dict", children=[part for item in items for part in item])

    def visit_pattern(self, value: re.Pattern) -> None:
        self.write("pattern", str(value.flags), children=[value.pattern])

    def visit_enum(self, value: enum.Enum) -> None:
        self.write("enum member", value.name or "", children=[type(value), value.value])

    def visit_builtin_subclass(self, value) -> None:
        """An instance of a class derived from list, dict, str, ...: the class, the data, the rest."""
        if self.is_repeated(value):
            return
        kind = type(value)
        base = next(base for base in _BUILTIN_BASES if issubclass(kind, base))
        if not _is_plain(kind, base):
            raise _Unknown(f"an object of type {kind}")
        plain = (base.__iter__ if base in (tuple, list, set, frozenset) else base.__getnewargs__)(
            value
        )
        self.write("derived", children=[_Methods(kind), base(plain), *self.attributes(value)])
