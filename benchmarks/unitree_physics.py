"""What each setting of the robot's physics costs and errs, and how fast MJX steps it beside C MuJoCo.

    python benchmarks/unitree_physics.py --policy docs/g1_policy.npz

Settings: states and actions are those of a policy (small random actions without one) in C MuJoCo as Unitree's loop runs
it (500 Hz, full accuracy). Every setting starts from the same states with the same actions. Errors are of the joints'
angles, the largest of the twelve: after one control step and after 10. Speed is that of these same steps, vmapped, on
all devices; settings are timed in turn, `--repeats` times over, medians are given.

Throughput: control steps/s of the script's `env.step`, physics steps/s of a scan of mjx.step as MuJoCo has it, of the
same with the script's solver, and of C MuJoCo (mujoco.batch, a thread for each core, same model and settings),
over the number of worlds. Writes benchmarks/results/NAME.json.
"""

import dataclasses
import time
from contextlib import nullcontext
from functools import partial
from unittest import mock

import common
import jax
import jax.numpy as jnp
import mujoco
import mujoco.batch
import numpy as np
import tyro
from jax.sharding import Mesh, PartitionSpec as P

import ppo_mjx_unitree as unitree

STEPS = 10  # control steps of a comparison


@dataclasses.dataclass
class Args:
    policy: str | None = None  # policy.npz
    states: int = 256
    repeats: int = 5
    num_envs: tuple[int, ...] = (64, 256, 1024, 4096)
    settings: bool = True
    throughput: bool = True
    name: str = "unitree_physics"  # of the JSON file
    smoke: bool = False


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the physics differ from the script's."""

    name: str
    decimation: int = 4
    iterations: tuple[int, int] | None = None
    cg: bool = False
    mjx_solver: bool = False
    dry_friction: bool = False
    limits: bool = True


SETTINGS = [
    Setting("the script's"), Setting("MJX's own solver", mjx_solver=True),
    Setting("1 / 4 iterations", iterations=(1, 4)), Setting("3 / 5 iterations", iterations=(3, 5)),
    Setting("5 / 8 iterations", iterations=(5, 8)),
    Setting("MJX's conjugate gradients, 4 / 4", iterations=(4, 4), cg=True, mjx_solver=True),
    Setting("5 steps of 0.004 s", decimation=5), Setting("10 steps of 0.002 s", decimation=10),
    Setting("MJX's own solver, with dry friction", dry_friction=True, mjx_solver=True),
    Setting("no joint limits", limits=False),
]  # fmt: skip
QUIET = {"obs_noise": 0.0, "push_speed": 0.0, "friction": (1.0, 1.0), "added_mass": (0.0, 0.0), "shifted_center": 0.0,
         "gain_noise": 0.0, "strength_noise": 0.0, "action_delay": 0.0}  # fmt: skip


def change(setting: Setting, model: mujoco.MjModel) -> mujoco.MjModel:
    if setting.iterations:
        model.opt.iterations, model.opt.ls_iterations = setting.iterations
    if setting.cg:
        model.opt.solver = mujoco.mjtSolver.mjSOL_CG
    if setting.dry_friction:
        model.dof_frictionloss[6:] = unitree.ROBOTS["g1"].passive[2]
    if not setting.limits:
        model.jnt_limited[:] = 0
    return model


def our_solver():
    """MJX with the script's constraint solver, as the script's env.step has it."""
    return mock.patch("mujoco.mjx._src.solver.solve", unitree.solve_constraints)


def make_env(setting: Setting) -> unitree.Env:
    """An environment with the setting's physics, nothing random."""
    original = unitree.training_model
    with mock.patch.object(unitree, "training_model", lambda *args: change(setting, original(*args))):
        return unitree.Env(unitree.Args(decimation=setting.decimation, **QUIET))


def collect(policy: dict | None, states: int):
    """States (qpos, qvel, warmstart: [S, n]), actions [S, STEPS, A], actions before [S, A], angles [S, STEPS, A]."""
    original, rng, rows, seed = unitree.CMujocoEnv(unitree.ROBOTS["g1"]), np.random.default_rng(0), [], 0
    commands = list(unitree.GATE.values())
    while len(rows) < states:
        original.reset(seed)
        command, path, fallen = np.array(commands[seed % len(commands)], float), [], False
        seed += 1
        while not fallen and len(path) < 200:
            data, before = original.data, original.action
            start = (data.qpos.copy(), data.qvel.copy(), data.qacc_warmstart.copy())
            noise = rng.standard_normal(original.model.nu)
            action = 0.5 * noise if policy is None else unitree.act(policy, original.observe(command)) + 0.2 * noise
            fallen = original.step(action)["fallen"]
            path.append((start, action, before, data.qpos[7:].copy()))
        for i in range(0, len(path) - STEPS, 5):
            part = path[i : i + STEPS]
            rows.append((*part[0][0], [step[1] for step in part], part[0][2], [step[3] for step in part]))
    return [np.array(column) for column in zip(*rows[:states], strict=True)]


def shard(mesh: Mesh, function, *operands):
    """The function over the devices, compiled, and the seconds of it."""
    start = time.perf_counter()
    run = jax.shard_map(function, mesh=mesh, in_specs=P("devices"), out_specs=P("devices"), check_vma=False)
    compiled = jax.jit(run, compiler_options=unitree.WIDE).lower(*operands).compile()
    placed = jax.device_put(operands, jax.sharding.NamedSharding(mesh, P("devices")))
    return partial(compiled, *placed), time.perf_counter() - start


