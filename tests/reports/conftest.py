from pathlib import Path

import pytest
from fabricate import write_trained_pair


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run over hostile texts, with its random sibling. Not to be changed by a test."""
    return write_trained_pair(tmp_path_factory.mktemp("pair"))
