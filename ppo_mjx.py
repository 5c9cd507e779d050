# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "flax==0.12.6",
#   "gymnasium==1.4.0",
#   "imageio[ffmpeg]==2.38.1",
#   "jax==0.9.2",
#   "llvmlite==0.50.0",
#   "mujoco==3.17.0",
#   "mujoco-mjx==3.17.0",
#   "optax==0.2.8",
#   "tensorboard==2.21.0",
#   "tqdm==4.70.1",
#   "typeguard==4.6.0",
#   "tyro==1.0.17",
# ]
# ///
"""PPO on Gymnasium's MuJoCo tasks, on MuJoCo XLA (MJX): one file, one compiled program.

    python ppo_mjx.py                       train HalfCheetah; to watch: tensorboard --logdir runs
    python ppo_mjx.py --resume runs/NAME    continue a run that was stopped, bit for bit
    python ppo_mjx.py --evaluate runs/NAME  test its policy in MJX, in C MuJoCo and in Gymnasium
    python ppo_mjx.py --smoke               check the installation on this machine

The algorithm comes first; the loop around it is train_loop in section 14.

    1 settings       4 statistics       7 rollout       10 training iteration
    2 tasks          5 networks         8 advantages
    3 environment    6 training state   9 loss and update

After these come 11 evaluation, 12 log and files, 13 command line, 14 main.

Shapes: T = num_steps, N = worlds on this device, B = T * N, M = num_minibatches, D = devices, O =
observation size, S = the part of it that networks see, A = action size, E = episodes. A record
describes one world; its fields are [T, N, ...] in a rollout, [B, ...] in a batch and [B / M, ...]
in a minibatch.

Names follow CleanRL's ppo_continuous_action.py. docs/ppo_mjx.md lists where the algorithm differs,
and explains all metrics and flags. The tasks are those of Gymnasium 1.4.0.

Blocks between "# shared: NAME" and "# end shared" are copied into the other scripts by
tools/sync_shared.py; in your own copy, ignore the marks.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

START = time.perf_counter()
# Without this, XLA prints pages of CPU features whenever it reads a program from the cache.
os.environ.setdefault("JAX_LOGGING_LEVEL", "CRITICAL")

import flax.linen as nn
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import optax
import typeguard
import tyro
from flax import struct
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mujoco.rendering.classic import gl_context

with contextlib.redirect_stdout(io.StringIO()):  # it announces that the optional Warp is missing
    from mujoco import mjx
    from mujoco.mjx._src import collision_driver, smooth

try:  # what only the log of training needs
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.record_writer import RecordWriter
    from tqdm import tqdm
except ImportError:
    RecordWriter = None

try:  # the folder beside this file: it compiles all worlds' physics to one kernel
    import onekernel.mjx
except ImportError:  # this file was copied alone: XLA runs the physics, slowly
    onekernel = None


# ---- 1. Settings ---------------------------------------------------------------------------------
# shared: ranges
@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a flag may have, both ends included; `check_args` reads it."""

    least: float
    most: float


Count = Annotated[int, Range(1, 1e9)]
MaybeCount = Annotated[int | None, Range(1, 1e9)]
Index = Annotated[int, Range(0, 1e9)]
NonNegative = Annotated[float, Range(0, 1e9)]
Fraction = Annotated[float, Range(0, 1)]
Cadence = Annotated[float, Range(1e-9, 1e9)]


# end shared


