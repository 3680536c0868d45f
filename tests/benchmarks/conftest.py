from pathlib import Path
from typing import Any

import pytest
from small_runs import mapping, write_text


@pytest.fixture
def small_run(tmp_path: Path) -> dict[str, Any]:
    write_text(tmp_path / "text")
    return mapping(tmp_path)
