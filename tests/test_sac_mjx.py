"""sac_mjx.py: returns of several steps, buffer, losses by hand, updates, probes, a whole run.

A check is a function of the script, so that the mutations at the end can fail it.
"""

import ast
import dataclasses
import itertools
import json
import math
import re
import tomllib
import types
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from quick import optimised, quick_kernels

import sac_mjx
from tools import export
from tools.replay_nan import load_script

SCRIPT = Path(sac_mjx.__file__)
SMALL = {
    "num_devices": 1,
    "num_envs": 8,
    "num_steps": 4,
    "updates_per_iteration": 4,
    "policy_frequency": 2,
    "twin": "min",
    "buffer_size": 8 * 20,
    "batch_size": 16,
    "learning_starts": 32,
    "gamma": 0.9,
    "num_atoms": 11,
    "v_max": 3.0,
    "hidden_sizes": (6, 5),
    "total_timesteps": 4 * 32,
}


def make_args(sac=sac_mjx, **changes):
    return sac.Args(**SMALL | changes)


class Probe:
    """An environment of one number: `reward_of` maps (elapsed, action) to the reward.

    Episodes last `length` steps, and end by a termination or by the time limit. breaks_at: the step
    that breaks the world.
    """

    action_size = 1
    observation_size = 1
    seen = np.array([0])
    action_scale = 1.0
    action_bias = 0.0

    def __init__(self, sac, reward_of, length, truncates=False, shows_time=False, breaks_at=0):
        self.sac = sac
        self.reward_of = reward_of
        self.length = length
        self.truncates = truncates
        self.shows_time = shows_time
        self.breaks_at = breaks_at
        self.time_limit = length

    def reset(self, key):
        zero = jnp.zeros(())
        no = jnp.array(False)
        return self.sac.State(
            data=self.sac.Physics(*jnp.zeros((3, 1))),
            obs=jnp.zeros(1),
            reward=zero,
            done=zero,
            metrics={"reward_all": zero},
            info={"elapsed": jnp.zeros((), jnp.int32), "truncated": no, "broken": no},
        )

    def step(self, state, action):
        elapsed = state.info["elapsed"] + 1
        over = elapsed >= self.length
        broken = elapsed == self.breaks_at
        obs = jnp.where(self.shows_time, elapsed.astype(float), 0.0)[None]
        reward = jnp.where(broken, 0.0, self.reward_of(elapsed, action[0]))
        return state.replace(
            obs=jnp.where(broken, state.obs, obs),
            reward=reward,
            done=jnp.where((over & (not self.truncates)) | broken, 1.0, 0.0),
            metrics={"reward_all": reward},
            info={"elapsed": elapsed, "truncated": over & self.truncates, "broken": broken},
        )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Kernels of a few operations, which no other test has."""
    quick_kernels(monkeypatch)


def one_device():
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("devices",))


def on_mesh(mesh, function, *arguments):
    """The result of a function that runs on every device with the same arguments."""
    run = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(run)(*arguments)


def as_numpy(leaf) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.array(jax.random.key_data(leaf) if is_key else leaf)


def assert_same(first, second) -> None:
    """Bit for bit, NaN included."""
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(as_numpy(a), as_numpy(b)), first, second
    )


def differs(first, second) -> bool:
    changed = jax.tree.map(lambda a, b: bool((as_numpy(a) != as_numpy(b)).any()), first, second)
    return any(jax.tree.leaves(changed))


def constant(sac, **options) -> Probe:
    """Each step earns 1."""
    return Probe(sac, lambda elapsed, action: jnp.ones(()), 5, **options)


@cache
def start_program(sac, env, args, mesh):
    shardings = jax.tree.map(partial(NamedSharding, mesh), sac.STATE_SPEC)
    return jax.jit(partial(sac.init_train_state, args, env), out_shardings=shardings)


def start(sac, args, env, mesh=None):
    """The state before the first iteration."""
    state = start_program(sac, env, args, mesh or one_device())(jax.random.key(args.seed))
    if args.buffer_device == "host":
        state = state.replace(buffer=sac.init_buffer(args, env, np))
    return state


@cache
def shared_env(sac) -> Probe:
    return constant(sac, truncates=True)


def make_learner(sac, args):
    """A learner whose networks, targets and temperature are all different numbers."""
    learner = start(sac, args, shared_env(sac)).learner
    random = np.random.default_rng(2)  # by which each critic is the smaller one somewhere

    def stir(x):
        return jnp.asarray(random.normal(0, 0.6, x.shape), x.dtype)

    params = jax.tree.map(stir, learner.params) | {"log_alpha": jnp.log(jnp.float32(0.3))}
    return learner.replace(params=params, targets=jax.tree.map(stir, learner.targets))


def make_batch(sac, size: int = 4, seed: int = 0):
    """Random transitions, whose second one terminated, and whose last one is not valid."""
    random = np.random.default_rng(seed)
    discount = np.full(size, 0.9)
    discount[1] = 0.0
    return sac.Batch(
        obs=jnp.float32(random.normal(size=(size, 1))),
        action=jnp.float32(random.uniform(-1, 1, (size, 1))),
        reward=jnp.float32(random.normal(size=size)),
        discount=jnp.float32(discount),
        next_obs=jnp.float32(random.normal(size=(size, 1))),
        valid=jnp.arange(size) < size - 1,
        noise=jnp.float32(random.normal(size=(size, 1))),
        next_noise=jnp.float32(random.normal(size=(size, 1))),
    )


# ---- Returns of several steps


def columns(*rows) -> jax.Array:
    """Cases [B] of sequences [n] -> [n, B]."""
    return jnp.array(rows).T


def check_n_step_by_hand(sac) -> None:
    """Three rewards 1, 2, 4 at gamma 0.5; each case ends in another way."""
    yes, no = True, False
    cases = {  # terminated, done, valid -> return, discount, last step
        "goes on": ((no, no, no), (no, no, no), (yes, yes, yes), 3.0, 0.125, 2),
        "terminates at once": ((yes, no, no), (yes, no, no), (yes, yes, yes), 1.0, 0.0, 0),
        "terminates second": ((no, yes, no), (no, yes, no), (yes, yes, yes), 2.0, 0.0, 1),
        "terminates last": ((no, no, yes), (no, no, yes), (yes, yes, yes), 3.0, 0.0, 2),
        "time limit at once": ((no, no, no), (yes, no, no), (yes, yes, yes), 1.0, 0.5, 0),
        "time limit second": ((no, no, no), (no, yes, no), (yes, yes, yes), 2.0, 0.25, 1),
        "the next episode's end": ((no, no, yes), (no, yes, yes), (yes, yes, yes), 2.0, 0.25, 1),
        "breaks second": ((no, yes, no), (no, yes, no), (yes, no, yes), 1.0, 0.5, 0),
        "newest step second": ((no, no, no), (no, no, no), (yes, yes, no), 2.0, 0.25, 1),
    }
    terminated, done, valid, total, discount, last = zip(*cases.values(), strict=True)
    reward = columns(*[(1.0, 2.0, 4.0)] * len(cases))
    args = make_args(sac, gamma=0.5, n_step=3)
    found = sac.n_step_return(args, reward, columns(*terminated), columns(*done), columns(*valid))
    for ours, expected, what in zip(
        found, (total, discount, last), ("return", "discount", "last"), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, err_msg=what)


def check_n_step_is_a_loop(sac) -> None:
    """Random sequences, against the definition step by step, for n of 1, 2 and 5."""
    random = np.random.default_rng(0)
    for n, xp in itertools.product((1, 2, 5), (jnp, np)):
        reward = np.float32(random.normal(size=(n, 300)))
        terminated, truncated = random.random((2, n, 300)) < 0.2
        valid = random.random((n, 300)) < 0.8
        valid[0] = True
        args = make_args(sac, n_step=n)
        found = sac.n_step_return(args, reward, terminated, terminated | truncated, valid, xp)
        for b in range(300):
            total = 0.0
            discount = 1.0
            for i in range(n):
                if not valid[i, b]:
                    break
                total += discount * reward[i, b]
                discount *= 0.9
                last = i
                if terminated[i, b]:
                    discount = 0.0
                if terminated[i, b] or truncated[i, b]:
                    break
            np.testing.assert_allclose([x[b] for x in found], [total, discount, last], rtol=1e-5)


# ---- Replay buffer


def numbered_steps(sac, args, first: int):
    """A rollout [T, N] whose observations and rewards tell step and world: 100 * step + world."""
    t = first + jnp.arange(args.num_steps, dtype=jnp.float32)[:, None]
    number = 100 * t + jnp.arange(args.num_envs)
    no = jnp.zeros(number.shape, bool)
    state = types.SimpleNamespace(obs=number[..., None])
    end = types.SimpleNamespace(obs=number[..., None] + 100, reward=number)
    return sac.Transition(
        action=jnp.zeros((*number.shape, 1)),
        start=state,
        end=types.SimpleNamespace(env_state=end),
        terminated=no,
        done=no | (t % 7 == 6),  # the time limit
        valid=~no,
        finished=no,
    )


def filled(sac, args, rollouts: int, xp=jnp):
    buffer = sac.init_buffer(args, shared_env(sac), xp)
    for i in range(rollouts):
        first = xp.int32(i * args.num_steps)
        new = sac.to_experience(numbered_steps(sac, args, i * args.num_steps))
        if xp is np:
            new = jax.device_get(new)
        buffer = sac.insert(args, buffer, first, new)
    return buffer


def draw_minibatches(sac, args, learner, buffer):
    """The minibatches [U, B, ...] of an iteration on one device."""
    draw = partial(sac.draw, args, num_worlds=args.num_envs)
    sample = sac.gather(args, buffer, on_mesh(one_device(), draw, learner))
    make_batch = partial(sac.make_batch, args, shared_env(sac))
    return on_mesh(one_device(), make_batch, learner, sample)


def check_buffer_keeps_the_last_steps(sac) -> None:
    """Step t lies in row t % C, also where a rollout goes round the ring's end."""
    args = make_args(sac, buffer_size=8 * 6)
    steps = np.array([6, 7, 2, 3, 4, 5])
    expected = 100 * steps[:, None] + np.arange(8)
    for xp, kind in ((jnp, jax.Array), (np, np.ndarray)):
        buffer = filled(sac, args, 2, xp)  # steps 0 to 7 in 6 rows
        assert isinstance(buffer.obs, kind)
        np.testing.assert_array_equal(buffer.reward, expected)
        np.testing.assert_array_equal(buffer.obs[..., 0], expected)
        np.testing.assert_array_equal(buffer.next_obs[..., 0], expected + 100)
        np.testing.assert_array_equal(buffer.done[:, 3], steps % 7 == 6)
    assert not filled(sac, args, 1).valid[4:].any()


