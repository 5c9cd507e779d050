"""The files in robots/ against numbers from their sources, typed here again or in tests/robots."""

import json
from pathlib import Path

import mujoco
import numpy as np
import pytest

from ppo_mjx_unitree import mjx

ROBOTS = Path(__file__).parent.parent / "robots"

# Of mujocolab/mjlab's G1, commit 0eda4e7. Motors by their largest torque in Nm: armature (kg m^2),
# stiffness (Nm/rad) and damping (Nm s/rad) of the servo.
G1_MASS = 33.341142  # kg
G1_MOTORS = {
    139: (0.0251019, 99.0984, 6.3088),
    88: (0.0101775, 40.1792, 2.55789),
    50: (0.00721945, 28.5012, 1.81445),
    25: (0.00360972, 14.2506, 0.907223),
    5: (0.00425, 16.7783, 1.06814),
}
# The joints in their order: name, axis, range in rad, largest torque.
G1_JOINTS = [
    ("left_hip_pitch", "y", -2.5307, 2.8798, 88),
    ("left_hip_roll", "x", -0.5236, 2.9671, 139),
    ("left_hip_yaw", "z", -2.7576, 2.7576, 88),
    ("left_knee", "y", -0.087267, 2.8798, 139),
    ("left_ankle_pitch", "y", -0.87267, 0.5236, 50),
    ("left_ankle_roll", "x", -0.2618, 0.2618, 50),
    ("right_hip_pitch", "y", -2.5307, 2.8798, 88),
    ("right_hip_roll", "x", -2.9671, 0.5236, 139),
    ("right_hip_yaw", "z", -2.7576, 2.7576, 88),
    ("right_knee", "y", -0.087267, 2.8798, 139),
    ("right_ankle_pitch", "y", -0.87267, 0.5236, 50),
    ("right_ankle_roll", "x", -0.2618, 0.2618, 50),
    ("waist_yaw", "z", -2.618, 2.618, 88),
    ("waist_roll", "x", -0.52, 0.52, 50),
    ("waist_pitch", "y", -0.52, 0.52, 50),
    ("left_shoulder_pitch", "y", -3.0892, 2.6704, 25),
    ("left_shoulder_roll", "x", -1.5882, 2.2515, 25),
    ("left_shoulder_yaw", "z", -2.618, 2.618, 25),
    ("left_elbow", "y", -1.0472, 2.0944, 25),
    ("left_wrist_roll", "x", -1.97222, 1.97222, 25),
    ("left_wrist_pitch", "y", -1.61443, 1.61443, 5),
    ("left_wrist_yaw", "z", -1.61443, 1.61443, 5),
    ("right_shoulder_pitch", "y", -3.0892, 2.6704, 25),
    ("right_shoulder_roll", "x", -2.2515, 1.5882, 25),
    ("right_shoulder_yaw", "z", -2.618, 2.618, 25),
    ("right_elbow", "y", -1.0472, 2.0944, 25),
    ("right_wrist_roll", "x", -1.97222, 1.97222, 25),
    ("right_wrist_pitch", "y", -1.61443, 1.61443, 5),
    ("right_wrist_yaw", "z", -1.61443, 1.61443, 5),
]
# With all bodies' poses, masses and inertias in it: the mass matrix's diagonal at the keyframe's
# angles, the base upright, without the motors' armature. The base's 6, legs, waist, arms.
# fmt: off
G1_DIAGONAL = [
    33.34114, 33.34114, 33.34114, 3.77672, 3.44593, 0.57306,
    0.85427, 0.63976, 0.12957, 0.11147, 0.00278, 0.00039,
    0.85427, 0.63985, 0.12948, 0.11147, 0.00278, 0.00039,
    0.2812, 0.7736, 0.55437,
    0.17485, 0.13237, 0.02742, 0.03445, 0.00037, 0.0048, 0.00184,
    0.17485, 0.13237, 0.02742, 0.03445, 0.00037, 0.0048, 0.00184,
]
# fmt: on
G1_CENTER = [0.035068, 0.000082, 0.668395]  # of mass, m, with the base at [0, 0, 0.7565]


@pytest.fixture
def g1() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_path(str(ROBOTS / "g1_29dof.xml"))


