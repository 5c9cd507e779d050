"""The rows of ROBOTS: their numbers against the sources', their symmetry, and a short run of each."""

import dataclasses
import json
import math
import re
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from quick import quick_jit, quick_kernels

import ppo_mjx_unitree as unitree

NAMES = tuple(unitree.ROBOTS)
WITH_CLOCK = tuple(name for name in NAMES if unitree.ROBOTS[name].clock)
SOURCES = {
    path.stem: json.loads(path.read_text())
    for path in Path(__file__).with_name("robots").glob("*.json")
}
GAIT_PERIOD = {"g1_29dof": 0.8, "h1": 0.8, "h1_2": 0.8, "go2": 0.48}  # s
ACTOR_SIZE = {"g1": 47, "g1_29dof": 98, "h1": 41, "h1_2": 47, "go2": 47, "go2_no_clock": 45}


def hold_arms(robot: unitree.Robot) -> unitree.Robot:
    """The robot whose actions move its legs alone."""
    joints = {
        name: dataclasses.replace(
            joint, held="waist" in name or "shoulder" in name or "elbow" in name or "wrist" in name
        )
        for name, joint in robot.joints.items()
    }
    return dataclasses.replace(robot, joints=joints)


ROBOTS = unitree.ROBOTS | {"held": hold_arms(unitree.ROBOTS["g1_29dof"])}


@pytest.mark.parametrize("name", SOURCES)
def test_rows_are_the_sources(name):
    """Default pose, gains, order of the joints, and a start above the floor."""
    robot, source = ROBOTS[name], SOURCES[name]
    words = [row["name"] for row in source["bodies"] if "axis" in row]
    words = [word.removesuffix("_link").replace("torso", "waist_pitch") for word in words]
    assert [joint.removesuffix("_joint") for joint in robot.joints] == words
    np.testing.assert_allclose(robot.joint_array("default"), source["default"])
    np.testing.assert_allclose(robot.joint_array("stiffness"), source["kp"], rtol=1e-5)
    np.testing.assert_allclose(robot.joint_array("damping"), source["kd"], rtol=1e-5)
    torques = [row["torque"] for row in source["bodies"] if "axis" in row]
    np.testing.assert_allclose(unitree.make_controller(robot).max_torque, torques)
    np.testing.assert_array_equal(
        robot.limits, [row["range"] for row in source["bodies"] if "axis" in row]
    )

    standing = source["standing_height"]
    assert robot.min_height < 0.7 * standing
    assert standing <= robot.start_height <= standing + 0.1
    assert abs(robot.target_height - standing) < 0.03
    bodies, soles = unitree.find_feet(robot, robot.model)
    assert soles.shape == (len(robot.feet), len(source["sole_centers"]))


@pytest.mark.parametrize("name", NAMES)
def test_motors_of_the_sources_largest_torque(name):
    """Servos of the MJCF file become motors: ctrl is a torque, and nothing else acts."""
    model = ROBOTS[name].model
    data = mujoco.MjData(model)
    data.qpos[7:] = ROBOTS[name].joint_array("default")
    most = model.actuator_ctrlrange[:, 1]
    data.ctrl = 0.5 * most
    mujoco.mj_forward(model, data)
    np.testing.assert_allclose(data.qfrc_actuator[6:], 0.5 * most)
    data.ctrl = -2 * most
    mujoco.mj_forward(model, data)
    np.testing.assert_allclose(data.qfrc_actuator[6:], -most)


@pytest.mark.parametrize("name", ROBOTS)
def test_what_the_networks_see(name):
    """Sizes and order of the parts; the base's velocity is the critic's alone."""
    robot = ROBOTS[name]
    joints = len(robot.joints)
    actions = 12 if name == "held" else joints
    parts = unitree.seen_parts(robot, "actor")
    order = ["rates", "gravity", "command", "angles", "speeds", "action", "clock"]
    assert list(parts) == order[: len(order) - (not robot.clock)]
    assert list(unitree.seen_parts(robot, "critic")) == ["velocity", *parts]
    size = 9 + 2 * joints + actions + 2 * robot.clock
    assert size == ACTOR_SIZE.get(name, size)
    random = np.random.default_rng(0)
    qpos, qvel = random.standard_normal(7 + joints), random.standard_normal(6 + joints)
    action = random.standard_normal(actions)
    senses = unitree.sense(robot, qpos, qvel, np.zeros(3), action, np.array(3), np)
    obs = unitree.observe(parts, senses, np)
    assert obs.shape == (size,) == unitree.noise_widths(robot, parts).shape
    np.testing.assert_allclose(obs[9 : 9 + joints], qpos[7:] - robot.joint_array("default"))
    np.testing.assert_allclose(obs[9 + joints : 9 + 2 * joints], 0.05 * qvel[6:])
    np.testing.assert_array_equal(obs[9 + 2 * joints :][:actions], action)


# ---- The loop on the robot's own computer


