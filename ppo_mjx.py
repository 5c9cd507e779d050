# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "flax==0.12.6", "imageio[ffmpeg]==2.38.1", "jax==0.9.2", "llvmlite==0.50.0", "mujoco==3.17.0", "mujoco-mjx==3.17.0",
#   "optax==0.2.8", "tensorboard==2.21.0", "tensorboardX==2.6.5", "tqdm==4.70.1", "typeguard==4.6.0", "tyro==1.0.17"]
# ///
"""PPO on Gymnasium's locomotion tasks, on MuJoCo XLA (MJX): one file, one jitted program per iteration.

    python ppo_mjx.py --num-envs 256              train HalfCheetah; watch it with: tensorboard --logdir runs
    python ppo_mjx.py --resume runs/NAME          go on, bit for bit, where a run stopped
    python ppo_mjx.py --evaluate runs/NAME        judge its policy in MJX, in C MuJoCo and in Gymnasium
    python ppo_mjx.py --smoke                     check the set-up of this machine
The map: 1 settings, 2 models, 3 environment, 4 statistics, 5 networks, 6 training state, 7 rollout, 8 advantages,
9 loss and update, 10 the iteration; then the bookkeeping: 11 evaluation, 12 log and files, 13 command line, 14 main.
Shapes: T = num_steps, N = worlds on this device, B = T * N, O = observation, A = action, E = episodes. A record's
fields are [T, N, ...] in a rollout, [B, ...] in a batch, [B / num_minibatches, ...] in a minibatch.
Details and names follow CleanRL's ppo_continuous_action.py, tasks gymnasium 1.4.0; docs/ppo_mjx.md has all metrics.
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
    from mujoco.mjx._src import smooth

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
    """PPO on Gymnasium's locomotion tasks, on MuJoCo XLA."""
    # The run
    exp_name: str = "ppo_mjx"  # name of the experiment, part of the run folder's name
    seed: int = 1  # every random number follows from it and the number of devices
    num_devices: int | None = None  # that share the worlds; by default as many GPUs or CPU cores as divide the work
    runs_dir: str = "runs"  # where the run folders are made
    track: bool = False  # log to Weights & Biases too; its project is WANDB_PROJECT
    capture_video: bool = False  # write an mp4 of the trained policy in C MuJoCo, after training or with --evaluate
    checkpoint_every: int = 50  # iterations between checkpoints; the last three are kept
    compile_cache: bool = True  # keep compiled programs in the user's cache folder, for a quicker start next time
    resume: str | None = None  # run folder to go on with, by the settings that it was started with
    evaluate: str | None = None  # run folder whose policy to judge; nothing is trained
    replay_nan: str | None = None  # nan_dump.npz of a run, to step through in MJX and in C MuJoCo side by side
    coordinator_address: str | None = None  # host:port of process 0, if several train together; auto: ask the cluster
    num_processes: int | None = None  # that train together, each with its own devices
    process_id: int | None = None  # of this one, from 0
    smoke: bool = False  # build, train, save, resume and evaluate in short, and tell what works
    # The environment
    env_id: Literal["HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid"] = "HalfCheetah"  # Gymnasium's v5
    eval_every: int = 100  # iterations between evaluations in MJX; 0 for none
    eval_episodes: int = 20  # episodes of each evaluation
    # The algorithm, by CleanRL's names
    total_timesteps: int = 1_000_000  # environment steps, over all worlds; Ant takes 3 million, Humanoid 2
    learning_rate: float = 1e-3  # Adam's step size at the start; Ant takes 2e-4, Humanoid 5e-4
    num_envs: int = 256  # worlds, over all devices; all but HalfCheetah take 128
    num_steps: int = 16  # steps of each world in one rollout; all but HalfCheetah take 32
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimate
    num_minibatches: int = 32  # minibatches of one epoch
    update_epochs: int = 5  # passes over a rollout
    norm_adv: bool = True  # normalise the advantages, over the whole rollout
    clip_coef: float = 0.2  # clipping range of the probability ratio
    clip_vloss: bool = False  # clip the value loss as well
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradients are scaled down to this norm
    target_kl: float | None = None  # end an update after the epoch whose mean KL divergence exceeds this
    norm_obs: bool = True  # normalise observations by running mean and variance; off, they are still clipped to 10
    norm_reward: bool = True  # divide rewards by the running standard deviation of the discounted return
    hidden_sizes: tuple[int, ...] = (64, 64)  # widths of the tanh layers, of the actor and of the critic
    init_log_std: float = -0.5  # log of the policy's standard deviation at the start

    @property
    def steps_per_iteration(self) -> int:
        return self.num_envs * self.num_steps
    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.steps_per_iteration

# ---- 2. Models (SI units and radians; a test holds the compiled models equal to Gymnasium's) ------------------------
MJCF = """<mujoco model="{name}">
  <compiler angle="{angle}"/><option {option}/><visual><headlight ambient=".3 .3 .3" diffuse=".7 .7 .7"/></visual>
  <default>{default}
    <motor ctrllimited="true" ctrlrange="-{most} {most}"/>
    <default class="root"><joint limited="false" armature="0" damping="0" stiffness="0"/></default>
  </default>
  <asset><texture type="skybox" builtin="flat" rgb1=".8 .9 1" rgb2=".8 .9 1" width="8" height="8"/>
    <texture name="grid" type="2d" builtin="checker" rgb1=".5 .6 .7" rgb2=".3 .4 .5" width="64" height="64"/>
    <material name="grid" texture="grid" texrepeat="40 40"/></asset>
  <worldbody><light directional="true" pos="0 0 4" dir="0 .3 -1"/>
    <geom name="floor" type="plane" material="grid" conaffinity="1" condim="3" {floor}/>
    <body name="torso" pos="0 0 {height}">
      <camera name="track" mode="trackcom" pos="0 -4 .3" xyaxes="1 0 0 0 0 1"/>
      {root}{bodies}
    </body>
  </worldbody>
  <actuator>{motors}</actuator>
</mujoco>"""
FREE = '<joint class="root" name="root" type="free" {}/>'  # the root of a robot in space

def planar(origin: float) -> str:
    """The root of a robot in the x-z plane; its coordinate z is the height above the floor."""
    return f"""<joint class="root" name="rootx" type="slide" axis="1 0 0" pos="0 0 -{origin}"/>
      <joint class="root" name="rootz" type="slide" axis="0 0 1" pos="0 0 -{origin}" ref="{origin}"/>
      <joint class="root" name="rooty" axis="0 1 0"/>"""

def link(name: str, pos: str, joint: str, geom: str, child: str = "") -> str:
    """A body with one joint and one capsule of the same name."""
    return f'<body name="{name}" pos="{pos}"><joint name="{name}" {joint}/><geom name="{name}" {geom}/>{child}</body>'

def make_motors(gears: dict[str, int]) -> str:
    """A motor for each joint; gears in Nm."""
    return "".join(f'<motor joint="{joint}" gear="{gear}"/>' for joint, gear in gears.items())

def cheetah_mjcf() -> str:
    """9 degrees of freedom; the odd density makes 14 kg."""
    legs = chain = ""
    for name, pos, limits, stiffness, damping, center, pitch, half_length in (  # each leg from its foot upwards
        ("bfoot", "-.28 0 -.14", "-.4 .785", 120, 3, ".03 0 -.097", -0.27, 0.094),
        ("bshin", ".16 0 -.25", "-.785 .785", 180, 4.5, "-.14 0 -.07", -2.03, 0.15),
        ("bthigh", "-.5 0 0", "-.52 1.05", 240, 6, ".1 0 -.13", -3.8, 0.145),
        ("ffoot", ".13 0 -.18", "-.5 .5", 60, 1.5, ".045 0 -.07", -0.6, 0.07),
        ("fshin", "-.14 0 -.24", "-1.2 .87", 120, 3, ".065 0 -.09", -0.6, 0.106),
        ("fthigh", ".5 0 0", "-1 .7", 180, 4.5, "-.07 0 -.12", 0.52, 0.133)):
        joint = f'range="{limits}" stiffness="{stiffness}" damping="{damping}"'
        chain = link(name, pos, joint, f'pos="{center}" euler="0 {pitch} 0" size=".046 {half_length}"', chain)
        if name.endswith("thigh"):
            legs, chain = legs + chain, ""
    torso = """<geom name="torso" fromto="-.5 0 0 .5 0 0" size=".046"/>
      <geom name="head" pos=".6 0 .1" euler="0 .87 0" size=".046 .15"/>"""
    default = """<joint axis="0 1 0" armature=".1" limited="true" solimplimit="0 .8 .03"/>
    <geom type="capsule" conaffinity="0" friction=".4 .1 .1" solimp="0 .8 .01" density="660.8849500774735"/>"""
    motors = make_motors({"bthigh": 120, "bshin": 90, "bfoot": 60, "fthigh": 120, "fshin": 60, "ffoot": 30})
    return MJCF.format(name="half_cheetah", angle="radian", option='timestep=".01" integrator="Euler"', default=default,
                       most=1, height=0.7, floor='size="40 40 40"', root=planar(0), bodies=torso + legs, motors=motors)

