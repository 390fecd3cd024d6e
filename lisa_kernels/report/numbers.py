"""Figures as people read them: with units, and with no more digits than they carry."""

from __future__ import annotations

import math

# A missing figure.
NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with about `digits` significant digits: 0.0123, 12.3, 1,230, 1.2e-05."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    if size >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def loss(value: float | None) -> str:
    """Return a loss with three decimals."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.3f}"


def bytes_text(value: float | None) -> str:
    """Return bytes in the decimal unit that fits: 812 kB, 4.21 MB, 15.3 GB."""
    if value is None:
        return NONE
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size:
            return f"{number(value / size)} {unit}"
    return f"{value:,.0f} B"


def duration(seconds: float | None) -> str:
    """Return a time: 8.2 s, 3 min 12 s, 2 h 05 min."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 60:
        return f"{number(seconds, 2)} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def speed(value: float | None, counted: str = "tokens") -> str:
    """Return tokens, or what else is counted, per second."""
    return NONE if value is None else f"{number(value)} {counted}/s"


def percent(after: float, before: float) -> str:
    """Return the change from `before` to `after`: −12 %, +0.4 %."""
    if not before:
        return NONE
    change = 100 * (after / before - 1)
    if abs(change) < 0.05:
        return "±0 %"
    return f"{'−' if change < 0 else '+'}{number(abs(change), 2)} %"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers, at most `most` or so, that span [low, high]; the first is no more, the last no less."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(count * step, 12) for count in range(first, last + 1)]
