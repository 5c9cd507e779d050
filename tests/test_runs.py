"""A run's life: its folder, continued, made longer, the start of another, and judged elsewhere."""

import dataclasses
import io
import json
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_mjx
import ppo_mjx_unitree as unitree
import sac_mjx_pendulum as sac

SCRIPTS = [ppo_mjx, sac, unitree]
SCRIPT = Path(ppo_mjx.__file__)
STEPS = 8 * 8  # of one iteration
SMALL = """
    --env-id Hopper --num-devices 1 --num-envs 8 --num-steps 8 --num-minibatches 2
    --update-epochs 1 --hidden-sizes 8 --eval-every 0 --eval-episodes 2 --checkpoint-every 2
""".split()
ITERATIONS = 6


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
    """Small programs that run for moments: XLA's optimisations cost more than they give."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def train(runs: Path, *flags: str) -> Path:
    """Train by the command line. Returns the folder of the run."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    total = ["--total-timesteps", str(ITERATIONS * STEPS)]
    ppo_mjx.main([*SMALL, *total, *flags, "--runs-dir", str(runs)])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    (run_dir,) = runs.iterdir()
    return run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A finished run of six iterations, with checkpoints at 2, 4 and 6."""
    return train(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copy(run_dir, tmp_path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "copy"))


@pytest.fixture
def without_judge(monkeypatch):
    """No evaluation at the end, for time."""
    monkeypatch.setattr(ppo_mjx, "judge", lambda *_: {"C MuJoCo": {"mean": 0.0}})


def refused(capsys, *flags) -> str:
    """Call the script; it must end with code 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        ppo_mjx.main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def read_checkpoint(run_dir: Path) -> dict[str, np.ndarray]:
    """The arrays of the newest checkpoint."""
    with np.load(ppo_mjx.checkpoints(run_dir)[0]) as arrays:
        return {name: array for name, array in arrays.items() if name != "args"}


def same(one: dict, other: dict) -> bool:
    equal = [np.array_equal(one[name], other[name]) for name in one]
    return one.keys() == other.keys() and all(equal)


# ---- The run folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_folder_is_taken_once(script, tmp_path):
    """Of runs that start in the same second each has its own, with a copy of its script.

    A name that is taken, even a file's, gets a number.
    """
    (tmp_path / "run_3").touch()
    folders = [script.make_run_dir(tmp_path / "run") for _ in range(3)]
    assert [folder.name for folder in folders] == ["run", "run_2", "run_4"]
    own = Path(script.__file__)
    for folder in folders:
        (copy,) = folder.iterdir()
        assert copy.name == own.name
        assert copy.read_bytes() == own.read_bytes()


def test_folder_holds_the_script(run_dir):
    assert (run_dir / SCRIPT.name).read_bytes() == SCRIPT.read_bytes()


# ---- Resuming


class WandB:
    """Weights & Biases, which keeps the names of runs."""

    runs = []
    log = print

    @classmethod
    def init(cls, **run):
        cls.runs.append(run["id"])


def test_resumed_run_becomes_longer(copy, capsys, monkeypatch, without_judge):
    """A finished run goes on, tracked and filmed now. Changes of code and model are told.

    Its learning rate is that of a run of the new length. Each is said in a line.
    """
    films = []
    find_spec = ppo_mjx.importlib.util.find_spec
    wandb_is_here = lambda name: find_spec("json" if name == "wandb" else name)  # noqa: E731
    monkeypatch.setattr(ppo_mjx.importlib.util, "find_spec", wandb_is_here)
    monkeypatch.setitem(sys.modules, "wandb", WandB)
    monkeypatch.setattr(ppo_mjx, "make_renderer", lambda model: io.StringIO())
    monkeypatch.setattr(ppo_mjx, "write_video", lambda *inputs: films.append(inputs[-1]))
    (copy / SCRIPT.name).write_text("an older version, with other rewards")
    run = json.loads((copy / "run.json").read_text())
    ppo_mjx.write_run(copy, run | {"model": "another"})

    double = 2 * ITERATIONS * STEPS
    flags = ["--total-timesteps", str(double), "--track", "--capture-video"]
    ppo_mjx.main(["--resume", str(copy), *flags])
    out = capsys.readouterr().out
    (code, model) = (line for line in out.splitlines() if "changed" in line)
    assert code.endswith(f"diff {copy / SCRIPT.name} {SCRIPT}")
    assert "the model has changed" in model
    assert f"made longer, from {double // 2} to {double} steps" in out
    assert int(ppo_mjx.checkpoints(copy)[0].stem) == 2 * ITERATIONS
    saved = ppo_mjx.read_run(copy)
    assert (saved.total_timesteps, saved.track, saved.capture_video) == (double, True, True)
    assert WandB.runs == [copy.name]
    assert films == [copy / "videos" / "c_mujoco.mp4"]

    log = EventAccumulator(str(copy), size_guidance={"scalars": 0}).Reload()
    rates = [event.value for event in log.Scalars("charts/learning_rate")]
    shares = [i / ITERATIONS for i in range(ITERATIONS)]
    shares += [i / (2 * ITERATIONS) for i in range(ITERATIONS, 2 * ITERATIONS)]
    np.testing.assert_allclose(rates, 1e-3 * (1 - np.array(shares)), rtol=1e-5)


