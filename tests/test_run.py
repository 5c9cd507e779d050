"""The script as its users meet it: command line, run folder, resuming, signals, and promises about its source."""

import ast
import dataclasses
import importlib.machinery
import json
import math
import re
import signal
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import imageio.v3 as imageio
import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_mjx

pytestmark = pytest.mark.usefixtures("one_env")
SCRIPT = Path(ppo_mjx.__file__)
SMALL = (
    "--env-id Hopper --num-devices 1 --num-envs 16 --num-steps 16 --num-minibatches 4 --update-epochs 2 "
    "--eval-episodes 2"
).split()
STEPS = ["--total-timesteps", "40964"]  # 160 iterations, and 4 steps that are left out
LOSSES = (
    "loss policy_loss value_loss entropy old_approx_kl approx_kl clipfrac grad_norm explained_variance"
).split()
CHARTS = "episodes_finished learning_rate SPS nan_resets skipped_updates skipped_in_a_row".split()

# ---- A whole run


@pytest.fixture(scope="module")
def wandb():
    """A stand-in for Weights & Biases, which keeps what it is told."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.runs, module.rows = [], []
    module.init, module.log = lambda **run: module.runs.append(run), module.rows.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", module)
        yield module


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, wandb) -> Path:
    """A finished short run of the command line."""
    runs = tmp_path_factory.mktemp("runs")
    ppo_mjx.main([*SMALL, *STEPS, "--eval-every", "80", "--runs-dir", str(runs), "--track"])
    (folder,) = runs.iterdir()
    return folder


def read_log(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def test_log_holds_every_tag(run_dir):
    """TensorBoard shows every documented metric, at environment steps, and the hyperparameters."""
    log = read_log(run_dir)
    every = {f"losses/{name}" for name in LOSSES} | {f"charts/{name}" for name in CHARTS}
    every |= {f"reward/{name}" for name in ("forward", "ctrl", "survive")}
    for tag in every:
        events = log.Scalars(tag)
        assert [event.step for event in events] == list(range(256, 40961, 256)), tag
        assert all(math.isfinite(event.value) for event in events), tag
    assert [event.step for event in log.Scalars("eval/episodic_return")] == [20480, 40960]
    assert [event.step for event in log.Scalars("eval/c_mujoco_return")] == [40961]
    assert all(event.value == 0 for event in log.Scalars("charts/nan_resets"))
    survive = [event.value for event in log.Scalars("reward/survive")]
    assert min(survive) < 1 and 0.8 < np.mean(survive) <= 1  # a fall earns nothing
    text = log.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(f"|{field.name}|" in text for field in dataclasses.fields(ppo_mjx.Args))
    assert set(log.Tags()["scalars"]) == every | {
        "charts/episodic_return",
        "charts/episodic_length",
        "eval/episodic_return",
        "eval/c_mujoco_return",
    }


def test_logged_episodes_are_plausible(run_dir):
    """Hopper gets about 1 for each step, so returns are near lengths; each iteration with an episode logs both."""
    log = read_log(run_dir)
    returns, lengths = log.Scalars("charts/episodic_return"), log.Scalars("charts/episodic_length")
    finished = [event.step for event in log.Scalars("charts/episodes_finished") if event.value > 0]
    assert len(finished) > 8
    assert [event.step for event in returns] == [event.step for event in lengths] == finished
    for total, length in zip(returns, lengths, strict=True):
        assert 3 < length.value < 1000 and 0.3 < total.value / length.value < 3


def test_run_json_tells_how_to_repeat_the_run(run_dir):
    """Settings, versions, devices, compile time and results are all there."""
    run = json.loads((run_dir / "run.json").read_text())
    assert run["args"].keys() == {field.name for field in dataclasses.fields(ppo_mjx.Args)}
    assert (
        run["args"]["env_id"] == "Hopper"
        and run["args"]["num_envs"] == 16
        and run["args"]["num_devices"] == 1
    )
    assert ppo_mjx.read_run(run_dir).hidden_sizes == (64, 64)
    assert run["versions"]["mujoco"] == run["versions"]["mujoco-mjx"] and len(run["devices"]) == 1
    assert run["compile_s"] > 0 and "commit" in run
    assert run["evaluation"].keys() == {"MJX", "C MuJoCo", "Gymnasium"}
    for result in run["evaluation"].values():
        assert (
            result.keys() == {"mean", "std", "min", "max"}
            and result["min"] <= result["mean"] <= result["max"]
        )


def test_exported_policy_is_the_actor(run_dir, hopper, make_mesh, make_state):
    """policy.npz, run by NumPy, acts as the trained network's clipped mean."""
    args = ppo_mjx.read_run(run_dir)
    learner = ppo_mjx.restore(args, run_dir, make_state(args, hopper, make_mesh(1))).learner
    obs = np.random.default_rng(0).normal(0, 3, (50, 11)).astype(np.float32)
    actor, _ = ppo_mjx.make_networks(args, hopper)
    mean = actor.apply(learner.params["actor"], ppo_mjx.normalize(learner.obs_stats, obs))
    with np.load(run_dir / "policy.npz") as arrays:
        policy = dict(arrays)
    _, action = ppo_mjx.act(policy, ppo_mjx.initial_memory((50,)), obs)
    assert type(action) is np.ndarray and np.ptp(action) > 0.01
    np.testing.assert_allclose(action, np.clip(mean, -1, 1), atol=1e-5)
    _, doubled = ppo_mjx.act(policy | {"w2": 1000 * policy["w2"]}, (), obs)
    assert np.abs(doubled).max() == 1


