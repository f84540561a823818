"""Video files in and out, through PyAV: .mp4 (H.264), .webm (VP9) and .gif."""

from .file import Pathlike, read_metadata
from .read import Probe, Video, probe, read_frames, read_video
from .stream import DamagedVideo, Frame, Stream, open_frames
from .write import CONTAINERS, Container, check_fps, check_writable, write_frames, write_video

__all__ = [
    "CONTAINERS",
    "Container",
    "DamagedVideo",
    "Frame",
    "Pathlike",
    "Probe",
    "Stream",
    "Video",
    "check_fps",
    "check_writable",
    "open_frames",
    "probe",
    "read_frames",
    "read_metadata",
    "read_video",
    "write_frames",
    "write_video",
]
