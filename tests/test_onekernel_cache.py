"""The store of compiled kernels, and the fingerprint that tells whether a trace still holds."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mujoco import mjx
from mujoco.mjx._src import collision_driver, math as mjx_math, smooth, solver, types as mjx_types

import amp_mjx_unitree
import onekernel
import ppo_mjx
import ppo_mjx_unitree
import ppo_mjx_unitree_rough
import sac_mjx
from onekernel import api, cache, fingerprint

ROOT = Path(__file__).parent.parent

# ---- The store -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of an empty store."""
    monkeypatch.setenv("ONEKERNEL_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.delenv("ONEKERNEL_CACHE", raising=False)
    monkeypatch.setattr(cache, "_has_warned", False)
    return tmp_path / "store"


def test_what_was_stored_is_loaded(folder):
    assert cache.load("key") is None
    cache.store("key", b"payload")
    cache.store("other", b"")
    assert cache.load("key") == b"payload"
    assert cache.load("other") == b""
    cache.store("key", b"newer")
    assert cache.load("key") == b"newer"
    assert cache.load("third") is None


def test_folder_and_files_are_for_their_user_alone(folder):
    cache.store("key", b"payload")
    assert folder.stat().st_mode & 0o777 == 0o700
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def overwrite(file: Path, start: int, new: bytes) -> None:
    content = bytearray(file.read_bytes())
    content[start : start + len(new)] = new
    file.write_bytes(content)


def replace_by_another_key(file: Path) -> None:
    cache.store("another key", b"payload")
    (other,) = (path for path in file.parent.iterdir() if path != file)
    os.replace(other, file)


def replace_by_link(file: Path) -> None:
    file.rename(file.parent / "elsewhere")
    file.symlink_to(file.parent / "elsewhere")


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


BREAK = {
    "empty": lambda file: file.write_bytes(b""),
    "cut short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "cut in its head": lambda file: os.truncate(file, 20),
    "too long": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "other magic": lambda file: overwrite(file, 0, b"X"),
    "other version": lambda file: overwrite(file, 8, b"\xff"),
    "other hash": lambda file: overwrite(file, 12, bytes(32)),
    "other sizes": lambda file: overwrite(file, 44, b"\xff" * 16),
    "other payload": lambda file: overwrite(file, file.stat().st_size - 1, b"?"),
    "another key's": replace_by_another_key,
    "others can write": lambda file: file.chmod(0o602),
    "a link": replace_by_link,
    "a pipe": replace_by_pipe,
}


@pytest.mark.parametrize("name", BREAK)
def test_broken_file_is_ignored_and_replaced(folder, name):
    cache.store("key", b"payload")
    (file,) = folder.iterdir()
    BREAK[name](file)
    assert cache.load("key") is None
    cache.store("key", b"again")
    assert cache.load("key") == b"again"


def test_file_of_another_user_is_ignored(folder, monkeypatch):
    cache.store("key", b"payload")
    folder_status = folder.stat()
    (file,) = folder.iterdir()
    belongs = cache._belongs_to_user_alone
    monkeypatch.setattr(
        cache, "_belongs_to_user_alone", lambda status: status.st_ino == folder_status.st_ino
    )
    assert cache.load("key") is None
    monkeypatch.setattr(cache, "_belongs_to_user_alone", belongs)
    assert cache.load("key") == b"payload"


def refuses(folder: Path) -> bool:
    """Whether nothing is kept, with one warning for several tries."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            cache.store("key", b"payload")
            assert cache.load("key") is None
    files = list(folder.iterdir()) if folder.is_dir() else []
    return not files and len(caught) == 1 and caught[0].category is RuntimeWarning


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_folder_that_others_can_write_to_is_not_used(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    assert refuses(folder)
    assert folder.stat().st_mode & 0o777 == mode


def test_folder_of_another_user_is_not_used(folder, monkeypatch):
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert refuses(folder)


def test_full_disk_is_no_error(folder, monkeypatch):
    class FullFile:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            os.close(self.descriptor)

        def write(self, content):
            raise OSError(28, "No space left on device")

    def open_full(file, mode):
        full = FullFile()
        full.descriptor = file
        return full

    monkeypatch.setattr(cache, "open", open_full, raising=False)
    assert refuses(folder)


def test_folder_that_cannot_be_made_is_no_error(folder):
    folder.write_text("a file in its place")
    assert refuses(folder)


def test_switched_off(folder, monkeypatch):
    monkeypatch.setenv("ONEKERNEL_CACHE", "0")
    cache.store("key", b"payload")
    assert cache.load("key") is None
    assert cache.folder() is None
    assert not folder.exists()


def test_where_the_folder_is(tmp_path, monkeypatch):
    monkeypatch.delenv("ONEKERNEL_CACHE_DIR", raising=False)
    monkeypatch.delenv("ONEKERNEL_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.folder() == tmp_path / ".cache" / "onekernel"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "onekernel"
    monkeypatch.setenv("ONEKERNEL_CACHE_DIR", str(tmp_path / "own"))
    assert cache.folder() == tmp_path / "own"


STORE_OFTEN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("cache", sys.argv[1])
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
for size in range(300):
    cache.store("key", sys.argv[2].encode() * (1000 * size + 1))
"""


def test_two_processes_store_at_once(folder):
    """Whoever reads meanwhile finds a whole payload of one of them."""
    arguments = [sys.executable, "-W", "error", "-c", STORE_OFTEN, cache.__file__]
    writers = [subprocess.Popen([*arguments, letter]) for letter in "ab"]
    found = set()
    while any(writer.poll() is None for writer in writers):
        payload = cache.load("key")
        assert payload is not None or not found  # once there is one, there always is
        if payload is not None:
            assert len(set(payload)) == 1
            assert len(payload) % 1000 == 1
            found.add(payload[:1])
    assert [writer.returncode for writer in writers] == [0, 0]
    assert found <= {b"a", b"b"}
    assert len(cache.load("key")) == 299 * 1000 + 1
    assert len(list(folder.iterdir())) == 1


def test_what_was_not_used_for_longest_is_evicted(folder, monkeypatch):
    monkeypatch.setattr(cache, "MAX_BYTES", 3500)
    for age, key in enumerate(["third", "second", "first"]):
        cache.store(key, bytes(1000))
        os.utime(cache._file_of(folder, key), (1000 - age, 1000 - age))
    cache.load("first")  # so it is the newest now
    cache.store("fourth", bytes(1000))
    assert [cache.load(key) is None for key in ("first", "second", "third", "fourth")] == [
        False,
        True,
        False,
        False,
    ]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 3500
    cache.store("too large", bytes(3500))
    assert cache.load("too large") is None
    assert cache.load("first") is not None


def test_files_of_dead_processes_are_removed(folder):
    cache.store("key", b"payload")
    dead = folder / ("dead" + cache.UNFINISHED)
    alive = folder / ("alive" + cache.UNFINISHED)
    foreign = folder / "foreign"
    for file in dead, alive, foreign:
        file.write_bytes(b"x")
    long_ago = time.time() - 2 * cache.MAX_UNFINISHED_SECONDS
    os.utime(dead, (long_ago, long_ago))
    cache.store("key", b"payload")
    assert not dead.exists()
    assert alive.exists()
    assert foreign.exists()


@pytest.mark.parametrize("blobs", [[], [b""], [b"a", b"", bytes(1000)]])
def test_pack(blobs):
    header = {"shapes": [[2, 3], []], "text": "é", "number": 0.1, "none": None}
    assert cache.unpack(cache.pack(header, blobs)) == (header, blobs)


def test_unpack_refuses_what_is_not_packed():
    payload = cache.pack({"a": 1}, [b"xyz"])
    for wrong in (b"", payload[:3], payload[:-1], payload + b"x", bytes(100), b"\xff" * 100):
        with pytest.raises(ValueError):
            cache.unpack(wrong)
    with pytest.raises(ValueError):
        cache.unpack(cache.pack([1], []))


def test_kernels_are_kept_for_their_shapes_and_types(folder):
    """Each compiled object asks the store for the first time: only the second of two equal calls
    finds anything there."""

    def twice(x):
        return x + x, x.sum()

    for shape, dtype in itertools.product([(3, 2), (3, 4), (3, 2, 2)], [np.float32, np.int32]):
        x = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
        traced = []
        for _ in range(2):
            trace = api.Kernel.trace
            with mock.patch.object(api.Kernel, "trace", autospec=True, side_effect=trace) as spy:
                doubled, total = jax.vmap(onekernel.compile(twice))(x)
            traced.append(spy.called)
            np.testing.assert_array_equal(doubled, x + x)
            np.testing.assert_array_equal(total, x.reshape(3, -1).sum(1))
        assert traced == [True, False]


# ---- The fingerprint -----------------------------------------------------------------------------

numbers = itertools.count()


def of(function, structure=None) -> str | None:
    return fingerprint.fingerprint(function, structure)


def import_source(folder: Path, source: str):
    """Import a module from its source, as a user's module with a name of its own."""
    name = f"users_module_{next(numbers)}"
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def load(tmp_path):
    """Import a module from its source."""
    return functools.partial(import_source, tmp_path)


HELPER = """
import jax.numpy as jnp
GAIN = 2.0
UNUSED = 1
def soften(x):
    return jnp.tanh(GAIN * x)
def unused(x):
    return x + 1
"""
SOURCE = """
import collections, dataclasses, enum, functools, math, operator, pathlib, re, typing
import jax, jax.numpy as jnp, numpy as np
import HELPER_NAME as helper
from flax import struct

SCALE = 3.0
UNUSED = 10
ARRAY = np.arange(3.0)
TABLE = {"b": 1.0, "a": [2.0, (3, None)]}
NAMES = {"hip", "knee", "ankle"}
PATTERN = re.compile("leg.*")

class Mode(enum.Enum):
    SLOW = 1
    FAST = 2
    def factor(self):
        return 10 * self.value

class Point(typing.NamedTuple):
    x: float
    y: float = 4.0

@dataclasses.dataclass(frozen=True)
class Settings:
    mass: float = 5.0
    modes: tuple = (Mode.SLOW, Mode.FAST)

@struct.dataclass
class State:
    q: jax.Array
    name: str = struct.field(pytree_node=False, default="state")

class Base:
    def inherited(self, x):
        return 6.0 * x

class Slots:
    __slots__ = ("value",)
    def __init__(self, value):
        self.value = value

class Env(Base):
    LIMIT = 7.0
    def __init__(self):
        self.settings = Settings()
        self.slots = Slots(8.0)
        self.offset = jnp.array(9.0)
        self.fraction = 0.25
        self.me = self  # a cycle
    @property
    def doubled(self):
        return 2 * self.offset
    @staticmethod
    def clip(x):
        return jnp.clip(x, -11.0, 11.0)
    def step(self, x):
        def inner(y, factor=12.0, *, shift=13.0):
            return factor * y + shift
        x = self.inherited(inner(x)) + self.doubled
        return self.clip(helper.soften(x)) * SCALE + ARRAY.sum() + TABLE["b"] + finish(x)

def make_adder(amount):
    def add(x):
        return x + amount
    return add

adder = make_adder(14.0)
power = functools.partial(jnp.power, 15.0)

@functools.partial(jax.jit, static_argnums=(1,))
def jitted(x, n):
    return x * n

@jax.custom_jvp
def smooth(x):
    return jnp.abs(x)

@smooth.defjvp
def smooth_jvp(primals, tangents):
    return smooth(*primals), 16.0 * tangents[0]

def finish(x, origin=Point(17.0), *, lift=20.0):
    if Mode.FAST.factor() > 1 and PATTERN.match("leg"):
        x = x + origin.x * math.pi * len([name for name in NAMES])
    first = operator.itemgetter(0)([x])
    return smooth(jitted(power(adder(first)), 18)) + lift

def unused(x):
    return UNUSED * x

def forever(x):
    return 1 + forever(x) if x else other(x)

def other(x):
    return forever(x - 1)

env = Env()
"""


def load_env(load, source: str = SOURCE, helper: str = HELPER):
    return load(source.replace("HELPER_NAME", load(helper).__name__)).env


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory) -> str:
    """The fingerprint of SOURCE as it stands."""
    folder = tmp_path_factory.mktemp("unchanged")
    return of(load_env(functools.partial(import_source, folder)).step)


