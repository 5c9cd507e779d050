# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "jax==0.9.2",
#     "mujoco==3.17.0",
#     "mujoco-mjx==3.17.0",
#     "flax==0.12.6",
#     "optax==0.2.8",
#     "orbax-checkpoint==0.12.8",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tensorboardX==2.6.5",
#     "tqdm==4.68.4",
#     "imageio[ffmpeg]==2.38.1",
# ]
# ///
"""PPO on Gymnasium's locomotion tasks, on MuJoCo XLA (MJX): one file, one jitted program per iteration.

    python ppo_mjx.py --num-envs 256                  train HalfCheetah, watch it in TensorBoard under runs/
    python ppo_mjx.py --env-id Walker2d               ... or Hopper
    python ppo_mjx.py --resume runs/NAME              go on, bit for bit, where a run stopped
    python ppo_mjx.py --evaluate runs/NAME            judge its policy in MJX, in C MuJoCo and in Gymnasium
    python ppo_mjx.py --smoke                         check this machine's set-up

The map: 1 settings, 2 models, 3 environment, 4 statistics, 5 networks, 6 training state, 7 rollout, 8 advantages,
9 loss and update, 10 one training iteration; then the bookkeeping: 11 evaluation, 12 video, 13 saving, 14 command line,
15 main, 16 smoke test. What PPO *is* stands in 2 to 10.

Shapes: T = num_steps, N = worlds on this device, B = T * N, O = observation, A = action. A record's fields are
[T, N, ...] in a rollout, [B, ...] in a batch and [B / num_minibatches, ...] in a minibatch.
Sources: Schulman et al., arXiv:1707.06347 (PPO) and arXiv:1506.02438 (GAE); details by the names of CleanRL's
ppo_continuous_action.py; tasks by gymnasium 1.4.0. docs/ppo_mjx.md says more, with measurements.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import flax.linen as nn
import imageio
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from mujoco import mjx
from mujoco.rendering.classic import gl_context
from tensorboardX import SummaryWriter
from tqdm import tqdm

# ---- 1. Settings ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args:
    """PPO on Gymnasium's locomotion tasks, on MuJoCo XLA."""

    # The run
    exp_name: str = "ppo_mjx"
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """every random number of a run follows from it"""
    num_devices: int | None = None
    """devices that share the worlds; by default all GPUs, or on a CPU as many XLA devices as it has cores"""
    runs_dir: str = "runs"
    """folder for the run folders"""
    track: bool = False
    """log to Weights & Biases too"""
    wandb_project_name: str = "mjx-rl"
    """project on Weights & Biases"""
    wandb_entity: str | None = None
    """team on Weights & Biases"""
    capture_video: bool = False
    """write an mp4 of one C MuJoCo episode when the run ends, or of the policy that --evaluate judges"""
    checkpoint_every: int = 50
    """iterations between two checkpoints; the last three are kept"""
    log_every: int = 10
    """iterations between two printed lines where the output is no terminal"""
    compile_cache: bool = True
    """keep compiled programs in the user's cache folder (or JAX_COMPILATION_CACHE_DIR), for a quicker next start"""
    resume: str | None = None
    """run folder to go on with; its own settings hold"""
    evaluate: str | None = None
    """run folder whose policy to judge, without training"""
    smoke: bool = False
    """check the set-up: build, train, save, resume and evaluate in short, one line a stage"""

    # The environment
    env_id: str = "HalfCheetah"
    """task, equal to Gymnasium's v5: HalfCheetah, Hopper or Walker2d"""
    physics: str = "fast"
    """fast: settings of the TASKS table, measured in docs/ppo_mjx.md; exact: the original's integrator and solver"""
    eval_every: int = 100
    """iterations between two evaluations in MJX; 0 for none"""
    eval_episodes: int = 20
    """episodes of each evaluation"""

    # The algorithm; names are CleanRL's
    total_timesteps: int = 2_000_000
    """environment steps of the run, over all worlds"""
    learning_rate: float = 1e-3
    """Adam's step size at the start"""
    num_envs: int = 256
    """worlds stepped at once, over all devices"""
    num_steps: int = 16
    """steps of each world in one rollout"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of the generalised advantage estimate"""
    num_minibatches: int = 32
    """minibatches of one epoch"""
    update_epochs: int = 5
    """passes over a rollout"""
    norm_adv: bool = True
    """normalise advantages, over the whole rollout"""
    clip_coef: float = 0.2
    """clipping range of the probability ratio"""
    clip_vloss: bool = False
    """clip the value loss as well"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""
    target_kl: float | None = None
    """end an update after the epoch whose mean KL divergence exceeds this"""
    norm_obs: bool = True
    """normalise observations by their running mean and variance"""
    norm_reward: bool = True
    """divide rewards by the running standard deviation of the discounted return"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """widths of the tanh layers, of the actor and of the critic"""
    init_log_std: float = -0.5
    """logarithm of the policy's standard deviation at the start"""
    stagger_episodes: bool = True
    """start the worlds' clocks at random times, so that time limits do not all fall into one rollout"""

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size


# ---- 2. Models ------------------------------------------------------------------------------------------------------
# Written for this file; a test holds the compiled models equal to Gymnasium's. Units are SI, angles radians.

MJCF = """
<mujoco model="{name}">
  <compiler angle="radian"/>
  <option timestep="{timestep}" integrator="{integrator}"/>
  <default>
    {default}
    <motor ctrllimited="true" ctrlrange="-1 1"/>
    <default class="root"><joint type="slide" limited="false" armature="0" damping="0" pos="{root}"/></default>
  </default>
  <asset>
    <texture name="sky" type="skybox" builtin="gradient" rgb1=".4 .6 .8" rgb2="0 0 0" width="100" height="100"/>
    <texture name="grid" type="2d" builtin="checker" rgb1=".2 .3 .4" rgb2=".1 .2 .3" width="100" height="100"/>
    <material name="grid" texture="grid" texrepeat="60 60"/>
  </asset>
  <worldbody>
    <light directional="true" pos="0 0 3" dir="0 0 -1"/>
    {floor}
    <body name="torso" pos="0 0 {height}">
      <camera name="track" mode="trackcom" pos="0 -3 {camera}" xyaxes="1 0 0 0 0 1"/>
      <joint class="root" name="rootx" axis="1 0 0"/>
      <joint class="root" name="rootz" axis="0 0 1" ref="{ref}"/>
      <joint class="root" name="rooty" axis="0 1 0" type="hinge" pos="0 0 0"/>
      {body}
    </body>
  </worldbody>
  <actuator>{motors}</actuator>
</mujoco>
"""


