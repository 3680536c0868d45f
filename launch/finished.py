"""Whether the run of a configuration is finished: launch/finished.py CONFIG [key.sub=value ...]

Exits with 0 when the run folder has its summary.json, and with 75 when it has not: a training process that was told to
stop leaves with 0 after a clean save, so its exit code alone does not tell a finished run from a preempted one.
"""

import sys
from pathlib import Path

from opus_jax.config import Config
from opus_jax.data.remote import Remote, is_remote
from opus_jax.errors import UserError

SUMMARY = "summary.json"
GO_ON = 75  # "try again later", as sysexits.h has it


def main(config: str, *overrides: str) -> int:
    try:
        folder = str(Config.load(config, overrides).run.dir)
        ended = SUMMARY in Remote(folder).list() if is_remote(folder) else Path(folder, SUMMARY).is_file()
    except UserError as error:
        print(f"launch/finished.py: {error}", file=sys.stderr)
        return 2
    return 0 if ended else GO_ON


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
