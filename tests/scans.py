"""Questions to a scan, and three ways to answer them: our ops, torch, the float64 reference.

Our ops are those of a backend, the CPU's unless a test asks for the fixture `backend`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from judge import Tensors, judge_draws
from torch import Tensor

import fused_rnn
from fused_rnn import reference
from fused_rnn.reference import Controls


class Backend(NamedTuple):
    """Whose ops are asked, and where they want their tensors."""

    name: str
    namespace: str
    device: str


BACKENDS = {
    "cpu": Backend("cpu", "fused_rnn", "cpu"),
    # The CUDA kernels, executed on the host: tests/emu.
    "emu": Backend("emu", "fused_rnn_emu", "cpu"),
    "cuda": Backend("cuda", "fused_rnn", "cuda"),
}


class Ops:
    """`torch.ops.fused_rnn`, or what the chosen backend has in its place."""

    backend = BACKENDS["cpu"]

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(torch.ops, self.backend.namespace), name)


ops = Ops()
# Of which a library for a test of its own may have some (FUSED_RNN_TYPES).
FLOATS = tuple(getattr(torch, name) for name in fused_rnn._C.build_info()["dtypes"].split())


class Arguments(NamedTuple):
    """The arguments of `torch.ops.fused_rnn.inference` and `forward`, in their order."""

    cell: str
    input: Tensor
    batch_sizes: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    weights: list[Tensor]
    num_layers: int
    bidirectional: bool
    batch_first: bool
    controls: Controls = Controls()

    def given(self) -> tuple[Any, ...]:
        """As the ops take them: without controls, the overload that has none."""
        return (*self[:9], *self.controls) if self.controls.any else self[:9]

    def map(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        """The same question with `function` applied to every floating-point tensor."""
        input = function(self.input)
        return self._replace(
            input=input,
            h0=None if self.h0 is None else function(self.h0),
            c0=None if self.c0 is None else function(self.c0),
            weights=[function(weight) for weight in self.weights],
            controls=self.controls.to(input.dtype),
        )

    def on(self, device: str) -> Arguments:
        """The same question on a device; what the ops read on the CPU stays there."""
        moved = self.map(lambda tensor: tensor.to(device))
        controls = moved.controls
        names = ("reset", "zoneout_mask", "h_mask", "candidate_mask")
        masks = {name: getattr(controls, name) for name in names}
        there = {name: mask.to(device) for name, mask in masks.items() if mask is not None}
        return moved._replace(controls=controls._replace(**there))

    def tensors(self) -> Tensors:
        """Every floating-point tensor by name."""
        named = {"input": self.input, "h0": self.h0, "c0": self.c0}
        named |= {f"weights[{k}]": weight for k, weight in enumerate(self.weights)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def make_arguments(
    cell: str,
    T: int = 5,
    B: int = 3,
    I: int = 6,
    H: int = 7,
    *,
    proj: int = 0,
    layers: int = 1,
    bidirectional: bool = False,
    bias: bool = True,
    batch_first: bool = False,
    batch_sizes: Iterable[int] | None = None,
    lengths: Iterable[int] | None = None,
    reset: float = 0.0,
    reset_to_initial: bool = False,
    zoneout: str = "",
    h_mask: bool = False,
    candidate_mask: bool = False,
    all_c: bool = False,
    state: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Arguments:
    """A random question to a scan; weights as torch.nn draws them.

    `reset` is a probability, `zoneout` "shares" or "mask".
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = fused_rnn._C.cells()[cell]
    facts = reference.CELLS[cell]
    directions = 2 if bidirectional else 1
    R = proj or H

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def weight(*shape: int) -> Tensor:
        uniform = torch.rand(shape, generator=generator) * 2 - 1
        return (uniform / math.sqrt(H)).to(dtype)

    weights = []
    for layer in range(layers):
        for _ in range(directions):
            weights += [weight(numbers["gates"] * H, R * directions if layer else I)]
            weights += [weight(numbers["gates"] * H, R) if numbers["recurrent"] else weight(H)]
            weights += [weight(numbers["gates"] * H) for _ in range(2 if bias else 0)]
            weights += [weight(proj, H)] if proj else []
            if facts.unit_weights and facts.recurrent:
                # Below one: a step of larger gains multiplies every rounding of the one before, and
                # the largest error of many draws is then a matter of luck.
                gains = (1 + weight(facts.gains * H)) / 2
                weights += [torch.cat([weight(facts.diagonals * H), gains])]

    sizes = None if batch_sizes is None else torch.tensor(list(batch_sizes))
    if sizes is not None:
        B = int(sizes[0])
        input = normal(int(sizes.sum()), I)
    else:
        input = normal(B, T, I) if batch_first else normal(T, B, I)
    resets = torch.rand(input.shape[:-1], generator=generator) < reset if reset else None
    has_c = numbers["states"] > 1
    scans, rows = layers * directions, input.shape[:-1].numel()
    states_of_rows = (scans, rows, R + has_c * H)
    mask = torch.rand(states_of_rows, generator=generator) < 0.3 if zoneout == "mask" else None
    kept = torch.rand(scans, B, R, generator=generator) < 0.7
    entering = torch.rand(scans, B, H, generator=generator) < 0.6
    controls = Controls(
        None if lengths is None else torch.tensor(list(lengths), dtype=torch.int64),
        resets,
        reset_to_initial,
        mask,
        *((0.2, 0.4) if zoneout == "shares" else (0.0, 0.0)),
        (kept / 0.7).to(dtype) if h_mask else None,
        (entering / 0.6).to(dtype) if candidate_mask else None,
        all_c and has_c,
    )
    return Arguments(
        cell,
        input,
        sizes,
        normal(layers * directions, B, R) if state else None,
        normal(layers * directions, B, H) if state and has_c else None,
        weights,
        layers,
        bidirectional,
        batch_first,
        controls,
    )


