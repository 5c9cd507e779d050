"""Unitree's robots: model, physics and observation against facts and C MuJoCo, rewards by hand, symmetry, domain
randomisation, the algorithm's own rules, whole runs, and a policy in a loop as Unitree's own computer runs it."""

import ast
import contextlib
import dataclasses
import functools
import io
import json
import math
import re
import shutil
import signal
import tokenize
import tomllib
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from quick import QUICK, optimised, quick_kernels
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_mjx_unitree as unitree
from ppo_mjx_unitree import mjx
from tools import export

SCRIPT = Path(unitree.__file__)
# All that is here and not in the script.
FACTS = json.loads(Path(__file__).with_name("g1_facts.json").read_text())
BODIES = FACTS["bodies"]  # the base and, in the order of actions, what each joint moves
DEFAULT, KP, KD = (np.array(FACTS[name], float) for name in ("default", "kp", "kd"))
TORQUE, RANGE = (np.array([body[name] for body in BODIES[1:]]) for name in ("torque", "range"))
# Ids of bodies; 0 is the world.
FEET = [i + 1 for i, body in enumerate(BODIES) if "ankle_roll" in body["name"]]
ROBOT, WORLDS = unitree.ROBOTS["g1"], 16


@pytest.fixture(autouse=True)
def quick_kernels_without_step(request, monkeypatch):
    """As users have it, LLVM compiles the G1's `step` below. Others have less in them, or are a short training's."""
    if "step" not in request.fixturenames:
        quick_kernels(monkeypatch)


def as_numpy(leaf) -> np.ndarray:
    """A copy, as the array itself may be donated."""
    return np.array(
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    )


def run(function, *inputs):
    """Compile and call it."""
    return jax.jit(function).lower(*inputs).compile(QUICK)(*inputs)


def assert_same(first, second) -> None:
    """Bit for bit, NaN included."""
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(as_numpy(a), as_numpy(b)), first, second
    )


def random_quat(random) -> np.ndarray:
    quat = random.standard_normal(4)
    return quat / np.linalg.norm(quat)


def rotation(quat) -> np.ndarray:
    """The matrix of a unit quaternion w x y z, by Rodrigues' formula: from the base's frame to the world's."""
    angle, axis = 2 * math.atan2(np.linalg.norm(quat[1:]), quat[0]), np.array(quat[1:], float)
    x, y, z = axis / max(np.linalg.norm(axis), 1e-300)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


# ---- Model

BUILDS = partial(unitree.load_model, dt=0.002), partial(unitree.load_model, dt=0.005, visuals=False)


def reference_model() -> mujoco.MjModel:
    """The facts as MJCF, in lines that share nothing with the script's."""

    def text(values) -> str:
        return " ".join(f"{value:.10g}" for value in values)

    def body(row: dict) -> str:
        joint = "<freejoint/>"
        passive = " ".join(f'{name}="{x}"' for name, x in FACTS["joint_passive"].items())
        if "axis" in row:
            joint = f'<joint name="{row["name"]}" axis="{text(row["axis"])}" range="{text(row["range"])}" {passive}/>'
        soles = [
            f'<geom size="{FACTS["sole_radius"]}" pos="{text(center)}"/>'
            for center in FACTS["sole_centers"]
        ]
        inside = "".join(soles) if "ankle_roll" in row["name"] else ""
        inside += "".join(body(child) for child in BODIES if child["parent"] == row["name"])
        return (
            f'<body pos="{text(row["pos"])}" quat="{text(row["quat"])}">{joint}<inertial mass="{row["mass"]}" '
            f'pos="{text(row["center"])}" quat="{text(row["principal"])}" diaginertia="{text(row["moments"])}"/>'
            f"{inside}</body>"
        )

    return mujoco.MjModel.from_xml_string(
        f'<mujoco><compiler angle="radian"/><worldbody>{body(BODIES[0])}</worldbody></mujoco>'
    )


def inertia_tensors(model) -> np.ndarray:
    """About each body's centre of mass, in its frame: principal axes may come in any order."""
    turns = np.array([rotation(quat) for quat in model.body_iquat])
    return np.einsum("bij,bj,bkj->bik", turns, model.body_inertia, turns)


def random_pose(random, data, velocities: bool = True) -> None:
    data.qpos[:3], data.qpos[3:7] = random.uniform(-1, 1, 3), random_quat(random)
    data.qpos[7:] = random.uniform(*RANGE.T)
    data.qvel[:] = random.standard_normal(18) * velocities


@pytest.mark.parametrize("build", BUILDS)
def test_model_is_the_robot(build):
    """Bodies, masses, inertias, joints, motors and soles are the facts'."""
    model, facts = build(ROBOT), reference_model()
    names = ["base", *(body["name"] for body in BODIES[1:])]
    assert [model.body(i + 1).name for i in range(model.nbody - 1)] == names
    assert [model.joint(i).name for i in range(model.njnt)] == names
    # One motor for each joint, in order.
    assert model.actuator_trnid[:, 0].tolist() == list(range(1, 13))
    assert model.body_mass.sum() == pytest.approx(FACTS["total_mass"], abs=1e-6)
    exact = "body_mass body_ipos body_parentid jnt_range jnt_axis jnt_type dof_armature dof_damping".split()
    for name in exact + ["dof_frictionloss"]:
        np.testing.assert_allclose(
            getattr(model, name), getattr(facts, name), atol=1e-6, err_msg=name
        )
    np.testing.assert_allclose(model.body_pos[2:], facts.body_pos[2:], atol=1e-6)
    np.testing.assert_allclose(model.body_quat[2:], facts.body_quat[2:], atol=1e-6)
    np.testing.assert_allclose(inertia_tensors(model), inertia_tensors(facts), atol=1e-6)
    np.testing.assert_allclose(model.jnt_range[1:], RANGE, atol=1e-6)
    np.testing.assert_array_equal(model.actuator_ctrlrange, np.stack([-TORQUE, TORQUE], axis=1))
    assert (
        model.actuator_ctrllimited.all()
        and (model.actuator_gear[:, 0] == 1).all()
        and model.jnt_limited[1:].all()
    )
    soles = [i for i in range(model.ngeom) if model.geom_type[i] == mujoco.mjtGeom.mjGEOM_SPHERE]
    np.testing.assert_array_equal(model.geom_bodyid[soles], np.repeat(FEET, 4))
    np.testing.assert_allclose(model.geom_pos[soles], 2 * FACTS["sole_centers"], atol=1e-6)
    np.testing.assert_allclose(model.geom_size[soles, 0], FACTS["sole_radius"])


@pytest.mark.parametrize("build", BUILDS)
def test_mass_matrix_and_bias_force(build):
    """In the default pose and 20 random ones, at random velocities, both are those of the facts."""
    ours, facts, random = build(ROBOT), reference_model(), np.random.default_rng(0)
    rows = [(model, mujoco.MjData(model), np.zeros((18, 18))) for model in (ours, facts)]
    for i in range(21):
        if i:
            random_pose(random, rows[0][1])
        else:
            rows[0][1].qpos[7:] = DEFAULT
        rows[1][1].qpos[:], rows[1][1].qvel[:] = rows[0][1].qpos, rows[0][1].qvel
        for model, data, matrix in rows:
            mujoco.mj_forward(model, data)
            mujoco.mj_fullM(model, data, matrix)
        np.testing.assert_allclose(rows[0][2], rows[1][2], atol=1e-6)
        np.testing.assert_allclose(rows[0][1].qfrc_bias, rows[1][1].qfrc_bias, rtol=1e-6, atol=1e-5)
        # What the tree's Cholesky factor relies on: the legs are not coupled.
        assert not rows[0][2][6:12, 12:].any()


def test_standing_height():
    """In the default pose at 0.784 m, all eight soles touch the floor."""
    model = unitree.load_model(ROBOT, 0.002)
    data = mujoco.MjData(model)
    data.qpos[7:] = DEFAULT
    mujoco.mj_forward(model, data)
    soles = [i for i in range(model.ngeom) if "sole" in model.geom(i).name]
    assert (
        model.qpos0[2]
        == pytest.approx(FACTS["standing_height"], abs=1e-4)
        == pytest.approx(0.784, abs=5e-4)
    )
    assert len(soles) == 8 and np.abs(data.geom_xpos[soles, 2] - FACTS["sole_radius"]).max() < 1e-4
    assert ROBOT.start_height > model.qpos0[2]


def test_only_soles_touch_the_floor():
    """No other pair of shapes can collide, drawn or not."""
    for visuals in (True, False):
        model = unitree.load_model(ROBOT, 0.002, visuals)
        kind, affinity = model.geom_contype, model.geom_conaffinity
        pairs = (kind[:, None] & affinity | affinity[:, None] & kind) > 0
        floor = np.array([model.geom(i).name == "floor" for i in range(model.ngeom)])
        sole = np.array(["sole" in model.geom(i).name for i in range(model.ngeom)])
        np.testing.assert_array_equal(pairs, floor[:, None] & sole | sole[:, None] & floor)
        assert floor.sum() == 1 and sole.sum() == 8 and (model.ngeom > 9) == visuals


def changed_robot(folder: Path, change) -> unitree.Robot:
    """The robot by another MJCF file, in which `change` has changed the MjSpec."""
    spec = mujoco.MjSpec.from_file(str(unitree.MODELS / ROBOT.mjcf))
    change(spec)
    spec.compile()
    (folder / "changed.xml").write_text(spec.to_xml())
    return dataclasses.replace(ROBOT, mjcf=str(folder / "changed.xml"))


def hang(spec) -> None:
    """Hold the base in the air, where it is, above a floor that nothing can touch."""
    weld = spec.add_equality(
        type=mujoco.mjtEq.mjEQ_WELD, objtype=mujoco.mjtObj.mjOBJ_BODY, name1="base", name2="world"
    )
    weld.data[:11] = [*np.zeros(10), 1]  # where they are now; torques weigh as much as forces
    for geom in spec.geoms:
        if "sole" in geom.name:
            geom.conaffinity = 2  # still a sole, for all but the floor


def test_pd_holds_a_hanging_robot(tmp_path):
    """By gravity, with its base held, each joint comes to rest where stiffness balances its weight and dry friction."""
    env, random = unitree.CMujocoEnv(changed_robot(tmp_path, hang)), np.random.default_rng(0)
    for seed in range(2):
        env.reset(seed)
        targets = DEFAULT + 0.5 * random.uniform(*(RANGE - DEFAULT[:, None]).T).clip(-1, 1)
        for _ in range(600):
            env.step((targets - DEFAULT) / FACTS["action_scale"])
        mujoco.mj_forward(env.model, env.data)
        angles, weight = env.data.qpos[7:], env.data.qfrc_bias[6:]
        assert (
            np.abs(env.data.qvel).max() < 1e-3
            and np.abs(env.data.qpos[2] - FACTS["standing_height"]) < 0.01
        )
        assert (
            np.abs(KP * (targets - angles) - weight).max()
            < FACTS["joint_passive"]["frictionloss"] + 1e-3
        )
        assert 0.005 < np.abs(angles - targets).max() < 0.1 and np.abs(weight).max() > 1


# ---- Observation


def observe_by_hand(qpos, qvel, command, action, elapsed) -> np.ndarray:
    """Unitree's 47 numbers, from the facts' scales."""
    phase = 2 * math.pi * math.fmod(elapsed * 0.02, FACTS["gait_period"]) / FACTS["gait_period"]
    raw = {
        "angular velocity": qvel[3:6],
        "gravity": rotation(qpos[3:7]).T @ [0, 0, -1],
        "command": command,
        "joint angles": qpos[7:] - DEFAULT,
        "joint speeds": qvel[6:],
        "last action": action,
        "sine of the clock": [math.sin(phase)],
        "cosine of the clock": [math.cos(phase)],
    }
    parts = [np.array(raw[row["part"]]) * row["scale"] for row in FACTS["observation"]]
    assert [len(part) for part in parts] == [row["size"] for row in FACTS["observation"]]
    return np.concatenate(parts)


SIDES = np.r_[6:12, :6]  # of the joints, each leg in the other one's place
SIGNS = np.array([-1 if re.search("roll|yaw", body["name"]) else 1 for body in BODIES[1:]])


def mirror_joints(x):
    return np.asarray(x)[..., SIDES] * SIGNS


def mirror_critic(obs):
    """Unitree's observation behind the base's velocity, as a mirror shows it."""
    velocity, rates, gravity, command, *joints = np.split(obs, [3, 6, 9, 12, 24, 36, 48], axis=1)
    return np.concatenate(
        [
            velocity * [1, -1, 1],
            rates * [-1, 1, -1],
            gravity * [1, -1, 1],
            command * [1, -1, -1],
            *(mirror_joints(x) for x in joints[:3]),
            -joints[3],
        ],
        axis=1,
    )


def in_the_mirror(elapsed, x, mirror) -> np.ndarray:
    """x as the networks have it: mirrored in the second half of each gait period, of 40 control steps."""
    return np.where((np.asarray(elapsed) % 40 >= 20)[:, None], mirror(x), x)


def observe(qpos, qvel, command, action, elapsed, xp=jnp):
    """What the actor sees."""
    senses = unitree.sense(ROBOT, qpos, qvel, command, action, elapsed, xp)
    return unitree.observe(unitree.SEEN["actor"], senses, xp)


def test_observation_layout_and_scales():
    """Element by element, on posed robots: in NumPy, in JAX, of a batch, and as CMujocoEnv gives it."""
    random, original = np.random.default_rng(0), unitree.CMujocoEnv(ROBOT)
    original.reset(0)
    rows, expected = [], []
    for elapsed in (0, 1, 13, 39, 40, 777):
        random_pose(random, original.data)
        command, action = random.standard_normal(3), random.standard_normal(12)
        rows.append(
            (
                original.data.qpos.copy(),
                original.data.qvel.copy(),
                command,
                action,
                np.array(elapsed),
            )
        )
        expected.append(observe_by_hand(*rows[-1]))
        original.action, original.elapsed = action, elapsed
        np.testing.assert_allclose(original.observe(command), expected[-1], atol=1e-9)
        np.testing.assert_allclose(observe(*rows[-1], np), expected[-1], atol=1e-9)
    batch = tuple(np.array(column) for column in zip(*rows, strict=True))
    np.testing.assert_allclose(observe(*batch, np), expected, atol=1e-9)
    batch = [
        jnp.asarray(column, jnp.float32 if column.dtype == float else jnp.int32) for column in batch
    ]
    np.testing.assert_allclose(observe(*batch), expected, atol=3e-5)
    # No two parts can be mistaken for another.
    assert np.unique(np.array(expected).round(9)).size > 6 * 40