def upright_mjcf(name: str, legs: list[str], default: str, floor: str, ankle: float, foot: str, gear: int) -> str:
    """Hopper (one leg) or Walker2d (two in one plane). ankle: its distance behind the foot's origin; gear in Nm."""
    bodies, gears, bend = '<geom name="torso" size=".05 .2"/>', {}, 'range="-150 0"'
    for leg in legs:
        flex = f'pos="-{ankle} 0 .1" range="-45 45"'
        toes = link("foot" + leg, f"{ankle} 0 -.35", flex, f'quat=".7071067811865475 0 -.7071067811865475 0" {foot}')
        shin = link("leg" + leg, "0 0 -.7", f'pos="0 0 .25" {bend}', 'size=".04 .25"', toes)
        bodies += link("thigh" + leg, "0 0 -.2", bend, 'pos="0 0 -.225" size=".05 .225"', shin)
        gears |= dict.fromkeys([part + leg for part in ("thigh", "leg", "foot")], gear)
    return MJCF.format(name=name, angle="degree", option='timestep=".002" integrator="RK4"', default=default, most=1,
                       height=1.25, floor=floor, root=planar(1.25), bodies=bodies, motors=make_motors(gears))

def ant_mjcf() -> str:
    """14 degrees of freedom; four legs of a stub, an upper and a lower part. 0.9 kg, outweighed by the armature."""
    bodies = '<geom name="torso" type="sphere" size=".25"/>'
    for leg, (x, y) in enumerate(((0.2, 0.2), (-0.2, 0.2), (-0.2, -0.2), (0.2, -0.2)), 1):
        bend = f'axis="{-1 if x * y > 0 else 1} 1 0" range="{"30 70" if x > 0 else "-70 -30"}"'
        lower = link(f"ankle_{leg}", f"{x} {y} 0", bend, f'fromto="0 0 0 {2 * x} {2 * y} 0"')
        upper = link(f"hip_{leg}", f"{x} {y} 0", 'axis="0 0 1" range="-30 30"', f'fromto="0 0 0 {x} {y} 0"', lower)
        bodies += f'<body><geom name="stub_{leg}" fromto="0 0 0 {x} {y} 0"/>{upper}</body>'
    default = """<joint armature="1" damping="1" limited="true"/>
    <geom type="capsule" size=".08" conaffinity="0" density="5" friction="1 .5 .5" margin=".01"/>"""
    gears = {f"{part}_{leg}": 150 for leg in (4, 1, 2, 3) for part in ("hip", "ankle")}
    return MJCF.format(
        name="ant", angle="degree", option='timestep=".01" integrator="RK4"', default=default, most=1, height=0.75,
        floor='size="40 40 40"', root=FREE.format('margin=".01"'), bodies=bodies, motors=make_motors(gears))

def humanoid_mjcf() -> str:
    """23 degrees of freedom, 42 kg. The original's tendons are left out: they act on nothing and are not observed."""
    def joint(name, axis, limits, stiffness, damping, armature, pos="0 0 0"):
        return (f'<joint name="{name}" axis="{axis}" range="{limits}" stiffness="{stiffness}" damping="{damping}" '
                f'armature="{armature}" pos="{pos}"/>')
    legs = arms = ""
    gears = {"abdomen_y": 100, "abdomen_z": 100, "abdomen_x": 100}
    for side, y, stiffness, armature in ("right", -1, 0, 0.008), ("left", 1, 1, 0.01):  # uneven in the original, too
        knee = joint(f"{side}_knee", "0 -1 0", "-160 -2", stiffness, 1, 0.006, "0 0 .02")
        hips = (joint(f"{side}_hip_x", f"{-y} 0 0", "-25 5", 10, 5, 0.01)
                + joint(f"{side}_hip_z", f"0 0 {-y}", "-60 35", 10, 5, 0.01)
                + joint(f"{side}_hip_y", "0 1 0", "-110 20", 20, 5, armature))
        legs += f"""<body pos="0 {0.1 * y} -.04">{hips}
          <geom name="thigh_{side}" fromto="0 0 0 0 {-0.01 * y} -.34" size=".06"/>
          <body pos="0 {-0.01 * y} -.403">{knee}<geom name="shin_{side}" fromto="0 0 0 0 0 -.3" size=".049"/>
          <body pos="0 0 -.45"><geom name="foot_{side}" type="sphere" pos="0 0 .1" size=".075"/></body></body></body>"""
        turn = "-85 60" if y < 0 else "-60 85"
        shoulder = (joint(f"{side}_shoulder1", f"2 {-y} 1", turn, 1, 1, 0.0068)
                    + joint(f"{side}_shoulder2", f"0 {y} 1", turn, 1, 1, 0.0051))
        elbow = joint(f"{side}_elbow", f"0 -1 {-y}", "-90 50", 0, 1, 0.0028)
        arms += f"""<body pos="0 {0.17 * y} .06">{shoulder}
          <geom name="arm_{side}" fromto="0 0 0 .16 {0.16 * y} -.16" size=".04"/>
          <body pos=".18 {0.18 * y} -.18">{elbow}
          <geom name="forearm_{side}" fromto=".01 {-0.01 * y} .01 .17 {-0.17 * y} .17" size=".031"/>
          <geom name="hand_{side}" type="sphere" pos=".18 {-0.18 * y} .18" size=".04"/></body></body>"""
        hip = {"hip_x": 100, "hip_z": 100, "hip_y": 300, "knee": 200}
        gears |= {f"{side}_{name}": gear for name, gear in hip.items()}
    for side in "right", "left":
        gears |= dict.fromkeys([f"{side}_{name}" for name in ("shoulder1", "shoulder2", "elbow")], 25)
    waist = (joint("abdomen_z", "0 0 1", "-45 45", 20, 5, 0.02, "0 0 .065")
             + joint("abdomen_y", "0 1 0", "-75 30", 10, 5, 0.02, "0 0 .065"))
    abdomen_x = joint("abdomen_x", "1 0 0", "-35 35", 10, 5, 0.02, "0 0 .1")
    bodies = f"""<geom name="torso" fromto="0 -.07 0 0 .07 0" size=".07"/>
      <geom name="head" type="sphere" pos="0 0 .19" size=".09"/>
      <geom name="waist_upper" fromto="-.01 -.06 -.12 -.01 .06 -.12" size=".06"/>
      <body pos="-.01 0 -.26" quat="1 0 -.002 0">{waist}<geom name="waist_lower" fromto="0 -.06 0 0 .06 0" size=".06"/>
        <body pos="0 0 -.165" quat="1 0 -.002 0">{abdomen_x}
          <geom name="butt" fromto="-.02 -.07 0 -.02 .07 0" size=".09"/>{legs}</body></body>{arms}"""
    default = '<joint limited="true"/><geom type="capsule" condim="1" margin=".001"/>'
    option = 'timestep=".003" integrator="RK4" solver="PGS" iterations="50"'
    return MJCF.format(name="humanoid", angle="degree", option=option, default=default, most=0.4, height=1.4,
                       floor='size="20 20 .125" friction="1 .1 .1"', root=FREE.format(""), bodies=bodies,
                       motors=make_motors(gears))

@dataclasses.dataclass(frozen=True)
class Task:
    """What tells one task from another: Gymnasium's numbers, and how it learns best."""
    mjcf: str
    healthy: tuple[float, float, float, float]  # z min, z max in m; |pitch| in rad (|w| of a free root); |all but x, z|
    frame_skip: int = 4  # physics steps in one environment step
    forward_reward: float = 1.0  # weight of the velocity
    ctrl_cost: float = 1e-3  # weight of the squared action
    contact_cost: float = 0.0  # weight of the squared contact wrenches; like Humanoid's, it costs 10 at most
    healthy_reward: float = 1.0  # of each step
    hidden: int = 1  # coordinates that are not observed: x, and y of a robot in space; the next one is z
    position: tuple[str | int, ...] = ("qpos", 0)  # MuJoCo's field, and where in it, that says how far the robot is
    senses: tuple[tuple[str, int], ...] = ()  # MuJoCo's fields that are observed besides coordinates, each from where
    contact_clip: float = math.inf  # bound of the sensed contact wrenches
    velocity_clip: float = math.inf  # bound of the observed velocities
    reset_noise: float = 5e-3
    gaussian_velocity: bool = False  # at reset; else uniform
    time_limit: int = 1000  # steps
    num_envs: int = Args.num_envs  # what these flags are where they are not given
    num_steps: int = Args.num_steps
    learning_rate: float = Args.learning_rate
    total_timesteps: int = Args.total_timesteps

