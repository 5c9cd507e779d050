"""MuJoCo XLA (MJX) with a lean constraint solver, for `onekernel.compile`.

    data = onekernel.mjx.step(model, data)       # in place of mujoco.mjx.step
    data = onekernel.mjx.forward(model, data)    # in place of mujoco.mjx.forward

MJX is written for XLA, which gives the same work to all worlds at once. A compiler that takes one world
apart into scalars, as onekernel does, rewards other things, and this file puts them in MJX's place:

- work that few worlds need stands behind a condition (`jax.lax.cond`, `jax.lax.while_loop`), which
  onekernel makes a branch that is taken only if one of the 8 or 16 worlds of a vector wants it. Most
  contacts of a robot do not touch most of the time; their rows are neither built nor solved;
- linear systems are solved by Cholesky's method from the last joint to the first. A robot is a tree, and
  in this order its limbs, which do not act on each other directly, stay apart in the factor, too (as in
  C MuJoCo's L'DL factor): its zeros are known beforehand and vanish from the compiled program;
- the solver stops when it is done by a criterion that float32 can meet, mostly after one or two steps.

The results are MJX's to rounding, but for `plane_capsule`, which follows C MuJoCo where MJX does not.
All of it is plain JAX and is right under jax.jit and jax.vmap alone, only not fast. MJX itself is not
changed: `lean` replaces some of its functions while a function of MJX is traced.

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
from mujoco.mjx._src import collision_driver, constraint, forward as mjx_forward, solver, support

MOST_BLOCKS = 200  # of contacts, each behind a condition; more of them would be long to trace

# What `lean` replaces, and calls where it does not know better.
MJX_SOLVE = solver.solve
MJX_MAKE_CONSTRAINT = constraint.make_constraint
PLANE_CAPSULE = (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_CAPSULE)
MJX_PLANE_CAPSULE = collision_driver._COLLISION_FUNC[PLANE_CAPSULE]

TRACING = threading.RLock()  # MJX's functions are replaced for the whole process: one thread at a time


def step(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """Advances one world by one physics step: mujoco.mjx.step with what `lean` replaces."""
    with lean():
        if model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4:
            return runge_kutta(model, data)
        return mjx_forward.step(model, data)


def forward(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """Computes one world's accelerations and forces: mujoco.mjx.forward with what `lean` replaces."""
    with lean():
        return mjx_forward.forward(model, data)


# Runge and Kutta's method: each stage goes on from the start by a share of the time step, at the velocity
# and acceleration of the stage before, and has a weight in the step.
SHARES = (0.0, 0.5, 0.5, 1.0)
WEIGHTS = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