def seconds_of(programs: dict, repeats: int) -> dict[str, list[float]]:
    times = {name: [] for name in programs}
    for i in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            if i:  # the first is for warming up
                times[name].append(time.perf_counter() - start)
    return times


def compare_settings(args: Args, mesh: Mesh) -> dict:
    policy = dict(np.load(args.policy)) if args.policy else None
    qpos, qvel, warmstart, actions, before, angles = collect(policy, args.states)
    programs, rows = {}, {}
    for setting in SETTINGS[: 1 if args.smoke else None]:
        env = make_env(setting)

        def run(start, actions, before, env=env, setting=setting):
            def step(carry, action):
                data, before, domain = carry
                data, _ = jax.vmap(env.advance)(data, action, before, domain)
                return (data, action, domain), data.qpos[:, 7:]

            domain = jax.vmap(env.draw_domain)(jax.random.split(jax.random.key(0), len(actions)))
            with nullcontext() if setting.mjx_solver else our_solver(), jax.default_matmul_precision("highest"):
                return jax.lax.scan(step, (start, before, domain), actions.swapaxes(0, 1))[1].swapaxes(0, 1)

        start = unitree.Physics(*(jnp.asarray(x, jnp.float32) for x in (qpos, qvel, warmstart)))
        operands = (start, jnp.asarray(actions, jnp.float32), jnp.asarray(before, jnp.float32))
        programs[setting.name], compile_s = shard(mesh, run, *operands)
        off = np.abs(np.asarray(programs[setting.name]()) - angles).max(axis=-1)
        rows[setting.name] = {"compile_s": compile_s} | {
            f"{steps} {name}": float(value) for steps in (1, STEPS) for name, value in
            zip(("median", "p90", "max"), np.quantile(off[:, steps - 1], [0.5, 0.9, 1.0]), strict=True)
        }
    print("| setting | control steps/s | compile s | 1 step: median | p90 | max | 10 steps: median | p90 | max |")
    print("|---" * 9 + "|")
    for name, times in seconds_of(programs, args.repeats).items():
        rows[name] |= {"steps_per_s": args.states * STEPS / float(np.median(times)), "seconds": times}
        errors = " | ".join(f"{value:.1e}" for key, value in rows[name].items() if key[0] == "1")
        print(f"| {name} | {rows[name]['steps_per_s']:.0f} | {rows[name]['compile_s']:.0f} | {errors} |", flush=True)
    return rows


def measure_throughput(args: Args, mesh: Mesh, num_envs: int) -> dict:
    """Physics and control steps/s with so many worlds, all from resets, with no action."""
    env = unitree.Env(unitree.Args())
    state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), num_envs))
    substeps = 40

    def own(state):
        action = jnp.zeros((len(state.done), env.action_size))
        return jax.lax.scan(lambda s, _: (jax.vmap(env.step)(s, action), None), state, None, length=substeps // 4)[0]

    def bare(data):
        def step(data, _):
            full = jax.vmap(lambda d: unitree.mjx.step(env.model, env.template.replace(**vars(d))))(data)
            return unitree.Physics(full.qpos, full.qvel, full.qacc_warmstart), None
        return jax.lax.scan(step, data, None, length=substeps)[0]

    batch = mujoco.batch.Batch(unitree.training_model(env.robot, 4), nsim=num_envs, nthread=common.count_cores())
    qpos, qvel = np.array(state.data.qpos, float), np.array(state.data.qvel, float)

    def in_c():
        batch.qpos[:], batch.qvel[:] = qpos, qvel
        batch.step(nstep=substeps)

    programs, compile_s = {"C MuJoCo": in_c}, {}
    programs["env.step"], compile_s["env.step"] = shard(mesh, own, state)
    programs["mjx.step"], compile_s["mjx.step"] = shard(mesh, bare, state.data)
    with our_solver():
        programs["mjx.step, ours"], compile_s["mjx.step, ours"] = shard(mesh, lambda data: bare(data), state.data)
    times = seconds_of(programs, args.repeats)
    rows = {name: num_envs * substeps / float(np.median(values)) for name, values in times.items()}
    ratio = float(np.median(np.array(times["C MuJoCo"]) / np.array(times["mjx.step, ours"])))
    print(f"| {num_envs} | {rows['env.step'] / 4:.0f} | {rows['mjx.step']:.0f} | {rows['mjx.step, ours']:.0f} | "
          f"{rows['C MuJoCo']:.0f} | {ratio:.2f} |", flush=True)
    return {"physics_steps_per_s": rows, "mjx.step, ours / C MuJoCo": ratio, "compile_s": compile_s, "seconds": times}


def main(args: Args) -> None:
    if args.smoke:
        common.hardly_optimise()
        args = dataclasses.replace(args, states=8, repeats=1, num_envs=(8,))
    mesh, result = common.make_mesh(None, args.states, *args.num_envs), {}
    if args.settings:
        result["settings"] = compare_settings(args, mesh)
    if args.throughput:
        print("| worlds | control steps/s, env.step | physics steps/s, mjx.step | with our solver | "
              "C MuJoCo | ours / C |\n" + "|---" * 6 + "|")
        result["throughput"] = {n: measure_throughput(args, mesh, n) for n in args.num_envs}
    common.write(args.name, args, result, args.smoke)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