def test_clock_does_not_flip():
    """A step's feet are due exactly when the ticks say so, also where a share of the period is rounded."""
    elapsed = np.arange(2000)
    for robot in unitree.ROBOTS.values():
        period, stance = robot.gait_period / 0.02, robot.stance_share * robot.gait_period / 0.02
        for share in (period, stance, *(period * offset for offset in robot.gait_offsets)):
            assert share == pytest.approx(round(share), abs=1e-9)  # whole ticks
        ticks = (
            elapsed[:, None] + np.round(np.multiply(robot.gait_offsets, period)).astype(int)
        ) % round(period)
        for xp in (np, jnp):
            np.testing.assert_array_equal(
                unitree.is_stance(robot, xp.asarray(elapsed), xp), ticks < round(stance)
            )
    command, action = jnp.zeros((2000, 3)), jnp.zeros((2000, 12))
    clock = observe(
        jnp.zeros((2000, 19)), jnp.zeros((2000, 18)), command, action, jnp.asarray(elapsed)
    )
    for period in range(50):  # each period is the first one again, to the bit
        np.testing.assert_array_equal(clock[40 * period : 40 * (period + 1), -2:], clock[:40, -2:])


@pytest.mark.parametrize("factor", [0.0, 1.0, 2.0])
def test_actor_sees_noise_and_the_critic_more(factor):
    """Noise is uniform within its half-widths, none without a factor; the critic sees clean values and the base's
    velocity in front."""
    env, random, count = unitree.Env(unitree.Args(obs_noise=factor)), np.random.default_rng(0), 500
    data = types.SimpleNamespace(qpos=np.zeros(19), qvel=np.zeros(18))
    random_pose(random, data)
    command, action = random.standard_normal((2, 12))[0, :3], random.standard_normal(12)
    physics = unitree.Physics(
        *(jnp.asarray(x, jnp.float32) for x in (data.qpos, data.qvel, data.qvel))
    )
    obs = jax.vmap(lambda key: env.observations(key, physics, command, action, 13, 1.0))(
        jax.random.split(jax.random.key(0), count)
    )
    clean = observe_by_hand(data.qpos, data.qvel, command, action, 13)
    velocity = FACTS["velocity_scale"] * rotation(data.qpos[3:7]).T @ data.qvel[:3]
    np.testing.assert_allclose(
        obs["critic"], np.tile(np.concatenate([velocity, clean]), (count, 1)), atol=1e-5
    )
    widths = factor * np.concatenate(
        [np.full(row["size"], row["noise"]) for row in FACTS["observation"]]
    )
    noise = np.asarray(obs["actor"]) - clean
    assert (np.abs(noise) <= widths + 1e-5).all() and obs["actor"].shape == (count, 47)
    noisy = widths > 0
    assert noisy.sum() == (30 if factor else 0)
    np.testing.assert_allclose(np.abs(noise[:, noisy]).max(0), widths[noisy], rtol=0.05)
    np.testing.assert_allclose(noise[:, noisy].std(0), widths[noisy] / math.sqrt(3), rtol=0.15)
    assert (np.abs(noise[:, noisy].mean(0)) < 0.15 * widths[noisy]).all()
    correlation = np.corrcoef(noise[:, noisy].T) if factor else np.eye(1)
    # Each number has its own noise.
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.25


# ---- Rewards

MOTION = dict(
    command=[0.5, -0.2, 0.3],
    height=0.7,
    velocity=[0.2, 0.2, -0.3],
    rates=[0.4, -0.1, 0.8],
    gravity=[0.6, 0.0, -0.8],
    angles=[0.1, 0.2, -0.3, 0.4, 0.0, 0.2518, 0, 0, 0, 0.3, 0, 0.5],
    speeds=[1.0, -2.0] + 10 * [0.0],
    accelerations=[10.0, 0, -20] + 9 * [0.0],
    torque=[3.0, -4] + 10 * [0.0],
    action=[1.0] + 11 * [0.0],
    action_before=[0.0, 2] + 10 * [0.0],
    foot_height=[0.05, 0.02],
    foot_velocity=[[9.0, 9, 9], [0.1, -0.2, 0.2]],
    contact=[False, True],
    stance=[True, True],
    flight=[0.0, 0.0],
    clearance=[0.015, 0.0],
    capture_error=0.1,
)
# Not told to stand.
EXPECTED = {  # by the words and formulas of Unitree's rewards, with the numbers above
    "track_velocity": math.exp(-(0.3**2 + 0.4**2) / (0.04 + 0.21 * math.hypot(0.5, 0.2))),
    "track_yaw": math.exp(-(0.5**2) / 0.25),
    "alive": 1,
    "gait": 1 - 1,  # the right foot is on the floor when the clock wants it, the left one is not
    "swing_height": 0.03**2,  # the left foot is in the air, 5 instead of 8 cm high
    "stance_slip": 0.01 + 0.04 + 0.04,  # the right foot alone is on the floor
    "vertical_velocity": 0.09,
    "roll_pitch_rate": 0.16 + 0.01,
    "tilt": 0.36,
    "height": 0.08**2,
    "joint_acceleration": 500,
    "joint_velocity": 5,
    "torque": 25,
    "action_change": 1 + 4,
    "joint_limits": (0.2518 - 0.9 * 0.2618)
    + (0.5 - 0.9 * 0.2618),  # ankle rolls; all else is within 90%
    "upright_joints": 0.2**2 + 0.3**2,
    "lifted_standing": 0,
    "capture": 0,
    "standing_pose": 0,
}


def motion(**changes) -> unitree.Motion:
    return unitree.Motion(**{name: jnp.array(value) for name, value in (MOTION | changes).items()})


def test_every_reward_by_hand():
    """Each term of a constructed motion, and its weight for one control step."""
    unweighted = unitree.unweighted_terms(ROBOT, motion())
    assert EXPECTED.keys() == unweighted.keys() == ROBOT.weights.keys()
    for name, value in EXPECTED.items():
        assert unweighted[name] == pytest.approx(value, rel=1e-5), name
    terms = unitree.reward_terms(ROBOT, motion())
    for name, weight in ROBOT.weights.items():
        assert terms[f"reward_{name}"] == pytest.approx(0.02 * weight * EXPECTED[name], rel=1e-5), (
            name
        )
    assert (
        min(ROBOT.weights["track_velocity"], ROBOT.weights["track_yaw"], ROBOT.weights["alive"]) > 0
    )


def test_rewards_at_their_best():
    """Each term is at its maximum where nothing is wrong."""
    perfect = motion(
        command=[0.0] * 3,
        height=0.78,
        velocity=[0.0] * 3,
        rates=[0.0] * 3,
        gravity=[0.0, 0, -1],
        angles=DEFAULT,
        speeds=[0.0] * 12,
        accelerations=[0.0] * 12,
        torque=[0.0] * 12,
        action_before=[1.0] + 11 * [0.0],
        foot_height=[0.08, 0.0],
        foot_velocity=np.zeros((2, 3)),
        contact=[True, True],
        stance=[False, True],  # the clock does not count while it stands
        clearance=[0.0, 0.0],
        capture_error=0.0,
    )
    best = {"track_velocity": 1, "track_yaw": 1, "alive": 1, "gait": 2, "standing_pose": 1}
    for name, term in unitree.unweighted_terms(ROBOT, perfect).items():
        assert term == pytest.approx(best.get(name, 0), abs=1e-6), name


def test_an_error_costs_more_at_low_speed():
    """The width of the velocity's reward grows from the command to stand to 1 m/s."""

    def earned(command, error):
        moved = motion(command=[command, 0.0, 0.5], velocity=[command - error, 0.0, 0.0])
        return unitree.unweighted_terms(ROBOT, moved)["track_velocity"]

    for command, width in ((0.0, 0.04), (0.5, 0.145), (1.0, 0.25), (-1.0, 0.25), (1.5, 0.25)):
        assert earned(command, 0.1) == pytest.approx(math.exp(-0.01 / width), rel=1e-5)


def test_who_is_told_to_stand_keeps_still_while_it_can():
    """Balanced, it pays for lifted feet by their height up to 3 cm, and earns the more, the nearer its joints are to
    the default pose; about to fall, it is to step by the clock, and pays by the way to where a step would hold it."""
    changes = {"angles": DEFAULT + 0.1 * np.eye(12)[0], "stance": [False, True]}
    balanced = motion(
        command=[0.0] * 3,
        clearance=[0.015, 0.05],
        capture_error=0.0,
        contact=[False, True],
        **changes,
    )
    falling = balanced.replace(capture_error=jnp.array(0.2))
    by_hand = {
        "lifted_standing": (0.015 + 0.03, 0),
        "capture": (0, 0.2),
        "gait": (1 - 1, 1 + 1),
        "swing_height": (0, 0.03**2),
        "standing_pose": (math.exp(-(0.01 / 12) / 0.01), 0),
    }
    for name, values in by_hand.items():
        for moved, value in zip((balanced, falling), values, strict=True):
            assert unitree.unweighted_terms(ROBOT, moved)[name] == pytest.approx(value, rel=1e-5), (
                name
            )
    walking = unitree.unweighted_terms(ROBOT, falling.replace(command=jnp.array([0.5, 0, 0])))
    assert (
        walking["gait"] == 2
        and walking["capture"] == walking["lifted_standing"] == walking["standing_pose"] == 0
    )
    assert (
        ROBOT.weights["lifted_standing"] < 0 > ROBOT.weights["capture"]
        and ROBOT.weights["standing_pose"] > 0
    )


@pytest.mark.parametrize("yaw", [0.0, 0.7, -2.5])
def test_capture_point(yaw):
    """Where a body of that height and speed comes to rest, beyond the box around the soles in its own heading."""
    turn = np.array([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])
    quat = jnp.array([math.cos(yaw / 2), 0, 0, math.sin(yaw / 2)])
    soles = np.array([[0.1, 0.15], [-0.05, 0.15], [0.1, -0.15], [-0.05, -0.15]])
    place, ground = np.array([3.0, -2.0]), 0.4  # far from the world's middle
    height, seconds = 0.7, math.sqrt(0.7 / 9.81)
    for center, speed, expected in [
        ((0.02, 0.0), (0.0, 0.0), 0),
        ((0.02, 0.0), (0.08 / seconds - 1e-3, 0.0), 0),
        ((0.02, 0.0), (0.3, 0.0), 0.02 + 0.3 * seconds - 0.1),
        (
            (-0.02, 0.1),
            (-0.3, 0.4),
            math.hypot(0.02 + 0.3 * seconds - 0.05, 0.1 + 0.4 * seconds - 0.15),
        ),
        ((0.2, 0.0), (-0.3, 0.0), max(0.2 - 0.3 * seconds - 0.1, 0)),
    ]:
        com = [*(place + turn @ center), ground + height]
        points = np.column_stack([place + soles @ turn.T, ground + np.array([0, 0.05, 0, 0.1])])
        found = unitree.capture_error(
            jnp.array(com), jnp.array(turn @ speed), quat, jnp.array(points)
        )
        assert found == pytest.approx(expected, abs=2e-6)
    fallen = unitree.capture_error(jnp.zeros(3), jnp.array([1.0, 0]), quat, jnp.ones((4, 3)))
    assert np.isfinite(fallen)


# ---- Physics: the environment's step, compiled once for all tests, with the model as an argument


@pytest.fixture(scope="module")
def env():
    """Its first payload is none: the robot itself."""
    env = unitree.Env(unitree.Args())
    for name, values in env.payloads.items():
        values[0] = getattr(ROBOT.model, name)
    return env


@pytest.fixture(scope="module")
def starts(env):
    """WORLDS resets, two with the command to stand, each action late by another number of physics steps."""
    state = jax.vmap(unitree.kernel(env.reset))(jax.random.split(jax.random.key(0), WORLDS))
    state = with_info(state, command=state.info["command"].at[:2].set(0.0))
    return with_domain(state, delay=jnp.asarray(np.arange(WORLDS) % 5, jnp.int32))


def with_info(state, **changes):
    return state.replace(info=state.info | changes)


def with_domain(state, **changes):
    return with_info(state, domain=state.info["domain"] | changes)


@pytest.fixture(scope="module")
def step(env):
    """(state, action) -> state, of WORLDS worlds of `env` or of another one."""
    programs = {}

    def call(state, action, other=env):
        programs[other] = programs.get(other) or jax.jit(jax.vmap(unitree.kernel(other.step)))
        return programs[other](state, jnp.asarray(action, jnp.float32))

    return call


@pytest.fixture(scope="module")
def advanced(env, moments):
    """Data and readings of the moments' control step, world by world."""
    (state, action), rows = moments, []
    advance = jax.jit(unitree.kernel(env.advance))
    with pytest.MonkeyPatch.context() as patch:
        quick_kernels(patch)  # LLVM gives all to that of `step`, which is held to this one
        for i in range(WORLDS):
            rows.append(
                advance(
                    *jax.tree.map(
                        lambda x, i=i: x[i],
                        (
                            state.data,
                            jnp.asarray(action),
                            state.info["action"],
                            state.info["domain"],
                        ),
                    )
                )
            )
    return jax.tree.map(lambda *leaves: np.array(leaves), *rows)


@pytest.fixture(scope="module")
def moments(step, starts):
    """One moment of each of WORLDS random episodes, and actions: (states, actions). In none of them is a sphere so near
    to the floor that rounding decides whether it touches."""
    random, states, actions = np.random.default_rng(1), [starts], []
    for _ in range(30):
        actions.append(random.uniform(-1, 1, (WORLDS, 12)).astype(np.float32))
        states.append(step(states[-1], actions[-1]))
    when = random.choice(np.arange(8, 30), WORLDS)

    def pick(*leaves):
        return jnp.stack([leaves[t][i] for i, t in enumerate(when)])

    chosen = np.array([actions[t][i] for i, t in enumerate(when)])
    chosen[:4] *= 8  # some torques are beyond their limits
    return jax.tree.map(pick, *states), chosen


