"""The fast physics: model, steps, solver; and what every step promises, tried on it."""

from unittest import mock

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from mujoco import mjx
from recordings import MOMENT, TASK_IDS, WORLDS, compiled_step, one_step, record

import ppo_mjx

FEET = dict.fromkeys(TASK_IDS, "foot") | {"HalfCheetah": "bfoot", "Ant": "ankle"}

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

@pytest.mark.parametrize(("task_id", "median", "most"), [
    ("HalfCheetah", 1e-6, 2e-5), ("Hopper", 1e-5, 1e-3), ("Walker2d", 5e-4, 2e-2), ("Ant", 0.08, 0.25),
    ("Humanoid", 2.5e-3, 0.2)])
def test_fast_step_stays_close_to_gymnasium(task_id, median, most):
    """The fast physics is an approximation: positions after one step are close, mostly very close."""
    seen, state = record(task_id), one_step(task_id, "fast", False)
    error = np.abs(state.data.qpos - seen.next_qpos[MOMENT]).max(axis=1)
    assert np.median(error) < median and error.max() < most  # m or rad; about five times what is observed

def test_rotate_is_c_mujocos():
    """A vector by a unit quaternion, worlds first, as MuJoCo turns it."""
    random = np.random.default_rng(0)
    vec, quat = random.standard_normal((50, 3)), random.standard_normal((50, 4))
    quat /= np.linalg.norm(quat, axis=1, keepdims=True)
    wanted = np.zeros((50, 3))
    for i in range(50):
        mujoco.mju_rotVecQuat(wanted[i], vec[i], quat[i])
    np.testing.assert_allclose(jax.vmap(ppo_mjx.rotate)(vec, quat), wanted, atol=2e-6)

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
