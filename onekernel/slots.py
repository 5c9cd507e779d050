"""Values that outlive their block live in memory.

A kernel for a CPU has some hundred blocks and thousands of vectors that one block computes and
another one needs, many more than there are registers. LLVM's register allocator would find out,
at length, that next to all of them belong in memory. Here they are put there beforehand: each is
stored where it is defined, and loaded once in each block that needs it. What is left to LLVM are
blocks that it can look at one at a time, in about half the time, and the kernel is faster, too.

The results of a branch matter most. Where nothing needs the value that a result replaces, both
share their memory: so a branch that is skipped leaves its hundreds of results as they are,
without a single instruction.

This works on the lines of a kernel's body, as `codegen.Emitter` writes them: blocks stand in the
order in which they run, a loop from its head to the jump back, and only a loop's head is jumped
back to."""

import dataclasses
import heapq
import re

NAME = re.compile(r"%[\w.]+")
DEFINITION = re.compile(r"(%[\w.]+) = (.*)")
EDGE = re.compile(r"\[([^\s,]+), %([\w.]+)\]")  # of a phi: a name and the block that it comes from
JUMP = re.compile(r"label %([\w.]+)")


@dataclasses.dataclass
class Value:
    """A vector. line: where it is defined; block: in which block; outlives: whether another block
    needs it; needed: the last line that needs it (a phi needs a value at the end of the block
    before); last: the line after which its memory is free."""

    line: int
    block: str
    outlives: bool = False
    needed: int = -1
    last: int = -1


class Body:
    """The lines of a kernel's body, and what is where."""

    def __init__(self, lines: list[str], label: str, vector: str):
        self.lines = lines
        self.block: list[str] = []  # of each line
        self.starts = {label: -1}
        self.ends = {}  # the line of a block's jump
        self.values: dict[str, Value] = {}
        self.loops: list[tuple[int, int]] = []  # lines of the head and of the jump back
        of_vectors = re.compile(
            rf"(f\w+|phi|load|call|shufflevector|select <\d+ x i1> \S+,) {re.escape(vector)} "
        )
        comparison = re.compile("fcmp|fpto")
        for line, text in enumerate(lines):
            if text.endswith(":"):
                label = text[:-1]
                self.starts[label] = line
            self.block.append(label)
            self.ends[label] = line
            found = DEFINITION.match(text)
            if found and of_vectors.match(found[2]) and not comparison.match(found[2]):
                self.values[found[1]] = Value(line, label)
            elif text.startswith("br "):
                for target in JUMP.findall(text):
                    if target in self.starts:
                        self.loops.append((self.starts[target], line))
        self.names: list[list[str]] = []  # of each line: its vectors, the one that it defines, too
        for line, text in enumerate(lines):
            names = [name for name in NAME.findall(text) if name in self.values]
            self.names.append(names)
            if names and " = phi " in text:
                for name, before in EDGE.findall(text):
                    if name in self.values:
                        self.use(self.values[name], self.ends[before], before)
            else:
                for name in names:
                    self.use(self.values[name], line, self.block[line])

    def use(self, value: Value, line: int, block: str) -> None:
        value.outlives |= block != value.block
        value.needed = max(value.needed, line)

    def last_line(self, value: Value) -> int:
        """The last line that needs it. A loop needs what was there before to the end of its last
        turn."""
        last = value.needed
        for head, back in self.loops:  # inner ones come first: they end first
            if value.line < head <= last < back:
                last = back
        return last


