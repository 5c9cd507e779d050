"""Robots as people bring them: each model of tests/robots/ in a row of its own, and models that cannot work."""

import dataclasses
import functools
from pathlib import Path
from unittest import mock

import jax
import mujoco
import numpy as np
import pytest
from quick import QUICK, quick_kernels

import ppo_mjx

HERE = Path(__file__).parent
ROW = ppo_mjx.Task(mjcf="", frame_skip=2, first_observed=0, time_limit=20)
FIELDS = {
    "imu": {"sensed": (("sensordata", 0),)},
    "lengths": {"sensed": (("ten_length", 0), ("actuator_length", 0), ("ten_velocity", 0))},
    "mocap": {"sensed": (("mocap_pos", 0), ("site_xpos", 0))},
    "quad_pos": {"servo_offset": 0.3},
    "flywheel": {"max_speed": 1000.0},
}
# All of tests/robots/ but unlimited.xml, which cannot work.
NAMES = sorted(file.stem for file in (HERE / "robots").glob("*.xml") if file.stem != "unlimited")
# What training sees of a robot: states of actuators, sensors, a body that no joint moves, servos.
TRAINED = ["filter", "imu", "mocap", "quad_pos"]
TRAINED[1:] = [pytest.param(name, marks=pytest.mark.slow) for name in TRAINED[1:]]
# The largest, and those that move as others do: what is theirs is tested below.
SLOW = {"dense_contacts", "double_pole", "elliptic", "flywheel", "lengths", "mesh", "mixed_range"}
SLOW |= {
    "gripper",
    "mocap",
    "no_camera",
    "quad_inherit",
    "quad_pos",
    "sparse_flag",
    "swimmer_euler",
}
TOUCHING = {"dense_contacts", "elliptic", "imu", "lengths", "quad_inherit", "quad_pos"}
WORLDS = 4


def row(name: str, **changes) -> ppo_mjx.Task:
    """A task row for a model of tests/robots/, by a path relative to the script."""
    mjcf = f"tests/robots/{name}.xml"
    if name.startswith("quad"):  # its 4 iterations are too few: two solvers would end apart
        mjcf = (HERE / "robots" / f"{name}.xml").read_text()
        mjcf = mjcf.replace('iterations="4" ls_iterations="8"', "")
    return dataclasses.replace(ROW, mjcf=mjcf, **FIELDS.get(name, {}) | changes)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """As users have them, test_onekernel_models.py compiles kernels of these robots, and test_env.py Gymnasium's."""
    quick_kernels(monkeypatch)


@pytest.fixture(autouse=True)
def rows():
    """The rows in the script's table. Tests may change them."""
    with mock.patch.dict(ppo_mjx.TASKS, {name: row(name) for name in NAMES}):
        yield


def small_args(name: str) -> ppo_mjx.Args:
    return ppo_mjx.Args(
        env_id=name,
        num_envs=WORLDS,
        num_steps=4,
        num_minibatches=1,
        update_epochs=1,
        hidden_sizes=(8,),
        eval_episodes=2,
    )


@functools.cache
def make_robot(name: str):
    """The environment, and its compiled reset and step of WORLDS worlds."""
    env = ppo_mjx.Env(small_args(name))
    reset = jax.jit(jax.vmap(ppo_mjx.kernel(env.reset)), compiler_options=QUICK)
    step = jax.jit(jax.vmap(ppo_mjx.kernel(env.step)), compiler_options=QUICK)
    return env, reset, step


