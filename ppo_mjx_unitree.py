# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "flax==0.12.6",
#   "imageio[ffmpeg]==2.38.1",
#   "jax==0.9.2",
#   "llvmlite==0.50.0",
#   "mujoco==3.17.0",
#   "mujoco-mjx==3.17.0",
#   "optax==0.2.8",
#   "tensorboard==2.21.0",
#   "tqdm==4.70.1",
#   "typeguard==4.6.0",
#   "tyro==1.0.17",
# ]
# ///
"""PPO for Unitree's legged robots, on MuJoCo XLA (MJX): one file, one compiled program.

    python ppo_mjx_unitree.py                      teach the G1 to walk; tensorboard --logdir runs
    python ppo_mjx_unitree.py --resume runs/NAME   continue a stopped run, bit for bit
    python ppo_mjx_unitree.py --evaluate runs/NAME test its policy in C MuJoCo, in Unitree's loop
    python ppo_mjx_unitree.py --smoke              check the installation on this machine

The robot's body is an MJCF file in the folder robots/ beside this file. The science comes first,
and is all that learning to walk needs:

    1 settings       5 environment       9 rollout
    2 robots         6 statistics       10 advantages
    3 observation    7 networks         11 loss and update
    4 rewards        8 training state   12 training iteration

Sections 13 to 16 are evaluation, log and files, command line, and main.

Shapes: T = num_steps, N = worlds on this device, B = T * N, M = num_minibatches, O = observation
size, J = number of joints, A = action size = number of joints that are not held, F = number of
feet, S = spheres under a foot. A record describes one world; its fields are [T, N, ...] in a
rollout, [B, ...] in a batch and [B / M, ...] in a minibatch.

Robots, observation, gains and rewards follow unitreerobotics/unitree_rl_gym (276801e); names follow
CleanRL. All metrics and flags are explained in docs/ppo_mjx_unitree.md.

Blocks between "# shared: NAME" and "# end shared" are equal in several scripts
(tools/sync_shared.py); in your own copy, ignore the marks.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

START = time.perf_counter()
# Without this, XLA prints pages of CPU features whenever it reads a program from the cache.
os.environ.setdefault("JAX_LOGGING_LEVEL", "CRITICAL")

import flax.linen as nn
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import optax
import typeguard
import tyro
from flax import struct
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mujoco.rendering.classic import gl_context

with contextlib.redirect_stdout(io.StringIO()):  # it announces that the optional Warp is missing
    from mujoco import mjx

try:  # what only the log of training needs
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.record_writer import RecordWriter
    from tqdm import tqdm
except ImportError:
    RecordWriter = None

try:
    import onekernel.mjx
except ImportError:  # this file was copied alone: XLA runs the physics, slowly
    onekernel = None


# ---- 1. Settings ---------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a flag may have, both ends included; `check_args` reads it."""

    least: float
    most: float


Count = Annotated[int, Range(1, 1e9)]
MaybeCount = Annotated[int | None, Range(1, 1e9)]
CountOrZero = Annotated[int, Range(0, 1e9)]
NonNegative = Annotated[float, Range(0, 1e9)]
Fraction = Annotated[float, Range(0, 1)]
Cadence = Annotated[float, Range(1e-9, 1e9)]
RelativeError = Annotated[float, Range(0, 0.9)]
Shift = Annotated[float, Range(0, 0.9)]  # m
Seconds = Annotated[float, Range(0.02, 1e6)]  # at least one control step
Command = Annotated[tuple[float, float], Range(-5, 5)]


@dataclasses.dataclass(frozen=True)
class WorldArgs:
    """The settings that a world depends on.

    The environment holds these alone. So its step is the same function whatever the other settings
    are, and onekernel finds it in its cache.
    """

    robot: str = "g1"
    """a row of ROBOTS: g1, g1_29dof, h1, h1_2, go2, go2_no_clock"""
    decimation: Annotated[int, Range(1, 100)] = 4
    """physics steps in one control step of 0.02 s"""
    command_x: Command = (-0.6, 1.0)
    """range of the commanded velocity forwards, m/s; by default the robot's, like the next two"""
    command_y: Command = (-0.4, 0.4)
    """range of the commanded velocity to the left, m/s"""
    command_yaw: Command = (-0.8, 0.8)
    """range of the commanded turn counterclockwise, rad/s"""
    command_every: Seconds = 5.0
    """mean seconds between commands; each control step has the same chance of a new one"""
    standing: Fraction = 0.2
    """share of the commands that tell the robot to stand still"""
    one_axis: Fraction = 0.5
    """share of the others that are along one axis: forwards, sideways or a turn alone"""
    obs_noise: NonNegative = 1.0
    """factor of the noise on the actor's observation"""
    push_speed: NonNegative = 0.8
    """largest sudden change of the base's horizontal velocity, m/s along each axis"""
    push_every: Seconds = 3.0
    """mean seconds between pushes; each control step has the same chance of one"""
    friction: Annotated[tuple[float, float], Range(0.01, 10)] = (0.4, 1.25)
    """range of the feet's sliding friction"""
    added_mass: Annotated[tuple[float, float], Range(-5, 1e3)] = (-1.0, 3.0)
    """range of the mass that is added to the base, kg"""
    shifted_center: Shift = 0.03
    """largest shift of the base's centre of mass along each axis, m"""
    gain_noise: RelativeError = 0.1
    """largest relative error of each joint's stiffness and damping"""
    strength_noise: RelativeError = 0.1
    """largest relative error of each motor's torque"""
    action_delay: Fraction = 1.0
    """largest delay of an action, in control steps"""


