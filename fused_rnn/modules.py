"""The layers and cells: parameters, names and manners of their twins in `torch.nn`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import functional, ops, reference

# By name: a compiler guards the identity of a module that is met in two places with Python.
from .functional import may_go_direct, rnn, step

if TYPE_CHECKING:
    from typing_extensions import Self

Sequences = TypeVar("Sequences", Tensor, PackedSequence)
State = TypeVar("State")
_KIND_OF_INPUT = {2: "unbatched 2-D", 3: "batched 3-D"}


class _LayerCall(Protocol[State]):
    """What a type checker knows of a call of a layer; nn.Module says no more than Any."""

    @overload
    def __call__(
        self,
        input: Sequences,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_to_initial: bool = False,
        return_all_states: Literal[False] = False,
    ) -> tuple[Sequences, State]: ...

    @overload
    def __call__(
        self,
        input: Sequences,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_to_initial: bool = False,
        return_all_states: Literal[True],
    ) -> tuple[Sequences, State, State]: ...


class _CellCall(Protocol[State]):
    def __call__(self, input: Tensor, hx: State | None = None) -> State: ...


class _Twin(nn.Module):
    """What torch's tools expect of an `nn.LSTM` without asking whether it is one."""

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        module = super().__new__(cls)
        if cls.__module__ == __name__:
            mark_as_leaf(module)
        return module

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script compiles the twin, with the same parameters."""
        from .convert import has_twin, to_torch  # convert imports this module

        if not has_twin(self):
            raise NotImplementedError(
                f"torch.jit.script compiles torch.nn's layers, and {type(self).__name__} is none "
                "of them: use torch.compile or torch.export"
            )
        twin: nn.Module = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return to_torch(twin, report=lambda name, outcome: None)


def mark_as_leaf(module: nn.Module) -> None:
    """torch.fx does not trace into a module whose instance says that it is of torch.nn."""
    module.__dict__["__module__"] = "torch.nn"


class _Layer(_Twin, nn.RNNBase):
    """What the layers share: checks, packing, parameters.

    Parameters are read by name at every call, so that parametrizations, pruning, functional_call
    and FSDP are seen. `_flat_weights`, where RNNBase keeps them, is computed when somebody asks.
    """

    # None for none, also in layers that convert() has made. May be set at any time.
    regularisers: functional.Regularisers | None = None
    recompute = False

    def __init__(
        self,
        mode: str,
        *args: Any,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        variational: bool = False,
        candidate_dropout: float = 0.0,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        zoneout_h, zoneout_c = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)
        for name, rate in (
            ("zoneout", zoneout_h),
            ("zoneout", zoneout_c),
            ("recurrent_dropout", recurrent_dropout),
            ("weight_dropout", weight_dropout),
            ("candidate_dropout", candidate_dropout),
        ):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name} should be a number in range [0, 1], got {rate}")
        super().__init__(mode, *args, **kwargs)
        if recompute:
            self.recompute = True
        regularisers = functional.Regularisers(
            *(zoneout_h, zoneout_c, recurrent_dropout, weight_dropout, variational),
            candidate_dropout,
        )
        if any(regularisers):
            self.regularisers = regularisers

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.regularisers is not None:
            none = functional.Regularisers()
            for name, value in self.regularisers._asdict().items():
                text += f", {name}={value}" if value != getattr(none, name) else ""
        return text + (", recompute=True" if self.recompute else "")

    @property
    def _flat_weights(self) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: object) -> None:
        pass

    def _init_flat_weights(self) -> None:
        # No weak references to parameters: they would forbid load_state_dict to swap them.
        self._flat_weight_refs: list[Any] = []

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read every parameter where it is."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.pop("_flat_weights", None)
        self._init_flat_weights()

    @property
    def _cell(self) -> str:
        """Its name in the ops."""
        return self.mode.lower()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _reset_gains(self)

    def _fit_parameters(self) -> None:
        """Parameters in the shapes of the cell; RNNBase has made those of a layer it knows."""
        cell, H = reference.CELLS[self._cell], self.hidden_size
        for names in self._all_weights:
            if cell.unit_weights and cell.recurrent:
                names.append(names[0].replace("weight_ih", cell.unit_weight_name))
            like = getattr(self, names[0])
            for name in names:
                stem = name.rpartition("_l")[0]
                shape: Iterable[int] = (cell.gates * H,)
                if stem == cell.unit_weight_name or (stem == "weight_hh" and not cell.recurrent):
                    shape = (cell.unit_weights * H,)
                elif stem == "weight_hr":
                    shape = getattr(self, name).shape
                elif stem.startswith("weight"):
                    shape = *shape, *getattr(self, name).shape[1:]
                self._parameters.pop(name, None)  # the order of parameters() is that of the ops
                setattr(self, name, nn.Parameter(like.new_empty(shape)))
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self.reset_parameters()

    def _short_way(
        self,
        input: Any,
        hx: Any,
        lengths: Any = None,
        reset: Any = None,
        reset_to_initial: bool = False,
    ) -> Any:
        """What `forward` returns if this is a plain call, else None."""
        own = self.__dict__  # nn.Module's __getattr__ makes self.num_layers ten times as slow
        if (
            self.regularisers is not None
            or (own["dropout"] and own["training"])
            or (self.recompute and torch.is_grad_enabled())
            or not may_go_direct()
        ):
            return None
        return ops.call(  # groups of arguments would be made a list, and then a tuple
            self._cell,
            input,
            hx,
            3,
            own["_parameters"],
            own["_flat_weights_names"],
            own["num_layers"],
            own["bidirectional"],
            own["batch_first"],
            lengths,
            reset,
            reset_to_initial,
        )

    def _run(
        self,
        input: Any,
        hx: Any,
        lengths: Tensor | None = None,
        reset: Any = None,
        reset_to_initial: bool = False,
        return_all_states: bool = False,
    ) -> tuple[Any, Tensor, Tensor | None, Any]:
        """(output, h_n, c_n, all states or None), after torch's checks in torch's order."""
        weights = self._read_weights()
        states: tuple[Tensor, ...] | None = None
        batch_dim = 0 if self.batch_first else 1
        unbatched = False
        packed = isinstance(input, PackedSequence)
        if packed:
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if hx is not None:
                states = self._split(hx)
                if sorted_indices is not None:
                    states = tuple(state.index_select(1, sorted_indices) for state in states)
        else:
            data, batch_sizes = input, None
            dim = data.dim()
            unbatched = dim == 2
            if not unbatched and dim != 3:
                name, noun = ("RNN", " tensor") if "RNN" in self.mode else (self.mode, "")
                raise ValueError(f"{name}: Expected input to be 2D or 3D, got {dim}D{noun} instead")
            if unbatched:
                data = data.unsqueeze(batch_dim)
                if lengths is not None:
                    raise ValueError("lengths belong to a batch, got an unbatched input")
            if hx is not None:
                states = self._split(hx)
                self._check_dims(states, dim)
                if unbatched:
                    states = tuple(state.unsqueeze(1) for state in states)

        if (
            data.dtype != weights[0].dtype  # which autocast allows
            or data.shape[-1] != self.input_size
            or (packed and data.dim() != 2)
        ):
            self.check_input(data, batch_sizes)
        h0 = c0 = None
        if states is not None:
            # To a compiler batch_sizes is data: the op will check.
            if not (packed and torch.compiler.is_compiling()):
                self._check_sizes(states, self.get_expected_hidden_size(data, batch_sizes))
            h0 = states[0]
            c0 = states[1] if len(states) > 1 else None

        if reset is not None:
            reset = _mask(reset, input, unbatched)
            if unbatched:
                reset = reset.unsqueeze(batch_dim)
        output: Any
        output, h_n, c_n, every = self._scan(
            weights, data, batch_sizes, h0, c0, lengths, reset, reset_to_initial, return_all_states
        )
        if packed:
            output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            if unsorted_indices is not None:
                h_n = h_n.index_select(1, unsorted_indices)
                c_n = None if c_n is None else c_n.index_select(1, unsorted_indices)
        elif unbatched:
            output, h_n = output.squeeze(batch_dim), h_n.squeeze(1)
            c_n = None if c_n is None else c_n.squeeze(1)
            if every is not None:
                every = [s if s is None else s.squeeze(batch_dim + 1) for s in every]
        return output, h_n, c_n, every

    def _read_weights(self) -> list[Any]:
        weights = []
        parameters = self._parameters
        for name in self._flat_weights_names:
            weight: Any = parameters.get(name)  # much faster than getattr
            if weight is None:  # a parametrization, pruning or a replica has it elsewhere
                weight = getattr(self, name)
                if weight is None:
                    raise TypeError(f"{name} must be a Tensor, got None")
            weights.append(weight)
        return weights

    def _scan(
        self,
        weights: list[Any],
        data: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        reset: Any,
        reset_to_initial: bool,
        return_all_states: bool,
    ) -> functional.Result:
        return rnn(
            self._cell,
            data,
            batch_sizes,
            h0,
            c0,
            weights,
            num_layers=self.num_layers,
            bidirectional=bool(self.bidirectional),
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            lengths=lengths,
            reset=reset,
            reset_to_initial=reset_to_initial,
            regularisers=self.regularisers,
            return_all_states=return_all_states,
            recompute=self.recompute,
        )

    def _split(self, hx: Any) -> tuple[Tensor, ...]:
        return (hx,)

    def _check_dims(self, states: tuple[Tensor, ...], dim: int) -> None:
        if states[0].dim() != dim:
            raise RuntimeError(
                f"For {_KIND_OF_INPUT[dim]} input, hx should also be {dim}-D "
                f"but got {states[0].dim()}-D tensor"
            )

    def _check_sizes(self, states: tuple[Tensor, ...], expected: tuple[int, int, int]) -> None:
        self.check_hidden_size(states[0], expected)


class LSTM(_Layer):
    """Long short-term memory: `torch.nn.LSTM` with other kernels.

    In every layer and direction, for every step::

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)
        g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)
        c = f * c + i * g
        h = o * tanh(c)         # with proj_size: W_hr (o * tanh(c))

    Equivalent PyTorch code::

        gates = F.linear(x, weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the units.
        num_layers: L; every layer runs over the output of the one below.
        bias: with `bias_ih` and `bias_hh`.
        batch_first: input and output are [B, T, features], the states are not.
        dropout: the probability of a zero between two layers, in training.
        bidirectional: a second scan in every layer, from the end; D = 2, else 1.
        proj_size: R, the features of h if not 0; else R = H.

    Beyond torch.nn, by keyword and for training; the masks come from torch's generator:

        zoneout: the probability that a unit's state stays what it was, or two, for h and for c.
            Outside training the states are the expectation: that share of the old one (Krueger et
            al. 2017). With proj_size h is the projected one.
        recurrent_dropout: the probability that W_hh does not see a unit of h, the same units of a
            sequence at every step (Gal & Ghahramani 2016): with a mask m of 0 and 1 / (1 - p), h in
            the equations above is m * h.
        candidate_dropout: the probability that the candidate g does not enter the memory of a unit,
            the same units of a sequence at every step: c = f * c + i * (m * g). What is remembered
            is kept whole (Semeniuta, Severyn & Barth 2016).
        weight_dropout: the probability of a zero in W_hh, for the whole call (DropConnect; Merity
            et al. 2018).
        variational: `dropout` takes the same features of a sequence at every step (Gal &
            Ghahramani 2016).
        recompute: keep for backward little more than the output and some states, and compute the
            gates again there: less memory, one more forward.

    Inputs: `input` [T, B, I], [T, I] or a PackedSequence; `hx` = (h_0 [L*D, B, R],
    c_0 [L*D, B, H]), without B for [T, I], zeros if None. Beyond torch.nn, by keyword:

        lengths: [B], integers from 0 to T: how many steps of a padded batch each sequence has, in
            any order. Output beyond is zero, h_n and c_n are the states at the length, and the
            second direction starts there.
        reset: [T, B], [B, T] with batch_first, [T] for [T, I], a PackedSequence like `input`;
            bool, or any dtype where not 0 is true. A new sequence begins with this step: the state
            before it is zero, and the second direction sees nothing of what lies beyond either.
        reset_to_initial: a new sequence begins with `hx` instead of zeros.
        return_all_states: also h and c of every layer after every step.

    Outputs: `output` [T, B, D*R], contiguous, or what `input` was; (h_n, c_n) like `hx`. With
    `return_all_states` a third, (h, c): like the output (for a PackedSequence like its data), with
    a leading dimension for the layers, c with D*H features; h[-1] is the output.

    Parameters, those of the second direction with `_reverse` at the end: `weight_ih_l[k]`
    [4*H, I or D*R], `weight_hh_l[k]` [4*H, R], `bias_ih_l[k]`, `bias_hh_l[k]` [4*H],
    `weight_hr_l[k]` [R, H]; the rows in the order i, f, g, o.

    Raises: ValueError, TypeError and RuntimeError where `torch.nn.LSTM` does, in its words, and for
    `lengths` and `reset` that do not go with the input.

    Precision: bfloat16 and float16 are added up in float32, c is float32, h is rounded at every
    step. The same call gives the same bits, whatever the number of threads; with dropout and its
    kin after the same `torch.manual_seed`.

    Hochreiter & Schmidhuber 1997, "Long short-term memory"; Gers, Schmidhuber & Cummins 2000,
    "Learning to forget"; Sak, Senior & Beaufays 2014 for the projection.
    """

    if TYPE_CHECKING:
        __call__: _LayerCall[tuple[Tensor, Tensor]]

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def forward(
        self,
        input: Sequences,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_to_initial: bool = False,
        return_all_states: bool = False,
    ) -> Any:
        if not return_all_states:
            result = self._short_way(input, hx, lengths, reset, reset_to_initial)
            if result is not None:
                return result
        output, h_n, c_n, every = self._run(
            input, hx, lengths, reset, reset_to_initial, return_all_states
        )
        if every is None:
            return output, (h_n, c_n)
        return output, (h_n, c_n), every

    def _split(self, hx: Any) -> tuple[Tensor, ...]:
        return hx[0], hx[1], *hx[2:]  # any more are refused later, as torch does

    def _check_dims(self, states: tuple[Tensor, ...], dim: int) -> None:
        h, c = states[:2]
        if h.dim() != dim or c.dim() != dim:
            raise RuntimeError(
                f"For {_KIND_OF_INPUT[dim]} input, hx and cx should also be {dim}-D "
                f"but got ({h.dim()}-D, {c.dim()}-D) tensors"
            )

    def _check_sizes(self, states: tuple[Tensor, ...], expected: tuple[int, int, int]) -> None:
        self.check_hidden_size(states[0], expected, "Expected hidden[0] size {}, got {}")
        expected = (*expected[:2], self.hidden_size)
        self.check_hidden_size(states[1], expected, "Expected hidden[1] size {}, got {}")
        if len(states) != 2:
            raise RuntimeError("lstm expects two hidden states")

    # Not called here, but part of what a subclass of torch.nn.LSTM may rely on.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]


class PeepholeLSTM(LSTM):
    """LSTM whose gates see the cell state, each unit's own through one weight.

    In every layer and direction, for every step::

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi + w_ci * c)
        f = sigmoid(W_if x + b_if + W_hf h + b_hf + w_cf * c)
        g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        c = f * c + i * g
        o = sigmoid(W_io x + b_io + W_ho h + b_ho + w_co * c)      # the new c
        h = o * tanh(c)         # with proj_size: W_hr (o * tanh(c))

    Equivalent PyTorch code::

        gates = F.linear(x, weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh)
        i, f, g, o = gates.chunk(4, -1)
        w_i, w_f, w_o = weight_ch.chunk(3)
        c = (f + w_f * c).sigmoid() * c + (i + w_i * c).sigmoid() * g.tanh()
        h = (o + w_o * c).sigmoid() * c.tanh()

    Args, Inputs, Outputs, Precision: as for `LSTM`.

    Parameters: those of `LSTM`, and at the end of each layer and direction `weight_ch_l[k]` [3*H],
    in the order i, f, o. ONNX has them as P, in the order i, o, f.

    Raises: as `LSTM`.

    Gers & Schmidhuber 2000, "Recurrent nets that time and count".
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fit_parameters()

    @property
    def _cell(self) -> str:
        return "peephole_lstm"