def check_draws(sac, rollouts: int = 2) -> None:
    """Drawn returns of three steps are those of the steps that follow in the same world.

    They end at the time limit and at the newest step, and go on over the ring's end.
    """
    args = make_args(
        sac,
        buffer_size=8 * 6,
        updates_per_iteration=2,
        batch_size=2048,
        n_step=3,
        norm_obs=False,
    )
    buffer = filled(sac, args, rollouts)
    steps = rollouts * 4
    learner = make_learner(sac, args)
    # An observation is normalised by these, so that no number here is clipped.
    wide = sac.RunningStats(count=jnp.float32(1), mean=jnp.zeros(1), var=jnp.full(1, 1e6))
    learner = learner.replace(
        steps=jnp.int32(steps),
        obs_stats=wide,
        return_stats=sac.RunningStats(jnp.float32(9), jnp.zeros(()), jnp.float32(4)),
    )
    mbs = draw_minibatches(sac, args, learner, buffer)
    assert mbs.noise.shape == (2, 2048, 1)
    for noise in (mbs.noise, mbs.next_noise):
        assert noise.mean() == pytest.approx(0.0, abs=0.08)
        assert noise.std() == pytest.approx(1.0, abs=0.06)
    assert differs(mbs.noise, mbs.next_noise)
    assert differs(mbs.obs[0], mbs.obs[1])  # updates have draws of their own
    mb = jax.tree.map(lambda x: x.reshape(4096, *x.shape[2:]), mbs)

    later = learner.replace(iteration=learner.iteration + 1)
    others = draw_minibatches(sac, args, later, buffer)
    assert differs(mbs.obs, others.obs)

    oldest = max(0, steps - 6)
    number = np.rint(np.asarray(mb.obs)[:, 0] * 1e3).astype(int)
    first, world = number // 100, number % 100
    counts = np.bincount((first - oldest) * 8 + world, minlength=8 * min(steps, 6))
    assert len(counts) == 8 * min(steps, 6)
    assert abs(counts - 4096 / len(counts)).max() < 6 * math.sqrt(4096 / len(counts))
    for i in range(4096):
        window = []
        for t in range(first[i], min(first[i] + 3, steps)):
            window.append(t)
            if t % 7 == 6:
                break
        total = sum(0.9**k * (100 * t + world[i]) for k, t in enumerate(window))
        assert mb.reward[i] == pytest.approx(total / 2, rel=1e-4)  # the deviation is 2
        assert mb.discount[i] == pytest.approx(0.9 ** len(window), rel=1e-5)
        ended = 100 * (window[-1] + 1) + world[i]
        assert 1e3 * mb.next_obs[i, 0] == pytest.approx(ended, rel=1e-4)
    assert mb.valid.all()


# ---- Distributions


