"""How beautiful a key frame is: a linear predictor on CLIP's image features, with weights that the user supplies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from videofactory_core.memory import pick_device
from videofactory_core.pretrained import lacking, load, load_model

from .keyframe import read_pictures
from .stage import Row, Stage, Work

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

# The predictor's linear layers in its file; there is nothing between them, so they are one affine map.
LAYERS = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")


@dataclass(frozen=True)
class Aesthetics(Stage):
    """A score of about 1 to 10 for the key frame."""

    name: ClassVar[str] = "aesthetics"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("scenes", "keyframe")
    weights_in: ClassVar[tuple[str, ...]] = ("clip", "predictor")

    # A folder with CLIP ViT-L/14 as transformers keeps it, and the predictor: sac+logos+ava1-l14-linearMSE.
    clip: str = ""
    predictor: str = ""
    device: str = "auto"

    @classmethod
    def columns(cls) -> dict[str, pa.DataType]:
        import pyarrow as pa

        return {"aesthetic": pa.float64()}

    def missing(self) -> str:
        if reason := lacking(self.clip):
            return f"aesthetics.clip: {reason}; name one with CLIP ViT-L/14 as transformers keeps it"
        if not Path(self.predictor).is_file():
            there = f"there is no file {self.predictor}" if self.predictor else "no file is named"
            return f"aesthetics.predictor: {there}; name a local copy of sac+logos+ava1-l14-linearMSE"
        return ""

    def open(self) -> Work:
        import torch
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        device = pick_device(self.device)
        processor: Any = load("aesthetics.clip", CLIPImageProcessor, self.clip)
        model = load_model("aesthetics.clip", CLIPVisionModelWithProjection, self.clip, device, torch.float32)
        weight, bias = read_predictor(Path(self.predictor))
        if weight.shape != (model.config.projection_dim,):
            raise ValueError(
                f"{self.predictor} is for image features of {len(weight)} numbers and {self.clip} gives "
                f"{model.config.projection_dim}: name the CLIP that it was made for, ViT-L/14"
            )

        @torch.inference_mode()
        def work(rows: Sequence[Row]) -> list[Row]:
            pixels = processor(read_pictures([row["image"] for row in rows]), return_tensors="pt")["pixel_values"]
            features = model(pixel_values=pixels.to(device)).image_embeds.double().cpu()
            # A zero vector stays one.
            features = features / features.norm(dim=1, keepdim=True).clamp_min(1e-12)
            return [{"aesthetic": score} for score in (features @ weight + bias).tolist()]

        return work


def read_predictor(path: Path) -> tuple[Tensor, Tensor]:
    """The affine map w x + b that its layers are: w `[D]` and b `[]`, in float64; ValueError for another file."""
    import torch

    from videofactory_core.convert.sources import open_source

    source = open_source(path)
    weight, bias = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    try:
        for layer in reversed(LAYERS):
            bias = bias + weight @ source.read(f"{layer}.bias").double()
            weight = weight @ source.read(f"{layer}.weight").double()
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is not the linear predictor (layers.0 to layers.7): choose another file") from error
    return weight[0], bias[0]
