"""What can go wrong with a run, done to real processes of each script, and what came of it.

    python benchmarks/faults.py                   all of it, about an hour on two cores
    python benchmarks/faults.py --only kill disk  some of it
    python benchmarks/faults.py --only memory --minutes 60
    python benchmarks/faults.py --smoke           one of each, for the quickest script

Each fault is told by one line: what was done, how many times, whether all went as promised, and what was seen. Writes
benchmarks/results/NAME.json. The exit code is 1 if a promise was broken.
"""

import contextlib
import ctypes
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).parent.parent
SCRIPTS = {  # flags of a run of 60 iterations that is over soon; {} takes what the fault needs
    "sac_mjx_pendulum": "--num-envs 64 --num-steps 8 --batch-size 64 --learning-starts 512 --eval-episodes 2 "
                        "--eval-every 7 --hidden-sizes 16 --buffer-size 262144",
    "ppo_mjx": "--env-id Hopper --num-envs 16 --num-steps 16 --num-minibatches 4 --update-epochs 2 --hidden-sizes 16 "
               "--eval-every 7 --eval-episodes 2",
    "ppo_mjx_unitree": "--num-envs 16 --num-steps 16 --num-minibatches 4 --update-epochs 2 --hidden-sizes 16",
}  # fmt: skip
STEPS = {"sac_mjx_pendulum": 512, "ppo_mjx": 256, "ppo_mjx_unitree": 256}  # of one iteration
EXPLODING = {  # changes that make a model explode
    "ppo_mjx": "import gymnasium, pathlib; t = m.TASKS['Hopper']; p = pathlib.Path(gymnasium.__file__).parent\n"
               "x = (p / 'envs/mujoco/assets' / t.mjcf).read_text().replace('gear=\"200.0\"', 'gear=\"2000000\"')\n"
               "m.TASKS['Hopper'] = dataclasses.replace(t, mjcf=x)",
    "sac_mjx_pendulum": "m.check_args = lambda args: None\n"  # it refuses such a gravity
                        "m.TASKS['Pendulum-v1'] = dataclasses.replace(m.TASKS['Pendulum-v1'], gravity=3e38)",
    "ppo_mjx_unitree": "make = m.make_controller\n"
                       "def strong(robot):\n"
                       "    c = make(robot)\n"
                       "    return c._replace(stiffness=1e6 + 0 * c.stiffness, max_torque=1e9 + 0 * c.max_torque)\n"
                       "m.make_controller = strong",
}  # fmt: skip
NAN_LOSS = {  # changes that make every gradient NaN
    "ppo_mjx": "loss = m.ppo_loss; m.ppo_loss = lambda *x: (lambda y: (y[0] * float('nan'), y[1]))(loss(*x))",
    "sac_mjx_pendulum": "loss = m.critic_loss; m.critic_loss = lambda *x: (lambda y: (y[0] * float('nan'), y[1]))("
                        "loss(*x))",
    "ppo_mjx_unitree": "loss = m.ppo_loss; m.ppo_loss = lambda *x: (lambda y: (y[0] * float('nan'), y[1]))(loss(*x))",
}  # fmt: skip


@dataclasses.dataclass
class Args:
    only: tuple[str, ...] = ()  # faults; by default all but memory
    scripts: tuple[str, ...] = tuple(SCRIPTS)
    kills: int = 10  # of each script
    iterations: int = 150  # of training for each kill
    flips: int = 100  # of each script's checkpoints
    fuzz: int = 100  # calls of each script
    minutes: float = 60  # of training for memory
    seed: int = 0
    name: str = "faults"  # of the JSON file
    smoke: bool = False


FINISHED = (0, 1)  # exit codes of a run; 1 if the trained policy fails its test, as here it does


# ---- Runs -----------------------------------------------------------------------------------------------------------
def command(script: str, *flags: str, change: str = "") -> list[str]:
    """A call of the script; change: Python that is run before, on the script's module m."""
    if not change:
        return [sys.executable, str(ROOT / f"{script}.py"), *flags]
    code = f"import dataclasses, sys, {script} as m\n{change}\nm.main(sys.argv[1:])"
    return [sys.executable, "-c", code, *flags]


def flags_of(script: str, iterations: int = 60, every: int = 3) -> list[str]:
    total = iterations * STEPS[script]
    return f"{SCRIPTS[script]} --num-devices 1 --total-timesteps {total} --checkpoint-every {every}".split()