def numpy_projection(args, probability, place):
    """Algorithm 1 of arXiv:1707.06887, in float64."""
    width = 2 * args.v_max / (args.num_atoms - 1)
    result = np.zeros(probability.shape)
    for row in range(len(probability)):
        for i in range(args.num_atoms):
            b = (np.clip(place[row, i], -args.v_max, args.v_max) + args.v_max) / width
            low, high = math.floor(b), math.ceil(b)
            if low == high:
                result[row, low] += probability[row, i]
            else:
                result[row, low] += probability[row, i] * (high - b)
                result[row, high] += probability[row, i] * (b - low)
    return result


def check_projection_is_a_loop(sac) -> None:
    """Shrunk, shifted, and partly or wholly outside; a single place, and the atoms themselves."""
    args = make_args(sac)
    random = np.random.default_rng(0)
    probability = np.float32(random.dirichlet(np.ones(11), 40))
    shift = random.normal(0, 2, (40, 1))
    place = np.float32(shift + random.uniform(0, 1, (40, 1)) * np.linspace(-3, 3, 11))
    place[0] = np.linspace(-3, 3, 11)
    place[1] = 0.1
    place[2] = 50.0
    place[3] = -50.0
    found = jax.jit(partial(sac.project_distribution, args))(probability, place)
    expected = numpy_projection(args, np.float64(probability), np.float64(place))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found[0], probability[0], atol=1e-5)


@cache
def update_program(sac, args, part: str):
    return jax.jit(
        jax.shard_map(
            partial(getattr(sac, part), args, shared_env(sac)),
            mesh=one_device(),
            in_specs=P(),
            out_specs=P(),
            check_vma=False,
        )
    )


# ---- Networks


def numpy_mlp(params, x, norm: str):
    """The network in float64."""
    layers = dict(params["params"])
    out = layers.pop("out")
    x = np.float64(x)
    for i in range(len(layers)):
        layer = layers[f"{norm}_{i}"]
        x = x @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
        if norm == "layer":
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        if norm == "rms":
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        x = np.maximum(x, 0)
    return x @ np.float64(out["kernel"]) + np.float64(out["bias"])


def numpy_policy(params, obs, noise, norm: str = "rms"):
    """Actions and log densities, straight from the definition."""
    mean, raw = np.split(numpy_mlp(params, obs, norm), 2, axis=-1)
    log_std = -5 + 3.5 * (np.tanh(raw) + 1)
    u = mean + np.exp(log_std) * np.float64(noise)
    normal = -0.5 * np.float64(noise) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    return np.tanh(u), (normal - np.log(1 - np.tanh(u) ** 2)).sum(-1)


def numpy_critics(params, obs, action, norm: str = "rms"):
    x = np.concatenate([np.float64(obs), np.float64(action)], axis=-1)
    return np.stack([numpy_mlp(params[name], x, norm) for name in ("qf1", "qf2")])


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def check_networks(sac) -> None:
    """Each kind of layer is the formula's, and the exported policy the actor's median."""
    obs = np.float32(np.random.default_rng(1).normal(size=(30, 1)))
    for norm in ("none", "layer", "rms"):
        args = make_args(sac, layer_norm=norm)
        learner = make_learner(sac, args)
        stats = sac.RunningStats(jnp.float32(1), jnp.full(1, 0.4), jnp.full(1, 2.0))
        learner = learner.replace(obs_stats=stats)
        seen = sac.normalize(stats, obs)
        memory, policy = sac.apply_policy(args, shared_env(sac), learner.params["actor"], (), seen)
        action, logprob = policy.sample(jnp.ones((30, 1)))
        expected = numpy_policy(learner.params["actor"], seen, np.ones((30, 1)), norm)
        np.testing.assert_allclose(action, expected[0], atol=1e-4)
        np.testing.assert_allclose(logprob, expected[1], rtol=1e-3, atol=1e-3)

        stats = learner.critic_stats
        output = sac.apply_critics(args, shared_env(sac), learner.targets, stats, seen, action)
        np.testing.assert_allclose(
            output, numpy_critics(learner.targets, seen, action, norm), atol=1e-3
        )
        exported = sac.export_policy(shared_env(sac), learner)
        kept, control = sac.act(exported, (), obs)
        assert memory == kept == ()
        assert type(control) is np.ndarray
        np.testing.assert_allclose(control, np.tanh(policy.mean), atol=1e-4)


def numpy_batch_critic(params, x, stats=None):
    """A critic by batch normalisation: its output, and the mean and variance used for each layer."""
    used = []

    def normalized(x):
        mean, var = (x.mean(axis=0), x.var(axis=0)) if stats is None else stats[len(used)]
        used.append((mean, var))
        return (x - mean) / np.sqrt(var + 1e-5)

    x = normalized(x)
    layers = params["params"]
    for i in range(sum(name.startswith("batch_") for name in layers)):
        x = normalized(x @ np.float64(layers[f"batch_{i}"]["kernel"]))
        x = np.maximum(x + layers[f"BatchNorm_{i + 1}"]["bias"], 0)
    return x @ np.float64(layers["out"]["kernel"]) + layers["out"]["bias"], used


def check_batch_norm(sac) -> None:
    """Both ends of a minibatch are one batch; an update moves the running statistics, by which the
    actor's loss asks the critics."""
    args = make_args(sac, batch_norm=True)
    learner = make_learner(sac, args)
    env = shared_env(sac)
    mb = make_batch(sac, 64)
    # Shifts are 0 at the start.
    params = jax.tree.map_with_path(
        lambda path, x: x + 0.3 if "BatchNorm" in jax.tree_util.keystr(path) else x,
        learner.params["critics"],
    )
    learner = learner.replace(params=learner.params | {"critics": params})
    stats = learner.critic_stats
    next_action, _ = sac.draw_next_actions(args, env, learner, mb)
    begin, end, moved = jax.jit(partial(sac.apply_at_both_ends, args, env))(
        params, stats, mb, next_action
    )
    x = np.concatenate(
        [
            np.concatenate([mb.obs, mb.action], axis=1),
            np.concatenate([mb.next_obs, next_action], axis=1),
        ]
    ).astype(float)
    by_hand = {name: numpy_batch_critic(params[name], x) for name in ("qf1", "qf2")}
    outputs = np.stack([output for output, _ in by_hand.values()])
    np.testing.assert_allclose(begin, outputs[:, :64], atol=1e-3)
    np.testing.assert_allclose(end, outputs[:, 64:], atol=1e-3)
    broken = mb.replace(reward=jnp.full(64, jnp.nan), obs=jnp.full((64, 1), jnp.nan))
    kept, _ = update_program(sac, args, "update_critics")(learner, broken)
    assert_same(kept.critic_stats, learner.critic_stats)
    for name, (_, used) in by_hand.items():
        for i, (mean, var) in enumerate(used):
            layer = moved[name]["batch_stats"][f"BatchNorm_{i}"]
            np.testing.assert_allclose(layer["mean"], 0.01 * mean, atol=1e-4)
            np.testing.assert_allclose(layer["var"], 0.99 + 0.01 * var, atol=1e-4)

    after, _ = update_program(sac, args, "update_critics")(learner, mb)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), after.critic_stats, moved)
    output = sac.apply_critics(args, env, params, moved, mb.obs, mb.action)
    layers = moved["qf2"]["batch_stats"]
    known = [(layer["mean"], layer["var"]) for _, layer in sorted(layers.items())]
    expected, _ = numpy_batch_critic(params["qf2"], x[:64], known)
    np.testing.assert_allclose(output[1], expected, atol=1e-3)


