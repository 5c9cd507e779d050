"""Policies outside the training script: Unitree's own loop, rebuilt here, on our models."""

import collections
import dataclasses
import importlib.util
import json
import re
import sys
import time
import types
from pathlib import Path
from xml.etree import ElementTree

import mujoco
import numpy as np
import pytest
import yaml
from test_unitree_robots import hold_arms

import ppo_mjx_unitree as unitree
from tools import export

ROOT = Path(unitree.__file__).parent
LEGGED = ["g1", "g1_29dof", "h1", "h1_2"]  # what unitree_rl_gym deploys

# Each robot's numbers in deploy/deploy_mujoco/configs and deploy/deploy_real/configs of
# unitree_rl_gym; a leg's, which hold for both legs.
CONFIGS = {
    "g1": {
        "kps": [100, 100, 100, 150, 40, 40],
        "kds": [2, 2, 2, 4, 2, 2],
        "default_angles": [-0.1, 0, 0, 0.3, -0.2, 0],
        "num_actions": 12,
        "num_obs": 47,
        "xml_path": "g1_description/scene.xml",
        "msg_type": "hg",
        "imu_type": "pelvis",
        "leg_joint2motor_idx": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        "arm_waist_joint2motor_idx": list(range(12, 29)),
        "arm_waist_kps": [300] * 3 + [100, 100, 50, 50, 20, 20, 20] * 2,
        "arm_waist_kds": [3] * 3 + [2, 2, 2, 2, 1, 1, 1] * 2,
        "weak_motor": None,
    },
    "h1": {
        "kps": [150, 150, 150, 200, 40],
        "kds": [2, 2, 2, 4, 2],
        "default_angles": [0, 0, -0.1, 0.3, -0.2],
        "num_actions": 10,
        "num_obs": 41,
        "xml_path": "h1/scene.xml",
        "msg_type": "go",
        "imu_type": "torso",
        "leg_joint2motor_idx": [7, 3, 4, 5, 10, 8, 0, 1, 2, 11],
        "arm_waist_joint2motor_idx": [6, 16, 17, 18, 19, 12, 13, 14, 15],
        "arm_waist_kps": [300] + [100, 100, 50, 50] * 2,
        "arm_waist_kds": [3] + [2] * 8,
        "weak_motor": list(range(10, 20)),
    },
    "h1_2": {
        "kps": [200, 200, 200, 300, 40, 40],
        "kds": [2.5, 2.5, 2.5, 4, 2, 2],
        "default_angles": [0, -0.16, 0, 0.36, -0.2, 0],
        "num_actions": 12,
        "num_obs": 47,
        "xml_path": "h1_2/scene.xml",
        "msg_type": "hg",
        "imu_type": "torso",
        "leg_joint2motor_idx": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        "arm_waist_joint2motor_idx": list(range(12, 27)),
        "arm_waist_kps": [300] + [120, 120, 120, 80, 80, 80, 80] * 2,
        "arm_waist_kds": [3] + [2, 2, 2, 1, 1, 1, 1] * 2,
        "weak_motor": None,
    },
}
# Where those files, and the scripts that read them, agree for all robots.
SCALES = {
    "ang_vel_scale": 0.25,
    "dof_pos_scale": 1.0,
    "dof_vel_scale": 0.05,
    "action_scale": 0.25,
    "cmd_scale": [2.0, 2.0, 0.25],
}
LEGS = {"kps", "kds", "default_angles"}
MUJOCO_KEYS = (
    LEGS
    | SCALES.keys()
    | {
        "policy_path",
        "xml_path",
        "simulation_duration",
        "simulation_dt",
        "control_decimation",
        "num_actions",
        "num_obs",
        "cmd_init",
    }
)
REAL_KEYS = (
    LEGS
    | SCALES.keys()
    | {
        "control_dt",
        "msg_type",
        "imu_type",
        "lowcmd_topic",
        "lowstate_topic",
        "policy_path",
        "leg_joint2motor_idx",
        "arm_waist_joint2motor_idx",
        "arm_waist_kps",
        "arm_waist_kds",
        "arm_waist_target",
        "num_actions",
        "num_obs",
        "max_cmd",
    }
)


@pytest.fixture(autouse=True)
def held(monkeypatch):
    """A robot with joints that no action moves, as none in the table has."""
    robot = hold_arms(unitree.ROBOTS["g1_29dof"])
    monkeypatch.setitem(unitree.ROBOTS, "held", robot)
    monkeypatch.setitem(export.DEPLOYMENTS, "held", export.DEPLOYMENTS["g1_29dof"])


