"""Where a run works: its folder, its log, its processes, and the stages that are done."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from videofactory_core.atomic import replacing, write_text
from videofactory_core.objective import Process

from .loop import Event, Schedule, train
from .recipe import Recipe, describe
from .state import States, whole

DRY_STEPS = 2
# How long processes wait for each other: one may have clips to encode when others are done.
PATIENCE = timedelta(hours=12)
PRECISIONS = {"no": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Estimate:
    """What a dry run found out about a stage."""

    stage: str
    seconds_per_step: float
    steps: int
    peak_gib: float

    def __str__(self) -> str:
        hours = self.seconds_per_step * self.steps / 3600
        return (
            f"{self.stage}: {self.seconds_per_step:.2f} s a step, {self.steps} steps in {hours:.2f} hours, "
            f"peak {self.peak_gib:.2f} GiB"
        )


class Workspace:
    """The folder of a recipe's output: every finished stage is a file there, and `resume` goes on behind it.

    A `dry` one takes two steps a stage and keeps nothing. Raises ValueError when the recipe asks for a device that is
    not there, or the folder holds another run.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, resume: bool = False, dry: bool = False) -> None:
        self.recipe = recipe
        self.folder = folder
        self.dry = dry
        self.estimates: list[Estimate] = []
        self.accelerator = self._accelerator(1)
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.process = Process(self.accelerator.process_index, self.accelerator.num_processes)
        folder.mkdir(parents=True, exist_ok=True)
        self._claim(resume)

    @property
    def dtype(self) -> torch.dtype | None:
        """What matrices that do not train are stored as, None for float32: FSDP takes one type alone."""
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        return None if sharded else PRECISIONS[self.recipe.precision]

    def _accelerator(self, parts: int, stage: str = "") -> Accelerator:
        """What runs the processes; for a stage it also keeps the curves, in a folder of the stage's own."""
        recipe = self.recipe
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        wanted = (
            recipe.device if recipe.device != "auto" else next(name for name in there if there[name] or name == "cpu")
        )
        if not there[wanted]:
            raise ValueError(
                f"device: the recipe wants {wanted} and PyTorch finds none; install PyTorch for it, or say "
                'device = "cpu" (slow)'
            )
        if wanted == "cpu" and recipe.precision == "fp16":
            raise ValueError('precision: "fp16" needs a GPU; use "bf16" or "fp32" on a CPU')
        trackers = self._trackers() if stage and not self.dry else None
        # Otherwise a second run in one process would be refused another precision.
        AcceleratorState._reset_state()
        try:
            return Accelerator(
                mixed_precision="no" if PRECISIONS[recipe.precision] is None else recipe.precision,
                cpu=wanted == "cpu",
                gradient_accumulation_steps=parts,
                log_with=trackers,
                project_dir=self.folder / "logs" / stage if self.recipe.wandb else self.folder / "logs",
                kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            )
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"precision: {error}; use another precision, such as fp32") from error

    def _trackers(self) -> list[str]:
        """TensorBoard, and Weights & Biases where asked for."""
        from accelerate.utils import is_tensorboard_available, is_wandb_available

        if not is_tensorboard_available():
            raise ValueError("training writes TensorBoard's files: run `pip install 'videofactory[train]'`")
        if self.recipe.wandb and not is_wandb_available():
            raise ValueError("wandb: the recipe reports to Weights & Biases: run `pip install wandb`, or leave it out")
        return ["tensorboard", "wandb"] if self.recipe.wandb else ["tensorboard"]

    def _claim(self, resume: bool) -> None:
        """Make the folder this run's, or say why it is not."""
        file = self.folder / "recipe.json"
        now = json.loads(describe(self.recipe))
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        begun = any(self.folder.glob("*.losses.json")) or any(self.folder.glob("states/*/progress.json"))
        if begun and before is not None and before["output"] != now["output"]:
            raise ValueError(
                f"{self.folder} holds the run of {before['output']}: give output a folder of its own, such as "
                f"{self.folder / Path(self.recipe.output).stem / Path(self.recipe.output).name}"
            )
        if begun and not resume:
            raise ValueError(
                f"{self.folder} holds a run that has begun: go on with --resume, name another output, or delete it"
            )
        if begun and before is not None and before != now:
            changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            self.log(f"the recipe has changed since: {', '.join(changed)}")
        self.accelerator.wait_for_everyone()
        if self.main:
            write_text(file, describe(self.recipe))

    def log(self, line: str) -> None:
        """Print a line and keep it in the run's log."""
        if self.main:
            print(line, flush=True)
            # A full disk must not stop the training.
            with contextlib.suppress(OSError), open(self.folder / "log.txt", "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def restore(self, name: str, module: nn.Module) -> dict[str, Tensor] | None:
        """Load a finished stage into `module`, if there is one, and return what it holds."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        missing = module.load_state_dict(tensors, strict=False).missing_keys
        frozen = {key for key, weight in module.named_parameters() if not weight.requires_grad}
        if lacking := [key for key in missing if key not in frozen]:
            raise ValueError(f"{path} is of another recipe: it lacks {lacking[0]}; delete it to train the stage again")
        self.log(f"{name}: found {path.name}, going on behind it")
        return tensors

    def keep(self, name: str, tensors: dict[str, Tensor], losses: list[float]) -> None:
        """Write a finished stage."""
        if self.main and not self.dry:
            with replacing(self.folder / f"{name}.safetensors") as temporary:
                save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
            write_text(self.folder / f"{name}.losses.json", json.dumps(losses))
        self.accelerator.wait_for_everyone()

    def train(
        self,
        name: str,
        module: nn.Module,
        batches: Callable[[int], Iterator[Any]],
        schedule: Schedule,
        seed: int,
        *,
        part: nn.Module | None = None,
        only_trained: bool = False,
        unit: str = "clips",
        frames_in: Callable[[Any], int] = lambda batch: 0,
        events: Sequence[Event] = (),
    ) -> dict[str, Tensor]:
        """Train `module` and keep `part` of it (None: all), or restore that when an earlier start finished this stage.

        `only_trained` leaves out of the file what was frozen. Returns what the file holds, on the CPU.
        """
        part = part or module
        if not self.dry and (found := self.restore(name, part)) is not None:
            return found
        accelerator = self._accelerator(schedule.gradient_accumulation_steps, name)
        settle(accelerator, schedule)
        if not self.dry:
            wandb = {"name": f"{self.folder.name} {name}", "dir": str(self.folder)}
            config = {"recipe": describe(self.recipe)} if self.recipe.wandb else None
            accelerator.init_trackers(self.recipe.wandb or name, config, {"wandb": wandb})
        steps = schedule.steps
        if self.dry:
            schedule = replace(schedule, steps=DRY_STEPS, log_every=1)
        states = States(self.folder / "states", name, accelerator, schedule.keep, self.log)
        last: dict[str, float] = {}

        def note(step: int, figures: dict[str, float]) -> None:
            last.update(figures)
            accelerator.log(figures, step=step)

        losses = train(
            module,
            batches,
            schedule,
            accelerator,
            states,
            lambda line: self.log(f"{name}  {line}"),
            seed=seed,
            unit=unit,
            frames_in=frames_in,
            events=() if self.dry else events,
            note=note,
        )
        for tracker in accelerator.trackers:
            tracker.finish()
        if self.dry:
            # Of the second step, because the first also warms up.
            self.estimates.append(Estimate(name, last["seconds_per_step"], steps, last["peak_gib"]))
        frozen = {key for key, weight in part.named_parameters() if not weight.requires_grad} if only_trained else ()
        # FSDP gathers its pieces here, for which it needs every process.
        kept = {key: whole(value) for key, value in part.state_dict().items() if key not in frozen}
        if not self.dry:
            self.keep(name, kept, losses)
            states.clear()
        return kept


def settle(accelerator: Accelerator, schedule: Schedule) -> None:
    """Tell what FSDP and DeepSpeed have to know, and cannot find out because they do not see the data."""
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.mixed_precision != "no":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Its own choice rounds time steps, noise and the loss as well.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=PRECISIONS[accelerator.mixed_precision], reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": schedule.batch_size,
            "gradient_clipping": schedule.clip_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }


def total(estimates: Sequence[Estimate]) -> str:
    """What a dry run says in the end."""
    seconds = sum(estimate.seconds_per_step * estimate.steps for estimate in estimates)
    peak = max(estimate.peak_gib for estimate in estimates)
    return (
        f"in all {timedelta(seconds=round(seconds))} (h:mm:ss) without preparing data and samples, peak {peak:.2f} GiB"
    )
