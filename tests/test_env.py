"""Models, environment and C MuJoCo's counterpart, held against the installed Gymnasium."""

import dataclasses
import functools
from unittest import mock

import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from mujoco import mjx

import ppo_mjx

TASK_IDS = list(ppo_mjx.TASKS)
WORLDS, STEPS = 20, 50
FEET = dict.fromkeys(TASK_IDS, "foot") | {"HalfCheetah": "bfoot", "Ant": "ankle"}
LOOKS = ("light_", "mat_", "tex_", "cam_", "names", "name_", "vis", "stat", "geom_matid", "geom_user", "nuser_geom",
         "signature", "nlight", "nmat", "ntex", "ncam", "nnames", "nbuffer", "narena", "signature", "text_", "ntext",
         "numeric_", "nnumeric", "key_", "nkey")  # how a model looks or is stored, not how it moves
TENDONS = ("tendon_", "ten_", "ntendon", "nJten", "wrap_", "nwrap")  # Humanoid's neither pull nor are observed

@dataclasses.dataclass(frozen=True)
class Recording:
    """Gymnasium's random episodes [WORLDS, STEPS, ...], which go on after a termination."""
    qpos: np.ndarray  # qpos, qvel and warmstart are those before the step
    qvel: np.ndarray
    warmstart: np.ndarray
    x: np.ndarray  # where the reward takes the robot to be
    action: np.ndarray
    next_qpos: np.ndarray
    obs: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray

def make_gymnasium(task_id: str):
    """Gymnasium's environment, Humanoid with the solver that MJX has (test_humanoids_solver_is_near tells of PGS)."""
    env = gymnasium.make(task_id + "-v5").unwrapped
    if task_id == "Humanoid":
        env.model.opt.solver, env.model.opt.iterations = mujoco.mjtSolver.mjSOL_NEWTON, 100
    return env

@functools.cache
def record(task_id: str) -> Recording:
    env, rng, rows, task = make_gymnasium(task_id), np.random.default_rng(0), [], ppo_mjx.TASKS[task_id]
    for world in range(WORLDS):
        env.reset(seed=world)
        for _ in range(STEPS):
            # float32 values, so that all precisions get the same action
            action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32).astype(float)
            before = [x.copy() for x in (env.data.qpos, env.data.qvel, env.data.qacc_warmstart)]
            before.append(ppo_mjx.sense(task, functools.partial(getattr, env.data), np)[0])
            obs, reward, terminated, _, _ = env.step(action)
            rows.append((*before, action, env.data.qpos.copy(), obs, reward, terminated))
    return Recording(*(np.array(x).reshape(WORLDS, STEPS, *np.shape(x[0])) for x in zip(*rows, strict=True)))

@functools.cache
def compiled_step(task_id: str, physics: str, x64: bool):
    """The environment, and one compiled step of WORLDS worlds from (qpos, qvel, warmstart, x, action)."""
    jax.clear_caches()  # JAX 0.9 mixes up its traces of float64 constants, MJX's RK4 has one, between the precisions
    def step(qpos, qvel, warmstart, x, action):
        reset = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), WORLDS))
        state = reset.replace(data=ppo_mjx.Physics(qpos, qvel, warmstart), info=reset.info | {"x": x})
        return jax.vmap(env.step)(state, action)
    def call(*inputs):
        with jax.enable_x64(x64):
            return jax.device_get(compiled(*(jnp.asarray(x, float) for x in inputs)))
    with jax.enable_x64(x64):
        env = ppo_mjx.Env(task_id, physics)
        sizes = (env.model.nq,), (env.model.nv,), (env.model.nv,), (), (env.model.nu,)
        compiled = jax.jit(step).lower(*(jnp.zeros((WORLDS, *size), float) for size in sizes))
        compiled = compiled.compile({"xla_llvm_disable_expensive_passes": True})  # which take long, and pay only later
    jax.clear_caches()
    return env, call

MOMENT = np.arange(WORLDS), np.random.default_rng(1).integers(0, STEPS, WORLDS)  # a random one of each episode