def c_readings(model, data) -> dict[str, np.ndarray]:
    """What C MuJoCo says about the feet at the present position and velocity, before any integration."""
    still, velocities, velocity = mujoco.MjData(model), [], np.zeros(6)
    still.qpos[:], still.qvel[:] = data.qpos, data.qvel
    mujoco.mj_forward(model, still)
    for foot in FEET:
        mujoco.mj_objectVelocity(model, still, mujoco.mjtObj.mjOBJ_XBODY, foot, velocity, 0)
        velocities.append(velocity[3:].copy())
    touching = {int(model.geom_bodyid[geom]) for pair in still.contact.geom for geom in pair}
    soles = [(model.geom_bodyid == foot) & (model.geom_conaffinity > 0) for foot in FEET]
    center = still.subtree_com[1]
    height = center[2] - min(still.geom_xpos[sole, 2].min() for sole in soles)
    point = center[:2] + data.qvel[:2] * math.sqrt(height / 9.81)
    ahead = rotation(data.qpos[3:7])[:2, 0] / np.linalg.norm(rotation(data.qpos[3:7])[:2, 0])
    away = np.array([still.geom_xpos[sole][:, :2] - point for sole in soles]).reshape(-1, 2)
    away = away @ np.transpose([ahead, [-ahead[1], ahead[0]]])
    lowest = [(still.geom_xpos[sole, 2] - model.geom_size[sole, 0]).min() for sole in soles]
    return {
        "foot_height": still.xpos[FEET, 2].copy(),
        "foot_velocity": np.array(velocities),
        "clearance": np.maximum(lowest, 0),
        "capture_error": np.linalg.norm(np.maximum(0, np.maximum(away.min(0), -away.max(0)))),
        "contact": np.array([foot in touching for foot in FEET]),
    }


def c_model(env, row: int) -> mujoco.MjModel:
    """The model with one of the payloads, compiled by MuJoCo from MJCF that says so."""
    spec = mujoco.MjSpec.from_file(str(unitree.MODELS / ROBOT.mjcf))
    spec.option.timestep = 0.005
    base = spec.body("base")
    base.mass, base.ipos = env.payloads["body_mass"][row, 1], env.payloads["body_ipos"][row, 1]
    for geom in spec.geoms:
        if geom.name != "floor" and "sole" not in geom.name:
            spec.delete(geom)
    return spec.compile()


@pytest.fixture(scope="module")
def original(env, moments):
    """The moments' control step by C MuJoCo with the same model, the PD law written anew: positions, velocities,
    torques, and the readings before and after the last integration."""
    (state, action), rows = moments, []
    domain = jax.tree.map(np.asarray, state.info["domain"])
    for i in range(WORLDS):
        model = c_model(env, int(domain["payload"][i]))
        model.geom_friction[model.geom_type == mujoco.mjtGeom.mjGEOM_SPHERE, 0] = domain[
            "friction"
        ][i]
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:], data.qacc_warmstart[:] = (
            x[i] for x in (state.data.qpos, state.data.qvel, state.data.qacc_warmstart)
        )
        for substep in range(4):
            wanted = np.float64(
                state.info["action"][i] if substep < domain["delay"][i] else action[i]
            )
            torque = (
                KP
                * domain["stiffness"][i]
                * (DEFAULT + FACTS["action_scale"] * wanted - data.qpos[7:])
            )
            torque = domain["strength"][i] * (torque - KD * domain["damping"][i] * data.qvel[6:])
            data.ctrl[:] = np.clip(torque, -TORQUE, TORQUE)
            before = c_readings(model, data)
            mujoco.mj_step(model, data)
        rows.append(
            {
                "qpos": data.qpos.copy(),
                "qvel": data.qvel.copy(),
                "torque": data.ctrl.copy(),
                "before": before,
                "after": c_readings(model, data),
            }
        )
    return jax.tree.map(lambda *leaves: np.array(leaves), *rows)


def test_moments_are_not_easy(moments, original):
    """Both feet, one and none are on the floor, they slip, torques reach their limits, every delay is there."""
    state, _ = moments
    contact = original["before"]["contact"]
    slip = np.linalg.norm(original["before"]["foot_velocity"], axis=-1)
    assert (
        (contact.sum(axis=1) == 2).any()
        and (contact.sum(axis=1) < 2).any()
        and slip[contact].max() > 0.1
    )
    assert (np.abs(original["torque"]) == TORQUE).any() and np.abs(original["qvel"]).max() > 5
    assert set(np.asarray(state.info["domain"]["delay"])) == set(range(5))
    assert (
        len(np.unique(state.info["domain"]["payload"])) > 10
        and np.ptp(state.info["domain"]["friction"]) > 0.5
    )


def test_physics_is_c_mujocos(advanced, original):
    """A control step is C MuJoCo's by each world's payload, friction, gains, strength and delay; but for rounding in
    single precision, which contacts magnify."""
    data, readings = advanced
    np.testing.assert_allclose(data.qpos, original["qpos"], atol=5e-6)  # m or rad
    np.testing.assert_allclose(data.qvel, original["qvel"], atol=5e-4)  # m/s or rad/s
    np.testing.assert_allclose(readings["torque"], original["torque"], atol=5e-3)


def test_readings_mean_the_state_before_the_last_integration(advanced, original):
    """Feet are read where C MuJoCo has them before the last integration, which is not where they are after it."""
    _, readings = advanced
    for name, most in (
        ("foot_height", 1e-6),
        ("clearance", 1e-6),
        ("foot_velocity", 5e-4),
        ("contact", 0),
        ("capture_error", 1e-5),
    ):
        before, after = (np.float64(original[when][name]) for when in ("before", "after"))
        np.testing.assert_allclose(np.float64(readings[name]), before, atol=most, err_msg=name)
        assert np.abs(before - after).max() > max(100 * most, 0.5 if name == "contact" else 0), name


@pytest.mark.parametrize(
    "command", [(1.0, 0, 0), (-0.5, 0, 0), (0, 0.4, 0), (0, 0, 0.6), (0.5, 0.2, 0.5), (0, 0, 0)]
)
def test_stepping_motion_follows_the_command(command):
    """While a foot is on the floor, the base moves over it by the command; soles stay level; in the air they lift."""
    model = unitree.load_model(ROBOT, 0.002)
    data = mujoco.MjData(model)

    def foot(phase, side):
        data.qpos[:7] = [0, 0, 0, 1, 0, 0, 0]
        clock = 2 * math.pi * (phase - 0.02 / 0.8)  # of the observation before
        obs = np.concatenate(
            [
                np.full(6, 9.0),
                np.multiply(command, [2, 2, 0.25]),
                np.full(36, 9.0),
                [math.sin(clock), math.cos(clock)],
            ]
        )
        action = unitree.stepping_action(ROBOT, jnp.array([obs, np.zeros(47)]))[0]
        data.qpos[7:] = DEFAULT + 0.25 * np.asarray(action)
        mujoco.mj_kinematics(model, data)
        return data.body(f"{side}_ankle_roll").xpos.copy(), data.body(
            f"{side}_ankle_roll"
        ).xmat.reshape(3, 3).copy()

    for side, start in ("left", 0.0), ("right", 0.5):
        landing, lift_off, middle = (foot((start + share) % 1, side) for share in (0, 0.55, 0.775))
        turn = -0.44 * command[2]
        moved = (lift_off[0] - landing[0])[:2]
        center = (lift_off[0] + landing[0])[:2] / 2
        expected = -0.44 * np.array(command[:2]) + turn * np.array([-center[1], center[0]])
        # A metre takes 0.44 m; turning moves the foot little.
        np.testing.assert_allclose(moved, expected, atol=0.06)
        # Without the ankle: 0.6.
        np.testing.assert_allclose(lift_off[1][:, 2], landing[1][:, 2], atol=0.08)
        yaw = math.atan2(*(lift_off[1] @ landing[1].T)[[1, 0], [0, 0]])
        assert yaw == pytest.approx(turn, abs=0.08)  # rolling a leg turns its foot a little
        assert (middle[0][2] > landing[0][2] + 0.05) == any(command)
    assert any(command) or (data.qpos[7:] == DEFAULT).all()


def test_worlds_move_alone_as_they_do_together(step, advanced, moments):
    """Alone and without vmap each world moves the same; the rewards are those of what was read there, and of the state
    after the step."""
    state, action = moments
    new = step(state, in_the_mirror(state.info["elapsed"], action, mirror_joints))
    data, readings = advanced
    np.testing.assert_allclose(new.data.qpos, data.qpos, atol=5e-6)  # observed: 6e-7
    np.testing.assert_allclose(new.data.qvel, data.qvel, atol=5e-4)  # observed: 7e-5
    qpos, qvel, info = np.float64(new.data.qpos), np.float64(new.data.qvel), state.info
    turn = [rotation(quat).T for quat in qpos[:, 3:7]]
    elapsed = np.asarray(info["elapsed"])[:, None] + 1
    ticks = (elapsed + [0, 20]) % 40
    stands = (np.asarray(info["command"]) == 0).all(axis=1, keepdims=True)
    assert 2 <= stands.sum() < 10
    rows = {
        "command": info["command"],
        "height": qpos[:, 2],
        "velocity": np.einsum("nij,nj->ni", turn, qvel[:, :3]),
        "rates": qvel[:, 3:6],
        "gravity": -np.array(turn)[:, :, 2],
        "angles": qpos[:, 7:],
        "speeds": qvel[:, 6:],
        "accelerations": (qvel[:, 6:] - np.float64(state.data.qvel[:, 6:])) / 0.02,
        "action": action,
        "action_before": info["action"],
        "stance": ticks < 22,
        "flight": np.zeros((WORLDS, 2)),
        **readings,
    }
    rows = unitree.Motion(**{name: jnp.asarray(column) for name, column in rows.items()})
    terms = jax.vmap(partial(unitree.reward_terms, ROBOT))(rows)
    for name, term in terms.items():
        np.testing.assert_allclose(new.metrics[name], term, rtol=1e-3, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(new.reward, np.maximum(sum(terms.values()), 0), rtol=1e-3, atol=1e-4)
    error = np.linalg.norm(np.asarray(rows.velocity - rows.command)[:, :2], axis=1)
    np.testing.assert_allclose(new.metrics["error_velocity"], error, atol=1e-4)
    error = np.abs(rows.command[:, 2] - rows.rates[:, 2])
    np.testing.assert_allclose(new.metrics["error_yaw"], error, atol=1e-3)
    assert (new.reward > 0).any() and len(new.metrics) == len(terms) + 2
    expected = [
        observe_by_hand(qpos[i], qvel[i], info["command"][i], action[i], elapsed[i, 0])
        for i in range(WORLDS)
    ]
    expected = np.concatenate([2 * np.asarray(rows.velocity), expected], axis=1)
    expected = in_the_mirror(elapsed[:, 0], expected, mirror_critic)
    np.testing.assert_allclose(new.obs["critic"], expected, atol=1e-5)


def test_twin_is_the_environment(env, step, starts):
    """tools/replay_nan.py's C MuJoCo takes the way of the world that it follows, draws and pushes included."""
    keys = jax.random.split(jax.random.key(1), 4000)
    pushes = run(jax.vmap(lambda key: env.push({"key": key, "level": 1.0})), keys)
    pushed = np.flatnonzero(np.asarray(pushes).any(axis=1))
    state, random = with_info(starts, key=keys[pushed[:WORLDS]]), np.random.default_rng(0)
    twins = [unitree.Twin(env, jax.tree.map(lambda x, i=i: x[i], state)) for i in range(WORLDS)]
    for i, twin in enumerate(twins):
        twin.data.qpos[:], twin.data.qvel[:] = state.data.qpos[i], state.data.qvel[i]
    for _ in range(4):
        action = random.uniform(-1, 1, (WORLDS, 12)).astype(np.float32)
        before, state = state, step(state, action)
        for i, twin in enumerate(twins):
            twin.step(action[i])
            np.testing.assert_allclose(state.data.qpos[i], twin.data.qpos, atol=2e-5)
            np.testing.assert_allclose(state.data.qvel[i], twin.data.qvel, atol=5e-3)
    assert np.abs(np.asarray(state.data.qvel - before.data.qvel)).max() > 1


def test_same_input_same_output(step, moments):
    assert_same(step(*moments), step(*moments))


# ---- Symmetry


def mirror_state(state):
    """The worlds as a mirror at the plane y = 0 shows them, half a gait period later."""
    data, info = state.data, state.info
    flip = {
        "qpos": [1, -1, 1, 1, -1, 1, -1],
        "qvel": [1, -1, 1, -1, 1, -1],
        "qacc_warmstart": [1, -1, 1, -1, 1, -1],
    }
    mirrored = {
        name: jnp.concatenate(
            [
                getattr(data, name)[:, : len(signs)] * np.array(signs),
                mirror_joints(getattr(data, name)[:, len(signs) :]),
            ],
            axis=1,
        )
        for name, signs in flip.items()
    }
    return with_info(
        state.replace(data=data.replace(**mirrored)),
        command=info["command"] * np.array([1, -1, -1]),
        elapsed=info["elapsed"] + 20,
        action=jnp.array(mirror_joints(info["action"])),
        domain=info["domain"]
        | {name: info["domain"][name][:, SIDES] for name in ("stiffness", "damping", "strength")},
    )


def test_mirrored_twice_is_the_original():
    """The mirror's maps are involutions, in NumPy and JAX, and no number stays where it is but those in the plane."""
    random = np.random.default_rng(0)
    for mirror, size, kept in ((unitree.mirror_joints, 12, 0), (unitree.mirror_observation, 47, 4)):
        x = random.standard_normal((5, size))
        for xp in (np, jnp):
            named = {"xp": xp} if mirror is unitree.mirror_observation else {}
            once = mirror(ROBOT, xp.asarray(x), **named)
            np.testing.assert_allclose(mirror(ROBOT, once, **named), x, rtol=1e-6)
            assert (np.isclose(once, x).all(axis=0)).sum() == kept
    np.testing.assert_array_equal(unitree.mirror_joints(ROBOT, x[:, :12]), mirror_joints(x[:, :12]))
    low, high = ROBOT.limits.T
    np.testing.assert_allclose(
        np.minimum(*(unitree.mirror_joints(ROBOT, x) for x in (low, high))), low
    )
    np.testing.assert_allclose(unitree.mirror_joints(ROBOT, DEFAULT), DEFAULT)


def test_policies_use_the_mirror_when_the_environment_does():
    """For every robot, each control step of the gait and each command: the product says what in_mirror says."""
    random = np.random.default_rng(0)
    for robot in unitree.ROBOTS.values():
        when = unitree.mirror_rules(robot)["mirror_when"]
        for elapsed in range(2 * robot.gait_ticks):
            command = random.uniform(-1, 1, 3) * (random.random(3) < 0.7)
            joints, actions = np.zeros(len(robot.joints)), np.zeros(len(robot.acted))
            qpos = np.concatenate([[0, 0, 1, 1, 0, 0, 0], joints])
            qvel = np.concatenate([np.zeros(6), joints])
            senses = unitree.sense(robot, qpos, qvel, command, actions, np.array(elapsed), np)
            obs = unitree.observe(unitree.seen_parts(robot, "actor"), senses, np)
            assert (obs @ when > 0) == unitree.in_mirror(robot, command, np.array(elapsed)), (
                robot.mjcf,
                elapsed,
            )


def mirror_errors(step, env, moments) -> dict[str, float]:
    """How far the mirrored worlds' next states are from the mirrored next states, at most."""
    state, action = moments
    domain = jax.tree.map(lambda x: jnp.concatenate([x[:8], x[:8]]), state.info["domain"])
    state = with_info(state, domain=domain | {"payload": jnp.zeros_like(domain["payload"])})
    twin = mirror_state(state)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a[:8], b[:8]]), state, twin)
    # One of each pair is in the second half of its period: the networks see the same, and act alike.
    new = step(both, np.concatenate([action[:8], action[:8]]), env)
    right, left = (
        jax.tree.map(lambda x, half=half: x[half], new) for half in (slice(8), slice(8, 16))
    )
    expected = mirror_state(right)
    pairs = {
        "qpos": (expected.data.qpos, left.data.qpos),
        "qvel": (expected.data.qvel, left.data.qvel),
        "observation": (right.obs["critic"], left.obs["critic"]),
        "reward": (right.reward, left.reward),
    }
    pairs |= {name: (right.metrics[name], left.metrics[name]) for name in right.metrics}
    assert np.abs(np.asarray(right.data.qpos - left.data.qpos)).max() > 0.1
    return {
        name: float(np.abs(np.asarray(a) - np.asarray(b)).max()) for name, (a, b) in pairs.items()
    }


