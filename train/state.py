"""Saving a run so that it goes on with the same numbers: folders that are whole or absent, and no pickle in them."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

# Tensors are copied for a file at a time, so that a few times this is all that saving needs in memory.
FILE_BYTES = 2**27


class States:
    """The states of one stage, of which the last `keep` stay: folders `<name>-step000500` in `folder`.

    A state holds what the accelerator was given: the trained weights and the buffers of prepared modules, prepared
    optimizers, objects registered for checkpointing, and the loss scale; besides that, the progress that the caller
    passes. Frozen weights are not in it. A folder has its name only when all of it is on the disk.

    Every process calls every method, and all need to see the same `folder`. Weights that FSDP2 has split are stored
    whole, so the number of processes may change; under DeepSpeed, which writes files of its own, it may not.
    """

    def __init__(
        self, folder: Path, name: str, accelerator: Accelerator, keep: int = 2, log: Callable[[str], None] = print
    ) -> None:
        self.folder = folder
        self.name = name
        self.accelerator = accelerator
        self.keep = keep
        self.log = log
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        if accelerator.distributed_type == DistributedType.FSDP and not getattr(accelerator, "is_fsdp2", False):
            raise ValueError("runs under FSDP of version 1 cannot be saved; set fsdp_version: 2 for accelerate")

    def save(self, step: int, progress: dict[str, Any]) -> bool:
        """Write the state after `step` steps; False when the disk does not take it, and then the others stay.

        `progress` holds what JSON can, and its numbers come back exactly.
        """
        target = self.folder / f"{self.name}-step{step:06d}"
        temporary = self.folder / f"{target.name}.tmp"
        errors: list[OSError] = []

        def attempt(action: Callable[..., object], *arguments: object) -> None:
            """Do it unless something failed before: where processes work together, none may leave early."""
            if not errors:
                try:
                    action(*arguments)
                except OSError as error:
                    errors.append(error)

        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            attempt(_make_folder, temporary)
        self.accelerator.wait_for_everyone()
        tensors: dict[str, Tensor] = {}
        tree = None
        if self.deepspeed:
            attempt(partial(self.accelerator.save_state, str(temporary), exclude_frozen_parameters=True))
        else:
            tree = _pack(self._fixed() | {"optimizers": self._optimizers()}, "", tensors)
        for number, names in enumerate(_portions(tensors)):
            # All take part in gathering a split tensor, and take turns at writing.
            mine = number % self.accelerator.num_processes == self.accelerator.process_index
            gathered = {name: whole(tensors[name], mine) for name in names}
            if mine:
                attempt(_write, temporary / f"tensors-{number:05d}.safetensors", partial(save, gathered))
        if self._all_well(not errors) and self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            head = {
                "step": step,
                "processes": self.accelerator.num_processes,
                "optimizers": self._kinds(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "progress": progress,
            }
            attempt(self._finish, temporary, target, tree, head)
        if self._all_well(not errors):
            return True
        for error in errors:
            self.log(f"the state of step {step} could not be written: {error}")
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return False

    def load(self) -> dict[str, Any] | None:
        """Give everything in the accelerator the newest whole state, and return its progress; None if there is none.

        Leftovers of an interrupted `save` are removed, and a damaged state is passed over with a line in the log.
        ValueError when the state is of another module or optimizer.
        """
        found: list[str | None] = [None, None]
        if self.accelerator.is_main_process:
            for leftover in self.folder.glob(f"{glob.escape(self.name)}-step*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
            for folder in reversed(self._folders()):
                damage = _damage(folder)
                if damage is None:
                    found = [folder.name, self._misfit(folder)]
                    break
                self.log(f"{folder} is damaged ({damage}); looking for an earlier state")
        broadcast_object_list(found)
        name, misfit = found
        if name is None:
            return None
        if misfit is not None:
            raise ValueError(
                f"{self.folder / name} is the state of another run: {misfit}; undo the change in the recipe,"
                f" choose another output, or delete {self.folder}"
            )
        return self._restore(self.folder / name)

    def clear(self) -> None:
        """Remove every state, when the stage is finished."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for folder in self._folders():
                _remove(folder)
        self.accelerator.wait_for_everyone()

    def _folders(self) -> list[Path]:
        """The states, oldest first."""
        pattern = re.compile(re.escape(self.name) + r"-step(\d+)")
        found = [(pattern.fullmatch(path.name), path) for path in self.folder.glob(f"{self.name}-step*")]
        return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]

    # Accelerate has no public names for what it was given; these are the ones that its own save_state reads.

    def _fixed(self) -> dict[str, Any]:
        """What has its shapes before the first step: the trained weights and buffers of modules, and the objects."""
        return {
            "modules": [
                {
                    name.replace("_orig_mod.", ""): tensor
                    for name, tensor in self.accelerator.unwrap_model(module).state_dict(keep_vars=True).items()
                    if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
                }
                for module in self.accelerator._models
            ],
            "objects": [thing.state_dict() for thing in self.accelerator._custom_objects],
        }

    def _optimizers(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.accelerator._optimizers]

    def _kinds(self) -> list[str]:
        """Which optimizers these are, inside of what accelerate and offloading put around them."""
        inner = [optimizer.optimizer for optimizer in self.accelerator._optimizers]
        return [type(getattr(optimizer, "host", optimizer)).__name__ for optimizer in inner]

    def _all_well(self, well: bool) -> bool:
        """Whether all processes are."""
        count = torch.tensor(float(well), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, "sum") == self.accelerator.num_processes)

    def _finish(self, temporary: Path, target: Path, tree: Any, head: dict[str, Any]) -> None:
        """Make a written folder the newest state, and remove those that are too old."""
        _write(temporary / "tree.json", partial(json.dumps, tree))
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files}
        _write(temporary / "progress.json", partial(json.dumps, head | {"files": sizes}))
        for path in [*files, temporary / "progress.json"]:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(temporary)
        if target.exists():
            _remove(target)
        temporary.replace(target)
        _sync_folder(self.folder)
        # A state of a later step is one that was damaged, or that the user does not want.
        folders = self._folders()
        place = folders.index(target)
        for folder in folders[: max(0, place + 1 - self.keep)] + folders[place + 1 :]:
            _remove(folder)

    def _misfit(self, folder: Path) -> str | None:
        """Why a state cannot go into this run, or None."""
        kinds = _read_json(folder / "progress.json")["optimizers"]
        if kinds != self._kinds():
            return f"it was made with {' and '.join(kinds)}, this run has {' and '.join(self._kinds())}"
        if self.deepspeed:
            return None
        tensors: dict[str, Tensor] = {}
        _pack(self._fixed(), "", tensors)
        needed = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        with _Reader(folder) as reader:
            stored = {name: reader.shape(name) for name in reader.files if not name.startswith(".optimizers.")}
        for name in sorted(needed.keys() | stored.keys()):
            there, here = stored.get(name, "absent"), needed.get(name, "absent")
            if there != here:
                return f"{name.lstrip('.')} is {there} in it and {here} in this run"
        return None

    @torch.no_grad()
    def _restore(self, folder: Path) -> dict[str, Any]:
        """Give everything a state that fits."""
        head = _read_json(folder / "progress.json")
        scaler = self.accelerator.scaler
        if self.deepspeed:
            _refuse_code_in_pickles()
            self.accelerator.load_state(str(folder), load_module_strict=False)
        else:
            with _Reader(folder) as reader:
                self._fill(_read_json(folder / "tree.json"), reader)
            if scaler is not None and head["scaler"] is not None:
                scaler.load_state_dict(head["scaler"])
        self.accelerator.wait_for_everyone()
        progress: dict[str, Any] = head["progress"]
        return progress

    def _fill(self, tree: dict[str, Any], reader: _Reader) -> None:
        """Give modules, objects and optimizers their parts of a state, one tensor in memory at a time."""
        fixed = self._fixed()
        content = dict(tree["dict"])
        for module, packed in zip(fixed["modules"], content["modules"]["list"], strict=True):
            for name, item in packed["dict"]:
                module[name].copy_(_unpack(item, reader, module[name]))
        for thing, now, packed in zip(
            self.accelerator._custom_objects, fixed["objects"], content["objects"]["list"], strict=True
        ):
            thing.load_state_dict({key: _unpack(item, reader, now.get(key)) for key, item in packed["dict"]})
        for optimizer, packed in zip(self.accelerator._optimizers, content["optimizers"]["list"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            parts = dict(packed["dict"])
            state = {index: _unpack(moments, reader, weights[index]) for index, moments in parts["state"]["dict"]}
            optimizer.load_state_dict({"state": state, "param_groups": _unpack(parts["param_groups"], reader)})


class _Reader:
    """The tensors of a state, read one by one."""

    def __init__(self, folder: Path) -> None:
        self.stack = ExitStack()
        self.files: dict[str, Any] = {}
        with self.stack:
            for path in sorted(folder.glob("tensors-*.safetensors")):
                file = self.stack.enter_context(safe_open(path, "pt"))
                self.files |= dict.fromkeys(file.keys(), file)
            self.stack = self.stack.pop_all()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.files = {}
        self.stack.close()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU, in memory of its own, because a view of the file would hold it open."""
        tensor: Tensor = self.files[name].get_tensor(name)
        return tensor.clone()


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A nest of dicts, lists, tuples, numbers and tensors as JSON, and its tensors into `tensors` under names."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        # As pairs, because the keys of JSON's own objects are never numbers.
        return {"dict": [[key, _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    return value


def _unpack(value: Any, reader: _Reader, like: Any = None) -> Any:
    """What `_pack` was given; tensors of the shape of `like` where that is, and split as it is."""
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return _placed(reader.tensor(content), like)
    if kind == "dict":
        return {key: _unpack(item, reader, like) for key, item in content}
    items = [_unpack(item, reader, like) for item in content]
    return items if kind == "list" else tuple(items)


def _portions(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """The names in the order given, in parts of about `FILE_BYTES`."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        names.append(name)
        size += tensor.numel() * tensor.element_size()
        if size >= FILE_BYTES:
            yield names
            names, size = [], 0
    if names:
        yield names


def whole(tensor: Tensor, wanted: bool = True) -> Tensor:
    """A tensor on the CPU, gathered from all processes where it is split; only those who want it pay for the copy."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    # A copy, because safetensors refuses tensors that share memory.
    return tensor.detach().to("cpu", copy=True).contiguous() if wanted else tensor


def _placed(tensor: Tensor, like: Any) -> Tensor:
    """A tensor where `like` is, and split as it is, if it has the same shape."""
    if not isinstance(like, Tensor) or tensor.shape != like.shape:
        return tensor
    tensor = tensor.to(like.device)
    if hasattr(like, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(like, DTensor)
        tensor = distribute_tensor(tensor, like.device_mesh, like.placements)
    return tensor


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of a state, or None."""
    try:
        for name, size in _read_json(folder / "progress.json")["files"].items():
            if (folder / name).stat().st_size != size:
                return f"{name} has another size than when it was written"
        with _Reader(folder):
            return None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"


def _refuse_code_in_pickles() -> None:
    """Make `torch.load` refuse pickles that do more than hold numbers, even where DeepSpeed asks for less."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _make_folder(folder: Path) -> None:
    folder.mkdir(parents=True)


def _write(path: Path, content: Callable[[], str | bytes]) -> None:
    data = content()
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, which Windows does by itself."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(folder: Path) -> None:
    """Delete a state; while it disappears, it has a name that `load` takes for a leftover."""
    leftover = folder.with_name(f"{folder.name}.old.tmp")
    shutil.rmtree(leftover, ignore_errors=True)
    with suppress(OSError):
        folder.replace(leftover)
    shutil.rmtree(leftover, ignore_errors=True)
