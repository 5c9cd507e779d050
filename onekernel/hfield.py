"""Spheres on a heightfield for `onekernel.mjx`, and the height of the ground at a place.

MJX takes a sphere and a heightfield for a sphere and eight prisms or more, with all their faces.
For a robot with spheres under its feet that is twice the work of all the rest of its physics. This
file looks at the surface alone: a sphere that is small beside the field's cells reaches no further
than eight triangles and the eight edges between them, and nine heights are all that it needs.

The heights may be an argument of a compiled function. A table of more than 4096 heights stays where
it is, one for all worlds if they share it, and the kernel reads the nine that it wants: so new
ground takes no compiling.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from mujoco import mjx
from mujoco.mjx._src import collision_driver, types

HFIELD_SPHERE = (types.GeomType.HFIELD, types.GeomType.SPHERE)
MJX_HFIELD_SPHERE = collision_driver._COLLISION_FUNC[HFIELD_SPHERE]

# Contacts of a sphere with the ground, of the MJX_HFIELD_SPHERE.ncon that MJX has room for. Two are
# for a step's tread and riser; a third would be for a corner of three walls.
CONTACTS = 2
# Another contact counts if it stands out of the tangent plane of the one before by this, in radii.
STANDS_OUT = 0.1
NOTHING = 1e3  # m and m²: further than any contact
TOO_NEAR = 1e-7  # m, from the centre to the surface: rounding decides where that is


class Grid(NamedTuple):
    """A heightfield in its own frame: x along columns, y along rows, z up; the origin is its
    middle."""

    heights: jax.Array  # [rows, columns], as shares of the top
    top: float  # m
    cell: np.ndarray  # [2] m, the width of a cell along x and y
    half: np.ndarray  # [2] m, half of the field's width


def make_grid(heights: jax.Array, half: np.ndarray, top: float = 1.0) -> Grid:
    """heights: [rows, columns]. half [2] m and top m: the first three of MuJoCo's hfield_size."""
    rows, columns = heights.shape
    cell = 2 * half / np.array([columns - 1, rows - 1])
    return Grid(heights=heights, top=top, cell=cell, half=half)


def grid_of(model: mjx.Model, number: int) -> Grid:
    """The model's heightfield of this number. Nothing is done to all of its heights: they are many,
    and the kernel would do it in each step."""
    shape = (int(model.hfield_nrow[number]), int(model.hfield_ncol[number]))
    first = int(model.hfield_adr[number])
    table = model.hfield_data[first : first + shape[0] * shape[1]].reshape(shape)
    size = model.hfield_size[number]
    return make_grid(table, size[:2], float(size[2]))


def ground_height(heights: jax.Array, half: np.ndarray, places: jax.Array) -> jax.Array:
    """The height of C MuJoCo's surface: [...] m. Beyond the border it goes on as at the border.

    Each cell is two triangles, divided from its corner of lowest x and y to the opposite one.

    heights: [rows, columns] m; half: [2] m, half of the field's width; places: [..., 2] m, from its
        middle
    """
    grid = make_grid(heights, half)
    last = np.array(heights.shape[::-1]) - 1
    steps = jnp.clip((places + grid.half) / grid.cell, 0, last)
    first = jnp.minimum(jnp.floor(steps), last - 1)
    along_x, along_y = jnp.moveaxis(steps - first, -1, 0)
    column, row = jnp.moveaxis(first.astype(jnp.int32), -1, 0)

    def corner(right: int, up: int) -> jax.Array:
        found = heights.at[row + up, column + right]
        return found.get(mode="clip", wrap_negative_indices=False)

    low = corner(0, 0)
    high = corner(1, 1)
    right = corner(1, 0)
    left = corner(0, 1)
    by_right = low + along_x * (right - low) + along_y * (high - right)
    by_left = low + along_y * (left - low) + along_x * (high - left)
    return jnp.where(along_x > along_y, by_right, by_left)