def runge_kutta(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """MJX's `step` by its Runge-Kutta integrator, with the four stages as one loop.

    MJX writes the first stage out and unrolls the others, so that the program holds the physics four
    times over; here it holds them once, which is as fast and takes a fraction of the time to compile.
    """

    def stage(carry, row):
        before, sums = carry
        share, weight = row

        def moved(change):
            # The first stage moves nothing. What it would move by is the last step's, and may be broken.
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
        return (now, jax.tree.map(lambda total, rate: total + weight * rate, sums, rates)), None

    timestep = model.opt.timestep
    sums = jax.tree.map(jnp.zeros_like, (data.qvel, data.qacc, data.act_dot))
    tableau = jnp.array([SHARES, WEIGHTS], data.qvel.dtype).T
    (last, (velocity, acceleration, act_dot)), _ = jax.lax.scan(stage, (data, sums), tableau)
    last = last.replace(qpos=data.qpos, qvel=data.qvel, act=data.act, time=data.time)
    return mjx_forward._advance(model, last, act_dot, acceleration, velocity)


@contextlib.contextmanager
def lean():
    """Within it, functions of MJX are traced with this file's solver, algebra and corrections, and in full
    precision (GPUs would else multiply in TF32, which is too rough for physics).

    It may be entered within itself. It holds for all threads of the process, and lets one at a time in.
    `data._impl.qLD` is in another order within it: what was factored within must be solved within.
    """
    with (
        TRACING,
        jax.default_matmul_precision("highest"),
        mock.patch.object(jax.scipy.linalg, "cho_factor", cho_factor),
        mock.patch.object(jax.scipy.linalg, "cho_solve", cho_solve),
        mock.patch.object(constraint, "make_constraint", make_constraint),
        mock.patch.object(solver, "solve", solve),
        mock.patch.dict(collision_driver._COLLISION_FUNC, {PLANE_CAPSULE: plane_capsule}),
    ):
        yield


# Linear algebra -----------------------------------------------------------------------------------------


def factor(matrix: jax.Array) -> jax.Array:
    """Cholesky's factor of a symmetric positive definite matrix [n, n], from its last row to its first.

    Only one triangle of the matrix is read. Returns L [n, n], lower triangular, of L L' = the matrix with
    its rows and columns in reverse order.
    """
    return jax.lax.linalg.cholesky(matrix[::-1, ::-1], symmetrize_input=False)


def solve_factored(lower: jax.Array, right: jax.Array) -> jax.Array:
    """x [n] of A x = right [n]; lower [n, n] is `factor(A)`."""
    substitute = functools.partial(
        jax.lax.linalg.triangular_solve, lower, left_side=True, lower=True
    )
    half_way = substitute(right[::-1, None])
    return substitute(half_way, transpose_a=True)[::-1, 0]


def cho_factor(matrix: jax.Array, lower: bool = False) -> tuple[jax.Array, bool]:
    """For MJX as jax.scipy.linalg.cho_factor; MJX hands the result to `cho_solve` and to nothing else."""
    return factor(matrix), lower


def cho_solve(factored: tuple[jax.Array, bool], right: jax.Array) -> jax.Array:
    """For MJX as jax.scipy.linalg.cho_solve; right [n]."""
    return solve_factored(factored[0], right)


# Contacts -----------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Some contacts, one after the other and of one dimension: their work is behind one condition."""

    contacts: slice  # of data._impl.contact
    rows: slice  # of those of all contacts


def contact_blocks(model: mjx.Model, data: mjx.Data) -> list[Block]:
    """Divides the contacts into at most about MOST_BLOCKS blocks."""
    dims = data._impl.contact.dim
    size = math.ceil(len(dims) / MOST_BLOCKS)
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


def rows_of(dims: np.ndarray, cone: int) -> int:
    """How many rows these contacts have together."""
    if cone == mujoco.mjtCone.mjCONE_ELLIPTIC:
        return int(dims.sum())
    return int(np.where(dims == 1, 1, 2 * (dims - 1)).sum())


def touches(contact) -> jax.Array:
    """Whether any of these contacts is close enough to make a force: bool []."""
    return (contact.dist - contact.includemargin < 0).any()


def contacts_of(data: mjx.Data, chosen: slice):
    """Some of the contacts, without their places among the rows: blocks of the same dimension and size are alike to
    jax.jit then."""
    contact = jax.tree.map(lambda field: field[chosen], data._impl.contact)
    dim = contact.dim[chosen]
    return contact.replace(dim=dim, efc_address=np.zeros_like(dim))


ROW_FIELDS = ("efc_J", "efc_D", "efc_aref", "efc_pos", "efc_margin", "efc_frictionloss")


def make_constraint(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """For MJX as constraint.make_constraint: the rows of all constraints.

    MJX builds the rows of all contacts and multiplies those of contacts that do not touch by zero. Here
    these are zeros from the start, and so are all other fields of a block in which nothing touches.
    """

    def build(model, contact):
        built = MJX_MAKE_CONSTRAINT(model, data.tree_replace({"_impl.contact": contact}))
        return {name: getattr(built._impl, name) for name in ROW_FIELDS}

    switched_off = mujoco.mjtDisableBit
    if model.opt.disableflags & switched_off.mjDSBL_CONSTRAINT or not len(data._impl.contact.dim):
        return MJX_MAKE_CONSTRAINT(model, data)

    parts = [build(model, contacts_of(data, slice(0)))]  # all rows but contacts'
    others = switched_off.mjDSBL_EQUALITY | switched_off.mjDSBL_FRICTIONLOSS
    others |= switched_off.mjDSBL_LIMIT
    contacts_only = model.tree_replace({"opt.disableflags": model.opt.disableflags | others})

    @jax.jit
    def build_block(contact):
        count = rows_of(contact.dim, model.opt.cone)
        nothing = {name: jnp.zeros(count, data.qpos.dtype) for name in ROW_FIELDS}
        nothing["efc_J"] = jnp.zeros((count, model.nv), data.qpos.dtype)
        build_contacts = functools.partial(build, contacts_only)
        return jax.lax.cond(touches(contact), build_contacts, lambda _: nothing, contact)

    for block in contact_blocks(model, data):
        parts.append(build_block(contacts_of(data, block.contacts)))
    return data.tree_replace(
        {f"_impl.{name}": jnp.concatenate([part[name] for part in parts]) for name in ROW_FIELDS}
    )


def plane_capsule(model: mjx.Model, data: mjx.Data, key, geoms: jax.Array):
    """For MJX as its collision function of a plane and a capsule, with C MuJoCo's frame of the contacts.

    C MuJoCo lays the pyramid of friction along the capsule, wherever it points; MJX turns it into the
    world's y axis if the capsule is steeper than 60 degrees. As a pyramid is not round, the friction
    differs: a leg that stands slips otherwise than in C.

    geoms: [G, 2], of planes and capsules. Returns dist [2 G], pos [2 G, 3] and frame [2 G, 3, 3], a
    contact for each end of a capsule.
    """
    dist, pos, frame = MJX_PLANE_CAPSULE(model, data, key, geoms)
    normal = frame[:, 0]
    axis = jnp.repeat(data.geom_xmat[geoms[:, 1], :, 2], 2, axis=0)
    # A capsule that stands upright to 1e-6 has no direction in the plane. C MuJoCo takes the world's x axis
    # then, which also keeps a planar robot's friction in its plane; it cannot if that is the normal.
    x_axis, y_axis = jnp.eye(3, dtype=axis.dtype)[:2]
    fallback = jnp.where(jnp.abs(normal[:, :1]) < 0.9, x_axis, y_axis)
    along = in_plane(axis, normal)
    along = jnp.where(length(along) > 1e-6, along, in_plane(fallback, normal))
    along = along / length(along)
    return dist, pos, jnp.stack([normal, along, jnp.cross(normal, along)], axis=1)


plane_capsule.ncon = MJX_PLANE_CAPSULE.ncon


def in_plane(vectors: jax.Array, normal: jax.Array) -> jax.Array:
    """vectors [G, 3] without their parts along the unit vectors normal [G, 3]."""
    return vectors - normal * (normal * vectors).sum(axis=1, keepdims=True)


def length(vectors: jax.Array) -> jax.Array:
    """[G, 3] -> [G, 1]"""
    return jnp.sqrt(jnp.square(vectors).sum(axis=1, keepdims=True))


# Solver -------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """k rows of constraints that are treated alike and at once.

    A row is a spring between the acceleration that it aims at and the one along it: its force is
    D (aim - J a), within bounds that say what kind of constraint it is. The solver measures forces as
    shares of the square root of D, accelerations as multiples of it, so that all springs are alike.
    """

    jacobian: jax.Array  # [k, n]
    root: jax.Array  # [k] square root of efc_D
    aim: jax.Array  # [k] efc_aref
    lower: jax.Array | None  # [k] 0 for contacts and limits, -frictionloss / root for dry friction, None for equalities
    upper: jax.Array | None  # [k] frictionloss / root for dry friction, None for others
    needed: jax.Array | None  # bool []: False if all rows are zero; None: always treat them

    def spring(self, acceleration: jax.Array) -> jax.Array:
        """The force [k] without bounds, at an acceleration [n]."""
        return self.root * (self.aim - self.jacobian @ acceleration)

    def bounded(self, spring: jax.Array) -> jax.Array:
        """The force [k] within bounds."""
        if self.lower is not None:
            spring = jnp.maximum(spring, self.lower)
        if self.upper is not None:
            spring = jnp.minimum(spring, self.upper)
        return spring


def constraint_rows(model: mjx.Model, data: mjx.Data) -> list[Rows]:
    """The rows of a world, in MJX's order: equalities, dry friction, limits, contacts by blocks."""
    impl = data._impl

    def rows(first: int, last: int, lower=None, upper=None, needed=None) -> Rows:
        chosen = slice(first, last)
        fields = (impl.efc_J[chosen], root[chosen], impl.efc_aref[chosen])
        return Rows(*fields, lower, upper, needed)

    root = jnp.sqrt(impl.efc_D)

    friction = int(impl.ne)
    limits = friction + int(impl.nf)
    contacts = limits + int(impl.nl)
    loss = impl.efc_frictionloss[friction:limits] / root[friction:limits]
    parts = [
        rows(0, friction),
        rows(friction, limits, lower=-loss, upper=loss),
        rows(limits, contacts, lower=jnp.zeros(contacts - limits, loss.dtype)),
    ]
    for block in contact_blocks(model, data):
        first = contacts + block.rows.start
        last = contacts + block.rows.stop
        needed = touches(contacts_of(data, block.contacts))
        parts.append(rows(first, last, jnp.zeros(last - first, loss.dtype), needed=needed))
    return [part for part in parts if len(part.aim)]


def visit(parts: list[Rows], function, total, arrays: list, *shared):
    """Takes `function` to all rows, but those that are not needed. It is traced but once for rows of one shape.

    function: (rows, total, array, *shared) -> (total, array of these rows [k]); it adds to the total
    total: what it adds to, a pytree
    arrays: what is known of the rows, a pytree for each of parts
    Returns the total and a list of the arrays for each of parts; zeros for those left out.
    """
    results = []
    for rows, array in zip(parts, arrays, strict=True):
        total, result = if_needed(function, rows, total, array, *shared)
        results.append(result)
    return total, results


@functools.partial(jax.jit, static_argnums=0)
def if_needed(function, rows: Rows, total, array, *shared):
    if rows.needed is None:
        return function(rows, total, array, *shared)

    def skip(rows, total, *_):
        return total, jnp.zeros_like(rows.aim)

    return jax.lax.cond(rows.needed, function, skip, rows, total, array, *shared)


# The functions to visit rows with.


def linearise(rows: Rows, total, _, acceleration: jax.Array):
    """Adds to the gradient [n] and the Hessian [n, n] of the cost at an acceleration [n]. Returns the springs [k]."""
    gradient, hessian = total
    spring = rows.spring(acceleration)
    force = rows.bounded(spring)
    gradient = gradient - (rows.root * force) @ rows.jacobian
    held = jnp.where(force == spring, rows.root, 0)[:, None] * rows.jacobian
    return (gradient, hessian + held.T @ held), spring


def whole_step(rows: Rows, total, spring: jax.Array, step: jax.Array):
    """Adds what is at the end of a Newton step [n]. Returns how much that slackens the springs [k]."""
    change = rows.root * (rows.jacobian @ step)
    total, _ = look_ahead(rows, total, spring, change, 1.0)
    return total, change


def part_of_step(rows: Rows, total, known, share: jax.Array):
    """Adds what is at a share [] of a Newton step. known: springs [k] before it, what `whole_step` returned.
    Returns the forces [k] there."""
    return look_ahead(rows, total, *known, share)


def look_ahead(rows: Rows, total, spring: jax.Array, change: jax.Array, share):
    force = rows.bounded(spring)
    held = force == spring
    spring_there = spring - share * change
    force_there = rows.bounded(spring_there)
    held_there = force_there == spring_there
    # The Newton step takes it for granted that springs go on as before.
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
    """Adds to the forces on the joints [n] at an acceleration [n]. Returns the rows' forces [k]."""
    force = rows.root * rows.bounded(rows.spring(acceleration))
    return total + force @ rows.jacobian, force


class Ahead(NamedTuple):
    """The cost along a Newton step, at a share of it."""

    slope: jax.Array  # per share of the step
    curvature: jax.Array
    surprise: jax.Array  # how much the rows' forces differ from what the step took for granted, in sum
    force: jax.Array  # the rows' forces, in sum


class Solution(NamedTuple):
    acceleration: jax.Array  # [n] qacc
    iterations: jax.Array  # int32 [], Newton steps
    searches: jax.Array  # int32 [], steps of line searches
    done: jax.Array  # bool [], False if the iterations were used up, or a number is not finite


class Search(NamedTuple):
    """A line search: the share of the Newton step, what encloses the best one, the cost there."""

    share: jax.Array
    low: jax.Array
    high: jax.Array
    ahead: Ahead
    steps: jax.Array


SLOPE_LEFT = 0.1  # of the slope at the start; more exact line searches did not save Newton steps
ROUNDING = 4.0  # float32's epsilons: relative error of a Newton step


def newton(
    mass: jax.Array,
    push: jax.Array,
    parts: list[Rows],
    start: jax.Array,
    iterations: int,
    ls_iterations: int,
    tolerance: float,
) -> Solution:
    """The accelerations that minimise MuJoCo's cost, by Newton's method.

    The cost is a' M a / 2 - push' a + sum of the rows' energies. It is convex, and a quadratic in each
    region in which the same springs are held (pull as far as their bounds let them). Newton's step leads
    to the minimum of the region that it starts in. If the same springs are held there, this is the
    minimum of the cost, exactly. If not, the step's length is found by a line search, and the next step
    starts there.

    mass: M [n, n]. push: all other forces on the joints [n] (qfrc_smooth). start: where to begin [n].
    iterations, ls_iterations: at most so many Newton steps, and line search steps in each
    tolerance: stop where less than this is left to gain, as a share of M's trace (as MJX measures it)
    Source: https://mujoco.readthedocs.io/en/stable/computation/index.html, "Algorithms"
    """
    epsilon = float(jnp.finfo(start.dtype).eps)
    least = tolerance * jnp.trace(mass)
    zero = jnp.zeros((), start.dtype)
    nothing = [None] * len(parts)

    def iteration(carry):
        acceleration, _, done_iterations, searches = carry
        rest = mass @ acceleration - push
        (gradient, hessian), springs = visit(
            parts, linearise, (rest, mass), nothing, acceleration
        )
        step = -solve_factored(factor(hessian), gradient)
        # Along a Newton step the slope of its quadratic rises from -descent to 0, so that the curvature is
        # descent, too. To add only what differs from it is cheap, and loses no digits near the minimum.
        descent = -gradient @ step
        end, changes = visit(parts, whole_step, Ahead(zero, descent, zero, zero), springs, step)
        known = list(zip(springs, changes, strict=True))

        def goes_on(search):
            steep = jnp.abs(search.ahead.slope) > SLOPE_LEFT * descent  # False if not finite
            return steep & (search.steps < ls_iterations)

        def search_step(search):
            """Newton's method for the root of the slope; in the middle of what encloses it if that leads out."""
            share, low, high, ahead, steps = search
            low = jnp.where(ahead.slope < 0, share, low)
            high = jnp.where(ahead.slope < 0, high, share)
            middle = jnp.where(jnp.isinf(high), 2 * share, (low + high) / 2)
            share = share - ahead.slope / ahead.curvature
            share = jnp.where((share > low) & (share < high), share, middle)
            base = Ahead((share - 1) * descent, descent, zero, zero)
            ahead, _ = visit(parts, part_of_step, base, known, share)
            return Search(share, low, high, ahead, steps + 1)

        search = Search(jnp.ones_like(zero), zero, jnp.full_like(zero, jnp.inf), end, jnp.int32(0))
        search = jax.lax.while_loop(goes_on, search_step, search)

        # A step of full length that met no surprise leads to the minimum but for rounding: of it, only the
        # square of ROUNDING is left to gain.
        surprised = end.surprise > ROUNDING * epsilon * end.force
        exact = ~surprised & (search.share == 1)
        gain = search.share * descent / 2
        left = jnp.where(exact, (ROUNDING * epsilon) ** 2 * gain, gain)
        return (
            acceleration + search.share * step,
            left > least,  # False if not finite
            done_iterations + 1,
            searches + search.steps,
        )

    acceleration, going, iterations_taken, searches = jax.lax.while_loop(
        lambda carry: carry[1] & (carry[2] < iterations),
        iteration,
        (start, jnp.array(True), jnp.int32(0), jnp.int32(0)),
    )
    return Solution(acceleration, iterations_taken, searches, ~going)


def solve(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """For MJX as solver.solve: sets qacc, qfrc_constraint and efc_force.

    MJX's own function solves elliptic cones and takes the method of conjugate gradients. Like it, this one
    cannot be differentiated in reverse, but for the latter's iterations=1.
    """
    options = model.opt
    known = options.cone == mujoco.mjtCone.mjCONE_PYRAMIDAL
    known &= options.solver == mujoco.mjtSolver.mjSOL_NEWTON
    if not known:
        return MJX_SOLVE(model, data)

    parts = constraint_rows(model, data)
    start = data.qacc_smooth
    if not options.disableflags & mujoco.mjtDisableBit.mjDSBL_WARMSTART:
        # MJX compares the cost at both starts. That saves next to no steps here; what is needed is not to
        # start from a broken world's accelerations. The bound is C MuJoCo's for these.
        sane = (jnp.abs(data.qacc_warmstart) < mujoco.mjMAXVAL).all()
        start = jnp.where(sane, data.qacc_warmstart, start)
    solution = newton(
        support.full_m(model, data),
        data.qfrc_smooth,
        parts,
        start,
        options.iterations,
        options.ls_iterations,
        options.tolerance,
    )
    acceleration = solution.acceleration
    forces_on_joints, forces = visit(
        parts, pull, jnp.zeros_like(acceleration), [None] * len(parts), acceleration
    )
    return data.tree_replace(
        {
            "qacc": acceleration,
            "qfrc_constraint": forces_on_joints,
            "_impl.efc_force": jnp.concatenate(forces),
        }
    )