def untrained(robot: unitree.Robot) -> dict[str, np.ndarray]:
    """A policy of random numbers, whose actions are of the order of 1."""
    random = np.random.default_rng(0)
    parts = unitree.seen_parts(robot, "actor")
    size = sum(unitree.part_width(robot, part) for part in parts.values())
    policy = {"obs_mean": random.normal(0, 0.1, size), "obs_var": random.uniform(0.5, 2, size)}
    widths = [size, 32, 16, len(robot.acted)]
    for i in range(3):
        policy[f"w{i}"] = random.normal(0, widths[i] ** -0.5, widths[i : i + 2])
        policy[f"b{i}"] = random.normal(0, 0.1, widths[i + 1])
    policy = {name: array.astype(np.float32) for name, array in policy.items()}
    return policy | unitree.mirror_rules(robot)


def make_run(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The files of a run folder that the tool reads. Returns the policy."""
    policy = untrained(unitree.ROBOTS[name])
    np.savez(folder / "policy.npz", **policy)
    args = dataclasses.asdict(unitree.default_args(name))
    (folder / "run.json").write_text(json.dumps({"script": "ppo_mjx_unitree.py", "args": args}))
    return policy


def run_unitree_loop(
    model, height: float, settings: dict, act, steps: int, command_at=None, delay: int = 0
):
    """What deploy_mujoco.py does with a configuration and a policy, without its viewer.

    It starts with all joints at 0, holds the default pose for the first 10 physics steps, and has
    a clock that counts 0.02 s for each action. act: float32 [1, num_obs] -> float32 [1,
    num_actions]; command_at: s -> [3], in place of the configuration's; delay: physics steps from
    an action to its targets. Yields data, the observation, the action and the next targets, `steps`
    times.
    """
    data = mujoco.MjData(model)
    data.qpos[2] = height
    model.opt.timestep = settings["simulation_dt"]
    stiffness, damping, default, command_scale = (
        np.array(settings[key], np.float32) for key in ("kps", "kds", "default_angles", "cmd_scale")
    )
    command = np.array(settings["cmd_init"], np.float32)
    action = np.zeros(settings["num_actions"], np.float32)
    target = default
    late = collections.deque([default] * delay)  # targets on their way
    for i in range(1, steps * settings["control_decimation"] + 1):
        late.append(target)
        torque = (late.popleft() - data.qpos[7:]) * stiffness - data.qvel[6:] * damping
        data.ctrl[:] = torque
        mujoco.mj_step(model, data)
        if i % settings["control_decimation"]:
            continue
        if command_at:
            command = np.array(command_at(data.time), np.float32)
        w, x, y, z = data.qpos[3:7]
        phase = 2 * np.pi * (i // settings["control_decimation"] * 0.02 % 0.8) / 0.8
        obs = np.zeros(settings["num_obs"], np.float32)
        obs[:] = np.concatenate(
            [
                data.qvel[3:6] * settings["ang_vel_scale"],
                [2 * (w * y - x * z), -2 * (w * x + y * z), 1 - 2 * (w * w + z * z)],
                command * command_scale,
                (data.qpos[7:] - default) * settings["dof_pos_scale"],
                data.qvel[6:] * settings["dof_vel_scale"],
                action,
                [np.sin(phase), np.cos(phase)],
            ]
        )
        action = np.asarray(act(obs[None])).squeeze()
        target = action * settings["action_scale"] + default
        yield data, obs, action, target


def by_numpy(name: str, policy: dict, folder: Path):
    translation = export.translate(unitree, unitree.ROBOTS[name])
    return lambda obs: export.act_for_unitree(unitree, translation, policy, (), obs)[1]


def by_onnx(name: str, policy: dict, folder: Path):
    """policy.onnx takes our observation; onnxruntime runs it, or where that is missing, onnx."""
    file = folder / "policy.onnx"
    pytest.importorskip("onnx")
    export.write_onnx(unitree, policy, file)
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    else:
        session = pytest.importorskip("onnx.reference").ReferenceEvaluator(str(file))
    translation = export.translate(unitree, unitree.ROBOTS[name])
    return lambda obs: session.run(None, {"obs": obs @ translation.obs})[0] @ translation.action


def by_torch(name: str, policy: dict, folder: Path):
    torch = pytest.importorskip("torch")
    translation = export.translate(unitree, unitree.ROBOTS[name])
    export.write_torchscript(unitree, policy, translation, folder / "policy.pt")
    module = torch.jit.load(str(folder / "policy.pt"))
    return lambda obs: module(torch.from_numpy(obs)).detach().numpy()


@pytest.mark.parametrize("load", [by_numpy, by_onnx, by_torch])
@pytest.mark.parametrize("name", [*LEGGED, "held"])
def test_unitrees_loop_runs_our_policy(tmp_path, name, load):
    """An episode: the observation is ours element by element, and the joints go where `act` says."""
    robot = unitree.ROBOTS[name]
    policy = untrained(robot)
    settings = export.mujoco_settings(unitree, name, tmp_path)
    settings["cmd_init"] = [0.5, -0.3, 0.7]
    model = unitree.load_model(robot, 0.005)
    translation = export.translate(unitree, robot)
    parts = unitree.seen_parts(robot, "actor")
    command = np.array(settings["cmd_init"])
    action = np.zeros(len(robot.acted))

    rows = run_unitree_loop(model, robot.start_height, settings, load(name, policy, tmp_path), 150)
    biggest = 0.0
    for step, (data, obs, _, target) in enumerate(rows):
        now = unitree.sense(robot, data.qpos, data.qvel, command, action, step + 1, np)
        expected = unitree.observe(parts, now, np)
        translated = obs @ translation.obs
        np.testing.assert_allclose(translated, expected, rtol=1e-5, atol=2e-6)
        _, action = unitree.act(policy, (), translated)
        np.testing.assert_allclose(target, robot.targets(action, np), atol=1e-5)
        biggest = max(biggest, np.abs(action).max())
    assert step == 149 and biggest > 0.5


@pytest.mark.parametrize("name", ["g1", "h1", "h1_2"])
def test_nothing_to_translate_for_robots_of_unitrees_own(name):
    """Their observation and action are ours: policy.onnx fits their loop as it is."""
    translation = export.translate(unitree, unitree.ROBOTS[name])
    np.testing.assert_array_equal(translation.obs, np.eye(CONFIGS[name]["num_obs"]))
    np.testing.assert_array_equal(translation.action, np.eye(CONFIGS[name]["num_actions"]))


@pytest.mark.parametrize("by", ["numpy", "torch"])
def test_slow_commands_become_0(by):
    """By the rule of Env.draw_command: forwards and to the left together, the turn by itself."""
    robot = unitree.ROBOTS["g1"]
    policy = untrained(robot)
    translation = export.translate(unitree, robot)
    xp, tensor = np, np.float32
    if by == "torch":
        torch = pytest.importorskip("torch")

        def tensor(array):
            return torch.tensor(np.float32(array))

        xp = export.torch_functions()
        translation = export.Translation(*map(tensor, translation))

    random = np.random.default_rng(0)
    obs = random.normal(0, 1, (200, 47)).astype(np.float32)
    commands = random.uniform(-0.4, 0.4, (200, 3))
    commands[:5] = [[0.2, 0, 0], [0, -0.2, 0.2], [0.15, 0.15, -0.19], [0.19, 0.0, 0.3], [0, 0, 0]]
    slow = np.hypot(*commands[:, :2].T) < unitree.MIN_COMMAND
    slow = np.stack([slow, slow, np.abs(commands[:, 2]) < unitree.MIN_COMMAND], axis=1)
    assert slow[:5].sum(axis=1).tolist() == [1, 0, 1, 2, 3] and 0.1 < slow.mean() < 0.9
    scale = [2.0, 2.0, 0.25]
    obs[:, 6:9] = commands * scale
    wanted = obs.copy()
    wanted[:, 6:9] = np.where(slow, 0, commands) * scale
    ours = {name: tensor(array) for name, array in policy.items()}
    _, action = export.act_for_unitree(unitree, translation, ours, (), tensor(obs), xp)
    np.testing.assert_allclose(action, unitree.act(policy, (), wanted)[1], atol=1e-4)


# What the robot's loop does otherwise: name -> physics steps of an action, physics steps that
# targets are late, and the command by time in s.
ROBOT_LOOPS = {
    "slow steps": (12.5, 0, lambda now: (0.5, 0, 0)),
    "late targets": (10, 10, lambda now: (0.5, 0, 0)),
    "a stop": (10, 0, lambda now: (1.0 if now < 4 else 0.0, 0, 0)),
    "the other way": (10, 0, lambda now: (1.0 if now < 4 else -0.6, 0, 0)),
    "all of it": (12.5, 10, lambda now: (1.0 if now < 4 else -0.6, 0, 0)),
}


@pytest.mark.parametrize("loop", ROBOT_LOOPS)
def test_a_trained_policy_walks_in_the_robots_loop(tmp_path, loop):
    """Steps of 25 ms by a clock of 20, targets 20 ms late, and sticks that are thrown: no fall."""
    decimation, delay, command_at = ROBOT_LOOPS[loop]
    robot = unitree.ROBOTS["g1"]
    with np.load(ROOT / "docs" / "g1_policy.npz") as file:
        act = by_numpy("g1", dict(file), tmp_path)
    settings = export.mujoco_settings(unitree, "g1", tmp_path)
    settings["simulation_dt"] *= decimation / 10  # a whole number of physics steps
    model = unitree.load_model(robot, 0.005)
    steps = round(8 / (settings["simulation_dt"] * 10))
    rows = run_unitree_loop(
        model, robot.start_height, settings, act, steps, command_at, round(delay * 10 / decimation)
    )
    speeds = []
    for data, *_ in rows:
        assert not unitree.has_fallen(robot, data.qpos, np), f"fell after {data.time:.2f} s"
        speeds.append(unitree.to_base_frame(data.qpos[3:7], data.qvel[:3], np)[0])
    half = steps // 2
    assert abs(np.mean(speeds[half // 2 : half]) - command_at(3)[0]) < 0.2
    assert abs(np.mean(speeds[half + half // 2 :]) - command_at(8)[0]) < 0.2


def test_a_trained_policy_walks_in_unitrees_loop(tmp_path):
    """4 s at half a metre a second, from straight legs."""
    robot = unitree.ROBOTS["g1"]
    with np.load(ROOT / "docs" / "g1_policy.npz") as file:
        act = by_numpy("g1", dict(file), tmp_path)
    settings = export.mujoco_settings(unitree, "g1", tmp_path)
    model = unitree.load_model(robot, 0.005)
    for data, *_ in run_unitree_loop(model, robot.start_height, settings, act, 200):
        assert data.qpos[2] > 0.7
    assert 1.2 < data.qpos[0] < 2.4


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_are_unitrees(tmp_path, name):
    """Their keys, and their values but for the policy's file, its model and the stick's range."""
    args = dataclasses.asdict(unitree.default_args(name))
    written = {}
    for kind, settings in {
        "mujoco": export.mujoco_settings(unitree, name, tmp_path),
        "real": export.real_settings(unitree, name, tmp_path, args),
    }.items():
        export.write_yaml(settings, tmp_path / "settings.yaml", ["run\n1", "key: value"])
        written[kind] = yaml.safe_load((tmp_path / "settings.yaml").read_text())
        assert written[kind] == json.loads(json.dumps(settings))
        assert written[kind]["policy_path"] == str(tmp_path / "policy.pt")
        for key, value in SCALES.items():
            assert written[kind][key] == value, key
        for key in LEGS:
            assert written[kind][key] == CONFIGS[name][key] * 2, key

    assert written["mujoco"].keys() == MUJOCO_KEYS
    weak = {"weak_motor"} if CONFIGS[name]["weak_motor"] else set()
    assert written["real"].keys() == REAL_KEYS | weak
    for key in CONFIGS[name].keys() - LEGS - {"xml_path"}:
        assert written["real"].get(key) == CONFIGS[name][key], key
    for key in "num_actions", "num_obs":
        assert written["mujoco"][key] == CONFIGS[name][key]
    scene = "{LEGGED_GYM_ROOT_DIR}/resources/robots/" + CONFIGS[name]["xml_path"]
    assert written["mujoco"]["xml_path"] == scene
    assert written["mujoco"]["simulation_dt"] * written["mujoco"]["control_decimation"] == 0.02
    assert written["real"]["control_dt"] == 0.02
    assert written["real"]["lowcmd_topic"] == "rt/lowcmd"
    assert written["real"]["lowstate_topic"] == "rt/lowstate"
    assert written["real"]["arm_waist_target"] == [0] * len(CONFIGS[name]["arm_waist_kps"])
    # Trained from -0.6 to 1 m/s, to 0.4 m/s sideways and to 0.8 rad/s.
    assert written["real"]["max_cmd"] == [0.6, 0.4, 0.8]


def test_all_joints_of_the_29_are_legs_to_deploy_real(tmp_path):
    args = dataclasses.asdict(unitree.default_args("g1_29dof"))
    settings = export.real_settings(unitree, "g1_29dof", tmp_path, args)
    assert settings.keys() == REAL_KEYS
    assert settings["leg_joint2motor_idx"] == list(range(29))
    assert settings["num_actions"] == len(settings["kps"]) == 29 and settings["num_obs"] == 98
    for key in "joint2motor_idx", "kps", "kds", "target":
        assert settings[f"arm_waist_{key}"] == []


@pytest.mark.parametrize("name", LEGGED)
def test_written_scene_is_our_model(tmp_path, name):
    """With motors, at rest above the floor: what deploy_mujoco.py needs to load and start it."""
    robot = unitree.ROBOTS[name]
    export.write_scene(unitree, robot, tmp_path / "scene.xml")
    model = mujoco.MjModel.from_xml_path(str(tmp_path / "scene.xml"))
    ours = unitree.load_model(robot, model.opt.timestep)
    assert model.qpos0[2] == robot.start_height and not model.nkey
    np.testing.assert_allclose(model.actuator_ctrlrange, ours.actuator_ctrlrange)
    states = mujoco.MjData(model), mujoco.MjData(ours)
    for each, data in zip((model, ours), states, strict=True):
        data.qpos[2] = robot.start_height - 0.03  # in the floor
        data.ctrl[:] = np.linspace(-200, 200, model.nu)
        mujoco.mj_step(each, data, 20)
    np.testing.assert_allclose(states[0].qpos, states[1].qpos, atol=1e-5)  # XML rounds to 6 digits


@pytest.mark.parametrize("name", LEGGED)
def test_written_scene_is_for_older_mujocos(tmp_path, name):
    """MuJoCo 3.2.3 refuses attributes that it does not know; these it has loaded."""
    robot = unitree.ROBOTS[name]
    export.write_scene(unitree, robot, tmp_path / "scene.xml")

    def attributes(file: Path) -> set[str]:
        return {name for element in ElementTree.parse(file).iter() for name in element.attrib}

    known = {"biasprm", "biastype", "ctrlrange", "gainprm"}  # of <general>, for <motor>
    assert attributes(tmp_path / "scene.xml") <= attributes(unitree.MODELS / robot.mjcf) | known


def test_torchscript_keeps_its_memory(tmp_path):
    """A policy that remembers: from call to call, and nothing when it is loaded again."""
    torch = pytest.importorskip("torch")

    def act(policy, memory, obs, xp=np):
        memory = xp.tanh(0.5 * memory + obs @ policy["w0"])
        return memory, xp.maximum(2.0 * memory - 1.0, -1.5)

    script = types.SimpleNamespace(
        act=act, initial_memory=lambda batch=(): np.full((*batch, 3), 0.2)
    )
    random = np.random.default_rng(0)
    policy = {"w0": random.standard_normal((4, 3))}
    translation = export.Translation(
        obs=random.standard_normal((5, 4)),
        action=random.standard_normal((3, 2)),
        command=np.zeros((5, 3)),
        speeds=np.zeros((3, 3)),
    )
    export.write_torchscript(script, policy, translation, tmp_path / "policy.pt")
    for _ in range(2):
        module = torch.jit.load(str(tmp_path / "policy.pt"))
        memory = np.full((1, 3), 0.2)
        for obs in random.standard_normal((3, 1, 5)).astype(np.float32):
            memory, wanted = export.act_for_unitree(script, translation, policy, memory, obs)
            np.testing.assert_allclose(module(torch.from_numpy(obs)), wanted, atol=1e-5)


def pretend_torch(monkeypatch, is_there: bool) -> None:
    """PyTorch seems to be installed or missing; what it would write is an empty file."""
    find = importlib.util.find_spec

    def find_spec(name, *rest):
        return is_there or None if name == "torch" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(export, "write_torchscript", lambda *rest: rest[-1].touch())


RUN_FILES = {"policy.npz", "run.json"}
LOOP_FILES = {"policy.onnx", "policy.json"}
UNITREE_FILES = {"policy.pt", "deploy_mujoco.yaml", "deploy_real.yaml"}


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_run_folder_becomes_a_deployment(tmp_path, monkeypatch, capsys):
    """The command line: policy, both configurations and, where Unitree's is uncertain, a model."""
    pytest.importorskip("onnx")
    make_run(tmp_path, "g1_29dof")
    pretend_torch(monkeypatch, True)
    export.main([str(tmp_path)])
    output = capsys.readouterr().out
    assert "policy.pt" in output and "not tested" in output and "removed" not in output
    assert names_in(tmp_path) == RUN_FILES | LOOP_FILES | UNITREE_FILES | {"scene.xml"}
    settings = yaml.safe_load((tmp_path / "deploy_mujoco.yaml").read_text())
    assert settings["xml_path"] == str(tmp_path / "scene.xml") and settings.keys() == MUJOCO_KEYS


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"passed": True, "falls": 0, "error": 0.04, "yaw": 0.1}, "passed the test"),
        (
            {"passed": False, "falls": 3, "error": 0.2, "yaw": 0.1},
            "FAILED the test: falls 3, error",
        ),
        (None, "not tested"),
    ],
)
def test_what_the_policy_is_worth_is_told(tmp_path, monkeypatch, capsys, result, words):
    """On the screen and in both configurations, beside run, robot and commit."""
    pytest.importorskip("onnx")
    make_run(tmp_path, "g1")
    run = json.loads((tmp_path / "run.json").read_text()) | {"commit": "abcdef0"}
    run |= {"evaluation": result} if result else {}
    (tmp_path / "run.json").write_text(json.dumps(run))
    pretend_torch(monkeypatch, True)
    export.main([str(tmp_path)])
    assert words in capsys.readouterr().out
    for name in "deploy_mujoco.yaml", "deploy_real.yaml":
        first, second = (tmp_path / name).read_text().splitlines()[:2]
        assert first == f"# run {tmp_path.name}, robot g1, commit abcdef0"
        assert second.startswith("# ") and words in second


