"""Models, physics, environment and C MuJoCo's counterpart, held against the installed Gymnasium."""

import dataclasses
import functools
import operator
import types

import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from quick import quick_kernels
from recordings import MOMENT, STEPS, TASK_IDS, WORLDS, compiled_step, make_env, one_step, record

import ppo_mjx

LOOKS = (
    "light_",
    "mat_",
    "tex_",
    "cam_",
    "names",
    "name_",
    "vis",
    "stat",
    "geom_matid",
    "geom_user",
    "nuser_geom",
    "signature",
    "nlight",
    "nmat",
    "ntex",
    "ncam",
    "nnames",
    "nbuffer",
    "narena",
    "signature",
    "text_",
    "ntext",
    "numeric_",
    "nnumeric",
    "key_",
    "nkey",
)  # how a model looks or is stored, not how it moves
# All others go on.
FALLING = ["Hopper", "Walker2d", "Ant", "Humanoid", "InvertedPendulum", "InvertedDoublePendulum"]
# Their kernels take longest, and their physics has nothing that Ant's has not but tendons, which the gripper of
# test_onekernel_mjx.py has. Walker2d is a Hopper with two legs.
SLOW = ("Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "Pusher", "Walker2d")


def some_slow(names, slow=SLOW) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


SOME_SLOW = some_slow(TASK_IDS)
TOUCHING = ["HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid", "HumanoidStandup"]


@pytest.fixture(autouse=True)
def quick_kernels_of_some(request, monkeypatch):
    """LLVM takes longest for these. Those of planar tasks are compiled as users have them."""
    if any(name in request.node.name for name in ("Ant", "Humanoid", "Pusher")):
        quick_kernels(monkeypatch)


def test_there_are_all_of_gymnasiums_tasks():
    theirs = {
        name.removesuffix("-v5")
        for name, spec in gymnasium.registry.items()
        if name.endswith("-v5") and spec.entry_point.startswith("gymnasium.envs.mujoco")
    }
    assert set(TASK_IDS) == theirs and len(theirs) == 11


@pytest.mark.parametrize("task_id", TASK_IDS)
def test_model_equals_gymnasium(task_id):
    """Every number of the compiled model that physics can depend on is Gymnasium's, and so is the time limit."""
    ours = ppo_mjx.load_model(ppo_mjx.TASKS[task_id])
    theirs = gymnasium.make(task_id + "-v5").unwrapped
    compared = 0
    for mine, other in ((ours, theirs.model), (ours.opt, theirs.model.opt)):
        for name in dir(other):
            value = getattr(other, name)
            physical = (
                isinstance(value, int | float | np.ndarray)
                and np.asarray(value).dtype.kind in "iufb"
            )
            if physical and not name.startswith(("_", *LOOKS)) and not name.endswith("_rgba"):
                np.testing.assert_allclose(
                    getattr(mine, name), value, rtol=1e-12, atol=1e-12, err_msg=name
                )
                compared += 1
    assert compared > 250
    assert ppo_mjx.TASKS[task_id].time_limit == gymnasium.spec(task_id + "-v5").max_episode_steps


@functools.cache
def resets(task_id: str):
    """4000 first states [4000, nq + nv], ours and Gymnasium's."""
    count = 4000
    env = make_env(task_id)
    original = gymnasium.make(task_id + "-v5").unwrapped
    data = jax.device_get(
        jax.jit(jax.vmap(ppo_mjx.kernel(env.reset)))(
            jax.random.split(jax.random.key(0), count)
        ).data
    )
    rows = []
    for seed in range(count):
        original.reset(seed=seed)
        rows.append(np.concatenate([original.data.qpos, original.data.qvel]))
    return env, np.concatenate([data.qpos, data.qvel], axis=1), np.array(rows)


# Velocities that are normal in one, and uniform in the other; a pole's; targets. The others' draws are theirs.
DRAWN = ("HalfCheetah", "Hopper", "InvertedPendulum", "Reacher")


@pytest.mark.parametrize("task_id", some_slow(TASK_IDS, slow=set(TASK_IDS) - set(DRAWN)))
def test_reset_distribution(task_id):
    """Resets have Gymnasium's support, mean and standard deviation, coordinate by coordinate."""
    env, ours, theirs = resets(task_id)
    spread = theirs.std(0)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= 6 * spread / np.sqrt(len(ours)) + 1e-7).all()
    np.testing.assert_allclose(ours.std(0), spread, rtol=0.06, atol=1e-12)
    uniform = np.full(len(spread), True)
    if env.task.gaussian_velocity:
        uniform[env.model.nq :] = False
    width = np.ptp(theirs, axis=0)
    for extreme in np.min, np.max:
        near = np.abs(extreme(ours, axis=0) - extreme(theirs, axis=0)) <= 0.05 * width + 1e-7
        assert near[uniform].all()
    if env.task.gaussian_velocity:
        assert (np.abs(ours[:, ~uniform]).max(0) > 3 * env.task.reset_noise).all()


