"""What options of the compiler, and loops written out, do for the speed of a training iteration on a GPU.

    python benchmarks/xla_options.py --num-envs 2048
    python benchmarks/xla_options.py --task g1 --num-envs 2048

One training iteration of ppo_mjx.py (or of the G1's script) is compiled in every way, several at once, and then timed
in turn; "/ as it is" is the speed over that of the script's own program, the median over the turns. XLA runs a loop of
known length on a GPU as kernels that the host sends one by one, or in command buffers (CUDA graphs): `--arms` lists
what is tried. Writes benchmarks/results/NAME.json.
"""

import contextlib
import dataclasses
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal
from unittest import mock

import common
import jax
import tyro
from jax.sharding import NamedSharding

import ppo_mjx as ppo
import ppo_mjx_unitree as unitree

OURS = "as it is"
BUFFERS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION"  # XLA's own choice
SMALL, LOOPS = {"xla_gpu_graph_min_graph_size": 1}, {"xla_gpu_enable_command_buffer": f"{BUFFERS},WHILE"}
LOOP, SOLVER, ROTATE = "line search as a loop", "solver unrolled", "MJX's own rotate"
ARMS = {  # what of the physics is written in another way, options of the compiler
    OURS: (None, {}),
    LOOP: (LOOP, {}),
    SOLVER: (SOLVER, {}),
    ROTATE: (ROTATE, {}),
    "no command buffers": (None, {"xla_gpu_enable_command_buffer": ""}),
    "command buffers from 1 kernel on": (None, SMALL),
    "loops in command buffers": (None, LOOPS),
    "loops in command buffers, from 1 kernel on": (None, SMALL | LOOPS),
}


@dataclasses.dataclass
class Args:
    task: Literal["HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid", "g1"] = "HalfCheetah"
    num_envs: int = 256
    num_steps: int = 16
    arms: tuple[str, ...] = tuple(ARMS)  # ours first
    threads: int = common.count_cores()  # programs that are compiled at once
    iterations: int = 5  # of a turn
    repeats: int = 5
    seed: int = 1
    name: str = "xla_options"  # of the JSON file
    smoke: bool = False


def rewrite(script, form: str | None):
    """Write the loops of the script's solver that are traced meanwhile in another way, or how vectors are turned."""
    if form == ROTATE:
        return mock.patch.object(script, "rotate", script.mjx_math.rotate)
    loop = jax.lax.fori_loop

    def fori_loop(low, high, body, carry, **_):
        if form == LOOP:
            return loop(low, high, body, carry)
        for i in range(low, high):
            carry = body(i, carry)
        return carry
    return mock.patch.object(script.jax.lax, "fori_loop", fori_loop) if form else contextlib.nullcontext()


def main(args: Args) -> None:
    if args.smoke:
        args = dataclasses.replace(args, task="Hopper", num_envs=16, num_steps=4, arms=(OURS, SOLVER), iterations=1,
                                   repeats=1)  # fmt: skip
    gpu, script = jax.default_backend() == "gpu", unitree if args.task == "g1" else ppo
    which = {"robot": "g1"} if args.task == "g1" else {"env_id": args.task}
    config = script.Args(**which, num_envs=args.num_envs, num_steps=args.num_steps, seed=args.seed)
    env = script.Env(config) if args.task == "g1" else script.Env(args.task)
    mesh = script.make_mesh(1, args.num_envs, config.steps_per_iteration // config.num_minibatches)
    shardings = jax.tree.map(partial(NamedSharding, mesh), script.STATE_SPEC)
    init = jax.jit(script.init_train_state, static_argnames=("args", "env"), out_shardings=shardings)
    states, lowered = {}, {}
    arms = [arm for arm in args.arms if gpu or not ARMS[arm][1]]
    for arm in arms:
        states[arm], form = init(config, env, jax.random.key(args.seed)), ARMS[arm][0]
        if form not in lowered:
            with rewrite(script, form):
                script.train_iteration.clear_cache()  # else it keeps the trace of another form
                lowered[form] = script.train_iteration.lower(config, env, mesh, states[arm])

    def build(arm):
        form, options = ARMS[arm]
        start = time.perf_counter()
        return lowered[form].compile(compiler_options=options), time.perf_counter() - start

    with ThreadPoolExecutor(args.threads) as pool:
        built = dict(zip(arms, pool.map(build, arms), strict=True))
    rows = {arm: {"compile_s, beside the others": seconds} for arm, (_, seconds) in built.items()}

    def train(arm):
        for _ in range(args.iterations):
            states[arm], _ = built[arm][0](states[arm])
        jax.block_until_ready(states[arm])

    seconds = common.take_turns({arm: partial(train, arm) for arm in arms}, args.repeats, warmups=2)
    for arm, times in seconds.items():
        rate = args.iterations * config.steps_per_iteration / statistics.median(times)
        rows[arm] |= {"turn_s": times, "env_steps_per_s": rate, "speed / ours": common.ratio(seconds[arms[0]], times)}
    common.table(["arm", "env steps/s", f"/ {arms[0]}", "compile s, beside the others"], [
        [arm, row["env_steps_per_s"], row["speed / ours"], row["compile_s, beside the others"]]
        for arm, row in rows.items()])  # fmt: skip
    common.write(args.name, args, {"arms": rows}, args.smoke)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
