import builtins
import io
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

import data
from data import BadFrame, BadFrames, FrameSet, MixedBatches, UserError, open_image


# ---------------------------------------------------------------- small files of each true format

def _bytes(array, format="PNG", **options):
    """An array or PIL image -> the bytes of a picture file; uint16 becomes a 16-bit grey PNG."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _put(root, name, content):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)


def _rgb(H, W, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)


def _ramp(H, W, low=1000, high=9000):
    """uint16 depth that grows from left to right."""
    return np.tile(np.linspace(low, high, W), (H, 1)).astype(np.uint16)


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


def _hypersim(scenes=1, frames=2, H=768, W=1024):
    """Marigold's export of Hypersim -> {name: bytes}"""
    files = {}
    for s in range(1, scenes + 1):
        for i in range(frames):
            files[f"ai_001_{s:03}/rgb_cam_00_fr{i:04}.png"] = _bytes(_rgb(H, W, i))
            files[f"ai_001_{s:03}/depth_plane_cam_00_fr{i:04}.png"] = _bytes(_ramp(H, W))
    return files


def _write(root, files):
    for name, content in files.items():
        _put(root, name, content)
    return root


def _nano(root, n, H=12, W=16):
    """The small world: n frames; frame i has the grey level i everywhere in its picture."""
    for i in range(n):
        _put(root, f"rgb_{i:05}.png", _bytes(np.full((H, W, 3), i, np.uint8)))
        _put(root, f"depth_{i:05}.png", _bytes(_ramp(H, W)))
    return root


def _photos(root, n, H=12, W=16):
    for i in range(n):
        _put(root, f"{i:03}.png", _bytes(np.full((H, W, 3), i, np.uint8)))
    return root


def _refused(kind, function, *arguments, **options):
    """The text of the error that the call must raise."""
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    return str(caught.value)


# ------------------------------------------------------------------------------ the sets on disk

def test_hypersim_png_folder_tar_and_list(tmp_path):
    files = _hypersim(scenes=2)
    root = _write(tmp_path / "h", files)
    _put(root, "ai_001_001/._rgb_cam_00_fr0000.png", b"macOS")
    _tar(tmp_path / "h.tar", files)
    listing = tmp_path / "list.txt"                  # two lines of Marigold's list, reversed
    listing.write_text("ai_001_001/rgb_cam_00_fr0001.png ai_001_001/depth_plane_cam_00_fr0001.png\n"
                       "\nai_001_001/rgb_cam_00_fr0000.png "
                       "ai_001_001/depth_plane_cam_00_fr0000.png 0.01")
    for path in (root, tmp_path / "h.tar"):
        frames = FrameSet("hypersim", path)
        assert [f.rgb for f in frames.frames] == sorted(n for n in files if "/rgb" in n)
        rgb, depth, valid = frames.read(0)
        assert np.array_equal(rgb, _rgb(768, 1024)) and valid.all()
        assert np.array_equal(depth, _ramp(768, 1024).astype(np.float32) / 1000)
        sample = frames.sample(0, False)
        assert sample.rgb.shape == sample.depth.shape == (3, 480, 640)
        assert sample.mask.shape == (1, 480, 640) and sample.mask.dtype == torch.bool
        assert sample.depth[0, 0, 0] == 1 and sample.depth[0, 0, -1] == -1      # near is +1
        chosen = FrameSet("hypersim", path, listing)
        assert [f.rgb[-8:] for f in chosen.frames] == ["0001.png", "0000.png"]
        assert np.array_equal(chosen.read(1)[0], rgb)
        assert len(FrameSet("hypersim", path, cap=3)) == 3


def _raw_hypersim(root, distance):
    h5py = pytest.importorskip("h5py")
    folder = "ai_001_001/images/scene_cam_00_"
    _put(root, folder + "final_preview/frame.0000.tonemap.jpg",
         _bytes(_rgb(*distance.shape), "JPEG"))
    _put(root, folder + "final_preview/frame.0000.color.jpg", b"another rendering")
    name = root / (folder + "geometry_hdf5/frame.0000.depth_meters.hdf5")
    name.parent.mkdir(parents=True)
    with h5py.File(name, "w") as file:
        file["dataset"] = distance.astype(np.float16)
    return name


