"""Run by test_copies.py: layers that are copied, pickled and handed to a new process give what they gave."""

import copy
import io
import json
import multiprocessing
import pickle
import sys
from typing import Any

import torch
from torch import nn

from hf_quant.core.scheme import QuantScheme
from hf_quant.formats import format_named
from hf_quant.methods import method
from hf_quant.nn import QuantLinear, as_quant_experts
from hf_quant.nn._weight import frozen


class Experts(nn.Module):
    """Like transformers' experts."""

    has_gate, has_bias, is_transposed, num_experts = True, False, False, 3

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 64, 64))
        self.down_proj = nn.Parameter(torch.randn(3, 64, 32))

    def _apply_gate(self, y: torch.Tensor) -> torch.Tensor:
        gate, up = y.chunk(2, -1)
        return torch.sigmoid(gate) * up


def linear(slug: str = "W4A16-g32-asym") -> QuantLinear:
    scheme = QuantScheme.parse(slug)
    layer = QuantLinear(64, 48, scheme, bias=False, dtype=torch.float32)
    fill(layer, "weight", scheme, (48, 64))
    layer.choose_kernel()
    return layer


def fill(module: nn.Module, name: str, scheme: QuantScheme, shape: tuple[int, ...]) -> None:
    flat = torch.randn(shape).view(-1, shape[-1])
    for local, tensor in (
        format_named("native").write(method("rtn", steps=0).quantize(flat, scheme, torch.float32)).items()
    ):
        full = name + local.removeprefix("weight")
        module._parameters[full] = frozen(tensor.view(*shape[:-1], *tensor.shape[1:]))


def experts() -> nn.Module:
    module, scheme = Experts(), QuantScheme(4, 32)
    as_quant_experts(module, {"gate_up_proj": scheme, "down_proj": scheme}, quantized=True)
    fill(module, "gate_up_proj", scheme, (3, 64, 64))
    fill(module, "down_proj", scheme, (3, 64, 32))
    module.choose_kernel()  # type: ignore[operator]
    return module


def output(module: nn.Module) -> torch.Tensor:
    x = torch.linspace(-1, 1, 5 * 64).view(5, 64)
    if isinstance(module, QuantLinear):
        return module(x)
    chosen = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]])
    return module(x, chosen, torch.full((5, 2), 0.5))


def copies(module: nn.Module) -> list[bool]:
    right, file = output(module), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    made = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    made += [copy.deepcopy(made[-1])]
    return [
        type(other) is type(module)
        and torch.equal(output(other), right)
        and set(other.state_dict()) == set(module.state_dict())
        for other in made
    ]


def child(modules: nn.ModuleList, results: Any) -> None:
    results.put([output(module).tolist() for module in modules])


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = nn.ModuleList([*(linear() for _ in range(6)), experts()])
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=child, args=(made, results))
    process.start()
    got = results.get(timeout=100)
    process.join()
    there = got == [output(module).tolist() for module in made]
    found = {"linear": copies(made[0]), "experts": copies(made[-1]), "handed over": there and process.exitcode == 0}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
