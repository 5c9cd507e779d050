"""Record a reference for amp_mjx_unitree.py: a trained policy walks through its commands.

    python tools/record_motion.py runs/NAME
    python tools/record_motion.py runs/NAME --out my_walk.npz --seconds 4 --smooth 0.02
    python tools/record_motion.py docs/g1_policy.npz --robot g1 --out walk.npz

The policy of the run, or in the file, walks in C MuJoCo, as in its script's test: the same model,
controller and start. Without a break it is given one command after the other: each of the command's
axes at its ends and at shares of them, and random ones, of which half are along one axis. Before
each of them it is told to stand for a moment, so that the reference shows how to stop and, what is
harder to find, how to start. Turns to the left suffice, for the training adds the mirror image of
all that it reads; a command that does not turn is to the left. So the same foot is the first in all
that the training takes for the same side, and a copy of it knows which one to lift.

A little noise on the actions (--noise) shows how the policy comes back to its path, which a copy of
it needs to know, and keeps a discriminator from telling the robots of a training, whose actions are
noisy, by their jitter alone. What is written are the targets without it.

The poses are written as an npz of qpos [T, nq] (position, quaternion w x y z, joint angles), the
joints' targets on the way to each of them [T, J], the command then [T, 3], and dt. Poses and
targets are smoothed if asked for. By default the file is robots/motions/ROBOT.npz, from which the
training of this robot takes its reference.
"""

import argparse
import math
import os
import sys
from pathlib import Path
from types import ModuleType

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the accelerator's memory is for training

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from tools.play import fail, find_played
from tools.replay_nan import load_script
from tools.show_motion import load_amp

FIRST = 0.4  # s, from the start to the first pose that is kept
CALM = 3.0  # standard deviations, after which the smoothing stops


STAND = 0.8  # s, before each command
SHARES = (0.3, 0.6, 1.0)  # of each end of the command's axes, alone
ONE_AXIS = 0.5  # share of the random commands


def list_commands(ranges: np.ndarray, count: int, slowest: float, seed: int) -> np.ndarray:
    """Commands [n, 3] that cover their ranges [3, 2], none of them to stand or to the right.

    count: of the random ones. A command's parts are 0 or not slower than `slowest`.
    """
    single = [
        axis * share * end
        for axis, ends in zip(np.eye(3), ranges, strict=True)
        for end in ends
        for share in SHARES
        if end
    ]
    random = np.random.default_rng(seed)
    drawn = random.uniform(*ranges.T, size=(count, 3))
    # Those along one axis are never slow, as in amp_mjx_unitree.py's Env.draw_command.
    low, high = ranges.T
    fastest = np.maximum(np.where(drawn > 0, high, -low), 1e-9)
    quick = slowest * np.sign(drawn) + (1 - slowest / fastest) * drawn
    axis = random.integers(3, size=(count, 1))
    alone = np.where(np.arange(3) == axis, quick, 0.0)
    commands = np.where(random.uniform(size=(count, 1)) < ONE_AXIS, alone, drawn)
    commands = np.concatenate([single, commands])

    speed = np.linalg.norm(commands[:, :2], axis=1)
    size = np.stack([speed, speed, np.abs(commands[:, 2])], axis=1)
    commands[size < slowest] = 0.0
    # The mirror changes the signs of the last two at once.
    right = commands[:, 2] + 1e-3 * commands[:, 1] < 0
    commands[right, 1:] *= -1
    commands = np.unique(commands.round(6) + 0.0, axis=0)  # no -0
    return random.permutation(commands[commands.any(axis=1)])


def walk(
    script: ModuleType,
    original,
    policy: dict,
    commands: np.ndarray,
    seconds: float,
    noise: float,
    seed: int,
) -> dict[str, np.ndarray]:
    """The motion of a policy that follows each command for some seconds, by the npz's names.

    original: the script's CMujocoEnv; noise: standard deviation of what is added to the actions.
    Before each command it stands for a moment. Both take whole periods of the gait, so that a robot
    which walks by a clock starts with the same foot each time: a policy without a clock could not
    know which foot to lift.
    """
    ticks = original.robot.gait_ticks
    moment, steps = (
        math.ceil(time / script.CONTROL_DT / ticks - 1e-9) * ticks for time in (STAND, seconds)
    )
    memory = script.initial_memory()
    random = np.random.default_rng(seed)
    original.reset(0)
    poses = []
    targets = []
    told = []
    timetable = [
        (part, time)
        for command in commands
        for part, time in ((np.zeros(3), moment), (command, steps))
    ]
    for command, time in timetable:
        for _ in range(time):
            memory, action = script.act(policy, memory, original.observe(command))
            if original.step(action + noise * random.standard_normal(action.shape))["fallen"]:
                fail(f"the policy fell at the command {command.round(2).tolist()}: train it better")
            poses.append(original.data.qpos.copy())
            targets.append(original.robot.targets(action, np))
            told.append(command)
    first = round(FIRST / script.CONTROL_DT)
    motion = {"qpos": poses, "targets": targets, "command": told}
    return {name: np.array(rows)[first:] for name, rows in motion.items()}