def test_g1_has_the_sources_joints_and_motors(g1):
    """Order, axes, ranges, armature, and one position servo for each joint, in the same order."""
    names, axes, low, high, torque = zip(*G1_JOINTS, strict=True)
    assert (g1.nq, g1.nv, g1.nu) == (36, 35, 29)
    assert [g1.joint(i).name for i in range(1, 30)] == [f"{name}_joint" for name in names]
    np.testing.assert_array_equal(g1.jnt_axis[1:], [np.eye(3)["xyz".index(axis)] for axis in axes])
    np.testing.assert_allclose(g1.jnt_range[1:], np.transpose([low, high]))
    assert g1.jnt_limited[1:].all()

    armature, stiffness, damping = np.transpose([G1_MOTORS[most] for most in torque])
    np.testing.assert_allclose(g1.dof_armature, [0.0] * 6 + armature.tolist())
    assert not g1.dof_damping.any() and not g1.dof_frictionloss.any()
    np.testing.assert_array_equal(g1.actuator_trnid[:, 0], np.arange(1, 30))
    np.testing.assert_allclose(g1.actuator_gainprm[:, 0], stiffness)
    np.testing.assert_allclose(g1.actuator_biasprm[:, 1:3], np.transpose([-stiffness, -damping]))
    np.testing.assert_allclose(g1.actuator_forcerange, np.transpose([np.negative(torque), torque]))
    np.testing.assert_allclose(g1.actuator_ctrlrange, g1.jnt_range[1:])
    assert g1.actuator_forcelimited.all() and g1.actuator_ctrllimited.all()


def test_g1_has_the_sources_masses(g1):
    """Total and centre of mass, and the mass matrix, which is wrong if any body is."""
    assert g1.body_mass.sum() == pytest.approx(G1_MASS, abs=1e-6)
    armature = g1.dof_armature.copy()
    g1.dof_armature[:] = 0
    data = mujoco.MjData(g1)
    data.qpos[:] = g1.key("stand").qpos
    data.qpos[:7] = [0, 0, 0.7565, 1, 0, 0, 0]
    mujoco.mj_forward(g1, data)
    np.testing.assert_allclose(data.subtree_com[1], G1_CENTER, atol=1e-6)
    np.testing.assert_allclose(mass_matrix(g1, data).diagonal(), G1_DIAGONAL, atol=1e-5)

    g1.dof_armature[:] = armature
    mujoco.mj_forward(g1, data)
    matrix = mass_matrix(g1, data)
    assert np.linalg.eigvalsh(matrix).min() > 0


def mass_matrix(model: mujoco.MjModel, data: mujoco.MjData) -> np.ndarray:
    matrix = np.zeros((model.nv, model.nv))
    mujoco.mj_fullM(model, data, matrix)
    return matrix


def test_g1_touches_the_floor_with_its_soles_alone(g1):
    """8 contacts of 4 rows and 29 limits, in MJX; the spheres reach as deep as the drawn feet."""
    rows = mjx.make_data(g1)._impl
    assert rows.efc_J.shape == (61, 35)
    assert rows.contact.dim.tolist() == [3] * 8
    assert (rows.ne, rows.nf, rows.nl) == (0, 0, 29)

    soles = [i for i in range(g1.ngeom) if "sole" in g1.geom(i).name]
    feet = [g1.body(f"{side}_ankle_roll_link").id for side in ("left", "right")]
    np.testing.assert_array_equal(g1.geom_bodyid[soles], np.repeat(feet, 4))
    corners = [(-0.05, 0.025), (-0.05, -0.025), (0.12, 0.03), (0.12, -0.03)]
    np.testing.assert_allclose(g1.geom_pos[soles], 2 * [(x, y, -0.03) for x, y in corners])
    np.testing.assert_allclose(g1.geom_size[soles, 0], 0.005)
    np.testing.assert_allclose(g1.geom_friction[soles, 0], 0.6)
    drawn = [i for i in range(g1.ngeom) if "foot" in g1.geom(i).name]
    assert len(drawn) == 14
    np.testing.assert_allclose(g1.geom_pos[drawn, 2] - g1.geom_size[drawn, 0], -0.035)


def test_g1_stands_in_its_keyframe(g1):
    """For a second, with nothing but the keyframe's ctrl."""
    data = mujoco.MjData(g1)
    mujoco.mj_resetDataKeyframe(g1, data, g1.key("stand").id)
    start = data.qpos.copy()
    for _ in range(200):
        mujoco.mj_step(g1, data)
    assert data.time == pytest.approx(1.0)
    np.testing.assert_allclose(data.qpos, start, atol=1e-3)
    np.testing.assert_allclose(data.qvel, 0, atol=1e-2)
    assert data.ncon == 8


