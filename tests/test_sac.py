"""SAC on pendulums: physics in closed form, buffer, losses by hand, iterations, a whole run."""

import ast
import dataclasses
import json
import math
import re
import tomllib
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sac_band
from jax.sharding import PartitionSpec as P
from quick import optimised
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sac_mjx_pendulum as sac

SCRIPT = Path(sac.__file__)
ARGS = sac.Args(
    num_devices=1,
    num_envs=16,
    num_steps=8,
    updates_per_step=2,
    buffer_size=16 * 20,
    batch_size=32,
    learning_starts=64,
    policy_lr=1e-3,
    q_lr=4e-3,
    hidden_sizes=(16, 16),
    total_timesteps=4 * 128,
)
OTHER = {
    "gravity": 3.7,
    "length": 0.6,
    "mass": 2.5,
    "dt": 0.02,
    "max_torque": 5.0,
    "max_speed": 3.0,
}
TASKS = {
    "Pendulum-v1": sac.Args(),
    "PointMass": sac.Args(env_id="PointMass"),
    "another Pendulum-v1": sac.Args(**OTHER),
    "another PointMass": sac.Args(env_id="PointMass", **OTHER),
}


def as_numpy(leaf) -> np.ndarray:
    """A copy, as the array itself may be donated or, on the host, written to."""
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


# ---- Environment
# All paths are of 200 steps in 32 worlds, so that a task's steps are compiled once.


@pytest.fixture(scope="module")
def make_env():
    """The environment of a task, built once."""
    return cache(lambda name="Pendulum-v1": sac.Env(TASKS[name]))


@pytest.fixture(scope="module")
def env(make_env):
    return make_env()


@cache
def step_program(env):
    """A scan of the steps of all worlds, jitted."""

    def step(state, torque):
        state = jax.vmap(sac.kernel(env.step))(state, torque[:, None])
        return state, state

    return jax.jit(partial(jax.lax.scan, step))


def start_at(env, qpos, qvel):
    """States [32] at these angles and speeds."""
    state = jax.vmap(sac.kernel(env.reset))(jax.random.split(jax.random.key(0), 32))
    qpos = np.broadcast_to(np.float32(qpos), 32)[:, None]
    qvel = np.broadcast_to(np.float32(qvel), 32)[:, None]
    data = sac.Physics(qpos=jnp.asarray(qpos), qvel=jnp.asarray(qvel))
    return state.replace(data=data, obs=sac.observe(data.qpos, data.qvel))


def run_steps(env, state, torques):
    """The path of all states [201, 32], under torques [200, 32]."""
    _, path = step_program(env)(state, jnp.asarray(torques, jnp.float32))
    join = lambda first, rest: np.concatenate([np.asarray(first)[None], rest])  # noqa: E731
    return jax.tree.map(join, state, path)


def closed_form(task, rod: bool, qpos, qvel, torque):
    """One step in float64, from the pendulum's equation and semi-implicit Euler."""
    falling = 1.5 if rod else 1.0
    turning = 3.0 if rod else 1.0
    torque = np.clip(torque, -task.max_torque, task.max_torque)
    acceleration = falling * task.gravity / task.length * np.sin(qpos)
    acceleration += turning * torque / (task.mass * task.length**2)
    qvel = np.clip(qvel + task.dt * acceleration, -task.max_speed, task.max_speed)
    return qpos + task.dt * qvel, qvel


def angle_error(first, second) -> float:
    difference = np.asarray(first, np.float64) - second
    return np.abs((difference + np.pi) % (2 * np.pi) - np.pi).max()


@pytest.mark.parametrize("name", TASKS)
def test_every_step_is_the_closed_form(make_env, name):
    """From anywhere, with any torque, 200 steps are each the closed form's from the same state."""
    env = make_env(name)
    random = np.random.default_rng(0)
    top = env.task.max_speed
    state = start_at(env, random.uniform(-np.pi, np.pi, 32), random.uniform(-top, top, 32))
    torques = np.float32(random.uniform(-1.5, 1.5, (200, 32)) * env.task.max_torque)  # some too big
    data = run_steps(env, state, torques).data

    qpos = np.float64(data.qpos[:-1, :, 0])
    qvel = np.float64(data.qvel[:-1, :, 0])
    rod = "Pendulum" in name
    next_qpos, next_qvel = closed_form(env.task, rod, qpos, qvel, np.float64(torques))
    assert angle_error(data.qpos[1:, :, 0], next_qpos) < 1e-5
    np.testing.assert_allclose(data.qvel[1:, :, 0], next_qvel, atol=1e-5)
    assert np.abs(data.qpos).max() <= np.float32(np.pi)
    assert np.abs(data.qvel).max() <= top
    if "another" not in name:
        assert (np.abs(data.qvel) == top).any()  # the limit was met


@pytest.mark.parametrize("name", TASKS)
def test_200_steps_are_the_closed_form(make_env, name):
    """A whole episode agrees too, started below the hinge.

    Near the top an error grows by exp(4) in a second.
    """
    env = make_env(name)
    random = np.random.default_rng(1)
    qpos = np.pi + random.uniform(-0.7, 0.7, 32)
    qvel = random.uniform(-0.5, 0.5, 32)
    torques = np.float32(random.uniform(-0.5, 0.5, (200, 32)) * env.task.max_torque)
    path = run_steps(env, start_at(env, qpos, qvel), torques)

    qpos = np.float64(path.data.qpos[0, :, 0])
    qvel = np.float64(path.data.qvel[0, :, 0])
    for t in range(200):
        rod = "Pendulum" in name
        qpos, qvel = closed_form(env.task, rod, qpos, qvel, np.float64(torques[t]))
        assert angle_error(path.data.qpos[t + 1, :, 0], qpos) < 3e-5, t


