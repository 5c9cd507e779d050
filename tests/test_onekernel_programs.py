"""Random programs through `onekernel`, and what it promises of any program.

The first half writes small random functions as Python text, so that a failure prints a program to
paste and run, and compares the compiled one with JAX. The second half checks promises:

- a world's numbers do not depend on its batch, its place in it, its neighbours or the devices;
- a compiled function works under jit, scan, nested vmap, shard_map, with donated and with shared
  arguments, on any pytree;
- what cannot be compiled runs by XLA, and one warning says what and where;
- a gradient through a compiled function is an error that says what to do.
"""

import dataclasses
import functools
import inspect
import textwrap
import typing
import warnings
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P
from quick import quick_jit

import onekernel

NO_FALLBACK = pytest.mark.filterwarnings("error::onekernel.Fallback")


@pytest.fixture(scope="module", autouse=True)
def no_kept_kernels():
    """Compile in every run: a kernel that an earlier run left on the disk would test less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEKERNEL_CACHE", "0")
        yield


def same_bits(got, expected):
    """Assert that two trees have the same structure, types, shapes and bits; any NaN is equal."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))


def close(got, expected, tolerance=1e-5):
    """Assert that two trees have the same structure and types, and numbers as close as that."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        if jnp.issubdtype(mine.dtype, jnp.floating):
            np.testing.assert_allclose(mine, other, rtol=tolerance, atol=tolerance)
        else:
            np.testing.assert_array_equal(mine, other)


# ---- Random programs -----------------------------------------------------------------------

CHECKED = 12  # always; the rest, which differ in their dice alone, before a release
REST = range(CHECKED, 40)
PROGRAM_WORLDS = 21  # a full vector of 16 worlds and a part of one
TABLE = np.sin(np.arange(700, dtype=np.float32))  # large enough to be read from memory

# Each statement makes a value from others. The values stay within a few units, and everything
# that decides (a branch, an index, a number of turns) is computed from integers and from the
# inputs themselves. So a rounding error stays a rounding error, and never changes a decision.
VECTORS = [
    "jnp.sin({vector}) * {scalar}",
    "jnp.tanh({vector} + {vector})",
    "jnp.where({flag}, {vector}, jnp.cos({vector}))",
    "jnp.where(x > y, {vector}, {scalar})",
    "jnp.maximum({vector}, -{vector})",
    "jnp.sqrt(jnp.abs({vector}) + 0.5)",
    "{vector} / (1.0 + {vector} ** 2)",
    "jnp.exp(-jnp.abs({vector}))",
    "jnp.clip({vector} * 1.5, -1.0, {scalar})",
    "jnp.arctan2({vector}, 2.0 + jnp.abs({scalar}))",
    "jnp.log1p(jnp.abs({vector}))",
    "jnp.concatenate([{vector}[2:], {vector}[:2]])",
    "jnp.stack([{scalar}, {vector}[3], {scalar}, {vector}[0]])",
    "jnp.roll({vector}, 1) - 0.5 * {vector}[::-1]",
    "{vector}[jnp.array([3, 0, 0, 2])]",
    "{vector}.at[1].set({scalar})",
    "{vector}.at[{integer} % 4].add({scalar})",
    "{vector}[m % 4]",
    "jnp.take({vector}, m, mode='clip')",
    "lax.dynamic_slice(jnp.concatenate([{vector}, {vector}]), ({integer},), (4,))",
    "lax.dynamic_update_slice({vector}, {vector}[1:3], ({integer},))",
    "jnp.sort({vector})",
    "jnp.cumsum({vector}) * 0.25",
    "lax.cummax({vector})",
    "0.3 * jnp.outer({vector}, {vector})[{integer} % 4] + TABLE[m % 700]",
    "0.4 * (jnp.outer({vector}, {vector}) @ {vector})",
    "jnp.where(x > 0, {vector}, 0.0) + jnp.eye(4)[{integer} % 4]",
    "{integer} * 0.1 + {vector}",
]
SCALARS = [
    "{vector}.sum() * 0.25",
    "{vector}.max() - {scalar}",
    "{vector}.min()",
    "jnp.linalg.norm({vector} + 0.01) * 0.5",
    "{vector} @ {vector} * 0.25",
    "jnp.prod(jnp.tanh({vector}))",
    "jnp.sin({scalar} * {scalar})",
    "{vector}[{integer} % 4] * 0.7",
    "jnp.take({vector}, {integer}, mode='wrap')",
    "TABLE[{integer} % 700]",
    "jnp.where({flag}, {scalar}, 1.5)",
    "jnp.abs({scalar}) ** 1.5 * 0.5",
    "jnp.round({integer} * 0.3)",
]
INTEGERS = [
    "({integer} * 7 + 3) % 13",
    "{integer} // 3 - 1",
    "({integer} ^ m[0]) & 31",
    "(m * 5 % 11).sum()",
    "jnp.argmax(x).astype(jnp.int32)",
    "(x > y).sum() + {integer}",
    "jnp.where({flag}, {integer}, -{integer})",
    "jnp.sort(m)[{integer} % 4]",
    "jnp.clip({integer}, -2, 5)",
    "({integer} << 2) - (n >> 1)",
    "jnp.floor(x[2] * 4).astype(jnp.int32)",
]
FLAGS = [
    "{integer} % 2 == 0",
    "{flag} & (n > 2)",
    "{flag} ^ (x[1] > y[1])",
    "{integer} <= {integer}",
    "(m > 3).any()",
    "~{flag} | (x < 0.5).all()",
]
TEMPLATES = {"vector": VECTORS, "scalar": SCALARS, "integer": INTEGERS, "flag": FLAGS}


class Writer:
    """Writes the text of a random function of x, y: f32 [4]; n: int32; m: int32 [4]; p: bool."""

    def __init__(self, seed: int):
        self.generator = np.random.default_rng(seed)
        self.names = 0

    def new_name(self, kind: str) -> str:
        self.names += 1
        return f"{kind}_{self.names}"

    def pick(self, choices):
        return choices[self.generator.integers(len(choices))]

    def expression(self, template: str, scope: dict) -> str:
        """A template with each of its gaps filled by a value of that kind."""
        while "{" in template:
            kind = template[template.index("{") + 1 : template.index("}")]
            template = template.replace("{" + kind + "}", self.pick(scope[kind]), 1)
        return template

    def any_kinds(self, count: int) -> list[str]:
        return [self.pick(["vector", "vector", "scalar", "integer", "flag"]) for _ in range(count)]

    def assignments(self, scope: dict, kinds: list[str]) -> list[str]:
        """Lines that make a new value of each of the kinds; they join the scope."""
        lines = []
        for kind in kinds:
            right = self.expression(self.pick(TEMPLATES[kind]), scope)
            name = self.new_name(kind)
            lines.append(f"{name} = {right}")
            scope[kind].append(name)
        return lines

    def body(self, scope: dict, depth: int, extra: dict) -> tuple[list[str], dict]:
        """Lines of a function's body, and its scope: the values around it and some of its own."""
        inner = {kind: list(names) for kind, names in scope.items()}
        for kind, name in extra.items():
            inner[kind] += [name] * 3  # so that its own are picked more often
        lines = self.assignments(inner, [*self.any_kinds(1), "integer"])
        if depth < 2 and self.generator.random() < 0.3:
            lines += self.control_flow(inner, depth + 1)
        lines += self.assignments(inner, ["scalar", "vector"])
        return lines, inner

    def function(self, arguments: str, lines: list[str], result: str) -> tuple[str, list[str]]:
        name = self.new_name("function")
        block = textwrap.indent("\n".join([*lines, f"return {result}"]), "    ")
        return name, [f"def {name}({arguments}):", *block.split("\n")]

    def loop_body(self, scope: dict, depth: int, first: str, shape: str) -> tuple[str, list[str]]:
        """A function of a counter, a vector and a scalar that pulls the last two towards zero."""
        vector = self.new_name("vector")
        scalar = self.new_name("scalar")
        own = {"vector": vector, "scalar": scalar, "integer": first}
        lines, inner = self.body(scope, depth, own)
        new_vector = f"jnp.tanh(0.4 * {vector} + 0.3 * {inner['vector'][-1]})"
        new_scalar = f"0.3 * {scalar} + 0.3 * jnp.tanh({inner['scalar'][-1]})"
        if shape == "while":
            unpack = f"{first}, {vector}, {scalar} = carry"
            return self.function(
                "carry", [unpack, *lines], f"({first} - 1, {new_vector}, {new_scalar})"
            )
        unpack = f"{vector}, {scalar} = carry"
        if shape == "fori":
            return self.function(
                f"{first}, carry", [unpack, *lines], f"({new_vector}, {new_scalar})"
            )
        output = f"{inner['vector'][-1]} * 0.5, {inner['integer'][-1]}"
        return self.function(
            f"carry, {first}", [unpack, *lines], f"({new_vector}, {new_scalar}), ({output})"
        )

    def control_flow(self, scope: dict, depth: int = 0) -> list[str]:
        """Lines of a loop or of a branch, whose results join the scope."""
        shape = self.pick(["while", "while", "fori", "scan", "cond", "switch"])
        vector = self.pick(scope["vector"])
        scalar = self.pick(scope["scalar"])
        integer = self.pick(scope["integer"])
        new_vector = self.new_name("vector")
        new_scalar = self.new_name("scalar")
        if shape in ("cond", "switch"):
            lines = []
            names = []
            for _ in range(2 if shape == "cond" else 3):
                own = {"vector": self.new_name("vector")}
                inside, inner = self.body(scope, depth, own)
                results = f"{inner['vector'][-1]}, {inner['scalar'][-1]}"
                name, text = self.function(own["vector"], inside, results)
                names.append(name)
                lines += text
            if shape == "cond":
                flag = self.pick(scope["flag"])
                call = f"lax.cond({flag}, {', '.join(names)}, {vector})"
            else:
                call = f"lax.switch({integer} % 4, ({', '.join(names)}), {vector})"
            lines.append(f"{new_vector}, {new_scalar} = {call}")
        else:
            counter = self.new_name("integer")
            name, lines = self.loop_body(scope, depth, counter, shape)
            if shape == "while":
                start = f"({integer} % 5, {vector}, {scalar})"
                call = f"lax.while_loop(lambda carry: carry[0] > 0, {name}, {start})"
                lines.append(f"_, {new_vector}, {new_scalar} = {call}")
            elif shape == "fori":
                turns = self.pick(["3", f"{integer} % 4"])
                call = f"lax.fori_loop(0, {turns}, {name}, ({vector}, {scalar}))"
                lines.append(f"{new_vector}, {new_scalar} = {call}")
            else:
                kept = self.new_name("kept")
                reverse = self.pick(["True", "False"])
                call = f"lax.scan({name}, ({vector}, {scalar}), m, reverse={reverse})"
                lines.append(f"({new_vector}, {new_scalar}), {kept} = {call}")
                last = self.new_name("vector")
                lines.append(f"{last} = {kept}[0][{integer} % 4] + 0.1 * {kept}[1]")
                scope["vector"].append(last)
        scope["vector"].append(new_vector)
        scope["scalar"].append(new_scalar)
        return lines

    def program(self) -> str:
        scope = {
            "vector": ["x", "y"],
            "scalar": ["x[0]", "y[3]"],
            "integer": ["n", "m[2]"],
            "flag": ["p"],
        }
        lines = self.assignments(scope, self.any_kinds(4)) + self.control_flow(scope)
        lines += self.assignments(scope, self.any_kinds(3)) + self.control_flow(scope)
        lines += self.assignments(scope, self.any_kinds(2))
        results = {kind: f"jnp.stack([{', '.join(scope[kind][-4:])}])" for kind in scope}
        returned = ", ".join(f"{kind!r}: {value}" for kind, value in results.items())
        block = textwrap.indent("\n".join([*lines, f"return {{{returned}}}"]), "    ")
        return f"def program(x, y, n, m, p):\n{block}\n"


