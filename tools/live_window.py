"""Watch a run of sac_mjx_pendulum.py in a window: four of its pendulums, and its curves.

    python tools/live_window.py & python sac_mjx_pendulum.py    the run that is about to begin
    python tools/live_window.py runs/NAME                       a run that goes on, or has ended

The window reads what the run has written so far and plays the last iteration of the pendulums at
their real speed; then it looks for news. It is a process of its own with the least priority, and
training knows nothing of it: it may be opened and closed at any time.
"""

import argparse
import contextlib
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the accelerator's memory is for training

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import sac_mjx_pendulum as sac
from matplotlib import animation, pyplot
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

TAGS = {
    "return": "charts/episodic_return",
    "critic loss": "losses/qf_loss",
    "actor loss": "losses/actor_loss",
    "temperature": "losses/alpha",
}


class RunLog:
    """The curves and the pendulums' angles of a run, as far as they are written."""

    def __init__(self, run_dir: Path):
        everything = {"scalars": 0, "tensors": 0}
        self.events = EventAccumulator(str(run_dir), size_guidance=everything)

    def read(self) -> None:
        """Read what was written since the last time."""
        self.events.Reload()

    def curve(self, tag: str) -> tuple[list[int], list[float]]:
        """Steps, and the values at them; empty before the first value."""
        if tag not in self.events.Tags()["scalars"]:
            return [], []
        points = self.events.Scalars(tag)
        return [point.step for point in points], [point.value for point in points]

    def angle_points(self) -> list:
        """TensorBoard's records of the pendulums' angles, one an iteration."""
        if "angles" not in self.events.Tags()["tensors"]:
            return []
        return self.events.Tensors("angles")

    def angles(self) -> dict[int, np.ndarray]:
        """The angles of four pendulums in each iteration: step at its end -> [T, 4] rad."""
        points = self.angle_points()
        return {point.step: tensor_util.make_ndarray(point.tensor_proto) for point in points}


class Picture:
    """Four pendulums and the curves of training, on a figure of matplotlib."""

    def __init__(self, figure):
        panes = [[0, 1, "return", "critic loss"], [2, 3, "actor loss", "temperature"]]
        axes = figure.subplot_mosaic(panes)
        self.figure = figure
        self.rods = []
        for i in range(4):
            axes[i].set(
                xlim=(-1.2, 1.2),
                ylim=(-1.2, 1.2),
                aspect="equal",
                frame_on=False,
                xticks=[],
                yticks=[],
            )
            style = {"color": "tab:blue", "linewidth": 3, "markersize": 9, "markevery": [1]}
            self.rods += axes[i].plot([], [], "o-", **style)

        self.curves = {}
        for name, tag in TAGS.items():
            axes[name].set_title(name)
            (self.curves[tag],) = axes[name].plot([], [], color="tab:red")

    def pose(self, angles: np.ndarray) -> None:
        """Show these angles, rad; there may be fewer than four."""
        for rod, angle in zip(self.rods, angles, strict=False):
            rod.set_data([0, math.sin(angle)], [0, math.cos(angle)])

    def draw_curves(self, log: RunLog, until: float = math.inf) -> None:
        """Show the curves up to a step."""
        for tag, line in self.curves.items():
            steps, values = log.curve(tag)
            count = sum(step <= until for step in steps)
            line.set_data(steps[:count], values[:count])
            line.axes.relim()
            line.axes.autoscale_view()


class Player:
    """Plays the last iteration at real speed, then looks for news."""

    def __init__(self, picture: Picture, log: RunLog):
        self.picture = picture
        self.log = log
        self.poses = []  # of the iteration that plays, those still to come: [4] rad each
        self.step = None  # the end of that iteration

    def next_frame(self, _) -> list:
        """Draw one frame. Returns what has moved."""
        if not self.poses:
            self.look_for_news()
        if self.poses:
            self.picture.pose(self.poses.pop(0))
        return self.picture.rods

    def look_for_news(self) -> None:
        self.log.read()
        points = self.log.angle_points()
        if not points or points[-1].step == self.step:
            return
        self.step = points[-1].step
        self.poses = list(tensor_util.make_ndarray(points[-1].tensor_proto))
        self.picture.draw_curves(self.log)
        self.picture.figure.canvas.draw()


def runs_in(folder: Path) -> set[Path]:
    """The run folders that have a log."""
    return {file.parent for file in folder.glob("*/events*")}


def wait_for_run(folder: Path) -> Path:
    """The next run folder that appears."""
    before = runs_in(folder)
    print(f"waiting for a run in {folder}", flush=True)
    while not (new := runs_in(folder) - before):
        time.sleep(0.1)
    return new.pop()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, nargs="?", help="by default the next one to begin")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where that will be")
    flags = parser.parse_args(argv)
    with contextlib.suppress(OSError, AttributeError):  # which Windows has not
        os.nice(19)  # training goes first

    figure = pyplot.figure("SAC on MJX", figsize=(10, 5), layout="tight")
    if not figure.canvas.required_interactive_framework:
        raise SystemExit("error: there is no display, or no window toolkit such as Tk")
    run_dir = flags.run_dir or wait_for_run(flags.runs_dir)
    picture = Picture(figure)
    player = Player(picture, RunLog(run_dir))
    dt = sac.make_task(sac.read_run(run_dir)).dt  # s
    playing = animation.FuncAnimation(
        figure,
        player.next_frame,
        interval=1000 * dt,
        blit=True,  # drawing every frame whole takes several times as long
        save_count=1,  # the frames have no end: without it matplotlib warns
    )
    figure.animation = playing  # kept: matplotlib stops an animation that is garbage-collected
    pyplot.show()


if __name__ == "__main__":
    main(sys.argv[1:])
