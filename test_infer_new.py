"""infer.py: behaviour, files, names, what goes wrong."""
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import infer
from data import BadFrame, UserError
from infer import predict_batch, predict_image
from model import FiffDepth
from test_all import _tiny_model

ENDS = ("_color.png", "_depth.json", "_depth.npy", "_depth.png")


# ---------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of tiny networks with random weights: one of each target, another one, a bare one."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, info in (("disparity", {"target": "disparity", "size": 64, "steps": 1}),
                       ("depth", {"target": "depth", "size": 64, "steps": 1}),
                       ("other", {"target": "disparity", "size": 64, "steps": 1}),
                       ("bare", {"target": "depth", "size": 64}),
                       ("wrong", {"target": "metres", "size": 64})):
        model = _tiny_model()
        if name == "other":
            torch.manual_seed(5)
            torch.nn.init.normal_(model.vae.decoder.conv_out.weight)
        model.info = info
        model.save_pretrained(root / name)
    return root


read_once = lru_cache(FiffDepth.from_pretrained)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, checkpoints):
    """run("a.png", "--ply", ...) in tmp_path -> status, out, err; .files() below out"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setattr(infer.FiffDepth, "from_pretrained", read_once)

    def go(*words, checkpoint="disparity"):
        capsys.readouterr()
        status = infer.main(["--checkpoint", str(checkpoints / checkpoint), "--device", "cpu",
                             "--dtype", "float32", "--out", "out", *map(str, words)])
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    go.files = lambda: sorted(f.relative_to("out").as_posix() for f in Path("out").rglob("*")
                              if f.is_file())
    return go


def blocks(H, W, seed=0):
    """Blocks of random colours: no two seeds give similar maps."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (-(-H // 8), -(-W // 8), 3), dtype=np.uint8)
    return small.repeat(8, 0).repeat(8, 1)[:H, :W]


def picture(path, H=24, W=40, seed=0, **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks(H, W, seed)).save(path, **options)
    return path