def cheetah_mjcf() -> str:
    """HalfCheetah: 9 degrees of freedom, 14 kg (hence the odd density), six sprung joints."""
    segments = dict(  # joint range, stiffness, damping; capsule position, pitch, half length; motor gear
        bthigh=("-.5 0 0", "-.52 1.05", 240, 6, ".1 0 -.13", -3.8, 0.145, 120),
        bshin=(".16 0 -.25", "-.785 .785", 180, 4.5, "-.14 0 -.07", -2.03, 0.15, 90),
        bfoot=("-.28 0 -.14", "-.4 .785", 120, 3, ".03 0 -.097", -0.27, 0.094, 60),
        fthigh=(".5 0 0", "-1 .7", 180, 4.5, "-.07 0 -.12", 0.52, 0.133, 120),
        fshin=("-.14 0 -.24", "-1.2 .87", 120, 3, ".065 0 -.09", -0.6, 0.106, 60),
        ffoot=(".13 0 -.18", "-.5 .5", 60, 1.5, ".045 0 -.07", -0.6, 0.07, 30),
    )
    body = '<geom name="torso" fromto="-.5 0 0 .5 0 0"/><geom name="head" pos=".6 0 .1" euler="0 .87 0" size=".046 .15"/>'
    for name, (pos, limits, stiffness, damping, geom_pos, pitch, length, _) in segments.items():
        body += f"""<body name="{name}" pos="{pos}">
            <joint name="{name}" range="{limits}" stiffness="{stiffness}" damping="{damping}"/>
            <geom name="{name}" pos="{geom_pos}" euler="0 {pitch} 0" size=".046 {length}"/>"""
        body += "</body></body></body>" if name.endswith("foot") else ""  # each leg is a chain of three bodies
    return MJCF.format(
        name="half_cheetah",
        timestep=0.01,
        integrator="Euler",
        default="""<joint axis="0 1 0" armature=".1" limited="true" solimplimit="0 .8 .03"/>
            <geom type="capsule" size=".046" conaffinity="0" friction=".4 .1 .1" solimp="0 .8 .01"
                density="660.8849500774735" rgba=".8 .6 .4 1"/>""",
        floor='<geom name="floor" type="plane" size="40 40 40" conaffinity="1" material="grid"/>',
        height=0.7,
        root="0 0 0",
        ref=0,
        camera=0.3,
        body=body,
        motors="".join(f'<motor name="{name}" joint="{name}" gear="{s[-1]}"/>' for name, s in segments.items()),
    )


def upright_mjcf(name: str, legs: list[str], default: str, floor: str, heel: float, foot: str, gear: int) -> str:
    """Hopper or Walker2d: a torso on one or two legs of thigh, shin and foot.

    legs: suffix of each leg's names. heel: distance in m from the foot's origin back to the ankle.
    foot: position, size and friction of the foot's capsule. Lengths in m, gear in Nm.
    """
    body = '<geom name="torso_geom" size=".05 .2"/>'
    for leg in legs:
        body += f"""<body name="thigh{leg}" pos="0 0 -.2">
            <joint name="thigh{leg}_joint" range="-2.6179938779914944 0"/>
            <geom name="thigh{leg}_geom" pos="0 0 -.225" size=".05 .225"/>
            <body name="leg{leg}" pos="0 0 -.7">
              <joint name="leg{leg}_joint" pos="0 0 .25" range="-2.6179938779914944 0"/>
              <geom name="leg{leg}_geom" size=".04 .25"/>
              <body name="foot{leg}" pos="{heel} 0 -.35">
                <joint name="foot{leg}_joint" pos="-{heel} 0 .1" range="-.7853981633974483 .7853981633974483"/>
                <geom name="foot{leg}_geom" quat=".7071067811865475 0 -.7071067811865475 0" {foot}/>
              </body>
            </body>
          </body>"""
    joints = [f"{part}{leg}_joint" for leg in legs for part in ("thigh", "leg", "foot")]
    return MJCF.format(
        name=name,
        timestep=0.002,
        integrator="RK4",
        default=default,
        floor=floor,
        height=1.25,
        root="0 0 -1.25",
        ref=1.25,
        camera=-0.25,
        body=body,
        motors="".join(f'<motor joint="{joint}" gear="{gear}"/>' for joint in joints),
    )


@dataclasses.dataclass(frozen=True)
class Task:
    """What tells one task from another: the numbers of Gymnasium's v5, then the settings of `--physics fast`."""

    mjcf: str
    frame_skip: int  # physics steps per environment step
    ctrl_cost: float  # weight of the squared action
    healthy_reward: float  # per step, while healthy
    healthy_z: tuple[float, float]  # height of the torso in m
    healthy_pitch: tuple[float, float]  # rad
    healthy_state: float  # bound on every coordinate but x, and on every velocity
    velocity_clip: float  # bound on the observed velocities
    reset_noise: float
    gaussian_velocity: bool  # reset velocities normal instead of uniform
    fast_timestep: float  # s; frame_skip changes with it, the control step stays
    fast_iterations: tuple[int, int]  # Newton steps, line search steps
    fast_max_contacts: int  # deepest contacts that are kept; 0 keeps all
    fast_feet_only: bool  # only the feet collide with the floor
    time_limit: int = 1000  # steps of an episode


INF = math.inf
TASKS = {
    "HalfCheetah": Task(
        mjcf=cheetah_mjcf(), frame_skip=5, ctrl_cost=0.1, healthy_reward=0.0,
        healthy_z=(-INF, INF), healthy_pitch=(-INF, INF), healthy_state=INF,
        velocity_clip=INF, reset_noise=0.1, gaussian_velocity=True,
        fast_timestep=0.01, fast_iterations=(3, 6), fast_max_contacts=6, fast_feet_only=False,
    ),
    "Hopper": Task(
        mjcf=upright_mjcf(
            "hopper", [""],
            default="""<joint axis="0 -1 0" armature="1" damping="1" limited="true"/>
                <geom type="capsule" condim="1" margin=".001" friction=".9" solimp=".8 .8 .01" rgba=".8 .6 .4 1"/>""",
            floor='<geom name="floor" type="plane" size="20 20 .125" condim="3" friction="1" material="grid"/>',
            heel=0.13, foot='pos="-.065 0 .1" size=".06 .195" friction="2"', gear=200,
        ),
        frame_skip=4, ctrl_cost=1e-3, healthy_reward=1.0,
        healthy_z=(0.7, INF), healthy_pitch=(-0.2, 0.2), healthy_state=100.0,
        velocity_clip=10.0, reset_noise=5e-3, gaussian_velocity=False,
        fast_timestep=0.002, fast_iterations=(3, 6), fast_max_contacts=0, fast_feet_only=True,
    ),
    "Walker2d": Task(
        mjcf=upright_mjcf(
            "walker2d", ["", "_left"],
            default="""<joint axis="0 -1 0" armature=".01" damping=".1" limited="true"/>
                <geom type="capsule" conaffinity="0" friction=".9 .1 .1" rgba=".8 .6 .4 1"/>""",
            floor='<geom name="floor" type="plane" size="40 40 40" conaffinity="1" friction=".7 .1 .1" material="grid"/>',
            heel=0.2, foot='pos="-.1 0 .1" size=".06 .1" friction="1.9 .1 .1"', gear=100,
        ),
        frame_skip=4, ctrl_cost=1e-3, healthy_reward=1.0,
        healthy_z=(0.8, 2.0), healthy_pitch=(-1.0, 1.0), healthy_state=INF,
        velocity_clip=10.0, reset_noise=5e-3, gaussian_velocity=False,
        fast_timestep=0.002, fast_iterations=(3, 6), fast_max_contacts=0, fast_feet_only=True,
    ),
}  # fmt: skip


