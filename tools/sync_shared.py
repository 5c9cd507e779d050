"""Copy what the scripts share from the one that is its source into the others.

    python tools/sync_shared.py          write the copies
    python tools/sync_shared.py --check  exit with 1 if a copy differs

Each script stands alone, so that it can be read and copied as one file. What several scripts need
is marked `# shared: NAME` ... `# end shared` and is the same everywhere. The source of a block is
ppo_mjx.py, or ppo_mjx_unitree.py where only legged robots need it; another script has a copy of
each block whose markers it holds.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("ppo_mjx.py", "ppo_mjx_unitree.py")  # the first that has a block is its source
BLOCK = re.compile(r"^# shared: (\w+)\n(.*?)^# end shared$", re.MULTILINE | re.DOTALL)


def read_blocks(file: Path) -> dict[str, str]:
    """The shared blocks of a script: name -> text between the markers."""
    return dict(BLOCK.findall(file.read_text()))


def source_blocks() -> dict[str, str]:
    """All shared blocks, each as its source has it."""
    blocks = {}
    for name in SOURCES:
        blocks = read_blocks(ROOT / name) | blocks
    return blocks


def synchronized(text: str, blocks: dict[str, str]) -> str:
    """A script's text with the sources' blocks in place of its own."""

    def replace(match: re.Match) -> str:
        name = match[1]
        if name not in blocks:
            raise SystemExit(f"error: {' and '.join(SOURCES)} have no shared block {name}")
        return f"# shared: {name}\n{blocks[name]}# end shared"

    return BLOCK.sub(replace, text)


def main(argv: list[str]) -> int:
    if argv not in ([], ["--check"]):
        raise SystemExit(__doc__)
    blocks = source_blocks()
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
        print("differ from their source:" if argv else "written:", ", ".join(differing))
    return int(bool(argv and differing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
