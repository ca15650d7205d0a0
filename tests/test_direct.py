"""Plain calls go to the kernels without the dispatcher, and nothing else does."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from fused_rnn import modules, ops

freeze_module = importlib.import_module("fused_rnn.freeze")  # the package has a function there

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


def controls(module: Any) -> list[dict[str, Any]]:
    """What a call may be asked besides."""
    if isinstance(module, nn.RNNCellBase):
        return [{}]
    shape = (B, T) if module.batch_first else (T, B)
    reset = torch.arange(T * B).reshape(shape) % 4 == 1
    lengths = torch.tensor([T, 1])
    return [{}, {"lengths": lengths}, {"lengths": lengths, "reset": reset},
            {"reset": reset, "reset_to_initial": True}]  # fmt: skip


@contextlib.contextmanager
def the_long_way() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for owner in (modules, freeze_module):
            patch.setattr(owner, "may_go_direct", lambda: False)
        patch.setattr(ops, "_plain_backward", lambda *_: None)
        yield


def outputs_and_gradients(
    module: Any, run: Callable[..., Any], x: Tensor, hx: Any, **kwargs: Any
) -> list[Tensor]:
    outputs = tensors_of(run(x, hx, **kwargs))
    arguments = [x, *([] if hx is None else tensors_of(hx)), *module.parameters()]
    wanted = [argument for argument in arguments if argument.requires_grad]
    given = [output for output in outputs if output.requires_grad]
    seeds = [torch.ones_like(output) for output in given]
    return outputs + list(torch.autograd.grad(given, wanted, seeds, materialize_grads=True))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("needed", ["everything", "weights", "input", "states", "one weight"])
def test_what_is_recorded_has_the_bits_of_the_op(name: str, needed: str) -> None:
    module = MODULES[name]()
    x, hx = question(module, next(module.parameters()).dtype)
    module.requires_grad_(needed in ("everything", "weights"))
    if needed == "one weight":
        next(module.parameters()).requires_grad_()
    x.requires_grad_(needed in ("everything", "input"))
    for state in tensors_of(hx):
        state.requires_grad_(needed in ("everything", "states"))
    for given in controls(module):
        for states in (None, hx) if needed != "states" else (hx,):
            short = outputs_and_gradients(module, module._short_way, x, states, **given)
            with the_long_way():
                assert module._short_way(x, states) is None
                long = outputs_and_gradients(module, module, x, states, **given)
            for one, other in zip(short, long, strict=True):
                assert one.stride() == other.stride()
                assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["two directions", "GRU"])
@torch.no_grad()
def test_controls_take_the_short_way(name: str) -> None:
    live = MODULES[name]()
    x, hx = question(live)
    for module in (live, fused_rnn.freeze(live)):
        for given in controls(live):
            short = module._short_way(x, hx, **given)
            with the_long_way():
                long = module(x, hx, **given)
            for one, other in zip(tensors_of(short), tensors_of(long), strict=True):
                assert torch.equal(one, other)
        reset = torch.zeros(x.shape[:-1])
        assert module._short_way(x, hx, torch.tensor([T, T + 1])) is None
        assert module._short_way(x, hx, torch.tensor([T, 1], dtype=torch.int32)) is None
        assert module._short_way(x, hx, None, reset) is None
        assert module._short_way(x, hx, None, reset.bool()[:1]) is None


class Looks(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Named(Tensor):
    pass


@pytest.mark.parametrize(
    "context",
    [
        Looks,
        BaseTorchFunctionMode,
        torch.autograd.forward_ad.dual_level,
        torch.profiler.profile,
        lambda: torch.autocast("cpu"),
    ],
)
@pytest.mark.parametrize("kind", [fused_rnn.LSTM, fused_rnn.LSTMCell])
def test_where_somebody_looks_the_op_is_called(
    kind: Any, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = kind(I, H)
    x, hx = question(module)
    plain = ops._plain_backward
    found: list[Any] = []

    def asked(*args: Any) -> Any:
        found.append(plain(*args))
        return found[-1]

    monkeypatch.setattr(ops, "_plain_backward", asked)
    for recording in (False, True):
        with torch.set_grad_enabled(recording):
            result = module._short_way(x, hx)
            with context():
                assert module._short_way(x, hx) is None
    output = tensors_of(result)[0]
    seed = torch.ones_like(output)
    with context():
        output.backward(seed, retain_graph=True)
    output.backward(seed)
    if context is not BaseTorchFunctionMode:  # which has seen the call of backward(), and rests
        assert found[0] is None
    assert found[-1] is not None


def test_a_frozen_layer_records_nothing() -> None:
    live = fused_rnn.LSTM(I, H)
    module = fused_rnn.freeze(live)
    x, hx = question(live)
    assert module._short_way(x, hx) is not None
    assert module._short_way(x.clone().requires_grad_(), hx) is None


def test_nothing_is_recorded_where_gradients_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor computed for backward, which takes time and memory."""

    def forward(*args: Any) -> None:
        raise AssertionError("recorded")

    layer = fused_rnn.LSTM(I, H)
    x, hx = question(layer)
    monkeypatch.setattr(ops.RNNFunction, "forward", forward)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert layer._short_way(x, hx) is not None
    with pytest.raises(AssertionError, match="recorded"):
        layer._short_way(x, hx)


def test_other_python_threads_run_during_a_call() -> None:
    torch.set_num_threads(1)
    layer = fused_rnn.LSTM(64, 256)
    now = time.perf_counter
    seconds, steps = 0.0, 100
    while seconds < 0.3:
        steps *= 2
        x = torch.randn(steps, 16, 64)
        start = now()
        with torch.inference_mode():
            layer._short_way(x, None)
        seconds = now() - start
    gap, last = 0.0, now()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(torch.inference_mode()(layer._short_way), x, None)
        while not call.done():
            gap, last = max(gap, now() - last), now()
    assert call.result() is not None
    assert max(gap, now() - last) < seconds / 2


def test_what_acts_in_training_only_is_left_to_the_op() -> None:
    for options in ({"dropout": 0.5}, {"recompute": True}, {"zoneout": 0.1}):
        layer = fused_rnn.LSTM(I, H, 2, **options)
        x, hx = question(layer)
        assert layer._short_way(x, hx) is None
        with torch.no_grad():
            short = layer.eval()._short_way(x, hx)
        assert (short is None) == ("zoneout" in options)


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
    layer(x, hx)[0].sum().backward()  # from here on each parameter has a gradient
    before = [sys.getrefcount(o) for o in objects]
    for _ in range(100):
        with torch.inference_mode():
            assert all(t.is_inference() for t in tensors_of(layer._short_way(x, hx)))
            assert layer._short_way(x, (hx[0], hx[0][:, :1])) is None
    lengths, reset = torch.tensor([T, 1]), torch.zeros(T, B, dtype=torch.bool)
    for _ in range(100):
        outputs = layer._short_way(x, hx, lengths, reset)
        outputs[0].backward(torch.ones_like(outputs[0]))
        del outputs
    assert [sys.getrefcount(o) for o in objects] == before


def test_without_the_exchange_the_op_is_called() -> None:
    C = ops._C
    assert not C.allow_direct(Tensor, nn.Parameter, None, Tensor.is_neg, (), None, None)
    assert C.call(*("lstm", None, None, 3, {}, [], 1, False, False, None, None, False)) is None
    with pytest.raises(TypeError, match="call takes 12 arguments, got 1"):
        C.call("lstm")
    with pytest.raises(TypeError, match="backward takes 16 arguments, got 1"):
        C.backward(())
