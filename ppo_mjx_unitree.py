# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "flax==0.12.6", "imageio[ffmpeg]==2.38.1", "jax==0.9.2", "llvmlite==0.50.0", "mujoco==3.17.0", "mujoco-mjx==3.17.0",
#   "optax==0.2.8", "tensorboard==2.21.0", "tensorboardX==2.6.5", "tqdm==4.70.1", "typeguard==4.6.0", "tyro==1.0.17"]
# ///
"""PPO for Unitree's legged robots, on MuJoCo XLA (MJX): one file, one jitted program per iteration.

    python ppo_mjx_unitree.py                        the G1 learns to walk; watch it with: tensorboard --logdir runs
    python ppo_mjx_unitree.py --resume runs/NAME     go on, bit for bit, where a run stopped
    python ppo_mjx_unitree.py --evaluate runs/NAME   put its policy to the test in C MuJoCo, as Unitree's loop runs it
    python ppo_mjx_unitree.py --smoke                check the set-up of this machine
The map: 1 settings, 2 robots, 3 model, 4 rewards, 5 environment, 6 statistics, 7 networks, 8 training state, 9 rollout,
10 advantages, 11 loss and update, 12 the iteration; then 13 evaluation, 14 log and files, 15 command line, 16 main.
Shapes: T = num_steps, N = worlds on this device, B = T * N, O = observation, A = action = joints, F = feet. A record's
fields are [T, N, ...] in a rollout, [B, ...] in a batch, [B / num_minibatches, ...] in a minibatch.
Robots, observation, gains and rewards follow unitreerobotics/unitree_rl_gym (276801e); names are CleanRL's.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Literal

START = time.perf_counter()
os.environ.setdefault("JAX_LOGGING_LEVEL", "CRITICAL")  # else XLA prints pages of CPU features on a cache hit

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
from tqdm import tqdm

with contextlib.redirect_stdout(io.StringIO()):  # it tells everyone that the optional Warp backend is missing
    from mujoco import mjx

if hide_torch := "torch" not in sys.modules:
    sys.modules["torch"] = None  # else tensorboardX imports it where it is installed, which takes seconds
from tensorboardX import SummaryWriter
from tensorboardX.event_file_writer import EventFileWriter
from tensorboardX.proto.summary_pb2 import Summary

if hide_torch:
    del sys.modules["torch"]

try:
    import onekernel.mjx
except ImportError:  # in a copy of this file alone; its physics go by XLA, slowly
    onekernel = None

# ---- 1. Settings ----------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Args:
    """PPO for Unitree's legged robots, on MuJoCo XLA."""
    # The run
    exp_name: str = "ppo_mjx_unitree"  # name of the experiment, part of the run folder's name
    seed: int = 1  # every random number follows from it and the number of devices
    num_devices: int | None = None  # that share the worlds; by default as many GPUs or CPU cores as divide the work
    runs_dir: str = "runs"  # where the run folders are made
    track: bool = False  # log to Weights & Biases too; its project is WANDB_PROJECT
    capture_video: bool = False  # write an mp4 of the trained policy in C MuJoCo, after training or with --evaluate
    export_onnx: bool = False  # write policy.onnx beside policy.npz, after training or with --evaluate
    checkpoint_every: int = 50  # iterations between checkpoints; the last three are kept
    compile_cache: bool = True  # keep compiled programs in the user's cache folder, for a quicker start next time
    resume: str | None = None  # run folder to go on with, by the settings that it was started with
    evaluate: str | None = None  # run folder whose policy to put to the test; nothing is trained
    coordinator_address: str | None = None  # host:port of process 0, if several train together; auto: ask the cluster
    num_processes: int | None = None  # that train together, each with its own devices
    process_id: int | None = None  # of this one, from 0
    smoke: bool = False  # build, train, save, resume and evaluate in short, and tell what works
    # The environment
    robot: Literal["g1"] = "g1"  # a row of ROBOTS
    decimation: int = 4  # physics steps in one control step of 0.02 s
    command_x: tuple[float, float] = (-0.6, 1.0)  # range of the commanded velocity forwards, m/s
    command_y: tuple[float, float] = (-0.4, 0.4)  # to the left, m/s
    command_yaw: tuple[float, float] = (-0.8, 0.8)  # counterclockwise, rad/s
    command_every: float = 5.0  # mean seconds between commands; each control step has the same chance of a new one
    standing: float = 0.15  # share of the commands that say: stand still
    obs_noise: float = 1.0  # factor of the noise on the actor's observation
    push_speed: float = 0.5  # largest sudden change of the base's horizontal velocity, m/s along each axis
    push_every: float = 4.0  # mean seconds between pushes; each control step has the same chance of one
    friction: tuple[float, float] = (0.4, 1.25)  # range of the feet's sliding friction
    added_mass: tuple[float, float] = (-1.0, 3.0)  # range of what is added to the base, kg
    shifted_center: float = 0.03  # largest shift of the base's centre of mass along each axis, m
    gain_noise: float = 0.1  # largest relative error of each joint's stiffness and damping
    strength_noise: float = 0.1  # largest relative error of the torque, the same for all motors, as by a low battery
    action_delay: float = 1.0  # largest delay of an action, control steps
    # The algorithm, by CleanRL's names
    total_timesteps: int = 15_000_000  # environment steps, over all worlds
    learning_rate: float = 1e-3  # Adam's step size at the start
    num_envs: int = 256  # worlds, over all devices
    num_steps: int = 16  # steps of each world in one rollout
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimate
    num_minibatches: int = 16  # minibatches of one epoch
    update_epochs: int = 5  # passes over a rollout
    clip_coef: float = 0.2  # clipping range of the probability ratio
    ent_coef: float = 0.006  # weight of the entropy bonus at the start
    final_ent_coef: float = 0.0  # and at the end; linear between
    vf_coef: float = 1.0  # weight of the value loss
    mirror_coef: float = 1.0  # weight of the mirror-symmetry loss; 0 for none
    imitation_coef: float = 0.5  # weight of the loss that draws the actor to a simple stepping motion, at the start
    imitation_steps: int = 600_000  # environment steps over which it falls to 0
    standing_after: int = 6_000_000  # environment steps after which it is whole again, where the command is to stand
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    desired_kl: float | None = 0.02  # adapt the step size to this KL divergence; None: anneal it linearly to 0
    hidden_sizes: tuple[int, ...] = (256, 128)  # widths of the ELU layers, of the actor and of the critic
    init_log_std: float = -1.0  # log of the policy's standard deviation at the start

    @property
    def steps_per_iteration(self) -> int:
        return self.num_envs * self.num_steps
    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.steps_per_iteration

# ---- 2. Robots ------------------------------------------------------------------------------------------------------
CONTROL_DT, COMMAND_SCALE = 0.02, np.array([2.0, 2.0, 0.25])  # s, of a control step; of the command, in observations
@dataclasses.dataclass(frozen=True)
class Link:
    """One body of a left leg, and the hinge that moves it in its parent. Quaternions are w x y z."""
    name: str
    axis: str  # of the hinge
    limits: tuple[float, float]  # rad
    max_torque: float  # Nm
    stiffness: float  # kp of the motor's controller, Nm/rad
    damping: float  # kd, Nm s/rad
    default: float  # angle of the hinge in the default pose, rad
    lift: float  # what a simple stepping motion adds to it in the middle of a swing
    sweep: tuple[float, float, float]  # what m/s, m/s and rad/s of the command add to it at landing, by the same
    pos: tuple[float, float, float]  # m, in the parent's frame
    quat: tuple[float, float, float, float]
    mass: float  # kg
    center: tuple[float, float, float]  # of mass, m
    principal: tuple[float, float, float, float]  # orientation of the principal axes
    moments: tuple[float, float, float]  # of inertia about them, kg m^2
    shape: str  # that is drawn
    upright: bool = False  # the hinge had better stay at 0

@dataclasses.dataclass(frozen=True)
class Robot:
    """All that is one robot's, and its task: SI units and radians."""
    mass: float  # of the base, and its centre, axes and moments as in Link
    center: tuple[float, float, float]
    principal: tuple[float, float, float, float]
    moments: tuple[float, float, float]
    shapes: str  # of the base, drawn
    leg: tuple[Link, ...]  # the left one, from the hip down; the right one mirrors it, but for
    right: dict[str, dict]  # these
    soles: tuple[tuple[float, float, float], ...]  # centres of the spheres under a foot
    sole_radius: float
    start_height: float  # of the base, at resets
    stand_height: float  # of the base in the default pose, soles on the floor
    target_height: float  # that the reward asks for
    min_height: float  # below it, or tilted by more than max_tilt, the robot has fallen
    max_tilt: float
    gait_period: float  # s
    gait_offsets: tuple[float, ...]  # phase of each leg, as a share of the period
    stance_share: float  # of the period, that a foot spends on the floor
    swing_height: float  # of the foot's origin
    weights: dict[str, float]  # of the reward's terms, per second: see section 4
    action_scale: float = 0.25  # rad, from an action to the target of its joint
    passive: tuple[float, float, float] = (0.01, 0.001, 0.1)  # joints' armature, damping, dry friction

    @property
    def gait_ticks(self) -> int:
        """Control steps in a period of the gait: the clock counts them, as shares of it in float32 would be rounded."""
        return round(self.gait_period / CONTROL_DT)
    @property
    def joints(self) -> dict[str, Link]:
        """The joints in the order of actions."""
        right = {link.name: mirrored(link, self.right.get(link.name, {})) for link in self.leg}
        return {f"left_{link.name}": link for link in self.leg} | {f"right_{name}": right[name] for name in right}

