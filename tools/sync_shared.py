"""Copy the shared blocks of ppo_mjx.py into the other scripts.

    python tools/sync_shared.py          write the copies
    python tools/sync_shared.py --check  exit with 1 if a copy differs

Each script stands alone, so that it can be read and copied as one file. What several scripts need
is marked `# shared: NAME` ... `# end shared` and is the same everywhere: ppo_mjx.py is the source,
and another script has a copy of each block whose markers it holds.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "ppo_mjx.py"
BLOCK = re.compile(r"^# shared: (\w+)\n(.*?)^# end shared$", re.MULTILINE | re.DOTALL)


def read_blocks(file: Path) -> dict[str, str]:
    """The shared blocks of a script: name -> text between the markers."""
    return dict(BLOCK.findall(file.read_text()))


def synchronized(text: str, blocks: dict[str, str]) -> str:
    """A script's text with the source's blocks in place of its own."""

    def replace(match: re.Match) -> str:
        name = match[1]
        if name not in blocks:
            raise SystemExit(f"error: {SOURCE.name} has no shared block {name}")
        return f"# shared: {name}\n{blocks[name]}# end shared"

    return BLOCK.sub(replace, text)


def main(argv: list[str]) -> int:
    if argv not in ([], ["--check"]):
        raise SystemExit(__doc__)
    blocks = read_blocks(SOURCE)
    differing = []
    for file in sorted(ROOT.glob("*_mjx*.py")):
        text = file.read_text()
        wanted = synchronized(text, blocks)
        if text == wanted:
            continue
        differing.append(file.name)
        if not argv:
            file.write_text(wanted)

    if differing:
        print("differ from ppo_mjx.py:" if argv else "written:", ", ".join(differing))
    return int(bool(argv and differing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
