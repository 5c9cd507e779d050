"""Seconds, from the start of the process, until the G1's policy passes its test in C MuJoCo; what each trick is worth.

    python benchmarks/time_to_walk.py --seeds 1
    python benchmarks/time_to_walk.py --ablations --seeds 1 2 --total-timesteps 4000000 --name g1_ablations
        --flags="--imitation-until 0.15 --standing-after 1"

Each training is one process that starts with an empty compile cache (--compile-cache: with the user's). Its policies
are copied while it trains and put to the script's test when it has ended. first_update_s are the seconds until the
first iteration's metrics are in TensorBoard's file. Ablations train with one trick left out at a
time. Writes benchmarks/results/NAME.json, and the last policy of the first seed to --policy.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import common
import numpy as np
import tyro
from time_to_return import watch

VARIANTS = {  # flags, and weights of the reward that differ
    "as it is": ([], {}),
    "no mirror loss": (["--mirror-coef", "0"], {}),
    "no imitation loss": (["--imitation-coef", "0"], {}),
    "no gait reward": ([], {"gait": 0.0}),
    "fixed step size, 3e-4 to 0": (["--desired-kl", "None", "--learning-rate", "3e-4"], {}),
    "nothing randomised": (
        "--obs-noise 0 --push-speed 0 --friction 1 1 --added-mass 0 0 --shifted-center 0 --gain-noise 0 "
        "--strength-noise 0 --action-delay 0".split(), {}),
}  # fmt: skip


@dataclasses.dataclass
class Args:
    seeds: tuple[int, ...] = (1,)
    total_timesteps: int = 15_000_000
    checkpoint_every: int = 150  # iterations between two policies; the test of one takes 42 s of a core
    flags: str = ""  # further flags for ppo_mjx_unitree.py
    ablations: bool = False  # all variants, of which the last policies alone are judged
    name: str = "time_to_walk"  # of the JSON file
    policy: str | None = None  # where the last policy of the first seed is copied to
    compile_cache: bool = False  # take compiled programs from the cache, and keep them
    smoke: bool = False  # one short run of each variant


def child(argv: list[str]) -> None:
    """What the training process runs: the script, with other weights."""
    import ppo_mjx_unitree as unitree

    robot, weights = unitree.ROBOTS["g1"], json.loads(argv[0])
    unitree.ROBOTS["g1"] = dataclasses.replace(robot, weights=robot.weights | weights)
    unitree.finish = lambda *_: {}  # judged below
    unitree.main(argv[1:])


def judge(file: Path) -> dict:
    """The script's own test."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import ppo_mjx_unitree as unitree

    with np.load(file) as arrays, contextlib.redirect_stdout(io.StringIO()):
        return unitree.judge(unitree.ROBOTS["g1"], dict(arrays))


def train(args: Args, variant: str, seed: int, folder: Path) -> tuple[list[dict], dict, float]:
    """What `watch` returns of one training."""
    flags, weights = VARIANTS[variant]
    command = [sys.executable, __file__, "--child", json.dumps(weights), "--seed", str(seed)]
    command += ["--runs-dir", str(folder / "runs"), "--total-timesteps", str(args.total_timesteps)]
    command += ["--checkpoint-every", str(args.checkpoint_every), *flags]
    command += ["--compile-cache" if args.compile_cache else "--no-compile-cache", *args.flags.split()]
    return watch(command, folder)


def main(args: Args) -> None:
    if args.smoke:
        short = {"seeds": (1,), "total_timesteps": 20_000, "checkpoint_every": 2}
        args = dataclasses.replace(args, **short)
    rows = []
    for seed in args.seeds:
        for variant in VARIANTS if args.ablations else ["as it is"]:
            with tempfile.TemporaryDirectory() as folder:
                policies, run, seconds = train(args, variant, seed, Path(folder))
                if args.ablations:
                    policies = policies[-1:]
                with ProcessPoolExecutor(common.count_cores()) as pool:
                    results = list(pool.map(judge, [policy["file"] for policy in policies]))
                if args.policy and not rows:
                    shutil.copy(policies[-1]["file"], args.policy)
            batch = run["args"]["num_envs"] * run["args"]["num_steps"]
            for policy, result in zip(policies, results, strict=True):
                policy |= {"steps": policy.pop("iteration") * batch}
                policy |= {key: result[key] for key in ("passed", "falls", "error", "yaw", "drift")}
                policy.pop("file")
            first = next((policy for policy in policies if policy["passed"]), None)
            row = {
                "variant": variant, "seed": seed, "process_s": round(seconds, 1),
                "first_update_s": run["first_update_s"], "first_pass": first,
                "passing": sum(policy["passed"] for policy in policies), "final": policies[-1]}  # fmt: skip
            print(json.dumps(row), flush=True)
            rows.append(row | {"curve": policies, "final_table": results[-1]["table"], "run": run})
            write(args, rows)


def write(args: Args, rows: list[dict]) -> None:
    """The table so far, and all of it as JSON."""
    summary = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        summary[variant] = {
            key: statistics.median(row["final"][key] for row in mine) for key in ("falls", "error", "yaw", "drift")}
        summary[variant]["first_update_s"] = statistics.median(row["first_update_s"] for row in mine)
        times = [row["first_pass"]["seconds"] if row["first_pass"] else float("inf") for row in mine]
        summary[variant]["seconds to the first pass"] = statistics.median(times)
    print(json.dumps(summary, indent=2))
    common.write(args.name, args, {"summary": summary, "rows": rows}, args.smoke, rows[0]["run"]["devices"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main(tyro.cli(Args))
