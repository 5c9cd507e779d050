"""The short script is the long one without its bookkeeping: the same text, the same numbers."""

import ast
import dataclasses
import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import optax
import pytest
import tyro
from jax.flatten_util import ravel_pytree
from quick import QUICK
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_mjx
import ppo_mjx_minimal as minimal

SMALL = {
    "num_envs": 16,
    "num_steps": 16,
    "num_minibatches": 4,
    "update_epochs": 2,
    "total_timesteps": 1024,
}


# ---- The same text and the same numbers as ppo_mjx.py


@pytest.mark.parametrize("name", ["RunningStats", "start_stats", "normalize"])
def test_same_text(name):
    """What ppo_mjx.py has outside the blocks for this script, or in a block with more in it."""
    ours = inspect.getsource(getattr(minimal, name))
    assert ours == inspect.getsource(getattr(ppo_mjx, name))


def test_same_defaults():
    """Each flag has the default that ppo_mjx.py has for HalfCheetah."""
    flags = dataclasses.asdict(minimal.Args())
    theirs = dataclasses.asdict(ppo_mjx.default_args("HalfCheetah"))
    assert flags == {name: theirs[name] for name in flags}


def copy(tree):
    """With arrays of its own, as both scripts' iterations use up the state that they get."""
    return jax.tree.map(jnp.copy, tree)


def as_minimal(state: ppo_mjx.TrainState) -> tuple[minimal.Learner, minimal.Worlds]:
    """The same state in the short script's records."""
    learner = copy(state.learner)
    adam = learner.opt_state.inner_state
    _, unravel = ravel_pytree(learner.params)
    adam = adam._replace(mu=unravel(adam.mu), nu=unravel(adam.nu))
    stats = {
        name: minimal.RunningStats(**vars(getattr(learner, name)))
        for name in ("obs_stats", "return_stats")
    }
    ours = minimal.Learner(
        params=learner.params,
        opt_state=(optax.EmptyState(), (adam, optax.EmptyState())),
        key=learner.key,
        iteration=learner.iteration,
        **stats,
    )

    worlds = copy(state.worlds)
    env_state = worlds.env_state
    whole = worlds.episode_length == env_state.info["elapsed"]
    env_state = minimal.State(
        data=minimal.Physics(**env_state.data.fields()),
        obs=env_state.obs,
        reward=env_state.reward,
        broken=env_state.info["broken"],
        truncated=env_state.info["truncated"],
        elapsed=env_state.info["elapsed"],
    )
    return ours, minimal.Worlds(
        env_state=env_state,
        memory=worlds.memory,
        key=worlds.key,
        discounted_return=worlds.discounted_return,
        episode_return=jnp.where(whole, worlds.episode_return, jnp.nan),
    )


def assert_close(ours, theirs, rtol: float) -> None:
    """Two trees with the same leaves; random keys are the same to the bit."""

    def compare(ours, theirs):
        ours = ppo_mjx.bare(ours)
        np.testing.assert_allclose(ours, ppo_mjx.bare(theirs), rtol=rtol, atol=rtol)

    jax.tree.map(compare, ours, theirs)


def make_hard(state: ppo_mjx.TrainState) -> ppo_mjx.TrainState:
    """Some worlds reach the time limit in the next rollout, after whole episodes and others, and
    one breaks."""
    worlds = state.worlds
    numbers = jnp.arange(SMALL["num_envs"])
    elapsed = jnp.where(numbers < 8, 985 + 4 * numbers, 100)
    episode_length = jnp.where(numbers % 2 == 0, elapsed, elapsed - 1)
    qpos = worlds.env_state.data.qpos.at[9, 2].set(jnp.nan)
    env_state = worlds.env_state.replace(
        data=worlds.env_state.data.replace(qpos=qpos),
        info=worlds.env_state.info | {"elapsed": elapsed},
    )
    worlds = worlds.replace(env_state=env_state, episode_length=episode_length)
    return state.replace(worlds=worlds)