def environment(**more) -> dict:
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | more


def call(argv: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        argv, env=environment(), capture_output=True, text=True, timeout=900, **options
    )


class Run:
    """A process in the background, its output in a file; the lines of progress show how far it is."""

    def __init__(self, argv: list[str], folder: Path, **options):
        self.file, self.start = folder / f"output_{time.time_ns()}.txt", time.perf_counter()
        with open(self.file, "w") as out:
            self.process = subprocess.Popen(
                argv,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(**options.pop("env", {})),
                **options,
            )

    @property
    def text(self) -> str:
        return self.file.read_text(errors="replace")

    def wait_for(self, condition, seconds: float = 600) -> bool:
        """Until the condition holds or the process ends; whether it held."""
        end = time.perf_counter() + seconds
        while not condition():
            if self.process.poll() is not None or time.perf_counter() > end:
                return bool(condition())
            time.sleep(0.0005)
        return True

    def trains(self) -> bool:
        return " unused: " in self.text

    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error: ")]

    def end(self, seconds: float = 900) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return -999


def only_run(folder: Path) -> Path | None:
    runs = (
        [run for run in folder.iterdir() if (run / "run.json").exists()] if folder.exists() else []
    )
    return runs[0] if runs else None


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("*.npz"), reverse=True)


def read(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def curves(run_dir: Path) -> dict[str, list[tuple]]:
    """All scalars but the speed, as TensorBoard shows them: (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells what it purges
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)]
            for tag in log.Tags()["scalars"] if tag != "charts/SPS"}  # fmt: skip


def same_end(one: Path, other: Path) -> list[str]:
    """In what two finished runs differ, bit for bit."""
    a, b = read(checkpoints(one)[0]), read(checkpoints(other)[0])
    differ = [
        name
        for name in a.keys() | b.keys()
        if name != "args"
        and not (
            name in a
            and name in b
            and a[name].dtype == b[name].dtype
            and a[name].tobytes() == b[name].tobytes()
        )
    ]
    if (one / "policy.npz").read_bytes() != (other / "policy.npz").read_bytes():
        differ.append("policy.npz")
    mine, theirs = curves(one), curves(other)
    return differ + [tag for tag in mine.keys() | theirs.keys() if mine.get(tag) != theirs.get(tag)]


def whole_run(script: str, folder: Path, iterations: int) -> Path:
    """A run that nothing disturbs."""
    done = call(command(script, *flags_of(script, iterations), "--runs-dir", str(folder / "whole")))
    run_dir = only_run(folder / "whole")
    assert run_dir and checkpoints(run_dir), done.stdout + done.stderr
    return run_dir


def row(fault: str, script: str, times: int, good: int, seen: str) -> dict:
    print(
        f"{'pass' if good == times else 'FAIL'}  {fault:<42} {script:<18} {good:4} of {times:4}  {seen}",
        flush=True,
    )
    return {"fault": fault, "script": script, "times": times, "as_promised": good, "seen": seen}


# ---- Faults ---------------------------------------------------------------------------------------------------------
def parts(runs: Path) -> set[tuple]:
    """Checkpoints that are being written, or were left in the middle."""
    found = set()
    for part in runs.glob("*/checkpoints/*.part"):
        with contextlib.suppress(FileNotFoundError):  # it was put in place meanwhile
            found.add((part, part.stat().st_mtime_ns))
    return found


def kill(args: Args, script: str, folder: Path):
    """kill -9 until the run is done, by turns in the middle of writing a checkpoint, while it trains, and at any moment
    since the start of the process, be it before training."""
    dice, iterations = random.Random(args.seed), args.iterations * args.kills
    whole, runs, kills, cut = whole_run(script, folder, iterations), folder / "runs", 0, 0
    while True:
        run_dir = only_run(runs)
        flags = (
            ["--resume", str(run_dir)]
            if run_dir
            else [*flags_of(script, iterations), "--runs-dir", str(runs)]
        )
        before, run = parts(runs), Run(command(script, *flags), folder)
        if kills % 3 == 2 and kills < args.kills:
            time.sleep(dice.uniform(0, 15))
        else:
            run.wait_for(run.trains)
        if kills < args.kills:
            if kills % 3 == 1:
                time.sleep(dice.uniform(0, 1.0))
            elif kills % 3 == 0:
                run.wait_for(lambda before=before: parts(runs) - before, 20)
            if run.process.poll() is None:
                run.process.kill()
                run.end()
                kills, cut = kills + 1, cut + bool(parts(runs) - before)
                continue
        if run.end() not in FINISHED or "trained for" not in run.text:
            return [row("kill -9, then --resume", script, args.kills, 0, run.text[-300:])]
        break
    differ = same_end(whole, only_run(runs))
    seen = f"{cut} in the middle of a checkpoint; " + (
        f"differs in {differ[:5]}" if differ else "equal to the bit"
    )
    return [row("kill -9, then --resume", script, args.kills, 0 if differ else kills, seen)]


def damage(args: Args, script: str, folder: Path):
    """Broken checkpoints: the newest is damaged, and the run must go on from the one before, or say what differs."""
    dice, whole = random.Random(args.seed), whole_run(script, folder, 9)
    other = next(name for name in SCRIPTS if name != script)
    foreign = whole_run(other, folder / "other", 3)
    newest, before = checkpoints(whole)[:2]
    good = newest.read_bytes()
    cases = {
        "cut short": lambda: good[: dice.randrange(1, len(good))],
        "empty": lambda: b"",
        "noise": lambda: (
            good[: (i := dice.randrange(len(good) - 512))] + dice.randbytes(512) + good[i + 512 :]
        ),
        "a checkpoint of another script": lambda: checkpoints(foreign)[0].read_bytes(),
    }
    rows = []
    for name, broken in cases.items():
        copy = folder / "copy"
        shutil.copytree(whole, copy)
        (copy / "checkpoints" / newest.name).write_bytes(broken())
        done = call(command(script, "--resume", str(copy)))
        if "another script" in name:
            line = done.stderr.strip()
            passed = (
                done.returncode == 2
                and line.count("\n") == 0
                and "differs from run.json in" in line
            )
        else:
            lines = [line for line in done.stdout.splitlines() if "is broken" in line]
            line = lines[0] if lines else done.stdout[-200:] + done.stderr[-200:]
            passed = (
                len(lines) == 1 and "trying the one before" in line and not same_end(whole, copy)
            )
        rows.append(
            row(f"checkpoint: {name}", script, 1, int(passed), line.replace(str(folder), "")[:150])
        )
        shutil.rmtree(copy)
    told = same = 0
    for _ in range(args.flips):  # what `restore` reads, as it reads it
        i, file = dice.randrange(len(good)), folder / "flipped.npz"
        file.write_bytes(good[:i] + bytes([good[i] ^ 1 << dice.randrange(8)]) + good[i + 1 :])
        try:
            arrays, right = read(file), read(newest)
            # The zip file's directory may lose its last entries; the scripts count them.
            complete = arrays.keys() == right.keys()
            told += not complete
            same += complete and all(np.array_equal(arrays[name], right[name]) for name in right)
        except Exception:
            told += 1
    seen = f"{told} refused, {same} in bytes that hold nothing, {args.flips - told - same} read as other numbers"
    return [*rows, row("checkpoint: one bit flipped", script, args.flips, told + same, seen)]


def signals(args: Args, script: str, folder: Path):
    """SIGINT and SIGTERM, once and twice."""
    rows, whole = [], whole_run(script, folder, 200)
    for number in signal.SIGINT, signal.SIGTERM:
        runs = folder / number.name
        run = Run(
            command(script, *flags_of(script, 200, every=1000), "--runs-dir", str(runs)), folder
        )
        run.wait_for(lambda run=run: "step " in run.text)
        run.process.send_signal(number)
        code, told = run.end(), re.search(r"to continue: python (.*)", run.text)
        passed = code == 128 + number and told
        if told:
            call([sys.executable, *shlex.split(told[1])])
            differ = same_end(whole, only_run(runs))
            passed = passed and not differ
        seen = f"exit code {code}; resumed by the printed command, " + (
            "equal" if passed else "not as promised"
        )
        rows.append(row(f"{number.name}, then --resume", script, 1, int(bool(passed)), seen))
    runs = folder / "twice"
    change = (
        "import time\nreal = m.os.replace\ndef replace(part, file):\n    if '10.npz' in str(file):\n"
        "        print('half', flush=True)\n        time.sleep(60)\n    real(part, file)\nm.os.replace = replace"
    )
    run = Run(
        command(script, *flags_of(script, 200, every=5), "--runs-dir", str(runs), change=change),
        folder,
    )
    run.wait_for(lambda: "half" in run.text)
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    start = time.perf_counter()
    run.process.send_signal(signal.SIGINT)
    code, seconds = run.end(), time.perf_counter() - start
    last = checkpoints(only_run(runs))[0]
    seen = f"exit code {code} after {seconds:.2f} s, the checkpoint before is whole"
    good = seconds < 2 and code != 0 and int(last.stem) == 5 and read(last) and parts(runs)
    return [*rows, row("SIGINT twice, in the middle of saving", script, 1, int(bool(good)), seen)]


def obey_modes() -> None:
    """Let file modes bind the superuser as well: no CAP_DAC_OVERRIDE (Linux)."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def disk(args: Args, script: str, folder: Path):
    """A full disk, and a folder that loses its write right, after the first checkpoint."""
    rows, small = [], folder / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(small)], capture_output=True
    )
    run = Run(command(script, *flags_of(script, 5000), "--runs-dir", str(small / "runs")), folder)
    run.wait_for(lambda: (run_dir := only_run(small / "runs")) and checkpoints(run_dir))
    if mounted.returncode == 0:
        how = "disk full (a small file system)"
        try:
            with open(small / "ballast", "wb") as ballast:
                while True:
                    ballast.write(bytes(1 << 16))
        except OSError:
            pass
    else:
        how = "disk full (no file may grow)"
        # Output, but no checkpoint.
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
    code, errors = run.end(120), run.errors()
    last = checkpoints(only_run(small / "runs"))
    passed = (
        code == 1 and len(errors) == 1 and "Traceback" not in run.text and last and read(last[0])
    )
    if mounted.returncode == 0:
        (small / "ballast").unlink()
    resumed = Run(command(script, "--resume", str(only_run(small / "runs"))), folder)
    goes_on = resumed.wait_for(lambda: "step " in resumed.text)
    resumed.process.kill()
    resumed.end()
    if mounted.returncode == 0:
        subprocess.run(["umount", str(small)])
    seen = (errors or [run.text[-200:]])[0].replace(str(folder), "")[:160]
    seen += "; resumed" if goes_on else f"; not resumed: {resumed.text[-300:]}"
    seen += "" if passed else f"; {len(errors)} errors, {len(last)} checkpoints: {run.text[-1000:]}"
    rows.append(row(how, script, 1, int(bool(passed and goes_on)), f"exit code {code}; {seen}"))

    runs = folder / "locked"
    run = Run(
        command(script, *flags_of(script, 5000), "--runs-dir", str(runs)),
        folder,
        preexec_fn=obey_modes,
    )
    run.wait_for(lambda: (run_dir := only_run(runs)) and checkpoints(run_dir))
    run_dir = only_run(runs)
    for path in (run_dir, run_dir / "checkpoints"):
        path.chmod(0o555)
    code, errors = run.end(120), run.errors()
    passed = (
        code == 1
        and len(errors) == 1
        and "Traceback" not in run.text
        and read(checkpoints(run_dir)[0])
    )
    seen = (errors or [run.text[-200:]])[0].replace(str(folder), "")[:160]
    seen = f"exit code {code}; {seen}"
    return [*rows, row("the run folder loses its write right", script, 1, int(bool(passed)), seen)]


