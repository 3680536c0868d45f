import shutil
from pathlib import Path

import pytest
from fabricate import small_config, write_decisions, write_trained_pair

from opus_jax.data.documents_table import read_columns
from opus_jax.reports.corpus import manifest_of, records_folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run over hostile texts, with its random sibling. Not to be changed by a test."""
    return write_trained_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def planned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `trained` in which scores changed the plan six times, over the same hostile corpus."""
    folder = tmp_path_factory.mktemp("planned")
    for name in ("run", "run-random"):
        shutil.copytree(trained.with_name(name), folder / name)
    small_config(folder, feedback={"enabled": True, "window_steps": 10}).save(folder / "run" / "config.yaml")
    manifest = manifest_of(trained)
    assert manifest is not None
    columns = read_columns(records_folder(trained), "document_id", "split", "domain_id")
    last = [i for i, s, d in zip(*columns.values(), strict=True) if s == "train" and d == len(manifest.domains) - 1]
    return write_decisions(folder / "run", list(manifest.domains), last)
