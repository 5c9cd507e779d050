"""The motion prior: reference by hand, their formats and what is refused, how the reference is drawn,
the discriminator by hand, whole runs on a robot without physics, and one step of a real one."""

import dataclasses
import functools
import json
import math
import shutil
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from quick import QUICK, quick_kernels
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import amp_mjx_unitree as amp
import ppo_mjx_unitree
from tools import export, record_motion, show_motion

G1 = amp.ROBOTS["g1"]
GO2 = amp.ROBOTS["go2"]
DT = amp.CONTROL_DT
SMALL = amp.Args(
    robot="g1",
    num_envs=16,
    num_steps=6,
    num_minibatches=2,
    total_timesteps=4 * 96,
    hidden_sizes=(16,),
    disc_hidden_sizes=(8,),
    disc_batch_size=32,
    replay_size=32,
    replay_added=16,
    clone_updates=2,
    clone_batch_size=16,
)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """All kernels are of a robot without physics."""
    with pytest.MonkeyPatch.context() as patch:
        quick_kernels(patch)
        yield


def run(function, *inputs):
    """Compile and call it."""
    return jax.jit(function).lower(*inputs).compile(QUICK)(*inputs)


def as_numpy(leaf) -> np.ndarray:
    """A copy, as the array itself may be donated."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.array(jax.random.key_data(leaf) if is_key else leaf)


def stand(robot: amp.Robot, frames: int) -> np.ndarray:
    """Poses of a robot that stands in the default pose: [T, 7 + J]."""
    base = [0, 0, robot.model.qpos0[2], 1, 0, 0, 0]
    return np.tile(np.concatenate([base, robot.joint_array("default")]), (frames, 1))


def yaw_quat(angle) -> np.ndarray:
    """Of turns about z: [..., 4]."""
    angle = np.asarray(angle)
    zero = np.zeros_like(angle)
    return np.stack([np.cos(angle / 2), zero, zero, np.sin(angle / 2)], axis=-1)


def random_poses(robot: amp.Robot, frames: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    poses = random.standard_normal((frames, 7 + len(robot.joints)))
    poses[:, 3:7] /= np.linalg.norm(poses[:, 3:7], axis=1, keepdims=True)
    return poses


def write(file: Path, qpos: np.ndarray, dt: float = DT) -> str:
    np.savez(file, qpos=qpos, dt=dt)
    return str(file)


def load(*files: str, **settings) -> amp.Reference:
    return amp.load_reference(dataclasses.replace(SMALL, motion=files, **settings))


def commands(file: str, **settings) -> np.ndarray:
    """What the frames of a clip, without its image, tell as the command: [L, 3]."""
    return parts(G1, load(file, mirror=False, **settings).frame)["command"]


def parts(robot: amp.Robot, frame: np.ndarray) -> dict[str, np.ndarray]:
    """A frame [..., K] by its parts."""
    joints = len(robot.joints)
    widths = [1, 3, 3, 3, joints, joints, 3 * len(robot.feet), 3]
    assert frame.shape[-1] == sum(widths)
    names = ("height", "gravity", "velocity", "rates", "angles", "speeds", "feet", "command")
    return dict(zip(names, np.split(frame, np.cumsum(widths)[:-1], axis=-1), strict=True))


# ---- Velocities ----------------------------------------------------------------------------------
def test_velocity_is_the_inverse_of_integration():
    """MuJoCo comes back to where the velocity has been taken from, also over more than half a turn
    of the quaternion; in float32 to its rounding."""
    before, after = random_poses(G1, 200), random_poses(G1, 200, seed=1)
    after[:100, 3:7] = before[:100, 3:7] + 1e-4 * after[:100, 3:7]  # small turns
    after[:, 3:7] /= np.linalg.norm(after[:, 3:7], axis=1, keepdims=True)
    after[::2, 3:7] *= -1
    velocity = amp.velocity_between(before, after, 0.1, np)
    expected = np.zeros(18)
    for i in range(200):
        mujoco.mj_differentiatePos(G1.model, expected, 0.1, before[i], after[i])
        np.testing.assert_allclose(velocity[i], expected, rtol=1e-6, atol=1e-6)
    assert np.abs(velocity[:, 3:6]).max() > 20  # nearly half a turn in 0.1 s
    single = run(partial(amp.velocity_between, dt=0.1), np.float32(before), np.float32(after))
    np.testing.assert_allclose(single, velocity, atol=2e-3)
    still = run(partial(amp.velocity_between, dt=0.1), np.float32(before), np.float32(before))
    np.testing.assert_allclose(still, 0, atol=1e-4)


def test_a_glide_at_constant_velocity(tmp_path):
    """A robot that looks to the left, along y, and glides along x goes to its right."""
    poses = stand(G1, 20)
    time = DT * np.arange(20)
    poses[:, 0] += 0.7 * time
    poses[:, 3:7] = yaw_quat(math.pi / 2)
    poses[:, 7 + 3] += 0.5 * time  # a knee
    reference = load(write(tmp_path / "glide.npz", poses), mirror=False)
    assert reference.length.tolist() == [19] and reference.frame.dtype == np.float32
    seen = parts(G1, reference.frame)
    np.testing.assert_allclose(seen["velocity"], np.tile([0, -0.7, 0], (19, 1)), atol=1e-5)
    np.testing.assert_allclose(seen["rates"], 0, atol=1e-6)
    np.testing.assert_allclose(seen["gravity"], np.tile([0, 0, -1], (19, 1)), atol=1e-6)
    np.testing.assert_allclose(seen["height"], G1.model.qpos0[2], atol=1e-6)
    np.testing.assert_allclose(seen["speeds"], np.tile(0.5 * np.eye(12)[3], (19, 1)), atol=1e-4)
    np.testing.assert_allclose(seen["angles"], poses[1:, 7:], atol=1e-6)
    np.testing.assert_allclose(reference.qvel[:, :3], np.tile([0.7, 0, 0], (19, 1)), atol=1e-5)
    blind = load(write(tmp_path / "glide.npz", poses), mirror=False, disc_command=False)
    np.testing.assert_array_equal(blind.frame, reference.frame[:, :-3])


def test_a_turn_on_the_spot(tmp_path):
    """Pure yaw: the rate about z, no velocity; the feet stay where they are in the base's frame."""
    poses = stand(G1, 30)
    poses[:, 3:7] = yaw_quat(1.2 * DT * np.arange(30))
    reference = load(write(tmp_path / "turn.npz", poses), mirror=False)
    seen = parts(G1, reference.frame)
    np.testing.assert_allclose(seen["rates"], np.tile([0, 0, 1.2], (29, 1)), atol=1e-5)
    np.testing.assert_allclose(seen["velocity"], 0, atol=1e-6)
    np.testing.assert_allclose(np.ptp(seen["feet"], axis=0), 0, atol=1e-6)
    left, right = seen["feet"][0].reshape(2, 3)
    assert left[1] > 0.05 and right[1] < -0.05 and left[2] == pytest.approx(right[2])
    assert -0.8 < left[2] < -0.6


# ---- Formats -------------------------------------------------------------------------------------
def test_npz_comes_back(tmp_path):
    """At the control rate, poses are what was written; with times in place of dt as well."""
    poses = random_poses(G1, 15)
    for name, when in {"dt": DT, "times": DT * np.arange(15)}.items():
        np.savez(tmp_path / "clip.npz", qpos=poses, **{name: when})
        clip = amp.read_motion(G1, tmp_path / "clip.npz")
        assert clip.dt == pytest.approx(DT)
        np.testing.assert_allclose(amp.resample(G1, clip).qpos, poses, atol=1e-9)