def test_raw_hypersim_is_planar_and_nan_is_invalid(tmp_path):
    distance = np.full((768, 1024), 2.0)
    distance[100, 200], distance[101, 201] = np.nan, np.inf
    _raw_hypersim(tmp_path, distance)
    frames = FrameSet("hypersim", tmp_path)
    _, depth, valid = frames.read(0)
    factor = 886.81 / np.sqrt(511.5 ** 2 + 383.5 ** 2 + 886.81 ** 2)        # 0.811
    assert factor == pytest.approx(0.811, abs=5e-4)
    for corner in (depth[0, 0], depth[0, -1], depth[-1, 0], depth[-1, -1]):
        assert corner == pytest.approx(2 * factor, rel=1e-5)
    assert depth[384, 512] == pytest.approx(2, rel=1e-5)
    assert depth[384, 0] == pytest.approx(2 * 886.81 / np.hypot(511.5, 886.81), rel=1e-5)
    assert not valid[100, 200] and not valid[101, 201] and valid.sum() == 768 * 1024 - 2
    assert np.isfinite(depth).all()
    half = data.planar(np.full((384, 512), 2.0, np.float32))                # the same field of view
    assert half[0, 0] == pytest.approx(2 * factor, rel=2e-3)
    assert frames.sample(0, False).depth.shape == (3, 480, 640)


def test_raw_hypersim_damage_and_missing_h5py(tmp_path, monkeypatch):
    name = _raw_hypersim(tmp_path, np.full((768, 1024), 2.0))
    good = name.read_bytes()
    frames = FrameSet("hypersim", tmp_path)
    for content, reason in ((b"", "empty"), (good[:5000], "damaged"), (b"no hdf5", "damaged")):
        name.write_bytes(content)
        assert reason in _refused(BadFrame, frames.read, 0)
    name.write_bytes(good)
    real_import = builtins.__import__

    def without_h5py(module, *rest):
        if module == "h5py":
            raise ImportError(module)
        return real_import(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without_h5py)
    sentence = _refused(UserError, FrameSet, "hypersim", tmp_path)
    assert "pip install h5py" in sentence and "\n" not in sentence


def _vkitti(rgb, depth, H=375, W=1242):
    centimetres = _ramp(H, W, 200, 7000)
    centimetres[:100] = 65535                                               # sky
    return {f"{rgb}Scene02/clone/frames/rgb/Camera_0/rgb_00000.jpg":
            _bytes(_rgb(H, W), "JPEG", quality=95),
            f"{depth}Scene02/clone/frames/depth/Camera_0/depth_00000.png": _bytes(centimetres)}


@pytest.mark.parametrize("rgb, depth", [("", ""), ("vkitti_2.0.3_rgb/", "vkitti_2.0.3_depth/"),
                                        ("rgb/", "depth/"), ("x/rgb/", "x/depth/")])
def test_vkitti_trees(tmp_path, rgb, depth):
    files = _vkitti(rgb, depth)
    root = _write(tmp_path / "v", files)
    frames = FrameSet("vkitti", root)
    picture, metres, valid = frames.read(0)
    full = open_image(files[frames.frames[0].rgb])
    assert np.array_equal(picture, full[23:, 13:13 + 1216]) and metres.shape == (352, 1216)
    assert np.allclose(metres[-1], _ramp(375, 1242, 200, 7000)[-1, 13:1229] / 100)
    assert metres[0, 0] == pytest.approx(655.35)
    assert not valid[:77].any() and valid[77:].all()
    for space, far in (("disparity", -1), ("depth", 1)):
        sample = FrameSet("vkitti", root, space=space).sample(0, False)
        assert (sample.depth[:, :77] == far).all() and not sample.mask[:, :77].any()
        assert sample.depth[0, -1, 0] == -far and sample.depth.shape == (3, 352, 1216)


