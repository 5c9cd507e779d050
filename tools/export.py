"""Take a trained policy out of the training script: ONNX, and Unitree's deployment scripts.

    python tools/export.py runs/NAME
    python tools/export.py runs/NAME --script my_robot.py
    python tools/export.py docs/g1_policy.npz --robot g1 --out FOLDER

It writes policy.onnx to the run's folder, or to that of --out: obs [N, O] -> action [N, A], both
float32, with the normaliser inside, if the script has one. The graph is what the script's own
function `act` computes, so that a copy of a script with another network needs no other tool.
run.json names the script, which is looked for above this folder; --script names another one. A
policy without a run.json is taken for one of ppo_mjx_unitree.py with the robot's default flags.
Needs the package onnx.

Of a legged robot it writes policy.json as well: what a loop of your own has to know. For one that
unitreerobotics/unitree_rl_gym deploys, it writes what those scripts load: policy.pt, in
TorchScript, deploy_mujoco.yaml and deploy_real.yaml; see docs/deploy.md. That needs PyTorch, and is
left out where PyTorch is missing.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, NoReturn
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax
import mujoco
import numpy as np
from tools.replay_nan import load_script


def fail(message: str) -> NoReturn:
    """End with one line and exit code 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


# ---- What is exported ----------------------------------------------------------------------------
class Source(NamedTuple):
    """A policy, and what made it."""

    script: ModuleType
    file: Path  # the policy's
    folder: Path | None  # the run's; None: the policy stands alone
    run: dict[str, Any]  # the content of run.json; of a policy alone, script and args


def find_source(path: Path, script: Path | None, robot: str | None) -> Source:
    """The policy of a run folder, or a policy's file. script, robot: what the flags name."""
    if path.suffix != ".npz":
        if robot:
            fail(
                f"--robot {robot}: for a policy's file alone; the run.json of a run names its robot"
            )
        try:
            run = json.loads((path / "run.json").read_text())
            module = load_script(script or ROOT / run["script"])
        except Exception as error:
            problem = f"{type(error).__name__}: {error!s:.200}"
            fail(f"{path} is no run folder, or its script is not there ({problem})")
        return Source(module, path / "policy.npz", path, run)

    if not robot:
        fail(f"{path}: without a run.json, --robot has to say whose policy it is")
    file = script or ROOT / "ppo_mjx_unitree.py"
    try:
        module = load_script(file)
        legged = hasattr(module, "ROBOTS")
    except Exception as error:
        fail(f"--script {file}: {type(error).__name__}: {error!s:.200}")
    if not legged:
        fail(f"--script {file}: it has no robots; of its policies, name the run folder")
    args = dataclasses.asdict(module.default_args(robot))
    return Source(module, path, None, {"script": f"{module.__name__}.py", "args": args})


def tell_changes(source: Source) -> None:
    """Say what has changed since the run was trained, as the script's --evaluate does."""
    script = source.script
    if source.folder is None or not hasattr(script, "tell_changes"):
        return
    args = script.read_run(source.folder)
    if hasattr(script, "ROBOTS"):
        model = script.ROBOTS[args.robot].model
    else:
        model = script.load_model(script.Env(args).task)
    script.tell_changes(source.folder, model)


def read_policy(source: Source) -> dict[str, np.ndarray]:
    """The arrays of the policy's file, if they fit the script and the robot."""
    script, file = source.script, source.file
    try:
        with np.load(file, allow_pickle=False) as arrays:
            policy = dict(arrays)
    except Exception as error:
        fail(f"{file}: no policy that can be read ({type(error).__name__}: {error!s:.200})")
    robot = None
    try:
        obs_size = len(policy.get("obs_mean", policy["w0"]))
        if hasattr(script, "ROBOTS"):
            robot = script.ROBOTS[source.run["args"]["robot"]]
            obs_size = observation_size(script, robot)
        _, action = script.act(policy, script.initial_memory((1,)), np.zeros((1, obs_size)))
        if robot and action.shape[-1] != len(robot.acted):
            raise ValueError(f"{action.shape[-1]} actions, but the robot has {len(robot.acted)}")
        if robot and "mirror_action" in policy:  # two robots may have as many joints
            mirror = script.mirror_actions(robot, np.eye(len(robot.acted)))
            if not np.array_equal(policy["mirror_action"], mirror):
                raise ValueError("it is of another robot: its mirror exchanges other joints")
    except (KeyError, ValueError) as error:  # an array lacks, or has another shape
        fail(
            f"{file} does not fit the script or the robot ({type(error).__name__}: {error!s:.200})"
        )
    return policy


