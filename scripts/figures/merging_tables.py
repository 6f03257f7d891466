"""The documents' tables of the cost and savings of merging, from the results in `benchmarks/`."""

from __future__ import annotations

from typing import Any

from geoaccel.eval.metrics.effects import with_interval
from geoaccel.merging import Asymmetric
from table_parts import MODELS, read, table

FEW, MANY = 16, 64
SHOWN = (8, FEW, 32, MANY, 128)
"""Frame counts shown; the README shows two."""
FRONT = {
    **{name: f"`{name}`" for name in ("httm", "litevggt", "fastvggt", "come", "avggt")},
    **{name: f"**`{name}`**, ours" for name in ("asymmetric", "alike")},
}
"""The table of the README."""
STRIDES = {16: (2, 3, 4), 32: (2, 3, 4), 64: (3, 4, 6)}
"""By frame count, the strides of `asymmetric` shown."""
MERGED = {
    "httm": "`httm`",
    "litevggt": "`litevggt`",
    "litevggt, random targets": '`litevggt` with `targets="random"`, ours',
    "fastvggt": "`fastvggt`",
    "come": "`come`",
    "alike": "`alike`, ours",
    "come+httm": "`come` + `httm`",
    "alike+httm": "`alike` + `httm`",
}
"""As published, and ours."""

ABLATED = {
    "httm, no outlier filter": "`httm` without its outlier filter",
    "httm, whole pictures": "`httm` in blocks of four whole pictures",
    "httm, no anchor": "`httm` without the first frame as anchor",
    "litevggt, random targets": '`litevggt` with random targets (`targets="random"`)',
    "litevggt, released choice": "the released code's targets (`released_code=True`), against random ones",
    "litevggt, keys weighed": "random targets with `log_bias=True`, against random ones without",
    "alike, least confident groups": "`alike`, the least confident groups instead, as `come` chooses",
    "alike, random groups": "`alike`, groups at random",
    "alike, most confident groups": "`alike`, the most confident groups",
    "alike, first frame kept": "`alike` with the first frame left as it is (`anchor=True`)",
    "alike, direct": "`alike`, merged anew in front of every step",
}


def front() -> list[str]:
    """Table: cost and savings of merging on the first network, at few and at many frames of the report set."""
    document = read("merging-{}-frames-report.json")[MODELS[0]]
    counts = {frames: {row["variant"]: row for row in document["frames"][str(frames)]} for frames in (FEW, MANY)}
    header = [""]
    for frames, of in counts.items():
        scenes = max(row["scenes"] for row in of.values())
        header += [f"{frames} frames, {scenes} scenes: AUC@30 of {of['dense']['auc_30']:.3f}"]
        header += [f"AUC@5 of {of['dense']['auc_5']:.3f}", "speedup"]

    def cells(effects: dict[str, dict[str, float]]) -> list[str]:
        return [*cost(effects, strictest=True)[:2], f"{effects['speedup']['mean']:.2f}x"]

    def shown(name: str) -> list[str]:
        return [cell for of in counts.values() for cell in cells(of[name]["effects"])]

    return table(header, ([label, *shown(name)] for name, label in FRONT.items()))


def reported(frames: int) -> list[str]:
    """Table: cost and savings of merging at one frame count, on the report set."""
    found = read("merging-{}-frames-report.json")
    title = "{} frames, `{}`: AUC@30 of {:.3f}"
    rows: dict[str, list[str]] = {}
    header = [""]
    for model, document in found.items():
        of = {row["variant"]: row for row in document["frames"][str(frames)]}
        header += [title.format(frames, model, of["dense"]["auc_30"]), f"AUC@5 of {of['dense']['auc_5']:.3f}"]
        header += ["degrees to dense", "speedup"]
        for name, label in {**MERGED, "avggt": "`avggt`", "asymmetric": "`asymmetric`, ours"}.items():
            if name not in of:
                continue
            effects = of[name]["effects"]
            deg, speedup = effects["pose_median_deg"]["mean"], effects["speedup"]["mean"]
            cells = [*cost(effects, strictest=True)[:2], f"{deg:.2f}", f"{speedup:.2f}x"]
            rows[label] = [*rows.get(label, []), *cells]
    return table(header, ([label, *cells] for label, cells in rows.items()))


def photographs() -> list[str]:
    """Table: change of the output by methods on rendered scenes and on photographs, and their ranks by it."""
    sets = [read(f"merging-{{}}-frames-{name}.json") for name in ("report", "photographs")]
    header, rows = [""], {name: [label] for name, label in FRONT.items()}
    for model in MODELS:
        for effect, what, form in (("pose_median_deg", "cameras, deg", ".2f"), ("depth_rel", "depth", ".4f")):
            for kind, documents in zip(("rendered", "photographs"), sets, strict=True):
                found = {row["variant"]: row["effects"] for row in documents[model]["frames"][str(FEW)]}
                means = {name: found[name][effect]["mean"] for name in FRONT}
                ranks = {name: 1 + sum(other < mean for other in means.values()) for name, mean in means.items()}
                header.append(f"`{model}`, {kind}: {what}")
                for name, mean in means.items():
                    rows[name].append(f"{mean:{form}} ({ranks[name]})")
    return table(header, rows.values())


