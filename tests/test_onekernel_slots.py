"""Values kept in memory between the blocks of a kernel (onekernel/slots.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llvmlite")

import onekernel
from onekernel import slots


def program(x):
    """Branches in a loop in a loop, chains of results that replace each other, and old values that
    are needed again: after the branch, in the next turn, and by the other side."""

    def turn(carry):
        total, count = carry
        kept = jnp.sin(x) * total
        for i in range(4):
            old = total
            total = jax.lax.cond(
                x[i] + total[0] > count,
                lambda t, i=i: t * 0.5 + jnp.roll(t, i + 1) * x[i],
                lambda t: t,
                total,
            )
            total = jnp.where(i % 2 == 0, total, total + 0.25 * old)
        first, second = jax.lax.cond(
            total[1] > x[2],
            lambda: (
                total + kept,
                jax.lax.while_loop(lambda s: s < 9.0, lambda s: s * 2 + 1, abs(x[0])),
            ),
            lambda: (kept * total, total[3] * x[1]),
        )
        return jnp.tanh(first + 0.1 * second), count + 1

    total, count = jax.lax.while_loop(
        lambda c: (c[1] < 12) & (c[0].sum() < 2.5), turn, (x * 0.7, jnp.float32(0))
    )
    return total, count, x - total


@pytest.fixture
def no_cache(monkeypatch):
    monkeypatch.setenv("ONEKERNEL_CACHE", "0")


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("worlds", [1, 45])
def test_memory_changes_no_bit(monkeypatch, worlds):
    x = jnp.array(np.random.default_rng(0).uniform(-2, 2, (worlds, 6)), jnp.float32)
    staged = []

    def in_memory(lines, *others):
        memory, places, changed = real(lines, *others)
        staged.append(sum(line.startswith("%loaded") for line in changed))
        return memory, places, changed

    real = slots.in_memory
    monkeypatch.setattr(slots, "in_memory", in_memory)
    with_memory = jax.vmap(onekernel.compile(lambda x: program(x)))(x)
    assert staged[0] > 20
    monkeypatch.setattr(slots, "in_memory", lambda lines, *_: ([], {}, lines))
    without = jax.vmap(onekernel.compile(lambda x: program(x)))(x)
    for one, other in zip(with_memory, without, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(with_memory, jax.vmap(program)(x), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


BODY = """%v1 = fadd <8 x float> %a, %b
br label %loop5
loop5:
%v6 = phi <8 x float> [%v1, %body], [%v9, %latch5]
br i1 %c, label %side7, label %joined7
side7:
%v8 = fadd <8 x float> %v6, %v1
br label %joined7
joined7:
%v9 = phi <8 x float> [%v8, %side7], [%v6, %loop5]
br label %latch5
latch5:
br i1 %d, label %loop5, label %after5
after5:
store <8 x float> %v9, ptr %p, align 32""".split("\n")


def test_a_result_takes_over_the_memory_of_what_it_replaces():
    _, _, lines = slots.in_memory(BODY, "body", 8, {})
    text = "\n".join(lines)
    assert "%v9 = phi" not in text
    (slot,) = {line.split("ptr ")[1] for line in lines if line.startswith("store <8 x float> %v8")}
    (own,) = {line.split("ptr ")[1] for line in lines if line.startswith("store <8 x float> %v6")}
    assert slot == own


def test_what_the_next_turn_needs_is_not_replaced():
    body = [line.replace("[%v6, %loop5]", "[%v1, %loop5]") for line in BODY]
    _, _, lines = slots.in_memory(body, "body", 8, {})
    assert any(line.startswith("%v9 = phi") for line in lines)
