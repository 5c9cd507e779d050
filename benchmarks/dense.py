"""onekernel.dot_general beside XLA's: the products of a network's layers and their gradients, on one CPU device.

    python benchmarks/dense.py

For each layer (rows of a minibatch on one device, inputs, outputs): the layer itself, the gradient of its weights and
that of its inputs. Each product is repeated in a loop within one program; both arms take turns, medians.
Writes benchmarks/results/NAME.json.
"""

import dataclasses
import statistics

import common
import jax
import jax.numpy as jnp
import tyro

from onekernel import dense

LAYERS = {  # rows, inputs, outputs: the actors of the scripts' default minibatches, a device's share
    "HalfCheetah": [(64, 17, 64), (64, 64, 64), (64, 64, 6)],
    "G1": [(256, 47, 256), (256, 256, 128), (256, 128, 12)],
}
PRODUCTS = {
    "layer": "plain",
    "gradient of weights": "left transposed",
    "gradient of inputs": "right transposed",
}


@dataclasses.dataclass
class Args:
    calls: int = 400  # of a product in one program
    repeats: int = 15
    name: str = "dense"  # of the JSON file
    smoke: bool = False


def make_loop(product, calls: int):
    """A program that computes a product again and again, each from what the one before gave."""

    def turn(left, right):
        return left + 1e-9 * product(left, right)[:1, :1]

    return jax.jit(
        lambda left, right: jax.lax.fori_loop(0, calls, lambda _, left: turn(left, right), left)
    )


def operands(rows: int, inputs: int, outputs: int, layout: str):
    x = jax.random.normal(jax.random.key(0), (rows, inputs))
    weights = jax.random.normal(jax.random.key(1), (inputs, outputs))
    error = jax.random.normal(jax.random.key(2), (rows, outputs))
    return {
        "plain": (x, weights),
        "left transposed": (x, error),
        "right transposed": (error, weights),
    }[layout]


def measure(args: Args, size: tuple[int, int, int], layout: str) -> dict:
    """Microseconds of one product by both, and how often XLA's takes as long."""
    arms = {
        "onekernel": lambda left, right: dense.product_p.bind(left, right, layout=layout),
        "XLA": lambda left, right: dense.by_xla(left, right, layout=layout),
    }
    left, right = operands(*size, layout)
    programs = {}
    for name, product in arms.items():
        loop = make_loop(product, args.calls)
        programs[name] = lambda loop=loop: jax.block_until_ready(loop(left, right))
    seconds = common.take_turns(programs, args.repeats)
    row = {
        f"{name} us": 1e6 * statistics.median(times) / args.calls for name, times in seconds.items()
    }
    return row | {
        "XLA / onekernel": common.ratio(seconds["XLA"], seconds["onekernel"]),
        "seconds": seconds,
    }


def main(args: Args) -> None:
    if args.smoke:
        args = dataclasses.replace(args, calls=2, repeats=1)
    jnp.zeros(()).block_until_ready()
    rows = []
    for network, layers in LAYERS.items():
        for size in layers:
            for product, layout in PRODUCTS.items():
                row = {"network": network, "size": size, "product": product} | measure(
                    args, size, layout
                )
                rows.append(row)
                print(
                    f"{network:12} {size!s:16} {product:20} {row['onekernel us']:8.2f} us, XLA {row['XLA us']:8.2f}"
                )
    common.write(args.name, args, {"rows": rows}, args.smoke)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
