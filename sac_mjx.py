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
"""SAC on Gymnasium's MuJoCo tasks, on MuJoCo XLA (MJX): one file, one compiled program.

    python sac_mjx.py --env-id HalfCheetah  train it; to watch: tensorboard --logdir runs
    python sac_mjx.py --resume runs/NAME    continue a run that was stopped, bit for bit
    python sac_mjx.py --evaluate runs/NAME  test its policy in MJX, in C MuJoCo and in Gymnasium
    python sac_mjx.py --smoke               check the installation on this machine

The algorithm comes first; the loop around it is train_loop in section 14.

    1 settings       4 statistics       7 acting and replay buffer
    2 tasks          5 networks         8 losses                    10 training iteration
    3 environment    6 training state   9 update

After these come 11 evaluation, 12 log and files, 13 command line, 14 main.

Shapes: T = num_steps, N = worlds on this device, C = rows of the replay buffer, U = updates of the
critics in one iteration, F = policy_frequency, B = transitions of one update on this device,
K = num_atoms, n = n_step, D = devices, O = observation size, S = the part of it that networks see,
A = action size, E = episodes. A record describes one world; its fields are [T, N, ...] in a
rollout, [C, N, ...] in the buffer and [B, ...] in a minibatch.

Names follow CleanRL's sac_continuous_action.py. What this file adds to it (distributional critics,
both critics' mean, normalised layers, weights, observations and rewards, the target entropy by a
standard deviation, returns of several steps) are flags. docs/sac_mjx.md names those that leave the
SAC of arXiv:1812.05905, and explains all metrics. The tasks are those of ppo_mjx.py, which has the same order and
names; blocks between "# shared: NAME" and "# end shared" are copies of its own.
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
Positive = Annotated[float, Range(1e-9, 1e9)]


@dataclasses.dataclass(frozen=True)
class Args:
    """SAC on Gymnasium's MuJoCo tasks, on MuJoCo XLA.

    The defaults are for one CPU core and few samples; `default_args` has those of a task.
    """

    # The run
    exp_name: str = "sac_mjx"
    """name of the experiment, part of the run folder's name"""
    seed: Index = 1
    """every random number follows from it and from the number of devices"""
    num_devices: MaybeCount = None
    """devices to split the worlds over; by default as many as divide num_envs and batch_size, or one
    on a CPU where both are below 256"""
    runs_dir: str = "runs"
    """folder for the run folders"""
    track: bool = False
    """log to Weights & Biases as well; WANDB_PROJECT names the project"""
    capture_video: bool = False
    """write an mp4 of the trained policy in C MuJoCo, after training or with --evaluate"""
    checkpoint_every: Cadence = 0.2
    """share of the training between checkpoints, buffer included; from 1 on, iterations"""
    compile_cache: bool = True
    """keep compiled programs in the user's cache folder, for a quicker start next time"""
    resume: str | None = None
    """run folder to continue with its own settings; a larger --total-timesteps makes it longer"""
    init_from: str | None = None
    """run folder whose networks and statistics a new run begins with, instead of random weights"""
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
    eval_every: NonNegative = 0.1
    """share of the training between evaluations in MJX; from 1 on, a number of iterations; 0: none"""
    eval_episodes: Annotated[int, Range(1, 1e4)] = 20
    """episodes of each evaluation"""

    # The algorithm, with CleanRL's names where it has them
    total_timesteps: Annotated[int, Range(1, 2**62)] = 300_000
    """environment steps, over all worlds; the default depends on the task, see SETTINGS"""
    num_envs: Count = 16
    """worlds, over all devices; few, so that the policy is updated after few samples"""
    num_steps: Count = 8
    """steps of each world in one iteration, before its updates"""
    updates_per_iteration: Count = 252
    """updates of the critics in one iteration; by num_envs * num_steps, the update-to-data ratio"""
    buffer_size: Count = 327_680
    """transitions in the replay buffer, over all worlds; the oldest are overwritten"""
    buffer_device: Literal["device", "host"] = "device"
    """host: in the machine's memory, for a buffer that the device cannot hold"""
    batch_size: Count = 64
    """transitions in one update, over all devices"""
    learning_starts: Index = 5_000
    """environment steps before the first update; actions are random, unless --init-from is given"""
    policy_lr: NonNegative = 3e-4
    """Adam's step size for the actor, at the start"""
    q_lr: NonNegative = 3e-4
    """Adam's step size for the critics and for the temperature, at the start"""
    final_lr: Fraction = 0.05
    """share of the step sizes that is left at the end; they fall linearly, and with 1 not at all"""
    gamma: Fraction = 0.99
    """discount factor"""
    tau: Fraction = 0.01
    """share of the critics that goes into their targets at each update"""
    n_step: Annotated[int, Range(1, 1e3)] = 1
    """rewards that a target counts before it asks the critics, within one episode"""
    policy_frequency: Annotated[int, Range(1, 1e3)] = 3
    """updates of the critics before each one of the actor and the temperature"""
    twin: Literal["min", "mean"] = "min"
    """how the two critics are combined: min, the lower estimate; mean, their average"""
    distributional: bool = True
    """critics tell a distribution of returns, learnt by cross-entropy; else the mean, by squares"""
    num_atoms: Annotated[int, Range(2, 1e4)] = 51
    """evenly spaced returns, from -v_max to v_max, whose probabilities distributional critics give"""
    v_max: Positive = 5.0
    """largest return of distributional critics; norm_reward keeps the largest one so far within it"""
    autotune: bool = True
    """tune the temperature towards the policy's target entropy"""
    alpha: Positive = 0.01
    """the temperature, the weight of the entropy, at the start; for good with --no-autotune"""
    target_std: Annotated[float | None, Range(1e-3, 1e3)] = 0.15
    """target entropy: of normal actions with this standard deviation; None: -1 nat per dimension"""
    see_all: bool = False
    """show the networks all of the observation, the contact wrenches of Ant and the humanoids too"""
    norm_obs: bool = True
    """normalise observations by running mean and variance; they are clipped to 10 in any case"""
    norm_reward: bool = True
    """scale rewards so that discounted returns have a deviation up to 1 and stay within v_max"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """widths of the ReLU layers, in the actor and in each critic"""
    layer_norm: Literal["none", "layer", "rms"] = "rms"
    """what normalises a layer before its ReLU: nothing, mean and deviation, or root mean square"""
    batch_norm: bool = False
    """normalise the critics' layers by a minibatch's mean and deviation, over both ends of its steps"""
    weight_norm: bool = True
    """after each update, scale the weights of each unit of a hidden layer to norm 1"""

    @property
    def steps_per_iteration(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.steps_per_iteration

    def cadence(self, every: float) -> int:
        """Iterations between two events: `every` itself from 1 on, else that share of the training."""
        return max(1, round(every if every >= 1 else every * self.num_iterations))

    @property
    def random_steps(self) -> int:
        """Steps of each world with random actions, before the first update."""
        return math.ceil(self.learning_starts / self.num_envs)

    @property
    def buffer_rows(self) -> int:
        """Steps of all worlds that the buffer holds."""
        return self.buffer_size // self.num_envs

    def target_entropy(self, action_size: int) -> float:
        """What the temperature keeps the policy's entropy at, in nats.

        Source: arXiv:1812.05905, appendix D; by a standard deviation: FlashSAC, arXiv:2604.04539.
        """
        if self.target_std is None:
            return -float(action_size)
        return action_size * (math.log(self.target_std) + 0.5 * math.log(2 * math.pi * math.e))


# Defaults of flags that depend on the task.
SETTINGS = {
    # HalfCheetah learns faster so; in trials Ant, Walker2d and Hopper did not.
    "HalfCheetah": {"twin": "mean", "policy_lr": 1e-3, "q_lr": 1e-3},
    "InvertedPendulum": {"total_timesteps": 50_000},
    "InvertedDoublePendulum": {"total_timesteps": 100_000},
    "Reacher": {"total_timesteps": 100_000},
    "Pusher": {"total_timesteps": 100_000},
}


def default_args(env_id: str) -> Args:
    """The settings of a task, where no flags change them."""
    return Args(env_id=env_id, **SETTINGS.get(env_id, {}))


# ---- 2. Tasks (SI units and radians; a test holds each equal to Gymnasium's v5) ------------------
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


LAYER_EPS = 1e-6  # keeps layers of zeros finite
# Standard deviation of the first layer's biases at the start, where layers are normalised. With
# biases of 0 the length of the input would cancel: a network would see its direction alone.
FIRST_BIAS = 0.6


def normalize_layer(norm: str, x: jax.Array) -> jax.Array:
    """A layer's outputs [..., width] before their ReLU, of one size whatever the weights.

    norm: "rms" divides by the root mean square, "layer" subtracts the mean before, "none" is x.
    Unlike Flax's layers these have no weights of their own: the next layer's suffice.
    Source: arXiv:1607.06450; arXiv:1910.07467.
    """
    if norm == "none":
        return x
    if norm == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True) + LAYER_EPS)


class MLP(nn.Module):
    """ReLU layers with orthogonal weights: [..., in] -> [..., out].

    The layers' names tell what normalises them, as rms_0 does, so that parameters cannot be loaded
    into a network of another kind. With the norm "batch", x is [B, in] in training (`train`), where
    it is normalised, too; the running mean and variance of the batches are in "batch_stats".
    """

    hidden_sizes: tuple[int, ...]
    out: int
    norm: str  # see normalize_layer, or batch

    @nn.compact
    def __call__(self, x, train: bool = False):
        # Its shift is the bias that the layer before it would lose with the mean. A scale would do
        # nothing that the next layer's weights cannot.
        batch_norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            use_scale=False,
            use_fast_variance=False,
        )
        is_batch = self.norm == "batch"
        if is_batch:
            x = batch_norm(use_bias=False)(x)
        for i, width in enumerate(self.hidden_sizes):
            cancels = i == 0 and self.norm in ("layer", "rms")
            layer = dense(
                width,
                kernel_init=nn.initializers.orthogonal(math.sqrt(2)),
                bias_init=nn.initializers.normal(FIRST_BIAS if cancels else 0.0),
                use_bias=not is_batch,
                name=f"{self.norm}_{i}",
            )
            x = layer(x)
            x = nn.relu(batch_norm()(x) if is_batch else normalize_layer(self.norm, x))
        # Small at the start: no action is preferred, and all critics say 0.
        small = nn.initializers.orthogonal(0.01)
        return dense(self.out, kernel_init=small, name="out")(x)


def make_networks(args: Args, env: Env) -> tuple[MLP, MLP]:
    """The actor, and one critic: observation and action -> logits of the atoms, or the value."""
    actor = MLP(args.hidden_sizes, 2 * env.action_size, args.layer_norm)  # means, raw log stds
    norm = "batch" if args.batch_norm else args.layer_norm
    critic = MLP(args.hidden_sizes, args.num_atoms if args.distributional else 1, norm)
    return actor, critic


def normalize_weights(params: dict) -> dict:
    """Networks whose hidden layers' weights have the norm 1, for each unit.

    Adam's steps would otherwise lengthen the weights, and so weigh less and less beside them. With
    layers that are normalised as a whole this changes what a layer computes, too, if its units'
    weights have grown by different factors. Unlike in the sources, biases and last layers are free.
    Source: SimbaV2, arXiv:2502.15280; FlashSAC, arXiv:2604.04539.
    """

    def to_norm_1(path, x: jax.Array) -> jax.Array:
        layer, kind = (entry.key for entry in path[-2:])
        if kind != "kernel" or layer == "out":  # "kernel" is Flax's name for weights
            return x
        return x / jnp.linalg.norm(x, axis=0, keepdims=True)

    return jax.tree.map_with_path(to_norm_1, params)


@struct.dataclass
class TanhGaussian:
    """A normal distribution with independent components, squashed into (-1, 1) by tanh."""

    mean: jax.Array  # [..., A], before squashing; tanh of it is the median
    log_std: jax.Array  # [..., A], before squashing

    def sample(self, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Actions [..., A] and their log densities [...].

        noise: [..., A], standard normal; it is an argument, so that the action is differentiable
        in mean and log_std (the reparametrisation trick).
        Source: arXiv:1812.05905, appendix C.
        """
        u = self.mean + jnp.exp(self.log_std) * noise
        # log(1 - tanh(u)^2), in a form that is finite for any u.
        log_slope = 2 * (math.log(2) - u - nn.softplus(-2 * u))
        log_normal = -0.5 * jnp.square(noise) - self.log_std - 0.5 * math.log(2 * math.pi)
        return jnp.tanh(u), (log_normal - log_slope).sum(axis=-1)


