"""Graphs in the host's API form."""

from __future__ import annotations

import copy
from typing import Any

Graph = dict[str, dict[str, Any]]
DEMO = "demo [bundled]"
PROMPT = "a red circle moving right on a black background"
SAMPLING = {
    "seed": 0,
    "steps": 25,
    "cfg": 2.0,
    "sampler_name": "euler",
    "scheduler": "simple",
    "denoise": 1.0,
    "motion_scale": 1.0,
    "swap_strength": 1.0,
    "free_noise": False,
}


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def clip_latent(prompt: str = PROMPT, negative: str = "", frames: int = 16, clips: int = 1, **sampling: Any) -> Graph:
    """Load, write, sample; the latent is output 0 of "sample"."""
    return {
        "load": node("VideoFactoryLoader", checkpoint=DEMO),
        "write": node("VideoFactoryTextEncode", clip=["load", 1], prompt=prompt, negative_prompt=negative, frames=0),
        "empty": node("VideoFactoryEmptyLatent", width=128, height=72, frames=frames, clips=clips),
        "sample": node(
            "VideoFactorySampler",
            **{
                "model": ["load", 0],
                "positive": ["write", 0],
                "negative": ["write", 1],
                "latent": ["empty", 0],
                **SAMPLING,
                **sampling,
            },
        ),
    }


def native(graph: Graph) -> Graph:
    """The same graph with the host's KSampler in the place of ours."""
    graph = copy.deepcopy(graph)
    inputs = graph["sample"]["inputs"]
    for name in ("motion_scale", "swap_strength", "free_noise"):
        del inputs[name]
    inputs["latent_image"] = inputs.pop("latent")
    return {**graph, "sample": node("KSampler", **inputs)}


def saved(graph: Graph, *outputs: str) -> Graph:
    """The graph with the latents of these nodes saved."""
    savers = {f"save {name}": node("SaveLatent", samples=[name, 0], filename_prefix=f"{name}") for name in outputs}
    return {**graph, **savers}


def filmed(graph: Graph, fps: float = 8.0) -> Graph:
    """The graph with "sample" decoded and saved as a video."""
    return {
        **graph,
        "decode": node("VideoFactoryDecode", latent=["sample", 0], vae=["load", 2], frames_per_chunk=0),
        "video": node("CreateVideo", images=["decode", 0], fps=fps),
        "save": node("SaveVideo", video=["video", 0], filename_prefix="clip", format="mp4", codec="h264"),
    }
