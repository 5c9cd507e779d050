"""MuJoCo XLA (MJX) with a lean constraint solver, for `onekernel.compile`.

    data = onekernel.mjx.step(model, data)       # in place of mujoco.mjx.step
    data = onekernel.mjx.forward(model, data)    # in place of mujoco.mjx.forward

MJX is written for XLA, which gives the same work to all worlds at once. A compiler that takes one
world apart into scalars, as onekernel does, rewards other things, and this file puts them in MJX's
place:

- work that few worlds need stands behind a condition (`jax.lax.cond`, `jax.lax.while_loop`), which
  onekernel makes a branch that is taken only if one of the 8 or 16 worlds of a vector wants it.
  Most of a robot's parts are far apart, and most of its contacts do not touch: these are skipped
  where collisions are computed, where constraints are built, and where they are solved;
- linear systems are solved by Cholesky's method from the last joint to the first. A robot is a
  tree, and in this order its limbs, which do not act on each other directly, stay apart in the
  factor, too (as in C MuJoCo's L'DL factor): its zeros are known beforehand and vanish from the
  program;
- the solver stops when it is done by a criterion that float32 can meet, mostly after one or two
  steps.

The results are MJX's to rounding, with two exceptions: `plane_capsule` and, in hfield.py,
`hfield_sphere` follow C MuJoCo where MJX does not. All of it is plain JAX and also right under
jax.jit and jax.vmap alone, but not faster than MJX. MJX itself is not changed: `lean` replaces some
of its functions while a function of MJX is traced.

Names: n degrees of freedom (nv), k rows of constraints (nefc). M: mass matrix (qM), J: the rows'
Jacobian (efc_J), all in SI units.
"""

import contextlib
import functools
import math
import threading
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx
from mujoco.mjx._src import (
    collision_driver,
    constraint,
    forward as mjx_forward,
    solver,
    support,
    types,
)

from onekernel import hfield

# What `lean` replaces, and calls where it does not know better.
MJX_SOLVE = solver.solve
MJX_MAKE_CONSTRAINT = constraint.make_constraint
MJX_COLLISIONS = dict(collision_driver._COLLISION_FUNC)

# MJX's functions are replaced for the whole process: one thread at a time.
TRACING = threading.RLock()

# Most conditions for work of one kind; where there is more to do, each is for several pieces of it.
# A condition takes about a millisecond to trace.
MOST_CONDITIONS = 150


