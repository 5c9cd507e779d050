"""Throughput of the environments over the number of worlds, beside C MuJoCo, Gymnasium and MJX-Warp.

    python benchmarks/throughput.py

Arms: the training scripts' `env.step` in a scan over all devices, as one kernel by onekernel; the same on MJX-Warp, by
XLA (on a GPU); C MuJoCo (mujoco.batch, one call for each environment step), with one thread and with one for each core;
Gymnasium's vector environments. All step the same model: Gymnasium's, with its time step, integrator and contacts, and
for the G1 what ppo_mjx_unitree.py trains on, in C with the joints' controllers as actuators. Humanoid's solver is PGS
in C, as in Gymnasium, and Newton's method elsewhere. The C arms do physics only, the others observations and rewards as
well; no arm but Gymnasium's resets a world.

A call is some steps of all worlds, with the same random actions for all arms, from the same states: resets in C
MuJoCo and 50 random steps of 256 worlds (those that fell started again), repeated for more worlds; a turn is calls
for a while. Gymnasium's worlds run on from turn to turn and reset themselves. Arms are timed in turn, medians are
given; a call has up to --steps steps, fewer where one would take longer than --turn-seconds.

Units: an environment step is frame_skip physics steps (the G1's: 4 of 5 ms). "/ C" is the speed over that of C MuJoCo
on all cores, the median over turns. CPU: the process's CPU time over wall time and cores, with the threads that only
wait busily (- where other processes do the work); GPU: mean of nvidia-smi's samples.
Writes benchmarks/results/NAME.json after each task.
"""

import contextlib
import dataclasses
import shutil
import statistics
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial

import common
import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import mujoco.batch
import numpy as np
import tyro

import ppo_mjx as ppo
import ppo_mjx_unitree as unitree
import sac_mjx_pendulum as sac

OURS = "env.step, onekernel"
WARP = "env.step, MJX-Warp"
C = "C MuJoCo, all cores"
C_ONE = "C MuJoCo, 1 thread"
POOL, WARM_UP = 256, 50  # worlds, random steps
FULL = 32  # worlds from which on time is taken to grow as their number
COLUMNS = {"env_steps_per_s": "env steps/s", "physics_steps_per_s": "physics steps/s", "speed / C": "/ C",
           "compile_s": "compile s", "cpu_percent": "CPU %", "gpu_percent": "GPU %"}  # fmt: skip


@dataclasses.dataclass
class Args:
    tasks: tuple[str, ...] = (
        "HalfCheetah",
        "Hopper",
        "Walker2d",
        "Ant",
        "Humanoid",
        "g1",
        "Pendulum",
    )
    num_envs: tuple[int, ...] = (1, 32, 64, 128, 256, 1024, 4096)
    gymnasium_num_envs: int = 32  # for up to so many worlds Gymnasium is measured
    steps: int = 16  # environment steps of a call at most; as many as in a rollout of ppo_mjx.py
    # That a call of ours may take; C on all cores four times as long, others twice.
    turn_seconds: float = 1.0
    min_seconds: float = 0.3  # of a turn at least
    repeats: int = 5
    seed: int = 0
    name: str = "throughput"  # of the JSON file
    # Keep compiled programs, for the next start: then their seconds tell nothing.
    compile_cache: bool = False
    smoke: bool = False  # one iteration of everything, with next to no optimisation by the compiler


@dataclasses.dataclass(frozen=True)
class Task:
    """What the arms need of one environment."""

    env: Callable  # makes its Env
    model: mujoco.MjModel
    c_model: mujoco.MjModel  # the same for C MuJoCo
    substeps: int  # in one environment step
    over: Callable  # qpos [N, nq], qvel [N, nv] -> bool [N], whether a world has fallen
    to_ctrl: Callable = np.asarray  # from actions to ctrl of c_model
    scale: float = 1.0  # of the actions
    gymnasium_id: str | None = None


def servo(model: mujoco.MjModel, robot: unitree.Robot) -> mujoco.MjModel:
    """The model with the robot's joint controllers as actuators, so that C MuJoCo needs no Python between its steps."""
    _, stiffness, damping, max_torque = unitree.make_controller(robot)
    model.actuator_biastype[:], model.actuator_forcelimited[:] = mujoco.mjtBias.mjBIAS_AFFINE, True
    model.actuator_gainprm[:, 0], model.actuator_ctrllimited[:] = stiffness, False
    model.actuator_biasprm[:, 1], model.actuator_biasprm[:, 2] = -stiffness, -damping
    model.actuator_forcerange[:] = np.stack([-max_torque, max_torque], axis=-1)
    return model


