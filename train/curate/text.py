"""Text: where a keyframe shows writing, and how much of it lies along the edges, where captions and marks are put."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from PIL import Image

from .stage import Row, Stage, Work

if TYPE_CHECKING:
    import pyarrow as pa

Array = np.ndarray[Any, Any]
# Pixels across of the picture that boxes are measured in.
WIDTH = 640


class Box(NamedTuple):
    """Writing in a picture, from (x0, y0) to (x1, y1), and how sure that is, 0 to 1."""

    x0: float
    y0: float
    x1: float
    y1: float
    score: float


# Maps an RGB picture `[H, W, 3]` (uint8) to what is written in it.
Detector = Callable[[Array], list[Box]]


@dataclass(frozen=True)
class Text(Stage):
    """`text_boxes`, each [x0, y0, x1, y1, score] in a picture 640 wide, and `text_edge`, the largest share of a box
    that lies within `band` pixels of an edge; 0 without boxes.

    The share is 1 - area(box and inner rectangle) / area(box), of boxes cut off at the picture's edges.
    """

    name: ClassVar[str] = "text"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("scenes", "keyframe")
    weights_in: ClassVar[tuple[str, ...]] = ("weights",)

    # rapidocr brings its weights along; pp_ocr and craft want `weights`.
    detector: Literal["rapidocr", "pp_ocr", "craft"] = "rapidocr"
    # A folder with a PP-OCR detector for transformers, or CRAFT's craft_mlt_25k.pth.
    weights: str = ""
    # Score that a box has at least; 0 is the detector's own choice.
    threshold: float = 0.0
    # Pixels along the edges.
    band: int = 60
    # Pixels that a box is high at least.
    min_height: float = 8.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold: {self.threshold} is no score; use 0 or more, below 1")
        if not 0 < self.band < WIDTH / 2:
            raise ValueError(f"band: {self.band} is out of range; use 1 to {WIDTH // 2 - 1} pixels")
        if not 0 <= self.min_height < WIDTH:
            raise ValueError(f"min_height: {self.min_height} is out of range; use 0 to {WIDTH - 1} pixels")

    @classmethod
    def columns(cls) -> dict[str, pa.DataType]:
        import pyarrow as pa

        return {"text_boxes": pa.list_(pa.list_(pa.float32())), "text_edge": pa.float64()}

    def missing(self) -> str:
        if self.detector == "rapidocr":
            if find_spec("rapidocr") is None or find_spec("onnxruntime") is None:
                return "RapidOCR is not installed: run pip install rapidocr onnxruntime"
            return ""
        if find_spec("cv2") is None:
            return 'OpenCV is not installed: run pip install "videofactory[curate]"'
        there = f"there is no {self.weights}" if self.weights else "nothing is named"
        if self.detector == "craft":
            found = os.path.isfile(self.weights)
            return "" if found else f"text.weights: {there}; name CRAFT's craft_mlt_25k.pth"
        if not os.path.isfile(os.path.join(self.weights, "config.json")):
            return f"text.weights: {there}; name a folder with a PP-OCR detector for transformers and its config.json"
        return ""

    def open(self) -> Work:
        load = {"rapidocr": _rapidocr, "pp_ocr": _pp_ocr, "craft": _craft}[self.detector]
        detect = load(self.weights, self.threshold)
        return lambda rows: [self._find(row, detect) for row in rows]

    def _find(self, row: Row, detect: Detector) -> Row:
        """The columns of a clip."""
        with Image.open(io.BytesIO(row["image"])) as image:
            size = WIDTH, max(1, round(image.height * WIDTH / image.width))
            picture = np.array(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
        boxes = [box for box in _cut(detect(picture), size) if box.y1 - box.y0 >= self.min_height]
        edge = max((edge_share(box, size, self.band) for box in boxes), default=0.0)
        return {"text_boxes": [list(box) for box in boxes], "text_edge": edge}


def edge_share(box: Box, size: tuple[int, int], band: float) -> float:
    """1 - area(box and inner rectangle) / area(box), in a picture of `size` (width, height) with a band all around."""
    inside = 1.0
    for low, high, side in ((box.x0, box.x1, size[0]), (box.y0, box.y1, size[1])):
        inside *= max(0.0, min(high, side - band) - max(low, band)) / (high - low)
    return 1 - inside


def _cut(boxes: Sequence[Box], size: tuple[int, int]) -> list[Box]:
    """What of each box lies in the picture."""
    width, height = size
    cut = [Box(max(0, b.x0), max(0, b.y0), min(width, b.x1), min(height, b.y1), b.score) for b in boxes]
    return [box for box in cut if box.x1 > box.x0 and box.y1 > box.y0]


# Detectors


def _rapidocr(weights: str, threshold: float) -> Detector:
    """The PP-OCR detector that RapidOCR brings along."""
    from rapidocr import RapidOCR

    # A process for each core needs one thread; and what it tells its log is not for the user.
    params: dict[str, Any] = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    params["Global.log_level"] = "critical"
    # By default it would enlarge the picture to 736 rows, which takes five times as long and loses small writing.
    params |= {"Det.limit_type": "min", "Det.limit_side_len": 32}
    engine: Any = RapidOCR(params=params)
    chosen = {"box_thresh": threshold} if threshold else {}

    def detect(picture: Array) -> list[Box]:
        # It expects BGR.
        found = engine(picture[..., ::-1].copy(), use_det=True, use_cls=False, use_rec=False, **chosen)
        corners = found.boxes if found.boxes is not None else ()
        scores = found.scores if found.scores is not None else ()
        return [_box(points, float(score)) for points, score in zip(corners, scores, strict=True)]

    return detect


def _box(points: Array, score: float) -> Box:
    """The upright box around `points [N, 2]`."""
    (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()
    return Box(x0, y0, x1, y1, score)


def _pp_ocr(folder: str, threshold: float) -> Detector:
    """A PP-OCR detector from a local folder, by transformers."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        model = AutoModelForObjectDetection.from_pretrained(folder, local_files_only=True).eval().to(device)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"text.weights: {folder} is no PP-OCR detector for transformers 5.4 or later ({reason})"
        ) from error
    chosen = {"box_threshold": threshold} if threshold else {}

    @torch.inference_mode()
    def detect(picture: Array) -> list[Box]:
        inputs = processor(images=picture, return_tensors="pt").to(device)
        size = torch.tensor([picture.shape[:2]])
        (found,) = processor.post_process_object_detection(model(**inputs), target_sizes=size, **chosen)
        corners = found["boxes"].reshape(-1, 2, 2).cpu().numpy()
        return [_box(points, score) for points, score in zip(corners, found["scores"].tolist(), strict=True)]

    return detect


def _craft(weights: str, threshold: float) -> Detector:
    """CRAFT with the weights of its authors."""
    import torch

    from videofactory_core.checkpoint import CheckpointError
    from videofactory_core.convert.sources import open_source

    from .craft import HIGH, Craft, find_boxes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Craft()
    try:
        source = open_source(Path(weights))
        model.load_state_dict({name: source.read(name) for name in source.shapes})
    except (CheckpointError, RuntimeError) as error:
        # What does not fit takes PyTorch many lines.
        reason = f" ({error})" if isinstance(error, CheckpointError) else ""
        raise ValueError(f"text.weights: {weights} is not CRAFT's craft_mlt_25k.pth{reason}; get it again") from error
    model = model.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def detect(picture: Array) -> list[Box]:
        scores = model(torch.from_numpy(picture).to(device).permute(2, 0, 1)[None] / 255)[0].cpu().numpy()
        return find_boxes(scores[0], scores[1], threshold or HIGH)

    return detect
