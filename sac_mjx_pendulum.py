# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "flax==0.12.6",
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
"""SAC on a thousand pendulums at once, on MuJoCo XLA (MJX): one file, one compiled program.

    python sac_mjx_pendulum.py                        swing up Gymnasium's Pendulum-v1
    python sac_mjx_pendulum.py --resume runs/NAME     continue a stopped run, bit for bit
    python sac_mjx_pendulum.py --evaluate runs/NAME   test its policy in MJX, in C MuJoCo and in
                                                      Gymnasium
    python sac_mjx_pendulum.py --smoke                check the installation on this machine

To watch: tensorboard --logdir runs, or tools/live_window.py; to film: tools/film_pendulum.py.

The science comes first, and is all that SAC needs:

    1 settings      4 networks          7 acting     10 training iteration
    2 tasks         5 replay buffer     8 losses
    3 environment   6 training state    9 update

After it come 11 evaluation, 12 log and files, 13 command line, 14 main.

Shapes: T = num_steps, N = worlds on this device, K = updates_per_step, B = transitions of one
update on this device, C = rows of the buffer, O = observation size, A = action size, E = episodes.
A record describes one world; its fields are [N, ...] for all worlds, [C, N, ...] in the buffer,
[T, N, ...] in an iteration and [B, ...] in a minibatch.

Names and details follow CleanRL's sac_continuous_action.py and arXiv:1812.05905. All metrics and
flags are explained in docs/sac_mjx_pendulum.md. ppo_mjx.py has the same order and names; blocks
marked "shared" are copies of its own.
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

with contextlib.redirect_stdout(io.StringIO()):  # it announces that the optional Warp is missing
    from mujoco import mjx

try:  # what only the log of training needs
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.record_writer import RecordWriter
    from tensorboard.util.tensor_util import make_tensor_proto
    from tqdm import tqdm
except ImportError:
    RecordWriter = None

try:
    import onekernel.mjx
except ImportError:  # this file was copied alone: XLA runs the physics, slowly
    onekernel = None


# ---- 1. Settings ---------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a flag may have, both ends included; `check_args` reads it."""

    least: float
    most: float


Count = Annotated[int, Range(1, 1e9)]
MaybeCount = Annotated[int | None, Range(1, 1e9)]
CountOrZero = Annotated[int, Range(0, 1e9)]
NonNegative = Annotated[float, Range(0, 1e9)]
Fraction = Annotated[float, Range(0, 1)]
Cadence = Annotated[float, Range(1e-9, 1e9)]
MaybePositive = Annotated[float | None, Range(0.05, 1e4)]  # in SI units; None: the task's own


