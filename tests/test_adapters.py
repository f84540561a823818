"""LoRA: nothing at first, then exactly the change of weights that its file holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from videofactory_core import adapters
from videofactory_core.adapters import Adapter
from videofactory_core.config import PRESETS
from videofactory_core.unet.model import VideoUNet

CONFIG = PRESETS["debug"].unet


def network() -> VideoUNet:
    torch.manual_seed(0)
    model = VideoUNet(CONFIG).eval()
    for parameter in model.parameters():
        if not parameter.any() and parameter.ndim > 1:
            # A layer that starts at zero would let no change through.
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


@torch.no_grad()
def predict(model: VideoUNet) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, CONFIG.in_channels, 4, 4, 8, generator=generator)
    context = torch.randn(1, 5, CONFIG.context_dim, generator=generator)
    return model(x, torch.tensor([500]), context)


@pytest.mark.parametrize("layers", ["temporal", "merge", "attn2", ".", r"^input_blocks\.1\..*ff"])
def test_a_file_holds_what_the_model_calculates_with(tmp_path: Path, layers: str) -> None:
    plain, model = network(), network()
    adapter = Adapter(model, layers, rank=2, alpha=3.0)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(predict(model), predict(plain))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.half().float()
    changed = predict(model)
    assert (changed - predict(plain)).abs().max() > 1e-2

    adapters.save(tmp_path / "lora.safetensors", adapter, "a title", "MIT", "a test")
    with safe_open(tmp_path / "lora.safetensors", "pt") as file, torch.no_grad():
        names = {key.rsplit(".lora_", 1)[0] for key in file.keys() if ".lora_" in key}  # noqa: SIM118
        assert len(names) == len(adapter.names)
        for name in names:
            down, up = (file.get_tensor(f"{name}.lora_{part}.weight").float() for part in ("down", "up"))
            layer = plain.get_submodule(name.removeprefix("diffusion_model."))
            layer.weight += up @ down * file.get_tensor(f"{name}.alpha") / len(down)
        assert file.metadata()["modelspec.license"] == "MIT"
    assert torch.allclose(predict(plain), changed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "rank", "message"),
    [("temporal", 0, "rank"), ("nowhere", 4, "no linear layer"), ("(", 4, "regular expression")],
)
def test_what_changes_nothing_is_refused(layers: str, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adapter(network(), layers, rank, 1.0)
