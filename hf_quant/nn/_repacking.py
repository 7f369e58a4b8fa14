"""Codes and scales repacked into the layout of a kernel, invisible to other code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.context import get_spawning_popen
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hf_quant.core.layout import PARTS, WEIGHT, part_name
from hf_quant.core.numerics import same_bits
from hf_quant.core.scheme import QuantScheme
from hf_quant.core.tensor import QuantizedTensor
from hf_quant.kernels import LinearBackend, LinearSpec
from hf_quant.nn._hooks import FORWARD, HOOK, moves_weights
from hf_quant.nn._outside import Outside
from hf_quant.nn._weight import frozen, read

if TYPE_CHECKING:
    from typing_extensions import Self

_handed: WeakKeyDictionary[Any, list[Tensor]] = WeakKeyDictionary()


def _keep_for_child(tensors: Iterable[Tensor]) -> None:
    """Keep tensors alive that are shared with a process being started, until it has begun to read them."""
    child = get_spawning_popen()
    if child is not None:
        _handed.setdefault(child, []).extend(tensors)


class Repacking(Outside):
    """A module whose codes and scales `choose_kernel` may repack, in place of the portable ones.

    ``state_dict``, copies and pickles have the portable layout, and every move of the module chooses a kernel again.
    """

    keeps_layout: bool = False  # True if hooks of accelerate move the codes (offloading)
    _backend: LinearBackend[Any] | None = None
    _repacked: dict[str, Any] = {}  # noqa: RUF012  results of `prepare` by parameter name; replaced, never changed
    _specs: dict[str, LinearSpec]  # by parameter name, as they were when the kernel was chosen

    def choose_kernel(self) -> None:
        """Choose the backend for the device of the parameters, and repack the codes for it."""
        raise NotImplementedError

    def settle(self) -> None:
        """`choose_kernel`, one that leaves the codes in the portable layout if accelerate moves them."""
        self.keeps_layout = moves_weights(self)
        self.choose_kernel()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == FORWARD:  # the state dict that the weights will come from has the portable layout
            self._unpack()
        super().__setattr__(name, value)
        if name == HOOK and self._finished:
            self.settle()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name == HOOK and self._finished:
            self.settle()

    def _schemes(self) -> Mapping[str, QuantScheme]:
        """The scheme of every parameter that holds codes."""
        raise NotImplementedError

    def _quantized(self, name: str) -> QuantizedTensor:
        """The weight in the portable layout; its codes are copied if only a kernel's layout is in memory."""
        restored = {}
        if self._backend is not None and self._emptied(name):
            restored[WEIGHT] = self._backend.restore(self._repacked[name], self._specs[name])
            for part, tensor in self._laid_out_scales(name):
                if 0 in self._part(name, part).shape:
                    restored[part] = tensor
        return read(self, name, self._schemes()[name], restored=restored)

    def _emptied(self, name: str) -> bool:
        """Whether these codes exist only in the layout of a kernel."""
        return name in self._repacked and 0 in self._codes(name).shape

    def _repack(self, name: str, *, shared: bool = False) -> None:
        assert self._backend is not None
        prepared = self._backend.prepare(self._quantized(name).stored, self._specs[name])
        self._repacked = {**self._repacked, name: prepared}
        if shared:
            return
        for part, tensor in self._laid_out_scales(name):  # one copy of scales and codes in memory, not two
            stored = self._part(name, part)
            if same_bits(tensor, stored):
                self._parameters[part_name(name, part)] = frozen(stored.new_empty(*stored.shape[:-1], 0))
        self._set_codes(name, self._codes(name).new_empty(0))

    def _part(self, name: str, part: str) -> Tensor:
        tensor: Tensor = getattr(self, part_name(name, part))
        return tensor

    def _laid_out_scales(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Parts that hold scales and zero points, as the layout of the kernel gives them, in the dtypes of the parameters."""
        scales = getattr(self._backend, "scales", None)
        if scales is not None:
            for part, tensor in scales(self._repacked[name], self._specs[name]).items():
                yield part, tensor.to(self._part(name, part).dtype)

    def _set_codes(self, name: str, codes: Tensor) -> None:
        self._parameters[name] = frozen(codes)
        self._count(name)

    def _portable(self) -> Iterator[tuple[str, Tensor]]:
        """The original parameters of those that `_repack` emptied."""
        for name in self._repacked:
            if self._emptied(name):
                for full, part in self._quantized(name).parts(name).items():
                    if full == name or 0 in getattr(self, full).shape:
                        yield full, part

    def _unpack(self) -> None:
        restored = dict(self._portable())
        for name in sorted(restored, key=self._schemes().__contains__):  # codes last, where sizes are counted
            if name in self._schemes():
                self._set_codes(name, restored[name])
            else:
                self._parameters[name] = frozen(restored[name])
        self._backend, self._repacked = None, {}

    def _finer(self) -> list[nn.Parameter]:
        """Scales in two levels, or of a finer dtype than the module computes in, with the other parts of their weights."""
        finer = [
            name
            for name, scheme in self._schemes().items()
            if scheme.scale_bits is not None or getattr(self, f"{name}_scale").dtype != self.compute_dtype
        ]
        names = [part_name(name, part) for name in finer for part in PARTS]
        return [parameter for name in names if (parameter := self._parameters.get(name)) is not None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        chosen = self._backend is not None
        self._unpack()
        scale = getattr(self, f"{next(iter(self._schemes()))}_scale")
        cast = fn(scale.new_empty(0, dtype=self.compute_dtype)).dtype
        unchanged = [(parameter, parameter.data) for parameter in self._finer()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.compute_dtype = cast
        for parameter, tensor in unchanged:
            if parameter.dtype != tensor.dtype:
                parameter.data = tensor.to(parameter.device)
        if chosen:
            self.choose_kernel()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, codes in self._portable():
            destination[prefix + name] = codes

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        chosen = self._backend is not None
        self._unpack()
        super()._load_from_state_dict(*args, **kwargs)
        if chosen:  # PEFT loads adapters through here too
            self.choose_kernel()

    def __getstate__(self) -> dict[str, Any]:
        """For ``copy.deepcopy`` and pickles: the portable layout, since that of a kernel is for this processor only."""
        state, codes = self.__dict__.copy(), dict(self._portable())
        _keep_for_child(codes.values())
        state["_parameters"] = self._parameters | {name: frozen(tensor) for name, tensor in codes.items()}
        return state | {"_backend": None, "_repacked": {}, "_chosen": self._backend is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        chosen = state.pop("_chosen")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if chosen:
            self.choose_kernel()
