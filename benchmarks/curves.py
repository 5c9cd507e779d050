"""Learning curves of ppo_mjx.py, or sac_mjx.py, over tasks and seeds, each task with flags of its own.

    python benchmarks/curves.py                     all tasks with the script's own settings, five seeds
    python benchmarks/curves.py --resume            go on after an interruption, with the same flags
    python benchmarks/curves.py --name trial --flags "Hopper=--num-envs 128" "Walker2d=--gamma 0.995"
    python benchmarks/curves.py --script sac_mjx --env-ids HalfCheetah --total-timesteps 250000 --at-once 2 \
        --checkpoint-every 195

Each training is a process of its own that starts with an empty compile cache; its policies are copied while it trains
and judged when it has ended, in Gymnasium's v5 (all by time_to_return.py). With --at-once several of them share the
machine, as befits trainings that use one core. A row is written as soon as it is there. The table has the final
return's median and range over the seeds, and the peers' means beside it.
Writes benchmarks/results/NAME.json, NAME being curves or curves_sac by default: return against steps and against
seconds since the process's start.
"""

import dataclasses
import itertools
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import common
import time_to_return
import tyro

DEVICES = "import jax, json; print(json.dumps([device.device_kind for device in jax.devices()]))"
PEERS = {  # mean returns in Gymnasium, and the steps after which they were reached
    # CleanRL (v4), Tianshou (v3), RL-Zoo (v3) and SLM-Lab (v5) on a CPU, mjlab (v5) on a GPU
    "ppo_mjx": {
        "HalfCheetah": {
            "CleanRL, 1M": 1443,
            "Tianshou, 1M": 5784,
            "Tianshou, 3M": 7337,
            "mjlab, 167M": 6490,
        },
        "Hopper": {
            "CleanRL, 1M": 2383,
            "Tianshou, 1M": 2609,
            "Tianshou, 3M": 3128,
            "mjlab, 148M": 3100,
        },
        "Walker2d": {
            "CleanRL, 1M": 2288,
            "Tianshou, 1M": 3589,
            "Tianshou, 3M": 4896,
            "mjlab, 128M": 7046,
        },
        "Ant": {
            "CleanRL, 8M": 1824,
            "Tianshou, 1M": 3258,
            "Tianshou, 3M": 4079,
            "mjlab, 148M": 6294,
        },
        "Humanoid": {
            "CleanRL, 1M": 716,
            "Tianshou, 1M": 787,
            "Tianshou, 3M": 1360,
            "mjlab, 628M": 12049,
        },
        "HumanoidStandup": {
            "CleanRL, 8M": 109326,
            "SLM-Lab, 4M": 150105,
            "mjlab, 246M": 395345,
        },
        "Swimmer": {
            "CleanRL, 8M": 125,
            "Tianshou, 1M": 67,
            "RL-Zoo, 1M": 282,
            "mjlab, 145M": 342,
        },
        "InvertedPendulum": {
            "CleanRL, 1M": 963,
            "Tianshou, 1M": 1000,
            "mjlab, 30M": 1000,
        },
        "InvertedDoublePendulum": {
            "CleanRL, 8M": 5626,
            "SLM-Lab, 4-10M": 8384,
            "Tianshou, 1M": 9231,
            "mjlab, 49M": 9295,
        },
        "Reacher": {
            "SLM-Lab, 4-10M": -5.0,
            "Tianshou, 1M": -4.1,
            "Tianshou, 3M": -3.7,
            "mjlab, 92M": -3.47,
        },
        "Pusher": {
            "CleanRL, 1M": -40,
            "SLM-Lab, 4-10M": -50,
            "mjlab, 210M": -28.9,
        },
    },
    # FlashSAC and XQC (v4), arXiv:2604.04539's repository
    "sac_mjx": {
        "HalfCheetah": {
            "FlashSAC, 100k": 9815,
            "XQC, 200k": 9891,
            "FlashSAC, 200k": 10835,
            "FlashSAC, 1M": 14465,
        },
        "Hopper": {
            "FlashSAC, 100k": 2121,
            "XQC, 200k": 3527,
            "FlashSAC, 200k": 2061,
            "FlashSAC, 1M": 4064,
        },
        "Walker2d": {
            "FlashSAC, 100k": 3299,
            "XQC, 200k": 4832,
            "FlashSAC, 200k": 5311,
            "FlashSAC, 1M": 7346,
        },
        "Ant": {
            "FlashSAC, 100k": 3196,
            "XQC, 200k": 5349,
            "FlashSAC, 200k": 5272,
            "FlashSAC, 1M": 7590,
        },
        "Humanoid": {
            "FlashSAC, 100k": 6138,
            "XQC, 200k": 6626,
            "FlashSAC, 200k": 9640,
            "FlashSAC, 1M": 12606,
        },
    },
}