def norms(cell: str) -> bool:
    """Whether it normalises gates, and so needs all units of a step at once."""
    return fused_rnn._C.cells()[cell]["norm_gates"] > 0


def one_sided(weight: Tensor, H: int) -> Tensor:
    """Rows of one sign: with non-negative inputs every term of a unit's sum has its sign."""
    signs = torch.ones(len(weight), dtype=weight.dtype)
    signs[1::2] = -1
    return weight.abs() * signs.view(-1, *[1] * (weight.dim() - 1)) / math.sqrt(H)


def by_reference(args: Arguments) -> tuple[Tensor, ...]:
    """The states and output by `fused_rnn.reference`, in the dtype of the arguments."""
    results = reference.rnn(
        *args[:6],
        num_layers=args.num_layers,
        bidirectional=args.bidirectional,
        batch_first=args.batch_first,
        controls=args.controls,
        dropout=0.0,
        training=False,
    )
    return tuple(result for result in results if result is not None)


def by_torch(args: Arguments) -> tuple[Tensor, ...]:
    """The same by torch's own functions; by the reference for what torch does not have."""
    function = getattr(torch._VF, args.cell, None)
    if function is None or args.controls.any:
        return by_reference(args)
    directions = 2 if args.bidirectional else 1
    per_direction = len(args.weights) // (args.num_layers * directions)
    has_c = fused_rnn._C.cells()[args.cell]["states"] > 1
    h0, c0 = args.h0, args.c0
    if h0 is None:
        B = args.input.shape[0 if args.batch_first else 1]
        B = B if args.batch_sizes is None else int(args.batch_sizes[0])
        weight_hh = args.weights[1]  # [G*H, R]
        R, H = weight_hh.shape[1], weight_hh.shape[0] // fused_rnn._C.cells()[args.cell]["gates"]
        h0 = args.input.new_zeros(args.num_layers * directions, B, R)
        c0 = args.input.new_zeros(args.num_layers * directions, B, H)
    hx = [h0, c0] if has_c else h0
    rest = (args.weights, per_direction >= 4, args.num_layers, 0.0, False, args.bidirectional)
    if args.batch_sizes is None:
        return tuple(function(args.input, hx, *rest, args.batch_first))
    return tuple(function(args.input, args.batch_sizes, hx, *rest))


def by_ops(args: Arguments) -> tuple[Tensor, ...]:
    """The same by `torch.ops.fused_rnn.inference`."""
    args = args.on(ops.backend.device)
    return to_cpu(given(args, ops.inference(*args.given())))


def to_cpu(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.cpu() for tensor in tensors)