def test_csv(tmp_path):
    """30 frames a second, x y z w, and of the 29 joints those that the robot has."""
    robot = amp.ROBOTS["g1_29dof"]
    poses = stand(robot, 31)
    poses[:, 7:] = np.arange(29) / 100
    poses[:, 3:7] = yaw_quat(1.5 * np.arange(31) / 30)
    rows = np.concatenate([poses[:, :3], poses[:, [4, 5, 6, 3]], poses[:, 7:]], axis=1)
    np.savetxt(tmp_path / "clip.csv", rows, delimiter=",")

    resampled = amp.resample(robot, amp.read_motion(robot, tmp_path / "clip.csv")).qpos
    assert len(resampled) == 51  # of the first second, both ends included
    np.testing.assert_allclose(resampled[:, 7:], poses[:1, 7:].repeat(51, axis=0), atol=1e-9)
    turned = yaw_quat(1.5 * DT * np.arange(51))
    np.testing.assert_allclose(resampled[:, 3:7], turned, atol=1e-9)  # also between the frames

    legs = amp.read_motion(G1, tmp_path / "clip.csv")
    np.testing.assert_allclose(legs.qpos[0, 7:], np.arange(12) / 100, atol=1e-9)


def test_npz_in_single_precision(tmp_path):
    """0.02 s is a little less then, so that the clip's last moment lies beyond its last frame."""
    poses = stand(G1, 200)
    command = np.tile([1.0, 0.0, 0.0], (200, 1))
    file = tmp_path / "clip.npz"
    np.savez(file, qpos=poses, dt=np.float32(0.02), command=command)
    assert len(amp.resample(G1, amp.read_motion(G1, file)).command) == 200
    command[7, 2] = np.nan
    np.savez(file, qpos=poses, dt=0.02, command=command)
    with pytest.raises(SystemExit):
        amp.read_motion(G1, file)


def write_json(file: Path, frames, duration=0.04) -> Path:
    file.write_text(json.dumps({"FrameDuration": duration, "Frames": frames}))
    return file


def test_json(tmp_path):
    """Laikago's axes, signs and zeros; the lowest foot is on the floor."""
    legs = [0.02, 0.2, -0.9, 0.03, 0.3, -0.8, 0.0, 0.2, -0.9, 0.0, 0.3, -0.8]  # FR, FL, RR, RL
    upright = np.array([0.5, 0.5, 0.5, 0.5])  # w x y z, as Laikago stands
    quat = np.zeros(4)
    mujoco.mju_mulQuat(quat, yaw_quat(0.3), upright)
    x, y, z, w = quat[1], quat[2], quat[3], quat[0]
    frames = [[0.1 * i, 0, 0.4, x, y, z, w, *legs] for i in range(10)]
    clip = amp.read_motion(GO2, write_json(tmp_path / "clip.txt", frames))
    assert clip.dt == 0.04
    np.testing.assert_allclose(clip.qpos[0, 3:7], yaw_quat(0.3), atol=1e-9)
    front_left, front_right = clip.qpos[0, 7:13].reshape(2, 3)
    np.testing.assert_allclose(front_left, [0.03, 0.9, -1.46], atol=1e-9)
    np.testing.assert_allclose(front_right, [-0.02, 0.8, -1.56], atol=1e-9)
    np.testing.assert_allclose(np.diff(clip.qpos[:, 0]), 0.1 * 0.426 / 0.5, atol=1e-6)
    _, soles = amp.trace_feet(GO2, clip.qpos)
    assert soles.min() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("robot", [G1, amp.ROBOTS["g1_29dof"], GO2])
def test_mirror_is_an_involution(robot):
    """Twice in the mirror is as before, and once not; a foot's image is the other foot's."""
    poses = random_poses(robot, 20)
    mirrored = amp.mirror_poses(robot, poses)
    np.testing.assert_allclose(amp.mirror_poses(robot, mirrored), poses)
    assert np.abs(mirrored - poses).max() > 0.1
    feet, heights = amp.trace_feet(robot, poses)
    image, image_heights = amp.trace_feet(robot, mirrored)
    other = [robot.feet.index(name) for name in map(other_side, robot.feet)]
    np.testing.assert_allclose(image, feet[:, other] * [1, -1, 1], atol=2e-3)
    np.testing.assert_allclose(image_heights.min(-1), heights[:, other].min(-1), atol=2e-3)
    speeds = amp.velocity_between(poses[:-1], poses[1:], 1.0, np)
    images = amp.velocity_between(mirrored[:-1], mirrored[1:], 1.0, np)
    np.testing.assert_allclose(images[:, :6], speeds[:, :6] * [1, -1, 1, -1, 1, -1], atol=1e-9)


def other_side(name: str) -> str:
    side = amp.side_of(name)
    return amp.OTHER_SIDE[side] + name.removeprefix(side)


def test_what_is_wrong_with_a_clip():
    """Slipping feet, feet in the floor, joints beyond their limits and falls are measured."""
    good = stand(G1, 20)
    clean = amp.check_clip(G1, good)
    assert clean == pytest.approx(dict.fromkeys(clean, 0.0), abs=1e-4)
    slides, sunk, bent, falls = good.copy(), good.copy(), good.copy(), good.copy()
    slides[:, 1] += 0.3 * DT * np.arange(20)
    sunk[7, 2] -= 0.02
    bent[3, 7 + 3] = G1.limits[3, 1] + 0.25
    falls[:5, 2] = 0.3
    assert amp.check_clip(G1, slides)["slip"] == pytest.approx(0.3, abs=1e-3)
    assert amp.check_clip(G1, sunk)["penetration"] == pytest.approx(0.02, abs=1e-4)
    assert amp.check_clip(G1, bent)["beyond"] == pytest.approx(0.25, abs=1e-6)
    assert amp.check_clip(G1, falls)["fallen"] == 0.25
    flying = slides + np.eye(19)[2]
    assert amp.check_clip(G1, flying)["slip"] == 0
    height = -1000 * amp.check_clip(G1, flying)["penetration"]
    assert f"never nearer than {height:.0f} mm to the floor" in amp.describe_clip(G1, flying)


def test_the_command_that_a_clip_follows(tmp_path):
    """The mean velocity in the base's frame over a second, within the flags' ranges; slow ones are 0."""
    time = DT * np.arange(101)
    walks = stand(G1, 101)  # in a circle to the left, with the sway of a walk at two steps a second
    angle = 0.5 * time
    walks[:, 3:7] = yaw_quat(angle)
    walks[:, 0] = np.sin(angle) * 0.6 / 0.5
    walks[:, 1] = (1 - np.cos(angle)) * 0.6 / 0.5 + 0.02 * np.sin(4 * math.pi * time)
    command = commands(write(tmp_path / "walk.npz", walks))
    assert command.shape == (100, 3) and command.dtype == np.float32
    np.testing.assert_allclose(command[30:70], np.tile([0.6, 0, 0.5], (40, 1)), atol=0.03)

    runs = stand(G1, 101)
    runs[:, 0] = 2.0 * time
    command = commands(write(tmp_path / "run.npz", runs), command_x=(-0.5, 0.9))
    np.testing.assert_allclose(command, np.tile([0.9, 0, 0], (100, 1)), atol=1e-6)
    creeps = stand(G1, 101)
    creeps[:, 1] = 0.15 * time
    creeps[:, 3:7] = yaw_quat(0.1 * time)
    assert not commands(write(tmp_path / "creep.npz", creeps)).any()

    # From rest to a walk: half a second before it begins, the command does not know of it yet.
    starts = stand(G1, 101)
    starts[51:, 0] = 0.8 * DT * np.arange(1, 51)
    command = commands(write(tmp_path / "start.npz", starts))[:, 0]
    assert not command[:25].any() and command[50] == pytest.approx(0.4, abs=0.03)
    np.testing.assert_allclose(command[75:], 0.8, atol=1e-6)