def test_the_same_source_has_the_same_fingerprint(load, unchanged):
    assert unchanged is not None and len(unchanged) == 64
    env = load_env(load)
    assert of(env.step) == unchanged
    assert of(env.step) == unchanged


HARMLESS = [
    ("UNUSED * x", "UNUSED * x + 1"),
    ("UNUSED = 10", "UNUSED = 11"),
    ("class Base:", "# a comment\n\nclass Base:"),
    ('{"hip", "knee", "ankle"}', '{"ankle", "knee", "hip"}'),
    ("Settings()", "Settings(mass=5.0)"),
    ("jnp.array(9.0)", "jnp.asarray(9.0) * 1"),
]


@pytest.mark.parametrize(("old", "new"), HARMLESS)
def test_what_does_not_matter_changes_nothing(load, unchanged, old, new):
    assert old in SOURCE
    assert of(load_env(load, SOURCE.replace(old, new)).step) == unchanged


CHANGES = [
    ("SCALE = 3.0", "SCALE = 3.5"),
    ("SCALE = 3.0", "SCALE = 3"),
    ("SCALE = 3.0", "SCALE = np.float32(3)"),
    ("SCALE = 3.0", "SCALE = jnp.float32(3)"),
    ("SCALE = 3.0", "SCALE = -float('nan')"),
    ("np.arange(3.0)", "np.arange(4.0)"),
    ("np.arange(3.0)", "np.arange(3)"),
    ("np.arange(3.0)", "np.arange(3.0, dtype=np.float32)"),
    ("np.arange(3.0)", "np.arange(3.0)[:, None]"),
    ("np.arange(3.0)", "jnp.arange(3.0)"),
    ('"b": 1.0', '"b": 1.5'),
    ('"b": 1.0, "a": [2.0, (3, None)]', '"a": [2.0, (3, None)], "b": 1.0'),
    ("(3, None)", "(3, False)"),
    ("(3, None)", "[3, None]"),
    ('"ankle"', '"toe"'),
    ("leg.*", "legs.*"),
    ("FAST = 2", "FAST = 3"),
    ("10 * self.value", "11 * self.value"),
    ("Point(17.0)", "Point(17.5)"),
    ("Point(17.0)", "Point(17.0, 4.5)"),
    ("Point(17.0)", "(17.0, 4.0)"),
    ("mass: float = 5.0", "mass: float = 5.5"),
    ("Settings()", "Settings(modes=(Mode.FAST, Mode.SLOW))"),
    ("6.0 * x", "6.5 * x"),
    ("Slots(8.0)", "Slots(8.5)"),
    ("LIMIT = 7.0", "LIMIT = 7.5"),
    ("jnp.array(9.0)", "jnp.array(9.5)"),
    ("jnp.array(9.0)", "jnp.float32(9.0)"),  # whose type is no longer weak
    ("self.fraction = 0.25", "self.fraction = 0.5"),
    ("self.me = self", "self.me = None"),
    ("2 * self.offset", "3 * self.offset"),
    ("-11.0, 11.0", "-11.0, 11.5"),
    ("factor=12.0", "factor=12.5"),
    ("shift=13.0", "shift=13.5"),
    ("factor * y + shift", "factor * y - shift"),
    ("make_adder(14.0)", "make_adder(14.5)"),
    ("return x + amount", "return x - amount"),
    ("jnp.power, 15.0", "jnp.power, 15.5"),
    ("jnp.power, 15.0", "jnp.multiply, 15.0"),
    ("static_argnums=(1,)", "static_argnums=()"),
    ("return x * n", "return x / n"),
    ("jnp.abs(x)", "jnp.square(x)"),
    ("16.0 * tangents", "16.5 * tangents"),
    ("math.pi", "math.e"),
    ("itemgetter(0)", "itemgetter(-1)"),
    ("18))", "19))"),
    ("lift=20.0", "lift=20.5"),
    ("self.clip(helper", "(helper"),
]


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_every_change_is_noticed(load, unchanged, old, new):
    assert old in SOURCE
    assert of(load_env(load, SOURCE.replace(old, new)).step) not in (None, unchanged)