def given(args: Arguments, results: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Of the results of an op those that are there for this cell and these controls."""
    count = 1 + fused_rnn._C.cells()[args.cell]["states"] + args.controls.all_c
    return tuple(itertools.islice(results, count))


def packed(args: Arguments) -> tuple[Any, ...]:
    """The arguments of `torch.ops.fused_rnn.frozen` for this question."""
    scans = args.num_layers * (2 if args.bidirectional else 1)
    first = reference.split_weights(args.cell, args.weights, scans)[0]
    blocks = ops.pack(args.cell, args.weights, args.num_layers, args.bidirectional)
    proj = 0 if first.hr is None else first.features
    return *args[:5], blocks, first.units, proj, *args.given()[6:]


def seeds_like(
    outputs: Iterable[Tensor], dtype: torch.dtype | None = None, seed: int = 1
) -> list[Tensor]:
    """Random gradients of the outputs, the same numbers for every dtype that holds `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(output.shape, generator=generator)
        .to(dtype or output.dtype)
        .to(output.device, output.dtype)
        for output in outputs
    ]


def name_outputs(outputs: Iterable[Tensor]) -> Tensors:
    return dict(zip(("output", "h_n", "c_n", "all_c"), outputs, strict=False))


def differentiate(
    function: Callable[[Arguments], tuple[Tensor, ...]], args: Arguments, dtype: torch.dtype
) -> Tensors:
    """Outputs and all gradients of `function`, by autograd."""
    args = args.map(lambda tensor: tensor.detach().requires_grad_())
    outputs = function(args)
    leaves = args.tensors()
    gradients = torch.autograd.grad(outputs, list(leaves.values()), seeds_like(outputs, dtype))
    named = {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: t.detach() for name, t in (name_outputs(outputs) | named).items()}


def differentiate_ops(args: Arguments) -> Tensors:
    """Outputs and all gradients by `torch.ops.fused_rnn.forward` and `backward`."""
    args = args.on(ops.backend.device)
    *outputs, saved = ops.forward(*args.given())
    outputs = given(args, outputs)
    seeds = seeds_like(outputs)
    d_input, d_h0, d_c0, *d_weights = to_cpu(backward(args, list(seeds), saved))
    gradients = args._replace(input=d_input, h0=d_h0, c0=d_c0, weights=d_weights)
    if args.c0 is None:
        gradients = gradients._replace(c0=None)
    if args.h0 is None:
        gradients = gradients._replace(h0=None)
    named = {f"d_{name}": gradient for name, gradient in gradients.tensors().items()}
    return name_outputs(to_cpu(outputs)) | named


def judge_scan(
    cell: str,
    *sizes: int,
    dtype: torch.dtype,
    change: Callable[[Arguments], Arguments] = lambda args: args,
    **options: Any,
) -> None:
    """Judge outputs and gradients of the ops on random questions, after `change`."""
    seed = itertools.count()
    # Two numbers, normalised, are -1 and 1: their gradient is rounding alone, and that of three is
    # so often enough to be luck.
    outputs_only = norms(cell) and sizes[3] < 3

    def draw() -> tuple[Tensors, Tensors, Tensors]:
        args = change(make_arguments(cell, *sizes, dtype=dtype, seed=next(seed), **options))
        if cell.endswith("relu") and dtype.itemsize == 2:
            # Where a rounding decides the side of the kink, no gradient is right or wrong.
            R = args.weights[1].shape[-1]
            args = args.map(Tensor.abs)
            args = args._replace(weights=[one_sided(weight, R) for weight in args.weights])
        fused, plain = differentiate_ops(args), differentiate(by_torch, args, dtype)
        exact = differentiate(by_reference, args.map(Tensor.double), dtype)
        if outputs_only:
            fused, plain, exact = (
                {name: tensor for name, tensor in found.items() if not name.startswith("d_")}
                for found in (fused, plain, exact)
            )
        return fused, plain, exact

    judge_draws(draw)
    if outputs_only:
        judge_scan(cell, *sizes[:3], 5, dtype=dtype, change=change, **options)


def arguments_of_backward(
    args: Arguments, seeds: list[Tensor | None], saved: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Any, ...]:
    question, controls = args.given()[:9], args.given()[9:]
    padded = [*seeds, None, None][: 4 if controls else 3]
    return (*padded, *question, saved, *needs, *controls)


def backward(
    args: Arguments,
    seeds: list[Tensor | None],
    saved: Tensor,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> list[Tensor]:
    """The op's gradients, flat: d_input, d_h0, d_c0, *d_weights."""
    *most, d_weights = ops.backward(*arguments_of_backward(args, seeds, saved, needs))
    return [*most, *d_weights]


def seeds_for(outputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Gradients of output, h_n, c_n[, all_c]; None for what is not there."""
    return [seed if seed.numel() else None for seed in seeds_like(outputs)]


def everything(args: Arguments) -> list[Tensor]:
    """All that forward and backward return."""
    args = args.on(ops.backend.device)
    *outputs, saved = ops.forward(*args.given())
    return [*outputs, *backward(args, seeds_for(tuple(outputs)), saved)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Bit for bit, NaN included."""
    assert len(ours) == len(theirs)
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape, k
        assert torch.equal(a.isnan(), b.isnan()), k
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), k