UPRIGHT = {"velocity_clip": 10.0, "num_envs": 128, "num_steps": 32}
TASKS = {
    "HalfCheetah": Task(
        cheetah_mjcf(), (-math.inf, math.inf, math.inf, math.inf), frame_skip=5, ctrl_cost=0.1, healthy_reward=0.0,
        reset_noise=0.1, gaussian_velocity=True),
    "Hopper": Task(healthy=(0.7, math.inf, 0.2, 100.0), **UPRIGHT, mjcf=upright_mjcf(
        "hopper", [""], """<joint axis="0 -1 0" armature="1" damping="1" limited="true"/>
    <geom type="capsule" condim="1" margin=".001" friction=".9" solimp=".8 .8 .01"/>""",
        'size="20 20 .125" friction="1"', 0.13, 'pos="-.065 0 .1" size=".06 .195" friction="2"', 200)),
    "Walker2d": Task(healthy=(0.8, 2.0, 1.0, math.inf), **UPRIGHT, mjcf=upright_mjcf(
        "walker2d", ["", "_left"], """<joint axis="0 -1 0" armature=".01" damping=".1" limited="true"/>
    <geom type="capsule" conaffinity="0" friction=".9 .1 .1"/>""",
        'size="40 40 40" friction=".7 .1 .1"', 0.2, 'pos="-.1 0 .1" size=".06 .1" friction="1.9 .1 .1"', 100)),
    "Ant": Task(
        ant_mjcf(), (0.2, 1.0, math.inf, math.inf), frame_skip=5, ctrl_cost=0.5, contact_cost=5e-4, hidden=2,
        position=("xpos", 1, 0), senses=(("cfrc_ext", 1),), contact_clip=1.0, reset_noise=0.1, gaussian_velocity=True,
        num_envs=128, num_steps=32, learning_rate=2e-4, total_timesteps=3_000_000),
    "Humanoid": Task(
        humanoid_mjcf(), (1.0, 2.0, math.inf, math.inf), frame_skip=5, forward_reward=1.25, ctrl_cost=0.1,
        contact_cost=5e-7, healthy_reward=5.0, hidden=2, position=("subtree_com", 0, 0),
        senses=(("cinert", 1), ("cvel", 1), ("qfrc_actuator", 6), ("cfrc_ext", 1)), reset_noise=0.01,
        num_envs=128, num_steps=32, learning_rate=5e-4, total_timesteps=2_000_000),
}

def load_model(task: Task) -> mujoco.MjModel:
    """The task's model, Gymnasium's."""
    return mujoco.MjModel.from_xml_string(task.mjcf)

# ---- 3. Environment -------------------------------------------------------------------------------------------------
@struct.dataclass
class Physics:
    """The smallest state that determines the future; each step computes everything else in mjx.Data anew."""
    qpos: jax.Array  # [nq] m and rad
    qvel: jax.Array  # [nv] m/s and rad/s
    qacc_warmstart: jax.Array  # [nv] where the constraint solver starts

@struct.dataclass
class State:
    """One world between two steps; names are MuJoCo Playground's."""
    data: Physics
    obs: jax.Array  # [O]
    reward: jax.Array
    done: jax.Array  # float, 1 if the episode terminated; the time limit is told apart, in info
    metrics: dict[str, jax.Array]  # the reward's terms
    info: dict[str, jax.Array]  # elapsed: steps since the reset; truncated: by the time limit; broken: see Env; x in m

def sense(task: Task, field, xp=jnp):
    """How far one robot is, in m, and what it senses besides coordinates, as one vector for each of task.senses. field
    gives MuJoCo's arrays by name. As in Gymnasium they tell of the moment whose forces were computed last: by
    Runge-Kutta the end of the step as its last stage guesses it, by Euler's method the start of the last physics step.
    xp is jax.numpy or numpy."""
    source, *index = task.position
    senses = {name: field(name)[first:].reshape(-1) for name, first in task.senses}
    if "cfrc_ext" in senses:  # of each body, its contacts' torque and force about the robot's centre of mass
        senses["cfrc_ext"] = xp.clip(senses["cfrc_ext"], -task.contact_clip, task.contact_clip)
    return field(source)[tuple(index)], senses

def observe(task: Task, qpos, qvel, senses: dict, xp=jnp):
    """Coordinates but those that tell where the robot is, velocities, senses: [..., nq], [..., nv] -> [..., O]."""
    velocities = xp.clip(qvel, -task.velocity_clip, task.velocity_clip)
    return xp.concatenate([qpos[..., task.hidden:], velocities, *(senses[name] for name, _ in task.senses)], axis=-1)

def is_healthy(task: Task, qpos, qvel, xp=jnp):
    """Whether the episode goes on: [..., nq], [..., nv] -> bool [...]."""
    (min_z, max_z, max_pitch, bound), z, rest = task.healthy, qpos[..., task.hidden], qpos[..., task.hidden + 1:]
    bounded = (xp.abs(xp.concatenate([rest, qvel], axis=-1)) < bound).all(axis=-1)
    return bounded & (min_z < z) & (z < max_z) & (xp.abs(rest[..., :1]) < max_pitch).all(axis=-1)

def reward_terms(task: Task, x_velocity, action, healthy, senses: dict, xp=jnp) -> dict:
    """The reward is their sum. x_velocity [...] in m/s, action [..., A] after clipping, healthy bool [...]."""
    terms = {"reward_forward": task.forward_reward * x_velocity,
             "reward_ctrl": -task.ctrl_cost * xp.square(action).sum(axis=-1),
             "reward_survive": task.healthy_reward * healthy}
    if task.contact_cost:
        cost = task.contact_cost * xp.square(senses["cfrc_ext"]).sum(axis=-1)
        terms["reward_contact"] = -xp.minimum(cost, 10.0)
    return terms

