"""The port's acceptance, in four modes; a table of checks, and exit code 1 if one of them fails.

    python benchmarks/validate.py                        all of it, minutes on two cores
    python benchmarks/validate.py --modes jit            one of the modes; --smoke: in two minutes or three

smoke: `--smoke` of each script, PPO's for each task, ends with exit code 0. equivalence: one environment step of MJX
and of ppo_mjx.CMujocoEnv, from the states of Gymnasium's own random episodes with the same actions; then PPO with MJX's
rollouts against the same PPO with C MuJoCo's (stepped by mujoco.batch in a Python loop; networks, advantages and update
are ppo_mjx.device_iteration's): the reward's scale under the untrained policy, and the learning curves. performance:
steps/s of both, in turn (MJX has to be the faster one), and how much of the time is `env.step` (training_speed.py has
more). jit: the traced program does not grow with the sizes, is compiled once, keeps off the host; gradients of a run
are finite and bounded.
Writes benchmarks/results/NAME.json, or of some modes NAME_MODES.json, with the raw curves.
"""

import dataclasses
import math
import subprocess
import sys
import time
from functools import partial
from typing import Literal
from unittest import mock

import common
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax._src.core import jaxprs_in_params  # JAX moved the public name in 0.11
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mujoco.batch import Batch

import ppo_mjx as ppo

Mode = Literal["smoke", "equivalence", "performance", "jit"]
# Errors of one step, about five times those seen on a CPU: of the observation (median, then 99% of the states below;
# in an instant of impact the solvers' last digits decide), of the reward (the same two), then how near its threshold
# a state is whose termination may differ.
BOUNDS = {
    "HalfCheetah": (3e-5, 1e-3, 2e-6, 2e-5, 1e-5),
    "Hopper": (2e-6, 2e-5, 5e-7, 1e-5, 1e-5),
    "Walker2d": (7e-5, 5e-4, 3e-6, 2e-5, 1e-5),
}
HOST_PRIMITIVES = ("callback", "infeed", "outfeed", "debug_print")  # as parts of their names
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


EnvId = Literal["HalfCheetah", "Hopper", "Walker2d"]


@dataclasses.dataclass
class Args:
    modes: tuple[Mode, ...] = ("smoke", "equivalence", "performance", "jit")  # what to check
    env_ids: tuple[EnvId, ...] = ("HalfCheetah", "Hopper", "Walker2d")  # tasks
    seeds: tuple[int, ...] = (1, 2, 3)  # trainings of each kind of rollout, for each task
    timesteps: int = 300_000  # steps of each training
    num_envs: int = 64  # worlds of these trainings; few, so that whole episodes end early
    num_steps: int = 64  # steps of each world in one of their rollouts
    states: int = 1000  # from which one step is compared
    repeats: int = 10  # turns of the timing
    name: str = "validate"  # of the JSON file, before the modes
    smoke: bool = False  # the short version of all


class Checks(list):
    """Rows of the table: name, measured, bound, pass or FAIL. A row without a bound only tells."""

    def add(self, name: str, measured, bound: str = "", passed: bool | None = None) -> None:
        measured = f"{measured:.3g}" if isinstance(measured, float) else str(measured)
        verdict = "" if passed is None else "pass" if passed else "FAIL"
        self.append({"name": name, "measured": measured, "bound": bound, "verdict": verdict})
        print(f"{verdict:4}  {name}: {measured}  {bound}", flush=True)

    def below(self, name: str, measured: float, bound: float) -> None:
        self.add(name, float(measured), f"<= {bound:.3g}", bool(measured <= bound))  # NaN fails


# ---- The same PPO with two kinds of rollout -------------------------------------------------------------------------
def init(args: ppo.Args, env: ppo.Env, mesh: Mesh, seed: int) -> ppo.TrainState:
    shardings = jax.tree.map(partial(NamedSharding, mesh), ppo.STATE_SPEC)
    start = jax.jit(ppo.init_train_state, static_argnames=("args", "env"), out_shardings=shardings)
    return start(args, env, jax.random.key(seed))


class MJX:
    """The script's own iteration."""

    def __init__(self, args: ppo.Args, env: ppo.Env, mesh: Mesh, seed: int):
        self.state = init(args, env, mesh, seed)
        self.program = partial(ppo.train_iteration, args, env, mesh)

    def iterate(self) -> dict:
        self.state, metrics = self.program(self.state)
        metrics.pop("black_box")
        return jax.device_get(metrics)


