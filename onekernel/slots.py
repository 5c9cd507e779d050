"""Values that outlive their block live in memory.

A kernel for a CPU has some hundred blocks and thousands of vectors that one block computes and
another one needs, many more than there are registers. LLVM's register allocator would find out,
at length, that next to all of them belong in memory. Here they are put there beforehand: each is
stored where it is defined, and loaded once in each block that needs it. What is left to LLVM are
blocks that it can look at one at a time, in about half the time, and the kernel is faster, too.

The results of a branch matter most. Where nothing needs the value that a result replaces, both
share their memory: so a branch that is skipped leaves its hundreds of results as they are,
without a single instruction.

A kernel that is divided into functions (parts.py) has all other values in memory, too, that one
function computes and another one needs: truth values, integers, pointers.

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
TYPE = re.compile(r"<\d+ x \w+>|float|double|ptr|i\d+")
CASTS = ("bitcast", "sext", "zext", "trunc", "uitofp", "sitofp", "fptoui", "fptosi")


def type_of(instruction: str) -> str:
    """The type of its result."""
    operation = instruction.partition(" ")[0]
    if operation in CASTS:
        return instruction.rpartition(" to ")[2]
    if operation == "select":  # after the condition
        instruction = instruction.partition(", ")[2]
    types = TYPE.findall(instruction)
    if operation in ("icmp", "fcmp"):
        return like(types[0], "i1")
    if operation == "getelementptr":  # of the element, of the pointer, of the number
        return like(types[-1], "ptr")
    if operation == "extractelement":
        return types[0].removesuffix(">").rpartition(" ")[2]
    return types[0]


def like(shape: str, element: str) -> str:
    """A vector as long as another type is, or a scalar."""
    return f"{shape.rpartition(' x ')[0]} x {element}>" if shape.startswith("<") else element


@dataclasses.dataclass(slots=True)
class Value:
    """What an instruction computes. type: LLVM's; line: where it is defined; home: the block, or,
    of what is no vector of float32, the function; outlives: whether it is needed elsewhere, so that
    it has to be in memory; needed: the last line that needs it (a phi needs a value at the end of
    the block before); last: the line after which its memory is free."""

    type: str
    line: int
    home: str
    outlives: bool = False
    needed: int = -1
    last: int = -1


class Body:
    """The lines of a kernel's body, and what is where. parts: labels, of a part's begin and of what
    comes after it."""

    def __init__(self, lines: list[str], label: str, vector: str, parts: dict[str, str]):
        self.lines = lines
        self.vector = vector
        self.block: list[str] = []  # of each line
        self.function: list[str] = []  # of each line: the part that it belongs to
        self.starts = {label: -1}
        self.ends = {}  # the line of a block's jump
        self.values: dict[str, Value] = {}
        self.loops: list[tuple[int, int]] = []  # lines of the head and of the jump back
        of_vectors = re.compile(
            rf"(f\w+|phi|load|call|shufflevector|select <\d+ x i1> \S+,) {re.escape(vector)} "
        )
        comparison = re.compile("fcmp|fpto")
        functions = [""]  # parts within parts
        for line, text in enumerate(lines):
            if text.endswith(":"):
                label = text[:-1]
                self.starts[label] = line
                if label in parts:
                    functions.append(label)
            self.block.append(label)
            self.function.append(functions[-1])
            self.ends[label] = line
            found = DEFINITION.match(text)
            if found and of_vectors.match(found[2]) and not comparison.match(found[2]):
                self.values[found[1]] = Value(vector, line, label)
            elif found and parts:
                kind = type_of(found[2])
                home = label if kind == vector else functions[-1]
                self.values[found[1]] = Value(kind, line, home)
            elif text.startswith("br "):
                targets = JUMP.findall(text)
                for target in targets:
                    if target in self.starts:
                        self.loops.append((self.starts[target], line))
                if parts.get(functions[-1]) in targets:
                    functions.pop()
        self.names: list[list[str]] = []  # of each line: its values, the one that it defines, too
        values = self.values
        for line, text in enumerate(lines):
            names = [name for name in NAME.findall(text) if name in values]
            self.names.append(names)
            if names and " = phi " in text:
                for name, before in EDGE.findall(text):
                    if name in values:
                        self.use(values[name], self.ends[before])
                continue
            block = self.block[line]
            function = self.function[line]
            for name in names:  # as `use` does: a large kernel has hundreds of thousands of these
                value = values[name]
                if value.home != (block if value.type == vector else function):
                    value.outlives = True
                if value.needed < line:
                    value.needed = line

    def home(self, value: Value, line: int) -> str:
        """What `Value.home` would be if the value were defined on this line."""
        return self.block[line] if value.type == self.vector else self.function[line]

    def use(self, value: Value, line: int) -> None:
        value.outlives |= self.home(value, line) != value.home
        value.needed = max(value.needed, line)

    def last_line(self, value: Value) -> int:
        """The last line that needs it. A loop needs what was there before to the end of its last
        turn."""
        last = value.needed
        for head, back in self.loops:  # inner ones come first: they end first
            if value.line < head <= last < back:
                last = back
        return last


def in_memory(
    lines: list[str], label: str, width: int, parts: dict[str, str]
) -> tuple[list[str], dict[str, str], list[str]]:
    """The body of a kernel with values in memory: instructions that allocate it, which belong
    before the body; those that compute the places in it, by name; and the body's lines.

    label: of the block that the body begins in; parts: labels, of a part's begin and of what comes
    after it."""
    body = Body(lines, label, f"<{width} x float>", parts)
    staged = {}
    for name, value in body.values.items():
        if value.outlives:
            value.last = body.last_line(value)
            staged[name] = value
    replaced = replacements(body, staged)
    slots: dict[str, str] = {}
    memory = []
    places = {}
    for number, kind in enumerate(dict.fromkeys(value.type for value in staged.values())):
        of_kind = {name: value for name, value in staged.items() if value.type == kind}
        shared, count = share_slots(of_kind, replaced)
        memory.append(f"%slots{number} = alloca [{count} x {kind}]")
        for slot in range(count):
            name = f"%slot{number}.{slot}"
            places[name] = f"{name} = getelementptr {kind}, ptr %slots{number}, i64 {slot}"
        slots |= {name: f"%slot{number}.{slot}" for name, slot in shared.items()}

    loads: dict[int, list[str]] = {}  # before a line
    stores: dict[int, list[str]] = {}  # before it, after the loads
    loaded: dict[tuple[str, str], str] = {}

    def store(name: str, place: str, kind: str, line: int) -> None:
        stores.setdefault(line, []).append(f"store {kind} {name}, ptr {place}")

    def known(name: str, line: int) -> str:
        """The name of a value on a line."""
        if name not in staged:
            return name
        value = staged[name]
        if body.home(value, line) == value.home and name not in replaced:
            return name
        block = body.block[line]
        if (name, block) not in loaded:
            loaded[name, block] = f"%loaded{len(loaded)}"
            text = f"{loaded[name, block]} = load {value.type}, ptr {slots[name]}"
            loads.setdefault(line, []).append(text)
        return loaded[name, block]

    for name, value in staged.items():
        if name not in replaced:
            after = value.line + 1
            while " = phi " in lines[value.line] and " = phi " in lines[after]:
                after += 1
            store(name, slots[name], value.type, after)
    changed: list[str | None] = []
    for line, text in enumerate(lines):
        names = [name for name in body.names[line] if name in staged]
        if not names:
            changed.append(text)
        elif " = phi " not in text:
            new = {name: known(name, line) for name in names}
            if any(name != own for name, own in new.items()):
                text = NAME.sub(lambda found: new.get(found[0], found[0]), text)  # noqa: B023
            changed.append(text)
        elif names[0] in replaced and text.startswith(f"{names[0]} ="):
            (chosen, before), _ = EDGE.findall(text)
            end = body.ends[before]
            store(known(chosen, end), slots[names[0]], staged[names[0]].type, end)
            changed.append(None)
        else:
            for name, before in EDGE.findall(text):
                new = known(name, body.ends[before])
                text = text.replace(f"[{name}, %{before}]", f"[{new}, %{before}]")
            changed.append(text)
    result = []
    for line, text in enumerate(changed):
        result += loads.get(line, [])
        result += stores.get(line, [])
        if text is not None:
            result.append(text)
    return memory, places, result


def replacements(body: Body, staged: dict[str, Value]) -> dict[str, str]:
    """Results of branches, and what each is if no world wants the branch, where its memory can go
    on as the result's: nothing needs the old value once there is the new one."""
    replaced = {}
    taken = set()
    for name, value in staged.items():
        text = body.lines[value.line]
        block = body.block[value.line]
        if not block.startswith("joined") or " = phi " not in text:
            continue
        edges = EDGE.findall(text)
        if len(edges) < 2:  # the other edge has a constant
            continue
        old = edges[1][0]
        if old not in staged or old in taken or staged[old].type != value.type:
            continue
        start = body.starts[block]
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
