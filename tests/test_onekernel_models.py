"""onekernel on whole models: physics compiled into one kernel, against MJX by XLA and against C MuJoCo."""

import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import mjx_models
import mujoco
import numpy as np
import pytest
from mujoco import mjx
from quick import quick_jit, quick_kernels

import onekernel
from onekernel import mjx as lean

# How far a compiled step may be from MJX's by XLA: rounding, which contacts amplify from step to step.
# Accelerations are compared as shares of the largest one.
FIRST = {"qpos": 1e-5, "qvel": 2e-3, "act": 1e-6, "qacc": 5e-3, "sensordata": 2e-3}
LAST = {"qpos": 5e-3, "qvel": 1e-1}


@pytest.fixture(scope="module", autouse=True)
def no_kept_kernels():
    """No other test has these functions; they need not be known again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEKERNEL_CACHE", "0")
        yield


@pytest.fixture(autouse=True)
def no_fallback():
    with warnings.catch_warnings():
        warnings.simplefilter("error", onekernel.Fallback)
        yield


@functools.cache
def recorded(name: str) -> dict[str, dict[str, np.ndarray]]:
    parts: dict = {"state": {}, "first": {}, "last": {}}
    with np.load(mjx_models.FILE) as file:
        for key in file.files:
            model, when, field = key.split("/")
            if model == name:
                parts[when][field] = file[key]
    return parts


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, as a share of the largest number where that is above 1."""
    if not theirs.size:
        return 0.0
    return float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))


# LLVM takes up to 20 seconds to compile their kernels as users get them, half of it to choose registers. Other
# models are compiled in full, and so are Walker2d below, tasks in test_env.py and G1 in test_unitree.py, with
# the solver that users have.
UNOPTIMISED = ("HalfCheetah", "Ant", "dense_contacts", "gripper", "quad_pos", "g1")


# XLA had not compiled Pusher's step after half an hour. The humanoids take a minute each, and have nothing that
# Ant and dense_contacts have not but a fixed tendon, which gripper has; with the lean solver, test_env.py holds
# them to Gymnasium.
NOT_BY_MJX = ("Pusher", "Humanoid", "HumanoidStandup")
# Their physics has nothing that another model's has not: Hopper's, InvertedDoublePendulum's, Swimmer's, quad_pos's,
# and for arms and wheels that touch nothing Reacher's. test_own_robots.py and test_env.py move all but unlimited.
LIKE_ANOTHER = (
    *("Walker2d", "InvertedPendulum", "swimmer_euler", "quad_inherit"),
    *("flywheel", "mixed_range", "no_camera", "unlimited"),
)
NAMES = [name for name in mjx_models.NAMES if name not in NOT_BY_MJX + LIKE_ANOTHER]


# They take longest; parts of theirs are in others.
SLOW = ("Ant", "HalfCheetah", "Hopper", "Swimmer", "InvertedDoublePendulum", "Reacher")
SLOW += ("dense_contacts", "double_pole", "lengths", "g1")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NAMES]
)
def test_a_compiled_step_is_mjx_s(name, monkeypatch):
    """One step and twenty of MJX's own `step`, solver included, from random states."""
    if name in UNOPTIMISED:
        quick_kernels(monkeypatch)
    model = mjx_models.load(name)
    record = recorded(name)
    advance = onekernel.compile(mjx_models.one_world(model, mjx.step))
    first, last = mjx_models.run(advance, record["state"], model)
    for field, bound in FIRST.items():
        assert distance(first[field], record["first"][field]) < bound, field
    for field, bound in LAST.items():
        assert distance(last[field], record["last"][field]) < bound, field


# test_env.py holds a step of each task to C MuJoCo, and test_unitree.py G1's, by wider bounds; test_onekernel_mjx.py
# the accelerations of a quadruped, whose parts are Ant's.
@pytest.mark.parametrize("name", ["Walker2d", pytest.param("Ant", marks=pytest.mark.slow)])
def test_the_lean_step_is_c_mujoco_s(name):
    """Positions and velocities after one step of the compiled lean solver, against C MuJoCo in double precision."""
    model = mjx_models.load(name)
    model.opt.tolerance = 1e-12
    model.opt.iterations = 200
    states = mjx_models.draw_states(model)
    advance = onekernel.compile(mjx_models.one_world(model, lean.step))
    start = {field: jnp.asarray(values) for field, values in states.items()}
    start["qacc_warmstart"] = jnp.zeros((mjx_models.WORLDS, model.nv))
    after, _ = jax.jit(jax.vmap(advance))(start)
    for world in range(mjx_models.WORLDS):
        data = mujoco.MjData(model)
        for field, values in states.items():
            getattr(data, field)[:] = values[world]
        mujoco.mj_step(model, data)
        np.testing.assert_allclose(after["qpos"][world], data.qpos, atol=1e-5)
        np.testing.assert_allclose(after["qvel"][world], data.qvel, atol=2e-3, rtol=1e-3)


