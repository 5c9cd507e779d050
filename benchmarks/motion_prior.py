"""What a motion prior does for a walk: policies with and without one, beside the reference.

    python benchmarks/motion_prior.py --robot g1
    python benchmarks/motion_prior.py --robot g1 --policies with=runs/NAME/policy.npz without=docs/g1_policy.npz

A policy is LABEL=FILE; the label `with` is driven by amp_mjx_unitree.py, `without` by ppo_mjx_unitree.py, others by
the one that the label begins with (`with, no replay`). Labels that differ in their ends alone (`, seed 1`, `, seed 2`)
share a row of the tables.

Two things are measured, in C MuJoCo at 500 Hz, nothing being random but the start:

- The script's own test: falls, and the mean error of the velocity for each command.
- The likeness to the reference, which no training optimises as it is measured here. The policy follows the commands
  that the reference was recorded with, and has as much noise on its actions (--noise) as the recording had. For each
  joint, the Wasserstein distance between the distributions of its angle (rad) and of its speed (rad/s) in the policy's
  motion and in the reference; the mean over all joints. And the accuracy of a discriminator that has never rewarded the
  policy: trained anew on half of the commands in both motions, and tested on the other half; 0.5 if it cannot tell them
  apart. The policy that was recorded, among the policies, shows how near one can come.

Beside them: the frequency of steps and the height of the soles in them while walking, the cost of transport (mean
power / (weight * mean speed along the command), both while told to go somewhere), slip and jerk. The reference's own
are given where poses tell them.

--film shows the reference beside the last policy on the same commands.

Writes benchmarks/results/NAME.json, NAME being motion_prior_ROBOT by default.
"""

import contextlib
import dataclasses
import io
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from types import ModuleType

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from follow_motion import film
from scipy.stats import wasserstein_distance

import amp_mjx_unitree as amp
import ppo_mjx_unitree as plain

TRAINED = 3000  # steps of the fresh discriminator
BATCH = 512


@dataclasses.dataclass
class Args:
    robot: str = "g1"
    policies: tuple[str, ...] = ("without=docs/g1_policy.npz",)
    seeds: tuple[int, ...] = (1, 2, 3)  # of the fresh discriminator
    noise: float = 0.2  # deviation of what is added to the actions, as by tools/record_motion.py
    film: str | None = None  # file of a film, .mp4
    film_seconds: float = 40.0
    name: str | None = None  # of the JSON file
    smoke: bool = False  # the reference's first 10 s, one start of each command


def script_of(label: str) -> ModuleType:
    """What drives the policy of that label, or of an entry that begins with it."""
    if label.startswith("without"):
        return plain
    if label.startswith("with"):
        return amp
    raise SystemExit(f"--policies {label}: a label begins with `with` or `without`")


# ---- Motions ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Record:
    """A motion at the control rate."""

    qpos: np.ndarray  # [T, 7 + J]
    command: np.ndarray  # [T, 3]
    starts: np.ndarray  # [T] bool: the robot did not come here from the pose before
    power: float = float("nan")  # W, mean while told to go somewhere
    speed: float = float("nan")  # m/s along the command, then
    falls: int = 0


def read_reference(args: Args) -> Record:
    robot = amp.ROBOTS[args.robot]
    file = amp.MODELS / "motions" / f"{args.robot}.npz"
    clip = amp.resample(robot, amp.read_motion(robot, file))
    if clip.command is None:
        raise SystemExit(f"{file}: has no commands; record it with tools/record_motion.py")
    some = slice(500 if args.smoke else None)
    starts = np.arange(len(clip.qpos)) == 0
    return Record(qpos=clip.qpos[some], command=clip.command[some], starts=starts[some])


def follow(script: ModuleType, robot, policy: dict, command: np.ndarray, noise: float) -> Record:
    """The policy's motion on commands [T, 3]. After a fall it stands up at once and goes on.

    noise: deviation of what is added to the actions.
    """
    random = np.random.default_rng(1)  # the recording's seed is 0
    original = script.CMujocoEnv(robot)
    original.reset(0)
    memory = script.initial_memory()
    poses = []
    powers = []
    speeds = []
    falls = 0
    starts = []
    fallen = True
    for now in command:
        starts.append(fallen)
        memory, action = script.act(policy, memory, original.observe(now))
        row = original.step(action + noise * random.standard_normal(action.shape))
        poses.append(original.data.qpos.copy())
        if now[:2].any():
            powers.append(row["power"])
            speeds.append(row["velocity"][:2] @ now[:2] / np.linalg.norm(now[:2]))
        fallen = row["fallen"]
        if fallen:
            falls += 1
            original.reset(falls)
            memory = script.initial_memory()
    return Record(
        np.array(poses),
        command,
        np.array(starts),
        power=np.mean(powers),
        speed=np.mean(speeds),
        falls=falls,
    )


def gait(robot, record: Record) -> dict[str, float]:
    """Steps of each foot per second, and how high its sole gets in them, while told to walk."""
    heights = amp.trace_feet(robot, record.qpos)[1].min(axis=-1)  # [T, F] m
    walks = record.command[:, :2].any(axis=1)
    steps = 0
    highest = []
    for foot in heights.T:
        top = 0.0
        for height, walking in zip(foot, walks, strict=True):
            if walking and height > 0.002:
                top = max(top, height)
            else:
                if walking and top > 0.01:  # m: less is no step
                    steps += 1
                    highest.append(top)
                top = 0.0
    seconds = walks.sum() * amp.CONTROL_DT * heights.shape[1]
    return {"steps_hz": steps / seconds, "clearance": float(np.mean(highest or [0.0]))}


# ---- Likeness -----------------------------------------------------------------------------------


