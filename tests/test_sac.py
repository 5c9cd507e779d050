"""SAC on pendulums: physics against closed forms, the buffer, losses by hand, whole iterations, runs and promises."""

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
from jax.sharding import PartitionSpec as P
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sac_mjx_pendulum as sac

SCRIPT = Path(sac.__file__)
ARGS = sac.Args(num_devices=1, num_envs=16, num_steps=8, updates_per_step=2, buffer_size=16 * 20, batch_size=32,
                learning_starts=64, hidden_sizes=(16, 16), total_timesteps=4 * 128)
OTHER = {"gravity": 3.7, "length": 0.6, "mass": 2.5, "dt": 0.02, "max_torque": 5.0, "max_speed": 3.0}
ENVS = [{"env_id": "Pendulum-v1"}, {"env_id": "PointMass"},
        {"env_id": "Pendulum-v1", **OTHER}, {"env_id": "PointMass", **OTHER}]

def as_numpy(leaf) -> np.ndarray:
    """A copy, as the array itself may be donated or, on the host, written to."""
    return np.array(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

def assert_same(first, second) -> None:
    """Bit for bit, NaN included."""
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(as_numpy(a), as_numpy(b)), first, second)

def differs(first, second) -> bool:
    return any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((as_numpy(a) != as_numpy(b)).any()), first, second)))

# ---- Environment

@pytest.fixture(scope="module")
def env():
    return sac.Env(ARGS)

def start_at(env, qpos, qvel):
    """States [N] at these angles and speeds."""
    state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), len(qpos)))
    data = sac.Physics(jnp.asarray(qpos, jnp.float32)[:, None], jnp.asarray(qvel, jnp.float32)[:, None])
    return state.replace(data=data, obs=sac.observe(data.qpos, data.qvel))

def run_steps(env, state, torques):
    """The path of all states [T + 1, N], under torques [T, N]."""
    def step(state, torque):
        state = jax.vmap(env.step)(state, torque[:, None])
        return state, state
    path = jax.jit(partial(jax.lax.scan, step))(state, jnp.asarray(torques, jnp.float32))[1]
    return jax.tree.map(lambda first, rest: np.concatenate([np.asarray(first)[None], rest]), state, path)

def closed_form(task, rod: bool, qpos, qvel, torque):
    """One step in float64, from the pendulum's equation and semi-implicit Euler."""
    a, b = (1.5, 3.0) if rod else (1.0, 1.0)
    torque = np.clip(torque, -task.max_torque, task.max_torque)
    acceleration = a * task.gravity / task.length * np.sin(qpos) + b * torque / (task.mass * task.length**2)
    qvel = np.clip(qvel + task.dt * acceleration, -task.max_speed, task.max_speed)
    return qpos + task.dt * qvel, qvel

def angle_error(first, second) -> float:
    difference = np.asarray(first, np.float64) - second
    return np.abs((difference + np.pi) % (2 * np.pi) - np.pi).max()

@pytest.mark.parametrize("flags", ENVS)
def test_every_step_is_the_closed_form(flags):
    """From anywhere, with any torque, 200 steps are each the closed form's step from the same state."""
    env, random = sac.Env(sac.Args(**flags)), np.random.default_rng(0)
    top = env.task.max_speed
    state = start_at(env, random.uniform(-np.pi, np.pi, 32), random.uniform(-top, top, 32))
    torques = random.uniform(-1.5, 1.5, (200, 32)) * env.task.max_torque  # some beyond the limit
    data = run_steps(env, state, torques).data
    qpos, qvel = (np.float64(x[:-1, :, 0]) for x in (data.qpos, data.qvel))
    expected = closed_form(env.task, flags["env_id"] == "Pendulum-v1", qpos, qvel, np.float64(np.float32(torques)))
    assert angle_error(data.qpos[1:, :, 0], expected[0]) < 1e-5
    np.testing.assert_allclose(data.qvel[1:, :, 0], expected[1], atol=1e-5)
    assert np.abs(data.qpos).max() <= np.float32(np.pi) and np.abs(data.qvel).max() <= top
    if "dt" not in flags:
        assert (np.abs(data.qvel) == top).any()  # the limit was met

@pytest.mark.parametrize("flags", ENVS)
def test_200_steps_are_the_closed_form(flags):
    """A whole episode agrees too, by starts below the hinge: near the top an error grows by exp(4) in a second."""
    env, random = sac.Env(sac.Args(**flags)), np.random.default_rng(1)
    qpos, qvel = np.pi + random.uniform(-0.7, 0.7, 16), random.uniform(-0.5, 0.5, 16)
    torques = np.float32(random.uniform(-0.5, 0.5, (200, 16)) * env.task.max_torque)
    state = start_at(env, qpos, qvel)
    path, (qpos, qvel) = run_steps(env, state, torques), (np.float64(x[:, 0]) for x in (
        state.data.qpos, state.data.qvel))
    for t in range(200):
        qpos, qvel = closed_form(env.task, flags["env_id"] == "Pendulum-v1", qpos, qvel, np.float64(torques[t]))
        assert angle_error(path.data.qpos[t + 1, :, 0], qpos) < 1e-5, t

