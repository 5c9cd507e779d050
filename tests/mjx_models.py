"""Models on which onekernel is held to MJX, and MJX's own results for them.

    python tests/mjx_models.py [NAME ...]

writes into mjx_steps.npz, for the models of these names or for all: states of some worlds, and
what vmapped `mjx.step`, compiled by XLA, makes of them in one step and in 20. XLA takes minutes
for that; the tests read the file. tests/robots/ has small models of many kinds: tendons,
equalities, dry friction, elliptic cones, fluid, filters, meshes, mocap bodies.
"""

import sys
from pathlib import Path

import gymnasium
import mujoco
import numpy as np

HERE = Path(__file__).parent
FILE = HERE / "mjx_steps.npz"
GYMNASIUM = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
TASKS = {
    "HalfCheetah": "half_cheetah.xml",
    "Hopper": "hopper.xml",
    "Walker2d": "walker2d_v5.xml",
    "Ant": "ant.xml",
    "Humanoid": "humanoid.xml",
    "HumanoidStandup": "humanoidstandup.xml",
    "Reacher": "reacher.xml",
    "Pusher": "pusher_v5.xml",
    "Swimmer": "swimmer.xml",
    "InvertedPendulum": "inverted_pendulum.xml",
    "InvertedDoublePendulum": "inverted_double_pendulum.xml",
}
ROBOTS = sorted(path.stem for path in (HERE / "robots").glob("*.xml"))
NAMES = [*TASKS, *ROBOTS, "g1"]  # XLA had not compiled Pusher's step after half an hour: no results
WORLDS = 3
STEPS = 20
RESULTS = ("qpos", "qvel", "act", "qacc", "sensordata")


def load(name: str) -> mujoco.MjModel:
    if name == "g1":
        import ppo_mjx_unitree as unitree

        return unitree.load_model(unitree.ROBOTS["g1"], 0.005, visuals=False)
    path = GYMNASIUM / TASKS[name] if name in TASKS else HERE / "robots" / f"{name}.xml"
    model = mujoco.MjModel.from_xml_path(str(path))
    if model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:  # which MJX does not have
        model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
    return model


def draw_states(model: mujoco.MjModel) -> dict[str, np.ndarray]:
    """Near the model's start, in motion, with controls in the actuators' ranges; [WORLDS, n] each."""
    random = np.random.default_rng(0)
    qpos = np.array(model.qpos0 if not model.nkey else model.key_qpos[0])
    low, high = model.actuator_ctrlrange.T if model.nu else np.zeros((2, 0))
    limited = high > low
    shape = (WORLDS, model.nu)
    ctrl = random.uniform(np.where(limited, low, -1), np.where(limited, high, 1), shape)
    states = {
        "qpos": qpos + 0.02 * random.standard_normal((WORLDS, model.nq)),
        "qvel": 0.3 * random.standard_normal((WORLDS, model.nv)),
        "act": 0.1 * random.standard_normal((WORLDS, model.na)),
        "ctrl": ctrl,
    }
    return {field: values.astype(np.float32) for field, values in states.items()}


def one_world(model: mujoco.MjModel, step):
    """A function of one world's state: state -> (state, results) by `step`, a function like mjx.step."""
    from mujoco import mjx

    mjx_model = mjx.put_model(model)
    template = mjx.make_data(mjx_model)

    def advance(state: dict) -> tuple[dict, dict]:
        after = step(mjx_model, template.replace(**state))
        warmstart = after.qacc_warmstart
        state = {field: getattr(after, field) for field in ("qpos", "qvel", "act", "ctrl")}
        return state | {"qacc_warmstart": warmstart}, {x: getattr(after, x) for x in RESULTS}

    return advance


def run(advance, states: dict, model: mujoco.MjModel) -> tuple[dict, dict]:
    """The results after one step and after STEPS of them."""
    import jax
    import jax.numpy as jnp

    start = {field: jnp.asarray(values) for field, values in states.items()}
    start["qacc_warmstart"] = jnp.zeros((WORLDS, model.nv))

    @jax.jit
    def program(state):
        def turn(state, _):
            return jax.vmap(advance)(state)

        _, results = jax.lax.scan(turn, state, None, length=STEPS)
        return jax.tree.map(lambda x: x[0], results), jax.tree.map(lambda x: x[-1], results)

    return jax.tree.map(np.asarray, program(start))


def record(names: list[str]) -> None:
    from mujoco import mjx

    columns = dict(np.load(FILE)) if FILE.exists() else {}
    for name in names:
        model = load(name)
        states = draw_states(model)
        first, last = run(one_world(model, mjx.step), states, model)
        for when, results in (("state", states), ("first", first), ("last", last)):
            columns |= {f"{name}/{when}/{field}": values for field, values in results.items()}
        print(name, flush=True)
        np.savez_compressed(FILE, **columns)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    record(sys.argv[1:] or NAMES)
