"""What each setting of the physics costs and errs: MJX against C MuJoCo on the original model.

    python benchmarks/physics.py

States and actions are those of a policy (--policies, one policy.npz a task; random actions where there is none) in
C MuJoCo. Every setting starts from the same states with the same actions. Errors are of the observation, the largest
entry: after one environment step, and after 50. Speed is that of these same steps, vmapped, on all devices; each
setting is timed in turn, `--repeats` times over, and the median is given. With a policy its return in each setting is
told as well, mean and least of `--episodes` from the same starts: does the robot stay on its feet there, too?
Writes benchmarks/results/NAME.json after each task.
"""

import dataclasses
import sys
import time
from contextlib import nullcontext
from functools import partial
from unittest import mock

import common
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import ppo_mjx as ppo

EULER, RK4 = mujoco.mjtIntegrator.mjINT_EULER, mujoco.mjtIntegrator.mjINT_RK4


@dataclasses.dataclass
class Args:
    env_ids: tuple[str, ...] = ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid")
    policies: tuple[str, ...] = ()  # policy.npz of each task, in the same order
    states: int = 256  # from which 50 steps are compared
    repeats: int = 5
    episodes: int = 20  # of a policy in each setting; 0: none
    name: str = "physics"  # of the JSON file
    smoke: bool = False


@dataclasses.dataclass(frozen=True)
class Setting:
    """How an environment's physics differ from `--physics fast`."""

    name: str
    physics: str = "fast"
    iterations: tuple[int, int] | None = None
    integrator: int | None = None
    steps: int | None = None  # of the integrator in one environment step
    eulerdamp: bool = True
    mjx_solver: bool = False
    lapack: bool = False


FAST = Setting("fast")
SETTINGS = {
    "HalfCheetah": [
        Setting("exact", "exact"), FAST, Setting("fast, MJX's own solver", mjx_solver=True),
        Setting("fast, MJX's own solver, LAPACK", mjx_solver=True, lapack=True),
        Setting("fast, 1 / 4 iterations", iterations=(1, 4)), Setting("fast, 2 / 4 iterations", iterations=(2, 4)),
        Setting("fast, 3 / 6 iterations", iterations=(3, 6)), Setting("fast, eulerdamp off", eulerdamp=False),
    ],
    "Hopper": [
        Setting("exact", "exact"), FAST, Setting("fast, MJX's own solver", mjx_solver=True),
        Setting("fast, MJX's own solver, LAPACK", mjx_solver=True, lapack=True),
        Setting("fast, 1 / 4 iterations", iterations=(1, 4)),
        Setting("fast, 4 Euler steps", integrator=EULER, steps=4), Setting("fast, 4 Runge-Kutta steps", steps=4),
    ],
    "Ant": [
        Setting("exact", "exact"), FAST,
        Setting("fast, 5 Euler steps", integrator=EULER, steps=5),
        Setting("fast, 5 Euler steps, 20 / 20 iterations", iterations=(20, 20), integrator=EULER, steps=5),
        *(Setting(f"fast, {n} Runge-Kutta steps", integrator=RK4, steps=n) for n in (2, 3, 5)),
    ],
    "Humanoid": [
        Setting("exact", "exact"), FAST,
        *(Setting(f"fast, {n} Euler steps", integrator=EULER, steps=n) for n in (5, 10)),
        *(Setting(f"fast, {n} Runge-Kutta steps", integrator=RK4, steps=n) for n in (1, 3, 5)),
    ],
}  # fmt: skip
SETTINGS["Walker2d"] = SETTINGS["Hopper"]


def make_env(env_id: str, setting: Setting) -> ppo.Env:
    """An environment with the setting's physics."""
    env = ppo.Env(env_id, setting.physics)
    model = ppo.load_model(env.task, setting.physics)
    if setting.iterations:
        model.opt.iterations, model.opt.ls_iterations = setting.iterations
    if setting.integrator is not None:
        model.opt.integrator, env.runge_kutta = setting.integrator, setting.integrator == RK4
    if setting.steps:
        env.substeps = setting.steps
        if not env.runge_kutta:  # mjx.step takes it from the model
            model.opt.timestep = env.control_dt / setting.steps
    if not setting.eulerdamp:
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_EULERDAMP
    env.model = ppo.mjx.put_model(model, impl="jax")
    env.template = ppo.mjx.make_data(env.model)
    return env


def other_algebra(setting: Setting):
    """What the setting has in place of the script's `our_algebra`."""
    if setting.lapack:
        return mock.patch.object(ppo, "our_algebra", lambda constraints: jax.default_matmul_precision("highest"))
    if setting.mjx_solver:
        return mock.patch.object(ppo, "our_algebra", partial(lambda own, constraints: own(False), ppo.our_algebra))
    return nullcontext()


