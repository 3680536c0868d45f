"""Refuse tests that were skipped without leave: skips.py PYTEST_LOG ALLOWED.

ALLOWED has one line per skip that may happen, `part of the reason`; empty lines and # comments are ignored.
The log must come from pytest -ra, and must hold its closing line: a run that died is not a run without skips.
"""

import re
import sys
from pathlib import Path


def main(log: str, allowed: str) -> int:
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in Path(log).read_text().splitlines()]
    excused = [line.strip() for line in Path(allowed).read_text().splitlines()]
    excused = [line for line in excused if line and not line.startswith("#")]
    endings = [line for line in lines if re.search(r"\b\d+ passed\b.* in [\d.]+s", line)]
    if not endings:
        print("skips: no closing line of pytest in the log, or nothing passed")
        return 1
    skips = [line for line in lines if re.match(r"(SKIPPED|XFAIL)\b", line)]
    unexpected = [line for line in skips if not any(reason in line for reason in excused)]
    counted = re.search(r"(\d+) skipped", endings[-1])
    if counted and not skips:
        print(f"skips: {counted[1]} tests were skipped and not listed: run pytest with -ra")
        return 1
    print(f"skips: {len(skips)} lines, {len(unexpected)} unexpected")
    print("\n".join(unexpected), end="\n" if unexpected else "")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