def symmetric(spec) -> None:
    """Without the real robot's asymmetries: its base leans to a side, and its knees differ."""
    base = spec.body("base")
    (right, left) = (spec.body(f"{side}_knee") for side in ("right", "left"))
    base.ipos[1], base.iquat[[1, 3]] = 0, 0
    right.iquat, right.inertia = left.iquat * [1, -1, 1, -1], left.inertia


@pytest.mark.slow
def test_mirrored_step_of_a_symmetric_robot(step, moments, monkeypatch, tmp_path):
    """A robot without the real one's asymmetries moves in the mirror as the mirror shows it, as do its observation and
    every reward."""
    quick_kernels(monkeypatch)
    monkeypatch.setitem(unitree.ROBOTS, "symmetric", changed_robot(tmp_path, symmetric))
    nothing_added = unitree.Args(robot="symmetric", added_mass=(0.0, 0.0), shifted_center=0.0)
    errors = mirror_errors(step, unitree.Env(nothing_added), moments)
    limits = {"qpos": 5e-6, "qvel": 5e-4, "observation": 1e-4}
    assert all(error < limits.get(name, 1e-3) for name, error in errors.items()), errors


def test_mirrored_step_of_the_real_robot(step, env, moments):
    """The real one's base and knees are not quite symmetric, by 0.2 mm and 0.1%: its mirrored step is near."""
    errors = mirror_errors(step, env, moments)
    assert 1e-5 < errors["qpos"] < 5e-3 and 1e-3 < errors["qvel"] < 0.5, errors


# ---- Randomisation, endings and a free robot, in the same step

UNUSED = {
    ".dof_M0",
    ".actuator_acc0",
    ".cam_poscom0",
    ".light_poscom0",  # for muscles and pictures
    *(f".stat.{name}" for name in ("meaninertia", "meanmass", "meansize", "extent", "center")),
}


def test_payloads_are_compiled_models(env):
    """Each payload's fields, put into MJX's model, make the model that MuJoCo compiles from MJCF with that base."""
    base = BODIES[0]
    masses = env.payloads["body_mass"][:, 1] - base["mass"]
    centers = env.payloads["body_ipos"][:, 1] - base["center"]
    assert (
        len(masses) == unitree.NUM_PAYLOADS
        and -1 <= masses.min() < -0.7
        and 2.7 < masses.max() <= 3
    )
    assert (np.abs(centers).max(axis=0) <= 0.03).all() and (
        np.abs(centers).max(axis=0) > 0.025
    ).all()
    for row in range(0, unitree.NUM_PAYLOADS, 13):
        compiled = mjx.put_model(c_model(env, row), impl="jax")
        ours = env.model.replace(
            **{name: jnp.asarray(values[row]) for name, values in env.payloads.items()}
        )
        unequal, same = [], 0
        for (path, mine), other in zip(
            jax.tree.flatten_with_path(ours)[0], jax.tree.leaves(compiled), strict=True
        ):
            equal = np.allclose(mine, other, rtol=1e-6, atol=1e-9)
            same = same + equal
            unequal = unequal + [] if equal else [*unequal, jax.tree_util.keystr(path)]
        assert same > 100 and set(unequal) <= UNUSED, unequal
    usual = mjx.put_model(unitree.load_model(ROBOT, 0.005, visuals=False), impl="jax")
    assert_same(env.model, usual)  # drawing payloads leaves the robot as it was


def test_every_randomised_number_changes_the_physics(step, moments):
    """Worlds that differ in one number of their domain go apart; equal ones do not. A joint's gains are its own."""
    (state, action), names = moments, sorted(moments[0].info["domain"])
    contact = int(np.argmin(np.asarray(state.data.qpos[:, 2])))
    alike = jax.tree.map(lambda x: jnp.stack([x[contact]] * WORLDS), state)
    alike = alike.replace(data=alike.data.replace(qvel=alike.data.qvel.at[:, 0].set(1.0)))
    ones, knee = np.ones(12), np.where(np.arange(12) == 3, 1.1, 1.0)
    usual = {
        "friction": 0.8,
        "payload": 0,
        "stiffness": ones,
        "damping": ones,
        "strength": ones,
        "delay": 0,
    }
    other = {
        "friction": 0.4,
        "payload": 1,
        "stiffness": knee,
        "damping": knee,
        "strength": 0.9 * ones,
        "delay": 2,
    }
    assert names == sorted(other)
    # Other ones would be traced anew.
    kinds = {name: values.dtype for name, values in state.info["domain"].items()}
    changed = {
        name: jnp.array(
            [other[name] if i == world else usual[name] for world in range(WORLDS)], kinds[name]
        )
        for i, name in enumerate(names)
    }
    data = step(with_domain(alike, **changed), np.tile(action[contact], (WORLDS, 1))).data
    for i, name in enumerate(names):
        assert np.abs(np.asarray(data.qvel[i] - data.qvel[-1])).max() > 1e-3, name
    np.testing.assert_array_equal(data.qvel[len(names)], data.qvel[-1])


def test_broken_world_leaves_the_others_alone(step, moments):
    """NaN or an absurd speed in one world changes no bit of another; that world ends its episode, earns nothing and
    shows its last observation."""
    (state, action), expected = moments, step(*moments)
    qvel = state.data.qvel.at[3, 0].set(jnp.nan).at[5, 8].set(1e4)
    qpos = state.data.qpos.at[7, 1].set(jnp.inf)
    new = step(state.replace(data=state.data.replace(qpos=qpos, qvel=qvel)), action)
    broken = np.isin(np.arange(WORLDS), [3, 5, 7])
    np.testing.assert_array_equal(new.info["broken"], broken)
    assert_same(*(jax.tree.map(lambda x: as_numpy(x)[~broken], x) for x in (new, expected)))
    assert (
        (new.done[broken] == 1).all()
        and (new.reward[broken] == 0).all()
        and not expected.info["broken"].any()
    )
    for name in ("actor", "critic"):
        np.testing.assert_array_equal(new.obs[name][broken], state.obs[name][broken])
    assert all(not np.asarray(new.metrics[name])[broken].any() for name in new.metrics)
    late = step(with_info(state, elapsed=jnp.full_like(state.info["elapsed"], 999)), action)
    assert late.info["truncated"].all() and not expected.info["truncated"].any()


def test_has_fallen_by_tilt_and_height():
    """A robot tilted by more than 0.8 rad about any horizontal axis, heading anywhere, or with its base below 0.5 m."""
    random = np.random.default_rng(0)
    for angle, low, fallen in (
        (0.79, 0.51, False),
        (0.81, 0.51, True),
        (0.79, 0.49, True),
        (3.0, 2.0, True),
    ):
        rows = []
        for _ in range(20):
            way, heading = random.uniform(0, 2 * np.pi, 2)
            tilt = np.append(
                math.cos(angle / 2),
                math.sin(angle / 2) * np.array([math.cos(way), math.sin(way), 0]),
            )
            quat = np.zeros(4)
            mujoco.mju_mulQuat(
                quat, np.array([math.cos(heading / 2), 0, 0, math.sin(heading / 2)]), tilt
            )
            rows.append(np.concatenate([[9, -9, low], quat, random.standard_normal(12)]))
        np.testing.assert_array_equal(unitree.has_fallen(ROBOT, np.array(rows), np), fallen)
        np.testing.assert_array_equal(unitree.has_fallen(ROBOT, jnp.array(rows)), fallen)


# ---- Episodes, on an environment that takes no time: its joints follow a simple law, its base stays where it is


class Toy(unitree.Env):
    """Its worlds' feet are near 8 cm, on the floor or not as the knees say."""

    def advance(self, data, action, action_before, domain):
        knees, qpos = data.qpos[np.array([10, 16])], data.qpos.at[7:].add(0.02 * data.qvel[6:])
        speeds = 0.8 * data.qvel[6:] + domain["strength"] * (
            DEFAULT + 0.25 * action - data.qpos[7:]
        )
        return data.replace(qpos=qpos, qvel=data.qvel.at[6:].set(speeds)), {
            "torque": action,
            "contact": knees < 0.3,
            "foot_height": 0.05 + 0.1 * knees,
            "foot_velocity": jnp.zeros((2, 3)),
            "clearance": 0.1 * jnp.maximum(knees - 0.3, 0),
            "capture_error": jnp.abs(data.qvel[0]),
        }


class Short(Toy):
    time_limit = 5


NOTHING = unitree.Args(
    command_x=(0.0, 0.0),
    command_y=(0.0, 0.0),
    command_yaw=(0.0, 0.0),
    push_speed=0.0,
    friction=(0.8, 0.8),
    added_mass=(0.0, 0.0),
    shifted_center=0.0,
    gain_noise=0.0,
    strength_noise=0.0,
    action_delay=0.0,
    obs_noise=0.0,
)
USUAL = unitree.Args(
    num_envs=64,
    num_steps=8,
    num_minibatches=4,
    update_epochs=2,
    total_timesteps=2048,
    hidden_sizes=(16,),
)


@functools.cache
def make(kind, args):
    env = kind(args)
    env.run_args = args  # of which an environment keeps its own alone
    return env


@functools.cache
def make_reset(env):
    """Keys [1000] -> states."""
    return (
        jax.jit(jax.vmap(unitree.kernel(env.reset)))
        .lower(jax.random.split(jax.random.key(0), 1000))
        .compile()
    )


def reset_worlds(env, count: int):
    return jax.tree.map(
        lambda x: x[:count], make_reset(env)(jax.random.split(jax.random.key(0), 1000))
    )


def path(env, state, steps: int):
    """The states after each step without action: [steps, N, ...], as NumPy arrays."""

    def step(state, _):
        state = jax.vmap(env.step)(state, jnp.zeros((len(state.reward), 12)))
        return state, state

    return jax.tree.map(
        as_numpy, run(lambda state: jax.lax.scan(step, state, length=steps)[1], state)
    )


def test_commands_and_pushes_come_by_chance():
    """Another command every 5 s and a push of at most 0.8 m/s along each axis every 3 s on average, each control step
    as likely as any other, so that they meet all phases of the gait. The old command is what a step is rewarded for."""
    env, steps, worlds = make(Toy, USUAL), 400, 200
    start = reset_worlds(env, worlds)
    states = path(env, start, steps)
    command, speed = (
        np.concatenate([as_numpy(first)[None], rest])
        for first, rest in (
            (start.info["command"], states.info["command"]),
            (start.data.qvel[:, :6], states.data.qvel[:, :, :6]),
        )
    )
    kicked = speed[1:] - speed[:-1]
    # A new command that says to stand, as the old one did, cannot be seen.
    visible = 1 - USUAL.standing**2
    for moved, every, seen in (
        (command[1:] != command[:-1], 250, visible),
        (kicked[..., :2], 150, 1),
    ):
        moved = moved.astype(bool).any(axis=-1)  # [steps, worlds]
        count, expected = moved.sum(), steps * worlds * seen / every
        # 4 standard deviations of a rare event.
        assert count == pytest.approx(expected, abs=4 * math.sqrt(expected))
        phases = moved.reshape(10, 40, worlds).sum(axis=(0, 2))  # of the gait
        assert phases.min() > 0 and phases.max() < 4 * count / 40
        assert (moved.sum(axis=1) < 0.1 * worlds).all()  # no step takes all worlds at once
    assert (kicked[..., 0] != 0).sum() == (kicked[..., 1] != 0).sum() and not kicked[:, :, 2:].any()
    assert 0.7 < np.abs(kicked).max() <= 0.8 + 1e-6
    # In the mirror.
    seen = np.where(np.asarray(states.info["elapsed"])[..., None] % 40 >= 20, [1, -1, -1], 1)
    np.testing.assert_allclose(
        states.obs["critic"][:, :, 9:12], seen * command[1:] * [2, 2, 0.25], rtol=1e-6
    )
    w, axis = np.split(np.float64(states.data.qpos[:, :, 3:7]), [1], axis=-1)
    aside = np.cross(axis, speed[1:, :, :3])
    velocity = speed[1:, :, :3] - 2 * w * aside + 2 * np.cross(axis, aside)  # in the base's frame
    error = np.linalg.norm(velocity[..., :2] - command[:-1, :, :2], axis=-1)
    np.testing.assert_allclose(states.metrics["error_velocity"], error, atol=1e-5)


