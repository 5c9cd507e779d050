"""How much of the speed of bare physics is left to training.

    python benchmarks/training_speed.py

Three programs take the same worlds equally far, in turn, `--repeats` times over: one training iteration; a scan of the
script's own `env.step`; and a scan of the physics alone, with the smallest state. Both are kernels by onekernel, as in
training. Ratios are medians over the turns. Writes benchmarks/results/NAME.json.
"""

import dataclasses
import time
from functools import partial

import common
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import ppo_mjx as ppo


@dataclasses.dataclass
class Args:
    env_ids: tuple[str, ...] = ("HalfCheetah", "Hopper", "Walker2d")
    num_envs: tuple[int, ...] = (256,)
    warmups: int = 20  # iterations of the training before
    repeats: int = 15
    name: str = "training_speed"  # of the JSON file
    smoke: bool = False


def shard(mesh: Mesh, function, spec):
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )


def own_steps(env: ppo.Env, steps: int, state: ppo.State) -> ppo.State:
    """A scan of the script's environment."""
    action, step = jnp.zeros((len(state.obs), env.action_size)), ppo.kernel(env.step)
    return jax.lax.scan(
        lambda state, _: (jax.vmap(step)(state, action), None), state, None, length=steps
    )[0]


def bare_steps(env: ppo.Env, steps: int, state: ppo.State) -> ppo.State:
    """A scan of the physics of as many environment steps."""

    @ppo.kernel
    def env_step(data: ppo.Physics) -> ppo.Physics:
        def substep(data, _):
            full = ppo.physics_step(env.model, env.template.replace(**data.fields()))
            return ppo.Physics(full.qpos, full.qvel, full.qacc_warmstart), None

        return jax.lax.scan(substep, data, None, length=env.task.frame_skip)[0]

    return state.replace(
        data=jax.lax.scan(lambda x, _: (jax.vmap(env_step)(x), None), state.data, None, steps)[0]
    )


def measure(env_id: str, num_envs: int, warmups: int, repeats: int) -> dict:
    """Seconds of one training iteration, and of the same steps by the environment and by its physics alone."""
    args = common.ppo_args(env_id, num_envs=num_envs)
    mesh = ppo.make_mesh(
        args.num_devices, args.num_envs, args.steps_per_iteration // args.num_minibatches
    )
    env = ppo.Env(ppo.Args(env_id=env_id))
    shardings = jax.tree.map(partial(NamedSharding, mesh), ppo.STATE_SPEC)
    init = jax.jit(ppo.init_train_state, static_argnames=("args", "env"), out_shardings=shardings)
    state = init(args, env, jax.random.key(1))
    train = ppo.train_iteration.lower(args, env, mesh, state).compile()
    own = shard(mesh, partial(own_steps, env, args.num_steps), P("devices"))
    bare = shard(mesh, partial(bare_steps, env, args.num_steps), P("devices"))
    for _ in range(warmups):
        state, _ = train(state)
    for program in own, bare:
        jax.block_until_ready(program(state.worlds.env_state))
    seconds = {"train": [], "env.step": [], "physics": []}
    for _ in range(repeats):
        for name, program in ("env.step", own), ("physics", bare):
            start = time.perf_counter()
            jax.block_until_ready(program(state.worlds.env_state))
            seconds[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        state, _ = jax.block_until_ready(train(state))
        seconds["train"].append(time.perf_counter() - start)
    row = {
        f"{name} steps/s": args.steps_per_iteration / float(np.median(times))
        for name, times in seconds.items()
    }
    for name in "env.step", "physics":
        row[f"train / {name}"] = float(
            np.median(np.array(seconds[name]) / np.array(seconds["train"]))
        )
    return row | {"seconds": seconds}


def main(args: Args) -> None:
    if args.smoke:
        common.hardly_optimise()
        args = dataclasses.replace(args, env_ids=("Hopper",), num_envs=(8,), warmups=1, repeats=1)
    common.refuse_fallbacks()
    common.make_mesh()  # starts JAX with all cores
    speed = {}
    print(
        "| task | worlds | train steps/s | env.step | physics | train / env.step | train / physics |"
    )
    print("|---" * 7 + "|")
    for env_id in args.env_ids:
        for num_envs in args.num_envs:
            row = speed[f"{env_id} {num_envs}"] = measure(
                env_id, num_envs, args.warmups, args.repeats
            )
            numbers = [
                f"{value:.0f}" if value > 10 else f"{value:.2f}" for value in list(row.values())[:5]
            ]
            print(f"| {env_id} | {num_envs} | {' | '.join(numbers)} |", flush=True)
    common.write(args.name, args, {"speed": speed}, args.smoke)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
