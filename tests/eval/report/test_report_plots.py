"""The plots of the report: what is drawn, and that words can be read."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report_rows import SWEEP, merged, row

from geoaccel.eval.report import (
    Row,
)
from geoaccel.eval.report.naming import labels
from geoaccel.eval.report.plots import plot_pareto
from geoaccel.eval.report.scaling import plot_scaling


def curves(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """What was drawn: name to points, in data coordinates; lines across the whole panel are left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in axes.lines:
        if line.get_gid() and line.get_transform() == axes.transData:
            points = [(float(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
            found.setdefault(str(line.get_gid()), []).extend(points)
    return found


def drawn(figure: Figure | None) -> list[dict[str, list[tuple[float, float]]]]:
    assert figure is not None
    return [curves(axes) for axes in figure.axes]


def words(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_pareto_joins_the_ratios_of_a_method() -> None:
    figure = plot_pareto(SWEEP)
    assert drawn(figure) == [
        {"dense": [(1, 0.9)], "httm": [(1.5, 0.85), (2, 0.8)], "come": [(3, 0.7)]},
        {"dense": [(1, 0.5)], "httm": [(1.5, 0.425), (2, 0.4)], "come": [(3, 0.35)]},
    ]
    assert figure is not None
    assert figure.axes[0].get_ylabel() == "AUC@30 (higher is better)"
    assert figure.axes[1].get_ylabel() == "AUC@5 (higher is better)"
    assert words(figure.axes[0]) == ["dense", "0.3", "0.6", "0.6"]
    (star,) = (line for line in figure.axes[0].lines if line.get_gid() == "dense")
    assert star.get_marker() == "*"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "httm", "come"]
    colors = {line.get_color() for line in figure.axes[0].lines if line.get_gid()}
    assert len(colors) == 3


def test_a_dense_model_without_scores_leaves_its_line_alone() -> None:
    """It was timed and not scored: the line of 1x is there, and neither a marker nor its name."""
    figure = plot_pareto([row(scores={}, speedup=1.0, latency_ms=100.0), merged("httm", None, 0.8, 2.0)])
    assert drawn(figure) == [{"httm": [(2, 0.8)]}, {"httm": [(2, 0.4)]}]
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["httm"]
    for axes in figure.axes:
        assert [1, 1] in [list(line.get_xdata()) for line in axes.lines]


def test_pareto_joins_frame_counts_where_each_has_one_ratio() -> None:
    rows = [merged("httm", 0.5, auc, speed, frames=n) for auc, speed, n in ((0.8, 1.5, 8), (0.9, 2.0, 32))]
    rows += [row(frames=8), row(frames=32, scores={"auc_30": 0.95})]
    figure = plot_pareto(rows)
    assert figure is not None
    assert curves(figure.axes[0]) == {"dense": [(1, 0.9), (1, 0.95)], "httm": [(1.5, 0.8), (2, 0.9)]}
    assert words(figure.axes[0]) == ["8", "32", "8", "32"]


def test_frame_counts_and_models_get_panels_of_their_own() -> None:
    rows = [*SWEEP, *(replace(each, frames=32) for each in SWEEP)]
    figure = plot_pareto(rows)
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["8 frames", "8 frames", "32 frames", "32 frames"]
    assert all(len(panel["httm"]) == 2 and len(panel["dense"]) == 1 for panel in drawn(figure))
    models = plot_pareto([*SWEEP, *(replace(each, model="$pi3$") for each in SWEEP)])
    assert models is not None
    assert [axes.get_title(loc="left") for axes in models.axes][1:3] == ["vggt-mini", r"\$pi3\$"]
    assert all(len(panel["httm"]) == 2 for panel in drawn(models))


def test_scores_that_are_missing_are_not_drawn() -> None:
    rows = [*SWEEP, merged("httm", 0.9, math.nan, 4.0), merged("litevggt", 0.5, 0.6, None)]
    figure = plot_pareto(rows)
    assert figure is not None
    assert len(curves(figure.axes[0])["httm"]) == 2
    assert "litevggt" not in curves(figure.axes[0])
    assert "not timed: litevggt, ratio 0.5" in figure.legends[0].get_title().get_text()
    lower = plot_pareto([replace(each, scores={"depth_abs_rel": 0.1, "fidelity_depth_abs_rel": 0.2}) for each in SWEEP])
    assert lower is not None
    names = [axes.get_ylabel() for axes in lower.axes]
    assert names == ["depth AbsRel against dense (lower is better)", "depth AbsRel (lower is better)"]


def test_without_timings_each_score_has_its_scale() -> None:
    rows = [row(), merged("httm", 0.5, 0.8, None), merged("come", 0.5, 0.7, None)]
    figure = plot_pareto(rows)
    assert drawn(figure)[0] == {"dense": [(0.9, 0)], "httm": [(0.8, 1)], "come": [(0.7, 2)]}
    assert figure is not None
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == labels(rows)
    assert words(figure.axes[0]) == ["0.900", "0.800", "0.700"]


def test_one_row_is_no_curve() -> None:
    alone = plot_pareto([SWEEP[1]])
    assert drawn(alone) == [{"httm": [(0.8, 0)]}, {"httm": [(0.4, 0)]}, {"httm": [(2, 0)]}]
    assert alone is not None
    assert alone.axes[0].get_xlim()[0] == 0
    assert alone.axes[0].get_xlim()[1] >= 1
    assert plot_pareto([row(scores={})]) is None
    speeds = plot_pareto([replace(each, scores={}) for each in SWEEP])
    assert len(drawn(speeds)) == 2
    assert drawn(speeds)[0]["come"] == [(3, 3)]


def test_words_stand_clear_of_each_other() -> None:
    rows = [row(), *(merged("httm", i / 100, 0.9 - i / 1000, 1 + i / 50) for i in range(30))]
    figure = plot_pareto(rows)
    assert figure is not None
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) > 5
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    points = figure.axes[0].transData.transform(curves(figure.axes[0])["httm"])
    assert not any(box.contains(*point) for box in boxes for point in points)


def scaling_rows() -> list[Row]:
    rows = []
    for frames, dense, fast in ((8, 100.0, 80.0), (32, 800.0, 400.0)):
        memory = {"peak_memory_gib": frames / 8, "dense_peak_memory_gib": frames / 4}
        times = {"latency_ms": fast, "dense_latency_ms": dense, "speedup": dense / fast}
        rows.append(row(merging="httm", frames=frames, scores={}, **times, **memory))
    return rows


def test_scaling_over_frame_counts() -> None:
    figure = plot_scaling(scaling_rows())
    assert drawn(figure) == [
        {"dense": [(8, 100), (32, 800)], "httm": [(8, 80), (32, 400)]},
        {"httm": [(8, 1.25), (32, 2)]},
        {"dense": [(8, 2), (32, 8)], "httm": [(8, 1), (32, 4)]},
    ]
    assert figure is not None
    assert [axes.get_xscale() for axes in figure.axes] == ["log"] * 3
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "log"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["8", "32"]
    reference = [line for line in figure.axes[1].lines if line.get_gid() == "dense"]
    assert [list(line.get_ydata()) for line in reference] == [[1, 1]]
    # The dense model's own row counts before what others were measured beside.
    own = [*scaling_rows(), row(frames=8, scores={}, latency_ms=90.0, dense_latency_ms=90.0)]
    assert drawn(plot_scaling(own))[0]["dense"] == [(8, 90), (32, 800)]


def test_every_ratio_has_a_line_of_its_shade() -> None:
    rows = [replace(each, ratio=ratio) for ratio in (0.3, 0.6) for each in scaling_rows()]
    figure = plot_scaling(rows)
    assert figure is not None
    assert drawn(figure)[1].keys() == {"httm, ratio 0.3", "httm, ratio 0.6"}
    shades = {str(line.get_gid()): line.get_color() for line in figure.axes[1].lines}
    assert shades["httm, ratio 0.6"] == "#0072b2"
    assert shades["httm, ratio 0.3"] > shades["httm, ratio 0.6"]
    assert "ratio 0.3, 0.6" in figure.legends[0].get_title().get_text()
    knobs = [replace(each, effective_ratio=ratio) for ratio in (0.2, 0.4) for each in scaling_rows()]
    assert {name: len(points) for name, points in drawn(plot_scaling(knobs))[1].items()} == {"httm": 2, "httm (2)": 2}


def swept(frames: int) -> list[Row]:
    """Strides without a ratio."""
    strides = {stride: {"asymmetric.stride": str(stride)} for stride in (2, 3, 4)}
    return [merged("asymmetric", None, 0.9 - 0.1 * s, s, knobs=of, frames=frames) for s, of in strides.items()]


def test_rows_of_a_sweep_over_knobs_are_told_apart() -> None:
    """No line joins them in the order of their names; words or the legend say which is which."""
    figure = plot_pareto([row(speedup=1.0, latency_ms=100.0), *swept(8)])
    assert figure is not None
    assert {"stride=2", "stride=3", "stride=4"} <= set(words(figure.axes[0]))
    lines = [line for line in figure.axes[0].lines if line.get_gid() == "asymmetric"]
    assert [len(line.get_xdata()) for line in lines] == [1, 1, 1]
    assert "point labels: knobs" in figure.legends[0].get_title().get_text()
    figure = plot_scaling([*swept(8), *swept(16)])
    assert figure is not None
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["dense", *(f"asymmetric, stride={stride}" for stride in (2, 3, 4))]
    assert figure.legends[0].get_title().get_text() == ""


def test_figures_grow_with_names_and_notes() -> None:
    """Panels stay as large as they are, however much is said beside and below them."""
    knobs = [{"httm.name": f'"{"x" * 30}{i}"'} for i in range(40)]
    rows = [merged("httm", None, 0.8, None, knobs=own) for own in knobs]
    for found in (plot_pareto(rows), plot_pareto([*SWEEP, *rows])):
        assert found is not None
        found.draw_without_rendering()
        for axes in found.axes:
            width, height = axes.get_window_extent().width, axes.get_window_extent().height
            assert width > 1.5 * found.dpi
            assert height > 1.5 * found.dpi


def test_one_frame_count_does_not_scale() -> None:
    assert plot_scaling(SWEEP) is None
    assert plot_scaling([*SWEEP, merged("httm", 0.5, 0.8, None, frames=32)]) is None
