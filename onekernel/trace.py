"""Takes a JAX program apart: from a jaxpr, JAX's own form of a traced function, to a graph of
scalars.

`Builder.evaluate` walks through the program once, in order. It plays interpreter, except that it
computes with nodes of the graph in place of numbers: what a primitive does to an array,
primitives.py does to each element. Loops and branches are here.

Arrays of more than `scalar_limit` elements are not taken apart. They stay in buffers, and what a
primitive does to their elements becomes a loop over the largest axis, whose body handles one
row. Neighbouring loops of the same length become one if each turn reads only its own row of what
the other has written (`Builder.for_each`); so a chain of operations on 600 contact rows is one
loop whose body handles one row from beginning to end."""

import dataclasses
import itertools
import math

import jax
import numpy as np
from jax.extend import core

from onekernel import arrays
from onekernel.arrays import Keys, Memory, Scalars, Value, kind_of
from onekernel.graph import KINDS, Graph, Loop

UNROLLED = 128  # so many elements are written out where a loop is not the outermost
SELECTED = (
    16  # among so few elements one is picked by comparing; among more, by its place in memory
)


class Unsupported(Exception):
    """What onekernel cannot compile: `what`, and the line of the user's source that has it."""

    def __init__(self, what: str, where: str = ""):
        super().__init__(f"{what} ({where})" if where else what)


@dataclasses.dataclass(frozen=True)
class Turn:
    """An index that is a loop's counter."""

    node: int


@dataclasses.dataclass
class OpenLoop:
    """The loop over rows that was made last; another of the same length may still join it. rows:
    of each buffer that it writes, how many elements a turn writes, in a row."""

    node: int
    block: int
    counter: int
    length: int
    rows: dict[int, int]


RULES: dict = {}


def rule(*names: str):
    """Registers what to do for the primitives of these names: (builder, equation, *values) ->
    list of values."""

    def register(function):
        for name in names:
            RULES[name] = function
        return function

    return register


