"""`freeze`: the copies it makes, what they compute and refuse, and what they survive."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from layers import complaint, flatten, map_tensors
from processes import output_of, python
from scans import FLOATS, assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import FrozenCell, FrozenLayer, freeze, ops

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "nn.LSTM": lambda **k: nn.LSTM(5, 19, **k),
    "nn.GRU": lambda **k: nn.GRU(5, 19, **k),
    "nn.RNN": lambda **k: nn.RNN(5, 19, nonlinearity="relu", **k),
    "LSTM": lambda **k: fused_rnn.LSTM(5, 19, **k),
    "LSTMP": lambda **k: fused_rnn.LSTM(5, 19, proj_size=3, **k),
    "PeepholeLSTM": lambda **k: fused_rnn.PeepholeLSTM(5, 19, **k),
    "CoupledLSTM": lambda **k: fused_rnn.CoupledLSTM(5, 19, **k),
    "LayerNormLSTM": lambda **k: fused_rnn.LayerNormLSTM(5, 19, **k),
    "LayerNormGRU": lambda **k: fused_rnn.LayerNormGRU(5, 19, **k),
    "GRU": lambda **k: fused_rnn.GRU(5, 19, **k),
    "GRU-before": lambda **k: fused_rnn.GRU(5, 19, reset_after=False, **k),
    "RNN": lambda **k: fused_rnn.RNN(5, 19, **k),
    "IndRNN": lambda **k: fused_rnn.IndRNN(5, 19, **k),
}
CELLS: dict[str, Callable[..., nn.Module]] = {
    "nn.LSTMCell": lambda **k: nn.LSTMCell(5, 19, **k),
    "nn.GRUCell": lambda **k: nn.GRUCell(5, 19, **k),
    "nn.RNNCell": lambda **k: nn.RNNCell(5, 19, nonlinearity="relu", **k),
    "LSTMCell": lambda **k: fused_rnn.LSTMCell(5, 19, **k),
    "PeepholeLSTMCell": lambda **k: fused_rnn.PeepholeLSTMCell(5, 19, **k),
    "CoupledLSTMCell": lambda **k: fused_rnn.CoupledLSTMCell(5, 19, **k),
    "LayerNormLSTMCell": lambda **k: fused_rnn.LayerNormLSTMCell(5, 19, **k),
    "LayerNormGRUCell": lambda **k: fused_rnn.LayerNormGRUCell(5, 19, **k),
    "GRUCell": lambda **k: fused_rnn.GRUCell(5, 19, **k),
    "GRUCell-before": lambda **k: fused_rnn.GRUCell(5, 19, reset_after=False, **k),
    "RNNCell": lambda **k: fused_rnn.RNNCell(5, 19, **k),
    "IndRNNCell": lambda **k: fused_rnn.IndRNNCell(5, 19, **k),
}
T, B = 4, 12
OURS = [kind for kind in LAYERS if not kind.startswith("nn.")]
OUR_CELLS = [kind for kind in CELLS if not kind.startswith("nn.")]
each_layer = pytest.mark.parametrize("kind", LAYERS)
each_of_ours = pytest.mark.parametrize("kind", OURS)
each_cell = pytest.mark.parametrize("kind", CELLS)
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def has_c(layer: nn.Module) -> bool:
    name = getattr(layer, "_description", type(layer).__name__)
    return "LSTM" in name


def state_for(layer: Any, *batch: int) -> Any:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    dtype = next(layer.parameters()).dtype
    h0 = torch.randn(rows, *batch, layer.proj_size or layer.hidden_size).to(dtype)
    return (h0, torch.randn(rows, *batch, layer.hidden_size).to(dtype)) if has_c(layer) else h0


def results(layer: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    with torch.no_grad():
        return flatten(layer(*args, **kwargs))


def assert_frozen_agrees(layer: nn.Module, *args: Any, **kwargs: Any) -> None:
    """To the bit, with the layer of ours that has the same weights, on rows enough for packing."""
    live = fused_rnn.convert(copy.deepcopy(layer)).eval()
    assert_same(results(freeze(layer), *args, **kwargs), results(live, *args, **kwargs))


def layouts() -> dict[str, Callable[[nn.Module, torch.dtype], tuple[tuple[Any, ...], Any]]]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, 5)

    def dense(layer: Any) -> Tensor:
        return random(B, T) if layer.batch_first else random(T, B)

    lengths = torch.randint(0, T + 1, (B,))

    def packed(layer: Any) -> Any:
        counts = lengths.clamp_min(1)
        return pack_padded_sequence(dense(layer), counts, layer.batch_first, enforce_sorted=False)

    def reset(layer: Any) -> Tensor:
        return torch.rand((B, T) if layer.batch_first else (T, B)) < 0.3

    return {
        "dense": lambda layer: ((dense(layer),), {}),
        "state": lambda layer: ((dense(layer), state_for(layer, B)), {}),
        "unbatched": lambda layer: ((random(50),), {}),
        "unbatched state": lambda layer: ((random(50), state_for(layer)), {}),
        "packed": lambda layer: ((packed(layer),), {}),
        "packed state": lambda layer: ((packed(layer), state_for(layer, B)), {}),
        "lengths": lambda layer: ((dense(layer), state_for(layer, B)), {"lengths": lengths.int()}),
        "reset": lambda layer: ((dense(layer),), {"reset": reset(layer).float()}),
        "reset to initial": lambda layer: (
            (dense(layer), state_for(layer, B)),
            {"reset": reset(layer), "lengths": lengths, "reset_to_initial": True},
        ),
        "strided": lambda layer: ((dense(layer).transpose(0, 1).contiguous().transpose(0, 1),), {}),
        "no sequence": lambda layer: (
            (dense(layer)[:0] if layer.batch_first else dense(layer)[:, :0],), {}),
    }  # fmt: skip


STRUCTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"num_layers": 2, "batch_first": True, "bidirectional": True, "bias": False},
}
# A layout is that of the call, a type that of the blocks: all layouts in float32, some in others.
LAYOUTS_AND_DTYPES = [
    (layout, structure, dtype)
    for layout in layouts()
    for structure in STRUCTURES
    for dtype in FLOATS
    if dtype == torch.float32
    or (layout, structure)
    in (("state", "plain"), ("packed state", "all"), ("reset to initial", "all"))
]


@each_layer
@pytest.mark.parametrize(("layout", "structure", "dtype"), LAYOUTS_AND_DTYPES, ids=str)
def test_results_are_those_of_the_layer(
    kind: str, layout: str, structure: str, dtype: torch.dtype
) -> None:
    options = STRUCTURES[structure]
    layer = LAYERS[kind](dtype=dtype, **options)
    args, kwargs = layouts()[layout](layer)
    args = tuple(map_tensors(lambda t: t.to(dtype), arg) for arg in args)
    assert_frozen_agrees(layer, *args, **kwargs)


@each_dtype
@each_cell
@pytest.mark.parametrize("batch", [(1,), (B,), ()], ids=str)
@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "state"])
def test_results_are_those_of_the_cell(
    kind: str, batch: tuple[int, ...], with_state: bool, dtype: torch.dtype
) -> None:
    cell = CELLS[kind](dtype=dtype)
    state = torch.randn(*batch, 19).to(dtype)
    hx = None if not with_state else (state, -state) if has_c(cell) else state
    input = torch.randn(*batch, 5).to(dtype)
    frozen = freeze(cell)
    assert isinstance(frozen, FrozenCell)
    live = fused_rnn.convert(copy.deepcopy(cell))
    torch.testing.assert_close(results(frozen, input, hx), results(live, input, hx))


@each_layer
def test_one_sequence_step_by_step(kind: str) -> None:
    """A stream: the state is carried from call to call."""
    layer = LAYERS[kind](num_layers=2)
    frozen, input, hx, outputs = freeze(layer), torch.randn(6, 1, 5), None, []
    for x in input:
        with torch.no_grad():
            output, hx = frozen(x[None], hx)
        outputs.append(output)
    found = [torch.cat(outputs), *flatten(hx)]
    torch.testing.assert_close(found, results(layer, input))


@each_of_ours
def test_results_do_not_depend_on_threads(kind: str) -> None:
    layer = LAYERS[kind](num_layers=2)
    frozen, input = freeze(layer), torch.randn(9, 2, 5)
    expected = results(frozen, input)
    splits = ["rows", "layers"]
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert_same(results(frozen, input), expected)
        for split in splits:
            with fused_rnn.force_split(split):
                assert_same(results(frozen, input), expected)


class Model(nn.Module):
    """Layers as attributes, in containers, shared, unlisted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5)
        self.encoder = nn.LSTM(5, 5, 2, dropout=0.5)
        self.tied = self.encoder
        self.stack = nn.ModuleList([fused_rnn.GRU(5, 5), nn.ModuleDict({"cell": nn.RNNCell(5, 5)})])
        self.unlisted = [self.encoder]
        self.drop = nn.Dropout(0.5)

    def forward(self, input: Tensor) -> Tensor:
        x, _ = self.encoder(self.embed(input))
        x, _ = self.stack[0](self.drop(x))
        return self.stack[1]["cell"](x[-1])


