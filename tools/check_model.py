"""The model doctor: look at a robot before you train it.

    python tools/check_model.py my_robot.xml            everything; a minute or two
    python tools/check_model.py my_robot.xml --quick    what needs no compiling; some seconds
    python tools/check_model.py my_robot.xml --no-xla   without the slow compiler's speed

It loads the MJCF (meshes relative to it), says what MuJoCo XLA (MJX) cannot do and what to put in
its place, which pairs of geoms cost how much, how the robot starts, what its actuators are, how far
MJX is from C MuJoCo, and how fast it is; then it suggests a row for TASKS in ppo_mjx.py.

A problem is one line. STOP: it cannot be trained like this. LOOK: it works, but look at it. The
exit code is 2 if there is a STOP, else 1 if there is a LOOK, else 0. What stops it is what the
script refuses (check_model there), so both agree.
"""

import argparse
import contextlib
import copy
import multiprocessing
import os
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import mujoco
import mujoco.batch
import numpy as np
import ppo_mjx as ppo
from jax.sharding import Mesh, PartitionSpec
from mujoco.mjx._src import collision_driver, constraint, types
from ppo_mjx import mjx

CONTROL_RATE = 50  # Hz, of the suggested row
RANDOM_STEPS = 100  # control steps, for the comparison with C MuJoCo
MOST_FAULTS = 10  # that are listed
MOST_PAIRS = 8  # that are listed
MANY_ROWS = 300  # of constraints, from which on compiling and stepping are slow
STEPS_IN_A_CALL = 40  # physics steps, so that starting it weighs little
DEEP = 0.01  # m; resting contacts are soft, and overlap by less
STATE = ("qpos", "qvel", "act", "qacc_warmstart", "ctrl", "mocap_pos", "mocap_quat")
RESULTS = ("qpos", "qvel", "act", "sensordata")
# Iterations of the solver and of its line search, from cheap to dear; the last are MuJoCo's own.
ITERATIONS = ((1, 4), (2, 4), (4, 8), (6, 8), (10, 10), (20, 20), (50, 50), (100, 50))