def program_inputs(seed, worlds=PROGRAM_WORLDS):
    """The arguments of a random program, [worlds, ...]."""
    generator = np.random.default_rng(seed)
    return (
        generator.uniform(-2, 2, (worlds, 4)).astype(np.float32),
        generator.uniform(-2, 2, (worlds, 4)).astype(np.float32),
        generator.integers(0, 8, worlds, np.int32),
        generator.integers(-5, 12, (worlds, 4), np.int32),
        generator.random(worlds) < 0.5,
    )


def read_program(text):
    """The function that a program's text defines."""
    names = {"jnp": jnp, "lax": lax, "TABLE": jnp.asarray(TABLE)}
    exec(compile(text, "<random program>", "exec"), names)
    return names["program"]


@NO_FALLBACK
@pytest.mark.parametrize(
    "seed", [*range(CHECKED), *(pytest.param(i, marks=pytest.mark.slow) for i in REST)]
)
def test_random_program(seed):
    text = Writer(seed).program()
    program = read_program(text)
    inputs = program_inputs(seed)
    step_worlds = jax.jit(jax.vmap(onekernel.compile(program)))

    print(text)  # pytest shows it where this fails
    expected = quick_jit(jax.vmap(program))(*inputs)
    got = step_worlds(*inputs)
    close(got, expected, tolerance=3e-5)
    same_bits(step_worlds(*(x[13:18] for x in inputs)), jax.tree.map(lambda x: x[13:18], got))


