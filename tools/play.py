"""Play with a policy in C MuJoCo at real speed: command it, push it, watch it being trained.

    python tools/play.py runs/NAME
    python tools/play.py runs/NAME --record walk.mp4
    python tools/play.py runs/NAME --record walk.mp4 --commands "1 0 0, 0 0 0.6" --seconds 4
    python tools/play.py docs/g1_policy.npz --robot g1

The first opens MuJoCo's viewer. When training writes a newer policy.npz to the run folder, that one
takes over, so that a run can be watched while it goes on. The second needs no display: it films
each command for some seconds. A command is a velocity forwards and one to the left, m/s, and a turn
counterclockwise, rad/s. The last plays with a policy that has no run folder, as one of
ppo_mjx_unitree.py.

    W S        faster and slower forwards      Space       command 0
    A D        to the left and to the right    Enter       a push in a random direction
    Q E        turn left and right             Backspace   start anew

A stroke adds 0.1, but the first one 0.3: below 0.2 policies are trained to stand, and at 0.2 the
G1's still does. Runs of ppo_mjx.py take no commands: of the keys, Backspace remains. With the
mouse, double-click a body to select it; then drag with Ctrl and the right button to pull it, or
with Ctrl and the left one to turn it. The robot moves as in the script's own test: the same model,
controller, time step and start. One second after a fall it starts anew.

run.json names the script, which is looked for above this folder; --script names another one, such
as a copy with another model. What has changed since the run was trained is told at the start. On
macOS, MuJoCo's viewer asks for mjpython in place of python.
"""

import argparse
import collections
import contextlib
import importlib
import math
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the accelerator's memory is for training

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import mujoco
import numpy as np
from tools.export import Source, fail, find_source, read_policy, tell_changes

# Keys have GLFW's numbers: for letters and Space, those of ASCII.
SPACE = 32
ENTER = 257
BACKSPACE = 259
# What a stroke adds to the command: m/s forwards, m/s to the left, rad/s.
STROKE = 0.1
COMMAND_KEYS = {
    ord("W"): (STROKE, 0.0, 0.0),
    ord("S"): (-STROKE, 0.0, 0.0),
    ord("A"): (0.0, STROKE, 0.0),
    ord("D"): (0.0, -STROKE, 0.0),
    ord("Q"): (0.0, 0.0, STROKE),
    ord("E"): (0.0, 0.0, -STROKE),
}
AFTER_FALL = 1.0  # s, from a fall to the new start
LOOK_EVERY = 0.5  # s, between looks at policy.npz, and between changes of the text
MOST_BEHIND = 0.2  # s, that is made up for; what is more becomes slow motion
FRAME_DT = 0.04  # s, of a film's frame


# ---- What is played with -------------------------------------------------------------------------
class Walker:
    """A robot of ppo_mjx_unitree.py, in the loop of the script's own test."""

    def __init__(self, source: Source):
        script, args = source.script, source.run["args"]
        self.script = script
        self.robot = script.ROBOTS[args["robot"]]
        self.original = script.CMujocoEnv(self.robot)
        self.model = self.original.model
        self.data = self.original.data
        self.control_dt = script.CONTROL_DT
        self.ranges = np.array([args[key] for key in ("command_x", "command_y", "command_yaw")])
        # Of what keys command. At MIN_COMMAND itself some policies still stand.
        self.least = round(script.MIN_COMMAND + STROKE, 6)
        self.film_commands = list(self.robot.test_commands.values())
        self.camera = "track"

    def reset(self, seed: int) -> None:
        self.original.reset(seed)
        self.velocity = np.zeros(3)  # m/s forwards, m/s to the left, rad/s; smoothed

    def observe(self, command) -> np.ndarray:
        """What the actor sees: [O]. command: [3]."""
        return self.original.observe(command)

    def step(self, action) -> bool:
        """One control step. Returns whether the robot has fallen."""
        measured = self.original.step(action)
        self.velocity = self.velocity + 0.05 * (measured["velocity"] - self.velocity)
        return bool(measured["fallen"])

    def push(self, angle: float) -> None:
        """The test's push. angle: rad, of its direction."""
        direction = np.array([math.cos(angle), math.sin(angle)])
        self.data.qvel[:2] += self.script.PUSH_SPEED * direction

    def draw(self, scene: mujoco.MjvScene, command) -> None:
        """Add arrows: the commanded velocity in red, the robot's own in blue."""
        base = self.data.xmat[1].reshape(3, 3)[:2, :2]
        colors = {0.96: (0.9, 0.2, 0.1, 1), 0.88: (0.1, 0.4, 0.9, 1)}
        for (height, color), velocity in zip(colors.items(), (command, self.velocity), strict=True):
            start = self.data.qpos[:3] + [0, 0, height * self.robot.target_height]
            self.script.draw_arrow(scene, start, base @ velocity[:2], color)