def test_recorded_commands_are_those_of_the_clip(tmp_path):
    """On the way to each pose, at any frame rate; the actor sees the next one; an image has the image's."""
    told = np.repeat([[0.5, 0.3, -0.4], [0.0, 0.0, 0.8]], 5, axis=0)
    file = tmp_path / "clip.npz"
    np.savez(file, qpos=stand(G1, 10), targets=stand(G1, 10)[:, 7:], command=told, dt=DT)
    reference = load(str(file))
    command = parts(G1, reference.frame)["command"]
    np.testing.assert_allclose(command[:9], told[1:], rtol=1e-6)
    np.testing.assert_allclose(command[9:], told[1:] * [1, -1, -1], rtol=1e-6)
    for rows in (slice(0, 9), slice(9, 18)):
        np.testing.assert_array_equal(reference.command_seen[rows][:-1], command[rows][1:])
    seen = reference.obs[:9, amp.part_slices(G1, amp.seen_parts(G1, "actor"))["command"]]
    np.testing.assert_allclose(np.abs(seen[:, 2]), 0.25 * np.abs([*told[2:, 2], 0.8]), rtol=1e-6)

    np.savez(file, qpos=stand(G1, 10), command=told, dt=2 * DT)
    slow = amp.resample(G1, amp.read_motion(G1, file)).command
    np.testing.assert_array_equal(slow, told[np.ceil(np.arange(19) / 2).astype(int)])


@pytest.mark.slow
def test_the_actor_begins_as_a_copy_of_the_reference(reference):
    """In the reference's frames it acts as there, though it sees them with noise; without cloning it does not."""
    args = dataclasses.replace(
        SMALL, clone_updates=800, clone_batch_size=64, hidden_sizes=(64,), init_log_std=-2.0
    )
    error = {}
    for updates in (0, 300, 800):
        args = dataclasses.replace(args, clone_updates=updates)
        env = make(Toy, args)
        learner = run(
            partial(amp.init_train_state, args, env), reference, jax.random.key(0)
        ).learner
        stats = learner.obs_stats["actor"]
        obs = amp.normalize(stats, reference.obs)
        _, policy = amp.apply_policy(args, env, learner.params, (), obs)
        error[updates] = float(jnp.square(policy.mean - reference.action).mean())
        if updates:
            np.testing.assert_allclose(stats.mean, reference.obs.mean(axis=0), atol=1e-5)
            assert (np.asarray(stats.var) >= np.asarray(env.noise) ** 2 / 3).all()
            assert stats.count == 1e9
    assert error[300] < 0.5 * error[0]
    # One that always does the reference's mean action would have all of this variance.
    assert error[800] < 0.75 * reference.action.var(axis=0).mean()


def test_the_critic_learns_first():
    """The actor stays as it is for that share of the training, and the step size too; then both learn."""
    args = dataclasses.replace(SMALL, critic_first=0.5, clone_updates=0)  # two of four iterations
    for iteration, learns in ((0, False), (1, False), (2, True)):
        learner = types.SimpleNamespace(iteration=jnp.int32(iteration))
        assert amp.actor_learns(args, learner) == learns
    for kl, factor in ((0.0, 1.5), (1e-3, 1.5), (0.02, 1.0), (0.2, 1 / 1.5)):
        rate = amp.next_learning_rate(args, jnp.float32(1e-3), jnp.float32(kl), jnp.float32(0.0))
        assert rate == pytest.approx(factor * 1e-3, rel=1e-5)


def test_the_critic_has_its_own_step_size():
    """As a vector in the order of the parameters'."""
    params = {
        "actor": {"w": jnp.zeros((2, 3))},
        "critic": {"w": jnp.zeros(4)},
        "log_std": jnp.zeros(2),
    }
    args = dataclasses.replace(SMALL, critic_learning_rate=0.5, critic_first=0.5)
    for iteration, rate in ((1, 0.0), (2, 0.25)):  # of four
        learner = types.SimpleNamespace(params=params, iteration=jnp.int32(iteration))
        rates = amp.step_sizes(args, learner, jnp.float32(0.25))
        np.testing.assert_array_equal(rates, [rate] * 6 + [0.5] * 4 + [rate] * 2)


def test_the_level_rises_when_robots_walk_and_are_seldom_lost():
    """By a share of the training; it falls otherwise. Style alone: with time."""
    args = dataclasses.replace(SMALL, curriculum=0.5)  # two of four iterations
    episodes = args.steps_per_iteration / amp.Env.time_limit  # whole ones, of all worlds
    best = G1.weights["track_velocity"] / G1.best
    env = types.SimpleNamespace(robot=G1, time_limit=amp.Env.time_limit)

    def follow(level, tracked, losses, args=args):
        lost = losses * episodes
        return float(
            amp.next_level(args, env, level, jnp.float32(tracked * best), jnp.float32(lost))
        )

    assert follow(0.25, 0.6, 0.4) == pytest.approx(0.75)
    assert follow(0.75, 0.6, 0.4) == 1
    assert follow(0.75, 0.4, 0.4) == pytest.approx(0.25)
    assert follow(0.75, 0.6, 0.6) == pytest.approx(0.25)
    assert follow(0.25, 0.4, 0.6) == 0
    style = dataclasses.replace(args, task_share=0.0)
    assert follow(0.25, 0.0, 0.4, style) == pytest.approx(0.75)
    assert follow(0.25, 0.0, 9.0, style) == pytest.approx(0.75)
    assert follow(0.3, 0.9, 0.0, dataclasses.replace(args, curriculum=0.0)) == pytest.approx(0.3)


def test_who_does_not_do_as_told_is_lost():
    """Standing still under a command to move takes 1.6 s to fall below a fifth; half of the speed is enough."""

    def follow(command, velocity, steps):
        progress = jnp.ones(())
        for _ in range(steps):
            progress = amp.next_progress(progress, jnp.array(command), jnp.array(velocity))
        return float(progress)

    forward, turn = [0.5, 0.0, 0.0], [0.0, 0.0, -0.6]
    for command in (forward, turn, [0.3, 0.2, 0.4]):
        assert follow(command, [0.0, 0.0, 0.0], 50) == pytest.approx(math.exp(-1), abs=0.01)
        assert follow(command, np.multiply(0.5, command), 500) == pytest.approx(0.5, abs=1e-3)
    assert follow(forward, [0.0, 0.0, 0.0], 79) > 0.2 > follow(forward, [0.0, 0.0, 0.0], 81)
    # Of a push, no more counts than twice the command.
    assert follow(forward, [-0.5, 0.7, 0.0], 500) == pytest.approx(-1, abs=1e-3)
    assert follow(forward, [-9.0, 0.7, 0.0], 500) == pytest.approx(-2, abs=1e-3)
    assert follow(forward, [9.0, 0.7, 0.0], 500) == pytest.approx(2, abs=1e-3)
    assert follow([0.0, 0.0, 0.0], [0.3, 0.0, 0.0], 50) == 1


def test_one_foot_is_first_under_a_command_straight_on(tmp_path):
    """To be copied is the clip alone; its image, which lifts the other foot, is for style and for starts."""
    poses = stand(G1, 20)
    poses[:, 0] += 0.5 * DT * np.arange(20)
    poses[10:, 7 + 3] += 0.3  # the left knee
    reference = load(write(tmp_path / "straight.npz", poses))
    np.testing.assert_array_equal(reference.obs[19:], reference.obs[:19])
    np.testing.assert_array_equal(reference.action[19:], reference.action[:19])
    assert not np.allclose(reference.action_before[19:], reference.action_before[:19])
    assert not np.allclose(reference.frame[19:], reference.frame[:19])