def test_pendulum_is_gymnasiums(env, make_env):
    """Gymnasium's Pendulum-v1 gets from each state to the same observation, for the same reward."""
    random = np.random.default_rng(2)
    original = gymnasium.make("Pendulum-v1").unwrapped
    original.reset(seed=0)
    torques = np.float32(random.uniform(-3, 3, (200, 32)))
    state = start_at(env, random.uniform(-np.pi, np.pi, 32), random.uniform(-8, 8, 32))
    path = run_steps(env, state, torques)
    for t in range(200):
        for i in range(4):
            original.state = np.float64([path.data.qpos[t, i, 0], path.data.qvel[t, i, 0]])
            obs, reward, terminated, _, _ = original.step(torques[t, i : i + 1])
            np.testing.assert_allclose(path.obs[t + 1, i], obs, atol=1e-5)
            assert path.reward[t + 1, i] == pytest.approx(reward, abs=1e-5)
            assert not terminated
    np.testing.assert_allclose(sum(path.metrics.values()), path.reward, atol=1e-6)
    assert sac.make_gymnasium(env).spec.id == "Pendulum-v1"
    assert sac.make_gymnasium(make_env("another Pendulum-v1")) is None
    assert sac.make_gymnasium(make_env("PointMass")) is None


def test_time_limit_truncates(env):
    """Step 200 is truncated, none before, and none is terminated."""
    path = run_steps(env, start_at(env, 0.5, 0.0), np.zeros((200, 32)))
    np.testing.assert_array_equal(path.info["truncated"][:, 0], np.arange(201) == 200)
    assert not path.done.any()
    assert not path.info["broken"].any()


def test_resets_cover_gymnasiums_range(env):
    """Angles are uniform on the circle, speeds from -1 to 1; the same key gives the same start."""
    keys = jax.random.split(jax.random.key(1), 2000)
    first, again = (jax.vmap(sac.kernel(env.reset))(keys) for _ in range(2))
    assert_same(first, again)
    for values, most in ((first.data.qpos, np.pi), (first.data.qvel, 1)):
        values = np.asarray(values).ravel() / most
        assert 0.99 < np.abs(values).max() <= 1 + 1e-6
        assert abs(values.mean()) < 0.06
        assert values.std() == pytest.approx(1 / np.sqrt(3), abs=0.03)
        assert len(np.unique(values)) > 1990
    expected = sac.observe(np.asarray(first.data.qpos), np.asarray(first.data.qvel), np)
    np.testing.assert_allclose(first.obs, expected, atol=1e-6)


def test_one_kernel_is_plain_jax(env, monkeypatch):
    """The kernel of many worlds takes the steps that one world takes in MJX, without jit too."""
    state = start_at(env, [-2.0, 0.1] + 30 * [3.0], [1.0, -7.9] + 30 * [0.0])
    torque = jnp.array([0.5, -9.0] + 30 * [2.0])[:, None]
    together = jax.vmap(sac.kernel(env.step))(state, torque)

    monkeypatch.setattr(sac, "onekernel", None)
    monkeypatch.setattr(sac.mjx, "step", jax.jit(sac.mjx.step))  # for time
    for i in range(3):
        alone = env.step(jax.tree.map(lambda x, i=i: x[i], state), torque[i])
        compare = lambda a, b, i=i: np.testing.assert_allclose(a, b[i], atol=1e-6)  # noqa: E731
        jax.tree.map(compare, alone, together)


def test_c_mujoco_agrees(env):
    """The evaluation's C MuJoCo environment takes the same steps, up to the time limit."""
    original = sac.CMujocoEnv(env)
    obs, _ = original.reset(5)
    start = jax.jit(sac.kernel(env.reset))(jax.random.key(5))
    np.testing.assert_allclose(obs, start.obs, atol=1e-6)

    torques = np.float32(np.random.default_rng(3).uniform(-3, 3, (200, 32)))
    path = run_steps(env, start_at(env, start.data.qpos[0], start.data.qvel[0]), torques)
    for t in range(200):
        original.data.qpos = path.data.qpos[t, 0]
        original.data.qvel = path.data.qvel[t, 0]
        obs, reward, terminated, truncated, _ = original.step(torques[t, :1])
        np.testing.assert_allclose(obs, path.obs[t + 1, 0], atol=1e-5)
        assert reward == pytest.approx(path.reward[t + 1, 0], abs=1e-5)
        assert not terminated
        assert truncated == (t == 199)


# ---- Replay buffer


def some_steps(t: int, n: int = 16) -> sac.Transition:
    """Transitions [N, ...] that tell their step and world."""
    worlds = np.arange(n, dtype=np.float32)
    return sac.Transition(
        obs=np.full((n, 3), t, np.float32),
        action=worlds[:, None],
        reward=100.0 * t + worlds,
        next_obs=np.full((n, 3), t + 1, np.float32),
        terminated=np.float32(worlds == t),
        valid=worlds != t + 1,
    )


def filled(args, env, steps: int):
    """A ring after so many writes."""
    ring = sac.init_buffer(args, env)
    for t in range(steps):
        ring = sac.write(ring, t, jax.tree.map(jnp.asarray, some_steps(t)))
    return ring


@cache
def draw_program(args, mesh, worlds: int):
    """Rows and worlds by a learner."""
    draw = jax.shard_map(
        lambda learner: sac.draw(args, learner, worlds),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(None, "devices"),
        check_vma=False,
    )
    return jax.jit(draw)


def run_draw(args, env, mesh, seed: int, written: int, worlds: int = 16):
    """Rows and worlds after so many steps, as NumPy arrays."""
    learner = make_learner(ARGS, env)
    learner = learner.replace(key=jax.random.key(seed), steps=jnp.int32(written - 1))
    return jax.tree.map(np.asarray, draw_program(args, mesh, worlds)(learner))