# shared: memory
def initial_memory(batch: tuple[int, ...] = ()) -> tuple:
    """What the policy remembers when an episode begins: a tree of arrays [*batch, ...].

    This one remembers nothing, so that nothing is carried, saved or compiled.
    """
    return ()


# end shared


def apply_policy(
    args: Args, env: Env, params: dict, memory: tuple, obs: jax.Array
) -> tuple[tuple, TanhGaussian]:
    """The policy: its memory and normalised observations [..., O] -> next memory, distribution.

    params: the actor's. A recurrent network would keep its state in `memory`, which the rollout and
    both evaluations carry along; but the losses learn from single transitions, which have no past.
    """
    actor, _ = make_networks(args, env)
    mean, raw = jnp.split(actor.apply(params, obs), 2, axis=-1)
    log_std = -5.0 + 3.5 * (jnp.tanh(raw) + 1.0)  # from -5 to 2, as in CleanRL
    return memory, TanhGaussian(mean=mean, log_std=log_std)


def apply_critics(
    args: Args, env: Env, params: dict, stats: dict, obs: jax.Array, action: jax.Array
) -> jax.Array:
    """What both critics say of normalised observations [..., O] and actions [..., A].

    params: "qf1" and "qf2"; stats: their "batch_stats", if they have any. Returns logits
    [2, ..., K], or without --distributional, the values [2, ..., 1].
    """
    _, critic = make_networks(args, env)
    x = jnp.concatenate([obs, action], axis=-1)
    return jnp.stack([critic.apply(params[name] | stats[name], x) for name in ("qf1", "qf2")])


