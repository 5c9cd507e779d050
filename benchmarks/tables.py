"""Write the tables of README and docs from the JSON under benchmarks/results/.

    python benchmarks/tables.py          write them
    python benchmarks/tables.py --check  exit with 1 if a page has other figures than the JSON

A page marks the place of a table by two comments; what stands between them is replaced:

    <!-- table: NAME -->
    <!-- end table -->

NAME is one of `TABLES` below. Under each table stands where its figures come from: the command, the
commit, the machine, and whether the scripts had other physics then.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end table -->)", re.DOTALL)

# What the physics of the scripts were before onekernel, for tables that depend on them.
SIMPLIFIED = "simplified models, compiled by XLA"
SIMPLIFIED_G1 = "no dry friction and two iterations of the solver, compiled by XLA"
BY_XLA = "physics compiled by XLA"
TASK_NAMES = {"g1": "G1, 12 joints", "g1_29dof": "G1, 29 joints"}
PEER_NAMES = {
    "ours": "this project",
    "brax_our_env": "Brax on our environment",
    "brax_own": "Brax on its own HalfCheetah",
    "sb3": "Stable-Baselines3",
    "sbx": "SBX",
}
MISSING = "-"


# ---- Numbers as text ----------------------------------------------------------------------------


def three_digits(value: float | None) -> str:
    """Three significant digits; whole numbers as they are."""
    if value is None or not math.isfinite(value):
        return MISSING
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:#.3g}"


def whole(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0f}"


def percent(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else MISSING


def large(value: float | None) -> str:
    """A rate, with three digits: 1.61 million, 127 thousand, 8777."""
    if value is None:
        return MISSING
    if value >= 1e6:
        return f"{three_digits(value / 1e6)} million"
    if value >= 1e4:
        return f"{three_digits(value / 1e3)} thousand"
    return f"{value:.0f}"


def steps_text(value: float | None) -> str:
    """Environment steps: 123k, 1.23M."""
    if value is None:
        return MISSING
    if value >= 1e6:
        return f"{three_digits(value / 1e6)}M"
    return f"{value / 1e3:.0f}k"


def error_text(value: float) -> str:
    """One digit and an exponent for a small number: 4e-6, 0.04."""
    if value == 0 or value >= 0.01:
        return f"{value:.1g}"
    digits, exponent = f"{value:.0e}".split("e")
    return f"{digits}e{int(exponent)}"


def with_each(values: list[float], text: Callable = three_digits) -> str:
    """The median, and each of several values in brackets."""
    median = text(statistics.median(values))
    return median if len(values) == 1 else f"{median} ({', '.join(map(text, values))})"


def with_range(values: list[float], text: Callable = three_digits) -> str:
    """The median, and the range of several values in brackets."""
    median = text(statistics.median(values))
    return median if len(values) == 1 else f"{median} ({text(min(values))} to {text(max(values))})"


# ---- Files and Markdown -------------------------------------------------------------------------


def load(name: str) -> dict:
    """A result file by its name without the ending, such as "curves" or "gpu/g1"."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def names_like(pattern: str) -> list[str]:
    """The result files that match, by name; those of a benchmark's short version are left out."""
    files = sorted(RESULTS.glob(f"{pattern}.json"))
    names = [file.relative_to(RESULTS).with_suffix("").as_posix() for file in files]
    return [name for name in names if not name.endswith("_smoke")]


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def first(result: dict, key: str):
    """A field of the file, or else of the first training that it holds; None without either."""
    if key in result:
        return result[key]
    run = result.get("run") or (result.get("rows") or [{}])[0].get("run", {})
    return run.get(key)


def commits(result: dict) -> list[str]:
    """The file's commit, and those of the trainings that it holds."""
    runs = [result, *(row.get("run", {}) for row in result.get("rows", []))]
    found = [run["commit"][:7] for run in runs if "commit" in run]
    return list(dict.fromkeys(found))


def describe(name: str) -> str:
    """Where a file's figures come from: file, command, commits, machine, JAX's version."""
    result = load(name)
    parts = [f"commit {commit}" for commit in commits(result)]
    parts += [result["machine"].strip(", ")] if "machine" in result else []
    parts += [kind for kind in sorted(set(first(result, "devices") or [])) if kind != "cpu"]
    versions = first(result, "versions") or {}
    parts += [f"jax {versions['jax']}"] if "jax" in versions else []
    parts += [result["note"]] if "note" in result else []
    file = f"[{name}.json](benchmarks/results/{name}.json)"
    return f"{file}: `{result['command'].strip()}`; {', '.join(parts)}."


def sources(names: list[str], earlier: str | None = None) -> str:
    """Where the figures of a table come from.

    earlier: what the physics were in versions before onekernel, for figures that depend on them; a
    file of today names llvmlite among its versions.
    """
    old = [name for name in names if "llvmlite" not in load(name).get("versions", {})]
    lines = [""]
    if earlier and old:
        which = "Measured" if old == names else f"{', '.join(old)}: measured"
        lines.append(f"{which} with an earlier version of the scripts ({earlier}).")
    if len(names) == 1:
        lines.append(describe(names[0]))
    else:
        lines += ["", *(f"- {describe(name)}" for name in names)]
    return "\n".join(lines) + "\n"