@pytest.mark.parametrize(
    ("old", "new", "matters"),
    [
        ("GAIN = 2.0", "GAIN = 2.5", True),
        ("jnp.tanh(GAIN * x)", "jnp.tanh(GAIN + x)", True),
        ("jnp.tanh", "jnp.sin", True),
        ("UNUSED = 1", "UNUSED = 2", False),
        ("return x + 1", "return x + 2", False),
    ],
)
def test_users_other_modules_count_by_what_is_read_of_them(load, unchanged, old, new, matters):
    assert old in HELPER
    changed = of(load_env(load, helper=HELPER.replace(old, new)).step)
    assert changed is not None
    assert (changed != unchanged) == matters


def test_globals_count_as_they_are_now(load):
    env = load_env(load)
    module = sys.modules[type(env).__module__]
    first = of(env.step)
    module.TABLE["a"].append(1)
    assert of(env.step) != first
    module.TABLE["a"].pop()
    assert of(env.step) == first
    env.slots.value = 1.0
    assert of(env.step) != first
    env.slots.value = 8.0
    with mock.patch.object(type(env), "step", lambda self, x: x):
        assert of(env.step) != first
    assert of(env.step) == first


def test_functions_that_call_each_other(load):
    source = SOURCE.replace("x - 1", "x - 2")
    first, second = (load_env(load, text) for text in (SOURCE, source))
    names = [sys.modules[type(env).__module__].forever for env in (first, second)]
    assert None not in map(of, names)
    assert of(names[0]) != of(names[1])
    assert of(names[0]) == of(sys.modules[type(load_env(load)).__module__].forever)


