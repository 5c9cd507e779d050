"""The figure of the README: return in Gymnasium against seconds and against steps, from time_to_return.py's JSON.

    python benchmarks/plot.py
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


@dataclasses.dataclass
class Args:
    results: Path = ROOT / "benchmarks" / "results" / "time_to_return.json"
    output: Path = ROOT / "docs" / "curves.png"


def main(args: Args) -> None:
    rows = json.loads(args.results.read_text())["rows"]
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
    figure.tight_layout()
    figure.savefig(args.output, dpi=100)
    print(args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
