"""Seconds from the start of a process to the end of its first update.

    python benchmarks/start.py

Trainings of a single iteration are started with an empty and then with a filled compile cache, `--repeats`
times, and killed when they print the line of progress that ends the iteration. Tasks are `ppo_mjx.py`'s,
robots `ppo_mjx_unitree.py`'s. Python's bytecode is compiled beforehand. Writes benchmarks/results/NAME.json.
"""

import dataclasses
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import common
import tyro

import ppo_mjx
import ppo_mjx_unitree


@dataclasses.dataclass
class Args:
    of: tuple[str, ...] = ("HalfCheetah", "Ant", "Humanoid", "g1")  # tasks and robots
    repeats: int = 3
    name: str = "start"  # of the JSON file
    smoke: bool = False


def first_update(of: str, cache: str) -> float:
    """Seconds from the start of the script to the end of its first iteration."""
    if of in ppo_mjx_unitree.ROBOTS:
        command = ["ppo_mjx_unitree.py", "--robot", of]
        steps = ppo_mjx_unitree.default_args(of).steps_per_iteration
    else:
        command = ["ppo_mjx.py", "--env-id", of]
        steps = ppo_mjx.default_args(of).steps_per_iteration
    with tempfile.TemporaryDirectory() as runs:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command, "--total-timesteps", str(steps), "--runs-dir", runs],
            cwd=common.ROOT,
            env=os.environ | common.caches(cache),
            stdout=subprocess.PIPE,  # no terminal, where it would show a bar and no lines
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        lines, seconds = [], None
        for line in process.stdout:
            lines.append(line.decode())
            if b"] step " in line:
                seconds = time.perf_counter() - start
                os.killpg(process.pid, signal.SIGKILL)  # its helpers would slow the next one down
                break
        process.wait()
    if seconds is None:
        raise RuntimeError("".join(lines[-20:]))
    return seconds


def main(args: Args) -> None:
    if args.smoke:
        common.hardly_optimise()
        args = dataclasses.replace(args, of=("Hopper",), repeats=1)
    starts = {}
    for of in args.of:
        times = {"cold": [], "warm": []}
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory() as cache:
                for kind in times:
                    times[kind].append(first_update(of, cache))
        medians = {kind: statistics.median(values) for kind, values in times.items()}
        starts[of] = medians | {"all": times}
        seconds = ", ".join(f"{value:.1f} s {kind}" for kind, value in medians.items())
        print(f"{of}: first update after {seconds}", flush=True)
        common.write(args.name, args, {"first_update_s": starts}, args.smoke)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
