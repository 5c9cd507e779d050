"""How fast a policy turns the joints, and what torques it asks for, in each physics step of the script's own test.

    python benchmarks/joint_loads.py
    python benchmarks/joint_loads.py --robot go2 --policy docs/go2_policy.npz --name joint_loads_go2

The test's commands and starts, without and with its pushes, in C MuJoCo at 500 physics steps a second. A control step
has ten of them, and who looks once in a control step misses the peaks. Of each joint it tells the largest speed, the
largest torque, and, where `NO_LOAD_SPEEDS` has the robot, the largest sum of both as shares of their limits at the same
moment, while the motor drives: up to 1, a motor can do it whose torque falls linearly from standstill to the no-load
speed. `beyond` is the share of the physics steps in which that sum is over 1 on either side.
Writes benchmarks/results/NAME.json.
"""

import dataclasses
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import common
import numpy as np
import tyro

import ppo_mjx_unitree as unitree

# rad/s, of a leg's joints, by the velocity limits in unitree_rl_gym's URDF file of the robot.
NO_LOAD_SPEEDS = {
    "g1": {
        "hip_pitch": 32,
        "hip_roll": 20,
        "hip_yaw": 32,
        "knee": 20,
        "ankle_pitch": 37,
        "ankle_roll": 37,
    }
}


@dataclasses.dataclass
class Args:
    robot: str = "g1"
    policy: str = "docs/g1_policy.npz"
    name: str = "joint_loads"  # of the JSON file
    smoke: bool = False  # one start of each command


class Recorder:
    """Takes the place of a controller, and notes what it sees and says in each physics step."""

    def __init__(self, controller: unitree.Controller):
        self.controller = controller
        self.default = controller.default
        self.speeds, self.torques = [], []  # [J] each: rad/s, Nm

    def torque(self, target, qpos, qvel, xp):
        torque = self.controller.torque(target, qpos, qvel, xp=xp)
        self.speeds.append(qvel[6:].copy())
        self.torques.append(torque)
        return torque


def measure(robot: unitree.Robot, policy: dict, push: bool, starts: int) -> tuple:
    """Speeds and torques in each physics step [T, J], and how many starts ended in a fall."""
    env = unitree.CMujocoEnv(robot)
    env.controller = recorder = Recorder(env.controller)
    falls = 0
    for command in robot.test_commands.values():
        for seed in range(starts):
            falls += unitree.drive(env, policy, np.array(command), seed, push)["falls"]
    return np.array(recorder.speeds), np.array(recorder.torques), falls


def summarize(robot: unitree.Robot, speeds, torques, no_load: dict[str, float]) -> list[dict]:
    """A row for each kind of joint, over both sides. no_load: rad/s by kind, or nothing."""
    limits = unitree.make_controller(robot).max_torque
    kinds = [name.split("_", 1)[1] for name in robot.joints]
    rows = []
    for kind in dict.fromkeys(kinds):
        own = [number for number, other in enumerate(kinds) if other == kind]
        speed, torque = np.abs(speeds[:, own]), np.abs(torques[:, own])
        row = {
            "joint": kind,
            "speed": float(speed.max()),
            "torque": float(torque.max()),
            "largest_torque": float(limits[own[0]]),
        }
        if kind in no_load:
            drives = speeds[:, own] * torques[:, own] > 0
            both = drives * (torque / limits[own[0]] + speed / no_load[kind])
            row |= {
                "no_load_speed": no_load[kind],
                "both": float(both.max()),
                "beyond": float((both > 1).any(axis=1).mean()),
            }
        rows.append(row)
    return rows


def main(args: Args) -> None:
    robot = unitree.ROBOTS[args.robot]
    with np.load(common.ROOT / args.policy, allow_pickle=False) as arrays:
        policy = dict(arrays)
    starts = 1 if args.smoke else unitree.TEST_STARTS
    result = {}
    for push in (False, True):
        speeds, torques, falls = measure(robot, policy, push, starts)
        rows = summarize(robot, speeds, torques, NO_LOAD_SPEEDS.get(args.robot, {}))
        label = "pushed" if push else "calm"
        result[label] = {"falls": falls, "physics_steps": len(speeds), "rows": rows}
        print(f"{label}: {falls} falls")
        common.table(list(rows[0]), [list(row.values()) for row in rows])
    common.write(args.name, args, result, args.smoke, ["cpu"])


if __name__ == "__main__":
    main(tyro.cli(Args))
