import jax
import pytest
from jax.sharding import AxisType

from jaxtransfer.parallel import make_mesh


def test_axes_are_named_and_automatic(devices):
    mesh = make_mesh(data=2, tensor=4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 4}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh(fsdp=2, devices=devices[2:4]).devices.flatten().tolist() == devices[2:4]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3}, "mesh data 3 needs 3 devices, there are 8"),
        ({"data": 2, "fsdp": 2}, "mesh data 2 x fsdp 2 needs 4 devices, there are 8"),
        ({"data": -2, "fsdp": -4}, "mesh data -2 x fsdp -4 needs"),
    ],
)
def test_a_mesh_takes_all_devices(devices, axes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**axes, devices=devices)
    assert jax.device_count() == len(devices)