def test_compiled_functions_count_as_what_they_compute():
    """And not by the kernels that they have."""
    one = onekernel.compile(lambda x: x + 1)
    two = onekernel.compile(lambda x: x + 2)
    first, second = (of(lambda x, compiled=compiled: compiled(x)) for compiled in (one, two))
    assert None not in (first, second)
    assert first != second
    jax.eval_shape(one, jnp.ones(()))
    assert of(lambda x, compiled=one: compiled(x)) == first


def test_deep_structures():
    """Longer than Python's stack is deep."""
    chain: list = []
    for _ in range(20_000):
        chain = [chain]
    assert of(lambda x: x + len(chain)) is not None
    bush = ()
    for _ in range(60):
        bush = (bush, bush)
    assert of(lambda x: x + len(bush)) is None


def test_code_of_arguments_classes_counts(load):
    """The function itself does not name them."""

    def first_value(state):
        return state.q

    found = []
    for source in SOURCE, SOURCE.replace('default="state")', 'default="state")\n    extra = 1.0'):
        module = sys.modules[type(load_env(load, source)).__module__]
        structure = jax.tree.structure(module.State(1.0))
        found.append(of(first_value, structure))
        renamed = jax.tree.structure(module.State(1.0, name="other"))
        found.append(of(first_value, renamed))
    assert None not in found
    assert len(set(found)) == 4
    assert of(first_value) not in found