def one_step(task_id: str, physics: str, x64: bool):
    """MJX's step from the MOMENT of each recorded episode."""
    seen = record(task_id)
    inputs = (seen.qpos, seen.qvel, seen.warmstart, seen.x, seen.action)
    return compiled_step(task_id, physics, x64)[1](*(x[MOMENT] for x in inputs))

@pytest.mark.parametrize("task_id", TASK_IDS)
def test_model_equals_gymnasium(task_id):
    """Every number of the compiled model that physics can depend on is Gymnasium's."""
    ours, theirs = ppo_mjx.load_model(ppo_mjx.TASKS[task_id]), gymnasium.make(task_id + "-v5").unwrapped.model
    compared, looks = 0, LOOKS + (TENDONS if task_id == "Humanoid" else ())
    if task_id == "Humanoid":
        for name in "stiffness", "damping", "frictionloss", "armature", "limited", "actfrclimited":
            assert not getattr(theirs, f"tendon_{name}").any()
    for mine, other in ((ours, theirs), (ours.opt, theirs.opt)):
        for name in dir(other):
            value = getattr(other, name)
            physical = isinstance(value, int | float | np.ndarray) and np.asarray(value).dtype.kind in "iufb"
            if physical and not name.startswith(("_", *looks)) and not name.endswith("_rgba"):
                np.testing.assert_allclose(getattr(mine, name), value, rtol=1e-12, atol=1e-12, err_msg=name)
                compared += 1
    assert compared > 250

@pytest.mark.parametrize("task_id", TASK_IDS)
def test_fast_model_differs_only_as_documented(task_id):
    """The fast model keeps masses, joints, motors and control step; it drops contacts between body parts."""
    exact, fast = (ppo_mjx.load_model(ppo_mjx.TASKS[task_id], physics) for physics in ("exact", "fast"))
    for name in "body_mass body_inertia jnt_range jnt_stiffness dof_damping dof_armature actuator_gear qpos0".split():
        np.testing.assert_array_equal(getattr(fast, name), getattr(exact, name), err_msg=name)
    control_dt = [ppo_mjx.Env(task_id, physics).control_dt for physics in ("exact", "fast")]
    assert control_dt[0] == control_dt[1] == exact.opt.timestep * ppo_mjx.TASKS[task_id].frame_skip
    assert fast.geom_conaffinity[0] and (task_id == "Humanoid" or not fast.geom_conaffinity[1:].any())
    feet = [fast.geom_contype[i] for i in range(1, fast.ngeom) if fast.geom(i).name.startswith(FEET[task_id])]
    assert len(feet) > 0 and all(feet)

@pytest.mark.parametrize("task_id", TASK_IDS)
def test_reset_distribution(task_id):
    """Resets have Gymnasium's support, mean and standard deviation, coordinate by coordinate."""
    count, env, original = 4000, ppo_mjx.Env(task_id), gymnasium.make(task_id + "-v5").unwrapped
    data = jax.device_get(jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), count)).data)
    noise, rows = env.task.reset_noise, []
    for seed in range(count):
        original.reset(seed=seed)
        rows.append(np.concatenate([original.data.qpos, original.data.qvel]))
    ours, theirs = np.concatenate([data.qpos, data.qvel], axis=1), np.array(rows)
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=6 * noise / np.sqrt(count))
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.06)
    center = np.concatenate([env.init_qpos, np.zeros(env.model.nv)])
    ours, theirs = np.abs(ours - center).max(0), np.abs(theirs - center).max(0)
    uniform = theirs <= noise
    assert uniform.sum() == (env.model.nq if env.task.gaussian_velocity else len(center))
    assert (ours[uniform] <= noise + 1e-6).all() and (ours[uniform] > 0.99 * noise).all()
    assert (ours[~uniform] > 3 * noise).all()

