"""onekernel.mjx: MJX with a lean solver is right, in one world and in many; MJX stays as it was.

- accelerations and steps are C MuJoCo's, with limits, contacts, equalities, and dry friction;
- the solver alone solves random problems from any first guess, and never waits for a broken world;
- what is skipped, geoms far apart and contacts that do not touch, makes no difference;
- what the solver does not know goes to MJX's own.
"""

import copy
import functools
import re
import threading
from pathlib import Path
from unittest import mock

import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from mujoco import mjx
from mujoco.mjx._src import collision_driver, constraint, smooth, solver, support
from quick import quick_jit, quick_kernels

import onekernel
import onekernel.mjx as lean

ROBOTS = Path(__file__).parent / "robots"
GYMNASIUM = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
STATE = ("qpos", "qvel", "act", "ctrl", "qacc_warmstart")

# An arm that leans on the floor, and a ball beside it.
ARM = """<mujoco>
  <option timestep=".005" integrator="{integrator}" cone="{cone}" solver="{solver}"/>
  <default>
    <geom type="capsule" size=".04"/>
    <joint axis="0 1 0" damping=".5" armature=".01" limited="true"/>
  </default>
  <worldbody>
    <geom type="plane" size="2 2 1"/>
    <body pos="0 0 .3"><joint name="shoulder" range="-40 80"/><geom fromto="0 0 0 .3 0 0"/>
      <body pos=".3 0 0"><joint name="elbow" range="-60 60"/><geom fromto="0 0 0 .3 0 .05"/></body>
    </body>
    <body pos=".3 .1 .1"><freejoint/><geom type="sphere" size=".1"/></body>
  </worldbody>
  <actuator>
    <position joint="shoulder" kp="20" kv="1"/>
    <motor joint="elbow" gear="5"/>
  </actuator>
</mujoco>"""


def arm(integrator: str = "Euler", cone: str = "pyramidal", solver: str = "Newton"):
    return mujoco.MjModel.from_xml_string(
        ARM.format(integrator=integrator, cone=cone, solver=solver)
    )


def load(name: str) -> mujoco.MjModel:
    path = ROBOTS / f"{name}.xml"
    return mujoco.MjModel.from_xml_path(str(path if path.exists() else GYMNASIUM / f"{name}.xml"))


def put(model: mujoco.MjModel) -> tuple[mjx.Model, mjx.Data]:
    mjx_model = mjx.put_model(model, impl="jax")
    return mjx_model, mjx.make_data(mjx_model)


def in_all_worlds(function, states: dict) -> list[np.ndarray]:
    return jax.tree.map(np.asarray, quick_jit(jax.vmap(function))(states))


def by_kernel(function, states: dict) -> list[np.ndarray]:
    """In all worlds; the kernel takes less time to compile than XLA's program."""
    return jax.tree.map(np.asarray, jax.vmap(onekernel.compile(function))(states))


def in_each_world(function, states: dict) -> list[np.ndarray]:
    """One after the other, without jax.vmap: as onekernel sees the function."""
    worlds = []
    for i in range(len(states["qpos"])):
        worlds.append({field: values[i] for field, values in states.items()})
    program = quick_jit(function)
    return jax.tree.map(lambda *x: np.stack(x), *[program(world) for world in worlds])