def test_turning_on_the_spot_pays_more_than_standing():
    """Though a robot that steps sways; and who drifts, told to stand, loses."""

    def reward(command, velocity, rate):
        motion = amp.Motion(
            command=jnp.array(command),
            velocity=jnp.array([*velocity, 0.0]),
            rates=jnp.array([0.0, 0.0, rate]),
            gravity=jnp.array([0.0, 0.0, -1.0]),
            torque=jnp.zeros(12),
            **dict.fromkeys(("angles", "speeds", "accelerations"), jnp.zeros(12)),
            **dict.fromkeys(("action", "action_before"), jnp.zeros(12)),
        )
        terms = amp.unweighted_terms(G1, motion)
        return {name: float(terms[name]) for name in ("track_velocity", "track_yaw")}

    turn = [0.0, 0.0, 0.6]
    width = 0.04 + 0.21 * 0.6
    assert reward(turn, [0.1, 0.15], 0.6) == pytest.approx(
        {"track_velocity": math.exp(-(0.1**2 + 0.15**2) / width), "track_yaw": 1}, rel=1e-5
    )
    still = reward(turn, [0.0, 0.0], 0.0)
    assert still == pytest.approx(
        {"track_velocity": 1, "track_yaw": math.exp(-0.36 / 0.25)}, rel=1e-5
    )
    weights = G1.weights
    turning, standing = (
        sum(weights[name] * value for name, value in terms.items())
        for terms in (reward(turn, [0.1, 0.15], 0.6), still)
    )
    assert turning > 1.1 * standing
    drift = reward([0.0, 0.0, 0.0], [0.2, 0.0], 0.0)
    assert drift["track_velocity"] == pytest.approx(math.exp(-1), rel=1e-5)


def test_what_the_actor_sees_of_a_reference(tmp_path):
    """Observation and action by hand; a clip's image to the right is seen as the one to the left."""
    time = DT * np.arange(20)
    poses = stand(G1, 20)
    poses[:, 1] += 0.3 * time
    poses[:, 7 + 3] += 0.1 + 0.5 * time  # the left knee
    file = write(tmp_path / "left.npz", poses)
    reference = load(file)
    image = amp.mirror_clip(G1, amp.resample(G1, amp.read_motion(G1, Path(file))))
    assert image.qpos[-1, 1] == pytest.approx(-0.3 * time[-1])
    right = load(write(tmp_path / "right.npz", image.qpos))
    for seen in (reference, right):
        for rows in (slice(0, 19), slice(19, 38)):
            np.testing.assert_allclose(seen.obs[rows], reference.obs[:19], atol=1e-6)
            np.testing.assert_allclose(seen.action[rows], reference.action[:19], atol=1e-6)

    knee = np.eye(12)[3]
    bent = np.outer(0.1 + 0.5 * time[1:], knee)  # rad, from the default pose
    lead = 4 / 150 * 0.5 * knee  # damping over stiffness, times the speed
    by_hand = {
        "rates": np.zeros((19, 3)),
        "gravity": np.tile([0, 0, -1], (19, 1)),
        "command": np.tile([0, 0.3 * 2, 0], (19, 1)),
        "angles": bent,
        "speeds": np.tile(0.5 * 0.05 * knee, (19, 1)),
        "action": (bent + lead) / 0.25,
    }
    where = amp.part_slices(G1, amp.seen_parts(G1, "actor"))
    assert by_hand.keys() == where.keys()
    for name, values in by_hand.items():
        np.testing.assert_allclose(reference.obs[:19, where[name]], values, atol=1e-4)

    np.testing.assert_allclose(reference.action[:18], (bent[1:] + lead) / 0.25, atol=1e-3)
    np.testing.assert_allclose(reference.action_before[:19], (bent + lead) / 0.25, atol=1e-3)
    mirrored = ppo_mjx_unitree.mirror_actions(
        ppo_mjx_unitree.ROBOTS["g1"], reference.action_before[:19]
    )
    np.testing.assert_allclose(reference.action_before[19:], mirrored, atol=1e-6)
    targets = G1.targets(reference.action[0], np)
    np.testing.assert_allclose(G1.actions(targets), reference.action[0], atol=1e-6)

    # What was recorded counts, where it was.
    recorded = poses[:, 7:] + np.linspace(0, 1, 20)[:, None]
    np.savez(tmp_path / "recorded.npz", qpos=poses, dt=DT, targets=recorded)
    reference = load(str(tmp_path / "recorded.npz"))
    np.testing.assert_allclose(reference.action_before[:19], G1.actions(recorded[1:]), atol=1e-5)
    np.testing.assert_allclose(reference.action[:18], G1.actions(recorded[2:]), atol=1e-5)


# ---- The reference on the device -----------------------------------------------------------------
def labelled(lengths: list[int], chance: list[float]) -> amp.Reference:
    """Clips whose frames are (number of the clip, number of the frame)."""
    frames = [[(clip, i) for i in range(length)] for clip, length in enumerate(lengths)]
    frame = jnp.float32(np.concatenate(frames))
    return amp.Reference(
        qpos=frame,
        qvel=frame,
        frame=frame,
        command_seen=frame,
        obs=frame,
        action=frame,
        action_before=frame,
        first=jnp.int32(np.cumsum([0, *lengths[:-1]])),
        length=jnp.int32(lengths),
        cumulative_chance=jnp.float32(chance),
        onsets=jnp.int32([3]),
        onset_chance=jnp.float32([1.0]),
    )


@pytest.mark.parametrize("num_frames", [2, 4])
def test_windows_follow_the_weights_and_stay_in_their_clip(num_frames):
    """Clips are drawn by their chances, their windows alike, and no window crosses a border."""
    args = dataclasses.replace(SMALL, num_frames=num_frames)
    reference = labelled([10, 5, 300], [0.6, 0.9, 1.0])

    def draw(key):
        return amp.window_at(args, reference, amp.draw_moment(args, reference, key))

    windows = np.asarray(run(jax.vmap(draw), jax.random.split(jax.random.key(0), 20_000)))
    assert windows.shape == (20_000, num_frames, 2)
    clips, numbers = windows[..., 0], windows[..., 1]
    assert (clips == clips[:, :1]).all()
    assert (np.diff(numbers, axis=1) == 1).all()
    shares = np.bincount(clips[:, 0].astype(int)) / 20_000
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=0.015)
    for clip, length in enumerate((10, 5)):
        last = numbers[clips[:, 0] == clip][:, -1].astype(int)
        counts = np.bincount(last, minlength=length)[num_frames - 1 :]
        assert len(counts) == length - num_frames + 1
        np.testing.assert_allclose(counts / counts.mean(), 1, atol=0.15)


def test_a_third_of_the_demonstrations_are_onsets():
    reference = labelled([100], [1.0]).replace(
        onsets=jnp.int32([7, 8]), onset_chance=jnp.float32([0.75, 0.25])
    )
    keys = jax.random.split(jax.random.key(0), 4000)
    numbers = run(jax.vmap(partial(amp.draw_moment_or_onset, SMALL, reference)), keys)
    counts = np.bincount(numbers, minlength=100) / 4000
    by_onset = 0.33 * np.array([0.75, 0.25])
    np.testing.assert_allclose(counts[[7, 8]], by_onset + 0.67 / 99, atol=0.02)
    assert counts[50:].sum() == pytest.approx(0.67 * 50 / 99, abs=0.03)


