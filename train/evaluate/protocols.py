"""Which clips are made of which prompts before a set of them is scored: the paper's ways, and ours for shapes.

The paper's data sets are not part of this: prompts and videos come from files that the user has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState

from videofactory_core.atomic import write_text
from videofactory_core.video import read_video

from ..curate.sources import Tally, find_sources, text_path
from ..data.moving_shapes import COMBINATIONS, HELD_OUT, Combination, caption, generator_for
from ..data.shape_checker import Verdict, check, of_frames
from ..data.sources import decode_text, read_dataset
from .generate import Job, Settings, jobs_for, make_clips, read_captions, read_prompts
from .refine import Refinement

# In the folder of the clips: the protocol that they follow, and the videos to compare them with.
PROTOCOL, REAL = "protocol.json", "real.jsonl"
# Columns with the name of a video or of a class.
ID_COLUMNS = ("video_id", "videoid", "video")
CLASS_COLUMNS = ("class", "label", "name")


@dataclass(frozen=True)
class Protocol:
    """How a set of clips is made and what it is then scored by."""

    name: str
    # What the user has to have, for people.
    needs: str
    # How many prompts there are (of WebVid, the default), and clips of each.
    prompts: int
    clips: int
    scores: tuple[str, ...]


WEBVID = Protocol(
    "webvid",
    "a list of captioned WebVid videos that were not trained on, and the videos: 1,000 or 5,000 of them are drawn",
    prompts=1000,
    clips=1,
    scores=("fvd", "clipsim"),
)
UCF101 = Protocol(
    "ucf101",
    "a caption for each class of UCF-101, the data set's classInd.txt, and its videos to compare with",
    prompts=101,
    clips=100,
    scores=("fvd",),
)
MSRVTT = Protocol(
    "msrvtt",
    "the captions of the test split of MSR-VTT, of which one is drawn for each video",
    prompts=2990,
    clips=1,
    scores=("clipsim",),
)
SHAPES = Protocol(
    "shapes",
    "nothing: the combinations of words that no training saw, and a checker that looks at pixels",
    prompts=len(HELD_OUT),
    clips=4,
    scores=("shapes",),
)
PROTOCOLS = {protocol.name: protocol for protocol in (WEBVID, UCF101, MSRVTT, SHAPES)}


class Real(NamedTuple):
    """A video, or a part of one, that a generated clip is compared with; seconds, None is its end."""

    path: str
    text: str
    start: float = 0.0
    end: float | None = None


@dataclass(frozen=True)
class Plan:
    """The clips that a protocol asks for, and the real ones to compare them with where it names them."""

    protocol: Protocol
    seed: int
    jobs: Sequence[Job]
    real: Sequence[Real] = ()

    def write(self, out: Path) -> None:
        """Say in the folder of the clips what they are, and in `real.jsonl` name what to compare them with."""
        told = {**asdict(self.protocol), "prompts": len({job.number for job in self.jobs}), "seed": self.seed}
        write_text(out / PROTOCOL, json.dumps(told, indent=1))
        if self.real:
            lines = (json.dumps(real._asdict()) + "\n" for real in self.real)
            write_text(out / REAL, "".join(lines))


def carry_out(
    plan: Plan,
    out: Path,
    settings: Settings,
    refinement: Refinement | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Make the clips of a plan in the folder `out`, as `make_clips`, and say there what they are."""
    make_clips(plan.jobs, out, settings, refinement, log)
    if PartialState().is_main_process:
        plan.write(out)


def webvid(
    videos: Path,
    look_in: Sequence[Path] = (),
    pairs: int = WEBVID.prompts,
    seed: int = 0,
    tell: Callable[[Tally], None] = lambda tally: None,
) -> Plan:
    """`pairs` captioned videos of `videos`, drawn by `seed`; a larger draw begins with the smaller one.

    `videos`, `look_in` and `tell` are those of `find_sources`: WebVid's own list, any other list, or a folder. Raises
    ValueError when there are fewer with a caption.
    """
    found = [row for row in find_sources([videos], look_in, tell=tell) if row["caption"] and row["offset"] is None]
    if not 1 <= pairs <= len(found):
        raise ValueError(
            f"{videos} gives {len(found)} captioned videos, and {pairs} pairs are asked for: name the folders that the"
            " videos are in, unpack shards, or ask for fewer"
        )
    found.sort(key=lambda row: str(row["source_id"]))
    drawn = [found[place] for place in _order(len(found), seed)[:pairs]]
    real = [
        Real(Path(text_path(row["path"])).absolute().as_posix(), row["caption"], row["start"] or 0.0, row["end"])
        for row in drawn
    ]
    return Plan(WEBVID, seed, jobs_for([one.text for one in real], WEBVID.clips, seed), real)


