"""Checks that need the host's own Python objects: `python inside.py HOST CHECK`, run by the host's interpreter.

Prints one line of JSON. Nothing here is collected by pytest; `test_inside.py` runs it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

PACK = Path(__file__).parent.parent.parent


def start(host: str) -> types.ModuleType:
    """The host's modules made importable, and the pack imported as the host does; returns its `nodes.host`."""
    sys.path.insert(0, host)
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes  # noqa: F401  the host's, before the pack's

    spec = importlib.util.spec_from_file_location(
        "videofactory_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    assert spec is not None
    assert spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules["videofactory_pack"] = pack
    spec.loader.exec_module(pack)
    return importlib.import_module("videofactory_pack.nodes.host")


def inputs(frames: int = 4, channels: int = 48) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(2 * frames, 4, 9, 16, generator=generator),
        "t": torch.full((2 * frames,), 5.0),
        "c_crossattn": torch.randn(2, 77, channels, generator=generator).repeat_interleave(frames, 0),
        "num_video_frames": frames,
    }


def error(a: Any, b: Any) -> float:
    return float((a - b).norm() / b.norm())


def partial_load(host: Any, demo: Path) -> dict[str, Any]:
    """The network with most weights waiting elsewhere, patches and all, against the whole one."""
    import torch

    model, *_ = host.load(host.checkpoint.check(demo)[0])
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    shape = model.model.state_dict()[key].shape
    patch = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    plain = model.model.apply_model(**inputs())

    whole = model.clone()
    whole.add_patches({key: ("diff", (patch,))}, 0.1)
    whole.patch_model(device_to=torch.device("cpu"))
    expected = whole.model.apply_model(**inputs())
    whole.unpatch_model(torch.device("cpu"))

    part = model.clone()
    part.add_patches({key: ("diff", (patch,))}, 0.1)
    part.load(torch.device("cpu"), lowvram_model_memory=1_000_000)
    waiting = sum(getattr(module, "comfy_cast_weights", False) for module in part.model.modules())
    found = part.model.apply_model(**inputs())
    part.unpatch_model(torch.device("cpu"))
    return {
        "waiting": waiting,
        "changed": error(expected, plain),
        "error": error(found, expected),
        "restored": error(model.model.apply_model(**inputs()), plain),
    }


def weight_types(host: Any, demo: Path) -> dict[str, Any]:
    """Weights stored in fewer bits, computed in float32, against float32 throughout."""
    import torch

    file, _ = host.checkpoint.check(demo)

    def build(dtype: torch.dtype) -> Any:
        config = host.HostConfig(file.config, file.metadata)
        config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
        model = config.get_model({}, device=torch.device("cpu"))
        model.load_model_weights(file.read("unet"), "")
        return model.apply_model(**inputs())

    expected = build(torch.float32)
    return {
        str(dtype).removeprefix("torch."): error(build(dtype), expected)
        for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    }


def attention_patches(host: Any, demo: Path) -> dict[str, Any]:
    """Patches that hand everything on unchanged, and what they saw; then one that does not."""
    model, *_ = host.load(host.checkpoint.check(demo)[0])
    plain = model.model.apply_model(**inputs())
    seen: dict[str, Any] = {}

    def note(name: str, told: dict[str, Any], rows: int) -> None:
        entry = seen.setdefault(name, {"places": [], "rows": set(), "keys": set(told)})
        entry["places"].append([*told["block"], told["block_index"]])
        entry["rows"].add(rows)

    def before(name: str) -> Any:
        def patch(q: Any, k: Any, v: Any, told: dict[str, Any]) -> Any:
            note(name, told, q.shape[0])
            return q, k, v

        return patch

    def after(name: str) -> Any:
        def patch(out: Any, told: dict[str, Any]) -> Any:
            note(name, told, out.shape[0])
            return out

        return patch

    patched = model.clone()
    patched.set_model_attn1_patch(before("attn1"))
    patched.set_model_attn2_patch(before("attn2"))
    patched.set_model_attn1_output_patch(after("attn1_output"))
    patched.set_model_attn2_output_patch(after("attn2_output"))
    options = patched.model_options["transformer_options"]
    found = patched.model.apply_model(**inputs(), transformer_options=options)

    replaced = model.clone()
    replaced.set_model_attn2_replace(lambda q, k, v, told: q * 0, "input", 1)
    options = replaced.model_options["transformer_options"]
    changed = replaced.model.apply_model(**inputs(), transformer_options=options)
    return {
        "error": error(found, plain),
        "changed": error(changed, plain),
        "rows": {name: sorted(entry["rows"]) for name, entry in seen.items()},
        "places": seen["attn2"]["places"],
        "keys": sorted(seen["attn1"]["keys"]),
    }