def atoms(args: Args) -> jax.Array:
    """The returns that a distributional critic tells the probabilities of: [K], scaled."""
    return jnp.linspace(-args.v_max, args.v_max, args.num_atoms)


def critic_values(args: Args, output: jax.Array) -> jax.Array:
    """The mean returns in what critics say: [..., K] or [..., 1] -> [...], scaled."""
    if args.distributional:
        return (nn.softmax(output) * atoms(args)).sum(axis=-1)  # exact, where @ may be coarse
    return output[..., 0]


# ---- 6. Training state ---------------------------------------------------------------------------
@struct.dataclass
class Learner:
    """What is learnt; the same on every device."""

    params: dict  # Flax parameters "actor" and "critics" ("qf1", "qf2"); "log_alpha": []
    targets: dict  # the target critics' parameters, which follow the critics' slowly
    opt_state: dict[str, optax.OptState]  # by the names of params
    obs_stats: RunningStats  # [O]
    return_stats: RunningStats  # [], of the discounted return
    largest_return: jax.Array  # [], the largest absolute discounted return so far
    critic_stats: dict  # of "qf1" and "qf2": the "batch_stats" of --batch-norm, else nothing
    key: jax.Array  # of the minibatches, and of the noise in the losses
    steps: jax.Array  # int32, steps that each world has done
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
class Experience:
    """One step of one world, as the replay buffer keeps it."""

    obs: jax.Array  # [O], raw: it is normalised when it is drawn, by the statistics of that time
    action: jax.Array  # [A] in (-1, 1)
    reward: jax.Array  # [], not scaled
    next_obs: jax.Array  # [O], raw, where the step ended, before any reset
    terminated: jax.Array  # bool; the time limit does not terminate
    done: jax.Array  # bool: terminated, or at the time limit
    valid: jax.Array  # bool; False where the world broke: nothing is learnt from it


@struct.dataclass
class TrainState:
    """All that a run's future depends on; a checkpoint holds this and the settings."""

    learner: Learner
    worlds: Worlds
    # [C, N, ...], a ring: step t of all worlds is in row t % C. In the device's memory, or as NumPy's
    # arrays in the host's.
    buffer: Experience


# What --init-from takes from another run's learner.
INHERITED = ("params", "targets", "critic_stats", "obs_stats", "return_stats", "largest_return")

# How the state lies on the devices: a prefix of its tree, each entry for all arrays below it.
STATE_SPEC = TrainState(learner=P(), worlds=P("devices"), buffer=P(None, "devices"))


def make_optimizer() -> optax.GradientTransformation:
    """Adam's direction; `descend` has the step size. Gradients that are not finite are skipped."""
    return optax.apply_if_finite(optax.scale_by_adam(), max_consecutive_errors=2**31 - 1)


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


def init_buffer(args: Args, env: Env, xp=jnp) -> Experience:
    """An empty replay buffer. xp: jnp for the device's memory, np for the host's."""
    shape = (args.buffer_rows, args.num_envs)
    return Experience(
        obs=xp.zeros((*shape, env.observation_size), xp.float32),
        action=xp.zeros((*shape, env.action_size), xp.float32),
        reward=xp.zeros(shape, xp.float32),
        next_obs=xp.zeros((*shape, env.observation_size), xp.float32),
        terminated=xp.zeros(shape, bool),
        done=xp.zeros(shape, bool),
        valid=xp.zeros(shape, bool),
    )


def init_train_state(args: Args, env: Env, key: jax.Array) -> TrainState:
    """The state before the first iteration, without a buffer if that is the host's."""
    keys = jax.random.split(key, 7)
    actor_key, qf1_key, qf2_key, learner_key, reset_key, clock_key, world_key = keys

    actor, critic = make_networks(args, env)
    seen = jnp.zeros(len(env.seen))
    both = jnp.zeros(len(env.seen) + env.action_size)
    critics = {"qf1": critic.init(qf1_key, both), "qf2": critic.init(qf2_key, both)}
    critic_stats = {
        name: {"batch_stats": critics[name].pop("batch_stats")} if args.batch_norm else {}
        for name in critics
    }
    networks = {"actor": actor.init(actor_key, seen), "critics": critics}
    if args.weight_norm:
        networks = normalize_weights(networks)
    params = networks | {"log_alpha": jnp.float32(math.log(args.alpha))}
    zero = jnp.zeros((), jnp.int32)
    learner = Learner(
        params=params,
        targets=params["critics"],
        opt_state={name: make_optimizer().init(part) for name, part in params.items()},
        obs_stats=start_stats((env.observation_size,)),
        return_stats=start_stats(()),
        largest_return=jnp.zeros(()),
        critic_stats=critic_stats,
        key=learner_key,
        steps=zero,
        iteration=zero,
    )

    n = args.num_envs
    env_state = jax.vmap(kernel(env.reset))(jax.random.split(reset_key, n))
    # Unlike CleanRL: the worlds' clocks start at random, so that their time limits do not come all
    # at once.
    env_state.info["elapsed"] = jax.random.randint(clock_key, (n,), 0, env.time_limit)
    worlds = start_worlds(env_state, jax.random.split(world_key, n), jnp.zeros(n, jnp.int32))
    buffer = init_buffer(args, env) if args.buffer_device == "device" else None
    return TrainState(learner=learner, worlds=worlds, buffer=buffer)