def observation_size(script: ModuleType, robot) -> int:
    """How many numbers the actor sees."""
    columns = script.part_slices(robot, script.seen_parts(robot, "actor"))
    return max(where.stop for where in columns.values())


def verdict(run: dict[str, Any]) -> str:
    """What run.json says of the script's test at the end of the training."""
    test = run.get("evaluation", {})
    if "passed" not in test:
        return "not tested, as far as is known here; --evaluate tests the policy of a run"
    if test["passed"]:
        return "passed the test"
    marks = [f"{name} {test[name]:.3g}" for name in ("falls", "error", "yaw") if name in test]
    return f"FAILED the test: {', '.join(marks)}"


# ---- ONNX ----------------------------------------------------------------------------------------
class Graph:
    """An ONNX graph that grows. It takes NumPy's place in `act`, as the argument xp."""

    def __init__(self):
        self.nodes = []
        self.constants = []

    def constant(self, value) -> str:
        """The name of a new float32 constant."""
        from onnx import numpy_helper

        name = f"constant_{len(self.constants)}"
        array = np.asarray(value, np.float32)
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, operator: str, *inputs) -> "Symbol":
        """The result of an operator of ONNX on symbols and numbers."""
        from onnx import helper

        names = [x.name if isinstance(x, Symbol) else self.constant(x) for x in inputs]
        result = Symbol(self, f"{operator.lower()}_{len(self.nodes)}")
        self.nodes.append(helper.make_node(operator, names, [result.name]))
        return result

    def __getattr__(self, function: str):
        """NumPy's function of that name, for symbols as well as for arrays."""
        if function not in FUNCTIONS:
            raise AttributeError(f"export.py does not know NumPy's {function}")

        def call(*inputs):
            if any(isinstance(x, Symbol) for x in inputs):
                return FUNCTIONS[function](self, *inputs)
            return getattr(np, function)(*inputs)

        return call


FUNCTIONS = {
    "clip": lambda graph, x, low, high: graph.node("Min", graph.node("Max", x, low), high),
    "exp": lambda graph, x: graph.node("Exp", x),
    "expm1": lambda graph, x: graph.node("Sub", graph.node("Exp", x), 1.0),
    "maximum": lambda graph, x, y: graph.node("Max", x, y),
    "minimum": lambda graph, x, y: graph.node("Min", x, y),
    "sqrt": lambda graph, x: graph.node("Sqrt", x),
    "tanh": lambda graph, x: graph.node("Tanh", x),
    "where": lambda graph, condition, x, y: graph.node("Where", condition, x, y),
}


class Symbol:
    """An array in the graph."""

    __array_ufunc__ = None  # NumPy's arrays leave operators to this class

    def __init__(self, graph: Graph, name: str):
        self.graph = graph
        self.name = name

    def __add__(self, other):
        return self.graph.node("Add", self, other)

    def __radd__(self, other):
        return self.graph.node("Add", other, self)

    def __sub__(self, other):
        return self.graph.node("Sub", self, other)

    def __rsub__(self, other):
        return self.graph.node("Sub", other, self)

    def __mul__(self, other):
        return self.graph.node("Mul", self, other)

    def __rmul__(self, other):
        return self.graph.node("Mul", other, self)

    def __truediv__(self, other):
        return self.graph.node("Div", self, other)

    def __matmul__(self, other):
        return self.graph.node("MatMul", self, other)

    def __gt__(self, other):
        return self.graph.node("Greater", self, other)


