"""Compiled programs kept on disk, so that the second start of a run compiles less.

JAX keys a program by its text, its options, the versions of JAX and of the compiler, and the kind of device, so an
entry is never used where it does not fit. What takes less than JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS (one second)
to compile is not kept: reading it would save nothing.

On CPUs `auto` keeps nothing: there XLA notes preferences of the compiler as if they were features of the machine, and
on many processors logs an error for every program that it reads back on the same machine (openxla/xla issue 44565).

An entry is a program that is run: whoever can write to the folder can run code here, so it is made for its owner alone.
"""

import os
from pathlib import Path

import jax

from opus_jax.errors import ConfigError

AUTO = "auto"
FOLDER = "compiled"


def keep_compiled_programs(setting: str | None, cache: Path) -> Path | None:
    """Tell JAX where compiled programs are kept, before the first is compiled.

    Args:
      setting: `run.compilation_cache`: a folder; `auto` = `compiled` below `cache`, but none on CPUs; null leaves JAX
        as it is set. A place that JAX has been given already (JAX_COMPILATION_CACHE_DIR, say) goes before `auto`.
      cache: the folder of this program's other caches.

    Returns:
      The folder in use, or None.

    Raises:
      ConfigError: the folder cannot be made or written.
    """
    given: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # JAX makes these at run time
    if setting is None or (setting == AUTO and (given is not None or jax.default_backend() == "cpu")):
        return Path(given) if given else None
    folder = cache / FOLDER if setting == AUTO else Path(setting).expanduser().absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(setting, folder, str(error.strerror)) from None
    if not os.access(folder, os.W_OK):
        raise _unusable(setting, folder, "not writable")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def _unusable(setting: str, folder: Path, reason: str) -> ConfigError:
    return ConfigError("run.compilation_cache", setting, f"{folder}: {reason}; name a folder of yours, or null = off")
