"""The paper's Tables 1 and 2: aligned depth and pairs of points, boundaries (Sec. 4.2).

    python evaluate.py         # FiffDepth, its teacher and a vertical ramp on held-out wild scenes
    python evaluate.py --checkpoint runs/sd2 --data nyu=nyu_labeled_extracted.tar da2k=DA-2K
    python evaluate.py --predictions maps/ --space depth --data nyu=/data/nyu   # anyone's maps

Read top to bottom: metrics on arrays (numpy in, floats out) -> PROTOCOLS (what decides each number:
size, alignment, range) -> predictors -> one image to a row -> the loop -> the command. The sets on
disk are benchmarks/sets.py, the results and tables benchmarks/report.py, Table 3 is
benchmarks/speed.py.

Each scored image is a line in --out at once: an interrupted run goes on, nothing is computed twice,
and memory does not grow. An image without a score is counted and named, never averaged in.
"""
import argparse
import collections
import functools
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

# Threads that wait should sleep: those that read and score need the cores, too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks import report
from benchmarks.sets import TEST_SETS, PairSet, find_maps, map_of, scene_of, version_of
from data import (SETS, BadFrame, FrameSet, HelpFormatter, UserError, add_line, command, explain,
                  parse_sources, stamp)
from infer import identity, load_model, predict_batch
from model import Teacher

HERE = Path(__file__).resolve().parent
THRESHOLDS = np.linspace(1.05, 1.25, 10)  # of boundaries, as ratios of depth; they are weights too
# To be raised when a change here changes a score: results of earlier versions are then ignored.
PROGRAM = 3


# ---------------------------------------------------------------- Table 1: aligned depth


def fit_line(pred, depth, mask, space="disparity", max_res=None):
    """-> scale and shift by least squares of align; NaN for fewer than two pixels."""
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
        return np.nan, np.nan
    target = 1 / y[fit] if space == "disparity" else y[fit]
    terms = np.stack([x[fit], np.ones(fit.sum())], 1)
    return np.linalg.lstsq(terms, target, rcond=None)[0]


def on_line(pred, scale, shift, space, lowest=1e-3):
    """A map [H, W] at a scale and shift -> metres [H, W]; see align."""
    aligned = scale * np.asarray(pred, np.float64) + shift
    return 1 / np.maximum(aligned, lowest) if space == "disparity" else np.maximum(aligned, 1e-6)


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
    return on_line(pred, *fit_line(pred, depth, mask, space, max_res), space, lowest)


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
    finite = pred[np.isfinite(pred)]
    low, high = float(finite.min()), float(finite.max())
    if low < 0 or space == "depth" and high > 1:
        raise BadFrame(f"values {low:g}..{high:g}: {space} maps must not be negative"
                       + (" and lie in [0, 1]" if space == "depth" else ""))
    if space == "disparity":
        return 1 / np.maximum(pred, 1e-3 * high)
    return pred + 0.01 if space == "depth" else pred


def score(pred, depth, valid, space, near, far):
    """What train.py and nano/ watch: AbsRel, delta1 and boundary F1 of a relative map [H, W] after
    least squares and a clip to near..far metres."""
    aligned = np.clip(align(pred, depth, valid, space), near, far)
    return tuple(metric(aligned, depth, valid) for metric in (abs_rel, delta1, boundary_f1))


# ---------------------------------------------------------------- what decides each number


class Protocol(NamedTuple):
    """How a set of data.SETS or benchmarks.sets.TEST_SETS is scored."""
    title: str                # its column, as in benchmarks/published.csv
    measure: str              # depth, small, pairs, f1 or recall: see row_of
    sizes: tuple = (0,)       # longer side in the network, pixels; 0: as stored
    clip: tuple = ()          # metres, of aligned maps; (): the layout's near and far
    max_res: int = 0          # see align
    stride: int = 1           # every so many images
    note: str = ""            # for the tables


