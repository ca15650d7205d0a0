"""Plain inference goes to the kernels without the dispatcher, and nothing else does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from fused_rnn import ops

pytestmark = pytest.mark.skipif(
    not hasattr(Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no exchange by DLPack"
)

T, B, I, H = 3, 2, 5, 7


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for r in result for t in tensors_of(r)]


def question(module: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Any]:
    """An input and states, the input with strides of its own."""
    if isinstance(module, nn.RNNCellBase):
        leading, features = (B,), [H] * (2 if isinstance(module, fused_rnn.LSTMCell) else 1)
        sizes: tuple[int, ...] = (B,)
    else:
        leading = (B, T) if module.batch_first else (T, B)
        features = [module.proj_size or H, H][: 2 if isinstance(module, fused_rnn.LSTM) else 1]
        sizes = (module.num_layers * (2 if module.bidirectional else 1), B)
    x = torch.randn(*leading, I + 2, dtype=dtype)[..., 1:-1]
    states = [torch.randn(*sizes, size, dtype=dtype) for size in features]
    return x, tuple(states) if len(states) > 1 else states[0]


MODULES: dict[str, Callable[[], nn.Module]] = {
    name: lambda kind=kind: kind(I, H)
    for name, kind in vars(fused_rnn).items()
    if isinstance(kind, type) and issubclass(kind, (nn.RNNBase, nn.RNNCellBase))
    and not name.startswith("Frozen")
} | {
    "two directions": lambda: fused_rnn.LSTM(I, H, 2, bidirectional=True, batch_first=True),
    "a projection": lambda: fused_rnn.LSTM(I, H, proj_size=3),
    "no bias": lambda: fused_rnn.GRU(I, H, bias=False),
    "a cell without bias": lambda: fused_rnn.GRUCell(I, H, bias=False),
    "float64": lambda: fused_rnn.LSTM(I, H, dtype=torch.float64),
    "bfloat16": lambda: fused_rnn.GRU(I, H, dtype=torch.bfloat16),
    "float16": lambda: fused_rnn.RNN(I, H, dtype=torch.float16),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_the_short_way_gives_the_bits_of_the_op(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    live = MODULES[name]()
    for module in (live, fused_rnn.freeze(live)):
        x, hx = question(live, next(live.parameters()).dtype)
        for states in (None, hx):
            short = module._short_way(x, states)
            assert short is not None
            with monkeypatch.context() as patch:
                patch.setattr(type(module), "_short_way", lambda *_: None)
                long = module(x, states)
            for one, other in zip(tensors_of(short), tensors_of(long), strict=True):
                assert one.stride() == other.stride()
                assert one.dtype == other.dtype
                assert torch.equal(one, other)
            parts = tensors_of(short)
            assert len({part.untyped_storage().data_ptr() for part in parts}) == len(parts)


class Looks(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Named(Tensor):
    pass


@pytest.mark.parametrize(
    "context",
    [
        torch.enable_grad,
        Looks,
        BaseTorchFunctionMode,
        torch.autograd.forward_ad.dual_level,
        torch.profiler.profile,
        lambda: torch.autocast("cpu"),
    ],
)
@pytest.mark.parametrize("kind", [fused_rnn.LSTM, fused_rnn.LSTMCell])
def test_where_somebody_looks_the_op_is_called(kind: Any, context: Any) -> None:
    module = kind(I, H)
    x, hx = question(module)
    with torch.no_grad(), context():
        assert module._short_way(x, hx) is None
        if context is not torch.enable_grad:
            return
        module.requires_grad_(False)
        assert module._short_way(x, hx) is not None
        assert module._short_way(x.clone().requires_grad_(), hx) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.as_subclass(Named),
        lambda x: torch._neg_view(x),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: x.double(),
        lambda x: torch._efficientzerotensor(x.shape),
        lambda x: x[0],
        lambda x: x.tolist(),
        lambda x: None,
    ],
)
@torch.no_grad()
def test_what_is_no_plain_memory_is_left_to_the_op(change: Callable[[Tensor], Any]) -> None:
    module = fused_rnn.GRU(I, H)
    x, h = question(module)
    assert module._short_way(change(x), h) is None
    if change(h) is not None:
        assert module._short_way(x, change(h)) is None


@torch.no_grad()
def test_negation_that_is_pending_was_not_lost() -> None:
    layer = fused_rnn.LSTM(I, H)
    x, hx = question(layer)
    expected = layer(-x, hx)[0]
    assert torch.equal(layer(torch._neg_view(x), hx)[0], expected)


@torch.no_grad()
def test_weights_are_read_at_every_call() -> None:
    layer = fused_rnn.RNN(I, H)
    x, h = question(layer)
    before = layer(x, h)[0]
    layer.weight_ih_l0 = nn.Parameter(2 * layer.weight_ih_l0)
    assert not torch.equal(layer(x, h)[0], before)
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    assert layer._short_way(x, h) is None


def test_no_reference_is_lost_or_kept() -> None:
    layer = fused_rnn.LSTM(I, H)
    x, hx = question(layer)
    objects = [x, *hx, *layer.parameters()]
    before = [sys.getrefcount(o) for o in objects]
    for _ in range(100):
        with torch.inference_mode():
            assert all(t.is_inference() for t in tensors_of(layer._short_way(x, hx)))
            assert layer._short_way(x, (hx[0], hx[0][:, :1])) is None
    assert [sys.getrefcount(o) for o in objects] == before


def test_without_the_exchange_the_op_is_called() -> None:
    C = ops._C
    assert not C.allow_direct(Tensor, nn.Parameter, None, Tensor.is_neg, ())
    assert C.infer(*("lstm", None, None, 3, {}, [], 1, False, False)) is None
    with pytest.raises(TypeError, match="infer takes 9 arguments, got 1"):
        C.infer("lstm")
