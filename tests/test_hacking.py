"""The diffs of docs/hacking.md: each applies to ppo_mjx.py, trains, is evaluated, and does what it says."""

import importlib.util
import shutil
import subprocess
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from quick import QUICK, quick_kernels
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_mjx
from tools import export
from tools.replay_nan import load_script

ROOT = Path(ppo_mjx.__file__).parent
HACKS = ROOT / "docs" / "hacks"
SMALL = {
    "num_devices": 1,
    "num_envs": 16,
    "num_steps": 16,
    "num_minibatches": 4,
    "update_epochs": 2,
    "hidden_sizes": (8,),
    "total_timesteps": 4 * 256,
    "eval_every": 0,
    "eval_episodes": 2,
}


@pytest.fixture
def apply(tmp_path, monkeypatch):
    """A function from a diff's name to the module that it makes of ppo_mjx.py."""

    def apply(name: str) -> ModuleType:
        # One name for all, by which onekernel keeps kernels: some change nothing of the environment.
        source = tmp_path / "hacked.py"
        command = ["patch", "-s", "-o", source, ROOT / "ppo_mjx.py", HACKS / f"{name}.diff"]
        subprocess.run(command, check=True)
        script = load_script(source)
        for env in {"Env", "PlaygroundEnv"} & vars(script).keys():
            monkeypatch.setattr(script, env, cache(getattr(script, env)))  # compiled once
        return script

    monkeypatch.syspath_prepend(tmp_path)
    return apply


def train(script: ModuleType, folder: Path, **settings) -> Path:
    """A short run of the command line, and its evaluation from its files. Returns its folder."""

    def flags(settings: dict) -> list[str]:
        words = []
        for name, value in settings.items():
            values = value if isinstance(value, tuple) else (value,)
            words += ["--" + name.replace("_", "-"), *map(str, values)]
        return words

    with mock.patch.object(script, "judge", lambda *_: {"C MuJoCo": {"mean": 0.0}}):
        script.main(flags(SMALL | settings | {"runs_dir": folder / "runs"}))
    (run_dir,) = (folder / "runs").iterdir()
    script.main(flags({"evaluate": run_dir, "eval_episodes": 2}))
    return run_dir