def check_start(sac) -> None:
    """The critics are two, the targets theirs, hidden weights of norm 1, actions all noise."""
    args = make_args(sac)
    learner = start(sac, args, shared_env(sac)).learner
    critics = learner.params["critics"]
    assert differs(critics["qf1"], critics["qf2"])
    assert_same(critics, learner.targets)
    for network in (learner.params["actor"], critics["qf1"]):
        for name, layer in network["params"].items():
            if name != "out":
                norms = np.linalg.norm(layer["kernel"], axis=0)
                np.testing.assert_allclose(norms, 1, rtol=1e-5)
    assert np.abs(learner.params["actor"]["params"]["out"]["kernel"]).max() < 0.02
    assert learner.params["log_alpha"] == pytest.approx(math.log(args.alpha))


# ---- Losses


def check_critic_target(sac) -> None:
    """Reward, and the discounted smaller (or mean) target with its entropy, by NumPy."""
    mb = make_batch(sac, 64)
    for distributional in (False, True):
        for twin in ("min", "mean"):
            args = make_args(sac, distributional=distributional, twin=twin)
            learner = make_learner(sac, args)

            def target_of(learner, mb, args=args):
                env = shared_env(sac)
                drawn = sac.draw_next_actions(args, env, learner, mb)
                return sac.critic_target(args, env, learner, mb, *drawn)

            target = jax.jit(target_of)(learner, mb)
            action, logprob = numpy_policy(learner.params["actor"], mb.next_obs, mb.next_noise)
            output = numpy_critics(learner.targets, mb.next_obs, action)
            reward, discount = np.float64(mb.reward), np.float64(mb.discount)
            if distributional:
                places = np.linspace(-3, 3, 11)
                probability = softmax(output)
                less = np.argmin(probability @ places, axis=0)
                assert 0 < less.sum() < 64
                chosen = probability[less, np.arange(64)]
                chosen = chosen if twin == "min" else probability.mean(axis=0)
                place = places - 0.3 * logprob[:, None]
                place = reward[:, None] + discount[:, None] * place
                expected = numpy_projection(args, chosen, place)
            else:
                value = output[..., 0]
                value = value.min(axis=0) if twin == "min" else value.mean(axis=0)
                expected = reward + discount * (value - 0.3 * logprob)
                assert target[1] == pytest.approx(reward[1], rel=1e-5)
            np.testing.assert_allclose(target, expected, atol=2e-3)


def check_critic_loss(sac) -> None:
    """Cross-entropy or squared error of both, over the valid transitions, and the metrics."""
    mb = make_batch(sac)
    random = np.random.default_rng(3)
    for distributional in (False, True):
        args = make_args(sac, distributional=distributional)
        learner = make_learner(sac, args)
        target = random.dirichlet(np.ones(11), 4) if distributional else random.normal(size=4)
        target = np.float32(target)
        loss, (metrics, _) = jax.jit(partial(sac.critic_loss, args, shared_env(sac)))(
            learner.params["critics"], learner.critic_stats, mb, mb.action, target
        )
        output = numpy_critics(learner.params["critics"], mb.obs, mb.action)
        if distributional:
            error = -(target * np.log(softmax(output))).sum(-1)
            value = softmax(output) @ np.linspace(-3, 3, 11)
        else:
            value = output[..., 0]
            error = (value - target) ** 2
        first, second = error[:, :3].mean(axis=1)
        expected = {
            "losses/qf1_values": value[0, :3].mean(),
            "losses/qf2_values": value[1, :3].mean(),
            "losses/qf1_loss": first,
            "losses/qf2_loss": second,
            "losses/qf_loss": (first + second) / 2,
        }
        assert loss == pytest.approx(first + second, rel=1e-3)
        assert metrics.keys() == expected.keys()
        for tag, number in expected.items():
            assert metrics[tag] == pytest.approx(number, rel=1e-3, abs=1e-4), tag


def check_actor_and_alpha_loss(sac) -> None:
    """Weighted log density less the smaller (or mean) critic, and the temperature's slope."""
    mb = make_batch(sac, 8)
    for twin in ("min", "mean"):
        args = make_args(sac, twin=twin)
        learner = make_learner(sac, args)
        program = jax.jit(partial(sac.actor_loss, args, shared_env(sac)))
        loss, mean_logprob = program(learner.params["actor"], learner, mb)
        action, logprob = numpy_policy(learner.params["actor"], mb.obs, mb.noise)
        output = numpy_critics(learner.params["critics"], mb.obs, action)
        value = softmax(output) @ np.linspace(-3, 3, 11)
        value = value.min(axis=0) if twin == "min" else value.mean(axis=0)
        assert loss == pytest.approx((0.3 * logprob - value)[:7].mean(), abs=2e-3)
        assert mean_logprob == pytest.approx(logprob[:7].mean(), abs=2e-3)

    for target_std, entropy in (
        (None, -1.0),
        (0.15, math.log(0.15 * math.sqrt(2 * math.pi * math.e))),
    ):
        args = make_args(sac, target_std=target_std)
        assert args.target_entropy(6) == pytest.approx(6 * entropy)
        for logprob in (-0.5, 0.2, 1.7):
            value, slope = jax.value_and_grad(sac.alpha_loss, argnums=2)(
                args, shared_env(sac), jnp.log(0.3), logprob
            )
            assert value == pytest.approx(0.3 * (-logprob - entropy), abs=1e-6)
            assert slope == pytest.approx(float(value), abs=1e-6)


# ---- Update


def largest_change(before, after) -> float:
    changes = jax.tree.map(lambda a, b: np.abs(as_numpy(a) - as_numpy(b)).max(), before, after)
    return max(jax.tree.leaves(changes))