ROBOTS = {
    "g1": Robot(
        mass=17.7349, center=(0.0144905, 0.000151462, 0.144068), moments=(0.552723, 0.454092, 0.211762),
        principal=(0.999881, -0.000505543, -0.0154276, 0.000328408), shapes="""
    <geom class="light" type="box" pos=".004 0 .18" size=".065 .1 .15"/>
    <geom class="dark" type="ellipsoid" pos=".005 0 .43" size=".07 .07 .1"/>
    <geom class="dark" fromto="0 -.03 -.06 0 .03 -.06" size=".06"/>
    <geom class="dark" fromto="0 .141 .285 .004 .147 .13" size=".038"/>
    <geom class="dark" fromto="0 -.141 .285 .004 -.147 .13" size=".038"/>
    <geom class="light" fromto=".016 .147 .105 .26 .149 .1" size=".034"/>
    <geom class="light" fromto=".016 -.147 .105 .26 -.149 .1" size=".034"/>""",
        leg=(
            Link("hip_pitch", "0 1 0", (-2.5307, 2.8798), 88, 100, 2, -0.1, -0.4, (-0.32, 0, 0), (0, 0.064452, -0.1027),
                 (1, 0, 0, 0), 1.35, (0.002741, 0.047791, -0.02606), (0.954862, 0.293964, 0.0302556, 0.030122),
                 (0.00181517, 0.00153422, 0.00116212), 'class="dark" fromto="0 .03 -.015 0 .06 -.03" size=".045"'),
            Link("hip_roll", "1 0 0", (-0.5236, 2.9671), 139, 100, 2, 0, 0, (0, 0.32, 0), (0, 0.052, -0.030465),
                 (0.996179, 0, -0.0873386, 0), 1.52, (0.029812, -0.001045, -0.087934),
                 (0.977808, -1.97119e-05, 0.205576, -0.0403793), (0.00254986, 0.00241169, 0.00148755),
                 'class="light" fromto=".022 0 -.01 .027 0 -.08" size=".048"', upright=True),
            Link("hip_yaw", "0 0 1", (-2.7576, 2.7576), 88, 100, 2, 0, 0, (0, 0, 0.22), (0.025001, 0, -0.12412),
                 (1, 0, 0, 0), 1.702, (-0.057709, -0.010981, -0.15078), (0.600598, 0.15832, 0.223482, 0.751181),
                 (0.00776166, 0.00717575, 0.00160139), 'class="light" fromto="-.01 0 -.02 -.07 0 -.165" size=".048"',
                 upright=True),
            Link("knee", "0 1 0", (-0.087267, 2.8798), 139, 150, 4, 0.3, 0.8, (0, 0, 0),
                 (-0.078273, 0.0021489, -0.17734), (0.996179, 0, 0.0873386, 0), 1.932, (0.005457, 0.003964, -0.12074),
                 (0.923418, -0.0327699, 0.0158246, 0.382067), (0.0113804, 0.0112778, 0.00146458),
                 'class="light" fromto=".005 0 -.02 .005 0 -.26" size=".04"'),
            Link("ankle_pitch", "0 1 0", (-0.87267, 0.5236), 50, 40, 2, -0.2, -0.4, (0.32, 0, 0),
                 (0, -9.4445e-05, -0.30001), (1, 0, 0, 0), 0.074, (-0.007269, 0, 0.011137),
                 (0.603053, 0.369225, 0.369225, 0.603053), (1.89e-05, 1.40805e-05, 6.9195e-06),
                 'class="dark" fromto="-.005 0 .005 -.005 0 -.012" size=".02"'),
            Link("ankle_roll", "1 0 0", (-0.2618, 0.2618), 50, 40, 2, 0, 0, (0, -0.32, 0), (0, 0, -0.017558),
                 (1, 0, 0, 0), 0.608, (0.026505, 0, -0.016425), (-0.000481092, 0.728482, -0.000618967, 0.685065),
                 (0.00167218, 0.0016161, 0.000217621), 'class="dark" type="box" pos=".04 0 -.02" size=".1 .034 .015"')),
        right={"knee": {"principal": (0.923439, 0.0345276, 0.0116333, -0.382012),
                        "moments": (0.011374, 0.0112843, 0.00146452)}},
        soles=((-0.05, 0.025, -0.03), (-0.05, -0.025, -0.03), (0.12, 0.03, -0.03), (0.12, -0.03, -0.03)),
        sole_radius=0.005, start_height=0.8, stand_height=0.7842, target_height=0.78, min_height=0.5, max_tilt=0.8,
        gait_period=0.8, gait_offsets=(0.0, 0.5), stance_share=0.55, swing_height=0.08, weights={
            "track_velocity": 2.0, "track_yaw": 1.0, "alive": 0.15, "gait": 1.0, "swing_height": -20.0,
            "stance_slip": -0.2, "vertical_velocity": -2.0, "roll_pitch_rate": -0.05, "tilt": -1.0, "height": -10.0,
            "joint_acceleration": -2.5e-7, "joint_velocity": -1e-3, "torque": -1e-5, "action_change": -0.01,
            "joint_limits": -5.0, "upright_joints": -1.0}),
}

# ---- 3. Model -------------------------------------------------------------------------------------------------------
MJCF = """<mujoco model="unitree">
  <compiler angle="radian"/><option timestep="{dt}"/><visual><headlight ambient=".4 .4 .4" diffuse=".6 .6 .6"/></visual>
  <default><geom contype="0" conaffinity="0" type="capsule"/>
    <joint armature="{passive[0]}" damping="{passive[1]}" frictionloss="{passive[2]}"/>
    <default class="light"><geom rgba=".9 .9 .9 1"/></default><default class="dark"><geom rgba=".2 .2 .2 1"/></default>
    <default class="sole"><geom type="sphere" size="{robot.sole_radius}" conaffinity="1" priority="1"/></default>
  </default>
  <asset><texture type="skybox" builtin="gradient" rgb1=".9 .95 1" rgb2=".6 .7 .85" width="64" height="64"/>
    <texture name="grid" type="2d" builtin="checker" rgb1=".55 .6 .65" rgb2=".45 .5 .55" width="64" height="64"/>
    <material name="grid" texture="grid" texuniform="true"/></asset>
  <worldbody><geom name="floor" type="plane" size="0 0 .05" material="grid" contype="1"/>
    <body name="base" pos="0 0 {robot.stand_height}"><freejoint name="base"/>
      <camera name="track" mode="trackcom" pos="1.6 -2.2 .5" xyaxes=".8 .6 0 -.12 .16 1"/>
      <light mode="trackcom" pos="-1.5 -1.5 5" dir=".3 .3 -1" cutoff="60"/>
      {inertial}{body}
    </body></worldbody><actuator>{motors}</actuator>
</mujoco>"""

def numbers(values) -> str:
    return " ".join(map(repr, values))

def inertial(part: Robot | Link) -> str:
    return f'<inertial pos="{numbers(part.center)}" quat="{numbers(part.principal)}" mass="{part.mass}" ' + (
        f'diaginertia="{numbers(part.moments)}"/>')

def mirrored(link: Link, changes: dict) -> Link:
    """The same link of the right leg, reflected at y = 0. Joints about y keep their sign, others change it."""
    def flip(v):  # a vector, or a quaternion
        return (v[0], -v[1], v[2]) if len(v) == 3 else (v[0], -v[1], v[2], -v[3])
    limits = link.limits if link.axis == "0 1 0" else (-link.limits[1], -link.limits[0])
    reflected = {name: flip(getattr(link, name)) for name in ("pos", "quat", "center", "principal")}
    return dataclasses.replace(link, limits=limits, **reflected | changes)

def load_model(robot: Robot, dt: float, drawn: bool = True) -> mujoco.MjModel:
    """The robot on a plane that its soles alone can touch. drawn: with the shapes that only a picture needs."""
    body, links = robot.shapes if drawn else "", robot.joints
    for side in "left", "right":
        chain = "".join(f'<geom class="sole" name="{side}_sole{i}" pos="{numbers(sole)}"/>'
                        for i, sole in enumerate(robot.soles))
        for name, link in reversed(links.items()):
            if name.startswith(side):
                chain = (f'<body name="{name}" pos="{numbers(link.pos)}" quat="{numbers(link.quat)}">{inertial(link)}'
                         f'<joint name="{name}" axis="{link.axis}" range="{numbers(link.limits)}"/>'
                         + f"<geom {link.shape}/>" * drawn + f"{chain}</body>")
        body += chain
    motors = "".join(f'<motor joint="{name}" ctrlrange="-{link.max_torque} {link.max_torque}"/>'
                     for name, link in links.items())
    return mujoco.MjModel.from_xml_string(MJCF.format(
        robot=robot, passive=robot.passive, dt=dt, inertial=inertial(robot), body=body, motors=motors))

def find_feet(model: mujoco.MjModel) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the feet's bodies [F] and of the spheres under them [F, S]."""
    soles = np.array([i for i in range(model.ngeom) if "sole" in model.geom(i).name]).reshape(2, -1)
    return model.geom_bodyid[soles[:, 0]], soles

NUM_PAYLOADS, PAYLOAD_FIELDS = 64, ("body_mass", "body_ipos", "body_subtreemass", "body_invweight0", "dof_invweight0")

def draw_payloads(args: Args, model: mujoco.MjModel) -> dict[str, np.ndarray]:
    """Fields of models whose base bears another mass, elsewhere: [NUM_PAYLOADS, ...] each. MuJoCo computes what derives
    from them, which is why they are drawn before training, not at each reset. `model` is changed."""
    random, rows, data = np.random.default_rng(args.seed), [], mujoco.MjData(model)
    mass, center = model.body_mass[1], model.body_ipos[1].copy()
    for _ in range(NUM_PAYLOADS):
        model.body_mass[1] = mass + random.uniform(*args.added_mass)
        model.body_ipos[1] = center + random.uniform(-args.shifted_center, args.shifted_center, 3)
        mujoco.mj_setConst(model, data)
        rows.append([getattr(model, name).copy() for name in PAYLOAD_FIELDS])
    return {name: np.array(values) for name, values in zip(PAYLOAD_FIELDS, zip(*rows, strict=True), strict=True)}

# ---- 4. Rewards -----------------------------------------------------------------------------------------------------
@struct.dataclass
class Motion:
    """What the rewards look at after a control step. Feet are read before the last physics step's integration, where
    MJX has their positions, velocities and contacts of one and the same moment; the rest is read after it."""
    command: jax.Array  # [3] m/s, m/s, rad/s
    height: jax.Array  # of the base
    velocity: jax.Array  # [3] m/s, of the base, in its frame
    rates: jax.Array  # [3] rad/s, of the base, in its frame
    gravity: jax.Array  # [3] direction, in the base's frame
    angles: jax.Array  # [A] rad
    speeds: jax.Array  # [A] rad/s
    accelerations: jax.Array  # [A] rad/s^2, mean over the control step
    torque: jax.Array  # [A] Nm, of the last physics step
    action: jax.Array  # [A]
    action_before: jax.Array  # [A]
    foot_height: jax.Array  # [F] m, of the foot's origin
    foot_velocity: jax.Array  # [F, 3] m/s
    contact: jax.Array  # [F] bool
    stance: jax.Array  # [F] bool: the clock wants the foot on the floor

