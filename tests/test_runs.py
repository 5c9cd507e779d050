"""A run's life: its folder, continued, made longer, the start of another, and judged elsewhere."""

import dataclasses
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
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

pytestmark = pytest.mark.usefixtures("one_env")
SCRIPTS = [ppo_mjx, sac, unitree]
SCRIPT = Path(ppo_mjx.__file__)
STEPS = 8 * 8  # of one iteration
SMALL = """
    --env-id Hopper --num-devices 1 --num-envs 8 --num-steps 8 --num-minibatches 2
    --update-epochs 1 --hidden-sizes 8 --eval-every 0 --eval-episodes 2 --checkpoint-every 2
""".split()
ITERATIONS = 6


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
    old = {"model": "another", "onekernel": "another", "versions": run["versions"] | {"jax": "0.1"}}
    ppo_mjx.write_run(copy, run | old)

    double = 2 * ITERATIONS * STEPS
    flags = ["--total-timesteps", str(double), "--track", "--capture-video"]
    ppo_mjx.main(["--resume", str(copy), *flags])
    out = capsys.readouterr().out
    (code, model, kernel, versions) = (line for line in out.splitlines() if "changed" in line)
    assert code.endswith(f"diff {copy / SCRIPT.name} {SCRIPT}")
    assert "the model has changed" in model and "onekernel has changed" in kernel
    assert versions.endswith(f": jax 0.1 -> {run['versions']['jax']}")
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