def test_ring_keeps_the_last_steps_in_order(env):
    """Step t lies in row t % C; the oldest are overwritten."""
    args = dataclasses.replace(ARGS, buffer_size=16 * 5 + 7)
    assert args.buffer_rows == 5
    full = filled(args, env, 8)
    for row, t in enumerate([5, 6, 7, 3, 4]):
        assert_same(jax.tree.map(lambda ring, row=row: ring[row], full), some_steps(t))
    assert not any(ring[4].any() for ring in jax.tree.leaves(filled(args, env, 4)))


@pytest.mark.parametrize("written", [1, 7, 20, 53])
def test_draws_are_uniform_over_what_is_written(env, make_mesh, written):
    """Chi-square over all transitions is as of a fair draw, and nothing unwritten is drawn."""
    args = dataclasses.replace(ARGS, updates_per_step=500, batch_size=64)
    rows, worlds = run_draw(args, env, make_mesh(1), 3, written)
    filled_rows = min(written, 20)
    assert rows.shape == worlds.shape == (500, 64)
    assert rows.dtype == worlds.dtype == np.int32
    assert (rows.min(), rows.max()) == (0, filled_rows - 1)
    assert (worlds.min(), worlds.max()) == (0, 15)
    counts = np.bincount((rows * 16 + worlds).ravel(), minlength=filled_rows * 16)
    expected = rows.size / len(counts)
    freedom = len(counts) - 1
    statistic = np.square(counts - expected).sum() / expected
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)  # chi-square's mean and deviation

    _, other_seed = run_draw(args, env, make_mesh(1), 4, written)
    _, later = run_draw(args, env, make_mesh(1), 3, written + 1)
    assert (worlds != other_seed).any()
    assert (worlds != later).any()
    assert len(np.unique(worlds, axis=0)) == 500  # no two updates of a step have the same draw


def test_two_devices_draw_their_shares(env, make_mesh):
    """Each of two devices draws half of a minibatch, and not the same one."""
    rows, worlds = run_draw(ARGS, env, make_mesh(2), 1, 20, worlds=8)
    assert rows.shape == (2, 32)
    assert worlds.max() < 8
    assert (rows[:, :16] != rows[:, 16:]).any()


def test_gather_takes_what_lies_at_its_indices(env, make_mesh):
    """A minibatch holds the transitions at its indices."""
    rows, worlds = run_draw(ARGS, env, make_mesh(1), 1, 23)
    found = sac.gather(filled(ARGS, env, 23), (rows, worlds))
    steps = np.where(rows < 3, rows + 20, rows)
    np.testing.assert_array_equal(found.reward, np.float32(100.0 * steps + worlds))
    np.testing.assert_array_equal(found.obs, np.repeat(steps[..., None], 3, axis=-1))
    np.testing.assert_array_equal(found.next_obs, found.obs + 1)
    np.testing.assert_array_equal(found.action[..., 0], worlds)
    np.testing.assert_array_equal(found.terminated, worlds == steps)
    np.testing.assert_array_equal(found.valid, worlds != steps + 1)


# ---- Policy and losses


def numpy_sample(output, noise):
    """Action and log density, in float64, straight from the definition."""
    mean, raw = np.split(np.float64(output), 2, axis=-1)
    log_std = -5 + 3.5 * (np.tanh(raw) + 1)
    noise = np.float64(noise)
    u = mean + np.exp(log_std) * noise
    normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
    return np.tanh(u), (normal - np.log(1 - np.tanh(u) ** 2)).sum(-1)


def numpy_mlp(params, x, twin=()):
    """The network in float64; twin picks one of two critics."""
    layers = params["params"]
    layers = layers[next(iter(layers))] if "Dense_0" not in layers else layers
    x = np.float64(x)
    for i in range(len(layers)):
        layer = layers[f"Dense_{i}"]
        x = x @ np.float64(layer["kernel"])[twin] + np.float64(layer["bias"])[twin]
        x = np.maximum(x, 0) if i < len(layers) - 1 else x
    return x


def numpy_critics(params, obs, action):
    x = np.concatenate([np.float64(obs), np.float64(action)], axis=-1)
    return [numpy_mlp(params, x, twin)[..., 0] for twin in (0, 1)]


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, -0.5), (0.6, -1.5), (-1.2, -2.2), (0.3, -3.4)])
def test_log_density_integrates_to_one(mean, log_std):
    """exp(log density) over (-1, 1) has the integral 1; each action lies where it says."""
    grid = (np.arange(400_000) + 0.5) / 200_000 - 1
    noise = np.float32((np.arctanh(grid) - mean) / np.exp(log_std))[:, None]
    policy = sac.TanhGaussian(mean=jnp.array([mean]), log_std=jnp.array([log_std]))
    action, logprob = policy.sample(noise)
    np.testing.assert_allclose(action[:, 0], grid, atol=1e-5)
    assert np.exp(np.float64(logprob)).sum() / 200_000 == pytest.approx(1, abs=2e-3)


def test_log_density_is_finite_far_out():
    """At |u| = 50 it is the formula's, and finite, and so is its gradient."""

    def logprob(mean):
        policy = sac.TanhGaussian(mean=mean, log_std=jnp.full(1, -1.5))
        return policy.sample(jnp.zeros(1))[1]

    for u in (-50.0, 50.0):
        value, slope = jax.value_and_grad(logprob)(jnp.array([u]))
        expected = 1.5 - 0.5 * math.log(2 * math.pi) + 2 * (50 - math.log(2))
        assert value == pytest.approx(expected, rel=1e-5)
        assert np.isfinite(slope).all()


@cache
def init_learner_and_worlds(args, env):
    return jax.jit(partial(sac.init_learner_and_worlds, args, env))(jax.random.key(1))