def turn_back(quat, vector) -> np.ndarray:
    """A vector of the world in the frame of a body with this quaternion."""
    back = np.zeros(3)
    mujoco.mju_rotVecQuat(back, vector, quat * [1, -1, -1, -1])
    return back


@pytest.mark.parametrize("name", SOURCES)
def test_loop_is_unitrees(name):
    """From the same start, the same actions lead where Unitree's loop leads, written anew by the source's numbers: PD
    torques 500 times a second, 50 times a second an action and what the actor sees, number by number."""
    robot, source = ROBOTS[name], SOURCES[name]
    default, kp, kd = (np.array(source[key], float) for key in ("default", "kp", "kd"))
    torques = np.array([row["torque"] for row in source["bodies"] if "axis" in row])
    scale = 0.25 * torques / kp if name == "g1_29dof" else 0.25  # mjlab's scale is by the motor
    period = GAIT_PERIOD[name]  # the 1e-4 below are for the source's gains, which are rounded

    original = unitree.CMujocoEnv(robot)
    original.reset(1)
    model = unitree.load_model(robot, 0.002)
    data = mujoco.MjData(model)
    data.qpos[:] = original.data.qpos
    random, command, action = (
        np.random.default_rng(0),
        np.array([0.4, -0.2, 0.3]),
        np.zeros(len(kp)),
    )
    for tick in range(25):
        clock = 2 * math.pi * (tick * 0.02 % period) / period
        rates, gravity = data.qvel[3:6], turn_back(data.qpos[3:7], np.array([0.0, 0.0, -1.0]))
        seen = [0.25 * rates, gravity, command * [2, 2, 0.25], data.qpos[7:] - default]
        seen += [0.05 * data.qvel[6:], action, [math.sin(clock), math.cos(clock)]]
        np.testing.assert_allclose(original.observe(command), np.concatenate(seen), atol=1e-4)

        action = random.uniform(-1, 1, len(kp))
        row = original.step(action)
        for _ in range(10):
            torque = kp * (default + scale * action - data.qpos[7:]) - kd * data.qvel[6:]
            data.ctrl[:] = np.clip(torque, -torques, torques)
            mujoco.mj_step(model, data)
        np.testing.assert_allclose(original.data.qpos, data.qpos, atol=1e-4)
        velocity = np.append(turn_back(data.qpos[3:7], data.qvel[:3])[:2], data.qvel[5])
        np.testing.assert_allclose(row["velocity"], velocity, atol=1e-4)


# ---- PD torques in training


def control_steps_by_hand(robot: unitree.Robot) -> dict:
    """Ten control steps, one after the other, of random actions, gains, strengths and delays, in C MuJoCo: [10, ...]
    each. The motors of the MJCF file are off, and torques by the row's numbers push its joints."""
    model = mujoco.MjModel.from_xml_path(str(unitree.MODELS / robot.mjcf))
    model.opt.timestep = 0.005
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ACTUATION
    servo = model.actuator_forcelimited == 1
    most = np.where(servo, model.actuator_forcerange[:, 1], model.actuator_ctrlrange[:, 1])
    joints = robot.joints.values()
    default, stiffness, damping = np.array(
        [(joint.default, joint.stiffness, joint.damping) for joint in joints]
    ).T
    acted = [not joint.held for joint in joints]
    reach = np.array([robot.action_scale * joint.reach for joint in joints])[acted]
    friction = model.geom_friction[model.geom_priority == 1, 0][0]  # the same for all soles

    data = mujoco.MjData(model)
    random = np.random.default_rng(0)
    data.qpos[7:] = default
    data.qvel[:] = random.normal(0, 0.5, model.nv)
    action_before = np.zeros(len(reach))
    rows = []
    for moment in range(10):
        action = random.uniform(-1, 1, len(reach))
        action *= 8 if moment in (3, 7) else 1  # some torques are beyond their limits
        factors = random.uniform(0.9, 1.1, (3, len(joints)))
        domain = dict(zip(("stiffness", "damping", "strength"), factors, strict=True))
        domain |= {"friction": friction, "payload": 0, "delay": moment % 5}
        start = {name: getattr(data, name).copy() for name in ("qpos", "qvel", "qacc_warmstart")}
        torques = []
        for substep in range(4):
            target = default.copy()
            target[acted] += reach * (action_before if substep < domain["delay"] else action)
            torque = factors[0] * stiffness * (target - data.qpos[7:])
            torque = factors[2] * (torque - factors[1] * damping * data.qvel[6:])
            torques.append(np.clip(torque, -most, most))
            data.qfrc_applied[6:] = torques[-1]
            mujoco.mj_step(model, data)
        rows.append(
            {
                "inputs": (unitree.Physics(**start), action, action_before, domain),
                "torques": np.array(torques),
                "qpos": data.qpos.copy(),
                "qvel": data.qvel.copy(),
            }
        )
        action_before = action
    by_hand = jax.tree.map(lambda *leaves: np.array(leaves), *rows)
    limited = (np.abs(by_hand["torques"]) == most)[..., acted]
    assert limited.any(axis=(0, 1)).mean() > 0.5 and limited.mean() < 0.3
    return by_hand