TERMS = {
    "track_velocity": lambda robot, m: jnp.exp(-jnp.square(m.command[:2] - m.velocity[:2]).sum() / 0.25),
    "track_yaw": lambda robot, m: jnp.exp(-jnp.square(m.command[2] - m.rates[2]) / 0.25),
    "alive": lambda robot, m: 1.0,
    "gait": lambda robot, m: (2.0 * (m.contact == m.stance) - 1).sum(),  # feet as the clock wants them, less the others
    "swing_height": lambda robot, m: (~m.contact * jnp.square(m.foot_height - robot.swing_height)).sum(),
    "stance_slip": lambda robot, m: (m.contact * jnp.square(m.foot_velocity).sum(axis=-1)).sum(),
    "vertical_velocity": lambda robot, m: jnp.square(m.velocity[2]),
    "roll_pitch_rate": lambda robot, m: jnp.square(m.rates[:2]).sum(),
    "tilt": lambda robot, m: jnp.square(m.gravity[:2]).sum(),
    "height": lambda robot, m: jnp.square(m.height - robot.target_height),
    "joint_acceleration": lambda robot, m: jnp.square(m.accelerations).sum(),
    "joint_velocity": lambda robot, m: jnp.square(m.speeds).sum(),
    "torque": lambda robot, m: jnp.square(m.torque).sum(),
    "action_change": lambda robot, m: jnp.square(m.action - m.action_before).sum(),
    "joint_limits": lambda robot, m: jnp.maximum(m.angles - joint_array(robot, "limits") @ [0.05, 0.95], 0.0).sum()
    + jnp.maximum(joint_array(robot, "limits") @ [0.95, 0.05] - m.angles, 0.0).sum(),  # beyond the central 90%
    "upright_joints": lambda robot, m: jnp.square(joint_array(robot, "upright") * m.angles).sum(),
}

def reward_terms(robot: Robot, m: Motion) -> dict[str, jax.Array]:
    """The weighted terms of one control step; the reward is their sum, but at least 0, so that a fall never pays."""
    return {f"reward_{name}": CONTROL_DT * weight * TERMS[name](robot, m) for name, weight in robot.weights.items()}

# ---- 5. Environment -------------------------------------------------------------------------------------------------
@struct.dataclass
class Physics:
    """The smallest state that determines the future; each step computes everything else in mjx.Data anew."""
    qpos: jax.Array  # [7 + A] m and quaternion of the base, rad
    qvel: jax.Array  # [6 + A] m/s (in the world) and rad/s (in its frame) of the base, rad/s
    qacc_warmstart: jax.Array  # [6 + A] where the constraint solver starts

@struct.dataclass
class State:
    """One world between two steps; names are MuJoCo Playground's."""
    data: Physics
    obs: dict[str, jax.Array]  # of the actor, with noise, and of the critic, which sees more
    reward: jax.Array
    done: jax.Array  # float, 1 if the robot fell; the time limit is told apart, in info
    metrics: dict[str, jax.Array]  # the reward's terms, and the errors of tracking
    info: dict  # key, command, action, elapsed (steps since the reset), truncated, broken (see Env), domain (of
    # randomisation: friction, payload, factors of stiffness [A], damping [A] and strength, delay in physics steps)

def joint_array(robot: Robot, name: str) -> np.ndarray:
    """A property of all joints, in the order of actions: [A, ...]."""
    return np.array([getattr(link, name) for link in robot.joints.values()], float)

def controller(robot: Robot) -> list[np.ndarray]:
    """The joints' default angles, stiffnesses, dampings and largest torques: [A] each."""
    return [joint_array(robot, name) for name in ("default", "stiffness", "damping", "max_torque")]

def stepping_action(robot: Robot, obs: jax.Array) -> jax.Array:
    """Actions [..., A] of a simple stepping motion, by clock and command in the actor's observations [..., O]: on the
    floor a leg sweeps back, in the air it lifts and sweeps ahead. Without a command they hold the default pose."""
    command, clock = obs[..., 6:9] / COMMAND_SCALE, jnp.arctan2(obs[..., -2], obs[..., -1]) / (2 * math.pi)
    phases = (clock[..., None] + CONTROL_DT / robot.gait_period + np.array(robot.gait_offsets)) % 1  # after the action
    stance, swing = phases / robot.stance_share, (phases - robot.stance_share) / (1 - robot.stance_share)
    stance, swing = jnp.minimum(stance, 1.0), jnp.maximum(swing, 0.0)  # how far each has come
    up = jnp.where((command == 0).all(axis=-1, keepdims=True), 0.0, jnp.sin(math.pi * swing))
    ahead = jnp.cos(math.pi * (stance - swing))  # 1 at landing, -1 at lift-off
    up, ahead = (jnp.repeat(x, len(robot.leg), axis=-1) for x in (up, ahead))  # [..., A]
    sweep = ahead * (command @ joint_array(robot, "sweep").T)
    return (up * joint_array(robot, "lift") + sweep) / robot.action_scale

def to_base_frame(quat, vector, xp=jnp):
    """Turn a vector [..., 3] of the world by the inverse of a quaternion [..., 4], w x y z."""
    w, axis = quat[..., :1], -quat[..., 1:]
    cross = xp.cross(axis, vector)
    return vector + 2 * (w * cross + xp.cross(axis, cross))

def is_stance(robot: Robot, elapsed, xp=jnp):
    """Whether the clock wants each leg on the floor: elapsed int [...], control steps -> bool [..., F]."""
    offsets = [round(offset * robot.gait_ticks) for offset in robot.gait_offsets]
    return (elapsed[..., None] + xp.array(offsets)) % robot.gait_ticks < round(robot.stance_share * robot.gait_ticks)

def observe(robot: Robot, qpos, qvel, command, action, elapsed, xp=jnp):
    """What the robot's computer knows, in Unitree's order and scales: [..., 11 + 3 A]. Inputs are [..., n], elapsed
    [...] in control steps. xp is jax.numpy or numpy."""
    down = xp.broadcast_to(xp.array([0.0, 0.0, -1.0]), qvel[..., :3].shape)
    phase = elapsed % robot.gait_ticks * (2 * math.pi / robot.gait_ticks)
    return xp.concatenate([
        0.25 * qvel[..., 3:6], to_base_frame(qpos[..., 3:7], down, xp), command * COMMAND_SCALE,
        qpos[..., 7:] - joint_array(robot, "default"), 0.05 * qvel[..., 6:], action,
        xp.stack([xp.sin(phase), xp.cos(phase)], axis=-1)], axis=-1)

def has_fallen(robot: Robot, qpos, xp=jnp):  # [..., 7 + A] -> bool [...]
    up = 1 - 2 * (xp.square(qpos[..., 4]) + xp.square(qpos[..., 5]))  # cosine of the tilt
    return (up < math.cos(robot.max_tilt)) | (qpos[..., 2] < robot.min_height)

