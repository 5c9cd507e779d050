"""A cart with a pole to swing up, in the shape of MuJoCo Playground's environments, without it."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
from flax import struct
from mujoco import mjx


@struct.dataclass
class State:
    """As mujoco_playground.State."""

    data: mjx.Data
    obs: jax.Array  # [O]
    reward: jax.Array  # []
    done: jax.Array  # [] float
    metrics: dict[str, jax.Array]
    info: dict[str, Any]


class CartPole:
    """A cart that is to swing up a pole and to balance it, as CartpoleSwingup there."""

    MJCF = """<mujoco>
      <option timestep=".01" integrator="Euler" iterations="1">
        <flag contact="disable" constraint="disable"/>
      </option>
      <worldbody>
        <body pos="0 0 1">
          <joint name="cart" type="slide" axis="1 0 0" damping=".1"/>
          <geom type="box" size=".2 .1 .1" mass="1"/>
          <body>
            <joint name="pole" axis="0 1 0"/>
            <geom type="capsule" fromto="0 0 0 0 0 1" size=".04" mass=".1"/>
          </body>
        </body>
      </worldbody>
      <actuator><motor joint="cart" gear="10" ctrllimited="true" ctrlrange="-1 1"/></actuator>
    </mujoco>"""

    def __init__(self):
        self.mj_model = mujoco.MjModel.from_xml_string(self.MJCF)
        self.mjx_model = mjx.put_model(self.mj_model, impl="jax")
        self.action_size = self.mjx_model.nu
        self.observation_size = 5

    def reset(self, rng: jax.Array) -> State:
        """The pole hangs down, or nearly so. rng: one PRNG key."""
        rng, angle_rng = jax.random.split(rng)
        noise = jax.random.uniform(angle_rng, minval=-0.1, maxval=0.1)
        data = mjx.make_data(self.mjx_model)
        data = mjx.forward(self.mjx_model, data.replace(qpos=jnp.stack([0.0, jnp.pi + noise])))

        zero = jnp.zeros(())
        metrics = {"reward/upright": zero, "reward/centered": zero}
        return State(data, self.observe(data), zero, zero, metrics, info={"rng": rng})

    def step(self, state: State, action: jax.Array) -> State:
        """Two steps of physics. action: [1] in [-1, 1]."""
        data = state.data.replace(ctrl=action)
        for _ in range(2):
            data = mjx.step(self.mjx_model, data)

        x, angle = data.qpos
        metrics = {
            "reward/upright": 0.5 + 0.5 * jnp.cos(angle),
            "reward/centered": -0.1 * jnp.abs(x),
        }
        return state.replace(
            data=data,
            obs=self.observe(data),
            reward=sum(metrics.values()),
            done=jnp.where(jnp.abs(x) > 3.0, 1.0, 0.0),
            metrics=metrics,
        )

    def observe(self, data: mjx.Data) -> jax.Array:
        x, angle = data.qpos
        return jnp.stack([x, jnp.cos(angle), jnp.sin(angle), *data.qvel])