def write_onnx(script: ModuleType, policy: dict[str, np.ndarray], file: Path) -> None:
    """Write what script.act makes of an observation.

    What a policy with memory remembers becomes further inputs, memory_0 ..., and further outputs,
    next_memory_0 ...
    """
    import onnx
    from onnx import helper

    def describe(name: str, size: int):
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", size])

    def result(name: str, symbol: Symbol):
        graph.nodes.append(helper.make_node("Identity", [symbol.name], [name]))

    graph = Graph()
    obs_size = len(policy.get("obs_mean", policy["w0"]))
    leaves, tree = jax.tree.flatten(script.initial_memory((1,)))
    names = [f"memory_{i}" for i in range(len(leaves))]
    memory = jax.tree.unflatten(tree, [Symbol(graph, name) for name in names])

    _, example = script.act(policy, script.initial_memory((1,)), np.zeros((1, obs_size)))
    memory, action = script.act(policy, memory, Symbol(graph, "obs"), graph)
    result("action", action)
    inputs = [describe("obs", obs_size)]
    outputs = [describe("action", example.shape[-1])]
    for name, leaf, symbol in zip(names, leaves, jax.tree.leaves(memory), strict=True):
        result("next_" + name, symbol)
        inputs.append(describe(name, leaf.shape[-1]))
        outputs.append(describe("next_" + name, leaf.shape[-1]))

    content = helper.make_graph(graph.nodes, "policy", inputs, outputs, graph.constants)
    version = [helper.make_opsetid("", 17)]
    model = helper.make_model(content, opset_imports=version, ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)


# ---- Unitree's deployment scripts ----------------------------------------------------------------
# deploy_mujoco.py and deploy_real.py of unitreerobotics/unitree_rl_gym (276801e) give a policy
# these parts of the observation, in this order. The YAML says how the parts in SCALE_KEYS are
# scaled; the others have the scale 1.
UNITREE_PARTS = ("rates", "gravity", "command", "angles", "speeds", "action", "clock")
SCALE_KEYS = {
    "rates": "ang_vel_scale",
    "command": "cmd_scale",
    "angles": "dof_pos_scale",
    "speeds": "dof_vel_scale",
}
UNITREE_PERIOD = 0.8  # s, of the clock
UNITREE_DT = 0.002  # s, of a physics step of deploy_mujoco.py
# The flags of the command's ranges, and how the sticks that cover them are pushed.
COMMAND_FLAGS = {"command_x": "forwards", "command_y": "sideways", "command_yaw": "for turning"}
# What today's to_xml writes, and MuJoCo 3.2.3, which unitree_rl_gym asks for, refuses. Without them
# the model is the same: motors have no input, and colour spaces are chosen by themselves.
NEW_ATTRIBUTES = ("input", "colorspace")


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What Unitree's configurations say of a robot's hardware."""

    # The model for deploy_mujoco.py, in Unitree's repository; None: none is sure to be there, and
    # export.py writes ours.
    scene: str | None
    message: str  # of the robot's bus: hg or go
    imu: str  # the body it is on: pelvis or torso
    joints: tuple[str, ...]  # as ROBOTS has them
    motors: tuple[int, ...]  # of these joints, in their order
    # Waist and arms where no action moves them: motors and gains, Nm/rad and Nm s/rad.
    held_motors: tuple[int, ...] = ()
    held_stiffness: tuple[float, ...] = ()
    held_damping: tuple[float, ...] = ()
    weak_motors: tuple[int, ...] = ()  # only of robots with go messages


def both_sides(*joints: str) -> tuple[str, ...]:
    """The joints of a left limb, and those of the right one."""
    return tuple(f"{side}_{joint}" for side in ("left", "right") for joint in joints)


G1_LEGS = both_sides("hip_pitch", "hip_roll", "hip_yaw", "knee", "ankle_pitch", "ankle_roll")
G1_WAIST = ("waist_yaw", "waist_roll", "waist_pitch")
G1_ARMS = both_sides(
    *("shoulder_pitch", "shoulder_roll", "shoulder_yaw", "elbow"),
    *("wrist_roll", "wrist_pitch", "wrist_yaw"),
)
G1_ARM = (100, 100, 50, 50, 20, 20, 20)  # Nm/rad
DEPLOYMENTS = {
    "g1": Deployment(
        scene="g1_description/scene.xml",
        message="hg",
        imu="pelvis",
        joints=G1_LEGS,
        motors=tuple(range(12)),
        held_motors=tuple(range(12, 29)),
        held_stiffness=(300, 300, 300, *G1_ARM, *G1_ARM),
        held_damping=(3, 3, 3, *(2, 2, 2, 2, 1, 1, 1) * 2),
    ),
    "g1_29dof": Deployment(
        scene=None,
        message="hg",
        imu="pelvis",
        joints=tuple(f"{joint}_joint" for joint in (*G1_LEGS, *G1_WAIST, *G1_ARMS)),
        motors=tuple(range(29)),
    ),
    "h1": Deployment(
        scene="h1/scene.xml",
        message="go",
        imu="torso",
        joints=both_sides("hip_yaw", "hip_roll", "hip_pitch", "knee", "ankle"),
        motors=(7, 3, 4, 5, 10, 8, 0, 1, 2, 11),
        held_motors=(6, 16, 17, 18, 19, 12, 13, 14, 15),
        held_stiffness=(300, *(100, 100, 50, 50) * 2),
        held_damping=(3, *(2, 2, 2, 2) * 2),
        weak_motors=tuple(range(10, 20)),
    ),
    "h1_2": Deployment(
        scene="h1_2/scene.xml",
        message="hg",
        imu="torso",
        joints=both_sides("hip_yaw", "hip_pitch", "hip_roll", "knee", "ankle_pitch", "ankle_roll"),
        motors=tuple(range(12)),
        held_motors=tuple(range(12, 27)),
        held_stiffness=(300, *(120, 120, 120, 80, 80, 80, 80) * 2),
        held_damping=(3, *(2, 2, 2, 1, 1, 1, 1) * 2),
    ),
}


def why_not(script: ModuleType, name: str) -> str | None:
    """Why Unitree's scripts cannot run a policy of this robot; None if they can."""
    robot = script.ROBOTS[name]
    if name not in DEPLOYMENTS:
        return "unitree_rl_gym has no deployment script for it"
    if tuple(robot.joints) != DEPLOYMENTS[name].joints:
        theirs = ", ".join(DEPLOYMENTS[name].joints)
        return (
            f"the motors are of other joints, or in another order; those of Unitree's are {theirs}"
        )
    unknown = script.seen_parts(robot, "actor").keys() - set(UNITREE_PARTS)
    if unknown:
        return f"Unitree's scripts do not tell a policy its {', '.join(sorted(unknown))}"
    if "clock" in script.seen_parts(robot, "actor") and robot.gait_period != UNITREE_PERIOD:
        return f"its gait takes {robot.gait_period} s, and Unitree's clock {UNITREE_PERIOD} s"
    return None