def train_env(name: str, monkeypatch) -> unitree.Env:
    monkeypatch.setitem(unitree.ROBOTS, name, ROBOTS[name])
    return unitree.Env(unitree.default_args(name))


@pytest.mark.parametrize("name", ROBOTS)
def test_motors_get_the_rows_pd_torques(name, monkeypatch):
    """In each physics step of Env.advance, by the randomised gains and strengths; those of the action before, until the
    new one has arrived. They move the joints. C MuJoCo stands in for MJX, whose step takes seconds to compile."""
    by_hand, env, torques = control_steps_by_hand(ROBOTS[name]), train_env(name, monkeypatch), []
    model = unitree.load_model(ROBOTS[name], 0.005, visuals=False)
    original = mujoco.MjData(model)
    given = ("qpos", "qvel", "qacc_warmstart", "ctrl")
    read = ("qpos", "qvel", "qacc_warmstart", "xpos", "cvel", "subtree_com", "geom_xpos")

    def results() -> list[np.ndarray]:
        return [np.float32(getattr(original, field)) for field in read]

    def step(*values) -> list[np.ndarray]:
        torques.append(np.array(values[-1]))
        for field, value in zip(given, values, strict=True):
            getattr(original, field)[:] = value
        mujoco.mj_step(model, original)
        return results()

    def physics_step(_, data):
        after = jax.pure_callback(step, results(), *(getattr(data, field) for field in given))
        return types.SimpleNamespace(**dict(zip(read, after, strict=True)))

    monkeypatch.setattr(unitree, "physics_step", physics_step)
    advance = quick_jit(env.advance)
    for moment in range(10):
        inputs = jax.tree.map(lambda x, moment=moment: x[moment], by_hand["inputs"])
        data, readings = jax.device_get(advance(*inputs))
        expected = by_hand["torques"][moment]
        np.testing.assert_allclose(torques[-4:], expected, atol=2e-3)
        np.testing.assert_allclose(readings["torque"], expected[-1], atol=2e-3)
        np.testing.assert_allclose(data.qpos, by_hand["qpos"][moment], atol=5e-6)
        np.testing.assert_allclose(data.qvel, by_hand["qvel"][moment], atol=5e-4)
    assert len(torques) == 40


# test_unitree.py has the G1's step. That of the Go2 without a clock is the Go2's.
@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_training_moves_as_c_mujoco_by_pd_torques(name, monkeypatch):
    """Control steps by MJX end where C MuJoCo's with torques by hand do, but for rounding in single precision, which
    contacts magnify."""
    quick_kernels(monkeypatch)
    by_hand, env = control_steps_by_hand(ROBOTS[name]), train_env(name, monkeypatch)
    data, readings = jax.jit(jax.vmap(unitree.kernel(env.advance)))(*by_hand["inputs"])
    np.testing.assert_allclose(data.qpos, by_hand["qpos"], atol=1e-5)  # observed: 2e-6
    np.testing.assert_allclose(data.qvel, by_hand["qvel"], atol=2e-3)  # observed: 4e-4
    np.testing.assert_allclose(readings["torque"], by_hand["torques"][:, -1], atol=5e-3)
    assert readings["contact"].any() and not readings["contact"].all()


# ---- Symmetry


def make_symmetric(model: mujoco.MjModel) -> None:
    """Without the real robot's small asymmetries: what is on the right becomes the left's image."""
    for i in range(1, model.nbody):
        name = model.body(i).name
        side = unitree.side_of(name)
        if side in ("right", "FR", "RR"):
            twin = model.body(unitree.OTHER_SIDE[side] + name.removeprefix(side)).id
            for field in ("body_pos", "body_ipos"):
                getattr(model, field)[i] = getattr(model, field)[twin] * [1, -1, 1]
            for field in ("body_quat", "body_iquat"):
                getattr(model, field)[i] = getattr(model, field)[twin] * [1, -1, 1, -1]
            model.body_inertia[i] = model.body_inertia[twin]
        elif side not in unitree.OTHER_SIDE:
            turn = np.zeros(9)
            mujoco.mju_quat2Mat(turn, model.body_iquat[i])
            turn = turn.reshape(3, 3)
            tensor = turn @ np.diag(model.body_inertia[i]) @ turn.T
            tensor[[0, 1, 1, 2], [1, 0, 2, 1]] = 0
            model.body_inertia[i], turn = np.linalg.eigh(tensor)
            turn[:, 0] *= np.linalg.det(turn)
            mujoco.mju_mat2Quat(model.body_iquat[i], turn.ravel())
            model.body_ipos[i, 1] = 0
            model.body_pos[i, 1] = 0
    mujoco.mj_setConst(model, mujoco.MjData(model))