def test_a_model() -> None:
    model = Model()
    before = copy.deepcopy(model.state_dict())
    parts = dict(model.named_modules())
    outcomes: dict[str, str] = {}
    frozen = freeze(model, report=outcomes.__setitem__)
    assert outcomes == dict.fromkeys(["encoder", "stack.0", "stack.1.cell"], "frozen")
    # What was there stays.
    assert dict(model.named_modules()) == parts
    assert all(part.training for part in parts.values())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_same(list(model.state_dict().values()), list(before.values()))
    # What was made has nothing of it but what is not recurrent.
    assert type(frozen) is Model
    assert isinstance(frozen.encoder, FrozenLayer)
    assert frozen.encoder is frozen.tied is frozen.unlisted[0]
    assert isinstance(frozen.stack[1]["cell"], FrozenCell)
    assert not any(part.training for part in frozen.modules())
    assert list(frozen.state_dict()) == ["embed.weight", "embed.bias"]
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert frozen.embed.weight.data_ptr() != model.embed.weight.data_ptr()
    # It works where gradients are enabled, and does not follow the weights of the model.
    input = torch.randn(4, 3, 3)
    expected = model.eval()(input)
    torch.testing.assert_close(frozen(input), expected.detach())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(frozen(input), expected.detach())


def test_no_second_copy_of_the_recurrent_weights() -> None:
    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "clone" in str(function):
                self.largest = max(self.largest, args[0].numel())
            return function(*args, **(kwargs or {}))

    with Counting() as mode:
        freeze(nn.Sequential(nn.Linear(3, 2), nn.LSTM(2, 64)))
    assert mode.largest <= 6