# ---- 7. Acting and replay buffer -----------------------------------------------------------------
@struct.dataclass
class Transition:
    """One step of one world; `end` and the flags are the outcome of `action`."""

    action: jax.Array  # [A] in (-1, 1)
    start: State  # where the step began
    end: Worlds  # where it ended, before any reset: reward, observation, episode's return, ...
    terminated: jax.Array  # bool
    done: jax.Array  # bool: terminated, or at the time limit
    valid: jax.Array  # bool: False for steps that broke the world, from which nothing is learnt
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
    """num_steps steps of all worlds, with a fresh reset after each episode.

    Actions are uniform in the first steps, `random_steps` of each world, and then the policy's. A
    policy that was taken from another run acts from the start.
    Returns the worlds [N, ...] and transitions [T, N, ...].
    """

    def step(worlds: Worlds, number: jax.Array):
        key, action_key, reset_key = split_keys(worlds.key, 3)
        start = worlds.env_state

        obs = see(env, learner.obs_stats, start.obs)
        memory, policy = apply_policy(args, env, learner.params["actor"], worlds.memory, obs)
        noise = jax.vmap(partial(jax.random.normal, shape=(env.action_size,)))(action_key)
        action, _ = policy.sample(noise)
        # From -1 to 1: the same noise made uniform, so that no other key is needed.
        uniform = 2 * jax.scipy.stats.norm.cdf(noise) - 1
        if not args.init_from:
            action = jnp.where(number < args.random_steps, uniform, action)
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
            action=action,
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

    return jax.lax.scan(step, worlds, learner.steps + jnp.arange(args.num_steps))


def to_experience(steps: Transition) -> Experience:
    """What the buffer keeps of a rollout [T, N, ...]."""
    return Experience(
        obs=steps.start.obs,
        action=steps.action,
        reward=steps.end.env_state.reward,
        next_obs=steps.end.env_state.obs,
        terminated=steps.terminated,
        done=steps.done,
        valid=steps.valid,
    )


def insert(args: Args, buffer: Experience, first: jax.Array, new: Experience) -> Experience:
    """The buffer [C, N, ...] with a rollout [T, N, ...] in it, in the place of its oldest rows.

    first: the number of the rollout's first step, from 0. NumPy's arrays change in place.
    """
    rows = (first + np.arange(args.num_steps)) % args.buffer_rows
    if isinstance(buffer.reward, jax.Array):
        return jax.tree.map(lambda ring, x: ring.at[rows].set(x), buffer, new)
    for ring, x in zip(jax.tree.leaves(buffer), jax.tree.leaves(new), strict=True):
        ring[rows] = x
    return buffer


