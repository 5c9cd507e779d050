"""PPO on HalfCheetah, on MuJoCo XLA (MJX): the file to read first.

    python ppo_mjx_minimal.py --num-envs 512    to watch: tensorboard --logdir runs

It learns by the same mathematics as ppo_mjx.py, on one device; an iteration is one call of one
jitted function. ppo_mjx.py has in addition: ten other tasks; all GPUs, all cores of a CPU, or
several machines; checkpoints, from which a stopped run goes on; evaluation in C MuJoCo and
Gymnasium, and video; more flags and metrics; and handling of non-finite gradients and full disks.

Shapes: T = num_steps, N = num_envs, B = T * N, M = num_minibatches, O = observation size (17),
A = action size (6). A record describes one world; its fields are [T, N, ...] in a rollout,
[B, ...] in a batch and [B / M, ...] in a minibatch. Names follow CleanRL's
ppo_continuous_action.py; where the algorithm differs, a comment says so.

Blocks between "# shared: NAME" and "# end shared" are the same text in ppo_mjx.py; in your own
copy, ignore the marks.
"""

import dataclasses
import importlib.util
import json
import math
import time
from functools import cache, partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import optax
import tyro
from flax import struct
from mujoco import mjx
from tensorboard.summary import Writer

try:  # the folder beside this file: it compiles all worlds' physics to one kernel
    import onekernel.mjx
except ImportError:  # this file was copied alone: XLA runs the physics, slowly
    onekernel = None


