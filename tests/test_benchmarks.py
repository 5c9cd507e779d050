"""What the benchmarks compute from what they measured; and that they import, refuse and fail as they say."""

import builtins
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import common
import compare_ppo
import curves
import follow_motion
import memory
import numpy as np
import pytest
import tables
import throughput
import time_to_return
import time_to_walk

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(file.stem for file in BENCHMARKS.glob("*.py"))


def load(name: str):
    """A benchmark by its path: `onekernel` is the library's name as well."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_every_script_tells_its_flags():
    """Docstring, tyro's Args with --smoke, and a place in docs/benchmarks.md."""
    page = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text()
    for name in set(SCRIPTS) - {"common"}:
        script = load(name)
        assert script.__doc__ and f"`{name}.py`" in page, name
        assert name in ("plot", "tables") or hasattr(script.Args(), "smoke"), name


def test_turns_alternate_and_ratios_are_of_pairs():
    """Each program once a turn, after the warm-ups; the median of the pairs' ratios, not the ratio of medians."""
    calls = []
    seconds = common.take_turns(
        {name: lambda name=name: calls.append(name) for name in "ab"}, repeats=3, warmups=2
    )
    assert calls == list("ababababab") and [len(times) for times in seconds.values()] == [3, 3]
    assert common.ratio([1, 10, 6], [1, 5, 2]) == 2


def test_a_child_that_fails_is_an_error():
    assert common.run_child([sys.executable, "-c", "print('{\"a\": 1}')"]) == {"a": 1}
    with pytest.raises(RuntimeError, match="ended with 3"):
        common.run_child([sys.executable, "-c", "raise SystemExit(3)"])


def test_result_files_tell_how_to_repeat_and_a_gpus_lie_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    for devices, file in (["cpu"], "results/x.json"), (["NVIDIA X"], "results/gpu/x.json"):
        common.write("x", throughput.Args(), {"rows": [1]}, devices=devices)
        told = json.loads((tmp_path / file).read_text())
        assert (
            told["rows"] == [1]
            and told["devices"] == devices
            and told["versions"]["jax"]
            and told["args"]["steps"]
        )
        assert str(tmp_path) not in json.dumps(told)


def test_tables_keep_three_digits(capsys):
    common.table(["a", "b"], [["x", 1234.5], [None, 0.01234]])
    assert capsys.readouterr().out.splitlines()[2:] == ["| x | 1234 |", "| - | 0.0123 |"]


def test_crossing_is_the_first_number_of_worlds_ahead():
    assert throughput.find_crossing({1: 0.1, 256: 1.2, 64: 0.9, 1024: 1.5}) == {
        "from": 256,
        "best_ratio": 1.5,
        "best_num_envs": 1024,
    }
    assert throughput.find_crossing({1: 0.1, 64: 0.6})["from"] is None


def test_memory_is_fitted_by_a_line():
    line = memory.fit([{"num_envs": n, "total": 1000 + 7 * n} for n in (32, 64, 256)])
    assert (
        line["a"] == pytest.approx(1000)
        and line["b"] == pytest.approx(7)
        and line["largest_error"] < 1e-9
    )


def test_a_goal_is_reached_when_the_curve_first_passes_it():
    curve = [{"seconds": 1, "return": 5}, {"seconds": 2, "return": 11}, {"seconds": 3, "return": 9}]
    assert compare_ppo.reached(curve, 10) == 2 and compare_ppo.reached(curve, 12) is None


def test_a_watched_training_tells_its_policies_and_first_update(tmp_path):
    run = tmp_path / "runs" / "x"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text('{"args": {"runs_dir": "runs", "seed": 1}}')
    code = f"""from pathlib import Path
run = Path({str(run)!r})
run.joinpath("events.1").write_bytes(b"hyperparameters")
run.joinpath("policy.npz").write_bytes(b"a policy")
run.joinpath("checkpoints", "000000007.npz").write_bytes(b"")
"""
    (policy,), told, _ = time_to_return.watch([sys.executable, "-c", code], tmp_path)
    assert policy["iteration"] == 7 and policy["file"].read_bytes() == b"a policy"
    assert told == {"args": {"seed": 1}, "first_update_s": None}
    code += 'run.joinpath("events.1").write_bytes(b"hyperparameters, charts/SPS")'
    assert time_to_return.watch([sys.executable, "-c", code], tmp_path)[1]["first_update_s"] > 0