def make_keys() -> jax.Array:
    return jax.vmap(jax.random.key)(np.arange(WORLDS))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NAMES]
)
def test_robot_moves_as_in_c_mujoco(name):
    """Observations at the reset and after two steps of random actions, and rewards, are C MuJoCo's."""
    env, reset, step = make_robot(name)
    original = ppo_mjx.CMujocoEnv(env)
    random = np.random.default_rng(0)
    actions = random.uniform(-1, 1, (2, WORLDS, env.action_size)).astype(np.float32)
    controls = np.asarray(ppo_mjx.scale_action(env, actions))

    states = [reset(make_keys())]
    for ctrl in controls:
        states.append(step(states[-1], ctrl))
    errors = np.zeros(WORLDS)
    for world in range(WORLDS):
        obs, _ = original.reset(world)
        np.testing.assert_allclose(states[0].obs[world], obs, rtol=1e-4, atol=1e-4)
        for t in range(2):
            obs, reward, terminated, _, _ = original.step(controls[t, world])
            ours = states[t + 1]
            error = np.abs(ours.obs[world] - obs) / (1 + np.abs(obs))
            errors[world] = max(errors[world], error.max(), abs(ours.reward[world] - reward))
            assert (ours.data.act is None) == (original.model.na == 0)
            if ours.data.act is not None:
                np.testing.assert_allclose(ours.data.act[world], original.data.act, atol=1e-5)
            assert not terminated and not ours.info["broken"][world]
    # Where a contact begins or ends between two roundings, a world goes its own way.
    worst = np.median(errors) if name in TOUCHING else errors.max()
    assert worst < 1e-3


