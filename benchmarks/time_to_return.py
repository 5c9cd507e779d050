"""Seconds, from the start of the process, until the policy passes a return in Gymnasium's own environment.

    python benchmarks/time_to_return.py --env-ids HalfCheetah Hopper Walker2d --seeds 1 2 3 --total-timesteps 1000000

Each training is one process that starts with an empty compile cache (--compile-cache: with the user's, as when the
script is started again). Its policies are copied while it trains and judged when it has ended: deterministic episodes
in Gymnasium's v5, by the script's `act`. first_update_s are the seconds until the first iteration's metrics are in
TensorBoard's file. Writes benchmarks/results/NAME.json.
"""

import dataclasses
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal

import common
import numpy as np
import tyro

THRESHOLDS = {  # of the tasks without a comment: CleanRL's mean after 1M steps; mjlab's best on a GPU
    "HalfCheetah": (1443, 6490),
    "Hopper": (2383, 3100),
    "Walker2d": (2288, 7046),
    "Ant": (1824, 6294),  # after 8M steps; 1M is not told
    "Humanoid": (716, 12049),
    "HumanoidStandup": (109326, 150105),  # after 8M; SLM-Lab's after 4M
    "Swimmer": (125, 342),  # after 8M
    "InvertedPendulum": (963, 1000),
    "InvertedDoublePendulum": (5626, 9295),  # after 8M
    "Reacher": (-5.0, -3.47),  # SLM-Lab's after 4 to 10M
    "Pusher": (-40, -28.9),
}


@dataclasses.dataclass
class Args:
    script: Literal["ppo_mjx", "sac_mjx"] = "ppo_mjx"
    env_ids: tuple[str, ...] = ("HalfCheetah", "Hopper", "Walker2d")
    seeds: tuple[int, ...] = (1, 2, 3)
    total_timesteps: int | None = None  # by default the script's for the task
    checkpoint_every: float = (
        10  # between two policies: iterations, below 1 a share of the training
    )
    episodes: int = 20
    name: str = "time_to_return"  # of the JSON file
    flags: str = ""  # further flags for the script
    # Folder to which each training's run folder is copied, to film or compare its policy.
    keep: str | None = None
    # Let the script evaluate its last policy; else it is stopped once that is there.
    evaluate: bool = True
    compile_cache: bool = False  # take compiled programs from the cache, and keep them
    smoke: bool = False  # one short run of the first task