def test_onsets_are_the_poses_after_a_new_command(tmp_path):
    """The actor sees a command one pose before it has led to one. Only a file's own commands count."""
    told = np.zeros((60, 3))
    told[31:, 0] = 0.5
    file = str(tmp_path / "told.npz")
    np.savez(file, qpos=stand(G1, 60), dt=DT, command=told)
    reference = load(file)
    # Of 59 poses, as the first one has no velocity; then those of the image.
    first = np.arange(29, 29 + 15)
    np.testing.assert_array_equal(reference.onsets, [*first, *(59 + first)])
    seen = amp.part_slices(G1, amp.seen_parts(G1, "actor"))["command"]
    assert not reference.obs[28, seen].any() and reference.obs[29, seen].any()

    # Where only the motion tells what it follows, no moment is one of a new command.
    walks = stand(G1, 100)
    walks[50:, 0] = 0.8 * DT * np.arange(50)
    walk = write(tmp_path / "walk.npz", walks)
    assert commands(walk).any()
    plain = load(walk)
    assert not len(plain.onsets)
    keys = jax.random.split(jax.random.key(0), 100)
    for draw in (amp.draw_moment_or_onset, amp.draw_moment):
        drawn = run(jax.vmap(partial(draw, SMALL, jax.tree.map(jnp.asarray, plain))), keys)
        assert drawn.min() < 99 < drawn.max()

    # Each clip's onsets together have the clip's weight, and those without any have none.
    twice = np.tile(told, (2, 1))
    np.savez(tmp_path / "twice.npz", qpos=stand(G1, 120), dt=DT, command=twice)
    files = (file, walk, str(tmp_path / "twice.npz"))
    both = load(*files, motion_weights=(1.0, 5.0, 3.0), mirror=False)
    chance = both.onset_chance
    assert chance[both.onsets < 59].sum() == pytest.approx(0.25)
    assert chance[both.onsets > 59 + 99].sum() == pytest.approx(0.75)
    assert len(both.onsets) == 4 * 15


def test_a_reference_that_hardly_varies_leaves_room_for_commands_and_actions(reference):
    """Where it has one command only, others stay within the normaliser's 10 deviations."""
    env = make(Toy, SMALL)
    least = amp.least_variance(SMALL, env)
    where = amp.part_slices(G1, env.seen["actor"])
    scale = np.array(env.seen["actor"]["command"].scale)
    spread = np.array([1.6, 0.8, 1.6]) * scale
    np.testing.assert_allclose(least[where["command"]], 0.25 * spread**2 / 12, rtol=1e-6)
    np.testing.assert_allclose(least[where["action"]], math.exp(2 * SMALL.init_log_std), rtol=1e-6)
    np.testing.assert_allclose(least[where["rates"]], env.noise[where["rates"]] ** 2 / 3, rtol=1e-6)


def test_weights_of_files(tmp_path):
    """A file's weight is its clip's and the image's, half each; by default it is the length."""
    files = [write(tmp_path / f"{n}.npz", stand(G1, n)) for n in (11, 31)]
    by_length = load(*files)
    assert by_length.length.tolist() == [10, 10, 30, 30]
    assert by_length.first.tolist() == [0, 10, 20, 50]
    np.testing.assert_allclose(
        by_length.cumulative_chance, np.cumsum([11, 11, 31, 31]) / 84, rtol=1e-6
    )
    weighted = load(*files, motion_weights=(3.0, 1.0))
    np.testing.assert_allclose(weighted.cumulative_chance, [0.375, 0.75, 0.875, 1.0])
    plain = load(*files, motion_weights=(3.0, 1.0), mirror=False)
    np.testing.assert_allclose(plain.cumulative_chance, [0.75, 1.0])


# ---- The discriminator ---------------------------------------------------------------------------
def on_one_device(function, make_mesh):
    """The function with a mesh's axis of one device around it."""
    mesh = make_mesh(1)
    return jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)


def make_learner(args: amp.Args, size: int) -> amp.Learner:
    """One with a discriminator alone, for frames of `size` numbers that are normalised already."""
    window = jnp.zeros(args.num_frames * size)
    discriminator = amp.make_discriminator(args).init(jax.random.key(0), window)
    vector, _ = jax.flatten_util.ravel_pytree(discriminator)
    fields = dict.fromkeys(field.name for field in dataclasses.fields(amp.Learner))
    return amp.Learner(
        **fields
        | {
            "discriminator": discriminator,
            "disc_opt_state": amp.make_optimizer(args).init(vector),
            "frame_stats": amp.start_stats((size,)),
            "iteration": jnp.int32(0),
        }
    )


@pytest.mark.parametrize("loss", ["least_squares", "bce"])
def test_two_gaussians_are_told_apart(loss, make_mesh):
    """After some steps, samples of the reference and of the robots are known by their means, and
    the reward prefers the reference's."""
    args = dataclasses.replace(
        SMALL, disc_loss=loss, disc_updates=300, disc_learning_rate=1e-2, disc_batch_size=128
    )
    random = np.random.default_rng(0)
    real = (random.standard_normal((500, 3)) + 1.5).astype(np.float32)
    fake = (random.standard_normal((400, 2, 3)) - 1.5).astype(np.float32)
    reference = labelled([500], [1.0]).replace(frame=jnp.asarray(real))
    learner = make_learner(args, 3)

    def learn(learner, fake):
        replay = jnp.zeros((args.replay_size, 2, 3))
        key = jax.random.key(1)
        return amp.update_discriminator(args, reference, learner, key, replay, fake)

    learner, replay, metrics = run(on_one_device(learn, make_mesh), learner, fake)
    windows = np.stack([real[:-1], real[1:]], axis=1)
    good = np.asarray(run(partial(amp.style_reward, args), learner, windows))
    bad = np.asarray(run(partial(amp.style_reward, args), learner, fake))
    assert good.mean() > bad.mean() + 0.3
    assert metrics["charts/accuracy_real"] > 0.85 and metrics["charts/accuracy_fake"] > 0.85
    assert metrics["charts/skipped_updates"] == 0 and metrics["losses/gradient_penalty"] > 0
    assert (np.asarray(replay[:16]) < 0).any() and not np.asarray(replay[16:]).any()


@pytest.mark.parametrize("loss", ["least_squares", "bce"])
def test_loss_by_hand(loss):
    """Error, penalty and decay of a small network, in NumPy."""
    args = dataclasses.replace(SMALL, disc_loss=loss, grad_penalty=7.0, head_decay=0.3)
    random = np.random.default_rng(0)
    w0, b0 = random.standard_normal((6, 8)), random.standard_normal(8)
    w1, b1 = random.standard_normal((8, 1)), random.standard_normal(1)
    layers = {"Dense_0": {"kernel": w0, "bias": b0}, "Dense_1": {"kernel": w1, "bias": b1}}
    discriminator = jax.tree.map(jnp.float32, {"params": layers})
    real, fake = random.standard_normal((2, 5, 2, 3))

    def outputs(window):
        x = window.reshape(-1, 6) @ w0 + b0
        return (np.where(x > 0, x, np.expm1(x)) @ w1 + b1)[:, 0]

    x = real.reshape(-1, 6) @ w0 + b0
    slope = (np.where(x > 0, 1, np.exp(x)) * w1[:, 0]) @ w0.T  # [5, 6]
    penalty = np.square(slope).sum(axis=1).mean()
    if loss == "bce":
        error = np.log1p(np.exp(-outputs(real))).mean() + np.log1p(np.exp(outputs(fake))).mean()
    else:
        error = np.square(outputs(real) - 1).mean() + np.square(outputs(fake) + 1).mean()
    expected = 0.5 * error + 3.5 * penalty + 0.3 * np.square(w1).sum()

    inputs = (discriminator, jnp.float32(real), jnp.float32(fake))
    total, metrics = run(partial(amp.discriminator_loss, args), *inputs)
    assert metrics["losses/gradient_penalty"] == pytest.approx(penalty, rel=1e-4)
    assert total == pytest.approx(expected, rel=1e-4)
    assert metrics["charts/accuracy_real"] == pytest.approx((outputs(real) > 0).mean())
    assert metrics["charts/accuracy_fake"] == pytest.approx((outputs(fake) < 0).mean())


