"""Numbers as people read them: three digits, SI prefixes, clocks. An unknown number (None, NaN) is `-`."""

import math
import re

UNKNOWN = "-"
_SI = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_COUNTS = ("", "k", "M", "B", "T")


def format_count(number: float | None) -> str:
    """12345 → `12.3k`, 1.1e9 → `1.10B`; whole numbers below 1000 stay as they are."""
    if _unknown(number):
        return UNKNOWN
    if abs(number) < 1000 and number == int(number):
        return str(int(number))
    return _scaled(number, 1000, _COUNTS).replace(" ", "")


def format_flops(flops: float | None) -> str:
    """1.234e15 → `1.23 PFLOP`."""
    return UNKNOWN if _unknown(flops) else _scaled(flops, 1000, _SI) + "FLOP"


def format_bytes(size: float | None) -> str:
    """3 · 2**29 → `1.50 GiB`."""
    return UNKNOWN if _unknown(size) else _scaled(size, 1024, ("", "Ki", "Mi", "Gi", "Ti", "Pi")) + "B"


def parse_bytes(text: str) -> int:
    """`80GiB` → 80 · 2**30, `80GB` → 80 · 10**9. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kKMGTP])(i?)B)", text.strip())
    if match is None:
        raise ValueError("must be a number and a unit, such as 80GiB or 80GB")
    number, prefix, binary = match.groups()
    power = ["", "k", "M", "G", "T", "P"].index(prefix.replace("K", "k"))
    return int(float(number) * (1024 if binary else 1000) ** power)


def format_percent(fraction: float | None) -> str:
    """0.2667 → `26.7%`."""
    return UNKNOWN if _unknown(fraction) else f"{100 * fraction:.1f}%"


def format_loss(loss: float | None) -> str:
    """2.34567 → `2.3457`; a loss that has diverged is shown as it is."""
    return UNKNOWN if loss is None or math.isnan(loss) else f"{loss:.4f}"


def format_ratio(ratio: float | None) -> str:
    """0.6667 → `0.67×`."""
    return UNKNOWN if _unknown(ratio) else f"{ratio:.2f}×"


def format_step_time(seconds: float | None) -> str:
    """0.0412 → `41.2 ms`."""
    if _unknown(seconds):
        return UNKNOWN
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms")) if seconds >= s), (1e-6, "us"))
    return f"{_three_digits(seconds / scale)} {unit}"


def format_clock(seconds: float | None) -> str:
    """3723 → `1:02:03`; from two days on `3d 4h`."""
    if _unknown(seconds):
        return UNKNOWN
    whole = round(seconds)
    if whole >= 2 * 86400:
        return f"{whole // 86400}d {whole % 86400 // 3600}h"
    minutes, seconds_left = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds_left:02}" if hours else f"{minutes}:{seconds_left:02}"


def format_interval(value: float | None, quartiles: tuple[float, float] | list[float] | None) -> str:
    """0.951 and its quartiles → `0.95 [0.93, 0.97]`."""
    return UNKNOWN if _unknown(value) else f"{value:.2f} [{quartiles[0]:.2f}, {quartiles[1]:.2f}]"


def format_setting(value: object) -> str:
    """A config value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def si_prefix(largest: float) -> tuple[float, str]:
    """The factor and the letter that leave `largest` between 1 and 1000; (1, "") below 1000."""
    power = 0
    while power < len(_SI) - 1 and abs(largest) >= 1000.0 ** (power + 1):
        power += 1
    return 1000.0**power, _SI[power]


def _unknown(number: float | None) -> bool:
    return number is None or not math.isfinite(number)


def _scaled(number: float, base: int, prefixes: tuple[str, ...]) -> str:
    """`number` with three digits and a prefix; 999.9 is rounded up into the next one."""
    power = 0
    while abs(number) >= base - 0.5 and power < len(prefixes) - 1:
        number, power = number / base, power + 1
    return f"{_three_digits(number)} {prefixes[power]}"


def _three_digits(number: float) -> str:
    size = abs(number)
    return f"{number:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"