def png_bytes(array, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def four(*names):
    """The files of pictures saved under these names."""
    return sorted(name + end for name in names for end in ENDS)


def note(name):
    return json.loads(Path(f"out/{name}_depth.json").read_text(encoding="utf-8"))


def values(name):
    return np.load(f"out/{name}_depth.npy")


class Network:
    """Stands for the network: keeps what it is given, returns the red channel or `answer`."""

    def __init__(self, size=8, answer=lambda x: x[:, :1]):
        self.info, self.prompt, self.answer, self.seen = {"size": size}, torch.zeros(1), answer, []

    def __call__(self, x):
        self.seen.append(x)
        return self.answer(x)


@pytest.fixture
def alone(checkpoints):
    """A picture's map, computed by itself."""
    model = read_once(checkpoints / "disparity")
    return lambda path, size=None: predict_image(model, path, size)


def cloud(file):
    """-> (header, vertices)"""
    header, body = Path(file).read_bytes().split(b"end_header\n", 1)
    return header.decode(), np.frombuffer(body, [("xyz", "<f4", 3), ("rgb", "u1", 3)])


class TestInfer:

    # ------------------------------------------------------------ from a picture to values

    def test_values_are_half_of_the_output_plus_one(self):
        rgb = np.zeros((1, 2, 3, 3), np.uint8)
        rgb[0, ..., 0] = [[0, 51, 102], [153, 204, 255]]
        result = predict_batch(Network(), rgb)
        assert result.dtype == np.float32
        assert np.allclose(result, [[[0, 0.2, 0.4], [0.6, 0.8, 1]]], atol=1e-6)

    def test_values_stay_in_range(self):
        result = predict_batch(Network(32, answer=lambda x: 9 * x[:, :1]), blocks(32, 32)[None])
        assert (result.min(), result.max()) == (0, 1)

    @pytest.mark.parametrize("H, W, size, expected", [
        (6, 4, 8, (6, 4)), (16, 12, 8, (8, 6)), (16, 12, 4, (4, 3)), (1, 1, 8, (1, 1)),
        (1, 400, 8, (1, 8)), (400, 1, 8, (8, 1))])
    def test_pictures_are_scaled_down_only(self, H, W, size, expected):
        model = Network(size)
        assert predict_image(model, blocks(H, W)).shape == (H, W)
        assert model.seen[0].shape[-2:] == expected

    def test_size_is_that_of_the_training_or_the_one_given(self):
        model = Network(8)
        predict_image(model, blocks(16, 12), size=4)
        assert model.seen[0].shape[-2:] == (4, 3)

    def test_a_benchmark_may_enlarge(self):
        model = Network(8)
        assert predict_batch(model, blocks(4, 2)[None], 8, enlarge=True).shape == (1, 4, 2)
        assert model.seen[0].shape[-2:] == (8, 4)

    @pytest.mark.parametrize("H, W", [(24, 40), (301, 407), (31, 2000)])
    def test_the_network_sees_what_scaling_all_floats_at_once_gives_bit_for_bit(self, H, W):
        model, rgb = Network(64), blocks(H, W)
        predict_image(model, rgb)
        whole = torch.tensor(rgb[None]).permute(0, 3, 1, 2).float() / 127.5 - 1
        if model.seen[0].shape != whole.shape:
            whole = torch.nn.functional.interpolate(whole, model.seen[0].shape[2:],
                                                    mode="bilinear", antialias=True)
        assert torch.equal(model.seen[0], whole)
        assert model.seen[0].stride() == whole.stride()  # decides which kernel computes

    @pytest.mark.parametrize("H, W", [(2000, 31), (31, 2000)])
    def test_a_single_column_or_row_is_scaled_like_any_other(self, H, W):
        model, rgb = Network(64), blocks(H, W)
        predict_image(model, rgb)
        red = Image.fromarray(rgb[..., 0].astype(np.float32) / 127.5 - 1)
        expected = red.resize((1, 64) if H > W else (64, 1), Image.Resampling.BILINEAR)
        assert np.allclose(model.seen[0][0, 0], expected, atol=1e-6)

    def test_scaling_down_is_antialiased(self):
        stripes = np.zeros((16, 16, 3), np.uint8)
        stripes[:, ::4] = 255
        model = Network(4)
        predict_image(model, stripes)
        assert (model.seen[0][0, 0, :, 1:3] + 0.5).abs().max() < 0.05  # a quarter white: -0.5

    def test_scaling_up_has_no_steps_and_no_shift(self):
        ramp = np.linspace(0, 255, 16).round().astype(np.uint8)[None, :, None]
        result = predict_image(Network(4), ramp.repeat(16, 0).repeat(3, 2))
        assert np.abs(result[:, 4:12] - np.linspace(0, 1, 16)[4:12]).max() < 0.01

    @pytest.mark.parametrize("H, W", [(1, 1), (7, 5), (33, 500), (512, 512)])
    def test_any_size_through_the_real_network(self, alone, H, W):
        result = alone(blocks(H, W))
        assert result.shape == (H, W)
        assert 0 <= result.min() and result.max() <= 1

    def test_path_pil_and_array_give_the_same_upright_map(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # a camera held upright
        path = picture(tmp_path / "a.png", 16, 24, exif=exif)
        expected = predict_image(Network(), np.ascontiguousarray(np.rot90(blocks(16, 24), -1)))
        assert expected.shape == (24, 16)
        for image in (path, str(path), Image.open(path)):
            assert np.array_equal(predict_image(Network(), image), expected)

    @pytest.mark.parametrize("wrong", [
        blocks(8, 8)[..., 0], blocks(8, 8).astype(np.float32), blocks(8, 8)[:0]])
    def test_other_arrays_are_refused(self, wrong):
        with pytest.raises(ValueError, match="uint8"):
            predict_image(Network(), wrong)

    def test_a_result_that_is_not_finite_is_refused(self):
        with pytest.raises(BadFrame, match="float32"):
            predict_image(Network(answer=lambda x: x[:, :1] * float("nan")), blocks(8, 8))

    def test_identity_changes_with_the_weights_alone(self, checkpoints):
        of = {name: infer.identity("", FiffDepth.from_pretrained(checkpoints / name).vae)
              for name in ("disparity", "depth", "other")}
        assert of["disparity"] == of["depth"]
        assert of["disparity"] != of["other"]

    def test_large_pictures_need_little_memory(self, monkeypatch):
        """Floats of no more than one channel, and no copy of all three: 4 bytes a pixel."""
        sizes, interpolate = [], torch.nn.functional.interpolate
        monkeypatch.setattr(infer.F, "interpolate", lambda x, *a, **k: (
            sizes.append(x.nbytes), interpolate(x, *a, **k))[1])
        predict_image(Network(8), blocks(300, 400))
        assert max(sizes) == 4 * 300 * 400

    # ------------------------------------------------------------ opening pictures

    @pytest.mark.parametrize("low, high", [(0, 1023), (0, 4095), (7000, 9000), (27000, 31000)])
    def test_16_bit_grey_of_a_small_span_is_stretched_and_said(self, low, high):
        grey = np.linspace(low, high, 64 * 64).round().astype(np.uint16).reshape(64, 64)
        notes = []
        rgb = data.open_image(png_bytes(grey), notes=notes)
        assert (rgb.min(), rgb.max()) == (0, 255)
        assert abs(rgb[32, 0, 0] - 127.5) < 2
        assert re.search(r"grey values \d+ \.\.\. \d+ are stretched", notes[0])

    def test_a_dead_pixel_does_not_hide_the_span(self):
        grey = np.linspace(0, 1023, 64 * 64).round().astype(np.uint16).reshape(64, 64)
        grey[5, 5] = 65535
        assert data.open_image(png_bytes(grey)).mean() > 120

    def test_16_bit_grey_of_a_photograph_is_left_as_it_is(self):
        grey, notes = blocks(16, 16)[..., 0], []
        rgb = data.open_image(png_bytes(grey.astype(np.uint16) * 257), notes=notes)
        assert np.array_equal(rgb, grey[..., None].repeat(3, 2))
        assert notes == []

    def test_grey_in_floats_is_stretched(self):
        degrees = np.linspace(-5, 35, 64 * 64, dtype=np.float32).reshape(64, 64)
        rgb = data.open_image(png_bytes(degrees, "TIFF"))
        assert (rgb[0, 0, 0], rgb[-1, -1, 0]) == (0, 255)

    @pytest.mark.parametrize("suffix", [".gif", ".avif", ".jp2", ".tga", ".JFIF"])
    def test_what_pillow_reads_is_found_in_folders(self, run, suffix):
        picture(f"in/a{suffix}", format=None if suffix != ".JFIF" else "JPEG")
        assert run("in").status == 0
        assert run.files() == four("a")

    def test_ignored_files_are_counted_by_ending_in_one_line(self, run, monkeypatch):
        monkeypatch.setattr(infer, "has_heif", lambda: False)
        monkeypatch.setattr(infer, "readable_suffixes", lambda: {".png"})
        picture("in/a.png")
        for name in ("b.heic", "sub/c.HEIC", "d.txt", "README"):
            Path("in/sub").mkdir(exist_ok=True)
            Path("in", name).write_bytes(b"x")
        lines = run("in").err.splitlines()
        assert lines[0].startswith("ignored files that are no pictures or that Pillow does not")
        assert ".heic 2 (pip install pillow-heif)" in lines[0]
        assert ".txt 1" in lines[0]
        assert "no ending 1" in lines[0]

    def test_heif_names_the_package_it_needs(self, monkeypatch):
        monkeypatch.setattr(data, "has_heif", lambda: False)
        with pytest.raises(BadFrame, match="pip install pillow-heif"):
            data.open_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))

    @pytest.mark.parametrize("content, sentence", [
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "format HDF5, which Pillow does not read: convert"),
        (b"no picture", "not an image file, or of a kind that Pillow does not read: convert"),
        (png_bytes(blocks(64, 64))[:90], "damaged"), (b"", "empty")])
    def test_unreadable_files_say_why(self, content, sentence):
        with pytest.raises(BadFrame, match=sentence):
            data.open_image(content)

    def test_too_many_pixels_is_a_limit_and_no_damage(self, run):
        path = picture("a.png", 64, 64)
        refused = run(path, "--max_megapixels", 0.002)
        assert refused.status == 1
        assert "raise the limit (infer.py: --max_megapixels)" in refused.err
        assert "damaged" not in refused.err
        assert run(path, "--max_megapixels", 0.005).status == 0

    @pytest.mark.filterwarnings("error")
    def test_a_picture_near_the_limit_is_no_warning(self, run):
        assert run(picture("a.png", 64, 64), "--max_megapixels", 0.005).err == ""

    def test_pillows_warnings_name_the_picture(self, run):
        path = picture("a.jpg")
        exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01"  # five entries, none of which is there
        content = path.read_bytes()
        path.write_bytes(content[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
                         + content[2:])
        result = run(path)
        assert result.status == 0
        assert f"note: {path.resolve()}: Pillow says: Corrupt EXIF data" in result.err
        assert "Warning" not in result.err

    # ------------------------------------------------------------ files

    @pytest.mark.parametrize("target, sense", [
        ("disparity", "larger = nearer"), ("depth", "larger = farther")])
    def test_files_and_lines_of_one_picture(self, run, checkpoints, target, sense):
        path = picture("a.v2.jpg", 48, 100)
        result = run(path, checkpoint=target)
        assert (result.status, result.err) == (0, "")  # and no bar for one picture
        assert result.out.count(sense) == 1
        assert re.search(r"1 saved in out, 0 failed; \d+\.\d s on cpu, float32\n$", result.out)
        assert run.files() == four("a.v2")
        found = values("a.v2")
        assert found.dtype == np.float32
        assert np.ptp(found) > 0
        model = FiffDepth.from_pretrained(checkpoints / target)
        assert np.array_equal(found, predict_image(model, path))
        depth, color = (Image.open(f"out/a.v2_{kind}.png") for kind in ("depth", "color"))
        assert depth.mode == "I;16"
        assert np.abs(np.asarray(depth) / 65535 - found).max() <= 0.51 / 65535
        assert np.array_equal(np.asarray(color), infer.colorize(found, target))
        said = note("a.v2")
        assert sense in said["values"]
        assert (said["target"], said["source"]) == (target, str(path.resolve()))
        assert said["values"] in depth.text["Description"]
        assert said["values"] in color.text["Description"]

    def test_the_same_bytes_each_time(self, run):
        path = picture("a.png", 80, 100)
        run(path)
        first = {f: Path("out", f).read_bytes() for f in run.files()}
        run(path, "--again")
        assert {f: Path("out", f).read_bytes() for f in run.files()} == first

    def test_tiff_in_place_of_npy(self, run):
        path = picture("a.png")
        run(path, "--out", "npy")
        run(path, "--out_format", "tiff")
        assert run.files() == sorted(f.replace(".npy", ".tiff") for f in four("a"))
        tiff = Image.open("out/a_depth.tiff")
        assert tiff.mode == "F"
        assert np.array_equal(np.asarray(tiff), np.load("npy/a_depth.npy"))
        assert "larger = nearer" in tiff.tag_v2[270]

    def test_colours_near_red_far_blue(self):
        ramp = np.linspace(0.2, 0.7, 12, dtype=np.float32).reshape(3, 4)
        disparity = infer.colorize(ramp, "disparity").astype(int)
        assert (disparity[0, 0] == infer.COLORS[0]).all()  # the whole table is used ...
        assert (disparity[-1, -1] == infer.COLORS[-1]).all()  # ... by this picture's own range
        assert disparity[0, 0, 2] > 1.5 * disparity[0, 0, 0]
        assert disparity[-1, -1, 0] > 3 * disparity[-1, -1, 2]
        assert np.abs(infer.colorize(1 - ramp, "depth").astype(int) - disparity).max() <= 1

    def test_colours_are_those_between_the_stops(self):
        ramp = np.linspace(0, 1, 1001, dtype=np.float32)[None]
        expected = np.stack([np.interp(ramp, np.linspace(0, 1, len(infer.COLORS)),
                                       infer.COLORS[:, c]) for c in range(3)], -1)
        assert np.abs(infer.colorize(ramp, "disparity") - expected).max() < 0.51

    def test_a_flat_map_has_one_colour(self):
        flat = infer.colorize(np.full((2, 2), 0.3, np.float32), "depth")
        assert (flat == flat[0, 0]).all()

    def test_flag_size(self, run, alone):
        path = picture("a.png", 48, 48)
        run(path, "--size", 16)
        assert np.array_equal(values("a"), alone(path, 16))
        assert not np.array_equal(values("a"), alone(path))

    def test_flag_vae(self, run, checkpoints, alone):
        path = picture("a.png")
        run(path, "--vae", checkpoints / "other")
        model = FiffDepth.from_pretrained(checkpoints / "disparity", vae=checkpoints / "other")
        assert np.array_equal(values("a"), predict_image(model, path))
        assert not np.array_equal(values("a"), alone(path))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision_on_a_cpu(self, run, alone, dtype):
        path = picture("a.png", 16, 24)
        assert f"cpu, {dtype}" in run(path, "--dtype", dtype).out
        assert values("a").dtype == np.float32
        assert 0 < np.abs(values("a") - alone(path)).max() < 0.1

    def test_batches_do_not_mix(self, run, alone, monkeypatch):
        sizes = {name: (40, 24) if name in "be" else (24, 40) for name in "abcdef"}
        for seed, (name, size) in enumerate(sizes.items()):
            picture(f"in/{name}.png", *size, seed=seed)
        shapes, forward = [], FiffDepth.forward
        monkeypatch.setattr(FiffDepth, "forward", lambda self, x: (
            shapes.append(tuple(x.shape)), forward(self, x))[1])
        result = run("in", "--batch", 3)
        assert sorted(shapes) == [(1, 3, 24, 40), (2, 3, 40, 24), (3, 3, 24, 40)]
        assert "6/6" in result.err  # the bar
        for name in sizes:
            assert np.abs(values(name) - alone(f"in/{name}.png")).max() < 1e-4
        assert np.abs(values("a") - values("c")).max() > 1e-2

    def test_pictures_of_one_network_size_share_a_batch(self, run, alone, monkeypatch):
        for n in range(3):
            picture(f"in/{n}.png", 96 * (n + 1), 128 * (n + 1), seed=n)
        shapes, forward = [], FiffDepth.forward
        monkeypatch.setattr(FiffDepth, "forward", lambda self, x: (
            shapes.append(tuple(x.shape)), forward(self, x))[1])
        run("in")
        assert shapes == [(3, 3, 48, 64)]
        assert np.abs(values("2") - alone("in/2.png")).max() < 1e-4

    def test_few_pictures_are_held(self, tmp_path):
        pictures = iter([infer.Picture(picture(tmp_path / f"{i}.png", 8, 8 + i), Path(f"{i}.png"),
                                       None) for i in range(9)])
        a = SimpleNamespace(batch=2, ply=False)
        next(infer.open_batches(pictures, 64, a, None, None))
        assert next(pictures).path.name == "4.png"  # 4 = twice the batch were read

    def test_a_bare_generator_is_named(self, run):
        result = run(picture("a.png"), checkpoint="bare")
        assert result.status == 0
        assert "from a bare generator expect noise" in result.err

    # ------------------------------------------------------------ the point cloud, metres

    def test_cloud_by_hand(self):
        file, rgb = io.BytesIO(), np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
        z = np.array([[2, 1, 4, 3], [1, 1, np.nan, 5]])
        infer.point_cloud(file, z, rgb, focal=2, comment="why")
        header, body = file.getvalue().split(b"end_header\n")
        assert header.startswith(b"ply\nformat binary_little_endian 1.0\ncomment ")
        assert b"element vertex 7\n" in header  # without the pixel that has no distance
        points = np.frombuffer(body, [("xyz", "<f4", 3), ("rgb", "u1", 3)])
        # the pixel's centre is 1.5 left of and 0.5 above the middle
        assert np.allclose(points["xyz"][0], [-1.5 / 2 * 2, -0.5 / 2 * 2, 2])
        assert np.allclose(points["xyz"][6], [1.5 / 2 * 5, 0.5 / 2 * 5, 5])
        assert np.array_equal(points["rgb"], rgb.reshape(8, 3)[[0, 1, 2, 3, 4, 5, 7]])

    @pytest.mark.parametrize("target, expected", [
        ("disparity", [1 / (0.25 / 1 + 0.75 / 4), 1, 4]), ("depth", [1 + 3 * 0.25, 4, 1])])
    def test_near_and_far_are_the_ends_of_the_values(self, target, expected):
        z = infer.assumed_metres(np.array([0.25, 1, 0], np.float32), target, near=1, far=4)
        assert np.allclose(z, expected)

    def test_flag_ply(self, run):
        run(picture("a.png", 20, 30), "--ply", "--fov", 70, "--near", 2, "--far", 5)
        header, points = cloud("out/a_cloud.ply")
        assert np.allclose(points["xyz"][:, 2].reshape(20, 30), infer.assumed_metres(
            values("a"), "disparity", 2, 5))
        assert np.array_equal(points["rgb"], blocks(20, 30).reshape(-1, 3))
        x, _, z = points["xyz"][29]
        assert 14.5 * z / x == pytest.approx(15 / math.tan(math.radians(35)), rel=1e-5)
        assert "70 degrees along the longer side" in header
        assert "nearest 2 m, farthest 5 m" in header
        assert note("a")["cloud"] in header

    @pytest.mark.parametrize("H, W, words, exif, pixels, said", [
        (20, 30, ["--fov", "90"], None, 15, "--fov: 90 degrees"),
        (30, 20, ["--fov", "90"], None, 15, "longer side"),  # whatever the orientation
        (20, 30, ["--focal", "33"], None, 33, "--focal 33"),
        (24, 36, ["--focal", "28mm"], None, 28, "--focal 28mm"),  # the frame of 35 mm film
        (48, 72, [], 50, 100, "EXIF, 50 mm"), (48, 72, ["--focal", "33"], 50, 33, "--focal"),
        (48, 72, ["--fov", "90"], 50, 36, "--fov"),
        (20, 30, [], None, 15 / math.tan(math.radians(30)), "assumed, nothing is known"),
        (20, 30, [], 0, 15 / math.tan(math.radians(30)), "assumed")])  # EXIF's word for unknown
    def test_focal_length(self, tmp_path, H, W, words, exif, pixels, said):
        tags = Image.Exif()
        if exif is not None:
            tags.get_ifd(0x8769)[0xA405] = exif
        path = picture(tmp_path / "a.jpg", H, W, exif=tags)
        focal, source = infer.focal_length(infer.flags().parse_args(words), path, H, W)
        assert focal == pytest.approx(pixels)
        assert said in source

    @pytest.mark.parametrize("target", ["disparity", "depth"])
    def test_metres_are_the_least_squares_fit(self, target):
        v = np.linspace(0.1, 0.9, 12, dtype=np.float32).reshape(3, 4)
        truth = 1 / (2 * v + 0.1) if target == "disparity" else 2 * v + 0.1
        known = [[0, 0, truth[0, 0]], [3, 0, truth[0, 3]], [1, 2, truth[2, 1]]]
        metres, errors = infer.fit_metres(v, known, target)
        assert metres.dtype == np.float32
        assert np.allclose(metres, truth, rtol=1e-5)
        assert np.allclose(errors, 0, atol=1e-5)

    def test_errors_of_metres_are_those_at_the_points(self):
        v = np.array([[0, 0.5, 1]], np.float32)
        _, errors = infer.fit_metres(v, [[0, 0, 1.0], [1, 0, 5.0], [2, 0, 3.0]], "depth")
        assert np.allclose(errors, [1, -2, 1])  # the line 2 + 2 v

    def test_metres_are_nan_where_the_fit_is_behind_the_camera(self):
        v = np.array([[0, 0.5, 1]], np.float32)
        metres, _ = infer.fit_metres(v, [[1, 0, 1.0], [2, 0, 3.0]], "depth")
        assert np.isnan(metres[0, 0])

    def test_flag_known(self, run):
        path = picture("a.png")
        run(path)
        v = values("a")
        (far_y, far_x), (near_y, near_x) = (np.unravel_index(i, v.shape)
                                            for i in (v.argmin(), v.argmax()))
        known = ["--known", f"{far_x},{far_y}=4.5", "--known", f"{near_x},{near_y}=1.5"]
        result = run(path, *known, "--ply")
        assert result.status == 0
        assert "a third shows how good the fit is" in result.err
        metres = np.load("out/a_metres.npy")
        assert metres[far_y, far_x] == pytest.approx(4.5, rel=1e-4)
        assert metres[near_y, near_x] == pytest.approx(1.5, rel=1e-4)
        assert np.array_equal(values("a"), v)
        assert note("a")["metres"]["known"] == [[far_x, far_y, 4.5], [near_x, near_y, 1.5]]
        header, points = cloud("out/a_cloud.ply")
        assert "2 known distances" in header
        assert np.array_equal(points["xyz"][:, 2].reshape(v.shape), metres)

    @pytest.mark.parametrize("known, sentence", [
        ([[9, 0, 1], [0, 0, 2]], "9,0: outside the picture, which has 3 x 1 pixels"),
        ([[0, 0, 1], [0, 0, 2]], "the same at all points"),
        ([[0, 0, 1], [2, 0, 3]], "contradict the map"),
        ([[0, 0, 9], [1, 0, 9], [2, 0, 0.1]], "contradict the map")])
    def test_points_that_fit_no_map(self, known, sentence):
        with pytest.raises(UserError, match=sentence):
            infer.fit_metres(np.array([[0, 0.5, 1]], np.float32), known, "disparity")

    # ------------------------------------------------------------ what is done is not done again

    def test_a_second_run_skips_and_says_so(self, run, monkeypatch):
        for name in "ab":
            picture(f"in/{name}.png")
        run("in")
        picture("in/c.png")
        seen, open_image = [], infer.open_image
        monkeypatch.setattr(infer, "open_image", lambda path, **k: (
            seen.append(path.name), open_image(path, **k))[1])
        result = run("in")
        assert "1 saved in out, 2 skipped as done before (--again), 0 failed" in result.out
        assert seen == ["c.png"]
        assert run("in", "--again").out.count("3 saved in out, 0 failed") == 1

    @pytest.mark.parametrize("change", [
        ["--size", "32"], ["--dtype", "bfloat16"], ["--ply"], ["--out_format", "tiff"],
        ["--checkpoint", "other"], ["edited"], ["file gone"]])
    def test_other_settings_are_done_anew(self, run, checkpoints, change):
        path = picture("a.png", 16, 24)
        run(path)
        if change == ["edited"]:
            picture(path, 16, 24, seed=3)
        elif change == ["file gone"]:
            Path("out/a_color.png").unlink()
        elif change[0] == "--checkpoint":
            change = ["--checkpoint", checkpoints / "other"]
        assert "1 saved" in run(path, *(word for word in change if word not in (
            "edited", "file gone"))).out

    def test_a_copy_of_the_weights_is_the_same(self, run, checkpoints):
        path = picture("a.png")
        run(path)
        assert "1 skipped" in run(path, "--checkpoint", checkpoints / "depth/../disparity").out

    def test_files_of_other_settings_go(self, run):
        path = picture("a.png")
        run(path, "--ply", "--out_format", "tiff")
        run(path, "--size", 32)
        assert run.files() == four("a")

    # ------------------------------------------------------------ names

    def test_folders_are_mirrored_and_each_picture_is_found_once(self, run, alone):
        for seed, name in enumerate(("b.PNG", "sub/a.jpeg", "sub/deep/a.png", ".hidden.png")):
            picture(f"in/{name}", seed=seed)
        assert "note:" not in run("in", "in/b.PNG", "in/../in").err
        assert run.files() == four("b", "sub/a", "sub/deep/a")
        assert np.abs(values("sub/a") - alone("in/sub/a.jpeg")).max() < 1e-4

    def test_equal_names_get_the_suffix_then_a_number(self, run, alone):
        paths = [picture(name, seed=i) for i, name in enumerate(
            ("x/a.png", "x/a.bmp", "y/a.png", "z/p.png", "z/a_png.png"))]
        result = run(*paths)
        assert run.files() == four("a", "a_bmp", "a_png", "p", "a_png_png")
        assert result.err.count("its name is taken") == 3
        for name in ("a", "a_bmp", "a_png", "p", "a_png_png"):  # each holds its own source's map
            assert np.abs(values(name) - alone(note(name)["source"])).max() < 1e-4
        before = {name: note(name)["source"] for name in ("a", "a_bmp", "a_png", "p", "a_png_png")}
        run(*reversed(paths), "--again")
        assert {name: note(name)["source"] for name in before} == before  # stable
        run(picture("w/a.png"))
        assert note("a_png_2")["source"].endswith("w/a.png")

    def test_results_of_earlier_runs_are_spared(self, run):
        first, second = picture("x/a.png", seed=1), picture("y/a.png", seed=2)
        run(first)
        before = values("a")
        run(second)
        assert run.files() == four("a", "a_png")
        assert np.array_equal(values("a"), before)
        picture(first, seed=3)  # the same picture, edited: replaced
        run(first)
        assert run.files() == four("a", "a_png")
        assert not np.array_equal(values("a"), before)

    @pytest.mark.parametrize("name, content", [
        ("a_depth.npy", b"mine"), ("a_color.png", b"mine"), ("a_depth.json", b"{}"),
        ("a_depth.json", b"[1]"), ("a_depth.json", b"mine"), ("a_depth.json", b"")])
    def test_files_of_another_program_are_spared(self, run, name, content):
        Path("out").mkdir()
        Path("out", name).write_bytes(content)
        assert "its name is taken" in run(picture("a.png")).err
        assert run.files() == sorted([name, *four("a_png")])
        assert Path("out", name).read_bytes() == content

    def test_input_and_output_in_one_folder(self, run):
        picture("out/a.png")
        truth = picture("out/b_depth.png", seed=1).read_bytes()  # someone's, not ours
        picture("out/b.png", seed=2)
        run("out", "--ply", "--out_format", "tiff")
        files = run.files()
        assert Path("out/b_depth.png").read_bytes() == truth
        assert {"a_depth.tiff", "b_png_depth.tiff", "b_depth_depth.tiff"} <= set(files)
        result = run("out", "--ply", "--out_format", "tiff")  # results are no input
        assert "3 skipped" in result.out
        assert "ignored" not in result.err
        assert run.files() == files

    def test_names_as_long_as_results_may_be(self, run):
        name = "n" * 240
        assert run(picture(f"{name}.png")).status == 0
        assert run.files() == four(name)

    @pytest.mark.parametrize("letters", [247, 250])
    def test_names_that_are_too_long_are_a_sentence(self, run, letters):
        Path("out").mkdir()
        Path("out", "n" * letters + "_depth.npy"[:255 - letters]).write_bytes(b"mine")
        result = run(picture("n" * letters + ".png"))
        assert result.status == 1
        assert "File name too long" in result.err

    def test_a_claim_of_a_killed_run_is_taken_up(self, run):
        path = picture("a.png")
        Path("out/.a_depth").mkdir(parents=True)
        Path("out/.a_depth/0123abcd_depth.npy.part").write_bytes(b"half")
        Path("out/a_depth.json").write_text(json.dumps({"source": str(path.resolve()),
                                                        "files": ["_depth.npy"]}))
        assert run(path).status == 0
        assert sorted(os.listdir("out")) == four("a")

    def test_two_runs_with_equal_names_lose_nothing(self, run):
        """Each saves its own x/a.png, y/a.png, ... at the same time as the other."""
        pictures = [infer.Picture(Path(f"/{folder}/a{n}.png"), Path(f"a{n}.png"), None)
                    for n in range(10) for folder in "xy"]
        out, start = Path("out"), threading.Barrier(2)

        def save_all(mine):
            for p in mine:
                start.wait()
                infer.save(out, p, {"_depth.npy": lambda f, p=p: f.write(str(p.path).encode())},
                           {"source": str(p.path), "settings": {}}, False)

        threads = [threading.Thread(target=save_all, args=(pictures[i::2],)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = {json.loads(f.read_text())["source"]: Path(str(f).replace(".json", ".npy"))
                 for f in out.glob("*.json")}
        assert found.keys() == {str(p.path) for p in pictures}
        assert all(file.read_text() == source for source, file in found.items())

    def test_a_run_that_is_overtaken_renames_nothing_more(self, run):
        """Another run saves the whole set while this one is about to rename the last of its own."""
        base, replace, calls = Path("out/a"), os.replace, []
        Path("out").mkdir()

        def files(who, *more):
            return {end: lambda file: file.write(who)
                    for end in ("_depth.npy", "_depth.png", *more)}

        def overtaken(source, target):
            calls.append(target)
            if len(calls) == 3:  # the claim and the .npy are renamed, the .png is not
                infer.write_set(base, files(b"B", "_cloud.ply"), {"source": "a", "settings": 2})
            replace(source, target)

        infer.os.replace, done = overtaken, None
        try:
            done = infer.write_set(base, files(b"A"), {"source": "a", "settings": 1})
        finally:
            infer.os.replace = replace
        assert done is False
        assert Path("out/a_depth.npy").read_bytes() == b"B"
        assert Path("out/a_depth.png").read_bytes() == b"B"
        assert note("a")["settings"] == 2

    def test_files_that_another_run_added_meanwhile_go_with_its_set(self, run):
        base = Path("out/a")
        Path("out").mkdir()

        def slow(file):  # while this run writes its parts, another one writes a whole set
            other = dict.fromkeys(("_depth.npy", "_cloud.ply"), lambda file: file.write(b"B"))
            infer.write_set(base, other, {"source": "a", "settings": 2})
            file.write(b"A")

        while not infer.write_set(base, {"_depth.npy": slow}, {"source": "a", "settings": 1}):
            slow = lambda file: file.write(b"A")  # noqa: E731
        assert run.files() == ["a_depth.json", "a_depth.npy"]
        assert Path("out/a_depth.npy").read_bytes() == b"A"

    def test_a_killed_run_leaves_no_set_that_looks_complete(self, run, monkeypatch):
        """Killed after any number of renames: the JSON says complete only if all files are its."""
        path = picture("a.png")
        run(path)
        old = {f: Path("out", f).read_bytes() for f in run.files()}
        replace = os.replace
        for n in range(5):  # five renames
            left = [n]

            def die(source, target):
                left[0] -= 1
                if left[0] < 0:
                    raise SystemExit
                replace(source, target)

            monkeypatch.setattr(os, "replace", die)
            with pytest.raises(SystemExit):
                run(path, "--size", 16, "--again")
            monkeypatch.setattr(os, "replace", replace)
            now = {f: Path("out", f).read_bytes() for f in run.files()}
            assert now == old or "settings" not in note("a")
        run(path)
        assert {f: Path("out", f).read_bytes() for f in run.files()} == old

    # ------------------------------------------------------------ what goes wrong

    def test_a_bad_picture_does_not_stop_the_rest(self, run, alone):
        a = picture("in/a.png", seed=1)
        picture("in/c.png", seed=2)
        Path("in/b.png").write_bytes(a.read_bytes()[:90])
        Path("in/d.jpg").write_bytes(b"")
        os.symlink("gone.png", "in/e.png")
        os.symlink("gone.png", "f.png")
        result = run("in", "nowhere.png", "f.png")
        failed = [line for line in result.err.splitlines() if "failed: " in line]
        assert [re.search(r"(\w+\.\w+): (no such file|a broken link, to gone.png|\w+.*)", line)[1]
                for line in failed] == ["nowhere.png", "f.png", "b.png", "d.jpg", "e.png"]
        for line, words in zip(failed, ("no such file", "a broken link, to gone.png", "damaged",
                                        "empty", "a link to ")):
            assert words in line
        assert "2 saved in out, 5 failed" in result.out
        assert result.status == 1
        assert run.files() == four("a", "c")
        assert np.abs(values("c") - alone("in/c.png")).max() < 1e-4

    def test_a_failing_batch_is_tried_one_by_one(self, run, alone, monkeypatch):
        paths = [picture(f"{name}.png", seed=i) for i, name in enumerate("abc")]
        Image.new("RGB", (40, 24)).save(paths[1])
        forward = FiffDepth.forward

        def short_of_memory(self, x):
            if len(x) > 1:
                raise torch.OutOfMemoryError("out of memory")
            return forward(self, x) if x.max() > -1 else torch.full((1, 1, 24, 40), float("nan"))

        with monkeypatch.context() as patch:
            patch.setattr(FiffDepth, "forward", short_of_memory)
            result = run(*paths)
        assert result.status == 1
        assert run.files() == four("a", "c")
        assert "b.png: the network's result is not finite" in result.err
        assert np.array_equal(values("c"), alone(paths[2]))

    def test_a_full_disk_leaves_no_more_than_the_claim(self, run, monkeypatch):
        paths = [picture(f"{name}.png", seed=i) for i, name in enumerate("ab")]
        save_png = infer.save_png

        def full(file, array, meaning):
            if "/.a_depth/" in file.name:
                file.write(b"half")
                raise OSError(28, "No space left on device")
            save_png(file, array, meaning)

        monkeypatch.setattr(infer, "save_png", full)
        result = run(*paths)
        assert result.status == 1
        assert "a.png: [Errno 28] No space left on device" in result.err
        assert sorted(os.listdir("out")) == sorted(["a_depth.json", *four("b")])

    @pytest.mark.parametrize("words, sentence", [
        (["nowhere.png"], "nowhere.png: no such file"), (["empty"], "empty: no pictures"),
        (["a.png", "--size", "0"], "--size 0"), (["a.png", "--size", "-3"], "--size -3"),
        (["a.png", "--size", "big"], "--size: invalid int"),
        (["a.png", "--batch", "0"], "--batch 0"),
        (["a.png", "--max_megapixels", "0"], "--max_megapixels 0"),
        (["a.png", "--max_megapixels", "inf"], "--max_megapixels inf"),
        (["a.png", "--fov", "0"], "--fov 0"), (["a.png", "--fov", "180"], "--fov 180"),
        (["a.png", "--fov", "nan"], "--fov nan"),
        (["a.png", "--fov", "60", "--focal", "28mm"], "give one of them"),
        (["a.png", "--focal", "wide"], "--focal wide: expected pixels"),
        (["a.png", "--focal", "-2mm"], "expected one argument"),
        (["a.png", "--focal", "0mm"], "--focal 0mm: expected pixels"),
        (["a.png", "--near", "5", "--far", "5"], "--near 5"),
        (["a.png", "--near", "0"], "--near 0"),
        (["a.png", "--known", "1,1=2"], "two points or more"),
        (["a.png", "--known", "1,1:2", "--known", "1,1=2"], "--known 1,1:2: expected X,Y=METRES"),
        (["a.png", "--known", "1,1=0", "--known", "1,1=2"], "--known 1,1=0: expected"),
        (["a.png", "b.png", "--known", "1,1=1", "--known", "1,2=2"], "of one picture"),
        (["a.png", "--out", "a.png"], "--out a.png"), (["a.png", "--out", "a.png/x"], "a.png/x"),
        (["a.png", "--checkpoint", "empty"], "empty is not a checkpoint"),
        (["a.png", "--checkpoint", "wrong"], "fiffdepth.json must hold a target"),
        (["a.png", "--device", "cuda:99"], "--device cuda:99"),
        (["a.png", "--device", "x"], "--device x"),
        (["a.png", "--device", "meta"], "--device meta"),
        (["-dash.jpg"], "write ./-dash.jpg"), (["--dash"], "unrecognized arguments: --dash; see")])
    def test_user_errors_are_one_sentence(self, run, checkpoints, words, sentence):
        Path("empty").mkdir()
        for name in ("a.png", "b.png", "-dash.jpg"):
            picture(name, 8, 8)
        words = [checkpoints / "wrong" if word == "wrong" else word for word in words]
        result = run(*words)
        assert result.status == 2
        assert result.err.startswith("error: ")
        assert sentence in result.err
        assert result.err.count("\n") == 1
        assert result.out == ""

    def test_interrupted(self, run, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(infer, "forward", interrupt)
        result = run(picture("a.png"))
        assert result.status == 130
        assert result.err.strip().startswith("interrupted")
        assert run.files() == []

    def test_help_states_units_and_assumptions(self):
        text = infer.flags().format_help()
        for word in ("PIXELS", "DEGREES", "METRES", "MM", "MEGAPIXELS", "Sec. 4.1", "assumptions"):
            assert word in text
        assert all(action.help for action in infer.flags()._actions)

    # ------------------------------------------------------------ as a command

    def test_a_console_of_another_language_stops_nothing(self, run, monkeypatch):
        path = picture("東京/写真.png")
        screen = io.TextIOWrapper(io.BytesIO(), "ascii")
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        assert run(path, "無い.png", "--out", "東out").status == 1
        screen.flush()
        assert rb"failed: \u7121\u3044.png: no such file" in screen.buffer.getvalue()
        assert rb"1 saved in \u6771out" in screen.buffer.getvalue()

    def test_as_a_command_it_imports_no_more_than_it_needs(self, tmp_path, checkpoints):
        path = picture(tmp_path / "東京/写真.png")
        done = subprocess.run(
            [sys.executable, "-X", "importtime", infer.__file__, path, "無い.png", "--checkpoint",
             checkpoints / "disparity", "--device", "cpu"], cwd=tmp_path, capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "cp1252", "LC_ALL": "C"})
        text = done.stderr.decode("cp1252")
        assert done.returncode == 1, text[-500:]
        assert sorted(os.listdir(tmp_path / "out")) == four("写真")
        said = json.loads((tmp_path / "out/写真_depth.json").read_text(encoding="utf-8"))
        assert said["source"] == str(path)
        imported = {line.split("|")[-1].strip() for line in text.splitlines()}
        assert "diffusers" in imported
        assert "transformers" not in imported