def make_learner(args, env):
    """A learner whose targets are not its critics, and whose temperature is not 1 (if tuned)."""
    learner, _ = init_learner_and_worlds(args, env)
    targets = jax.tree.map(lambda x: 0.7 * x + 0.05, learner.critics)
    log_alpha = jnp.log(0.3) if args.autotune else learner.log_alpha
    return learner.replace(targets=targets, log_alpha=log_alpha)


def random_minibatch(size: int, seed: int = 0) -> sac.Transition:
    """Random transitions; every third is terminated, from the second on."""
    random = np.random.default_rng(seed)
    mb = sac.Transition(
        obs=np.float32(random.normal(size=(size, 3))),
        action=np.float32(random.uniform(-1, 1, (size, 1))),
        reward=np.float32(random.uniform(-9, 0, size)),
        next_obs=np.float32(random.normal(size=(size, 3))),
        terminated=np.float32(np.arange(size) % 3 == 1),
        valid=np.full(size, True),
    )
    return jax.tree.map(jnp.asarray, mb)


def test_start(env):
    """The two critics start different, the targets as the critics, the worlds' clocks anywhere."""
    learner, worlds = init_learner_and_worlds(ARGS, env)
    kernels = [leaf for leaf in jax.tree.leaves(learner.critics) if leaf.ndim == 3]
    assert kernels
    assert all((leaf[0] != leaf[1]).any() for leaf in kernels)
    assert_same(learner.targets, learner.critics)
    clocks = np.asarray(worlds.env_state.info["elapsed"])
    assert len(np.unique(clocks)) > 10
    assert clocks.min() < 50
    assert 150 < clocks.max() < 200


def test_policy_is_the_networks_output(env):
    """Mean and standard deviation from -5 to 2 of the network's two outputs; it has no memory."""
    params = make_learner(ARGS, env).actor
    obs = np.float32(np.random.default_rng(0).normal(size=(50, 3)) * [1, 1, 8])
    memory, policy = sac.apply_policy(ARGS, env, params, (), obs)
    action, logprob = policy.sample(jnp.ones((50, 1)))
    expected = numpy_sample(numpy_mlp(params, obs), np.ones((50, 1)))
    assert memory == sac.initial_memory((50,)) == ()
    np.testing.assert_allclose(action, expected[0], atol=1e-5)
    np.testing.assert_allclose(logprob, expected[1], rtol=1e-4, atol=1e-4)


def test_critic_target_by_hand(env):
    """Reward, and the discounted smaller target with its entropy; only a termination cuts it."""
    learner = make_learner(ARGS, env)
    mb = random_minibatch(3)
    noise = np.float32([[0.3], [-1.0], [2.0]])
    target = jax.jit(partial(sac.critic_target, ARGS, env))(learner, mb, noise)
    action, logprob = numpy_sample(numpy_mlp(learner.actor, mb.next_obs), noise)
    q = np.minimum(*numpy_critics(learner.targets, mb.next_obs, action))
    expected = 0.1 * np.float64(mb.reward) + 0.98 * np.array([1, 0, 1]) * (q - 0.3 * logprob)
    np.testing.assert_allclose(target, expected, atol=1e-4)
    assert target[1] == pytest.approx(0.1 * float(mb.reward[1]), abs=1e-6)
    assert abs(float(target[0]) - 0.1 * float(mb.reward[0])) > 1e-3


def test_critic_loss_by_hand(env):
    """Both mean squared errors over the valid transitions, and the metrics."""
    learner = make_learner(ARGS, env)
    mb = random_minibatch(4)
    mb = mb.replace(valid=jnp.array([True, True, True, False]))
    target = np.float32([0.5, -1.0, 2.0, 100.0])
    loss, metrics = jax.jit(partial(sac.critic_loss, ARGS, env))(learner.critics, mb, target)
    q1, q2 = (q[:3] for q in numpy_critics(learner.critics, mb.obs, mb.action))
    first = np.mean((q1 - target[:3]) ** 2)
    second = np.mean((q2 - target[:3]) ** 2)
    expected = {
        "losses/qf1_values": q1.mean(),
        "losses/qf2_values": q2.mean(),
        "losses/qf1_loss": first,
        "losses/qf2_loss": second,
        "losses/qf_loss": (first + second) / 2,
    }
    assert loss == pytest.approx(first + second, rel=1e-5)
    assert metrics.keys() == expected.keys()
    for tag, value in expected.items():
        assert metrics[tag] == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_actor_and_alpha_loss_by_hand(env):
    """Weighted log density less the smaller critic, over the valid transitions.

    The temperature's gradient is the entropy less its target.
    """
    learner = make_learner(ARGS, env)
    mb = random_minibatch(4)
    mb = mb.replace(valid=jnp.array([True, True, True, False]))
    noise = np.float32([[0.3], [-1.0], [2.0], [-3.0]])
    program = jax.jit(partial(sac.actor_loss, ARGS, env))
    loss, mean_logprob = program(learner.actor, learner, mb, noise)
    action, logprob = numpy_sample(numpy_mlp(learner.actor, mb.obs), noise)
    q = np.minimum(*numpy_critics(learner.critics, mb.obs, action))
    assert loss == pytest.approx((0.3 * logprob - q)[:3].mean(), abs=1e-4)
    assert mean_logprob == pytest.approx(logprob[:3].mean(), abs=1e-4)
    for logprob in (-0.5, 0.2, 1.7):
        expected = -0.3 * (logprob - 1)
        value, slope = jax.value_and_grad(sac.alpha_loss, argnums=1)(env, jnp.log(0.3), logprob)
        assert value == pytest.approx(expected, abs=1e-6)
        assert slope == pytest.approx(expected, abs=1e-6)


# ---- Acting