def test_pendulum_is_gymnasiums(env):
    """From each state of 200 steps, Gymnasium's Pendulum-v1 gets to the same observation, for the same reward."""
    random, original = np.random.default_rng(2), gymnasium.make("Pendulum-v1").unwrapped
    original.reset(seed=0)
    torques = np.float32(random.uniform(-3, 3, (200, 4)))
    path = run_steps(env, start_at(env, random.uniform(-np.pi, np.pi, 4), random.uniform(-8, 8, 4)), torques)
    for t in range(200):
        for i in range(4):
            original.state = np.float64([path.data.qpos[t, i, 0], path.data.qvel[t, i, 0]])
            obs, reward, terminated, _, _ = original.step(torques[t, i:i + 1])
            np.testing.assert_allclose(path.obs[t + 1, i], obs, atol=1e-5)
            assert path.reward[t + 1, i] == pytest.approx(reward, abs=1e-5) and not terminated
    np.testing.assert_allclose(sum(path.metrics.values()), path.reward, atol=1e-6)
    assert env.gymnasium_id == "Pendulum-v1" and sac.Env(sac.Args(mass=2.0)).gymnasium_id is None

def test_time_limit_truncates(env):
    """Step 200 is truncated, none before, and none is terminated."""
    path = run_steps(env, start_at(env, [0.5], [0.0]), np.zeros((200, 1)))
    np.testing.assert_array_equal(path.info["truncated"][:, 0], np.arange(201) == 200)
    assert not path.done.any() and not path.info["broken"].any()

def test_resets_cover_gymnasiums_range(env):
    """Angles are uniform on the circle, speeds from -1 to 1; the same key gives the same start, another another."""
    keys = jax.random.split(jax.random.key(1), 2000)
    first, again = (jax.jit(jax.vmap(env.reset))(keys) for _ in range(2))
    assert_same(first, again)
    for values, most in ((first.data.qpos, np.pi), (first.data.qvel, 1)):
        values = np.asarray(values).ravel() / most
        assert 0.99 < np.abs(values).max() <= 1 + 1e-6 and abs(values.mean()) < 0.06
        assert values.std() == pytest.approx(1 / np.sqrt(3), abs=0.03) and len(np.unique(values)) > 1990
    np.testing.assert_array_equal(first.obs, sac.observe(first.data.qpos, first.data.qvel))

def test_jit_and_vmap_change_nothing(env, monkeypatch):
    """One step without jit (but in MJX, for time), with it, and of many worlds at once give the same numbers."""
    monkeypatch.setattr(sac.mjx, "step", jax.jit(sac.mjx.step))
    state, torque = start_at(env, [-2.0, 0.1, 3.0], [1.0, -7.9, 0.0]), jnp.array([[0.5], [-9.0], [2.0]])
    together = jax.jit(jax.vmap(env.step))(state, torque)
    for i in range(3):
        single = jax.tree.map(lambda x, i=i: x[i], state)
        for step in (env.step, jax.jit(env.step)) if i == 0 else (jax.jit(env.step),):
            jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a, b[i], atol=1e-6),
                         step(single, torque[i]), together)

def test_c_mujoco_agrees(env):
    """The evaluation's C MuJoCo environment takes the same steps, up to the time limit."""
    original, torques = sac.CMujocoEnv(env), np.float32(np.random.default_rng(3).uniform(-3, 3, 200))
    obs, _ = original.reset(5)
    state = jax.jit(env.reset)(jax.random.key(5))
    np.testing.assert_allclose(obs, state.obs, atol=1e-6)
    path = run_steps(env, jax.tree.map(lambda x: x[None], state), torques[:, None])
    for t in range(200):
        original.data.qpos, original.data.qvel = path.data.qpos[t, 0], path.data.qvel[t, 0]
        obs, reward, terminated, truncated, _ = original.step(torques[t:t + 1])
        np.testing.assert_allclose(obs, path.obs[t + 1, 0], atol=1e-5)
        assert reward == pytest.approx(path.reward[t + 1, 0], abs=1e-5)
        assert not terminated and truncated == (t == 199)

# ---- Replay buffer

def some_steps(t: int, n: int = 16) -> sac.Transition:
    """Transitions [N, ...] that tell their step and world."""
    worlds = np.arange(n, dtype=np.float32)
    return sac.Transition(np.full((n, 3), t, np.float32), worlds[:, None], 100.0 * t + worlds,
                          np.full((n, 3), t + 1, np.float32), np.float32(worlds == t), worlds != t + 1)

def filled(args, env, steps: int, xp):
    """A ring after so many writes."""
    ring = sac.init_buffer(args, env, xp)
    for t in range(steps):
        ring = sac.write(ring, t, jax.tree.map(xp.asarray, some_steps(t)))
    return ring

def run_draw(args, mesh, seed: int, written: int, worlds: int = 16):
    """Rows and worlds, as NumPy arrays."""
    program = jax.shard_map(lambda key, written: sac.draw(args, key, written, worlds),
                            mesh=mesh, in_specs=(P(), P()), out_specs=P(None, "devices"), check_vma=False)
    return jax.tree.map(np.asarray, jax.jit(program)(jax.random.key(seed), jnp.int32(written)))