@pytest.mark.slow
def test_same_numbers(make_mesh, make_state, monkeypatch):
    """The first iteration, and one with time limits and a broken world, are those of ppo_mjx.py."""
    # There each device shuffles by its own number; here there is none.
    fold_in = jax.random.fold_in
    monkeypatch.setattr(jax.lax, "axis_index", lambda axis: None)
    monkeypatch.setattr(
        jax.random, "fold_in", lambda key, data: key if data is None else fold_in(key, data)
    )
    args = minimal.Args(**SMALL)
    env = minimal.Env()
    their_args = ppo_mjx.Args(**SMALL)
    their_env = ppo_mjx.Env(ppo_mjx.Args(env_id="HalfCheetah"))
    mesh = make_mesh(1)

    state = make_state(their_args, their_env, mesh)
    iterate = minimal.train_iteration.lower(args, env, *as_minimal(state)).compile(QUICK)
    their_iterate = ppo_mjx.train_iteration.lower(their_args, their_env, mesh, state).compile(QUICK)

    def iterate_both(state: ppo_mjx.TrainState) -> ppo_mjx.TrainState:
        learner, worlds, metrics = iterate(*as_minimal(state))
        state, their_metrics = their_iterate(state)

        expected_learner, expected_worlds = as_minimal(state)
        assert_close(worlds, expected_worlds, rtol=1e-6)
        assert_close(learner, expected_learner, rtol=1e-5)
        assert_close(metrics, {tag: their_metrics[tag] for tag in metrics}, rtol=1e-4)
        return state, metrics

    assert_close(minimal.init(args, env, jax.random.key(1)), as_minimal(state), rtol=0)
    state, metrics = iterate_both(state)
    assert jnp.isnan(metrics["charts/episodic_return"])

    state, metrics = iterate_both(make_hard(state))
    assert jnp.isfinite(metrics["charts/episodic_return"])
    assert state.worlds.times_broken.tolist() == [0] * 9 + [1] + [0] * 6


# ---- The command line


def test_run(tmp_path, capsys):
    """A run compiles once, prints, logs, and leaves a policy that ppo_mjx.py can judge."""
    args = tyro.cli(minimal.Args, args=["--num-envs", "16", "--total-timesteps", "768"])
    minimal.train_iteration.clear_cache()
    run_dir = minimal.train(dataclasses.replace(args, runs_dir=str(tmp_path)))
    assert minimal.train_iteration._cache_size() == 1  # the state comes out as it went in
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["step", f"{i * 256}"] for i in (1, 2, 3)]
    assert lines[-1] == f"policy: {run_dir / 'policy.npz'}"

    log = EventAccumulator(str(run_dir)).Reload()
    tags = set(log.Tags()["tensors"])
    losses = "loss policy_loss value_loss entropy old_approx_kl approx_kl clipfrac".split()
    expected = {f"losses/{name}" for name in [*losses, "explained_variance"]}
    assert tags == expected | {"charts/SPS", "charts/learning_rate"}  # no episode has ended
    assert [event.step for event in log.Tensors("losses/loss")] == [256, 512, 768]

    saved = json.loads((run_dir / "args.json").read_text())
    assert (saved["num_envs"], saved["gamma"]) == (16, 0.99)
    with np.load(run_dir / "policy.npz") as file:
        policy = dict(file)
    env = ppo_mjx.Env(ppo_mjx.Args(env_id="HalfCheetah"))
    (value,) = ppo_mjx.evaluate_on_host(ppo_mjx.CMujocoEnv(env), policy, episodes=1, seed=0)
    assert -1000 < value < 1000


def test_mujocos_warnings_come_back(tmp_path, monkeypatch, capfd):
    """Only while the environment loads its model is MuJoCo silent about the deprecated setting."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings to a file as well
    minimal.Env()
    assert "deprecated" not in "".join(capfd.readouterr())
    mujoco.MjModel.from_xml_string('<mujoco><compiler settotalmass="1"/></mujoco>')
    assert "deprecated" in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "call",
    [
        "--num-envs 0",
        "--num-steps -1",
        "--num-minibatches 33",
        "--num-minibatches 0",
        "--total-timesteps 4095",
        "--learning-rate fast",
        "--no-such-flag",
    ],
)
def test_bad_call(capsys, call):
    """What cannot run is refused by code 2 and a message that names the flag."""
    with pytest.raises(SystemExit) as stop:
        tyro.cli(minimal.Args, args=call.split())
    assert stop.value.code == 2
    assert call.split()[0] in capsys.readouterr().err


def test_every_setting_is_used():
    """No flag is without effect."""
    tree = ast.parse(Path(minimal.__file__).read_text())
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {field.name for field in dataclasses.fields(minimal.Args)} <= read
