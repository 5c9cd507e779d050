"""Seconds until SAC's policy is good in Gymnasium's own Pendulum-v1: ours, Stable-Baselines3's and SBX's in turn.

    pip install -r benchmarks/requirements.txt
    python benchmarks/compare_sac.py --seeds 1 2 3 4 5

Each training is a process of its own that starts with an empty compile cache. Ours keeps its policy after each
iteration; when it has ended they are judged in their order up to the first that passes, and so is the last one. The
peers, with RL-Zoo's settings for Pendulum-v1, are judged every 500 steps, and the seconds that this takes are not
counted; the first pass ends their training. A judgement is 200 deterministic episodes from fixed seeds. In a median, a
training that never passes counts as infinitely long.
Writes benchmarks/results/NAME.json after each training.
"""

import time

START = time.perf_counter()

import dataclasses
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

import common
import gymnasium
import numpy as np
import tyro


@dataclasses.dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    peer_seeds: int = 5  # seeds of each peer, which take longer
    peers: tuple[str, ...] = ("sb3", "sbx")
    threshold: float = -155.0  # RL-Zoo's SAC: -157 after 20k steps
    episodes: int = 200
    torch_threads: int | None = None  # of Stable-Baselines3; by default torch's own choice
    flags: str = ""  # further flags of sac_mjx_pendulum.py
    name: str = "compare_sac"  # of the JSON file
    smoke: bool = False  # one short run of ours
    child: str | None = None  # name of the one to train in this process


def judge(act, episodes: int) -> float:
    """Mean return of episodes in Gymnasium's Pendulum-v1, all at once. act: observations [E, 3] -> torques [E, 1]."""
    envs = gymnasium.make_vec("Pendulum-v1", episodes, vectorization_mode="sync")
    (obs, _), total = envs.reset(seed=1_000_000), np.zeros(episodes)
    for _ in range(200):
        obs, reward, *_ = envs.step(np.asarray(act(obs), np.float32))
        total += reward
    return float(total.mean())


def ours(args: Args) -> dict:
    """Train by the functions that `train` calls, without its files."""
    import jax

    import sac_mjx_pendulum as sac

    common.make_mesh()  # starts JAX with all cores
    settings = sac.parse_args([f"--seed={args.seeds[0]}", *args.flags.split()])
    mesh = sac.make_mesh(settings.num_devices, settings.num_envs, settings.batch_size)
    env = sac.Env(settings)
    settings = dataclasses.replace(settings, num_devices=mesh.size)
    state = sac.init_train_state(settings, env, mesh, jax.random.key(settings.seed))
    compile_start = time.perf_counter()
    run_iteration = sac.train_iteration.lower(settings, env, mesh, state).compile()
    compile_s, policies = time.perf_counter() - compile_start, []
    for _ in range(settings.num_iterations):
        state, _ = run_iteration(state)
        policy = sac.export_policy(env, state.learner)  # waits for the device
        policies.append((time.perf_counter() - START, policy))
    row = {"seconds": None, "steps": None, "compile_s": compile_s, "end_s": policies[-1][0]}
    for i, (seconds, policy) in enumerate(policies):
        if (
            judge(lambda obs, policy=policy: sac.act(policy, (), obs)[1], args.episodes)
            >= args.threshold
        ):
            row |= {"seconds": seconds, "steps": (i + 1) * settings.steps_per_iteration}
            row["training_s"] = (
                seconds - policies[0][0] + (policies[-1][0] - policies[0][0]) / (len(policies) - 1)
            )
            break
    value = judge(lambda obs: sac.act(policies[-1][1], (), obs)[1], args.episodes)
    return row | {
        "return_at_end": value,
        "devices": [device.device_kind for device in mesh.devices],
    }


def peer(args: Args) -> dict:
    """SAC of Stable-Baselines3 or SBX, with RL-Zoo's settings."""
    if args.child == "sb3":
        import torch
        from stable_baselines3 import SAC

        if args.torch_threads:
            torch.set_num_threads(args.torch_threads)
    else:
        from sbx import SAC
    from stable_baselines3.common.callbacks import BaseCallback

    class Judge(BaseCallback):
        """Stops the training once the policy passes."""

        paused, value = 0.0, -np.inf

        def _on_step(self) -> bool:
            if self.num_timesteps % 500 == 0:
                pause = time.perf_counter()
                self.value = judge(
                    lambda obs: self.model.predict(obs, deterministic=True)[0], args.episodes
                )
                self.paused += time.perf_counter() - pause
            return self.value < args.threshold

    model = SAC("MlpPolicy", "Pendulum-v1", learning_rate=1e-3, seed=args.seeds[0])
    callback = Judge()
    learn_start = time.perf_counter()
    model.learn(20_000, callback=callback)
    end = time.perf_counter() - callback.paused
    passed = callback.value >= args.threshold
    return {
        "seconds": end - START if passed else None,
        "steps": model.num_timesteps if passed else None,
        "training_s": end - learn_start,
        "end_s": end - START,
        "return_at_end": callback.value,
    }


def run_child(args: Args, name: str, seed: int) -> dict:
    """One training in a process of its own, with an empty compile cache."""
    flags = f"--total-timesteps 40960 {args.flags}" if args.smoke else args.flags
    command = [sys.executable, str(Path(__file__).resolve()), f"--child={name}", f"--seeds={seed}",
               f"--episodes={args.episodes}", f"--threshold={args.threshold}", f"--flags={flags}",
               f"--torch-threads={args.torch_threads}"]  # fmt: skip
    with tempfile.TemporaryDirectory() as cache:
        row = {"seed": seed} | common.run_child(command, **common.caches(cache))
    print(
        name,
        {key: round(x, 2) if isinstance(x, float) else x for key, x in row.items()},
        flush=True,
    )
    return row


def main(args: Args) -> None:
    if args.child:
        return print("\n" + json.dumps(ours(args) if args.child == "ours" else peer(args)))
    if args.smoke:
        args = dataclasses.replace(args, seeds=(1,), peers=(), episodes=10)
    rows, failed, devices = {name: [] for name in ("ours", *args.peers)}, [], ["cpu"]
    for i, seed in enumerate(args.seeds):
        for name in rows:
            if name != "ours" and i >= args.peer_seeds:
                continue
            try:
                row = run_child(args, name, seed)
            except RuntimeError as error:
                failed.append({"name": name, "seed": seed, "error": str(error)})
                print(f"FAIL {name} {seed}: {error}", file=sys.stderr, flush=True)
            else:
                devices = row.pop("devices", devices)
                rows[name].append(row)
            common.write(args.name, args, {"runs": rows, "failed": failed}, args.smoke, devices)
    for name, runs in rows.items():
        for key in ("seconds", "training_s", "steps", "return_at_end"):
            values = [math.inf if run.get(key) is None else run[key] for run in runs]
            print(
                f"{name:5} {key:14} median {statistics.median(values or [math.nan]):10.2f} of {len(values)}"
            )
    if failed:
        sys.exit(f"{len(failed)} runs have failed")


if __name__ == "__main__":
    main(tyro.cli(Args))