def test_vkitti_list_and_tar(tmp_path):
    _tar(tmp_path / "vkitti.tar", _vkitti("rgb/", "depth/"))
    listing = tmp_path / "vkitti_train.txt"
    listing.write_text("rgb/Scene02/clone/frames/rgb/Camera_0/rgb_00000.jpg "
                       "depth/Scene02/clone/frames/depth/Camera_0/depth_00000.png\n"
                       "rgb/Scene02/clone/frames/rgb/Camera_0/rgb_00001.jpg "
                       "depth/Scene02/clone/frames/depth/Camera_0/depth_00001.png\n")
    frames = FrameSet("vkitti", tmp_path / "vkitti.tar", listing)
    assert len(frames) == 1 and frames.read(0)[1].shape == (352, 1216)
    assert len(frames.missing) == 1 and "rgb_00001.jpg" in frames.missing[0]


@pytest.mark.parametrize("H, W, top, left", [(375, 1242, 23, 13), (370, 1226, 18, 5),
                                             (376, 1241, 24, 12), (374, 1238, 22, 11)])
def test_kitti_crop_offsets(H, W, top, left):
    assert data.kitti_crop(H, W) == (slice(top, top + 352), slice(left, left + 1216))
    for small in ((351, 1242), (375, 1215)):
        _refused(BadFrame, data.kitti_crop, *small)


def test_nano_folder(tmp_path):
    root = _nano(tmp_path / "clean", 3)
    holes = _ramp(12, 16)
    holes[0, 0], holes[0, 1] = 0, 65001                                     # no hit, beyond 65 m
    _put(root, "depth_00001.png", _bytes(holes))
    _put(root, "rgb_archive.tar", b"the download, still lying here")      # not our business
    frames = FrameSet("nano", root)
    assert frames.size == (12, 16) and len(frames) == 3
    _, depth, valid = frames.read(1)
    assert np.array_equal(valid, (holes > 1) & (holes < 65000)) and not valid[0, :2].any()
    assert depth[0, 1] == pytest.approx(65.001)
    _put(root, "rgb_00002.png", _bytes(_rgb(24, 32)))
    _put(root, "depth_00002.png", _bytes(_ramp(24, 32)))
    assert "24x32" in _refused(BadFrame, frames.sample, 2, False)           # as stored: one size


def _img2dataset(shard):
    files = {}
    for i in (0, 3):                                                        # keys have gaps
        key = f"{shard:05}{i:04}"
        files |= {f"{key}.jpg": _bytes(_rgb(40, 60, i), "JPEG"), f"{key}.txt": b"a caption",
                  f"{key}.json": b'{"status": "success"}'}
    return files


def test_img2dataset_files_and_shards(tmp_path):
    loose, shards = tmp_path / "files", tmp_path / "shards"
    for shard in (0, 1):
        _write(loose / f"{shard:05}", _img2dataset(shard))
        _put(loose, f"{shard:05}.parquet", b"PAR1")
        _put(shards, f"{shard:05}_stats.json", b"{}")
        hidden = {"._000000000.jpg": b"macOS", ".cache/1.jpg": b""}
        _tar(shards / f"{shard:05}.tar", hidden | _img2dataset(shard))
    a = FrameSet("photos", loose, size=(20, 20))
    b = FrameSet("photos", shards, size=(20, 20))
    c = FrameSet("photos", shards / "00001.tar", size=(20, 20))
    assert [f.rgb for f in a.frames] == ["00000/000000000.jpg", "00000/000000003.jpg",
                                         "00001/000010000.jpg", "00001/000010003.jpg"]
    assert [f.rgb for f in b.frames] == [f.rgb.replace("/", ".tar/", 1) for f in a.frames]
    assert [f.rgb for f in c.frames] == ["000010000.jpg", "000010003.jpg"]
    for x, y in ((a, b), (pickle.loads(pickle.dumps(b)), a)):
        assert torch.equal(x.sample(3, False).rgb, y.sample(3, False).rgb)
    assert torch.equal(c.sample(1, False).rgb, a.sample(3, False).rgb)
    assert a.sample(0, False).depth is None and a.sample(0, False).mask is None


