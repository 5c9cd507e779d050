# /// script
# requires-python = ">=3.11"
# dependencies = ["flax==0.12.6", "imageio[ffmpeg]==2.38.1", "jax==0.9.2", "llvmlite==0.50.0",
#   "matplotlib==3.11.2", "mujoco==3.17.0", "mujoco-mjx==3.17.0", "optax==0.2.8", "tensorboard==2.21.0",
#   "tensorboardX==2.6.5", "tqdm==4.70.1", "typeguard==4.6.0", "tyro==1.0.17"]
# ///
"""SAC on a thousand pendulums at once, on MuJoCo XLA (MJX): one file, one jitted program per iteration.

    python sac_mjx_pendulum.py                         swing up Gymnasium's Pendulum-v1; --live shows it in a window
    python sac_mjx_pendulum.py --resume runs/NAME      go on, bit for bit, where a run stopped
    python sac_mjx_pendulum.py --evaluate runs/NAME    judge its policy in MJX, in C MuJoCo and in Gymnasium
    python sac_mjx_pendulum.py --smoke                 check the set-up of this machine
The map: 1 settings, 2 model, 3 environment, 4 networks, 5 replay buffer, 6 training state, 7 acting, 8 losses,
9 update, 10 the iteration; then bookkeeping: 11 evaluation, 12 log and files, 13 command line, 14 pictures, 15 main.
Shapes: T = num_steps, N = worlds on this device, K = updates_per_step, B = transitions of one update on this device,
C = rows of the buffer, O = observation, A = action, E = episodes. Details and names follow CleanRL's
sac_continuous_action.py and arXiv:1812.05905; docs/sac_mjx_pendulum.md has all metrics, ppo_mjx.py the shared blocks.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import math
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Literal

START = time.perf_counter()
if __name__ == "__mp_main__":  # this process shows the window; training goes first, and answers signals
    os.nice(19)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
os.environ.setdefault("JAX_LOGGING_LEVEL", "CRITICAL")  # else XLA prints pages of CPU features on a cache hit

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
from tqdm import tqdm

with contextlib.redirect_stdout(io.StringIO()):  # it tells everyone that the optional Warp backend is missing
    from mujoco import mjx

if hide_torch := "torch" not in sys.modules:
    sys.modules["torch"] = None  # else tensorboardX imports it where it is installed, which takes seconds
from tensorboardX import SummaryWriter
from tensorboardX.event_file_writer import EventFileWriter
from tensorboardX.proto.summary_pb2 import Summary

if hide_torch:
    del sys.modules["torch"]

try:
    import onekernel.mjx
except ImportError:  # in a copy of this file alone; its physics go by XLA, slowly
    onekernel = None

# ---- 1. Settings ----------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Args:
    """SAC on a thousand pendulums, on MuJoCo XLA."""
    # The run
    exp_name: str = "sac_mjx_pendulum"  # name of the experiment, part of the run folder's name
    seed: int = 1  # every random number follows from it and the number of devices
    num_devices: int | None = None  # that share the worlds; by default as many GPUs or CPU cores as divide the work
    runs_dir: str = "runs"  # where the run folders are made
    track: bool = False  # log to Weights & Biases too; its project is WANDB_PROJECT
    live: bool = False  # show pendulums and curves in a window while training goes on
    capture_video: bool = False  # write the same picture as an mp4 after training
    checkpoint_every: int = 50  # iterations between checkpoints, buffer included; the last three are kept
    compile_cache: bool = True  # keep compiled programs in the user's cache folder, for a quicker start next time
    resume: str | None = None  # run folder to go on with, by the settings that it was started with
    evaluate: str | None = None  # run folder whose policy to judge; nothing is trained
    coordinator_address: str | None = None  # host:port of process 0, if several train together; auto: ask the cluster
    num_processes: int | None = None  # that train together, each with its own devices
    process_id: int | None = None  # of this one, from 0
    smoke: bool = False  # build, train, save, resume and evaluate in short, and tell what works
    # The environment; what is None is the task's own (see TASKS)
    env_id: Literal["Pendulum-v1", "PointMass"] = "Pendulum-v1"  # a rod, equal to Gymnasium's; or a mass at its end
    gravity: float | None = None  # m/s^2
    length: float | None = None  # m
    mass: float | None = None  # kg
    dt: float | None = None  # s, of one step
    max_torque: float | None = None  # Nm
    max_speed: float | None = None  # rad/s
    eval_every: int = 10  # iterations between evaluations in MJX; 0 for none
    eval_episodes: int = 100  # episodes of each evaluation
    # The algorithm, by CleanRL's names
    total_timesteps: int = 512_000  # environment steps, over all worlds
    num_envs: int = 1024  # worlds, over all devices
    num_steps: int = 20  # steps of each world in one iteration
    updates_per_step: int = 8  # updates after each step of the worlds
    buffer_size: int = 1_048_576  # transitions in the replay buffer, over all worlds; the oldest give way
    buffer_device: Literal["device", "host"] = "device"  # host: in the machine's memory, for a large one
    batch_size: int = 256  # transitions in one update, over all devices
    learning_starts: int = 5120  # environment steps by a random policy before the first update
    policy_lr: float = 3e-3  # Adam's step size for the actor
    q_lr: float = 3e-3  # Adam's step size for the critics and the temperature
    reward_scale: float = 0.1  # factor of the rewards that the critics learn from
    gamma: float = 0.98  # discount
    tau: float = 0.01  # share of the critics that goes into their targets
    policy_frequency: int = 1  # updates of the critics between those of the actor, then as many of these
    target_network_frequency: int = 1  # updates of the critics between those of their targets
    autotune: bool = True  # tune the temperature, so that the policy's entropy is minus the number of actions
    alpha: float = 0.2  # temperature (weight of the entropy) without --autotune
    hidden_sizes: tuple[int, ...] = (64, 64)  # widths of the ReLU layers, of the actor and of each critic

    @property
    def steps_per_iteration(self) -> int:
        return self.num_envs * self.num_steps
    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.steps_per_iteration
    @property
    def random_steps(self) -> int:
        """Steps of each world before the first update."""
        return math.ceil(self.learning_starts / self.num_envs)

# ---- 2. Model -------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Task:
    """A pendulum on a motor, in SI units. Its angle is 0 upright."""
    gravity: float
    length: float
    mass: float
    dt: float
    max_torque: float
    max_speed: float
    center: float  # where the centre of mass is, as a share of the length
    inertia: float  # about the centre of mass, in units of mass * length^2
    time_limit: int = 200  # steps

TASKS = {
    "Pendulum-v1": Task(10.0, 1.0, 1.0, 0.05, 2.0, 8.0, center=0.5, inertia=1 / 12),  # gymnasium 1.4.0: a thin rod
    # 4 Nm are 0.41 of the torque that holds it level (Pendulum-v1: 0.4), so it must swing to and fro to come up.
    "PointMass": Task(9.81, 1.0, 1.0, 0.05, 4.0, 8.0, center=1.0, inertia=1e-9),
}

MJCF = """<mujoco model="pendulum">
  <option timestep="{dt}" gravity="0 0 -{gravity}" integrator="Euler"><flag constraint="disable"/></option>
  <worldbody><body><joint name="hinge" type="hinge" axis="0 1 0"/>
    <inertial pos="0 0 {center}" mass="{mass}" diaginertia="{inertia} {inertia} {inertia}"/></body></worldbody>
  <actuator><motor joint="hinge"/></actuator>