@pytest.mark.parametrize(
    ("task_id", "first"), [("Reacher", 2), pytest.param("Pusher", 7, marks=pytest.mark.slow)]
)
def test_targets_are_drawn_as_gymnasiums(task_id, first):
    """Reacher's in a disk of 0.2 m, Pusher's cylinder at least 0.17 m from the goal, both uniformly."""
    _, ours, theirs = resets(task_id)
    ours, theirs = (np.linalg.norm(rows[:, first : first + 2], axis=1) for rows in (ours, theirs))
    quantiles = np.linspace(0, 1, 21)
    np.testing.assert_allclose(
        np.quantile(ours, quantiles), np.quantile(theirs, quantiles), atol=0.01
    )
    assert task_id == "Reacher" and ours.max() <= 0.2 or task_id == "Pusher" and ours.min() >= 0.17


def test_humanoids_solver_is_near():
    """Newton's method, which MJX has, and Gymnasium's PGS come to the same accelerations, in contact as well."""
    seen, model, ends = record("Humanoid"), ppo_mjx.load_model(ppo_mjx.TASKS["Humanoid"]), []
    for solver in mujoco.mjtSolver.mjSOL_PGS, mujoco.mjtSolver.mjSOL_NEWTON:
        model.opt.solver, data, path = solver, mujoco.MjData(model), []
        for start in np.ndindex(WORLDS, STEPS // 5):
            moment = (start[0], 5 * start[1])
            data.qpos, data.qvel, data.qacc_warmstart = (
                seen.qpos[moment],
                seen.qvel[moment],
                seen.warmstart[moment],
            )
            data.ctrl = seen.action[moment]
            mujoco.mj_step(model, data, nstep=5)
            path.append((*data.qpos, *data.qvel))
        ends.append(np.array(path))
    error = np.abs(ends[0] - ends[1]).max(axis=1)
    assert np.median(error) < 1e-6 and error.max() < 1e-2  # rad/s; speeds are up to some 30


def test_recorded_steps_have_contacts_and_terminations():
    """The recordings below are not easy: the bodies touch the floor, and most upright episodes end."""
    for task_id in TASK_IDS:
        seen = record(task_id)
        model, touching = ppo_mjx.load_model(ppo_mjx.TASKS[task_id]), 0
        data = mujoco.MjData(model)
        for data.qpos in seen.qpos[MOMENT]:
            mujoco.mj_forward(model, data)
            touching += data.ncon > 0
        assert task_id not in TOUCHING or touching >= WORLDS // 4
        ends = seen.terminated.any(axis=1).sum()
        assert ends >= WORLDS // 2 if task_id in FALLING else ends == 0


@pytest.mark.slow
@pytest.mark.parametrize("task_id", ["HalfCheetah"])
def test_step_equals_gymnasium_in_float64(task_id):
    """In double precision one step is Gymnasium's to the sixth digit: observation, reward and termination."""
    seen, state = record(task_id), one_step(task_id, x64=True)
    assert state.obs.dtype == np.float64
    np.testing.assert_array_equal(state.done > 0, seen.terminated[MOMENT])
    np.testing.assert_allclose(state.obs, seen.obs[MOMENT], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(state.reward, seen.reward[MOMENT], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("task_id", SOME_SLOW)
def test_step_equals_gymnasium(task_id):
    """A step of the kernel, in single precision, is Gymnasium's but for rounding, which stiff contacts magnify."""
    seen, state = record(task_id), one_step(task_id, x64=False)
    np.testing.assert_array_equal(state.done > 0, seen.terminated[MOMENT])
    size = 1 + np.abs(seen.obs[MOMENT])  # forces are thousands of N
    error = (np.abs(state.obs - seen.obs[MOMENT]) / size).max(axis=1)
    median = 5e-5 if task_id == "HumanoidStandup" else 1e-5  # it lies on many contacts
    assert np.median(error) < median and error.max() < 1e-3
    error = np.abs(state.reward - seen.reward[MOMENT]) / (1 + np.abs(seen.reward[MOMENT]))
    assert np.median(error) < 1e-5 and error.max() < 1e-3


@functools.cache
def long_rollout(task_id: str):
    """MJX's observations [STEPS, WORLDS, O] and terminations, by the recorded actions from the recorded starts."""
    seen, (_, step) = record(task_id), compiled_step(task_id, x64=False)
    inputs = (seen.qpos[:, 0], seen.qvel[:, 0], seen.warmstart[:, 0], seen.x[:, 0])
    obs = []
    done = []
    for t in range(STEPS):
        state = step(*inputs, seen.action[:, t])
        inputs = (state.data.qpos, state.data.qvel, state.data.qacc_warmstart, state.info["x"])
        obs.append(state.obs)
        done.append(state.done > 0)
    return np.array(obs), np.array(done)


@pytest.mark.parametrize(
    ("task_id", "steps"),
    [
        ("HalfCheetah", 10),
        ("Hopper", 50),
        pytest.param("Walker2d", 50, marks=pytest.mark.slow),
        ("Ant", 10),
        ("Swimmer", 50),
        ("InvertedPendulum", 50),
        pytest.param("InvertedDoublePendulum", 10, marks=pytest.mark.slow),
        ("Reacher", 50),
        pytest.param("Pusher", 50, marks=pytest.mark.slow),
    ],
)
def test_many_steps_follow_gymnasium(task_id, steps):
    """Rounding grows by contacts, soon in HalfCheetah and Ant, but up to then most episodes stay with Gymnasium's.
    The humanoids are left out: their parts strike each other, and after that it is chaos."""
    ours, theirs = long_rollout(task_id)[0][:steps], record(task_id).obs.swapaxes(0, 1)[:steps]
    error = (np.abs(ours - theirs) / (1 + np.abs(theirs))).max(axis=(0, 2))  # of each episode
    assert np.median(error) < 1e-3


@pytest.mark.parametrize("task_id", some_slow(name for name in FALLING if name != "Ant"))
def test_terminates_on_gymnasiums_step(task_id):
    """Each episode ends on the same step as Gymnasium's. (Ant's are chaos by then.)"""
    ours, theirs = long_rollout(task_id)[1].T, record(task_id).terminated
    np.testing.assert_array_equal(ours.argmax(axis=1), theirs.argmax(axis=1))
    np.testing.assert_array_equal(ours.any(axis=1), theirs.any(axis=1))


@pytest.mark.parametrize("task_id", SOME_SLOW)
def test_c_mujoco_env_equals_gymnasium(task_id):
    """Each of 100 random steps of CMujocoEnv is Gymnasium's from the same state."""
    ours = ppo_mjx.CMujocoEnv(make_env(task_id))
    theirs = gymnasium.make(task_id + "-v5").unwrapped
    ours.reset(seed=0)
    theirs.reset(seed=0)
    rng = np.random.default_rng(0)
    # From the same state each: contacts would magnify the models' last bits from step to step.
    for t in range(100):
        mujoco.mj_forward(ours.model, ours.data)  # as Gymnasium's set_state does
        ours.observe()
        theirs.set_state(ours.data.qpos, ours.data.qvel)
        theirs.data.qacc_warmstart = ours.data.qacc_warmstart
        action = rng.uniform(-1, 1, theirs.action_space.shape)
        *mine, truncated, _ = ours.step(action)
        for one, other in zip(mine, theirs.step(action)[:3], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
        assert truncated == (t + 1 >= ours.task.time_limit)


@pytest.mark.parametrize("task_id", SOME_SLOW)
def test_reset_observation_equals_gymnasium(task_id):
    """What an episode begins with, MJX's and C MuJoCo's: inertias and velocities of bodies too, no forces yet."""
    ours = make_env(task_id)
    theirs = gymnasium.make(task_id + "-v5").unwrapped
    original = ppo_mjx.CMujocoEnv(ours)
    # By the kernel of `resets`.
    states = jax.vmap(ppo_mjx.kernel(ours.reset))(jax.vmap(jax.random.key)(jnp.arange(3)))
    for seed in range(3):
        state = jax.tree.map(operator.itemgetter(seed), states)
        obs, _ = original.reset(seed)
        theirs.reset(seed=0)
        theirs.set_state(original.data.qpos, original.data.qvel)
        np.testing.assert_allclose(obs, theirs._get_obs(), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(state.obs, obs, rtol=1e-5, atol=1e-5)
        assert (
            state.obs.shape == theirs.observation_space.shape
            and abs(float(state.info["x"]) - original.now.x) < 1e-6
        )


@pytest.mark.parametrize(("task_id", "wrenches"), [("Ant", 78), ("Humanoid", 78), ("Hopper", 0)])
def test_networks_do_not_see_contact_wrenches(task_id, wrenches):
    """These are the last ones of the observation; the policy neither sees nor exports them."""
    args = ppo_mjx.default_args(task_id)
    env = ppo_mjx.Env(args)
    size = gymnasium.make(task_id + "-v5").observation_space.shape[0]
    assert env.observation_size == size
    assert env.seen.tolist() == list(range(size - wrenches))
    assert len(ppo_mjx.Env(dataclasses.replace(args, see_all=True)).seen) == size

    rng = np.random.default_rng(0)
    stats = ppo_mjx.RunningStats(1.0, rng.normal(size=size), rng.uniform(0.5, 2, size))
    obs = rng.normal(size=(5, size))
    seen = ppo_mjx.see(env, stats, jnp.asarray(obs))
    normalized = ppo_mjx.normalize(stats, jnp.asarray(obs))
    np.testing.assert_array_equal(seen, normalized[:, : size - wrenches])

    weights = rng.normal(size=(size - wrenches, env.action_size))
    params = {"actor": {"params": {"Dense_0": {"kernel": weights, "bias": np.zeros(1)}}}}
    learner = types.SimpleNamespace(params=params, obs_stats=stats)
    policy = ppo_mjx.export_policy(env, learner)
    _, action = ppo_mjx.act(policy, (), obs)
    expected = np.clip(np.asarray(seen, np.float64) @ weights, -1, 1)
    np.testing.assert_allclose(
        action, env.action_scale * expected + env.action_bias, rtol=1e-3, atol=1e-4
    )


def test_c_mujoco_env_truncates_and_repeats():
    """CMujocoEnv cuts an episode at the time limit only, and one seed starts one episode."""
    env = ppo_mjx.CMujocoEnv(make_env("HalfCheetah"))
    np.testing.assert_array_equal(env.reset(seed=3)[0], env.reset(seed=3)[0])
    assert not np.array_equal(env.reset(seed=3)[0], env.reset(seed=4)[0])
    assert [env.step(np.zeros(6))[3] for _ in range(1000)] == 999 * [False] + [True]


def test_reset_follows_its_key(hopper):
    """The same key starts the same episode, another key another one."""
    first, again, other = (ppo_mjx.kernel(hopper.reset)(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.data.qpos != other.data.qpos).all() and (first.data.qvel != other.data.qvel).all()


def test_step_is_pure_and_vmap_is_a_loop():
    """Same input, same output; a step alone and without jit is the jitted step of many worlds, to the bit."""
    env, step = compiled_step("Hopper", False)
    seen = record("Hopper")
    inputs = (
        seen.qpos[:, 20],
        seen.qvel[:, 20],
        seen.warmstart[:, 20],
        seen.x[:, 20],
        seen.action[:, 20],
    )
    first, second = step(*inputs), step(*inputs)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    qpos, qvel, warmstart, x, action = (jnp.asarray(x[7], jnp.float32) for x in inputs)
    start = ppo_mjx.kernel(env.reset)(jax.random.key(0))
    data = start.data.replace(qpos=qpos, qvel=qvel, qacc_warmstart=warmstart)
    start = start.replace(data=data, info=start.info | {"x": x})
    alone, batch = ppo_mjx.kernel(env.step)(start, action), jax.tree.map(lambda x: x[7], first)
    jax.tree.map(np.testing.assert_array_equal, alone, batch)


def test_broken_world_ends_its_episode():
    """A world that is not finite or too fast terminates, earns nothing and shows its last observation."""
    _, step = compiled_step("Hopper", False)
    seen = record("Hopper")
    inputs = [x[:, 0].copy() for x in (seen.qpos, seen.qvel, seen.warmstart, seen.x, seen.action)]
    inputs[0][0, 1], inputs[1][1, 0], inputs[1][2, 0] = np.nan, np.nan, 1e4
    state = step(*inputs)
    assert state.info["broken"].tolist() == 3 * [True] + (WORLDS - 3) * [False]
    assert (state.done[:3] == 1).all() and (state.reward[:3] == 0).all()
    assert not state.done[3:].any() and (state.reward[3:] != 0).all()
    keys = jax.random.split(jax.random.key(0), WORLDS)  # as in compiled_step
    reset = jax.vmap(ppo_mjx.kernel(make_env("Hopper").reset))(keys)
    np.testing.assert_allclose(state.obs[:3], reset.obs[:3], rtol=1e-6)
