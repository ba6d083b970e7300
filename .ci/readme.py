"""Run the commands of a Markdown page, so that what it promises is what happens.

Every ```bash block is run as one script from the repository's root, in order, and must exit 0. A
block that follows `<!-- not run: REASON -->` is shown and left out; so is a line given as --done.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

BLOCK = re.compile(
    r"(?P<skip><!-- not run: (?P<reason>.+?) -->\s*)?^```bash\n(?P<code>.*?)^```$", re.M | re.S
)
TIMEOUT_S = 1800


def main() -> int:
    """Run each block; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--done", action="append", default=[], help="a line that ran before")
    arguments = parser.parse_args()
    text = arguments.page.read_text("utf-8")
    blocks = list(BLOCK.finditer(text))
    if len(blocks) != len(re.findall(r"^```bash$", text, re.M)) or not blocks:
        print(f"{arguments.page}: no bash blocks, or one that does not end", file=sys.stderr)
        return 1
    for block in blocks:
        line = text.count("\n", 0, block.start("code")) + 1
        if block["skip"]:
            print(f"--- line {line}: not run: {block['reason']}")
            continue
        code = "".join(
            f"{c}\n" for c in block["code"].splitlines() if c.strip() not in arguments.done
        )
        print(f"--- line {line}:\n{code}", end="", flush=True)
        start = time.monotonic()
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code], timeout=TIMEOUT_S, check=False
        )
        print(f"--- {time.monotonic() - start:.0f} s, exit {done.returncode}", flush=True)
        if done.returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
