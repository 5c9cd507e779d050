"""Is a scan of MJX slow? HalfCheetah's environment step and training iteration, looped over in other ways.

    python benchmarks/scan_arms.py

Each arm takes all worlds equally far from the same state with the same actions. Ours is what ppo_mjx.py does: a
lax.scan over environment steps that carries the minimal state, with loops in it (5 physics steps, the solver's Newton
iterations and, but for a GPU, its line search). The others:
- a loop in Python over the compiled step, with the minimal state and with full mjx.Data: no scan around the step;
- a scan that carries full mjx.Data, and the same with its state donated;
- the scan unrolled by some steps, as a fori_loop, and as one whose trip count the compiler does not know;
- fewer loops inside: the physics steps unrolled; Newton's iterations and the line search unrolled; one Newton
  iteration (other physics, less work); one with line search and physics steps unrolled, so that no loop is left in a
  step (but that in which a CPU solves for 32 worlds at a time);
- on a CUDA device: ours without command buffers (CUDA graphs), with loops in them, and with others of their sizes.
The training iteration: ours is one program with donated state; its rollout's scan unrolled; and the rollout as one
dispatch for each step of the worlds, followed by one program with advantages and update.

The first six calls of each arm are kept, as command buffers are built by the second one; samples are taken later, in
turn. "/ ours" is the speed over that of ours, the median over turns: an arm above 1 is faster than ours.
Writes benchmarks/results/NAME.json. Compiling is timed without a compile cache.
"""

import contextlib
import dataclasses
import statistics
import time
import traceback
from functools import partial
from unittest import mock

import common
import jax
import jax.numpy as jnp
import tyro
from jax.sharding import NamedSharding, PartitionSpec as P

import ppo_mjx as ppo

OURS, FULL_SCAN, FULL_LOOP = "scan, minimal state (ours)", "scan, full Data", "Python loop, full Data"
TRAIN = "training iteration (ours)"
BUFFERS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION"  # XLA's own choice
CUDA_OPTIONS = {
    "no command buffers": {"xla_gpu_enable_command_buffer": ""},
    "loops in command buffers": {"xla_gpu_enable_command_buffer": f"{BUFFERS},WHILE"},
    "command buffers from 1 kernel on": {"xla_gpu_graph_min_graph_size": 1},
    "command buffers from 20 kernels on": {"xla_gpu_graph_min_graph_size": 20},
}
SCAN = jax.lax.scan
SMOKE = OURS, FULL_LOOP, "Newton unrolled", *CUDA_OPTIONS


@dataclasses.dataclass
class Args:
    num_envs: int = 256
    steps: int = 16  # environment steps of a call; as many as in a rollout of ppo_mjx.py
    unroll: tuple[int, ...] = (2, 4)  # environment steps in one turn of an unrolled scan
    min_seconds: float = 0.3  # of one sample
    repeats: int = 9
    arms: tuple[str, ...] | None = None  # names of the arms, ours first; by default all of them
    train: bool = True  # time the training iteration as well
    compile_cache: bool = False  # keep compiled programs, for the next start: then their seconds tell nothing
    seed: int = 1
    name: str = "scan_arms"  # of the JSON file
    smoke: bool = False  # one short round of an arm of each kind, on less physics, hardly optimised by the compiler


def shrink(*args, load=ppo.load_model):
    """What compiles sooner, for the smoke test."""
    model = load(*args)
    model.opt.iterations, model.opt.ls_iterations = 2, 2
    model.opt.disableflags |= ppo.mujoco.mjtDisableBit.mjDSBL_CONTACT
    return model


class FullDataEnv(ppo.Env):
    """Keeps all of mjx.Data between its steps."""

    def advance(self, data, action):
        def substep(data, _):
            return ppo.mjx.step(self.model, data.replace(ctrl=action)), None
        data = jax.lax.scan(substep, data, None, length=self.task.frame_skip)[0]
        return data, data.qpos[0], {}


def make_env(iterations: int | None = None) -> ppo.Env:
    """HalfCheetah with so many Newton iterations, or with the script's."""
    env = ppo.Env("HalfCheetah")
    if iterations:
        env.model = env.model.replace(opt=env.model.opt.replace(iterations=iterations))
    return env


def unroll_scans(length: int, unroll: int):
    """Unroll the scans of this length that are traced meanwhile."""
    def scan(f, init, xs=None, length=None, **rest):
        return SCAN(f, init, xs, length, **(rest | {"unroll": unroll} if length == wanted else rest))
    wanted = length
    return mock.patch.object(jax.lax, "scan", scan)


def unroll_newton():
    """Unroll the solver's loops; there are no others but the scans in an environment step."""
    def fori_loop(low, high, body, carry, **_):
        for i in range(low, high):
            carry = body(i, carry)
        return carry
    return mock.patch.object(jax.lax, "fori_loop", fori_loop)