# A vertex of the grid and its eight neighbours, by rows from the one of lowest x and y: the vertex
# itself is number 4.
VERTICES = np.array([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)])  # [9, 2] cells
# [8, 3], counterclockwise as seen from above. Those around the vertex begin with it: its place is
# 0, and so nothing is left of what is multiplied by it.
TRIANGLES = np.array(
    [(4, 0, 1), (4, 3, 0), (4, 1, 5), (4, 7, 3), (4, 5, 8), (4, 8, 7), (1, 2, 5), (3, 7, 6)]
)
# [8, 2], those between the triangles; the outer ones are out of reach.
EDGES = np.array([(4, 1), (4, 3), (4, 5), (4, 7), (0, 4), (4, 8), (3, 7), (1, 5)])


class Points(NamedTuple):
    """Points of the ground that a sphere may touch, in a frame of the heightfield's axes."""

    square: jax.Array  # [N] m², of the distance to the sphere's centre; negative if that is below
    place: jax.Array  # [N, 3] m


def on_faces(corners: jax.Array, centre: jax.Array) -> Points:
    """The points of triangles nearest to the centre [3], where they are not on their edges.

    Below its own triangle, the centre is pushed straight out of it, and other triangles are left
    alone.

    corners: [N, 3, 3] m
    """
    sides = jnp.roll(corners, -1, axis=1) - corners
    normal = jnp.cross(sides[:, 0], sides[:, 1])
    rise = (normal * (centre - corners[:, 0])).sum(axis=1)  # height times the normal's length
    share = rise / jnp.square(normal).sum(axis=1)
    # What has to be within the triangle, seen from above: the nearest point or the centre.
    seen = centre - jnp.maximum(share, 0)[:, None] * normal
    arm = seen[:, None] - corners
    within = (sides[..., 0] * arm[..., 1] - sides[..., 1] * arm[..., 0] >= 0).all(axis=1)
    return Points(
        square=jnp.where(within, jnp.abs(rise) * share, NOTHING),
        place=centre - share[:, None] * normal,
    )


def on_edges(starts: jax.Array, ends: jax.Array, centre: jax.Array) -> Points:
    """The points of edges nearest to the centre [3]. starts, ends: [N, 3] m"""
    along = ends - starts
    share = ((centre - starts) * along).sum(axis=1) / jnp.square(along).sum(axis=1)
    place = starts + jnp.clip(share, 0, 1)[:, None] * along
    return Points(square=jnp.square(centre - place).sum(axis=1), place=place)


def nearest(points: Points) -> Points:
    """The nearest of N points, where N is a power of two: Points without their first axis."""
    while len(points.square) > 1:
        half = len(points.square) // 2
        first = Points(*(field[:half] for field in points))
        second = Points(*(field[half:] for field in points))
        closer = second.square < first.square
        points = Points(
            square=jnp.where(closer, second.square, first.square),
            place=jnp.where(closer[:, None], second.place, first.place),
        )
    return Points(*(field[0] for field in points))