@pytest.mark.parametrize("name", ROBOTS)
def test_mirrored_physics_is_physics_mirrored(name):
    """The same steps in the mirror: a robot falls to the other side, and sees it; clocks run half a
    period apart."""
    robot = ROBOTS[name]
    random = np.random.default_rng(0)
    here, there = unitree.CMujocoEnv(robot), unitree.CMujocoEnv(robot)
    for env in (here, there):
        make_symmetric(env.model)
        env.reset(0)
    there.elapsed = robot.gait_ticks // 2
    there.data.qpos[7:] = unitree.mirror_joints(robot, here.data.qpos[7:])
    here.data.qvel[:3] = [0.3, 0.5, 0.0]
    here.data.qvel[3:6] = [0.4, -0.3, 0.6]
    there.data.qvel[:3] = here.data.qvel[:3] * [1, -1, 1]
    there.data.qvel[3:6] = here.data.qvel[3:6] * [-1, 1, -1]
    for _ in range(12):
        action = random.normal(0, 0.5, len(robot.acted))
        here.step(action)
        there.step(unitree.mirror_actions(robot, action))
        position, quat = here.data.qpos[:3], here.data.qpos[3:7]
        np.testing.assert_allclose(there.data.qpos[:3], position * [1, -1, 1], atol=1e-6)
        np.testing.assert_allclose(there.data.qpos[3:7], quat * [1, -1, 1, -1], atol=1e-6)
        angles = unitree.mirror_joints(robot, here.data.qpos[7:])
        np.testing.assert_allclose(there.data.qpos[7:], angles, atol=1e-5)
        seen = here.observe((0.5, 0.3, -0.2))
        expected = unitree.mirror_observation(robot, seen, np)
        np.testing.assert_allclose(there.observe((0.5, -0.3, 0.2)), expected, atol=1e-4)
    assert abs(here.data.qpos[1]) > 0.02 and here.data.ncon


