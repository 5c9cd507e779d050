"""How a CPU kernel's operands come into vectors, and its results out of them.

JAX keeps an array of all worlds world by world: [world][element]. A kernel wants each element as a
vector, one lane a world. Fetching one from as many places as there are lanes takes some fifty
instructions, and a step of MJX may have thousands of elements. So they are written once, in
functions that all arrays share: `@rows_in` turns elements of some worlds into rows of scratch
memory, [element][lane], before the kernel's body, and `@rows_out` turns rows into elements after
it. The body reads and writes rows, an instruction each.

Both handle blocks of as many elements as there are lanes: a vector for each world, then a
transposition by shuffles. `plan` says which elements have rows, and where. Elements that the body
only hands on from an operand to a result never leave their rows."""

import dataclasses

from onekernel.graph import Graph

# Elements of one array that have rows at most; of a larger one, the body looks for what it needs.
MOST_ROWS = 4096


@dataclasses.dataclass
class Run:
    """Neighbouring elements of an array, in neighbouring rows. array: the pointer's name; kind: of
    its elements; size: elements of one world; first, count: the elements; row: that of the first."""

    array: str
    kind: str
    size: int
    first: int
    count: int
    row: int


@dataclasses.dataclass
class Staging:
    """operands, results: what `@rows_in` and `@rows_out` have to do, in this order; inputs: the
    rows of nodes of the graph, "input"; buffers: the first rows of buffers that have them; handed:
    stores that are not needed, since the result comes from an operand's rows; rows: the number of
    the first row that is free."""

    operands: list[Run]
    results: list[Run]
    inputs: dict[int, int]
    buffers: dict[int, int]
    handed: set[int]
    rows: int


def plan(
    graph: Graph, live: bytearray, mapped: list[bool], sizes: list[int], width: int, row: int
) -> Staging:
    """mapped, sizes: see codegen.Emitter; width: lanes; row: the first that is free.

    A call of `@rows_in` writes whole blocks of rows. Those past its last element are of the next
    call, or of nobody."""
    staging = Staging([], [], {}, {}, set(), row)
    elements: dict[int, list[tuple[int, int]]] = {}  # of each operand: those needed, their nodes
    loads: dict[int, list[int]] = {}  # from buffers
    stores: dict[int, list[int]] = {}
    for node, op in enumerate(graph.op):
        if not live[node]:
            continue
        if op == "input":
            operand, element = graph.extra[node]
            if mapped[operand]:
                elements.setdefault(operand, []).append((element, node))
        elif op == "load" or op.startswith("load "):
            loads.setdefault(graph.extra[node], []).append(node)
        elif op == "store":
            stores.setdefault(graph.extra[node], []).append(node)
    for operand, needed in sorted(elements.items()):
        add_runs(staging, f"%operand{operand}", graph, sizes[operand], sorted(needed), width)
    for number, nodes in loads.items():
        buffer = graph.buffers[number]
        if buffer.source != "input" or not mapped[buffer.operand] or buffer.size > MOST_ROWS:
            continue
        if all(same_in_all_worlds(graph, graph.args[node][0]) for node in nodes):
            run = Run(
                f"%operand{buffer.operand}", buffer.kind, buffer.size, 0, buffer.size, staging.rows
            )
            staging.operands.append(run)
            staging.buffers[number] = run.row
            staging.rows += run.count
    for number, nodes in stores.items():
        buffer = graph.buffers[number]
        if buffer.source == "output" and buffer.size <= MOST_ROWS:
            add_results(staging, number, graph, nodes, width)
    if staging.operands or staging.results:
        staging.rows += width - 1
    return staging


def same_in_all_worlds(graph: Graph, node: int) -> bool:
    return graph.op[node] == "const" or graph.uniform[node]


def add_runs(staging: Staging, array: str, graph: Graph, size: int, needed, width: int) -> None:
    """Rows for elements of an operand. Gaps that are smaller than a block come along.

    needed: pairs of an element and its node, in order."""
    run = None
    for element, node in needed:
        if run is None or element - (run.first + run.count) >= width:
            run = Run(array, graph.kind[node], size, element, 0, staging.rows)
            staging.operands.append(run)
        staging.rows += element + 1 - (run.first + run.count)
        run.count = element + 1 - run.first
        staging.inputs[node] = run.row + element - run.first


def add_results(staging: Staging, number: int, graph: Graph, stores: list[int], width: int) -> None:
    """Rows for a result: its own, or, for many elements in a row, or all, that are an operand's,
    those of the operand."""
    buffer = graph.buffers[number]
    array = f"%result{buffer.operand}"
    own = staging.rows
    rows = list(range(own, own + buffer.size))
    store_of = {}
    for store in stores:
        index, value, *masks = graph.args[store]
        if graph.op[index] == "const" and value in staging.inputs and not masks:
            rows[graph.value[index]] = staging.inputs[value]
            store_of[graph.value[index]] = store
    runs = []
    for element, row in enumerate(rows):
        last = runs[-1] if runs else None
        if last is None or row != last.row + last.count:
            runs.append(Run(array, buffer.kind, buffer.size, element, 1, row))
        else:
            last.count += 1
    results: list[Run] = []
    for run in runs:
        of_operand = run.row < own
        if of_operand and run.count < min(width, buffer.size):
            run = dataclasses.replace(run, row=own + run.first)
            of_operand = False
        if of_operand:
            staging.handed.update(store_of[run.first + i] for i in range(run.count))
        last = results[-1] if results else None
        if last is not None and run.row == last.row + last.count:
            last.count += run.count
        else:
            results.append(run)
    staging.results.extend(results)
    if any(run.row >= own for run in results):
        staging.buffers[number] = own
        staging.rows += buffer.size


