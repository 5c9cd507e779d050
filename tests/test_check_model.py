"""The model doctor says what is wrong with a robot, by name, and is silent about a sound one."""

from pathlib import Path

import mujoco
import numpy as np
import pytest

import ppo_mjx
from tools import check_model

ROBOTS = Path(__file__).parent / "robots"

# Of each model in robots/: the exit code, and what the doctor has to say.
VERDICTS = {
    "dense_contacts": (1, ["600 rows", "(box with box)", "448 of them are box with box"]),
    "double_pole": (0, ["3 of dry friction, 1 of limits"]),
    "elliptic": (0, ["elliptic cones", '<option iterations="50"']),
    "filter": (0, ["motor with a filter", "nothing: they have all"]),
    "flywheel": (0, ["max_speed=500,  # random actions reach 90"]),
    "gripper": (0, ["1 of equalities, 5 of dry friction, 6 of limits"]),
    "imu": (0, ['sensed=(("sensordata", 0),)']),
    "lengths": (0, ["geom floor with geom wheel (plane with sphere)"]),
    "mesh": (0, ["1 geoms"]),
    "mixed_range": (0, ["controls from -3 to 3, from -0.5 to 0.5"]),
    "mocap": (0, ["centre of mass of body 2"]),
    "no_camera": (0, ["no camera is named track"]),
    "quad_inherit": (1, ["keyframe home", "from -2.4 to -0.6", "servo_offset=0.4"]),
    "quad_pos": (1, ["keyframe home", "0.015 m, under geom floor", 'inheritrange="1"']),
    "sparse_flag": (0, ["nothing: they have all"]),
    "swimmer_euler": (0, ["nothing: they have all"]),
    "unlimited": (2, ["STOP  actuator 0 (of joint a)", "STOP  actuator 1 (of joint b)"]),
}


def doctor(capsys, file, *flags: str) -> tuple[int, str]:
    """The exit code and what was printed; in any case each problem is one line."""
    code = check_model.main([str(file), *flags])
    text = capsys.readouterr().out
    problems = [line.split()[0] for line in text.splitlines() if line[2:6] in ("STOP", "LOOK")]
    assert code == (2 if "STOP" in problems else 1 if "LOOK" in problems else 0)
    return code, text


def write(tmp_path, inside: str, option: str = "") -> Path:
    """A file with a floor and what stands inside of worldbody."""
    floor = '<geom name="floor" type="plane" size="9 9 1"/>'
    body, _, rest = inside.partition("|")
    world = f"<worldbody>{floor}{body}</worldbody>"
    limits = '<compiler autolimits="true"/>'
    file = tmp_path / "robot.xml"
    file.write_text(f"<mujoco>{limits}{option}{world}{rest}</mujoco>")
    return file


ARM = '<body pos="0 0 1"><joint name="hinge" axis="0 1 0"/><geom size=".1" pos=".3 0 0"/>{}</body>'
MOTOR = '|<actuator><motor name="push" joint="hinge" ctrlrange="-1 1"/>{}</actuator>{}'


def test_every_robot_has_a_verdict():
    assert {file.stem for file in ROBOTS.glob("*.xml")} == VERDICTS.keys()


@pytest.mark.parametrize("name", VERDICTS)
def test_robots(capsys, name):
    expected, words = VERDICTS[name]
    code, text = doctor(capsys, ROBOTS / f"{name}.xml", "--quick")
    assert code == expected, text
    assert not [word for word in words if word not in text], text


def test_gymnasium(capsys):
    """All of Gymnasium's models can be trained; what looks odd about two of them is true."""
    folder = ppo_mjx.gymnasium_models()
    looks = {}
    for file in sorted(folder.glob("*.xml")):
        _, text = doctor(capsys, file, "--quick")
        assert "STOP" not in text
        looks[file.stem] = [line for line in text.splitlines() if line.startswith("  LOOK")]
    assert not looks["half_cheetah"] + looks["hopper"] + looks["walker2d_v5"]
    assert "joint ankle_1 (0, range 0.524 to 1.22)" in looks["ant"][0]
    assert "hardly move" in looks["point"][0]