def read_log(run_dir: Path, tag: str) -> np.ndarray:
    """What TensorBoard shows of a tag."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return np.array([event.value for event in log.Scalars(tag)])


def read_policy(run_dir: Path) -> dict:
    with np.load(run_dir / "policy.npz") as arrays:
        return dict(arrays)


def run(function, *inputs):
    """Compile and call a function."""
    return jax.jit(function).lower(*inputs).compile(QUICK)(*inputs)


def on_one_device(make_mesh, function):
    """The function, where it may ask for means over devices."""
    specs = {"in_specs": P(), "out_specs": P(), "check_vma": False}
    return jax.shard_map(function, mesh=make_mesh(1), **specs)


def restore(script: ModuleType, run_dir: Path, make_mesh):
    """Settings, environment and last state of a run."""
    args = script.read_run(run_dir)
    env = script.Env(args)
    state = run(partial(script.init_train_state, args, env), jax.random.key(0))
    return args, env, script.restore(args, run_dir, state)


def roll(script: ModuleType, run_dir: Path, make_mesh):
    """Settings, environment, the last state of a run, and a rollout from there: [T, N, ...]."""
    args, env, state = restore(script, run_dir, make_mesh)
    _, steps = run(partial(script.rollout, args, env), state.learner, state.worlds)
    done = np.asarray(steps.done)
    assert 0 < done[:-1].mean() < 0.5  # episodes begin within the rollout
    return args, env, state, steps


def test_page_shows_every_diff():
    page = (ROOT / "docs" / "hacking.md").read_text()
    diffs = sorted(HACKS.glob("*.diff"))
    assert len(diffs) == 7
    for diff in diffs:
        assert f"```diff\n{diff.read_text()}```\n" in page, diff.name


def test_every_diff_applies(apply):
    """The tests below, which are slow, see what each does."""
    for diff in HACKS.glob("*.diff"):
        assert apply(diff.stem).Args()


@pytest.mark.slow
def test_reward(apply, tmp_path, monkeypatch):
    """The new term is half the cosine of the pitch, part of the reward, and logged."""
    quick_kernels(monkeypatch)
    script = apply("reward")
    run_dir = train(script, tmp_path)
    assert 0 < read_log(run_dir, "reward/upright").mean() <= 0.5

    env = script.Env(script.read_run(run_dir))
    state = run(jax.vmap(script.kernel(env.reset)), jax.random.split(jax.random.key(0), 16))
    state = run(jax.vmap(script.kernel(env.step)), state, jnp.ones((16, env.action_size)))
    expected = 0.5 * np.cos(state.data.qpos[:, 2])
    np.testing.assert_allclose(state.metrics["reward_upright"], expected, rtol=1e-5)
    np.testing.assert_allclose(state.reward, sum(state.metrics.values()), rtol=1e-5)


@pytest.mark.slow
def test_observation(apply, tmp_path):
    """The last action is observed, nothing at a reset, and the same in C MuJoCo."""
    script = apply("observation")
    run_dir = train(script, tmp_path)
    env = script.Env(script.read_run(run_dir))
    assert env.observation_size == 17 + 6

    action = np.linspace(-1, 1, 6, dtype=np.float32)
    state = run(script.kernel(env.reset), jax.random.key(0))
    np.testing.assert_array_equal(state.obs[17:], np.zeros(6))
    state = run(script.kernel(env.step), state, action)
    np.testing.assert_array_equal(state.obs[17:], action)

    original = script.CMujocoEnv(env)
    obs, _ = original.reset(seed=0)
    np.testing.assert_array_equal(obs[17:], np.zeros(6))
    obs, *_ = original.step(action)
    np.testing.assert_array_equal(obs[17:], action)


@pytest.mark.slow
def test_history(apply, tmp_path, make_mesh):
    """Each step drops the oldest observation; an episode begins with copies of its first one."""
    script = apply("history")
    run_dir = train(script, tmp_path, env_id="InvertedPendulum")
    _, env, _, steps = roll(script, run_dir, make_mesh)
    done = np.asarray(steps.done)[:-1]
    seen = np.asarray(steps.obs).reshape(*steps.obs.shape[:2], 4, 4)  # [T, N, history, O]

    after = seen[1:]
    np.testing.assert_array_equal(after[~done][:, :-1], seen[:-1][~done][:, 1:])
    assert (after[~done][:, -1] != after[~done][:, -2]).any(axis=-1).all()
    np.testing.assert_array_equal(after[done], np.repeat(after[done][:, :1], 4, axis=1))
    reached = np.asarray(steps.end.env_state.obs)[:-1].reshape(seen[:-1].shape)
    assert (reached[done][:, -1] != after[done][:, 0]).any(axis=-1).all()

    original = script.CMujocoEnv(env)
    for seed in 0, 1:
        first, _ = original.reset(seed)
        np.testing.assert_array_equal(first, np.tile(first[:4], 4))
        second, *_ = original.step(np.ones(1))
        third, *_ = original.step(np.ones(1))
        np.testing.assert_array_equal(second[:12], first[4:])
        np.testing.assert_array_equal(third[:12], second[4:])
        assert (third[12:] != third[8:12]).any()


@pytest.mark.slow
def test_state_std(apply, tmp_path, make_mesh):
    """The standard deviation is the state's, learnt, and that of samples, densities and entropy."""
    script = apply("state_std")
    run_dir = train(script, tmp_path, env_id="InvertedPendulum", ent_coef=0.01)
    args, env, state = restore(script, run_dir, make_mesh)
    obs = jax.random.normal(jax.random.key(1), (50, env.observation_size))
    _, policy = script.apply_policy(args, env, state.learner.params, (), obs)
    assert policy.log_std.shape == (50, 1) and np.ptp(policy.log_std) > 0.02
    assert np.abs(np.mean(policy.log_std) - args.init_log_std) < 1

    keys = jax.random.split(jax.random.key(2), 50)
    noise = jax.vmap(lambda key: jax.random.normal(key, (1,)))(keys)
    std = np.exp(policy.log_std)
    action = policy.sample(keys)
    np.testing.assert_allclose(action, policy.mean + std * noise, rtol=1e-5)
    density = np.exp(-0.5 * np.square(noise)) / (std * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(policy.log_prob(action), np.log(density[:, 0]), rtol=1e-4)
    expected = 0.5 * np.log(2 * np.pi * np.e * np.square(std[:, 0]))
    np.testing.assert_allclose(policy.entropy(), expected, rtol=1e-4)

    first = script.init_train_state(args, env, jax.random.key(args.seed)).learner.params
    learnt = jax.tree.map(np.subtract, first["log_std"], state.learner.params["log_std"])
    assert all(np.abs(change).max() > 1e-3 for change in jax.tree.leaves(learnt))


@pytest.mark.slow
def test_gru(apply, tmp_path, make_mesh):
    """Episodes begin without memory; before an update the loss finds the densities of the rollout.

    The exported policy is the network.
    """
    script = apply("gru")
    with pytest.raises(SystemExit):
        script.check_args(script.Args(num_envs=16, num_steps=16, num_minibatches=32))
    run_dir = train(script, tmp_path, env_id="InvertedPendulum")
    args, env, state, steps = roll(script, run_dir, make_mesh)
    done = np.asarray(steps.done)[:-1]
    (memory,) = jax.tree.map(np.asarray, steps.memory)
    (reached,) = jax.tree.map(np.asarray, steps.end.memory)
    assert np.abs(memory[0]).max() > 0  # kept from the rollout before
    assert not memory[1:][done].any() and np.abs(reached[:-1][done]).min(axis=-1).max() > 0
    np.testing.assert_array_equal(memory[1:][~done], reached[:-1][~done])

    # A policy that depends on its memory by far, so that a wrong one shows.
    params = jax.tree.map(jnp.copy, state.learner.params)
    params["actor"]["params"]["Dense_6"]["kernel"] *= 100
    learner = state.learner.replace(params=params)

    def loss_before_update(learner, worlds, forget):
        _, steps = script.rollout(args, env, learner, worlds)
        batch, _ = script.make_batch(args, env, learner, steps, steps.end.env_state.reward)
        batch = batch.replace(done=batch.done & ~forget)
        return script.ppo_loss(args, env, learner.params, batch)[1], batch

    program = on_one_device(make_mesh, loss_before_update)
    metrics, batch = run(program, learner, state.worlds, jnp.array(False))
    assert batch.obs.shape == (16, 16, env.observation_size)  # worlds, then steps
    assert metrics["losses/approx_kl"] < 1e-6 and metrics["losses/clipfrac"] == 0
    metrics, _ = run(program, learner, state.worlds, jnp.array(True))
    assert metrics["losses/approx_kl"] > 1e-3  # as it would be without the resets

    policy = script.export_policy(env, learner)
    raw = np.asarray(steps.obs)[:, 0]
    theirs = ours = script.initial_memory()
    for obs in raw[:5]:
        theirs, action = script.act(policy, theirs, obs)
        normalized = script.normalize(learner.obs_stats, obs)
        ours, gaussian = script.apply_policy(args, env, learner.params, ours, normalized)
        np.testing.assert_allclose(theirs[0], ours[0], atol=1e-5)
        expected = script.scale_action(env, gaussian.mean)
        np.testing.assert_allclose(action, expected, atol=1e-4)
    if importlib.util.find_spec("onnx"):
        export.write_onnx(script, policy, tmp_path / "policy.onnx")


@pytest.mark.slow
def test_adaptive_step(apply, tmp_path):
    """The step size of each update follows from the divergence of the one before, and is saved."""
    script = apply("adaptive_step")
    small = {"env_id": "InvertedPendulum", "total_timesteps": 12 * 256}
    run_dir = train(script, tmp_path, desired_kl=0.01, learning_rate=5e-3, **small)
    kl = read_log(run_dir, "losses/approx_kl")
    rate = read_log(run_dir, "charts/learning_rate")
    factor = np.where(kl > 0.02, 1 / 1.5, np.where(kl < 0.005, 1.5, 1.0))
    expected = np.clip(rate * factor, 1e-5, 1e-2)
    np.testing.assert_allclose(rate[1:], expected[:-1], rtol=1e-5)
    assert rate[0] == pytest.approx(5e-3) and len(set(rate)) > 2

    with np.load(script.checkpoints(run_dir)[0]) as arrays:
        assert arrays[".learner.learning_rate"] == pytest.approx(expected[-1])


@pytest.mark.slow
def test_playground(apply, tmp_path):
    """Time limit, resets and broken physics are this file's; states and rewards the environment's."""
    shutil.copy(HACKS / "playground_env.py", tmp_path)
    script = apply("playground")
    with pytest.raises(SystemExit):
        script.main(["--capture-video"])
    run_dir = train(script, tmp_path)
    assert 0 <= read_log(run_dir, "reward/upright").mean() <= 1
    assert read_log(run_dir, "charts/nan_resets").max() == 0

    env = script.PlaygroundEnv(script.read_run(run_dir))
    state = run(jax.vmap(script.kernel(env.reset)), jax.random.split(jax.random.key(0), 3))
    qvel = state.data.qvel.at[2, 0].set(jnp.nan)
    state = state.replace(data=state.data.replace(qvel=qvel))
    state.info["elapsed"] = jnp.array([0, 499, 0])
    end = run(jax.vmap(script.kernel(env.step)), state, jnp.ones((3, 1)))
    np.testing.assert_array_equal(end.info["elapsed"], [1, 500, 1])
    np.testing.assert_array_equal(end.info["truncated"], [False, True, False])
    np.testing.assert_array_equal(end.info["broken"], [False, False, True])
    np.testing.assert_array_equal(end.done, [0, 0, 1])
    np.testing.assert_array_equal(end.obs[2], state.obs[2])
    assert end.reward[2] == 0 and jnp.abs(end.obs[:2] - state.obs[:2]).max() > 0

    first = jax.tree.map(lambda x: x[0], state)
    theirs = run(env.playground.step, first, jnp.ones(1))
    np.testing.assert_allclose(end.obs[0], theirs.obs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(end.reward[0], theirs.reward, rtol=1e-4)