@dataclasses.dataclass(frozen=True)
class Args:
    """SAC on a thousand pendulums, on MuJoCo XLA."""

    # The run
    exp_name: str = "sac_mjx_pendulum"
    """name of the experiment, part of the run folder's name"""
    seed: CountOrZero = 1
    """every random number follows from it and from the number of devices"""
    num_devices: MaybeCount = None
    """devices to split the worlds over; by default as many GPUs or CPU cores as divide the work"""
    runs_dir: str = "runs"
    """folder for the run folders"""
    track: bool = False
    """log to Weights & Biases as well; WANDB_PROJECT names the project"""
    checkpoint_every: Cadence = 0.4
    """share of the training between checkpoints, buffer included; from 1 on, iterations"""
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
    env_id: Literal["Pendulum-v1", "PointMass"] = "Pendulum-v1"
    """Pendulum-v1: a rod, as in Gymnasium; PointMass: a mass at the end of a weightless rod"""
    gravity: Annotated[float | None, Range(0, 1e9)] = None
    """m/s^2; by default the task's own, and so for the next five"""
    length: MaybePositive = None
    """m"""
    mass: MaybePositive = None
    """kg"""
    dt: Annotated[float | None, Range(1e-3, 0.2)] = None
    """s, of one step"""
    max_torque: MaybePositive = None
    """Nm"""
    max_speed: MaybePositive = None
    """rad/s"""
    eval_every: NonNegative = 0.4
    """share of the training between evaluations in MJX; from 1 on, a number of iterations; 0: none"""
    eval_episodes: Annotated[int, Range(1, 1e4)] = 100
    """episodes of each evaluation"""

    # The algorithm, with CleanRL's names
    total_timesteps: Annotated[int, Range(1, 2**62)] = 512_000
    """environment steps, over all worlds"""
    num_envs: Count = 1024
    """worlds, over all devices"""
    num_steps: Count = 20
    """steps of each world in one iteration"""
    updates_per_step: Annotated[int, Range(1, 1e3)] = 8
    """updates after each step of the worlds"""
    buffer_size: Count = 1_048_576
    """transitions in the replay buffer, over all worlds; the oldest are overwritten"""
    batch_size: Count = 256
    """transitions in one update, over all devices"""
    learning_starts: CountOrZero = 5120
    """environment steps by a random policy before the first update"""
    policy_lr: NonNegative = 3e-3
    """Adam's step size for the actor"""
    q_lr: NonNegative = 3e-3
    """Adam's step size for the critics and for the temperature"""
    reward_scale: NonNegative = 0.1
    """factor of the rewards that the critics learn from; with 1 they learn slowly"""
    gamma: Fraction = 0.98
    """discount factor"""
    tau: Fraction = 0.01
    """share of the critics that goes into their targets at each update"""
    policy_frequency: Annotated[int, Range(1, 1e3)] = 1
    """the actor is updated after so many updates of the critics, as many times, as in CleanRL"""
    target_network_frequency: Count = 1
    """updates of the critics between those of their targets"""
    autotune: bool = True
    """tune the temperature towards a policy entropy (nats) of minus the action size"""
    alpha: Annotated[float, Range(1e-9, 1e9)] = 0.2
    """the temperature, the weight of the entropy, with --no-autotune"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """widths of the ReLU layers, in the actor and in each critic"""

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
        """Steps of each world before the first update."""
        return math.ceil(self.learning_starts / self.num_envs)

    @property
    def buffer_rows(self) -> int:
        """Steps of all worlds that the buffer holds."""
        return self.buffer_size // self.num_envs


# ---- 2. Tasks (SI units; a test holds Pendulum-v1 equal to Gymnasium's) --------------------------
@dataclasses.dataclass(frozen=True)
class Task:
    """A pendulum on a motor. Its angle is 0 upright, and grows clockwise."""

    gravity: float  # m/s^2
    length: float  # m
    mass: float  # kg
    dt: float  # s, of one step
    max_torque: float  # Nm
    max_speed: float  # rad/s
    center: float  # of mass, as a share of the length from the hinge
    inertia: float  # about the centre of mass, in units of mass * length^2
    time_limit: int = 200  # steps


TASKS = {
    "Pendulum-v1": Task(
        gravity=10.0,
        length=1.0,
        mass=1.0,
        dt=0.05,
        max_torque=2.0,
        max_speed=8.0,
        center=0.5,
        inertia=1 / 12,  # a thin rod
    ),
    "PointMass": Task(
        gravity=9.81,
        length=1.0,
        mass=1.0,
        dt=0.05,
        # 0.41 of the torque that holds it level (Pendulum-v1: 0.40): it must swing to come up.
        max_torque=4.0,
        max_speed=8.0,
        center=1.0,
        # A point: nearly 0, but above MuJoCo's limit of 1e-15 kg m^2 for any --mass and --length.
        inertia=1e-9,
    ),
}


def task_flags(source) -> dict[str, float | None]:
    """The numbers of a task that are flags, by name. source: a `Task`, or `Args`."""
    names = ("gravity", "length", "mass", "dt", "max_torque", "max_speed")
    return {name: getattr(source, name) for name in names}


def make_task(args: Args) -> Task:
    """The task, with the numbers that the flags change."""
    changes = {name: value for name, value in task_flags(args).items() if value is not None}
    return dataclasses.replace(TASKS[args.env_id], **changes)


MJCF = """
<mujoco model="pendulum">
  <option timestep="{dt}" gravity="0 0 -{gravity}" integrator="Euler">
    <flag constraint="disable"/>
  </option>
  <worldbody>
    <body>
      <joint name="hinge" type="hinge" axis="0 1 0"/>
      <inertial pos="0 0 {center}" mass="{mass}" diaginertia="{inertia} {inertia} {inertia}"/>
    </body>
  </worldbody>
  <actuator>
    <motor joint="hinge"/>
  </actuator>
</mujoco>
"""


def load_model(task: Task) -> mujoco.MjModel:
    """The task's model, for C MuJoCo."""
    text = MJCF.format(
        dt=task.dt,
        gravity=task.gravity,
        mass=task.mass,
        center=task.center * task.length,
        inertia=task.inertia * task.mass * task.length**2,
    )
    return mujoco.MjModel.from_xml_string(text)


def wrap(angle):
    """The same angle from -pi to pi."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


def observe(qpos, qvel, xp=jnp):
    """What the policy sees: cosine and sine of the angle, and the speed.

    qpos: [..., 1] rad; qvel: [..., 1] rad/s, of JAX (xp=jnp) or NumPy (xp=np). Returns [..., 3].
    """
    return xp.concatenate([xp.cos(qpos), xp.sin(qpos), qvel], axis=-1)


def reward_terms(qpos, qvel, torque, xp=jnp) -> dict[str, Any]:
    """The terms of the reward, which is their sum: name -> [...].

    qpos: [..., 1] rad and qvel: [..., 1] rad/s before the step; torque: [..., 1] Nm.
    """
    costs = {
        "angle": xp.square(wrap(qpos)),
        "speed": 0.1 * xp.square(qvel),
        "torque": 0.001 * xp.square(torque),
    }
    return {f"reward_{name}": -cost[..., 0] for name, cost in costs.items()}


# ---- 3. Environment ------------------------------------------------------------------------------
@struct.dataclass
class Physics:
    """The smallest state that determines the future."""

    qpos: jax.Array  # [1] rad, from -pi to pi, 0 upright
    qvel: jax.Array  # [1] rad/s


@struct.dataclass
class State:
    """One world between two steps; names are MuJoCo Playground's."""

    data: Physics
    obs: jax.Array  # [O]
    reward: jax.Array  # []
    # [] float, 1 if the episode terminated, here only where the world broke; the time limit is in
    # info.
    done: jax.Array
    metrics: dict[str, jax.Array]  # the reward's terms
    info: dict[str, jax.Array]
    # elapsed: steps since the reset; truncated: the time limit is reached; broken: see Env


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