# ---- A function for the promises: loops, branches, tables, a random number --------------------


def search(x, turns, key):
    """A world with a loop of its own length, a branch, a table and a random number."""

    def turn(carry):
        left, v, total = carry
        v = jnp.tanh(v + 0.1 * jnp.roll(v, 1)) + jnp.asarray(TABLE)[(left * 37) % 700]
        rising = (left % 3 == 0) ^ (x[0] > x[1])
        total = lax.cond(rising, lambda t: t + v.sum(), lambda t: t * 0.5, total)
        return left - 1, v, total

    key, use = jax.random.split(key)
    noise = jax.random.uniform(use, (4,))
    _, v, total = lax.while_loop(lambda carry: carry[0] > 0, turn, (turns, x + noise, x[0]))
    return {"v": v / (1 + jnp.abs(v).sum()), "total": total, "turns": turns + 1, "key": key}


def search_inputs(worlds, seed=0):
    generator = np.random.default_rng(seed)
    return (
        jnp.asarray(generator.normal(size=(worlds, 4)), jnp.float32),
        jnp.asarray(generator.integers(0, 30, worlds), jnp.int32),
        jax.random.split(jax.random.key(seed), worlds),
    )


@pytest.fixture(scope="module")
def step():
    return onekernel.compile(search)


def bits(tree):
    """The tree with keys turned into their bits."""
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )


def part(tree, which):
    return jax.tree.map(lambda x: x[which], tree)


