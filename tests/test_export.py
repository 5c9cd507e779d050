"""Policies outside the training script: Unitree's own loop, rebuilt here, on our models."""

import dataclasses
import importlib.util
import json
import types
from pathlib import Path

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


def run_unitree_loop(model, height: float, settings: dict, act, steps: int):
    """What deploy_mujoco.py does with a configuration and a policy, without its viewer.

    It starts with all joints at 0, holds the default pose for the first 10 physics steps, and has
    a clock that counts physics steps. act: float32 [1, num_obs] -> float32 [1, num_actions].
    Yields data, the observation, the action and the next targets, `steps` times.
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
    for i in range(1, steps * settings["control_decimation"] + 1):
        data.ctrl[:] = (target - data.qpos[7:]) * stiffness - data.qvel[6:] * damping
        mujoco.mj_step(model, data)
        if i % settings["control_decimation"]:
            continue
        w, x, y, z = data.qpos[3:7]
        phase = 2 * np.pi * (i * settings["simulation_dt"] % 0.8) / 0.8
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
        export.write_yaml(settings, tmp_path / "settings.yaml")
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
        obs=random.standard_normal((5, 4)), action=random.standard_normal((3, 2))
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


def test_a_run_folder_becomes_a_deployment(tmp_path, monkeypatch, capsys):
    """The command line: policy, both configurations and, where Unitree's is uncertain, a model."""
    pytest.importorskip("onnx")
    make_run(tmp_path, "g1_29dof")
    pretend_torch(monkeypatch, True)
    export.main([str(tmp_path)])
    assert "policy.pt" in capsys.readouterr().out
    names = {"policy.onnx", "policy.pt", "deploy_mujoco.yaml", "deploy_real.yaml", "scene.xml"}
    assert names | {"policy.npz", "run.json"} == {file.name for file in tmp_path.iterdir()}
    settings = yaml.safe_load((tmp_path / "deploy_mujoco.yaml").read_text())
    assert settings["xml_path"] == str(tmp_path / "scene.xml") and settings.keys() == MUJOCO_KEYS


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
    """One line says why."""
    pytest.importorskip("onnx")
    make_run(tmp_path, name)
    pretend_torch(monkeypatch, torch)
    export.main([str(tmp_path)])
    assert words in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"policy.npz", "run.json", "policy.onnx"}


def test_what_unitrees_loop_cannot_give(monkeypatch):
    """Another gait period, and a sense that they do not have."""
    assert [name for name in unitree.ROBOTS if export.why_not(unitree, name)] == [
        "go2",
        "go2_no_clock",
    ]
    slow = dataclasses.replace(unitree.ROBOTS["g1"], gait_period=0.9)
    monkeypatch.setitem(unitree.ROBOTS, "g1", slow)
    assert "0.9 s" in export.why_not(unitree, "g1")
    monkeypatch.setitem(unitree.ROBOTS, "g1", dataclasses.replace(slow, clock=False))
    assert export.why_not(unitree, "g1") is None
    heights = unitree.SEEN["actor"] | {
        "heights": unitree.Part(width=9, scale=1.0, noise=0.0, mirror=None)
    }
    monkeypatch.setitem(unitree.SEEN, "actor", heights)
    assert "heights" in export.why_not(unitree, "g1")