def text_encoder(host: Any, demo: Path) -> dict[str, Any]:
    """The host's text encoder and tokenizer against the core's."""
    _, clip, _ = host.load(host.checkpoint.check(demo)[0])
    core = host.checkpoint.load(demo)
    prompts = ["", "a red circle moving right on a black background", "Two  Words, it's 42!", "word " * 100]
    errors = []
    for prompt in prompts:
        found = clip.encode_from_tokens(clip.tokenize(prompt), return_dict=True)["cond"]
        errors.append(error(found, core.text_encoder.encode([prompt])))
    return {"errors": errors}


def controlnet(host: Any, demo: Path) -> dict[str, Any]:
    """A ControlNet of Stable Diffusion's kind with random weights, on a small model that it fits."""
    import dataclasses
    import tempfile

    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops
    import comfy.sample
    import torch

    core = importlib.import_module("videofactory_pack.videofactory_core.config")
    config = dataclasses.replace(
        core.PRESETS["demo"],
        unet=dataclasses.replace(
            core.PRESETS["demo"].unet,
            model_channels=64,
            channel_mult=(1, 2),
            transformer_depth=(1, 1),
            head_dim=64,
            norm_groups=32,
        ),
    )
    torch.manual_seed(0)

    def randomise(module: torch.nn.Module) -> None:
        for parameter in module.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.data.copy_(torch.randn(parameter.shape) * scale)

    model = host.checkpoint.build(config)
    randomise(model.unet)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        host.checkpoint.save(path, model, model.metadata)
        patcher, *_ = host.load(host.checkpoint.check(path)[0])

    network = comfy.cldm.cldm.ControlNet(
        image_size=32,
        in_channels=4,
        model_channels=64,
        hint_channels=3,
        num_res_blocks=[1, 1],
        channel_mult=(1, 2),
        num_head_channels=64,
        use_spatial_transformer=True,
        transformer_depth=[1, 1],
        transformer_depth_middle=1,
        context_dim=48,
        use_linear_in_transformer=True,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    randomise(network)
    weights = {f"control_model.{key}": value for key, value in network.state_dict().items()}
    control = comfy.controlnet.load_controlnet_state_dict(weights)
    text = torch.randn(1, 77, 48)
    noise = torch.randn(4, 4, 8, 8)

    def sample(strength: float | None, hints: torch.Tensor, model: Any = patcher, frames: slice = slice(4)) -> Any:
        told = {}
        if strength is not None:
            hinted = control.copy().set_cond_hint(hints, strength, (0.0, 1.0))
            told = {"control": hinted, "control_apply_to_uncond": True}
        conditioning = [[text, told]]
        some = noise[frames]
        empty = torch.zeros_like(some)
        return comfy.sample.sample(
            model, some, 2, 2.0, "euler", "simple", conditioning, conditioning, empty, disable_pbar=True, seed=0
        )

    def in_chunks(hints: torch.Tensor) -> torch.Tensor:
        told = {"control": control.copy().set_cond_hint(hints, 1.0, (0.0, 1.0)), "control_apply_to_uncond": True}
        conditioning = [[text, told]]
        latent = {"samples": torch.zeros(4, 4, 8, 8)}
        node = importlib.import_module("videofactory_pack.nodes.long").LongSampler
        settings = (0, 2, 2.0, "euler", "simple", 1.0, 1.0, 1.0, False)
        made = node.execute(patcher, conditioning, conditioning, latent, *settings, 3, 1, 0, False)
        return made.args[0]["samples"]

    hints = torch.rand(4, 3, 64, 64)
    plain, off, on = sample(None, hints), sample(0.0, hints), sample(1.0, hints)
    windows = importlib.import_module("videofactory_pack.nodes.sample").ContextWindows
    windowed = windows.execute(patcher, length=2, overlap=0, closed_loop=False).args[0]
    last = torch.cat([hints[:3], 1 - hints[3:]])
    halves = [sample(1.0, hints[half], frames=half) for half in (slice(2), slice(2, 4))]
    return {
        "off": error(off, plain),
        "on": error(on, plain),
        "one hint": error(sample(1.0, hints[:1]), sample(1.0, hints[:1].expand(4, -1, -1, -1))),
        "other hints": error(sample(1.0, hints.flip(0)), on),
        "in windows": error(sample(1.0, hints, windowed), torch.cat(halves)),
        "by halves": error(torch.cat(halves), on),
        "last hint, first chunk": error(in_chunks(last)[:3], in_chunks(hints)[:3]),
        "last hint, second chunk": error(in_chunks(last)[3:], in_chunks(hints)[3:]),
    }


def upscale_memory(host: Any, demo: Path) -> dict[str, Any]:
    """How much the peak of memory rises from 8 frames to 64, beside the frames that come out, in MiB."""
    import torch
    from spandrel import ModelLoader

    sys.path.append(str(PACK / "tests"))
    from peak import peak_bytes

    upscaler = importlib.import_module("videofactory_pack.videofactory_core.upscaler")
    node = importlib.import_module("videofactory_pack.nodes.upscale").Upscale
    weights = upscaler.Upscaler(upscaler.UpscalerConfig(groups=1, blocks=2, features=16)).state_dict()
    network = ModelLoader().load_from_state_dict(weights).eval()
    frames = torch.rand(64, 72, 128, 3)

    def peak(count: int) -> float:
        (large,) = node.execute(network, frames[:count], tile=512).args
        assert large.shape == (count, 288, 512, 3)
        return peak_bytes() / 2**20

    short = peak(8)
    return {"rise": peak(64) - short, "output": (64 - 8) * 288 * 512 * 3 * 4 / 2**20, "short": short}


def upscalers_agree(host: Any, demo: Path) -> dict[str, Any]:
    """Networks of our loader and of the host's, in our node and in the host's, on one file of ours."""
    import tempfile

    import folder_paths
    import torch
    from comfy_extras import nodes_upscale_model

    def module(name: str) -> Any:
        return importlib.import_module(f"videofactory_pack.{name}")

    ours, hosts = module("nodes.upscale").Upscale, nodes_upscale_model.ImageUpscaleWithModel
    frames = torch.rand(2, 36, 64, 3, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {"errors": {}, "changed inputs": []}
    upscaler = module("videofactory_core.upscaler")
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.add_model_folder_path("upscale_models", folder)
        # The library's network of a file that shifts the mean would change its input.
        torch.manual_seed(0)
        shifted = upscaler.Upscaler(upscaler.UpscalerConfig(1, 1, 16, 4, mean_shift=True))
        upscaler.save(f"{folder}/shifted.safetensors", shifted, "shifted", "MIT", "a test")
        upscaler.save(f"{folder}/demo.safetensors", upscaler.load(upscaler.BUNDLED), "demo", "MIT", "a test")
        for name in ("demo", "shifted"):
            load = module("nodes.load").LoadUpscaler
            (mine,) = load.execute(f"{name}.safetensors").args
            (theirs,) = nodes_upscale_model.UpscaleModelLoader.execute(f"{name}.safetensors").args
            results = {}
            cases = {"ours in ours": (ours, mine), "ours in theirs": (hosts, mine), "theirs in ours": (ours, theirs)}
            # What the host does with its own network and a shifted mean is a known defect of the library.
            cases |= {"theirs": (hosts, theirs)} if name == "demo" else {}
            for case, (node, network) in cases.items():
                given = frames.clone()
                settings = {"tile": 0} if node is ours else {}
                (results[case],) = node.execute(network, given, **settings).args
                if not torch.equal(given, frames):
                    found["changed inputs"].append(f"{name}: {case}")
            first = results["ours in ours"]
            for case, result in results.items():
                found["errors"][f"{name}: {case}"] = float((result - first).abs().max())
            if name == "demo":
                found |= {"large": list(first.shape), "spread": float(first.std())}
    return found


def sampling_speed(host: Any, demo: Path) -> dict[str, Any]:
    """Seconds of the host's sampling over seconds of the core's, same steps and threads, in turn."""
    import statistics
    import time

    import comfy.sample
    import torch

    def module(name: str) -> Any:
        return importlib.import_module(f"videofactory_pack.videofactory_core.{name}")

    model, *_ = host.load(host.checkpoint.check(demo)[0])
    core = host.checkpoint.load(demo)
    prompt, steps = "a red circle moving right on a black background", 8
    contexts = core.text_encoder.encode([prompt, ""])
    conditioning = [[[context[None], {}]] for context in contexts]
    noise = torch.randn(16, 4, 9, 16, generator=torch.Generator().manual_seed(0))
    schedule = module("diffusion").Schedule.from_config(core.config.diffusion)

    def predict(x: Any, t: Any) -> Any:
        cond, uncond = core.unet(torch.cat([x, x]), torch.cat([t, t]), contexts).chunk(2)
        return module("diffusion").guide(cond, uncond, 4.0)

    def ours() -> None:
        module("sampling").sample(predict, noise.movedim(0, 1)[None], schedule, sampler="euler", steps=steps)

    def hosts() -> None:
        comfy.sample.sample(
            model,
            noise,
            steps,
            4.0,
            "euler",
            "simple",
            *conditioning,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )

    def seconds(run: Any) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    hosts()
    ours()
    pairs = [(seconds(hosts), seconds(ours)) for _ in range(7)]
    return {"ratio": statistics.median(a / b for a, b in pairs), "seconds": [list(pair) for pair in pairs]}


def compiled(host: Any, demo: Path) -> dict[str, Any]:
    """What the host's Torch Compile does, without a code generator: graphs traced, and errors of three steps."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from torch._dynamo.utils import counters

    model, *_ = host.load(host.checkpoint.check(demo)[0])
    steps = [{**inputs(), "t": inputs()["t"] - i} for i in range(3)]
    expected = [model.model.apply_model(**step) for step in steps]
    patched = model.clone()
    set_torch_compile_wrapper(model=patched, backend="eager")
    found = [patched.model.apply_model(**step, transformer_options={"wrappers": patched.wrappers}) for step in steps]
    graphs = counters["stats"]["unique_graphs"]
    return {"graphs": graphs, "errors": [error(*pair) for pair in zip(found, expected, strict=True)]}


def missing_library(host: Any, demo: Path) -> dict[str, Any]:
    """The pack where one of the host's libraries cannot be imported."""
    import asyncio
    import logging

    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger().addHandler(Listener())
    for room in ("load", "refine", "write", "sample", "long", "decode", "condition", "upscale", "train"):
        sys.modules.pop(f"videofactory_pack.nodes.{room}", None)
    sys.modules["latent_preview"] = None  # type: ignore[assignment]
    extension = asyncio.run(sys.modules["videofactory_pack"].comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    return {"nodes": [node.GET_SCHEMA().node_id for node in nodes], "said": said}


CHECKS = {
    check.__name__: check
    for check in (
        partial_load,
        weight_types,
        attention_patches,
        text_encoder,
        controlnet,
        upscale_memory,
        upscalers_agree,
        sampling_speed,
        compiled,
        missing_library,
    )
}

if __name__ == "__main__":
    folder, check, file = sys.argv[1:4]
    pack = start(folder)
    import torch

    with torch.inference_mode():
        print("\n" + json.dumps(CHECKS[check](pack, Path(file))))