def make_task(name: str) -> Task:
    if name in ppo.TASKS:
        task = ppo.TASKS[name]
        env = ppo.Env(ppo.Args(env_id=name))
        model = ppo.load_model(task)
        model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON  # as Env has it, for Humanoid
        return Task(
            partial(ppo.Env, ppo.Args(env_id=name)),
            model,
            ppo.load_model(task),
            task.frame_skip,
            lambda qpos, qvel: ~task.is_healthy(ppo.Snapshot(qpos, qvel, None, {}), np),
            scale=env.action_scale,
            gymnasium_id=f"{name}-v5",
        )
    if name == "Pendulum":
        args = sac.Args(env_id="Pendulum-v1")
        task, env = sac.TASKS[args.env_id], sac.Env(args)
        model = sac.load_model(task)
        return Task(
            partial(sac.Env, args),
            model,
            model,
            1,
            lambda qpos, qvel: np.zeros(len(qpos), bool),
            scale=task.max_torque,
            gymnasium_id="Pendulum-v1",
        )
    args, robot = unitree.Args(robot=name), unitree.ROBOTS[name]
    dt, default = unitree.CONTROL_DT / args.decimation, unitree.make_controller(robot)[0]
    load = partial(unitree.load_model, robot, dt, visuals=False)
    return Task(
        partial(unitree.Env, args),
        load(),
        servo(load(), robot),
        args.decimation,
        lambda qpos, _: unitree.has_fallen(robot, qpos, np),
        to_ctrl=lambda action: default + robot.action_scale * action,
    )


def draw_actions(task: Task, *shape: int) -> np.ndarray:
    random = np.random.default_rng(len(shape))
    return task.scale * random.uniform(-1, 1, (*shape, task.c_model.nu)).astype(np.float32)


def warm_up(task: Task, env, seed: int):
    """States of POOL worlds amid random actions, and the same for C MuJoCo."""
    state = jax.jit(jax.vmap(ppo.kernel(env.reset)))(jax.random.split(jax.random.key(seed), POOL))
    start = {
        name: np.array(value, float)
        for name, value in vars(state.data).items()
        if value is not None
    }
    batch = mujoco.batch.Batch(task.c_model, nsim=POOL, nthread=common.count_cores())
    reset = np.full(POOL, True)
    for action in draw_actions(task, WARM_UP, POOL):
        for name, values in start.items():
            getattr(batch, name)[reset] = values[reset]
        batch.ctrl[:] = task.to_ctrl(action)
        batch.step(nstep=task.substeps)
        reset = task.over(batch.qpos, batch.qvel)
    data = {name: np.where(reset[:, None], start[name], getattr(batch, name)) for name in start}
    return state.replace(
        data=type(state.data)(**{k: jnp.asarray(v, jnp.float32) for k, v in data.items()})
    ), data


class Turns:
    """Calls of a program that fill a turn, and how busy the machine was in it."""

    def __init__(self, call: Callable, seconds: float):
        # The first load and record programs; CUDA graphs are built by the second.
        for _ in range(3):
            start = time.perf_counter()
            call()
        self.call, self.calls = call, max(1, round(seconds / (time.perf_counter() - start)))
        self.spans, self.cpu = [], []

    def __call__(self) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(self.calls):
            self.call()
        self.spans.append((start, time.perf_counter()))
        self.cpu.append(
            (time.process_time() - cpu) / (self.spans[-1][1] - start) / common.count_cores()
        )


@contextlib.contextmanager
def sample_gpus():
    """(time, percent) of all GPUs every 0.1 s, in a list that a thread fills; it stays empty where there are none."""
    samples = []
    if shutil.which("nvidia-smi") is None or jax.default_backend() != "gpu":
        yield samples
        return
    query = "nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits -lms 100".split()
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as process:

        def read():
            for line in process.stdout:
                if line.strip().isdigit():  # a part of a GPU has no such number
                    samples.append((time.perf_counter(), int(line)))

        threading.Thread(target=read, daemon=True).start()
        try:
            yield samples
        finally:
            process.terminate()


def warp_is_missing() -> str | None:
    """Why MJX-Warp cannot run."""
    if jax.default_backend() != "gpu":
        return "no CUDA device"
    return None if ppo.mjx.warp.WARP_INSTALLED else "warp-lang is not installed"


