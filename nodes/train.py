"""Train a LoRA on clips, in the vocabulary of the host's own training nodes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from comfy_api.v0_0_2 import io
from torch import Tensor, nn

from ..videofactory_core import ops
from ..videofactory_core.adapters import Adapter
from ..videofactory_core.config import ModelConfig
from ..videofactory_core.diffusion import Schedule
from ..videofactory_core.objective import Noised, Objective, Process, learning_rate_share, seed_for
from . import host
from .load import CATEGORY
from .network import HostUNet
from .progress import pieces

# What is trained, by names of linear layers. In the first block of the encoder only attention over time has any.
MOTION = r"temporal|merge|^input_blocks\.0\."
LAYERS = {
    "motion and look": rf"transformer_blocks|{MOTION}",
    "motion": MOTION,
    "look": rf"^(?!.*({MOTION})).*transformer_blocks",
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# What a training step needs as multiples of what the host expects of sampling, with and without activations that are
# calculated twice: counted for the preset sd21.
MEMORY = {True: 4, False: 26}
WARMUP_SHARE = 0.1
FINAL_SHARE = 0.05


@dataclass(frozen=True)
class Example:
    """A clip to learn from: `latents [C, F, h, w]` as the network wants them, text features `[L, D]`."""

    latents: Tensor
    context: Tensor


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train; the widgets of the node."""

    steps: int
    learning_rate: float
    rank: int
    layers: str
    batch_size: int
    # Frames of a clip that one step looks at.
    length: int
    seed: int
    dtype: torch.dtype
    gradient_checkpointing: bool

    def share_at(self, step: int) -> float:
        """Learning rate of a step as a share of the highest."""
        return learning_rate_share(step, self.steps, max(1, round(WARMUP_SHARE * self.steps)), FINAL_SHARE)


class TrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryTrainLoRA",
            display_name="VideoFactory Train LoRA",
            category=CATEGORY,
            description="Teaches a model the motion and the look of your clips. The result goes to Save LoRA Weights,"
            " and at once to a sampler.",
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The model of Load VideoFactory. It stays as it is."),
                io.Clip.Input("clip", tooltip="The text encoder of Load VideoFactory."),
                io.Vae.Input("vae", tooltip="The autoencoder of Load VideoFactory."),
                io.Image.Input(
                    "frames",
                    tooltip="The frames of one clip, or a list of clips such as Rebatch Images makes. They may differ"
                    " in size and length.",
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="What the clips show: one line for each, or one for all; or a list of texts.",
                ),
                io.Int.Input("steps", default=500, min=1, max=100000, tooltip="How many times the LoRA is corrected."),
                io.Float.Input(
                    "learning_rate",
                    default=0.0002,
                    min=0.0000001,
                    max=1.0,
                    step=0.0000001,
                    tooltip="How far at a time: higher learns faster, too high breaks the picture.",
                ),
                io.Int.Input(
                    "rank", default=8, min=1, max=128, tooltip="Size of the LoRA: more holds more detail of the clips."
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYERS),
                    default="motion and look",
                    tooltip="What the LoRA changes: layers that know about time, layers that paint pictures, or both.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Clips of one step: more make smoother and slower steps that need more memory.",
                ),
                io.Int.Input(
                    "length",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Frames that one step looks at; longer clips begin at another frame each time. 0 takes what"
                    " the model was trained on.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    # Otherwise every run of the graph would train anew.
                    control_after_generate=False,
                    tooltip="Number of everything that is random here.",
                ),
                io.Combo.Input(
                    "training_dtype",
                    options=list(DTYPES),
                    default="bf16",
                    tooltip="Numbers that the network computes in: bf16 is fast on new GPUs, fp32 exact and safe.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=True,
                    tooltip="Calculates parts twice to need much less memory; the result is the same.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRA at full strength."),
                io.LoraModel.Output(display_name="lora", tooltip="For Save LoRA Weights and Load LoRA Model."),
                io.LossMap.Output(display_name="loss_map", tooltip="The loss of every step, for Plot Loss Graph."),
                io.Int.Output(display_name="steps", tooltip="How many steps, for the file name of Save LoRA Weights."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: list[Any],
        clip: list[Any],
        vae: list[Any],
        frames: list[Tensor],
        captions: list[str],
        steps: list[int],
        learning_rate: list[float],
        rank: list[int],
        layers: list[str],
        batch_size: list[int],
        length: list[int],
        seed: list[int],
        training_dtype: list[str],
        gradient_checkpointing: list[bool],
    ) -> io.NodeOutput:
        base = model[0]
        config = host.config_of(base)
        if config is None:
            raise ValueError("this model is not a VideoFactory model: connect Load VideoFactory, or use Train LoRA")
        settings = Settings(
            steps=steps[0],
            learning_rate=learning_rate[0],
            rank=rank[0],
            layers=layers[0],
            batch_size=batch_size[0],
            length=length[0] or config.frames,
            seed=seed[0],
            dtype=DTYPES[training_dtype[0]],
            gradient_checkpointing=gradient_checkpointing[0],
        )
        check(settings, config, base.model.diffusion_model)
        clips = clips_of(frames)
        contexts = encode_texts(clip[0], ["", *captions_of(captions, len(clips))], config)
        latents = encode_clips(vae[0], clips, base, config)
        examples = [Example(*pair) for pair in zip(latents, contexts[1:], strict=True)]

        largest = max(examples, key=lambda example: example.latents.numel()).latents.shape
        shape = (settings.batch_size, largest[0], min(largest[1], settings.length), *largest[2:])
        schedule = Schedule.from_config(config.diffusion)
        with torch.inference_mode(False), trainable(base, shape, settings) as network:
            tensors, losses = learn(network, base.load_device, examples, contexts[0], schedule, settings)
        trained, _ = comfy.sd.load_lora_for_models(base, None, tensors, 1.0, 0.0)
        return io.NodeOutput(trained, tensors, {"loss": losses}, settings.steps)


