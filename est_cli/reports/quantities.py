"""Numbers as people read them."""

import math

MISSING = "–"
"""For a value that is not there."""
_PREFIXES = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else MISSING


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%" if math.isfinite(fraction) else MISSING


def count(value: float) -> str:
    """1234567 → `1.23M`; below ten thousand all digits."""
    if not math.isfinite(value):
        return MISSING
    if abs(value) < 10_000:
        return f"{value:.0f}"
    scale, letter = prefix(value, largest=1e9)
    return f"{value / scale:.3g}{'B' if letter == 'G' else letter}" if value / scale < 1000 else f"{value:.3g}"


def flops(value: float) -> str:
    """1.5e15 → `1.50 PFLOPs`."""
    if not math.isfinite(value):
        return MISSING
    scale, letter = prefix(value)
    return f"{value / scale:.3g} {letter}FLOPs"


def prefix(value: float, largest: float = 1e24) -> tuple[float, str]:
    """The SI prefix that leaves `value` between 1 and 1000: its factor and its letter."""
    return next(((scale, letter) for scale, letter in _PREFIXES if scale <= largest and abs(value) >= scale), (1.0, ""))


def duration(seconds: float) -> str:
    """7385 → `2 h 3 min`; 0.0123 → `12.3 ms`."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def setting(value: object) -> str:
    """A config value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