class Report:
    """What is printed, and how it is to be judged in the end."""

    def __init__(self):
        self.looks = 0
        self.stops = 0

    def title(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def look(self, text: str) -> None:
        """A problem that one can train with."""
        self.looks += 1
        self.problem("LOOK", text)

    def stop(self, text: str) -> None:
        """A problem that one cannot train with."""
        self.stops += 1
        self.problem("STOP", text)

    def problem(self, label: str, text: str) -> None:
        print(f"  {label}  {' '.join(text.split())}", flush=True)

    def verdict(self) -> int:
        """Print the sum of it. Returns the exit code."""
        self.title("Verdict")
        if self.stops:
            self.say(f"it cannot be trained like this: mend the {self.stops} marked STOP")
            return 2
        if self.looks:
            self.say(f"it can be trained; look at the {self.looks} marked LOOK first")
            return 1
        self.say("all is well")
        return 0


# ---- The model -----------------------------------------------------------------------------------
def load(report: Report, path: Path) -> mujoco.MjModel | None:
    """The compiled model; None if there is none."""
    if not path.is_file():
        report.stop(f"{path}: there is no such file")
        return None
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        try:
            model = mujoco.MjSpec.from_file(str(path)).compile()
        except Exception as error:  # MuJoCo raises what it likes, with the name of what is wrong
            report.stop(f"{path}: MuJoCo cannot read it: {error}")
            return None
    for message in messages:
        report.say(f"MuJoCo says: {' '.join(str(message.message).split())}")
    return model


def list_names(model: mujoco.MjModel, kind: str, indices) -> str:
    """geom a, geom b and 5 more."""
    return shorten([ppo.called(model, kind, int(index)) for index in indices])


def shorten(words: list[str], most: int = 4) -> str:
    rest = len(words) - most
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(words[:most]) + more


def short(member) -> str:
    """The end of an enumeration's name: mjGEOM_BOX -> box."""
    return member.name.split("_", 1)[-1].lower()


def describe(report: Report, model: mujoco.MjModel, path: Path) -> None:
    report.title(str(path))
    sizes = {
        "bodies": model.nbody - 1,
        "degrees of freedom": model.nv,
        "actuators": model.nu,
        "geoms": model.ngeom,
        "sensors": model.nsensor,
    }
    parts = [f"{number} {name}" for name, number in sizes.items()]
    report.say(", ".join([*parts, f"{model.body_mass.sum():.3g} kg"]))
    integrator = short(mujoco.mjtIntegrator(model.opt.integrator))
    solver = short(mujoco.mjtSolver(model.opt.solver))
    cone = short(mujoco.mjtCone(model.opt.cone))
    report.say(
        f"time step {1000 * model.opt.timestep:g} ms, integrator {integrator}, {cone} cones, solver"
        f" {solver} of at most {model.opt.iterations} iterations,"
        f" {model.opt.ls_iterations} in each line search"
    )
    cameras = [model.camera(number).name for number in range(model.ncam)]
    if "track" not in cameras:
        report.say("no camera is named track: films are taken by one that follows the robot")
    if model.nv == 0:
        report.stop("nothing in it moves: it has no joints")
    elif model.nu == 0:
        report.stop("there is nothing to learn: it has no actuators (add an <actuator> section)")


# ---- What MJX cannot do --------------------------------------------------------------------------
def check_contact_sensors(report: Report, model: mujoco.MjModel) -> None:
    """MJX matches contacts of geoms only, and cannot add up their forces."""
    for sensor in np.flatnonzero(model.sensor_type == mujoco.mjtSensor.mjSENS_CONTACT):
        ends = {int(model.sensor_objtype[sensor]), int(model.sensor_reftype[sensor])}
        foreign = ends & {
            int(types.ObjType.SITE),
            int(types.ObjType.BODY),
            int(types.ObjType.XBODY),
        }
        name = ppo.called(model, "sensor", sensor)
        if foreign:
            what = "/".join(short(mujoco.mjtObj(end)) for end in sorted(foreign))
            report.stop(f"{name}: MJX has no contact sensor by {what}; instead: name its geoms")
        if model.sensor_intprm[sensor, 1] == 3:
            report.stop(f"{name}: MJX has no reduce=netforce; instead: mindist or maxforce")


def check_options(report: Report, model: mujoco.MjModel) -> None:
    """The <option> and <flag> that MJX does not follow."""
    option = model.opt
    for bit in mujoco.mjtEnableBit.__members__.values():
        unknown = bit.name != "mjNENABLE" and bit not in {int(known) for known in types.EnableBit}
        if unknown and option.enableflags & bit:
            report.stop(f"flag {short(bit)}=enable: MJX does not have it; instead: leave it out")
    if option.solver == mujoco.mjtSolver.mjSOL_PGS:
        report.say("note: MJX has no solver PGS; the script solves by Newton's method")
    if option.noslip_iterations:
        report.look(
            f"option noslip_iterations={option.noslip_iterations}: MJX ignores it; instead:"
            ' cone="elliptic" with impratio=10'
        )
    if option.disableactuator:
        report.look("option actuatorgroupdisable: MJX ignores it; instead: remove those actuators")


def check_ignored(report: Report, model: mujoco.MjModel) -> None:
    """What MJX leaves out without a word."""
    polynomial = {
        "joint": model.jnt_stiffnesspoly.any(axis=1),
        "tendon": model.tendon_stiffnesspoly.any(axis=1) | model.tendon_dampingpoly.any(axis=1),
        "actuator": model.actuator_dampingpoly.any(axis=1),
    }
    polynomial["joint"][model.dof_jntid[model.dof_dampingpoly.any(axis=1)]] = True
    ignored = [
        (kind, where, "polynomial stiffness or damping", "one constant")
        for kind, where in polynomial.items()
    ]
    ignored += [
        ("geom", model.geom_adhesion.reshape(model.ngeom, -1).any(axis=1), "adhesion", "a weld"),
        ("geom", model.geom_surfacevel.any(axis=1), "a surface's velocity", "a body that moves"),
    ]
    for kind, where, what, instead in ignored:
        if where.any():
            names = list_names(model, kind, np.flatnonzero(where))
            report.look(f"{names}: MJX ignores {what}; instead: {instead}")


def check_support(report: Report, model: mujoco.MjModel, task: ppo.Task) -> None:
    """What MJX cannot do, and what to put in its place; also what the script refuses."""
    report.title("What MJX or the script cannot do")
    before = report.stops + report.looks
    faults = ppo.check_model(task, model)
    for fault in faults[:MOST_FAULTS]:
        report.stop(fault)
    if len(faults) > MOST_FAULTS:
        report.say(f"... and {len(faults) - MOST_FAULTS} more of that kind")
    check_contact_sensors(report, model)
    check_options(report, model)
    check_ignored(report, model)
    if not report.stops:
        try:
            jax.eval_shape(lambda: mjx.make_data(mjx.put_model(newton(model), impl="jax")))
        except Exception as error:  # what the checks above do not know
            report.stop(f"MJX refuses it: {error}")
    if report.stops + report.looks == before:
        report.say("nothing: they have all that this model needs")


def newton(model: mujoco.MjModel) -> mujoco.MjModel:
    """The model as the script steps it: with a solver that MJX has."""
    model = copy.copy(model)
    if model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
        model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
    model.opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    return model


# ---- Constraints ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pair:
    """Two geoms that may touch, as MJX computes them."""

    geoms: tuple[int, int]
    contacts: int
    rows: int  # of constraints


def count_pairs(model: mujoco.MjModel) -> list[Pair]:
    """All pairs that MJX collides, those of most rows first."""
    if model.opt.disableflags & mujoco.mjtDisableBit.mjDSBL_CONTACT:
        return []
    elliptic = model.opt.cone == mujoco.mjtCone.mjCONE_ELLIPTIC
    pairs = []
    for key, group in collision_driver._geom_groups(model).items():
        contacts = collision_driver._COLLISION_FUNC[tuple(key.types)].ncon
        rows = 1 if key.condim == 1 else int(key.condim) if elliptic else 2 * (int(key.condim) - 1)
        for first, second, _ in group:
            pair = Pair(geoms=(first, second), contacts=contacts, rows=contacts * rows)
            pairs.append(pair)
    pairs.sort(key=lambda pair: (-pair.rows, -model.geom_type[list(pair.geoms)].min()))
    return pairs


def pair_kind(model: mujoco.MjModel, pair: Pair) -> str:
    """plane with box"""
    return " with ".join(short(mujoco.mjtGeom(model.geom_type[geom])) for geom in pair.geoms)


def check_constraints(report: Report, model: mujoco.MjModel) -> None:
    """Rows and contacts, and who makes them."""
    report.title("Constraints and contacts")
    equalities, frictions, limits, contact_rows = constraint.counts(constraint.make_efc_type(model))
    pairs = count_pairs(model)
    contacts = sum(pair.contacts for pair in pairs)
    total = equalities + frictions + limits + contact_rows
    parts = {
        "of equalities": equalities,
        "of dry friction": frictions,
        "of limits": limits,
        f"of {contacts} contacts of {len(pairs)} pairs of geoms": contact_rows,
    }
    words = [f"{rows} {name}" for name, rows in parts.items() if rows]
    report.say(f"{total} rows: {', '.join(words)}" if words else "none")
    for pair in pairs[:MOST_PAIRS]:
        names = " with ".join(ppo.called(model, "geom", geom) for geom in pair.geoms)
        kind = pair_kind(model, pair)
        report.say(f"{pair.rows:6} rows, {pair.contacts} contacts: {names} ({kind})")
    rest = pairs[MOST_PAIRS:]
    if rest:
        report.say(f"{sum(pair.rows for pair in rest):6} rows: {len(rest)} other pairs")

    if total > MANY_ROWS and pairs:
        kinds = {}
        for pair in pairs:
            kind = pair_kind(model, pair)
            kinds[kind] = kinds.get(kind, 0) + pair.rows
        worst = max(kinds, key=kinds.get)
        report.look(
            f"{total} rows are slow to compile and to step, {kinds[worst]} of them are {worst}: let"
            " only those geoms collide that have to (contype, conaffinity), as spheres and capsules"
        )
    check_meshes(report, model, pairs)
    of_forces = np.flatnonzero(model.sensor_needstage == mujoco.mjtStage.mjSTAGE_ACC)
    if total == 0 and of_forces.size:
        report.look(
            f"{list_names(model, 'sensor', of_forces)}: 0 in MJX, which without constraints"
            " computes no sensors of forces; instead: limit a joint, or let something collide"
        )


def check_meshes(report: Report, model: mujoco.MjModel, pairs: list[Pair]) -> None:
    """Meshes that collide and are of many points."""
    colliding = sorted({geom for pair in pairs for geom in pair.geoms})
    for geom in colliding:
        mesh = model.geom_dataid[geom]
        if model.geom_type[geom] != mujoco.mjtGeom.mjGEOM_MESH or model.mesh_vertnum[mesh] <= 64:
            continue
        report.look(
            f"{ppo.called(model, 'geom', geom)} collides as a mesh of {model.mesh_vertnum[mesh]}"
            " points, which is slow: give the mesh maxhullvert=32, or let a capsule or a box"
            " collide in its place"
        )


# ---- The start -----------------------------------------------------------------------------------
def start_of(model: mujoco.MjModel, task: ppo.Task) -> mujoco.MjData:
    """C MuJoCo's data where episodes begin, with the controls of action 0."""
    data = mujoco.MjData(model)
    ppo.reset_data(task, model, data)
    mujoco.mj_forward(model, data)
    _, data.ctrl[:] = ppo.control_range(task, model, data)
    return data


def is_position_servo(model: mujoco.MjModel) -> np.ndarray:
    """Which actuators are told a position: bool [nu]."""
    gain = model.actuator_gainprm[:, 0]
    fixed = model.actuator_gaintype == mujoco.mjtGain.mjGAIN_FIXED
    affine = model.actuator_biastype == mujoco.mjtBias.mjBIAS_AFFINE
    return fixed & affine & (gain > 0) & (model.actuator_biasprm[:, 1] == -gain)


def joint_values(model: mujoco.MjModel, data: mujoco.MjData) -> np.ndarray:
    """Of each joint, what its range is about: [njnt] m or rad; of a free one, 0."""
    values = np.zeros(model.njnt)
    for joint, address in enumerate(model.jnt_qposadr):
        if model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_BALL:
            real, *imaginary = data.qpos[address : address + 4]
            values[joint] = 2 * np.arctan2(np.linalg.norm(imaginary), abs(real))
        elif model.jnt_type[joint] != mujoco.mjtJoint.mjJNT_FREE:
            values[joint] = data.qpos[address]
    return values


def check_pose(report: Report, model: mujoco.MjModel, data: mujoco.MjData) -> None:
    """Joints out of their range, and geoms in each other, at the start."""
    hint = "another keyframe" if model.nkey else 'a <keyframe> named "home"'
    values = joint_values(model, data)
    low, high = model.jnt_range.T
    slack = 1e-3 * (high - low)
    outside = model.jnt_limited.astype(bool) & ((values < low - slack) | (values > high + slack))
    if outside.any():
        words = [
            f"{ppo.called(model, 'joint', joint)} ({values[joint]:.3g}, range {low[joint]:.3g} to"
            f" {high[joint]:.3g})"
            for joint in map(int, np.flatnonzero(outside))
        ]
        report.look(f"{shorten(words)}: out of range at the start; instead: {hint}")

    for words in overlaps(model, data):
        if words:
            report.look(f"{shorten(words)} at the start; instead: {hint}")


def overlaps(model: mujoco.MjModel, data: mujoco.MjData) -> tuple[list[str], list[str]]:
    """In words, the geoms that are under what does not move, and those inside others."""
    deepest = {}
    for contact in data.contact:
        geoms = tuple(int(geom) for geom in contact.geom)
        deepest[geoms] = min(contact.dist, deepest.get(geoms, 0.0))

    under = []
    inside = []
    fixed = model.body_weldid[model.geom_bodyid] == 0
    for geoms, distance in sorted(deepest.items(), key=lambda item: item[1]):
        if distance > -DEEP:
            continue
        ground, other = sorted(geoms, key=lambda geom: not fixed[geom])
        below = ppo.called(model, "geom", ground)
        name = ppo.called(model, "geom", other)
        if fixed[ground]:
            under.append(f"{name} ({-distance:.3f} m, under {below})")
        else:
            inside.append(f"{name} ({-distance:.3f} m, inside {below})")
    return under, inside


def check_motion(report: Report, model: mujoco.MjModel, start: mujoco.MjData) -> None:
    """Half a second in C MuJoCo with action 0."""
    data = copy.copy(start)
    roots = np.unique(model.body_rootid[model.dof_bodyid])  # of what has joints
    body = int(max(roots, key=lambda root: model.body_subtreemass[root]))
    heights = [data.subtree_com[body, 2]]
    touched = False
    for _ in range(round(0.5 / model.opt.timestep)):
        mujoco.mj_step(model, data)
        heights.append(data.subtree_com[body, 2])
        touched |= data.ncon > 0
    name = ppo.called(model, "body", body)
    first = heights[0]
    last = heights[-1]
    report.say(
        f"the centre of mass of {name} is {first:.3f} m high, and {last:.3f} m after 0.5 s of"
        f" action 0 (between {min(heights):.3f} and {max(heights):.3f})"
    )
    if broken(data):
        report.look(f"C MuJoCo breaks within 0.5 s of action 0 ({broken(data)}): {STABLE}")
    elif max(heights) - first > 0.05:
        report.look(
            f"{name} jumps by {max(heights) - first:.2f} m at action 0: something starts out of"
            " range, inside something else, or far from where its servo wants it"
        )
    elif first - last > 0.8 and not touched:
        report.look(f"{name} falls freely: there is nothing under it that it collides with")
    elif is_position_servo(model).all() and first - last > 0.3 * abs(first):
        report.look(f"{name} sinks by {first - last:.2f} m: its servos (kp) do not hold it")


STABLE = "a smaller timestep, more armature or damping, or weaker actuators"


def broken(data: mujoco.MjData) -> str:
    """MuJoCo's warnings of an unstable simulation; empty if there are none."""
    kinds = (
        mujoco.mjtWarning.mjWARN_BADQPOS,
        mujoco.mjtWarning.mjWARN_BADQVEL,
        mujoco.mjtWarning.mjWARN_BADQACC,
    )
    return ", ".join(short(kind) for kind in kinds if data.warning[kind].number)


def check_start(report: Report, model: mujoco.MjModel, task: ppo.Task) -> None:
    report.title("Start of an episode")
    chosen = ppo.find_keyframe(task, model)
    if chosen < 0:
        report.say("there is no keyframe: it starts as the file draws it")
    else:
        keyframes = [model.key(number).name or "without a name" for number in range(model.nkey)]
        others = f", of {len(keyframes)}: {shorten(keyframes)}" if len(keyframes) > 1 else ""
        report.say(f"keyframe {keyframes[chosen]}{others}")
    start = start_of(model, task)
    check_pose(report, model, start)
    check_motion(report, model, start)


# ---- Actuators -----------------------------------------------------------------------------------
def actuator_kind(model: mujoco.MjModel, actuator: int) -> str:
    """What the file calls it, as far as that can be told from its numbers."""
    gain_type = mujoco.mjtGain(model.actuator_gaintype[actuator])
    bias_type = mujoco.mjtBias(model.actuator_biastype[actuator])
    dynamics = mujoco.mjtDyn(model.actuator_dyntype[actuator])
    gain = model.actuator_gainprm[actuator, 0]
    bias = model.actuator_biasprm[actuator]
    if gain_type == mujoco.mjtGain.mjGAIN_MUSCLE:
        return "muscle"
    if is_position_servo(model)[actuator]:
        kind = "position servo"
    elif bias_type == mujoco.mjtBias.mjBIAS_NONE and gain_type == mujoco.mjtGain.mjGAIN_FIXED:
        kind = "motor"
    elif bias[1] == 0 and bias[2] == -gain:
        kind = "velocity servo"
    else:
        kind = "general"
    return kind if dynamics == mujoco.mjtDyn.mjDYN_NONE else f"{kind} with a {short(dynamics)}"


def describe_ranges(ranges: np.ndarray) -> str:
    """ranges: [n, 2], NaN where there is none."""
    if np.isnan(ranges).all():
        return "controls without limits"
    different = np.unique(ranges, axis=0)
    if len(different) <= 3:
        return "controls " + ", ".join(f"from {low:.3g} to {high:.3g}" for low, high in different)
    low = np.nanmin(ranges[:, 0])
    high = np.nanmax(ranges[:, 1])
    return f"controls within {low:.3g} and {high:.3g}, each its own"


def check_actuators(report: Report, model: mujoco.MjModel, task: ppo.Task) -> None:
    report.title("Actuators")
    limited = model.actuator_ctrllimited.astype(bool)
    ranges = np.where(limited[:, None], model.actuator_ctrlrange, np.nan)
    kinds = {}
    for actuator in range(model.nu):
        kinds.setdefault(actuator_kind(model, actuator), []).append(actuator)
    for kind, actuators in kinds.items():
        names = list_names(model, "actuator", actuators)
        report.say(f"{len(actuators)} x {kind}, {describe_ranges(ranges[actuators])}: {names}")
    if task.servo_offset is None:
        report.say("actions from -1 to 1 cover the whole range of each")
    else:
        offset = task.servo_offset
        report.say(
            f"actions from -1 to 1 move the start's pose by {offset} (servo_offset), at most"
        )
    if not report.stops:
        check_effect(report, model, task)
    check_servos(report, model, ranges)


def check_effect(report: Report, model: mujoco.MjModel, task: ppo.Task) -> None:
    """Whether each actuator moves something, from the start, in C MuJoCo."""
    start = start_of(model, task)
    scale, bias = ppo.control_range(task, model, start)
    idle = []
    for actuator in range(model.nu):
        ends = []
        trouble = ""
        for action in (-1, 1):
            data = copy.copy(start)
            data.ctrl[actuator] = bias[actuator] + action * scale[actuator]
            mujoco.mj_step(model, data, nstep=max(round(0.1 / model.opt.timestep), 2))
            ends.append(data.qpos.copy())
            trouble = trouble or broken(data)
        # Of physics that break nothing can be said: MuJoCo resets them.
        if not trouble and np.abs(ends[0] - ends[1]).max() < 1e-6:
            idle.append(actuator)
    if idle:
        names = list_names(model, "actuator", idle)
        report.look(f"{names}: moves nothing: look at gear, kp, ctrlrange and forcerange")


def check_servos(report: Report, model: mujoco.MjModel, ranges: np.ndarray) -> None:
    """Position servos that can be told to go where their joints cannot."""
    on_joint = model.actuator_trntype == mujoco.mjtTrn.mjTRN_JOINT
    wide = []
    for actuator in np.flatnonzero(is_position_servo(model) & on_joint):
        joint = model.actuator_trnid[actuator, 0]
        low, high = model.jnt_range[joint]
        if model.jnt_limited[joint] and np.ptp(ranges[actuator]) > 1.01 * (high - low):
            wide.append(actuator)
    if wide:
        names = list_names(model, "actuator", wide)
        report.say(
            f'note: wider than its joint\'s range: {names}; inheritrange="1" takes over that'
        )


# ---- MJX beside C MuJoCo -------------------------------------------------------------------------
@dataclass(frozen=True)
class Walk:
    """Random motion in C MuJoCo."""

    states: dict[str, np.ndarray]  # STATE: [S, ...], in float32
    after: dict[str, np.ndarray]  # RESULTS: [S, ...] one physics step later, in double precision
    fastest: tuple[int, float]  # the degree of freedom and its speed
    trouble: str  # MuJoCo's warnings


def walk_at_random(model: mujoco.MjModel, task: ppo.Task) -> Walk:
    """RANDOM_STEPS control steps of random actions from the start."""
    random = np.random.default_rng(0)
    data = start_of(model, task)
    scale, bias = ppo.control_range(task, model, data)
    twin = mujoco.MjData(model)
    states = {name: [] for name in STATE}
    after = {name: [] for name in RESULTS}
    top = np.zeros(model.nv)
    trouble = ""
    for _ in range(RANDOM_STEPS):
        data.ctrl[:] = bias + scale * random.uniform(-1, 1, model.nu)
        for name, values in states.items():
            values.append(np.float32(getattr(data, name)))
        for name in STATE:
            getattr(twin, name)[:] = states[name][-1]
        mujoco.mj_step(model, twin)
        for name, values in after.items():
            values.append(np.array(getattr(twin, name)))
        mujoco.mj_step(model, data, nstep=task.frame_skip)
        top = np.maximum(top, np.abs(data.qvel))
        trouble = trouble or broken(data)
    fastest = int(top.argmax())
    return Walk(
        states={name: np.stack(values) for name, values in states.items()},
        after={name: np.stack(values) for name, values in after.items()},
        fastest=(fastest, float(top[fastest])),
        trouble=trouble,
    )


def measure(arm: str, path: str, states: dict[str, np.ndarray], pipe) -> None:
    """In a process of its own: compile a physics step, run it from the states, and time it.

    arm: onekernel or XLA. Sends a dictionary: seconds of compiling, physics steps per second, the
    results [S, ...], and why onekernel left it to XLA; or in words, why there is nothing.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # so that all that it starts can be ended with it
    ppo.split_cpu(ppo.Args())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = run_arm(arm, Path(path), states)
        except Exception as error:  # of MJX or a compiler: one line, not a traceback
            pipe.send(f"it failed: {type(error).__name__}: {error}")
            return
    fallbacks = [warning for warning in caught if warning.category.__name__ == "Fallback"]
    result["fallback"] = [str(warning.message) for warning in fallbacks]
    pipe.send(result)


def make_program(arm: str, path: Path, mesh: Mesh):
    """A program: STATE of all worlds -> RESULTS of the first step, STATE after STEPS_IN_A_CALL."""
    with contextlib.redirect_stdout(None):
        model = newton(load(Report(), path))
    mjx_model = mjx.put_model(model, impl="jax")
    template = mjx.make_data(mjx_model)

    def mjx_step(state: dict) -> dict:
        before = template.replace(**state)
        if arm == "onekernel":
            data = ppo.physics_step(mjx_model, before)
        else:
            with jax.default_matmul_precision("highest"):
                data = mjx.step(mjx_model, before)
        return {name: getattr(data, name) for name in (*STATE, "sensordata")}

    step = ppo.kernel(mjx_step) if arm == "onekernel" else mjx_step

    def turn(worlds: dict, _) -> tuple[dict, dict]:
        after = jax.vmap(step)(worlds)
        state = {name: after[name] for name in STATE}
        results = {name: after[name] for name in RESULTS}
        return state, results

    def run(worlds: dict) -> tuple[dict, dict]:
        worlds, results = jax.lax.scan(turn, worlds, length=STEPS_IN_A_CALL)
        return jax.tree.map(lambda values: values[0], results), worlds

    split = PartitionSpec("devices")
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split, check_vma=False))


def run_arm(arm: str, path: Path, states: dict[str, np.ndarray]) -> dict:
    """What `measure` sends."""
    devices = jax.local_devices()
    number = 256 if devices[0].platform == "cpu" else 4096
    number -= number % len(devices)
    chosen = np.arange(number) % RANDOM_STEPS
    worlds = {name: jnp.asarray(values[chosen]) for name, values in states.items()}

    start = time.perf_counter()
    run = make_program(arm, path, Mesh(np.array(devices), ("devices",)))
    results, _ = jax.block_until_ready(run(worlds))
    compiling = time.perf_counter() - start

    calls = 0
    start = time.perf_counter()
    while time.perf_counter() - start < 1.0:
        jax.block_until_ready(run(worlds))
        calls += 1
    seconds = time.perf_counter() - start
    return {
        "compile_s": compiling,
        "steps_per_s": STEPS_IN_A_CALL * number * calls / seconds,
        "results": {name: np.asarray(values)[:RANDOM_STEPS] for name, values in results.items()},
        "worlds": number,
        "device": f"{len(devices)} x {devices[0].device_kind}",
    }


def measure_apart(arm: str, path: Path, states: dict, limit: float) -> dict | str:
    """What `measure` sends, or in words why there is nothing, at the latest after `limit` s."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(arm, str(path), states, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return f"not compiled after {limit:g} s (--limit gives it more)"
        return receiver.recv()
    except EOFError:
        return "it failed: its process has died (of too little memory?)"
    finally:
        if process.is_alive() and hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def time_c(model: mujoco.MjModel, states: dict[str, np.ndarray]) -> float:
    """Physics steps per second of C MuJoCo on all cores."""
    chosen = np.arange(256) % RANDOM_STEPS
    batch = mujoco.batch.Batch(model, nsim=256, nthread=ppo.count_cores())
    calls = 0
    start = time.perf_counter()
    while time.perf_counter() - start < 1.0:
        for name, values in states.items():
            if values[0].size:
                getattr(batch, name)[:] = values[chosen]
        batch.step(nstep=STEPS_IN_A_CALL)
        calls += 1
    return STEPS_IN_A_CALL * 256 * calls / (time.perf_counter() - start)


def owner_of(model: mujoco.MjModel, field: str, index: int) -> str:
    """In words, the element of qpos, qvel, act or sensordata."""
    if field == "sensordata":
        sensor = int(np.searchsorted(model.sensor_adr, index, side="right")) - 1
        return ppo.called(model, "sensor", sensor)
    if field == "act":
        actuator = int(np.flatnonzero(model.actuator_actadr <= index)[-1])
        return f"activation of {ppo.called(model, 'actuator', actuator)}"
    if field == "qvel":
        return f"velocity of {ppo.called(model, 'joint', int(model.dof_jntid[index]))}"
    joint = int(np.searchsorted(model.jnt_qposadr, index, side="right")) - 1
    return f"position of {ppo.called(model, 'joint', joint)}"


def compare(report: Report, model: mujoco.MjModel, walk: Walk, results: dict) -> None:
    """The largest difference of one step of MJX from one of C MuJoCo from the same state."""
    errors = {}
    for field in RESULTS:
        truth = walk.after[field]
        if truth.size:
            scale = np.maximum(1.0, np.abs(truth))
            errors[field] = np.abs(results[field] - truth) / scale
    worst = max(errors, key=lambda field: np.nan_to_num(errors[field], nan=np.inf).max())
    values = np.nan_to_num(errors[worst], nan=np.inf)
    step, index = np.unravel_index(values.argmax(), values.shape)
    median = np.median([np.nan_to_num(x, nan=np.inf).max(axis=1) for x in errors.values()])
    text = (
        f"largest difference after one step {values.max():.1e}, median {median:.1e}:"
        f" {owner_of(model, worst, index)}, random step {step}"
    )
    report.say(text + " (m, rad, s; relative where above 1)")
    off = np.max([x.max(axis=1) for x in errors.values()], axis=0)
    often = int((~(off < 0.01)).sum())
    if often > RANDOM_STEPS // 20:
        report.look(
            f"MJX is off by more than 1% in {often} of {RANDOM_STEPS} steps; the worst is the"
            f" {owner_of(model, worst, index)}: train, then compare both returns by --evaluate"
        )


def check_speed(
    report: Report, model: mujoco.MjModel, file: Path, walk: Walk, args: argparse.Namespace
) -> None:
    report.title("MJX beside C MuJoCo, and speed")
    arms = ["onekernel"] if ppo.onekernel else []
    if not args.no_xla or not arms:
        arms.append("XLA")
    compared = False
    for arm in arms:
        result = measure_apart(arm, file, walk.states, args.limit)
        if isinstance(result, str):
            tell = report.look if arm == arms[0] else report.say
            tell(f"{arm}: {result}")
            continue
        if not compared:
            compare(report, model, walk, result["results"])
            compared = True
        for message in result["fallback"]:
            report.look(f"slow: {message}")
        report.say(
            f"{arm}: {result['steps_per_s']:,.0f} physics steps/s with {result['worlds']} worlds on"
            f" {result['device']}, after {result['compile_s']:.0f} s of compiling"
        )
    report.say(f"C MuJoCo: {time_c(newton(model), walk.states):,.0f} physics steps/s on all cores")


# ---- The row -------------------------------------------------------------------------------------
def enough_iterations(model: mujoco.MjModel, walk: Walk) -> tuple[int, int]:
    """The cheapest of ITERATIONS whose velocities are within 0.1% of converged ones, in 95 of 100
    steps in C MuJoCo."""

    def velocities(iterations: int, ls_iterations: int) -> np.ndarray:
        other = newton(model)
        other.opt.iterations = iterations
        other.opt.ls_iterations = ls_iterations
        data = mujoco.MjData(other)
        result = []
        for step in range(RANDOM_STEPS):
            for name in STATE:
                getattr(data, name)[:] = walk.states[name][step]
            mujoco.mj_step(other, data)
            result.append(data.qvel.copy())
        return np.stack(result)

    truth = velocities(*ITERATIONS[-1])
    scale = np.maximum(1.0, np.abs(truth))
    for pair in ITERATIONS:
        errors = (np.abs(velocities(*pair) - truth) / scale).max(axis=1)
        if np.percentile(errors, 95) < 1e-3:
            return pair
    return ITERATIONS[-1]


def round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 10.0 ** np.floor(np.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)


def free_coordinates(model: mujoco.MjModel) -> int:
    """How many coordinates at the front only tell where on the floor the robot is."""
    if model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE:
        return 2
    along_x = np.abs(model.jnt_axis[0]).argmax() == 0
    root = model.jnt_bodyid[0] == 1 and not model.jnt_limited[0]
    return int(root and along_x and model.jnt_type[0] == mujoco.mjtJoint.mjJNT_SLIDE)


def make_task(path: Path, model: mujoco.MjModel) -> ppo.Task:
    """The row that is checked, and suggested in the end."""
    return ppo.Task(
        mjcf=str(path.resolve()),
        frame_skip=max(1, round(1 / (CONTROL_RATE * model.opt.timestep))),
        first_observed=free_coordinates(model),
        servo_offset=0.4 if is_position_servo(model).all() else None,
    )


def suggest(report: Report, model: mujoco.MjModel, task: ppo.Task, walk: Walk) -> None:
    """A row for TASKS."""
    rate = 1 / (task.frame_skip * model.opt.timestep)
    iterations, ls_iterations = enough_iterations(model, walk)
    joint, speed = walk.fastest
    name = ppo.called(model, "joint", int(model.dof_jntid[joint]))
    rows = [
        (f'mjcf="{task.mjcf}"', ""),
        (f"frame_skip={task.frame_skip}", f"{rate:.0f} actions a second"),
        (f"first_observed={task.first_observed}", "those before it tell where the robot is"),
    ]
    if model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE:
        height = start_of(model, task).qpos[2]
        rows.append((f"healthy_z=({0.5 * height:.2g}, math.inf)", f"m; it starts at {height:.2g}"))
    if 5 * speed > ppo.Task.max_speed and not walk.trouble:
        bound = f"max_speed={round_up(5 * speed):g}"
        rows.append((bound, f"random actions reach {speed:.3g} ({name})"))
    if task.servo_offset is not None:
        rows.append((f"servo_offset={task.servo_offset}", "from the pose of the start, at most"))
    if model.nsensor:
        rows.append(('sensed=(("sensordata", 0),)', "if the policy is to see the sensors"))
    report.title("A row for TASKS in ppo_mjx.py, to begin with")
    report.say('"MyRobot": Task(')
    for text, comment in rows:
        report.say(f"    {text}," + (f"  # {comment}" if comment else ""))
    report.say("),")
    report.say(
        f'enough for the solver: <option iterations="{iterations}"'
        f' ls_iterations="{ls_iterations}"/>; the file has {model.opt.iterations} and'
        f" {model.opt.ls_iterations}"
    )
    if speed < 0.05:
        report.look(
            f"random actions hardly move it (at most {speed:.1e} rad/s or m/s): larger gear"
        )


# ---- Main ----------------------------------------------------------------------------------------
def check(args: argparse.Namespace) -> int:
    """Everything. Returns the exit code."""
    report = Report()
    file = Path(args.file)
    model = load(report, file)
    if model is None:
        return report.verdict()
    describe(report, model, file)
    if report.stops:
        return report.verdict()
    task = make_task(file, model)
    check_support(report, model, task)
    if report.stops == 0:
        check_constraints(report, model)
    check_start(report, model, task)
    check_actuators(report, model, task)
    if report.stops == 0:
        walk = walk_at_random(model, task)
        if walk.trouble:
            report.look(f"C MuJoCo breaks under random actions ({walk.trouble}): {STABLE}")
        if not args.quick:
            check_speed(report, model, file, walk, args)
        suggest(report, model, task, walk)
    return report.verdict()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Look at a robot before you train it.")
    parser.add_argument("file", help="the robot, an MJCF")
    parser.add_argument("--quick", action="store_true", help="only what needs no compiling")
    parser.add_argument("--no-xla", action="store_true", help="leave XLA's speed out")
    help_limit = "seconds that each compiler may take (default: %(default)s)"
    parser.add_argument("--limit", type=float, default=120, help=help_limit)
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # of this process; others have the accelerator
    return check(args)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