@pytest.fixture(scope="module")
def whole(step):
    """The results of 40 worlds, by one call."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", onekernel.Fallback)
        return bits(jax.jit(jax.vmap(step))(*search_inputs(40)))


@NO_FALLBACK
def test_results_are_jax_s(whole):
    expected = bits(quick_jit(jax.vmap(search))(*search_inputs(40)))
    close(whole, expected)


@NO_FALLBACK
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33])
def test_size_of_the_batch_changes_nothing(step, whole, size):
    last = slice(40 - size, 40)
    got = jax.vmap(step)(*part(search_inputs(40), last))
    same_bits(bits(got), part(whole, last))


@NO_FALLBACK
def test_position_in_the_batch_changes_nothing(step, whole):
    order = np.random.default_rng(5).permutation(40)
    got = jax.vmap(step)(*part(search_inputs(40), order))
    same_bits(bits(got), part(whole, order))


@NO_FALLBACK
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_broken_neighbours_change_nothing(step, whole, value):
    x, turns, key = search_inputs(40)
    got = jax.vmap(step)(x.at[::2].set(value), turns, key)
    same_bits(part(bits(got), slice(1, None, 2)), part(whole, slice(1, None, 2)))


@NO_FALLBACK
def test_slow_neighbours_change_nothing(step, whole):
    """A world that is done waits for the others without a change."""
    x, turns, key = search_inputs(40)
    got = jax.vmap(step)(x, turns.at[1::2].set(3000), key)
    same_bits(part(bits(got), slice(0, None, 2)), part(whole, slice(0, None, 2)))


@NO_FALLBACK
def test_without_vmap(step, whole):
    for world in (0, 17, 39):
        inputs = part(search_inputs(40), world)
        same_bits(bits(step(*inputs)), part(whole, world))
        same_bits(bits(jax.jit(step)(*inputs)), part(whole, world))


@NO_FALLBACK
@pytest.mark.parametrize("devices", [1, 2])
def test_devices_change_nothing(step, whole, make_mesh, devices):
    mesh = make_mesh(devices)
    shard = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("devices"), out_specs=P("devices"), check_vma=False
    )
    got = jax.jit(shard(jax.vmap(step)))(*search_inputs(40))
    same_bits(bits(got), whole)


@NO_FALLBACK
def test_shard_map_that_checks_what_varies(step, whole, make_mesh):
    """`shard_map` by default follows which values differ between devices."""
    mesh = make_mesh(2)
    shard = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("devices"), out_specs=P("devices")
    )
    got = jax.jit(shard(jax.vmap(step)))(*search_inputs(40))
    same_bits(bits(got), whole)


@NO_FALLBACK
def test_constant_array_in_where_under_shard_map(make_mesh):
    """JAX reshards it there, which is nothing to do for one world."""
    numbers = np.arange(5, dtype=np.int32)
    worlds = jax.vmap(onekernel.compile(lambda x: jnp.where(x > 0, 0, numbers)))
    shard = functools.partial(
        jax.shard_map, mesh=make_mesh(2), in_specs=P("devices"), out_specs=P("devices")
    )
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    got = jax.jit(shard(worlds, check_vma=False))(x)
    np.testing.assert_array_equal(got, np.where(x > 0, 0, numbers))


@NO_FALLBACK
def test_shared_argument_under_shard_map(make_mesh):
    """An argument that all devices and worlds share."""
    mesh = make_mesh(2)
    step = onekernel.compile(lambda x, scale: jnp.sin(x) * scale)
    x = jnp.linspace(0.0, 1.0, 12).reshape(6, 2)
    scale = jnp.array([2.0, 3.0])
    worlds = jax.vmap(step, in_axes=(0, None))
    shard = jax.shard_map(worlds, mesh=mesh, in_specs=(P("devices"), P()), out_specs=P("devices"))
    same_bits(jax.jit(shard)(x, scale), worlds(x, scale))


@NO_FALLBACK
def test_sharded_worlds_without_shard_map(step, whole, make_mesh):
    """XLA splits or gathers the worlds as it likes; the numbers are the same."""
    sharding = NamedSharding(make_mesh(2), P("devices"))
    inputs = jax.device_put(search_inputs(40), sharding)
    same_bits(bits(jax.jit(jax.vmap(step))(*inputs)), whole)


@NO_FALLBACK
def test_nested_vmap_is_a_larger_batch(step, whole):
    """Worlds times seeds, and one more axis."""
    inputs = search_inputs(40)
    nested = jax.tree.map(lambda x: x.reshape(8, 5, *x.shape[1:]), inputs)
    got = jax.jit(jax.vmap(jax.vmap(step)))(*nested)
    same_bits(jax.tree.map(lambda x: x.reshape(40, *x.shape[2:]), bits(got)), whole)

    deep = jax.tree.map(lambda x: x.reshape(2, 4, 5, *x.shape[1:]), inputs)
    got = jax.vmap(jax.vmap(jax.vmap(step)))(*deep)
    same_bits(jax.tree.map(lambda x: x.reshape(40, *x.shape[3:]), bits(got)), whole)


@NO_FALLBACK
def test_nested_vmap_of_different_arguments(step):
    """Each axis maps arguments of its own: every x with every number of turns."""
    x, turns, key = search_inputs(5)
    every = jax.vmap(jax.vmap(step, (None, 0, None)), (0, None, None))
    got = bits(every(x, turns[:3], key[0]))
    for i in range(5):
        for j in range(3):
            same_bits(part(part(got, i), j), bits(step(x[i], turns[j], key[0])))


@NO_FALLBACK
@pytest.mark.parametrize("shared", [(0,), (1,), (2,), (0, 2), (0, 1)], ids=str)
def test_shared_arguments_equal_repeated_ones(step, shared):
    inputs = search_inputs(9)
    one = [x[4] if i in shared else x for i, x in enumerate(inputs)]
    repeated = [x[jnp.full(9, 4)] if i in shared else x for i, x in enumerate(inputs)]
    axes = [None if i in shared else 0 for i in range(3)]
    got = jax.jit(jax.vmap(step, in_axes=axes))(*one)
    same_bits(bits(got), bits(jax.vmap(step)(*repeated)))


@NO_FALLBACK
def test_products_are_rounded_alike_in_every_kernel():
    """Where a product is both summed up and a result, fusing the two roundings has to be decided
    in the same way for arguments that are shared, mapped and alone."""
    step = onekernel.compile(lambda a, b: {"dot": a @ b, "products": a * b})
    generator = np.random.default_rng(0)
    a = generator.uniform(-1, 1, (50, 4)).astype(np.float32)
    b = generator.uniform(-1, 1, 4).astype(np.float32)
    got = jax.vmap(step)(a, np.tile(b, (50, 1)))
    same_bits(jax.vmap(step, in_axes=(0, None))(a, b), got)
    for world in range(50):
        same_bits(step(a[world], b), part(got, world))


@NO_FALLBACK
def test_all_arguments_shared(step):
    one = part(search_inputs(3), 1)
    got = jax.vmap(step, in_axes=None, axis_size=6)(*one)
    expected = bits(step(*one))
    for world in range(6):
        same_bits(part(bits(got), world), expected)


@NO_FALLBACK
def test_other_batch_axes(step, whole):
    x, turns, key = search_inputs(40)
    got = jax.vmap(step, in_axes=(1, 0, 0))(x.T, turns, key)
    same_bits(bits(got), whole)
    turned = jax.vmap(lambda *inputs: step(*inputs)["v"], out_axes=1)(x, turns, key)
    same_bits(turned, whole["v"].T)


@NO_FALLBACK
def test_jit_changes_nothing(step, whole):
    same_bits(bits(jax.vmap(step)(*search_inputs(40))), whole)


@NO_FALLBACK
def test_donated_arguments(step, whole):
    inputs = search_inputs(40)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        got = jax.jit(jax.vmap(step), donate_argnums=(0, 1, 2))(*inputs)
    same_bits(bits(got), whole)


@NO_FALLBACK
def test_donated_state_is_updated_many_times():
    """The buffer that a step reads may be the one that it writes."""

    def swap(state):
        return {"a": state["b"] + 1, "b": state["a"] * 0.5}

    start = {"a": np.arange(60, dtype=np.float32), "b": -np.arange(60, dtype=np.float32)}
    worlds = jax.jit(jax.vmap(onekernel.compile(swap)), donate_argnums=0)
    state = jax.tree.map(jnp.array, start)
    expected = start
    for _ in range(5):
        state = worlds(state)
        expected = {"a": expected["b"] + np.float32(1), "b": expected["a"] * np.float32(0.5)}
    same_bits(state, expected)


@NO_FALLBACK
def test_scan_over_steps(step):
    """A rollout: `lax.scan` over the worlds' step is the same step in a Python loop."""
    x, turns, key = search_inputs(11)

    def advance(state, _):
        result = jax.vmap(step)(*state)
        return (result["v"], result["turns"] % 5, result["key"]), result["total"]

    last, totals = jax.jit(lambda state: lax.scan(advance, state, length=4))((x, turns, key))
    state = (x, turns, key)
    expected = []
    for _ in range(4):
        state, total = advance(state, None)
        expected.append(total)
    same_bits(totals, jnp.stack(expected))
    same_bits(bits(last), bits(state))