def test_step_that_ends_an_episode(env, make_mesh):
    """What the buffer gets of the time limit's step, of a broken world's and of all others.

    The time limit's is not terminated and ends where it ended; a broken one's is not valid.
    """
    learner, worlds = init_learner_and_worlds(ARGS, env)
    elapsed = jnp.where(jnp.arange(16) == 2, 199, 5)
    data = worlds.env_state.data
    data = data.replace(qvel=data.qvel.at[7, 0].set(jnp.nan))
    env_state = worlds.env_state.replace(
        info=worlds.env_state.info | {"elapsed": elapsed}, data=data
    )
    worlds = worlds.replace(env_state=env_state)
    after, step, report = jax.jit(partial(sac.interact, ARGS, env))(learner, worlds)

    np.testing.assert_array_equal(step.valid, np.arange(16) != 7)
    np.testing.assert_array_equal(step.terminated, np.arange(16) == 7)
    np.testing.assert_array_equal(step.obs, env_state.obs)
    ended = (after.env_state.obs != step.next_obs).any(axis=-1)
    np.testing.assert_array_equal(ended, np.isin(np.arange(16), [2, 7]))
    np.testing.assert_array_equal(after.env_state.info["elapsed"], np.where(ended, 0, 6))
    np.testing.assert_array_equal(after.episode_length, np.where(ended, 0, 1))

    torque = env.task.max_torque * step.action
    np.testing.assert_array_equal(report.action, torque)
    end = jax.vmap(sac.kernel(env.step))(env_state, torque)
    others = np.arange(16) != 7
    np.testing.assert_allclose(step.next_obs[others], end.obs[others], atol=1e-6)
    np.testing.assert_allclose(step.reward[others], end.reward[others], atol=1e-6)
    assert step.reward[7] == 0
    assert np.isfinite(step.next_obs[7]).all()
    assert not report.finished.any()  # they did not start at 0


def test_only_whole_episodes_are_finished(env):
    """An episode that began at clock 0 and reached the time limit is one, a broken one is not."""
    learner, worlds = init_learner_and_worlds(ARGS, env)
    clock = jnp.full(16, 199, jnp.int32)
    data = worlds.env_state.data
    data = data.replace(qvel=data.qvel.at[7, 0].set(jnp.nan))
    env_state = worlds.env_state.replace(info=worlds.env_state.info | {"elapsed": clock}, data=data)
    worlds = worlds.replace(env_state=env_state, episode_length=clock.at[3].set(150))
    _, _, report = jax.jit(partial(sac.interact, ARGS, env))(learner, worlds)
    np.testing.assert_array_equal(report.finished, ~np.isin(np.arange(16), [3, 7]))


# ---- Update


@cache
def update_program(args, env, mesh):
    program = jax.shard_map(
        partial(sac.update, args, env), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    return jax.jit(program)


def run_updates(args, env, mesh, times: int):
    """The learner before and after each update, and the metrics of each."""
    learners = [make_learner(args, env)]
    history = []
    for i in range(times):
        learner, metrics = update_program(args, env, mesh)(learners[-1], random_minibatch(32, i))
        learners.append(learner)
        history.append(metrics)
    return learners, history


def largest_change(before, after) -> float:
    changes = jax.tree.map(lambda a, b: np.abs(as_numpy(a) - as_numpy(b)).max(), before, after)
    return max(jax.tree.leaves(changes))


def test_update_moves_all(env, make_mesh):
    """An update changes all networks and the temperature, each by its own learning rate.

    Targets go by tau to the new critics; all metrics are there.
    """
    learners, history = run_updates(ARGS, env, make_mesh(1), 2)
    for before, after in pairwise(learners):
        for name in ("actor", "critics", "targets", "log_alpha"):
            assert differs(getattr(before, name), getattr(after, name)), name
        mix = lambda new, old: 0.01 * new + 0.99 * old  # noqa: E731
        expected = jax.tree.map(mix, after.critics, before.targets)
        close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
        jax.tree.map(close, after.targets, expected)

    # Adam's first step is the learning rate.
    before, after, _ = learners
    rates = {"actor": ARGS.policy_lr, "critics": ARGS.q_lr, "log_alpha": ARGS.q_lr}
    assert ARGS.policy_lr != ARGS.q_lr
    for name, rate in rates.items():
        change = largest_change(getattr(before, name), getattr(after, name))
        assert change == pytest.approx(rate, rel=1e-2), name

    assert [int(learner.updates) for learner in learners] == [0, 1, 2]
    assert int(learners[2].steps) == 0
    names = "qf1_values qf2_values qf1_loss qf2_loss qf_loss actor_loss alpha alpha_loss entropy"
    tags = {f"losses/{name}" for name in names.split()} | {"charts/skipped_in_a_row"}
    assert all(metrics.keys() == tags for metrics in history)
    assert all(np.isfinite(value) for metrics in history for value in metrics.values())
    assert history[0]["losses/alpha"] == pytest.approx(0.3, rel=1e-5)


def test_broken_step_is_not_learnt_from(env, make_mesh):
    """Whatever the invalid transitions of a minibatch hold, the update is the same to the bit."""
    program = partial(update_program(ARGS, env, make_mesh(1)), make_learner(ARGS, env))
    valid = jnp.arange(32) < 20
    mb = random_minibatch(32).replace(valid=valid)
    other = random_minibatch(32, seed=5).replace(valid=valid)

    def pick(condition, first, second):
        choose = lambda c, a, b: jax.tree.map(partial(jnp.where, c), a, b)  # noqa: E731
        return jax.vmap(choose)(condition, first, second)

    assert_same(program(mb), program(pick(valid, mb, other)))
    assert differs(program(mb), program(pick(valid, other, mb)))
    assert differs(program(mb), program(mb.replace(valid=~valid)))
    x = jnp.array([1.0, 4.0, np.nan])
    assert sac.masked_mean(x, jnp.array([True, True, False])) == 2.5
    assert sac.masked_mean(x, jnp.full(3, False)) == 0


def test_frequencies(env, make_mesh):
    """By 2, odd updates leave targets, actor and temperature alone.

    Even ones move the targets by tau, and actor and temperature twice.
    """
    args = dataclasses.replace(ARGS, policy_frequency=2, target_network_frequency=2)
    learners, history = run_updates(args, env, make_mesh(1), 3)
    for name in ("targets", "actor", "log_alpha"):
        moved = [differs(getattr(a, name), getattr(b, name)) for a, b in pairwise(learners)]
        assert moved == [False, True, False], name
    mix = lambda new, old: 0.01 * new + 0.99 * old  # noqa: E731
    expected = jax.tree.map(mix, learners[2].critics, learners[1].targets)
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, learners[2].targets, expected)

    expected = {"actor": [0, 0, 2, 2], "alpha": [0, 0, 2, 2], "critics": [0, 1, 2, 3]}
    for name, counts in expected.items():
        states = [learner.opt_state[name].inner_state[0] for learner in learners]
        assert [int(state.count) for state in states] == counts, name
    is_nan = [bool(np.isnan(metrics["losses/actor_loss"])) for metrics in history]
    assert is_nan == [True, False, True]


