"""sac_mjx_pendulum.py as a process: smoke test, signals, resuming, films, the window, and folders that are no runs."""

import dataclasses
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import imageio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_mjx
import sac_mjx_pendulum as sac

SCRIPT = Path(sac.__file__)
STEPS = 16 * 8  # of one iteration of SMALL, whose sizes are test_sac.py's, so that both share compiled programs
SMALL = ("--num-envs 16 --num-steps 8 --updates-per-step 2 --buffer-size 320 --batch-size 32 --learning-starts 64 "
         "--hidden-sizes 16 16 --eval-every 0 --eval-episodes 2").split()

def headless() -> dict[str, str]:
    """This environment, without a display."""
    return {name: value for name, value in os.environ.items()
            if name not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}

def call(*flags, cwd: Path) -> subprocess.CompletedProcess:
    command, environment = [sys.executable, str(SCRIPT), *flags], headless() | {"TMPDIR": str(cwd)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)

@pytest.fixture
def without_judge(monkeypatch):
    """No evaluation at the end, for time."""
    monkeypatch.setattr(sac, "judge", lambda *_: {"C MuJoCo": {"mean": 0.0}})

# ---- Smoke test

STAGES = ["versions", "environment", "training", "resume", "C MuJoCo"]

def verdicts(out: str) -> list[tuple[str, str]]:
    return re.findall(r"(?m)^(pass|FAIL)  ([\w ]+): .*\S$", out)

