import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from small_runs import small_config

from opus_jax.distributed.compilation_cache import keep_compiled_programs
from opus_jax.errors import ConfigError

HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


@pytest.fixture
def untouched() -> Iterator[None]:
    """JAX's own settings are put back."""
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.reset_cache()


def compiled(events: list[str]) -> Counter:
    """Hits and misses of compiling one program as if this process had never seen it."""
    events.clear()
    jax.clear_caches()
    compilation_cache.reset_cache()  # it opens its folder once, and a test before this one may have been the first
    jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.ones((7, 7))).block_until_ready()
    return Counter(events)


@pytest.mark.usefixtures("untouched")
def test_what_was_compiled_once_is_read_back(tmp_path: Path) -> None:
    events: list[str] = []

    def hear(event: str, **_: object) -> None:
        events.append(event)

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    folder = keep_compiled_programs(str(tmp_path / "programs"), tmp_path)
    assert folder == tmp_path / "programs"
    assert folder.stat().st_mode & 0o077 == 0, "programs are code: nobody else may write them"
    jax.monitoring.register_event_listener(hear)
    try:
        first, second = compiled(events), compiled(events)
    finally:
        jax.monitoring.unregister_event_listener(hear)
    assert first[MISS] >= 1
    assert first[HIT] == 0
    assert (second[MISS], second[HIT]) == (0, first[MISS])


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("backend", "kept"), [("tpu", "compiled"), ("gpu", "compiled"), ("cpu", None)])
def test_by_default_programs_of_accelerators_are_kept(
    backend: str, kept: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert keep_compiled_programs("auto", tmp_path) == (tmp_path / kept if kept else None)


@pytest.mark.usefixtures("untouched")
def test_a_place_that_jax_was_given_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "given"))
    assert keep_compiled_programs("auto", tmp_path) == tmp_path / "given"
    assert keep_compiled_programs(None, tmp_path) == tmp_path / "given"


def test_a_place_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.compilation_cache.*name a folder of yours"):
        keep_compiled_programs(str(tmp_path / "file" / "below"), tmp_path)


TRAINED = """
import sys, jax
from collections import Counter
from opus_jax.config import Config
from opus_jax.training.loop import train
heard = Counter()
jax.monitoring.register_event_listener(lambda event, **_: heard.update([event]))
train(Config.load(sys.argv[1], sys.argv[2:]), progress=False)
print(heard["/jax/compilation_cache/cache_hits"], heard["/jax/compilation_cache/cache_misses"])
"""


@pytest.mark.slow
def test_the_second_start_of_a_configuration_compiles_less(tmp_path: Path) -> None:
    small_config(tmp_path, f"run.compilation_cache={tmp_path}/programs").save(tmp_path / "small.yaml")
    env = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    counts = []
    for name in ("one", "two"):
        command = [sys.executable, "-c", TRAINED, str(tmp_path / "small.yaml"), f"run.dir={tmp_path / name}"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=True)
        counts.append([int(count) for count in done.stdout.split()[-2:]])
    (_, first_misses), (second_hits, second_misses) = counts
    assert second_hits >= 0.8 * first_misses > 1
    assert second_misses <= 0.2 * first_misses, "0.2 seconds are near the time that the smallest programs take"