class CoupledLSTM(LSTM):
    """LSTM whose input gate is what the forget gate leaves: i = 1 - f.

    In every layer and direction, for every step::

        f = sigmoid(W_if x + b_if + W_hf h + b_hf)
        g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)
        c = f * c + (1 - f) * g
        h = o * tanh(c)

    Equivalent PyTorch code::

        gates = F.linear(x, weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh)
        f, g, o = gates.chunk(3, -1)
        c = f.sigmoid() * c + (1 - f.sigmoid()) * g.tanh()
        h = o.sigmoid() * c.tanh()

    Args, Inputs, Outputs, Precision: as for `LSTM`, without `proj_size`.

    Parameters: those of `LSTM` with 3*H rows, in the order f, g, o. ONNX's `input_forget=1` couples
    the other way, f = 1 - i: its i is sigmoid(-f).

    Raises: as `LSTM`.

    Greff et al. 2017, "LSTM: a search space odyssey" (CIFG).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) > 7:
            kwargs["proj_size"] = args[7]
        _refuse_projection(kwargs, "CoupledLSTM")
        super().__init__(*args, **kwargs)
        self._fit_parameters()

    @property
    def _cell(self) -> str:
        return "coupled_lstm"


class LayerNormLSTM(LSTM):
    """LSTM with layer normalisation of both products and of the cell state.

    In every layer and direction, for every step, norm(a) = (a - mean(a)) / sqrt(var(a) + 1e-5)
    over all elements of a::

        [i, f, g, o] = gain_x * norm(W_ih x) + b_ih + gain_h * norm(W_hh h) + b_hh
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(gain_c * norm(c) + shift_c)      # with proj_size: W_hr (...)

    Equivalent PyTorch code::

        def norm(a, gain, shift):
            return F.layer_norm(a, a.shape[-1:], gain, shift)

        gain_x, gain_h, gain_c, shift_c = norm_l0.split([4 * H, 4 * H, H, H])
        gates = norm(F.linear(x, weight_ih), gain_x, bias_ih)
        gates = gates + norm(F.linear(h, weight_hh), gain_h, bias_hh)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * norm(c, gain_c, shift_c).tanh()

    Args, Inputs, Outputs, Precision: as for `LSTM`. Means and variances are those of one step of
    one sequence, in float32 (float64 for float64), in training and outside.

    Parameters: those of `LSTM`, and at the end of each layer and direction `norm_l[k]` [10*H]:
    the gains from 1, shift_c from 0. The biases are the shifts of the other two norms.

    Raises: as `LSTM`.

    Ba, Kiros & Hinton 2016, "Layer normalization", as its supplement has the LSTM.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fit_parameters()

    @property
    def _cell(self) -> str:
        return "layer_norm_lstm"