def collect(env_id: str, policy: dict | None, args: Args):
    """States (qpos, qvel, qacc_warmstart: [S, n]), actions [S, 50, A] and observations [S, 50, O] in C MuJoCo."""
    original, rng = ppo.CMujocoEnv(ppo.Env(env_id)), np.random.default_rng(0)
    starts, actions, observations, seed = [], [], [], 0
    while len(starts) < args.states:
        (obs, _), over, path = original.reset(seed), False, []
        seed += 1
        while not over and len(path) < 400:
            data = original.data
            before = (data.qpos.copy(), data.qvel.copy(), data.qacc_warmstart.copy())
            noise = 0.3 * rng.standard_normal(original.model.nu)
            most = original.env.max_action
            action = most * rng.uniform(-1, 1, len(noise)) if policy is None else ppo.act(policy, obs) + most * noise
            action = np.clip(action, -most, most)
            obs, _, terminated, truncated, _ = original.step(action)
            path.append((before, action, obs))
            over = terminated or truncated
        for i in range(0, len(path) - 50, 10):
            starts.append(path[i][0])
            actions.append([step[1] for step in path[i : i + 50]])
            observations.append([step[2] for step in path[i : i + 50]])
    starts = [np.stack([start[k] for start in starts[: args.states]]) for k in range(3)]
    return starts, np.array(actions[: args.states]), np.array(observations[: args.states])


def make_run(env: ppo.Env, mesh: Mesh, starts, actions):
    """A compiled function that takes all states through their actions to observations [50, S, O]; compile seconds."""
    blank = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), len(actions)))
    state = blank.replace(data=ppo.Physics(*(jnp.asarray(x, jnp.float32) for x in starts)))
    actions = jnp.asarray(actions, jnp.float32)

    def run(state, actions):
        def step(state, action):
            state = jax.vmap(env.step)(state, action)
            return state, state.obs

        return jax.lax.scan(step, state, actions.swapaxes(0, 1))[1].swapaxes(0, 1)

    start = time.perf_counter()
    shards = jax.shard_map(run, mesh=mesh, in_specs=P("devices"), out_specs=P("devices"), check_vma=False)
    compiled = jax.jit(shards).lower(state, actions).compile()
    seconds = time.perf_counter() - start
    placed = jax.device_put((state, actions), NamedSharding(mesh, P("devices")))
    return lambda: np.asarray(compiled(*placed)), seconds


def errors(predicted: np.ndarray, observations: np.ndarray) -> dict[str, float]:
    """Errors of the observations [S, 50, O] after 1 and after 50 steps, the largest entry of each."""
    off = np.abs(predicted - observations).max(axis=-1)
    return {
        "one_step_median": float(np.median(off[:, 0])), "one_step_p90": float(np.quantile(off[:, 0], 0.9)),
        "one_step_max": float(off[:, 0].max()), "fifty_steps_median": float(np.median(off[:, -1])),
        "fifty_steps_max": float(off[:, -1].max()),
    }  # fmt: skip


def main(args: Args) -> None:
    if args.smoke:
        args = dataclasses.replace(args, env_ids=("HalfCheetah",), states=20, repeats=1)
    if args.policies and len(args.policies) != len(args.env_ids):
        sys.exit("error: --policies: one for each of --env-ids")
    mesh, result = common.make_mesh(None, args.states), {}
    for index, env_id in enumerate(args.env_ids):
        policy = dict(np.load(args.policies[index])) if args.policies else None
        (starts, actions, observations), rows, runs = collect(env_id, policy, args), {}, {}
        for setting in SETTINGS[env_id][: 2 if args.smoke else None]:
            env = make_env(env_id, setting)
            with other_algebra(setting):
                runs[setting.name], seconds = make_run(env, mesh, starts, actions)
                rows[setting.name] = errors(runs[setting.name](), observations) | {"compile_s": seconds}
                if policy and args.episodes:
                    keys = jax.random.split(jax.random.key(1), args.episodes)
                    total = np.asarray(ppo.evaluate_mjx(env, policy, keys))
                    rows[setting.name] |= {"return_mean": float(total.mean()), "return_least": float(total.min())}
        times = {name: [] for name in rows}
        for _ in range(args.repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        print(f"\n| {env_id} | env steps/s | compile s | 1 step: median | p90 | max | 50 steps: median | max | "
              "policy's return: mean | least |\n|---|---|---|---|---|---|---|---|---|---|")
        for name, row in rows.items():
            row["steps_per_s"] = observations.shape[0] * observations.shape[1] / float(np.median(times[name]))
            numbers = " | ".join(f"{value:.1e}" for key, value in row.items() if "step_" in key or "steps_m" in key)
            told = " | ".join(f"{row[key]:.0f}" if key in row else "" for key in ("return_mean", "return_least"))
            print(f"| {name} | {row['steps_per_s']:.0f} | {row['compile_s']:.0f} | {numbers} | {told} |", flush=True)
        result[env_id] = rows
        common.write(args.name, args, {"results": result}, args.smoke)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