def test_track_logs_the_same_numbers(run_dir, wandb):
    """Weights & Biases gets the settings once, and every number of TensorBoard's with its step."""
    assert wandb.runs[0]["id"] == run_dir.name
    settings = json.loads((run_dir / "run.json").read_text())["args"]
    assert wandb.runs[0]["config"] == settings | {"hidden_sizes": (64, 64)}
    log = read_log(run_dir)
    told = {
        (tag, row["global_step"]): row[tag]
        for row in reversed(wandb.rows)
        for tag in row
        if tag != "global_step"
    }
    shown = {
        (tag, event.step): event.value
        for tag in log.Tags()["scalars"]
        for event in log.Scalars(tag)
    }
    assert told.keys() == shown.keys() and len(told) > 200
    for place in shown:
        assert told[place] == pytest.approx(shown[place], rel=1e-6), place


@pytest.mark.filterwarnings("ignore:os.fork")  # imageio starts ffmpeg
def test_video_shows_an_episode(run_dir, hopper, tmp_path, monkeypatch):
    """Every second step of it, so at 62.5 frames a second; a hopper that moves, without a display."""
    shipped = ppo_mjx.CMujocoEnv.step

    def step(self, action):  # an episode of at most 15 steps, for time
        obs, reward, terminated, _, info = shipped(self, action)
        return obs, reward, terminated, self.elapsed >= 15, info

    monkeypatch.setattr(ppo_mjx.CMujocoEnv, "step", step)
    monkeypatch.delenv("DISPLAY", raising=False)
    with np.load(run_dir / "policy.npz") as arrays:
        policy = dict(arrays)
    steps = []
    ppo_mjx.evaluate_on_host(ppo_mjx.CMujocoEnv(hopper), policy, 1, 3, lambda: steps.append(1))
    file = tmp_path / "videos" / "film.mp4"
    ppo_mjx.write_video(hopper, policy, 3, file)
    frames = imageio.imread(file)
    assert (
        frames.shape == ((len(steps) + 1) // 2, 480, 640, 3) and imageio.immeta(file)["fps"] == 62.5
    )
    moving = np.abs(np.diff(frames.astype(int), axis=0)).max(axis=(1, 2, 3)) > 50
    assert moving.mean() > 0.9


def test_finished_run_can_be_resumed_and_evaluated(run_dir, capsys):
    """--resume of a finished run trains nothing more; --evaluate prints one row for each simulator."""
    before = {file: file.read_bytes() for file in run_dir.glob("policy.npz")}
    ppo_mjx.main(["--resume", str(run_dir)])
    assert before and {file: file.read_bytes() for file in run_dir.glob("policy.npz")} == before
    capsys.readouterr()
    ppo_mjx.main(["--evaluate", str(run_dir), "--eval-episodes", "2"])
    out = capsys.readouterr().out
    for name in ("MJX", "C MuJoCo", "Gymnasium"):
        (row,) = (line for line in out.splitlines() if line.startswith(name))
        assert len(re.findall(r"-?\d+\.\d", row)) == 4
    evaluation = json.loads((run_dir / "run.json").read_text())["evaluation"]
    assert f"{evaluation['Gymnasium']['mean']:.1f}" in out  # the same policy, the same seeds


def test_signal_saves_and_the_run_goes_on(run_dir, tmp_path, monkeypatch, capsys):
    """A signal ends training with a checkpoint, a command to go on, and 128 + its number; that command works. One
    interrupt goes to a process, the other to this one; the end is that of the run that nothing has stopped."""
    # Imported, as it is here, it finds the kernels of run_dir; test_docs.py runs scripts by their files.
    call = [sys.executable, "-u", "-c", "import sys, ppo_mjx; ppo_mjx.main(sys.argv[1:])"]
    command = [*call, *SMALL, *STEPS, "--eval-every", "0", "--runs-dir", str(tmp_path)]
    with subprocess.Popen(command, cwd=SCRIPT.parent, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if re.search(r"\bstep \d+ ", line):
                process.send_signal(signal.SIGINT)
                break
        lines.append(process.stdout.read())
    (folder,) = tmp_path.iterdir()
    assert process.returncode == 130 and f"--resume {folder}" in lines[-1]
    first = int(ppo_mjx.checkpoints(folder)[0].stem)

    shipped = ppo_mjx.Log.write

    def write(self, iteration, metrics):
        if iteration == first + 5:
            signal.raise_signal(signal.SIGTERM)
        return shipped(self, iteration, metrics)

    monkeypatch.setattr(ppo_mjx.Log, "write", write)
    with pytest.raises(SystemExit) as stop:
        ppo_mjx.main(["--resume", str(folder)])
    monkeypatch.undo()
    assert stop.value.code == 143 and f"--resume {folder}" in capsys.readouterr().out
    assert 10 <= first < int(ppo_mjx.checkpoints(folder)[0].stem) < first + 10 < 160

    ppo_mjx.main(["--resume", str(folder)])
    assert int(ppo_mjx.checkpoints(folder)[0].stem) == 160
    assert (folder / "policy.npz").read_bytes() == (run_dir / "policy.npz").read_bytes()
    assert [event.step for event in read_log(folder).Scalars("charts/SPS")] == list(
        range(256, 40961, 256)
    )


@pytest.mark.parametrize("fault", [None, "policy", "nan", "versions"])
def test_smoke_compares(monkeypatch, tmp_path, capsys, fault):
    """--smoke resumes a short run from a checkpoint in its middle; another policy, NaN or versions fail it."""
    calls = []

    def train(args, run_dir=None):
        weight = np.nan if fault == "nan" else 2.0 if run_dir and fault == "policy" else 1.0
        if run_dir is None:
            run_dir = Path(args.runs_dir, "run")
            Path(run_dir, "checkpoints").mkdir(parents=True)
            for name in "2.npz", "4.npz":
                Path(run_dir, "checkpoints", name).touch()
            ppo_mjx.write_run(run_dir, {"args": dataclasses.asdict(args)})
        calls.append((args.num_iterations, [file.stem for file in ppo_mjx.checkpoints(run_dir)]))
        return run_dir, {"w0": np.full(3, weight), "b0": np.zeros(3)}

    monkeypatch.setattr(ppo_mjx, "train", train)
    monkeypatch.setattr(ppo_mjx, "start_jax", lambda args: None)
    if fault == "versions":
        monkeypatch.setattr(ppo_mjx.importlib.metadata, "version", lambda name: f"1.0 of {name}")
    if fault is None:
        ppo_mjx.main(["--smoke"])
        assert "all is well" in capsys.readouterr().out and calls == [(4, ["4", "2"]), (4, ["2"])]
        return
    with pytest.raises(SystemExit) as stop:
        ppo_mjx.main(["--smoke"])
    assert stop.value.code == 1 and capsys.readouterr().err.startswith("error: --smoke: ")


def test_all_devices_are_used(monkeypatch):
    """By default all that divide the work, and of a CPU as many as the process may use cores."""
    assert (
        ppo_mjx.make_mesh(None, 8, 4).size == len(jax.devices())
        and ppo_mjx.make_mesh(None, 7).size == 1
    )
    calls = []
    monkeypatch.setattr(
        ppo_mjx.os, "sched_getaffinity", lambda process: set(range(5)), raising=False
    )
    monkeypatch.setattr(ppo_mjx.jax.config, "update", lambda *option: calls.append(option))
    ppo_mjx.split_cpu(ppo_mjx.Args())
    ppo_mjx.split_cpu(ppo_mjx.Args(num_devices=3))
    assert calls == [("jax_num_cpu_devices", 5), ("jax_num_cpu_devices", 3)]


# ---- Bad calls

BAD_CALLS = [
    "--env-id Cassie",
    "--num-envs 0",
    "--num-envs -5",
    "--num-envs abc",
    "--num-envs 255 --num-devices 2",
    "--num-devices 1000",
    "--num-devices 0",
    "--num-minibatches 33",
    "--num-minibatches 0",
    "--num-steps -16",
    "--num-steps 1.5",
    "--update-epochs 0",
    "--total-timesteps 4095",
    "--total-timesteps -1",
    "--gamma 1.5",
    "--gamma nan",
    "--gae-lambda -1",
    "--clip-coef -1",
    "--learning-rate -1",
    "--learning-rate nan",
    "--learning-rate inf",
    "--max-grad-norm -1",
    "--target-kl -1",
    "--hidden-sizes 0",
    "--hidden-sizes -64",
    "--hidden-sizes",
    "--physics slow",
    "--no-such-flag",
    "stray",
    "--seed -1",
    "--checkpoint-every 0",
    "--eval-episodes 0",
    "--eval-every -1",
    "--init-log-std 1e6",
    "--resume missing",
    "--evaluate missing",
    "--resume broken",
    "--evaluate broken",
    "--evaluate garbage",
    "--resume started --gamma 0.5",
    "--resume started --env-id Hopper",
    "--runs-dir a_file",
    "--runs-dir a_file/below",
]


def fail(capsys, argv: list[str]) -> str:
    """Call the script; it must end with code 2 and one line. Returns the line."""
    with pytest.raises(SystemExit) as stop:
        ppo_mjx.main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ")
        and error.endswith("\n")
        and error.count("\n") == 1
        and len(error) > 20
    )
    return error


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_call_ends_with_one_line(tmp_path, monkeypatch, capsys, call):
    """What cannot run is refused by code 2 and one line that names the culprit, and leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    Path("a_file").touch()
    for folder in ("broken", "garbage", "started"):
        Path(folder).mkdir()
        ppo_mjx.write_run(Path(folder), {"args": dataclasses.asdict(ppo_mjx.Args())})
    Path("broken", "run.json").write_text('{"args": ')
    Path("garbage", "policy.npz").write_bytes(b"garbage")
    before = set(Path().rglob("*"))
    error = fail(capsys, call.split())
    assert (
        "num-" in error or call.split()[0].removeprefix("--") in error or call.split()[-1] in error
    )
    assert set(Path().rglob("*")) == before


def test_tasks_have_defaults_of_their_own(monkeypatch):
    """Worlds and rollout are the task's where they are not told."""
    seen = []
    monkeypatch.setattr(ppo_mjx, "start_jax", lambda args: None)
    monkeypatch.setattr(
        ppo_mjx, "train", lambda args, run_dir: seen.append((args.num_envs, args.num_steps))
    )
    for call in (
        "--seed 2",
        "--env-id Hopper",
        "--env-id Swimmer --num-envs 256",
        "--env-id Reacher --num-steps 16",
    ):
        ppo_mjx.main(call.split())
    assert seen == [(512, 16), (512, 32), (256, 32), (128, 16)]


def test_track_needs_wandb(monkeypatch, capsys):
    """--track without Weights & Biases tells what to install."""
    monkeypatch.setattr(ppo_mjx.importlib.util, "find_spec", lambda name: None)
    assert "pip install wandb" in fail(capsys, ["--track"])


# ---- Source


def test_dependencies_are_declared_once():
    """The script's inline metadata (PEP 723) pins its packages as requirements.txt does."""
    (block,) = re.findall(r"(?ms)^# /// script\n(.*?)^# ///$", SCRIPT.read_text())
    metadata = tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))
    lines = (
        line.split("#")[0].strip()
        for line in (SCRIPT.parent / "requirements.txt").read_text().splitlines()
    )
    assert {line for line in lines if line} - set(metadata["dependencies"]) == {
        "matplotlib==3.11.2"
    }  # of tools
    assert metadata["requires-python"] == ">=3.11"


def test_every_setting_is_used():
    """No flag is without effect: each field of Args is read somewhere."""
    fields = {field.name for field in dataclasses.fields(ppo_mjx.Args)}
    read = {
        node.attr
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name | ast.Attribute)
        and (getattr(node.value, "id", None) or getattr(node.value, "attr", None))
        in ("args", "self")
    }
    assert fields - read == set()


def test_help_describes_every_setting(monkeypatch, capsys):
    """--help names each flag. (test_docs.py starts a copy of the script by its file.)"""
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(ppo_mjx.Args)}
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        ppo_mjx.main(["--help"])
    assert not stop.value.code
    assert flags <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
