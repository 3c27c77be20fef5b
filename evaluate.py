"""Scores: AbsRel and delta1 after alignment (Marigold's protocol, Table 1) and boundary F1
(Depth Pro's, Table 2), on numpy arrays.

    python evaluate.py         # FiffDepth, its teacher and a vertical ramp on held-out wild scenes
    python evaluate.py --checkpoint DIR --teacher DIR --data nano=FOLDER

Per image: align to the truth, clip to the set's range, score on its valid pixels; then the plain
mean over images. The sets of the paper's tables come with the next version; the small world's
folders work now.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import BadFrame, FrameSet, UserError, parse_sources
from infer import predict_image
from model import FiffDepth, Teacher

HERE = Path(__file__).resolve().parent
FLOOR = 1e-6


def align(pred, depth, mask, space="disparity", lowest=1e-3):
    """Least-squares scale and shift per image, then metres (Sec. 4.2, Marigold's protocol).

    pred [H, W] affine-invariant; depth [H, W] metres; mask bool [H, W] -> aligned depth [H, W]
    metres.
    space="depth": fits s·pred + t to depth. space="disparity": fits it to 1/depth on the valid
    pixels with pred > 0, clips at `lowest` (1/m) and inverts. All-NaN when fewer than two pixels
    can be fitted.
    """
    pred, depth = np.asarray(pred, np.float64), np.asarray(depth, np.float64)
    fit = (np.broadcast_to(np.asarray(mask, bool), depth.shape) & (depth > 0) & np.isfinite(depth)
           & np.isfinite(pred))
    if space == "disparity":
        fit = fit & (pred > 0)
    if fit.sum() < 2:
        return np.full(depth.shape, np.nan)
    target = 1 / depth[fit] if space == "disparity" else depth[fit]
    columns = np.stack([pred[fit], np.ones(fit.sum())], 1)
    (scale, shift), *_ = np.linalg.lstsq(columns, target, rcond=None)
    aligned = scale * pred + shift
    return 1 / np.maximum(aligned, lowest) if space == "disparity" else np.maximum(aligned, 1e-6)


def abs_rel(pred, depth, mask):
    """Mean of |pred − depth| / depth over the mask; metres [H, W] both; NaN for an empty mask."""
    p, d = masked(pred, depth, mask)
    return float(np.mean(np.abs(p - d) / d)) if d.size else float("nan")


def delta1(pred, depth, mask):
    """Share of pixels with max(pred/depth, depth/pred) < 1.25 over the mask, metres [H, W] both;
    NaN for an empty mask or a prediction that is not finite there."""
    p, d = masked(pred, depth, mask)
    if not d.size or not np.isfinite(p).all():
        return float("nan")
    positive = np.maximum(p, 1e-6)
    return float(np.mean(np.maximum(positive / d, d / positive) < 1.25))


def masked(pred, depth, mask):
    """-> pred and depth, float64 [n], where the mask is true (any shape that broadcasts)."""
    depth = np.asarray(depth, np.float64)
    mask = np.broadcast_to(np.asarray(mask, bool), depth.shape)
    return np.asarray(pred, np.float64)[mask], depth[mask]


def boundary_f1(pred_depth, depth, mask=None):
    """Depth Pro's scale-invariant boundary F1 of depth maps [H, W], not disparity.

    A pair of neighbours is a boundary in one of four directions when one is nearer by the factor t;
    recall and precision are averaged over the directions, F1 over ten thresholds with weight t.
    mask: count only pairs of valid pixels; NaN when it is empty or the prediction is not finite.
    """
    if mask is not None:
        mask = np.broadcast_to(np.asarray(mask, bool), np.shape(depth))
        if not mask.any() or not np.isfinite(np.asarray(pred_depth)[mask]).all():
            return float("nan")
    pred, true = (1 / np.maximum(np.asarray(x, np.float64), 1e-6) for x in (pred_depth, depth))
    thresholds = np.linspace(1.05, 1.25, 10)
    scores = []
    for t in thresholds:
        hits = [(p & g, p, g) for p, g in zip(relations(pred, t, mask), relations(true, t, mask))]
        recall = np.mean([b.sum() / max(g.sum(), 1) for b, _, g in hits])
        precision = np.mean([b.sum() / max(p.sum(), 1) for b, p, _ in hits])
        both = recall + precision
        scores.append(2 * recall * precision / both if both > 0 else 0.0)
    return float(np.sum(thresholds / thresholds.sum() * scores))


def relations(inverse, t, mask):
    """right, left, bottom, top: which of two neighbours in `inverse` [H, W] is nearer by more
    than t. Infinitely far beside infinitely far is no boundary."""
    pairs = ((inverse[:, 1:], inverse[:, :-1]), (inverse[1:], inverse[:-1]))
    valid = (True, True) if mask is None else (mask[:, 1:] & mask[:, :-1], mask[1:] & mask[:-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        return [(a / b > t) & v for (x, y), v in zip(pairs, valid) for a, b in ((x, y), (y, x))]


def score(pred, depth, valid, space, layout):
    """A relative map in [0, 1] against the truth -> AbsRel, delta1, boundary F1 (aligned).

    In order: least squares, clip to the layout's range, metrics on the valid pixels. FLOOR keeps a
    far end that is exactly 0 inside the fit, from which align leaves out disparities of 0.
    """
    aligned = np.clip(align(pred + FLOOR, depth, valid, space), layout.near, layout.far)
    return tuple(metric(aligned, depth, valid) for metric in (abs_rel, delta1, boundary_f1))


# ---------------------------------------------------------------- the small world's table


def scores_of(predict, space, frames):
    """predict: uint8 [H, W, 3] -> map [H, W]. The means of AbsRel, delta1 and boundary F1 over a
    FrameSet, and the images without a score (unreadable, no valid pixel, prediction not finite)."""
    rows, without = [], []
    for i in tqdm(range(len(frames)), desc=frames.name, leave=False):
        try:
            rgb, depth, valid = frames.read(i)
            row = score(predict(rgb), depth, valid, space, frames.layout)
            reason = "no valid pixel, or a prediction that is not finite"
        except BadFrame as error:
            row, reason = (np.nan,), error
        if np.isfinite(row).all():
            rows.append(row)
        else:
            without.append(f"{frames.frames[i].rgb}: {reason}")
    return np.mean(rows, 0) if rows else np.full(3, np.nan), without


def small_world(a):
    """The predictors to compare: name -> (function, space)."""
    model, teacher = FiffDepth.from_pretrained(a.checkpoint), Teacher.from_pretrained(a.teacher)

    def taught(rgb):
        return teacher(torch.tensor(rgb).permute(2, 0, 1)[None].float() / 127.5 - 1)[0].numpy()

    def ramp(rgb):
        return np.linspace(0, 1, len(rgb))[:, None] * np.ones(rgb.shape[1])

    return {"FiffDepth": (lambda rgb: predict_image(model, rgb), model.info["target"]),
            "teacher": (taught, "disparity"), "vertical ramp": (ramp, "disparity")}


def run(a):
    default = HERE / "nano/data/wild/test"
    if a.data is None and not default.exists():
        raise UserError(f"{default} is not there yet; "
                        "`python nano/scenes.py` makes the small world (minutes)")
    if a.frames is not None and a.frames < 1:
        raise UserError(f"--frames {a.frames}: must be at least 1")
    sources = parse_sources(a.data or [f"nano={default}"])
    if "photos" in sources:
        raise UserError("--data photos=...: pictures alone have no depth to score against")
    predictors = small_world(a)
    print(f"checkpoint {a.checkpoint}; least squares in the predictor's space, "
          "clipped to the set's range, native size")
    for name, (path, listed) in sources.items():
        frames = FrameSet(name, path, listed, cap=a.frames)
        print(f"\n{name} {path}: {len(frames)} images, "
              f"valid depth {frames.layout.near:g}..{frames.layout.far:g} m\n"
              f"| | space | AbsRel % | delta1 % | boundary F1 (aligned) |\n|---|---|---|---|---|")
        for title, (predict, space) in predictors.items():
            (error, share, f1), without = scores_of(predict, space, frames)
            note = f" ({len(without)} images without a score)" if without else ""
            for line in without:
                print(f"{title}, no score: {line}", file=sys.stderr)
            print(f"| {title}{note} | {space} | {100 * error:.2f} | {100 * share:.2f} | {f1:.3f} |",
                  flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default=str(HERE / "nano/weights/fiffdepth"),
        help="model to score, folder or hub id", metavar="DIR|HUB_ID")
    add("--teacher", default=str(HERE / "nano/weights/teacher"),
        help="teacher to compare with", metavar="DIR|HUB_ID")
    add("--data", nargs="+", action="extend", metavar="NAME=PATH",
        help="sets with depth; default: the small world's held-out wild scenes")
    add("--frames", type=int, help="score the first so many frames only")
    try:
        with torch.inference_mode():
            run(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
