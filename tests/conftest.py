"""Two XLA devices on a CPU, one cache of compiled programs, and what several test files share."""

import gc
import os
import signal
from functools import cache, partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # another choice in the environment goes first
# What compiles in less than a second is kept in the cache as well.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from quick import ENVIRONMENT

import ppo_mjx

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 2)
jax.devices()  # start the backend, so that no test changes the number of devices
# Tracing makes millions of objects that live on, and the collector would go through all of them
# again and again. So it runs after each file only, and does not look again at what has survived.
gc.disable()
gc.collect()
gc.freeze()


def pytest_configure(config):
    """What goes by XLA unasked is slow, and no test of the kernel."""
    config.addinivalue_line("filterwarnings", "error::onekernel.Fallback")


@pytest.fixture(scope="session", autouse=True)
def compilation_caches(tmp_path_factory):
    """Share compiled programs and kernels between tests, and the processes that run or start them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    os.environ.setdefault("ONEKERNEL_CACHE_DIR", str(folder / "onekernel_cache"))
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "jax_cache")
        jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drop a file's compiled programs: each maps memory, and Linux allows a process 65530 mappings, then it crashes."""
    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """pytest collects garbage five times at the end."""
    gc.freeze()


@pytest.fixture(autouse=True)
def signal_handlers():
    """Training takes over SIGINT and SIGTERM; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def make_mesh():
    """A mesh of so many devices; the test is skipped where the backend has fewer."""

    def make(size: int) -> Mesh:
        if len(jax.devices()) < size:
            pytest.skip(f"needs {size} devices")
        return Mesh(np.array(jax.devices()[:size]), ("devices",))

    return make


@pytest.fixture(scope="session")
def make_state():
    """The start of a run on a mesh, as `train` builds it."""

    def make(args: ppo_mjx.Args, env, mesh: Mesh) -> ppo_mjx.TrainState:
        shardings = jax.tree.map(partial(NamedSharding, mesh), ppo_mjx.STATE_SPEC)
        init = jax.jit(
            ppo_mjx.init_train_state, static_argnames=("args", "env"), out_shardings=shardings
        )
        return init(args, env, jax.random.key(args.seed))

    return make


@pytest.fixture(scope="module")
def one_env():
    """An environment of each task for all runs of a file, so that JAX traces once what they share."""
    build = ppo_mjx.Env
    envs = cache(lambda env_id: build(ppo_mjx.Args(env_id=env_id)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_mjx, "Env", lambda args: envs(args.env_id))
        yield


@pytest.fixture(scope="module")
def one_pendulum():
    """As `one_env`, for sac_mjx_pendulum.py: an environment for all runs of the same settings."""
    import sac_mjx_pendulum

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sac_mjx_pendulum, "Env", cache(sac_mjx_pendulum.Env))
        yield


@pytest.fixture(scope="session")
def hopper():
    return ppo_mjx.Env(ppo_mjx.Args(env_id="Hopper"))