</mujoco>"""

def load_model(task: Task) -> mujoco.MjModel:
    center, inertia = task.center * task.length, task.inertia * task.mass * task.length**2
    return mujoco.MjModel.from_xml_string(MJCF.format(**vars(task) | {"center": center, "inertia": inertia}))

# ---- 3. Environment -------------------------------------------------------------------------------------------------
@struct.dataclass
class Physics:
    """The smallest state that determines the future."""
    qpos: jax.Array  # [1] rad, from -pi to pi, 0 upright
    qvel: jax.Array  # [1] rad/s

@struct.dataclass
class State:
    """One world between two steps; names are MuJoCo Playground's."""
    data: Physics
    obs: jax.Array  # [O] = [3]
    reward: jax.Array
    done: jax.Array  # float, 1 if the episode terminated; the time limit is told apart, in info
    metrics: dict[str, jax.Array]  # the reward's terms
    info: dict[str, jax.Array]  # elapsed: steps since the reset; truncated: by the time limit; broken: see Env

def wrap(angle):
    """The same angle from -pi to pi."""
    return (angle + math.pi) % (2 * math.pi) - math.pi

def observe(qpos, qvel, xp=jnp):
    """Cosine and sine of the angle, and the speed: [..., 1], [..., 1] -> [..., 3]. xp is jax.numpy or numpy."""
    return xp.concatenate([xp.cos(qpos), xp.sin(qpos), qvel], axis=-1)

def reward_terms(qpos, qvel, torque, xp=jnp) -> dict:
    """The reward is their sum: of the state before the step, and of the torque in Nm; all are [..., 1]."""
    costs = {"angle": xp.square(wrap(qpos)), "speed": 0.1 * xp.square(qvel), "torque": 0.001 * xp.square(torque)}
    return {f"reward_{name}": -cost[..., 0] for name, cost in costs.items()}

# shared: physics
def physics_step(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """One step of one world's physics.

    onekernel's step is MJX's, but its solver stops as soon as it has converged, and its frame of
    friction for steep capsules is C MuJoCo's.
    """
    if onekernel:
        return onekernel.mjx.step(model, data)
    with jax.default_matmul_precision("highest"):  # TF32, a GPU's default, is too coarse
        return mjx.step(model, data)


@cache
def kernel(function):
    """A function of one world as one kernel for all: jax.vmap(kernel(env.step))(states, actions).

    Without onekernel, the function itself, for XLA.
    """
    return onekernel.compile(function) if onekernel else function


# end shared

class Env:
    """One world of a task; `reset` and `step` are pure, for jax.vmap, and the object holds nothing that changes.
    A world that is not finite is broken: its step ends the episode, earns nothing, and the observation stays. Nothing is
    learnt from it: to earn nothing is the best there is on this task.
    """
    action_size, observation_size = 1, 3

    def __init__(self, args: Args):
        numbers = ("gravity", "length", "mass", "dt", "max_torque", "max_speed")
        changes = {name: getattr(args, name) for name in numbers if getattr(args, name) is not None}
        self.task = dataclasses.replace(TASKS[args.env_id], **changes)
        self.gymnasium_id = "Pendulum-v1" if self.task == TASKS["Pendulum-v1"] else None
        self.model = mjx.put_model(load_model(self.task), jax.local_devices()[0], impl="jax")
        self.template = mjx.make_data(self.model, jax.local_devices()[0])

    def reset(self, key: jax.Array) -> State:
        """A new episode, anywhere on the circle and slow. key: one PRNG key."""
        qpos_key, qvel_key = jax.random.split(key)
        qpos = jax.random.uniform(qpos_key, (1,), minval=-math.pi, maxval=math.pi)
        qvel = jax.random.uniform(qvel_key, (1,), minval=-1.0, maxval=1.0)
        zero, no = jnp.zeros(()), jnp.array(False)
        metrics = dict.fromkeys(reward_terms(qpos, qvel, qvel), zero)
        info = {"elapsed": jnp.zeros((), jnp.int32), "truncated": no, "broken": no}
        return State(Physics(qpos, qvel), observe(qpos, qvel), reward=zero, done=zero, metrics=metrics, info=info)

    def step(self, state: State, action: jax.Array) -> State:
        """One step. action [1]: the torque in Nm, clipped to the task's limits."""
        task, data = self.task, state.data
        torque = jnp.clip(action, -task.max_torque, task.max_torque)
        full = physics_step(self.model, self.template.replace(qpos=data.qpos, qvel=data.qvel, ctrl=torque))
        sane = jnp.isfinite(full.qvel).all()
        qvel = jnp.clip(full.qvel, -task.max_speed, task.max_speed)
        qpos = wrap(data.qpos + task.dt * qvel)  # as Euler's method does it, but by the clipped speed
        terms = reward_terms(data.qpos, data.qvel, torque)
        terms = {name: jnp.where(sane, term, 0.0) for name, term in terms.items()}
        obs, elapsed = jnp.where(sane, observe(qpos, qvel), state.obs), state.info["elapsed"] + 1
        info = {"elapsed": elapsed, "truncated": elapsed >= task.time_limit, "broken": ~sane}
        return State(Physics(qpos, qvel), obs, sum(terms.values()), done=1.0 - sane, metrics=terms, info=info)

# ---- 4. Networks ----------------------------------------------------------------------------------------------------
class MLP(nn.Module):
    """ReLU layers: [..., in] -> [..., out]."""
    hidden_sizes: tuple[int, ...]
    out: int
    @nn.compact
    def __call__(self, x):
        for width in self.hidden_sizes:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.out)(x)

def make_networks(args: Args, env: Env) -> tuple[nn.Module, nn.Module]:
    """The actor gives [..., 2 * A], means and raw log-stds; the critics give [2, ..., 1], each by its own weights."""
    twins = nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
    return MLP(args.hidden_sizes, 2 * env.action_size), twins(args.hidden_sizes, 1)