def n_step_return(
    args: Args,
    reward: jax.Array,
    terminated: jax.Array,
    done: jax.Array,
    valid: jax.Array,
    xp=jnp,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum up the rewards of the next n steps, or of fewer where an episode ends before.

    All arguments are [n, ...], the steps that follow one another in a world. valid: False for a step
    that broke its world, or that is not in the buffer yet. The sum ends after a step that is done,
    and before one that is not valid. If the first one is not valid, the results mean nothing.
    xp: np for NumPy's arrays.

    Returns the sum of discounted rewards, the discount of the value of where the last counted step
    ended, and the number of that step, from 0: each [...]. The discount is 0 after a termination,
    and otherwise gamma to the number of rewards in the sum, also after a time limit and before an
    invalid step.
    Source: arXiv:1710.02298, multi-step learning. The entropies on the way are left out.
    """
    alive = xp.cumprod(xp.concatenate([xp.ones_like(done[:1]), ~done[:-1]]), axis=0)
    counted = xp.cumprod(valid, axis=0) * alive > 0  # [n, ...]
    powers = args.gamma ** xp.arange(len(reward) + 1, dtype=xp.float32)
    weight = powers[:-1].reshape(-1, *[1] * (reward.ndim - 1))
    total = (weight * xp.where(counted, reward, 0.0)).sum(axis=0)

    length = counted.sum(axis=0)
    goes_on = ~(counted & terminated).any(axis=0)
    return total, goes_on * powers[length], xp.maximum(length - 1, 0)


@struct.dataclass
class Places:
    """Where in the buffer transitions lie, each with the n - 1 steps that follow it in its world."""

    rows: jax.Array  # int32 [n, ...]
    written: jax.Array  # bool [n, ...]: False for steps that are not in the buffer yet
    world: jax.Array  # int32 [...]


@struct.dataclass
class Sample:
    """A transition over up to n steps, as it comes out of the buffer: raw and not scaled."""

    obs: jax.Array  # [O]
    action: jax.Array  # [A] in (-1, 1)
    reward: jax.Array  # [], discounted rewards of up to n steps
    discount: jax.Array  # [], of the value of next_obs; 0 after a termination
    next_obs: jax.Array  # [O], where the last of these steps ended
    valid: jax.Array  # bool: False for transitions to leave out of the losses


@struct.dataclass
class Batch:
    """What the losses need of each transition. The noises are standard normal, for `sample`."""

    obs: jax.Array  # [S], normalised
    action: jax.Array  # [A] in (-1, 1)
    reward: jax.Array  # [], scaled
    discount: jax.Array  # []
    next_obs: jax.Array  # [S], normalised
    valid: jax.Array  # bool
    noise: jax.Array  # [A], of the policy's action at obs
    next_noise: jax.Array  # [A], of its action at next_obs


def minibatch_keys(learner: Learner) -> tuple[jax.Array, ...]:
    """This device's keys of an iteration's minibatches: for their rows, worlds and noise."""
    key = jax.random.fold_in(learner.key, learner.iteration)
    key = jax.random.fold_in(key, jax.lax.axis_index("devices"))
    return tuple(jax.random.split(key, 3))


def draw(args: Args, learner: Learner, num_worlds: int) -> Places:
    """The minibatches [U, B] of an iteration, in one device's part of the buffer.

    Uniform over all that is in it, with replacement. Drawn and gathered all at once, they take a few
    large operations in place of many small ones.
    """
    age_key, world_key, _ = minibatch_keys(learner)
    shape = (args.updates_per_iteration, args.batch_size // jax.lax.axis_size("devices"))
    filled = jnp.minimum(learner.steps, args.buffer_rows)
    age = jax.random.randint(age_key, shape, 0, filled)  # 0: the newest step
    ahead = jnp.arange(args.n_step)[:, None, None]
    return Places(
        rows=(learner.steps - 1 - age + ahead) % args.buffer_rows,
        written=ahead <= age,
        world=jax.random.randint(world_key, shape, 0, num_worlds),
    )


def gather(args: Args, buffer: Experience, places: Places) -> Sample:
    """The transitions [...] at these places of the buffer [C, N, ...], JAX's or NumPy's."""
    xp = jnp if isinstance(buffer.reward, jax.Array) else np
    rows = places.rows
    world = places.world
    reward, discount, last = n_step_return(
        args,
        buffer.reward[rows, world],
        buffer.terminated[rows, world],
        buffer.done[rows, world],
        buffer.valid[rows, world] & places.written,
        xp,
    )
    return Sample(
        obs=buffer.obs[rows[0], world],
        action=buffer.action[rows[0], world],
        reward=reward,
        discount=discount,
        next_obs=buffer.next_obs[(rows[0] + last) % args.buffer_rows, world],
        valid=buffer.valid[rows[0], world],
    )


def reward_scale(args: Args, learner: Learner) -> jax.Array:
    """What rewards are divided by: [], in their own unit.

    Returns get a standard deviation of 1, or less where the largest one would exceed v_max.
    Source: arXiv:2502.15280 and arXiv:2604.04539.
    """
    if not args.norm_reward:
        return jnp.ones(())
    deviation = jnp.sqrt(learner.return_stats.var + 1e-8)
    return jnp.maximum(deviation, learner.largest_return / args.v_max)


def make_batch(args: Args, env: Env, learner: Learner, sample: Sample) -> Batch:
    """What to learn from, of the sample [U, B, ...], by today's statistics."""
    *_, noise_key = minibatch_keys(learner)
    noise = jax.random.normal(noise_key, (2, *sample.action.shape))
    return Batch(
        obs=see(env, learner.obs_stats, sample.obs),
        action=sample.action,
        reward=sample.reward / reward_scale(args, learner),
        discount=sample.discount,
        next_obs=see(env, learner.obs_stats, sample.next_obs),
        valid=sample.valid,
        noise=noise[0],
        next_noise=noise[1],
    )


# ---- 8. Losses -----------------------------------------------------------------------------------
def masked_mean(x: jax.Array, valid: jax.Array) -> jax.Array:
    """The mean of the valid samples: two arrays [...] -> []. It is 0 where none is valid."""
    return jnp.where(valid, x, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def project_distribution(args: Args, probability: jax.Array, place: jax.Array) -> jax.Array:
    """Project a distribution on other places back onto the atoms.

    probability, place: [B, K]; places are scaled returns, as the atoms are. Each probability goes to
    the two atoms beside its place, the more to the nearer one; beyond the last atom, all goes to
    that one. So the mean stays, unless places lie outside. Returns [B, K].
    Source: arXiv:1707.06887, equation 7.
    """
    width = 2 * args.v_max / (args.num_atoms - 1)
    place = jnp.clip(place, -args.v_max, args.v_max)

    # Place by place: on a CPU that takes a sixth of the time of a product over all pairs, and
    # unlike a scatter it adds up in the same order on a GPU.
    def add(i, total):
        distance = jnp.abs(place[:, i, None] - atoms(args)) / width
        return total + probability[:, i, None] * jnp.maximum(1.0 - distance, 0.0)

    return jax.lax.fori_loop(0, args.num_atoms, add, jnp.zeros_like(probability))


def temperature(args: Args, learner: Learner) -> jax.Array:
    """The weight of the entropy: [], in the unit of scaled rewards."""
    return jnp.exp(learner.params["log_alpha"]) if args.autotune else jnp.float32(args.alpha)


def apply_at_both_ends(
    args: Args, env: Env, params: dict, stats: dict, mb: Batch, next_action: jax.Array
) -> tuple[jax.Array, jax.Array, dict]:
    """What both critics say of where a minibatch's steps began, and of where they ended.

    next_action: [B, A], at the end. Returns two outputs [2, B, K] and the critics' next statistics.
    A caller needs one of them; without --batch-norm, XLA leaves out the other one's pass. With it
    both ends are one batch: apart, their means would differ, and a critic would
    be asked about inputs of another distribution than it is trained on.
    Source: CrossQ, arXiv:1902.05605.
    """
    if not args.batch_norm:
        begin = apply_critics(args, env, params, stats, mb.obs, mb.action)
        end = apply_critics(args, env, params, stats, mb.next_obs, next_action)
        return begin, end, stats
    _, critic = make_networks(args, env)
    obs = jnp.concatenate([mb.obs, mb.next_obs])
    x = jnp.concatenate([obs, jnp.concatenate([mb.action, next_action])], axis=-1)
    both = {
        name: critic.apply(params[name] | stats[name], x, train=True, mutable="batch_stats")
        for name in ("qf1", "qf2")
    }
    outputs = jnp.stack([both[name][0] for name in ("qf1", "qf2")])
    begin, end = jnp.split(outputs, 2, axis=1)
    return begin, end, {name: next_stats for name, (_, next_stats) in both.items()}


def draw_next_actions(
    args: Args, env: Env, learner: Learner, mb: Batch
) -> tuple[jax.Array, jax.Array]:
    """The policy's actions where a minibatch's steps ended: [B, A], and their entropy's bonus: [B]."""
    memory = initial_memory(mb.obs.shape[:-1])  # single steps have no past
    _, policy = apply_policy(args, env, learner.params["actor"], memory, mb.next_obs)
    next_action, logprob = policy.sample(mb.next_noise)
    return next_action, -temperature(args, learner) * logprob


def critic_target(
    args: Args,
    env: Env,
    learner: Learner,
    mb: Batch,
    next_action: jax.Array,
    entropy_bonus: jax.Array,
) -> jax.Array:
    """What both critics should say of a minibatch.

    next_action: [B, A]; entropy_bonus: [B]. The next state is judged by that target critic which
    says less, or by both with --twin mean. Returns probabilities [B, K], or values [B], scaled.
    Source: arXiv:1812.05905, equation 6, with two critics; as distributions: arXiv:1707.06887.
    """
    targets, stats = learner.targets, learner.critic_stats
    _, output, _ = apply_at_both_ends(args, env, targets, stats, mb, next_action)
    value = critic_values(args, output)  # [2, B]
    if not args.distributional:
        next_value = value.min(axis=0) if args.twin == "min" else value.mean(axis=0)
        return mb.reward + mb.discount * (next_value + entropy_bonus)

    probability = nn.softmax(output)  # [2, B, K]
    if args.twin == "min":
        first_is_less = value[0] < value[1]
        probability = jnp.where(first_is_less[:, None], probability[0], probability[1])
    else:
        probability = probability.mean(axis=0)
    next_return = atoms(args) + entropy_bonus[:, None]  # [B, K]
    place = mb.reward[:, None] + mb.discount[:, None] * next_return
    return project_distribution(args, probability, place)


def critic_loss(
    args: Args,
    env: Env,
    params: dict,
    stats: dict,
    mb: Batch,
    next_action: jax.Array,
    target: jax.Array,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], dict]]:
    """The sum of both critics' losses on a minibatch; its metrics by tag, and their next statistics.

    next_action: [B, A], which --batch-norm alone needs; target: what `critic_target` returns. The
    loss of a critic is the mean cross-entropy, or without --distributional the mean squared error.
    Source: arXiv:1812.05905, equation 5; arXiv:1707.06887, algorithm 1.
    """
    output, _, stats = apply_at_both_ends(args, env, params, stats, mb, next_action)
    value = critic_values(args, output)
    if args.distributional:
        error = -(target * nn.log_softmax(output)).sum(axis=-1)
    else:
        error = jnp.square(value - target)

    q1_loss = masked_mean(error[0], mb.valid)
    q2_loss = masked_mean(error[1], mb.valid)
    metrics = {
        "losses/qf1_values": masked_mean(value[0], mb.valid),
        "losses/qf2_values": masked_mean(value[1], mb.valid),
        "losses/qf1_loss": q1_loss,
        "losses/qf2_loss": q2_loss,
        "losses/qf_loss": (q1_loss + q2_loss) / 2,
    }
    return q1_loss + q2_loss, (metrics, stats)