class Env:
    """One world of a task. `reset` and `step` are pure functions: batch them with jax.vmap.

    A world that is not finite is broken: its step ends the episode, earns nothing and is not
    learnt from, since to earn nothing is the best there is here. Its observation stays as it was.
    """

    action_size = 1
    observation_size = 3

    def __init__(self, args: Args):
        self.task = make_task(args)
        self.time_limit = self.task.time_limit  # steps

        device = jax.local_devices()[0]
        self.model = mjx.put_model(load_model(self.task), device, impl="jax")
        self.template = mjx.make_data(self.model, device)

    def reset(self, key: jax.Array) -> State:
        """A new episode, anywhere on the circle, and slow. key: one PRNG key."""
        qpos_key, qvel_key = jax.random.split(key)
        qpos = jax.random.uniform(qpos_key, (1,), minval=-math.pi, maxval=math.pi)
        qvel = jax.random.uniform(qvel_key, (1,), minval=-1.0, maxval=1.0)

        zero = jnp.zeros(())
        no = jnp.array(False)
        terms = reward_terms(qpos, qvel, jnp.zeros(self.action_size))
        return State(
            data=Physics(qpos=qpos, qvel=qvel),
            obs=observe(qpos, qvel),
            reward=zero,
            done=zero,
            metrics=dict.fromkeys(terms, zero),
            info={
                "elapsed": jnp.zeros((), jnp.int32),
                "truncated": no,
                "broken": no,
            },
        )

    def step(self, state: State, action: jax.Array) -> State:
        """One step.

        action: [1], the torque in Nm, clipped to the task's limits.
        """
        task = self.task
        qpos = state.data.qpos
        qvel = state.data.qvel
        torque = jnp.clip(action, -task.max_torque, task.max_torque)

        full = self.template.replace(qpos=qpos, qvel=qvel, ctrl=torque)
        full = physics_step(self.model, full)
        sane = jnp.isfinite(full.qvel).all()
        # As in Gymnasium the speed has a limit, and Euler's method moves the angle by that speed.
        next_qvel = jnp.clip(full.qvel, -task.max_speed, task.max_speed)
        next_qpos = wrap(qpos + task.dt * next_qvel)

        terms = reward_terms(qpos, qvel, torque)
        terms = {name: jnp.where(sane, term, 0.0) for name, term in terms.items()}
        elapsed = state.info["elapsed"] + 1
        return State(
            data=Physics(qpos=next_qpos, qvel=next_qvel),
            obs=jnp.where(sane, observe(next_qpos, next_qvel), state.obs),
            reward=sum(terms.values()),
            done=1.0 - sane,  # a pendulum never terminates: a task that can says so here
            metrics=terms,
            info={
                "elapsed": elapsed,
                "truncated": elapsed >= self.time_limit,
                "broken": ~sane,
            },
        )


# ---- 4. Networks ---------------------------------------------------------------------------------
# shared: dense
def dense(width: int, **options) -> nn.Dense:
    """A layer. On a CPU onekernel's product is faster than XLA's, most of all in the gradient."""
    return nn.Dense(width, dot_general=onekernel.dot_general if onekernel else None, **options)


# end shared


class MLP(nn.Module):
    """ReLU layers: [..., in] -> [..., out]."""

    hidden_sizes: tuple[int, ...]
    out: int

    @nn.compact
    def __call__(self, x):
        for width in self.hidden_sizes:
            x = nn.relu(dense(width)(x))
        return dense(self.out)(x)


def make_networks(args: Args, env: Env) -> tuple[nn.Module, nn.Module]:
    """The actor, and both critics, each with weights of its own: [..., O + A] -> [2, ..., 1]."""
    twins = nn.vmap(
        MLP,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=2,
    )
    actor = MLP(args.hidden_sizes, 2 * env.action_size)  # means, then raw standard deviations
    critics = twins(args.hidden_sizes, 1)
    return actor, critics


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


def initial_memory(batch: tuple[int, ...] = ()) -> tuple:
    """What the policy remembers when an episode begins: a tree of arrays [*batch, ...].

    This one remembers nothing, so that nothing is carried, saved or compiled.
    """
    return ()


def apply_policy(
    args: Args, env: Env, params: dict, memory: tuple, obs: jax.Array
) -> tuple[tuple, TanhGaussian]:
    """The policy: its memory and observations [..., O] -> next memory, distribution.

    A recurrent network would keep its state in `memory`, which acting and both evaluations carry
    along and set to `initial_memory` when an episode begins. What it would change besides: `act`,
    the same policy in NumPy; and the losses, which learn from single transitions. They would have
    to learn from stretches of the buffer, with the memory that each began with beside it.
    """
    actor, _ = make_networks(args, env)
    mean, raw = jnp.split(actor.apply(params, obs), 2, axis=-1)
    log_std = -5.0 + 3.5 * (jnp.tanh(raw) + 1.0)  # from -5 to 2, as in CleanRL
    return memory, TanhGaussian(mean=mean, log_std=log_std)


def apply_critics(
    args: Args, env: Env, params: dict, obs: jax.Array, action: jax.Array
) -> jax.Array:
    """What both critics say: observations [..., O] and actions [..., A] -> [2, ...]."""
    _, critics = make_networks(args, env)
    return critics.apply(params, jnp.concatenate([obs, action], axis=-1))[..., 0]


# ---- 5. Replay buffer ----------------------------------------------------------------------------
@struct.dataclass
class Transition:
    """One step of one world: what was seen and done, and what came of it."""

    obs: jax.Array  # [O]
    action: jax.Array  # [A] in (-1, 1)
    reward: jax.Array  # [], not scaled
    next_obs: jax.Array  # [O], where the step ended, before any reset
    terminated: jax.Array  # [] float, 1 or 0; the time limit does not terminate
    valid: jax.Array  # [] bool; False where the world broke: nothing is learnt from it


