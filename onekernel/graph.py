"""The program of one world as a graph of scalars.

A node is one scalar operation, known by its number: `graph.op[n]`, `graph.args[n]` (numbers of
other nodes) and `graph.kind[n]`, the type of its result: "f" float32, "i" int32, "u" uint32, "b"
bool. Every value has one definition (compilers call this form SSA), and `Graph.emit` sees to three
things while the graph grows:

- what is constant is computed at once, in float32, and `x + 0`, `x * 1`, `x * 0` and the like vanish;
- what was computed before is not computed again (each node is found by its operation and operands);
- what a loop would compute anew in each turn moves in front of it.

Nodes live in blocks. Block 0 is the body of the program; a loop or a branch has blocks of its own
and is one node (`Loop`, `Branch`) in the block around it. Nothing is taken out of a branch: it may
be that no world needs it.

Arrays too large to be taken apart live in buffers, with one slot of memory for each element and
world; `load` and `store` keep the order in which they were made.

A constant zero times anything is zero here, also if the other factor is infinite or NaN; so is
`x - x`, also if x is infinite or NaN; and `x + 0` is x, also if x is -0. It is what makes a
robot's zeros vanish: what moves both of two parts alike cancels in their contact. See
docs/onekernel.md."""

import dataclasses
import math
import struct

import numpy as np

KINDS = {
    np.dtype(np.float32): "f",
    np.dtype(np.int32): "i",
    np.dtype(np.uint32): "u",
    np.dtype(bool): "b",
}
DTYPES = {kind: dtype for dtype, kind in KINDS.items()}


