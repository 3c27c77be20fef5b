"""Tests of evaluate.py and benchmarks/, to be merged into test_all.py: TestEvaluate, TestSets,
TestReport, TestSpeed. In each: equations, behaviour, files, one table of user mistakes."""
import ast
import csv
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import data  # noqa: E402
import evaluate as ev  # noqa: E402
from benchmarks import report, sets, speed  # noqa: E402
from data import SETS, BadFrame, FrameSet, UserError  # noqa: E402
from model import SD_SCHEDULE, FiffDepth  # noqa: E402

# ================================================================ fixtures and file makers
# The next six are as in test_all.py.


def _bytes(array, format="PNG", **options):
    """An array or PIL image -> the bytes of a picture file; uint16 becomes a 16-bit grey PNG."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _rgb(H, W, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)


def _write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def _tar(path, files):
    """Members begin with ./ and there are folder members, as `tar -cf x.tar .` writes them."""
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in files.items():
            member = tarfile.TarInfo("./" + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def _tiny_model(width=16):
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        cross_attention_dim=width, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2, norm_num_groups=4)
    vae = AutoencoderKL(block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4,
                        norm_num_groups=4, scaling_factor=0.3,
                        down_block_types=("DownEncoderBlock2D",) * 3,
                        up_block_types=("UpDecoderBlock2D",) * 3)
    prompt = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(3))
    return FiffDepth(unet, vae, DDPMScheduler(**SD_SCHEDULE), prompt,
                     {"target": "disparity", "size": 32})


def _refused(kind, function, *arguments, **options):
    """The text of the error that the call must raise."""
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    return str(caught.value)


# ---------------------------------------------------------------- small sets of the true formats


def _npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _test_set(name, H=24, W=32):
    """-> {file: bytes} of one frame of a test set, its depth (or alpha) and validity."""
    depth = np.linspace(1.0, 9.0, H * W).reshape(H, W).astype(np.float32)
    depth = np.round(depth * 256) / 256
    if name in ("nyu", "scannet"):
        folder, image, truth = {
            "nyu": ("test/kitchen_0004", "rgb_0001.png", "depth_0001.png"),
            "scannet": ("scene0406_02", "color/000300.jpg", "depth/000300.png")}[name]
        raw = np.round(depth * 1000).astype(np.uint16)
        raw[0, 0], raw[1, :] = 0, 10000
        picture = _bytes(_rgb(H, W), "PNG" if name == "nyu" else "JPEG")
        return ({f"{folder}/{image}": picture, f"{folder}/{truth}": _bytes(raw)}, raw / 1000,
                (raw > 1) & (raw < 10000))
    if name == "diode":
        stem, mask = "indoors/scene_00021/scan_00189/00021_x", np.ones((H, W), np.float32)
        mask[:3], depth[0, 0] = 0, np.nan
        return ({f"{stem}.png": _bytes(_rgb(H, W)), f"{stem}_depth.npy": _npy(depth[..., None]),
                 f"{stem}_depth_mask.npy": _npy(mask)}, depth, mask > 0)
    if name in ("sintel", "sintel-clean"):
        depth[:2], bad = 1e5, np.zeros((H, W), np.uint8)
        bad[5] = 255
        dpt = b"PIEH" + np.array([W, H], "<i4").tobytes() + depth.astype("<f4").tobytes()
        frame, folder = "alley_1/frame_0001", "clean" if "clean" in name else "final"
        return ({f"training/{folder}/{frame}.png": _bytes(_rgb(H, W)),
                 f"training/depth/{frame}.dpt": dpt, f"training/invalid/{frame}.png": _bytes(bad)},
                np.minimum(depth, 80), bad == 0)
    if name == "ibims":
        raw = np.round(depth * 65535 / 50).astype(np.uint16)
        raw[0], raw[1] = 0, 65535
        ok, opaque = np.full((H, W), 255, np.uint8), np.full((H, W), 255, np.uint8)
        ok[2], opaque[3] = 0, 0
        valid = np.ones((H, W), bool)
        valid[:4] = False
        files = {"rgb": _rgb(H, W), "depth": raw, "mask_invalid": ok, "mask_transp": opaque}
        return ({f"{k}/corridor_01.png": _bytes(v) for k, v in files.items()}, raw * (50 / 65535),
                valid)
    alpha = np.zeros((H, W), np.uint8)
    alpha[6:18, 8:24], alpha[6, 8:24] = 255, 10  # 10 / 255 lies below the threshold of 0.1
    image, mask = {"am2k": ("validation/original/m_1.jpg", "validation/mask/m_1.png"),
                   "p3m": ("validation/P3M-500-NP/original_image/p_1.jpg",
                           "validation/P3M-500-NP/mask/p_1.png"),
                   "p3m-p": ("P3M-500-P/blurred_image/p_1.jpg", "P3M-500-P/mask/p_1.png"),
                   "dis5k": ("DIS-VD/im/1#A#b c#x.jpg", "DIS-VD/gt/1#A#b c#x.png")}[name]
    return ({image: _bytes(_rgb(H, W), "JPEG"), mask: _bytes(alpha)}, alpha / 255,
            np.ones((H, W), bool))


KITTI = ("2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png",
         "2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000069.png")
SCANNET = "scene0406_02/color/000300"  # the picture of _test_set("scannet"), without .jpg


def _frames(name, path, *arguments, **options):
    return FrameSet(name, path, *arguments, rows=SETS + sets.TEST_SETS, **options)


def _da2k(root, missing=False):
    def pair(first, second, nearer):
        return {"point1": first, "point2": second, "closer_point": nearer}

    pairs = {"images/indoor/a.png": [pair([1, 2], [9, 3], nearer) for nearer in
                                     ("point1", "point2")],
             "images/aerial/b.png": [pair([0, 0], [11, 15], "point1")]}
    files = {"annotations.json": json.dumps(pairs).encode(),
             "images/indoor/a.png": _bytes(_rgb(12, 16))}
    return _write(root, files if missing else
                  files | {"images/aerial/b.png": _bytes(_rgb(12, 16, 1))})


def _save_map(root, image, values):
    (root / image).parent.mkdir(parents=True, exist_ok=True)
    np.save(root / f"{image}.npy", values)


@pytest.fixture
def evaluate(tmp_path, capsys):
    """evaluate(words) -> exit status, what was printed, the errors; --out is r, maps in maps."""
    def run(*words):
        status = ev.main(["--out", str(tmp_path / "r"), "--device", "cpu", *map(str, words)])
        out, err = capsys.readouterr()
        return status, out, _without_bars(err)

    (tmp_path / "maps").mkdir()
    return run


@pytest.fixture
def score_map(evaluate, tmp_path):
    """score_map(values, space) of the one frame of ScanNet -> as evaluate."""
    def run(values, space="depth", *words, name=SCANNET):
        _save_map(tmp_path / "maps", name, values)
        return evaluate("--predictions", tmp_path / "maps", "--space", space, "--data",
                        f"scannet={tmp_path / 'scannet'}", *words)

    _write(tmp_path / "scannet", _test_set("scannet")[0])
    return run


def _without_bars(err):
    return re.sub(r"(\r[^\r\n]*)*\r", "", err)


def _cells(text, row, first=5):
    """The cells of the table row that begins with `row`, from images on."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {row}"))
    return [cell.strip() for cell in line.split("|")[first:-1]]


# ================================================================ evaluate