def joint_distances(mine: Record, reference: Record) -> dict[str, float]:
    """Mean over the joints of the Wasserstein distance of angles (rad) and of speeds (rad/s)."""
    angles = [record.qpos[:, 7:] for record in (mine, reference)]
    speeds = [
        np.diff(record.qpos[:, 7:], axis=0)[~record.starts[1:]] / amp.CONTROL_DT
        for record in (mine, reference)
    ]

    def mean_distance(one: np.ndarray, other: np.ndarray) -> float:
        pairs = zip(one.T, other.T, strict=True)
        return float(np.mean([wasserstein_distance(*pair) for pair in pairs]))

    return {"angle": mean_distance(*angles), "speed": mean_distance(*speeds)}


def frames_of(robot, record: Record) -> tuple[np.ndarray, np.ndarray]:
    """What a discriminator sees, without the command: pairs of frames [N, 2 * K].

    And for each the number of its command, with the moment of standing before it: [N].
    """
    qvel = amp.velocity_between(record.qpos[:-1], record.qpos[1:], amp.CONTROL_DT, np)
    feet, _ = amp.trace_feet(robot, record.qpos[1:])
    frames = amp.describe_frame(record.qpos[1:], qvel, feet, xp=np)
    jumps = record.starts[1:-1] | record.starts[2:]
    changes = (np.diff(record.command, axis=0) != 0).any(axis=1).cumsum()
    pairs = np.concatenate([frames[:-1], frames[1:]], axis=1)
    return pairs[~jumps], (changes[1:] // 2)[~jumps]


def fresh_accuracy(robot, mine: Record, reference: Record, seed: int, steps: int) -> float:
    """How often a discriminator trained on half of the commands is right about the other half."""
    random = np.random.default_rng(seed)
    halves = []
    for record in (reference, mine):
        pairs, number = frames_of(robot, record)
        count = number.max() + 1
        trains = np.isin(number, random.permutation(count)[: (count + 1) // 2])
        halves.append((pairs[trains], pairs[~trains]))
    both = np.concatenate([train for train, _ in halves])
    mean, std = both.mean(axis=0), both.std(axis=0) + 1e-6
    real, fake = (jnp.asarray((train - mean) / std) for train, _ in halves)
    discriminator = amp.make_discriminator(amp.Args())
    params = discriminator.init(jax.random.key(seed), real[0])
    optimizer = optax.adamw(1e-3, weight_decay=1e-2)

    def loss(params, key):
        keys = jax.random.split(key)
        pairs = [
            rows[jax.random.randint(key, (BATCH,), 0, len(rows))]
            for rows, key in zip((real, fake), keys, strict=True)
        ]
        logits = [discriminator.apply(params, rows)[:, 0] for rows in pairs]
        return jax.nn.softplus(-logits[0]).mean() + jax.nn.softplus(logits[1]).mean()

    def step(carry, key):
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss)(params, key), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def train(params, keys):
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    params = train(params, jax.random.split(jax.random.key(seed + 1), steps))
    right = []
    for (_, test), sign in zip(halves, (1, -1), strict=True):
        output = discriminator.apply(params, jnp.asarray((test - mean) / std))[:, 0]
        right.append(float((sign * output > 0).mean()))
    return float(np.mean(right))


# ---- Table --------------------------------------------------------------------------------------


def load_policy(entry: str) -> tuple[str, ModuleType, dict]:
    """Of LABEL=FILE: the label, the script that drives the policy, and the policy."""
    label, file = entry.split("=", 1)
    with np.load(common.ROOT / file, allow_pickle=False) as arrays:
        return label, script_of(label), dict(arrays)


def measure(args: Args, entry: str) -> dict:
    """A row of the result, of LABEL=FILE."""
    label, script, policy = load_policy(entry)
    robot = script.ROBOTS[args.robot]
    if args.smoke:
        script.TEST_STARTS = 1
    with contextlib.redirect_stdout(io.StringIO()):
        test = script.judge(robot, policy)
    reference = read_reference(args)
    mine = follow(script, robot, policy, reference.command, args.noise)
    weight = robot.model.body_mass.sum() * 9.81
    steps = 20 if args.smoke else TRAINED
    accuracies = [fresh_accuracy(robot, mine, reference, seed, steps) for seed in args.seeds]
    return {
        "label": label,
        "evaluation": test,
        "falls": mine.falls,
        "cost_of_transport": mine.power / (weight * mine.speed),
        "fresh_accuracy": float(np.median(accuracies)),
        **joint_distances(mine, reference),
        **gait(robot, mine),
    }


def main(args: Args) -> None:
    if args.smoke:
        args.seeds = args.seeds[:1]
    for entry in args.policies:
        script_of(entry)  # refuses a label before anything takes time
        if "=" not in entry:
            raise SystemExit(f"--policies {entry}: must be LABEL=FILE")
    rows = []
    spawn = multiprocessing.get_context("spawn")  # JAX does not outlive a fork
    with ProcessPoolExecutor(common.count_cores(), mp_context=spawn) as pool:
        for row in pool.map(partial(measure, args), args.policies):
            rows.append(row)
            numbers = {name: value for name, value in row.items() if name != "evaluation"}
            print(numbers, flush=True)
    reference = read_reference(args)
    if args.film:
        _, script, policy = load_policy(args.policies[-1])
        count = round(args.film_seconds / amp.CONTROL_DT)
        shown = follow(script, script.ROBOTS[args.robot], policy, reference.command[:count], 0.0)
        film(amp.ROBOTS[args.robot], reference.qpos, shown.qpos, args.film)
    result = {"rows": rows, "reference": gait(amp.ROBOTS[args.robot], reference)}
    name = args.name or f"motion_prior_{args.robot}"
    common.write(name, args, result, args.smoke, ["cpu"])


if __name__ == "__main__":
    main(tyro.cli(Args))