# shared: physics
def physics_step(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """One step of one world's physics, in full precision (TF32 would be too rough). onekernel's is MJX's with a solver
    that ends as soon as it has converged, and with C MuJoCo's frame of friction for steep capsules."""
    if onekernel:
        return onekernel.mjx.step(model, data)
    with jax.default_matmul_precision("highest"):
        return mjx.step(model, data)

@cache
def kernel(function):
    """A function of one world, as one kernel for all worlds: jax.vmap(kernel(env.step))(states, actions)."""
    return onekernel.compile(function) if onekernel else function
# end shared

class Env:
    """One world of a task; `reset` and `step` are pure, for jax.vmap, and the object holds nothing that changes.
    A world that is not finite, or faster than MAX_SPEED, is broken: its step ends the episode, earns nothing, and the
    observation stays."""
    MAX_SPEED = 200.0  # m/s and rad/s
    def __init__(self, env_id: str):
        self.task, self.gymnasium_id = TASKS[env_id], env_id + "-v5"
        model = load_model(self.task)
        model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON  # for Humanoid: its solver, PGS, MJX has not
        self.control_dt = model.opt.timestep * self.task.frame_skip  # s
        assert model.na == 0, "Physics has no place for the state of actuators"
        assert np.ptp(model.actuator_ctrlrange * [-1, 1]) == 0, "all motors take actions from -max_action to max_action"
        self.action_size, self.max_action = model.nu, float(model.actuator_ctrlrange[0, 1])
        device, self.init_qpos = jax.local_devices()[0], np.array(model.qpos0)
        self.model = mjx.put_model(model, device, impl="jax")
        self.template = mjx.make_data(self.model, device)
        self.observation_size = jax.eval_shape(kernel(self.reset), jax.random.key(0)).obs.size

    def sense(self, full: mjx.Data) -> tuple[jax.Array, dict[str, jax.Array]]:
        return sense(self.task, (vars(full._impl) | vars(full)).__getitem__)  # MJX keeps some fields in _impl

    def reset(self, key: jax.Array) -> State:
        """A new episode, with Gymnasium's noise. key: one PRNG key."""
        qpos_key, qvel_key = jax.random.split(key)
        noise = partial(jax.random.uniform, minval=-self.task.reset_noise, maxval=self.task.reset_noise)
        qpos = self.init_qpos + noise(qpos_key, (self.model.nq,))
        gaussian = self.task.reset_noise * jax.random.normal(qvel_key, (self.model.nv,))
        qvel = gaussian if self.task.gaussian_velocity else noise(qvel_key, (self.model.nv,))
        data, zero, no = Physics(qpos, qvel, jnp.zeros_like(qvel)), jnp.zeros(()), jnp.array(False)
        full = smooth.kinematics(self.model, self.template.replace(qpos=qpos, qvel=qvel))  # there are no forces yet
        x, senses = self.sense(smooth.com_vel(self.model, smooth.com_pos(self.model, full)))
        metrics = dict.fromkeys(reward_terms(self.task, zero, jnp.zeros(self.action_size), no, senses), zero)
        info = {"elapsed": jnp.zeros((), jnp.int32), "truncated": no, "broken": no, "x": x}
        return State(data, observe(self.task, qpos, qvel, senses), reward=zero, done=zero, metrics=metrics, info=info)

    def advance(self, data: Physics, action: jax.Array) -> tuple[Physics, jax.Array, dict[str, jax.Array]]:
        """frame_skip steps of physics, and what `sense` tells then."""
        def substep(carry, _):
            data, full = carry
            full = physics_step(self.model, full.replace(**vars(data), ctrl=action))
            return (Physics(full.qpos, full.qvel, full.qacc_warmstart), full), None
        (data, full), _ = jax.lax.scan(substep, (data, self.template), None, length=self.task.frame_skip)
        wrenches = "cfrc_ext" in dict(self.task.senses)
        return data, *self.sense(smooth.rne_postconstraint(self.model, full) if wrenches else full)

    def step(self, state: State, action: jax.Array) -> State:
        """One control step. action [A] in [-max_action, max_action]: the motors' torques as shares of their gear."""
        data, x, senses = self.advance(state.data, action)
        source, *index = self.task.position
        if source == "qpos":  # sense has the last evaluation's; this one is known at the end of the step
            x = data.qpos[tuple(index)]
        obs = observe(self.task, data.qpos, data.qvel, senses)
        finite = jnp.isfinite(data.qpos).all() & jnp.isfinite(obs).all()
        sane = finite & (jnp.abs(data.qvel) < self.MAX_SPEED).all()  # False for NaN, too
        healthy = is_healthy(self.task, data.qpos, data.qvel)
        terms = reward_terms(self.task, (x - state.info["x"]) / self.control_dt, action, healthy, senses)
        terms = {name: jnp.where(sane, term, 0.0) for name, term in terms.items()}
        done, elapsed = jnp.where(healthy & sane, 0.0, 1.0), state.info["elapsed"] + 1
        info = {"elapsed": elapsed, "truncated": elapsed >= self.task.time_limit, "broken": ~sane, "x": x}
        obs = jnp.where(sane, obs, state.obs)
        return State(data, obs, reward=sum(terms.values()), done=done, metrics=terms, info=info)

# ---- 4. Running statistics ------------------------------------------------------------------------------------------
# shared: statistics
@struct.dataclass
class RunningStats:
    """Mean and variance of all that was seen so far."""
    count: jax.Array
    mean: jax.Array
    var: jax.Array

def update_stats(stats: RunningStats, batch: jax.Array) -> RunningStats:
    """Merge in all devices' batches [T, N, ...]. Source: Chan, Golub and LeVeque's parallel variance."""
    count = batch.shape[0] * batch.shape[1] * jax.lax.axis_size("devices")
    mean = jax.lax.pmean(batch.mean(axis=(0, 1)), "devices")
    var = jax.lax.pmean(jnp.square(batch - mean).mean(axis=(0, 1)), "devices")
    share, delta = count / (stats.count + count), mean - stats.mean
    merged_var = (1 - share) * stats.var + share * var + share * (1 - share) * jnp.square(delta)
    return RunningStats(stats.count + count, stats.mean + share * delta, merged_var)

def normalize(stats: RunningStats, obs: jax.Array) -> jax.Array:
    return jnp.clip((obs - stats.mean) / jnp.sqrt(stats.var + 1e-8), -10.0, 10.0)
# end shared

# ---- 5. Networks ----------------------------------------------------------------------------------------------------
class MLP(nn.Module):
    """Tanh layers with orthogonal weights: [..., O] -> [..., out]. gain scales the weights of the last layer."""
    hidden_sizes: tuple[int, ...]
    out: int
    gain: float
    @nn.compact
    def __call__(self, x):
        for width in self.hidden_sizes:
            x = jnp.tanh(nn.Dense(width, kernel_init=nn.initializers.orthogonal(math.sqrt(2)))(x))
        return nn.Dense(self.out, kernel_init=nn.initializers.orthogonal(self.gain))(x)

def make_networks(args: Args, env: Env) -> tuple[MLP, MLP]:
    """Actor and critic; they share nothing. The actor's first means are near 0, so its first actions are all noise."""
    return MLP(args.hidden_sizes, env.action_size, gain=0.01), MLP(args.hidden_sizes, 1, gain=1.0)

def log_prob(mean: jax.Array, log_std: jax.Array, action: jax.Array) -> jax.Array:
    """Log density of a diagonal Gaussian. mean, action [..., A], log_std [A] -> [...]."""
    z = (action - mean) * jnp.exp(-log_std)
    return (-0.5 * jnp.square(z) - log_std - 0.5 * math.log(2 * math.pi)).sum(axis=-1)

# ---- 6. Training state ----------------------------------------------------------------------------------------------
@struct.dataclass
class Learner:
    """What is learnt; the same on every device."""
    params: dict  # actor and critic (Flax parameters), log_std [A] (whatever the observation)
    opt_state: optax.OptState  # of the parameters as one vector
    obs_stats: RunningStats  # [O]
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
    """A random order of `size` things, int32 [size]. It sorts one array of random bits followed by the thing's own
    number: five times as fast on a CPU as jax.random.permutation, which sorts pairs, twice."""
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
    actor, critic = make_networks(args, env)
    obs, n = jnp.zeros(env.observation_size), args.num_envs
    params = {"actor": actor.init(actor_key, obs), "critic": critic.init(critic_key, obs)}
    params["log_std"] = jnp.full(env.action_size, args.init_log_std, jnp.float32)  # with a type, as a checkpoint has it
    opt_state = make_optimizer(args).init(ravel_pytree(params)[0])
    env_state = jax.vmap(kernel(env.reset))(jax.random.split(reset_key, n))
    # The worlds' clocks start at random, so that their time limits do not come all at once.
    env_state.info["elapsed"] = jax.random.randint(clock_key, (n,), 0, env.task.time_limit)
    stats = [RunningStats(jnp.float32(1e-4), jnp.zeros(shape), jnp.ones(shape)) for shape in (obs.shape, ())]
    learner = Learner(params, opt_state, *stats, shuffle_key, jnp.zeros((), jnp.int32))
    zeros, counts = jnp.zeros(n), jnp.zeros(n, jnp.int32)
    return TrainState(learner, Worlds(env_state, jax.random.split(world_key, n), zeros, zeros, counts, counts))

# ---- 7. Rollout -----------------------------------------------------------------------------------------------------
@struct.dataclass
class Transition:
    """One step of the worlds: what was seen and done, and what came of it."""
    obs: jax.Array  # [O]
    action: jax.Array  # [A], as sampled; the environment gets it clipped to [-1, 1], times its largest action
    logprob: jax.Array
    start: State  # where the step began
    end: Worlds  # where it ended, before any reset, with its reward, observation, episode return, ...
    terminated: jax.Array  # bool
    done: jax.Array  # bool: terminated, or at the time limit
    finished: jax.Array  # bool: done after a whole episode, neither broken nor started on a staggered clock

def rollout(args: Args, env: Env, learner: Learner, worlds: Worlds) -> tuple[Worlds, Transition]:
    """num_steps steps of the policy in all worlds, each episode from a fresh reset. Returns transitions [T, N, ...]."""
    (actor, _), log_std = make_networks(args, env), learner.params["log_std"]
    def step(worlds: Worlds, _):
        key, action_key, reset_key = jnp.unstack(jax.vmap(partial(jax.random.split, num=3))(worlds.key), axis=1)
        obs = worlds.env_state.obs
        mean = actor.apply(learner.params["actor"], normalize(learner.obs_stats, obs))
        noise = jax.vmap(partial(jax.random.normal, shape=log_std.shape))(action_key)
        action = mean + jnp.exp(log_std) * noise
        state = jax.vmap(kernel(env.step))(worlds.env_state, env.max_action * jnp.clip(action, -1.0, 1.0))
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
        logprob = log_prob(mean, log_std, action)
        transition = Transition(obs, action, logprob, worlds.env_state, end, terminated, done, finished)
        return select(done, fresh, end), transition
    return jax.lax.scan(step, worlds, None, length=args.num_steps)

# ---- 8. Advantages --------------------------------------------------------------------------------------------------
# shared: advantages
def compute_gae(args: Args, reward, value, next_value, terminated, done) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates (arXiv:1506.02438, equation 16) and value targets of a rollout; all are [T, N].
    next_value is that of the state where the step ended, before any reset: after a termination nothing is to come, but
    an episode that the time limit cuts keeps what that state promised. All but the flags are in scaled reward."""
    def backwards(next_advantage, step):
        reward, value, next_value, terminated, done = step
        delta = reward + args.gamma * jnp.where(terminated, 0.0, next_value) - value
        advantage = delta + args.gamma * args.gae_lambda * jnp.where(done, 0.0, next_advantage)
        return advantage, advantage
    steps = (reward, value, next_value, terminated, done)
    _, advantage = jax.lax.scan(backwards, jnp.zeros_like(reward[0]), steps, reverse=True)
    return advantage, advantage + value
# end shared

# ---- 9. Loss and update ---------------------------------------------------------------------------------------------
@struct.dataclass
class Batch:
    """What the loss needs of each transition."""
    obs: jax.Array  # [O], normalised
    action: jax.Array  # [A]
    logprob: jax.Array  # under the policy that acted
    value: jax.Array  # by the critic before the update
    advantage: jax.Array
    target: jax.Array  # of the value

def ppo_loss(args: Args, env: Env, params: dict, mb: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """PPO's loss (arXiv:1707.06347, equations 7 and 9) and metrics; approx_kl: joschu.net/blog/kl-approx.html."""
    (actor, critic), log_std = make_networks(args, env), params["log_std"]
    value = critic.apply(params["critic"], mb.obs)[..., 0]
    logratio = log_prob(actor.apply(params["actor"], mb.obs), log_std, mb.action) - mb.logprob
    ratio = jnp.exp(logratio)
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -jnp.minimum(mb.advantage * ratio, mb.advantage * clipped_ratio).mean()
    value_error = jnp.square(value - mb.target)
    if args.clip_vloss:
        clipped_value = mb.value + jnp.clip(value - mb.value, -args.clip_coef, args.clip_coef)
        value_error = jnp.maximum(value_error, jnp.square(clipped_value - mb.target))
    value_loss = 0.5 * value_error.mean()
    entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    return loss, {
        "losses/loss": loss, "losses/policy_loss": policy_loss, "losses/value_loss": value_loss,
        "losses/entropy": entropy, "losses/clipfrac": (jnp.abs(ratio - 1) > args.clip_coef).mean(),
        "losses/old_approx_kl": -logratio.mean(), "losses/approx_kl": (ratio - 1 - logratio).mean()}

def update_epochs(args: Args, env: Env, learner: Learner, batch: Batch) -> tuple[Learner, dict[str, jax.Array]]:
    """All epochs over a batch [B, ...], each device on its share. Metrics are means over all minibatches in use."""
    learning_rate = args.learning_rate * (1 - learner.iteration / float(args.num_iterations) if args.anneal_lr else 1.0)
    # As one vector the gradient takes one exchange between devices, not one a layer: 5x on two CPU cores.
    vector, unravel = ravel_pytree(learner.params)
    def minibatch_step(carry, mb: Batch):
        vector, opt_state, stopped = carry
        gradient, metrics = jax.grad(ppo_loss, argnums=2, has_aux=True)(args, env, unravel(vector), mb)
        gradient = jax.lax.pmean(ravel_pytree(gradient)[0], "devices")
        direction, next_opt_state = make_optimizer(args).update(gradient, opt_state)
        updated = (vector - learning_rate * direction, next_opt_state)
        if args.target_kl is not None:
            updated = jax.tree.map(partial(jnp.where, stopped), (vector, opt_state), updated)
        metrics |= {"losses/grad_norm": jnp.linalg.norm(gradient)}
        return (*updated, stopped), (metrics, ~stopped, next_opt_state.notfinite_count)
    def epoch(carry, key):
        order = shuffle(key, len(batch.obs))
        shuffled = jax.tree.map(lambda x: x[order].reshape(args.num_minibatches, -1, *x.shape[1:]), batch)
        (vector, opt_state, stopped), (metrics, *rest) = jax.lax.scan(minibatch_step, carry, shuffled)
        if args.target_kl is not None:
            stopped |= jax.lax.pmean(metrics["losses/approx_kl"].mean(), "devices") > args.target_kl
        return (vector, opt_state, stopped), (metrics, *rest)
    key = jax.random.fold_in(jax.random.fold_in(learner.key, learner.iteration), jax.lax.axis_index("devices"))
    carry, keys = (vector, learner.opt_state, jnp.array(False)), jax.random.split(key, args.update_epochs)
    (vector, opt_state, _), (metrics, used, skipped) = jax.lax.scan(epoch, carry, keys)
    metrics = {tag: (values * used).sum() / used.sum() for tag, values in metrics.items()} | {
        "charts/learning_rate": jnp.asarray(learning_rate), "charts/skipped_in_a_row": skipped.max(),
        "charts/skipped_updates": opt_state.total_notfinite}
    return learner.replace(params=unravel(vector), opt_state=opt_state, iteration=learner.iteration + 1), metrics

# ---- 10. One training iteration -------------------------------------------------------------------------------------
# shared: black_box
def black_box(start: State, action: jax.Array, broken: jax.Array) -> dict:
    """What the first world to break went through, for `dump`: of all worlds [T, N, ...] -> [1, T, ...], so that the
    first axis is that of the devices."""
    world = jnp.unravel_index(jnp.argmax(broken), broken.shape)[1]
    return jax.tree.map(lambda x: x[None, :, world], {"start": start, "action": action, "broken": broken})
# end shared

def device_iteration(args: Args, env: Env, state: TrainState) -> tuple[TrainState, dict, dict]:
    """Rollout, advantages and update with one device's worlds. Returns metrics over all devices, by tag, and this
    one's black box."""
    learner, pmean = state.learner, partial(jax.lax.pmean, axis_name="devices")
    worlds, steps = rollout(args, env, learner, state.worlds)
    reward, return_stats = steps.end.env_state.reward, learner.return_stats
    if args.norm_reward:
        return_stats = update_stats(return_stats, steps.end.discounted_return)
        reward = jnp.clip(reward / jnp.sqrt(return_stats.var + 1e-8), -10.0, 10.0)
    _, critic = make_networks(args, env)
    obs, end_obs = normalize(learner.obs_stats, jnp.stack([steps.obs, steps.end.env_state.obs]))
    value, next_value = critic.apply(learner.params["critic"], jnp.stack([obs, end_obs]))[..., 0]
    advantage, target = compute_gae(args, reward, value, next_value, steps.terminated, steps.done)
    target_var = pmean(jnp.square(target - pmean(target.mean())).mean())
    explained_variance = 1 - pmean(jnp.square(target - value).mean()) / (target_var + 1e-8)
    if args.norm_adv:
        advantage -= pmean(advantage.mean())
        advantage /= jnp.sqrt(pmean(jnp.square(advantage).mean())) + 1e-8
    batch = Batch(obs, steps.action, steps.logprob, value, advantage, target)
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)  # [T, N, ...] -> [B, ...]
    learner, metrics = update_epochs(args, env, learner, batch)
    # Only now, since the policy that acted and the one that learns must see the same normalised observations.
    obs_stats = update_stats(learner.obs_stats, steps.obs) if args.norm_obs else learner.obs_stats
    metrics |= {name.replace("_", "/", 1): term.mean() for name, term in steps.end.env_state.metrics.items()}
    returns, lengths = steps.finished * steps.end.episode_return, steps.finished * steps.end.episode_length
    sums = (steps.finished.sum(), returns.sum(), lengths.sum(), worlds.broken.sum())
    episodes, returns, lengths, broken = jax.lax.psum(sums, "devices")
    metrics = pmean(metrics) | {
        "losses/explained_variance": explained_variance, "charts/nan_resets": broken,
        "charts/episodic_return": returns / episodes,  # NaN, and not logged, where no episode has finished
        "charts/episodic_length": lengths / episodes, "charts/episodes_finished": episodes}
    box = black_box(steps.start, env.max_action * jnp.clip(steps.action, -1.0, 1.0), steps.end.env_state.info["broken"])
    return TrainState(learner.replace(obs_stats=obs_stats, return_stats=return_stats), worlds), metrics, box

