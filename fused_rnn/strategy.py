"""How threads share a call on the CPU: what is chosen and why, and how to choose otherwise.

    none    one thread, or one for each direction
    rows    each thread has some sequences: no waiting inside a sequence
    units   each thread has some units of every sequence, with a barrier per step
    layers  each thread has some layers, and follows the layer below by a chunk of steps

Two directions have a team of threads each, which shares its direction in one of these ways. The
results are the same bits in all of them.

On CUDA a forward scan has a schedule:

    stepwise    a kernel per step: every call
    persistent  all steps in one launch, the weights resident in shared memory: what fits. It has
                not run on a GPU yet, so it is taken only where it is forced. Backward is stepwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypedDict

import torch

from . import ops


class Plan(TypedDict):
    split: str  # one of the words above
    threads: int  # in all directions together
    blocks: int  # of sequences, walked one after another through all of time
    pack_ih: str  # what is packed for the product with W_ih: "weights", "rows" of x, or "nothing"
    pack_hh: str
    fetch_weights: bool  # where weights are packed: fetched ahead, because they leave L2
    chunk_steps: int  # steps whose input product is made at once
    possible: bool  # False where a forced split cannot run
    reason: str
    against: dict[str, str]  # why each other split was passed over


class Persistent(TypedDict):
    possible: bool
    against: str  # why not
    units: int  # of a block
    blocks: int
    shared_bytes: int  # of a block


NOT_MEASURED = "it has not run on a GPU yet, force_schedule('persistent') takes it"


def gpu_sizes(gpu: int) -> tuple[int, int]:
    """SMs, and bytes of shared memory that a block may have."""
    properties = torch.cuda.get_device_properties(gpu)
    # All of an SM but what the driver keeps of each block, since compute capability 8.0.
    return properties.multi_processor_count, properties.shared_memory_per_multiprocessor - 1024


def persistent_on(gpu: int, cell: str, H: int, dtype: torch.dtype, **facts: bool) -> Persistent:
    """Whether the forward scan can be persistent on that GPU; for `facts` see `_C.schedule`."""
    from . import _C

    sms, shared = gpu_sizes(gpu)
    name = str(dtype).removeprefix("torch.")
    return _C.schedule(cell, H, name, sms=sms, shared_per_block=shared, **facts)


def forced_schedule() -> str | None:
    """What `force_schedule` or the environment asks for now."""
    from . import _C

    return _C.forced_schedule()


def describe_schedule(persistent: Persistent, forced: str | None = None) -> str:
    """Which schedule a forward scan on CUDA has, and why."""
    if forced:
        return f"{forced}: forced"
    blocks = f"{persistent['blocks']} blocks of {persistent['units']} units"
    why = f"{NOT_MEASURED} ({blocks})" if persistent["possible"] else persistent["against"]
    return f"stepwise; not persistent: {why}"


def describe(plan: Plan) -> str:
    """The plan in a sentence: what was chosen and why, and why the others were not."""
    others = "".join(f"; not {split}: {why}" for split, why in plan["against"].items())
    packing = plan["pack_ih"], plan["pack_hh"]
    names = {"weights": "W_ih", "rows": "x"}, {"weights": "W_hh", "rows": "h"}
    packed = [of[what] for of, what in zip(names, packing, strict=True) if what in of]
    ahead = plan["fetch_weights"] and "weights" in packing
    return (
        f"{plan['split']}, {plan['threads']} thread{'s' * (plan['threads'] > 1)}: "
        f"{plan['reason']}{others} (packed: {' and '.join(packed) or 'nothing'}"
        f"{', fetched ahead' * ahead}; "
        f"{plan['blocks']} block{'s' * (plan['blocks'] > 1)} of sequences, "
        f"{plan['chunk_steps']} step{'s' * (plan['chunk_steps'] > 1)} at once)"
    )


@contextmanager
def _forced(function: str, wanted: str | None) -> Iterator[None]:
    if not ops.available:
        raise RuntimeError(f"fused_rnn.{function}: {ops.unavailable_reason}")
    from . import _C

    force = getattr(_C, function)
    before = force(wanted)
    try:
        yield
    finally:
        force(before)


def force_split(split: str | None) -> AbstractContextManager[None]:
    """Within this context, threads share every call as told, in the whole process.

    For measuring and for tests; the environment variable FUSED_RNN_SPLIT does the same for a whole
    run. None leaves the choice to the library.

    Args:
        split: "none", "rows", "units", "layers" or None (see `fused_rnn.strategy`).

    Raises:
        ValueError: there is no such split.
        RuntimeError: at a call that cannot be split so, with the sentence that the log
            (`logging.getLogger("fused_rnn.strategy")`, level DEBUG) has for it.
    """
    return _forced("force_split", split)


def force_schedule(schedule: str | None) -> AbstractContextManager[None]:
    """Within this context, every forward scan on CUDA is scheduled as told, in the whole process.

    For measuring and for tests; the environment variable FUSED_RNN_SCHEDULE does the same for a
    whole run. None leaves the choice to the library.

    Args:
        schedule: "stepwise", "persistent" or None (see `fused_rnn.strategy`).

    Raises:
        ValueError: there is no such schedule.
        RuntimeError: at a call that cannot be persistent, with the reason.
    """
    return _forced("force_schedule", schedule)


if ops.available:
    from . import _C

    if "FUSED_RNN_SPLIT" in os.environ:
        _C.force_split(os.environ["FUSED_RNN_SPLIT"])
    if "FUSED_RNN_SCHEDULE" in os.environ:
        _C.force_schedule(os.environ["FUSED_RNN_SCHEDULE"])
