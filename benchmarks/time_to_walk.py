"""Seconds, from the start of the process, until a robot's policy passes its test in C MuJoCo.

    python benchmarks/time_to_walk.py --robot go2 --seeds 1 2 3 4 5
    python benchmarks/time_to_walk.py --robot g1 --ablations --seeds 1 2 3
    python benchmarks/time_to_walk.py --script ppo_mjx_unitree_rough --robot go2

Each training is a process of its own that starts with an empty compile cache (--compile-cache: with
the user's). Its policies are copied while it trains. When all trainings have ended, the policies of
their later parts (--test-from) are put to the script's own test. `first_update_s` are the seconds
until the first iteration's metrics are in TensorBoard's file, `first_pass` is the first policy that
passes, `all_pass` the first one from which on all pass. So only the trainings need a quiet machine.

With --ablations each training lacks one trick, or has it in another form, and the last policies
alone are tested; --variants chooses.
With --keep FOLDER the trainings stay there; another call tests them again, from an earlier part
on, say, or trains the seeds that are missing.

--script trains another robot script, which is put to its own test.

Writes benchmarks/results/NAME.json, NAME being time_to_walk_ROBOT by default (ROBOT_ablations; of
another script time_SCRIPT_ROBOT and SCRIPT_ROBOT_ablations), and the last policy of the first seed to --policy.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import common
import numpy as np
import tyro
from time_to_return import watch

FLAT = "ppo_mjx_unitree"
AMP = "amp_mjx_unitree"


class Variant(NamedTuple):
    """A training that lacks a trick, or has it in another form."""

    flags: str = ""
    weights: dict[str, float] = {}  # of the reward, where they differ
    mirror: bool = True  # the networks see the world in the mirror


VARIANTS = {
    FLAT: {
        "as it is": Variant(),
        "no mirror": Variant(mirror=False),
        "no imitation loss": Variant("--imitation-coef 0"),
        "no curriculum": Variant("--curriculum 0"),
        "no gait reward": Variant(weights={"gait": 0.0}),
        "no rewards of standing": Variant(
            weights={"lifted_standing": 0.0, "capture": 0.0, "standing_pose": 0.0}
        ),
        "fixed step size, 1e-3 to 0": Variant("--desired-kl None --learning-rate 1e-3"),
        "nothing randomised": Variant(
            "--obs-noise 0 --push-speed 0 --friction 1 1 --added-mass 0 0 --shifted-center 0 "
            "--gain-noise 0 --strength-noise 0 --action-delay 0"
        ),
    },
    AMP: {
        "as it is": Variant(),
        "no gradient penalty": Variant("--grad-penalty 0"),
        "four frames": Variant("--num-frames 4"),
        "more style, task share 0.3": Variant("--task-share 0.3"),
        "no style, task share 1": Variant("--task-share 1"),
        "a replay of one rollout": Variant("--replay-size 1024"),
        "more action noise": Variant("--init-log-std -1.0"),
        "less action noise": Variant("--init-log-std -2.2"),
    },
}
# What the tests say of a policy; not each script's has all of them.
RESULTS = ("passed", "falls", "crossed", "error", "yaw", "drift")


@dataclasses.dataclass
class Args:
    script: Literal["ppo_mjx_unitree", "ppo_mjx_unitree_rough", "amp_mjx_unitree"] = FLAT
    robot: str = "g1"
    seeds: tuple[int, ...] = (1,)
    checkpoint_every: float = 0.1  # share of the training between two policies
    test_from: float = 0.5  # share of the training from which on policies are tested
    flags: str = ""  # further flags for the script
    # Trainings that lack a trick, of which the last policies alone are tested.
    ablations: bool = False
    variants: tuple[str, ...] = ()  # which ones; none named: all of the script
    name: str | None = None  # of the JSON file
    policy: str | None = None  # where the last policy of the first seed is copied to
    keep: str | None = None  # folder for the trainings; those that it has already are tested only
    compile_cache: bool = False  # take compiled programs from the cache, and keep them
    smoke: bool = False  # one short run of each variant


def child(script: str, robot: str, variant: str, argv: list[str]) -> None:
    """What the training process runs: the script, with one trick left out."""
    module = importlib.import_module(script)
    chosen = VARIANTS[script][variant] if script in VARIANTS else Variant()
    row = module.ROBOTS[robot]
    module.ROBOTS[robot] = dataclasses.replace(row, weights=row.weights | chosen.weights)
    if not chosen.mirror:
        rules = module.mirror_rules
        module.in_mirror = lambda robot, command, elapsed: elapsed < 0
        module.mirror_rules = lambda robot: (
            rules(robot) | {"mirror_when": 0 * rules(robot)["mirror_when"]}
        )
    module.finish = lambda *_: {}  # tested below
    module.main(["--robot", robot, *argv])


def judge(script: str, robot: str, file: Path) -> dict:
    """The script's own test."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    module = importlib.import_module(script)
    with np.load(file) as arrays, contextlib.redirect_stdout(io.StringIO()):
        return module.judge(module.ROBOTS[robot], dict(arrays))