# shared: physics
def physics_step(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """One step of one world's physics.

    onekernel's step is MJX's, but its solver stops as soon as it has converged, and its frame of
    friction for steep capsules is C MuJoCo's.
    """
    if onekernel:
        return onekernel.mjx.step(model, data)
    with jax.default_matmul_precision("highest"):  # TF32, a GPU's default, is too coarse
        return mjx.step(model, data)


@cache
def kernel(function):
    """A function of one world as one kernel for all: jax.vmap(kernel(env.step))(states, actions).

    Without onekernel, the function itself, for XLA.
    """
    return onekernel.compile(function) if onekernel else function


# end shared

class Env:
    """One world; `reset` and `step` are pure, for jax.vmap, and the object holds nothing that changes. A world that is
    not finite, or faster than MAX_SPEED, is broken: its step ends the episode, earns nothing and is not learnt from,
    and its observation stays as it was."""
    MAX_SPEED, TIME_LIMIT = 100.0, 1000  # m/s and rad/s; steps
    def __init__(self, args: Args):
        self.args, self.robot = args, ROBOTS[args.robot]
        model = load_model(self.robot, CONTROL_DT / args.decimation, drawn=False)
        (self.feet, self.soles), n = find_feet(model), model.nu
        self.payloads = draw_payloads(args, load_model(self.robot, CONTROL_DT / args.decimation, drawn=False))
        self.model, self.action_size = mjx.put_model(model, jax.local_devices()[0], impl="jax"), n
        self.template = mjx.make_data(self.model, jax.local_devices()[0])
        self.noise = args.obs_noise * np.repeat([0.05, 0.05, 0.0, 0.01, 0.075, 0.0, 0.0], [3, 3, 3, n, n, n, 2])
        self.default, self.stiffness, self.damping, self.max_torque = controller(self.robot)
    def draw_command(self, key: jax.Array) -> jax.Array:
        """A velocity [3] in the base's frame: m/s, m/s, rad/s. Slow ones are 0: to stand differs from any to walk."""
        args, (value_key, stand_key) = self.args, jax.random.split(key)
        low, high = np.array([args.command_x, args.command_y, args.command_yaw]).T
        command = jax.random.uniform(value_key, (3,), minval=low, maxval=high)
        slow = jnp.array([jnp.linalg.norm(command[:2])] * 2 + [jnp.abs(command[2])]) < 0.2
        return jnp.where(slow | (jax.random.uniform(stand_key) < args.standing), 0.0, command)
    def draw_domain(self, key: jax.Array) -> dict[str, jax.Array]:
        """What domain randomisation draws for one episode."""
        args, keys = self.args, jax.random.split(key, 6)
        stiffness_key, damping_key, strength_key, friction_key, payload_key, delay_key = keys
        gain_noise, strength_noise, joints = args.gain_noise, args.strength_noise, (self.action_size,)
        stiffness = 1 + jax.random.uniform(stiffness_key, joints, minval=-gain_noise, maxval=gain_noise)
        damping = 1 + jax.random.uniform(damping_key, joints, minval=-gain_noise, maxval=gain_noise)
        strength = 1 + jax.random.uniform(strength_key, (), minval=-strength_noise, maxval=strength_noise)
        friction = jax.random.uniform(friction_key, (), minval=args.friction[0], maxval=args.friction[1])
        delay = jax.random.randint(delay_key, (), 0, round(args.action_delay * args.decimation) + 1)
        return {"friction": friction, "payload": jax.random.randint(payload_key, (), 0, NUM_PAYLOADS),
                "stiffness": stiffness, "damping": damping, "strength": strength, "delay": delay}
    def observations(self, key: jax.Array, data: Physics, command, action, elapsed) -> dict[str, jax.Array]:
        """The actor's [O] and the critic's [O + 3]."""
        clean = observe(self.robot, data.qpos, data.qvel, command, action, elapsed)
        return {"actor": clean + self.noise * jax.random.uniform(key, clean.shape, minval=-1.0, maxval=1.0),
                "critic": jnp.concatenate([2.0 * to_base_frame(data.qpos[3:7], data.qvel[:3]), clean])}
    def reset(self, key: jax.Array) -> State:
        """A new episode near the default pose, with another body and another command. key: one PRNG key."""
        next_key, angle_key, velocity_key, command_key, domain_key, noise_key = jax.random.split(key, 6)
        angles = self.default * jax.random.uniform(angle_key, (self.action_size,), minval=0.5, maxval=1.5)
        base = jnp.array([0.0, 0.0, self.robot.start_height, 1.0, 0.0, 0.0, 0.0])
        velocity = jax.random.uniform(velocity_key, (6,), minval=-0.5, maxval=0.5)
        action, zero, no, elapsed = jnp.zeros(self.action_size), jnp.zeros(()), jnp.array(False), jnp.int32(0)
        qpos, qvel = jnp.concatenate([base, angles]), jnp.concatenate([velocity, action])
        data, command = Physics(qpos, qvel, jnp.zeros_like(qvel)), self.draw_command(command_key)
        obs = self.observations(noise_key, data, command, action, elapsed)
        metrics = {f"reward_{name}": zero for name in self.robot.weights} | {"error_velocity": zero, "error_yaw": zero}
        info = {"key": next_key, "command": command, "action": action, "elapsed": elapsed, "truncated": no,
                "broken": no, "domain": self.draw_domain(domain_key)}
        return State(data, obs, reward=zero, done=zero, metrics=metrics, info=info)
    def advance(self, data: Physics, action, action_before, domain: dict) -> tuple[Physics, dict[str, jax.Array]]:
        """The physics of one control step, and what was read in the last of its steps."""
        soles = self.model.geom_friction.at[self.soles.ravel(), 0].set(domain["friction"])
        payload = {name: jnp.asarray(values)[domain["payload"]] for name, values in self.payloads.items()}
        model = self.model.replace(geom_friction=soles, **payload)
        def substep(data: Physics, i):
            target = self.default + self.robot.action_scale * jnp.where(i < domain["delay"], action_before, action)
            torque = domain["stiffness"] * self.stiffness * (target - data.qpos[7:])
            torque -= domain["damping"] * self.damping * data.qvel[6:]
            torque = jnp.clip(domain["strength"] * torque, -self.max_torque, self.max_torque)
            full = physics_step(model, self.template.replace(**vars(data), ctrl=torque))
            position, cvel = full.xpos[self.feet], full.cvel[self.feet]  # of the feet's bodies
            arm = position - full.subtree_com[1]  # from the centre of mass, whose point of the body cvel is about
            velocity = cvel[:, 3:] + jnp.cross(cvel[:, :3], arm)
            contact = (full.geom_xpos[self.soles, 2] < self.robot.sole_radius).any(axis=-1)
            return Physics(full.qpos, full.qvel, full.qacc_warmstart), {
                "torque": torque, "foot_height": position[:, 2], "foot_velocity": velocity, "contact": contact}
        data, readings = jax.lax.scan(substep, data, jnp.arange(self.args.decimation))
        return data, jax.tree.map(lambda values: values[-1], readings)
    def push(self, info: dict) -> jax.Array:
        """What the step after `info` adds to the base's velocity [2]."""
        limit, (due_key, push_key) = self.args.push_speed, jax.random.split(jax.random.split(info["key"], 4)[1])
        push = jax.random.uniform(push_key, (2,), minval=-limit, maxval=limit)
        return jnp.where(jax.random.uniform(due_key) < CONTROL_DT / self.args.push_every, push, 0.0)

    def step(self, state: State, action: jax.Array) -> State:
        """One control step. action [A]: the joints' targets, as offsets from the default pose over action_scale."""
        args, robot, info, before = self.args, self.robot, state.info, state.data
        (next_key, _, command_key, noise_key), elapsed = jax.random.split(info["key"], 4), info["elapsed"] + 1
        data, readings = self.advance(
            before.replace(qvel=before.qvel.at[:2].add(self.push(info))), action, info["action"], info["domain"])
        sane = jnp.isfinite(data.qpos).all() & (jnp.abs(data.qvel) < self.MAX_SPEED).all()  # False for NaN, too
        motion = Motion(
            command=info["command"], height=data.qpos[2], velocity=to_base_frame(data.qpos[3:7], data.qvel[:3]),
            rates=data.qvel[3:6], gravity=to_base_frame(data.qpos[3:7], jnp.array([0.0, 0.0, -1.0])),
            angles=data.qpos[7:], speeds=data.qvel[6:], accelerations=(data.qvel[6:] - before.qvel[6:]) / CONTROL_DT,
            action=action, action_before=info["action"], **readings,
            stance=is_stance(robot, elapsed) | (info["command"] == 0).all())
        terms = reward_terms(robot, motion)
        reward = jnp.where(sane, jnp.maximum(sum(terms.values()), 0.0), 0.0)
        errors = {"error_velocity": jnp.linalg.norm(motion.command[:2] - motion.velocity[:2]),
                  "error_yaw": jnp.abs(motion.command[2] - motion.rates[2])}
        metrics = {name: jnp.where(sane, value, 0.0) for name, value in (terms | errors).items()}
        due_key, command_key = jax.random.split(command_key)
        due = jax.random.uniform(due_key) < CONTROL_DT / args.command_every
        command = jnp.where(due, self.draw_command(command_key), info["command"])
        obs = self.observations(noise_key, data, command, action, elapsed)
        obs = {name: jnp.where(sane, new, state.obs[name]) for name, new in obs.items()}
        done = jnp.where(sane & ~has_fallen(robot, data.qpos), 0.0, 1.0)
        info = info | {"key": next_key, "command": command, "action": action, "elapsed": elapsed,
                       "truncated": elapsed >= self.TIME_LIMIT, "broken": ~sane}
        return State(data, obs, reward=reward, done=done, metrics=metrics, info=info)

# ---- 6. Running statistics ------------------------------------------------------------------------------------------
# shared: statistics
@struct.dataclass
class RunningStats:
    """Mean and variance of all samples so far."""

    count: jax.Array  # []
    mean: jax.Array
    var: jax.Array


def update_stats(stats: RunningStats, batch: jax.Array, valid: jax.Array) -> RunningStats:
    """Merge in the valid samples of the batches [T, N, ...] of all devices. valid: bool [T, N].

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

# ---- 7. Networks and symmetry ---------------------------------------------------------------------------------------
class MLP(nn.Module):
    """ELU layers with orthogonal weights: [..., O] -> [..., out]. gain scales the weights of the last layer."""
    hidden_sizes: tuple[int, ...]
    out: int
    gain: float
    @nn.compact
    def __call__(self, x):
        for width in self.hidden_sizes:
            x = nn.elu(nn.Dense(width, kernel_init=nn.initializers.orthogonal(math.sqrt(2)))(x))
        return nn.Dense(self.out, kernel_init=nn.initializers.orthogonal(self.gain))(x)

def make_networks(args: Args, env: Env) -> tuple[MLP, MLP]:
    """Actor and critic; they share nothing. The actor's first means are near 0, so its first actions are all noise."""
    return MLP(args.hidden_sizes, env.action_size, gain=0.01), MLP(args.hidden_sizes, 1, gain=1.0)

def log_prob(mean: jax.Array, log_std: jax.Array, action: jax.Array) -> jax.Array:
    """Log density of a diagonal Gaussian. mean, action [..., A], log_std [A] -> [...]."""
    z = (action - mean) * jnp.exp(-log_std)
    return (-0.5 * jnp.square(z) - log_std - 0.5 * math.log(2 * math.pi)).sum(axis=-1)

def mirror_action(robot: Robot, action, xp=jnp):
    """Actions, angles or speeds of the joints [..., A] as a mirror shows them: legs change places."""
    sign = np.array([1.0 if link.axis == "0 1 0" else -1.0 for link in robot.leg] * 2)
    return xp.roll(action, len(robot.leg), axis=-1) * sign

def mirror_observation(robot: Robot, obs, xp=jnp):
    """The actor's observation [..., O] as a mirror shows it; the gait's clock is half a period off."""
    n = len(robot.joints)
    rates, gravity, command, *joints, clock = xp.split(obs, np.cumsum([3, 3, 3, n, n, n]), axis=-1)
    return xp.concatenate([
        rates * np.array([-1, 1, -1]), gravity * np.array([1, -1, 1]), command * np.array([1, -1, -1]),
        *(mirror_action(robot, x, xp) for x in joints), -clock], axis=-1)

# ---- 8. Training state ----------------------------------------------------------------------------------------------
@struct.dataclass
class Learner:
    """What is learnt; the same on every device."""
    params: dict  # actor and critic (Flax parameters), log_std [A] (whatever the observation)
    opt_state: optax.OptState  # of the parameters as one vector
    learning_rate: jax.Array
    obs_stats: dict[str, RunningStats]  # of the actor's and the critic's observations
    return_stats: RunningStats  # [], of the discounted return
    key: jax.Array  # of the shuffles
    iteration: jax.Array  # int32, iterations done

@struct.dataclass
class Worlds:
    """What belongs to one world: [N, ...], split over the devices; its own key makes it the same on any device."""
    env_state: State
    key: jax.Array
    discounted_return: jax.Array  # of the rewards so far
    episode_return: jax.Array
    episode_length: jax.Array  # int32
    broken: jax.Array  # int32, how often this world broke

@struct.dataclass
class TrainState:
    """All that a run's future depends on; a checkpoint is this and the settings."""
    learner: Learner
    worlds: Worlds
STATE_SPEC = TrainState(learner=P(), worlds=P("devices"))

# shared: optimizer
def shuffle(key: jax.Array, size: int) -> jax.Array:
    """A random order of `size` items, int32 [size].

    It sorts one array, of random bits followed by the item's own number: five times as fast on a
    CPU as jax.random.permutation, which sorts pairs, twice.
    """
    bits = (size - 1).bit_length()
    if bits > 13:  # too few random bits would be left
        return jax.random.permutation(key, size)
    marked = (jax.random.bits(key, (size,)) << bits) | jnp.arange(size, dtype=jnp.uint32)
    return (jnp.sort(marked) & ((1 << bits) - 1)).astype(jnp.int32)


# end shared

def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam, on gradients that are scaled down to max_grad_norm. One that is not finite is skipped and counted, as by
    optax.apply_if_finite, but with one pass over the gradient for both."""
    adam = optax.scale_by_adam(eps=1e-5)
    def init(params) -> optax.ApplyIfFiniteState:
        return optax.ApplyIfFiniteState(jnp.int32(0), jnp.array(True), jnp.int32(0), adam.init(params))
    def update(gradient, state: optax.ApplyIfFiniteState, params=None):
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm)
        def step():
            scale = jnp.minimum(1.0, args.max_grad_norm / norm)
            return adam.update(jax.tree.map(lambda x: scale * x, gradient), state.inner_state)
        def skip():
            return jax.tree.map(jnp.zeros_like, gradient), state.inner_state
        direction, inner_state = jax.lax.cond(finite, step, skip)
        in_a_row, total = jnp.where(finite, 0, state.notfinite_count + 1), state.total_notfinite + ~finite
        return direction, optax.ApplyIfFiniteState(in_a_row, finite, total, inner_state)
    return optax.GradientTransformation(init, update)

def init_train_state(args: Args, env: Env, key: jax.Array) -> TrainState:
    actor_key, critic_key, shuffle_key, reset_key, clock_key, world_key = jax.random.split(key, 6)
    env_state = jax.vmap(kernel(env.reset))(jax.random.split(reset_key, args.num_envs))
    # The worlds' clocks start at random, so that their time limits do not come all at once.
    env_state.info["elapsed"] = jax.random.randint(clock_key, (args.num_envs,), 0, env.TIME_LIMIT)
    (actor, critic), obs = make_networks(args, env), {name: values[0] for name, values in env_state.obs.items()}
    params = {"actor": actor.init(actor_key, obs["actor"]), "critic": critic.init(critic_key, obs["critic"])}
    params["log_std"] = jnp.full(env.action_size, args.init_log_std, jnp.float32)  # with a type, as a checkpoint has it
    stats = {name: RunningStats(jnp.float32(1e-4), jnp.zeros_like(x), jnp.ones_like(x))
             for name, x in (obs | {"return": jnp.zeros(())}).items()}
    return_stats, opt_state = stats.pop("return"), make_optimizer(args).init(ravel_pytree(params)[0])
    learner = Learner(params, opt_state, jnp.float32(args.learning_rate), stats, return_stats, shuffle_key,
                      jnp.zeros((), jnp.int32))
    zeros, counts = jnp.zeros(args.num_envs), jnp.zeros(args.num_envs, jnp.int32)
    worlds = Worlds(env_state, jax.random.split(world_key, args.num_envs), zeros, zeros, counts, counts)
    return TrainState(learner, worlds)

# ---- 9. Rollout -----------------------------------------------------------------------------------------------------
@struct.dataclass
class Transition:
    """One step of the worlds: what was seen and done, and what came of it."""
    obs: dict[str, jax.Array]  # of actor and critic
    action: jax.Array  # [A]
    mean: jax.Array  # [A] of the policy
    start: State  # where the step began
    end: Worlds  # where it ended, before any reset, with its reward, observation, episode return, ...
    terminated: jax.Array  # bool
    done: jax.Array  # bool: terminated, or at the time limit
    valid: jax.Array  # bool: the world did not break; a step that breaks it teaches nothing
    finished: jax.Array  # bool: done after a whole episode, neither broken nor started on a staggered clock

def rollout(args: Args, env: Env, learner: Learner, worlds: Worlds) -> tuple[Worlds, Transition]:
    """num_steps steps of the policy in all worlds, each episode from a fresh reset. Returns transitions [T, N, ...]."""
    (actor, _), log_std = make_networks(args, env), learner.params["log_std"]
    def step(worlds: Worlds, _):
        key, action_key, reset_key = jnp.unstack(jax.vmap(partial(jax.random.split, num=3))(worlds.key), axis=1)
        obs = worlds.env_state.obs
        mean = actor.apply(learner.params["actor"], normalize(learner.obs_stats["actor"], obs["actor"]))
        noise = jax.vmap(partial(jax.random.normal, shape=log_std.shape))(action_key)
        action = mean + jnp.exp(log_std) * noise
        state = jax.vmap(kernel(env.step))(worlds.env_state, action)
        terminated, broken = state.done > 0, state.info["broken"]
        done = terminated | state.info["truncated"]
        end = Worlds(
            state, key, discounted_return=args.gamma * worlds.discounted_return + state.reward,
            episode_return=worlds.episode_return + state.reward, episode_length=worlds.episode_length + 1,
            broken=worlds.broken + broken)
        finished = done & ~broken & (end.episode_length == state.info["elapsed"])
        zeros, counts = jnp.zeros_like(end.episode_return), jnp.zeros_like(end.episode_length)
        fresh = Worlds(jax.vmap(kernel(env.reset))(reset_key), key, zeros, zeros, counts, end.broken)
        select = jax.vmap(lambda done, new, old: jax.tree.map(partial(jnp.where, done), new, old))
        transition = Transition(obs, action, mean, worlds.env_state, end, terminated, done, ~broken, finished)
        return select(done, fresh, end), transition
    return jax.lax.scan(step, worlds, None, length=args.num_steps)

# ---- 10. Advantages -------------------------------------------------------------------------------------------------
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

    All arguments and results are [T, N]. next_value belongs to the state in which the step ended,
    before any reset: nothing is to come after a termination, but an episode that the time limit
    cuts keeps what that state promised. So does one whose next step is not valid; an invalid step
    has the advantage 0.
    Source: arXiv:1506.02438, equation 16; the parts of the time limit and of `valid` are ours.
    """

    def backwards(next_advantage, step):
        reward, value, next_value, terminated, done, valid = step
        delta = reward + args.gamma * jnp.where(terminated, 0.0, next_value) - value
        following = jnp.where(done, 0.0, next_advantage)
        advantage = delta + args.gamma * args.gae_lambda * following
        advantage = jnp.where(valid, advantage, 0.0)
        return advantage, advantage

    steps = (reward, value, next_value, terminated, done, valid)
    _, advantage = jax.lax.scan(backwards, jnp.zeros_like(reward[0]), steps, reverse=True)
    return advantage, advantage + value


# end shared

# ---- 11. Loss and update --------------------------------------------------------------------------------------------
@struct.dataclass
class Batch:
    """What the loss needs of each transition."""
    obs: dict[str, jax.Array]  # of actor and critic
    action: jax.Array  # [A]
    mean: jax.Array  # [A] of the policy that acted
    advantage: jax.Array
    target: jax.Array  # of the value
    valid: jax.Array  # bool: to be learnt from

def ppo_loss(args: Args, env: Env, learner: Learner, params: dict, mb: Batch, ent_coef) -> tuple[jax.Array, dict]:
    """PPO's loss (arXiv:1707.06347, equations 7 and 9), symmetry's (1801.08093, equation 6), imitation's; and metrics.
    learner: the one that acted, for its statistics and the standard deviation; params: those that are learnt."""
    (actor, critic), log_std, old_log_std = make_networks(args, env), params["log_std"], learner.params["log_std"]
    value = critic.apply(params["critic"], normalize(learner.obs_stats["critic"], mb.obs["critic"]))[..., 0]
    mean = actor.apply(params["actor"], normalize(learner.obs_stats["actor"], mb.obs["actor"]))
    ratio = jnp.exp(log_prob(mean, log_std, mb.action) - log_prob(mb.mean, old_log_std, mb.action))
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    mean_valid = partial(masked_mean, valid=mb.valid)
    policy_loss = -mean_valid(jnp.minimum(mb.advantage * ratio, mb.advantage * clipped_ratio))
    value_loss = 0.5 * mean_valid(jnp.square(value - mb.target))
    entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
    seen = normalize(learner.obs_stats["actor"], mirror_observation(env.robot, mb.obs["actor"]))
    mirror_error = actor.apply(params["actor"], seen) - mirror_action(env.robot, mean)
    mirror_loss = mean_valid(jnp.square(mirror_error).mean(axis=-1))
    steps = learner.iteration * float(args.steps_per_iteration)
    stands = (mb.obs["actor"][:, 6:9] == 0).all(axis=-1) & (steps >= args.standing_after)
    stands &= jnp.linalg.norm(mb.obs["critic"][:, :2], axis=-1) < 0.5  # 0.25 m/s; who was pushed has to step
    share = jnp.where(stands, 1.0, jnp.maximum(1 - steps / args.imitation_steps, 0.0))
    imitation_error = mean - stepping_action(env.robot, mb.obs["actor"])
    imitation_loss = mean_valid(share * jnp.square(imitation_error).mean(axis=-1))
    loss = (policy_loss - ent_coef * entropy + args.vf_coef * value_loss + args.mirror_coef * mirror_loss
            + args.imitation_coef * imitation_loss)
    variance, old_variance = jnp.exp(2 * log_std), jnp.exp(2 * old_log_std)
    kl = (log_std - old_log_std + (old_variance + jnp.square(mean - mb.mean)) / (2 * variance) - 0.5).sum(axis=-1)
    return loss, {
        "losses/policy_loss": policy_loss, "losses/value_loss": value_loss, "losses/entropy": entropy,
        "losses/mirror_loss": mirror_loss, "losses/imitation_loss": imitation_loss, "losses/loss": loss,
        "losses/clipfrac": mean_valid(jnp.abs(ratio - 1) > args.clip_coef), "losses/kl": mean_valid(kl)}

def update_epochs(args: Args, env: Env, learner: Learner, batch: Batch) -> tuple[Learner, dict[str, jax.Array]]:
    """All epochs over a batch [B, ...], each device on its share. Metrics are means over all minibatches."""
    progress = learner.iteration / float(args.num_iterations)
    ent_coef = args.ent_coef + progress * (args.final_ent_coef - args.ent_coef)
    rate = args.learning_rate * (1 - progress) if args.desired_kl is None else learner.learning_rate
    # As one vector, with the metrics, the gradient takes one exchange between devices, not one a layer.
    vector, unravel = ravel_pytree(learner.params)
    def minibatch_step(carry, mb: Batch):
        vector, opt_state = carry
        gradient_and_metrics = jax.grad(ppo_loss, argnums=3, has_aux=True)(
            args, env, learner, unravel(vector), mb, ent_coef)
        flat, unravel_both = ravel_pytree(gradient_and_metrics)
        gradient, metrics = unravel_both(jax.lax.pmean(flat, "devices"))
        gradient = ravel_pytree(gradient)[0]
        direction, opt_state = make_optimizer(args).update(gradient, opt_state)
        metrics |= {"losses/grad_norm": jnp.linalg.norm(gradient)}
        return (vector - rate * direction, opt_state), (metrics, opt_state.notfinite_count)
    def epoch(carry, key):
        order = shuffle(key, len(batch.target))
        shuffled = jax.tree.map(lambda x: x[order].reshape(args.num_minibatches, -1, *x.shape[1:]), batch)
        return jax.lax.scan(minibatch_step, carry, shuffled)
    key = jax.random.fold_in(jax.random.fold_in(learner.key, learner.iteration), jax.lax.axis_index("devices"))
    (vector, opt_state), (metrics, skipped) = jax.lax.scan(
        epoch, (vector, learner.opt_state), jax.random.split(key, args.update_epochs))
    metrics = {tag: values.mean() for tag, values in metrics.items()} | {
        "charts/learning_rate": jnp.float32(rate), "charts/skipped_in_a_row": skipped.max(),
        "charts/skipped_updates": opt_state.total_notfinite}
    if args.desired_kl is not None:
        # After rsl_rl, but once an iteration: so many minibatches would drive it to its bounds.
        factor = jnp.where(metrics["losses/kl"] < args.desired_kl / 2, 1.5, 1.0)
        factor = jnp.where(metrics["losses/kl"] > 2 * args.desired_kl, 1 / 1.5, factor)
        rate = jnp.clip(factor * rate, 1e-5, 1e-2)
    return learner.replace(params=unravel(vector), opt_state=opt_state, learning_rate=jnp.float32(rate),
                           iteration=learner.iteration + 1), metrics

# ---- 12. One training iteration -------------------------------------------------------------------------------------
# shared: black_box
def black_box(start: State, action: jax.Array, broken: jax.Array) -> dict:
    """What the first world to break went through, for `dump`.

    Of all worlds [T, N, ...] -> [1, T, ...], so that the first axis is that of the devices.
    """
    world = jnp.unravel_index(jnp.argmax(broken), broken.shape)[1]
    steps = {"start": start, "action": action, "broken": broken}
    return jax.tree.map(lambda x: x[None, :, world], steps)


# end shared

def device_iteration(args: Args, env: Env, state: TrainState) -> tuple[TrainState, dict, dict]:
    """Rollout, advantages and update with one device's worlds. Returns metrics over all devices, by tag, and this
    one's black box."""
    learner, pmean = state.learner, partial(jax.lax.pmean, axis_name="devices")
    worlds, steps = rollout(args, env, learner, state.worlds)
    return_stats = update_stats(learner.return_stats, steps.end.discounted_return, steps.valid)
    reward = jnp.clip(steps.end.env_state.reward / jnp.sqrt(return_stats.var + 1e-8), -10.0, 10.0)
    (_, critic), seen = make_networks(args, env), jnp.stack([steps.obs["critic"], steps.end.env_state.obs["critic"]])
    seen = normalize(learner.obs_stats["critic"], seen)
    value, next_value = critic.apply(learner.params["critic"], seen)[..., 0]
    advantage, target = compute_gae(args, reward, value, next_value, steps.terminated, steps.done, steps.valid)
    def mean(x):
        return pmean(masked_mean(x, steps.valid))
    target_var = mean(jnp.square(target - mean(target)))
    explained_variance = 1 - mean(jnp.square(target - value)) / (target_var + 1e-8)
    advantage -= mean(advantage)
    advantage /= jnp.sqrt(mean(jnp.square(advantage))) + 1e-8
    batch = Batch(steps.obs, steps.action, steps.mean, advantage, target, steps.valid)
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)  # [T, N, ...] -> [B, ...]
    learner, metrics = update_epochs(args, env, learner, batch)
    # Only now, since the policy that acted and the one that learns must see the same normalised observations.
    obs_stats = {
        name: update_stats(stats, steps.obs[name], steps.valid) for name, stats in learner.obs_stats.items()}
    terms = steps.end.env_state.metrics.items()
    metrics |= {name.replace("_", "/", 1): masked_mean(term, steps.valid) for name, term in terms}
    returns, lengths = steps.finished * steps.end.episode_return, steps.finished * steps.end.episode_length
    sums = (steps.finished.sum(), returns.sum(), lengths.sum(), (steps.terminated & steps.valid).sum(),
            worlds.broken.sum())
    episodes, returns, lengths, falls, broken = jax.lax.psum(sums, "devices")
    metrics = pmean(metrics) | {
        "losses/explained_variance": explained_variance, "charts/nan_resets": broken, "charts/falls": falls,
        "charts/episodic_return": returns / episodes,  # NaN, and not logged, where no episode has finished
        "charts/episodic_length": lengths / episodes, "charts/episodes_finished": episodes}
    box = black_box(steps.start, steps.action, steps.end.env_state.info["broken"])
    return TrainState(learner.replace(obs_stats=obs_stats, return_stats=return_stats), worlds), metrics, box

