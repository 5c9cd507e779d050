"""sac_mjx_pendulum.py as its users meet it: smoke test, signals, resuming, films, the window, and
folders that are no runs."""

import dataclasses
import json
import os
import re
import shlex
import shutil
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
from tools import export, film_pendulum, live_window

pytestmark = pytest.mark.usefixtures("one_pendulum")
SCRIPT = Path(sac.__file__)
STEPS = 16 * 8  # of one iteration of SMALL
SMALL = """
    --num-envs 16 --num-steps 8 --updates-per-step 2 --buffer-size 320 --batch-size 32
    --learning-starts 64 --policy-lr 1e-3 --q-lr 4e-3 --hidden-sizes 16 16
    --eval-every 0 --eval-episodes 2
""".split()  # test_sac.py's, so that both files share compiled programs


def headless() -> dict[str, str]:
    """This environment, without a display."""
    displays = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    return {name: value for name, value in os.environ.items() if name not in displays}


def call(script: Path, *flags, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(script), *flags],
        cwd=cwd,
        env=headless() | {"TMPDIR": str(cwd)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def without_judge(monkeypatch):
    """No evaluation at the end, for time."""
    monkeypatch.setattr(sac, "judge", lambda *_: {"C MuJoCo": {"mean": 0.0}})


# ---- Smoke test


@pytest.mark.slow
def test_smoke_passes(tmp_path):
    """--smoke trains, resumes and compares, says so, and leaves nothing behind."""
    done = call(SCRIPT, "--smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is well: the resumed run ended with the same policy" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["versions", "resumed", "NaN"])
def test_smoke_fails(tmp_path, monkeypatch, capsys, fault):
    """Other versions, a resumed run with another end, a policy that is not finite: code 1."""
    policy = {"w0": np.zeros((3, 1)), "b0": np.full(1, np.nan if fault == "NaN" else 0.0)}
    other = policy | {"w0": np.ones((3, 1))} if fault == "resumed" else policy
    policies = iter([policy, other])

    def train(args, run_dir=None):
        if run_dir is None:
            run_dir = Path(args.runs_dir, "run")
            Path(run_dir, "checkpoints").mkdir(parents=True)
            Path(run_dir, "checkpoints", "4.npz").touch()
            sac.write_run(run_dir, {"args": dataclasses.asdict(args)})
        return run_dir, next(policies)

    monkeypatch.setattr(sac, "train", train)
    if fault == "versions":
        monkeypatch.setattr(sac.importlib.metadata, "version", lambda name: f"1.0 of {name}")
    with pytest.raises(SystemExit) as stop:
        sac.main(["--smoke"])
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error.startswith("error: --smoke: ")
    assert error.count("\n") == 1


# ---- Signals and resuming


def interrupt(number: int, *flags) -> tuple[int, int, list[str]]:
    """Start the script and send it a signal after its first line of progress.

    Returns that line's step, the iteration that it stopped after, and the flags of the command
    that it ends with.
    """
    lines = []
    shown = None
    command = [sys.executable, str(SCRIPT), *flags]
    with subprocess.Popen(command, env=headless(), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            lines.append(line)
            if shown := re.search(r"\bstep (\d+) ", line):
                process.send_signal(number)
                break
        lines += process.stdout.readlines()
    assert shown, "".join(lines)
    assert process.returncode == 128 + number, "".join(lines)
    end = re.search(r"stopped after iteration (\d+); to continue: (.+)\n$", lines[-1])
    python, script, *flags = shlex.split(end[2])
    assert (python, script) == ("python", str(SCRIPT))
    return int(shown[1]), int(end[1]), flags


def saved_iterations(run_dir: Path) -> set[int]:
    return {int(file.stem) for file in sac.checkpoints(run_dir)}


@pytest.mark.slow
def test_signal_saves_and_the_run_goes_on(tmp_path):
    """SIGTERM ends training by a checkpoint, the command to continue and 128 + its number.

    By that command the run gets to its end, and its log has no gap. (SIGINT: tests/test_run.py.)
    """
    flags = [*SMALL, "--num-devices", "1", "--total-timesteps", str(400 * STEPS)]
    flags += ["--checkpoint-every", "1000", "--runs-dir", str(tmp_path)]
    shown, first, resume = interrupt(signal.SIGTERM, *flags)
    (run_dir,) = tmp_path.iterdir()
    assert shown == 10 * STEPS
    assert 10 <= first < 390
    assert resume == ["--resume", str(run_dir)]
    assert saved_iterations(run_dir) == {first}
    before = (run_dir / "policy.npz").read_bytes()

    sac.main(resume)
    assert saved_iterations(run_dir) == {first, 400}
    assert (run_dir / "policy.npz").read_bytes() != before
    assert list(tmp_path.iterdir()) == [run_dir]
    everything = {"scalars": 0, "tensors": 0}
    log = EventAccumulator(str(run_dir), size_guidance=everything).Reload()
    steps = list(range(STEPS, 400 * STEPS + 1, STEPS))
    assert [event.step for event in log.Scalars("losses/alpha")] == steps
    assert [event.step for event in log.Tensors("angles")] == steps
    evaluation = json.loads((run_dir / "run.json").read_text())["evaluation"]
    assert {"MJX", "C MuJoCo"} <= evaluation.keys()


def as_numpy(leaf) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.array(jax.random.key_data(leaf) if is_key else leaf)


@pytest.mark.slow
def test_resume_on_two_devices_is_bit_equal(tmp_path, make_mesh, without_judge):
    """Four iterations, and the last two once more from the checkpoint after two, end the same.

    The same state to the bit, buffer included, and the same policy, by the command line.
    """
    mesh = make_mesh(2)
    flags = [*SMALL, "--num-devices", "2"]
    flags += ["--total-timesteps", str(4 * STEPS), "--checkpoint-every", "2"]
    sac.main([*flags, "--runs-dir", str(tmp_path / "runs")])
    (run_dir,) = (tmp_path / "runs").iterdir()
    policy = (run_dir / "policy.npz").read_bytes()
    assert saved_iterations(run_dir) == {2, 4}

    (run_dir / "policy.npz").unlink()
    whole = tmp_path / "whole" / "checkpoints"
    whole.mkdir(parents=True)
    os.rename(sac.checkpoints(run_dir)[0], whole / "4.npz")
    sac.main(["--resume", str(run_dir)])

    args = sac.read_run(run_dir)
    start = sac.init_train_state(args, sac.Env(args), mesh, jax.random.key(9))
    states = [sac.restore(args, folder, start) for folder in (tmp_path / "whole", run_dir)]
    equal = lambda a, b: np.testing.assert_array_equal(as_numpy(a), as_numpy(b))  # noqa: E731
    jax.tree.map(equal, *states)
    assert int(states[1].learner.iteration) == 4
    assert int(states[1].learner.steps) == 32 > args.buffer_rows
    assert states[1].worlds.key.sharding.num_devices == 2
    assert np.abs(states[1].buffer.obs).min(axis=(1, 2)).all()
    assert (run_dir / "policy.npz").read_bytes() == policy


# ---- A finished run, and films


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, one_pendulum) -> Path:
    """A finished run of three iterations."""
    runs = tmp_path_factory.mktemp("runs")
    flags = [*SMALL, "--num-devices", "1", "--total-timesteps", str(3 * STEPS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sac, "judge", lambda *_: {"C MuJoCo": {"mean": 0.0}})
        sac.main([*flags, "--runs-dir", str(runs)])
    (folder,) = runs.iterdir()
    return folder


def test_finished_run_can_be_resumed_and_evaluated(small_run, tmp_path, capsys):
    """--resume of a finished run trains nothing more; --evaluate prints a row a simulator."""
    run_dir = shutil.copytree(small_run, tmp_path / "copy")
    before = (run_dir / "policy.npz").read_bytes()
    sac.main(["--resume", str(run_dir)])
    assert (run_dir / "policy.npz").read_bytes() == before
    evaluation = json.loads((run_dir / "run.json").read_text())["evaluation"]
    assert evaluation.keys() == {"MJX", "C MuJoCo", "Gymnasium"}
    capsys.readouterr()
    sac.main(["--evaluate", str(run_dir), "--eval-episodes", "2"])
    out = capsys.readouterr().out
    for name in ("MJX", "C MuJoCo", "Gymnasium"):
        (row,) = (line for line in out.splitlines() if line.startswith(name))
        assert len(re.findall(r"-?\d+\.\d", row)) == 4


def test_exported_policy_acts_the_same(small_run):
    """The ONNX graph, of a script without a normaliser, gives the torques of `act`."""
    onnx = pytest.importorskip("onnx.reference")
    export.main([str(small_run)])
    obs = np.random.default_rng(0).normal(0, 3, (50, 3)).astype(np.float32)
    with np.load(small_run / "policy.npz") as policy:
        _, expected = sac.act(policy, (), obs)
    graph = onnx.ReferenceEvaluator(str(small_run / "policy.onnx"))
    (torque,) = graph.run(None, {"obs": obs})
    assert torque.shape == (50, 1)
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(torque, expected, atol=1e-5)


def read_film(file: Path) -> tuple[np.ndarray, float]:
    """Frames [F, H, W, 3], and how many are shown in a second."""
    with imageio.get_reader(file) as reader:
        return np.stack([frame for frame in reader]), reader.get_meta_data()["fps"]


def red(frame: np.ndarray) -> int:
    """Pixels of the curves' colour."""
    r, g, b = np.moveaxis(frame.astype(int), -1, 0)
    return int(((r - g > 60) & (r - b > 60)).sum())


@pytest.mark.filterwarnings("ignore:os.fork")  # imageio starts ffmpeg
@pytest.mark.slow
@pytest.mark.parametrize("name", ["training", "policy"])
def test_films(small_run, monkeypatch, capsys, name):
    """The training with its curves, then the trained policy, at real speed; or that one alone."""
    shipped = sac.CMujocoEnv.step

    def step(self, action):  # an episode of 15 steps, for time
        obs, reward, terminated, _, info = shipped(self, action)
        return obs, reward, terminated, self.elapsed >= 15, info

    monkeypatch.setattr(sac.CMujocoEnv, "step", step)
    film_pendulum.main([str(small_run), *(["--policy-only"] if name == "policy" else [])])
    file = small_run / "videos" / f"{name}.mp4"
    assert f"video: {file}\n" in capsys.readouterr().out
    frames, fps = read_film(file)
    count = 15 if name == "policy" else 3 * 8 + 15
    assert frames.shape == (count, 400, 800, 3)
    assert fps == 20
    rods = frames[:, :, :400].astype(int)
    moving = np.abs(np.diff(rods, axis=0)).max(axis=(1, 2, 3)) > 50
    assert moving.mean() > 0.9
    assert (red(frames[-1]) > 100) == (name == "training")


# ---- The window


@pytest.fixture
def picture():
    figure = Figure((10, 5), layout="tight")
    FigureCanvasAgg(figure)
    return live_window.Picture(figure)


def tips(picture: live_window.Picture) -> np.ndarray:
    """Where the free ends of the rods are: [4, 2]; NaN for one that was never drawn."""
    paths = [rod.get_xydata() for rod in picture.rods]
    return np.array([[*path[-1]] if len(path) else [np.nan] * 2 for path in paths])


def start_log(run_dir: Path, first: int) -> sac.PendulumLog:
    return sac.PendulumLog(sac.Args(num_envs=4, num_steps=3), run_dir, first)


def write(log: sac.PendulumLog, iteration: int, angle: float) -> None:
    """What an iteration of 3 steps has to tell; the first has no episode to tell of, so NaN."""
    values = {tag: np.float32(iteration + i) for i, tag in enumerate(live_window.TAGS.values())}
    if iteration == 1:
        values["charts/episodic_return"] = np.float32(np.nan)
    counts = ["charts/episodes_finished", "charts/nan_resets", "charts/skipped_in_a_row"]
    values |= dict.fromkeys(counts, np.int32(0))
    angles = angle + jnp.arange(3.0)[:, None] + jnp.zeros(4)
    log.write(iteration, values | {"black_box": {}, "angles": angles})


def curve(picture: live_window.Picture, name: str) -> tuple[list, list]:
    x, y = picture.curves[live_window.TAGS[name]].get_data()
    return list(x), list(y)


def test_window_shows_what_is_new(picture, tmp_path):
    """The last iteration is played a frame a pose; only then is there a look at what came next."""
    player = live_window.Player(picture, live_window.RunLog(tmp_path))
    log = start_log(tmp_path, 0)
    assert player.next_frame(0) is picture.rods  # there is nothing to show yet
    assert np.isnan(tips(picture)).all()

    write(log, 1, angle=1.0)
    write(log, 2, angle=2.0)
    for angle in (2.0, 3.0, 4.0):
        assert player.next_frame(0) is picture.rods
        np.testing.assert_allclose(tips(picture), 4 * [[np.sin(angle), np.cos(angle)]], atol=1e-6)
        if angle == 2.0:
            write(log, 3, angle=7.0)
        assert curve(picture, "return") == ([24], [2.0])
        assert curve(picture, "temperature") == ([12, 24], [4.0, 5.0])
    low, high = picture.curves["losses/alpha"].axes.get_ylim()
    assert low <= 4.0 < 5.0 <= high  # the axes follow

    for angle in (7.0, 8.0, 9.0, 9.0, 9.0):  # the last pose stays
        player.next_frame(0)
        np.testing.assert_allclose(tips(picture), 4 * [[np.sin(angle), np.cos(angle)]], atol=1e-6)
    assert curve(picture, "temperature") == ([12, 24, 36], [4.0, 5.0, 6.0])


def test_window_forgets_what_a_resumed_run_replaced(picture, tmp_path):
    """A run that went on from an earlier checkpoint has each iteration once."""
    log = start_log(tmp_path, 0)
    for iteration in (1, 2, 3):
        write(log, iteration, angle=0.0)
    player = live_window.Player(picture, live_window.RunLog(tmp_path))
    player.next_frame(0)
    write(start_log(tmp_path, 1), 2, angle=5.0)
    player.look_for_news()
    assert curve(picture, "temperature") == ([12, 24], [4.0, 5.0])
    player.next_frame(0)
    np.testing.assert_allclose(tips(picture), 4 * [[np.sin(5), np.cos(5)]], atol=1e-6)


def test_picture_of_two_worlds(picture):
    """Upright is up, clockwise is right, and rods without a world stay away."""
    picture.pose(np.float32([0, np.pi / 2]))
    np.testing.assert_allclose(
        tips(picture), [[0, 1], [1, 0], [np.nan] * 2, [np.nan] * 2], atol=1e-6
    )


def test_window_of_a_run(small_run, monkeypatch):
    """The tool plays a run's pendulums at the speed of its task; closed, it ends."""
    seen = {}

    def animate(figure, next_frame, interval, **_):
        seen["interval"] = interval
        for _ in range(8):
            rods = next_frame(0)
        seen["rods"] = [rod.get_xydata()[-1] for rod in rods]

    def open_figure(title, **options):
        figure = Figure(**options)
        FigureCanvasAgg(figure).required_interactive_framework = "a stub"
        return figure

    monkeypatch.setattr(live_window.pyplot, "figure", open_figure)
    monkeypatch.setattr(live_window.animation, "FuncAnimation", animate)
    monkeypatch.setattr(live_window.pyplot, "show", lambda: seen.update(shown=True))
    monkeypatch.setattr(live_window.os, "nice", lambda increment: seen.update(nice=increment))
    monkeypatch.setattr(live_window, "wait_for_run", lambda folder: small_run)
    live_window.main([])
    assert seen["shown"]
    assert seen["nice"] == 19
    assert seen["interval"] == 50  # ms
    log = live_window.RunLog(small_run)
    log.read()
    last = log.angles()[3 * STEPS][-1]
    np.testing.assert_allclose(seen["rods"], np.stack([np.sin(last), np.cos(last)], 1), atol=1e-5)


def test_window_waits_for_the_next_run(tmp_path, monkeypatch, capsys):
    """One that begins after the tool was started, as soon as it has a log."""
    for name in ("old", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "old" / "events.1").touch()

    def sleep(_):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "events.1").touch()

    monkeypatch.setattr(live_window.time, "sleep", sleep)
    assert live_window.wait_for_run(tmp_path) == tmp_path / "new"
    assert "waiting for a run" in capsys.readouterr().out


def test_window_without_display(small_run, tmp_path):
    """Without a display one line says so."""
    tool = SCRIPT.parent / "tools" / "live_window.py"
    done = call(tool, str(small_run), cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"error: there is no display.*\n", done.stderr)


# ---- Folders that are no runs


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run that has only its settings yet."""
    small = {"num_devices": 1, "num_envs": 16, "buffer_size": 320, "hidden_sizes": (16, 16)}
    args = dataclasses.replace(sac.Args(), **small)
    sac.write_run(tmp_path, {"args": dataclasses.asdict(args)})
    return tmp_path


def refused(capsys, main, *argv) -> str:
    """Call the script; it must end with code 2 and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as stop:
        main([str(flag) for flag in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    assert len(error) > 20
    return error


def test_run_without_policy(folder, capsys):
    """What a run did not get to save is missed in one line."""
    assert "no policy" in refused(capsys, sac.main, "--evaluate", folder)
    assert "no policy" in refused(capsys, film_pendulum.main, folder)


@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
def test_run_of_the_other_script(tmp_path, capsys, flag):
    """A run of ppo_mjx.py is refused, and so are settings that the command line would not take."""
    reasons = {
        "no run folder of this script": ppo_mjx.Args(),
        "setting env_id": sac.Args(env_id="Hopper"),
        "--num-envs 0: must be": sac.Args(num_envs=0),
        "setting gravity": sac.Args(gravity="x"),
    }
    for reason, args in reasons.items():
        sac.write_run(tmp_path, {"args": dataclasses.asdict(args)})
        assert reason in refused(capsys, sac.main, flag, tmp_path)


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
    arrays = {"max_torque": np.float32(2), "w0": trap, "b0": np.zeros(1, np.float32)}
    np.savez(folder / "policy.npz", **arrays)
    refused(capsys, sac.main, "--evaluate", folder)
    refused(capsys, film_pendulum.main, folder)
    assert not (tmp_path / "trapped").exists()
    with np.load(folder / "policy.npz", allow_pickle=True) as file:
        dict(file)
    assert (tmp_path / "trapped").exists()  # it would have gone off
