"""How well short runs learn: a band that five seeds gave, since a floor lets much of a fault through.

learning_bands.json has, by task, the command, the commit and the return of each seed: the mean of
the episodes in C MuJoCo that the run prints at its end. Who changes what is learnt on purpose runs
the command again with all five seeds, and writes the new numbers there.
"""

import json
import shlex
from pathlib import Path

import pytest

import ppo_mjx

BANDS = json.loads((Path(__file__).parent / "learning_bands.json").read_text())
# On other processors and versions the numbers round otherwise, and a run is as good as another
# seed's. The band of five seeds is therefore widened, at both ends, by this share of its width.
MARGIN = 0.5


@pytest.mark.parametrize("env_id", BANDS)
def test_return_is_in_the_band(tmp_path, env_id):
    """Seed 1 learns as much as the five seeds did, and not more."""
    _, _, *flags = shlex.split(BANDS[env_id]["command"])  # without: python ppo_mjx.py
    ppo_mjx.main([*flags, "--seed", "1", "--runs-dir", str(tmp_path)])
    (run_dir,) = tmp_path.iterdir()
    run = json.loads((run_dir / "run.json").read_text())

    returns = BANDS[env_id]["returns"].values()
    margin = MARGIN * (max(returns) - min(returns))
    value = run["evaluation"]["C MuJoCo"]["mean"]
    assert min(returns) - margin <= value <= max(returns) + margin
