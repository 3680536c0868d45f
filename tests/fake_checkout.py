"""A checkout in which every program that a launcher calls is a stand-in that notes its arguments.

What a stand-in does after that is a piece of bash, given by the test: it sees the arguments as "$@", and the folder
`$STATE` is kept from call to call.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/quickstart.yaml"

# Every stand-in: count the calls of this program as $call, from 1; note the arguments; then the test's piece of bash.
_STAND_IN = """#!/usr/bin/env bash
export STATE={state}
until mkdir "$STATE/lock" 2> /dev/null; do sleep 0.01; done
call=$(($(cat "$STATE/{name}.calls" 2> /dev/null || echo 0) + 1)); echo "$call" > "$STATE/{name}.calls"
{{ printf '%q ' {name} "$@"; echo; }} >> "$STATE/calls"
rmdir "$STATE/lock"
{action}
"""

# Asked for a free port, or by launch/finished.py for the summary.
_PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then echo 6789; else [ -f {summary} ] || exit 75; fi
"""


def wait_for(file: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} never came"
        time.sleep(0.02)


class Checkout:
    """Copies of launch/ and of a configuration below `folder`, a fake .venv, and stand-ins first on the path."""

    def __init__(self, folder: Path):
        self.folder, self.state, self.programs = folder / "checkout", folder / "state", folder / "programs"
        for made in (self.state, self.programs, self.folder / ".venv" / "bin"):
            made.mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "configs", self.folder / "configs")
        self.run = folder / "run"
        self.program("make", "exit 0")
        self._write(self.folder / ".venv/bin/python", _PYTHON.format(summary=self.run / "summary.json"))

    def program(self, name: str, action: str) -> None:
        """A stand-in for a program on the path."""
        self._write(self.programs / name, _STAND_IN.format(state=self.state, name=name, action=action))

    def trainer(self, action: str) -> None:
        """A stand-in for opus-jax; `finish` in it writes the summary of a finished run."""
        finish = f"finish() {{ mkdir -p {self.run}; echo '{{}}' > {self.run}/summary.json; }}\n"
        file = self.folder / ".venv/bin/opus-jax"
        self._write(file, _STAND_IN.format(state=self.state, name="opus-jax", action=finish + action))

    def install(self) -> None:
        """The package itself in place of the stand-ins for python and opus-jax."""
        python = f"#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "
        self._write(self.folder / ".venv/bin/python", f'{python}"$@"\n')
        self._write(self.folder / ".venv/bin/opus-jax", f'{python}-m opus_jax "$@"\n')

    def start(self, *command: str, **variables: str) -> "subprocess.Popen[str]":
        """A script of the checkout, with the run folder as its last override; quick where it would wait."""
        path = f"{self.programs}:{os.environ['PATH']}"
        quick = {"PAUSE": "0", "TMPDIR": str(self.state), "PATH": path}
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, **quick, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *command: str, seconds: float = 60, **variables: str) -> "subprocess.CompletedProcess[str]":
        """The same, to its end."""
        process = self.start(*command, **variables)
        out, err = process.communicate(timeout=seconds)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    @property
    def run_dir(self) -> str:
        return f"run.dir={self.run}"

    def calls(self, program: str | None = None) -> list[list[str]]:
        """The arguments of every call so far, the program's name first; of one program, or of all."""
        file = self.state / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        found = [shlex.split(line) for line in lines]
        return [arguments for arguments in found if program in (None, arguments[0])]

    def _write(self, file: Path, text: str) -> None:
        file.write_text(text)
        file.chmod(0o755)