@partial(jax.jit, static_argnames=("args", "env"))
def sample(
    args: ppo.Args,
    env: ppo.Env,
    params: dict,
    obs_stats: ppo.RunningStats,
    obs: jax.Array,
    key: jax.Array,
):
    """Actions [N, A] of the policy and their log densities [N]."""
    mean = ppo.make_networks(args, env)[0].apply(params["actor"], ppo.normalize(obs_stats, obs))
    policy = ppo.Gaussian(mean, params["log_std"])
    action = policy.sample(jax.random.split(key, len(mean)))
    return action, policy.log_prob(action)


@partial(jax.jit, static_argnames=("args", "env", "mesh"))
def learn(
    args: ppo.Args,
    env: ppo.Env,
    mesh: Mesh,
    learner: ppo.Learner,
    worlds: ppo.Worlds,
    steps: ppo.Transition,
):
    """The script's iteration with a rollout that is there already."""

    def run(learner, worlds, steps):
        with mock.patch.object(ppo, "rollout", lambda *_: (worlds, steps)):
            state, metrics, _ = ppo.device_iteration(args, env, ppo.TrainState(learner, worlds))
        return state.learner, metrics

    specs = (P(), P("devices"), P(None, "devices"))
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(
        learner, worlds, steps
    )


class CMujoco:
    """The script's iteration with rollouts in C MuJoCo, all cores."""

    def __init__(self, args: ppo.Args, env: ppo.Env, mesh: Mesh, seed: int):
        self.args, self.env, self.mesh, self.task = args, env, mesh, env.task
        state = init(args, env, mesh, seed)
        self.learner, self.elapsed = state.learner, np.array(state.worlds.env_state.info["elapsed"])
        self.batch = Batch(
            ppo.load_model(env.task), nsim=args.num_envs, nthread=common.count_cores()
        )
        self.key, self.draws = jax.random.key(seed), 0
        self.qpos, self.qvel, self.warmstart, self.ctrl = map(
            self.batch.bind, ("qpos", "qvel", "qacc_warmstart", "ctrl"))  # fmt: skip
        self.discounted, self.total, self.length = np.zeros((3, args.num_envs), np.float32)
        self.starts = jax.jit(
            lambda key: jax.vmap(ppo.kernel(env.reset))(jax.random.split(key, args.num_envs)).data
        )
        self.reset(np.full(args.num_envs, True))

    def draw(self) -> jax.Array:
        self.draws += 1
        return jax.random.fold_in(self.key, self.draws)

    def now(self) -> ppo.Snapshot:
        return ppo.Snapshot(self.qpos, self.qvel, self.qpos[:, 0], {})

    def observe(self) -> np.ndarray:
        return self.task.observe(self.now(), np).astype(np.float32)

    def reset(self, done: np.ndarray) -> None:
        start = jax.device_get(self.starts(self.draw()))
        self.qpos[done] = start.qpos[done]
        self.qvel[done] = start.qvel[done]
        self.warmstart[done] = 0

    def rollout(self) -> tuple[ppo.Worlds, ppo.Transition]:
        """What ppo.rollout returns, without the fields that the update does not read."""
        acting = jax.device_put(
            (self.learner.params, self.learner.obs_stats), jax.local_devices()[0]
        )
        records, no = [], np.full(self.args.num_envs, False)
        for _ in range(self.args.num_steps):
            obs, x = self.observe(), self.qpos[:, 0].copy()
            action, logprob = jax.device_get(sample(self.args, self.env, *acting, obs, self.draw()))
            clipped = self.ctrl[:] = np.clip(action, -1, 1)
            self.batch.step(nstep=self.task.frame_skip)
            now = self.now()
            healthy = self.task.is_healthy(now, np)
            terms = self.task.reward_terms(
                now, (now.x - x) / self.env.control_dt, clipped, healthy, np
            )
            terms = {name: term.astype(np.float32) for name, term in terms.items()}
            reward = sum(terms.values())
            self.discounted = self.args.gamma * self.discounted + reward
            self.total = self.total + reward
            self.length = self.length + 1
            self.elapsed = self.elapsed + 1
            terminated = ~healthy
            done = terminated | (self.elapsed >= self.env.time_limit)
            state = ppo.State(None, self.observe(), reward, None, terms, {"broken": no})
            end = ppo.Worlds(
                env_state=state,
                memory=(),
                key=None,
                discounted_return=self.discounted,
                episode_return=self.total,
                episode_length=self.length,
                times_broken=no.astype(np.int32),
            )
            records.append(
                ppo.Transition(
                    obs=obs,
                    action=action,
                    logprob=logprob,
                    start=None,
                    end=end,
                    terminated=terminated,
                    done=done,
                    valid=~no,
                    finished=done & (self.length == self.elapsed),
                )
            )
            if done.any():
                self.reset(done)
            self.discounted, self.total, self.length, self.elapsed = (
                np.where(done, 0, x).astype(x.dtype)
                for x in (self.discounted, self.total, self.length, self.elapsed)
            )
        return end, jax.tree.map(lambda *xs: np.stack(xs), *records)

    def iterate(self) -> dict:
        self.learner, metrics = learn(self.args, self.env, self.mesh, self.learner, *self.rollout())
        return jax.device_get(metrics)


