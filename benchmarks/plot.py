"""The figures of README and docs, from the JSON under benchmarks/results/.

    python benchmarks/plot.py

curves.png and further ones of ppo_mjx.py, curves_sac.png of sac_mjx.py: return in Gymnasium against steps, mean and
range over the seeds, and against seconds, seed by seed, with the peers' marks (curves.json, curves_sac.json).
walk_curves.png: what the robots' tests say of the later policies of their trainings (time_to_walk_ROBOT.json).
validate_curves.png: training on MJX and on C MuJoCo (validate.json). A figure whose JSON is missing is left out.
"""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from tables import ROBOT_NAMES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
MOST_COLUMNS = 4  # tasks in a figure of learning curves
WALK_MARKS = {"error": ("velocity error, m/s", 0.15), "yaw": ("yaw error, rad/s", 0.2),
              "drift": ("standing drift, m", 0.1), "falls": ("falls in all starts", 0.0)}  # fmt: skip
# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
ARM_STYLES = {"MJX": (BLUE, "-"), "C MuJoCo": (ORANGE, "--")}


@dataclasses.dataclass
class Args:
    results: Path = ROOT / "benchmarks" / "results"
    output: Path = ROOT / "docs"


def save(figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    print(file)


def plot_walking(args: Args) -> None:
    """Each mark of the test against minutes, a row for each robot; robots that have fallen have no errors."""
    stored = {file.stem.removeprefix("time_to_walk_"): json.loads(file.read_text())["rows"]
              for file in args.results.glob("time_to_walk_*.json")}  # fmt: skip
    robots = {robot: stored[robot] for robot in ROBOT_NAMES if robot in stored}
    size = (len(robots), len(WALK_MARKS))
    figure, axes = plt.subplots(*size, figsize=(12, 2.6 * len(robots)), squeeze=False)
    for line, (robot, rows) in zip(axes, robots.items(), strict=True):
        for axis, (key, (label, mark)) in zip(line, WALK_MARKS.items(), strict=True):
            for row in rows:
                minutes, values = (
                    [point[name] for point in row["curve"]] for name in ("seconds", key)
                )
                axis.plot([x / 60 for x in minutes], values, ".-", label=f"seed {row['seed']}")
            axis.axhline(mark, color="black", linestyle=":", label="to pass")
            axis.set(title=ROBOT_NAMES[robot], ylabel=label, xlim=(0, None), ylim=(0, None))
            if not mark:  # falls: whole numbers, and 0 is not hidden by the axis
                axis.set_ylim(-0.2, max(3, axis.get_ylim()[1]))
                axis.yaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set(xlabel="minutes since the start")
    axes[0, 0].legend(fontsize="small")
    save(figure, args.output / "walk_curves.png")


def on_grid(curves: list[tuple[list, list]], points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Curves (x, y) at the same points [P], which all of them reach: [curves, P]. Between their points they are taken
    as straight."""
    grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), points)
    return grid, np.array([np.interp(grid, x, y) for x, y in curves])


def draw_band(
    axis, curves: list[tuple[list, list]], label: str, color: str, style: str = "-"
) -> None:
    """Mean and range."""
    grid, values = on_grid(curves)
    axis.plot(grid, values.mean(axis=0), style, color=color, label=label)
    axis.fill_between(
        grid, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0
    )


def thousands(axis) -> None:
    """Steps as 200k or 1.5M."""
    axis.xaxis.set_major_formatter(
        lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x else "0"
    )


def plot_learning(args: Args, name: str = "curves", script: str = "ppo_mjx.py") -> None:
    """Return in Gymnasium against steps and seconds: a figure for some of the tasks each, a column for each task."""
    result = json.loads((args.results / f"{name}.json").read_text())
    tasks = list(dict.fromkeys(row["env_id"] for row in result["rows"]))
    figures = math.ceil(len(tasks) / MOST_COLUMNS)
    for number, some in enumerate(np.array_split(tasks, figures), start=1):
        output = args.output / (f"{name}.png" if number == 1 else f"{name}_{number}.png")
        plot_tasks(result, list(some), script, output)


def plot_tasks(result: dict, tasks: list[str], script: str, output: Path) -> None:
    rows, peers = result["rows"], result["peers"]
    figure, axes = plt.subplots(2, len(tasks), figsize=(max(4.5 * len(tasks), 6), 7), squeeze=False)
    for column, task in enumerate(tasks):
        mine = [row["curve"] for row in rows if row["env_id"] == task]
        for line, (key, label) in enumerate(
            (("steps", "environment steps"), ("seconds", "seconds since the start"))
        ):
            axis = axes[line][column]
            curves = [
                tuple([point[name] for point in curve] for name in (key, "mean")) for curve in mine
            ]
            if key == "steps":
                draw_band(axis, curves, script, BLUE)
            else:  # the seeds' processes do not start equally fast, so that a mean would mix up their steps
                seeds = f"{len(mine)} seeds; above: mean and range" if len(mine) > 1 else "one seed"
                for i, curve in enumerate(curves):
                    axis.plot(
                        *curve, color=BLUE, linewidth=1, label=None if i else f"{script}: {seeds}"
                    )
            for (peer, mark), color in zip(
                peers[task].items(), (ORANGE, PURPLE, VERMILION, GREEN), strict=False
            ):
                axis.axhline(
                    mark, color=color, linestyle=":", linewidth=1.8, label=f"{peer} steps: {mark:g}"
                )
            axis.set(xlabel=label, ylabel="return", title=f"{task}-v5", xlim=(0, None))
            axis.grid(alpha=0.3)
        thousands(axes[0][column])
        axes[1][column].legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False, fontsize=9
        )
    save(figure, output)


def plot_validation(args: Args) -> None:
    """Returns of the episodes that end in each twentieth of the training."""
    result = json.loads((args.results / "validate.json").read_text())
    rows, end = result["curves"], result["args"]["timesteps"]
    tasks = list(dict.fromkeys(row["env_id"] for row in rows))
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(max(4.5 * len(tasks), 6), 3.5), squeeze=False
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        for arm, (color, style) in ARM_STYLES.items():
            mine = [row["curve"] for row in rows if (row["env_id"], row["arm"]) == (task, arm)]
            draw_band(axis, [binned(curve, end / 20) for curve in mine], arm, color, style)
        axis.set(xlabel="environment steps", ylabel=f"return in training, {task}", xlim=(0, None))
        axis.grid(alpha=0.3)
        thousands(axis)
    axes[0][0].legend(title=f"mean and range, seeds {', '.join(map(str, result['args']['seeds']))}")
    save(figure, args.output / "validate_curves.png")


def binned(curve: list[dict], width: float) -> tuple[list, list]:
    """Steps and mean return of the episodes in each bin; bins without any are left out."""
    bins = {}
    for point in curve:
        bins.setdefault(int((point["steps"] - 1) // width), []).append(point)
    x = [float(np.mean([point["steps"] for point in points])) for points in bins.values()]
    y = [sum(p["episodes"] * p["return"] for p in points) / sum(p["episodes"] for p in points)
         for points in bins.values()]  # fmt: skip
    return x, y


FIGURES = {"curves.json": plot_learning,
           "curves_sac.json": partial(plot_learning, name="curves_sac", script="sac_mjx.py"),
           "time_to_walk_g1.json": plot_walking, "validate.json": plot_validation}  # fmt: skip


def main(args: Args) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    for name, plot in FIGURES.items():
        if (args.results / name).exists():
            plot(args)
        else:
            print(f"skipped: there is no {args.results / name}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