def keys() -> list[str]:
    """Table: strides of `asymmetric` on the validation scenes, the same in all layers."""
    documents = read("keys-{}-frames-validation.json")
    header, rows = ["frames", "stride"], []
    for model in MODELS:
        header += [f"`{model}`, scenes", "AUC@30", "AUC@5", "degrees to dense, of `httm`'s", "speedup"]
    for frames, strides in STRIDES.items():
        for stride in strides:
            row = [str(frames), str(stride)]
            for document in documents.values():
                found = {one["variant"]: one for one in document["frames"][str(frames)]}
                own = found[f"asymmetric, stride={stride}"]
                deg, least = (one["effects"]["pose_median_deg"]["mean"] for one in (own, found["httm"]))
                row += [str(own["scenes"]), *cost(own["effects"], strictest=True)[:2]]
                row += [f"{deg:.2f}, {deg / least:.2f}", f"{own['effects']['speedup']['mean']:.2f}x"]
            rows.append(row)
    return table(header, rows)


def profiles() -> list[str]:
    """Table: per-layer strides of `asymmetric` on the validation scenes, the chosen ones in bold."""
    documents = read("depth-{}-frames-validation.json")
    header, method = ["frames", "strides of the layers"], Asymmetric()
    for model in MODELS:
        header += [f"`{model}`, scenes", "AUC@30", "AUC@5", "degrees to dense", "speedup"]
    first, rows = documents[MODELS[0]], []
    for count, tried in first["frames"].items():
        chosen = ", ".join(str(method.stride_for(int(count), quarter)) for quarter in range(4))
        for name in (row["variant"] for row in tried if row["variant"] != "dense"):
            row = [count, f"**{name}**" if name == chosen else f"`{name}`" if name.isalpha() else name]
            for document in documents.values():
                own = next(one for one in document["frames"][count] if one["variant"] == name)
                row += [str(own["scenes"]), *cost(own["effects"], strictest=True)[:2]]
                deg, speedup = (own["effects"][key] for key in ("pose_median_deg", "speedup"))
                row += [with_interval(deg, ".2f"), f"{speedup['mean']:.2f}x"]
            rows.append(row)
    return table(header, rows)


def merged() -> list[str]:
    """Table: the cost of merging at 64 frames."""
    found = merging()
    dense = [found[model]["dense"] for model in MODELS]
    names = [f"`{m}`, AUC@30 of {row['auc_30']:.3f}" for m, row in zip(MODELS, dense, strict=True)]
    columns = [(name, "AUC@5", f"AbsRel of {row['depth_abs_rel']:.4f}") for name, row in zip(names, dense, strict=True)]
    rows = [
        (
            title,
            f"{found['vggt-mini'][variant]['effective_ratio']:.0%}".replace("%", " %"),
            *(cell for model in MODELS for cell in cost(found[model][variant]["effects"], strictest=True)),
        )
        for variant, title in MERGED.items()
        if all(variant in found[model] for model in MODELS)
    ]
    return table(("", "tokens merged", *(name for group in columns for name in group)), rows)


def ablated() -> list[str]:
    """Table: ablation of merging methods, each variant against the one named in the row."""
    found = merging()
    rows = [
        (
            title,
            str(min(found[model][variant]["scenes"] for model in MODELS)),
            *(cell for m in MODELS for cell in cost(*found[m][variant]["minus"].values())),
        )
        for variant, title in ABLATED.items()
    ]
    return table(("", "scenes", *(name for m in MODELS for name in (f"`{m}`, AUC@30", "AbsRel"))), rows)


def merging() -> dict[str, dict[str, Any]]:
    """Results by model and variant."""
    return {m: {row["variant"]: row for row in d["rows"]} for m, d in read("merging-{}-64frames.json").items()}


def cost(effects: dict[str, dict[str, float]], *, strictest: bool = False) -> tuple[str, ...]:
    """Cells of AUC@30, AUC@5 if requested, and depth AbsRel: the change, with its interval."""
    losses = ["auc_30_loss", "auc_5_loss"] if strictest else ["auc_30_loss"]
    lost, risen = [effects[name] for name in losses], effects["depth_abs_rel_rise"]
    return (
        *(with_interval(loss, "+.3f", scale=-1) for loss in lost),
        with_interval(risen, "+.4f"),
    )