UNKNOWN = """
import ctypes, os, pathlib, random, threading, time, io
import jax, jax.numpy as jnp, mujoco, numpy as np
from jax.sharding import Mesh
from unittest import mock
count = 0
lock = threading.Lock()
numbers = iter([1, 2])
generator = np.random.default_rng(0)
mesh = Mesh(np.array(jax.devices()[:1]), ("devices",))
fake = mock.MagicMock()
def reads_file(x):
    return x + float(open("number.txt").read())
def reads_path(x):
    return x + float(pathlib.Path("number.txt").read_text())
def loads_array(x):
    return x + np.load("array.npy")
def reads_model(x):
    return x + mujoco.MjSpec.from_file("model.xml").option.timestep
def reads_environment(x):
    return x + float(os.environ["GAIN"])
def reads_variable(x):
    return x + float(os.getenv("GAIN"))
def reads_clock(x):
    return x + time.time()
def draws(x):
    return x + random.random()
def draws_with_numpy(x):
    return x + np.random.normal()
def draws_from_generator(x):
    return x + generator.normal()
def counts(x):
    global count
    count += 1
    return x + count
def evaluates(x):
    return eval("x + 1")
def looks_up(x):
    return x * globals()["count"]
def uses_lock(x):
    with lock:
        return x + 1
def uses_iterator(x):
    return x + next(numbers)
def uses_mesh(x):
    return x + mesh.size
def uses_mock(x):
    return fake(x)
def imports(x):
    import wave
    return x + wave.WAVE_FORMAT_PCM
def calls_nested(x):
    return jax.lax.fori_loop(0, 3, lambda i, y: y + time.time(), x)
"""


