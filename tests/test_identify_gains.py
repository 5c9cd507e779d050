"""tools/identify_gains.py finds values and a delay that it was not told."""

import re

import mujoco.sysid
import numpy as np
import pytest

if not hasattr(mujoco.sysid, "optimize"):
    pytest.skip('needs pip install "mujoco[sysid]"', allow_module_level=True)

import ppo_mjx_unitree as unitree
from tools import identify_gains


def test_leg_is_the_robots():
    """The robot's masses, gains and largest torques; no base that moves."""
    spec = identify_gains.load_leg()
    model = spec.compile()
    controller = unitree.make_controller(unitree.ROBOTS["g1"])
    assert [model.actuator(i).name for i in range(model.nu)] == list(identify_gains.LEG)
    np.testing.assert_array_equal(model.actuator_gainprm[:, 0], controller.stiffness[:6])
    gains = np.stack([controller.stiffness, controller.damping], axis=1)[:6]
    np.testing.assert_array_equal(model.actuator_biasprm[:, 1:3], -gains)
    np.testing.assert_array_equal(model.actuator_forcerange[:, 1], controller.max_torque[:6])
    assert not model.actuator_ctrllimited.any() and model.nq == 6
    robot = unitree.ROBOTS["g1"].model
    names = [
        name
        for name in (robot.body(i).name for i in range(robot.nbody))
        if name.startswith("left_")
    ]
    np.testing.assert_array_equal(
        [model.body(name).mass for name in names], [robot.body(name).mass for name in names]
    )


def test_finds_the_truth(capsys):
    """A short log without noise; at the wrong delay, the fit is worse."""
    identify_gains.main(
        ["--seconds", "2", "--noise", "0", "--delay", "0.002", "--try-delays", "0", "0.002"]
    )
    output = capsys.readouterr().out
    assert "The delay that fits best is 0.002 s." in output
    rows = re.findall(r"^left_\S+ +(?:stiff|damp|arma|fric).*?([-0-9.]+)%$", output, re.M)
    assert len(rows) == 24 and max(abs(float(row)) for row in rows) < 1
    before, after = re.search(r"another log: (\S+) rad before, (\S+) rad after", output).groups()
    assert float(after) < 0.02 * float(before)