# ---- Learning curves ----------------------------------------------------------------------------

MOMENTS = (30, 60, 120)  # s since the start of the process


def curve_rows(name: str = "curves") -> dict[str, list[dict]]:
    """By task: its trainings, a row for each seed."""
    tasks = {}
    for row in load(name)["rows"]:
        tasks.setdefault(row["env_id"], []).append(row)
    return tasks


def peers_of(task: str) -> dict[str, float]:
    """Peers' mean returns, such as {"CleanRL, 1M": 1443}; the number tells after how many steps."""
    return load("curves")["peers"][task]


def return_text(value: float) -> str:
    """A return: whole, but for the small ones of Reacher and Pusher."""
    return f"{value:.1f}" if abs(value) < 50 else f"{value:.0f}"


def reached(row: dict, goal: float) -> dict | None:
    """The first point of a training's curve with this return or a higher one."""
    return next((point for point in row["curve"] if point["mean"] >= goal), None)


def returns_at(rows: list[dict], seconds: float) -> list[float] | None:
    """Each training's return by the last policy of the first so many seconds.

    A training that has ended by then keeps its last policy. None if one has no policy yet, or if all
    had ended in half of the time, so that the figure would say nothing new.
    """
    if all(row["final"]["seconds"] <= seconds / 2 for row in rows):
        return None
    points = [[p for p in row["curve"] if p["seconds"] <= seconds] for row in rows]
    return [early[-1]["mean"] for early in points] if all(points) else None


def passing(rows: list[dict], goal: float, key: str, text: Callable) -> str:
    """Seconds or steps until a goal: the median and each seed, where all of them pass it."""
    points = [reached(row, goal) for row in rows]
    values = [point[key] for point in points if point]
    if not values:
        return f"not in {steps_text(rows[0]['final']['steps'])} steps"
    if len(values) < len(points):
        each = ", ".join(text(point[key]) if point else "never" for point in points)
        return f"{len(values)} of {len(points)} seeds ({each})"
    return with_range(values, text)


def readme_results() -> str:
    """For each task: medians of the returns after so many seconds, and what others have published."""
    rows = []
    for task, seeds in curve_rows().items():
        early = [returns_at(seeds, moment) for moment in MOMENTS]
        final = [row["final"] for row in seeds]
        peers = ", ".join(
            f"{name.replace(', ', ' ')}: {mark:g}" for name, mark in peers_of(task).items()
        )
        rows.append(
            [
                task,
                *(return_text(statistics.median(values)) if values else "" for values in early),
                with_range([point["mean"] for point in final], return_text),
                whole(statistics.median(point["seconds"] for point in final)),
                steps_text(final[0]["steps"]),
                peers,
            ]
        )
    header = ["", *(f"{moment} s" for moment in MOMENTS), "at the end", "seconds then"]
    header += ["steps then", "published by others, after so many steps"]
    return markdown(header, rows)


def ppo_final() -> str:
    rows = []
    for task, seeds in curve_rows().items():
        final = [row["final"] for row in seeds]
        args = seeds[0]["run"]["args"]
        evaluations = [row["evaluation"] for row in seeds]
        transfer = [e["C MuJoCo"]["mean"] / e["MJX"]["mean"] for e in evaluations]
        rows.append(
            [
                f"{task}-v5",
                f"{args['num_envs']} x {args['num_steps']}",
                with_range([row["first_update_s"] for row in seeds], whole),
                steps_text(final[0]["steps"]),
                with_each([point["mean"] for point in final], return_text),
                with_each([point["std"] for point in final], return_text),
                with_range([point["seconds"] for point in final], whole),
                with_range(transfer),
            ]
        )
    header = ["", "worlds x steps", "seconds until the first iteration is done", "steps in all"]
    header += ["return at the end", "standard deviation of the episodes"]
    header += ["seconds until the last policy", "return in C MuJoCo / in MJX"]
    return markdown(header, rows) + sources(["curves"])


def ppo_peers() -> str:
    rows = []
    for task, seeds in curve_rows().items():
        for peer, goal in peers_of(task).items():
            seconds = passing(seeds, goal, "seconds", whole)
            steps = passing(seeds, goal, "steps", steps_text)
            rows.append([f"{task}-v5", peer, f"{goal:g}", seconds, steps])
    header = ["", "peer, steps", "its return", "ours passes it after seconds", "and after steps"]
    return markdown(header, rows)


def training_speed() -> str:
    result = load("training_speed")
    columns = list(result["speed"])
    labels = {
        "train steps/s": ("training, environment steps/s", large),
        "env.step steps/s": ("a scan of `env.step`, environment steps/s", large),
        "physics steps/s": ("a scan of the physics alone, environment steps/s", large),
        "train / env.step": ("training / `env.step`", three_digits),
        "train / physics": ("training / physics alone", three_digits),
    }
    rows = []
    for key, (label, text) in labels.items():
        if all(key in result["speed"][column] for column in columns):
            rows.append([label, *(text(result["speed"][column][key]) for column in columns)])
    header = ["", *(f"{column} worlds" for column in columns)]
    return markdown(header, rows) + sources(["training_speed"], SIMPLIFIED)