@pytest.mark.parametrize("name", [x for x in UNKNOWN.split() if x.endswith("(x):")])
def test_what_cannot_be_known_has_none(load, name):
    assert of(getattr(load(UNKNOWN), name.removesuffix("(x):"))) is None


COMPUTED_ONCE = """
import copy, dataclasses, functools
@dataclasses.dataclass(frozen=True)
class Robot:
    file: str
    @functools.cached_property
    def mass(self):
        return float(open(self.file).read())
    def weight(self):
        return 9.81 * self.mass
class Other(Robot):
    @property
    def mass(self):
        return super().mass
robot = Robot("mass.txt")
other = Other("mass.txt")
def weigh(x):
    return x * robot.weight()
def weigh_other(x):
    return x * other.weight()
def weigh_new_one(x):
    return x * robot.weight() * Robot("another.txt").mass
def weigh_copy(x):
    return x * robot.weight() * dataclasses.replace(robot, file="another.txt").mass
def weigh_one_of_its_class(x):
    return x * robot.weight() * type(robot)("another.txt").mass
"""


def test_cached_property_counts_by_its_value(load):
    """Where the instance has it: nothing is computed any more, so a file may be behind it."""
    module = load(COMPUTED_ONCE)
    assert of(module.weigh) is None
    found = []
    for mass in 1.0, 2.0, 1.0:
        vars(module.robot)["mass"] = mass
        found.append(of(module.weigh))
    assert None not in found
    assert found[0] == found[2] != found[1]
    for function in module.weigh_new_one, module.weigh_copy, module.weigh_one_of_its_class:
        assert of(function) is None, function.__name__
    vars(module.other)["weight"] = lambda: 1.0
    assert of(module.weigh_other) is None  # its property asks for the other one's


ENDS = """
import os, sys
def step(x):
    if x.ndim != 1:
        print("error: no vector", file=sys.stderr)
        os._exit(2)
    return x + 1
def asks(x):
    return x + sys.stdout.isatty()
"""


def test_what_prints_or_ends_the_program_changes_no_trace(load):
    module = load(ENDS)
    assert of(module.step) is not None
    assert of(module.asks) is None