def sample_action(actor_output: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squashed Gaussian (arXiv:1812.05905, appendix C): actor_output [..., 2 * A], standard normal noise [..., A] ->
    actions [..., A] in (-1, 1), log density [...]; log(1 - tanh(u)^2) is written so that it is finite for any u."""
    mean, raw = jnp.split(actor_output, 2, axis=-1)
    log_std = -5.0 + 3.5 * (jnp.tanh(raw) + 1.0)  # from -5 to 2
    u = mean + jnp.exp(log_std) * noise
    log_slope = 2 * (math.log(2) - u - nn.softplus(-2 * u))
    return jnp.tanh(u), (-0.5 * jnp.square(noise) - log_std - 0.5 * math.log(2 * math.pi) - log_slope).sum(axis=-1)

# ---- 5. Replay buffer -----------------------------------------------------------------------------------------------
@struct.dataclass
class Transition:
    """One step of one world: what was seen and done, and what came of it."""
    obs: jax.Array  # [O]
    action: jax.Array  # [A] in [-1, 1]
    reward: jax.Array
    next_obs: jax.Array  # [O] where the step ended, before any reset
    terminated: jax.Array  # float, 1 or 0; a time limit does not terminate
    valid: jax.Array  # bool; False where the world broke, or where nothing was written yet

def buffer_rows(args: Args) -> int:
    return args.buffer_size // args.num_envs

def init_buffer(args: Args, env: Env, xp=jnp) -> Transition:
    """An empty ring [C, N, ...] over the last C steps of all worlds: step t lies in row t % C. xp: where it lies."""
    shape, obs, action = (buffer_rows(args), args.num_envs), (env.observation_size,), (env.action_size,)
    floats = (xp.zeros((*shape, *width), xp.float32) for width in (obs, action, (), obs, ()))
    return Transition(*floats, valid=xp.zeros(shape, bool))

def write(buffer: Transition, t, step: Transition) -> Transition:
    """Put step t of all worlds, [N, ...], into the ring; if that is NumPy's, in place."""
    row = t % len(buffer.reward)
    if isinstance(buffer.reward, jax.Array):
        return jax.tree.map(lambda ring, new: ring.at[row].set(new), buffer, step)
    for ring, new in zip(jax.tree.leaves(buffer), jax.tree.leaves(step), strict=True):
        ring[row] = new
    return buffer

def draw(args: Args, key: jax.Array, written, num_worlds: int) -> tuple[jax.Array, jax.Array]:
    """Rows and worlds of the next minibatches, uniform over the steps written so far: two of int32 [K, B]."""
    row_key, world_key = jax.random.split(key)
    shape = (args.updates_per_step, args.batch_size // jax.lax.axis_size("devices"))
    rows = jax.random.randint(row_key, shape, 0, jnp.minimum(written, buffer_rows(args)))
    return rows, jax.random.randint(world_key, shape, 0, num_worlds)

def gather(buffer: Transition, indices: tuple) -> Transition:
    """Minibatches [K, B, ...] of the transitions at (rows, worlds)."""
    return jax.tree.map(lambda ring: ring[indices], buffer)

# ---- 6. Training state ----------------------------------------------------------------------------------------------
@struct.dataclass
class Learner:
    """What is learnt; the same on every device."""
    actor: dict  # Flax parameters
    critics: dict  # of both, stacked
    targets: dict  # the critics, slowly followed
    log_alpha: jax.Array  # log of the temperature
    opt: dict[str, optax.OptState]  # of actor, critics and alpha
    key: jax.Array  # of the minibatches and of the noise in the losses
    steps: jax.Array  # int32, steps done by each world
    updates: jax.Array  # int32, updates done
    iteration: jax.Array  # int32, iterations done

@struct.dataclass
class Worlds:
    """What belongs to one world: [N, ...], split over the devices; its own key makes it the same on any device."""
    env_state: State
    key: jax.Array
    episode_return: jax.Array
    episode_length: jax.Array  # int32
    broken: jax.Array  # int32, how often this world broke

@struct.dataclass
class TrainState:
    """All that a run's future depends on; a checkpoint is this and the settings."""
    learner: Learner
    worlds: Worlds
    buffer: Transition  # [C, N, ...], in the device's or, as NumPy arrays, in the host's memory
STATE_SPEC = TrainState(P(), P("devices"), P(None, "devices"))

def make_optimizer(args: Args, name: str) -> optax.GradientTransformation:
    adam = optax.adam(args.policy_lr if name == "actor" else args.q_lr)
    return optax.apply_if_finite(adam, 2**31 - 1)  # a gradient that is not finite is skipped and counted

def init_learner_and_worlds(args: Args, env: Env, key: jax.Array) -> tuple[Learner, Worlds]:
    actor_key, critics_key, learner_key, reset_key, clock_key, world_key = jax.random.split(key, 6)
    (actor, critics), n, zero = make_networks(args, env), args.num_envs, jnp.zeros((), jnp.int32)
    actor_params = actor.init(actor_key, jnp.zeros(env.observation_size))
    critics_params = critics.init(critics_key, jnp.zeros(env.observation_size + env.action_size))
    log_alpha = jnp.float32(0.0 if args.autotune else math.log(args.alpha))
    opt = {"actor": actor_params, "critics": critics_params, "alpha": log_alpha}
    opt = {name: make_optimizer(args, name).init(params) for name, params in opt.items()}
    learner = Learner(actor=actor_params, critics=critics_params, targets=critics_params, log_alpha=log_alpha,
                      opt=opt, key=learner_key, steps=zero, updates=zero, iteration=zero)
    env_state = jax.vmap(kernel(env.reset))(jax.random.split(reset_key, n))
    # The worlds' clocks start at random, so that their time limits do not come all at once.
    env_state.info["elapsed"] = jax.random.randint(clock_key, (n,), 0, env.task.time_limit)
    counts = jnp.zeros(n, jnp.int32)
    return learner, Worlds(env_state, jax.random.split(world_key, n), jnp.zeros(n), counts, counts)

def init_train_state(args: Args, env: Env, mesh: Mesh, key: jax.Array) -> TrainState:
    """The start of a run, split over the mesh's devices."""
    specs = jax.tree.map(partial(NamedSharding, mesh), STATE_SPEC)
    start = jax.jit(partial(init_learner_and_worlds, args, env), out_shardings=(specs.learner, specs.worlds))
    ring = init_buffer(args, env, np) if args.buffer_device == "host" else jax.jit(
        partial(init_buffer, args, env), out_shardings=specs.buffer)()
    return TrainState(*start(key), ring)

# ---- 7. Acting ------------------------------------------------------------------------------------------------------
def interact(args: Args, env: Env, learner: Learner, worlds: Worlds):
    """One step of all worlds, each episode from a fresh reset: at first by chance, then by the policy. Returns the
    worlds, their transitions [N, ...], what there is to tell [N], and the indices to draw from the buffer next."""
    key, action_key, reset_key = jnp.unstack(jax.vmap(partial(jax.random.split, num=3))(worlds.key), axis=1)
    obs, (actor, _) = worlds.env_state.obs, make_networks(args, env)
    noise = jax.vmap(partial(jax.random.normal, shape=(env.action_size,)))(action_key)
    action, _ = sample_action(actor.apply(learner.actor, obs), noise)
    by_chance = 2 * jax.scipy.stats.norm.cdf(noise) - 1  # uniform from -1 to 1
    action = jnp.where(learner.steps < args.random_steps, by_chance, action)
    state = jax.vmap(kernel(env.step))(worlds.env_state, env.task.max_torque * action)
    broken, done = state.info["broken"], (state.done > 0) | state.info["truncated"]
    end = Worlds(state, key, worlds.episode_return + state.reward, worlds.episode_length + 1, worlds.broken + broken)
    finished = done & ~broken & (end.episode_length == state.info["elapsed"])  # whole episodes only
    zeros, counts = jnp.zeros_like(end.episode_return), jnp.zeros_like(end.episode_length)
    fresh = Worlds(jax.vmap(kernel(env.reset))(reset_key), key, zeros, counts, end.broken)
    select = jax.vmap(lambda done, new, old: jax.tree.map(partial(jnp.where, done), new, old))
    told = {"episodes": finished, "returns": finished * end.episode_return, "lengths": finished * end.episode_length,
            "angle": worlds.env_state.data.qpos[:, 0]} | state.metrics
    told["steps"] = {"start": worlds.env_state, "action": env.task.max_torque * action, "broken": broken}
    step = Transition(obs, action, state.reward, state.obs, state.done, valid=~broken)
    draw_key = jax.random.fold_in(jax.random.fold_in(learner.key, -1 - learner.steps), jax.lax.axis_index("devices"))
    return select(done, fresh, end), step, told, draw(args, draw_key, learner.steps + 1, len(obs))

# ---- 8. Losses ------------------------------------------------------------------------------------------------------
def masked_mean(x: jax.Array, valid: jax.Array) -> jax.Array:
    """The mean of x [B] where it is valid (bool [B]); 0 where nothing is."""
    return jnp.where(valid, x, 0.0).sum() / jnp.maximum(valid.sum(), 1)

def critic_target(args: Args, env: Env, learner: Learner, mb: Transition, noise: jax.Array) -> jax.Array:
    """What both critics should say of a minibatch [B], by the smaller of their targets. noise [B, A]."""
    actor, critics = make_networks(args, env)
    next_action, logprob = sample_action(actor.apply(learner.actor, mb.next_obs), noise)
    next_q = critics.apply(learner.targets, jnp.concatenate([mb.next_obs, next_action], axis=-1))[..., 0].min(axis=0)
    next_value = (1 - mb.terminated) * (next_q - jnp.exp(learner.log_alpha) * logprob)  # time limits end nothing
    return args.reward_scale * mb.reward + args.gamma * next_value

def critic_loss(args: Args, env: Env, params: dict, mb: Transition, target: jax.Array) -> tuple[jax.Array, dict]:
    """Mean squared errors of the critics (arXiv:1812.05905, equation 5), summed, and metrics. target [B]."""
    (_, critics), mean = make_networks(args, env), partial(masked_mean, valid=mb.valid)
    q1, q2 = critics.apply(params, jnp.concatenate([mb.obs, mb.action], axis=-1))[..., 0]
    q1_loss, q2_loss = mean(jnp.square(q1 - target)), mean(jnp.square(q2 - target))
    return q1_loss + q2_loss, {
        "losses/qf1_values": mean(q1), "losses/qf2_values": mean(q2), "losses/qf1_loss": q1_loss,
        "losses/qf2_loss": q2_loss, "losses/qf_loss": (q1_loss + q2_loss) / 2}

def actor_loss(args: Args, env: Env, params: dict, learner: Learner, mb, noise) -> tuple[jax.Array, jax.Array]:
    """Equation 7 of the same, for a minibatch [B] and noise [B, A]; and the mean log density of the actions."""
    actor, critics = make_networks(args, env)
    action, logprob = sample_action(actor.apply(params, mb.obs), noise)
    q = critics.apply(learner.critics, jnp.concatenate([mb.obs, action], axis=-1))[..., 0].min(axis=0)
    return masked_mean(jnp.exp(learner.log_alpha) * logprob - q, mb.valid), masked_mean(logprob, mb.valid)

def alpha_loss(env: Env, log_alpha: jax.Array, logprob: jax.Array) -> jax.Array:
    """Equation 18: the temperature falls while the entropy, -logprob, exceeds minus the number of actions."""
    return -jnp.exp(log_alpha) * (logprob - env.action_size)

# ---- 9. Update ------------------------------------------------------------------------------------------------------
def average(tree):
    """The mean over the devices. As one vector it takes one exchange, not one a leaf."""
    vector, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(vector, "devices"))

def update_actor(args: Args, env: Env, mb, learner: Learner, noise) -> tuple[Learner, dict[str, jax.Array]]:
    """One step of the actor and of the temperature, for a minibatch [B, ...] and noise [B, A]."""
    (loss, logprob), gradient = jax.value_and_grad(actor_loss, argnums=2, has_aux=True)(
        args, env, learner.actor, learner, mb, noise)
    gradient, loss, logprob = average((gradient, loss, logprob))
    step, opt = make_optimizer(args, "actor").update(gradient, learner.opt["actor"])
    metrics = {"losses/actor_loss": loss, "losses/alpha": jnp.exp(learner.log_alpha), "losses/entropy": -logprob}
    learner = learner.replace(actor=optax.apply_updates(learner.actor, step), opt=learner.opt | {"actor": opt})
    if args.autotune:
        loss, gradient = jax.value_and_grad(alpha_loss, argnums=1)(env, learner.log_alpha, logprob)
        step, opt = make_optimizer(args, "alpha").update(gradient, learner.opt["alpha"])
        learner = learner.replace(log_alpha=learner.log_alpha + step, opt=learner.opt | {"alpha": opt})
        metrics |= {"losses/alpha_loss": loss}
    return learner, metrics

def when(due: jax.Array, change, learner: Learner, *operands) -> tuple[Learner, dict[str, jax.Array]]:
    """change(learner, *operands) -> (learner, metrics) where it is due; else the learner as it is, and NaN."""
    def skip(learner: Learner, *operands):
        metrics = jax.eval_shape(change, learner, *operands)[1]
        return learner, jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), metrics)
    return jax.lax.cond(due, change, skip, learner, *operands)