class Translation(NamedTuple):
    """From Unitree's observation and action to ours; every joint has an action there.

    U = 9 + 3 * J + 2, the size of Unitree's observation.
    """

    obs: np.ndarray  # [U, O]: Unitree's observation @ obs is ours
    action: np.ndarray  # [A, J]: our action @ action is Unitree's
    command: np.ndarray  # [U, 3]: Unitree's observation @ command is the command, scaled
    # [3, 3]: that command, squared, @ speeds tells for each of its numbers how often its speed,
    # squared, is that of MIN_COMMAND. Forwards and to the left have one speed together.
    speeds: np.ndarray


def translate(script: ModuleType, robot) -> Translation:
    """How a policy of this robot reads Unitree's observation, and what Unitree makes of an action.

    What differs today: joints share one action scale at Unitree's, where ours have `reach`; and a
    stick there has no dead zone.
    """
    joints = len(robot.joints)
    moved = np.arange(len(robot.acted)), robot.acted  # rows and columns
    reach = robot.joint_array("reach")[robot.acted]
    action = np.zeros((len(robot.acted), joints), np.float32)
    action[moved] = reach

    widths = [3, 3, 3, joints, joints, joints, 2]
    ends = np.cumsum(widths)
    rows = dict(zip(UNITREE_PARTS, zip(ends - widths, ends, strict=True), strict=True))
    parts = script.seen_parts(robot, "actor")
    obs = np.zeros((ends[-1], observation_size(script, robot)), np.float32)
    for name, where in script.part_slices(robot, parts).items():
        start, end = rows[name]
        scale = 1.0 if name in SCALE_KEYS else np.array(parts[name].scale)
        if parts[name].width == "actions":
            block = np.zeros((joints, len(robot.acted)))
            block.T[moved] = scale / reach
        else:
            block = np.eye(end - start) * scale
        obs[start:end, where] = block

    command = np.zeros((ends[-1], 3), np.float32)
    command[slice(*rows["command"])] = np.eye(3)
    together = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    slowest = script.MIN_COMMAND * np.array(parts["command"].scale)
    speeds = (together / np.square(slowest)[:, None]).astype(np.float32)
    return Translation(obs=obs, action=action, command=command, speeds=speeds)


