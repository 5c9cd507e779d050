"""Rough ground for Unitree's robots: tiles and their heights, physics on them against C MuJoCo, falls above the ground,
the rule of the levels, training and resuming with them, and the test on rough ground."""

import dataclasses
import functools
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from jax.sharding import NamedSharding
from quick import QUICK, quick_kernels

import ppo_mjx_unitree as flat
import ppo_mjx_unitree_rough as rough

DOCS = Path(rough.__file__).with_name("docs")
ROBOT = rough.ROBOTS["go2"]
KINDS = list(rough.KINDS)
GROUND = np.asarray(rough.make_ground(jax.random.key(7)))
HEIGHTS = rough.BOTTOM + rough.TOP * GROUND.reshape(
    rough.LEVELS, len(KINDS), rough.SIZE, rough.SIZE
)
WORLDS = 16
FLOOR_DOWN = np.array([0.0, 0.0, -1.0])


def as_numpy(leaf) -> np.ndarray:
    """A copy, as the array itself may be donated."""
    return np.array(
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    )


def assert_same(first, second) -> None:
    """Bit for bit, NaN included."""
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(as_numpy(a), as_numpy(b)), first, second
    )


def run(function, *inputs):
    """Compile quickly and call."""
    return jax.jit(function).lower(*inputs).compile(QUICK)(*inputs)


def tile_of(level: int, kind: str) -> np.ndarray:
    return GROUND[rough.tile_number(level, KINDS.index(kind))]


def c_heights(original: rough.CMujocoEnv, places) -> np.ndarray:
    """C MuJoCo's heights of the ground at places [N, 2]."""
    heights = []
    for place in places:
        start = np.array([*place, 4.0])
        ray = mujoco.mj_rayHfield(
            original.model, original.data, original.floor, start, FLOOR_DOWN, None
        )
        heights.append(4.0 - ray)
    return np.array(heights)


@functools.cache
def original_env() -> rough.CMujocoEnv:
    env = rough.CMujocoEnv(ROBOT)
    env.reset(0)
    return env


def on_tile(tile) -> rough.CMujocoEnv:
    original_env().model.hfield_data[:] = tile
    return original_env()


# ---- Ground


def test_levels_are_legged_gyms():
    """Slopes, steps, noise and blocks of each level, by the numbers of the sources."""
    x = np.linspace(-4, 4, rough.SIZE)
    right, middle = x >= 0, rough.SIZE // 2
    for level, difficulty in enumerate(np.arange(10) / 9):
        line = {kind: HEIGHTS[level, number, middle, right] for number, kind in enumerate(KINDS)}
        steps = np.diff(line["stairs up"])
        np.testing.assert_allclose(steps[steps > 1e-5], 0.05 + 0.18 * difficulty, atol=1e-5)
        np.testing.assert_allclose(np.diff(np.flatnonzero(steps > 1e-5)), 3)  # 0.3 m
        np.testing.assert_allclose(line["stairs down"], -line["stairs up"], atol=1e-5)
        np.testing.assert_allclose(np.diff(line["slope up"])[12:], 0.04 * difficulty, atol=1e-5)
        np.testing.assert_allclose(line["slope down"], -line["slope up"], atol=1e-5)
        noise = HEIGHTS[level, KINDS.index("noise")]
        # In steps of 5 mm.
        assert -0.0026 < np.abs(noise).max() - (0.02 + 0.08 * difficulty) < 0.0026
        blocks = np.unique(HEIGHTS[level, KINDS.index("blocks")].round(5))
        top = 0.05 + 0.2 * difficulty
        np.testing.assert_allclose(blocks, [-top, -top / 2, 0, top / 2, top], atol=2e-5)
    assert 0 < GROUND.min() and GROUND.max() < 1
    assert sum(kind.share for kind in rough.KINDS.values()) == pytest.approx(1)


def test_the_middle_is_flat():
    """Where robots start, and as far as their feet reach, all tiles are at height 0."""
    inner = rough.OUT < rough.START_HALF + 0.45
    assert np.abs(HEIGHTS[:, :, inner]).max() < 1e-6