def test_values_that_are_traced_have_none():
    found = []
    key = jax.random.key(0)

    def outer(x):
        found.append(of(lambda y: x + y))
        found.append(of(lambda y: jax.random.normal(key) + y))  # while others are traced
        return x

    jax.jit(outer)(1.0)
    assert found[0] is None
    assert None not in found[1:]


def test_random_keys_count_by_value():
    def with_key(key):
        return of(lambda x: jax.random.normal(key) + x)

    found = [
        with_key(jax.random.key(0)),
        with_key(jax.random.key(1)),
        with_key(jax.random.key(0, impl="rbg")),
        with_key(jax.random.PRNGKey(0)),
    ]
    assert None not in found
    assert len(set(found)) == 4
    assert with_key(jax.random.key(0)) == found[0]


def test_what_a_network_computes():
    """Flax's modules are instances of classes in an installed package."""
    networks = [ppo_mjx.MLP((8, 8), out, gain=1.0) for out in (1, 2, 1)]
    first, second, third = (of(network.apply) for network in networks)
    assert first is not None
    assert first != second
    assert first == third


def test_settings_of_jax_count():
    def step(x):
        return jnp.dot(x, x)

    found = [of(step)]
    with jax.default_matmul_precision("highest"):
        found.append(of(step))
    with jax.numpy_dtype_promotion("strict"):
        found.append(of(step))
    with jax.enable_x64(True):
        found.append(of(step))
    with jax.log_compiles():
        assert of(step) == found[0]
    assert None not in found
    assert len(set(found)) == 4
    assert of(step) == found[0]


# ---- The fingerprint of environments -------------------------------------------------------------


def test_parts_of_an_environment_count(hopper):
    first = of(hopper.step)
    assert first is not None
    assert of(hopper.reset) not in (None, first)
    assert of(ppo_mjx.Env(ppo_mjx.Args(env_id="Hopper")).step) == first
    found = {first}
    assert of(ppo_mjx.Env(ppo_mjx.Args(env_id="Walker2d")).step) not in found | {None}
    for change in (
        mock.patch.object(ppo_mjx, "physics_step", lambda model, data: data),
        mock.patch.object(ppo_mjx, "onekernel", None),
        mock.patch.object(hopper, "task", dataclasses.replace(hopper.task, max_speed=100.0)),
        mock.patch.object(hopper, "control_dt", 2.0),
        mock.patch.object(hopper, "model", hopper.model.tree_replace({"opt.timestep": 0.1})),
        mock.patch.object(hopper, "model", hopper.model.replace(nq=7)),
    ):
        with change:
            found.add(of(hopper.step))
    assert None not in found
    assert len(found) == 7
    assert of(hopper.step) == first


@pytest.mark.parametrize(
    ("script", "args"),
    [
        (ppo_mjx, ppo_mjx.Args(env_id="Humanoid")),
        (sac_mjx, sac_mjx.Args(env_id="Pusher")),
        (ppo_mjx_unitree, ppo_mjx_unitree.default_args("g1")),
        (ppo_mjx_unitree, ppo_mjx_unitree.default_args("go2")),
        (amp_mjx_unitree, amp_mjx_unitree.default_args("g1")),
        (ppo_mjx_unitree_rough, ppo_mjx_unitree_rough.default_args("g1")),
    ],
    ids=lambda value: value.__name__ if isinstance(value, types.ModuleType) else "",
)
def test_environments_of_all_scripts_have_one(script, args):
    """Without it, or with one that changes with what only the training depends on, each start traces
    the physics again: 5 s of a G1's."""
    found = [of(script.Env(args).step), of(script.Env(args).reset)]
    assert None not in found
    other = dataclasses.replace(args, runs_dir="elsewhere", exp_name="other", gamma=0.5)
    if script is not ppo_mjx_unitree_rough:  # whose ground the seed shapes
        other = dataclasses.replace(other, seed=7)
    assert [of(script.Env(other).step), of(script.Env(other).reset)] == found