def test_ring_keeps_the_last_steps_in_order(env):
    """Step t lies in row t % C; the oldest give way; NumPy's ring is the device's."""
    args = dataclasses.replace(ARGS, buffer_size=16 * 5 + 7)
    assert sac.buffer_rows(args) == 5
    device, host = filled(args, env, 8, jnp), filled(args, env, 8, np)
    assert isinstance(device.obs, jax.Array) and type(host.obs) is np.ndarray
    assert_same(device, host)
    for row, t in enumerate([5, 6, 7, 3, 4]):
        assert_same(jax.tree.map(lambda ring, row=row: ring[row], host), some_steps(t))
    assert not any(ring[4].any() for ring in jax.tree.leaves(filled(args, env, 4, np)))

@pytest.mark.parametrize("written", [1, 7, 20, 53])
def test_draws_are_uniform_over_what_is_written(make_mesh, written):
    """Chi-square over all transitions is as of a fair draw, and nothing unwritten is drawn."""
    args = dataclasses.replace(ARGS, updates_per_step=500, batch_size=64)
    rows, worlds = run_draw(args, make_mesh(1), 3, written)
    filled_rows = min(written, 20)
    assert rows.shape == worlds.shape == (500, 64) and rows.dtype == worlds.dtype == np.int32
    assert rows.min() == 0 and rows.max() == filled_rows - 1 and worlds.min() == 0 and worlds.max() == 15
    counts = np.bincount((rows * 16 + worlds).ravel(), minlength=filled_rows * 16)
    expected, freedom = rows.size / len(counts), len(counts) - 1
    statistic = np.square(counts - expected).sum() / expected
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)  # mean and standard deviation of chi-square
    assert (rows != run_draw(args, make_mesh(1), 4, written)[0]).any() or written == 1

def test_two_devices_draw_their_shares(make_mesh):
    """Each of two devices draws half of a minibatch."""
    rows, worlds = run_draw(ARGS, make_mesh(2), 1, 20, worlds=8)
    assert rows.shape == (2, 32) and worlds.max() < 8

def test_gather_is_the_same_from_both_rings(env, make_mesh):
    """A minibatch [K, B, ...] holds the transitions at its indices, from the device's ring and from the host's."""
    rows, worlds = run_draw(ARGS, make_mesh(1), 1, 23)
    device = sac.gather(filled(ARGS, env, 23, jnp), (rows, worlds))
    assert_same(device, sac.gather(filled(ARGS, env, 23, np), (rows, worlds)))
    steps = np.where(rows < 3, rows + 20, rows)
    np.testing.assert_array_equal(device.reward, np.float32(100.0 * steps + worlds))
    np.testing.assert_array_equal(device.obs, np.repeat(steps[..., None], 3, axis=-1))
    np.testing.assert_array_equal(device.next_obs, device.obs + 1)
    np.testing.assert_array_equal(device.action[..., 0], worlds)
    np.testing.assert_array_equal(device.terminated, worlds == steps)
    np.testing.assert_array_equal(device.valid, worlds != steps + 1)

# ---- Policy and losses

def numpy_sample(output, noise):
    """Action and log density, in float64, straight from the definition."""
    mean, raw = np.split(np.float64(output), 2, axis=-1)
    log_std, noise = -5 + 3.5 * (np.tanh(raw) + 1), np.float64(noise)
    u = mean + np.exp(log_std) * noise
    normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
    return np.tanh(u), (normal - np.log(1 - np.tanh(u) ** 2)).sum(-1)

def numpy_mlp(params, x, twin=()):
    """The network in float64; twin picks one of two critics."""
    layers, x = params["params"], np.float64(x)
    layers = layers[next(iter(layers))] if "Dense_0" not in layers else layers
    for i in range(len(layers)):
        kernel, bias = (np.float64(layers[f"Dense_{i}"][name])[twin] for name in ("kernel", "bias"))
        x = x @ kernel + bias
        x = np.maximum(x, 0) if i < len(layers) - 1 else x
    return x

def numpy_critics(params, obs, action):
    x = np.concatenate([np.float64(obs), np.float64(action)], axis=-1)
    return [numpy_mlp(params, x, twin)[..., 0] for twin in (0, 1)]

@pytest.mark.parametrize("mean, raw", [(0.0, 0.3), (0.6, 0.0), (-1.2, -0.2), (0.3, -0.6)])
def test_log_density_integrates_to_one(mean, raw):
    """exp(log density) over the actions from -1 to 1 has the integral 1; each point lies where it says."""
    grid = (np.arange(400_000) + 0.5) / 200_000 - 1
    noise = (np.arctanh(grid) - mean) / np.exp(-5 + 3.5 * (np.tanh(raw) + 1))
    output = jnp.broadcast_to(jnp.array([mean, raw]), (len(grid), 2))
    action, logprob = sac.sample_action(output, jnp.float32(noise)[:, None])
    np.testing.assert_allclose(action[:, 0], grid, atol=1e-5)
    assert np.exp(np.float64(logprob)).sum() / 200_000 == pytest.approx(1, abs=2e-3)

