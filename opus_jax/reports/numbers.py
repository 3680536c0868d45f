"""Numbers as people read them."""

_UNITS = ("", "k", "M", "G", "T", "P", "E", "Z")


def readable(value: int | float) -> str:
    """Three digits and a unit of thousands: 1234567 -> "1.23M"."""
    size, unit = abs(value), 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    digits = 0 if unit == 0 and value == int(value) else max(0, 3 - len(str(int(size))))
    return f"{'-' if value < 0 else ''}{size:.{digits}f}{_UNITS[unit]}"


def percent(share: int | float) -> str:
    """A share as per cent: two digits below 10 %, whole ones above."""
    value = 100 * share
    if value == 0:
        return "0 %"
    return f"{value:.0f} %" if abs(value) >= 10 else f"{value:.1f} %" if abs(value) >= 1 else f"{value:.2f} %"


def times(ratio: int | float) -> str:
    """A ratio: 1.234 -> "1.23x"."""
    return f"{ratio:.2f}x"


def duration(seconds: int | float) -> str:
    """Hours, minutes and seconds, the largest two of them."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"
