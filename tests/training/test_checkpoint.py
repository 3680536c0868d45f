import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint._src.serialization import replica_slices

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_states import DATA, META, abstract, make_mesh, make_small_state, make_state, state_hash

from opus_jax.errors import UserError
from opus_jax.training.checkpoint import Checkpoints, committed_steps, load_params

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(4, 2)


@pytest.fixture(scope="module")
def states(mesh):
    return {seed: make_state(seed, mesh) for seed in (1, 2, 3)}


@pytest.fixture(scope="module")
def two_saved(states, tmp_path_factory):
    """A folder with checkpoints 1 and 2; tests damage copies of it."""
    run = tmp_path_factory.mktemp("run")
    with Checkpoints(run / "checkpoints", 2, False) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, states[step], DATA, META | {"at": step})
    return run


@pytest.fixture
def saved(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path / "run")
    return tmp_path / "run" / "checkpoints"


def restore(directory, like, mesh, keep=2):
    said: list[str] = []
    with Checkpoints(directory, keep, False, say=said.append) as checkpoints:
        return checkpoints.restore(abstract(like, mesh)), said


def largest_file(folder: Path) -> Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_round_trip_is_bit_exact(two_saved, states, mesh):
    (step, state, data, meta), said = restore(two_saved / "checkpoints", states[2], mesh)
    assert step == 2
    assert said == []
    assert state_hash(state) == state_hash(states[2]) != state_hash(states[1])
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, state, states[2]))
    assert data.keys() == DATA.keys()
    assert all(same(data[name], DATA[name]) for name in DATA)
    assert meta == META | {"at": 2}


@pytest.mark.parametrize("shape", [(8,), (2, 2), (1,)])
def test_restores_on_another_mesh(two_saved, states, shape):
    other = make_mesh(*shape)
    (_, state, _, _), _ = restore(two_saved / "checkpoints", states[2], other)
    assert state_hash(state) == state_hash(states[2])
    assert state["params"]["embed"].sharding.mesh == other


def test_donated_buffers_do_not_reach_the_save(tmp_path, mesh):
    """The loop donates the state to the next step right after `save` returns."""
    advance = jax.jit(lambda x: jax.tree.map(lambda a: a * -3 + 1, x), donate_argnums=0)
    params = make_small_state(mesh)["params"]
    expected = {}
    with Checkpoints(tmp_path, 9, False) as checkpoints:
        for step in range(1, 6):
            expected[step] = state_hash(params)
            checkpoints.save(step, {"params": params}, {}, {})
            params = advance(params)
    for step in range(5, 0, -1):
        (found, state, _, _), _ = restore(tmp_path, {"params": params}, mesh)
        assert (found, state_hash(state["params"])) == (step, expected[step])
        shutil.rmtree(tmp_path / str(step))


def test_keeps_the_newest_and_the_best(tmp_path):
    metrics = {1: 2.0, 2: 1.0, 3: None, 4: float("nan"), 5: 1.5, 6: 3.0}
    with Checkpoints(tmp_path, 2, True) as checkpoints:
        for step, metric in metrics.items():
            checkpoints.save(step, {"x": np.arange(3)}, {}, {}, metric)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6]
    assert sorted(f.name for f in (tmp_path / "integrity").iterdir()) == ["2.json", "5.json", "6.json"]


def test_a_temporary_checkpoint_goes_when_the_next_is_there(tmp_path):
    def lasting(step):
        return step % 10 == 0

    seen = []
    with Checkpoints(tmp_path, 2, False, lasting=lasting) as checkpoints:
        for step in (5, 10, 13, 16, 20, 23):
            checkpoints.save(step, {"x": np.arange(3)}, {}, {})
            checkpoints.wait()
            seen.append(checkpoints.steps())
    assert seen == [[5], [10], [10, 13], [10, 16], [10, 20], [10, 20, 23]]
    with Checkpoints(tmp_path, 2, False, lasting=lasting) as checkpoints:
        checkpoints.save(27, {"x": np.arange(3)}, {}, {})
    assert committed_steps(tmp_path) == [10, 20, 27], "after a restart too"