class GRU(_Layer):
    """Gated recurrent unit: `torch.nn.GRU` with other kernels.

    In every layer and direction, for every step::

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        h = (1 - z) * n + z * h

    The reset gate acts after the product, as in torch and cuDNN. With `reset_after=False` it acts
    before, as in the paper::

        n = tanh(W_in x + b_in + W_hn (r * h) + b_hn)

    Equivalent PyTorch code::

        (x_r, x_z, x_n) = F.linear(x, weight_ih, bias_ih).chunk(3, -1)
        (h_r, h_z, h_n) = F.linear(h, weight_hh, bias_hh).chunk(3, -1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = (x_n + r * h_n).tanh()
        h = (1 - z) * n + z * h

    Args: as for `LSTM`, those beyond torch.nn too, without `proj_size`, and
        reset_after: by keyword; False for the cell of the paper. Weights do not carry over.
    With recurrent_dropout W_hh sees m * h, and with reset_after=False W_hn sees r * (m * h); what z
    keeps is h. With candidate_dropout h = (1 - z) * (m * n) + z * h.

    Inputs: `input` [T, B, I], [T, I] or a PackedSequence; `hx` [L*D, B, H], without B for
    [T, I], zeros if None; `lengths`, `reset`, `reset_to_initial` and `return_all_states` as for
    `LSTM`.

    Outputs: `output` [T, B, D*H], contiguous, or what `input` was; h_n like `hx`. With
    `return_all_states` a third, h after every step: like the output, with a leading dimension for
    the layers.

    Parameters: as for `LSTM`, with 3*H rows in the order r, z, n.

    Raises: ValueError, TypeError and RuntimeError where `torch.nn.GRU` does, in its words.

    Precision: bfloat16 and float16 are added up in float32, h is rounded at every step. Bits as
    for `LSTM`.

    Cho et al. 2014, "Learning phrase representations using RNN encoder-decoder".
    """

    if TYPE_CHECKING:
        __call__: _LayerCall[Tensor]

    reset_after = True  # of layers that convert() has made, too

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, reset_after: bool = True, **kwargs: Any) -> None:
        _refuse_projection(kwargs)
        super().__init__("GRU", *args, **kwargs)
        if not reset_after:
            self.reset_after = False

    @property
    def _cell(self) -> str:
        return "gru" if self.reset_after else "gru_reset_before"

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")

    def forward(
        self,
        input: Sequences,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_to_initial: bool = False,
        return_all_states: bool = False,
    ) -> Any:
        if not return_all_states:
            result = self._short_way(input, hx, lengths, reset, reset_to_initial)
            if result is not None:
                return result
        output, h_n, _, every = self._run(
            input, hx, lengths, reset, reset_to_initial, return_all_states
        )
        return (output, h_n) if every is None else (output, h_n, every[0])