@each_layer
def test_facts_that_programs_ask_for(kind: str) -> None:
    layer = LAYERS[kind](num_layers=2, batch_first=True, dropout=0.25)
    frozen = freeze(layer)
    for fact in ("input_size", "hidden_size", "num_layers", "batch_first", "bidirectional", "bias",
                 "dropout", "proj_size", "mode"):  # fmt: skip
        assert getattr(frozen, fact) == getattr(layer, fact)
    assert repr(frozen) == f"FrozenLayer({repr(layer).replace('(', ', ', 1)}"
    assert not list(frozen.parameters())
    assert not frozen.state_dict()
    frozen.flatten_parameters()


def test_nothing_is_left_to_freeze_in_a_frozen_model() -> None:
    outcomes: dict[str, str] = {}
    frozen = freeze(freeze(Model()), report=outcomes.__setitem__)
    assert not outcomes
    frozen(torch.randn(4, 3, 3))


def skipped(layer: nn.Module, **options: Any) -> str:
    """Why `layer` is left as it is, in a copy."""
    outcomes: dict[str, str] = {}
    frozen = freeze(nn.Sequential(layer), report=outcomes.__setitem__, **options)
    assert type(frozen[0]) is type(layer)
    assert not frozen[0].training
    return outcomes["0"]


