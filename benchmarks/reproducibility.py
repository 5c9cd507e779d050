"""What comes out the same twice, and how soon MJX and C MuJoCo part.

    python benchmarks/reproducibility.py                      all of it
    python benchmarks/reproducibility.py --parts trajectories

runs: short trainings by the command line, on one device, against the first one: again in its process; in another
process, by the compiled program that the first one kept, and compiled anew; resumed from the checkpoint after the first
of three iterations, as if killed there; on two devices. Compared are all arrays of the last checkpoint, bit by bit, the
largest difference of the networks' parameters and of the worlds' numbers, relative to the largest of their array. The
shuffles of a minibatch follow from the number of devices, so on two the learner is another one. What has to be the
same is what the worlds went through before the first update: after the first iteration their states, with the sums of
their rewards, and SAC's buffer, which holds every step, are compared as well.

resets: the same keys give the same starts in another order, on two devices, and one at a time.

trajectories: MJX against C MuJoCo from the same float64 starts by the same random actions, the largest difference of a
coordinate (m or rad) after so many environment steps; median, 90 % quantile and maximum over the starts. Nothing ends
an episode. The reference is C MuJoCo on the same model. Beside float32, by onekernel, stand float64, by XLA, since
onekernel has float32 alone, and what becomes of a start that is off by about 1e-7 in C MuJoCo alone.

The exit code is 1 if what has to be equal to the bit is not. Writes benchmarks/results/NAME.json.
"""

import dataclasses
import json
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

# Its processes share an accelerator's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("JAX_LOGGING_LEVEL", "CRITICAL")

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import tyro
from common import PYTHONPATH, caches, hardly_optimise, make_mesh, run_child, table, write
from faults import checkpoints, only_run, read
from jax.sharding import NamedSharding, PartitionSpec as P

import ppo_mjx
import ppo_mjx_unitree as unitree
import sac_mjx_pendulum as sac

TASKS = "HalfCheetah", "Hopper", "Walker2d", "Ant", "G1"
RUNS = {  # script and flags, of three iterations; SAC's first update comes after the first iteration's last step
    "PPO": ("ppo_mjx", "--env-id Hopper --num-envs 16 --num-steps 64 --num-minibatches 4 "
                       "--total-timesteps 3072 --eval-episodes 1"),
    "SAC": ("sac_mjx_pendulum", "--num-envs 64 --num-steps 64 --learning-starts 4096 --buffer-size 16384 "
                                "--total-timesteps 12288 --eval-episodes 1"),
    "G1": ("ppo_mjx_unitree", "--num-envs 16 --num-steps 64 --num-minibatches 4 --total-timesteps 3072"),
}  # fmt: skip
STILL = {"obs_noise": 0.0, "push_speed": 0.0, "friction": (1.0, 1.0), "added_mass": (0.0, 0.0), "shifted_center": 0.0,
         "gain_noise": 0.0, "strength_noise": 0.0, "action_delay": 0.0}  # fmt: skip
