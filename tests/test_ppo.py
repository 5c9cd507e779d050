"""The algorithm: advantages, statistics, loss, update, and whole iterations on problems with a known answer."""

import dataclasses
import types
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from quick import quick_kernels

import ppo_mjx


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Kernels of a few operations, which no other test has."""
    quick_kernels(monkeypatch)


# ---- Advantages


def test_gae_by_hand():
    """Three steps of one world; the second is cut by the time limit."""
    args = ppo_mjx.Args(gamma=0.5, gae_lambda=0.5)
    column = lambda *values: jnp.array(values)[:, None]  # noqa: E731
    advantage, target = ppo_mjx.compute_gae(
        args,
        reward=column(1.0, 2.0, 3.0),
        value=column(4.0, 5.0, 6.0),
        next_value=column(5.0, 8.0, 10.0),
        terminated=column(False, False, False),
        done=column(False, True, False),
        valid=column(True, True, True),
    )
    # A2 = 3 + 0.5 * 10 - 6 = 2;  A1 = 2 + 0.5 * 8 - 5 = 1, cut off from A2;  A0 = 1 + 0.5 * 5 - 4 + 0.25 * A1 = -0.25
    np.testing.assert_allclose(advantage[:, 0], [-0.25, 1.0, 2.0])
    np.testing.assert_allclose(target[:, 0], [3.75, 6.0, 8.0])
    advantage, _ = ppo_mjx.compute_gae(
        args,
        reward=column(1.0, 2.0, 3.0),
        value=column(4.0, 5.0, 6.0),
        next_value=column(5.0, 8.0, 10.0),
        terminated=column(False, True, False),
        done=column(False, True, False),
        valid=column(True, True, True),
    )
    # After a termination nothing is to come: A1 = 2 - 5 = -3;  A0 = -0.5 + 0.25 * A1 = -1.25
    np.testing.assert_allclose(advantage[:, 0], [-1.25, -3.0, 2.0])


def test_gae_equals_a_numpy_loop():
    """Random rewards, values, terminations and time limits, against the definition step by step."""
    rng = np.random.default_rng(0)
    (steps, worlds) = (40, 16)
    args = ppo_mjx.Args(gamma=0.97, gae_lambda=0.9)
    valid = np.full((steps, worlds), True)
    reward, value, next_value = rng.standard_normal((3, steps, worlds)).astype(np.float32)
    terminated, truncated = rng.random((2, steps, worlds)) < 0.1
    assert (terminated & truncated).any() and (truncated & ~terminated).any()
    advantage, target = ppo_mjx.compute_gae(
        args, reward, value, next_value, terminated, terminated | truncated, valid
    )
    for world in range(worlds):
        following = 0.0
        for t in reversed(range(steps)):
            bootstrap = 0.0 if terminated[t, world] else next_value[t, world]
            if terminated[t, world] or truncated[t, world]:
                following = 0.0
            following = (
                reward[t, world] + 0.97 * bootstrap - value[t, world] + 0.97 * 0.9 * following
            )
            np.testing.assert_allclose(advantage[t, world], following, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(target, advantage + value, rtol=1e-6)


def test_gae_ends_before_a_broken_step():
    """The step before keeps the value of the state that it reached; what the broken step holds goes nowhere."""
    args = ppo_mjx.Args(gamma=0.5, gae_lambda=0.5)
    column = lambda *values: jnp.array(values)[:, None]  # noqa: E731
    for garbage in 0.0, 1e30:
        advantage, target = ppo_mjx.compute_gae(
            args,
            reward=column(1.0, garbage, 3.0),
            value=column(4.0, 5.0, 6.0),
            next_value=column(5.0, garbage, 10.0),
            terminated=column(False, True, False),
            done=column(False, True, False),
            valid=column(True, False, True),
        )
        # A0 = 1 + 0.5 * 5 - 4 = -0.5, as at a time limit
        np.testing.assert_allclose(advantage[:, 0], [-0.5, 0.0, 2.0])
        np.testing.assert_allclose(target[:, 0], [3.5, 5.0, 8.0])


def test_mean_of_valid_samples():
    """What is not valid may be anything, NaN too; nothing valid is 0."""
    x = jnp.array([[1.0, jnp.nan], [5.0, jnp.inf]])
    assert ppo_mjx.masked_mean(x, jnp.isfinite(x)) == 3 and ppo_mjx.masked_mean(x, x == 0) == 0


# ---- Running statistics


@pytest.mark.parametrize("devices", [1, 2])
def test_running_stats_equal_numpy(make_mesh, devices):
    """Statistics merged batch by batch, on one or two devices, are those of all data at once."""
    specs = {
        "in_specs": (P(), P(None, "devices"), P(None, "devices")),
        "out_specs": P(),
        "check_vma": False,
    }
    update = jax.jit(jax.shard_map(ppo_mjx.update_stats, mesh=make_mesh(devices), **specs))
    rng = np.random.default_rng(0)
    stats = ppo_mjx.RunningStats(jnp.array(1e-4), jnp.zeros(3), jnp.ones(3))
    batches = [rng.normal([5, -2, 0], [0.1, 3, 1], (7, 8, 3)) + drift for drift in range(5)]
    valids = rng.random((5, 7, 8)) < 0.8
    valids[3] = False  # a batch of nothing
    for batch, valid in zip(batches, valids, strict=True):
        batch[~valid] = np.nan
        stats = update(stats, jnp.asarray(batch, jnp.float32), valid)
    data = np.array(batches)[valids]
    np.testing.assert_allclose(stats.count, len(data), rtol=1e-5)
    np.testing.assert_allclose(stats.mean, data.mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats.var, data.var(0), rtol=1e-4)


def test_normalize_scales_and_clips():
    """Observations come out with mean 0 and variance 1, and never beyond 10."""
    stats = ppo_mjx.RunningStats(jnp.array(9.0), jnp.array([1.0, 0.0]), jnp.array([4.0, 1.0]))
    np.testing.assert_allclose(
        ppo_mjx.normalize(stats, jnp.array([3.0, -50.0])), [1.0, -10.0], rtol=1e-6
    )


# ---- Loss

# All that the networks ask of an environment.
TINY = types.SimpleNamespace(action_size=1, observation_size=1)


def tiny_params() -> dict:
    def layers(*numbers):
        w0, b0, w1, b1 = (jnp.array(x) for x in numbers)
        return {
            "params": {
                "Dense_0": {"kernel": w0.reshape(1, 1), "bias": b0.reshape(1)},
                "Dense_1": {"kernel": w1.reshape(1, 1), "bias": b1.reshape(1)},
            }
        }

    return {
        "actor": layers(0.7, 0.1, 0.9, -0.2),
        "critic": layers(-0.4, 0.3, 1.5, 0.6),
        "log_std": jnp.array([-0.5]),
    }


@pytest.mark.parametrize("clip_vloss", [False, True])
def test_loss_by_hand(clip_vloss):
    """Three samples: a ratio clipped from above, one from below, one free; all terms from first principles. A fourth
    one, which is not valid, counts for nothing."""
    obs = np.array([-1.0, 0.5, 2.0])
    action = np.array([0.3, -0.4, 1.1])
    ratio = np.array([1.5, 0.6, 1.1])
    advantage = np.array([2.0, -1.0, 0.5])
    old_value = np.array([1.0, 0.4, 0.2])
    target = np.array([1.5, -0.5, 3.0])
    mean = 0.9 * np.tanh(0.7 * obs + 0.1) - 0.2
    logprob = -0.5 * ((action - mean) / np.exp(-0.5)) ** 2 + 0.5 - 0.5 * np.log(2 * np.pi)
    args = ppo_mjx.Args(
        hidden_sizes=(1,), clip_coef=0.2, ent_coef=0.01, vf_coef=0.5, clip_vloss=clip_vloss
    )
    arrays = obs[:, None], action[:, None], logprob - np.log(ratio), old_value, advantage, target
    arrays = [np.append(x, x[:1] + 7, axis=0).astype(np.float32) for x in arrays]
    batch = ppo_mjx.Batch(*arrays, valid=np.arange(4) < 3)
    loss, metrics = ppo_mjx.ppo_loss(args, TINY, tiny_params(), batch)

    value = 1.5 * np.tanh(-0.4 * obs + 0.3) + 0.6
    # Ratios 1.5, 0.6 and 1.1, clipped where that is worse.
    policy_loss = -(2.0 * 1.2 + -1.0 * 0.8 + 0.5 * 1.1) / 3
    squares = (value - target) ** 2
    if clip_vloss:
        # All three values have moved further than 0.2.
        near = old_value + np.where(value > old_value, 0.2, -0.2)
        assert (np.abs(value - old_value) > 0.2).all() and ((near - target) ** 2 > squares).any()
        squares = np.maximum(squares, (near - target) ** 2)
    value_loss, entropy = 0.5 * squares.mean(), -0.5 + 0.5 * np.log(2 * np.pi * np.e)
    expected = {
        "losses/loss": policy_loss - 0.01 * entropy + 0.5 * value_loss,
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/old_approx_kl": -np.log(ratio).mean(),
        "losses/approx_kl": (ratio - 1 - np.log(ratio)).mean(),
        "losses/clipfrac": 2 / 3,
    }
    assert metrics.keys() == expected.keys()
    for name, number in expected.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-4, err_msg=name)
    assert loss == metrics["losses/loss"]


def test_clipped_samples_have_no_gradient():
    """Where the clipped ratio is the worse one, the policy is not pushed further."""
    args = ppo_mjx.Args(hidden_sizes=(1,), ent_coef=0.0)

    def gradient(ratio, advantage):
        actor, _ = ppo_mjx.make_networks(args, TINY)
        params, obs, action = tiny_params(), jnp.ones((1, 1)), jnp.full((1, 1), 0.7)
        policy = ppo_mjx.Gaussian(actor.apply(params["actor"], obs), params["log_std"])
        logprob = policy.log_prob(action) - jnp.log(ratio)
        valid = jnp.array([True])
        batch = ppo_mjx.Batch(
            obs, action, logprob, jnp.zeros(1), jnp.array([advantage]), jnp.zeros(1), valid
        )
        grads, _ = jax.grad(ppo_mjx.ppo_loss, argnums=2, has_aux=True)(args, TINY, params, batch)
        return abs(float(grads["actor"]["params"]["Dense_1"]["bias"][0]))

    assert gradient(1.5, 1.0) == gradient(0.5, -1.0) == 0
    assert gradient(1.5, -1.0) > 0 and gradient(0.5, 1.0) > 0 and gradient(1.1, 1.0) > 0


# ---- Update


@cache
def update_program(mesh, args: ppo_mjx.Args):
    update = partial(ppo_mjx.update, args, TINY)
    return jax.jit(
        jax.shard_map(update, mesh=mesh, in_specs=(P(), P()), out_specs=(P(), P()), check_vma=False)
    )


def run_update(make_mesh, args: ppo_mjx.Args, iteration: int = 0):
    """One update from tiny_params over 16 samples: learner and metrics."""
    rng, params = np.random.default_rng(0), tiny_params()
    opt_state = ppo_mjx.make_optimizer(args).init(jax.flatten_util.ravel_pytree(params)[0])
    learner = ppo_mjx.Learner(
        params, opt_state, None, None, jax.random.key(0), jnp.array(iteration)
    )
    obs, action = rng.standard_normal((2, 16, 1)).astype(np.float32)
    actor, _ = ppo_mjx.make_networks(args, TINY)
    policy = ppo_mjx.Gaussian(actor.apply(params["actor"], obs), params["log_std"])
    logprob = policy.log_prob(action)
    rest = rng.standard_normal((3, 16)).astype(np.float32)
    batch = ppo_mjx.Batch(obs, action, logprob, *rest, valid=np.full(16, True))
    return update_program(make_mesh(1), args)(learner, batch)


UPDATE_ARGS = ppo_mjx.Args(
    hidden_sizes=(1,), num_envs=4, num_steps=4, num_minibatches=2, update_epochs=3
)


def test_target_kl_ends_the_update_after_an_epoch(make_mesh):
    """Only the first epoch changes anything if its divergence exceeds the target, and all do if it does not."""
    counts, ends = [], []
    for args in (
        dataclasses.replace(UPDATE_ARGS, target_kl=1e-12),
        dataclasses.replace(UPDATE_ARGS, target_kl=1e3),
        dataclasses.replace(UPDATE_ARGS, update_epochs=1),
        UPDATE_ARGS,
    ):
        learner, _ = run_update(make_mesh, args)
        counts.append(int(learner.opt_state.inner_state.count))
        ends.append(np.asarray(jax.flatten_util.ravel_pytree(learner.params)[0]))
    assert counts == [2, 6, 2, 6]
    np.testing.assert_allclose(ends[1], ends[3], atol=1e-6)
    moved = [np.abs(end - jax.flatten_util.ravel_pytree(tiny_params())[0]).max() for end in ends]
    # Adam moves a number by about the learning rate, in each minibatch.
    assert 0 < moved[0] <= 2.01e-3 < moved[1]


def test_learning_rate_falls_linearly(make_mesh):
    """The annealed rate starts at the setting and falls to 0 by equal steps; it is also the rate that is used."""
    args = dataclasses.replace(UPDATE_ARGS, total_timesteps=4 * 16, learning_rate=1e-2)
    rates = [float(run_update(make_mesh, args, i)[1]["charts/learning_rate"]) for i in range(4)]
    np.testing.assert_allclose(rates, [1e-2, 7.5e-3, 5e-3, 2.5e-3], rtol=1e-5)
    fixed = run_update(make_mesh, dataclasses.replace(args, anneal_lr=False), 3)[1][
        "charts/learning_rate"
    ]
    np.testing.assert_allclose(fixed, 1e-2, rtol=1e-6)
    still, _ = run_update(make_mesh, args, 4)
    jax.tree.map(np.testing.assert_array_equal, still.params, tiny_params())


def test_minibatches_are_shuffled_anew_in_each_epoch(make_mesh, monkeypatch):
    """Each epoch sees each sample once, in an order of its own, which another iteration has not either."""
    seen = []

    def loss(args, env, params, mb):
        order = params["log_std"][0]  # falls with each minibatch
        jax.debug.callback(lambda *row: seen.append(row), order, mb.obs[:, 0])
        return params["log_std"].sum(), {"losses/approx_kl": 0.0 * order}

    monkeypatch.setattr(ppo_mjx, "ppo_loss", loss)
    args = dataclasses.replace(UPDATE_ARGS, exp_name="this loss")  # no other test's program
    orders = []
    for iteration in 0, 1:
        seen.clear()
        run_update(make_mesh, args, iteration)
        jax.effects_barrier()
        rows = sorted(
            ((-float(order), np.asarray(obs)) for order, obs in seen), key=lambda row: row[0]
        )
        assert len(rows) == 6
        orders += list(np.array([obs for _, obs in rows]).reshape(3, 16))
    # As in run_update.
    rows = np.random.default_rng(0).standard_normal((2, 16, 1)).astype(np.float32)[0, :, 0]
    for i, order in enumerate(orders):
        np.testing.assert_array_equal(np.sort(order), np.sort(rows))
        assert not any(np.array_equal(order, other) for other in [rows, *orders[:i]])


def test_gradient_is_scaled_down_to_the_norm():
    """Adam's first moment is a tenth of what it is given: the gradient, or one of norm max_grad_norm."""
    optimizer = ppo_mjx.make_optimizer(ppo_mjx.Args(max_grad_norm=0.5))
    for gradient, given in ([30.0, 40.0], [0.3, 0.4]), ([0.03, 0.04], [0.03, 0.04]):
        _, state = optimizer.update(jnp.array(gradient), optimizer.init(jnp.zeros(2)))
        np.testing.assert_allclose(state.inner_state.mu, 0.1 * np.array(given), rtol=1e-5)