def start() -> str:
    """Seconds to the end of the first iteration."""
    starts = load("start")["first_update_s"]
    rows = [
        [f"{label} cache", *(three_digits(seconds[kind]) for seconds in starts.values())]
        for kind, label in (("cold", "empty"), ("warm", "filled"))
    ]
    header = ["seconds to the first update", *(ROBOT_NAMES.get(name, name) for name in starts)]
    return markdown(header, rows) + sources(["start"])


def peers_speed() -> str:
    result = load("compare_ppo")
    speed = result["summary"]["speed"]
    lines = result["summary"].get("lines", {})
    rows = []
    for name, row in speed.items():
        version = result["versions"].get(
            {"sb3": "stable-baselines3", "sbx": "sbx-rl"}.get(name, "brax")
        )
        label = PEER_NAMES[name] if name == "ours" else f"{PEER_NAMES[name]} ({version})"
        size = lines.get(name, {})
        rows.append(
            [
                label,
                large(row["steps/s"]),
                MISSING if name == "ours" else three_digits(row["ours / this"]),
                whole(size.get("lines")),
                whole(size.get("files")),
            ]
        )
    header = ["", "training, environment steps/s", "ours / this"]
    header += ["lines in files that training calls", "files"]
    return markdown(header, rows) + sources(["compare_ppo"], SIMPLIFIED)


def peers_return() -> str:
    names = names_like("compare_ppo_return*")
    goals = ["1000", "2000", "3000"]
    rows = []
    for name in names:
        summary = load(name)["summary"]["return"]
        others = " and ".join(PEER_NAMES[peer] for peer in summary if peer != "ours")
        for peer, row in summary.items():
            label = PEER_NAMES[peer] + (f", in turn with {others}" if peer == "ours" else "")
            seconds = [row[f"s to {goal}"] for goal in goals]
            cells = ["never" if value is None else whole(value) for value in seconds]
            factor = row["ours is faster to its final return by"]
            factor = MISSING if peer == "ours" else three_digits(factor)
            rows.append([label, *cells, whole(row["final return"]), whole(row["all s"]), factor])
    header = ["", *(f"seconds to {goal}" for goal in goals), "return at the end", "after seconds"]
    header += ["ours gets to that return sooner by"]
    return markdown(header, rows) + sources(names, SIMPLIFIED)


# ---- onekernel ----------------------------------------------------------------------------------


def kernel_rows(name: str) -> Iterable[tuple[str, str, dict]]:
    """Task, worlds and the arms of each measurement that a file of benchmarks/onekernel.py has.

    Where an arm has failed the measurement is left out.
    """
    for task, result in load(name)["results"].items():
        for worlds, arms in result["worlds"].items():
            if all("env_steps_per_s" in arm for arm in arms.values()):
                yield TASK_NAMES.get(task, task), worlds, arms


def readme_onekernel() -> str:
    largest = {task: arms for task, _, arms in kernel_rows("onekernel")}  # number of worlds
    speeds = [large(arms["onekernel"]["env_steps_per_s"]) for arms in largest.values()]
    ratios = [three_digits(arms["C MuJoCo"]["onekernel_over_it"]) for arms in largest.values()]
    return markdown(
        ["", *largest],
        [["environment steps/s", *speeds], ["times the speed of C MuJoCo", *ratios]],
    )


def onekernel_speed() -> str:
    rows = []
    for task, worlds, arms in kernel_rows("onekernel"):
        own = arms["onekernel"]
        rows.append(
            [
                task,
                worlds,
                large(own["env_steps_per_s"]),
                large(arms["C MuJoCo"]["env_steps_per_s"]),
                three_digits(arms["C MuJoCo"]["onekernel_over_it"]),
                error_text(own["median_error"]),
                error_text(own["largest_error"]),
            ]
        )
    header = ["", "worlds", "environment steps/s", "C MuJoCo's", "onekernel / C MuJoCo"]
    header += ["median error", "largest error"]
    return markdown(header, rows) + sources(["onekernel"])


def onekernel_compiling() -> str:
    rows = []
    for task, result in load("onekernel")["results"].items():
        told = result["compiling"]
        keys = ["trace_s", "build_s", "llvm_s", "program_s", "cached_s"]
        seconds = [f"{told[key]:.1f}" for key in keys]
        name = TASK_NAMES.get(task, task)
        rows.append([name, *seconds, f"{told['operations']:,}", f"{told['code_kb']:.0f} kB"])
    header = ["seconds", "MJX's tracing", "graph", "LLVM", "from `jit` to a program that runs"]
    header += ["the same in a second process", "operations", "code"]
    return markdown(header, rows) + sources(["onekernel"])


def dense() -> str:
    rows = []
    for row in load("dense")["rows"]:
        size = " x ".join(map(str, row["size"]))
        numbers = [three_digits(row[key]) for key in ("onekernel us", "XLA us", "XLA / onekernel")]
        rows.append([row["network"], size, row["product"], *numbers])
    header = ["", "rows x inputs x outputs", "product", "microseconds", "XLA's", "XLA / onekernel"]
    return markdown(header, rows) + sources(["dense"])