def test_photos_any_folder(tmp_path):
    root = tmp_path / "p"
    for name in ("a/b/One.JPG", "a/two.Jpeg", "3.PNG", "with blank.webp", ".hidden/4.png",
                 "._5.jpg", "a/notes.txt"):
        _put(root, name, _bytes(_rgb(8, 8), {"p": "WEBP", "g": "JPEG"}.get(name[-1], "PNG")))
    (root / "a" / "again").symlink_to(root / "a")                           # a circle
    (root / "six.png").symlink_to(root / "3.PNG")
    names = [f.rgb for f in FrameSet("photos", root, size=(8, 8)).frames]
    assert names == ["3.PNG", "a/b/One.JPG", "a/two.Jpeg", "six.png", "with blank.webp"]
    listing = tmp_path / "list.txt"
    listing.write_text("with blank.webp\r\n./a/b/One.JPG some/depth.png\n")
    names = [f.rgb for f in FrameSet("photos", root, listing, size=(8, 8)).frames]
    assert names == ["with blank.webp", "a/b/One.JPG"]


def test_lists_drop_none_and_name_absent_frames(tmp_path):
    root = _nano(tmp_path / "n", 3)
    listing = tmp_path / "list.txt"
    listing.write_text("rgb_00002.png depth_00002.png 721.5377\nrgb_00000.png None 721.5377\n"
                       "rgb_00007.png depth_00007.png\nrgb_00002.png depth_00002.png\n")
    frames = FrameSet("nano", root, listing)
    assert [f.rgb for f in frames.frames] == ["rgb_00002.png"]
    assert frames.missing == ["nano/rgb_00007.png: no rgb_00007.png"]
    listing.write_text("rgb_00002.png\n")
    assert "line 1" in _refused(UserError, FrameSet, "nano", root, listing)
    listing.write_text("\n")
    assert str(listing) in _refused(UserError, FrameSet, "nano", root, listing)


# ------------------------------------------------------------------- one sentence per user error

def test_wrong_roots_are_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    _put(tmp_path, "wrong/readme.md", b"x")
    _put(tmp_path, "file.zip", b"x")
    _put(tmp_path, "broken.tar", b"not a tar")
    cut = tmp_path / "cut.tar"
    _tar(cut, {"a.png": bytes(9000)})
    cut.write_bytes(cut.read_bytes()[:5000])
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as tar:
        tar.add(tmp_path / "file.zip", "a.png")
    for name, found in (("empty", "no files"), ("wrong", "readme.md"), ("file.zip", "another kind"),
                        ("broken.tar", "complete"), ("gz.tar", "uncompressed"), ("no", "nothing"),
                        ("cut.tar", "complete")):
        for kind in ("hypersim", "vkitti", "nano", "photos"):
            sentence = _refused(UserError, FrameSet, kind, tmp_path / name)
            assert found in sentence and str(tmp_path / name) in sentence and "\n" not in sentence
    assert "rgb_cam_00_fr0000.png" in _refused(UserError, FrameSet, "hypersim", tmp_path / "empty")
    _write(tmp_path / "half", dict([next(iter(_vkitti("", "").items()))]))  # depth never unpacked
    assert "no Scene02/clone/frames/depth" in _refused(UserError, FrameSet, "vkitti",
                                                       tmp_path / "half")
    for i in range(3):
        _put(tmp_path, f"junk/{i}.jpg", b"hello")
    assert "none of the first 3" in _refused(UserError, FrameSet, "photos", tmp_path / "junk")


def test_parse_sources(tmp_path, monkeypatch):
    listing = tmp_path / "l.txt"
    listing.write_text("")
    assert data.parse_sources([f"nano={tmp_path}", f"photos={tmp_path}"], [f"nano={listing}"]) == {
        "nano": (tmp_path, listing), "photos": (tmp_path, None)}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.parse_sources(["nano=~"]) == {"nano": (tmp_path, None)}
    for sources, lists, word in (
            (["nano"], [], "NAME=PATH"), (["nano="], [], "NAME=PATH"),
            ([f"kitty={tmp_path}"], [], "hypersim, vkitti, nano, photos"),
            (["nano=/no/where"], [], "/no/where"), ([f"nano={tmp_path}"] * 2, [], "twice"),
            ([f"nano={tmp_path}"], [f"photos={listing}"], "photos"),
            ([f"nano={tmp_path}"], [f"nano={tmp_path}"], "list file")):
        sentence = _refused(UserError, data.parse_sources, sources, lists)
        assert word in sentence and "\n" not in sentence