def test_log_density_is_the_formula():
    """Random outputs of two actions against float64; far out, at |u| = 50, it is finite, and so is its gradient."""
    random = np.random.default_rng(0)
    output, noise = np.float32(random.uniform(-1, 1, (200, 4))), np.float32(random.normal(size=(200, 2)))
    output[:, 2:] -= 0.5
    action, logprob = sac.sample_action(output, noise)
    expected = numpy_sample(output, noise)
    np.testing.assert_allclose(action, expected[0], atol=1e-5)
    np.testing.assert_allclose(logprob, expected[1], rtol=1e-4, atol=1e-4)
    for u in (-50.0, 50.0):
        far, zero = jnp.array([u, 0.0]), jnp.zeros(1)
        expected = 1.5 - 0.5 * math.log(2 * math.pi) + 2 * (50 - math.log(2))  # log_std is -1.5
        assert sac.sample_action(far, zero)[1] == pytest.approx(expected, rel=1e-5)
        assert np.isfinite(jax.grad(lambda x, zero=zero: sac.sample_action(x, zero)[1])(far)).all()

@cache
def init_learner_and_worlds(args, env):
    return jax.jit(partial(sac.init_learner_and_worlds, args, env))(jax.random.key(1))

def make_learner(args, env):
    """A learner whose targets are not its critics, and whose temperature is not 1 (if that is tuned)."""
    learner, _ = init_learner_and_worlds(args, env)
    targets = jax.tree.map(lambda x: 0.7 * x + 0.05, learner.critics)
    return learner.replace(targets=targets, log_alpha=jnp.log(0.3) if args.autotune else learner.log_alpha)

def random_minibatch(shape, seed: int = 0) -> sac.Transition:
    """Transitions of random numbers; every third is terminated, from the second on."""
    random = np.random.default_rng(seed)
    obs, next_obs = (np.float32(random.normal(size=(*shape, 3))) for _ in range(2))
    action, reward = np.float32(random.uniform(-1, 1, (*shape, 1))), np.float32(random.uniform(-9, 0, shape))
    terminated = np.float32(np.broadcast_to(np.arange(shape[-1]) % 3 == 1, shape))
    valid = np.full(shape, True)
    return jax.tree.map(jnp.asarray, sac.Transition(obs, action, reward, next_obs, terminated, valid))

def test_critics_have_their_own_weights(env):
    """The two critics start different."""
    learner = make_learner(ARGS, env)
    assert all((leaf[0] != leaf[1]).any() for leaf in jax.tree.leaves(learner.critics) if leaf.ndim == 3)

def test_critic_target_by_hand(env):
    """Reward, and the discounted smaller target with its entropy; only a termination cuts it off."""
    learner, mb = make_learner(ARGS, env), random_minibatch((3,))
    noise = np.float32([[0.3], [-1.0], [2.0]])
    target = sac.critic_target(ARGS, env, learner, mb, noise)
    action, logprob = numpy_sample(numpy_mlp(learner.actor, mb.next_obs), noise)
    q = np.minimum(*numpy_critics(learner.targets, mb.next_obs, action))
    expected = 0.1 * np.float64(mb.reward) + 0.98 * np.array([1, 0, 1]) * (q - 0.3 * logprob)
    np.testing.assert_allclose(target, expected, atol=1e-4)
    assert target[1] == pytest.approx(0.1 * float(mb.reward[1]), abs=1e-6)
    assert abs(float(target[0]) - 0.1 * float(mb.reward[0])) > 1e-3

def test_truncated_step_bootstraps(env, make_mesh):
    """In the buffer, the time limit's step is not terminated and ends where it ended; a broken world's is."""
    learner, worlds = init_learner_and_worlds(ARGS, env)
    info = worlds.env_state.info | {"elapsed": jnp.where(jnp.arange(16) == 2, 199, 5)}
    data = worlds.env_state.data
    data = data.replace(qvel=data.qvel.at[7, 0].set(jnp.nan))
    worlds = worlds.replace(env_state=worlds.env_state.replace(info=info, data=data))
    program = jax.shard_map(partial(sac.interact, ARGS, env), mesh=make_mesh(1), check_vma=False,
                            in_specs=(P(), P("devices")),
                            out_specs=(P("devices"), P("devices"), P("devices"), P(None, "devices")))
    after, step, told, _ = jax.jit(program)(learner, worlds)
    np.testing.assert_array_equal(step.terminated, np.arange(16) == 7)
    np.testing.assert_array_equal(step.valid, np.arange(16) != 7)
    np.testing.assert_array_equal(step.obs, worlds.env_state.obs)
    ended = (after.env_state.obs != step.next_obs).any(axis=-1)
    np.testing.assert_array_equal(ended, np.isin(np.arange(16), [2, 7]))
    np.testing.assert_array_equal(after.env_state.info["elapsed"], np.where(ended, 0, 6))
    end = jax.jit(jax.vmap(env.step))(worlds.env_state, env.task.max_torque * step.action)
    others = np.arange(16) != 7
    np.testing.assert_allclose(step.next_obs[others], end.obs[others], atol=1e-6)
    np.testing.assert_allclose(step.reward[others], end.reward[others], atol=1e-6)
    assert step.reward[7] == 0 and np.isfinite(step.next_obs[7]).all()
    assert not told["episodes"].any()  # they did not start at 0

