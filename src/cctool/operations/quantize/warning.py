"""The warning after a quantization: most of the signal is gone, or the main metric has fallen far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cctool.base.networks import some
from cctool.base.outputs import OUTPUT
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics, Signal
from cctool.data.records import DataSource
from cctool.operations.context import Context
from cctool.operations.judge.task import judge_of
from cctool.operations.quantize.signal import signal_kept
from cctool.options.common import DataOptions
from cctool.tasks.base import Measure
from cctool.tasks.shares import difference_interval

FAR, FAR_OF_ITSELF = 10.0, 0.25
"""A fall of the main metric that is far: in points, and of its earlier value; the smaller of both."""

ERROR_GROWS, ERROR_DB = 2.0, 10.0
"""An error measure that grows by this factor is far, if the signal-to-noise ratio is below so many dB: a
small error can grow many times while the outputs are as good as before."""


def signal_and_warning(
    before: Checkpoint,
    after: Checkpoint,
    source: DataSource | None,
    options: DataOptions,
    context: Context,
    measured: tuple[Sequence[Metrics], Sequence[Metrics]] = ((), ()),
    *,
    trained: bool = False,
) -> tuple[Signal | None, tuple[str, ...]]:
    """The figures of `signal_kept`, and the warning for the notes, which is given, if the network is broken.

    ``measured`` has the metrics before and after. Outputs that a training (``trained``) changed while the
    main metric became better are no loss.
    """
    signal = signal_kept(before, after, source, options, context, trained=trained)
    main = judge_of(before, context).main
    warning = _warning_of(signal, main, _pairs(main, *measured), trained)
    if warning is None:
        return signal, ()
    context.reporter.warn(warning)
    return signal, (warning,)


def _pairs(
    main: Measure, before: Sequence[Metrics], after: Sequence[Metrics]
) -> list[tuple[Metrics, Metrics]]:
    """The splits of which the main metric is known before and after."""
    earlier = {found.split: found for found in before if main.name in found.values}
    return [
        (earlier[found.split], found)
        for found in after
        if found.split in earlier and main.name in found.values
    ]


def _warning_of(
    signal: Signal | None, main: Measure, pairs: Sequence[tuple[Metrics, Metrics]], trained: bool
) -> str | None:
    if signal is None:
        return None
    fallen = _fallen(signal, main, pairs)
    better = trained and not signal.nonfinite and bool(pairs) and _all_better(main, pairs)
    parts = [] if better or not signal.lost else [_of_signal(signal)]
    parts += [] if fallen is None else [fallen]
    if not parts:
        return None
    return (
        f"{'; '.join(parts)}; more bits, --exclude or --layer for single layers, or another --observer may "
        "help"
    )


def _of_signal(signal: Signal) -> str:
    what = (
        "are no numbers"
        if signal.nonfinite
        else f"have a signal-to-noise ratio of {', '.join(_ratios(signal))}"
    )
    decided = (
        ""
        if signal.agreement is None
        else f" and the {signal.agreement_of} decision agrees on {signal.agreement:.1f} %"
    )
    where = "" if signal.lost == (OUTPUT,) else f" of {some(signal.lost)}"
    outputs = "the outputs" if len(signal.lost) != 1 or not where else "its values"
    return (
        f"most of the signal{where} is gone: on {signal.n} {signal.split} images {outputs} {what} against "
        f"the network that came in{decided}"
    )


def _ratios(signal: Signal) -> Iterator[str]:
    for name in signal.lost[:3]:
        ratio = signal.lost_db.get(name)
        shown = "no signal" if ratio is None else f"{ratio:.1f} dB"
        yield shown if len(signal.lost) == 1 else f"{shown} ({name})"


def _fallen(signal: Signal, main: Measure, pairs: Sequence[tuple[Metrics, Metrics]]) -> str | None:
    """How far the main metric of the last split that was measured fell, if that is far and not by chance."""
    if not pairs:
        return None
    before, after = pairs[-1]
    old, new = before.values[main.name], after.values[main.name]
    if main.rising:
        far = old - new > (
            min(FAR, FAR_OF_ITSELF * abs(old)) if main.unit == "%" else FAR_OF_ITSELF * abs(old)
        )
    else:
        far = new > ERROR_GROWS * old and signal.snr_db is not None and signal.snr_db < ERROR_DB
    if not far or (main.share and difference_interval(old, before.n, new, after.n)[1] >= 0):
        return None
    chance = ", which is no chance" if main.share else ""
    change = f"{after.split} {main.title} goes from {main.shown(old)} to {main.shown(new)}"
    return f"{change} (n = {after.n:,}){chance}"


def _all_better(main: Measure, pairs: Sequence[tuple[Metrics, Metrics]]) -> bool:
    return all(
        (after.values[main.name] - before.values[main.name]) * (1 if main.rising else -1) > 0
        for before, after in pairs
    )
