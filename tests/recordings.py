"""Gymnasium's random episodes, and MJX's steps from their states, for the tests of the environment."""

import dataclasses
import functools
import warnings

import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np

import onekernel
import ppo_mjx

TASK_IDS = list(ppo_mjx.TASKS)
WORLDS, STEPS = 20, 50


@dataclasses.dataclass(frozen=True)
class Recording:
    """Gymnasium's random episodes [WORLDS, STEPS, ...], which go on after a termination."""

    qpos: np.ndarray  # qpos, qvel and warmstart are those before the step
    qvel: np.ndarray
    warmstart: np.ndarray
    x: np.ndarray  # where the reward takes the robot to be
    action: np.ndarray
    next_qpos: np.ndarray
    obs: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray


def make_gymnasium(task_id: str):
    """Gymnasium's environment; the humanoids with the solver that MJX has (test_humanoids_solver_is_near: PGS)."""
    env = gymnasium.make(task_id + "-v5").unwrapped
    if task_id.startswith("Humanoid"):
        env.model.opt.solver, env.model.opt.iterations = mujoco.mjtSolver.mjSOL_NEWTON, 100
    return env


@functools.cache
def record(task_id: str) -> Recording:
    env = make_gymnasium(task_id)
    rng = np.random.default_rng(0)
    rows = []
    task = ppo_mjx.TASKS[task_id]
    for world in range(WORLDS):
        env.reset(seed=world)
        for _ in range(STEPS):
            # float32 values, so that all precisions get the same action
            action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32).astype(float)
            before = [x.copy() for x in (env.data.qpos, env.data.qvel, env.data.qacc_warmstart)]
            before.append(task.sense(functools.partial(getattr, env.data), np)[0])
            obs, reward, terminated, _, _ = env.step(action)
            rows.append((*before, action, env.data.qpos.copy(), obs, reward, terminated))
    return Recording(
        *(np.array(x).reshape(WORLDS, STEPS, *np.shape(x[0])) for x in zip(*rows, strict=True))
    )


@functools.cache
def make_env(task_id: str) -> ppo_mjx.Env:
    """One for all tests of a task, so that each of its kernels is traced and compiled once."""
    return ppo_mjx.Env(ppo_mjx.Args(env_id=task_id))


@functools.cache
def compiled_step(task_id: str, x64: bool):
    """The environment, and one compiled step of WORLDS worlds from (qpos, qvel, warmstart, x, action). In float64 it
    goes by XLA."""
    if x64:
        # JAX 0.9 mixes up its traces of float64 constants between the precisions.
        jax.clear_caches()

    def step(qpos, qvel, warmstart, x, action):
        reset = jax.vmap(ppo_mjx.kernel(env.reset))(jax.random.split(jax.random.key(0), WORLDS))
        data = reset.data.replace(qpos=qpos, qvel=qvel, qacc_warmstart=warmstart)
        state = reset.replace(data=data, info=reset.info | {"x": x})
        return jax.vmap(ppo_mjx.kernel(env.step))(state, action)

    def call(*inputs):
        with jax.enable_x64(x64):
            return jax.device_get(compiled(*(jnp.asarray(x, float) for x in inputs)))

    with jax.enable_x64(x64), warnings.catch_warnings():
        if x64:
            warnings.simplefilter("ignore", onekernel.Fallback)
        env = ppo_mjx.Env(ppo_mjx.Args(env_id=task_id)) if x64 else make_env(task_id)
        sizes = (env.model.nq,), (env.model.nv,), (env.model.nv,), (), (env.model.nu,)
        compiled = (
            jax.jit(step).lower(*(jnp.zeros((WORLDS, *size), float) for size in sizes)).compile()
        )
    if x64:
        jax.clear_caches()
    return env, call


# A random one of each episode.
MOMENT = np.arange(WORLDS), np.random.default_rng(1).integers(0, STEPS, WORLDS)


def one_step(task_id: str, x64: bool):
    """MJX's step from the MOMENT of each recorded episode."""
    seen = record(task_id)
    inputs = (seen.qpos, seen.qvel, seen.warmstart, seen.x, seen.action)
    return compiled_step(task_id, x64)[1](*(x[MOMENT] for x in inputs))
