"""Scores a run as the command does, and waits in the middle to be killed.

python scoring_child.py RUN OUTPUT ROWS_PER_PART
"""

import sys
import time
from pathlib import Path
from typing import Any

from opus_jax.training import score_files
from opus_jax.training.score_corpus import score_corpus

write_part = score_files.write_part


def write_slower_and_slower(file: Path, *rest: Any) -> None:
    write_part(file, *rest)
    time.sleep(0.001 * 3 ** len(list(file.parent.iterdir())))  # the tenth part waits for a minute


if __name__ == "__main__":
    score_files.write_part = write_slower_and_slower
    score_corpus(Path(sys.argv[1]), output=sys.argv[2], rows_per_part=int(sys.argv[3]), progress=False)
