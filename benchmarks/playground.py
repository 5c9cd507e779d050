"""An environment of MuJoCo Playground in Brax's PPO, by XLA and by onekernel.

    pip install ./onekernel playground
    python benchmarks/playground.py

Both trainings have the environment, the wrappers, the trainer and the settings of Playground (fewer steps, if
`--num-timesteps` says so); one line is added for the second (`train` below). Each is a process of its own with an
empty compile cache, and they take turns. Environments of the DeepMind Control Suite need no download.

Writes benchmarks/results/NAME.json: environment steps/s of training with its updates, as Brax counts them, without
what compiles; seconds from the start of the process to the end of training; and the returns of Brax's evaluations.
"""

import time

START = time.perf_counter()

import dataclasses
import json
import statistics
import sys
import tempfile
from typing import Literal

import common
import tyro


@dataclasses.dataclass
class Args:
    env: str = "CheetahRun"
    num_timesteps: int = 5_000_000  # Brax rounds up to whole evaluations
    num_evals: int = 3  # the first one before the training
    repeats: int = 1
    name: str = "playground"  # of the JSON file
    smoke: bool = False
    child: Literal["XLA", "onekernel"] | None = None  # what runs the physics in this process


def train(args: Args) -> dict:
    """One training, in this process."""
    import functools

    import jax

    jax.config.update("jax_num_cpu_devices", common.count_cores())
    from brax.training.agents.ppo import networks, train as ppo
    from mujoco_playground import registry, wrapper
    from mujoco_playground.config import dm_control_suite_params

    import onekernel

    config = registry.get_default_config(args.env)
    config.impl = "jax"
    env = registry.load(args.env, config=config)
    if args.child == "onekernel":
        common.refuse_fallbacks()
        env.step = onekernel.compile(env.step)  # this line is the difference

    settings = dict(dm_control_suite_params.brax_ppo_config(args.env))
    settings |= {"num_timesteps": args.num_timesteps, "num_evals": args.num_evals}
    if args.smoke:
        settings |= {"num_envs": 64, "batch_size": 64, "num_minibatches": 4, "unroll_length": 5}
        settings |= {"num_eval_envs": 16, "episode_length": 20}
    factory = functools.partial(networks.make_ppo_networks, **settings.pop("network_factory", {}))
    evaluations = []

    def progress(steps: int, metrics: dict) -> None:
        evaluations.append(
            {
                "steps": int(steps),
                "seconds": time.perf_counter() - START,
                "return": float(metrics["eval/episode_reward"]),
                "training_sps": float(metrics.get("training/sps", 0.0)),
            }
        )

    ppo.train(
        environment=env,
        wrap_env_fn=wrapper.wrap_for_brax_training,
        network_factory=factory,
        progress_fn=progress,
        seed=1,
        **settings,
    )
    return {"evaluations": evaluations, "seconds": time.perf_counter() - START}


def main(args: Args) -> None:
    if args.child:
        print(json.dumps(train(args)))
        return
    if args.smoke:
        args = dataclasses.replace(args, num_timesteps=5000, repeats=1)
    flags = [f"--env={args.env}", f"--num-timesteps={args.num_timesteps}"]
    flags += [f"--num-evals={args.num_evals}"] + ["--smoke"] * args.smoke
    runs = {"XLA": [], "onekernel": []}
    for _ in range(args.repeats):
        for kind in runs:
            with tempfile.TemporaryDirectory() as cache:
                command = [sys.executable, __file__, *flags, "--child", kind]
                runs[kind].append(common.run_child(command, **common.caches(cache)))
            print(kind, json.dumps(runs[kind][-1]), flush=True)
    summary = {
        kind: {
            # Brax's first training epoch holds the compiling.
            "training_sps": statistics.median(
                x["evaluations"][-1]["training_sps"] for x in all_runs
            ),
            "seconds": statistics.median(x["seconds"] for x in all_runs),
            "last_return": statistics.median(x["evaluations"][-1]["return"] for x in all_runs),
        }
        for kind, all_runs in runs.items()
    }
    common.write(args.name, args, {"summary": summary, "runs": runs}, args.smoke)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