@pytest.mark.parametrize(
    ("loss", "known"),
    [
        ("least_squares", {-1e6: 0, -1: 0, 0: 0.75, 1: 1, 1e6: 1}),
        ("bce", {-1e6: 0, 0: 0.5, math.log(3): 1, 1e6: 1}),
    ],
)
def test_style_reward_is_between_0_and_1(monkeypatch, loss, known):
    """It rises with the discriminator's output, from 0 to 1."""
    monkeypatch.setattr(amp, "judge_windows", lambda args, discriminator, window: window[..., 0, 0])
    monkeypatch.setattr(amp, "normalize", lambda stats, window: window)
    args = dataclasses.replace(SMALL, disc_loss=loss)
    learner = make_learner(args, 1)
    outputs = np.concatenate([[*known], np.linspace(-20, 20, 401)]).astype(np.float32)
    reward = np.asarray(amp.style_reward(args, learner, outputs[:, None, None]))
    np.testing.assert_allclose(reward[: len(known)], [*known.values()], atol=1e-6)
    rising = reward[len(known) :]
    assert (np.diff(rising) >= 0).all() and rising.min() >= 0 and rising.max() <= 1


def test_replay_keeps_the_newest(make_mesh):
    """Blocks fill it one after the other; then the oldest gives way."""
    args = dataclasses.replace(SMALL, replay_size=48, replay_added=16)

    def add(iteration, replay, fresh):
        return amp.add_to_replay(args, iteration, jax.random.key(0), replay, fresh)

    replay = jnp.zeros((48, 1, 1))
    program = jax.jit(on_one_device(add, make_mesh))
    for iteration in range(5):
        fresh = jnp.full((30, 1, 1), iteration + 1.0)
        replay, filled = program(jnp.int32(iteration), replay, fresh)
        assert filled == min(16 * (iteration + 1), 48)
    np.testing.assert_array_equal(np.ravel(replay), np.repeat([4.0, 5.0, 3.0], 16))


# ---- Episodes ------------------------------------------------------------------------------------
class Toy(amp.Env):
    """A robot without physics: its base glides, its joints go where they are sent."""

    def advance(self, data, action, action_before, domain):
        qpos = data.qpos.at[:3].add(DT * data.qvel[:3])
        speeds = 5.0 * (self.robot.targets(action) - qpos[7:])
        qpos = qpos.at[7:].add(DT * speeds)
        return data.replace(qpos=qpos, qvel=data.qvel.at[6:].set(speeds)), action


@functools.cache
def make(kind, args: amp.Args):
    return kind(args)


@pytest.fixture(scope="module")
def walk_file(tmp_path_factory) -> str:
    """A short motion by hand, to the left: the legs swing, and a knee more than the other."""
    poses = stand(G1, 60)
    time = DT * np.arange(60)
    poses[:, 1] += 0.4 * time
    poses[:, 2] += 0.03
    for joint, phase in ((0, 0.0), (6, math.pi)):
        poses[:, 7 + joint] += 0.3 * np.sin(8 * time + phase)
    poses[:, 7 + 3] += 0.2
    return write(tmp_path_factory.mktemp("motions") / "walk.npz", poses)


@pytest.fixture(scope="module")
def reference(walk_file) -> amp.Reference:
    return jax.tree.map(jnp.asarray, load(walk_file))


def test_frames_of_robot_and_reference_are_the_same(reference):
    """MJX makes of a pose and its velocity what the reader has made of them in C MuJoCo."""
    env = make(Toy, SMALL)
    numbers = np.setdiff1d(np.arange(10, len(reference.qpos), 10), reference.first)
    before, after = reference.qpos[numbers - 1], reference.qpos[numbers]
    qvel = amp.velocity_between(before.astype(float), after.astype(float), DT, np)
    command = parts(G1, reference.frame[numbers])["command"]
    frames = run(jax.vmap(env.frame), after, qvel.astype(np.float32), command)
    np.testing.assert_allclose(frames, reference.frame[numbers], atol=1e-4)


def test_episodes_start_in_the_reference(reference):
    """Where they are to, with the window that leads there; the others in the default pose."""
    args = dataclasses.replace(SMALL, num_frames=3, reference_starts=0.3)
    env = make(Toy, args)

    def reset(keys):
        return amp.reset_worlds(args, env, reference, keys, 0.5)

    state = run(reset, jax.random.split(jax.random.key(0), 400))
    qpos, window = np.asarray(state.data.qpos), np.asarray(state.info["window"])
    chosen = np.isclose(qpos[:, 2:3], np.asarray(reference.qpos)[:, 2]).all(axis=1)
    assert chosen.mean() == pytest.approx(0.3, abs=0.08)
    assert not qpos[:, :2].any()
    assert (qpos[~chosen, 2] == np.float32(G1.start_height)).all()
    for place in np.flatnonzero(chosen)[:20]:
        (moment,) = np.flatnonzero((reference.frame == window[place, -1]).all(axis=1))
        np.testing.assert_array_equal(window[place], reference.frame[moment - 2 : moment + 1])
        np.testing.assert_array_equal(qpos[place, 2:], reference.qpos[moment, 2:])
        np.testing.assert_array_equal(state.data.qvel[place], reference.qvel[moment])
        np.testing.assert_array_equal(state.info["command"][place], reference.command_seen[moment])
    assert (window[~chosen] == window[~chosen][:, :1]).all()
    assert np.asarray(state.info["level"]).min() == 0.5


@pytest.fixture(scope="module")
def rolled(reference, make_mesh):
    """The start of a run and its first rollout, of worlds of which one is about to break."""
    args = dataclasses.replace(SMALL, task_share=0.3, num_frames=3)
    env = make(Toy, args)

    def roll(key):
        state = amp.init_train_state(args, env, reference, key)
        data = state.worlds.env_state.data
        data = data.replace(qvel=data.qvel.at[5, 0].set(jnp.nan))
        env_state = state.worlds.env_state.replace(data=data)
        worlds = state.worlds.replace(env_state=env_state)
        return state, amp.rollout(args, env, reference, state.learner, worlds)

    state, (_, steps) = jax.tree.map(as_numpy, run(roll, jax.random.key(0)))
    return args, env, state, steps


def test_reward_is_mixed(rolled):
    """By the share of the task; a world that breaks earns nothing."""
    args, _, state, steps = rolled
    task = steps.end.env_state.metrics["reward_task"]
    assert 0 <= task.min() and task.max() <= 1 and steps.style.min() >= 0 and steps.style.max() <= 1
    mixed = 0.3 * task + 0.7 * steps.style
    np.testing.assert_allclose(steps.reward, np.where(steps.valid, mixed, 0), atol=1e-6)
    assert (~steps.valid).sum() == 1 and not steps.valid[0, 5]
    assert steps.style.std() > 0 and task.std() > 0
    window = steps.end.env_state.info["window"]
    style = run(partial(amp.style_reward, args), state.learner, window)
    np.testing.assert_allclose(style, steps.style, atol=1e-5)


def test_windows_slide(rolled):
    """Each step adds the frame of where it ends; one that breaks leaves the window as it was."""
    _, env, _, steps = rolled
    before, after = steps.start.info["window"], steps.end.env_state.info["window"]
    np.testing.assert_array_equal(after[0, 5], before[0, 5])
    slid = steps.valid
    np.testing.assert_array_equal(after[slid][:, :-1], before[slid][:, 1:])
    assert np.isfinite(after).all()
    newest = parts(G1, after[slid][:, -1])
    end, start = steps.end.env_state.data, steps.start.data
    np.testing.assert_allclose(newest["height"][:, 0], end.qpos[slid][:, 2], atol=1e-6)
    np.testing.assert_allclose(newest["angles"], end.qpos[slid][:, 7:], atol=1e-6)
    speeds = (end.qpos - start.qpos)[slid][:, 7:] / DT
    np.testing.assert_allclose(newest["speeds"], speeds, atol=1e-3)