class Subclass(nn.GRU):
    pass


def test_what_cannot_be_frozen_is_copied_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert skipped(Subclass(5, 5)) == "skipped: Subclass is a subclass"
    assert skipped(nn.GRU(5, 5, device="meta")) == "skipped: there are no kernels for meta"
    assert skipped(nn.GRUCell(0, 5)).endswith("without features or without units")
    assert skipped(nn.GRU(5, 5, dtype=torch.complex64)).startswith("skipped: there are no kernels")
    assert skipped(nn.GRU(5, 5), filter_fn=lambda layer, name: name != "0").endswith("said no")
    hooked = nn.GRU(5, 5)
    hooked.register_forward_hook(lambda *args: None)
    assert skipped(hooked) == "skipped: it has hooks"
    pruned = nn.GRU(5, 5)
    prune.random_unstructured(pruned, "weight_hh_l0", 0.5)
    prune.remove(pruned, "weight_hh_l0")
    assert_frozen_agrees(pruned, torch.randn(T, B, 5))
    replaced = nn.GRU(5, 5)
    replaced.forward = replaced.forward
    assert skipped(replaced) == "skipped: its forward has been replaced"
    monkeypatch.setattr(ops, "available", False)
    monkeypatch.setattr(ops, "unavailable_reason", "no compiler")
    assert skipped(nn.GRU(5, 5)) == "skipped: no compiler"


def test_outcomes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fused_rnn"):
        freeze(nn.GRU(5, 5))
    assert caplog.messages == ["the model: frozen"]


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.parametrize")
@pytest.mark.parametrize("parametrization", ["weight_norm", "spectral_norm"])
def test_parametrizations_are_computed_once_and_left_as_they_are(parametrization: str) -> None:
    layer = fused_rnn.LSTM(5, 19)
    getattr(parametrizations, parametrization)(layer, "weight_hh_l0")
    before = copy.deepcopy(layer.state_dict())
    frozen = freeze(layer)
    assert isinstance(frozen, FrozenLayer)
    assert_same(list(layer.state_dict().values()), list(before.values()))
    assert layer.training
    assert layer.parametrizations.weight_hh_l0.training
    input = torch.randn(T, B, 5)
    assert_same(results(frozen, input), results(layer.eval(), input))


# What it refuses:


@each_layer
def test_no_training_mode(kind: str) -> None:
    frozen = freeze(nn.Sequential(LAYERS[kind]()))
    frozen.eval()
    with pytest.raises(RuntimeError, match="FrozenLayer cannot be trained"):
        frozen.train()
    assert not frozen[0].training


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("where", ["input", "hx"])
def test_a_gradient_that_is_not_there_raises(kind: str, where: str) -> None:
    frozen = freeze((LAYERS | CELLS)[kind]())
    batch = (3,) if "Cell" in kind else (1, 3)
    input, state = torch.randn(*batch, 5), torch.randn(*batch, 19)
    (input if where == "input" else state).requires_grad_()
    hx = (state, state) if "LSTM" in kind else state
    with pytest.raises(RuntimeError, match="no gradients"):
        frozen(input, hx)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not flatten(frozen(input, hx))[0].requires_grad
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda x: flatten(frozen(x))[0])(input.detach()[None])
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.jvp(lambda x: flatten(frozen(x))[0], (input.detach(),), (input.detach(),))