def onekernel_xla() -> str:
    names = names_like("onekernel_xla*")
    rows = []
    for name in names:
        for task, worlds, arms in kernel_rows(name):
            own = arms["onekernel"]
            xla = arms["XLA"]
            rows.append(
                [
                    task,
                    worlds,
                    large(own["env_steps_per_s"]),
                    large(xla["env_steps_per_s"]),
                    three_digits(xla["onekernel_over_it"]),
                    f"{own['program_s']:.1f}",
                    f"{xla['program_s']:.1f}",
                ]
            )
    header = ["", "worlds", "environment steps/s", "XLA's", "onekernel / XLA"]
    header += ["seconds to compile", "XLA's"]
    return markdown(header, rows) + sources(names)


# ---- The G1 -------------------------------------------------------------------------------------

ROBOT_NAMES = {
    "g1": "G1, 12 joints",
    "g1_29dof": "G1, 29 joints",
    "h1": "H1",
    "h1_2": "H1-2",
    "go2": "Go2",
}
WALK_ORDER = list(ROBOT_NAMES)
WALK_HEADER = ["minutes since the start", "steps", "falls", "velocity error", "yaw error", "drift"]


def walk_cells(point: dict) -> list[str]:
    marks = [point[key] for key in ("error", "yaw", "drift")]
    minutes = f"{point['seconds'] / 60:.1f}"
    return [minutes, steps_text(point["steps"]), str(point["falls"]), *map(three_digits, marks)]


def walk_milestones(curve: list[dict]) -> dict[str, dict | None]:
    """The first policy that passes the test, the first after which all do, and the last one."""
    tested = [point for point in curve if "passed" in point]
    last_failure = max((i for i, point in enumerate(tested) if not point["passed"]), default=-1)
    return {
        "first policy that passes": next((point for point in tested if point["passed"]), None),
        "first from which on all pass": next(iter(tested[last_failure + 1 :]), None),
        "last policy": tested[-1],
    }


def walk_rows(label: str, curve: list[dict]) -> list[list[str]]:
    return [
        [label, name, *(walk_cells(point) if point else [MISSING] * len(WALK_HEADER))]
        for name, point in walk_milestones(curve).items()
    ]


SEED_HEADER = ["seed", "first that passes, minutes", "from which on all pass", "last policy"]
SEED_HEADER += WALK_HEADER[1:]


def seed_cells(row: dict) -> list[str]:
    """Of one training: minutes to its milestones, and the last policy's test."""
    points = walk_milestones(row["curve"])
    minutes = [f"{point['seconds'] / 60:.1f}" if point else MISSING for point in points.values()]
    return [str(row["seed"]), *minutes, *walk_cells(points["last policy"])[1:]]


def walk_time() -> str:
    """Of each robot and seed: when a policy first passes, and when all do."""
    names = names_like("time_to_walk_*")
    rows = []
    for name in sorted(names, key=lambda name: WALK_ORDER.index(load(name)["args"]["robot"])):
        label = ROBOT_NAMES[load(name)["args"]["robot"]]
        rows += [[label, *seed_cells(row)] for row in load(name)["rows"]]
    return markdown(["robot", *SEED_HEADER], rows) + sources(names)


def rough_names() -> list[str]:
    names = names_like("time_ppo_mjx_unitree_rough_*")
    return sorted(names, key=lambda name: WALK_ORDER.index(load(name)["args"]["robot"]))


def rough_time() -> str:
    """Of each robot and seed on rough ground: when a policy first passes, and when all do."""
    rows = []
    for name in rough_names():
        for row in load(name)["rows"]:
            points = walk_milestones(row["curve"])
            minutes = [
                f"{point['seconds'] / 60:.1f}" if point else MISSING for point in points.values()
            ]
            last = points["last policy"]
            marks = [three_digits(last[key]) for key in ("error", "yaw")]
            label = ROBOT_NAMES[load(name)["args"]["robot"]]
            steps = steps_text(last["steps"])
            told = [steps, str(last["falls"]), percent(last["crossed"]), *marks]
            rows.append([label, str(row["seed"]), *minutes, *told])
    header = ["robot", "seed", "first that passes, minutes", "from which on all pass"]
    header += ["last policy", "steps", "falls", "crossed", "velocity error", "yaw error"]
    return markdown(header, rows) + sources(rough_names())


def rough_test() -> str:
    """Of the last policy of each robot's first seed: falls of 10 starts and share that crossed."""
    tables = {}
    for name in rough_names():
        result = load(name)
        label = f"{ROBOT_NAMES[result['args']['robot']]}, seed {result['rows'][0]['seed']}"
        tables[label] = result["rows"][0]["final_table"]
    grounds = dict.fromkeys(ground for table in tables.values() for ground in table)
    rows = []
    for ground in grounds:
        cells = [ground]
        for table in tables.values():
            row = table[ground]
            cells += [str(row["falls"]), percent(row["crossed"]), three_digits(row["error"])]
        rows.append(cells)
    header = ["ground"]
    for label in tables:
        header += [f"{label}: falls", "crossed", "velocity error"]
    return markdown(header, rows) + sources(rough_names())