@pytest.mark.parametrize(
    ("args", "commands", "pushes"),
    [
        (dataclasses.replace(USUAL, command_every=0.1, push_every=0.06), 1 / 5, 1 / 3),
        (NOTHING, 0, 0),
    ],
)
def test_chances_follow_the_settings(args, commands, pushes):
    """As often as the flags say; where the ranges are 0, never."""
    env = make(Toy, args)
    keys = jax.random.split(jax.random.key(0), 20_000)
    command = jnp.array([9.0, 9.0, 9.0])
    if not commands:
        command = jnp.zeros(3)

    def draw(key):
        return env.push({"key": key, "level": 1.0}), env.next_command(key, command)

    pushed, drawn = run(jax.vmap(draw), keys)
    assert (np.asarray(pushed) != 0).all(axis=1).mean() == pytest.approx(pushes, abs=0.015)
    assert (np.asarray(drawn) != command).any(axis=1).mean() == pytest.approx(commands, abs=0.015)


def test_commands_cover_their_ranges():
    """Some say to stand, slow parts are 0, the rest is uniform in its range."""
    args, keys = dataclasses.replace(USUAL, one_axis=0.0), jax.random.split(jax.random.key(0), 4000)
    command = np.asarray(run(jax.vmap(make(Toy, args).draw_command), keys))
    planar, standing = np.linalg.norm(command[:, :2], axis=1), (command == 0).all(axis=1)
    slow, still = math.pi * 0.2**2 / (1.6 * 0.8), 0.2 / 0.8  # shares of the ranges
    assert standing.mean() == pytest.approx(
        args.standing + (1 - args.standing) * slow * still, abs=0.02
    )
    assert ((planar == 0) & ~standing).mean() == pytest.approx(
        (1 - args.standing) * slow * (1 - still), abs=0.02
    )
    assert planar[planar > 0].min() > 0.2 and np.abs(command[:, 2][command[:, 2] != 0]).min() > 0.2
    for values, (low, high) in zip(
        command.T, (args.command_x, args.command_y, args.command_yaw), strict=True
    ):
        values, edge = values[(planar > 0) & (command[:, 2] != 0)], 0.02 * (high - low)
        assert low <= values.min() < low + edge and high - edge < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=2 * edge)


def test_commands_along_one_axis():
    """As many as the flag says, a third of them along each axis, over its range but what is slow."""
    args, keys = dataclasses.replace(USUAL, one_axis=0.6), jax.random.split(jax.random.key(0), 4000)
    command = np.asarray(run(jax.vmap(make(Toy, args).draw_command), keys))
    ranges = (args.command_x, args.command_y, args.command_yaw)
    for axis, (low, high) in enumerate(ranges):
        alone = (np.delete(command, axis, axis=1) == 0).all(axis=1) & (command[:, axis] != 0)
        share = 0.6 / 3 * (1 - args.standing)
        # With all three drawn, the turn alone is left where the rest is slow.
        rare = 0.1 * 0.4 * (1 - args.standing) if axis == 2 else 0.0
        assert share - 0.02 < alone.mean() < share + rare + 0.02
        values, edge = command[alone, axis], 0.04 * (high - low)
        assert low <= values.min() < low + edge and high - edge < values.max() <= high
        assert 0.2 <= np.abs(values).min() < 0.2 + edge
    no_turn = dataclasses.replace(USUAL, one_axis=1.0, standing=0.0, command_yaw=(0.0, 0.0))
    command = np.asarray(run(jax.vmap(make(Toy, no_turn).draw_command), keys))
    assert np.isfinite(command).all() and (command[:, 2] == 0).all()
    assert (command != 0).any(axis=1).all()  # not along the axis that is closed
    assert (command[:, 1] == 0).mean() == pytest.approx(1 / 2, abs=0.03)


def test_commands_that_are_not_slow():
    """Each keeps its sign and its order; what is slower than 0.2 is spread over the rest of its side."""
    low, high = np.array([-0.1, 0.3, -1.0]), np.array([1.0, 0.8, 0.0])
    for command, expected in (
        ([0.5, 0.3, -0.5], [0.6, 0.3, -0.6]),
        ([0.0, 0.55, -1.0], [0.0, 0.55, -1.0]),
        ([1.0, 0.8, -0.25], [1.0, 0.8, -0.4]),
    ):
        ours = unitree.not_slow(jnp.array(command), low, high)
        np.testing.assert_allclose(ours, expected, atol=1e-6)
    slow = unitree.not_slow(jnp.array([-0.05, 0.3, 0.0]), low, high)
    assert -0.2 < slow[0] < 0  # all of that side is


def test_domains_cover_their_ranges():
    """Every episode has its own body; with all ranges at 0, each has the robot's."""
    args, count = USUAL, 1000
    domain = reset_worlds(make(Toy, args), count).info["domain"]
    ranges = {"friction": args.friction} | dict.fromkeys(
        ("stiffness", "damping", "strength"), (0.9, 1.1)
    )
    for name, (low, high) in ranges.items():
        values = np.ravel(domain[name])
        assert low - 1e-6 <= values.min() < low + 0.01 and high - 0.01 < values.max() <= high + 1e-6
        assert values.mean() == pytest.approx((low + high) / 2, rel=0.03)
    numbers = np.concatenate(
        [np.reshape(domain[name], (count, -1)) for name in (*ranges, "payload")], axis=1
    ).T
    assert len(numbers) == 1 + 3 * 12 + 1  # each joint has its own stiffness, damping and strength
    assert np.abs(np.corrcoef(numbers) - np.eye(38)).max() < 0.15  # each is drawn for itself
    np.testing.assert_array_equal(np.unique(domain["payload"]), np.arange(unitree.NUM_PAYLOADS))
    np.testing.assert_array_equal(np.unique(domain["delay"]), np.arange(args.decimation + 1))
    assert np.bincount(domain["delay"]).min() > 0.15 * count
    half = Toy(dataclasses.replace(args, action_delay=0.5, decimation=10))

    def draw(key, level):
        return half.draw_domain(key, level)

    draws = run(
        jax.vmap(jax.vmap(draw, (0, None)), (None, 0)),
        jax.random.split(jax.random.key(0), 200),
        jnp.array([0.0, 0.5, 1.0]),
    )
    none, some, most = (jax.tree.map(lambda x, i=i: np.asarray(x[i]), draws) for i in range(3))
    np.testing.assert_array_equal(np.unique(most["delay"]), np.arange(6))
    for name, value in {
        "friction": 1,
        "stiffness": 1,
        "damping": 1,
        "strength": 1,
        "delay": 0,
        "payload": 0,
    }.items():
        np.testing.assert_allclose(none[name], value, rtol=1e-6)
        spread = np.ptp(most[name])
        assert name == "payload" or np.ptp(some[name]) == pytest.approx(
            0.5 * spread, rel=1e-4, abs=0.5 * (name == "delay")
        )
    assert 0.35 < (some["payload"] == 0).mean() < 0.65
    env = make(Toy, NOTHING)
    domain = reset_worlds(env, 50).info["domain"]
    for name, value in {
        "friction": 0.8,
        "stiffness": 1,
        "damping": 1,
        "strength": 1,
        "delay": 0,
    }.items():
        np.testing.assert_allclose(domain[name], value, rtol=1e-6)
    for name, values in env.payloads.items():
        robots = getattr(unitree.load_model(ROBOT, 0.005, visuals=False), name)
        np.testing.assert_allclose(values, np.stack([robots] * unitree.NUM_PAYLOADS), rtol=1e-9)


def test_resets():
    """Joints at 50 to 150% of their default, the base level, 1.6 cm above the floor and moving; in half of the worlds a
    tenth of both; the same key gives the same start, another one another."""
    first = reset_worlds(make(Toy, USUAL), 1000)
    assert_same(first, reset_worlds(make(Toy, USUAL), 1000))
    qpos, qvel = np.asarray(first.data.qpos), np.asarray(first.data.qvel)
    np.testing.assert_allclose(qpos[:, :7], np.tile([0, 0, 0.8, 1, 0, 0, 0], (1000, 1)), atol=1e-6)
    factor = qpos[:, 7:][:, DEFAULT != 0] / DEFAULT[DEFAULT != 0]
    assert (
        0.499 < factor.min() < 0.51
        and 1.49 < factor.max() < 1.501
        and not qpos[:, 7:][:, DEFAULT == 0].any()
    )
    fastest = np.abs(qvel[:, :6]).max(axis=0)
    assert not qvel[:, 6:].any() and (fastest <= 0.5).all() and (fastest > 0.49).all()
    rest = np.abs(qvel[:, :6]).max(axis=1) <= 0.05
    np.testing.assert_array_equal(rest, np.abs(factor - 1).max(axis=1) <= 0.05 + 1e-6)
    assert 0.4 < rest.mean() < 0.6
    assert len(np.unique(qvel[:, :6].round(6))) > 5900 and len(np.unique(factor.round(6))) > 5500
    assert (
        not first.info["elapsed"].any() and not first.info["action"].any() and not first.done.any()
    )
    assert first.data.qacc_warmstart.shape == (1000, 18) and not first.data.qacc_warmstart.any()


def test_vmap_changes_nothing():
    """One world's step alone gives the numbers of many worlds' step, draws and all, and twice the same."""
    env, random = make(Toy, USUAL), np.random.default_rng(0)
    state = with_info(reset_worlds(env, 4), elapsed=jnp.array([0, 199, 249, 999]))
    action = jnp.asarray(random.standard_normal((4, 12)), jnp.float32)
    together = run(jax.vmap(env.step), state, action)
    worlds = [jax.tree.map(lambda x, i=i: x[i], (state, action)) for i in range(4)]
    single = jax.jit(env.step).lower(*worlds[0]).compile(QUICK)
    for i, world in enumerate(worlds):
        alone, batch = single(*world), jax.tree.map(lambda x, i=i: x[i], together)
        assert_same(alone, single(*world))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(as_numpy(a), as_numpy(b), rtol=1e-5, atol=1e-6),
            alone,
            batch,
        )


def test_endings():
    """A tilted or low robot has fallen, an upright one has not; step 1000 is at the time limit, and none before."""
    env, half = make(Toy, NOTHING), 0.81 / 2
    state = reset_worlds(env, 4)
    qpos = (
        state.data.qpos.at[1, 3:7]
        .set(jnp.array([math.cos(half), 0, math.sin(half), 0]))
        .at[2, 2]
        .set(0.49)
    )
    qvel = state.data.qvel.at[0, 6:].set(20.0)
    states = path(env, state.replace(data=state.data.replace(qpos=qpos, qvel=qvel)), 1001)
    np.testing.assert_array_equal(states.done, np.tile([0, 1, 1, 0], (1001, 1)))
    np.testing.assert_array_equal(
        states.info["truncated"], np.tile(np.arange(1, 1002)[:, None] >= 1000, 4)
    )
    assert not states.info["broken"].any() and (states.reward >= 0).all()
    total = sum(value for name, value in states.metrics.items() if name.startswith("reward_"))
    np.testing.assert_allclose(states.reward, np.maximum(total, 0), atol=1e-6)
    assert (total < 0).any() and (total > 0).any()


@functools.cache
def make_state(env, mesh):
    """The start of a run, as `train` builds it."""
    shardings = jax.tree.map(partial(NamedSharding, mesh), unitree.STATE_SPEC)
    init = jax.jit(
        unitree.init_train_state, static_argnames=("args", "env"), out_shardings=shardings
    )
    key = jax.random.key(env.run_args.seed)
    return init.lower(env.run_args, env, key).compile(QUICK)(key)


@functools.cache
def run_rollout(env, mesh):
    def one_device(state):
        return unitree.rollout(env.run_args, env, state.learner, state.worlds)

    specs = {"in_specs": (unitree.STATE_SPEC,), "out_specs": (P("devices"), P(None, "devices"))}
    program = jax.shard_map(one_device, mesh=mesh, check_vma=False, **specs)
    return jax.tree.map(as_numpy, run(program, make_state(env, mesh)))