def _slow_recall(depth, alpha):
    """The definition, pair by pair: runs above t in a row, the first largest of each stays."""
    total, ts = 0.0, np.linspace(1.05, 1.25, 10)
    inverse, b = 1 / np.asarray(depth).clip(min=1e-6), np.asarray(alpha) > 0.1
    for t in ts:
        found = []
        for D, m in ((inverse, b), (inverse.T, b.T)):
            for flip in (False, True):
                D1, m1 = (D[:, ::-1], m[:, ::-1]) if flip else (D, m)
                hits = truth = 0
                for row, inside in zip(D1, m1):
                    with np.errstate(all="ignore"):
                        r = row[:-1] / row[1:]
                    runs, run = [], []
                    for k in range(len(r)):
                        if r[k] > t:
                            run.append(k)
                        elif run:
                            runs, run = runs + [run], []
                    runs += [run] if run else []
                    order = -1 if flip else 1  # the first in the order of the picture
                    kept = {max(run[::order], key=lambda k: r[k]) for run in runs}
                    edges = {k for k in range(len(r)) if inside[k] and not inside[k + 1]}
                    hits, truth = hits + len(kept & edges), truth + len(edges)
                found.append(hits / max(truth, 1))
        total += t / ts.sum() * np.mean(found)
    return total


def _square():
    square = np.full((20, 20), 4.0)
    square[5:15, 5:15] = 2
    return square