# Sizes, ranges and alignment of Table 1 are Marigold's. For the boundary sets and DA-2K the paper
# names no size: 768, Stable Diffusion 2's, and the picture's own, as two rows.
PROTOCOLS = {
    "nyu": Protocol("NYUv2", "depth"),
    "kitti": Protocol("KITTI", "depth"),
    "eth3d": Protocol("ETH3D", "depth", (756,), max_res=1024),
    "scannet": Protocol("ScanNet", "depth"),
    "diode": Protocol("DIODE-Full", "depth", (640,), (0.6, 350.0),
                      note="valid where the mask file says so"),
    "da2k": Protocol("DA-2K", "pairs", (768, 0), note="the whole has about 1,000 and 2,068 pairs"),
    "sintel": Protocol("Sintel F1", "f1", (768, 0)),
    "sintel-clean": Protocol("Sintel clean F1", "f1", (768, 0)),
    "spring": Protocol("Spring F1", "f1", (768, 0), stride=5),
    "ibims": Protocol("iBims F1", "f1", (768, 0)),
    "am2k": Protocol("AM R", "recall", (768, 0)),
    "p3m": Protocol("P3M R", "recall", (768, 0)),
    "p3m-p": Protocol("P3M-P R", "recall", (768, 0)),
    "dis5k": Protocol("DIS R", "recall", (768, 0), note="Depth Pro's 200 are chosen by "
                      "--list dis5k=dis5k_sample_list.txt"),
    "pairs": Protocol("own pairs", "small"),
    "nano": Protocol("small world", "small"),
    "hypersim": Protocol("Hypersim", "depth"),
    "vkitti": Protocol("Virtual KITTI 2", "depth"),
}
ALIGNED = ("depth", "small", "f1")  # measures that align a map first


class TestSet(NamedTuple):
    """An opened set and the images of it to score."""
    frames: object            # a FrameSet, or a PairSet
    picked: list              # numbers of images
    lost: list                # what was picked and lacks a file: ["set/file: reason"]
    chosen: str               # how, in words

    @property
    def protocol(self):
        return PROTOCOLS[self.frames.name]

    @property
    def clip(self):
        """Metres to which aligned maps are clipped."""
        return self.protocol.clip or (self.frames.layout.near, self.frames.layout.far)


def open_set(name, path, listed, a):
    if name == "da2k" and listed:
        raise UserError("--list da2k=...: annotations.json is its list")
    frames = (PairSet(path, a.frames) if name == "da2k" else
              FrameSet(name, path, listed, cap=a.frames, rows=SETS + TEST_SETS))
    stride = a.stride or PROTOCOLS[name].stride
    wanted = set(frames.wanted[::stride])  # before files are missed: a gap must not shift the rest
    chosen = ([f"list {listed}"] if listed else []) + (
        [f"the first {a.frames}"] if a.frames else []) + ([f"stride {stride}"] * (stride > 1))
    return TestSet(frames, [i for i, n in enumerate(frames.names) if n in wanted],
                   [line for line in frames.missing
                    if line.removeprefix(f"{name}/").partition(": ")[0] in wanted],
                   ", ".join(chosen))


def describe(s):
    """Everything that decides the numbers of a set, but for what each line of it names itself."""
    test, layout = s.protocol, s.frames.layout
    words = [f"{test.title}, {s.frames.path}: {len(s.picked)} images"
             + (f" (known: {layout.count})" if layout.count else "")]
    words += [text for text in (s.chosen, test.note) if text]
    if test.measure in ALIGNED:
        if layout.near or np.isfinite(layout.far):
            words.append(f"valid {layout.near:g} < depth < {layout.far:g} m"
                         + (", sky counts as the farthest" if layout.sky else ""))
        if layout.crop:
            words.append("cut to the bottom-centre 352 x 1216")
        if layout.window:
            words.append("scored in rows {}:{}, columns {}:{}".format(*layout.window[:4]))
        words.append("least squares per image" + (f" on columns thinned to {test.max_res}"
                                                  if test.max_res else ""))
        words.append("aligned maps clipped to {:g}..{:g} m".format(*s.clip))
    if test.measure in ("f1", "recall"):
        words.append("raw: disparity x as depth 1 / max(x, max(x)/1000), depth d as d + 0.01")
    return "; ".join([*words, "mean over images" if test.measure != "pairs" else
                      "all pairs pooled; those of a picture without a score are wrong"])


# ---------------------------------------------------------------- predictors


class Predictor(NamedTuple):
    """Whose maps are scored. A row of results belongs to its weights, precision and device."""
    title: str
    source: str               # checkpoint or folder, as the user wrote it
    space: str                # of its maps: disparity, depth or metric
    predict: Callable         # (frames, number of the image, uint8 [H, W, 3], size) -> map [H, W]
    identity: str             # changes with the weights
    sized: bool = True        # does the longer side matter to it?
    version: Callable = lambda frames, i: ""      # changes with the file of one map


