import pytest
import torch
from torch import nn

from cctool.quantization.network.calls import flow_of
from cctool.quantization.refine.im2col import geometry_of, outputs_at, rows_at, weight_rows


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 4), (3, 5)),
        (nn.Linear(5, 4), (3, 6, 2, 5)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
        (nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)), (2, 3, 9, 8)),
        (nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), (2, 3, 7, 8)),
        (nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 7, 8)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 7, 8)),
        (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 5, 5)),
        (nn.Conv3d(2, 3, (2, 3, 1), stride=(2, 1, 1), padding=(0, 1, 0)), (2, 2, 5, 4, 3)),
        (nn.ConvTranspose1d(4, 6, 3, stride=3, groups=2), (2, 4, 5)),
        (
            nn.ConvTranspose2d(4, 6, (3, 4), stride=(2, 3), padding=(1, 3), output_padding=(1, 2), groups=2),
            (2, 4, 5, 4),
        ),
        (nn.ConvTranspose2d(4, 2, 1, stride=2, padding=1), (2, 4, 5, 4)),
        (nn.ConvTranspose3d(2, 3, 2, dilation=2), (2, 2, 3, 4, 3)),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@torch.no_grad()
def test_rows_times_the_weight_are_the_layers_outputs(layer, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    (call,) = [call for call in flow_of(layer, (x,)).calls if call.weight]
    geometry, y = geometry_of(call), layer(x)
    taken = x
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        taken = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    places = y[0].numel() // y.shape[1 if geometry.dims else -1]
    images = torch.arange(len(x)).repeat_interleave(places)
    where = torch.arange(places).repeat(len(x))
    rows = rows_at(taken, geometry, images, where)
    found = torch.bmm(rows, weight_rows(layer.weight, geometry).transpose(1, 2))
    found = found.transpose(0, 1).flatten(1) + layer.bias
    wanted = y.movedim(1, -1) if geometry.dims else y
    assert torch.allclose(found, wanted.reshape(found.shape), atol=1e-5)
    assert torch.equal(outputs_at(y, geometry, images, where), wanted.reshape(found.shape))