@dataclasses.dataclass(frozen=True)
class Args(WorldArgs):
    """PPO for Unitree's legged robots, on MuJoCo XLA."""

    # The run
    exp_name: str = "ppo_mjx_unitree"
    """name of the experiment, part of the run folder's name"""
    seed: CountOrZero = 1
    """every random number follows from it and from the number of devices"""
    num_devices: MaybeCount = None
    """devices to split the worlds over; by default as many GPUs or CPU cores as divide the work"""
    runs_dir: str = "runs"
    """folder for the run folders"""
    track: bool = False
    """log to Weights & Biases as well; WANDB_PROJECT names the project"""
    capture_video: bool = False
    """write an mp4 of the trained policy in C MuJoCo, after training or with --evaluate"""
    checkpoint_every: Cadence = 0.01
    """share of the training between checkpoints; from 1 on, a number of iterations; three are kept"""
    compile_cache: bool = True
    """keep compiled programs in the user's cache folder, for a quicker start next time"""
    resume: str | None = None
    """run folder to continue with its own settings; a larger --total-timesteps makes it longer"""
    init_from: str | None = None
    """run folder whose policy and statistics a new run begins with, instead of random weights"""
    evaluate: str | None = None
    """run folder whose policy to put to the test; nothing is trained"""
    coordinator_address: str | None = None
    """host:port of process 0, if several processes train together; auto: as SLURM or Open MPI says"""
    num_processes: MaybeCount = None
    """processes that train together, each with its own devices"""
    process_id: Annotated[int | None, Range(0, 1e9)] = None
    """number of this process, from 0"""
    smoke: bool = False
    """check this installation: a short run, which is resumed and must end the same"""

    # The environment, besides what WorldArgs holds
    curriculum: Fraction = 0.05
    """share of the training in which noise, pushes and randomisation can reach their full strength;
    it grows while commands are followed well, and falls otherwise; 0: full from the start"""

    # The algorithm, with CleanRL's names
    total_timesteps: Annotated[int, Range(1, 2**62)] = 15_000_000
    """environment steps, over all worlds"""
    learning_rate: NonNegative = 3e-3
    """Adam's step size at the start; with --desired-kl it stays within 1e-5 and 1e-2"""
    num_envs: Count = 512
    """worlds, over all devices"""
    num_steps: Count = 24
    """steps of each world in one rollout"""
    gamma: Fraction = 0.99
    """discount factor"""
    gae_lambda: Fraction = 0.95
    """lambda of the generalised advantage estimate"""
    num_minibatches: Count = 12
    """minibatches of one epoch"""
    update_epochs: Annotated[int, Range(1, 1e3)] = 2
    """passes over a rollout"""
    clip_coef: NonNegative = 0.2
    """clipping range of the probability ratio"""
    ent_coef: NonNegative = 0.006
    """weight of the entropy bonus at the start"""
    final_ent_coef: Annotated[float, Range(-1, 1)] = -0.006
    """weight at the end, linear in between; below 0 the actions' noise falls faster"""
    vf_coef: NonNegative = 1.0
    """weight of the value loss"""
    imitation_coef: NonNegative = 0.5
    """weight at the start of the loss that draws the actor to a simple stepping motion"""
    imitation_until: Annotated[float, Range(1e-9, 1)] = 0.1
    """share of the training over which that weight falls to 0"""
    max_grad_norm: NonNegative = 1.0
    """gradients are scaled down to this norm"""
    desired_kl: Annotated[float | None, Range(0, 1e9)] = 0.05
    """adapt the step size to this KL divergence; None: anneal the step size linearly to 0"""
    final_kl: Fraction = 0.2
    """share of that divergence that is left at the end; linear in between"""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """widths of the ELU layers, in the actor and in the critic"""
    init_log_std: Annotated[float, Range(-20, 20)] = -1.0
    """log of the policy's standard deviation at the start"""
    policy_average: Fraction = 0.02
    """time constant of the saved weights' running average, as a share of the training; 0: none"""

    @property
    def steps_per_iteration(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.steps_per_iteration

    def cadence(self, every: float) -> int:
        """Iterations between two events: `every` itself from 1 on, else that share of the training."""
        return max(1, round(every if every >= 1 else every * self.num_iterations))


# ---- 2. Robots (SI units and radians) ------------------------------------------------------------
CONTROL_DT = 0.02  # s, of a control step
MODELS = Path(__file__).parent / "robots"


@dataclasses.dataclass(frozen=True)
class Joint:
    """What MJCF does not say of a joint."""

    stiffness: float  # kp of its controller, Nm/rad
    damping: float  # kd, Nm s/rad
    default: float = 0.0  # its angle in the default pose, rad
    upright: bool = False  # the reward's term upright_joints keeps it near 0
    posture: float = 0.0  # its share of the reward's term posture, which keeps it near `default`
    reach: float = 1.0  # factor of the robot's action_scale
    held: bool = False  # no action moves it: its controller holds it at `default`

    # The stepping motion that the actor imitates at first (`stepping_action`), as offsets from
    # `default`.
    lift: float = 0.0  # rad, added halfway through a swing
    # Per unit of the command (x, y, yaw): added at landing, subtracted at lift-off.
    sweep: tuple[float, float, float] = (0.0, 0.0, 0.0)  # rad s/m, rad s/m, s


# shared: sides
# Names of joints and feet begin with their side, unless they are in the middle.
OTHER_SIDE = {"left": "right", "right": "left", "FL": "FR", "FR": "FL", "RL": "RR", "RR": "RL"}


def side_of(name: str) -> str:
    return name.split("_")[0]


def other_side(name: str) -> str:
    """The name of the joint or foot that is this one's image in a mirror."""
    side = side_of(name)
    return OTHER_SIDE.get(side, side) + name.removeprefix(side)


def both_legs(
    leg: dict[str, Joint], sides: tuple[str, str] = ("left", "right")
) -> dict[str, Joint]:
    """The joints of a left leg or arm and of a right one, by the same numbers.

    Defaults of joints about x and z have opposite signs on the right: replace them (`go2_legs`).
    """
    return {f"{side}_{name}": joint for side in sides for name, joint in leg.items()}


def slow_servo(armature: float, torque: float, **fields) -> Joint:
    """A joint with mjlab's gains: 10 Hz and a damping ratio of 2, by its motor's armature alone.

    armature: kg m^2; torque: the motor's largest, Nm. An action of 1 moves the target by
    `action_scale` times the angle at which the motor gives all of it.
    Source: mujocolab/mjlab, commit 0eda4e7.
    """
    rate = 2 * math.pi * 10  # rad/s
    stiffness = armature * rate**2
    damping = 2 * 2 * armature * rate
    return Joint(stiffness=stiffness, damping=damping, reach=torque / stiffness, **fields)


# end shared


@dataclasses.dataclass(frozen=True)
class Robot:
    """What MJCF does not say of a robot, and the robot's task.

    The MJCF file describes a free base and what hangs on it by joints about one axis each: legs,
    perhaps a waist and arms. Limbs come in pairs, the left one of each pair first, with the same
    joints in the same order. Each joint has a motor, whose ctrl is the torque, or a servo, of which
    only the largest torque counts here. The spheres under the feet are all that can touch the
    floor. `check_model` refuses what differs. docs/ppo_mjx_unitree.md, "A robot of your own", goes
    through file and row.
    """

    mjcf: str  # file in robots/, or an absolute path
    joints: dict[str, Joint]  # by their names in the file, in the order of actions
    feet: tuple[str, ...]  # bodies
    weights: dict[str, float]  # of the reward's terms, per second: see section 4
    test_commands: dict[str, tuple[float, float, float]]  # by name; see section 13

    start_height: float  # m, of the base, at resets
    target_height: float  # m, that the reward asks for
    min_height: float  # m: below it the robot has fallen
    max_tilt: float  # rad: tilted by more, too

    # The gait. A leg and its image are half a period apart, so that a mirror shows the gait as it
    # is half a period later.
    gait_period: float  # s, an even number of control steps
    gait_offsets: tuple[float, ...]  # phase of each foot, as a share of the period
    stance_share: float  # of the period, that a foot spends on the floor
    swing_height: float  # m, of the foot's body in the air
    clock: bool = True  # whether actor and critic see the gait's phase

    action_scale: float = 0.25  # rad, from an action to the target of its joint

    # Defaults of the flags of the same name: `default_args` puts them in place of those of Args.
    command_x: tuple[float, float] = Args.command_x
    command_y: tuple[float, float] = Args.command_y
    command_yaw: tuple[float, float] = Args.command_yaw
    added_mass: tuple[float, float] = Args.added_mass
    standing: float = Args.standing
    imitation_coef: float = Args.imitation_coef
    ent_coef: float = Args.ent_coef
    total_timesteps: int = Args.total_timesteps

    @cached_property
    def model(self) -> mujoco.MjModel:
        """The MJCF file's content, to be read; simulations load their own."""
        return load_model(self, CONTROL_DT)

    def joint_array(self, name: str) -> np.ndarray:
        """A field of all joints: [J, ...]."""
        return np.array([getattr(joint, name) for joint in self.joints.values()], float)

    @property
    def acted(self) -> np.ndarray:
        """Numbers of the joints that actions move, in the order of actions: [A]."""
        return np.flatnonzero(self.joint_array("held") == 0)

    def targets(self, action, xp=jnp):
        """Where actions [..., A] send the joints: [..., J] rad."""
        offset = self.action_scale * self.joint_array("reach")[self.acted] * action
        if len(self.acted) < len(self.joints):
            places = np.full(len(self.joints), len(self.acted))  # of the joints in `padded`
            places[self.acted] = np.arange(len(self.acted))
            padded = xp.concatenate([offset, xp.zeros_like(offset[..., :1])], axis=-1)
            offset = padded[..., places]
        return self.joint_array("default") + offset

    @property
    def limits(self) -> np.ndarray:
        """Lowest and highest angle of each joint: [J, 2] rad."""
        return self.model.jnt_range[1:]  # after the base's

    @property
    def mirror_sign(self) -> np.ndarray:
        """What a mirror at y = 0 does to the angle of each joint [J]: 1 about y, else -1."""
        return mirror_of_joints(list(self.joints), self.model)[1]

    @property
    def leg_of_joint(self) -> np.ndarray:
        """Number of the foot on each joint's side: [J]. 0 for the joints in the middle."""
        sides = [side_of(foot) for foot in self.feet]
        own = [side_of(name) for name in self.joints]
        return np.array([sides.index(side) if side in sides else 0 for side in own])

    @property
    def gait_ticks(self) -> int:
        """Control steps in a period of the gait.

        The clock counts them, for shares of the period are rounded in float32.
        """
        return round(self.gait_period / CONTROL_DT)


# What walks on two legs. Unitree's terms and some more; those that make it walk weigh more.
BIPED_WEIGHTS = {
    "track_velocity": 2.0,
    "track_yaw": 1.0,
    "alive": 0.15,
    "gait": 1.0,
    "swing_height": -20.0,
    "stance_slip": -0.2,
    "vertical_velocity": -2.0,
    "roll_pitch_rate": -0.05,
    "tilt": -1.0,
    "height": -10.0,
    "joint_acceleration": -2.5e-7,
    "joint_velocity": -1e-3,
    "torque": -1e-5,
    "action_change": -0.01,
    "joint_limits": -5.0,
    "upright_joints": -1.0,
    "lifted_standing": -40.0,
    "capture": -8.0,
    "standing_pose": 1.5,
}
BIPED_COMMANDS = {
    "stand": (0.0, 0.0, 0.0),
    "forward 0.3": (0.3, 0.0, 0.0),
    "forward 0.6": (0.6, 0.0, 0.0),
    "forward 1.0": (1.0, 0.0, 0.0),
    "backward 0.4": (-0.4, 0.0, 0.0),
    "left 0.3": (0.0, 0.3, 0.0),
    "right 0.3": (0.0, -0.3, 0.0),
    "turn left 0.6": (0.0, 0.0, 0.6),
    "turn right 0.6": (0.0, 0.0, -0.6),
    "mixed": (0.5, 0.2, 0.5),
}


def go2_legs(ends: str, thigh: float, turn: float) -> dict[str, Joint]:
    """The joints of the Go2's front or rear legs.

    ends: F or R; thigh: its default angle, rad; turn: what a command to turn does to the hip, s.
    """
    hip = Joint(stiffness=20, damping=0.5, default=0.1, sweep=(0.0, 0.35, turn))
    leg = {
        "hip": hip,
        "thigh": Joint(stiffness=20, damping=0.5, default=thigh, lift=0.3, sweep=(-0.35, 0.0, 0.0)),
        "calf": Joint(stiffness=20, damping=0.5, default=-1.5, lift=-0.6),
    }
    right_hip = {f"{ends}R_hip": dataclasses.replace(hip, default=-0.1)}
    return both_legs(leg, sides=(f"{ends}L", f"{ends}R")) | right_hip


GO2_JOINTS = go2_legs("F", thigh=0.8, turn=0.1) | go2_legs("R", thigh=1.0, turn=-0.1)
GO2_WEIGHTS = {
    "track_velocity": 1.0,
    "track_yaw": 0.5,
    "vertical_velocity": -2.0,
    "roll_pitch_rate": -0.05,
    "joint_acceleration": -2.5e-7,
    "torque": -2e-4,
    "action_change": -0.01,
    "joint_limits": -10.0,
}
GO2_COMMANDS = {
    "stand": (0.0, 0.0, 0.0),
    "forward 0.5": (0.5, 0.0, 0.0),
    "forward 1.0": (1.0, 0.0, 0.0),
    "backward 0.5": (-0.5, 0.0, 0.0),
    "left 0.5": (0.0, 0.5, 0.0),
    "right 0.5": (0.0, -0.5, 0.0),
    "turn left 0.8": (0.0, 0.0, 0.8),
    "turn right 0.8": (0.0, 0.0, -0.8),
    "mixed": (0.6, 0.3, 0.5),
}

ROBOTS = {
    "g1": Robot(
        mjcf="g1.xml",
        joints=both_legs(
            {
                "hip_pitch": Joint(
                    stiffness=100, damping=2, default=-0.1, lift=-0.4, sweep=(-0.32, 0.0, 0.0)
                ),
                "hip_roll": Joint(stiffness=100, damping=2, upright=True, sweep=(0.0, 0.32, 0.0)),
                "hip_yaw": Joint(stiffness=100, damping=2, upright=True, sweep=(0.0, 0.0, 0.22)),
                "knee": Joint(stiffness=150, damping=4, default=0.3, lift=0.8),
                "ankle_pitch": Joint(
                    stiffness=40, damping=2, default=-0.2, lift=-0.4, sweep=(0.32, 0.0, 0.0)
                ),
                "ankle_roll": Joint(stiffness=40, damping=2, sweep=(0.0, -0.32, 0.0)),
            }
        ),
        feet=("left_ankle_roll", "right_ankle_roll"),
        weights=BIPED_WEIGHTS,
        test_commands=BIPED_COMMANDS,
        start_height=0.8,
        target_height=0.78,
        min_height=0.5,
        max_tilt=0.8,
        gait_period=0.8,
        gait_offsets=(0.0, 0.5),
        stance_share=0.55,
        swing_height=0.08,
    ),
    # Waist and arms move, too. mjlab's motors and gains; Playground's pose.
    "g1_29dof": Robot(
        mjcf="g1_29dof.xml",
        joints={
            f"{name}_joint": joint
            for name, joint in (
                both_legs(
                    {
                        "hip_pitch": slow_servo(
                            0.0101775, 88, default=-0.312, lift=-0.25, sweep=(-0.32, 0.0, 0.0)
                        ),
                        "hip_roll": slow_servo(
                            0.0251019, 139, upright=True, sweep=(0.0, 0.32, 0.0)
                        ),
                        "hip_yaw": slow_servo(0.0101775, 88, upright=True, sweep=(0.0, 0.0, 0.22)),
                        "knee": slow_servo(0.0251019, 139, default=0.669, lift=0.5),
                        "ankle_pitch": slow_servo(
                            0.00721945, 50, default=-0.363, lift=-0.25, sweep=(0.32, 0.0, 0.0)
                        ),
                        "ankle_roll": slow_servo(0.00721945, 50, sweep=(0.0, -0.32, 0.0)),
                    }
                )
                | {
                    "waist_yaw": slow_servo(0.0101775, 88, posture=1.0),
                    "waist_roll": slow_servo(0.00721945, 50, posture=1.0),
                    "waist_pitch": slow_servo(0.00721945, 50, default=0.073, posture=1.0),
                }
                | both_legs(
                    {
                        "shoulder_pitch": slow_servo(0.00360972, 25, default=0.2, posture=1.0),
                        "shoulder_roll": slow_servo(0.00360972, 25, default=0.2, posture=1.0),
                        "shoulder_yaw": slow_servo(0.00360972, 25, posture=1.0),
                        "elbow": slow_servo(0.00360972, 25, default=0.6, posture=1.0),
                        "wrist_roll": slow_servo(0.00360972, 25, posture=1.0),
                        "wrist_pitch": slow_servo(0.00425, 5, posture=1.0),
                        "wrist_yaw": slow_servo(0.00425, 5, posture=1.0),
                    }
                )
                | {"right_shoulder_roll": slow_servo(0.00360972, 25, default=-0.2, posture=1.0)}
            ).items()
        },
        feet=("left_ankle_roll_link", "right_ankle_roll_link"),
        # With -40 for feet in the air it learnt to stand before it could step, and fell.
        weights=BIPED_WEIGHTS | {"posture": -0.3, "lifted_standing": -15.0},
        test_commands=BIPED_COMMANDS,
        start_height=0.79,
        target_height=0.75,
        min_height=0.5,
        max_tilt=0.8,
        gait_period=0.8,
        gait_offsets=(0.0, 0.5),
        stance_share=0.55,
        swing_height=0.08,
        ent_coef=0.004,
    ),
    # Unitree resets the base to 1.0 m, which puts the feet below the floor, and asks for 1.05 m,
    # which is out of reach; the feet's bodies are 0.07 m above the soles. Here it has the clearance
    # of the G1.
    "h1": Robot(
        mjcf="h1.xml",
        joints=both_legs(
            {
                "hip_yaw": Joint(stiffness=150, damping=2, upright=True, sweep=(0.0, 0.0, 0.22)),
                "hip_roll": Joint(stiffness=150, damping=2, upright=True, sweep=(0.0, 0.26, 0.0)),
                "hip_pitch": Joint(
                    stiffness=150, damping=2, default=-0.1, lift=-0.35, sweep=(-0.26, 0.0, 0.0)
                ),
                "knee": Joint(stiffness=200, damping=4, default=0.3, lift=0.7),
                "ankle": Joint(
                    stiffness=40, damping=2, default=-0.2, lift=-0.35, sweep=(0.26, 0.0, 0.0)
                ),
            }
        ),
        feet=("left_ankle", "right_ankle"),
        weights=BIPED_WEIGHTS | {"joint_velocity": 0.0, "torque": 0.0},
        test_commands=BIPED_COMMANDS,
        start_height=1.05,
        target_height=1.03,
        min_height=0.65,
        max_tilt=0.8,
        gait_period=0.8,
        gait_offsets=(0.0, 0.5),
        stance_share=0.55,
        swing_height=0.115,
    ),
    "h1_2": Robot(
        mjcf="h1_2.xml",
        joints=both_legs(
            {
                "hip_yaw": Joint(stiffness=200, damping=2.5, upright=True, sweep=(0.0, 0.0, 0.22)),
                "hip_pitch": Joint(
                    stiffness=200, damping=2.5, default=-0.16, lift=-0.3, sweep=(-0.26, 0.0, 0.0)
                ),
                "hip_roll": Joint(stiffness=200, damping=2.5, upright=True, sweep=(0.0, 0.26, 0.0)),
                "knee": Joint(stiffness=300, damping=4, default=0.36, lift=0.6),
                "ankle_pitch": Joint(
                    stiffness=40, damping=2, default=-0.2, lift=-0.3, sweep=(0.26, 0.0, 0.0)
                ),
                "ankle_roll": Joint(stiffness=40, damping=2, sweep=(0.0, -0.26, 0.0)),
            }
        ),
        feet=("left_ankle_roll", "right_ankle_roll"),
        weights=BIPED_WEIGHTS,
        test_commands=BIPED_COMMANDS,
        start_height=1.05,
        target_height=1.0,
        min_height=0.65,
        max_tilt=0.8,
        gait_period=0.8,
        gait_offsets=(0.0, 0.5),
        stance_share=0.55,
        swing_height=0.09,
    ),
    # A trot by the clock: diagonal legs together.
    "go2": Robot(
        mjcf="go2.xml",
        joints=GO2_JOINTS,
        feet=("FL_foot", "FR_foot", "RL_foot", "RR_foot"),
        weights=GO2_WEIGHTS
        | {
            "track_velocity": 2.0,
            "track_yaw": 1.0,
            "gait": 0.5,
            "swing_height": -20.0,
            # Without these it walks crouched, and stands with its nose down.
            "height": -100.0,
            "tilt": -5.0,
            "torque": -5e-5,
        },
        test_commands=GO2_COMMANDS,
        start_height=0.42,
        target_height=0.3,
        min_height=0.15,
        max_tilt=0.8,
        gait_period=0.48,
        gait_offsets=(0.0, 0.5, 0.5, 0.0),
        stance_share=0.5,
        swing_height=0.08,
        command_x=(-1.0, 1.0),
        command_y=(-1.0, 1.0),
        command_yaw=(-1.0, 1.0),
        standing=0.15,
        added_mass=(-1.0, 1.0),
        total_timesteps=10_000_000,
    ),
    # As at Unitree's it has no clock and finds its gait by itself; unlike there, the actor does not
    # see the base's velocity, which a robot cannot measure. No training of it has walked yet.
    "go2_no_clock": Robot(
        mjcf="go2.xml",
        joints=GO2_JOINTS,
        feet=("FL_foot", "FR_foot", "RL_foot", "RR_foot"),
        weights=GO2_WEIGHTS | {"air_time": 1.0},
        test_commands=GO2_COMMANDS,
        start_height=0.42,
        target_height=0.3,
        min_height=0.15,
        max_tilt=0.8,
        gait_period=0.48,
        gait_offsets=(0.0, 0.5, 0.5, 0.0),
        stance_share=0.5,
        swing_height=0.08,
        clock=False,
        command_x=(-1.0, 1.0),
        command_y=(-1.0, 1.0),
        command_yaw=(-1.0, 1.0),
        standing=0.15,
        added_mass=(-1.0, 1.0),
        imitation_coef=0.0,
    ),
}


def default_args(robot: str) -> Args:
    """The settings that hold where the command line says nothing: the robot's own, and Args'."""
    require(robot in ROBOTS, f"--robot {robot}: there are {', '.join(ROBOTS)}")
    row = ROBOTS[robot]
    own = {field.name for field in dataclasses.fields(Args)}
    own &= {field.name for field in dataclasses.fields(Robot)}
    return Args(robot=robot, **{name: getattr(row, name) for name in own})


def load_model(robot: Robot, dt: float, visuals: bool = True) -> mujoco.MjModel:
    """The robot's model, for C MuJoCo.

    dt: s, of a physics step; visuals: with the shapes that only a picture needs.
    """
    spec = mujoco.MjSpec.from_file(str(MODELS / robot.mjcf))
    spec.option.timestep = dt
    if not visuals:
        for geom in spec.geoms:
            if not geom.contype and not geom.conaffinity:
                spec.delete(geom)
    for actuator in spec.actuators:
        if actuator.biastype != mujoco.mjtBias.mjBIAS_NONE:  # a servo
            actuator.set_to_motor()
            actuator.inheritrange = 0
            actuator.ctrlrange = actuator.forcerange
    with or_fail(robot.mjcf if visuals else f"{robot.mjcf} without the shapes for pictures"):
        model = spec.compile()
    check_model(robot, model)
    if not visuals:
        lost = np.flatnonzero(model.body_mass < 0.999 * robot.model.body_mass)
        names = [model.body(number).name for number in lost]
        require(
            not names, f"{robot.mjcf}: {names} need an <inertial>, for their shapes are left out"
        )
    return model


def check_model(robot: Robot, model: mujoco.MjModel) -> None:
    """Refuse what the script would take for something else."""
    names = list(robot.joints)

    def check(good, message: str) -> None:
        require(good, f"{robot.mjcf}: {message}")

    kinds = mujoco.mjtJoint
    check(model.njnt and model.jnt_type[0] == kinds.mjJNT_FREE, "the base has no free joint")
    there = [model.joint(number).name for number in range(1, model.njnt)]
    check(there == names, f"its joints are {there}, but ROBOTS has {names}")
    hinges = (model.jnt_type[1:] == kinds.mjJNT_HINGE) & (model.jnt_limited[1:] > 0)
    check(hinges.all(), "all joints of a robot must be hinges with a range")
    lost = [name for name in names if other_side(name) not in names]
    check(not lost, f"no joint mirrors {lost}; OTHER_SIDE has the names of the sides")
    lost = [foot for foot in robot.feet if other_side(foot) not in robot.feet]
    check(not lost, f"no foot mirrors {lost}; OTHER_SIDE has the names of the sides")
    image, sign = mirror_of_joints(names, model)
    gaps = mirror_gaps(model, image, sign)
    first = int((gaps > 0.01).argmax())  # the highest in the tree
    message = f"{names[first]} moves {gaps[first]:.3f} m away from where a mirror shows its image"
    check(gaps[first] <= 0.01, f"{message}; see docs/ppo_mjx_unitree.md, A robot of your own")
    default = robot.joint_array("default")
    odd = [name for name, bad in zip(names, default[image] * sign != default, strict=True) if bad]
    check(not odd, f"ROBOTS' defaults of {odd} are not those that a mirror shows")
    for field in ("stiffness", "damping", "reach", "held"):
        values = robot.joint_array(field)
        odd = [name for name, bad in zip(names, values[image] != values, strict=True) if bad]
        check(not odd, f"ROBOTS' {field} of {odd} is not the same on both sides")

    moved = [model.joint(number).name for number in model.actuator_trnid[:, 0]]
    check(moved == names, f"its motors move {moved}, but joints and ROBOTS are {names}")
    check((model.actuator_gear[:, 0] == 1).all(), "motors must have a gear of 1")
    weak = [names[number] for number in np.flatnonzero(model.actuator_ctrlrange[:, 1] <= 0)]
    advice = "give a motor a ctrlrange, a servo a forcerange"
    check(not weak, f"the largest torque of {weak} is not known; {advice}")

    bodies = [model.body(number).name for number in range(model.nbody)]
    lost = [foot for foot in robot.feet if foot not in bodies]
    check(not lost, f"there are no bodies {lost}, which are feet in ROBOTS")
    soles = [sole_geoms(model, foot) for foot in robot.feet]
    of_all = np.concatenate(soles)
    spheres = (model.geom_type[of_all] == mujoco.mjtGeom.mjGEOM_SPHERE).all()
    alike = len({len(geoms) for geoms in soles}) == len(set(model.geom_size[of_all, 0])) == 1
    check(spheres and alike, "feet must touch by spheres alone, equally many of one radius")
    touches = (model.geom_contype > 0) | (model.geom_conaffinity > 0)
    of_robot = model.geom_bodyid > 0
    others = np.setdiff1d(np.flatnonzero(touches & of_robot), of_all)
    where = sorted({bodies[model.geom_bodyid[number]] for number in others})
    check(
        not where, f"shapes of {where} can touch; contype and conaffinity must be 0 but for soles"
    )
    check((touches & ~of_robot).any(), "there is no floor")
    above = model.geom_priority[of_all].min() > model.geom_priority[touches & ~of_robot].max()
    check(above, "soles need a priority, or the floor's friction counts as well as --friction")

    offsets = dict(zip(robot.feet, robot.gait_offsets, strict=False))
    apart = [abs(offsets[foot] - offsets.get(other_side(foot), math.nan)) for foot in offsets]
    good = len(offsets) == len(robot.feet) and np.allclose(apart, 0.5)
    check(good, "gait_offsets in ROBOTS must have a foot and its image half a period apart")
    whole = math.isclose(robot.gait_ticks * CONTROL_DT, robot.gait_period)
    even = whole and robot.gait_ticks % 2 == 0
    check(even, f"its gait_period must be an even number of control steps of {CONTROL_DT} s")
    check("track_velocity" in robot.weights, "weights in ROBOTS must have track_velocity")
    stands = [name for name, command in robot.test_commands.items() if not any(command)]
    check(stands, "test_commands in ROBOTS must have one of zeros, by which drift is measured")


# shared: limbs
def mirror_of_joints(names: list[str], model: mujoco.MjModel) -> tuple[np.ndarray, np.ndarray]:
    """Number of each joint's image in a mirror at y = 0, and what it does to its angle: [J] each.

    The sign is 1 for a joint about y, else -1.
    """
    image = np.array([names.index(other_side(name)) for name in names])
    return image, np.where(model.jnt_axis[1:, 1] != 0, 1.0, -1.0)


def mirror_gaps(model: mujoco.MjModel, image: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """How far each joint, or its link's mass, is from where a mirror shows its image: [J] m.

    In random poses, the largest distance; 0 for a robot that is its own mirror image. image, sign:
    by `mirror_of_joints`.
    """
    data = mujoco.MjData(model)
    random = np.random.default_rng(0)

    def places(angles) -> np.ndarray:
        data.qpos[:] = [0, 0, 0, 1, 0, 0, 0, *angles]
        mujoco.mj_kinematics(model, data)
        return np.stack([data.xanchor[1:], data.xipos[model.jnt_bodyid[1:]]])  # [2, J, 3]

    gaps = []
    for _ in range(8):
        angles = random.uniform(-1, 1, len(image))
        shown = places(angles[image] * sign)[:, image] * [1, -1, 1]
        gaps.append(np.linalg.norm(shown - places(angles), axis=-1).max(axis=0))
    return np.max(gaps, axis=0)


def sole_geoms(model: mujoco.MjModel, foot: str) -> np.ndarray:
    """Numbers of the geoms of a foot that can touch the floor."""
    return np.flatnonzero((model.geom_conaffinity > 0) & (model.geom_bodyid == model.body(foot).id))


def find_feet(robot: Robot, model: mujoco.MjModel) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the feet's bodies [F], and of the spheres under them [F, S]."""
    bodies = np.array([model.body(foot).id for foot in robot.feet])
    return bodies, np.array([sole_geoms(model, foot) for foot in robot.feet])


# end shared


# shared: controller
class Controller(NamedTuple):
    """The joints' PD controllers: [J] each."""

    default: np.ndarray  # rad, the default pose
    stiffness: np.ndarray  # Nm/rad
    damping: np.ndarray  # Nm s/rad
    max_torque: np.ndarray  # Nm

    def torque(self, target, qpos, qvel, stiffness=1.0, damping=1.0, strength=1.0, xp=jnp):
        """Torques [J] in Nm that draw the joints to target angles [J].

        qpos: [7 + J]; qvel: [6 + J]. The last three are factors of domain randomisation.
        """
        torque = stiffness * self.stiffness * (target - qpos[7:])
        torque = torque - damping * self.damping * qvel[6:]
        return xp.minimum(xp.maximum(strength * torque, -self.max_torque), self.max_torque)


def make_controller(robot: Robot) -> Controller:
    """The controllers of all joints, with the torque limits of the MJCF file."""
    return Controller(
        default=robot.joint_array("default"),
        stiffness=robot.joint_array("stiffness"),
        damping=robot.joint_array("damping"),
        max_torque=robot.model.actuator_ctrlrange[:, 1],
    )


# end shared


# shared: payloads
# Payloads: variants of the model with another mass and centre of the base. PAYLOAD_FIELDS are the
# fields that differ. The first one is the robot as it is.
NUM_PAYLOADS = 64
PAYLOAD_FIELDS = (
    "body_mass",
    "body_ipos",
    "body_subtreemass",
    "body_invweight0",
    "dof_invweight0",
)


def draw_payloads(args: Args, model: mujoco.MjModel) -> dict[str, np.ndarray]:
    """PAYLOAD_FIELDS of no payload and of random ones: name -> [NUM_PAYLOADS, ...].

    MuJoCo computes what follows from mass and centre, so that they are drawn before training, and
    not at each reset. `model` is changed.
    """
    random = np.random.default_rng(0)  # whatever the seed, or each would need a kernel of its own
    data = mujoco.MjData(model)
    mass = model.body_mass[1]  # of the base; 0 is the world
    center = model.body_ipos[1].copy()
    message = f"--added-mass {args.added_mass}: the base has {mass:.3g} kg, nothing would be left"
    require(mass + args.added_mass[0] > 0, message)

    payloads = {name: [getattr(model, name).copy()] for name in PAYLOAD_FIELDS}
    for _ in range(NUM_PAYLOADS - 1):
        model.body_mass[1] = mass + random.uniform(*args.added_mass)
        shift = random.uniform(-args.shifted_center, args.shifted_center, 3)
        model.body_ipos[1] = center + shift
        mujoco.mj_setConst(model, data)
        for name, values in payloads.items():
            values.append(getattr(model, name).copy())
    return {name: np.array(values) for name, values in payloads.items()}


# end shared


# ---- 3. Observation ------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the observation."""

    width: int | Literal["joints", "actions"]  # how many numbers
    scale: float | tuple[float, ...]  # from SI units to the networks' input
    noise: float  # half the width of the uniform noise on the scaled numbers
    # Signs that a mirror at y = 0 gives them; None: it does to them what it does to joints.
    mirror: tuple[int, ...] | None
    for_actor: bool = True  # whether the actor sees it; the critic sees all, without noise


# The actor's parts are those that the robot's own computer knows, in Unitree's order and scales.
OBSERVATION = {
    # m/s, of the base, in its frame
    "velocity": Part(width=3, scale=2.0, noise=0.0, mirror=(1, -1, 1), for_actor=False),
    # rad/s, of the base, in its frame
    "rates": Part(width=3, scale=0.25, noise=0.05, mirror=(-1, 1, -1)),
    # its direction, in the base's frame
    "gravity": Part(width=3, scale=1.0, noise=0.05, mirror=(1, -1, 1)),
    # m/s, m/s, rad/s
    "command": Part(width=3, scale=(2.0, 2.0, 0.25), noise=0.0, mirror=(1, -1, -1)),
    # rad, of the joints, less the default pose
    "angles": Part(width="joints", scale=1.0, noise=0.01, mirror=None),
    # rad/s, of the joints
    "speeds": Part(width="joints", scale=0.05, noise=0.075, mirror=None),
    # the last one
    "action": Part(width="actions", scale=1.0, noise=0.0, mirror=None),
    # sine and cosine of the gait's phase; a mirror shifts it by half a period
    "clock": Part(width=2, scale=1.0, noise=0.0, mirror=(-1, -1)),
}
SEEN = {
    "actor": {name: part for name, part in OBSERVATION.items() if part.for_actor},
    "critic": OBSERVATION,
}


def seen_parts(robot: Robot, who: str) -> dict[str, Part]:
    """What the actor or the critic sees of this robot, by the parts' names."""
    return {name: part for name, part in SEEN[who].items() if robot.clock or name != "clock"}


# shared: base_frame
def cross_product(a, b, xp=jnp):
    """Of vectors [..., 3]. On single vectors numpy.cross takes more than twice as long."""
    a1, a2, a3 = a[..., 0], a[..., 1], a[..., 2]
    b1, b2, b3 = b[..., 0], b[..., 1], b[..., 2]
    return xp.stack([a2 * b3 - a3 * b2, a3 * b1 - a1 * b3, a1 * b2 - a2 * b1], axis=-1)


def to_base_frame(quat, vector, xp=jnp):
    """Turn a vector [..., 3] of the world by the inverse of a quaternion [..., 4], w x y z."""
    w = quat[..., :1]
    axis = -quat[..., 1:]
    cross = cross_product(axis, vector, xp)
    return vector + 2 * (w * cross + cross_product(axis, cross, xp))


def stands(command):
    """Whether the command [..., 3] is to stand still: bool [...]."""
    return (command == 0).all(axis=-1)


# end shared


def sense(robot: Robot, qpos, qvel, command, action, elapsed, xp=jnp) -> dict[str, Any]:
    """All parts of the observation in SI units: name -> [..., width].

    qpos: [..., 7 + J]; qvel: [..., 6 + J]; command: [..., 3]; action: [..., A], the last one;
    elapsed: [...] control steps. xp is jax.numpy or numpy.
    """
    quat = qpos[..., 3:7]
    down = xp.broadcast_to(xp.array([0.0, 0.0, -1.0]), qvel[..., :3].shape)
    phase = elapsed % robot.gait_ticks * (2 * math.pi / robot.gait_ticks)
    return {
        "velocity": to_base_frame(quat, qvel[..., :3], xp),
        "rates": qvel[..., 3:6],
        "gravity": to_base_frame(quat, down, xp),
        "command": command,
        "angles": qpos[..., 7:] - robot.joint_array("default"),
        "speeds": qvel[..., 6:],
        "action": action,
        "clock": xp.stack([xp.sin(phase), xp.cos(phase)], axis=-1),
    }


def observe(parts: dict[str, Part], senses: dict[str, Any], xp=jnp):
    """What the actor or the critic sees, without noise: [..., O]. parts: by `seen_parts`."""
    scaled = [senses[name] * np.array(part.scale) for name, part in parts.items()]
    return xp.concatenate(scaled, axis=-1)


def part_width(robot: Robot, part: Part) -> int:
    return {"joints": len(robot.joints), "actions": len(robot.acted)}.get(part.width, part.width)


# shared: parts
def part_slices(robot: Robot, parts: dict[str, Part]) -> dict[str, slice]:
    """Where the parts stand in the observation, by their names."""
    slices = {}
    start = 0
    for name, part in parts.items():
        end = start + part_width(robot, part)
        slices[name] = slice(start, end)
        start = end
    return slices


def noise_widths(robot: Robot, parts: dict[str, Part]) -> np.ndarray:
    """Half the width of the noise on each number of the observation: [O]."""
    widths = [part_width(robot, part) for part in parts.values()]
    return np.repeat([part.noise for part in parts.values()], widths)


def mirror_joints(robot: Robot, joints, chosen=None):
    """Angles, speeds or torques of joints [..., J] as a mirror shows them: sides are exchanged.

    chosen: numbers of the joints that there are values of; by default all of them.
    """
    chosen = np.arange(len(robot.joints)) if chosen is None else chosen
    names = [list(robot.joints)[number] for number in chosen]
    image = [names.index(other_side(name)) for name in names]
    return joints[..., np.array(image)] * robot.mirror_sign[chosen]


def mirror_actions(robot: Robot, actions):
    """Actions [..., A] as a mirror shows them."""
    return mirror_joints(robot, actions, robot.acted)


# end shared


def mirror_observation(robot: Robot, obs, xp=jnp, who="actor"):
    """What the actor or the critic sees, [..., O], as a mirror shows it."""
    parts = seen_parts(robot, who)
    mirrored = []
    for name, where in part_slices(robot, parts).items():
        part = obs[..., where]
        if parts[name].mirror is not None:
            part = part * np.array(parts[name].mirror)
        elif parts[name].width == "actions":
            part = mirror_actions(robot, part)
        else:
            part = mirror_joints(robot, part)
        mirrored.append(part)
    return xp.concatenate(mirrored, axis=-1)


def in_mirror(robot: Robot, command, elapsed):
    """Whether the networks see the world in a mirror, and their actions are mirrored: bool [...].

    A robot is its own mirror image, and a mirror shows its gait half a period later. In the second
    half of each period the networks look into the mirror, so they always see a first half, and what
    they learn for one leg holds for the other. Without a clock they see no turns to the right.
    command: [..., 3]; elapsed: [...] control steps.
    """
    if robot.clock:
        return elapsed % robot.gait_ticks >= robot.gait_ticks // 2
    return command[..., 2] + 1e-3 * command[..., 1] < 0  # the turn decides, if there is one


# ---- 4. Rewards ----------------------------------------------------------------------------------
# Widths of the rewards for tracking: an error whose square is the width costs 63%. That for the
# velocity grows with the speed asked for, up to 1 m/s. With TRACKING_WIDTH for all commands, who
# stands when told to walk at 0.3 m/s loses 30%, and who drifts by 0.2 m/s when told to stand 15%.
TRACKING_WIDTH = 0.25  # (m/s)^2 and (rad/s)^2, as in legged_gym's tracking_sigma
STANDING_WIDTH = 0.04  # (m/s)^2
STANDING_POSE_WIDTH = 0.01  # rad^2, of the joints' mean square


@struct.dataclass
class Motion:
    """What the rewards look at after a control step.

    Feet are read before the last physics step's integration, where MJX has their positions,
    velocities and contacts of one and the same moment, and so are torque and capture_error; the
    rest is read after it.
    """

    command: jax.Array  # [3] m/s, m/s, rad/s
    height: jax.Array  # [] m, of the base
    velocity: jax.Array  # [3] m/s, of the base, in its frame
    rates: jax.Array  # [3] rad/s, of the base, in its frame
    gravity: jax.Array  # [3] direction, in the base's frame
    angles: jax.Array  # [J] rad
    speeds: jax.Array  # [J] rad/s
    accelerations: jax.Array  # [J] rad/s^2, mean over the control step
    torque: jax.Array  # [J] Nm, of the last physics step
    action: jax.Array  # [A]
    action_before: jax.Array  # [A]
    foot_height: jax.Array  # [F] m, of the feet's bodies
    clearance: jax.Array  # [F] m, of the soles over the floor; 0 on it
    foot_velocity: jax.Array  # [F, 3] m/s
    contact: jax.Array  # [F] bool
    flight: jax.Array  # [F] s that a foot which lands now has been in the air; 0 for the others
    stance: jax.Array  # [F] bool: should be on the floor, by the clock
    capture_error: jax.Array  # [] m, see the function of this name


def is_stance(robot: Robot, elapsed, xp=jnp):
    """Whether the clock wants each foot on the floor: bool [..., F].

    elapsed: int [...], control steps since the reset (at the start of a training, random).
    """
    offsets = xp.array([round(offset * robot.gait_ticks) for offset in robot.gait_offsets])
    ticks = (elapsed[..., None] + offsets) % robot.gait_ticks  # since each foot's landing
    return ticks < round(robot.stance_share * robot.gait_ticks)


GRAVITY = 9.81  # m/s^2


def capture_error(center, velocity, quat, soles) -> jax.Array:
    """How far the capture point is outside of the box around the feet: [] m.

    The capture point is where a robot has to step so that it comes to rest: its centre of mass
    moves on like an inverted pendulum's. While it is between the feet, none has to move; while it
    is not, no ankle can stop the fall, and one must.

    center: [3] m, of mass; velocity: [2] m/s and quat: [4], of the base, whose velocity stands for
    that of the centre of mass; soles: [P, 3] m, of the points under the feet. The box around them,
    along the base's heading, stands for their convex hull; the lowest of them for the floor.
    Source: Pratt et al. 2006, "Capture point"; Koolen et al. 2012.
    """
    height = jnp.maximum(center[2] - soles[:, 2].min(), 0.1)  # m: a fallen robot's could be 0
    point = center[:2] + velocity * jnp.sqrt(height / GRAVITY)
    w, x, y, z = quat
    yaw = jnp.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    ahead = jnp.stack([jnp.cos(yaw), jnp.sin(yaw)])
    left = jnp.stack([-ahead[1], ahead[0]])
    offsets = (soles[:, :2] - point) @ jnp.stack([ahead, left], axis=1)  # [P, 2]
    beyond = jnp.maximum(jnp.maximum(offsets.min(axis=0), -offsets.max(axis=0)), 0.0)
    return jnp.linalg.norm(beyond)


def unweighted_terms(robot: Robot, m: Motion) -> dict[str, jax.Array]:
    """The terms of the robot's reward before weighting: name -> []."""
    lowest = robot.limits @ [0.95, 0.05]  # of the central 90% of each joint's range
    highest = robot.limits @ [0.05, 0.95]
    beyond = jnp.maximum(m.angles - highest, 0.0).sum() + jnp.maximum(lowest - m.angles, 0.0).sum()
    standing = stands(m.command)
    # Told to stand, a robot is to keep all feet on the floor, though the observed clock runs on. While
    # it could not come to rest so, as after a push, it is to step by the clock, as it does to walk.
    still = standing & (m.capture_error <= 0)
    stance = m.stance | still
    swings = ~m.contact & ~still
    velocity_error = jnp.square(m.command[:2] - m.velocity[:2]).sum()
    yaw_error = jnp.square(m.command[2] - m.rates[2])
    speed = jnp.linalg.norm(m.command[:2])
    walks = speed > 0.1  # m/s
    bent = robot.joint_array("posture") * jnp.square(m.angles - robot.joint_array("default"))
    apart = jnp.square(m.angles - robot.joint_array("default")).mean()

    width = STANDING_WIDTH + (TRACKING_WIDTH - STANDING_WIDTH) * jnp.minimum(speed, 1.0)
    terms = {
        "track_velocity": jnp.exp(-velocity_error / width),
        "track_yaw": jnp.exp(-yaw_error / TRACKING_WIDTH),
        "alive": jnp.ones(()),
        # Feet that are where they should be, less the others.
        "gait": (2.0 * (m.contact == stance) - 1).sum(),
        "swing_height": (swings * jnp.square(m.foot_height - robot.swing_height)).sum(),
        "stance_slip": (m.contact * jnp.square(m.foot_velocity).sum(axis=-1)).sum(),
        "vertical_velocity": jnp.square(m.velocity[2]),
        "roll_pitch_rate": jnp.square(m.rates[:2]).sum(),
        "tilt": jnp.square(m.gravity[:2]).sum(),
        "height": jnp.square(m.height - robot.target_height),
        "joint_acceleration": jnp.square(m.accelerations).sum(),
        "joint_velocity": jnp.square(m.speeds).sum(),
        "torque": jnp.square(m.torque).sum(),
        "action_change": jnp.square(m.action - m.action_before).sum(),
        "joint_limits": beyond,
        "upright_joints": jnp.square(robot.joint_array("upright") * m.angles).sum(),
        "posture": bent.sum(),
        # The cost grows with height, so that lowering a step pays at once.
        "lifted_standing": still * jnp.minimum(m.clearance, 0.03).sum(),
        "capture": standing * m.capture_error,
        "standing_pose": still * jnp.exp(-apart / STANDING_POSE_WIDTH),
        # Of each landing, the time in the air beyond half a second.
        "air_time": walks * jnp.where(m.flight > 0, m.flight - 0.5, 0.0).sum(),
    }
    unknown = [name for name in robot.weights if name not in terms]
    require(not unknown, f"ROBOTS: there are no terms {unknown} of the reward, but {list(terms)}")
    return {name: terms[name] for name in robot.weights}


def reward_terms(robot: Robot, m: Motion) -> dict[str, jax.Array]:
    """The terms of one control step's reward, weighted: name -> [].

    The reward is their sum, but at least 0, so that to end an episode early never pays; Env.step
    applies the bound.
    """
    terms = unweighted_terms(robot, m)
    weights = robot.weights.items()
    return {f"reward_{name}": CONTROL_DT * weight * terms[name] for name, weight in weights}


# ---- 5. Environment ------------------------------------------------------------------------------
MIN_COMMAND = 0.2  # m/s and rad/s: slower commands become 0


@struct.dataclass
class Physics:
    """The smallest state that determines the future; a step computes the rest of mjx.Data anew."""

    qpos: jax.Array  # [7 + J] m and quaternion of the base, rad
    qvel: jax.Array  # [6 + J] m/s (in the world) and rad/s (in its frame) of the base, rad/s
    qacc_warmstart: jax.Array  # [6 + J] where the constraint solver starts


@struct.dataclass
class State:
    """One world between two steps; names are MuJoCo Playground's."""

    data: Physics
    obs: dict[str, jax.Array]  # the actor's [O], with noise, and the critic's [O + 3]
    reward: jax.Array  # []
    done: jax.Array  # [] float, 1 if the robot fell or broke; the time limit is in info
    metrics: dict[str, jax.Array]  # the reward's terms, and the errors of tracking
    info: dict[str, Any]
    # key: of the commands, pushes and noise; command: [3]; action: [A], the last one, not mirrored;
    # elapsed: steps since the reset; truncated: the time limit is reached; broken: see Env;
    # domain, level: see Env.draw_domain; airborne: [F] steps since each foot was on the floor, only where
    # the robot's reward asks for it


# shared: physics
def physics_step(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """One step of one world's physics.

    onekernel's step equals MJX's to rounding, except that its solver stops as soon as it has
    converged, and that it follows C MuJoCo where MJX does not (docs/onekernel.md lists where).
    """
    if onekernel:
        return onekernel.mjx.step(model, data)
    with jax.default_matmul_precision("highest"):  # TF32, a GPU's default, is too coarse
        return mjx.step(model, data)


@cache
def kernel(function):
    """Compile a function of ONE world: jax.vmap of the result runs all worlds in one kernel.

    See docs/onekernel.md. Without onekernel it returns the function itself, which XLA compiles, to
    a program many times slower. Cached, so that each function is compiled once.
    """
    return onekernel.compile(function) if onekernel else function


# end shared


# shared: not_slow
def not_slow(command: jax.Array, low: np.ndarray, high: np.ndarray) -> jax.Array:
    """Commands, uniform from low to high, spread over what of that is no slower than MIN_COMMAND.

    Each keeps its sign. Where all of that side is slower, so is the result. All are [3].
    """
    fastest = jnp.where(command > 0, high, -low)
    slowest = jnp.maximum(jnp.where(command > 0, low, -high), 0.0)
    share = (jnp.abs(command) - slowest) / jnp.maximum(fastest - slowest, 1e-9)
    least = jnp.maximum(slowest, MIN_COMMAND)
    return jnp.sign(command) * (least + share * (fastest - least))


# end shared


def has_fallen(robot: Robot, qpos, xp=jnp):
    """Whether robots with coordinates [..., 7 + J] have fallen: bool [...]."""
    up = 1 - 2 * (xp.square(qpos[..., 4]) + xp.square(qpos[..., 5]))  # cosine of the tilt
    return (up < math.cos(robot.max_tilt)) | (qpos[..., 2] < robot.min_height)


class Env:
    """One world of a robot. `reset` and `step` are pure functions: batch them with jax.vmap.

    A world that is not finite, or faster than MAX_SPEED, is broken: its step ends the episode,
    earns nothing and is not learnt from, and its observation stays as it was.
    """

    MAX_SPEED = 100.0  # m/s and rad/s
    time_limit = 1000  # steps

    def __init__(self, args: Args):
        world = {field.name: getattr(args, field.name) for field in dataclasses.fields(WorldArgs)}
        self.args = WorldArgs(**world)
        self.robot = ROBOTS[args.robot]
        self.action_size = len(self.robot.acted)
        self.timed = "air_time" in self.robot.weights  # whether steps in the air are counted
        self.seen = {who: seen_parts(self.robot, who) for who in SEEN}
        self.noise = args.obs_noise * noise_widths(self.robot, self.seen["actor"])  # [O]
        self.controller = make_controller(self.robot)

        dt = CONTROL_DT / args.decimation
        self.payloads = draw_payloads(args, load_model(self.robot, dt, visuals=False))
        model = load_model(self.robot, dt, visuals=False)
        self.feet, self.soles = find_feet(self.robot, model)
        self.sole_radius = float(model.geom_size[self.soles[0, 0], 0])

        device = jax.local_devices()[0]
        self.model = mjx.put_model(model, device, impl="jax")
        self.template = mjx.make_data(self.model, device)

    def draw_command(self, key: jax.Array) -> jax.Array:
        """A velocity [3] in the base's frame: m/s, m/s, rad/s.

        Slow ones become 0, so that the command to stand differs from any to walk. Those along one
        axis are spread over what is not slow, or too many of them would become commands to stand.
        """
        args = self.args
        value_key, stand_key, axis_key = jax.random.split(key, 3)
        low, high = np.array([args.command_x, args.command_y, args.command_yaw]).T
        command = jax.random.uniform(value_key, (3,), minval=low, maxval=high)
        # One of those axes along which it may move fast enough.
        open_axes = np.flatnonzero(np.maximum(-low, high) >= MIN_COMMAND)
        if len(open_axes):
            choice_key, axis_key = jax.random.split(axis_key)
            axis = jax.random.choice(axis_key, open_axes)
            alone = jnp.where(jnp.arange(3) == axis, not_slow(command, low, high), 0.0)
            command = jnp.where(jax.random.uniform(choice_key) < args.one_axis, alone, command)

        speed = jnp.linalg.norm(command[:2])
        turn = jnp.abs(command[2])
        slow = jnp.array([speed, speed, turn]) < MIN_COMMAND
        stand = jax.random.uniform(stand_key) < args.standing
        return jnp.where(slow | stand, 0.0, command)

    def draw_domain(self, key: jax.Array, level) -> dict[str, jax.Array]:
        """What domain randomisation draws for one episode.

        level: from 0, the robot as it is, to 1, all that the flags allow.
        """
        args = self.args
        keys = jax.random.split(key, 7)
        stiffness_key, damping_key, strength_key, friction_key, *payload_keys, delay_key = keys

        def factor(key, largest_error):  # [J]
            joints = self.controller.default.shape
            error = jax.random.uniform(key, joints, minval=-largest_error, maxval=largest_error)
            return 1 + level * error

        low, high = args.friction
        usual = self.model.geom_friction[self.soles[0, 0], 0]
        friction = jax.random.uniform(friction_key, (), minval=low, maxval=high)
        loaded = jax.random.uniform(payload_keys[0]) < level
        payload = jax.random.randint(payload_keys[1], (), 0, NUM_PAYLOADS)
        longest = round(args.action_delay * args.decimation)
        delay = jax.random.randint(delay_key, (), 0, longest + 1)
        return {
            "stiffness": factor(stiffness_key, args.gain_noise),
            "damping": factor(damping_key, args.gain_noise),
            "strength": factor(strength_key, args.strength_noise),
            "friction": usual + level * (friction - usual),
            "payload": jnp.where(loaded, payload, 0),
            "delay": jnp.round(level * delay).astype(jnp.int32),  # physics steps
        }

    def observations(
        self, key: jax.Array, data: Physics, command: jax.Array, action: jax.Array, elapsed, level
    ) -> dict[str, jax.Array]:
        """The actor's [O], with noise, and the critic's [O + 3]; in the mirror, see `in_mirror`.

        elapsed: [] control steps; level: [] share of the noise.
        """
        robot = self.robot
        senses = sense(robot, data.qpos, data.qvel, command, action, elapsed)
        obs = {who: observe(parts, senses) for who, parts in self.seen.items()}
        noise = jax.random.uniform(key, obs["actor"].shape, minval=-1.0, maxval=1.0)
        obs["actor"] += level * self.noise * noise

        mirrored = in_mirror(robot, command, elapsed)
        return {
            who: jnp.where(mirrored, mirror_observation(robot, values, who=who), values)
            for who, values in obs.items()
        }

    def reset(self, key: jax.Array, level=1.0) -> State:
        """A new episode near the default pose, with another body and command.

        key: one PRNG key; level: [] share of what is random in body, observation and pushes.
        """
        keys = jax.random.split(key, 6)
        next_key, angle_key, velocity_key, command_key, domain_key, noise_key = keys

        # Half of the episodes begin nearly at rest, as the test does.
        rest_key, velocity_key = jax.random.split(velocity_key)
        # A share of the default angles; of the velocity, m/s and rad/s.
        spread = jnp.where(jax.random.bernoulli(rest_key), 0.05, 0.5)
        default = self.controller.default
        factors = jax.random.uniform(angle_key, default.shape, minval=-1.0, maxval=1.0)
        angles = default * (1 + spread * factors)
        base = jnp.array([0.0, 0.0, self.robot.start_height, 1.0, 0.0, 0.0, 0.0])
        velocity = spread * jax.random.uniform(velocity_key, (6,), minval=-1.0, maxval=1.0)
        action = jnp.zeros(self.action_size)
        qvel = jnp.concatenate([velocity, jnp.zeros_like(angles)])
        data = Physics(
            qpos=jnp.concatenate([base, angles]),
            qvel=qvel,
            qacc_warmstart=jnp.zeros_like(qvel),
        )

        zero = jnp.zeros(())
        no = jnp.array(False)
        elapsed = jnp.zeros((), jnp.int32)
        command = self.draw_command(command_key)
        names = [f"reward_{name}" for name in self.robot.weights]
        timed = {"airborne": jnp.zeros(len(self.feet), jnp.int32)} if self.timed else {}
        return State(
            data=data,
            obs=self.observations(noise_key, data, command, action, elapsed, level),
            reward=zero,
            done=zero,
            metrics=dict.fromkeys([*names, "error_velocity", "error_yaw"], zero),
            info={
                "key": next_key,
                "command": command,
                "action": action,
                "elapsed": elapsed,
                "truncated": no,
                "broken": no,
                "domain": self.draw_domain(domain_key, level),
                "level": jnp.float32(level),
                **timed,
            },
        )

    def advance(
        self, data: Physics, action: jax.Array, action_before: jax.Array, domain: dict
    ) -> tuple[Physics, dict[str, jax.Array]]:
        """The physics of one control step.

        Returns the state after it, and what `Motion` needs of the last physics step.
        """
        # The soles' friction is the contact's, whatever the floor's: MJCF gives them priority.
        friction = self.model.geom_friction.at[self.soles.ravel(), 0].set(domain["friction"])
        payload = {
            name: jnp.asarray(values)[domain["payload"]] for name, values in self.payloads.items()
        }
        model = self.model.replace(geom_friction=friction, **payload)
        gains = {name: domain[name] for name in ("stiffness", "damping", "strength")}

        def substep(data: Physics, i):
            arrived = jnp.where(i < domain["delay"], action_before, action)
            target = self.robot.targets(arrived)
            torque = self.controller.torque(target, data.qpos, data.qvel, **gains)
            full = physics_step(model, self.template.replace(**vars(data), ctrl=torque))

            position = full.xpos[self.feet]
            # [F, 6] angular, linear: taken at the robot's centre of mass, and so moved to the foot.
            cvel = full.cvel[self.feet]
            arm = position - full.subtree_com[1]
            # A sphere whose centre is lower than its radius touches the floor, the plane z = 0.
            height = full.geom_xpos[self.soles, 2]
            readings = {
                "torque": torque,
                "foot_height": position[:, 2],
                "foot_velocity": cvel[:, 3:] + jnp.cross(cvel[:, :3], arm),
                "clearance": jnp.maximum(height.min(axis=-1) - self.sole_radius, 0.0),
                "contact": (height < self.sole_radius).any(axis=-1),
                "capture_error": capture_error(
                    center=full.subtree_com[1],
                    velocity=data.qvel[:2],
                    quat=data.qpos[3:7],
                    soles=full.geom_xpos[self.soles.ravel()],
                ),
            }
            data = Physics(qpos=full.qpos, qvel=full.qvel, qacc_warmstart=full.qacc_warmstart)
            return data, readings

        data, readings = jax.lax.scan(substep, data, jnp.arange(self.args.decimation))
        return data, jax.tree.map(lambda values: values[-1], readings)

    def push(self, info: dict) -> jax.Array:
        """What the step after `info` adds to the base's velocity: [2] m/s, mostly 0.

        It splits the key as `step` does, so that `Twin` can repeat it.
        """
        limit = info["level"] * self.args.push_speed
        due_key, push_key = jax.random.split(jax.random.split(info["key"], 4)[1])
        push = jax.random.uniform(push_key, (2,), minval=-limit, maxval=limit)
        due = jax.random.uniform(due_key) < CONTROL_DT / self.args.push_every
        return jnp.where(due, push, 0.0)

    def next_command(self, key: jax.Array, command: jax.Array) -> jax.Array:
        """The command [3] of the next step: mostly the same one."""
        due_key, command_key = jax.random.split(key)
        due = jax.random.uniform(due_key) < CONTROL_DT / self.args.command_every
        return jnp.where(due, self.draw_command(command_key), command)

    def describe_motion(
        self, info: dict, before: Physics, data: Physics, action: jax.Array, readings: dict
    ) -> Motion:
        """What the rewards look at after a step from `before` to `data`; info: before it."""
        quat = data.qpos[3:7]
        steps_in_air = info.get("airborne", 0) * readings["contact"]
        return Motion(
            command=info["command"],
            height=data.qpos[2],
            velocity=to_base_frame(quat, data.qvel[:3]),
            rates=data.qvel[3:6],
            gravity=to_base_frame(quat, jnp.array([0.0, 0.0, -1.0])),
            angles=data.qpos[7:],
            speeds=data.qvel[6:],
            accelerations=(data.qvel[6:] - before.qvel[6:]) / CONTROL_DT,
            action=action,
            action_before=info["action"],
            stance=is_stance(self.robot, info["elapsed"] + 1),
            # With the step of the landing.
            flight=jnp.where(steps_in_air > 0, (steps_in_air + 1) * CONTROL_DT, 0.0),
            **readings,
        )

    def step(self, state: State, action: jax.Array) -> State:
        """One control step.

        action: [A], the targets of the joints that it moves, as offsets from the default pose,
            divided by the robot's action_scale and the joints' reach; in the mirror where the
            observation is.
        """
        info = state.info
        mirrored = in_mirror(self.robot, info["command"], info["elapsed"])
        action = jnp.where(mirrored, mirror_actions(self.robot, action), action)
        # The second key is that of `push`.
        next_key, _, command_key, noise_key = jax.random.split(info["key"], 4)
        pushed = state.data.replace(qvel=state.data.qvel.at[:2].add(self.push(info)))
        data, readings = self.advance(pushed, action, info["action"], info["domain"])
        bounded = (jnp.abs(data.qvel) < self.MAX_SPEED).all()  # False for NaN as well
        sane = jnp.isfinite(data.qpos).all() & bounded

        motion = self.describe_motion(info, state.data, data, action, readings)
        terms = reward_terms(self.robot, motion)
        error = jnp.linalg.norm(motion.command[:2] - motion.velocity[:2])
        metrics = terms | {
            "error_velocity": error,
            "error_yaw": jnp.abs(motion.command[2] - motion.rates[2]),
        }
        reward = jnp.maximum(sum(terms.values()), 0.0)

        timed = {}
        if self.timed:
            timed["airborne"] = jnp.where(readings["contact"], 0, info["airborne"] + 1)

        # The step is rewarded for the old command; the next one is observed already.
        command = self.next_command(command_key, info["command"])
        elapsed = info["elapsed"] + 1
        obs = self.observations(noise_key, data, command, action, elapsed, info["level"])
        return State(
            data=data,
            obs={name: jnp.where(sane, new, state.obs[name]) for name, new in obs.items()},
            reward=jnp.where(sane, reward, 0.0),
            done=jnp.where(sane & ~has_fallen(self.robot, data.qpos), 0.0, 1.0),
            metrics={name: jnp.where(sane, value, 0.0) for name, value in metrics.items()},
            info={
                "key": next_key,
                "command": command,
                "action": action,
                "elapsed": elapsed,
                "truncated": elapsed >= self.time_limit,
                "broken": ~sane,
                "domain": info["domain"],
                "level": info["level"],
                **timed,
            },
        )


# ---- 6. Running statistics -----------------------------------------------------------------------
# shared: statistics
@struct.dataclass
class RunningStats:
    """Mean and variance of all samples so far."""

    count: jax.Array  # []
    mean: jax.Array
    var: jax.Array


def update_stats(stats: RunningStats, batch: jax.Array, valid: jax.Array) -> RunningStats:
    """Merge in the valid samples of the batches [T, N, ...] of all devices. valid: bool [T, N].

    Only inside shard_map over "devices".
    Source: Chan, Golub and LeVeque's parallel variance.
    """
    count = jax.lax.psum(valid.sum(), "devices")
    mask = jnp.expand_dims(valid, range(2, batch.ndim))

    def mean_of(x: jax.Array) -> jax.Array:
        total = jnp.where(mask, x, 0.0).sum(axis=(0, 1))
        return jax.lax.psum(total, "devices") / jnp.maximum(count, 1)

    mean = mean_of(batch)
    var = mean_of(jnp.square(batch - mean))

    share = count / (stats.count + count)
    delta = mean - stats.mean
    between = share * (1 - share) * jnp.square(delta)  # variance of the two means
    return RunningStats(
        count=stats.count + count,
        mean=stats.mean + share * delta,
        var=(1 - share) * stats.var + share * var + between,
    )


def normalize(stats: RunningStats, obs: jax.Array) -> jax.Array:
    """Observations [..., O] with mean 0 and variance 1, clipped to 10 standard deviations."""
    return jnp.clip((obs - stats.mean) / jnp.sqrt(stats.var + 1e-8), -10.0, 10.0)


# end shared


# ---- 7. Networks ---------------------------------------------------------------------------------
# shared: dense
def dense(width: int, **options) -> nn.Dense:
    """A layer. On a CPU onekernel's product is faster than XLA's, most of all in the gradient."""
    return nn.Dense(width, dot_general=onekernel.dot_general if onekernel else None, **options)


# end shared


class MLP(nn.Module):
    """ELU layers with orthogonal weights: [..., O] -> [..., out]."""

    hidden_sizes: tuple[int, ...]
    out: int
    gain: float  # scale of the last layer's weights

    @nn.compact
    def __call__(self, x):
        for width in self.hidden_sizes:
            orthogonal = nn.initializers.orthogonal(math.sqrt(2))
            x = nn.elu(dense(width, kernel_init=orthogonal)(x))
        return dense(self.out, kernel_init=nn.initializers.orthogonal(self.gain))(x)


def make_networks(args: Args, env: Env) -> tuple[MLP, MLP]:
    """Actor and critic; they share nothing."""
    actor = MLP(args.hidden_sizes, env.action_size, gain=0.01)  # the first actions are all noise
    critic = MLP(args.hidden_sizes, 1, gain=1.0)
    return actor, critic


@struct.dataclass
class Gaussian:
    """A normal distribution of actions with independent components."""

    mean: jax.Array  # [..., A], which is the mode as well
    log_std: jax.Array  # [A]

    def sample(self, keys: jax.Array) -> jax.Array:
        """Actions [N, A], each from its own key. keys: [N]."""
        noise = jax.vmap(partial(jax.random.normal, shape=self.log_std.shape))(keys)
        return self.mean + jnp.exp(self.log_std) * noise

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Log density: [..., A] -> [...]."""
        z = (action - self.mean) * jnp.exp(-self.log_std)
        return (-0.5 * jnp.square(z) - self.log_std - 0.5 * math.log(2 * math.pi)).sum(axis=-1)

    def entropy(self) -> jax.Array:
        """Differential entropy in nats: [], the same for all means."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()


# shared: actor
def kl_divergence(old: Gaussian, new: Gaussian) -> jax.Array:
    """KL(old || new), in nats: [...]."""
    variance = jnp.exp(2 * new.log_std)
    old_variance = jnp.exp(2 * old.log_std)
    distance = (old_variance + jnp.square(new.mean - old.mean)) / (2 * variance)
    return (new.log_std - old.log_std + distance - 0.5).sum(axis=-1)


def initial_memory(batch: tuple[int, ...] = ()) -> tuple:
    """What the policy remembers when an episode begins: a tree of arrays [*batch, ...].

    This one remembers nothing, so that nothing is carried, saved or compiled.
    """
    return ()


def apply_policy(
    args: Args, env: Env, params: dict, memory: tuple, obs: jax.Array
) -> tuple[tuple, Gaussian]:
    """The policy: its memory and normalised observations [..., O] -> next memory, distribution.

    obs: the actor's. A recurrent network would keep its state in `memory`, which rollout and test
    carry along and set to `initial_memory` when an episode begins; ppo_mjx.py says what else it
    would change.
    """
    actor, _ = make_networks(args, env)
    return memory, Gaussian(actor.apply(params["actor"], obs), params["log_std"])


# end shared


# ---- 8. Training state ---------------------------------------------------------------------------
@struct.dataclass
class Learner:
    """What is learnt; the same on every device."""

    params: dict  # "actor" and "critic": Flax parameters; "log_std": [A]
    averaged: dict  # the actor's parameters, by `average_policy`: those that are saved
    opt_state: optax.OptState  # of the parameters as one vector
    learning_rate: jax.Array  # []
    level: jax.Array  # [] of the curriculum, that episodes begin with: see Env.draw_domain
    obs_stats: dict[str, RunningStats]  # of the actor's and the critic's observations
    return_stats: RunningStats  # [], of the discounted return
    key: jax.Array  # of the shuffles
    iteration: jax.Array  # int32, iterations done


@struct.dataclass
class Worlds:
    """What belongs to one world: fields [N, ...], split over the devices.

    Each world draws from its own key, so that it is the same on any number of devices.
    """

    env_state: State
    memory: tuple  # the policy's
    key: jax.Array  # of the actions and resets
    discounted_return: jax.Array  # of the rewards so far, for their scale
    episode_return: jax.Array
    episode_length: jax.Array  # int32
    times_broken: jax.Array  # int32


@struct.dataclass
class TrainState:
    """All that a run's future depends on; a checkpoint holds this and the settings."""

    learner: Learner
    worlds: Worlds


# What --init-from takes from another run's learner.
INHERITED = ("params", "averaged", "obs_stats", "return_stats")

STATE_SPEC = TrainState(learner=P(), worlds=P("devices"))


# shared: optimizer
def shuffle(key: jax.Array, size: int) -> jax.Array:
    """A random order of `size` items, int32 [size].

    It sorts one array, of random bits followed by the item's own number: five times as fast on a
    CPU as jax.random.permutation, which sorts pairs, twice. Nearly uniform: items that draw equal
    bits keep their order.
    """
    bits = (size - 1).bit_length()
    if bits > 13:  # fewer than 19 random bits would be left
        return jax.random.permutation(key, size)
    marked = (jax.random.bits(key, (size,)) << bits) | jnp.arange(size, dtype=jnp.uint32)
    return (jnp.sort(marked) & ((1 << bits) - 1)).astype(jnp.int32)


# end shared


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam, on gradients that are scaled down to max_grad_norm.

    Its result is Adam's direction, which the caller scales by the step size and subtracts.
    A gradient that is not finite is skipped and counted, as by optax.apply_if_finite, but with one
    pass over the gradient for both.
    """
    adam = optax.scale_by_adam(eps=1e-5)

    def init(params) -> optax.ApplyIfFiniteState:
        return optax.ApplyIfFiniteState(
            notfinite_count=jnp.int32(0),
            last_finite=jnp.array(True),
            total_notfinite=jnp.int32(0),
            inner_state=adam.init(params),
        )

    def update(gradient, state: optax.ApplyIfFiniteState, params=None):
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm)

        def step():
            scale = jnp.minimum(1.0, args.max_grad_norm / norm)
            scaled = jax.tree.map(lambda x: scale * x, gradient)
            return adam.update(scaled, state.inner_state)

        def skip():
            return jax.tree.map(jnp.zeros_like, gradient), state.inner_state

        direction, inner_state = jax.lax.cond(finite, step, skip)
        next_state = optax.ApplyIfFiniteState(
            notfinite_count=jnp.where(finite, 0, state.notfinite_count + 1),
            last_finite=finite,
            total_notfinite=state.total_notfinite + ~finite,
            inner_state=inner_state,
        )
        return direction, next_state

    return optax.GradientTransformation(init, update)


def start_stats(shape: tuple[int, ...]) -> RunningStats:
    """Statistics before the first sample; the small count keeps divisions finite."""
    return RunningStats(count=jnp.float32(1e-4), mean=jnp.zeros(shape), var=jnp.ones(shape))


def start_worlds(env_state: State, keys: jax.Array, times_broken: jax.Array) -> Worlds:
    """Worlds [N] at the start of an episode."""
    return Worlds(
        env_state=env_state,
        memory=initial_memory(keys.shape),
        key=keys,
        discounted_return=jnp.zeros(keys.shape),
        episode_return=jnp.zeros(keys.shape),
        episode_length=jnp.zeros(keys.shape, jnp.int32),
        times_broken=times_broken,
    )


def init_train_state(args: Args, env: Env, key: jax.Array) -> TrainState:
    """The state before the first iteration."""
    keys = jax.random.split(key, 6)
    actor_key, critic_key, shuffle_key, reset_key, clock_key, world_key = keys

    n = args.num_envs
    level = jnp.float32(0.0 if args.curriculum else 1.0)
    reset_keys = jax.random.split(reset_key, n)
    env_state = jax.vmap(kernel(env.reset))(reset_keys, jnp.broadcast_to(level, (n,)))
    # The worlds' clocks start at random, so that their time limits do not come all at once.
    # Their first observation still has the clock of step 0, and no mirror; one step later both are
    # right.
    env_state.info["elapsed"] = jax.random.randint(clock_key, (n,), 0, env.time_limit)
    worlds = start_worlds(env_state, jax.random.split(world_key, n), jnp.zeros(n, jnp.int32))

    actor, critic = make_networks(args, env)
    obs = {name: values[0] for name, values in env_state.obs.items()}
    params = {
        "actor": actor.init(actor_key, obs["actor"]),
        "critic": critic.init(critic_key, obs["critic"]),
        # With a type: a weak one turns strong in the first update, and jit compiles for each.
        "log_std": jnp.full(env.action_size, args.init_log_std, jnp.float32),
    }
    vector, _ = ravel_pytree(params)
    learner = Learner(
        params=params,
        averaged=params["actor"],
        opt_state=make_optimizer(args).init(vector),
        learning_rate=jnp.float32(args.learning_rate),
        level=level,
        obs_stats={name: start_stats(values.shape) for name, values in obs.items()},
        return_stats=start_stats(()),
        key=shuffle_key,
        iteration=jnp.zeros((), jnp.int32),
    )
    return TrainState(learner=learner, worlds=worlds)


# ---- 9. Rollout ----------------------------------------------------------------------------------
@struct.dataclass
class Transition:
    """One step of one world; `end` and the flags are the outcome of `action`."""

    action: jax.Array  # [A]
    mean: jax.Array  # [A] of the policy
    start: State  # where the step began
    end: Worlds  # where it ended, before any reset: reward, observation, episode's return, ...
    terminated: jax.Array  # bool
    done: jax.Array  # bool: terminated, or at the time limit
    valid: jax.Array  # bool: the world did not break; a step that breaks it teaches nothing
    finished: jax.Array  # bool: a whole episode is over, not broken, its clock started at 0


def split_keys(keys: jax.Array, n: int) -> tuple[jax.Array, ...]:
    """n new keys for each key: [N] -> [n, N]."""
    return jnp.unstack(jax.vmap(partial(jax.random.split, num=n))(keys), axis=1)


def where_done(done: jax.Array, fresh: Worlds, end: Worlds) -> Worlds:
    """Each world from `fresh` where its episode is done, else from `end`. done: bool [N]."""

    def choose(done, fresh, end):
        return jax.tree.map(partial(jnp.where, done), fresh, end)

    return jax.vmap(choose)(done, fresh, end)


def rollout(args: Args, env: Env, learner: Learner, worlds: Worlds) -> tuple[Worlds, Transition]:
    """num_steps steps of the policy in all worlds, with a fresh reset after each episode.

    Returns the worlds [N, ...] and transitions [T, N, ...].
    """

    def step(worlds: Worlds, _):
        key, action_key, reset_key = split_keys(worlds.key, 3)
        start = worlds.env_state

        obs = normalize(learner.obs_stats["actor"], start.obs["actor"])
        memory, policy = apply_policy(args, env, learner.params, worlds.memory, obs)
        action = policy.sample(action_key)
        state = jax.vmap(kernel(env.step))(start, action)

        terminated = state.done > 0
        done = terminated | state.info["truncated"]
        broken = state.info["broken"]
        end = Worlds(
            env_state=state,
            memory=memory,
            key=key,
            discounted_return=args.gamma * worlds.discounted_return + state.reward,
            episode_return=worlds.episode_return + state.reward,
            episode_length=worlds.episode_length + 1,
            times_broken=worlds.times_broken + broken,
        )
        transition = Transition(
            action=action,
            mean=policy.mean,
            start=start,
            end=end,
            terminated=terminated,
            done=done,
            valid=~broken,
            finished=done & ~broken & (end.episode_length == state.info["elapsed"]),
        )
        level = jnp.broadcast_to(learner.level, done.shape)
        reset = jax.vmap(kernel(env.reset))(reset_key, level)
        fresh = start_worlds(reset, key, end.times_broken)
        return where_done(done, fresh, end), transition

    return jax.lax.scan(step, worlds, None, length=args.num_steps)


# ---- 10. Advantages ------------------------------------------------------------------------------
# shared: advantages
def masked_mean(x: jax.Array, valid: jax.Array) -> jax.Array:
    """The mean of the valid samples: two arrays [...] -> []. It is 0 where none is valid."""
    return jnp.where(valid, x, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def compute_gae(
    args: Args,
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    done: jax.Array,
    valid: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates and value targets of a rollout, in units of the reward.

    All arguments and results are [T, N]. next_value is the critic's value of the state that the
    step reached, before any reset. A terminated step does not bootstrap (0 in place of next_value).
    A step at the time limit, or before an invalid step, bootstraps from next_value and takes
    nothing from later advantages. Invalid steps get advantage 0.
    Source: arXiv:1506.02438, equation 16; the parts of the time limit and of `valid` are ours.
    """

    def backwards(next_advantage, step):
        reward, value, next_value, terminated, done, valid = step
        # Unlike CleanRL: where the time limit cuts an episode, what was to come still counts.
        delta = reward + args.gamma * jnp.where(terminated, 0.0, next_value) - value
        following = jnp.where(done, 0.0, next_advantage)
        advantage = delta + args.gamma * args.gae_lambda * following
        advantage = jnp.where(valid, advantage, 0.0)
        return advantage, advantage

    steps = (reward, value, next_value, terminated, done, valid)
    _, advantage = jax.lax.scan(backwards, jnp.zeros_like(reward[0]), steps, reverse=True)
    return advantage, advantage + value


# end shared


# ---- 11. Loss and update -------------------------------------------------------------------------
@struct.dataclass
class Batch:
    """What the loss needs of each transition."""

    obs: dict[str, jax.Array]  # of actor and critic
    action: jax.Array  # [A]
    mean: jax.Array  # [A] of the policy that acted
    advantage: jax.Array
    target: jax.Array  # of the value
    valid: jax.Array  # bool: to be learnt from


def stepping_action(robot: Robot, obs: jax.Array) -> jax.Array:
    """Actions [..., A] of a simple stepping motion, for the actor's observations [..., O].

    By clock and command: on the floor a leg sweeps back, in the air it lifts and sweeps ahead.
    Without a command the joints hold the default pose.
    """
    parts = seen_parts(robot, "actor")
    where = part_slices(robot, parts)
    command = obs[..., where["command"]] / np.array(parts["command"].scale)
    sine, cosine = jnp.unstack(obs[..., where["clock"]], axis=-1)
    clock = jnp.arctan2(sine, cosine) / (2 * math.pi)

    after = clock[..., None] + CONTROL_DT / robot.gait_period  # when the action has been done
    phases = (after + np.array(robot.gait_offsets)) % 1  # [..., F]
    # How far stance and swing have come, from 0 to 1. The motion has no jump where a phase wraps.
    stance = jnp.minimum(phases / robot.stance_share, 1.0)
    swing = jnp.maximum((phases - robot.stance_share) / (1 - robot.stance_share), 0.0)

    up = jnp.where(stands(command)[..., None], 0.0, jnp.sin(math.pi * swing))
    ahead = jnp.cos(math.pi * (stance - swing))  # 1 at landing, -1 at lift-off

    legs = robot.leg_of_joint[robot.acted]  # [A]
    lift = robot.joint_array("lift")[robot.acted]
    sweep = ahead[..., legs] * (command @ robot.joint_array("sweep")[robot.acted].T)
    reach = robot.action_scale * robot.joint_array("reach")[robot.acted]
    return (up[..., legs] * lift + sweep) / reach


def imitation_weight(args: Args, iteration: jax.Array) -> jax.Array:
    """How much the actor is drawn to the stepping motion: [] in 0 to 1, all at first, then less."""
    progress = iteration / float(args.num_iterations)  # float: int32 would overflow
    return jnp.maximum(1 - progress / args.imitation_until, 0.0)


def ppo_loss(
    args: Args, env: Env, learner: Learner, params: dict, mb: Batch, ent_coef: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a minibatch [B / M, ...], and its metrics by tag.

    learner: the one that acted, for its statistics and standard deviation; params: those that are
    learnt; ent_coef: [], weight of the entropy bonus.
    Source: arXiv:1707.06347, equations 7 and 9; the imitation loss is ours.
    """
    robot = env.robot
    mean_valid = partial(masked_mean, valid=mb.valid)
    memory = initial_memory(mb.advantage.shape)  # single steps have no past

    actor_obs = normalize(learner.obs_stats["actor"], mb.obs["actor"])
    _, policy = apply_policy(args, env, params, memory, actor_obs)
    old_policy = Gaussian(mb.mean, learner.params["log_std"])
    ratio = jnp.exp(policy.log_prob(mb.action) - old_policy.log_prob(mb.action))
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    objective = jnp.minimum(mb.advantage * ratio, mb.advantage * clipped_ratio)
    policy_loss = -mean_valid(objective)

    _, critic = make_networks(args, env)
    critic_obs = normalize(learner.obs_stats["critic"], mb.obs["critic"])
    value = critic.apply(params["critic"], critic_obs)[..., 0]
    value_loss = 0.5 * mean_valid(jnp.square(value - mb.target))

    imitation_loss = jnp.zeros(())
    if robot.clock:  # without one, there is no motion to imitate
        weight = imitation_weight(args, learner.iteration)
        error = policy.mean - stepping_action(robot, mb.obs["actor"])
        imitation_loss = weight * mean_valid(jnp.square(error).mean(axis=-1))

    entropy = policy.entropy()
    loss = (
        policy_loss
        - ent_coef * entropy
        + args.vf_coef * value_loss
        + args.imitation_coef * imitation_loss
    )
    metrics = {
        "losses/loss": loss,
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/imitation_loss": imitation_loss,
        "losses/clipfrac": mean_valid(jnp.abs(ratio - 1) > args.clip_coef),
        # Exact, unlike CleanRL's approx_kl.
        "losses/kl": mean_valid(kl_divergence(old_policy, policy)),
    }
    return loss, metrics


def current_learning_rate(args: Args, learner: Learner) -> jax.Array:
    """Adam's step size in this iteration."""
    if args.desired_kl is not None:
        return learner.learning_rate
    progress = learner.iteration / float(args.num_iterations)  # float: int32 would overflow
    return jnp.float32(args.learning_rate * (1 - progress))


def next_learning_rate(
    args: Args, learning_rate: jax.Array, kl: jax.Array, progress: jax.Array
) -> jax.Array:
    """Adam's step size after an iteration whose mean KL divergence was kl.

    progress: share of the training that is done. After rsl_rl, but once an iteration: so many
    minibatches would drive it to its bounds.
    """
    if args.desired_kl is None:
        return learning_rate
    desired = args.desired_kl * (1 + progress * (args.final_kl - 1))
    factor = jnp.where(kl < desired / 2, 1.5, 1.0)
    factor = jnp.where(kl > 2 * desired, 1 / 1.5, factor)
    return jnp.clip(factor * learning_rate, 1e-5, 1e-2)


def mean_over_devices(tree):
    """The mean of the devices' trees, each a mean over about as many samples.

    As one vector it takes one exchange, not one a leaf.
    """
    vector, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(vector, "devices"))


def update(
    args: Args, env: Env, learner: Learner, batch: Batch
) -> tuple[Learner, dict[str, jax.Array]]:
    """All epochs over a batch [B, ...], each device with its own share of it.

    Returns the learner after them, and metrics by tag: means over all minibatches.
    """
    learning_rate = current_learning_rate(args, learner)
    progress = learner.iteration / float(args.num_iterations)  # float: int32 would overflow
    ent_coef = args.ent_coef + progress * (args.final_ent_coef - args.ent_coef)
    optimizer = make_optimizer(args)
    vector, unravel = ravel_pytree(learner.params)

    def minibatch_step(carry, mb: Batch):
        vector, opt_state = carry
        gradient_and_metrics = jax.grad(ppo_loss, argnums=3, has_aux=True)(
            args, env, learner, unravel(vector), mb, ent_coef
        )
        gradient, metrics = mean_over_devices(gradient_and_metrics)
        gradient, _ = ravel_pytree(gradient)
        direction, opt_state = optimizer.update(gradient, opt_state)

        metrics |= {"losses/grad_norm": jnp.linalg.norm(gradient)}
        carry = (vector - learning_rate * direction, opt_state)
        return carry, (metrics, opt_state.notfinite_count)

    def epoch(carry, key):
        order = shuffle(key, len(batch.target))
        minibatches = jax.tree.map(
            lambda x: x[order].reshape(args.num_minibatches, -1, *x.shape[1:]), batch
        )
        return jax.lax.scan(minibatch_step, carry, minibatches)

    key = jax.random.fold_in(learner.key, learner.iteration)
    key = jax.random.fold_in(key, jax.lax.axis_index("devices"))
    keys = jax.random.split(key, args.update_epochs)
    carry = (vector, learner.opt_state)
    (vector, opt_state), (metrics, skipped) = jax.lax.scan(epoch, carry, keys)

    metrics = {tag: values.mean() for tag, values in metrics.items()}
    metrics |= {
        "charts/learning_rate": learning_rate,
        "charts/skipped_in_a_row": skipped.max(),
        "charts/skipped_updates": opt_state.total_notfinite,
    }
    learner = learner.replace(
        params=unravel(vector),
        opt_state=opt_state,
        learning_rate=next_learning_rate(args, learning_rate, metrics["losses/kl"], progress),
        iteration=learner.iteration + 1,
    )
    return learner, metrics


# ---- 12. One training iteration ------------------------------------------------------------------
# shared: black_box
def black_box(start: State, action: jax.Array, broken: jax.Array) -> dict:
    """What the first world to break went through, for `dump`.

    Takes that world's steps out of those of all, [T, N, ...] -> [1, T, ...]; the first axis is for the
    devices. World 0's if none broke; `dump` checks.
    """
    # argmax finds the first True in the order of memory: the earliest step, its lowest world.
    world = jnp.unravel_index(jnp.argmax(broken), broken.shape)[1]
    steps = {"start": start, "action": action, "broken": broken}
    return jax.tree.map(lambda x: x[None, :, world], steps)


# end shared


# shared: batch
def make_batch(
    args: Args, env: Env, learner: Learner, steps: Transition, reward: jax.Array
) -> tuple[Batch, jax.Array]:
    """The batch [B, ...] to learn from, of transitions [T, N, ...] and scaled rewards [T, N].

    Returns with it the critic's explained variance: 1 if it foresaw all value targets.
    """
    _, critic = make_networks(args, env)
    both = jnp.stack([steps.start.obs["critic"], steps.end.env_state.obs["critic"]])  # [2, T, N, O]
    both = normalize(learner.obs_stats["critic"], both)
    value, next_value = critic.apply(learner.params["critic"], both)[..., 0]
    advantage, target = compute_gae(
        args, reward, value, next_value, steps.terminated, steps.done, steps.valid
    )

    def mean(x: jax.Array) -> jax.Array:
        return mean_over_devices(masked_mean(x, steps.valid))

    target_var = mean(jnp.square(target - mean(target)))
    explained_variance = 1 - mean(jnp.square(target - value)) / (target_var + 1e-8)

    advantage -= mean(advantage)
    advantage /= jnp.sqrt(mean(jnp.square(advantage))) + 1e-8

    batch = Batch(
        obs=steps.start.obs,
        action=steps.action,
        mean=steps.mean,
        advantage=advantage,
        target=target,
        valid=steps.valid,
    )
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)  # [T, N, ...] -> [B, ...]
    return batch, explained_variance


# end shared


# shared: episode_metrics
def episode_metrics(worlds: Worlds, steps: Transition) -> dict[str, jax.Array]:
    """Of the episodes that ended in a rollout, over all devices."""
    sums = {
        "episodes": steps.finished.sum(),
        "returns": (steps.finished * steps.end.episode_return).sum(),
        "lengths": (steps.finished * steps.end.episode_length).sum(),
        "falls": (steps.terminated & steps.valid).sum(),
        "broken": worlds.times_broken.sum(),
    }
    sums = jax.lax.psum(sums, "devices")
    return {
        # NaN, and not logged, where no episode has finished.
        "charts/episodic_return": sums["returns"] / sums["episodes"],
        "charts/episodic_length": sums["lengths"] / sums["episodes"],
        "charts/episodes_finished": sums["episodes"],
        "charts/falls": sums["falls"],
        "charts/nan_resets": sums["broken"],
    }


# end shared


WELL_TRACKED = 0.42  # share of the reward for the velocity; a G1 that falls each second has 0.3


def next_level(args: Args, robot: Robot, level: jax.Array, reward: jax.Array) -> jax.Array:
    """The curriculum's level after an iteration. reward: mean of the term track_velocity."""
    if not args.curriculum:
        return level
    tracked = reward / (CONTROL_DT * robot.weights["track_velocity"])
    change = 1 / (args.curriculum * args.num_iterations)
    return jnp.clip(level + jnp.where(tracked > WELL_TRACKED, change, -change), 0.0, 1.0)


# shared: average_policy
def average_policy(args: Args, learner: Learner) -> dict:
    """The actor's parameters, averaged over the last iterations, the latest of them weighing most.

    They act better than those of a single iteration, which has its minibatches' noise. Nothing is
    rolled out with them: the actor that learns and acts stays as it is.
    Source: Polyak and Juditsky 1992; exponentially weighted, as in arXiv:1806.04498.
    """
    span = max(1.0, args.policy_average * args.num_iterations)
    return optax.incremental_update(learner.params["actor"], learner.averaged, 1 / span)


# end shared


def device_iteration(args: Args, env: Env, state: TrainState) -> tuple[TrainState, dict, dict]:
    """Rollout, advantages and update with one device's worlds.

    Returns the next state, metrics over all devices by tag, and this device's black box.
    """
    learner = state.learner
    worlds, steps = rollout(args, env, learner, state.worlds)

    discounted = steps.end.discounted_return
    return_stats = update_stats(learner.return_stats, discounted, steps.valid)
    reward = steps.end.env_state.reward
    reward = jnp.clip(reward / jnp.sqrt(return_stats.var + 1e-8), -10.0, 10.0)

    batch, explained_variance = make_batch(args, env, learner, steps, reward)
    learner, metrics = update(args, env, learner, batch)

    # Only now, since the policy that acted and the one that learns must see the same normalised
    # observations.
    obs_stats = {
        name: update_stats(stats, steps.start.obs[name], steps.valid)
        for name, stats in learner.obs_stats.items()
    }

    terms = {
        name.replace("_", "/", 1): masked_mean(term, steps.valid)  # reward_x -> reward/x
        for name, term in steps.end.env_state.metrics.items()
    }
    metrics |= mean_over_devices(terms)
    metrics |= {"losses/explained_variance": explained_variance, "charts/level": learner.level}
    metrics |= episode_metrics(worlds, steps)

    learner = learner.replace(
        averaged=average_policy(args, learner),
        obs_stats=obs_stats,
        return_stats=return_stats,
        level=next_level(args, env.robot, learner.level, metrics["reward/track_velocity"]),
    )
    box = black_box(steps.start, steps.action, steps.end.env_state.info["broken"])
    return TrainState(learner=learner, worlds=worlds), metrics, box


@partial(jax.jit, static_argnames=("args", "env", "mesh"), donate_argnames="state")
def train_iteration(
    args: Args, env: Env, mesh: Mesh, state: TrainState
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One iteration as one program over the mesh's devices.

    `state` is donated: its memory is used again. Returns the next state and metrics by tag, with
    the devices' black boxes.
    """
    run = jax.shard_map(
        partial(device_iteration, args, env),
        mesh=mesh,
        in_specs=(STATE_SPEC,),
        out_specs=(STATE_SPEC, P(), P("devices")),
        check_vma=False,
    )
    state, metrics, box = run(state)
    return state, metrics | {"black_box": box}


# ---- You may stop reading here: what follows is evaluation, files and the command line -----------


# ---- 13. Evaluation ------------------------------------------------------------------------------
def mirror_rules(robot: Robot) -> dict[str, np.ndarray]:
    """How `act` sees a robot's observation [O] in the mirror, as `Env` shows it to the networks.

    mirror_when: [O], whose product with the observation is positive where `in_mirror` is true (of
    the clock it makes the sine half a control step ahead, so that no step falls on a zero);
    mirror_obs: [O, O] and mirror_action: [A, A], by which observation and action are multiplied
    there.
    """
    parts = seen_parts(robot, "actor")
    where = part_slices(robot, parts)
    size = max(columns.stop for columns in where.values())
    mirror_when = np.zeros(size, np.float32)
    if robot.clock:
        half_step = math.pi / robot.gait_ticks
        mirror_when[where["clock"]] = [-math.cos(half_step), -math.sin(half_step)]
    else:
        scale = np.array(parts["command"].scale)
        mirror_when[where["command"]] = np.array([0.0, -1e-3, -1.0]) / scale
    return {
        "mirror_when": mirror_when,
        "mirror_obs": mirror_observation(robot, np.eye(size, dtype=np.float32), np),
        "mirror_action": mirror_actions(robot, np.eye(len(robot.acted), dtype=np.float32)),
    }


def export_policy(env: Env, learner: Learner) -> dict[str, np.ndarray]:
    """All that the deterministic policy needs: mirror, normaliser, layers w0, b0, w1, ..."""
    policy = mirror_rules(env.robot) | {
        "obs_mean": learner.obs_stats["actor"].mean,
        "obs_var": learner.obs_stats["actor"].var,
    }
    for name, layer in learner.averaged["params"].items():  # Dense_0, Dense_1, ...
        number = name.removeprefix("Dense_")
        policy["w" + number] = layer["kernel"]
        policy["b" + number] = layer["bias"]
    return jax.device_get(policy)


# shared: act
def act(policy: dict, memory: tuple, obs, xp=np) -> tuple[tuple, Any]:
    """The exported policy: its memory and the actor's observations [..., O] -> next memory, action.

    The actions [..., A] are the distribution's mean. NumPy suffices.
    """
    mirrored = obs @ policy["mirror_when"][:, None] > 0  # [..., 1]
    obs = xp.where(mirrored, obs @ policy["mirror_obs"], obs)
    x = xp.clip((obs - policy["obs_mean"]) / xp.sqrt(policy["obs_var"] + 1e-8), -10.0, 10.0)
    last = sum(name.startswith("w") for name in policy) - 1
    for i in range(last):
        x = x @ policy[f"w{i}"] + policy[f"b{i}"]
        x = xp.where(x > 0, x, xp.expm1(xp.minimum(x, 0.0)))  # ELU
    action = x @ policy[f"w{last}"] + policy[f"b{last}"]
    return memory, xp.where(mirrored, action @ policy["mirror_action"], action)


# end shared


class CMujocoEnv:
    """The robot in C MuJoCo, as Unitree's loop runs it, with nothing random but its start.

    It takes 500 physics steps and 50 actions a second.
    """

    SUBSTEPS = 10

    def __init__(self, robot: Robot):
        self.robot = robot
        self.model = load_model(robot, CONTROL_DT / self.SUBSTEPS)
        self.data = mujoco.MjData(self.model)
        self.feet, self.soles = find_feet(robot, self.model)
        self.sole_radius = self.model.geom_size[self.soles[0, 0], 0]
        self.controller = make_controller(robot)

    def reset(self, seed: int) -> None:
        """Stand on the floor in the default pose, each joint off by up to 0.05 rad."""
        mujoco.mj_resetData(self.model, self.data)
        noise = np.random.default_rng(seed).uniform(-0.05, 0.05, self.model.nu)
        self.data.qpos[7:] = self.controller.default + noise
        mujoco.mj_kinematics(self.model, self.data)  # the first step asks where the feet were
        self.action = np.zeros(len(self.robot.acted))
        self.elapsed = 0

    def observe(self, command) -> np.ndarray:
        """What the actor sees: [O]. command: [3]."""
        data = self.data
        command = np.array(command)
        senses = sense(self.robot, data.qpos, data.qvel, command, self.action, self.elapsed, np)
        return observe(seen_parts(self.robot, "actor"), senses, np)

    def step(self, action) -> dict[str, Any]:
        """One control step. Returns what the test measures."""
        data = self.data
        feet_before = data.xpos[self.feet].copy()
        target = self.robot.targets(action, np)
        power = 0.0
        for _ in range(self.SUBSTEPS):
            data.ctrl = self.controller.torque(target, data.qpos, data.qvel, xp=np)
            power += np.abs(data.ctrl * data.qvel[6:]).sum() / self.SUBSTEPS
            mujoco.mj_step(self.model, data)
        self.action = action
        self.elapsed += 1

        speed = np.linalg.norm((data.xpos[self.feet] - feet_before)[:, :2], axis=1) / CONTROL_DT
        loaded = data.geom_xpos[self.soles, 2].min(axis=1) < self.sole_radius
        velocity = to_base_frame(data.qpos[3:7], data.qvel[:3], np)
        return {
            "velocity": np.append(velocity[:2], data.qvel[5]),
            "position": data.qpos[:2].copy(),
            "action": action,
            "power": power,
            "slip": (speed * loaded).sum() / max(1, loaded.sum()),
            "fallen": has_fallen(self.robot, data.qpos, np),
        }


# shared: walking_test
# The test is frozen: results of different policies and versions compare only while it stays as it
# is. Its commands stand in the robot's row.
TEST_STARTS = 8
TEST_STEPS = 500  # control steps of each
PUSH_SPEED = 0.5  # m/s, in a random direction
PUSH_STEPS = (105, 210, 315, 420)  # at four phases of a gait; a fall has 1.6 s left to show


def drive(original: CMujocoEnv, policy: dict, command, seed: int, push: bool) -> dict[str, float]:
    """10 s on one command [3], from the start of that seed. Returns a row of the test's table.

    Velocities are means over a gait period, as the body sways with each step, after 1 s.
    """
    random = np.random.default_rng(seed)
    memory = initial_memory()
    original.reset(seed)
    rows = []
    for step in range(TEST_STEPS):
        if push and step in PUSH_STEPS:
            angle = random.uniform(0, 2 * math.pi)
            direction = np.array([math.cos(angle), math.sin(angle)])
            original.data.qvel[:2] += PUSH_SPEED * direction
        memory, action = act(policy, memory, original.observe(command))
        rows.append(original.step(action))
        if rows[-1]["fallen"]:
            return {"falls": 1}

    trace = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    error = trace["velocity"][round(1 / CONTROL_DT) :] - command
    window = np.full(original.robot.gait_ticks, 1 / original.robot.gait_ticks)
    columns = [np.convolve(column, window, "valid") for column in error.T]
    mean_error = np.stack(columns, axis=1)
    jerk = np.diff(trace["action"], n=2, axis=0)
    return {
        "falls": 0,
        "error": np.linalg.norm(mean_error[:, :2], axis=1).mean(),
        "yaw": np.abs(mean_error[:, 2]).mean(),
        "sway": np.linalg.norm(error[:, :2], axis=1).mean(),
        "slip": trace["slip"].mean(),
        "jerk": np.sqrt(np.square(jerk).mean()),
        "power": trace["power"].mean(),
        "drift": np.linalg.norm(trace["position"][-1] - trace["position"][0]),
    }


TEST_COLUMNS = ("falls", "error", "yaw", "sway", "slip", "jerk", "power", "drift")


def judge(robot: Robot, policy: dict) -> dict:
    """The test: each command from TEST_STARTS starts, without and with pushes.

    It is the same whatever the run's settings, so it takes the robot and not an `Env`. Prints the
    table (means over the starts that did not end in a fall; falls are counted; m/s, rad/s, W, m)
    and PASS or FAIL. Returns what it prints.
    """
    original = CMujocoEnv(robot)
    table = {}
    print(f"{'command':22}" + "".join(f"{name:>9}" for name in TEST_COLUMNS))
    for push in (False, True):
        for command_name, command in robot.test_commands.items():
            name = f"{command_name}, pushed" if push else command_name
            starts = [
                drive(original, policy, np.array(command), seed, push)
                for seed in range(TEST_STARTS)
            ]
            upright = [start for start in starts if not start["falls"]]
            row = {"falls": len(starts) - len(upright)}
            for key in TEST_COLUMNS[1:]:
                values = [start[key] for start in upright]
                row[key] = float(np.mean(values)) if values else math.nan
            table[name] = row
            print(f"{name:22}" + "".join(f"{value:9.3g}" for value in row.values()))

    walking = [table[name] for name, command in robot.test_commands.items() if any(command)]
    told_to_stand = [
        table[name] for name, command in robot.test_commands.items() if not any(command)
    ]
    result = {
        "falls": sum(row["falls"] for row in table.values()),
        "error": float(np.mean([row["error"] for row in walking])),
        "yaw": float(np.mean([row["yaw"] for row in walking])),
        "drift": float(np.mean([row["drift"] for row in told_to_stand])),
    }
    passed = (  # not with NaN
        result["falls"] == 0
        and result["error"] <= 0.15
        and result["yaw"] <= 0.2
        and result["drift"] <= 0.1
    )
    print(
        f"{'PASS' if passed else 'FAIL'}: {result['falls']} falls (0), "
        f"velocity error {result['error']:.3f} m/s (0.15), "
        f"yaw error {result['yaw']:.3f} rad/s (0.2), "
        f"standing drift {result['drift']:.3f} m (0.1)"
    )
    return {"passed": passed, **result, "table": table}


# end shared


# shared: renderer
def make_renderer(model: mujoco.MjModel) -> mujoco.Renderer:
    """A renderer by MUJOCO_GL; without it by EGL on Linux, which needs no display."""
    advice = "on Linux install libegl1, or libosmesa6 and set MUJOCO_GL=osmesa"
    screen = model.vis.global_
    screen.offwidth = max(screen.offwidth, 640)  # of MuJoCo's memory for pictures
    screen.offheight = max(screen.offheight, 480)
    with or_fail(f"--capture-video: no OpenGL; {advice}"):
        if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
            gl_context.GLContext = importlib.import_module("mujoco.egl").GLContext
        return mujoco.Renderer(model, height=480, width=640)


# end shared


# shared: camera
def make_camera(model: mujoco.MjModel) -> int | mujoco.MjvCamera:
    """The model's camera `track`; without one, a camera that follows the heaviest of its trees."""
    number = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    if number >= 0:
        return number
    camera = mujoco.MjvCamera()
    mujoco.mjv_defaultFreeCamera(model, camera)
    is_root = (model.body_parentid == 0) & (np.arange(model.nbody) > 0)
    root = int(np.argmax(is_root * model.body_subtreemass))
    camera.type = mujoco.mjtCamera.mjCAMERA_TRACKING
    camera.trackbodyid = root

    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    own = model.body_rootid[model.geom_bodyid] == root
    if own.any():  # the default distance shows the whole floor
        away = np.linalg.norm(data.geom_xpos[own] - data.xpos[root], axis=1)
        camera.distance = 4 * float((away + model.geom_rbound[own]).max())
    return camera


# end shared


# shared: arrow
def draw_arrow(scene: mujoco.MjvScene, start, velocity, color: tuple[float, ...]) -> None:
    """Add an arrow of 1 m for 1 m/s. start: [3] m; velocity: [2] m/s."""
    geom = scene.geoms[scene.ngeom]
    arrow = mujoco.mjtGeom.mjGEOM_ARROW
    mujoco.mjv_initGeom(geom, arrow, np.zeros(3), np.zeros(3), np.zeros(9), np.float32(color))
    end = start + np.array([*velocity, 1e-3])
    mujoco.mjv_connector(geom, arrow, 0.02, start, end)
    scene.ngeom += 1


# end shared


def write_video(robot: Robot, policy: dict, file: Path) -> None:
    """Film 3 s of each of the test's commands, in C MuJoCo, at 25 frames a second.

    Arrows show the commanded velocity in red, and the robot's, smoothed, in blue.
    """
    original = CMujocoEnv(robot)
    data = original.data
    imageio = importlib.import_module("imageio")
    renderer = make_renderer(original.model)
    camera = make_camera(original.model)

    def film(video) -> None:
        memory = initial_memory()
        smooth = np.zeros(2)
        original.reset(0)
        for command in robot.test_commands.values():
            for step in range(round(3 / CONTROL_DT)):
                memory, action = act(policy, memory, original.observe(command))
                original.step(action)
                smooth = smooth + 0.05 * (data.qvel[:2] - smooth)
                if step % 2:
                    continue
                renderer.update_scene(data, camera=camera)
                wanted = data.xmat[1].reshape(3, 3)[:2, :2] @ command[:2]
                above = data.qpos[:3] + [0, 0, 0.96 * robot.target_height]
                below = data.qpos[:3] + [0, 0, 0.88 * robot.target_height]
                draw_arrow(renderer.scene, above, wanted, (0.9, 0.2, 0.1, 1))
                draw_arrow(renderer.scene, below, smooth, (0.1, 0.4, 0.9, 1))
                video.append_data(renderer.render())

    with writing(file):
        file.parent.mkdir(exist_ok=True)
        with warnings.catch_warnings(action="ignore"):
            with imageio.get_writer(file, fps=0.5 / CONTROL_DT) as video:
                film(video)
    print(f"video: {file}")


class Twin:
    """One world's episode in C MuJoCo, with that world's draws, for tools/replay_nan.py."""

    def __init__(self, env: Env, start: State):
        self.env = env
        self.info = start.info
        self.model = load_model(env.robot, CONTROL_DT / env.args.decimation, visuals=False)
        payload = int(start.info["domain"]["payload"])
        for name, values in env.payloads.items():
            getattr(self.model, name)[:] = values[payload]
        friction = float(start.info["domain"]["friction"])
        self.model.geom_friction[env.soles.ravel(), 0] = friction
        self.data = mujoco.MjData(self.model)

    def step(self, action) -> None:
        """The physics of `Env.step` with its push, at C MuJoCo's accuracy."""
        env = self.env
        data = self.data
        domain = self.info["domain"]
        if in_mirror(env.robot, self.info["command"], self.info["elapsed"]):
            action = mirror_actions(env.robot, action)
        gains = {name: domain[name] for name in ("stiffness", "damping", "strength")}

        data.qvel[:2] += env.push(self.info)
        for i in range(env.args.decimation):
            arrived = self.info["action"] if i < domain["delay"] else action
            target = env.robot.targets(arrived, np)
            data.ctrl = env.controller.torque(target, data.qpos, data.qvel, **gains, xp=np)
            mujoco.mj_step(self.model, data)
        next_key, _, command_key, _ = jax.random.split(self.info["key"], 4)  # as in Env.step
        self.info = self.info | {
            "action": action,
            "command": env.next_command(command_key, self.info["command"]),
            "elapsed": self.info["elapsed"] + 1,
            "key": next_key,
        }


# ---- 14. Log and files ---------------------------------------------------------------------------
# shared: log
def say(text: str) -> None:
    """Print a line with the seconds since the start; of several processes only the first does."""
    if jax.process_index() == 0:
        print(f"[{time.perf_counter() - START:5.1f} s] {text}", flush=True)


def check_log(args: Args) -> None:
    """Refuse to train without the packages that write the log."""
    require(RecordWriter, "tensorboard or tqdm is missing; pip install tensorboard tqdm")
    wandb = not args.track or importlib.util.find_spec("wandb")
    require(wandb, "--track: wandb is missing; pip install wandb")


def start_tracking(run_dir: Path, settings: dict) -> None:
    """Log to Weights & Biases as well, under the name of the run's folder."""
    importlib.import_module("wandb").init(
        id=run_dir.name,
        name=run_dir.name,
        config=settings,
        resume="allow",
    )


class Log:
    """TensorBoard, and a progress bar or, without a terminal, plain lines.

    Of several processes only the first writes.
    """

    def __init__(self, args: Args, run_dir: Path, first: int):
        """first: iterations done before."""
        self.args = args
        self.run_dir = run_dir
        self.start = time.time()
        self.first_step = first * args.steps_per_iteration
        self.shown = "-"  # the last return
        self.resets = 0  # worlds reset in the whole run, as last logged
        self.dumped = False  # whether nan_dump.npz has been dealt with

        quiet = jax.process_index() > 0
        name = f"events.out.tfevents.{time.time_ns()}"
        with writing(run_dir / "events*"):
            self.writer = RecordWriter(open(os.devnull if quiet else run_dir / name, "ab"))
        self.write_event(0, file_version="brain.Event:2")
        # TensorBoard forgets what an interrupted run wrote from this step on: all of it, where no
        # checkpoint was saved.
        session = SessionLog(status=SessionLog.START)
        self.write_event(self.first_step + 1, session_log=session)
        rows = [f"\n|{name}|{value}|" for name, value in dataclasses.asdict(args).items()]
        table = "|param|value|\n|-|-|" + "".join(rows)
        summary = text_pb("hyperparameters/text_summary", table)
        self.write_event(self.first_step, summary=summary)

        self.bar = tqdm(
            total=args.num_iterations * args.steps_per_iteration,
            initial=self.first_step,
            unit=" steps",
            unit_scale=True,
            disable=quiet or None,  # None: without a terminal
        )

    def write_event(self, step: int, **content) -> None:
        """Write to TensorBoard's file at once, so that it has all when the process is killed.

        The libraries' writers have threads, which lose their queues, and which a full disk ends
        unseen.
        """
        event = Event(step=step, wall_time=time.time(), **content)
        with writing(self.run_dir / "events*"):
            self.writer.write(event.SerializeToString())
            self.writer.flush()

    def scalars(self, step: int, values: dict) -> None:
        """Write all values that are finite, by tag, in one event."""
        finite = {tag: float(value) for tag, value in values.items() if math.isfinite(value)}
        rows = [Summary.Value(tag=tag, simple_value=value) for tag, value in finite.items()]
        self.write_event(step, summary=Summary(value=rows))
        if self.args.track and jax.process_index() == 0:
            importlib.import_module("wandb").log(finite | {"global_step": step})

    def write(self, iteration: int, metrics: dict) -> dict:
        """Log the metrics of an iteration, with its black box. Returns them as numbers."""
        box = metrics.pop("black_box")
        step = iteration * self.args.steps_per_iteration
        values = jax.device_get(metrics)
        sps = (step - self.first_step) / (time.time() - self.start)
        values["charts/SPS"] = sps
        self.scalars(step, values)

        resets = values["charts/nan_resets"]
        if resets > self.resets and not self.dumped:
            self.dumped = dump(self.args, self.run_dir / "nan_dump.npz", box)
        self.resets = resets
        # NaN in SAC before its first update; NaN >= 10 is False.
        skipped = values["charts/skipped_in_a_row"]
        message = f"{self.run_dir}: step {step}: {skipped:.0f} gradients in a row are not finite"
        # One bad gradient is bad luck; ten in a row mean that the parameters are lost.
        require(not skipped >= 10, message, 1)

        if values["charts/episodes_finished"]:
            self.shown = f"{values['charts/episodic_return']:.0f}"
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f"return {self.shown}")
        if self.bar.disable and (iteration % 10 == 0 or step == self.bar.total):
            left = (self.bar.total - step) / sps
            say(f"step {step}  return {self.shown}  SPS {sps:.0f}  time left {left:.0f} s")
        return values


# end shared


# shared: files
def count_bytes(tree) -> int:
    """Memory of all arrays of a tree, or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bare(x):
    """The array itself, or the numbers of PRNG keys."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def to_arrays(tree) -> dict[str, np.ndarray]:
    """All arrays of a tree by their names, with the shares of all processes."""
    tree = multihost_utils.process_allgather(jax.tree.map(bare, tree), tiled=True)
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}


def from_arrays(arrays: dict[str, np.ndarray], like):
    """The tree that `to_arrays` took apart.

    It takes the place of the tree `like`, of the same shapes, whose arrays are deleted.
    """

    def place(path, old):
        name = jax.tree_util.keystr(path)
        new = arrays[name]
        form = jax.eval_shape(bare, old)
        if (new.shape, new.dtype) != (form.shape, form.dtype):
            theirs = f"{new.dtype} {new.shape}"
            raise ValueError(f"{name} is {theirs}, not {form.dtype} {form.shape}")
        if isinstance(old, np.ndarray):
            return new

        old.delete()
        new = jax.make_array_from_callback(new.shape, old.sharding, lambda index: new[index])
        return jax.random.wrap_key_data(new) if form.dtype != old.dtype else new

    return jax.tree.map_with_path(place, like)


def writing(file: Path):
    """Context for file writes: a full disk ends the run with one line."""
    return or_fail(f"cannot write {file}; what was saved before is whole", 1, OSError)


@contextlib.contextmanager
def replacing(file: Path):
    """A stream for the file's new content; the file is replaced as a whole or not at all."""
    part = file.with_suffix(".part")
    with writing(file):
        part.unlink(missing_ok=True)
        with part.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)