@NO_FALLBACK
def test_inside_other_transformations(step, whole):
    """Within a while loop, a branch, `lax.map` and with another compiled function beside it."""
    inputs = search_inputs(40)
    worlds = jax.vmap(step)
    double = jax.vmap(onekernel.compile(lambda v: v * 2))

    def both(flag, inputs):
        result = lax.cond(flag, lambda i: worlds(*i)["v"], lambda i: i[0] * 0, inputs)
        return double(result), worlds(*inputs)["total"]

    v, total = jax.jit(both)(True, inputs)
    same_bits(v, whole["v"] * 2)
    same_bits(total, whole["total"])
    same_bits(jax.jit(both)(False, inputs)[0], whole["v"] * 0)

    mapped = lax.map(lambda one: step(*one)["v"], inputs)
    same_bits(mapped, whole["v"])
    turned = lax.fori_loop(0, 3, lambda _, v: double(v), whole["v"])
    same_bits(turned, whole["v"] * 8)


@NO_FALLBACK
def test_abstract_and_ahead_of_time(step, whole):
    """`eval_shape` runs nothing; `lower` and `compile` give an executable."""
    inputs = search_inputs(40)
    shapes = jax.eval_shape(jax.vmap(step), *inputs)
    assert shapes["v"].shape == (40, 4)
    assert shapes["turns"].dtype == jnp.int32
    executable = jax.jit(jax.vmap(step)).lower(*inputs).compile()
    same_bits(bits(executable(*inputs)), whole)


# ---- Signatures and pytrees ----------------------------------------------------------------


@flax.struct.dataclass
class Body:
    position: jax.Array
    contacts: dict
    nothing: None = None
    name: str = flax.struct.field(pytree_node=False, default="body")


class Pair(typing.NamedTuple):
    left: jax.Array
    right: jax.Array


@NO_FALLBACK
def test_pytrees_in_and_out():
    """Dicts, flax dataclasses with static fields, named tuples, lists, None."""

    def move(body, pair, rest):
        contacts = {name: value + pair.left for name, value in body.contacts.items()}
        moved = body.replace(position=body.position + pair.right, contacts=contacts)
        return moved, Pair(pair.right, rest[0]), None, {"empty": {}, "list": [rest[1], None]}

    generator = np.random.default_rng(0)
    body = Body(
        position=jnp.asarray(generator.normal(size=(6, 3)), jnp.float32),
        contacts={"foot": jnp.arange(6.0), "hand": jnp.ones((6, 2))},
        name="leg",
    )
    pair = Pair(jnp.linspace(0.0, 1.0, 6), jnp.full((6, 3), 2.0))
    rest = [jnp.arange(6), jnp.arange(6) % 2 == 0, None]
    got = jax.vmap(onekernel.compile(move))(body, pair, rest)
    assert got[0].name == "leg"
    same_bits(got, jax.vmap(move)(body, pair, rest))


@NO_FALLBACK
def test_keyword_and_default_arguments():
    def scale(x, factor=2.0, *, offset=None):
        return x * factor + (0.0 if offset is None else offset)

    step = onekernel.compile(scale)
    x = jnp.arange(6.0)
    same_bits(jax.vmap(step)(x), x * 2)
    same_bits(jax.vmap(lambda v, o: step(v, offset=o))(x, x), x * 2 + x)
    same_bits(jax.vmap(lambda v: step(x=v, factor=3.0))(x), x * 3)


@NO_FALLBACK
def test_static_arguments_by_partial():
    def power(x, *, count, kind):
        for _ in range(count):
            x = x * x if kind == "square" else x + x
        return x

    x = jnp.arange(5.0)
    squares = onekernel.compile(functools.partial(power, count=2, kind="square"))
    doubles = onekernel.compile(functools.partial(power, count=3, kind="double"))
    same_bits(jax.vmap(squares)(x), x**4)
    same_bits(jax.vmap(doubles)(x), x * 8)


@NO_FALLBACK
def test_methods_and_decorator():
    @dataclasses.dataclass(frozen=True)
    class Env:
        gain: float

        def step(self, x):
            return x * self.gain

    x = jnp.arange(5.0)
    same_bits(jax.vmap(onekernel.compile(Env(3.0).step))(x), x * 3)
    same_bits(jax.vmap(onekernel.compile(Env(5.0).step))(x), x * 5)

    @onekernel.compile
    def decorated(x):
        return x + 1

    same_bits(jax.vmap(decorated)(x), x + 1)


def test_original_function_is_kept():
    assert onekernel.compile(search).function is search


@NO_FALLBACK
def test_one_function_of_several_shapes_and_types():
    step = onekernel.compile(lambda x: (x * 2, x.sum()))
    for x in (np.ones((4, 3), np.float32), np.ones((4, 5), np.float32), np.ones((6, 3), np.int32)):
        same_bits(jax.vmap(step)(x), jax.vmap(step.function)(x))
    same_bits(
        jax.vmap(step)(np.ones((4, 3), np.float32)), jax.vmap(step.function)(jnp.ones((4, 3)))
    )


@NO_FALLBACK
def test_numpy_and_python_numbers():
    step = onekernel.compile(lambda x, factor: x * factor + 1)
    for x, factor in ((np.float32(2), 3.0), (2, 3), (2.5, 2), (jnp.arange(3.0), 2), (True, 2)):
        same_bits(step(x, factor), jax.jit(step.function)(x, factor))
    x = np.arange(4, dtype=np.float32)
    same_bits(jax.vmap(step, (0, None))(x, 3.0), jnp.asarray(x * 3 + 1))