def test_changes_since_the_run_are_told(tmp_path, capsys):
    """As --evaluate tells them: the run has a copy of the script that made it."""
    pytest.importorskip("onnx")
    make_run(tmp_path, "g1")
    copy = tmp_path / "ppo_mjx_unitree.py"
    copy.write_text(Path(unitree.__file__).read_text())
    export.main([str(tmp_path)])
    assert "has changed" not in capsys.readouterr().out
    copy.write_text(copy.read_text() + "# other rewards\n")
    export.main([str(tmp_path)])
    assert "the code has changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "torch", "words"),
    [
        ("g1", False, "PyTorch is missing"),
        ("go2", True, "go2: unitree_rl_gym has no deployment script"),
    ],
)
def test_only_onnx_where_the_rest_is_not_possible(
    tmp_path, monkeypatch, capsys, name, torch, words
):
    """One line says why, and nothing of an earlier policy stays beside the new one."""
    pytest.importorskip("onnx")
    make_run(tmp_path, name)
    pretend_torch(monkeypatch, torch)
    export.main([str(tmp_path)])
    output = capsys.readouterr().out
    assert words in output and "removed" not in output
    assert names_in(tmp_path) == RUN_FILES | LOOP_FILES
    (tmp_path / "policy.pt").touch()
    export.main([str(tmp_path)])
    assert "removed, as they were of an earlier export: policy.pt" in capsys.readouterr().out
    assert names_in(tmp_path) == RUN_FILES | LOOP_FILES