def step(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """Advances one world by one physics step: mujoco.mjx.step with what `lean` replaces."""
    with lean():
        by_stages = model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4
        if by_stages and model.impl == types.Impl.JAX:  # MJX also hands models to other engines
            return runge_kutta(model, data)
        return mjx_forward.step(model, data)


def forward(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """Computes one world's accelerations and forces: mujoco.mjx.forward with what `lean`
    replaces."""
    with lean():
        return mjx_forward.forward(model, data)


# Runge and Kutta's method: each stage goes on from the start by a share of the time step, at the
# velocity and acceleration of the stage before, and has a weight in the step.
SHARES = (0.0, 0.5, 0.5, 1.0)
WEIGHTS = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


def runge_kutta(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """MJX's `step` by its Runge-Kutta integrator, with the four stages as one loop.

    MJX writes the first stage out and unrolls the others, so that the program holds the physics
    four times over; here it holds them once, which is as fast and takes a fraction of the time to
    compile.
    """

    def stage(carry, row):
        before, sums = carry
        share, weight = row

        def moved(change):
            # The first stage moves nothing. What it would move by is the last step's, and may be
            # broken.
            return jnp.where(share > 0, share * change, 0)

        change = (moved(before.qvel), moved(before.qacc), moved(before.act_dot))
        now = mjx_forward.forward(
            model,
            before.replace(
                qpos=mjx_forward._integrate_pos(model.jnt_type, data.qpos, change[0], timestep),
                qvel=data.qvel + change[1] * timestep,
                act=data.act + change[2] * timestep,
                time=data.time + share * timestep,
            ),
        )
        rates = (now.qvel, now.qacc, now.act_dot)
        sums = jax.tree.map(lambda total, rate: total + weight * rate, sums, rates)
        # The next stage is so near that its solver does best to start from this one's
        # accelerations.
        return (now.replace(qacc_warmstart=now.qacc), sums), None

    timestep = model.opt.timestep
    sums = jax.tree.map(jnp.zeros_like, (data.qvel, data.qacc, data.act_dot))
    tableau = jnp.array([SHARES, WEIGHTS], data.qvel.dtype).T
    (last, (velocity, acceleration, act_dot)), _ = jax.lax.scan(stage, (data, sums), tableau)
    last = last.replace(qpos=data.qpos, qvel=data.qvel, act=data.act, time=data.time)
    return mjx_forward._advance(model, last, act_dot, acceleration, velocity)


@contextlib.contextmanager
def lean():
    """Within it, functions of MJX are traced with this file's solver, algebra and corrections.

    They are traced in full precision, too: in TF32, which GPUs would use, physics are too rough.

    It may be entered within itself. It holds for all threads of the process, and lets one at a time
    in. `data._impl.qLD` is in another order within it, so `mujoco.mjx._src.smooth.solve_m` must not
    be used outside with what `factor_m` left within.
    """
    with (
        TRACING,
        jax.default_matmul_precision("highest"),
        mock.patch.object(jax.scipy.linalg, "cho_factor", cho_factor),
        mock.patch.object(jax.scipy.linalg, "cho_solve", cho_solve),
        mock.patch.dict(collision_driver._COLLISION_FUNC, COLLISIONS),
        mock.patch.object(support, "jac", jac),
        mock.patch.object(constraint, "make_constraint", make_constraint),
        mock.patch.object(solver, "solve", solve),
    ):
        yield


# Linear algebra -----------------------------------------------------------------------------------


def factor(matrix: jax.Array) -> jax.Array:
    """Cholesky's factor of a symmetric positive definite matrix [n, n], from its last row on.

    Only one triangle of the matrix is read. Returns L [n, n], lower triangular, where L L' is the
    matrix with its rows and columns in reverse order.
    """
    return jax.lax.linalg.cholesky(matrix[::-1, ::-1], symmetrize_input=False)


def solve_factored(lower: jax.Array, right: jax.Array) -> jax.Array:
    """x [n] of A x = right [n]; lower [n, n] is `factor(A)`."""

    def substitute(right, transpose):
        return jax.lax.linalg.triangular_solve(
            lower, right, left_side=True, lower=True, transpose_a=transpose
        )

    half_way = substitute(right[::-1, None], transpose=False)
    return substitute(half_way, transpose=True)[::-1, 0]


def cho_factor(matrix: jax.Array, lower: bool = False) -> tuple[jax.Array, bool]:
    """For MJX as jax.scipy.linalg.cho_factor; it uses the result for `cho_solve` and nothing
    else."""
    return factor(matrix), lower


def cho_solve(factored: tuple[jax.Array, bool], right: jax.Array) -> jax.Array:
    """For MJX as jax.scipy.linalg.cho_solve; right [n]."""
    return solve_factored(factored[0], right)


# Work that not all worlds need --------------------------------------------------------------------


def one_world(function, plain):
    """`function` as it is for one world, which is what onekernel traces; under jax.vmap, `plain`.

    Both compute the same. `function` puts its work behind conditions, piece by piece. Under
    jax.vmap that would save nothing, as both sides of a condition are computed then, and XLA would
    take minutes to compile the many pieces.
    """

    def chosen(*args):
        leaves, tree = jax.tree.flatten(args)

        @jax.custom_batching.custom_vmap
        def call(*leaves):
            return function(*jax.tree.unflatten(tree, leaves))

        @call.def_vmap
        def call_all(size: int, batched: list[bool], *leaves):
            def call_plain(*leaves):
                return plain(*jax.tree.unflatten(tree, leaves))

            axes = [0 if own else None for own in batched]
            results = jax.vmap(call_plain, in_axes=axes, axis_size=size)(*leaves)
            return results, jax.tree.map(lambda _: True, results)

        return call(*leaves)

    return chosen


def together(count: int) -> int:
    """How many of so many pieces of work to put behind one condition."""
    return math.ceil(count / MOST_CONDITIONS)


# Collisions ---------------------------------------------------------------------------------------


def if_near(collide, is_long: bool):
    """For MJX as its collision function `collide` of two kinds of geoms, but only for those that
    are so near that the spheres around them meet. C MuJoCo goes by the spheres, too.

    Of others, the contacts have the distance between the spheres, which is more than any margin,
    and zeros for place and frame.

    is_long: `collide` is a long program, so that one, in a loop over the pairs of geoms, has to do
    """

    def collide_near(model: mjx.Model, data: mjx.Data, key, geoms: jax.Array):
        def all_pairs(model, data, geoms):
            return collide(model, data, key, geoms)

        def near_pairs(model, data, geoms):
            margin = widest_margin(model)

            @jax.jit  # traced once for all blocks of the same size
            def block(geoms):
                first, second = geoms.T
                apart = length(data.geom_xpos[second] - data.geom_xpos[first])[:, 0]
                gap = apart - model.geom_rbound[first] - model.geom_rbound[second]
                distance = jnp.repeat(gap, collide.ncon)
                position = jnp.zeros((len(distance), 3), gap.dtype)
                frame = jnp.zeros((len(distance), 3, 3), gap.dtype)
                return jax.lax.cond(
                    (gap < margin).any(),
                    lambda: all_pairs(model, data, geoms),
                    lambda: (distance, position, frame),
                )

            if is_long:
                parts = jax.lax.map(block, geoms[:, None])
                return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), parts)
            size = together(len(geoms))
            blocks = [block(geoms[i : i + size]) for i in range(0, len(geoms), size)]
            return tuple(jnp.concatenate(part) for part in zip(*blocks, strict=True))

        return one_world(near_pairs, all_pairs)(model, data, geoms)

    collide_near.ncon = collide.ncon
    return collide_near


def widest_margin(model: mjx.Model) -> jax.Array:
    """No two geoms can touch at a greater distance, in m: []."""
    widest = 2 * jnp.max(model.geom_margin)
    return jnp.maximum(widest, jnp.max(model.pair_margin)) if model.npair else widest


def plane_capsule(model: mjx.Model, data: mjx.Data, key, geoms: jax.Array):
    """For MJX as its collision function of a plane and a capsule, with C MuJoCo's frame of
    contacts.

    C MuJoCo lays the pyramid of friction along the capsule, wherever it points; MJX turns it to the
    world's y axis if the capsule is steeper than 60 degrees. As a pyramid is not round, its
    friction differs then: a leg that stands upright slips otherwise than in C MuJoCo.

    geoms: [G, 2], of planes and capsules. Returns dist [2 G], pos [2 G, 3] and frame [2 G, 3, 3], a
    contact for each end of a capsule.
    """
    dist, pos, frame = MJX_COLLISIONS[PLANE_CAPSULE](model, data, key, geoms)
    normal = frame[:, 0]
    axis = jnp.repeat(data.geom_xmat[geoms[:, 1], :, 2], 2, axis=0)
    # A capsule that stands upright to 1e-6 has no direction in the plane. C MuJoCo takes the
    # world's x axis then, which also keeps a planar robot's friction in its plane. If that is the
    # normal, C's frame is degenerate; this one is not.
    x_axis, y_axis = jnp.eye(3, dtype=axis.dtype)[:2]
    fallback = jnp.where(jnp.abs(normal[:, :1]) < 0.9, x_axis, y_axis)
    along = in_plane(axis, normal)
    along = jnp.where(length(along) > 1e-6, along, in_plane(fallback, normal))
    along = along / length(along)
    return dist, pos, jnp.stack([normal, along, jnp.cross(normal, along)], axis=1)


def in_plane(vectors: jax.Array, normal: jax.Array) -> jax.Array:
    """vectors [G, 3] without their parts along the unit vectors normal [G, 3]."""
    return vectors - normal * (normal * vectors).sum(axis=1, keepdims=True)


def length(vectors: jax.Array) -> jax.Array:
    """[G, 3] -> [G, 1]"""
    return jnp.sqrt(jnp.square(vectors).sum(axis=1, keepdims=True))


PLANE_CAPSULE = (types.GeomType.PLANE, types.GeomType.CAPSULE)
plane_capsule.ncon = MJX_COLLISIONS[PLANE_CAPSULE].ncon

NO_SPHERE_AROUND = {types.GeomType.PLANE, types.GeomType.HFIELD}
ROUND = {types.GeomType.SPHERE, types.GeomType.CAPSULE}
COLLISIONS = {
    kinds: if_near(collide, is_long=not ROUND.issuperset(kinds))
    for kinds, collide in MJX_COLLISIONS.items()
    if not NO_SPHERE_AROUND & set(kinds)
}
COLLISIONS[PLANE_CAPSULE] = plane_capsule
COLLISIONS[hfield.HFIELD_SPHERE] = hfield.hfield_sphere


# Rows of constraints ------------------------------------------------------------------------------


def jac(model: mjx.Model, data: mjx.Data, point: jax.Array, body: jax.Array):
    """For MJX as support.jac: the Jacobians [n, 3] of a point of a body and of the body's rotation.

    MJX multiplies them by zero where a degree of freedom does not move the body. Here what they are
    computed from is zero, and so nothing is left of the computation in onekernel.
    """
    motion = data.cdof * jnp.asarray(moved_by(model))[body][:, None]
    arm = point - data.subtree_com[jnp.asarray(model.body_rootid)[body]]
    rotation = motion[:, :3]
    return motion[:, 3:] + jnp.cross(rotation, arm), rotation


def moved_by(model: mjx.Model) -> np.ndarray:
    """Which bodies are moved by which degrees of freedom: bool [bodies, n]."""
    moved = np.zeros((model.nbody, model.nv), bool)
    for body in range(1, model.nbody):  # parents come first
        moved[body] = moved[model.body_parentid[body]] | (model.dof_bodyid == body)
    return moved


def touches(contact) -> jax.Array:
    """Whether any of these contacts is close enough to make a force: bool []."""
    return (contact.dist - contact.includemargin < 0).any()


def rows_of(dims: np.ndarray, cone: int) -> int:
    """How many rows contacts of these dimensions have together."""
    if cone == mujoco.mjtCone.mjCONE_ELLIPTIC:
        return int(dims.sum())
    return int(np.where(dims == 1, 1, 2 * (dims - 1)).sum())


class Block(NamedTuple):
    """Contacts next to each other, of one dimension, whose work is behind one condition."""

    contacts: slice  # of data._impl.contact
    rows: slice  # of those of all contacts


def contact_blocks(model: mjx.Model, data: mjx.Data) -> list[Block]:
    dims = data._impl.contact.dim
    size = together(len(dims))
    blocks = []
    row = 0
    for dim in np.unique(dims):  # ascending, as MJX sorts them
        (contacts,) = np.nonzero(dims == dim)
        for first in range(contacts[0], contacts[-1] + 1, size):
            last = min(first + size, contacts[-1] + 1)
            count = rows_of(dims[first:last], model.opt.cone)
            blocks.append(Block(slice(first, last), slice(row, row + count)))
            row += count
    return blocks


def contacts_of(data: mjx.Data, chosen: slice):
    """Some of the contacts, but not where their rows are: so blocks of the same dimension and size
    are the same to jax.jit, which need not trace their work again."""
    contact = jax.tree.map(lambda field: field[chosen], data._impl.contact)
    dim = contact.dim[chosen]
    return contact.replace(dim=dim, efc_address=np.zeros_like(dim))


ROW_FIELDS = ("efc_J", "efc_D", "efc_aref", "efc_pos", "efc_margin", "efc_frictionloss")


def make_constraint(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """For MJX as constraint.make_constraint: the rows of all constraints.

    MJX builds the rows of all contacts and multiplies those of contacts that do not touch by zero.
    Here these are zeros from the start, and so are the other fields of a block that does not touch.
    """
    switched_off = mujoco.mjtDisableBit
    if model.opt.disableflags & switched_off.mjDSBL_CONSTRAINT or not len(data._impl.contact.dim):
        return MJX_MAKE_CONSTRAINT(model, data)
    fields = one_world(touching_rows, all_rows)(model, data)
    return data.tree_replace({f"_impl.{name}": field for name, field in fields.items()})


def all_rows(model: mjx.Model, data: mjx.Data) -> dict[str, jax.Array]:
    built = MJX_MAKE_CONSTRAINT(model, data)._impl
    return {name: getattr(built, name) for name in ROW_FIELDS}


def touching_rows(model: mjx.Model, data: mjx.Data) -> dict[str, jax.Array]:
    """The same, but zeros for blocks of contacts that do not touch."""
    switched_off = mujoco.mjtDisableBit
    others = switched_off.mjDSBL_EQUALITY | switched_off.mjDSBL_FRICTIONLOSS
    others |= switched_off.mjDSBL_LIMIT
    contacts_only = model.tree_replace({"opt.disableflags": model.opt.disableflags | others})

    def with_contacts(contact) -> mjx.Data:
        return data.tree_replace({"_impl.contact": contact})

    @jax.jit  # traced once for all blocks of the same dimension and size
    def build_block(contact):
        count = rows_of(contact.dim, model.opt.cone)
        nothing = {name: jnp.zeros(count, data.qpos.dtype) for name in ROW_FIELDS}
        nothing["efc_J"] = jnp.zeros((count, model.nv), data.qpos.dtype)
        return jax.lax.cond(
            touches(contact),
            lambda: all_rows(contacts_only, with_contacts(contact)),
            lambda: nothing,
        )

    no_contacts = contacts_of(data, slice(0))
    parts = [all_rows(model, with_contacts(no_contacts))]
    for block in contact_blocks(model, data):
        parts.append(build_block(contacts_of(data, block.contacts)))
    return {name: jnp.concatenate([part[name] for part in parts]) for name in ROW_FIELDS}


# Solver -------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """k rows of constraints that are treated alike and at once.

    A row is a spring between the acceleration that it aims at and the one along it: its force is
    D (aim - J a), within bounds that say what kind of constraint it is. The solver counts forces in
    units of the square root of D, accelerations in units of its inverse: so all springs are alike.

    lower: 0 for contacts and limits, minus the friction for dry friction, None for equalities.
    upper: the friction for dry friction, None for others.
    """

    jacobian: jax.Array  # [k, n] efc_J
    root: jax.Array  # [k] square root of efc_D
    aim: jax.Array  # [k] efc_aref
    lower: jax.Array | None  # [k] the least force, in those units
    upper: jax.Array | None  # [k] the greatest
    needed: jax.Array | None  # bool []: False if all rows are zero; None: always treat them

    def spring(self, acceleration: jax.Array) -> jax.Array:
        """The force [k] without bounds at an acceleration [n]."""
        return self.root * (self.aim - self.jacobian @ acceleration)

    def bounded(self, spring: jax.Array) -> jax.Array:
        """The force [k] within bounds."""
        if self.lower is not None:
            spring = jnp.maximum(spring, self.lower)
        if self.upper is not None:
            spring = jnp.minimum(spring, self.upper)
        return spring


def constraint_rows(model: mjx.Model, data: mjx.Data, by_blocks: bool) -> list[Rows]:
    """The rows of a world, in MJX's order: equalities, dry friction, limits, contacts.

    by_blocks: contacts by blocks that are needed only if they touch; else all of them at once
    """
    impl = data._impl
    friction = int(impl.ne)
    limits = friction + int(impl.nf)
    contacts = limits + int(impl.nl)
    root = jnp.sqrt(impl.efc_D)
    loss = impl.efc_frictionloss[friction:limits] / root[friction:limits]
    no_pull = jnp.zeros_like(root)

    def rows(chosen: slice, lower=None, upper=None, needed=None) -> Rows:
        return Rows(
            jacobian=impl.efc_J[chosen],
            root=root[chosen],
            aim=impl.efc_aref[chosen],
            lower=lower,
            upper=upper,
            needed=needed,
        )

    def one_sided(first: int, last: int, needed=None) -> Rows:
        return rows(slice(first, last), lower=no_pull[first:last], needed=needed)

    parts = [
        rows(slice(0, friction)),
        rows(slice(friction, limits), lower=-loss, upper=loss),
        one_sided(limits, contacts),
    ]
    if by_blocks:
        for contact, row in contact_blocks(model, data):
            needed = touches(contacts_of(data, contact))
            parts.append(one_sided(contacts + row.start, contacts + row.stop, needed))
    else:
        parts.append(one_sided(contacts, len(root)))
    return [part for part in parts if len(part.aim)]


def visit(parts: list[Rows], function, total, arrays: list, *shared):
    """Takes `function` to all rows, except those that are not needed.

    function: (rows, total, array, *shared) -> (total, array of these rows [k]); adds to the total
    total: what it adds to, a pytree
    arrays: what is known of the rows, a pytree for each of parts
    Returns the total and a list of the arrays for each of parts; zeros where rows were not needed.
    """
    results = []
    for rows, array in zip(parts, arrays, strict=True):
        total, result = if_needed(function, rows, total, array, *shared)
        results.append(result)
    return total, results


@functools.partial(jax.jit, static_argnums=0)  # traced once for all rows of the same number
def if_needed(function, rows: Rows, total, array, *shared):
    if rows.needed is None:
        return function(rows, total, array, *shared)

    def skip(rows, total, *_):
        return total, jnp.zeros_like(rows.aim)

    return jax.lax.cond(rows.needed, function, skip, rows, total, array, *shared)


# The functions that visit rows:


def linearise(rows: Rows, total, _, acceleration: jax.Array):
    """Adds to the gradient [n] and the Hessian [n, n] of the cost at an acceleration [n]. Returns
    the springs [k]."""
    gradient, hessian = total
    spring = rows.spring(acceleration)
    force = rows.bounded(spring)
    gradient = gradient - (rows.root * force) @ rows.jacobian
    held = jnp.where(force == spring, rows.root, 0)[:, None] * rows.jacobian
    return (gradient, hessian + held.T @ held), spring


class Ahead(NamedTuple):
    """The cost along a Newton step, at a share of it."""

    slope: jax.Array  # per share of the step
    curvature: jax.Array
    surprise: jax.Array  # how far forces are from what the step takes for granted, in sum
    force: jax.Array  # the forces, in sum


def whole_step(rows: Rows, total: Ahead, spring: jax.Array, step: jax.Array):
    """Adds what is at the end of a Newton step [n]. Returns how much it slackens the springs
    [k]."""
    change = rows.root * (rows.jacobian @ step)
    total, _ = part_of_step(rows, total, (spring, change), 1.0)
    return total, change


def part_of_step(rows: Rows, total: Ahead, known, share):
    """Adds what is at a share [] of a Newton step. known: the springs [k] at its start, and what
    `whole_step` returned. Returns the forces [k] there."""
    spring, change = known
    force = rows.bounded(spring)
    held = force == spring
    spring_there = spring - share * change
    force_there = rows.bounded(spring_there)
    held_there = force_there == spring_there
    # The Newton step takes it for granted that the same springs stay within their bounds.
    surprise = force_there - jnp.where(held, spring_there, force)
    more_held = held_there.astype(change.dtype) - held.astype(change.dtype)
    added = Ahead(
        slope=-change @ surprise,
        curvature=jnp.square(change) @ more_held,
        surprise=jnp.abs(surprise).sum(),
        force=jnp.abs(force_there).sum(),
    )
    return jax.tree.map(jnp.add, total, added), force_there


def pull(rows: Rows, total, _, acceleration: jax.Array):
    """Adds to the forces on the joints [n] at an acceleration [n]. Returns the rows' forces [k], in
    N or Nm."""
    force = rows.root * rows.bounded(rows.spring(acceleration))
    return total + force @ rows.jacobian, force


# A line search ends where no more than this is left of the slope that it began with. Closer
# searches did not save Newton steps.
SLOPE_LEFT = 0.1

# What rounding leaves of a Newton step, as a multiple of the number type's precision.
ROUNDING = 4.0


class Search(NamedTuple):
    """A line search: the share of a Newton step, what encloses the best share, the cost there."""

    share: jax.Array
    low: jax.Array
    high: jax.Array
    ahead: Ahead
    steps: jax.Array  # int32


class Solution(NamedTuple):
    acceleration: jax.Array  # [n] qacc
    iterations: jax.Array  # int32 [], Newton steps
    searches: jax.Array  # int32 [], steps of all line searches
    done: jax.Array  # bool [], False if the iterations did not suffice


def newton(
    mass: jax.Array,
    push: jax.Array,
    parts: list[Rows],
    start: jax.Array,
    iterations: int,
    ls_iterations: int,
    tolerance: jax.Array,
) -> Solution:
    """The accelerations that minimise MuJoCo's cost, by Newton's method.

    The cost is a' M a / 2 - push' a + the energies of the springs. It is convex, and quadratic in
    each region in which the same springs are within their bounds. Newton's step leads to the
    minimum of the region's quadratic. If that is in the region, it is the minimum of the cost,
    exactly. If not, a line search finds out how much of the step to take, and the next step begins
    there.

    The loops end at once for a world that is not finite: its neighbours need not wait for it.

    mass: M [n, n]. push: the other forces on the joints [n] (qfrc_smooth). start: first guess [n].
    iterations, ls_iterations: most Newton steps, and most steps of the line search in each
    tolerance: stop where less than this, times M's trace, is left to gain; MJX measures it so, too
    Source: https://mujoco.readthedocs.io/en/stable/computation/index.html, section "Algorithms"
    """
    zero = jnp.zeros((), start.dtype)
    least = tolerance * jnp.trace(mass)
    rounding = ROUNDING * jnp.finfo(start.dtype).eps
    nothing = [None] * len(parts)

    def iteration(carry):
        acceleration, _, steps, searches = carry
        rest = mass @ acceleration - push
        (gradient, hessian), springs = visit(parts, linearise, (rest, mass), nothing, acceleration)
        step = -solve_factored(factor(hessian), gradient)
        # Along the step, the slope of the region's quadratic rises from -descent to 0: its
        # curvature is descent, too. Rows add only what differs from it, which loses no digits near
        # the minimum.
        descent = -gradient @ step
        end = Ahead(slope=zero, curvature=descent, surprise=zero, force=zero)
        end, changes = visit(parts, whole_step, end, springs, step)

        search = line_search(
            parts, list(zip(springs, changes, strict=True)), end, descent, ls_iterations
        )

        # A whole step without surprises leads to the minimum. What rounding leaves of it can be
        # gained by another step, if that is much at all, as after a poor first guess.
        exact = (end.surprise <= rounding * end.force) & (search.share == 1)
        gained = search.share * descent / 2
        left = jnp.where(exact, rounding**2 * gained, gained)
        going = left > least  # False if not finite
        return acceleration + search.share * step, going, steps + 1, searches + search.steps

    def goes_on(carry):
        _, going, steps, _ = carry
        return going & (steps < iterations)

    first = (start, jnp.array(True), jnp.int32(0), jnp.int32(0))
    acceleration, going, steps, searches = jax.lax.while_loop(goes_on, iteration, first)
    return Solution(acceleration, steps, searches, done=~going)


def line_search(
    parts: list[Rows], known: list, end: Ahead, descent: jax.Array, ls_iterations: int
) -> Search:
    """How much of a Newton step to take: all of it, unless the slope there is too steep.

    known: see `part_of_step`. end: what is at the end of the step. descent: minus the slope at its
    start. The slope's root is found by Newton's method, too, within what is known to enclose it.
    """
    zero = jnp.zeros_like(descent)

    def goes_on(search: Search):
        steep = jnp.abs(search.ahead.slope) > SLOPE_LEFT * descent  # False if not finite
        return steep & (search.steps < ls_iterations)

    def improve(search: Search) -> Search:
        share, low, high, ahead, steps = search
        low = jnp.where(ahead.slope < 0, share, low)
        high = jnp.where(ahead.slope < 0, high, share)
        middle = jnp.where(jnp.isinf(high), 2 * share, (low + high) / 2)
        share = share - ahead.slope / ahead.curvature
        share = jnp.where((share > low) & (share < high), share, middle)
        ahead = Ahead(slope=(share - 1) * descent, curvature=descent, surprise=zero, force=zero)
        ahead, _ = visit(parts, part_of_step, ahead, known, share)
        return Search(share, low, high, ahead, steps + 1)

    whole = Search(
        share=jnp.ones_like(zero),
        low=zero,
        high=jnp.full_like(zero, jnp.inf),
        ahead=end,
        steps=jnp.int32(0),
    )
    return jax.lax.while_loop(goes_on, improve, whole)


def solve(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """For MJX as solver.solve: sets qacc, qfrc_constraint and efc_force.

    MJX's own function solves what this one does not know: elliptic cones, and the method of
    conjugate gradients. Reverse-mode differentiation is refused by JAX, as for MJX's.
    """
    known = model.opt.cone == mujoco.mjtCone.mjCONE_PYRAMIDAL
    known &= model.opt.solver == mujoco.mjtSolver.mjSOL_NEWTON
    if not known:
        return MJX_SOLVE(model, data)
    by_blocks = functools.partial(solution_fields, by_blocks=True)
    at_once = functools.partial(solution_fields, by_blocks=False)
    return data.tree_replace(one_world(by_blocks, at_once)(model, data))


def solution_fields(model: mjx.Model, data: mjx.Data, by_blocks: bool) -> dict[str, jax.Array]:
    """What `solve` sets. by_blocks: see `constraint_rows`."""
    parts = constraint_rows(model, data, by_blocks)
    solution = newton(
        support.full_m(model, data),
        data.qfrc_smooth,
        parts,
        first_guess(model, data),
        model.opt.iterations,
        model.opt.ls_iterations,
        model.opt.tolerance,
    )
    no_force = jnp.zeros_like(data.qfrc_smooth)
    nothing = [None] * len(parts)
    pulled, forces = visit(parts, pull, no_force, nothing, solution.acceleration)
    return {
        "qacc": solution.acceleration,
        "qfrc_constraint": pulled,
        "_impl.efc_force": jnp.concatenate(forces),
    }


def first_guess(model: mjx.Model, data: mjx.Data) -> jax.Array:
    """Accelerations [n] for the solver to start from: those of the last step.

    MJX takes those without constraints where they cost less. That would save next to no steps here
    and cost more than it saves. They serve only if the last step's are broken, by C MuJoCo's
    measure.
    """
    if model.opt.disableflags & mujoco.mjtDisableBit.mjDSBL_WARMSTART:
        return data.qacc_smooth
    sane = (jnp.abs(data.qacc_warmstart) < mujoco.mjMAXVAL).all()
    return jnp.where(sane, data.qacc_warmstart, data.qacc_smooth)
