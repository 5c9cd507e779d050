"""What `onekernel` gains, what its compiling costs, and how exact it is: physics alone.

    python benchmarks/onekernel.py

An environment step is the task's number of physics steps with the same ctrl, from (qpos, qvel,
qacc_warmstart) to the next. A call is --steps of them for all worlds, over all devices. Models are
Gymnasium's, with its integrator, time step, contacts and solver iterations. The G1 with 12 joints is
what ppo_mjx_unitree.py trains on, with servos; both G1s take 4 steps of 5 ms and may take MuJoCo's
own 100 iterations.

Arms, timed in turn, from the same states with the same actions:
  onekernel                 onekernel.compile of onekernel.mjx.step in a scan
  C MuJoCo                  mujoco.batch, one thread for each core (not on a GPU). Humanoid's solver
                            is PGS there, Newton's method elsewhere, as MJX has no PGS
  XLA                       --xla: the function that onekernel compiles, by jax.vmap and XLA
  onekernel, MJX's solver   --mjx-solver, some tasks: onekernel.compile of mujoco.mjx.step in a scan

States: after 50 random actions in C MuJoCo; worlds that fall start again. 1024, repeated for more.
Speed: medians; "onekernel's over it" is the median of the turns' ratios.
Error: a world's is the largest difference of its qpos and qvel (m, rad, m/s, rad/s) after the first
environment step from C MuJoCo in double precision, solver's tolerance 1e-12; here are the largest
and the median over at most 1024 worlds.
Compiling, in seconds: trace_s, JAX traces MJX; build_s, the graph is made of that; llvm_s, LLVM
compiles it (for a GPU, to PTX); compile_s, build_s + llvm_s; program_s, from the call of jit to a
program that runs, with everything in it; cached_s, the same in a second process, which finds what
the first one kept (kernel_found: whether it did). operations: the graph's nodes that results need,
without constants and inputs.

Writes benchmarks/results/NAME.json after each task. The last line that is printed is JSON: {task:
{over_c, over_xla, compile_s, largest_error, ...}}, for the last of --num-envs. On a GPU:

    python benchmarks/onekernel.py --xla --steps 16 --num-envs 2048 4096 8192 16384 65536
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import common  # puts the root first in sys.path, so that `onekernel` is the package, not this file
import jax
import mujoco
import mujoco.batch
import numpy as np
import tyro
from throughput import Turns, servo

import onekernel
import ppo_mjx as ppo
import ppo_mjx_unitree as unitree
from onekernel import api, mjx as lean
from onekernel.codegen import Liveness
from ppo_mjx import mjx

# Arms
ONE = "onekernel"
C = "C MuJoCo"
XLA = "XLA"
ONE_MJX = "onekernel, MJX's solver"

TASKS = ("HalfCheetah", "g1", "g1_29dof", "Hopper", "Walker2d", "Ant", "Humanoid")
MJX_SOLVER_TASKS = ("HalfCheetah", "g1", "Hopper", "Walker2d")  # its program is too large elsewhere
STATE = ("qpos", "qvel", "qacc_warmstart")
POOL = 1024  # worlds with states of their own
WARM_UP = 50  # environment steps
SPEED = "env_steps_per_s onekernel_over_it program_s largest_error median_error".split()
COMPILING = "trace_s build_s llvm_s compile_s program_s cached_s kernel_found".split()
COMPILING += ["operations", "code_kb"]


@dataclasses.dataclass
class Args:
    tasks: tuple[str, ...] = TASKS
    num_envs: tuple[int, ...] = (1024,)
    steps: int = 4  # environment steps of a call, so that its start weighs little
    repeats: int = 5
    min_seconds: float = 0.3  # of a turn at least
    xla: bool = False  # time XLA as well; it compiles slowly
    mjx_solver: bool = False  # time onekernel on mujoco.mjx.step as well
    seed: int = 0
    name: str = "onekernel"  # of the JSON file
    child: bool = False  # compile the program of one task from the caches and print the seconds
    smoke: bool = False  # the first task, for a moment, with next to no optimisation by XLA


# Tasks --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, and where its worlds are. qpos [N, nq], qvel [N, nv]"""

    name: str
    c_model: mujoco.MjModel  # for C MuJoCo
    model: mujoco.MjModel  # the same for MJX
    substeps: int  # physics steps of an environment step
    start: np.ndarray  # qpos at a reset, without noise
    noise: float  # largest, in qpos and qvel, at a reset
    ctrl_center: np.ndarray  # [nu] of the random actions
    ctrl_scale: float
    fallen: Callable  # qpos, qvel -> bool [N]