HEIGHTFIELD = """<mujoco><asset><hfield name="hills" nrow="6" ncol="6" size="1 1 .2 .1"/></asset>
  <worldbody><geom type="hfield" hfield="hills"/>
    <body pos=".05 .1 .15"><freejoint/><geom name="ball" type="sphere" size=".1"/></body>
  </worldbody></mujoco>"""
SHAPES = """<mujoco><asset><material name="any"/></asset><worldbody><geom type="plane" size="2 2 .1"/>
    <body pos="0 0 .5"><freejoint/><geom type="sphere" size=".1"/><geom type="box" size=".1 .1 .1" pos=".3 0 0"/></body>
    <body pos="0 .4 .5"><joint axis="1 0 0"/><geom type="capsule" size=".05 .2"/></body>
  </worldbody></mujoco>"""


def poses(model: mujoco.MjModel) -> jax.Array:
    noise = 0.03 * np.random.default_rng(1).standard_normal((5, model.nq))
    return jnp.asarray(model.qpos0 + noise, jnp.float32)


def compare(function, *batch):
    ours = jax.vmap(onekernel.compile(function))(*batch)
    theirs = quick_jit(jax.vmap(function))(*batch)
    for name in theirs:
        assert distance(np.asarray(ours[name]), np.asarray(theirs[name])) < 2e-3, name
    return ours


@pytest.mark.slow
def test_heights_and_contact_forces(monkeypatch):
    """Tables that are looked up, and what scripts use besides `step`: rne_postconstraint."""
    quick_kernels(monkeypatch)
    model = mujoco.MjModel.from_xml_string(HEIGHTFIELD)
    model.hfield_data[:] = np.random.default_rng(0).uniform(0, 1, model.nhfielddata)
    mjx_model = mjx.put_model(model)
    template = mjx.make_data(mjx_model)

    def forces(qpos):
        data = mjx.forward(mjx_model, template.replace(qpos=qpos))
        data = mjx._src.smooth.rne_postconstraint(mjx_model, data)
        return {"qacc": data.qacc, "wrench": data._impl.cfrc_ext, "dist": data._impl.contact.dist}

    ours = compare(forces, poses(model))
    assert (np.asarray(ours["dist"]) < 0).any()  # the ball does touch the hills


def test_rays():
    model = mujoco.MjModel.from_xml_string(SHAPES)
    mjx_model = mjx.put_model(model)
    template = mjx.make_data(mjx_model)

    def look(qpos, direction):
        data = mjx.kinematics(mjx_model, template.replace(qpos=qpos))
        eye = jnp.array([0.05, 0.02, 2.0])
        far, geom = mjx.ray(mjx_model, data, eye, direction / jnp.linalg.norm(direction))
        return {"far": far, "geom": geom}

    directions = jnp.array([[0, 0, -1], [0.15, 0, -1], [0, 0.25, -1], [0, 0, 1], [0.5, 0.5, -1.0]])
    ours = compare(look, poses(model), directions)
    assert (
        len(set(np.asarray(ours["geom"]).tolist())) > 2
    )  # they see different things, and one nothing


PROCESS = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
import onekernel
from onekernel import api
traces = []
trace = api.Kernel.trace
api.Kernel.trace = lambda kernel: (traces.append(kernel), trace(kernel))[1]
def swing(angle, speed):
    speed = speed - 0.1 * jnp.sin(angle)
    return angle + 0.1 * speed, speed
for _ in range(2):  # each compiled function asks the store anew
    results = jax.jit(jax.vmap(onekernel.compile(swing)))(jnp.arange(7.0), jnp.ones(7))
    print(len(traces), np.asarray(results).tobytes().hex())
"""


def in_a_process(folder: Path) -> tuple[int, int, str]:
    """How often the function was traced after its first and after its second compilation, and its results."""
    script = folder / "swing.py"
    script.write_text(PROCESS)
    environment = os.environ | {"ONEKERNEL_CACHE_DIR": str(folder / "cache")}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    del environment["ONEKERNEL_CACHE"]
    command = [sys.executable, str(script)]
    out = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    first, numbers, second, same = out.split()
    assert numbers == same
    return int(first), int(second), numbers


def test_a_second_process_neither_traces_nor_compiles(tmp_path):
    first_traces, first_again, first = in_a_process(tmp_path)
    second_traces, second_again, second = in_a_process(tmp_path)
    assert first_again == first_traces > 0
    assert second_again == second_traces == 0
    assert second == first

    for entry in (tmp_path / "cache").iterdir():  # what is broken is made anew
        if entry.is_file():
            entry.write_bytes(entry.read_bytes()[:-7])
    third_traces, third_again, third = in_a_process(tmp_path)
    assert third_again == third_traces > 0  # what was made anew is found
    assert third == first