def compile_on(mesh, function, *operands, donate=(), options=None):
    """The compiled program over the mesh and the seconds of it."""
    start = time.perf_counter()
    run = jax.shard_map(function, mesh=mesh, in_specs=P("devices"), out_specs=P("devices"), check_vma=False)
    # Told, as XLA gives back arrays without entries on all devices, which the next call would refuse.
    shards = NamedSharding(mesh, P("devices"))
    lowered = jax.jit(run, donate_argnums=donate, out_shardings=shards).lower(*operands)
    return lowered.compile(compiler_options=options), time.perf_counter() - start


def scan_steps(env: ppo.Env, unroll: int, state, actions):
    def step(state, action):
        return jax.vmap(env.step)(state, action), None
    return SCAN(step, state, actions.swapaxes(0, 1), unroll=unroll)[0]


def count_steps(env: ppo.Env, trips: int | None, state, actions, count):
    """A loop by a counter; trips: None if the compiler is not to know of how many turns, which `count` [N] holds."""
    def step(i, state):
        return jax.vmap(env.step)(state, actions[:, i])
    return jax.lax.fori_loop(0, count[0] if trips is None else trips, step, state)


def step_arms(args: Args, mesh):
    """Builders of the arms of the environment step: name -> function that returns a call and compile seconds."""
    env, full = make_env(), FullDataEnv("HalfCheetah")
    place = partial(jax.device_put, device=NamedSharding(mesh, P("devices")))
    state = place(jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(args.seed), args.num_envs)))
    shape = (args.num_envs, args.steps, env.action_size)
    actions = place(jax.random.uniform(jax.random.key(args.seed + 1), shape, minval=-1.0, maxval=1.0))
    count = place(jnp.full(args.num_envs, args.steps))

    def widen(state):
        return state.replace(data=jax.vmap(lambda data: full.template.replace(**vars(data)))(state.data))
    full_state = jax.jit(widen, out_shardings=NamedSharding(mesh, P("devices")))(state)

    def program(function, *operands, patch=contextlib.nullcontext, options=None):
        with patch():
            compiled, seconds = compile_on(mesh, function, *operands, options=options)
        return lambda: jax.block_until_ready(compiled(*operands)), seconds

    def python_loop(env, start):
        first, *_ = rows = [place(actions[:, i]) for i in range(args.steps)]
        compiled, seconds = compile_on(mesh, jax.vmap(env.step), start, first)

        def call():
            state = start
            for row in rows:
                state = compiled(state, row)
            jax.block_until_ready(state)
        return call, seconds

    def donated():
        """As all programs that train run: the state goes on, in the same memory."""
        compiled, seconds = compile_on(mesh, partial(scan_steps, full, 1), full_state, actions, donate=0)
        holder = [place(jax.tree.map(jnp.copy, full_state))]

        def call():
            holder[0] = jax.block_until_ready(compiled(holder[0], actions))
        return call, seconds

    def ours(env=env, unroll=1, **how):
        return program(partial(scan_steps, env, unroll), state, actions, **how)

    def loopless():
        with unroll_newton():
            return ours(make_env(1), patch=substeps)

    substeps, operands = partial(unroll_scans, env.task.frame_skip, env.task.frame_skip), (state, actions, count)
    arms = {
        OURS: ours, "Python loop, minimal state": lambda: python_loop(env, state),
        FULL_LOOP: lambda: python_loop(full, full_state),
        FULL_SCAN: lambda: program(partial(scan_steps, full, 1), full_state, actions),
        "scan, full Data, donated": donated,
    } | {f"scan unrolled by {k}": partial(ours, unroll=k) for k in args.unroll} | {
        "fori_loop": lambda: program(partial(count_steps, env, args.steps), *operands),
        "loop of unknown length": lambda: program(partial(count_steps, env, None), *operands),
        "physics steps unrolled": lambda: ours(patch=substeps),
        "Newton unrolled": lambda: ours(patch=unroll_newton),
        "1 Newton iteration": lambda: ours(make_env(1)),
        "1 Newton iteration, no loop in a step": loopless,
    }  # fmt: skip
    arms |= {name: partial(ours, options=options) for name, options in CUDA_OPTIONS.items()}
    return {name: arms[name] for name in args.arms or (SMOKE if args.smoke else arms)}


