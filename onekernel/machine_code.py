"""LLVM's work for CPUs: machine code of modules in LLVM IR, on all cores.

llvmlite lets one thread at a time into LLVM. So large modules are compiled by other processes, on
several cores if there are several modules, while this process goes on, with JAX's and XLA's work
for the same program. They run this file as a program, which reads modules from its standard input
and writes their code to its standard output. It imports llvmlite alone, and starts in a fraction of
a second."""

import atexit
import functools
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable

import llvmlite.binding as llvm

# Characters of text that are worth another process.
TEXT_OF_A_PROCESS = 400_000


@functools.cache
def host() -> tuple[str, str]:
    """The name of this machine's processor, as LLVM has it, and its features."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def compile_module(text: str) -> bytes:
    """Machine code for this processor, as an object file.

    LLVM's optimiser is left out: what it would find, the graph has found already, and it takes
    longer than the code generator. With the small code model a constant is read by one
    instruction, relative to the code's own place."""
    cpu, features = host()
    module = llvm.parse_assembly(text)
    module.verify()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(
        cpu=cpu, features=features, opt=2, reloc="pic", codemodel="small"
    )
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    return machine.emit_object(module)


def start_modules(texts: list[str]) -> Callable[[], list[bytes]]:
    """Has other processes compile modules, on as many cores as pays. Returns a function that waits
    for their machine code."""
    size = sum(map(len, texts))
    count = max(1, min(count_cores(), len(texts), size // TEXT_OF_A_PROCESS))
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for module in sorted(range(len(texts)), key=lambda module: -len(texts[module])):
        least = loads.index(min(loads))
        shares[least].append(module)
        loads[least] += len(texts[module])
    workers = [start_worker([texts[module] for module in share]) for share in shares]

    def finish() -> list[bytes]:
        codes: dict[int, bytes] = {}
        for share, worker in zip(shares, workers, strict=True):
            found = worker()
            if found is None:
                found = [compile_module(texts[module]) for module in share]
            codes |= dict(zip(share, found, strict=True))
        return [codes[module] for module in range(len(texts))]

    return finish


def count_cores() -> int:
    """Cores that this process may use, at most NPROC if the environment has it, as XLA's threads.

    It is for a container's quota, which neither affinity nor cpu_count knows.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    told = os.environ.get("NPROC", "")
    return min(cores, int(told)) if told.isdigit() and int(told) else cores


# Another process ----------------------------------------------------------------------------------


def start_worker(texts: list[str]) -> Callable[[], list[bytes] | None]:
    """Has another process compile the modules. Returns a function that waits for it and gives
    their code, or None if the process came to nothing."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONSAFEPATH": "1",  # not this file's folder, whose names are not for all to import
    }
    try:
        request = tempfile.TemporaryFile()
        answer = tempfile.TemporaryFile()
        write_items(request, [text.encode() for text in texts])
        request.seek(0)
        process = subprocess.Popen(
            [sys.executable or "python", __file__],
            stdin=request,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
    except OSError:  # a full disk, or no such program
        return lambda: None
    atexit.register(process.kill)

    @functools.cache
    def wait() -> list[bytes] | None:
        failed = process.wait() != 0
        atexit.unregister(process.kill)
        answer.seek(0)
        codes = read_items(answer)
        request.close()
        answer.close()
        return None if failed or len(codes) != len(texts) else codes

    return wait


def write_items(file, items: list[bytes]) -> None:
    """Writes byte strings, each after its length."""
    for item in items:
        file.write(struct.pack("<Q", len(item)))
        file.write(item)


def read_items(file) -> list[bytes]:
    """The byte strings that `write_items` wrote, up to the end of the file."""
    items = []
    while head := file.read(8):
        (length,) = struct.unpack("<Q", head)
        items.append(file.read(length))
    return items


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who waits for the code
    modules = [item.decode() for item in read_items(sys.stdin.buffer)]
    write_items(sys.stdout.buffer, [compile_module(module) for module in modules])