def touch(grid: Grid, centre: jax.Array, radius: jax.Array):
    """The contacts of a sphere with the ground.

    The first is the nearest point of the ground. Each other one is the nearest of those that stand
    out of the tangent planes of all before it.

    centre: [3] m, in the field's frame; radius: [] m, at most half of a cell
    Returns dist [CONTACTS] m, pos [CONTACTS, 3] m and normal [CONTACTS, 3].
    """
    rows, columns = grid.heights.shape
    off = (jnp.abs(centre[:2]) > grid.half).any()
    vertex = jnp.round((centre[:2] + grid.half) / grid.cell)
    vertex = jnp.clip(vertex, 1, np.array([columns - 2, rows - 2]))
    column, row = vertex.astype(jnp.int32)
    around = grid.top * jax.lax.dynamic_slice(grid.heights, (row - 1, column - 1), (3, 3))
    # All is seen from the vertex, so that no digits are lost at the far end of a large field.
    origin = jnp.append(vertex * grid.cell - grid.half, around[1, 1])
    centre = centre - origin
    flat = jnp.asarray(VERTICES * grid.cell, around.dtype)
    rise = (around - around[1, 1]).reshape(9, 1)
    vertices = jnp.concatenate([flat, rise], axis=1)

    faces = on_faces(vertices[TRIANGLES], centre)
    edges = on_edges(vertices[EDGES[:, 0]], vertices[EDGES[:, 1]], centre)
    points = Points(*map(jnp.concatenate, zip(faces, edges, strict=True)))
    points = points._replace(square=jnp.where(off, NOTHING, points.square))

    contacts = []
    for _ in range(CONTACTS):
        best = nearest(points)
        distance = jnp.sign(best.square) * jnp.sqrt(jnp.abs(best.square))
        # A centre on the surface has no direction to it; the ground is taken to be level there.
        level = jnp.abs(distance) < TOO_NEAR
        normal = (centre - best.place) / jnp.where(level, 1.0, distance)
        normal = jnp.where(level, jnp.array([0.0, 0.0, 1.0]), normal)
        between = centre - normal * (radius + distance) / 2
        contacts.append((distance - radius, between + origin, normal))
        stands_out = ((points.place - best.place) * normal).sum(axis=1) > STANDS_OUT * radius
        points = points._replace(square=jnp.where(stands_out, points.square, NOTHING))
    return tuple(map(jnp.stack, zip(*contacts, strict=True)))


def frame_of(normal: jax.Array) -> jax.Array:
    """MJX's make_frame for a normal [3] of length 1: [3, 3], whose rows are the axes."""
    axis = jnp.where(
        jnp.abs(normal[1]) < 0.5, jnp.array([0.0, 1.0, 0.0]), jnp.array([0.0, 0.0, 1.0])
    )
    along = axis - normal * (normal * axis).sum()
    along = along * (1 / jnp.sqrt(jnp.square(along).sum()))
    return jnp.stack([normal, along, jnp.cross(normal, along)])


def hfield_sphere(model: mjx.Model, data: mjx.Data, key, geoms: jax.Array):
    """For MJX as its collision function of a heightfield and a sphere.

    C MuJoCo makes a contact of every triangle that a sphere reaches. Beside the deepest one, those
    of flat or convex ground are no obstacles of their own: what does not stand out of its tangent
    plane is left out here. The others have C's distances, places and frames. Limits:

    - a sphere has CONTACTS contacts at most, the deepest;
    - where spheres sink in by a good part of their radius, C's further contacts carry much of the
      weight, and motion differs: at 0.5 mm of 5 by a millimetre after 0.5 s, at 10 mm of 22 by
      decimetres;
    - a sphere whose centre is below the ground is pushed out of the triangle that it is under, not
      sideways into the next one as in C;
    - a sphere is off the field as soon as its centre is;
    - a sphere that is wider than a cell goes to MJX's own function.

    geoms: [G, 2], of heightfields and spheres. Returns dist [4 G], pos [4 G, 3], frame [4 G, 3, 3];
    those that MJX has room for and this function no need of are far away.
    """
    grid = grid_of(model, key.data_ids[0])
    if max(key.subgrid_size) > 2 or min(grid.heights.shape) < 3:
        return MJX_HFIELD_SPHERE(model, data, key, geoms)
    spare = MJX_HFIELD_SPHERE.ncon - CONTACTS

    def collide(field: jax.Array, sphere: jax.Array):
        turn = data.geom_xmat[field]
        centre = turn.T @ (data.geom_xpos[sphere] - data.geom_xpos[field])
        dist, pos, normal = touch(grid, centre, model.geom_size[sphere, 0])
        pos = pos @ turn.T + data.geom_xpos[field]
        frame = jax.vmap(frame_of)(normal @ turn.T)
        far = jnp.full(spare, NOTHING)
        return (
            jnp.concatenate([dist, far]),
            jnp.pad(pos, ((0, spare), (0, 0))),
            jnp.pad(frame, ((0, spare), (0, 0), (0, 0))),
        )

    return jax.tree.map(jnp.concatenate, jax.vmap(collide)(*geoms.T))


hfield_sphere.ncon = MJX_HFIELD_SPHERE.ncon