def in_memory(lines: list[str], label: str, width: int) -> tuple[list[str], list[str]]:
    """The lines of a body with values in memory, and lines that belong before them, into the
    function's first block. label: of the block that the body begins in."""
    vector = f"<{width} x float>"
    body = Body(lines, label, vector)
    staged = {}
    for name, value in body.values.items():
        if value.outlives:
            value.last = body.last_line(value)
            staged[name] = value
    replaced = replacements(body, staged)
    slots, count = share_slots(staged, replaced)
    first = [f"%slots = alloca [{count} x {vector}], align {4 * width}"]
    for slot in range(count):
        first.append(f"%slot{slot} = getelementptr {vector}, ptr %slots, i64 {slot}")

    loads: dict[int, list[str]] = {}  # before a line
    stores: dict[int, list[str]] = {}  # before it, after the loads
    loaded: dict[tuple[str, str], str] = {}

    def store(name: str, slot: int, line: int) -> None:
        text = f"store {vector} {name}, ptr %slot{slot}, align {4 * width}"
        stores.setdefault(line, []).append(text)

    def known(name: str, block: str, line: int) -> str:
        """The name of a value in a block, from this line on."""
        if name not in staged or (staged[name].block == block and name not in replaced):
            return name
        if (name, block) not in loaded:
            loaded[name, block] = f"%loaded{len(loaded)}"
            text = f"{loaded[name, block]} = load {vector}, ptr %slot{slots[name]}"
            loads.setdefault(line, []).append(f"{text}, align {4 * width}")
        return loaded[name, block]

    for name, value in staged.items():
        if name not in replaced:
            after = value.line + 1
            while " = phi " in lines[value.line] and " = phi " in lines[after]:
                after += 1
            store(name, slots[name], after)
    changed: list[str | None] = []
    for line, text in enumerate(lines):
        names = body.names[line]
        if not any(name in staged for name in names):
            changed.append(text)
        elif " = phi " not in text:
            block = body.block[line]
            new = {name: known(name, block, line) for name in names}
            if any(name != own for name, own in new.items()):
                text = NAME.sub(lambda found: new.get(found[0], found[0]), text)  # noqa: B023
            changed.append(text)
        elif names[0] in replaced and text.startswith(f"{names[0]} ="):
            (chosen, before), _ = EDGE.findall(text)
            end = body.ends[before]
            store(known(chosen, before, end), slots[names[0]], end)
            changed.append(None)
        else:
            for name, before in EDGE.findall(text):
                new = known(name, before, body.ends[before])
                text = text.replace(f"[{name}, %{before}]", f"[{new}, %{before}]")
            changed.append(text)
    result = []
    for line, text in enumerate(changed):
        result += loads.get(line, [])
        result += stores.get(line, [])
        if text is not None:
            result.append(text)
    return first, result


def replacements(body: Body, staged: dict[str, Value]) -> dict[str, str]:
    """Results of branches, and what each is if no world wants the branch, where its memory can go
    on as the result's: nothing needs the old value once there is the new one."""
    replaced = {}
    taken = set()
    for name, value in staged.items():
        text = body.lines[value.line]
        if not value.block.startswith("joined") or " = phi " not in text:
            continue
        edges = EDGE.findall(text)
        if len(edges) < 2:  # the other edge has a constant
            continue
        old = edges[1][0]
        if old not in staged or old in taken:
            continue
        start = body.starts[value.block]
        if staged[old].needed > start:
            continue
        if any(staged[old].line < head <= start <= back for head, back in body.loops):
            continue  # the next turn of a loop needs it again
        replaced[name] = old
        taken.add(old)
    return replaced


def share_slots(staged: dict[str, Value], replaced: dict[str, str]) -> tuple[dict[str, int], int]:
    """A slot of memory for each value, and their number; one serves several values, one after the
    other."""
    origin = {}  # the value whose memory it goes on with
    last = {}
    for name, value in staged.items():  # what is replaced comes before what replaces it
        old = origin[replaced[name]] if name in replaced else name
        origin[name] = old
        last[old] = max(last.get(old, -1), value.last)
    of_origin = {}
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    count = 0
    for name, end in last.items():
        while busy and busy[0][0] < staged[name].line:
            free.append(heapq.heappop(busy)[1])
        if free:
            slot = free.pop()
        else:
            slot = count
            count += 1
        of_origin[name] = slot
        heapq.heappush(busy, (end, slot))
    return {name: of_origin[old] for name, old in origin.items()}, count