class Task:
    """A task of ppo_mjx.py, which takes no commands."""

    def __init__(self, source: Source):
        script = source.script
        env = script.Env(script.read_run(source.folder))
        self.original = script.CMujocoEnv(env)
        self.model = self.original.model
        self.data = self.original.data
        self.control_dt = env.control_dt
        self.ranges = np.zeros((0, 2))
        self.film_commands = [()]
        self.camera = script.make_camera(self.model)

    def reset(self, seed: int) -> None:
        self.original.reset(seed)

    def observe(self, command) -> np.ndarray:
        """What the actor sees: [O]."""
        return self.original.observe()

    def step(self, action) -> bool:
        """One control step. Returns whether the episode has ended."""
        _, _, terminated, truncated, _ = self.original.step(action)
        return bool(terminated or truncated)

    def draw(self, scene: mujoco.MjvScene, command) -> None:
        """Nothing beside the model."""


# ---- The loop ------------------------------------------------------------------------------------
class PolicyFile:
    """policy.npz of a run, which training replaces from time to time."""

    def __init__(self, file: Path):
        self.file = file
        self.written = None  # when the policy that was read last was written

    def read_newer(self) -> dict[str, np.ndarray] | None:
        """The policy, if it has been written since the last call."""
        try:
            written = self.file.stat().st_mtime_ns
            if written == self.written:
                return None
            with np.load(self.file, allow_pickle=False) as arrays:
                policy = dict(arrays)
        except Exception:  # it is being copied; there is no end to what may be wrong with a file
            return None
        self.written = written
        return policy

    def label(self) -> str:
        """When the policy was written, as local time."""
        return time.strftime("%H:%M:%S", time.localtime(self.written / 1e9))