def test_critic_loss_by_hand(env):
    """Both mean squared errors, and the metrics."""
    learner, mb, target = make_learner(ARGS, env), random_minibatch((3,)), np.float32([0.5, -1.0, 2.0])
    loss, metrics = sac.critic_loss(ARGS, env, learner.critics, mb, target)
    q1, q2 = numpy_critics(learner.critics, mb.obs, mb.action)
    first, second = np.mean((q1 - target) ** 2), np.mean((q2 - target) ** 2)
    expected = {"qf1_values": q1.mean(), "qf2_values": q2.mean(), "qf1_loss": first, "qf2_loss": second,
                "qf_loss": (first + second) / 2}
    assert loss == pytest.approx(first + second, rel=1e-5)
    assert metrics.keys() == {f"losses/{name}" for name in expected}
    for name, value in expected.items():
        assert metrics[f"losses/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5)

def test_actor_and_alpha_loss_by_hand(env):
    """Weighted log density less the smaller critic; the temperature's gradient is entropy less its target."""
    learner, mb = make_learner(ARGS, env), random_minibatch((3,))
    noise = np.float32([[0.3], [-1.0], [2.0]])
    loss, mean_logprob = sac.actor_loss(ARGS, env, learner.actor, learner, mb, noise)
    action, logprob = numpy_sample(numpy_mlp(learner.actor, mb.obs), noise)
    q = np.minimum(*numpy_critics(learner.critics, mb.obs, action))
    assert loss == pytest.approx((0.3 * logprob - q).mean(), abs=1e-4)
    assert mean_logprob == pytest.approx(logprob.mean(), abs=1e-4)
    for logprob in (-0.5, 0.2, 1.7):
        expected = -0.3 * (logprob - 1)
        value, slope = jax.value_and_grad(sac.alpha_loss, argnums=1)(env, jnp.log(0.3), logprob)
        assert value == pytest.approx(expected, abs=1e-6) and slope == pytest.approx(expected, abs=1e-6)

# ---- Update

def run_updates(args, env, mesh, learner, times: int):
    """The learner before and after each update, and the metrics of each."""
    program = jax.jit(jax.shard_map(partial(sac.update, args, env), mesh=mesh, in_specs=(P(), P("devices")),
                                    out_specs=P(), check_vma=False))
    learners, history = [learner], []
    for i in range(times):
        learner, metrics = program(learners[-1], random_minibatch((32,), seed=i))
        learners.append(learner)
        history.append(metrics)
    return learners, history

def test_update_moves_all(env, make_mesh):
    """An update changes all networks and the temperature; targets go by tau to the new critics; metrics are there."""
    learners, history = run_updates(ARGS, env, make_mesh(1), make_learner(ARGS, env), 2)
    for before, after in pairwise(learners):
        for name in ("actor", "critics", "targets", "log_alpha"):
            assert differs(getattr(before, name), getattr(after, name)), name
        expected = jax.tree.map(lambda new, old: 0.01 * new + 0.99 * old, after.critics, before.targets)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), after.targets, expected)
    assert [int(learner.updates) for learner in learners] == [0, 1, 2] and int(learners[2].steps) == 0
    names = "qf1_values qf2_values qf1_loss qf2_loss qf_loss actor_loss alpha alpha_loss entropy".split()
    tags = {f"losses/{name}" for name in names} | {"charts/skipped_in_a_row"}
    assert all(metrics.keys() == tags for metrics in history)
    assert all(np.isfinite(value) for metrics in history for value in metrics.values())
    assert history[0]["losses/alpha"] == pytest.approx(0.3, rel=1e-5)

def test_update_on_two_devices_keeps_one_learner(env, make_mesh):
    """Two devices, each with its half of the minibatch, end with the same learner."""
    learners, _ = run_updates(ARGS, env, make_mesh(2), make_learner(ARGS, env), 1)
    for leaf in jax.tree.leaves(learners[1]):
        np.testing.assert_array_equal(*(as_numpy(shard.data) for shard in leaf.addressable_shards))

def test_broken_step_is_not_learnt_from(env, make_mesh):
    """Whatever the invalid transitions of a minibatch hold, the update is the same to the bit, and a mean over the
    others: of two halves, one invalid, it is that of the other half alone."""
    learner, mb, other = make_learner(ARGS, env), random_minibatch((32,)), random_minibatch((32,), seed=5)
    valid = jnp.arange(32) < 20
    program = jax.jit(jax.shard_map(partial(sac.update, ARGS, env), mesh=make_mesh(1), in_specs=P(), out_specs=P(),
                                    check_vma=False))
    pick = jax.vmap(lambda valid, a, b: jax.tree.map(lambda a, b: jnp.where(valid, a, b), a, b))
    mb = mb.replace(valid=valid)
    assert_same(program(learner, mb), program(learner, pick(valid, mb, other.replace(valid=valid))))
    assert differs(program(learner, mb), program(learner, pick(~valid, mb, other.replace(valid=valid))))
    assert differs(program(learner, mb), program(learner, mb.replace(valid=~valid)))
    x = jnp.array([1.0, 4.0, np.nan])
    assert sac.masked_mean(x, jnp.array([True, True, False])) == 2.5 and sac.masked_mean(x, jnp.full(3, False)) == 0

def test_target_network_frequency(env, make_mesh):
    """By 2, the odd updates leave the targets alone, and the even ones move them by tau."""
    args = dataclasses.replace(ARGS, target_network_frequency=2)
    learners, _ = run_updates(args, env, make_mesh(1), make_learner(args, env), 3)
    moved = [differs(a.targets, b.targets) for a, b in pairwise(learners)]
    assert moved == [False, True, False] and differs(learners[0].critics, learners[1].critics)
    expected = jax.tree.map(lambda new, old: 0.01 * new + 0.99 * old, learners[2].critics, learners[1].targets)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), learners[2].targets, expected)

