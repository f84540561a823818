"""RCAN against spandrel's, its sizes, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from spandrel import ModelLoader
from torch import Tensor

from videofactory_core import upscaler
from videofactory_core.upscaler import Upscaler, UpscalerConfig

SMALL = UpscalerConfig(groups=2, blocks=1, features=8, reduction=4)


def pictures() -> Tensor:
    return torch.rand(2, 3, 9, 11, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("groups", "parameters"), [(10, 6_660_035), (1, 968_291)])
def test_sizes_are_the_papers(groups: int, parameters: int) -> None:
    with torch.device("meta"):
        model = Upscaler(UpscalerConfig(groups=groups))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("mean_shift", [False, True])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_the_known_reader_reads_our_files_and_agrees(scale: int, mean_shift: bool) -> None:
    torch.manual_seed(0)
    model = Upscaler(UpscalerConfig(2, 2, 16, 4, scale, mean_shift)).eval()
    known = ModelLoader().load_from_state_dict(model.state_dict())
    assert known.scale == scale
    with torch.no_grad():
        expected = known.model(pictures())
        assert torch.allclose(model(pictures()), expected, rtol=0, atol=1e-6)


def test_files_are_read_back_with_their_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Upscaler(SMALL).half().float()
    upscaler.save(tmp_path / "small.safetensors", model, "small", "MIT", "a test")
    back = upscaler.load(tmp_path / "small.safetensors")
    assert back.config == SMALL
    assert torch.equal(back(pictures()), model(pictures()))
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


def test_what_is_no_rcan_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    with pytest.raises(ValueError, match="does not exist"):
        upscaler.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        upscaler.load(path)
    save_file({"conv_first.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(ValueError, match="not the weights of an RCAN"):
        upscaler.load(path)
    save_file({**Upscaler(SMALL).state_dict(), "more": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="nearly an RCAN's"):
        upscaler.load(path)
