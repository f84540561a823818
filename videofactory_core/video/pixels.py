"""Between RGB and what codecs store: colour matrices, cutting, scaling, turning and palettes, by FFmpeg's filters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
# Left, top, width and height of a part of a picture.
Box = tuple[int, int, int, int]

SCALER = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
# H.264 and VP9 mean chroma samples to lie in the left column of their 2x2 pixels unless told otherwise.
YUV_TO_RGB = f"in_h_chr_pos=0:{SCALER}"
RGB_TO_YUV = f"out_color_matrix=bt709:out_range=limited:out_h_chr_pos=0:out_v_chr_pos=128:{SCALER}"
# ISO 23001-8 codes of a frame's YUV matrix.
MATRIX_BT709, MATRIX_UNSPECIFIED = 1, 2
# Untagged video higher than standard definition is BT.709 by convention, else BT.601.
STANDARD_DEFINITION_HEIGHT = 576


class Converter:
    """Decoded frames to RGB `[H, W, 3]` in one size, upright, transparent parts over black.

    The shown picture, whose stored pixels are `pixel_aspect` as wide as high, is cut about its centre to the shape
    `crop` (width / height) and then to that of `size` (width, height), and scaled to `size`; without `size` all frames
    get that of the first. Filter graphs are kept while the frames stay of one kind.
    """

    def __init__(
        self, size: tuple[int, int] | None = None, crop: float | None = None, pixel_aspect: float = 1.0
    ) -> None:
        self.size = size
        self.shapes = [shape for shape in (crop, size and size[0] / size[1]) if shape is not None]
        self.pixel_aspect = pixel_aspect
        self.graphs: dict[str, tuple[tuple[Any, ...], Any]] = {}

    def __call__(self, frame: Any) -> Pixels:
        matrix = display_matrix(frame)
        if frame.colorspace == MATRIX_UNSPECIFIED and frame.height > STANDARD_DEFINITION_HEIGHT:
            frame.colorspace = MATRIX_BT709
        # A palette may hold transparent colours.
        if frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components):
            frame = self._over_black(frame)
        box, size = self._fit(frame.width, frame.height, is_turned(matrix))
        pixels = self._filter(frame, box, size, "rgb24").to_ndarray()
        return np.ascontiguousarray(_upright(pixels, matrix))

    def _over_black(self, frame: Any) -> Any:
        import av

        whole = (0, 0, frame.width, frame.height)
        pixels = self._filter(frame, whole, whole[2:], "rgba").to_ndarray()
        colour, alpha = pixels[..., :3].astype(np.uint16), pixels[..., 3:]
        opaque = av.VideoFrame.from_ndarray(((colour * alpha + 127) // 255).astype(np.uint8), format="rgb24")
        opaque.pts, opaque.time_base = frame.pts, frame.time_base
        return opaque

    def _fit(self, width: int, height: int, turned: bool) -> tuple[Box, tuple[int, int]]:
        """The part of the stored picture that is used, and what it is scaled to before it is turned."""
        shown = square_size(width, height, self.pixel_aspect, turned)
        cut_width, cut_height = shown
        for shape in self.shapes:
            cut_width, cut_height = min(cut_width, cut_height * shape), min(cut_height, cut_width / shape)
        self.size = self.size or (round(cut_width), round(cut_height))
        shares, size = (cut_width / shown[0], cut_height / shown[1]), self.size
        if turned:
            shares, size = shares[::-1], size[::-1]
        (left, box_width), (top, box_height) = _middle(width, shares[0]), _middle(height, shares[1])
        return (left, top, box_width, box_height), size

    def _filter(self, frame: Any, box: Box, size: tuple[int, int], output: str) -> Any:
        kind = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, box, size)
        if self.graphs.get(output, ((),))[0] != kind:
            self.graphs[output] = kind, convert_graph(*kind[:3], frame.time_base, size, YUV_TO_RGB, output, box)
        graph = self.graphs[output][1]
        graph.push(frame)
        return graph.pull()


def square_size(width: int, height: int, pixel_aspect: float, turned: bool) -> tuple[float, float]:
    """Width and height of a stored picture as it is shown in square pixels, of which no side has fewer than stored."""
    shown = (width * max(1.0, pixel_aspect), height / min(1.0, pixel_aspect))
    return shown[::-1] if turned else shown


def _middle(side: int, share: float) -> tuple[int, int]:
    """Start and length of the middle `share` of a side, even because chroma may have half the resolution."""
    length = 2 * round(side * share / 2)
    if side * share > side - 1 or not 0 < length < side:
        return 0, side
    return (side - length) // 4 * 2, length


def display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """`(a, b, c, d)`, by which a stored point is shown at x' = a x + c y, y' = b x + d y."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV 18 refuses frames that carry EXIF too; its whole quarter turns against the clock remain, mirroring not.
        return ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[round(frame.rotation / 90) % 4]
    if data is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    return a, b, c, d


def is_turned(matrix: tuple[int, int, int, int]) -> bool:
    """Whether width and height change places."""
    return abs(matrix[1]) > abs(matrix[0])


def _upright(pixels: Pixels, matrix: tuple[int, int, int, int]) -> Pixels:
    """`pixels [H, W, 3]` turned and mirrored by the display matrix."""
    a, b, c, d = matrix
    if is_turned(matrix):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def convert_graph(
    width: int,
    height: int,
    pixel_format: str,
    time_base: Fraction,
    size: tuple[int, int],
    scaler: str,
    output: str,
    box: Box | None = None,
) -> Any:
    """From one pixel format to another, and from the part `box` (None: the whole) to `size` (width, height)."""
    graph, source = _graph(width, height, pixel_format, time_base)
    if box is not None and box[2:] != (width, height):
        left, top, box_width, box_height = box
        crop = graph.add("crop", f"{box_width}:{box_height}:{left}:{top}:exact=1")
        source.link_to(crop)
        source = crop
    scale = graph.add("scale", f"{size[0]}:{size[1]}:{scaler}")
    convert = graph.add("format", output)
    sink = graph.add("buffersink")
    source.link_to(scale)
    scale.link_to(convert)
    convert.link_to(sink)
    graph.configure()
    return graph


def palette_graph(width: int, height: int, time_base: Fraction) -> Any:
    """From RGB to the 256 colours that suit the whole clip; gives its frames when the last one is in."""
    graph, source = _graph(width, height, "rgb24", time_base)
    split = graph.add("split")
    palette = graph.add("palettegen", "reserve_transparent=0")
    apply = graph.add("paletteuse")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(apply, 1, 0)
    palette.link_to(apply, 0, 1)
    apply.link_to(sink)
    graph.configure()
    return graph


def _graph(width: int, height: int, pixel_format: str, time_base: Fraction) -> tuple[Any, Any]:
    """An empty graph and its source."""
    import av
    from av.filter import Graph

    graph = Graph()
    # Frames of this size cost more to share among threads than to filter; older versions of PyAV do not let us say so.
    if hasattr(graph, "threads"):
        graph.threads = 1
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat(pixel_format), time_base=time_base)
    return graph, source


def pull(graph: Any) -> Iterator[Any]:
    """The frames that the graph has ready."""
    with contextlib.suppress(BlockingIOError, EOFError):
        while True:
            yield graph.pull()
