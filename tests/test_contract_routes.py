"""Which program serves a call, what the log says of it, and what happens without the library."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import output_of, python
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fused_rnn
from fused_rnn import functional, ops, strategy


def route(caplog: pytest.LogCaptureFixture, call: Callable[[], Any]) -> str:
    with caplog.at_level(logging.DEBUG, "fused_rnn"):
        call()
    return caplog.records[0].getMessage()


def plain(layer: Any, input: Tensor) -> None:
    layer(input)


def no_grad(layer: Any, input: Tensor) -> None:
    with torch.no_grad():
        layer(input)


def by_vmap(layer: Any, input: Tensor) -> None:
    torch.vmap(lambda x: layer(x)[0])(input)


def forward_mode(layer: Any, input: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        layer(torch.autograd.forward_ad.make_dual(input, torch.ones_like(input)))


def on_meta(layer: Any, input: Tensor) -> None:
    layer.to("meta")(input.to("meta"))


def of_complex(layer: Any, input: Tensor) -> None:
    layer.to(torch.complex64)(input.to(torch.complex64))


def traced(layer: Any, input: Tensor) -> None:
    torch.jit.trace(layer, input)


class Watched(Tensor):
    """A subclass that is asked before torch's functions, and so must see one."""

    @classmethod
    def __torch_function__(cls, *args: Any) -> Any:
        return super().__torch_function__(*args)


def of_a_subclass(layer: Any, input: Tensor) -> None:
    layer(input.as_subclass(Watched))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (plain, "gru: fused"),
        (no_grad, "gru: fused"),
        (by_vmap, "gru: reference, because"),
        (forward_mode, "gru: reference, because"),
        (on_meta, "gru: torch, because"),
        (of_complex, "gru: torch, because"),
        (traced, "gru: torch, because"),
        (of_a_subclass, "gru: torch, because a tensor subclass"),
    ],
)
def test_the_log_names_the_route_and_the_reason(
    caplog: pytest.LogCaptureFixture, call: Any, expected: str
) -> None:
    layer, input = fused_rnn.GRU(5, 7), torch.randn(4, 3, 5)
    assert route(caplog, lambda: call(layer, input)).startswith(expected)


@pytest.mark.parametrize(
    ("cudnn_first", "layer", "controls", "expected"),
    [
        (True, fused_rnn.GRU, (), "gru: torch, because cuDNN is faster"),  # 7 units
        (True, fused_rnn.GRU, ("reset",), "gru: fused"),
        (True, fused_rnn.PeepholeLSTM, (), "peephole_lstm: fused"),
        (False, fused_rnn.GRU, (), "gru: fused"),
    ],
)
def test_what_cudnn_has_it_serves(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cudnn_first: bool,
    layer: Any,
    controls: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.setattr(ops, "has_cuda", True)
    monkeypatch.setattr(ops, "cuda_device_off", lambda index: "")
    monkeypatch.setattr(ops, "cudnn_first", cudnn_first)
    monkeypatch.setattr(strategy, "gpu_sizes", lambda gpu: (132, 227 * 1024))
    strategy.cudnn_is_faster.cache_clear()
    monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    with FakeTensorMode(), torch.no_grad():  # a GPU that is not there
        fused = layer(5, 7, device="cuda")
        masks = {name: torch.empty(4, 3, dtype=torch.bool, device="cuda") for name in controls}
        call = functools.partial(fused, torch.empty(4, 3, 5, device="cuda"), **masks)
        with contextlib.suppress(Exception):  # the kernels are not there
            route(caplog, call)
    assert caplog.records[0].getMessage().startswith(expected)


def test_what_is_persistent_on_a_gpu_is_not_left_to_cudnn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(strategy, "gpu_sizes", lambda gpu: (132, 227 * 1024))
    strategy.cudnn_is_faster.cache_clear()

    def why(cell: str, compiling: bool = False, sizes: Tensor | None = None, **sized: int) -> str:
        layer = {"gru": fused_rnn.GRU, "lstm": fused_rnn.LSTM}[cell](4, 32, **sized)
        x = torch.zeros(6, 3, 4) if sizes is None else torch.zeros(6, 4)
        call = functional._Call(cell, x, sizes, None, None, [*layer.parameters()], 1, False, False)
        return functional._why_cudnn(call, compiling)

    assert why("gru") == why("lstm") == ""
    assert why("lstm", proj_size=8).startswith("cuDNN is faster")
    assert why("gru", sizes=torch.tensor([3, 2, 1])).startswith("cuDNN is faster")
    assert why("gru", compiling=True).startswith("compiled calls are cuDNN's")
    with fused_rnn.force_schedule("stepwise"):
        assert why("lstm", proj_size=8) == ""
    # Dynamo traces this, and no function of the library but the ops.
    monkeypatch.delattr(strategy, "forced_schedule")
    assert why("gru", compiling=True).startswith("compiled calls are cuDNN's")


def test_the_log_is_silent_by_default(caplog: pytest.LogCaptureFixture) -> None:
    fused_rnn.GRU(5, 7)(torch.randn(4, 3, 5))
    assert not caplog.records


WITHOUT_LIBRARY = """
import sys, warnings
sys.modules["fused_rnn._C"] = None  # what an unbuilt library looks like to the import
with warnings.catch_warnings(record=True) as log:
    warnings.simplefilter("always")
    import fused_rnn
print(*(str(w.message) for w in log if "fused_rnn" in str(w.message)), sep="\\n")
import torch
ours, theirs = fused_rnn.LSTM(5, 7, 2), torch.nn.LSTM(5, 7, 2)
ours.load_state_dict(theirs.state_dict())
input = torch.randn(4, 3, 5)
torch.testing.assert_close(ours(input), theirs(input))
ours(input)[0].sum().backward()
fused_rnn.GRUCell(5, 7)(input[0]).sum().backward()
"""


def test_without_the_library_everything_runs_after_one_warning() -> None:
    (message,) = output_of(WITHOUT_LIBRARY, FUSED_RNN_STRICT="0").strip().splitlines()
    assert "fused_rnn._C cannot be imported" in message
    assert "build_ext --inplace" in message


def test_strict_refuses_to_run_without_the_library() -> None:
    process = python(WITHOUT_LIBRARY, FUSED_RNN_STRICT="1")
    assert process.returncode != 0
    assert "ImportError: fused_rnn._C cannot be imported" in process.stderr
