"""Our PPO beside its peers on HalfCheetah: training speed, seconds to a return, and lines to read.

    pip install -r benchmarks/requirements.txt
    python benchmarks/compare_ppo.py
    python benchmarks/compare_ppo.py --modes return --peers brax_our_env sbx sb3 --name compare_ppo_return

The peers: Brax's PPO on our environment (brax_our_env) and on its own HalfCheetah (brax_own), Stable-Baselines3 (sb3,
PyTorch on the CPU) and SBX (sbx, its sibling in JAX), both on Gymnasium's HalfCheetah-v5. Each run is a process of its
own, and they take turns.
speed: environment steps/s of training, with our settings for all: worlds, rollout, minibatches, epochs, two tanh layers
of 64 for actor and critic each, a Gaussian with a free standard deviation, normalised observations. The JAX ones on our
environment and Brax's use all devices; what is timed are blocks of the same number of steps, after two that also
compile. Brax has no learning rate that falls and no normalised rewards; the other two have both, as ours has.
return: seconds from the start of the process, compile included (its cache is empty), until the deterministic policy
reaches a mean return in Gymnasium's HalfCheetah-v5. Policies are kept while training (seconds not counted) and judged
at its end. SB3 and SBX have RL-Zoo's tuned settings for HalfCheetah, Brax and ours those of `speed`, so Brax's are not
tuned for this task.
lines: all lines, blank ones and comments too, of the files of the package in which a function is called in a short
training. For SBX those are SBX and SB3. Ours holds the environment; for the peers no environment is counted but
brax_own's. JAX, MuJoCo and onekernel are counted for no one. Writes benchmarks/results/NAME.json after each run.
"""

import time

START = time.perf_counter()

import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import inspect
import io
import json
import math
import statistics
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import Literal

import common
import numpy as np
import tyro

Mode = Literal["speed", "return", "lines"]
PACKAGES = {  # whose lines count; imported before they are traced
    "ours": ("ppo_mjx",), "brax_our_env": ("brax.training.agents.ppo.train",),
    "brax_own": ("brax.training.agents.ppo.train",), "sb3": ("stable_baselines3",), "sbx": ("sbx", "stable_baselines3"),
}  # fmt: skip
GOALS = (1000, 2000, 3000)  # mean returns
WARMUPS = 2  # blocks; Brax compiles in the first and again in the second


@dataclasses.dataclass
class Args:
    modes: tuple[Mode, ...] = ("speed", "lines")  # what to measure
    # Besides ours; by default all.
    peers: tuple[Literal["brax_our_env", "brax_own", "sb3", "sbx"], ...] | None = None
    rounds: int = 3  # of `speed`; each runs everyone once
    num_envs: int = 256  # worlds of everyone in `speed`; of ours and Brax's in `return`
    iterations: int = 10  # rollouts with their updates in one timed block of `speed`
    blocks: int = 3  # timed blocks of a run
    seeds: tuple[int, ...] = (1,)  # of `return`
    total_timesteps: int = 1_000_000  # of `return`, rounded down to whole blocks
    judge_every: int = 4  # our iterations between two policies of `return`
    episodes: int = 20  # to judge a policy
    # Physics of brax_own.
    brax_backend: Literal["mjx", "generalized", "spring", "positional"] = "mjx"
    # Worlds of SB3 and SBX: in turn, or each in a process of its own.
    vec_env: Literal["dummy", "subproc"] = "dummy"
    torch_threads: int = 1  # of SB3; for such small networks more only wait for each other
    name: str = "compare_ppo"  # of the JSON file
    smoke: bool = False  # `return` in short, with the peers that are installed
    child: str | None = None  # the one to train in this process, by the first mode and seed


class Watch:
    """Called by a training after each block of steps: notes the seconds, and keeps the policy where it is asked to.
    What itself takes is not counted."""

    def __init__(self, keep: bool):
        self.keep, self.paused, self.points, self.policies = keep, 0.0, [], []

    def __call__(self, steps: int, snapshot) -> None:
        """snapshot: keeps the policy, and returns a function that gives it back, as observations -> actions."""
        now = time.perf_counter()
        self.points.append({"seconds": now - START - self.paused, "steps": steps})
        if self.keep:
            self.policies.append(snapshot())
        self.paused += time.perf_counter() - now