@pytest.mark.parametrize("kind", ["LSTM", "LSTMP", "GRU", "RNN"])
@pytest.mark.parametrize(
    "misuse",
    [
        lambda layer: layer(torch.randn(4)),
        lambda layer: layer(torch.randn(2, 2, 2, 5)),
        lambda layer: layer(torch.randn(4, 3, 6)),
        lambda layer: layer(torch.randn(4, 6)),
        lambda layer: layer(torch.randn(0, 3, 5)),
        lambda layer: layer(torch.randn(4, 3, 5).double()),
        lambda layer: layer(torch.randn(4, 3, 5).long()),
        lambda layer: layer(torch.randn(4, 3, 5), torch.randn(1, 3, 19)),
        lambda layer: layer(torch.randn(4, 3, 5), torch.randn(1, 2, 19)),
        lambda layer: layer(torch.randn(4, 3, 5), (torch.randn(1, 2, 19),) * 2),
        lambda layer: layer(torch.randn(4, 3, 5), (torch.randn(1, 3, 18),) * 2),
        lambda layer: layer(torch.randn(4, 3, 5), (torch.randn(3, 19),) * 2),
        lambda layer: layer(torch.randn(4, 3, 5), (torch.randn(1, 3, 19),) * 3),
        lambda layer: layer(torch.randn(4, 3, 5), (None, None)),
        lambda layer: layer(torch.randn(4, 5), (torch.randn(1, 3, 19),) * 2),
        lambda layer: layer(torch.randn(4, 5), torch.randn(1, 3, 19)),
        lambda layer: layer(torch.randn(4, 5), lengths=torch.tensor([4])),
        lambda layer: layer(torch.randn(4, 3, 5), lengths=torch.tensor([4, 4])),
        lambda layer: layer(torch.randn(4, 3, 5), lengths=torch.tensor([4, 4, 5])),
        lambda layer: layer(torch.randn(4, 3, 5), reset=torch.zeros(3, 4)),
    ],
)
def test_errors_of_layers_are_those_of_the_live_layer(kind: str, misuse: Any) -> None:
    layer = LAYERS[kind]()
    frozen = freeze(layer)
    live = results(layer, torch.randn(1, 1, 5))  # both still work afterwards
    with torch.no_grad():
        try:
            expected = complaint(lambda: misuse(layer))
        except AssertionError:  # what one cell refuses, another may take
            misuse(frozen)
        else:
            assert complaint(lambda: misuse(frozen)) == expected
    assert len(results(frozen, torch.randn(1, 1, 5))) == len(live)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize(
    "misuse",
    [
        lambda cell: cell(torch.randn(2, 3, 5)),
        lambda cell: cell(torch.randn(3, 6)),
        lambda cell: cell(torch.randn(3, 5), torch.randn(2, 19)),
        lambda cell: cell(torch.randn(3, 5), torch.randn(2, 3, 19)),
        lambda cell: cell(torch.randn(3, 5), (torch.randn(2, 19),) * 2),
        lambda cell: cell(torch.randn(3, 5), (torch.randn(3, 18),) * 2),
        lambda cell: cell(torch.randn(3, 5), (torch.randn(3, 19),) * 3),
    ],
)
def test_errors_of_cells_are_those_of_the_live_cell(kind: str, misuse: Any) -> None:
    cell = CELLS[kind]()
    frozen = freeze(cell)
    with torch.no_grad():
        assert complaint(lambda: misuse(frozen)) == complaint(lambda: misuse(cell))


def test_a_cell_names_the_dtype_it_was_frozen_in() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.float32, got torch\.float64"):
        freeze(nn.GRUCell(5, 19))(torch.randn(3, 5).double())


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_moving_is_refused(kind: str) -> None:
    model = freeze(nn.Sequential((LAYERS | CELLS)[kind]()))
    for move in (
        lambda: model.half(),
        lambda: model.double(),
        lambda: model.to(torch.bfloat16),
        lambda: model.to("meta"),
    ):
        with pytest.raises(RuntimeError, match="stays as it was packed"):
            move()
    model.float().cpu().to(torch.float32).share_memory()
    model(torch.randn(3, 5))