@partial(jax.jit, static_argnames=("args", "env", "mesh"), donate_argnames="state")
def train_iteration(args: Args, env: Env, mesh: Mesh, state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
    """One iteration as one program over the mesh's devices; `state` is donated, its memory is used again."""
    run = jax.shard_map(partial(device_iteration, args, env), mesh=mesh, in_specs=(STATE_SPEC,),
                        out_specs=(STATE_SPEC, P(), P("devices")), check_vma=False)
    state, metrics, box = run(state)
    return state, metrics | {"black_box": box}

# ---- 13. Evaluation -------------------------------------------------------------------------------------------------
def export_policy(learner: Learner) -> dict[str, np.ndarray]:
    """All that the deterministic policy needs: the normaliser's mean and variance, and layers w0, b0, w1, ..."""
    policy = {"obs_mean": learner.obs_stats["actor"].mean, "obs_var": learner.obs_stats["actor"].var}
    for name, layer in learner.params["actor"]["params"].items():  # Dense_0, Dense_1, ...
        policy |= {name.replace("Dense_", "w"): layer["kernel"], name.replace("Dense_", "b"): layer["bias"]}
    return jax.device_get(policy)

def act(policy: dict, obs, xp=np):
    """The policy's mean action for the actor's observations: [..., O] -> [..., A]. NumPy is enough to run it."""
    x = xp.clip((obs - policy["obs_mean"]) / xp.sqrt(policy["obs_var"] + 1e-8), -10.0, 10.0)
    last = len(policy) // 2 - 2
    for i in range(last):
        x = x @ policy[f"w{i}"] + policy[f"b{i}"]
        x = xp.where(x > 0, x, xp.expm1(xp.minimum(x, 0.0)))  # ELU
    return x @ policy[f"w{last}"] + policy[f"b{last}"]

def export_onnx(policy: dict, file: Path) -> None:
    """The same function as an ONNX graph, normaliser inside: obs [N, O] -> action [N, A], both float32."""
    onnx, last, x, layers = importlib.import_module("onnx"), len(policy) // 2 - 2, "clipped", ""
    for i in range(last):
        layers, x = f"{layers} sum{i} = Gemm({x}, w{i}, b{i}) x{i} = Elu(sum{i})", f"x{i}"
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 17]> policy (float[N, {len(policy["obs_mean"])}] obs) =>
        (float[N, {len(policy[f"b{last}"])}] action) {{ centered = Sub(obs, obs_mean) var = Add(obs_var, epsilon)
        std = Sqrt(var) scaled = Div(centered, std) clipped = Clip(scaled, low, high) {layers}
        action = Gemm({x}, w{last}, b{last}) }}""")
    for name, values in (policy | {"epsilon": 1e-8, "low": -10.0, "high": 10.0}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values, np.float32), name))
    onnx.save(model, file)
    print(f"ONNX: {file}")

class CMujocoEnv:
    """The robot in C MuJoCo, as Unitree's loop runs it: 500 physics steps and 50 actions a second, nothing random."""
    SUBSTEPS = 10
    def __init__(self, robot: Robot):
        self.robot, self.model = robot, load_model(robot, CONTROL_DT / self.SUBSTEPS)
        self.data = mujoco.MjData(self.model)
        self.feet, self.soles = find_feet(self.model)
        self.default, self.stiffness, self.damping, self.max_torque = controller(robot)
    def reset(self, seed: int) -> None:
        """Standing on the floor in the default pose, each joint off by up to 0.05 rad."""
        mujoco.mj_resetData(self.model, self.data)
        noise = np.random.default_rng(seed).uniform(-0.05, 0.05, self.model.nu)
        self.data.qpos[2], self.data.qpos[7:] = self.robot.stand_height, self.default + noise
        self.action, self.elapsed = np.zeros(self.model.nu), 0
    def observe(self, command) -> np.ndarray:
        return observe(self.robot, self.data.qpos, self.data.qvel, np.array(command), self.action, self.elapsed, np)
    def step(self, action) -> dict[str, np.ndarray]:
        """One control step; returns what the test measures."""
        data, power, feet_before = self.data, 0.0, self.data.xpos[self.feet].copy()
        target = self.default + self.robot.action_scale * action
        for _ in range(self.SUBSTEPS):
            torque = self.stiffness * (target - data.qpos[7:]) - self.damping * data.qvel[6:]
            data.ctrl = np.clip(torque, -self.max_torque, self.max_torque)
            power += np.abs(data.ctrl * data.qvel[6:]).sum() / self.SUBSTEPS
            mujoco.mj_step(self.model, data)
        self.action, self.elapsed = action, self.elapsed + 1
        speed = np.linalg.norm((data.xpos[self.feet] - feet_before)[:, :2], axis=1) / CONTROL_DT
        loaded = data.geom_xpos[self.soles, 2].min(axis=1) < self.robot.sole_radius
        velocity = np.append(to_base_frame(data.qpos[3:7], data.qvel[:3], np)[:2], data.qvel[5])
        return {"velocity": velocity, "position": data.qpos[:2].copy(), "action": action, "power": power,
                "slip": (speed * loaded).sum() / max(1, loaded.sum()), "fallen": has_fallen(self.robot, data.qpos, np)}