def act_for_unitree(
    script: ModuleType, translation: Translation, policy: dict, memory: Any, obs, xp=np
) -> tuple[Any, Any]:
    """script.act for Unitree's observations [..., U] and actions [..., J].

    Slow commands become 0, as in training (`Env.draw_command`): the policy has seen none.
    """
    command = obs @ translation.command
    # A command of exactly MIN_COMMAND stays, whatever float32 makes of its square.
    slow = (command * command) @ translation.speeds < 1 - 1e-5
    obs = obs - xp.where(slow, command, 0.0 * command) @ translation.command.T
    memory, action = script.act(policy, memory, obs @ translation.obs, xp)
    return memory, action @ translation.action


def torch_functions() -> SimpleNamespace:
    """PyTorch in NumPy's place in `act`: the functions of which PyTorch asks other arguments."""
    import torch

    return SimpleNamespace(
        clip=torch.clip,
        exp=torch.exp,
        expm1=torch.expm1,
        maximum=lambda x, y: torch.clamp(x, min=y),
        minimum=lambda x, y: torch.clamp(x, max=y),
        sqrt=torch.sqrt,
        tanh=torch.tanh,
        where=torch.where,
    )


def write_torchscript(
    script: ModuleType, policy: dict[str, np.ndarray], translation: Translation, file: Path
) -> None:
    """Write `act_for_unitree` as the module that Unitree's scripts load: obs [1, O] -> action.

    What a policy with memory remembers stays in the module from call to call.
    """
    import torch

    def tensor(array) -> torch.Tensor:
        return torch.tensor(np.asarray(array, np.float32))

    leaves, tree = jax.tree.flatten(script.initial_memory((1,)))
    fresh = [tensor(leaf) for leaf in leaves]
    functions = torch_functions()

    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, array in policy.items():
                self.register_buffer("policy_" + name, tensor(array))
            for name, array in translation._asdict().items():
                self.register_buffer("translation_" + name, tensor(array))
            for i, memory in enumerate(fresh):
                self.register_buffer(f"memory_{i}", memory.clone())

        def forward(self, obs):
            own_policy = {name: getattr(self, "policy_" + name) for name in policy}
            own_translation = Translation(
                *(getattr(self, "translation_" + name) for name in Translation._fields)
            )
            held = [getattr(self, f"memory_{i}") for i in range(len(fresh))]
            memory = jax.tree.unflatten(tree, [memory.clone() for memory in held])
            memory, action = act_for_unitree(
                script, own_translation, own_policy, memory, obs, functions
            )
            for buffer, following in zip(held, jax.tree.leaves(memory), strict=True):
                buffer.copy_(following)
            return action

    example = torch.zeros(1, len(translation.obs))
    with torch.no_grad():
        traced = torch.jit.trace(Policy(), example, check_trace=False)
        for i, memory in enumerate(fresh):  # the trace has run once
            getattr(traced, f"memory_{i}").copy_(memory)
    traced.save(str(file))


def shared_settings(script: ModuleType, robot) -> dict[str, Any]:
    """What both configurations say of a robot."""
    parts = script.seen_parts(robot, "actor")
    scales = {key: parts[name].scale for name, key in SCALE_KEYS.items()}
    return {
        "kps": robot.joint_array("stiffness").tolist(),
        "kds": robot.joint_array("damping").tolist(),
        "default_angles": robot.joint_array("default").tolist(),
        **scales,
        "action_scale": robot.action_scale,
        "num_actions": len(robot.joints),
        "num_obs": len(translate(script, robot).obs),
    }