def nan(args: Args, script: str, folder: Path):
    """A model that explodes, and a loss that is not a number."""
    change, runs = EXPLODING[script], folder / "runs"
    run = Run(
        command(script, *flags_of(script, 6), "--runs-dir", str(runs), change=change),
        folder,
        cwd=folder,
    )
    run.wait_for(lambda: "trained for" in run.text)
    run.process.kill()
    run.end()
    run_dir = only_run(runs)
    resets = curves(run_dir).get("charts/nan_resets", [(0, 0)])[-1][1]
    finite = all(np.isfinite(x).all() for x in read(run_dir / "policy.npz").values())
    dump = run_dir / "nan_dump.npz"
    replay = f"import dataclasses, {script} as m\n{change}\n"
    replay += f"from tools import replay_nan\nreplay_nan.main([{str(dump)!r}])"
    done = call([sys.executable, "-c", replay], cwd=folder)
    told = [line for line in done.stdout.splitlines() if line.startswith("In step 0")]
    passed = resets > 0 and finite and dump.exists() and done.returncode == 0 and told
    seen = f"{resets:.0f} resets, the policy is {'' if finite else 'not '}finite; tools/replay_nan.py: "
    seen += (told or [done.stderr[-200:]])[0]
    rows = [row("a model that explodes", script, 1, int(bool(passed)), seen)]
    flags = [*flags_of(script, 60), "--runs-dir", str(folder / "loss")]
    run = Run(command(script, *flags, change=NAN_LOSS[script]), folder)
    code, errors = run.end(), run.errors()
    passed = (
        code == 1
        and len(errors) == 1
        and "in a row are not finite" in errors[0]
        and "Traceback" not in run.text
    )
    seen = f"exit code {code}; {(errors or [run.text[-200:]])[0].replace(str(folder), '')}"
    return rows + [row("gradients that are not finite", script, 1, int(passed), seen)]