def test_policy_is_its_own_mirror_image():
    """A command to the right is the left one's image; without the mirror it is not."""
    random = np.random.default_rng(0)
    env = make(Toy, SMALL)
    size = 9 + 3 * 12
    layers = {"w0": random.standard_normal((size, 5)), "b0": random.standard_normal(5)}
    layers |= {"w1": random.standard_normal((5, 12)), "b1": random.standard_normal(12)}
    stats = {"obs_mean": np.zeros(size), "obs_var": np.ones(size)}
    obs = random.standard_normal((40, size)).astype(np.float32)
    obs[:, 8] = np.where(np.arange(40) < 20, 0.0, obs[:, 8])  # without a turn, y decides
    image = amp.mirror_observation(G1, obs, np)
    for mirror in (True, False):
        args = dataclasses.replace(SMALL, mirror=mirror)
        policy = stats | layers | amp.mirror_rules(args, env.robot)
        _, action = amp.act(policy, (), obs)
        _, image_action = amp.act(policy, (), image)
        same = np.allclose(amp.mirror_actions(G1, image_action), action, atol=1e-4)
        assert same == mirror
        command = obs[:, 6:9] / np.array([2, 2, 0.25])
        shown = np.asarray(amp.in_mirror(args, command))
        np.testing.assert_array_equal(shown, (obs @ policy["mirror_when"]) > 0)
        assert shown.mean() == pytest.approx(0.5 * mirror, abs=0.2)


def test_export_knows_the_policy():
    """Unitree's scripts can run it: of what they tell a policy, the clock counts for nothing."""
    assert export.why_not(amp, "g1") is None and export.why_not(amp, "g1_29dof") is None
    translation = export.translate(amp, G1)
    assert translation.obs.shape == (47, 45) and not translation.obs[45:].any()
    np.testing.assert_allclose(translation.obs.sum(axis=0), 1)


# ---- Whole runs ----------------------------------------------------------------------------------
def watched_train(args: amp.Args, run_dir: Path | None = None):
    """The run's folder, its last state."""
    states = []
    real_save = amp.save

    def save(args, run_dir, state, policy):
        states.append(jax.tree.map(as_numpy, state))
        real_save(args, run_dir, state, policy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amp, "save", save)
        patch.setattr(amp, "Env", lambda args: make(Toy, dataclasses.replace(args, resume=None)))
        patch.setattr(amp, "judge", lambda *_: {"passed": False})
        run_dir, _ = amp.train(args, run_dir)
    return run_dir, states[-1]


@pytest.fixture(scope="module")
def trained(make_mesh, walk_file, tmp_path_factory):
    """A run on two devices, with a checkpoint after each of its four iterations."""
    make_mesh(2)
    runs = str(tmp_path_factory.mktemp("runs"))
    args = dataclasses.replace(
        SMALL,
        motion=(walk_file,),
        num_devices=2,
        checkpoint_every=1,
        critic_first=0.25,
        runs_dir=runs,
    )
    return watched_train(args)


def test_training_logs_and_learns(trained):
    """All tags are there, rewards are in their range, and everything has changed and is finite."""
    run_dir, state = trained
    log = EventAccumulator(str(run_dir))
    log.Reload()
    tags = set(log.Tags()["scalars"])
    wanted = {"reward/task", "reward/style", "losses/discriminator_loss", "losses/kl"}
    wanted |= {"losses/gradient_penalty", "charts/accuracy_real", "charts/accuracy_fake"}
    assert wanted <= tags
    for tag in ("reward/task", "reward/style", "charts/accuracy_real", "charts/accuracy_fake"):
        assert all(0 <= event.value <= 1 for event in log.Scalars(tag))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    # The actor waits for one iteration, whose KL divergence of 0 says nothing about its step size.
    rates = [event.value for event in log.Scalars("charts/learning_rate")]
    assert rates[1] == rates[0] != rates[2]
    assert log.Scalars("losses/kl")[0].value == 0
    learner = state.learner
    assert (
        learner.iteration == 4
        and learner.disc_opt_state.inner_state.count == 4 * amp.Args.disc_updates
    )
    assert learner.frame_stats.count == pytest.approx(4 * 2 * 96, rel=1e-3)
    assert state.replay.shape == (32, 2, 43) and (state.replay != 0).any(axis=(1, 2)).all()
    run = json.loads((run_dir / "run.json").read_text())
    assert len(run["reference"]) == 16


def test_resumed_is_uninterrupted(trained, tmp_path, capsys):
    """From the first checkpoint left, the run ends in the same state to the bit: discriminator, its
    optimiser, its statistics and the replay, too. A reference that has changed is told."""
    run_dir, state = trained
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy"))
    assert [int(file.stem) for file in amp.checkpoints(copy)] == [4, 3, 2]
    for file in amp.checkpoints(copy)[:2]:
        file.unlink()
    run = json.loads((copy / "run.json").read_text())
    run["reference"] = "another one"
    (copy / "run.json").write_text(json.dumps(run))
    _, resumed = watched_train(amp.read_run(copy), copy)
    assert "the reference has changed" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, state, resumed)


# ---- Bad calls -----------------------------------------------------------------------------------
def bad_files(folder: Path) -> None:
    """Files that are no reference of the G1, by what is wrong with them."""
    good = stand(G1, 20)
    write(folder / "joints.npz", good[:, :-1])
    write(folder / "short.npz", good[:3])
    write(folder / "nan.npz", np.where(good == good[0, 7], np.nan, good))
    write(folder / "quat.npz", good * 0.5)
    write(folder / "dt.npz", good, dt=-0.02)
    np.savez(folder / "lacks.npz", poses=good)
    np.savez(folder / "untimed.npz", qpos=good)
    np.savez(folder / "uneven.npz", qpos=good, times=np.geomspace(1, 2, 20))
    np.savez(folder / "times.npz", qpos=good, times=np.arange(7) * DT)
    (folder / "garbage.npz").write_bytes(b"garbage")
    (folder / "garbage.csv").write_text("a,b,c\n")
    (folder / "empty.csv").touch()
    np.savetxt(folder / "columns.csv", good, delimiter=",")
    write_json(folder / "legs.txt", [[0.0] * 19] * 20)
    (folder / "keys.json").write_text("{}")
    (folder / "list.json").write_text("[1, 2]")
    (folder / "motion.bvh").touch()
    (folder / "folder.npz").mkdir()


FILES = (
    *("joints.npz", "short.npz", "nan.npz", "quat.npz", "dt.npz", "lacks.npz", "uneven.npz"),
    *("untimed.npz", "times.npz"),
    *(
        "garbage.npz",
        "garbage.csv",
        "empty.csv",
        "columns.csv",
        "legs.txt",
        "keys.json",
        "list.json",
    ),
    *("motion.bvh", "folder.npz", "missing.npz"),
)
FLAGS = (
    *("--robot h1", "--num-frames 1", "--num-frames 5", "--task-share 1.5", "--disc-loss wgan"),
    *("--motion-weights 1", "--motion a.npz --motion-weights 1 2"),
    "--motion a.npz --motion-weights 0",
    *("--disc-batch-size 7", "--replay-added 1000", "--disc-hidden-sizes 0", "--grad-penalty -1"),
    *("--reference-starts 2", "--disc-updates 0"),
)


def refused(capsys, call: list[str], main=amp.main) -> str:
    """The line with which a call ends, by exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(call)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_bad_files_end_with_one_line(tmp_path, monkeypatch, capsys):
    """The line names the file; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    bad_files(tmp_path)
    before = set(tmp_path.rglob("*"))
    for name in FILES:
        error = refused(capsys, ["--robot", "g1", "--motion", name])
        assert "--motion" in error and name in error and len(error) > 30, error
    assert set(tmp_path.rglob("*")) == before
    assert "h1" not in refused(capsys, ["motion.bvh", "--robot", "g1"], show_motion.main)