def test_a_dead_stick_is_told(tmp_path, monkeypatch, capsys):
    """Trained to walk only forwards, a policy takes no command from a stick that goes both ways."""
    pytest.importorskip("onnx")
    make_run(tmp_path, "g1")
    run = json.loads((tmp_path / "run.json").read_text())
    run["args"] |= {"command_x": [0.3, 1], "command_yaw": [-0.1, 0.1]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    pretend_torch(monkeypatch, True)
    export.main([str(tmp_path)])
    output = capsys.readouterr().out
    assert "the stick forwards is dead" in output and "--command-x 0.3 1" in output
    assert "the stick for turning is dead" in output and "sideways" not in output
    assert yaml.safe_load((tmp_path / "deploy_real.yaml").read_text())["max_cmd"] == [0, 0.4, 0.1]
    ranges = json.loads((tmp_path / "policy.json").read_text())["command_ranges"]
    assert ranges == [[0, 1], [-0.4, 0.4], [-0.1, 0.1]]


def test_a_policy_without_its_run(tmp_path, monkeypatch, capsys):
    """One of those that ship: for the robot named, to the folder named."""
    pytest.importorskip("onnx")
    pretend_torch(monkeypatch, True)
    policy = ROOT / "docs" / "g1_policy.npz"
    before = names_in(ROOT / "docs")
    export.main([str(policy), "--robot", "g1", "--out", str(tmp_path / "new")])
    assert "not tested" in capsys.readouterr().out and names_in(ROOT / "docs") == before
    assert names_in(tmp_path / "new") == LOOP_FILES | UNITREE_FILES
    first = (tmp_path / "new" / "deploy_real.yaml").read_text().splitlines()[0]
    assert first == "# policy g1_policy.npz, robot g1"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["docs/g1_policy.npz"], "--robot has to say"),
        (["docs/g1_policy.npz", "--robot", "g1"], "--out has to say"),
        (["docs/g1_policy.npz", "--robot", "no", "--out", "OUT"], "--robot no: there are"),
        # As many numbers as the G1's.
        (["docs/go2_policy.npz", "--robot", "g1", "--out", "OUT"], "of another robot"),
        (["docs/g1_policy.npz", "--robot", "h1_2", "--out", "OUT"], "of another robot"),
        (["docs/g1_policy.npz", "--robot", "h1", "--out", "OUT"], "does not fit"),
        (["docs/none.npz", "--robot", "g1", "--out", "OUT"], "no policy that can be read"),
        (["docs/g1_policy.npz", "--robot", "g1", "--script", "no.py"], "--script no.py"),
        (["docs/g1_policy.npz", "--robot", "g1", "--script", "ppo_mjx.py"], "it has no robots"),
        (["docs", "--robot", "g1"], "the run.json of a run names its robot"),
        (["docs"], "is no run folder"),
    ],
)
def test_bad_calls(tmp_path, monkeypatch, capsys, flags, words):
    """One line, exit code 2, and nothing is written."""
    pytest.importorskip("onnx")
    monkeypatch.chdir(ROOT)
    pretend_torch(monkeypatch, False)
    flags = [str(tmp_path / "out") if flag == "OUT" else flag for flag in flags]
    with pytest.raises(SystemExit) as stop:
        export.main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert not names_in(tmp_path)