@dataclasses.dataclass(frozen=True)
class Args:
    """PPO on Gymnasium's MuJoCo tasks, on MuJoCo XLA.

    The defaults are HalfCheetah's; `default_args` has those of a task.
    """

    # The run
    exp_name: str = "ppo_mjx"
    """name of the experiment, part of the run folder's name"""
    seed: Index = 1
    """seed of all random numbers; the shuffles also depend on the number of devices"""
    num_devices: MaybeCount = None
    """devices to split the worlds over; by default as many GPUs or CPU cores as divide the work"""
    runs_dir: str = "runs"
    """folder for the run folders"""
    track: bool = False
    """log to Weights & Biases as well; WANDB_PROJECT names the project"""
    capture_video: bool = False
    """write an mp4 of the trained policy in C MuJoCo, after training or with --evaluate"""
    checkpoint_every: Cadence = 0.2
    """share of the training between checkpoints; from 1 on, a number of iterations; three are kept"""
    compile_cache: bool = True
    """keep compiled programs in the user's cache folder, for a quicker start next time"""
    resume: str | None = None
    """run folder to continue with its own settings; a larger --total-timesteps makes it longer"""
    init_from: str | None = None
    """run folder whose policy and statistics a new run begins with, instead of random weights"""
    evaluate: str | None = None
    """run folder whose policy to evaluate; nothing is trained"""
    coordinator_address: str | None = None
    """host:port of process 0, if several processes train together; auto: as SLURM or Open MPI says"""
    num_processes: MaybeCount = None
    """processes that train together, each with its own devices"""
    process_id: Annotated[int | None, Range(0, 1e9)] = None
    """number of this process, from 0"""
    smoke: bool = False
    """check this installation: a short run, which is resumed and must end the same"""

    # The environment
    env_id: Literal[
        "HalfCheetah",
        "Hopper",
        "Walker2d",
        "Ant",
        "Humanoid",
        "HumanoidStandup",
        "Swimmer",
        "InvertedPendulum",
        "InvertedDoublePendulum",
        "Reacher",
        "Pusher",
    ] = "HalfCheetah"
    """the task, as in Gymnasium's v5"""
    eval_every: NonNegative = 0.4
    """share of the training between evaluations in MJX; from 1 on, a number of iterations; 0: none"""
    eval_episodes: Annotated[int, Range(1, 1e4)] = 20
    """episodes of each evaluation"""

    # The algorithm, with CleanRL's names
    total_timesteps: Annotated[int, Range(1, 2**62)] = 10_000_000
    """environment steps, over all worlds; the default depends on the task, see SETTINGS"""
    learning_rate: NonNegative = 1e-3
    """Adam's step size at the start; the default depends on the task, see SETTINGS"""
    num_envs: Count = 512
    """worlds, over all devices; the default depends on the task, see SETTINGS"""
    num_steps: Count = 16
    """steps of each world in one rollout; the default depends on the task, see SETTINGS"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0"""
    gamma: Fraction = 0.99
    """discount factor; the default depends on the task, see SETTINGS"""
    gae_lambda: Fraction = 0.95
    """lambda of the generalised advantage estimate"""
    num_minibatches: Count = 32
    """minibatches of one epoch"""
    update_epochs: Annotated[int, Range(1, 1e3)] = 5
    """passes over a rollout"""
    norm_adv: bool = True
    """normalise the advantages, over the whole rollout"""
    clip_coef: NonNegative = 0.2
    """clipping range of the probability ratio"""
    clip_vloss: bool = False
    """clip the value loss as well"""
    ent_coef: NonNegative = 0.002
    """weight of the entropy bonus"""
    vf_coef: NonNegative = 0.5
    """weight of the value loss"""
    max_grad_norm: NonNegative = 0.5
    """gradients are scaled down to this norm"""
    target_kl: Annotated[float | None, Range(0, 1e9)] = None
    """end an update after the epoch whose mean KL divergence exceeds this; later ones do nothing"""
    see_all: bool = False
    """show the networks all of the observation, the contact wrenches of Ant and the humanoids too"""
    norm_obs: bool = True
    """normalise observations by running mean and variance; they are clipped to 10 in any case"""
    norm_reward: bool = True
    """divide rewards by the running standard deviation of the discounted return"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """widths of the tanh layers, in the actor and in the critic"""
    init_log_std: Annotated[float, Range(-20, 20)] = -0.5
    """log of the policy's standard deviation at the start"""

    @property
    def steps_per_iteration(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.steps_per_iteration

    def cadence(self, every: float) -> int:
        """Iterations between two events: `every` itself from 1 on, else that share of the training."""
        return max(1, round(every if every >= 1 else every * self.num_iterations))


# Defaults of flags that depend on the task; those of Args are HalfCheetah's. With many worlds the
# seeds of a robot that can fall differ less; few worlds learn from fewer steps.
OTHER_TASKS = {"num_envs": 128, "num_steps": 32, "total_timesteps": 2_000_000}
MANY_WORLDS = {"num_envs": 512, "num_steps": 32, "total_timesteps": 8_000_000}
SETTINGS = {
    "HalfCheetah": {},
    "Hopper": MANY_WORLDS,
    "Walker2d": MANY_WORLDS,
    "Ant": MANY_WORLDS | {"learning_rate": 3e-4, "total_timesteps": 10_000_000},
    "Humanoid": MANY_WORLDS | {"learning_rate": 5e-4, "total_timesteps": 4_000_000},
    "HumanoidStandup": OTHER_TASKS | {"total_timesteps": 1_000_000},
    "Swimmer": OTHER_TASKS | {"gamma": 0.999, "total_timesteps": 4_000_000},
    "InvertedPendulum": OTHER_TASKS | {"total_timesteps": 500_000},
    "InvertedDoublePendulum": MANY_WORLDS | {"learning_rate": 3e-4, "total_timesteps": 700_000},
}


def default_args(env_id: str) -> Args:
    """The settings of a task, where no flags change them."""
    return Args(env_id=env_id, **SETTINGS.get(env_id, OTHER_TASKS))


# ---- 2. Tasks (SI units and radians; a test checks each against Gymnasium's v5) ------------------
# shared: tasks
@struct.dataclass
class Physics:
    """The smallest state that determines the future; a step computes the rest of mjx.Data anew."""

    qpos: jax.Array  # [nq] m and rad
    qvel: jax.Array  # [nv] m/s and rad/s
    qacc_warmstart: jax.Array  # [nv] where the constraint solver starts
    act: jax.Array | None = None  # [na] states of actuators, such as filters; None without any

    def fields(self) -> dict[str, jax.Array]:
        """MuJoCo's fields by their names."""
        return {name: value for name, value in vars(self).items() if value is not None}


@struct.dataclass
class Snapshot:
    """What the formulas of a task know of one robot. The arrays are JAX's or NumPy's."""

    qpos: Any  # [nq] m and rad
    qvel: Any  # [nv] m/s and rad/s
    x: Any  # [] m, position along the forward axis
    senses: dict[str, Any]  # MuJoCo's fields that are observed besides coordinates, flattened


@dataclasses.dataclass(frozen=True)
class Task:
    """A robot and what it is to do: numbers and formulas.

    The formulas work on one robot in JAX (xp=jnp) and in C MuJoCo (xp=np). Those of this class take
    leading axes as well, for many robots at once.
    """

    mjcf: str  # name of one of Gymnasium's files, path of another (see find_mjcf), or MJCF itself
    frame_skip: int = 4  # physics steps in one environment step
    time_limit: int = 1000  # steps
    max_speed: float = 200.0  # m/s and rad/s: what is faster has diverged; random actions reach 30

    # None: an action of -1 to 1 spans each actuator's ctrlrange. A number is for position servos: an
    # action of 1 moves the target by so much (rad or m) from the pose of the start.
    servo_offset: float | None = None

    # The pose that episodes start from: this keyframe; for `home`, if no keyframe has that name,
    # the first one. For None, and for a model without keyframes, it is the model's own pose.
    keyframe: str | None = "home"

    # The episode goes on while these hold
    healthy_z: tuple[float, float] = (-math.inf, math.inf)  # m, the coordinate `first_observed`
    max_pitch: float = math.inf  # rad, for planar robots: the coordinate after z is their pitch
    max_state: float = math.inf  # m, rad, m/s and rad/s: all coordinates and velocities but x and z

    # Reward
    forward_reward: float = 1.0  # weight of the forward velocity in m/s
    ctrl_cost: float = 1e-3  # weight of the squared action
    contact_cost: float = 0.0  # weight of the squared contact wrenches; their cost is 10 at most
    healthy_reward: float = 1.0  # for each step

    # Observation
    first_observed: int = 1  # index of z, the first coordinate after x, or after x and y in space
    position: tuple[str | int, ...] = ("qpos", 0)  # MuJoCo's field and index that tell x
    sensed: tuple[tuple[str, int], ...] = ()  # MuJoCo's fields, each from this row on
    unseen: tuple[str, ...] = ()  # those of them that networks see with --see-all only
    contact_clip: float = math.inf  # bound of the sensed contact wrenches
    velocity_clip: float = math.inf  # bound of the observed velocities

    # Start of an episode
    reset_noise: float = 5e-3  # half-width of the uniform noise on qpos (m, rad) and qvel
    gaussian_velocity: bool = False  # qvel's noise is normal, with reset_noise as its std

    @property
    def fields(self) -> set[str]:
        """MuJoCo's fields that `sense` reads."""
        return {self.position[0], *dict(self.sensed)}

    def start(
        self, key: jax.Array, qpos0: jax.Array, qvel0: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Coordinates [nq] and velocities [nv] at the start of an episode, with noise.

        key: one PRNG key; qpos0, qvel0: [nq] and [nv], those of the model's pose (`reset_data`).
        """
        qpos_key, qvel_key = jax.random.split(key)
        uniform = partial(jax.random.uniform, minval=-self.reset_noise, maxval=self.reset_noise)
        qpos = qpos0 + uniform(qpos_key, qpos0.shape)
        if self.gaussian_velocity:
            qvel = qvel0 + self.reset_noise * jax.random.normal(qvel_key, qvel0.shape)
        else:
            qvel = qvel0 + uniform(qvel_key, qvel0.shape)
        return qpos, qvel

    def sense(self, field, xp=jnp) -> tuple[Any, dict[str, Any]]:
        """Position along the forward axis, in m, and what is sensed besides coordinates.

        field: a function from a name to MuJoCo's array of that name. As in Gymnasium, the arrays
        are as of the last computation of forces. With Euler's method that is the start of the last
        physics step; with Runge-Kutta it is that step's last stage, which estimates its end.
        """
        source, *index = self.position
        x = field(source)[tuple(index)]

        senses = {name: field(name)[first:].reshape(-1) for name, first in self.sensed}
        if "cfrc_ext" in senses:
            # Of the contacts of each body, [6]: torque in N m, about the whole robot's centre of
            # mass, and force in N.
            wrenches = senses["cfrc_ext"]
            senses["cfrc_ext"] = xp.clip(wrenches, -self.contact_clip, self.contact_clip)
        return x, senses

    def observe(self, now: Snapshot, xp=jnp) -> Any:
        """Coordinates except those of the robot's place, velocities, senses: [..., O]."""
        coordinates = now.qpos[..., self.first_observed :]
        velocities = xp.clip(now.qvel, -self.velocity_clip, self.velocity_clip)
        senses = [now.senses[name] for name, _ in self.sensed]
        return xp.concatenate([coordinates, velocities, *senses], axis=-1)

    def is_healthy(self, now: Snapshot, xp=jnp) -> Any:
        """Whether the episode goes on: bool [...]."""
        min_z, max_z = self.healthy_z
        z = now.qpos[..., self.first_observed]
        rest = now.qpos[..., self.first_observed + 1 :]

        at_height = (min_z < z) & (z < max_z)
        # [:1], not [0]: a robot with few coordinates may have none after z.
        upright = (xp.abs(rest[..., :1]) < self.max_pitch).all(axis=-1)
        state = xp.concatenate([rest, now.qvel], axis=-1)
        bounded = (xp.abs(state) < self.max_state).all(axis=-1)
        return at_height & upright & bounded

    def reward_terms(self, now: Snapshot, x_velocity, action, healthy, xp=jnp) -> dict[str, Any]:
        """The terms of the reward, which is their sum: name -> [...].

        x_velocity: [...] m/s. action: [..., A], the controls minus those of action 0, which are the
        middle of their range or hold the standing pose. healthy: bool [...].
        """
        terms = {
            "reward_forward": self.forward_reward * x_velocity,
            "reward_ctrl": -self.ctrl_cost * xp.square(action).sum(axis=-1),
            "reward_survive": self.healthy_reward * healthy,
        }
        if self.contact_cost:
            cost = self.contact_cost * xp.square(now.senses["cfrc_ext"]).sum(axis=-1)
            terms["reward_contact"] = -xp.minimum(cost, 10.0)
        return terms


class InvertedPendulum(Task):
    """A pole to balance on a cart. Coordinates: the cart's, and the pole's angle."""

    def is_healthy(self, now: Snapshot, xp=jnp) -> Any:
        return xp.abs(now.qpos[1]) <= 0.2

    def reward_terms(self, now: Snapshot, x_velocity, action, healthy, xp=jnp) -> dict[str, Any]:
        return {"reward_survive": self.healthy_reward * healthy}


class InvertedDoublePendulum(Task):
    """Two poles, one on the other, to balance on a cart. It senses where the upper one's tip is."""

    def observe(self, now: Snapshot, xp=jnp) -> Any:
        angles = now.qpos[1:]
        velocities = xp.clip(now.qvel, -self.velocity_clip, self.velocity_clip)
        force_on_cart = xp.clip(now.senses["qfrc_constraint"][:1], -10.0, 10.0)
        parts = [now.qpos[:1], xp.sin(angles), xp.cos(angles), velocities, force_on_cart]
        return xp.concatenate(parts)

    def is_healthy(self, now: Snapshot, xp=jnp) -> Any:
        return now.senses["site_xpos"][2] > 1.0

    def reward_terms(self, now: Snapshot, x_velocity, action, healthy, xp=jnp) -> dict[str, Any]:
        x, _, z = now.senses["site_xpos"]
        _, lower, upper = now.qvel
        return {
            "reward_survive": self.healthy_reward * healthy,
            "reward_distance": -(0.01 * xp.square(x) + xp.square(z - 2.0)),
            "reward_velocity": -(1e-3 * xp.square(lower) + 5e-3 * xp.square(upper)),
        }


class Reacher(Task):
    """An arm of two links in a plane, whose fingertip is to reach a target that lies still."""

    def start(
        self, key: jax.Array, qpos0: jax.Array, qvel0: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        arm_key, velocity_key, radius_key, angle_key = jax.random.split(key, 4)
        noise = self.reset_noise
        arm = qpos0[:2] + jax.random.uniform(arm_key, (2,), minval=-noise, maxval=noise)
        velocity = jax.random.uniform(velocity_key, (2,), minval=-5e-3, maxval=5e-3)

        radius = 0.2 * jnp.sqrt(jax.random.uniform(radius_key))  # uniform over a disk of 0.2 m
        angle = jax.random.uniform(angle_key, maxval=2 * math.pi)
        target = radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
        qpos = jnp.concatenate([arm, target])
        qvel = jnp.concatenate([velocity, jnp.zeros(2)])
        return qpos, qvel

    def from_target(self, now: Snapshot) -> Any:
        """The fingertip's position minus the target's, as in Gymnasium: [3] m."""
        bodies = now.senses["xpos"].reshape(-1, 3)  # world, two links, fingertip, target
        return bodies[3] - bodies[4]

    def observe(self, now: Snapshot, xp=jnp) -> Any:
        angles = now.qpos[:2]
        target = now.qpos[2:]
        distance = self.from_target(now)[:2]
        parts = [xp.cos(angles), xp.sin(angles), target, now.qvel[:2], distance]
        return xp.concatenate(parts)

    def reward_terms(self, now: Snapshot, x_velocity, action, healthy, xp=jnp) -> dict[str, Any]:
        return {
            "reward_dist": -xp.linalg.norm(self.from_target(now)),
            "reward_ctrl": -self.ctrl_cost * xp.square(action).sum(),
        }


class Pusher(Task):
    """An arm of seven joints that is to push a cylinder to a goal."""

    def start(
        self, key: jax.Array, qpos0: jax.Array, qvel0: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        cylinder_key, velocity_key = jax.random.split(key)
        # The cylinder stands at least 0.17 m from the goal: the first of 32 candidates that does.
        # Each fits with a probability of 62%, so that none does once in 10^13 episodes.
        low = jnp.array([-0.3, -0.2])
        high = jnp.array([0.0, 0.2])
        candidates = jax.random.uniform(cylinder_key, (32, 2), minval=low, maxval=high)
        far = jnp.square(candidates).sum(axis=1) > 0.17**2
        cylinder = candidates[jnp.argmax(far)]

        qpos = jnp.concatenate([qpos0[:-4], cylinder, jnp.zeros(2)])
        velocity = jax.random.uniform(velocity_key, (len(qvel0) - 4,), minval=-5e-3, maxval=5e-3)
        qvel = jnp.concatenate([velocity, jnp.zeros(4)])
        return qpos, qvel

    def places(self, now: Snapshot) -> tuple[Any, Any, Any]:
        """Of the arm's tip, the cylinder and the goal: [3] m each."""
        bodies = now.senses["xpos"].reshape(-1, 3)
        return bodies[-3], bodies[-2], bodies[-1]

    def observe(self, now: Snapshot, xp=jnp) -> Any:
        return xp.concatenate([now.qpos[:7], now.qvel[:7], *self.places(now)])

    def reward_terms(self, now: Snapshot, x_velocity, action, healthy, xp=jnp) -> dict[str, Any]:
        tip, cylinder, goal = self.places(now)
        return {
            "reward_dist": -xp.linalg.norm(cylinder - goal),
            "reward_ctrl": -self.ctrl_cost * xp.square(action).sum(),
            "reward_near": -0.5 * xp.linalg.norm(cylinder - tip),
        }


class HumanoidStandup(Task):
    """The humanoid lies on its back and is to get up."""

    def reward_terms(self, now: Snapshot, x_velocity, action, healthy, xp=jnp) -> dict[str, Any]:
        terms = super().reward_terms(now, x_velocity, action, healthy, xp)
        del terms["reward_forward"]
        # As in Gymnasium: the height over the 0.003 s of a physics step, not of the control step.
        terms["reward_height"] = now.qpos[2] / 0.003
        return terms


HUMANOID_SENSES = (("cinert", 1), ("cvel", 1), ("qfrc_actuator", 6), ("cfrc_ext", 1))
TASKS = {
    "HalfCheetah": Task(
        mjcf="half_cheetah.xml",
        frame_skip=5,
        ctrl_cost=0.1,
        healthy_reward=0.0,
        reset_noise=0.1,
        gaussian_velocity=True,
    ),
    "Hopper": Task(
        mjcf="hopper.xml",
        healthy_z=(0.7, math.inf),
        max_pitch=0.2,
        max_state=100.0,
        velocity_clip=10.0,
    ),
    "Walker2d": Task(
        mjcf="walker2d_v5.xml",
        healthy_z=(0.8, 2.0),
        max_pitch=1.0,
        velocity_clip=10.0,
    ),
    "Ant": Task(
        mjcf="ant.xml",
        frame_skip=5,
        healthy_z=(0.2, 1.0),
        ctrl_cost=0.5,
        contact_cost=5e-4,
        first_observed=2,
        position=("xpos", 1, 0),
        sensed=(("cfrc_ext", 1),),
        unseen=("cfrc_ext",),
        contact_clip=1.0,
        reset_noise=0.1,
        gaussian_velocity=True,
    ),
    "Humanoid": Task(
        mjcf="humanoid.xml",
        keyframe=None,
        frame_skip=5,
        healthy_z=(1.0, 2.0),
        forward_reward=1.25,
        ctrl_cost=0.1,
        contact_cost=5e-7,
        healthy_reward=5.0,
        first_observed=2,
        position=("subtree_com", 0, 0),
        sensed=HUMANOID_SENSES,
        unseen=("cfrc_ext",),
        reset_noise=0.01,
    ),
    "HumanoidStandup": HumanoidStandup(
        mjcf="humanoidstandup.xml",
        keyframe=None,
        frame_skip=5,
        ctrl_cost=0.1,
        contact_cost=5e-7,
        first_observed=2,
        sensed=HUMANOID_SENSES,
        unseen=("cfrc_ext",),
        reset_noise=0.01,
    ),
    "Swimmer": Task(
        mjcf="swimmer.xml",
        ctrl_cost=1e-4,
        healthy_reward=0.0,
        first_observed=2,
        reset_noise=0.1,
    ),
    "InvertedPendulum": InvertedPendulum(
        mjcf="inverted_pendulum.xml",
        frame_skip=2,
        first_observed=0,
        reset_noise=0.01,
    ),
    "InvertedDoublePendulum": InvertedDoublePendulum(
        mjcf="inverted_double_pendulum.xml",
        frame_skip=5,
        healthy_reward=10.0,
        sensed=(("site_xpos", 0), ("qfrc_constraint", 0)),
        velocity_clip=10.0,
        reset_noise=0.1,
        gaussian_velocity=True,
    ),
    "Reacher": Reacher(
        mjcf="reacher.xml",
        frame_skip=2,
        time_limit=50,
        ctrl_cost=1.0,
        sensed=(("xpos", 0),),
        reset_noise=0.1,
    ),
    "Pusher": Pusher(
        mjcf="pusher_v5.xml",
        frame_skip=5,
        time_limit=100,
        ctrl_cost=0.1,
        sensed=(("xpos", 0),),
    ),
}


def gymnasium_models() -> Path | None:
    """The folder of Gymnasium's models; None where gymnasium is not installed."""
    package = importlib.util.find_spec("gymnasium")  # which imports nothing of it
    if not package:
        return None
    return Path(package.submodule_search_locations[0]) / "envs" / "mujoco" / "assets"


def find_mjcf(task: Task) -> Path:
    """The model's file: Gymnasium's of that name, else a path relative to this script's folder."""
    folder = gymnasium_models()
    plain_name = Path(task.mjcf).name == task.mjcf
    if folder and plain_name and (folder / task.mjcf).exists():
        return folder / task.mjcf
    file = Path(__file__).parent / Path(task.mjcf).expanduser()
    missing = "gymnasium, which has the models, is missing; pip install gymnasium==1.4.0"
    require(folder or not plain_name or file.exists(), missing)
    return file


def load_model(task: Task) -> mujoco.MjModel:
    """The task's model, for C MuJoCo. Meshes are found relative to the MJCF's file."""
    # half_cheetah.xml has a deprecated setting, of which MuJoCo would warn.
    with warnings.catch_warnings(action="ignore"):
        with or_fail(f"model {task.mjcf:.60}", kind=ValueError):
            if task.mjcf.lstrip().startswith("<"):
                spec = mujoco.MjSpec.from_string(task.mjcf)
                spec.modelfiledir = str(Path(__file__).parent)
            else:
                spec = mujoco.MjSpec.from_file(str(find_mjcf(task)))
            return spec.compile()


# end shared


# ---- 3. Environment ------------------------------------------------------------------------------
# shared: state
@struct.dataclass
class State:
    """One world between two steps; names are MuJoCo Playground's."""

    data: Physics
    obs: jax.Array  # [O]
    reward: jax.Array  # []
    done: jax.Array  # [] float, 1 if terminated. At the time limit 0, unlike Transition.done
    metrics: dict[str, jax.Array]  # the reward's terms
    # elapsed: steps since the reset; truncated: the time limit is reached; broken: see Env;
    # x: m, position along the forward axis
    info: dict[str, jax.Array]


# end shared


# shared: physics
def physics_step(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """One step of one world's physics.

    onekernel's step equals MJX's to rounding, except that its solver stops as soon as it has
    converged, and that it follows C MuJoCo where MJX does not (docs/onekernel.md lists where).
    """
    if onekernel:
        return onekernel.mjx.step(model, data)
    with jax.default_matmul_precision("highest"):  # TF32, a GPU's default, is too coarse
        return mjx.step(model, data)


@cache
def kernel(function):
    """Compile a function of ONE world: jax.vmap of the result runs all worlds in one kernel.

    See docs/onekernel.md. Without onekernel it returns the function itself, which XLA compiles, to
    a program many times slower. Cached, so that each function is compiled once.
    """
    return onekernel.compile(function) if onekernel else function


# end shared


# shared: environment
def physics_forward(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """All that MuJoCo computes from one world's state, forces and sensors included."""
    if onekernel:
        return onekernel.mjx.forward(model, data)
    with jax.default_matmul_precision("highest"):
        return mjx.forward(model, data)


# Fields that are given, or follow from coordinates and velocities without collisions or forces.
KINEMATIC_FIELDS = frozenset(
    {
        *("qpos", "qvel", "ctrl", "xpos", "xquat", "xmat", "xipos", "ximat", "xanchor", "xaxis"),
        *("geom_xpos", "geom_xmat", "site_xpos", "site_xmat"),
        *("subtree_com", "cinert", "cdof", "cdof_dot", "cvel"),
    }
)


def find_keyframe(task: Task, model: mujoco.MjModel) -> int:
    """The number of the keyframe that episodes start from; -1 for the model's own pose."""
    if task.keyframe is None:
        return -1
    number = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_KEY, task.keyframe)
    known = number >= 0 or task.keyframe == "home"
    require(known, f"keyframe {task.keyframe}: the model has no keyframe of that name")
    return max(number, 0) if model.nkey else -1


def reset_data(task: Task, model: mujoco.MjModel, data: mujoco.MjData) -> None:
    """Put C MuJoCo's data in the pose that episodes start from, without noise."""
    keyframe = find_keyframe(task, model)
    if keyframe < 0:
        mujoco.mj_resetData(model, data)
    else:
        mujoco.mj_resetDataKeyframe(model, data, keyframe)


def control_range(
    task: Task, model: mujoco.MjModel, start: mujoco.MjData
) -> tuple[np.ndarray, np.ndarray]:
    """How actions [A] in [-1, 1] become controls: scale and bias [A], in the actuators' units.

    start: the pose of the start.
    """
    lowest, highest = model.actuator_ctrlrange.T
    if task.servo_offset is None:
        return (highest - lowest) / 2, (highest + lowest) / 2

    bias = start.ctrl.copy()
    if not bias.any():  # the keyframe has no controls: a servo stays where it is
        stiffness = -model.actuator_biasprm[:, 1]
        is_servo = (stiffness > 0) & (stiffness == model.actuator_gainprm[:, 0])
        bias = np.where(is_servo, start.actuator_length, 0.0)
    return np.full(model.nu, task.servo_offset), bias


class Env:
    """One world of a task. `reset` and `step` are pure functions: batch them with jax.vmap.

    An episode ends where the robot is not healthy, at the time limit, or by broken physics (not
    finite, or faster than the task's max_speed). A step that breaks the physics has reward 0, is
    left out of learning, and keeps the observation before it.
    """

    def __init__(self, args: Args):
        self.name = args.env_id
        self.task = TASKS[args.env_id]
        self.time_limit = self.task.time_limit  # steps

        model = load_model(self.task)
        faults = check_model(self.task, model)
        if faults:
            require(False, f"{self.name}: {faults[0]}")
        self.remarks = remarks(self.task, model)

        start = mujoco.MjData(model)
        reset_data(self.task, model, start)
        mujoco.mj_forward(model, start)
        self.init_qpos = start.qpos.copy()
        self.init_qvel = start.qvel.copy()
        self.init_act = start.act.copy()
        self.action_scale, self.action_bias = control_range(self.task, model, start)
        self.action_size = model.nu
        self.control_dt = model.opt.timestep * self.task.frame_skip  # s

        if model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:  # which MJX lacks
            model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
        device = jax.local_devices()[0]
        with or_fail(f"{self.name}: MJX cannot take its model"):
            self.model = mjx.put_model(model, device, impl="jax")
            template = mjx.make_data(self.model, device)
        self.template = template.replace(
            mocap_pos=jnp.asarray(start.mocap_pos),
            mocap_quat=jnp.asarray(start.mocap_quat),
        )

        x, senses = self.task.sense(partial(getattr, start), np)
        now = Snapshot(qpos=start.qpos, qvel=start.qvel, x=x, senses=senses)
        obs = self.task.observe(now, np)
        self.observation_size = len(obs)
        # What becomes NaN along with the unseen senses is theirs, wherever `observe` puts it.
        unseen = () if args.see_all else self.task.unseen
        hidden = {name: np.full(senses[name].shape, np.nan) for name in unseen}
        probe = self.task.observe(now.replace(senses=senses | hidden), np)
        self.seen = np.flatnonzero(np.isnan(obs) | ~np.isnan(probe))  # indices [S] of what is seen

    def measure(self, data: Physics, full: mjx.Data) -> Snapshot:
        """What the task's formulas need; full: the data that were computed last."""
        fields = vars(full._impl) | vars(full)  # MJX keeps some fields in _impl
        x, senses = self.task.sense(fields.__getitem__)
        return Snapshot(qpos=data.qpos, qvel=data.qvel, x=x, senses=senses)

    def reset(self, key: jax.Array) -> State:
        """A new episode, with Gymnasium's noise. key: one PRNG key."""
        qpos, qvel = self.task.start(key, self.init_qpos, self.init_qvel)
        data = Physics(
            qpos=qpos,
            qvel=qvel,
            qacc_warmstart=jnp.zeros_like(qvel),
            act=jnp.asarray(self.init_act) if self.model.na else None,
        )

        full = self.template.replace(**data.fields(), ctrl=jnp.asarray(self.action_bias))
        if self.task.fields <= KINEMATIC_FIELDS:
            full = smooth.kinematics(self.model, full)
            full = smooth.com_vel(self.model, smooth.com_pos(self.model, full))
        else:
            full = physics_forward(self.model, full)
        now = self.measure(data, full)

        zero = jnp.zeros(())
        no = jnp.array(False)
        # Only for the names, so that reset and step return the same tree.
        terms = self.task.reward_terms(now, zero, jnp.zeros(self.action_size), no)
        return State(
            data=data,
            obs=self.task.observe(now),
            reward=zero,
            done=zero,
            metrics=dict.fromkeys(terms, zero),
            info={
                "elapsed": jnp.zeros((), jnp.int32),
                "truncated": no,
                "broken": no,
                "x": now.x,
            },
        )

    def advance(self, data: Physics, action: jax.Array) -> tuple[Physics, Snapshot]:
        """frame_skip steps of physics. Returns the state after them, and what the formulas need."""

        def substep(carry, _):
            data, full = carry
            full = physics_step(self.model, full.replace(**data.fields(), ctrl=action))
            data = Physics(
                qpos=full.qpos,
                qvel=full.qvel,
                qacc_warmstart=full.qacc_warmstart,
                act=full.act if self.model.na else None,
            )
            return (data, full), None

        start = (data, self.template)
        (data, full), _ = jax.lax.scan(substep, start, None, length=self.task.frame_skip)
        if dict(self.task.sensed).keys() & {"cacc", "cfrc_int", "cfrc_ext"}:
            with jax.default_matmul_precision("highest"):  # as in `physics_step`
                full = smooth.rne_postconstraint(self.model, full)

        # `data` is the state after the last integration. What MuJoCo computes from a state, like
        # xpos, lags behind it in `full` by one physics step, as in Gymnasium's tasks (Task.sense).
        return data, self.measure(data, full)

    def step(self, state: State, action: jax.Array) -> State:
        """One control step.

        action: [A], the actuators' controls in their own units: action_bias, plus up to
        action_scale in both directions; see `scale_action`.
        """
        data, now = self.advance(state.data, action)
        obs = self.task.observe(now)

        finite = jnp.isfinite(data.qpos).all() & jnp.isfinite(obs).all()
        slow = (jnp.abs(data.qvel) < self.task.max_speed).all()  # False for NaN as well
        sane = finite & slow

        healthy = self.task.is_healthy(now)
        x_velocity = (now.x - state.info["x"]) / self.control_dt
        effort = action - self.action_bias
        terms = self.task.reward_terms(now, x_velocity, effort, healthy)
        terms = {name: jnp.where(sane, term, 0.0) for name, term in terms.items()}

        elapsed = state.info["elapsed"] + 1
        return State(
            data=data,
            obs=jnp.where(sane, obs, state.obs),
            reward=sum(terms.values()),
            done=jnp.where(healthy & sane, 0.0, 1.0),
            metrics=terms,
            info={
                "elapsed": elapsed,
                "truncated": elapsed >= self.time_limit,
                "broken": ~sane,
                "x": now.x,
            },
        )


# end shared


# ---- 4. Running statistics -----------------------------------------------------------------------
# shared: statistics
@struct.dataclass
class RunningStats:
    """Mean and variance of all samples so far."""

    count: jax.Array  # []
    mean: jax.Array
    var: jax.Array


def update_stats(stats: RunningStats, batch: jax.Array, valid: jax.Array) -> RunningStats:
    """Merge in the valid samples of the batches [T, N, ...] of all devices. valid: bool [T, N].

    Only inside shard_map over "devices".
    Source: Chan, Golub and LeVeque's parallel variance.
    """
    count = jax.lax.psum(valid.sum(), "devices")
    mask = jnp.expand_dims(valid, range(2, batch.ndim))

    def mean_of(x: jax.Array) -> jax.Array:
        total = jnp.where(mask, x, 0.0).sum(axis=(0, 1))
        return jax.lax.psum(total, "devices") / jnp.maximum(count, 1)

    mean = mean_of(batch)
    var = mean_of(jnp.square(batch - mean))

    share = count / (stats.count + count)
    delta = mean - stats.mean
    between = share * (1 - share) * jnp.square(delta)  # variance of the two means
    return RunningStats(
        count=stats.count + count,
        mean=stats.mean + share * delta,
        var=(1 - share) * stats.var + share * var + between,
    )


def normalize(stats: RunningStats, obs: jax.Array) -> jax.Array:
    """Observations [..., O] with mean 0 and variance 1, clipped to 10 standard deviations."""
    return jnp.clip((obs - stats.mean) / jnp.sqrt(stats.var + 1e-8), -10.0, 10.0)


# end shared


# shared: sight
def see(env: Env, stats: RunningStats, obs: jax.Array) -> jax.Array:
    """What the networks see of observations [..., O], normalised: [..., S].

    They do not see contact wrenches, which are 0 most of the time, so that normalising makes a
    touch the largest of all inputs. Ant learns faster without (docs/changelog.md).
    """
    normalized = normalize(stats, obs)
    sees_all = len(env.seen) == env.observation_size
    return normalized if sees_all else normalized[..., env.seen]


# end shared


# ---- 5. Networks ---------------------------------------------------------------------------------
# shared: dense
def dense(width: int, **options) -> nn.Dense:
    """A layer. On a CPU onekernel's product is faster than XLA's, most of all in the gradient."""
    return nn.Dense(width, dot_general=onekernel.dot_general if onekernel else None, **options)


# end shared


# shared: networks
class MLP(nn.Module):
    """Tanh layers with orthogonal weights: [..., O] -> [..., out]."""

    hidden_sizes: tuple[int, ...]
    out: int
    gain: float  # scale of the last layer's weights

    @nn.compact
    def __call__(self, x):
        for width in self.hidden_sizes:
            orthogonal = nn.initializers.orthogonal(math.sqrt(2))
            x = jnp.tanh(dense(width, kernel_init=orthogonal)(x))
        return dense(self.out, kernel_init=nn.initializers.orthogonal(self.gain))(x)


def make_networks(args: Args, env: Env) -> tuple[MLP, MLP]:
    """Actor and critic; they share nothing."""
    actor = MLP(args.hidden_sizes, env.action_size, gain=0.01)  # the first actions are all noise
    critic = MLP(args.hidden_sizes, 1, gain=1.0)
    return actor, critic


@struct.dataclass
class Gaussian:
    """A normal distribution of actions with independent components."""

    mean: jax.Array  # [..., A], which is the mode as well
    log_std: jax.Array  # [A]

    def sample(self, keys: jax.Array) -> jax.Array:
        """Actions [N, A], each from its own key. keys: [N]."""
        noise = jax.vmap(partial(jax.random.normal, shape=self.log_std.shape))(keys)
        return self.mean + jnp.exp(self.log_std) * noise

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Log density: [..., A] -> [...]."""
        z = (action - self.mean) * jnp.exp(-self.log_std)
        return (-0.5 * jnp.square(z) - self.log_std - 0.5 * math.log(2 * math.pi)).sum(axis=-1)

    def entropy(self) -> jax.Array:
        """Differential entropy in nats: [], the same for all means."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()


# end shared


# shared: memory
def initial_memory(batch: tuple[int, ...] = ()) -> tuple:
    """What the policy remembers when an episode begins: a tree of arrays [*batch, ...].

    This one remembers nothing, so that nothing is carried, saved or compiled.
    """
    return ()


# end shared


def apply_policy(
    args: Args, env: Env, params: dict, memory: tuple, obs: jax.Array
) -> tuple[tuple, Gaussian]:
    """The policy: its memory and normalised observations [..., O] -> next memory, distribution.

    A recurrent network keeps its state in `memory`, which the rollout and both evaluations carry
    along and set to `initial_memory` when an episode begins. With one, `update`, which shuffles
    single steps, has to change as well, and so has `act`: docs/hacking.md has a GRU.
    """
    actor, _ = make_networks(args, env)
    return memory, Gaussian(actor.apply(params["actor"], obs), params["log_std"])


# ---- 6. Training state ---------------------------------------------------------------------------
@struct.dataclass
class Learner:
    """What is learnt; the same on every device."""

    params: dict  # "actor" and "critic": Flax parameters; "log_std": [A]
    opt_state: optax.OptState  # of the parameters as one vector
    obs_stats: RunningStats  # [O]
    return_stats: RunningStats  # [], of the discounted return
    key: jax.Array  # of the shuffles
    iteration: jax.Array  # int32, iterations done


# shared: worlds
@struct.dataclass
class Worlds:
    """What belongs to one world: fields [N, ...], split over the devices.

    Each world draws from its own key, so one rollout from the same learner is the same on any
    number of devices, but for rounding.
    """

    env_state: State
    memory: tuple  # the policy's
    key: jax.Array
    discounted_return: jax.Array  # of the rewards so far, for their scale
    episode_return: jax.Array
    episode_length: jax.Array  # int32
    times_broken: jax.Array  # int32


# end shared


@struct.dataclass
class TrainState:
    """All that a run's future depends on; a checkpoint holds this and the settings."""

    learner: Learner
    worlds: Worlds


# What --init-from takes from another run's learner.
INHERITED = ("params", "obs_stats", "return_stats")

# How the state lies on the devices: a prefix of its tree, each entry for all arrays below it.
STATE_SPEC = TrainState(learner=P(), worlds=P("devices"))


# shared: optimizer
def shuffle(key: jax.Array, size: int) -> jax.Array:
    """A random order of `size` items, int32 [size].

    It sorts one array, of random bits followed by the item's own number: five times as fast on a
    CPU as jax.random.permutation, which sorts pairs, twice. Nearly uniform: items that draw equal
    bits keep their order.
    """
    bits = (size - 1).bit_length()
    if bits > 13:  # fewer than 19 random bits would be left
        return jax.random.permutation(key, size)
    marked = (jax.random.bits(key, (size,)) << bits) | jnp.arange(size, dtype=jnp.uint32)
    return (jnp.sort(marked) & ((1 << bits) - 1)).astype(jnp.int32)


# end shared


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam's direction, on gradients that are scaled down to max_grad_norm.

    The caller subtracts learning_rate * direction, as the rate depends on the iteration; do not pass
    the direction to optax.apply_updates. A gradient that is not finite is skipped and counted, as
    optax.apply_if_finite does; the norm that clipping needs anyway tells whether it is finite.
    """
    adam = optax.scale_by_adam(eps=1e-5)

    def init(params) -> optax.ApplyIfFiniteState:
        return optax.ApplyIfFiniteState(
            notfinite_count=jnp.int32(0),
            last_finite=jnp.array(True),
            total_notfinite=jnp.int32(0),
            inner_state=adam.init(params),
        )

    def update(gradient, state: optax.ApplyIfFiniteState, params=None):
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm)

        def step():
            scale = jnp.minimum(1.0, args.max_grad_norm / norm)
            scaled = jax.tree.map(lambda x: scale * x, gradient)
            return adam.update(scaled, state.inner_state)

        def skip():
            return jax.tree.map(jnp.zeros_like, gradient), state.inner_state

        direction, inner_state = jax.lax.cond(finite, step, skip)
        next_state = optax.ApplyIfFiniteState(
            notfinite_count=jnp.where(finite, 0, state.notfinite_count + 1),
            last_finite=finite,
            total_notfinite=state.total_notfinite + ~finite,
            inner_state=inner_state,
        )
        return direction, next_state

    return optax.GradientTransformation(init, update)


# shared: starts
def start_stats(shape: tuple[int, ...]) -> RunningStats:
    """Statistics before the first sample; the small count keeps divisions finite."""
    return RunningStats(count=jnp.float32(1e-4), mean=jnp.zeros(shape), var=jnp.ones(shape))


def start_worlds(env_state: State, keys: jax.Array, times_broken: jax.Array) -> Worlds:
    """Worlds [N] at the start of an episode."""
    return Worlds(
        env_state=env_state,
        memory=initial_memory(keys.shape),
        key=keys,
        # Unlike CleanRL's, it is 0 again after a time limit, too: a new episode begins.
        discounted_return=jnp.zeros(keys.shape),
        episode_return=jnp.zeros(keys.shape),
        episode_length=jnp.zeros(keys.shape, jnp.int32),
        times_broken=times_broken,
    )


# end shared


def init_train_state(args: Args, env: Env, key: jax.Array) -> TrainState:
    """The state before the first iteration."""
    keys = jax.random.split(key, 6)
    actor_key, critic_key, shuffle_key, reset_key, clock_key, world_key = keys

    actor, critic = make_networks(args, env)
    seen = jnp.zeros(len(env.seen))
    params = {
        "actor": actor.init(actor_key, seen),
        "critic": critic.init(critic_key, seen),
        # With a type, as a checkpoint has it.
        "log_std": jnp.full(env.action_size, args.init_log_std, jnp.float32),
    }
    vector, _ = ravel_pytree(params)
    learner = Learner(
        params=params,
        opt_state=make_optimizer(args).init(vector),
        obs_stats=start_stats((env.observation_size,)),
        return_stats=start_stats(()),
        key=shuffle_key,
        iteration=jnp.zeros((), jnp.int32),
    )

    n = args.num_envs
    env_state = jax.vmap(kernel(env.reset))(jax.random.split(reset_key, n))
    # Unlike CleanRL: the worlds' clocks start at random, so that their time limits do not come all
    # at once.
    env_state.info["elapsed"] = jax.random.randint(clock_key, (n,), 0, env.time_limit)
    worlds = start_worlds(env_state, jax.random.split(world_key, n), jnp.zeros(n, jnp.int32))
    return TrainState(learner=learner, worlds=worlds)


# ---- 7. Rollout ----------------------------------------------------------------------------------
@struct.dataclass
class Transition:
    """One step of one world; `end` and the flags are the outcome of `action`."""

    obs: jax.Array  # [O]
    action: jax.Array  # [A], as sampled; the environment gets it clipped and scaled
    logprob: jax.Array
    start: State  # where the step began, for `black_box`; its observation is `obs`
    end: Worlds  # where it ended, before any reset: reward, observation, episode's return, ...
    terminated: jax.Array  # bool
    done: jax.Array  # bool: terminated, or at the time limit
    valid: jax.Array  # bool: False for steps to leave out of the loss, as they broke the world
    # bool: an episode ended here that did not break and began at elapsed 0 (the first ones begin at
    # a random clock); only these are logged
    finished: jax.Array


# shared: seams
def split_keys(keys: jax.Array, n: int) -> tuple[jax.Array, ...]:
    """Split each world's key: keys [N] -> n arrays of keys, each [N]."""
    return jnp.unstack(jax.vmap(partial(jax.random.split, num=n))(keys), axis=1)


def where_done(done: jax.Array, fresh: Worlds, end: Worlds) -> Worlds:
    """Each world from `fresh` where its episode is done, else from `end`. done: bool [N]."""

    def choose(done, fresh, end):
        return jax.tree.map(partial(jnp.where, done), fresh, end)

    return jax.vmap(choose)(done, fresh, end)


# end shared


# shared: actions
def scale_action(env: Env, action: jax.Array) -> jax.Array:
    """The actuators' controls for an action of the policy [..., A]."""
    return env.action_scale * jnp.clip(action, -1.0, 1.0) + env.action_bias


# end shared


def rollout(args: Args, env: Env, learner: Learner, worlds: Worlds) -> tuple[Worlds, Transition]:
    """num_steps steps of the policy in all worlds, with a fresh reset after each episode.

    Returns the worlds [N, ...] and transitions [T, N, ...].
    """

    def step(worlds: Worlds, _):
        key, action_key, reset_key = split_keys(worlds.key, 3)
        start = worlds.env_state

        obs = see(env, learner.obs_stats, start.obs)
        memory, policy = apply_policy(args, env, learner.params, worlds.memory, obs)
        action = policy.sample(action_key)
        state = jax.vmap(kernel(env.step))(start, scale_action(env, action))

        terminated = state.done > 0
        done = terminated | state.info["truncated"]
        broken = state.info["broken"]
        end = Worlds(
            env_state=state,
            memory=memory,
            key=key,
            discounted_return=args.gamma * worlds.discounted_return + state.reward,
            episode_return=worlds.episode_return + state.reward,
            episode_length=worlds.episode_length + 1,
            times_broken=worlds.times_broken + broken,
        )
        transition = Transition(
            obs=start.obs,
            action=action,
            logprob=policy.log_prob(action),
            start=start,
            end=end,
            terminated=terminated,
            done=done,
            valid=~broken,
            finished=done & ~broken & (end.episode_length == state.info["elapsed"]),
        )
        # All worlds are reset in each step: under vmap, XLA computes both sides of a branch anyway.
        fresh = start_worlds(jax.vmap(kernel(env.reset))(reset_key), key, end.times_broken)
        return where_done(done, fresh, end), transition

    return jax.lax.scan(step, worlds, None, length=args.num_steps)


# ---- 8. Advantages -------------------------------------------------------------------------------
# shared: advantages
def masked_mean(x: jax.Array, valid: jax.Array) -> jax.Array:
    """The mean of the valid samples: two arrays [...] -> []. It is 0 where none is valid."""
    return jnp.where(valid, x, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def compute_gae(
    args: Args,
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    done: jax.Array,
    valid: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates and value targets of a rollout, in units of the reward.

    All arguments and results are [T, N]. next_value is the critic's value of the state that the
    step reached, before any reset. A terminated step does not bootstrap (0 in place of next_value).
    A step at the time limit, or before an invalid step, bootstraps from next_value and takes
    nothing from later advantages. Invalid steps get advantage 0.
    Source: arXiv:1506.02438, equation 16; the parts of the time limit and of `valid` are ours.
    """

    def backwards(next_advantage, step):
        reward, value, next_value, terminated, done, valid = step
        # Unlike CleanRL: where the time limit cuts an episode, what was to come still counts.
        delta = reward + args.gamma * jnp.where(terminated, 0.0, next_value) - value
        following = jnp.where(done, 0.0, next_advantage)
        advantage = delta + args.gamma * args.gae_lambda * following
        advantage = jnp.where(valid, advantage, 0.0)
        return advantage, advantage

    steps = (reward, value, next_value, terminated, done, valid)
    _, advantage = jax.lax.scan(backwards, jnp.zeros_like(reward[0]), steps, reverse=True)
    return advantage, advantage + value


# end shared


# ---- 9. Loss and update --------------------------------------------------------------------------
# shared: loss
@struct.dataclass
class Batch:
    """What the loss needs of each transition."""

    obs: jax.Array  # normalised, what the networks see
    action: jax.Array  # [A]
    logprob: jax.Array  # under the policy that acted
    value: jax.Array  # by the critic before the update
    advantage: jax.Array
    target: jax.Array  # of the value
    valid: jax.Array  # bool: False for steps to leave out of the loss


def ppo_loss(
    args: Args, env: Env, params: dict, mb: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """PPO's loss of a minibatch [B / M, ...], and its metrics by tag.

    Source: arXiv:1707.06347, equations 7 and 9; approx_kl: joschu.net/blog/kl-approx.html.
    """
    memory = initial_memory(mb.obs.shape[:-1])  # single steps have no past
    _, policy = apply_policy(args, env, params, memory, mb.obs)
    logratio = policy.log_prob(mb.action) - mb.logprob
    ratio = jnp.exp(logratio)
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    objective = jnp.minimum(mb.advantage * ratio, mb.advantage * clipped_ratio)
    policy_loss = -masked_mean(objective, mb.valid)

    _, critic = make_networks(args, env)
    value = critic.apply(params["critic"], mb.obs)[..., 0]
    value_error = jnp.square(value - mb.target)
    if args.clip_vloss:
        clipped_value = mb.value + jnp.clip(value - mb.value, -args.clip_coef, args.clip_coef)
        value_error = jnp.maximum(value_error, jnp.square(clipped_value - mb.target))
    value_loss = 0.5 * masked_mean(value_error, mb.valid)

    entropy = policy.entropy()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    metrics = {
        "losses/loss": loss,
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/clipfrac": masked_mean(jnp.abs(ratio - 1) > args.clip_coef, mb.valid),
        "losses/old_approx_kl": masked_mean(-logratio, mb.valid),
        "losses/approx_kl": masked_mean(ratio - 1 - logratio, mb.valid),
    }
    return loss, metrics


def current_learning_rate(args: Args, iteration: jax.Array) -> float | jax.Array:
    """Adam's step size in this iteration; it falls linearly to 0, unless --no-anneal-lr."""
    if not args.anneal_lr:
        return args.learning_rate
    num_iterations = float(args.num_iterations)  # as an int it may not fit int32
    return args.learning_rate * (1 - iteration / num_iterations)


# end shared


def mean_over_devices(x):
    """The mean of the devices' arrays or trees, each a mean over about as many samples."""
    return jax.lax.pmean(x, "devices")


@struct.dataclass
class MinibatchReport:
    """What one minibatch has to tell."""

    metrics: dict[str, jax.Array]
    used: jax.Array  # bool: target_kl had not stopped the update before
    skipped_in_a_row: jax.Array  # int32, gradients that were not finite, up to this one


def update(
    args: Args, env: Env, learner: Learner, batch: Batch
) -> tuple[Learner, dict[str, jax.Array]]:
    """All epochs over a batch [B, ...], each device with its own share of it.

    Returns the learner after them, and metrics by tag: means over all minibatches in use.
    """
    learning_rate = current_learning_rate(args, learner.iteration)
    optimizer = make_optimizer(args)
    # The gradient as one vector takes one exchange between devices, not one for each layer: five
    # times as fast on two CPU cores.
    vector, unravel = ravel_pytree(learner.params)

    def minibatch_step(carry, mb: Batch):
        vector, opt_state, stopped = carry
        gradient, metrics = jax.grad(ppo_loss, argnums=2, has_aux=True)(
            args, env, unravel(vector), mb
        )
        gradient = mean_over_devices(ravel_pytree(gradient)[0])
        direction, next_opt_state = optimizer.update(gradient, opt_state)

        updated = (vector - learning_rate * direction, next_opt_state)
        if args.target_kl is not None:
            # A scan cannot be left early: once stopped, each step leaves all as it was.
            updated = jax.tree.map(partial(jnp.where, stopped), (vector, opt_state), updated)

        metrics |= {"losses/grad_norm": jnp.linalg.norm(gradient)}
        report = MinibatchReport(
            metrics=metrics,
            used=~stopped,
            skipped_in_a_row=next_opt_state.notfinite_count,
        )
        return (*updated, stopped), report

    def epoch(carry, key):
        order = shuffle(key, len(batch.obs))
        minibatches = jax.tree.map(
            lambda x: x[order].reshape(args.num_minibatches, -1, *x.shape[1:]), batch
        )
        carry, report = jax.lax.scan(minibatch_step, carry, minibatches)

        vector, opt_state, stopped = carry
        if args.target_kl is not None:  # unlike CleanRL: the epoch's mean, not its last minibatch
            approx_kl = mean_over_devices(report.metrics["losses/approx_kl"].mean())
            stopped |= approx_kl > args.target_kl
        return (vector, opt_state, stopped), report

    key = jax.random.fold_in(learner.key, learner.iteration)
    key = jax.random.fold_in(key, jax.lax.axis_index("devices"))
    carry = (vector, learner.opt_state, jnp.array(False))
    keys = jax.random.split(key, args.update_epochs)
    (vector, opt_state, _), report = jax.lax.scan(epoch, carry, keys)

    used = report.used
    metrics = {tag: (values * used).sum() / used.sum() for tag, values in report.metrics.items()}
    metrics |= {
        "charts/learning_rate": jnp.asarray(learning_rate),
        "charts/skipped_in_a_row": report.skipped_in_a_row.max(),
        "charts/skipped_updates": opt_state.total_notfinite,
    }
    learner = learner.replace(
        params=unravel(vector), opt_state=opt_state, iteration=learner.iteration + 1
    )
    return learner, metrics


# ---- 10. One training iteration ------------------------------------------------------------------
# shared: black_box
def black_box(start: State, action: jax.Array, broken: jax.Array) -> dict:
    """What the first world to break went through, for `dump`.

    Takes that world's steps out of those of all, [T, N, ...] -> [1, T, ...]; the first axis is for the
    devices. World 0's if none broke; `dump` checks.
    """
    # argmax finds the first True in the order of memory: the earliest step, its lowest world.
    world = jnp.unravel_index(jnp.argmax(broken), broken.shape)[1]
    steps = {"start": start, "action": action, "broken": broken}
    return jax.tree.map(lambda x: x[None, :, world], steps)


# end shared


def make_batch(
    args: Args, env: Env, learner: Learner, steps: Transition, reward: jax.Array
) -> tuple[Batch, jax.Array]:
    """The batch [B, ...] to learn from, of transitions [T, N, ...] and scaled rewards [T, N].

    Returns with it the critic's explained variance: 1 if it foresaw all value targets.
    """
    _, critic = make_networks(args, env)
    obs = see(env, learner.obs_stats, steps.obs)
    next_obs = see(env, learner.obs_stats, steps.end.env_state.obs)
    observations = jnp.stack([obs, next_obs])  # [2, T, N, O], for one call of the critic
    value, next_value = critic.apply(learner.params["critic"], observations)[..., 0]
    advantage, target = compute_gae(
        args, reward, value, next_value, steps.terminated, steps.done, steps.valid
    )

    def mean(x: jax.Array) -> jax.Array:
        return mean_over_devices(masked_mean(x, steps.valid))

    target_var = mean(jnp.square(target - mean(target)))
    explained_variance = 1 - mean(jnp.square(target - value)) / (target_var + 1e-8)

    if args.norm_adv:  # unlike CleanRL: over the rollout, not over each minibatch
        advantage -= mean(advantage)
        advantage /= jnp.sqrt(mean(jnp.square(advantage))) + 1e-8

    batch = Batch(
        obs=obs,
        action=steps.action,
        logprob=steps.logprob,
        value=value,
        advantage=advantage,
        target=target,
        valid=steps.valid,
    )
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)  # [T, N, ...] -> [B, ...]
    return batch, explained_variance


# shared: episodes
def episode_metrics(worlds: Worlds, steps: Transition) -> dict[str, jax.Array]:
    """Of the episodes that finished in a rollout, over all devices."""
    sums = {
        "episodes": steps.finished.sum(),
        "returns": (steps.finished * steps.end.episode_return).sum(),
        "lengths": (steps.finished * steps.end.episode_length).sum(),
        "times_broken": worlds.times_broken.sum(),
    }
    sums = jax.lax.psum(sums, "devices")
    return {
        # NaN, and not logged, where no episode has finished.
        "charts/episodic_return": sums["returns"] / sums["episodes"],
        "charts/episodic_length": sums["lengths"] / sums["episodes"],
        "charts/episodes_finished": sums["episodes"],
        # Not only NaN: faster than Task.max_speed as well.
        "charts/nan_resets": sums["times_broken"],
    }


# end shared


def device_iteration(args: Args, env: Env, state: TrainState) -> tuple[TrainState, dict, dict]:
    """Rollout, advantages and update with one device's worlds.

    Returns the next state, metrics over all devices by tag, and this device's black box.
    """
    learner = state.learner
    worlds, steps = rollout(args, env, learner, state.worlds)

    reward = steps.end.env_state.reward
    return_stats = learner.return_stats
    if args.norm_reward:  # unlike CleanRL: by one scale for all worlds and the whole rollout
        return_stats = update_stats(return_stats, steps.end.discounted_return, steps.valid)
        reward = jnp.clip(reward / jnp.sqrt(return_stats.var + 1e-8), -10.0, 10.0)

    batch, explained_variance = make_batch(args, env, learner, steps, reward)
    learner, metrics = update(args, env, learner, batch)

    # Unlike CleanRL, only once an iteration, since the policy that acted and the one that learns
    # must see the same normalised observations.
    obs_stats = learner.obs_stats
    if args.norm_obs:
        obs_stats = update_stats(obs_stats, steps.obs, steps.valid)
    learner = learner.replace(obs_stats=obs_stats, return_stats=return_stats)

    terms = steps.end.env_state.metrics.items()
    for name, term in terms:
        tag = name.replace("_", "/", 1)  # reward_x -> reward/x
        metrics[tag] = masked_mean(term, steps.valid)
    metrics = mean_over_devices(metrics)
    metrics |= {"losses/explained_variance": explained_variance}
    metrics |= episode_metrics(worlds, steps)

    broken = steps.end.env_state.info["broken"]
    box = black_box(steps.start, scale_action(env, steps.action), broken)
    return TrainState(learner=learner, worlds=worlds), metrics, box


@partial(jax.jit, static_argnames=("args", "env", "mesh"), donate_argnames="state")
def train_iteration(
    args: Args, env: Env, mesh: Mesh, state: TrainState
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One iteration as one program over the mesh's devices.

    `state` is donated: its memory is used again. Returns the next state and metrics by tag, with
    the devices' black boxes.
    """
    run = jax.shard_map(
        partial(device_iteration, args, env),
        mesh=mesh,
        in_specs=(STATE_SPEC,),
        out_specs=(STATE_SPEC, P(), P("devices")),
        # With True, jax.grad would already sum the gradient over the devices, which `update` averages.
        check_vma=False,
    )
    state, metrics, box = run(state)
    return state, metrics | {"black_box": box}


# ---- The algorithm ends here. What is left of training is the loop: train_loop in section 14 ------


# ---- 11. Evaluation ------------------------------------------------------------------------------
def export_policy(env: Env, learner: Learner) -> dict[str, np.ndarray]:
    """All that the deterministic policy needs: normaliser, layers w0, b0, ..., controls' range."""
    policy = {
        "action_scale": np.float32(env.action_scale),
        "action_bias": np.float32(env.action_bias),
        "obs_mean": learner.obs_stats.mean,
        "obs_var": learner.obs_stats.var,
    }
    for name, layer in learner.params["actor"]["params"].items():  # Dense_0, Dense_1, ...
        number = name.removeprefix("Dense_")
        policy["w" + number] = layer["kernel"]
        policy["b" + number] = layer["bias"]
    policy = jax.device_get(policy)
    # With rows of 0 for what is unseen, so that the policy takes whole observations.
    seen = policy["w0"]
    policy["w0"] = np.zeros((env.observation_size, seen.shape[1]), seen.dtype)
    policy["w0"][env.seen] = seen
    return policy


def act(policy: dict, memory: tuple, obs, xp=np) -> tuple[tuple, Any]:
    """The exported policy: its memory and raw observations [..., O] -> next memory, action.

    The actions [..., A] are the distribution's mean, as controls of the actuators. NumPy suffices.
    """
    x = xp.clip((obs - policy["obs_mean"]) / xp.sqrt(policy["obs_var"] + 1e-8), -10.0, 10.0)
    last = sum(name.startswith("w") for name in policy) - 1
    for i in range(last):
        x = xp.tanh(x @ policy[f"w{i}"] + policy[f"b{i}"])
    action = x @ policy[f"w{last}"] + policy[f"b{last}"]
    return memory, policy["action_scale"] * xp.clip(action, -1.0, 1.0) + policy["action_bias"]


# shared: original
class CMujocoEnv:
    """The task in C MuJoCo, on the original model, with Gymnasium's interface."""

    def __init__(self, env: Env):
        self.env = env
        self.task = env.task
        self.model = load_model(env.task)
        self.data = mujoco.MjData(self.model)
        self.elapsed = 0  # steps since the reset
        self.start = jax.jit(kernel(env.reset))
        self.observe()  # so that a caller may set `data` and step without a reset

    def reset(self, seed: int):
        start = jax.device_get(self.start(jax.random.key(seed)).data)
        reset_data(self.task, self.model, self.data)
        for name, value in start.fields().items():
            setattr(self.data, name, value)
        self.data.ctrl = self.env.action_bias
        self.elapsed = 0
        mujoco.mj_forward(self.model, self.data)
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        x, senses = self.task.sense(partial(getattr, self.data), np)
        self.now = Snapshot(qpos=self.data.qpos, qvel=self.data.qvel, x=x, senses=senses)
        return self.task.observe(self.now, np)

    def step(self, action):
        x_before = self.now.x
        time_before = self.data.time
        self.data.ctrl = action
        mujoco.mj_step(self.model, self.data, nstep=self.task.frame_skip)
        mujoco.mj_rnePostConstraint(self.model, self.data)  # for the wrenches
        self.elapsed += 1

        obs = self.observe()
        healthy = self.task.is_healthy(self.now, np)
        slow = (np.abs(self.data.qvel) < self.task.max_speed).all()
        broken = not slow or self.data.time <= time_before  # MuJoCo starts broken physics anew
        x_velocity = (self.now.x - x_before) / self.env.control_dt
        effort = action - self.env.action_bias
        terms = self.task.reward_terms(self.now, x_velocity, effort, healthy, np)
        reward = 0.0 if broken else sum(terms.values())
        truncated = self.elapsed >= self.env.time_limit
        return obs, reward, broken or not healthy, truncated, {}


def make_gymnasium(env: Env):
    """Gymnasium's own environment of the task.

    None if there is none, or if the robot, or what the policy sees of it, is another.
    """
    is_file = not env.task.mjcf.lstrip().startswith("<")
    if not is_file or find_mjcf(env.task).parent != gymnasium_models():
        return None
    gymnasium = importlib.import_module("gymnasium")
    name = env.name + "-v5"
    if name not in gymnasium.registry:
        return None

    mujoco.set_mju_user_warning(lambda _: None)  # about deprecated settings in Gymnasium's models
    theirs = gymnasium.make(name)
    mujoco.set_mju_user_warning(None)
    simulator = theirs.unwrapped
    if find_mjcf(env.task) != Path(simulator.fullpath):
        return None
    simulator.reset(seed=0)
    ours = CMujocoEnv(env)
    ours.data.qpos = simulator.data.qpos
    ours.data.qvel = simulator.data.qvel
    mujoco.mj_forward(ours.model, ours.data)
    obs = ours.observe()
    expected = simulator._get_obs()
    same = obs.shape == expected.shape and np.allclose(obs, expected, atol=1e-6)
    return theirs if same else None


# end shared


# shared: evaluation
@partial(jax.jit, static_argnames="env")
def evaluate_mjx(env: Env, policy: dict, keys: jax.Array) -> jax.Array:
    """Returns of one deterministic episode for each key, in MJX: [E] keys -> [E]."""

    def step(carry, _):
        state, memory, alive, total = carry
        memory, action = act(policy, memory, state.obs, jnp)
        state = jax.vmap(kernel(env.step))(state, action)
        total += alive * state.reward
        alive &= state.done == 0
        return (state, memory, alive, total), None

    state = jax.vmap(kernel(env.reset))(keys)
    alive = jnp.full(len(keys), True)
    start = (state, initial_memory(keys.shape), alive, jnp.zeros(len(keys)))
    (*_, total), _ = jax.lax.scan(step, start, None, length=env.time_limit)
    return total


def evaluate_on_host(
    env, policy: dict, episodes: int, seed: int, on_step=lambda: None
) -> np.ndarray:
    """Returns of deterministic episodes [E], in an environment with Gymnasium's interface.

    on_step is called after each step.
    """
    returns = np.zeros(episodes)
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        memory = initial_memory()
        over = False
        while not over:
            memory, action = act(policy, memory, obs)
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[episode] += reward
            over = terminated or truncated
            on_step()
    return returns


def evaluation_seed(args: Args) -> int:
    """The seed of the first evaluation episode; the others follow it.

    No run is trained with one of them, as --seed ends below.
    """
    return 1_000_000_001 + args.seed


def judge(args: Args, env: Env, policy: dict) -> dict[str, dict[str, float]]:
    """Evaluate in each simulator at hand.

    Prints mean, std, min and max of the returns, and returns them by simulator.
    """
    episodes = args.eval_episodes
    seed = evaluation_seed(args)
    keys = jax.vmap(jax.random.key)(seed + jnp.arange(episodes))
    returns = {}
    # From the same initial states as C MuJoCo.
    returns["MJX"] = np.asarray(evaluate_mjx(env, policy, keys))
    returns["C MuJoCo"] = evaluate_on_host(CMujocoEnv(env), policy, episodes, seed)
    theirs = make_gymnasium(env)
    if theirs is not None:
        returns["Gymnasium"] = evaluate_on_host(theirs, policy, episodes, seed)

    print(f"return of {episodes:3} episodes     mean      std      min      max")
    table = {}
    for name, values in returns.items():
        table[name] = {key: float(getattr(values, key)()) for key in ("mean", "std", "min", "max")}
        print(f"{name:<22}" + "".join(f"{value:9.1f}" for value in table[name].values()))
    return table


# end shared


# shared: renderer
def make_renderer(model: mujoco.MjModel) -> mujoco.Renderer:
    """A renderer by MUJOCO_GL; without it by EGL on Linux, which needs no display."""
    advice = "on Linux install libegl1, or libosmesa6 and set MUJOCO_GL=osmesa"
    screen = model.vis.global_
    screen.offwidth = max(screen.offwidth, 640)  # of MuJoCo's memory for pictures
    screen.offheight = max(screen.offheight, 480)
    with or_fail(f"--capture-video: no OpenGL; {advice}"):
        if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
            gl_context.GLContext = importlib.import_module("mujoco.egl").GLContext
        return mujoco.Renderer(model, height=480, width=640)


# end shared


# shared: camera
def make_camera(model: mujoco.MjModel) -> int | mujoco.MjvCamera:
    """The model's camera `track`; without one, a camera that follows the heaviest of its trees."""
    number = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    if number >= 0:
        return number
    camera = mujoco.MjvCamera()
    mujoco.mjv_defaultFreeCamera(model, camera)
    is_root = (model.body_parentid == 0) & (np.arange(model.nbody) > 0)
    root = int(np.argmax(is_root * model.body_subtreemass))
    camera.type = mujoco.mjtCamera.mjCAMERA_TRACKING
    camera.trackbodyid = root

    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    own = model.body_rootid[model.geom_bodyid] == root
    if own.any():  # the default distance shows the whole floor
        away = np.linalg.norm(data.geom_xpos[own] - data.xpos[root], axis=1)
        camera.distance = 4 * float((away + model.geom_rbound[own]).max())
    return camera


# end shared


# shared: film
def write_video(env: Env, policy: dict, seed: int, file: Path) -> None:
    """Film one episode in C MuJoCo at its real speed, at 20 (HalfCheetah) to 67 frames a second."""
    original = CMujocoEnv(env)
    path = []
    evaluate_on_host(original, policy, 1, seed, lambda: path.append(original.data.qpos.copy()))

    imageio = importlib.import_module("imageio")
    renderer = make_renderer(original.model)
    camera = make_camera(original.model)
    every = max(1, round(0.02 / env.control_dt))  # steps of one frame
    frames_per_second = 1 / (every * env.control_dt)
    say(f"filming {len(path[::every])} pictures")
    with writing(file):
        file.parent.mkdir(exist_ok=True)
        with warnings.catch_warnings(action="ignore"):
            with imageio.get_writer(file, fps=frames_per_second) as video:
                for qpos in path[::every]:
                    original.data.qpos = qpos
                    mujoco.mj_forward(original.model, original.data)
                    renderer.update_scene(original.data, camera=camera)
                    video.append_data(renderer.render())
    print(f"video: {file}")


# end shared


# ---- 12. Log and files ---------------------------------------------------------------------------
# shared: log
def say(text: str) -> None:
    """Print a line with the seconds since the start; of several processes only the first does."""
    if jax.process_index() == 0:
        print(f"[{time.perf_counter() - START:5.1f} s] {text}", flush=True)


def check_log(args: Args) -> None:
    """Refuse to train without the packages that write the log."""
    require(RecordWriter, "tensorboard or tqdm is missing; pip install tensorboard tqdm")
    wandb = not args.track or importlib.util.find_spec("wandb")
    require(wandb, "--track: wandb is missing; pip install wandb")


def start_tracking(run_dir: Path, settings: dict) -> None:
    """Log to Weights & Biases as well, under the name of the run's folder."""
    importlib.import_module("wandb").init(
        id=run_dir.name,
        name=run_dir.name,
        config=settings,
        resume="allow",
    )


class Log:
    """TensorBoard, and a progress bar or, without a terminal, plain lines.

    Of several processes only the first writes.
    """

    def __init__(self, args: Args, run_dir: Path, first: int):
        """first: iterations done before."""
        self.args = args
        self.run_dir = run_dir
        self.start = time.time()
        self.first_step = first * args.steps_per_iteration
        self.shown = "-"  # the last return
        self.resets = 0  # worlds reset in the whole run, as last logged
        self.dumped = False  # whether nan_dump.npz has been dealt with

        quiet = jax.process_index() > 0
        name = f"events.out.tfevents.{time.time_ns()}"
        with writing(run_dir / "events*"):
            self.writer = RecordWriter(open(os.devnull if quiet else run_dir / name, "ab"))
        self.write_event(0, file_version="brain.Event:2")
        # TensorBoard forgets what an interrupted run wrote from this step on: all of it, where no
        # checkpoint was saved.
        session = SessionLog(status=SessionLog.START)
        self.write_event(self.first_step + 1, session_log=session)
        rows = [f"\n|{name}|{value}|" for name, value in dataclasses.asdict(args).items()]
        table = "|param|value|\n|-|-|" + "".join(rows)
        summary = text_pb("hyperparameters/text_summary", table)
        self.write_event(self.first_step, summary=summary)

        self.bar = tqdm(
            total=args.num_iterations * args.steps_per_iteration,
            initial=self.first_step,
            unit=" steps",
            unit_scale=True,
            disable=quiet or None,  # None: without a terminal
        )

    def write_event(self, step: int, **content) -> None:
        """Write to TensorBoard's file at once, so that it has all when the process is killed.

        The libraries' writers have threads, which lose their queues, and which a full disk ends
        unseen.
        """
        event = Event(step=step, wall_time=time.time(), **content)
        with writing(self.run_dir / "events*"):
            self.writer.write(event.SerializeToString())
            self.writer.flush()

    def scalars(self, step: int, values: dict) -> None:
        """Write all values that are finite, by tag, in one event."""
        finite = {tag: float(value) for tag, value in values.items() if math.isfinite(value)}
        rows = [Summary.Value(tag=tag, simple_value=value) for tag, value in finite.items()]
        self.write_event(step, summary=Summary(value=rows))
        if self.args.track and jax.process_index() == 0:
            importlib.import_module("wandb").log(finite | {"global_step": step})

    def write(self, iteration: int, metrics: dict) -> dict:
        """Log the metrics of an iteration, with its black box. Returns them as numbers."""
        box = metrics.pop("black_box")
        step = iteration * self.args.steps_per_iteration
        values = jax.device_get(metrics)
        sps = (step - self.first_step) / (time.time() - self.start)
        values["charts/SPS"] = sps
        self.scalars(step, values)

        resets = values["charts/nan_resets"]
        if resets > self.resets and not self.dumped:
            self.dumped = dump(self.args, self.run_dir / "nan_dump.npz", box)
        self.resets = resets
        # NaN in SAC before its first update; NaN >= 10 is False.
        skipped = values["charts/skipped_in_a_row"]
        message = f"{self.run_dir}: step {step}: {skipped:.0f} gradients in a row are not finite"
        # One bad gradient is bad luck; ten in a row mean that the parameters are lost.
        require(not skipped >= 10, message, 1)

        if values["charts/episodes_finished"]:
            self.shown = f"{values['charts/episodic_return']:.0f}"
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f"return {self.shown}")
        if self.bar.disable and (iteration % 10 == 0 or step == self.bar.total):
            left = (self.bar.total - step) / sps
            say(f"step {step}  return {self.shown}  SPS {sps:.0f}  time left {left:.0f} s")
        return values


# end shared


# shared: files
def count_bytes(tree) -> int:
    """Memory of all arrays of a tree, or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bare(x):
    """The array itself, or the numbers of PRNG keys."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def to_arrays(tree) -> dict[str, np.ndarray]:
    """All arrays of a tree by their names, with the shares of all processes."""
    tree = multihost_utils.process_allgather(jax.tree.map(bare, tree), tiled=True)
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}


def from_arrays(arrays: dict[str, np.ndarray], like):
    """The tree that `to_arrays` took apart.

    It takes the place of the tree `like`, of the same shapes, whose arrays are deleted.
    """

    def place(path, old):
        name = jax.tree_util.keystr(path)
        new = arrays[name]
        form = jax.eval_shape(bare, old)
        if (new.shape, new.dtype) != (form.shape, form.dtype):
            theirs = f"{new.dtype} {new.shape}"
            raise ValueError(f"{name} is {theirs}, not {form.dtype} {form.shape}")
        if isinstance(old, np.ndarray):
            return new

        old.delete()
        new = jax.make_array_from_callback(new.shape, old.sharding, lambda index: new[index])
        return jax.random.wrap_key_data(new) if form.dtype != old.dtype else new

    return jax.tree.map_with_path(place, like)


def writing(file: Path):
    """Context for file writes: a full disk ends the run with one line."""
    return or_fail(f"cannot write {file}; what was saved before is whole", 1, OSError)


@contextlib.contextmanager
def replacing(file: Path):
    """A stream for the file's new content; the file is replaced as a whole or not at all."""
    part = file.with_suffix(".part")
    with writing(file):
        part.unlink(missing_ok=True)
        with part.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)


def write_npz(file: Path, arrays: dict[str, np.ndarray]) -> None:
    with replacing(file) as stream:  # NumPy's format holds a checksum of each array, and no code
        np.savez(stream, **arrays)


def dump(args: Args, file: Path, black_box: dict) -> bool:
    """Write the steps of the first world in the run that broke, for tools/replay_nan.py.

    black_box: [D, T, ...], for D devices. Returns whether a world broke.
    """
    arrays = to_arrays(black_box)
    broken = arrays["['broken']"]  # [D, T]
    if broken.any() and jax.process_index() == 0 and not file.exists():
        device = broken.T.argmax() % len(broken)  # where it was first
        arrays = {name: array[device] for name, array in arrays.items()}
        arrays["args"] = json.dumps(dataclasses.asdict(args))
        arrays["script"] = Path(__file__).name
        write_npz(file, arrays)
        say(f"a world broke; to see how: python tools/replay_nan.py {shlex.quote(str(file))}")
    return bool(broken.any())


def checkpoints(run_dir: Path) -> list[Path]:
    """The newest first."""
    return sorted((run_dir / "checkpoints").glob("[0-9]*.npz"), reverse=True)


def save(args: Args, run_dir: Path, state: TrainState, policy: dict) -> None:
    """Write a checkpoint (the whole state, and the settings) and policy.npz."""
    arrays = to_arrays(state)
    arrays["args"] = json.dumps(dataclasses.asdict(args))
    arrays["entries"] = len(arrays) + 1  # a damaged file may lose some, and be whole to NumPy
    if jax.process_index() > 0:
        return
    folder = run_dir / "checkpoints"
    with writing(folder):
        folder.mkdir(exist_ok=True)
        # Before the checkpoint: if we are killed in between, resuming from the older one rewrites it.
        write_npz(run_dir / "policy.npz", policy)
        write_npz(folder / f"{int(state.learner.iteration):09}.npz", arrays)
        for old in [*checkpoints(run_dir)[3:], *folder.glob("*.part")]:
            old.unlink()


def newest_checkpoint(run_dir: Path, flag: str) -> tuple[Path, dict, dict] | None:
    """The newest checkpoint that is whole: its file, its arrays, its settings.

    None, if the run was stopped before its first checkpoint. flag: the one that asks for it.
    """
    for file in checkpoints(run_dir):
        try:
            with np.load(file, allow_pickle=False) as arrays:
                saved = dict(arrays)  # which reads all, and compares the checksums
            if len(saved) != saved.get("entries", len(saved)):
                raise ValueError("arrays are missing")
            return file, saved, dict(json.loads(str(saved["args"])))
        except Exception as error:  # there is no end to what may be wrong with a file
            problem = f"{type(error).__name__}: {error!s:.80}"
            say(f"{flag}: {file} is broken ({problem}); trying the one before")
    require(not checkpoints(run_dir), f"{flag}: {run_dir} holds no whole checkpoint")


def restore(args: Args, run_dir: Path, state: TrainState) -> TrainState:
    """The newest whole checkpoint, in the place of `state`.

    `state` itself, if the run was stopped before its first checkpoint.
    """
    newest = newest_checkpoint(run_dir, "--resume")
    if newest is None:
        return state
    file, saved, theirs = newest
    ours = json.loads(json.dumps(dataclasses.asdict(args)))  # with lists for tuples, as theirs
    theirs = json.loads(json.dumps(dataclasses.asdict(Args()))) | theirs  # for flags that are newer
    names = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
    refused = [name for name in names if name not in RESUME_FLAGS]
    require(not refused, f"--resume: {file} differs from run.json in {', '.join(refused):.200}")
    with or_fail(f"--resume: {file} was written by other code"):
        state = from_arrays(saved, state)
    say(f"going on after iteration {int(file.stem)}: {file}")
    if "total_timesteps" in names:
        change = f"from {theirs['total_timesteps']} to {args.total_timesteps} steps"
        say(f"made longer, {change}: schedules go on as in a run of the new length")
    return state


def inherit(run_dir: Path, learner: Learner) -> Learner:
    """The learner with INHERITED from another run's newest checkpoint (--init-from)."""
    with or_fail(f"--init-from {str(run_dir)!r:.200}"):
        newest = newest_checkpoint(run_dir, "--init-from")
    require(newest, f"--init-from {run_dir}: no checkpoint there, so no policy")
    file, saved, _ = newest
    fields = tuple(f".learner.{name}" for name in INHERITED)
    theirs = {
        name.removeprefix(".learner"): saved[name] for name in saved if name.startswith(fields)
    }
    ours = to_arrays(learner)
    with or_fail(f"--init-from {file}: does not fit; another task, script or --hidden-sizes?"):
        missing = {name for name in ours if f".learner{name}".startswith(fields)} ^ theirs.keys()
        if missing:
            raise ValueError(f"{min(missing)} is in one of the two only")
        learner = from_arrays(ours | theirs, learner)
    say(f"weights and statistics are those of {file}")
    return learner


def first_state(args: Args, run_dir: Path, resuming: bool, state: TrainState) -> TrainState:
    """Where training begins: the newest checkpoint, another run's policy, or `state` itself.

    A run that was stopped before its first checkpoint starts over.
    """
    if args.init_from and not (resuming and checkpoints(run_dir)):
        state = state.replace(learner=inherit(Path(args.init_from), state.learner))
    return restore(args, run_dir, state) if resuming else state


def write_run(run_dir: Path, content: dict) -> None:
    """Write run.json."""
    if jax.process_index() == 0:
        with replacing(run_dir / "run.json") as stream:
            stream.write(json.dumps(content, indent=2).encode() + b"\n")


def read_args(text: str) -> Args:
    """The settings in a JSON text, checked as those of the command line are."""
    values = json.loads(text)
    args = Args(**{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()})
    every = typeguard.CollectionCheckStrategy.ALL_ITEMS
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        with or_fail(f"setting {field.name}"):
            typeguard.check_type(value, field.type, collection_check_strategy=every)
    check_args(args)
    return args


def read_run(run_dir: Path) -> Args:
    """The settings in a run's run.json."""
    with or_fail(f"{run_dir} is no run folder of this script"):
        run = json.loads((run_dir / "run.json").read_text())
        return read_args(json.dumps(run["args"]))


# end shared


# ---- 13. Command line ----------------------------------------------------------------------------
# shared: command_line
def require(condition, message: str, code: int = 2) -> None:
    """Unless the condition holds, end with one line and an exit code: 2 for bad input."""
    if condition:
        return
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(code)  # a polite end would wait for the other processes, and they for this one
    raise SystemExit(code)


@contextlib.contextmanager
def or_fail(message: str, code: int = 2, kind: type[Exception] = Exception):
    """End with one line and an exit code where the body raises, by default whatever it raises."""
    try:
        yield
    except kind as error:
        require(False, f"{message} ({type(error).__name__}: {error!s:.200})", code)


def parse_args(argv: list[str], default: Args = Args()) -> Args:
    """The settings of a command line. default: those of the flags that are left out."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text):
            return tyro.cli(Args, args=argv, default=default)
    except SystemExit as stop:
        # tyro draws a box around its errors; the first paragraph is what counts.
        error = text.getvalue().split("\n", 1)[-1].split("──")[0].replace("│", "")
        require(not stop.code, error)
        raise


def without_help(argv: list[str]) -> list[str]:
    """The command line without the flag at which `parse_args` would print the help and end."""
    return [flag for flag in argv if flag not in ("-h", "--help")]


# Flags of one call, which run.json does not keep.
CALL_FLAGS = (
    "resume",
    "evaluate",
    "smoke",
    "compile_cache",
    "coordinator_address",
    "num_processes",
    "process_id",
)


def call_flags(args) -> dict:
    """The flags of one call by their names; of the class `Args`, their defaults."""
    return {name: getattr(args, name) for name in CALL_FLAGS}


# Settings that a run may change when it is resumed.
RESUME_FLAGS = ("total_timesteps", "track", "capture_video")


def resumed_args(args: Args, argv: list[str]) -> Args:
    """The settings of the run to resume, with what the command line may change of them."""
    saved = dataclasses.replace(read_run(Path(args.resume)), **call_flags(args))
    wanted = parse_args(argv, saved)
    kept = {name: getattr(saved, name) for name in RESUME_FLAGS if hasattr(saved, name)}
    advice = "leave the other flags out, or start a new run, with --init-from"
    unchanged = dataclasses.replace(wanted, **kept) == saved
    require(unchanged, f"--resume: the run keeps its own settings; {advice}")

    total = saved.total_timesteps
    message = f"--total-timesteps {wanted.total_timesteps}: less than the {total} of this run"
    require(wanted.total_timesteps >= total, f"--resume: {message}; it can only become longer")
    return wanted


def start_jax(args: Args) -> None:
    """Settle what cannot change once JAX runs: its cache, its CPU devices, other processes."""
    plain = args.exp_name == Path(args.exp_name).name
    require(plain, f"--exp-name {args.exp_name}: must be a plain name")
    numbered = (args.num_processes, args.process_id) != (None, None)
    message = "--num-processes, --process-id: need --coordinator-address as well"
    require(args.coordinator_address or not numbered, message)

    jax.config.update("jax_enable_compilation_cache", args.compile_cache)
    if not args.compile_cache:
        os.environ["ONEKERNEL_CACHE"] = "0"
    elif not jax.config.jax_compilation_cache_dir:
        try:
            folder = Path.home() / ".cache" / "mjx-rl"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Who can write there can run code here. It fails if the folder is another user's.
            folder.chmod(0o700)
            jax.config.update("jax_compilation_cache_dir", str(folder))
        except (OSError, RuntimeError) as error:
            print(f"compiled programs are not kept, as there is no folder for them: {error}")

    split_cpu(args)
    if args.coordinator_address:
        join_processes(args)


CONTROL_GROUPS = Path("/sys/fs/cgroup")


def read_limits(*files: str) -> list[list[str]]:
    """What these files say in each of Linux's control groups that hold this process.

    A container's limits stand there; of version 2 in one tree, of version 1 in several.
    """
    limits = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = CONTROL_GROUPS / controllers.split(",")[0]
            own = root / path.lstrip("/")  # missing in a container, which sees its own as the root
            for folder in [own, *own.parents]:
                if folder.is_relative_to(root) and all((folder / name).exists() for name in files):
                    limits.append(" ".join((folder / name).read_text() for name in files).split())
    return limits


def count_cores() -> int:
    """Cores that this process may use, by its affinity and by a container's quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    quotas = read_limits("cpu.max") + read_limits("cpu.cfs_quota_us", "cpu.cfs_period_us")
    for quota, period in quotas:
        if quota.isdigit():  # not "max" or -1
            cores = min(cores, int(quota) // int(period))
    return max(cores, 1)


def host_memory() -> float:
    """Bytes that this process may use, by the machine and a container; infinite if none tells."""
    room = math.inf
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows does not tell
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for (limit,) in read_limits("memory.max") + read_limits("memory.limit_in_bytes"):
        if limit.isdigit():
            room = min(room, int(limit))
    return room


def split_cpu(args: Args) -> None:
    """Make a CPU as many devices as it has cores; as one, it would leave most of them idle."""
    cores = count_cores()
    os.environ.setdefault("NPROC", str(cores))  # for XLA's threads; it does not see quotas
    each = (args.num_devices or cores) // (args.num_processes or 1)
    with contextlib.suppress(RuntimeError):  # JAX has started already, with the devices it has
        # At most 64: of 256 worlds each would get fewer than four.
        jax.config.update("jax_num_cpu_devices", min(max(each, 1), 64))


def join_processes(args: Args) -> None:
    """Join the other processes; JAX asks SLURM or Open MPI for arguments that are None."""
    auto = args.coordinator_address == "auto"
    with or_fail("--coordinator-address, --num-processes, --process-id"):
        jax.distributed.initialize(
            coordinator_address=None if auto else args.coordinator_address,
            num_processes=args.num_processes,
            process_id=args.process_id,
            heartbeat_timeout_seconds=20,  # a process that is silent for so long ends all of them
            shutdown_timeout_seconds=3600,  # as all wait while the first evaluates and films
        )
        multihost_utils.sync_global_devices("start")  # now: on CPUs Gloo waits for 30 s at most


def on_signals(handler) -> None:
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


def listen() -> list[int]:
    """The signals that have asked to stop, a list that grows.

    The first ends the loop after its iteration, a second one the process.
    """
    stops = []

    def stop(number, _):
        stops.append(number)
        on_signals(signal.SIG_DFL)

    if jax.process_count() == 1:
        on_signals(stop)
    else:  # JAX listens to SIGTERM itself, for `stop_wanted`
        signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
    return stops


def stop_wanted(stops: list[int], iteration: int) -> bool:
    """Whether to stop before this iteration; if one process is asked to, all do."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(iteration):
        stops.append(signal.SIGTERM)
    return len(stops) > 0


def make_mesh(wanted: int | None, *parts: int) -> Mesh:
    """The devices that share the work; of several processes, all devices of all of them.

    wanted: how many; None for as many as possible. Each of `parts` must be a multiple of it.
    """
    devices = jax.devices()
    least = len(devices) if jax.process_count() > 1 else 1
    numbers = range(least, len(devices) + 1)
    fits = [n for n in numbers if all(part % n == 0 for part in parts)]
    possible = fits and (not wanted or wanted in fits)
    flag = f"--num-devices {wanted or len(devices)}"
    require(possible, f"{flag}: must divide {parts}; with these devices, {fits or 'none'} do")
    return Mesh(np.array(devices[: wanted or fits[-1]]), ("devices",))


def check_memory(mesh: Mesh | None, size: int, flag: str = "--num-envs") -> None:
    """Refuse what takes more bytes than the mesh's devices have, or without a mesh, the host."""
    stats = jax.local_devices()[0].memory_stats() if mesh else None  # None for a CPU
    if stats:
        room = stats["bytes_limit"] * mesh.size
    else:
        room = host_memory()
    message = f"{flag}: this takes {size} bytes of the {room} that there are; try less"
    require(size < 0.95 * room, message)  # the rest is for code and the libraries' own memory


# end shared


def check_args(args: Args) -> None:
    """Refuse what cannot run, before anything is built."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        flag = "--" + field.name.replace("_", "-")
        for allowed in getattr(field.type, "__metadata__", ()):
            low, high = allowed.least, allowed.most
            fits = value is None or low <= value <= high  # False for NaN
            require(fits, f"{flag} {value}: must be between {low} and {high}")

    widths = args.hidden_sizes
    good = widths and min(widths) > 0 and max(widths) <= 4096
    require(good, f"--hidden-sizes {widths}: must be widths up to 4096, like 64 64")

    steps = args.steps_per_iteration
    message = f"--total-timesteps {args.total_timesteps}: less than a rollout of {steps}"
    require(args.num_iterations, message)
    message = f"--num-minibatches {args.num_minibatches}: must divide {steps}"
    require(steps % args.num_minibatches == 0, message)


# shared: models
def called(model: mujoco.MjModel, kind: str, number: int) -> str:
    """What messages call an element of a model: its name; without one, number and place.

    kind: actuator, equality, geom, joint or sensor.
    """
    name = getattr(model, kind)(number).name
    if name:
        return f"{kind} {name}"
    place = ""
    if kind == "geom":
        place = f" (of body {model.body(model.geom_bodyid[number]).name})"
    if kind == "actuator" and model.actuator_trntype[number] == mujoco.mjtTrn.mjTRN_JOINT:
        place = f" (of joint {model.joint(model.actuator_trnid[number, 0]).name})"
    return f"{kind} {number}{place}"


def foreign_kinds(model: mujoco.MjModel) -> list[str]:
    """What of a model MJX does not have, or would leave out unsaid."""
    kinds = [
        ("actuator", "dyntype", model.actuator_dyntype, mujoco.mjtDyn, mjx.DynType),
        ("actuator", "gaintype", model.actuator_gaintype, mujoco.mjtGain, mjx.GainType),
        ("actuator", "biastype", model.actuator_biastype, mujoco.mjtBias, mjx.BiasType),
        ("actuator", "transmission", model.actuator_trntype, mujoco.mjtTrn, mjx.TrnType),
        ("equality", "type", model.eq_type, mujoco.mjtEq, mjx.EqType),
        ("sensor", "type", model.sensor_type, mujoco.mjtSensor, mjx.SensorType),
    ]
    faults = []
    for kind, what, values, names, known in kinds:
        has = ", ".join(member.name.lower() for member in known)
        for number, value in enumerate(values):
            if value not in set(known):
                theirs = names(value).name.split("_", 1)[1].lower()
                element = called(model, kind, number)
                faults.append(f"{element}: MJX lacks the {what} {theirs}; it has {has}")

    for kind, histories in ("actuator", model.actuator_history), ("sensor", model.sensor_history):
        for number in np.flatnonzero(histories[:, 0]):
            faults.append(f"{called(model, kind, number)}: MJX lacks delays; leave it out")
    option = model.opt
    in_fluid = option.density > 0 or option.viscosity > 0 or option.wind.any()
    for number in np.flatnonzero(model.geom_fluid[:, 0] > 0) if in_fluid else ():
        faults.append(f"{called(model, 'geom', number)}: MJX lacks fluidshape ellipsoid; use none")
    if model.nplugin or model.nflex:
        faults.append("plugins, flex: MJX lacks them; leave them out")

    integrator = mujoco.mjtIntegrator(model.opt.integrator).name.removeprefix("mjINT_")
    if integrator not in ("EULER", "RK4", "IMPLICITFAST"):
        faults.append(f"option integrator {integrator}: MJX has Euler, RK4 and implicitfast")
    elif integrator == "IMPLICITFAST" and in_fluid:
        faults.append("option integrator implicitfast: MJX lacks it in a fluid; use Euler or RK4")
    return faults


def foreign_contacts(model: mujoco.MjModel) -> list[str]:
    """The pairs of geoms that can collide, but not in MJX."""
    convex = {mujoco.mjtGeom.mjGEOM_MESH, mujoco.mjtGeom.mjGEOM_HFIELD}
    elliptic = model.opt.cone == mujoco.mjtCone.mjCONE_ELLIPTIC
    faults = []
    for first, second, pair in collision_driver.geom_pairs(model):
        types = [mujoco.mjtGeom(model.geom_type[geom]) for geom in (first, second)]
        kinds = [kind.name.removeprefix("mjGEOM_").lower() for kind in types]
        margin = model.geom_margin[[first, second]].sum() if pair < 0 else model.pair_margin[pair]
        condim = max(model.geom_condim[[first, second]]) if pair < 0 else model.pair_dim[pair]

        names = [called(model, "geom", geom) for geom in (first, second)]
        both = f"{names[0]} ({kinds[0]}) and {names[1]} ({kinds[1]})"
        if not collision_driver.has_collision_fn(*types):
            advice = "collide as capsules or meshes, or keep them apart by contype and conaffinity"
            faults.append(f"{both}: MJX lacks this collision; {advice}")
        elif margin and convex.intersection(types):
            faults.append(f"{both}: MJX lacks margin for meshes and height fields; leave it out")
        elif elliptic and condim == 1:
            faults.append(f"{both}: MJX lacks condim 1 with elliptic cones; use condim 3")
    return faults


def can_move(task: Task, model: mujoco.MjModel) -> bool:
    """Whether random controls of 20 physics steps move the robot elsewhere than action 0 does."""
    random = np.random.default_rng(0).uniform(-1, 1, model.nu)
    ends = []
    for action in np.zeros(model.nu), random:
        data = mujoco.MjData(model)
        reset_data(task, model, data)
        mujoco.mj_forward(model, data)
        scale, bias = control_range(task, model, data)
        data.ctrl = bias + scale * action
        mujoco.mj_step(model, data, nstep=20)
        ends.append(np.concatenate([data.qpos, data.qvel]))
    return not np.array_equal(*ends)


def has_constraints(model: mujoco.MjModel) -> bool:
    """Whether MJX has any to solve: contacts, limits, equalities or dry friction."""
    return mjx.make_data(model, impl="jax")._impl.efc_J.size > 0


def misfits(task: Task, model: mujoco.MjModel) -> list[str]:
    """What a task's row asks of a model that it does not have."""
    faults = []
    if task.first_observed >= model.nq:
        faults.append(f"first_observed {task.first_observed}: it has {model.nq} coordinates")

    data = mujoco.MjData(model)
    known = {field.name for field in (*mjx.Data.fields(), *mjx.DataJAX.fields())}
    unknown = {field for field in task.fields if field not in known or not hasattr(data, field)}
    faults += [f"position, sensed: MuJoCo's data have no field {field}" for field in unknown]
    if task.contact_cost and "cfrc_ext" not in dict(task.sensed):
        faults.append("contact_cost: the forces that it is for, cfrc_ext, are not in sensed")
    faults += [f"unseen: {name} is not in sensed" for name in {*task.unseen} - {*dict(task.sensed)}]

    source, *index = task.position
    shape = np.shape(getattr(data, source, ()))
    inside = [-n <= i < n for i, n in zip(index, shape, strict=False)]
    if source not in unknown and (len(index) != len(shape) or not all(inside)):
        faults.append(f"position {task.position}: {source} has the shape {shape}")

    of_forces = np.flatnonzero(model.sensor_needstage == mujoco.mjtStage.mjSTAGE_ACC)
    if "sensordata" in task.fields and len(of_forces) and not has_constraints(model):
        name = called(model, "sensor", of_forces[0])
        faults.append(f"{name}: 0 in MJX as long as no joint is limited and nothing can collide")
    return faults


def check_model(task: Task, model: mujoco.MjModel) -> list[str]:
    """Why a model cannot be trained, by the names of its parts, and what to write instead.

    A line for each fault; none if all is well.
    """
    faults = foreign_kinds(model) + foreign_contacts(model) + misfits(task, model)
    lowest, highest = model.actuator_ctrlrange.T
    if task.servo_offset is None:
        advice = 'write ctrlrange="-1 1", or for a position servo inheritrange="1"'
        for number in np.flatnonzero(~(lowest < highest) | ~np.isfinite(highest - lowest)):
            name = called(model, "actuator", number)
            faults.append(f"{name} has no ctrlrange for actions to be mapped to; {advice}")

    if model.nu == 0:
        faults.append("it has no actuators, so that no action could move it")
    elif not faults and not can_move(task, model):
        faults.append("no action moves it; look at the actuators' gear, gain and forcerange")
    return faults


def remarks(task: Task, model: mujoco.MjModel) -> list[str]:
    """What is told about a model before its training starts: what may surprise, a line for each."""
    lines = []
    if model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
        lines.append("the model's solver, PGS, is not in MJX; Newton's takes its place there")
    if model.opt.noslip_iterations:
        lines.append("the model's noslip_iterations are not in MJX; only C MuJoCo has them")
    if not task.mjcf.lstrip().startswith("<") and find_mjcf(task).parent == gymnasium_models():
        return lines  # whose poses and bounds are known

    bounds = {"healthy_z": task.healthy_z, "max_pitch": task.max_pitch, "max_state": task.max_state}
    set_bounds = [f"{name} {bound}" for name, bound in bounds.items() if np.isfinite(bound).any()]
    ends = ", ".join([f"max_speed {task.max_speed:g} (m/s, rad/s)", *set_bounds])
    keyframe = find_keyframe(task, model)
    pose = f"keyframe {model.key(keyframe).name or keyframe}" if keyframe >= 0 else "its own pose"
    lines.append(f"starts from {pose}; an episode ends after {task.time_limit} steps, or by {ends}")

    data = mujoco.MjData(model)
    reset_data(task, model, data)
    mujoco.mj_forward(model, data)
    outside = []
    for joint in np.flatnonzero(model.jnt_limited):
        low, high = model.jnt_range[joint]
        value = data.qpos[model.jnt_qposadr[joint]]
        is_ball = model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_BALL
        if not is_ball and not low - 1e-6 <= value <= high + 1e-6:
            name = called(model, "joint", joint)
            outside.append(f"{name} starts at {value:.3g}, outside of {low:.3g} to {high:.3g}")
    if outside:
        more = f" (and {len(outside) - 1} more)" if len(outside) > 1 else ""
        lines.append(outside[0] + more)
    if data.ncon and data.contact.dist.min() < -5e-3:  # m
        deepest = data.contact[int(data.contact.dist.argmin())]
        names = [called(model, "geom", geom) for geom in deepest.geom]
        lines.append(f"{names[1]} starts {-deepest.dist:.2g} m deep in {names[0]}")

    x, senses = task.sense(partial(getattr, data), np)
    start = Snapshot(qpos=data.qpos, qvel=data.qvel, x=x, senses=senses)
    if not np.all(task.is_healthy(start, np)):
        lines.append("the robot starts outside of the task's bounds: each episode ends at once")
    return lines


# end shared


# ---- 14. Main ------------------------------------------------------------------------------------
# shared: run_dir
def open_run_dir(args: Args, run_dir: Path | None) -> Path:
    """The folder of a new run, or that of the run to continue. Fails if nothing can be written."""
    resuming = run_dir is not None
    if not resuming:
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        run_dir = Path(args.runs_dir) / name
    if jax.process_index() == 0:
        with or_fail(f"--runs-dir {args.runs_dir}"):
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=run_dir if resuming else run_dir.parent).close()
    return run_dir


@dataclasses.dataclass
class Programs:
    """What `train` runs, compiled."""

    env: Env
    state: TrainState  # before the first iteration
    iterate: Any  # state -> state, metrics
    evaluate: Any  # the policy -> [E] returns in MJX
    facts: dict  # of the compilation and the memory, for run.json


# end shared


def build(args: Args, mesh: Mesh) -> Programs:
    """Compile all programs of a run, and run the first: the state before training."""
    slowly = "" if onekernel else "; without the folder onekernel beside it, XLA's slow physics"
    say(f"building {args.env_id} for {mesh.size} x {mesh.devices[0].device_kind}{slowly}")
    env = Env(args)
    for remark in env.remarks:
        say(f"{args.env_id}: {remark}")
    key = jax.random.key(args.seed)
    eval_keys = jax.vmap(jax.random.key)(evaluation_seed(args) + jnp.arange(args.eval_episodes))

    shardings = jax.tree.map(partial(NamedSharding, mesh), STATE_SPEC)
    init = jax.jit(init_train_state, static_argnames=("args", "env"), out_shardings=shardings)
    init = init.lower(args, env, key)

    def shape(sharding, tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    shapes = jax.tree.map(shape, shardings, init.out_info)
    check_memory(mesh, count_bytes(shapes))

    say("compiling the training iteration")
    start = time.perf_counter()
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    # The program that makes the first state runs once, so it is compiled quickly rather than well.
    is_cpu = mesh.devices[0].platform == "cpu"
    quickly = {"xla_backend_optimization_level": 0} if is_cpu else None
    with ThreadPoolExecutor() as pool:  # XLA compiles one program while JAX traces the next
        init = pool.submit(init.compile, compiler_options=quickly)
        iterate = pool.submit(train_iteration.lower(args, env, mesh, shapes).compile)
        state = init.result()(key)
        policy = export_policy(env, state.learner)
        evaluate = evaluate_mjx.lower(env, policy, eval_keys).compile()
        iterate = iterate.result()

    memory = iterate.memory_analysis()  # of one device
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    facts = {
        "compile_s": round(time.perf_counter() - start, 2),
        "compile_cache": "hit" if any("cache_hits" in event for event in events) else "miss",
        "bytes_per_world": count_bytes(state.worlds) // args.num_envs,
        "peak_bytes": peak * mesh.size,
    }
    check_memory(mesh, facts["peak_bytes"])
    say("compiled: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    return Programs(
        env=env,
        state=state,
        iterate=iterate,
        evaluate=lambda policy: evaluate(policy, eval_keys),
        facts=facts,
    )


# shared: run_facts
def make_run_dir(wanted: Path) -> Path:
    """Create the folder of a new run, with a copy of this script in it.

    Where another run of the same second has that folder, it is NAME_2, NAME_3, ...
    """
    folder = wanted
    for number in itertools.count(2):
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
        folder = wanted.with_name(f"{wanted.name}_{number}")
    shutil.copy(__file__, folder)
    return folder


def model_digest(model: mujoco.MjModel) -> str:
    """A digest of a model's numbers and of its options; where its files lie does not matter."""
    digest = hashlib.sha256()
    for part in (model, model.opt):
        for name in dir(part):
            value = getattr(part, name)
            is_number = isinstance(value, int | float | np.ndarray)
            if is_number and not name.startswith(("_", "path")):
                digest.update(name.encode() + np.asarray(value).tobytes())
    return digest.hexdigest()[:16]


def onekernel_digest() -> str | None:
    """A digest of onekernel's code, which makes the physics; None without onekernel."""
    if not onekernel:
        return None
    digest = hashlib.sha256()
    for file in sorted(Path(onekernel.__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def package_versions() -> dict[str, str]:
    """The versions of those packages that a run's numbers depend on."""
    packages = ("jax", "mujoco", "mujoco-mjx", "flax", "optax")
    return {name: importlib.metadata.version(name) for name in packages}


def tell_changes(run_dir: Path, model: mujoco.MjModel) -> None:
    """Say what has changed since the run was trained, in a line each."""
    script = Path(__file__)
    for copy in run_dir.glob("*.py"):
        if copy.read_bytes() != script.read_bytes():
            command = shlex.join(["diff", str(copy), str(script)])
            say(f"the code has changed since the run began, perhaps its rewards: {command}")
    then = json.loads((run_dir / "run.json").read_text())
    if then.get("model", "") not in ("", model_digest(model)):
        say("the model has changed since the run was trained: its files, or MuJoCo's version")
    if then.get("onekernel", "") not in ("", onekernel_digest()):
        say("onekernel has changed since the run was trained, or is there only now or then")
    old, new = then.get("versions", {}), package_versions()
    changed = [
        f"{name} {old[name]} -> {new[name]}"
        for name in new
        if old.get(name, new[name]) != new[name]
    ]
    if changed:
        say("versions have changed since the run was trained: " + ", ".join(changed))


def describe_run(args: Args, mesh: Mesh, model: mujoco.MjModel) -> dict:
    """What run.json says of how to repeat the run."""
    git = ["git", "rev-parse", "HEAD"]
    commit = ""
    with contextlib.suppress(OSError):  # git is not installed
        here = Path(__file__).parent
        commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout.strip()
    return {
        "script": Path(__file__).name,
        "args": dataclasses.asdict(args),
        "commit": commit,
        "model": model_digest(model),
        "onekernel": onekernel_digest(),
        "devices": [device.device_kind for device in mesh.devices],
        "versions": package_versions(),
    }


# end shared


# shared: train_loop
def train_loop(
    args: Args, run_dir: Path, programs: Programs, log: Log, stops: list[int]
) -> tuple[int, TrainState]:
    """Train until the last iteration, or until a signal asks to stop. Saves the result.

    Returns the iterations done in all, and the state.
    """
    state = programs.state
    iteration = int(state.learner.iteration)
    saved = iteration
    checkpoint_every = args.cadence(args.checkpoint_every)
    eval_every = args.cadence(args.eval_every)
    pending = None  # an iteration and its metrics, read one iteration late: no device waits
    while iteration < args.num_iterations and not stop_wanted(stops, iteration):
        state, metrics = programs.iterate(state)
        iteration += 1
        if pending:
            log.write(*pending)
        pending = (iteration, metrics)

        if args.eval_every and iteration % eval_every == 0:
            returns = programs.evaluate(export_policy(programs.env, state.learner))
            step = iteration * args.steps_per_iteration
            log.scalars(step, {"eval/episodic_return": returns.mean()})
        if iteration % checkpoint_every == 0:
            log.write(*pending)  # so that the curves reach as far as the checkpoint
            pending = None
            save(args, run_dir, state, export_policy(programs.env, state.learner))
            saved = iteration

    if pending:
        log.write(*pending)
    log.bar.close()
    if saved < iteration:
        save(args, run_dir, state, export_policy(programs.env, state.learner))
    return iteration, state


# end shared


def train(args: Args, run_dir: Path | None = None) -> tuple[Path, dict]:
    """Train from the start, or from the newest checkpoint of run_dir.

    Returns the run's folder and its policy.
    """
    check_log(args)
    stops = listen()
    resuming = run_dir is not None
    if args.capture_video:  # better to fail now than after training
        make_renderer(load_model(TASKS[args.env_id])).close()
    mesh = make_mesh(
        args.num_devices, args.num_envs, args.steps_per_iteration // args.num_minibatches
    )
    args = dataclasses.replace(args, num_devices=mesh.size, **call_flags(Args))
    run_dir = open_run_dir(args, run_dir)

    programs = build(args, mesh)
    env = programs.env
    model = load_model(env.task)
    if resuming:
        tell_changes(run_dir, model)
    programs.state = first_state(args, run_dir, resuming, programs.state)
    first = int(programs.state.learner.iteration)

    run = programs.facts | describe_run(args, mesh, model)
    if not resuming and jax.process_index() == 0:
        with or_fail(f"--runs-dir, --exp-name: {run_dir}"):
            run_dir = make_run_dir(run_dir)
    write_run(run_dir, run)
    if args.track and jax.process_index() == 0:
        start_tracking(run_dir, run["args"])

    steps = args.steps_per_iteration
    unused = args.total_timesteps % steps
    log = Log(args, run_dir, first)
    say(f"{args.num_iterations} iterations of {steps} steps, {unused} unused: {run_dir}")
    message = "the processes differ in their flags, or in the checkpoint that they found"
    with or_fail(message, kind=AssertionError):
        multihost_utils.sync_global_devices(f"{args} {first}")

    iteration, state = train_loop(args, run_dir, programs, log, stops)
    run["train_s"] = time.time() - log.start
    policy = export_policy(env, state.learner)
    if stops:
        log.writer.close()
        again = shlex.join(["python", sys.argv[0], "--resume", str(run_dir)])
        say(f"stopped after iteration {iteration}; to continue: {again}")
        raise SystemExit(128 + stops[0])
    on_signals(signal.SIG_DFL)

    if jax.process_index() == 0:
        say(f"trained for {run['train_s']:.1f} s; policy: {run_dir / 'policy.npz'}")
        run["evaluation"] = judge(args, env, policy)
        mean = run["evaluation"]["C MuJoCo"]["mean"]
        # One step after all others, so that a run that is resumed once more replaces it.
        log.scalars(iteration * steps + 1, {"eval/c_mujoco_return": mean})
        log.writer.close()
        write_run(run_dir, run)
        if args.capture_video:
            write_video(env, policy, evaluation_seed(args), run_dir / "videos" / "c_mujoco.mp4")
    return run_dir, policy


# shared: evaluate_run
def evaluate_run(args: Args, run_dir: Path) -> None:
    """Evaluate a saved policy, and film it if asked (--evaluate)."""
    env = Env(read_run(run_dir))
    with or_fail(f"--evaluate {run_dir}: no policy"):
        with np.load(run_dir / "policy.npz", allow_pickle=False) as file:
            policy = dict(file)
    with or_fail(f"--evaluate {run_dir}: its policy is not one of this script"):
        act(policy, initial_memory(), np.zeros(env.observation_size, np.float32))
    tell_changes(run_dir, load_model(env.task))
    judge(args, env, policy)
    if args.capture_video:
        write_video(env, policy, evaluation_seed(args), run_dir / "videos" / "c_mujoco.mp4")


# end shared


def smoke(args: Args) -> None:
    """A short run, the same run resumed from its middle, and a comparison of both ends."""
    versions = {importlib.metadata.version(name) for name in ("mujoco", "mujoco-mjx")}
    require(len(versions) == 1, f"--smoke: mujoco and mujoco-mjx differ: {versions}", 1)

    with tempfile.TemporaryDirectory() as folder:
        short = dataclasses.replace(
            args,
            num_envs=64,
            num_steps=8,
            num_minibatches=4,
            total_timesteps=2048,
            eval_episodes=2,
            eval_every=2,
            checkpoint_every=2,
            runs_dir=folder,
        )
        run_dir, policy = train(short)
        checkpoints(run_dir)[0].unlink()
        _, resumed = train(read_run(run_dir), run_dir)
    same = all(np.array_equal(resumed[name], policy[name]) for name in policy)  # not if NaN
    require(same, "--smoke: the resumed run ended with another policy, or with NaN", 1)
    say("all is well: the resumed run ended with the same policy, to the bit")


# shared: main
def main(argv: list[str]) -> None:
    """Do what the command line asks for."""
    # Parsed twice: the task decides what the other flags default to, and what --help shows of them.
    args = parse_args(argv, default_args(parse_args(without_help(argv)).env_id))
    if args.resume:
        args = resumed_args(args, argv)
    check_args(args)
    start_jax(args)

    if args.smoke:
        smoke(args)
        return
    if args.evaluate:
        evaluate_run(args, Path(args.evaluate))
        return
    run_dir = Path(args.resume) if args.resume else None
    if not args.coordinator_address:
        train(args, run_dir)
        return
    # Where one process fails, all end at once.
    message = "this or another process has failed; start all of them again, with --resume"
    with or_fail(message, 1):
        train(args, run_dir)


# end shared


if __name__ == "__main__":
    main(sys.argv[1:])
