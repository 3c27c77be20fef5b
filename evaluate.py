"""Scores: AbsRel and delta1 after alignment (Marigold's protocol, Table 1) and boundary F1 (Depth Pro's,
Table 2), on numpy arrays.

    python evaluate.py                        # FiffDepth, its teacher and a vertical ramp on held-out wild scenes
    python evaluate.py --checkpoint DIR --data nano=FOLDER
"""
import numpy as np


def align(pred, depth, mask, space="disparity", lowest=1e-3):
    """Least-squares scale and shift per image, then metres (Sec. 4.2, Marigold's protocol).

    pred [H, W] affine-invariant; depth [H, W] metres; mask bool [H, W] -> aligned depth [H, W] metres.
    space="depth": fits s·pred + t to depth. space="disparity": fits it to 1/depth on the valid pixels with
    pred > 0, clips at `lowest` (1/m) and inverts. All-NaN when fewer than two pixels can be fitted.
    """
    pred, depth = np.asarray(pred, np.float64), np.asarray(depth, np.float64)
    fit = np.broadcast_to(np.asarray(mask, bool), depth.shape) & (depth > 0) & np.isfinite(depth) & np.isfinite(pred)
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
    p, d = np.asarray(pred, np.float64)[mask], np.asarray(depth, np.float64)[mask]
    return float(np.mean(np.abs(p - d) / d)) if d.size else float("nan")


def delta1(pred, depth, mask):
    """Share of pixels with max(pred/depth, depth/pred) < 1.25 over the mask; NaN for an empty mask."""
    p, d = np.asarray(pred, np.float64)[mask], np.asarray(depth, np.float64)[mask]
    return float(np.mean(np.maximum(p / d, d / p) < 1.25)) if d.size else float("nan")


def boundary_f1(pred_depth, depth, mask=None):
    """Depth Pro's scale-invariant boundary F1, weighted mean over ten thresholds; depth [H, W], not disparity.

    A pair of neighbours is a boundary in one of four directions when the nearer is nearer by the factor t.
    Recall and precision are averaged over the directions. mask: count only pairs of valid pixels.
    """
    pred, true = (1 / np.maximum(np.asarray(x, np.float64), 1e-6) for x in (pred_depth, depth))
    thresholds = np.linspace(1.05, 1.25, 10)
    scores = []
    for t in thresholds:
        hits = [(p & g, p, g) for p, g in zip(relations(pred, t, mask), relations(true, t, mask))]
        recall = np.mean([b.sum() / max(g.sum(), 1) for b, _, g in hits])
        precision = np.mean([b.sum() / max(p.sum(), 1) for b, p, _ in hits])
        scores.append(2 * recall * precision / (recall + precision) if recall + precision > 0 else 0.0)
    return float(np.sum(thresholds / thresholds.sum() * scores))


def relations(inverse, t, mask):
    """right, left, bottom, top: where the neighbour (or the pixel itself) is nearer by more than t."""
    pairs = ((inverse[:, 1:], inverse[:, :-1]), (inverse[1:], inverse[:-1]))
    valid = (True, True) if mask is None else (mask[:, 1:] & mask[:, :-1], mask[1:] & mask[:-1])
    return [(a / b > t) & v for (x, y), v in zip(pairs, valid) for a, b in ((x, y), (y, x))]