def load_model(task: Task, physics: str = "exact") -> mujoco.MjModel:
    """Compile a task's model. physics: exact, or fast with the table's settings (docs/ppo_mjx.md has their price)."""
    mjcf = task.mjcf
    if physics == "fast" and task.fast_max_contacts:
        cap = f'<custom><numeric name="max_contact_points" data="{task.fast_max_contacts}"/></custom></mujoco>'
        mjcf = mjcf.replace("</mujoco>", cap)
    model = mujoco.MjModel.from_xml_string(mjcf)
    if physics == "fast":
        model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
        model.opt.timestep = task.fast_timestep
        model.opt.iterations, model.opt.ls_iterations = task.fast_iterations
        if task.fast_feet_only:  # before another shape can reach the floor or itself, the episode has ended
            for geom in range(model.ngeom):
                name = model.geom(geom).name
                model.geom_contype[geom] = name.startswith("foot")
                model.geom_conaffinity[geom] = name == "floor"
    return model


# ---- 3. Environment -------------------------------------------------------------------------------------------------


@struct.dataclass
class Physics:
    """The smallest state that determines the future; everything else in mjx.Data is recomputed by each step."""

    qpos: jax.Array  # [nq] m, rad
    qvel: jax.Array  # [nv] m/s, rad/s
    qacc_warmstart: jax.Array  # [nv] where the constraint solver starts


@struct.dataclass
class State:
    """One world between two steps; the fields are those of MuJoCo Playground."""

    data: Physics
    obs: jax.Array  # [O]
    reward: jax.Array
    done: jax.Array  # float32, 1 where the episode terminated (a time limit is no termination)
    metrics: dict[str, jax.Array]  # the terms of the reward
    info: dict[str, jax.Array]  # elapsed steps, truncated by the time limit, broken physics


def observe(task: Task, qpos, qvel, xp=jnp):
    """Observation: all coordinates but x, then all velocities (clipped in Hopper and Walker2d).

    qpos [..., nq], qvel [..., nv] -> [..., nq - 1 + nv]; xp is the array library, jax.numpy or numpy.
    """
    return xp.concatenate([qpos[..., 1:], xp.clip(qvel, -task.velocity_clip, task.velocity_clip)], axis=-1)


def is_healthy(task: Task, qpos, qvel, xp=jnp):
    """Whether the episode goes on; always so in HalfCheetah. qpos [..., nq], qvel [..., nv] -> bool [...]."""
    z, pitch = qpos[..., 1], qpos[..., 2]
    state = xp.concatenate([qpos[..., 2:], qvel], axis=-1)
    healthy = (task.healthy_z[0] < z) & (z < task.healthy_z[1])
    healthy &= (task.healthy_pitch[0] < pitch) & (pitch < task.healthy_pitch[1])
    return healthy & (xp.abs(state) < task.healthy_state).all(axis=-1)


def reward_terms(task: Task, x_velocity, action, healthy, xp=jnp) -> dict:
    """The reward is the sum of these. x_velocity in m/s [...]; action [..., A], clipped to [-1, 1]; healthy [...]."""
    return {
        "reward_forward": x_velocity,
        "reward_ctrl": -task.ctrl_cost * xp.square(action).sum(axis=-1),
        "reward_survive": task.healthy_reward * healthy,
    }


def cho_factor(matrix: jax.Array, lower: bool = False) -> tuple[jax.Array, bool]:
    """Cholesky factor of one small matrix [n, n], unrolled; its diagonal holds the reciprocals.

    Under vmap each scalar below is a vector over worlds, where LAPACK (CPU) or cuSOLVER (GPU) would factor one
    small matrix after the other.
    """
    n = matrix.shape[-1]
    factor = [[jnp.zeros_like(matrix[0, 0])] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            rest = matrix[i, j] - sum(factor[i][k] * factor[j][k] for k in range(j))
            factor[i][j] = jax.lax.rsqrt(rest) if i == j else rest * factor[j][j]
    return jnp.array(factor), lower


def cho_solve(factor_and_lower: tuple[jax.Array, bool], vector: jax.Array) -> jax.Array:
    """Solve with the factor of `cho_factor`: matrix @ result = vector [n], by forward and backward substitution."""
    factor = factor_and_lower[0]
    n = factor.shape[-1]
    x = [vector[i] for i in range(n)]
    for i in range(n):
        x[i] = (x[i] - sum(factor[i, k] * x[k] for k in range(i))) * factor[i, i]
    for i in reversed(range(n)):
        x[i] = (x[i] - sum(factor[k, i] * x[k] for k in range(i + 1, n))) * factor[i, i]
    return jnp.array(x)


class Env:
    """One world of a Gymnasium v5 task on MJX: `reset(key)` and `step(state, action)` are pure, batch them by vmap.

    Only constants live in the object. Faster than MAX_SPEED, or not finite, is no physics any more: such a step is
    `info["broken"]`, earns nothing and shows the observation before it.
    """

    MAX_SPEED = 200.0  # m/s and rad/s; trained policies stay below 60

    def __init__(self, env_id: str, physics: str = "fast"):
        self.task = TASKS[env_id]
        model = load_model(self.task, physics)
        original = load_model(self.task)
        self.control_dt = original.opt.timestep * self.task.frame_skip  # s
        self.frame_skip = round(self.control_dt / model.opt.timestep)
        self.action_size = model.nu
        self.observation_size = model.nq - 1 + model.nv
        self.model = mjx.put_model(model, impl="jax")
        self.template = mjx.make_data(self.model)
        self.init_qpos = np.array(model.qpos0)

    def reset(self, key: jax.Array) -> State:
        """The start of an episode, with Gymnasium's reset noise. key: one PRNG key."""
        task, noise = self.task, self.task.reset_noise
        qpos_key, qvel_key = jax.random.split(key)
        qpos = self.init_qpos + jax.random.uniform(qpos_key, (self.model.nq,), minval=-noise, maxval=noise)
        if task.gaussian_velocity:
            qvel = noise * jax.random.normal(qvel_key, (self.model.nv,))
        else:
            qvel = jax.random.uniform(qvel_key, (self.model.nv,), minval=-noise, maxval=noise)
        zero, no = jnp.zeros(()), jnp.array(False)
        return State(
            data=Physics(qpos, qvel, jnp.zeros_like(qvel)),
            obs=observe(task, qpos, qvel),
            reward=zero,
            done=zero,
            metrics={"reward_forward": zero, "reward_ctrl": zero, "reward_survive": zero},
            info={"elapsed": jnp.zeros((), jnp.int32), "truncated": no, "broken": no},
        )

    def step(self, state: State, action: jax.Array) -> State:
        """One control step. action [A] in [-1, 1], the motors' torques as shares of their largest."""

        def substep(data: Physics, _):
            full = self.template.replace(
                qpos=data.qpos, qvel=data.qvel, qacc_warmstart=data.qacc_warmstart, ctrl=action
            )
            # TF32, a GPU's default, spoils dynamics; MJX looks its Cholesky up while it is traced, so ours is put there.
            with (
                jax.default_matmul_precision("highest"),
                mock.patch.multiple(jax.scipy.linalg, cho_factor=cho_factor, cho_solve=cho_solve),
            ):
                full = mjx.step(self.model, full)
            return Physics(full.qpos, full.qvel, full.qacc_warmstart), None

        data, _ = jax.lax.scan(substep, state.data, None, length=self.frame_skip)
        sane = jnp.isfinite(data.qpos).all() & (jnp.abs(data.qvel) < self.MAX_SPEED).all()  # False for NaN, too
        healthy = is_healthy(self.task, data.qpos, data.qvel)
        x_velocity = (data.qpos[0] - state.data.qpos[0]) / self.control_dt
        terms = reward_terms(self.task, x_velocity, action, healthy)
        terms = {name: jnp.where(sane, term, 0.0) for name, term in terms.items()}
        elapsed = state.info["elapsed"] + 1
        return State(
            data=data,
            obs=jnp.where(sane, observe(self.task, data.qpos, data.qvel), state.obs),
            reward=sum(terms.values()),
            done=(~(healthy & sane)).astype(jnp.float32),
            metrics=terms,
            info={"elapsed": elapsed, "truncated": elapsed >= self.task.time_limit, "broken": ~sane},
        )


# ---- 4. Running statistics ------------------------------------------------------------------------------------------


@struct.dataclass
class RunningStats:
    """Mean and variance of all that was seen so far."""

    count: jax.Array
    mean: jax.Array
    var: jax.Array


def init_stats(shape: tuple[int, ...]) -> RunningStats:
    return RunningStats(count=jnp.array(1e-4), mean=jnp.zeros(shape), var=jnp.ones(shape))


def update_stats(stats: RunningStats, batch: jax.Array) -> RunningStats:
    """Merge a batch [T, N, ...] of every device into the statistics (Chan et al.'s parallel variance)."""
    count = batch.shape[0] * batch.shape[1] * jax.lax.axis_size("devices")
    mean = jax.lax.pmean(batch.mean(axis=(0, 1)), "devices")
    var = jax.lax.pmean(jnp.square(batch - mean).mean(axis=(0, 1)), "devices")
    total = stats.count + count
    share = count / total
    delta = mean - stats.mean
    return RunningStats(
        count=total,
        mean=stats.mean + share * delta,
        var=stats.var + share * (var - stats.var) + share * (1 - share) * jnp.square(delta),
    )


def normalize(stats: RunningStats, obs: jax.Array) -> jax.Array:
    return jnp.clip((obs - stats.mean) / jnp.sqrt(stats.var + 1e-8), -10.0, 10.0)


# ---- 5. Networks ----------------------------------------------------------------------------------------------------


def orthogonal(width: int, gain: float) -> nn.Dense:
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(gain))