# All robots against tests/robots/*.json. Each mass matrix is compared at the default pose and at
# random ones, POSES in all.
NAMES = ("g1_29dof", "h1", "h1_2", "go2")
SOURCES = {
    name: json.loads(Path(__file__).with_name("robots").joinpath(f"{name}.json").read_text())
    for name in NAMES
}
POSES = 20


def load(name: str) -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_path(str(ROBOTS / f"{name}.xml"))


def joint_rows(name: str) -> list[dict]:
    """The source's bodies that a joint moves, in the order of the joints."""
    return [row for row in SOURCES[name]["bodies"] if "axis" in row]


def build_reference(name: str) -> mujoco.MjModel:
    """The source's numbers as a model, without shapes."""
    source = SOURCES[name]
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    bodies = {"world": spec.worldbody}
    for row in source["bodies"]:
        body = bodies[row["parent"]].add_body(
            name=row["name"],
            pos=row["pos"],
            quat=row["quat"],
            mass=row["mass"],
            ipos=row["center"],
            iquat=row["principal"],
            inertia=row["moments"],
            explicitinertial=True,
        )
        bodies[row["name"]] = body
        if "axis" in row:
            body.add_joint(
                name=row["name"],
                axis=row["axis"],
                range=row["range"],
                armature=row["armature"],
                damping=[source["damping"], 0, 0],
                frictionloss=source["frictionloss"],
            )
        else:
            body.add_freejoint()
    return spec.compile()


def draw_qpos(name: str, random: np.random.Generator) -> np.ndarray:
    """The base anywhere and turned anyhow, the joints anywhere in their ranges."""
    low, high = np.transpose([row["range"] for row in joint_rows(name)])
    quat = random.standard_normal(4)
    quat /= np.linalg.norm(quat)
    return np.concatenate([random.uniform(-1, 1, 3), quat, random.uniform(low, high)])


def forward(model: mujoco.MjModel, qpos, qvel=None) -> mujoco.MjData:
    data = mujoco.MjData(model)
    data.qpos[:] = qpos
    data.qvel[:] = 0 if qvel is None else qvel
    mujoco.mj_forward(model, data)
    return data


def default_qpos(name: str, model: mujoco.MjModel) -> np.ndarray:
    return np.concatenate([model.qpos0[:3], [1, 0, 0, 0], SOURCES[name]["default"]])


@pytest.mark.parametrize("name", NAMES)
def test_masses_are_the_sources(name):
    """Total mass, mass matrix, and the forces of gravity and speed, to a millionth of the largest."""
    random = np.random.default_rng(0)
    ours, reference = load(name), build_reference(name)
    assert ours.body_mass.sum() == pytest.approx(SOURCES[name]["total_mass"], rel=1e-6)
    qpos = default_qpos(name, ours)
    for _ in range(POSES):
        qvel = random.standard_normal(ours.nv)
        pair = [forward(model, qpos, qvel) for model in (ours, reference)]
        mine, theirs = (
            mass_matrix(model, data) for model, data in zip((ours, reference), pair, strict=True)
        )
        scale = np.sqrt(np.outer(theirs.diagonal(), theirs.diagonal()))
        np.testing.assert_allclose(mine / scale, theirs / scale, atol=1e-6)
        bias = pair[1].qfrc_bias
        np.testing.assert_allclose(pair[0].qfrc_bias, bias, atol=1e-6 * np.abs(bias).max())
        qpos = draw_qpos(name, random)


@pytest.mark.parametrize("name", NAMES)
def test_joints_are_the_sources(name):
    """Order, axes, ranges, friction, and the largest torque of each one's motor."""
    model = load(name)
    rows = joint_rows(name)
    assert (model.njnt, model.nu) == (len(rows) + 1, len(rows))
    for i, row in enumerate(rows, start=1):
        words = row["name"].removesuffix("_link")
        body = model.body(model.jnt_bodyid[i]).name.removesuffix("_link")
        assert body == words
        # The G1's torso is moved by the joint that has the waist's name.
        joint = model.joint(i).name.removesuffix("_joint")
        assert joint == words.replace("torso", "waist_pitch")
        np.testing.assert_allclose(model.jnt_axis[i], row["axis"])
        np.testing.assert_allclose(model.jnt_range[i], row["range"])
        most = model.actuator_forcerange if model.actuator_forcelimited[i - 1] else None
        most = model.actuator_ctrlrange if most is None else most
        np.testing.assert_allclose(most[i - 1], [-row["torque"], row["torque"]])
    assert model.jnt_limited[1:].all() and not model.jnt_limited[0]
    assert model.actuator_trnid[:, 0].tolist() == list(range(1, model.njnt))
    armature = [row["armature"] for row in rows]
    np.testing.assert_allclose(model.dof_armature, [0.0] * 6 + armature)
    np.testing.assert_allclose(model.dof_damping[6:], SOURCES[name]["damping"])
    np.testing.assert_allclose(model.dof_frictionloss[6:], SOURCES[name]["frictionloss"])
    assert not model.dof_damping[:6].any() and not model.dof_frictionloss[:6].any()