# ---- Whole iterations on probe environments: each has an answer that is known


class Probe:
    """An environment of one number: `reward_of` maps (elapsed, action) to the reward, episodes last `length` steps."""

    action_size, observation_size, action_scale, action_bias = 1, 1, 1.0, 0.0
    seen = np.array([0])

    def __init__(self, reward_of, length: int, truncates: bool = False, shows_time: bool = False):
        self.reward_of, self.length, self.truncates, self.shows_time = (
            reward_of,
            length,
            truncates,
            shows_time,
        )
        self.time_limit = length

    def reset(self, key):
        zero, no = jnp.zeros(()), jnp.array(False)
        info = {"elapsed": jnp.zeros((), jnp.int32), "truncated": no, "broken": no}
        return ppo_mjx.State(
            ppo_mjx.Physics(*jnp.zeros((3, 1))), jnp.zeros(1), zero, zero, {}, info
        )

    def step(self, state, action):
        elapsed = state.info["elapsed"] + 1
        over = elapsed >= self.length
        obs = jnp.where(self.shows_time, elapsed.astype(float), 0.0)[None]
        done = jnp.where(over & (not self.truncates), 1.0, 0.0)
        reward = self.reward_of(elapsed, action[0])
        return state.replace(
            obs=obs,
            reward=reward,
            done=done,
            info=state.info | {"elapsed": elapsed, "truncated": over & self.truncates},
        )