@pytest.mark.parametrize("flags", ["--total-timesteps 128", "--gamma 0.5", "--init-from x"])
def test_resumed_run_keeps_the_rest(run_dir, capsys, flags):
    """A run cannot become shorter, nor another."""
    error = refused(capsys, "--resume", run_dir, *flags.split())
    assert "less than the 384" in error if "total" in flags else "--init-from" in error


def test_digest_of_a_model():
    """It sees numbers and options."""
    model = ppo_mjx.load_model(ppo_mjx.TASKS["Hopper"])
    digests = [ppo_mjx.model_digest(model)]
    model.opt.integrator = 0
    digests.append(ppo_mjx.model_digest(model))
    model.body_mass[1] *= 1.01
    digests.append(ppo_mjx.model_digest(model))
    assert len(set(digests)) == 3
    again = ppo_mjx.load_model(ppo_mjx.TASKS["Hopper"])
    assert ppo_mjx.model_digest(again) == digests[0]


# ---- The start of another run


def test_run_from_another(run_dir, tmp_path, capsys, without_judge):
    """It begins with weights and statistics of the old run, at iteration 0.

    Stopped before its first checkpoint, it begins there again; later it needs the old run no more.
    """
    source = Path(shutil.copytree(run_dir, tmp_path / "source"))
    flags = ["--init-from", str(source), "--learning-rate", "0"]
    new = train(tmp_path / "runs", *flags)
    ours = read_checkpoint(new)
    theirs = read_checkpoint(source)
    assert int(ours[".learner.iteration"]) == ITERATIONS
    params = [name for name in ours if name.startswith(".learner.params")]
    assert len(params) == 9
    for name in params:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    for name in (".learner.obs_stats.count", ".learner.return_stats.count"):
        np.testing.assert_allclose(ours[name], 2 * ITERATIONS * STEPS, rtol=0.01)
    assert ppo_mjx.read_run(new).init_from == str(source)

    shutil.rmtree(new / "checkpoints")
    ppo_mjx.main(["--resume", str(new)])
    assert same(ours, read_checkpoint(new))
    shutil.rmtree(source)
    ppo_mjx.checkpoints(new)[0].unlink()
    capsys.readouterr()
    ppo_mjx.main(["--resume", str(new)])
    assert same(ours, read_checkpoint(new))
    assert "changed" not in capsys.readouterr().out  # neither code nor model


def learner_of(**changes) -> ppo_mjx.Learner:
    """A learner of the right shapes."""
    args = dataclasses.replace(ppo_mjx.Args(env_id="Hopper", hidden_sizes=(8,)), **changes)
    env = ppo_mjx.Env(args)
    start = jax.eval_shape(partial(ppo_mjx.init_train_state, args, env), jax.random.key(0))
    key = jax.random.key(0)
    return jax.tree.map(
        lambda x: (
            key if x.shape == key.shape and x.dtype == key.dtype else jnp.zeros(x.shape, x.dtype)
        ),
        start.learner,
    )


@pytest.mark.parametrize(
    "changes", [{"hidden_sizes": (9,)}, {"hidden_sizes": (8, 8)}, {"env_id": "Swimmer"}]
)
def test_other_networks_do_not_fit(run_dir, capsys, changes):
    """Another width, depth, or task: one line that names the run."""
    with pytest.raises(SystemExit) as stop:
        ppo_mjx.inherit(run_dir, learner_of(**changes))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"error: --init-from {run_dir}")
    assert "does not fit" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_policy_to_begin_with(script, tmp_path, capsys):
    """A run that was stopped too early, or none; and each script takes what its learner has."""
    with pytest.raises(SystemExit) as stop:
        script.inherit(tmp_path / "missing", None)
    assert stop.value.code == 2
    assert "no policy" in capsys.readouterr().err
    fields = {field.name for field in dataclasses.fields(script.Learner)}
    assert set(script.INHERITED) <= fields
    assert not {"iteration", "key", "opt_state"} & set(script.INHERITED)