def actor_loss(
    args: Args, env: Env, params: dict, learner: Learner, mb: Batch
) -> tuple[jax.Array, jax.Array]:
    """The actor's loss on a minibatch, and the mean log density of its actions.

    params: the actor's.
    Source: arXiv:1812.05905, equation 7, with two critics.
    """
    memory = initial_memory(mb.obs.shape[:-1])  # single steps have no past
    _, policy = apply_policy(args, env, params, memory, mb.obs)
    action, logprob = policy.sample(mb.noise)

    critics, stats = learner.params["critics"], learner.critic_stats
    output = apply_critics(args, env, critics, stats, mb.obs, action)
    value = critic_values(args, output)  # [2, B]
    value = value.min(axis=0) if args.twin == "min" else value.mean(axis=0)
    loss = masked_mean(temperature(args, learner) * logprob - value, mb.valid)
    return loss, masked_mean(logprob, mb.valid)


def alpha_loss(args: Args, env: Env, log_alpha: jax.Array, logprob: jax.Array) -> jax.Array:
    """The temperature's loss, for a mean log density of actions: [] -> [].

    The temperature falls while the entropy, -logprob, exceeds its target.
    Source: arXiv:1812.05905, equation 18.
    """
    return -jnp.exp(log_alpha) * (logprob + args.target_entropy(env.action_size))


# ---- 9. Update -----------------------------------------------------------------------------------
def mean_over_devices(tree):
    """The mean of the devices' trees. As one vector it takes one exchange, not one a leaf."""
    if jax.lax.axis_size("devices") == 1:
        return tree
    vector, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(vector, "devices"))


def learning_rates(args: Args, learner: Learner) -> dict[str, jax.Array]:
    """Adam's step sizes in this iteration, by the names of `Learner.params`."""
    num_iterations = float(args.num_iterations)  # as an int it may not fit int32
    share = 1 - (1 - args.final_lr) * learner.iteration / num_iterations
    return {
        "actor": args.policy_lr * share,
        "critics": args.q_lr * share,
        "log_alpha": args.q_lr * share,
    }


def descend(args: Args, learner: Learner, name: str, gradient) -> Learner:
    """The learner after one step of Adam.

    name: of the part of `Learner.params` to change; gradient: of that part, over all devices.
    """
    direction, opt_state = make_optimizer().update(gradient, learner.opt_state[name])
    rate = learning_rates(args, learner)[name]
    part = jax.tree.map(lambda x, step: x - rate * step, learner.params[name], direction)
    if args.weight_norm and name != "log_alpha":
        part = normalize_weights(part)
    return learner.replace(
        params=learner.params | {name: part},
        opt_state=learner.opt_state | {name: opt_state},
    )


def skipped_in_a_row(learner: Learner) -> jax.Array:
    """Gradients that were not finite, up to the last one: [], of the part that has most."""
    counts = [opt_state.notfinite_count for opt_state in learner.opt_state.values()]
    return jnp.stack(counts).max().astype(float)  # a float, so that it can be NaN without updates


def update_critics(
    args: Args, env: Env, learner: Learner, mb: Batch
) -> tuple[Learner, dict[str, jax.Array]]:
    """One step of Adam for both critics, and a step of their targets."""
    next_action, entropy_bonus = draw_next_actions(args, env, learner, mb)
    target = critic_target(args, env, learner, mb, next_action, entropy_bonus)
    critics, stats = learner.params["critics"], learner.critic_stats
    gradient, (metrics, stats) = mean_over_devices(
        jax.grad(critic_loss, argnums=2, has_aux=True)(
            args, env, critics, stats, mb, next_action, target
        )
    )
    learner = descend(args, learner, "critics", gradient)
    # What made the gradient of a minibatch NaN has made its statistics so.
    finite = learner.opt_state["critics"].last_finite
    stats = jax.tree.map(partial(jnp.where, finite), stats, learner.critic_stats)
    metrics |= {"charts/skipped_in_a_row": skipped_in_a_row(learner)}
    targets = optax.incremental_update(learner.params["critics"], learner.targets, args.tau)
    return learner.replace(targets=targets, critic_stats=stats), metrics


def update_actor(
    args: Args, env: Env, learner: Learner, mb: Batch
) -> tuple[Learner, dict[str, jax.Array]]:
    """One step of Adam for the actor and, with --autotune, for the temperature."""
    (loss, logprob), gradient = jax.value_and_grad(actor_loss, argnums=2, has_aux=True)(
        args, env, learner.params["actor"], learner, mb
    )
    gradient, loss, logprob = mean_over_devices((gradient, loss, logprob))
    log_alpha = learner.params["log_alpha"]
    metrics = {
        "losses/actor_loss": loss,
        "losses/alpha": temperature(args, learner),
        "losses/entropy": -logprob,
    }
    learner = descend(args, learner, "actor", gradient)
    if not args.autotune:
        return learner, metrics

    # CleanRL draws new actions for this. Those of the actor's loss save a pass; they are from before
    # the actor's step.
    loss, gradient = jax.value_and_grad(alpha_loss, argnums=2)(args, env, log_alpha, logprob)
    return descend(args, learner, "log_alpha", gradient), metrics | {"losses/alpha_loss": loss}


def update(
    args: Args, env: Env, learner: Learner, mbs: Batch
) -> tuple[Learner, dict[str, jax.Array]]:
    """An update of the critics by each of the minibatches [F, B, ...], and one of the actor.

    The actor and the temperature learn from the last minibatch. Returns the learner, and metrics by
    tag; those of the critics are means.
    """
    learner, critic_metrics = jax.lax.scan(partial(update_critics, args, env), learner, mbs)
    last = jax.tree.map(lambda x: x[-1], mbs)
    learner, actor_metrics = update_actor(args, env, learner, last)

    in_a_row = critic_metrics.pop("charts/skipped_in_a_row").max()
    metrics = jax.tree.map(jnp.nanmean, critic_metrics) | actor_metrics
    in_a_row = jnp.maximum(in_a_row, skipped_in_a_row(learner))
    return learner, metrics | {"charts/skipped_in_a_row": in_a_row}


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


def update_statistics(args: Args, learner: Learner, steps: Transition) -> Learner:
    """The learner with a rollout [T, N, ...] in its statistics of observations and returns."""
    if args.norm_obs:
        obs_stats = update_stats(learner.obs_stats, steps.start.obs, steps.valid)
        learner = learner.replace(obs_stats=obs_stats)
    if not args.norm_reward:
        return learner

    discounted_return = steps.end.discounted_return
    largest = jnp.where(steps.valid, jnp.abs(discounted_return), 0.0).max()
    largest = jnp.maximum(jax.lax.pmax(largest, "devices"), learner.largest_return)
    return_stats = update_stats(learner.return_stats, discounted_return, steps.valid)
    return learner.replace(return_stats=return_stats, largest_return=largest)