def test_rollout_of_short_episodes(make_mesh):
    """Observations follow each other, ends are kept, the next episode starts elsewhere; only whole ones are counted."""
    env, mesh = make(Short, USUAL), make_mesh(1)
    state, (worlds, steps) = make_state(env, mesh), run_rollout(env, mesh)
    started = as_numpy(state.worlds.env_state.info["elapsed"])
    # Clocks start at random, so that time limits do not come all at once.
    assert set(started) == set(range(5))
    assert not steps.terminated.any()
    time = started + np.arange(1, 9)[:, None]
    np.testing.assert_array_equal(steps.done, time % 5 == 0)
    np.testing.assert_array_equal(steps.end.env_state.info["truncated"], steps.done)
    assert steps.valid.all()
    np.testing.assert_array_equal(steps.finished, (time == 10) | (time == 5) & (started == 0))
    assert steps.finished.any() and (steps.done & ~steps.finished).any()
    for name in ("actor", "critic"):
        after = np.concatenate([steps.start.obs[name][1:], worlds.env_state.obs[name][None]])
        same = np.isclose(after, steps.end.env_state.obs[name], rtol=1e-5, atol=1e-5).all(axis=-1)
        np.testing.assert_array_equal(same, ~steps.done)
    starts = np.concatenate(
        [steps.start.obs["critic"][0], steps.start.obs["critic"][1:][steps.done[:-1]]]
    )
    assert len(np.unique(starts, axis=0)) == len(starts) > 128  # also of one world
    rewards, late = steps.end.env_state.reward, started == 2  # these end after 3 and 8 steps
    np.testing.assert_allclose(
        steps.end.episode_return[7, late], rewards[3:, late].sum(axis=0), rtol=1e-4
    )
    powers = USUAL.gamma ** np.arange(5)[::-1, None]
    np.testing.assert_allclose(
        steps.end.discounted_return[7, late], (powers * rewards[3:, late]).sum(axis=0), rtol=1e-4
    )
    np.testing.assert_array_equal(steps.end.episode_length[7, late], 5)
    stats = jax.tree.map(as_numpy, state.learner.obs_stats["actor"])
    mean = unitree.make_networks(USUAL, env)[0].apply(
        state.learner.params["actor"], unitree.normalize(stats, steps.start.obs["actor"])
    )
    np.testing.assert_allclose(steps.mean, mean, atol=1e-5)
    noise = (steps.action - steps.mean) / np.exp(USUAL.init_log_std)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    # No two worlds or steps share their noise.
    assert len(np.unique(noise.round(5))) > 0.9 * noise.size


@pytest.mark.slow  # the next one trains on two devices, and test_rollout.py has this for ppo_mjx.py
def test_two_devices_give_the_same_rollout(make_mesh):
    """The worlds do not notice how many devices share them."""
    one, two = (run_rollout(make(Short, USUAL), make_mesh(devices)) for devices in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, two)


def test_broken_world_does_not_reach_the_networks(make_mesh):
    """Training on two devices goes on with finite numbers, counts the reset, and keeps one learner."""
    env, mesh = make(Short, USUAL), make_mesh(2)
    # To be donated.
    state = jax.tree.map(lambda x: jax.device_put(jnp.copy(x), x.sharding), make_state(env, mesh))
    data = state.worlds.env_state.data
    data = data.replace(qvel=jax.device_put(data.qvel.at[3, 0].set(jnp.nan), data.qvel.sharding))
    state = state.replace(
        worlds=state.worlds.replace(env_state=state.worlds.env_state.replace(data=data))
    )
    state, metrics = unitree.train_iteration.lower(USUAL, env, mesh, state).compile(QUICK)(state)
    # In the box of the device that holds the world.
    assert metrics.pop("black_box")["broken"].any(axis=1).sum() == 1
    assert metrics["charts/nan_resets"] == 1 and metrics["charts/falls"] == 0
    assert all(np.isfinite(as_numpy(x)).all() for x in jax.tree.leaves(state))
    assert all(np.isfinite(x) for x in metrics.values()) and metrics["charts/episodic_length"] == 5
    np.testing.assert_array_equal(state.worlds.times_broken, np.arange(64) == 3)
    for stats in (*state.learner.obs_stats.values(), state.learner.return_stats):
        assert float(stats.count) == pytest.approx(511, abs=1e-2)  # not of the step that broke
    assert int(state.learner.iteration) == 1
    for leaf in jax.tree.leaves(state.learner):
        np.testing.assert_array_equal(*(as_numpy(shard.data) for shard in leaf.addressable_shards))


@functools.cache
def learn_program(env, mesh):
    """(state, worlds and steps of a rollout) -> learner and metrics of an iteration with that rollout."""

    def one_device(state, worlds, steps):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(unitree, "rollout", lambda *_: (worlds, steps))
            patch.setattr(unitree, "black_box", lambda *_: {})
            state, metrics, _ = unitree.device_iteration(env.run_args, env, state)
        return state.learner, metrics

    specs = {"in_specs": (unitree.STATE_SPEC, P(), P()), "out_specs": P(), "check_vma": False}
    return jax.jit(jax.shard_map(one_device, mesh=mesh, **specs), compiler_options=QUICK)


@pytest.mark.parametrize("reward", [1e6, math.nan])
def test_broken_steps_are_not_learnt_from(make_mesh, reward):
    """Whatever is in the steps of two worlds that break again and again: an iteration learns what it learns if these
    steps earned nothing, and the step before a broken one keeps what the state that it reached promised."""
    env, mesh = make(Short, USUAL), make_mesh(1)
    state, (worlds, steps) = make_state(env, mesh), run_rollout(env, mesh)
    breaks = np.zeros((8, 64), bool)
    breaks[2:7, 5] = breaks[3, 9] = True

    def learn(value):
        end = steps.end.env_state.replace(
            reward=np.where(breaks, value, steps.end.env_state.reward)
        )
        returns = np.where(breaks, value, steps.end.discounted_return)
        start = steps.start.replace(info={})
        changed = steps.replace(
            valid=~breaks,
            start=start,
            end=steps.end.replace(
                env_state=end.replace(info={"broken": breaks}), key=None, discounted_return=returns
            ),
        )
        changed = jax.tree.map(jnp.asarray, changed)
        return jax.tree.map(
            as_numpy, learn_program(env, mesh)(state, worlds.replace(key=None), changed)
        )

    (learner, metrics), (expected, expected_metrics) = learn(reward), learn(0.0)
    assert_same(learner, expected)
    assert_same(metrics, expected_metrics)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(learner))
    value, ones = np.full((8, 64), 2.0, np.float32), np.ones((8, 64), np.float32)
    advantage, target = unitree.compute_gae(USUAL, ones, value, 3 * ones, breaks, breaks, ~breaks)
    # Bootstraps, and looks no further.
    np.testing.assert_allclose(advantage[1, 5], 1 + 0.99 * 3 - 2, rtol=1e-6)
    assert not np.asarray(advantage)[breaks].any() and advantage.shape == target.shape == (8, 64)


def random_policy(seed: int) -> dict[str, np.ndarray]:
    """Arrays as in policy.npz, of a network that does something of its own in every state."""
    random, sizes = np.random.default_rng(seed), (47, 32, 16, 12)
    policy = {"obs_mean": random.normal(0, 0.1, 47), "obs_var": random.uniform(0.5, 2, 47)}
    for i, (rows, columns) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        policy |= {
            f"w{i}": random.normal(0, 1 / math.sqrt(rows), (rows, columns)),
            f"b{i}": random.normal(0, 0.1, columns),
        }
    return {
        name: values.astype(np.float32) for name, values in policy.items()
    } | unitree.mirror_rules(ROBOT)


# ---- Loss and update


class TinyRobot(unitree.Robot):
    """One joint a leg, about x."""

    mirror_sign = np.array([-1.0, -1.0])


TINY = types.SimpleNamespace(  # all that the loss asks of an environment
    action_size=2,
    robot=TinyRobot(
        **{field.name: getattr(ROBOT, field.name) for field in dataclasses.fields(ROBOT)}
        | {
            "joints": unitree.both_legs(
                {"hip": unitree.Joint(stiffness=1, damping=1, lift=0.3, sweep=(0.1, 0.2, 0.4))}
            ),
            "action_scale": 0.5,
            "stance_share": 0.6,
        }
    ),
)


def dense(random, *sizes) -> dict:
    return {
        "params": {
            f"Dense_{i}": {
                "kernel": jnp.asarray(0.3 * random.standard_normal(shape), jnp.float32),
                "bias": jnp.asarray(0.3 * random.standard_normal(shape[1]), jnp.float32),
            }
            for i, shape in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
        }
    }


def by_hand(layers: dict, stats, x) -> np.ndarray:
    """A network of one hidden ELU layer on normalised observations, in double precision."""
    first, last = (
        jax.tree.map(np.float64, layers["params"][name]) for name in ("Dense_0", "Dense_1")
    )
    x = np.clip((x - np.float64(stats.mean)) / np.sqrt(np.float64(stats.var) + 1e-8), -10, 10)
    x = x @ first["kernel"] + first["bias"]
    return np.where(x > 0, x, np.exp(x) - 1) @ last["kernel"] + last["bias"]


def tiny_learner(random, hidden: int = 3):
    def stats(size: int):
        return unitree.RunningStats(
            jnp.float32(9),
            *(jnp.asarray(random.uniform(0.5, 1.5, size), jnp.float32) for _ in range(2)),
        )

    params = {"actor": dense(random, 17, hidden, 2), "critic": dense(random, 20, hidden, 1)}
    params["log_std"] = jnp.array([-0.5, -0.3])
    return unitree.Learner(
        params,
        params["actor"],
        None,
        jnp.float32(1e-3),
        jnp.float32(1),
        {"actor": stats(17), "critic": stats(20)},
        None,
        jax.random.key(0),
        jnp.array(0),
    )


def test_policy_is_averaged():
    """The latest parameters have a share of 1 / (a tenth of the iterations), those before what is left; 0: the last."""
    random = np.random.default_rng(0)
    learner = tiny_learner(random)
    last = dense(random, 17, 3, 2)
    learner = learner.replace(params=learner.params | {"actor": last})
    for share, weight in ((0.1, 0.2), (0.0, 1.0)):
        args = dataclasses.replace(USUAL, policy_average=share)
        args = dataclasses.replace(args, total_timesteps=50 * args.steps_per_iteration)
        jax.tree.map(
            lambda new, before, after, weight=weight: np.testing.assert_allclose(
                after, weight * new + (1 - weight) * before, atol=1e-6
            ),
            last,
            learner.averaged,
            unitree.average_policy(args, learner),
        )


@pytest.mark.parametrize(("imitation_coef", "iteration"), [(0, 1), (0.4, 1), (0.4, 6)])
def test_loss_by_hand(imitation_coef, iteration):
    """Three samples: a ratio clipped from above, one from below, one free; all terms from first principles."""
    random = np.random.default_rng(0)
    learner = tiny_learner(random).replace(iteration=jnp.array(iteration))
    params = learner.params | {"log_std": jnp.array([-0.4, -0.6])}
    actor_obs, critic_obs = random.standard_normal((3, 17)), random.standard_normal((3, 20))
    actor_obs[:2, 6:9] = 0  # the command to stand
    mean = by_hand(params["actor"], learner.obs_stats["actor"], actor_obs)
    value = by_hand(params["critic"], learner.obs_stats["critic"], critic_obs)[:, 0]
    std, old_std = np.exp([-0.4, -0.6]), np.exp([-0.5, -0.3])
    action, ratio = mean + std * [[1.5, -1.2], [-1.3, 1.6], [1.4, 1.4]], np.array([1.5, 0.6, 1.1])
    density = np.prod(
        np.exp(-0.5 * ((action - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi)), axis=1
    )
    # Such that the old policy's density is density / ratio: off along the first number alone.
    old_mean = action.copy()
    old_mean[:, 0] += old_std[0] * np.sqrt(
        -2 * np.log(density / ratio * np.prod(old_std) * 2 * math.pi)
    )
    advantage, target = np.array([2.0, -1.0, 0.5]), np.array([1.5, -0.5, 3.0])
    args = unitree.Args(
        hidden_sizes=(3,),
        clip_coef=0.2,
        vf_coef=0.5,
        num_envs=5,
        num_steps=2,
        total_timesteps=100,
        imitation_coef=imitation_coef,
        imitation_until=0.4,
    )
    batch = unitree.Batch(
        *jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float32),
            ({"actor": actor_obs, "critic": critic_obs}, action, old_mean, advantage, target),
        ),
        jnp.full(3, True),
    )
    # A broken world's step.
    wrong = jax.tree.map(lambda x: 1e3 + 0 * x[:1], batch).replace(valid=jnp.array([False]))
    batch = jax.tree.map(lambda *x: jnp.concatenate(x), batch, wrong)
    loss, metrics = run(
        partial(unitree.ppo_loss, args, TINY), learner, params, batch, jnp.float32(0.01)
    )

    grid = np.linspace(-12, 12, 200_001)

    def divergence(m0, s0, m1, s1):  # of two normal densities, by integration
        log0, log1 = (-0.5 * ((grid - m) / s) ** 2 - math.log(s) for m, s in ((m0, s0), (m1, s1)))
        return (np.exp(log0) * (log0 - log1)).sum() * (grid[1] - grid[0]) / math.sqrt(2 * math.pi)

    kl = (
        sum(
            divergence(old_mean[i, j], old_std[j], mean[i, j], std[j])
            for i in range(3)
            for j in range(2)
        )
        / 3
    )
    stepping = np.zeros((3, 2))
    for i, leg in np.ndindex(3, 2):
        phase = (math.atan2(*actor_obs[i, 15:]) / (2 * math.pi) + 0.02 / 0.8 + leg / 2) % 1
        ahead = (
            math.cos(math.pi * phase / 0.6)
            if phase < 0.6
            else -math.cos(math.pi * (phase - 0.6) / 0.4)
        )
        sweep = actor_obs[i, 6:9] @ [0.1 / 2, 0.2 / 2, 0.4 / 0.25]
        stepping[i, leg] = (
            (sweep * ahead + 0.3 * math.sin(math.pi * max(0, phase - 0.6) / 0.4)) / 0.5
            if i == 2
            else 0
        )
    weight = max(0.0, 1 - iteration * 10 / 40)
    # Ratios 1.5, 0.6 and 1.1, clipped where that is worse.
    policy_loss = -(2.0 * 1.2 + -1.0 * 0.8 + 0.5 * 1.1) / 3
    entropy = np.log(std * math.sqrt(2 * math.pi * math.e)).sum()
    expected = {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": 0.5 * ((value - target) ** 2).mean(),
        "losses/entropy": entropy,
        "losses/clipfrac": 2 / 3,
        "losses/kl": kl,
        "losses/imitation_loss": (weight * (mean - stepping) ** 2).mean(),
    }
    expected["losses/loss"] = (
        policy_loss
        - 0.01 * entropy
        + 0.5 * expected["losses/value_loss"]
        + imitation_coef * expected["losses/imitation_loss"]
    )
    assert metrics.keys() == expected.keys()
    assert (expected["losses/imitation_loss"] > 0.01) == (iteration < 4)
    for name, number in expected.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-3, err_msg=name)
    assert loss == metrics["losses/loss"]


