"""Tune the settings of ppo_mjx.py or sac_mjx.py: the sooner a return is reached, the better.

    pip install optuna
    python tools/tune.py --target 3000 --flags "--env-id Hopper"
    python tools/tune.py --target 3000 --flags "--env-id Hopper" --seeds 1 2 3 --trials 100

Each trial draws settings from `suggest`, below: edit it to tune other flags. It trains with each
seed, one after the other, as a process of its own, as a user would start it, and is worth the mean
of the seconds from the start of a process to the first evaluation in MJX that reaches the target.
A training that does not reach it within --seconds counts these, and the more of them again, the
more it misses. Optuna (its sampler TPE) draws settings near those that were good, and ends trials
that are behind the median of the others at the same second.

Trials are kept in a file (--storage): the same call again goes on where it was interrupted. Nothing
else should run on the machine, as seconds are what counts; programs come from the user's compile
cache, if a setting has been compiled before.

Tune with few seeds, then test the winner with others: the best of many trials has been lucky.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ("ppo_mjx.py", "sac_mjx.py")
LOOK_EVERY = 0.5  # s, between looks at a training's log
REPORTS = 20  # to Optuna in the time of a trial
PATIENCE = 20.0  # s, for a training to save and end


def suggest(trial, script: str) -> dict[str, object]:
    """The flags of a trial: name -> value. Products must fit: num_minibatches divides the batch."""
    if script == "sac_mjx.py":
        num_envs = trial.suggest_categorical("num-envs", [16, 32, 64])
        learning_rate = trial.suggest_float("learning-rate", 1e-4, 3e-3, log=True)
        ratio = trial.suggest_categorical("update-to-data", [0.5, 1.0, 2.0, 3.0])
        steps = num_envs * 8  # of --num-steps 8
        return {
            "num-envs": num_envs,
            "policy-lr": learning_rate,
            "q-lr": learning_rate,
            "updates-per-iteration": 3 * round(ratio * steps / 3),  # of --policy-frequency 3
            "n-step": trial.suggest_int("n-step", 1, 5),
            "total-timesteps": trial.suggest_int("total-timesteps", 50_000, 500_000, log=True),
        }
    return {
        "num-envs": trial.suggest_categorical("num-envs", [128, 256, 512, 1024]),
        "num-steps": trial.suggest_categorical("num-steps", [16, 32, 64]),
        "num-minibatches": trial.suggest_categorical("num-minibatches", [8, 16, 32, 64]),
        "update-epochs": trial.suggest_int("update-epochs", 2, 10),
        "learning-rate": trial.suggest_float("learning-rate", 1e-4, 5e-3, log=True),
        "gamma": 1 - trial.suggest_float("1-gamma", 1e-3, 5e-2, log=True),
        # The step size falls to 0 at the end, so the length of the training is a setting, too.
        "total-timesteps": trial.suggest_int("total-timesteps", 300_000, 10_000_000, log=True),
    }


def fail(message: str) -> None:
    """End with one line and exit code 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


def read_returns(runs: Path) -> list[float]:
    """The returns of a training's evaluations so far."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for folder in runs.glob("*"):
        log = EventAccumulator(str(folder)).Reload()
        if "eval/episodic_return" in log.Tags()["scalars"]:
            return [event.value for event in log.Scalars("eval/episodic_return")]
    return []


def end(process: subprocess.Popen) -> None:
    """Ask a training to end, then make it."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def miss(target: float, returns: list[float]) -> float:
    """How much of the way from the first return to the target was missed: 0 to 1."""
    if not returns:
        return 1.0
    way = target - returns[0]
    return min(max((target - max(returns)) / way, 0.0), 1.0) if way > 0 else 0.0


def train(
    command: list[str],
    target: float,
    limit: float,
    report: Callable[[float, float], None] = lambda seconds, missed: None,
) -> float:
    """Train by a process until the target is reached: what the training is worth, in seconds.

    report is called with the seconds so far and what is missed, at each look; what it raises ends
    the training.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        with open(Path(folder) / "log.txt", "w+") as log:
            start = time.perf_counter()
            process = subprocess.Popen(
                [*command, "--runs-dir", str(runs)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                while True:
                    ended = process.poll() is not None
                    returns = read_returns(runs)
                    seconds = time.perf_counter() - start
                    missed = miss(target, returns)
                    if returns and max(returns) >= target:
                        return seconds
                    if ended or seconds > limit:
                        break
                    report(seconds, missed)
                    time.sleep(LOOK_EVERY)
            finally:
                end(process)
            if process.returncode == 2:
                log.seek(0)
                fail(f"{shlex.join(command)}: {log.read()[-300:]}")
    return limit * (1 + missed)


def make_objective(flags: argparse.Namespace):
    """What Optuna minimises: a trial's mean seconds over the seeds."""
    from optuna import TrialPruned

    def objective(trial) -> float:
        settings = suggest(trial, flags.script)
        values = " ".join(f"--{name} {value}" for name, value in settings.items())
        trial.set_user_attr("flags", values)
        command = [sys.executable, flags.script, *shlex.split(flags.flags), *shlex.split(values)]
        command += ["--eval-every", "0.05"]

        reported = -1

        def report(number: int, seconds: float, missed: float) -> None:
            nonlocal reported
            step = number * REPORTS + int(REPORTS * seconds / flags.seconds)
            if step <= reported:
                return
            reported = step
            trial.report(missed, step)
            if trial.should_prune():
                raise TrialPruned

        total = 0.0
        for number, seed in enumerate(flags.seeds):
            total += train(
                [*command, "--seed", str(seed)],
                flags.target,
                flags.seconds,
                lambda seconds, missed, number=number: report(number, seconds, missed),
            )
        return total / len(flags.seeds)

    return objective


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", choices=SCRIPTS, default=SCRIPTS[0])
    parser.add_argument("--target", type=float, required=True, help="return to reach")
    parser.add_argument("--seconds", type=float, default=120.0, help="for one training")
    parser.add_argument("--flags", default="", help='of the script, such as "--env-id Hopper"')
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of each trial")
    parser.add_argument("--trials", type=int, default=40, help="that are added to the study")
    parser.add_argument("--study", help="its name; by default script, flags and target")
    parser.add_argument("--storage", default="sqlite:///tune.db", help="where trials are kept")
    flags = parser.parse_args(argv)
    if flags.seconds <= 0 or flags.trials <= 0:
        fail("--seconds and --trials must be more than 0")
    try:
        import optuna
    except ImportError:
        fail("this tool needs Optuna: pip install optuna")

    study = optuna.create_study(
        study_name=flags.study or f"{flags.script} {flags.flags} {flags.target:g}",
        storage=flags.storage,
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=1, multivariate=True),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=REPORTS // 4),
    )
    try:
        study.optimize(make_objective(flags), n_trials=flags.trials)
    except KeyboardInterrupt:
        print(f"stopped; the same call goes on with {flags.storage}")

    done = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    print(f"{len(study.trials)} trials, {len(done)} of them to the end; the best:")
    for trial in sorted(done, key=lambda trial: trial.value)[:5]:
        print(
            f"{trial.value:7.1f} s  python {flags.script} {flags.flags} {trial.user_attrs['flags']}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
