"""What a training step holds in memory, computed on tensors without numbers: for a GPU that is not here."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Device = Literal["cuda", "cpu"]
aten = torch.ops.aten


@dataclass(frozen=True)
class Held:
    """Bytes at the worst moment of a step, by what they are for; `saved` waits for the backward pass from its start.

    `activations` is the most that `saved` and `transient` are together, at whatever moment.
    """

    weights: int
    gradients: int
    # Half-precision copies of trained weights, which autocast keeps until the end of the forward pass.
    copies: int
    saved: int
    transient: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.copies + self.saved + self.transient


class Memory(TorchDispatchMode):
    """Counts the storages on one device that are alive, by kind, each once however many tensors lie in it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.now: Counter[str] = Counter()
        self.worst: Counter[str] = Counter()
        self.activations = 0
        self.kinds: dict[int, str] = {}
        self.alive: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensor: object, kind: str) -> None:
        """Count a tensor's storage, or say of one that is counted already what it is for."""
        if not isinstance(tensor, Tensor) or tensor.device.type != self.device.type:
            return
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.alive:
            self.now[self.kinds[key]] -= size
        else:
            self.alive[key] = weakref.ref(storage, lambda _: self._release(key, size))
        self.kinds[key] = kind
        self.now[kind] += size
        self.activations = max(self.activations, self.now["other"])
        if self.now.total() > self.worst.total():
            self.worst = self.now.copy()

    def _release(self, key: int, size: int) -> None:
        self.now[self.kinds.pop(key)] -= size
        del self.alive[key]

    def is_weight(self, tensor: object) -> bool:
        return isinstance(tensor, Tensor) and self.kinds.get(id(tensor.untyped_storage())) == "weights"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copies = func is aten._to_copy.default and self.is_weight(args[0])
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self.alive:
                self.hold(tensor, "copies" if copies else "other")
        return out


class LikeCuda:
    """Lets tensors of device `meta` take what they would on CUDA: attention keeps no products of queries with keys, and
    autocast to the type `autocast` (None: no autocast) leaves norms in float32.
    """

    def __init__(self, autocast: torch.dtype | None) -> None:
        self.autocast = autocast
        # Of weights, by their identity, while a forward pass lasts.
        self.copies: dict[int, Tensor] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """What follows is calculated like this, also when it is calculated a second time in a backward pass."""
        changed = {name: self._cast(getattr(F, name), torch.Tensor.float) for name in ("group_norm", "layer_norm")}
        changed |= {name: self._cast(getattr(F, name), self._lower) for name in ("linear", "conv2d", "conv3d")}
        changed["scaled_dot_product_attention"] = self._cast(attention_like_cuda, self._lower)
        with ExitStack() as stack:
            for name, function in changed.items():
                stack.enter_context(patch.object(F, name, function))
            yield

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward pass, at whose end copies of weights are dropped."""
        self.copies = {}
        yield
        self.copies = None

    def _cast(self, function: Callable[..., Any], cast: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        if self.autocast is None:
            return function

        def calculate(*args: Any, **kwargs: Any) -> Any:
            return function(*tree_map_only(Tensor, cast, args), **tree_map_only(Tensor, cast, kwargs))

        return calculate

    def _lower(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return x
        if self.copies is None or not (x.is_leaf and x.requires_grad):
            return x.to(self.autocast)
        if id(x) not in self.copies:
            self.copies[id(x)] = x.to(self.autocast)
        return self.copies[id(x)]


def attention_like_cuda(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """The kernels that CUDA chooses: without a mask and in half precision the first, else the second."""
    if attn_mask is None and q.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(q, k, v)[0]
    if attn_mask is not None:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).expand(*q.shape[:-1], k.shape[-2])
    trains = torch.is_grad_enabled() and q.requires_grad
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, trains)[0]


@contextmanager
def pretended(
    device: Device, autocast: torch.dtype | None
) -> Iterator[tuple[torch.device, Callable[[], AbstractContextManager[object]]]]:
    """Where to build a network so that it takes no memory, and the context of its forward pass."""
    if device == "cuda":
        like = LikeCuda(autocast)
        with like.active():
            yield torch.device("meta"), like.forward
    else:
        with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
            yield torch.device("cpu"), lambda: nullcontext() if autocast is None else torch.autocast("cpu", autocast)


def pass_memory(
    build: Callable[[torch.device], tuple[nn.Module, Callable[[], Tensor]]],
    device: Device,
    autocast: torch.dtype | None = None,
    *,
    backward: bool = True,
    accumulate: bool = False,
) -> Held:
    """What a forward pass, and a backward pass behind it, hold on `device`, which need not be there.

    `build` makes, on the device that it is given, a module and what calculates its loss. With `accumulate` the
    gradients of a batch before are there already. On a CPU attention is calculated in plain products, as in training.
    Not counted is what kernels take for themselves, and what an allocator cannot use between two tensors.
    """
    with pretended(device, autocast) as (place, forward):
        module, loss = build(place)
        with Memory(place) as memory, torch.set_grad_enabled(backward):
            for tensor in (*module.parameters(), *module.buffers()):
                memory.hold(tensor, "weights")
            for weight in module.parameters():
                if weight.requires_grad and backward:
                    weight.register_post_accumulate_grad_hook(lambda w: memory.hold(w.grad, "gradients"))
                    if accumulate:
                        weight.grad = torch.zeros_like(weight)
                        memory.hold(weight.grad, "gradients")
            with forward():
                result = loss()
            saved = memory.now["other"]
            if backward:
                result.backward()
        worst = memory.worst
    saved = min(saved, worst["other"]) if backward else 0
    return Held(
        weights=worst["weights"],
        gradients=worst["gradients"],
        copies=worst["copies"],
        saved=saved,
        transient=worst["other"] - saved,
        activations=memory.activations,
    )