ARMS = {"MJX": MJX, "C MuJoCo": CMujoco}


def training_args(args: Args, env_id: str) -> ppo.Args:
    return ppo.Args(
        env_id=env_id,
        num_envs=args.num_envs,
        num_steps=args.num_steps,
        total_timesteps=args.timesteps,
    )


# ---- smoke ----------------------------------------------------------------------------------------------------------
def check_smoke(args: Args, checks: Checks) -> None:
    commands = [f"ppo_mjx.py --smoke --env-id {env_id}" for env_id in args.env_ids]
    commands += ["sac_mjx_pendulum.py --smoke", "ppo_mjx_unitree.py --smoke"]
    for command in [commands[-2]] if args.smoke else commands:
        start = time.perf_counter()
        process = subprocess.run(
            [sys.executable, *command.split()], cwd=common.ROOT, capture_output=True, text=True
        )
        if process.returncode:
            print(f"{process.stdout[-2000:]}\n{process.stderr[-2000:]}")
        measured = f"{process.returncode} after {time.perf_counter() - start:.0f} s"
        checks.add(f"exit code of {command}", measured, "0", process.returncode == 0)


# ---- equivalence ----------------------------------------------------------------------------------------------------
def record(env_id: str, count: int) -> list[np.ndarray]:
    """Steps of random episodes in Gymnasium: qpos, qvel, warmstart before it, action; then what it gave: qpos, qvel,
    observation, reward, terminated."""
    env = gymnasium.make(env_id + "-v5").unwrapped
    rng = np.random.default_rng(0)
    rows = []
    over = True
    while len(rows) < count:
        if over or len(rows) % 100 == 0:
            env.reset(seed=len(rows))
        action = rng.uniform(-1, 1, env.action_space.shape)
        action = action.astype(np.float32).astype(float)  # exact in any precision
        before = [x.copy() for x in (env.data.qpos, env.data.qvel, env.data.qacc_warmstart)]
        obs, reward, over, _, _ = env.step(action)
        rows.append(
            (*before, action, env.data.qpos.copy(), env.data.qvel.copy(), obs, reward, over)
        )
    return [np.array(x) for x in zip(*rows, strict=True)]


def step_mjx(env: ppo.Env, qpos, qvel, warmstart, action) -> ppo.State:
    """One compiled step from each state."""
    data = ppo.Physics(*(jnp.asarray(x, jnp.float32) for x in (qpos, qvel, warmstart)))
    reset = jax.jit(jax.vmap(ppo.kernel(env.reset)))(
        jax.random.split(jax.random.key(0), len(action))
    )
    start = reset.replace(data=data, info=reset.info | {"x": data.qpos[:, 0]})
    return jax.device_get(
        jax.jit(jax.vmap(ppo.kernel(env.step)))(start, jnp.asarray(action, jnp.float32))
    )


