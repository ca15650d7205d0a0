"""Models for inference, whose recurrent layers hold packed weights instead of parameters."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from . import functional, modules, ops
from .convert import NAMES, TO_FUSED, Report
from .functional import may_go_direct

_log = logging.getLogger("fused_rnn")
# What can be frozen, and the class whose checks and forward it keeps.
_LIVE: dict[type, Any] = {
    **TO_FUSED,
    **{
        kind: kind
        for kind in vars(modules).values()
        if isinstance(kind, type)
        and issubclass(kind, (modules._Layer, modules._Cell))
        and not kind.__name__.startswith("_")
    },
}


def freeze(
    model: nn.Module,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    report: Report | None = None,
) -> nn.Module:
    """A copy of `model` for inference, faster where a call is short: weights are packed once.

    The copy is in eval mode and none of its parameters requires a gradient. Its recurrent layers,
    torch.nn's and ours, are `FrozenLayer`s and `FrozenCell`s, which are called as before and give
    the same results, but have no parameters: what happens to the weights of `model` later does not
    reach them, and a `state_dict` has nothing of them. A sequence has the same bits in a batch of
    any size. `model` stays as it is, and its recurrent weights are not copied a second time.
    `model` itself may be a layer.

    A frozen layer works under torch.compile and torch.export, and can be copied and pickled, but
    only loaded where the same instruction set is in use (`python -m fused_rnn.info`): elsewhere
    loading raises. Keep the model it was made from.

    Skipped are subclasses, layers with hooks (pruning and the old weight_norm work by them: remove
    these first) or a `forward` of their own, and those that the kernels do not serve: weights that
    are not plain tensors on the CPU, layers without features or units. So are layers with zoneout,
    which acts outside training too. Parametrizations are computed once, as in eval mode.

    Args:
        model: the model, which is not changed.
        filter_fn: called with a layer and its name in the model; False skips it.
        report: called with the name of each recurrent layer and its outcome, "frozen" or
            "skipped: " and why, as in `convert`.
    """
    report = report or (lambda name, outcome: _log.info("%s: %s", name or "the model", outcome))
    frozen: dict[int, Any] = {}  # by the id of the layer: deepcopy takes them for copies made
    for name, layer in model.named_modules():
        kind = parametrize.type_before_parametrizations(layer)
        if kind in _LIVE:
            wanted = filter_fn is None or filter_fn(layer, name)
            made = _freeze(layer) if wanted else "filter_fn said no"
        elif isinstance(layer, (nn.RNNBase, nn.RNNCellBase)) and not isinstance(layer, _Frozen):
            made = f"{kind.__qualname__} is a subclass"
        elif isinstance(layer, torch.jit.ScriptModule) and layer.original_name in NAMES:
            made = "it is TorchScript"
        else:
            continue
        if not isinstance(made, str):
            frozen[id(layer)] = made
        report(name, f"skipped: {made}" if isinstance(made, str) else "frozen")
    twin = copy.deepcopy(model, frozen)
    twin.eval()
    return twin.requires_grad_(False)


def _freeze(layer: Any) -> FrozenLayer | FrozenCell | str:
    """The layer frozen, or why it cannot be."""
    if not ops.available:
        return str(ops.unavailable_reason)
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks"
    if "forward" in vars(layer):
        return "its forward has been replaced"
    regularisers = getattr(layer, "regularisers", None)
    if regularisers is not None and (regularisers.zoneout_h or regularisers.zoneout_c):
        return "it has zoneout, which acts outside training too"
    weights = _weights(layer)
    for weight in weights:
        if type(weight) not in (Tensor, nn.Parameter):
            return f"a weight is a {type(weight).__name__}"
        if not weight.is_cpu:
            return f"there are no kernels for {weight.device.type}"
        if weight.dtype not in functional.FUSED_DTYPES or weight.dtype != weights[0].dtype:
            return f"there are no kernels for {weight.dtype} here"
    if not weights[0].numel():  # weight_ih [G*H, I]
        return "there are no kernels for layers without features or without units"
    kind = FrozenLayer if isinstance(layer, nn.RNNBase) else FrozenCell
    return kind(layer, weights)


def _weights(layer: Any) -> list[Tensor]:
    """As the ops take them; parametrizations are computed as in eval mode."""
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()  # a parametrization may change its own state in training
    try:
        with torch.no_grad(), parametrize.cached():
            if isinstance(layer, nn.RNNBase):
                return [getattr(layer, name) for name in layer._flat_weights_names]
            names = (
                "weight_ih",
                "weight_hh",
                "bias_ih",
                "bias_hh",
                getattr(layer, "_unit_weight", ""),
            )
            tensors: list[Any] = [getattr(layer, name) if name else None for name in names]
            return functional.cell_weights(*tensors)
    finally:
        for module, mode in modes:
            module.training = mode


class _Frozen(nn.Module):
    """What frozen layers and cells share: packed weights, and that nothing changes them."""

    # Facts about the layer that programs ask for.
    _facts: tuple[str, ...] = (
        "input_size",
        "hidden_size",
        "bias",
        "nonlinearity",
        "reset_after",
        "_op",
    )
    _cell = ""  # its name in the ops
    _dim = 3  # of a batched input
    _live: Any  # the class of the layer it was made from: its checks and its forward
    input_size: int
    hidden_size: int

    def _hold(self, layer: Any, weights: Sequence[Tensor], *options: Any) -> None:
        """Everything of `layer`; options: proj_size, num_layers, bidirectional, batch_first."""
        modules.mark_as_leaf(self)
        self.training = False
        kind = parametrize.type_before_parametrizations(layer)
        self._live = _LIVE[kind]
        self._description = f"{kind.__name__}, {layer.extra_repr()}"
        for fact in self._facts:
            for owner in (layer, self._live):  # torch's layers do not have all of ours
                if hasattr(owner, fact):
                    setattr(self, fact, getattr(owner, fact))
                    break
        self._cell = self._live._cell.fget(self)
        self._dtype = weights[0].dtype
        _, num_layers, bidirectional, _ = options
        with torch.inference_mode(False), torch.no_grad():
            packed = ops.pack(self._cell, weights, num_layers, bidirectional)
        # The last arguments of the op.
        self._arguments = packed, self.hidden_size, *options

    def _short_way(
        self,
        input: Any,
        hx: Any,
        lengths: Any = None,
        reset: Any = None,
        reset_to_initial: bool = False,
    ) -> Any:
        if not may_go_direct():
            return None
        own = self.__dict__  # as in modules
        return ops.call_frozen(
            own["_cell"],
            input,
            hx,
            self._dim,
            *own["_arguments"],
            lengths,
            reset,
            reset_to_initial,
        )

    def extra_repr(self) -> str:
        return self._description

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError(
                f"a {type(self).__name__} cannot be trained: its weights are packed. Train the "
                "model that it was made from, and freeze that"
            )
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = fn(torch.empty(0, dtype=self._dtype, device="cpu"))
        if moved.dtype != self._dtype or not moved.is_cpu:
            raise RuntimeError(
                f"a {type(self).__name__} stays as it was packed, {self._dtype} on the CPU: change "
                f"the model that it was made from to {moved.dtype} on {moved.device}, and freeze "
                "that"
            )
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any
    ) -> None:  # the last argument is the list of errors
        if any(key.startswith(prefix) for key in state_dict):
            args[-1].append(
                f"{prefix[:-1] or 'the model'} is frozen and takes no weights: load them into the "
                "model that it was made from, and freeze that"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()  # RNNBase leaves out what is not there

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)  # type: ignore[no-untyped-call]
        if not ops.available:
            raise RuntimeError(
                f"a {type(self).__name__} needs its kernels: {ops.unavailable_reason}"
            )
        packed = self._arguments[0]
        if not all(block.is_cpu for block in packed):
            raise RuntimeError(
                f"a {type(self).__name__} stays on the CPU: load it with map_location='cpu'"
            )
        # The op checks what the weights were packed for, and with no sequences does nothing else.
        shape = [1, 0] if isinstance(self, FrozenLayer) else [0]
        nothing = torch.empty([*shape, self.input_size], dtype=self._dtype, device="cpu")
        ops.frozen(self._cell, nothing, None, None, None, *self._arguments[:-1], False)


class FrozenLayer(_Frozen, modules._Layer):
    """A recurrent layer whose weights are packed, made by `freeze`; it is called as the layer was.

    It has no parameters, no gradients and no training mode: an argument that requires a gradient
    raises where gradients are enabled. Under autocast it computes in the dtype it was frozen in.
    """

    _facts = (*_Frozen._facts, "mode", "num_layers", "batch_first", "dropout", "bidirectional",
              "proj_size")  # fmt: skip

    def __init__(self, layer: nn.RNNBase, weights: Sequence[Tensor]) -> None:
        nn.Module.__init__(self)
        self._flat_weights_names: list[str] = []
        self._all_weights: list[list[str]] = []
        self._hold(
            *(layer, weights, layer.proj_size),
            *(layer.num_layers, bool(layer.bidirectional), bool(layer.batch_first)),
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
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
        return self._live.forward(
            *(self, input, hx),
            lengths=lengths,
            reset=reset,
            reset_to_initial=reset_to_initial,
            return_all_states=return_all_states,
        )

    def _read_weights(self) -> list[Any]:
        return self._flat_weights

    @property
    def _flat_weights(self) -> list[Any]:
        """Of their dtype: torch's checks ask for no more."""
        return [torch.empty(0, dtype=self._dtype)]

    @_flat_weights.setter
    def _flat_weights(self, weights: object) -> None:
        pass

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
        if return_all_states:
            raise RuntimeError(
                "a frozen layer does not return all states: ask the layer that it was made from"
            )
        return functional.frozen(
            *(self._cell, data, batch_sizes, h0, c0, *self._arguments),
            dtype=self._dtype,
            lengths=lengths,
            reset=reset,
            reset_to_initial=reset_to_initial,
        )

    def _split(self, hx: Any) -> tuple[Tensor, ...]:
        states: tuple[Tensor, ...] = self._live._split(self, hx)
        return states

    def _check_dims(self, states: tuple[Tensor, ...], dim: int) -> None:
        self._live._check_dims(self, states, dim)

    def _check_sizes(self, states: tuple[Tensor, ...], expected: tuple[int, int, int]) -> None:
        self._live._check_sizes(self, states, expected)


class FrozenCell(_Frozen, modules._Cell):
    """A recurrent cell whose weights are packed, made by `freeze`; it is called as the cell was.

    No parameters, no gradients, no training mode, autocast: as `FrozenLayer`.
    """

    _dim = 2

    def __init__(self, cell: nn.RNNCellBase, weights: Sequence[Tensor]) -> None:
        nn.Module.__init__(self)
        self._hold(cell, weights, 0, 1, False, False)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return self._live.forward(self, input, hx)

    def _step(
        self, input: Tensor, h: Tensor | None, c: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        output, _, c_n, _ = functional.frozen(
            *(self._cell, input, None, h, c, *self._arguments), dtype=self._dtype
        )
        return output, c_n