class Player:
    """One world that a policy drives, with its command."""

    def __init__(self, source: Source, seed: int):
        self.script = source.script
        kind = Walker if hasattr(self.script, "ROBOTS") else Task
        read_policy(source)  # which refuses one that does not fit
        self.world = kind(source)
        self.random = np.random.default_rng(seed)
        self.command = np.zeros(len(self.world.ranges))
        self.keys = collections.deque()  # pressed, and not yet obeyed
        self.policy_file = PolicyFile(source.file)
        self.policy = None
        if not self.swap_policy():
            fail(f"{source.file}: it cannot be read any more")
        self.reset()

    def swap_policy(self) -> bool:
        """Take a newer policy, if there is one. Returns whether there was."""
        newer = self.policy_file.read_newer()
        if newer is None:
            return False
        self.policy = newer
        self.memory = self.script.initial_memory()
        return True

    def reset(self) -> None:
        """Start anew, with the command as it is."""
        self.world.reset(int(self.random.integers(2**31)))
        mujoco.mj_forward(self.world.model, self.world.data)
        self.memory = self.script.initial_memory()
        self.down = 0.0  # s since it fell

    def press(self, key: int) -> None:
        """Note a stroke; called from the viewer's thread."""
        self.keys.append(key)

    def obey_keys(self) -> None:
        while self.keys:
            key = self.keys.popleft()
            if key == BACKSPACE:
                self.reset()
            if not len(self.command):
                continue
            if key in COMMAND_KEYS:
                self.command = self.change_command(np.array(COMMAND_KEYS[key]))
            elif key == SPACE:
                self.command = np.zeros_like(self.command)
            elif key == ENTER:
                self.world.push(self.random.uniform(0, 2 * math.pi))

    def change_command(self, stroke: np.ndarray) -> np.ndarray:
        """The command after a stroke: [3]. From 0 it leaps to the least, and from there to 0."""
        wanted = (self.command + stroke).round(6)
        slow = (stroke != 0) & (np.abs(wanted) < self.world.least)
        least = np.where(self.command == 0, np.sign(stroke) * self.world.least, 0.0)
        return np.clip(np.where(slow, least, wanted), *self.world.ranges.T)

    def act(self) -> np.ndarray:
        """The policy's action on what it sees now."""
        observation = self.world.observe(self.command)
        self.memory, action = self.script.act(self.policy, self.memory, observation)
        return action

    def step(self) -> None:
        """One control step; some time after a fall, a new start."""
        fallen = self.world.step(self.act())
        if fallen or self.down:
            self.down += self.world.control_dt
        if self.down >= AFTER_FALL:
            self.reset()

    def texts(self) -> tuple[str, str]:
        """Names and values for the viewer's corner, a line each."""
        lines = {"policy": self.policy_file.label()}
        if len(self.command):
            names = ("forwards", "to the left", "turn")
            for name, wanted, real in zip(names, self.command, self.world.velocity, strict=True):
                lines[name] = f"{wanted:+.1f}  {real:+.2f}"
        return "\n".join(lines), "\n".join(lines.values())


def viewer_flags(viewer) -> list[tuple[np.ndarray, int, int]]:
    """The viewer's own switches on our keys, as (array, index, value at the start).

    The viewer obeys its shortcuts besides calling us: W draws wires, S switches the shadows. There
    is no way to tell it not to.
    """
    letters = {chr(key) for key in COMMAND_KEYS}
    flags = []
    for array, names in (
        (viewer.opt.flags, mujoco.mjVISSTRING),
        (viewer.user_scn.flags, mujoco.mjRNDSTRING),
    ):
        flags += [(array, i, array[i]) for i, name in enumerate(names) if name[2] in letters]
    return flags


def play(player: Player, viewer) -> None:
    """Step the world at real speed, until the window is closed."""
    flags = viewer_flags(viewer)
    world = player.world
    due = time.perf_counter()  # the next step
    looked = due - LOOK_EVERY  # when policy.npz was looked at
    while viewer.is_running():
        with viewer.lock():
            player.obey_keys()
            player.step()
            for array, index, value in flags:
                array[index] = value
            viewer.user_scn.ngeom = 0
            world.draw(viewer.user_scn, player.command)
        viewer.sync()

        if time.perf_counter() - looked > LOOK_EVERY:
            if player.swap_policy():
                print(f"policy of {player.policy_file.label()}", flush=True)
            # This waits for the next picture.
            viewer.set_texts((None, mujoco.mjtGridPos.mjGRID_TOPRIGHT, *player.texts()))
            looked = time.perf_counter()
        due = max(due + world.control_dt, time.perf_counter() - MOST_BEHIND)
        time.sleep(max(0.0, due - time.perf_counter()))


def check_display() -> None:
    """Refuse to open a window where there can be none: the viewer would end the process."""
    if sys.platform == "darwin":
        return  # there is always a display, and mjpython opens it
    try:
        glfw = importlib.import_module("glfw")
        with warnings.catch_warnings(action="ignore"):  # GLFW says the same
            found = glfw.init()
    except ImportError:
        found = False
    if not found:
        fail("no display for the window; --record FILE.mp4 films without one")