@pytest.mark.parametrize("broken", ["mirror_when", "w1", "b2"])
def test_a_policy_that_does_not_fit(tmp_path, capsys, broken):
    """Of an earlier version, or of another network: one line, and older files stay."""
    pytest.importorskip("onnx")
    policy = make_run(tmp_path, "g1")
    (tmp_path / "policy.pt").touch()
    if broken == "mirror_when":
        del policy[broken]
    else:
        policy[broken] = policy[broken][:-1]
    np.savez(tmp_path / "policy.npz", **policy)
    with pytest.raises(SystemExit) as stop:
        export.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "does not fit" in error and error.count("\n") == 1
    assert names_in(tmp_path) == RUN_FILES | {"policy.pt"}


class Ended(Exception):
    """The test has seen enough of a loop that goes on for ever."""


class Go2:
    """What a loop of one's own has to do with a robot: our Go2, in which only sleeping takes time.

    It walks forwards, is then told to go too slowly, gets a wild action, and is turned over.
    """

    WALK, CREEP, WILD, END = 3.0, 7.0, 9.0, 9.5  # s

    def __init__(self, act):
        self.env = unitree.CMujocoEnv(unitree.ROBOTS["go2"])
        self.env.reset(0)
        self.data = self.env.data
        self.data.qpos[7:] += np.tile([0.0, 0.4, -0.7], 4)  # crouched
        self.act = act
        self.seen = []  # time and observation
        self.sent = []  # time, targets, kp and kd
        self.walked = None  # m forwards

    def sleep(self, seconds: float) -> None:
        _, target, kp, kd = self.sent[-1] if self.sent else (0, np.zeros(12), 0, 0)
        for _ in range(round(seconds / self.env.model.opt.timestep)):
            torque = kp * (target - self.data.qpos[7:]) - kd * self.data.qvel[6:]
            self.data.ctrl[:] = np.clip(torque, -23, 23)
            mujoco.mj_step(self.env.model, self.data)

    def read(self) -> dict[str, np.ndarray]:
        data = self.data
        now = unitree.sense(self.env.robot, data.qpos, data.qvel, np.zeros(3), 0, np.array(0), np)
        command = (0.5, 0, 0) if data.time < self.CREEP else (0.15, 0.1, -0.19)
        names = "rates", "gravity", "speeds"
        angles = data.qpos[7:].copy()
        return {name: now[name] for name in names} | {
            "angles": angles,
            "command": np.array(command),
        }

    def run(self, names: list[str], inputs: dict) -> list[np.ndarray]:
        """The policy, which takes 4 ms."""
        self.seen.append((self.data.time, inputs["obs"][0]))
        self.sleep(0.004)
        action = self.act(inputs["obs"])
        return [100 * action] if self.data.time > self.WILD else [action]

    def send(self, target, kp, kd) -> None:
        self.sent.append((self.data.time, target, kp, kd))
        if self.data.time > self.WILD + 0.02:
            self.data.qpos[3:7] = [0.5**0.5, 0.5**0.5, 0, 0]  # on its side
        if self.data.time > self.END:
            raise Ended


