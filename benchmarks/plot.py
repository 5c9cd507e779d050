"""The figures of README and docs, from the JSON under benchmarks/results/.

    python benchmarks/plot.py

curves.png: return in Gymnasium against seconds and against steps (time_to_return.json). g1_curves.png: what the G1's
test says of its policies while it learns (time_to_walk.json).
"""

import dataclasses
import json
from pathlib import Path

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
CLEANRL = {"HalfCheetah": 1443, "Hopper": 2383, "Walker2d": 2288}  # means after 1M steps
G1_MARKS = {"error": ("velocity error, m/s", 0.15), "yaw": ("yaw error, rad/s", 0.2),
            "drift": ("drift in 10 s of standing, m", 0.1), "falls": ("falls in 160 starts", 0.0)}  # fmt: skip


@dataclasses.dataclass
class Args:
    results: Path = ROOT / "benchmarks" / "results"
    output: Path = ROOT / "docs"


def save(figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    print(file)


def plot_returns(args: Args) -> None:
    rows = json.loads((args.results / "time_to_return.json").read_text())["rows"]
    tasks = list(dict.fromkeys(row["env_id"] for row in rows))
    figure, axes = plt.subplots(2, len(tasks), figsize=(4 * len(tasks), 6), squeeze=False)
    for column, task in enumerate(tasks):
        for line, (key, label) in enumerate((("seconds", "seconds since the start"), ("steps", "environment steps"))):
            axis = axes[line][column]
            for row in rows:
                if row["env_id"] == task:
                    x, y = ([point[name] for point in row["curve"]] for name in (key, "mean"))
                    axis.plot(x, y, label=f"seed {row['seed']}")
            axis.axhline(CLEANRL[task], color="black", linestyle=":", label="CleanRL after 1M steps")
            axis.set(xlabel=label, ylabel=f"return in {task}-v5", xlim=(0, None))
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    save(figure, args.output / "curves.png")


def plot_g1(args: Args) -> None:
    """Each mark of the test against minutes; robots that have fallen have no errors, so the first points may lack."""
    rows = json.loads((args.results / "time_to_walk.json").read_text())["rows"]
    figure, axes = plt.subplots(1, len(G1_MARKS), figsize=(12, 3))
    for axis, (key, (label, mark)) in zip(axes, G1_MARKS.items(), strict=True):
        for row in rows:
            minutes, values = ([point[name] for point in row["curve"]] for name in ("seconds", key))
            axis.plot([x / 60 for x in minutes], values, ".-", label=f"seed {row['seed']}")
        axis.axhline(mark, color="black", linestyle=":", label="to pass")
        axis.set(xlabel="minutes since the start", ylabel=label, xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    save(figure, args.output / "g1_curves.png")


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__)
    plot_returns(arguments)
    plot_g1(arguments)