def test_policy_frequency(env, make_mesh):
    """By 2, the odd updates leave the actor and the temperature alone, and the even ones move them twice."""
    args = dataclasses.replace(ARGS, policy_frequency=2)
    learners, history = run_updates(args, env, make_mesh(1), make_learner(args, env), 3)
    for name in ("actor", "log_alpha"):
        moved = [differs(getattr(a, name), getattr(b, name)) for a, b in pairwise(learners)]
        assert moved == [False, True, False], name
    assert [int(learner.opt["actor"].inner_state[0].count) for learner in learners] == [0, 0, 2, 2]
    assert [int(learner.opt["alpha"].inner_state[0].count) for learner in learners] == [0, 0, 2, 2]
    assert [int(learner.opt["critics"].inner_state[0].count) for learner in learners] == [0, 1, 2, 3]
    assert [bool(np.isnan(metrics["losses/actor_loss"])) for metrics in history] == [True, False, True]

def test_fixed_temperature(env, make_mesh):
    """Without --autotune the temperature is --alpha for good, and has no loss."""
    args = dataclasses.replace(ARGS, autotune=False, alpha=0.15)
    learners, history = run_updates(args, env, make_mesh(1), make_learner(args, env), 2)
    assert all(learner.log_alpha == pytest.approx(math.log(0.15), rel=1e-6) for learner in learners)
    assert all("losses/alpha_loss" not in metrics for metrics in history)
    assert history[1]["losses/alpha"] == pytest.approx(0.15, rel=1e-5)

# ---- Whole iterations

@pytest.fixture(scope="module")
def iterate(env, make_mesh):
    """iterate(args, devices, state, n): n iterations, compiled once; the state and the metrics of each."""
    programs = {}
    def run(args, devices: int, state, n: int):
        if (args, devices) not in programs:
            programs[args, devices] = sac.compile_iteration(args, env, make_mesh(devices), state)[0]
        history = []
        for _ in range(n):
            state, metrics = programs[args, devices](state)
            metrics.pop("black_box")
            history.append(jax.tree.map(np.asarray, metrics))
        return state, history
    return run

@pytest.fixture(scope="module")
def start(env, make_mesh):
    """The start of a run on so many devices, built once; a copy, as an iteration uses up its state."""
    @cache
    def build(args, devices):
        return sac.init_train_state(args, env, make_mesh(devices), jax.random.key(args.seed))
    return lambda args, devices: jax.tree.map(lambda x: x.copy(), build(args, devices))

def arguments(devices: int, buffer_device: str = "device") -> sac.Args:
    return dataclasses.replace(ARGS, num_devices=devices, buffer_device=buffer_device)

@pytest.mark.parametrize("devices", [1, 2])
def test_iterations_run(start, iterate, devices):
    """Clocks count, the first steps are by chance, all is finite once the updates have begun."""
    args = arguments(devices)
    state, history = iterate(args, devices, start(args, devices), 2)
    learner = state.learner
    assert (int(learner.steps), int(learner.iteration)) == (16, 2)
    assert int(learner.updates) == 2 * 13  # none after the first three steps, of 16 worlds each
    assert all(np.isfinite(as_numpy(leaf)).all() for leaf in jax.tree.leaves(state))
    for metrics in history:
        for tag, value in metrics.items():
            assert np.isfinite(value).all() or metrics["charts/episodes_finished"] == 0 and "episodic" in tag, tag
        assert metrics["charts/nan_resets"] == 0 and metrics["angles"].shape == (8, 4)
    buffer = jax.tree.map(as_numpy, state.buffer)
    assert np.abs(buffer.action[:16]).max() <= 1 and (buffer.obs[:16] != 0).any((1, 2)).all()
    assert not buffer.obs[16:].any() and np.abs(buffer.action[:3].mean()) < 0.3
    going_on = (buffer.obs[1:16] == buffer.next_obs[:15]).all(-1)
    assert going_on.mean() > 0.9  # all but the resets
    for leaf in jax.tree.leaves(learner):
        shards = [as_numpy(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == devices and all((shard == shards[0]).all() for shard in shards)

def test_no_update_before_learning_starts(start, iterate):
    """Until then the networks stay, losses are not there to log, and actions are uniform."""
    args = dataclasses.replace(ARGS, learning_starts=10_000)
    before = start(args, 1)
    actor = jax.tree.map(as_numpy, before.learner.actor)
    state, (metrics,) = iterate(args, 1, before, 1)
    assert_same(state.learner.actor, actor)
    assert int(state.learner.updates) == 0 and np.isnan(metrics["losses/qf_loss"])
    actions = as_numpy(state.buffer.action)[:8].ravel()
    assert np.std(actions) == pytest.approx(1 / np.sqrt(3), abs=0.1) and abs(actions.mean()) < 0.15

@pytest.mark.parametrize("devices", [1, 2])
def test_host_buffer_learns_the_same(start, iterate, devices):
    """A buffer in the host's memory gives the same networks, worlds and buffer after two iterations."""
    (on_device, first), (on_host, second) = (
        iterate(args, devices, start(args, devices), 2) for args in (
            arguments(devices), arguments(devices, "host")))
    assert type(on_host.buffer.obs) is np.ndarray
    def close(a, b):
        np.testing.assert_allclose(as_numpy(a), as_numpy(b), rtol=1e-5, atol=1e-5)
    for name in ("actor", "critics", "targets", "log_alpha"):
        jax.tree.map(close, getattr(on_device.learner, name), getattr(on_host.learner, name))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), on_device.buffer, on_host.buffer)
    assert first[1].keys() == second[1].keys()

