"""Play a motion file of amp_mjx_unitree.py, and tell what may be wrong with it.

    python tools/show_motion.py FILE
    python tools/show_motion.py FILE --robot go2
    python tools/show_motion.py FILE --record motion.mp4

The first opens MuJoCo's viewer, with the file played again and again at real speed; Space stops the
time, Backspace starts anew. --record films it once and needs no display. FILE is anything that
--motion takes. The robot moves as the file says: there is no physics in it.

It prints how fast the feet slip while they are on the floor, how deep they go into it, by how much
joints exceed their limits, and the share of poses that count as a fall. On macOS, MuJoCo's viewer
asks for mjpython in place of python.
"""

import argparse
import importlib
import os
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the accelerator's memory is for training

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import mujoco
import numpy as np
from tools.play import BACKSPACE, FRAME_DT, SPACE, check_display, check_film, fail
from tools.replay_nan import load_script


def load_amp() -> ModuleType:
    """The script that reads motion files."""
    return load_script(ROOT / "amp_mjx_unitree.py")


def set_pose(model: mujoco.MjModel, data: mujoco.MjData, pose: np.ndarray) -> None:
    """Put the robot where a pose [7 + J] says."""
    data.qpos = pose
    mujoco.mj_forward(model, data)


def record(amp: ModuleType, model: mujoco.MjModel, poses: np.ndarray, file: Path) -> None:
    """Film poses [T, 7 + J] at the control rate once."""
    imageio = importlib.import_module("imageio")
    renderer = amp.make_renderer(model)
    camera = amp.make_camera(model)
    data = mujoco.MjData(model)
    every = round(FRAME_DT / amp.CONTROL_DT)  # poses from one picture to the next
    with warnings.catch_warnings(action="ignore"):
        with imageio.get_writer(file, fps=1 / (every * amp.CONTROL_DT)) as video:
            for pose in poses[::every]:
                set_pose(model, data, pose)
                renderer.update_scene(data, camera=camera)
                video.append_data(renderer.render())
    print(f"video: {file}")


def play(amp: ModuleType, model: mujoco.MjModel, poses: np.ndarray) -> None:
    """Show poses [T, 7 + J] at the control rate in MuJoCo's viewer, until it is closed."""
    data = mujoco.MjData(model)
    pressed = []
    viewer = importlib.import_module("mujoco.viewer").launch_passive(
        model,
        data,
        key_callback=pressed.append,
        show_left_ui=False,
        show_right_ui=False,
    )
    with viewer.lock():
        viewer.cam.type = mujoco.mjtCamera.mjCAMERA_TRACKING
        viewer.cam.trackbodyid = 1
        viewer.cam.distance = 2.5 * model.stat.extent
        viewer.cam.azimuth = 120
        viewer.cam.elevation = -15

    number = 0
    running = True
    with viewer:
        while viewer.is_running():
            due = time.perf_counter() + amp.CONTROL_DT
            while pressed:
                key = pressed.pop(0)
                running ^= key == SPACE
                number = 0 if key == BACKSPACE else number
            with viewer.lock():
                set_pose(model, data, poses[number])
            viewer.sync()
            number = (number + running) % len(poses)
            time.sleep(max(0.0, due - time.perf_counter()))


def main(argv: list[str]) -> None:
    amp = load_amp()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="motion file")
    parser.add_argument("--robot", default=amp.Args.robot, help="whose motion it is")
    parser.add_argument("--record", type=Path, metavar="FILE.mp4", help="film, without a window")
    flags = parser.parse_args(argv)
    if flags.robot not in amp.ROBOTS:
        fail(f"--robot {flags.robot}: not one of {', '.join(amp.ROBOTS)}")

    robot = amp.ROBOTS[flags.robot]
    poses = amp.resample(robot, amp.read_motion(robot, flags.file)).qpos
    print(f"{flags.file}: {amp.describe_clip(robot, poses)}")
    if not flags.record:
        check_display()
        play(amp, robot.model, poses)
        return
    check_film(flags.record, len(poses) * amp.CONTROL_DT)
    record(amp, robot.model, poses, flags.record)


if __name__ == "__main__":
    main(sys.argv[1:])