def train_arms(args: Args, mesh):
    """Builders of the arms of the training iteration."""
    config, env = ppo.Args(num_envs=args.num_envs, num_steps=args.steps, seed=args.seed), make_env()
    shardings = jax.tree.map(partial(NamedSharding, mesh), ppo.STATE_SPEC)
    init = jax.jit(ppo.init_train_state, static_argnames=("args", "env"), out_shardings=shardings)

    def one_program(patch=contextlib.nullcontext):
        state, start = init(config, env, jax.random.key(args.seed)), time.perf_counter()
        with patch():
            ppo.train_iteration.clear_cache()  # else it keeps the trace of another arm
            compiled = ppo.train_iteration.lower(config, env, mesh, state).compile()
        seconds, holder = time.perf_counter() - start, [state]

        def call():
            holder[0], _ = jax.block_until_ready(compiled(holder[0]))
        return call, seconds

    def dispatched():
        state, start = init(config, env, jax.random.key(args.seed)), time.perf_counter()
        one = dataclasses.replace(config, num_steps=1)

        def interact(state):
            worlds, row = ppo.rollout(one, env, state.learner, state.worlds)
            return state.replace(worlds=worlds), row

        def update(state, rows):
            transitions = jax.tree.map(lambda *x: jnp.concatenate(x), *rows)
            with mock.patch.object(ppo, "rollout", lambda *_: (state.worlds, transitions)):
                return ppo.device_iteration(config, env, state)

        def build(function, in_specs, out_specs, *operands):
            run = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
            return jax.jit(run, donate_argnums=0).lower(*operands).compile()
        rows = P(None, "devices")  # [T, N, ...]
        step = build(interact, (ppo.STATE_SPEC,), (ppo.STATE_SPEC, rows), state)
        shapes = jax.eval_shape(jax.shard_map(interact, mesh=mesh, in_specs=(ppo.STATE_SPEC,), out_specs=(
            ppo.STATE_SPEC, rows), check_vma=False), state)[1]
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, rows)), shapes)
        learn = build(
            update, (ppo.STATE_SPEC, rows), (ppo.STATE_SPEC, P(), P("devices")), state, [shapes] * args.steps)
        seconds, holder = time.perf_counter() - start, [state]

        def call():
            transitions = [None] * args.steps
            for i in range(args.steps):
                holder[0], transitions[i] = step(holder[0])
            holder[0], *_ = jax.block_until_ready(learn(holder[0], transitions))
        return call, seconds

    return {TRAIN: one_program, "its rollout dispatched step by step": dispatched} | {
        f"its rollout's scan unrolled by {k}": partial(one_program, partial(unroll_scans, args.steps, k))
        for k in args.unroll}


def measure(args: Args, builders: dict, reference: str) -> dict[str, dict]:
    """Time all arms that can be built; an arm that fails has the traceback instead."""
    rows, programs = {}, {}
    for name, build in builders.items():
        if name in CUDA_OPTIONS and jax.default_backend() != "gpu":
            rows[name] = {"skipped": "no CUDA device"}
            continue
        try:
            call, seconds = build()
            first = [value for values in common.take_turns({name: call}, 6, warmups=0).values() for value in values]
        except Exception:
            rows[name] = {"failed": traceback.format_exc()}
            continue
        calls = max(1, round(args.min_seconds / min(first)))
        programs[name] = lambda call=call, calls=calls: [call() for _ in range(calls)]
        rows[name] = {"compile_s": seconds, "first_calls_s": first, "calls": calls}
        print(f"{name}: compiled in {seconds:.1f} s", flush=True)
    seconds = common.take_turns(programs, args.repeats)
    for name, values in seconds.items():
        rows[name]["call_s"] = [value / rows[name]["calls"] for value in values]
        rows[name]["env_steps_per_s"] = args.num_envs * args.steps / statistics.median(rows[name]["call_s"])
    for name in seconds:
        if reference in seconds:
            rows[name]["speed / ours"] = common.ratio(rows[reference]["call_s"], rows[name]["call_s"])
    print()
    common.table(["arm", "env steps/s", "/ ours", "compile s", "1st call s", "2nd", "6th", ""], [
        [name, row.get("env_steps_per_s"), row.get("speed / ours"), row.get("compile_s"),
         *(row["first_calls_s"][i] if "call_s" in row else None for i in (0, 1, 5)),
         row.get("skipped") or ("failed" if "failed" in row else "")] for name, row in rows.items()])
    print()
    return rows


def main(args: Args) -> None:
    if args.smoke:
        common.hardly_optimise()
        args = dataclasses.replace(args, num_envs=16, steps=4, unroll=(), repeats=1, min_seconds=0.01)
        mock.patch.object(ppo, "load_model", shrink).start()
        mock.patch.dict(ppo.TASKS, HalfCheetah=dataclasses.replace(ppo.TASKS["HalfCheetah"], frame_skip=2)).start()
    common.make_mesh()  # starts JAX with all cores
    jax.config.update("jax_enable_compilation_cache", args.compile_cache)
    parts = (args.num_envs, args.num_envs * args.steps // ppo.Args.num_minibatches)
    mesh = common.make_mesh(None, *parts)
    result = {"devices_in_use": mesh.size, "step": measure(args, step_arms(args, mesh), OURS)}
    jax.clear_caches()
    full = [result["step"].get(name, {}).get("call_s") for name in (FULL_SCAN, FULL_LOOP)]
    if all(full):
        result["scan / Python loop, seconds, full Data"] = slower = common.ratio(*full)
        print(f"With full Data the scan takes {slower:.2f} of the Python loop's time.\n", flush=True)
    if args.train:
        result["train"] = measure(args, train_arms(args, mesh), TRAIN)
    common.write(args.name, args, result, args.smoke)
    failed = [row["failed"] for part in ("step", "train") for row in result.get(part, {}).values() if "failed" in row]
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