@pytest.mark.parametrize("name", TRAINED)
def test_robot_trains(name, make_mesh):
    """Two iterations: the networks change and stay finite, and no world breaks."""
    env, *_ = make_robot(name)
    args = small_args(name)
    init = jax.jit(ppo_mjx.init_train_state, static_argnames=("args", "env"))
    init = init.lower(args, env, jax.random.key(0)).compile(compiler_options=QUICK)
    iterate = ppo_mjx.train_iteration.lower(args, env, make_mesh(1), init.out_info)
    iterate = iterate.compile(compiler_options=QUICK)

    state = init(jax.random.key(0))
    before = jax.device_get(state.learner.params)
    for _ in range(2):
        state, metrics = iterate(state)
    after = jax.device_get(state.learner.params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    moved = jax.tree.map(lambda old, new: (old != new).any(), before, after)
    assert all(jax.tree.leaves(moved))
    assert metrics["charts/nan_resets"] == 0


# ---- What each of them is there for -----------------------------------------------------------------


def test_actions_are_mapped_to_each_actuators_range():
    env, *_ = make_robot("mixed_range")
    for action, ctrl in (
        ([1, 1], [3, 0.5]),
        ([-1, -1], [-3, -0.5]),
        ([0, 0.5], [0, 0.25]),
        ([9, 0], [3, 0]),
    ):
        np.testing.assert_allclose(ppo_mjx.scale_action(env, np.float32(action)), ctrl, rtol=1e-6)

    env, *_ = make_robot("quad_inherit")
    for action, end in (-1, 0), (1, 1):
        ctrl = ppo_mjx.scale_action(env, np.full(12, action, np.float32))
        model = ppo_mjx.load_model(env.task)
        np.testing.assert_allclose(ctrl, model.jnt_range[1:, end], rtol=1e-5)


def test_saved_policy_acts_in_each_actuators_range():
    """What NumPy makes of policy.npz are the controls, those of the rollout."""
    env, *_ = make_robot("quad_inherit")
    size = env.observation_size
    learner = mock.Mock(params={"actor": {"params": {"Dense_0": {
        "kernel": np.zeros((size, 12), np.float32), "bias": np.linspace(-2, 2, 12, dtype=np.float32),
    }}}})  # fmt: skip
    learner.obs_stats = ppo_mjx.start_stats((size,))
    policy = ppo_mjx.export_policy(env, learner)
    _, ctrl = ppo_mjx.act(policy, (), np.zeros(size))
    expected = ppo_mjx.scale_action(env, np.linspace(-2, 2, 12, dtype=np.float32))
    np.testing.assert_allclose(ctrl, expected, rtol=1e-6)


def test_servos_can_be_moved_from_the_standing_pose():
    """By servo_offset from the keyframe's ctrl; the file tells none, so those that hold its angles."""
    env, *_ = make_robot("quad_pos")
    pose = np.tile([0, 0.75, -1.5], 4)
    for action in 0, 1, -0.5:
        ctrl = ppo_mjx.scale_action(env, np.full(12, action, np.float32))
        np.testing.assert_allclose(ctrl, pose + 0.3 * action, rtol=1e-5, atol=1e-6)

    model = ppo_mjx.load_model(env.task)
    model.key_ctrl[:] = 0.1  # but if it tells them, they hold
    data = mujoco.MjData(model)
    ppo_mjx.reset_data(env.task, model, data)
    mujoco.mj_forward(model, data)
    np.testing.assert_allclose(ppo_mjx.control_range(env.task, model, data)[1], 0.1)


def test_neutral_action_costs_nothing():
    """The control cost counts from the middle of the range, or from the standing pose."""
    env, reset, step = make_robot("quad_inherit")
    start = reset(make_keys())
    idle = step(start, np.tile(env.action_bias, (WORLDS, 1)).astype(np.float32))
    assert (np.abs(idle.metrics["reward_ctrl"]) < 1e-12).all()
    full = step(start, np.tile(env.action_bias + env.action_scale, (WORLDS, 1)).astype(np.float32))
    cost = env.task.ctrl_cost * np.square(env.action_scale).sum()
    np.testing.assert_allclose(full.metrics["reward_ctrl"], -cost, rtol=1e-5)


def test_episode_starts_from_the_keyframe():
    env, reset, _ = make_robot("quad_pos")
    home = ppo_mjx.load_model(env.task).key("home").qpos
    assert (np.abs(reset(make_keys()).data.qpos - home) <= env.task.reset_noise + 1e-6).all()


def test_keyframe_by_name_by_order_and_none():
    model = mujoco.MjModel.from_xml_string("""<mujoco><worldbody>
      <body name="goal" mocap="true"/>
      <body><joint/><geom size=".1"/></body></worldbody>
      <keyframe><key qpos=".1" qvel=".2" mpos="1 2 3"/><key name="far" qpos=".5"/></keyframe></mujoco>""")
    data = mujoco.MjData(model)
    for keyframe, qpos in ("home", 0.1), ("far", 0.5), (None, 0.0):
        ppo_mjx.reset_data(dataclasses.replace(ROW, keyframe=keyframe), model, data)
        assert data.qpos == qpos
    ppo_mjx.reset_data(ROW, model, data)
    assert data.qvel == 0.2 and data.mocap_pos.tolist() == [[1, 2, 3]]
    with pytest.raises(SystemExit):
        ppo_mjx.reset_data(dataclasses.replace(ROW, keyframe="fra"), model, data)


def test_start_out_of_range_or_under_the_floor_is_told():
    def told(**changes):
        task = row("quad_pos", **changes)
        return " | ".join(ppo_mjx.remarks(task, ppo_mjx.load_model(task)))

    assert "joint" not in told()
    knees = "joint fl_knee starts at 0, outside of -2.4 to -0.6 (and 3 more)"
    assert knees in told(keyframe=None)
    assert "m deep in geom floor" in told(keyframe=None)
    assert "each episode ends at once" in told(healthy_z=(0.5, 1.0), first_observed=2)
    assert "each episode" not in told(healthy_z=(0.2, 1.0), first_observed=2)
    assert "from keyframe home" in told() and "from its own pose" in told(keyframe=None)
    assert "max_speed 200" in told() and "healthy_z (0.2, 1.0)" in told(healthy_z=(0.2, 1.0))


def test_bound_of_speed_is_the_tasks():
    """A wheel of 400 rad/s is sane if the row says so, and by default broken."""
    env, reset, step = make_robot("flywheel")
    state = reset(make_keys())
    qvel = np.array(state.data.qvel)
    qvel[0, 1] = 400.0
    qvel[1, 1] = 1100.0
    state = state.replace(data=state.data.replace(qvel=qvel))
    broken = step(state, np.zeros((WORLDS, 1), np.float32)).info["broken"]
    assert broken.tolist() == [False, True, False, False]
    assert ROW.max_speed == 200.0


def test_options_of_the_model_hold():
    env, *_ = make_robot("elliptic")
    options = env.model.opt
    assert options.cone == mujoco.mjtCone.mjCONE_ELLIPTIC
    assert (options.iterations, options.ls_iterations) == (100, 50)
    assert (float(options.impratio), round(float(options.timestep), 6)) == (100.0, 0.005)

    model = ppo_mjx.load_model(ppo_mjx.TASKS["Humanoid"])
    assert "PGS" in ppo_mjx.remarks(ppo_mjx.TASKS["Humanoid"], model)[0]
    conjugate = ppo_mjx.load_model(env.task)
    conjugate.opt.solver = mujoco.mjtSolver.mjSOL_CG
    with mock.patch.object(ppo_mjx, "load_model", lambda task: conjugate):
        assert ppo_mjx.Env(small_args("elliptic")).model.opt.solver == mujoco.mjtSolver.mjSOL_CG


def test_meshes_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ppo_mjx.load_model(row("mesh")).nmesh == 1
    absolute = dataclasses.replace(ROW, mjcf=str(HERE / "robots" / "mesh.xml"))
    assert ppo_mjx.load_model(absolute).nmesh == 1
    text = (HERE / "robots" / "mesh.xml").read_text()
    inline = text.replace('meshdir="assets"', 'meshdir="tests/robots/assets"')
    assert ppo_mjx.load_model(dataclasses.replace(ROW, mjcf=inline)).nmesh == 1


def test_camera_follows_where_the_model_has_none():
    camera = ppo_mjx.make_camera(ppo_mjx.load_model(row("no_camera")))
    assert (camera.type, camera.trackbodyid) == (mujoco.mjtCamera.mjCAMERA_TRACKING, 1)
    assert ppo_mjx.make_camera(ppo_mjx.load_model(row("quad_pos"))) == 0


def test_gymnasiums_name_is_not_gymnasiums_task(monkeypatch):
    """Only the same model and observation are judged in Gymnasium's environment."""
    monkeypatch.setattr(ppo_mjx, "kernel", lambda function: function)  # of which none runs here
    reacher = ppo_mjx.TASKS["Reacher"]
    args = small_args("Reacher")
    assert ppo_mjx.make_gymnasium(ppo_mjx.Env(args)).spec.id == "Reacher-v5"

    class Blind(ppo_mjx.Reacher):
        def observe(self, now, xp=ppo_mjx.jnp):
            return super().observe(now, xp)[:-2]

    class Scaled(ppo_mjx.Reacher):
        def observe(self, now, xp=ppo_mjx.jnp):
            return 2 * super().observe(now, xp)

    fields = vars(reacher)
    for other in row("mixed_range"), Blind(**fields), Scaled(**fields):
        with mock.patch.dict(ppo_mjx.TASKS, {"Reacher": other}):
            assert ppo_mjx.make_gymnasium(ppo_mjx.Env(args)) is None


# ---- What cannot work: one line, before anything is compiled ----------------------------------------

ARM = """<mujoco>
  <option OPTIONS/>
  <worldbody>
    <geom name="post" type="box" size=".1 .1 .1" pos="0 0 -1"/>
    <body name="arm"><joint name="a" axis="0 1 0"/><geom name="rod" type="GEOM" size=".05 .2" condim="1"/></body>
  </worldbody>
  <actuator>ACTUATOR</actuator>
</mujoco>"""
MOTOR = '<motor name="m" joint="a" ctrlrange="-1 1"/>'
FAULTS = {
    "no range": ({"ACTUATOR": '<motor joint="a"/>'}, ["actuator 0 (of joint a)", "ctrlrange"]),
    "no actuators": ({"ACTUATOR": ""}, ["no actuators"]),
    "nothing moves": ({"ACTUATOR": MOTOR.replace("/>", ' gear="0"/>')}, ["no action moves"]),
    "dynamics": (
        {"ACTUATOR": '<general name="m" joint="a" ctrlrange="-1 1" dyntype="user" actdim="1"/>'},
        ["actuator m", "dyntype user", "filterexact"],
    ),
    "transmission": (
        {"ACTUATOR": '<adhesion name="m" body="arm" ctrlrange="0 1" gain="1"/>'},
        ["actuator m", "transmission body"],
    ),
    "delay": (
        {"ACTUATOR": '<motor name="m" joint="a" ctrlrange="-1 1" delay=".02" nsample="9"/>'},
        ["actuator m", "delays"],
    ),
    "integrator": ({"OPTIONS": 'integrator="implicit"'}, ["IMPLICIT", "implicitfast"]),
    "fluid": ({"OPTIONS": 'integrator="implicitfast" density="1"'}, ["implicitfast", "fluid"]),
    "collision": ({"GEOM": "cylinder"}, ["geom post (box)", "geom rod (cylinder)", "contype"]),
    "friction": (
        {"OPTIONS": 'cone="elliptic"', 'type="box"': 'type="box" condim="1"'},
        ["geom post", "geom rod", "condim"],
    ),
    "flag": ({"<worldbody>": '<option><flag fwdinv="enable"/></option><worldbody>'}, ["MJX"]),
    "XML": ({"<worldbody>": "<worldbody><geom>"}, ["XML parse error"]),
    "target": ({"ACTUATOR": '<motor joint="b" ctrlrange="-1 1"/>'}, ["'b'"]),
}


def refusal(task: ppo_mjx.Task, capsys) -> str:
    """The one line by which an environment of this row is refused."""
    compiled = AssertionError("something was compiled")
    with mock.patch.dict(ppo_mjx.TASKS, {"Hopper": task}):
        with mock.patch.object(ppo_mjx, "kernel", side_effect=compiled):
            with pytest.raises(SystemExit) as stop:
                ppo_mjx.Env(ppo_mjx.Args(env_id="Hopper"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("fault", FAULTS)
def test_model_that_cannot_work_is_refused_by_name(fault, capsys):
    changes, words = FAULTS[fault]
    mjcf = ARM
    for old, new in (changes | {"OPTIONS": changes.get("OPTIONS", "")}).items():
        mjcf = mjcf.replace(old, new)
    mjcf = mjcf.replace("GEOM", "capsule").replace("ACTUATOR", MOTOR)
    error = refusal(dataclasses.replace(ROW, mjcf=mjcf), capsys)
    assert all(word in error for word in words), error


def test_model_as_it_is_has_no_fault():
    mjcf = ARM.replace("OPTIONS", "").replace("GEOM", "capsule").replace("ACTUATOR", MOTOR)
    task = dataclasses.replace(ROW, mjcf=mjcf)
    assert ppo_mjx.check_model(task, ppo_mjx.load_model(task)) == []


def test_row_that_does_not_fit_its_model_is_refused(capsys):
    assert "unlimited" not in ppo_mjx.TASKS
    assert "actuator 0 (of joint a)" in refusal(row("unlimited"), capsys)
    assert "nowhere.xml" in refusal(dataclasses.replace(ROW, mjcf="robots/nowhere.xml"), capsys)
    assert "keyframe fra" in refusal(row("quad_pos", keyframe="fra"), capsys)
    assert "first_observed 1" in refusal(row("no_camera", first_observed=1), capsys)
    assert "no field xpso" in refusal(row("imu", sensed=(("xpso", 0),)), capsys)
    assert "unseen: cfrc_ext" in refusal(row("imu", unseen=("cfrc_ext",)), capsys)
    assert "has the shape (3, 3)" in refusal(row("imu", position=("xpos", 3, 0)), capsys)
    accelerometer = ARM.replace(
        "<actuator>",
        """<sensor>
      <jointactuatorfrc name="felt" joint="a"/></sensor><actuator>""",
    )
    mjcf = accelerometer.replace('condim="1"', 'contype="0" conaffinity="0"')
    mjcf = mjcf.replace("OPTIONS", "").replace("GEOM", "capsule").replace("ACTUATOR", MOTOR)
    task = dataclasses.replace(ROW, mjcf=mjcf, sensed=(("sensordata", 0),))
    assert "sensor felt" in refusal(task, capsys)


def test_robot_that_nothing_moves_fails_the_smoke_test(capsys, tmp_path):
    mjcf = ARM.replace("OPTIONS", "").replace("GEOM", "capsule")
    mjcf = mjcf.replace("ACTUATOR", MOTOR.replace("/>", ' gear="0"/>'))
    with mock.patch.dict(ppo_mjx.TASKS, {"Hopper": dataclasses.replace(ROW, mjcf=mjcf)}):
        with pytest.raises(SystemExit) as stop:
            ppo_mjx.smoke(ppo_mjx.Args(env_id="Hopper", num_devices=1))
    assert stop.value.code == 2 and "no action moves" in capsys.readouterr().err