def check(settings: Settings, config: ModelConfig, network: nn.Module) -> None:
    """ValueError for what the model cannot be trained with."""
    if settings.rank < 1:
        raise ValueError(f"a LoRA of rank {settings.rank} changes nothing: set rank to 1 or more")
    if settings.steps < 1 or settings.batch_size < 1:
        raise ValueError(f"{settings.steps} steps of {settings.batch_size} clips are none: set both to 1 or more")
    longest = config.unet.temporal_positions
    if longest and settings.length > longest:
        raise ValueError(
            f"this model knows {longest} frame positions, not {settings.length}: set length to {longest} or less"
        )
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not any(re.search(LAYERS[settings.layers], name) for name in names):
        raise ValueError(
            f"this model has no layers for {settings.layers}: set layers to look, or choose a motion module in Load"
            " VideoFactory"
        )


def clips_of(frames: list[Tensor]) -> list[Tensor]:
    """Clips `[F, H, W, 3]` of a list of them, in which `[B, F, H, W, 3]` are several."""
    clips = [clip for entry in frames for clip in (entry if entry.ndim == 5 else [entry])]
    if not clips:
        raise ValueError("there are no clips to learn from: connect the frames of at least 1")
    for number, clip in enumerate(clips, 1):
        if not len(clip):
            raise ValueError(f"clip {number} has 0 frames: give at least 1")
    return [clip[..., :3] for clip in clips]


def captions_of(captions: list[str], count: int) -> list[str]:
    """A caption for each of `count` clips, from a list of them or the lines of a single text."""
    if len(captions) == 1 and count > 1:
        captions = [line.strip() for line in captions[0].splitlines() if line.strip()] or [""]
    if len(captions) == 1:
        captions = captions * count
    if len(captions) != count:
        raise ValueError(
            f"there are not as many captions ({len(captions)}) as clips ({count}): write one line for each clip, or"
            " one for all"
        )
    return captions


def encode_texts(clip: Any, texts: list[str], config: ModelConfig) -> list[Tensor]:
    """Text features `[L, D]`, on the CPU."""
    known: dict[str, Tensor] = {}
    for text in texts:
        if text not in known:
            known[text] = clip.encode_from_tokens(clip.tokenize(text))[0].float().cpu()
    width = known[texts[0]].shape[-1]
    if width != config.unet.context_dim:
        raise ValueError(
            f"this CLIP makes text features of {width} numbers and the model reads {config.unet.context_dim}: connect"
            " the CLIP of Load VideoFactory"
        )
    return [known[text] for text in texts]


def encode_clips(vae: Any, clips: list[Tensor], model: Any, config: ModelConfig) -> list[Tensor]:
    """Latents `[C, F, h, w]` in the network's scale, on the CPU; pictures are cut to what the autoencoder can take."""
    channels = config.unet.in_channels
    if getattr(vae, "latent_channels", None) != channels or getattr(vae, "latent_dim", 2) != 2:
        raise ValueError("this VAE belongs to another family of models: connect the VAE of Load VideoFactory")
    smallest = config.autoencoder.downscale
    for number, clip in enumerate(clips, 1):
        if min(clip.shape[1:3]) < smallest:
            raise ValueError(
                f"clip {number} has pictures of {clip.shape[2]} x {clip.shape[1]}: make them at least {smallest} pixels"
                " wide and high"
            )
    latents = []
    for clip in clips:
        comfy.model_management.throw_exception_if_processing_interrupted()
        latents.append(model.model.process_latent_in(vae.encode(clip)).movedim(0, 1).float().cpu())
    return latents


