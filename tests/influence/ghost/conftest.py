import pytest
from influence.ghost.ghost_models import KINDS, make_case


@pytest.fixture(scope="session", params=KINDS)
def case(request):
    """A model of every kind of linear map, rows, a direction, and each row's own gradient."""
    return make_case(**KINDS[request.param])


@pytest.fixture(scope="session")
def plain():
    return make_case(**KINDS["simplenorm"])