def settings(args: Args, block: int, blocks: int):
    """Our settings, for so many blocks of so many iterations, on as many devices as both we and Brax can use."""
    import ppo_mjx as ppo

    common.make_mesh()  # tells JAX how many devices a CPU is
    share = ppo.make_mesh(None, args.num_envs, args.num_envs // ppo.Args.num_minibatches).size
    ours = ppo.Args(num_envs=args.num_envs, seed=args.seeds[0], num_devices=share)
    return dataclasses.replace(ours, total_timesteps=ours.steps_per_iteration * block * blocks)


def train_ours(args: Args, watch: Watch, block: int, blocks: int) -> None:
    import jax

    import ppo_mjx as ppo

    ours = settings(args, block, blocks)
    mesh, env = ppo.make_mesh(ours.num_devices, ours.num_envs), ppo.Env(ours)
    shardings = jax.tree.map(partial(jax.sharding.NamedSharding, mesh), ppo.STATE_SPEC)
    init = jax.jit(ppo.init_train_state, static_argnames=("args", "env"), out_shardings=shardings)
    state = init(ours, env, jax.random.key(ours.seed))

    def snapshot():
        policy = ppo.export_policy(env, state.learner)
        return lambda: partial(ppo.act, policy)

    for i in range(blocks):
        for _ in range(block):
            state, _ = ppo.train_iteration(ours, env, mesh, state)
        jax.block_until_ready(state)
        watch((i + 1) * block * ours.steps_per_iteration, snapshot)


def adapt(env):
    """Our environment with Brax's interface, as kernels by onekernel, as in our training."""
    import jax.numpy as jnp
    from brax.envs import Env, State

    from ppo_mjx import kernel

    class Adapted(Env):
        observation_size, action_size, backend = env.observation_size, env.action_size, "ppo_mjx"

        def reset(self, rng):
            state = kernel(env.reset)(rng)
            return State(state, state.obs, state.reward, state.done, state.metrics)

        def step(self, state, action):
            # Brax's Gaussian knows no bounds.
            new = kernel(env.step)(state.pipeline_state, jnp.clip(action, -1.0, 1.0))
            return state.replace(
                pipeline_state=new, obs=new.obs, reward=new.reward, done=new.done, metrics=new.metrics)  # fmt: skip

    return Adapted()


def train_brax(args: Args, watch: Watch, block: int, blocks: int) -> None:
    import jax
    from brax import envs
    from brax.training.agents.ppo import networks, train
    from flax import linen

    import ppo_mjx as ppo

    ours = settings(args, block, blocks)
    if args.child == "brax_own":
        env = envs.get_environment("halfcheetah", backend=args.brax_backend)
    else:
        env = adapt(ppo.Env(ours))

    def keep(steps: int, make_policy, params) -> None:
        def snapshot():
            kept = jax.device_get(params)

            def load():
                policy, key = jax.jit(make_policy(kept, deterministic=True)), jax.random.key(0)
                return lambda obs: policy(obs.astype(np.float32), key)[0]

            return load

        if steps:  # it is called before training, too
            watch(steps, snapshot)

    make_networks = partial(
        networks.make_ppo_networks, policy_hidden_layer_sizes=ours.hidden_sizes, activation=linen.tanh,
        value_hidden_layer_sizes=ours.hidden_sizes, distribution_type="normal", noise_std_type="log",
        init_noise_std=math.exp(ours.init_log_std))  # fmt: skip
    train.train(
        env, ours.total_timesteps, max_devices_per_host=ours.num_devices, seed=ours.seed, num_envs=ours.num_envs,
        episode_length=1000, unroll_length=ours.num_steps, num_minibatches=ours.num_minibatches,
        batch_size=ours.num_envs // ours.num_minibatches,  # whole unrolls, so each minibatch is as large as ours
        num_updates_per_batch=ours.update_epochs, learning_rate=ours.learning_rate, discounting=ours.gamma,
        gae_lambda=ours.gae_lambda, clipping_epsilon=ours.clip_coef, entropy_cost=ours.ent_coef,
        vf_loss_coefficient=ours.vf_coef, max_grad_norm=ours.max_grad_norm, normalize_observations=True,
        network_factory=make_networks, policy_params_fn=keep, run_evals=False, num_evals=blocks + 1)  # fmt: skip


def train_sb(args: Args, watch: Watch, block: int, blocks: int) -> None:
    """SB3 or SBX, with our settings, or for `return` with RL-Zoo's."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

    if args.child == "sb3":
        import torch
        from stable_baselines3 import PPO

        torch.set_num_threads(args.torch_threads)
        tanh, relu = torch.nn.Tanh, torch.nn.ReLU
    else:
        from flax import linen
        from sbx import PPO

        tanh, relu = linen.tanh, linen.relu
    if args.modes[0] == "return":  # github.com/DLR-RM/rl-baselines3-zoo, hyperparams/ppo.yml
        # Ours; not imported, as that takes time.
        num_envs, steps_per_iteration = 1, args.num_envs * 16
        flags = {
            "n_steps": 512, "batch_size": 64, "gamma": 0.98, "learning_rate": 2.0633e-05, "ent_coef": 0.000401762,
            "clip_range": 0.1, "n_epochs": 20, "gae_lambda": 0.92, "max_grad_norm": 0.8, "vf_coef": 0.58096,
        }  # fmt: skip
        hidden = [256, 256]
        network = {"activation_fn": relu, "log_std_init": -2.0, "ortho_init": False}
    else:
        import ppo_mjx as ppo

        ours = ppo.Args(num_envs=args.num_envs)
        num_envs, steps_per_iteration = ours.num_envs, ours.steps_per_iteration
        flags = {
            "n_steps": ours.num_steps, "batch_size": steps_per_iteration // ours.num_minibatches, "gamma": ours.gamma,
            "learning_rate": lambda left: left * ours.learning_rate, "ent_coef": ours.ent_coef,
            "clip_range": ours.clip_coef, "n_epochs": ours.update_epochs, "gae_lambda": ours.gae_lambda,
            "max_grad_norm": ours.max_grad_norm, "vf_coef": ours.vf_coef,
        }  # fmt: skip
        hidden = list(ours.hidden_sizes)
        network = {"activation_fn": tanh, "log_std_init": ours.init_log_std}
    network["net_arch"] = {"pi": hidden, "vf": hidden}
    worlds = SubprocVecEnv if args.vec_env == "subproc" else DummyVecEnv
    env = make_vec_env("HalfCheetah-v5", num_envs, seed=args.seeds[0], vec_env_cls=worlds)
    env = VecNormalize(env, gamma=flags["gamma"])
    model = PPO("MlpPolicy", env, seed=args.seeds[0], device="cpu", policy_kwargs=network, **flags)

    def snapshot():
        stats, policy = copy.deepcopy(env.obs_rms), model.policy
        if args.child == "sb3":
            params = {name: value.clone() for name, value in policy.state_dict().items()}
        else:
            params = policy.actor_state

        def load():
            if args.child == "sb3":
                policy.load_state_dict(params)
            else:
                policy.actor_state = params
            env.obs_rms = stats
            return lambda obs: policy.predict(env.normalize_obs(obs), deterministic=True)[0]

        return load

    class Callback(BaseCallback):
        """Tells the watch when a block and its last update are done."""

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            if (
                self.model.num_timesteps
                and self.model.num_timesteps % (block * steps_per_iteration) == 0
            ):
                watch(self.model.num_timesteps, snapshot)

        _on_training_end = _on_rollout_start

    model.learn(blocks * block * steps_per_iteration, callback=Callback())
    env.close()


def judge(act, episodes: int) -> float:
    """Mean return of episodes in Gymnasium's HalfCheetah-v5, all at once; they end by the time limit alone."""
    import gymnasium

    envs = gymnasium.make_vec("HalfCheetah-v5", episodes, vectorization_mode="sync")
    (obs, _), total = envs.reset(seed=1_000_000), np.zeros(episodes)
    for _ in range(1000):
        obs, reward, *_ = envs.step(np.clip(act(obs), -1.0, 1.0))
        total += reward
    envs.close()
    return float(total.mean())


def count_lines(packages: tuple[str, ...], train) -> dict:
    """Lines of the packages' files in which a function is called by train()."""
    origins = [
        Path(importlib.import_module(package.split(".")[0]).__file__) for package in packages
    ]
    roots = [origin.parent if origin.name == "__init__.py" else origin for origin in origins]
    for package in packages:
        importlib.import_module(package)
    files = set()

    def trace(frame, *_) -> None:
        # A function, not the body of a module or class.
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            files.add(frame.f_code.co_filename)

    threading.settrace(trace)
    sys.settrace(trace)
    train()
    sys.settrace(None)
    threading.settrace(None)
    lines = {}
    for file in map(Path, sorted(files)):
        for root in roots:
            if file.is_relative_to(root):
                lines[file.relative_to(root.parent).as_posix()] = len(file.read_text().splitlines())
    return {"lines": sum(lines.values()), "files": len(lines), "by_file": lines}


def child(args: Args) -> dict:
    """One run: of the first mode, with the first seed."""
    mode, watch = args.modes[0], Watch(keep=args.modes[0] == "return")
    train = {"ours": train_ours, "sb3": train_sb, "sbx": train_sb}.get(args.child, train_brax)
    block, blocks = args.iterations, WARMUPS + args.blocks
    if mode == "return":
        block = args.judge_every
        blocks = args.total_timesteps // (args.num_envs * 16 * args.judge_every)
    elif mode == "lines":
        block, blocks = 1, WARMUPS + 1
    if mode == "lines":
        row = count_lines(PACKAGES[args.child], lambda: train(args, watch, block, blocks))
    else:
        train(args, watch, block, blocks)
    if len(watch.points) != blocks:
        raise RuntimeError(f"{args.child}: {len(watch.points)} blocks, not {blocks}")
    if mode == "speed":
        times = [point["seconds"] for point in watch.points[WARMUPS - 1 :]]
        seconds, steps = np.diff(times).tolist(), watch.points[0]["steps"]
        row = {"steps/s": steps / statistics.median(seconds), "steps": steps, "seconds": seconds}
    elif mode == "return":
        loads = watch.policies
        curve = [
            p | {"return": judge(load(), args.episodes)}
            for p, load in zip(watch.points, loads, strict=True)
        ]
        row = {
            "final": curve[-1]["return"],
            "end_s": curve[-1]["seconds"],
            "steps": curve[-1]["steps"],
        }
        row |= {f"to {goal}": reached(curve, goal) for goal in GOALS} | {"curve": curve}
    kinds = ["cpu"]
    if args.child != "sb3":
        import jax

        kinds = [device.device_kind for device in jax.devices()]
    return row | {"devices": kinds}


def reached(curve: list[dict], goal: float) -> float | None:
    return next((point["seconds"] for point in curve if point["return"] >= goal), None)


def median(values: list) -> float | None:
    """Of seconds, where None is never."""
    middle = statistics.median([math.inf if value is None else value for value in values])
    return None if math.isinf(middle) else middle


def pairs(runs: dict, name: str) -> list[tuple[dict, dict]]:
    """Ours and the peer's, of those rounds or seeds in which neither failed."""
    ours = {row["turn"]: row for row in runs["ours"]}
    return [(ours[row["turn"]], row) for row in runs[name] if row["turn"] in ours]


def summarise(mode: str, runs: dict[str, list[dict]]) -> dict[str, dict]:
    summary = {}
    for name, rows in runs.items():
        both = pairs(runs, name)
        if rows and mode == "lines":
            summary[name] = {"lines": rows[0]["lines"], "files": rows[0]["files"]}
        elif rows and mode == "speed":
            speeds = [[row["steps/s"] for row in side] for side in zip(*both, strict=True)]
            summary[name] = {
                "steps/s": statistics.median(row["steps/s"] for row in rows),
                "ours / this": common.ratio(*speeds) if both else None,
            }
        elif rows:
            faster = []
            for ours, row in both:  # to the return that this one has at its end
                us, them = reached(ours["curve"], row["final"]), reached(row["curve"], row["final"])
                faster.append(None if us is None else them / us)
            never = [0.0 if value is None else value for value in faster]
            summary[name] = {
                **{f"s to {goal}": median([row[f"to {goal}"] for row in rows]) for goal in GOALS},
                "final return": statistics.median(row["final"] for row in rows),
                "all s": statistics.median(row["end_s"] for row in rows),
                "ours is faster to its final return by": (statistics.median(never) or None) if never else None,
            }  # fmt: skip
    return summary


def main(args: Args) -> None:
    if args.child:
        return print("\n" + json.dumps(child(args)))
    peers = tuple(PACKAGES)[1:] if args.peers is None else args.peers
    missing = [
        name for name in peers if not importlib.util.find_spec(PACKAGES[name][0].split(".")[0])
    ]
    if missing and (args.peers or not args.smoke):
        sys.exit(
            f"error: not installed: {', '.join(missing)}; pip install -r benchmarks/requirements.txt"
        )
    if missing:
        print(f"left out, as they are not installed: {', '.join(missing)}")
    if args.smoke:
        common.hardly_optimise()
        args = dataclasses.replace(args, modes=("return",), num_envs=64, seeds=(1,), total_timesteps=1024,
                                   judge_every=1, episodes=1)  # fmt: skip
    names = ["ours", *(name for name in peers if name not in missing)]
    # Brax's own HalfCheetah is another model, so its policies cannot be judged in Gymnasium's.
    runs = {
        mode: {name: [] for name in names if (mode, name) != ("return", "brax_own")}
        for mode in args.modes
    }
    turns, failed = {"speed": range(args.rounds), "return": args.seeds, "lines": (0,)}, []
    flags = [f"--brax-backend={args.brax_backend}", f"--vec-env={args.vec_env}"]
    for name in (
        "num_envs",
        "iterations",
        "blocks",
        "total_timesteps",
        "judge_every",
        "episodes",
        "torch_threads",
    ):
        flags.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
    with tempfile.TemporaryDirectory() as shared:
        for mode, turn, name in [
            (m, turn, name) for m in args.modes for turn in turns[m] for name in runs[m]
        ]:
            seed = turn if mode == "return" else 1
            command = [
                sys.executable,
                str(Path(__file__).resolve()),
                *flags,
                "--child",
                name,
                "--modes",
                mode,
            ]
            with tempfile.TemporaryDirectory() as empty:
                cache = shared if args.smoke else empty
                try:
                    row = common.run_child([*command, "--seeds", str(seed)], **common.caches(cache))
                except RuntimeError as error:
                    failed.append({"mode": mode, "name": name, "turn": turn, "error": str(error)})
                    print(f"FAIL {mode} {name} {turn}: {error}", file=sys.stderr, flush=True)
                else:
                    runs[mode][name].append({"turn": turn} | row)
                    note = {
                        key: row[key]
                        for key in ("steps/s", "final", "end_s", "lines")
                        if key in row
                    }
                    print(f"{mode} {name} {turn}: {note}", flush=True)
            save(args, runs, failed)
    for mode in args.modes:
        rows = summarise(mode, runs[mode])
        if rows:
            print(f"\n{mode}")
            common.table(
                ["", *next(iter(rows.values()))],
                [[name, *row.values()] for name, row in rows.items()],
            )
    if failed:
        sys.exit(f"{len(failed)} runs have failed")


def save(args: Args, runs: dict, failed: list) -> None:
    """Write what there is; JAX is not asked for its devices here, as it would take the GPU's memory from the runs."""
    rows = [row for by_name in runs.values() for rows in by_name.values() for row in rows]
    if not rows:
        return
    result = {
        "summary": {mode: summarise(mode, runs[mode]) for mode in runs},
        "runs": runs,
        "failed": failed,
    }
    if "return" in runs:
        ends = {
            n: r["all s"] for n, r in result["summary"]["return"].items() if n in ("sb3", "sbx")
        }
        result["fastest_cpu_peer"] = min(ends, key=ends.get) if ends else None
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of each file
        common.write(args.name, args, result, args.smoke, rows[0]["devices"])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
