"""How SAC's throughput depends on the number of worlds, and how much of the bare update's speed is left in training.

    python benchmarks/sac_throughput.py

For each number of worlds three programs are timed in turn, `--rounds` times over, under the same shard_map over all
devices and with their state donated: acting (a scan of the script's `interact`: policy, environment step and reset; no
buffer, no update), the script's training iteration once the updates have begun, and the bare update (a scan of the
script's `update` over minibatches that lie there already). A sample is as many calls as take about half a second;
each program is called three times before. Figures are medians, ratios are taken within a round.

All settings but the worlds are the script's defaults. So there are 8 updates of 256 transitions after each step of
the worlds whatever their number: with 16384 worlds an update follows 2048 new transitions, with 64 worlds 8. Steps/s
of different rows therefore come with different amounts of learning, and updates/s in training fall with more worlds
already because acting takes more of an iteration.

"update / bare" is updates/s in training over those of the bare update, which is also the share of an iteration that
its updates would take by themselves. "acting" is the share that its steps would take by themselves. What is left is
the buffer (write, draw, gather), metrics and calling.
Writes benchmarks/results/NAME.json. Compiling is told apart, without a compile cache.
"""

import dataclasses
import math
import time
from functools import partial

import common
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding, PartitionSpec as P

import sac_mjx_pendulum as sac

BARE_UPDATES = 1600  # in one call, so that calling costs next to nothing


@dataclasses.dataclass
class Args:
    num_envs: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
    rounds: int = 7
    seconds: float = 0.5  # of one sample, about
    name: str = "sac_throughput"  # of the JSON file
    smoke: bool = False  # one short measurement


def act_only(
    args: sac.Args, env: sac.Env, steps: int, learner: sac.Learner, worlds: sac.Worlds
) -> sac.Worlds:
    """A scan of the script's `interact`; what it gives for the buffer and the log is not used, so not computed."""

    def step(worlds, _):
        return sac.interact(args, env, learner, worlds)[0], None

    return jax.lax.scan(step, worlds, None, length=steps)[0]


def update_only(
    args: sac.Args, env: sac.Env, mbs: sac.Transition, learner: sac.Learner
) -> tuple[sac.Learner, dict]:
    """A scan of the script's `update` over minibatches [M, B, ...]; metrics are returned, as in training."""
    return jax.lax.scan(partial(sac.update, args, env), learner, mbs)


def compile_scan(mesh, function, in_specs, out_specs, *operands):
    """The function over the devices, compiled; the last operand is donated."""
    run = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(run, donate_argnums=len(operands) - 1).lower(*operands).compile()


def sample(program, carry, calls: int):
    """The carry after some calls of program(carry) -> carry, and seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        carry = program(carry)
    jax.block_until_ready(carry)
    return carry, (time.perf_counter() - start) / calls


def measure(num_envs: int, rounds: int, seconds: float) -> dict:
    """One row of the table, and its samples: seconds of one call of each program."""
    args = sac.Args(num_envs=num_envs, total_timesteps=2**40)  # as long as it takes
    sac.check_args(args)
    mesh, env = sac.make_mesh(args.num_devices, args.num_envs, args.batch_size), sac.Env(args)
    args = dataclasses.replace(args, num_devices=mesh.size)
    state, compile_s = sac.init_train_state(args, env, mesh, jax.random.key(args.seed)), {}
    one, split, acting_steps = P("devices"), P(None, "devices"), min(2000, 2**20 // num_envs)

    start = time.perf_counter()
    train = sac.train_iteration.lower(args, env, mesh, state).compile()
    compile_s["train"] = time.perf_counter() - start
    while int(state.learner.updates) == 0:  # the first steps are by chance, without updates
        state, _ = train(state)
    acting_learner, learner, worlds = jax.tree.map(
        jnp.copy, (state.learner, state.learner, state.worlds)
    )
    rng, shape = np.random.default_rng(args.seed), (BARE_UPDATES, args.batch_size)
    rows = rng.integers(min(int(learner.steps), args.buffer_rows), size=shape)
    mbs = sac.gather(jax.device_get(state.buffer), (rows, rng.integers(num_envs, size=shape)))
    mbs = jax.device_put(mbs, NamedSharding(mesh, split))

    start = time.perf_counter()
    act = compile_scan(
        mesh, partial(act_only, args, env, acting_steps), (P(), one), one, acting_learner, worlds
    )
    compile_s["act"] = time.perf_counter() - start
    start = time.perf_counter()
    update = compile_scan(mesh, partial(update_only, args, env), (split, P()), P(), mbs, learner)
    compile_s["update"] = time.perf_counter() - start

    programs = {
        "act": partial(act, acting_learner),
        "train": lambda state: train(state)[0],
        "update": lambda learner: update(mbs, learner)[0],
    }
    carries = {"act": worlds, "train": state, "update": learner}
    calls = {}
    samples = {name: [] for name in programs}
    for name, program in programs.items():
        carries[name], _ = sample(program, carries[name], 2)
        carries[name], once = sample(program, carries[name], 1)
        calls[name] = math.ceil(seconds / once)
    updates, before = args.num_steps * args.updates_per_step, int(carries["train"].learner.updates)
    for _ in range(rounds):
        for name, program in programs.items():
            carries[name], taken = sample(program, carries[name], calls[name])
            samples[name].append(taken)
    learner = jax.device_get(carries["train"].learner)
    if int(learner.updates) - before != rounds * calls["train"] * updates:
        raise SystemExit(f"{num_envs} worlds: training left out updates")
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(learner.actor)):
        raise SystemExit(f"{num_envs} worlds: the actor is not finite")

    train_s = np.array(samples["train"])
    # As many steps and updates as an iteration's.
    acting_s = np.array(samples["act"]) / acting_steps * args.num_steps
    bare_s = np.array(samples["update"]) / BARE_UPDATES * updates
    figures = {
        "acting steps/s": args.steps_per_iteration / acting_s,
        "training steps/s": args.steps_per_iteration / train_s,
        "updates/s in training": updates / train_s,
        "bare updates/s": updates / bare_s,
        "update / bare": bare_s / train_s,
        "acting": acting_s / train_s,
    }
    return {name: float(np.median(values)) for name, values in figures.items()} | {
        "compile_s": compile_s,
        "devices": mesh.size,
        "acting steps a call": acting_steps,
        "bare updates a call": BARE_UPDATES,
        "calls a sample": calls,
        "seconds a call": samples,
    }


def main(args: Args) -> None:
    common.keep_nothing_compiled()
    common.refuse_fallbacks()
    if args.smoke:
        args = dataclasses.replace(args, num_envs=(64,), rounds=2, seconds=0.1)
    common.make_mesh()  # starts JAX with all cores
    rows = {}
    print(
        "| worlds | acting steps/s | training steps/s | updates/s in training | bare updates/s | update / bare "
        "| acting | compile s |\n" + "|---" * 8 + "|"
    )
    for num_envs in args.num_envs:
        row = rows[num_envs] = measure(num_envs, args.rounds, args.seconds)
        numbers = [
            f"{value:.0f}" if value > 10 else f"{value:.2f}" for value in list(row.values())[:6]
        ]
        print(
            f"| {num_envs} | {' | '.join(numbers)} | {row['compile_s']['train']:.1f} |", flush=True
        )
    common.write(args.name, args, {"worlds": rows}, args.smoke)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