def roll_out(model: mujoco.MjModel, worlds: int, steps: int = 150) -> dict[str, np.ndarray]:
    """States that C MuJoCo comes to by random controls, in float32: [worlds, n] each."""
    random = np.random.default_rng(0)
    limited = model.actuator_ctrllimited[:, None].astype(bool)
    low, high = np.where(limited, model.actuator_ctrlrange, [-1.0, 1.0]).T
    data = mujoco.MjData(model)
    states = []
    for world in range(worlds):
        mujoco.mj_resetData(model, data)
        data.qvel[:] = 0.1 * random.standard_normal(model.nv)
        for _ in range(steps * (world + 1) // worlds):
            data.ctrl[:] = random.uniform(low, high)
            for _ in range(3):
                mujoco.mj_step(model, data)
        states.append([np.copy(getattr(data, field)) for field in STATE])
    columns = zip(*states, strict=True)
    return dict(zip(STATE, (np.float32(column) for column in columns), strict=True))


def by_c(model: mujoco.MjModel, states: dict, function, fields: tuple) -> list[np.ndarray]:
    """Fields [worlds, ...] after a function of C MuJoCo, whose solver goes on to the end."""
    model = copy.copy(model)
    model.opt.iterations = 200
    model.opt.ls_iterations = 100
    model.opt.tolerance = 1e-14
    results = []
    for world in range(len(states["qpos"])):
        data = mujoco.MjData(model)
        for field, values in states.items():
            getattr(data, field)[:] = values[world]
        function(model, data)
        results.append([np.copy(getattr(data, field)) for field in fields])
    return [np.stack(column) for column in zip(*results, strict=True)]


def relative_error(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Of each world, [worlds, n] -> [worlds]."""
    return np.abs(found - true).max(axis=1) / (1 + np.abs(true).max(axis=1))


# Against C MuJoCo -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "median", "most"),
    [
        ("gripper", 1e-5, 3e-3),  # an equality, dry friction, limits of tendons
        ("sparse_flag", 3e-4, 1e-3),
        # Contacts and limits of a chain: test_onekernel_models.py has Walker2d's, after a step.
        pytest.param("hopper", 1e-5, 3e-4, marks=pytest.mark.slow),
        pytest.param(
            "quad_pos", 1e-4, 3e-3, marks=pytest.mark.slow
        ),  # test_onekernel_models.py steps it
    ],
)
def test_accelerations_are_c_mujocos(name, median, most, monkeypatch):
    """In states that random controls lead to. The bounds are about five times what is observed."""
    quick_kernels(monkeypatch)
    model = load(name)
    states = roll_out(model, worlds=24)
    fields = ("qacc", "qfrc_constraint")
    mjx_model, template = put(model)

    def accelerate(state):
        data = lean.forward(mjx_model, template.replace(**state))
        return [getattr(data, field) for field in fields]

    wanted = by_c(model, states, mujoco.mj_forward, fields)
    found = by_kernel(accelerate, states)
    constrained = np.abs(wanted[1]).max(axis=1) > 1e-3
    assert np.count_nonzero(constrained) > 4
    for ours, true in zip(found, wanted, strict=True):
        error = relative_error(ours, true)
        assert np.median(error) < median and error.max() < most


@pytest.mark.parametrize("integrator", ["RK4", "implicitfast"])
def test_steps_are_c_mujocos(integrator, monkeypatch):
    """Runge-Kutta's is onekernel's own; implicitfast factors another matrix than M."""
    quick_kernels(monkeypatch)
    model = arm(integrator)
    states = roll_out(model, worlds=12)
    wanted = by_c(model, states, mujoco.mj_step, STEP_FIELDS)
    found = by_kernel(advance_by(model), states)
    for ours, true in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, true, rtol=1e-4, atol=1e-4 * np.abs(true).max())


@pytest.fixture(scope="module")
def advance_arms():
    """One step of the arm in all worlds, by Euler's method: states -> STEP_FIELDS."""
    return quick_jit(jax.vmap(advance_by(arm())))


@pytest.mark.slow
def test_one_world_is_one_of_many(advance_arms, monkeypatch):
    """Its work stands behind conditions; that of many worlds under jax.vmap does not. By Euler's
    method, with damping."""
    quick_kernels(monkeypatch)
    model = arm()
    states = roll_out(model, worlds=12)
    wanted = by_c(model, states, mujoco.mj_step, STEP_FIELDS)
    alone = in_each_world(advance_by(model), states)
    together = advance_arms(states)
    for one, many, true in zip(alone, together, wanted, strict=True):
        np.testing.assert_allclose(one, true, rtol=1e-4, atol=1e-4 * np.abs(true).max())
        np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-5 * np.abs(true).max())


STEP_FIELDS = ("qpos", "qvel", "qacc_warmstart")


def advance_by(model: mujoco.MjModel):
    mjx_model, template = put(model)

    def advance(state):
        data = lean.step(mjx_model, template.replace(**state))
        return [getattr(data, field) for field in STEP_FIELDS]

    return advance


CAPSULE = """<mujoco><option gravity="0 0 0"/><worldbody>
  <geom type="plane" size="9 9 1" quat="{plane}"/>
  <body><freejoint/><geom type="capsule" size=".1 .2" margin="9"/></body>
</worldbody></mujoco>"""


@pytest.mark.parametrize("plane", ["1 0 0 0", ".9 .3 .2 0", ".7071 0 .7071 0"])
def test_frame_of_capsule_on_plane_is_c_mujocos(plane):
    """Flat, tilted, and upright planes; steep capsules, for which MJX has another frame."""
    model = mujoco.MjModel.from_xml_string(CAPSULE.format(plane=plane))
    random = np.random.default_rng(0)
    to_plane = np.array([float(x) for x in plane.split()])
    quats = random.standard_normal((24, 4))
    quats[8:16] = [1, 0, 0, 0]  # along the normal, but for some degrees
    quats[8:16, 1:] += 0.1 * random.standard_normal((8, 3))
    quats[16:] = [1, 0, 0, 0]  # or for a thousandth of one
    quats[16:, 1:] += 1e-5 * random.standard_normal((8, 3))
    for quat in quats:
        mujoco.mju_mulQuat(quat, to_plane, quat.copy())
        mujoco.mju_normalize4(quat)
    qpos = np.concatenate([np.tile([0, 0, 0.2], (24, 1)), quats], axis=1).astype(np.float32)

    wanted = []
    data = mujoco.MjData(model)
    for coordinates in qpos:
        data.qpos[:] = coordinates
        mujoco.mj_forward(model, data)
        wanted.append([data.contact[i].frame.reshape(3, 3).copy() for i in range(2)])

    mjx_model, template = put(model)

    def frames(state):
        data = smooth.kinematics(mjx_model, template.replace(**state))
        theirs = collision_driver.collision(mjx_model, data)
        with lean.lean():
            ours = collision_driver.collision(mjx_model, data)
        return ours._impl.contact.frame, theirs._impl.contact.frame

    ours, theirs = in_all_worlds(frames, {"qpos": qpos})
    np.testing.assert_allclose(ours[:16], wanted[:16], atol=1e-5)
    # Float32 knows the direction of the last ones to a hundredth.
    np.testing.assert_allclose(ours[16:], wanted[16:], atol=0.05)
    assert np.abs(theirs - wanted).max() > 0.1


def test_capsule_upright_on_a_plane_has_a_frame():
    """It has no direction in the plane; C MuJoCo takes the x axis, where that is not the normal."""
    for quat, tangent in (("1 0 0 0", [1, 0, 0]), (".7071068 0 .7071068 0", [0, 1, 0])):
        model = mujoco.MjModel.from_xml_string(CAPSULE.format(plane=quat))
        mjx_model, template = put(model)
        qpos = jnp.array([0, 0, 0.1, *map(float, quat.split())])

        def frame(qpos, mjx_model=mjx_model, template=template):
            data = smooth.kinematics(mjx_model, template.replace(qpos=qpos))
            with lean.lean():
                return collision_driver.collision(mjx_model, data)._impl.contact.frame[0]

        found = quick_jit(frame)(qpos)
        np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-6)
        np.testing.assert_allclose(found[1], tangent, atol=1e-6)


