"""Speed of the environment on rough ground over that on the plane: the same robot, steered by the same policy.

    python benchmarks/rough_speed.py

A policy of ppo_mjx_unitree_rough.py, whose actor sees what the flat script's does, walks in the environments of both
scripts, each compiled into one kernel, over all devices. On rough ground, worlds are on all kinds of one level in equal
parts. Each arm starts from where its worlds are after a second of walking; a call is --steps control steps of all
worlds, and arms are timed in turn. `rough / flat` is the median over turns of the ratio of speeds.
Writes benchmarks/results/NAME.json.
"""

import dataclasses
import statistics
from functools import partial

import common
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import ppo_mjx_unitree as flat
import ppo_mjx_unitree_rough as rough

WARM_UP = 50  # control steps


@dataclasses.dataclass
class Args:
    robots: tuple[str, ...] = ("g1", "go2")
    levels: tuple[int, ...] = (0, 3, 6, 9)
    num_envs: int = 1024
    steps: int = 16  # control steps of a call
    repeats: int = 9
    name: str = "rough_speed"  # of the JSON file
    smoke: bool = False  # a few worlds, with next to no optimisation by the compiler


def walk(step, policy: dict, length: int, state):
    """The state [N] after `length` control steps of the policy."""

    def control_step(state, _):
        memory = flat.initial_memory(state.done.shape)
        _, action = flat.act(policy, memory, state.obs["actor"], jnp)
        return step(state, action), None

    return jax.lax.scan(control_step, state, None, length=length)[0]


def make_programs(args: Args, robot: str, policy: dict, mesh) -> dict:
    """The arms: name -> a call without arguments."""
    keys = jax.random.split(jax.random.key(0), args.num_envs)
    ones = jnp.ones(args.num_envs)
    env = flat.Env(flat.default_args(robot))
    start = jax.jit(jax.vmap(flat.kernel(env.reset)))(keys, ones)
    starts = {"flat": (jax.vmap(flat.kernel(env.step)), start)}

    env = rough.Env(rough.default_args(robot))
    reset = jax.jit(jax.vmap(rough.kernel(env.reset), in_axes=(0, 0, 0, 0, None)))
    on_ground = jax.vmap(rough.kernel(env.step), in_axes=(0, 0, None))

    def step(state, action):
        return on_ground(state, action, env.ground)

    kinds = jnp.arange(args.num_envs) % len(rough.KINDS)
    for level in args.levels:
        start = reset(keys, ones, jnp.full_like(kinds, level), kinds, env.ground)
        starts[f"level {level}"] = (step, start)

    programs = {}
    for name, (step, start) in starts.items():
        warm_up = partial(walk, step, policy, WARM_UP)
        start = common.compile_sharded(mesh, warm_up, start)[0]()
        timed = partial(walk, step, policy, args.steps)
        programs[name] = common.compile_sharded(mesh, timed, start)[0]
    return programs


def main(args: Args) -> None:
    if args.smoke:
        common.hardly_optimise()
        args = dataclasses.replace(
            args, robots=("go2",), levels=(3,), num_envs=14, steps=2, repeats=1
        )
    common.refuse_fallbacks()
    mesh = common.make_mesh(None, args.num_envs)
    rows = []
    for robot in args.robots:
        with np.load(common.ROOT / "docs" / f"{robot}_rough_policy.npz") as file:
            policy = {name: jnp.asarray(value) for name, value in file.items()}
        seconds = common.take_turns(make_programs(args, robot, policy, mesh), args.repeats)
        for arm, times in seconds.items():
            rows.append(
                {
                    "robot": robot,
                    "arm": arm,
                    "env_steps_per_s": args.num_envs * args.steps / statistics.median(times),
                    "rough / flat": common.ratio(seconds["flat"], times),
                }
            )
            common.table(list(rows[-1]), [list(rows[-1].values())])
    common.write(args.name, args, {"rows": rows}, args.smoke)


if __name__ == "__main__":
    main(tyro.cli(Args))