UPDATE_ARGS = unitree.Args(
    hidden_sizes=(3,),
    num_envs=4,
    num_steps=4,
    num_minibatches=1,
    update_epochs=1,
    imitation_coef=0.0,
    total_timesteps=16 * 4,
    ent_coef=0.02,
    final_ent_coef=0.01,
    learning_rate=1e-3,
    desired_kl=0.01,
    vf_coef=1.0,
)


@pytest.fixture(scope="module")
def update(make_mesh):
    """(args, rate, iteration, KL divergence of the first minibatch) -> learner and metrics, and the learner before."""
    programs = {}

    def run(args, rate: float = 1e-3, iteration: int = 0, kl: float = 0.0):
        random = np.random.default_rng(0)
        learner = tiny_learner(random)
        opt_state = unitree.make_optimizer(args).init(
            jax.flatten_util.ravel_pytree(learner.params)[0]
        )
        learner = learner.replace(
            opt_state=opt_state, learning_rate=jnp.float32(rate), iteration=jnp.array(iteration)
        )
        obs = {
            "actor": random.standard_normal((16, 17)),
            "critic": random.standard_normal((16, 20)),
        }
        mean = by_hand(learner.params["actor"], learner.obs_stats["actor"], obs["actor"])
        # At equal std, the divergence is (shift / std)^2 / 2.
        old_mean = mean + [math.exp(-0.5) * math.sqrt(2 * kl), 0]
        action = mean + random.standard_normal((16, 2))
        (advantage, target) = random.standard_normal((2, 16))
        batch = unitree.Batch(
            *jax.tree.map(
                lambda x: jnp.asarray(x, jnp.float32), (obs, action, old_mean, advantage, target)
            ),
            jnp.full(16, True),
        )
        if args not in programs:
            program = jax.shard_map(
                partial(unitree.update, args, TINY),
                mesh=make_mesh(1),
                in_specs=(P(), P()),
                out_specs=(P(), P()),
                check_vma=False,
            )
            programs[args] = jax.jit(program).lower(learner, batch).compile(QUICK)
        return *programs[args](learner, batch), learner

    return run


@pytest.mark.parametrize(
    ("rate", "factor", "expected"),
    [
        (1e-3, 0.4, 1.5e-3),
        (1e-3, 0.6, 1e-3),
        (1e-3, 1.9, 1e-3),
        (1e-3, 2.1, 1e-3 / 1.5),
        (8e-3, 0.1, 1e-2),
        (1.2e-5, 3.0, 1e-5),
    ],
)
def test_step_size_follows_the_kl_divergence(update, rate, factor, expected):
    """rsl_rl's rule, at its four edges and two bounds, for the iterations that follow."""
    learner, metrics, before = update(UPDATE_ARGS, rate=rate, kl=0.01 * factor)
    assert metrics["losses/kl"] == pytest.approx(0.01 * factor, rel=1e-3)
    assert learner.learning_rate == pytest.approx(expected, rel=1e-5)
    moved = np.abs(
        np.concatenate(
            [
                np.ravel(a - b)
                for a, b in zip(
                    jax.tree.leaves(learner.params), jax.tree.leaves(before.params), strict=True
                )
            ]
        )
    )
    # Adam's first step; small numbers round the rest.
    assert moved.max() == pytest.approx(rate, rel=0.05)
    assert metrics["charts/learning_rate"] == before.learning_rate and int(learner.iteration) == 1


def test_step_size_without_a_divergence_falls_linearly(update):
    """Without --desired-kl, to 0 at the end; what the divergence is does not matter."""
    args = dataclasses.replace(UPDATE_ARGS, desired_kl=None, learning_rate=4e-3)
    rates = [
        float(update(args, rate=1.0, iteration=i, kl=i / 10)[1]["charts/learning_rate"])
        for i in range(4)
    ]
    np.testing.assert_allclose(rates, [4e-3, 3e-3, 2e-3, 1e-3], rtol=1e-5)


def test_step_size_changes_once_an_iteration(update):
    """By the mean divergence of all minibatches of all epochs."""
    args = dataclasses.replace(UPDATE_ARGS, num_minibatches=2, update_epochs=3, desired_kl=100.0)
    learner, _, _ = update(args, rate=2e-5)
    assert (
        learner.learning_rate == pytest.approx(3e-5, rel=1e-4)
        and int(learner.opt_state.inner_state.count) == 6
    )


def test_entropy_bonus_falls_linearly(update):
    """From --ent-coef to --final-ent-coef, over all iterations: read off the loss."""
    seen = []
    for iteration in range(4):
        _, metrics, _ = update(UPDATE_ARGS, iteration=iteration)
        terms = {name.removeprefix("losses/"): float(value) for name, value in metrics.items()}
        seen.append((terms["policy_loss"] + terms["value_loss"] - terms["loss"]) / terms["entropy"])
    np.testing.assert_allclose(seen, [0.02, 0.0175, 0.015, 0.0125], atol=1e-5)


# ---- Whole runs

LEARN = dataclasses.replace(  # to stand, on a robot that is always the same
    NOTHING,
    num_devices=2,
    num_envs=256,
    num_steps=24,
    total_timesteps=60 * 256 * 24,
    friction=(1.0, 1.0),
    gamma=0.97,
    num_minibatches=16,
    update_epochs=10,
    learning_rate=3e-3,
    desired_kl=0.1,
    ent_coef=0.0,
    init_log_std=-0.5,
    hidden_sizes=(64, 64),
    imitation_coef=0.0,
)
SHORT = dataclasses.replace(
    LEARN,
    num_envs=64,
    total_timesteps=12 * 64 * 24,
    update_epochs=2,
    checkpoint_every=8,
    policy_average=0.25,
)


@contextlib.contextmanager
def watched(judge: bool):
    """Keeps all states that `train` saves, in a list. judge: with the test in C MuJoCo at the end. Runs of the same
    settings share an environment, so that JAX traces and compiles once what they share."""
    states, real_save = [], unitree.save
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def save(args, run_dir, state, policy):
        states.append(jax.tree.map(as_numpy, state))
        real_save(args, run_dir, state, policy)

    with pytest.MonkeyPatch.context() as patch:
        quick_kernels(patch)
        patch.setattr(unitree, "save", save)
        patch.setattr(unitree, "Env", partial(make, unitree.Env))
        if judge:  # one short start for each command
            patch.setattr(unitree, "TEST_STARTS", 1)
            patch.setattr(unitree, "TEST_STEPS", 100)
        else:
            patch.setattr(unitree, "judge", lambda *_: {"passed": False})
        yield states
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train(args, folder: Path):
    """The folder of a run, and its last state."""
    with watched(judge=False) as states:
        run_dir, _ = unitree.train(dataclasses.replace(args, runs_dir=str(folder)))
    return run_dir, states[-1]


@pytest.fixture(scope="module")
def trained(make_mesh, tmp_path_factory):
    """A short run on two devices, with checkpoints after 8 and 12 iterations: its folder and last state."""
    make_mesh(2)
    return train(SHORT, tmp_path_factory.mktemp("runs"))


