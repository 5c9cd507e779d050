"""Find a leg's gains, armatures, frictions and delay from a log of its joints, by mujoco.sysid.

    pip install "mujoco[sysid]==3.17.0"
    python tools/identify_gains.py

The log is simulated: the left leg of the G1, hung up by its base, follows waves in each joint, with
motors whose true values the fit is not told. It starts from the values of robots/g1.xml and of the
robot's row in ppo_mjx_unitree.py. docs/transfer.md tells how to do the same with a real robot.
"""

import argparse
import contextlib
import dataclasses
import io
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import mujoco
import numpy as np
import ppo_mjx_unitree as unitree
from absl import logging
from mujoco import sysid

if not hasattr(sysid, "optimize"):  # without its packages, it is empty
    raise SystemExit('error: mujoco.sysid is not complete; pip install "mujoco[sysid]==3.17.0"')
logging.set_verbosity(logging.ERROR)  # it warns that the model has no sensors: it needs none

DT = 0.002  # s, of the log and of the simulation
ROBOT = unitree.ROBOTS["g1"]
LEG = {name: joint for name, joint in ROBOT.joints.items() if name.startswith("left_")}
QUANTITIES = ("stiffness", "damping", "armature", "friction")
UNITS = ("Nm/rad", "Nm s/rad", "kg m^2", "Nm")


@dataclasses.dataclass
class Log:
    """What a robot has to record, at T times and for J joints, from a start at rest."""

    target: np.ndarray  # [T, J] rad, that the controllers were sent
    angle: np.ndarray  # [T, J] rad, measured

    @property
    def time(self) -> np.ndarray:
        """[T] s."""
        return np.arange(len(self.target)) * DT


def load_leg() -> mujoco.MjSpec:
    """The left leg, hung up by the base: no floor, no other leg, PD controllers for motors."""
    spec = mujoco.MjSpec.from_file(str(unitree.MODELS / ROBOT.mjcf))
    spec.option.timestep = DT
    spec.delete(spec.joint("base"))
    spec.delete(spec.geom("floor"))
    for actuator in spec.actuators:
        if actuator.target not in LEG:
            spec.delete(actuator)
    spec.delete(spec.body("right_hip_pitch"))
    for actuator in spec.actuators:
        joint = LEG[actuator.target]
        actuator.name = actuator.target
        actuator.forcerange = actuator.ctrlrange  # Nm: the torque's limits remain
        actuator.ctrllimited = False
        actuator.set_to_position(kp=joint.stiffness, kv=joint.damping)
    return sysid.remove_visuals(spec)


def set_joint(spec: mujoco.MjSpec, name: str, values) -> None:
    """Give a joint values in the order of QUANTITIES: [4]."""
    stiffness, damping, armature, friction = values
    sysid.apply_pdgain(spec, name, np.array([stiffness, damping]))
    joint = spec.joint(name)
    joint.armature = armature
    joint.frictionloss = friction


def read_joint(spec: mujoco.MjSpec, name: str) -> np.ndarray:
    """The model's own values of a joint, in the order of QUANTITIES: [4]."""
    joint = spec.joint(name)
    return np.array([LEG[name].stiffness, LEG[name].damping, joint.armature, joint.frictionloss])


def make_targets(seconds: float, seed: int) -> np.ndarray:
    """Targets at the log's times: [T, J] rad. 50 a second, as a policy sends them.

    In each joint a sum of waves from 0.3 to 4 Hz: slow ones show friction and weight, fast ones
    inertia and damping. They begin and end softly, and stay off the joints' stops.
    """
    time = np.arange(round(seconds / unitree.CONTROL_DT)) * unitree.CONTROL_DT
    window = np.minimum(1.0, np.minimum(time, time[-1] - time))
    random = np.random.default_rng(seed)
    columns = []
    for name, joint in LEG.items():
        room = np.abs(ROBOT.model.joint(name).range - joint.default).min()
        rates = np.geomspace(0.3, 4, 6) * random.uniform(0.8, 1.2, 6)  # Hz
        phases = random.uniform(0, 2 * np.pi, 6)
        waves = np.sin(2 * np.pi * rates * time[:, None] + phases) @ rates**-0.5
        columns.append(joint.default + min(0.3, 0.6 * room) * window * waves / np.abs(waves).max())
    return np.repeat(np.stack(columns, axis=1), round(unitree.CONTROL_DT / DT), axis=0)


def delayed(targets: np.ndarray, delay: float) -> np.ndarray:
    """Targets as they arrive: [T, J] rad both. delay: s."""
    late = round(delay / DT)
    return np.concatenate([targets[:1].repeat(late, axis=0), targets])[: len(targets)]


def follow(model: mujoco.MjModel, targets: np.ndarray) -> np.ndarray:
    """Angles of the leg as it follows targets: [T, J] rad both. It first comes to rest."""
    data = mujoco.MjData(model)
    data.qpos = data.ctrl = targets[0]
    mujoco.mj_step(model, data, nstep=round(3 / DT))
    angles = np.zeros_like(targets)
    for step, target in enumerate(targets):
        angles[step] = data.qpos
        data.ctrl = target
        mujoco.mj_step(model, data)
    return angles


def make_truth(own: np.ndarray) -> np.ndarray:
    """The motors' true values, from the model's own: [J, 4] both."""
    random = np.random.default_rng(7)
    low = np.array([0.75, 0.75, 0.6, 1.5])
    high = np.array([1.25, 1.5, 2.5, 6.0])
    return own * random.uniform(low, high, own.shape)