def make_task(name: str) -> Task:
    if name in ppo.TASKS:
        task = ppo.TASKS[name]
        c_model = ppo.load_model(task)
        model = copy.copy(c_model)
        model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON  # as ppo.Env has it, for Humanoid
        return Task(
            name=name,
            c_model=c_model,
            model=model,
            substeps=task.frame_skip,
            start=model.qpos0,
            noise=task.reset_noise,
            ctrl_center=np.zeros(model.nu),
            ctrl_scale=model.actuator_ctrlrange[0, 1],
            fallen=lambda qpos, qvel: ~task.is_healthy(ppo.Snapshot(qpos, qvel, None, {}), np),
        )
    robot = unitree.ROBOTS["g1"]
    if name == "g1":
        substeps = unitree.Args().decimation
        model = unitree.load_model(robot, unitree.CONTROL_DT / substeps, visuals=False)
        model = servo(model, robot)
        center = unitree.make_controller(robot)[0]
        start = np.concatenate([[0, 0, robot.start_height, 1, 0, 0, 0], center])
    else:
        substeps = 4
        model = mujoco.MjModel.from_xml_path(str(common.ROOT / "robots" / f"{name}.xml"))
        center = model.key("stand").ctrl
        start = model.key("stand").qpos
        # MuJoCo's own limits: with the file's neither solver gets to the end.
        model.opt.iterations = 100
        model.opt.ls_iterations = 50
    return Task(
        name=name,
        c_model=model,
        model=model,
        substeps=substeps,
        start=start,
        noise=0.01,
        ctrl_center=center,
        ctrl_scale=robot.action_scale,
        fallen=lambda qpos, _: unitree.has_fallen(robot, qpos, np),
    )


def draw_controls(task: Task, random: np.random.Generator, *shape: int) -> np.ndarray:
    """[*shape, nu]"""
    action = random.uniform(-1, 1, (*shape, task.c_model.nu))
    return (task.ctrl_center + task.ctrl_scale * action).astype(np.float32)


def warm_up(task: Task, worlds: int, seed: int) -> dict[str, np.ndarray]:
    """States [worlds, n] amid random actions."""
    random = np.random.default_rng(seed)
    batch = mujoco.batch.Batch(task.c_model, nsim=worlds, nthread=common.count_cores())

    def restart(chosen: np.ndarray) -> None:
        def noise(size: int) -> np.ndarray:
            return task.noise * random.uniform(-1, 1, (chosen.sum(), size))

        batch.qpos[chosen] = task.start + noise(task.c_model.nq)
        batch.qvel[chosen] = noise(task.c_model.nv)
        batch.qacc_warmstart[chosen] = 0

    restart(np.full(worlds, True))
    for _ in range(WARM_UP):
        batch.ctrl[:] = draw_controls(task, random, worlds)
        batch.step(nstep=task.substeps)
        restart(task.fallen(batch.qpos, batch.qvel))
    return {name: np.array(getattr(batch, name), np.float32) for name in STATE}


# Programs -----------------------------------------------------------------------------------------


def physics(model: mujoco.MjModel, substeps: int, step: Callable) -> Callable:
    """An environment step of one world: its state (see STATE) and ctrl [nu] -> its state.

    step: of MJX's model and data, a physics step.
    """
    device = jax.local_devices()[0]
    mjx_model = mjx.put_model(model, device, impl="jax")
    template = mjx.make_data(mjx_model, device)

    def env_step(state: dict, ctrl: jax.Array) -> dict:
        def substep(state, _):
            data = step(mjx_model, template.replace(**state, ctrl=ctrl))
            return {name: getattr(data, name) for name in STATE}, None

        return jax.lax.scan(substep, state, length=substeps)[0]

    return env_step