@pytest.mark.parametrize("buffer_device", ["device", "host"])
def test_resumed_run_is_the_uninterrupted_run(start, iterate, tmp_path, buffer_device):
    """Two iterations, a checkpoint, and two more: every bit is that of four, the buffer's too."""
    args = arguments(1, buffer_device)
    half, _ = iterate(args, 1, start(args, 1), 2)
    sac.save(args, tmp_path, half, {})
    restored = sac.restore(args, tmp_path, start(dataclasses.replace(args, seed=2), 1))
    assert int(restored.learner.iteration) == 2
    assert isinstance(restored.buffer.obs, np.ndarray) == (buffer_device == "host")
    resumed, _ = iterate(args, 1, restored, 2)
    whole, _ = iterate(args, 1, start(args, 1), 4)
    assert int(whole.learner.steps) == 32 > sac.buffer_rows(args)  # the ring has gone round
    assert_same(resumed, whole)

def with_nan(state, world: int):
    """The state, on the same devices, with a speed that is not a number in one world."""
    old = state.worlds.env_state.data.qvel
    qvel = jax.device_put(jnp.asarray(as_numpy(old)).at[world, 0].set(jnp.nan), old.sharding)
    data = state.worlds.env_state.data.replace(qvel=qvel)
    return state.replace(worlds=state.worlds.replace(env_state=state.worlds.env_state.replace(data=data)))

def test_broken_world_leaves_the_others_alone(start, iterate):
    """It is reset and counted once, and changes no bit of another world; learning goes on with finite numbers."""
    args, others = dataclasses.replace(ARGS, learning_starts=10_000), np.arange(16) != 3
    sound, (metrics,) = iterate(args, 1, start(args, 1), 1)
    broken, (broken_metrics,) = iterate(args, 1, with_nan(start(args, 1), 3), 1)
    assert metrics["charts/nan_resets"] == 0 and broken_metrics["charts/nan_resets"] == 1
    np.testing.assert_array_equal(broken.worlds.broken, ~others)
    pick = partial(jax.tree.map, lambda x: as_numpy(x)[others])
    assert_same(pick(broken.worlds), pick(sound.worlds))
    assert int(broken.worlds.env_state.info["elapsed"][3]) == 7
    buffer = jax.tree.map(as_numpy, broken.buffer)
    assert buffer.terminated[:, 3].tolist() == [1] + 19 * [0] and buffer.reward[0, 3] == 0
    assert buffer.valid[:8].sum(axis=0).tolist() == [8 - (world == 3) for world in range(16)] and not buffer.valid[0, 3]
    state, history = iterate(ARGS, 1, with_nan(start(ARGS, 1), 3), 2)
    assert [int(metrics["charts/nan_resets"]) for metrics in history] == [1, 1]  # in all since the start
    assert all(np.isfinite(as_numpy(leaf)).all() for leaf in jax.tree.leaves(state))

# ---- A whole run

@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A finished short run of the command line, long enough to swing up."""
    runs = tmp_path_factory.mktemp("runs")
    sac.main(["--num-devices", "1", "--num-envs", "256", "--total-timesteps", "130000", "--eval-episodes", "20",
              "--buffer-size", "131072", "--runs-dir", str(runs)])
    (folder,) = runs.iterdir()
    return folder

def test_it_learns_to_swing_up(run_dir):
    """In every simulator the policy gets better than -300, where one by chance gets about -1200."""
    run = json.loads((run_dir / "run.json").read_text())
    assert run["evaluation"].keys() == {"MJX", "C MuJoCo", "Gymnasium"}
    for result in run["evaluation"].values():
        assert result["min"] <= result["mean"] <= result["max"] <= 0 and result["mean"] > -300
    assert run["evaluation"]["MJX"]["mean"] == pytest.approx(run["evaluation"]["C MuJoCo"]["mean"], abs=20)
    assert run["args"].keys() == {field.name for field in dataclasses.fields(sac.Args)}
    assert sac.read_run(run_dir).hidden_sizes == (64, 64) and run["buffer_bytes"] == (4 * 9 + 1) * 131072

def test_log_holds_every_tag(run_dir):
    """TensorBoard shows every documented metric, at environment steps."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    losses = "qf1_values qf2_values qf1_loss qf2_loss qf_loss actor_loss alpha alpha_loss entropy".split()
    always = {f"losses/{name}" for name in losses} | {f"reward/{name}" for name in ("angle", "speed", "torque")}
    charts = "SPS episodes_finished nan_resets skipped_updates skipped_in_a_row".split()
    always |= {f"charts/{name}" for name in charts}
    sometimes = {"charts/episodic_return", "charts/episodic_length", "eval/episodic_return", "eval/c_mujoco_return"}
    assert set(log.Tags()["scalars"]) == always | sometimes
    for tag in always:
        events = log.Scalars(tag)
        assert [event.step for event in events] == list(range(5120, 130000, 5120)), tag
        assert all(math.isfinite(event.value) for event in events), tag
    assert [event.step for event in log.Scalars("eval/episodic_return")] == [51200, 102400]
    assert [event.step for event in log.Scalars("eval/c_mujoco_return")] == [128001]
    assert all(event.value == 200 for event in log.Scalars("charts/episodic_length"))
    assert -2000 < log.Scalars("charts/episodic_return")[0].value < -800
    text = log.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(f"|{field.name}|" in text for field in dataclasses.fields(sac.Args))

