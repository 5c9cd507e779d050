"""Large kernels in several functions, compiled by several processes (onekernel/parts.py), and kernels
for other processors."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llvmlite")

import onekernel
from onekernel import codegen, cpu, machine_code, parts, slots


def program(x, table):
    """Straight code, loops in loops, branches, truth values, integers and indices that are computed
    in one place and needed in others, a result of each type."""
    order = jnp.argsort(x)
    high = x > 0.3
    chosen = table[order[0]] + table[order[1]]

    def turn(i, carry):
        total, count = carry
        swirl = jnp.sin(total) * chosen + jnp.roll(total, 1) * x[order[2]]
        total = jax.lax.cond(
            swirl[0] > total[1],
            lambda: jnp.where(high, swirl * 0.5, total + table[i]) + jnp.cos(swirl).sum(),
            lambda: total - 0.1 * jnp.tanh(swirl @ jnp.outer(x, total)),
        )
        deep = jax.lax.while_loop(
            lambda s: (s < 4.0) & high[1], lambda s: s * 2 + jnp.abs(total[2]) + 0.1, abs(x[0])
        )
        return total * jnp.exp(-deep * 0.1), count + order[i % 3] * high.sum()

    total, count = jax.lax.fori_loop(0, 5, turn, (x * 0.7, jnp.int32(0)))
    last = jax.lax.cond(high[3], lambda: total[order], lambda: total * table[count % 6])
    return last, count, high, total @ x


def arguments(worlds):
    random = np.random.default_rng(0)
    x = jnp.array(random.uniform(-1, 1, (worlds, 6)), jnp.float32)
    return x, jnp.array(random.uniform(-1, 1, (worlds, 6)), jnp.float32)


def run(worlds):
    # A function of its own each time, so that no kernel made before is found.
    return jax.vmap(onekernel.compile(lambda x, table: program(x, table)))(*arguments(worlds))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setenv("ONEKERNEL_CACHE", "0")
    monkeypatch.setattr(codegen, "SMALL", 0)
    monkeypatch.setattr(codegen, "PART", 12)
    monkeypatch.setattr(parts, "MODULE", 4000)


@pytest.fixture
def texts(monkeypatch):
    """The modules' texts of what is compiled."""
    texts = []
    real = cpu.start_compiling

    def start_compiling(text):
        texts.append(text.split(parts.SEPARATOR))
        return real(text)

    monkeypatch.setattr(cpu, "start_compiling", start_compiling)
    return texts