@contextmanager
def trainable(model: Any, shape: tuple[int, ...], settings: Settings) -> Iterator[HostUNet]:
    """The network of a MODEL where it computes, able to pass gradients on; then all is as before.

    `shape` is that of the latents of a step.
    """
    working = model.clone()
    working.set_model_compute_dtype(settings.dtype)
    try:
        memory = MEMORY[settings.gradient_checkpointing] * working.memory_required(shape)
        comfy.model_management.load_models_gpu([working], memory_required=memory)
        with differentiable(working.model.diffusion_model, settings.gradient_checkpointing) as network:
            yield network
    finally:
        working.detach()
        comfy.model_management.soft_empty_cache()


@contextmanager
def differentiable(network: HostUNet, gradient_checkpointing: bool) -> Iterator[HostUNet]:
    """The network, until the end with weights and attention that a backward pass can go through.

    What the host makes in inference mode cannot be kept for a backward pass; ordinary tensors of the same memory can.
    And some of the attentions that a host may be started with have no backward pass.
    """
    modules = list(network.modules())
    weights = [(module, *named) for module in modules for named in module.named_parameters(recurse=False)]
    attentions = [(module, module.attention) for module in modules if "attention" in vars(module)]
    checkpointed = network.gradient_checkpointing
    try:
        for module, name, weight in weights:
            twin = torch.empty(0, dtype=weight.dtype, device=weight.device)
            twin.set_(weight.untyped_storage(), weight.storage_offset(), weight.shape, weight.stride())
            setattr(module, name, nn.Parameter(twin, requires_grad=False))
        for module, _ in attentions:
            module.attention = ops.attention
        network.gradient_checkpointing = gradient_checkpointing
        yield network
    finally:
        for module, name, weight in weights:
            setattr(module, name, weight)
        for module, attention in attentions:
            module.attention = attention
        network.gradient_checkpointing = checkpointed


def learn(
    network: nn.Module,
    device: torch.device,
    examples: list[Example],
    empty: Tensor,
    schedule: Schedule,
    settings: Settings,
) -> tuple[dict[str, Tensor], list[float]]:
    """The weights of a LoRA in half precision, and the loss of every step.

    `empty [L, D]` are the features of no caption. What a step draws depends on the seed and the step alone, whatever
    the device. Raises the host's exception when the user interrupts.
    """

    def predict(noised: Noised, context: Tensor) -> Tensor:
        x, context = noised.latents.to(device, settings.dtype), context.to(device, settings.dtype)
        return network(x, noised.timesteps.to(device), context).cpu()

    losses: list[float] = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(settings.seed))
        adapter = Adapter(network, LAYERS[settings.layers], settings.rank, alpha=settings.rank)
        try:
            weights = list(adapter.to(device).parameters())
            optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
            for piece in pieces(settings.steps, 1):
                step = piece.start
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * settings.share_at(step)
                torch.default_generator.manual_seed(seed_for(settings.seed, step))
                chosen = [examples[i] for i in places(len(examples), step, settings)]
                value = 0.0
                for latents, context in batches(chosen, settings.length):
                    part = loss_of(predict, latents, context, empty, schedule) * (len(latents) / len(chosen))
                    part.backward()
                    value += part.item()
                if not math.isfinite(value):
                    raise ValueError(
                        f"the loss became {value} at step {step + 1}: lower learning_rate, or train in fp32"
                    )
                losses.append(value)
                nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        finally:
            adapter.remove()
    return {key: value.detach().to("cpu", torch.float16) for key, value in adapter.tensors().items()}, losses


def loss_of(
    predict: Callable[[Noised, Tensor], Tensor], latents: Tensor, context: Tensor, empty: Tensor, schedule: Schedule
) -> Tensor:
    """The loss of clips `latents [B, C, F, h, w]` with text features `[B, L, D]` at random noise levels.

    All of them stay on the CPU, where the same seed draws the same everywhere.
    """
    objective, process = Objective(), Process()
    context = objective.drop_captions(context, empty, process)
    noised = objective.noised(latents, schedule, process)
    return objective.loss(predict(noised, context), noised)


def places(count: int, step: int, settings: Settings) -> Iterator[int]:
    """Which of `count` clips a step looks at: all of them in a random order, then all in another one."""
    for position in range(step * settings.batch_size, (step + 1) * settings.batch_size):
        around, place = divmod(position, count)
        generator = torch.Generator().manual_seed(seed_for(settings.seed, around, 1))
        yield int(torch.randperm(count, generator=generator)[place])


def batches(chosen: list[Example], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents `[B, C, F, h, w]` and text features `[B, L, D]` of clips, those of one shape together; a clip of more
    than `length` frames begins at a random one."""
    found: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for example in chosen:
        start = int(torch.randint(max(1, example.latents.shape[1] - length + 1), ()))
        latents = example.latents[:, start : start + length]
        found.setdefault((latents.shape, len(example.context)), []).append((latents, example.context))
    for group in found.values():
        latents, contexts = zip(*group, strict=True)
        yield torch.stack(latents), torch.stack(contexts)


NODES = [TrainLoRA]