# A Runge-Kutta 4 of MJX takes a minute to compile else.
QUICK = {"xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass
class Args:
    parts: tuple[str, ...] = ("runs", "resets", "trajectories")
    runs: tuple[str, ...] = tuple(RUNS)
    tasks: tuple[str, ...] = TASKS  # of resets (with SAC's) and trajectories
    starts: int = 64
    name: str = "reproducibility"  # of the JSON file
    # Of the environment, after which states are compared.
    steps: tuple[int, ...] = (1, 10, 50, 100, 200)
    seed: int = 1
    # File of starts and actions that a process of this benchmark takes through MJX in float64.
    child: str | None = None
    smoke: bool = False  # in short, and without runs unless they are named


# ---- Comparing ------------------------------------------------------------------------------------------------------
PARTS = {
    "parameters": (".learner.params", ".learner.actor", ".learner.critics"),
    "worlds": ".worlds",
    "buffer": ".buffer",
}  # by how the names of a checkpoint's arrays begin


def difference(one: dict, other: dict, part: str | tuple = "") -> dict | None:
    """Of the arrays whose name begins so, if there are any: whether all are equal to the bit, and the largest relative
    difference of numbers (keys and counts are no such)."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    names, off = [name for name in one if name.startswith(part) and name != "args"], 0.0
    if not names:
        return None
    for name in names:
        a, b = one[name], other[name]
        if a.dtype.kind == "f" and a.size:
            off = max(
                off,
                float(
                    np.nan_to_num(np.abs(a - b)).max() / max(np.nan_to_num(np.abs(a)).max(), 1e-30)
                ),
            )
    return {"bits": all(one[name].tobytes() == other[name].tobytes() for name in names), "off": off}


def told(found: dict) -> str:
    return "equal" if found["bits"] else f"{found['off']:.1e}"


def arrays_of(tree) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): np.asarray(ppo_mjx.bare(x))
        for path, x in jax.tree.leaves_with_path(tree)
    }


# ---- Runs -----------------------------------------------------------------------------------------------------------
def train(
    name: str,
    seed: int,
    cache: Path,
    *folders: Path,
    flags: tuple[str, ...] = ("--num-devices", "1"),
) -> list:
    """A process that trains once into each folder, or goes on with the run in it; the folders of the runs. A run ends
    with the exit code 1 where the policy fails its test, as here it does."""
    script, short = RUNS[name]
    calls = [["--resume", str(found)] if (found := only_run(folder)) else
             [*short.split(), "--seed", str(seed), "--checkpoint-every", "1", *flags, "--runs-dir",
              str(folder)] for folder in folders]  # fmt: skip
    code = f"""import json, sys, {script} as m
for call in {calls}:
    try:
        m.main(call)
    except SystemExit as stop:
        if stop.code not in (0, 1):
            raise
print(json.dumps("done"))"""
    run_child([sys.executable, "-c", code], PYTHONPATH=PYTHONPATH, **caches(cache))
    runs = [only_run(folder) for folder in folders]
    for run in runs:
        assert [int(file.stem) for file in checkpoints(run)] == [3, 2, 1], (
            f"{run}: not all checkpoints are there"
        )
    return runs


def compare_runs(name: str, seed: int, devices: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        folder, rows = Path(folder), []
        go = partial(train, name, seed, folder / "cache")
        first, again = go(folder / "first", folder / "again")
        cut = shutil.copytree(first.parent, folder / "cut")
        for file in checkpoints(only_run(cut))[:2]:
            file.unlink()
        others = {
            "again, same process": lambda: again, "another process": lambda: go(folder / "other")[0],
            "another process, compiled anew": lambda: train(name, seed, folder / "empty", folder / "anew")[0],
            "resumed after 1 of 3 iterations": lambda: go(cut)[0],
        }  # fmt: skip
        if devices > 1:
            others["2 devices"] = lambda: go(folder / "two", flags=("--num-devices", "2"))[0]
        for what, run in others.items():
            files = list(zip(checkpoints(first), checkpoints(run()), strict=True))
            exact = what != "2 devices"
            for iteration, pair in ((3, files[0]), (1, files[-1])):
                one, other = map(read, pair)
                rows.append(
                    {
                        "run": name,
                        "what": what,
                        "iteration": iteration,
                        "promised": exact,
                        "bits": difference(one, other)["bits"],
                    }
                    | {part: difference(one, other, names) for part, names in PARTS.items()}
                )
                if exact and iteration == 3:
                    break
    return rows


def measure_runs(args: Args, failures: list[str]) -> list[dict]:
    """Scripts side by side: nothing is timed, and the bits do not depend on it."""
    devices = len(make_mesh().devices)
    with ThreadPoolExecutor(2) as pool:
        found = {name: pool.submit(compare_runs, name, args.seed, devices) for name in args.runs}
    rows = []
    for name, future in found.items():
        try:
            rows += future.result()
        except (RuntimeError, AssertionError) as error:
            failures.append(f"{name}: {error}")
    failures += [
        f"{row['run']}: {row['what']}: not equal to the bit"
        for row in rows
        if row["promised"] and not row["bits"]
    ]
    print(
        "\nagainst a first run: all arrays of the checkpoint to the bit; largest relative differences"
    )
    table(
        ["run", "what", "after iteration", "all equal", *PARTS],
        [
            [
                row["run"],
                row["what"],
                row["iteration"],
                "yes" if row["bits"] else "no",
                *(row[part] and told(row[part]) for part in PARTS),
            ]
            for row in rows
        ],
    )
    if devices == 1:
        print("there is one device only: two were not compared")
    return rows


# ---- Resets ---------------------------------------------------------------------------------------------------------
def measure_resets(args: Args, failures: list[str]) -> list[dict]:
    envs = {
        task: unitree.Env(unitree.Args())
        if task == "G1"
        else ppo_mjx.Env(ppo_mjx.Args(env_id=task))
        for task in args.tasks
    }
    envs["SAC"] = sac.Env(sac.Args())
    keys, meshes, rows = jax.random.split(jax.random.key(args.seed), 64), [make_mesh(1)], []
    meshes += [make_mesh(2)] if len(make_mesh().devices) > 1 else []
    for name, env in envs.items():
        reset = ppo_mjx.kernel(env.reset)
        run = jax.jit(jax.vmap(reset))
        whole = arrays_of(run(keys))
        found = {"other places": {x: y[::-1] for x, y in arrays_of(run(keys[::-1])).items()}}
        for mesh in meshes[1:]:
            split = jax.jit(
                jax.shard_map(
                    jax.vmap(reset),
                    mesh=mesh,
                    in_specs=P("devices"),
                    out_specs=P("devices"),
                    check_vma=False,
                )
            )
            found["2 devices"] = arrays_of(
                split(jax.device_put(keys, NamedSharding(mesh, P("devices"))))
            )
        alone = jax.jit(reset)
        singles = [arrays_of(alone(key)) for key in keys]
        found["one at a time"] = {x: np.stack([single[x] for single in singles]) for x in whole}
        for what, other in found.items():
            rows.append({"env": name, "what": what} | difference(whole, other))
        jax.clear_caches()
    failures += [
        f"resets of {row['env']}: {row['what']}: not equal to the bit"
        for row in rows
        if not row["bits"]
    ]
    whats = list(dict.fromkeys(row["what"] for row in rows))
    print("\n64 resets by the same keys, largest relative difference")
    table(
        ["", *whats], [[name, *(told(row) for row in rows if row["env"] == name)] for name in envs]
    )
    return rows


# ---- Trajectories ---------------------------------------------------------------------------------------------------
def make_env(task: str):
    """With nothing random in the G1's steps."""
    return (
        unitree.Env(unitree.Args(**STILL))
        if task == "G1"
        else ppo_mjx.Env(ppo_mjx.Args(env_id=task))
    )


def draw(task: str, args: Args):
    """Starts (qpos, qvel) in float64, and actions [S, T, A] that are the same number in all precisions."""
    env, random = make_env(task), np.random.default_rng(args.seed)
    state = jax.jit(jax.vmap(ppo_mjx.kernel(env.reset)))(
        jax.random.split(jax.random.key(args.seed), args.starts)
    )
    actions = random.uniform(-1, 1, (args.starts, max(args.steps), env.action_size)).astype(
        np.float32
    )
    return [
        np.asarray(x, np.float32).astype(float) for x in (state.data.qpos, state.data.qvel)
    ], actions.astype(float)


def in_c(task: str, starts, actions) -> np.ndarray:
    """Coordinates [S, T, nq] by C MuJoCo."""
    if task == "G1":
        robot = unitree.ROBOTS["g1"]
        (default, stiffness, damping, most) = unitree.make_controller(robot)
        substeps = unitree.Args.decimation
        model = unitree.load_model(robot, unitree.CONTROL_DT / substeps, visuals=False)
    else:
        model, substeps = ppo_mjx.load_model(ppo_mjx.TASKS[task]), ppo_mjx.TASKS[task].frame_skip
    data, path = mujoco.MjData(model), np.zeros((*actions.shape[:2], model.nq))
    for i, (qpos, qvel) in enumerate(zip(*starts, strict=True)):
        mujoco.mj_resetData(model, data)
        data.qpos, data.qvel = qpos, qvel
        for t, action in enumerate(actions[i]):
            for _ in range(substeps):
                data.ctrl = action
                if task == "G1":  # the motors' control law
                    torque = stiffness * (default + robot.action_scale * action - data.qpos[7:])
                    data.ctrl = np.clip(torque - damping * data.qvel[6:], -most, most)
                mujoco.mj_step(model, data)
            path[i, t] = data.qpos
    return path


def in_mjx(task: str, starts, actions) -> np.ndarray:
    """The same by MJX, in JAX's default precision."""
    env = make_env(task)
    step = env.step if jax.config.jax_enable_x64 else ppo_mjx.kernel(env.step)

    def run(state, actions):
        def one(state, action):
            state = jax.vmap(step)(state, action)
            return state, state.data.qpos

        return jax.lax.scan(one, state, actions.swapaxes(0, 1))[1].swapaxes(0, 1)

    count, mesh = len(actions), make_mesh()
    mesh = mesh if count % mesh.size == 0 else make_mesh(1)
    state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), count))
    qpos, qvel = (jnp.asarray(x, float) for x in starts)
    state = state.replace(data=type(state.data)(qpos, qvel, jnp.zeros_like(qvel)))
    operands = jax.device_put(
        (state, jnp.asarray(actions, float)), NamedSharding(mesh, P("devices"))
    )
    split = jax.shard_map(
        run, mesh=mesh, in_specs=P("devices"), out_specs=P("devices"), check_vma=False
    )
    path = jax.jit(split).lower(*operands).compile(QUICK)(*operands)
    jax.clear_caches()
    assert path.dtype == jnp.zeros(()).dtype, path.dtype
    return np.asarray(path, float)


