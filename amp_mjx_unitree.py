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
"""PPO with an adversarial motion prior (AMP) for Unitree's legged robots, on MuJoCo XLA (MJX).

    python amp_mjx_unitree.py                      the G1 with 29 joints, on the reference that ships
    python amp_mjx_unitree.py --robot g1           the joints of its legs alone, likewise
    python amp_mjx_unitree.py --motion FILE...     in the style of your own reference
    python amp_mjx_unitree.py --resume runs/NAME   continue a stopped run, bit for bit
    python amp_mjx_unitree.py --evaluate runs/NAME test its policy in C MuJoCo, in Unitree's loop
    python amp_mjx_unitree.py --smoke              check the installation on this machine

It is ppo_mjx_unitree.py without the gait's clock and all that goes with it. In their place stands a
discriminator, which learns to tell the robot's motion from a reference. The robot is rewarded for
following its command, and for motion that the discriminator takes for the reference's.

The robot's body is an MJCF file in the folder robots/ beside this file, and the reference one in
robots/motions/. The science comes first:

    1 settings       6 environment        11 advantages
    2 robots         7 statistics         12 loss and update
    3 observation    8 networks           13 discriminator
    4 motions        9 training state     14 training iteration
    5 rewards       10 rollout

After it come 15 motion files, 16 evaluation, 17 log and files, 18 command line, 19 main.

Shapes: T = num_steps, N = worlds on this device, B = T * N, M = num_minibatches, O = observation
size, J = number of joints, A = action size = number of joints that are not held, F = number of
feet, S = spheres under a foot. A record describes one world; its fields are [T, N, ...] in a
rollout, [B, ...] in a batch and [B / M, ...] in a minibatch. Of the motion prior: K = size of a
frame, which is what the discriminator sees of one moment, W = num_frames, the frames of a window,
R = windows in the replay of this device, b = windows in a discriminator's step, C = number of
clips, L = their poses in all, X = those of them that follow a new command; T = poses of one clip.

Motion prior: Peng et al., arXiv:2104.02180. Robots, observation, gains and rewards follow
unitreerobotics/unitree_rl_gym (276801e); names follow CleanRL. All metrics and flags are explained
in docs/amp_mjx_unitree.md.

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

    robot: str = "g1_29dof"
    """a row of ROBOTS: g1_29dof, g1, go2"""
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
    standing: Fraction = 0.15
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
    mirror: bool = True
    """the reference has each motion's mirror image, too, and the policy is its own mirror image"""
    min_progress: Fraction = 0.35
    """an episode is lost when a robot that is told to move has done less than this share of it for
    about a second, as standing still is too good a way not to fall; 0: never"""
    num_frames: Annotated[int, Range(2, 4)] = 2
    """control steps that the discriminator sees at once"""
    disc_command: bool = True
    """it sees the command, too: to stand well is bad style for a robot that is told to walk"""


@dataclasses.dataclass(frozen=True)
class Args(WorldArgs):
    """PPO with an adversarial motion prior for Unitree's legged robots, on MuJoCo XLA."""

    # The run
    exp_name: str = "amp_mjx_unitree"
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
    checkpoint_every: Cadence = 0.05
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
    curriculum: Fraction = 0.3
    """share of the training in which noise, pushes and randomisation can reach their full strength;
    it grows while commands are followed well and few episodes are lost, and falls otherwise; 0: full
    from the start"""

    # The motion prior
    motion: tuple[str, ...] = ()
    """files of the reference; by default robots/motions/ROBOT.npz"""
    motion_weights: tuple[float, ...] = ()
    """how often each file is drawn, in any unit; by default as often as it is long"""
    reference_starts: Fraction = 0.4
    """share of the episodes that begin somewhere in the reference, not in the default pose"""
    task_share: Fraction = 0.6
    """share of the task in the reward; the rest is for the style, so that 0 is style alone"""
    disc_loss: Literal["least_squares", "bce"] = "least_squares"
    """the discriminator's loss: least squares, or binary cross-entropy"""
    disc_learning_rate: NonNegative = 1e-4
    """the discriminator's Adam's step size; small, so that the policy can keep up with it"""
    disc_updates: Annotated[int, Range(1, 1e4)] = 8
    """steps of the discriminator in an iteration"""
    disc_batch_size: Count = 512
    """windows of the robots, and as many of the reference, in each of them, over all devices"""
    disc_hidden_sizes: tuple[int, ...] = (256, 128)
    """widths of the discriminator's ELU layers"""
    grad_penalty: NonNegative = 10.0
    """weight of the penalty on the discriminator's slope at the reference; halved, as in the paper"""
    head_decay: NonNegative = 0.01
    """weight of the penalty on the squared weights of the discriminator's last layer"""
    replay_size: Count = 131072
    """windows of earlier policies that are kept, over all devices; half of what it learns from"""
    replay_added: Count = 1024
    """how many of each iteration's windows are kept"""
    clone_updates: CountOrZero = 3000
    """steps of behavioural cloning before the training, so that the actor begins as a copy of what
    moved the reference; 0: none"""
    clone_batch_size: Count = 256
    """frames of the reference in each of them"""
    critic_first: Fraction = 0.02
    """share of the training in which the actor waits for the critic, which would mislead that copy"""
    critic_learning_rate: NonNegative = 1e-3
    """the critic's step size, which nothing adapts: it starts from nothing, unlike the actor"""

    # The algorithm, with CleanRL's names
    total_timesteps: Annotated[int, Range(1, 2**62)] = 25_000_000
    """environment steps, over all worlds"""
    learning_rate: NonNegative = 3e-4
    """the actor's step size at the start; a larger one would undo the copy before it can adapt"""
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
    ent_coef: NonNegative = 0.002
    """weight of the entropy bonus at the start"""
    final_ent_coef: Annotated[float, Range(-1, 1)] = -0.003
    """weight at the end, linear in between; below 0 the actions' noise falls faster"""
    vf_coef: NonNegative = 1.0
    """weight of the value loss"""
    max_grad_norm: NonNegative = 1.0
    """gradients are scaled down to this norm"""
    desired_kl: Annotated[float | None, Range(0, 1e9)] = 0.04
    """adapt the step size to this KL divergence; None: anneal the step size linearly to 0"""
    final_kl: Fraction = 0.5
    """share of that divergence that is left at the end; linear in between"""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """widths of the ELU layers, in the actor and in the critic"""
    init_log_std: Annotated[float, Range(-20, 20)] = -1.6
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
    reach: float = 1.0  # factor of the robot's action_scale
    held: bool = False  # no action moves it: its controller holds it at `default`


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
    weights: dict[str, float]  # of the task reward's terms: see section 5
    test_commands: dict[str, tuple[float, float, float]]  # by name; see section 16

    start_height: float  # m, of the base, at resets
    target_height: float  # m, of the base in the default pose
    min_height: float  # m: below it the robot has fallen
    max_tilt: float  # rad: tilted by more, too

    gait_period: float  # s, whole control steps, over which the test takes means of the velocity

    action_scale: float = 0.25  # rad, from an action to the target of its joint

    # Defaults of the flags of the same name: `default_args` puts them in place of those of Args.
    command_x: tuple[float, float] = Args.command_x
    command_y: tuple[float, float] = Args.command_y
    command_yaw: tuple[float, float] = Args.command_yaw
    added_mass: tuple[float, float] = Args.added_mass
    ent_coef: float = Args.ent_coef
    init_log_std: float = Args.init_log_std
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

    def actions(self, angles):
        """The actions [..., A] whose targets are these angles [..., J] rad; held joints aside."""
        reach = self.action_scale * self.joint_array("reach")[self.acted]
        return (angles - self.joint_array("default"))[..., self.acted] / reach

    @property
    def limits(self) -> np.ndarray:
        """Lowest and highest angle of each joint: [J, 2] rad."""
        return self.model.jnt_range[1:]  # after the base's

    @property
    def mirror_sign(self) -> np.ndarray:
        """What a mirror at y = 0 does to the angle of each joint [J]: 1 about y, else -1."""
        return mirror_of_joints(list(self.joints), self.model)[1]

    @property
    def best(self) -> float:
        """The most that the weighted terms of the task's reward can add up to."""
        return sum(weight for weight in self.weights.values() if weight > 0)

    @property
    def gait_ticks(self) -> int:
        """Control steps in a period of the gait."""
        return round(self.gait_period / CONTROL_DT)


