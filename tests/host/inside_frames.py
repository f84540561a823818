"""Given frames and long clips inside the host's own Python: `python inside_frames.py HOST DEMO`.

Prints one line of JSON. Nothing here is collected by pytest; `test_frames.py` runs it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from graphs import PROMPT, SAMPLING
from inside import error, start

# The host and the core agree on the levels of so many steps.
STEPS, CFG = 4, 2.0


def module(name: str) -> Any:
    return importlib.import_module(f"videofactory_pack.{name}")


class Bench:
    """The demo as a model that knows given frames and one that does not, and latents for it."""

    def __init__(self, host: Any, demo: Path) -> None:
        import torch

        self.host = host
        self.core = host.checkpoint.load(demo)
        self.folder = tempfile.TemporaryDirectory()
        self.models = {kind: self.load(kind) for kind in ("told", "untold", "epsilon")}
        _, self.clip, self.vae = host.load(host.checkpoint.check(demo)[0])
        encoded = [self.clip.encode_from_tokens(self.clip.tokenize(text)) for text in (PROMPT, "")]
        self.contexts = torch.cat(encoded)
        self.conditions = [[[context, {}]] for context in encoded]
        generator = torch.Generator().manual_seed(0)
        self.source = torch.randn(48, 4, 9, 16, generator=generator) * 4

    def config(self, kind: str) -> Any:
        config = self.core.config
        if kind == "epsilon":
            diffusion = dataclasses.replace(config.diffusion, prediction_type="epsilon", zero_terminal_snr=False)
            config = dataclasses.replace(config, diffusion=diffusion)
        return dataclasses.replace(config, given_frames=kind != "untold")

    def load(self, kind: str) -> Any:
        """The host's MODEL of the demo's weights, with what `kind` changes."""
        path = Path(self.folder.name) / f"{kind}.safetensors"
        self.host.checkpoint.save(path, dataclasses.replace(self.core, config=self.config(kind)), self.core.metadata)
        return self.host.load_model(self.host.checkpoint.check(path)[0])

    def noise(self, num_frames: int, seed: int = 0) -> Any:
        """What the host draws."""
        import torch

        return torch.randn(num_frames, 4, 9, 16, generator=torch.Generator().manual_seed(seed))

    def latent(self, num_frames: int, given: Any = (), clips: int = 1) -> dict[str, Any]:
        """A LATENT with these frames of the source given, and nothing in the others."""
        import torch

        samples = torch.zeros(clips * num_frames, 4, 9, 16)
        mask = torch.ones(clips * num_frames, 1, 72, 128)
        for place in given:
            samples[place::num_frames] = self.source[place]
            mask[place::num_frames] = 0
        latent = {"samples": samples, self.host.FRAMES: num_frames}
        return {**latent, "noise_mask": mask} if given else latent

    def sample(self, latent: Any, kind: str = "told", node: str = "Sampler", **changes: Any) -> Any:
        """What VideoFactory Sampler, or Long Sampler, makes of a LATENT."""
        settings = {
            "model": self.models[kind],
            "positive": self.conditions[0],
            "negative": self.conditions[1],
            **SAMPLING,
            "steps": STEPS,
            "cfg": CFG,
        }
        if node == "LongSampler":
            settings |= {"chunk": 16, "overlap": 4, "anchors": 0, "match_colours": False}
        room = module("nodes.long" if node == "LongSampler" else "nodes.sample")
        return getattr(room, node).execute(latent=latent, **{**settings, **changes}).args[0]["samples"]

    def long(self, latent: Any, kind: str = "told", **changes: Any) -> Any:
        return self.sample(latent, kind, "LongSampler", **changes)

    def expected(self, latent: Any, kind: str, clean: bool, cfg: float = CFG, frame_scale: float = 1.0) -> Any:
        """What the core makes of the same noise and the same given frames."""

        config = self.config(kind)
        scale = config.autoencoder.scale_factor
        given = latent["noise_mask"].flatten(1).amax(1) == 0

        known = module("videofactory_core.sampling").Known(latent["samples"].movedim(0, 1)[None] * scale, given, clean)
        made = module("videofactory_core.pipeline").denoise(
            dataclasses.replace(self.core, config=config),
            self.contexts if cfg > 1 else self.contexts[:1],
            self.noise(len(given)).movedim(0, 1)[None],
            sampler="euler",
            steps=STEPS,
            guidance_scale=cfg,
            known=known,
            frame_guidance_scale=frame_scale,
        )
        return made[0].movedim(1, 0) / scale


def as_in_the_core(bench: Bench) -> dict[str, Any]:
    """The graph against the core, and how far off the other way of showing given frames would be."""
    import torch

    latent = bench.latent(16, [0, 1, 15])
    five = {"samples": latent["samples"].movedim(0, 1)[None], "noise_mask": latent["noise_mask"]}
    found: dict[str, Any] = {}
    for kind in bench.models:
        right, wrong = (bench.expected(latent, kind, clean) for clean in (kind != "untold", kind == "untold"))
        made = bench.sample(latent, kind)
        native = hosts_own(bench, latent, kind)
        found[kind] = {
            "error": error(made, right),
            "the other way": error(wrong, right),
            "native": error(native, made),
            "given": all(torch.equal(made[place], latent["samples"][place]) for place in (0, 1, 15)),
        }
    noise = bench.noise(16)
    found["five"] = error(
        hosts_own(bench, five, "told", noise.movedim(0, 1)[None])[0].movedim(1, 0),
        hosts_own(bench, latent, "told", noise),
    )
    found["five, given"] = torch.equal(bench.sample(five)[0, :, 15], latent["samples"][15])
    return found


def guided_frames(bench: Bench) -> dict[str, Any]:
    """Guidance over given frames in the graph, with and without guidance over the text, against the core's."""
    import torch

    latent = bench.latent(16, [0, 15])
    follow = module("nodes.condition").FrameGuidance.execute
    guiding = {kind: follow(bench.models[kind], 2.5).args[0] for kind in ("told", "epsilon")}
    found: dict[str, Any] = {}
    for kind, cfg in (("told", 2.0), ("told", 1.0), ("epsilon", 2.0)):
        guided = guiding[kind]
        made = bench.sample(latent, kind, model=guided, cfg=cfg)
        found[f"{kind}, {cfg}"] = {
            "error": error(made, bench.expected(latent, kind, True, cfg, 2.5)),
            "without": error(made, bench.expected(latent, kind, True, cfg)),
            "native": error(hosts_own(bench, latent, kind, model=guided, cfg=cfg), made),
            "nothing given": torch.equal(
                bench.sample(bench.latent(16), model=guided, cfg=cfg), bench.sample(bench.latent(16), kind, cfg=cfg)
            ),
        }
    found["one"] = follow(bench.models["told"], 1.0).args[0] is bench.models["told"]
    windows = module("nodes.sample").ContextWindows.execute
    halves = bench.latent(32, [3, 20])
    together = bench.sample(halves, model=windows(guiding["told"], 16, 0, False).args[0])
    found["windows"] = error(together, apart(bench, halves, guiding["told"]))
    return found