def with_values(spec: mujoco.MjSpec, values: np.ndarray) -> mujoco.MjModel:
    """The leg with other values of its joints: [J, 4]."""
    changed = spec.copy()
    for name, row in zip(LEG, values, strict=True):
        set_joint(changed, name, row)
    return changed.compile()


def make_parameters(own: np.ndarray) -> sysid.ParameterDict:
    """What the fit may change: each joint's values over the model's own [J, 4], from 0.1 to 10.

    As ratios, they are all near 1, although they have different units.
    """
    parameters = sysid.ParameterDict()
    for name, row in zip(LEG, own, strict=True):

        def modify(spec, parameter, name=name, row=row):
            set_joint(spec, name, row * parameter.value)

        least, most = np.full(4, 0.1), np.full(4, 10.0)
        parameters.add(sysid.Parameter(name, np.ones(4), least, most, modifier=modify))
    return parameters


def fit(
    log: Log, delay: float, spec: mujoco.MjSpec, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The joints' values, and half the widths of their 95 % confidence intervals: [J, 4] each.

    delay: s, that the targets are taken to have; own: [J, 4], where the fit starts.
    """
    model = spec.compile()
    arriving = delayed(log.target, delay)
    signals = [(name, sysid.SignalType.MjStateQPos) for name in LEG]
    sequence = sysid.ModelSequences(
        name="leg",
        spec=spec,
        sequence_name="waves",
        initial_state=sysid.create_initial_state(model, log.angle[0]),
        control=sysid.TimeSeries.from_control_names(log.time, arriving, model),
        sensordata=sysid.TimeSeries.from_names(log.time, log.angle, model, signals),
        allow_missing_sensors=True,  # joint angles are read from the state
    )
    residual = sysid.build_residual_fn(models_sequences=[sequence])
    parameters = make_parameters(own)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints each iteration
        found, result = sysid.optimize(parameters, residual, verbose=False, max_iters=30)
    residuals, _, _ = residual(result.x, found)
    _, widths = sysid.calculate_intervals(residuals, result.jac)
    return own * result.x.reshape(own.shape), own * widths.reshape(own.shape)


def print_table(own, found, widths, truth) -> None:
    """All values, a joint and a quantity a line: [J, 4] each."""
    print(f"{'joint':18}{'quantity':22}{'model':>9}{'fitted':>9}{'+-':>9}{'true':>9}{'error':>8}")
    for i, name in enumerate(LEG):
        for k, quantity in enumerate(QUANTITIES):
            values = f"{own[i, k]:9.4g}{found[i, k]:9.4g}{widths[i, k]:9.2g}{truth[i, k]:9.4g}"
            error = found[i, k] / truth[i, k] - 1
            print(f"{name:18}{quantity + ', ' + UNITS[k]:22}{values}{error:8.1%}")


def tracking_error(log: Log, delay: float, spec: mujoco.MjSpec, values: np.ndarray) -> float:
    """Root mean square of the difference to a log's angles, rad, with these values: [J, 4]."""
    difference = follow(with_values(spec, values), delayed(log.target, delay)) - log.angle
    return float(np.sqrt(np.square(difference).mean()))


def simulate_logs(robot: mujoco.MjModel, flags: argparse.Namespace) -> list[Log]:
    """Two logs of the robot, with different waves: one to fit, one to check the fit."""
    random = np.random.default_rng(1)
    logs = []
    for seed in (0, 1):
        target = make_targets(flags.seconds, seed)
        angle = follow(robot, delayed(target, flags.delay))
        logs.append(Log(target=target, angle=angle + random.normal(0, flags.noise, angle.shape)))
    return logs


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="length of the log")
    parser.add_argument("--noise", type=float, default=2e-4, help="of the encoders, rad")
    parser.add_argument("--delay", type=float, default=0.004, help="of the robot's targets, s")
    tried = (0.0, 0.002, 0.004, 0.006)
    parser.add_argument("--try-delays", type=float, nargs="+", default=tried, help="for the fit, s")
    flags = parser.parse_args(argv)

    spec = load_leg()
    own = np.array([read_joint(spec, name) for name in LEG])
    truth = make_truth(own)
    log, other_log = simulate_logs(with_values(spec, truth), flags)

    fits = {}
    errors = {}  # rad
    for delay in flags.try_delays:
        found, widths = fit(log, delay, spec, own)
        error = tracking_error(log, delay, spec, found)
        errors[delay] = error
        fits[delay] = (found, widths)
        worst = np.abs(found / truth - 1).max(axis=0)
        row = ", ".join(
            f"{name} {value:.1%}" for name, value in zip(QUANTITIES, worst, strict=True)
        )
        print(f"delay {delay:.3f} s: {error:.5f} rad; most wrong: {row}", flush=True)

    delay = min(fits, key=errors.get)
    found, widths = fits[delay]
    print(f"\nThe delay that fits best is {delay:.3f} s.\n")
    print_table(own, found, widths, truth)
    before = tracking_error(other_log, delay, spec, own)
    after = tracking_error(other_log, delay, spec, found)
    print(f"\nerror on another log: {before:.5f} rad before, {after:.5f} rad after the fit")


if __name__ == "__main__":
    main(sys.argv[1:])