@pytest.mark.parametrize("call", FLAGS)
def test_bad_flags_end_with_one_line(capsys, call):
    error = refused(capsys, call.split())
    flag = call.split()[-2] if call.count("--") == 1 else "--motion-weights"
    assert flag in error or flag.removeprefix("--") in error


def test_missing_reference_is_one_line(tmp_path, monkeypatch, capsys):
    """A robot without a reference of its own says how to get one."""
    for file in amp.MODELS.glob("*.xml"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(amp, "MODELS", tmp_path)
    error = refused(capsys, [])
    assert str(tmp_path / "motions" / "g1_29dof.npz") in error and "record_motion.py" in error


def draw_commands(args: amp.Args) -> np.ndarray:
    """4000 commands [4000, 3] of the training."""
    draw = partial(amp.Env.draw_command, types.SimpleNamespace(args=args))
    return np.asarray(run(jax.vmap(draw), jax.random.split(jax.random.key(0), 4000)))


def test_commands_along_one_axis():
    """As many as the flag says, a third of them along each, over its range but what is slow."""
    for share in (0.0, 0.6, 1.0):
        args = amp.Args(standing=0.0, one_axis=share)
        commands = draw_commands(args)
        for axis, (low, high) in enumerate((args.command_x, args.command_y, args.command_yaw)):
            others = np.delete(commands, axis, axis=1)
            alone = commands[(others == 0).all(axis=1) & (commands[:, axis] != 0), axis]
            rare = 0.1 * (1 - share)  # all three are drawn, and the others are slow
            assert share / 3 - 0.02 < len(alone) / 4000 < share / 3 + rare + 0.02
            if share:
                edge = 0.03 * (high - low)
                assert low <= alone.min() < low + edge and high - edge < alone.max() <= high
                assert 0.2 <= np.abs(alone).min() < 0.2 + edge
            if share == 1:  # as likely in each half of what is not slow
                assert np.mean(alone > (0.2 + high) / 2) == pytest.approx(
                    high / (high - low) / 2, abs=0.04
                )


# ---- Tools ---------------------------------------------------------------------------------------
def test_recorded_commands_cover_their_ranges():
    """Ends of each axis; of the others half along one axis; none slow, none to the right, none twice."""
    ranges = np.array([[-0.6, 1.0], [-0.4, 0.4], [-0.8, 0.8]])
    commands = record_motion.list_commands(ranges, 2000, slowest=0.2, seed=0)
    assert len(np.unique(commands, axis=0)) == len(commands) > 1900
    for end in (*np.diag([1.0, 0.4, 0.8]), [-0.6, 0, 0], [0.3, 0, 0], [0, 0.24, 0], [0, 0, 0.48]):
        assert (np.abs(commands - end).max(axis=1) < 1e-9).any()
    assert commands[:, 2].min() == 0 and (commands[commands[:, 2] == 0, 1] >= 0).all()
    np.testing.assert_allclose(commands.max(axis=0), [1.0, 0.4, 0.8], atol=1e-6)
    np.testing.assert_allclose(commands.min(axis=0), [-0.6, -0.4, 0.0], atol=0.01)
    speed, turn = np.linalg.norm(commands[:, :2], axis=1), commands[:, 2]
    assert commands.any(axis=1).all()
    assert speed[speed > 0].min() > 0.199 and turn[turn > 0].min() > 0.199
    # All three parts are 0 but the turn for 10% of the others, and nothing but the turn for 25%.
    for axis, rare in enumerate((0.0, 0.0, 0.5 * 0.1)):
        alone = (np.delete(commands, axis, axis=1) == 0).all(axis=1).mean()
        assert alone == pytest.approx(0.5 / 3 + rare, abs=0.03)


def test_smoothing():
    """Jitter goes, a steady motion stays, quaternions keep their norm."""
    poses = stand(G1, 50)
    poses[:, 0] = np.arange(50)
    poses[:, 3:7] = yaw_quat(0.05 * np.arange(50))
    np.testing.assert_allclose(record_motion.smooth_poses(poses, 0.0), poses, atol=1e-12)
    jitter = poses.copy()
    jitter[:, 9] += 0.1 * (-1.0) ** np.arange(50)
    calm = record_motion.smooth_poses(jitter, 2.0)
    assert np.abs(calm[10:-10, 9] - poses[10:-10, 9]).max() < 0.01
    np.testing.assert_allclose(calm[10:-10, :7], poses[10:-10, :7], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(calm[:, 3:7], axis=1), 1)


def test_a_policy_is_recorded(tmp_path, capsys):
    """From a run folder to a file that the script reads. A policy that falls is refused."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    shutil.copy(amp.MODELS.parent / "docs" / "g1_policy.npz", run_dir / "policy.npz")
    plain = amp.MODELS.parent / "ppo_mjx_unitree.py"
    settings = dataclasses.asdict(ppo_mjx_unitree.Args())
    (run_dir / "run.json").write_text(json.dumps({"script": plain.name, "args": settings}))
    out = tmp_path / "out.npz"
    call = [str(run_dir), "--out", str(out), "--seconds", "0.9", "--random", "0"]
    record_motion.main(call)
    assert "0% fallen" in capsys.readouterr().out
    clip = amp.resample(G1, amp.read_motion(G1, out))
    poses = clip.qpos
    np.testing.assert_array_equal(clip.command[-80:], np.tile(clip.command[-1], (80, 1)))
    assert not clip.command[0].any() and len(np.unique(clip.command, axis=0)) == 11
    # A period of the gait to stand and two to walk, less the start.
    assert len(poses) == 10 * (40 + 80) - 20 and out.stat().st_size < 150_000
    assert amp.check_clip(G1, poses)["slip"] < 0.3
    assert np.ptp(poses[:, 0]) > 0.2 and poses[:, 2].min() > 0.7
    # Torques of a robot that stands and walks, not of one that hangs: the targets carry it.
    controller = amp.make_controller(G1)
    torque = controller.stiffness * (clip.targets - poses[:, 7:])
    assert np.abs(torque).mean() > 3 and np.abs(torque).max() < 200

    alone = [str(run_dir / "policy.npz"), "--out", str(tmp_path / "same.npz"), *call[3:]]
    record_motion.main([*alone, "--robot", "g1"])
    for name, array in np.load(out).items():
        np.testing.assert_array_equal(array, np.load(tmp_path / "same.npz")[name])
    assert "--robot goes with" in refused(capsys, alone, record_motion.main)
    assert "there are g1," in refused(capsys, [*alone, "--robot", "g3"], record_motion.main)

    # The reference that ships is not overwritten unasked.
    assert "g1.npz is there already" in refused(capsys, [str(run_dir)], record_motion.main)

    policy = dict(np.load(run_dir / "policy.npz"))
    policy["b2"] = policy["b2"] + 5.0
    np.savez(run_dir / "policy.npz", **policy)
    assert "fell" in refused(capsys, call, record_motion.main)


def test_default_references_are_motions():
    """Each that ships is read, does not fall, and neither slips nor sinks much."""
    files = sorted((amp.MODELS / "motions").glob("*.npz"))
    assert files
    for file in files:
        robot = amp.ROBOTS[file.stem]
        found = amp.check_clip(robot, amp.resample(robot, amp.read_motion(robot, file)).qpos)
        soft = file.stem == "go2"  # its feet are 16 mm in the floor in the median
        assert found["fallen"] == 0
        assert found["slip"] < (0.4 if soft else 0.3)
        assert found["penetration"] < (0.06 if soft else 0.02)
        assert found["beyond"] < 0.05 and file.stat().st_size < 2_000_000