@NO_FALLBACK
def test_empty_arrays():
    """Arrays without elements, in and out, and reductions over nothing."""

    def empty(x, y, n):
        return {
            "same": x,
            "doubled": x * 2,
            "sum": y.sum(),
            "sum_rows": y.sum(0),
            "product": y.T @ y,
            "joined": jnp.concatenate([x, n.astype(jnp.float32)]),
            "made": jnp.zeros((2, 0)),
        }

    inputs = (np.zeros((5, 0), np.float32), np.zeros((5, 0, 3), np.float32), np.ones((5, 2), int))
    got = jax.vmap(onekernel.compile(empty))(*inputs)
    same_bits(got, jax.vmap(empty)(*inputs))


def numbers(generator, worlds, size, dtype):
    """Bits of every kind: NaNs with their payloads and denormals too, where nothing computes."""
    words = generator.integers(0, 2**32, (worlds, size), dtype=np.uint32)
    return words % 2 == 1 if dtype == "bool" else words.view(dtype)


@NO_FALLBACK
@pytest.mark.parametrize("dtype", ["float32", "int32", "uint32", "bool"])
def test_arrays_of_any_size_come_and_go(dtype):
    """A kernel moves elements in blocks of as many as a vector has lanes, of all worlds in a vector
    at once; neither worlds nor elements need fill one. To the bit, and nothing beyond the end."""
    sizes = (0, 1, 15, 16, 17, 33, 130)

    def shuffled(xp, *arrays):
        results = {}
        for size, x in zip(sizes, arrays, strict=True):
            results[size] = {
                "unchanged": x,
                "reversed": x[::-1],
                "inner": x[1:-1],
                "moved": xp.roll(x, 3),
                "joined": xp.concatenate([arrays[3], x, arrays[1]]),
            }
        return results

    compiled = onekernel.compile(functools.partial(shuffled, jnp))
    generator = np.random.default_rng(0)
    for worlds, axes in ((1, (0,) * 7), (37, (0,) * 7), (18, (0, None, 0, None, 0, None, 0))):
        arrays = [numbers(generator, worlds, size, dtype) for size in sizes]
        own = [x if axis == 0 else x[0] for x, axis in zip(arrays, axes, strict=True)]
        got = jax.tree.map(np.asarray, jax.vmap(compiled, in_axes=axes)(*own))
        for world in range(worlds):
            own = [x[world if axis == 0 else 0] for x, axis in zip(arrays, axes, strict=True)]
            mine = jax.tree.leaves(jax.tree.map(lambda x, world=world: x[world], got))
            for one, other in zip(mine, jax.tree.leaves(shuffled(np, *own)), strict=True):
                assert (one.dtype, one.shape) == (other.dtype, other.shape)
                assert one.tobytes() == other.tobytes()


@NO_FALLBACK
def test_few_elements_of_a_large_array():
    """Those that are read lie far apart."""

    def read(x):
        return x[0] + x[3] * x[500], x[jnp.array([998, 17, 999, 2])]

    x = np.random.default_rng(0).normal(size=(19, 1000)).astype(np.float32)
    close(jax.vmap(onekernel.compile(read))(x), jax.vmap(read)(x))


@NO_FALLBACK
@pytest.mark.parametrize("size", [40, 5000])
def test_arrays_that_stay_in_memory(monkeypatch, size):
    """As in programs that are too large to be taken apart: loops read operands and write results."""
    monkeypatch.setattr(onekernel.api, "SCALAR_LIMITS", (8,))

    def looped(x, n, flags, place):
        doubled = x * 2
        return doubled, x, ~flags, jnp.where(flags, n, -n)[::-1], jnp.cumsum(n), doubled[place]

    generator = np.random.default_rng(0)
    inputs = (
        generator.normal(size=(21, size)).astype(np.float32),
        generator.integers(-9, 9, (21, size)).astype(np.int32),
        generator.integers(0, 2, (21, size)) == 1,
        generator.integers(0, size, 21).astype(np.int32),
    )
    got = jax.vmap(onekernel.compile(looped))(*inputs)
    same_bits(got, quick_jit(jax.vmap(looped))(*inputs))
    axes = (0, None, 0, 0)
    inputs = (inputs[0], inputs[1][4], *inputs[2:])
    got = jax.vmap(onekernel.compile(looped), in_axes=axes)(*inputs)
    same_bits(got, quick_jit(jax.vmap(looped, in_axes=axes))(*inputs))


@NO_FALLBACK
def test_arguments_that_loops_and_branches_carry():
    """Not as an operand of any operation, but as a start, a next value, a condition, a result."""

    def carried(x, flag, n):
        last = lax.fori_loop(0, n, lambda i, pair: (pair[1], x[2]), (x[0], x[1]))
        again = lax.fori_loop(
            0, 40, lambda i, three: (three[1], x[2], three[2] * three[0]), (x[0], x[1], x[3])
        )
        picked = lax.cond(flag[0], lambda: (x[3], flag[1]), lambda: (x[4] * x[3], flag[2]))
        asked = lax.while_loop(
            lambda c: c[0], lambda c: (c[1], flag[0], c[2] + x[0]), (*flag, x[5])[1:]
        )
        return last, again, picked, asked

    generator = np.random.default_rng(0)
    x = generator.normal(size=(37, 6)).astype(np.float32)
    flag = np.stack([np.zeros(37), np.arange(37) % 2, np.arange(37) % 3 == 0], 1) == 1
    n = np.arange(37) % 4
    close(jax.vmap(onekernel.compile(carried))(x, flag, n), jax.vmap(carried)(x, flag, n))


@NO_FALLBACK
def test_elements_cost_the_same_code_each():
    """An operand's element is read by an instruction, not gathered from as many places as there are
    lanes; and a result's written so."""

    def lines(size):
        kernel = onekernel.compile(lambda x, y: (x * y, y)).kernel(
            onekernel.api.Signature.of(
                *jax.tree.flatten(((np.ones(size, np.float32), np.ones(size, np.float32)), {}))
            )
        )
        text, _ = onekernel.cpu.kernel_ir(
            kernel.graph("cpu"), [True, True], [size, size], 2, batched=True
        )
        assert "gather" not in text
        assert "scatter" not in text
        return text.count("\n")

    # Addresses and reads of two numbers, their product, its address, its write.
    assert lines(2000) - lines(1000) == 7 * 1000


