"""Take a trained policy out of the training script: ONNX, and Unitree's deployment scripts.

    python tools/export.py runs/NAME
    python tools/export.py runs/NAME --script my_robot.py

It writes runs/NAME/policy.onnx: obs [N, O] -> action [N, A], both float32, with the normaliser
inside, if the script has one. The graph is what the script's own function `act` computes, so that
a copy of a script with another network needs no other tool. run.json names the script, which is
looked for above this folder; --script names another one. Needs the package onnx.

For a robot that unitreerobotics/unitree_rl_gym deploys, it writes what those scripts load, too:
policy.pt, in TorchScript, deploy_mujoco.yaml and deploy_real.yaml; see docs/deploy.md. That needs
PyTorch, and is left out where PyTorch is missing.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax
import mujoco
import numpy as np
from tools.replay_nan import load_script


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


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What Unitree's configurations say of a robot's hardware."""

    # The model for deploy_mujoco.py, in Unitree's repository; None: none is sure to be there, and
    # export.py writes ours.
    scene: str | None
    message: str  # of the robot's bus: hg or go
    imu: str  # the body it is on: pelvis or torso
    motors: tuple[int, ...]  # of the joints in ROBOTS, in their order
    # Waist and arms where no action moves them: motors and gains, Nm/rad and Nm s/rad.
    held_motors: tuple[int, ...] = ()
    held_stiffness: tuple[float, ...] = ()
    held_damping: tuple[float, ...] = ()
    weak_motors: tuple[int, ...] = ()  # only of robots with go messages


G1_ARM = (100, 100, 50, 50, 20, 20, 20)
DEPLOYMENTS = {
    "g1": Deployment(
        scene="g1_description/scene.xml",
        message="hg",
        imu="pelvis",
        motors=tuple(range(12)),
        held_motors=tuple(range(12, 29)),
        held_stiffness=(300, 300, 300, *G1_ARM, *G1_ARM),
        held_damping=(3, 3, 3, *(2, 2, 2, 2, 1, 1, 1) * 2),
    ),
    "g1_29dof": Deployment(scene=None, message="hg", imu="pelvis", motors=tuple(range(29))),
    "h1": Deployment(
        scene="h1/scene.xml",
        message="go",
        imu="torso",
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
    unknown = script.seen_parts(robot, "actor").keys() - set(UNITREE_PARTS)
    if unknown:
        return f"Unitree's scripts do not tell a policy its {', '.join(sorted(unknown))}"
    if "clock" in script.seen_parts(robot, "actor") and robot.gait_period != UNITREE_PERIOD:
        return f"its gait takes {robot.gait_period} s, and Unitree's clock {UNITREE_PERIOD} s"
    return None


class Translation(NamedTuple):
    """From Unitree's observation and action to ours; every joint has an action there."""

    obs: np.ndarray  # [9 + 3 * J + 2, O]: Unitree's observation @ obs is ours
    action: np.ndarray  # [A, J]: our action @ action is Unitree's


def translate(script: ModuleType, robot) -> Translation:
    """How a policy of this robot reads Unitree's observation, and what Unitree makes of an action.

    The only difference there is today is `reach`: joints share one action scale at Unitree's.
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
    columns = script.part_slices(robot, parts)
    obs = np.zeros((ends[-1], max(where.stop for where in columns.values())), np.float32)
    for name, where in columns.items():
        start, end = rows[name]
        scale = 1.0 if name in SCALE_KEYS else np.array(parts[name].scale)
        if parts[name].width == "actions":
            block = np.zeros((joints, len(robot.acted)))
            block.T[moved] = scale / reach
        else:
            block = np.eye(end - start) * scale
        obs[start:end, where] = block
    return Translation(obs=obs, action=action)


def act_for_unitree(
    script: ModuleType, translation: Translation, policy: dict, memory: Any, obs, xp=np
) -> tuple[Any, Any]:
    """script.act for Unitree's observations [..., 9 + 3 * J + 2] and actions [..., J]."""
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
            own_translation = Translation(obs=self.translation_obs, action=self.translation_action)
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
    """The configuration for deploy_mujoco.py; folder: the run's."""
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
    """The configuration for deploy_real.py; folder and args: the run's."""
    deployment = DEPLOYMENTS[name]
    weak = {"weak_motor": list(deployment.weak_motors)} if deployment.weak_motors else {}
    # The stick reaches as far as the policy was trained in both directions.
    ranges = [args["command_x"], args["command_y"], args["command_yaw"]]
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


def write_yaml(settings: dict[str, Any], file: Path) -> None:
    """One key a line; its value in JSON is YAML, too."""
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()]
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
    file.write_text(spec.to_xml())


def write_deployment(script: ModuleType, policy: dict, run: dict, folder: Path) -> str:
    """Write what Unitree's scripts load. Returns a line: what was written, or why nothing was.

    run: the content of run.json.
    """
    name = run["args"]["robot"]
    robot = script.ROBOTS[name]
    problem = why_not(script, name)
    if problem:
        return f"no files for Unitree's scripts: {name}: {problem}"
    if not importlib.util.find_spec("torch"):
        return "no files for Unitree's scripts: PyTorch is missing; pip install torch"

    write_torchscript(script, policy, translate(script, robot), folder / "policy.pt")
    write_yaml(mujoco_settings(script, name, folder), folder / "deploy_mujoco.yaml")
    write_yaml(real_settings(script, name, folder, run["args"]), folder / "deploy_real.yaml")
    if DEPLOYMENTS[name].scene is None:
        write_scene(script, robot, folder / "scene.xml")
    return f"Unitree's scripts: policy.pt, deploy_mujoco.yaml and deploy_real.yaml in {folder}"


# ---- Command line --------------------------------------------------------------------------------
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="run folder")
    parser.add_argument("--script", type=Path, help="the script that made the run")
    flags = parser.parse_args(argv)

    if not importlib.util.find_spec("onnx"):
        parser.error("onnx is missing; pip install onnx")
    try:
        with np.load(flags.run_dir / "policy.npz", allow_pickle=False) as arrays:
            policy = dict(arrays)
        run = json.loads((flags.run_dir / "run.json").read_text())
        script = load_script(flags.script or ROOT / run["script"])
    except Exception as error:
        problem = f"{type(error).__name__}: {error!s:.200}"
        parser.error(f"{flags.run_dir}: no policy, or no script that made it ({problem})")

    file = flags.run_dir / "policy.onnx"
    write_onnx(script, policy, file)
    print(f"ONNX: {file}")
    if hasattr(script, "ROBOTS"):
        print(write_deployment(script, policy, run, flags.run_dir))


if __name__ == "__main__":
    main(sys.argv[1:])