def train_probe(make_mesh, make_state, env: Probe, iterations: int = 60, **settings):
    """Train, and return functions from an observation to the policy's mean and to the value."""
    args = ppo_mjx.Args(
        **{
            "num_envs": 32,
            "num_steps": 10,
            "num_minibatches": 5,
            "update_epochs": 4,
            "hidden_sizes": (16,),
            "gamma": 0.5,
            "learning_rate": 1e-2,
            "norm_reward": False,
            "total_timesteps": 320 * iterations,
        }
        | settings
    )
    mesh = make_mesh(1)
    state = make_state(args, env, mesh)
    for _ in range(iterations):
        state, _ = ppo_mjx.train_iteration(args, env, mesh, state)
    learner, networks = state.learner, ppo_mjx.make_networks(args, env)

    def output(network, name):
        return lambda obs: float(
            network.apply(learner.params[name], ppo_mjx.normalize(learner.obs_stats, obs))[0]
        )

    return output(networks[0], "actor"), output(networks[1], "critic")


ONE_UPDATE = ppo_mjx.Args(
    num_envs=8,
    num_steps=6,
    num_minibatches=1,
    update_epochs=1,
    hidden_sizes=(4,),
    learning_rate=0.1,
    total_timesteps=480,
)


def iterate(make_mesh, make_state, args: ppo_mjx.Args, env: Probe, iterations: int = 1):
    """The state after so many iterations on one device, and the metrics of each."""
    state, seen = make_state(args, env, make_mesh(1)), []
    for _ in range(iterations):
        state, metrics = ppo_mjx.train_iteration(args, env, make_mesh(1), state)
        seen.append(
            jax.device_get({name: metrics[name] for name in metrics if name != "black_box"})
        )
    return state, seen