@partial(jax.jit, static_argnames=("args", "env", "mesh"), donate_argnames="state")
def train_iteration(args: Args, env: Env, mesh: Mesh, state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
    """One iteration as one program over the mesh's devices; `state` is donated, its memory is used again."""
    run = jax.shard_map(partial(device_iteration, args, env), mesh=mesh, in_specs=(STATE_SPEC,),
                        out_specs=(STATE_SPEC, P(), P("devices")), check_vma=False)
    state, metrics, box = run(state)
    return state, metrics | {"black_box": box}

# ---- 11. Evaluation -------------------------------------------------------------------------------------------------
def export_policy(env: Env, learner: Learner) -> dict[str, np.ndarray]:
    """All that the deterministic policy needs: the largest action, the normaliser, layers w0, b0, w1, ..."""
    policy = {"max_action": np.float32(env.max_action), "obs_mean": learner.obs_stats.mean}
    policy["obs_var"] = learner.obs_stats.var
    for name, layer in learner.params["actor"]["params"].items():  # Dense_0, Dense_1, ...
        policy |= {name.replace("Dense_", "w"): layer["kernel"], name.replace("Dense_", "b"): layer["bias"]}
    return jax.device_get(policy)

def act(policy: dict, obs, xp=np):
    """The policy's mean action for raw observations: [..., O] -> [..., A]. NumPy is enough to run it."""
    x = xp.clip((obs - policy["obs_mean"]) / xp.sqrt(policy["obs_var"] + 1e-8), -10.0, 10.0)
    last = len(policy) // 2 - 2
    for i in range(last):
        x = xp.tanh(x @ policy[f"w{i}"] + policy[f"b{i}"])
    return policy["max_action"] * xp.clip(x @ policy[f"w{last}"] + policy[f"b{last}"], -1.0, 1.0)

class CMujocoEnv:
    """The task in C MuJoCo, on the original model, with the interface of Gymnasium."""
    def __init__(self, env: Env):
        self.env, self.task, self.model = env, env.task, load_model(env.task)
        self.data, self.elapsed, self.start = mujoco.MjData(self.model), 0, jax.jit(kernel(env.reset))
        self.observe()

    def reset(self, seed: int):
        start = jax.device_get(self.start(jax.random.key(seed)).data)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos, self.data.qvel, self.elapsed = start.qpos, start.qvel, 0
        mujoco.mj_forward(self.model, self.data)
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        self.x, self.senses = sense(self.task, partial(getattr, self.data), np)
        return observe(self.task, self.data.qpos, self.data.qvel, self.senses, np)

    def step(self, action):
        task, data, x = self.task, self.data, self.x
        data.ctrl, self.elapsed = action, self.elapsed + 1
        mujoco.mj_step(self.model, data, nstep=task.frame_skip)
        mujoco.mj_rnePostConstraint(self.model, data)  # for the wrenches
        obs, healthy = self.observe(), is_healthy(task, data.qpos, data.qvel, np)
        terms = reward_terms(task, (self.x - x) / self.env.control_dt, action, healthy, self.senses, np)
        return obs, sum(terms.values()), not healthy, self.elapsed >= task.time_limit, {}

# shared: evaluation
@partial(jax.jit, static_argnames="env")
def evaluate_mjx(env: Env, policy: dict, keys: jax.Array) -> jax.Array:
    """Returns of one episode for each key, in MJX with the physics of `env`: [E] keys -> [E]."""
    def step(carry, _):
        state, alive, total = carry
        state = jax.vmap(kernel(env.step))(state, act(policy, state.obs, jnp))
        return (state, alive & (state.done == 0), total + alive * state.reward), None
    start = (jax.vmap(kernel(env.reset))(keys), jnp.full(len(keys), True), jnp.zeros(len(keys)))
    return jax.lax.scan(step, start, None, length=env.task.time_limit)[0][2]

def evaluate_on_host(env, policy: dict, episodes: int, seed: int, on_step=lambda: None) -> np.ndarray:
    """Returns of deterministic episodes [E], in an environment with the interface of Gymnasium."""
    returns = np.zeros(episodes)
    for episode in range(episodes):
        (obs, _), over = env.reset(seed=seed + episode), False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(act(policy, obs))
            returns[episode], over = returns[episode] + reward, terminated or truncated
            on_step()
    return returns

def judge(args: Args, env: Env, policy: dict) -> dict[str, dict[str, float]]:
    """Evaluate in each simulator at hand; print mean, std, min and max of the returns, and return them."""
    keys, table = jax.vmap(jax.random.key)(args.seed + jnp.arange(args.eval_episodes)), {}
    returns = {"MJX": np.asarray(evaluate_mjx(env, policy, keys))}  # from the same starts as C MuJoCo
    returns["C MuJoCo"] = evaluate_on_host(CMujocoEnv(env), policy, args.eval_episodes, args.seed)
    name, installed = env.gymnasium_id, importlib.util.find_spec("gymnasium")
    if installed and name in (gymnasium := importlib.import_module("gymnasium")).registry:
        returns["Gymnasium"] = evaluate_on_host(gymnasium.make(name), policy, args.eval_episodes, args.seed)
    print(f"return of {args.eval_episodes:3} episodes     mean      std      min      max")
    for name, values in returns.items():
        table[name] = {key: float(getattr(values, key)()) for key in ("mean", "std", "min", "max")}
        print(f"{name:<22}" + "".join(f"{value:9.1f}" for value in table[name].values()))
    return table
# end shared

# shared: renderer
def make_renderer(model: mujoco.MjModel) -> mujoco.Renderer:
    """By MUJOCO_GL; without it by EGL on Linux, which needs no display."""
    with or_fail("--capture-video: no OpenGL; on Linux install libegl1, or libosmesa6 and set MUJOCO_GL=osmesa"):
        if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
            gl_context.GLContext = importlib.import_module("mujoco.egl").GLContext
        return mujoco.Renderer(model, height=480, width=640)
# end shared

def write_video(env: Env, policy: dict, seed: int, file: Path) -> None:
    """Film one episode in C MuJoCo at its real speed, with 20 (HalfCheetah, Ant) to 67 frames a second."""
    original, path = CMujocoEnv(env), []
    evaluate_on_host(original, policy, 1, seed, lambda: path.append(original.data.qpos.copy()))
    imageio = importlib.import_module("imageio")
    renderer, every = make_renderer(original.model), max(1, round(0.02 / env.control_dt))
    file.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings(action="ignore"), imageio.get_writer(file, fps=1 / (every * env.control_dt)) as video:
        for original.data.qpos in path[::every]:
            mujoco.mj_forward(original.model, original.data)
            renderer.update_scene(original.data, camera="track")
            video.append_data(renderer.render())
    print(f"video: {file}")

# shared: replay
def replay_nan(file: Path, make_env, make_original) -> None:
    """Step what nan_dump.npz holds in MJX and in C MuJoCo side by side, each from its own states, and tell where they
    part, by more than a hundredth of the largest speed."""
    with or_fail(f"--replay-nan {file}"), np.load(file, allow_pickle=False) as arrays:
        saved = dict(arrays)
        env, broken, actions = make_env(read_args(str(saved["args"]))), saved["['broken']"], saved["['action']"]
        start = jax.jit(jax.vmap(kernel(env.reset)))(jax.random.split(jax.random.key(0), len(broken)))
        start, last = from_arrays(saved, {"start": start})["start"], int(broken.argmax())
    first = max(0, last - int(start.info["elapsed"][last]))  # no reset lies between
    state = jax.tree.map(lambda x: x[first], start)
    original, parted, step = make_original(env, state), None, jax.jit(kernel(env.step))
    for name, value in vars(state.data).items():
        setattr(original.data, name, value)
    print("step  largest speed in MJX  in C MuJoCo  largest difference")
    for t, action in enumerate(actions[first:last + 1], first - last):
        state, _ = step(state, action), original.step(action)
        mine, theirs = np.asarray(state.data.qvel), original.data.qvel
        parted = t if parted is None and not np.abs(mine - theirs).max() <= 0.01 * np.abs(theirs).max() else parted
        print(f"{t:4} {np.abs(mine).max():22.3g} {np.abs(theirs).max():12.3g} {np.abs(mine - theirs).max():19.3g}")
    resets = sum(original.data.warning[kind].number for kind in (
        mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC))
    print(f"In step 0 the world broke in training. They part {'nowhere' if parted is None else f'in step {parted}'}. "
          f"C MuJoCo {'breaks too' if resets else 'does not break'}.")
# end shared

# ---- 12. Log and files ----------------------------------------------------------------------------------------------
# shared: bookkeeping
def say(text: str) -> None:
    if jax.process_index() == 0:
        print(f"[{time.perf_counter() - START:5.1f} s] {text}", flush=True)

# TensorBoard's events go to their file at once: the library's thread loses its queue when the process is killed, and a
# full disk ends it unseen. Closing the file, at the latest when Python ends, does not tell of a full disk once more.
def write_event(self: EventFileWriter, event) -> None:
    self._ev_writer.write_event(event)
def close_file(self: EventFileWriter, close=EventFileWriter.close) -> None:
    with contextlib.suppress(OSError):
        close(self)
EventFileWriter.add_event, EventFileWriter.close = write_event, close_file

class Log:
    """TensorBoard, and a progress bar or, without a terminal, plain lines. Of several processes the first writes."""
    def __init__(self, args: Args, run_dir: Path, first: int):
        self.args, self.start, self.shown, self.first_step = args, time.time(), "-", first * args.steps_per_iteration
        self.run_dir, self.dumped, quiet = run_dir, False, jax.process_index() > 0
        with writing(run_dir / "events*"):
            purge = self.first_step + 1 if first else 0  # TensorBoard forgets what an interrupted run wrote from there
            self.writer = SummaryWriter(str(run_dir), purge_step=purge, write_to_disk=not quiet)
            rows = "".join(f"\n|{name}|{value}|" for name, value in dataclasses.asdict(args).items())
            self.writer.add_text("hyperparameters", "|param|value|\n|-|-|" + rows, self.first_step)
        total = args.num_iterations * args.steps_per_iteration
        self.bar = tqdm(total=total, initial=self.first_step, unit=" steps", unit_scale=True, disable=quiet or None)

    def scalars(self, step: int, values: dict) -> None:
        with writing(self.run_dir / "events*"):
            rows = [Summary.Value(tag=tag, simple_value=float(x)) for tag, x in values.items() if math.isfinite(x)]
            self.writer.file_writer.add_summary(Summary(value=rows), step)  # in one event: ten times as fast
            self.writer.flush()

    def write(self, iteration: int, metrics: dict) -> dict:
        box, step = metrics.pop("black_box"), iteration * self.args.steps_per_iteration
        values = jax.device_get(metrics)
        sps = values["charts/SPS"] = (step - self.first_step) / (time.time() - self.start)
        self.scalars(step, values)
        if values["charts/nan_resets"] and not self.dumped:
            self.dumped = dump(self.args, self.run_dir / "nan_dump.npz", box)
        skipped = values["charts/skipped_in_a_row"]  # NaN before the first update
        require(not skipped >= 10, f"{self.run_dir}: step {step}: {skipped:.0f} gradients in a row are not finite", 1)
        self.shown = f"{values['charts/episodic_return']:.0f}" if values["charts/episodes_finished"] else self.shown
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f"return {self.shown}")
        if self.bar.disable and (iteration % 10 == 0 or step == self.bar.total):
            say(f"step {step}  return {self.shown}  SPS {sps:.0f}  time left {(self.bar.total - step) / sps:.0f} s")
        return values