def warp_env(task: Task, num_envs: int):
    """The environment on MJX-Warp, with room for all contacts and rows that MJX has."""
    env = task.env()
    contacts, rows = (
        max(1, len(x)) for x in (env.template._impl.contact.dist, env.template._impl.efc_J)
    )
    # MuJoCo Warp's kernels print whenever the solver stops at its last iteration.
    env.model = ppo.mjx.put_model(task.model, impl="warp").tree_replace(
        {"opt._impl.warn_overflow": 0}
    )
    env.template = ppo.mjx.make_data(
        task.model,
        impl="warp",
        naconmax=num_envs * contacts,
        naccdmax=num_envs * contacts,
        njmax=rows,
    )
    return env


def env_call(env_step: Callable, state, actions: np.ndarray):
    """A call of an arm whose env_step is one world's, and what compiling it took."""
    mesh = common.make_mesh(None, len(actions[0]))

    def run(state, actions):
        def step(state, action):
            return jax.vmap(env_step)(state, action), None

        return jax.lax.scan(step, state, actions.swapaxes(0, 1))[0]

    call, seconds, compiled = common.compile_sharded(
        mesh, run, state, jnp.asarray(actions.swapaxes(0, 1))
    )
    memory = compiled.memory_analysis()
    used = None if memory is None else memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return call, {"devices": mesh.size, "compile_s": seconds, "bytes_of_a_device": used}


def c_call(task: Task, threads: int, data: dict, controls: np.ndarray):
    batch = mujoco.batch.Batch(task.c_model, nsim=len(controls[0]), nthread=threads)

    def call():
        for name, values in data.items():
            getattr(batch, name)[:] = values
        for control in controls:
            batch.ctrl[:] = control
            batch.step(nstep=task.substeps)

    return call, {"threads": threads}


def gymnasium_call(
    task: Task, mode: str, actions: np.ndarray, seed: int, stack: contextlib.ExitStack
):
    # Children of a server without JAX's threads; those do not survive a fork.
    kwargs = {"context": "forkserver"} if mode == "async" else {}
    envs = gymnasium.make_vec(
        task.gymnasium_id, len(actions[0]), vectorization_mode=mode, vector_kwargs=kwargs
    )
    stack.callback(envs.close)
    envs.reset(seed=seed)
    for action in draw_actions(task, WARM_UP, len(actions[0])):
        envs.step(action)

    def call():
        for action in actions:
            envs.step(action)

    return call, {}


def measure(
    args: Args, task: Task, pool, num_envs: int, steps: int, rates: dict
) -> dict[str, dict]:
    """All arms with so many worlds; rates: environment steps/s with fewer worlds, by arm."""
    index, cores = np.arange(num_envs) % POOL, common.count_cores()
    state = jax.tree.map(lambda x: x[index], pool[0])
    data = {name: x[index] for name, x in pool[1].items()}
    actions = draw_actions(task, steps, num_envs)
    stack, controls = contextlib.ExitStack(), task.to_ctrl(actions)
    no_gymnasium = None if task.gymnasium_id else "it has no such task"
    if num_envs > args.gymnasium_num_envs:
        no_gymnasium = "more than --gymnasium-num-envs"
    arms = {
        OURS: (None, lambda: env_call(ppo.kernel(task.env().step), state, actions)),
        WARP: (warp_is_missing(), lambda: env_call(warp_env(task, num_envs).step, state, actions)),
        C: (None, lambda: c_call(task, cores, data, controls)),
        C_ONE: (None, lambda: c_call(task, 1, data, controls)),
    } | {
        f"Gymnasium, {mode}": (
            no_gymnasium,
            partial(gymnasium_call, task, mode, actions, args.seed, stack),
        )
        for mode in ("sync", "async")
    }
    rows, turns = {}, {}
    with stack, sample_gpus() as samples:
        for arm, (reason, build) in arms.items():
            expected = num_envs * steps / rates.get(arm, np.inf)
            if arm != OURS and expected > (4 if arm == C else 2) * args.turn_seconds:
                reason = reason or f"a call of {steps} steps would take {expected:.2g} s"
            if reason:
                rows[arm] = {"skipped": reason}
                continue
            try:
                call, rows[arm] = build()
                turns[arm] = Turns(call, args.min_seconds)
            except Exception as error:  # the other arms are still of use; main tells and fails
                text = str(error)
                full = (
                    isinstance(error, MemoryError)
                    or "RESOURCE_EXHAUSTED" in text
                    or "out of memory" in text.lower()
                )
                rows[arm] = (
                    {"out_of_memory": text[:500]} if full else {"failed": traceback.format_exc()}
                )
        seconds = common.take_turns(turns, args.repeats, warmups=0)
    for arm, values in seconds.items():
        calls = [value / turns[arm].calls for value in values]
        rate = num_envs * steps / statistics.median(calls)
        busy = [
            value
            for moment, value in samples
            for start, end in turns[arm].spans
            if start + 0.2 < moment < end
        ]
        rows[arm] |= {
            "env_steps_per_s": rate, "physics_steps_per_s": rate * task.substeps, "call_s": calls,
            "cpu_percent": None if "async" in arm else 100 * statistics.median(turns[arm].cpu),
            "gpu_percent": statistics.mean(busy) if busy else None,
        }  # fmt: skip
        if C in seconds:
            rows[arm]["speed / C"] = common.ratio(
                [value / turns[C].calls for value in seconds[C]], calls
            )
    return rows


