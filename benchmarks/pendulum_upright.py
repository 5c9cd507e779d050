"""How many starts SAC's policy brings upright and keeps there, in C MuJoCo.

    python benchmarks/pendulum_upright.py --env-id PointMass --seeds 1 2 3

Each seed is trained by `sac_mjx_pendulum.py` in a process of its own, with its defaults but for --eval-every 0. Then
NumPy runs the policy for an episode from each of the same 100 random starts. An end is upright if the angle is below
0.1 rad and the speed below 0.2 rad/s at every step of the last second. Of the other ends the largest angle in that
second is told, and whether the pendulum still moved (else it stands still, but not upright). Seconds of training are
the script's own `train_s`, without start and compiling; those of the process hold both, and depend on the compile
cache. Writes benchmarks/results/NAME_ENV_ID.json.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import common
import numpy as np
import tyro

import sac_mjx_pendulum as sac

ANGLE, SPEED = 0.1, 0.2  # rad, rad/s


@dataclasses.dataclass
class Args:
    env_id: Literal["Pendulum-v1", "PointMass"] = "PointMass"
    seeds: tuple[int, ...] = (1, 2, 3)
    starts: int = 100
    flags: str = ""  # further flags of sac_mjx_pendulum.py
    name: str = "pendulum_upright"  # of the JSON file, to which the environment's is added
    smoke: bool = False  # one short training


def train(env_id: str, seed: int, flags: list[str], folder: str) -> tuple[Path, dict]:
    """The run's folder, and its seconds. Fails where the run does."""
    command = [
        sys.executable,
        "sac_mjx_pendulum.py",
        "--env-id",
        env_id,
        "--seed",
        str(seed),
        "--runs-dir",
        folder,
    ]
    start = time.perf_counter()
    subprocess.run(
        [*command, "--eval-every", "0", *flags],
        cwd=common.ROOT,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    run_dir, seconds = next(Path(folder).iterdir()), time.perf_counter() - start
    run = json.loads((run_dir / "run.json").read_text())
    told = {name: run[name] for name in ("train_s", "compile_s", "devices", "versions")}
    return run_dir, told | {"process_s": seconds}


def last_second(run_dir: Path, starts: int) -> dict[str, np.ndarray]:
    """Of the policy's episode from each start [E]: the return, and the largest angle and speed in its last second."""
    env, path = sac.Env(sac.read_run(run_dir)), []
    with np.load(run_dir / "policy.npz", allow_pickle=False) as file:
        policy = dict(file)
    original = sac.CMujocoEnv(env)
    returns = sac.evaluate_on_host(
        original,
        policy,
        starts,
        1_000_000,
        lambda: path.append((original.data.qpos[0], original.data.qvel[0])),
    )
    steps = round(1 / env.task.dt)
    angle, speed = np.abs(np.reshape(path, (starts, env.time_limit, 2))[:, -steps:]).max(axis=1).T
    return {"return": returns, "angle": angle, "speed": speed}


def measure(args: Args, seed: int) -> dict:
    """Train one seed, judge its policy, print a row of the table."""
    flags = [*args.flags.split(), *(["--total-timesteps", "40960"] if args.smoke else [])]
    with tempfile.TemporaryDirectory() as folder:
        run_dir, row = train(args.env_id, seed, flags, folder)
        ends = last_second(run_dir, args.starts)
    upright, moving = (ends["angle"] < ANGLE) & (ends["speed"] < SPEED), ends["speed"] >= SPEED
    row |= {
        "seed": seed,
        "upright": float(upright.mean()),
        "return": float(ends["return"].mean()),
        "moving": int(moving.sum()),
        "ends": {name: values.tolist() for name, values in ends.items()},
    }
    print(
        f"| {seed} | {row['upright']:.2f} | {row['return']:.1f} | {row['train_s']:.1f} | {row['process_s']:.1f} "
        f"| {(~upright).sum()} | {moving.sum()} | {np.sort(ends['angle'][~upright]).round(2).tolist()} |",
        flush=True,
    )
    return row


def main(args: Args) -> None:
    if args.smoke:
        args = dataclasses.replace(args, seeds=(1,), starts=10)
    print(
        f"{args.env_id}, {args.starts} starts\n"
        "| seed | upright | return | training s | process s | not upright | of these moving | their largest angles |"
    )
    print("|---" * 8 + "|")
    rows = [measure(args, seed) for seed in args.seeds]
    medians = {
        name: statistics.median(row[name] for row in rows)
        for name in ("upright", "return", "train_s")
    }
    print(
        "median: upright {upright:.2f}, return {return:.1f}, training {train_s:.1f} s".format(
            **medians
        )
    )
    devices, _ = ([row.pop(name) for row in rows][0] for name in ("devices", "versions"))
    result = {"medians": medians, "runs": rows}
    common.write(f"{args.name}_{args.env_id}", args, result, args.smoke, devices)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