def fiffdepth(a):
    """-> the checkpoint as a Predictor, its device and precision."""
    checkpoint = a.checkpoint or str(HERE / "nano/weights/fiffdepth")
    model, where = load_model(argparse.Namespace(**vars(a) | {"checkpoint": checkpoint}))

    def predict(frames, i, rgb, size):
        return predict_batch(model, rgb[None], size or max(rgb.shape[:2]), enlarge=True)[0]

    source = f"{short_path(checkpoint)}, {where}" + (f", VAE {a.vae}" if a.vae else "")
    return (Predictor("FiffDepth", source, model.info["target"], predict,
                      identity(where, model.unet, model.vae)),
            model.prompt.device, model.unet.dtype)


def teacher(path, device, dtype):
    net = Teacher.from_pretrained(path, dtype=dtype).to(device)

    def predict(frames, i, rgb, size):
        x = torch.tensor(rgb, device=device).permute(2, 0, 1)[None].float() / 127.5 - 1
        return net(x)[0].float().cpu().numpy()

    where = f"{device}, {str(dtype).removeprefix('torch.')}"
    return Predictor("teacher", f"{short_path(path)}, {where}", "disparity", predict,
                     identity(where, net), sized=False)


def ramp():
    def predict(frames, i, rgb, size):
        return np.linspace(0, 1, len(rgb))[:, None] * np.ones(rgb.shape[1])

    return Predictor("vertical ramp", "", "disparity", predict, "", sized=False)


def short_path(path):
    """A path as results name it: below the project without the folder the project lies in."""
    return str(path).removeprefix(f"{HERE}/")