def test_smoke_passes(tmp_path):
    """--smoke goes through all stages, says so, and leaves nothing behind."""
    done = call("--smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdicts(done.stdout) == [("pass", stage) for stage in STAGES]
    assert done.stdout.endswith("\nall is well\n") and not list(tmp_path.iterdir())

def test_smoke_fails(tmp_path, monkeypatch, capsys):
    """Each stage can fail: other versions, a wrong step, a policy that is not finite, a resumed one that differs."""
    bad = {"max_torque": np.float32(2), "w0": np.full((3, 1), np.nan), "b0": np.zeros(1)}
    policies, shipped = iter([bad, bad | {"max_torque": np.float32(3)}]), sac.CMujocoEnv.step
    def train(args, run_dir=None):
        if run_dir is None:
            run_dir = Path(args.runs_dir, "run")
            Path(run_dir, "checkpoints").mkdir(parents=True)
            Path(run_dir, "checkpoints", "4.npz").touch()
            sac.write_run(run_dir, {"args": dataclasses.asdict(args)})
        return run_dir, next(policies)
    def step(self, action):
        obs, *rest = shipped(self, action)
        return obs + 1e-3, *rest
    monkeypatch.chdir(tmp_path)  # MuJoCo writes about the NaN
    monkeypatch.setattr(sac, "train", train)
    monkeypatch.setattr(sac.CMujocoEnv, "step", step)
    monkeypatch.setattr(sac.importlib.metadata, "version", lambda name: f"1.0 of {name}")
    with pytest.raises(SystemExit) as stop:
        sac.main(["--smoke"])
    out = capsys.readouterr().out
    assert stop.value.code == 1 and verdicts(out) == [("FAIL", stage) for stage in STAGES]
    assert out.endswith("\nFAIL: " + ", ".join(STAGES) + "\n")

# ---- Signals and resuming

def interrupt(number: int, *flags) -> tuple[int, int, list[str]]:
    """Start the script and send it a signal after its first line of progress. Returns that line's step, the iteration
    that it stopped after, and the flags of the command that it ends with."""
    command, lines, shown = [sys.executable, str(SCRIPT), *flags], [], None
    with subprocess.Popen(command, env=headless(), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            lines.append(line)
            if shown := re.search(r"\bstep (\d+) ", line):
                process.send_signal(number)
                break
        lines += process.stdout.readlines()
    assert shown and process.returncode == 128 + number, "".join(lines)
    end = re.search(r"stopped after iteration (\d+); to go on: (.+)\n$", lines[-1])
    python, script, *flags = shlex.split(end[2])
    assert (python, script) == ("python", str(SCRIPT))
    return int(shown[1]), int(end[1]), flags

def saved_iterations(run_dir: Path) -> set[int]:
    return {int(file.stem) for file in sac.checkpoints(run_dir)}

def test_signals_save_and_the_run_goes_on(tmp_path):
    """SIGTERM, then SIGINT in the process that goes on, each end training by a checkpoint, the command to go on and
    128 + their number; by the last of these commands the run gets to its end, and its log has no gap."""
    flags = [*SMALL, "--num-devices", "1", "--total-timesteps", str(400 * STEPS), "--checkpoint-every", "1000"]
    shown, first, resume = interrupt(signal.SIGTERM, *flags, "--runs-dir", str(tmp_path))
    (run_dir,) = tmp_path.iterdir()
    assert shown == 10 * STEPS and 10 <= first < 390 and resume == ["--resume", str(run_dir)]
    assert saved_iterations(run_dir) == {first}
    before = (run_dir / "policy.npz").read_bytes()
    shown, second, again = interrupt(signal.SIGINT, *resume)
    assert first * STEPS < shown <= (first + 10) * STEPS and first < second < 400 and again == resume
    assert saved_iterations(run_dir) == {first, second} and (run_dir / "policy.npz").read_bytes() != before
    sac.main(again)
    assert saved_iterations(run_dir) == {first, second, 400} and list(tmp_path.iterdir()) == [run_dir]
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in log.Scalars("losses/alpha")] == list(range(STEPS, 400 * STEPS + 1, STEPS))
    assert {"MJX", "C MuJoCo"} <= json.loads((run_dir / "run.json").read_text())["evaluation"].keys()

def as_numpy(leaf) -> np.ndarray:
    return np.array(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

@pytest.mark.parametrize("buffer_device", ["device", "host"])
def test_resume_on_two_devices_is_bit_equal(tmp_path, make_mesh, without_judge, buffer_device):
    """By the command line: four iterations, and the last two of them once more from the checkpoint after two, end in
    the same state to the bit, buffer included, and in the same policy."""
    mesh, total = make_mesh(2), str(4 * STEPS)
    sac.main([*SMALL, "--num-devices", "2", "--buffer-device", buffer_device, "--total-timesteps", total,
              "--checkpoint-every", "2", "--runs-dir", str(tmp_path / "runs")])
    (run_dir,) = (tmp_path / "runs").iterdir()
    policy = (run_dir / "policy.npz").read_bytes()
    assert saved_iterations(run_dir) == {2, 4}
    (run_dir / "policy.npz").unlink()
    (tmp_path / "whole" / "checkpoints").mkdir(parents=True)
    os.rename(sac.checkpoints(run_dir)[0], tmp_path / "whole" / "checkpoints" / "4.npz")
    sac.main(["--resume", str(run_dir)])
    args = sac.read_run(run_dir)
    start = sac.init_train_state(args, sac.Env(args), mesh, jax.random.key(9))
    states = [sac.restore(args, folder, start) for folder in (tmp_path / "whole", run_dir)]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(as_numpy(a), as_numpy(b)), *states)
    assert int(states[1].learner.iteration) == 4 and int(states[1].learner.steps) == 32 > sac.buffer_rows(args)
    assert states[1].worlds.key.sharding.num_devices == 2 and np.abs(states[1].buffer.obs).min(axis=(1, 2)).all()
    assert (run_dir / "policy.npz").read_bytes() == policy

# ---- Films

def read_film(file: Path) -> tuple[np.ndarray, float]:
    """Frames [F, H, W, 3], and how many are shown in a second."""
    with imageio.get_reader(file) as reader:
        return np.stack([frame for frame in reader]), reader.get_meta_data()["fps"]

def red(frame: np.ndarray) -> int:
    """Pixels of the curves' colour."""
    r, g, b = np.moveaxis(frame.astype(int), -1, 0)
    return int(((r - g > 60) & (r - b > 60)).sum())

@pytest.mark.filterwarnings("ignore:os.fork")  # imageio starts ffmpeg
def test_films(tmp_path, monkeypatch, without_judge, capsys):
    """Without a display --capture-video films the training, with its curves, and the trained policy at real speed;
    with --evaluate the policy alone."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    shipped = sac.CMujocoEnv.step
    def step(self, action):  # an episode of 15 steps, for time
        obs, reward, terminated, _, info = shipped(self, action)
        return obs, reward, terminated, self.elapsed >= 15, info
    monkeypatch.setattr(sac.CMujocoEnv, "step", step)
    sac.main([*SMALL, "--num-devices", "1", "--total-timesteps", str(3 * STEPS), "--runs-dir", str(tmp_path),
              "--capture-video"])
    (run_dir,) = tmp_path.iterdir()
    sac.main(["--evaluate", str(run_dir), "--capture-video"])
    out = capsys.readouterr().out
    for name, count in (("training", 3 * 8 + 15), ("policy", 15)):
        file = run_dir / "videos" / f"{name}.mp4"
        assert f"video: {file}\n" in out
        frames, fps = read_film(file)
        assert frames.shape == (count, 400, 800, 3) and fps == 20
        moving = np.abs(np.diff(frames[:, :, :400].astype(int), axis=0)).max(axis=(1, 2, 3)) > 50
        assert moving.mean() > 0.9, name  # the rods, which are left
        assert (red(frames[-1]) > 100) == (name == "training")

# ---- The window

def test_live_without_display(tmp_path):
    """--live without a display says so in one line, and trains all the same."""
    done = call(*SMALL, "--num-devices", "1", "--total-timesteps", str(4 * STEPS), "--live", cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert len(re.findall(r"(?m)^--live: no display\b.*$", done.stdout)) == done.stdout.count("display") == 1
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert saved_iterations(run_dir) == {4} and (run_dir / "policy.npz").exists()

@pytest.fixture
def picture():
    return sac.Picture(FigureCanvasAgg(Figure((10, 5), layout="tight")).figure)

def tips(picture: sac.Picture) -> np.ndarray:
    """Where the free ends of the rods are: [4, 2]; NaN for one that was never drawn."""
    return np.array([[*data[-1]] if len(data := rod.get_xydata()) else [np.nan] * 2 for rod in picture.rods])

TAGS = ["charts/episodic_return", "losses/qf_loss", "losses/actor_loss", "losses/alpha"]

def news(iteration: int, worlds: int = 4) -> tuple:
    """What an iteration of 3 steps has to tell; the first has no episode to tell of, as its NaN says."""
    values = {tag: np.float32(i + iteration / 10) for i, tag in enumerate([*TAGS, "charts/SPS"])}
    values |= {TAGS[0]: np.float32(np.nan)} if iteration == 1 else {}
    return 100 * iteration, values, np.float32(iteration + np.arange(3)[:, None] + np.zeros(worlds))

def test_redraw_shows_the_news(picture):
    """All points of the news are on the curves; the last iteration's poses are played a frame each, and only then is
    there a look at what came next; each news is answered by the wish for more; the end of training is no error."""
    (training, window), poses = multiprocessing.Pipe(), []
    assert sac.redraw(0, picture, window, poses) is picture.rods and not training.poll()  # no news yet
    training.send([news(1), news(2)])
    for angle in (2, 3, 4):
        assert sac.redraw(0, picture, window, poses) == picture.rods
        np.testing.assert_allclose(tips(picture), 4 * [[np.sin(angle), np.cos(angle)]], atol=1e-6)
        if angle == 2:
            assert training.poll() and training.recv() == "next"
            training.send([news(3)])
        for i, tag in enumerate(TAGS):
            x, y = picture.curves[tag].get_data()
            np.testing.assert_allclose(x, [200] if i == 0 else [100, 200])
            np.testing.assert_allclose(y, [0.2] if i == 0 else [i + 0.1, i + 0.2], rtol=1e-6)
            low, high = picture.curves[tag].axes.get_ylim()
            assert low <= min(y) <= max(y) <= high  # the axes follow
    assert not poses and not training.poll()
    training.close()  # it ends with news on their way, and then for good
    for _ in range(5):
        sac.redraw(0, picture, window, poses)
    np.testing.assert_allclose(picture.curves[TAGS[3]].get_xdata(), [100, 200, 300])
    np.testing.assert_allclose(tips(picture), 4 * [[np.sin(5), np.cos(5)]], atol=1e-6)

def test_picture_of_two_worlds(picture):
    """Upright is up, clockwise is right, and rods without a world stay away."""
    picture.pose(np.float32([0, np.pi / 2]))
    np.testing.assert_allclose(tips(picture), [[0, 1], [1, 0], [np.nan] * 2, [np.nan] * 2], atol=1e-6)

def test_training_feeds_the_window_when_asked(tmp_path):
    """Nothing is sent before the window asks, then all since the last news; a closed window is no error."""
    log = sac.PictureLog(sac.Args(num_envs=4, num_steps=3), tmp_path, 0)
    assert log.window is None
    (log.pipe, window), log.window = multiprocessing.Pipe(), "open"
    def write(iteration: int) -> None:
        values, angles = news(iteration)[1:]
        more = dict.fromkeys(["charts/episodes_finished", "charts/nan_resets", "charts/skipped_in_a_row"], np.int32(0))
        log.write(iteration, values | more | {"black_box": {}, "angles": jnp.asarray(angles)})
    write(1)
    assert not window.poll()
    for ask, until in (("first", 2), ("next", 3)):
        window.send(ask)
        write(until)
        sent = window.recv() if window.poll() else []
        assert [step for step, _, _ in sent] == ([12, 24] if until == 2 else [36])
        np.testing.assert_array_equal(sent[-1][2], news(until)[2])
        assert sent[-1][1]["losses/alpha"] == news(until)[1]["losses/alpha"] and "angles" not in sent[-1][1]
    write(4)
    assert not window.poll()
    window.close()
    write(5)

# ---- Folders that are no runs

@pytest.fixture
def folder(tmp_path) -> Path:
    """A run that has only its settings yet."""
    args = dataclasses.replace(sac.Args(), num_devices=1, num_envs=16, buffer_size=320, hidden_sizes=(16, 16))
    sac.write_run(tmp_path, {"args": dataclasses.asdict(args)})
    return tmp_path

def refused(capsys, *argv) -> str:
    """Call the script; it must end with code 2 and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as stop:
        sac.main([str(flag) for flag in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ")
    assert error.endswith("\n") and error.count("\n") == 1 and len(error) > 20
    return error

def test_run_without_policy(folder, capsys):
    """What a run did not get to save is missed in one line."""
    assert "no policy" in refused(capsys, "--evaluate", folder)

@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
def test_run_of_the_other_script(tmp_path, capsys, flag):
    """A run of ppo_mjx.py is refused, and so are settings that the command line would not take."""
    for args, reason in (
            (ppo_mjx.Args(), "no run folder of this script"), (sac.Args(env_id="Hopper"), "setting env_id"),
            (sac.Args(num_envs=0), "--num-envs 0: must be"), (sac.Args(gravity="x"), "setting gravity")):
        sac.write_run(tmp_path, {"args": dataclasses.asdict(args)})
        assert reason in refused(capsys, flag, tmp_path)

class Payload:
    """Unpickled, it makes a file."""
    def __init__(self, file: Path):
        self.file = file
    def __reduce__(self):
        return os.mkdir, (str(self.file),)

def test_policy_with_code_inside(folder, tmp_path, capsys):
    """A pickle in policy.npz is refused, and not run."""
    trap = np.empty(1, object)
    trap[0] = Payload(tmp_path / "trapped")
    np.savez(folder / "policy.npz", max_torque=np.float32(2), w0=trap, b0=np.zeros(1, np.float32))
    refused(capsys, "--evaluate", folder)
    assert not (tmp_path / "trapped").exists()
    with np.load(folder / "policy.npz", allow_pickle=True) as file:
        dict(file)
    assert (tmp_path / "trapped").exists()  # it would have gone off