# What walks on two legs: Unitree's terms, less those that say how to walk.
BIPED_WEIGHTS = {
    "track_velocity": 2.0,
    "track_yaw": 1.0,
    "alive": 0.15,
    "vertical_velocity": -2.0,
    "roll_pitch_rate": -0.05,
    "tilt": -1.0,
    "joint_acceleration": -2.5e-7,
    "joint_velocity": -1e-3,
    "torque": -1e-5,
    "action_change": -0.01,
    "joint_limits": -5.0,
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


def go2_legs(ends: str, thigh: float) -> dict[str, Joint]:
    """The joints of the Go2's front or rear legs.

    ends: F or R; thigh: its default angle, rad.
    """
    hip = Joint(stiffness=20, damping=0.5, default=0.1)
    leg = {
        "hip": hip,
        "thigh": Joint(stiffness=20, damping=0.5, default=thigh),
        "calf": Joint(stiffness=20, damping=0.5, default=-1.5),
    }
    right_hip = {f"{ends}R_hip": dataclasses.replace(hip, default=-0.1)}
    return both_legs(leg, sides=(f"{ends}L", f"{ends}R")) | right_hip


GO2_JOINTS = go2_legs("F", thigh=0.8) | go2_legs("R", thigh=1.0)
GO2_WEIGHTS = {
    "track_velocity": 2.0,
    "track_yaw": 1.0,
    "vertical_velocity": -2.0,
    "roll_pitch_rate": -0.05,
    "joint_acceleration": -2.5e-7,
    "torque": -5e-5,
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
                "hip_pitch": Joint(stiffness=100, damping=2, default=-0.1),
                "hip_roll": Joint(stiffness=100, damping=2),
                "hip_yaw": Joint(stiffness=100, damping=2),
                "knee": Joint(stiffness=150, damping=4, default=0.3),
                "ankle_pitch": Joint(stiffness=40, damping=2, default=-0.2),
                "ankle_roll": Joint(stiffness=40, damping=2),
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
    ),
    # Waist and arms move, too. mjlab's motors and gains; Playground's pose.
    "g1_29dof": Robot(
        mjcf="g1_29dof.xml",
        joints={
            f"{name}_joint": joint
            for name, joint in (
                both_legs(
                    {
                        "hip_pitch": slow_servo(0.0101775, 88, default=-0.312),
                        "hip_roll": slow_servo(0.0251019, 139),
                        "hip_yaw": slow_servo(0.0101775, 88),
                        "knee": slow_servo(0.0251019, 139, default=0.669),
                        "ankle_pitch": slow_servo(0.00721945, 50, default=-0.363),
                        "ankle_roll": slow_servo(0.00721945, 50),
                    }
                )
                | {
                    "waist_yaw": slow_servo(0.0101775, 88),
                    "waist_roll": slow_servo(0.00721945, 50),
                    "waist_pitch": slow_servo(0.00721945, 50, default=0.073),
                }
                | both_legs(
                    {
                        "shoulder_pitch": slow_servo(0.00360972, 25, default=0.2),
                        "shoulder_roll": slow_servo(0.00360972, 25, default=0.2),
                        "shoulder_yaw": slow_servo(0.00360972, 25),
                        "elbow": slow_servo(0.00360972, 25, default=0.6),
                        "wrist_roll": slow_servo(0.00360972, 25),
                        "wrist_pitch": slow_servo(0.00425, 5),
                        "wrist_yaw": slow_servo(0.00425, 5),
                    }
                )
                | {"right_shoulder_roll": slow_servo(0.00360972, 25, default=-0.2)}
            ).items()
        },
        feet=("left_ankle_roll_link", "right_ankle_roll_link"),
        weights=BIPED_WEIGHTS,
        test_commands=BIPED_COMMANDS,
        start_height=0.79,
        target_height=0.75,
        min_height=0.5,
        max_tilt=0.8,
        gait_period=0.8,
        ent_coef=0.0005,  # so many joints' noise would hide what they do
    ),
    "go2": Robot(
        mjcf="go2.xml",
        joints=GO2_JOINTS,
        feet=("FL_foot", "FR_foot", "RL_foot", "RR_foot"),
        weights=GO2_WEIGHTS,
        test_commands=GO2_COMMANDS,
        start_height=0.42,
        target_height=0.3,
        min_height=0.15,
        max_tilt=0.8,
        gait_period=0.48,
        command_x=(-1.0, 1.0),
        command_y=(-1.0, 1.0),
        command_yaw=(-1.0, 1.0),
        added_mass=(-1.0, 1.0),
        init_log_std=-1.2,  # with less noise it does not learn to stand still
        total_timesteps=9_000_000,
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
    # the share of the command that it follows: see next_progress
    "progress": Part(width=1, scale=1.0, noise=0.0, mirror=(1,), for_actor=False),
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
}
SEEN = {
    "actor": {name: part for name, part in OBSERVATION.items() if part.for_actor},
    "critic": OBSERVATION,
}


def seen_parts(robot: Robot, who: str) -> dict[str, Part]:
    """What the actor or the critic sees of this robot, by the parts' names."""
    return SEEN[who]


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


def sense(robot: Robot, qpos, qvel, command, action, xp=jnp) -> dict[str, Any]:
    """All parts of the observation but the progress, in SI units: name -> [..., width].

    qpos: [..., 7 + J]; qvel: [..., 6 + J]; command: [..., 3]; action: [..., A], the last one.
    xp is jax.numpy or numpy.
    """
    quat = qpos[..., 3:7]
    down = xp.broadcast_to(xp.array([0.0, 0.0, -1.0]), qvel[..., :3].shape)
    return {
        "velocity": to_base_frame(quat, qvel[..., :3], xp),
        "rates": qvel[..., 3:6],
        "gravity": to_base_frame(quat, down, xp),
        "command": command,
        "angles": qpos[..., 7:] - robot.joint_array("default"),
        "speeds": qvel[..., 6:],
        "action": action,
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


def in_mirror(args: Args, command):
    """Whether the networks see the world in a mirror, and their actions are mirrored: bool [...].

    A robot is its own mirror image. The networks look into the mirror when the command is to turn
    right or, without a turn, to go right, so that they see no turns to the right, and what they
    learn for the left holds for the right. ppo_mjx_unitree.py tells the two halves of a gait by its
    clock; here there is none, and the command is all that the robot knows exactly.
    command: [..., 3].
    """
    right = command[..., 2] + 1e-3 * command[..., 1] < 0  # the turn decides, if there is one
    return args.mirror & right


# ---- 4. Reference ----------------------------------------------------------------------------------
def velocity_between(before, after, dt: float, xp=jnp):
    """The mean velocity [..., 6 + J] that takes one pose to another, both [..., 7 + J], in dt s.

    As in qvel: of the base in the world, m/s, and in the frame of its second pose, rad/s; rad/s.
    The turn is the logarithm of a quaternion. The inverse of mj_integratePos.
    """
    w, axis = before[..., 3:4], before[..., 4:7]
    next_w, next_axis = after[..., 3:4], after[..., 4:7]
    # The inverse of the first quaternion times the second one.
    cosine = w * next_w + (axis * next_axis).sum(axis=-1, keepdims=True)
    sine_axis = w * next_axis - next_w * axis - cross_product(axis, next_axis, xp)
    sine = xp.sqrt(xp.square(sine_axis).sum(axis=-1, keepdims=True))
    # A quaternion and its negative are the same turn; this is the one by less than half a circle.
    turn = 2 * xp.arctan2(sine, xp.abs(cosine)) * xp.where(cosine < 0, -1.0, 1.0)
    rates = sine_axis * turn / xp.maximum(sine, 1e-12) / dt
    return xp.concatenate(
        [(after[..., :3] - before[..., :3]) / dt, rates, (after[..., 7:] - before[..., 7:]) / dt],
        axis=-1,
    )


def describe_frame(qpos, qvel, feet, command=None, xp=jnp):
    """A frame, what the discriminator sees of one moment: [..., K]. Nothing tells the place.

    qpos: [..., 7 + J]; qvel: [..., 6 + J], by `velocity_between` for robot and reference alike, so
    that the way of measuring cannot tell them apart; feet: [..., F, 3] m, in the base's frame;
    command: [..., 3] on the way to this pose, or None to leave it out.
    Height, gravity in the base's frame, velocity and rates in it, angles, speeds, feet and command,
    in SI units.
    """
    quat = qpos[..., 3:7]
    down = xp.broadcast_to(xp.array([0.0, 0.0, -1.0]), qvel[..., :3].shape)
    parts = [
        qpos[..., 2:3],
        to_base_frame(quat, down, xp),
        to_base_frame(quat, qvel[..., :3], xp),
        qvel[..., 3:6],
        qpos[..., 7:],
        qvel[..., 6:],
        feet.reshape(*feet.shape[:-2], -1),
    ]
    if command is not None:
        parts.append(command)
    return xp.concatenate(parts, axis=-1)


@struct.dataclass
class Reference:
    """All clips, one after the other, a pose each control step. Of the poses of a clip:

        i-1 --(target i, command i)--> i --(target i+1, command i+1)--> i+1

    In pose i the actor sees command i+1, which has been given by then, and the action of target i;
    what it has to do is the action of target i+1. Frame i tells command i.
    """

    qpos: jax.Array  # [L, 7 + J]
    qvel: jax.Array  # [L, 6 + J] in each pose: the mean of the ways to it and from it
    frame: jax.Array  # [L, K]
    command_seen: jax.Array  # [L, 3] as the clip's file tells, or by `command_of`
    # [L, O] what the actor would see, without noise, and [L, A] what it would do; both in the
    # mirror where `in_mirror` says so.
    obs: jax.Array
    action: jax.Array
    action_before: jax.Array  # [L, A] that led to this pose, in no mirror
    first: jax.Array  # [C] int32, number of each clip's first pose
    length: jax.Array  # [C] int32, poses in it
    cumulative_chance: jax.Array  # [C] that one of the clips up to this one is drawn
    onsets: (
        jax.Array
    )  # [X] int32, poses soon after a new command; none where no file tells commands
    onset_chance: jax.Array  # [X]


def draw_moment(args: Args, reference: Reference, key: jax.Array) -> jax.Array:
    """The number of a random frame that ends a window, int32 []: a clip by its weight, then a frame.

    The whole window is of that clip.
    """
    clip_key, frame_key = jax.random.split(key)
    clip = (jax.random.uniform(clip_key) >= reference.cumulative_chance[:-1]).sum()
    earliest = args.num_frames - 1
    number = jax.random.randint(frame_key, (), earliest, reference.length[clip])
    return reference.first[clip] + number


ONSET_TIME = 0.3  # s after a new command
ONSET_SHARE = 0.33


def draw_moment_or_onset(args: Args, reference: Reference, key: jax.Array) -> jax.Array:
    """The number of a pose to copy or to begin in, int32 []: by `draw_moment`, a third of them onsets.

    How a motion starts is decided in few poses, which a copy would hardly see otherwise.
    """
    if not len(reference.onsets):
        return draw_moment(args, reference, key)
    moment_key, onset_key, choice_key = jax.random.split(key, 3)
    onset = jax.random.choice(onset_key, reference.onsets, p=reference.onset_chance)
    chosen = jax.random.uniform(choice_key) < ONSET_SHARE
    return jnp.where(chosen, onset, draw_moment(args, reference, moment_key))


def window_at(args: Args, reference: Reference, moment: jax.Array) -> jax.Array:
    """The reference's window [W, K] that ends with the frame of that number."""
    return reference.frame[moment + jnp.arange(1 - args.num_frames, 1)]


class Clip(NamedTuple):
    """A motion as a file has it, with the robot's own joints. Files are read in section 15."""

    qpos: np.ndarray  # [T, 7 + J]
    dt: float  # s between two frames
    # On the way to each frame; None where nobody knows.
    targets: np.ndarray | None = None  # [T, J] rad, where the joints were sent
    command: np.ndarray | None = None  # [T, 3] what the robot was told


def resample(robot: Robot, clip: Clip) -> Clip:
    """The clip at the control rate, with targets. Between two frames joints and base move evenly.

    Targets that the file does not tell are taken to be the pose's angles, ahead by what the
    controllers' damping takes from their speeds. The weight that joints carry is not in these, so
    they are a beginning only.
    """
    last = len(clip.qpos) - 1
    steps = math.floor(last * clip.dt / CONTROL_DT + 1e-3)
    times = np.arange(steps + 1) * (CONTROL_DT / clip.dt)  # in frames
    before = np.minimum(np.floor(times + 1e-6).astype(int), last - 1)
    velocity = velocity_between(clip.qpos[:-1], clip.qpos[1:], 1.0, np)
    poses = clip.qpos[before]
    for pose, frame, time_since in zip(poses, before, times - before, strict=True):
        mujoco.mj_integratePos(robot.model, pose, velocity[frame], time_since)

    if clip.targets is None:
        lead = robot.joint_array("damping") / robot.joint_array("stiffness")  # s
        targets = poses[:, 7:] + lead * np.gradient(poses[:, 7:], CONTROL_DT, axis=0)
    else:
        share = (times - before)[:, None]
        targets = (1 - share) * clip.targets[before] + share * clip.targets[before + 1]
    command = clip.command
    if command is not None:
        following = np.minimum(np.ceil(times - 1e-6).astype(int), last)
        command = command[following]  # that on the way to the next frame
    return Clip(qpos=poses, dt=CONTROL_DT, targets=targets, command=command)


def mirror_poses(robot: Robot, qpos: np.ndarray) -> np.ndarray:
    """Poses [..., 7 + J] as a mirror at y = 0 shows them."""
    base = qpos[..., :7] * np.array([1, -1, 1, 1, -1, 1, -1])
    return np.concatenate([base, mirror_joints(robot, qpos[..., 7:])], axis=-1)


def mirror_clip(robot: Robot, clip: Clip) -> Clip:
    """A clip with targets as a mirror at y = 0 shows it."""
    command = None if clip.command is None else clip.command * np.array([1, -1, -1])
    return Clip(
        qpos=mirror_poses(robot, clip.qpos),
        dt=clip.dt,
        targets=mirror_joints(robot, clip.targets),
        command=command,
    )


def trace_feet(robot: Robot, qpos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of poses [T, 7 + J]: the feet [T, F, 3] m in the base's frame, and the soles' heights.

    The latter are [T, F, S] m, of the lowest points of the spheres under the feet.
    """
    model = robot.model
    data = mujoco.MjData(model)
    bodies, soles = find_feet(robot, model)
    radius = model.geom_size[soles, 0]
    feet = []
    heights = []
    for pose in qpos:
        data.qpos = pose
        mujoco.mj_kinematics(model, data)
        feet.append(to_base_frame(pose[3:7], data.xpos[bodies] - pose[:3], np))
        heights.append(data.geom_xpos[soles, 2] - radius)
    return np.array(feet), np.array(heights)


def command_of(args: Args, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    """The commands [T, 3] that a robot which moves like this clip seems to follow.

    They are its mean velocity and turn over half a second before and after, in the base's frame,
    within what is commanded; slow ones are 0, as in Env.draw_command. An episode that begins in the
    reference has this command at first, so that to go on like the reference is what it is told.
    """
    velocity = np.concatenate(
        [to_base_frame(qpos[:, 3:7], qvel[:, :3], np)[:, :2], qvel[:, 5:6]], axis=1
    )
    sums = np.concatenate([np.zeros((1, 3)), velocity.cumsum(axis=0)])
    half = round(0.5 / CONTROL_DT)
    moments = np.arange(len(velocity))
    start = np.maximum(moments - half, 0)
    end = np.minimum(moments + half + 1, len(velocity))
    command = (sums[end] - sums[start]) / (end - start)[:, None]
    command = np.clip(command, *np.array([args.command_x, args.command_y, args.command_yaw]).T)
    speed = np.linalg.norm(command[:, :2], axis=1)
    size = np.stack([speed, speed, np.abs(command[:, 2])], axis=1)
    return np.where(size < MIN_COMMAND, 0.0, command)


def demonstrate(
    args: Args, qpos: np.ndarray, qvel: np.ndarray, command_seen: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the actor would see in each pose of a clip [T, ...], and the action that leads on.

    targets: on the way to each pose. Returns observations [T, O] and actions [T, A].
    """
    robot = ROBOTS[args.robot]
    action_before = robot.actions(targets)
    action = next_rows(action_before)
    senses = sense(robot, qpos, qvel, command_seen, action_before, np)
    obs = observe(seen_parts(robot, "actor"), senses, np)
    mirrored = in_mirror(args, command_seen)[:, None]
    obs = np.where(mirrored, mirror_observation(robot, obs, np), obs)
    return obs, np.where(mirrored, mirror_actions(robot, action), action)


def next_rows(rows: np.ndarray) -> np.ndarray:
    """Each row's next one, and in place of the last row's that row itself: [T, ...] -> [T, ...]."""
    return np.concatenate([rows[1:], rows[-1:]])


def soon_after_a_command(args: Args, command_seen: np.ndarray) -> np.ndarray:
    """Numbers of a clip's poses in which the actor has seen a new command for less than ONSET_TIME.

    command_seen: [T, 3], recorded. Those by `command_of` jump where they pass MIN_COMMAND, at no
    moment that the motion knows of.
    """
    changed = np.flatnonzero((np.abs(np.diff(command_seen, axis=0)) > 0.1).any(axis=1)) + 1
    ages = np.arange(round(ONSET_TIME / CONTROL_DT))
    numbers = (changed[:, None] + ages).ravel()
    return numbers[(numbers >= args.num_frames - 1) & (numbers < len(command_seen))]


def make_reference(args: Args, clips: list[Clip], weights) -> Reference:
    """The reference of clips as `resample` returns them, each with its weight; NumPy arrays.

    With --mirror each is followed by its mirror image, which is drawn as often.
    """
    robot = ROBOTS[args.robot]
    tables = []  # of a clip or an image: the arrays with a row for each pose
    onsets = []
    for clip in clips:
        for image in [clip, mirror_clip(robot, clip)] if args.mirror else [clip]:
            # The first pose only tells the velocity of the second one.
            qpos, targets = image.qpos[1:], image.targets[1:]
            # On the way to each pose, as in robots' frames; and in it, as simulators have it.
            mean_qvel = velocity_between(image.qpos[:-1], qpos, CONTROL_DT, np)
            qvel = (mean_qvel + next_rows(mean_qvel)) / 2
            told = image.command is not None
            command = image.command[1:] if told else command_of(args, qpos, mean_qvel)
            command_seen = next_rows(command)
            feet, _ = trace_feet(robot, qpos)
            shown = command if args.disc_command else None
            if image is clip:
                # The image shares it, as the networks see both alike. Only under commands straight
                # on they would not, and the mean of two first feet would be to stand.
                obs, action = demonstrate(args, qpos, qvel, command_seen, targets)
            table = {
                "qpos": qpos,
                "qvel": qvel,
                "frame": describe_frame(qpos, mean_qvel, feet, shown, np),
                "command_seen": command_seen,
                "obs": obs,
                "action": action,
                "action_before": robot.actions(targets),
            }
            tables.append(table)
            none = np.zeros(0, int)
            onsets.append(soon_after_a_command(args, command_seen) if told else none)

    length = np.array([len(table["qpos"]) for table in tables], np.int32)
    first = np.cumsum(length, dtype=np.int32) - length
    weights = np.repeat(np.float64(weights), len(tables) // len(clips))
    each = [weight / max(len(found), 1) for weight, found in zip(weights, onsets, strict=True)]
    onset_weight = np.repeat(each, [len(found) for found in onsets])
    numbers = np.concatenate([start + found for start, found in zip(first, onsets, strict=True)])
    joined = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    return Reference(
        **{name: rows.astype(np.float32) for name, rows in joined.items()},
        first=first,
        length=length,
        cumulative_chance=(np.cumsum(weights) / np.sum(weights)).astype(np.float32),
        onsets=numbers.astype(np.int32),
        onset_chance=(onset_weight / max(onset_weight.sum(), 1e-9)).astype(np.float32),
    )


# ---- 5. Rewards ----------------------------------------------------------------------------------
# Widths of the rewards for tracking: an error whose square is the width costs 63%. That for the
# velocity grows with the speed asked for, up to 1 m/s. With TRACKING_WIDTH for all commands, who
# stands when told to walk at 0.3 m/s loses 30%, and who drifts by 0.2 m/s when told to stand 15%.
# A turn counts as speed: steps sway, and with the narrow width turning would earn less than
# standing still.
TRACKING_WIDTH = 0.25  # (m/s)^2 and (rad/s)^2, as in legged_gym's tracking_sigma
STANDING_WIDTH = 0.04  # (m/s)^2


@struct.dataclass
class Motion:
    """What the task's reward looks at after a control step."""

    command: jax.Array  # [3] m/s, m/s, rad/s
    velocity: jax.Array  # [3] m/s, of the base, in its frame
    rates: jax.Array  # [3] rad/s, of the base, in its frame
    gravity: jax.Array  # [3] direction, in the base's frame
    angles: jax.Array  # [J] rad
    speeds: jax.Array  # [J] rad/s
    accelerations: jax.Array  # [J] rad/s^2, mean over the control step
    torque: jax.Array  # [J] Nm, of the last physics step
    action: jax.Array  # [A]
    action_before: jax.Array  # [A]


def unweighted_terms(robot: Robot, m: Motion) -> dict[str, jax.Array]:
    """The terms of the robot's reward before weighting: name -> []."""
    lowest = robot.limits @ [0.95, 0.05]  # of the central 90% of each joint's range
    highest = robot.limits @ [0.05, 0.95]
    beyond = jnp.maximum(m.angles - highest, 0.0).sum() + jnp.maximum(lowest - m.angles, 0.0).sum()
    velocity_error = jnp.square(m.command[:2] - m.velocity[:2]).sum()
    yaw_error = jnp.square(m.command[2] - m.rates[2])

    speed = jnp.linalg.norm(m.command)
    width = STANDING_WIDTH + (TRACKING_WIDTH - STANDING_WIDTH) * jnp.minimum(speed, 1.0)
    terms = {
        "track_velocity": jnp.exp(-velocity_error / width),
        "track_yaw": jnp.exp(-yaw_error / TRACKING_WIDTH),
        "alive": jnp.ones(()),
        "vertical_velocity": jnp.square(m.velocity[2]),
        "roll_pitch_rate": jnp.square(m.rates[:2]).sum(),
        "tilt": jnp.square(m.gravity[:2]).sum(),
        "joint_acceleration": jnp.square(m.accelerations).sum(),
        "joint_velocity": jnp.square(m.speeds).sum(),
        "torque": jnp.square(m.torque).sum(),
        "action_change": jnp.square(m.action - m.action_before).sum(),
        "joint_limits": beyond,
    }
    unknown = [name for name in robot.weights if name not in terms]
    require(not unknown, f"ROBOTS: there are no terms {unknown} of the reward, but {list(terms)}")
    return {name: terms[name] for name in robot.weights}


def reward_terms(robot: Robot, m: Motion) -> dict[str, jax.Array]:
    """The terms of the task's reward for one control step, weighted: name -> [].

    The reward is their sum, but at least 0, so that to end an episode early never pays; Env.step
    applies the bound. At best it is 1.
    """
    terms = unweighted_terms(robot, m)
    weights = robot.weights.items()
    return {f"reward_{name}": weight / robot.best * terms[name] for name, weight in weights}


# ---- 6. Environment ------------------------------------------------------------------------------
MIN_COMMAND = 0.2  # m/s and rad/s: slower commands become 0
PROGRESS_TIME = 1.0  # s, over which progress is averaged, with exponential weights


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
    obs: dict[str, jax.Array]  # the actor's [O], with noise, and the critic's [O + 4]
    reward: jax.Array  # [] of the task, 0 to 1; `rollout` mixes it with the style's
    done: jax.Array  # [] float, 1 if the robot fell or broke; the time limit is in info
    metrics: dict[str, jax.Array]  # the task's reward and its terms, and the errors of tracking
    info: dict[str, Any]
    # key: of the commands, pushes and noise; command: [3]; action: [A], the last one, not mirrored;
    # elapsed: steps since the reset; truncated: the time limit is reached; broken: see Env;
    # domain, level: see Env.draw_domain; window: [W, K] what the discriminator sees, in no mirror;
    # progress: see next_progress


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


def next_progress(progress, command, velocity) -> jax.Array:
    """Which share of a command a robot follows: [], a mean over about PROGRESS_TIME.

    progress: [], before the step; command, velocity: [3] m/s, m/s, rad/s. The share is the velocity
    along the command, from -2 to 2 of it, since a push is a large multiple of a slow one; told to
    stand, a robot does as told.
    """
    size = jnp.square(command).sum()
    share = jnp.where(size > 0, command @ velocity / jnp.maximum(size, 1e-6), 1.0)
    share = jnp.clip(share, -2.0, 2.0)
    return progress + CONTROL_DT / PROGRESS_TIME * (share - progress)


class Env:
    """One world of a robot. `reset` and `step` are pure functions: batch them with jax.vmap.

    A world that is not finite, or faster than MAX_SPEED, is broken: its step ends the episode,
    earns nothing and is not learnt from, and its observation stays as it was.
    """

    MAX_SPEED = 100.0  # m/s and rad/s
    # Shorter than the test, so that there are many starts in the reference; the value of what would
    # have come is bootstrapped.
    time_limit = 250  # steps

    def __init__(self, args: Args):
        world = {field.name: getattr(args, field.name) for field in dataclasses.fields(WorldArgs)}
        self.args = WorldArgs(**world)
        self.robot = ROBOTS[args.robot]
        self.action_size = len(self.robot.acted)
        self.seen = {who: seen_parts(self.robot, who) for who in SEEN}
        self.noise = args.obs_noise * noise_widths(self.robot, self.seen["actor"])  # [O]
        self.controller = make_controller(self.robot)

        dt = CONTROL_DT / args.decimation
        self.payloads = draw_payloads(args, load_model(self.robot, dt, visuals=False))
        model = load_model(self.robot, dt, visuals=False)
        self.feet, self.soles = find_feet(self.robot, model)

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
        self,
        key: jax.Array,
        data: Physics,
        command: jax.Array,
        action: jax.Array,
        progress: jax.Array,
        level,
    ) -> dict[str, jax.Array]:
        """The actor's [O], with noise, and the critic's [O + 4]; in the mirror, see `in_mirror`.

        level: [] share of the noise.
        """
        robot = self.robot
        senses = sense(robot, data.qpos, data.qvel, command, action)
        senses["progress"] = progress[None]
        obs = {who: observe(parts, senses) for who, parts in self.seen.items()}
        noise = jax.random.uniform(key, obs["actor"].shape, minval=-1.0, maxval=1.0)
        obs["actor"] += level * self.noise * noise

        mirrored = in_mirror(self.args, command)
        return {
            who: jnp.where(mirrored, mirror_observation(robot, values, who=who), values)
            for who, values in obs.items()
        }

    def frame(self, qpos: jax.Array, qvel: jax.Array, command: jax.Array) -> jax.Array:
        """What the discriminator sees of a moment: [K]. qvel: by `velocity_between`."""
        data = mjx.kinematics(self.model, self.template.replace(qpos=qpos))
        feet = to_base_frame(qpos[3:7], data.xpos[self.feet] - qpos[:3])
        return describe_frame(qpos, qvel, feet, command if self.args.disc_command else None)

    def reset(self, key: jax.Array, level=1.0, start: dict | None = None) -> State:
        """A new episode near the default pose or in a reference, with another body and command.

        key: one PRNG key; level: [] share of what is random in body, observation and pushes; start:
        by `draw_start`; None for the default pose.
        """
        keys = jax.random.split(key, 6)
        next_key, angle_key, velocity_key, command_key, domain_key, noise_key = keys

        # Half of these episodes begin nearly at rest, as the test does.
        rest_key, velocity_key = jax.random.split(velocity_key)
        # A share of the default angles; of the velocity, m/s and rad/s.
        spread = jnp.where(jax.random.bernoulli(rest_key), 0.05, 0.5)
        default = self.controller.default
        factors = jax.random.uniform(angle_key, default.shape, minval=-1.0, maxval=1.0)
        angles = default * (1 + spread * factors)
        base = jnp.array([0.0, 0.0, self.robot.start_height, 1.0, 0.0, 0.0, 0.0])
        velocity = spread * jax.random.uniform(velocity_key, (6,), minval=-1.0, maxval=1.0)
        action = jnp.zeros(self.action_size)
        qpos = jnp.concatenate([base, angles])
        qvel = jnp.concatenate([velocity, jnp.zeros_like(angles)])
        command = self.draw_command(command_key)
        frame = self.frame(qpos, qvel, command)
        window = jnp.broadcast_to(frame, (self.args.num_frames, *frame.shape))
        if start is not None:
            chosen = start["chosen"]
            qpos = jnp.where(chosen, start["qpos"].at[:2].set(0.0), qpos)
            qvel = jnp.where(chosen, start["qvel"], qvel)
            window = jnp.where(chosen, start["window"], window)
            command = jnp.where(chosen, start["command"], command)
            action = jnp.where(chosen, start["action"], action)
        data = Physics(qpos=qpos, qvel=qvel, qacc_warmstart=jnp.zeros_like(qvel))

        progress = jnp.ones(())
        zero = jnp.zeros(())
        no = jnp.array(False)
        names = [f"reward_{name}" for name in ("task", *self.robot.weights)]
        return State(
            data=data,
            obs=self.observations(noise_key, data, command, action, progress, level),
            reward=zero,
            done=zero,
            metrics=dict.fromkeys([*names, "error_velocity", "error_yaw"], zero),
            info={
                "key": next_key,
                "command": command,
                "action": action,
                "elapsed": jnp.zeros((), jnp.int32),
                "truncated": no,
                "broken": no,
                "domain": self.draw_domain(domain_key, level),
                "level": jnp.float32(level),
                "window": window,
                "progress": progress,
            },
        )

    def advance(
        self, data: Physics, action: jax.Array, action_before: jax.Array, domain: dict
    ) -> tuple[Physics, jax.Array]:
        """The physics of one control step.

        Returns the state after it, and the torques [J] of the last physics step.
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

            data = Physics(qpos=full.qpos, qvel=full.qvel, qacc_warmstart=full.qacc_warmstart)
            return data, torque

        data, torques = jax.lax.scan(substep, data, jnp.arange(self.args.decimation))
        return data, torques[-1]

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
        self, info: dict, before: Physics, data: Physics, action: jax.Array, torque: jax.Array
    ) -> Motion:
        """What the rewards look at after a step from `before` to `data`; info: before it."""
        quat = data.qpos[3:7]
        return Motion(
            command=info["command"],
            velocity=to_base_frame(quat, data.qvel[:3]),
            rates=data.qvel[3:6],
            gravity=to_base_frame(quat, jnp.array([0.0, 0.0, -1.0])),
            angles=data.qpos[7:],
            speeds=data.qvel[6:],
            accelerations=(data.qvel[6:] - before.qvel[6:]) / CONTROL_DT,
            torque=torque,
            action=action,
            action_before=info["action"],
        )

    def step(self, state: State, action: jax.Array) -> State:
        """One control step.

        action: [A], the targets of the joints that it moves, as offsets from the default pose,
            divided by the robot's action_scale and the joints' reach; in the mirror where the
            observation is.
        """
        info = state.info
        mirrored = in_mirror(self.args, info["command"])
        action = jnp.where(mirrored, mirror_actions(self.robot, action), action)
        # The second key is that of `push`.
        next_key, _, command_key, noise_key = jax.random.split(info["key"], 4)
        pushed = state.data.replace(qvel=state.data.qvel.at[:2].add(self.push(info)))
        data, torque = self.advance(pushed, action, info["action"], info["domain"])
        bounded = (jnp.abs(data.qvel) < self.MAX_SPEED).all()  # False for NaN as well
        sane = jnp.isfinite(data.qpos).all() & bounded

        motion = self.describe_motion(info, state.data, data, action, torque)
        terms = reward_terms(self.robot, motion)
        reward = jnp.maximum(sum(terms.values()), 0.0)
        error = jnp.linalg.norm(motion.command[:2] - motion.velocity[:2])
        metrics = terms | {
            "reward_task": reward,
            "error_velocity": error,
            "error_yaw": jnp.abs(motion.command[2] - motion.rates[2]),
        }
        mean_qvel = velocity_between(state.data.qpos, data.qpos, CONTROL_DT)
        frame = self.frame(data.qpos, mean_qvel, info["command"])
        window = jnp.concatenate([info["window"][1:], frame[None]])

        velocity = jnp.stack([motion.velocity[0], motion.velocity[1], motion.rates[2]])
        followed = next_progress(info["progress"], info["command"], velocity)
        lost = has_fallen(self.robot, data.qpos) | (followed < self.args.min_progress)

        # The step is rewarded for the old command; the next one is observed already.
        command = self.next_command(command_key, info["command"])
        progress = jnp.where((command != info["command"]).any(), 1.0, followed)
        elapsed = info["elapsed"] + 1
        obs = self.observations(noise_key, data, command, action, progress, info["level"])
        return State(
            data=data,
            obs={name: jnp.where(sane, new, state.obs[name]) for name, new in obs.items()},
            reward=jnp.where(sane, reward, 0.0),
            done=jnp.where(sane & ~lost, 0.0, 1.0),
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
                "window": jnp.where(sane, window, info["window"]),
                "progress": progress,
            },
        )


# ---- 7. Running statistics -----------------------------------------------------------------------
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


# ---- 8. Networks ---------------------------------------------------------------------------------
# shared: dense
def dense(width: int, **options) -> nn.Dense:
    """A layer. On a CPU onekernel's product is faster than XLA's, most of all in the gradient."""
    return nn.Dense(width, dot_general=onekernel.dot_general if onekernel else None, **options)


# end shared


class MLP(nn.Module):
    """ELU layers with orthogonal weights: [..., in] -> [..., out]."""

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
    actor = MLP(
        args.hidden_sizes, env.action_size, gain=0.01
    )  # without a copy, first actions are noise
    critic = MLP(args.hidden_sizes, 1, gain=1.0)
    return actor, critic


def make_discriminator(args: Args) -> MLP:
    """Windows [..., W * K] of normalised frames -> [..., 1]: high for the reference's."""
    return MLP(args.disc_hidden_sizes, 1, gain=0.01)  # at first it is at a loss


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


# ---- 9. Training state ---------------------------------------------------------------------------
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
    discriminator: dict  # Flax parameters
    disc_opt_state: optax.OptState  # of these parameters as one vector
    frame_stats: RunningStats  # [K], of the robots' frames and as many of the reference
    key: jax.Array  # of the shuffles
    disc_key: jax.Array  # of what the discriminator learns from
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
    replay: jax.Array  # [replay_size, W, K] windows of earlier policies, split over the devices


# What --init-from takes from another run's learner.
INHERITED = ("params", "averaged", "obs_stats", "return_stats")

STATE_SPEC = TrainState(learner=P(), worlds=P("devices"), replay=P("devices"))


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


def draw_start(args: Args, reference: Reference, key: jax.Array) -> dict[str, jax.Array]:
    """A moment of the reference, and whether an episode begins there, for Env.reset."""
    moment_key, choice_key = jax.random.split(key)
    moment = draw_moment_or_onset(args, reference, moment_key)
    return {
        "chosen": jax.random.uniform(choice_key) < args.reference_starts,
        "qpos": reference.qpos[moment],
        "qvel": reference.qvel[moment],
        "window": window_at(args, reference, moment),
        "command": reference.command_seen[moment],
        "action": reference.action_before[moment],
    }


def reset_worlds(args: Args, env: Env, reference: Reference, keys: jax.Array, level) -> State:
    """The starts of new episodes [N]. keys: [N]; level: []."""
    reset_keys, start_keys = split_keys(keys, 2)
    starts = jax.vmap(partial(draw_start, args, reference))(start_keys)
    levels = jnp.broadcast_to(level, keys.shape)
    return jax.vmap(kernel(env.reset))(reset_keys, levels, starts)


CLONE_RATE = 2e-3  # Adam's step size at the start, falling to 0 as a cosine
# Samples that the reference counts as in the actor's statistics: so many that they stay as they are.
# Those of robots that fall would change what the copy sees, and it would fall more.
CLONE_WEIGHT = 1e9


def clone(
    args: Args, env: Env, reference: Reference, actor: dict, stats: RunningStats, key: jax.Array
) -> dict:
    """The actor after behavioural cloning: in the reference's frames it does what led on there.

    Observations have the noise that they have in training, the last action among them.
    """
    network, _ = make_networks(args, env)
    optimizer = optax.adam(optax.cosine_decay_schedule(CLONE_RATE, args.clone_updates))
    last_action = part_slices(env.robot, env.seen["actor"])["action"]

    def loss(params: dict, key: jax.Array) -> jax.Array:
        moment_key, noise_key, action_key = jax.random.split(key, 3)
        moment_keys = jax.random.split(moment_key, args.clone_batch_size)
        moments = jax.vmap(partial(draw_moment_or_onset, args, reference))(moment_keys)
        obs = reference.obs[moments]
        obs += env.noise * jax.random.uniform(noise_key, obs.shape, minval=-1.0, maxval=1.0)
        shape = obs[:, last_action].shape
        noise = math.exp(args.init_log_std) * jax.random.normal(action_key, shape)
        obs = obs.at[:, last_action].add(noise)
        mean = network.apply(params, normalize(stats, obs))
        return jnp.square(mean - reference.action[moments]).mean()

    def step(carry, key):
        params, opt_state = carry
        gradient = jax.grad(loss)(params, key)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(key, args.clone_updates)
    (params, _), _ = jax.lax.scan(step, (actor, optimizer.init(actor)), keys)
    return params


def least_variance(args: Args, env: Env) -> np.ndarray:
    """What is added to the variance of the reference's observations: [O].

    With it noise, commands and actions that the reference lacks stay within the normaliser's 10
    deviations, and so do joints that it hardly moves: also with --obs-noise 0.
    """
    var = np.square(noise_widths(env.robot, env.seen["actor"])) / 3
    where = part_slices(env.robot, env.seen["actor"])
    low, high = np.array([args.command_x, args.command_y, args.command_yaw]).T
    scale = np.array(env.seen["actor"]["command"].scale)
    var[where["command"]] += 0.25 * np.square(scale * (high - low)) / 12
    var[where["action"]] += math.exp(2 * args.init_log_std)
    return var


def init_train_state(args: Args, env: Env, reference: Reference, key: jax.Array) -> TrainState:
    """The state before the first iteration."""
    keys = jax.random.split(key, 9)
    actor_key, critic_key, net_key, disc_key, shuffle_key, *keys = keys
    reset_key, clock_key, world_key, clone_key = keys

    n = args.num_envs
    level = jnp.float32(0.0 if args.curriculum else 1.0)
    env_state = reset_worlds(args, env, reference, jax.random.split(reset_key, n), level)
    # The worlds' clocks start at random, so that their time limits do not come all at once.
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
    obs_stats = {name: start_stats(values.shape) for name, values in obs.items()}
    if args.clone_updates:
        obs_stats["actor"] = RunningStats(
            count=jnp.float32(CLONE_WEIGHT),
            mean=reference.obs.mean(axis=0),
            var=reference.obs.var(axis=0) + least_variance(args, env),
        )
        stats = obs_stats["actor"]
        params["actor"] = clone(args, env, reference, params["actor"], stats, clone_key)
    vector, _ = ravel_pytree(params)
    window = env_state.info["window"][0]
    discriminator = make_discriminator(args).init(net_key, window.ravel())
    disc_vector, _ = ravel_pytree(discriminator)
    learner = Learner(
        params=params,
        averaged=params["actor"],
        opt_state=make_optimizer(args).init(vector),
        learning_rate=jnp.float32(args.learning_rate),
        level=level,
        obs_stats=obs_stats,
        return_stats=start_stats(()),
        discriminator=discriminator,
        disc_opt_state=make_optimizer(args).init(disc_vector),
        frame_stats=start_stats(window.shape[1:]),
        key=shuffle_key,
        disc_key=disc_key,
        iteration=jnp.zeros((), jnp.int32),
    )
    replay = jnp.zeros((args.replay_size, *window.shape))
    return TrainState(learner=learner, worlds=worlds, replay=replay)


# ---- 10. Rollout ---------------------------------------------------------------------------------
@struct.dataclass
class Transition:
    """One step of one world; `end` and the flags are the outcome of `action`."""

    action: jax.Array  # [A]
    mean: jax.Array  # [A] of the policy
    reward: jax.Array  # [] of task and style
    style: jax.Array  # [] its reward, 0 to 1
    start: State  # where the step began
    end: Worlds  # where it ended, before any reset: observation, window, episode's return, ...
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


def rollout(
    args: Args, env: Env, reference: Reference, learner: Learner, worlds: Worlds
) -> tuple[Worlds, Transition]:
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
        style = style_reward(args, learner, state.info["window"])
        reward = args.task_share * state.reward + (1 - args.task_share) * style
        reward = jnp.where(broken, 0.0, reward)
        end = Worlds(
            env_state=state,
            memory=memory,
            key=key,
            discounted_return=args.gamma * worlds.discounted_return + reward,
            episode_return=worlds.episode_return + reward,
            episode_length=worlds.episode_length + 1,
            times_broken=worlds.times_broken + broken,
        )
        transition = Transition(
            action=action,
            mean=policy.mean,
            reward=reward,
            style=style,
            start=start,
            end=end,
            terminated=terminated,
            done=done,
            valid=~broken,
            finished=done & ~broken & (end.episode_length == state.info["elapsed"]),
        )
        reset = reset_worlds(args, env, reference, reset_key, learner.level)
        fresh = start_worlds(reset, key, end.times_broken)
        return where_done(done, fresh, end), transition

    return jax.lax.scan(step, worlds, None, length=args.num_steps)


# ---- 11. Advantages ------------------------------------------------------------------------------
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


# ---- 12. Loss and update -------------------------------------------------------------------------
@struct.dataclass
class Batch:
    """What the loss needs of each transition."""

    obs: dict[str, jax.Array]  # of actor and critic
    action: jax.Array  # [A]
    mean: jax.Array  # [A] of the policy that acted
    advantage: jax.Array
    target: jax.Array  # of the value
    valid: jax.Array  # bool: to be learnt from


def actor_learns(args: Args, learner: Learner) -> jax.Array:
    """Whether the actor learns by now, and does not wait for the critic: bool []."""
    return learner.iteration >= round(args.critic_first * args.num_iterations)


def ppo_loss(
    args: Args,
    env: Env,
    learner: Learner,
    params: dict,
    mb: Batch,
    ent_coef: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a minibatch [B / M, ...], and its metrics by tag.

    learner: the one that acted, for its statistics and standard deviation; params: those that are
    learnt; ent_coef: [], weight of the entropy bonus.
    Source: arXiv:1707.06347, equations 7 and 9.
    """
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

    entropy = policy.entropy()
    loss = policy_loss - ent_coef * entropy + args.vf_coef * value_loss
    metrics = {
        "losses/loss": loss,
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/clipfrac": mean_valid(jnp.abs(ratio - 1) > args.clip_coef),
        # Exact, unlike CleanRL's approx_kl.
        "losses/kl": mean_valid(kl_divergence(old_policy, policy)),
    }
    return loss, metrics


def current_learning_rate(args: Args, learner: Learner) -> jax.Array:
    """Adam's step size in this iteration."""
    if args.desired_kl is not None:
        return learner.learning_rate
    share_done = learner.iteration / float(args.num_iterations)  # float: int32 would overflow
    return jnp.float32(args.learning_rate * (1 - share_done))


def next_learning_rate(
    args: Args, learning_rate: jax.Array, kl: jax.Array, share_done: jax.Array
) -> jax.Array:
    """Adam's step size after an iteration in which the actor has learnt, with a mean KL divergence of kl.

    share_done: of the training. After rsl_rl, but once an iteration: so many
    minibatches would drive it to its bounds.
    """
    if args.desired_kl is None:
        return learning_rate
    desired = args.desired_kl * (1 + share_done * (args.final_kl - 1))
    factor = jnp.where(kl < desired / 2, 1.5, 1.0)
    factor = jnp.where(kl > 2 * desired, 1 / 1.5, factor)
    return jnp.clip(factor * learning_rate, 1e-5, 1e-2)


def step_sizes(args: Args, learner: Learner, learning_rate: jax.Array) -> jax.Array:
    """Each parameter's step size, as a vector: learning_rate [], but the critic has its own.

    Until `actor_learns`, those of actor and log_std are 0. Adam's moments take in their gradients
    even so: moments of 0 with a count that has grown would make its first steps about three times
    too large.
    """
    params = learner.params
    rate = jnp.where(actor_learns(args, learner), learning_rate, 0.0)
    rates = {name: rate for name in params} | {"critic": args.critic_learning_rate}
    filled = {
        name: jax.tree.map(lambda x, rate=rate: jnp.full_like(x, rate), params[name])
        for name, rate in rates.items()
    }
    return ravel_pytree(filled)[0]


def mean_over_devices(tree):
    """The mean of the devices' trees, each a mean over about as many samples.

    As one vector it takes one exchange, not one a leaf.
    """
    vector, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(vector, "devices"))


def update(
    args: Args, env: Env, learner: Learner, batch: Batch
) -> tuple[Learner, dict[str, jax.Array]]:
    """The policy's epochs over a batch [B, ...], each device with its own share of it.

    Returns the learner after them, and metrics by tag: means over all minibatches.
    """
    learning_rate = current_learning_rate(args, learner)
    share_done = learner.iteration / float(args.num_iterations)  # float: int32 would overflow
    ent_coef = args.ent_coef + share_done * (args.final_ent_coef - args.ent_coef)
    optimizer = make_optimizer(args)
    vector, unravel = ravel_pytree(learner.params)
    step_size = step_sizes(args, learner, learning_rate)

    def minibatch_step(carry, mb: Batch):
        vector, opt_state = carry
        gradient_and_metrics = jax.grad(ppo_loss, argnums=3, has_aux=True)(
            args, env, learner, unravel(vector), mb, ent_coef
        )
        gradient, metrics = mean_over_devices(gradient_and_metrics)
        gradient, _ = ravel_pytree(gradient)
        direction, opt_state = optimizer.update(gradient, opt_state)

        metrics |= {"losses/grad_norm": jnp.linalg.norm(gradient)}
        carry = (vector - step_size * direction, opt_state)
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
    adapted = next_learning_rate(args, learning_rate, metrics["losses/kl"], share_done)
    learner = learner.replace(
        params=unravel(vector),
        opt_state=opt_state,
        learning_rate=jnp.where(actor_learns(args, learner), adapted, learning_rate),
        iteration=learner.iteration + 1,
    )
    return learner, metrics


# ---- 13. Discriminator ---------------------------------------------------------------------------
def judge_windows(args: Args, discriminator: dict, window: jax.Array) -> jax.Array:
    """The discriminator's output for windows [..., W, K] of normalised frames: [...]."""
    flat = window.reshape(*window.shape[:-2], -1)
    return make_discriminator(args).apply(discriminator, flat)[..., 0]


def style_reward(args: Args, learner: Learner, window: jax.Array) -> jax.Array:
    """How much windows [..., W, K] look like the reference's: [...], 0 to 1.

    Least squares: 1 where the discriminator's output is 1, as of the reference, 0 where it is -1 or
    less. BCE: -log(1 - D), where D is the probability that a window is the reference's, divided by
    what it is for D = 3/4, and never more than 1.
    Source: arXiv:2104.02180, equation 7; arXiv:1606.03476; the bound is ours.
    """
    output = judge_windows(args, learner.discriminator, normalize(learner.frame_stats, window))
    if args.disc_loss == "bce":
        return jnp.minimum(jax.nn.softplus(output) / math.log(4), 1.0)
    return jnp.maximum(1 - 0.25 * jnp.square(jnp.minimum(output, 1.0) - 1), 0.0)


def discriminator_loss(
    args: Args, discriminator: dict, real: jax.Array, fake: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss for normalised windows of the reference and of robots, both [b, W, K].

    Returns its metrics by tag with it. The penalty on the slope, where the reference is, keeps the
    discriminator smooth, so that its reward leads there from afar.
    Source: arXiv:2104.02180, equations 6 and 8, and its penalty on the last layer's weights.
    """
    real_output = judge_windows(args, discriminator, real)
    fake_output = judge_windows(args, discriminator, fake)
    if args.disc_loss == "bce":
        error = jax.nn.softplus(-real_output).mean() + jax.nn.softplus(fake_output).mean()
    else:
        error = jnp.square(real_output - 1).mean() + jnp.square(fake_output + 1).mean()

    # Of the sum, as each window's output depends on that window alone.
    slope = jax.grad(lambda window: judge_windows(args, discriminator, window).sum())(real)
    penalty = jnp.square(slope).sum(axis=(1, 2)).mean()
    head = discriminator["params"][f"Dense_{len(args.disc_hidden_sizes)}"]["kernel"]
    decay = jnp.square(head).sum()

    loss = 0.5 * error + 0.5 * args.grad_penalty * penalty + args.head_decay * decay
    metrics = {
        "losses/discriminator_loss": loss,
        "losses/gradient_penalty": penalty,
        "charts/accuracy_real": (real_output > 0).mean(),
        "charts/accuracy_fake": (fake_output < 0).mean(),
    }
    return loss, metrics


def add_to_replay(
    args: Args, iteration: jax.Array, key: jax.Array, replay: jax.Array, fresh: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Put some of a rollout's windows in the place of the oldest.

    replay: [R, W, K] and fresh: [B, W, K], this device's. Returns the next replay, and how many of
    its windows there are by now: the first ones.
    """
    added = args.replay_added // jax.lax.axis_size("devices")
    chosen = fresh[jax.random.randint(key, (added,), 0, len(fresh))]
    blocks = args.replay_size // args.replay_added
    place = iteration % blocks * added
    replay = jax.lax.dynamic_update_slice_in_dim(replay, chosen, place, axis=0)
    return replay, jnp.minimum(iteration + 1, blocks) * added


def update_discriminator(
    args: Args,
    reference: Reference,
    learner: Learner,
    key: jax.Array,
    replay: jax.Array,
    fresh: jax.Array,
) -> tuple[Learner, jax.Array, dict[str, jax.Array]]:
    """The discriminator's steps of one iteration, each device with its own windows.

    Half of the robots' windows are of this rollout, half of the replay, so that the discriminator
    does not forget what earlier policies did. replay: [R, W, K]; fresh: [B, W, K]. Returns the
    learner after them, the next replay, and metrics by tag: means over all steps.
    """
    replay_key, key = jax.random.split(key)
    replay, filled = add_to_replay(args, learner.iteration, replay_key, replay, fresh)

    half = args.disc_batch_size // 2 // jax.lax.axis_size("devices")
    optimizer = make_optimizer(args)
    vector, unravel = ravel_pytree(learner.discriminator)
    draw_moments = jax.vmap(partial(draw_moment, args, reference))
    loss = jax.grad(discriminator_loss, argnums=1, has_aux=True)

    def step(carry, key):
        vector, opt_state = carry
        real_key, fresh_key, old_key = jax.random.split(key, 3)
        moments = draw_moments(jax.random.split(real_key, 2 * half))
        real = jax.vmap(partial(window_at, args, reference))(moments)
        new = fresh[jax.random.randint(fresh_key, (half,), 0, len(fresh))]
        old = replay[jax.random.randint(old_key, (half,), 0, filled)]
        real = normalize(learner.frame_stats, real)
        fake = normalize(learner.frame_stats, jnp.concatenate([new, old]))

        gradient, metrics = mean_over_devices(loss(args, unravel(vector), real, fake))
        gradient, _ = ravel_pytree(gradient)
        direction, opt_state = optimizer.update(gradient, opt_state)
        carry = (vector - args.disc_learning_rate * direction, opt_state)
        return carry, (metrics, opt_state.notfinite_count)

    carry = (vector, learner.disc_opt_state)
    keys = jax.random.split(key, args.disc_updates)
    (vector, opt_state), (metrics, skipped) = jax.lax.scan(step, carry, keys)

    metrics = {tag: values.mean() for tag, values in metrics.items()}
    metrics |= {
        "charts/skipped_in_a_row": skipped.max(),
        "charts/skipped_updates": opt_state.total_notfinite,
    }
    learner = learner.replace(discriminator=unravel(vector), disc_opt_state=opt_state)
    return learner, replay, metrics


def update_frame_stats(
    args: Args, reference: Reference, stats: RunningStats, key: jax.Array, steps: Transition
) -> RunningStats:
    """The statistics of frames after a rollout: of its frames, and of as many of the reference.

    Of the reference alone they would make much of what hardly moves there.
    """
    frames = steps.end.env_state.info["window"][:, :, -1]  # [T, N, K]
    keys = jax.random.split(key, steps.valid.shape)
    moments = jax.vmap(jax.vmap(partial(draw_moment, args, reference)))(keys)

    both = jnp.concatenate([frames, reference.frame[moments]])
    valid = jnp.concatenate([steps.valid, jnp.ones_like(steps.valid)])
    return update_stats(stats, both, valid)


# ---- 14. One training iteration ------------------------------------------------------------------
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


WELL_TRACKED = 0.55  # share of the reward for the velocity; a G1 that stands still has 0.53
SELDOM_LOST = 0.5  # falls and other losses in the time of a whole episode


def next_level(
    args: Args, env: Env, level: jax.Array, reward: jax.Array, lost: jax.Array
) -> jax.Array:
    """The curriculum's level after an iteration.

    reward: mean of the term track_velocity; lost: robots lost in this iteration, over all devices.
    """
    if not args.curriculum:
        return level
    tracked = reward * env.robot.best / env.robot.weights["track_velocity"]
    seldom = lost * env.time_limit < SELDOM_LOST * args.steps_per_iteration
    # Without the task, commands are not followed, and the level rises with time.
    good = (seldom & (tracked > WELL_TRACKED)) | (args.task_share == 0)
    change = 1 / (args.curriculum * args.num_iterations)
    return jnp.clip(level + jnp.where(good, change, -change), 0.0, 1.0)


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


def device_iteration(
    args: Args, env: Env, reference: Reference, state: TrainState
) -> tuple[TrainState, dict, dict]:
    """Rollout, advantages and updates with one device's worlds.

    Returns the next state, metrics over all devices by tag, and this device's black box.
    """
    learner = state.learner
    worlds, steps = rollout(args, env, reference, learner, state.worlds)

    discounted = steps.end.discounted_return
    return_stats = update_stats(learner.return_stats, discounted, steps.valid)
    reward = jnp.clip(steps.reward / jnp.sqrt(return_stats.var + 1e-8), -10.0, 10.0)

    batch, explained_variance = make_batch(args, env, learner, steps, reward)
    # Only afterwards, since the policy that acted and the one that learns must see the same
    # normalised observations, and the discriminator that rewards the same frames.
    obs_stats = {
        name: update_stats(stats, steps.start.obs[name], steps.valid)
        for name, stats in learner.obs_stats.items()
    }
    key = jax.random.fold_in(learner.disc_key, learner.iteration)
    key = jax.random.fold_in(key, jax.lax.axis_index("devices"))
    stats_key, disc_key = jax.random.split(key)
    frame_stats = update_frame_stats(args, reference, learner.frame_stats, stats_key, steps)

    window = steps.end.env_state.info["window"]
    windows = window.reshape(-1, *window.shape[2:])  # [T, N, W, K] -> [B, W, K]
    learner, replay, disc_metrics = update_discriminator(
        args, reference, learner, disc_key, state.replay, windows
    )
    learner, metrics = update(args, env, learner, batch)
    in_a_row = "charts/skipped_in_a_row"
    disc_metrics[in_a_row] = jnp.maximum(disc_metrics[in_a_row], metrics.pop(in_a_row))
    disc_metrics["charts/skipped_updates"] += metrics.pop("charts/skipped_updates")
    metrics |= disc_metrics

    terms = {
        name.replace("_", "/", 1): masked_mean(term, steps.valid)  # reward_x -> reward/x
        for name, term in (steps.end.env_state.metrics | {"reward_style": steps.style}).items()
    }
    metrics |= mean_over_devices(terms)
    metrics |= {"losses/explained_variance": explained_variance, "charts/level": learner.level}
    metrics |= episode_metrics(worlds, steps)

    learner = learner.replace(
        averaged=average_policy(args, learner),
        obs_stats=obs_stats,
        return_stats=return_stats,
        frame_stats=frame_stats,
        level=next_level(
            args,
            env,
            learner.level,
            metrics["reward/track_velocity"],
            metrics["charts/falls"],
        ),
    )
    box = black_box(steps.start, steps.action, steps.end.env_state.info["broken"])
    return TrainState(learner=learner, worlds=worlds, replay=replay), metrics, box


@partial(jax.jit, static_argnames=("args", "env", "mesh"), donate_argnames="state")
def train_iteration(
    args: Args, env: Env, mesh: Mesh, reference: Reference, state: TrainState
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One iteration as one program over the mesh's devices, which all have the whole reference.

    `state` is donated: its memory is used again. Returns the next state and metrics by tag, with
    the devices' black boxes.
    """
    run = jax.shard_map(
        partial(device_iteration, args, env),
        mesh=mesh,
        in_specs=(P(), STATE_SPEC),
        out_specs=(STATE_SPEC, P(), P("devices")),
        check_vma=False,
    )
    state, metrics, box = run(reference, state)
    return state, metrics | {"black_box": box}


# ---- You may stop reading here: what follows is evaluation, files and the command line -----------


# ---- 15. Motion files ----------------------------------------------------------------------------
# The joints of the G1's CSV files. Names of a robot's joints may have "_joint" at their end.
LEG = ("hip_pitch", "hip_roll", "hip_yaw", "knee", "ankle_pitch", "ankle_roll")
ARM = (
    *("shoulder_pitch", "shoulder_roll", "shoulder_yaw", "elbow"),
    *("wrist_roll", "wrist_pitch", "wrist_yaw"),
)
CSV_JOINTS = (
    *(f"{side}_{name}" for side in ("left", "right") for name in LEG),
    *("waist_yaw", "waist_roll", "waist_pitch"),
    *(f"{side}_{name}" for side in ("left", "right") for name in ARM),
)
CSV_DT = 1 / 30  # s
# The joints of motion_imitation's files. They are those of Laikago's model, whose zero is another
# one than that of later robots, as are the signs of the right hips and the axes of the base.
JSON_JOINTS = tuple(
    f"{leg}_{name}" for leg in ("FR", "FL", "RR", "RL") for name in ("hip", "thigh", "calf")
)
JSON_SIGNS = np.array([-1, 1, 1, 1, 1, 1] * 2)
JSON_ZEROS = np.array([0.0, -0.6, 0.66] * 4)  # rad
JSON_BASE = np.array([0.5, -0.5, -0.5, -0.5])  # w x y z, from our axes of the base to Laikago's
JSON_LEG = 0.5  # m, of Laikago's thigh and calf


def own_joints(robot: Robot, names: tuple[str, ...], angles: np.ndarray) -> np.ndarray:
    """The robot's own of the joints that a file has: [T, J]. angles: [T, len(names)] rad."""
    wanted = [name.removesuffix("_joint") for name in robot.joints]
    missing = sorted(set(wanted) - set(names))
    if missing:
        raise ValueError(f"this format has no {missing[0]}, which {robot.mjcf} has")
    return angles[:, [names.index(name) for name in wanted]]


def to_table(rows, columns: int) -> np.ndarray:
    """Numbers [T, columns]."""
    table = np.array(rows, np.float64)
    if table.ndim != 2 or table.shape[1] != columns:
        raise ValueError(f"an array of shape {table.shape} in place of [frames, {columns}]")
    return table


def read_csv(robot: Robot, file: Path) -> Clip:
    """Unitree's format of LAFAN1: 30 frames a second; position, quaternion x y z w, 29 joints."""
    rows = [line.split(",") for line in file.read_text().splitlines() if line.strip()]
    table = to_table(rows, 7 + len(CSV_JOINTS))
    base = table[:, [0, 1, 2, 6, 3, 4, 5]]
    angles = own_joints(robot, CSV_JOINTS, table[:, 7:])
    return Clip(qpos=np.concatenate([base, angles], axis=1), dt=CSV_DT)


def read_npz(robot: Robot, file: Path) -> Clip:
    """MuJoCo's own: qpos [T, 7 + J] and dt, or times [T] in its place.

    If it was recorded from a policy, with targets [T, J] and command [T, 3] as well.
    """
    with np.load(file, allow_pickle=False) as arrays:
        qpos = to_table(arrays["qpos"], 7 + len(robot.joints))
        widths = {"targets": len(robot.joints), "command": 3}
        told = {name: to_table(arrays[name], widths[name]) for name in widths if name in arrays}
        for name, rows in told.items():
            if len(rows) != len(qpos):
                raise ValueError(f"{len(rows)} rows of {name} for {len(qpos)} frames")
        if "dt" in arrays:
            return Clip(qpos=qpos, dt=float(arrays["dt"]), **told)
        if "times" not in arrays:
            raise ValueError("it needs dt or times")
        steps = np.diff(arrays["times"])
    if len(steps) != len(qpos) - 1:
        raise ValueError(f"{len(steps) + 1} times for {len(qpos)} frames")
    if not np.allclose(steps, steps.mean(), rtol=0.01):
        raise ValueError("its times are not evenly spaced")
    return Clip(qpos=qpos, dt=float(steps.mean()), **told)


def read_json(robot: Robot, file: Path) -> Clip:
    """motion_imitation's: FrameDuration in s; Frames of position, quaternion x y z w, 12 joints.

    As robots differ in size, the way is scaled to the length of the legs, and the height is such
    that the lowest foot of the clip is on the floor.
    """
    content = json.loads(file.read_text())
    table = to_table(content["Frames"], 7 + len(JSON_JOINTS))
    laikagos = JSON_SIGNS * (table[:, 7:] - JSON_ZEROS)
    qpos = np.concatenate([table[:, :7], own_joints(robot, JSON_JOINTS, laikagos)], axis=1)

    foot = robot.model.body(robot.feet[0])
    calf = robot.model.body(int(foot.parentid[0]))
    leg = np.linalg.norm(foot.pos) + np.linalg.norm(calf.pos)
    qpos[:, :3] *= leg / JSON_LEG
    for pose, quat in zip(qpos, table[:, [6, 3, 4, 5]], strict=True):
        mujoco.mju_mulQuat(pose[3:7], quat, JSON_BASE)
    _, soles = trace_feet(robot, qpos)
    qpos[:, 2] -= soles.min()
    return Clip(qpos=qpos, dt=float(content["FrameDuration"]))


READERS = {".csv": read_csv, ".npz": read_npz, ".json": read_json, ".txt": read_json}


def read_motion(robot: Robot, file: Path) -> Clip:
    """The clip in a file, checked; what is wrong with it ends the program with one line."""
    kinds = ", ".join(READERS)
    require(file.suffix in READERS, f"--motion {file}: must be a file named *{kinds}")
    require(file.is_file(), f"--motion {file}: no such file")
    with or_fail(f"--motion {file}: no motion of {robot.mjcf}"):
        clip = READERS[file.suffix](robot, file)
        arrays = [array for array in (clip.qpos, clip.targets, clip.command) if array is not None]
        if not all(np.isfinite(array).all() for array in arrays):
            raise ValueError("numbers that are not finite")
        if not 1e-4 <= clip.dt <= 1:
            raise ValueError(f"{clip.dt} s between frames")
        norms = np.linalg.norm(clip.qpos[:, 3:7], axis=1)
        if np.abs(norms - 1).max(initial=0) > 0.05:
            raise ValueError("quaternions that are none: their norms are not 1")
        if (len(clip.qpos) - 1) * clip.dt < 5 * CONTROL_DT:
            raise ValueError(f"{len(clip.qpos)} frames are too short")
    clip.qpos[:, 3:7] /= norms[:, None]
    return clip


def check_clip(robot: Robot, qpos: np.ndarray) -> dict[str, float]:
    """What may be wrong with poses [T, 7 + J] at the control rate.

    slip: m/s, mean horizontal speed of the feet within 1 cm of the floor; penetration: m, of the
    deepest sole into it, or with the other sign, how far above it even that one stays; beyond: rad,
    of the worst joint beyond its limits; fallen: share of the poses from which an episode would end
    at once.
    """
    feet, soles = trace_feet(robot, qpos)
    quat = qpos[:, None, 3:7] * np.array([1, -1, -1, -1])
    places = qpos[:, None, :3] + to_base_frame(quat, feet, np)  # in the world, by the inverse turn
    speed = np.linalg.norm(np.diff(places[..., :2], axis=0), axis=-1) / CONTROL_DT
    loaded = np.minimum(soles[:-1], soles[1:]).min(axis=-1) < 0.01
    low, high = robot.limits.T
    beyond = np.maximum(low - qpos[:, 7:], qpos[:, 7:] - high).max()
    return {
        "slip": float((speed * loaded).sum() / max(1, loaded.sum())),
        "penetration": float(-soles.min()),
        "beyond": float(max(0.0, beyond)),
        "fallen": float(has_fallen(robot, qpos, np).mean()),
    }


def describe_clip(robot: Robot, qpos: np.ndarray) -> str:
    """A line about poses at the control rate, with what `check_clip` finds."""
    found = check_clip(robot, qpos)
    depth = 1000 * found["penetration"]
    where = (
        f"{max(depth, 0):.0f} mm into the floor"
        if depth > -5
        else f"never nearer than {-depth:.0f} mm to the floor"
    )
    return (
        f"{len(qpos) * CONTROL_DT:.1f} s, feet slip {found['slip']:.2f} m/s, {where}, "
        f"joints {found['beyond']:.2f} rad beyond their limits, {found['fallen']:.0%} fallen"
    )


def motion_files(args: Args) -> list[Path]:
    """The files of the reference."""
    if args.motion:
        return [Path(name) for name in args.motion]
    file = MODELS / "motions" / f"{args.robot}.npz"
    advice = "name files with --motion, or record one: python tools/record_motion.py RUN_DIR"
    require(file.is_file(), f"--motion: {file}, the default for {args.robot}, is missing; {advice}")
    return [file]


def load_reference(args: Args) -> Reference:
    """The reference from its files. Says in a line what each of them is."""
    robot = ROBOTS[args.robot]
    ranges = np.array([args.command_x, args.command_y, args.command_yaw])
    clips = []
    for file in motion_files(args):
        clip = resample(robot, read_motion(robot, file))
        say(f"{file}: {describe_clip(robot, clip.qpos)}")
        if clip.command is not None:
            outside = (clip.command < ranges[:, 0] - 1e-6) | (clip.command > ranges[:, 1] + 1e-6)
            if share := outside.any(axis=1).mean():
                names = "--command-x, --command-y, --command-yaw"
                say(f"{file}: {share:.0%} of its commands are beyond {names}, and stay as they are")
        clips.append(clip)
    return make_reference(args, clips, args.motion_weights or [len(clip.qpos) for clip in clips])


# ---- 16. Evaluation ------------------------------------------------------------------------------
def mirror_rules(args: Args, robot: Robot) -> dict[str, np.ndarray]:
    """How `act` sees a robot's observation [O] in the mirror, as `Env` shows it to the networks.

    mirror_when: [O], whose product with the observation is positive where `in_mirror` is true;
    mirror_obs: [O, O] and mirror_action: [A, A], by which observation and action are multiplied
    there.
    """
    parts = seen_parts(robot, "actor")
    where = part_slices(robot, parts)
    size = max(columns.stop for columns in where.values())
    mirror_when = np.zeros(size, np.float32)
    if args.mirror:
        scale = np.array(parts["command"].scale)
        mirror_when[where["command"]] = np.array([0.0, -1e-3, -1.0]) / scale
    return {
        "mirror_when": mirror_when,
        "mirror_obs": mirror_observation(robot, np.eye(size, dtype=np.float32), np),
        "mirror_action": mirror_actions(robot, np.eye(len(robot.acted), dtype=np.float32)),
    }


def export_policy(env: Env, learner: Learner) -> dict[str, np.ndarray]:
    """All that the deterministic policy needs: mirror, normaliser, layers w0, b0, w1, ..."""
    policy = mirror_rules(env.args, env.robot) | {
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

    def observe(self, command) -> np.ndarray:
        """What the actor sees: [O]. command: [3]."""
        data = self.data
        command = np.array(command)
        senses = sense(self.robot, data.qpos, data.qvel, command, self.action, np)
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
        if in_mirror(env.args, self.info["command"]):
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
            "key": next_key,
        }


# ---- 17. Log and files ---------------------------------------------------------------------------
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


# ---- 18. Command line ----------------------------------------------------------------------------
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

    widths = args.disc_hidden_sizes
    good = widths and min(widths) > 0 and max(widths) <= 4096
    require(good, f"--disc-hidden-sizes {widths}: must be widths up to 4096, like 256 128")
    weights = args.motion_weights
    good = all(0 < weight < math.inf for weight in weights)
    require(good, f"--motion-weights {weights}: must be more than 0")
    message = f"--motion-weights {weights}: must be one for each file of --motion"
    require(not weights or len(weights) == len(args.motion), message)
    message = f"--disc-batch-size {args.disc_batch_size}: must be even; half is of the replay"
    require(args.disc_batch_size % 2 == 0, message)
    message = f"--replay-added {args.replay_added}: must divide --replay-size {args.replay_size}"
    require(args.replay_size % args.replay_added == 0, message)

    steps = args.steps_per_iteration
    message = f"--total-timesteps {args.total_timesteps}: less than a rollout of {steps}"
    require(args.num_iterations, message)
    message = f"--num-minibatches {args.num_minibatches}: must divide {steps}"
    require(steps % args.num_minibatches == 0, message)


# ---- 19. Main ------------------------------------------------------------------------------------
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
    reference: Reference
    state: TrainState  # before the first iteration
    iterate: Any  # reference, state -> state, metrics
    facts: dict  # of the compilation and the memory, for run.json


def build(args: Args, mesh: Mesh, reference: Reference, is_new: bool) -> Programs:
    """Compile all programs of a run, and run the first: the state before training.

    is_new: whether that state is where training begins. If a checkpoint takes its place, or another
    run's policy, there is nothing to clone.
    """
    slowly = "" if onekernel else "; without the folder onekernel beside it, XLA's slow physics"
    say(f"building {args.robot} for {mesh.size} x {mesh.devices[0].device_kind}{slowly}")
    env = Env(args)
    key = jax.random.key(args.seed)

    shardings = jax.tree.map(partial(NamedSharding, mesh), STATE_SPEC)
    init = jax.jit(init_train_state, static_argnames=("args", "env"), out_shardings=shardings)
    reference = jax.device_put(reference, NamedSharding(mesh, P()))
    init_args = args if is_new else dataclasses.replace(args, clone_updates=0)
    init = init.lower(init_args, env, reference, key)

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
        iterate = train_iteration.lower(args, env, mesh, reference, shapes).compile()
        state = init.result()(reference, key)

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
    return Programs(env=env, reference=reference, state=state, iterate=iterate, facts=facts)


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


def reference_digest(reference: Reference) -> str:
    """A digest of the whole reference, and of how often each clip is drawn."""
    digest = hashlib.sha256()
    for array in vars(reference).values():
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def tell_reference_changes(run_dir: Path, reference: Reference) -> None:
    """Say in a line if the reference is not the one that the run has had."""
    then = json.loads((run_dir / "run.json").read_text()).get("reference")
    if then and then != reference_digest(reference):
        say("the reference has changed since the run began: the files of --motion")


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
        state, metrics = programs.iterate(programs.reference, state)
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
    reference = load_reference(args)
    stops = listen()
    resuming = run_dir is not None
    if args.capture_video:  # better to fail now than after training
        make_renderer(ROBOTS[args.robot].model).close()
    mesh = make_mesh(
        args.num_devices,
        args.num_envs,
        args.steps_per_iteration // args.num_minibatches,
        args.disc_batch_size // 2,
        args.replay_added,
    )
    args = dataclasses.replace(args, num_devices=mesh.size, **call_flags(Args))
    run_dir = open_run_dir(args, run_dir)

    is_new = not args.init_from and not (resuming and checkpoints(run_dir))
    programs = build(args, mesh, reference, is_new)
    model = programs.env.robot.model
    if resuming:
        tell_changes(run_dir, model)
        tell_reference_changes(run_dir, reference)
    programs.state = first_state(args, run_dir, resuming, programs.state)
    first = int(programs.state.learner.iteration)

    run = (
        programs.facts
        | describe_run(args, mesh, model)
        | {"reference": reference_digest(reference)}
    )
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
            replay_size=4096,
            replay_added=1024,
            clone_updates=50,
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
