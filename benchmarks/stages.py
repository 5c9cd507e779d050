"""Where the time of a physics step goes: programs that do ever more of one step, in a scan, in turn.

    python benchmarks/stages.py

Each program begins from the same states, after `--warmup` random actions, and computes what its stage and all before it
give; a stage's time is what its program takes longer than the one before, as the median over the turns. Small
differences are noise, and what XLA fuses with a later stage is counted there. Bytes are the temporaries of the compiled
program, which it reads and writes in each step. Of a step by Runge-Kutta, which evaluates the dynamics four times, it
is one evaluation. Writes benchmarks/results/NAME.json.
"""

import dataclasses
import statistics

import common
import jax
import jax.numpy as jnp
import mujoco
import tyro

import ppo_mjx as ppo
import ppo_mjx_unitree as unitree

mjx = ppo.mjx


@dataclasses.dataclass
class Args:
    tasks: tuple[str, ...] = ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid", "g1")
    num_envs: int = 256
    steps: int = 40  # physics steps of one turn
    warmup: int = 30  # environment steps before
    repeats: int = 9
    name: str = "stages"  # of the JSON file
    smoke: bool = False  # Hopper alone, small


def position(*parts):
    """The parts of MJX's forward pass one after another: (model, data) -> data."""
    def run(model, data):
        for part in parts:
            data = part(model, data)
        return data
    return run


BODIES = (mjx.kinematics, mjx.com_pos)
MASS = (*BODIES, mjx.crb)
CONTACTS = (*MASS, mjx.collision)
ROWS = (*CONTACTS, mjx.make_constraint)
STAGES = {  # what is computed so far, and what of it has to be kept
    "bodies": (position(*BODIES), lambda d: (d.xpos, d.xmat, d.geom_xpos, d._impl.cinert, d.cdof)),
    "mass matrix": (position(*MASS), lambda d: d._impl.M),
    "contacts": (position(*CONTACTS), lambda d: (d._impl.M, d._impl.contact.dist, d._impl.contact.frame)),
    "constraint rows": (position(*ROWS), lambda d: (d._impl.M, d._impl.efc_J, d._impl.efc_D, d._impl.efc_aref)),
    "forces, solver": (mjx.forward, lambda d: (d.qacc, d.qfrc_constraint)),
    "integration": (mjx.step, lambda d: (d.qpos, d.qvel)),
}


def make_program(stage, env, num_steps: int):
    """(Physics [N, ...]) -> what depends on all that the stage computes, in each of the steps."""
    compute, keep = stage

    def run(data):
        def step(total, _):
            # The states stay as they are, but for a change that XLA cannot know to be nothing; else it would compute
            # what does not change once, before the loop.
            nothing = 1e-30 * total[:, None]
            now = data.replace(qpos=data.qpos + nothing, qvel=data.qvel + nothing)
            with ppo.our_algebra(constraints=True):
                full = jax.vmap(lambda d: compute(env.model, env.template.replace(**vars(d))))(now)
            kept = jax.tree.leaves(keep(full))
            return sum(x.reshape(len(x), -1).sum(axis=1) for x in kept) * 1e-6, None
        return jax.lax.scan(step, jnp.zeros(len(data.qpos)), None, length=num_steps)[0]
    return run


def warm_up(env, num_envs: int, steps: int):
    """Worlds after so many random actions."""
    keys = jax.random.split(jax.random.key(0), steps)

    def step(state, key):
        action = jax.random.uniform(key, (num_envs, env.action_size), minval=-1.0)
        return jax.vmap(env.step)(state, getattr(env, "max_action", 1.0) * action), None
    start = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(1), num_envs))
    return jax.jit(lambda state: jax.lax.scan(step, state, keys)[0])(start).data


def measure(args: Args, task: str, mesh) -> dict:
    env = unitree.Env(unitree.Args()) if task == "g1" else ppo.Env(task)
    data, programs, temporaries = warm_up(env, args.num_envs, args.warmup), {}, {}
    stages = dict(STAGES)
    if env.model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4:
        del stages["integration"]  # mjx.step would evaluate the dynamics four times; the script does so by a scan
    for name, stage in stages.items():
        run = make_program(stage, env, args.steps)
        programs[name], _, compiled = common.compile_sharded(
            mesh, run, data, options=unitree.WIDE if task == "g1" else None)
        temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
    seconds, rows, before = common.take_turns(programs, args.repeats), {}, [0.0] * args.repeats
    per_step = 1e6 / (args.num_envs * args.steps)
    whole = seconds[list(stages)[-1]]
    for name, times in seconds.items():
        own = [now - then for now, then in zip(times, before, strict=True)]
        rows[name] = {"us_per_world_step": statistics.median(own) * per_step, "share": common.ratio(own, whole),
                      "temporary_bytes": temporaries[name], "seconds": times}  # fmt: skip
        before = times
    jax.clear_caches()
    summary = {"constraint_rows": int(env.template._impl.nefc), "whole_us": statistics.median(whole) * per_step}
    return summary | {"rows": rows}


def main(args: Args) -> None:
    if args.smoke:
        args = dataclasses.replace(args, tasks=("Hopper",), num_envs=32, steps=4, warmup=2, repeats=2)
    mesh, result, table = common.make_mesh(None, args.num_envs), {}, []
    for task in args.tasks:
        result[task] = measure(args, task, mesh)
        cells = [f"{row['us_per_world_step']:.2f} ({row['share']:.0%})" for row in result[task]["rows"].values()]
        cells += ["-"] * (len(STAGES) - len(cells))
        table.append([task, result[task]["constraint_rows"], result[task]["whole_us"], *cells])
    common.table(["task", "constraint rows", "us a world's step", *STAGES], table)
    common.write(args.name, args, {"tasks": result}, args.smoke)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