def update(args: Args, env: Env, learner: Learner, mb: Transition) -> tuple[Learner, dict[str, jax.Array]]:
    """One update by a minibatch [B, ...], each device on its share: critics, targets, actor and temperature."""
    key = jax.random.fold_in(jax.random.fold_in(learner.key, learner.updates), jax.lax.axis_index("devices"))
    target_key, actor_key = jax.random.split(key)
    target = critic_target(args, env, learner, mb, jax.random.normal(target_key, mb.action.shape))
    gradient, metrics = average(jax.grad(critic_loss, argnums=2, has_aux=True)(args, env, learner.critics, mb, target))
    step, opt = make_optimizer(args, "critics").update(gradient, learner.opt["critics"])
    critics, updates = optax.apply_updates(learner.critics, step), learner.updates + 1
    tau = jnp.where(updates % args.target_network_frequency == 0, args.tau, 0.0)
    targets = optax.incremental_update(critics, learner.targets, tau)
    learner = learner.replace(critics=critics, targets=targets, updates=updates, opt=learner.opt | {"critics": opt})
    noise = jax.random.normal(actor_key, (args.policy_frequency, *mb.action.shape))
    updates_of_actor = partial(jax.lax.scan, partial(update_actor, args, env, mb))
    learner, actor_metrics = when(updates % args.policy_frequency == 0, updates_of_actor, learner, noise)
    skipped = jnp.stack([opt.notfinite_count for opt in learner.opt.values()]).max().astype(float)  # NaN: no update
    return learner, metrics | {tag: values.mean() for tag, values in actor_metrics.items()} | {
        "charts/skipped_in_a_row": skipped}

# ---- 10. One training iteration -------------------------------------------------------------------------------------
def learn(args: Args, env: Env, learner: Learner, mbs: Transition) -> tuple[Learner, dict[str, jax.Array]]:
    """All updates that follow one step of the worlds, by minibatches [K, B, ...]. Metrics [K], NaN without updates."""
    learner = learner.replace(steps=learner.steps + 1)
    return when(learner.steps >= args.random_steps, partial(jax.lax.scan, partial(update, args, env)), learner, mbs)

# shared: black_box
def black_box(start: State, action: jax.Array, broken: jax.Array) -> dict:
    """What the first world to break went through, for `dump`.

    Of all worlds [T, N, ...] -> [1, T, ...], so that the first axis is that of the devices.
    """
    world = jnp.unravel_index(jnp.argmax(broken), broken.shape)[1]
    steps = {"start": start, "action": action, "broken": broken}
    return jax.tree.map(lambda x: x[None, :, world], steps)


# end shared

