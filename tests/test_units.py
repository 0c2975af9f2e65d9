import pytest

from est_cli.units import (
    format_bytes,
    format_clock,
    format_count,
    format_flops,
    format_interval,
    format_loss,
    format_percent,
    format_ratio,
    format_setting,
    format_step_time,
    parse_bytes,
    si_prefix,
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
        (format_count(1.1e9), "1.10B"),
        (format_count(float("nan")), "-"),
        (format_bytes(3 * 2**29), "1.50 GiB"),
        (parse_bytes("1.5 GiB"), 3 * 2**29),
        (parse_bytes("80GB"), 80 * 10**9),
        (format_bytes(1023.9), "1.00 KiB"),
        (format_percent(0.26667), "26.7%"),
        (format_percent(None), "-"),
        (format_percent(float("nan")), "-"),
        (format_loss(2.34567), "2.3457"),
        (format_loss(float("inf")), "inf"),
        (format_loss(float("nan")), "-"),
        (format_ratio(2 / 3), "0.67×"),
        (format_interval(0.951, (0.93, 0.97)), "0.95 [0.93, 0.97]"),
        (format_interval(None, None), "-"),
        (format_setting(None), "null"),
        (format_setting(True), "true"),
        (format_setting(0.0004), "0.0004"),
        (format_setting(2 / 15), "0.1333"),
        (format_setting("auto"), "auto"),
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


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(0.0, (1.0, "")), (999.0, (1.0, "")), (1000.0, (1e3, "k")), (2.5e13, (1e12, "T")), (1e30, (1e24, "Y"))],
)
def test_the_si_prefix_leaves_three_digits_before_the_point(largest, expected):
    assert si_prefix(largest) == expected