# The solver alone -------------------------------------------------------------------------------


def random_problem(random: np.random.Generator, n: int = 7) -> dict[str, np.ndarray]:
    """Two equalities, four rows with dry friction, fourteen that only push; stiff and soft ones."""
    root = random.standard_normal((n, n))
    rows = 20
    return {
        "mass": root @ root.T + np.diag(10.0 ** random.uniform(-2, 1, n)),
        "push": 30 * random.standard_normal(n),
        "jacobian": random.standard_normal((rows, n)) * (random.random((rows, n)) < 0.5),
        "stiffness": 10.0 ** random.uniform(-1, 3, rows),
        "aim": 30 * random.standard_normal(rows),
        "friction": 20 * random.random(4),
    }


def solve_problem(problem: dict, start, iterations: int = 50) -> lean.Solution:
    root = jnp.sqrt(problem["stiffness"])

    def rows(first, last, lower=None, upper=None):
        chosen = slice(first, last)
        return lean.Rows(
            problem["jacobian"][chosen], root[chosen], problem["aim"][chosen], lower, upper, None
        )

    loss = problem["friction"] / root[2:6]
    parts = [rows(0, 2), rows(2, 6, -loss, loss), rows(6, 20, jnp.zeros(14))]
    return lean.newton(problem["mass"], problem["push"], parts, start, iterations, 50, 1e-8)


