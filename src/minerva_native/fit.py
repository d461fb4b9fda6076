"""How many layers fit: libllama's own dry allocation says what each number of them would take of every device."""

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ._binding import callbacks, ffi, is_lost, lib, thrown
from .devices import Device, described, memory_used
from .errors import ContextError, DeviceError, OptionError
from .options import ContextOptions, context_parameters, head_parameters

if TYPE_CHECKING:
    from .model import Model

MARGIN_BYTES = 1 << 30
"""What `gpu_layers="auto"` leaves free of each device, as llama.cpp does: for others, and for what a driver takes."""

_IMPOSSIBLE = 1 << 62  # bytes

DryRun = Callable[[int], "AbstractContextManager[Model]"]
"""Lends the model with so many layers on the devices, -1 for all, as it would be: it has no memory for its weights."""


def layers_that_fit(dry_run: DryRun, devices: list[Any], context: ContextOptions | None) -> int | None:
    """Return how many layers fit with a context, -1 for all, or None if there is no room even for a context alone.

    Without options it is the context that `Model.context` makes of none, or no context if the model can have no such.
    """
    plan = _Plan(dry_run, devices, context or ContextOptions(), is_automatic=True, is_needed=context is not None)
    return -1 if plan.lack(-1) is None else plan.most(plan.n_layer + 1)


def check_layers(dry_run: DryRun, devices: list[Any], context: ContextOptions | None, layers: int) -> None:
    """Raise `DeviceError`, which says how many fit, if the weights, and a context if there are options, do not."""
    plan = _Plan(dry_run, devices, context, is_automatic=False)
    lack = plan.lack(layers)
    if lack is None:
        return
    device, needed = lack
    wanted = plan.n_layer + 1 if layers < 0 else min(layers, plan.n_layer + 1)
    most = plan.most(wanted)
    what = f"with a context of n_ctx={context.n_ctx}" if context else "for the weights alone"
    remedy = f"ask for at most gpu_layers={most}" if most is not None else "ask for less context, or for devices=[]"
    raise DeviceError(
        f"gpu_layers={layers} does not fit: {what}, {device.name} ({device.description}) would need {needed:,} bytes, "
        f"and has {device.memory_free_bytes:,} free; {remedy}"
    )


class _Plan:
    """What numbers of layers take, and whether that is there.

    Nobody has asked for the devices of an automatic one: a margin is left, and those that do not say what they have are
    not used.

    Attributes:
        n_layer: how many layers the model has, those of MTP heads included, known after the first dry run.
    """

    def __init__(
        self,
        dry_run: DryRun,
        devices: list[Any],
        options: ContextOptions | None,
        is_automatic: bool,
        is_needed: bool = True,  # the context: else it is left out if the model cannot have it
    ):
        self._dry_run, self._pointers, self._options = dry_run, devices, options
        self._is_automatic, self._is_needed = is_automatic, is_needed
        self._devices: list[Device] = []
        self.n_layer = 0

    def lack(self, layers: int) -> tuple[Device, int] | None:
        """Return the first device that has no room for its part, and how much that takes; None if all have."""
        with callbacks.rehearsal(), self._dry_run(layers) as model:
            self.n_layer = model.n_blocks
            try:
                needs = self._needs(model)
            except ContextError:  # a cache larger than a device's largest buffer, say: fewer layers may do, or none
                if not self._is_automatic or not layers:
                    raise
                needs = [_IMPOSSIBLE] * len(self._pointers)
        # Read late, because a driver takes memory when a device is first used.
        self._devices = self._devices or [described(pointer) for pointer in self._pointers]
        margin = MARGIN_BYTES if self._is_automatic else 0
        for device, needed in zip(self._devices, needs, strict=True):
            is_known = device.memory_total_bytes > 0 or self._is_automatic
            if needed and is_known and needed + margin > device.memory_free_bytes:
                return device, needed
        return None

    def most(self, below: int) -> int | None:
        """Return the largest number of layers that fits, less than one that does not; None if 0 does not."""
        fits, too_many = -1, below
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            fits, too_many = (middle, too_many) if self.lack(middle) is None else (fits, middle)
        return None if fits < 0 else fits

    def _needs(self, model: "Model") -> list[int]:
        with contextlib.ExitStack() as made:
            contexts = []
            if self._options is not None:
                try:
                    options = _resolved(model, self._options)
                    contexts.append(dry_context(model, context_parameters(options), made))
                    if options.mtp:
                        contexts.append(dry_context(model, head_parameters(options), made))
                except (ContextError, OptionError):
                    if self._is_needed:
                        raise
                    self._options = None
            with model.raw() as pointer:
                return [sum(memory_used(pointer, contexts, device)) for device in self._pointers]


def _resolved(model: "Model", options: ContextOptions) -> ContextOptions:
    if model.has_learned_positions:  # or it is warned of twice that there are no more
        options = dataclasses.replace(options, n_ctx=min(options.n_ctx, max(2, model.n_ctx_train)))
    return options.resolve(model)


def dry_context(model: "Model", parameters: Any, made: contextlib.ExitStack) -> Any:
    """Return a `llama_context *` of a dry model, which cannot compute; it is freed when `made` is left."""
    with model.raw() as pointer, callbacks.captured_errors() as errors:
        context = lib.minerva_context_new(pointer, parameters, model.connections)
    if context != ffi.NULL:
        made.callback(lib.minerva_context_free, context)
    callbacks.raise_kept()
    if context == ffi.NULL:
        why = thrown() or callbacks.reason(errors, "libllama gives no reason")
        if is_lost():
            raise DeviceError(f"no context could be planned: {why}")
        raise ContextError(f"the model cannot have a context with these options ({why})")
    return context