def test_first_minibatch_meets_the_policy_that_acted(make_mesh, make_state):
    """Its probability ratios are 1: same parameters, same statistics, same actions. So in each iteration."""
    env = Probe(lambda elapsed, action: action, length=3, shows_time=True)
    state, seen = iterate(make_mesh, make_state, ONE_UPDATE, env, 3)
    for metrics in seen:
        assert (
            abs(metrics["losses/old_approx_kl"]) < 1e-6 and abs(metrics["losses/approx_kl"]) < 1e-6
        )
        assert metrics["losses/clipfrac"] == 0
    assert state.learner.obs_stats.count > 100 and abs(state.learner.obs_stats.mean[0] - 1) < 0.2


def test_rewards_are_scaled_and_clipped_to_ten(make_mesh, make_state):
    """Reward 1 in episodes of one step: the returns' deviation is nearly 0, so that the value's target is the clip, 10.
    The critic's first value for the observation 0 is 0. The flags turn both normalisations off."""
    env = Probe(lambda elapsed, action: jnp.ones(()), length=1)
    _, (metrics,) = iterate(make_mesh, make_state, ONE_UPDATE, env)
    assert metrics["losses/value_loss"] == pytest.approx(0.5 * 10**2, rel=1e-4)
    raw = dataclasses.replace(ONE_UPDATE, norm_reward=False, norm_obs=False)
    state, (metrics,) = iterate(make_mesh, make_state, raw, env)
    assert metrics["losses/value_loss"] == pytest.approx(0.5, rel=1e-4)
    for stats in state.learner.obs_stats, state.learner.return_stats:
        assert stats.count < 1 and not stats.mean.any() and (stats.var == 1).all()