@dataclasses.dataclass
class Args:
    script: Literal["ppo_mjx", "sac_mjx"] = "ppo_mjx"
    env_ids: tuple[str, ...] | None = None  # tasks; by default all for which peers have published
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # one training of each task for each
    total_timesteps: int | None = None  # of each training; by default the script's for the task
    checkpoint_every: float = 0.04  # share of a training between policies; from 1 on iterations
    episodes: int = 20  # by which a policy is judged
    flags: tuple[str, ...] = ()  # further flags of the script for a task, as TASK=FLAGS
    at_once: int = 1  # trainings at the same time
    # Folder to which each training's run folder is copied, to film or compare its policy.
    keep: str | None = None
    resume: bool = False  # keep the rows that the file has already
    name: str | None = None  # of the JSON file
    smoke: bool = False  # one short training of one task


def settings(args: Args, env_id: str) -> time_to_return.Args:
    """A task's training, as time_to_return.py takes it."""
    flags = dict(pair.split("=", 1) for pair in args.flags).get(env_id, "")
    return time_to_return.Args(
        script=args.script, total_timesteps=args.total_timesteps, checkpoint_every=args.checkpoint_every,
        episodes=args.episodes, flags=flags, keep=args.keep)  # fmt: skip


def finished_rows(args: Args, devices: list[str]) -> list[dict]:
    """The file's rows; only those of the same trainings may go on."""
    folder = common.RESULTS if all(kind == "cpu" for kind in devices) else common.RESULTS / "gpu"
    file = folder / f"{args.name}{'_smoke' if args.smoke else ''}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for row in rows:
        if row["env_id"] in args.env_ids and row["settings"] != describe(args, row["env_id"]):
            raise SystemExit(
                f"--resume: {file} has a row of {row['env_id']} with other settings: {row['settings']}"
            )
    return rows


def describe(args: Args, env_id: str) -> dict:
    training = settings(args, env_id)
    return {
        name: getattr(training, name)
        for name in ("total_timesteps", "checkpoint_every", "episodes", "flags")
    }


def summarize(rows: list[dict], peers: dict[str, dict]) -> dict:
    """For each task: steps, final returns' median and range, seconds of a process."""
    summary = {}
    for env_id in dict.fromkeys(row["env_id"] for row in rows):
        mine = [row for row in rows if row["env_id"] == env_id]
        final = [row["final"]["mean"] for row in mine]
        summary[env_id] = {
            "seeds": len(mine), "steps": mine[0]["final"]["steps"], "median": statistics.median(final),
            "min": min(final), "max": max(final), "seconds": statistics.median(row["process_s"] for row in mine),
        } | peers[env_id]  # fmt: skip
    return summary


def main(args: Args) -> None:
    args.name = args.name or {"ppo_mjx": "curves", "sac_mjx": "curves_sac"}[args.script]
    args.env_ids = args.env_ids or tuple(PEERS[args.script])
    if args.smoke:
        args = dataclasses.replace(
            args, env_ids=("Hopper",), seeds=(1,), total_timesteps=60_000, episodes=2
        )
    tasks = [pair.split("=", 1)[0] for pair in args.flags]
    if unknown := [task for task in tasks if task not in PEERS[args.script]]:
        raise SystemExit(f"--flags: no such task: {unknown}")
    # A child, which leaves a GPU's memory to the trainings.
    devices = common.run_child([sys.executable, "-c", DEVICES])
    rows, failed = finished_rows(args, devices) if args.resume else [], []
    known = {(row["env_id"], row["seed"]) for row in rows}
    pairs = itertools.product(args.seeds, args.env_ids)
    missing = [(env_id, seed) for seed, env_id in pairs if (env_id, seed) not in known]

    def measure(pair: tuple[str, int]) -> dict | str:
        """A row, or of a training that failed, the end of its log."""
        env_id, seed = pair
        try:
            return time_to_return.measure(settings(args, env_id), env_id, seed)
        except SystemExit as error:
            return str(error)

    with ThreadPoolExecutor(args.at_once) as pool:
        for (env_id, seed), row in zip(missing, pool.map(measure, missing), strict=True):
            if isinstance(row, str):
                print(f"{env_id}, seed {seed}: training failed:\n{row}", flush=True)
                failed.append(f"{env_id} {seed}")
                continue
            rows.append(row | {"settings": describe(args, env_id)})
            final = row["final"]["mean"]
            print(
                f"{env_id}, seed {seed}: return {final:.0f} after {row['process_s']:.0f} s",
                flush=True,
            )
            peers = PEERS[args.script]
            result = {"peers": peers, "summary": summarize(rows, peers), "rows": rows}
            common.write(args.name, args, result, args.smoke, devices)
    # A table for each, since the peers' steps differ.
    for env_id, numbers in summarize(rows, PEERS[args.script]).items():
        common.table(["task", *numbers], [[env_id, *map(float, numbers.values())]])
        print()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
