"""tools/play.py: its loop by a viewer that shows nothing, its keys, newer policies, films, bad calls."""

import contextlib
import dataclasses
import json
import os
import time
import types
from pathlib import Path

import imageio
import mujoco
import numpy as np
import pytest

import ppo_mjx
import ppo_mjx_unitree as unitree
from tools import play


class FakeClock:
    """The module time, in which only sleeping takes time."""

    strftime = staticmethod(time.strftime)
    localtime = staticmethod(time.localtime)

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


class FakeViewer:
    """What `play` uses of MuJoCo's viewer, open for so many steps. at: step -> what happens in it."""

    def __init__(self, steps: int, at: dict | None = None):
        self.steps = steps
        self.at = at or {}
        self.synced = 0
        self.texts = []
        self.opt = mujoco.MjvOption()
        self.user_scn = mujoco.MjvScene(mujoco.MjModel.from_xml_string("<mujoco/>"), 10)

    def is_running(self) -> bool:
        return self.synced < self.steps

    def lock(self):
        return contextlib.nullcontext()

    def sync(self) -> None:
        self.at.get(self.synced, int)()
        self.synced += 1

    def set_texts(self, texts) -> None:
        self.texts.append(texts)


def write_run(folder, script, args, policy: dict) -> None:
    run = {"script": f"{script.__name__}.py", "args": dataclasses.asdict(args)}
    (folder / "run.json").write_text(json.dumps(run))
    np.savez(folder / "policy.npz", **policy)


def make_policy(obs_size: int, action_size: int, bias: float = 0.0) -> dict:
    """One linear layer, whose action is always `bias`."""
    return {
        "obs_mean": np.zeros(obs_size),
        "obs_var": np.ones(obs_size),
        "w0": np.zeros((obs_size, action_size)),
        "b0": np.full(action_size, bias),
    }


def make_walker(folder, robot: str = "g1") -> play.Player:
    args = unitree.default_args(robot)
    row = unitree.ROBOTS[robot]
    parts = unitree.seen_parts(row, "actor")
    size = sum(unitree.part_width(row, part) for part in parts.values())
    write_run(folder, unitree, args, make_policy(size, len(row.acted)) | unitree.mirror_rules(row))
    return play.Player(play.find_played(folder, None, None), 0)


@pytest.fixture
def player(tmp_path):
    return make_walker(tmp_path)


@pytest.mark.parametrize(
    "keys, command",
    [
        ("W", (0.3, 0, 0)),
        ("WWWS", (0.4, 0, 0)),
        ("WS", (0, 0, 0)),
        ("WSS", (-0.3, 0, 0)),
        ("WWSSSSW", (-0.3, 0, 0)),
        ("A", (0, 0.3, 0)),
        ("AW", (0.3, 0.3, 0)),
        ("D", (0, -0.3, 0)),
        ("Q", (0, 0, 0.3)),
        ("EE", (0, 0, -0.4)),
        ("W" * 30, (1, 0, 0)),
        ("S" * 30, (-0.6, 0, 0)),
        ("WAQ ", (0, 0, 0)),
        ("XW", (0.3, 0, 0)),
    ],
)
def test_keys_make_commands(player, keys, command):
    """Within the run's ranges, and never so slow that it looks dead; other keys do nothing."""
    for key in keys:
        player.press(ord(key))
    player.obey_keys()
    np.testing.assert_allclose(player.command, command, atol=1e-9)
    seen = unitree.part_slices(
        unitree.ROBOTS["g1"], unitree.seen_parts(unitree.ROBOTS["g1"], "actor")
    )
    scale = np.array(unitree.SEEN["actor"]["command"].scale)
    np.testing.assert_allclose(
        player.world.observe(player.command)[seen["command"]], command * scale, atol=1e-9
    )


def test_push_and_reset(player):
    player.step()
    before = player.world.data.qvel.copy()
    player.press(play.ENTER)
    player.obey_keys()
    change = player.world.data.qvel - before
    assert np.linalg.norm(change[:2]) == pytest.approx(unitree.PUSH_SPEED) and not change[2:].any()
    player.press(play.BACKSPACE)
    player.obey_keys()
    assert player.world.data.time == 0 and player.world.original.elapsed == 0