@pytest.mark.parametrize("name", ROBOTS)
def test_mirrored_twice_is_the_original(name):
    """And the default pose, the limits, the posture and the gait are their own images."""
    robot = ROBOTS[name]
    random = np.random.default_rng(0)
    size = sum(
        unitree.part_width(robot, part) for part in unitree.seen_parts(robot, "actor").values()
    )
    for mirror, width in (
        (unitree.mirror_joints, len(robot.joints)),
        (unitree.mirror_actions, len(robot.acted)),
        (unitree.mirror_observation, size),
    ):
        x = random.standard_normal((5, width))
        for xp in (np, jnp):
            named = {"xp": xp} if mirror is unitree.mirror_observation else {}
            once = mirror(robot, xp.asarray(x), **named)
            np.testing.assert_allclose(mirror(robot, once, **named), x, rtol=1e-6)
            assert not np.allclose(once, x)
    default = robot.joint_array("default")
    np.testing.assert_allclose(unitree.mirror_joints(robot, default), default)
    low, high = robot.limits.T
    images = [unitree.mirror_joints(robot, limit) for limit in (low, high)]
    np.testing.assert_allclose(np.minimum(*images), low)
    np.testing.assert_allclose(np.maximum(*images), high)

    feet = list(robot.feet)
    ticks = np.arange(robot.gait_ticks)
    stance = unitree.is_stance(robot, ticks, np)
    later = unitree.is_stance(robot, ticks + robot.gait_ticks // 2, np)
    sides = [unitree.side_of(foot) for foot in feet]
    twins = [
        feet.index(unitree.OTHER_SIDE[side] + foot.removeprefix(side))
        for side, foot in zip(sides, feet, strict=True)
    ]
    np.testing.assert_array_equal(later, stance[:, twins])


def test_a_trot_moves_diagonal_pairs():
    """Each pair of feet on a diagonal is on the floor together."""
    robot = ROBOTS["go2"]
    stance = unitree.is_stance(robot, np.arange(robot.gait_ticks), np)
    np.testing.assert_array_equal(stance[:, 0], stance[:, 3])
    np.testing.assert_array_equal(stance[:, 1], stance[:, 2])
    np.testing.assert_array_equal(stance[:, 0], ~stance[:, 1])


@pytest.mark.parametrize("name", WITH_CLOCK)
def test_stepping_motion_lifts_the_feet_in_turn(name):
    """By at least 3 cm, on an unmoved base; its mirror image is the motion half a period later."""
    robot = ROBOTS[name]
    model = robot.model
    data = mujoco.MjData(model)
    feet, _ = unitree.find_feet(robot, model)
    heights, rows = [], []
    for elapsed in range(robot.gait_ticks):
        senses = unitree.sense(
            robot,
            model.qpos0,
            np.zeros(model.nv),
            np.array([0.5, 0.2, 0.3]),
            np.zeros(len(robot.acted)),
            np.array(elapsed),
            np,
        )
        obs = unitree.observe(unitree.seen_parts(robot, "actor"), senses, np)
        rows.append(obs)
        action = np.asarray(unitree.stepping_action(robot, jnp.asarray(obs)))
        data.qpos[7:] = robot.targets(action, np)
        mujoco.mj_kinematics(model, data)
        heights.append(data.xpos[feet, 2])
    heights = np.array(heights)
    assert (np.ptp(heights, axis=0) > 0.03).all()
    apart = np.argmax(heights[:, 0]) - np.argmax(heights[:, 1])
    assert abs(abs(apart) - robot.gait_ticks / 2) <= 1
    rows = np.array(rows)
    action = unitree.stepping_action(robot, jnp.asarray(rows))
    image = unitree.stepping_action(robot, unitree.mirror_observation(robot, jnp.asarray(rows)))
    np.testing.assert_allclose(image, unitree.mirror_actions(robot, action), atol=1e-5)


# ---- Held joints, rewards and settings


def test_held_joints_keep_the_default_pose():
    """Actions move the others alone, each its own joint."""
    robot, default = ROBOTS["held"], ROBOTS["held"].joint_array("default")
    np.testing.assert_array_equal(robot.acted, np.arange(12))
    reach = robot.action_scale * robot.joint_array("reach")[:12]
    action = np.arange(1.0, 13)
    for xp in (np, jnp):
        targets = robot.targets(xp.asarray([action, -action]), xp)
        np.testing.assert_allclose(targets[:, 12:], [default[12:]] * 2, rtol=1e-6)
        np.testing.assert_allclose(targets[0, :12], default[:12] + reach * action, rtol=1e-6)
    most = unitree.make_controller(robot).max_torque[:12]
    np.testing.assert_allclose(reach, 0.25 * most / robot.joint_array("stiffness")[:12])


def motion_of(robot: unitree.Robot, **changes) -> unitree.Motion:
    """Standing still in the default pose."""
    joints, feet = len(robot.joints), len(robot.feet)
    zeros = np.zeros(joints)
    still = dict(
        command=np.zeros(3),
        height=robot.target_height,
        velocity=np.zeros(3),
        rates=np.zeros(3),
        gravity=np.array([0, 0, -1.0]),
        angles=robot.joint_array("default"),
        speeds=zeros,
        accelerations=zeros,
        torque=zeros,
        action=np.zeros(len(robot.acted)),
        action_before=np.zeros(len(robot.acted)),
        foot_height=np.zeros(feet),
        foot_velocity=np.zeros((feet, 3)),
        contact=np.full(feet, True),
        stance=np.full(feet, True),
        flight=np.zeros(feet),
        clearance=np.zeros(feet),
        capture_error=0.0,
    )
    return unitree.Motion(**{name: jnp.asarray(value) for name, value in (still | changes).items()})


@pytest.mark.parametrize("name", ROBOTS)
def test_standing_still_earns_all_there_is(name):
    """The terms are those of the row, and none is worse where the robot stands as told."""
    robot = ROBOTS[name]
    best = {
        "track_velocity": 1,
        "track_yaw": 1,
        "alive": 1,
        "gait": len(robot.feet),
        "standing_pose": 1,
    }
    terms = unitree.unweighted_terms(robot, motion_of(robot))
    assert terms.keys() == robot.weights.keys()
    for term, value in terms.items():
        assert value == pytest.approx(best.get(term, 0), abs=1e-6), term


SITUATIONS = (  # the command, and whether a step is needed to catch the robot
    ((0.5, -0.2, 0.3), True),
    ((-1.2, 0.4, -0.6), False),  # beyond 1 m/s tracking does not become easier
    ((0.0, 0.06, 0.9), False),  # up to 0.1 m/s time in the air does not count
    ((0.0, 0.0, 0.0), False),
    ((0.0, 0.0, 0.0), True),
)


def random_motions(robot: unitree.Robot) -> list[dict]:
    """Measured states, five of each situation."""
    random = np.random.default_rng(0)
    joints, actions, feet = len(robot.joints), len(robot.acted), len(robot.feet)
    default = np.array([joint.default for joint in robot.joints.values()])
    motions = []
    for command, must_step in SITUATIONS * 5:
        contact = random.random(feet) < 0.5
        told_to_stand = not any(command)
        # Near the default pose, which pays who stands; elsewhere some joints are near their limits.
        spread = 0.1 if told_to_stand else 1.0
        motions.append(
            dict(
                command=np.array(command),
                height=robot.target_height + random.normal(0, 0.05),
                velocity=[*command[:2], 0] + random.normal(0, 0.2, 3),
                rates=[0, 0, command[2]] + random.normal(0, 0.3, 3),
                gravity=random.normal(0, 0.4, 3),
                angles=default + random.normal(0, spread, joints),
                speeds=random.normal(0, 2, joints),
                accelerations=random.normal(0, 50, joints),
                torque=random.normal(0, 20, joints),
                action=random.normal(0, 1, actions),
                action_before=random.normal(0, 1, actions),
                foot_height=random.uniform(0, 0.2, feet),
                foot_velocity=random.normal(0, 0.5, (feet, 3)),
                contact=contact,
                stance=random.random(feet) < 0.5,
                flight=contact * random.uniform(0.02, 1, feet) * (random.random(feet) < 0.7),
                clearance=~contact * random.uniform(0, 0.06, feet),
                capture_error=must_step * random.uniform(0.01, 0.3),
            )
        )
    return motions


def terms_by_hand(robot: unitree.Robot, m: dict) -> dict[str, float]:
    """All terms that a robot's reward can have, of one measured state."""
    model = mujoco.MjModel.from_xml_path(str(unitree.MODELS / robot.mjcf))
    joints, feet = list(robot.joints.values()), range(len(robot.feet))
    told_to_stand = not m["command"].any()
    must_step = m["capture_error"] > 0
    keeps_still = told_to_stand and not must_step
    asked = math.hypot(*m["command"][:2])
    missed = math.hypot(*(m["command"] - m["velocity"])[:2])
    over_the_limits = bent = hips = 0.0
    off = []
    for joint, angle, (low, high) in zip(joints, m["angles"], model.jnt_range[1:], strict=True):
        margin = 0.05 * (high - low)
        over_the_limits += max(0, angle - (high - margin), low + margin - angle)
        off.append(angle - joint.default)
        bent += joint.posture * off[-1] ** 2
        hips += angle**2 if joint.upright else 0
    gait = swing = slip = lifted = air = 0.0
    for foot in feet:
        gait += 1 if m["contact"][foot] == (m["stance"][foot] or keeps_still) else -1
        if m["contact"][foot]:
            slip += sum(m["foot_velocity"][foot] ** 2)
        elif not keeps_still:
            swing += (m["foot_height"][foot] - robot.swing_height) ** 2
        lifted += min(m["clearance"][foot], 0.03)
        air += m["flight"][foot] - 0.5 if m["flight"][foot] else 0
    return {
        "track_velocity": math.exp(-(missed**2) / (0.04 + 0.21 * min(asked, 1))),
        "track_yaw": math.exp(-((m["command"][2] - m["rates"][2]) ** 2) / 0.25),
        "alive": 1,
        "gait": gait,
        "swing_height": swing,
        "stance_slip": slip,
        "vertical_velocity": m["velocity"][2] ** 2,
        "roll_pitch_rate": m["rates"][0] ** 2 + m["rates"][1] ** 2,
        "tilt": m["gravity"][0] ** 2 + m["gravity"][1] ** 2,
        "height": (m["height"] - robot.target_height) ** 2,
        "joint_acceleration": sum(m["accelerations"] ** 2),
        "joint_velocity": sum(m["speeds"] ** 2),
        "torque": sum(m["torque"] ** 2),
        "action_change": sum((m["action"] - m["action_before"]) ** 2),
        "joint_limits": over_the_limits,
        "upright_joints": hips,
        "posture": bent,
        "lifted_standing": lifted if keeps_still else 0,
        "capture": m["capture_error"] if told_to_stand else 0,
        "standing_pose": math.exp(-np.mean(np.square(off)) / 0.01) if keeps_still else 0,
        "air_time": air if asked > 0.1 else 0,
    }


@pytest.mark.parametrize("name", ROBOTS)
def test_every_term_by_hand(name):
    """Of random motions, with the row's numbers; and what the term is worth in one control step."""
    robot = ROBOTS[name]
    motions = random_motions(robot)
    by_hand = [terms_by_hand(robot, motion) for motion in motions]
    assert robot.weights.keys() <= by_hand[0].keys()  # a new term wants a line above
    batch = unitree.Motion(
        **{field: jnp.array([motion[field] for motion in motions]) for field in motions[0]}
    )
    unweighted = jax.vmap(partial(unitree.unweighted_terms, robot))(batch)
    weighted = jax.vmap(partial(unitree.reward_terms, robot))(batch)
    assert unweighted.keys() == robot.weights.keys()
    assert weighted.keys() == {f"reward_{term}" for term in robot.weights}
    for term, weight in robot.weights.items():
        expected = np.array([terms[term] for terms in by_hand])
        assert term == "alive" or len(np.unique(expected)) > 2, term
        np.testing.assert_allclose(unweighted[term], expected, rtol=2e-5, atol=1e-6, err_msg=term)
        np.testing.assert_allclose(
            weighted[f"reward_{term}"], 0.02 * weight * expected, rtol=2e-5, atol=1e-8, err_msg=term
        )


def test_air_time_and_posture_by_hand():
    """A landing is worth its time in the air beyond half a second, but not to a robot told to stand."""
    robot = ROBOTS["go2_no_clock"]
    flight = np.array([0.6, 0, 0.2, 0])
    for command, expected in (((0.2, 0, 0), 0.1 - 0.3), ((0, 0, 0.9), 0), ((0.06, 0.06, 0), 0)):
        motion = motion_of(robot, flight=flight, command=np.array(command))
        assert unitree.unweighted_terms(robot, motion)["air_time"] == pytest.approx(
            expected, abs=1e-6
        )
    robot = ROBOTS["g1_29dof"]
    # Legs, two of the waist.
    bent = robot.joint_array("default") + np.where(np.arange(29) < 14, 0.1, 0.0)
    assert unitree.unweighted_terms(robot, motion_of(robot, angles=bent))[
        "posture"
    ] == pytest.approx(0.02)


def test_flight_is_counted_from_the_last_contact():
    """The foot that lands has been in the air for the steps before, and this one."""
    robot = ROBOTS["go2"]
    env = types.SimpleNamespace(robot=robot)
    info = {
        "command": jnp.ones(3),
        "action": jnp.zeros(12),
        "elapsed": jnp.array(7),
        "airborne": jnp.array([3, 0, 5, 0]),
    }
    readings = {
        "contact": jnp.array([True, True, False, False]),
        "torque": jnp.zeros(12),
        "foot_height": jnp.zeros(4),
        "foot_velocity": jnp.zeros((4, 3)),
        "clearance": jnp.zeros(4),
        "capture_error": jnp.zeros(()),
    }
    data = unitree.Physics(
        qpos=jnp.zeros(19).at[3].set(1), qvel=jnp.zeros(18), qacc_warmstart=jnp.zeros(18)
    )
    motion = unitree.Env.describe_motion(env, info, data, data, jnp.zeros(12), readings)
    np.testing.assert_allclose(motion.flight, [0.08, 0, 0, 0])


def test_settings_of_each_robot(capsys):
    """A row's own defaults hold; without a clock there is nothing to imitate."""
    for name in NAMES:
        args = unitree.default_args(name)
        assert args.robot == name and args.command_x == ROBOTS[name].command_x
        unitree.check_args(args)
        low, high = np.transpose([args.command_x, args.command_y, args.command_yaw])
        for command in ROBOTS[name].test_commands.values():
            assert (low <= command).all() and (command <= high).all()
    args = dataclasses.replace(unitree.default_args("go2_no_clock"), imitation_coef=0.1)
    with pytest.raises(SystemExit):
        unitree.check_args(args)
    assert "clock" in capsys.readouterr().err


LEFT_KNEE = '<motor joint="left_knee" ctrlrange="-139 139"/>'
RIGHT_KNEE = LEFT_KNEE.replace("left", "right")
RIGHT_HIP = '<joint name="right_hip_roll" axis="1 0 0"'
LEFT_KNEE_BODY = re.search('<body name="left_knee"[^>]*>', (unitree.MODELS / "g1.xml").read_text())[
    0
]
SHIN = '<geom type="sphere" size="0.05" mass="0" contype="0" conaffinity="1"/>'


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({'<freejoint name="base"/>': ""}, "free joint"),
        (
            {
                '<joint name="left_knee"': '<joint name="l_knee"',
                LEFT_KNEE: LEFT_KNEE.replace("left", "l"),
            },
            "joints are",
        ),
        (
            {'<joint name="left_knee"': '<joint name="left_knee" limited="false"'},
            "hinges with a range",
        ),
        ({LEFT_KNEE: RIGHT_KNEE, RIGHT_KNEE: LEFT_KNEE}, "its motors move"),
        ({LEFT_KNEE: LEFT_KNEE.replace("/>", ' gear="2"/>')}, "gear of 1"),
        ({LEFT_KNEE: '<motor joint="left_knee"/>'}, "largest torque of ['left_knee']"),
        (
            {LEFT_KNEE: '<position joint="left_knee" ctrlrange="-2 2"/>'},
            "largest torque of ['left_knee']",
        ),
        ({'<body name="left_ankle_roll"': '<body name="foot"'}, "['left_ankle_roll']"),
        ({'type="sphere" size="0.005"': 'type="box" size=".02 .02 .005"'}, "spheres alone"),
        ({'<geom class="sole"': '<geom class="sole" size="0.006"'}, "of one radius"),
        ({RIGHT_HIP: RIGHT_HIP.replace('"1 0 0"', '"-1 0 0"')}, "left_hip_roll moves 0."),
        ({LEFT_KNEE_BODY: f"{LEFT_KNEE_BODY}{SHIN}"}, "shapes of ['left_knee'] can touch"),
        ({'conaffinity="1" priority="1"': 'conaffinity="1"'}, "soles need a priority"),
        ({'material="grid" contype="1"': 'material="grid"'}, "there is no floor"),
    ],
)
def test_model_that_would_be_misread_is_refused(changes, message, tmp_path, capsys):
    """By one line that says what is wrong. One text is exchanged for another at its first place."""
    old = (unitree.MODELS / "g1.xml").read_text()
    parts = re.split("(" + "|".join(map(re.escape, changes)) + ")", old)
    left = dict(changes)
    mjcf = "".join(left.pop(part, part) for part in parts)
    assert not left
    (tmp_path / "robot.xml").write_text(mjcf)
    robot = dataclasses.replace(ROBOTS["g1"], mjcf=str(tmp_path / "robot.xml"))
    with pytest.raises(SystemExit) as stop:
        unitree.load_model(robot, 0.005)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feet": ("left_ankle_roll",)}, "no foot mirrors ['left_ankle_roll']"),
        ({"gait_offsets": (0.0, 0.25)}, "half a period apart"),
        ({"gait_offsets": (0.0,)}, "half a period apart"),
        ({"gait_period": 0.5}, "an even number of control steps"),
        ({"gait_period": 0.81}, "an even number of control steps"),
        ({"weights": {"alive": 1.0}}, "must have track_velocity"),
        ({"test_commands": {"forward": (1.0, 0.0, 0.0)}}, "one of zeros"),
        ({"left_hip_roll": {"default": 0.1}}, "['left_hip_roll', 'right_hip_roll']"),
        ({"left_knee": {"stiffness": 99.0}}, "stiffness of ['left_knee', 'right_knee']"),
        ({"left_knee": {"damping": 9.0}}, "damping of ['left_knee', 'right_knee']"),
        ({"left_knee": {"reach": 2.0}}, "reach of ['left_knee', 'right_knee']"),
        ({"left_knee": {"held": True}}, "held of ['left_knee', 'right_knee']"),
    ],
)
def test_row_that_would_be_misread_is_refused(changes, message, capsys):
    joints = dict(ROBOTS["g1"].joints)
    for name in changes.keys() & joints:
        joints[name] = dataclasses.replace(joints[name], **changes[name])
    changes = {"joints": joints} | {k: v for k, v in changes.items() if k not in joints}
    with pytest.raises(SystemExit) as stop:
        unitree.load_model(dataclasses.replace(ROBOTS["g1"], **changes), 0.005)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error


