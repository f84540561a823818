"""Perceptual loss: pictures compared by what VGG19 sees in them, with weights that the user supplies."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from videofactory_core.checkpoint import CheckpointError
from videofactory_core.convert.sources import Source, open_source

# Channels of VGG19's convolutions (Simonyan and Zisserman, arXiv 1409.1556, configuration E); a picture is halved
# between the groups.
GROUPS = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)
# Convolutions by their place in torchvision's `features`, what their results weigh before the ReLU, and their names.
LAYERS = {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}  # conv1_2, conv2_2, conv3_4, conv4_4, conv5_4
# Of the pictures that VGG19 was trained on.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Perceptual(nn.Module):
    """Weighted mean absolute differences of VGG19's features; its own weights never train.

    `path` is torchvision's state dict as .pth, read without running code, or as .safetensors. ValueError with one
    sentence when it is not there or another network's.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.features = _features()
        expected = self.features.state_dict()
        found = _read(path)
        for key, weight in expected.items():
            name = f"features.{key}"
            if name not in found.shapes:
                raise ValueError(f"vgg: {path} lacks {name!r}, so it is not torchvision's VGG19; give vgg19-*.pth")
            if found.shapes[name] != weight.shape:
                raise ValueError(f"vgg: {path} is of another network than VGG19: {name!r} has another shape")
        self.features.load_state_dict({key: found.read(f"features.{key}") for key in expected})
        self.requires_grad_(False)
        for name, values in (("mean", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor, originals: Tensor) -> Tensor:
        """The loss, a scalar, of `pictures [N, 3, H, W]` against `originals`, in 0..1 and of 16 pixels or more."""
        x, y = ((x - self.mean) / self.deviation for x in (pictures, originals))
        loss = pictures.new_zeros((), dtype=torch.float32)
        for place, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if place in LAYERS:
                loss = loss + LAYERS[place] * F.l1_loss(x.float(), y.float())
        return loss


def _features() -> nn.Sequential:
    """VGG19 up to its last convolution, in torchvision's order."""
    layers: list[nn.Module] = []
    before = 3
    for group in GROUPS:
        for channels in group:
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
            before = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[: max(LAYERS) + 1])


def _read(path: Path) -> Source:
    if not path.is_file():
        raise ValueError(f"vgg: there is no file {path}; give torchvision's vgg19-*.pth, or leave it out")
    try:
        return open_source(path)
    except CheckpointError as error:
        raise ValueError(f"vgg: {path} holds more than weights or is damaged ({error}); get it again") from error