def threshold_distance(task: ppo.Task, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    """How far each state is from the nearest bound of is_healthy [S]."""
    (min_z, max_z), z = task.healthy_z, qpos[:, 1]
    most = np.abs(np.concatenate([qpos[:, 2:], qvel], axis=1)).max(axis=1)
    gaps = (z - min_z, z - max_z, np.abs(qpos[:, 2]) - task.max_pitch, most - task.max_state)
    return np.abs(gaps).min(axis=0)


def check_steps(args: Args, env_id: str, checks: Checks) -> None:
    """One step against Gymnasium's."""
    qpos, qvel, warmstart, action, next_qpos, next_qvel, obs, reward, terminated = record(
        env_id, args.states
    )
    original, rows = ppo.CMujocoEnv(ppo.Env(ppo.Args(env_id=env_id))), []
    original.reset(0)
    for start in zip(qpos, qvel, warmstart, action, strict=True):
        original.data.qpos, original.data.qvel, original.data.qacc_warmstart = start[:3]
        original.now = original.now.replace(x=start[0][0])
        rows.append(original.step(start[3])[:3])
    ours = [np.array(x) for x in zip(*rows, strict=True)]
    worst = max(np.abs(ours[0] - obs).max(), np.abs(ours[1] - reward).max())
    checks.below(f"{env_id}: CMujocoEnv off Gymnasium, observation and reward, worst", worst, 1e-9)
    wrong = int((ours[2] != terminated).sum())
    falls = int(terminated.sum())
    checks.add(
        f"{env_id}: CMujocoEnv's terminations that differ", f"{wrong} of {falls}", "0", wrong == 0
    )
    if env_id != "HalfCheetah":  # which never terminates
        checks.add(f"{env_id}: steps that terminate", falls, ">= 1%", falls >= 0.01 * args.states)
    distance = threshold_distance(original.task, next_qpos, next_qvel)
    state, bounds = step_mjx(original.env, qpos, qvel, warmstart, action), BOUNDS[env_id]
    for label, mine, theirs, (median, most) in (
        ("observation", state.obs, obs, bounds[:2]), ("reward", state.reward, reward, bounds[2:4])
    ):  # fmt: skip
        error = np.abs(mine - theirs).reshape(args.states, -1).max(axis=1)
        checks.below(f"{env_id}: {label} of MJX off Gymnasium's, median", np.median(error), median)
        checks.below(
            f"{env_id}: {label} of MJX off Gymnasium's, 99%", np.quantile(error, 0.99), most
        )
    differ = (state.done > 0) != terminated
    far = float(distance[differ].max(initial=0))
    checks.below(
        f"{env_id}: {differ.sum()} terminations of MJX differ, farthest off the threshold",
        far,
        bounds[4],
    )


def check_rewards(env_id: str, mesh: Mesh, checks: Checks, smoke: bool) -> None:
    """Mean and standard deviation of the reward, under the untrained policy: 5%, of the mean in standard deviations,
    and twice the error that the worlds' means tell."""
    args = ppo.Args(env_id=env_id, num_envs=256, num_steps=250 if smoke else 1000)
    env = ppo.Env(args)
    learned, worlds = (state := init(args, env, mesh, 0)).learner, state.worlds
    spread = partial(ppo.rollout, args, env)
    run = jax.jit(jax.shard_map(lambda *state: spread(*state)[1].end.env_state.reward, mesh=mesh, check_vma=False,
                                in_specs=(P(), P("devices")), out_specs=P(None, "devices")))  # fmt: skip
    mjx = np.asarray(run(learned, worlds))
    original = CMujoco(args, env, mesh, 0).rollout()[1].end.env_state.reward
    error = math.sqrt(sum(x.mean(axis=0).var() / args.num_envs for x in (mjx, original)))
    checks.below(f"{env_id}: reward of the untrained policy, |{mjx.mean():.3f} - {original.mean():.3f}|",
                 abs(mjx.mean() - original.mean()), 0.05 * original.std() + 2 * error)  # fmt: skip
    ratio = mjx.std() / original.std()
    checks.add(
        f"{env_id}: its std, MJX over C MuJoCo",
        float(ratio),
        "0.95 .. 1.05",
        bool(0.95 <= ratio <= 1.05),
    )


def train(settings: ppo.Args, env: ppo.Env, mesh: Mesh, name: str, seed: int) -> dict:
    """Train; the returns of the episodes that end in each iteration."""
    arm, curve, start = ARMS[name](settings, env, mesh, seed), [], time.perf_counter()
    for iteration in range(1, settings.num_iterations + 1):
        metrics = arm.iterate()
        if episodes := int(metrics["charts/episodes_finished"]):
            curve.append({"steps": iteration * settings.steps_per_iteration, "episodes": episodes,
                          "return": float(metrics["charts/episodic_return"])})  # fmt: skip
    return {"arm": name, "seed": seed, "seconds": time.perf_counter() - start, "curve": curve}


def mean_return(curve: list[dict], first: float, last: float) -> float:
    """Of all episodes that end in these steps."""
    points = [point for point in curve if first <= point["steps"] <= last]
    episodes = sum(point["episodes"] for point in points)
    return (
        sum(point["episodes"] * point["return"] for point in points) / episodes
        if episodes
        else math.nan
    )


def check_curves(args: Args, env_id: str, mesh: Mesh, checks: Checks) -> list[dict]:
    """Both trainings end with like returns: their means over the seeds, of the episodes in the last fifth, are apart by
    at most two standard errors and a tenth of C MuJoCo's."""
    settings = training_args(args, env_id)
    env = ppo.Env(settings)
    rows, ends, gains = [], {}, []
    for name in ARMS:
        mine = [train(settings, env, mesh, name, seed) for seed in args.seeds]
        ends[name] = [
            mean_return(row["curve"], 0.8 * args.timesteps, args.timesteps) for row in mine
        ]
        firsts = [mean_return(row["curve"][:1], 0, args.timesteps) for row in mine]
        gains += [end - first for end, first in zip(ends[name], firsts, strict=True)]
        rows += mine
        listed = ", ".join(f"{end:.0f}" for end in ends[name])
        checks.add(f"{env_id}: last returns of {name}, seeds {args.seeds}", listed)
    checks.add(
        f"{env_id}: smallest gain over the first episodes",
        min(gains),
        "> 0",
        all(gain > 0 for gain in gains),
    )
    mjx, original = (np.array(ends[name]) for name in ARMS)
    errors = (
        [x.std(ddof=1) ** 2 / len(x) for x in (mjx, original)] if len(args.seeds) > 1 else [0.0]
    )
    bound = 2 * math.sqrt(sum(errors)) + 0.1 * abs(original.mean())
    checks.below(f"{env_id}: last returns, |{mjx.mean():.0f} - {original.mean():.0f}|",
                 abs(mjx.mean() - original.mean()), bound)  # fmt: skip
    return [{"env_id": env_id} | row for row in rows]


# ---- performance ----------------------------------------------------------------------------------------------------
def check_speed(args: Args, env_id: str, mesh: Mesh, checks: Checks) -> dict[str, list[float]]:
    """Steps/s with both kinds of rollout, and bare environment steps from the first states."""
    settings = common.ppo_args(env_id)
    env = ppo.Env(settings)
    programs = {name: arm(settings, env, mesh, 1).iterate for name, arm in ARMS.items()}

    step = ppo.kernel(env.step)

    def steps(state):
        action = jnp.zeros((len(state.obs), env.action_size))
        return jax.lax.scan(
            lambda x, _: (jax.vmap(step)(x, action), None), state, None, settings.num_steps
        )[0]

    worlds = init(settings, env, mesh, 1).worlds.env_state
    programs["env.step"] = common.compile_sharded(mesh, steps, worlds)[0]
    seconds = common.take_turns(programs, args.repeats, warmups=2)
    for name, times in seconds.items():
        speed = settings.steps_per_iteration / float(np.median(times))
        checks.add(
            f"{env_id}: steps/s, {name if name == 'env.step' else f'training with {name}'}",
            f"{speed:.0f}",
        )
    checks.add(
        f"{env_id}: env.step's share of MJX training",
        common.ratio(seconds["env.step"], seconds["MJX"]),
    )
    ratio = common.ratio(seconds["C MuJoCo"], seconds["MJX"])
    checks.add(f"{env_id}: training steps/s, MJX over C MuJoCo", ratio, "> 1", ratio > 1)
    return seconds


# ---- jit ------------------------------------------------------------------------------------------------------------
def equations(jaxpr):
    """All equations, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def on_host(jaxpr) -> list[str]:
    """Names of the equations that go to the host's Python or memory."""
    found = []
    for equation in equations(jaxpr):
        name = equation.primitive.name
        if (
            any(part in name for part in HOST_PRIMITIVES)
            or name == "device_put"
            and "host" in str(equation.params)
        ):
            found.append(name)
    return found


def guarded(function) -> bool:
    """Whether the transfer guard lets it pass."""
    try:
        with jax.transfer_guard("disallow"):
            function()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def check_jit(args: Args, mesh: Mesh, checks: Checks) -> dict:
    env_id, compiled = args.env_ids[0], []
    base = ppo.Args(env_id=env_id, num_envs=64)  # up to 8192 steps are shuffled in one way
    env = ppo.Env(base)
    one = Mesh(mesh.devices[:1], ("devices",))

    def trace(settings):
        state = jax.eval_shape(partial(ppo.init_train_state, settings, env), jax.random.key(1))
        return ppo.train_iteration.trace(settings, env, one, state).jaxpr.jaxpr

    jaxpr = trace(base)
    size = sum(1 for _ in equations(jaxpr))
    sizes = "num_steps", "num_envs", "update_epochs", "num_minibatches"
    for names in [sizes] if args.smoke else [(name,) for name in sizes]:
        settings = dataclasses.replace(base, **{name: 2 * getattr(base, name) for name in names})
        doubled = sum(1 for _ in equations(trace(settings)))
        checks.add(
            f"equations with twice the {', '.join(names)}", doubled, f"{size}", doubled == size
        )
    probe = jax.make_jaxpr(jax.jit(lambda x: jax.pure_callback(np.sin, x, x)))(1.0)
    checks.add("host primitives in a program with one (control)", len(on_host(probe.jaxpr)), "1",
               len(on_host(probe.jaxpr)) == 1)  # fmt: skip
    checks.add("host primitives in the iteration", str(on_host(jaxpr)), "[]", not on_host(jaxpr))

    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event == COMPILE_EVENT else None)  # fmt: skip
    settings = dataclasses.replace(base, total_timesteps=20_000 if args.smoke else 100_000)
    larger = dataclasses.replace(settings, num_envs=128)
    arm, other = MJX(settings, env, mesh, 1), MJX(larger, env, mesh, 1)
    jax.block_until_ready((arm.state, other.state))
    compiled.clear()
    metrics = [arm.iterate() for _ in range(5)]
    checks.add("compilations in 5 iterations", len(compiled), "1", len(compiled) == 1)
    other.iterate()
    checks.add("and then, with twice the worlds (control)", len(compiled), "2", len(compiled) == 2)

    def three():
        for _ in range(3):
            arm.state, values = arm.program(arm.state)
            later.append(values)
        jax.block_until_ready(arm.state)

    later, double = [], jax.jit(lambda x: 2 * x)
    double(np.ones(3))
    passed = guarded(partial(double, np.ones(3)))
    checks.add("the guard lets a NumPy argument pass (control)", passed, "False", not passed)
    passed = guarded(three)
    checks.add("the guard lets 3 iterations pass", passed, "True", passed)
    metrics += [
        {tag: value for tag, value in values.items() if tag != "black_box"} for values in later
    ]
    metrics += [arm.iterate() for _ in range(settings.num_iterations - len(metrics))]
    norms = np.array([float(values["losses/grad_norm"]) for values in metrics])
    finite = bool(
        all(
            np.isfinite(value)
            for values in metrics
            for tag, value in values.items()
            if "losses/" in tag
        )
    )
    checks.add(
        f"losses and gradients finite, {settings.total_timesteps} steps", finite, "True", finite
    )
    checks.add("gradient norm, mean of an iteration: median", float(np.median(norms)))
    checks.below("gradient norm, mean of an iteration: largest", norms.max(), 20)
    for tag in "charts/skipped_updates", "charts/nan_resets":
        worst = max(int(values[tag]) for values in metrics)
        checks.add(tag, worst, "0", worst == 0)
    return {"equations": size, "grad_norm": norms.tolist()}


