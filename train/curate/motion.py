"""Motion: how much clips move, and how evenly, by optical flow; clips that only pan or zoom a picture move evenly."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from videofactory_core.video import read_frames

from .sources import content
from .stage import Row, Stage, Work

if TYPE_CHECKING:
    import pyarrow as pa

Array = np.ndarray[Any, Any]
# Maps two RGB pictures `[H, W, 3]` (uint8) to the way `[H, W, 2]` that each point of the first goes until the second,
# in pixels to the right and down.
Estimator = Callable[[Array, Array], Array]
Deviation = Literal["global", "temporal", "spatial"]

# Pixels across that a picture has in the paper's units, as far as can be told; measures are given in those.
UNIT_WIDTH = 640
# Estimators need some height, which only pictures lack that are 10 times as wide.
LEAST_HEIGHT = 32
# Memory: pairs of frames that a clip is judged by, spread over it if it has more; and frames read at a time.
MOST_PAIRS = 300
FRAMES_AT_A_TIME = 64
# The affine fit: every so many pixels, how often it is weighed again, and what counts as 0 pixels.
AFFINE_STRIDE = 4
AFFINE_ROUNDS = 10
AFFINE_EPSILON = 1e-3
# Where torchvision publishes RAFT; and its least side and what sides are multiples of.
RAFT_FILES = {
    "raft_small": "https://download.pytorch.org/models/raft_small_C_T_V2-01064c6d.pth",
    "raft_large": "https://download.pytorch.org/models/raft_large_C_T_SKHT_V2-ff5fadd5.pth",
}
RAFT_LEAST, RAFT_MULTIPLE = 128, 8


def moves(
    o_avg: float, o_md: float, *, o_avg_over: float = 0.2, ratio_under: float = 2.0, o_md_over: float = 6.0
) -> bool:
    """Whether a clip moves enough and not as a whole: O_avg > 0.2 and (O_avg / O_md < 2 or O_md > 6)."""
    return o_avg > o_avg_over and (o_avg < ratio_under * o_md or o_md > o_md_over)


@dataclass(frozen=True)
class Motion(Stage):
    """Measures of the flow F_t between frames of a clip, `fps` of them a second, in 640ths of the picture's width.

    With m_t(x) = |F_t(x)|, `o_avg` is the mean of m over t and x, and `o_md` its mean absolute deviation: from
    `o_avg` (global), from the mean over t at the same x (temporal), or from the mean over x at the same t (spatial).
    `ratio` is o_avg / o_md, None where nothing deviates. `affine_residual` is the mean length of what remains of F_t
    without the affine motion of the picture that explains most of it. `pairs` is the number of t.

    ValueError for a clip that is too short for two frames or cannot be decoded.
    """

    name: ClassVar[str] = "motion"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("scenes",)
    rows_per_part: ClassVar[int] = 16
    weights_in: ClassVar[tuple[str, ...]] = ("weights",)

    # dis, raft_small, raft_large, or a function as "module:name", which gets `weights` and returns an `Estimator`.
    estimator: str = "dis"
    # torchvision's .pth for RAFT.
    weights: str = ""
    # Frames a second that are compared.
    fps: float = 2.0
    # Pixels across, in which they are compared.
    width: int = 320
    deviation: Deviation = "global"

    def __post_init__(self) -> None:
        if self.estimator not in ("dis", *RAFT_FILES) and not all(self.estimator.partition(":")):
            known = ", ".join(("dis", *RAFT_FILES))
            raise ValueError(f'estimator: {self.estimator!r} is not known; use {known} or "module:function"')
        if not 0 < self.fps <= 240:
            raise ValueError(f"fps: {self.fps} is no frame rate; use a number above 0 and up to 240")
        if not 64 <= self.width <= 4096:
            raise ValueError(f"width: {self.width} is out of range; use 64 to 4096 pixels")

    @classmethod
    def columns(cls) -> dict[str, pa.DataType]:
        import pyarrow as pa

        measures = ("o_avg", "o_md", "ratio", "affine_residual")
        return {**{name: pa.float64() for name in measures}, "pairs": pa.int32()}

    def missing(self) -> str:
        if self.estimator == "dis":
            absent = find_spec("cv2") is None
            return 'OpenCV is not installed: run pip install "videofactory[curate]"' if absent else ""
        if self.estimator in RAFT_FILES:
            if not os.path.isfile(self.weights):
                there = f"there is no file {self.weights}" if self.weights else "no file is named"
                return f"motion.weights: {there}; name a local copy of {RAFT_FILES[self.estimator]}"
            return ""
        module, _, name = self.estimator.partition(":")
        try:
            found = callable(getattr(import_module(module), name, None))
        except ImportError as error:
            return f"motion.estimator: {module} cannot be imported ({error})"
        return "" if found else f"motion.estimator: {module} has no function {name}"

    def open(self) -> Work:
        estimate = self._estimator()
        return lambda rows: [self._measure(row, estimate) for row in rows]

    def _estimator(self) -> Estimator:
        if self.estimator == "dis":
            return dis()
        if self.estimator in RAFT_FILES:
            return _raft(self.estimator, self.weights)
        module, _, name = self.estimator.partition(":")
        return getattr(import_module(module), name)(self.weights)

    def _measure(self, row: Row, estimate: Estimator) -> Row:
        """The columns of a clip."""
        size = self.width, max(LEAST_HEIGHT, round(row["height"] * self.width / row["width"]))
        scale = UNIT_WIDTH / self.width
        lengths: list[Array] = []
        samples: list[Array] = []
        for first, second in self._pairs(row, size):
            flow = estimate(first, second) * np.float32(scale)
            lengths.append(np.hypot(flow[..., 0], flow[..., 1]))
            samples.append(flow[::AFFINE_STRIDE, ::AFFINE_STRIDE])
        o_avg, o_md = deviations(np.stack(lengths), self.deviation)
        residual = float(affine_residuals(np.stack(samples)).mean())
        ratio = o_avg / o_md if o_md > 0 else None
        return {"o_avg": o_avg, "o_md": o_md, "ratio": ratio, "affine_residual": residual, "pairs": len(lengths)}

    def _pairs(self, row: Row, size: tuple[int, int]) -> Iterator[tuple[Array, Array]]:
        """Frames of a clip and what follows them 1 / `fps` later."""
        # The last frame may begin half its time too late: by rounding it could already be of the next scene.
        length = row["end"] - row["start"] - (0.5 / row["fps"] if row["fps"] else 0.0)
        count = math.ceil(length * self.fps) - 1
        if count < 1:
            seconds = row["end"] - row["start"]
            raise ValueError(f"{row['name']} lasts {seconds:.2f} seconds, too short for two frames at {self.fps:g} fps")
        firsts = np.unique(np.linspace(0, count - 1, min(count, MOST_PAIRS)).round().astype(int)).tolist()
        numbers = sorted({*firsts, *(number + 1 for number in firsts)})
        frames = self._frames(row, numbers, size)
        before, picture = next(frames)
        starts = set(firsts)
        for number, following in frames:
            if before in starts and number == before + 1:
                yield picture, following
            before, picture = number, following

    def _frames(self, row: Row, numbers: Sequence[int], size: tuple[int, int]) -> Iterator[tuple[int, Array]]:
        """The frames shown at number / `fps` seconds of a clip."""
        source = content(row)
        for begin in range(0, len(numbers), FRAMES_AT_A_TIME):
            some = numbers[begin : begin + FRAMES_AT_A_TIME]
            frames = read_frames(source, [row["start"] + number / self.fps for number in some], size)
            yield from zip(some, frames.numpy(), strict=True)


def deviations(lengths: Array, deviation: Deviation) -> tuple[float, float]:
    """O_avg and O_md of `lengths [T, H, W]`; see `Motion`."""
    mean = lengths.mean(dtype=np.float64)
    axes = {"global": (0, 1, 2), "temporal": (0,), "spatial": (1, 2)}[deviation]
    centre = lengths.mean(axes, keepdims=True, dtype=np.float64).astype(np.float32)
    return float(mean), float(np.abs(lengths - centre).mean(dtype=np.float64))


def affine_residuals(flows: Array) -> Array:
    """Mean length, for each of `flows [T, H, W, 2]`, of F(x) - A (x, y, 1), where A makes it least.

    Iteratively reweighted least squares: w = 1 / max(|F - A (x, y, 1)|, epsilon) makes the sum of squares one of
    lengths, so that A follows the larger part of the picture and not the mean of two.
    """
    count, height, width, _ = flows.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    points = np.stack([x.ravel(), y.ravel(), np.ones(height * width)], 1)
    flows = flows.reshape(count, -1, 2).astype(np.float64)
    weights = np.ones(flows.shape[:2])
    for _ in range(AFFINE_ROUNDS):
        # [T, 3, N] of weighted points; the normal equations are [T, 3, 3] and [T, 3, 2].
        weighted = points.T * weights[:, None]
        affine = np.linalg.solve(weighted @ points, weighted @ flows)
        lengths = np.linalg.norm(flows - points @ affine, axis=-1)
        weights = 1 / np.maximum(lengths, AFFINE_EPSILON)
    return lengths.mean(1)


# Estimators


def dis() -> Estimator:
    """Dense inverse search (Kroeger et al., 2016), on grey pictures."""
    import cv2

    cv2.setNumThreads(1)
    search: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def estimate(first: Array, second: Array) -> Array:
        grey = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (first, second)]
        return search.calc(grey[0], grey[1], None)

    return estimate


def _raft(name: str, weights: str) -> Estimator:
    """RAFT (Teed and Deng, 2020) by torchvision, with its published weights in a local file."""
    import torch
    from torch.nn import functional as F
    from torchvision.models import optical_flow

    from videofactory_core.checkpoint import CheckpointError
    from videofactory_core.convert.sources import open_source

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = getattr(optical_flow, name)(weights=None)
    try:
        source = open_source(Path(weights))
        model.load_state_dict({key: source.read(key) for key in source.shapes})
    except (CheckpointError, RuntimeError) as error:
        # What does not fit takes PyTorch many lines.
        reason = f" ({error})" if isinstance(error, CheckpointError) else ""
        raise ValueError(
            f"motion.weights: {weights} is not torchvision's {name}{reason}; get {RAFT_FILES[name]}"
        ) from error
    model = model.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def estimate(first: Array, second: Array) -> Array:
        height, width = first.shape[:2]
        right, below = (
            max(RAFT_LEAST, RAFT_MULTIPLE * math.ceil(side / RAFT_MULTIPLE)) - side for side in (width, height)
        )
        pair = torch.from_numpy(np.stack([first, second])).to(device).permute(0, 3, 1, 2) / 127.5 - 1
        pair = F.pad(pair, (0, right, 0, below), mode="replicate")
        flow = model(pair[:1], pair[1:])[-1][0, :, :height, :width]
        return flow.permute(1, 2, 0).cpu().numpy()

    return estimate