def mujoco_settings(script: ModuleType, name: str, folder: Path) -> dict[str, Any]:
    """The configuration for deploy_mujoco.py; folder: where the files are written."""
    scene = DEPLOYMENTS[name].scene
    ours = str((folder / "scene.xml").resolve())
    return {
        "policy_path": str((folder / "policy.pt").resolve()),
        "xml_path": f"{{LEGGED_GYM_ROOT_DIR}}/resources/robots/{scene}" if scene else ours,
        "simulation_duration": 60.0,
        "simulation_dt": UNITREE_DT,
        "control_decimation": round(script.CONTROL_DT / UNITREE_DT),
        **shared_settings(script, script.ROBOTS[name]),
        "cmd_init": [0.5, 0.0, 0.0],
    }


def real_settings(script: ModuleType, name: str, folder: Path, args: dict) -> dict[str, Any]:
    """The configuration for deploy_real.py; folder: where the files are; args: the run's."""
    deployment = DEPLOYMENTS[name]
    weak = {"weak_motor": list(deployment.weak_motors)} if deployment.weak_motors else {}
    # The stick reaches as far as the policy was trained in both directions.
    ranges = [args[key] for key in COMMAND_FLAGS]
    return {
        "control_dt": script.CONTROL_DT,
        "msg_type": deployment.message,
        "imu_type": deployment.imu,
        **weak,
        "lowcmd_topic": "rt/lowcmd",
        "lowstate_topic": "rt/lowstate",
        "policy_path": str((folder / "policy.pt").resolve()),
        "leg_joint2motor_idx": list(deployment.motors),
        "arm_waist_joint2motor_idx": list(deployment.held_motors),
        "arm_waist_kps": list(deployment.held_stiffness),
        "arm_waist_kds": list(deployment.held_damping),
        "arm_waist_target": [0.0] * len(deployment.held_motors),
        **shared_settings(script, script.ROBOTS[name]),
        "max_cmd": [max(0.0, min(-low, high)) for low, high in ranges],
    }


def dead_sticks(script: ModuleType, max_cmd: list[float], args: dict) -> list[str]:
    """A line for each stick whose full deflection is in the dead zone."""
    lines = []
    for (key, axis), most in zip(COMMAND_FLAGS.items(), max_cmd, strict=True):
        if most < script.MIN_COMMAND:
            flag = f"--{key.replace('_', '-')} {args[key][0]:g} {args[key][1]:g}"
            lines.append(
                f"the stick {axis} is dead: max_cmd in deploy_real.yaml is {most:g}, by the run's"
                f" {flag}, and less than {script.MIN_COMMAND:g} becomes 0"
            )
    return lines


def write_yaml(settings: dict[str, Any], file: Path, notes: list[str]) -> None:
    """Notes as comments, then one key a line; its value in JSON is YAML, too."""
    lines = [f"# {' '.join(note.split())}" for note in notes]
    lines += [f"{key}: {json.dumps(value)}" for key, value in settings.items()]
    file.write_text("\n".join(lines) + "\n")


def write_scene(script: ModuleType, robot, file: Path) -> None:
    """Our model for deploy_mujoco.py, which writes torques to ctrl and starts at the joints' 0."""
    spec = mujoco.MjSpec.from_file(str(script.MODELS / robot.mjcf))
    most = script.make_controller(robot).max_torque
    for actuator, torque in zip(spec.actuators, most, strict=True):
        actuator.set_to_motor()
        actuator.inheritrange = 0
        actuator.ctrlrange = (-torque, torque)
    spec.worldbody.first_body().pos[2] = robot.start_height
    for key in spec.keys:  # a servo's ctrl is no torque
        spec.delete(key)
    spec.compile()
    tree = ElementTree.fromstring(spec.to_xml())
    for element in tree.iter():
        for attribute in NEW_ATTRIBUTES:
            element.attrib.pop(attribute, None)
    file.write_text(ElementTree.tostring(tree, encoding="unicode") + "\n")


def describe(source: Source) -> list[str]:
    """What both configurations begin with: where the policy comes from, and whether it is good."""
    run = source.run
    where = f"run {source.folder.resolve().name}" if source.folder else f"policy {source.file.name}"
    commit = f", commit {run['commit']}" if run.get("commit") else ""
    return [f"{where}, robot {run['args']['robot']}{commit}", verdict(run)]