def plain_step(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """MJX as it is, in full precision."""
    with jax.default_matmul_precision("highest"):
        return mjx.step(model, data)


def make_steps(args: Args, task: Task) -> dict[str, Callable]:
    """An environment step of one world for each arm but C's."""
    lean_physics = physics(task.model, task.substeps, lean.step)
    steps = {ONE: onekernel.compile(lean_physics)}
    if args.xla:
        steps[XLA] = lean_physics
    if args.mjx_solver and task.name in MJX_SOLVER_TASKS:
        steps[ONE_MJX] = onekernel.compile(physics(task.model, task.substeps, plain_step))
    return steps


def compile_program(step: Callable, state: dict, controls: np.ndarray):
    """A call that takes all worlds through the controls [N, T, nu], and the seconds of compiling.

    The call returns the states after the first environment step and after the last.
    """

    def run(state, controls):
        def env_step(state, ctrl):
            state = jax.vmap(step)(state, ctrl)
            return state, state

        last, path = jax.lax.scan(env_step, state, controls.swapaxes(0, 1))
        return jax.tree.map(lambda values: values[0], path), last

    mesh = common.make_mesh(None, len(controls))
    call, seconds, _ = common.compile_sharded(mesh, run, state, controls)
    return call, seconds


class CMuJoCo:
    """A call takes all worlds through the controls [N, T, nu], or the first of them."""

    def __init__(self, model: mujoco.MjModel, substeps: int, state: dict, controls: np.ndarray):
        self.substeps = substeps
        self.state = state
        self.controls = np.ascontiguousarray(controls.swapaxes(0, 1))
        self.batch = mujoco.batch.Batch(model, nsim=len(controls), nthread=common.count_cores())

    def __call__(self, steps: int | None = None) -> dict[str, np.ndarray]:
        for name, values in self.state.items():
            getattr(self.batch, name)[:] = values
        for ctrl in self.controls[:steps]:
            self.batch.ctrl[:] = ctrl
            self.batch.step(nstep=self.substeps)
        return {name: getattr(self.batch, name) for name in STATE}


# Measurements -------------------------------------------------------------------------------------


@contextlib.contextmanager
def watch_compiler():
    """A dictionary. Afterwards it has the figures of COMPILING for the kernel compiled within."""
    figures = {}
    seconds = collections.Counter()
    results = {}
    platform = api.PLATFORMS[api.default_platform()]
    start_compiling = platform.start_compiling

    def compile_now(text: str) -> bytes:  # nothing else is done meanwhile
        code = start_compiling(text)
        return code if isinstance(code, bytes) else code()

    def timed(owner, function: str, stage: str):
        original = getattr(owner, function)

        @functools.wraps(original)
        def run(*args, **kwargs):
            start = time.perf_counter()
            results[function] = original(*args, **kwargs)
            seconds[stage] += time.perf_counter() - start
            return results[function]

        return mock.patch.object(owner, function, run)

    with (
        timed(api.Kernel, "trace", "trace_s"),
        timed(api.Kernel, "build", "build_s"),
        timed(platform, "kernel_ir", "llvm_s"),
        mock.patch.object(platform, "start_compiling", compile_now),
        timed(platform, "start_compiling", "llvm_s"),
    ):
        yield figures
    graph = results["build"]
    live = Liveness(graph).nodes
    figures |= seconds
    figures["compile_s"] = seconds["build_s"] + seconds["llvm_s"]
    figures["operations"] = sum(
        bool(live[node]) and op not in ("const", "input") for node, op in enumerate(graph.op)
    )
    figures["code_kb"] = len(results["start_compiling"]) / 1000


def compile_again(args: Args, task: Task, num_envs: int, cache: str) -> dict:
    """What `child` prints in a second process that finds what this one has compiled."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", f"--tasks={task.name}"]
    command += [f"--num-envs={num_envs}", f"--steps={args.steps}"]
    return common.run_child(
        command,
        **common.caches(cache),
        XLA_PYTHON_CLIENT_PREALLOCATE="false",  # this process has most of a GPU's memory
    )


def child(args: Args) -> None:
    """Compiles the program of onekernel's arm and prints the seconds, and whether the cache had its
    kernel. Worlds may be in any state for that."""
    task = make_task(args.tasks[0])
    num_envs = args.num_envs[0]
    model = task.model
    sizes = {"qpos": model.nq, "qvel": model.nv, "qacc_warmstart": model.nv}
    state = {name: np.zeros((num_envs, size), np.float32) for name, size in sizes.items()}
    controls = np.zeros((num_envs, args.steps, model.nu), np.float32)
    step = make_steps(args, task)[ONE]
    _, seconds = compile_program(step, state, controls)
    (kernel,) = step.kernels.values()
    print("\n" + json.dumps({"cached_s": seconds, "kernel_found": kernel.closed is None}))


def exact_states(task: Task, state: dict, controls: np.ndarray) -> dict[str, np.ndarray]:
    """The states after one environment step in double precision, constraints solved to the end."""
    model = copy.copy(task.model)
    model.opt.tolerance = 1e-12
    model.opt.iterations = 200
    model.opt.ls_iterations = 200
    return CMuJoCo(model, task.substeps, state, controls)(1)


def errors(states: dict, exact: dict) -> dict[str, float]:
    """Of states, of which `exact` may have only the first."""
    count = len(exact["qpos"])
    differences = [np.asarray(states[name])[:count] - exact[name] for name in ("qpos", "qvel")]
    of_worlds = np.abs(np.concatenate(differences, axis=1)).max(axis=1)
    return {"largest_error": float(of_worlds.max()), "median_error": float(np.median(of_worlds))}


def measure(
    args: Args, task: Task, steps: dict, pool: dict, num_envs: int, compiling: dict
) -> dict[str, dict]:
    """Speed and errors of all arms with so many worlds.

    compiling: figures of onekernel's compiler; filled if it is empty
    """
    state = {name: values[np.arange(num_envs) % POOL] for name, values in pool.items()}
    controls = draw_controls(task, np.random.default_rng(args.seed + 1), num_envs, args.steps)
    first = slice(min(num_envs, POOL))
    exact = exact_states(
        task, {name: values[first] for name, values in state.items()}, controls[first]
    )

    rows = {}
    turns = {}
    for arm, step in steps.items():
        watch = contextlib.nullcontext({}) if compiling or arm != ONE else watch_compiler()
        try:
            with watch as figures:
                call, seconds = compile_program(step, state, controls)
            after_first, _ = call()
            turns[arm] = Turns(call, args.min_seconds)
        except Exception:  # the other arms are still of use; main tells and fails
            rows[arm] = {"failed": traceback.format_exc()}
            continue
        rows[arm] = {"program_s": seconds} | errors(after_first, exact)
        if figures:
            compiling |= figures | {"program_s": seconds}
    if jax.default_backend() != "gpu":
        call = CMuJoCo(task.c_model, task.substeps, state, controls)
        rows[C] = errors(call(1), exact)
        turns[C] = Turns(call, args.min_seconds)

    seconds = common.take_turns(turns, args.repeats, warmups=0)
    calls = {arm: [value / turns[arm].calls for value in values] for arm, values in seconds.items()}
    for arm, values in calls.items():
        rows[arm]["env_steps_per_s"] = num_envs * args.steps / statistics.median(values)
        rows[arm]["call_s"] = values
        if ONE in calls:
            rows[arm]["onekernel_over_it"] = common.ratio(values, calls[ONE])
    return rows


def summarize(compiling: dict, rows: dict[str, dict]) -> dict:
    """A task's figures in one line."""
    row = rows[ONE]
    told = {name: row.get(name) for name in ("env_steps_per_s", "largest_error", "median_error")}
    for arm, name in ((C, "over_c"), (XLA, "over_xla"), (ONE_MJX, "over_mjx_solver")):
        told[name] = rows.get(arm, {}).get("onekernel_over_it")
    return told | compiling


def print_tables(results: dict) -> None:
    speed = []
    compiling = []
    for name, result in results.items():
        for num_envs, rows in result["worlds"].items():
            for arm, row in rows.items():
                speed.append([name, num_envs, arm, *map(row.get, SPEED)])
        compiling.append([name, *map(result["compiling"].get, COMPILING)])
    print("\nSpeed\n")
    common.table(["task", "worlds", "arm", *SPEED], speed)
    print("\nCompiling\n")
    common.table(["task", *COMPILING], compiling)


def main(args: Args) -> None:
    common.refuse_fallbacks()
    if args.smoke:
        common.hardly_optimise()
        args = dataclasses.replace(args, tasks=args.tasks[:1], num_envs=(32,), steps=2)
        args = dataclasses.replace(args, repeats=1, min_seconds=0.05)
    common.make_mesh()  # starts JAX with all cores
    if args.child:
        return child(args)

    results = {}
    failed = []
    with tempfile.TemporaryDirectory() as cache:  # empty: nothing has been compiled before
        os.environ |= common.caches(cache)
        jax.config.update("jax_compilation_cache_dir", cache)
        for name in args.tasks:
            task = make_task(name)
            steps = make_steps(args, task)
            pool = warm_up(task, min(POOL, max(args.num_envs)), args.seed)
            compiling = {}
            worlds = {}
            for num_envs in args.num_envs:
                worlds[num_envs] = measure(args, task, steps, pool, num_envs, compiling)
                for arm, row in worlds[num_envs].items():
                    if "failed" in row:
                        failed.append(f"{name}, {num_envs} worlds, {arm}:\n{row['failed']}")
            if compiling:
                compiling |= compile_again(args, task, args.num_envs[0], cache)
            results[name] = {"compiling": compiling, "worlds": worlds}
            jax.clear_caches()
            common.write(args.name, args, {"failed": failed, "results": results}, args.smoke)

    print_tables(results)
    print("\n".join(failed), file=sys.stderr)
    last = args.num_envs[-1]
    told = {name: summarize(r["compiling"], r["worlds"][last]) for name, r in results.items()}
    print("\n" + json.dumps(told), flush=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