# ---- 1. Settings ---------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Args:
    """PPO on HalfCheetah, on MuJoCo XLA."""

    seed: int = 1
    """seed of all random numbers"""
    runs_dir: str = "runs"
    """folder for the run folders"""
    total_timesteps: int = 10_000_000
    """environment steps, over all worlds"""
    learning_rate: float = 1e-3
    """Adam's step size at the start"""
    num_envs: int = 512
    """worlds"""
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
    clip_coef: float = 0.2
    """clipping range of the probability ratio"""
    clip_vloss: bool = False
    """clip the value loss as well"""
    ent_coef: float = 0.002
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """gradients are scaled down to this norm"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """widths of the tanh layers, in the actor and in the critic"""
    init_log_std: float = -0.5
    """log of the policy's standard deviation at the start"""

    def __post_init__(self):
        for name in ("num_envs", "num_steps", "num_minibatches", "update_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if self.steps_per_iteration % self.num_minibatches:
            raise ValueError(f"--num-minibatches must divide {self.steps_per_iteration}")
        if self.num_iterations < 1:
            raise ValueError(f"--total-timesteps must be at least {self.steps_per_iteration}")

    @property
    def steps_per_iteration(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.steps_per_iteration


# ---- 2. Environment (SI units and radians; a test holds it equal to Gymnasium's v5) --------------
@struct.dataclass
class Physics:
    """The smallest state that determines the future; a step computes the rest of mjx.Data anew."""

    qpos: jax.Array  # [9]
    qvel: jax.Array  # [9]
    qacc_warmstart: jax.Array  # [9] where the constraint solver starts


@struct.dataclass
class State:
    """One world between two steps."""

    data: Physics
    obs: jax.Array  # [O]
    reward: jax.Array  # []
    broken: jax.Array  # [] bool: the physics failed, which ends the episode
    truncated: jax.Array  # [] bool: the time limit ends the episode
    elapsed: jax.Array  # [] int32, steps since the reset


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
    """One world of HalfCheetah-v5. `reset` and `step` are pure functions: batch them with jax.vmap.

    An episode ends at the time limit, or by broken physics (not finite, or faster than MAX_SPEED).
    A step that breaks the physics has reward 0, is left out of learning, and keeps the observation
    before it.
    """

    FRAME_SKIP = 5  # physics steps in one environment step
    TIME_LIMIT = 1000  # steps
    CTRL_COST = 0.1
    RESET_NOISE = 0.1
    MAX_SPEED = 200.0  # m/s and rad/s; random actions reach some 30

    def __init__(self):
        # Gymnasium's own model. Importing that package would take a while.
        gymnasium = Path(importlib.util.find_spec("gymnasium").origin).parent
        mjcf = gymnasium / "envs" / "mujoco" / "assets" / "half_cheetah.xml"
        # half_cheetah.xml has a deprecated setting, of which MuJoCo would warn on the terminal and
        # in a file.
        mujoco.set_mju_user_warning(lambda message: None)
        model = mujoco.MjModel.from_xml_path(str(mjcf))
        mujoco.set_mju_user_warning(None)

        self.control_dt = model.opt.timestep * self.FRAME_SKIP  # s
        self.observation_size = model.nq - 1 + model.nv
        self.action_size = model.nu
        self.init_qpos = jnp.array(model.qpos0)
        self.model = mjx.put_model(model, impl="jax")
        self.template = mjx.make_data(self.model)

    def observe(self, data: Physics) -> jax.Array:
        """All coordinates but x, and velocities: [O]."""
        return jnp.concatenate([data.qpos[1:], data.qvel])

    def reset(self, key: jax.Array) -> State:
        """A new episode, with Gymnasium's noise. key: one PRNG key."""
        qpos_key, qvel_key = jax.random.split(key)
        shape = self.init_qpos.shape
        noise = jax.random.uniform(
            qpos_key, shape, minval=-self.RESET_NOISE, maxval=self.RESET_NOISE
        )
        data = Physics(
            qpos=self.init_qpos + noise,
            qvel=self.RESET_NOISE * jax.random.normal(qvel_key, shape),
            qacc_warmstart=jnp.zeros(shape),
        )
        return State(
            data=data,
            obs=self.observe(data),
            reward=jnp.zeros(()),
            broken=jnp.array(False),
            truncated=jnp.array(False),
            elapsed=jnp.zeros((), jnp.int32),
        )

    def step(self, state: State, action: jax.Array) -> State:
        """One control step.

        action: [A] in [-1, 1], the motors' controls; torque in N m is gear * action.
        """

        def substep(data: Physics, _):
            full = physics_step(self.model, self.template.replace(**vars(data), ctrl=action))
            return Physics(full.qpos, full.qvel, full.qacc_warmstart), None

        data, _ = jax.lax.scan(substep, state.data, None, length=self.FRAME_SKIP)
        x_velocity = (data.qpos[0] - state.data.qpos[0]) / self.control_dt
        reward = x_velocity - self.CTRL_COST * jnp.square(action).sum()

        finite = jnp.isfinite(data.qpos).all()
        slow = (jnp.abs(data.qvel) < self.MAX_SPEED).all()  # False for NaN as well
        sane = finite & slow
        elapsed = state.elapsed + 1
        return State(
            data=data,
            obs=jnp.where(sane, self.observe(data), state.obs),
            reward=jnp.where(sane, reward, 0.0),
            broken=~sane,
            truncated=elapsed >= self.TIME_LIMIT,
            elapsed=elapsed,
        )


# ---- 3. Running statistics -----------------------------------------------------------------------
@struct.dataclass
class RunningStats:
    """Mean and variance of all samples so far."""

    count: jax.Array  # []
    mean: jax.Array
    var: jax.Array


def start_stats(shape: tuple[int, ...]) -> RunningStats:
    """Statistics before the first sample; the small count keeps divisions finite."""
    return RunningStats(count=jnp.float32(1e-4), mean=jnp.zeros(shape), var=jnp.ones(shape))


def update_stats(stats: RunningStats, batch: jax.Array, valid: jax.Array) -> RunningStats:
    """Merge in the valid samples of a batch [T, N, ...]. valid: bool [T, N].

    Source: Chan, Golub and LeVeque's parallel variance.
    """
    count = valid.sum()
    mask = jnp.expand_dims(valid, range(2, batch.ndim))
    mean = batch.mean(axis=(0, 1), where=mask)
    var = batch.var(axis=(0, 1), where=mask)

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


# ---- 4. Networks ---------------------------------------------------------------------------------
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


def initial_memory(batch: tuple[int, ...] = ()) -> tuple:
    """What the policy remembers when an episode begins: a tree of arrays [*batch, ...]."""
    return ()


def apply_policy(
    args: Args, env: Env, params: dict, memory: tuple, obs: jax.Array
) -> tuple[tuple, Gaussian]:
    """The policy: its memory and normalised observations [..., O] -> next memory, distribution.

    This one remembers nothing; a recurrent one would, as ppo_mjx.py explains in the same place.
    """
    actor, _ = make_networks(args, env)
    return memory, Gaussian(actor.apply(params["actor"], obs), params["log_std"])


# ---- 5. Training state ---------------------------------------------------------------------------
@struct.dataclass
class Learner:
    """What is learnt."""

    params: dict  # "actor" and "critic": Flax parameters; "log_std": [A]
    opt_state: optax.OptState
    obs_stats: RunningStats  # [O]
    return_stats: RunningStats  # [], of the discounted return
    key: jax.Array  # of the shuffles
    iteration: jax.Array  # int32, iterations done


@struct.dataclass
class Worlds:
    """What belongs to one world, which draws from its own key."""

    env_state: State
    memory: tuple  # the policy's
    key: jax.Array
    discounted_return: jax.Array  # of the rewards so far, for their scale
    episode_return: jax.Array  # NaN in an episode that did not start at its beginning


def start_worlds(env_state: State, keys: jax.Array) -> Worlds:
    """Worlds [N] at the start of an episode."""
    zeros = jnp.zeros(keys.shape)
    return Worlds(
        env_state=env_state,
        memory=initial_memory(keys.shape),
        key=keys,
        # Unlike CleanRL: from 0 after a time limit as well, as the next episode is another one.
        discounted_return=zeros,
        episode_return=zeros,
    )


def make_optimizer(args: Args, learning_rate: float | jax.Array) -> optax.GradientTransformation:
    """Adam, on gradients that are scaled down to max_grad_norm."""
    clip = optax.clip_by_global_norm(args.max_grad_norm)
    return optax.chain(clip, optax.adam(learning_rate, eps=1e-5))


@partial(jax.jit, static_argnames=("args", "env"))
def init(args: Args, env: Env, key: jax.Array) -> tuple[Learner, Worlds]:
    """The state before the first iteration."""
    keys = jax.random.split(key, 6)
    actor_key, critic_key, shuffle_key, reset_key, clock_key, world_key = keys

    actor, critic = make_networks(args, env)
    obs = jnp.zeros(env.observation_size)
    params = {
        "actor": actor.init(actor_key, obs),
        "critic": critic.init(critic_key, obs),
        "log_std": jnp.full(env.action_size, args.init_log_std, jnp.float32),
    }
    learner = Learner(
        params=params,
        opt_state=make_optimizer(args, args.learning_rate).init(params),
        obs_stats=start_stats(obs.shape),
        return_stats=start_stats(()),
        key=shuffle_key,
        iteration=jnp.zeros((), jnp.int32),
    )

    n = args.num_envs
    env_state = jax.vmap(kernel(env.reset))(jax.random.split(reset_key, n))
    # Unlike CleanRL: the worlds' clocks start at random, so that their time limits do not come all
    # at once.
    elapsed = jax.random.randint(clock_key, (n,), 0, env.TIME_LIMIT)
    worlds = start_worlds(env_state.replace(elapsed=elapsed), jax.random.split(world_key, n))
    episode_return = jnp.where(elapsed == 0, worlds.episode_return, jnp.nan)
    return learner, worlds.replace(episode_return=episode_return)


# ---- 6. Rollout ----------------------------------------------------------------------------------
@struct.dataclass
class Transition:
    """One step of one world; `end` and the flags are the outcome of `action`."""

    obs: jax.Array  # [O]
    action: jax.Array  # [A], as sampled; the environment gets it clipped and scaled
    logprob: jax.Array
    end: Worlds  # where the step ended, before any reset: reward, observation, ...
    done: jax.Array  # bool
    valid: jax.Array  # bool: False for steps to leave out of the loss, as they broke the world


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


def rollout(args: Args, env: Env, learner: Learner, worlds: Worlds) -> tuple[Worlds, Transition]:
    """num_steps steps of the policy in all worlds, with a fresh reset after each episode.

    Returns the worlds [N, ...] and transitions [T, N, ...].
    """

    def step(worlds: Worlds, _):
        key, action_key, reset_key = split_keys(worlds.key, 3)
        start = worlds.env_state

        obs = normalize(learner.obs_stats, start.obs)
        memory, policy = apply_policy(args, env, learner.params, worlds.memory, obs)
        action = policy.sample(action_key)
        state = jax.vmap(kernel(env.step))(start, jnp.clip(action, -1.0, 1.0))

        end = Worlds(
            env_state=state,
            memory=memory,
            key=key,
            discounted_return=args.gamma * worlds.discounted_return + state.reward,
            episode_return=worlds.episode_return + state.reward,
        )
        transition = Transition(
            obs=start.obs,
            action=action,
            logprob=policy.log_prob(action),
            end=end,
            done=state.broken | state.truncated,
            valid=~state.broken,
        )
        # All worlds are reset in each step: under vmap a branch would compute both sides anyway.
        fresh = start_worlds(jax.vmap(kernel(env.reset))(reset_key), key)
        return where_done(transition.done, fresh, end), transition

    return jax.lax.scan(step, worlds, None, length=args.num_steps)


# ---- 7. Advantages -------------------------------------------------------------------------------
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


# ---- 8. Loss and update --------------------------------------------------------------------------
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


def update(
    args: Args, env: Env, learner: Learner, batch: Batch
) -> tuple[Learner, dict[str, jax.Array]]:
    """All epochs over a batch [B, ...]. Returns the learner, and the mean of each metric by tag."""
    learning_rate = current_learning_rate(args, learner.iteration)
    optimizer = make_optimizer(args, learning_rate)

    def minibatch_step(carry, mb: Batch):
        params, opt_state = carry
        gradient, metrics = jax.grad(ppo_loss, argnums=2, has_aux=True)(args, env, params, mb)
        change, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, change), opt_state), metrics

    def epoch(carry, key):
        order = shuffle(key, len(batch.obs))
        minibatches = jax.tree.map(
            lambda x: x[order].reshape(args.num_minibatches, -1, *x.shape[1:]), batch
        )
        return jax.lax.scan(minibatch_step, carry, minibatches)

    key = jax.random.fold_in(learner.key, learner.iteration)
    carry = (learner.params, learner.opt_state)
    keys = jax.random.split(key, args.update_epochs)
    (params, opt_state), metrics = jax.lax.scan(epoch, carry, keys)

    metrics = jax.tree.map(jnp.mean, metrics)
    metrics["charts/learning_rate"] = jnp.asarray(learning_rate)
    learner = learner.replace(params=params, opt_state=opt_state, iteration=learner.iteration + 1)
    return learner, metrics