def hosts_own(bench: Bench, latent: Any, kind: str, noise: Any = None, model: Any = None, cfg: float = CFG) -> Any:
    """What KSampler makes of a LATENT."""
    import comfy.sample

    return comfy.sample.sample(
        model or bench.models[kind],
        bench.noise(len(latent["samples"])) if noise is None else noise,
        STEPS,
        cfg,
        "euler",
        "simple",
        *bench.conditions,
        latent["samples"],
        noise_mask=latent["noise_mask"],
        disable_pbar=True,
        seed=0,
    )


def apart(bench: Bench, latent: Any, model: Any = None) -> Any:
    """What KSampler makes of the two halves of a LATENT of 32 frames, each alone with its part of the noise."""
    import torch

    noise = bench.noise(32)
    halves = []
    for half in (slice(16), slice(16, 32)):
        part = {"samples": latent["samples"][half], "noise_mask": latent["noise_mask"][half]}
        halves.append(hosts_own(bench, part, "told", noise[half], model=model))
    return torch.cat(halves)


def masks_inside_frames(bench: Bench) -> dict[str, Any]:
    """A mask over a part of frames means the same whether or not the model knows given frames."""
    import torch

    latent = bench.latent(8, [2])
    latent["samples"][5] = bench.source[5]
    partly = {**latent, "noise_mask": latent["noise_mask"].clone()}
    partly["noise_mask"][2] = 1
    partly["noise_mask"][5, :, :, :64] = 0
    both = {**latent, "noise_mask": latent["noise_mask"].clone()}
    both["noise_mask"][5, :, :, :64] = 0
    made = bench.sample(both)
    return {
        "partly": error(bench.sample(partly), bench.sample(partly, "untold")),
        "beside it": error(made, bench.sample(both, "untold")),
        "given": torch.equal(made[2], bench.source[2]),
        "kept": error(made[5, :, :, :8], bench.source[5, :, :, :8]),
        "not kept": error(made[5, :, :, 8:], bench.source[5, :, :, 8:]),
    }