def load_policy(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as arrays:
        return dict(arrays)


def act(policy: dict, obs) -> np.ndarray:
    """A policy's action; it has no memory."""
    memory, action = unitree.act(policy, (), obs)
    assert memory == ()
    return action


def episodes(step, state, policy: dict) -> np.ndarray:
    """Returns of WORLDS episodes of at most 4 s; without a policy, of no action."""
    alive, total = np.full(WORLDS, True), np.zeros(WORLDS)
    for _ in range(199):
        action = act(policy, np.asarray(state.obs["actor"])) if policy else np.zeros((WORLDS, 12))
        state = step(state, action)
        total += alive * np.asarray(state.reward)
        alive &= np.asarray(state.done) == 0
        if not alive.any():
            break
    return total


@pytest.mark.slow
def test_short_training_helps(make_mesh, tmp_path, step, starts):
    """After 60 iterations, a return is well above that of no action, by which the robot falls in about 1.2 s."""
    usual = {
        "stiffness": 1.0,
        "damping": 1.0,
        "strength": 1.0,
        "friction": 1.0,
        "delay": 0,
        "payload": 0,
    }
    alike = {
        name: jnp.full_like(starts.info["domain"][name], value) for name, value in usual.items()
    }
    start = with_domain(with_info(starts, command=jnp.zeros((WORLDS, 3))), **alike)
    make_mesh(2)
    with optimised():  # which the longer training pays for
        run_dir, _ = train(LEARN, tmp_path)
    before, after = (
        episodes(step, start, policy).mean() for policy in ({}, load_policy(run_dir / "policy.npz"))
    )
    # Observed: 6.3 to 10.2 with four seeds, and 3.2.
    assert after > 1.6 * before > 0, (before, after)


def test_run_folder(trained):
    """Every iteration logs every metric, every reward's term among them; run.json tells how to repeat the run."""
    run_dir, state = trained
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    iterations = SHORT.num_iterations
    steps = SHORT.steps_per_iteration
    names = (
        "policy_loss value_loss entropy clipfrac kl imitation_loss loss grad_norm "
        "explained_variance"
    ).split()
    tags = {f"losses/{name}" for name in names} | {f"reward/{name}" for name in ROBOT.weights}
    charts = "learning_rate SPS nan_resets skipped_updates skipped_in_a_row falls episodes_finished".split()
    tags |= {f"charts/{name}" for name in charts}
    for tag in tags:
        events = log.Scalars(tag)
        assert [event.step for event in events] == [steps * i for i in range(1, iterations + 1)], (
            tag
        )
        assert all(math.isfinite(event.value) for event in events), tag
    others = log.Tags()["scalars"]
    assert tags | {"charts/episodic_return", "charts/episodic_length"} <= set(others)
    assert all(event.value == 0 for event in log.Scalars("charts/nan_resets"))
    best = 0.02 * ROBOT.weights["alive"]
    np.testing.assert_allclose(
        [event.value for event in log.Scalars("reward/alive")], best, rtol=1e-5
    )
    np.testing.assert_allclose(
        state.learner.obs_stats["critic"].count, iterations * steps, rtol=1e-4
    )
    run = json.loads((run_dir / "run.json").read_text())
    assert len(run["devices"]) == 2 and run["versions"]["mujoco"] == run["versions"]["mujoco-mjx"]
    assert unitree.read_run(run_dir) == dataclasses.replace(SHORT, runs_dir=str(run_dir.parent))
    assert run["evaluation"] == {"passed": False} and run["train_s"] > 0


def test_exported_policy_is_the_actor(trained, env):
    """policy.npz, run by NumPy, acts as the trained network's mean, and so does the ONNX file."""
    learner, policy = trained[1].learner, load_policy(trained[0] / "policy.npz")
    obs = np.random.default_rng(0).normal(0, 3, (50, 47)).astype(np.float32)
    obs[0] = 1e6  # beyond what the normaliser lets pass

    def mirrored(obs):
        return mirror_critic(np.concatenate([np.zeros((len(obs), 3)), obs], axis=1))[:, 3:]

    actor, _ = unitree.make_networks(LEARN, env)
    half_step = math.pi / 40
    second_half = (obs[:, 45:] @ [math.cos(half_step), math.sin(half_step)] < 0)[:, None]
    seen = np.where(second_half, mirrored(obs), obs).astype(np.float32)
    seen = unitree.normalize(learner.obs_stats["actor"], seen)
    mean = actor.apply(learner.averaged, seen)
    assert np.abs(mean - actor.apply(learner.params["actor"], seen)).max() > 1e-3
    mean = np.where(second_half, mirror_joints(mean), mean)
    assert np.ptp(mean) > 0.5 and 0.2 < second_half.mean() < 0.8
    # Whatever it has learnt.
    np.testing.assert_allclose(act(policy, mirrored(obs)), mirror_joints(mean), atol=1e-5)
    np.testing.assert_allclose(act(policy, obs), mean, atol=1e-5)
    np.testing.assert_allclose(act(policy, obs[3]), mean[3], atol=1e-5)
    onnx, file = pytest.importorskip("onnx"), trained[0] / "policy.onnx"
    export.main([str(trained[0])])  # takes the script that run.json names
    onnx.checker.check_model(onnx.load(file), full_check=True)
    (action,) = (
        pytest.importorskip("onnx.reference").ReferenceEvaluator(str(file)).run(None, {"obs": obs})
    )
    np.testing.assert_allclose(action, mean, atol=1e-5)
    assert action.dtype == np.float32 and action.shape == (50, 12)


def test_exported_memory_is_input_and_output(tmp_path):
    """A script's policy that remembers: the graph takes what it gave before."""
    pytest.importorskip("onnx")

    def act(policy, memory, obs, xp=np):
        memory = xp.tanh(0.5 * memory + obs @ policy["w0"])
        return memory, 2.0 * memory - 1.0

    script = types.SimpleNamespace(act=act, initial_memory=lambda batch=(): np.zeros((*batch, 3)))
    policy = {"obs_mean": np.zeros(4), "w0": np.random.default_rng(0).standard_normal((4, 3))}
    export.write_onnx(script, policy, tmp_path / "policy.onnx")
    graph = pytest.importorskip("onnx.reference").ReferenceEvaluator(str(tmp_path / "policy.onnx"))
    memory = expected = np.zeros((2, 3), np.float32)
    for obs in np.random.default_rng(1).standard_normal((3, 2, 4)).astype(np.float32):
        action, memory = graph.run(None, {"obs": obs, "memory_0": memory})
        expected, wanted = act(policy, expected, obs)
        np.testing.assert_allclose(memory, expected, atol=1e-6)
        np.testing.assert_allclose(action, wanted, atol=1e-6)


@pytest.mark.parametrize("content", [{}, {"run.json": "{}", "policy.npz": "garbage"}])
def test_export_refuses_what_is_no_run(tmp_path, capsys, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stop:
        export.main([str(tmp_path)])
    assert (
        stop.value.code == 2
        and str(tmp_path) in capsys.readouterr().err
        and not list(tmp_path.glob("*.onnx"))
    )


def test_resumed_is_uninterrupted(trained, tmp_path):
    """From the checkpoint before the last one, the run ends in the same state to the bit, and is put to the test."""
    run_dir, state = shutil.copytree(trained[0], tmp_path / "copy"), trained[1]
    unitree.checkpoints(run_dir)[0].unlink()
    with watched(judge=True) as states:
        unitree.train(unitree.read_run(run_dir), run_dir)
    assert [int(state.learner.iteration) for state in states] == [SHORT.num_iterations]
    assert_same(states[0], state)
    result = json.loads((run_dir / "run.json").read_text())["evaluation"]
    assert not result["passed"] and len(result["table"]) == 2 * len(ROBOT.test_commands)


@pytest.mark.parametrize(("factor", "well"), [(1.0, True), (1.001, False), (math.nan, False)])
def test_smoke_compares_a_resumed_run(monkeypatch, capsys, tmp_path, factor, well):
    """--smoke trains, resumes from the middle and compares; it says so or ends with 1, and leaves nothing behind."""
    runs = []

    def train(args, run_dir=None):
        runs.append(args)
        if run_dir is None:
            run_dir = Path(args.runs_dir) / "run"
            (run_dir / "checkpoints").mkdir(parents=True)
            unitree.write_run(run_dir, {"args": dataclasses.asdict(args)})
            for name in ("000000002.npz", "000000004.npz"):
                (run_dir / "checkpoints" / name).touch()
            return run_dir, {"w0": np.ones(3)}
        assert [file.name for file in unitree.checkpoints(run_dir)] == ["000000002.npz"]
        return run_dir, {"w0": np.array([1.0, factor, 1.0])}

    monkeypatch.setattr(unitree, "train", train)
    monkeypatch.setattr(unitree.tempfile, "tempdir", str(tmp_path))
    with contextlib.nullcontext() if well else pytest.raises(SystemExit) as stop:
        unitree.main(["--smoke"])
    assert ("all is well" in capsys.readouterr().out) == well and (well or stop.value.code == 1)
    assert runs[0].num_iterations == 4 and runs[0].checkpoint_every == 2 and len(runs) == 2
    assert not list(tmp_path.iterdir())


# ---- Bad calls

BAD_CALLS = [
    "--robot r2d2",
    "--num-envs 0",
    "--num-devices 1000",
    "--num-minibatches 7",
    "--total-timesteps 100",
    "--gamma nan",
    "--decimation 0",
    "--command-x 1.0 0.5",
    "--command-x 1.0",
    "--friction 0 1",
    "--added-mass -20 0",
    "--action-delay 1.5",
    "--standing -0.1",
    "--obs-noise -1",
    "--push-every 0",
    "--command-every nan",
    "--desired-kl -1",
    "--desired-kl 0",
    "--imitation-coef -1",
    "--hidden-sizes 0",
    "--init-log-std 1e6",
    "--no-such-flag",
    "stray",
    "--resume missing",
    "--evaluate missing",
    "--evaluate garbage",
    "--resume started --gamma 0.5",
    "--runs-dir a_file/below",
    "--track",
]


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_call_ends_with_one_line(tmp_path, monkeypatch, capsys, call):
    """What cannot run is refused by code 2 and one line that names the culprit, and leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    # No optional package is there.
    monkeypatch.setattr(unitree.importlib.util, "find_spec", lambda name: None)
    Path("a_file").touch()
    for folder in ("garbage", "started"):
        Path(folder).mkdir()
        unitree.write_run(Path(folder), {"args": dataclasses.asdict(unitree.Args())})
    Path("garbage", "policy.npz").write_bytes(b"garbage")
    before = set(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        unitree.main(call.split())
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and error.startswith("error: ")
        and error.count("\n") == 1
        and len(error) > 20
    )
    assert (
        call.split()[0].removeprefix("--") in error or call.split()[-1] in error or "num-" in error
    )
    assert set(Path().rglob("*")) == before


def test_copy_without_its_robots_says_so(monkeypatch, capsys, tmp_path):
    """One line that names the missing file, before anything is built."""
    monkeypatch.setattr(unitree, "MODELS", tmp_path / "robots")
    with pytest.raises(SystemExit) as stop:
        unitree.main([])
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and error.count("\n") == 1
        and str(tmp_path / "robots" / ROBOT.mjcf) in error
    )


def test_flags_default_to_the_robots_own(monkeypatch, capsys):
    """What a row says of the commands and of the training's length holds, where the command line says nothing."""
    monkeypatch.setitem(unitree.ROBOTS, "g1", dataclasses.replace(ROBOT, command_x=(-0.1, 0.2)))
    seen = []
    monkeypatch.setattr(unitree, "start_jax", lambda args: None)
    monkeypatch.setattr(unitree, "train", lambda args, run_dir: seen.append(args))
    unitree.main(["--command-y", "-0.2", "0.2"])
    expected = dataclasses.replace(
        unitree.default_args("g1"), command_x=(-0.1, 0.2), command_y=(-0.2, 0.2)
    )
    assert seen == [expected]


# ---- The policy on the robot's own computer


def deploy(policy: dict, command, qpos, seconds: float) -> dict[str, np.ndarray]:
    """The loop that Unitree's deployment in MuJoCo runs, written anew: the script gives the MJCF alone. Torques by hand
    500 times a second, every tenth time a new action; until the first one, the default pose."""
    model = unitree.load_model(ROBOT, 0.002)
    data = mujoco.MjData(model)
    data.qpos[:], target, action, rows = qpos, DEFAULT.copy(), np.zeros(12), []
    layers = [
        (policy[f"w{i}"], policy[f"b{i}"])
        for i in range(sum(name.startswith("w") for name in policy))
    ]
    for counter in range(1, round(seconds / 0.002) + 1):
        data.ctrl[:] = (target - data.qpos[7:]) * KP + (0 - data.qvel[6:]) * KD
        mujoco.mj_step(model, data)
        if counter % 10 == 0:
            w, x, y, z = data.qpos[3:7]
            clock = 2 * math.pi * (counter * 0.002 % FACTS["gait_period"]) / FACTS["gait_period"]
            obs = np.zeros(47)
            obs[:3] = 0.25 * data.qvel[3:6]
            obs[3:6] = 2 * (w * y - x * z), -2 * (w * x + y * z), 2 * (x * x + y * y) - 1
            obs[6:9] = np.array(command) * [2, 2, 0.25]
            obs[9:21], obs[21:33], obs[33:45] = (
                data.qpos[7:] - DEFAULT,
                0.05 * data.qvel[6:],
                action,
            )
            obs[45:] = math.sin(clock), math.cos(clock)
            second_half = counter // 10 % 40 >= 20
            # What the networks see is the mirrored robot, which is half a period earlier.
            if second_half:
                obs = mirror_critic(np.concatenate([np.zeros(3), obs])[None])[0, 3:]
            hidden = np.clip(
                (obs - policy["obs_mean"]) / np.sqrt(policy["obs_var"] + 1e-8), -10, 10
            )
            for weights, biases in layers[:-1]:
                hidden = hidden @ weights + biases
                hidden = np.where(hidden > 0, hidden, np.exp(np.minimum(hidden, 0)) - 1)
            action = hidden @ layers[-1][0] + layers[-1][1]
            action = mirror_joints(action) if second_half else action
            target = DEFAULT + FACTS["action_scale"] * action
            velocity = rotation(data.qpos[3:7]).T @ data.qvel[:3]
            rows.append(
                {
                    "action": action,
                    "qpos": data.qpos.copy(),
                    "velocity": np.append(velocity[:2], data.qvel[5]),
                }
            )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def test_deployment_loop_does_the_same():
    """From the same start, the same policy takes the same way in Unitree's loop and in CMujocoEnv."""
    original = unitree.CMujocoEnv(ROBOT)
    policy = random_policy(1)
    command = np.array([0.5, -0.2, 0.3])
    original.reset(3)
    seen = deploy(policy, command, original.data.qpos, 1.0)
    original.step(np.zeros(12))  # until its first action, the loop holds the default pose
    for t in range(49):
        action = act(policy, original.observe(command))
        np.testing.assert_allclose(action, seen["action"][t], atol=1e-6, err_msg=t)
        np.testing.assert_allclose(original.data.qpos, seen["qpos"][t], atol=1e-6)
        row = original.step(action)
        np.testing.assert_allclose(row["velocity"], seen["velocity"][t + 1], atol=1e-5)
    assert np.ptp(seen["action"], axis=0).min() > 0.1 and np.ptp(seen["qpos"], axis=0).min() > 0.01


POLICY = SCRIPT.parent / "docs" / "g1_policy.npz"


@pytest.mark.skipif(not POLICY.exists(), reason="no trained policy")
@pytest.mark.parametrize("command", [(0.6, 0.0, 0.0), (0.0, 0.0, 0.0)])
def test_trained_policy_in_the_deployment_loop(command):
    """Ten seconds of Unitree's loop from Unitree's start, all joints at 0: it walks as it is told, or stands."""
    start = np.array([0, 0, FACTS["file_height"], 1, *np.zeros(15)])
    seen = deploy(load_policy(POLICY), command, start, 10.0)
    up = np.array([rotation(quat)[2, 2] for quat in seen["qpos"][:, 3:7]])
    assert seen["qpos"][:, 2].min() > 0.6 and up.min() > math.cos(0.5)  # no fall
    if any(command):
        mean = np.array(
            [
                np.convolve(column, np.full(40, 1 / 40), "valid")
                for column in seen["velocity"][50:].T
            ]
        ).T
        # M/s, means over a gait period.
        assert np.linalg.norm((mean - command)[:, :2], axis=1).mean() < 0.15
        assert np.abs(mean[:, 2]).mean() < 0.2 and seen["qpos"][-1, 0] > 4
    else:
        assert np.linalg.norm(seen["qpos"][:, :2], axis=1).max() < 0.1


def test_each_push_of_the_test_is_followed_by_a_second(monkeypatch):
    """The pushes of 0.5 m/s come at four phases of a step, none so late that a fall would not be seen."""
    kicks = []

    class Still(unitree.CMujocoEnv):
        def step(self, action):
            kicks.append(np.linalg.norm(self.data.qvel[:2]))
            self.data.qvel[:] = 0
            return dict.fromkeys(("power", "slip"), 0.0) | {
                "velocity": np.zeros(3),
                "position": np.zeros(2),
                "action": action,
                "fallen": False,
            }

    unitree.drive(Still(ROBOT), random_policy(0), np.zeros(3), 0, True)
    (when,) = np.nonzero(kicks)
    assert len(kicks) == 500 and len(when) == 4 and when[-1] <= 500 - 50 and when[0] >= 50
    np.testing.assert_allclose(np.array(kicks)[when], 0.5)
    assert sorted(when % 20) == [0, 5, 10, 15]  # a step, of the left or the right foot, takes 20


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, True),
        ({"falls": 1}, False),
        ({"error": 0.16}, False),
        ({"yaw": 0.21}, False),
        ({"drift": 0.11}, False),
        ({"error": math.nan}, False),
    ],
)
def test_verdict(monkeypatch, capsys, change, passed):
    """PASS takes every limit; errors are means over the walking commands without pushes, the drift is that of standing
    without pushes, falls are all."""
    good, calls = {"falls": 0, "error": 0.14, "yaw": 0.19, "drift": 0.09}, []
    good |= dict.fromkeys(("sway", "jerk", "slip", "power"), 9.0)

    def drive(original, policy, command, seed, push):
        calls.append((tuple(command), seed, push))
        other = {} if any(command) and not push else {"error": 5.0, "yaw": 5.0}
        return good | other | ({"drift": 5.0} if push or any(command) else {}) | change

    monkeypatch.setattr(unitree, "drive", drive)
    result, out = unitree.judge(ROBOT, {}), capsys.readouterr().out
    assert result["passed"] == passed and ("PASS" in out) == passed and ("FAIL" in out) != passed
    assert len(set(calls)) == len(calls) == 2 * 8 * len(ROBOT.test_commands)
    assert {push for *_, push in calls} == {True, False} and {seed for _, seed, _ in calls} == set(
        range(8)
    )
    assert all(name in out for name in ROBOT.test_commands)
    if passed:
        assert (result["error"], result["yaw"], result["drift"]) == pytest.approx(
            (0.14, 0.19, 0.09)
        )


# ---- Source


def test_robot_names_are_in_the_table_only():
    """No code but ROBOTS and the settings knows a robot by name; docstrings and comments may."""
    source = SCRIPT.read_text()
    tree, kept = ast.parse(source), [True] * (len(source.splitlines()) + 1)
    for node in ast.walk(tree):
        table = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "ROBOTS"
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if table or text or isinstance(node, ast.ClassDef) and node.name in ("WorldArgs", "Args"):
            kept[node.lineno - 1 : node.end_lineno] = [False] * (node.end_lineno - node.lineno + 1)
    words = [
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type != tokenize.COMMENT and kept[token.start[0] - 1]
    ]
    assert len(words) > 5000
    assert not [
        token.line for token in words if re.search(r"(?i)\b(g1|h1|h1_2|go2)\b", token.string)
    ]
    assert set(unitree.ROBOTS) >= {"g1"}


def test_dependencies_are_pinned_alike():
    """Each package of the script's inline metadata (PEP 723) stands in requirements.txt with the same pin."""
    (block,) = re.findall(r"(?ms)^# /// script\n(.*?)^# ///$", SCRIPT.read_text())
    metadata = tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))
    lines = (
        line.split("#")[0].strip()
        for line in (SCRIPT.parent / "requirements.txt").read_text().splitlines()
    )
    assert set(metadata["dependencies"]) <= set(lines) and all(
        "==" in package for package in metadata["dependencies"]
    )


def test_every_setting_is_used():
    """No flag is without effect: each field of Args is read somewhere."""
    fields = {field.name for field in dataclasses.fields(unitree.Args)}
    read = {
        node.attr
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.Attribute)
        and (getattr(node.value, "id", None) or getattr(node.value, "attr", None))
        in ("args", "self")
    }
    assert fields - read == set()