def init_buffer(args: Args, env: Env) -> Transition:
    """An empty ring [C, N, ...] of the last C steps of all worlds: step t is in row t % C."""
    shape = (args.buffer_rows, args.num_envs)
    return Transition(
        obs=jnp.zeros((*shape, env.observation_size)),
        action=jnp.zeros((*shape, env.action_size)),
        reward=jnp.zeros(shape),
        next_obs=jnp.zeros((*shape, env.observation_size)),
        terminated=jnp.zeros(shape),
        valid=jnp.zeros(shape, bool),
    )


def write(buffer: Transition, t, step: Transition) -> Transition:
    """The ring with step number t of all worlds [N, ...] in it."""
    row = t % len(buffer.reward)
    return jax.tree.map(lambda ring, new: ring.at[row].set(new), buffer, step)


def gather(buffer: Transition, indices: tuple) -> Transition:
    """Minibatches [K, B, ...] of the transitions at indices (rows, worlds), [K, B] each."""
    return jax.tree.map(lambda ring: ring[indices], buffer)


# ---- 6. Training state ---------------------------------------------------------------------------
@struct.dataclass
class Learner:
    """What is learnt; the same on every device."""

    actor: dict  # Flax parameters
    critics: dict  # of both, stacked
    targets: dict  # the critics, which these follow slowly
    log_alpha: jax.Array  # log of the temperature
    opt_state: dict[str, optax.OptState]  # "actor", "critics" and "alpha"
    key: jax.Array  # of the minibatches, and of the noise in the losses
    steps: jax.Array  # int32, steps that each world has done
    updates: jax.Array  # int32, updates done
    iteration: jax.Array  # int32, iterations done


@struct.dataclass
class Worlds:
    """What belongs to one world: fields [N, ...], split over the devices.

    Each world draws from its own key, so that it is the same on any number of devices.
    """

    env_state: State
    memory: tuple  # the policy's
    key: jax.Array  # of the actions and resets
    episode_return: jax.Array
    episode_length: jax.Array  # int32
    times_broken: jax.Array  # int32


@struct.dataclass
class TrainState:
    """All that a run's future depends on; a checkpoint holds this and the settings."""

    learner: Learner
    worlds: Worlds
    buffer: Transition  # [C, N, ...]


# What --init-from takes from another run's learner.
INHERITED = ("actor", "critics", "targets", "log_alpha")

STATE_SPEC = TrainState(learner=P(), worlds=P("devices"), buffer=P(None, "devices"))


def make_optimizer(args: Args, name: str) -> optax.GradientTransformation:
    """Adam for the "actor", the "critics" or "alpha".

    A gradient that is not finite is skipped and counted.
    """
    learning_rate = args.policy_lr if name == "actor" else args.q_lr
    return optax.apply_if_finite(optax.adam(learning_rate), max_consecutive_errors=2**31 - 1)


def start_worlds(env_state: State, keys: jax.Array, times_broken: jax.Array) -> Worlds:
    """Worlds [N] at the start of an episode."""
    return Worlds(
        env_state=env_state,
        memory=initial_memory(keys.shape),
        key=keys,
        episode_return=jnp.zeros(keys.shape),
        episode_length=jnp.zeros(keys.shape, jnp.int32),
        times_broken=times_broken,
    )


def init_learner_and_worlds(args: Args, env: Env, key: jax.Array) -> tuple[Learner, Worlds]:
    """The state before the first iteration, but for the buffer."""
    keys = jax.random.split(key, 6)
    actor_key, critics_key, learner_key, reset_key, clock_key, world_key = keys

    actor, critics = make_networks(args, env)
    params = {
        "actor": actor.init(actor_key, jnp.zeros(env.observation_size)),
        "critics": critics.init(critics_key, jnp.zeros(env.observation_size + env.action_size)),
        "alpha": jnp.float32(0.0 if args.autotune else math.log(args.alpha)),
    }
    zero = jnp.zeros((), jnp.int32)
    learner = Learner(
        actor=params["actor"],
        critics=params["critics"],
        targets=params["critics"],
        log_alpha=params["alpha"],
        opt_state={name: make_optimizer(args, name).init(x) for name, x in params.items()},
        key=learner_key,
        steps=zero,
        updates=zero,
        iteration=zero,
    )

    n = args.num_envs
    env_state = jax.vmap(kernel(env.reset))(jax.random.split(reset_key, n))
    # The worlds' clocks start at random, so that their time limits do not come all at once.
    env_state.info["elapsed"] = jax.random.randint(clock_key, (n,), 0, env.time_limit)
    worlds = start_worlds(env_state, jax.random.split(world_key, n), jnp.zeros(n, jnp.int32))
    return learner, worlds


def init_train_state(args: Args, env: Env, mesh: Mesh, key: jax.Array) -> TrainState:
    """The state before the first iteration, split over the mesh's devices."""
    shardings = jax.tree.map(partial(NamedSharding, mesh), STATE_SPEC)

    def start(key: jax.Array) -> TrainState:
        learner, worlds = init_learner_and_worlds(args, env, key)
        return TrainState(learner=learner, worlds=worlds, buffer=init_buffer(args, env))

    return jax.jit(start, out_shardings=shardings)(key)