class LayerNormGRU(GRU):
    """GRU with layer normalisation of both products.

    In every layer and direction, for every step, norm(a) = (a - mean(a)) / sqrt(var(a) + 1e-5)
    over all elements of a::

        [x_r, x_z] = gain_x * norm([W_ir x, W_iz x]) + [b_ir, b_iz]
        x_n = gain_x * norm(W_in x) + b_in
        [h_r, h_z], h_n: the same of W_hh h, with gain_h and b_hh
        r = sigmoid(x_r + h_r)
        z = sigmoid(x_z + h_z)
        n = tanh(x_n + r * h_n)
        h = (1 - z) * n + z * h

    Equivalent PyTorch code::

        def norms(a, gain, shift):
            groups = zip(*(t.split([2 * H, H], -1) for t in (a, gain, shift)))
            return [F.layer_norm(a, a.shape[-1:], g, s) for a, g, s in groups]

        gain_x, gain_h = norm_l0.chunk(2)
        x_rz, x_n = norms(F.linear(x, weight_ih), gain_x, bias_ih)
        h_rz, h_n = norms(F.linear(h, weight_hh), gain_h, bias_hh)
        r, z = (x_rz + h_rz).sigmoid().chunk(2, -1)
        n = (x_n + r * h_n).tanh()
        h = (1 - z) * n + z * h

    Args, Inputs, Outputs, Precision: as for `GRU`, without `reset_after`. Means and variances are
    those of one step of one sequence, in float32 (float64 for float64), in training and outside.

    Parameters: those of `GRU`, and at the end of each layer and direction `norm_l[k]` [6*H]:
    the gains, from 1, those of the input first. The biases are the shifts.

    Raises: as `GRU`.

    Ba, Kiros & Hinton 2016, "Layer normalization", as its supplement has the GRU.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_reset_before(kwargs)
        super().__init__(*args, **kwargs)
        self._fit_parameters()

    @property
    def _cell(self) -> str:
        return "layer_norm_gru"


class RNN(_Layer):
    """Elman's recurrent network: `torch.nn.RNN` with other kernels.

    In every layer and direction, for every step, with tanh or relu::

        h = tanh(W_ih x + b_ih + W_hh h + b_hh)

    Equivalent PyTorch code::

        h = (F.linear(x, weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh)).tanh()

    Args: as for `LSTM`, those beyond torch.nn too, without `proj_size` and `candidate_dropout` (the
    memory is h itself, which recurrent_dropout acts on), and
        nonlinearity: "tanh" or "relu", the fourth argument, before `bias`.

    Inputs: `input` [T, B, I], [T, I] or a PackedSequence; `hx` [L*D, B, H], without B for
    [T, I], zeros if None; `lengths`, `reset`, `reset_to_initial` and `return_all_states` as for
    `LSTM`.

    Outputs: `output` [T, B, D*H], contiguous, or what `input` was; h_n like `hx`. With
    `return_all_states` a third, h after every step: like the output, with a leading dimension for
    the layers.

    Parameters: as for `LSTM`, with H rows.

    Raises: ValueError, TypeError and RuntimeError where `torch.nn.RNN` does, in its words.

    Precision: bfloat16 and float16 are added up in float32, h is rounded at every step. Bits as
    for `LSTM`.

    Elman 1990, "Finding structure in time".
    """

    if TYPE_CHECKING:
        __call__: _LayerCall[Tensor]

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projection(kwargs)
        if len(args) > 3:
            nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, **kwargs)
        self.nonlinearity = nonlinearity

    def forward(
        self,
        input: Sequences,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_to_initial: bool = False,
        return_all_states: bool = False,
    ) -> Any:
        if not return_all_states:
            result = self._short_way(input, hx, lengths, reset, reset_to_initial)
            if result is not None:
                return result
        output, h_n, _, every = self._run(
            input, hx, lengths, reset, reset_to_initial, return_all_states
        )
        return (output, h_n) if every is None else (output, h_n, every[0])


class IndRNN(RNN):
    """Independently recurrent network: a unit sees its own past and no other's.

    In every layer and direction, for every step, with relu or tanh::

        h = relu(W_ih x + b_ih + w_hh * h + b_hh)

    Equivalent PyTorch code::

        h = (F.linear(x, weight_ih, bias_ih) + weight_hh * h + bias_hh).relu()

    Args: as for `RNN`, with "relu" as the default of `nonlinearity`, and without recurrent_dropout,
    which hides units from others; there is `dropout` with `variational=True` between the layers.

    Inputs, Outputs, Precision, Raises: as for `RNN`.

    Parameters: those of `RNN`, but `weight_hh_l[k]` is [H], drawn uniformly from 0 to 1: with relu
    a weight w keeps w^t of what was t steps ago, and the paper clips |w| so that this stays within
    bounds over the length of the sequences.

    Li et al. 2018, "Independently recurrent neural network (IndRNN)".
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) <= 3:
            kwargs.setdefault("nonlinearity", "relu")
        super().__init__(*args, **kwargs)
        self._fit_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for names in self._all_weights:
            nn.init.uniform_(getattr(self, names[1]), 0.0, 1.0)

    @property
    def _cell(self) -> str:
        return f"ind{self.mode.lower()}"


