"""How long a policy with a motion prior stays up, and how near to a motion of others.

    python benchmarks/follow_motion.py --robot g1_29dof --motion dance.npz --policies dance=runs/NAME/policy.npz
    python benchmarks/follow_motion.py --robot go2 --motion steps.txt --commanded --policies steps=a.npz --film a.mp4

A policy is LABEL=FILE. In C MuJoCo at 500 Hz, nothing being random, the robot is put into poses of the motion, spaced
evenly, with the motion's velocities there. It acts for 20 s, told to stand, as those trained for style alone are; with
--commanded it is told to go as the motion goes. A policy of amp_mjx_unitree.py has no clock: it may be slower or
quicker than the motion. So each of its poses is compared with one of the motion's by dynamic time warping: from one
control step to the next the motion goes on by 1 or 2 poses, or stays, though not twice in a row, and begins anew after
its end. `joint_error` is the mean size of the difference of a joint's angle (rad) along the best such way, up to the
fall if there is one. Beside it stands the error of a robot that stays in the motion's mean pose (`mean_pose_error`).

`survival` is the share of starts that are up after 20 s, `up_s` the mean time up to the fall or the end.
--film shows the motion, again and again, beside the first policy's first start.

Writes benchmarks/results/NAME.json.
"""

import dataclasses
import importlib
import os
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import common
import mujoco
import numpy as np
import tyro

import amp_mjx_unitree as amp


@dataclasses.dataclass
class Args:
    robot: str = "g1_29dof"
    motion: str = "robots/motions/g1_29dof.npz"  # anything that amp_mjx_unitree.py's --motion takes
    policies: tuple[str, ...] = ("walk=docs/amp_g1_29dof.npz",)
    commanded: bool = False  # the robot is told to go as the motion goes
    starts: int = 20
    seconds: float = 20.0  # of each
    film: str | None = None  # file of the film, .mp4
    name: str = "follow_motion"  # of the JSON file
    smoke: bool = False  # two starts of half a second each


def begin(original: amp.CMujocoEnv, qpos: np.ndarray, qvel: np.ndarray, target: np.ndarray) -> None:
    """Put the robot into a pose [7 + J] with velocities [6 + J], its joints sent to a target [J]."""
    original.reset(0)
    original.data.qpos = qpos
    original.data.qvel = qvel
    mujoco.mj_kinematics(original.model, original.data)
    original.action = original.robot.actions(target)


def act_for(
    original: amp.CMujocoEnv, policy: dict, commands: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Poses [T, 7 + J] from where the robot is, up to a fall; and whether it fell.

    commands: [T, 3], one for each control step.
    """
    memory = amp.initial_memory()
    poses = []
    for command in commands:
        memory, action = amp.act(policy, memory, original.observe(command))
        row = original.step(action)
        poses.append(original.data.qpos.copy())
        if row["fallen"]:
            return np.array(poses), True
    return np.array(poses), False


def aligned_error(poses: np.ndarray, motion: np.ndarray, start: int) -> float:
    """Mean size of the differences of angles along the best alignment, at half to twice the speed.

    poses: [T, J] rad, the first of them a step after pose `start` of the motion [K, J].
    """
    cost = np.abs(poses[:, None] - motion).mean(axis=2)  # [T, K]
    # The least sums of costs of ways to each pose, by whether their last step went on or stayed.
    went_on = np.full(len(motion), np.inf)
    stayed = went_on.copy()
    went_on[start] = 0.0
    for row in cost:
        either = np.minimum(went_on, stayed)
        stayed = row + went_on
        went_on = row + np.minimum(np.roll(either, 1), np.roll(either, 2))
    return float(np.minimum(went_on, stayed).min() / len(poses))


def measure(args: Args, entry: str, clip: amp.Clip) -> tuple[dict, np.ndarray]:
    """A row of the result, and the poses of the first start."""
    label, file = entry.split("=", 1)
    with np.load(file, allow_pickle=False) as arrays:
        policy = dict(arrays)
    original = amp.CMujocoEnv(amp.ROBOTS[args.robot])
    mean_qvel = amp.velocity_between(clip.qpos[:-1], clip.qpos[1:], amp.CONTROL_DT, np)
    qvel = np.concatenate([mean_qvel[:1], (mean_qvel[:-1] + mean_qvel[1:]) / 2, mean_qvel[-1:]])
    motion = clip.qpos[:, 7:]
    told = amp.command_of(amp.default_args(args.robot), clip.qpos, qvel) * args.commanded
    steps = np.arange(round(args.seconds / amp.CONTROL_DT))
    mean_pose = motion.mean(axis=0)
    moments = np.linspace(0, len(motion), args.starts, endpoint=False).astype(int)
    starts = []
    shown = []
    for moment in moments:
        begin(original, clip.qpos[moment], qvel[moment], clip.targets[moment])
        poses, fell = act_for(original, policy, told[(moment + steps) % len(told)])
        shown.append(poses)
        still = np.broadcast_to(mean_pose, poses[:, 7:].shape)
        starts.append(
            {
                "up_s": round(len(poses) * amp.CONTROL_DT, 2),
                "fell": fell,
                "joint_error": aligned_error(poses[:, 7:], motion, moment),
                "mean_pose_error": aligned_error(still, motion, moment),
            }
        )
    row = {
        "label": label,
        "survival": 1 - float(np.mean([start["fell"] for start in starts])),
        **{
            key: float(np.mean([start[key] for start in starts]))
            for key in ("up_s", "joint_error", "mean_pose_error")
        },
        "starts": starts,
    }
    return row, shown[0]


def film(robot: amp.Robot, motion: np.ndarray, poses: np.ndarray, file: str) -> None:
    """A motion [K, 7 + J], over and over, on the left; the robot's poses [T, 7 + J] on the right."""
    imageio = importlib.import_module("imageio")
    data = mujoco.MjData(robot.model)
    renderer = amp.make_renderer(robot.model)
    camera = amp.make_camera(robot.model)
    with warnings.catch_warnings(action="ignore"):
        with imageio.get_writer(file, fps=25) as video:
            for i in range(0, len(poses), round(1 / 25 / amp.CONTROL_DT)):
                panes = []
                for pose in (motion[i % len(motion)], poses[i]):
                    data.qpos = pose
                    mujoco.mj_forward(robot.model, data)
                    renderer.update_scene(data, camera=camera)
                    panes.append(renderer.render().copy())
                video.append_data(np.concatenate(panes, axis=1))
    renderer.close()
    print(file)


def main(args: Args) -> None:
    if args.smoke:
        args = dataclasses.replace(args, starts=2, seconds=0.5)
    robot = amp.ROBOTS[args.robot]
    clip = amp.resample(robot, amp.read_motion(robot, Path(args.motion)))
    if wrong := [entry for entry in args.policies if "=" not in entry]:
        raise SystemExit(f"--policies {wrong[0]}: must be LABEL=FILE")
    rows = []
    first = None
    for entry in args.policies:
        row, poses = measure(args, entry, clip)
        first = poses if first is None else first
        rows.append(row)
        print({key: value for key, value in row.items() if key != "starts"}, flush=True)
    if args.film:
        film(robot, clip.qpos, first, args.film)
    common.write(args.name, args, {"rows": rows}, args.smoke, ["cpu"])


if __name__ == "__main__":
    main(tyro.cli(Args))
