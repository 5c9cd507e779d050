"""How short runs learn: within what five seeds gave, where a floor would let many faults through.

learning_bands.json has, by task, the command, the commit, and what `measure` makes of the run of
each seed. Who changes on purpose what is learnt runs the command again with all five seeds, and
writes the new numbers there.
"""

import contextlib
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from quick import optimised
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_mjx

BANDS = json.loads((Path(__file__).parent / "learning_bands.json").read_text())
# Seed 1 is one of the five, but another processor or version rounds otherwise, and its run is then
# as different as another seed's. So the five values' range is widened at both ends, on a
# logarithmic scale, by this multiple of its width: a sixth value falls outside with a chance of 1%,
# were the logarithms normally distributed.
MARGIN = 1.5


def measure(run_dir: Path) -> dict[str, float]:
    """The return of the trained policy in C MuJoCo, and means of metrics over the whole run.

    The return differs much from seed to seed, or is the highest for all. The metrics do not, and show what
    it hides.
    """
    run = json.loads((run_dir / "run.json").read_text())
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    values = {"return": run["evaluation"]["C MuJoCo"]["mean"]}
    for name in ("charts/episodic_return", "losses/clipfrac", "losses/grad_norm"):
        values[name.split("/")[1]] = np.mean([event.value for event in log.Scalars(name)])
    return values


TASKS = [
    "InvertedPendulum",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("HalfCheetah", "Hopper")),
]


@pytest.mark.parametrize("env_id", TASKS)
def test_run_is_in_the_band(tmp_path, env_id):
    """Seed 1 learns as the five seeds did: not worse, and not better either."""
    _, _, *flags = shlex.split(BANDS[env_id]["command"].replace("SEED", "1"))
    # Where compiling takes longer than the steps, it is quick; the numbers are the same but for rounding.
    with contextlib.nullcontext() if env_id == "InvertedPendulum" else optimised():
        ppo_mjx.main([*flags, "--runs-dir", str(tmp_path)])
    (run_dir,) = tmp_path.iterdir()

    outside = {}
    seeds = list(BANDS[env_id]["seeds"].values())
    measured = measure(run_dir)
    for name in seeds[0]:
        value = measured[name]
        five = [values[name] for values in seeds]
        factor = (max(five) / min(five)) ** MARGIN
        low = min(five) / factor
        high = max(five) * factor
        if not low <= value <= high:
            outside[name] = f"{value:.5g} is not in {low:.5g} to {high:.5g}"
    assert not outside
