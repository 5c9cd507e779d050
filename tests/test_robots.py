"""The files in robots/ against numbers from their sources, typed here a second time."""

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
