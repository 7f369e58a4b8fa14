"""What outliers add to a product, against float64."""

import pytest
import torch
from torch import Tensor

from hf_quant.core.layout import index_dtype
from hf_quant.core.tensor import Outliers
from hf_quant.kernels import outlier_linear
from hf_quant.kernels._shared import outliers as module

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made(n: int, k: int, r: int, columns: bool, dtype: torch.dtype) -> Outliers:
    index = torch.rand(k).topk(r).indices.sort().values if columns else torch.rand(n, k).topk(r).indices.sort().values
    return Outliers(index.to(DEVICE, index_dtype(k)), torch.randn(n, r).to(DEVICE, dtype))


def dense(outliers: Outliers, n: int, k: int) -> Tensor:
    return outliers.add_to(torch.zeros(n, k, dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize(("m", "n", "k", "r"), [(1, 7, 32, 1), (3, 64, 96, 5), (200, 33, 160, 2), (4, 300, 64, 64)])
def test_equals_float64(
    m: int,
    n: int,
    k: int,
    r: int,
    columns: bool,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHUNK", 64)  # several chunks
    outliers, x = made(n, k, r, columns, dtype), torch.randn(2, m, k, device=DEVICE).to(dtype)
    got = outlier_linear(x, outliers.index, outliers.value)
    expected = x.double() @ dense(outliers, n, k).T
    assert got.shape == (2, m, n) and got.dtype == dtype
    assert (got - expected).norm() < tolerance * expected.norm()
    assert outlier_linear(x[:, :0], outliers.index, outliers.value).shape == (2, 0, n)


@pytest.mark.parametrize("columns", [True, False])
def test_gradient(columns: bool) -> None:
    outliers, x = made(48, 64, 3, columns, torch.float32), torch.randn(5, 64, device=DEVICE, requires_grad=True)
    grad = torch.randn(5, 48, device=DEVICE)
    outlier_linear(x, outliers.index, outliers.value).backward(grad)
    torch.testing.assert_close(x.grad, grad @ dense(outliers, 48, 64).float())


def test_the_op_is_well_formed() -> None:
    outliers, x = made(48, 64, 3, False, torch.float32), torch.randn(5, 64, device=DEVICE, requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(module.outlier_rows, (x, outliers.index, outliers.value), test_utils=checks)