class Builder:
    def __init__(self, graph: Graph, scalar_limit: int, platform: str):
        self.graph = graph
        self.scalar_limit = scalar_limit
        self.platform = platform
        self.mask = graph.const("b", True)  # the worlds that need what is made now
        self.last_loop: OpenLoop | None = None
        self.values_in_memory: dict[tuple[int, int], int] = {}  # (buffer, address): a node
        self.spilled: dict = {}

    # The walk -------------------------------------------------------------------------------------

    def evaluate(self, jaxpr, consts, values: list) -> list:
        """The results of a jaxpr of one world. consts: its constants; values: its arguments."""
        environment = {}

        def read(atom):
            if isinstance(atom, core.Literal):
                return self.constant(atom.val)
            return environment[atom]

        for variable, const in zip(jaxpr.constvars, consts, strict=True):
            environment[variable] = self.constant(const)
        for variable, value in zip(jaxpr.invars, values, strict=True):
            environment[variable] = value
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            handler = RULES.get(name)
            if handler is None:
                raise Unsupported(f"the primitive {name}", source_line(equation))
            for variable in equation.outvars:
                check_type(variable.aval, equation)
            try:
                results = handler(self, equation, *map(read, equation.invars))
            except Unsupported as error:
                if "(" in str(error):
                    raise
                raise Unsupported(str(error), source_line(equation)) from None
            for variable, result in zip(equation.outvars, results, strict=True):
                # NumPy makes a number of its own of an array without axes.
                environment[variable] = (
                    np.asarray(result) if isinstance(result, np.generic) else result
                )
        return [read(atom) for atom in jaxpr.outvars]

    def constant(self, const) -> Value | Keys:
        if isinstance(const, (Scalars, Memory, Keys)):
            return const
        if isinstance(const, jax.Array) and jax.dtypes.issubdtype(const.dtype, jax.dtypes.prng_key):
            words = np.asarray(jax.random.key_data(const))
            return Keys([words[..., i] for i in range(words.shape[-1])], jax.random.key_impl(const))
        array = np.asarray(const)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        elif array.dtype == np.int64:
            array = array.astype(np.int32)
        if array.dtype not in KINDS:
            raise Unsupported(f"a constant of type {array.dtype}")
        return array

    # Elements -------------------------------------------------------------------------------------

    def index_node(self, index: int) -> int:
        return self.graph.const("i", index)

    def address(self, value: Memory, index) -> int:
        """The node of an element's place in its buffer. index: an integer or a Turn for each axis."""
        graph = self.graph
        fixed = value.offset
        node = None if value.base < 0 else value.base
        for position, stride in zip(index, value.strides, strict=True):
            if isinstance(position, Turn):
                moved = graph.mul("i", position.node, graph.const("i", stride))
                node = moved if node is None else graph.add("i", node, moved)
            else:
                fixed += position * stride
        if node is None:
            return graph.const("i", fixed)
        return graph.add("i", node, graph.const("i", fixed))

    def read(self, value: Value, index) -> int:
        """The node of one element."""
        if isinstance(value, Memory):
            address = self.address(value, index)
            key = (value.buffer, address)
            node = self.values_in_memory.get(key)
            if node is None or not self.graph.open[self.graph.block[node]]:
                node = self.graph.load(value.buffer, address)
                self.values_in_memory[key] = node
            return node
        # An axis along which a loop runs is one of repetitions here; `ready` has seen to that.
        index = tuple(0 if isinstance(position, Turn) else position for position in index)
        if isinstance(value, Scalars):
            return int(value.ids[index])
        return self.graph.const(KINDS[value.dtype], value[index].item())

    def write(self, value: Memory, index, node: int) -> None:
        address = self.address(value, index)
        self.graph.store(value.buffer, address, node)
        self.values_in_memory[(value.buffer, address)] = node

    def scalars(self, value: Value) -> Scalars:
        """value, taken apart."""
        if isinstance(value, Scalars):
            return value
        if isinstance(value, np.ndarray):
            return Scalars(self.graph.const_array(value), KINDS[value.dtype])
        ids = np.empty(value.shape, np.int64)
        for index in np.ndindex(value.shape):
            ids[index] = self.read(value, index)
        return Scalars(ids, value.kind)

    def memory(self, value: Value) -> Memory:
        """value, in a buffer."""
        if isinstance(value, Memory):
            return value
        elements = value.ids if isinstance(value, Scalars) else value
        repeated = [
            stride == 0 or size == 1
            for stride, size in zip(elements.strides, elements.shape, strict=True)
        ]
        own = elements[tuple(slice(0, 1) if again else slice(None) for again in repeated)]
        kind = kind_of(value)
        own_strides = arrays.contiguous_strides(own.shape)
        strides = tuple(
            0 if again else stride for again, stride in zip(repeated, own_strides, strict=True)
        )
        key = (kind, isinstance(value, Scalars), own.tobytes())
        buffer = self.spilled.get(key)
        if buffer is not None and self.graph.open[buffer[1]]:
            return Memory(buffer[0], kind, elements.shape, strides)
        if isinstance(value, np.ndarray):
            number = self.graph.buffer("const", kind, own.size, data=own.reshape(-1).copy())
            self.spilled[key] = (number, 0)
            return Memory(number, kind, elements.shape, strides)
        number = self.graph.buffer("scratch", kind, own.size)
        self.last_loop = None
        for place, node in enumerate(own.reshape(-1).tolist()):
            address = self.index_node(place)
            self.graph.store(number, address, node)
            self.values_in_memory[(number, address)] = node
        self.spilled[key] = (number, self.graph.current)
        return Memory(number, kind, elements.shape, strides)

    def ready(self, value: Value, looped) -> Value:
        """value, such that its elements can be read by loops over the axes `looped`."""
        if isinstance(value, Memory):
            return value
        elements = value.ids if isinstance(value, Scalars) else value
        if all(elements.strides[axis] == 0 or elements.shape[axis] == 1 for axis in looped):
            return value
        return self.memory(value)

    def new_memory(self, shape, kind: str, first_axis: int = 0) -> Memory:
        """A buffer for a new array, laid out with first_axis outermost: what one turn of a loop
        over it writes stands together."""
        order = (
            [first_axis, *(axis for axis in range(len(shape)) if axis != first_axis)]
            if shape
            else []
        )
        strides = [0] * len(shape)
        stride = 1
        for axis in reversed(order):
            strides[axis] = stride
            stride *= shape[axis]
        buffer = self.graph.buffer("scratch", kind, math.prod(shape))
        return Memory(buffer, kind, tuple(shape), tuple(strides))

    # Loops over elements --------------------------------------------------------------------------

    def looped_axes(self, shape, unrolled: int = UNROLLED) -> list[int]:
        """The axes to loop over, largest first, such that at most `unrolled` elements are left
        to write out. A large array is looped over in any case."""
        rest = dict(enumerate(shape))
        looped = []
        while rest:
            left = math.prod(rest.values())
            if left <= unrolled and (looped or left <= self.scalar_limit):
                break
            axis = max(rest, key=rest.get)
            if rest[axis] == 1:
                break
            looped.append(axis)
            del rest[axis]
        return looped

    def fold(self, shape, looped, carry: list[int], body) -> list[int]:
        """carry = body(index, carry) for each index, by loops over the axes `looped`; the others
        are written out."""
        graph = self.graph

        def nest(level: int, index: list, carry: list[int]) -> list[int]:
            if level == len(looped):
                free = [
                    range(size) if axis not in looped else [index[axis]]
                    for axis, size in enumerate(shape)
                ]
                for place in itertools.product(*free):
                    carry = body(place, carry)
                return carry
            block = graph.open_block(loop=True)
            counter = graph.phi("i", block, uniform=True)
            phis = [graph.phi(graph.kind[node], block) for node in carry]
            index = list(index)
            index[looped[level]] = Turn(counter)
            nexts = nest(level + 1, index, phis)
            graph.close_block()
            loop = Loop(
                block, shape[looped[level]], phis, list(carry), list(nexts), counter=counter
            )
            self.last_loop = None
            return graph.add_loop(loop)

        return nest(0, [None] * len(shape), list(carry))

    def for_each(self, shape, looped, operands: list[Value], outputs: list[Memory], body) -> None:
        """body(index) for each index. It reads `operands` and writes `outputs`, each at its index."""

        def step(index, carry):
            body(index)
            return carry

        if len(looped) != 1:
            self.fold(shape, looped, [], step)
            return
        (axis,) = looped
        graph = self.graph
        loop = self.last_loop
        joins = (
            loop is not None
            and loop.length == shape[axis]
            and self.only_pure_after(loop.node)
            and all(own_row(operand, axis, loop.rows) for operand in operands)
        )
        if joins:
            here = graph.current
            graph.current = loop.block
            graph.open[loop.block] = True
            free = [
                range(size) if other != axis else [Turn(loop.counter)]
                for other, size in enumerate(shape)
            ]
            for index in itertools.product(*free):
                body(index)
            graph.open[loop.block] = False
            graph.current = here
            graph.blocks[here].remove(loop.node)
            graph.blocks[here].append(loop.node)
        else:
            self.fold(shape, looped, [], step)
            node = graph.blocks[graph.current][-1]
            made = graph.extra[node]
            loop = OpenLoop(node, made.block, made.counter, made.length, {})
            self.last_loop = loop
        for output in outputs:
            loop.rows[output.buffer] = output.strides[axis]

    def only_pure_after(self, node: int) -> bool:
        """Whether what was made in this block after the loop `node` could as well stand before it."""
        graph = self.graph
        for other in reversed(graph.blocks[graph.current]):
            if other == node:
                return True
            if graph.op[other] in ("load", "store", "loop", "branch"):
                return False
        return False

    def elementwise(self, function, kind: str, values, shape) -> Value:
        """function(*nodes) -> node of each element. kind: of its results; values: of this shape,
        or scalars."""
        shape = tuple(shape)
        values = [stretched(value, shape) for value in values]
        if math.prod(shape) <= self.scalar_limit:
            columns = [self.scalars(value).ids.reshape(-1).tolist() for value in values]
            known: dict = {}
            ids = []
            for nodes in zip(*columns, strict=True):
                node = known.get(nodes)
                if node is None:
                    node = known[nodes] = function(*nodes)
                ids.append(node)
            return Scalars(np.array(ids, np.int64).reshape(shape), kind)
        return self.looped_elementwise([function], [kind], values, shape)[0]

    def looped_elementwise(self, functions, kinds, values, shape) -> list[Memory]:
        looped = self.looped_axes(shape)
        values = [self.ready(value, looped) for value in values]
        outputs = [self.new_memory(shape, kind, looped[0] if looped else 0) for kind in kinds]

        def body(index):
            nodes = [self.read(value, index) for value in values]
            for function, output in zip(functions, outputs, strict=True):
                self.write(output, index, function(*nodes))

        self.for_each(shape, looped, values, outputs, body)
        return outputs

    def copy_into(
        self,
        target: Memory,
        value: Value,
        mask: int | None = None,
        unrolled: int = UNROLLED,
    ) -> None:
        """Writes value into target; with a mask only for the worlds that it names. unrolled: the
        most elements to write out where a loop is not needed otherwise."""
        looped = self.looped_axes(target.shape, unrolled)
        value = self.ready(value, looped)

        def body(index):
            node = self.read(value, index)
            if mask is None:
                self.write(target, index, node)
            else:
                self.graph.store(target.buffer, self.address(target, index), node, mask)

        self.for_each(target.shape, looped, [value], [target], body)

    def copied(self, value: Value) -> Memory:
        """A copy of value in a new buffer, in row-major order."""
        target = self.new_memory(value.shape, kind_of(value))
        self.copy_into(target, value)
        return target

    def reshape(self, value: Value, shape) -> Value:
        shape = tuple(shape)
        if isinstance(value, Memory):
            view = arrays.reshaped_view(value, shape)
            return view if view is not None else arrays.reshaped_view(self.copied(value), shape)
        return arrays.on_elements(value, lambda elements: elements.reshape(shape))

    def join(self, values: list[Value], axis: int) -> Value:
        """As np.concatenate."""
        if all(isinstance(value, np.ndarray) for value in values):
            return np.concatenate(values, axis)
        shape = list(values[0].shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        kind = kind_of(values[0])
        any_memory = any(isinstance(value, Memory) for value in values)
        if not any_memory or math.prod(shape) <= self.scalar_limit:
            return Scalars(
                np.concatenate([self.scalars(value).ids for value in values], axis), kind
            )
        target = self.new_memory(shape, kind)
        start = 0
        for value in values:
            limit = start + value.shape[axis]
            starts = [start if other == axis else 0 for other in range(len(shape))]
            limits = [limit if other == axis else size for other, size in enumerate(shape)]
            self.copy_into(arrays.slice_(target, starts, limits, [1] * len(shape)), value)
            self.last_loop = None  # the parts of target are no rows of it
            start = limit
        return target

    def row(self, value: Value, index: int) -> Value:
        """value[index]."""
        rest = value.shape[1:]
        starts = [index, *(0 for _ in rest)]
        limits = [index + 1, *rest]
        return self.reshape(arrays.slice_(value, starts, limits, [1] * len(value.shape)), rest)

    def row_at(self, value: Value, node: int) -> Value:
        """value[node], the node of an int32 inside of the range; value is in memory, or repeats one row."""
        if not isinstance(value, Memory):
            return self.row(value, 0)
        graph = self.graph
        base = graph.mul("i", node, graph.const("i", value.strides[0]))
        if value.base >= 0:
            base = graph.add("i", base, value.base)
        return Memory(
            value.buffer, value.kind, value.shape[1:], value.strides[1:], value.offset, base
        )

    # Loops and branches of the program ------------------------------------------------------------

    def scan(self, equation, *values) -> list:
        params = equation.params
        closed = params["jaxpr"]
        length = params["length"]
        num_consts = params["num_consts"]
        num_carry = params["num_carry"]
        consts = list(values[:num_consts])
        carry = list(values[num_consts : num_consts + num_carry])
        sequences = list(values[num_consts + num_carry :])
        outputs = [variable.aval for variable in closed.jaxpr.outvars[num_carry:]]
        if length == 0:
            empty = [np.zeros((0, *aval.shape), aval.dtype) for aval in outputs]
            return [*carry, *empty]
        size = count_equations(closed.jaxpr)
        if length == 1 or size * length <= 48:
            return self.unrolled_scan(params, closed, consts, carry, sequences)

        graph = self.graph
        sequences, sequence_trees = flatten_keys(sequences)
        sequences = [self.ready(value, [0]) for value in sequences]
        fixed = [
            closed.jaxpr.outvars[i] is closed.jaxpr.invars[num_consts + i] for i in range(num_carry)
        ]
        steps = [
            None if fixed[i] else self.induction_step(closed.jaxpr, num_consts + i, i, carry[i])
            for i in range(num_carry)
        ]
        moving = [i for i in range(num_carry) if not fixed[i] and steps[i] is None]
        state, state_trees = flatten_keys([carry[i] for i in moving])
        held = [self.carry_buffer(value) for value in state]
        stacks: list[Memory] = []

        block = graph.open_block(loop=True)
        counter = graph.phi("i", block, uniform=True)
        turn = counter
        if params["reverse"]:
            turn = graph.sub("i", graph.const("i", length - 1), counter)
        phis, inside = self.open_carry(state, held, block)
        restored = unflatten_keys(inside, state_trees)
        arguments = list(carry)
        for i, value in zip(moving, restored, strict=True):
            arguments[i] = value
        for i, step in enumerate(steps):
            if step is not None:
                kind = kind_of(carry[i])
                start = int(self.scalars(carry[i]).ids)
                moved = graph.mul(kind, graph.convert(counter, kind), graph.const(kind, step))
                arguments[i] = Scalars(np.array(graph.add(kind, start, moved)), kind)
        rows = unflatten_keys([self.row_at(value, turn) for value in sequences], sequence_trees)
        results = self.evaluate(closed.jaxpr, closed.consts, [*consts, *arguments, *rows])

        ys, ys_trees = flatten_keys(results[num_carry:])
        for value in ys:
            kind = kind_of(value)
            stack = self.new_memory((length, *value.shape), kind)
            stacks.append(stack)
            self.last_loop = None
            self.copy_into(self.row_at(stack, turn), value)
        moved, _ = flatten_keys([results[i] for i in moving])
        nexts = self.close_carry(moved, held, phis, None)
        self.last_loop = None
        graph.close_block()
        inits = self.carry_nodes(state, held)
        outs = graph.add_loop(Loop(block, length, sum(phis, []), inits, nexts, counter=counter))
        after = unflatten_keys(self.carry_out(state, held, outs), state_trees)
        final = list(carry)
        for i, value in zip(moving, after, strict=True):
            final[i] = value
        for i, step in enumerate(steps):
            if step is not None:
                kind = kind_of(carry[i])
                start = int(self.scalars(carry[i]).ids)
                total = graph.add(kind, start, graph.const(kind, step * length))
                final[i] = Scalars(np.array(total), kind)
        return [*final, *unflatten_keys(stacks, ys_trees)]

    def unrolled_scan(self, params, closed, consts, carry, sequences) -> list:
        length = params["length"]
        num_carry = params["num_carry"]
        turns = range(length)
        rows_of_outputs: list[list] = [[] for _ in closed.jaxpr.outvars[num_carry:]]
        for turn in reversed(turns) if params["reverse"] else turns:
            rows = [
                map_keys(lambda value, turn=turn: self.row(value, turn), value)
                for value in sequences
            ]
            results = self.evaluate(closed.jaxpr, closed.consts, [*consts, *carry, *rows])
            carry = results[:num_carry]
            for rows, value in zip(rows_of_outputs, results[num_carry:], strict=True):
                rows.append(value)
        stacked = []
        for rows in rows_of_outputs:
            if params["reverse"]:
                rows.reverse()
            if isinstance(rows[0], Keys):
                words = [
                    self.stack([row.words[i] for row in rows]) for i in range(len(rows[0].words))
                ]
                stacked.append(Keys(words, rows[0].impl))
            else:
                stacked.append(self.stack(rows))
        return [*carry, *stacked]

    def stack(self, rows: list[Value]) -> Value:
        return self.join([self.reshape(row, (1, *row.shape)) for row in rows], 0)

    def induction_step(self, jaxpr, invar: int, outvar: int, init) -> int | None:
        """By how much a scan's integer grows in each turn, if that is a constant; such an index
        is the same in all worlds."""
        if isinstance(init, Keys) or init.shape != () or kind_of(init) not in "iu":
            return None
        if not self.graph.uniform[int(self.scalars(init).ids)]:
            return None
        variable = jaxpr.outvars[outvar]
        for equation in jaxpr.eqns:
            if equation.primitive.name == "add" and equation.outvars[0] is variable:
                left, right = equation.invars
                if left is jaxpr.invars[invar] and isinstance(right, core.Literal):
                    return int(right.val)
        return None

    def carry_buffer(self, value: Value) -> Memory | None:
        """Where a loop holds a large array between its turns; None for those that are taken apart."""
        if math.prod(value.shape) <= self.scalar_limit:
            return None
        target = self.new_memory(value.shape, kind_of(value))
        self.copy_into(target, value)
        self.last_loop = None
        self.values_in_memory_forget([target])
        return target

    def open_carry(self, state, held, block) -> tuple[list[list[int]], list[Value]]:
        """Phis for what is taken apart, and the values that a turn of the loop begins with."""
        phis = []
        inside = []
        for value, buffer in zip(state, held, strict=True):
            if buffer is not None:
                phis.append([])
                inside.append(buffer)
                continue
            kind = kind_of(value)
            nodes = [self.graph.phi(kind, block) for _ in range(math.prod(value.shape))]
            phis.append(nodes)
            inside.append(Scalars(np.array(nodes, np.int64).reshape(value.shape), kind))
        return phis, inside

    def close_carry(self, results, held, phis, active: int | None) -> list[int]:
        """What the next turn begins with; worlds that are not `active` keep what they have."""
        graph = self.graph
        nexts = []
        copies = [
            None if buffer is None or value is buffer else self.copied(value)
            for value, buffer in zip(results, held, strict=True)
        ]
        for value, buffer, nodes, copy in zip(results, held, phis, copies, strict=True):
            if buffer is not None:
                if copy is not None:
                    self.last_loop = None
                    self.copy_into(buffer, copy, active)
                continue
            kind = kind_of(value)
            new = self.scalars(value).ids.reshape(-1).tolist()
            if active is not None:
                new = [
                    graph.select(kind, active, after, before)
                    for after, before in zip(new, nodes, strict=True)
                ]
            nexts.extend(new)
        return nexts

    def carry_nodes(self, state, held) -> list[int]:
        nodes = []
        for value, buffer in zip(state, held, strict=True):
            if buffer is None:
                nodes.extend(self.scalars(value).ids.reshape(-1).tolist())
        return nodes

    def carry_out(self, state, held, outs) -> list[Value]:
        values = []
        outs = iter(outs)
        for value, buffer in zip(state, held, strict=True):
            if buffer is not None:
                values.append(buffer)
                continue
            nodes = list(itertools.islice(outs, math.prod(value.shape)))
            ids = np.array(nodes, np.int64).reshape(value.shape)
            values.append(Scalars(ids, kind_of(value)))
        return values

    def while_loop(self, equation, *values) -> list:
        params = equation.params
        condition = params["cond_jaxpr"]
        body = params["body_jaxpr"]
        num_condition = params["cond_nconsts"]
        num_body = params["body_nconsts"]
        condition_consts = list(values[:num_condition])
        body_consts = list(values[num_condition : num_condition + num_body])
        carry = list(values[num_condition + num_body :])
        graph = self.graph
        outer_mask = self.mask

        def holds(state) -> int:
            (result,) = self.evaluate(
                condition.jaxpr, condition.consts, [*condition_consts, *state]
            )
            return int(self.scalars(result).ids)

        first_active = graph.logic_and("b", outer_mask, holds(carry))
        if graph.value[first_active] is False:
            return carry
        fixed = [
            body.jaxpr.outvars[i] is body.jaxpr.invars[num_body + i] for i in range(len(carry))
        ]
        moving = [i for i in range(len(carry)) if not fixed[i]]
        state, trees = flatten_keys([carry[i] for i in moving])
        held = [self.carry_buffer(value) for value in state]

        block = graph.open_block(loop=True)
        active = graph.phi("b", block)
        self.mask = active
        phis, inside = self.open_carry(state, held, block)
        arguments = list(carry)
        for i, value in zip(moving, unflatten_keys(inside, trees), strict=True):
            arguments[i] = value
        results = self.evaluate(body.jaxpr, body.consts, [*body_consts, *arguments])
        moved, _ = flatten_keys([results[i] for i in moving])
        nexts = self.close_carry(moved, held, phis, active)
        after = list(carry)
        for i, value in zip(
            moving, unflatten_keys(self.carry_out(state, held, nexts), trees), strict=True
        ):
            after[i] = value
        self.values_in_memory_forget(held)
        next_active = graph.logic_and("b", active, holds(after))
        self.mask = outer_mask
        self.last_loop = None
        graph.close_block()
        loop = Loop(
            block,
            None,
            sum(phis, []),
            self.carry_nodes(state, held),
            nexts,
            first_active=first_active,
            active=active,
            next_active=next_active,
        )
        outs = graph.add_loop(loop)
        self.values_in_memory_forget(held)
        final = list(carry)
        for i, value in zip(
            moving, unflatten_keys(self.carry_out(state, held, outs), trees), strict=True
        ):
            final[i] = value
        return final

    def values_in_memory_forget(self, held) -> None:
        """After something was written into these buffers under a mask."""
        buffers = {memory.buffer for memory in held if memory is not None}
        if buffers:
            self.values_in_memory = {
                key: node for key, node in self.values_in_memory.items() if key[0] not in buffers
            }

    def branch(self, branches, index: Value, operands: list) -> list:
        """The results of branches[index]."""
        graph = self.graph
        if len(branches) == 1:
            return self.evaluate(branches[0].jaxpr, branches[0].consts, operands)
        node = int(self.scalars(index).ids)
        if graph.kind[node] == "b":
            condition = node
            first, rest = [branches[1]], [branches[0]]
        else:
            condition = graph.compare("le", "i", node, graph.const("i", 0))
            first, rest = [branches[0]], branches[1:]
            lowered = graph.sub("i", node, graph.const("i", 1))
            index = Scalars(np.array(lowered), "i")
        if graph.value[condition] is not None:
            if graph.value[condition]:
                return self.branch(first, index, operands)
            return self.branch(rest, index, operands)

        outer_mask = self.mask
        wanted = (
            graph.logic_and("b", outer_mask, condition),
            graph.logic_and("b", outer_mask, graph.logic_not("b", condition)),
        )
        blocks = []
        results = []
        targets: list[Memory | None] = []
        trees = None
        for which, choices in enumerate((first, rest)):
            blocks.append(graph.open_block(loop=False))
            self.mask = wanted[which]
            self.last_loop = None
            values, trees = flatten_keys(self.branch(choices, index, operands))
            if which == 0:
                targets = [
                    self.new_memory(value.shape, kind_of(value))
                    if math.prod(value.shape) > self.scalar_limit
                    else None
                    for value in values
                ]
            nodes = []
            for value, target in zip(values, targets, strict=True):
                if target is None:
                    nodes.append(self.scalars(value))
                else:
                    self.last_loop = None
                    self.copy_into(target, value, wanted[which])
                    nodes.append(None)
            results.append(nodes)
            self.last_loop = None
            graph.close_block()
        self.mask = outer_mask

        pairs: dict[tuple[int, int], int] = {}
        kinds = []
        for yes, no in zip(*results, strict=True):
            if yes is None:
                continue
            for pair in zip(yes.ids.reshape(-1).tolist(), no.ids.reshape(-1).tolist(), strict=True):
                if pair[0] != pair[1] and pair not in pairs:
                    pairs[pair] = len(kinds)
                    kinds.append(yes.kind)
        columns = ([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        outs = graph.add_branch(condition, tuple(blocks), wanted, columns, kinds)
        self.values_in_memory_forget(targets)
        values = []
        for yes, no, target in zip(*results, targets, strict=True):
            if target is not None:
                values.append(target)
                continue
            ids = [
                a if a == b else outs[pairs[a, b]]
                for a, b in zip(
                    yes.ids.reshape(-1).tolist(), no.ids.reshape(-1).tolist(), strict=True
                )
            ]
            values.append(Scalars(np.array(ids, np.int64).reshape(yes.shape), yes.kind))
        return unflatten_keys(values, trees)


def stretched(value: Value, shape) -> Value:
    """A scalar, or an array some of whose axes have length 1, repeated to the full shape."""
    if value.shape == shape:
        return value
    return arrays.broadcast_in_dim(value, shape, range(len(value.shape)))


def own_row(operand: Value, axis: int, rows: dict[int, int]) -> bool:
    """Whether a turn of a loop over `axis` reads of operand only what the same turn of a loop
    before has written."""
    if not isinstance(operand, Memory) or operand.buffer not in rows:
        return True
    width = rows[operand.buffer]
    if operand.base >= 0 or operand.strides[axis] != width:
        return False
    others = [
        (size - 1) * stride
        for other, (size, stride) in enumerate(zip(operand.shape, operand.strides, strict=True))
        if other != axis
    ]
    first = operand.offset + sum(extent for extent in others if extent < 0)
    last = operand.offset + sum(extent for extent in others if extent > 0)
    return 0 <= first and last < width


def count_equations(jaxpr) -> int:
    """How many equations a jaxpr has, those of inner jaxprs included."""
    count = 0
    for equation in jaxpr.eqns:
        count += 1
        for param in equation.params.values():
            for item in param if isinstance(param, (tuple, list)) else (param,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    count += count_equations(inner)
    return count


def flatten_keys(values) -> tuple[list[Value], list]:
    """Key arrays taken apart into their words; and what puts them together again."""
    flat = []
    trees = []
    for value in values:
        if isinstance(value, Keys):
            flat.extend(value.words)
            trees.append((len(value.words), value.impl))
        else:
            flat.append(value)
            trees.append(None)
    return flat, trees


def unflatten_keys(flat, trees) -> list:
    items = iter(flat)
    values = []
    for tree in trees:
        if tree is None:
            values.append(next(items))
        else:
            count, impl = tree
            values.append(Keys([next(items) for _ in range(count)], impl))
    return values


def map_keys(function, value):
    """function(value), or of each word of a key array."""
    if isinstance(value, Keys):
        return Keys([function(word) for word in value.words], value.impl)
    return function(value)


def check_type(aval, equation) -> None:
    dtype = getattr(aval, "dtype", None)
    if dtype is None:
        raise Unsupported(f"a value of type {aval}", source_line(equation))
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) or dtype in KINDS:
        return
    if dtype == jax.dtypes.float0:
        return
    raise Unsupported(f"the type {dtype}", source_line(equation))


def source_line(equation) -> str:
    """file:line (function) of the user's code that made an equation."""
    try:
        from jax._src import source_info_util

        return source_info_util.summarize(equation.source_info)
    except Exception:  # noqa: BLE001, the line is a help for the reader and no more
        return "unknown line"
