"""Memory that a training iteration takes, over the number of worlds.

    python benchmarks/memory.py                                   PPO, SAC with its replay buffer, the G1
    python benchmarks/memory.py --programs Hopper Walker2d --num-envs 32 1024 8192

Every program is compiled, by the script's default flags but for --num-envs, for one device, in a process of its own and
without the cache of compiled programs; XLA tells what it needs (`memory_analysis()`): arguments, outputs, what of these
lies in the arguments' place (alias) and temporaries. In all: argument + output - alias + temp. Several devices share
the worlds, and each has the parameters. A line, bytes = a + b * num_envs, is fitted by least squares; by it follows how
many worlds fit into so much memory, if all of it is for the taking (JAX takes 75 % of a GPU's by default); for SAC no
more than its buffer has transitions. These are programs for the devices of this machine; XLA lays out others for
another kind.

On an accelerator every size also runs one iteration, for its peak_bytes_in_use, and num_envs is doubled until the
memory is not enough (by JAX's default share). On a CPU one iteration of the largest size is run, and the rise of the
process' largest resident set (ru_maxrss, set back before, which needs Linux) is compared with the analysis.
Writes benchmarks/results/NAME.json.
"""

import dataclasses
import json
import os
import resource
import sys
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from common import (
    hardly_optimise,
    keep_nothing_compiled,
    make_mesh,
    ppo_args,
    run_child,
    table,
    write,
)

GIB = 2**30
NO_ROOM = "resource_exhausted", "out of memory", "out_of_memory"  # in the text of an error


@dataclasses.dataclass
class Args:
    programs: tuple[str, ...] = ("HalfCheetah", "SAC", "G1")  # or Hopper, Walker2d
    num_envs: tuple[int, ...] = (32, 64, 128, 256, 1024, 4096, 8192)
    # Of the G1, which takes longest to compile.
    g1_num_envs: tuple[int, ...] = (32, 256, 1024, 8192)
    gibibytes: tuple[int, ...] = (8, 24, 80)  # memories to fill, by the line
    name: str = "memory"  # of the JSON file
    most_num_envs: int = 2**22  # where the search on an accelerator ends
    # Program, worlds and 1 to run them as well: what the processes of this benchmark do.
    child: str | None = None
    smoke: bool = False


# ---- One program, in a process of its own ---------------------------------------------------------------------------
def build(program: str, num_envs: int):
    """The script, its settings, and the jitted function that makes the state of a run on one device from a key."""
    import jax
    from jax.sharding import NamedSharding

    mesh = make_mesh(1)
    if program == "SAC":
        import sac_mjx_pendulum as script

        args = script.Args()
    elif program == "G1":
        import ppo_mjx_unitree as script

        args = script.Args()
    else:
        import ppo_mjx as script

        args = ppo_args(program)
    steps = num_envs * args.num_steps  # an iteration, of which there has to be one
    args = dataclasses.replace(
        args, num_envs=num_envs, total_timesteps=max(args.total_timesteps, steps)
    )
    script.check_args(args)
    env = script.Env(args)
    shardings = jax.tree.map(partial(NamedSharding, mesh), script.STATE_SPEC)
    operands = (args, env, mesh) if program == "SAC" else (args, env)
    return (
        script,
        args,
        env,
        mesh,
        jax.jit(partial(script.init_train_state, *operands), out_shardings=shardings),
    )


def form_of(script, mesh, init, key):
    """The shapes and places of the state's arrays, none of which is made."""
    import jax
    from jax.sharding import NamedSharding

    def place(part, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
        )

    form = jax.eval_shape(init, key)
    return form.replace(
        **{name: place(getattr(form, name), spec) for name, spec in vars(script.STATE_SPEC).items()}
    )


def peak_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_once(compiled, init, key) -> dict:
    """What one iteration takes: the device's own peak, or that of the process on a CPU."""
    import jax

    device, before, init = jax.devices()[0], None, init.lower(key).compile()
    forget = Path("/proc/self/clear_refs")  # else the peak would be that of compiling
    if device.memory_stats() is None and forget.exists():
        forget.write_text("5")
        before = peak_resident()
    jax.block_until_ready(compiled(init(key)))
    stats = device.memory_stats()
    if stats:
        return {
            "peak_bytes_in_use": stats["peak_bytes_in_use"],
            "bytes_limit": stats["bytes_limit"],
        }
    return {"resident_rise": before and peak_resident() - before}


def measure(program: str, num_envs: int, run: bool) -> dict:
    import jax

    keep_nothing_compiled()  # what comes from the cache may not tell all
    script, args, env, mesh, init = build(program, num_envs)
    key, device = jax.random.key(1), mesh.devices[0]
    form = form_of(script, mesh, init, key)
    compiled = script.train_iteration.lower(args, env, mesh, form).compile()
    analysis = compiled.memory_analysis()
    row = {"num_envs": num_envs, "device": device.device_kind} | {
        part: getattr(analysis, f"{part}_size_in_bytes")
        for part in ("argument", "output", "alias", "temp")
    }
    row["total"] = row["argument"] + row["output"] - row["alias"] + row["temp"]
    # Learner, worlds, buffer.
    row |= {name: script.count_bytes(part) for name, part in vars(form).items()}
    row |= {
        "bytes_per_world": row["worlds"] / num_envs,
        "transitions": getattr(args, "buffer_size", None),
    }
    return row | (run_once(compiled, init, key) if run or device.memory_stats() else {})


