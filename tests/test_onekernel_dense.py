"""onekernel.dot_general against float64 and against XLA: values, gradients, vmap, shard_map."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P

pytest.importorskip("llvmlite")

import onekernel
from onekernel import cpu, dense

# Rows, terms of a sum, columns: one of each; tiles and vectors that are full, and that are not.
SIZES = [
    (1, 1, 2),
    (3, 5, 7),
    (8, 16, 16),
    (9, 17, 33),
    (5, 130, 70),
    (100, 1, 100),
    (7, 300, 2),
    (64, 17, 64),
    (61, 64, 129),
]


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def matmul(x, w):
    return onekernel.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


@pytest.mark.parametrize("layout", dense.LAYOUTS)
def test_products_are_right(layout):
    pairs = []
    for rows, terms, columns in SIZES:
        left, right = draw(0, rows, terms), draw(1, terms, columns)
        left = left.T if layout == "left transposed" else left
        right = right.T if layout == "right transposed" else right
        pairs.append((left, right))
    run = jax.jit(lambda pairs: [dense.product_p.bind(*pair, layout=layout) for pair in pairs])
    for size, (left, right), result in zip(SIZES, pairs, run(pairs), strict=True):
        left, right = np.array(left, np.float64), np.array(right, np.float64)
        truth = np.tensordot(left, right, dense.LAYOUTS[layout])
        tolerance = 2e-6 * size[1]
        np.testing.assert_allclose(result, truth, rtol=1e-5, atol=tolerance, err_msg=str(size))


def test_gradients_are_xlas():
    x, w = draw(0, 3, 9, 17), draw(1, 17, 33)

    def loss(product):
        return lambda x, w: jnp.sum(jnp.sin(product(x, w)))

    ours = jax.jit(jax.grad(loss(matmul), argnums=(0, 1)))(x, w)
    xlas = jax.grad(loss(jnp.matmul), argnums=(0, 1))(x, w)
    for our, xla in zip(ours, xlas, strict=True):
        np.testing.assert_allclose(our, xla, rtol=1e-4, atol=1e-4)
    # The gradient of a gradient, and forwards.
    slope = lambda product: jax.grad(lambda w: jnp.sum(jax.grad(loss(product))(x, w) ** 2))(w)  # noqa: E731
    np.testing.assert_allclose(slope(matmul), slope(jnp.matmul), rtol=1e-3, atol=1e-2)
    _, tangent = jax.jvp(matmul, (x, w), (x, 2 * w))
    np.testing.assert_allclose(tangent, 3 * matmul(x, w), rtol=1e-4, atol=1e-4)


def test_a_layer_and_its_gradient_are_this_files_products():
    layer = nn.Dense(5, dot_general=onekernel.dot_general)
    x = draw(0, 4, 3)
    params = layer.init(jax.random.key(1), x)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda params: layer.apply(params, x).sum()))(params))
    assert "layout=left transposed" in jaxpr
    assert "dot_general" not in jaxpr


@pytest.mark.parametrize(
    "x, w, options",
    [
        (draw(0, 4, 3), draw(1, 3, 1), {}),  # a matrix by a vector
        (draw(0, 4, 3).astype(jnp.bfloat16), draw(1, 3, 5).astype(jnp.bfloat16), {}),
        (draw(0, 4, 3), draw(1, 3, 5), {"precision": "highest"}),
        (draw(0, 4, 0), draw(1, 0, 5), {}),
        (draw(0, 3), draw(1, 3, 5), {}),
    ],
)
def test_the_rest_is_xlas(monkeypatch, x, w, options):
    monkeypatch.setattr(dense.product_p, "bind", None)
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    result = onekernel.dot_general(x, w, numbers, **options)
    expected = jax.lax.dot_general(x, w, numbers, **options)
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(result, expected)


def test_vmap_of_rows_and_of_weights():
    x, w = draw(0, 4, 9, 17), draw(1, 4, 17, 33)
    many_rows = jax.vmap(matmul, in_axes=(0, None))(x, w[0])
    np.testing.assert_allclose(many_rows, x @ w[0], rtol=1e-4, atol=1e-4)
    ensemble = jax.vmap(matmul)(x, w)
    np.testing.assert_allclose(ensemble, x @ w, rtol=1e-4, atol=1e-4)


def test_settings_for_debugging():
    x, w = draw(0, 4, 3), draw(1, 3, 5)
    with jax.disable_jit():
        np.testing.assert_allclose(matmul(x, w), x @ w, rtol=1e-5, atol=1e-5)
    with jax.debug_nans(True):
        np.testing.assert_allclose(matmul(x, w), x @ w, rtol=1e-5, atol=1e-5)
        with pytest.raises(FloatingPointError, match=r"\(nan\) encountered in dot_general"):
            matmul(np.full((4, 3), np.nan, np.float32), w)


@pytest.mark.parametrize("check", [True, False])
def test_shard_map(check):
    mesh = Mesh(np.array(jax.devices()[:1]), ("devices",))
    x, w = draw(0, 8, 17), draw(1, 17, 33)
    run = jax.shard_map(
        matmul, mesh=mesh, in_specs=(P("devices"), P()), out_specs=P("devices"), check_vma=check
    )
    np.testing.assert_array_equal(jax.jit(run)(x, w), matmul(x, w))


def test_a_rows_result_depends_on_that_row_alone():
    x, w = draw(0, 61, 130), draw(1, 130, 70)
    whole = np.array(matmul(x, w))
    for first, count in ((0, 1), (3, 8), (50, 11)):
        part = np.array(matmul(x[first : first + count], w))
        np.testing.assert_array_equal(part, whole[first : first + count])


def test_nan_stays_in_its_row():
    x, w = draw(0, 20, 30).at[7, 3].set(jnp.nan), draw(1, 30, 40)
    bad = np.isnan(matmul(x, w)).all(axis=1)
    assert bad[7] and bad.sum() == 1


def test_a_part_of_a_compiled_function():
    x, w = draw(0, 6, 2, 5), draw(1, 5, 7)
    policy = onekernel.compile(lambda x, w: jnp.tanh(matmul(x, w)))
    result = jax.vmap(policy, in_axes=(0, None))(x, w)
    np.testing.assert_allclose(result, jnp.tanh(x @ w), rtol=1e-5, atol=1e-5)


def test_other_platforms_get_xlas_product():
    exported = jax.export.export(jax.jit(matmul), platforms=["cuda"])
    text = exported(draw(0, 4, 3), draw(1, 3, 5)).mlir_module()
    assert "stablehlo.dot_general" in text and "custom_call" not in text


@pytest.mark.parametrize("layout", dense.LAYOUTS)
@pytest.mark.parametrize("lanes", [4, 8])
def test_code_for_narrower_vectors(monkeypatch, layout, lanes):
    """The same numbers to the bit; the sums' order does not depend on the vectors."""
    if cpu.vector_width() < lanes:
        pytest.skip("the processor's vectors are narrower")
    left, right = draw(0, 9, 21), draw(1, 21, 37)
    if layout == "left transposed":
        left = left.T
    if layout == "right transposed":
        right = right.T
    expected = np.array(dense.product_p.bind(left, right, layout=layout))
    text = dense.module_ir(layout, lanes)
    name = f"product_of_{lanes}_lanes_{layout.replace(' ', '_')}"
    cpu.loader.register(name, cpu.compile_ir(text))
    types = [
        jax.ShapeDtypeStruct(expected.shape, jnp.float32),
        jax.ShapeDtypeStruct((right.size,), jnp.float32),
    ]
    result = jax.ffi.ffi_call(name, types)(left, right)[0]
    np.testing.assert_array_equal(result, expected)
