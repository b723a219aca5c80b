"""Every operator, forward and backward: are its tensors on one device, and where are its results?"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretended_cuda.driver import Driver
from pretended_cuda.marks import CPU, CUDA, EITHER, mark, mark_of

_CROSSING = {"copy_", "_foreach_copy_", "_foreach_copy", "set_"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_ON_THE_CPU = {"_pack_padded_sequence": 1}
"""Arguments that CUDA wants on the CPU."""

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot", "convolution", "linalg_matmul"}

_NOT_DETERMINISTIC = {
    "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "avg_pool3d_backward",
    "adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward",
    "max_unpool2d", "max_unpool3d", "upsample_linear1d_backward", "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "reflection_pad1d_backward",
    "reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss2d_forward", "_ctc_loss_backward",
    "put_", "put", "histc", "median", "nanmedian", "kthvalue", "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
}  # fmt: skip
"""What torch's page of `use_deterministic_algorithms` lists as refused on CUDA."""

_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}


@dataclass(frozen=True)
class _Operator:
    """What is asked of an operator; found once for each."""

    name: str
    overload: str
    elementwise: bool
    writes: bool
    random: bool
    makes: bool  # takes no tensors: a factory


@functools.cache
def _described(func: Any) -> _Operator:
    name = func._schema.name.partition("::")[2]
    tags = set(func.tags)
    like_elementwise = name.rstrip("_") in {"clamp", "where", "fill", "index_fill"} or "_foreach_" in name
    takes = any("Tensor" in str(argument.type) for argument in func._schema.arguments)
    return _Operator(
        name,
        func._schema.overload_name,
        torch.Tag.pointwise in tags or like_elementwise,
        func._schema.is_mutable,
        torch.Tag.nondeterministic_seeded in tags,
        not takes,
    )


class Operators(TorchDispatchMode):
    """Checks and marks the tensors of every operator while it is entered."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return self._called(func, args, kwargs or {})

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        about = _described(func)
        tensors = [] if about.makes else list(_tensors((args, kwargs.values())))
        marks = [mark_of(tensor) for tensor in tensors]
        asked = kwargs.get("device")
        if asked is not None and asked.type == "cuda":
            self._driver.check_index(asked)
            kwargs, target = {**kwargs, "device": CPU}, CUDA
        elif asked is not None and "pin_memory" in kwargs:
            target = None
        elif asked is not None and about.makes:
            # Python's factories always say whether memory is pinned; this one was called from C++.
            target = EITHER
        else:
            target = CUDA if CUDA in marks else EITHER if EITHER in marks and None not in marks else None
        if CUDA in marks:
            self._check(about, args, kwargs, tensors, marks)
        self._check_generator(kwargs.get("generator"), target)
        run = functools.partial(func, *args, **kwargs)
        try:
            # A generator that the caller names is used as it is.
            own = about.random and target is CUDA and kwargs.get("generator") is None
            result = self._driver.drawing(run) if own else run()
        except IndexError as error:
            if target is CUDA:
                raise RuntimeError(f"CUDA error: device-side assert triggered ({error})") from None
            raise
        if target is not None and about.name not in _CROSSING:
            _mark_all(result, target, about)
        return result

    def _check(
        self,
        about: _Operator,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tensors: list[Tensor],
        marks: list[object],
    ) -> None:
        if about.name not in _CROSSING:
            free = {id(x) for x in _may_be_the_cpus(about, args, kwargs)} if None in marks else set()
            for tensor, found in zip(tensors, marks, strict=True):
                if found is EITHER:
                    mark(tensor, CUDA)
                elif found is None and torch._C.TensorBase.is_cpu.__get__(tensor) and id(tensor) not in free:
                    raise RuntimeError(
                        "Expected all tensors to be on the same device, but found at least two devices, "
                        f"cuda:0 and cpu! (in {about.name})"
                    )
        if about.name in _PRODUCTS and not (tensors[0].is_floating_point() or tensors[0].is_complex()):
            raise RuntimeError(f'"{about.name}_cuda" not implemented for {tensors[0].dtype}')
        if torch.are_deterministic_algorithms_enabled() and _not_deterministic(about, args, kwargs):
            raise RuntimeError(
                f"{about.name}_cuda does not have a deterministic implementation, but you set "
                "'torch.use_deterministic_algorithms(True)'"
            )
        if self._driver.sync_mode == "error" and _waits(about, args, marks):
            raise RuntimeError(f"called a synchronizing CUDA operation ({about.name})")

    def _check_generator(self, generator: Any, target: object) -> None:
        if generator is None or target is EITHER:
            return
        wanted = "cpu" if target is None else "cuda"
        found = "cuda" if generator._cdata in self._driver.generators else "cpu"
        if found != wanted:
            raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}'")


def _tensors(several: Iterable[Iterable[Any]]) -> Iterator[Tensor]:
    """Tensors among values and their lists: quicker than torch's trees, and run for each operator."""
    for values in several:
        for value in values:
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from (item for item in value if isinstance(item, Tensor))


def _may_be_the_cpus(about: _Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Arguments that CUDA's operators also take from the CPU."""
    if about.name in _INDEXING:
        yield from (x for x in args[1] if isinstance(x, Tensor) and not x.is_floating_point())
        yield from (x for x in args[2:3] if isinstance(x, Tensor) and x.dim() == 0)
    if about.name in _ON_THE_CPU:
        yield args[_ON_THE_CPU[about.name]]
    if about.elementwise:
        written = args[:1] if about.writes else ()
        kept = {id(x) for x in _tensors((written, (kwargs.get("out"),)))}
        yield from (x for x in _tensors((args, kwargs.values())) if x.dim() == 0 and id(x) not in kept)


def _not_deterministic(about: _Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if about.name in ("median", "nanmedian"):
        return about.overload.startswith("dim")
    if about.name == "bincount":
        return (len(args) > 1 and args[1] is not None) or kwargs.get("weights") is not None
    return about.name in _NOT_DETERMINISTIC


def _waits(about: _Operator, args: tuple[Any, ...], marks: list[object]) -> bool:
    if about.name == "copy_":
        return marks[0] is not marks[1] and not (len(args) > 2 and args[2])
    if about.name in ("index", "index_put_", "index_put"):
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return about.name in _WAITING


def _mark_all(result: Any, to: object, about: _Operator) -> None:
    for x in _tensors([result[:1]] if about.name in _ON_THE_CPU else [[result]]):
        mark(x, to)