# The test is frozen: results of different policies and versions compare only while it stays as it is.
GATE = {"stand": (0, 0, 0), "forward 0.3": (0.3, 0, 0), "forward 0.6": (0.6, 0, 0), "forward 1.0": (1, 0, 0),
        "backward 0.4": (-0.4, 0, 0), "left 0.3": (0, 0.3, 0), "right 0.3": (0, -0.3, 0), "turn left 0.6": (0, 0, 0.6),
        "turn right 0.6": (0, 0, -0.6), "mixed": (0.5, 0.2, 0.5)}
GATE_STARTS, GATE_STEPS, PUSH_SPEED = 8, 500, 0.5  # starts, steps of 0.02 s, m/s
PUSH_STEPS = (105, 210, 315, 420)  # at four phases of a gait of 0.8 s; a fall by the last one has 1.6 s to show

def drive(original: CMujocoEnv, policy: dict, command, seed: int, push: bool) -> dict[str, float]:
    """10 s on one command. Velocities are means over a gait period, as the body sways with each step, after 1 s."""
    random, rows = np.random.default_rng(seed), []
    original.reset(seed)
    while len(rows) < GATE_STEPS and not (rows and rows[-1]["fallen"]):
        if push and len(rows) in PUSH_STEPS:
            angle = random.uniform(0, 2 * math.pi)
            original.data.qvel[:2] += PUSH_SPEED * np.array([math.cos(angle), math.sin(angle)])
        rows.append(original.step(act(policy, original.observe(command))))
    if rows[-1]["fallen"]:
        return {"falls": 1}
    trace, start = {name: np.array([row[name] for row in rows]) for name in rows[0]}, round(1 / CONTROL_DT)
    window, error = round(original.robot.gait_period / CONTROL_DT), trace["velocity"][start:] - command
    means = np.stack([np.convolve(column, np.full(window, 1 / window), "valid") for column in error.T], axis=1)
    return {"falls": 0, "error": np.linalg.norm(means[:, :2], axis=1).mean(), "yaw": np.abs(means[:, 2]).mean(),
            "sway": np.linalg.norm(error[:, :2], axis=1).mean(), "slip": trace["slip"].mean(),
            "jerk": np.sqrt(np.square(np.diff(trace["action"], n=2, axis=0)).mean()), "power": trace["power"].mean(),
            "drift": np.linalg.norm(trace["position"][-1] - trace["position"][0])}