FUZZER = """
import contextlib, io, json, os, pathlib, random, signal, sys, time, traceback
import jax
import {script} as m
def late(*_):
    raise TimeoutError("it hangs")
signal.signal(signal.SIGALRM, late)
m.stop_wanted = lambda stops, iteration: iteration >= 1  # one iteration is enough
m.listen = lambda: []
{quiet}
for line in sys.stdin:
    argv, before, start = json.loads(line), set(pathlib.Path().rglob("*")), time.time()
    out, error, code, trace = io.StringIO(), io.StringIO(), 0, ""
    signal.alarm(180)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            m.main(argv)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        trace = traceback.format_exc()[-600:]
    signal.alarm(0)
    jax.clear_caches()  # each program maps memory, and Linux allows a process 65530 mappings
    new = sorted(map(str, set(pathlib.Path().rglob("*")) - before))
    print(json.dumps([argv, code, error.getvalue(), trace, new, time.time() - start]), flush=True)
"""


def fuzz(args: Args, script: str, folder: Path):
    """Random calls: each runs one iteration or ends with code 2 and one line, and leaves nothing behind."""
    sys.path.insert(0, str(ROOT))
    fields = dataclasses.fields(__import__(script).Args)
    dice = random.Random(f"{args.seed} {script}")
    work = folder / "work"
    (work / "a_folder").mkdir(parents=True)
    (work / "a_file").write_text("nothing")
    foreign = whole_run(next(name for name in SCRIPTS if name != script), folder, 3)
    shutil.copytree(foreign, work / "foreign")
    shutil.copytree(whole_run(script, folder / "own", 3), work / "own")
    base = flags_of(script, 1)
    ints = "0 -1 1 2 3 8 17 1000 1000000 1000000000000 100000000000000000000 1.5 abc nan".split()
    floats = "0 -1 1e-9 0.1 0.5 1 3 1e6 1e30 nan inf -inf abc".split()
    tuples = ["", "0", "-1 1", "8", "8 8", "1 -1", "0.5 0.5", "1000000", "nan nan", "abc"]
    words = [
        "",
        "a b",
        "../x",
        "x" * 300,
        "a_file",
        "a_folder",
        "missing",
        "foreign",
        "own",
        "a_file/x",
        "\x00",
        "é",
    ]
    left_out = {"smoke", "capture_video", "track", "total_timesteps", "coordinator_address"}

    def draw() -> list[str]:
        argv = [*base, "--runs-dir", "runs"]
        for field in dice.sample(
            [f for f in fields if f.name not in left_out], dice.choice([1, 1, 2, 3])
        ):
            flag, kind = "--" + field.name.replace("_", "-"), str(field.type)
            if field.type is bool:
                argv += [dice.choice([flag, "--no-" + flag[2:], flag + "=maybe"])]
            elif "tuple" in kind:
                argv += [flag, *dice.choice(tuples).split()]
            else:
                pool = ints if "int" in kind else floats if "float" in kind else words
                pool = [*pool, *getattr(field.type, "__args__", ())] if "Literal" in kind else pool
                argv += [flag, str(dice.choice(pool))]
        if dice.random() < 0.1:
            argv += [dice.choice(["--no-such-flag", "stray", "--", "-x", "--seed"])]
        return argv

    quiet = "m.judge = lambda *_: {'passed': True, 'C MuJoCo': {'mean': 0.0}}"
    code = FUZZER.format(script=script, quiet=quiet)
    calls = [draw() for _ in range(args.fuzz)]
    done = call(
        [sys.executable, "-c", code], input="\n".join(map(json.dumps, calls)) + "\n", cwd=work
    )
    results = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "["]
    ran = 0
    refused = 0
    bad = []
    for argv, code, error, trace, new, _ in results:
        left = [path for path in new if path != "runs" and not path.startswith("MUJOCO_LOG")]
        if trace or code not in (0, 2):
            bad.append((argv[len(base) :], trace or code))
        elif code == 2 and (error.count("\n") != 1 or not error.startswith("error: ") or left):
            bad.append((argv[len(base) :], error, left))
        ran, refused = ran + (code == 0 and not trace), refused + (code == 2)
    for problem in bad:
        print("     ", problem)
    if len(results) < args.fuzz:
        print("     ", calls[len(results)], done.returncode, done.stderr[-500:])
    slowest = max(result[-1] for result in results)
    return [
        row(
            "random flags",
            script,
            args.fuzz,
            len(results) - len(bad),
            f"{ran} ran, {refused} refused by one line; the slowest took {slowest:.0f} s",
        )
    ]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(script: str, folder: Path, processes: int, *flags: str) -> list[Run]:
    """As many processes that train together, one device each."""
    address = f"127.0.0.1:{free_port()}"
    return [Run(command(script, *flags, "--coordinator-address", address, "--num-processes", str(processes),
                        "--process-id", str(i)), folder) for i in range(processes)]  # fmt: skip