def test_the_loop_on_the_page(tmp_path, monkeypatch):
    """deploy.md's code, with what export.py writes, in C MuJoCo."""
    pytest.importorskip("onnx")
    policy = ROOT / "docs" / "go2_policy.npz"
    export.main([str(policy), "--robot", "go2", "--out", str(tmp_path)])
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    if importlib.util.find_spec("onnxruntime"):
        onnxruntime = importlib.import_module("onnxruntime")
        session = onnxruntime.InferenceSession(
            str(tmp_path / "policy.onnx"), providers=["CPUExecutionProvider"]
        )
    else:
        reference = importlib.import_module("onnx.reference")
        session = reference.ReferenceEvaluator(str(tmp_path / "policy.onnx"))
    robot = Go2(lambda obs: session.run(["action"], {"obs": obs})[0])

    made = []

    def make_session(file: str, providers: list[str]) -> Go2:
        made.append(file)
        return robot

    runtime = types.SimpleNamespace(InferenceSession=make_session)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    monkeypatch.setattr(time, "monotonic", lambda: robot.data.time)
    monkeypatch.setattr(time, "sleep", robot.sleep)
    monkeypatch.chdir(tmp_path)
    calls = {"read": robot.read, "send": robot.send, "stopped": lambda: False}
    with pytest.raises(Ended):
        exec(code[1], calls)
    assert made == ["policy.onnx"]

    env = unitree.ROBOTS["go2"]
    times, targets, stiffness, damping = map(np.array, zip(*robot.sent, strict=True))
    driven = stiffness.any(axis=1)
    assert np.abs(np.diff(times[driven])[:-1] - 0.02).max() < 0.0041
    assert times[driven][-1] == pytest.approx(0.02 * (driven.sum() - 1), abs=0.0041)
    np.testing.assert_allclose(targets[149], env.joint_array("default"), atol=0.01)
    assert (targets >= env.limits[:, 0]).all() and (targets <= env.limits[:, 1]).all()
    wild = targets[driven & (times > robot.WILD)]
    assert (np.isclose(wild, env.limits[:, 0]) | np.isclose(wild, env.limits[:, 1])).mean() > 0.8

    seen_at, seen = map(np.array, zip(*robot.seen, strict=True))
    np.testing.assert_allclose(seen[0, -2:], [0, 1], atol=1e-6)
    walking = (seen_at > robot.WALK) & (seen_at < robot.CREEP)
    np.testing.assert_allclose(seen[walking][:, 6:9], np.tile([1, 0, 0], (walking.sum(), 1)))
    assert not seen[seen_at > robot.CREEP + 0.02][:, 6:9].any()
    np.testing.assert_allclose(seen[6, -2:], [1, 0], atol=1e-6)  # a quarter of 24 steps later
    assert robot.data.qpos[0] > 1.0, "it has not walked"

    ended = ~driven
    assert ended[-10:].all() and (damping[ended] > 0).all()
    assert times[ended][0] < robot.WILD + 0.1


