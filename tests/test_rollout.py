"""Rollouts and whole training states: resets, broken worlds, several devices, checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ppo_mjx

ARGS = ppo_mjx.Args(
    num_envs=8, num_steps=8, num_minibatches=4, update_epochs=2, total_timesteps=4 * 64
)


@pytest.fixture(scope="module")
def env():
    return ppo_mjx.Env(ppo_mjx.Args(env_id="HalfCheetah"))


@pytest.fixture(scope="module")
def start(env, make_mesh, make_state):
    """The start of a run on so many devices, all clocks at 0."""
    return lambda devices, args=ARGS: with_elapsed(make_state(args, env, make_mesh(devices)), 0)


@pytest.fixture(scope="module")
def run_rollout(env, make_mesh):
    """A rollout of a state on a mesh of so many devices: worlds and transitions, as NumPy arrays."""

    def one_device(state):
        return ppo_mjx.rollout(ARGS, env, state.learner, state.worlds)

    def build(devices: int):
        specs = {"in_specs": (ppo_mjx.STATE_SPEC,), "out_specs": (P("devices"), P(None, "devices"))}
        return jax.jit(jax.shard_map(one_device, mesh=make_mesh(devices), check_vma=False, **specs))

    programs = {}

    def run(state, devices: int = 1):
        programs[devices] = programs.get(devices) or build(devices)
        return jax.tree.map(as_numpy, programs[devices](state))

    return run


def as_numpy(leaf) -> np.ndarray:
    return np.asarray(
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    )


def assert_same(first, second) -> None:
    """Bit for bit, NaN included."""
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(as_numpy(a), as_numpy(b)), first, second
    )


def change_worlds(state, **changes):
    """The state with other fields in env_state, on the same devices."""
    env_state = jax.tree.map(jnp.copy, state.worlds.env_state).replace(**changes)
    placed = jax.tree.map(
        lambda x, old: jax.device_put(x, old.sharding), env_state, state.worlds.env_state
    )
    return state.replace(worlds=state.worlds.replace(env_state=placed))


def with_elapsed(state, elapsed: int):
    info = state.worlds.env_state.info
    return change_worlds(state, info=info | {"elapsed": jnp.full_like(info["elapsed"], elapsed)})


def with_nan(state, world: int):
    data = state.worlds.env_state.data
    return change_worlds(state, data=data.replace(qvel=data.qvel.at[world, 0].set(jnp.nan)))


def test_rollout_records_what_happened(env, start, run_rollout):
    """Each observation is where the step before ended; log densities, clocks and sums belong to the recorded steps."""
    state = start(1)
    worlds, steps = run_rollout(state)
    assert (
        not steps.done.any() and steps.obs.shape == (8, 8, 17) and steps.action.shape == (8, 8, 6)
    )
    np.testing.assert_array_equal(steps.obs[0], state.worlds.env_state.obs)
    np.testing.assert_array_equal(steps.obs[1:], steps.end.env_state.obs[:-1])
    np.testing.assert_array_equal(worlds.env_state.obs, steps.end.env_state.obs[-1])
    np.testing.assert_array_equal(worlds.env_state.info["elapsed"], np.full(8, 8))
    np.testing.assert_array_equal(worlds.episode_length, np.full(8, 8))
    rewards = steps.end.env_state.reward
    np.testing.assert_allclose(worlds.episode_return, rewards.sum(0), rtol=1e-5, atol=1e-5)
    discounted = sum(ARGS.gamma ** (7 - t) * rewards[t] for t in range(8))
    np.testing.assert_allclose(worlds.discounted_return, discounted, rtol=1e-4, atol=1e-5)
    mean = ppo_mjx.make_networks(ARGS, env)[0].apply(
        state.learner.params["actor"], ppo_mjx.normalize(state.learner.obs_stats, steps.obs)
    )
    noise = (steps.action - mean) / np.exp(ARGS.init_log_std)
    expected = (-0.5 * noise**2 - ARGS.init_log_std - 0.5 * np.log(2 * np.pi)).sum(-1)
    np.testing.assert_allclose(steps.logprob, expected, rtol=1e-4, atol=1e-4)
    assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.2
    # No two worlds or steps share their noise.
    assert len(np.unique(noise.round(5))) > 0.9 * noise.size
    control = -0.1 * np.square(np.clip(steps.action, -1, 1)).sum(-1)
    np.testing.assert_allclose(steps.end.env_state.metrics["reward_ctrl"], control, rtol=1e-4)


def test_time_limit_truncates_and_the_next_episode_differs(env, start, run_rollout):
    """At the time limit an episode is done, not terminated; the world's next episodes start in other places."""
    state, starts = start(1), []
    for _ in range(2):
        starts.append(np.asarray(state.worlds.env_state.obs))
        worlds, steps = run_rollout(with_elapsed(state, env.time_limit - 2))
        # They did not start at 0: no whole episodes.
        assert not steps.terminated.any() and not steps.finished.any()
        np.testing.assert_array_equal(steps.done, np.arange(8)[:, None] == np.full(8, 1))
        np.testing.assert_array_equal(steps.end.env_state.info["truncated"], steps.done)
        np.testing.assert_array_equal(worlds.env_state.info["elapsed"], np.full(8, 6))
        np.testing.assert_array_equal(worlds.episode_length, np.full(8, 6))
        np.testing.assert_allclose(
            worlds.episode_return, steps.end.env_state.reward[2:].sum(0), rtol=1e-4, atol=1e-5
        )
        starts.append(steps.obs[2])
        assert (steps.obs[2] != steps.end.env_state.obs[1]).any(axis=-1).all()
        assert (np.abs(steps.obs[2, :, :8]) <= env.task.reset_noise + 1e-6).all()
        key = jax.random.wrap_key_data(jnp.asarray(worlds.key))
        state = state.replace(
            worlds=state.worlds.replace(key=jax.device_put(key, state.worlds.key.sharding))
        )
    # The first, second and, by later keys, third episode.
    starts = np.concatenate([starts[0], starts[1], starts[3]])
    assert len(np.unique(starts, axis=0)) == len(starts)