def write_npz(file: Path, arrays: dict[str, np.ndarray]) -> None:
    with replacing(file) as stream:  # NumPy's format holds a checksum of each array, and no code
        np.savez(stream, **arrays)


def dump(args: Args, file: Path, black_box: dict) -> bool:
    """Write the steps of the first world in the run that broke, for tools/replay_nan.py.

    black_box: [D, T, ...], for D devices. Returns whether a world broke.
    """
    arrays = to_arrays(black_box)
    broken = arrays["['broken']"]  # [D, T]
    if broken.any() and jax.process_index() == 0 and not file.exists():
        device = broken.T.argmax() % len(broken)  # where it was first
        arrays = {name: array[device] for name, array in arrays.items()}
        arrays["args"] = json.dumps(dataclasses.asdict(args))
        arrays["script"] = Path(__file__).name
        write_npz(file, arrays)
        say(f"a world broke; to see how: python tools/replay_nan.py {shlex.quote(str(file))}")
    return bool(broken.any())


def checkpoints(run_dir: Path) -> list[Path]:
    """The newest first."""
    return sorted((run_dir / "checkpoints").glob("[0-9]*.npz"), reverse=True)


def save(args: Args, run_dir: Path, state: TrainState, policy: dict) -> None:
    """Write a checkpoint (the whole state, and the settings) and policy.npz."""
    arrays = to_arrays(state)
    arrays["args"] = json.dumps(dataclasses.asdict(args))
    arrays["entries"] = len(arrays) + 1  # a damaged file may lose some, and be whole to NumPy
    if jax.process_index() > 0:
        return
    folder = run_dir / "checkpoints"
    with writing(folder):
        folder.mkdir(exist_ok=True)
        # Before the checkpoint: if we are killed in between, resuming from the older one rewrites it.
        write_npz(run_dir / "policy.npz", policy)
        write_npz(folder / f"{int(state.learner.iteration):09}.npz", arrays)
        for old in [*checkpoints(run_dir)[3:], *folder.glob("*.part")]:
            old.unlink()


