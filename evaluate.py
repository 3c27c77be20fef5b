"""The paper's tables: aligned depth (Table 1), boundaries (Table 2), running time (Table 3).

    python evaluate.py         # FiffDepth, its teacher and a vertical ramp on held-out wild scenes
    python evaluate.py --checkpoint runs/sd2 --data nyu=nyu_labeled_extracted.tar da2k=DA-2K
    python evaluate.py --predictions maps/ --space depth --data nyu=/data/nyu   # anyone's maps
    python evaluate.py --speed                                                  # Table 3

Read top to bottom: metrics on arrays (numpy in, floats out) -> TESTS (what decides each number:
size, alignment, range) -> predictors -> sets -> one image to a row -> the loop -> tables -> Table 3
-> the command. Each scored image is a line of --out at once: an interrupted run goes on, nothing is
computed twice, and memory does not grow. An image without a score is counted and named, never
averaged in.
"""
import argparse
import collections
import functools
import gc
import hashlib
import io
import json
import os
import platform
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

TEST_SETS = ()
from data import (SETS, BadFrame, FrameSet, HelpFormatter, UserError, explain,
                  open_image, open_root, parse_sources)
from infer import load_model, predict_batch, predict_image
from model import AUTHORS_INFO, SD_SCHEDULE, FiffDepth, Teacher, choose_device

HERE = Path(__file__).resolve().parent
THRESHOLDS = np.linspace(1.05, 1.25, 10)  # of boundaries, as ratios of depth; they are weights too


# ---------------------------------------------------------------- Table 1: aligned depth


def align(pred, depth, mask, space="disparity", lowest=1e-3, max_res=None):
    """Least-squares scale and shift per image, then metres (Sec. 4.2, Marigold's protocol).

    pred [H, W] affine-invariant; depth [H, W] metres; mask bool [H, W] -> aligned depth [H, W]
    metres.
    space="depth": fits s·pred + t to depth. space="disparity": fits it to 1/depth on the valid
    pixels with pred > 0, clips at `lowest` (1/m) and inverts. All-NaN when fewer than two pixels
    can be fitted.
    max_res: where the longer side exceeds it, every so many columns enter the fit, all rows do
    (meant as a smaller picture, but this is what the public code does).
    """
    pred, depth = np.asarray(pred, np.float64), np.asarray(depth, np.float64)
    fit = (np.broadcast_to(np.asarray(mask, bool), depth.shape) & (depth > 0) & np.isfinite(depth)
           & np.isfinite(pred))
    if space == "disparity":
        fit = fit & (pred > 0)
    columns = slice(None)
    if max_res and max(depth.shape) > max_res:
        numbers = torch.arange(depth.shape[1], dtype=torch.float32)[None, None]
        columns = F.interpolate(numbers, scale_factor=max_res / max(depth.shape), mode="nearest")
        columns = columns[0, 0].numpy().astype(int)
    fit, x, y = fit[:, columns], pred[:, columns], depth[:, columns]
    if fit.sum() < 2:
        return np.full(depth.shape, np.nan)
    target = 1 / y[fit] if space == "disparity" else y[fit]
    terms = np.stack([x[fit], np.ones(fit.sum())], 1)
    (scale, shift), *_ = np.linalg.lstsq(terms, target, rcond=None)
    aligned = scale * pred + shift
    return 1 / np.maximum(aligned, lowest) if space == "disparity" else np.maximum(aligned, 1e-6)


def abs_rel(pred, depth, mask):
    """Mean of |pred − depth| / depth over the mask; metres [H, W] both; NaN for an empty mask."""
    p, d = masked(pred, depth, mask)
    return float(np.mean(np.abs(p - d) / d)) if d.size else float("nan")


def delta1(pred, depth, mask, threshold=1.25):
    """Share of pixels with max(pred/depth, depth/pred) < threshold over the mask, metres [H, W]
    both; NaN for an empty mask or a prediction that is not finite there."""
    p, d = masked(pred, depth, mask)
    if not d.size or not np.isfinite(p).all():
        return float("nan")
    positive = np.maximum(p, 1e-6)
    return float(np.mean(np.maximum(positive / d, d / positive) < threshold))


def other_metrics(pred, depth, mask):
    """The field's other metrics over the mask, metres [H, W] both -> dict; RMSE in metres, the
    logarithms natural but for log10, SILog times 100 (Eigen's, without the factor 1/2)."""
    p, d = masked(pred, depth, mask)
    if not d.size or not np.isfinite(p).all():
        return dict.fromkeys(("rmse", "rmse_log", "log10", "silog", "delta2", "delta3"), np.nan)
    log = np.log(np.maximum(p, 1e-6)) - np.log(d)
    return {"rmse": float(np.sqrt(np.mean((p - d) ** 2))),
            "rmse_log": float(np.sqrt(np.mean(log ** 2))),
            "log10": float(np.mean(np.abs(log)) / np.log(10)),
            "silog": float(100 * np.std(log)),
            "delta2": delta1(pred, depth, mask, 1.25 ** 2),
            "delta3": delta1(pred, depth, mask, 1.25 ** 3)}


def masked(pred, depth, mask):
    """-> pred and depth, float64 [n], where the mask is true (any shape that broadcasts)."""
    depth = np.asarray(depth, np.float64)
    mask = np.broadcast_to(np.asarray(mask, bool), depth.shape)
    return np.asarray(pred, np.float64)[mask], depth[mask]


# ---------------------------------------------------------------- Table 1: pairs of points


def pair_accuracy(pred, pairs, space="disparity"):
    """DA-2K: share of the pairs in which the nearer point is predicted nearer; ties are wrong.

    pred [H, W], larger is nearer ("disparity") or farther ("depth", "metric"); pairs int [n, 4]:
    row and column of the nearer point, then of the farther. NaN without pairs.
    """
    pairs = np.asarray(pairs, int).reshape(-1, 4)
    near, far = pred[pairs[:, 0], pairs[:, 1]], pred[pairs[:, 2], pairs[:, 3]]
    right = near > far if space == "disparity" else near < far
    return float(right.mean()) if len(pairs) else float("nan")


def random_pairs(depth, valid, seed, n=64, ratio=1.1):
    """Pairs as DA-2K's for a scene with exact depth: int [<= n, 4], the nearer point first. Both
    valid, the farther at least `ratio` times as far."""
    places = np.argwhere(valid)
    a, b = np.random.default_rng(seed).integers(len(places), size=(2, 8 * n))
    first, second = places[a], places[b]
    d1, d2 = depth[tuple(first.T)], depth[tuple(second.T)]
    pairs = np.where((d1 < d2)[:, None], np.hstack([first, second]), np.hstack([second, first]))
    return pairs[np.maximum(d1, d2) > ratio * np.minimum(d1, d2)][:n]


# ---------------------------------------------------------------- Table 2: boundaries


def boundary_f1(pred_depth, depth, mask=None):
    """Depth Pro's scale-invariant boundary F1 of depth maps [H, W], not disparity.

    A pair of neighbours is a boundary in one of four directions when one is nearer by the factor t;
    recall and precision are averaged over the directions, F1 over ten thresholds with weight t. So
    a perfect map scores 0.25 when all its boundaries face one way (as the public code does).
    mask: count only pairs of valid pixels; NaN when it is empty or the prediction is not finite.
    """
    if mask is not None:
        mask = np.broadcast_to(np.asarray(mask, bool), np.shape(depth))
        if not mask.any() or not np.isfinite(np.asarray(pred_depth)[mask]).all():
            return float("nan")
    pred, true = ratios(invert(pred_depth), mask), ratios(invert(depth), mask)
    scores = []
    for t in THRESHOLDS:
        counts = [[np.count_nonzero(x) for x in ((p > t) & (g > t), p > t, g > t)]
                  for p, g in zip(pred, true)]
        recall = sum(both / max(g, 1) for both, _, g in counts) / 4
        precision = sum(both / max(p, 1) for both, p, _ in counts) / 4
        scores.append(2 * recall * precision / (recall + precision) if recall + precision else 0.0)
    return float(np.sum(np.array(scores) * (THRESHOLDS / THRESHOLDS.sum())))


def invert(depth):
    """1 / depth in the precision it comes in; holes and what is behind the camera: very near."""
    return 1.0 / np.asarray(depth).clip(min=1e-6)