solve_all = quick_jit(jax.vmap(solve_problem))


def imbalance(problem: dict, acceleration: np.ndarray) -> float:
    """The share of the forces, in double precision, that does not cancel: 0 at the minimum."""
    springs = problem["stiffness"] * (problem["aim"] - problem["jacobian"] @ acceleration)
    force = springs.copy()
    force[2:6] = np.clip(springs[2:6], -problem["friction"], problem["friction"])
    force[6:] = np.maximum(springs[6:], 0)
    terms = [problem["mass"] @ acceleration, -problem["push"], -problem["jacobian"].T @ force]
    size = np.abs(problem["mass"]) @ np.abs(acceleration)
    size += np.abs(problem["jacobian"].T) @ np.abs(force)
    return (np.abs(sum(terms)) / (1 + size)).max()


@pytest.fixture(scope="module")
def problems() -> list[dict]:
    random = np.random.default_rng(0)
    return [random_problem(random) for _ in range(300)]


def stacked(problems: list[dict]) -> dict:
    return jax.tree.map(lambda *x: np.float32(np.stack(x)), *problems)


@pytest.mark.parametrize("distance", [0.0, 1e2, 1e9])
def test_solver_finds_the_minimum_from_anywhere(problems, distance):
    start = distance * np.random.default_rng(1).standard_normal((len(problems), 7))
    solution = solve_all(stacked(problems), np.float32(start))
    assert solution.done.all()
    assert solution.iterations.max() < 20
    accelerations = np.float64(solution.acceleration)
    errors = [imbalance(p, a) for p, a in zip(problems, accelerations, strict=True)]
    # Inputs are rounded to float32, which the stiffest springs turn into forces of that size.
    assert np.median(errors) < 1e-5 and max(errors) < 1e-3


def test_solver_ends_where_it_begins_at_the_minimum(problems):
    """One step, no search: as for a robot that goes on pushing as in the step before."""
    zeros = np.zeros((len(problems), 7), np.float32)
    again = solve_all(stacked(problems), solve_all(stacked(problems), zeros).acceleration)
    assert np.mean(again.iterations == 1) > 0.99
    assert again.done.all() and again.searches.max() <= 1


def test_solver_does_not_wait_for_broken_worlds(problems):
    """A world that is not finite takes one step and no search, and changes nothing beside it."""
    batch = stacked(problems)
    start = np.zeros((len(problems), 7), np.float32)
    right = solve_all(batch, start)
    broken = copy.deepcopy(batch)
    broken["mass"][0] = np.nan
    broken["push"][1, 2] = np.inf
    broken["aim"][2, 3] = np.nan
    start[3] = np.nan
    solution = solve_all(broken, start)
    assert (solution.iterations[:4] == 1).all() and (solution.searches[:4] == 0).all()
    assert not np.isfinite(solution.acceleration[:4]).all(axis=1).any()
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[4:], y[4:]), solution, right)


def test_solver_keeps_to_its_limits(problems):
    start = np.zeros((len(problems), 7), np.float32)
    solve_once = quick_jit(
        jax.vmap(lambda problem, start: solve_problem(problem, start, iterations=1))
    )
    solution = solve_once(stacked(problems), start)
    assert (solution.iterations == 1).all()
    assert 0 < np.mean(solution.done) < 1


def test_broken_first_guess_is_not_used(advance_arms):
    states = roll_out(arm(), worlds=12)
    *_, right = advance_arms(states)  # the acceleration
    for broken in (np.nan, np.inf, 1e30):
        states["qacc_warmstart"] = np.full_like(states["qacc_warmstart"], broken)
        *_, found = advance_arms(states)
        assert relative_error(found, right).max() < 1e-4


# What is skipped --------------------------------------------------------------------------------