def judge(robot: Robot, policy: dict) -> dict:
    """The test: each command from 8 starts, without and with pushes. Prints the table (means over the starts; falls are
    counted; m/s, rad/s, W, m) and PASS or FAIL."""
    original, table, columns = CMujocoEnv(robot), {}, (*"falls error yaw sway slip jerk power drift".split(),)
    print(f"{'command':22}" + "".join(f"{name:>9}" for name in columns))
    for push in False, True:
        for name, command in GATE.items():
            starts = [drive(original, policy, np.array(command, float), seed, push) for seed in range(GATE_STARTS)]
            stood = [start for start in starts if not start["falls"]]
            row = {key: float(np.mean([start[key] for start in stood])) if stood else math.nan for key in columns}
            row["falls"], name = len(starts) - len(stood), name + ", pushed" * push
            table[name] = row
            print(f"{name:22}" + "".join(f"{value:9.3g}" for value in row.values()))
    walking = [row for name, row in table.items() if name in GATE and name != "stand"]
    error, yaw = (float(np.mean([row[key] for row in walking])) for key in ("error", "yaw"))
    falls, drift = sum(row["falls"] for row in table.values()), table["stand"]["drift"]
    passed = bool(falls == 0 and error <= 0.15 and yaw <= 0.2 and drift <= 0.1)  # False for NaN, too
    print(f"{'PASS' if passed else 'FAIL'}: {falls} falls (0), velocity error {error:.3f} m/s (0.15), yaw error "
          f"{yaw:.3f} rad/s (0.2), standing drift {drift:.3f} m (0.1)")
    return {"passed": passed, "falls": falls, "error": error, "yaw": yaw, "drift": drift, "table": table}

# shared: renderer
def make_renderer(model: mujoco.MjModel) -> mujoco.Renderer:
    """A renderer by MUJOCO_GL; without it by EGL on Linux, which needs no display."""
    advice = "on Linux install libegl1, or libosmesa6 and set MUJOCO_GL=osmesa"
    with or_fail(f"--capture-video: no OpenGL; {advice}"):
        if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
            gl_context.GLContext = importlib.import_module("mujoco.egl").GLContext
        return mujoco.Renderer(model, height=480, width=640)


# end shared

def write_video(robot: Robot, policy: dict, file: Path) -> None:
    """Film 3 s of each of the test's commands, in C MuJoCo. Arrows of 1 m for 1 m/s: the commanded velocity in red, the
    robot's, smoothed, in blue."""
    original, arrow, smooth = CMujocoEnv(robot), mujoco.mjtGeom.mjGEOM_ARROW, np.zeros(2)
    renderer, data = make_renderer(original.model), original.data
    scene, no = renderer.scene, np.zeros(9)
    file.parent.mkdir(exist_ok=True)
    original.reset(0)
    imageio = importlib.import_module("imageio")
    with warnings.catch_warnings(action="ignore"), imageio.get_writer(file, fps=0.5 / CONTROL_DT) as video:
        for i in range(150 * len(GATE)):
            command = np.array(list(GATE.values())[i // 150], float)
            original.step(act(policy, original.observe(command)))
            smooth = smooth + 0.05 * (data.qvel[:2] - smooth)
            if i % 2 == 0:
                renderer.update_scene(data, camera="track")
                wanted = data.xmat[1].reshape(3, 3)[:2, :2] @ command[:2]
                for velocity, above, color in (wanted, 0.75, (0.9, 0.2, 0.1, 1)), (smooth, 0.69, (0.1, 0.4, 0.9, 1)):
                    start = data.qpos[:3] + [0, 0, above]
                    mujoco.mjv_initGeom(scene.geoms[scene.ngeom], arrow, no[:3], no[:3], no, np.float32(color))
                    mujoco.mjv_connector(scene.geoms[scene.ngeom], arrow, 0.02, start, start + [*velocity, 1e-3])
                    scene.ngeom += 1
                video.append_data(renderer.render())
    print(f"video: {file}")

class Twin:
    """What `Env.advance` does, in C MuJoCo at full accuracy, with the draws of one world's episode."""
    def __init__(self, env: Env, start: State):
        self.env, self.info = env, start.info
        self.model = load_model(env.robot, CONTROL_DT / env.args.decimation, drawn=False)
        for name, values in env.payloads.items():
            getattr(self.model, name)[:] = values[int(self.info["domain"]["payload"])]
        self.model.geom_friction[env.soles.ravel(), 0] = float(self.info["domain"]["friction"])
        self.data = mujoco.MjData(self.model)
    def step(self, action) -> None:
        env, domain, data = self.env, self.info["domain"], self.data
        data.qvel[:2] += env.push(self.info)
        for i in range(env.args.decimation):
            target = env.default + env.robot.action_scale * (self.info["action"] if i < domain["delay"] else action)
            torque = domain["stiffness"] * env.stiffness * (target - data.qpos[7:])
            torque -= domain["damping"] * env.damping * data.qvel[6:]
            data.ctrl = np.clip(domain["strength"] * torque, -env.max_torque, env.max_torque)
            mujoco.mj_step(self.model, data)
        self.info = self.info | {"action": action, "elapsed": self.info["elapsed"] + 1,
                                 "key": jax.random.split(self.info["key"], 4)[0]}

# ---- 14. Log and files ----------------------------------------------------------------------------------------------
# shared: log
def say(text: str) -> None:
    """Print a line with the seconds since the start; of several processes only the first does."""
    if jax.process_index() == 0:
        print(f"[{time.perf_counter() - START:5.1f} s] {text}", flush=True)


# TensorBoard's events go to their file at once: the library's thread loses its queue when the
# process is killed, and a full disk ends it unseen. Closing the file, at the latest when Python
# ends, does not report a full disk once more.
def write_event(self: EventFileWriter, event) -> None:
    self._ev_writer.write_event(event)


def close_file(self: EventFileWriter, close=EventFileWriter.close) -> None:
    with contextlib.suppress(OSError):
        close(self)


EventFileWriter.add_event = write_event
EventFileWriter.close = close_file


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
        self.dumped = False  # a broken world

        quiet = jax.process_index() > 0
        purge = self.first_step + 1 if first else 0  # what an interrupted run wrote from there on
        rows = [f"\n|{name}|{value}|" for name, value in dataclasses.asdict(args).items()]
        with writing(run_dir / "events*"):
            self.writer = SummaryWriter(str(run_dir), purge_step=purge, write_to_disk=not quiet)
            table = "|param|value|\n|-|-|" + "".join(rows)
            self.writer.add_text("hyperparameters", table, self.first_step)
        self.bar = tqdm(
            total=args.num_iterations * args.steps_per_iteration,
            initial=self.first_step,
            unit=" steps",
            unit_scale=True,
            disable=quiet or None,  # None: without a terminal
        )

    def scalars(self, step: int, values: dict) -> None:
        """Write all values that are finite, by tag, in one event: ten times as fast as one each."""
        with writing(self.run_dir / "events*"):
            rows = [
                Summary.Value(tag=tag, simple_value=float(value))
                for tag, value in values.items()
                if math.isfinite(value)
            ]
            self.writer.file_writer.add_summary(Summary(value=rows), step)
            self.writer.flush()

    def write(self, iteration: int, metrics: dict) -> dict:
        """Log the metrics of an iteration, with its black box. Returns them as numbers."""
        box = metrics.pop("black_box")
        step = iteration * self.args.steps_per_iteration
        values = jax.device_get(metrics)
        sps = (step - self.first_step) / (time.time() - self.start)
        values["charts/SPS"] = sps
        self.scalars(step, values)

        if values["charts/nan_resets"] and not self.dumped:
            self.dumped = dump(self.args, self.run_dir / "nan_dump.npz", box)
        skipped = values["charts/skipped_in_a_row"]  # NaN before the first update
        message = f"{self.run_dir}: step {step}: {skipped:.0f} gradients in a row are not finite"
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
    """For what may find a full disk."""
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
    if jax.process_index() > 0:
        return
    folder = run_dir / "checkpoints"
    with writing(folder):
        folder.mkdir(exist_ok=True)
        write_npz(run_dir / "policy.npz", policy)  # first: a resumed run starts at the checkpoint
        write_npz(folder / f"{int(state.learner.iteration):09}.npz", arrays)
        for old in [*checkpoints(run_dir)[3:], *folder.glob("*.part")]:
            old.unlink()


def restore(args: Args, run_dir: Path, state: TrainState) -> TrainState:
    """The newest whole checkpoint, in the place of `state`.

    `state` itself, if the run was stopped before its first checkpoint.
    """
    for file in checkpoints(run_dir):
        try:
            with np.load(file, allow_pickle=False) as arrays:
                saved = dict(arrays)  # which reads all, and compares the checksums
            theirs = json.loads(str(saved["args"]))
        except Exception as error:  # there is no end to what may be wrong with a file
            problem = f"{type(error).__name__}: {error!s:.80}"
            say(f"--resume: {file} is broken ({problem}); trying the one before")
            continue

        ours = json.loads(json.dumps(dataclasses.asdict(args)))  # with lists for tuples, as theirs
        names = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        message = f"--resume: {file} differs from run.json in {', '.join(names):.200}"
        require(not names, message)
        with or_fail(f"--resume: {file} was written by other code"):
            return from_arrays(saved, state)

    require(not checkpoints(run_dir), f"--resume: {run_dir} holds no whole checkpoint")
    return state


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

# ---- 15. Command line -----------------------------------------------------------------------------------------------
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


def split_cpu(args: Args) -> None:
    """Make a CPU as many devices as it has cores; as one, it would leave most of them idle."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    each = (args.num_devices or cores) // (args.num_processes or 1)
    with contextlib.suppress(RuntimeError):  # JAX has started already, with the devices it has
        jax.config.update("jax_num_cpu_devices", min(max(each, 1), 64))


def join_processes(args: Args) -> None:
    """Meet the other processes. What is None, JAX asks SLURM or Open MPI for."""
    auto = args.coordinator_address == "auto"
    with or_fail("--coordinator-address, --num-processes, --process-id"):
        jax.distributed.initialize(
            coordinator_address=None if auto else args.coordinator_address,
            num_processes=args.num_processes,
            process_id=args.process_id,
            heartbeat_timeout_seconds=20,
            shutdown_timeout_seconds=3600,
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
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    message = f"{flag}: this takes {size} bytes of the {room} that there are; try less"
    require(size < 0.95 * room, message)


# end shared

def check_args(args: Args) -> None:
    """Refuse what cannot run, before anything is built."""
    bounds = {field.name: (1, 1e9) for field in dataclasses.fields(args) if field.type in (int, int | None)}
    zero_up = ("seed process_id learning_rate ent_coef final_ent_coef vf_coef clip_coef mirror_coef imitation_coef "
               "max_grad_norm desired_kl obs_noise push_speed")
    bounds |= dict.fromkeys(zero_up.split(), (0, 1e9)) | {"decimation": (1, 100), "update_epochs": (1, 1e3)}
    bounds |= {"total_timesteps": (1, 2**62)}
    bounds |= dict.fromkeys("gamma gae_lambda standing action_delay".split(), (0, 1)) | {"init_log_std": (-20, 20)}
    bounds |= dict.fromkeys("gain_noise strength_noise shifted_center".split(), (0, 0.9))
    bounds |= dict.fromkeys(["command_every", "push_every"], (CONTROL_DT, 1e6)) | {"friction": (0.01, 10)}
    bounds |= dict.fromkeys(["command_x", "command_y", "command_yaw"], (-5, 5)) | {"added_mass": (-5, 1e3)}
    require(args.robot in ROBOTS, f"--robot {args.robot}: no such robot")
    for name, (least, most) in bounds.items():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        low, high = value if isinstance(value, tuple) else (value, value)
        require(value is None or least <= low <= high <= most, f"{flag} {value}: must be between {least} and {most}")
    widths = args.hidden_sizes and min(args.hidden_sizes) > 0 and max(args.hidden_sizes) <= 4096
    require(widths, f"--hidden-sizes {args.hidden_sizes}: must be widths up to 4096, like 256 128")
    advice = "must be more than 0; None anneals the step size linearly to 0"
    require(args.desired_kl is None or args.desired_kl > 0, f"--desired-kl {args.desired_kl}: {advice}")
    steps = args.steps_per_iteration
    require(args.num_iterations, f"--total-timesteps {args.total_timesteps}: less than a rollout of {steps}")
    require(steps % args.num_minibatches == 0, f"--num-minibatches {args.num_minibatches}: must divide {steps}")
    for flag, package in {"track": "wandb", "export_onnx": "onnx"}.items():
        missing = getattr(args, flag) and not importlib.util.find_spec(package)
        require(not missing, f"--{flag.replace('_', '-')}: {package} is missing; pip install {package}")

# ---- 16. Main and smoke test ----------------------------------------------------------------------------------------
def finish(args: Args, run_dir: Path, policy: dict) -> dict:
    """What is done with a trained policy. Returns the result of the test."""
    result = judge(ROBOTS[args.robot], policy)
    if args.export_onnx:
        with writing(run_dir / "policy.onnx"):
            export_onnx(policy, run_dir / "policy.onnx")
    if args.capture_video:
        with writing(run_dir / "videos"):
            write_video(ROBOTS[args.robot], policy, run_dir / "videos" / "c_mujoco.mp4")
    return result

def train(args: Args, run_dir: Path | None = None) -> tuple[Path, dict]:
    """Train from the start, or on from the newest checkpoint of run_dir. Returns the run's folder and its policy."""
    start, resuming, stops = time.time(), run_dir is not None, listen()
    if args.capture_video:
        make_renderer(load_model(ROBOTS[args.robot], CONTROL_DT)).close()  # better to fail now than after training
    mesh = make_mesh(args.num_devices, args.num_envs, args.steps_per_iteration // args.num_minibatches)
    args = dataclasses.replace(args, num_devices=mesh.size, **{x: getattr(Args, x) for x in CALL_FLAGS})
    run_dir = run_dir or Path(args.runs_dir) / f"{args.robot}__{args.exp_name}__{args.seed}__{int(start)}"
    if jax.process_index() == 0:
        with or_fail(f"--runs-dir {args.runs_dir}"):
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=run_dir if resuming else run_dir.parent).close()  # better to fail now
    slowly = "" if onekernel else "; physics by XLA, slowly, as the folder onekernel is not beside this file"
    say(f"building {args.robot} for {mesh.size} x {mesh.devices[0].device_kind}{slowly}")
    env, key, shardings = Env(args), jax.random.key(args.seed), jax.tree.map(partial(NamedSharding, mesh), STATE_SPEC)
    init = jax.jit(init_train_state, static_argnames=("args", "env"), out_shardings=shardings).lower(args, env, key)
    shapes = jax.tree.map(
        lambda sharding, part: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part),
        shardings, init.out_info)
    check_memory(mesh, count_bytes(shapes))
    events, compile_start = [], time.perf_counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    say("compiling the training iteration")
    with ThreadPoolExecutor() as pool:  # XLA compiles one program while JAX traces the next
        init = pool.submit(init.compile)
        compiled = train_iteration.lower(args, env, mesh, shapes).compile()
        state = init.result()(key)
    seconds, memory = time.perf_counter() - compile_start, compiled.memory_analysis()  # of one device
    state = restore(args, run_dir, state) if resuming else state
    first = iteration = saved = int(state.learner.iteration)
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    run = {
        "compile_s": round(seconds, 2), "compile_cache": "hit" if any("cache_hits" in e for e in events) else "miss",
        "bytes_per_world": count_bytes(state.worlds) // args.num_envs,
        "peak_bytes": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) * mesh.size}
    check_memory(mesh, run["peak_bytes"])
    say("compiled: " + ", ".join(f"{name} {value}" for name, value in run.items()))
    packages, kinds = ("jax", "mujoco", "mujoco-mjx", "flax", "optax"), [device.device_kind for device in mesh.devices]
    run |= {"args": dataclasses.asdict(args), "commit": git.stdout.strip(), "devices": kinds,
            "versions": {name: importlib.metadata.version(name) for name in packages}}
    if jax.process_index() == 0:
        with or_fail(f"--runs-dir, --exp-name: {run_dir}"):
            run_dir.mkdir(exist_ok=resuming)
    write_run(run_dir, run)
    if args.track and jax.process_index() == 0:
        wandb = importlib.import_module("wandb")
        wandb.init(id=run_dir.name, name=run_dir.name, config=run["args"], sync_tensorboard=True, resume="allow")
    steps, log, pending = args.steps_per_iteration, Log(args, run_dir, first), None
    say(f"{args.num_iterations} * {steps} steps, {args.total_timesteps % steps} unused: {run_dir}")
    with or_fail("the processes differ in their flags, or in the checkpoint that they found", kind=AssertionError):
        multihost_utils.sync_global_devices(f"{args} {first}")
    while iteration < args.num_iterations and not stop_wanted(stops, iteration):
        state, metrics = compiled(state)
        iteration += 1
        if pending:  # read one iteration late, so that the device never waits for Python
            log.write(*pending)
        pending = (iteration, metrics)
        if iteration % args.checkpoint_every == 0:
            log.write(*pending)  # so that the curves reach as far as the checkpoint
            pending, saved = None, iteration
            save(args, run_dir, state, export_policy(state.learner))
    if pending:
        log.write(*pending)
    log.bar.close()
    run["train_s"], policy = time.time() - log.start, export_policy(state.learner)
    if saved < iteration:
        save(args, run_dir, state, policy)
    log.writer.close()
    if stops:
        again = shlex.join(["python", sys.argv[0], "--resume", str(run_dir)])
        say(f"stopped after iteration {iteration}; to go on: {again}")
        raise SystemExit(128 + stops[0])
    on_signals(signal.SIG_DFL)
    if jax.process_index() > 0:
        return run_dir, policy  # the first one does the rest
    say(f"trained for {run['train_s']:.1f} s; policy: {run_dir / 'policy.npz'}")
    run["evaluation"] = finish(args, run_dir, policy)
    write_run(run_dir, run)
    return run_dir, policy