def learn(
    args: Args, env: Env, learner: Learner, sample: Sample
) -> tuple[Learner, dict[str, jax.Array]]:
    """All updates of an iteration [U, B, ...], once each world has done its first `random_steps`.

    The U minibatches are U / F groups; `update` learns from one group. Returns the learner, and
    metrics by tag: those of the losses are means over the updates, or NaN where there were none.
    """

    def run_updates(learner: Learner, sample: Sample):
        groups = jax.tree.map(
            lambda x: x.reshape(-1, args.policy_frequency, *x.shape[1:]),
            make_batch(args, env, learner, sample),
        )
        return jax.lax.scan(partial(update, args, env), learner, groups)

    def skip(learner: Learner, sample: Sample):
        _, metrics = jax.eval_shape(run_updates, learner, sample)
        nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), metrics)
        return learner, nothing

    starts = learner.steps >= args.random_steps
    learner, metrics = jax.lax.cond(starts, run_updates, skip, learner, sample)
    in_a_row = metrics["charts/skipped_in_a_row"].max()
    metrics = {tag: jnp.nanmean(values) for tag, values in metrics.items()}
    rates = learning_rates(args, learner)
    metrics |= {
        "charts/skipped_in_a_row": in_a_row,
        "charts/skipped_updates": sum(
            opt_state.total_notfinite for opt_state in learner.opt_state.values()
        ),
        "charts/policy_lr": rates["actor"],
        "charts/q_lr": rates["critics"],
        "charts/reward_scale": reward_scale(args, learner),
    }
    return learner.replace(iteration=learner.iteration + 1), metrics


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


def interact(args: Args, env: Env, learner: Learner, worlds: Worlds) -> tuple:
    """A rollout of one device's worlds, the statistics, and the draw of the iteration's minibatches.

    Returns the learner, the worlds, what is new for the buffer [T, N, ...], where the minibatches
    are, metrics over all devices by tag, and this device's black box.
    """
    worlds, steps = rollout(args, env, learner, worlds)
    learner = update_statistics(args, learner, steps)
    learner = learner.replace(steps=learner.steps + args.num_steps)
    places = draw(args, learner, len(worlds.key))

    terms = {}
    for name, term in steps.end.env_state.metrics.items():
        tag = name.replace("_", "/", 1)  # reward_x -> reward/x
        terms[tag] = masked_mean(term, steps.valid)
    metrics = mean_over_devices(terms) | episode_metrics(worlds, steps)

    broken = steps.end.env_state.info["broken"]
    box = black_box(steps.start, scale_action(env, steps.action), broken)
    return learner, worlds, to_experience(steps), places, metrics, box


def device_iteration(args: Args, env: Env, state: TrainState) -> tuple[TrainState, dict, dict]:
    """Rollout, buffer and updates with one device's worlds.

    Returns the next state, metrics over all devices by tag, and this device's black box.
    """
    first = state.learner.steps
    learner, worlds, new, places, metrics, box = interact(args, env, state.learner, state.worlds)
    buffer = insert(args, state.buffer, first, new)
    learner, losses = learn(args, env, learner, gather(args, buffer, places))
    return TrainState(learner=learner, worlds=worlds, buffer=buffer), metrics | losses, box


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
        # With True, jax.grad would already sum over the devices what mean_over_devices averages.
        check_vma=False,
    )
    state, metrics, box = run(state)
    return state, metrics | {"black_box": box}


# How the devices share B: in minibatches [U, B, ...], and in their places, [U, B] and [n, U, B].
SAMPLE_SPEC = P(None, "devices")
PLACES_SPEC = Places(
    rows=P(None, None, "devices"), written=P(None, None, "devices"), world=P(None, "devices")
)


