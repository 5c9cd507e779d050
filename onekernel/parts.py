"""A large kernel for a CPU becomes several functions, so that several cores can compile it at once.

LLVM compiles a function on one core, and takes more than twice as long for a block of instructions
that is twice as long. So `codegen.Emitter` cuts a large block into parts of some thousand
instructions, each with a label of its own, and here each part becomes a function, and a call in
its place. Parts hand their values on through memory (slots.py has put them there), so that a
function's arguments are pointers alone.

Functions that follow each other stand in a module together, with what they need: the result is one
text, in which SEPARATOR stands between modules. The kernel is in the last one. As modules are
loaded one by one, each has a variable for the address of a part that it calls, and the loader fills
it in (see ffi.Loader)."""

import re

NAME = re.compile(r"%[\w.]+")
GLOBAL = re.compile(r"@[\w.]+")
DEFINITION = re.compile(r"^define .*?(@[\w.]+)", re.MULTILINE)
EXPORTED = re.compile(r"^define (?:void|ptr) @([\w.]+)", re.MULTILINE)
CALLED = re.compile(r"^@(part\d+)_address = ", re.MULTILINE)
SEPARATOR = "\n; ---- next module ----\n"
MODULE = 400_000  # characters of a module's functions


def divide(
    lines: list[str],
    parts: dict[str, str],
    places: dict[str, str],
    arguments: dict[str, str],
    attributes: str,
) -> tuple[list[str], list[list[str]]]:
    """The lines of a kernel's body with calls in place of its parts, and the lines of their
    functions.

    parts: labels, of a part's begin and of what comes after it; places: the instruction for each
    pointer that any function may compute for itself; arguments: types of what a function needs to
    be given. attributes: of a function.
    """
    functions = []
    stack: list[tuple[str, list[str]]] = [("", [])]  # parts within parts, and their lines
    for text in lines:
        part, own = stack[-1]
        own.append(text)
        label = text[:-1]
        if text.endswith(":") and label in parts:
            stack.append((label, [text]))
        elif part and text == f"br label %{parts[part]}":
            own[-1] = "ret void"
            stack.pop()
            used = dict.fromkeys(NAME.findall("\n".join(own)))
            computed = [places[name] for name in used if name in places]
            used |= dict.fromkeys(NAME.findall("\n".join(computed)))
            given = [name for name in used if name in arguments]
            signature = ", ".join(f"{arguments[name]} {name}" for name in given)
            types = ", ".join(f"{arguments[name].split(' noalias')[0]} {name}" for name in given)
            functions.append(
                [
                    f"define void @{part}({signature}) {attributes} {{",
                    "entry:",
                    *computed,
                    f"br label %{part}",
                    *own,
                    "}",
                ]
            )
            address = f"%{part}.address"
            stack[-1][1].extend(
                [
                    f"{address} = load ptr, ptr @{part}_address",
                    f"call void {address}({types})",
                    text,
                ]
            )
    return stack[0][1], functions


def modules(main: list[str], functions: list[list[str]], shared: dict[str, str]) -> str:
    """The text of all modules. main: definitions of the last one; shared: definitions and
    declarations that any function may need, by their names (@name)."""
    texts = []
    for group in (*grouped(["\n".join(lines) for lines in functions]), "\n".join(main)):
        known = {name: "" for name in DEFINITION.findall(group)}
        pending = [group]
        while pending:
            for name in GLOBAL.findall(pending.pop()):
                if name not in known:
                    known[name] = shared.get(name) or f"{name} = dso_local global ptr null"
                    pending.append(known[name])
        texts.append("\n".join([*filter(None, known.values()), group]))
    return SEPARATOR.join(texts)


def grouped(texts: list[str]) -> list[str]:
    """Texts of functions that follow each other, together: a module has some work of its own."""
    groups: list[str] = []
    for text in texts:
        if groups and len(groups[-1]) + len(text) <= MODULE:
            groups[-1] += "\n" + text
        else:
            groups.append(text)
    return groups


def symbols(text: str) -> dict[str, list[list[str]]]:
    """Of each module, the functions that others call (of the last one, the handler), and the parts
    that it calls."""
    modules = text.split(SEPARATOR)
    return {
        "functions": [EXPORTED.findall(module) for module in modules],
        "calls": [CALLED.findall(module) for module in modules],
    }