def count_bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

def bare(x):
    """Keys as their numbers."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

def to_arrays(tree) -> dict[str, np.ndarray]:
    """All arrays of a tree by their names, with the shares of all processes."""
    tree = multihost_utils.process_allgather(jax.tree.map(bare, tree), tiled=True)
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}

def from_arrays(arrays: dict[str, np.ndarray], like):
    """The tree that `to_arrays` took apart, in the place of the tree `like`, of the same shapes, which it deletes."""
    def place(path, old):
        name, form = jax.tree_util.keystr(path), jax.eval_shape(bare, old)
        new = arrays[name]
        if (new.shape, new.dtype) != (form.shape, form.dtype):
            raise ValueError(f"{name} is {new.dtype} {new.shape}, not {form.dtype} {form.shape}")
        if isinstance(old, np.ndarray):
            return new
        old.delete()
        new = jax.make_array_from_callback(new.shape, old.sharding, lambda index: new[index])
        return jax.random.wrap_key_data(new) if form.dtype != old.dtype else new
    return jax.tree.map_with_path(place, like)

def writing(file: Path):
    return or_fail(f"cannot write {file}; what was saved before is whole", 1, OSError)

@contextlib.contextmanager
def replacing(file: Path):
    """A stream for what is to be in the file; it is there as a whole or not at all."""
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
    """Write what --replay-nan reads, of the first world in the run that broke: [D, T, ...] -> [T, ...], for D devices.
    Returns whether one broke."""
    arrays = to_arrays(black_box)
    broken = arrays["['broken']"]
    if broken.any() and jax.process_index() == 0 and not file.exists():
        device = broken.T.argmax() % len(broken)  # where it was first
        arrays = {name: array[device] for name, array in arrays.items()}
        write_npz(file, arrays | {"args": json.dumps(dataclasses.asdict(args))})
        say(f"a world broke; to see how: {shlex.join(['python', sys.argv[0], '--replay-nan', str(file)])}")
    return bool(broken.any())

def checkpoints(run_dir: Path) -> list[Path]:
    """The newest first."""
    return sorted((run_dir / "checkpoints").glob("[0-9]*.npz"), reverse=True)

def save(args: Args, run_dir: Path, state: TrainState, policy: dict) -> None:
    """Write a checkpoint (the whole state, and the settings) and policy.npz."""
    arrays = to_arrays(state) | {"args": json.dumps(dataclasses.asdict(args))}
    if jax.process_index() > 0:
        return
    folder = run_dir / "checkpoints"
    with writing(folder):
        folder.mkdir(exist_ok=True)
        write_npz(run_dir / "policy.npz", policy)  # first, since a resumed run starts after its checkpoint
        write_npz(folder / f"{int(state.learner.iteration):09}.npz", arrays)
        for old in [*checkpoints(run_dir)[3:], *folder.glob("*.part")]:
            old.unlink()

def restore(args: Args, run_dir: Path, state: TrainState) -> TrainState:
    """The newest whole checkpoint, in the place of `state`; or `state`, if the run was stopped before the first."""
    for file in checkpoints(run_dir):
        try:
            with np.load(file, allow_pickle=False) as arrays:
                saved = dict(arrays)  # which reads all, and compares the checksums
            ours, theirs = json.loads(json.dumps(dataclasses.asdict(args))), json.loads(str(saved["args"]))
        except Exception as error:  # there is no end to what may be wrong with a file
            say(f"--resume: {file} is broken ({type(error).__name__}: {error!s:.80}); trying the one before")
            continue
        differ = ", ".join(sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name)))
        require(not differ, f"--resume: {file} differs from run.json in {differ:.200}")
        with or_fail(f"--resume: {file} was written by other code"):
            return from_arrays(saved, state)
    require(not checkpoints(run_dir), f"--resume: {run_dir} holds no whole checkpoint")
    return state

def write_run(run_dir: Path, content: dict) -> None:
    if jax.process_index() == 0:
        with replacing(run_dir / "run.json") as stream:
            stream.write(json.dumps(content, indent=2).encode() + b"\n")

def read_args(text: str) -> Args:
    """The settings in a JSON text, checked as those of the command line are."""
    args = Args(**{name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(text).items()})
    every = typeguard.CollectionCheckStrategy.ALL_ITEMS
    for field in dataclasses.fields(args):
        with or_fail(f"setting {field.name}"):
            typeguard.check_type(getattr(args, field.name), field.type, collection_check_strategy=every)
    check_args(args)
    return args

def read_run(run_dir: Path) -> Args:
    with or_fail(f"{run_dir} is no run folder of this script"):
        return read_args(json.dumps(json.loads((run_dir / "run.json").read_text())["args"]))

# ---- 13. Command line -----------------------------------------------------------------------------------------------
def require(condition, message: str, code: int = 2) -> None:
    """Where the condition does not hold, end with one line and an exit code: 2 for bad input."""
    if not condition:
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
    text = io.StringIO()  # tyro draws a box around its errors; the first paragraph tells
    try:
        with contextlib.redirect_stderr(text):
            return tyro.cli(Args, args=argv, default=default)
    except SystemExit as stop:
        require(not stop.code, text.getvalue().split("\n", 1)[-1].split("──")[0].replace("│", ""))
        raise

# Flags of one call, which run.json does not keep.
CALL_FLAGS = "resume evaluate replay_nan smoke compile_cache coordinator_address num_processes process_id".split()

def start_jax(args: Args) -> None:
    """Settle what cannot change once JAX runs: its cache, the devices that a CPU is split into, other processes."""
    require(args.exp_name == Path(args.exp_name).name, f"--exp-name {args.exp_name}: must be a plain name")
    alone = args.coordinator_address is None and (args.num_processes, args.process_id) != (None, None)
    require(not alone, "--num-processes, --process-id: tell them --coordinator-address as well")
    jax.config.update("jax_enable_compilation_cache", args.compile_cache)
    if not args.compile_cache:
        os.environ["ONEKERNEL_CACHE"] = "0"
    if args.compile_cache and not jax.config.jax_compilation_cache_dir:
        try:
            folder = Path.home() / ".cache" / "mjx-rl"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)  # who can write there can run code here; fails if the folder is another user's
            jax.config.update("jax_compilation_cache_dir", str(folder))
        except (OSError, RuntimeError) as error:
            print(f"compiled programs are not kept, as there is no folder for them: {error}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(RuntimeError):  # JAX has started already, with the devices that it has
        each = (args.num_devices or cores) // (args.num_processes or 1)
        jax.config.update("jax_num_cpu_devices", min(max(each, 1), 64))  # one would leave the other cores idle
    if args.coordinator_address:
        with or_fail("--coordinator-address, --num-processes, --process-id"):
            jax.distributed.initialize(  # what is None, it asks SLURM or Open MPI
                None if args.coordinator_address == "auto" else args.coordinator_address, args.num_processes,
                args.process_id, heartbeat_timeout_seconds=20, shutdown_timeout_seconds=3600)
            multihost_utils.sync_global_devices("start")  # they meet now, as on CPUs Gloo waits for no more than 30 s

def on_signals(handler) -> None:
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, handler)

def listen() -> list[int]:
    """The signals that have asked to stop. The first ends the loop after its iteration, a second one the process."""
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
    """Whether to stop before this iteration. Of several processes all do if one is asked to; `stops` tells them."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(iteration):
        stops.append(signal.SIGTERM)
    return len(stops) > 0