# ---- 9. One training iteration -------------------------------------------------------------------
@partial(jax.jit, static_argnames=("args", "env"), donate_argnames=("learner", "worlds"))
def train_iteration(
    args: Args, env: Env, learner: Learner, worlds: Worlds
) -> tuple[Learner, Worlds, dict[str, jax.Array]]:
    """Rollout, advantages and update as one program. Returns the next state and metrics by tag.

    The old state is donated: its memory is used again.
    """
    worlds, steps = rollout(args, env, learner, worlds)
    state = steps.end.env_state
    valid = steps.valid

    # Unlike CleanRL: rewards get one scale for all worlds and the whole rollout.
    return_stats = update_stats(learner.return_stats, steps.end.discounted_return, valid)
    reward = jnp.clip(state.reward / jnp.sqrt(return_stats.var + 1e-8), -10.0, 10.0)

    _, critic = make_networks(args, env)
    obs = normalize(learner.obs_stats, steps.obs)
    next_obs = normalize(learner.obs_stats, state.obs)
    observations = jnp.stack([obs, next_obs])  # [2, T, N, O], for one call of the critic
    value, next_value = critic.apply(learner.params["critic"], observations)[..., 0]
    # Without effect here, as broken steps are invalid; put your task's own terminations here.
    terminated = state.broken
    advantage, target = compute_gae(args, reward, value, next_value, terminated, steps.done, valid)
    # Unlike CleanRL: advantages are normalised over the rollout, not over each minibatch.
    scale = advantage.std(where=valid) + 1e-8

    batch = Batch(
        obs=obs,
        action=steps.action,
        logprob=steps.logprob,
        value=value,
        advantage=(advantage - advantage.mean(where=valid)) / scale,
        target=target,
        valid=valid,
    )
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)  # [T, N, ...] -> [B, ...]
    learner, metrics = update(args, env, learner, batch)

    # Unlike CleanRL, only once an iteration, since the policy that acted and the one that learns
    # must see the same normalised observations.
    obs_stats = update_stats(learner.obs_stats, steps.obs, valid)
    learner = learner.replace(obs_stats=obs_stats, return_stats=return_stats)

    error = jnp.square(target - value).mean(where=valid)
    metrics["losses/explained_variance"] = 1 - error / (target.var(where=valid) + 1e-8)
    # NaN where no whole episode has ended.
    ended = steps.done & valid & jnp.isfinite(steps.end.episode_return)
    metrics["charts/episodic_return"] = steps.end.episode_return.mean(where=ended)
    return learner, worlds, metrics


