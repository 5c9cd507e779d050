"""What the policies in docs/ do in their scripts' own test, and films of them.

    python benchmarks/judge_policy.py --robots h1 go2
    python benchmarks/judge_policy.py --robots h1 --film films

Reads docs/ROBOT_policy.npz and writes benchmarks/results/ROBOT_policy.json: the test's result with
its table (docs/ppo_mjx_unitree.md explains its columns). The test is the same each time, to the bit
on one kind of machine. --film writes FOLDER/ROBOT.mp4 as well: 3 s of each of the test's commands.
"""

import contextlib
import dataclasses
import io
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import common
import numpy as np
import tyro

import ppo_mjx_unitree as unitree


@dataclasses.dataclass
class Args:
    robots: tuple[str, ...] = ("g1",)
    film: str | None = None  # folder for the films
    smoke: bool = False  # one start of each command


def main(args: Args) -> None:
    if args.smoke:
        unitree.TEST_STARTS = 1
    for name in args.robots:
        robot = unitree.ROBOTS[name]
        with np.load(common.ROOT / "docs" / f"{name}_policy.npz", allow_pickle=False) as arrays:
            policy = dict(arrays)
        with contextlib.redirect_stdout(io.StringIO()):
            result = unitree.judge(robot, policy)
        common.write(f"{name}_policy", args, {"evaluation": result}, args.smoke, ["cpu"])
        verdict = "PASS" if result["passed"] else "FAIL"
        print(f"{name}: {verdict}, {result['falls']} falls", flush=True)
        if args.film:
            unitree.write_video(robot, policy, Path(args.film) / f"{name}.mp4")


if __name__ == "__main__":
    main(tyro.cli(Args))