def c_rates(task: Task, data: dict) -> dict[str, float]:
    """Environment steps/s of the C arms by one short call, so that none is begun that would take minutes."""
    cores, controls = common.count_cores(), task.to_ctrl(draw_actions(task, 2, POOL))
    return {
        arm: controls[..., 0].size
        / min(common.take_turns({"": c_call(task, threads, data, controls)[0]}, 2)[""])
        for arm, threads in ((C, cores), (C_ONE, 1))
    }


def find_crossing(ratios: dict[int, float]) -> dict:
    """The smallest number of worlds with which ours is faster than C MuJoCo, and the best ratio."""
    best = max(ratios, key=ratios.get, default=None)
    return {
        "from": next((n for n, value in sorted(ratios.items()) if value > 1), None),
        "best_ratio": ratios.get(best),
        "best_num_envs": best,
    }


def main(args: Args) -> None:
    if args.smoke:
        common.hardly_optimise()
        args = dataclasses.replace(args, tasks=("g1", "Pendulum"), num_envs=(4,), steps=2, repeats=1,
                                   min_seconds=0.05)  # fmt: skip
    common.refuse_fallbacks()
    common.make_mesh()  # starts JAX with all cores
    if not args.compile_cache:
        common.keep_nothing_compiled()
    result, crossings, failed = {}, {}, []
    for name in args.tasks:
        task, printed, result[name] = make_task(name), [], {}
        pool = warm_up(task, task.env(), args.seed)
        rates = c_rates(task, pool[1])
        for num_envs in sorted(args.num_envs):
            steps = args.steps
            if OURS in rates:
                steps = min(steps, max(2, int(args.turn_seconds * rates[OURS] / num_envs)))
            rows = measure(args, task, pool, num_envs, steps, rates)
            result[name][num_envs] = {"steps": steps, "arms": rows}
            stats = jax.devices()[0].memory_stats()
            result[name][num_envs]["peak_bytes_so_far"] = stats and stats.get("peak_bytes_in_use")
            for arm, row in rows.items():
                if "env_steps_per_s" in row and num_envs >= FULL:
                    rates[arm] = row["env_steps_per_s"]
                if "failed" in row:
                    failed.append(f"{name}, {num_envs} worlds, {arm}:\n{row['failed']}")
                note = next(
                    (
                        f"{key.replace('_', ' ')}: {row[key].strip().splitlines()[-1][:60]}"
                        for key in ("skipped", "out_of_memory", "failed")
                        if key in row
                    ),
                    "",
                )
                printed.append([num_envs, arm, *(row.get(column) for column in COLUMNS), note])
            jax.clear_caches()
            print(f"{name}, {num_envs} worlds: done", flush=True)
            # Should it be cut.
            common.write(args.name, args, {"failed": failed, "results": result}, args.smoke)
        print(f"\n{name}\n")
        common.table(["worlds", "arm", *COLUMNS.values(), ""], printed)
        crossings[name] = {}
        for reference in (C, C_ONE):
            ratios = {
                n: common.ratio(row["arms"][reference]["call_s"], row["arms"][OURS]["call_s"])
                for n, row in result[name].items()
                if all("call_s" in row["arms"][x] for x in (reference, OURS))
            }
            crossings[name][reference] = told = find_crossing(ratios)
            start = f"first with {told['from']} worlds" if told["from"] else "nowhere"
            if told["best_num_envs"]:
                print(
                    f"{OURS} overtakes {reference}: {start}; {told['best_ratio']:.2f} of its speed at best, "
                    f"with {told['best_num_envs']} worlds",
                    flush=True,
                )
        common.write(
            args.name,
            args,
            {"crossings": crossings, "failed": failed, "results": result},
            args.smoke,
        )
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