def windows(bench: Bench) -> dict[str, Any]:
    """Context windows without overlap are clips of their own, with their own given frames."""
    import comfy.context_windows

    latent = bench.latent(32, [3, 20])
    patched = module("nodes.sample").ContextWindows.execute(bench.models["told"], 16, 0, False).args[0]
    together = bench.sample(latent, model=patched)
    halves = apart(bench, latent)

    theirs = bench.models["told"].clone()
    way = comfy.context_windows
    theirs.model_options["context_handler"] = way.IndexListContextHandler(
        context_schedule=way.get_matching_context_schedule(way.ContextSchedules.STATIC_STANDARD),
        fuse_method=way.get_matching_fuse_method(way.ContextFuseMethods.PYRAMID),
        context_length=16,
        context_overlap=0,
        dim=2,
    )
    five = {"samples": latent["samples"].movedim(0, 1)[None], "noise_mask": latent["noise_mask"]}
    try:
        noise = bench.noise(32).movedim(0, 1)[None]
        made = hosts_own(bench, five, "told", noise, model=theirs)[0].movedim(1, 0)
        of_the_host: float | str = error(made, halves)
    except ValueError as refused:
        of_the_host = str(refused)
    return {
        "of the host": of_the_host,
        "error": error(together, halves),
        "without": error(bench.sample(bench.latent(32), model=patched), halves),
    }


def chunked(bench: Bench) -> dict[str, Any]:
    """Long clips: one chunk, chunks by hand, and what goes on across them."""
    import torch

    found: dict[str, Any] = {}
    for name, latent in {"plain": bench.latent(16), "given": bench.latent(16, [0, 9])}.items():
        for sampler in ("euler", "euler_ancestral"):
            one = bench.long(latent, sampler_name=sampler)
            found[f"one chunk, {name}, {sampler}"] = torch.equal(one, bench.sample(latent, sampler_name=sampler))
    free = bench.latent(24, [0])
    found["one chunk, free noise"] = torch.equal(
        bench.long(free, chunk=24, free_noise=True), bench.sample(free, free_noise=True)
    )
    found["untold"] = torch.equal(
        bench.long(bench.latent(16, [4]), "untold"), bench.sample(bench.latent(16, [4]), "untold")
    )
    found["all given"] = torch.equal(bench.long(bench.latent(16, range(16))), bench.source[:16])

    length = bench.core.config.chunk
    found["usual"] = torch.equal(
        bench.long(bench.latent(40), chunk=0, overlap=0),
        bench.long(bench.latent(40), chunk=length, overlap=length // 4),
    )

    # By hand: 0 to 16, then 12 to 28 with 4 frames of it.
    long = bench.long(bench.latent(28, [0, 20]))
    first = bench.latent(16, [0])
    hand = hosts_own(bench, first, "told", bench.noise(28)[:16])
    second = bench.latent(28, [0, 20])
    second["samples"][:16], second["noise_mask"][:16] = hand, 0
    second = {key: second[key][12:] for key in ("samples", "noise_mask")}
    hand = torch.cat([hand[:16], hosts_own(bench, second, "told", bench.noise(28)[12:])[4:]])
    found["by hand"] = error(long, hand)
    found["the plan"] = [(c.start, c.end) for c in module("videofactory_core.long").chunks(28, 16, 4, {0, 20})]
    found["given"] = [torch.equal(long[place], bench.source[place]) for place in (0, 20)]
    alone = bench.noise(28)[12:]
    found["the chunk before matters"] = error(long[16:], hosts_own(bench, bench.latent(16, [8]), "told", alone)[4:])

    backward = bench.long(bench.latent(28, [26, 27]))
    found["backward"] = torch.equal(backward[26:], bench.source[26:28]) and bool(backward.isfinite().all())
    two = bench.long(bench.latent(28, [0], clips=2))
    found["two clips"] = error(two[:28], bench.long(bench.latent(28, [0])))
    found["and the second is another"] = error(two[28:], two[:28])
    five = bench.latent(28, [0])
    five["samples"] = five["samples"].movedim(0, 1)[None]
    made = bench.long(five)
    found["five"] = list(made.shape)
    found["five, given"] = torch.equal(made[:, :, 0], bench.source[None, 0])

    plain = bench.long(bench.latent(28))
    anchored = bench.long(bench.latent(28), anchors=2)
    found["anchors"] = [error(anchored[:16], plain[:16]), error(anchored[16:], plain[16:])]
    matched = bench.long(bench.latent(28), match_colours=True)
    found["colours"] = [
        error(matched[:16], plain[:16]),
        error(matched[16:].mean((0, 2, 3)), plain[:16].mean((0, 2, 3))),
        error(plain[16:].mean((0, 2, 3)), plain[:16].mean((0, 2, 3))),
    ]
    return found


def schedules(bench: Bench) -> dict[str, Any]:
    """Prompts that change over the frames, in the chunks that hold these frames."""
    import torch

    encode = module("nodes.write").encode
    blue = PROMPT.replace("red", "blue")
    late = encode(bench.clip, f'"0": "{PROMPT}", "20": "{PROMPT}", "21": "{blue}"', {})
    whole, plain = bench.latent(28), bench.long(bench.latent(28))
    changed = bench.long(whole, positive=late)
    one = bench.latent(16)
    early = encode(bench.clip, f'"0": "{PROMPT}", "8": "{blue}"', {})
    # Features of every frame, as other packs give them.
    spread = early[0][1][bench.host.SCHEDULE].spread(28)
    rows = bench.long(whole, positive=[[spread, {}]])
    features = torch.stack([torch.zeros(1, 2), torch.ones(1, 2)])
    schedule = module("videofactory_core.prompts").PromptSchedule((0, 10), features)
    part = schedule.part([0, 4, 5, 12]).spread(4)
    return {
        "before it changes": error(changed[:16], plain[:16]),
        "where it changes": error(changed[21:], plain[21:]),
        "one chunk": torch.equal(bench.long(one, positive=early), bench.sample(one, positive=early)),
        "rows": error(rows, bench.long(whole, positive=early)),
        "part": part[:, 0, 0].tolist(),
    }


def progress(bench: Bench) -> dict[str, Any]:
    """One bar over all chunks, and a stop inside the second."""
    import comfy.model_management
    import comfy.utils

    seen: list[list[int]] = []

    def hook(value: int, total: int, preview: Any, **_: Any) -> None:
        seen.append([value, total])
        if len(seen) == stop:
            comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    stop = -1
    comfy.utils.set_progress_bar_global_hook(hook)
    bench.long(bench.latent(28))
    whole, seen[:] = [*seen], []
    stop = STEPS + 1
    try:
        bench.long(bench.latent(28))
        ended = "whole"
    except comfy.model_management.InterruptProcessingException:
        ended = "interrupted"
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)
    return {"whole": whole, "ended": ended, "steps": len(seen)}


