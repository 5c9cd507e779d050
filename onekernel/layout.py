"""Where the buffers of a kernel stand in its scratch memory.

Two buffers that are never needed at the same time share a place, as registers do. What is needed
when follows from the order of the program: a buffer's life begins with the statement that first
touches it and ends with the last one. A loop comes back to its beginning, so a buffer that is
touched inside of a loop, and outside of it as well, lives through all of the loop."""

from onekernel.graph import Graph


def scratch_layout(graph: Graph, live: bytearray) -> tuple[dict[int, int], int]:
    """The first element of each scratch buffer that is used, and how many elements they take
    together; each in elements of one world."""
    lives = lifetimes(graph, live)
    offsets: dict[int, int] = {}
    placed: list[tuple[int, int, int]] = []  # of those that still live: last moment, offset, size
    total = 0
    for number, (first, last) in sorted(lives.items(), key=lambda item: item[1]):
        size = graph.buffers[number].size
        placed = [other for other in placed if other[0] >= first]
        offset = first_gap(placed, size)
        offsets[number] = offset
        placed.append((last, offset, size))
        total = max(total, offset + size)
    return offsets, total


def first_gap(placed: list[tuple[int, int, int]], size: int) -> int:
    """The lowest offset at which `size` elements fit between those that are placed."""
    offset = 0
    for _, start, length in sorted(placed, key=lambda other: other[1]):
        if start - offset >= size:
            break
        offset = max(offset, start + length)
    return offset


def lifetimes(graph: Graph, live: bytearray) -> dict[int, tuple[int, int]]:
    """The moments at which each scratch buffer that is used is first and last touched; moments
    count the statements of the program in their order."""
    moment = 0
    # Each touch of a buffer, as the statements that it is in: those of the outermost block
    # first, each
    # as (block, first moment, last moment).
    touches: dict[int, list[list[list[int]]]] = {}

    def visit(block: int, path: list[list[int]]) -> None:
        nonlocal moment
        for node in graph.blocks[block]:
            if not live[node]:
                continue
            moment += 1
            statement = [block, moment, moment]
            here = [*path, statement]
            op = graph.op[node]
            if op in ("load", "store"):
                buffer = graph.extra[node]
                if graph.buffers[buffer].source == "scratch":
                    touches.setdefault(buffer, []).append(here)
            elif op == "loop":
                visit(graph.extra[node].block, here)
            elif op == "branch":
                for inner in graph.extra[node].blocks:
                    visit(inner, here)
            statement[2] = moment

    visit(0, [])
    lives = {}
    for buffer, paths in touches.items():
        # The innermost block that all touches have in common; there, each is a part of
        # one statement.
        depth = 0
        while all(len(path) > depth + 1 for path in paths) and all(
            path[depth] is paths[0][depth] and path[depth + 1][0] == paths[0][depth + 1][0]
            for path in paths
        ):
            depth += 1
        statements = [path[depth] for path in paths]
        lives[buffer] = (
            min(first for _, first, _ in statements),
            max(last for _, _, last in statements),
        )
    return lives