@pytest.mark.parametrize("limit", [1, 40_000])
def test_a_limit_on_host_memory_copies_a_few_arrays_at_a_time(tmp_path, monkeypatch, limit):
    """The state is copied in parts that fit the limit, or one array at a time, and a donated buffer is not missed."""
    copied = []
    original = replica_slices.transfer_arrays_to_host

    def note(arrays, *args, **kwargs):
        copied.append(sum(array.nbytes for array in arrays))
        return original(arrays, *args, **kwargs)

    monkeypatch.setattr(replica_slices, "transfer_arrays_to_host", note)
    state = {f"a{i}": jnp.full((64, 64), float(i)) for i in range(6)}  # 16 KB each
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 100, s), donate_argnums=0)
    with Checkpoints(tmp_path, 2, False, host_bytes=limit) as checkpoints:
        checkpoints.save(1, state, {}, {})
        assert checkpoints.steps() == [1], "saved when it returns: the state may not change before"
        step(state)
        assert max(copied) <= max(limit, 64 * 64 * 4)
        assert sum(copied) == 6 * 64 * 64 * 4
        place = SingleDeviceSharding(jax.devices()[0])
        like = {f"a{i}": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=place) for i in range(6)}
        restored = checkpoints.restore(like)[1]
    assert [float(restored[f"a{i}"][0, 0]) for i in range(6)] == [0, 1, 2, 3, 4, 5]


def test_nothing_saved_is_none_and_stale_folders_go(tmp_path, states, mesh):
    stale = tmp_path / "7.orbax-checkpoint-tmp"
    (stale / "state").mkdir(parents=True)
    (tmp_path / "integrity").mkdir()
    partial = tmp_path / "integrity" / ".partial-abc"
    partial.touch()
    restored, said = restore(tmp_path, states[1], mesh)
    assert restored is None
    assert said == []
    assert not stale.exists()