def ucf101(captions: Path, classes: Path, seed: int = 0) -> Plan:
    """100 clips of the caption of each class.

    `classes` is the data set's classInd.txt, `1 ApplyEyeMakeup` in a line. `captions` has one for each in the same
    order (`.txt`), or in any order a column `class` beside the caption. Raises ValueError when some are missing.
    """
    lines = decode_text(classes.read_bytes())[0].splitlines()
    names = list(dict.fromkeys(line.split()[-1] for line in lines if line.strip()))
    if len(names) != UCF101.prompts:
        raise ValueError(f"{classes} names {len(names)} classes and UCF-101 has 101: name its classInd.txt")
    if captions.suffix.lower() == ".txt":
        prompts = read_prompts(captions)
        if len(prompts) != len(names):
            raise ValueError(
                f"{captions} has {len(prompts)} captions and there are 101 classes: write one for each, in the order of"
                f" {classes}"
            )
    else:
        found = {}
        for record, text in read_captions(captions):
            name = next((record.values[key] for key in CLASS_COLUMNS if record.values.get(key)), "")
            found[_plain(str(name))] = text
        missing = [name for name in names if _plain(name) not in found]
        if missing:
            raise ValueError(
                f"{captions} lacks {len(missing)} classes such as {missing[0]}: add them in column 'class'"
            )
        prompts = [found[_plain(name)] for name in names]
    return Plan(UCF101, seed, jobs_for(prompts, UCF101.clips, seed))


def msrvtt(captions: Path, seed: int = 0) -> Plan:
    """A clip of one caption of each of the 2,990 test videos.

    `captions` is the data set's own JSON, of which captions are drawn by `seed`; a table with columns `video_id` and
    `caption`, likewise; or any file of 2,990 prompts. Raises ValueError for another number of videos.
    """
    if captions.suffix.lower() == ".txt":
        prompts = read_prompts(captions)
    else:
        grouped: dict[str, list[str]] = {}
        for name, text in _named_captions(captions):
            grouped.setdefault(name, []).append(text)
        prompts = [
            texts[int(torch.randint(len(texts), (), generator=generator_for(seed, number, stream=2)))]
            for number, (_, texts) in enumerate(sorted(grouped.items(), key=lambda item: _natural(item[0])))
        ]
    if len(prompts) != MSRVTT.prompts:
        raise ValueError(
            f"{captions} has captions of {len(prompts)} videos and MSR-VTT's test split has 2990: name the file of that"
            " split"
        )
    return Plan(MSRVTT, seed, jobs_for(prompts, MSRVTT.clips, seed))


def shapes(seed: int = 0) -> Plan:
    """Four clips of each combination of words that is held out, the same four seeds for all, as `benchmarks demo`."""
    places = [(number, clip) for number in range(len(HELD_OUT)) for clip in range(SHAPES.clips)]
    return Plan(SHAPES, seed, [Job(number, caption(HELD_OUT[number]), seed + clip) for number, clip in places])


def judge_shapes(folder: Path) -> list[tuple[Combination, Verdict]]:
    """What the checker says of every clip of `shapes` in a folder; ValueError for clips of something else."""
    known = {caption(combination): combination for combination in COMBINATIONS}
    verdicts = []
    for clip in read_dataset(folder):
        if clip.caption not in known:
            raise ValueError(f"{folder} has a clip of {clip.caption!r}: name a folder of `evaluate protocol shapes`")
        frames = read_video(clip.path).frames
        verdicts.append((known[clip.caption], check(of_frames(frames))))
    return verdicts


def _named_captions(path: Path) -> Iterator[tuple[str, str]]:
    """Captions with the names of their videos; without a name each stands for a video of its own."""
    try:
        whole = json.loads(decode_text(path.read_bytes())[0]) if path.suffix.lower() == ".json" else None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): get it again") from error
    if isinstance(whole, dict) and "sentences" in whole:
        try:
            splits = {video["video_id"]: video.get("split", "test") for video in whole.get("videos", ())}
            for sentence in whole["sentences"]:
                if splits.get(sentence["video_id"], "test") == "test":
                    yield str(sentence["video_id"]), str(sentence["caption"]).strip()
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not built as MSR-VTT's list is ({error!r}): get it again") from error
        return
    for number, (record, text) in enumerate(read_captions(path)):
        name = next((record.values[key] for key in ID_COLUMNS if record.values.get(key)), number)
        yield str(name), text


def _order(count: int, seed: int) -> list[int]:
    """The numbers below `count`, shuffled."""
    return [int(number) for number in torch.randperm(count, generator=generator_for(seed, 0, stream=2))]


def _plain(name: str) -> str:
    """A class's name however it is spelt: `ApplyEyeMakeup`, `apply eye makeup`."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers inside names in the order of numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