# ---- 7. Acting -----------------------------------------------------------------------------------
@struct.dataclass
class Report:
    """What the log is told of one step of one world."""

    start: State  # where the step began
    action: jax.Array  # [A] Nm
    end: Worlds  # where it ended, before any reset: reward, episode's return, ...
    finished: jax.Array  # bool: a whole episode is over, not broken, its clock started at 0


def split_keys(keys: jax.Array, n: int) -> tuple[jax.Array, ...]:
    """n new keys for each key: [N] -> [n, N]."""
    return jnp.unstack(jax.vmap(partial(jax.random.split, num=n))(keys), axis=1)


def where_done(done: jax.Array, fresh: Worlds, end: Worlds) -> Worlds:
    """Each world from `fresh` where its episode is done, else from `end`. done: bool [N]."""

    def choose(done, fresh, end):
        return jax.tree.map(partial(jnp.where, done), fresh, end)

    return jax.vmap(choose)(done, fresh, end)


def interact(
    args: Args, env: Env, learner: Learner, worlds: Worlds
) -> tuple[Worlds, Transition, Report]:
    """One step of all worlds, with a fresh reset after each episode.

    Actions are uniform in the first steps, then the policy's. Returns the worlds, their
    transitions and what there is to report, all [N, ...].
    """
    key, action_key, reset_key = split_keys(worlds.key, 3)
    start = worlds.env_state

    memory, policy = apply_policy(args, env, learner.actor, worlds.memory, start.obs)
    noise = jax.vmap(partial(jax.random.normal, shape=(env.action_size,)))(action_key)
    action, _ = policy.sample(noise)
    # From -1 to 1: the same noise made uniform, so that no other key is needed.
    uniform = 2 * jax.scipy.stats.norm.cdf(noise) - 1
    action = jnp.where(learner.steps < args.random_steps, uniform, action)
    torque = env.task.max_torque * action
    state = jax.vmap(kernel(env.step))(start, torque)

    done = (state.done > 0) | state.info["truncated"]
    broken = state.info["broken"]
    end = Worlds(
        env_state=state,
        memory=memory,
        key=key,
        episode_return=worlds.episode_return + state.reward,
        episode_length=worlds.episode_length + 1,
        times_broken=worlds.times_broken + broken,
    )
    transition = Transition(
        obs=start.obs,
        action=action,
        reward=state.reward,
        next_obs=state.obs,
        terminated=state.done,
        valid=~broken,
    )
    report = Report(
        start=start,
        action=torque,
        end=end,
        finished=done & ~broken & (end.episode_length == state.info["elapsed"]),
    )
    fresh = start_worlds(jax.vmap(kernel(env.reset))(reset_key), key, end.times_broken)
    return where_done(done, fresh, end), transition, report


def device_key(key: jax.Array, number) -> jax.Array:
    """A key for each number and each device."""
    return jax.random.fold_in(jax.random.fold_in(key, number), jax.lax.axis_index("devices"))


