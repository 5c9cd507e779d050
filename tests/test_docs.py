"""What the documents show is true of the scripts, and what scripts share is the same."""

import ast
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tables

import amp_mjx_unitree
import ppo_mjx
import ppo_mjx_unitree
import ppo_mjx_unitree_rough
import sac_mjx
import sac_mjx_pendulum
from tools import sync_shared

ROOT = Path(ppo_mjx.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# Returns between those of a random policy, and what 80 thousand steps reach.
THRESHOLDS = {
    "cartpole": 100,  # a random policy drops the pole within 40 steps
    "arm": -45,  # it gets about -101, and one that holds still -99
    "quadruped": 50,  # it falls within 200 steps, and gets about -40
}


@pytest.fixture
def own_robot(tmp_path, request) -> str:
    """A script with one of the page's diffs, in a folder with what it reads."""
    diff, file = (ROOT / "docs" / f"{request.param}.diff").read_text(), f"{request.param}.py"
    assert diff in (ROOT / "docs" / "add_your_robot.md").read_text()
    (tmp_path / file).write_text((ROOT / "ppo_mjx.py").read_text())
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "quadruped.xml").write_text((ROOT / "docs" / "quadruped.xml").read_text())
    subprocess.run(["patch", "-s", file], input=diff, text=True, cwd=tmp_path, check=True)
    return file


@pytest.mark.parametrize("own_robot", THRESHOLDS, indirect=True)
def test_add_your_robot_applies(tmp_path, own_robot):
    """The page's diffs apply to the script as it is."""
    ast.parse((tmp_path / own_robot).read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("own_robot", "threshold"), THRESHOLDS.items(), indirect=["own_robot"])
def test_add_your_robot(tmp_path, own_robot, threshold):
    """The result trains and is judged."""
    command = [sys.executable, own_robot, "--total-timesteps", "80000", "--eval-every", "0"]
    # The path is for onekernel, which a copy in its folder would find.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    row = next(line.split() for line in result.stdout.splitlines() if line.startswith("C MuJoCo"))
    assert float(row[2]) > threshold


@pytest.mark.parametrize(
    "script",
    [ppo_mjx, ppo_mjx_unitree, ppo_mjx_unitree_rough, amp_mjx_unitree, sac_mjx, sac_mjx_pendulum],
)
def test_docs_explain_every_metric_and_flag(script):
    """Every tag that a run writes and every setting has its place in the script's page."""
    page = (ROOT / "docs" / f"{script.__name__}.md").read_text()
    source = (ROOT / f"{script.__name__}.py").read_text()
    tags = {
        word
        for word in source.replace("'", '"').split('"')
        if word.startswith(("charts/", "losses/", "eval/"))
    }
    assert len(tags) > 13
    assert not [tag for tag in tags if f"`{tag}`" not in page]
    flags = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(script.Args)]
    assert not [flag for flag in flags if f"`{flag}" not in page]


def test_shared_blocks_are_shared(tmp_path, monkeypatch, capsys):
    """All copies are as the block's source has it; one that differs is found, and written anew."""
    assert sync_shared.main(["--check"]) == 0
    blocks = sync_shared.source_blocks()
    assert {"evaluation", "log", "files", "command_line", "controller", "act"} <= blocks.keys()
    for name in blocks:
        copies = [
            file.name
            for file in ROOT.glob("*_mjx*.py")
            if f"# shared: {name}\n" in file.read_text()
        ]
        assert len(copies) > 1, name

    changes = {
        "sac_mjx_pendulum.py": ("def count_bytes(tree)", "def count_bytes(a_tree)"),
        "amp_mjx_unitree.py": ("def stands(command)", "def stands(a_command)"),
    }
    for name in (*sync_shared.SOURCES, *changes):
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(sync_shared, "ROOT", tmp_path)
    for name, change in changes.items():
        copy = tmp_path / name
        whole = copy.read_text()
        copy.write_text(whole.replace(*change))
        assert copy.read_text() != whole and sync_shared.main(["--check"]) == 1
        assert name in capsys.readouterr().out
        assert sync_shared.main([]) == 0 and copy.read_text() == whole


def test_tables_are_those_of_the_json(tmp_path, monkeypatch, capsys):
    """Pages have the JSON's figures; another figure is found, and written anew; each table stands somewhere."""
    assert tables.main(["--check"]) == 0, capsys.readouterr().out
    used = {name for page in PAGES for _, name, _, _ in tables.MARK.findall(page.read_text())}
    # README's to choose.
    assert tables.TABLES.keys() - used <= {"readme_results", "readme_onekernel"}

    whole = (ROOT / "docs" / "onekernel.md").read_text()
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("")
    page = tmp_path / "docs" / "onekernel.md"
    figure = re.search(r"\| HalfCheetah \| 1024 \| ([\d.]+) million", whole)
    page.write_text(whole[: figure.start(1)] + "9.99" + whole[figure.end(1) :])
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1 and "onekernel.md" in capsys.readouterr().out
    assert tables.main([]) == 0 and page.read_text() == whole
    with pytest.raises(SystemExit, match="no table nonsense"):
        tables.fill("<!-- table: nonsense -->\n<!-- end table -->")


def read_prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", read_prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    """Files that pages link to are there, and so are the headings."""
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", read_prose(page)):
            if link.startswith("http"):
                continue
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists() or anchor and anchor not in anchors(target):
                broken.append(f"{page.name}: {link}")
    assert not broken