def refusals(bench: Bench) -> dict[str, str]:
    """What the samplers and the nodes of given frames say of what cannot be."""
    import torch

    node = module("nodes.condition")
    clip = torch.rand(3, 16, 24, 3)
    vae = bench.vae

    def said(run: Any) -> str:
        try:
            run()
        except ValueError as refused:
            return str(refused)
        return "nothing"

    def join(images: Any) -> Any:
        parts = node.ExtendVideo.execute(vae, clip, 2, "forward", 2).args[1]
        return node.Join.execute(images, parts)

    class OtherVae:
        downscale_ratio = (lambda frames: frames, 8, 8)

    return {
        "overlap": said(lambda: bench.long(bench.latent(20), chunk=8, overlap=8)),
        "positions": said(lambda: bench.long(bench.latent(64), chunk=30, anchors=4)),
        "clips": said(lambda: bench.long({**bench.latent(20), bench.host.FRAMES: 16})),
        "short": said(lambda: node.ExtendVideo.execute(vae, clip, 4, "forward", 4)),
        "short second": said(lambda: node.Transition.execute(vae, torch.rand(6, 16, 24, 3), clip, 4, 4, "crop")),
        "one frame": said(lambda: node.Inbetween.execute(vae, clip[:1], 2)),
        "size": said(lambda: node.ImageToVideo.execute(vae, clip, 20, 16, 4, "crop")),
        "tiny": said(lambda: node.ExtendVideo.execute(vae, torch.rand(4, 4, 24, 3), 4, "forward", 2)),
        "other vae": said(lambda: node.ImageToVideo.execute(OtherVae(), clip, 24, 16, 4, "crop")),
        "join length": said(lambda: join(torch.rand(5, 16, 24, 3))),
        "join size": said(lambda: join(torch.rand(4, 32, 48, 3))),
        "frame guidance": said(lambda: node.FrameGuidance.execute(bench.models["untold"], 2.0)),
    }