# ---------------------------------------------------------------------------- pictures, repaired

def test_picture_modes_become_rgb():
    grey = np.arange(0, 240, 5, dtype=np.uint8).reshape(6, 8)
    three = np.repeat(grey[..., None], 3, 2)
    assert np.array_equal(open_image(_bytes(grey)), three)
    assert np.array_equal(open_image(_bytes(grey.astype(np.uint16) * 257)), three)
    assert np.array_equal(open_image(_bytes(grey.astype(np.uint16) * 257, "TIFF")), three)
    assert np.array_equal(open_image(_bytes(Image.fromarray(three).quantize(64))), three)
    colour = Image.new("RGB", (8, 6), (200, 100, 50))
    cmyk = open_image(_bytes(colour.convert("CMYK"), "JPEG", quality=100))
    assert cmyk.shape == (6, 8, 3) and abs(cmyk.astype(int) - (200, 100, 50)).max() <= 3
    assert open_image(_bytes(Image.new("1", (8, 6), 1))).min() == 255
    assert np.array_equal(open_image(_bytes(three)), three)


def test_alpha_is_composited_over_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., 3] = [[0, 255], [51, 102]]                    # black, ever more opaque
    assert open_image(_bytes(rgba))[..., 0].tolist() == [[255, 0], [204, 153]]
    la = Image.fromarray(rgba).convert("LA")
    assert open_image(_bytes(la))[..., 1].tolist() == [[255, 0], [204, 153]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    shown = open_image(_bytes(palette, transparency=0))
    assert shown.tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_exif_rotation(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6                                        # stored lying on its side
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :16] = 255                                     # left half white -> upper half
    _put(tmp_path, "r.jpg", _bytes(image, "JPEG", exif=exif))
    upright = open_image(tmp_path / "r.jpg")
    assert upright.shape == (32, 16, 3) and upright[2, 8].min() > 240 and upright[-3, 8].max() < 15
    assert np.array_equal(open_image(str(tmp_path / "r.jpg")), upright)

    def broken(image):
        raise TypeError("damaged EXIF")

    monkeypatch.setattr(ImageOps, "exif_transpose", broken)
    assert open_image(tmp_path / "r.jpg").shape == (16, 32, 3)


def test_unusable_pictures_say_why(tmp_path, monkeypatch):
    jpeg, png = _bytes(_rgb(64, 64), "JPEG"), _bytes(_rgb(64, 64))
    for content, reason in ((b"", "empty"), (b"hello, I am text", "not an image"),
                            (jpeg[:len(jpeg) // 2], "truncated"), (png[:len(png) // 2], "damaged"),
                            (_bytes(np.ones((4, 4), np.float32), "TIFF"), "mode F")):
        text = _refused(BadFrame, open_image, content)
        assert reason in text and "0x" not in text          # no address: the same in each process
    assert "No such file" in _refused(BadFrame, open_image, tmp_path / "absent.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "exceeds limit" in _refused(BadFrame, open_image, jpeg)


# ----------------------------------------------------------------------------------- bad frames

def test_bad_frames_say_why(tmp_path):
    root = _nano(tmp_path, 2)
    frames = FrameSet("nano", root)
    ramp = _ramp(12, 16)
    for content, reason in ((b"", "depth file is empty"), (b"text", "depth is not an image"),
                            (_bytes(ramp)[:-30], "depth is damaged"),
                            (_bytes((ramp // 256).astype(np.uint8)), "16-bit"),
                            (_bytes(_rgb(12, 16)), "16-bit"),
                            (_bytes(ramp * 0), "no valid depth"),
                            (_bytes(ramp * 0 + 65535), "no valid depth"),
                            (_bytes(ramp * 0 + 3000), "constant"),
                            (_bytes(_ramp(12, 15)), "12x16 and depth of 12x15")):
        _put(root, "depth_00001.png", content)
        assert reason in _refused(BadFrame, frames.sample, 1, False)
    (root / "depth_00001.png").unlink()
    assert "cannot be read" in _refused(BadFrame, frames.sample, 1, False)
    assert FrameSet("nano", root).missing == ["nano/rgb_00001.png: no depth_00001.png"]


def test_wrong_sizes_are_bad(tmp_path):
    root = _write(tmp_path / "h", _hypersim(frames=1))
    for i, (H, W) in enumerate([(768, 1000), (240, 320)]):
        _write(tmp_path / str(i), _hypersim(frames=1, H=H, W=W))
        assert f"{H}x{W}" in _refused(BadFrame, FrameSet("hypersim", tmp_path / str(i)).sample, 0,
                                      False)
    assert FrameSet("hypersim", root, size=(240, 320)).sample(0, False).rgb.shape == (3, 240, 320)
    _write(tmp_path / "v", _vkitti("", "", H=300))
    assert "352x1216" in _refused(UserError, FrameSet, "vkitti", tmp_path / "v")


def test_bad_frames_count_once_and_stop_the_run():
    bad = BadFrames(["a/1: empty"])
    assert bad.add(["a/1: empty", "a/2: empty", "a/2: empty"]) == ["a/2: empty"]
    assert BadFrames(bad.state()).state() == ["a/1: empty", "a/2: empty"]
    bad.check(200, 0.01)                                    # 1 % exactly is allowed
    text = _refused(UserError, bad.check, 199, 0.01)
    assert "a/1: empty" in text and "a/2: empty" in text and "--max_bad" in text
    BadFrames().check(1, 0.0)


# --------------------------------------------------------------------- normalisation and resizing

@pytest.mark.parametrize("space", ["disparity", "depth"])
def test_normalize_equals_numpy_quantiles(space):
    depth = np.random.default_rng(1).uniform(0.5, 60, (31, 47)).astype(np.float32)
    valid = depth < 50
    depth[0, 0], valid[0, 0] = 0, False
    label = data.normalize(depth, valid, space)
    known = (1 / depth[valid] if space == "disparity" else depth[valid]).astype(np.float64)
    low, high = np.quantile(known, [0.02, 0.98])
    expected = np.clip(2 * (known - low) / (high - low) - 1, -1, 1)
    assert label.shape == (3, 31, 47) and torch.equal(label[0], label[2])
    assert np.allclose(label[1].numpy()[valid], expected, atol=1e-5)
    assert (label[0].numpy()[~valid] == (-1 if space == "disparity" else 1)).all()
    assert 0.01 < (expected == 1).mean() < 0.03             # the clip is at work


def test_normalize_hand_numbers_and_constants():
    depth = torch.tensor([[1.0, 2.0, 3.0, 4.0, float("nan")]])
    valid = torch.tensor([[True, True, True, True, False]])
    label = data.normalize(depth, valid, "depth")[0, 0]     # quantiles 1.06 and 3.94
    assert torch.allclose(label, torch.tensor([-1, 1.88 / 2.88 - 1, 3.88 / 2.88 - 1, 1, 1]))
    for flat in (torch.full((2, 5), 3.0), np.full((2, 5), 3.0, np.float32)):
        _refused(BadFrame, data.normalize, flat, np.ones((2, 5), bool), "disparity")
    _refused(BadFrame, data.normalize, depth, valid & False, "disparity")


def test_normalize_takes_more_than_two_to_the_24_values():
    depth = torch.arange(1.0, 2 ** 24 / 4 + 10, 0.25, dtype=torch.float64).float()[None]
    assert depth.numel() > 2 ** 24
    known = depth[0, [0, -1]]
    label = data.stretch(depth, depth)
    assert label[0, depth.numel() // 2].abs() < 1e-3 and label[0, 0] == -1 and label[0, -1] == 1
    share = (label == -1).float().mean().item()
    assert share == pytest.approx(0.02, abs=1e-4) and known[0] == 1


def test_normalize_teacher():
    disparity = torch.rand(20, 30, generator=torch.manual_seed(0)) * 7
    plain = data.normalize_teacher(disparity, "disparity")
    assert torch.allclose(plain, data.normalize_teacher(3 * disparity + 5, "disparity"), atol=1e-4)
    known = disparity.double().numpy()
    low, high = np.quantile(known, [0.02, 0.98])
    assert np.allclose(plain[2], np.clip(2 * (known - low) / (high - low) - 1, -1, 1), atol=1e-5)
    depth = 1 / ((known - known.min()) / (known.max() - known.min()) + 0.05)
    low, high = np.quantile(depth, [0.02, 0.98])
    assert np.allclose(data.normalize_teacher(disparity, "depth")[0],
                       np.clip(2 * (depth - low) / (high - low) - 1, -1, 1), atol=1e-4)
    for space, far in (("disparity", -1), ("depth", 1)):
        assert (data.normalize_teacher(torch.zeros(4, 4), space) == far).all()
        bird = torch.zeros(20, 20)
        bird[3, 3] = 2
        label = data.normalize_teacher(bird, space)
        assert label[0, 3, 3] == -far and (label == far).sum() == 3 * 399
        bird[0, 0] = float("nan")                           # must reach the loss, which stops
        assert data.normalize_teacher(bird, space).isnan().any()


def test_cover_crops_the_centre_and_antialiases():
    image = _rgb(31, 51)
    assert np.array_equal(data.cover(image, (31, 51)), image)
    assert np.array_equal(data.cover(image, (31, 40)), image[:, 5:45])          # (51 - 40) // 2
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = data.cover(stripes, (16, 16))
    assert abs(small.astype(int) - 127).max() < 20                              # nearest: 0 or 255
    half = np.zeros((10, 40, 3), np.uint8)
    half[:, 20:] = 255
    wide = data.cover(half, (30, 60))                                           # enlarged threefold
    assert wide.shape == (30, 60, 3) and wide[:, :27].max() == 0 and wide[:, 33:].min() == 255
    for H, W in ((1, 1), (1, 900), (700, 3), (479, 641)):
        assert data.cover(_rgb(H, W), (48, 64)).shape == (48, 64, 3)


def test_nearest_keeps_values_and_alignment():
    depth = np.arange(768 * 4, dtype=np.float32).reshape(768, 4)
    small = data.nearest(depth, (480, 2))
    assert small.shape == (480, 2) and np.isin(small, depth).all()
    assert [small[0, 0], small[240, 0], small[-1, 1]] == [depth[0, 1], depth[384, 1], depth[767, 3]]


def test_flip_turns_picture_depth_and_mask_together(tmp_path):
    ramp = _ramp(12, 16)
    ramp[0, 0] = 0
    _put(tmp_path, "rgb_0.png", _bytes(_rgb(12, 16)))
    _put(tmp_path, "depth_0.png", _bytes(ramp))
    frames = FrameSet("nano", tmp_path)
    plain, flipped = frames.sample(0, False), frames.sample(0, True)
    for a, b in zip(plain[:3], flipped[:3]):
        assert torch.equal(a.flip(2), b) and not torch.equal(a, b)
    assert not flipped.mask[0, 0, -1] and flipped.name == plain.name == "nano/rgb_0.png"
    assert torch.allclose(plain.rgb[:, 0, 0] * 127.5 + 127.5,
                          torch.tensor(_rgb(12, 16)[0, 0]).float())


# ------------------------------------------------------------------------------------ the mixture

@pytest.mark.parametrize("weights", [[9, 1], [1], [1, 1, 1], [5, 3, 2], [0.9, 0.1], [7, 1, 1, 1, 3],
                                     [1, 2, 4, 8, 16, 1], [0.5, 0.25, 0.3]])
def test_turns_stay_within_one_of_the_weights(weights):
    turns = data.deal(weights)
    had = np.zeros(len(weights))
    for n, k in enumerate(turns * 2, 1):
        had[k] += 1
        assert abs(had - n * np.array(weights) / sum(weights)).max() < 1
    _refused(UserError, data.deal, [1, 0])


def _mixture(tmp_path, micro, sizes=(23, 7, 11), seed=3):
    a = FrameSet("nano", _nano(tmp_path / "a", sizes[0]))
    b = FrameSet("nano", _nano(tmp_path / "b", sizes[1], H=8, W=24))
    a.name, b.name = "hypersim", "vkitti"
    real = FrameSet("photos", _photos(tmp_path / "r", sizes[2]), size=(12, 16))
    return MixedBatches([a, b], [9, 1], real, micro, seed)


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_mixture_is_nine_to_one_and_half_real(tmp_path, micro):
    batches = _mixture(tmp_path, micro)
    kinds, seen = Counter(), {"hypersim": [], "vkitti": [], "photos": []}
    for m in range(40):
        batch = batches[m]
        names = [name.split("/") for name in batch.names]
        assert len({kind for kind, _ in names[:micro]}) == 1
        assert all(kind == "photos" for kind, _ in names[micro:])
        assert batch.rgb.shape[0] == batch.depth.shape[0] == batch.mask.shape[0] == micro
        assert batch.real.shape == (micro, 3, 12, 16) and batch.bad == []
        kinds[names[0][0]] += 1
        for kind, name in names:
            seen[kind].append(name)
    assert kinds == {"hypersim": 36, "vkitti": 4}
    for kind, n in (("hypersim", 23), ("vkitti", 7), ("photos", 11)):
        for start in range(0, len(seen[kind]) - n + 1, n):
            assert len(set(seen[kind][start:start + n])) == n       # each once, before any again
        if len(seen[kind]) >= 2 * n:
            assert seen[kind][:n] != seen[kind][n:2 * n]            # and in a new order


def _same(a, b):
    return a.names == b.names and a.bad == b.bad and all(
        torch.equal(x, y) for x, y in zip(a[:4], b[:4]))


def test_a_batch_depends_on_seed_and_number_alone(tmp_path):
    batches = _mixture(tmp_path, 2)
    _put(tmp_path, "a/rgb_00004.png", b"")                          # and so does a replacement
    first = [batches[m] for m in range(14)]
    assert any(batch.bad for batch in first)
    again = pickle.loads(pickle.dumps(batches))
    assert all(_same(again[m], first[m]) for m in reversed(range(14)))
    loader = DataLoader(batches, batch_size=None, sampler=range(5, 14), num_workers=2)
    assert all(_same(a, b) for a, b in zip(loader, first[5:], strict=True))
    other = MixedBatches(batches.synthetic, [9, 1], batches.real, 2, seed=4)
    assert [other[m].names for m in range(3)] != [first[m].names for m in range(3)]


def test_flips_are_even_and_apply_to_both_halves(tmp_path):
    frames = FrameSet("nano", _nano(tmp_path / "n", 5))
    batches = MixedBatches([frames], [1], None, 20, seed=0)
    near_left = torch.cat([batches[m].depth[:, 0, 0, 0] for m in range(10)]) == 1
    assert 80 < near_left.sum() < 120 and batches[0].real is None   # p = 0.5, 200 draws
    edge = np.zeros((8, 8, 3), np.uint8)
    edge[:, :4] = 255
    _put(tmp_path, "p/e.png", _bytes(edge))
    photos = FrameSet("photos", tmp_path / "p", size=(8, 8))
    real = MixedBatches([frames], [1], photos, 40, seed=0)[0].real[:, 0, 0, 0]
    assert 8 < (real == 1).sum() < 32


def test_bad_frames_are_replaced_and_named(tmp_path):
    batches = _mixture(tmp_path, 4)
    _put(tmp_path, "a/depth_00002.png", b"")
    bad = [name for m in range(12) for name in batches[m].bad]
    assert set(bad) == {"hypersim/rgb_00002.png: depth file is empty (0 bytes)"}
    assert all(len(batches[m].names) == 8 for m in range(3))
    assert not any("rgb_00002" in n for m in range(12) for n in batches[m].names if "hyper" in n)
    for i in range(23):
        _put(tmp_path, f"a/rgb_{i:05}.png", b"")
    assert "in a row" in _refused(UserError, batches.__getitem__, 0)
    loader = DataLoader(batches, batch_size=None, sampler=range(2), num_workers=1)
    sentence = _refused(UserError, list, loader)                    # through a worker, still one
    assert sentence.startswith("--data hypersim=") and "\n" not in sentence
