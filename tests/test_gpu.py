"""What only a GPU can show: real sizes, streams, graphs, that nothing waits: `pytest -m gpu`."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from judge import Tensors, judge
from layers import (
    BEYOND,
    KINDS,
    has_deciding_kink,
    judged_steps,
    make,
    map_tensors,
    oracle,
    run,
    twins,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(not ops.has_cuda, reason=f"no CUDA kernels: {ops.cuda_off}"),
]
cuda = functools.partial(torch.randn, device="cuda")


@pytest.fixture(autouse=True)
def strict_products(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No TF32, ours and cuDNN's; and every call of a fused layer is fused."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with caplog.at_level(logging.DEBUG, "fused_rnn"):
        yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    routes = [r.getMessage() for r in caplog.records if r.name == "fused_rnn"]
    assert all(route.endswith("fused") for route in routes), routes


def judge_on_gpu(
    kind: str, *sizes: int, dtype: torch.dtype, T: int, B: int, **options: Any
) -> None:
    """Outputs and gradients on the GPU against cuDNN's, where torch has none the reference's."""
    if kind in KINDS:
        ours, theirs = twins(kind, *sizes, dtype=dtype, **options)
    else:
        ours = make(fused_rnn, kind, *sizes, dtype=dtype, **options)
        theirs = ours
    double = copy.deepcopy(theirs).double()
    x = torch.randn(T, B, sizes[0]).to(dtype)
    if has_deciding_kink(theirs):
        x = x.abs()
    exact = run(oracle(double), dict(double.named_parameters()), x.double(), None, dtype)
    ours, theirs, x = ours.cuda(), theirs.cuda(), x.cuda()
    plain_layer = theirs if kind in KINDS else oracle(theirs)
    plain = run(plain_layer, dict(theirs.named_parameters()), x, None, dtype)
    fused = run(ours, dict(ours.named_parameters()), x, None, dtype)
    judge(on_cpu(fused), on_cpu(plain), exact)


def on_cpu(tensors: Tensors) -> Tensors:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *itertools.product(KINDS, (torch.float32, torch.bfloat16, torch.float16)),
        *((kind, torch.float32) for kind in BEYOND),
    ],
    ids=str,
)
def test_accuracy_at_real_sizes(kind: str, dtype: torch.dtype) -> None:
    judge_on_gpu(kind, 256, 512, dtype=dtype, T=judged_steps(kind, 64), B=32)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize(
    ("sizes", "T", "B", "options"),
    [
        ((80, 1024), 100, 64, {}),
        ((128, 128), 200, 1, {"num_layers": 2}),
        ((96, 200), 50, 256, {"bidirectional": True, "num_layers": 2}),
        ((33, 77), 31, 19, {"bidirectional": True, "num_layers": 3}),
    ],
    ids=str,
)
def test_accuracy_of_shapes(
    kind: str, sizes: tuple[int, int], T: int, B: int, options: dict[str, Any]
) -> None:
    judge_on_gpu(kind, *sizes, dtype=torch.float32, T=T, B=B, **options)


@pytest.fixture(params=["stepwise", "persistent"])
def schedule(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of the forward scans; with controls they are stepwise."""
    if request.param == "persistent" and request.node.callspec.params.get("controls"):
        # That such a call refuses to be persistent is asked in test_stepwise.py.
        pytest.skip("resets, lengths and regularisers need a kernel per step (persistent.h)")
    with fused_rnn.force_schedule(request.param):
        yield


each_schedule = pytest.mark.usefixtures("schedule")


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize(
    ("dtype", "H", "B"),
    [
        (torch.float32, 512, 16),
        (torch.float32, 1024, 3),
        (torch.bfloat16, 128, 1),
        (torch.bfloat16, 768, 16),
        (torch.bfloat16, 1024, 64),
        (torch.float16, 512, 33),
    ],
    ids=str,
)
def test_accuracy_of_the_persistent_schedule(kind: str, dtype: torch.dtype, H: int, B: int) -> None:
    with fused_rnn.force_schedule("persistent"):
        judge_on_gpu(kind, 64, H, dtype=dtype, T=64, B=B)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_long_persistent_calls_agree_bit_for_bit(kind: str) -> None:
    """What one block reads too early in one of many steps would differ from call to call."""
    layer = getattr(fused_rnn, kind)(64, 1024, dtype=torch.bfloat16, device="cuda")
    x = cuda(2000, 16, 64, dtype=torch.bfloat16)
    with torch.no_grad(), fused_rnn.force_schedule("persistent"):
        expected = layer(x)[0]
        for _ in range(10):
            assert torch.equal(layer(x)[0], expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], expected, rtol=0.05, atol=0.05)


def test_accuracy_with_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    judge_on_gpu("LSTM", 256, 512, dtype=torch.float32, T=64, B=32)


def test_packed_sequences() -> None:
    ours, theirs = twins("GRU", 64, 128, num_layers=2, bidirectional=True)
    x = torch.randn(40, 16, 64)
    lengths = torch.randint(1, 41, (16,))
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    double = copy.deepcopy(theirs).double()
    exact = run(
        oracle(double),
        dict(double.named_parameters()),
        map_tensors(Tensor.double, packed),
        None,
        torch.float32,
    )
    packed = packed.to("cuda")
    results = [
        on_cpu(run(layer, dict(layer.named_parameters()), packed, None, torch.float32))
        for layer in (ours.cuda(), theirs.cuda())
    ]
    judge(results[0], results[1], exact)