def summarize(metrics: dict[str, jax.Array], told: dict[str, jax.Array], learner: Learner, worlds: Worlds) -> dict:
    """What goes to TensorBoard, from metrics [T, K] and what the worlds told [T, N]; NaN is not logged."""
    episodes = told["episodes"].sum()
    terms = {name.replace("_", "/", 1): told[name].mean() for name in told if name.startswith("reward_")}
    return {tag: jnp.nanmean(values) for tag, values in metrics.items()} | terms | {
        "charts/episodic_return": told["returns"].sum() / episodes, "charts/episodes_finished": episodes,
        "charts/episodic_length": told["lengths"].sum() / episodes, "charts/nan_resets": worlds.broken.sum(),
        "charts/skipped_in_a_row": jnp.nanmax(metrics["charts/skipped_in_a_row"]),
        "charts/skipped_updates": sum(opt.total_notfinite for opt in learner.opt.values()),
        "angles": told["angle"][:, :4]}

def device_iteration(args: Args, env: Env, state: TrainState):
    """num_steps times: step one device's worlds, write, update. Returns metrics [T, K], what was told [T, N], and the
    black box."""
    def step(state: TrainState, _):
        worlds, transition, told, indices = interact(args, env, state.learner, state.worlds)
        buffer = write(state.buffer, state.learner.steps, transition)
        learner, metrics = learn(args, env, state.learner, gather(buffer, indices))
        return TrainState(learner, worlds, buffer), (metrics, told)
    state, (metrics, told) = jax.lax.scan(step, state, None, length=args.num_steps)
    box = black_box(**told.pop("steps"))
    return state.replace(learner=state.learner.replace(iteration=state.learner.iteration + 1)), metrics, told, box

@partial(jax.jit, static_argnames=("args", "env", "mesh"), donate_argnames="state")
def train_iteration(args: Args, env: Env, mesh: Mesh, state: TrainState):
    """One iteration as one program over the mesh's devices; `state` is donated, its memory is used again."""
    run = jax.shard_map(partial(device_iteration, args, env), mesh=mesh, in_specs=(STATE_SPEC,),
                        out_specs=(STATE_SPEC, P(), P(None, "devices"), P("devices")), check_vma=False)
    state, metrics, told, box = run(state)
    return state, summarize(metrics, told, state.learner, state.worlds) | {"black_box": box}

