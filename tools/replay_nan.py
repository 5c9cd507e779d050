"""Step a world that broke in training in MJX and in C MuJoCo, and tell where the two part.

    python tools/replay_nan.py runs/NAME/nan_dump.npz
    python tools/replay_nan.py runs/NAME/nan_dump.npz --script my_robot.py

A run writes nan_dump.npz when a world's state becomes infinite, NaN or too fast. It holds the
states and actions of that world's last rollout, the settings, and the name of the script, which is
looked for above this folder. --script names another one: a copy of ours with a robot of your own.
"""

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax
import mujoco
import numpy as np

PART = 0.01  # of the largest speed: a difference beyond it counts as parting


def load_script(path: Path) -> ModuleType:
    """The script as a module; one that is imported already is used again."""
    loaded = sys.modules.get(path.stem)
    if loaded and Path(loaded.__file__).resolve() == path.resolve():
        return loaded
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def make_original(script: ModuleType, env, state):
    """The environment in C MuJoCo; a script with random physics has a `Twin` of one episode."""
    if hasattr(script, "Twin"):
        return script.Twin(env, state)
    return script.CMujocoEnv(env)


def replay(script: ModuleType, saved: dict[str, np.ndarray], args) -> None:
    """Print both simulators' speeds step by step, numbered so that the world breaks in step 0.

    saved: the arrays of the dump, [T, ...] for T steps of one world.
    """
    env = script.Env(args)
    broken = saved["['broken']"]  # [T]
    actions = saved["['action']"]  # [T, A]
    keys = jax.random.split(jax.random.key(0), len(broken))
    like = jax.jit(jax.vmap(script.kernel(env.reset)))(keys)
    starts = script.from_arrays(saved, {"start": like})["start"]

    last = int(broken.argmax())
    first = max(0, last - int(starts.info["elapsed"][last]))  # no reset lies between
    state = jax.tree.map(lambda x: x[first], starts)
    original = make_original(script, env, state)
    for name, value in vars(state.data).items():
        if value is not None:
            setattr(original.data, name, value)

    print("step  largest speed in MJX  in C MuJoCo  largest difference")
    step = jax.jit(script.kernel(env.step))
    parted = None
    for t in range(first, last + 1):
        state = step(state, actions[t])
        original.step(actions[t])
        ours = np.asarray(state.data.qvel)
        theirs = original.data.qvel
        speed = np.abs(theirs).max()
        difference = np.abs(ours - theirs).max()
        if parted is None and not difference <= PART * speed:  # NaN parts as well
            parted = t - last
        print(f"{t - last:4} {np.abs(ours).max():22.3g} {speed:12.3g} {difference:19.3g}")

    warnings = [
        mujoco.mjtWarning.mjWARN_BADQPOS,
        mujoco.mjtWarning.mjWARN_BADQVEL,
        mujoco.mjtWarning.mjWARN_BADQACC,
    ]
    resets = sum(original.data.warning[kind].number for kind in warnings)
    where = "nowhere" if parted is None else f"in step {parted}"
    fate = "breaks too" if resets else "does not break"
    print(f"In step 0 the world broke in training. They part {where}. C MuJoCo {fate}.")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dump", type=Path, help="nan_dump.npz of a run")
    parser.add_argument("--script", type=Path, help="the script that made the run")
    flags = parser.parse_args(argv)

    try:
        with np.load(flags.dump, allow_pickle=False) as arrays:
            saved = dict(arrays)
        path = flags.script or ROOT / str(saved["script"])
        script = load_script(path)
        args = script.read_args(str(saved["args"]))
    except Exception as error:
        parser.error(f"{flags.dump} is no nan_dump.npz ({type(error).__name__}: {error!s:.200})")
    replay(script, saved, args)


if __name__ == "__main__":
    main(sys.argv[1:])