class Actor(nn.Module):
    """Gaussian policy: normalised observation [..., O] -> mean [..., A], and log-std [A] that no state changes."""

    action_size: int
    hidden_sizes: tuple[int, ...]
    init_log_std: float

    @nn.compact
    def __call__(self, obs):
        x = obs
        for width in self.hidden_sizes:
            x = jnp.tanh(orthogonal(width, math.sqrt(2))(x))
        mean = orthogonal(self.action_size, 0.01)(x)  # small, so that the first actions are all noise
        log_std = self.param("log_std", nn.initializers.constant(self.init_log_std), (self.action_size,))
        return mean, log_std


class Critic(nn.Module):
    """Value of a normalised observation [..., O] -> [...], in units of the scaled reward."""

    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, obs):
        x = obs
        for width in self.hidden_sizes:
            x = jnp.tanh(orthogonal(width, math.sqrt(2))(x))
        return orthogonal(1, 1.0)(x)[..., 0]


def log_prob(mean: jax.Array, log_std: jax.Array, action: jax.Array) -> jax.Array:
    """Log density of a diagonal Gaussian. mean, action [..., A]; log_std [A] -> [...]."""
    z = (action - mean) * jnp.exp(-log_std)
    return (-0.5 * jnp.square(z) - log_std - 0.5 * math.log(2 * math.pi)).sum(axis=-1)


def entropy(log_std: jax.Array) -> jax.Array:
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(axis=-1)


def make_networks(args: Args, env: Env) -> tuple[Actor, Critic]:
    return Actor(env.action_size, args.hidden_sizes, args.init_log_std), Critic(args.hidden_sizes)


# ---- 6. Training state ----------------------------------------------------------------------------------------------


@struct.dataclass
class Learner:
    """What is learnt; every device holds the same."""

    params: dict  # {"actor": ..., "critic": ...}
    opt_state: optax.OptState
    obs_stats: RunningStats  # [O]
    return_stats: RunningStats  # [], of the discounted return
    key: jax.Array  # for the shuffles
    iteration: jax.Array  # int32, iterations done


@struct.dataclass
class Worlds:
    """What belongs to one world; every field is [N, ...] and split over the devices.

    Each world draws from its own key, so a rollout does not depend on how many devices share the worlds.
    """

    env_state: State
    key: jax.Array
    discounted_return: jax.Array  # of the rewards so far, for the reward's scale
    episode_return: jax.Array
    episode_length: jax.Array  # int32
    broken: jax.Array  # int32, how often the physics of this world broke


@struct.dataclass
class TrainState:
    """All that a run's future depends on; a checkpoint is this and the settings."""

    learner: Learner
    worlds: Worlds


STATE_SPEC = TrainState(learner=P(), worlds=P("devices"))


def make_optimizer(args: Args) -> optax.GradientTransformation:
    # One flat vector instead of a dozen small arrays: far fewer operations for each of the many small updates.
    return optax.flatten(optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam(eps=1e-5)))


def init_train_state(args: Args, env: Env, key: jax.Array) -> TrainState:
    actor_key, critic_key, shuffle_key, reset_key, clock_key, world_key = jax.random.split(key, 6)
    actor, critic = make_networks(args, env)
    obs = jnp.zeros(env.observation_size)
    params = {"actor": actor.init(actor_key, obs), "critic": critic.init(critic_key, obs)}
    env_state = jax.vmap(env.reset)(jax.random.split(reset_key, args.num_envs))
    if args.stagger_episodes:
        env_state.info["elapsed"] = jax.random.randint(clock_key, (args.num_envs,), 0, env.task.time_limit)
    zeros, none = jnp.zeros(args.num_envs), jnp.zeros(args.num_envs, jnp.int32)
    return TrainState(
        learner=Learner(
            params=params,
            opt_state=make_optimizer(args).init(params),
            obs_stats=init_stats((env.observation_size,)),
            return_stats=init_stats(()),
            key=shuffle_key,
            iteration=jnp.zeros((), jnp.int32),
        ),
        worlds=Worlds(env_state, jax.random.split(world_key, args.num_envs), zeros, zeros, none, none),
    )


# ---- 7. Rollout -----------------------------------------------------------------------------------------------------


@struct.dataclass
class Transition:
    """One step of the worlds; `terminated`, `done` and `next_obs` are the outcome of `action`."""

    obs: jax.Array  # [O]
    next_obs: jax.Array  # [O], that the step ended on, before any reset
    action: jax.Array  # [A], as sampled; the environment gets it clipped to [-1, 1]
    logprob: jax.Array
    reward: jax.Array
    terminated: jax.Array  # bool
    done: jax.Array  # bool, terminated or at the time limit
    discounted_return: jax.Array
    episode_return: jax.Array  # of the episode so far
    episode_length: jax.Array
    finished: jax.Array  # bool, a whole episode has just ended: neither broken nor begun with a staggered clock
    reward_terms: dict[str, jax.Array]