def other_program(folder, space):
    """Maps that another program saved: see benchmarks/sets.py."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--predictions {folder}: there is no such folder")

    def version(frames, i):
        file = find_maps(folder, frames)[i]
        return "" if file is None else str(stamp(file))

    def predict(frames, i, rgb, size):
        file = find_maps(folder, frames)[i]
        if file is None:
            raise BadFrame(f"no map of the picture's name below {folder}")
        if space == "metric" and file.suffix == ".png":
            raise BadFrame("a .png does not say its unit: save metres as .npy, .npz or .tif")
        return map_of(frames, i, file, rgb.shape[:2])

    return Predictor("maps", str(folder), space, predict, identity(str(folder.resolve())), False,
                     version)


# ---------------------------------------------------------------- one image -> one row


def checked(pred):
    """A map -> the same as float64; without a number and constant ones are no predictions."""
    finite = pred[np.isfinite(pred)]
    if not finite.size:
        raise BadFrame("the prediction is finite nowhere")
    if finite.min() == finite.max():
        raise BadFrame("the prediction is constant")
    return pred.astype(np.float64)


def row_of(s, i, pred, truth, valid, kind, space):
    """{measure: value} of one image. kind: what the map holds; space: where it is aligned.

    Only what is judged must be finite: the points of pairs, the valid pixels of depth, a matte's
    whole picture.
    """
    measure = s.protocol.measure
    judged = tuple(truth.reshape(-1, 2).T) if measure == "pairs" else valid
    if not np.isfinite(pred[judged]).all():
        raise BadFrame("the prediction is not finite where it is judged")
    if measure == "pairs":
        return {"right": round(pair_accuracy(pred, truth, kind) * len(truth)) if len(truth) else 0}
    if measure == "recall":
        inside = truth > 0.1
        if inside.all() or not inside.any():
            raise BadFrame("the matte has no boundary")
        mode = "recall_metric" if kind == "metric" else "recall_raw"
        return {mode: boundary_recall(positive_depth(pred, kind), truth)}
    if not valid.any():
        raise BadFrame("no valid pixel")
    if np.array_equal(pred[valid], truth[valid]):
        raise BadFrame("the map is the truth itself")
    if space == "disparity" and pred[valid].min() < 0:
        raise BadFrame(f"values from {pred[valid].min():g}: disparity must not be negative, for "
                       "only what exceeds 0 is fitted; move the maps to 0 and above")
    scale, shift = fit_line(pred, truth, valid, space, s.protocol.max_res)
    if not np.isfinite([scale, shift]).all():
        raise BadFrame("the prediction cannot be aligned: fewer than two valid pixels to fit, "
                       "which a disparity must exceed 0 for")
    low, high = s.clip
    aligned = np.clip(on_line(pred, scale, shift, space), max(low, 1e-6), high)
    row = {"upside_down": bool(scale < 0)}
    if measure == "f1":
        mode = "f1_metric" if kind == "metric" else "f1_raw"
        return row | {"f1_aligned": boundary_f1(aligned, truth, valid),
                      mode: boundary_f1(positive_depth(pred, kind), truth, valid)}
    flat = *masked(aligned, truth, valid), True
    row |= {"abs_rel": abs_rel(*flat), "delta1": delta1(*flat)} | other_metrics(*flat)
    if measure == "small":
        pairs = random_pairs(truth, valid, zlib.crc32(os.fsencode(s.frames.names[i])))
        row["f1_aligned"] = boundary_f1(aligned, truth, valid)
        row |= {"pairs_right": pair_accuracy(pred, pairs, kind)} if len(pairs) else {}
    return row


# ---------------------------------------------------------------- the loop


def prefetch(function, items, workers=2, waiting=4):
    """map(function, items), in order, computed by threads a few items ahead and no more."""
    with ThreadPoolExecutor(workers) as pool:
        queue = collections.deque()
        for item in items:
            queue.append(pool.submit(function, item))
            if len(queue) > waiting:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def try_image(function, *arguments):
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
        return i, *try_image(s.frames.read, i)

    def predicted():
        for i, item, reason in prefetch(read, indices):
            pred = None
            if reason is None:
                pred, reason = try_image(lambda: checked(predictor.predict(s.frames, i, item[0],
                                                                           size)))
            yield i, pred, item and item[1:], reason  # without the picture: it may be large

    def scored(one):
        i, pred, truth, reason = one
        if reason is not None:
            return i, None, reason
        return i, *try_image(row_of, s, i, pred, *truth, predictor.space, space)

    yield from prefetch(scored, predicted())


def score_set(s, predictor, size, space, folder):
    """Scores what --out does not hold yet, adding each image to it -> what the tables say of it,
    and {reason: [images]} of those without a score."""
    frames, names = s.frames, s.frames.names
    settings = {
        "set": frames.name, "title": s.protocol.title, "path": str(frames.path.resolve()),
        "predictor": predictor.title, "weights": predictor.identity, "map": predictor.space,
        "aligned_in": space if s.protocol.measure in ALIGNED else None,
        "size": size if predictor.sized else None, "test": repr(s.protocol._replace(note="")),
        "layout": repr([getattr(frames.layout, key) for key in ("near", "far", "window", "sky")]),
        "program": PROGRAM}
    file, lines = report.open_results(folder, settings)
    known = {line["image"]: line for line in lines if "image" in line}
    versions = {i: f"{version_of(frames, i)} {predictor.version(frames, i)}" for i in s.picked}
    rows = {i: known[names[i]] for i, version in versions.items()
            if known.get(names[i], {}).get("version") == version}
    failures = collections.defaultdict(list)
    if s.lost:
        failures["a file of theirs is missing"] = list(s.lost)
    title = f"{frames.name}, {predictor.title}" + (
        f", {report.size_label(size)}" if predictor.sized else "")
    todo = [i for i in s.picked if i not in rows]
    for i, row, reason in tqdm(rows_of(s, todo, predictor, size, space), title, len(todo),
                               unit="image", disable=not todo, leave=False,
                               mininterval=0.1 if sys.stderr.isatty() else 30):
        if reason is not None:
            failures[reason].append(names[i])
        else:
            rows[i] = {"image": names[i], "version": versions[i]} | row
            add_line(file, rows[i])
    images = len(s.picked) + len(s.lost)
    summary = {
        "chosen": s.chosen, "source": predictor.source, "protocol": describe(s),
        "scored": len(rows), "failed": sum(map(len, failures.values())),
        "count": frames.layout.count or images, "scores": mean_scores(s, rows),
        "upside_down": sum(row.get("upside_down", False) for row in rows.values())}
    if [line for line in lines if line.get("chosen") == s.chosen][-1:] != [summary]:
        add_line(file, summary)
    return settings | summary, failures


def mean_scores(s, rows):
    """{key: score}: the plain mean over images, as these protocols say; DA-2K over pairs, for all
    and for each scene."""
    if s.protocol.measure == "pairs":
        total, right = collections.Counter(), collections.Counter()
        for i in s.picked:
            name = s.frames.names[i]
            for scene in ("all", scene_of(name)):
                total[scene] += len(s.frames.pairs[name])
                right[scene] += rows[i]["right"] if i in rows else 0
        return {scene: right[scene] / max(n, 1) for scene, n in total.items()}
    found = [rows[i] for i in s.picked if i in rows]
    keys = dict.fromkeys(key for row in found for key in row)
    return {key: float(np.mean([row[key] for row in found if key in row])) for key in keys
            if key not in ("image", "version", "upside_down")}


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
    rows = tuple(row for row in SETS + TEST_SETS if row.name in PROTOCOLS)
    sources = parse_sources(a.data or [f"nano={default}"], a.list or (), rows)
    return [open_set(name, path, listed, a) for name, (path, listed) in sources.items()]


def jobs(s, who, a):
    """Yields (predictor, size, space) for every line of a set's table."""
    for predictor in who(s.frames.name):
        own = "depth" if predictor.space == "metric" else predictor.space
        several = a.space and not a.predictions and s.protocol.measure in ALIGNED
        sizes = (a.size,) if a.size is not None else s.protocol.sizes
        for size in sizes if predictor.sized else sizes[:1]:
            for space in a.space if several else [own]:
                yield predictor, size, space


