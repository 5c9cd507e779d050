"""Write a trained policy as an ONNX graph, for a computer that has neither JAX nor NumPy.

    python tools/export_policy.py runs/NAME
    python tools/export_policy.py runs/NAME --script my_robot.py

It writes runs/NAME/policy.onnx: obs [N, O] -> action [N, A], both float32, with the normaliser
inside, if the script has one. The graph is what the script's own function `act` computes, so that
a copy of a script with another network needs no other tool. run.json names the script, which is
looked for above this folder; --script names another one. Needs the package onnx.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np
from tools.replay_nan import load_script


class Graph:
    """An ONNX graph that grows. It takes NumPy's place in `act`, as the argument xp."""

    def __init__(self):
        self.nodes = []
        self.constants = []

    def constant(self, value) -> str:
        """The name of a new float32 constant."""
        from onnx import numpy_helper

        name = f"constant_{len(self.constants)}"
        array = np.asarray(value, np.float32)
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, operator: str, *inputs) -> "Symbol":
        """The result of an operator of ONNX on symbols and numbers."""
        from onnx import helper

        names = [x.name if isinstance(x, Symbol) else self.constant(x) for x in inputs]
        result = Symbol(self, f"{operator.lower()}_{len(self.nodes)}")
        self.nodes.append(helper.make_node(operator, names, [result.name]))
        return result

    def __getattr__(self, function: str):
        """NumPy's function of that name, for symbols as well as for arrays."""
        if function not in FUNCTIONS:
            raise AttributeError(f"export_policy.py does not know NumPy's {function}")

        def call(*inputs):
            if any(isinstance(x, Symbol) for x in inputs):
                return FUNCTIONS[function](self, *inputs)
            return getattr(np, function)(*inputs)

        return call


FUNCTIONS = {
    "clip": lambda graph, x, low, high: graph.node("Min", graph.node("Max", x, low), high),
    "exp": lambda graph, x: graph.node("Exp", x),
    "expm1": lambda graph, x: graph.node("Sub", graph.node("Exp", x), 1.0),
    "maximum": lambda graph, x, y: graph.node("Max", x, y),
    "minimum": lambda graph, x, y: graph.node("Min", x, y),
    "sqrt": lambda graph, x: graph.node("Sqrt", x),
    "tanh": lambda graph, x: graph.node("Tanh", x),
    "where": lambda graph, condition, x, y: graph.node("Where", condition, x, y),
}


class Symbol:
    """An array in the graph."""

    __array_ufunc__ = None  # NumPy's arrays leave operators to this class

    def __init__(self, graph: Graph, name: str):
        self.graph = graph
        self.name = name

    def __add__(self, other):
        return self.graph.node("Add", self, other)

    def __radd__(self, other):
        return self.graph.node("Add", other, self)

    def __sub__(self, other):
        return self.graph.node("Sub", self, other)

    def __rsub__(self, other):
        return self.graph.node("Sub", other, self)

    def __mul__(self, other):
        return self.graph.node("Mul", self, other)

    def __rmul__(self, other):
        return self.graph.node("Mul", other, self)

    def __truediv__(self, other):
        return self.graph.node("Div", self, other)

    def __matmul__(self, other):
        return self.graph.node("MatMul", self, other)

    def __gt__(self, other):
        return self.graph.node("Greater", self, other)


def export(script: ModuleType, policy: dict[str, np.ndarray], file: Path) -> None:
    """Write what script.act makes of an observation.

    What a policy with memory remembers becomes further inputs, memory_0 ..., and further outputs,
    next_memory_0 ...
    """
    import onnx
    from onnx import helper

    def describe(name: str, size: int):
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", size])

    def result(name: str, symbol: Symbol):
        graph.nodes.append(helper.make_node("Identity", [symbol.name], [name]))

    graph = Graph()
    obs_size = len(policy.get("obs_mean", policy["w0"]))
    leaves, tree = jax.tree.flatten(script.initial_memory((1,)))
    names = [f"memory_{i}" for i in range(len(leaves))]
    memory = jax.tree.unflatten(tree, [Symbol(graph, name) for name in names])

    _, example = script.act(policy, script.initial_memory((1,)), np.zeros((1, obs_size)))
    memory, action = script.act(policy, memory, Symbol(graph, "obs"), graph)
    result("action", action)
    inputs = [describe("obs", obs_size)]
    outputs = [describe("action", example.shape[-1])]
    for name, leaf, symbol in zip(names, leaves, jax.tree.leaves(memory), strict=True):
        result("next_" + name, symbol)
        inputs.append(describe(name, leaf.shape[-1]))
        outputs.append(describe("next_" + name, leaf.shape[-1]))

    content = helper.make_graph(graph.nodes, "policy", inputs, outputs, graph.constants)
    version = [helper.make_opsetid("", 17)]
    model = helper.make_model(content, opset_imports=version, ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="run folder")
    parser.add_argument("--script", type=Path, help="the script that made the run")
    flags = parser.parse_args(argv)

    if not importlib.util.find_spec("onnx"):
        parser.error("onnx is missing; pip install onnx")
    try:
        with np.load(flags.run_dir / "policy.npz", allow_pickle=False) as arrays:
            policy = dict(arrays)
        run = json.loads((flags.run_dir / "run.json").read_text())
        script = load_script(flags.script or ROOT / run["script"])
    except Exception as error:
        problem = f"{type(error).__name__}: {error!s:.200}"
        parser.error(f"{flags.run_dir}: no policy, or no script that made it ({problem})")

    file = flags.run_dir / "policy.onnx"
    export(script, policy, file)
    print(f"ONNX: {file}")


if __name__ == "__main__":
    main(sys.argv[1:])