class TestEvaluate:
    # ------------------------------------------------------------ equations

    @pytest.mark.parametrize("space,pred,aligned,error", [
        ("depth", [0, 0.25, 0.5, 1], [0.6, 2.4, 4.2, 7.8], 0.16875),
        ("disparity", [1, 0.4, 0.2, 0], [0.990476, 2.166667, 3.586207, 10.4], 0.124076)])
    def test_align_golden_values(self, space, pred, aligned, error):
        depth, mask = np.array([[1.0, 2, 4, 8]]), np.ones((1, 4), bool)
        out = ev.align(np.array([pred]), depth, mask, space)
        np.testing.assert_allclose(out, [aligned], atol=1e-5)
        assert ev.abs_rel(out, depth, mask) == pytest.approx(error, abs=1e-6)
        assert ev.delta1(out, depth, mask) == 0.75

    def test_align_needs_two_pixels(self):
        depth = np.array([[1.0, 2, 4]])
        assert np.isnan(ev.align(depth, depth, np.array([[True, False, False]]), "depth")).all()
        assert np.isnan(ev.align(-depth, depth, True)).all()  # a disparity must exceed 0

    def test_align_thins_columns_as_the_public_code_does(self):
        g = np.random.default_rng(0)
        pred, depth = g.random((40, 60)), g.uniform(1, 9, (40, 60))
        kept = np.floor(np.arange(30) / (30 / 60)).astype(int)  # every second column, all rows
        line = np.polyfit(pred[:, kept].ravel(), depth[:, kept].ravel(), 1)
        out = ev.align(pred, depth, True, "depth", max_res=30)
        np.testing.assert_allclose(out, np.maximum(np.polyval(line, pred), 1e-6))
        np.testing.assert_array_equal(ev.align(pred, depth, True, "depth", max_res=60),
                                      ev.align(pred, depth, True, "depth"))

    @pytest.mark.parametrize("metric", [ev.abs_rel, ev.delta1, ev.boundary_f1])
    def test_metrics_take_any_mask_and_are_nan_without_numbers(self, metric):
        depth = np.array([[1.0, 2], [4, 8]])
        assert np.isnan(metric(depth, depth, np.zeros((2, 2), bool)))
        assert np.isnan(metric(np.full((2, 2), np.nan), depth, np.ones((2, 2), bool)))
        assert metric(depth * 1.1, depth, np.array([[1, 0]])) == metric(
            depth * 1.1, depth, np.array([[True, False], [True, False]]))

    def test_metrics_by_hand(self):
        depth = np.array([[1.0, 2], [4, 8]])
        column = np.array([[True], [False]])
        assert ev.abs_rel(depth * 1.1, depth, column) == pytest.approx(0.1)
        assert ev.delta1(-depth, depth, True) == 0  # a negative depth is wrong
        out = ev.other_metrics(np.array([[2.0, 2.0]]), np.array([[1.0, 4.0]]), True)
        ln2 = np.log(2)
        assert out == pytest.approx({"rmse": np.sqrt(2.5), "rmse_log": ln2, "log10": np.log10(2),
                                     "silog": 100 * ln2, "delta2": 0, "delta3": 0})
        out = ev.other_metrics(np.array([[1.5, 1.9]]), np.array([[1.0, 1.0]]), True)
        assert (out["delta2"], out["delta3"]) == (0.5, 1)
        scaled = ev.other_metrics(np.array([[3.0, 6.0]]), np.array([[1.0, 2.0]]), True)
        assert scaled["silog"] == pytest.approx(0, abs=1e-6)  # invariant to scale
        nothing = ev.other_metrics(np.ones((1, 2)), np.ones((1, 2)), False)
        assert all(np.isnan(value) for value in nothing.values())

    def test_pair_accuracy_and_its_ties(self):
        pred = np.array([[3.0, 1.0], [3.0, np.nan]])
        assert ev.pair_accuracy(pred, [[0, 0, 0, 1]]) == 1
        assert ev.pair_accuracy(pred, [[0, 0, 0, 1]], "depth") == 0
        assert ev.pair_accuracy(pred, [[0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1]]) == pytest.approx(
            1 / 3)
        assert np.isnan(ev.pair_accuracy(pred, np.zeros((0, 4))))

    def test_random_pairs_are_seeded_valid_and_apart(self):
        depth = np.random.default_rng(0).uniform(1, 9, (20, 30))
        pairs = ev.random_pairs(depth, depth > 2, 7)
        near, far = depth[pairs[:, 0], pairs[:, 1]], depth[pairs[:, 2], pairs[:, 3]]
        assert len(pairs) == 64
        assert (far > 1.1 * near).all()
        assert (near > 2).all()
        np.testing.assert_array_equal(pairs, ev.random_pairs(depth, depth > 2, 7))
        assert ev.pair_accuracy(1 / depth, pairs) == 1
        assert ev.pair_accuracy(depth, pairs, "metric") == 1

    def test_boundary_f1_golden_values(self):
        split, square = np.full((8, 8), 2.0), _square()
        split[:, 4:] = 5
        assert ev.boundary_f1(split, split) == pytest.approx(0.25)
        assert ev.boundary_f1(np.ones((8, 8)), np.ones((8, 8))) == 0
        assert ev.boundary_f1(square, square) == pytest.approx(1)
        assert ev.boundary_f1(np.roll(square, 1, 1), square) == pytest.approx(0.45)
        faint = np.where(square == 2, 2.0, 2.24)
        assert ev.boundary_f1(faint, square) == pytest.approx(0.376812, abs=1e-6)
        hole = square.copy()
        hole[:, :2] = 0
        assert ev.boundary_f1(square, hole) < 1
        assert ev.boundary_f1(square, hole, hole > 0) == pytest.approx(1)

    @pytest.mark.parametrize("kind", ["noise", "ties", "smooth", "holes", "steps"])
    def test_boundary_recall_is_the_definition(self, kind):
        g = np.random.default_rng(len(kind))
        for _ in range(3):
            H, W = g.integers(2, 24, 2)
            depth = np.exp(g.normal(0, 0.3, (H, W)))
            if kind == "ties":
                depth = np.round(depth * 4) / 4
            if kind == "smooth":
                depth = np.exp(np.cumsum(np.full((H, W), 0.11), 1))
            if kind == "holes":
                depth[g.random((H, W)) < 0.2] = np.inf
                depth[g.random((H, W)) < 0.1] = 0
                depth[g.random((H, W)) < 0.1] = np.nan
            if kind == "steps":
                depth = np.where(g.random((H, W)) < 0.5, 2.0, 2.3)
            alpha = g.random((H, W))
            assert ev.boundary_recall(depth, alpha) == pytest.approx(_slow_recall(depth, alpha),
                                                                     abs=1e-12)

    def test_boundary_recall_golden_values(self):
        square = _square()
        inside = square == 2
        assert ev.boundary_recall(square, inside) == pytest.approx(1)
        assert ev.boundary_recall(square, inside * 255) == pytest.approx(1)
        assert ev.boundary_recall(np.roll(square, 1, 1), inside) == pytest.approx(0.45)
        assert ev.boundary_recall(6 - square, inside) == 0
        assert ev.boundary_recall(square, inside, True) == ev.boundary_recall(square, inside)
        assert np.isnan(ev.boundary_recall(square, inside, np.zeros((20, 20), bool)))
        hidden, broken = np.ones((20, 20), bool), square.copy()
        hidden[:, 12:] = False  # the edge to the right is not asked for, three directions remain
        broken[:, 12:] = np.nan  # what lies under the mask, a larger ratio too, changes nothing
        assert ev.boundary_recall(square, inside, hidden) == pytest.approx(0.75)
        assert ev.boundary_recall(broken, inside, hidden) == pytest.approx(0.75)

    def test_raw_maps_become_positive_depth(self):
        x = np.array([0.0, 0.5, 1.0])
        np.testing.assert_allclose(ev.positive_depth(x, "disparity"), [1000, 2, 1])
        np.testing.assert_allclose(ev.positive_depth(x, "depth"), [0.01, 0.51, 1.01])
        np.testing.assert_array_equal(ev.positive_depth(x, "metric"), x)
        assert "must not be negative" in _refused(BadFrame, ev.positive_depth, x - 1, "disparity")
        assert "lie in [0, 1]" in _refused(BadFrame, ev.positive_depth, x * 2, "depth")

    def test_score_is_aligned_and_clipped(self):
        depth = np.linspace(1, 9, 48).reshape(6, 8)
        error, share, f1 = ev.score(2 * depth + 1, depth, np.ones((6, 8), bool), "depth", 0, 99)
        assert (error, share) == (pytest.approx(0, abs=1e-9), 1)
        assert f1 == pytest.approx(ev.boundary_f1(depth, depth))
        assert ev.score(depth, depth, np.ones((6, 8), bool), "depth", 0, 5)[0] > 0.1

    # ------------------------------------------------------------ behaviour

    def test_reading_and_scoring_overlap_in_order_and_hold_few(self):
        drawn = []
        results = ev.prefetch(lambda x: x * x, (drawn.append(k) or k for k in range(40)))
        assert next(results) == 0
        assert len(drawn) <= 6  # memory does not grow with the set
        assert [0, *results] == [k * k for k in range(40)]

    @pytest.mark.parametrize("space,values,cells", [
        ("depth", lambda depth: depth / 20 + 0.1, ["1", "0", "0", "0.00%", "100.00%"]),
        ("depth", lambda depth: 5 - depth / 20, ["1", "0", "1", "0.00%", "100.00%"]),
        ("metric", lambda depth: depth * 2 - 1, ["1", "0", "0", "0.00%", "100.00%"]),
        ("disparity", lambda depth: 1 / np.maximum(depth, 1), ["1", "0", "0", "0.00%", "100.00%"])])
    def test_least_squares_forgives_scale_and_shift_and_counts_maps_upside_down(
            self, score_map, space, values, cells):
        depth = np.maximum(_test_set("scannet")[1], 1)
        status, out, err = score_map(values(depth), space)
        assert (status, err) == (0, "")
        assert _cells(out, "maps") == cells
        assert "known: 800" in out

    @pytest.mark.parametrize("space,values,reason", [
        ("depth", lambda d: np.full_like(d, 0.5), "the prediction is constant"),
        ("depth", lambda d: np.full_like(d, np.nan), "finite nowhere"),
        ("depth", lambda d: np.where(d > 8, np.nan, d), "not finite where it is judged"),
        ("depth", lambda d: np.where(d > 8, np.inf, d), "not finite where it is judged"),
        ("depth", lambda d: d[1:], "map of 23x32 and picture of 24x32 pixels"),
        ("depth", lambda d: d.astype(np.float32), "the map is the truth itself"),
        ("disparity", lambda d: 2 / np.maximum(d, 1) - 1,
         "values from -0.777778: disparity must not be negative")])
    def test_maps_without_a_score_are_counted_and_named(self, score_map, space, values, reason):
        status, out, err = score_map(values(_test_set("scannet")[1]), space)
        assert status == 1
        assert reason in err
        assert f"first: scannet/{SCANNET}.jpg" in err
        assert err.startswith("maps, 1 without a score: ")
        assert _cells(out, "maps")[:2] == ["0", "1"]

    def test_what_is_not_judged_need_not_be_finite(self, score_map):
        _, depth, valid = _test_set("scannet")
        pred = np.where(valid, depth / 20, np.nan)
        assert _cells(score_map(pred)[1], "maps")[3:] == ["0.00%", "100.00%"]
        pred[0, 0] = np.inf  # its truth is invalid
        assert _cells(score_map(pred)[1], "maps")[3:] == ["0.00%", "100.00%"]

    def test_da2k_counts_missing_pictures_as_wrong(self, evaluate, tmp_path):
        for image in ("indoor/a", "aerial/b"):
            _save_map(tmp_path / "maps/images", image, np.linspace(1, 0, 12)[:, None] * np.ones(16))
        command = ["--predictions", tmp_path / "maps", "--space", "disparity", "--data"]
        status, out, err = evaluate(*command, f"da2k={_da2k(tmp_path / 'all')}")
        assert (status, err) == (0, "")
        assert _cells(out, "maps") == ["2", "0", "66.67%", "50.00%", "100.00%"]
        root = _da2k(tmp_path / "less", missing=True)
        files = {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}
        for path in (root, _tar(tmp_path / "less.tar", files)):
            status, out, err = evaluate(*command, f"da2k={path}")
            assert status == 1
            assert "b.png" in err
            assert _cells(out, "maps") == ["1", "1", "33.33%", "50.00%", "0.00%"]
            assert ", longer side its own |  |  |  |  |  | 33.3 (1 of 2) |" in out

    def test_da2k_is_judged_at_its_points(self, evaluate, tmp_path):
        values = np.linspace(1, 0, 12)[:, None] * np.ones(16)
        values[5] = np.nan  # no point lies there
        for image in ("indoor/a", "aerial/b"):
            _save_map(tmp_path / "maps/images", image, values)
        out = evaluate("--predictions", tmp_path / "maps", "--space", "disparity", "--data",
                       f"da2k={_da2k(tmp_path / 'da2k')}")[1]
        assert _cells(out, "maps")[:3] == ["2", "0", "66.67%"]

    def test_kitti_maps_of_uncut_pictures_are_cut(self, evaluate, tmp_path):
        """infer.py on the folder writes maps of the stored size; the benchmark cuts both."""
        depth = np.tile(np.linspace(5, 60, 375)[:, None], (1, 1242))
        _write(tmp_path / "kitti", {KITTI[0]: _bytes(_rgb(375, 1242)),
                                    KITTI[1]: _bytes((depth * 256).astype(np.uint16))})
        for values, cells in ((depth, ["1", "0", "0", "0.00%", "100.00%"]),
                              (depth[23:, 13:1229], ["1", "0", "0", "0.00%", "100.00%"]),
                              (depth[1:], ["0", "1", "0"])):
            _save_map(tmp_path / "maps", KITTI[0].replace(".png", "_depth"), values / 100)
            out = evaluate("--predictions", tmp_path / "maps", "--space", "depth", "--data",
                           f"kitti={tmp_path / 'kitti'}")[1]
            assert _cells(out, "maps") == cells
        assert "cut to the bottom-centre 352 x 1216" in out
        assert "rows 117:321, columns 43:1172" in out

    def test_strides_count_over_gaps(self, evaluate, tmp_path):
        files = {k.replace("frame_0001", f"frame_{n:04}"): v for n in range(1, 7)
                 for k, v in _test_set("sintel")[0].items() if not (n == 2 and "dpt" in k)}
        _write(tmp_path / "s", files | {"test/final/x/frame_0001.png": _bytes(_rgb(24, 32))})
        status, out, err = evaluate("--predictions", tmp_path / "maps", "--space", "disparity",
                                    "--stride", 2, "--data", f"sintel={tmp_path / 's'}")
        assert "3 images (known: 1064); stride 2" in out  # 1, 3 and 5
        assert _cells(out, "maps")[:2] == ["0", "3"]
        assert "frame_0001" in err
        assert "test/" not in err

    def test_boundary_sets_name_their_mode(self, evaluate, tmp_path):
        for name in ("sintel", "am2k"):
            _write(tmp_path / name, _test_set(name)[0])
        depth, alpha = np.minimum(_test_set("sintel")[1], 80), _test_set("am2k")[1]
        _save_map(tmp_path / "maps/sintel", "training/final/alley_1/frame_0001", 1 / depth)
        _save_map(tmp_path / "maps/am2k", "validation/original/m_1", alpha + 1)
        command = ["--predictions", tmp_path / "maps", "--data", f"sintel={tmp_path / 'sintel'}",
                   f"am2k={tmp_path / 'am2k'}", "--space"]
        out = evaluate(*command, "disparity")[1]
        for words in ("F1 (raw)", "F1 (aligned)", "recall (raw)", "sky counts as the farthest",
                      "1 / max(x, max(x)/1000)", ", raw disparity, longer side its own",
                      "| FiffDepth (paper) | 0.423 | 0.086 |"):
            assert words in out
        assert "| 1.000 (1 of 200) |" in out  # the matte as disparity finds all its boundaries
        assert "F1 (metric)" in evaluate(*command, "metric")[1]

    def test_the_small_worlds_table(self, evaluate, tmp_path):
        _tiny_model().save_pretrained(tmp_path / "m")
        g = np.random.default_rng(0)
        for i in range(3):
            _write(tmp_path / "val", {
                f"rgb_{i:05}.png": _bytes(_rgb(24, 32, i)) if i < 2 else b"",
                f"depth_{i:05}.png": _bytes(g.integers(500, 9000, (24, 32)).astype(np.uint16))})
        status, out, err = evaluate("--checkpoint", tmp_path / "m", "--dtype", "float32", "--data",
                                    f"nano={tmp_path / 'val'}", "--all_metrics")
        assert status == 1
        assert err.count("rgb_00002.png") == 3  # of model, teacher and ramp
        assert re.search(r"\| FiffDepth /\S+, cpu, float32 \| disparity \| disparity \| native \| "
                         r"2 \| 1 \|", out)
        assert "| teacher nano/weights/teacher, cpu, float32 | disparity |" in out
        assert "| vertical ramp | disparity |" in out
        assert "| AbsRel | delta1 | boundary F1 (aligned) | pairs | RMSE m |" in out

    # ------------------------------------------------------------ files

    def test_a_kill_loses_nothing_and_other_weights_or_files_are_scored_again(
            self, evaluate, tmp_path, monkeypatch):
        files = _test_set("scannet")[0]
        _write(tmp_path / "s", files | {k.replace("300", "301"): v for k, v in files.items()})
        command = ["--checkpoint", tmp_path / "m", "--data", f"scannet={tmp_path / 's'}",
                   "--dtype", "float32"]
        calls, real = [], ev.predict_batch
        monkeypatch.setattr(ev, "predict_batch", lambda *a, **k: calls.append(1) or real(*a, **k))

        def new_calls(status=0):
            calls.clear()
            assert evaluate(*command)[0] == status
            return len(calls)

        _tiny_model().save_pretrained(tmp_path / "m")
        first = evaluate(*command)
        (file,) = (tmp_path / "r").glob("*.jsonl")
        lines = file.read_text().splitlines(keepends=True)
        assert [list(json.loads(line))[0] for line in lines] == ["settings", "image", "image",
                                                                 "chosen"]
        file.write_text("".join(lines[:2]) + lines[2][:-20])  # a kill within the second image
        assert new_calls() == 1
        assert evaluate(*command) == first
        assert new_calls() == 0
        file.write_text(lines[0][:40])  # a kill within the first line
        assert new_calls() == 2
        truth = tmp_path / "s/scene0406_02/depth/000301.png"
        truth.write_bytes(_bytes(np.random.default_rng(0).integers(1000, 9000, (24, 32),
                                                                   dtype=np.uint16)))
        assert new_calls() == 1
        _tiny_model(width=8).save_pretrained(tmp_path / "m")  # other weights in the same folder
        assert new_calls() == 2
        command[-1] = "bfloat16"
        assert new_calls() == 2
        command += ["--frames", "1"]
        assert new_calls() == 0
        assert len(list((tmp_path / "r").glob("*.jsonl"))) == 3

    @pytest.mark.parametrize("name", ["NAME.npy", "NAME_depth.npy", "NAME_jpg_depth.npy",
                                      "pred_NAME.npy", "NAME.npz", "pred_NAME.tif",
                                      "NAME_depth.tiff", "NAME_depth.png"])
    @pytest.mark.parametrize("below", ["", "scannet/"])
    def test_maps_of_all_names_and_formats(self, score_map, evaluate, tmp_path, name, below):
        values = (_test_set("scannet")[1] / 20 + 0.1).astype(np.float32)
        folder, stem = SCANNET.rsplit("/", 1)
        file = tmp_path / "maps" / below / folder / name.replace("NAME", stem)
        file.parent.mkdir(parents=True)
        if file.suffix == ".npz":
            np.savez(file, depth=values, focallength_px=600.0)
        elif file.suffix == ".npy":
            np.save(file, values)
        else:
            png = file.suffix == ".png"
            Image.fromarray((values * 65535).astype(np.uint16) if png else values).save(file)
        status, out, err = evaluate("--predictions", tmp_path / "maps", "--space", "depth",
                                    "--data", f"scannet={tmp_path / 'scannet'}")
        assert (status, err) == (0, "")
        assert _cells(out, "maps")[:4] == ["1", "0", "0", "0.00%"]

    def test_marigolds_names_without_rgb(self, evaluate, tmp_path):
        files, depth, _ = _test_set("nyu", 480, 640)
        _write(tmp_path / "nyu", files)
        _save_map(tmp_path / "maps", "test/kitchen_0004/pred_0001", depth / 20)
        out = evaluate("--predictions", tmp_path / "maps", "--space", "depth", "--data",
                       f"nyu={tmp_path / 'nyu'}")[1]
        assert _cells(out, "maps")[:4] == ["1", "0", "0", "0.00%"]
        assert "rows 45:471, columns 41:601" in out

    @pytest.mark.parametrize("name,content,words", [
        (".npy", b"", "no .npy file of numbers"), (".npy", b"text", "no .npy file of numbers"),
        (".npz", b"PK\3\4 cut", "no .npz file of numbers"),
        (".npz", dict(a=np.ones(3), b=np.ones(3)), "the map's .npz holds a, b;"),
        (".png", _bytes(_rgb(24, 32)), "not 16-bit grey"), (".png", b"x", "not an image file"),
        (".tif", _bytes(_rgb(24, 32), "TIFF"), "of mode RGB, not of floating point"),
        (".exr", b"x", "no map of the picture's name")])
    def test_maps_that_cannot_be_read_say_why(self, evaluate, tmp_path, name, content, words):
        _write(tmp_path / "scannet", _test_set("scannet")[0])
        file = tmp_path / "maps" / (SCANNET + name)
        file.parent.mkdir(parents=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            np.savez(file, **content)
        status, _, err = evaluate("--predictions", tmp_path / "maps", "--space", "depth", "--data",
                                  f"scannet={tmp_path / 'scannet'}")
        assert status == 1
        assert words in err

    def test_a_png_is_no_metric_map(self, evaluate, tmp_path):
        _write(tmp_path / "scannet", _test_set("scannet")[0])
        _write(tmp_path / "maps", {f"{SCANNET}.png": _bytes(np.full((24, 32), 99, np.uint16))})
        err = evaluate("--predictions", tmp_path / "maps", "--space", "metric", "--data",
                       f"scannet={tmp_path / 'scannet'}")[2]
        assert "does not say its unit" in err or "constant" in err

    def test_the_sets_own_files_are_no_maps(self, evaluate, tmp_path):
        files = _test_set("diode")[0]
        _write(tmp_path / "diode", files)
        _tar(tmp_path / "diode.tar", files)
        for path, words in ((tmp_path / "diode", "no map of the picture's name"),
                            (tmp_path / "diode.tar", "the truth itself")):  # a copy of the truth
            status, _, err = evaluate("--predictions", tmp_path / "diode", "--space", "depth",
                                      "--data", f"diode={path}")
            assert status == 1
            assert words in err

    # ------------------------------------------------------------ mistakes

    @pytest.mark.parametrize("command,words", [
        ("--data nyu=DIR/empty", "expected Marigold's NYUv2"),
        ("--data nyu=DIR/nothing", "no file or folder"),
        ("--data nyx=DIR", "unknown name nyx"),
        ("--data da2k=DIR/empty", "no annotations.json"),
        ("--data da2k=DIR/bad", "annotations.json is not as DA-2K's"),
        ("--data da2k=DIR/bad --list da2k=DIR/list.txt", "annotations.json is its list"),
        ("--data SET --predictions DIR", "--predictions needs one --space"),
        ("--data SET --predictions DIR --space depth --size 9", "--size has no meaning"),
        ("--data SET --predictions DIR/no --space depth", "no such folder"),
        ("--data SET --space metric", "only --predictions"),
        ("--data SET --stride 0", "--stride 0: must be at least 1"),
        ("--data SET --size -1", "--size -1"),
        ("--data SET --predictions DIR --space depth --out DIR/list.txt", "is a file"),
        ("--data two=DIR --predictions DIR --space depth", "unknown name two")])
    def test_mistakes_are_one_sentence(self, evaluate, tmp_path, command, words):
        (tmp_path / "empty").mkdir()
        _write(tmp_path, {"bad/annotations.json": b"[1, 2]", "list.txt": b""})
        _write(tmp_path / "s", _test_set("scannet")[0])
        command = command.replace("SET", "scannet=DIR/s").replace("DIR", str(tmp_path))
        status, _, err = evaluate(*command.split())
        assert status == 2
        assert words in err
        assert err.count("\n") == 1

    def test_one_map_for_two_pictures_is_refused(self, evaluate, tmp_path):
        ibims = _test_set("ibims")[0]
        _write(tmp_path / "s", ibims | {k.replace("corridor_01", "pred_corridor_01"): v
                                        for k, v in ibims.items()})
        _save_map(tmp_path / "maps", "rgb/pred_corridor_01", np.ones((24, 32)))
        status, _, err = evaluate("--predictions", tmp_path / "maps", "--space", "depth", "--data",
                                  f"ibims={tmp_path / 's'}")
        assert status == 2
        assert "would be the map of two pictures" in err


# ================================================================ the test sets


class TestSets:
    # ------------------------------------------------------------ files to metres

    @pytest.mark.parametrize("tar", [False, True])
    @pytest.mark.parametrize("name", ["nyu", "scannet", "diode", "sintel", "sintel-clean", "ibims",
                                      "am2k", "p3m", "p3m-p", "dis5k"])
    def test_depth_and_validity_of_each_format(self, tmp_path, name, tar):
        files, depth, valid = _test_set(name)
        if name == "nyu":  # only the crop of the protocol counts
            files, depth, valid = _test_set(name, 480, 640)
            valid &= np.pad(np.ones((426, 560), bool), ((45, 9), (41, 39)))
        frames = _frames(name, _tar(tmp_path / "set.tar", files) if tar else
                         _write(tmp_path / "set", files))
        rgb, found, ok = frames.read(0)
        assert frames.names == list(files)[:1]
        assert not frames.missing
        assert rgb.shape[:2] == depth.shape
        np.testing.assert_array_equal(ok, valid)
        np.testing.assert_allclose(found[valid], depth[valid], rtol=1e-6)

    def test_kitti_is_cut_and_masked_as_eigen(self, tmp_path):
        raw = np.full((375, 1242), 256 * 8, np.uint16)
        raw[100:, 600] = 256 * 80
        second = KITTI[0].replace("69.png", "70.png")
        _write(tmp_path, {KITTI[0]: _bytes(_rgb(375, 1242)), KITTI[1]: _bytes(raw),
                          second: _bytes(_rgb(375, 1242))})
        (tmp_path / "list.txt").write_text(f"{KITTI[0]} {KITTI[1]} 721.5377\n"
                                           f"{second} None 721.5377")
        for listed in (None, tmp_path / "list.txt"):
            frames = _frames("kitti", tmp_path, listed)
            rgb, depth, valid = frames.read(0)
            assert rgb.shape == (352, 1216, 3)
            assert frames.names == [KITTI[0]]
            assert len(frames.missing) == (listed is None)  # without a list, that without truth
            rows, columns = np.nonzero(valid)
            assert (rows.min(), rows.max(), columns.min(), columns.max()) == (117, 320, 43, 1171)
            assert not valid[200, 600 - 13]  # 80 m
            assert (depth[200, 600 - 13], depth[0, 0]) == (80, 8)

    def test_eth3d_is_a_headerless_array(self, tmp_path):
        depth = np.full((4032, 6048), 5, "<f4")
        depth[0], depth[1] = np.inf, 0
        picture = "rgb/office/images/dslr_images/DSC_0219.JPG"
        truth = "depth/office_dslr_depth/office/ground_truth_depth/dslr_images/DSC_0219.JPG"
        _write(tmp_path, {picture: _bytes(np.zeros((4032, 6048, 3), np.uint8), "JPEG"),
                          truth: depth.tobytes()})
        frames = _frames("eth3d", tmp_path)
        _, found, valid = frames.read(0)
        assert not valid[:2].any()
        assert valid[2:].all()
        assert (found[2:] == 5).all()
        (tmp_path / truth).write_bytes(depth.tobytes()[:-4])
        assert "bytes, not 4032 x 6048 x 4" in _refused(BadFrame, frames.read, 0)

    def test_spring_disparity_becomes_depth(self, tmp_path):
        h5py = pytest.importorskip("h5py")
        disparity = np.full((48, 64), 10.0, np.float32)
        disparity[:2], disparity[2:4], disparity[4:6] = 0, np.nan, 0.5
        file = io.BytesIO()
        with h5py.File(file, "w") as hdf5:
            hdf5["disparity"] = disparity
        _write(tmp_path, {"train/0001/frame_left/frame_left_0002.png": _bytes(_rgb(24, 32)),
                          "train/0001/disp1_left/disp1_left_0002.dsp5": file.getvalue(),
                          "train/0001/cam_data/intrinsics.txt":
                              b"1 1 960 540\n2000 2000 960 540\n"})
        _, depth, valid = _frames("spring", tmp_path).read(0)
        assert depth.shape == (24, 32)
        assert depth[5, 0] == pytest.approx(2000 * 0.065 / 10)
        assert (depth[0] == 200).all()  # sky: as far as the range goes
        assert (depth[2] == 200).all()  # 260 m, beyond the range: likewise
        assert valid[[0, 2, 5]].all()
        assert not valid[1].any()  # NaN
        (tmp_path / "train/0001/cam_data/intrinsics.txt").write_text("1 1 960 540\n")
        assert "no focal length for frame 0002" in _refused(UserError, _frames, "spring", tmp_path)

    def test_sintel_without_its_invalid_maps(self, tmp_path):
        files, depth, _ = _test_set("sintel")
        _write(tmp_path, {k: v for k, v in files.items() if "invalid" not in k})
        frames = _frames("sintel", tmp_path)
        assert not frames.missing
        assert frames.read(0)[2].all()

    # ------------------------------------------------------------ lists and tars

    def test_lists_name_other_roots_and_names_with_blanks(self, tmp_path):
        _write(tmp_path / "DIS5K", _test_set("dis5k")[0])
        (tmp_path / "list.txt").write_text("DIS5K/DIS-VD/im/1#A#b c#x.jpg\n")
        for root in (tmp_path, tmp_path / "DIS5K"):
            frames = _frames("dis5k", root, tmp_path / "list.txt")
            assert len(frames) == 1
            assert frames.read(0)[1].max() == 1

    def test_listed_names_of_another_kind_are_missing(self, tmp_path):
        files = _test_set("dis5k")[0]
        _write(tmp_path, files | {"DIS-VD/im/odd.png": next(iter(files.values()))})
        (tmp_path / "list.txt").write_text("DIS-VD/im/odd.png\n" + next(iter(files)) + "\n")
        frames = _frames("dis5k", tmp_path, tmp_path / "list.txt")
        assert len(frames) == 1
        assert "odd.png: no picture named like" in frames.missing[0]

    def test_tar_files_with_two_names(self, tmp_path):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            member = tarfile.TarInfo("./a.png")
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
            link = tarfile.TarInfo("./b.png")
            link.type, link.linkname = tarfile.LNKTYPE, "./a.png"
            tar.addfile(link)
        store = data.Tar(tmp_path / "x.tar")
        assert store.names() == ["a.png", "b.png"]
        assert store.read("b.png") == b"abc"
        assert _refused(BadFrame, store.read, "c.png") == "c.png is not in x.tar"

    # ------------------------------------------------------------ what is damaged

    @pytest.mark.parametrize("name,broken", [
        ("sintel", "training/depth/alley_1/frame_0001.dpt"),
        ("diode", "indoors/scene_00021/scan_00189/00021_x_depth.npy"),
        ("ibims", "mask_transp/corridor_01.png"), ("am2k", "validation/mask/m_1.png")])
    def test_damaged_files_are_bad_frames_and_absent_ones_are_named(self, tmp_path, name, broken):
        files = _test_set(name)[0]
        frames = _frames(name, _write(tmp_path, files))
        for content in (b"", files[broken][: len(files[broken]) // 2], b"not this format at all"):
            (tmp_path / broken).write_bytes(content)
            _refused(BadFrame, frames.read, 0)
        (tmp_path / broken).unlink()
        assert f"no {broken}" in _refused(UserError, _frames, name, tmp_path)

    @pytest.mark.parametrize("name,file", [
        ("sintel", "training/invalid/alley_1/frame_0001.png"),
        ("ibims", "mask_transp/corridor_01.png")])
    def test_masks_of_another_size(self, tmp_path, name, file):
        frames = _frames(name, _write(tmp_path, _test_set(name)[0]))
        (tmp_path / file).write_bytes(_bytes(np.zeros((5, 5), np.uint8)))
        assert "differ in size" in _refused(BadFrame, frames.read, 0)

    def test_points_outside_the_picture(self, tmp_path):
        pair = {"point1": [0, 0], "point2": [12, 0], "closer_point": "point1"}
        _write(tmp_path, {"images/x/a.png": _bytes(_rgb(12, 16)),
                          "annotations.json": json.dumps({"images/x/a.png": [pair]}).encode()})
        assert "outside the picture" in _refused(BadFrame, sets.PairSet(tmp_path).read, 0)


# ================================================================ results and tables


def _result(**changes):
    """What report.py shows of one set and predictor."""
    return {"set": "nyu", "title": "NYUv2", "predictor": "FiffDepth", "weights": "0123456789ab",
            "map": "disparity", "aligned_in": "disparity", "size": 0, "source": "m, cpu, float32",
            "chosen": "", "protocol": "NYUv2, /nyu", "scored": 654, "failed": 0, "count": 654,
            "upside_down": 0, "scores": {"abs_rel": 0.0444, "delta1": 0.9777}} | changes


class TestReport:
    # ------------------------------------------------------------ tables

    def test_a_table_is_markdown_and_its_rows_come_one_by_one(self):
        def rows():
            yield ["a|b", 1]
            raise RuntimeError("not asked for yet")

        lines = report.table(["x", "y"], rows())
        assert [next(lines) for _ in range(3)] == ["| x | y |", "|---|---|", "| a/b | 1 |"]

    def test_published_numbers_have_the_columns_of_the_protocols(self):
        columns = {title for titles in report.TABLES.values() for title in titles}
        with open(report.PUBLISHED, newline="") as file:
            head, *rows = csv.reader(file)
        assert set(head) - {"method", "seconds"} == columns
        assert columns <= {protocol.title for protocol in ev.PROTOCOLS.values()}
        assert {len(row) for row in rows} == {len(head)}
        assert len({row[0] for row in rows}) == len(rows)

    @pytest.mark.parametrize("number,rows,line", [
        (0, 16, "| FiffDepth (paper) | 4.4 / 97.8 | 7.3 / 93.5 | 7.1 / 97.2 | 4.2 / 97.9 | "
         "23.9 / 78.1 | 97.1 |"),
        (1, 3, "| Depth Pro | 0.409 | 0.079 | 0.176 | 0.173 | 0.168 | 0.077 |")])
    def test_the_papers_tables(self, number, rows, line):
        lines = report.paper_table(list(report.TABLES.values())[number], [])
        assert len(lines) == 2 + rows
        assert line in lines

    def test_our_rows_stand_below_the_papers(self):
        scannet = {"set": "scannet", "title": "ScanNet", "scored": 9, "count": 800}
        found = [_result(), _result(**scannet), _result(aligned_in="depth"),
                 _result(weights="abcdef012345"), _result(chosen="the first 5", scored=5),
                 _result(scored=0)]
        lines = report.paper_table(report.TABLES["Table 1: AbsRel % / delta1 %, DA-2K accuracy %"],
                                   found)[-4:]
        ours, full = "| FiffDepth m, cpu, float32, weights ", "4.4 / 97.8"
        assert lines == [
            f"{ours}012345, aligned in disparity | {full} |  |  | {full} (9 of 800) |  |  |",
            f"{ours}012345, aligned in depth | {full} |  |  |  |  |  |",
            f"{ours}abcdef, aligned in disparity | {full} |  |  |  |  |  |",  # other weights
            f"{ours}012345, aligned in disparity | {full} (5 of 654) |  |  |  |  |  |"]

    def test_boundary_rows_name_mode_and_size(self):
        found = [_result(title="Sintel F1", size=768, scores={"f1_raw": 0.1, "f1_aligned": f1},
                         aligned_in=space) for f1, space in ((0.2, "disparity"), (0.3, "depth"))]
        lines = report.paper_table(report.TABLES["Table 2: boundary F1, recall"], found)
        assert [line.partition("012345, ")[2][:45] for line in lines[-3:]] == [
            "raw disparity, longer side 768 | 0.100 |  |  ",  # once: no alignment changes it
            "aligned in disparity, longer side 768 | 0.200",
            "aligned in depth, longer side 768 | 0.300 |  "]

    def test_a_sets_table_begins_with_its_protocol_and_shows_other_metrics_on_demand(self):
        found = [_result(scores={"abs_rel": 0.1, "delta1": 0.5, "rmse": 2}, upside_down=3)]
        lines = report.set_table(found)
        assert lines[0] == "NYUv2, /nyu"
        assert lines[2].endswith("| images | without a score | scale < 0 | AbsRel | delta1 |")
        assert lines[4].endswith("| 654 | 0 | 3 | 10.00% | 50.00% |")
        assert report.set_table(found, others=True)[4].endswith("| 50.00% | 2.000 |")

    # ------------------------------------------------------------ files

    def test_a_line_cut_short_is_dropped_and_the_next_begins_anew(self, tmp_path):
        file = tmp_path / "x.jsonl"
        report.add_line(file, {"a": "é"})
        with open(file, "a") as out:
            out.write('{"b": 2')
        report.add_line(file, {"c": 3})
        assert report.read_lines(file) == [{"a": "é"}, {"c": 3}]

    def test_settings_begin_a_file_and_others_another(self, tmp_path):
        settings = {"set": "nyu", "predictor": "maps", "size": None, "aligned_in": "depth", "p": 1}
        file, lines = report.open_results(tmp_path, settings)
        assert lines == [{"settings": settings}]
        report.add_line(file, {"image": "x"})
        assert report.open_results(tmp_path, settings) == (
            file, [{"settings": settings}, {"image": "x"}])
        other, _ = report.open_results(tmp_path, settings | {"p": 2})
        assert other != file
        file.write_text('{"prompt": "mine"}\n')
        assert "does not begin as" in _refused(UserError, report.open_results, tmp_path, settings)
        assert file.read_text() == '{"prompt": "mine"}\n'

    def test_the_last_summary_of_each_choice_counts(self, tmp_path):
        settings = _result(program=1, path="/s", set="scannet", title="ScanNet")
        file, _ = report.open_results(tmp_path, settings)
        for chosen, scored in (("", 1), ("the first 2", 2), ("", 3)):
            report.add_line(file, {"chosen": chosen, "scored": scored})
        report.open_results(tmp_path, settings | {"program": 0})
        (tmp_path / "notes.jsonl").write_text('{"prompt": "mine"}\nnot json\n')
        other, _ = report.open_results(tmp_path, _result(program=1, path="/n"))
        report.add_line(other, {"chosen": ""})
        found = report.all_results(tmp_path, program=1)
        assert [(r["title"], r["chosen"], r["scored"]) for r in found] == [
            ("NYUv2", "", 654), ("ScanNet", "", 3), ("ScanNet", "the first 2", 2)]

    def test_other_peoples_tables_are_left_alone(self, score_map, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/tables.md").write_text("# my notes")
        (tmp_path / "mine/a.jsonl").write_text("my notes\n")
        status, _, err = score_map(_test_set("scannet")[1] / 20, "depth", "--out",
                                   tmp_path / "mine")
        assert status == 2
        assert "would be replaced" in err
        assert (tmp_path / "mine/tables.md").read_text() == "# my notes"
        (tmp_path / "mine/tables.md").unlink()
        assert score_map(_test_set("scannet")[1] / 20, "depth", "--out", tmp_path / "mine")[0] == 0
        assert (tmp_path / "mine/a.jsonl").read_text() == "my notes\n"
        assert (tmp_path / "mine/tables.md").read_text().startswith(report.MARK)

    def test_all_runs_stay_in_the_tables(self, score_map, tmp_path):
        depth = _test_set("scannet")[1]
        for space in ("depth", "metric", "depth"):
            score_map(depth / 20 + 0.1, space)
        text = (tmp_path / "r/tables.md").read_text()
        assert text.startswith(report.MARK + "\nTable 1: ")
        assert text.count(f"| maps {tmp_path / 'maps'} | depth | depth | its own | 1 | 0 |") == 1
        assert text.count(f"| maps {tmp_path / 'maps'} | metric | depth | its own | 1 | 0 |") == 1
        assert "(1 of 800)" in text

    def test_paths_in_any_script_under_the_c_locale(self, tmp_path):
        root = _write(tmp_path / "données-深度", _test_set("scannet")[0])
        _save_map(tmp_path / "карты", SCANNET, _test_set("scannet")[1] / 20)
        done = subprocess.run(
            [sys.executable, HERE / "evaluate.py", "--predictions", tmp_path / "карты", "--space",
             "depth", "--data", f"scannet={root}", "--out", tmp_path / "r"], cwd=tmp_path,
            capture_output=True, text=True, encoding="utf-8",
            env=os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
        assert done.returncode == 0, done.stderr
        assert "深度" in (tmp_path / "r/tables.md").read_text("utf-8")
        assert not list(tmp_path.glob("**/.tables*"))

    # ------------------------------------------------------------ imports

    def test_imports_run_one_way(self):
        def imports(file):
            tree = ast.walk(ast.parse((HERE / file).read_text("utf-8")))
            return {name.split(".")[0] for node in tree if isinstance(node, (ast.Import,
                                                                             ast.ImportFrom))
                    for name in ([node.module] if isinstance(node, ast.ImportFrom) else
                                 [alias.name for alias in node.names])}

        for file in (HERE / "benchmarks").glob("*.py"):
            assert not imports(file) & {"evaluate", "train", "nano"}, file
        assert not imports("evaluate.py") & {"train", "nano"}
        assert not imports("benchmarks/sets.py") & {"infer", "model"}
        assert not imports("benchmarks/report.py") & {"infer", "model", "torch"}


# ================================================================ Table 3: running time

SPEED_UNET = {"block_out_channels": (16,) * 4, "layers_per_block": 1, "attention_head_dim": 8,
              "cross_attention_dim": 32, "norm_num_groups": 8}
SPEED_VAE = speed.SD_VAE | {"block_out_channels": (16,) * 4, "layers_per_block": 1,
                            "norm_num_groups": 8}
SPEED_VIT = {"model_type": "dinov2", "hidden_size": 32, "num_attention_heads": 4,
             "num_hidden_layers": 4}
SPEED_SETTINGS = {
    speed.build_fiffdepth: {"unet": SPEED_UNET, "vae": SPEED_VAE},
    speed.build_marigold: {"unet": SPEED_UNET | {"in_channels": 8}, "vae": SPEED_VAE,
                           "default_processing_resolution": 48},
    speed.build_depth_anything: {
        "network": {"backbone_config": SPEED_VIT | {"image_size": 56, "out_indices": [1, 2, 3, 4],
                                                    "reshape_hidden_states": False},
                    "reassemble_hidden_size": 32, "neck_hidden_sizes": [8, 8, 16, 16],
                    "fusion_hidden_size": 8},
        "processor": speed.DEPTH_ANYTHING["processor"] | {"size": {"height": 56, "width": 56}}},
    speed.build_depth_pro: {
        "use_fov_model": True, "patch_size": 64, "intermediate_hook_ids": [3, 1],
        "intermediate_feature_dims": [16, 16], "scaled_images_feature_dims": [32, 32, 16],
        "fusion_hidden_size": 16, "num_fov_head_layers": 0, "merge_padding_value": 1} | {
        f"{part}_model_config": SPEED_VIT | {"image_size": 64, "patch_size": 8,
                                             "use_mask_token": False}
        for part in ("image", "patch", "fov")},
}
SPEED_TINY_VAE = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4,
                  "num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}


def _small(method):
    """The method with small networks."""
    settings = method.settings | SPEED_SETTINGS[method.build]
    return method._replace(settings=settings | (
        {"tiny": SPEED_TINY_VAE} if "tiny" in settings else {}))


SMALL = tuple(map(_small, speed.METHODS))
BOTH = ("float32", "bfloat16")


def _measure(methods=SMALL, images=2, **options):
    return list(speed.measure("cpu", images, 1, 32, methods=methods, **options))


@pytest.fixture
def native(monkeypatch):
    """A CPU on which bfloat16 is as fast as float32."""
    monkeypatch.setattr(speed, "cpu_speedup", lambda dtype: 1.0)


@pytest.fixture
def clock(monkeypatch):
    """The clock of speed.py stands still until a test moves it."""
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

        perf_counter = monotonic

    monkeypatch.setattr(speed, "time", Clock())
    return speed.time


class TestSpeed:
    # ------------------------------------------------------------ FLOPs and networks

    def test_flops_count_attention_and_a_multiply_add_is_two(self):
        q = torch.empty(1, 8, 64, 40, device="meta")
        with torch.inference_mode():  # attention counts, though not where the kernel is a fused one
            assert (speed.flops(F.scaled_dot_product_attention, q, q, q)
                    == 2 * 2 * 8 * 64 * 64 * 40)
            x, w = torch.empty(1, 3, 10, 10, device="meta"), torch.empty(5, 3, 3, 3, device="meta")
            assert speed.flops(F.conv2d, x, w) == 2 * 5 * 8 * 8 * 3 * 9

    def test_random_weights_keep_the_variance(self):
        net = speed.random_net(lambda: torch.nn.Sequential(
            torch.nn.Linear(400, 400), torch.nn.LayerNorm(400)), torch.float32, "cpu")
        assert abs(net[0](torch.randn(64, 400)).std() - 1) < 0.1
        assert net[0].bias.eq(0).all()
        assert net[1].weight.eq(1).all()
        assert "buffers" in _refused(ValueError, speed.random_net,
                                     lambda: torch.nn.BatchNorm2d(3), torch.float32, "cpu")

    def test_depth_pro_is_that_of_transformers(self):
        """Our five lines of processing against the formulas of DepthProImageProcessor."""
        picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
        with torch.inference_mode():
            torch.manual_seed(0)
            timed = SMALL[5].build(None, SMALL[5].settings, torch.float32, "cpu")
            net, side = timed.nets[0], 256
            x = (torch.tensor(picture).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
            out = net(F.interpolate(x, (side, side), mode="bilinear", align_corners=False))
            focal = 0.5 * 64 / torch.tan(0.5 * torch.deg2rad(out.field_of_view[0]))
            depth = F.interpolate(out.predicted_depth[None] * 64 / focal, (64, 64),
                                  mode="bilinear")
            want = 1 / depth.squeeze().clamp(1e-4, 1e4)
            assert np.allclose(timed.run(picture), want.numpy(), rtol=1e-4)

    # ------------------------------------------------------------ the table

    def test_every_method_has_a_time_finite_maps_and_work_in_each_part(self, native):
        found = _measure(images=2)
        found += list(speed.measure("cpu", 1, 0, 32, ["bfloat16"], methods=SMALL))
        assert [r["error"] for r in found] == [None] * 12
        assert {r["weights"] for r in found} == {"random"}  # and each map was finite
        assert all(r["mean"] > 0 for r in found)
        assert all(r["sd"] >= 0 for r in found[:6])
        assert [r["pictures"] for r in found] == [2] * 6 + [1] * 6
        assert [r["precision"] for r in found] == ["float32"] * 6 + ["bfloat16"] * 6
        assert all(n > 0 for r in found for _, n in r["flops"].values())
        lines = list(speed.lines_of(found, "cpu", 2, 1, 32, 20))
        rows = [line for line in lines if line.startswith("|")]
        assert len(rows) == 2 + 12
        assert len({row.count("|") for row in rows}) == 1
        assert rows[4].endswith("| 103 |")
        assert "UNet 4 x " in rows[4]
        assert "UNet 4 x " not in rows[5]
        assert lines[-1].startswith("Published and not run here: Marigold (LCM) 1.7, DepthFM 0.39, "
                                    "GeoWizard 19.")
        assert len({r["key"] for r in found}) == 12
        finished = {r["key"]: r for r in json.loads(json.dumps(found))}
        broken = [method._replace(build=None) for method in SMALL]  # it would fail, were it called
        assert _measure(broken, finished=finished) == found[:6]

    def test_an_emulated_precision_is_a_row_that_says_so(self, monkeypatch):
        monkeypatch.setattr(speed, "cpu_speedup", lambda dtype: 0.01)
        single, half = _measure(SMALL[:1], precisions=BOTH)
        assert single["error"] is None
        assert speed.row_of(half)[2:5] == ["bfloat16", "", "emulated on this CPU, not timed"]

    @pytest.mark.parametrize("minutes,pictures,seconds", [(1, [1, 1, 1], 60),
                                                          (0.25, [1, 1, None], 20)])
    def test_time_is_shared_and_ends(self, clock, minutes, pictures, seconds):
        """Pictures of 10 s. In 60 s three methods have time for a warm-up and a picture each; in 15
        two have time for one, and the last for none."""
        def build(source, settings, dtype, device):
            def run(picture):
                clock.now += 10
                return np.ones(picture.shape[:2])

            return speed.Timed(run, [], lambda size: {"all": [1, 1]}, "random")

        methods = [SMALL[0]._replace(title=str(k), build=build) for k in range(3)]
        found = _measure(methods, images=100, minutes=minutes)
        assert [r.get("pictures") for r in found] == pictures
        assert clock.now == seconds
        assert [r["error"] for r in found if r["error"]] == [
            f"not timed: the {minutes:g} --minutes are over"] * pictures.count(None)

    def test_a_picture_that_takes_too_long_is_stopped(self, clock):
        layer = torch.nn.Identity()

        def build(source, settings, dtype, device):
            def run(picture):
                for _ in range(100):
                    clock.now += 1
                    layer(torch.ones(1))

            return speed.Timed(run, [], None, "random")

        (found,) = _measure([SMALL[0]._replace(build=build)], minutes=0.2)
        assert found["error"] == "longer than its share of --minutes"
        assert clock.now == 13
        layer(torch.ones(1))  # the limit is gone

    def test_a_failure_is_one_row(self):
        bad = SMALL[0]._replace(title="bad", settings=SMALL[0].settings | {
            "unet": SPEED_UNET | {"down_block_types": ("No|Such",) * 4}})
        found = _measure([bad, SMALL[4]])
        assert [bool(r["error"]) for r in found] == [True, False]
        line = report.line_of(speed.row_of(found[0]))
        assert "failed: " in line
        assert line.count("|") == len(speed.HEAD) + 1

    def test_real_weights(self):
        weights = f"{HERE}/nano/weights/"
        found = _measure([SMALL[0], SMALL[4]], images=1, sources={
            "fiffdepth": weights + "fiffdepth", "depth_anything": weights + "teacher"})
        assert [(r["weights"], r["error"]) for r in found] == [("real", None)] * 2
        missing = _measure(SMALL[:1], sources={"fiffdepth": "/no/such/folder"})
        assert "/no/such/folder" in missing[0]["error"]

    # ------------------------------------------------------------ the command

    def test_the_command_prints_its_table_and_measures_once(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(speed, "METHODS", SMALL[:1])
        command = ["--device", "cpu", "--dtype", "float32", "--images", "1", "--size", "32",
                   "--out", str(tmp_path / "s.jsonl")]
        assert speed.main(command) == 0
        first = capsys.readouterr().out
        assert "| FiffDepth | random | float32 | 1 | " in first
        assert speed.main(command) == 0
        assert capsys.readouterr().out == first  # the same seconds
        assert len(report.read_lines(tmp_path / "s.jsonl")) == 1

    @pytest.mark.parametrize("words,sentence", [
        ("--weights nobody=x", "NAME=DIR with a NAME of depth_anything, "),
        ("--weights fiffdepth", "NAME=DIR"),
        ("--images -1", "--images -1: must be at least 1"),
        ("--size 0", "--size 0: must be at least 1"),
        ("--minutes 0", "--minutes 0: must be more than 0"),
        ("--device no_such", "--device no_such cannot be used"),
        ("--out OTHER", "not a file of speed.py")])
    def test_mistakes_are_one_sentence(self, tmp_path, capsys, words, sentence):
        (tmp_path / "other.jsonl").write_text('{"prompt": "mine"}\n')
        words = words.replace("OTHER", str(tmp_path / "other.jsonl"))
        assert speed.main(["--out", str(tmp_path / "s.jsonl"), *words.split()]) == 2
        err = capsys.readouterr().err
        assert sentence in err
        assert err.count("\n") == 1

    def test_it_runs_from_another_working_directory(self, tmp_path):
        done = subprocess.run([sys.executable, HERE / "benchmarks/speed.py", "--help"],
                              cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "--minutes" in done.stdout