def test_what_unitrees_loop_cannot_give(monkeypatch):
    """Another gait period, and a sense that they do not have."""
    assert [name for name in unitree.ROBOTS if export.why_not(unitree, name)] == [
        "go2",
        "go2_no_clock",
    ]
    g1 = unitree.ROBOTS["g1"]
    turned = dict(reversed(g1.joints.items()))
    monkeypatch.setitem(unitree.ROBOTS, "g1", dataclasses.replace(g1, joints=turned))
    assert "another order; those of Unitree's are left_hip_pitch" in export.why_not(unitree, "g1")
    monkeypatch.setitem(unitree.ROBOTS, "g1", unitree.ROBOTS["g1_29dof"])
    assert "other joints" in export.why_not(unitree, "g1")
    slow = dataclasses.replace(g1, gait_period=0.9)
    monkeypatch.setitem(unitree.ROBOTS, "g1", slow)
    assert "0.9 s" in export.why_not(unitree, "g1")
    monkeypatch.setitem(unitree.ROBOTS, "g1", dataclasses.replace(slow, clock=False))
    assert export.why_not(unitree, "g1") is None
    heights = unitree.SEEN["actor"] | {
        "heights": unitree.Part(width=9, scale=1.0, noise=0.0, mirror=None)
    }
    monkeypatch.setitem(unitree.SEEN, "actor", heights)
    assert "heights" in export.why_not(unitree, "g1")