def test_model_of_mujoco_counts_by_value():
    one, same, other = (ppo_mjx.load_model(ppo_mjx.TASKS["Hopper"]) for _ in range(3))
    other.geom_friction[0, 0] += 1
    found = [of(lambda x, model=model: x + model.nq) for model in (one, same, other)]
    assert None not in found
    assert found[0] == found[1] != found[2]


def test_replaced_parts_of_packages_are_noticed():
    """Whether by code of the user or by other code of packages, in a module, a table or a class."""

    def step(data, model):
        return mjx.step(model, data)

    def mine(*arguments):
        return solver.solve(*arguments)

    def other(*arguments):
        return arguments

    plane_sphere = list(collision_driver._COLLISION_FUNC)[0]
    table = collision_driver._COLLISION_FUNC
    first = of(step)
    found = {first}
    patches = [
        mock.patch.object(solver, "solve", mine),
        mock.patch.object(solver, "solve", other),
        mock.patch.object(solver, "solve", jax.jit(other)),
        mock.patch.object(solver, "solve", jax.vmap(other)),
        mock.patch.object(solver, "solve", solver._linesearch),
        mock.patch.object(mjx_math, "rotate", other),
        mock.patch.dict(table, {plane_sphere: other}),
        mock.patch.dict(table, {plane_sphere: list(table.values())[-1]}),
        mock.patch.object(mjx_types.Data, "replace", other),
        mock.patch.object(jax.scipy.linalg, "cho_solve", other),
        mock.patch.object(jax.lax, "dot", other),
        mock.patch.object(jnp, "dot", jnp.vdot),
        mock.patch.object(np, "cross", other),
    ]
    for patch in patches:
        with patch:
            found.add(of(step))
    assert None not in found
    assert len(found) == 1 + len(patches)
    with mock.patch.object(smooth, "kinematics"):
        assert of(step) is None
    assert of(step) == first


PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import jax, ppo_mjx
from onekernel import fingerprint
env = ppo_mjx.Env(ppo_mjx.Args(env_id="HalfCheetah"))
found = [fingerprint.fingerprint(function) for function in (env.step, env.reset)]
jax.eval_shape(env.reset, jax.random.key(0))
found.append(fingerprint.fingerprint(env.reset))
print(json.dumps(found))
"""


def test_processes_agree():
    """Whatever the order of sets, the number of devices, and what was traced before."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(ROOT)],
            env=os.environ | {"PYTHONHASHSEED": number, "JAX_NUM_CPU_DEVICES": number},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in "12"
    ]
    first, second = (json.loads(process.communicate()[0]) for process in processes)
    assert None not in first, "or was a file of onekernel edited while this ran?"
    assert first == second
    assert first[0] != first[1] == first[2]


def test_edited_package_is_noticed(tmp_path, monkeypatch):
    """It has another fingerprint in a process that starts later, and none in one that runs."""
    package = tmp_path / "site-packages" / "users_package"
    package.mkdir(parents=True)
    file = package / "__init__.py"
    file.write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(str(package.parent))
    users_package = importlib.import_module("users_package")

    def step(x):
        return users_package.double(x)

    def of_new_process(start: float) -> str | None:
        monkeypatch.setattr(fingerprint, "_process_start", lambda: start)
        fingerprint._files_of.cache_clear()
        return of(step)

    assert of_new_process(file.stat().st_mtime - 1) is None
    first = of_new_process(time.time() + 1)
    assert of_new_process(time.time() + 1) == first is not None
    file.write_text(file.read_text() + "# edited\n")
    assert of(step) == first  # what is loaded is still what was read
    second = of_new_process(time.time() + 1)
    os.utime(file, ns=(0, file.stat().st_mtime_ns - 1_000_000_000))
    third = of_new_process(time.time() + 1)
    (package / "more.py").write_text("")
    fourth = of_new_process(time.time() + 1)
    assert None not in (second, third, fourth)
    assert len({first, second, third, fourth}) == 4
    del sys.modules["users_package"]