def judge(script: str, env_id: str, file: Path, episodes: int) -> list[float]:
    """Returns of deterministic episodes in Gymnasium's environment."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # the script imports JAX; its `act` is NumPy's
    import gymnasium

    act = importlib.import_module(script).act
    env, returns = gymnasium.make(env_id + "-v5"), []
    with np.load(file) as arrays:
        policy = dict(arrays)
    for episode in range(episodes):
        obs, _ = env.reset(seed=1000 + episode)
        total, over = 0.0, False
        while not over:
            _, action = act(policy, (), obs)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    return returns


def read_run(folder: Path) -> dict:
    return json.loads(next((folder / "runs").glob("*/run.json")).read_text())


def last_iteration(folder: Path) -> int:
    args = read_run(folder)["args"]
    return args["total_timesteps"] // (args["num_envs"] * args["num_steps"])


def watch(
    command: list[str], folder: Path, evaluate: bool = True
) -> tuple[list[dict], dict, float]:
    """Train by a process of its own, with runs in folder / "runs". Returns its policies with the seconds at which each
    was there, run.json and first_update_s, and all its seconds. evaluate: go on when the last policy is there."""
    policies, seen, first_update, start = [], set(), None, time.perf_counter()
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=common.ROOT, stdout=log, stderr=subprocess.STDOUT)
        while True:
            ended = process.poll() is not None
            if not first_update and any(
                b"charts/SPS" in file.read_bytes() for file in folder.glob("runs/*/events*")
            ):
                first_update = round(time.perf_counter() - start, 2)
            for checkpoint in sorted((folder / "runs").glob("*/checkpoints/*.npz")):
                if checkpoint.name not in seen:  # its policy.npz has been written before it
                    seen.add(checkpoint.name)
                    seconds = time.perf_counter() - start
                    copy = folder / f"policy_{len(policies)}.npz"
                    shutil.copy(checkpoint.parent.parent / "policy.npz", copy)
                    policies.append(
                        {"seconds": seconds, "iteration": int(checkpoint.stem), "file": copy}
                    )
            if ended:
                break
            if not evaluate and policies and policies[-1]["iteration"] == last_iteration(folder):
                process.kill()
                process.wait()
                break
            time.sleep(0.05)
    if process.returncode and (evaluate or process.returncode != -signal.SIGKILL):
        raise SystemExit((folder / "log.txt").read_text()[-3000:])
    run = read_run(folder) | {"first_update_s": first_update}
    del run["args"]["runs_dir"]  # a temporary folder, of no use to a reader
    return policies, run, time.perf_counter() - start


def train(args: Args, env_id: str, seed: int, folder: Path) -> tuple[list[dict], dict, float]:
    """What `watch` returns of one training."""
    command = [sys.executable, f"{args.script}.py", "--env-id", env_id, "--seed", str(seed)]
    command += ["--runs-dir", str(folder / "runs"), "--eval-every", "0"]
    command += ["--checkpoint-every", str(args.checkpoint_every)]
    if args.total_timesteps is not None:
        command += ["--total-timesteps", str(args.total_timesteps)]
    command += [
        "--compile-cache" if args.compile_cache else "--no-compile-cache",
        *args.flags.split(),
    ]
    return watch(command, folder, args.evaluate)


def measure(args: Args, env_id: str, seed: int) -> dict:
    """One training, and its policies' returns in Gymnasium."""
    with tempfile.TemporaryDirectory() as folder:
        policies, run, seconds = train(args, env_id, seed, Path(folder))
        if args.keep:
            (trained,) = (Path(folder) / "runs").iterdir()
            shutil.copytree(trained, Path(args.keep) / trained.name)
        spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of other threads
        with ProcessPoolExecutor(common.count_cores(), mp_context=spawn) as pool:
            jobs = [
                pool.submit(judge, args.script, env_id, policy["file"], args.episodes)
                for policy in policies
            ]
            returns = [job.result() for job in jobs]
    batch = run["args"]["num_envs"] * run["args"]["num_steps"]
    curve = [
        {"seconds": round(p["seconds"], 2), "steps": p["iteration"] * batch, "mean": statistics.mean(r),
         "std": statistics.pstdev(r)}
        for p, r in zip(policies, returns, strict=True)
    ]  # fmt: skip
    passed = {
        str(goal): next(
            ((point["seconds"], point["steps"]) for point in curve if point["mean"] >= goal), None
        )
        for goal in THRESHOLDS[env_id]
    }
    row = {"env_id": env_id, "seed": seed, "process_s": seconds, "first_update_s": run["first_update_s"],
           "passed": passed, "final": curve[-1]}  # fmt: skip
    return row | {"evaluation": run.get("evaluation"), "run": run, "curve": curve}


def main(args: Args) -> None:
    if args.smoke:
        args = dataclasses.replace(
            args, env_ids=args.env_ids[:1], seeds=(1,), total_timesteps=60_000, episodes=2
        )
    rows = []
    for seed in args.seeds:
        for env_id in args.env_ids:
            rows.append(measure(args, env_id, seed))
            print(json.dumps({name: rows[-1][name] for name in rows[-1] if name not in ("evaluation", "run", "curve")}),
                  flush=True)  # fmt: skip
    summary = {}
    for env_id in args.env_ids:
        mine = [row for row in rows if row["env_id"] == env_id]
        summary[env_id] = {"final": statistics.median(row["final"]["mean"] for row in mine),
                           "first_update_s": statistics.median(row["first_update_s"] for row in mine)}  # fmt: skip
        for goal in THRESHOLDS[env_id]:
            times = [row["passed"][str(goal)] for row in mine]
            seconds = sorted(t[0] if t else float("inf") for t in times)
            steps = sorted(t[1] if t else float("inf") for t in times)
            summary[env_id][f"seconds to {goal}"] = statistics.median(seconds)
            summary[env_id][f"steps to {goal}"] = statistics.median(steps)
    print(json.dumps(summary, indent=2))
    common.write(
        args.name, args, {"summary": summary, "rows": rows}, args.smoke, rows[0]["run"]["devices"]
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