def draw(args: Args, learner: Learner, num_worlds: int) -> tuple[jax.Array, jax.Array]:
    """Where the minibatches after a step are in the buffer, that step included.

    Returns rows and worlds, int32 [K, B] each, uniform over all steps that were written.
    """
    key = device_key(learner.key, -1 - learner.steps)  # the updates' own numbers count from 0 up
    row_key, world_key = jax.random.split(key)
    shape = (args.updates_per_step, args.batch_size // jax.lax.axis_size("devices"))
    written = jnp.minimum(learner.steps + 1, args.buffer_rows)
    rows = jax.random.randint(row_key, shape, 0, written)
    return rows, jax.random.randint(world_key, shape, 0, num_worlds)


# ---- 8. Losses -----------------------------------------------------------------------------------
def masked_mean(x: jax.Array, valid: jax.Array) -> jax.Array:
    """The mean of the valid samples: two arrays [...] -> []. It is 0 where none is valid."""
    return jnp.where(valid, x, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def critic_target(
    args: Args, env: Env, learner: Learner, mb: Transition, noise: jax.Array
) -> jax.Array:
    """What both critics should say of a minibatch: [B], in units of the scaled reward.

    noise: [B, A], standard normal. The smaller of the two target critics judges the next state. A
    termination leaves nothing to come; the time limit does not.
    Source: arXiv:1812.05905, equation 6, with two critics.
    """
    memory = initial_memory(mb.obs.shape[:-1])  # single steps have no past
    _, policy = apply_policy(args, env, learner.actor, memory, mb.next_obs)
    next_action, logprob = policy.sample(noise)
    next_q = apply_critics(args, env, learner.targets, mb.next_obs, next_action).min(axis=0)

    alpha = jnp.exp(learner.log_alpha)
    next_value = (1 - mb.terminated) * (next_q - alpha * logprob)
    return args.reward_scale * mb.reward + args.gamma * next_value


def critic_loss(
    args: Args, env: Env, params: dict, mb: Transition, target: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of both critics' mean squared errors on a minibatch, and its metrics by tag.

    target: [B].
    Source: arXiv:1812.05905, equation 5.
    """
    q1, q2 = apply_critics(args, env, params, mb.obs, mb.action)
    q1_loss = masked_mean(jnp.square(q1 - target), mb.valid)
    q2_loss = masked_mean(jnp.square(q2 - target), mb.valid)
    metrics = {
        "losses/qf1_values": masked_mean(q1, mb.valid),
        "losses/qf2_values": masked_mean(q2, mb.valid),
        "losses/qf1_loss": q1_loss,
        "losses/qf2_loss": q2_loss,
        "losses/qf_loss": (q1_loss + q2_loss) / 2,
    }
    return q1_loss + q2_loss, metrics


def actor_loss(
    args: Args, env: Env, params: dict, learner: Learner, mb: Transition, noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The actor's loss on a minibatch, and the mean log density of its actions.

    noise: [B, A], standard normal.
    Source: arXiv:1812.05905, equation 7, with the smaller of two critics.
    """
    memory = initial_memory(mb.obs.shape[:-1])  # single steps have no past
    _, policy = apply_policy(args, env, params, memory, mb.obs)
    action, logprob = policy.sample(noise)
    q = apply_critics(args, env, learner.critics, mb.obs, action).min(axis=0)
    loss = masked_mean(jnp.exp(learner.log_alpha) * logprob - q, mb.valid)
    return loss, masked_mean(logprob, mb.valid)


def alpha_loss(env: Env, log_alpha: jax.Array, logprob: jax.Array) -> jax.Array:
    """The temperature's loss, for a mean log density of actions: [] -> [].

    The temperature falls while the entropy, -logprob, exceeds minus the number of actions.
    Source: arXiv:1812.05905, equation 18.
    """
    return -jnp.exp(log_alpha) * (logprob - env.action_size)


# ---- 9. Update -----------------------------------------------------------------------------------
def mean_over_devices(tree):
    """The mean of the devices' trees. As one vector it takes one exchange, not one a leaf."""
    vector, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(vector, "devices"))


def update_critics(
    args: Args, env: Env, learner: Learner, mb: Transition, noise: jax.Array
) -> tuple[Learner, dict[str, jax.Array]]:
    """One step of both critics, and of their targets if these are due. noise: [B, A]."""
    target = critic_target(args, env, learner, mb, noise)
    gradient, metrics = mean_over_devices(
        jax.grad(critic_loss, argnums=2, has_aux=True)(args, env, learner.critics, mb, target)
    )
    optimizer = make_optimizer(args, "critics")
    step, opt_state = optimizer.update(gradient, learner.opt_state["critics"])
    critics = optax.apply_updates(learner.critics, step)

    updates = learner.updates + 1
    due = updates % args.target_network_frequency == 0
    targets = optax.incremental_update(critics, learner.targets, jnp.where(due, args.tau, 0.0))
    learner = learner.replace(
        critics=critics,
        targets=targets,
        opt_state=learner.opt_state | {"critics": opt_state},
        updates=updates,
    )
    return learner, metrics


def update_actor(
    args: Args, env: Env, mb: Transition, learner: Learner, noise: jax.Array
) -> tuple[Learner, dict[str, jax.Array]]:
    """One step of the actor and, with --autotune, of the temperature.

    noise: [B, A]. learner and noise come last, for lax.scan.
    """
    (loss, logprob), gradient = jax.value_and_grad(actor_loss, argnums=2, has_aux=True)(
        args, env, learner.actor, learner, mb, noise
    )
    gradient, loss, logprob = mean_over_devices((gradient, loss, logprob))
    step, opt_state = make_optimizer(args, "actor").update(gradient, learner.opt_state["actor"])
    metrics = {
        "losses/actor_loss": loss,
        "losses/alpha": jnp.exp(learner.log_alpha),
        "losses/entropy": -logprob,
    }
    learner = learner.replace(
        actor=optax.apply_updates(learner.actor, step),
        opt_state=learner.opt_state | {"actor": opt_state},
    )
    if not args.autotune:
        return learner, metrics

    # CleanRL draws new actions for this; those of the actor's loss save a pass, and lag by one
    # step.
    loss, gradient = jax.value_and_grad(alpha_loss, argnums=1)(env, learner.log_alpha, logprob)
    step, opt_state = make_optimizer(args, "alpha").update(gradient, learner.opt_state["alpha"])
    learner = learner.replace(
        log_alpha=learner.log_alpha + step,
        opt_state=learner.opt_state | {"alpha": opt_state},
    )
    return learner, metrics | {"losses/alpha_loss": loss}


def when(
    due: jax.Array, change, learner: Learner, *operands
) -> tuple[Learner, dict[str, jax.Array]]:
    """change(learner, *operands) -> (learner, metrics), where it is due.

    Else the learner as it is, and metrics that are NaN.
    """

    def skip(learner: Learner, *operands):
        _, metrics = jax.eval_shape(change, learner, *operands)
        nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), metrics)
        return learner, nothing

    return jax.lax.cond(due, change, skip, learner, *operands)


def update(
    args: Args, env: Env, learner: Learner, mb: Transition
) -> tuple[Learner, dict[str, jax.Array]]:
    """One update by a minibatch [B, ...]: critics, targets, actor and temperature.

    Each device has its own share of the minibatch. Returns the learner, and metrics by tag.
    """
    target_key, actor_key = jax.random.split(device_key(learner.key, learner.updates))
    target_noise = jax.random.normal(target_key, mb.action.shape)
    learner, critic_metrics = update_critics(args, env, learner, mb, target_noise)

    # As many steps of the actor as it has missed; each has its own noise.
    actor_noise = jax.random.normal(actor_key, (args.policy_frequency, *mb.action.shape))
    catch_up = partial(jax.lax.scan, partial(update_actor, args, env, mb))
    due = learner.updates % args.policy_frequency == 0
    learner, actor_metrics = when(due, catch_up, learner, actor_noise)

    skipped = [opt_state.notfinite_count for opt_state in learner.opt_state.values()]
    metrics = critic_metrics | {tag: values.mean() for tag, values in actor_metrics.items()}
    # A float, so that it can be NaN where there is no update.
    metrics |= {"charts/skipped_in_a_row": jnp.stack(skipped).max().astype(float)}
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