def rounded(x: float) -> float:
    """The nearest float32; a result in double precision that is rounded to float32 once is the
    correctly rounded one for + - * / and sqrt."""
    try:
        return struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def wrapped(kind: str, x: int) -> int:
    """x modulo 2^32, in the range of int32 ("i") or uint32 ("u")."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if kind == "i" and x >= 1 << 31 else x


@dataclasses.dataclass
class Buffer:
    """Memory for an array. source: "scratch" (each world's own, written by the kernel), "const"
    (data, the same for all worlds), "input" or "output" (operand or result number `operand`)."""

    source: str
    kind: str
    size: int
    data: np.ndarray | None = None
    operand: int = -1


@dataclasses.dataclass
class Loop:
    """A loop: `length` turns, or, where length is None, as long as `active` holds for some world.

    phis: what its body starts from in each turn; inits: in the first one; nexts: in the next
    one. counter: the turn's number, from 0 (only with a length). first_active, active,
    next_active: the condition before the loop, in a turn (a phi) and after it."""

    block: int
    length: int | None
    phis: list[int]
    inits: list[int]
    nexts: list[int]
    counter: int = -1
    first_active: int = -1
    active: int = -1
    next_active: int = -1


@dataclasses.dataclass
class Branch:
    """Two blocks of which each runs only if some world wants it. outs: the branch's results;
    results: of each block, one for each of outs."""

    condition: int
    blocks: tuple[int, int]  # if true, if false
    wanted: tuple[int, int]  # conditions under which a world wants the block
    outs: list[int]
    results: tuple[list[int], list[int]]


class TooLarge(Exception):
    """The program has more scalars than `Graph.limit`."""


class Graph:
    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.op: list[str] = []
        self.args: list[tuple[int, ...]] = []
        self.kind: list[str] = []
        self.block: list[int] = []
        self.value: list = []  # of constants: a Python float, int or bool; else None
        self.uniform: list[bool] = []  # the same in all worlds; integers and truth values only
        self.extra: dict[int, object] = {}  # Loop, Branch, or what else belongs to a node
        self.buffers: list[Buffer] = []
        self.blocks: list[list[int]] = [[]]
        self.parent = [-1]
        self.is_loop = [False]
        self.depth = [0]
        self.owner = [-1]  # the Loop's or Branch's node that a block belongs to
        self.current = 0
        self.open = [True]  # whether a block encloses what is made now
        self.table: dict = {}
        self.constants: dict = {}

    # Making nodes ---------------------------------------------------------------------------------

    def new(self, op, args, kind, block, value=None, uniform=False) -> int:
        node = len(self.op)
        if self.limit is not None and node > self.limit:
            raise TooLarge
        self.op.append(op)
        self.args.append(args)
        self.kind.append(kind)
        self.block.append(block)
        self.value.append(value)
        self.uniform.append(uniform)
        return node

    def const(self, kind: str, value) -> int:
        key = (kind, struct.pack("f", value) if kind == "f" else value)
        node = self.constants.get(key)
        if node is None:
            node = self.new("const", (), kind, 0, value, uniform=True)
            self.constants[key] = node
        return node

    def const_array(self, array: np.ndarray) -> np.ndarray:
        """Numbers of constant nodes, in the shape of array."""
        kind = KINDS[array.dtype]
        bits = array if kind == "b" else array.view(np.uint32)
        _, first, inverse = np.unique(bits, return_index=True, return_inverse=True)
        values = array.reshape(-1)[first].tolist()
        nodes = np.array([self.const(kind, value) for value in values], np.int64)
        return nodes[inverse].reshape(array.shape)

    def emit(self, op: str, kind: str, *args: int) -> int:
        """A pure operation: the node that has computed it already, or a new one."""
        key = (op, kind, *args)
        node = self.table.get(key)
        if node is not None and self.open[self.block[node]]:
            return node
        home = self.current
        if home:
            depth = self.depth
            needed = max((depth[self.block[arg]] for arg in args), default=0)
            while self.is_loop[home] and depth[home] > needed:
                home = self.parent[home]
        uniform = kind != "f" and all(self.uniform[arg] for arg in args)
        node = self.new(op, args, kind, home, uniform=uniform)
        self.blocks[home].append(node)
        self.table[key] = node
        return node

    def pinned(self, op: str, kind: str, *args: int, extra=None) -> int:
        """An operation whose place matters: in the current block, after what is there."""
        node = self.new(op, args, kind, self.current)
        self.blocks[self.current].append(node)
        if extra is not None:
            self.extra[node] = extra
        return node

    # Blocks ---------------------------------------------------------------------------------------

    def open_block(self, loop: bool) -> int:
        block = len(self.blocks)
        self.blocks.append([])
        self.parent.append(self.current)
        self.is_loop.append(loop)
        self.depth.append(self.depth[self.current] + 1)
        self.owner.append(-1)
        self.open.append(True)
        self.current = block
        return block

    def close_block(self) -> None:
        self.open[self.current] = False
        self.current = self.parent[self.current]

    def phi(self, kind: str, block: int, uniform: bool = False) -> int:
        return self.new("phi", (), kind, block, uniform=uniform)

    def add_loop(self, loop: Loop) -> list[int]:
        """Places a loop whose block is closed; what its phis are after the last turn."""
        node = self.pinned("loop", "b", extra=loop)
        self.owner[loop.block] = node
        outs = []
        for index, phi in enumerate(loop.phis):
            out = self.new("loop_out", (node,), self.kind[phi], self.current)
            self.extra[out] = index
            outs.append(out)
        return outs

    def add_branch(self, condition, blocks, wanted, results, kinds) -> list[int]:
        branch = Branch(condition, blocks, wanted, [], results)
        node = self.pinned("branch", "b", extra=branch)
        for block in blocks:
            self.owner[block] = node
        for index, kind in enumerate(kinds):
            out = self.new("branch_out", (node,), kind, self.current)
            self.extra[out] = index
            branch.outs.append(out)
        return branch.outs

    # Buffers --------------------------------------------------------------------------------------

    def buffer(self, source: str, kind: str, size: int, data=None, operand: int = -1) -> int:
        # JAX has some sizes as NumPy's integers (jnp.split), which the cache cannot write down.
        self.buffers.append(Buffer(source, kind, int(size), data, operand))
        return len(self.buffers) - 1

    def load(self, buffer: int, index: int) -> int:
        """index: the node of an int32, inside of the buffer."""
        kind = self.buffers[buffer].kind
        if (
            self.buffers[buffer].source != "scratch"
        ):  # which never changes: as good as a pure operation
            node = self.emit(f"load {buffer}", kind, index)
            self.extra[node] = buffer
            if self.buffers[buffer].source == "input":
                self.uniform[node] = False
            return node
        return self.pinned("load", kind, index, extra=buffer)

    def store(self, buffer: int, index: int, value: int, mask: int = -1) -> None:
        """mask: the worlds for which to store; -1 for all."""
        args = (index, value) if mask < 0 or self.value[mask] is True else (index, value, mask)
        self.pinned("store", "b", *args, extra=buffer)

    # Arithmetic -----------------------------------------------------------------------------------

    def is_const(self, node: int, value) -> bool:
        return self.op[node] == "const" and self.value[node] == value

    def add(self, kind: str, a: int, b: int) -> int:
        x = self.value[a]
        y = self.value[b]
        if x is not None and y is not None:
            return self.const(kind, rounded(x + y) if kind == "f" else wrapped(kind, x + y))
        if x == 0 and x is not None:
            return b
        if y == 0 and y is not None:
            return a
        if self.op[b] == "neg":
            return self.sub(kind, a, self.args[b][0])
        if self.op[a] == "neg":
            return self.sub(kind, b, self.args[a][0])
        return self.emit("add", kind, a, b) if a <= b else self.emit("add", kind, b, a)

    def sub(self, kind: str, a: int, b: int) -> int:
        x = self.value[a]
        y = self.value[b]
        if x is not None and y is not None:
            return self.const(kind, rounded(x - y) if kind == "f" else wrapped(kind, x - y))
        if y == 0 and y is not None:
            return a
        if x == 0 and x is not None:
            return self.neg(kind, b)
        if self.op[b] == "neg":
            return self.add(kind, a, self.args[b][0])
        if a == b:
            return self.const(kind, 0.0 if kind == "f" else 0)
        return self.emit("sub", kind, a, b)

    def neg(self, kind: str, a: int) -> int:
        x = self.value[a]
        if x is not None:
            return self.const(kind, -x if kind == "f" else wrapped(kind, -x))
        if self.op[a] == "neg":
            return self.args[a][0]
        if self.op[a] == "sub":  # -(x - y) is y - x; only the sign of a zero may differ
            return self.sub(kind, self.args[a][1], self.args[a][0])
        return self.emit("neg", kind, a)

    def mul(self, kind: str, a: int, b: int) -> int:
        x = self.value[a]
        y = self.value[b]
        if x is not None:
            if y is not None:
                return self.const(kind, rounded(x * y) if kind == "f" else wrapped(kind, x * y))
            a, b, y = b, a, x
        if y is not None:
            if y == 0:
                return self.const(kind, 0.0 if kind == "f" else 0)
            if y == 1:
                return a
            if y == -1:
                return self.neg(kind, a)
            if self.op[a] == "neg":
                return self.mul(kind, self.args[a][0], self.neg(kind, b))
            return self.emit("mul", kind, a, b)
        if self.op[a] == "neg":
            return self.neg(kind, self.mul(kind, self.args[a][0], b))
        if self.op[b] == "neg":
            return self.neg(kind, self.mul(kind, a, self.args[b][0]))
        return self.emit("mul", kind, a, b) if a <= b else self.emit("mul", kind, b, a)

    def div(self, kind: str, a: int, b: int) -> int:
        x = self.value[a]
        y = self.value[b]
        if kind != "f":
            return self.int_div(kind, a, b)
        if x is not None and y is not None and y != 0:
            return self.const("f", rounded(x / y))
        if y is not None:
            if y == 1:
                return a
            # Kernels take a subnormal factor, the reciprocal of more than 2^126, for 0.
            if y != 0 and math.isfinite(y) and 2.0**-126 <= abs(1 / y) < 1e38:
                return self.mul("f", a, self.const("f", rounded(1 / y)))
        if x == 0 and x is not None and y is None:
            return a
        return self.emit("div", kind, a, b)

    def int_div(self, kind: str, a: int, b: int) -> int:
        """Towards zero; by zero it gives -1 (all bits set), and -2^31 over -1 is -2^31, as XLA has it."""
        x = self.value[a]
        y = self.value[b]
        if y == 1 and y is not None:
            return a
        if x is not None and y is not None:
            if y == 0:
                return self.const(kind, wrapped(kind, -1))
            quotient = abs(x) // abs(y)
            return self.const(kind, wrapped(kind, quotient if (x < 0) == (y < 0) else -quotient))
        return self.emit("div", kind, a, b)

    def rem(self, kind: str, a: int, b: int) -> int:
        """The sign is the dividend's; by zero it gives the dividend."""
        x = self.value[a]
        y = self.value[b]
        if kind != "f" and x is not None and y is not None:
            return a if y == 0 else self.const(kind, wrapped(kind, int(math.fmod(x, y))))
        return self.emit("rem", kind, a, b)

    def reciprocal(self, a: int) -> int:
        """1 / a; of a square root without another division."""
        if self.op[a] == "sqrt":
            return self.unary("rsqrt", self.args[a][0])
        return self.div("f", self.const("f", 1.0), a)

    def max(self, kind: str, a: int, b: int) -> int:
        return self.extreme("max", kind, a, b)

    def min(self, kind: str, a: int, b: int) -> int:
        return self.extreme("min", kind, a, b)

    def extreme(self, op: str, kind: str, a: int, b: int) -> int:
        if kind == "b":
            return self.logic_or(kind, a, b) if op == "max" else self.logic_and(kind, a, b)
        x = self.value[a]
        y = self.value[b]
        if a == b:
            return a
        if x is not None and y is not None:
            if x != x or y != y:
                return a if x != x else b
            return (a if x >= y else b) if op == "max" else (a if x <= y else b)
        if x is not None or (y is None and a > b):  # a constant goes to the right
            a, b = b, a
        return self.emit(op, kind, a, b)

    def select(self, kind: str, condition: int, yes: int, no: int) -> int:
        chosen = self.value[condition]
        if chosen is not None:
            return yes if chosen else no
        if yes == no:
            return yes
        if self.op[condition] == "not":
            return self.select(kind, self.args[condition][0], no, yes)
        if self.op[yes] == "select" and self.args[yes][0] == condition:
            yes = self.args[yes][1]
        if self.op[no] == "select" and self.args[no][0] == condition:
            no = self.args[no][2]
        if kind == "b":
            if self.value[yes] is not None:
                return (
                    self.logic_or("b", condition, no)
                    if self.value[yes]
                    else self.logic_and("b", self.logic_not("b", condition), no)
                )
            if self.value[no] is not None:
                return (
                    self.logic_or("b", self.logic_not("b", condition), yes)
                    if self.value[no]
                    else self.logic_and("b", condition, yes)
                )
        return self.emit("select", kind, condition, yes, no)

    # Comparisons ----------------------------------------------------------------------------------

    def compare(self, op: str, kind: str, a: int, b: int) -> int:
        """op: lt, le, eq or ne; kind: that of a and b. With NaN all but ne are false."""
        x = self.value[a]
        y = self.value[b]
        if x is not None and y is not None:
            result = (
                x < y if op == "lt" else x <= y if op == "le" else x == y if op == "eq" else x != y
            )
            return self.const("b", result)
        if kind == "b":
            different = self.logic_xor("b", a, b)
            if op == "ne":
                return different
            if op == "eq":
                return self.logic_not("b", different)
            below = self.logic_not("b", a)
            return self.logic_and("b", below, b) if op == "lt" else self.logic_or("b", below, b)
        if y is not None and self.op[a] == "from_bool":  # which is 0 or 1
            if_false = self.compare(op, kind, self.const(kind, type(y)(0)), b)
            if_true = self.compare(op, kind, self.const(kind, type(y)(1)), b)
            return self.select("b", self.args[a][0], if_true, if_false)
        if op in ("eq", "ne") and a > b:
            a, b = b, a
        return self.emit(f"{op} {kind}", "b", a, b)

    # Bits and truth values ------------------------------------------------------------------------

    def logic_and(self, kind: str, a: int, b: int) -> int:
        x = self.value[a]
        y = self.value[b]
        if x is not None and y is not None:
            return self.const(kind, (x and y) if kind == "b" else wrapped(kind, x & y))
        if x is not None:
            a, b, y = b, a, x
        if y is not None:
            if y == 0:
                return self.const(kind, False if kind == "b" else 0)
            if y is True or y in (-1, 0xFFFFFFFF):
                return a
        if a == b:
            return a
        return self.emit("and", kind, a, b) if a <= b else self.emit("and", kind, b, a)

    def logic_or(self, kind: str, a: int, b: int) -> int:
        x = self.value[a]
        y = self.value[b]
        if x is not None and y is not None:
            return self.const(kind, (x or y) if kind == "b" else wrapped(kind, x | y))
        if x is not None:
            a, b, y = b, a, x
        if y is not None:
            if y == 0:
                return a
            if y is True or y in (-1, 0xFFFFFFFF):
                return b
        if a == b:
            return a
        return self.emit("or", kind, a, b) if a <= b else self.emit("or", kind, b, a)

    def logic_xor(self, kind: str, a: int, b: int) -> int:
        x = self.value[a]
        y = self.value[b]
        if x is not None and y is not None:
            return self.const(kind, x != y if kind == "b" else wrapped(kind, x ^ y))
        if x is not None:
            a, b, y = b, a, x
        if y is not None:
            if y == 0:
                return a
            if y is True or y in (-1, 0xFFFFFFFF):
                return self.logic_not(kind, a)
        if a == b:
            return self.const(kind, False if kind == "b" else 0)
        return self.emit("xor", kind, a, b) if a <= b else self.emit("xor", kind, b, a)

    def logic_not(self, kind: str, a: int) -> int:
        x = self.value[a]
        if x is not None:
            return self.const(kind, not x if kind == "b" else wrapped(kind, ~x))
        if self.op[a] == "not":
            return self.args[a][0]
        return self.emit("not", kind, a)

    def shift(self, op: str, kind: str, a: int, b: int) -> int:
        """op: shl, lshr or ashr. By 32 and more bits it gives 0, or, for ashr, all bits the sign."""
        x = self.value[a]
        y = self.value[b]
        if y == 0 and y is not None:
            return a
        if x is not None and y is not None:
            count = y & 0xFFFFFFFF
            if op == "shl":
                return self.const(kind, wrapped(kind, x << count if count < 32 else 0))
            if op == "lshr":
                return self.const(
                    kind, wrapped(kind, (x & 0xFFFFFFFF) >> count if count < 32 else 0)
                )
            return self.const(kind, wrapped(kind, wrapped("i", x) >> min(count, 31)))
        return self.emit(op, kind, a, b)

    # Conversions ----------------------------------------------------------------------------------

    def convert(self, a: int, to: str) -> int:
        """As lax.convert_element_type: float to integer towards zero, clamped to the range, NaN to 0."""
        kind = self.kind[a]
        x = self.value[a]
        if kind == to:
            return a
        if x is not None:
            return self.const(to, convert_constant(kind, to, x))
        if kind == "b":
            return self.emit("from_bool", to, a)
        if to == "b":
            return self.compare("ne", kind, a, self.const(kind, 0.0 if kind == "f" else 0))
        if kind != "f" and to != "f":
            return self.bitcast(a, to)
        return self.emit(f"convert {kind}", to, a)

    def bitcast(self, a: int, to: str) -> int:
        kind = self.kind[a]
        x = self.value[a]
        if kind == to:
            return a
        if x is not None:
            bits = np.array([x], DTYPES[kind]).view(DTYPES[to])
            return self.const(to, bits.tolist()[0])
        if self.op[a] == "bitcast":
            return self.bitcast(self.args[a][0], to)
        return self.emit("bitcast", to, a)

    def unary(self, op: str, a: int) -> int:
        """A function of a float: sqrt, rsqrt, abs, floor, ceil, rint, or one of vector_math's."""
        x = self.value[a]
        if x is not None:
            value = constant_function(op, x)
            if value is not None:
                return self.const("f", value)
        if op == "abs" and self.op[a] in ("abs", "neg"):
            return self.unary("abs", self.args[a][0])
        return self.emit(op, "f", a)


def convert_constant(kind: str, to: str, x):
    if to == "b":
        return x != 0
    if to == "f":
        return rounded(float(x))
    if kind != "f":
        return wrapped(to, int(x))
    if x != x:
        return 0
    low, high = (-(1 << 31), (1 << 31) - 1) if to == "i" else (0, (1 << 32) - 1)
    return low if x <= low else high if x >= high else int(x)


FUNCTIONS = {
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "abs": np.abs,
    "floor": np.floor,
    "ceil": np.ceil,
    "rint": np.rint,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log1p": np.log1p,
    "expm1": np.expm1,
    "tanh": np.tanh,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
    "cbrt": np.cbrt,
}


def constant_function(op: str, x: float) -> float | None:
    """The function of a constant, in double precision and rounded once; None if it is not known here."""
    function = FUNCTIONS.get(op)
    if function is None:
        return None
    with np.errstate(all="ignore"):
        return rounded(float(function(np.float64(x))))