def _refuse_projection(kwargs: dict[str, Any], name: str = "RNN or GRU") -> None:
    if "proj_size" in kwargs:
        raise ValueError(f"proj_size argument is only supported for LSTM, not {name}")


def _refuse_reset_before(kwargs: dict[str, Any]) -> None:
    if not kwargs.get("reset_after", True):
        raise ValueError("a GRU with layer normalisation has its reset gate after the product")


def _reset_gains(module: _Layer | _Cell) -> None:
    """As torch.nn.LayerNorm begins: gains are 1 and the shift of c is 0."""
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith("norm"):
            cell = reference.CELLS[module._cell]
            with torch.no_grad():
                # Without slices, which a sharded parameter (FSDP2) would not write through.
                place = torch.ones_like(parameter, dtype=torch.float64).cumsum(0)
                gains = (2 * cell.gates + 1) * module.hidden_size
                parameter.copy_(place.le(gains))


def _mask(reset: Any, input: Any, unbatched: bool) -> Tensor:
    """`reset` as a tensor in the order of `input`."""
    packed = isinstance(input, PackedSequence)
    if packed and isinstance(reset, PackedSequence):
        if not torch.compiler.is_compiling() and _order(reset) != _order(input):
            raise ValueError("reset must be packed like input: other lengths or another order")
        return reset.data
    if not isinstance(reset, Tensor):
        also = " or a PackedSequence" if packed else ""
        raise TypeError(f"reset must be a Tensor{also}, got {type(reset).__name__}")
    if unbatched and reset.shape != input.shape[:1]:
        raise RuntimeError(f"reset must have shape [T] = ({len(input)},), got {tuple(reset.shape)}")
    return reset