def newest_checkpoint(run_dir: Path, flag: str) -> tuple[Path, dict, dict] | None:
    """The newest checkpoint that is whole: its file, its arrays, its settings.

    None, if the run was stopped before its first checkpoint. flag: the one that asks for it.
    """
    for file in checkpoints(run_dir):
        try:
            with np.load(file, allow_pickle=False) as arrays:
                saved = dict(arrays)  # which reads all, and compares the checksums
            if len(saved) != saved.get("entries", len(saved)):
                raise ValueError("arrays are missing")
            return file, saved, dict(json.loads(str(saved["args"])))
        except Exception as error:  # there is no end to what may be wrong with a file
            problem = f"{type(error).__name__}: {error!s:.80}"
            say(f"{flag}: {file} is broken ({problem}); trying the one before")
    require(not checkpoints(run_dir), f"{flag}: {run_dir} holds no whole checkpoint")


def restore(args: Args, run_dir: Path, state: TrainState) -> TrainState:
    """The newest whole checkpoint, in the place of `state`.

    `state` itself, if the run was stopped before its first checkpoint.
    """
    newest = newest_checkpoint(run_dir, "--resume")
    if newest is None:
        return state
    file, saved, theirs = newest
    ours = json.loads(json.dumps(dataclasses.asdict(args)))  # with lists for tuples, as theirs
    theirs = json.loads(json.dumps(dataclasses.asdict(Args()))) | theirs  # for flags that are newer
    names = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
    refused = [name for name in names if name not in RESUME_FLAGS]
    require(not refused, f"--resume: {file} differs from run.json in {', '.join(refused):.200}")
    with or_fail(f"--resume: {file} was written by other code"):
        state = from_arrays(saved, state)
    say(f"going on after iteration {int(file.stem)}: {file}")
    if "total_timesteps" in names:
        change = f"from {theirs['total_timesteps']} to {args.total_timesteps} steps"
        say(f"made longer, {change}: schedules go on as in a run of the new length")
    return state


