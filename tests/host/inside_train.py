"""Training inside the host's own Python: `python inside_train.py HOST FOLDER`, by the host's interpreter.

Prints one line of JSON. Nothing here is collected by pytest; `test_train.py` runs it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

from inside import error, inputs, start


class Bench:
    """A small model with random weights, clips for it, and the node to train it."""

    def __init__(self, host: Any, folder: Path) -> None:
        import torch

        self.host = host
        self.train = importlib.import_module("videofactory_pack.nodes.train")
        self.core = importlib.import_module("videofactory_pack.videofactory_core.config")
        # The host cannot build an autoencoder as narrow as that of the smallest preset.
        presets = self.core.PRESETS
        self.config = dataclasses.replace(presets["debug"], autoencoder=presets["demo"].autoencoder)
        self.file = self.saved(folder / "small.safetensors", self.config)
        self.model, self.clip, self.vae = host.load(self.file)
        self.untouched = self.state()
        generator = torch.Generator().manual_seed(0)
        self.clips = [
            torch.rand(shape, generator=generator) for shape in ((4, 32, 48, 3), (3, 32, 48, 4), (9, 16, 21, 3))
        ]

    def saved(self, path: Path, config: Any) -> Any:
        """A file of such a model, with weights in the layers too that start at zero."""
        import torch

        torch.manual_seed(0)
        model = self.host.checkpoint.build(config)
        for weight in (*model.unet.parameters(), *model.text_encoder.parameters()):
            if not weight.any():
                weight.data.normal_(std=0.05)
        self.host.checkpoint.save(path, model, model.metadata)
        return self.host.checkpoint.check(path)[0]

    def run(self, **changes: Any) -> tuple[Any, Any, list[float]]:
        """MODEL, LoRA and losses with these inputs changed."""
        settings = {
            "model": [self.model],
            "clip": [self.clip],
            "vae": [self.vae],
            "frames": self.clips[:1],
            "captions": ["one"],
            "steps": [2],
            "learning_rate": [1e-3],
            "rank": [2],
            "layers": ["motion and look"],
            "batch_size": [1],
            "length": [0],
            "seed": [0],
            "training_dtype": ["fp32"],
            "gradient_checkpointing": [False],
        }
        for name, value in changes.items():
            settings[name] = value if isinstance(value, list) else [value]
        model, lora, loss, _ = self.train.TrainLoRA.execute(**settings).args
        return model, lora, loss["loss"]

    def state(self) -> list[Any]:
        """What of the network training changes for a while."""
        model = self.model.model
        modules = list(model.diffusion_model.modules())
        attentions = [vars(module).get("attention") for module in modules]
        hooks = sum(len(module._forward_hooks) for module in modules)
        return [attentions, hooks, model.diffusion_model.gradient_checkpointing, model.manual_cast_dtype]

    def refusal(self, **changes: Any) -> str:
        try:
            self.run(**changes)
        except ValueError as refused:
            return str(refused)
        return "it was done"

    def predict(self, model: Any = None) -> Any:
        channels = self.config.unet.context_dim
        return (model or self.model).model.apply_model(**inputs(channels=channels))


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def ways(bench: Bench) -> dict[str, Any]:
    """The same training in other ways."""
    _, lora, losses = bench.run()
    _, again, _ = bench.run()
    _, other, _ = bench.run(seed=1 << 40)
    _, _, checkpointed = bench.run(gradient_checkpointing=True)
    _, _, halved = bench.run(training_dtype="bf16")
    return {
        "losses": losses,
        "repeatable": same(lora, again),
        "seed counts": not same(lora, other),
        "checkpointed": checkpointed,
        "bf16": halved,
        "dtypes": sorted({str(value.dtype) for value in lora.values()}),
        "finite": all(bool(value.isfinite().all()) for value in lora.values()),
        "moved": all(bool(value.any()) for value in lora.values()),
    }


def layers(bench: Bench) -> dict[str, list[int]]:
    """How many layers of time, of Swap-Attention and of pictures each choice trains."""
    found = {}
    for choice in bench.train.LAYERS:
        _, lora, _ = bench.run(layers=choice, steps=1, rank=1)
        names = [key for key in lora if key.endswith(".alpha")]
        time = sum(".temporal." in name for name in names)
        merge = sum(".merge." in name for name in names)
        found[choice] = [time, merge, len(names) - time - merge]
    return found


def weight_types(bench: Bench) -> dict[str, list[float]]:
    """Losses with weights stored in other types, and with most of them waiting elsewhere."""
    import comfy.model_management
    import torch

    losses = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        config = bench.host.HostConfig(bench.file.config, bench.file.metadata)
        config.set_inference_dtype(dtype, torch.float32)
        model = config.get_model({}, device=torch.device("cpu"))
        model.load_model_weights(bench.file.read("unet"), "")
        patcher = type(bench.model)(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
        losses[str(dtype).removeprefix("torch.")] = bench.run(model=patcher)[2]

    whole = comfy.model_management.load_models_gpu
    waiting = []

    def partly(models: list[Any], **_: Any) -> None:
        for model in models:
            model.load(torch.device("cpu"), lowvram_model_memory=1_000_000)
            waiting.append(sum(hasattr(m, "prev_comfy_cast_weights") for m in model.model.modules()))

    # Encoders are loaded as ever; only the network stays outside.
    bench.train.comfy.model_management.load_models_gpu = lambda models, **told: (
        partly(models) if models[0].is_clone(bench.model) else whole(models, **told)
    )
    try:
        losses["partly loaded"] = bench.run()[2]
    finally:
        bench.train.comfy.model_management.load_models_gpu = whole
    return {**losses, "waiting": waiting}


def interrupted(bench: Bench) -> dict[str, Any]:
    """Everything as it was after an interrupt in the third step of many, and after a loss that is no number."""
    import comfy.model_management
    import comfy.utils
    import torch

    network = bench.model.model.diffusion_model
    before = bench.predict()
    weights = [(weight, weight.requires_grad) for weight in network.parameters()]
    numbers = torch.get_rng_state()
    refused = bench.refusal(frames=bench.clips[0] * float("nan"))
    said: list[str] = []

    def watch(value: int, total: int, *_: Any, **__: Any) -> None:
        said.append(f"{value}/{total}")
        if value == 3:
            comfy.model_management.interrupt_current_processing(True)

    comfy.utils.set_progress_bar_global_hook(watch)
    try:
        bench.run(steps=1000, gradient_checkpointing=True)
    except comfy.model_management.InterruptProcessingException:
        said.append("interrupted")
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)
    return {
        "said": said,
        "refused": refused,
        "same weights": all(
            a is b and a.requires_grad == needs for (a, needs), b in zip(weights, network.parameters(), strict=True)
        ),
        "same state": bench.state() == bench.untouched,
        "same random numbers": torch.equal(numbers, torch.get_rng_state()),
        "same result": torch.equal(before, bench.predict()),
    }


def several(bench: Bench) -> dict[str, Any]:
    """Clips of several sizes, lengths and captions."""
    import torch

    long = "a red circle moving right on a black background, " * 12
    _, lora, losses = bench.run(frames=bench.clips, captions=["one", long, ""], batch_size=4, length=4, steps=2)
    _, listed, _ = bench.run(frames=bench.clips, captions=["one", "two", "three"], steps=2)
    _, lines, _ = bench.run(frames=bench.clips, captions=" one\n\ntwo \nthree\n", steps=2)
    _, stacked, _ = bench.run(frames=torch.stack([bench.clips[0], bench.clips[0]]), steps=2)
    _, single, _ = bench.run(frames=bench.clips[:1] * 2, steps=2)
    places = bench.train.places
    settings = bench.train.Settings(
        steps=9,
        learning_rate=1.0,
        rank=1,
        layers="look",
        batch_size=2,
        length=4,
        seed=5,
        dtype=torch.float32,
        gradient_checkpointing=False,
    )
    return {
        "losses": losses,
        "finite": all(bool(value.isfinite().all()) for value in lora.values()),
        "lines are a list": same(listed, lines),
        "stacked clips are a list": same(stacked, single),
        "places": [list(places(3, step, settings)) for step in range(3)],
    }


def refusals(bench: Bench, folder: Path) -> dict[str, str]:
    """What is said of inputs that cannot work."""
    text = bench.core.PRESETS["demo"].text
    still = dataclasses.replace(
        bench.config.unet,
        temporal_conv=False,
        temporal_attention=False,
        temporal_skips=False,
        merge="add",
        context_dim=text.width,
    )
    other = dataclasses.replace(bench.config, unet=still, text=text)
    file = bench.saved(folder / "still.safetensors", other)
    still_model, other_clip = bench.host.load_model(file), bench.host.load_text_encoder(file)
    stranger = types.SimpleNamespace(model=types.SimpleNamespace(model_config=types.SimpleNamespace()))
    return {
        "rank": bench.refusal(rank=0),
        "model": bench.refusal(model=stranger),
        "clip": bench.refusal(clip=other_clip),
        "vae": bench.refusal(vae=types.SimpleNamespace(latent_channels=16)),
        "no clips": bench.refusal(frames=[]),
        "no frames": bench.refusal(frames=[bench.clips[0], bench.clips[0][:0]]),
        "captions": bench.refusal(captions="one\ntwo\nthree", frames=bench.clips[:2]),
        "small": bench.refusal(frames=bench.clips[0][:, :7]),
        "length": bench.refusal(length=40),
        "no motion": bench.refusal(model=still_model, layers="motion"),
    }


def on_top(bench: Bench) -> dict[str, float]:
    """A model that has a LoRA already is trained with it, and keeps it."""
    first, *_ = bench.run(learning_rate=0.1)
    second, _, losses = bench.run(model=first)
    plain = bench.run()[2]

    def predict(model: Any) -> Any:
        import comfy.model_management

        comfy.model_management.load_models_gpu([model])
        return bench.predict(model)

    base, one, two = predict(bench.model), predict(first), predict(second)
    return {
        "first": error(one, base),
        "second": error(two, one),
        "loss": abs(losses[0] - plain[0]),
        "restored": error(predict(bench.model), base),
    }


if __name__ == "__main__":
    folder, scratch = sys.argv[1:3]
    pack = start(folder)
    import torch

    with torch.inference_mode():
        bench = Bench(pack, Path(scratch))
        report = {check.__name__: check(bench) for check in (ways, layers, weight_types, interrupted, several, on_top)}
        report["refusals"] = refusals(bench, Path(scratch))
    print("\n" + json.dumps(report))