BALL = '<body pos="1 0 1"><freejoint/><geom name="can" type="cylinder" size=".1 .1"/></body>'
BRICK = '<body pos="2 0 1"><freejoint/><geom name="brick" type="box" size=".1 .1 .1"/></body>'
ODD = '<general name="odd" joint="hinge" dyntype="user" ctrlrange="-1 1"/>'
PUSHED = ARM.format("") + MOTOR.format("", "")
STOPS = {
    "no actuators": ("", ARM.format(""), "no actuators"),
    "no joints": ("", '<geom size=".1" pos="0 0 1"/>', "nothing in it moves"),
    "pair": ("", BALL + BRICK + PUSHED, "geom can (cylinder) and geom brick (box)"),
    "integrator": ('<option integrator="implicit"/>', PUSHED, "integrator"),
    "dyntype": ("", ARM.format("") + MOTOR.format(ODD, ""), "actuator odd"),
    "flag": ('<option><flag energy="enable"/></option>', PUSHED, "flag energy=enable"),
    "sensor": (
        "",
        ARM.format("") + MOTOR.format("", '<sensor><user name="mine" dim="1"/></sensor>'),
        "sensor mine",
    ),
    "contact sensor": (
        "",
        ARM.format('<site name="tip"/>')
        + MOTOR.format("", '<sensor><contact name="touch" site="tip" data="force"/></sensor>'),
        "sensor touch: MJX has no contact sensor by site",
    ),
}


@pytest.mark.parametrize("fault", STOPS)
def test_stops(capsys, tmp_path, fault):
    option, inside, words = STOPS[fault]
    code, text = doctor(capsys, write(tmp_path, inside, option), "--quick")
    assert code == 2
    assert [line for line in text.splitlines() if line.startswith("  STOP") and words in line], text


IDLE = '<motor name="idle" joint="hinge" gear="0" ctrlrange="-1 1"/>'
LOOKS = {
    "noslip": ('<option noslip_iterations="3"/>', PUSHED, "noslip_iterations=3"),
    "idle": ("", ARM.format("") + MOTOR.format(IDLE, ""), "actuator idle: moves nothing"),
    "polynomial": (
        "",
        PUSHED.replace('name="hinge"', 'name="hinge" damping="1 2"'),
        "joint hinge: MJX ignores polynomial",
    ),
    "forces": (
        "",
        ARM.format('<site name="tip"/>').replace("<geom", '<geom contype="0" conaffinity="0"')
        + MOTOR.format("", '<sensor><force name="feel" site="tip"/></sensor>'),
        "sensor feel: 0 in MJX",
    ),
    "deep": ("", PUSHED.replace('pos="0 0 1"', 'pos="0 0 .02"'), "0.080 m, under geom floor"),
    "range": ("", PUSHED.replace('"hinge" axis', '"hinge" range="30 60" axis'), "joint hinge (0,"),
    "falls": (
        "",
        BALL.replace("<geom", '<geom contype="0" conaffinity="0"') + PUSHED,
        "falls freely",
    ),
    "breaks": (
        '<option timestep=".02" integrator="Euler"/>',
        PUSHED.replace('name="hinge"', 'name="hinge" stiffness="1e9"').replace(
            'ctrlrange="-1 1"', 'ctrlrange="-1 1" gear="1e6"'
        ),
        "C MuJoCo breaks",
    ),
}


@pytest.mark.parametrize("fault", LOOKS)
def test_looks(capsys, tmp_path, fault):
    option, inside, words = LOOKS[fault]
    code, text = doctor(capsys, write(tmp_path, inside, option), "--quick")
    assert code == 1, text
    assert [line for line in text.splitlines() if line.startswith("  LOOK") and words in line], text


def test_without_its_keyframe(capsys, tmp_path):
    """A quadruped that starts at qpos0: knees out of range, feet under the floor; so it jumps."""
    text = (ROBOTS / "quad_pos.xml").read_text()
    (tmp_path / "quad.xml").write_text(text[: text.index("<keyframe>")] + "</mujoco>")
    code, text = doctor(capsys, tmp_path / "quad.xml", "--quick")
    assert code == 1
    for words in (
        "joint fl_knee (0, range -2.4 to -0.6)",
        "geom fl_foot (0.122 m",
        "trunk jumps by",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no such file"),
        ("hello", "MuJoCo cannot read it"),
        ('<mujoco><worldbody><geom size="1" quirk="1"/></worldbody></mujoco>', "quirk"),
        ('<mujoco><asset><mesh name="m" file="nowhere.obj"/></asset></mujoco>', "nowhere.obj"),
    ],
)
def test_unreadable(capsys, tmp_path, content, words):
    file = tmp_path / "robot.xml"
    if content:
        file.write_text(content)
    code, text = doctor(capsys, file)
    assert code == 2
    (line,) = [line for line in text.splitlines() if line.startswith("  STOP")]
    assert str(file) in line and words in line


