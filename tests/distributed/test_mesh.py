from types import SimpleNamespace

import jax
import pytest

from opus_jax.config import MeshConfig
from opus_jax.distributed.mesh import make_mesh, slice_by_slice
from opus_jax.errors import ConfigError


def chips(slices: int, each: int, platform: str = "tpu") -> list:
    """Not in the order of their slices."""
    return [SimpleNamespace(platform=platform, slice_index=slice_) for _ in range(each) for slice_ in range(slices)]


def test_only_replica_may_cross_tpu_slices():
    with pytest.raises(ConfigError, match=r"mesh\.replica = 1: must be a multiple of the 2 TPU slices.*set it to 2"):
        slice_by_slice(chips(2, 4), 1)
    with pytest.raises(ConfigError, match=r"mesh\.replica = 3"):
        slice_by_slice(chips(2, 6), 3)


def test_slices_lie_outermost():
    assert [x.slice_index for x in slice_by_slice(chips(2, 4), 4)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_other_devices_have_no_slices_and_keep_their_order():
    gpus = chips(2, 4, platform="gpu")
    assert slice_by_slice(gpus, 1) == gpus
    assert make_mesh(MeshConfig()).devices.ravel().tolist() == jax.devices()