@NO_FALLBACK
def test_no_worlds():
    step = onekernel.compile(lambda x: jnp.sin(x).sum())
    assert jax.vmap(step)(np.zeros((0, 3), np.float32)).shape == (0,)


@NO_FALLBACK
def test_results_that_need_no_work():
    """Arguments returned unchanged, constants, one value twice, an argument that nothing reads."""

    def trivial(x, n, flag, unused):
        y = x + 1
        return {
            "unchanged": x,
            "twice": (y, y),
            "number": 3.5,
            "integer": jnp.int32(7),
            "table": jnp.arange(4.0),
            "flag": flag,
            "n": n,
            "true": True,
        }

    inputs = (np.ones((6, 2), np.float32), np.arange(6), np.arange(6) > 2, np.zeros((6, 9)))
    got = jax.vmap(onekernel.compile(trivial))(*inputs)
    same_bits(got, jax.jit(jax.vmap(trivial))(*inputs))
    alone = onekernel.compile(trivial)(*(x[2] for x in inputs))
    same_bits(alone, jax.jit(trivial)(*(x[2] for x in inputs)))


@NO_FALLBACK
def test_result_that_depends_on_nothing():
    step = onekernel.compile(lambda x: jnp.arange(3) * 2)
    same_bits(jax.vmap(step)(np.zeros(5, np.float32)), jnp.tile(jnp.arange(3) * 2, (5, 1)))


@NO_FALLBACK
@pytest.mark.parametrize("nothing", [None, (), {}, {"a": None}], ids=str)
def test_no_results(nothing):
    step = onekernel.compile(lambda x: nothing)
    assert jax.vmap(step)(np.zeros((3, 2), np.float32)) == nothing
    assert jax.jit(step)(np.zeros(2, np.float32)) == nothing


@NO_FALLBACK
def test_no_arguments():
    step = onekernel.compile(lambda: jnp.arange(4.0) + 1)
    same_bits(step(), jnp.arange(1.0, 5.0))


@NO_FALLBACK
def test_mistakes_of_the_user_stay_what_they_are():
    """An error within the function is JAX's own, and no reason to run by XLA instead."""
    step = onekernel.compile(lambda x, y: x + y)
    with pytest.raises(TypeError, match="broadcast"):
        jax.vmap(step)(np.zeros((5, 3), np.float32), np.zeros((5, 4), np.float32))
    with pytest.raises(TypeError):
        step(np.zeros(3, np.float32))
    with pytest.raises(jax.errors.TracerBoolConversionError):
        onekernel.compile(lambda x: x if x > 0 else -x)(1.0)


# ---- What cannot be compiled ---------------------------------------------------------------


def uses_nextafter(x):
    y = x * 2
    return jnp.nextafter(y, 9.0)  # the line that the warning names


def uses_nextafter_in_a_loop(x):
    def turn(_, v):
        return jnp.nextafter(v, 9.0)  # the line that the warning names

    return lax.fori_loop(0, 3, turn, x)


def uses_scatter_by_a_function(x):
    return jnp.asarray(x).at[1].apply(jnp.negative)  # the line that the warning names


def uses_callback(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    host = lambda v: np.asarray(v) * 2  # noqa: E731
    return jax.pure_callback(host, shape, x, vmap_method="sequential") + 1  # the line ...


def named_line(function):
    """The number of the line of a function that the warning has to name."""
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if "# the line" in line)


def warned(record):
    return [str(w.message) for w in record if issubclass(w.category, onekernel.Fallback)]


@pytest.mark.parametrize(
    ("function", "primitive"),
    [
        (uses_nextafter, "nextafter"),
        (uses_nextafter_in_a_loop, "nextafter"),
        (uses_scatter_by_a_function, "apply"),
        (uses_callback, "pure_callback"),
    ],
    ids=["primitive", "in_a_loop", "scatter", "callback"],
)
def test_unsupported_primitive_runs_by_xla(function, primitive):
    """One warning for all calls: the primitive, this file and the line; and the right numbers."""
    step = onekernel.compile(function)
    x = np.linspace(-1, 1, 12).astype(np.float32).reshape(4, 3)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        got = jax.vmap(step)(x)
        jitted = jax.jit(jax.vmap(step))
        again = jitted(x)
        jitted(x)
        jax.vmap(step)(x[:2])
        alone = step(x[0])
    expected = jax.vmap(function)(x)
    same_bits(got, expected)
    same_bits(again, expected)
    same_bits(alone, expected[0])
    messages = warned(record)
    assert len(messages) == 1, messages
    assert primitive in messages[0]
    assert Path(__file__).name in messages[0]
    assert str(named_line(function)) in messages[0]


def half_inside(x):
    return (x.astype(jnp.float16) * 2).astype(jnp.float32)  # the line that the warning names


@pytest.mark.parametrize("type_name", ["float16", "bfloat16", "int8", "uint8", "int16"])
def test_unsupported_type_runs_by_xla(type_name):
    step = onekernel.compile(lambda x: x * 2)
    x = jnp.arange(6).reshape(3, 2).astype(type_name)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        got = jax.vmap(step)(x)
        jax.vmap(step)(x)
    same_bits(got, x * 2)
    messages = warned(record)
    assert len(messages) == 1, messages
    assert type_name in messages[0]


def test_unsupported_type_inside_runs_by_xla():
    step = onekernel.compile(half_inside)
    x = np.linspace(-1, 1, 12).astype(np.float32)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        got = jax.vmap(step)(x)
    same_bits(got, jax.vmap(half_inside)(x))
    messages = warned(record)
    assert len(messages) == 1, messages
    assert "float16" in messages[0]
    assert Path(__file__).name in messages[0]
    assert str(named_line(half_inside)) in messages[0]


