"""Spheres on a heightfield in onekernel: contacts, accelerations and heights are C MuJoCo's; the
table of heights is an argument that stays in memory."""

from unittest import mock

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from mujoco import mjx
from mujoco.mjx._src import collision_driver

import onekernel
from onekernel import api, hfield, mjx as lean

SHAPE = (71, 61)
HALF = np.array([3.0, 3.5])  # m; cells of 0.1 m
RADIUS = 0.022
TOP = 2.0  # m, what MuJoCo scales heights by

BALL = f"""<mujoco>
  <asset><hfield name="ground" nrow="71" ncol="61" size="3 3.5 {TOP} 1"/></asset>
  <worldbody>
    <geom type="hfield" hfield="ground" pos=".5 .2 .1"/>
    <body><freejoint/><geom type="sphere" size="{RADIUS}"/></body>
  </worldbody>
</mujoco>"""

# A sledge on three spheres and a leg.
SLEDGE = f"""<mujoco>
  <option timestep=".005"/>
  <default><geom type="sphere" size="{RADIUS}" friction=".7"/></default>
  <asset><hfield name="ground" nrow="71" ncol="61" size="3 3.5 {TOP} 1"/></asset>
  <worldbody>
    <geom type="hfield" hfield="ground" pos=".5 .2 .1" euler="0 5 30"/>
    <body>
      <freejoint/>
      <inertial mass="2" pos="0 0 .05" diaginertia=".02 .03 .04"/>
      <geom pos=".15 .1 0" priority="1" friction=".4"/>
      <geom pos=".15 -.1 0" solref=".03 1"/>
      <geom pos="-.15 .1 0"/>
      <body pos="-.15 -.1 .1"><joint axis="0 1 0" damping=".1"/><geom pos="0 0 -.1"/></body>
    </body>
  </worldbody>
</mujoco>"""

