import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from opus_jax.errors import UserError
from pallas_kernels.generations import generation_in_use
from pallas_kernels.implementation import resolve


def mesh_of(kind, platform):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device))


def test_without_a_mesh_the_default_device_decides():
    assert resolve(None) == "xla"
    assert generation_in_use() == "v4"


@pytest.mark.parametrize(
    ("kind", "generation"),
    [("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x")],
)
def test_the_mesh_in_use_decides_also_where_no_tpu_is(kind, generation):
    with mesh_of(kind, "tpu"):
        assert resolve(None) == resolve("pallas") == "pallas"
        assert resolve("xla") == "xla"
        assert generation_in_use() == generation


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_kernel_asked_for_without_a_tpu_is_an_error(platform):
    with mesh_of("other", platform):
        assert resolve(None) == "xla"
        with pytest.raises(UserError, match=rf"'pallas' on {platform}.*use 'xla'"):
            resolve("pallas")


def test_an_unknown_name_is_told():
    with pytest.raises(UserError, match="'mosaic': must be one of xla, pallas, interpret"):
        resolve("mosaic")