def test_float64_runs_by_xla():
    step = onekernel.compile(lambda x: jnp.sin(x) + 1e-12)
    x = np.linspace(-1, 1, 12)
    with jax.enable_x64(True), warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        got = jax.vmap(step)(x)
        alone = step(x[3])
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, np.sin(x) + 1e-12, rtol=1e-15)
    np.testing.assert_allclose(alone, np.sin(x[3]) + 1e-12, rtol=1e-15)
    messages = warned(record)
    assert len(messages) == 1, messages
    assert "float64" in messages[0]


@NO_FALLBACK
def test_float32_with_x64_enabled():
    """Only what is of an unsupported type keeps a function from being compiled."""
    step = onekernel.compile(lambda x: jnp.sin(x) * 2)
    x = np.linspace(-1, 1, 12).astype(np.float32)
    expected = jax.vmap(step)(x)
    with jax.enable_x64(True):
        same_bits(jax.vmap(step)(x), expected)


def test_arguments_that_are_no_arrays_run_by_xla():
    """One warning for each combination of places and types says which they are."""

    @onekernel.compile
    def move(x, way, settings=None):
        return x + 1 if way == "up" else x - 1

    x = np.zeros(3, np.float32)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        up, down = move(x, "up"), move(x[:2], "down")
        jax.jit(lambda x: move(x, way="up", settings={"deep": [1, object()]}))(x)
    assert (up == 1).all() and (down == -1).all()
    first, second = warned(record)
    assert "move: args[1] is no array but of type str; it runs by XLA" in first
    assert "kwargs['way']" in second and "kwargs['settings']['deep'][1]" in second
    assert {Path(warning.filename).name for warning in record} == {Path(__file__).name}


@NO_FALLBACK
def test_sizes_of_numpys_types():
    """The cache, which writes in JSON, takes them; jnp.split has pieces of such sizes."""

    def function(x):
        first, second = jnp.split(x, [5000])
        part = lax.slice(x, np.array([2]), np.array([9000]), np.array([1]))
        window = lax.dynamic_slice(x, (x[0].astype(int),), tuple(np.array([7000])))
        return first, jnp.cumsum(first), jnp.sort(second), jnp.cumsum(part), jnp.cumsum(window)

    x = np.random.default_rng(0).integers(0, 9, (2, 10_000)).astype(np.float32)
    close(jax.vmap(onekernel.compile(function))(x), jax.vmap(function)(x))


# ---- JAX's settings for debugging ------------------------------------------------------------


def root_of_cosine(x):
    return jnp.sqrt(jnp.cos(x)) + 1


@NO_FALLBACK
@pytest.mark.parametrize("transformation", [jax.vmap, lambda f: jax.jit(jax.vmap(f))])
def test_nan_is_an_error_under_debug_nans(transformation):
    """JAX's own, which names what it arises in."""
    step = transformation(onekernel.compile(root_of_cosine))
    with jax.debug_nans(True):
        close(step(jnp.zeros(3)), jnp.full(3, 2.0))
        with pytest.raises(FloatingPointError, match=r"\(nan\) encountered in sqrt"):
            step(jnp.array([0.0, 3.0, 0.0]))
    assert jnp.isnan(step(jnp.array([0.0, 3.0, 0.0]))[1])


@NO_FALLBACK
def test_infinity_is_an_error_under_debug_infs():
    step = onekernel.compile(lambda x: 1 / x)
    with jax.debug_infs(True):
        assert step(jnp.float32(2)) == 0.5
        with pytest.raises(FloatingPointError, match=r"\(inf\) encountered in div"):
            step(jnp.float32(0))


def test_function_itself_runs_under_disable_jit():
    """In Python, where a debugger can stop."""
    seen = []

    def function(x):
        seen.append(x)
        return x * 2

    step = onekernel.compile(function)
    program = jax.make_jaxpr(step)(1.0)  # which holds the kernel
    with jax.disable_jit():
        assert step(jnp.float32(3)) == 6
        assert (jax.vmap(step)(jnp.ones(3)) == 2).all()
        assert jax.core.eval_jaxpr(program.jaxpr, program.consts, 4.0) == [8]
    assert not isinstance(seen[1], jax.core.Tracer) and seen[1] == 3


def test_fallback_is_a_user_warning():
    assert issubclass(onekernel.Fallback, UserWarning)


# ---- Gradients -----------------------------------------------------------------------------


def cube(x):
    return x**3


TRANSFORMATIONS = {
    "grad": lambda step: jax.grad(step)(2.0),
    "grad_of_vmap": lambda step: jax.grad(lambda x: jax.vmap(step)(x).sum())(jnp.arange(3.0)),
    "grad_in_jit": lambda step: jax.jit(jax.grad(step))(2.0),
    "value_and_grad": lambda step: jax.value_and_grad(step)(2.0),
    "jvp": lambda step: jax.jvp(step, (2.0,), (1.0,)),
    "vjp": lambda step: jax.vjp(step, 2.0),
    "jacfwd": lambda step: jax.jacfwd(step)(2.0),
    "linearize": lambda step: jax.linearize(step, 2.0),
    "vmap_of_grad": lambda step: jax.vmap(jax.grad(step))(jnp.arange(3.0)),
}


@NO_FALLBACK
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_gradient_is_a_clear_error(name):
    """The message says whose error it is and what to differentiate instead."""
    with pytest.raises((TypeError, NotImplementedError)) as error:
        TRANSFORMATIONS[name](onekernel.compile(cube))
    assert "onekernel" in str(error.value)
    assert ".function" in str(error.value)


def test_gradient_of_the_original_function():
    assert jax.grad(onekernel.compile(cube).function)(2.0) == 12


@NO_FALLBACK
def test_gradient_beside_a_compiled_function():
    """A loss may use a compiled function on what it does not differentiate."""
    step = onekernel.compile(cube)

    def loss(weight, x):
        return (weight * jax.vmap(step)(x)).sum()

    assert jax.grad(loss)(2.0, jnp.arange(3.0)) == 9
    assert jax.jit(jax.grad(loss))(2.0, jnp.arange(3.0)) == 9