@pytest.mark.parametrize("robot", unitree.ROBOTS)
def test_walks_as_in_the_scripts_test(tmp_path, robot):
    """The same start and the same actions lead to the same state; after a fall it starts anew."""
    player = make_walker(tmp_path, robot)
    original = unitree.CMujocoEnv(unitree.ROBOTS[robot])
    for env in (player.world, original):
        env.reset(7)
    for _ in range(10):
        player.step()
        original.step(unitree.act(player.policy, (), original.observe((0, 0, 0)))[1])
    np.testing.assert_array_equal(player.world.data.qpos, original.data.qpos)

    player.world.data.qpos[2] = 0.1
    steps = round(play.AFTER_FALL / player.world.control_dt)
    for _ in range(steps - 1):
        player.step()
    assert player.down > 0
    player.step()
    player.step()
    assert not player.down and player.world.original.elapsed < 5


def test_loop(player, monkeypatch, capsys):
    """Steps and syncs alternate; the viewer's shortcuts on our keys come to nothing; a new policy acts."""
    monkeypatch.setattr(play, "LOOK_EVERY", 0.0)
    clock = FakeClock()
    monkeypatch.setattr(play, "time", clock)
    file = player.policy_file.file
    started = []

    def press():
        player.press(ord("W"))
        viewer.user_scn.flags[mujoco.mjtRndFlag.mjRND_WIREFRAME] ^= 1
        viewer.opt.flags[mujoco.mjtVisFlag.mjVIS_CONTACTPOINT] ^= 1

    def write(bias: float, age: int):
        rules = unitree.mirror_rules(unitree.ROBOTS["g1"])
        np.savez(file, **make_policy(*player.policy["w0"].shape, bias), **rules)
        os.utime(file, ns=(0, age))

    def break_file():
        file.write_bytes(b"PK no policy")
        os.utime(file, ns=(0, 9))

    viewer = FakeViewer(
        12,
        {
            2: press,
            4: lambda: write(0.5, 1),
            6: break_file,
            8: lambda: started.append(player.policy),
            10: lambda: clock.sleep(0.05),  # a slow picture, which is made up for
        },
    )
    play.play(player, viewer)

    assert viewer.synced == 12 and player.world.original.elapsed == 12
    assert player.world.data.time == pytest.approx(12 * unitree.CONTROL_DT)
    np.testing.assert_allclose(player.command, (0.3, 0, 0))
    assert not viewer.user_scn.flags[mujoco.mjtRndFlag.mjRND_WIREFRAME]  # by W
    assert viewer.opt.flags[mujoco.mjtVisFlag.mjVIS_CONTACTPOINT]  # by C, which is not ours
    assert viewer.user_scn.ngeom == 2
    np.testing.assert_array_equal(player.world.original.action, np.full(12, 0.5))
    assert started[0]["b0"][0] == 0.5, "a broken file changes nothing"
    assert capsys.readouterr().out.count("policy of") == 1
    assert "+0.3" in viewer.texts[-1][3]
    assert clock.now == pytest.approx(10 * unitree.CONTROL_DT + 0.05)

    start = clock.now
    play.play(player, FakeViewer(31, {0: lambda: clock.sleep(9)}))
    made_up = 10  # steps of the 9 s: the rest has become slow motion
    assert clock.now - start == pytest.approx(9 + (31 - 1 - made_up) * unitree.CONTROL_DT)
    assert made_up * unitree.CONTROL_DT == play.MOST_BEHIND


def test_window(player, monkeypatch):
    """The viewer gets the player's model, data and keys, and a camera that follows the robot."""
    viewer = FakeViewer(1)
    viewer.cam = mujoco.MjvCamera()
    got = {}

    def launch(model, data, key_callback, **options):
        got.update(model=model, data=data)
        key_callback(ord("W"))
        return viewer

    fake = types.SimpleNamespace(launch_passive=launch)
    monkeypatch.setattr(play.importlib, "import_module", lambda name: {"mujoco.viewer": fake}[name])
    assert play.open_viewer(player) is viewer
    assert got == {"model": player.world.model, "data": player.world.data}
    assert list(player.keys) == [ord("W")] and viewer.cam.trackbodyid == 1


def count_frames(file) -> tuple[int, float]:
    with imageio.get_reader(file) as film:
        return sum(1 for _ in film), film.get_meta_data()["fps"]


def test_film(tmp_path, player):
    """Each command for its seconds, at real speed, with 25 frames a second."""
    file = tmp_path / "film.mp4"
    commands = play.read_commands("1 0 0, 0 0 0.6", player.world.ranges)
    np.testing.assert_array_equal(commands, [[1, 0, 0], [0, 0, 0.6]])
    play.record(player, commands, 0.2, file)
    assert count_frames(file) == (10, 25)
    assert player.world.data.time == pytest.approx(0.4)
    np.testing.assert_array_equal(player.command, commands[1])


