"""What a graph of `onekernel` means, in NumPy: every node one operation on an array of all worlds.

It is slow and plain and shares no code with the kernels, whose tests compare their numbers with it.
Memory starts as garbage, and an index must be inside of its buffer wherever a world really uses it.
Floats are float32 and no product is fused with a sum, so a kernel may differ in the last bits;
functions such as `sin` are computed in float64 and rounded.
"""

import numpy as np
import scipy.special

DTYPES = {"f": np.float32, "i": np.int32, "u": np.uint32, "b": np.bool_}
GARBAGE = {"f": np.float32(np.nan), "i": -(2**31), "u": 2**32 - 1, "b": True}

COMPARISONS = {"lt": np.less, "le": np.less_equal, "eq": np.equal, "ne": np.not_equal}
OPERATIONS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "max": np.maximum,
    "min": np.minimum,
    "select": np.where,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "floor": np.floor,
    "ceil": np.ceil,
    "rint": np.rint,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}
FUNCTIONS = {
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "logistic": scipy.special.expit,
    "pow": np.power,
    "cbrt": np.cbrt,
    "erf": scipy.special.erf,
    "erf_inv": scipy.special.erfinv,
}


def evaluate(graph, operands, mapped, worlds: int) -> list[np.ndarray]:
    """The results of a graph: of each a [worlds, size] array, in the order of their numbers.

    graph: an onekernel.graph.Graph. operands: of each an array, [worlds, ...] where mapped is true
    and without the first axis elsewhere.
    """
    oracle = _Oracle(graph, operands, mapped, worlds)
    with np.errstate(all="ignore"):
        oracle.run(0)
    results = {
        buffer.operand: memory
        for buffer, memory in zip(graph.buffers, oracle.memory, strict=True)
        if buffer.source == "output"
    }
    return [results[number] for number in sorted(results)]


