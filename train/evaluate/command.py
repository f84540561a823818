"""`videofactory evaluate`: what it understands, and what it does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import add_sampling, named

if TYPE_CHECKING:
    from .generate import Settings
    from .refine import Refinement

AGAIN = "; run the same command again to go on"
# Which of a protocol's inputs it has to have.
INPUTS = {"webvid": ("list",), "ucf101": ("list", "classes"), "msrvtt": ("list",), "shapes": ()}


def add(kinds: Any) -> None:
    """Add the command and its jobs to those of `videofactory`."""
    evaluate = kinds.add_parser(
        "evaluate", help="measure generated videos", description="Make many clips, and measure them."
    )
    jobs = evaluate.add_subparsers(required=True, metavar="JOB")
    _add_score(jobs)
    _add_report(jobs)
    _add_generate(jobs)
    _add_protocol(jobs)
    _add_ablation(jobs)


def _add_score(jobs: Any) -> None:
    score = jobs.add_parser("score", help="measure a folder of videos", description="Measure a folder of videos.")
    score.add_argument("generated", type=Path, help="folder of videos, with captions in .txt or metadata.jsonl")
    score.add_argument("--real", type=Path, metavar="DIR", help="real videos to compare with")
    score.add_argument(
        "--second-real", type=Path, metavar="DIR", help="other real videos, for what real ones get (default: split)"
    )
    score.add_argument(
        "--metrics", metavar="LIST", help="names, split at commas (default: warping-error, flicker, and all --weights)"
    )
    score.add_argument(
        "--weights",
        type=named,
        action="append",
        default=[],
        metavar="METRIC=PATH",
        help="local weights of fvd-styleganv, fvd-videogpt, fvd-i3d, fvd-videomae, clipsim, stream, or inception"
        " (for fid and is); may be repeated",
    )
    score.add_argument("--run-code", action="store_true", help="run the program inside StyleGAN-V's TorchScript file")
    score.add_argument("--frames", type=int, default=16, help="frames of each video (default: %(default)s)")
    score.add_argument("--fps", type=float, default=0.0, help="frames a second (default: the file's own)")
    score.add_argument(
        "--start", choices=["head", "centre", "random"], default="head", help="which frames (default: %(default)s)"
    )
    score.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    score.add_argument(
        "--resamples", type=int, default=200, metavar="N", help="for the intervals, 0 for none (default: %(default)s)"
    )
    score.add_argument("--extrapolate", action="store_true", help="follow Frechet distances to endless many videos")
    score.add_argument("--batch", type=int, default=8, metavar="N", help="videos in a network (default: %(default)s)")
    score.add_argument("--workers", type=int, metavar="N", help="videos decoded at once (default: one for each core)")
    score.add_argument("--device", default="auto", help="cpu, cuda (default: the best there is)")
    score.add_argument("--out", type=Path, metavar="DIR", help="where results and report go (default: GENERATED)")
    score.set_defaults(run=run_score)


def _add_report(jobs: Any) -> None:
    report = jobs.add_parser(
        "report",
        help="show results again, or several side by side",
        description="Make the pages of one result again, or print several side by side.",
    )
    report.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="what `evaluate score --out` wrote")
    report.add_argument("--anyway", action="store_true", help="put results beside each other whose settings differ")
    report.set_defaults(run=run_report)


def _add_making(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the clips")
    command.add_argument("--seed", type=int, default=0, help="of the first clip; the others follow (default: 0)")
    add_sampling(command)
    command.add_argument("--device", choices=["auto", "cpu"], default="auto", help="(default: %(default)s)")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="type to compute in")
    command.add_argument(
        "--refine-prompts",
        metavar="SOURCE",
        help="let a language model put prompts into better words: a folder, or a server such as http://localhost:8000/v1",
    )
    command.add_argument("--refine-model", default="", metavar="NAME", help="the server's model")
    command.add_argument("--refine-instruction", metavar="TEXT", help="what it is asked for")


def _add_generate(jobs: Any) -> None:
    generate = jobs.add_parser(
        "generate",
        help="make the clips of many prompts",
        description="Make the clips of many prompts; `accelerate launch -m videofactory_train evaluate generate` uses"
        " many GPUs.",
    )
    generate.add_argument("prompts", type=Path, help=".txt with a prompt a line, or .jsonl, .csv or .parquet")
    generate.add_argument("--clips", type=int, default=1, metavar="N", help="of each prompt (default: 1)")
    _add_making(generate)
    generate.set_defaults(run=run_generate, after_interrupt=AGAIN)


def _add_protocol(jobs: Any) -> None:
    protocol = jobs.add_parser(
        "protocol",
        help="make the clips that a paper's measurement asks for",
        description="Make the clips that a measurement asks for. webvid: LIST are captioned videos, or a list of"
        " them. ucf101: LIST has a caption for each class. msrvtt: LIST has the test captions. shapes needs nothing"
        " and is judged at once.",
    )
    protocol.add_argument("name", choices=list(INPUTS), help="whose way to follow")
    protocol.add_argument("list", type=Path, nargs="?", metavar="LIST", help="the captions, not for shapes")
    protocol.add_argument("--classes", type=Path, metavar="FILE", help="of ucf101: the data set's classInd.txt")
    protocol.add_argument("--look-in", type=Path, nargs="+", default=[], metavar="DIR", help="of webvid: its videos")
    protocol.add_argument("--pairs", type=int, default=1000, metavar="N", help="of webvid (default: %(default)s)")
    _add_making(protocol)
    protocol.set_defaults(run=run_protocol, after_interrupt=AGAIN)


def _add_ablation(jobs: Any) -> None:
    ablation = jobs.add_parser(
        "ablation",
        help="train and measure the rows of the paper's tables",
        description="Train and measure the rows of the paper's Tables 2 and 3 on the data of a recipe.",
    )
    ablation.add_argument("recipe", type=Path, help="recipe (.toml) whose data, schedule and start are used")
    ablation.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes", help="change a setting of it"
    )
    ablation.add_argument("--out", type=Path, metavar="DIR", help="(default: ablation beside the recipe's output)")
    ablation.add_argument(
        "--rows",
        default="",
        metavar="LIST",
        help="of none, temporal-queries, spatial-queries, swapped, global-temporal-queries, global-spatial-queries,"
        " global-swapped, mixture, sparse-causal, window-self-attention (default: all)",
    )
    ablation.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each row (default: %(default)s)")
    ablation.add_argument("--steps", type=int, metavar="N", help="of each run (default: the recipe's)")
    ablation.add_argument("--samples", type=int, metavar="N", help="clips that each run samples; 0 for none")
    ablation.add_argument("--workers", type=int, metavar="N", help="runs side by side (default: as fits)")
    ablation.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="of measuring time and memory (default: %(default)s)"
    )
    ablation.add_argument("--show", action="store_true", help="train nothing: print what is there, and what is missing")
    ablation.set_defaults(run=run_ablation, after_interrupt=AGAIN)


def run_score(options: argparse.Namespace) -> None:
    """Measure, write results and report, and print the table."""
    from videofactory_core.memory import pick_device

    from .metrics import INCEPTION, STEADINESS, open_metrics
    from .report import markdown, write_report
    from .result import write_results
    from .score import Scoring, score
    from .videos import Sampling

    weights = dict(options.weights)
    if options.metrics is not None:
        names = [name.strip() for name in options.metrics.split(",") if name.strip()]
    else:
        names = [*STEADINESS]
        for name in weights:
            names += INCEPTION if name == "inception" else [name]
    metrics = open_metrics(names, weights, pick_device(options.device), run_code=options.run_code)
    out = options.out or options.generated
    scores = score(
        options.generated,
        metrics,
        out,
        real=options.real,
        second_real=options.second_real,
        sampling=Sampling(options.frames, options.fps, options.start, options.seed),
        scoring=Scoring(
            resamples=options.resamples,
            extrapolate=options.extrapolate,
            batch=options.batch,
            workers=options.workers,
        ),
    )
    write_results(scores, out)
    print(markdown(scores))
    print(write_report(scores, out))


def run_report(options: argparse.Namespace) -> None:
    """The pages of one result again, or a table of several."""
    from .report import side_by_side, write_report
    from .result import read_results

    if len(options.folders) == 1:
        (folder,) = options.folders
        print(write_report(read_results(folder), folder))
        return
    print(side_by_side({str(folder): read_results(folder) for folder in options.folders}, options.anyway))


def _settings(options: argparse.Namespace) -> Settings:
    from videofactory_core import checkpoint

    from .generate import Settings

    width, height = options.size or (None, None)
    return Settings(
        checkpoint=options.checkpoint or checkpoint.DEMO,
        loras=tuple(options.lora),
        negative_prompt=options.negative_prompt,
        frames=options.frames,
        width=width,
        height=height,
        fps=options.fps,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        sampler=options.sampler,
        device=options.device,
        dtype=options.dtype,
    )


def _refinement(options: argparse.Namespace) -> Refinement | None:
    from .refine import INSTRUCTION, Refinement

    if options.refine_prompts is None:
        return None
    return Refinement(options.refine_prompts, options.refine_model, options.refine_instruction or INSTRUCTION)


def run_generate(options: argparse.Namespace) -> None:
    """Make the clips that are not there yet."""
    from .generate import jobs_for, make_clips, read_prompts

    jobs = jobs_for(read_prompts(options.prompts), options.clips, options.seed)
    make_clips(jobs, options.out, _settings(options), _refinement(options))


def run_protocol(options: argparse.Namespace) -> None:
    """Make a protocol's clips; those of shapes are judged too."""
    from accelerate import PartialState

    from ..data.shape_checker import summarise
    from . import protocols

    name, given = options.name, {"list": options.list, "classes": options.classes}
    for key, value in given.items():
        if (value is None) == (key in INPUTS[name]):
            need = f"needs {protocols.PROTOCOLS[name].needs}"
            raise ValueError(f"{name} {need}: {'name' if value is None else 'leave out'} {key.upper()}")
    if name == "webvid":
        plan = protocols.webvid(options.list, options.look_in, options.pairs, options.seed)
    elif name == "ucf101":
        plan = protocols.ucf101(options.list, options.classes, options.seed)
    elif name == "msrvtt":
        plan = protocols.msrvtt(options.list, options.seed)
    else:
        plan = protocols.shapes(options.seed)
    protocols.carry_out(plan, options.out, _settings(options), _refinement(options))
    if name == "shapes" and PartialState().is_main_process:
        for key, share in summarise(protocols.judge_shapes(options.out)).items():
            print(f"{key:<12}{share:8.1%}")


def run_ablation(options: argparse.Namespace) -> None:
    """Make what is missing of the paper's rows, and print the tables."""
    from .ablation import ablation

    ablation(
        options.recipe,
        changes=options.changes,
        out=options.out,
        rows=[name.strip() for name in options.rows.split(",") if name.strip()],
        seeds=options.seeds,
        steps=options.steps,
        samples=options.samples,
        workers=options.workers,
        train=not options.show,
        rounds=options.rounds,
    )