def main(args: Args) -> None:
    if args.smoke:
        args = dataclasses.replace(
            args, env_ids=("Hopper",), seeds=(1, 2), timesteps=24_576, states=200, repeats=2
        )
    common.refuse_fallbacks()
    checks, result = Checks(), {"curves": [], "seconds": {}}
    if "smoke" in args.modes:  # first: once this process uses a GPU, others find its memory taken
        check_smoke(args, checks)
    mesh = common.make_mesh(None, args.num_envs, 64)  # a part takes 64 worlds, whatever --num-envs
    for env_id in args.env_ids:
        if "equivalence" in args.modes:
            check_steps(args, env_id, checks)
            check_rewards(env_id, mesh, checks, args.smoke)
            result["curves"] += check_curves(args, env_id, mesh, checks)
        if "performance" in args.modes:
            result["seconds"][env_id] = check_speed(args, env_id, mesh, checks)
        jax.clear_caches()  # each program maps memory, of which Linux allows a process so many pieces
    if "jit" in args.modes:
        result["jit"] = check_jit(args, mesh, checks)
    verdicts = [check["verdict"] for check in checks if check["verdict"]]
    failed = verdicts.count("FAIL")
    print(f"\n{failed} of {len(verdicts)} checks failed\n")
    common.table(["check", "measured", "bound", ""], [list(check.values()) for check in checks])
    name = "_".join([args.name, *(args.modes if set(args.modes) != set(Args.modes) else ())])
    common.write(name, args, {"checks": checks, **result}, args.smoke)
    raise SystemExit(int(failed > 0))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