def test_exported_policy_is_the_actor(run_dir, env, make_mesh):
    """policy.npz, run by NumPy, acts as the trained network's tanh mean, in Nm."""
    args = sac.read_run(run_dir)
    learner = sac.restore(args, run_dir, sac.init_train_state(args, env, make_mesh(1), jax.random.key(9))).learner
    angle, speed = np.random.default_rng(0).uniform(-1, 1, (2, 50, 1)) * [[[np.pi]], [[8]]]
    obs = np.float32(sac.observe(angle, speed, np))
    mean = sac.make_networks(args, env)[0].apply(learner.actor, obs)[:, :1]
    with np.load(run_dir / "policy.npz") as arrays:
        action = sac.act(dict(arrays), obs)
    assert type(action) is np.ndarray and np.ptp(action) > 1
    np.testing.assert_allclose(action, 2 * np.tanh(mean), atol=1e-4)

def test_finished_run_can_be_resumed_and_evaluated(run_dir, capsys):
    """--resume of a finished run trains nothing more; --evaluate prints one row for each simulator."""
    before = (run_dir / "policy.npz").read_bytes()
    sac.main(["--resume", str(run_dir)])
    assert (run_dir / "policy.npz").read_bytes() == before
    capsys.readouterr()
    sac.main(["--evaluate", str(run_dir), "--eval-episodes", "2"])
    out = capsys.readouterr().out
    for name in ("MJX", "C MuJoCo", "Gymnasium"):
        (row,) = (line for line in out.splitlines() if line.startswith(name))
        assert len(re.findall(r"-?\d+\.\d", row)) == 4

# ---- Bad calls

BAD_CALLS = [
    "--env-id Hopper", "--num-envs 0", "--num-envs -5", "--num-envs abc", "--num-envs 15 --num-devices 2",
    "--batch-size 33 --num-devices 2", "--num-devices 1000", "--num-devices 0", "--batch-size 0", "--num-steps 0",
    "--num-steps 1.5", "--updates-per-step 0", "--total-timesteps 4095", "--total-timesteps -1", "--gamma 1.5",
    "--gamma nan", "--tau -1", "--tau 2", "--dt 0", "--dt 1", "--length 0", "--mass -1", "--gravity nan",
    "--max-torque 0", "--max-speed inf", "--buffer-size 5", "--buffer-size 100000000000", "--buffer-size 999999999",
    "--buffer-device disk", "--learning-starts -1", "--policy-lr -1", "--q-lr nan", "--reward-scale nan",
    "--policy-frequency 0", "--target-network-frequency 0", "--alpha 0", "--hidden-sizes 0", "--hidden-sizes -64",
    "--hidden-sizes", "--no-such-flag", "stray", "--seed -1", "--checkpoint-every 0", "--eval-episodes 0",
    "--eval-every -1", "--resume missing", "--evaluate missing", "--resume broken", "--evaluate broken",
    "--evaluate garbage", "--resume started --gamma 0.5", "--runs-dir a_file", "--runs-dir a_file/below"]

@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_call_ends_with_one_line(tmp_path, monkeypatch, capsys, call):
    """What cannot run is refused by code 2 and one line that names the culprit, and leaves nothing behind."""
    if call == "--buffer-size 999999999":  # 36 GB, which some machines have
        monkeypatch.setattr(sac.os, "sysconf", lambda name: 2**16)
        call += " --buffer-device host"
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
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1 and len(error) > 20
    assert "num-" in error or call.split()[0].removeprefix("--") in error or call.split()[-1] in error
    assert set(Path().rglob("*")) == before

# ---- Source

def test_dependencies_are_pinned_alike():
    """Each package of the script's inline metadata (PEP 723) stands in requirements.txt with the same pin."""
    (block,) = re.findall(r"(?ms)^# /// script\n(.*?)^# ///$", SCRIPT.read_text())
    metadata = tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))
    lines = (line.split("#")[0].strip() for line in (SCRIPT.parent / "requirements.txt").read_text().splitlines())
    assert set(metadata["dependencies"]) <= set(lines)
    assert all("==" in package for package in metadata["dependencies"])

def test_every_setting_is_used():
    """No flag is without effect: each field of Args is read, by its name or, in Env, from a list of names."""
    fields, tree = {field.name for field in dataclasses.fields(sac.Args)}, ast.parse(SCRIPT.read_text())
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and (getattr(node.value, "id", None) or getattr(node.value, "attr", None)) in ("args", "self")}
    (env_class,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Env")
    (init,) = (node for node in env_class.body if getattr(node, "name", None) == "__init__")
    read |= {node.value for node in ast.walk(init) if isinstance(node, ast.Constant)}
    assert fields - read == set()