def train(args: Args, variant: str, seed: int, folder: Path) -> tuple[list[dict], dict, float]:
    """What `watch` returns of one training, which is kept in the folder."""
    flags = ["--seed", str(seed), "--checkpoint-every", str(args.checkpoint_every)]
    if args.script in VARIANTS:
        flags += VARIANTS[args.script][variant].flags.split()
    flags += ["--compile-cache" if args.compile_cache else "--no-compile-cache"]
    flags += args.flags.split()

    kept = folder / "training.json"
    if not kept.exists():
        shutil.rmtree(folder, ignore_errors=True)  # a training that was stopped
        folder.mkdir(parents=True)
        command = [sys.executable, __file__, "--child", args.script, args.robot, variant, *flags]
        curve, run, seconds = watch([*command, "--runs-dir", str(folder / "runs")], folder)
        curve = [policy | {"file": policy["file"].name} for policy in curve]
        training = {"flags": flags, "curve": curve, "run": run, "seconds": seconds}
        kept.write_text(json.dumps(training))

    training = json.loads(kept.read_text())
    if training["flags"] != flags:
        raise SystemExit(f"--keep: {folder} was trained with {' '.join(training['flags'])}")
    curve = [policy | {"file": folder / policy["file"]} for policy in training["curve"]]
    return curve, training["run"], training["seconds"]


def milestones(curve: list[dict]) -> dict[str, dict | None]:
    """The first policy that passes, and the first one from which on all pass."""
    passed = [policy["passed"] for policy in curve]
    all_pass = next((i for i in range(len(curve)) if all(passed[i:])), None)
    return {
        "first_pass": curve[passed.index(True)] if any(passed) else None,
        "all_pass": None if all_pass is None else curve[all_pass],
    }


def test(args: Args, seed: int, training: tuple[list[dict], dict, float]) -> dict:
    """The tests of one training's policies, as `train` returns it: a row of the result."""
    curve, run, seconds = training
    batch = run["args"]["num_envs"] * run["args"]["num_steps"]
    iterations = run["args"]["total_timesteps"] // batch
    last = curve[-1]
    # One that was saved just before the last is as good as the same.
    latest = iterations * (1 - args.checkpoint_every / 2)
    chosen = [policy for policy in curve if policy["iteration"] <= latest]
    since = iterations * (args.test_from - args.checkpoint_every / 2)
    chosen = [policy for policy in chosen if policy["iteration"] >= since]
    curve = [last] if args.ablations else [*chosen, last]
    with ProcessPoolExecutor(common.count_cores()) as pool:
        files = [policy["file"] for policy in curve]
        results = list(pool.map(partial(judge, args.script, args.robot), files))
    if args.policy and seed == args.seeds[0] and not args.ablations:
        shutil.copy(files[-1], args.policy)

    for policy, result in zip(curve, results, strict=True):
        policy |= {"steps": policy.pop("iteration") * batch}
        policy |= {key: result[key] for key in RESULTS if key in result}
        policy.pop("file")
    return {
        "seed": seed,
        "process_s": round(seconds, 1),
        "first_update_s": run["first_update_s"],
        **milestones(curve),
        "passing": sum(policy["passed"] for policy in curve),
        "final": curve[-1],
        "curve": curve,
        "final_table": results[-1]["table"],
        "run": run,
    }


def summarise(rows: list[dict]) -> dict:
    """Medians over the seeds; None for seconds where too few of the trainings passed."""

    def seconds(row: dict, milestone: str) -> float:
        return row[milestone]["seconds"] if row[milestone] else float("inf")

    told = [key for key in RESULTS[1:] if key in rows[0]["final"]]
    summary = {key: statistics.median(row["final"][key] for row in rows) for key in told}
    summary["first_update_s"] = statistics.median(row["first_update_s"] for row in rows)
    for milestone in ("first_pass", "all_pass"):
        median = statistics.median(seconds(row, milestone) for row in rows)
        summary[f"{milestone}_s"] = median if math.isfinite(median) else None
    summary["passed at the end"] = sum(row["final"]["passed"] for row in rows)
    return summary


def main(args: Args) -> None:
    if args.variants and not args.ablations:
        raise SystemExit("--variants: needs --ablations")
    if args.ablations and args.script not in VARIANTS:
        raise SystemExit(f"--ablations: {args.script}.py has none")
    known = list(VARIANTS.get(args.script, {}))
    unknown = set(args.variants) - set(known)
    if unknown:
        raise SystemExit(f"--variants: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    variants = (args.variants or known) if args.ablations else ["as it is"]
    if args.smoke:
        short = {"seeds": (1,), "flags": "--total-timesteps 30000", "checkpoint_every": 1.0}
        args = dataclasses.replace(args, **short)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        trainings = {}
        for seed in args.seeds:
            for variant in variants:
                label = f"{args.robot}, {variant}, seed {seed}"
                if args.script != FLAT:
                    label = f"{args.script}, {label}"
                folder = Path(args.keep or temporary, label)
                trainings[seed, variant] = train(args, variant, seed, folder)
                print(f"{variant}, seed {seed}: {trainings[seed, variant][2]:.0f} s", flush=True)

        for (seed, variant), training in trainings.items():
            row = {"variant": variant} | test(args, seed, training)
            rows.append(row)
            shown = {key: row[key] for key in row if key not in ("curve", "final_table", "run")}
            print(json.dumps(shown), flush=True)

            summary = {
                variant: summarise([row for row in rows if row["variant"] == variant])
                for variant in dict.fromkeys(row["variant"] for row in rows)
            }
            usual = f"time_to_walk_{args.robot}"
            if args.script != FLAT:
                usual = f"time_{args.script}_{args.robot}"
            if args.ablations:
                usual = f"{args.robot}_ablations"
                if args.script != FLAT:
                    usual = f"{args.script}_{usual}"
            name = args.name or usual
            result = {"summary": summary, "rows": rows}
            common.write(name, args, result, args.smoke, rows[0]["run"]["devices"])
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:5], sys.argv[5:])
    else:
        main(tyro.cli(Args))
