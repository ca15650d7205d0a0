"""How threads share a call on the CPU: what is chosen and why, and how to choose otherwise.

    none    one thread, or one for each direction
    rows    each thread has some sequences: no waiting inside a sequence
    units   each thread has some units of every sequence, with a barrier per step
    layers  each thread has some layers, and follows the layer below by a chunk of steps

Two directions have a team of threads each, which shares its direction in one of these ways. The
results are the same bits in all of them.

On CUDA a scan, forward or backward, has a schedule:

    stepwise    a kernel or two per step: every call
    persistent  all steps in one launch, the weights resident in shared memory: where they fit, and
                a step is estimated to take less than the launches of one of its own
"""

from __future__ import annotations

import functools
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
    chosen: bool  # possible, and faster than a step of its own
    microseconds: float  # of a step, estimated
    units: int  # of a block
    blocks: int  # that have all units of a sequence
    groups: int  # of such blocks, each with sequences of its own
    rows: int  # sequences of a group
    shared_bytes: int  # of a block


def gpu_sizes(gpu: int) -> tuple[int, int]:
    """SMs, and bytes of shared memory that a block may have."""
    properties = torch.cuda.get_device_properties(gpu)
    # All of an SM but what the driver keeps of each block, since compute capability 8.0.
    return properties.multi_processor_count, properties.shared_memory_per_multiprocessor - 1024


def persistent_on(
    gpu: int, cell: str, B: int, H: int, dtype: torch.dtype, **facts: bool
) -> Persistent:
    """Whether a scan can be persistent on that GPU; for `facts` see `_C.schedule`."""
    from . import _C

    sms, shared = gpu_sizes(gpu)
    name = str(dtype).removeprefix("torch.")
    return _C.schedule(cell, B, H, name, sms=sms, shared_per_block=shared, **facts)


def ways(training: bool) -> tuple[bool, ...]:
    """The scans of a call, by whether they are backward."""
    return (False, True) if training else (False,)


@functools.cache
def cudnn_is_faster(
    gpu: int, cell: str, B: int, H: int, dtype: torch.dtype, training: bool
) -> bool:
    """Whether cuDNN is taken to be, on calls without lengths, controls or projection.

    From timings by hand on an H100: ours are where they are persistent, unless cuDNN has such
    kernels too and they were faster: LSTMs in float16 of many units and few sequences, and
    inference of small GRUs in float32. T is not asked for.
    """
    if cell == "gru" and dtype == torch.float32 and H <= 128 and not training:
        return True
    half = cell == "lstm" and dtype == torch.float16 and H % 128 == 0 and B % 8 == 0
    if half and (512 if training else 128) < H <= 1024 and B < 64:
        return True
    return not all(
        persistent_on(gpu, cell, B, H, dtype, backward=backward)["chosen"]
        for backward in ways(training)
    )


def forced_schedule() -> str | None:
    """What `force_schedule` or the environment asks for now."""
    from . import _C

    return _C.forced_schedule()


def describe_schedule(persistent: Persistent, forced: str | None = None) -> str:
    """Which schedule a scan on CUDA has, and why."""
    if forced:
        return f"{forced}: forced"
    if not persistent["possible"]:
        return f"stepwise; not persistent: {persistent['against']}"
    step = f"a step is estimated to take {persistent['microseconds']:.1f} us"
    if not persistent["chosen"]:
        return f"stepwise; not persistent: {step}, more than its own launches"
    return (
        f"persistent: {step}, less than its own launches ({persistent['groups']} x "
        f"{persistent['blocks']} blocks of {persistent['units']} units, each for "
        f"{persistent['rows']} sequences)"
    )


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
    """Within this context, every scan on CUDA is scheduled as told, in the whole process.

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