def host_iteration(args: Args, mesh: Mesh, interact_program, learn_program, state: TrainState):
    """The same with the buffer in the host's memory: only minibatches go to the devices, a step at a time."""
    learner, worlds, buffer, history = state.learner, state.worlds, state.buffer, []
    share = np.repeat(np.arange(mesh.size), args.batch_size // mesh.size)  # whose part of a minibatch it is
    for _ in range(args.num_steps):
        worlds, transition, told, indices = interact_program(learner, worlds)
        transition, (rows, columns), t = jax.device_get((transition, indices, learner.steps))
        buffer = write(buffer, t, transition)
        mbs = gather(buffer, (rows, columns + share * (args.num_envs // mesh.size)))
        mbs = jax.device_put(mbs, NamedSharding(mesh, P(None, "devices")))
        learner, metrics = learn_program(learner, mbs)
        history.append((metrics, told))
    metrics, told = jax.tree.map(lambda *steps: jnp.stack(steps), *history)
    learner, box = learner.replace(iteration=learner.iteration + 1), black_box(**told.pop("steps"))
    return TrainState(learner, worlds, buffer), summarize(metrics, told, learner, worlds) | {"black_box": box}

def compile_iteration(args: Args, env: Env, mesh: Mesh, state: TrainState):
    """The iteration compiled, as a function of the state, and the programs that it consists of."""
    if args.buffer_device == "device":
        program = train_iteration.lower(args, env, mesh, state).compile()
        return program, [program]
    one, split, on_mesh = P("devices"), P(None, "devices"), partial(jax.shard_map, mesh=mesh, check_vma=False)
    acting = on_mesh(partial(interact, args, env), in_specs=(P(), one), out_specs=(one, one, one, split))
    learning = on_mesh(partial(learn, args, env), in_specs=(P(), split), out_specs=P())
    mbs = gather(state.buffer, tuple(np.zeros((2, args.updates_per_step, args.batch_size), int)))
    mbs = jax.device_put(mbs, NamedSharding(mesh, split))
    programs = [
        jax.jit(acting, donate_argnums=1).lower(state.learner, state.worlds).compile(),
        jax.jit(learning, donate_argnums=0).lower(state.learner, mbs).compile()]
    return partial(host_iteration, args, mesh, *programs), programs

# ---- 11. Evaluation -------------------------------------------------------------------------------------------------
def export_policy(env: Env, learner: Learner) -> dict[str, np.ndarray]:
    """All that the deterministic policy needs: the largest torque, and layers w0, b0, w1, ..."""
    layers, policy = jax.device_get(learner.actor["params"]), {"max_torque": np.float32(env.task.max_torque)}
    for name, layer in layers.items():  # Dense_0, Dense_1, ...
        outputs = env.action_size if name == f"Dense_{len(layers) - 1}" else None  # of the last layer, the means
        policy |= {name.replace("Dense_", "w"): layer["kernel"][:, :outputs]}
        policy |= {name.replace("Dense_", "b"): layer["bias"][:outputs]}
    return policy

def act(policy: dict, obs, xp=np):
    """The policy's torque for observations: [..., O] -> [..., A] in Nm. NumPy is enough to run it."""
    x, last = obs, len(policy) // 2 - 1
    for i in range(last):
        x = xp.maximum(x @ policy[f"w{i}"] + policy[f"b{i}"], 0.0)
    return policy["max_torque"] * xp.tanh(x @ policy[f"w{last}"] + policy[f"b{last}"])

class CMujocoEnv:
    """The task in C MuJoCo, with the interface of Gymnasium."""
    def __init__(self, env: Env):
        self.env, self.task, self.model = env, env.task, load_model(env.task)
        self.data, self.elapsed, self.start = mujoco.MjData(self.model), 0, jax.jit(kernel(env.reset))

    def reset(self, seed: int):
        start = jax.device_get(self.start(jax.random.key(seed)).data)
        self.data.qpos, self.data.qvel, self.elapsed = start.qpos, start.qvel, 0
        return observe(self.data.qpos, self.data.qvel, np), {}

    def step(self, action):
        task, data, qpos, qvel = self.task, self.data, self.data.qpos.copy(), self.data.qvel.copy()
        data.ctrl, self.elapsed = np.clip(action, -task.max_torque, task.max_torque), self.elapsed + 1
        reward = sum(reward_terms(qpos, qvel, data.ctrl, np).values())
        mujoco.mj_step(self.model, data)
        data.qvel = np.clip(data.qvel, -task.max_speed, task.max_speed)
        data.qpos = wrap(qpos + task.dt * data.qvel)
        return observe(data.qpos, data.qvel, np), reward, False, self.elapsed >= task.time_limit, {}

# shared: evaluation
@partial(jax.jit, static_argnames="env")
def evaluate_mjx(env: Env, policy: dict, keys: jax.Array) -> jax.Array:
    """Returns of one deterministic episode for each key, in MJX: [E] keys -> [E]."""

    def step(carry, _):
        state, alive, total = carry
        state = jax.vmap(kernel(env.step))(state, act(policy, state.obs, jnp))
        total += alive * state.reward
        alive &= state.done == 0
        return (state, alive, total), None

    state = jax.vmap(kernel(env.reset))(keys)
    start = (state, jnp.full(len(keys), True), jnp.zeros(len(keys)))
    (_, _, total), _ = jax.lax.scan(step, start, None, length=env.task.time_limit)
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
        over = False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(act(policy, obs))
            returns[episode] += reward
            over = terminated or truncated
            on_step()
    return returns


def judge(args: Args, env: Env, policy: dict) -> dict[str, dict[str, float]]:
    """Evaluate in each simulator at hand.

    Prints mean, std, min and max of the returns, and returns them by simulator.
    """
    episodes = args.eval_episodes
    keys = jax.vmap(jax.random.key)(args.seed + jnp.arange(episodes))
    returns = {}
    returns["MJX"] = np.asarray(evaluate_mjx(env, policy, keys))  # the starts of C MuJoCo's
    returns["C MuJoCo"] = evaluate_on_host(CMujocoEnv(env), policy, episodes, args.seed)
    if importlib.util.find_spec("gymnasium"):
        gymnasium = importlib.import_module("gymnasium")
        if env.gymnasium_id in gymnasium.registry:
            theirs = gymnasium.make(env.gymnasium_id)
            returns["Gymnasium"] = evaluate_on_host(theirs, policy, episodes, args.seed)

    print(f"return of {episodes:3} episodes     mean      std      min      max")
    table = {}
    for name, values in returns.items():
        table[name] = {key: float(getattr(values, key)()) for key in ("mean", "std", "min", "max")}
        print(f"{name:<22}" + "".join(f"{value:9.1f}" for value in table[name].values()))
    return table


# end shared

# ---- 12. Log and files ----------------------------------------------------------------------------------------------
# shared: log
def say(text: str) -> None:
    """Print a line with the seconds since the start; of several processes only the first does."""
    if jax.process_index() == 0:
        print(f"[{time.perf_counter() - START:5.1f} s] {text}", flush=True)


# TensorBoard's events go to their file at once: the library's thread loses its queue when the
# process is killed, and a full disk ends it unseen. Closing the file, at the latest when Python
# ends, does not report a full disk once more.
def write_event(self: EventFileWriter, event) -> None:
    self._ev_writer.write_event(event)


def close_file(self: EventFileWriter, close=EventFileWriter.close) -> None:
    with contextlib.suppress(OSError):
        close(self)


EventFileWriter.add_event = write_event
EventFileWriter.close = close_file


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
        self.dumped = False  # a broken world

        quiet = jax.process_index() > 0
        purge = self.first_step + 1 if first else 0  # what an interrupted run wrote from there on
        rows = [f"\n|{name}|{value}|" for name, value in dataclasses.asdict(args).items()]
        with writing(run_dir / "events*"):
            self.writer = SummaryWriter(str(run_dir), purge_step=purge, write_to_disk=not quiet)
            table = "|param|value|\n|-|-|" + "".join(rows)
            self.writer.add_text("hyperparameters", table, self.first_step)
        self.bar = tqdm(
            total=args.num_iterations * args.steps_per_iteration,
            initial=self.first_step,
            unit=" steps",
            unit_scale=True,
            disable=quiet or None,  # None: without a terminal
        )

    def scalars(self, step: int, values: dict) -> None:
        """Write all values that are finite, by tag, in one event: ten times as fast as one each."""
        with writing(self.run_dir / "events*"):
            rows = [
                Summary.Value(tag=tag, simple_value=float(value))
                for tag, value in values.items()
                if math.isfinite(value)
            ]
            self.writer.file_writer.add_summary(Summary(value=rows), step)
            self.writer.flush()

    def write(self, iteration: int, metrics: dict) -> dict:
        """Log the metrics of an iteration, with its black box. Returns them as numbers."""
        box = metrics.pop("black_box")
        step = iteration * self.args.steps_per_iteration
        values = jax.device_get(metrics)
        sps = (step - self.first_step) / (time.time() - self.start)
        values["charts/SPS"] = sps
        self.scalars(step, values)

        if values["charts/nan_resets"] and not self.dumped:
            self.dumped = dump(self.args, self.run_dir / "nan_dump.npz", box)
        skipped = values["charts/skipped_in_a_row"]  # NaN before the first update
        message = f"{self.run_dir}: step {step}: {skipped:.0f} gradients in a row are not finite"
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
    """For what may find a full disk."""
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
    if jax.process_index() > 0:
        return
    folder = run_dir / "checkpoints"
    with writing(folder):
        folder.mkdir(exist_ok=True)
        write_npz(run_dir / "policy.npz", policy)  # first: a resumed run starts at the checkpoint
        write_npz(folder / f"{int(state.learner.iteration):09}.npz", arrays)
        for old in [*checkpoints(run_dir)[3:], *folder.glob("*.part")]:
            old.unlink()


def restore(args: Args, run_dir: Path, state: TrainState) -> TrainState:
    """The newest whole checkpoint, in the place of `state`.

    `state` itself, if the run was stopped before its first checkpoint.
    """
    for file in checkpoints(run_dir):
        try:
            with np.load(file, allow_pickle=False) as arrays:
                saved = dict(arrays)  # which reads all, and compares the checksums
            theirs = json.loads(str(saved["args"]))
        except Exception as error:  # there is no end to what may be wrong with a file
            problem = f"{type(error).__name__}: {error!s:.80}"
            say(f"--resume: {file} is broken ({problem}); trying the one before")
            continue

        ours = json.loads(json.dumps(dataclasses.asdict(args)))  # with lists for tuples, as theirs
        names = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        message = f"--resume: {file} differs from run.json in {', '.join(names):.200}"
        require(not names, message)
        with or_fail(f"--resume: {file} was written by other code"):
            return from_arrays(saved, state)

    require(not checkpoints(run_dir), f"--resume: {run_dir} holds no whole checkpoint")
    return state


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

# ---- 13. Command line -----------------------------------------------------------------------------------------------
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


def split_cpu(args: Args) -> None:
    """Make a CPU as many devices as it has cores; as one, it would leave most of them idle."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    each = (args.num_devices or cores) // (args.num_processes or 1)
    with contextlib.suppress(RuntimeError):  # JAX has started already, with the devices it has
        jax.config.update("jax_num_cpu_devices", min(max(each, 1), 64))


def join_processes(args: Args) -> None:
    """Meet the other processes. What is None, JAX asks SLURM or Open MPI for."""
    auto = args.coordinator_address == "auto"
    with or_fail("--coordinator-address, --num-processes, --process-id"):
        jax.distributed.initialize(
            coordinator_address=None if auto else args.coordinator_address,
            num_processes=args.num_processes,
            process_id=args.process_id,
            heartbeat_timeout_seconds=20,
            shutdown_timeout_seconds=3600,
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
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    message = f"{flag}: this takes {size} bytes of the {room} that there are; try less"
    require(size < 0.95 * room, message)


# end shared

def check_args(args: Args) -> None:
    """Refuse what cannot run, before anything is built."""
    bounds = {field.name: (1, 1e9) for field in dataclasses.fields(args) if field.type in (int, int | None)}
    zero_up = "seed process_id eval_every learning_starts policy_lr q_lr gravity reward_scale"
    bounds |= dict.fromkeys(zero_up.split(), (0, 1e9))
    bounds |= dict.fromkeys("length mass max_torque max_speed".split(), (0.05, 1e4)) | {"dt": (1e-3, 0.2)}
    bounds |= {"gamma": (0, 1), "tau": (0, 1), "alpha": (1e-9, 1e9), "total_timesteps": (1, 2**62)}
    bounds |= {"eval_episodes": (1, 1e4), "updates_per_step": (1, 1e3), "policy_frequency": (1, 1e3)}
    for name, (least, most) in bounds.items():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        require(value is None or least <= value <= most, f"{flag} {value}: must be between {least} and {most}")
    widths = args.hidden_sizes and min(args.hidden_sizes) > 0 and max(args.hidden_sizes) <= 4096
    require(widths, f"--hidden-sizes {args.hidden_sizes}: must be widths up to 4096, like 64 64")
    require(args.num_iterations, f"--total-timesteps {args.total_timesteps}: below {args.steps_per_iteration} in all")
    require(args.env_id in TASKS, f"--env-id {args.env_id}: no such task")
    require(buffer_rows(args), f"--buffer-size {args.buffer_size}: less than one step of {args.num_envs} worlds")
    require(not args.track or importlib.util.find_spec("wandb"), "--track: wandb is missing; pip install wandb")

# ---- 14. Pictures ---------------------------------------------------------------------------------------------------
class Picture:
    """Four pendulums, and the curves of training, on a figure of matplotlib."""
    def __init__(self, figure):
        axes = figure.subplot_mosaic([[0, 1, "return", "critic loss"], [2, 3, "actor loss", "temperature"]])
        tags = {"return": "charts/episodic_return", "critic loss": "losses/qf_loss",
                "actor loss": "losses/actor_loss", "temperature": "losses/alpha"}
        self.rods, self.curves = [], {tag: axes[name].plot([], [], color="tab:red")[0] for name, tag in tags.items()}
        for name in tags:
            axes[name].set_title(name)
        for i in range(4):
            axes[i].set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", frame_on=False, xticks=[], yticks=[])
            self.rods += axes[i].plot([], [], "o-", color="tab:blue", linewidth=3, markersize=9, markevery=[1])

    def pose(self, angles) -> None:
        for rod, angle in zip(self.rods, angles, strict=False):  # as many as there are worlds
            rod.set_data([0, math.sin(angle)], [0, math.cos(angle)])

    def extend(self, step: int, values: dict[str, float]) -> None:
        """One more point on each curve that has one."""
        for tag, line in self.curves.items():
            if math.isfinite(values.get(tag, math.nan)):
                line.set_data([*line.get_xdata(), step], [*line.get_ydata(), values[tag]])
                line.axes.relim()
                line.axes.autoscale_view()

def redraw(_, picture: Picture, pipe, poses: list) -> list:
    """One frame of the window: play the last poses at their real speed, then see the news and draw the curves anew."""
    with contextlib.suppress(EOFError, OSError):  # training has ended
        if not poses and pipe.poll():
            for step, values, poses[:] in pipe.recv():  # of the last iteration the poses stay
                picture.extend(step, values)
            picture.rods[0].figure.canvas.draw()
            pipe.send("next")
    if poses:
        picture.pose(poses.pop(0))
    return picture.rods

def show_window(pipe) -> None:
    """What the window's process does. It asks for news whenever it has drawn the last."""
    from matplotlib import animation, pyplot
    figure = pyplot.figure("SAC on MJX", figsize=(10, 5), layout="tight")
    if not figure.canvas.required_interactive_framework:
        return print("--live: no display, or no window toolkit such as Tk; training goes on without", flush=True)
    pipe.send("first")
    _ = animation.FuncAnimation(figure, redraw, fargs=(Picture(figure), pipe, []), interval=50, blit=True, save_count=1)
    pyplot.show()

class PictureLog(Log):
    """Keeps what a picture shows as well, and feeds the window: a process of its own, of the least priority."""
    def __init__(self, args: Args, run_dir: Path, first: int):
        super().__init__(args, run_dir, first)
        self.history, self.sent, self.window = [], 0, None
        if args.live:
            context = multiprocessing.get_context("spawn")
            self.pipe, end = context.Pipe()
            self.window = context.Process(target=show_window, args=(end,), daemon=True)
            self.window.start()
            end.close()

    def write(self, iteration: int, metrics: dict[str, jax.Array]) -> None:
        (angles,), values = to_arrays(metrics.pop("angles")).values(), super().write(iteration, metrics)
        if self.args.capture_video or self.window:
            self.history.append((iteration * self.args.steps_per_iteration, values, angles))
        with contextlib.suppress(EOFError, OSError):  # the window is closed
            if self.window and self.pipe.poll():
                self.pipe.recv()
                self.pipe.send(self.history[self.sent:][-100:])  # what the pipe holds, so that this does not wait
                self.sent = len(self.history)

def write_video(env: Env, policy: dict, history: list, seed: int, file: Path) -> None:
    """The window's picture as a film: about 10 iterations of training, then an episode of the trained policy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    canvas, original, path = FigureCanvasAgg(Figure((10, 5), dpi=80, layout="tight")), CMujocoEnv(env), []
    evaluate_on_host(original, policy, 4, seed, lambda: path.append(original.data.qpos[0]))
    imageio = importlib.import_module("imageio")
    picture, every = Picture(canvas.figure), max(1, len(history) // 10)
    file.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings(action="ignore"), imageio.get_writer(file, fps=1 / env.task.dt) as video:
        for i, (step, values, angles) in enumerate([*history, (0, {}, np.reshape(path, (4, -1)).T)]):
            picture.extend(step, values)
            for pose in angles if i % every == 0 or i == len(history) else ():
                picture.pose(pose)
                canvas.draw()
                video.append_data(np.asarray(canvas.buffer_rgba())[..., :3])
    print(f"video: {file}")

# ---- 15. Main and smoke test ----------------------------------------------------------------------------------------
def train(args: Args, run_dir: Path | None = None) -> tuple[Path, dict]:
    """Train from the start, or on from the newest checkpoint of run_dir. Returns the run's folder and its policy."""
    start, resuming, stops = time.time(), run_dir is not None, listen()
    mesh = make_mesh(args.num_devices, args.num_envs, args.batch_size)
    args = dataclasses.replace(args, num_devices=mesh.size, **{x: getattr(Args, x) for x in CALL_FLAGS})
    key, env = jax.random.key(args.seed), Env(args)
    buffer_bytes = count_bytes(jax.eval_shape(partial(init_buffer, args, env)))
    check_memory(None if args.buffer_device == "host" else mesh, buffer_bytes, "--buffer-size")
    check_memory(mesh, count_bytes(jax.eval_shape(partial(init_learner_and_worlds, args, env), key)))
    require(jax.process_count() == 1 or args.buffer_device == "device", "--buffer-device host: of one process only")
    run_dir = run_dir or Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__{int(start)}"
    if jax.process_index() == 0:
        with or_fail(f"--runs-dir {args.runs_dir}"):
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=run_dir if resuming else run_dir.parent).close()  # better to fail now
    slowly = "" if onekernel else "; physics by XLA, slowly, as the folder onekernel is not beside this file"
    kind = mesh.devices[0].device_kind
    say(f"building {args.env_id} for {mesh.size} x {kind}, buffer of {buffer_bytes} bytes{slowly}")
    state = init_train_state(args, env, mesh, key)
    state = restore(args, run_dir, state) if resuming else state
    first = iteration = saved = int(state.learner.iteration)
    say("compiling the training iteration")
    events, compile_start = [], time.perf_counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    run_iteration, programs = compile_iteration(args, env, mesh, state)
    keys = jax.vmap(jax.random.key)(args.seed + jnp.arange(args.eval_episodes))
    evaluate = evaluate_mjx.lower(env, export_policy(env, state.learner), keys).compile()
    seconds, memory = time.perf_counter() - compile_start, [program.memory_analysis() for program in programs]
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    run = {
        "compile_s": round(seconds, 2), "compile_cache": "hit" if any("cache_hits" in e for e in events) else "miss",
        "bytes_per_world": count_bytes(state.worlds) // args.num_envs,
        "buffer_bytes": buffer_bytes, "peak_bytes": mesh.size * max(
            program.argument_size_in_bytes + program.temp_size_in_bytes for program in memory)}
    check_memory(mesh, run["peak_bytes"])
    say("compiled: " + ", ".join(f"{name} {value}" for name, value in run.items()))
    packages, kinds = ("jax", "mujoco", "mujoco-mjx", "flax", "optax"), [device.device_kind for device in mesh.devices]
    run |= {"args": dataclasses.asdict(args), "commit": git.stdout.strip(), "devices": kinds,
            "versions": {name: importlib.metadata.version(name) for name in packages}}
    if jax.process_index() == 0:
        with or_fail(f"--runs-dir, --exp-name: {run_dir}"):
            run_dir.mkdir(exist_ok=resuming)
    write_run(run_dir, run)
    if args.track and jax.process_index() == 0:
        wandb = importlib.import_module("wandb")
        wandb.init(id=run_dir.name, name=run_dir.name, config=run["args"], sync_tensorboard=True, resume="allow")
    steps, log, pending = args.steps_per_iteration, PictureLog(args, run_dir, first), None
    say(f"{args.num_iterations} * {steps} steps, {args.total_timesteps % steps} unused: {run_dir}")
    with or_fail("the processes differ in their flags, or in the checkpoint that they found", kind=AssertionError):
        multihost_utils.sync_global_devices(f"{args} {first}")
    while iteration < args.num_iterations and not stop_wanted(stops, iteration):
        state, metrics = run_iteration(state)
        iteration += 1
        if pending:  # read one iteration late, so that the device never waits for Python
            log.write(*pending)
        pending = (iteration, metrics)
        if args.eval_every and iteration % args.eval_every == 0:
            value = evaluate(export_policy(env, state.learner), keys).mean()
            log.scalars(iteration * steps, {"eval/episodic_return": value})
        if iteration % args.checkpoint_every == 0:
            log.write(*pending)  # so that the curves reach as far as the checkpoint
            pending, saved = None, iteration
            save(args, run_dir, state, export_policy(env, state.learner))
    if pending:
        log.write(*pending)
    log.bar.close()
    run["train_s"], policy = time.time() - log.start, export_policy(env, state.learner)
    if saved < iteration:
        save(args, run_dir, state, policy)
    if stops:
        log.writer.close()
        again = shlex.join(["python", sys.argv[0], "--resume", str(run_dir)])
        say(f"stopped after iteration {iteration}; to go on: {again}")
        raise SystemExit(128 + stops[0])
    on_signals(signal.SIG_DFL)
    if jax.process_index() > 0:
        return run_dir, policy  # the first one does the rest
    say(f"trained for {run['train_s']:.1f} s; policy: {run_dir / 'policy.npz'}")
    run["evaluation"] = judge(args, env, policy)
    end = iteration * steps + 1  # one later than all others, so that a run that is resumed once more replaces it
    log.scalars(end, {"eval/c_mujoco_return": run["evaluation"]["C MuJoCo"]["mean"]})
    log.writer.close()
    write_run(run_dir, run)
    if args.capture_video:
        with writing(run_dir / "videos"):
            write_video(env, policy, log.history, args.seed, run_dir / "videos" / "training.mp4")
    if log.window and log.pipe.poll(20) and not log.window.join(0.5) and log.window.is_alive():  # else it never opened
        say("close the window to end")
        log.window.join()
    return run_dir, policy

def main(argv: list[str]) -> None:
    args = parse_args(argv)
    check_args(args)
    if args.resume:
        saved = dataclasses.replace(read_run(Path(args.resume)), **{x: getattr(args, x) for x in CALL_FLAGS})
        unchanged = parse_args(argv, saved) == saved
        require(unchanged, "--resume: the run keeps its own settings; leave the other flags out, or start a new run")
        args = saved
    start_jax(args)
    if args.smoke:
        raise SystemExit(smoke(args))
    if args.evaluate:
        run_dir, env = Path(args.evaluate), Env(read_run(Path(args.evaluate)))
        with or_fail(f"--evaluate {run_dir}: no policy"), np.load(run_dir / "policy.npz", allow_pickle=False) as file:
            policy = dict(file)
        judge(args, env, policy)
        if args.capture_video:
            with writing(run_dir / "videos"):
                write_video(env, policy, [], args.seed, run_dir / "videos" / "policy.mp4")
        return None
    run_dir = Path(args.resume) if args.resume else None
    if not args.coordinator_address:
        train(args, run_dir)
    else:  # where one fails, all end at once
        with or_fail("this or another process has failed; start all of them again, with --resume", 1):
            train(args, run_dir)

def smoke(args: Args) -> int:
    """Go through all that a run does, in short, with a verdict for each stage. Returns the exit code."""
    failed, versions = [], [importlib.metadata.version(name) for name in ("mujoco", "mujoco-mjx")]
    def verdict(name: str, passed, note: str) -> None:
        failed.extend([] if passed else [name])
        print(f"{'pass' if passed else 'FAIL'}  {name}: {note}", flush=True)
    note = f"jax {jax.__version__} on {make_mesh(args.num_devices).devices}, mujoco and mjx {versions}"
    verdict("versions", versions[0] == versions[1], note)  # pip alone takes a mujoco that does not fit
    env = Env(args)
    original, action = CMujocoEnv(env), np.full(env.action_size, 0.5)
    original.reset(args.seed)
    reached = kernel(env.step)(kernel(env.reset)(jax.random.key(args.seed)), action)
    error = reached.obs - original.step(action)[0]
    verdict("environment", np.abs(error).max() < 1e-5, f"a step in MJX is off C MuJoCo's by {np.abs(error).max():.1e}")
    with tempfile.TemporaryDirectory() as folder:
        short = {"num_envs": 64, "num_steps": 8, "batch_size": 64, "learning_starts": 512, "total_timesteps": 2048}
        run_dir, policy = train(dataclasses.replace(args, **short, checkpoint_every=2, eval_every=2, runs_dir=folder))
        verdict("training", all(np.isfinite(x).all() for x in policy.values()), "4 iterations, the policy is finite")
        checkpoints(run_dir)[0].unlink()
        _, resumed = train(read_run(run_dir), run_dir)
    verdict("resume", all((resumed[name] == policy[name]).all() for name in policy), "the same policy, to the bit")
    returns = evaluate_on_host(original, policy, 2, args.seed).round(1)
    verdict("C MuJoCo", np.isfinite(returns).all(), f"returns {returns} on the original model")
    print("FAIL: " + ", ".join(failed) if failed else "all is well")
    return int(bool(failed))

if __name__ == "__main__":
    main(sys.argv[1:])