def rough_speed() -> str:
    """Of the environment on each level of ground, beside the plane."""
    arms = {}
    for row in load("rough_speed")["rows"]:
        arms.setdefault(row["arm"], []).append(row)
    robots = [ROBOT_NAMES[row["robot"]] for row in arms["flat"]]
    rows = []
    for arm, cells in arms.items():
        rows.append([arm])
        for row in cells:
            rows[-1] += [large(row["env_steps_per_s"]), three_digits(row["rough / flat"])]
    header = ["ground"]
    for robot in robots:
        header += [f"{robot}: environment steps/s", "/ flat"]
    return markdown(header, rows) + sources(["rough_speed"])


def g1_test() -> str:
    """The test of docs/g1_policy.npz."""
    test = load("g1_policy")["evaluation"]
    columns = ["falls", "error", "yaw", "sway", "slip", "jerk", "power", "drift"]
    rows = [
        [command, *(three_digits(cells[column]) for column in columns)]
        for command, cells in test["table"].items()
    ]
    marks = [three_digits(test[key]) for key in ("error", "yaw", "drift")]
    verdict = "PASS" if test["passed"] else "FAIL"
    told = "\n{}: {} falls, velocity error {} m/s, yaw error {} rad/s, standing drift {} m.\n"
    verdict = told.format(verdict, test["falls"], *marks)
    return markdown(["command", *columns], rows) + verdict + sources(["g1_policy"])


def walk_tests() -> str:
    """The tests of docs/ROBOT_policy.npz, for each robot but the G1, whose test has its own table."""
    names = [name for name in names_like("*_policy") if name != "g1_policy"]
    names.sort(key=lambda name: WALK_ORDER.index(name.removesuffix("_policy")))
    tables = {
        ROBOT_NAMES[name.removesuffix("_policy")]: load(name)["evaluation"]["table"]
        for name in names
    }
    rows = []
    for command in dict.fromkeys(command for table in tables.values() for command in table):
        if command.endswith(", pushed"):
            continue
        cells = [command]
        for table in tables.values():
            if command not in table:
                cells.append(MISSING)
                continue
            calm = table[command]
            pushed = table[f"{command}, pushed"]
            errors = f"{three_digits(calm['error'])}, {three_digits(calm['yaw'])}"
            cells.append(f"{errors}; {calm['falls']}, {pushed['falls']}")
        rows.append(cells)
    return markdown(["command", *tables], rows) + sources(names)


def joint_loads() -> str:
    """Of the joints of both legs: the largest speed and torque of docs/g1_policy.npz in the test."""
    result = load("joint_loads")
    calm, pushed = (result[kind]["rows"] for kind in ("calm", "pushed"))

    def row(label: str, rows: list[dict], key: str, text: Callable) -> list[str]:
        return [label, *(text(cells[key]) for cells in rows)]

    lines = [
        row("largest speed, rad/s", calm, "speed", "{:.1f}".format),
        row("with pushes", pushed, "speed", "{:.1f}".format),
        row("its limit", calm, "no_load_speed", whole),
        row("largest torque, Nm", calm, "torque", "{:.1f}".format),
        row("with pushes", pushed, "torque", "{:.1f}".format),
        row("its limit", calm, "largest_torque", whole),
        row("both at once, of their limits", calm, "both", percent),
        row("with pushes", pushed, "both", percent),
        row("physics steps with more than 100%", pushed, "beyond", "{:.3%}".format),
    ]
    header = ["of both legs", *(cells["joint"].replace("_", " ") for cells in calm)]
    return markdown(header, lines) + sources(["joint_loads"])


def amp_time() -> str:
    """Of each seed with a motion prior: when a policy first passes, and when all do."""
    names = names_like("time_amp_mjx_unitree_*")
    rows = []
    for name in names:
        robot = ROBOT_NAMES[name.removeprefix("time_amp_mjx_unitree_")]
        rows += [[robot, *seed_cells(row)] for row in load(name)["rows"]]
    return markdown(["robot", *SEED_HEADER], rows) + sources(names)