def test_fixed_temperature(env, make_mesh):
    """Without --autotune the temperature is --alpha for good, and has no loss."""
    args = dataclasses.replace(ARGS, autotune=False, alpha=0.15)
    learners, history = run_updates(args, env, make_mesh(1), 2)
    for learner in learners:
        assert learner.log_alpha == pytest.approx(math.log(0.15), rel=1e-6)
    assert all("losses/alpha_loss" not in metrics for metrics in history)
    assert history[1]["losses/alpha"] == pytest.approx(0.15, rel=1e-5)


# ---- Whole iterations


@pytest.fixture(scope="module")
def iterate(env, make_mesh):
    """iterate(args, state, n): n iterations, compiled once; the state and the metrics of each."""

    @cache
    def compiled(args):
        mesh = make_mesh(args.num_devices)
        state = sac.init_train_state(args, env, mesh, jax.random.key(0))
        return sac.train_iteration.lower(args, env, mesh, state).compile()

    def run(args, state, n: int):
        history = []
        for _ in range(n):
            state, metrics = compiled(args)(state)
            metrics.pop("black_box")
            history.append(jax.tree.map(np.asarray, metrics))
        return state, history

    return run


@pytest.fixture(scope="module")
def start(env, make_mesh):
    """The start of a run, built once; a copy, as an iteration uses up its state."""

    @cache
    def build(args):
        mesh = make_mesh(args.num_devices)
        return sac.init_train_state(args, env, mesh, jax.random.key(args.seed))

    return lambda args: jax.tree.map(lambda x: x.copy(), build(args))


TWO_DEVICES = dataclasses.replace(ARGS, num_devices=2)


