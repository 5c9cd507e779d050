"""An environment of MuJoCo Playground in Brax's PPO, with its step as it is and compiled by onekernel.

    pip install playground                               # MuJoCo Playground, with Brax
    python benchmarks/playground.py --env-id CheetahRun

The environment is Playground's own, on MJX's JAX implementation, and so is the trainer. What differs is one line,
`env.step = onekernel.compile(env.step)`; with `lean`, MJX's step has onekernel's lean solver in it as well. The
settings are Playground's for that environment but for smaller batches, which suit a CPU (SETTINGS). Each training is a
process of its own, on a device for each core, and compiles all that it runs. The variants take turns over the seeds.

Steps/s are those of the trainer's own clock (`training/sps`), the median of the parts between two evaluations, so that
compiling is not in them; `process_s` is the whole process. The returns tell that all learn the same thing.

Writes benchmarks/results/NAME.json.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time

import common
import tyro

VARIANTS = ("as it is", "onekernel", "onekernel, lean")
SETTINGS = {
    "num_envs": 512,
    "batch_size": 256,
    "num_minibatches": 8,
    "num_updates_per_batch": 4,
    "num_evals": 6,
}


@dataclasses.dataclass
class Args:
    env_id: str = "CheetahRun"
    num_timesteps: int = 3_000_000
    seeds: tuple[int, ...] = (1, 2, 3)
    variants: tuple[str, ...] = VARIANTS
    name: str = "playground"  # of the JSON file
    smoke: bool = False  # one short training each


def child(variant: str, env_id: str, num_timesteps: int, seed: int) -> None:
    """One training; prints its parts as JSON."""
    common.make_mesh()  # a device for each core
    common.keep_nothing_compiled()
    from brax.training.agents.ppo import train as ppo
    from mujoco_playground import registry, wrapper
    from mujoco_playground.config import dm_control_suite_params

    import onekernel
    import onekernel.mjx

    config = registry.get_default_config(env_id)
    config.impl = "jax"
    env = registry.load(env_id, config=config)
    plain_step = env.step

    def lean_step(state, action):
        with onekernel.mjx.lean():
            return plain_step(state, action)

    common.refuse_fallbacks()
    if variant == "onekernel":
        env.step = onekernel.compile(env.step)
    elif variant == "onekernel, lean":
        env.step = onekernel.compile(lean_step)

    settings = dict(dm_control_suite_params.brax_ppo_config(env_id)) | SETTINGS
    settings |= {"num_timesteps": num_timesteps, "seed": seed}
    parts = []
    ppo.train(
        environment=env,
        wrap_env_fn=wrapper.wrap_for_brax_training,
        progress_fn=lambda steps, metrics: parts.append(
            {
                "steps": int(steps),
                "return": float(metrics["eval/episode_reward"]),
                "sps": float(metrics.get("training/sps", float("nan"))),
            }
        ),
        **settings,
    )
    print(json.dumps(parts))


def main(args: Args) -> None:
    if args.smoke:
        args = dataclasses.replace(
            args, env_id="PendulumSwingup", num_timesteps=100_000, seeds=(1,)
        )
    rows = []
    for seed in args.seeds:
        for variant in args.variants:
            command = [
                sys.executable,
                __file__,
                "--child",
                variant,
                args.env_id,
                args.num_timesteps,
                seed,
            ]
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                parts = common.run_child([str(word) for word in command], **common.caches(folder))
            row = {
                "variant": variant,
                "seed": seed,
                "process_s": round(time.perf_counter() - start, 1),
                "sps": statistics.median(part["sps"] for part in parts[1:]),
                "final_return": parts[-1]["return"],
                "parts": parts,
            }
            rows.append(row)
            print({key: value for key, value in row.items() if key != "parts"}, flush=True)
    common.write(args.name, args, {"rows": rows}, args.smoke, ["cpu"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main(tyro.cli(Args))