def make_mesh(wanted: int | None, *parts: int) -> Mesh:
    """The devices that share the work: as many as wanted, or else as can be, of which each of `parts` is a multiple.
    Where there are several processes, all devices of all of them."""
    devices = jax.devices()
    least = len(devices) if jax.process_count() > 1 else 1
    fits = [n for n in range(least, len(devices) + 1) if all(part % n == 0 for part in parts)]
    message = f"--num-devices {wanted or len(devices)}: must divide {parts}; with these devices, {fits or 'none'} do"
    require(fits and (not wanted or wanted in fits), message)
    return Mesh(np.array(devices[:wanted or fits[-1]]), ("devices",))

def check_memory(mesh: Mesh | None, size: int, flag: str = "--num-envs") -> None:
    """Refuse what takes more bytes than the devices of the mesh have together, or without a mesh, the host."""
    stats = jax.local_devices()[0].memory_stats() if mesh else None  # None for a CPU
    room = stats["bytes_limit"] * mesh.size if stats else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    require(size < 0.95 * room, f"{flag}: this takes {size} bytes of the {room} that there are; try less")
# end shared

def check_args(args: Args) -> None:
    """Refuse what cannot run, before anything is built."""
    bounds = {field.name: (1, 1e9) for field in dataclasses.fields(args) if field.type in (int, int | None)}
    zero_up = "seed process_id eval_every learning_rate ent_coef vf_coef clip_coef max_grad_norm target_kl"
    bounds |= dict.fromkeys(zero_up.split(), (0, 1e9)) | dict.fromkeys(["gamma", "gae_lambda"], (0, 1))
    bounds |= {"init_log_std": (-20, 20), "total_timesteps": (1, 2**62)}
    bounds |= {"eval_episodes": (1, 1e4), "update_epochs": (1, 1e3)}
    for name, (least, most) in bounds.items():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        require(value is None or least <= value <= most, f"{flag} {value}: must be between {least} and {most}")
    widths = args.hidden_sizes and min(args.hidden_sizes) > 0 and max(args.hidden_sizes) <= 4096
    require(widths, f"--hidden-sizes {args.hidden_sizes}: must be widths up to 4096, like 64 64")
    require(args.env_id in TASKS, f"--env-id {args.env_id}: no such task")
    steps = args.steps_per_iteration
    require(args.num_iterations, f"--total-timesteps {args.total_timesteps}: less than a rollout of {steps}")
    require(steps % args.num_minibatches == 0, f"--num-minibatches {args.num_minibatches}: must divide {steps}")
    require(not args.track or importlib.util.find_spec("wandb"), "--track: wandb is missing; pip install wandb")