def check_update(sac) -> None:
    """Each part moves by its own step size, targets by tau; two updates of critics, one of the actor."""
    args = make_args(sac, weight_norm=False, policy_lr=1e-3, q_lr=4e-3, tau=0.05, final_lr=1.0)
    buffer = filled(sac, args, 3)
    wide = sac.RunningStats(count=jnp.float32(1), mean=jnp.zeros(1), var=jnp.full(1, 1e6))
    learner = make_learner(sac, args).replace(steps=jnp.int32(12), obs_stats=wide)
    learner = learner.replace(largest_return=jnp.float32(3000))
    mbs = draw_minibatches(sac, args, learner, buffer)
    mbs = jax.tree.map(lambda x: x[:2], mbs)

    learners = [learner]
    for i in range(2):
        mb = jax.tree.map(lambda x, i=i: x[i], mbs)
        after, _ = update_program(sac, args, "update_critics")(learners[-1], mb)
        learners.append(after)
    for before, after in itertools.pairwise(learners):
        expected = jax.tree.map(
            lambda new, old: 0.05 * new + 0.95 * old, after.params["critics"], before.targets
        )
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, after.targets, expected)
        assert differs(before.params["critics"], after.params["critics"])
        assert_same(before.params["actor"], after.params["actor"])
        assert_same(before.params["log_alpha"], after.params["log_alpha"])
    last, _ = update_program(sac, args, "update_actor")(learners[-1], mb)
    assert_same(last.params["critics"], learners[-1].params["critics"])

    together, metrics = update_program(sac, args, "update")(learner, mbs)
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, together.params, last.params)
    # Adam's first steps hardly depend on the gradient's size; its moments do.
    for name, opt_state in last.opt_state.items():
        moments = together.opt_state[name].inner_state.mu
        jax.tree.map(close, moments, opt_state.inner_state.mu)
    # Adam's first step is the step size.
    for name, before, after, rate in (
        ("critics", learners[0], learners[1], 4e-3),
        ("actor", learner, together, 1e-3),
        ("log_alpha", learner, together, 4e-3),
    ):
        change = largest_change(before.params[name], after.params[name])
        assert change == pytest.approx(rate, rel=2e-2), name
    names = "qf1_values qf2_values qf1_loss qf2_loss qf_loss actor_loss alpha alpha_loss entropy"
    tags = {f"losses/{name}" for name in names.split()} | {"charts/skipped_in_a_row"}
    assert metrics.keys() == tags
    assert all(np.isfinite(value) for value in metrics.values())


def check_temperature(sac) -> None:
    """It rises where the policy has less entropy than is wanted, falls where more, or stays."""
    mb = make_batch(sac).replace(noise=jnp.ones((4, 1)))
    before = math.log(0.3)
    for target_std, sign in ((1e-3, -1), (1e3, 1)):
        args = make_args(sac, target_std=target_std)
        learner, metrics = update_program(sac, args, "update_actor")(make_learner(sac, args), mb)
        assert np.sign(learner.params["log_alpha"] - before) == sign
        assert metrics["losses/alpha"] == pytest.approx(0.3, rel=1e-5)
    args = make_args(sac, autotune=False)
    learner, metrics = update_program(sac, args, "update_actor")(make_learner(sac, args), mb)
    assert learner.params["log_alpha"] == pytest.approx(before, rel=1e-6)
    assert metrics["losses/alpha"] == pytest.approx(args.alpha)  # whatever was inherited
    assert "losses/alpha_loss" not in metrics


def check_learning_rates(sac) -> None:
    """They fall linearly to their share, each from its own start."""
    for final_lr, shares in ((1.0, [1, 1, 1, 1]), (0.2, [1, 0.8, 0.6, 0.4])):
        args = make_args(sac, policy_lr=1e-3, q_lr=2e-3, final_lr=final_lr)
        assert args.num_iterations == 4
        learner = make_learner(sac, args)
        for i in range(4):
            rates = sac.learning_rates(args, learner.replace(iteration=jnp.int32(i)))
            assert rates["actor"] == pytest.approx(1e-3 * shares[i])
            assert rates["critics"] == rates["log_alpha"] == pytest.approx(2e-3 * shares[i])


def check_weights_stay_on_the_sphere(sac) -> None:
    """After an update hidden units' weights have norm 1, unless the flag is off."""
    mb = make_batch(sac)
    for weight_norm in (True, False):
        args = make_args(sac, weight_norm=weight_norm, policy_lr=0.1)
        learner, _ = update_program(sac, args, "update_actor")(make_learner(sac, args), mb)
        layers = learner.params["actor"]["params"]
        norms = np.linalg.norm(layers["rms_0"]["kernel"], axis=0)
        assert np.allclose(norms, 1, rtol=1e-5) == weight_norm
        assert not np.allclose(np.linalg.norm(layers["out"]["kernel"], axis=0), 1, rtol=1e-5)


def check_scales(sac) -> None:
    """Rewards are divided by the returns' deviation, or by more if a return would exceed v_max.

    What broke a world is in no statistic.
    """
    args = make_args(sac)
    learner = make_learner(sac, args)
    for largest, expected in ((0.0, 2.0), (9.0, 3.0)):
        stats = sac.RunningStats(jnp.float32(9), jnp.zeros(()), jnp.float32(4))
        changed = learner.replace(return_stats=stats, largest_return=jnp.float32(largest))
        assert sac.reward_scale(args, changed) == pytest.approx(expected)
        plain = make_args(sac, norm_reward=False)
        assert sac.reward_scale(plain, changed) == 1

    returns = jnp.array([[1.0, -7.0], [3.0, 1e9]])
    steps = types.SimpleNamespace(
        start=types.SimpleNamespace(obs=jnp.array([[[1.0], [2.0]], [[3.0], [1e9]]])),
        end=types.SimpleNamespace(discounted_return=returns),
        valid=jnp.array([[True, True], [True, False]]),
    )

    def observe(args):
        function = lambda learner: sac.update_statistics(args, learner, steps)  # noqa: E731
        return on_mesh(one_device(), function, learner)

    after = observe(args)
    assert after.largest_return == 7
    np.testing.assert_allclose(after.return_stats.mean, -1, rtol=1e-3)
    np.testing.assert_allclose(after.return_stats.var, 56 / 3, rtol=1e-3)
    np.testing.assert_allclose(after.obs_stats.mean, 2, rtol=1e-3)
    assert_same(observe(make_args(sac, norm_obs=False, norm_reward=False)), learner)


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


@pytest.mark.parametrize("name", CHECKS)
def test_check(name):
    CHECKS[name](sac_mjx)


@pytest.mark.slow
def test_draws_before_the_buffer_is_full():
    check_draws(sac_mjx, rollouts=1)