def write_deployment(source: Source, policy: dict, folder: Path) -> list[str]:
    """Write what Unitree's scripts load. Returns lines: what was written, or why nothing was."""
    script, args = source.script, source.run["args"]
    name = args["robot"]
    robot = script.ROBOTS[name]
    problem = why_not(script, name)
    if problem:
        return [f"no files for Unitree's scripts: {name}: {problem}"]
    if not importlib.util.find_spec("torch"):
        return ["no files for Unitree's scripts: PyTorch is missing; pip install torch"]

    write_torchscript(script, policy, translate(script, robot), folder / "policy.pt")
    notes = describe(source)
    real = real_settings(script, name, folder, args)
    write_yaml(mujoco_settings(script, name, folder), folder / "deploy_mujoco.yaml", notes)
    write_yaml(real, folder / "deploy_real.yaml", notes)
    if DEPLOYMENTS[name].scene is None:
        write_scene(script, robot, folder / "scene.xml")
    written = f"Unitree's scripts: policy.pt, deploy_mujoco.yaml and deploy_real.yaml in {folder}"
    return [written, *dead_sticks(script, real["max_cmd"], args)]


# ---- Your own loop -------------------------------------------------------------------------------
def loop_settings(script: ModuleType, robot, args: dict) -> dict[str, Any]:
    """What a loop has to know that runs policy.onnx: SI units, joints in the order of ROBOTS.

    args: the run's.
    """
    parts = script.seen_parts(robot, "actor")
    scales = robot.action_scale * robot.joint_array("reach")[robot.acted]
    return {
        "joints": list(robot.joints),
        "default": robot.joint_array("default").tolist(),
        "kp": robot.joint_array("stiffness").tolist(),
        "kd": robot.joint_array("damping").tolist(),
        "limits": robot.limits.tolist(),
        "acted": robot.acted.tolist(),  # numbers of the joints that actions move
        "action_scale": scales.tolist(),  # of these joints
        "observation": [
            {"name": name, "width": script.part_width(robot, part), "scale": part.scale}
            for name, part in parts.items()
        ],
        "control_dt": script.CONTROL_DT,
        "gait_ticks": robot.gait_ticks if "clock" in parts else None,
        "min_command": script.MIN_COMMAND,
        # With 0, to stand, where a training had none.
        "command_ranges": [
            [min(low, 0.0), max(high, 0.0)] for low, high in (args[key] for key in COMMAND_FLAGS)
        ],
    }


# ---- Command line --------------------------------------------------------------------------------
UNITREE_FILES = ("policy.pt", "deploy_mujoco.yaml", "deploy_real.yaml")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="run folder, or the file of a policy alone")
    parser.add_argument("--script", type=Path, help="the script that made the run")
    parser.add_argument("--robot", help="whose policy it is, if it is a file alone")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: the run's folder")
    flags = parser.parse_args(argv)

    if not importlib.util.find_spec("onnx"):
        fail("onnx is missing; pip install onnx")
    source = find_source(flags.run_dir, flags.script, flags.robot)
    folder = flags.out or source.folder
    if folder is None:
        fail(f"{source.file}: --out has to say where to write")
    policy = read_policy(source)
    tell_changes(source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = [name for name in UNITREE_FILES if (folder / name).exists()]
        for name in old:  # of another policy, perhaps
            (folder / name).unlink()
    except OSError as error:
        fail(f"{folder}: cannot write to it ({error})")

    file = folder / "policy.onnx"
    write_onnx(source.script, policy, file)
    print(f"ONNX: {file}")
    if hasattr(source.script, "ROBOTS"):
        args = source.run["args"]
        settings = loop_settings(source.script, source.script.ROBOTS[args["robot"]], args)
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in settings.items()]
        (folder / "policy.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"a loop of your own: policy.json in {folder}")
        print(*write_deployment(source, policy, folder), sep="\n")
        lost = [name for name in old if not (folder / name).exists()]
        if lost:
            print(f"removed, as they were of an earlier export: {', '.join(lost)}")
        print(f"the policy: {verdict(source.run)}")


if __name__ == "__main__":
    main(sys.argv[1:])