def child(program: str, num_envs: str, run: str) -> dict:
    """That there is not enough memory is a result."""
    try:
        return measure(program, int(num_envs), bool(int(run)))
    except Exception as error:
        if any(words in str(error).lower() for words in NO_ROOM):
            return {"num_envs": int(num_envs), "out_of_memory": str(error)[:300]}
        raise


# ---- All of them ----------------------------------------------------------------------------------------------------
def start(program: str, num_envs: int, run: bool = False) -> dict:
    return run_child(
        [
            sys.executable,
            str(Path(__file__).resolve()),
            "--child",
            f"{program} {num_envs} {int(run)}",
        ]
    )


def fit(rows: list[dict]) -> dict:
    """The line through the totals, and its largest error as a share of the total there."""
    sizes, totals = (np.array([row[name] for row in rows], float) for name in ("num_envs", "total"))
    b, a = np.polyfit(sizes, totals, 1)
    errors = np.abs(a + b * sizes - totals) / totals
    return {
        "a": a,
        "b": b,
        "largest_error": errors.max(),
        "largest_error_at": int(sizes[errors.argmax()]),
    }


def search(program: str, first: int, most: int) -> dict:
    """Doubling, from `first` on, until the memory is not enough; halving from there, if it is not at first."""
    ran, failed, size, tried = None, None, first, []
    while 0 < size <= most and not (ran and failed):
        tried.append(row := start(program, size, run=True))
        print(
            f"{program}, {size} worlds: {'out of memory' if 'out_of_memory' in row else 'run'}",
            flush=True,
        )
        if "out_of_memory" in row:
            failed, size = size, size // 2
        else:
            ran, size = size, size * 2
    return {"ran": ran, "failed": failed, "tried": tried}


def measure_program(program: str, args: Args, failures: list[str]) -> dict:
    rows, result = [], {}
    sizes = sorted(args.g1_num_envs if program == "G1" else args.num_envs)
    for size in sizes:
        try:
            rows.append(start(program, size, run=size == sizes[-1]))
        except RuntimeError as error:
            failures.append(f"{program}, {size} worlds: {error}")
    for row in [row for row in rows if "out_of_memory" in row]:
        print(f"{program}, {row['num_envs']} worlds: out of memory")
    told = [row for row in rows if "out_of_memory" not in row]
    mib = 2.0**20
    print(f"\n{program}: MiB of one device")
    table(
        [
            "worlds",
            "argument",
            "output",
            "alias",
            "temp",
            "in all",
            "KiB a world",
            "of them state",
            "buffer",
            "when run",
        ],
        [
            [
                row["num_envs"],
                *(row[part] / mib for part in ("argument", "output", "alias", "temp", "total")),
                row["total"] / row["num_envs"] / 1024,
                row["bytes_per_world"] / 1024,
                row["buffer"] / mib if "buffer" in row else None,
                peak / mib
                if (peak := row.get("peak_bytes_in_use", row.get("resident_rise")))
                else None,
            ]
            for row in told
        ],
    )
    result["sizes"] = rows
    if len(told) < 2:
        return result
    result["line"] = line = fit(told)
    most = told[0]["transitions"] or sys.maxsize
    result["worlds_in"] = {
        f"{gb} GiB": min(most, int((gb * GIB - line["a"]) / line["b"])) for gb in args.gibibytes
    }
    if "bytes_limit" in told[0]:
        most = min(most, args.most_num_envs)
        by_line = max(sizes[0], (told[0]["bytes_limit"] - line["a"]) / line["b"])
        try:
            result["search"] = search(program, min(most, 2 ** int(np.log2(by_line) - 1)), most)
        except RuntimeError as error:
            failures.append(f"{program}, search: {error}")
    return result


def main(args: Args) -> None:
    if args.child:
        print(json.dumps(child(*args.child.split())))
        return
    if args.smoke:
        args = dataclasses.replace(args, programs=("HalfCheetah", "SAC"), num_envs=(32, 128))
        hardly_optimise()
    os.environ.setdefault("JAX_LOGGING_LEVEL", "CRITICAL")
    failures, result = [], {}
    for program in args.programs:
        result[program] = measure_program(program, args, failures)
    print()
    lines = {program: row for program, row in result.items() if "line" in row}
    table(
        [
            "program",
            "a, MiB",
            "b, KiB a world",
            "largest error of the line, %",
            "at",
            *(f"worlds in {gb} GiB" for gb in args.gibibytes),
            "largest run",
            "out of memory at",
        ],
        [
            [
                program,
                (line := row["line"])["a"] / 2**20,
                line["b"] / 1024,
                100 * line["largest_error"],
                line["largest_error_at"],
                *row["worlds_in"].values(),
                *(
                    (row["search"]["ran"], row["search"]["failed"])
                    if "search" in row
                    else (None, None)
                ),
            ]
            for program, row in lines.items()
        ],
    )
    for text in failures:
        print(f"FAIL  {text}")
    kinds = sorted(
        {row["device"] for run in result.values() for row in run["sizes"] if "device" in row}
    )
    write(
        args.name, args, {"results": result, "seeds": [1], "failures": failures}, args.smoke, kinds
    )
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