def inherit(run_dir: Path, learner: Learner) -> Learner:
    """The learner with INHERITED from another run's newest checkpoint (--init-from)."""
    with or_fail(f"--init-from {str(run_dir)!r:.200}"):
        newest = newest_checkpoint(run_dir, "--init-from")
    require(newest, f"--init-from {run_dir}: no checkpoint there, so no policy")
    file, saved, _ = newest
    fields = tuple(f".learner.{name}" for name in INHERITED)
    theirs = {
        name.removeprefix(".learner"): saved[name] for name in saved if name.startswith(fields)
    }
    ours = to_arrays(learner)
    with or_fail(f"--init-from {file}: does not fit; another task, script or --hidden-sizes?"):
        missing = {name for name in ours if f".learner{name}".startswith(fields)} ^ theirs.keys()
        if missing:
            raise ValueError(f"{min(missing)} is in one of the two only")
        learner = from_arrays(ours | theirs, learner)
    say(f"weights and statistics are those of {file}")
    return learner


def first_state(args: Args, run_dir: Path, resuming: bool, state: TrainState) -> TrainState:
    """Where training begins: the newest checkpoint, another run's policy, or `state` itself.

    A run that was stopped before its first checkpoint starts over.
    """
    if args.init_from and not (resuming and checkpoints(run_dir)):
        state = state.replace(learner=inherit(Path(args.init_from), state.learner))
    return restore(args, run_dir, state) if resuming else state


