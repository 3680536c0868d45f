"""The table that `selection.max_overhead` picks from, written out of measured figures."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.frontier.frontier import Figure, non_dominated
from opus_jax.training import overhead_points
from opus_jax.training.overhead_points import Point

FILE = Path(overhead_points.__file__)


def write_table(figures: Sequence[Figure], file: Path = FILE) -> None:
    """Put the points that are worth picking in place of those in the file."""
    head, _, _ = file.read_text().partition("POINTS = (")
    lines = [f"    {_call(point)},\n" for point in points(figures)]
    file.write_text(f"{head}POINTS = (\n{''.join(lines)})\n")


def points(figures: Sequence[Figure]) -> list[Point]:
    """What a run can do and nothing cheaper does better, for either model, with or without estimates of groups."""
    known = [x for x in figures if _can_be_picked(x)]
    without = {_key(x): x for x in known if not x.setting.groups}
    with_groups = {_key(x): x for x in known if x.setting.groups or x.setting.every == 1}
    both = [key for key in without if key in with_groups]
    kept: set[tuple[object, ...]] = set()
    for table in (without, with_groups):
        found = [table[key] for key in both]
        kept |= {_key(x) for x in [*non_dominated(found), *non_dominated([x.for_gpt2_xl for x in found])]}
    ordered = sorted((key for key in both if key in kept), key=lambda key: without[key].overhead)
    return [_point(without[key], with_groups[key]) for key in ordered]


def _can_be_picked(x: Figure) -> bool:
    scorer, setting = x.setting.scorer, x.setting
    plain = scorer.place == "prefix" and scorer.rank is None and scorer.dtype is None
    return plain and scorer.pieces == 1 and setting.prior is None


def _key(x: Figure) -> tuple[object, ...]:
    return x.setting.scorer, x.setting.every


def _point(alone: Figure, with_groups: Figure) -> Point:
    scorer, every = alone.setting.scorer, alone.setting.every
    return Point(
        part=scorer.part,
        derivative=scorer.derivative,
        parameters=scorer.parameters,
        select_every=every,
        refresh=max(scorer.proxy.period // every, 1),
        proxy_part=scorer.proxy.part,
        ema=scorer.proxy.ema,
        alone=round(alone.mean, 3),
        with_feedback=round(with_groups.mean, 3),
    )


def _call(point: Point) -> str:
    what = f'{point.part}, "{point.derivative}", "{point.parameters}", {point.select_every}, {point.refresh}'
    return f"Point({what}, {point.proxy_part}, {point.ema}, {point.alone}, {point.with_feedback})"