def rollout(args: Args, env: Env, learner: Learner, worlds: Worlds) -> tuple[Worlds, Transition]:
    """Let the policy act for num_steps steps in all worlds. Returns the worlds and transitions [T, N, ...]."""
    actor, _ = make_networks(args, env)

    def step(worlds: Worlds, _):
        key, action_key, reset_key = jnp.unstack(jax.vmap(partial(jax.random.split, num=3))(worlds.key), axis=1)
        state = worlds.env_state
        mean, log_std = actor.apply(learner.params["actor"], normalize(learner.obs_stats, state.obs))
        noise = jax.vmap(partial(jax.random.normal, shape=(env.action_size,)))(action_key)
        action = mean + jnp.exp(log_std) * noise
        next_state = jax.vmap(env.step)(state, jnp.clip(action, -1.0, 1.0))

        broken = next_state.info["broken"]
        terminated = next_state.done > 0
        done = terminated | next_state.info["truncated"]
        episode_return = worlds.episode_return + next_state.reward
        episode_length = worlds.episode_length + 1
        discounted_return = args.gamma * worlds.discounted_return + next_state.reward
        transition = Transition(
            obs=state.obs,
            next_obs=next_state.obs,
            action=action,
            logprob=log_prob(mean, log_std, action),
            reward=next_state.reward,
            terminated=terminated,
            done=done,
            discounted_return=discounted_return,
            episode_return=episode_return,
            episode_length=episode_length,
            finished=done & ~broken & (episode_length == next_state.info["elapsed"]),
            reward_terms=next_state.metrics,
        )
        next_worlds = Worlds(next_state, key, discounted_return, episode_return, episode_length, worlds.broken + broken)
        zeros, none = jnp.zeros_like(episode_return), jnp.zeros_like(episode_length)
        fresh = Worlds(jax.vmap(env.reset)(reset_key), key, zeros, zeros, none, next_worlds.broken)
        return where_done(done, fresh, next_worlds), transition

    return jax.lax.scan(step, worlds, None, length=args.num_steps)


def where_done(done: jax.Array, fresh: Worlds, going_on: Worlds) -> Worlds:
    """Take each world [N, ...] from `fresh` where its episode is done [N]."""
    return jax.tree.map(
        lambda new, old: jnp.where(done.reshape(done.shape + (1,) * (old.ndim - 1)), new, old), fresh, going_on
    )


# ---- 8. Advantages --------------------------------------------------------------------------------------------------


def compute_gae(args: Args, reward, value, next_value, terminated, done) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates of a rollout, from its last step to its first.

    All arguments are [T, N]. next_value is the value of the state that each step ended on, before any reset: a
    terminated episode is worth nothing beyond its end, one cut by the time limit as much as that state promised.
    Returns advantage and value target, [T, N], in units of the scaled reward.
    Source: Schulman et al., arXiv:1506.02438, equation 16.
    """

    def backwards(next_advantage, step):
        reward, value, next_value, terminated, done = step
        delta = reward + args.gamma * jnp.where(terminated, 0.0, next_value) - value
        advantage = delta + args.gamma * args.gae_lambda * jnp.where(done, 0.0, next_advantage)
        return advantage, advantage

    steps = (reward, value, next_value, terminated, done)
    _, advantage = jax.lax.scan(backwards, jnp.zeros_like(reward[0]), steps, reverse=True)
    return advantage, advantage + value


# ---- 9. Loss and update ---------------------------------------------------------------------------------------------


@struct.dataclass
class Batch:
    """What the loss needs of each transition."""

    obs: jax.Array  # [O], normalised
    action: jax.Array  # [A]
    logprob: jax.Array  # under the policy that acted
    value: jax.Array  # by the critic before the update
    advantage: jax.Array
    target: jax.Array  # for the value


def ppo_loss(args: Args, env: Env, params: dict, mb: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """PPO's clipped loss of one minibatch, and what to log of it.

    Source: Schulman et al., arXiv:1707.06347, equations 7 and 9; approx_kl by http://joschu.net/blog/kl-approx.html.
    """
    actor, critic = make_networks(args, env)
    mean, log_std = actor.apply(params["actor"], mb.obs)
    value = critic.apply(params["critic"], mb.obs)

    logratio = log_prob(mean, log_std, mb.action) - mb.logprob
    ratio = jnp.exp(logratio)
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -jnp.minimum(mb.advantage * ratio, mb.advantage * clipped_ratio).mean()

    value_error = jnp.square(value - mb.target)
    if args.clip_vloss:
        clipped_value = mb.value + jnp.clip(value - mb.value, -args.clip_coef, args.clip_coef)
        value_error = jnp.maximum(value_error, jnp.square(clipped_value - mb.target))
    value_loss = 0.5 * value_error.mean()

    loss = policy_loss - args.ent_coef * entropy(log_std) + args.vf_coef * value_loss
    return loss, {
        "losses/loss": loss,
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy(log_std),
        "losses/old_approx_kl": (-logratio).mean(),
        "losses/approx_kl": ((ratio - 1) - logratio).mean(),
        "losses/clipfrac": (jnp.abs(ratio - 1) > args.clip_coef).mean(),
    }


def update_epochs(args: Args, env: Env, learner: Learner, batch: Batch) -> tuple[Learner, dict[str, jax.Array]]:
    """All epochs of minibatch updates on a batch [B, ...]; metrics are means over the minibatches that were used.

    Every device shuffles its own worlds' share; gradients are averaged over the devices, so their networks stay equal.
    """
    optimizer = make_optimizer(args)
    learning_rate = args.learning_rate * (1 - learner.iteration / args.num_iterations if args.anneal_lr else 1)
    loss_gradient = jax.grad(ppo_loss, argnums=2, has_aux=True)

    def minibatch_step(carry, mb: Batch):
        params, opt_state, stopped = carry
        gradient, metrics = loss_gradient(args, env, params, mb)
        gradient = jax.lax.pmean(gradient, "devices")
        metrics["losses/grad_norm"] = optax.global_norm(gradient)
        updates, next_opt_state = optimizer.update(gradient, opt_state)
        next_params = jax.tree.map(lambda param, update: param - learning_rate * update, params, updates)
        if args.target_kl is not None:
            keep = partial(jax.tree.map, lambda old, new: jnp.where(stopped, old, new))
            next_params, next_opt_state = keep(params, next_params), keep(opt_state, next_opt_state)
        return (next_params, next_opt_state, stopped), (metrics, ~stopped)

    def epoch(carry, key):
        order = jax.random.permutation(key, batch.advantage.shape[0])
        shuffled = jax.tree.map(lambda x: x[order].reshape(args.num_minibatches, -1, *x.shape[1:]), batch)
        (params, opt_state, stopped), (metrics, used) = jax.lax.scan(minibatch_step, carry, shuffled)
        if args.target_kl is not None:
            stopped |= jax.lax.pmean(metrics["losses/approx_kl"].mean(), "devices") > args.target_kl
        return (params, opt_state, stopped), (metrics, used)

    key = jax.random.fold_in(jax.random.fold_in(learner.key, learner.iteration), jax.lax.axis_index("devices"))
    carry = (learner.params, learner.opt_state, jnp.array(False))
    carry, (metrics, used) = jax.lax.scan(epoch, carry, jax.random.split(key, args.update_epochs))
    metrics = {tag: (values * used).sum() / used.sum() for tag, values in metrics.items()}
    metrics["charts/learning_rate"] = jnp.asarray(learning_rate, jnp.float32)
    return learner.replace(params=carry[0], opt_state=carry[1], iteration=learner.iteration + 1), metrics


# ---- 10. One training iteration -------------------------------------------------------------------------------------


def device_iteration(args: Args, env: Env, state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
    """Rollout, advantages, update on one device's worlds; metrics by tag, averaged over the devices."""
    learner = state.learner
    _, critic = make_networks(args, env)
    worlds, steps = rollout(args, env, learner, state.worlds)

    reward, return_stats = steps.reward, learner.return_stats
    if args.norm_reward:
        return_stats = update_stats(return_stats, steps.discounted_return)
        reward = jnp.clip(reward / jnp.sqrt(return_stats.var + 1e-8), -10.0, 10.0)
    obs = normalize(learner.obs_stats, steps.obs)
    value = critic.apply(learner.params["critic"], obs)
    next_value = critic.apply(learner.params["critic"], normalize(learner.obs_stats, steps.next_obs))
    advantage, target = compute_gae(args, reward, value, next_value, steps.terminated, steps.done)
    mean = partial(jax.lax.pmean, axis_name="devices")
    explained = 1 - mean(jnp.square(target - value).mean()) / mean(jnp.square(target - mean(target.mean())).mean())
    if args.norm_adv:
        advantage -= mean(advantage.mean())
        advantage /= jnp.sqrt(mean(jnp.square(advantage).mean())) + 1e-8

    batch = Batch(obs, steps.action, steps.logprob, value, advantage, target)
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)  # [T, N, ...] -> [B, ...]
    learner, metrics = update_epochs(args, env, learner, batch)

    # The statistics change only now: the policy that acted and the one that learns must see the same observation.
    obs_stats = update_stats(learner.obs_stats, steps.obs) if args.norm_obs else learner.obs_stats
    metrics |= {name.replace("_", "/", 1): term.mean() for name, term in steps.reward_terms.items()}
    metrics = mean(metrics)
    metrics["losses/explained_variance"] = explained
    metrics |= jax.lax.psum(
        {
            "charts/episodes_finished": steps.finished.sum(),
            "charts/episodic_return": (steps.episode_return * steps.finished).sum(),  # divided below
            "charts/episodic_length": (steps.episode_length * steps.finished).sum(),
            "charts/nan_resets": worlds.broken.sum(),
        },
        "devices",
    )
    episodes = jnp.maximum(metrics["charts/episodes_finished"], 1)
    metrics["charts/episodic_return"] /= episodes
    metrics["charts/episodic_length"] /= episodes
    return TrainState(learner.replace(obs_stats=obs_stats, return_stats=return_stats), worlds), metrics