def long_before_learning(state):
    """The state with a clock that has 10 thousand steps to go until the first update."""
    steps = jax.device_put(jnp.int32(-10_000), state.learner.steps.sharding)
    return state.replace(learner=state.learner.replace(steps=steps))


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(ARGS, id="1 device"),
        pytest.param(TWO_DEVICES, id="2 devices", marks=pytest.mark.slow),
    ],
)
def test_iterations_run(start, iterate, args):
    """Clocks count, the first steps are uniform, all is finite once the updates have begun."""
    state, history = iterate(args, start(args), 2)
    learner = state.learner
    assert (int(learner.steps), int(learner.iteration)) == (16, 2)
    assert int(learner.updates) == 2 * 13  # none after the first three steps, of 16 worlds each
    assert all(np.isfinite(as_numpy(leaf)).all() for leaf in jax.tree.leaves(state))
    for metrics in history:
        for tag, value in metrics.items():
            unknown = metrics["charts/episodes_finished"] == 0 and "episodic" in tag
            assert np.isfinite(value).all() or unknown, tag
        assert metrics["charts/nan_resets"] == 0
        assert metrics["angles"].shape == (8, 4)

    buffer = jax.tree.map(as_numpy, state.buffer)
    assert np.abs(buffer.action[:16]).max() <= 1
    assert (buffer.obs[:16] != 0).any((1, 2)).all()
    assert buffer.valid[:16].all()
    assert not buffer.obs[16:].any()
    assert np.abs(buffer.action[:3].mean()) < 0.3
    goes_on = (buffer.obs[1:16] == buffer.next_obs[:15]).all(-1)
    assert goes_on.mean() > 0.9  # all but the resets
    for leaf in jax.tree.leaves(learner):
        shards = [as_numpy(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == args.num_devices
        assert all((shard == shards[0]).all() for shard in shards)


def test_no_update_before_learning_starts(start, iterate):
    """Until then the networks stay, losses are not there to log, and actions are uniform."""
    before = long_before_learning(start(ARGS))
    actor = jax.tree.map(as_numpy, before.learner.actor)
    state, (metrics,) = iterate(ARGS, before, 1)
    assert_same(state.learner.actor, actor)
    assert int(state.learner.updates) == 0
    assert np.isnan(metrics["losses/qf_loss"])
    actions = as_numpy(state.buffer.action)[:8].ravel()
    assert np.std(actions) == pytest.approx(1 / np.sqrt(3), abs=0.1)
    assert abs(actions.mean()) < 0.15


def test_resumed_run_is_the_uninterrupted_run(start, iterate, tmp_path):
    """Two iterations, a checkpoint, and two more: every bit is that of four, the buffer's too.

    tests/test_sac_run.py does the same on two devices.
    """
    half, _ = iterate(ARGS, start(ARGS), 2)
    sac.save(ARGS, tmp_path, half, {})
    restored = sac.restore(ARGS, tmp_path, start(dataclasses.replace(ARGS, seed=2)))
    assert int(restored.learner.iteration) == 2
    resumed, _ = iterate(ARGS, restored, 2)
    whole, _ = iterate(ARGS, start(ARGS), 4)
    assert int(whole.learner.steps) == 32 > ARGS.buffer_rows  # the ring has gone round
    assert_same(resumed, whole)


def with_nan(state, world: int):
    """The state, on the same devices, with a speed that is not a number in one world."""
    old = state.worlds.env_state.data.qvel
    qvel = jnp.asarray(as_numpy(old)).at[world, 0].set(jnp.nan)
    data = state.worlds.env_state.data.replace(qvel=jax.device_put(qvel, old.sharding))
    env_state = state.worlds.env_state.replace(data=data)
    return state.replace(worlds=state.worlds.replace(env_state=env_state))


def test_broken_world_leaves_the_others_alone(start, iterate):
    """It is reset and counted once, and changes no bit of another world; learning goes on."""
    others = np.arange(16) != 3
    sound, (metrics,) = iterate(ARGS, long_before_learning(start(ARGS)), 1)
    before = long_before_learning(with_nan(start(ARGS), 3))
    broken, (broken_metrics,) = iterate(ARGS, before, 1)
    assert metrics["charts/nan_resets"] == 0
    assert broken_metrics["charts/nan_resets"] == 1
    np.testing.assert_array_equal(broken.worlds.times_broken, ~others)
    pick = partial(jax.tree.map, lambda x: as_numpy(x)[others])
    assert_same(pick(broken.worlds), pick(sound.worlds))
    assert int(broken.worlds.env_state.info["elapsed"][3]) == 7

    buffer = jax.tree.map(as_numpy, broken.buffer)
    assert buffer.terminated[:, 3].tolist() == [1] + 19 * [0]
    assert buffer.reward[0, 3] == 0
    assert not buffer.valid[0, 3]
    assert buffer.valid.sum() == 8 * 16 - 1
    # The mean of a reward's term is over the valid steps.
    steps = 8 * 16 - 1
    mean = sum(float(broken_metrics[f"reward/{name}"]) for name in ("angle", "speed", "torque"))
    assert mean == pytest.approx(buffer.reward.sum() / steps, rel=1e-4)

    state, history = iterate(ARGS, with_nan(start(ARGS), 3), 2)
    resets = [int(metrics["charts/nan_resets"]) for metrics in history]
    assert resets == [1, 1]  # in all since the start
    assert all(np.isfinite(as_numpy(leaf)).all() for leaf in jax.tree.leaves(state))


# ---- Evaluation


class Countdown:
    """A world whose episode terminates after as many steps as its key says; each earns 1."""

    task = dataclasses.replace(sac.TASKS["Pendulum-v1"], time_limit=5)
    time_limit = task.time_limit

    def reset(self, key):
        left = jax.random.key_data(key)[-1].astype(jnp.int32)
        return sac.State(
            data=left, obs=jnp.zeros(3), reward=0.0, done=jnp.zeros(()), metrics={}, info={}
        )

    def step(self, state, action):
        left = state.data - 1
        return state.replace(data=left, reward=1.0, done=(left == 0).astype(jnp.float32))


def test_nothing_is_earned_after_an_episode(monkeypatch):
    """A return is that of one episode, up to its termination or to the time limit."""
    monkeypatch.setattr(sac, "kernel", lambda function: function)
    policy = {"max_torque": 2.0, "w0": np.zeros((3, 1)), "b0": np.zeros(1)}
    keys = jax.vmap(jax.random.key)(jnp.array([1, 3, 5, 9]))
    returns = sac.evaluate_mjx(Countdown(), policy, keys)
    assert returns.tolist() == [1, 3, 5, 5]


# ---- A whole run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A finished run of the command line, two fifths as long as by default."""
    runs = tmp_path_factory.mktemp("runs")
    sac.main(["--total-timesteps", "204800", "--runs-dir", str(runs)])
    (folder,) = runs.iterdir()
    return folder


@pytest.mark.slow
def test_it_learns_as_five_seeds_did(tmp_path):
    """All returns are within what five seeds gave, widened at both ends by what lies between them.

    tests/sac_band.py trained the five; a random policy gets about -1200.
    """
    with optimised():
        sac.main(["--runs-dir", str(tmp_path)])
    (run_dir,) = tmp_path.iterdir()
    stored = json.loads(sac_band.FILE.read_text())["seeds"]
    assert len(stored) == 5
    returns = sac_band.returns_of(run_dir)
    assert returns.keys() == stored["1"].keys()
    for name, value in returns.items():
        seeds = [row[name] for row in stored.values()]
        margin = max(seeds) - min(seeds)
        assert min(seeds) - margin <= value <= max(seeds) + margin, name


def test_what_a_run_says_of_itself(run_dir):
    """run.json has the settings, the sizes and the evaluation in each simulator."""
    run = json.loads((run_dir / "run.json").read_text())
    assert run["evaluation"].keys() == {"MJX", "C MuJoCo", "Gymnasium"}
    for result in run["evaluation"].values():
        assert result["min"] <= result["mean"] <= result["max"] <= 0
    mjx, c_mujoco, _ = (result["mean"] for result in run["evaluation"].values())
    assert mjx == pytest.approx(c_mujoco, abs=20)
    assert run["args"].keys() == {field.name for field in dataclasses.fields(sac.Args)}
    assert run["buffer_bytes"] == (9 * 4 + 1) * sac.Args().buffer_size
    assert sac.read_run(run_dir).hidden_sizes == (64, 64)


def test_log_holds_every_tag(run_dir):
    """TensorBoard shows every documented metric, at environment steps."""
    everything = {"scalars": 0, "tensors": 0}
    log = EventAccumulator(str(run_dir), size_guidance=everything).Reload()
    losses = "qf1_values qf2_values qf1_loss qf2_loss qf_loss actor_loss alpha alpha_loss entropy"
    charts = "SPS episodes_finished nan_resets skipped_updates skipped_in_a_row"
    always = {f"losses/{name}" for name in losses.split()}
    always |= {f"charts/{name}" for name in charts.split()}
    always |= {f"reward/{name}" for name in ("angle", "speed", "torque")}
    sometimes = {"charts/episodic_return", "charts/episodic_length"}
    sometimes |= {"eval/episodic_return", "eval/c_mujoco_return"}
    assert set(log.Tags()["scalars"]) == always | sometimes
    for tag in always:
        events = log.Scalars(tag)
        assert [event.step for event in events] == list(range(20480, 204_801, 20480)), tag
        assert all(math.isfinite(event.value) for event in events), tag
    evaluated = [event.step for event in log.Scalars("eval/episodic_return")]
    assert evaluated == [81_920, 163_840]
    assert [event.step for event in log.Scalars("eval/c_mujoco_return")] == [204_801]
    assert all(event.value == 200 for event in log.Scalars("charts/episodic_length"))
    assert -2000 < log.Scalars("charts/episodic_return")[0].value < -800
    text = log.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(f"|{field.name}|" in text for field in dataclasses.fields(sac.Args))


def test_exported_policy_is_the_actor(run_dir, env, make_mesh):
    """policy.npz, run by NumPy, acts as the trained network's tanh mean, in Nm."""
    args = sac.read_run(run_dir)
    state = sac.init_train_state(args, env, make_mesh(2), jax.random.key(9))
    learner = sac.restore(args, run_dir, state).learner
    random = np.random.default_rng(0)
    angle = random.uniform(-np.pi, np.pi, (50, 1))
    speed = random.uniform(-8, 8, (50, 1))
    obs = np.float32(sac.observe(angle, speed, np))
    _, policy = sac.apply_policy(args, env, learner.actor, (), obs)
    with np.load(run_dir / "policy.npz") as arrays:
        memory, action = sac.act(dict(arrays), (), obs)
    assert memory == ()
    assert type(action) is np.ndarray
    assert np.ptp(action) > 1
    np.testing.assert_allclose(action, 2 * np.tanh(policy.mean), atol=1e-4)


# ---- Bad calls

BAD_CALLS = """
--env-id Hopper
--num-envs 0
--num-envs -5
--num-envs abc
--num-envs 15 --num-devices 2
--batch-size 33 --num-devices 2
--num-devices 1000
--num-devices 0
--batch-size 0
--num-steps 0
--num-steps 1.5
--updates-per-step 0
--total-timesteps 4095
--total-timesteps -1
--gamma 1.5
--gamma nan
--tau -1
--tau 2
--dt 0
--dt 1
--length 0
--mass -1
--gravity nan
--max-torque 0
--max-speed inf
--buffer-size 5
--buffer-size 100000000000
--buffer-size 999999999
--learning-starts -1
--policy-lr -1
--q-lr nan
--reward-scale nan
--policy-frequency 0
--target-network-frequency 0
--alpha 0
--hidden-sizes 0
--hidden-sizes -64
--hidden-sizes
--no-such-flag
stray
--seed -1
--checkpoint-every 0
--eval-episodes 0
--eval-every -1
--resume missing
--evaluate missing
--resume broken
--evaluate broken
--evaluate garbage
--resume started --gamma 0.5
--runs-dir a_file
--runs-dir a_file/below
"""


@pytest.mark.parametrize("call", BAD_CALLS.strip().splitlines())
def test_bad_call_ends_with_one_line(tmp_path, monkeypatch, capsys, call):
    """What cannot run is refused by code 2 and a line that names the culprit, without a trace."""
    if call == "--buffer-size 999999999":  # 36 GB, which some machines have
        monkeypatch.setattr(sac, "host_memory", lambda: 2**32)
    monkeypatch.chdir(tmp_path)
    Path("a_file").touch()
    for folder in ("broken", "garbage", "started"):
        Path(folder).mkdir()
        sac.write_run(Path(folder), {"args": dataclasses.asdict(sac.Args())})
    Path("broken", "run.json").write_text('{"args": ')
    Path("garbage", "policy.npz").write_bytes(b"garbage")
    before = set(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        sac.main(call.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    assert len(error) > 20
    first, last = call.split()[0], call.split()[-1]
    assert "num-" in error or first.removeprefix("--") in error or last in error
    assert set(Path().rglob("*")) == before


# ---- Source


def test_dependencies_are_pinned_alike():
    """Each package of the script's inline metadata (PEP 723) has the same pin elsewhere."""
    (block,) = re.findall(r"(?ms)^# /// script\n(.*?)^# ///$", SCRIPT.read_text())
    metadata = tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))
    requirements = (SCRIPT.parent / "requirements.txt").read_text()
    lines = {line.split("#")[0].strip() for line in requirements.splitlines()}
    assert set(metadata["dependencies"]) <= lines
    assert all("==" in package for package in metadata["dependencies"])


def test_every_setting_is_used():
    """No flag is without effect: each field of Args is read, by its name or in `task_flags`."""
    fields = {field.name for field in dataclasses.fields(sac.Args)}
    tree = ast.parse(SCRIPT.read_text())
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = getattr(node.value, "id", None) or getattr(node.value, "attr", None)
            read |= {node.attr} if owner in ("args", "self") else set()
    (task_flags,) = (node for node in tree.body if getattr(node, "name", None) == "task_flags")
    read |= {node.value for node in ast.walk(task_flags) if isinstance(node, ast.Constant)}
    assert fields - read == set()
