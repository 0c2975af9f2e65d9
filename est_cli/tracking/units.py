"""Numbers as people read them: three digits, SI prefixes, clocks. An unknown number (None) is `-`."""

_UNKNOWN = "-"
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def format_count(number: float | None) -> str:
    """12345 → `12.3k`; whole numbers below 1000 stay as they are."""
    if number is None:
        return _UNKNOWN
    if abs(number) < 1000 and number == int(number):
        return str(int(number))
    return _scaled(number, 1000, _PREFIXES).replace(" ", "")


def format_flops(flops: float | None) -> str:
    """1.234e15 → `1.23 PFLOP`."""
    return _UNKNOWN if flops is None else _scaled(flops, 1000, _PREFIXES) + "FLOP"


def format_bytes(size: float | None) -> str:
    """3 · 2**29 → `1.50 GiB`."""
    return _UNKNOWN if size is None else _scaled(size, 1024, ("", "Ki", "Mi", "Gi", "Ti", "Pi")) + "B"


def format_percent(fraction: float | None) -> str:
    """0.2667 → `26.7%`."""
    return _UNKNOWN if fraction is None else f"{100 * fraction:.1f}%"


def format_loss(loss: float | None) -> str:
    return _UNKNOWN if loss is None else f"{loss:.3f}"


def format_step_time(seconds: float | None) -> str:
    """0.0412 → `41.2 ms`."""
    if seconds is None:
        return _UNKNOWN
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms")) if seconds >= s), (1e-6, "us"))
    return f"{_three_digits(seconds / scale)} {unit}"


def format_clock(seconds: float | None) -> str:
    """3723 → `1:02:03`; from two days on `3d 4h`."""
    if seconds is None:
        return _UNKNOWN
    whole = round(seconds)
    if whole >= 2 * 86400:
        return f"{whole // 86400}d {whole % 86400 // 3600}h"
    minutes, seconds_left = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds_left:02}" if hours else f"{minutes}:{seconds_left:02}"


def _scaled(number: float, base: int, prefixes: tuple[str, ...]) -> str:
    """`number` with three digits and a prefix; 999.9 is rounded up into the next one."""
    power = 0
    while abs(number) >= base - 0.5 and power < len(prefixes) - 1:
        number, power = number / base, power + 1
    return f"{_three_digits(number)} {prefixes[power]}"


def _three_digits(number: float) -> str:
    size = abs(number)
    return f"{number:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"
