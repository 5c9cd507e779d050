"""Film a run of sac_mjx_pendulum.py: its training in a few iterations, then its trained policy.

    python tools/film_pendulum.py runs/NAME                 runs/NAME/videos/training.mp4
    python tools/film_pendulum.py runs/NAME --policy-only   runs/NAME/videos/policy.mp4

The picture is that of tools/live_window.py, at the pendulums' real speed; it needs no display.
Training is shown by about ten of its iterations, the policy by an episode in C MuJoCo.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the accelerator may be busy with training

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import imageio
import numpy as np
import sac_mjx_pendulum as sac
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tools.live_window import Picture, RunLog


def play(env: sac.Env, policy: dict, seed: int) -> np.ndarray:
    """The angles of four episodes of the policy in C MuJoCo: [T, 4] rad."""
    original = sac.CMujocoEnv(env)
    path = []
    sac.evaluate_on_host(original, policy, 4, seed, lambda: path.append(original.data.qpos[0]))
    return np.reshape(path, (4, -1)).T


def write_film(file: Path, log: RunLog | None, policy_angles: np.ndarray, fps: float) -> None:
    """Write the film; without a log, of the policy alone. policy_angles: [T, 4] rad."""
    figure = Figure((10, 5), dpi=80, layout="tight")
    canvas = FigureCanvasAgg(figure)
    picture = Picture(figure)
    file.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings(action="ignore"), imageio.get_writer(file, fps=fps) as video:

        def show(angles: np.ndarray) -> None:
            for pose in angles:
                picture.pose(pose)
                canvas.draw()
                video.append_data(np.asarray(canvas.buffer_rgba())[..., :3])

        iterations = list(log.angles().items()) if log else []
        every = max(1, len(iterations) // 10)
        for step, angles in iterations[::every]:
            picture.draw_curves(log, until=step)
            show(angles)
        if log:
            picture.draw_curves(log)
        show(policy_angles)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--policy-only", action="store_true", help="leave out the training")
    flags = parser.parse_args(argv)

    args = sac.read_run(flags.run_dir)
    env = sac.Env(args)
    with sac.or_fail(f"{flags.run_dir}: no policy"):
        with np.load(flags.run_dir / "policy.npz", allow_pickle=False) as file:
            policy = dict(file)

    log = None if flags.policy_only else RunLog(flags.run_dir)
    if log:
        log.read()
    name = "policy" if flags.policy_only else "training"
    file = flags.run_dir / "videos" / f"{name}.mp4"
    with sac.writing(file):
        write_film(file, log, play(env, policy, args.seed), fps=1 / env.task.dt)
    print(f"video: {file}")


if __name__ == "__main__":
    main(sys.argv[1:])