CROWD = "".join(
    f'<body pos="{i % 3 * 0.25} {i // 3 * 0.3} 0"><freejoint/>'
    f'<geom type="{kind}" size=".1 .15" condim="{dim}" margin=".01"/></body>'
    for i, (kind, dim) in enumerate([("sphere", 1), ("capsule", 3)] * 3)
)


@pytest.mark.slow
def test_far_geoms_and_contacts_that_do_not_touch_are_skipped():
    """What touches has MJX's contacts and rows; what does not has rows of zeros."""
    model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{CROWD}</worldbody></mujoco>")
    random = np.random.default_rng(0)
    qpos = model.qpos0 + 0.1 * random.standard_normal((20, model.nq))
    qvel = random.standard_normal((20, model.nv))
    states = {"qpos": np.float32(qpos), "qvel": np.float32(qvel)}
    mjx_model, template = put(model)

    def contacts_and_rows(state):
        data = smooth.com_pos(mjx_model, smooth.kinematics(mjx_model, template.replace(**state)))
        data = collision_driver.collision(mjx_model, data)
        data = constraint.make_constraint(mjx_model, data)
        contact = data._impl.contact
        rows = (data._impl.efc_J, data._impl.efc_D, data._impl.efc_aref)
        return contact.dist, (contact.pos, contact.frame), rows

    def lean_contacts_and_rows(state):
        with lean.lean():
            return contacts_and_rows(state)

    their_dist, their_contacts, their_rows = in_all_worlds(contacts_and_rows, states)
    dist, contacts, rows = in_each_world(lean_contacts_and_rows, states)

    touching = their_dist < 0.02  # the sum of the margins
    assert 0.05 < touching.mean() < 0.5
    np.testing.assert_array_equal(dist < 0.02, touching)
    # Those that are near, but do not touch, are not skipped where collisions are computed.
    near = np.isclose(dist, their_dist, atol=1e-5)
    assert touching.mean() < near.mean() < 1
    assert (dist[~near] < their_dist[~near]).all()
    for ours, theirs in zip(contacts, their_contacts, strict=True):
        np.testing.assert_allclose(ours[touching], theirs[touching], atol=1e-6)

    dims = np.asarray(template._impl.contact.dim)
    in_touch = np.repeat(touching, np.where(dims == 1, 1, 2 * (dims - 1)), axis=1)
    for ours, theirs in zip(rows, their_rows, strict=True):
        np.testing.assert_allclose(ours[in_touch], theirs[in_touch], rtol=1e-4, atol=1e-4)
        assert (ours[~in_touch] == 0).all()


def test_limbs_stay_apart_in_the_factor():
    """Factored from the last joint on, a quadruped's mass matrix has zeros where it had them."""
    model = load("quad_pos")
    data = mujoco.MjData(model)
    data.qpos[7:] += np.random.default_rng(0).uniform(-1, 1, model.nq - 7)
    mujoco.mj_forward(model, data)
    mass = np.zeros((model.nv, model.nv))
    for column, unit in zip(mass, np.eye(model.nv), strict=True):
        mujoco.mj_mulM(model, data, column, unit)
    factor = np.asarray(lean.factor(jnp.float32(mass)))
    np.testing.assert_allclose(factor @ factor.T, mass[::-1, ::-1], atol=1e-5 * mass.max())

    legs = (model.dof_bodyid[6:] - model.dof_bodyid[6]) // 3  # of three links each
    apart = legs[:, None] != legs
    assert (mass[6:, 6:][apart] == 0).all() and not (mass[6:, 6:][~apart] == 0).all()
    assert (factor[::-1, ::-1][6:, 6:][apart] == 0).all()

    right = np.random.default_rng(1).standard_normal(model.nv)
    found = lean.cho_solve(lean.cho_factor(jnp.float32(mass)), jnp.float32(right))
    np.testing.assert_allclose(found, np.linalg.solve(mass, right), rtol=1e-3, atol=1e-3)


BALL = """<mujoco><worldbody><geom type="plane" size="9 9 1"/>
  <body pos="0 0 .09"><freejoint/><geom type="sphere" size=".1"/></body>
</worldbody></mujoco>"""


