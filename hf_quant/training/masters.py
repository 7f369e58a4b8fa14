"""Float32 masters of parameters that are shorter: one update is often smaller than what 16 bits can hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_quant.training.modules import MASTER


class Masters:
    """What an optimizer updates in place of the parameters of a model.

    Args:
        parameters: Of the model, by name. Those in float32, and in float64, are their own masters.

    Attributes:
        values: The masters by name.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.values = {
            name: parameter
            if parameter.dtype.itemsize >= MASTER.itemsize
            else nn.Parameter(parameter.detach().to(MASTER))
            for name, parameter in parameters.items()
        }

    def take_gradients(self) -> None:
        """Hand the gradients of the parameters on to their masters."""
        for parameter, master in self._copies():
            master.grad = None if parameter.grad is None else parameter.grad.to(MASTER)
            parameter.grad = None

    @torch.no_grad()
    def round(self) -> None:
        """Give the parameters the values of their masters, in their own dtype."""
        for parameter, master in self._copies():
            parameter.copy_(master)

    @torch.no_grad()
    def set(self, values: dict[str, Tensor]) -> None:
        """Give masters and parameters new values."""
        for name, master in self.values.items():
            master.copy_(values[name])
        self.round()

    def copied(self) -> dict[str, Tensor]:
        """Copies of the masters, on the CPU."""
        return {name: master.detach().cpu().clone() for name, master in self.values.items()}

    def _copies(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        pairs = [(parameter, self.values[name]) for name, parameter in self.parameters.items()]
        return [(parameter, master) for parameter, master in pairs if master is not parameter]