def host_iteration(
    args: Args, mesh: Mesh, interact_program, learn_program, state: TrainState
) -> tuple[TrainState, dict[str, jax.Array]]:
    """train_iteration with the buffer in the host's memory, by the programs of `lower_iteration`.

    The new steps go there, and an iteration's minibatches come back, all at once. Not pure: the
    buffer changes in place.
    """
    learner, worlds, new, places, metrics, box = interact_program(state.learner, state.worlds)
    new, places, steps_done = jax.device_get((new, places, learner.steps))
    buffer = insert(args, state.buffer, steps_done - args.num_steps, new)
    # A device draws from its own worlds, which it counts from 0.
    owner = np.repeat(np.arange(mesh.size), args.batch_size // mesh.size)
    places = places.replace(world=places.world + owner * (args.num_envs // mesh.size))
    sample = jax.device_put(gather(args, buffer, places), NamedSharding(mesh, SAMPLE_SPEC))
    learner, losses = learn_program(learner, sample)
    state = TrainState(learner=learner, worlds=worlds, buffer=buffer)
    return state, metrics | losses | {"black_box": box}


# ---- The algorithm ends here: you may stop reading. The loop is train_loop in section 14 ---------


# ---- 11. Evaluation ------------------------------------------------------------------------------
def export_policy(env: Env, learner: Learner) -> dict[str, np.ndarray]:
    """All that the deterministic policy needs: normaliser, layers w0, b0, ..., controls' range.

    rms_norm or layer_norm is there where layers are normalised, with the constant in its root.
    """
    policy = {
        "action_scale": np.float32(env.action_scale),
        "action_bias": np.float32(env.action_bias),
        "obs_mean": learner.obs_stats.mean,
        "obs_var": learner.obs_stats.var,
    }
    layers = dict(learner.params["actor"]["params"])
    out = layers.pop("out")
    number = len(layers)
    policy[f"w{number}"] = out["kernel"][:, : env.action_size]  # without the standard deviations
    policy[f"b{number}"] = out["bias"][: env.action_size]
    for name, layer in layers.items():  # such as rms_0
        norm, number = name.split("_")
        policy["w" + number] = layer["kernel"]
        policy["b" + number] = layer["bias"]
        if norm != "none":
            policy[norm + "_norm"] = np.float32(LAYER_EPS)
    policy = jax.device_get(policy)
    # With rows of 0 for what is unseen, so that the policy takes whole observations.
    seen = policy["w0"]
    policy["w0"] = np.zeros((env.observation_size, seen.shape[1]), seen.dtype)
    policy["w0"][env.seen] = seen
    return policy


def act(policy: dict, memory: tuple, obs, xp=np) -> tuple[tuple, Any]:
    """The exported policy: its memory and raw observations [..., O] -> next memory, action.

    The actions [..., A] are the distribution's median, as controls of the actuators. NumPy
    suffices.
    """
    x = xp.clip((obs - policy["obs_mean"]) / xp.sqrt(policy["obs_var"] + 1e-8), -10.0, 10.0)
    last = sum(name.startswith("w") for name in policy) - 1
    for i in range(last):
        x = x @ policy[f"w{i}"] + policy[f"b{i}"]
        width = len(policy[f"b{i}"])
        average = np.full((width, 1), 1 / width, np.float32)  # x @ average: the mean, [..., 1]
        if "layer_norm" in policy:
            x = x - x @ average
            x = x / xp.sqrt((x * x) @ average + policy["layer_norm"])
        if "rms_norm" in policy:
            x = x / xp.sqrt((x * x) @ average + policy["rms_norm"])
        x = xp.maximum(x, 0.0)
    action = xp.tanh(x @ policy[f"w{last}"] + policy[f"b{last}"])
    return memory, policy["action_scale"] * action + policy["action_bias"]


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
    require(good, f"--hidden-sizes {widths}: must be widths up to 4096, like 256 256")

    steps = args.steps_per_iteration
    message = f"--total-timesteps {args.total_timesteps}: less than an iteration of {steps}"
    require(args.num_iterations, message)
    starts = args.learning_starts
    message = f"--learning-starts {starts}: all of --total-timesteps, so nothing would be learnt"
    require(starts < args.num_iterations * steps, message)
    whole = args.buffer_size % args.num_envs == 0
    message = f"--buffer-size {args.buffer_size}: must be a multiple of --num-envs {args.num_envs}"
    require(whole, f"{message}, like {(args.buffer_rows + 1) * args.num_envs}")
    message = f"--buffer-size {args.buffer_size}: less than an iteration of {steps} steps"
    require(args.buffer_size >= steps, message)
    whole = args.updates_per_iteration % args.policy_frequency == 0
    message = f"--updates-per-iteration {args.updates_per_iteration}: must be a multiple of"
    require(whole, f"{message} --policy-frequency {args.policy_frequency}")


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


def lower_iteration(args: Args, env: Env, mesh: Mesh, state: TrainState) -> list:
    """The programs of an iteration, to be compiled: one; with a buffer in the host's memory, two.

    state: the shapes of a state, with their shardings.
    """
    if args.buffer_device == "device":
        return [train_iteration.lower(args, env, mesh, state)]

    on_mesh = partial(jax.shard_map, mesh=mesh, check_vma=False)
    worlds = P("devices")
    interacting = on_mesh(
        partial(interact, args, env),
        in_specs=(P(), worlds),
        out_specs=(P(), worlds, P(None, "devices"), PLACES_SPEC, P(), P("devices")),
    )
    learning = on_mesh(partial(learn, args, env), in_specs=(P(), SAMPLE_SPEC), out_specs=(P(), P()))
    interacting = jax.jit(interacting, donate_argnums=(0, 1)).lower(state.learner, state.worlds)
    _, _, _, places, _, _ = interacting.out_info
    sharding = NamedSharding(mesh, SAMPLE_SPEC)
    buffer = jax.eval_shape(partial(init_buffer, args, env))
    sample = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(partial(gather, args), buffer, places),
    )
    return [interacting, jax.jit(learning, donate_argnums=0).lower(state.learner, sample)]


def build(args: Args, mesh: Mesh) -> Programs:
    """Compile all programs of a run, and run the first: the state before training."""
    slowly = "" if onekernel else "; without the folder onekernel beside it, XLA's slow physics"
    say(f"building {args.env_id} for {mesh.size} x {mesh.devices[0].device_kind}{slowly}")
    env = Env(args)
    for remark in env.remarks:
        say(f"{args.env_id}: {remark}")
    on_host = args.buffer_device == "host"
    alone = jax.process_count() == 1
    require(alone or not on_host, "--buffer-device host: works with one process only")
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
    buffer_bytes = count_bytes(jax.eval_shape(partial(init_buffer, args, env)))
    check_memory(None if on_host else mesh, buffer_bytes, "--buffer-size")
    check_memory(mesh, count_bytes(shapes))
    ratio = args.updates_per_iteration / args.steps_per_iteration
    say(f"buffer of {buffer_bytes / 1e6:.0f} MB; {ratio:.3g} updates for each environment step")

    say("compiling the training iteration")
    start = time.perf_counter()
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    # The program that makes the first state runs once, so it is compiled quickly rather than well.
    is_cpu = mesh.devices[0].platform == "cpu"
    quickly = {"xla_backend_optimization_level": 0} if is_cpu else None
    with ThreadPoolExecutor() as pool:  # XLA compiles one program while JAX traces the next
        init = pool.submit(init.compile, compiler_options=quickly)
        lowered = lower_iteration(args, env, mesh, shapes)
        programs = [pool.submit(program.compile) for program in lowered]
        state = init.result()(key)
        policy = export_policy(env, state.learner)
        evaluate = evaluate_mjx.lower(env, policy, eval_keys).compile()
        programs = [program.result() for program in programs]
    if on_host:
        state = state.replace(buffer=init_buffer(args, env, np))
        iterate = partial(host_iteration, args, mesh, *programs)
    else:
        (iterate,) = programs

    memories = [program.memory_analysis() for program in programs]  # of one device
    peak = max(memory.argument_size_in_bytes + memory.temp_size_in_bytes for memory in memories)
    facts = {
        "compile_s": round(time.perf_counter() - start, 2),
        "compile_cache": "hit" if any("cache_hits" in event for event in events) else "miss",
        "bytes_per_world": count_bytes(state.worlds) // args.num_envs,
        "buffer_bytes": buffer_bytes,
        "peak_bytes": peak * mesh.size,
    }
    shared = buffer_bytes if on_host and is_cpu else 0  # a CPU's memory is the host's
    check_memory(mesh, facts["peak_bytes"] + shared)
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


def wanted_devices(args: Args) -> int | None:
    """How many devices to split the work over; None for as many as possible.

    On a CPU few worlds and small minibatches are for one: to exchange their gradients takes what
    sharing the work saves, and other cores are free for other seeds.
    """
    alone = jax.default_backend() == "cpu" and jax.process_count() == 1
    is_small = max(args.batch_size, args.num_envs) < 256
    return args.num_devices or (1 if alone and is_small else None)


def train(args: Args, run_dir: Path | None = None) -> tuple[Path, dict]:
    """Train from the start, or from the newest checkpoint of run_dir.

    Returns the run's folder and its policy.
    """
    check_log(args)
    stops = listen()
    resuming = run_dir is not None
    if args.capture_video:  # better to fail now than after training
        make_renderer(load_model(TASKS[args.env_id])).close()
    mesh = make_mesh(wanted_devices(args), args.num_envs, args.batch_size)
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
            updates_per_iteration=6,
            policy_frequency=3,
            batch_size=256,  # so that all devices take part
            buffer_size=1024,
            learning_starts=512,
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