def test_reward_has_no_unknown_terms(capsys):
    robot = dataclasses.replace(ROBOTS["g1"], weights={"track_velocity": 1.0, "tlit": -1.0})
    with pytest.raises(SystemExit) as stop:
        unitree.unweighted_terms(robot, motion_of(robot))
    assert stop.value.code == 2 and "no terms ['tlit']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("knee", "robot.xml without the shapes for pictures (ValueError"),
        ("ankle_roll", "['left_ankle_roll', 'right_ankle_roll'] need an <inertial>"),  # has soles
    ],
)
def test_masses_by_shapes_are_refused(tmp_path, capsys, link, message):
    """Training leaves the shapes out that only a picture needs."""
    mjcf = (unitree.MODELS / "g1.xml").read_text()
    shape = '<geom type="sphere" size="0.05" mass="1.9" contype="0" conaffinity="0"/>'
    links = rf'(<body name="(?:left|right)_{link}"[^>]*>\s*)<inertial[^>]*/>'
    (tmp_path / "robot.xml").write_text(re.sub(links, r"\1" + shape, mjcf))
    robot = dataclasses.replace(ROBOTS["g1"], mjcf=str(tmp_path / "robot.xml"))
    assert robot.model.nbody == ROBOTS["g1"].model.nbody
    with pytest.raises(SystemExit) as stop:
        unitree.load_model(robot, 0.005, visuals=False)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_payload_must_leave_the_base_a_mass(capsys):
    model = unitree.load_model(ROBOTS["g1"], 0.005)
    model.body_mass[1] = 0.9
    with pytest.raises(SystemExit) as stop:
        unitree.draw_payloads(unitree.Args(), model)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--added-mass" in error and "nothing would be left" in error