def test_models_that_differ_between_worlds():
    """Domain randomisation: a field of the model has an axis of worlds, too."""
    model = mujoco.MjModel.from_xml_string(BALL)
    speeds = np.random.default_rng(0).standard_normal((6, model.nv))
    states = {"qpos": np.float32(np.tile(model.qpos0, (6, 1))), "qvel": np.float32(speeds)}
    mjx_model, template = put(model)
    frictions = np.float32(np.linspace(0.2, 1.5, 6))[:, None, None] * model.geom_friction

    def accelerate(state_and_friction):
        state, friction = state_and_friction
        return lean.forward(
            mjx_model.replace(geom_friction=friction), template.replace(**state)
        ).qacc

    found = in_all_worlds(accelerate, (states, frictions))
    for world in range(6):
        model.geom_friction[:] = frictions[world]
        state = {field: values[world : world + 1] for field, values in states.items()}
        (wanted,) = by_c(model, state, mujoco.mj_forward, ("qacc",))
        assert relative_error(found[world : world + 1], wanted).max() < 1e-3
        if world > 0:  # and the friction does matter
            model.geom_friction[:] = frictions[0]
            (other,) = by_c(model, state, mujoco.mj_forward, ("qacc",))
            assert relative_error(other, wanted).max() > 1e-2


# MJX and `lean` ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cone", "method", "ours"),
    [("pyramidal", "Newton", True), ("elliptic", "Newton", False), ("pyramidal", "CG", False)],
)
def test_what_the_solver_does_not_know_goes_to_mjx(cone, method, ours):
    mjx_model, template = put(arm(cone=cone, solver=method))
    spies = mock.patch.multiple(
        lean,
        MJX_SOLVE=mock.Mock(side_effect=lean.MJX_SOLVE),
        newton=mock.Mock(side_effect=lean.newton),
    )
    with spies:
        jax.eval_shape(lambda data: lean.forward(mjx_model, data), template)
        assert lean.newton.called == ours
        assert lean.MJX_SOLVE.called != ours


def test_elliptic_cones_by_mjx_are_c_mujocos(monkeypatch):
    """Rows of zeros do not irritate MJX's own solver."""
    quick_kernels(monkeypatch)
    model = arm(cone="elliptic")
    states = roll_out(model, worlds=12)
    mjx_model, template = put(model)

    def accelerate(state):
        return lean.forward(mjx_model, template.replace(**state)).qacc

    (wanted,) = by_c(model, states, mujoco.mj_forward, ("qacc",))
    error = relative_error(by_kernel(accelerate, states), wanted)
    assert np.median(error) < 1e-3 and error.max() < 0.05


def replaced() -> list:
    """What `lean` replaces, as it is now."""
    collisions = [collision_driver._COLLISION_FUNC[kinds] for kinds in sorted(lean.COLLISIONS)]
    algebra = [jax.scipy.linalg.cho_factor, jax.scipy.linalg.cho_solve, support.jac]
    return [*algebra, constraint.make_constraint, solver.solve, *collisions]


def test_lean_leaves_mjx_as_it_was():
    """After it, after an error in it, and after it was entered twice."""
    before = replaced()
    with lean.lean():
        within = replaced()
        assert not any(a is b for a, b in zip(before, within, strict=True))
        with lean.lean():
            assert replaced() == within
        assert replaced() == within
    assert replaced() == before
    with pytest.raises(ZeroDivisionError), lean.lean():
        raise ZeroDivisionError
    assert replaced() == before


def test_lean_around_an_environment_is_the_lean_step():
    """It need not know of onekernel: what it calls by MJX's names is replaced."""
    model, data = put(arm())

    def step(data):
        return mjx.step(model, data)

    def fast(data):
        with lean.lean():
            return step(data)

    def program(function) -> str:
        return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(data)))

    ours = program(functools.partial(lean.step, model))
    assert program(fast) == ours != program(step)


def test_lean_lets_one_thread_in_at_a_time():
    before = replaced()
    inside = []
    errors = []

    def enter():
        for _ in range(50):
            with lean.lean():
                inside.append(threading.get_ident())
                if inside != [threading.get_ident()] or solver.solve is not lean.solve:
                    errors.append(list(inside))
                inside.remove(threading.get_ident())

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert replaced() == before