def flip(folder):
    file = largest_file(folder / "state")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(folder):
    file = largest_file(folder / "state")
    os.truncate(file, file.stat().st_size // 2)


def delete(folder):
    largest_file(folder / "data").unlink()


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("damage", [flip, truncate, delete, empty])
def test_walks_back_over_damage_and_says_so(saved, states, mesh, damage):
    damage(saved / "2")
    said: list[str] = []
    with Checkpoints(saved, 2, False, say=said.append) as checkpoints:
        step, state, _, meta = checkpoints.restore(abstract(states[1], mesh))
        assert (step, meta["at"], state_hash(state)) == (1, 1, state_hash(states[1]))
        assert len(said) == 2
        assert "checkpoint 2 is damaged" in said[0]
        assert (saved / "damaged-2").is_dir()
        # the step is trained again, and its save must not meet the damaged one
        checkpoints.save(2, states[2], DATA, META)
    (step, state, _, _), said = restore(saved, states[2], mesh)
    assert (step, state_hash(state), said) == (2, state_hash(states[2]), [])


def test_an_unhashed_step_is_used_if_it_loads(saved, states, mesh):
    (saved / "integrity" / "2.json").unlink()
    (step, state, _, _), said = restore(saved, states[2], mesh)
    assert (step, state_hash(state)) == (2, state_hash(states[2]))
    assert len(said) == 1
    assert "no hashes" in said[0]


def test_an_unhashed_step_that_does_not_load_is_passed_over(saved, states, mesh):
    (saved / "integrity" / "2.json").unlink()
    delete(saved / "2")
    (step, _, _, _), said = restore(saved, states[1], mesh)
    assert step == 1
    assert "cannot be read" in said[1]


def test_none_readable_is_an_error_every_time(saved, states, mesh):
    for step in ("1", "2"):
        flip(saved / step)
    for _ in range(2):
        with pytest.raises(UserError, match=r"no readable checkpoint in .*checkpoints.*delete it to start again"):
            restore(saved, states[1], mesh)
    assert committed_steps(saved) == [1, 2]


def test_deleted_steps_are_not_a_fresh_start(saved, states, mesh):
    for step in ("1", "2"):
        shutil.rmtree(saved / step)
    with pytest.raises(UserError, match=r"there were steps \[1, 2\]"):
        restore(saved, states[1], mesh)


@pytest.mark.parametrize("change", ["shape", "missing leaf", "extra leaf"])
def test_an_intact_step_of_another_model_is_refused(saved, states, mesh, change):
    other = dict(states[2])
    if change == "shape":
        other["params"] = other["params"] | {"embed": np.zeros((32, 8), np.float32)}
    elif change == "missing leaf":
        del other["params"]
    else:
        other["more"] = np.zeros(3)
    with pytest.raises(UserError, match=r"checkpoint 2 .* is intact but cannot be loaded"):
        restore(saved, other, mesh)
    assert committed_steps(saved) == [1, 2]


def test_a_full_disk_stops_with_the_last_checkpoint_intact(tmp_path, mesh, states):
    """The limit on file size makes every larger write fail as a full disk does."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    checkpoints = Checkpoints(tmp_path, 2, False)
    checkpoints.save(1, states[1], DATA, META)
    checkpoints.wait()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
        with pytest.raises(UserError, match=r"saving step 2 to .* failed: .*the last good checkpoint is step 1"):
            _save_and_wait(checkpoints, 2, states[2])
        checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    (step, state, _, _), said = restore(tmp_path, states[1], mesh)
    assert (step, state_hash(state), said) == (1, state_hash(states[1]), [])


def _save_and_wait(checkpoints, step, state):
    checkpoints.save(step, state, DATA, META)
    checkpoints.wait()


def test_a_clock_set_forward_while_saving_fails_nothing(tmp_path, monkeypatch):
    clock = time.time
    with Checkpoints(tmp_path, 2, False) as checkpoints:
        checkpoints.save(1, {f"a{i}": jnp.ones((1000, 1000)) for i in range(8)}, {}, {})
        time.sleep(0.05)
        monkeypatch.setattr(time, "time", lambda: clock() + 86400)
        checkpoints.wait()
    assert committed_steps(tmp_path) == [1]


def test_leaving_after_an_error_does_not_hide_it(tmp_path):
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, 2, False) as checkpoints:  # noqa: PT012
        checkpoints.save(1, {"x": np.arange(3)}, {}, {})
        raise ZeroDivisionError
    assert committed_steps(tmp_path) == [1]


def test_load_params_reads_no_optimizer_state(saved, states):
    shutil.rmtree(saved / "1")
    params, step, meta = load_params(saved.parent)
    assert (step, meta["at"]) == (2, 2)
    assert state_hash(params) == state_hash(states[2]["params"])
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))


def test_load_params_walks_back_and_leaves_the_folder_alone(saved, states):
    flip(saved / "2")
    said: list[str] = []
    params, step, _ = load_params(saved.parent, say=said.append)
    assert step == 1
    assert "checkpoint 2 is damaged" in said[0]
    assert state_hash(params) == state_hash(states[1]["params"])
    assert committed_steps(saved) == [1, 2]


def test_load_params_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint in .*train the run first"):
        load_params(tmp_path)


def kill_and_restore(directory: Path, mesh, rounds: int, seed: int) -> int:
    """Kill a process that saves without pause, at any moment; returns how many restored states were compared."""
    pause, compared = random.Random(seed), 0
    for _ in range(rounds):
        reported: dict[int, str] = {}
        with subprocess.Popen(
            [sys.executable, str(HERE / "saving_child.py"), str(directory)], stdout=subprocess.PIPE, text=True
        ) as child:
            for line in child.stdout:
                step, digest = line.split()
                reported[int(step)] = digest
                if len(reported) == 4:  # by now one save is committed
                    time.sleep(pause.uniform(0, 0.25))
                    child.kill()
        restored, said = restore(directory, make_small_state(mesh), mesh)
        step, state, _, meta = restored
        assert reported[step] == state_hash(state) == meta["hash"]
        assert max(reported) - step <= 2
        assert all("no hashes" in line for line in said)
        compared += 1
    return compared


def test_kill_9_while_saving(tmp_path, mesh):
    assert kill_and_restore(tmp_path, mesh, rounds=2, seed=os.getpid()) == 2


@pytest.mark.slow
def test_kill_9_while_saving_many_times(tmp_path, mesh):
    assert kill_and_restore(tmp_path, mesh, rounds=8, seed=os.getpid()) == 8


def test_two_processes_save_and_one_restores(tmp_path, mesh):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(HERE / "two_process_child.py"), str(tmp_path), str(port)]
    children = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in (0, 1)
    ]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(outputs)
    assert "checkpoint 3 is damaged" in outputs[0]
    restored, _ = restore(tmp_path, {"x": np.zeros(8, np.float32)}, make_mesh(4))
    assert restored[0] == 3
    np.testing.assert_array_equal(np.asarray(restored[1]["x"]), np.arange(8, dtype=np.float32) * 30)