def find_soles(name: str, model: mujoco.MjModel) -> np.ndarray:
    return np.array([i for i in range(model.ngeom) if "sole" in model.geom(i).name])


@pytest.mark.parametrize("name", NAMES)
def test_stands_on_its_soles(name):
    """They are where the source has them and touch the floor in the default pose. Nothing else can."""
    model = load(name)
    source = SOURCES[name]
    soles = find_soles(name, model)
    data = forward(model, default_qpos(name, model))
    assert model.qpos0[2] == pytest.approx(source["standing_height"], abs=1e-4)
    np.testing.assert_allclose(model.geom_size[soles, 0], source["sole_radius"])

    reference = build_reference(name)
    theirs = forward(reference, default_qpos(name, model))
    centers = [
        theirs.body(foot).xpos + theirs.body(foot).xmat.reshape(3, 3) @ center
        for foot in source["feet"]
        for center in source["sole_centers"]
    ]
    np.testing.assert_allclose(data.geom_xpos[soles], centers, atol=1e-6)
    heights = data.geom_xpos[soles, 2] - source["sole_radius"]
    hind = np.array([model.geom(i).name.startswith("R") and name == "go2" for i in soles])
    np.testing.assert_allclose(heights[~hind], 0, atol=6e-4)
    np.testing.assert_allclose(heights[hind], 0.0096, atol=1e-4)

    kind, affinity = model.geom_contype, model.geom_conaffinity
    pairs = (kind[:, None] & affinity | affinity[:, None] & kind) > 0
    floor = np.arange(model.ngeom) == model.geom("floor").id
    sole = np.isin(np.arange(model.ngeom), soles)
    np.testing.assert_array_equal(pairs, floor[:, None] & sole | sole[:, None] & floor)


@pytest.mark.parametrize("name", NAMES)
def test_mirrored_pose_is_the_mirrored_robot(name):
    """A pose seen in a mirror, with soles and drawn shapes; the centre of mass is near it."""
    random = np.random.default_rng(0)
    model = load(name)
    names = [model.joint(i).name for i in range(1, model.njnt)]
    exchange = {"left": "right", "right": "left", "FL": "FR", "FR": "FL", "RL": "RR", "RR": "RL"}

    def twin(word: str) -> str:
        side, _, rest = word.partition("_")
        return f"{exchange.get(side, side)}_{rest}" if rest else word

    order = [names.index(twin(joint)) for joint in names]
    signs = np.where(model.jnt_axis[1:, 1] == 1, 1, -1)
    angles = draw_qpos(name, random)[7:]
    base = [0, 0, 1, 1, 0, 0, 0]
    first = forward(model, np.concatenate([base, angles]))
    second = forward(model, np.concatenate([base, (angles * signs)[order]]))

    bodies = [model.body(i).name for i in range(1, model.nbody)]
    body_order = [1 + bodies.index(twin(body)) for body in bodies]
    mirror = np.diag([1, -1, 1])
    np.testing.assert_allclose(second.xpos[1:], first.xpos[body_order] @ mirror, atol=1e-4)
    turned = mirror @ first.xmat.reshape(-1, 3, 3)[body_order] @ mirror
    np.testing.assert_allclose(second.xmat.reshape(-1, 3, 3)[1:], turned, atol=1e-4)
    np.testing.assert_allclose(second.subtree_com[1], mirror @ first.subtree_com[1], atol=5e-3)

    shown = first.geom_xpos[1:] @ mirror  # each shape has its twin somewhere, but for the floor
    apart = np.linalg.norm(shown[:, None] - second.geom_xpos[None, 1:], axis=-1)
    assert apart.min(axis=1).max() < 1.5e-3
    assert apart.min(axis=0).max() < 1.5e-3