def function_name(inward: bool, scalar: str) -> str:
    return f"rows_{'in' if inward else 'out'}.{scalar}"


def call(run: Run, scalar: str, inward: bool, width: int, number: int) -> list[str]:
    """The call for a run. number: one for each call of a kernel, for names."""
    array, rows = f"%array{number}", f"%rows{number}"
    vector = f"<{width} x i64>"
    return [
        f"{array} = getelementptr {scalar}, ptr {run.array}, i64 {run.first}",
        f"{rows} = getelementptr i32, ptr %scratch, i64 {run.row * width}",
        f"call void @{function_name(inward, scalar)}(ptr {array}, i64 {run.size}, "
        f"i64 {run.count}, ptr {rows}, {vector} %lanes)",
    ]


def function(scalar: str, inward: bool, width: int) -> tuple[str, set[str]]:
    """`@rows_in` or `@rows_out` for elements of type i32, for float32 too, or i8: the text, and
    the declarations that it needs.

    array: the first of the elements, of world 0; size: elements from a world to the next; count:
    how many to move; rows: where they stand in scratch memory; lanes: each lane's world. Lanes
    with the same world write the same. A bool is a byte in an array and an i32 in a row."""
    row = f"<{width} x i32>"
    vector = f"<{width} x {scalar}>"
    mask = f"<{width} x i1>"
    worlds = f"<{width} x i64>"
    align = 1 if scalar == "i8" else 4
    suffix = f"v{width}{scalar}.p0"
    zero = f"{row} zeroinitializer"
    numbers = ", ".join(f"i32 {k}" for k in range(width))
    name = function_name(inward, scalar)
    lines = [
        f"define internal void @{name}(ptr %array, i64 %size, i64 %count, ptr %rows, "
        f"{worlds} %lanes) noinline {{",
        "entry:",
        f"%size.one = insertelement {worlds} zeroinitializer, i64 %size, i32 0",
        f"%size.all = shufflevector {worlds} %size.one, {worlds} zeroinitializer, "
        f"<{width} x i32> zeroinitializer",
        f"%starts = mul {worlds} %lanes, %size.all",
    ]
    for lane in range(width):
        lines += [
            f"%start{lane} = extractelement {worlds} %starts, i32 {lane}",
            f"%world{lane} = getelementptr {scalar}, ptr %array, i64 %start{lane}",
        ]
    lines += [
        "br label %block",
        "block:",
        "%first = phi i64 [0, %entry], [%next, %block]",
        "%left.long = sub i64 %count, %first",
        "%left = trunc i64 %left.long to i32",
        f"%left.one = insertelement {row} zeroinitializer, i32 %left, i32 0",
        f"%left.all = shufflevector {row} %left.one, {zero}, {row} zeroinitializer",
        f"%inside = icmp slt {row} <{numbers}>, %left.all",
        f"%row = mul i64 %first, {width}",
    ]
    for lane in range(width):
        lines += [
            f"%place{lane} = getelementptr {scalar}, ptr %world{lane}, i64 %first",
            f"%row{lane}.number = add i64 %row, {lane * width}",
            f"%row{lane} = getelementptr i32, ptr %rows, i64 %row{lane}.number",
        ]
    values = [f"%value{k}" for k in range(width)]
    if inward:
        load = f"llvm.masked.load.{suffix}"
        declaration = f"declare {vector} @{load}(ptr, {mask}, {vector})"
        for lane, value in enumerate(values):
            loaded = f"{value}.byte" if scalar == "i8" else value
            lines.append(
                f"{loaded} = call {vector} @{load}(ptr align {align} %place{lane}, {mask} %inside, "
                f"{vector} zeroinitializer)"
            )
            if scalar == "i8":
                lines.append(f"{value} = zext {vector} {loaded} to {row}")
        for lane, value in enumerate(transposed(lines, values, width)):
            lines.append(f"store {row} {value}, ptr %row{lane}, align {4 * width}")
    else:
        store = f"llvm.masked.store.{suffix}"
        declaration = f"declare void @{store}({vector}, ptr, {mask})"
        for lane, value in enumerate(values):
            lines.append(f"{value} = load {row}, ptr %row{lane}, align {4 * width}")
        for lane, value in enumerate(transposed(lines, values, width)):
            stored = value
            if scalar == "i8":
                stored = f"%byte{lane}"
                lines.append(f"{stored} = trunc {row} {value} to {vector}")
            lines.append(
                f"call void @{store}({vector} {stored}, ptr align {align} %place{lane}, "
                f"{mask} %inside)"
            )
    lines += [
        f"%next = add i64 %first, {width}",
        "%more = icmp slt i64 %next, %count",
        "br i1 %more, label %block, label %end",
        "end:",
        "ret void",
        "}",
    ]
    return "\n".join(lines), {declaration}


def transposed(lines: list[str], values: list[str], width: int) -> list[str]:
    """The vectors of the transposed square; adds the instructions to lines.

    A round takes the vectors i and i + width / 2, shuffled like two halves of a pack of cards, as
    the next 2 i and 2 i + 1. The number of an element in the square, in binary, is its row's
    digits and then its column's; a round moves the first digit to the end. After as many rounds as
    a column has digits, columns come first."""
    kind = f"<{width} x i32>"
    half = width // 2
    masks = [
        ", ".join(f"i32 {k // 2 + k % 2 * width}" for k in range(start, start + width))
        for start in (0, width)
    ]
    for level in range(width.bit_length() - 1):
        following = []
        for i in range(half):
            for which, mask in enumerate(masks):
                name = f"%shuffled{level}.{2 * i + which}"
                lines.append(
                    f"{name} = shufflevector {kind} {values[i]}, {kind} {values[i + half]}, "
                    f"<{width} x i32> <{mask}>"
                )
                following.append(name)
        values = following
    return values