def results_of(layer: nn.Module, x: Tensor, **controls: Any) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    output, *_ = layer(leaf, **controls)
    gradients = torch.autograd.grad(output.square().sum(), [leaf, *layer.parameters()])
    return [output.detach(), *gradients]


def layer_and_input() -> tuple[nn.Module, Tensor]:
    layer = fused_rnn.LSTM(64, 128, num_layers=2, bidirectional=True).cuda()
    return layer, cuda(50, 16, 64)


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@each_schedule
def test_calls_agree_bit_for_bit() -> None:
    layer, x = layer_and_input()
    expected = results_of(layer, x)
    for _ in range(5):
        assert_equal(results_of(layer, x), expected)


@each_schedule
def test_the_current_stream_is_used() -> None:
    """Another one, behind work that makes the input late, forward and in autograd's thread."""
    layer, x = layer_and_input()
    expected = results_of(layer, x)
    late = torch.full_like(x, float("nan"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        found = results_of(layer, late)
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal(found, expected)


@each_schedule
@pytest.mark.parametrize("controls", ["", "lengths"])
def test_nothing_waits_for_the_gpu(controls: str) -> None:
    layer, x = layer_and_input()
    given = {"lengths": torch.randint(1, 51, (16,))} if controls else {}
    results_of(layer, x, **given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results_of(layer, x, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_schedule
@pytest.mark.parametrize("controls", ["", "lengths"])
def test_graphs_capture_forward_and_backward(controls: str) -> None:
    layer, x = layer_and_input()
    given = {"lengths": torch.randint(1, 51, (16,))} if controls else {}
    static = x.clone().requires_grad_()

    def step() -> list[Tensor]:
        output, *_ = layer(static, **given)
        gradients = torch.autograd.grad(output.square().sum(), [static, *layer.parameters()])
        return [output.detach(), *gradients]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    # Whatever the host had at hand while capturing is gone or changed by now.
    if controls:
        lengths = given["lengths"].clone()
        given["lengths"].fill_(1)
        given = {"lengths": lengths}
    for _ in range(2):
        other = cuda(50, 16, 64)
        with torch.no_grad():
            static.copy_(other)
        graph.replay()
        for ours, theirs in zip(captured, results_of(layer, other, **given), strict=True):
            torch.testing.assert_close(ours, theirs)


@each_schedule
def test_memory_is_given_back() -> None:
    layer, x = layer_and_input()
    results_of(layer, x)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        results_of(layer, x)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_used() -> None:
    layer, x = layer_and_input()
    expected = results_of(layer, x)
    found = results_of(layer.to("cuda:1"), x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


def test_more_steps_than_a_grid_has_blocks() -> None:
    """T > 65535, where torch's own layers fail."""
    T = 70_000
    layer = fused_rnn.GRU(3, 8).cuda()
    x = cuda(T, 2, 3)
    output, h_n = layer(x)
    head, h = layer(x[: T - 100])
    tail, end = layer(x[T - 100 :], h)
    torch.testing.assert_close(torch.cat([head, tail]), output)
    torch.testing.assert_close(end, h_n)
    gradient = torch.autograd.grad(output[-1].sum(), layer.weight_ih_l0)[0]
    assert gradient.isfinite().all()


@pytest.mark.slow
def test_more_elements_than_32_bits_count() -> None:
    """Saved values, outputs and inputs beyond 2^31 elements: the tail alone gives what it gives
    behind the rest."""
    T, B, H, tail = 33_000, 64, 1024, 20
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GB")
    layer = fused_rnn.RNN(H, H, dtype=torch.bfloat16).cuda()
    x = torch.empty(T, B, H, dtype=torch.bfloat16, device="cuda").normal_()
    assert x.numel() > 2**31
    x.requires_grad_()
    output, _ = layer(x)
    with torch.no_grad():
        _, h = layer(x[: T - tail])
    last = x.detach()[T - tail :].requires_grad_()
    expected, _ = layer(last, h)
    torch.testing.assert_close(output[T - tail :], expected)
    gradient = torch.autograd.grad(output[-1].float().sum(), x)[0]
    theirs = torch.autograd.grad(expected[-1].float().sum(), last)[0]
    torch.testing.assert_close(gradient[T - tail :], theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_as_torch(dtype: torch.dtype) -> None:
    ours, theirs = twins("LSTM", 16, 32)
    x = cuda(7, 5, 16)
    with torch.autocast("cuda", dtype):
        fused, plain = ours.cuda()(x)[0], theirs.cuda()(x)[0]
    assert fused.dtype == dtype  # cuDNN's layers answer in float16 whatever is asked (torch 2.11)
    torch.testing.assert_close(fused, plain, rtol=0.02, atol=0.02, check_dtype=False)


@pytest.mark.slow
def test_compiles_without_a_break() -> None:
    layer, x = layer_and_input()
    compiled: Callable[..., Any] = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])
