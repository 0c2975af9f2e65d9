import pytest

from est_cli import units


@pytest.mark.parametrize(
    ("formatted", "expected"),
    [
        (units.format_flops(1.234e15), "1.23 PFLOP"),
        (units.format_flops(0), "0.00 FLOP"),
        (units.format_flops(999.9e12), "1.00 PFLOP"),
        (units.format_flops(10**21), "1.00 ZFLOP"),
        (units.format_count(12_345), "12.3k"),
        (units.format_count(7), "7"),
        (units.format_count(999_999), "1.00M"),
        (units.format_count(1.1e9), "1.10B"),
        (units.format_count(float("nan")), "-"),
        (units.format_bytes(3 * 2**29), "1.50 GiB"),
        (units.parse_bytes("1.5 GiB"), 3 * 2**29),
        (units.parse_bytes("80GB"), 80 * 10**9),
        (units.format_bytes(1023.9), "1.00 KiB"),
        (units.format_percent(0.26667), "26.7%"),
        (units.format_percent(None), "-"),
        (units.format_percent(float("nan")), "-"),
        (units.format_loss(2.34567), "2.3457"),
        (units.format_loss(float("inf")), "inf"),
        (units.format_loss(float("nan")), "-"),
        (units.format_ratio(2 / 3), "0.67×"),
        (units.format_interval(0.951, (0.93, 0.97)), "0.95 [0.93, 0.97]"),
        (units.format_interval(None, None), "-"),
        (units.format_setting(None), "null"),
        (units.format_setting(True), "true"),
        (units.format_setting(0.0004), "0.0004"),
        (units.format_setting(2 / 15), "0.1333"),
        (units.format_setting("auto"), "auto"),
        (units.format_step_time(0.0412), "41.2 ms"),
        (units.format_step_time(12.3), "12.3 s"),
        (units.format_step_time(2e-5), "20.0 us"),
        (units.format_clock(59.6), "1:00"),
        (units.format_clock(3723), "1:02:03"),
        (units.format_clock(3 * 86400 + 4 * 3600), "3d 4h"),
        (units.si_prefix(0.0), (1.0, "")),
        (units.si_prefix(999.0), (1.0, "")),
        (units.si_prefix(1000.0), (1e3, "k")),
        (units.si_prefix(2.5e13), (1e12, "T")),
        (units.si_prefix(1e30), (1e24, "Y")),
    ],
)
def test_numbers_read_as_people_write_them(formatted, expected):
    assert formatted == expected