def ratios(inverse, mask=None):
    """left, top, right, bottom: how much nearer each pixel of a pair is than its neighbour; 0 for a
    pair that the mask excludes. Infinitely far beside infinitely far is NaN: no boundary."""
    pairs = [(inverse[:, :-1], inverse[:, 1:]), (inverse[:-1], inverse[1:])]
    both = (1, 1) if mask is None else (mask[:, 1:] & mask[:, :-1], mask[1:] & mask[:-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        near_first = [np.where(v, a / b, 0) for (a, b), v in zip(pairs, both)]
        near_last = [np.where(v, b / a, 0) for (a, b), v in zip(pairs, both)]
    return near_first + near_last


def boundary_recall(pred_depth, alpha, mask=None):
    """Depth Pro's boundary recall against a matte or mask [H, W] in [0, 1] (or 0 and 255).

    The object, alpha > 0.1, counts as nearer than what surrounds it. Boundaries of the prediction
    are thinned: of neighbouring pairs above a threshold only the largest ratio stays. Averaged over
    four directions, then over ten thresholds with weight t.
    mask: count only pairs of valid pixels; NaN when it is empty.
    """
    inverse, inside = invert(pred_depth), np.asarray(alpha) > 0.1
    outside = ~inside
    if mask is not None:
        mask = np.broadcast_to(np.asarray(mask, bool), inside.shape)
        if not mask.any():
            return float("nan")
        inverse = np.where(mask, inverse, np.nan)  # ends every run, and is no boundary
        inside, outside = inside & mask, outside & mask
    recalls = []
    for D, b, not_b in ((inverse, inside, outside), (inverse.T, inside.T, outside.T)):
        for near, far, edge in ((D[:, :-1], D[:, 1:], b[:, :-1] & not_b[:, 1:]),
                                (D[:, 1:], D[:, :-1], b[:, 1:] & not_b[:, :-1])):
            kept = thinned(near, far, *np.nonzero(edge))
            recalls.append(kept.sum(1) / max(kept.shape[1], 1))
    left, right, top, bottom = recalls
    recall = 0.25 * (left + top + right + bottom)
    return float(np.sum(recall * (THRESHOLDS / THRESHOLDS.sum())))


def thinned(near, far, y, x):
    """Which of the pairs (y, x) stay at each threshold, when of each run of neighbouring pairs in a
    row whose ratio near / far exceeds it only the largest stays, the first on ties.

    near, far [H, W]; y, x int [n] -> bool [thresholds, n]

    A pair stays at t when its ratio exceeds t and, on either side, some ratio <= t ends the run
    before a larger one comes. So walk away from each pair until a larger ratio comes, and remember
    the smallest on the way: from that t upwards it stays. Pairs not asked for cost nothing.
    """
    def ratio(rows, at):
        inside = (at >= 0) & (at < near.shape[1])
        at = np.where(inside, at, 0)
        return np.where(inside, near[rows, at] / far[rows, at], np.nan)

    with np.errstate(divide="ignore", invalid="ignore"):
        peak = ratio(y, x)
        barrier = np.full(len(x), -np.inf, peak.dtype)
        for step in (-1, 1):
            going, lowest, distance = np.flatnonzero(peak > THRESHOLDS[0]), peak.copy(), 0
            while going.size:
                distance += step
                r = ratio(y[going], x[going] + distance)
                beaten = r >= peak[going] if step < 0 else r > peak[going]
                lost = going[beaten]
                barrier[lost] = np.maximum(barrier[lost], lowest[lost])
                on = ~beaten & (r > THRESHOLDS[0])  # NaN, the end of the row, ends a run too
                going = going[on]
                lowest[going] = np.minimum(lowest[going], r[on])
    t = THRESHOLDS[:, None].astype(peak.dtype)  # compared in the map's precision, as in public
    return (peak > t) & (barrier <= t)


def positive_depth(pred, space):
    """A relative map as depth > 0 without looking at the truth, for the boundary metrics, which
    forgive a scale but no shift (mode "raw"). The two constants are a choice and move the score:
    disparity x -> 1 / max(x, max(x) / 1000), depth d in [0, 1] -> d + 0.01; metric depth stays."""
    low, high = float(np.min(pred)), float(np.max(pred))
    if low < 0 or space == "depth" and high > 1:
        raise BadFrame(f"values {low:g}..{high:g}: {space} maps must not be negative"
                       + (" and lie in [0, 1]" if space == "depth" else ""))
    if space == "disparity":
        return 1 / np.maximum(pred, 1e-3 * high)
    return pred + 0.01 if space == "depth" else pred


def score(pred, depth, valid, space, layout):
    """What train.py and nano/ watch: AbsRel, delta1 and boundary F1 of a relative map after least
    squares and a clip to the layout's range."""
    aligned = np.clip(align(pred, depth, valid, space), layout.near, layout.far)
    return tuple(metric(aligned, depth, valid) for metric in (abs_rel, delta1, boundary_f1))


# ---------------------------------------------------------------- what decides each number


class Test(NamedTuple):
    """How a set of data.SETS or data.TEST_SETS is scored."""
    title: str
    measure: str              # depth, small, pairs, f1 or recall: see MEASURES
    sizes: tuple = (0,)       # longer side in the network, pixels; 0: as stored
    clip: tuple = ()          # metres, of aligned maps; (): the layout's near and far
    max_res: int = 0          # see align
    stride: int = 1           # every so many images


# Sizes, ranges and alignment of Table 1 are Marigold's. For the boundary sets and DA-2K the paper
# names no size: 768, Stable Diffusion 2's, and the picture's own, as two rows.
TESTS = {
    "nyu": Test("NYUv2", "depth"),
    "kitti": Test("KITTI", "depth"),
    "eth3d": Test("ETH3D", "depth", (756,), max_res=1024),
    "scannet": Test("ScanNet", "depth"),
    "diode": Test("DIODE-Full", "depth", (640,), (0.6, 350.0)),
    "da2k": Test("DA-2K", "pairs", (768, 0)),
    "sintel": Test("Sintel F1", "f1", (768, 0)),
    "sintel-clean": Test("Sintel clean F1", "f1", (768, 0)),
    "spring": Test("Spring F1", "f1", (768, 0), stride=5),
    "ibims": Test("iBims F1", "f1", (768, 0)),
    "am2k": Test("AM R", "recall", (768, 0)),
    "p3m": Test("P3M R", "recall", (768, 0)),
    "p3m-p": Test("P3M-P R", "recall", (768, 0)),
    "dis5k": Test("DIS R", "recall", (768, 0)),
    "nano": Test("small world", "small"),
    "hypersim": Test("Hypersim", "depth"),
    "vkitti": Test("Virtual KITTI 2", "depth"),
}

# The paper's Table 1 (AbsRel % / delta1 %, DA-2K %) and 2 (F1 or recall), as printed.
PAPER_1 = (
    ("DiverseDepth", "11.7 / 87.5", "19.0 / 70.4", "22.8 / 69.4", "10.9 / 88.2",
     "37.6 / 63.1", "79.3"),
    ("MiDaS", "11.1 / 88.5", "23.6 / 63.0", "18.4 / 75.2", "12.1 / 84.6", "33.2 / 71.5", "80.6"),
    ("LeReS", "9.0 / 91.6", "14.9 / 78.4", "17.1 / 77.7", "9.1 / 91.7", "27.1 / 76.6", "81.1"),
    ("Omnidata v2", "7.4 / 94.5", "14.9 / 83.5", "16.6 / 77.8", "7.5 / 93.6", "33.9 / 74.2",
     "76.8"),
    ("HDN", "6.9 / 94.8", "11.5 / 86.7", "12.1 / 83.3", "8.0 / 93.9", "24.6 / 78.0", "85.7"),
    ("DPT", "9.8 / 90.3", "10.0 / 90.1", "7.8 / 94.6", "8.2 / 93.4", "18.2 / 75.8", "83.2"),
    ("Marigold", "5.5 / 96.4", "9.9 / 91.6", "6.4 / 96.0", "6.4 / 95.1", "30.8 / 77.3", "86.8"),
    ("e2e-ft", "5.2 / 96.6", "9.6 / 91.9", "6.4 / 95.9", "5.8 / 96.2", "30.2 / 77.9", "83.6"),
    ("DepthFM", "6.5 / 95.6", "8.3 / 93.4", "7.8 / 95.9", "6.8 / 94.9", "24.5 / 74.1", "85.8"),
    ("GenPercept", "5.6 / 96.0", "13.0 / 84.2", "7.0 / 95.6", "6.2 / 96.1", "30.7 / 77.6", "85.1"),
    ("Lotus-D", "5.3 / 96.7", "8.1 / 92.8", "6.5 / 95.3", "5.8 / 96.3", "29.9 / 78.1", "86.8"),
    ("Lotus-G", "5.4 / 96.6", "8.5 / 87.7", "6.2 / 96.1", "6.0 / 96.0", "29.4 / 78.5", "86.2"),
    ("GeoWizard", "5.2 / 96.6", "9.7 / 92.1", "6.4 / 96.1", "6.1 / 95.3", "29.7 / 79.2", "88.1"),
    ("Depth Anything v1-L", "4.3 / 98.1", "7.6 / 94.7", "12.7 / 88.2", "4.2 / 98.0",
     "27.7 / 75.9", "88.5"),
    ("Depth Anything v2-L", "4.5 / 97.9", "7.4 / 94.6", "13.1 / 86.5", "4.2 / 97.8",
     "26.2 / 75.4", "97.1"),
    ("FiffDepth (paper)", "4.4 / 97.8", "7.3 / 93.5", "7.1 / 97.2", "4.2 / 97.9",
     "23.9 / 78.1", "97.1"),
)
PAPER_2 = (
    ("Depth Anything v2", "0.228", "0.056", "0.111", "0.107", "0.131", "0.056"),
    ("Depth Pro", "0.409", "0.079", "0.176", "0.173", "0.168", "0.077"),
    ("FiffDepth (paper)", "0.423", "0.086", "0.189", "0.176", "0.179", "0.091"),
)
COLUMNS = {1: ("nyu", "kitti", "eth3d", "scannet", "diode", "da2k"),
           2: ("sintel", "spring", "ibims", "am2k", "p3m", "dis5k")}

# What a measure puts into a row, and how the line of a set prints it: key -> (title, format).
PERCENT, PLAIN = "{:.2%}", "{:.3f}"
DEPTH = {"abs_rel": ("AbsRel", PERCENT), "delta1": ("delta1", PERCENT)}
OTHERS = {"rmse": ("RMSE m", PLAIN), "rmse_log": ("RMSE log", PLAIN), "log10": ("log10", PLAIN),
          "silog": ("SILog", "{:.2f}"), "delta2": ("delta2", PERCENT),
          "delta3": ("delta3", PERCENT)}
MEASURES = {
    "depth": DEPTH | OTHERS,
    "small": DEPTH | {"f1_aligned": ("boundary F1 (aligned)", PLAIN),
                      "pairs_right": ("pairs", PERCENT)} | OTHERS,
    "f1": {"f1_raw": ("F1 (raw)", PLAIN), "f1_aligned": ("F1 (aligned)", PLAIN),
           "f1_metric": ("F1 (metric)", PLAIN)},
    "recall": {"recall_raw": ("recall (raw)", PLAIN), "recall_metric": ("recall (metric)", PLAIN)},
    "pairs": {},
}
ALIGNED = ("depth", "small", "f1")  # measures that align a map first
MARK = "<!-- tables of evaluate.py -->\n"
# To be raised when a change above or below changes a score: rows of earlier versions are then
# ignored and scored again.
PROTOCOL = 2


# ---------------------------------------------------------------- predictors


class Predictor(NamedTuple):
    """Whose maps are scored. A row of results belongs to its weights, precision and device."""
    title: str
    source: str               # checkpoint or folder, as the user wrote it
    space: str                # of its maps: disparity, depth or metric
    predict: Callable         # (a Set, number of the image, uint8 [H, W, 3], size) -> map [H, W]
    identity: str             # changes with the weights
    sized: bool = True        # does the longer side matter to it?
    version: Callable = lambda test_set, i: ""    # changes with the file of one map


def identity(where, *nets):
    """A short digest of some numbers of every weight: another training gives another."""
    digest = hashlib.sha1(where.encode())
    for net in nets:
        for name, value in net.state_dict().items():
            some = value.detach().reshape(-1)[::max(1, value.numel() // 64)].float().cpu().numpy()
            digest.update(name.encode() + some.tobytes())
    return digest.hexdigest()[:12]


def fiffdepth(a):
    """-> the checkpoint as a Predictor, its device and precision."""
    a.checkpoint = a.checkpoint or str(HERE / "nano/weights/fiffdepth")
    model, where = load_model(a)

    def predict(_, i, rgb, size):
        return predict_batch(model, rgb[None], size or max(rgb.shape[:2]), enlarge=True)[0]

    source = f"{shown(a.checkpoint)}, {where}" + (f", VAE {a.vae}" if a.vae else "")
    return (Predictor("FiffDepth", source, model.info["target"], predict,
                      identity(where, model.unet, model.vae)),
            model.prompt.device, model.unet.dtype)


def teacher(path, device, dtype):
    net = Teacher.from_pretrained(path, dtype=dtype).to(device)

    def predict(_, i, rgb, size):
        return net(to_tensor(rgb, device))[0].float().cpu().numpy()

    where = f"{shown(path)}, {device}, {str(dtype).removeprefix('torch.')}"
    return Predictor("teacher", where, "disparity", predict,
                     identity(f"{device}, {dtype}", net), sized=False)


def ramp():
    def predict(_, i, rgb, size):
        return np.linspace(0, 1, len(rgb))[:, None] * np.ones(rgb.shape[1])

    return Predictor("vertical ramp", "", "disparity", predict, "ramp", sized=False)


def shown(path):
    """A path as results name it: below the project without the folder the project lies in."""
    return str(path).removeprefix(f"{HERE}/")


def other_program(folder, space):
    """Maps that another program saved as .npy, in the sub-folders of the pictures: NAME.npy,
    NAME_depth.npy (infer.py), pred_NAME.npy or, of rgb_ID, pred_ID.npy (Marigold), below
    folder/SET/ or folder/."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--predictions {folder}: there is no such folder")

    def version(test_set, i):
        file = map_files(folder, test_set)[i]
        return "" if file is None else stamp(file)

    def predict(test_set, i, rgb, size):
        file = map_files(folder, test_set)[i]
        if file is None:
            raise BadFrame(f"no map of the picture's name below {folder}")
        try:
            values = np.load(io.BytesIO(file.read_bytes()))
            values = values.squeeze().astype(np.float32)
        except (ValueError, TypeError, AttributeError, OSError, EOFError) as error:
            raise BadFrame(f"the map is no .npy file of numbers ({error})") from error
        if values.shape != rgb.shape[:2] and test_set.layout.crop:  # saved before the crop
            if values.shape == stored_size(test_set.frames, i):
                values = values[test_set.layout.crop(*values.shape)]
        if values.shape != rgb.shape[:2]:
            raise BadFrame("map of {} and picture of {}x{} pixels".format(
                "x".join(map(str, values.shape)), *rgb.shape[:2]))
        return values

    return Predictor("maps", str(folder), space, predict, str(folder.resolve()), False, version)


@functools.lru_cache(maxsize=4)
def map_files(folder, test_set):
    """-> the file of each image's map, or None. Never the set's own truth, never one for two."""
    truth = {(test_set.path / name).resolve() for frame in getattr(test_set.frames, "frames", ())
             for name in (frame.depth, *frame.more) if name}
    files, owners = [], {}
    for image in test_set.names:
        path = Path(image)
        names = [f"{path.stem}.npy", f"{path.stem}_depth.npy",
                 f"{path.stem}_{path.suffix[1:]}_depth.npy", f"pred_{path.stem}.npy"]
        if path.stem.startswith("rgb_"):
            names.append(f"pred_{path.stem[4:]}.npy")
        places = [root / path.parent / name for root in (folder / test_set.name, folder)
                  for name in names]
        file = next((p for p in places if p.exists() and p.resolve() not in truth), None)
        if file in owners and file is not None:
            raise UserError(f"--predictions {folder}: {file} would be the map of two pictures, "
                            f"{owners[file]} and {image}; give maps the names of their pictures")
        owners[file] = image
        files.append(file)
    return files


def stored_size(frames, i):
    """(H, W) of a picture in its file, before any crop."""
    return Image.open(io.BytesIO(frames.store.read(frames.frames[i].rgb))).size[::-1]


def stamp(file):
    return f"{file.stat().st_size} {file.stat().st_mtime_ns}"


# ---------------------------------------------------------------- sets


class PairSet:
    """DA-2K: pictures below a root and annotations.json, {picture: [{"point1": [row, column],
    "point2": [row, column], "closer_point": "point1"}, ...]}.

    .names: the pictures; .pairs: {picture: int [n, 4]}, the nearer point first
    """

    def __init__(self, path, cap=None):
        self.store = open_root("da2k", Path(path))
        files = set(self.store.names())
        found = [n for n in sorted(files) if n.rpartition("/")[2] == "annotations.json"]
        if not found:
            raise UserError(f"--data da2k={path}: expected images/ and annotations.json, "
                            f"found no annotations.json among {len(files)} files")
        root = found[0].removesuffix("annotations.json")
        try:
            listed = json.loads(self.store.read(found[0])).items()
            self.pairs = {root + image: np.array([nearer_first(p) for p in pairs], int)
                          for image, pairs in list(listed)[:cap]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--data da2k={path}: annotations.json is not as DA-2K's "
                            f"({type(error).__name__}: {error})") from error
        if not self.pairs:
            raise UserError(f"--data da2k={path}: annotations.json names no picture")
        self.names, self.missing, self.count = list(self.pairs), [], len(listed)
        self.wanted = self.names

    def read(self, i):
        rgb, pairs = open_image(self.store.read(self.names[i])), self.pairs[self.names[i]]
        if (pairs < 0).any() or (pairs.reshape(-1, 2) >= rgb.shape[:2]).any():
            raise BadFrame("a point lies outside the picture")
        return rgb, pairs, None


def nearer_first(pair):
    near = pair["closer_point"]
    return [*pair[near], *pair[{"point1": "point2", "point2": "point1"}[near]]]


class Set(NamedTuple):
    """An opened set and the images of it to score."""
    name: str
    path: Path
    frames: object            # a FrameSet, or a PairSet
    names: list               # of its images
    layout: object            # data.Layout
    picked: list              # numbers of images
    lost: list                # what was picked and lacks a file: ["set/file: reason"]
    chosen: str               # how, in words

    __hash__ = object.__hash__

    @property
    def test(self):
        return TESTS[self.name]


def open_set(name, path, listed, a):
    if name == "da2k":
        if listed:
            raise UserError("--list da2k=...: annotations.json is its list")
        frames, layout = PairSet(path, a.frames), next(r for r in TEST_SETS if r.name == name)
    else:
        frames = FrameSet(name, path, listed, cap=a.frames)
        layout = frames.layout
    stride = a.stride or TESTS[name].stride
    wanted = set(frames.wanted[::stride])  # before files are missed: a gap must not shift the rest
    chosen = ([f"list {listed}"] if listed else []) + (
        [f"the first {a.frames}"] if a.frames else []) + ([f"stride {stride}"] * (stride > 1))
    names = frames.names
    return Set(name, Path(path), frames, names, layout,
               [i for i, n in enumerate(names) if n in wanted],
               [line for line in frames.missing
                if line.removeprefix(f"{name}/").partition(": ")[0] in wanted], ", ".join(chosen))


def protocol(s):
    """Everything that decides the numbers of a set, but for what each line of it names itself."""
    test, layout = s.test, s.layout
    words = [f"{test.title}, {s.path}: {len(s.picked)} images"]
    if layout.count or s.name == "da2k":
        words[0] += f" (known: {layout.count or 'about 1,000 with 2,068 pairs'})"
    if s.chosen:
        words.append(s.chosen)
    if s.name == "dis5k" and len(s.picked) != layout.count:
        words.append("Depth Pro's 200 are chosen by --list dis5k=dis5k_sample_list.txt")
    if test.measure in ALIGNED:
        low, high = test.clip or (layout.near, layout.far)
        words.append("valid where the mask file says so" if s.name == "diode" else
                     f"valid {layout.near:g} < depth < {layout.far:g} m"
                     + (", sky counts as the farthest" if layout.sky else ""))
        if layout.crop:
            words.append("cut to the bottom-centre 352 x 1216")
        if layout.window:
            words.append("scored in rows {}:{}, columns {}:{}".format(*layout.window[:4]))
        words.append("least squares per image" + (f" on columns thinned to {test.max_res}"
                                                  if test.max_res else ""))
        words.append(f"aligned maps clipped to {low:g}..{high:g} m")
    if test.measure in ("f1", "recall"):
        words.append("raw: disparity x as depth 1 / max(x, max(x)/1000), depth d as d + 0.01")
    return "; ".join([*words, "mean over images" if test.measure != "pairs" else
                      "all pairs pooled; those of a picture without a score are wrong"])


# ---------------------------------------------------------------- one image -> one row


def checked(pred):
    """A map -> the same as float64; NaN and constant ones are no predictions."""
    if not np.isfinite(pred).all():
        raise BadFrame("the prediction is not finite everywhere")
    if pred.min() == pred.max():
        raise BadFrame("the prediction is constant")
    return pred.astype(np.float64)


def row_of(s, i, pred, truth, valid, kind, space):
    """{measure: value} of one image. kind: what the map holds; space: where it is aligned."""
    if s.test.measure == "pairs":
        return {"right": round(pair_accuracy(pred, truth, kind) * len(truth)) if len(truth) else 0}
    if s.test.measure == "recall":
        inside = truth > 0.1
        if inside.all() or not inside.any():
            raise BadFrame("the matte has no boundary")
        mode = "recall_metric" if kind == "metric" else "recall_raw"
        return {mode: boundary_recall(positive_depth(pred, kind), truth)}
    if not valid.any():
        raise BadFrame("no valid pixel")
    if np.array_equal(pred[valid], truth[valid]):
        raise BadFrame("the map is the truth itself")
    low, high = s.test.clip or (s.layout.near, s.layout.far)
    aligned = align(pred, truth, valid, space, max_res=s.test.max_res)
    if not np.isfinite(aligned).all():
        raise BadFrame("the prediction cannot be aligned: fewer than two valid pixels to fit, "
                       "which a disparity must exceed 0 for")
    aligned = np.clip(aligned, max(low, 1e-6), high)
    if s.test.measure == "f1":
        mode = "f1_metric" if kind == "metric" else "f1_raw"
        return {"f1_aligned": boundary_f1(aligned, truth, valid),
                mode: boundary_f1(positive_depth(pred, kind), truth, valid)}
    flat = *masked(aligned, truth, valid), True
    row = {"abs_rel": abs_rel(*flat), "delta1": delta1(*flat)} | other_metrics(*flat)
    if s.test.measure == "small":
        pairs = random_pairs(truth, valid, zlib.crc32(s.names[i].encode()))
        row["f1_aligned"] = boundary_f1(aligned, truth, valid)
        row |= {"pairs_right": pair_accuracy(pred, pairs, kind)} if len(pairs) else {}
    return row


# ---------------------------------------------------------------- the loop


def ahead(function, items, workers=2, waiting=4):
    """map(function, items), in order, computed by threads a few items ahead and no more."""
    with ThreadPoolExecutor(workers) as pool:
        queue = collections.deque()
        for item in items:
            queue.append(pool.submit(function, item))
            if len(queue) > waiting:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def attempt(function, *arguments):
    """-> the result and None, or None and the reason: one image must not stop the others."""
    try:
        return function(*arguments), None
    except UserError:
        raise
    except BadFrame as error:
        return None, str(error)
    except Exception as error:  # a damaged file can raise anything
        return None, f"{type(error).__name__}: {explain(error)}"


def rows_of(s, indices, predictor, size, space):
    """Yields (index, row or None, reason or None). Reading, network and scoring overlap: reading
    and scoring in threads, the network here."""
    def read(i):
        return i, *attempt(s.frames.read, i)

    def predicted():
        for i, item, reason in ahead(read, indices):
            pred = None
            if reason is None:
                pred, reason = attempt(lambda: checked(predictor.predict(s, i, item[0], size)))
            yield i, pred, item and item[1:], reason  # without the picture: it may be large

    def scored(one):
        i, pred, truth, reason = one
        if reason is not None:
            return i, None, reason
        return i, *attempt(row_of, s, i, pred, *truth, predictor.space, space)

    yield from ahead(scored, predicted())


def score_set(s, predictor, size, space, log):
    """Scores what the log does not hold yet, adding each image to it -> the name of its table line,
    and {reason: [images]}."""
    line = run_line(s, predictor, size, space)
    keys = {i: (line["run"], *key) for i, key in zip(s.picked, line["keys"])}
    todo = [i for i, key in keys.items() if key not in log.rows]
    if todo:
        add_line(log, line)
    failures = collections.defaultdict(list)
    if s.lost:
        failures["a file of theirs is missing"] = list(s.lost)
    title = f"{s.name}, {predictor.title}" + (f", {side(size)}" if predictor.sized else "")
    bar = tqdm(rows_of(s, todo, predictor, size, space), desc=title, total=len(todo), unit="image",
               disable=not todo, leave=False, mininterval=0.1 if sys.stderr.isatty() else 30)
    for i, row, reason in bar:
        if reason is not None:
            failures[reason].append(s.names[i])
        else:
            add_line(log, dict(zip(("run", "image", "version"), keys[i])) | row)
    line = line | {"failed": sum(map(len, failures.values()))}
    if next(reversed(log.runs.values()), None) != line:  # the last use comes last in the tables
        add_line(log, line)
    return line["table"], failures


def run_line(s, predictor, size, space):
    """What decides the scores of a run (`run` is their digest) and what its tables say of it."""
    settings = {
        "set": s.name, "path": str(s.path.resolve()), "predictor": predictor.title,
        "of": predictor.identity, "map": predictor.space,
        "aligned_in": space if s.test.measure in ALIGNED else None,
        "size": size if predictor.sized else None, "test": repr(s.test),
        "layout": repr([s.layout.near, s.layout.far, s.layout.window, s.layout.sky]),
        "program": PROTOCOL}
    run = hashlib.sha1(json.dumps(settings).encode()).hexdigest()[:12]
    pairs = collections.Counter()  # of DA-2K, in all and in each scene
    for i in s.picked if s.test.measure == "pairs" else ():
        n = len(s.frames.pairs[s.names[i]])
        pairs.update({"all": n, scene_of(s.names[i]): n})
    return {"run": run, "settings": settings, "source": predictor.source, "pairs": dict(pairs),
            "images": len(s.picked) + len(s.lost), "failed": None, "protocol": protocol(s),
            "count": s.layout.count or getattr(s.frames, "count", None),
            "keys": [[s.names[i], f"{files_stamp(s, i)} {predictor.version(s, i)}"]
                     for i in s.picked],
            "table": hashlib.sha1(json.dumps([run, s.chosen]).encode()).hexdigest()[:12]}


def scene_of(image):
    """DA-2K's images/SCENE/x.jpg -> SCENE"""
    return image.rpartition("images/")[2].rpartition("/")[0] or "images"


def files_stamp(s, i):
    """Names, sizes and times of what an image's score depends on: changed files, or another list,
    and it is scored again."""
    if s.name == "da2k":
        names, extra = [s.names[i]], s.frames.pairs[s.names[i]].tolist()
    else:
        frame = s.frames.frames[i]
        names, extra = [frame.rgb, frame.depth, *frame.more], []
    paths = [s.path / n for n in names if n and n[0] != "="] if s.path.is_dir() else [s.path]
    text = repr([names, extra, [stamp(f) for f in paths if f.exists()]])
    return hashlib.sha1(text.encode()).hexdigest()[:12]


# ---------------------------------------------------------------- the results file


class Log(NamedTuple):
    file: Path
    rows: dict                # (run, image, version) -> row
    runs: dict                # table -> the line of a run, with settings; the last used is last
    speeds: dict              # key -> result of --speed


def read_log(file):
    """--out -> Log. A last line that a kill cut short is dropped; another file is left alone."""
    if file.suffix != ".jsonl":
        raise UserError(f"--out {file}: the results file must end in .jsonl")
    log = Log(file, {}, {}, {})
    file.parent.mkdir(parents=True, exist_ok=True)
    tables = file.with_suffix(".md")
    if tables.exists() and not tables.read_text(errors="replace").startswith(MARK):
        raise UserError(f"--out {file}: the tables would replace {tables}, which is not of this "
                        "program; choose another name")
    text = file.read_text(errors="replace") if file.exists() else ""
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            remember(log, json.loads(line))
        except (ValueError, KeyError, TypeError):
            cut = (number == len(lines) and not text.endswith("\n")
                   and line.startswith('{"'[:len(line)]))
            if not cut:
                raise UserError(f"--out {file}, line {number}: not a line of evaluate.py; choose "
                                "another file, or remove the line") from None
            lines.pop()
    if text != "".join(line + "\n" for line in lines):
        replace_text(file, "".join(line + "\n" for line in lines))
    return log


def replace_text(file, text):
    """Written beside and renamed into place: whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, file)


def remember(log, line):
    if "settings" in line:
        if line["settings"]["program"] == PROTOCOL:  # else of an earlier version: scored again
            log.runs.pop(line["table"], None)
            log.runs[line["table"]] = line
    elif "image" in line:
        log.rows[line["run"], line["image"], line["version"]] = line
    else:
        log.speeds[line["key"]] = line


def add_line(log, line):
    remember(log, line)
    with open(log.file, "a") as file:
        file.write(json.dumps(line) + "\n")


# ---------------------------------------------------------------- lines and tables


def scores_of(log, line):
    """The line of a run -> {key: score} and the number of images with one: the plain mean over
    images, as these protocols say; DA-2K over pairs, for all and for each scene."""
    run, pairs = line["run"], line["pairs"]
    rows = {image: log.rows[run, image, version] for image, version in line["keys"]
            if (run, image, version) in log.rows}
    if pairs:
        right = collections.Counter()
        for image, row in rows.items():
            right.update({"all": row["right"], scene_of(image): row["right"]})
        return {scene: right[scene] / max(n, 1) for scene, n in pairs.items()}, len(rows)
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    values = {key: [row[key] for row in rows.values() if key in row] for key in keys
              if key not in ("run", "image", "version")}
    return {key: float(np.mean(v)) for key, v in values.items()}, len(rows)


def set_table(log, tables, others):
    """The runs of one set -> Markdown lines, what decides the numbers first."""
    lines = [log.runs[table] for table in tables]
    found = [scores_of(log, line) for line in lines]
    titles = MEASURES[TESTS[lines[0]["settings"]["set"]].measure]
    titles = titles or {scene: (scene, PERCENT) for scores, _ in found for scene in scores}
    keys = [k for k in titles if any(k in scores for scores, _ in found)
            and (others or k not in OTHERS)]
    head = ["predictor", "map", "aligned in", "longer side", "images", "without a score"]
    text = [lines[0]["protocol"], "", "| " + " | ".join(
        head + [titles[k][0] for k in keys]) + " |", "|" + "---|" * (len(head) + len(keys))]
    for line, (scores, n) in zip(lines, found):
        of, failed = line["settings"], line["failed"]
        without = f"{line['images'] - n} not run" if failed is None else failed
        cells = [" ".join([of["predictor"], line["source"]]).strip(), of["map"],
                 of["aligned_in"] or "-", side(of["size"]), n, without]
        cells += [titles[k][1].format(scores[k]) if k in scores else "" for k in keys]
        text.append("| " + " | ".join(map(str, cells)) + " |")
    return text + [""]


def side(size):
    return "its own" if size is None else "native" if size == 0 else str(size)


def paper_table(number, log):
    """The paper's table, our runs below its rows, blanks where nothing was run -> lines. A number
    that not all images of the set went into says so."""
    columns, published = COLUMNS[number], (PAPER_1, PAPER_2)[number - 1]
    rows = {title: dict(zip(columns, cells)) for title, *cells in published}
    owner = {}  # row -> weights: two checkpoints of one name do not share a row
    for line in log.runs.values():
        of, (scores, n) = line["settings"], scores_of(log, line)
        if of["set"] not in columns or not n:
            continue
        all_of = line["count"] or line["images"]
        part = "" if n >= all_of else f" ({n} of {all_of})"
        for key, cell in paper_cells(scores).items():
            label = paper_label(number, of, line["source"], key.partition("_")[2])
            if owner.setdefault(label, of["of"]) != of["of"] or of["set"] in rows.get(label, {}):
                label += f" ({of['of'][:6]}, {Path(of['path']).name} {line['table'][:4]})"
            rows.setdefault(label, {})[of["set"]] = cell + part
    head = ["", *(TESTS[name].title for name in columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join([label, *(cells.get(n, "") for n in columns)]) + " |"
                    for label, cells in rows.items()]


def paper_cells(scores):
    """-> {measure: cell}; one nameless cell for Table 1, one for each mode of Table 2."""
    if "abs_rel" in scores:
        return {"": f"{100 * scores['abs_rel']:.1f} / {100 * scores['delta1']:.1f}"}
    if "all" in scores:
        return {"": f"{100 * scores['all']:.1f}"}
    return {key: f"{value:.3f}" for key, value in scores.items()}


def paper_label(number, of, source, mode):
    words = [f"{of['predictor']} {source}".strip()]
    if of["aligned_in"] and mode in ("", "aligned"):
        words.append(f"aligned in {of['aligned_in']}")
    else:
        words.append(f"{mode} {of['map']}".strip())
    if number == 2 or of["set"] == "da2k":
        words.append(f"longer side {side(of['size'])}")
    return ", ".join(words)


def report(log, others):
    """All runs of the log: the paper's tables that have a number of ours, on the screen, and with
    a table of each set in the .md beside --out."""
    sets = collections.defaultdict(list)
    for table, line in log.runs.items():
        sets[line["settings"]["set"], line["protocol"]].append(table)
    tables = []
    for number, unit in ((1, "AbsRel % / delta1 %, DA-2K accuracy %"), (2, "boundary F1, recall")):
        if any(name in COLUMNS[number] for name, _ in sets):
            tables += [f"Table {number}: {unit}", "", *paper_table(number, log), ""]
    lines = tables + [line for runs in sets.values() for line in set_table(log, runs, others)]
    replace_text(log.file.with_suffix(".md"), MARK + "\n" + "\n".join(lines))
    print("\n".join(tables), end="")


# ---------------------------------------------------------------- Table 3: running time
# Every method runs from its public class with its own resizing, batch 1. Weights that are not on
# this machine are random, at the public size: the speed is the same. Nothing is downloaded.
#
# The public sizes; what is not given is the class's own default. From the config files of Stable
# Diffusion 2, Marigold v1.1 (its steps and resolution), Depth Anything V2-L and Depth Pro, some of
# them read in copies.

SD2_UNET = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024,
            "use_linear_projection": True, "sample_size": 96}
SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 768,
          "down_block_types": ("DownEncoderBlock2D",) * 4,
          "up_block_types": ("UpDecoderBlock2D",) * 4}
STABLE_DIFFUSION = {"unet": SD2_UNET, "vae": SD_VAE}
MARIGOLD = {"unet": SD2_UNET | {"in_channels": 8}, "vae": SD_VAE,  # picture and depth latents
            "default_denoising_steps": 4, "default_processing_resolution": 768, "steps": None}
VIT_L = {"model_type": "dinov2", "hidden_size": 1024, "num_attention_heads": 16,
         "num_hidden_layers": 24}
DEPTH_ANYTHING = {
    "network": {"backbone_config": VIT_L | {"image_size": 518, "out_indices": [5, 12, 18, 24],
                                            "reshape_hidden_states": False},
                "reassemble_hidden_size": 1024, "neck_hidden_sizes": [256, 512, 1024, 1024],
                "fusion_hidden_size": 256},
    "processor": {"size": {"height": 518, "width": 518}, "keep_aspect_ratio": True,
                  "ensure_multiple_of": 14, "image_mean": [0.485, 0.456, 0.406],
                  "image_std": [0.229, 0.224, 0.225]}}
# Three ViT-L. DepthProConfig's own default is smaller than the public network: ViT-B of patch 14,
# and no field of view.
DEPTH_PRO = {"use_fov_model": True} | {
    f"{part}_model_config": VIT_L | {"image_size": 384, "patch_size": 16, "use_mask_token": False}
    for part in ("image", "patch", "fov")}

NOT_HERE = ("Published and not run here: Marigold (LCM) 1.7, GeoWizard 19, DepthFM 0.39. "
            "Marigold's 103 s are those of its settings when the paper was written, not of v1.1.")


class Contestant(NamedTuple):
    name: str                 # of --speed_weights
    title: str
    published: float | None   # seconds, Table 3, Titan RTX
    build: Callable           # (source or None, settings, dtype, device) -> Entry
    settings: dict            # configs of the networks
    hub: tuple | None = None  # hub id, and a file that is in the cache when the weights are


class Entry(NamedTuple):
    run: Callable    # uint8 [H, W, 3] -> map [H, W]
    nets: list       # all networks with weights
    count: Callable  # size of the picture -> {part: [calls, FLOPs a call]}; nets on "meta" by then
    weights: str     # what the table says of them


# ---------------------------------------------------------------- networks without their weights


def cached(hub_id, file):
    """Is this file of the hub in the local cache? Asks no network."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(hub_id, file), str)


def random_net(make, dtype, device):
    """A network of make()'s shape with random weights, in seconds for a thousand million of them.

    The classes' own initialisation takes minutes, so it happens on "meta", where it costs nothing.
    The weights keep the variance of what passes: constants would make a GPU faster than it is,
    values that grow overflow half precision, values that vanish are slow on a CPU.
    """
    with torch.device("meta"):
        net = torch.nn.Module.to(make(), dtype)  # diffusers' own .to warns, of nothing
    if any(True for _ in net.buffers()):  # computed in __init__, and lost on "meta"
        raise ValueError(f"{type(net).__name__} has buffers, which random_net cannot fill")
    net = net.to_empty(device=device).eval().requires_grad_(False)
    for name, p in net.named_parameters():
        if p.ndim > 1:
            p.normal_(std=p[0].numel() ** -0.5)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    return net


# ---------------------------------------------------------------- the contestants


def build_fiffdepth(source, settings, dtype, device):
    """Ours. With settings["tiny"], an AutoencoderTiny takes the place of the full autoencoder."""
    weights = real_or_random(source)
    if source:
        model = FiffDepth.from_pretrained(source, dtype=dtype)
    else:
        unet, vae = random_unet_and_vae(settings, dtype, device)
        model = FiffDepth(unet, vae, DDPMScheduler(**SD_SCHEDULE), prompt_for(unet), AUTHORS_INFO)
    if "tiny" in settings:
        vae, vae_weights = tiny_vae(settings, dtype, device)
        weights += "" if vae_weights == weights else f", VAE {vae_weights}"
        model = FiffDepth(model.unet, vae, model.scheduler, model.prompt, model.info)
    model.eval().to(device)
    return Entry(lambda picture: predict_image(model, picture, size=max(picture.shape[:2])),
                 [model], lambda size: latent_flops(model.vae, model.unet, size, 1), weights)


def tiny_vae(settings, dtype, device):
    """-> an AutoencoderTiny and which weights it has."""
    if cached(*settings["tiny_hub"]):
        return AutoencoderTiny.from_pretrained(settings["tiny_hub"][0], torch_dtype=dtype,
                                               local_files_only=True), "real"
    net = random_net(lambda: AutoencoderTiny.from_config(settings["tiny"]), dtype, device)
    return net, "random"


def random_unet_and_vae(settings, dtype, device):
    return (random_net(lambda: UNet2DConditionModel.from_config(settings["unet"]), dtype, device),
            random_net(lambda: AutoencoderKL.from_config(settings["vae"]), dtype, device))


def prompt_for(unet):
    """The empty prompt's shape [1, 2, width]: two tokens, begin and end."""
    return torch.randn(1, 2, unet.config.cross_attention_dim, dtype=unet.dtype)


def build_marigold(source, settings, dtype, device):
    """diffusers' pipeline at its own defaults; settings["steps"] may replace that of steps."""
    from diffusers import DDIMScheduler, MarigoldDepthPipeline

    if source:
        pipe = MarigoldDepthPipeline.from_pretrained(source, torch_dtype=dtype,
                                                     local_files_only=True)
    else:
        unet, vae = random_unet_and_vae(settings, dtype, device)
        pipe = MarigoldDepthPipeline(
            unet, vae, DDIMScheduler(prediction_type="v_prediction", **SD_SCHEDULE), None, None,
            prediction_type="depth",
            **{k: v for k, v in settings.items() if k.startswith("default_")})
        # without a text encoder; a real one runs once, before the clock
        pipe.empty_text_embedding = prompt_for(unet)
    pipe.to(device).set_progress_bar_config(disable=True)
    resize = pipe.image_processor.resize_to_max_edge  # no bfloat16 on a CPU: it is done in float32
    pipe.image_processor.resize_to_max_edge = lambda image, *how: resize(
        image.float(), *how).to(image.dtype)
    steps = settings["steps"] or pipe.default_denoising_steps
    generator = torch.Generator(device).manual_seed(0)

    def run(picture):
        result = pipe(Image.fromarray(picture), num_inference_steps=steps, generator=generator)
        return result.prediction[0, ..., 0]

    return Entry(run, [pipe.unet, pipe.vae], lambda _: latent_flops(
        pipe.vae, pipe.unet, pipe.default_processing_resolution, steps), real_or_random(source))


def build_depth_anything(source, settings, dtype, device):
    """The network of our teacher, with the teacher's resizing."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

    if source:
        teacher = Teacher.from_pretrained(source, dtype=dtype).to(device)
    else:
        config = DepthAnythingConfig(**settings["network"])
        teacher = Teacher(random_net(lambda: DepthAnythingForDepthEstimation(config), dtype,
                                     device), settings["processor"])
    return Entry(lambda picture: teacher(to_tensor(picture, device))[0].cpu().numpy(),
                 [teacher.net],
                 lambda size: network_flops(teacher.net, teacher.resized(size, size)),
                 real_or_random(source))


def build_depth_pro(source, settings, dtype, device):
    """With its field of view. transformers' processor, which wants torchvision, in five lines."""
    from transformers import DepthProConfig, DepthProForDepthEstimation

    if source:
        net = DepthProForDepthEstimation.from_pretrained(source, dtype=dtype,
                                                         local_files_only=True).eval().to(device)
    else:
        config = DepthProConfig(**settings)
        net = random_net(lambda: DepthProForDepthEstimation(config), dtype, device)
    side = round(net.config.patch_size / net.config.scaled_images_ratios[0])  # 1536

    def run(picture):
        x = F.interpolate(to_tensor(picture, device), (side, side), mode="bilinear")
        out = net(x.to(dtype))
        width_by_focal_length = 2 * torch.tan(torch.deg2rad(out.field_of_view.float()) / 2)
        inverse = out.predicted_depth.float() * width_by_focal_length  # 1/m
        inverse = F.interpolate(inverse[:, None], picture.shape[:2], mode="bilinear")
        return (1 / inverse[0, 0].clamp(1e-4, 1e4)).cpu().numpy()

    return Entry(run, [net], lambda _: network_flops(net, (side, side)), real_or_random(source))


def to_tensor(picture, device):
    """uint8 [H, W, 3] -> [1, 3, H, W] in [-1, 1]"""
    return torch.tensor(picture, device=device).permute(2, 0, 1)[None].float() / 127.5 - 1


def real_or_random(source):
    return "real" if source else "random"


CONTESTANTS = (
    Contestant("fiffdepth", "FiffDepth", 0.092, build_fiffdepth, STABLE_DIFFUSION),
    Contestant("fiffdepth", "FiffDepth, tiny VAE", None, build_fiffdepth, STABLE_DIFFUSION | {
        "tiny": {}, "tiny_hub": ("madebyollin/taesd", "diffusion_pytorch_model.safetensors")}),
    Contestant("marigold", "Marigold v1.1, default settings", 103, build_marigold, MARIGOLD,
               ("prs-eth/marigold-depth-v1-1", "unet/diffusion_pytorch_model.safetensors")),
    Contestant("marigold", "Marigold v1.1, 1 step", None, build_marigold, MARIGOLD | {"steps": 1},
               ("prs-eth/marigold-depth-v1-1", "unet/diffusion_pytorch_model.safetensors")),
    Contestant("depth_anything", "Depth Anything V2-L", 0.026, build_depth_anything,
               DEPTH_ANYTHING,
               ("depth-anything/Depth-Anything-V2-Large-hf", "model.safetensors")),
    Contestant("depth_pro", "Depth Pro", 0.23, build_depth_pro, DEPTH_PRO,
               ("apple/DepthPro-hf", "model.safetensors")),
)


# ---------------------------------------------------------------- FLOPs
# torch's counter: a multiply-add is 2; products and convolutions only. On "meta", where nothing is
# computed, attention falls apart into the products that the counter knows; a fused kernel on a CPU
# would count as 0.


def latent_flops(vae, unet, size, calls):
    """-> {part: [calls, FLOPs a call]} of a picture [1, 3, size, size] through encoder, UNet,
    decoder."""
    blocks = vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels
    cells = -(-size // 2 ** (len(blocks) - 1))
    empty = {"device": "meta", "dtype": unet.dtype}
    picture = torch.empty(1, 3, size, size, **empty)
    latent, unet_latent = (torch.empty(1, channels, cells, cells, **empty) for channels in
                           (vae.config.latent_channels, unet.config.in_channels))
    prompt = prompt_for(unet).to("meta")
    return {"encoder": [1, flops(vae.encode, picture)],
            "UNet": [calls, flops(unet, unet_latent, 0, prompt)],
            "decoder": [1, flops(vae.decode, latent)]}


def network_flops(net, size):
    """-> {child of the network: [1, FLOPs]}; size: (H, W) of its input."""
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, *size, device="meta", dtype=net.dtype))
    counts = {name: sum(counter.get_flop_counts()[f"{type(net).__name__}.{name}"].values())
              for name, _ in net.named_children()}
    assert sum(counts.values()) == counter.get_total_flops(), "work outside the children"
    return {name: [1, n] for name, n in counts.items()}


def flops(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


# ---------------------------------------------------------------- seconds


def seconds_of(run, size, images, warm_up, device):
    """-> seconds of each picture (numpy arrays in memory to a map in memory), and the last map."""
    pictures, seconds = np.random.default_rng(0), []
    for i in range(warm_up + images):
        picture = pictures.integers(0, 256, (size, size, 3), np.uint8)
        synchronize(device)
        began = time.perf_counter()
        values = run(picture)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds[warm_up:], values


def synchronize(device):
    if device.split(":")[0] in ("cuda", "mps"):
        getattr(torch, device.split(":")[0]).synchronize()


def time_one(c, source, precision, device, size, images, warm_up):
    """One contestant in one precision -> what its row says. Its networks are gone afterwards."""
    entry = c.build(source, c.settings, getattr(torch, precision), device)
    seconds, values = seconds_of(entry.run, size, images, warm_up, device)
    assert values.shape == (size, size), f"{c.title}: a map of {values.shape}"
    for net in entry.nets:
        net.to("meta")
    remark = "" if np.isfinite(values).all() else ", map not finite"
    return {"weights": entry.weights + remark, "mean": float(np.mean(seconds)),
            "sd": float(np.std(seconds, ddof=1)) if images > 1 else None,
            "flops": entry.count(size)}


def speed_results(device, images, warm_up=1, size=512, sources=None, contestants=CONTESTANTS,
                  finished=None):
    """Yields a dict for each contestant and precision, which json can store.

    sources   {name: folder or hub id} of weights to take instead of those in the hub's cache
    finished  {key: dict} of an earlier run, yielded as they are
    """
    half, machine = "float16" if device.startswith("cuda") else "bfloat16", machine_name(device)
    for c in contestants:
        given = (sources or {}).get(c.name)
        source = given or (c.hub[0] if c.hub and cached(*c.hub) else None)
        for precision in ("float32", half):
            key = f"{c.title} | {precision} | {given} | {size} | {images} | {machine}"
            result = (finished or {}).get(key)
            if result is None:
                result = {"key": key, "method": c.title, "precision": precision, "error": None,
                          "published": c.published}
                try:
                    with torch.inference_mode():
                        result |= time_one(c, source, precision, device, size, images, warm_up)
                except Exception as error:  # whatever it is, the others are still to be measured
                    result["error"] = explain(error)
                gc.collect()  # pipelines refer to themselves
                if device.startswith("cuda"):
                    torch.cuda.empty_cache()
            yield result


def machine_name(device):
    """All that seconds depend on, beside the method: with another name they are measured anew."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return (f"{device} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}), "
            f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")


# ---------------------------------------------------------------- the table


def speed_lines(device, images, warm_up=1, size=512, keep=lambda result: None, **options):
    """Yields the lines of the Markdown table, each as soon as it is measured.

    keep gets each result (a file may want it); options: see speed_results.
    """
    yield (f"{machine_name(device)}; {images} pictures of {size}x{size} after {warm_up}, batch 1, "
           "resizing included; a multiply-add is 2 FLOP")
    yield ""
    yield ("| method | weights | precision | seconds, mean ± sd | TFLOP | "
           "published seconds (Titan RTX) |")
    yield "|---|---|---|---|---|---|"
    for result in speed_results(device, images, warm_up, size, **options):
        keep(result)
        yield speed_row(result)
    yield ""
    yield NOT_HERE


def speed_row(r):
    published = "" if r["published"] is None else f"{r['published']:g}"
    if r["error"]:
        reason = r["error"].replace("|", "/")
        return f"| {r['method']} | | {r['precision']} | failed: {reason} | | {published} |"
    spread = "" if r["sd"] is None else f" ± {r['sd']:.2g}"
    parts = " + ".join(f"{name} {f'{calls} x ' if calls > 1 else ''}{n / 1e12:.2f}"
                       for name, (calls, n) in r["flops"].items())
    total = sum(calls * n for calls, n in r["flops"].values()) / 1e12
    return (f"| {r['method']} | {r['weights']} | {r['precision']} | {r['mean']:.3g}{spread} | "
            f"{total:.2f} = {parts} | {published} |")


def run_speed(a):
    """--speed: the table, line by line; what --out already holds for this machine is not timed."""
    names = {c.name for c in CONTESTANTS}
    sources = dict(word.split("=", 1) if "=" in word else (word, "") for word in a.speed_weights)
    if not set(sources) <= names or not all(sources.values()):
        raise UserError(f"--speed_weights {' '.join(a.speed_weights)}: NAME=DIR with a NAME of "
                        f"{', '.join(sorted(names))}")
    if a.checkpoint:
        sources.setdefault("fiffdepth", a.checkpoint)
    device = choose_device(a.device)
    on_gpu = device.startswith("cuda")
    images = (100 if on_gpu else 3) if a.speed_images is None else a.speed_images
    if images < 1:
        raise UserError(f"--speed_images {images}: must be at least 1")
    for flag in ("data", "list", "predictions", "vae", "size", "teacher", "space", "frames",
                 "stride"):
        if getattr(a, flag) is not None:
            raise UserError(f"--{flag} has no meaning with --speed; leave it out")
    log = read_log(a.out)
    finished = {key: result for key, result in log.speeds.items() if not result["error"]}

    def keep(result):
        if result["key"] not in finished:
            add_line(log, result)

    for line in speed_lines(device, images, 3 if on_gpu else 1, sources=sources, keep=keep,
                            finished=finished):
        print(line, flush=True)
    return 0


# ---------------------------------------------------------------- the command


def predictors(a):
    """Who is scored -> a function of the set's name: one program's maps, or the checkpoint, and
    the teacher and a vertical ramp where --teacher asks for them or the set is the small world."""
    if a.predictions:
        if not a.space or len(a.space) != 1:
            raise UserError("--predictions needs one --space: disparity, depth or metric, "
                            "what the maps hold")
        for flag in ("checkpoint", "teacher", "size", "vae"):
            if getattr(a, flag) is not None:
                raise UserError(f"--{flag} has no meaning with --predictions; leave it out")
        maps = other_program(a.predictions, a.space[0])
        return lambda name: [maps]
    if "metric" in (a.space or ()):
        raise UserError("--space metric: only --predictions may hold metres")
    model, device, dtype = fiffdepth(a)
    beside = functools.cache(lambda: [teacher(a.teacher or HERE / "nano/weights/teacher", device,
                                              dtype), ramp()])
    return lambda name: [model] + (beside() if a.teacher or name == "nano" else [])


def open_sets(a):
    """All sets, before the first is scored: a wrong one must not wait for hours."""
    default = HERE / "nano/data/wild/test"
    if a.data is None and not default.exists():
        raise UserError(f"{default} is not there yet; "
                        "`python nano/scenes.py` makes the small world (minutes)")
    for flag, value in (("--frames", a.frames), ("--stride", a.stride)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    if a.size is not None and a.size < 0:
        raise UserError(f"--size {a.size}: pixels, or 0 for the picture's own")
    rows = tuple(row for row in SETS + TEST_SETS if row.name in TESTS)
    sources = parse_sources(a.data or [f"nano={default}"], a.list or (), rows)
    return [open_set(name, path, listed, a) for name, (path, listed) in sources.items()]


def jobs(s, who, a):
    """Yields (predictor, size, space) for every line of a set's table."""
    for predictor in who(s.name):
        own = "depth" if predictor.space == "metric" else predictor.space
        spaces = a.space if a.space and not a.predictions and s.test.measure in ALIGNED else [own]
        sizes = (a.size,) if a.size is not None else s.test.sizes
        for size in sizes if predictor.sized else sizes[:1]:
            for space in spaces:
                yield predictor, size, space


def run(a):
    """Scores all sets -> exit status: 0, or 1 when an image has no score."""
    sets, log = open_sets(a), read_log(a.out)
    who, failed = predictors(a), False
    for s in sets:
        runs = []
        for predictor, size, space in jobs(s, who, a):
            run_name, failures = score_set(s, predictor, size, space, log)
            runs.append(run_name)
            for reason, images in failures.items():
                failed = True
                print(f"{predictor.title}, {len(images)} without a score: {reason}; the first: "
                      f"{s.name}/{images[0].removeprefix(s.name + '/')}", file=sys.stderr)
        print("\n".join(set_table(log, runs, a.all_metrics)), flush=True)
    report(log, a.all_metrics)
    return 1 if failed else 0


def flags():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", action="extend", metavar="NAME=PATH",
        help="sets to score, folder or .tar: " + " ".join(TESTS) + "; without it, the small "
        "world's held-out wild scenes")
    add("--list", nargs="+", action="extend", metavar="NAME=FILE",
        help="list files in Marigold's form; without one, images are found by name and sorted")
    add("--checkpoint", metavar="DIR|HUB_ID",
        help="model to score, or to time; without it nano/weights/fiffdepth is scored, and a "
        "network of Stable Diffusion 2's size timed")
    add("--vae", metavar="DIR|HUB_ID", help="another autoencoder of the same latent space")
    add("--teacher", metavar="DIR|HUB_ID", help="also score a teacher (Sec. 3.3) and a vertical "
        "ramp; for the small world its own teacher is the default")
    add("--predictions", metavar="DIR", help="score .npy maps of another program instead, of the "
        "pictures' size, in their sub-folders: NAME.npy, NAME_depth.npy or Marigold's pred_ID.npy")
    add("--space", nargs="+", choices=("disparity", "depth", "metric"),
        help="where to align: default, the checkpoint's own; with --predictions, what the maps are")
    add("--size", type=int, help="pixels of the longer side in the network, 0 for the picture's "
        "own; default, the protocol's of each set")
    add("--frames", type=int, help="use the first so many images only")
    add("--stride", type=int, help="score every so many of them; default 1, for Spring 5")
    add("--all_metrics", action="store_true",
        help="also RMSE, RMSE log, log10, SILog, delta2, delta3")
    add("--out", type=Path, default=Path("runs/evaluate.jsonl"), metavar="FILE.jsonl",
        help="results, a line an image, and all tables beside it as .md; what is there already "
        "is not computed again")
    add("--speed", action="store_true", help="the running times of Table 3 in seconds, not scores")
    add("--speed_images", type=int, metavar="N",
        help="pictures timed for each method; without it, 100 on CUDA and 3 elsewhere")
    add("--speed_weights", nargs="+", default=[], metavar="NAME=DIR|HUB_ID",
        help="weights for --speed: " + ", ".join(sorted({c.name for c in CONTESTANTS}))
        + "; without it, those in the hub's cache, or random ones")
    add("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"),
        help="precision of the network; auto is float16 on CUDA, else float32")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu), one of them, or cuda:1")
    return parser


def main(argv=None):
    try:
        a = flags().parse_args(argv)
        with torch.inference_mode():
            return run_speed(a) if a.speed else run(a)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or '--out'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
