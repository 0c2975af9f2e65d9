import pytest

from est_cli.tracking.units import (
    format_bytes,
    format_clock,
    format_count,
    format_flops,
    format_percent,
    format_step_time,
)


@pytest.mark.parametrize(
    ("formatted", "expected"),
    [
        (format_flops(1.234e15), "1.23 PFLOP"),
        (format_flops(0), "0.00 FLOP"),
        (format_flops(999.9e12), "1.00 PFLOP"),
        (format_flops(10**21), "1.00 ZFLOP"),
        (format_count(12_345), "12.3k"),
        (format_count(7), "7"),
        (format_count(999_999), "1.00M"),
        (format_bytes(3 * 2**29), "1.50 GiB"),
        (format_bytes(1023.9), "1.00 KiB"),
        (format_percent(0.26667), "26.7%"),
        (format_percent(None), "-"),
        (format_step_time(0.0412), "41.2 ms"),
        (format_step_time(12.3), "12.3 s"),
        (format_step_time(2e-5), "20.0 us"),
        (format_clock(59.6), "1:00"),
        (format_clock(3723), "1:02:03"),
        (format_clock(3 * 86400 + 4 * 3600), "3d 4h"),
    ],
)
def test_numbers_read_as_people_write_them(formatted, expected):
    assert formatted == expected
