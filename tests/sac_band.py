"""What five seeds of sac_mjx_pendulum.py reach at the script's own defaults, for tests/test_sac.py.

python tests/sac_band.py    train them, and write tests/sac_band.json
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
FILE = Path(__file__).with_suffix(".json")
SEEDS = (1, 2, 3, 4, 5)


def returns_of(run_dir: Path) -> dict[str, float]:
    """Mean returns of a finished run: by step while it trained, and by simulator at its end."""
    log = EventAccumulator(str(run_dir)).Reload()
    returns = {f"step {point.step}": point.value for point in log.Scalars("eval/episodic_return")}
    run = json.loads((run_dir / "run.json").read_text())
    return returns | {name: result["mean"] for name, result in run["evaluation"].items()}


def train(seed: int) -> dict[str, float]:
    """The returns of one seed, trained in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "sac_mjx_pendulum.py", "--seed", str(seed), "--runs-dir", folder]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (run_dir,) = Path(folder).iterdir()
        return returns_of(run_dir)


def main() -> None:
    rows = {}
    for seed in SEEDS:
        rows[seed] = train(seed)
        print(seed, rows[seed], flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "mujoco-mjx")}
    content = {"command": "python tests/sac_band.py", "versions": versions, "seeds": rows}
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