def test_a_kept_training_is_not_trained_again(tmp_path, monkeypatch):
    """Nor taken for one with other flags."""
    calls = []

    def watch(command, folder):
        calls.append(command)
        return (
            [{"seconds": 1.5, "iteration": 7, "file": folder / "policy_0.npz"}],
            {"args": {}},
            2.5,
        )

    monkeypatch.setattr(time_to_walk, "watch", watch)
    folder = tmp_path / "g1"
    folder.mkdir()
    (folder / "policy_9.npz").touch()  # of a training that was stopped
    first = time_to_walk.train(time_to_walk.Args(), "as it is", 1, folder)
    assert first == (
        [{"seconds": 1.5, "iteration": 7, "file": folder / "policy_0.npz"}],
        {"args": {}},
        2.5,
    )
    assert not (folder / "policy_9.npz").exists()
    assert (
        time_to_walk.train(time_to_walk.Args(), "as it is", 1, folder) == first and len(calls) == 1
    )
    with pytest.raises(SystemExit, match="--keep: .*--seed 1"):
        time_to_walk.train(time_to_walk.Args(), "as it is", 2, folder)


def test_policies_of_the_later_part_are_tested(tmp_path, monkeypatch):
    """By their iterations; not one that was saved just before the last. Of an ablation the last alone."""
    monkeypatch.setattr(
        time_to_walk, "ProcessPoolExecutor", lambda count: contextlib.nullcontext(builtins)
    )
    result = {key: 0 for key in time_to_walk.RESULTS} | {"passed": True, "table": {}}
    monkeypatch.setattr(time_to_walk, "judge", lambda script, robot, file: result)
    run = {"args": {"num_envs": 2, "num_steps": 5, "total_timesteps": 1059}, "first_update_s": 1.0}

    def tested(**args) -> list[int]:
        saved = [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 105]
        curve = [{"iteration": i, "seconds": i, "file": tmp_path} for i in saved]
        row = time_to_walk.test(time_to_walk.Args(**args), 1, (curve, run, 9.0))
        return [policy["steps"] // 10 for policy in row["curve"]]

    assert tested(test_from=0.7) == [70, 80, 90, 105]
    assert tested(test_from=0.7, ablations=True) == [105]


@pytest.mark.parametrize("script", time_to_walk.VARIANTS)
def test_variants_are_settings_of_their_script(script):
    """Flags that it takes, weights that its rows have; and but for one each changes something."""
    module = importlib.import_module(script)
    for name, variant in time_to_walk.VARIANTS[script].items():
        args = module.parse_args(variant.flags.split())
        assert variant.weights.keys() <= module.ROBOTS["g1"].weights.keys()
        changed = args != module.Args() or variant.weights or not variant.mirror
        assert bool(changed) == (name != "as it is")


def test_alignment_follows_a_motion_in_its_order():
    """At half to twice its speed, over its end; not backwards, and a robot that stays is not following."""
    motion = np.random.default_rng(0).normal(size=(50, 3))
    ahead = np.concatenate([motion[11:], motion[:20:2], motion[20:30].repeat(2, axis=0)])
    assert follow_motion.aligned_error(ahead, motion, start=10) == 0
    assert follow_motion.aligned_error(ahead + 0.1, motion, start=10) == pytest.approx(0.1)
    assert follow_motion.aligned_error(motion[::-1], motion, start=10) > 0.3
    assert follow_motion.aligned_error(motion[[11] * 20], motion, start=10) > 0.3


def test_labels_that_differ_in_a_seed_share_a_row():
    labels = ["without", "with, seed 1", "with, four frames, seed 2", "with, seed 2"]
    shared = tables.by_variant([{"label": label} for label in labels])
    assert {name: len(rows) for name, rows in shared.items()} == {
        "without": 1,
        "with": 2,
        "with, four frames": 1,
    }


def test_summary_of_times_to_walk():
    """Medians over the seeds; where most of them never pass, there is no time."""
    final = {"falls": 0, "error": 0.1, "yaw": 0.1, "drift": 0.1, "passed": True}
    rows = [{"first_update_s": 1, "final": final, "all_pass": None, "first_pass": seconds and {"seconds": seconds}}
            for seconds in (60, 90, None)]  # fmt: skip
    told = time_to_walk.summarise(rows)
    assert (
        told["first_pass_s"] == 90 and told["all_pass_s"] is None and told["passed at the end"] == 3
    )


def test_summary_of_curves_has_median_and_range():
    rows = [
        {"env_id": "Hopper", "process_s": s, "final": {"mean": m, "steps": 9}}
        for s, m in ((1, 5), (3, 7), (2, 1))
    ]
    told = curves.summarize(rows, curves.PEERS["ppo_mjx"])["Hopper"]
    assert (told["median"], told["min"], told["max"], told["seconds"], told["steps"]) == (
        5,
        1,
        7,
        2,
        9,
    )


@pytest.mark.parametrize("script", curves.PEERS)
def test_curves_are_of_the_tasks_that_the_scripts_peers_have(script, monkeypatch):
    def fail(settings, env_id, seed):
        raise SystemExit("not trained")

    monkeypatch.setattr(common, "run_child", lambda command: ["cpu"])
    monkeypatch.setattr(time_to_return, "measure", fail)
    with pytest.raises(SystemExit) as ended:
        curves.main(curves.Args(script=script, seeds=(1,)))
    assert str(ended.value) == "failed: " + ", ".join(f"{task} 1" for task in curves.PEERS[script])


def test_returns_after_so_many_seconds_are_of_the_policy_that_was_there():
    def row(*points):
        curve = [{"seconds": seconds, "mean": mean} for seconds, mean in points]
        return {"curve": curve, "final": curve[-1]}

    rows = [row((12, 5), (29, 9), (31, 7)), row((14, 6), (40, 8))]
    assert tables.returns_at(rows, 30) == [9, 6]
    assert tables.returns_at(rows, 60) == [7, 8]  # both have ended by then
    assert tables.returns_at(rows, 13) is None  # the second has no policy yet
    assert tables.returns_at(rows, 80) is None  # both had ended after half of that


def test_gpu_script_knows_its_pieces():
    """A wrong piece is refused; each piece starts a script, which is there and has the flags that it is given."""
    text = (BENCHMARKS / "gpu.sh").read_text().replace("\\\n", " ")
    assert subprocess.run(["bash", "-n", BENCHMARKS / "gpu.sh"]).returncode == 0
    (pieces,) = re.findall(r"^all=\((.*)\)$", text, re.MULTILINE)
    for piece in pieces.split():
        assert re.search(rf"\n    {piece}\)((?!;;).)*python benchmarks/", text, re.DOTALL), piece
    for name, rest in re.findall(r"python benchmarks/(\w+)\.py(.*)", text):
        flags = {
            flag.replace("-", "_")
            for flag in re.findall(r" --(?:no-)?([a-z-]+)", re.sub(r'"[^"]*"', "", rest))
        }
        assert flags <= {field.name for field in dataclasses.fields(load(name).Args)}, (name, flags)
    result = subprocess.run([BENCHMARKS / "gpu.sh", "nonsense"], capture_output=True, text=True)
    assert result.returncode == 2 and "no piece nonsense" in result.stdout


def test_result_files_tell_no_folders(tmp_path, monkeypatch):
    """A traceback in a result names files from the project's folder on."""
    monkeypatch.setattr(common, "ROOT", tmp_path)
    traceback = f'File "{tmp_path}/onekernel/api.py", line 100'
    assert common.without_folders(traceback) == 'File "onekernel/api.py", line 100'
