"""What the benchmarks share: devices, turns, child processes, tables, result files."""

import dataclasses
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import sysconfig
import time
import warnings
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Of child processes.
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
# The training scripts, and `onekernel`, else this folder's script of the same name.
sys.path.insert(0, str(ROOT))
PACKAGES = ("jax", "llvmlite", "mujoco", "mujoco-mjx", "flax", "optax", "gymnasium", "brax", "stable-baselines3",
            "sbx-rl", "torch")  # fmt: skip


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The CPU's name where Linux tells it, elsewhere its kind."""
    file = Path("/proc/cpuinfo")
    return [
        *re.findall(r"model name\s*: (.*)", file.read_text() if file.exists() else ""),
        platform.machine(),
    ][0]


def make_mesh(most: int | None = None, *parts: int):
    """All devices (or the first of them, at most so many) as a mesh with the axis "devices", as many as divide each of
    `parts`; a CPU is one device for each core, which has to be told before JAX starts."""
    import jax
    import numpy as np

    try:
        jax.config.update("jax_num_cpu_devices", count_cores())
    except RuntimeError:
        pass  # JAX has started already, with the devices that it has
    devices = jax.devices()[:most]
    count = max(n for n in range(1, len(devices) + 1) if all(part % n == 0 for part in parts))
    return jax.sharding.Mesh(np.array(devices[:count]), ("devices",))


def ppo_args(env_id: str, **changes):
    """ppo_mjx.Args with the defaults that the command line has for the task."""
    import ppo_mjx as ppo

    return dataclasses.replace(ppo.default_args(env_id), **changes)


def compile_sharded(mesh, function, *operands):
    """`function` over the mesh, its operands split along the first axis: a call without arguments that waits for the
    result and returns it, the seconds of compiling, and the compiled program."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec as P

    start = time.perf_counter()
    run = jax.shard_map(
        function, mesh=mesh, in_specs=P("devices"), out_specs=P("devices"), check_vma=False
    )
    compiled = jax.jit(run).lower(*operands).compile()
    seconds = time.perf_counter() - start
    placed = jax.device_put(operands, NamedSharding(mesh, P("devices")))
    return lambda: jax.block_until_ready(compiled(*placed)), seconds, compiled


def hardly_optimise() -> None:
    """Let XLA compile quickly what then runs slowly, here and in child processes: for short versions."""
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
    )


def caches(folder: str | Path) -> dict[str, str]:
    """Environment variables of a process that is to keep and find compiled programs in this folder alone."""
    return dict.fromkeys(("JAX_COMPILATION_CACHE_DIR", "ONEKERNEL_CACHE_DIR"), str(folder))


def keep_nothing_compiled() -> None:
    """Let this process compile all that it runs."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    os.environ["ONEKERNEL_CACHE"] = "0"


def refuse_fallbacks() -> None:
    """Let it be an error where onekernel cannot compile a function: else XLA's speed would be taken for onekernel's."""
    import onekernel

    warnings.simplefilter("error", onekernel.Fallback)


def take_turns(programs: dict, repeats: int, warmups: int = 1) -> dict[str, list[float]]:
    """Seconds of each program, `repeats` times, in turn, so that a slow phase of the machine meets all of them."""
    seconds = {name: [] for name in programs}
    for turn in range(warmups + repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            if turn >= warmups:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the pairs' ratios."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def run_child(command: list[str], timeout: float | None = None, **environment: str) -> dict:
    """Run a process to its end; the last line that it prints is JSON. RuntimeError, with its end, if it fails."""
    process = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=timeout)  # fmt: skip
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {process.returncode}:\n"
            f"{process.stdout[-2000:]}\n{process.stderr[-2000:]}"
        )
    return json.loads(process.stdout.strip().splitlines()[-1])


def table(header: list[str], rows: list[list]) -> None:
    """Print as Markdown; numbers with three significant digits, and thousands without an exponent."""

    def cell(value) -> str:
        if not isinstance(value, float):
            return "-" if value is None else str(value)
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"

    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(map(cell, row)) + " |", flush=True)


def without_folders(text: str) -> str:
    """Paths, as in the traceback of what failed, from the project's or the installed packages' folder on: where these
    lie on one machine is nobody's business."""
    for folder in (ROOT, Path(sysconfig.get_path("purelib")), Path.home()):
        text = text.replace(f"{folder}/", "")
    return text


def write(
    name: str, args, result: dict, smoke: bool = False, devices: list[str] | None = None
) -> None:
    """benchmarks/results/NAME.json (what ran on an accelerator: results/gpu/NAME.json) with what it takes to do it
    again. devices: their kinds; without them JAX is asked."""
    if devices is None:
        import jax

        devices = [device.device_kind for device in jax.devices()]

    def git(command: str) -> str:
        return subprocess.run(
            ["git", *command.split()], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    installed = {
        dist.metadata["Name"].lower().replace("_", "-"): dist.version
        for dist in metadata.distributions()
    }
    note = {
        "command": shlex.join(["python", *(Path(x).relative_to(ROOT).as_posix() if Path(x).is_absolute() and
                                           Path(x).is_relative_to(ROOT) else x for x in sys.argv)]),
        "commit": git("rev-parse HEAD"), "changed_since": git("status --porcelain -- *.py").splitlines(),
        "devices": devices, "machine": f"{processor()}, {count_cores()} cores",
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
        "args": dataclasses.asdict(args),
    }  # fmt: skip
    folder = RESULTS if all(kind == "cpu" for kind in devices) else RESULTS / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}{'_smoke' if smoke else ''}.json"
    file.write_text(without_folders(json.dumps(note | result, indent=1)) + "\n")
    print(f"wrote {file.relative_to(ROOT)}")