def _order(packed: PackedSequence) -> tuple[list[int], list[int]]:
    """How many sequences each step has, and which."""
    sizes: list[int] = packed.batch_sizes.tolist()
    order = packed.sorted_indices
    return sizes, list(range(sizes[0])) if order is None else order.tolist()


_WEIGHTS: tuple[str, ...] = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")  # of a cell


class _Cell(_Twin, nn.RNNCellBase):
    """What the cells share: checks and the step."""

    _unit_weight = ""  # the name of a parameter besides those of torch.nn's cells

    @property
    def _cell(self) -> str:
        """Its name in the ops."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _reset_gains(self)

    def _add_unit_weight(self) -> None:
        """The parameter of a cell that torch.nn does not have."""
        cell = reference.CELLS[self._cell]
        self._unit_weight = cell.unit_weight_name
        weight = self.weight_ih.new_empty(cell.unit_weights * self.hidden_size)
        setattr(self, self._unit_weight, nn.Parameter(weight))
        self.reset_parameters()

    def _tensor(self, name: str) -> Any:
        """The parameter, or what a parametrization, pruning or a replica has in its place."""
        parameter = self._parameters.get(name)  # much faster than getattr
        return getattr(self, name) if parameter is None else parameter

    def _short_way(self, input: Any, hx: Any) -> Any:
        """What `forward` returns if this is a plain call, else None."""
        if not may_go_direct():
            return None
        names = _WEIGHTS if self.bias else _WEIGHTS[:2]
        if self._unit_weight:
            names = *names, self._unit_weight
        parameters = self.__dict__["_parameters"]
        return ops.call(
            self._cell, input, hx, 2, parameters, names, 1, False, False, None, None, False
        )

    def _check_dims(self, name: str, input: Tensor, states: Iterable[Tensor], label: str) -> None:
        for k, tensor in enumerate(chain((input,), states)):
            if tensor.dim() not in (1, 2):
                what = label.format(k - 1) if k else "input"
                raise ValueError(
                    f"{name}: Expected {what} to be 1D or 2D, got {tensor.dim()}D instead"
                )

    def _run(self, input: Tensor, *states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The states after one step, after torch's checks of the sizes."""
        unbatched = input.dim() == 1
        if unbatched:
            input = input.unsqueeze(0)
            states = tuple(state.unsqueeze(0) for state in states)
        B, features = input.shape
        if features != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {features} expected {self.input_size}"
            )
        for k, state in enumerate(states):
            if state.shape[0] != B:
                raise RuntimeError(
                    f"Input batch size {B} doesn't match hidden{k} batch size {state.shape[0]}"
                )
            if state.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{k} has inconsistent hidden_size: got {state.shape[1]}, "
                    f"expected {self.hidden_size}"
                )
        h, c = self._step(
            input, states[0] if states else None, states[1] if len(states) > 1 else None
        )
        if unbatched:
            h, c = h.squeeze(0), None if c is None else c.squeeze(0)
        return h, c

    def _step(
        self, input: Tensor, h: Tensor | None, c: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return step(
            self._cell,
            input,
            h,
            c,
            self._tensor("weight_ih"),
            self._tensor("weight_hh"),
            self._tensor("bias_ih"),
            self._tensor("bias_hh"),
            self._tensor(self._unit_weight) if self._unit_weight else None,
        )


class LSTMCell(_Cell):
    """One step of a long short-term memory: `torch.nn.LSTMCell` with other kernels.

    The equations, the order of the rows, precision and papers: `LSTM`.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the units.
        bias: with `bias_ih` and `bias_hh`.

    Inputs: `input` [B, I] or [I]; `hx` = (h [B, H], c [B, H]), or [H], zeros if None.

    Outputs: (h, c) after the step.

    Parameters: `weight_ih` [4*H, I], `weight_hh` [4*H, H], `bias_ih`, `bias_hh` [4*H].

    Raises: ValueError, TypeError and RuntimeError where `torch.nn.LSTMCell` does, in its words.
    """

    if TYPE_CHECKING:
        __call__: _CellCall[tuple[Tensor, Tensor]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        gates = self._gates
        super().__init__(input_size, hidden_size, bias, gates, device=device, dtype=dtype)

    _op, _gates = "lstm", 4

    @property
    def _cell(self) -> str:
        return self._op

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        result = self._short_way(input, hx)
        if result is not None:
            return result  # type: ignore[no-any-return]
        states: Any = () if hx is None else hx
        self._check_dims("LSTMCell", input, states, "hx[{}]")
        if isinstance(states, Tensor):
            raise TypeError(
                "lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor"
            )
        if hx is not None and len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        h, c = self._run(input, *states)
        assert c is not None
        return h, c


class PeepholeLSTMCell(LSTMCell):
    """One step of an LSTM with peepholes. The equations, order of rows and paper: `PeepholeLSTM`.

    Args, Inputs, Outputs, Raises: as for `LSTMCell`.

    Parameters: those of `LSTMCell`, and `weight_ch` [3*H].
    """

    _op = "peephole_lstm"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_unit_weight()


class CoupledLSTMCell(LSTMCell):
    """One step of a coupled LSTM. The equations, order of rows and paper: `CoupledLSTM`.

    Args, Inputs, Outputs, Raises: as for `LSTMCell`.

    Parameters: those of `LSTMCell`, with 3*H rows.
    """

    _op, _gates = "coupled_lstm", 3


class LayerNormLSTMCell(LSTMCell):
    """One step of an LSTM with layer normalisation. The equations and paper: `LayerNormLSTM`.

    Args, Inputs, Outputs, Raises: as for `LSTMCell`.

    Parameters: those of `LSTMCell`, and `norm` [10*H].
    """

    _op = "layer_norm_lstm"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_unit_weight()


class GRUCell(_Cell):
    """One step of a gated recurrent unit: `torch.nn.GRUCell` with other kernels.

    The equations, the order of the rows, precision and paper: `GRU`.

    Args: as for `LSTMCell`, and
        reset_after: by keyword; False for the cell of the paper, as in `GRU`.

    Inputs: `input` [B, I] or [I]; `hx` [B, H] or [H], zeros if None.

    Outputs: h after the step.

    Parameters: as for `LSTMCell`, with 3*H rows.

    Raises: ValueError and RuntimeError where `torch.nn.GRUCell` does, in its words.
    """

    if TYPE_CHECKING:
        __call__: _CellCall[Tensor]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
        if not reset_after:
            self.reset_after = False

    reset_after = True  # of cells that convert() has made, too

    @property
    def _cell(self) -> str:
        return "gru" if self.reset_after else "gru_reset_before"

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        result = self._short_way(input, hx)
        if result is not None:
            return result  # type: ignore[no-any-return]
        states = () if hx is None else (hx,)
        self._check_dims("GRUCell", input, states, "hidden")
        h, _ = self._run(input, *states)
        return h


class LayerNormGRUCell(GRUCell):
    """One step of a GRU with layer normalisation. The equations and paper: `LayerNormGRU`.

    Args, Inputs, Outputs, Raises: as for `GRUCell`, without `reset_after`.

    Parameters: those of `GRUCell`, and `norm` [6*H].
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_reset_before(kwargs)
        super().__init__(*args, **kwargs)
        self._add_unit_weight()

    @property
    def _cell(self) -> str:
        return "layer_norm_gru"


class RNNCell(_Cell):
    """One step of Elman's network: `torch.nn.RNNCell` with other kernels.

    The equations, precision and paper: `RNN`.

    Args: as for `LSTMCell`, and
        nonlinearity: "tanh" or "relu", after `bias`.

    Inputs: `input` [B, I] or [I]; `hx` [B, H] or [H], zeros if None.

    Outputs: h after the step.

    Parameters: as for `LSTMCell`, with H rows.

    Raises: ValueError and RuntimeError where `torch.nn.RNNCell` does, in its words.
    """

    if TYPE_CHECKING:
        __call__: _CellCall[Tensor]

    __constants__ = [*nn.RNNCellBase.__constants__, "nonlinearity"]  # noqa: RUF012

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    _op = "rnn"

    @property
    def _cell(self) -> str:
        return f"{self._op}_{self.nonlinearity}"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        result = self._short_way(input, hx)
        if result is not None:
            return result  # type: ignore[no-any-return]
        states = () if hx is None else (hx,)
        self._check_dims("RNNCell", input, states, "hidden")
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        h, _ = self._run(input, *states)
        return h


class IndRNNCell(RNNCell):
    """One step of an independently recurrent network. Equation and paper: `IndRNN`.

    Args: as for `RNNCell`, with "relu" as the default of `nonlinearity`.

    Inputs, Outputs, Raises: as for `RNNCell`.

    Parameters: those of `RNNCell`, but `weight_hh` is [H], drawn uniformly from 0 to 1.
    """

    _op = "indrnn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "relu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)
        self.weight_hh = nn.Parameter(self.weight_hh.new_empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.uniform_(self.weight_hh, 0.0, 1.0)


def init_forget_bias_(layer: nn.Module, value: float = 1.0) -> None:
    """Give the forget gates of an LSTM a bias: open gates remember from the first step on.

    For LSTM layers and cells of fused_rnn and torch.nn, in place: `bias_ih` of the gate becomes
    `value` and `bias_hh` zero, since their sum is what counts.

    Raises:
        TypeError: the layer has no forget gate, or no bias.

    Gers, Schmidhuber & Cummins 2000, "Learning to forget"; Jozefowicz, Zaremba & Sutskever 2015,
    "An empirical exploration of recurrent network architectures", for the value 1.
    """
    if not isinstance(layer, LSTM | LSTMCell | nn.LSTM | nn.LSTMCell):
        raise TypeError(f"a forget gate is in an LSTM, got {type(layer).__name__}")
    if not layer.bias:
        raise TypeError("the layer has no bias (bias=False)")
    H = layer.hidden_size
    first = 0 if isinstance(layer, CoupledLSTM | CoupledLSTMCell) else H
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("bias_"):
                parameter[first : first + H] = value if name.startswith("bias_ih") else 0.0