def test_weights_are_refused_even_where_they_need_not_fit() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.GRU(5, 5))
    frozen = freeze(model)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="1 is frozen and takes no weights"):
            frozen.load_state_dict(model.state_dict(), strict=strict)
    frozen.load_state_dict(frozen.state_dict())
    with pytest.raises(RuntimeError, match="the model is frozen"):
        freeze(model[1]).load_state_dict(model[1].state_dict())


def test_other_devices_raise() -> None:
    for layer, shape in ((nn.LSTM(5, 19), (4, 3, 5)), (nn.LSTMCell(5, 19), (3, 5))):
        with pytest.raises(RuntimeError, match="runs on the CPU"):
            freeze(layer)(torch.randn(shape, device="meta"))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell"])
def test_autocast_computes_in_the_dtype_of_the_weights(kind: str) -> None:
    frozen = freeze((LAYERS | CELLS)[kind]())
    shape = (3, 5) if "Cell" in kind else (4, 3, 5)
    input = torch.randn(shape).bfloat16()
    expected = results(frozen, input.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(results(frozen, input), expected)
        assert_same(results(frozen, input.float()), expected)


# What it survives:


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_copies_and_pickles(kind: str) -> None:
    frozen = freeze((LAYERS | CELLS)[kind]())
    input = torch.randn((3, 5) if "Cell" in kind else (4, 3, 5))
    expected = results(frozen, input)
    for twin in (
        copy.deepcopy(frozen),
        pickle.loads(pickle.dumps(frozen)),
        torch.load(saved(frozen), weights_only=False),
    ):
        assert_same(results(twin, input), expected)
        assert repr(twin) == repr(frozen)


def test_loading_for_another_instruction_set_raises() -> None:
    frozen = freeze(nn.Sequential(nn.LSTM(5, 19)))
    blocks = frozen[0]._arguments[0]
    blocks[0][16] += 1  # in the name of the set, as test_scan has it
    for load in (
        lambda: copy.deepcopy(frozen),
        lambda: torch.load(saved(frozen), weights_only=False),
        lambda: frozen(torch.randn(4, 3, 5)),
    ):
        with pytest.raises(RuntimeError, match="packed for instruction set"):
            load()


@pytest.mark.parametrize("isa", ["default", "avx2"])
def test_a_file_from_another_process(isa: str, tmp_path: Path) -> None:
    """In every pair of sets: the same results, or an error."""
    path = tmp_path / "model.pt"
    frozen = freeze(nn.GRU(5, 19))
    torch.save(frozen, path)
    load = f"import torch, fused_rnn; model = torch.load({str(path)!r}, weights_only=False)"
    if ops._C.isa() == {"default": "baseline"}.get(isa, isa):
        code = f"{load}; print(model(torch.ones(4, 3, 5))[0].double().sum().item())"
        expected = results(frozen, torch.ones(4, 3, 5))[0].double().sum().item()
        assert float(output_of(code, ATEN_CPU_CAPABILITY=isa)) == expected
    else:
        ran = python(load, ATEN_CPU_CAPABILITY=isa)
        assert ran.returncode
        assert "was packed for instruction set" in ran.stderr


def test_loading_elsewhere_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(freeze(nn.GRU(5, 19)))
    with pytest.raises(RuntimeError, match="map_location='cpu'"):
        torch.load(file, weights_only=False, map_location="meta")
    file.seek(0)
    monkeypatch.setattr(ops, "available", False)
    with pytest.raises(RuntimeError, match="needs its kernels"):
        torch.load(file, weights_only=False)


class Head(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.rnn = layer
        self.head = nn.Linear(getattr(layer, "proj_size", 0) or layer.hidden_size, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(flatten(self.rnn(input))[0])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


class Every(nn.Module):
    """One of every kind: compiling and exporting takes a second, whatever is in the model."""

    def __init__(self, kinds: list[str], **options: Any) -> None:
        super().__init__()
        heads = {kind: Head((LAYERS | CELLS)[kind](**options)) for kind in kinds}
        self.heads = nn.ModuleDict(heads)

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        return {kind: head(input) for kind, head in self.heads.items()}


@pytest.mark.parametrize("kinds", [OURS, OUR_CELLS], ids=["layers", "cells"])
def test_compile_gives_one_graph(kinds: list[str]) -> None:
    model = freeze(Every(kinds))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    input = torch.randn((3, 5) if kinds is OUR_CELLS else (4, 3, 5))
    torch.testing.assert_close(compiled(input), model(input))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(input), model(input))


def test_compile_with_states_and_dynamic_sizes() -> None:
    frozen = freeze(fused_rnn.LSTM(5, 7, 2, bidirectional=True))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(frozen, backend=counter, fullgraph=True, dynamic=True)
    for time, batch in ((6, 3), (9, 2), (5, 7)):
        input, state = torch.randn(time, batch, 5), torch.randn(4, batch, 7)
        torch.testing.assert_close(
            flatten(compiled(input, (state, state))), flatten(frozen(input, (state, state)))
        )
    assert counter.frame_count == 1


def test_compile_of_packed_sequences() -> None:
    frozen = freeze(fused_rnn.GRU(5, 7, bidirectional=True))
    input = nn.utils.rnn.pack_sequence([torch.randn(n, 5) for n in (4, 3, 2)])
    compiled = torch.compile(frozen, backend="aot_eager")
    torch.testing.assert_close(flatten(compiled(input)), flatten(frozen(input)))


@pytest.mark.slow
def test_compile_by_inductor() -> None:
    model = freeze(Head(fused_rnn.LSTM(5, 7, 2)))
    input = torch.randn(4, 3, 5)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(input), model(input))


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_dynamic_time_and_batch(strict: bool) -> None:
    model = freeze(Every(OURS, num_layers=2))
    dynamic = ({0: torch.export.Dim("time"), 1: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            model, (torch.randn(4, 3, 5),), dynamic_shapes=dynamic, strict=strict
        )
    found = [node for node in program.graph.nodes if "fused_rnn.frozen" in str(node.target)]
    assert len(found) == len(OURS)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for shape in ((4, 3, 5), (7, 2, 5)):
        input = torch.randn(shape)
        for exported in (program, loaded, program.run_decompositions()):
            torch.testing.assert_close(exported.module()(input), model(input))


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_symbolic_trace_keeps_the_layer_a_leaf(kind: str) -> None:
    model = freeze(nn.Sequential((LAYERS | CELLS)[kind]()))
    graph = torch.fx.symbolic_trace(model)
    assert "0" in [node.target for node in graph.graph.nodes if node.op == "call_module"]
    input = torch.randn(3, 5)
    assert_same(flatten(graph(input)), flatten(model(input)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_trace_says_what_else_there_is(kind: str) -> None:
    frozen, input = freeze((LAYERS | CELLS)[kind]()), torch.randn(3, 5)
    for example in (input,) if "Cell" in kind else (input, input[None]):
        with pytest.raises(RuntimeError, match=r"torch\.export"):
            torch.jit.trace(frozen, example)


def test_frozen_under_inference_mode_and_used_outside() -> None:
    layer, input = fused_rnn.GRU(5, 19), torch.randn(T, B, 5)
    with torch.inference_mode():
        frozen = freeze(layer)
    assert_same(flatten(frozen(input)), results(layer, input))
    with torch.device("meta"):  # where new tensors would go
        frozen.float()
        copy.deepcopy(frozen)


def test_script_says_what_else_there_is() -> None:
    with pytest.raises(NotImplementedError, match=r"torch\.export"):
        torch.jit.script(freeze(nn.LSTM(5, 7)))