def by_variant(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of motion_prior.py whose labels differ only in a seed, by which they are sorted."""
    variants = {row["label"].rsplit(", seed ", 1)[0]: [] for row in rows}
    for row in sorted(rows, key=lambda row: row["label"]):
        variants[row["label"].rsplit(", seed ", 1)[0]].append(row)
    return variants


def listed(values: Iterable[float]) -> str:
    return ", ".join(three_digits(value) for value in values)


def motion_prior() -> str:
    """Policies of the G1 with 29 joints without and with a motion prior, beside the reference."""
    result = load("motion_prior_g1_29dof")
    variants = by_variant(result["rows"])

    def walking(row: dict, column: str) -> float:
        """A column of the script's own test: the mean over the walking commands, without pushes."""
        table = row["evaluation"]["table"]
        names = [name for name in table if not name.startswith("stand") and "pushed" not in name]
        return statistics.fmean(table[name][column] for name in names)

    def line(label: str, of: Callable, reference: float | None = None) -> list[str]:
        known = MISSING if reference is None else three_digits(reference)
        return [label, known, *(listed(map(of, rows)) for rows in variants.values())]

    passed = [
        f"{sum(row['evaluation']['passed'] for row in rows)} of {len(rows)}"
        for rows in variants.values()
    ]
    reference = result["reference"]
    lines = [
        ["pass the test", MISSING, *passed],
        line("falls in it", lambda row: row["evaluation"]["falls"]),
        line("velocity error, m/s", lambda row: row["evaluation"]["error"]),
        line("yaw error, rad/s", lambda row: row["evaluation"]["yaw"]),
        line("slip of the feet, m/s", lambda row: walking(row, "slip")),
        line("jerk of the actions", lambda row: walking(row, "jerk")),
        line("cost of transport", lambda row: row["cost_of_transport"]),
        line("distance of joint angles, rad", lambda row: row["angle"], 0.0),
        line("distance of joint speeds, rad/s", lambda row: row["speed"], 0.0),
        line("steps of a foot per second", lambda row: row["steps_hz"], reference["steps_hz"]),
        line(
            "height of the soles in steps, m", lambda row: row["clearance"], reference["clearance"]
        ),
        line("right guesses of a fresh discriminator", lambda row: row["fresh_accuracy"], 0.5),
    ]
    labels = {"without": "without a prior", "with": "with it"}
    header = ["", "the reference", *(labels.get(name, name) for name in variants)]
    return markdown(header, lines) + sources(["motion_prior_g1_29dof"])


def amp_ablations() -> str:
    """Trainings with a motion prior that lack a part of it, or have it in another form."""
    rows = []
    for name, found in by_variant(load("amp_ablations")["rows"]).items():
        cells = [", ".join(str(row["evaluation"]["falls"]) for row in found)]
        cells += [
            listed(row["evaluation"][key] for row in found) for key in ("error", "yaw", "drift")
        ]
        cells += [
            listed(row[key] for row in found) for key in ("angle", "speed", "steps_hz", "clearance")
        ]
        cells.append(listed(row["fresh_accuracy"] for row in found))
        rows.append([name.removeprefix("with, "), *cells])
    header = ["variant", "falls", "velocity error", "yaw error", "drift"]
    header += ["distance of angles", "of speeds"]
    header += ["steps of a foot per second", "height of soles", "fresh discriminator"]
    return markdown(header, rows) + sources(["amp_ablations"])


def follow_motion() -> str:
    """Policies trained on motions of others."""
    names = names_like("follow_motion_*")
    rows = []
    for name in names:
        result = load(name)
        for row in result["rows"]:
            cells = [
                percent(row["survival"]),
                *map(three_digits, (row["up_s"], row["joint_error"])),
            ]
            rows.append([row["label"], *cells, three_digits(row["mean_pose_error"])])
    header = ["policy", "up after 20 s", "time up, s", "joint error, rad"]
    return markdown([*header, "of its mean pose"], rows) + sources(names)


def g1_ablations() -> str:
    variants = {}
    for row in load("g1_ablations")["rows"]:
        variants.setdefault(row["variant"], []).append(row["final"])
    rows = []
    for variant, finals in variants.items():
        cells = [", ".join(str(final["falls"]) for final in finals)]
        for key, digits in ("error", 3), ("yaw", 3), ("drift", 2):
            cells.append(", ".join(f"{final[key]:.{digits}f}" for final in finals))
        rows.append([variant, *cells])
    header = ["variant", "falls", "velocity error", "yaw error", "drift"]
    return markdown(header, rows) + sources(["g1_ablations"])


# ---- SAC ----------------------------------------------------------------------------------------


def sac_curves(name: str = "curves_sac") -> str:
    """Returns of sac_mjx.py after so many steps, beside what others have published."""
    tasks = curve_rows(name)
    end = max(row["final"]["steps"] for rows in tasks.values() for row in rows)
    moments = [steps for steps in (100e3, 200e3) if steps < 0.9 * end] + [math.inf]
    rows = []
    for task, seeds in tasks.items():

        def after(steps: float, key: str = "mean", seeds: list[dict] = seeds) -> list[float]:
            points = [
                [point for point in row["curve"] if point["steps"] <= steps][-1] for row in seeds
            ]
            return [point[key] for point in points]

        peers = load(name)["peers"][task]
        rows.append(
            [
                f"{task}-v5",
                *(with_each(after(steps), whole) for steps in moments),
                with_each([seconds / 60 for seconds in after(math.inf, "seconds")]),
                *(whole(peers[peer]) for peer in ("FlashSAC, 100k", "XQC, 200k", "FlashSAC, 200k")),
            ]
        )
    header = ["", *(f"{steps_text(min(steps, end))} steps" for steps in moments)]
    header += ["minutes until then", "FlashSAC, 100k", "XQC, 200k", "FlashSAC, 200k"]
    return markdown(header, rows) + sources([name])


def sac_curves_200k() -> str:
    return sac_curves("curves_sac_200k")


def sac_peers() -> str:
    runs = {name: rows for name, rows in load("compare_sac")["runs"].items() if rows}
    fields = {
        "seconds of training": ("training_s", three_digits),
        "seconds from the start of the process": ("seconds", three_digits),
        "seconds of these to compile the iteration": ("compile_s", three_digits),
        "environment steps": ("steps", whole),
        "return there, or (ours) at the end": ("return_at_end", "{:.1f}".format),
    }
    table = []
    for label, (key, text) in fields.items():
        row = [label]
        for seeds in runs.values():
            values = [seed.get(key) for seed in seeds]
            row.append(MISSING if None in values else with_range(values, text))
        table.append(row)
    header = [f"{PEER_NAMES[name]}, {len(seeds)} seeds" for name, seeds in runs.items()]
    return markdown(["", *header], table) + sources(["compare_sac"], BY_XLA)


def sac_throughput() -> str:
    rows = []
    for worlds, row in load("sac_throughput")["worlds"].items():
        rows.append(
            [
                worlds,
                large(row["acting steps/s"]),
                large(row["training steps/s"]),
                whole(row["updates/s in training"]),
                whole(row["bare updates/s"]),
                f"{row['update / bare']:.2f}",
                f"{row['acting']:.2f}",
            ]
        )
    header = ["worlds", "acting, steps/s", "training, steps/s", "updates/s in training"]
    header += ["bare updates/s", "in training / bare", "share of acting"]
    return markdown(header, rows) + sources(["sac_throughput"], BY_XLA)


def sac_upright() -> str:
    names = names_like("pendulum_upright_*")
    rows = []
    for name in names:
        runs = load(name)["runs"]
        rows.append(
            [
                name.removeprefix("pendulum_upright_"),
                str(len(runs)),
                with_range([run["upright"] for run in runs], "{:.0%}".format),
                with_range([run["return"] for run in runs], "{:.1f}".format),
                with_range([run["train_s"] for run in runs], "{:.1f}".format),
                with_range([run["process_s"] for run in runs], "{:.1f}".format),
            ]
        )
    header = ["", "seeds", "starts that end upright", "mean return", "seconds of training"]
    header += ["seconds from the start of the process"]
    return markdown(header, rows) + sources(names, BY_XLA)


# ---- The other benchmarks -----------------------------------------------------------------------


def memory() -> str:
    result = load("memory")["results"]
    sizes = sorted({row["num_envs"] for told in result.values() for row in told["sizes"]})
    shown = [size for size in sizes if size in (32, 256, 1024, 4096, 8192)] or sizes
    rooms = list(next(iter(result.values()))["worlds_in"])
    rows = []
    for program, told in result.items():
        totals = {row["num_envs"]: row["total"] / 2**20 for row in told["sizes"] if "total" in row}
        fixed = any(row.get("buffer") for row in told["sizes"])
        room = [MISSING if fixed else large(told["worlds_in"][key]) for key in rooms]
        cells = [three_digits(totals.get(size)) for size in shown]
        rows.append([program, *cells, three_digits(told["line"]["b"] / 1024), *room])
    header = ["MiB in all, worlds", *map(str, shown), "KiB a world"]
    header += [f"worlds in {key.split()[0]} GiB" for key in rooms]
    return markdown(header, rows) + sources(["memory"], SIMPLIFIED)


def compare(row: dict) -> str:
    """What a run shares with the first one; numbers that are far apart tell nothing and are left out."""
    if row["bits"]:
        return "equal to the bit"
    told = ["another learner"]
    for name in "worlds", "buffer":
        part = row[name]
        if part and part["bits"]:
            told.append(f"{name} equal to the bit")
        elif part and part["off"] < 0.01:
            told.append(f"{name} off by {error_text(part['off'])}")
    return "; ".join(told)


def reproducibility_bits() -> str:
    cells = {}
    columns = []
    for row in load("reproducibility")["results"]["runs"]:
        columns += [row["run"]] if row["run"] not in columns else []
        label = f"{row['what']}, after iteration {row['iteration']}"
        cells.setdefault(label, {})[row["run"]] = compare(row)
    rows = [[label, *(row.get(run, MISSING) for run in columns)] for label, row in cells.items()]
    header = ["compared with the first run", *columns]
    return markdown(header, rows) + sources(["reproducibility"], SIMPLIFIED)


def reproducibility_paths() -> str:
    rows = []
    result = load("reproducibility")
    steps = [str(step) for step in result["args"]["steps"]]
    for task, settings in result["results"]["trajectories"].items():
        for setting, found in settings.items():
            if setting.startswith("fast"):  # a model that is no more
                continue
            label = setting.replace("exact", "MJX")
            medians = [error_text(statistics.median(found[step])) for step in steps]
            rows.append([task, label, *medians])
    header = ["task", "physics", *(f"step {step}" for step in steps)]
    return markdown(header, rows) + sources(["reproducibility"], BY_XLA)


VALIDATION = {
    "observation after one step off Gymnasium's, median": "observation (of MJX )?off Gymnasium's, median",
    "the same, 99% of the states": "observation (of MJX )?off Gymnasium's, 99%",
    "reward off Gymnasium's, median": "reward (of MJX )?off Gymnasium's, median",
    "the same, 99%": "reward (of MJX )?off Gymnasium's, 99%",
    "returns after training in MJX": r"last returns of MJX, seeds .*",
    "returns after training in C MuJoCo": r"last returns of C MuJoCo, seeds .*",
    "training steps/s, MJX / C MuJoCo": "training steps/s, MJX over C MuJoCo",
    "share of `env.step` in the training's time": "env.step's share of MJX training",
}


def validate() -> str:
    result = load("validate")
    tasks = result["args"]["env_ids"]
    rows = []
    for label, pattern in VALIDATION.items():
        cells = []
        for task in tasks:
            found = [
                check["measured"]
                for check in result["checks"]
                if re.fullmatch(f"{task}(, exact)?: {pattern}", check["name"])
            ]
            cells.append(found[0] if found else MISSING)
        rows.append([label, *cells])
    verdicts = [check["verdict"] for check in result["checks"] if check["verdict"]]
    told = f"\n{len(verdicts)} checks, {verdicts.count('FAIL')} failed.\n"
    earlier = "by XLA; MJX trained on simplified models, its single steps are of the original ones"
    return markdown(["", *tasks], rows) + told + sources(["validate"], earlier)


def faults() -> str:
    names = ["faults", "faults_nan", *names_like("faults_processes*")]
    counts = {}
    for name in names:
        for row in load(name)["rows"]:
            done, kept = counts.get(row["fault"], (0, 0))
            counts[row["fault"]] = done + row["times"], kept + row["as_promised"]
    rows = [[fault, str(done), str(kept)] for fault, (done, kept) in counts.items()]
    return markdown(["fault", "times", "as promised"], rows) + sources(names)


def faults_memory() -> str:
    names = names_like("faults_memory*")
    rows = [
        [row["script"], row["fault"], row["seen"]] for name in names for row in load(name)["rows"]
    ]
    return markdown(["script", "", "memory of the process"], rows) + sources(names, BY_XLA)


def gpu_rows() -> Iterable[tuple[str, str, dict]]:
    """File, GPU and row of each training of ppo_mjx.py on one."""
    for name in names_like("gpu/*"):
        result = load(name)
        for row in result.get("rows", []):
            if "env_id" in row:
                yield name, result["devices"][0], row


def gpu_ppo() -> str:
    rows = []
    names = []
    for name, device, row in gpu_rows():
        names += [name] if name not in names else []
        start, end = row["curve"][0], row["final"]
        rate = (end["steps"] - start["steps"]) / (end["seconds"] - start["seconds"])
        passed = []
        for goal, point in row["passed"].items():
            where = f"{three_digits(point[0])} s, {steps_text(point[1])}" if point else "never"
            passed.append(f"{goal}: {where}")
        final = (
            f"{whole(end['mean'])} +- {whole(end['std'])} after {three_digits(end['seconds'])} s"
        )
        rows.append(
            [
                row["env_id"],
                device,
                str(row["run"]["args"]["num_envs"]),
                f"{row['run']['compile_s']:.0f} s ({row['run']['compile_cache']})",
                large(rate),
                *passed,
                final,
            ]
        )
    header = ["", "GPU", "worlds", "compiling (cache)", "training, steps/s"]
    header += ["CleanRL's return, passed after", "mjlab's, passed after", "return at the end"]
    return markdown(header, rows) + sources(names, SIMPLIFIED)


def gpu_walk() -> str:
    rows = []
    names = []
    for name in names_like("gpu/*"):
        result = load(name)
        trainings = [result] if "final_table" in result else result.get("rows", [])
        for row in trainings:
            if "final_table" not in row:
                continue
            names += [name] if name not in names else []
            label = f"{result['devices'][0]}, {row['run']['args']['num_envs']} worlds"
            rows += walk_rows(label, row["curve"])
    return markdown(["", "", *WALK_HEADER], rows) + sources(names, SIMPLIFIED_G1)


TABLES = {
    table.__name__: table
    for table in (
        readme_results,
        readme_onekernel,
        ppo_final,
        ppo_peers,
        training_speed,
        start,
        peers_speed,
        peers_return,
        onekernel_speed,
        onekernel_compiling,
        dense,
        onekernel_xla,
        walk_time,
        g1_test,
        walk_tests,
        joint_loads,
        amp_time,
        motion_prior,
        amp_ablations,
        follow_motion,
        rough_time,
        rough_test,
        rough_speed,
        g1_ablations,
        sac_curves,
        sac_curves_200k,
        sac_peers,
        sac_throughput,
        sac_upright,
        memory,
        reproducibility_bits,
        reproducibility_paths,
        validate,
        faults,
        faults_memory,
        gpu_ppo,
        gpu_walk,
    )
}


def fill(text: str, folder: str = "") -> str:
    """A page's text with its tables written anew. folder: from the page to the repository's root."""

    def replace(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise SystemExit(f"error: there is no table {match[2]}; there are: {', '.join(TABLES)}")
        table = TABLES[match[2]]().replace("](benchmarks/", f"]({folder}benchmarks/")
        return f"{match[1]}{table}{match[4]}"

    return MARK.sub(replace, text)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1")
    check = parser.parse_args(argv).check
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        filled = fill(text, "" if page.parent == ROOT else "../")
        if filled == text:
            continue
        stale.append(page)
        if not check:
            page.write_text(filled)
        print(f"{page.relative_to(ROOT)}: {'other figures than the JSON' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