def test_rows_are_those_of_mjx():
    """The pairs' rows and contacts add up to what MJX allocates."""
    for name in ("dense_contacts", "elliptic", "quad_pos"):
        model = mujoco.MjModel.from_xml_path(str(ROBOTS / f"{name}.xml"))
        data = ppo_mjx.mjx.make_data(model)
        pairs = check_model.count_pairs(model)
        assert sum(pair.contacts for pair in pairs) == data._impl.ncon
        rows = sum(pair.rows for pair in pairs)
        assert rows == data._impl.nefc - data._impl.ne - data._impl.nf - data._impl.nl


@pytest.fixture
def walk():
    """Random motion of a wheel on legs with sensors: its model and path."""
    model = mujoco.MjModel.from_xml_path(str(ROBOTS / "imu.xml"))
    task = check_model.make_task(ROBOTS / "imu.xml", model)
    return model, check_model.walk_at_random(model, task)


@pytest.mark.parametrize(
    ("field", "index", "words"),
    [
        ("qpos", 3, "position of joint wheel"),
        ("qvel", 2, "velocity of joint pitch"),
        ("sensordata", 6, "sensor 2"),
    ],
)
@pytest.mark.parametrize("wrong", [0.5, np.nan])
def test_a_difference_is_named(capsys, walk, field, index, words, wrong):
    model, path = walk
    results = {name: values.copy() for name, values in path.after.items()}
    report = check_model.Report()
    check_model.compare(report, model, path, results)
    assert report.looks == 0
    results[field][40:60, index] = np.nan if np.isnan(wrong) else 2 * abs(results[field]).max() + 9
    check_model.compare(report, model, path, results)
    assert report.looks == 1
    text = capsys.readouterr().out
    assert words in text and f"off by more than 1% in 20 of {len(path.after['qpos'])}" in text


def test_iterations_that_converge():
    """Without constraints one is enough; with elliptic cones and impratio=100 a few are not."""
    needed = {}
    for name in ("filter", "elliptic"):
        file = ROBOTS / f"{name}.xml"
        model = mujoco.MjModel.from_xml_path(str(file))
        path = check_model.walk_at_random(model, check_model.make_task(file, model))
        needed[name] = check_model.enough_iterations(model, path)
    assert needed["filter"] == check_model.ITERATIONS[0]
    assert needed["elliptic"] >= (20, 20)


@pytest.mark.slow
def test_measured(capsys):
    """Compiled for once: MJX's step is C MuJoCo's, and both speeds are there."""
    if ppo_mjx.onekernel is None:
        pytest.skip("needs onekernel")
    code, text = doctor(capsys, ROBOTS / "filter.xml", "--no-xla")
    assert code == 0, text
    line = next(line for line in text.splitlines() if "largest difference after one step" in line)
    assert float(line.split()[5].rstrip(",")) < 1e-4
    assert "onekernel: " in text and "C MuJoCo: " in text and "XLA: " not in text


def test_a_compiler_gets_so_many_seconds():
    """One that takes longer is ended, with all that it started."""
    assert "not compiled after 0.1 s" in check_model.measure_apart("XLA", Path("x"), {}, 0.1)
    assert "failed" in check_model.measure_apart("XLA", Path("/nowhere.xml"), {}, 60)


def test_add_your_robot_page(capsys, tmp_path):
    """What the page shows of the doctor is what it says of the page's quadruped; so is the row."""
    docs = Path(check_model.ROOT) / "docs"
    code, sound = doctor(capsys, docs / "quadruped.xml", "--quick")
    assert code == 0
    row = (docs / "quadruped.diff").read_text()
    for field in ("frame_skip=5,", "servo_offset=0.4,", "first_observed=2,"):
        assert f"    {field}  #" in sound and f"+        {field}\n" in row

    text = (docs / "quadruped.xml").read_text()
    start = text.index("  <keyframe>")
    (tmp_path / "robot.xml").write_text(text[:start] + "</mujoco>")
    code, doubtful = doctor(capsys, tmp_path / "robot.xml", "--quick")
    assert code == 1
    page = (docs / "add_your_robot.md").read_text()
    shown = page.split("```text\n")[1].split("```")[0].splitlines()
    assert len([line for line in shown if "LOOK  " in line]) == 4
    for line in shown:
        assert line.removesuffix(" ...") in doubtful