def test_ground_follows_from_its_key():
    np.testing.assert_array_equal(rough.make_ground(jax.random.key(7)), GROUND)
    other = np.asarray(rough.make_ground(jax.random.key(8))).reshape(HEIGHTS.shape)
    differs = (other != GROUND.reshape(HEIGHTS.shape)).any(axis=(0, 2, 3))
    assert [kind for kind, new in zip(KINDS, differs, strict=True) if new] == [
        "rough slope",
        "noise",
        "blocks",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_heights_are_c_mujocos(kind):
    random = np.random.default_rng(0)
    places = random.uniform(-3.99, 3.99, (300, 2))
    tile = tile_of(7, kind)
    ours = rough.ground_height(jnp.asarray(tile), jnp.asarray(places, jnp.float32))
    np.testing.assert_allclose(ours, c_heights(on_tile(tile), places), atol=1e-4)
    beyond = rough.ground_height(
        jnp.asarray(tile), jnp.array([[9.0, 0.0], [0.0, -9.0], [jnp.nan, 0.0]])
    )
    edge = HEIGHTS[7, KINDS.index(kind)]
    np.testing.assert_allclose(
        beyond[:2], [edge[rough.SIZE // 2, -1], edge[0, rough.SIZE // 2]], atol=1e-5
    )


def random_qpos(random, height: float = 0.3) -> np.ndarray:
    """A robot anywhere on a tile, with any heading, tilted a little: [19]."""
    heading = random.uniform(-np.pi, np.pi)
    tilt = random.uniform(-0.2, 0.2, 2)
    quat = np.zeros(4)
    mujoco.mju_euler2Quat(quat, np.array([heading, *tilt]), "zyx")
    place = random.uniform(-3, 3, 2)
    return np.concatenate([place, [height], quat, ROBOT.joint_array("default")])


def test_scan_is_around_the_robot():
    """Ahead and to the left of the base, as its heading says; the nine nearest are under it."""
    random = np.random.default_rng(0)
    tile = tile_of(9, "noise")
    original = on_tile(tile)
    for _ in range(20):
        qpos = random_qpos(random)
        original.data.qpos[:] = qpos
        mujoco.mj_kinematics(original.model, original.data)
        ahead = original.data.xmat[1].reshape(3, 3)[:2, 0]
        ahead = ahead / np.linalg.norm(ahead)
        left = np.array([-ahead[1], ahead[0]])
        places = [
            qpos[:2] + x * ahead + y * left
            for y in np.arange(-2, 3) / 5
            for x in np.arange(-3, 4) / 5
        ]
        scan = rough.scan_ground(jnp.asarray(tile), jnp.asarray(qpos, jnp.float32))
        np.testing.assert_allclose(scan, c_heights(original, places), atol=1e-4)
        near = [i for i, place in enumerate(places) if np.linalg.norm(place - qpos[:2]) < 0.29]
        assert len(near) == 9
        assert rough.under_robot(scan) == pytest.approx(np.mean(np.asarray(scan)[near]), abs=1e-6)
        assert original.under_robot() == pytest.approx(float(rough.under_robot(scan)), abs=1e-4)


def test_mirror_shows_the_scan_of_mirrored_ground():
    random = np.random.default_rng(0)
    # Cells without a twist, as their triangles have no mirror image.
    heights = np.add.outer(random.uniform(0.4, 0.5, rough.SIZE), random.uniform(0, 0.1, rough.SIZE))
    tile = np.float32(heights)
    where = rough.part_slices(ROBOT, rough.seen_parts(ROBOT, "critic"))["scan"]
    for _ in range(5):
        qpos = random_qpos(random)
        image = qpos * [1, -1, 1, 1, -1, 1, -1, *np.ones(12)]
        scan, other = (
            np.asarray(rough.scan_ground(jnp.asarray(ground), jnp.asarray(pose, jnp.float32)))
            for ground, pose in ((tile.ravel(), qpos), (tile[::-1].ravel(), image))
        )
        obs = np.zeros(
            sum(
                rough.part_width(ROBOT, part) for part in rough.seen_parts(ROBOT, "critic").values()
            )
        )
        obs[where] = scan
        mirrored = rough.mirror_observation(ROBOT, obs, np, who="critic")
        np.testing.assert_allclose(mirrored[where], other, atol=1e-4)
        assert not mirrored[: where.start].any() and not mirrored[where.stop :].any()
        assert np.abs(mirrored[where] - scan).max() > 0.01


def test_wider_soles_are_as_low():
    """The G1's spheres are wider than in the file, and reach as low in the foot's frame. All other shapes stay."""
    models = [rough.ROBOTS["g1"].model, flat.ROBOTS["g1"].model]
    _, soles = flat.find_feet(flat.ROBOTS["g1"], models[1])
    soles = soles.ravel()
    lowest = [
        model.geom_pos[soles] - np.outer(model.geom_size[soles, 0], [0, 0, 1]) for model in models
    ]
    np.testing.assert_allclose(*lowest, atol=1e-9)
    np.testing.assert_allclose(models[0].geom_size[soles, 0], 0.02)
    others = np.setdiff1d(np.flatnonzero(models[0].geom_bodyid > 0), soles)
    np.testing.assert_array_equal(*(model.geom_pos[others] for model in models))


# ---- Physics: the environment's step, compiled once


@pytest.fixture(scope="module")
def env() -> rough.Env:
    return rough.Env(rough.Args(robot="go2"))


@pytest.fixture(scope="module")
def step(env):
    """(states, actions, table of tiles) -> states, of WORLDS worlds."""
    program = jax.jit(jax.vmap(rough.kernel(env.step), in_axes=(0, 0, None)))

    def step(state, action, ground=GROUND):
        # test_onekernel_hfield.py compiles physics on uneven ground in full.
        with pytest.MonkeyPatch.context() as patch:
            quick_kernels(patch)
            return program(state, jnp.asarray(action, jnp.float32), jnp.asarray(ground))

    return step


@functools.cache
def make_reset(env):
    return jax.jit(jax.vmap(env.reset, in_axes=(0, None, 0, 0, None)))


def reset(env, levels, kinds, seed: int = 0, level: float = 1.0):
    """States of worlds on these tiles."""
    keys = jax.random.split(jax.random.key(seed), len(levels))
    with jax.disable_jit(False):
        program = make_reset(env)
        arguments = (
            keys,
            level,
            jnp.asarray(levels, jnp.int32),
            jnp.asarray(kinds, jnp.int32),
            jnp.asarray(GROUND),
        )
        return program(*arguments)


@pytest.fixture(scope="module")
def all_starts(env):
    """Ten starts on each tile."""
    numbers = np.repeat(np.arange(len(GROUND)), 10)
    return reset(env, numbers // len(KINDS), numbers % len(KINDS))


def test_nobody_spawns_inside_the_ground(all_starts):
    """No sole of a fresh robot touches the ground, and none is far above it; places and headings are all over."""
    original = original_env()
    qpos = np.asarray(all_starts.data.qpos)
    lowest = []
    for world, pose in enumerate(qpos):
        level, kind = (
            int(all_starts.info[name][world]) for name in ("ground_level", "ground_kind")
        )
        original.model.hfield_data[:] = GROUND[rough.tile_number(level, kind)]
        original.data.qpos[:] = pose
        mujoco.mj_kinematics(original.model, original.data)
        mujoco.mj_collision(original.model, original.data)
        assert original.data.ncon == 0, (level, KINDS[kind])
        soles = original.data.geom_xpos[original.soles.ravel()]
        lowest.append((soles[:, 2] - 0.022 - c_heights(original, soles[:, :2])).min())
    assert 0 < min(lowest) and max(lowest) < 0.3
    assert np.abs(qpos[:, :2]).max() <= 0.5 and (np.ptp(qpos[:, :2], axis=0) > 0.97).all()
    heading = np.arctan2(qpos[:, 6], qpos[:, 3]) * 2
    assert np.ptp(np.sin(heading)) > 1.99 and np.ptp(np.cos(heading)) > 1.99


def land(env, step, seed: int, steps: int):
    """Robots all over tiles of all kinds, so many control steps after they were dropped there."""
    random = np.random.default_rng(seed)
    levels, kinds = 3 + np.arange(WORLDS) % 3, np.arange(WORLDS) % len(KINDS)
    state = reset(env, levels, kinds, seed)
    qpos = np.array(state.data.qpos)
    for world, tile in enumerate(GROUND[rough.tile_number(levels, kinds)]):
        place = random.uniform(-2.8, 2.8, 2)
        around = place + 0.5 * random.uniform(-1, 1, (200, 2))
        qpos[world, :3] = *place, 0.34 + c_heights(on_tile(tile), around).max()
        qpos[world, 7:] = ROBOT.joint_array("default")
    qvel = jnp.zeros_like(state.data.qvel)
    state = state.replace(data=state.data.replace(qpos=jnp.asarray(qpos), qvel=qvel))
    for _ in range(steps):
        state = step(state, np.zeros((WORLDS, 12)))
    return state


def follow(env, start, action) -> tuple[np.ndarray, np.ndarray, bool, bool]:
    """C MuJoCo's control step of one world: qpos, qvel, whether its feet touch the ground, and whether each sphere has
    one contact at most throughout."""
    twin, contacts = rough.Twin(env, start), []
    twin.data.qpos[:], twin.data.qvel[:] = start.data.qpos, start.data.qvel
    shipped = mujoco.mj_step
    with pytest.MonkeyPatch.context() as patch:

        def step(model, data):
            shipped(model, data)
            contacts.append(data.contact.geom[data.contact.dist < 0][:, 1].tolist())

        patch.setattr(mujoco, "mj_step", step)
        twin.step(action)
    single = all(len(set(geoms)) == len(geoms) for geoms in contacts)
    return twin.data.qpos, twin.data.qvel, any(contacts), single


def test_step_is_c_mujocos(env, step, monkeypatch):
    """A control step on the same ground ends where C MuJoCo's does, to what float32 allows, where C has one contact a
    sphere at most. Elsewhere C has further ones, of triangles beside the deepest, and harder soles: it is near."""
    monkeypatch.setattr(env, "ground", GROUND)
    random = np.random.default_rng(2)
    near, exact, standing = [], [], 0
    for seed in range(5):
        states = land(env, step, seed, steps=4 + seed)
        action = random.uniform(-0.5, 0.5, (WORLDS, 12)).astype(np.float32)
        new = step(states, action)
        for world in range(WORLDS):
            start = jax.tree.map(lambda x, world=world: x[world], states)
            qpos, qvel, touching, single = follow(env, start, action[world])
            error = np.abs(np.asarray(new.data.qvel[world]) - qvel)
            (exact if single else near).append((error[:6].max(), error.max()))
            standing += touching and single
    near, exact = np.array(near), np.array(exact)
    assert len(exact) > 10 and standing > 0 and len(near) > 20
    assert exact.max() < 1e-3
    assert np.median(near[:, 0]) < 0.05 and near[:, 0].max() < 0.3  # m/s and rad/s, of the base


def test_ground_of_height_0_is_the_flat_scripts_floor(env, step, monkeypatch):
    """On ground of height 0 a step gives the flat script's numbers: motion, reward, all its terms and what is seen."""
    row = flat.ROBOTS["go2"]
    own = {field.name: getattr(ROBOT, field.name) for field in dataclasses.fields(row)}
    own["joints"] = row.joints
    monkeypatch.setitem(flat.ROBOTS, "go2", dataclasses.replace(row, **own))
    flat_env = flat.Env(flat.Args(robot="go2", push_speed=env.args.push_speed))
    flat_env.draw_command = env.draw_command  # there others go straight
    soles = flat_env.soles.ravel()
    flat_env.model = flat_env.model.replace(
        geom_solimp=flat_env.model.geom_solimp.at[soles].set(jnp.array(ROBOT.sole_solimp)),
        geom_solref=flat_env.model.geom_solref.at[soles].set(jnp.array(rough.SOLE_SOLREF)),
    )
    quick_kernels(monkeypatch)  # the flat script's: test_unitree.py compiles one in full
    flat_step = jax.jit(jax.vmap(flat.kernel(flat_env.step)))

    level = np.tile(rough.FLAT_GROUND, (len(GROUND), 1))
    state = reset(env, np.zeros(WORLDS, int), np.zeros(WORLDS, int))
    random = np.random.default_rng(0)
    names = flat.State.__dataclass_fields__.keys()
    contacts = 0
    for count in range(20):
        action = random.uniform(-1, 1, (WORLDS, 12)).astype(np.float32)
        before = flat.State(**{name: getattr(state, name) for name in names})
        before = before.replace(
            data=flat.Physics(**vars(state.data)),
            obs=state.obs | {"critic": state.obs["critic"][:, :50]},
        )
        state = step(state, action, level)
        if count % 5 != 4:
            continue
        theirs = flat_step(before, action)
        np.testing.assert_allclose(state.data.qpos, theirs.data.qpos, atol=2e-5)
        np.testing.assert_allclose(state.data.qvel, theirs.data.qvel, atol=5e-3)
        terms = [value for name, value in state.metrics.items() if name.startswith("reward_")]
        np.testing.assert_allclose(state.reward, np.maximum(sum(terms), 0), atol=1e-5)
        np.testing.assert_array_equal(state.done, theirs.done)
        for name, value in theirs.metrics.items():
            if name == "reward_swing_height":  # another one: see the test below
                continue
            np.testing.assert_allclose(
                state.metrics[name], value, rtol=2e-3, atol=1e-3, err_msg=name
            )
        np.testing.assert_allclose(state.obs["actor"], theirs.obs["actor"], atol=1e-3)
        scan = rough.part_slices(ROBOT, rough.seen_parts(ROBOT, "critic"))["scan"]
        seen = np.delete(state.obs["critic"], np.r_[scan], axis=1)
        np.testing.assert_allclose(seen, theirs.obs["critic"], atol=1e-3)
        heights = np.broadcast_to(
            np.asarray(state.data.qpos)[:, 2:3] - ROBOT.target_height, (WORLDS, 35)
        )
        np.testing.assert_allclose(state.obs["critic"][:, scan], heights, atol=1e-5)
        contacts += np.ptp(np.asarray(state.metrics["reward_gait"])) > 0
    assert contacts > 2


# ---- Episodes


def test_falls_are_measured_above_the_ground(env, step):
    """High up and deep down, a robot has fallen when its base is near the ground under it, and not before. In free
    fall with its legs up, nothing touches the ground."""
    up, down = KINDS.index("stairs up"), KINDS.index("stairs down")
    state = reset(env, np.full(WORLDS, 9), np.repeat([up, down], WORLDS // 2), level=0.0)
    legs = np.tile([0.0, 3.4, -0.85], 4)
    qpos = np.array(state.data.qpos)
    qpos[:, :2] = [3.0, 0.5]
    qpos[:, 3:7] = [1, 0, 0, 0]
    qpos[:, 7:] = legs
    scan = rough.scan_ground(jnp.asarray(tile_of(9, "stairs up")), jnp.asarray(qpos[0]))
    under = float(rough.under_robot(scan))
    assert 1.1 < under < 1.5
    above = np.tile([0.05, 0.1, 0.14, 0.16, 0.2, 0.3, 0.6, 0.9], 2)
    ground = under * np.repeat([1, -1], WORLDS // 2)
    qpos[:, 2] = ground + above
    np.testing.assert_array_equal(
        rough.has_fallen(ROBOT, qpos, ground, np), above < ROBOT.min_height
    )

    data = state.data.replace(qpos=jnp.asarray(qpos), qvel=jnp.zeros_like(state.data.qvel))
    hold = (legs - ROBOT.joint_array("default")) / ROBOT.action_scale
    new = step(state.replace(data=data), np.tile(hold, (WORLDS, 1)))
    assert np.abs(np.asarray(new.data.qpos)[:, 2] - qpos[:, 2]).max() < 0.005
    np.testing.assert_array_equal(new.done, above < ROBOT.min_height)
    assert not np.asarray(new.info["broken"]).any()


def test_feet_may_swing_higher_and_look_for_the_ground():
    """A foot pays for being lower than wanted in its swing; not for being higher, and not when it is due to land."""
    feet, joints = len(ROBOT.feet), np.zeros(len(ROBOT.joints))
    wanted = ROBOT.swing_height
    motion = rough.Motion(
        command=np.array([0.5, 0.0, 0.0]), height=ROBOT.target_height, velocity=np.zeros(3), rates=np.zeros(3),
        gravity=np.array([0.0, 0.0, -1.0]), angles=joints, speeds=joints, accelerations=joints, torque=joints,
        action=joints, action_before=joints, foot_height=np.array([wanted - 0.05, wanted + 0.05, wanted - 0.1, 0.02]),
        clearance=np.zeros(feet), foot_velocity=np.zeros((feet, 3)), contact=np.array([False, False, False, True]),
        stance=np.array([False, False, True, False]), flight=np.zeros(feet), capture_error=np.zeros(()))  # fmt: skip
    assert rough.unweighted_terms(ROBOT, motion)["swing_height"] == pytest.approx(0.05**2, rel=1e-4)
    standing = motion.replace(command=np.zeros(3))
    assert rough.unweighted_terms(ROBOT, standing)["swing_height"] == 0


def test_who_leaves_the_tile_is_at_a_time_limit(env, step):
    """Beyond 3.5 m from the middle along either axis the episode is truncated, not lost."""
    state = reset(env, np.zeros(WORLDS, int), np.zeros(WORLDS, int), level=0.0)
    qpos = np.array(state.data.qpos)
    qpos[:4, :2] = [[3.6, 0.0], [0.0, -3.6], [3.4, 3.4], [-3.4, -3.4]]
    new = step(
        state.replace(data=state.data.replace(qpos=jnp.asarray(qpos))), np.zeros((WORLDS, 12))
    )
    np.testing.assert_array_equal(new.info["truncated"][:4], [True, True, False, False])
    assert not np.asarray(new.done)[:4].any()


def test_only_what_is_walked_outside_the_middle_counts(env, step):
    """Command and progress are summed up beyond 1 m from the middle along either axis, and not before."""
    state = reset(env, np.zeros(WORLDS, int), np.zeros(WORLDS, int), level=0.0)
    qpos, qvel = np.array(state.data.qpos), np.array(state.data.qvel)
    qpos[:4, :2] = [[0.9, 0.0], [0.5, -0.9], [1.1, 0.0], [0.3, -1.1]]
    qpos[:, 3:7] = [1, 0, 0, 0]
    qvel[:] = 0
    qvel[:, 0] = 0.5
    info = state.info | {"command": jnp.tile(jnp.array([0.4, 0.0, 0.0]), (WORLDS, 1))}
    data = state.data.replace(qpos=jnp.asarray(qpos), qvel=jnp.asarray(qvel))
    new = step(state.replace(data=data, info=info), np.zeros((WORLDS, 12)))
    np.testing.assert_allclose(new.info["asked"][:4], [0, 0, 0.008, 0.008], atol=1e-6)
    walked = np.asarray(new.info["walked"])
    assert not walked[:2].any() and (walked[2:4] > 0.005).all()
    np.testing.assert_allclose(new.info["farthest"][:4], [0.91, 0.9, 1.11, 1.1], atol=5e-3)


def test_commands_to_go_straight():
    """As many as the flag says, over the whole range but what is slow."""
    args = dataclasses.replace(GLIDE, command_x=(-0.4, 1.0), straight=0.7, standing=0.1)
    keys = jax.random.split(jax.random.key(0), 4000)
    command = np.asarray(run(jax.vmap(Glider(args).draw_command), keys))
    speed = command[(command[:, 1] == 0) & (command[:, 0] != 0), 0]
    assert len(speed) / len(keys) == pytest.approx(0.7 * 0.9, abs=0.03)
    assert np.abs(speed).min() > 0.2
    assert -0.4 <= speed.min() < -0.38 and 0.98 < speed.max() <= 1.0
    assert (speed < 0).mean() == pytest.approx(0.4 / 1.4, abs=0.03)


def test_promotion_and_demotion_by_hand():
    """Level, walked, asked and farthest (m), fell -> level, where the random level is 6."""
    episodes = [
        (3, 2.6, 2.6, 3.5, False, 4),
        (3, 3.1, 4.0, 3.5, False, 4),  # three quarters
        (3, 2.9, 4.0, 3.5, False, 3),
        (3, 1.2, 1.2, 2.6, False, 4),
        (3, 4.0, 4.0, 2.4, False, 3),  # round and round, near the middle
        (3, 2.1, 4.0, 2.4, False, 3),
        (3, 1.9, 4.0, 2.4, False, 2),  # less than half
        (3, 1.9, 4.0, 3.5, False, 2),
        (3, 1.0, 1.0, 2.4, True, 2),  # fell
        (3, 1.9, 1.9, 2.6, True, 3),  # fell when it had crossed
        (3, 1.9, 4.0, 2.6, True, 2),
        (3, 0.0, 0.0, 0.9, True, 3),  # fell in the middle
        (0, 0.0, 4.0, 1.1, False, 0),
        (0, 0.1, 0.4, 1.2, True, 0),
        (5, 1.9, 1.9, 1.6, False, 5),  # too little was asked for
        (5, 0.0, 1.9, 1.6, False, 5),
        (9, 4.0, 4.0, 3.5, False, 6),  # solved
        (9, 0.0, 4.0, 1.4, False, 8),
    ]
    level, walked, asked, farthest, fell, expected = (
        np.array(column) for column in zip(*episodes, strict=True)
    )
    found = rough.next_ground_level(level, np.full(len(level), 6), walked, asked, farthest, fell)
    np.testing.assert_array_equal(found, expected)


class Glider(rough.Env):
    """A robot that glides on the ground, on all feet, with the velocity that its thighs and hips ask for."""

    time_limit = 40

    def advance(self, data, action, action_before, domain, tile):
        wanted = 0.5 * jnp.array([action[1::3].sum(), action[0::3].sum()])
        w, _, _, z = data.qpos[3:7]
        turn = jnp.array([[w * w - z * z, -2 * w * z], [2 * w * z, w * w - z * z]])
        velocity = turn @ jnp.clip(wanted, -2.0, 2.0)
        place = data.qpos[:2] + rough.CONTROL_DT * velocity
        height = rough.ground_height(tile, place) + self.robot.target_height
        qpos = data.qpos.at[:3].set(jnp.append(place, height))
        qvel = jnp.zeros_like(data.qvel).at[:2].set(velocity)
        readings = {
            "torque": jnp.zeros(12),
            "contact": jnp.full(4, True),
            "foot_height": jnp.zeros(4),
            "clearance": jnp.zeros(4),
            "foot_velocity": jnp.zeros((4, 3)),
            "capture_error": jnp.zeros(()),
        }
        return data.replace(qpos=qpos, qvel=qvel), readings


GLIDE = rough.Args(
    robot="go2",
    num_envs=64,
    num_steps=20,
    num_minibatches=4,
    total_timesteps=64 * 20 * 24,
    hidden_sizes=(16,),
    command_x=(0.5, 0.5),
    command_y=(0.3, 0.3),
    command_yaw=(0.0, 0.0),
    standing=0.0,
    straight=0.0,
    push_speed=0.0,
    imitation_coef=0.0,
    ent_coef=0.0,
    final_ent_coef=0.0,
    gamma=0.3,  # a step is worth what it earns at once
    init_log_std=-1.5,
    curriculum=0.0,
)


class Training(NamedTuple):
    """A short run: its levels after each iteration, its metrics, and its end."""

    levels: np.ndarray  # [iterations, N]
    metrics: list
    # States of the run and of one that was resumed, some iterations after a checkpoint.
    resumed: tuple
    rollout: tuple  # of the last iteration: worlds before, steps, worlds after


def compile_glider(env, mesh):
    """The first state and one iteration, compiled quickly; it tells its rollout's steps in place of a black box."""
    told, roll = [], rough.rollout

    def rollout(*inputs):
        worlds, steps = roll(*inputs)
        told[:] = [jax.tree.map(lambda x: x[None], steps)]  # of one device
        return worlds, steps

    shardings = jax.tree.map(partial(NamedSharding, mesh), rough.STATE_SPEC)
    init = jax.jit(partial(rough.init_train_state, GLIDE, env), out_shardings=shardings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rough, "kernel", lambda function: function)
        patch.setattr(rough, "LEAST_ASKED", 0.2)
        patch.setattr(rough, "CROSSED", 0.0)
        patch.setattr(rough, "JUDGED_FROM", -1.0)
        patch.setattr(rough, "rollout", rollout)
        patch.setattr(rough, "black_box", lambda *_: told[0])
        init = init.lower(jax.random.key(1)).compile(QUICK)
        state = init(jax.random.key(1))
        iterate = rough.train_iteration.lower(GLIDE, env, mesh, state).compile(QUICK)
    return partial(init, jax.random.key(1)), iterate


@pytest.fixture(scope="module")
def trained(make_mesh, tmp_path_factory) -> Training:
    start, iterate = compile_glider(Glider(GLIDE), make_mesh(1))
    folder = tmp_path_factory.mktemp("run")
    state, levels, metrics = start(), [], []
    for iteration in range(GLIDE.num_iterations):
        if iteration == 18:
            rough.save(GLIDE, folder, state, {})
        if iteration == 21:
            later = jax.tree.map(as_numpy, state)
        before = jax.tree.map(as_numpy, state.worlds)
        state, numbers = iterate(state)
        steps = numbers.pop("black_box")
        metrics.append(jax.device_get(numbers))
        levels.append(np.array(state.worlds.env_state.info["ground_level"]))

    resumed = rough.restore(GLIDE, folder, start())
    for _ in range(3):
        resumed, _ = iterate(resumed)
    worlds = jax.tree.map(as_numpy, state.worlds)
    steps = jax.tree.map(lambda x: as_numpy(x)[0], steps)
    return Training(
        np.array(levels), metrics, (later, jax.tree.map(as_numpy, resumed)), (before, steps, worlds)
    )


@pytest.mark.slow
def test_short_training_raises_the_levels(trained):
    """All begin on the easiest ground; who glides as commanded goes up. The log has the mean, and that of each kind."""
    assert trained.levels[0].max() <= 1 and trained.levels[:3].mean() < 0.1
    assert trained.levels[-1].mean() > 1
    for levels, metrics in zip(trained.levels, trained.metrics, strict=True):
        assert metrics["charts/ground_level"] == pytest.approx(levels.mean(), rel=1e-5, abs=1e-6)
    before, _, _ = trained.rollout
    kinds = before.env_state.info["ground_kind"]
    for number, kind in enumerate(KINDS):
        mean = trained.levels[-1][kinds == number].mean()
        assert trained.metrics[-1][f"ground/{kind.replace(' ', '_')}"] == pytest.approx(
            mean, rel=1e-5
        )


@pytest.mark.slow
def test_resumed_is_uninterrupted(trained):
    """Three iterations after a checkpoint all is the same to the bit, levels and ground included."""
    later, resumed = trained.resumed
    assert_same(later, resumed)
    assert np.ptp(later.worlds.env_state.info["ground_level"]) > 0
    np.testing.assert_allclose(
        later.learner.ground, rough.make_ground(jax.random.key(GLIDE.seed)), atol=1e-6
    )


@pytest.mark.slow
def test_levels_change_where_episodes_end(trained):
    """By the rule where one ends, and not before; the kind stays; the next episode's account starts at 0."""
    _, steps, worlds = trained.rollout
    starts, ends = steps.start, steps.end.env_state
    following = jax.tree.map(
        lambda x, last: np.concatenate([x[1:], last[None]]), starts.info, worlds.env_state.info
    )
    done = steps.done
    assert 0.01 < done.mean() < 0.2
    np.testing.assert_array_equal(following["ground_kind"], starts.info["ground_kind"])
    for name in ("ground_level", "walked", "asked", "farthest"):
        np.testing.assert_allclose(
            following[name][~done], ends.info[name][~done], rtol=1e-5, atol=1e-6
        )
        assert name == "ground_level" or not following[name][done].any()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rough, "LEAST_ASKED", 0.2)
        patch.setattr(rough, "CROSSED", 0.0)
        info = ends.info
        expected = rough.next_ground_level(
            info["ground_level"],
            -1,
            info["walked"],
            info["asked"],
            info["farthest"],
            steps.terminated,
        )
    solved = done & (np.asarray(expected) < 0)
    np.testing.assert_array_equal(
        following["ground_level"][done & ~solved], np.asarray(expected)[done & ~solved]
    )
    moved = following["ground_level"] != ends.info["ground_level"]
    assert moved[done].any()
    speed = np.linalg.norm(starts.info["command"][..., :2], axis=-1)
    asked = ends.info["asked"] - starts.info["asked"]
    np.testing.assert_allclose(asked, 0.02 * speed, atol=1e-5)
    heading = 2 * np.arctan2(ends.data.qpos[..., 6], ends.data.qpos[..., 3])
    velocity = ends.data.qvel[..., :2]
    turn = np.array([[np.cos(heading), np.sin(heading)], [-np.sin(heading), np.cos(heading)]])
    velocity = np.einsum("ij...,...j->...i", turn, velocity)
    along = (velocity * starts.info["command"][..., :2]).sum(axis=-1) / np.maximum(speed, 0.2)
    np.testing.assert_allclose(ends.info["walked"] - starts.info["walked"], 0.02 * along, atol=1e-5)


# ---- The test on rough ground


def test_a_start_of_the_test(monkeypatch):
    """It begins in the middle with its heading, goes on until the border, and a fall is a fall. Who does not get away
    from the middle is given up."""
    original = on_tile(tile_of(3, "stairs up"))
    seen, speed = [], [0.05]

    def step(self, action):
        """It glides ahead, at first by 5 cm a step."""
        ahead = self.data.xmat[1].reshape(3, 3)[:2, 0]
        self.data.qpos[:2] += speed[-1] * ahead
        seen.append(self.data.qpos[:2].copy())
        self.elapsed += 1
        left = bool(rough.has_left(self.data.qpos, np))
        return {
            "velocity": np.array([0.5, 0.0, 0.0]),
            "position": self.data.qpos[:2].copy(),
            "action": np.zeros(12),
            "power": 1.0,
            "slip": 0.0,
            "fallen": False,
            "left": left,
        }

    monkeypatch.setattr(rough.CMujocoEnv, "step", step)
    monkeypatch.setattr(rough, "act", lambda policy, memory, obs: (memory, np.zeros(12)))
    row = rough.drive(original, {}, start=3)
    heading = 2 * np.pi * 3 / rough.TEST_STARTS
    np.testing.assert_allclose(np.arctan2(*seen[-1][::-1]), heading, atol=1e-6)
    assert 3.5 < np.abs(seen[-1]).max() < 3.56 and len(seen) == len(set(map(tuple, seen)))
    assert row["falls"] == 0 and row["crossed"] == 1 and row["error"] == pytest.approx(0, abs=1e-9)
    for speed[-1], crossed, steps in ((0.0024, 0, 200), (0.0026, 0, 600), (0.01, 1, 351)):
        seen.clear()
        assert rough.drive(original, {}, start=0)["crossed"] == crossed and len(seen) == steps
    monkeypatch.setattr(rough.CMujocoEnv, "step", lambda *_: {"fallen": True})
    assert rough.drive(original, {}, start=0) == {"falls": 1}


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, True),
        ({(9, "blocks"): {"falls": 1}}, True),  # only levels 0 and 3 decide
        ({(3, "stairs up"): {"falls": 1}}, False),
        ({(0, "noise"): {"falls": 1}}, False),
        ({(3, "noise"): {"crossed": 0.0}}, False),
        ({(3, "noise"): {"error": 2.0}}, False),
        ({(0, "noise"): {"yaw": 3.0}}, False),
    ],
)
def test_verdict(monkeypatch, capsys, change, passed):
    good = dict.fromkeys(rough.TEST_COLUMNS, 0.0) | {"crossed": 1.0, "error": 0.1, "yaw": 0.1}
    table = np.asarray(rough.make_ground(jax.random.key(rough.TEST_SEED)))
    numbers = {tile.tobytes(): number for number, tile in enumerate(table)}

    def drive(original, policy, start):
        number = numbers[np.float32(original.model.hfield_data).tobytes()]
        level, kind = divmod(number, len(KINDS))
        own = change.get((level, KINDS[kind]), {})
        return {"falls": 1} if own.get("falls") and start == 4 else good | own

    monkeypatch.setattr(rough, "drive", drive)
    result = rough.judge(ROBOT, {})
    assert result["passed"] == passed
    assert len(result["table"]) == len(rough.TEST_LEVELS) * len(KINDS)
    assert ("PASS" if passed else "FAIL") in capsys.readouterr().out


@pytest.mark.parametrize("name", ["g1", "go2"])
def test_shipped_policy_climbs_stairs(name):
    """One start of the test on stairs up of level 3, steps of 0.11 m: no fall, and to the border in time."""
    robot = rough.ROBOTS[name]
    with np.load(DOCS / f"{name}_rough_policy.npz") as file:
        policy = dict(file)
    original = rough.CMujocoEnv(robot)
    tiles = np.asarray(rough.make_ground(jax.random.key(rough.TEST_SEED)))
    original.model.hfield_data[:] = tiles[rough.tile_number(3, KINDS.index("stairs up"))]
    result = rough.drive(original, policy, 1)
    assert result["falls"] == 0 and result["crossed"] == 1
    assert result["error"] < 0.2 and result["yaw"] < 0.25
