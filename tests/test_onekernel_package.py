"""onekernel as a package of its own: `pip install ./onekernel`."""

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

import onekernel

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "onekernel"
PROJECT = tomllib.loads((FOLDER / "pyproject.toml").read_text())
EXAMPLE = re.search(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)[1]


def test_the_pinned_versions_are_allowed():
    """Those of requirements.txt are what the tests ran with."""
    lines = (ROOT / "requirements.txt").read_text().split()
    pinned = {(pin := Requirement(line)).name: str(pin.specifier)[2:] for line in lines}
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["mjx"]
    for requirement in map(Requirement, wanted):
        if requirement.name != "numpy":  # comes with JAX
            assert requirement.specifier.contains(pinned[requirement.name])


def test_licence_and_readme_come_along():
    assert (FOLDER / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    for name in (PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]):
        assert (FOLDER / name).is_file()


def test_example(capsys):
    """It runs, and a pendulum that hangs still stays so, while the others fall."""
    names = {}
    exec(compile(EXAMPLE, "README.md", "exec"), names)  # noqa: S102
    assert capsys.readouterr().out.strip() == "(4096, 1)"
    speed, angles = np.asarray(names["worlds"].qvel)[:, 0], np.asarray(names["angles"])
    moving = np.abs(np.sin(angles)) > 0.01
    assert (np.sign(speed[moving]) == -np.sign(angles[moving])).all()


PARTS = """
import sys, onekernel
from onekernel import fingerprint
assert not {"mujoco", "onekernel.mjx", "onekernel.hfield"} & set(sys.modules)

def step(model, data):
    return onekernel.mjx.step(model, data)

first = fingerprint.fingerprint(step)
assert callable(onekernel.mjx.step) and callable(onekernel.hfield.ground_height)
assert first == fingerprint.fingerprint(step) != None
"""


def test_parts_for_mujoco_are_imported_when_they_are_asked_for():
    """And what a compiled function reaches through them counts, whether they are imported or not."""
    subprocess.run([sys.executable, "-c", PARTS], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="'onekernel' has no attribute 'steps'"):
        onekernel.steps  # noqa: B018


@pytest.mark.slow
def test_installed_in_an_empty_environment(tmp_path):
    """From a wheel, and away from the repository, the example runs by onekernel, and not by XLA."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", f"{FOLDER}[mjx]"]
    subprocess.run(install, check=True, cwd=tmp_path)
    strict = "import warnings, onekernel\nwarnings.simplefilter('error', onekernel.Fallback)\n"
    told = f"print(onekernel.__version__, onekernel.__file__)\n{EXAMPLE}"
    done = subprocess.run(
        [python, "-c", strict + told], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    version, *_, shape = done.stdout.strip().splitlines()  # MJX says that it has no Warp
    assert version.startswith(f"{onekernel.__version__} {tmp_path}") and shape == "(4096, 1)"