# ---- 10. Main ------------------------------------------------------------------------------------
def export_policy(env: Env, learner: Learner) -> dict[str, np.ndarray]:
    """All that the deterministic policy needs: normaliser, layers w0, b0, ..., controls' range."""
    policy = {
        "action_scale": np.ones(env.action_size, np.float32),
        "action_bias": np.zeros(env.action_size, np.float32),
        "obs_mean": learner.obs_stats.mean,
        "obs_var": learner.obs_stats.var,
    }
    for name, layer in learner.params["actor"]["params"].items():  # Dense_0, Dense_1, ...
        number = name.removeprefix("Dense_")
        policy["w" + number] = layer["kernel"]
        policy["b" + number] = layer["bias"]
    return jax.device_get(policy)


def train(args: Args) -> Path:
    """Train, log, and save the policy. Returns the run's folder."""
    run_dir = Path(args.runs_dir) / f"HalfCheetah__ppo_mjx_minimal__{args.seed}__{int(time.time())}"
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps(vars(args), indent=2))
    writer = Writer(str(run_dir))

    if not onekernel:
        print("without the folder onekernel beside this file: XLA's slow physics")
    env = Env()
    learner, worlds = init(args, env, jax.random.key(args.seed))
    start = time.time()  # the first iteration compiles; its time counts
    shown = "-"  # the last return
    for iteration in range(1, args.num_iterations + 1):
        learner, worlds, metrics = train_iteration(args, env, learner, worlds)
        step = iteration * args.steps_per_iteration
        metrics = jax.device_get(metrics)
        metrics["charts/SPS"] = step / (time.time() - start)
        for tag, value in metrics.items():
            if math.isfinite(value):
                writer.add_scalar(tag, value, step)
        writer.flush()
        if math.isfinite(metrics["charts/episodic_return"]):
            shown = f"{metrics['charts/episodic_return']:.0f}"
        print(f"step {step}  return {shown}  SPS {metrics['charts/SPS']:.0f}")

    np.savez(run_dir / "policy.npz", **export_policy(env, learner))
    writer.close()
    print(f"policy: {run_dir / 'policy.npz'}")
    return run_dir


if __name__ == "__main__":
    train(tyro.cli(Args))