def test_invalid_transitions_are_not_learnt_from():
    """Whatever they hold, the losses are the same to the bit."""
    args = make_args()
    learner = make_learner(sac_mjx, args)
    mb = make_batch(sac_mjx)
    other = jax.tree.map(lambda x, y: x.at[-1].set(y[0]), mb, make_batch(sac_mjx, seed=9))
    other = other.replace(valid=mb.valid)
    target = jnp.full((4, 11), 1 / 11)
    critics = learner.params["critics"]
    critic_loss = jax.jit(partial(sac_mjx.critic_loss, args, shared_env(sac_mjx)))
    actor_loss = jax.jit(partial(sac_mjx.actor_loss, args, shared_env(sac_mjx)))
    losses = [
        critic_loss(critics, learner.critic_stats, batch, mb.action, target)
        for batch in (mb, other)
    ]
    assert_same(*losses)
    actor = learner.params["actor"]
    first = actor_loss(actor, learner, mb)
    assert_same(first, actor_loss(actor, learner, other))
    assert differs(first, actor_loss(actor, learner, mb.replace(valid=~mb.valid)))


# ---- Whole iterations


@cache
def iterate_program(args, env, devices: int):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("devices",))
    if args.buffer_device == "device":
        return mesh, partial(sac_mjx.train_iteration, args, env, mesh)

    def shape(sharding, tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    shardings = jax.tree.map(partial(NamedSharding, mesh), sac_mjx.STATE_SPEC)
    init = partial(sac_mjx.init_train_state, args, env)
    shapes = jax.tree.map(shape, shardings, jax.eval_shape(init, jax.random.key(0)))
    programs = [low.compile() for low in sac_mjx.lower_iteration(args, env, mesh, shapes)]
    return mesh, partial(sac_mjx.host_iteration, args, mesh, *programs)


def iterate(args, env, iterations: int, state=None):
    """The state after so many iterations, and the metrics of each."""
    mesh, program = iterate_program(args, env, args.num_devices)
    state = start(sac_mjx, args, env, mesh) if state is None else state
    history = []
    for _ in range(iterations):
        state, metrics = program(state)
        metrics.pop("black_box")
        history.append(jax.device_get(metrics))
    return state, history


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_iterations_run(devices):
    """Clocks count, first actions are uniform, all is finite, each device has the same networks."""
    if len(jax.devices()) < devices:
        pytest.skip("needs two devices")
    args = make_args(num_devices=devices, learning_starts=40)
    env = constant(sac_mjx, truncates=True, shows_time=True)
    state, history = iterate(args, env, 3)
    learner = state.learner
    assert (int(learner.steps), int(learner.iteration)) == (12, 3)
    assert math.isnan(history[0]["losses/qf_loss"])
    assert np.isfinite(history[1]["losses/qf_loss"])
    assert np.isfinite(history[1]["losses/actor_loss"])
    for metrics in history[1:]:
        assert metrics["charts/nan_resets"] == metrics["charts/skipped_updates"] == 0
        assert metrics["reward/all"] == 1
        assert metrics["charts/episodes_finished"] > 0
        assert metrics["charts/episodic_return"] == metrics["charts/episodic_length"] == 5

    buffer = jax.tree.map(as_numpy, state.buffer)
    assert buffer.valid[:12].all()
    assert not buffer.valid[12:].any()
    assert np.abs(buffer.action[:5]).std() > 0.2
    assert np.abs(buffer.action[:12]).max() <= 1
    goes_on = ~buffer.done[:11]
    np.testing.assert_array_equal(buffer.obs[1:12][goes_on], buffer.next_obs[:11][goes_on])
    np.testing.assert_array_equal(buffer.next_obs[:12][buffer.done[:12]], 5)
    assert not buffer.terminated.any()
    for leaf in jax.tree.leaves(learner):
        shards = [as_numpy(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == devices
        assert all((shard == shards[0]).all() for shard in shards)


@pytest.mark.slow
def test_no_update_before_learning_starts():
    """The random steps of each world are rounded up, and change no network."""
    args = make_args(learning_starts=129)
    env = constant(sac_mjx, truncates=True)
    before = jax.tree.map(as_numpy, start(sac_mjx, args, env).learner.params)
    state, history = iterate(args, env, 4)
    assert args.random_steps == 17
    assert_same(state.learner.params, before)
    state, history = iterate(args, env, 1, state)
    assert differs(state.learner.params, before)


def test_broken_world_is_reset_and_not_learnt_from():
    """Its step earns nothing, is not valid, and is counted."""
    args = make_args(learning_starts=1)
    env = constant(sac_mjx, truncates=True, shows_time=True, breaks_at=3)
    state, history = iterate(args, env, 2)
    buffer = jax.tree.map(as_numpy, state.buffer)
    broken = (buffer.obs[:8, :, 0] == 2).squeeze()
    assert broken.any()
    np.testing.assert_array_equal(buffer.valid[:8], ~broken)
    assert not buffer.reward[:8][broken].any()
    assert buffer.done[:8][broken].all()
    assert history[1]["charts/nan_resets"] == broken.sum()
    assert all(np.isfinite(as_numpy(leaf)).all() for leaf in jax.tree.leaves(state.learner))


@pytest.mark.parametrize("devices", [1, 2])
def test_host_buffer_learns_the_same(devices):
    """A buffer in the host's memory gives the same networks, worlds and buffer."""
    if len(jax.devices()) < devices:
        pytest.skip("needs two devices")
    args = make_args(num_devices=devices, buffer_size=8 * 12, n_step=3, learning_starts=40)
    env = constant(sac_mjx, truncates=True, shows_time=True)
    on_device, first = iterate(args, env, 4)
    on_host, second = iterate(dataclasses.replace(args, buffer_device="host"), env, 4)
    assert type(on_host.buffer.obs) is np.ndarray
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: close(as_numpy(a), as_numpy(b)), on_device, on_host)
    for ours, theirs in zip(first, second, strict=True):
        jax.tree.map(close, ours, theirs)


@pytest.mark.parametrize("buffer_device", ["device", "host"])
def test_resume_is_bit_equal(tmp_path, buffer_device):
    """Two iterations, a checkpoint and two more end as four do, buffer and all."""
    args = make_args(buffer_size=8 * 12, buffer_device=buffer_device)
    env = constant(sac_mjx, truncates=True)
    half, _ = iterate(args, env, 2)
    sac_mjx.save(args, tmp_path, half, {})
    other = start(sac_mjx, dataclasses.replace(args, seed=2), env)
    restored = sac_mjx.restore(args, tmp_path, other)
    assert int(restored.learner.iteration) == 2
    resumed, _ = iterate(args, env, 2, restored)
    whole, _ = iterate(args, env, 4)
    assert int(whole.learner.steps) == 16 > args.buffer_rows
    assert_same(resumed, whole)


# ---- Probes: environments whose answer is known


def train_probe(env, iterations: int = 150, **settings):
    """Train, and return functions from an observation to the policy's action and to the value."""
    args = make_args(
        **{
            "num_envs": 16,
            "num_steps": 4,
            "buffer_size": 16 * 2000,
            "batch_size": 64,
            "updates_per_iteration": 20,
            "learning_starts": 256,
            "gamma": 0.5,
            "tau": 0.05,
            "policy_lr": 3e-3,
            "q_lr": 3e-3,
            "hidden_sizes": (16, 16),
            "num_atoms": 51,
            "alpha": 1e-3,
            "autotune": False,
            "norm_reward": False,
            "norm_obs": False,
            "total_timesteps": 64 * iterations,
        }
        | settings
    )
    state, _ = iterate(args, env, iterations)
    learner = state.learner

    def action(obs: float) -> float:
        exported = sac_mjx.export_policy(env, learner)
        return float(sac_mjx.act(exported, (), np.float32([obs]))[1][0])

    def value(obs: float, action: float = 0.0) -> float:
        obs = sac_mjx.normalize(learner.obs_stats, jnp.float32([obs]))
        output = sac_mjx.apply_critics(
            args,
            env,
            learner.params["critics"],
            learner.critic_stats,
            obs,
            jnp.float32([action]),
        )
        scale = sac_mjx.reward_scale(args, learner)
        return float((sac_mjx.critic_values(args, output) * scale).mean())

    return action, value


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="defaults", marks=pytest.mark.slow),
        pytest.param(
            {"n_step": 3, "norm_reward": True, "norm_obs": True}, id="all", marks=pytest.mark.slow
        ),
        pytest.param(
            {"distributional": False, "layer_norm": "none", "weight_norm": False},
            id="plain",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_probe_time_limit_is_no_end(settings):
    """Reward 1 forever, cut each 5 steps: the value is 1 / (1 - gamma) = 2, as if never cut."""
    _, value = train_probe(constant(sac_mjx, truncates=True), **settings)
    assert value(0.0) == pytest.approx(2.0, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("n_step", [1, 3])
def test_probe_discount(n_step):
    """Reward 1 at the end of two steps: the values are gamma, then 1."""
    env = Probe(
        sac_mjx, lambda elapsed, action: jnp.where(elapsed == 2, 1.0, 0.0), 2, shows_time=True
    )
    _, value = train_probe(env, n_step=n_step)
    assert value(0.0) == pytest.approx(0.5, abs=0.06)
    assert value(1.0) == pytest.approx(1.0, abs=0.06)


@pytest.mark.slow
def test_probe_best_action():
    """Reward 1 - 2 (a - 0.5)^2: the policy's action becomes 0.5."""
    env = Probe(sac_mjx, lambda elapsed, action: 1 - 2 * jnp.square(action - 0.5), 1)
    action, value = train_probe(env)
    assert action(0.0) == pytest.approx(0.5, abs=0.1)
    assert value(0.0, 0.5) == pytest.approx(1.0, abs=0.1)
    assert value(0.0, -0.5) == pytest.approx(-1.0, abs=0.4)


# ---- Mutations: a wrong script fails the check that is named

MUTATIONS = {
    "no minimum of twins": (
        "critic_target",
        'value.min(axis=0) if args.twin == "min" else value.mean(axis=0)\n        return mb.reward',
        "value.mean(axis=0)\n        return mb.reward",
    ),
    "the larger twin": ("critic_target", "value[0] < value[1]", "value[0] > value[1]"),
    "targets are not asked": (
        "critic_target",
        "targets, stats = learner.targets,",
        'targets, stats = learner.params["critics"],',
    ),
    "no entropy in the target": ("critic_target", "atoms(args) + entropy", "atoms(args) + 0 * entropy"),
    "the entropy's sign": ("critic_target", "next_action, -temperature", "next_action, temperature"),
    "time limits do not bootstrap": ("n_step_by_hand", "counted & terminated", "counted & done"),
    "terminations bootstrap": ("n_step_by_hand", "jnp.where(goes_on, args", "jnp.where(True, args"),
    "sums go on over an end": ("n_step_by_hand", "jnp.cumprod(valid, axis=0) * alive", "jnp.cumprod(valid, axis=0)"),
    "one step's discount": ("n_step_by_hand", "args.gamma**length", "args.gamma"),
    "the newest step is passed": ("draws", "[rows, world] & (ahead <= age)", "[rows, world]"),
    "rewards are not scaled": ("draws", "reward / reward_scale(args, learner)", "reward"),
    "the first step's end": ("draws", "(rows[0] + last)", "(rows[0] + 0 * last)"),
    "no ends of the atoms": (
        "projection_is_a_loop",
        "place = jnp.clip(place, -args.v_max, args.v_max)",
        "place = 1.0 * place",
    ),
    "swapped learning rates": (
        "update",
        '"actor": args.policy_lr * share,\n        "critics": args.q_lr * share',
        '"actor": args.q_lr * share,\n        "critics": args.policy_lr * share',
    ),
    "stale targets": ("update", "learner.replace(targets=targets, critic_stats", "learner.replace(critic_stats"),
    "the critics as targets": ("update", 'learner.targets, args.tau)', "learner.targets, 1.0)"),
    "the actor learns from the first": ("update", "lambda x: x[-1], mbs", "lambda x: x[0], mbs"),
    "each iteration draws the same": ("draws", "learner.key, learner.iteration)", "learner.key, 0)"),
    "the temperature's sign": ("temperature", "return -jnp.exp(log_alpha)", "return jnp.exp(log_alpha)"),
    "the actor asks the targets": (
        "actor_and_alpha_loss",
        'learner.params["critics"], learner.critic_stats\n    output',
        "learner.targets, learner.critic_stats\n    output",
    ),
    "each end by itself": (
        "batch_norm",
        "obs = jnp.concatenate([mb.obs, mb.next_obs])",
        "obs = jnp.concatenate([mb.obs, mb.obs])",
    ),
    "statistics stay": ("batch_norm", "targets=targets, critic_stats=stats", "targets=targets"),
    "learning rates stay": ("learning_rates", "(1 - args.final_lr)", "0 * (1 - args.final_lr)"),
    "broken steps in the statistics": ("scales", "jnp.where(steps.valid, jnp.abs", "jnp.where(True, jnp.abs"),
    "rewards may leave the atoms": ("scales", "jnp.maximum(deviation, learner", "jnp.minimum(deviation, learner"),
    "oldest rows are kept": (
        "buffer_keeps_the_last_steps",
        "rows = (first + jnp.arange(args.num_steps)) % args.buffer_rows",
        "rows = first + jnp.arange(args.num_steps)",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(tmp_path, name):
    check, old, new = MUTATIONS[name]
    source = SCRIPT.read_text()
    assert source.count(old) == 1
    file = tmp_path / "mutant.py"
    file.write_text(source.replace(old, new))
    mutant = load_script(file)
    with pytest.raises(AssertionError):
        CHECKS[check](mutant)


# ---- The script


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 1),
        ({"batch_size": 256}, None),
        ({"num_envs": 256}, None),
        ({"num_devices": 2}, 2),
    ],
)
def test_small_minibatches_are_for_one_core(changes, count):
    assert sac_mjx.wanted_devices(sac_mjx.Args(**changes)) == count


FLAGS = "--num-envs 8 --num-steps 4 --updates-per-iteration 3 --buffer-size 64 --batch-size 8"
FLAGS += " --learning-starts 32 --hidden-sizes 8 --num-atoms 5 --num-devices 1 --eval-episodes 50"
FLAGS += " --env-id InvertedPendulum --eval-every 2 --checkpoint-every 2 --total-timesteps 128"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A finished run of four iterations, by the command line."""
    runs = tmp_path_factory.mktemp("runs")
    sac_mjx.main([*FLAGS.split(), "--runs-dir", str(runs)])
    (folder,) = runs.iterdir()
    return folder


def test_run_folder(run_dir):
    """Results of each simulator, the buffer's bytes, two checkpoints; a resume ends the same."""
    run = json.loads((run_dir / "run.json").read_text())
    assert run["evaluation"].keys() == {"MJX", "C MuJoCo", "Gymnasium"}
    means = [result["mean"] for result in run["evaluation"].values()]
    np.testing.assert_allclose(means, means[0], rtol=0.2)
    assert run["buffer_bytes"] == 64 * (4 * (4 + 1 + 1 + 4) + 3)
    assert [int(file.stem) for file in sac_mjx.checkpoints(run_dir)] == [4, 2]

    policy = (run_dir / "policy.npz").read_bytes()
    last = sac_mjx.checkpoints(run_dir)[0].read_bytes()
    sac_mjx.checkpoints(run_dir)[0].unlink()
    sac_mjx.main(["--resume", str(run_dir)])
    assert (run_dir / "policy.npz").read_bytes() == policy
    assert sac_mjx.checkpoints(run_dir)[0].read_bytes() == last


def test_init_from(run_dir, tmp_path):
    """A new run begins with the old one's networks, statistics and temperature."""
    flags = [*FLAGS.split(), "--init-from", str(run_dir), "--runs-dir", str(tmp_path)]
    with np.load(sac_mjx.checkpoints(run_dir)[0]) as saved:
        expected = dict(saved)
    args = sac_mjx.parse_args(flags, sac_mjx.default_args("InvertedPendulum"))
    learner = sac_mjx.inherit(run_dir, start(sac_mjx, args, sac_mjx.Env(args)).learner)
    arrays = sac_mjx.to_arrays(learner)
    taken = [name for name in arrays if name.startswith((".params", ".targets", ".obs", ".return"))]
    assert len(taken) > 10
    for name in taken:
        np.testing.assert_array_equal(arrays[name], expected[".learner" + name])
    assert arrays[".iteration"] == 0


@pytest.mark.parametrize(("init_from", "deviation"), [(None, 3**-0.5), ("other", 0.22)])
def test_first_actions(init_from, deviation):
    """They are uniform, but for a policy that was taken from another run."""
    args = make_args(init_from=init_from, num_steps=8, learning_starts=1000)
    env = constant(sac_mjx, truncates=True)
    state = start(sac_mjx, args, env)
    rollout = jax.jit(partial(sac_mjx.rollout, args, env))
    _, steps = rollout(state.learner, state.worlds)
    assert steps.action.std() == pytest.approx(deviation, rel=0.25)


def test_other_layers_do_not_inherit(run_dir, capsys):
    """Parameters of layers that are normalised in another way are refused."""
    args = dataclasses.replace(sac_mjx.read_run(run_dir), layer_norm="layer")
    with pytest.raises(SystemExit):
        sac_mjx.inherit(run_dir, start(sac_mjx, args, sac_mjx.Env(args)).learner)
    assert "does not fit" in capsys.readouterr().err


def test_exported_graph_acts_the_same(run_dir):
    """The ONNX graph gives the controls of `act`."""
    onnx = pytest.importorskip("onnx.reference")
    export.main([str(run_dir)])
    obs = np.random.default_rng(0).normal(0, 3, (50, 4)).astype(np.float32)
    with np.load(run_dir / "policy.npz") as policy:
        _, expected = sac_mjx.act(dict(policy), (), obs)
    graph = onnx.ReferenceEvaluator(str(run_dir / "policy.onnx"))
    (control,) = graph.run(None, {"obs": obs})
    np.testing.assert_allclose(control, expected, atol=1e-5)


BAD_CALLS = """
--env-id Pendulum
--num-envs 0
--num-envs 15 --num-devices 2 --buffer-size 15000
--batch-size 33 --num-devices 2
--buffer-size 1000
--buffer-size 64
--buffer-size 100000000000
--total-timesteps 100
--updates-per-iteration 0
--n-step 0
--num-atoms 1
--v-max 0
--alpha 0
--target-std 0
--final-lr 1.5
--tau 2
--gamma nan
--policy-lr -1
--twin max
--layer-norm batch
--policy-frequency 0
--policy-frequency 5
--learning-starts -1
--learning-starts 300000
--hidden-sizes 0
--resume missing
--evaluate missing
"""


@pytest.mark.parametrize("call", BAD_CALLS.strip().splitlines())
def test_bad_call_ends_with_one_line(tmp_path, monkeypatch, capsys, call):
    """What cannot run is refused by code 2 and a line that names the culprit, without a trace."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sac_mjx.main(call.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert call.split()[0].removeprefix("--") in error or call.split()[1] in error
    assert not list(Path().iterdir())


def test_dependencies_are_pinned_alike():
    """Each package of the script's inline metadata (PEP 723) has the same pin elsewhere."""
    (block,) = re.findall(r"(?ms)^# /// script\n(.*?)^# ///$", SCRIPT.read_text())
    metadata = tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))
    requirements = (SCRIPT.parent / "requirements.txt").read_text()
    lines = {line.split("#")[0].strip() for line in requirements.splitlines()}
    assert set(metadata["dependencies"]) <= lines
    assert all("==" in package for package in metadata["dependencies"])


def test_every_setting_is_used():
    """No flag is without effect: each field of Args is read somewhere."""
    fields = {field.name for field in dataclasses.fields(sac_mjx.Args)}
    read = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Attribute):
            owner = getattr(node.value, "id", None) or getattr(node.value, "attr", None)
            read |= {node.attr} if owner in ("args", "self") else set()
    assert fields - read == set()


@pytest.mark.slow
def test_half_cheetah_learns(tmp_path):
    """A short run with the defaults gets to where a random policy (about -300) does not."""
    with optimised():
        sac_mjx.main(["--total-timesteps", "60000", "--runs-dir", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    evaluation = json.loads((folder / "run.json").read_text())["evaluation"]
    assert 4000 < evaluation["Gymnasium"]["mean"] < 9000