def errors(path: np.ndarray, reference: np.ndarray, steps: tuple[int, ...]) -> dict:
    """Of each start, after so many steps: the largest difference of a coordinate."""
    return {str(t): np.abs(path - reference).max(axis=-1)[:, t - 1].tolist() for t in steps}


def measure_task(task: str, args: Args) -> dict:
    starts, actions = draw(task, args)
    reference = in_c(task, starts, actions)
    random = np.random.default_rng(0)
    moved = [x + 1e-7 * random.standard_normal(x.shape) for x in starts]
    rows = {"C MuJoCo, moved by 1e-7": errors(in_c(task, moved, actions), reference, args.steps)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "in.npz"
        np.savez(file, task=task, qpos=starts[0], qvel=starts[1], actions=actions)
        run_child(
            [sys.executable, str(Path(__file__).resolve()), "--child", str(file)],
            JAX_ENABLE_X64="1",
        )
        rows["MJX, float64"] = errors(np.load(file.with_suffix(".out.npy")), reference, args.steps)
    return rows | {"MJX, float32": errors(in_mjx(task, starts, actions), reference, args.steps)}


def measure_trajectories(args: Args, failures: list[str]) -> dict:
    result = {}
    for task in args.tasks:
        try:
            result[task] = measure_task(task, args)
        except RuntimeError as error:
            failures.append(f"trajectories of {task}: {error}")
    rows = []
    for task, settings in result.items():
        for setting, found in settings.items():
            quantiles = [np.quantile(found[str(t)], [0.5, 0.9, 1.0]) for t in args.steps]
            rows.append(
                [task, setting, *(" ".join(f"{x:.0e}" for x in three) for three in quantiles)]
            )
            if not np.isfinite(quantiles).all():
                failures.append(f"trajectories of {task}: {setting}: not finite")
    print("\nlargest difference of a coordinate, m or rad: median, 90 %, maximum")
    table(["task", "physics", *(f"{t} steps" for t in args.steps)], rows)
    return result


def main(args: Args) -> None:
    if args.child:
        make_mesh()
        given = np.load(args.child)
        path = in_mjx(str(given["task"]), (given["qpos"], given["qvel"]), given["actions"])
        np.save(Path(args.child).with_suffix(".out.npy"), path)
        print(json.dumps("done"))
        return
    if args.smoke:
        parts = args.parts[1:] if args.parts == Args.parts else args.parts
        args = dataclasses.replace(
            args, parts=parts, runs=("SAC",), tasks=("HalfCheetah",), starts=4, steps=(1, 5)
        )
        hardly_optimise()
    make_mesh()  # starts JAX with a device for each core
    measures = {
        "runs": measure_runs,
        "resets": measure_resets,
        "trajectories": measure_trajectories,
    }
    failures, result = [], {}
    for part in args.parts:
        result[part] = measures[part](args, failures)
    for text in failures:
        print(f"FAIL  {text}")
    write(args.name, args, {"results": result, "failures": failures}, args.smoke)
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