@pytest.mark.slow  # so does the second step of test_probe_discount
def test_probe_value_of_a_constant_reward(make_mesh, make_state):
    """Reward 1 and the end: the value becomes 1."""
    _, value = train_probe(
        make_mesh, make_state, Probe(lambda elapsed, action: jnp.ones(()), length=1)
    )
    assert value(jnp.zeros(1)) == pytest.approx(1.0, abs=0.02)


def test_probe_best_action(make_mesh, make_state):
    """Reward -(a - 0.5)^2: the policy's mean becomes 0.5."""
    mean, _ = train_probe(
        make_mesh, make_state, Probe(lambda elapsed, action: -jnp.square(action - 0.5), length=1)
    )
    assert mean(jnp.zeros(1)) == pytest.approx(0.5, abs=0.05)


def test_probe_discount(make_mesh, make_state):
    """Reward 1 at the end of two steps: the values are gamma, then 1."""
    env = Probe(
        lambda elapsed, action: jnp.where(elapsed == 2, 1.0, 0.0), length=2, shows_time=True
    )
    _, value = train_probe(make_mesh, make_state, env)
    assert value(jnp.array([0.0])) == pytest.approx(0.5, abs=0.03)
    assert value(jnp.array([1.0])) == pytest.approx(1.0, abs=0.03)