class _Oracle:
    def __init__(self, graph, operands, mapped, worlds):
        self.graph = graph
        self.worlds = np.arange(worlds)
        self.mask = np.ones(worlds, bool)  # the worlds that are really in the current block
        self.operands = []
        for operand, own in zip(operands, mapped, strict=True):
            flat = np.asarray(operand).reshape(worlds if own else 1, -1)
            self.operands.append(np.broadcast_to(flat, (worlds, flat.shape[1])))
        self.memory = [self.new_memory(buffer) for buffer in graph.buffers]
        self.values: dict[int, np.ndarray] = {}
        self.outs = {  # of a loop or a branch: the nodes of its results, by their places
            (graph.args[node][0], graph.extra[node]): node
            for node, op in enumerate(graph.op)
            if op in ("loop_out", "branch_out")
        }

    def new_memory(self, buffer) -> np.ndarray:
        shape = (len(self.worlds), buffer.size)
        if buffer.source == "input":
            return self.operands[buffer.operand]
        if buffer.source == "const":
            return np.broadcast_to(buffer.data.reshape(-1), shape)
        return np.full(shape, GARBAGE[buffer.kind], DTYPES[buffer.kind])

    def value(self, node: int) -> np.ndarray:
        if self.graph.op[node] == "const":
            kind = self.graph.kind[node]
            return np.full(len(self.worlds), self.graph.value[node], DTYPES[kind])
        return self.values[node]

    def run(self, block: int) -> None:
        for node in self.graph.blocks[block]:
            op = self.graph.op[node]
            if op == "loop":
                self.loop(node)
            elif op == "branch":
                self.branch(node)
            elif op == "store":
                self.store(node)
            elif op.split()[0] == "load":
                memory, index = self.place(node)
                self.values[node] = memory[self.worlds, index]
            elif op == "input":
                operand, element = self.graph.extra[node]
                self.values[node] = self.operands[operand][:, element]
            else:
                self.values[node] = self.operation(node, op)

    # Control

    def loop(self, node: int) -> None:
        loop = self.graph.extra[node]
        outer = self.mask
        state = [self.value(init) for init in loop.inits]
        turn = 0
        active = outer
        if loop.length is None:
            active = outer & self.value(loop.first_active)
        while active.any() and (loop.length is None or turn < loop.length):
            self.mask = active
            for phi, value in zip(loop.phis, state, strict=True):
                self.values[phi] = value
            if loop.length is None:
                self.values[loop.active] = active
            else:
                self.values[loop.counter] = np.full(len(self.worlds), turn, np.int32)
            self.run(loop.block)
            state = [
                np.where(active, self.value(following), value)
                for following, value in zip(loop.nexts, state, strict=True)
            ]
            if loop.length is None:
                active = active & self.value(loop.next_active)
            turn += 1
        self.mask = outer
        for index, value in enumerate(state):
            self.values[self.outs[node, index]] = value

    def branch(self, node: int) -> None:
        branch = self.graph.extra[node]
        outer = self.mask
        condition = self.value(branch.condition)
        sides = []
        for block, results, wanted in zip(
            branch.blocks, branch.results, (condition, ~condition), strict=True
        ):
            self.mask = outer & wanted
            if self.mask.any():
                self.run(block)
                sides.append([self.value(result) for result in results])
            else:
                kinds = [self.graph.kind[out] for out in branch.outs]
                sides.append([np.zeros(len(self.worlds), DTYPES[kind]) for kind in kinds])
        self.mask = outer
        for out, yes, no in zip(branch.outs, *sides, strict=True):
            self.values[out] = np.where(condition, yes, no)

    # Memory

    def place(self, node: int) -> tuple[np.ndarray, np.ndarray]:
        """A load's or store's memory, and the index of each world, some valid one where unused."""
        memory = self.memory[self.graph.extra[node]]
        index = self.value(self.graph.args[node][0])
        used = index[self.mask]
        assert ((used >= 0) & (used < memory.shape[1])).all(), f"node {node}: an index is outside"
        return memory, np.clip(index, 0, memory.shape[1] - 1)

    def store(self, node: int) -> None:
        outer = self.mask
        if len(self.graph.args[node]) == 3:
            self.mask = outer & self.value(self.graph.args[node][2])
        memory, index = self.place(node)
        value = self.value(self.graph.args[node][1])
        memory[self.worlds[self.mask], index[self.mask]] = value[self.mask]
        self.mask = outer

    # Arithmetic

    def operation(self, node: int, op: str) -> np.ndarray:
        kind = self.graph.kind[node]
        args = [self.value(arg) for arg in self.graph.args[node]]
        x, y = args[0], args[-1]
        name = op.split()[0]
        if name in COMPARISONS:
            result = COMPARISONS[name](x, y)
        elif op in OPERATIONS:
            result = OPERATIONS[op](*args)
        elif op in FUNCTIONS:
            result = FUNCTIONS[op](*(arg.astype(np.float64) for arg in args)).astype(np.float32)
        elif op == "rsqrt":
            result = np.float32(1) / np.sqrt(x)
        elif op == "div":
            result = x / y if kind == "f" else quotient(x, y)
        elif op == "rem":
            result = np.fmod(x, y) if kind == "f" else remainder(x, y)
        elif op in ("shl", "lshr", "ashr"):
            result = shifted(op, x, y).astype(DTYPES[kind])
        elif op == "from_bool":
            result = x.astype(DTYPES[kind])
        elif op == "bitcast":
            result = x.view(DTYPES[kind])
        elif name == "convert":
            result = converted(x, kind)
        elif op == "population_count":
            result = np.bitwise_count(x.view(np.uint32)).astype(DTYPES[kind])
        elif op == "clz":  # frexp's exponent is the number of bits
            bits = np.frexp(x.view(np.uint32).astype(np.float64))[1]
            result = (32 - bits).astype(DTYPES[kind])
        else:
            raise NotImplementedError(op)
        assert result.dtype == DTYPES[kind], f"node {node}, {op}: {result.dtype} for {kind}"
        return result


def quotient(x, y):
    """Towards zero; -1 (all bits) by zero; -2^31 / -1 wraps around."""
    wide = np.abs(x.astype(np.int64)) // np.maximum(np.abs(y.astype(np.int64)), 1)
    wide = np.where((x < 0) == (y < 0), wide, -wide)
    return np.where(y == 0, -1, wide).astype(x.dtype)


def remainder(x, y):
    """With the sign of x; x by zero."""
    divisor = np.where(y == 0, 1, y).astype(np.int64)
    return np.where(y == 0, x, np.fmod(x.astype(np.int64), divisor)).astype(x.dtype)


def shifted(op, x, y):
    """By 32 bits and more: 0, or, for ashr, all bits the sign."""
    count = y.view(np.uint32).astype(np.int64)
    if op == "ashr":
        return x.view(np.int32).astype(np.int64) >> np.minimum(count, 31)
    bits = x.view(np.uint32).astype(np.int64)
    few = np.minimum(count, 31)
    moved = bits << few if op == "shl" else bits >> few
    return np.where(count < 32, moved, 0)


def converted(x, kind):
    """To float: the nearest. To an integer: towards zero, clamped, 0 for NaN."""
    if kind == "f":
        return x.astype(np.float32)
    limits = np.iinfo(DTYPES[kind])
    whole = np.trunc(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=1e300, neginf=-1e300))
    return np.clip(whole, limits.min, limits.max).astype(DTYPES[kind])
