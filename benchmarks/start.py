"""How soon after the start of a process its training is under way.

    python benchmarks/start.py

Training scripts are started with an empty and then with a filled compile cache, `--repeats` times, and killed
when they print their first line of progress, which comes with the tenth iteration. Tasks are `ppo_mjx.py`'s, robots
`ppo_mjx_unitree.py`'s. Writes benchmarks/results/NAME.json.
"""

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time

import common
import tyro

import ppo_mjx_unitree


@dataclasses.dataclass
class Args:
    of: tuple[str, ...] = ("HalfCheetah", "Ant", "Humanoid", "g1")  # tasks and robots
    repeats: int = 3
    name: str = "start"  # of the JSON file
    smoke: bool = False


def first_progress(of: str, cache: str) -> float:
    """Seconds from the start of the script to its first line of progress."""
    command = [sys.executable, "ppo_mjx.py", "--env-id", of, "--eval-every", "0"]
    if of in ppo_mjx_unitree.ROBOTS:
        command = [sys.executable, "ppo_mjx_unitree.py", "--robot", of]
    with tempfile.TemporaryDirectory() as runs:
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--runs-dir", runs],
            cwd=common.ROOT,
            env=os.environ | common.caches(cache),
            stdout=subprocess.PIPE,  # no terminal, where it would show a bar and no lines
            stderr=subprocess.STDOUT,
        )
        lines, seconds = [], None
        for line in process.stdout:
            lines.append(line.decode())
            if b"] step " in line:
                seconds = time.perf_counter() - start
                process.kill()
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
                    times[kind].append(first_progress(of, cache))
        medians = {kind: statistics.median(values) for kind, values in times.items()}
        starts[of] = medians | {"all": times}
        seconds = ", ".join(f"{value:.1f} s {kind}" for kind, value in medians.items())
        print(f"{of}: first progress after {seconds}", flush=True)
        common.write(args.name, args, {"first_progress_s": starts}, args.smoke)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