# ---- 14. Main and smoke test ----------------------------------------------------------------------------------------
def train(args: Args, run_dir: Path | None = None) -> tuple[Path, dict]:
    """Train from the start, or on from the newest checkpoint of run_dir. Returns the run's folder and its policy."""
    start, resuming, stops = time.time(), run_dir is not None, listen()
    if args.capture_video:
        make_renderer(load_model(TASKS[args.env_id])).close()  # better to fail now than after training
    mesh = make_mesh(args.num_devices, args.num_envs, args.steps_per_iteration // args.num_minibatches)
    args = dataclasses.replace(args, num_devices=mesh.size, **{x: getattr(Args, x) for x in CALL_FLAGS})
    run_dir = run_dir or Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__{int(start)}"
    if jax.process_index() == 0:
        with or_fail(f"--runs-dir {args.runs_dir}"):
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=run_dir if resuming else run_dir.parent).close()  # better to fail now
    slowly = "" if onekernel else "; physics by XLA, slowly, as the folder onekernel is not beside this file"
    say(f"building {args.env_id} for {mesh.size} x {mesh.devices[0].device_kind}{slowly}")
    env, key = Env(args.env_id), jax.random.key(args.seed)
    shardings = jax.tree.map(partial(NamedSharding, mesh), STATE_SPEC)
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
        compiling = pool.submit(train_iteration.lower(args, env, mesh, shapes).compile)
        state = init.result()(key)
        keys = jax.vmap(jax.random.key)(args.seed + jnp.arange(args.eval_episodes))
        evaluate = evaluate_mjx.lower(env, export_policy(env, state.learner), keys).compile()
        compiled = compiling.result()
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
        if args.eval_every and iteration % args.eval_every == 0:
            value = evaluate(export_policy(env, state.learner), keys).mean()
            log.scalars(iteration * steps, {"eval/episodic_return": value})
        if iteration % args.checkpoint_every == 0:
            log.write(*pending)  # so that the curves reach as far as the checkpoint
            pending, saved = None, iteration
            save(args, run_dir, state, export_policy(env, state.learner))
    if pending:
        log.write(*pending)
    log.bar.close()
    run["train_s"], policy = time.time() - log.start, export_policy(env, state.learner)
    if saved < iteration:
        save(args, run_dir, state, policy)
    if stops:
        log.writer.close()
        again = shlex.join(["python", sys.argv[0], "--resume", str(run_dir)])
        say(f"stopped after iteration {iteration}; to go on: {again}")
        raise SystemExit(128 + stops[0])
    on_signals(signal.SIG_DFL)
    if jax.process_index() > 0:
        return run_dir, policy  # the first one does the rest
    say(f"trained for {run['train_s']:.1f} s; policy: {run_dir / 'policy.npz'}")
    run["evaluation"] = judge(args, env, policy)
    end = iteration * steps + 1  # one later than all others, so that a run that is resumed once more replaces it
    log.scalars(end, {"eval/c_mujoco_return": run["evaluation"]["C MuJoCo"]["mean"]})
    log.writer.close()
    write_run(run_dir, run)
    if args.capture_video:
        with writing(run_dir / "videos"):
            write_video(env, policy, args.seed, run_dir / "videos" / "c_mujoco.mp4")
    return run_dir, policy

def main(argv: list[str]) -> None:
    task = TASKS[parse_args(argv).env_id]
    defaults = ("num_envs", "num_steps", "learning_rate", "total_timesteps")
    args = parse_args(argv, Args(**{name: getattr(task, name) for name in defaults}))
    check_args(args)
    if args.resume:
        saved = dataclasses.replace(read_run(Path(args.resume)), **{x: getattr(args, x) for x in CALL_FLAGS})
        unchanged = parse_args(argv, saved) == saved
        require(unchanged, "--resume: the run keeps its own settings; leave the other flags out, or start a new run")
        args = saved
    start_jax(args)
    if args.smoke:
        raise SystemExit(smoke(args))
    if args.replay_nan:
        return replay_nan(
            Path(args.replay_nan), lambda args: Env(args.env_id), lambda env, _: CMujocoEnv(env))
    if args.evaluate:
        run_dir, env = Path(args.evaluate), Env(read_run(Path(args.evaluate)).env_id)
        with or_fail(f"--evaluate {run_dir}: no policy"), np.load(run_dir / "policy.npz", allow_pickle=False) as file:
            policy = dict(file)
        judge(args, env, policy)
        if args.capture_video:
            with writing(run_dir / "videos"):
                write_video(env, policy, args.seed, run_dir / "videos" / "c_mujoco.mp4")
        return None
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
    env = Env(args.env_id)
    original, action = CMujocoEnv(env), np.full(env.action_size, 0.5 * env.max_action)
    original.reset(args.seed)
    reached = kernel(env.step)(kernel(env.reset)(jax.random.key(args.seed)), action)
    error = reached.obs - original.step(action)[0]
    error = np.abs(error[:env.model.nq - env.task.hidden + env.model.nv]).max()  # not of forces, which are large
    verdict("environment", error < 0.01, f"a step in MJX is off C MuJoCo's by {error:.1e}")
    with tempfile.TemporaryDirectory() as folder:
        short = {"num_envs": 64, "num_steps": 8, "num_minibatches": 4, "total_timesteps": 2048, "eval_episodes": 2}
        run_dir, policy = train(dataclasses.replace(args, **short, checkpoint_every=2, eval_every=2, runs_dir=folder))
        verdict("training", all(np.isfinite(x).all() for x in policy.values()), "4 iterations, the policy is finite")
        checkpoints(run_dir)[0].unlink()
        _, resumed = train(read_run(run_dir), run_dir)
    verdict("resume", all((resumed[name] == policy[name]).all() for name in policy), "the same policy, to the bit")
    returns = evaluate_on_host(original, policy, 2, args.seed).round(1)
    verdict("C MuJoCo", np.isfinite(returns).all(), f"returns {returns} on the original model")
    print("FAIL: " + ", ".join(failed) if failed else "all is well")
    return int(bool(failed))

if __name__ == "__main__":
    main(sys.argv[1:])
