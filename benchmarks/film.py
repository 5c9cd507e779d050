"""Trained policies side by side, in C MuJoCo on the original models: the moving picture of README and docs.

    python benchmarks/film.py --runs runs/NAME_OF_HOPPER runs/NAME_OF_ANT

Each pane is one episode of a run folder's deterministic policy at its real speed; a robot that falls stays down. The
whole episode's return is printed. Needs OpenGL, as `--capture-video` does. Writes docs/NAME.gif.
"""

import dataclasses
from pathlib import Path

import common
import imageio
import mujoco
import numpy as np
import tyro
from PIL import Image

import ppo_mjx as ppo


@dataclasses.dataclass
class Args:
    runs: tuple[str, ...] = ()  # run folders of ppo_mjx.py
    start: float = 1.0  # first moment that is shown, in seconds of the episode
    seconds: float = 3.0  # that are shown
    fps: int = 20  # frames a second
    size: int = 240  # of a pane, in pixels
    seed: int = 1  # of the episodes' starts
    name: str = "film"  # of the file
    smoke: bool = False  # a moment of two robots that nothing moves, to benchmarks/results/


def film(env_id: str, policy: dict, args: Args) -> np.ndarray:
    """One episode's frames [T, size, size, 3] of uint8."""
    env, path = ppo.Env(ppo.Args(env_id=env_id)), []
    original = ppo.CMujocoEnv(env)
    (total,) = ppo.evaluate_on_host(
        original, policy, 1, args.seed, lambda: path.append(original.data.qpos.copy())
    )
    print(f"{env_id}: return {total:.0f} in {len(path)} steps")
    renderer, frames = ppo.make_renderer(original.model), []
    for t in args.start + np.arange(round(args.seconds * args.fps)) / args.fps:
        original.data.qpos = path[min(round(t / env.control_dt), len(path) - 1)]
        mujoco.mj_forward(original.model, original.data)
        renderer.update_scene(original.data, camera="track")
        picture = Image.fromarray(renderer.render())
        side = 3 * picture.height // 4  # above is sky
        left, top = (picture.width - side) // 2, picture.height - side
        square = picture.crop((left, top, left + side, top + side))
        frames.append(np.asarray(square.resize((args.size, args.size), Image.Resampling.LANCZOS)))
    renderer.close()
    return np.array(frames)


def still(env_id: str) -> dict:
    """A policy that does nothing."""
    env = ppo.Env(ppo.Args(env_id=env_id))
    weights = np.zeros((env.observation_size, env.action_size))
    return {"action_scale": 1.0, "action_bias": 0.0, "obs_mean": np.zeros(len(weights)),
            "obs_var": np.ones(len(weights)), "w0": weights, "b0": weights[0]}  # fmt: skip


def main(args: Args) -> None:
    folder = common.ROOT / "docs"
    if args.smoke:
        args = dataclasses.replace(args, start=0.0, seconds=0.1, name="film_smoke")
        folder = common.RESULTS
        panes = [(env_id, still(env_id)) for env_id in ("Hopper", "Ant")]
    else:
        ppo.require(args.runs, "--runs: which run folders?")
        panes = [
            (ppo.read_run(Path(run)).env_id, dict(np.load(Path(run) / "policy.npz")))
            for run in args.runs
        ]
    rows = np.concatenate([film(*pane, args) for pane in panes], axis=2)
    imageio.mimsave(folder / f"{args.name}.gif", rows, duration=1000 / args.fps, loop=0)
    print(folder / f"{args.name}.gif")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