def test_broken_world_leaves_the_others_alone(start, run_rollout):
    """NaN in one world changes no bit of another; the world goes on from a fresh reset."""
    state = start(1)
    (_, steps), (worlds, broken_steps) = run_rollout(state), run_rollout(with_nan(state, 3))
    others = np.arange(8) != 3
    assert_same(
        jax.tree.map(lambda x: x[:, others], steps),
        jax.tree.map(lambda x: x[:, others], broken_steps),
    )
    assert (
        broken_steps.done[:, 3].tolist() == [True] + 7 * [False] and not broken_steps.finished.any()
    )
    assert broken_steps.end.env_state.reward[0, 3] == 0
    np.testing.assert_array_equal(broken_steps.valid, ~broken_steps.end.env_state.info["broken"])
    assert (~broken_steps.valid).sum() == 1 and not broken_steps.valid[0, 3]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(worlds))
    np.testing.assert_array_equal(worlds.env_state.info["elapsed"], np.where(others, 8, 7))
    np.testing.assert_array_equal(worlds.times_broken, np.where(others, 0, 1))


def test_broken_steps_are_not_learnt_from(env, start, run_rollout, make_mesh):
    """Two worlds that break in all steps: advantages, targets and explained variance are those without them."""
    state = start(1)
    _, steps = run_rollout(state)
    broken = np.isin(np.arange(8), [2, 5])

    def make(steps, args=ARGS):
        def one_device(steps):
            return ppo_mjx.make_batch(args, env, state.learner, steps, steps.end.env_state.reward)

        specs = {"in_specs": P(), "out_specs": P(), "check_vma": False}
        return jax.device_get(jax.jit(jax.shard_map(one_device, mesh=make_mesh(1), **specs))(steps))

    steps = steps.replace(end=steps.end.replace(key=None), start=None)  # keys are no NumPy arrays
    marked = jax.tree.map(np.copy, steps).replace(valid=np.broadcast_to(~broken, (8, 8)))
    marked.end.env_state.reward[:, broken] = 1e6
    batch, explained = make(marked)
    valid = batch.advantage[batch.valid]
    assert abs(valid.mean()) < 1e-5 and valid.std() == pytest.approx(1, abs=1e-4)
    without, expected = make(jax.tree.map(lambda x: x[:, ~broken], steps))
    for name in "advantage", "target", "obs":
        mine = getattr(batch, name)[np.tile(~broken, 8)]
        np.testing.assert_allclose(mine, getattr(without, name), rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(explained, expected, rtol=1e-4)
    assert batch.valid.sum() == 48
    raw, _ = make(marked, dataclasses.replace(ARGS, norm_adv=False))
    np.testing.assert_allclose(raw.advantage, (raw.target - raw.value), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        valid,
        (raw.advantage[raw.valid] - raw.advantage[raw.valid].mean())
        / raw.advantage[raw.valid].std(),
        rtol=1e-3,
        atol=1e-4,
    )


def test_clocks_start_at_random(env, make_mesh, make_state):
    """So that the worlds' time limits do not come at once; and no two worlds start alike."""
    state = make_state(ARGS, env, make_mesh(1))
    elapsed = np.asarray(state.worlds.env_state.info["elapsed"])
    assert len(set(elapsed)) > 6 and np.ptp(elapsed) > 300
    assert elapsed.min() >= 0 and elapsed.max() < env.time_limit
    assert len(np.unique(state.worlds.env_state.obs, axis=0)) == 8


def test_broken_world_does_not_reach_the_networks(env, start, make_mesh):
    """Training goes on with finite numbers, and counts the reset."""
    mesh = make_mesh(2)
    state, metrics = ppo_mjx.train_iteration(ARGS, env, mesh, with_nan(start(2), 3))
    assert metrics["charts/nan_resets"] == 1
    for stats in state.learner.obs_stats, state.learner.return_stats:
        assert stats.count == pytest.approx(63, abs=1e-3)
    assert all(np.isfinite(as_numpy(x)).all() for x in jax.tree.leaves(state))
    losses = {
        name: value for name, value in metrics.items() if name.startswith(("losses/", "reward/"))
    }
    assert len(losses) == 12 and all(np.isfinite(value) for value in losses.values())


def test_two_devices_give_the_same_rollout(start, run_rollout):
    """The worlds do not notice how many devices share them, but for rounding, which contacts magnify."""
    one, two = (run_rollout(start(devices), devices)[1] for devices in (1, 2))
    np.testing.assert_allclose(one.action[0], two.action[0], rtol=1e-5, atol=1e-5)
    for read in (
        lambda steps: steps.obs,
        lambda steps: steps.action,
        lambda steps: steps.end.env_state.reward,
    ):
        np.testing.assert_allclose(read(one), read(two), rtol=1e-2, atol=1e-2)
    np.testing.assert_array_equal(one.done, two.done)
    np.testing.assert_array_equal(one.end.key, two.end.key)


def test_two_devices_keep_one_learner(env, start, make_mesh):
    """After an iteration, both devices hold the same networks and statistics, and each its half of the worlds."""
    mesh = make_mesh(2)
    before = start(2)
    first = jax.tree.map(as_numpy, before.learner)
    state, _ = ppo_mjx.train_iteration(ARGS, env, mesh, before)
    for leaf, old in zip(jax.tree.leaves(state.learner), jax.tree.leaves(first), strict=True):
        shards = [as_numpy(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == 2 and shards[0].shape == old.shape
        np.testing.assert_array_equal(*shards)
    assert int(state.learner.iteration) == 1 and state.learner.obs_stats.count == pytest.approx(
        64, rel=1e-3
    )
    assert [shard.data.shape for shard in state.worlds.env_state.obs.addressable_shards] == [
        (4, 17),
        (4, 17),
    ]
    moved = jax.tree.map(
        lambda a, b: bool((as_numpy(a) != b).any()), state.learner.params, first.params
    )
    assert all(jax.tree.leaves(moved))


def test_resumed_run_is_the_uninterrupted_run(env, start, make_mesh, tmp_path):
    """Two iterations, a checkpoint, and two more: every bit is that of four iterations."""
    mesh = make_mesh(2)

    def run(state, iterations):
        for _ in range(iterations):
            state, _ = ppo_mjx.train_iteration(ARGS, env, mesh, state)
        return state

    ppo_mjx.save(ARGS, tmp_path, run(start(2), 2), {})
    restored = ppo_mjx.restore(ARGS, tmp_path, start(2, dataclasses.replace(ARGS, seed=2)))
    assert int(restored.learner.iteration) == 2
    assert_same(run(restored, 2), run(start(2), 4))