def test_task_without_commands(one_env, tmp_path, capsys):
    """A run of ppo_mjx.py: it plays, its keys but Backspace do nothing, it is filmed."""
    write_run(
        tmp_path,
        ppo_mjx,
        ppo_mjx.Args(env_id="InvertedPendulum"),
        make_policy(4, 1) | {"action_scale": np.ones(1), "action_bias": np.zeros(1)},
    )
    player = play.Player(play.find_played(tmp_path, None, None), 0)
    for key in (ord("W"), play.SPACE, play.ENTER):
        player.press(key)
    play.play(player, FakeViewer(3))
    assert player.world.original.elapsed == 3
    player.press(play.BACKSPACE)
    player.obey_keys()
    assert player.world.original.elapsed == 0

    file = tmp_path / "film.mp4"
    play.main([str(tmp_path), "--record", str(file), "--seconds", "0.2"])
    assert count_frames(file) == (5, 25)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        play.main([str(tmp_path), "--record", str(file), "--commands", "1 0 0"])
    assert stop.value.code == 2 and "takes no commands" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--record", "film.gif"], "has to end in .mp4"),
        (["--record", "no/such/film.mp4"], "cannot write to the folder"),
        (["--record", "film.mp4", "--seconds", "nan"], "--seconds nan"),
        (["--record", "film.mp4", "--commands", "1 0"], "three numbers"),
        (["--record", "film.mp4", "--commands", "1 0 x"], "could not convert"),
        (["--record", "film.mp4", "--commands", "1 0 0,"], "three numbers"),
        (["--record", "film.mp4", "--commands", "3 0 0"], "is not between"),
        (["--record", "film.mp4", "--seed", "-1"], "--seed -1"),
        (["--commands", "1 0 0"], "--commands is for --record"),
        (["--record", "film.mp4", "--script", "no.py"], "its script is not there"),
        (["--record", "film.mp4", "--script", play.__file__], "no environment in C MuJoCo"),
    ],
)
def test_bad_calls(tmp_path, monkeypatch, capsys, flags, message):
    """One line, and exit code 2."""
    make_walker(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        play.main([str(tmp_path), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_bad_folders(tmp_path, monkeypatch, capsys):
    """No run, no policy, a policy of another robot, no display."""
    make_walker(tmp_path)
    policy = tmp_path / "policy.npz"
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    fake = types.SimpleNamespace(init=lambda: False)
    import_module = play.importlib.import_module
    monkeypatch.setattr(
        play.importlib,
        "import_module",
        lambda name: fake if name == "glfw" else import_module(name),
    )

    def error_of(*flags) -> str:
        with pytest.raises(SystemExit) as stop:
            play.main([str(flag) for flag in flags])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        return error

    assert "no display" in error_of(tmp_path)
    film = ("--record", tmp_path / "film.mp4")
    assert "is no run folder" in error_of(tmp_path / "none", *film)
    np.savez(policy, **make_policy(45, 12))
    assert "does not fit" in error_of(tmp_path, *film)
    policy.unlink()
    assert "no policy that can be read" in error_of(tmp_path, *film)
    make_walker(tmp_path, "go2")  # as many numbers as the G1's
    assert "of another robot" in error_of(policy, "--robot", "g1", *film)
    assert "--robot has to say" in error_of(policy, *film)
    assert "--robot no: there are" in error_of(policy, "--robot", "no", *film)


def test_a_policy_without_its_run(tmp_path, capsys):
    """One of those that ship, with the robot's own commands; and what has changed since a run."""
    docs = Path(unitree.__file__).parent / "docs"
    source = play.find_played(docs / "g1_policy.npz", None, "g1")
    player = play.Player(source, 0)
    np.testing.assert_array_equal(player.world.ranges, [(-0.6, 1), (-0.4, 0.4), (-0.8, 0.8)])
    player.press(ord("W"))
    player.obey_keys()
    for _ in range(100):
        player.step()
    assert player.world.data.qpos[0] > 0.2 and not player.down
    player.reset()
    player.command = np.array([unitree.MIN_COMMAND, 0, 0])  # which is why a stroke asks for more
    for _ in range(100):
        player.step()
    assert abs(player.world.data.qpos[0]) < 0.1
    play.tell_changes(source)
    assert not capsys.readouterr().out

    make_walker(tmp_path)
    (tmp_path / "ppo_mjx_unitree.py").write_text("# other rewards")
    play.main([str(tmp_path), "--record", str(tmp_path / "film.mp4"), "--seconds", "0.04"])
    assert "the code has changed" in capsys.readouterr().out
