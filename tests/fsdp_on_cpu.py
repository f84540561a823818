"""Runs a recipe under FSDP2 on CPUs, which accelerate leaves to GPUs: everything but the choice of it is real."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from videofactory_train.run import run_recipe
from videofactory_train.workspace import Workspace

make = Workspace._accelerator


def forced(self: Workspace, *arguments: Any, **options: Any) -> Accelerator:
    accelerator = make(self, *arguments, **options)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["SpatialTransformer", "ResBlock"],
        cpu_ram_efficient_loading=False,
    )
    for state in (AcceleratorState._shared_state, PartialState._shared_state):
        state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


Workspace._accelerator = forced  # type: ignore[method-assign]
run_recipe(Path(sys.argv[1]))