def processes(args: Args, script: str, folder: Path):
    """Several processes: the same curve as one with as many devices, checkpoints to and fro, one that dies."""
    rows = []
    for count in (2, 4):
        flags = flags_of(script, 60)
        flags[flags.index("--num-devices") + 1] = str(count)
        alone, many = folder / f"alone{count}", folder / f"many{count}"
        call(command(script, *flags, "--runs-dir", str(alone)))
        codes = [
            run.end() for run in together(script, folder, count, *flags, "--runs-dir", str(many))
        ]
        one, two = only_run(alone), only_run(many)
        if not (one and two):
            rows.append(row(f"{count} processes", script, 1, 0, f"exit codes {codes}"))
            continue
        a, b = curves(one), curves(two)
        # Iterations; its contacts amplify rounding soon.
        few = 4 if script == "ppo_mjx_unitree" else 8
        early, late = (
            max(
                abs(x - y) / (abs(x) + 1e-3)
                for tag in a
                for (step, x), (_, y) in zip(a[tag], b[tag], strict=True)
                if step <= last * STEPS[script]
            )
            for last in (few, 60)
        )
        files = len(list(two.glob("events*")))
        passed = (
            all(code in FINISHED for code in codes)
            and early < 1e-3
            and len(list(many.iterdir())) == files == 1
        )
        rows.append(
            row(
                f"{count} processes against {count} devices of one",
                script,
                1,
                int(passed),
                f"largest relative difference of all curves: {early:.1e} in {few} iterations, "
                f"{late:.1e} in 60",
            )
        )
    flags = flags_of(script, 60)
    flags[flags.index("--num-devices") + 1] = "2"
    for first, second in ((2, 1), (1, 2)):
        copy = folder / f"from{first}"
        shutil.copytree(only_run(folder / ("many2" if first == 2 else "alone2")), copy)
        checkpoints(copy)[0].unlink()
        if second == 1:
            runs = [Run(command(script, "--resume", str(copy)), folder)]
        else:
            runs = together(script, folder, 2, "--resume", str(copy))
        codes, there = [run.end() for run in runs], read(checkpoints(copy)[0])
        right = read(checkpoints(only_run(folder / "alone2"))[0])
        error = max(
            float(np.abs(there[name].astype(float) - right[name].astype(float)).max(initial=0))
            for name in right
            if name != "args"
        )
        passed = (
            all(code in FINISHED for code in codes)
            and int(there[".learner.iteration"]) == 60
            and error < 1e-3
        )
        rows.append(
            row(
                f"a checkpoint of {first} resumed by {second}",
                script,
                1,
                int(passed),
                f"largest difference of the final state: {error:.1e}",
            )
        )
    for victim in (1, 0):
        flags = flags_of(script, 5000)
        flags[flags.index("--num-devices") + 1] = "2"
        runs = folder / f"victim{victim}"
        pair = together(script, folder, 2, *flags, "--runs-dir", str(runs))
        pair[0].wait_for(lambda pair=pair: "step " in pair[0].text)
        start = time.perf_counter()
        pair[victim].process.kill()
        code = pair[1 - victim].end(90)
        seconds, text = time.perf_counter() - start, pair[1 - victim].text
        clear = "or another process has failed" in text or "another task died" in text
        resumed = together(script, folder, 2, "--resume", str(only_run(runs)))
        goes_on = resumed[0].wait_for(lambda resumed=resumed: "step " in resumed[0].text)
        for run in resumed:
            run.process.kill()
            run.end()
        good = code not in (0, -999) and clear and goes_on
        rows.append(
            row(
                f"process {victim} of two is killed",
                script,
                1,
                int(good),
                f"the other ended after {seconds:.1f} s with code {code}; resumed by both: {goes_on}",
            )
        )
    runs = folder / "stopped"
    pair = together(script, folder, 2, *flags, "--runs-dir", str(runs))
    pair[0].wait_for(lambda: "step " in pair[0].text)
    pair[1].process.terminate()
    codes = [run.end(90) for run in pair]
    stopped = codes == [143, 143] and "to continue" in pair[0].text
    rows.append(
        row(
            "SIGTERM to process 1 of two",
            script,
            1,
            int(stopped),
            f"exit codes {codes}, both after the same iteration",
        )
    )
    return rows