def run(a):
    """Scores all sets -> exit status: 0, or 1 when an image has no score."""
    sets = open_sets(a)
    report.check_folder(a.out)
    who, failed = predictors(a), False
    for s in sets:
        results = []
        for predictor, size, space in jobs(s, who, a):
            result, failures = score_set(s, predictor, size, space, a.out)
            results.append(result)
            for reason, images in failures.items():
                failed = True
                name = s.frames.name
                print(f"{predictor.title}, {len(images)} without a score: {reason}; the first: "
                      f"{name}/{images[0].removeprefix(name + '/')}", file=sys.stderr)
        print("\n".join(report.set_table(results, a.all_metrics)), flush=True)
    tables = report.write_tables(a.out, report.all_results(a.out, PROGRAM), a.all_metrics)
    print("\n".join(tables), end="")
    return 1 if failed else 0


def flags():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", action="extend", metavar="NAME=PATH",
        help="sets to score, folder or .tar: " + " ".join(PROTOCOLS) + "; without it, the small "
        "world's held-out wild scenes")
    add("--list", nargs="+", action="extend", metavar="NAME=FILE",
        help="list files in Marigold's form; without one, images are found by name and sorted")
    add("--checkpoint", metavar="DIR|HUB_ID",
        help="model to score; without it nano/weights/fiffdepth")
    add("--vae", metavar="DIR|HUB_ID", help="another autoencoder of the same latent space")
    add("--teacher", metavar="DIR|HUB_ID", help="also score a teacher (Sec. 3.3) and a vertical "
        "ramp; for the small world its own teacher is the default")
    add("--predictions", metavar="DIR", help="score maps of another program instead, of the "
        "pictures' size, in their sub-folders: NAME, NAME_depth or Marigold's pred_ID, as .npy, "
        ".npz (Depth Pro), float .tif or 16-bit .png")
    add("--space", nargs="+", choices=("disparity", "depth", "metric"),
        help="where to align: default, the checkpoint's own; with --predictions, what the maps are")
    add("--size", type=int, help="pixels of the longer side in the network, 0 for the picture's "
        "own; default, the protocol's of each set")
    add("--frames", type=int, help="use the first so many images only")
    add("--stride", type=int, help="score every so many of them; default 1, for Spring 5")
    add("--all_metrics", action="store_true",
        help="also RMSE, RMSE log, log10, SILog, delta2, delta3")
    add("--out", type=Path, default=Path("runs/evaluate"), metavar="DIR",
        help="results, a line an image, and all tables in tables.md; what is there already is not "
        "computed again")
    add("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"),
        help="precision of the network; auto is float16 on CUDA, else float32")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu), one of them, or cuda:1")
    return parser


@torch.inference_mode()
def main(argv=None):
    return run(flags().parse_args(argv))


if __name__ == "__main__":
    sys.exit(command(main))
