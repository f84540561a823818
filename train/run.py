"""A recipe from its file to the file that it makes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from videofactory_core import checkpoint
from videofactory_core.config import PRESETS, ModelConfig
from videofactory_core.diffusion import Schedule as NoiseSchedule
from videofactory_core.text import TextEncoder, Tokenizer, pad_token
from videofactory_core.unet.model import VideoUNet

from . import autoencoder as autoencoder_training
from . import denoiser as denoiser_training
from .data.moving_shapes import MovingShapes
from .recipe import ModelRecipe, TuningRecipe, UpscalerRecipe, describe, read_recipe
from .tuning import tune
from .upscaler import train_upscaler
from .workspace import Workspace, total


def run_recipe(path: Path, *, resume: bool = False, dry_run: bool = False, changes: Sequence[str] = ()) -> Path | None:
    """Train what the recipe says, with `changes` as in `read_recipe`, and write one file; returns its path.

    A dry run takes two steps of every stage, says how long the recipe will take and in how much memory, and returns
    None. Raises ValueError for a recipe that cannot be used, and KeyboardInterrupt on Ctrl-C, behind which `resume`
    goes on.
    """
    recipe = read_recipe(path, changes)
    output = Path(recipe.output)
    place = tempfile.TemporaryDirectory() if dry_run else nullcontext(str(output.parent))
    with place as folder:
        work = Workspace(recipe, Path(folder), resume=resume, dry=dry_run)
        torch.manual_seed(recipe.seed)
        if isinstance(recipe, ModelRecipe):
            save = ModelRun(recipe, work).train()
        elif isinstance(recipe, UpscalerRecipe):
            save = train_upscaler(recipe, work)
        else:
            assert isinstance(recipe, TuningRecipe)
            save = tune(recipe, work)
        if dry_run:
            for estimate in work.estimates:
                print(estimate)
            print(total(work.estimates))
            return None
        if work.main:
            save(output)
        work.log(f"wrote {output}")
    return output


class ModelRun:
    """A recipe for a whole model at work: autoencoder, then text encoder and U-Net together."""

    def __init__(self, recipe: ModelRecipe, work: Workspace) -> None:
        self.recipe = replace(recipe, clips=min(recipe.clips, 16)) if work.dry else recipe
        self.work = work
        self.config: ModelConfig = PRESETS[recipe.preset]

    def train(self) -> Callable[[Path], None]:
        """All stages; returns what writes the checkpoint."""
        autoencoder = self.train_autoencoder()
        denoiser = self.train_denoiser(self.latents(autoencoder))
        assert denoiser.text_encoder is not None
        metadata = checkpoint.Metadata(
            title=self.recipe.title,
            licence=self.recipe.licence,
            origin=self.recipe.origin,
            other={checkpoint.PREVIEW: self.preview_colours(autoencoder), "recipe": describe(self.recipe)},
        )
        config = replace(self.config, given_frames=any(stage.gives_frames for stage in self.recipe.stages))
        model = checkpoint.Model(config, denoiser.unet, autoencoder, denoiser.text_encoder, metadata)
        return lambda output: checkpoint.save(output, model, metadata, dtype=torch.float16)

    def clips(self, num_clips: int, num_frames: int, seed: int) -> MovingShapes:
        return MovingShapes(num_clips, num_frames, self.config.height, self.config.width, seed)

    def frames(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What the autoencoder is trained on, from batch `first` on."""
        stage = self.recipe.autoencoder
        clips = self.clips(1 << 30, stage.frames_per_clip, self.recipe.seed + 1)
        return autoencoder_training.frame_batches(
            clips, stage.schedule.batch_size, stage.frames_per_clip, self.recipe.workers, first, self.work.process
        )

    def train_autoencoder(self) -> autoencoder_training.Autoencoder:
        """The autoencoder, trained or restored, with the latent scale measured from it in `self.config`."""
        stage = self.recipe.autoencoder
        model = autoencoder_training.Autoencoder(self.config.autoencoder).to(self.work.device)
        training = autoencoder_training.AutoencoderTraining(model, stage.loss, self.work.process)
        self.work.train(
            "autoencoder", training, self.frames, stage.schedule, self.recipe.seed, part=model, unit="frames"
        )
        model.eval()
        scale = round(autoencoder_training.measure_scale(model, self.frames(0), self.work.accelerator), 4)
        self.config = replace(self.config, autoencoder=replace(self.config.autoencoder, scale_factor=scale))
        model.config = self.config.autoencoder
        self.work.log(f"latent scale {scale}")
        return model

    def preview_colours(self, autoencoder: autoencoder_training.Autoencoder) -> str:
        """The colours of latents, as a checkpoint's metadata hold them."""
        return json.dumps(autoencoder_training.preview_colours(autoencoder, self.frames(0), self.work.accelerator))

    def latents(self, autoencoder: autoencoder_training.Autoencoder) -> denoiser_training.Latents:
        """The recipe's clips in latent space, from the run's folder when they are there."""
        path = self.work.folder / "latents.safetensors"
        if path.is_file():
            with safe_open(path, "pt") as file:
                return denoiser_training.Latents(file.get_tensor("latents"), file.get_tensor("tokens"))
        clips = self.clips(self.recipe.clips, self.config.frames, self.recipe.seed)
        data = denoiser_training.encode_clips(
            autoencoder, clips, self.config, self.recipe.workers, self.work.accelerator
        )
        self.work.keep("latents", {"latents": data.latents, "tokens": data.tokens}, [])
        return data

    def train_denoiser(self, data: denoiser_training.Latents, stages: int | None = None) -> denoiser_training.Denoiser:
        """The U-Net's first `stages` stages (None: all), each starting from the one before.

        What is new in a stage starts as the identity.
        """
        full = self.config.unet
        kinds = {
            "images": denoiser_training.spatial_only(full),
            "addition": replace(full, merge="add"),
            "swap": full,
        }
        before: denoiser_training.Denoiser | None = None
        for number, stage in enumerate(self.recipe.stages[:stages]):
            name = f"{number + 1}-{stage.kind}"
            torch.manual_seed(self.recipe.seed + 10 * (number + 1))
            unet, text_encoder = VideoUNet(kinds[stage.kind]), TextEncoder(self.config.text)
            model = denoiser_training.Denoiser(
                unet,
                stage,
                NoiseSchedule.from_config(self.config.diffusion),
                Tokenizer(pad_token(self.config.text), self.config.text.max_tokens)(""),
                text_encoder=text_encoder,
                process=self.work.process,
            )
            if before is not None:
                unknown = model.load_state_dict(before.state_dict(), strict=False).unexpected_keys
                if unknown:
                    raise ValueError(f"stage {name} cannot follow the one before it: it lacks {unknown[0]!r}")
            model.to(self.work.device)
            text_encoder.requires_grad_(not stage.freeze_text)
            batches = denoiser_training.LatentBatches(
                data,
                stage.schedule.batch_size,
                max(1, round(stage.opening * data.latents.shape[2])) if stage.kind == "images" else None,
                stage.frame_stride,
                self.recipe.seed + 1000 + number,
                self.work.process,
            )
            self.work.train(
                name,
                model,
                batches,
                stage.schedule,
                self.recipe.seed + number,
                frames_in=denoiser_training.frames_in,
            )
            before = model
        assert before is not None
        return before