def memory(args: Args, script: str, folder: Path):
    """Resident memory over a long run, and how far TensorBoard's file is behind."""
    flags = ["--total-timesteps", str(10**11), "--runs-dir", str(folder / "runs")]
    if script == "sac_mjx_pendulum":
        flags += ["--checkpoint-every", "500"]
    run, samples, lags = Run(command(script, *flags), folder), [], []
    run.wait_for(run.trains)
    start = time.perf_counter()
    while (seconds := time.perf_counter() - start) < 60 * args.minutes:
        time.sleep(min(10, 6 * args.minutes))
        pages = int(Path(f"/proc/{run.process.pid}/statm").read_text().split()[1])
        samples.append((round(seconds), pages * resource.getpagesize() // 2**20))
        lags.append(
            time.time() - max(file.stat().st_mtime for file in folder.glob("runs/*/events*"))
        )
    run.process.terminate()
    code = run.end()
    tail = [mib for seconds, mib in samples if seconds > 6 * args.minutes]  # after the first tenth
    third = len(tail) // 3
    growth = statistics.median(tail[-third:]) - statistics.median(tail[:third])
    seen = (
        f"{tail[0]} MiB after {args.minutes / 10:.0f} minutes, {tail[-1]} at the end, {growth:+.0f} between the "
        f"first and the last third; TensorBoard's file at most {max(lags):.1f} s old"
    )
    passed = code == 143 and growth < 0.02 * tail[0]
    return [
        row(f"{args.minutes:.0f} minutes of training", script, 1, int(passed), seen)
        | {"samples": samples}
    ]


FAULTS = {f.__name__: f for f in (kill, damage, signals, disk, nan, fuzz, processes, memory)}


def main(args: Args) -> int:
    if args.smoke:
        args = dataclasses.replace(args, scripts=args.scripts[:1], kills=2, flips=10, fuzz=10, minutes=0.2,
                                   name=args.name + "_smoke")  # fmt: skip
    rows = []
    result = {"command": " ".join(["python", *sys.argv]), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
              "versions": {name: importlib.metadata.version(name) for name in ("jax", "mujoco", "numpy")}}  # fmt: skip
    for name in args.only or [name for name in FAULTS if name != "memory" or args.smoke]:
        for script in args.scripts:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                try:
                    rows += FAULTS[name](args, script, Path(folder))
                except Exception as error:
                    rows.append(
                        row(name, script, 1, 0, f"the benchmark itself failed: {error!r:.300}")
                    )
                    subprocess.run(["umount", f"{folder}/small"], capture_output=True)  # of `disk`
            file = ROOT / "benchmarks" / "results" / f"{args.name}.json"
            file.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")
    return int(any(row["as_promised"] < row["times"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Args)))