def learn(
    args: Args, env: Env, learner: Learner, mbs: Transition
) -> tuple[Learner, dict[str, jax.Array]]:
    """All updates after one step of the worlds, by minibatches [K, B, ...].

    Returns the learner, and metrics [K] by tag, which are NaN before the first update.
    """
    learner = learner.replace(steps=learner.steps + 1)
    updates = partial(jax.lax.scan, partial(update, args, env))
    return when(learner.steps >= args.random_steps, updates, learner, mbs)


def summarize(
    learner: Learner, worlds: Worlds, metrics: dict[str, jax.Array], report: Report
) -> dict[str, jax.Array]:
    """What goes to TensorBoard, by tag; what is NaN is not logged.

    metrics: [T, K] each, of the updates; report: [T, N, ...], of all devices.
    """
    episodes = report.finished.sum()
    returns = (report.finished * report.end.episode_return).sum()
    lengths = (report.finished * report.end.episode_length).sum()
    summary = {tag: jnp.nanmean(values) for tag, values in metrics.items()}
    summary |= {
        "charts/episodic_return": returns / episodes,
        "charts/episodic_length": lengths / episodes,
        "charts/episodes_finished": episodes,
        "charts/nan_resets": worlds.times_broken.sum(),
        "charts/skipped_in_a_row": jnp.nanmax(metrics["charts/skipped_in_a_row"]),
        "charts/skipped_updates": sum(
            opt_state.total_notfinite for opt_state in learner.opt_state.values()
        ),
        "angles": report.start.data.qpos[:, :4, 0],  # of four pendulums, for tools/
    }
    valid = ~report.end.env_state.info["broken"]
    for name, term in report.end.env_state.metrics.items():
        tag = name.replace("_", "/", 1)  # reward_x -> reward/x
        summary[tag] = masked_mean(term, valid)
    return summary


def device_iteration(args: Args, env: Env, state: TrainState) -> tuple[TrainState, tuple]:
    """num_steps times: step one device's worlds, write to its buffer, update.

    Returns the next state; and metrics [T, K], report [T, N, ...] and this device's black box.
    """

    def step(state: TrainState, _):
        worlds, transition, report = interact(args, env, state.learner, state.worlds)
        buffer = write(state.buffer, state.learner.steps, transition)
        indices = draw(args, state.learner, len(transition.reward))
        learner, metrics = learn(args, env, state.learner, gather(buffer, indices))
        return TrainState(learner=learner, worlds=worlds, buffer=buffer), (metrics, report)

    state, (metrics, report) = jax.lax.scan(step, state, None, length=args.num_steps)
    learner = state.learner.replace(iteration=state.learner.iteration + 1)
    box = black_box(report.start, report.action, report.end.env_state.info["broken"])
    return state.replace(learner=learner), (metrics, report, box)


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
        out_specs=(STATE_SPEC, (P(), P(None, "devices"), P("devices"))),
        check_vma=False,
    )
    state, (metrics, report, box) = run(state)
    return state, summarize(state.learner, state.worlds, metrics, report) | {"black_box": box}


# ---- You may stop reading here: what follows is evaluation, files and the command line -----------


# ---- 11. Evaluation ------------------------------------------------------------------------------
def export_policy(env: Env, learner: Learner) -> dict[str, np.ndarray]:
    """All that the deterministic policy needs: largest torque, layers w0, b0, w1, ..."""
    policy = {"max_torque": np.float32(env.task.max_torque)}
    layers = jax.device_get(learner.actor["params"])
    for name, layer in layers.items():  # Dense_0, Dense_1, ...
        number = name.removeprefix("Dense_")
        is_last = int(number) == len(layers) - 1
        outputs = env.action_size if is_last else None  # without the standard deviations
        policy["w" + number] = layer["kernel"][:, :outputs]
        policy["b" + number] = layer["bias"][:outputs]
    return policy


def act(policy: dict, memory: tuple, obs, xp=np) -> tuple[tuple, Any]:
    """The exported policy: its memory and observations [..., O] -> next memory, torques.

    The torques [..., A] in Nm are the distribution's median. NumPy suffices.
    """
    x = obs
    last = sum(name.startswith("w") for name in policy) - 1
    for i in range(last):
        x = xp.maximum(x @ policy[f"w{i}"] + policy[f"b{i}"], 0.0)
    mean = x @ policy[f"w{last}"] + policy[f"b{last}"]
    return memory, policy["max_torque"] * xp.tanh(mean)


