"""The plots of docs/performance.md, as SVG with nothing but lines and text, readable on light and dark pages."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from tests.bench.scenarios import Bench

HERE = Path(__file__).parent / "plots"
WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 50
COLOURS = {"server": "#2f6fde", "libraries": "#3a9d5d", "floor": "#d9822b", "upstream": "#8a8f98"}
BINS = 60

Points = Sequence[tuple[float, float]]


def draw(bench: Bench) -> None:
    """Write every plot of this measurement."""
    HERE.mkdir(exist_ok=True)
    rates = {
        name: [(float(clients), median(rates)) for clients, rates in by_clients.items()]
        for name, by_clients in bench.concurrency.items()
    }
    _write("throughput", "Non-stream creates per second", "clients", "requests/s", rates, log_x=True, log_y=True)
    depths = sorted(bench.chain_ms)[1:]  # the first turn of a server that has just begun measures its beginning
    every = [(float(depth), median(bench.chain_ms[depth])) for depth in depths]
    chain = {"server": [(depth, median(y for _, y in every[at : at + 10])) for at, (depth, _) in enumerate(every[:-9])]}
    _write("chain", "Latency of a turn", "turns before it", "ms", chain)
    counts = {name: _histogram(latencies) for name, latencies in bench.latencies_ms.items()}
    _write("latency", "Latency of a create, 16 clients", "ms", "% of requests", counts, log_x=True)


def _histogram(latencies: Sequence[float]) -> Points:
    """Shares of logarithmic bins, since the targets lie far apart."""
    low, high = math.log10(0.1), math.log10(1000)
    shares = [0.0] * BINS
    for latency in latencies:
        at = int((math.log10(latency) - low) / (high - low) * BINS)
        shares[min(max(at, 0), BINS - 1)] += 100 / len(latencies)
    return [(10 ** (low + (at + 0.5) * (high - low) / BINS), share) for at, share in enumerate(shares)]


def _write(
    name: str, title: str, x: str, y: str, lines: Mapping[str, Points], *, log_x: bool = False, log_y: bool = False
) -> None:
    xs, ys = zip(*(point for line in lines.values() for point in line), strict=True)
    across = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, log=log_x)
    up = _Axis(min(ys) if log_y else 0, max(ys), HEIGHT - BOTTOM, TOP, log=log_y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<g fill="#8a8f98"><text x="{LEFT}" y="20" font-size="15">{title}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 10}" text-anchor="end">{x}</text>',
        f'<text x="{LEFT - 60}" y="{TOP - 8}">{y}</text>',
    ]
    parts += [
        f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_plain(tick)}</text>'
        for tick in across.ticks
    ]
    for tick in up.ticks:
        parts.append(f'<text x="{LEFT - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{_plain(tick)}</text>')
        parts.append(
            f'<path d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}" stroke="#8a8f98" stroke-opacity=".25" fill="none"/>'
        )
    parts.append("</g>")
    for at, (line, points) in enumerate(lines.items()):
        path = "L".join(f"{across(px):.1f} {up(py):.1f}" for px, py in points)
        parts.append(f'<path d="M{path}" stroke="{COLOURS[line]}" stroke-width="2" fill="none"/>')
        where = f'x="{WIDTH - RIGHT - 80 * (len(lines) - at - 1)}" y="20"'
        parts.append(f'<text {where} text-anchor="end" fill="{COLOURS[line]}">{line}</text>')
    (HERE / f"{name}.svg").write_text("\n".join([*parts, "</svg>"]) + "\n")


def _plain(tick: float) -> str:
    return f"{tick:,.0f}" if tick >= 1 else f"{tick:g}"


class _Axis:
    """Value → pixel."""

    def __init__(self, low: float, high: float, begins: float, ends: float, *, log: bool) -> None:
        self._log, self._begins, self._ends = log, begins, ends
        self._low, self._high = (math.log10(low), math.log10(high)) if log else (low, high)
        if log:
            self.ticks = [10.0**power for power in range(math.ceil(self._low), math.floor(self._high) + 1)]
        else:
            step = 10 ** math.floor(math.log10((high - low) / 2))
            step *= next(factor for factor in (1, 2, 5) if (high - low) / (step * factor) <= 6)
            self.ticks = [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self._log else value
        return self._begins + (at - self._low) / (self._high - self._low) * (self._ends - self._begins)
