"""The sound of one file on its way into another, packet by packet: copied, or encoded where that is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .file import Pathlike, open_file, timed_frames
from .pixels import pull

# Names of decoders that are not those of their codecs.
CODECS = {"mp3float": "mp3", "libopus": "opus", "libvorbis": "vorbis"}
# What sound of other than one, six or eight channels becomes.
LAYOUTS, LAYOUT = {1: "mono", 6: "5.1", 8: "7.1"}, "stereo"
BITS_PER_CHANNEL = 96_000
# Only silence as long is put in where a source has gaps; less is rounding of times.
FILLED_GAP = 0.01


@dataclass(frozen=True)
class Holds:
    """What sound one kind of file holds."""

    # Of a source, copied as it is.
    codecs: frozenset[str]
    # For all other sound, with its sample rates, of which the first is for sources with others.
    encoder: str
    rates: tuple[int, ...]
    # Seconds of copied sound before the first frame that a decoder needs and the file can hide.
    lead: float


HOLDS: dict[str, Holds] = {
    "mp4": Holds(
        codecs=frozenset({"aac", "mp3", "ac3", "eac3", "flac", "opus", "alac"}),
        encoder="aac",
        rates=(48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8000),
        lead=0.08,
    ),
    "webm": Holds(codecs=frozenset({"opus", "vorbis"}), encoder="libopus", rates=(48_000,), lead=0.0),
}


class Sound:
    """Sound that is written as far as the picture is, so that neither waits in memory for the other."""

    def __init__(self, output: Any, packets: Iterator[Any]) -> None:
        self.output, self.packets = output, packets
        self.next = next(packets, None)

    def write_until(self, seconds: float) -> None:
        """Write what begins before `seconds` after the first frame and is not yet written."""
        while self.next is not None and float(self.next.dts * self.next.time_base) < seconds:
            self.output.mux(self.next)
            self.next = next(self.packets, None)


@contextlib.contextmanager
def open_sound(path: Pathlike, output: Any) -> Iterator[Sound | None]:
    """The first sound of the file `path` as a new stream of `output`, None where one of them has none.

    Raises ValueError when it cannot be decoded. Packets and frames that cannot be read leave silence.
    """
    import av

    holds = HOLDS.get(output.format.name)
    begin = _first_frame(path) if holds else 0.0
    with contextlib.ExitStack() as stack:
        try:
            source = stack.enter_context(open_file(path))
        except av.FFmpegError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}): choose another file for the sound") from error
        stream = next(iter(source.streams.audio), None)
        if holds is None or stream is None:
            yield None
            return
        if stream.codec_context is None:
            raise ValueError(f"{path} has sound that this build of PyAV does not decode: convert it to AAC")
        stream.codec_context.thread_count = 1
        packets = _demuxed(source, stream)
        if _is_copied(stream, holds):
            yield Sound(output, _copied(packets, stream, _add_copy(output, stream), begin, holds.lead))
        else:
            yield Sound(output, _encoded(packets, _add_encoder(output, stream, holds), begin))


def _first_frame(path: Pathlike) -> float:
    """Seconds on the file's clock at which its picture begins; 0 without one."""
    import av

    with contextlib.suppress(av.FFmpegError), open_file(path) as file:
        if file.streams.video and file.streams.video[0].codec_context is not None:
            stream = file.streams.video[0]
            stream.codec_context.thread_count = 1
            return next(timed_frames(file, stream), (0.0, None))[0]
    return 0.0


def _is_copied(stream: Any, holds: Holds) -> bool:
    name = stream.codec_context.name
    codec = CODECS.get(name, name)
    # .mp4 holds no mp3 of lower rates.
    return codec in holds.codecs and not (codec == "mp3" and stream.codec_context.sample_rate < 16_000)


def _add_copy(output: Any, stream: Any) -> Any:
    # Before version 14 PyAV has no method of its own for that.
    if hasattr(output, "add_stream_from_template"):
        return output.add_stream_from_template(stream)
    return output.add_stream(template=stream)


def _add_encoder(output: Any, stream: Any, holds: Holds) -> Any:
    context = stream.codec_context
    rate = context.sample_rate if context.sample_rate in holds.rates else holds.rates[0]
    target = output.add_stream(holds.encoder, rate=rate, options={"flags": "+bitexact"})
    channels = len(context.layout.channels)
    target.codec_context.layout = LAYOUTS.get(channels, LAYOUT)
    target.codec_context.bit_rate = BITS_PER_CHANNEL * (channels if channels in LAYOUTS else 2)
    return target


def _demuxed(file: Any, stream: Any) -> Iterator[Any]:
    """The packets as far as the file can be read."""
    import av

    with contextlib.suppress(av.FFmpegError):
        yield from file.demux(stream)


def _copied(packets: Iterator[Any], stream: Any, target: Any, begin: float, lead: float) -> Iterator[Any]:
    """Packets for `target` from `lead` seconds before the picture on."""
    shift, last = round(begin / stream.time_base), None
    for packet in packets:
        if not packet.size or packet.pts is None:
            continue
        # Sound is decoded in the order in which it is heard.
        packet.pts = packet.dts = packet.pts - shift
        ends = float((packet.pts + (packet.duration or 0)) * packet.time_base)
        if ends <= -lead or (last is not None and packet.pts <= last):
            continue
        last = packet.pts
        packet.stream = target
        yield packet


def _encoded(packets: Iterator[Any], target: Any, begin: float) -> Iterator[Any]:
    """New packets of the sound from the picture's beginning on, gaps filled with silence."""
    graph: Any = None
    kind, heard = None, 0
    for frame in _decoded(packets):
        if frame.pts is not None:
            frame.pts -= round(begin / frame.time_base)
        if kind != (kind := (frame.format.name, frame.layout.name, frame.sample_rate)):
            if graph is not None:
                graph.push(None)
                for piece in pull(graph):
                    heard = piece.pts + piece.samples
                    yield from target.encode(piece)
            start = 0 if frame.pts is None else round(frame.pts * frame.time_base * target.codec_context.sample_rate)
            graph = _sound_graph(frame, target.codec_context, max(start, heard))
        graph.push(frame)
        for piece in pull(graph):
            heard = piece.pts + piece.samples
            yield from target.encode(piece)
    if graph is not None:
        graph.push(None)
        for piece in pull(graph):
            yield from target.encode(piece)
    yield from target.encode(None)


def _decoded(packets: Iterator[Any]) -> Iterator[Any]:
    import av

    for packet in packets:
        with contextlib.suppress(av.FFmpegError):
            yield from packet.decode()


def _sound_graph(frame: Any, context: Any, first: int) -> Any:
    """From frames like this to the encoder's kind of sample, the first of them at `first`, none missing after it."""
    from av.filter import Graph

    graph = Graph()
    source = graph.add_abuffer(
        sample_rate=frame.sample_rate,
        format=frame.format.name,
        layout=frame.layout.name,
        time_base=frame.time_base,
    )
    resample = graph.add("aresample", f"{context.sample_rate}:async=1:min_hard_comp={FILLED_GAP}:first_pts={first}")
    convert = graph.add("aformat", f"sample_fmts={context.format.name}:channel_layouts={context.layout.name}")
    sink = graph.add("abuffersink")
    source.link_to(resample)
    resample.link_to(convert)
    convert.link_to(sink)
    graph.configure()
    return graph
