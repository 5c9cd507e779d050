"""From the graph of one world to LLVM IR of a kernel for all worlds.

On a CPU a value of the graph becomes a vector, one lane a world, and the kernel handles `width`
worlds at a time: every instruction does the same for all of them. A loop goes on while any of its
lanes wants to, a branch's block runs if any lane wants it, and lanes that do not are kept from it
by selects. On a GPU the width is 1: a thread handles one world, and values are plain scalars.

`Emitter` writes the body of the kernel; the function around it, with its arguments and the loop
over worlds, is in cpu.py and cuda.py. Text is written rather than llvmlite's builder called,
which is five times slower. The body relies on these names: %operandI, %resultI and %scratch,
pointers to the arrays and to scratch memory; %lanes, the number of every lane's world. With
width 1 there is no %lanes, and the pointers are to what is the world's own. On a CPU most operands
and results are read and written as rows of scratch memory (staging.py)."""

import functools
import re
import struct

from onekernel import staging, vector_math
from onekernel.graph import Branch, Graph, Loop
from onekernel.layout import scratch_layout

TYPES = {"f": "float", "i": "i32", "u": "i32", "b": "i1"}
MEMORY_TYPES = {"f": "float", "i": "i32", "u": "i32", "b": "i8"}  # a bool takes a byte
ARITHMETIC = {"add", "sub", "mul"}
FLOAT_COMPARISONS = {"lt": "olt", "le": "ole", "eq": "oeq", "ne": "une"}
SIGNED_COMPARISONS = {"lt": "slt", "le": "sle", "eq": "eq", "ne": "ne"}
UNSIGNED_COMPARISONS = {"lt": "ult", "le": "ule", "eq": "eq", "ne": "ne"}
GLOBAL = re.compile(r"@[\w.]+")
WARP = 32  # threads of a GPU that run together; their scratch memory is laid out as that of a vector's lanes
# Nodes of a part of a kernel for a CPU (parts.py); a kernel of fewer nodes than SMALL has none.
PART = 3000
SMALL = 60_000
FLOAT_INTRINSICS = {"sqrt": "sqrt", "abs": "fabs", "floor": "floor", "ceil": "ceil", "rint": "rint"}


def literal(kind: str, value) -> str:
    """A constant as LLVM writes it; a float32 by the bits of the double that equals it."""
    if kind == "f":
        bits = struct.unpack("<Q", struct.pack("<d", value))[0]
        return f"0x{bits:016X}"
    if kind == "b":
        return "true" if value else "false"
    return str(value)


