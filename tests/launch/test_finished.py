"""launch/finished.py: finished, or to be gone on with."""

import importlib.util
from pathlib import Path
from types import ModuleType

import fsspec
import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/quickstart.yaml")


@pytest.fixture(scope="module")
def finished() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finished", ROOT / "launch/finished.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_summary_is_the_end(finished: ModuleType, tmp_path: Path):
    assert finished.main(CONFIG, f"run.dir={tmp_path}") == 75
    (tmp_path / "summary.json").write_text("{}")
    assert finished.main(CONFIG, f"run.dir={tmp_path}") == 0


def test_a_run_folder_may_lie_elsewhere(finished: ModuleType):
    place = "memory://finished/run"
    assert finished.main(CONFIG, f"run.dir={place}") == 75
    with fsspec.open(f"{place}/summary.json", "w") as file:
        file.write("{}")
    assert finished.main(CONFIG, f"run.dir={place}") == 0


def test_mistakes_are_the_users(finished: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert finished.main("configs/none.yaml") == 2
    assert finished.main(CONFIG, "run.dri=x") == 2
    told = capsys.readouterr().err.splitlines()
    assert "configs/none.yaml" in told[0]
    assert "run.dir" in told[1]