def open_viewer(player: Player):
    """MuJoCo's viewer on the player's world, with a camera that follows it."""
    world = player.world
    viewer = importlib.import_module("mujoco.viewer").launch_passive(
        world.model,
        world.data,
        key_callback=player.press,
        show_left_ui=False,
        show_right_ui=False,
    )
    with viewer.lock():
        viewer.cam.type = mujoco.mjtCamera.mjCAMERA_TRACKING
        viewer.cam.trackbodyid = 1
        viewer.cam.distance = 2.5 * world.model.stat.extent
        viewer.cam.azimuth = 120
        viewer.cam.elevation = -15
    return viewer


def record(player: Player, commands: list, seconds: float, file: Path) -> None:
    """Film each command for some seconds."""
    imageio = importlib.import_module("imageio")
    world = player.world
    renderer = player.script.make_renderer(world.model)
    every = max(1, round(FRAME_DT / world.control_dt))  # steps of one frame
    frames_per_second = 1 / (every * world.control_dt)
    frames = round(seconds * frames_per_second)  # of each command

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        video = stack.enter_context(imageio.get_writer(file, fps=frames_per_second))
        for command in commands:
            player.command = np.array(command)
            for _ in range(frames):
                for _ in range(every):
                    player.step()
                renderer.update_scene(world.data, camera=world.camera)
                world.draw(renderer.scene, player.command)
                video.append_data(renderer.render())
    print(f"video: {file}")


# ---- Command line --------------------------------------------------------------------------------
def read_commands(text: str, ranges: np.ndarray) -> list[np.ndarray]:
    """The commands in a text as "1 0 0, 0 0 0.6". ranges: [3, 2], or [0, 2] without commands."""
    if not len(ranges):
        fail("--commands: this run's policy takes no commands")
    try:
        commands = [np.array(part.split(), float) for part in text.split(",")]
    except ValueError as error:
        fail(f"--commands {text!r}: {error}")
    for command in commands:
        if len(command) != len(ranges):
            fail(f"--commands {text!r}: a command has three numbers")
        if not ((ranges[:, 0] <= command) & (command <= ranges[:, 1])).all():
            least, most = ranges.T.tolist()
            fail(f"--commands: {command.tolist()} is not between this run's {least} and {most}")
    return commands


def check_film(file: Path, seconds: float) -> None:
    """Refuse what no film can be written to."""
    if file.suffix != ".mp4":
        fail(f"--record {file}: the name has to end in .mp4")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        fail(f"--record {file}: cannot write to the folder {file.parent}")
    if not FRAME_DT <= seconds <= 3600:
        fail(f"--seconds {seconds}: not between {FRAME_DT} and 3600")


def find_played(path: Path, script: Path | None, robot: str | None) -> Source:
    """What is played with: by `find_source`, if its script has what it takes."""
    source = find_source(path, script, robot)
    if not hasattr(source.script, "CMujocoEnv"):
        fail(f"{path}: {source.script.__name__}.py has no environment in C MuJoCo to play in")
    return source


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="run folder, or the file of a policy alone")
    parser.add_argument("--record", type=Path, metavar="FILE.mp4", help="film, without a window")
    parser.add_argument("--commands", help="what to film; by default the commands of the test")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each command in the film")
    parser.add_argument("--seed", type=int, default=0, help="of starts and pushes")
    parser.add_argument("--script", type=Path, help="the script that made the run")
    parser.add_argument("--robot", help="whose policy it is, if it is a file alone")
    flags = parser.parse_args(argv)
    if flags.commands and not flags.record:
        fail("--commands is for --record; in the window, use the keys")
    if flags.seed < 0:
        fail(f"--seed {flags.seed}: not from 0 on")
    if flags.record:
        check_film(flags.record, flags.seconds)
    else:
        check_display()

    source = find_played(flags.run_dir, flags.script, flags.robot)
    tell_changes(source)
    player = Player(source, flags.seed)
    if not flags.record:
        with open_viewer(player) as viewer:
            play(player, viewer)
        return
    commands = player.world.film_commands
    if flags.commands:
        commands = read_commands(flags.commands, player.world.ranges)
    record(player, commands, flags.seconds, flags.record)


if __name__ == "__main__":
    main(sys.argv[1:])