def test_humanoids_solver_is_near():
    """Newton's method, which MJX has, and Gymnasium's PGS come to the same accelerations, in contact as well."""
    seen, model, ends = record("Humanoid"), ppo_mjx.load_model(ppo_mjx.TASKS["Humanoid"]), []
    for solver in mujoco.mjtSolver.mjSOL_PGS, mujoco.mjtSolver.mjSOL_NEWTON:
        model.opt.solver, data, path = solver, mujoco.MjData(model), []
        for start in np.ndindex(WORLDS, STEPS // 5):
            moment = (start[0], 5 * start[1])
            data.qpos, data.qvel, data.qacc_warmstart = seen.qpos[moment], seen.qvel[moment], seen.warmstart[moment]
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
        assert touching >= WORLDS // 4
        assert task_id == "HalfCheetah" or seen.terminated.any(axis=1).sum() >= WORLDS // 2

@pytest.mark.parametrize("task_id", TASK_IDS)
def test_exact_step_equals_gymnasium_in_float64(task_id):
    """One step of the exact physics is Gymnasium's: observation, reward and termination."""
    seen, state = record(task_id), one_step(task_id, "exact", True)
    assert state.obs.dtype == np.float64
    np.testing.assert_array_equal(state.done > 0, seen.terminated[MOMENT])
    if task_id != "Humanoid":
        np.testing.assert_allclose(state.obs, seen.obs[MOMENT], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(state.reward, seen.reward[MOMENT], rtol=1e-6, atol=1e-6)
        return
    # Where its parts strike each other the contacts' last digits differ, which stiffness magnifies. Observed: 1e-13 in
    # most worlds, in the others up to 3e-4 rad/s and 0.03 N of up to 3300 N.
    error, wrenches = np.abs(state.obs - seen.obs[MOMENT]), slice(270, None)
    assert np.median(error.max(axis=1)) < 1e-9 and np.delete(error, wrenches, axis=1).max() < 2e-3
    assert error.max() < 1e-4 * np.abs(seen.obs[MOMENT][:, wrenches]).max()
    np.testing.assert_allclose(state.reward, seen.reward[MOMENT], atol=1e-4)

@pytest.mark.parametrize("task_id", ["HalfCheetah", "Hopper", "Walker2d"])
def test_exact_step_equals_gymnasium_in_float32(task_id):
    """In single precision, a step is Gymnasium's but for rounding, which stiff contacts magnify."""
    seen, state = record(task_id), one_step(task_id, "exact", False)
    # Observed: 5e-5 for velocities of up to 20 rad/s. The bound leaves room for another order of the same sums.
    np.testing.assert_allclose(state.obs, seen.obs[MOMENT], atol=5e-4)
    np.testing.assert_allclose(state.reward, seen.reward[MOMENT], atol=5e-5)
    np.testing.assert_array_equal(state.done > 0, seen.terminated[MOMENT])

@functools.cache
def long_rollout(task_id: str):
    """MJX's observations [STEPS, WORLDS, O] and terminations, by the recorded actions from the recorded starts."""
    seen, (_, step) = record(task_id), compiled_step(task_id, "exact", True)
    inputs, obs, done = (seen.qpos[:, 0], seen.qvel[:, 0], seen.warmstart[:, 0], seen.x[:, 0]), [], []
    for t in range(STEPS):
        state = step(*inputs, seen.action[:, t])
        inputs = (state.data.qpos, state.data.qvel, state.data.qacc_warmstart, state.info["x"])
        obs.append(state.obs)
        done.append(state.done > 0)
    return np.array(obs), np.array(done)

@pytest.mark.parametrize(("task_id", "most"), [
    ("HalfCheetah", 1e-4), ("Hopper", 1e-4), ("Walker2d", 1e-4), ("Ant", 2e-3)])
def test_fifty_exact_steps_follow_gymnasium(task_id, most):
    """Errors do not build up over 50 steps of the exact physics in double precision. Humanoid is left out: its parts
    strike each other while it falls, and after that it is chaos."""
    error = np.abs(long_rollout(task_id)[0] - record(task_id).obs.swapaxes(0, 1)).max(axis=(0, 2))  # of each episode
    assert np.median(error) < 1e-6 and error.max() < most  # contacts magnify the solvers' last digits in some episodes

@pytest.mark.parametrize("task_id", ["Hopper", "Walker2d", "Ant", "Humanoid"])
def test_terminates_on_gymnasiums_step(task_id):
    """Each episode ends on the same step as Gymnasium's."""
    ours, theirs = long_rollout(task_id)[1].T, record(task_id).terminated
    np.testing.assert_array_equal(ours.argmax(axis=1), theirs.argmax(axis=1))
    np.testing.assert_array_equal(ours.any(axis=1), theirs.any(axis=1))

@pytest.mark.parametrize(("task_id", "median", "most"), [
    ("HalfCheetah", 1e-6, 2e-5), ("Hopper", 1e-5, 1e-3), ("Walker2d", 5e-4, 2e-2), ("Ant", 0.08, 0.25),
    ("Humanoid", 2.5e-3, 0.2)])
def test_fast_step_stays_close_to_gymnasium(task_id, median, most):
    """The fast physics is an approximation: positions after one step are close, mostly very close."""
    seen, state = record(task_id), one_step(task_id, "fast", False)
    error = np.abs(state.data.qpos - seen.next_qpos[MOMENT]).max(axis=1)
    assert np.median(error) < median and error.max() < most  # m or rad; about five times what is observed

@pytest.mark.parametrize("n", [1, 6, 9])
def test_cholesky_equals_numpy(n):
    """What MJX solves by Cholesky while `our_algebra` holds is solved as NumPy does: many systems, in blocks and a
    rest, a few, and one without vmap; a matrix for all, too."""
    rng = np.random.default_rng(n)
    root, vectors = rng.standard_normal((80, n, n)), rng.standard_normal((80, n))
    matrices = root @ root.swapaxes(1, 2) + np.eye(n)
    expected = np.linalg.solve(matrices, vectors[..., None])[..., 0]
    def solve(matrix, vector):
        with ppo_mjx.our_algebra(constraints=False):
            return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), vector)
    with jax.enable_x64(True):
        batch = jax.jit(jax.vmap(solve))(matrices, vectors)
        few = jax.jit(jax.vmap(solve))(matrices[:5], vectors[:5])
        alone = solve(jnp.asarray(matrices[3]), jnp.asarray(vectors[3]))
        shared = jax.vmap(solve, in_axes=(None, 0))(matrices[3], vectors)
    np.testing.assert_allclose(batch, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(few, expected[:5], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(alone, expected[3], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(shared, np.linalg.solve(matrices[3], vectors.T).T, rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize("kind", ["equality", "dry friction", "elliptic cones", "none of them"])
def test_solver_knows_what_it_cannot_solve(kind):
    """Constraints that are not one-sided go to MJX's own solver, to the bit; all others come out as by MJX's."""
    option = 'cone="elliptic"' if kind == "elliptic cones" else ""
    friction = 'frictionloss="2"' if kind == "dry friction" else ""
    tied = '<equality><joint joint1="a" joint2="b"/></equality>' if kind == "equality" else ""
    model = mujoco.MjModel.from_xml_string(f"""<mujoco><option {option} iterations="30" ls_iterations="30"/><worldbody>
      <geom type="plane" size="5 5 1"/><body pos="0 0 .09"><freejoint/><geom size=".1"/></body>
      <body pos="0 0 1"><joint name="a" axis="0 1 0" {friction}/><geom type="capsule" fromto="0 0 0 .3 0 0" size=".02"/>
      <body pos=".3 0 0"><joint name="b" axis="0 1 0" {friction}/>
      <geom type="capsule" fromto="0 0 0 .3 0 0" size=".02"/></body></body></worldbody>{tied}</mujoco>""")
    model = mjx.put_model(model, impl="jax")
    data = mjx.make_data(model).replace(qvel=0.5 * jnp.arange(8.0) - 1)
    theirs = jax.jit(lambda data: mjx.forward(model, data).qacc)(data)
    with mock.patch.object(ppo_mjx.solver, "solve", ppo_mjx.solve_constraints):
        ours = jax.jit(lambda data: mjx.forward(model, data).qacc)(data)
    if kind == "none of them":
        assert (ours != theirs).any()  # it is another solver
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())
    else:
        np.testing.assert_array_equal(ours, theirs)

@pytest.mark.parametrize("task_id", TASK_IDS)
def test_c_mujoco_env_equals_gymnasium(task_id):
    """Each of 100 random steps of CMujocoEnv is Gymnasium's from the same state."""
    ours, theirs = ppo_mjx.CMujocoEnv(ppo_mjx.Env(task_id)), gymnasium.make(task_id + "-v5").unwrapped
    ours.reset(seed=0)
    theirs.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(100):  # from the same state each: contacts would magnify the models' last bits from step to step
        mujoco.mj_forward(ours.model, ours.data)  # as Gymnasium's set_state does
        ours.observe()
        theirs.set_state(ours.data.qpos, ours.data.qvel)
        theirs.data.qacc_warmstart = ours.data.qacc_warmstart
        action = rng.uniform(-1, 1, theirs.action_space.shape)
        for mine, other in zip(ours.step(action)[:4], theirs.step(action)[:4], strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize("task_id", TASK_IDS)
def test_reset_observation_equals_gymnasium(task_id):
    """What an episode begins with, MJX's and C MuJoCo's: inertias and velocities of bodies too, no forces yet."""
    ours, theirs = ppo_mjx.Env(task_id), gymnasium.make(task_id + "-v5").unwrapped
    original = ppo_mjx.CMujocoEnv(ours)
    for seed in range(3):
        state = jax.jit(ours.reset)(jax.random.key(seed))
        obs, _ = original.reset(seed)
        theirs.reset(seed=0)
        theirs.set_state(original.data.qpos, original.data.qvel)
        np.testing.assert_allclose(obs, theirs._get_obs(), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(state.obs, obs, rtol=1e-5, atol=1e-5)
        assert state.obs.shape == theirs.observation_space.shape and abs(float(state.info["x"]) - original.x) < 1e-6

def test_c_mujoco_env_truncates_and_repeats():
    """CMujocoEnv cuts an episode at the time limit only, and one seed starts one episode."""
    env = ppo_mjx.CMujocoEnv(ppo_mjx.Env("HalfCheetah"))
    np.testing.assert_array_equal(env.reset(seed=3)[0], env.reset(seed=3)[0])
    assert not np.array_equal(env.reset(seed=3)[0], env.reset(seed=4)[0])
    assert [env.step(np.zeros(6))[3] for _ in range(1000)] == 999 * [False] + [True]

def test_step_is_pure_and_vmap_is_a_loop():
    """Same input, same output; a step alone and without jit is the jitted step of many worlds."""
    env, step = compiled_step("Hopper", "fast", False)
    seen = record("Hopper")
    inputs = (seen.qpos[:, 20], seen.qvel[:, 20], seen.warmstart[:, 20], seen.x[:, 20], seen.action[:, 20])
    first, second = step(*inputs), step(*inputs)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    qpos, qvel, warmstart, x, action = (jnp.asarray(x[7], jnp.float32) for x in inputs)
    start = jax.jit(env.reset)(jax.random.key(0))
    start = start.replace(data=ppo_mjx.Physics(qpos, qvel, warmstart), info=start.info | {"x": x})
    alone, batch = env.step(start, action), jax.tree.map(lambda x: x[7], first)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), alone, batch)

def test_reset_follows_its_key(hopper):
    """The same key starts the same episode, another key another one."""
    first, again, other = (jax.jit(hopper.reset)(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.data.qpos != other.data.qpos).all() and (first.data.qvel != other.data.qvel).all()

def test_broken_world_ends_its_episode():
    """A world that is not finite or too fast terminates, earns nothing and shows its last observation."""
    _, step = compiled_step("Hopper", "fast", False)
    seen = record("Hopper")
    inputs = [x[:, 0].copy() for x in (seen.qpos, seen.qvel, seen.warmstart, seen.x, seen.action)]
    inputs[0][0, 1], inputs[1][1, 0], inputs[1][2, 0] = np.nan, np.nan, 1e4
    state = step(*inputs)
    assert state.info["broken"].tolist() == 3 * [True] + (WORLDS - 3) * [False]
    assert (state.done[:3] == 1).all() and (state.reward[:3] == 0).all()
    assert not state.done[3:].any() and (state.reward[3:] != 0).all()
    keys = jax.random.split(jax.random.key(0), WORLDS)  # as in compiled_step
    reset = jax.jit(jax.vmap(ppo_mjx.Env("Hopper").reset))(keys)
    np.testing.assert_allclose(state.obs[:3], reset.obs[:3], rtol=1e-6)