def write_run(run_dir: Path, content: dict) -> None:
    """Write run.json."""
    if jax.process_index() == 0:
        with replacing(run_dir / "run.json") as stream:
            stream.write(json.dumps(content, indent=2).encode() + b"\n")


def read_args(text: str) -> Args:
    """The settings in a JSON text, checked as those of the command line are."""
    values = json.loads(text)
    args = Args(**{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()})
    every = typeguard.CollectionCheckStrategy.ALL_ITEMS
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        with or_fail(f"setting {field.name}"):
            typeguard.check_type(value, field.type, collection_check_strategy=every)
    check_args(args)
    return args


def read_run(run_dir: Path) -> Args:
    """The settings in a run's run.json."""
    with or_fail(f"{run_dir} is no run folder of this script"):
        run = json.loads((run_dir / "run.json").read_text())
        return read_args(json.dumps(run["args"]))


# end shared


# ---- 15. Command line ----------------------------------------------------------------------------
# shared: command_line
def require(condition, message: str, code: int = 2) -> None:
    """Unless the condition holds, end with one line and an exit code: 2 for bad input."""
    if condition:
        return
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(code)  # a polite end would wait for the other processes, and they for this one
    raise SystemExit(code)


@contextlib.contextmanager
def or_fail(message: str, code: int = 2, kind: type[Exception] = Exception):
    """End with one line and an exit code where the body raises, by default whatever it raises."""
    try:
        yield
    except kind as error:
        require(False, f"{message} ({type(error).__name__}: {error!s:.200})", code)