class Liveness:
    """What of a graph its outputs need. A store is needed if its buffer is ever read; a loop or
    branch, if anything in it or of its results is."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.nodes = bytearray(len(graph.op))
        # By other nodes that are needed; of what loops carry, at least.
        self.uses = [0] * len(graph.op)
        self.pending: list[int] = []
        self.stores: dict[int, list[int]] = {}
        self.read: set[int] = set()
        for node, op in enumerate(graph.op):
            if op == "store":
                buffer = graph.extra[node]
                if graph.buffers[buffer].source == "output":
                    self.want(node)
                else:
                    self.stores.setdefault(buffer, []).append(node)
        while self.pending:
            self.follow(self.pending.pop())

    def want(self, node: int) -> None:
        self.uses[node] += 1
        if not self.nodes[node]:
            self.nodes[node] = 1
            self.pending.append(node)

    def follow(self, node: int) -> None:
        graph = self.graph
        op = graph.op[node]
        for arg in graph.args[node]:
            self.want(arg)
        owner = graph.owner[graph.block[node]]
        if owner >= 0:
            self.want(owner)
        if op == "loop":
            loop: Loop = graph.extra[node]
            if loop.length is None:
                for condition in (loop.first_active, loop.active, loop.next_active):
                    self.want(condition)
        elif op == "branch":
            branch: Branch = graph.extra[node]
            for condition in (branch.condition, *branch.wanted):
                self.want(condition)
        elif op == "phi":
            loop = graph.extra[owner]
            if node in loop.phis:
                self.carried(loop, loop.phis.index(node))
        elif op == "loop_out":
            loop = graph.extra[graph.args[node][0]]
            self.carried(loop, graph.extra[node])
        elif op == "branch_out":
            branch = graph.extra[graph.args[node][0]]
            for results in branch.results:
                self.want(results[graph.extra[node]])
        elif op == "load":
            buffer = graph.extra[node]
            if buffer not in self.read:
                self.read.add(buffer)
                for store in self.stores.get(buffer, ()):
                    self.want(store)

    def carried(self, loop: Loop, index: int) -> None:
        for node in (loop.phis[index], loop.inits[index], loop.nexts[index]):
            self.want(node)


def carried_values(graph: Graph) -> set[int]:
    """What loops and branches need besides the operations in them."""
    nodes: set[int] = set()
    for extra in graph.extra.values():
        if isinstance(extra, Loop):
            nodes.update(extra.inits, extra.nexts, (extra.first_active, extra.next_active))
        elif isinstance(extra, Branch):
            nodes.update((extra.condition, *extra.wanted), *extra.results)
    return nodes


def node_weight(graph: Graph, node: int, weights: list[int]) -> int:
    """Roughly, the instructions of a node. A block in it that is divided leaves only calls."""
    weight = 1
    extra = graph.extra.get(node)
    inner = ()
    if isinstance(extra, Loop):
        inner = (extra.block,)
    elif isinstance(extra, Branch):
        inner = extra.blocks
    for block in inner:
        if weights[block] <= PART:
            weight += weights[block]
    return weight


def block_weights(graph: Graph, live: bytearray) -> list[int]:
    """Roughly, the instructions of each block, those of blocks in it included."""
    weights = [0] * len(graph.blocks)
    for block in reversed(range(len(graph.blocks))):  # a block is younger than the one around it
        for node in graph.blocks[block]:
            if live[node]:
                weights[block] += node_weight(graph, node, weights)
    return weights


class Emitter:
    """Writes a kernel's body.

    width: worlds at a time; mapped: of each operand, whether each world has its own; sizes: of
    each operand, elements of one world's. A value that is the same in all worlds, such as a
    loop's counter, is a scalar named %sN besides the vector %vN; while `prefix` is "s",
    `operation` computes with those."""

    def __init__(self, graph: Graph, width: int, mapped: list[bool], sizes: list[int]):
        self.graph = graph
        self.width = width
        self.mapped = mapped
        self.sizes = sizes
        liveness = Liveness(graph)
        self.live = liveness.nodes
        self.uses = liveness.uses
        self.fused = self.fused_products()
        self.products = set(self.fused.values())
        self.lines: list[str] = []
        self.prefix = "v"
        self.names: dict[str, str] = {}  # of values that another name stands for already
        self.declarations: set[str] = set()
        self.functions: set[str] = set()
        self.tables: list[str] = []
        self.count = 0
        self.label = "body"
        self.weights = [0] * len(graph.blocks)
        if width > 1 and sum(self.live) > SMALL:
            self.weights = block_weights(graph, self.live)
        self.parts: dict[str, str] = {}  # labels: of a part's begin, and of what comes after it
        self.offsets, self.scratch_size = scratch_layout(graph, self.live)
        self.staging = staging.Staging([], [], {}, {}, set(), self.scratch_size)
        if width > 1:
            self.staging = staging.plan(graph, self.live, mapped, sizes, width, self.scratch_size)
            self.scratch_size = self.staging.rows
        self.carried = carried_values(graph) if self.staging.inputs else set()
        self.near: dict[str, str] = {}  # as `names`, for the node that is being written
        self.loaded: dict[int, tuple[str, str]] = {}  # from rows: after which label, the name
        self.copies: set[tuple[str, bool]] = set()  # functions of staging.py that are called
        self.stored: set[int] = set(self.staging.handed)
        self.early: dict[int, list[int]] = {}  # of values: stores to do as soon as they are known
        for node, op in enumerate(graph.op):
            if op == "store" and graph.extra[node] in self.staging.buffers and self.is_early(node):
                self.early.setdefault(graph.args[node][1], []).append(node)
        for number, buffer in enumerate(graph.buffers):
            if buffer.source == "const":
                self.add_table(number, buffer)

    def fused_products(self) -> dict[int, int]:
        """Sums and differences that take a product with them, rounded once (FMA), and which: one
        that nothing else needs.

        LLVM would do so by itself if it were allowed to, but one kernel of a function and
        another, for arguments that worlds share, could then differ in rounding."""
        graph = self.graph
        fused = {}
        for node, op in enumerate(graph.op):
            if op not in ("add", "sub") or graph.kind[node] != "f" or not self.live[node]:
                continue
            for arg in reversed(graph.args[node]):
                if (
                    graph.op[arg] == "mul"
                    and self.uses[arg] == 1
                    and graph.block[arg] == graph.block[node]
                ):
                    fused[node] = arg
                    break
        return fused

    # Names and types ------------------------------------------------------------------------------

    def vector(self, scalar: str) -> str:
        return scalar if self.width == 1 else f"<{self.width} x {scalar}>"

    def splat(self, scalar: str, constant: str) -> str:
        return constant if self.width == 1 else f"splat ({scalar} {constant})"

    def type(self, node: int) -> str:
        return self.vector(TYPES[self.graph.kind[node]])

    def suffix(self, scalar: str) -> str:
        """How an intrinsic's name tells its type."""
        short = {"float": "f32", "i32": "i32", "i1": "i1", "i8": "i8", "ptr": "p0"}[scalar]
        return short if self.width == 1 else f"v{self.width}{short}"

    def of(self, node: int) -> str:
        """A node as an operand: a vector, or, while `prefix` says so, a scalar."""
        graph = self.graph
        if graph.op[node] == "const":
            kind = graph.kind[node]
            return self.splat(TYPES[kind], literal(kind, graph.value[node]))
        own = f"%{self.prefix}{node}"
        return self.near.get(own) or self.names.get(own, own)

    def scalar(self, node: int) -> str:
        """A node that is the same in all worlds, as a scalar."""
        graph = self.graph
        if graph.op[node] == "const":
            return literal(graph.kind[node], graph.value[node])
        return self.of(node) if self.width == 1 else self.names.get(f"%s{node}", f"%s{node}")

    def fresh(self) -> str:
        self.count += 1
        return f"%t{self.count}"

    def add(self, line: str) -> None:
        self.lines.append(line)

    def value(self, expression: str) -> str:
        """A new name for the expression's value."""
        name = self.fresh()
        self.lines.append(f"{name} = {expression}")
        return name

    def start(self, label: str) -> None:
        self.lines.append(f"{label}:")
        self.label = label

    def intrinsic(self, name: str, result: str, *arguments: tuple[str, str]) -> str:
        """A call of LLVM's own function; arguments: pairs of a type and a value."""
        types = ", ".join(kind for kind, _ in arguments)
        self.declarations.add(f"declare {result} @{name}({types})")
        return f"call {result} @{name}({', '.join(' '.join(pair) for pair in arguments)})"

    def any(self, node: int) -> str:
        """Whether a condition holds in any lane, as an i1."""
        if self.width == 1 or self.graph.uniform[node]:
            return self.scalar(node)
        bits = self.value(f"bitcast {self.vector('i1')} {self.of(node)} to i{self.width}")
        return self.value(f"icmp ne i{self.width} {bits}, 0")

    # Blocks ---------------------------------------------------------------------------------------

    def emit(self) -> None:
        """The whole program, from the label `body` on."""
        for run in self.staging.operands:
            self.copy(run, inward=True)
        self.block(0)
        for run in self.staging.results:
            self.copy(run, inward=False)

    def copy(self, run: staging.Run, inward: bool) -> None:
        """Elements of an array to their rows, or from them."""
        scalar = "i8" if run.kind == "b" else "i32"
        self.copies.add((scalar, inward))
        self.count += 1
        self.lines += staging.call(run, scalar, inward, self.width, self.count)

    def is_empty(self, block: int) -> bool:
        return not any(self.live[node] for node in self.graph.blocks[block])

    def block(self, block: int) -> None:
        """Writes a block's nodes; those of a large one in parts (see parts.py)."""
        graph = self.graph
        part = ""
        weight = 0
        if self.weights[block] > PART:
            part = self.next_label("part")
        for node in graph.blocks[block]:
            if not self.live[node] or node in self.products:
                continue
            if part:
                own = node_weight(graph, node, self.weights)
                if weight + own > PART and weight > 0:
                    self.parts[part] = self.next_label("part")
                    part = self.label
                    weight = 0
                weight += own
            op = graph.op[node]
            if op == "loop":
                self.loop(node, graph.extra[node])
            elif op == "branch":
                self.branch(node, graph.extra[node])
            elif op == "store":
                if node not in self.stored:
                    self.with_rows(node, self.store, node)
            else:
                self.with_rows(node, self.operation, node, op)
                for store in self.early.get(node, ()):
                    self.store(store)
                    self.stored.add(store)
        if part:
            self.parts[part] = self.next_label("rest")

    def next_label(self, name: str) -> str:
        """Ends a stretch of instructions, and begins another one; its label."""
        self.count += 1
        label = f"{name}{self.count}"
        self.add(f"br label %{label}")
        self.start(label)
        return label

    def is_early(self, store: int) -> bool:
        """Whether a store to a result's row may be done as soon as its value is known."""
        graph = self.graph
        index, value, *masks = graph.args[store]
        return (
            graph.block[store] == graph.block[value] == 0
            and graph.op[index] == "const"
            and graph.op[value] != "input"
            and not masks
        )

    def with_rows(self, node: int, write, *arguments) -> None:
        """Calls write(*arguments), which writes a node. Elements of operands are read from their
        rows right before it: read earlier, they would take registers, or be kept in memory a
        second time."""
        args = self.graph.args[node]
        if node in self.fused:
            args = (*args, *self.graph.args[self.fused[node]])
        rows = self.staging.inputs
        self.near = {f"%v{arg}": self.row(arg) for arg in args if arg in rows}
        write(*arguments)
        self.near = {}

    def row(self, node: int) -> str:
        """An element of an operand, from its row, once in a stretch of instructions without
        jumps."""
        label, loaded = self.loaded.get(node, ("", ""))
        if label == self.label:
            return loaded
        kind = self.graph.kind[node]
        vector = self.vector("i32" if kind == "b" else TYPES[kind])
        place = self.value(
            f"getelementptr i32, ptr %scratch, i64 {self.staging.inputs[node] * self.width}"
        )
        loaded = self.value(f"load {vector}, ptr {place}, align {4 * self.width}")
        if kind == "b":
            loaded = self.value(f"icmp ne {vector} {loaded}, zeroinitializer")
        self.loaded[node] = (self.label, loaded)
        return loaded

    def loop(self, node: int, loop: Loop) -> None:
        before = self.label
        head, latch, after = f"loop{node}", f"latch{node}", f"after{node}"
        conditional = loop.length is None
        if conditional:
            self.add(f"br i1 {self.any(loop.first_active)}, label %{head}, label %{after}")
        else:
            self.add(f"br label %{head}")
        self.start(head)
        carried = [
            (phi, init, following)
            for phi, init, following in zip(loop.phis, loop.inits, loop.nexts, strict=True)
            if self.live[phi]
        ]
        if conditional and self.live[loop.active]:
            carried.append((loop.active, loop.first_active, loop.next_active))
        if not conditional:
            name = f"%v{loop.counter}" if self.width == 1 else f"%s{loop.counter}"
            self.add(f"{name} = phi i32 [0, %{before}], [%n{node}, %{latch}]")
        places = []
        for _ in carried:
            places.append(len(self.lines))
            self.add("")  # written when the names of what comes next are known
        if not conditional:
            self.spread(loop.counter)
        self.block(loop.block)
        again = self.any(loop.next_active) if conditional else None
        self.add(f"br label %{latch}")
        self.start(latch)
        for place, (phi, init, following) in zip(places, carried, strict=True):
            kind = self.type(phi)
            self.lines[place] = (
                f"%v{phi} = phi {kind} [{self.of(init)}, %{before}], [{self.of(following)}, %{latch}]"
            )
        if not conditional:
            counter = self.scalar(loop.counter)
            self.add(f"%n{node} = add i32 {counter}, 1")
            again = self.value(f"icmp slt i32 %n{node}, {loop.length}")
        self.add(f"br i1 {again}, label %{head}, label %{after}")
        self.start(after)
        self.loop_outs(node, loop, before, latch)

    def loop_outs(self, node: int, loop: Loop, before: str, latch: str) -> None:
        first = node + 1  # the loop's results were made right after it
        for index, (init, following) in enumerate(zip(loop.inits, loop.nexts, strict=True)):
            out = first + index
            if not self.live[out]:
                continue
            if loop.length is not None:
                self.names[f"%v{out}"] = self.of(following)
            else:
                kind = self.type(out)
                self.add(
                    f"%v{out} = phi {kind} [{self.of(init)}, %{before}], [{self.of(following)}, %{latch}]"
                )

    def branch(self, node: int, branch: Branch) -> None:
        outs = [(index, out) for index, out in enumerate(branch.outs) if self.live[out]]
        if self.width == 1:
            self.scalar_branch(node, branch, outs)
            return
        filled = [which for which in (0, 1) if not self.is_empty(branch.blocks[which])]
        if not filled:
            sides = [self.results(branch, which, outs) for which in (0, 1)]
            for (_, out), name in zip(outs, self.chosen(branch, outs, *sides), strict=True):
                self.names[f"%v{out}"] = name
            return
        zeros = ["zeroinitializer"] * len(outs)
        if len(filled) == 2:
            names = [self.fresh() for _ in outs]
            inside = functools.partial(self.results, branch, 0, outs)
            self.skippable(node, branch, 0, outs, names, inside, zeros)
            other = names
        else:
            other = self.results(branch, 1 - filled[0], outs)

        # What each world gets is chosen within the last block. So there is nothing to do for all
        # these results where it is skipped: they are the other side's.
        def choose() -> list[str]:
            own = self.results(branch, filled[-1], outs)
            sides = (own, other) if filled[-1] == 0 else (other, own)
            return self.chosen(branch, outs, *sides)

        names = [f"%v{out}" for _, out in outs]
        self.skippable(node, branch, filled[-1], outs, names, choose, other)

    def skippable(
        self, node: int, branch: Branch, which: int, outs, names: list[str], results, otherwise
    ) -> None:
        """A block of a branch, and `names` for the results that it has, or for `otherwise`, if no
        world wants it. results: writes, within the block, what it ends with, and gives the names"""
        before = self.label
        inside, after = f"side{node}.{which}", f"joined{node}.{which}"
        self.add(f"br i1 {self.any(branch.wanted[which])}, label %{inside}, label %{after}")
        self.start(inside)
        self.block(branch.blocks[which])
        ends = results()
        last = self.label
        self.add(f"br label %{after}")
        self.start(after)
        for (_, out), name, end, skipped in zip(outs, names, ends, otherwise, strict=True):
            self.add(f"{name} = phi {self.type(out)} [{end}, %{last}], [{skipped}, %{before}]")

    def results(self, branch: Branch, side: int, outs) -> list[str]:
        return [self.of(branch.results[side][index]) for index, _ in outs]

    def chosen(self, branch: Branch, outs, yes: list[str], no: list[str]) -> list[str]:
        """Of each result, what each world gets."""
        condition = f"{self.vector('i1')} {self.of(branch.condition)}"
        kinds = [self.type(out) for _, out in outs]
        return [
            self.value(f"select {condition}, {kind} {first}, {kind} {second}")
            for kind, first, second in zip(kinds, yes, no, strict=True)
        ]

    def scalar_branch(self, node: int, branch: Branch, outs) -> None:
        yes, no, after = f"yes{node}", f"no{node}", f"joined{node}"
        self.add(f"br i1 {self.of(branch.condition)}, label %{yes}, label %{no}")
        ends = []
        for label, block in ((yes, branch.blocks[0]), (no, branch.blocks[1])):
            self.start(label)
            self.block(block)
            ends.append(self.label)
            self.add(f"br label %{after}")
        self.start(after)
        for index, out in outs:
            sources = ", ".join(
                f"[{self.of(results[index])}, %{end}]"
                for results, end in zip(branch.results, ends, strict=True)
            )
            self.add(f"%v{out} = phi {self.type(out)} {sources}")

    # Memory ---------------------------------------------------------------------------------------

    def add_table(self, number: int, buffer) -> None:
        kind = buffer.kind
        scalar = MEMORY_TYPES[kind]
        if kind == "b":
            items = ", ".join(f"i8 {int(value)}" for value in buffer.data.tolist())
        else:
            items = ", ".join(f"{scalar} {literal(kind, value)}" for value in buffer.data.tolist())
        self.tables.append(
            f"@table{number} = internal constant [{buffer.size} x {scalar}] [{items}]"
        )

    def wide(self, index: int) -> tuple[str, bool]:
        """An index as i64, and whether it is a scalar, the same in all worlds."""
        graph = self.graph
        if graph.op[index] == "const":
            return str(graph.value[index]), True
        if graph.uniform[index] or self.width == 1:
            return self.value(f"sext i32 {self.scalar(index)} to i64"), True
        vector = f"<{self.width} x i64>"
        return self.value(f"sext {self.vector('i32')} {self.of(index)} to {vector}"), False

    def places(self, buffer: int, index: int) -> tuple[str, str]:
        """Where the elements of all lanes are: ("one", a pointer that all share), ("row", a
        pointer to a vector) or ("each", a vector of pointers)."""
        source = self.graph.buffers[buffer]
        scalar = MEMORY_TYPES[source.kind]
        offset, same = self.wide(index)
        vector = f"<{self.width} x i64>"
        if source.source == "scratch":
            return self.scratch_places(self.offsets[buffer], offset, same)
        if buffer in self.staging.buffers:
            return self.scratch_places(self.staging.buffers[buffer], offset, same)
        if source.source == "const":
            base = f"@table{buffer}"
            shared = True
        else:
            base = f"%{'operand' if source.source == 'input' else 'result'}{source.operand}"
            shared = source.source == "input" and not self.mapped[source.operand]
        if shared or self.width == 1:
            if same:
                return "one", self.value(f"getelementptr {scalar}, ptr {base}, i64 {offset}")
            return "each", self.value(f"getelementptr {scalar}, ptr {base}, {vector} {offset}")
        start = self.value(f"mul {vector} %lanes, splat (i64 {source.size})")
        if same and not offset.startswith("%"):
            place = self.value(f"add {vector} {start}, splat (i64 {offset})")
        elif same:
            place = self.value(f"add {vector} {start}, {self.spread_index(offset)}")
        else:
            place = self.value(f"add {vector} {start}, {offset}")
        return "each", self.value(f"getelementptr {scalar}, ptr {base}, {vector} {place}")

    def spread_index(self, offset: str) -> str:
        vector = f"<{self.width} x i64>"
        one = self.value(f"insertelement {vector} zeroinitializer, i64 {offset}, i32 0")
        return self.value(
            f"shufflevector {vector} {one}, {vector} zeroinitializer, <{self.width} x i32> zeroinitializer"
        )

    def scratch_places(self, start: int, offset: str, same: bool) -> tuple[str, str]:
        """Element k of a world's scratch memory: next to it are those of the other lanes, or of
        a warp's threads."""
        vector = f"<{self.width} x i64>"
        if same:
            lanes = WARP if self.width == 1 else self.width
            if offset.startswith("%"):
                place = self.value(f"add i64 {offset}, {start}")
                row = self.value(f"mul i64 {place}, {lanes}")
            else:
                row = str((int(offset) + start) * lanes)
            pointer = self.value(f"getelementptr i32, ptr %scratch, i64 {row}")
            return "one" if self.width == 1 else "row", pointer
        lanes = ", ".join(f"i64 {lane + start * self.width}" for lane in range(self.width))
        row = self.value(f"mul {vector} {offset}, splat (i64 {self.width})")
        own = self.value(f"add {vector} {row}, <{lanes}>")
        return "each", self.value(f"getelementptr i32, ptr %scratch, {vector} {own}")

    def in_scratch(self, buffer: int) -> bool:
        """Whether a buffer has rows of lanes in scratch memory."""
        return self.graph.buffers[buffer].source == "scratch" or buffer in self.staging.buffers

    def load(self, node: int, buffer: int, index: int) -> None:
        graph = self.graph
        kind = graph.kind[node]
        in_scratch = self.in_scratch(buffer)
        scalar = ("i32" if kind == "b" else TYPES[kind]) if in_scratch else MEMORY_TYPES[kind]
        form, place = self.places(buffer, index)
        vector = self.vector(scalar)
        if form == "one":
            loaded = self.value(f"load {scalar}, ptr {place}, align {1 if scalar == 'i8' else 4}")
            if kind == "b":
                loaded = self.value(f"icmp ne {scalar} {loaded}, 0")
            self.define_from_scalar(node, loaded)
            return
        if form == "row":
            loaded = self.value(f"load {vector}, ptr {place}, align {4 * self.width}")
        else:
            loaded = self.value(self.gather(scalar, place))
        if kind == "b":
            self.add(f"%v{node} = icmp ne {vector} {loaded}, zeroinitializer")
        else:
            self.names[f"%v{node}"] = loaded
        if graph.uniform[node]:
            self.add(f"%s{node} = extractelement {self.type(node)} {self.of(node)}, i32 0")

    def define_from_scalar(self, node: int, loaded: str) -> None:
        if self.width == 1:
            self.names[f"%v{node}"] = loaded
            return
        kind = self.type(node)
        scalar = TYPES[self.graph.kind[node]]
        one = self.value(f"insertelement {kind} zeroinitializer, {scalar} {loaded}, i32 0")
        self.add(
            f"%v{node} = shufflevector {kind} {one}, {kind} zeroinitializer, "
            f"<{self.width} x i32> zeroinitializer"
        )
        if self.graph.uniform[node]:
            self.names[f"%s{node}"] = loaded

    def gather(self, scalar: str, places: str) -> str:
        align = 1 if scalar == "i8" else 4
        name = f"llvm.masked.gather.{self.suffix(scalar)}.{self.suffix('ptr')}"
        vector = self.vector(scalar)
        pointers = self.vector("ptr")
        mask = self.vector("i1")
        self.declarations.add(f"declare {vector} @{name}({pointers}, {mask}, {vector})")
        return (
            f"call {vector} @{name}({pointers} align {align} {places}, {mask} splat (i1 true), "
            f"{vector} zeroinitializer)"
        )

    def store(self, node: int) -> None:
        graph = self.graph
        buffer = graph.extra[node]
        index, value, *masks = graph.args[node]
        kind = graph.kind[value]
        in_scratch = self.in_scratch(buffer)
        scalar = ("i32" if kind == "b" else TYPES[kind]) if in_scratch else MEMORY_TYPES[kind]
        vector = self.vector(scalar)
        stored = self.of(value)
        if kind == "b":
            stored = self.value(f"zext {self.vector('i1')} {stored} to {vector}")
        form, place = self.places(buffer, index)
        align = 1 if scalar == "i8" else 4
        if self.width == 1:
            if masks:
                old = self.value(f"load {scalar}, ptr {place}, align {align}")
                stored = self.value(
                    f"select i1 {self.of(masks[0])}, {scalar} {stored}, {scalar} {old}"
                )
            self.add(f"store {scalar} {stored}, ptr {place}, align {align}")
        elif form == "row":
            if masks:
                old = self.value(f"load {vector}, ptr {place}, align {4 * self.width}")
                mask = f"{self.vector('i1')} {self.of(masks[0])}"
                stored = self.value(f"select {mask}, {vector} {stored}, {vector} {old}")
            # LLVM keeps volatile stores in order. That thousands of others may come in any order
            # is what it would spend most of its time on.
            word = "store volatile" if buffer in self.staging.buffers else "store"
            self.add(f"{word} {vector} {stored}, ptr {place}, align {4 * self.width}")
        else:
            mask = self.of(masks[0]) if masks else "splat (i1 true)"
            name = f"llvm.masked.scatter.{self.suffix(scalar)}.{self.suffix('ptr')}"
            pointers = self.vector("ptr")
            self.declarations.add(
                f"declare void @{name}({vector}, {pointers}, {self.vector('i1')})"
            )
            self.add(
                f"call void @{name}({vector} {stored}, {pointers} align {align} {place}, "
                f"{self.vector('i1')} {mask})"
            )

    # Operations -----------------------------------------------------------------------------------

    def spread(self, node: int) -> None:
        """The vector of a scalar that is the same in all worlds."""
        if self.width == 1:
            return
        kind = self.type(node)
        scalar = TYPES[self.graph.kind[node]]
        one = self.value(
            f"insertelement {kind} zeroinitializer, {scalar} {self.scalar(node)}, i32 0"
        )
        self.add(
            f"%v{node} = shufflevector {kind} {one}, {kind} zeroinitializer, "
            f"<{self.width} x i32> zeroinitializer"
        )

    def operation(self, node: int, op: str) -> None:
        graph = self.graph
        kind = graph.kind[node]
        args = graph.args[node]
        if op == "input":
            self.input(node)
            return
        if op == "load" or op.startswith("load "):
            self.load(node, graph.extra[node], args[0])
            return
        if graph.uniform[node] and self.width > 1:
            self.uniform_operation(node, op)
            return
        name = f"%{self.prefix}{node}"
        if node in self.fused:
            self.fused_operation(node, op)
            return
        a = self.of(args[0])
        vector = self.vector(TYPES[graph.kind[args[0]]])
        if op in ARITHMETIC:
            word = f"f{op}" if kind == "f" else op
            self.add(f"{name} = {word} {vector} {a}, {self.of(args[1])}")
        elif op == "select":
            yes, no = self.of(args[1]), self.of(args[2])
            result = self.type(node)
            self.add(f"{name} = select {vector} {a}, {result} {yes}, {result} {no}")
        elif op == "neg":
            if kind == "f":
                self.add(f"{name} = fneg {vector} {a}")
            else:
                self.add(f"{name} = sub {vector} {self.zero('i')}, {a}")
        elif " " in op and op.split()[0] in FLOAT_COMPARISONS:
            self.add(f"{name} = {self.comparison(op)} {vector} {a}, {self.of(args[1])}")
        elif op in FLOAT_INTRINSICS:
            full = f"llvm.{FLOAT_INTRINSICS[op]}.{self.suffix('float')}"
            self.add(f"{name} = {self.intrinsic(full, vector, (vector, a))}")
        elif op == "rsqrt":
            full = f"llvm.sqrt.{self.suffix('float')}"
            root = self.value(self.intrinsic(full, vector, (vector, a)))
            self.add(f"{name} = fdiv {vector} {self.splat('float', literal('f', 1.0))}, {root}")
        elif op == "div" and kind == "f":
            self.add(f"{name} = fdiv {vector} {a}, {self.of(args[1])}")
        elif op in ("max", "min"):
            self.extreme(node, op, kind, args)
        else:
            self.rare_operation(node, op, kind, args)

    def fused_operation(self, node: int, op: str) -> None:
        """x * y + z, z - x * y or x * y - z, rounded once."""
        graph = self.graph
        product = self.fused[node]
        x, y = (self.of(factor) for factor in graph.args[product])
        left, right = graph.args[node]
        other = left if right == product else right
        z = self.of(other)
        vector = self.vector("float")
        if op == "sub":
            if right == product:
                x = self.value(f"fneg {vector} {x}")
            else:
                z = self.value(f"fneg {vector} {z}")
        full = f"llvm.fma.{self.suffix('float')}"
        self.add(
            f"%v{node} = {self.intrinsic(full, vector, (vector, x), (vector, y), (vector, z))}"
        )

    def zero(self, kind: str) -> str:
        scalar = TYPES[kind]
        return self.splat(scalar, literal(kind, 0.0 if kind == "f" else 0))

    def comparison(self, op: str) -> str:
        name, kind = op.split()
        if kind == "f":
            return f"fcmp {FLOAT_COMPARISONS[name]}"
        table = UNSIGNED_COMPARISONS if kind == "u" else SIGNED_COMPARISONS
        return f"icmp {table[name]}"

    def extreme(self, node: int, op: str, kind: str, args) -> None:
        """NaN wins. With a constant on the right one comparison does it: false for NaN, it picks the left."""
        name = f"%{self.prefix}{node}"
        vector = self.vector(TYPES[kind])
        a, b = self.of(args[0]), self.of(args[1])
        if kind != "f":
            word = ("u" if kind == "u" else "s") + op
            full = f"llvm.{word}.{self.suffix('i32')}"
            self.add(f"{name} = {self.intrinsic(full, vector, (vector, a), (vector, b))}")
            return
        booleans = self.vector("i1")
        right = self.value(f"fcmp {'olt' if op == 'max' else 'ogt'} {vector} {a}, {b}")
        picked = f"select {booleans} {right}, {vector} {b}, {vector} {a}"
        if (
            self.graph.op[args[1]] == "const"
            and self.graph.value[args[1]] == self.graph.value[args[1]]
        ):
            self.add(f"{name} = {picked}")
            return
        one = self.value(picked)
        is_nan = self.value(f"fcmp uno {vector} {b}, {b}")
        self.add(f"{name} = select {booleans} {is_nan}, {vector} {b}, {vector} {one}")

    def rare_operation(self, node: int, op: str, kind: str, args) -> None:
        name = f"%{self.prefix}{node}"
        graph = self.graph
        from_kind = graph.kind[args[0]]
        vector = self.vector(TYPES[from_kind])
        result = self.type(node)
        values = [self.of(arg) for arg in args]
        if op in ("and", "or", "xor"):
            self.add(f"{name} = {op} {vector} {values[0]}, {values[1]}")
        elif op == "not":
            ones = self.splat(TYPES[kind], "true" if kind == "b" else "-1")
            self.add(f"{name} = xor {vector} {values[0]}, {ones}")
        elif op == "from_bool":
            if kind == "f":
                self.add(f"{name} = uitofp {vector} {values[0]} to {result}")
            else:
                self.add(f"{name} = zext {vector} {values[0]} to {result}")
        elif op == "bitcast":
            if TYPES[kind] == TYPES[from_kind]:
                self.names[f"%{self.prefix}{node}"] = values[0]
            else:
                self.add(f"{name} = bitcast {vector} {values[0]} to {result}")
        elif op.startswith("convert"):
            self.conversion(name, from_kind, kind, values[0])
        elif op in ("shl", "lshr", "ashr"):
            self.add(f"{name} = {self.shift(op, vector, args, values)}")
        elif op in ("div", "rem") and kind != "f":
            self.integer_division(name, op, kind, vector, values)
        elif op in ("population_count", "clz"):
            if op == "clz":
                full = f"llvm.ctlz.{self.suffix('i32')}"
                call = self.intrinsic(full, vector, (vector, values[0]), ("i1", "false"))
            else:
                full = f"llvm.ctpop.{self.suffix('i32')}"
                call = self.intrinsic(full, vector, (vector, values[0]))
            self.add(f"{name} = {call}")
        else:
            function = "fmod" if op == "rem" else op
            self.functions.add(function)
            arguments = ", ".join(f"{vector} {value}" for value in values)
            full = vector_math.function_name(function, self.width)
            self.add(f"{name} = call {vector} @{full}({arguments})")

    def conversion(self, name: str, from_kind: str, kind: str, value: str) -> None:
        source = self.vector(TYPES[from_kind])
        result = self.vector(TYPES[kind])
        if kind == "f":
            word = "uitofp" if from_kind == "u" else "sitofp"
            self.add(f"{name} = {word} {source} {value} to {result}")
            return
        word = "fptoui" if kind == "u" else "fptosi"
        full = f"llvm.{word}.sat.{self.suffix('i32')}.{self.suffix('float')}"
        self.add(f"{name} = {self.intrinsic(full, result, (source, value))}")

    def shift(self, op: str, vector: str, args, values) -> str:
        """LLVM leaves a shift by 32 bits and more undefined."""
        count = self.graph.value[args[1]]
        if count is not None and 0 <= count < 32:
            return f"{op} {vector} {values[0]}, {values[1]}"
        if op == "ashr":
            full = f"llvm.umin.{self.suffix('i32')}"
            most = self.splat("i32", "31")
            bounded = self.value(self.intrinsic(full, vector, (vector, values[1]), (vector, most)))
            return f"ashr {vector} {values[0]}, {bounded}"
        low = self.value(f"and {vector} {values[1]}, {self.splat('i32', '31')}")
        shifted = self.value(f"{op} {vector} {values[0]}, {low}")
        inside = self.value(f"icmp ult {vector} {values[1]}, {self.splat('i32', '32')}")
        return f"select {self.vector('i1')} {inside}, {vector} {shifted}, {vector} {self.zero('i')}"

    def integer_division(self, name: str, op: str, kind: str, vector: str, values) -> None:
        """As XLA has it: x / 0 is -1 and x % 0 is x; -2^31 / -1 is -2^31 with remainder 0."""
        a, b = values
        booleans = self.vector("i1")
        one = self.splat("i32", "1")
        by_zero = self.value(f"icmp eq {vector} {b}, {self.zero('i')}")
        divisor = self.value(f"select {booleans} {by_zero}, {vector} {one}, {vector} {b}")
        if kind == "i":
            minus = self.value(f"icmp eq {vector} {b}, {self.splat('i32', '-1')}")
            divisor = self.value(f"select {booleans} {minus}, {vector} {one}, {vector} {divisor}")
        sign = "s" if kind == "i" else "u"
        result = self.value(f"{sign}{op} {vector} {a}, {divisor}")
        if kind == "i" and op == "div":
            negated = self.value(f"sub {vector} {self.zero('i')}, {a}")
            result = self.value(f"select {booleans} {minus}, {vector} {negated}, {vector} {result}")
        otherwise = self.splat("i32", "-1") if op == "div" else a
        self.add(f"{name} = select {booleans} {by_zero}, {vector} {otherwise}, {vector} {result}")

    def uniform_operation(self, node: int, op: str) -> None:
        """An operation on what is the same in all worlds: once, by a scalar instruction."""
        width = self.width
        self.width = 1
        self.prefix = "s"
        self.operation(node, op)
        self.width = width
        self.prefix = "v"
        self.spread(node)

    def input(self, node: int) -> None:
        """An element of an operand."""
        if node in self.staging.inputs:
            if node in self.carried:
                self.names[f"%v{node}"] = self.row(node)
            return
        operand, element = self.graph.extra[node]
        kind = self.graph.kind[node]
        scalar = MEMORY_TYPES[kind]
        align = 1 if scalar == "i8" else 4
        base = f"%operand{operand}"
        pointer = self.value(f"getelementptr {scalar}, ptr {base}, i64 {element}")
        loaded = self.value(f"load {scalar}, ptr {pointer}, align {align}")
        if kind == "b":
            loaded = self.value(f"icmp ne i8 {loaded}, 0")
        self.define_from_scalar(node, loaded)

    def called_functions(self) -> list[str]:
        """The definitions of the functions that the kernel calls."""
        texts = []
        for scalar, inward in sorted(self.copies):
            text, declarations = staging.function(scalar, inward, self.width)
            texts.append(text)
            self.declarations |= declarations
        for name in sorted(self.functions):
            text, declarations = vector_math.define(name, self.width)
            texts.append(text)
            self.declarations |= declarations
        return texts

    def definitions(self) -> dict[str, str]:
        """All that the kernel's text refers to, by name: functions, declarations, tables."""
        texts = [*self.called_functions(), *self.declarations, *self.tables]
        return {GLOBAL.search(text)[0]: text for text in texts}