random = np.random.default_rng(0)
GROUNDS = {
    "flat": np.full(SHAPE, 0.2),
    "slope": np.add.outer(0.01 * np.arange(71), -0.003 * np.arange(61)) + 0.2,
    "noise": random.uniform(0.0, 0.06, SHAPE),
    "stairs": np.broadcast_to(0.1 * (np.arange(61) // 3 % 8), SHAPE),
    "blocks": np.kron(random.uniform(0.0, 0.2, (24, 21)), np.ones((3, 3)))[:71, :61],
}
TILES = np.float32(np.stack(list(GROUNDS.values())))


def on_ground(text: str, heights: np.ndarray) -> tuple[mujoco.MjModel, mujoco.MjData]:
    """A model that stands on these heights, in C MuJoCo."""
    model = mujoco.MjModel.from_xml_string(text)
    model.hfield_data[:] = heights.ravel() / TOP
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    return model, data


def heights_below(heights: np.ndarray, places: np.ndarray) -> np.ndarray:
    """C MuJoCo's heights [N] of the ground at places [N, 2] of the field."""
    model, data = on_ground(BALL, heights)
    down = np.array([0.0, 0.0, -1.0])
    hits = []
    for place in places:
        start = data.geom_xpos[0] + [*place, 5.0]
        hits.append(5.0 - mujoco.mj_rayHfield(model, data, 0, start, down, None))
    return np.array(hits)


# Heights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ground", GROUNDS)
def test_heights_of_the_ground_are_c_mujocos(ground):
    places = random.uniform(-HALF, HALF, (500, 2))
    vertices = 0.9999 * np.round(places[:50], 1)
    places = np.concatenate([places, vertices])
    heights = jnp.asarray(GROUNDS[ground], jnp.float32)
    ours = hfield.ground_height(heights, HALF, jnp.asarray(places, jnp.float32))
    np.testing.assert_allclose(ours, heights_below(GROUNDS[ground], places), atol=2e-5)


def test_beyond_the_border_the_ground_goes_on():
    heights = jnp.asarray(GROUNDS["noise"], jnp.float32)
    places = jnp.array([[-9.0, -9.0], [9.0, 9.0], [3.0, 3.5]])
    ours = hfield.ground_height(heights, HALF, places)
    np.testing.assert_allclose(ours, [heights[0, 0], heights[-1, -1], heights[-1, -1]])


# Contacts of a sphere ---------------------------------------------------------------------------


@onekernel.compile
def touch(heights, centre):
    return hfield.touch(hfield.make_grid(heights, HALF), centre, RADIUS)


def touch_all(heights: np.ndarray, centres: np.ndarray) -> list[np.ndarray]:
    """dist, pos and normal of all spheres [N, 3]."""
    found = jax.vmap(touch, in_axes=(None, 0))(np.float32(heights), np.float32(centres))
    return [np.asarray(field) for field in found]


def c_contacts(model, data, centre) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """Distance, place and normal of C MuJoCo's contacts, in the field's frame, deepest first."""
    data.qpos[:3] = centre + data.geom_xpos[0]
    mujoco.mj_kinematics(model, data)
    mujoco.mj_collision(model, data)
    contacts = [(c.dist, c.pos - data.geom_xpos[0], c.frame[:3].copy()) for c in data.contact]
    return sorted(contacts, key=lambda contact: contact[0])


def check_contacts(ours: list[tuple], theirs: list[tuple]) -> None:
    """Each of ours is C's, the deepest is the deepest, and what is left out does not stand out."""
    assert ours and abs(ours[0][0] - theirs[0][0]) < 1e-6
    for dist, pos, normal in ours:
        errors = []
        for c_dist, c_pos, c_normal in theirs:
            error = np.abs(np.array([dist, *pos]) - [c_dist, *c_pos]).max()
            errors.append(max(error, 1e-2 * np.abs(normal - c_normal).max()))
        assert min(errors) < 2e-6
    if len(ours) < hfield.CONTACTS:
        dist, pos, normal = ours[0]
        for c_dist, c_pos, c_normal in theirs:
            # Horizontal: the side of one of C's prisms, within the ground.
            between = c_pos - c_normal * c_dist / 2 - (pos - normal * dist / 2)
            least = hfield.STANDS_OUT * RADIUS + 1e-6
            assert abs(c_normal[2]) < 1e-6 or normal @ between < least


@pytest.mark.parametrize("ground", GROUNDS)
def test_contacts_are_c_mujocos(ground):
    heights = GROUNDS[ground]
    model, data = on_ground(BALL, heights)
    centres = random.uniform(-0.95, 0.95, (400, 3))
    centres[:, :2] *= HALF
    # Every other one near a vertex, or the middle of an edge.
    centres[::2, :2] = np.round(20 * centres[::2, :2]) / 20 + random.uniform(-0.01, 0.01, (200, 2))
    above = RADIUS * random.uniform(0.5, 1.1, len(centres))
    centres[:, 2] = heights_below(heights, centres[:, :2]) + above

    seconds = 0
    for centre, *contacts in zip(centres, *touch_all(heights, centres), strict=True):
        ours = [contact for contact in zip(*contacts, strict=True) if contact[0] < -1e-6]
        theirs = c_contacts(model, data, centre)
        if not theirs:
            assert not ours
        elif theirs[0][0] < -1e-5:  # else rounding decides whether it touches
            check_contacts(ours, theirs)
        seconds += len(ours) > 1
    assert seconds > 5 if ground not in ("flat", "slope") else seconds == 0


def test_sphere_below_the_ground_is_pushed_straight_out():
    slope = np.array([0.03, -0.1, 1.0])
    slope /= np.linalg.norm(slope)
    places = random.uniform(-2.0, 2.0, (200, 2))
    depth = random.uniform(0.001, 0.05, 200)
    centres = np.column_stack([places, heights_below(GROUNDS["slope"], places) - depth])
    dist, _, normal = touch_all(GROUNDS["slope"], centres)
    np.testing.assert_allclose(dist[:, 0], -depth * slope[2] - RADIUS, atol=1e-5)
    np.testing.assert_allclose(normal[:, 0], np.broadcast_to(slope, (200, 3)), atol=1e-4)
    assert (dist[:, 1] > 0).all()


def test_beside_the_field_nothing_is_touched():
    centres = np.array([[3.01, 0.0, 0.2], [0.0, -3.51, 0.2], [-2.99, 3.49, 0.2]])
    dist, _, _ = touch_all(GROUNDS["flat"], centres)
    assert (dist[:2] > 1).all()
    assert dist[2, 0] == pytest.approx(-RADIUS, abs=1e-6)


# The whole step -----------------------------------------------------------------------------------


def make_step():
    """One world's accelerations: (all tiles, as shares of TOP, its tile, qpos, qvel) -> qacc."""
    model = mjx.put_model(mujoco.MjModel.from_xml_string(SLEDGE), impl="jax")
    template = mjx.make_data(model)

    @onekernel.compile
    def accelerate(tiles, tile, qpos, qvel):
        own = model.replace(hfield_data=tiles[tile].ravel())
        return lean.step(own, template.replace(qpos=qpos, qvel=qvel)).qacc

    return accelerate


def draw_states(model, data, count: int) -> tuple[np.ndarray, np.ndarray]:
    """qpos and qvel of sledges of which one sphere or more dips into the ground, by up to 3 mm."""
    turn = data.geom_xmat[0].reshape(3, 3)
    up = turn[:, 2]
    qpos = []
    for _ in range(count):
        place = turn @ [*random.uniform(-2.0, 2.0, 2), 0.0]
        attitude = [1, 0.04, 0.04, 1] * random.standard_normal(4)
        data.qpos[:] = [*place, *attitude / np.linalg.norm(attitude), random.uniform(-0.1, 0.1)]
        mujoco.mj_kinematics(model, data)
        depths = []
        for centre in data.geom_xpos[1:]:
            hit = mujoco.mj_rayHfield(model, data, 0, centre + 5.0 * up, -up, None)
            depths.append(5.0 + RADIUS - hit)
        data.qpos[:3] += up * (max(depths) - random.uniform(0.0, 0.003))
        qpos.append(data.qpos.copy())
    return np.float32(qpos), np.float32(0.3 * random.standard_normal((count, model.nv)))


def test_each_world_stands_on_its_tile_of_one_table():
    """Accelerations are C MuJoCo's, wherever C has no more contacts than we; nothing is copied."""
    accelerate = make_step()
    originals = [on_ground(SLEDGE, heights) for heights in TILES]
    states = [draw_states(*original, 40) for original in originals]
    qpos, qvel = map(np.concatenate, zip(*states, strict=True))
    chosen = np.repeat(np.arange(len(TILES)), 40)
    worlds = jax.jit(jax.vmap(accelerate, in_axes=(None, 0, 0, 0)))
    ours = np.asarray(worlds(TILES / TOP, chosen, qpos, qvel))

    compared = np.zeros(len(TILES), int)
    for world, tile in enumerate(chosen):
        model, data = originals[tile]
        mujoco.mj_resetData(model, data)
        data.qpos[:] = qpos[world]
        data.qvel[:] = qvel[world]
        mujoco.mj_forward(model, data)
        touching = [contact.geom2 for contact in data.contact]
        if touching and len(set(touching)) == len(touching):
            compared[tile] += 1
            error = np.abs(ours[world] - data.qacc).max() / (1 + np.abs(data.qacc).max())
            assert error < 1e-3, (world, tile)
    assert (compared > 5).all()

    (kernel,) = accelerate.kernels.values()
    graph = kernel.graph(api.default_platform())
    own = [buffer for buffer in graph.buffers if buffer.source != "input"]
    assert max(buffer.size for buffer in own) < TILES[0].size


def test_what_it_does_not_know_goes_to_mjx():
    model = mock.Mock(hfield_nrow=[9], hfield_ncol=[9], hfield_adr=[0], hfield_data=jnp.zeros(81))
    model.hfield_size = np.array([[4.0, 4.0, 1.0, 1.0]])
    key = mock.Mock(data_ids=(0, -1), subgrid_size=(3, 2))
    with mock.patch.object(hfield, "MJX_HFIELD_SPHERE") as own:
        found = hfield.hfield_sphere(model, None, key, jnp.array([[0, 1]]))
        assert found is own.return_value
    assert collision_driver._COLLISION_FUNC[hfield.HFIELD_SPHERE] is hfield.MJX_HFIELD_SPHERE