def test_policy_of_another_script_is_refused(copy, capsys):
    """As by a recurrent network's parameters: one line."""
    policy = dict(np.load(copy / "policy.npz"))
    np.savez(copy / "policy.npz", **policy | {"w1": np.zeros((3, 3))})
    with pytest.raises(SystemExit) as stop:
        ppo_mjx.main(["--evaluate", str(copy)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "not one of this script" in error


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


# ---- Shares of the training


@pytest.mark.parametrize("script", SCRIPTS)
def test_cadence_is_a_share_of_the_training(script):
    """Whatever the number of worlds or steps; numbers from 1 on are iterations."""
    for num_envs, num_steps, total in [(64, 8, 10**5), (256, 16, 10**6), (1024, 64, 10**8)]:
        args = script.Args(num_envs=num_envs, num_steps=num_steps, total_timesteps=total)
        steps = args.cadence(0.25) * args.steps_per_iteration
        assert abs(steps - total / 4) <= args.steps_per_iteration
    assert args.cadence(1.0) == 1
    assert args.cadence(50) == 50
    assert script.Args().cadence(1e-9) == 1
    assert script.Args().cadence(0.5) == round(script.Args().num_iterations / 2)


def test_training_saves_and_evaluates_by_its_cadence(run_dir, monkeypatch):
    """At these shares of the run, and at its end; with 0 there are no evaluations."""
    args = dataclasses.replace(ppo_mjx.read_run(run_dir), total_timesteps=10 * STEPS)
    saved = []
    evaluated = []
    learner = types.SimpleNamespace(iteration=0)
    programs = types.SimpleNamespace(
        env=None,
        state=types.SimpleNamespace(learner=learner),
        iterate=lambda state: (state, {}),
        evaluate=lambda policy: np.zeros(2),
    )
    log = types.SimpleNamespace(
        write=lambda iteration, metrics: None,
        scalars=lambda step, values: evaluated.append(step // STEPS),
        bar=types.SimpleNamespace(close=lambda: None),
    )
    monkeypatch.setattr(ppo_mjx, "save", lambda *_: saved.append(1))
    monkeypatch.setattr(ppo_mjx, "export_policy", lambda *_: {})
    args = dataclasses.replace(args, checkpoint_every=0.3, eval_every=0.2)
    ppo_mjx.train_loop(args, run_dir, programs, log, [])
    assert evaluated == [2, 4, 6, 8, 10]
    assert len(saved) == 4
    ppo_mjx.train_loop(dataclasses.replace(args, eval_every=0), run_dir, programs, log, [])
    assert len(evaluated) == 5


def test_imitation_is_a_share_of_the_training():
    """By default it falls to 0 over 1.5 of 15 million steps."""
    for factor in (1, 4):
        args = unitree.Args(total_timesteps=factor * 15_000_000)
        share = args.steps_per_iteration / factor
        for steps in (0, 750_000, 1_500_000, 4_500_000):
            weight = unitree.imitation_weight(args, jnp.int32(math.ceil(steps / share)))
            assert weight == pytest.approx(max(1 - steps / 1_500_000, 0), abs=0.01)


# ---- Evaluation


@pytest.mark.parametrize("script", [ppo_mjx, sac])
def test_evaluation_seeds_are_no_training_seeds(script):
    """Of the largest --seed neither, and they fit into int32, as JAX counts."""
    (largest,) = script.Args.__annotations__["seed"].__metadata__
    first = script.evaluation_seed(script.Args(seed=0))
    last = script.evaluation_seed(script.Args(seed=int(largest.most))) + 10_000
    assert largest.most < first
    assert last < 2**31


WITHOUT_TRAINING = """
import shlex
import sys
for name in ("wandb", "tensorboard", "tqdm"):
    sys.modules[name] = None  # which cannot be imported
import ppo_mjx
for call in sys.argv[1:]:
    ppo_mjx.main(shlex.split(call))
"""


def run(code: str, *flags, optimize: bool = False) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own."""
    python = [sys.executable, *(["-O"] if optimize else [])]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent), "JAX_PLATFORMS": "cpu"}
    command = [*python, "-c", code, *(str(flag) for flag in flags)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_evaluation_needs_nothing_of_training(copy):
    """Packages of the log are missing, and so is the GPU of a run that was tracked.

    The result is that of training; a call to train names what is missing.
    """
    recorded = json.loads((copy / "run.json").read_text())
    settings = recorded["args"] | {"track": True, "num_devices": 8}
    ppo_mjx.write_run(copy, recorded | {"args": settings, "devices": 8 * ["NVIDIA H100"]})
    evaluate = shlex.join(["--evaluate", str(copy), "--eval-episodes", "2"])
    train = shlex.join(["--resume", str(copy), "--no-track"])
    done = run(WITHOUT_TRAINING, evaluate, train)
    assert recorded["evaluation"]
    for name, row in recorded["evaluation"].items():
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(name))
        mean = float(line.removeprefix(name).split()[0])
        assert mean == pytest.approx(row["mean"], abs=0.1 + 1e-3 * abs(row["mean"]))

    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: tensorboard or tqdm is missing")


def test_evaluation_has_the_physics_of_the_run(tmp_path, monkeypatch):
    """Of its settings, whatever the command line's defaults are."""
    args = sac.Args(gravity=3.0, length=0.7, hidden_sizes=(4,))
    sac.write_run(tmp_path, {"args": dataclasses.asdict(args)})
    np.savez(tmp_path / "policy.npz", w0=np.zeros((3, 1)))
    seen = []
    monkeypatch.setattr(sac, "judge", lambda args, env, policy: seen.append(env.task))
    sac.main(["--evaluate", str(tmp_path)])
    assert (seen[0].gravity, seen[0].length, seen[0].mass) == (3.0, 0.7, 1.0)
    assert sac.load_model(seen[0]).opt.gravity[2] == -3.0


# ---- Help


@pytest.mark.parametrize(
    ("script", "flags", "defaults"),
    [
        (ppo_mjx, "--env-id Ant --help", {"learning-rate": "0.0003", "num-steps": "32"}),
        (ppo_mjx, "-h", {"learning-rate": "0.001", "num-steps": "16"}),
        (sac, "--help --env-id PointMass", {"gravity": "9.81", "max-torque": "4.0"}),
        (unitree, "--help", {"command-x": "-0.6 1.0"}),
    ],
)
def test_help_shows_the_defaults_of_the_task(script, flags, defaults, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        script.main(flags.split())
    assert not stop.value.code
    text = capsys.readouterr().out
    for flag, default in defaults.items():
        after = text.split(f"--{flag} ", 1)[1]
        assert re.search(r"\(default: (.*?)\)", after, re.DOTALL)[1] == default


# ---- Containers and operating systems


@pytest.fixture
def container(tmp_path, monkeypatch):
    """Write a file of a control group, under a root of the test's own."""
    monkeypatch.setattr(ppo_mjx, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(ppo_mjx.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)

    def write(file: str, text: str) -> None:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text + "\n")

    groups = "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/a/b\n"
    write("proc", groups)
    shipped = ppo_mjx.Path
    fake = lambda file: shipped(tmp_path / "proc" if file == "/proc/self/cgroup" else file)  # noqa: E731
    monkeypatch.setattr(ppo_mjx, "Path", fake)
    return write


def test_no_limits(container):
    """Without any, there are the machine's."""
    assert ppo_mjx.count_cores() == 16
    container("cpu.max", "max 100000")
    container("cpu/cpu.cfs_quota_us", "-1")
    container("cpu/cpu.cfs_period_us", "100000")
    container("memory.max", "max")
    assert ppo_mjx.count_cores() == 16
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert ppo_mjx.host_memory() == machine


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "350000 100000"}, 3),  # the container's own group is its root
        ({"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, 4),  # that of a parent
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),  # version 1
        ({"c/cpu.max": "100000 100000"}, 16),  # of others
    ],
)
def test_quota_of_a_container(container, monkeypatch, files, cores):
    """As many devices and threads as whole cores are granted."""
    for file, text in files.items():
        container(file, text)
    assert ppo_mjx.count_cores() == cores
    updates = []
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setattr(ppo_mjx.jax.config, "update", lambda *option: updates.append(option))
    ppo_mjx.split_cpu(ppo_mjx.Args())
    assert updates == [("jax_num_cpu_devices", cores)]
    assert os.environ["NPROC"] == str(cores)
    monkeypatch.setenv("NPROC", "5")  # to be undone, and the user's own goes first
    ppo_mjx.split_cpu(ppo_mjx.Args())
    assert os.environ["NPROC"] == "5"


@pytest.mark.parametrize("file", ["memory.max", "a/b/memory.max", "memory/memory.limit_in_bytes"])
def test_memory_of_a_container(container, capsys, file):
    """What does not fit into it is refused."""
    container(file, str(10**6))
    assert ppo_mjx.host_memory() == 10**6
    ppo_mjx.check_memory(None, 900_000)
    with pytest.raises(SystemExit):
        ppo_mjx.check_memory(None, 990_000)
    assert "of the 1000000 that there are" in capsys.readouterr().err


ELSEWHERE = """
import os, pathlib, sys
import flax, jax, mujoco.mjx, numpy, optax, tyro  # which look for themselves
for name in ("sysconf", "sched_getaffinity", "nice", "getuid", "fork", "kill", "uname"):
    delattr(os, name)
read_text = pathlib.Path.read_text
def refuse(self, *options, **more):
    if self.parts[:2] in [("/", "proc"), ("/", "sys")]:
        raise FileNotFoundError(self)
    return read_text(self, *options, **more)
pathlib.Path.read_text = refuse
import ppo_mjx
jax.config.update("jax_disable_most_optimizations", True)
assert not __debug__ or sys.exit("asserts are on")
ppo_mjx.judge = lambda *_: {"C MuJoCo": {"mean": 0.0}}
ppo_mjx.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_other_operating_systems(run_dir, tmp_path):
    """Without what only some of them have, and without asserts (python -O), a run is the same."""
    total = str(ITERATIONS * STEPS)
    flags = [*SMALL, "--total-timesteps", total, "--runs-dir", tmp_path]
    done = run(ELSEWHERE, *flags, optimize=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = tmp_path.iterdir()
    assert same(read_checkpoint(folder), read_checkpoint(run_dir))