def smooth(rows: np.ndarray, deviation: float) -> np.ndarray:
    """Rows [T, ...], each a mean of those around it with a Gaussian's weights.

    deviation: the Gaussian's, in frames; 0 changes nothing.
    """
    if not deviation:
        return rows
    reach = int(np.ceil(CALM * deviation))
    weights = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / deviation))
    padded = np.pad(rows, ((reach, reach), (0, 0)), mode="edge")
    columns = [np.convolve(column, weights / weights.sum(), "valid") for column in padded.T]
    return np.stack(columns, axis=1)


def smooth_poses(poses: np.ndarray, deviation: float) -> np.ndarray:
    """Poses [T, 7 + J], smoothed.

    In C MuJoCo a quaternion does not jump to its negative, and neighbours are close: so the mean
    needs no more than its norm set right.
    """
    poses = smooth(poses, deviation).copy()
    poses[:, 3:7] /= np.linalg.norm(poses[:, 3:7], axis=1, keepdims=True)
    return poses


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder, or a policy's npz")
    parser.add_argument("--robot", help="whose policy it is, if it is no run folder's")
    parser.add_argument("--out", type=Path, metavar="FILE.npz", help="the file to write")
    parser.add_argument("--seconds", type=float, default=2.4, help="of each command")
    parser.add_argument("--random", type=int, default=60, help="random commands beside the ends")
    parser.add_argument("--noise", type=float, default=0.2, help="deviation, of the actions")
    parser.add_argument("--smooth", type=float, default=0.0, help="a Gaussian's deviation, s")
    parser.add_argument("--seed", type=int, default=0, help="of random commands and noise")
    parser.add_argument("--script", type=Path, help="the script that made it")
    flags = parser.parse_args(argv)
    for name, least, most in (
        ("seconds", 0.1, 600),
        ("random", 0, 10000),
        ("smooth", 0, 1),
        ("noise", 0, 10),
    ):
        value = getattr(flags, name)
        if not least <= value <= most:
            fail(f"--{name} {value}: not between {least} and {most}")

    alone = flags.run.suffix == ".npz"
    if alone != (flags.robot is not None):
        fail("--robot goes with a policy's npz, and only with that: a run folder tells its robot")
    if alone:
        script = load_script(flags.script or ROOT / "ppo_mjx_unitree.py")
        args = script.default_args(flags.robot)
    else:
        script = find_played(flags.run, flags.script, None).script
        args = script.read_run(flags.run)
    out = flags.out or script.MODELS / "motions" / f"{args.robot}.npz"
    if out.suffix != ".npz":
        fail(f"--out {out}: the name has to end in .npz")
    if flags.out is None and out.exists():
        fail(f"{out} is there already: remove it, or name another file by --out")
    try:
        file = flags.run if alone else flags.run / "policy.npz"
        with np.load(file, allow_pickle=False) as arrays:
            policy = dict(arrays)
    except Exception as error:  # there is no end to what may be wrong with a file
        fail(f"{flags.run}: no policy ({type(error).__name__}: {error!s:.200})")

    ranges = np.array([args.command_x, args.command_y, args.command_yaw])
    commands = list_commands(ranges, flags.random, script.MIN_COMMAND, flags.seed)
    robot = script.ROBOTS[args.robot]
    original = script.CMujocoEnv(robot)
    motion = walk(
        script, original, policy, commands, flags.seconds, noise=flags.noise, seed=flags.seed
    )
    deviation = flags.smooth / script.CONTROL_DT
    motion["qpos"] = smooth_poses(motion["qpos"], deviation)
    # So that the file packs well: to 10 micrometres or microradians, and targets to a milliradian,
    # with each joint's numbers in a row.
    motion["qpos"] = motion["qpos"].round(5)
    motion["targets"] = smooth(motion["targets"], deviation).round(3)
    arrays = {name: rows.astype(np.float32, order="F") for name, rows in motion.items()}

    amp = load_amp()
    out.parent.mkdir(parents=True, exist_ok=True)
    # Single precision and compressed, as it ships with the project.
    np.savez_compressed(out, **arrays, dt=script.CONTROL_DT)
    print(f"{out}: {len(commands)} commands, {out.stat().st_size / 1e3:.0f} kB")
    if args.robot in amp.ROBOTS:
        print(amp.describe_clip(amp.ROBOTS[args.robot], motion["qpos"]))


if __name__ == "__main__":
    main(sys.argv[1:])