def test_probe_time_limit_is_no_end(make_mesh, make_state):
    """Reward 1 forever, cut each 5 steps: the value is 1 / (1 - gamma) = 2, as if it was never cut."""
    env = Probe(lambda elapsed, action: jnp.ones(()), length=5, truncates=True)
    _, value = train_probe(make_mesh, make_state, env)
    assert value(jnp.zeros(1)) == pytest.approx(2.0, abs=0.04)


# ---- A policy with memory


@pytest.fixture
def counting_policy(monkeypatch):
    """A policy that remembers how many steps of the episode it has seen, and acts by it."""

    def apply_policy(*inputs):
        *_, memory, obs = inputs
        return memory + 1, ppo_mjx.Gaussian(0.0 * obs, jnp.zeros(1))

    def act(policy, memory, obs, xp=np):
        return memory + 1, xp.asarray(memory, float)[..., None]

    monkeypatch.setattr(ppo_mjx, "initial_memory", lambda batch=(): jnp.zeros(batch, jnp.int32))
    monkeypatch.setattr(ppo_mjx, "apply_policy", apply_policy)
    monkeypatch.setattr(ppo_mjx, "act", act)
    jax.clear_caches()
    yield
    jax.clear_caches()


COUNTED = Probe(lambda elapsed, action: action, length=4)


def test_rollout_carries_the_policys_memory(counting_policy, make_mesh, make_state):
    """It grows by the step, and is the initial one again in each episode."""
    args = ppo_mjx.Args(num_envs=3, num_steps=10, hidden_sizes=(1,))
    state = make_state(args, COUNTED, make_mesh(1))
    roll = jax.jit(partial(ppo_mjx.rollout, args, COUNTED))
    worlds, steps = roll(state.learner, state.worlds)
    np.testing.assert_array_equal(steps.end.memory, steps.end.episode_length)
    np.testing.assert_array_equal(worlds.memory, worlds.episode_length)
    assert steps.done.sum(axis=0).min() >= 2 and steps.end.memory.max() == 4


def test_evaluation_carries_the_policys_memory(counting_policy):
    """In MJX and on the host, where each episode starts with the initial one."""
    total = 0 + 1 + 2 + 3  # the reward is the action, which is what the policy remembers
    keys = jax.random.split(jax.random.key(0), 2)
    longer = Probe(lambda elapsed, action: action, length=4)
    longer.time_limit = 9  # what comes after the end of an episode does not count
    np.testing.assert_array_equal(ppo_mjx.evaluate_mjx(longer, {}, keys), [total, total])

    class Host:
        def reset(self, seed):
            self.elapsed = 0
            return np.zeros(1), {}

        def step(self, action):
            self.elapsed += 1
            return np.zeros(1), action[0], self.elapsed == 4, False, {}

    np.testing.assert_array_equal(ppo_mjx.evaluate_on_host(Host(), {}, 2, 0), [total, total])


def test_no_memory_adds_nothing(make_mesh, make_state):
    """Neither to a checkpoint nor to what is compiled."""
    assert jax.tree.leaves(ppo_mjx.initial_memory((4,))) == []
    state = make_state(ppo_mjx.Args(num_envs=4, hidden_sizes=(1,)), COUNTED, make_mesh(1))
    assert not [name for name in ppo_mjx.to_arrays(state) if "memory" in name]


# ---- Learning