class CMujocoEnv:
    """The task in C MuJoCo, with Gymnasium's interface."""

    def __init__(self, env: Env):
        self.task = env.task
        self.model = load_model(env.task)
        self.data = mujoco.MjData(self.model)
        self.elapsed = 0  # steps since the reset
        self.start = jax.jit(kernel(env.reset))

    def reset(self, seed: int):
        start = jax.device_get(self.start(jax.random.key(seed)).data)
        self.data.qpos = start.qpos
        self.data.qvel = start.qvel
        self.elapsed = 0
        return observe(self.data.qpos, self.data.qvel, np), {}

    def step(self, action):
        task = self.task
        data = self.data
        qpos = data.qpos.copy()
        data.ctrl = np.clip(action, -task.max_torque, task.max_torque)
        terms = reward_terms(qpos, data.qvel, data.ctrl, np)

        mujoco.mj_step(self.model, data)
        data.qvel = np.clip(data.qvel, -task.max_speed, task.max_speed)
        data.qpos = wrap(qpos + task.dt * data.qvel)
        self.elapsed += 1
        truncated = self.elapsed >= task.time_limit
        return observe(data.qpos, data.qvel, np), sum(terms.values()), False, truncated, {}


def make_gymnasium(env: Env):
    """Gymnasium's own environment of the task; None if it is another task."""
    if env.task != TASKS["Pendulum-v1"] or not importlib.util.find_spec("gymnasium"):
        return None
    return importlib.import_module("gymnasium").make("Pendulum-v1")


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


class PendulumLog(Log):
    """The log, which keeps the angles of some pendulums as well, for tools/."""

    def write(self, iteration: int, metrics: dict) -> dict:
        gathered = to_arrays(metrics.pop("angles"))  # from all processes
        (angles,) = gathered.values()  # [T, 4] rad
        values = super().write(iteration, metrics)
        tensor = Summary.Value(tag="angles", tensor=make_tensor_proto(angles))
        step = iteration * self.args.steps_per_iteration
        self.write_event(step, summary=Summary(value=[tensor]))
        return values


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
    require(args.env_id in TASKS, f"--env-id {args.env_id}: no such task")

    steps = args.steps_per_iteration
    message = f"--total-timesteps {args.total_timesteps}: less than an iteration of {steps}"
    require(args.num_iterations, message)
    message = f"--buffer-size {args.buffer_size}: less than one step of {args.num_envs} worlds"
    require(args.buffer_rows, message)


# ---- 14. Main ------------------------------------------------------------------------------------
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


def check_sizes(args: Args, env: Env, mesh: Mesh) -> None:
    """Refuse what the memory cannot hold, before anything is made."""
    buffer = jax.eval_shape(partial(init_buffer, args, env))
    check_memory(mesh, count_bytes(buffer), "--buffer-size")
    rest = jax.eval_shape(partial(init_learner_and_worlds, args, env), jax.random.key(0))
    check_memory(mesh, count_bytes(rest))


def build(args: Args, env: Env, mesh: Mesh) -> Programs:
    """The state before training, and all programs of a run, compiled."""
    slowly = "" if onekernel else "; without the folder onekernel beside it, XLA's slow physics"
    say(f"building {args.env_id} for {mesh.size} x {mesh.devices[0].device_kind}{slowly}")
    state = init_train_state(args, env, mesh, jax.random.key(args.seed))

    say("compiling the training iteration")
    start = time.perf_counter()
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    iterate = train_iteration.lower(args, env, mesh, state).compile()
    policy = export_policy(env, state.learner)
    eval_keys = jax.vmap(jax.random.key)(evaluation_seed(args) + jnp.arange(args.eval_episodes))
    evaluate = evaluate_mjx.lower(env, policy, eval_keys).compile()

    memory = iterate.memory_analysis()  # of one device
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    facts = {
        "compile_s": round(time.perf_counter() - start, 2),
        "compile_cache": "hit" if any("cache_hits" in event for event in events) else "miss",
        "bytes_per_world": count_bytes(state.worlds) // args.num_envs,
        "buffer_bytes": count_bytes(state.buffer),
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


def train(args: Args, run_dir: Path | None = None) -> tuple[Path, dict]:
    """Train from the start, or from the newest checkpoint of run_dir.

    Returns the run's folder and its policy.
    """
    check_log(args)
    stops = listen()
    resuming = run_dir is not None
    mesh = make_mesh(args.num_devices, args.num_envs, args.batch_size)
    args = dataclasses.replace(args, num_devices=mesh.size, **call_flags(Args))
    env = Env(args)
    check_sizes(args, env, mesh)
    run_dir = open_run_dir(args, run_dir)

    programs = build(args, env, mesh)
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
    log = PendulumLog(args, run_dir, first)
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
    return run_dir, policy


def evaluate_run(args: Args, run_dir: Path) -> None:
    """What --evaluate does."""
    env = Env(read_run(run_dir))
    with or_fail(f"--evaluate {run_dir}: no policy"):
        with np.load(run_dir / "policy.npz", allow_pickle=False) as file:
            policy = dict(file)
    tell_changes(run_dir, load_model(env.task))
    judge(args, env, policy)


def smoke(args: Args) -> None:
    """A short run, the same run resumed from its middle, and a comparison of both ends."""
    versions = {importlib.metadata.version(name) for name in ("mujoco", "mujoco-mjx")}
    require(len(versions) == 1, f"--smoke: mujoco and mujoco-mjx differ: {versions}", 1)

    with tempfile.TemporaryDirectory() as folder:
        short = dataclasses.replace(
            args,
            num_envs=64,
            num_steps=8,
            batch_size=64,
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


def main(argv: list[str]) -> None:
    """Do what the command line asks for."""
    # Parsed twice: the task decides what the other flags default to, and what --help shows of them.
    task = TASKS[parse_args(without_help(argv)).env_id]
    args = parse_args(argv, Args(**task_flags(task)))
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


if __name__ == "__main__":
    main(sys.argv[1:])
