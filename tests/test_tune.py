"""tools/tune.py: what a training is worth, how it is ended, and a whole study of a script that only pretends."""

import sys
import time
from types import SimpleNamespace

import pytest

from tools import tune

# Its return rises by 10 in each 0.1 s, up to 1000 times the learning rate.
SCRIPT = """
import argparse, signal, sys, time
from pathlib import Path
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
parser = argparse.ArgumentParser()
for name in ("--runs-dir", "--learning-rate", "--seed", "--eval-every", "--env-id"):
    parser.add_argument(name)
flags, _ = parser.parse_known_args()
if flags.env_id == "bad":
    print("error: no such task")
    sys.exit(2)
folder = Path(flags.runs_dir) / "run"
folder.mkdir(parents=True)
writer = RecordWriter(open(folder / "events.out.tfevents.1", "wb"))
signal.signal(signal.SIGTERM, lambda *_: (Path(FOLDER, "terms").open("a").write("x"), sys.exit(0)))
for i in range(8):
    value = min(10.0 * i, 1000 * float(flags.learning_rate))
    summary = Summary(value=[Summary.Value(tag="eval/episodic_return", simple_value=value)])
    writer.write(Event(step=i, wall_time=time.time(), summary=summary).SerializeToString())
    writer.flush()
    time.sleep(0.1)
time.sleep(LINGER)
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """(lingers for so many seconds) -> how to start the script."""
    monkeypatch.setattr(tune, "LOOK_EVERY", 0.05)

    def make(linger: float = 0.0) -> list[str]:
        script = tmp_path / "script.py"
        script.write_text(f"FOLDER, LINGER = {str(tmp_path)!r}, {linger}\n" + SCRIPT)
        return [sys.executable, str(script)]

    return make


def test_what_is_missed():
    """From the first return, 1, to the target, 0; also where returns are negative."""
    for target, returns, expected in [
        (100, [], 1.0),
        (100, [0.0, 25.0, 20.0], 0.75),
        (100, [0.0, 120.0], 0.0),
        (100, [50.0, 20.0], 1.0),
        (-4, [-12.0, -6.0], 0.25),
        (-4, [-3.0], 0.0),
    ]:
        assert tune.miss(target, returns) == pytest.approx(expected)


def test_a_training_is_worth_its_seconds(command, tmp_path):
    """To the target and no longer; if it ends below, the limit and the more, the more it misses."""
    call = [*command(linger=60), "--learning-rate", "0.05"]
    start = time.perf_counter()
    seconds = tune.train(call, 40, limit=30)
    assert 0.3 < seconds < 25 and time.perf_counter() - start < seconds + 5
    assert (tmp_path / "terms").read_text() == "x"  # asked to end, not killed

    call = [*command(), "--learning-rate", "0.05"]
    assert tune.train(call, 100, limit=30) == pytest.approx(30 * 1.5)


def test_a_training_that_is_too_slow_is_ended(command):
    call = [*command(linger=60), "--learning-rate", "0.05"]
    assert tune.train(call, 100, limit=3) >= 3 * 1.5


def test_what_the_report_raises_ends_the_training(command, tmp_path):
    reports = []

    def report(seconds, missed):
        reports.append((seconds, missed))
        if missed < 0.8:
            raise KeyError

    with pytest.raises(KeyError):
        tune.train([*command(linger=60), "--learning-rate", "0.05"], 100, 60, report)
    assert (tmp_path / "terms").read_text() == "x"
    assert reports == sorted(reports) and reports[0][1] == 1.0


def test_a_bad_call_is_one_line(command, capsys):
    with pytest.raises(SystemExit) as error:
        tune.train([*command(), "--env-id", "bad"], 100, 5)
    line = capsys.readouterr().err
    assert error.value.code == 2 and "no such task" in line and line.count("\n") == 1


def test_a_study(command, tmp_path, monkeypatch, capsys):
    """Better learning rates come out first, and the same call goes on with the trials that are there."""
    pytest.importorskip("optuna")
    monkeypatch.setattr(tune, "SCRIPTS", (command()[1],))
    monkeypatch.setattr(
        tune,
        "suggest",
        lambda trial, script: {"learning-rate": trial.suggest_float("learning-rate", 0.01, 0.1)},
    )
    call = [
        "--target",
        "20",
        "--seconds",
        "20",
        "--seeds",
        "1",
        "--trials",
        "2",
        "--script",
        command()[1],
    ]
    call += ["--storage", f"sqlite:///{tmp_path}/study.db"]
    tune.main(call)
    tune.main(call)
    lines = capsys.readouterr().out.splitlines()
    found = lines.index(next(line for line in lines if line.startswith("4 trials")))
    values = [float(line.split()[0]) for line in lines[found + 1 :]]
    assert len(values) == 4 and values == sorted(values)
    rates = [float(line.split("--learning-rate ")[1]) for line in lines[found + 1 :]]
    # Below 0.02 the returns end before the target.
    for value, rate in zip(values, rates, strict=True):
        assert (value < 20) == (rate >= 0.02)


@pytest.mark.parametrize("script", tune.SCRIPTS)
def test_settings_fit(script):
    """All that may be drawn is accepted by the script: the extremes of each range."""
    import importlib

    module = importlib.import_module(script.removesuffix(".py"))
    for which in (0, -1):
        trial = SimpleNamespace(
            suggest_categorical=lambda name, values, which=which: values[which],
            suggest_float=lambda name, low, high, log=False, which=which: (low, high)[which],
            suggest_int=lambda name, low, high, log=False, which=which: (low, high)[which],
        )
        flags = [f"--{name}={value}" for name, value in tune.suggest(trial, script).items()]
        module.check_args(module.parse_args([*flags, "--num-devices", "1"]))


def test_bad_calls(capsys):
    for call in (["--target", "1", "--seconds", "0"], ["--target", "1", "--trials", "0"]):
        with pytest.raises(SystemExit) as error:
            tune.main(call)
        assert error.value.code == 2 and "more than 0" in capsys.readouterr().err