def test_joints_without_an_image_are_refused(tmp_path, capsys):
    """Where names do not begin with a side that OTHER_SIDE knows, no mirror would exchange them."""
    joints = {
        name.replace("left_knee", "left_knees"): joint
        for name, joint in ROBOTS["g1"].joints.items()
    }
    mjcf = (unitree.MODELS / "g1.xml").read_text().replace('"left_knee"', '"left_knees"')
    (tmp_path / "robot.xml").write_text(mjcf)
    with pytest.raises(SystemExit):
        unitree.load_model(
            dataclasses.replace(ROBOTS["g1"], joints=joints, mjcf=str(tmp_path / "robot.xml")),
            0.005,
        )
    assert "no joint mirrors ['left_knees', 'right_knee']" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ROBOTS if name != "g1"]
)
def test_short_training(name, monkeypatch, tmp_path):
    """Two iterations of a tiny run: everything is finite, and the policy fits the robot."""
    quick_kernels(monkeypatch)
    monkeypatch.setitem(unitree.ROBOTS, name, ROBOTS[name])
    monkeypatch.setattr(unitree, "judge", lambda robot, policy: {"passed": False})
    args = dataclasses.replace(
        unitree.default_args(name),
        num_envs=8,
        num_steps=4,
        num_minibatches=2,
        update_epochs=1,
        total_timesteps=64,
        hidden_sizes=(16,),
        num_devices=1,
        runs_dir=str(tmp_path),
    )
    run_dir, policy = unitree.train(args)
    assert (run_dir / "policy.npz").exists()
    robot = ROBOTS[name]
    original = unitree.CMujocoEnv(robot)
    original.reset(0)
    obs = original.observe((0.3, 0.0, 0.0))
    _, action = unitree.act(policy, unitree.initial_memory(), obs)
    assert action.shape == robot.acted.shape and np.isfinite(action).all()
    row = original.step(action)
    assert not row["fallen"] and math.isfinite(row["power"])
    assert all(np.isfinite(values).all() for values in policy.values())