def parse_args(argv: list[str], default: Args = Args()) -> Args:
    """The settings of a command line. default: those of the flags that are left out."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text):
            return tyro.cli(Args, args=argv, default=default)
    except SystemExit as stop:
        # tyro draws a box around its errors; the first paragraph is what counts.
        error = text.getvalue().split("\n", 1)[-1].split("──")[0].replace("│", "")
        require(not stop.code, error)
        raise


def without_help(argv: list[str]) -> list[str]:
    """The command line without the flag at which `parse_args` would print the help and end."""
    return [flag for flag in argv if flag not in ("-h", "--help")]


# Flags of one call, which run.json does not keep.
CALL_FLAGS = (
    "resume",
    "evaluate",
    "smoke",
    "compile_cache",
    "coordinator_address",
    "num_processes",
    "process_id",
)


def call_flags(args) -> dict:
    """The flags of one call by their names; of the class `Args`, their defaults."""
    return {name: getattr(args, name) for name in CALL_FLAGS}


# Settings that a run may change when it is resumed.
RESUME_FLAGS = ("total_timesteps", "track", "capture_video")


def resumed_args(args: Args, argv: list[str]) -> Args:
    """The settings of the run to resume, with what the command line may change of them."""
    saved = dataclasses.replace(read_run(Path(args.resume)), **call_flags(args))
    wanted = parse_args(argv, saved)
    kept = {name: getattr(saved, name) for name in RESUME_FLAGS if hasattr(saved, name)}
    advice = "leave the other flags out, or start a new run, with --init-from"
    unchanged = dataclasses.replace(wanted, **kept) == saved
    require(unchanged, f"--resume: the run keeps its own settings; {advice}")

    total = saved.total_timesteps
    message = f"--total-timesteps {wanted.total_timesteps}: less than the {total} of this run"
    require(wanted.total_timesteps >= total, f"--resume: {message}; it can only become longer")
    return wanted


def start_jax(args: Args) -> None:
    """Settle what cannot change once JAX runs: its cache, its CPU devices, other processes."""
    plain = args.exp_name == Path(args.exp_name).name
    require(plain, f"--exp-name {args.exp_name}: must be a plain name")
    numbered = (args.num_processes, args.process_id) != (None, None)
    message = "--num-processes, --process-id: need --coordinator-address as well"
    require(args.coordinator_address or not numbered, message)

    jax.config.update("jax_enable_compilation_cache", args.compile_cache)
    if not args.compile_cache:
        os.environ["ONEKERNEL_CACHE"] = "0"
    elif not jax.config.jax_compilation_cache_dir:
        try:
            folder = Path.home() / ".cache" / "mjx-rl"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Who can write there can run code here. It fails if the folder is another user's.
            folder.chmod(0o700)
            jax.config.update("jax_compilation_cache_dir", str(folder))
        except (OSError, RuntimeError) as error:
            print(f"compiled programs are not kept, as there is no folder for them: {error}")

    split_cpu(args)
    if args.coordinator_address:
        join_processes(args)


CONTROL_GROUPS = Path("/sys/fs/cgroup")


def read_limits(*files: str) -> list[list[str]]:
    """What these files say in each of Linux's control groups that hold this process.

    A container's limits stand there; of version 2 in one tree, of version 1 in several.
    """
    limits = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = CONTROL_GROUPS / controllers.split(",")[0]
            own = root / path.lstrip("/")  # missing in a container, which sees its own as the root
            for folder in [own, *own.parents]:
                if folder.is_relative_to(root) and all((folder / name).exists() for name in files):
                    limits.append(" ".join((folder / name).read_text() for name in files).split())
    return limits


def count_cores() -> int:
    """Cores that this process may use, by its affinity and by a container's quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    quotas = read_limits("cpu.max") + read_limits("cpu.cfs_quota_us", "cpu.cfs_period_us")
    for quota, period in quotas:
        if quota.isdigit():  # not "max" or -1
            cores = min(cores, int(quota) // int(period))
    return max(cores, 1)


def host_memory() -> float:
    """Bytes that this process may use, by the machine and a container; infinite if none tells."""
    room = math.inf
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows does not tell
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for (limit,) in read_limits("memory.max") + read_limits("memory.limit_in_bytes"):
        if limit.isdigit():
            room = min(room, int(limit))
    return room


def split_cpu(args: Args) -> None:
    """Make a CPU as many devices as it has cores; as one, it would leave most of them idle."""
    cores = count_cores()
    os.environ.setdefault("NPROC", str(cores))  # for XLA's threads; it does not see quotas
    each = (args.num_devices or cores) // (args.num_processes or 1)
    with contextlib.suppress(RuntimeError):  # JAX has started already, with the devices it has
        # At most 64: of 256 worlds each would get fewer than four.
        jax.config.update("jax_num_cpu_devices", min(max(each, 1), 64))


def join_processes(args: Args) -> None:
    """Join the other processes; JAX asks SLURM or Open MPI for arguments that are None."""
    auto = args.coordinator_address == "auto"
    with or_fail("--coordinator-address, --num-processes, --process-id"):
        jax.distributed.initialize(
            coordinator_address=None if auto else args.coordinator_address,
            num_processes=args.num_processes,
            process_id=args.process_id,
            heartbeat_timeout_seconds=20,  # a process that is silent for so long ends all of them
            shutdown_timeout_seconds=3600,  # as all wait while the first evaluates and films
        )
        multihost_utils.sync_global_devices("start")  # now: on CPUs Gloo waits for 30 s at most


def on_signals(handler) -> None:
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


def listen() -> list[int]:
    """The signals that have asked to stop, a list that grows.

    The first ends the loop after its iteration, a second one the process.
    """
    stops = []

    def stop(number, _):
        stops.append(number)
        on_signals(signal.SIG_DFL)

    if jax.process_count() == 1:
        on_signals(stop)
    else:  # JAX listens to SIGTERM itself, for `stop_wanted`
        signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
    return stops


def stop_wanted(stops: list[int], iteration: int) -> bool:
    """Whether to stop before this iteration; if one process is asked to, all do."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(iteration):
        stops.append(signal.SIGTERM)
    return len(stops) > 0


def make_mesh(wanted: int | None, *parts: int) -> Mesh:
    """The devices that share the work; of several processes, all devices of all of them.

    wanted: how many; None for as many as possible. Each of `parts` must be a multiple of it.
    """
    devices = jax.devices()
    least = len(devices) if jax.process_count() > 1 else 1
    numbers = range(least, len(devices) + 1)
    fits = [n for n in numbers if all(part % n == 0 for part in parts)]
    possible = fits and (not wanted or wanted in fits)
    flag = f"--num-devices {wanted or len(devices)}"
    require(possible, f"{flag}: must divide {parts}; with these devices, {fits or 'none'} do")
    return Mesh(np.array(devices[: wanted or fits[-1]]), ("devices",))


def check_memory(mesh: Mesh | None, size: int, flag: str = "--num-envs") -> None:
    """Refuse what takes more bytes than the mesh's devices have, or without a mesh, the host."""
    stats = jax.local_devices()[0].memory_stats() if mesh else None  # None for a CPU
    if stats:
        room = stats["bytes_limit"] * mesh.size
    else:
        room = host_memory()
    message = f"{flag}: this takes {size} bytes of the {room} that there are; try less"
    require(size < 0.95 * room, message)  # the rest is for code and the libraries' own memory


# end shared


def check_args(args: Args) -> None:
    """Refuse what cannot run, before anything is built."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        flag = "--" + field.name.replace("_", "-")
        low, high = value if isinstance(value, tuple) and len(value) == 2 else (value, value)
        for allowed in getattr(field.type, "__metadata__", ()):
            fits = value is None or allowed.least <= low <= high <= allowed.most  # not NaN
            message = f"must be between {allowed.least} and {allowed.most}"
            require(fits, f"{flag} {value}: {message}")

    advice = "must be more than 0; None anneals the step size linearly to 0"
    good = args.desired_kl is None or args.desired_kl > 0
    require(good, f"--desired-kl {args.desired_kl}: {advice}")
    widths = args.hidden_sizes
    good = widths and min(widths) > 0 and max(widths) <= 4096
    require(good, f"--hidden-sizes {widths}: must be widths up to 4096, like 256 128")

    require(args.robot in ROBOTS, f"--robot {args.robot}: there are {', '.join(ROBOTS)}")
    file = MODELS / ROBOTS[args.robot].mjcf
    message = f"--robot {args.robot}: {file} is missing; copy the folder {MODELS.name}, too"
    require(file.exists(), message)
    message = f"--imitation-coef {args.imitation_coef}: {args.robot} has no clock to step by"
    require(ROBOTS[args.robot].clock or not args.imitation_coef, message)

    steps = args.steps_per_iteration
    message = f"--total-timesteps {args.total_timesteps}: less than a rollout of {steps}"
    require(args.num_iterations, message)
    message = f"--num-minibatches {args.num_minibatches}: must divide {steps}"
    require(steps % args.num_minibatches == 0, message)


# ---- 16. Main ------------------------------------------------------------------------------------
# shared: legged_run_dir
def open_run_dir(args: Args, run_dir: Path | None) -> Path:
    """The folder of a new run, or that of the run to continue. Fails if nothing can be written."""
    resuming = run_dir is not None
    if not resuming:
        name = f"{args.robot}__{args.exp_name}__{args.seed}__{int(time.time())}"
        run_dir = Path(args.runs_dir) / name
    if jax.process_index() == 0:
        with or_fail(f"--runs-dir {args.runs_dir}"):
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=run_dir if resuming else run_dir.parent).close()
    return run_dir


# end shared


@dataclasses.dataclass
class Programs:
    """What `train` runs, compiled."""

    env: Env
    state: TrainState  # before the first iteration
    iterate: Any  # state -> state, metrics
    facts: dict  # of the compilation and the memory, for run.json


def build(args: Args, mesh: Mesh) -> Programs:
    """Compile all programs of a run, and run the first: the state before training."""
    slowly = "" if onekernel else "; without the folder onekernel beside it, XLA's slow physics"
    say(f"building {args.robot} for {mesh.size} x {mesh.devices[0].device_kind}{slowly}")
    env = Env(args)
    key = jax.random.key(args.seed)

    shardings = jax.tree.map(partial(NamedSharding, mesh), STATE_SPEC)
    init = jax.jit(init_train_state, static_argnames=("args", "env"), out_shardings=shardings)
    init = init.lower(args, env, key)

    def shape(sharding, tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    shapes = jax.tree.map(shape, shardings, init.out_info)
    check_memory(mesh, count_bytes(shapes))

    say("compiling the training iteration")
    start = time.perf_counter()
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    # The program that makes the first state runs once, so it is compiled quickly rather than well.
    is_cpu = mesh.devices[0].platform == "cpu"
    quickly = {"xla_backend_optimization_level": 0} if is_cpu else None
    with ThreadPoolExecutor() as pool:  # XLA compiles one program while JAX traces the next
        init = pool.submit(init.compile, compiler_options=quickly)
        iterate = train_iteration.lower(args, env, mesh, shapes).compile()
        state = init.result()(key)

    memory = iterate.memory_analysis()  # of one device
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    facts = {
        "compile_s": round(time.perf_counter() - start, 2),
        "compile_cache": "hit" if any("cache_hits" in event for event in events) else "miss",
        "bytes_per_world": count_bytes(state.worlds) // args.num_envs,
        "peak_bytes": peak * mesh.size,
    }
    check_memory(mesh, facts["peak_bytes"])
    say("compiled: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    return Programs(env=env, state=state, iterate=iterate, facts=facts)


# shared: run_facts
def make_run_dir(wanted: Path) -> Path:
    """Create the folder of a new run, with a copy of this script in it.

    Where another run of the same second has that folder, it is NAME_2, NAME_3, ...
    """
    folder = wanted
    for number in itertools.count(2):
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
        folder = wanted.with_name(f"{wanted.name}_{number}")
    shutil.copy(__file__, folder)
    return folder


def model_digest(model: mujoco.MjModel) -> str:
    """A digest of a model's numbers and of its options; where its files lie does not matter."""
    digest = hashlib.sha256()
    for part in (model, model.opt):
        for name in dir(part):
            value = getattr(part, name)
            is_number = isinstance(value, int | float | np.ndarray)
            if is_number and not name.startswith(("_", "path")):
                digest.update(name.encode() + np.asarray(value).tobytes())
    return digest.hexdigest()[:16]


def onekernel_digest() -> str | None:
    """A digest of onekernel's code, which makes the physics; None without onekernel."""
    if not onekernel:
        return None
    digest = hashlib.sha256()
    for file in sorted(Path(onekernel.__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def package_versions() -> dict[str, str]:
    """The versions of those packages that a run's numbers depend on."""
    packages = ("jax", "mujoco", "mujoco-mjx", "flax", "optax")
    return {name: importlib.metadata.version(name) for name in packages}


def tell_changes(run_dir: Path, model: mujoco.MjModel) -> None:
    """Say what has changed since the run was trained, in a line each."""
    script = Path(__file__)
    for copy in run_dir.glob("*.py"):
        if copy.read_bytes() != script.read_bytes():
            command = shlex.join(["diff", str(copy), str(script)])
            say(f"the code has changed since the run began, perhaps its rewards: {command}")
    then = json.loads((run_dir / "run.json").read_text())
    if then.get("model", "") not in ("", model_digest(model)):
        say("the model has changed since the run was trained: its files, or MuJoCo's version")
    if then.get("onekernel", "") not in ("", onekernel_digest()):
        say("onekernel has changed since the run was trained, or is there only now or then")
    old, new = then.get("versions", {}), package_versions()
    changed = [
        f"{name} {old[name]} -> {new[name]}"
        for name in new
        if old.get(name, new[name]) != new[name]
    ]
    if changed:
        say("versions have changed since the run was trained: " + ", ".join(changed))


def describe_run(args: Args, mesh: Mesh, model: mujoco.MjModel) -> dict:
    """What run.json says of how to repeat the run."""
    git = ["git", "rev-parse", "HEAD"]
    commit = ""
    with contextlib.suppress(OSError):  # git is not installed
        here = Path(__file__).parent
        commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout.strip()
    return {
        "script": Path(__file__).name,
        "args": dataclasses.asdict(args),
        "commit": commit,
        "model": model_digest(model),
        "onekernel": onekernel_digest(),
        "devices": [device.device_kind for device in mesh.devices],
        "versions": package_versions(),
    }


# end shared


def train_loop(
    args: Args, run_dir: Path, programs: Programs, log: Log, stops: list[int]
) -> tuple[int, TrainState]:
    """Train until the last iteration, or until a signal asks to stop. Saves the result.

    Returns the iterations done in all, and the state.
    """
    state = programs.state
    iteration = int(state.learner.iteration)
    saved = iteration
    checkpoint_every = args.cadence(args.checkpoint_every)
    pending = None  # an iteration and its metrics, read one iteration late: no device waits
    while iteration < args.num_iterations and not stop_wanted(stops, iteration):
        state, metrics = programs.iterate(state)
        iteration += 1
        if pending:
            log.write(*pending)
        pending = (iteration, metrics)

        if iteration % checkpoint_every == 0:
            log.write(*pending)  # so that the curves reach as far as the checkpoint
            pending = None
            save(args, run_dir, state, export_policy(programs.env, state.learner))
            saved = iteration

    if pending:
        log.write(*pending)
    log.bar.close()
    if saved < iteration:
        save(args, run_dir, state, export_policy(programs.env, state.learner))
    return iteration, state


def finish(args: Args, run_dir: Path, policy: dict) -> dict:
    """Put a trained policy to the test, and film it. Returns the test's result."""
    robot = ROBOTS[args.robot]
    result = judge(robot, policy)
    if args.capture_video:
        write_video(robot, policy, run_dir / "videos" / "c_mujoco.mp4")
    return result


def train(args: Args, run_dir: Path | None = None) -> tuple[Path, dict]:
    """Train from the start, or from the newest checkpoint of run_dir.

    Returns the run's folder and its policy.
    """
    check_log(args)
    stops = listen()
    resuming = run_dir is not None
    if args.capture_video:  # better to fail now than after training
        make_renderer(ROBOTS[args.robot].model).close()
    mesh = make_mesh(
        args.num_devices, args.num_envs, args.steps_per_iteration // args.num_minibatches
    )
    args = dataclasses.replace(args, num_devices=mesh.size, **call_flags(Args))
    run_dir = open_run_dir(args, run_dir)

    programs = build(args, mesh)
    model = programs.env.robot.model
    if resuming:
        tell_changes(run_dir, model)
    programs.state = first_state(args, run_dir, resuming, programs.state)
    first = int(programs.state.learner.iteration)

    run = programs.facts | describe_run(args, mesh, model)
    if not resuming and jax.process_index() == 0:
        with or_fail(f"--runs-dir, --exp-name: {run_dir}"):
            run_dir = make_run_dir(run_dir)
    write_run(run_dir, run)
    if args.track and jax.process_index() == 0:
        start_tracking(run_dir, run["args"])

    steps = args.steps_per_iteration
    unused = args.total_timesteps % steps
    log = Log(args, run_dir, first)
    say(f"{args.num_iterations} iterations of {steps} steps, {unused} unused: {run_dir}")
    message = "the processes differ in their flags, or in the checkpoint that they found"
    with or_fail(message, kind=AssertionError):
        multihost_utils.sync_global_devices(f"{args} {first}")

    iteration, state = train_loop(args, run_dir, programs, log, stops)
    run["train_s"] = time.time() - log.start
    policy = export_policy(programs.env, state.learner)
    log.writer.close()
    if stops:
        again = shlex.join(["python", sys.argv[0], "--resume", str(run_dir)])
        say(f"stopped after iteration {iteration}; to continue: {again}")
        raise SystemExit(128 + stops[0])
    on_signals(signal.SIG_DFL)

    if jax.process_index() == 0:
        say(f"trained for {run['train_s']:.1f} s; policy: {run_dir / 'policy.npz'}")
        run["evaluation"] = finish(args, run_dir, policy)
        write_run(run_dir, run)
    return run_dir, policy


# shared: legged_main
def evaluate_run(args: Args, run_dir: Path) -> int:
    """What --evaluate does. Returns the exit code: 0 if the policy passes the test."""
    args = dataclasses.replace(args, robot=read_run(run_dir).robot)
    with or_fail(f"--evaluate {run_dir}: no policy"):
        with np.load(run_dir / "policy.npz", allow_pickle=False) as file:
            policy = dict(file)
    fits = "mirror_when" in policy
    require(fits, f"--evaluate {run_dir}: its policy is of an earlier version, without the mirror")
    tell_changes(run_dir, ROBOTS[args.robot].model)
    result = finish(args, run_dir, policy)
    return int(not result["passed"])


# end shared


def smoke(args: Args) -> None:
    """A short run, the same run resumed from its middle, and a comparison of both ends."""
    versions = {importlib.metadata.version(name) for name in ("mujoco", "mujoco-mjx")}
    require(len(versions) == 1, f"--smoke: mujoco and mujoco-mjx differ: {versions}", 1)

    with tempfile.TemporaryDirectory() as folder:
        short = dataclasses.replace(
            args,
            num_envs=32,
            num_steps=8,
            num_minibatches=4,
            total_timesteps=1024,
            checkpoint_every=2,
            runs_dir=folder,
        )
        run_dir, policy = train(short)
        checkpoints(run_dir)[0].unlink()
        _, resumed = train(read_run(run_dir), run_dir)
    same = all(np.array_equal(resumed[name], policy[name]) for name in policy)  # not if NaN
    require(same, "--smoke: the resumed run ended with another policy, or with NaN", 1)
    say("all is well: the resumed run ended with the same policy, to the bit")


def main(argv: list[str]) -> None:
    """Do what the command line asks for."""
    # Parsed twice: the robot decides what the other flags default to, and what --help shows.
    args = parse_args(argv, default_args(parse_args(without_help(argv)).robot))
    if args.resume:
        args = resumed_args(args, argv)
    check_args(args)
    start_jax(args)

    if args.smoke:
        smoke(args)
        return
    if args.evaluate:
        raise SystemExit(evaluate_run(args, Path(args.evaluate)))
    run_dir = Path(args.resume) if args.resume else None
    if not args.coordinator_address:
        train(args, run_dir)
        return
    # Where one process fails, all end at once.
    message = "this or another process has failed; start all of them again, with --resume"
    with or_fail(message, 1):
        train(args, run_dir)


if __name__ == "__main__":
    main(sys.argv[1:])