@partial(jax.jit, static_argnames=("args", "env", "mesh"), donate_argnames="state")
def train_iteration(args: Args, env: Env, mesh: Mesh, state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
    """The whole iteration as one program over the mesh's devices; `state` is donated."""
    iteration = partial(device_iteration, args, env)
    return jax.shard_map(
        iteration, mesh=mesh, in_specs=(STATE_SPEC,), out_specs=(STATE_SPEC, P()), check_vma=False
    )(state)


# ---- 11. Evaluation -------------------------------------------------------------------------------------------------


def export_policy(learner: Learner) -> dict[str, np.ndarray]:
    """All that a deterministic policy needs, as plain arrays: layers w0, b0, w1, ... and the normaliser."""
    layers = learner.params["actor"]["params"]
    arrays = {"obs_mean": learner.obs_stats.mean, "obs_var": learner.obs_stats.var}
    for i in range(len(layers) - 1):  # the rest is log_std
        arrays |= {f"w{i}": layers[f"Dense_{i}"]["kernel"], f"b{i}": layers[f"Dense_{i}"]["bias"]}
    return jax.device_get(arrays)


def act(policy: dict, obs, xp=np):
    """The policy's mean action, clipped: observation [..., O], raw -> [..., A]. Works with numpy alone."""
    x = xp.clip((obs - policy["obs_mean"]) / xp.sqrt(policy["obs_var"] + 1e-8), -10.0, 10.0)
    layers = (len(policy) - 2) // 2
    for i in range(layers):
        x = x @ policy[f"w{i}"] + policy[f"b{i}"]
        x = xp.tanh(x) if i < layers - 1 else x
    return xp.clip(x, -1.0, 1.0)


@partial(jax.jit, static_argnames="env")
def evaluate_mjx(env: Env, policy: dict, keys: jax.Array) -> jax.Array:
    """Returns of one deterministic episode for each key [E] -> [E], with the physics that `env` was made with."""

    def step(carry, _):
        state, alive, total = carry
        state = jax.vmap(env.step)(state, act(policy, state.obs, jnp))
        return (state, alive & (state.done == 0), total + alive * state.reward), None

    state = jax.vmap(env.reset)(keys)
    start = (state, state.done == 0, jnp.zeros(keys.shape[0]))
    return jax.lax.scan(step, start, None, length=env.task.time_limit)[0][2]


def evaluate_c(task: Task, policy: dict, episodes: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The same in C MuJoCo on the original model. Returns the returns [E], and qpos at each step of the first episode."""
    model, rng, returns, path = load_model(task), np.random.default_rng(seed), [], []
    data, dt = mujoco.MjData(model), model.opt.timestep * task.frame_skip
    for episode in range(episodes):
        mujoco.mj_resetData(model, data)
        noise = task.reset_noise
        data.qpos += rng.uniform(-noise, noise, model.nq)
        data.qvel = noise * rng.standard_normal(model.nv) if task.gaussian_velocity else rng.uniform(-noise, noise, model.nv)
        total, healthy, step = 0.0, True, 0
        while healthy and step < task.time_limit:
            x, action = data.qpos[0], act(policy, observe(task, data.qpos, data.qvel, np))
            data.ctrl = action
            mujoco.mj_step(model, data, nstep=task.frame_skip)
            healthy = is_healthy(task, data.qpos, data.qvel, np)
            total += sum(reward_terms(task, (data.qpos[0] - x) / dt, action, healthy, np).values())
            step += 1
            if episode == 0:
                path.append(data.qpos.copy())
        returns.append(total)
    return np.array(returns), path


def evaluate_gymnasium(env_id: str, policy: dict, episodes: int, seed: int) -> np.ndarray:
    """The same in Gymnasium's own environment, where that is installed. Returns the returns [E]."""
    import gymnasium

    returns = []
    with gymnasium.make(env_id + "-v5") as env:
        for episode in range(episodes):
            obs, total, over = env.reset(seed=seed + episode)[0], 0.0, False
            while not over:
                obs, reward, terminated, truncated, _ = env.step(act(policy, obs))
                total, over = total + reward, terminated or truncated
            returns.append(total)
    return np.array(returns)


def judge(args: Args, env: Env, policy: dict) -> tuple[dict[str, dict], list[np.ndarray]]:
    """Evaluate in every simulator at hand, print a table; returns it, and the path of an episode for the video."""
    c_returns, path = evaluate_c(env.task, policy, args.eval_episodes, args.seed)
    rows = {
        f"MJX ({args.physics})": evaluate_mjx(env, policy, jax.random.split(jax.random.key(args.seed), args.eval_episodes)),
        "C MuJoCo": c_returns,
    }
    with contextlib.suppress(ImportError):
        rows[f"Gymnasium {args.env_id}-v5"] = evaluate_gymnasium(args.env_id, policy, args.eval_episodes, args.seed)
    table = {}
    print(f"{'return of ' + str(args.eval_episodes) + ' episodes':<28}{'mean':>9}{'std':>9}{'min':>9}{'max':>9}")
    for name, returns in rows.items():
        table[name] = {k: float(getattr(np, k)(np.asarray(returns))) for k in ("mean", "std", "min", "max")}
        print(f"{name:<28}" + "".join(f"{value:9.1f}" for value in table[name].values()))
    return table, path


# ---- 12. Video ------------------------------------------------------------------------------------------------------


def make_renderer(model: mujoco.MjModel) -> mujoco.Renderer:
    """A renderer by MUJOCO_GL, or else by what this machine can load: EGL, OSMesa, a window."""
    libraries = {"egl": "libEGL.so.1", "osmesa": "libOSMesa.so.8"} if platform.system() == "Linux" else {}
    backend = os.environ.get("MUJOCO_GL")
    for name, library in libraries.items():
        with contextlib.suppress(OSError):
            backend = backend or (ctypes.CDLL(library) and name)
    try:
        if backend:
            os.environ["PYOPENGL_PLATFORM"] = backend
            gl_context.GLContext = importlib.import_module(f"mujoco.{backend}").GLContext
        return mujoco.Renderer(model, height=480, width=640)
    except Exception as error:  # each backend has errors of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fail(f"--capture-video finds no OpenGL ({reason}); install libosmesa6 or libegl1 and set MUJOCO_GL=osmesa or egl")


def write_video(env: Env, path: list[np.ndarray], file: Path) -> None:
    """Render qpos of each step of an episode into an mp4 in real time."""
    model = load_model(env.task)
    data, renderer = mujoco.MjData(model), make_renderer(model)
    every = max(1, round(1 / 50 / env.control_dt))  # about 50 frames a second
    file.parent.mkdir(exist_ok=True)
    with imageio.get_writer(file, fps=1 / (env.control_dt * every)) as video:
        for qpos in path[::every]:
            data.qpos = qpos
            mujoco.mj_forward(model, data)
            renderer.update_scene(data, camera="track")
            video.append_data(renderer.render())


# ---- 13. Saving -----------------------------------------------------------------------------------------------------


def open_checkpoints(run_dir: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=3)
    return ocp.CheckpointManager((run_dir / "checkpoints").absolute(), options=options)


def save(args: Args, checkpoints: ocp.CheckpointManager, run_dir: Path, state: TrainState, iteration: int) -> None:
    """Write a checkpoint of the whole state and settings, and the policy as policy.npz (whole or not at all)."""
    settings = ocp.args.JsonSave(dataclasses.asdict(args))
    checkpoints.save(iteration, args=ocp.args.Composite(state=ocp.args.StandardSave(state), args=settings))
    np.savez(run_dir / "policy.tmp.npz", **export_policy(state.learner))
    os.replace(run_dir / "policy.tmp.npz", run_dir / "policy.npz")
    checkpoints.wait_until_finished()


def restore(checkpoints: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """Read the newest checkpoint into the form and onto the devices of `state`."""
    form = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    return checkpoints.restore(checkpoints.latest_step(), args=ocp.args.Composite(state=form))["state"]


def write_json(file: Path, content: dict) -> None:
    file.with_suffix(".tmp").write_text(json.dumps(content, indent=2) + "\n")
    os.replace(file.with_suffix(".tmp"), file)


# ---- 14. Command line -----------------------------------------------------------------------------------------------


def fail(message: str):
    """End with one line and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv: list[str], default: Args | None = None) -> Args:
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(Args, args=argv, default=default)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip("│ \n") for line in errors.getvalue().splitlines()[1:]]
        fail(" ".join(lines[: next((i for i, line in enumerate(lines) if line.startswith("──")), 1)]))


def check_args(args: Args) -> None:
    """Refuse what cannot be run, in one line, before anything is built."""
    at_least = dict.fromkeys(["num_envs", "num_steps", "num_minibatches", "update_epochs", "total_timesteps"], 1)
    at_least |= dict.fromkeys(["checkpoint_every", "log_every", "eval_episodes"], 1) | {"eval_every": 0, "seed": 0}
    at_least |= dict.fromkeys(["learning_rate", "ent_coef", "vf_coef", "clip_coef", "max_grad_norm"], 0)
    for name, least in at_least.items():
        value = getattr(args, name)
        if not least <= value < INF:
            fail(f"--{name.replace('_', '-')} {value}: must be {least} or more")
    if args.env_id not in TASKS:
        fail(f"--env-id {args.env_id}: unknown; one of {', '.join(TASKS)}")
    if args.physics not in ("fast", "exact"):
        fail(f"--physics {args.physics}: must be fast or exact")
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be between 0 and 1")
    if args.target_kl is not None and not args.target_kl > 0:
        fail(f"--target-kl {args.target_kl}: must be above 0")
    if not args.hidden_sizes or min(args.hidden_sizes) < 1:
        fail("--hidden-sizes: must be positive widths, for instance 64 64")
    if not math.isfinite(args.init_log_std):
        fail(f"--init-log-std {args.init_log_std}: must be finite")
    if args.num_iterations < 1:
        fail(f"--total-timesteps {args.total_timesteps}: less than one rollout of {args.num_envs} x {args.num_steps}")
    if args.num_devices is not None and args.num_devices < 1:
        fail(f"--num-devices {args.num_devices}: must be 1 or more")
    if args.track and not importlib.util.find_spec("wandb"):
        fail("--track needs Weights & Biases: pip install wandb")


def choose_devices(args: Args) -> list[jax.Device]:
    """The devices that share the worlds: all GPUs, or one XLA CPU device per core, since one leaves cores idle."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(RuntimeError):  # the backend runs already, with the devices that it has
        jax.config.update("jax_num_cpu_devices", max(cores, args.num_devices or 1))
    devices = jax.local_devices()
    fits = [
        n
        for n in range(1, len(devices) + 1)
        if args.num_envs % n == 0 and args.batch_size // n % args.num_minibatches == 0
    ]
    if not fits:
        fail(f"--num-minibatches {args.num_minibatches}: does not divide a rollout of {args.batch_size} steps")
    count = args.num_devices or fits[-1]
    if count > len(devices):
        fail(f"--num-devices {count}: this machine has {len(devices)}")
    if count not in fits:
        fail(f"--num-devices {count}: does not divide {args.num_envs} worlds into equal minibatches; {fits} would")
    return devices[:count]


# ---- 15. Main -------------------------------------------------------------------------------------------------------


class Stage:
    """Print what is done now, and how long it took."""

    def __init__(self, text: str):
        print(f"{text} ...", end=" ", flush=True)
        self.start = time.perf_counter()

    def done(self, text: str = "") -> float:
        seconds = time.perf_counter() - self.start
        print(f"{seconds:.1f} s{text}", flush=True)
        return seconds


def use_compile_cache() -> None:
    """Keep compiled programs in a folder that only this user can write."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mjx-rl"
    if not jax.config.jax_compilation_cache_dir:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


CACHE_EVENTS = []  # names of JAX's own events, hits and misses among them
jax.monitoring.register_event_listener(lambda event, **_: CACHE_EVENTS.append(event))


def build(args: Args) -> tuple[Env, Mesh, TrainState]:
    """The environment, the mesh of devices and the state at the start of a run."""
    stage = Stage(f"building {args.env_id} ({args.physics} physics), {args.num_envs} worlds")
    mesh = Mesh(np.array(choose_devices(args)), ("devices",))
    env = Env(args.env_id, args.physics)
    sharding = jax.tree.map(lambda spec: NamedSharding(mesh, spec), STATE_SPEC)
    state = jax.jit(init_train_state, static_argnums=(0, 1), out_shardings=sharding)(args, env, jax.random.key(args.seed))
    stage.done(f" on {mesh.size} {mesh.devices[0].device_kind} device(s)")
    return env, mesh, state


def compile_iteration(args: Args, env: Env, mesh: Mesh, state: TrainState):
    """Compile `train_iteration`; returns it and what to note in run.json."""
    stage = Stage("compiling the training iteration")
    CACHE_EVENTS.clear()
    compiled = train_iteration.lower(args, env, mesh, state).compile()
    cache = "off" if not args.compile_cache else "hit" if any("cache_hits" in e for e in CACHE_EVENTS) else "miss"
    memory = compiled.memory_analysis()
    world = sum(x.nbytes for x in jax.tree.leaves(state.worlds)) // args.num_envs
    peak = mesh.size * (memory.argument_size_in_bytes + memory.temp_size_in_bytes) if memory else 0
    seconds = stage.done(f" (cache {cache}); {world} bytes per world, {peak / 2**20:.0f} MiB at most while it runs")
    return compiled, {"compile_s": seconds, "compile_cache": cache, "bytes_per_world": world, "peak_bytes": peak}


def train(args: Args, run_dir: Path | None = None) -> Path:
    """Train from the start, or from the newest checkpoint in run_dir; returns the run's folder."""
    start = time.time()
    env, mesh, state = build(args)
    resuming = run_dir is not None
    if not resuming:
        run_dir = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__{int(start)}"
        try:
            run_dir.mkdir(parents=True)
        except OSError as error:
            fail(f"--runs-dir {args.runs_dir}: {error.strerror}")
    checkpoints = open_checkpoints(run_dir)
    if resuming:
        state = restore(checkpoints, state)
    iteration = first = int(state.learner.iteration)
    compiled, notes = compile_iteration(args, env, mesh, state)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "mujoco", "mujoco-mjx", "flax", "optax")}
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    devices = [f"{device.platform}: {device.device_kind}" for device in mesh.devices]
    run = {"args": dataclasses.asdict(args), "versions": versions, "devices": devices, "commit": git.stdout.strip()}
    write_json(run_dir / "run.json", run | notes)
    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name, config=run["args"],
            sync_tensorboard=True, resume="allow", id=run_dir.name,
        )  # fmt: skip
    writer = SummaryWriter(str(run_dir), purge_step=first * args.batch_size + 1 if resuming else None)
    table = "\n".join(f"|{name}|{value}|" for name, value in run["args"].items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    print(f"{args.num_iterations} iterations of {args.batch_size} steps, {args.num_iterations * args.batch_size} in all,"
          f" {args.total_timesteps - args.num_iterations * args.batch_size} left over; tensorboard --logdir {run_dir}")  # fmt: skip

    stopped_by = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (stopped_by.append(number), signal.signal(number, signal.SIG_DFL)))
    bar = tqdm(total=args.num_iterations * args.batch_size, initial=first * args.batch_size, unit="step", unit_scale=True,
               disable=not sys.stderr.isatty())  # fmt: skip
    loop_start, shown, pending = time.time(), "-", None
    while pending or iteration < args.num_iterations:
        metrics = None
        if iteration < args.num_iterations and not stopped_by:
            state, metrics = compiled(state)
            iteration += 1
        if pending:  # read one iteration late, so that the device always has work
            number, values = pending
            values = {tag: float(value) for tag, value in values.items()}
            step = number * args.batch_size
            values["charts/SPS"] = (step - first * args.batch_size) / (time.time() - loop_start)
            if values["charts/episodes_finished"]:
                shown = f"{values['charts/episodic_return']:.1f}"
            else:
                del values["charts/episodic_return"], values["charts/episodic_length"]
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
            bar.update(step - bar.n)
            bar.set_postfix_str(f"return {shown}")
            if bar.disable and (number % args.log_every == 0 or number == args.num_iterations):
                left = (args.num_iterations * args.batch_size - step) / values["charts/SPS"]
                print(f"step {step}  return {shown}  kl {values['losses/approx_kl']:.4f}  SPS {values['charts/SPS']:.0f}"
                      f"  left {left:.0f} s", flush=True)  # fmt: skip
        pending = (iteration, metrics) if metrics else None
        if args.eval_every and metrics and iteration % args.eval_every == 0:
            keys = jax.random.split(jax.random.key(args.seed), args.eval_episodes)
            value = evaluate_mjx(env, export_policy(state.learner), keys).mean()
            writer.add_scalar("eval/episodic_return", float(value), iteration * args.batch_size)
        if metrics and iteration % args.checkpoint_every == 0 and iteration < args.num_iterations:
            save(args, checkpoints, run_dir, state, iteration)
        if stopped_by and not pending:
            break
    bar.close()
    if iteration != checkpoints.latest_step():
        save(args, checkpoints, run_dir, state, iteration)
    checkpoints.close()
    if stopped_by:
        writer.close()
        print(f"stopped after {iteration} iterations; go on with: python {sys.argv[0]} --resume {run_dir}")
        raise SystemExit(128 + stopped_by[0])
    seconds = time.time() - loop_start
    print(f"trained in {seconds:.1f} s; the policy is {run_dir / 'policy.npz'}")
    table, path = judge(args, env, export_policy(state.learner))
    writer.add_scalar("eval/c_mujoco_return", table["C MuJoCo"]["mean"], iteration * args.batch_size)
    writer.close()
    write_json(run_dir / "run.json", run | notes | {"train_s": seconds, "total_s": time.time() - start, "evaluation": table})
    if args.capture_video:
        write_video(env, path, run_dir / "videos" / "c_mujoco.mp4")
    return run_dir


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    run_dir = args.resume or args.evaluate
    if args.compile_cache:
        use_compile_cache()
    check_args(args)
    train(args)


if __name__ == "__main__":
    main()
