"""Scores a run as the command does, but slowly, until it is killed.

python scoring_child.py RUN OUTPUT ROWS_PER_PART
"""

import sys
import time
from pathlib import Path
from typing import Any

from opus_jax.training import score_files
from opus_jax.training.score_corpus import score_corpus

write_part = score_files.write_part


def write_slowly(*args: Any) -> None:
    write_part(*args)
    time.sleep(0.1)


if __name__ == "__main__":
    score_files.write_part = write_slowly
    score_corpus(Path(sys.argv[1]), output=sys.argv[2], rows_per_part=int(sys.argv[3]), progress=False)