def conditions(bench: Bench) -> dict[str, Any]:
    """The nodes that make latents with given frames: what is given, where, and what is said."""
    import torch

    node, vae, host = module("nodes.condition"), bench.vae, bench.host
    encode = module("nodes.decode").encode
    clip = torch.rand(6, 16, 24, 3, generator=torch.Generator().manual_seed(1))
    other = torch.rand(5, 16, 24, 3, generator=torch.Generator().manual_seed(2))
    found: dict[str, Any] = {}

    def seen(name: str, latent: Any, frames: Any, said: str = "") -> None:
        samples, mask = latent["samples"], latent["noise_mask"]
        given = [place for place in range(len(samples)) if not mask[place].any()]
        free = [place for place in range(len(samples)) if (mask[place] == 1).all()]
        found[name] = {
            "shape": list(samples.shape),
            "frames": latent[host.FRAMES],
            "given": given,
            "all": sorted([*given, *free]) == [*range(len(samples))],
            "empty": not samples[free].any(),
            "error": error(samples[given], encode(frames, vae)),
            "said": said,
        }

    latent, said = node.ImageToVideo.execute(vae, clip[:1], 24, 16, 5, "crop").args
    seen("image", latent, clip[:1], said)
    for kind in ("told", "untold"):
        _, found[f"info, {kind}"] = node.ImageToVideo.execute(
            vae, clip[:1], 24, 16, 40, "crop", bench.models[kind]
        ).args
    clear = torch.cat([torch.rand(2, 20, 20, 3), torch.full((2, 20, 20, 1), 0.5)], dim=3)
    _, found["info, fitted"] = node.ImageToVideo.execute(vae, clear, 24, 16, 5, "pad").args
    latent, said = node.FirstLastFrame.execute(vae, clip[:1], other[:1], 24, 16, 6, "crop").args
    seen("first and last", latent, torch.cat([clip[:1], other[:1]]), said)
    latent, forward, said = node.ExtendVideo.execute(vae, clip, 3, "forward", 2).args
    seen("forward", latent, clip[4:], said)
    latent, backward, said = node.ExtendVideo.execute(vae, clip, 3, "backward", 2).args
    seen("backward", latent, clip[:2], said)
    latent, said, between = node.Inbetween.execute(vae, clip, 3).args
    seen("in-between", latent, clip, said)
    latent, across, said = node.Transition.execute(vae, clip, other, 3, 2, "crop").args
    seen("transition", latent, torch.cat([clip[4:], other[:2]]), said)
    wide = torch.rand(5, 20, 48, 3)
    *_, found["info, second clip"] = node.Transition.execute(vae, clip, wide, 3, 2, "stretch").args
    odd = torch.rand(6, 18, 25, 3, generator=torch.Generator().manual_seed(3))
    latent, cut, said = node.ExtendVideo.execute(vae, odd, 3, "forward", 2).args
    seen("cut", latent, odd[4:, 1:17, :24], said)
    found["cut, the rest"] = torch.equal(cut.before, odd[:4, 1:17, :24])

    def joined(parts: Any, *pieces: Any) -> bool:
        whole = node.Join.execute(new, parts).args[0]
        return torch.equal(whole, torch.cat(pieces))

    new = torch.rand(5, 16, 24, 3)
    found["joined"] = [joined(forward, clip, new[2:]), joined(backward, new[:3], clip)]
    new = torch.rand(7, 16, 24, 3)
    found["joined"].append(joined(across, clip, new[2:5], other))
    new = torch.rand(16, 16, 24, 3)
    among = [new[1:3], clip[1:2], new[4:6], clip[2:3], new[7:9], clip[3:4], new[10:12], clip[4:5], new[13:15], clip[5:]]
    found["joined"].append(joined(between, clip[:1], *among))
    return found


CHECKS = (
    as_in_the_core,
    guided_frames,
    masks_inside_frames,
    windows,
    chunked,
    schedules,
    progress,
    refusals,
    conditions,
)

if __name__ == "__main__":
    folder, demo = sys.argv[1:3]
    pack = start(folder)
    import torch

    with torch.inference_mode():
        bench = Bench(pack, Path(demo))
        print("\n" + json.dumps({check.__name__: check(bench) for check in CHECKS}))