def main(argv: list[str]) -> None:
    args = parse_args(argv)
    check_args(args)
    if args.resume:
        saved = dataclasses.replace(read_run(Path(args.resume)), **{x: getattr(args, x) for x in CALL_FLAGS})
        unchanged = parse_args(argv, saved) == saved
        require(unchanged, "--resume: the run keeps its own settings; leave the other flags out, or start a new run")
        args = saved
    start_jax(args)
    if args.smoke:
        raise SystemExit(smoke(args))
    if args.evaluate:
        run_dir, args = Path(args.evaluate), dataclasses.replace(args, robot=read_run(Path(args.evaluate)).robot)
        with or_fail(f"--evaluate {run_dir}: no policy"), np.load(run_dir / "policy.npz", allow_pickle=False) as file:
            policy = dict(file)
        raise SystemExit(int(not finish(args, run_dir, policy)["passed"]))
    run_dir = Path(args.resume) if args.resume else None
    if not args.coordinator_address:
        train(args, run_dir)
    else:  # where one fails, all end at once
        with or_fail("this or another process has failed; start all of them again, with --resume", 1):
            train(args, run_dir)

def smoke(args: Args) -> int:
    """Go through all that a run does, in short, with a verdict for each stage. Returns the exit code."""
    failed, versions = [], [importlib.metadata.version(name) for name in ("mujoco", "mujoco-mjx")]
    def verdict(name: str, passed, note: str) -> None:
        failed.extend([] if passed else [name])
        print(f"{'pass' if passed else 'FAIL'}  {name}: {note}", flush=True)
    note = f"jax {jax.__version__} on {make_mesh(args.num_devices).devices}, mujoco and mjx {versions}"
    verdict("versions", versions[0] == versions[1], note)  # pip alone takes a mujoco that does not fit
    x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    error = np.abs(jnp.matmul(x, x, precision="highest") - x.astype(float) @ x).max()
    verdict("precision", error < 1e-3, f"a float32 product of two 256 x 256 matrices is off by {error:.1e} at most")
    with tempfile.TemporaryDirectory() as folder:
        short = {"num_envs": 32, "num_steps": 8, "num_minibatches": 4, "total_timesteps": 1024}
        run_dir, policy = train(dataclasses.replace(args, **short, checkpoint_every=2, runs_dir=folder))
        verdict("training", all(np.isfinite(x).all() for x in policy.values()), "4 iterations, the policy is finite")
        checkpoints(run_dir)[0].unlink()
        _, resumed = train(read_run(run_dir), run_dir)
    verdict("resume", all((resumed[name] == policy[name]).all() for name in policy), "the same policy, to the bit")
    verdict("C MuJoCo", drive(CMujocoEnv(ROBOTS[args.robot]), policy, (0, 0, 0), 0, False)["falls"], "falls untrained")
    print("FAIL: " + ", ".join(failed) if failed else "all is well")
    return int(bool(failed))

if __name__ == "__main__":
    main(sys.argv[1:])