@pytest.mark.parametrize("worlds", [1, 45])
def test_parts_change_no_bit(monkeypatch, texts, worlds):
    divided = run(worlds)
    assert len(texts[0]) > 3
    assert sum(text.count("define void @part") for text in texts[0]) > 10
    monkeypatch.setattr(codegen, "SMALL", 10**9)
    whole = run(worlds)
    assert len(texts[1]) == 1
    for one, other in zip(divided, whole, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(divided, jax.vmap(program)(*arguments(worlds)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)


def test_other_processes_compile_the_same(monkeypatch, texts):
    run(3)
    alone = [machine_code.compile_module(text) for text in texts[0]]
    monkeypatch.setattr(machine_code, "TEXT_OF_A_PROCESS", 1)
    monkeypatch.setattr(machine_code, "count_cores", lambda: 3)
    finish = machine_code.start_modules(texts[0])
    monkeypatch.setattr(machine_code, "compile_module", None)  # none is compiled here
    assert finish() == alone


def test_xla_compiles_while_other_processes_do(monkeypatch):
    """The program is compiled before its kernel is; the first call waits for it, also if two come
    at once."""
    expected = run(45)
    monkeypatch.setattr(machine_code, "TEXT_OF_A_PROCESS", 1)
    started = threading.Event()
    real = machine_code.start_modules

    def start_modules(texts):
        finish = real(texts)
        return lambda: started.wait(60) and finish()

    monkeypatch.setattr(machine_code, "start_modules", start_modules)
    # Another function, and so another program to JAX and another kernel to XLA.
    function = onekernel.compile(lambda *x: (program(*x)[0] + 1.0, *program(*x)[1:]))
    compiled = jax.jit(jax.vmap(function)).lower(*arguments(45)).compile()
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(compiled, *arguments(45)) for _ in range(2)]
        time.sleep(0.1)
        assert not any(call.done() for call in calls)
        started.set()
        for call in calls:
            first, *others = call.result()
            np.testing.assert_array_equal(first, expected[0] + 1.0)
            for one, other in zip(others, expected[1:], strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("problem", [MemoryError("no more"), KeyboardInterrupt("no more")])
def test_the_first_call_raises_what_compilation_does(monkeypatch, problem):
    """And tries again at the next one."""
    real, times = machine_code.start_modules, []

    def start_modules(texts):
        finish = real(texts)

        def fail_twice():
            times.append(1)
            if len(times) < 3:
                raise problem
            return finish()

        return fail_twice

    monkeypatch.setattr(machine_code, "TEXT_OF_A_PROCESS", 1)
    monkeypatch.setattr(machine_code, "start_modules", start_modules)
    factor = len(type(problem).__name__)  # a kernel of its own for each problem
    function = onekernel.compile(lambda x: x * factor + 7.0)
    compiled = jax.jit(jax.vmap(function)).lower(jnp.ones(3)).compile()
    told = f"onekernel: {type(problem).__name__}: no more"
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match=told):
            jax.block_until_ready(compiled(jnp.ones(3)))
    np.testing.assert_array_equal(compiled(jnp.ones(3)), factor + 7.0)


@pytest.mark.parametrize("broken", ["no_such_program", "/bin/false"])
def test_what_other_processes_fail_at_is_compiled_here(monkeypatch, broken):
    expected = run(3)
    monkeypatch.setattr(machine_code, "TEXT_OF_A_PROCESS", 1)
    monkeypatch.setattr(machine_code, "count_cores", lambda: 3)
    monkeypatch.setattr(machine_code.sys, "executable", broken)
    # Another function, so that the kernel is not the one that XLA knows by now.
    function = onekernel.compile(lambda *x: [-result for result in program(*x)[::3]])
    results = jax.vmap(function)(*arguments(3))
    for one, other in zip(results, expected[::3], strict=True):
        np.testing.assert_array_equal(one, -other)


def test_a_full_disk_means_to_compile_here(monkeypatch):
    def full():
        raise OSError("no space left on device")

    monkeypatch.setattr(machine_code.tempfile, "TemporaryFile", full)
    assert machine_code.start_worker([""])() is None


def test_what_crosses_functions_is_in_memory():
    """Of a value of each type that a part computes, another part reads what was stored."""
    body = """br label %part1
part1:
%v1 = fadd <8 x float> %a, %b
%v2 = fcmp olt <8 x float> %v1, %a
%v3 = fptosi <8 x float> %v1 to <8 x i32>
%t4 = getelementptr i32, ptr %scratch, i64 8
br label %part2
part2:
%v5 = select <8 x i1> %v2, <8 x i32> %v3, <8 x i32> zeroinitializer
store <8 x i32> %v5, ptr %t4
br label %rest3
rest3:""".split("\n")
    labels = {"part1": "part2", "part2": "rest3"}
    memory, places, lines = slots.in_memory(body, "body", 8, labels)
    assert [line.split(" x ", 1)[1] for line in memory] == ["<8 x i1>]", "<8 x i32>]", "ptr]"]
    given = {"%scratch": "ptr noalias"} | {line.split()[0]: "ptr noalias" for line in memory}
    kernel, (first, second) = parts.divide(lines, labels, places, given, "")
    assert sum(" call " in line or line.startswith("call ") for line in kernel) == 2
    assert sum(line.startswith("store ") for line in first) == 3
    loads = [line for line in second if " = load " in line]
    assert [line.split(" = load ")[1].rpartition(",")[0] for line in loads] == [
        "<8 x i1>",
        "<8 x i32>",
        "ptr",
    ]


def test_small_kernels_stay_in_one_piece(monkeypatch, texts):
    monkeypatch.setattr(codegen, "SMALL", 10_000)
    run(3)
    assert len(texts[0]) == 1
    assert cpu.compile_ir("\n".join(texts[0]))


# Processors without AVX-512 --------------------------------------------------------------------


@pytest.mark.parametrize("width", [4, 8])
def test_other_vectors_give_the_same_bits(monkeypatch, width):
    """Kernels for AVX2 and for vectors of four lanes, on a machine that can run them."""
    name, features = machine_code.host()
    if "+avx2" not in features.split(","):
        pytest.skip("needs AVX2")
    monkeypatch.setenv("ONEKERNEL_CACHE", "0")
    expected = run(21)
    kept = [feature for feature in features.split(",") if not feature.startswith("+avx512")]
    host = ("haswell", ",".join([*kept, "-avx512f"]))
    monkeypatch.setattr(machine_code, "host", lambda: host)
    monkeypatch.setattr(cpu, "host", lambda: host)
    monkeypatch.setattr(cpu, "vector_width", lambda: width)
    for one, other in zip(run(21), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_cores_are_at_most_those_that_the_environment_allows(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    for told, count in (("2", 2), ("9", 6), ("0", 6), ("many", 6)):
        monkeypatch.setenv("NPROC", told)
        assert machine_code.count_cores() == count
    monkeypatch.delenv("NPROC")
    assert machine_code.count_cores() == 6
