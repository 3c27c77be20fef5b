"""Data: files on disk -> pictures and labels in [-1, 1] (paper Sec. 3.2, 3.3 and 4.1).

Synthetic frames have exact depth (Hypersim, Virtual KITTI 2, the small world); real pictures have
none, the teacher labels them while training. Read top to bottom:
storage (a folder or a .tar) -> decoders (bytes to arrays) -> SETS (one row per layout on disk)
-> normalize (metres to [-1, 1]) -> FrameSet (one set) -> MixedBatches (the training mixture).

The test sets of the paper's tables are rows of TEST_SETS, with the same reader.

    frames = FrameSet("hypersim", "/data/hypersim", list_file="filename_list_train_filtered.txt")
    rgb, depth, mask, name = frames.sample(0, flip=False)   # depth: [3, 480, 640] in [-1, 1]

A frame that cannot be used raises BadFrame with the reason: the mixture replaces and names it.
"""
import argparse
import io
import math
import os
import re
import tarfile
import zlib
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
TRIES = 20          # more unusable frames than this in a row: the set itself is wrong


class UserError(Exception):
    """Something the user can put right: one sentence that names the flag or file and the remedy."""

    def __str__(self):
        # A DataLoader worker's error arrives with its traceback in front; the sentence comes last.
        text = super().__str__()
        return text.split("UserError: ")[-1].strip() if text.startswith("Caught ") else text


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """--help with each flag's default; of None, False and [] there is nothing to say."""

    def _get_help_string(self, action):
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)


class BadFrame(Exception):
    """This one frame cannot be used; the text is the reason."""


def explain(error):
    """One line: the first of the error's text, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------- storage

def walk(root):
    """POSIX names of all visible files below a folder, through symbolic links."""
    seen = set()                                    # real paths: a circular link must end
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        inside = Path(folder).relative_to(root)
        yield from ((inside / f).as_posix() for f in files if not f.startswith("."))


class Tar:
    """The files of an uncompressed .tar, read in place: one pass for the index, then seek."""

    def __init__(self, path):
        self.path, self.index = Path(path), {}      # name -> (offset, bytes)
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    name = member.name.removeprefix("./")      # `tar -cf x.tar .` writes ./name
                    if member.isreg():
                        self.index[name] = member.offset_data, member.size
                    elif member.islnk():                       # a second name of an earlier file
                        first = member.linkname.removeprefix("./")
                        self.index[name] = self.index.get(first, (0, 0))
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{path} is not a complete, uncompressed .tar ({error}): "
                            "fetch it again or unpack it into a folder") from error

    def names(self):
        return sorted(name for name in self.index if not re.search(r"(^|/)\.", name))

    def read(self, name):
        if name not in self.index:
            raise BadFrame(f"{name} is not in {self.path.name}")
        offset, size = self.index[name]
        try:
            with open(self.path, "rb") as file:     # opened per read: workers share no position
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise BadFrame(f"{self.path} cannot be read ({error.strerror})") from error


class Folder:
    """The files below a folder; `shards` looks into its .tar files too: `00000.tar/00000.jpg`."""

    def __init__(self, root, shards=False):
        self.root, self.shards, self.tars = Path(root), shards, {}

    def names(self):
        found = []
        for name in walk(self.root):
            if self.shards and name.endswith(".tar"):
                self.tars[name] = Tar(self.root / name)
                found += [f"{name}/{member}" for member in self.tars[name].names()]
            else:
                found.append(name)
        return sorted(found)

    def read(self, name):
        stem, _, member = name.partition(".tar/")
        if f"{stem}.tar" in self.tars:
            return self.tars[f"{stem}.tar"].read(member)
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise BadFrame(f"{name} cannot be read ({error.strerror})") from error


def open_root(name, path, shards=False, flag="--data"):
    """The root of a set, a folder or a .tar, to read from; `flag` named it."""
    if path.is_dir():
        return Folder(path, shards)
    if path.is_file() and path.suffix.lower() == ".tar":
        return Tar(path)
    found = "another kind of file" if path.exists() else f"nothing there{remedy(name, path)}"
    raise UserError(f"{flag} {name}={path}: expected a folder or a .tar file, found {found}")


def remedy(name, path):
    """What to do when there is nothing at `path`, if that is known."""
    small_world = name == "nano" or "nano" in path.parts
    return "; `python nano/scenes.py` makes the small world, in minutes" if small_world else ""


# --------------------------------------------------------------------------------------- decoders

def load(data, what="picture"):
    """File contents -> PIL image, fully decoded (Pillow is lazy: damage shows only in load)."""
    if not data:
        raise BadFrame(f"{what} file is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError as error:         # its own text is a memory address
        raise BadFrame(f"{what} is not an image file") from error
    except Exception as error:                      # OSError, SyntaxError, a bomb, ...
        raise BadFrame(f"{what} is damaged ({error})") from error
    return image


def open_image(source, upright=True):
    """A picture, as bytes or path -> uint8 [H, W, 3]. Raises BadFrame.

    upright  turned as its EXIF tag says; False: as stored, for a picture whose depth map is so
    """
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise BadFrame(f"picture cannot be read ({error.strerror})") from error
    image = load(data)
    try:                                            # cameras store the rotation beside the pixels
        image = ImageOps.exif_transpose(image) if upright else image
    except Exception:                               # damaged EXIF, sound pixels: as stored
        pass
    try:
        return np.asarray(to_rgb(image))
    except ValueError as error:                     # a colour space Pillow cannot convert
        raise BadFrame(f"picture of mode {image.mode} cannot become RGB ({error})") from error


def to_rgb(image):
    """Any PIL mode -> RGB, where .convert alone would clip 16-bit grey and bare hidden colours."""
    if image.mode[0] in "IF":                       # I;16, I;16B, I, F
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError("not within 16 bits")
        image = Image.fromarray((grey / 257).round().astype(np.uint8))
    elif image.has_transparency_data:               # on white, as on a page
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def png16(data):
    """16-bit grey PNG -> float32 [H, W] in the file's unit. Eight bits: a preview, not the depth."""
    image = load(data, "depth")
    if image.mode not in ("I;16", "I;16B", "I"):
        raise BadFrame(f"depth is {image.mode}, not 16-bit grey")
    return np.asarray(image).astype(np.float32)


def mm(data):
    return png16(data) / 1000                       # metres


def cm(data):
    return png16(data) / 100                        # metres; VKITTI's sky is 655.35


def kitti_png(data):
    return png16(data) / 256                        # metres; 0 where no laser beam ended


def hdf5(data, key):
    """The array of an HDF5 file, float32 [H, W]."""
    try:
        import h5py
    except ImportError as error:
        raise UserError("raw Hypersim and Spring depth is HDF5, which needs h5py: pip install h5py "
                        "(for Hypersim there is also Marigold's PNG export)") from error
    if not data:
        raise BadFrame("depth file is empty (0 bytes)")
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            array = file[key][:].astype(np.float32)
    except (OSError, KeyError, RuntimeError) as error:
        raise BadFrame(f"depth is damaged ({error})") from error
    if array.ndim != 2:
        raise BadFrame(f"depth has the shape {array.shape}, not (height, width)")
    return array


def hypersim_hdf5(data):
    """Raw Hypersim: distance to the camera centre, stored as float16 -> planar depth, metres."""
    return planar(hdf5(data, "dataset"))


def planar(distance):
    """z = distance f / sqrt(u² + v² + f²), f = 886.81 px at 1024 px width.   [H, W] metres"""
    H, W = distance.shape
    f = 886.81 * W / 1024
    u = np.arange(W, dtype=np.float32) - (W - 1) / 2            # pixels from the optical axis
    v = np.arange(H, dtype=np.float32)[:, None] - (H - 1) / 2
    return distance * (f / np.sqrt(u ** 2 + v ** 2 + f ** 2)).astype(np.float32)


def kitti_crop(H, W):
    """The benchmark's 352 x 1216 window: bottom, centred. -> two slices"""
    if H < 352 or W < 1216:
        raise BadFrame(f"{H}x{W} pixels are too few for the 352x1216 crop")
    left = int((W - 1216) / 2)
    return slice(H - 352, H), slice(left, left + 1216)


def eth3d_raw(data):
    """ETH3D: a headerless array of 4032 x 6048 little-endian float32, inf where nothing was hit."""
    if len(data) != 4032 * 6048 * 4:
        raise BadFrame(f"depth has {len(data)} bytes, not 4032 x 6048 x 4")
    return np.frombuffer(data, "<f4").reshape(4032, 6048)


def npy(data, what):
    """.npy file -> array [H, W], without axes of length 1."""
    try:
        array = np.load(io.BytesIO(data)).squeeze()
    except (ValueError, EOFError, OSError, AttributeError) as error:
        raise BadFrame(f"{what} is not a .npy file of numbers ({error})") from error
    if array.ndim != 2:
        raise BadFrame(f"{what} has the shape {array.shape}, not (height, width)")
    return array


def diode_npy(data, mask):
    """DIODE: float32 metres, valid where the mask file says so and nowhere else."""
    depth, valid = npy(data, "depth"), npy(mask, "depth mask").astype(bool)
    if depth.shape != valid.shape:
        raise BadFrame(f"depth {depth.shape} and depth mask {valid.shape} differ in size")
    return np.where(valid, depth, 0).astype(np.float32)


def sintel_dpt(data, invalid=None):
    """Sintel .dpt: float32 202021.25 (the bytes PIEH), int32 width, height, float32 rows; metres.
    The optional PNG is not 0 where a pixel is invalid."""
    if data[:4] != b"PIEH" or len(data) < 12:
        raise BadFrame("depth is not a .dpt file (no tag PIEH)")
    W, H = np.frombuffer(data, "<i4", 2, 4)
    if len(data) != 12 + 4 * W * H:
        raise BadFrame(f"depth has {len(data)} bytes, not those of {H}x{W} pixels")
    depth = np.frombuffer(data, "<f4", offset=12).reshape(H, W)
    return depth if invalid is None else np.where(grey8(invalid, depth) > 0, np.nan, depth)


def spring_dsp5(data, intrinsics, frame):
    """Spring: disparity of twice the picture's resolution, in pixels of the picture -> metres.

    z = fx 0.065 m / disparity; a disparity of 0 is sky, infinitely far; NaN stays. intrinsics.txt
    has a row `fx fy cx cy` for each frame, and frames count from 1.
    """
    rows = intrinsics.decode(errors="replace").splitlines()
    try:
        fx = float(rows[int(frame) - 1].split()[0])
    except (IndexError, ValueError) as error:
        raise BadFrame(f"intrinsics.txt has no focal length for frame {frame}") from error
    disparity = hdf5(data, "disparity")[::2, ::2]
    with np.errstate(divide="ignore"):
        return np.where(disparity <= 0, np.inf, fx * 0.065 / disparity)


def ibims_png(data, valid, opaque):
    """iBims-1: 16 bits over 50 m, 0 and 65535 are no data. Despite their names, mask_invalid is
    not 0 where a pixel is valid, and mask_transp where it is not transparent."""
    raw = png16(data)
    good = (raw > 0) & (raw < 65535) & (grey8(valid, raw) > 0) & (grey8(opaque, raw) > 0)
    return np.where(good, raw * (50 / 65535), 0)


def grey8(data, like=None):
    """Mask or matte, 8 bits of any mode -> uint8 [H, W], of the size of `like`"""
    mask = np.asarray(load(data, "mask").convert("L"))
    if like is not None and mask.shape != like.shape:
        raise BadFrame(f"mask {mask.shape} and depth {like.shape} differ in size")
    return mask


def matte(data):
    """Alpha matte or object mask -> float32 [H, W] in [0, 1]"""
    return grey8(data).astype(np.float32) / 255


# ---------------------------------------------------------------------- the table of layouts

class Layout(NamedTuple):
    """How a data set lies on disk. Rows of one name are alternatives: the first that fits wins."""
    name: str                       # the word before "=" on the command line
    what: str                       # what a user should have on disk, for error messages
    rgb: str                        # regular expression of the picture's whole name ...
    depth: Optional[str] = None     # ... and its partner's name; None: pictures without depth
    decode: Optional[Callable] = None               # bytes, and those of more -> [H, W] metres
    near: float = 0.0               # metres: valid when near < depth < far
    far: float = math.inf
    crop: Optional[Callable] = None                 # (H, W) -> rows, columns to keep
    size: Optional[tuple] = None    # (H, W) fed to the network; None: as stored
    more: tuple = ()                # further arguments of decode: names of files like depth's,
    #                                 "?name" of one that may be missing (None), "=text" itself
    window: Optional[tuple] = None  # (top, bottom, left, right) of a picture of (.., H, W): only
    #                                 these pixels are valid
    sky: bool = False               # what lies beyond far is valid, at the distance far
    matte: bool = False             # the partner is a matte in [0, 1], not a depth map
    count: Optional[int] = None     # known number of frames, printed beside the number found


HYPERSIM = dict(near=1e-5, far=65.0, size=(480, 640))
VKITTI = dict(decode=cm, near=1e-5, far=80.0, crop=kitti_crop, size=(352, 1216))
CAMERA = r"/frames/rgb/(Camera_\d)/rgb_(\d+)\.jpg"

SETS = (
    Layout("hypersim", "Marigold's PNG export (ai_001_001/rgb_cam_00_fr0000.png with "
           "depth_plane_cam_00_fr0000.png)",
           r"(.*/)?rgb_(cam_\d+_fr\d+)\.png", r"\1depth_plane_\2.png", mm, **HYPERSIM),
    Layout("hypersim", "the raw release (ai_001_001/images/scene_cam_00_final_preview/"
           "frame.0000.tonemap.jpg with scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5)",
           r"(.*)_final_preview/(frame\.\d+)\.tonemap\.jpg",
           r"\1_geometry_hdf5/\2.depth_meters.hdf5", hypersim_hdf5, **HYPERSIM),
    Layout("vkitti", "the archives in vkitti_2.0.3_rgb/ and vkitti_2.0.3_depth/",
           r"(.*/)?vkitti_2\.0\.3_rgb/(.+)" + CAMERA,
           r"\1vkitti_2.0.3_depth/\2/frames/depth/\3/depth_\4.png", **VKITTI),
    Layout("vkitti", "Marigold's tree (rgb/Scene01/... and depth/Scene01/...)",
           r"(.*/)?rgb/(Scene.+)" + CAMERA,
           r"\1depth/\2/frames/depth/\3/depth_\4.png", **VKITTI),
    Layout("vkitti", "both archives in one place (Scene01/clone/frames/rgb/Camera_0/rgb_00000.jpg "
           "and Scene01/clone/frames/depth/Camera_0/depth_00000.png)",
           r"(.+)" + CAMERA, r"\1/frames/depth/\2/depth_\3.png", **VKITTI),
    Layout("nano", "the small world (rgb_00000.png with depth_00000.png; python nano/scenes.py)",
           r"(.*/)?rgb_([^/]+)\.png", r"\1depth_\2.png", mm, near=1e-3, far=65.0),
    Layout("photos", "pictures (" + " ".join(IMAGE_SUFFIXES) + "), in sub-folders or .tar shards "
           "if you like", r"(?i).+(" + "|".join(map(re.escape, IMAGE_SUFFIXES)) + ")"),
)


MM_10 = dict(decode=mm, near=1e-3, far=10.0)
NO_TEST = r"(?!(?:.*/)?test/)"                  # pictures whose depth is kept secret
SPLIT = r"(\d{4}_\d\d_\d\d)/(\2_drive_\d+_sync)"       # KITTI: day and drive

# The sets of the paper's tables (Sec. 4.2). Depth sets: Marigold's prepared archives, or what they
# unpack to; boundary sets: as their authors publish them.
TEST_SETS = (
    Layout("nyu", "Marigold's NYUv2 (test/kitchen_0004/rgb_0001.png with depth_0001.png)",
           r"(.*/)?(test/[^/]+)/rgb_(\d+)\.png", r"\1\2/depth_\3.png", **MM_10,
           window=(45, 471, 41, 601, 480, 640), count=654),
    Layout("nyu", "the same without the folder test/",
           r"(.*/)?rgb_(\d+)\.png", r"\1depth_\2.png", **MM_10,
           window=(45, 471, 41, 601, 480, 640), count=654),
    Layout("kitti", "Marigold's KITTI Eigen split (2011_09_26/2011_09_26_drive_0002_sync/image_02/"
           "data/0000000069.png with 2011_09_26_drive_0002_sync/proj_depth/groundtruth/...)",
           r"(.*/)?" + SPLIT + r"/image_02/data/(\d+)\.png",
           r"\1\3/proj_depth/groundtruth/image_02/\4.png", kitti_png, near=1e-5, far=80.0,
           crop=kitti_crop, window=(117, 321, 43, 1172, 352, 1216), count=652),
    Layout("eth3d", "Marigold's ETH3D (rgb/office/images/dslr_images/DSC_0219.JPG with depth/"
           "office_dslr_depth/office/ground_truth_depth/dslr_images/DSC_0219.JPG)",
           r"(.*/)?rgb/([^/]+)/images/dslr_images/([^/]+\.JPG)",
           r"\1depth/\2_dslr_depth/\2/ground_truth_depth/dslr_images/\3", eth3d_raw, near=1e-5,
           count=454),
    Layout("scannet", "Marigold's ScanNet (scene0406_02/color/000300.jpg with depth/000300.png)",
           r"(.*/)?(scene\d+_\d+)/color/(\d+)\.jpg", r"\1\2/depth/\3.png", **MM_10, count=800),
    Layout("diode", "DIODE's validation set (indoors/scene_00021/scan_00189/x.png with "
           "x_depth.npy and x_depth_mask.npy)",
           r"(.*/)?((?:indoors|outdoor)/scene_\d+/scan_\d+/[^/]+)\.png", r"\1\2_depth.npy",
           diode_npy, more=(r"\1\2_depth_mask.npy",), count=771),
    Layout("da2k", "DA-2K (annotations.json with images/indoor/x.jpg)",
           r"(?i)(.*/)?images/.+(" + "|".join(map(re.escape, IMAGE_SUFFIXES)) + ")"),
    *(Layout(name, f"Sintel's training set with depth ({folder}/alley_1/frame_0001.png with "
             "depth/alley_1/frame_0001.dpt, below training/)",
             NO_TEST + rf"(.*/)?{folder}/([^/]+)/(frame_\d+)\.png", r"\1depth/\2/\3.dpt",
             sintel_dpt, near=0.01, far=80.0, sky=True, more=(r"?\1invalid/\2/\3.png",), count=1064)
      for name, folder in (("sintel", "final"), ("sintel-clean", "clean"))),
    Layout("spring", "Spring's training set (0001/frame_left/frame_left_0001.png with disp1_left/"
           "disp1_left_0001.dsp5 and cam_data/intrinsics.txt, below train/)",
           NO_TEST + r"(.*/)?(\d{4})/frame_left/frame_left_(\d+)\.png",
           r"\1\2/disp1_left/disp1_left_\3.dsp5", spring_dsp5, near=0.01, far=200.0, sky=True,
           more=(r"\1\2/cam_data/intrinsics.txt", r"=\3"), count=5000),
    Layout("ibims", "iBims-1, ibims1_core_raw (rgb/x.png with depth/, mask_invalid/, mask_transp/)",
           r"(.*/)?rgb/([^/]+)\.png", r"\1depth/\2.png", ibims_png, near=0.1, far=10.0,
           more=(r"\1mask_invalid/\2.png", r"\1mask_transp/\2.png"), count=100),
    Layout("am2k", "AM-2k (validation/original/m_x.jpg with validation/mask/m_x.png)",
           r"(.*/)?validation/original/([^/]+)\.jpg", r"\1validation/mask/\2.png", matte,
           matte=True, count=200),
    *(Layout(name, f"P3M-10k (validation/{split}/{folder}/x.jpg with mask/x.png)",
             rf"(.*/)?{split}/{folder}/([^/]+)\.jpg", rf"\1{split}/mask/\2.png", matte, matte=True,
             count=500)
      for name, split, folder in (("p3m", "P3M-500-NP", "original_image"),
                                  ("p3m-p", "P3M-500-P", "blurred_image"))),
    Layout("dis5k", "DIS5K (DIS-VD/im/x.jpg with DIS-VD/gt/x.png; the 200 of Depth Pro by --list "
           "dis5k=dis5k_sample_list.txt)",
           r"(.*/)?(DIS-\w+)/im/([^/]+)\.jpg", r"\1\2/gt/\3.png", matte, matte=True, count=200),
)


# ---------------------------------------------------------------------------------- normalisation

def stretch(values, known):
    """2 % .. 98 % quantile of the known values -> -1 .. 1, clipped; None if the two are
    equal.

    numpy's quantile: torch's refuses more than 2^24 values.
    """
    low, high = np.quantile(known.float().cpu().numpy(), (0.02, 0.98)).tolist()
    return None if low == high else (2 * (values - low) / (high - low) - 1).clamp(-1, 1)


def normalize(depth, valid, space):
    """Metres -> label [3, H, W] in [-1, 1], from the quantiles of the valid pixels.

    space "disparity" (1 / depth): near +1, far -1; "depth": near -1, far +1.
    Invalid pixels (sky, windows) hold the far value: the VAE sees a plausible map, the loss a mask.
    depth [H, W] float, valid [H, W] bool: numpy or torch.
    """
    depth, valid = torch.as_tensor(depth), torch.as_tensor(valid)
    if not valid.any():
        raise BadFrame("no valid depth")
    values, far = (1 / depth, -1.0) if space == "disparity" else (depth, 1.0)
    label = stretch(values, values[valid])
    if label is None:
        raise BadFrame("constant depth")
    return torch.where(valid, label, far).repeat(3, 1, 1)


def normalize_teacher(disparity, space):
    """The teacher's disparity [H, W], of unknown scale and shift -> label [3, H, W] in [-1, 1].

    A flat map is all far. Under a sky (exact zeros, the teacher ends in a ReLU) with one bird the
    quantiles are equal too: there minimum and maximum take their place. NaN stays NaN.
    """
    low, high = disparity.min(), disparity.max()
    far = -1.0 if space == "disparity" else 1.0
    if low == high:
        return torch.full_like(disparity, far).repeat(3, 1, 1)
    values = (disparity - low) / (high - low)
    if space == "depth":
        values = 1 / (values + 0.05)                # the floor keeps the far end finite: 0.95 .. 20
    label = stretch(values, values)
    if label is None:
        label = stretch(values, torch.stack([values.min(), values.max()]))
    return label.repeat(3, 1, 1)


# ---------------------------------------------------------------------------------------- one set

class Frame(NamedTuple):
    rgb: str                        # names inside the root
    depth: Optional[str]
    more: tuple = ()                # names of the layout's further files, and its "=" words


class Sample(NamedTuple):
    rgb: torch.Tensor               # [3, H, W] in [-1, 1]
    depth: Optional[torch.Tensor]   # [3, H, W] in [-1, 1], or None
    mask: Optional[torch.Tensor]    # [1, H, W] bool, True where the depth is valid
    name: str                       # "set/file"


def cover(rgb, size):
    """Scale a picture, smaller ones up, until it just covers (H, W), antialiased, and cut the
    centre out."""
    (H, W), (h, w) = rgb.shape[:2], size
    scale = min(H / h, W / w)       # source pixels per result pixel
    top, left = int((H - h * scale) / 2), int((W - w * scale) / 2)     # whole: scale 1 stays exact
    box = (left, top, min(left + w * scale, W), min(top + h * scale, H))
    return np.asarray(Image.fromarray(rgb).resize((w, h), Image.BILINEAR, box=box))


def nearest(array, size):
    """[H, W] -> size by picking pixels: depths on two sides of an edge must not be averaged."""
    rows, cols = (((np.arange(n) + 0.5) * N / n).astype(int) for n, N in zip(size, array.shape))
    return array[rows[:, None], cols]


def read_list(path, names, pairs):
    """List file in Marigold's form, `rgb depth [more]` per line -> [Frame]; `None` = no depth.

    Without `pairs` (partners go by name) a line is one name, blanks and all, or else its first
    field. Leading folders of the list that the root has not, such as its own name, are dropped.
    """
    def locate(name):
        parts = name.removeprefix("./").split("/")
        tails = ("/".join(parts[k:]) for k in range(len(parts)))
        return next((tail for tail in tails if tail in names), "/".join(parts))

    frames = []
    lines = Path(path).read_text("utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        line, fields = line.strip(), line.split()
        if not fields or pairs and fields[1:2] == ["None"]:
            continue
        if pairs and len(fields) < 2:
            raise UserError(f"{path}, line {number}: expected `rgb depth`, found `{line}`")
        whole = locate(line)
        frames.append(Frame(locate(fields[0]), locate(fields[1])) if pairs else
                      Frame(whole if whole in names else locate(fields[0]), None))
    return list(dict.fromkeys(frames))              # a frame listed twice counts once


class FrameSet(Dataset):
    """One data set: the frames of a root (folder or .tar), all of them or those of a list file.

    name      a name in SETS or TEST_SETS
    space     of the label: "disparity" or "depth"
    size      (H, W) to feed; default: the row's, else that of the first readable frame
    cap       use the first so many frames only
    flag      that named the set, for the sentences
    .frames   [Frame]     .missing   ["set/file: reason"], frames that lack a file
    .names    of their pictures      .wanted    of all pictures, also those that lack a file
    """

    def __init__(self, name, path, list_file=None, space="disparity", size=None, cap=None,
                 flag="--data"):
        self.name, self.path, self.space = name, Path(path), space
        self.flag = flag
        rows = [row for row in SETS + TEST_SETS if row.name == name]
        self.store = open_root(name, self.path, rows[0].depth is None, flag)
        names = set(self.store.names())
        pairs = rows[0].depth is not None and not rows[0].matte
        listed = list_file and read_list(list_file, names, pairs)
        candidates = [f.rgb for f in listed] if list_file else sorted(names)
        fits = [row for row in rows if any(re.fullmatch(row.rgb, n) for n in candidates)]
        if not fits:
            raise self.misfit(rows, list_file or "the root", candidates)
        self.layout = fits[0]
        wanted = [self.complete(f, names) for f in listed or self.pair(sorted(names))][:cap]
        self.wanted = [f.rgb for f in wanted]
        absent = {f: self.lacks(f, names) for f in wanted}
        self.frames = [f for f in wanted if not absent[f]]
        self.missing = [f"{name}/{f.rgb}: no {absent[f][0]}" for f in wanted if absent[f]]
        if not self.frames:
            raise self.misfit(rows, f"the root ({self.missing[0]})", sorted(names))
        self.keep = size is None and self.layout.size is None
        first = self.probe()        # now: a missing h5py must not wait for a worker
        self.size = size or self.layout.size or first

    def misfit(self, rows, where, found):
        expected = ", or ".join(row.what for row in rows)
        more = f" and {len(found) - 1} more" if found[1:] else ""
        return UserError(f"{self.source}: expected {expected}; "
                         f"found in {where}: {found[0] if found else 'no files'}{more}")

    def pair(self, names):
        """Names that look like the layout's pictures -> [Frame], partners by name."""
        matches = filter(None, (re.fullmatch(self.layout.rgb, name) for name in names))
        return [Frame(m[0], self.layout.depth and m.expand(self.layout.depth)) for m in matches]

    def lacks(self, frame, names):
        """The files of a frame that are not there; its own name, when it is not as the layout's."""
        if frame.rgb in names and not re.fullmatch(self.layout.rgb, frame.rgb):
            return [f"picture named like {self.layout.what}"]
        return [n for n in (*frame[:2], *frame.more) if n and n[0] != "=" and n not in names]

    def complete(self, frame, names):
        """Adds what goes by the picture's name: its partner, where a list has none, and more."""
        match = re.fullmatch(self.layout.rgb, frame.rgb)
        if not match or not self.layout.depth:
            return frame
        more = []
        for word in (match.expand(word) for word in self.layout.more):
            optional, word = word[0] == "?", word.removeprefix("?")
            more.append(None if optional and word not in names else word)
        return Frame(frame.rgb, frame.depth or match.expand(self.layout.depth), tuple(more))

    def probe(self):
        """(H, W) of the first frame that can be read."""
        reasons = []
        for i in range(min(TRIES, len(self))):
            try:
                return self.read(i)[0].shape[:2]
            except BadFrame as error:
                reasons.append(f"{self.frames[i].rgb}: {error}")
        raise UserError(f"{self.source}: none of the first {len(reasons)} frames "
                        f"can be used ({reasons[0]}); check that the copy is complete")

    def __len__(self):
        return len(self.frames)

    @property
    def source(self):
        """The words of the command line that named the set."""
        return f"{self.flag} {self.name}={self.path}"

    @property
    def names(self):
        return [frame.rgb for frame in self.frames]

    def read(self, i):
        """-> rgb uint8 [H, W, 3], depth float32 [H, W] metres, valid [H, W] bool (or None, None).

        At the stored size, after the layout's crop. NaN and inf become 0, never valid; with the
        layout's `sky`, what is farther than far becomes far. A matte is its alpha, all valid.
        """
        frame, row = self.frames[i], self.layout
        rgb = open_image(self.store.read(frame.rgb), upright=frame.depth is None)
        if frame.depth is None:
            return rgb, None, None
        more = map(self.argument, frame.more)
        depth = row.decode(self.store.read(frame.depth), *more).astype(np.float32)
        if rgb.shape[:2] != depth.shape:
            raise BadFrame("picture of {}x{} and {} of {}x{} pixels".format(
                *rgb.shape[:2], "matte" if row.matte else "depth", *depth.shape))
        if row.matte:
            return rgb, depth, np.ones(depth.shape, bool)
        if row.crop:
            window = row.crop(*depth.shape)
            rgb, depth = rgb[window], depth[window]
        if row.sky:
            depth = np.minimum(depth, row.far)
        depth = np.nan_to_num(depth, nan=0.0, posinf=0.0, neginf=0.0)
        valid = (depth > row.near) & ((depth < row.far) | (row.sky & (depth == row.far)))
        if row.window:
            top, bottom, left, right, *size = row.window
            if list(valid.shape) != size:
                raise BadFrame("{}x{} pixels, the benchmark's crop is for {}x{}".format(
                    *valid.shape, *size))
            inside = np.zeros(valid.shape, bool)
            inside[top:bottom, left:right] = True
            valid &= inside
        return rgb, depth, valid

    def named(self, read, i, *more):
        """read(i, *more), e.g. of self.sample, where no other frame can take its place."""
        try:
            return read(i, *more)
        except BadFrame as error:
            raise UserError(f"{self.path / self.frames[i].rgb}: {error}") from None

    def argument(self, word):
        """A further argument of decode: a file's bytes, the text behind "=", None for None."""
        if word is None or word[0] == "=":
            return word and word[1:]
        return self.store.read(word)

    def sample(self, i, flip):
        """-> Sample, as the network takes it; `flip` mirrors left and right."""
        rgb, depth, valid = self.read(i)
        if depth is not None:
            self.check_size(*depth.shape)
            valid = nearest(valid, self.size)
            depth = normalize(nearest(depth, self.size), valid, self.space)
        rgb = torch.from_numpy(cover(rgb, self.size).astype(np.float32)).permute(2, 0, 1)
        mask = None if valid is None else torch.from_numpy(valid)[None]
        maps = [rgb / 127.5 - 1, depth, mask]
        maps = [m.flip(-1) if flip and m is not None else m for m in maps]
        return Sample(*maps, f"{self.name}/{self.frames[i].rgb}")

    def check_size(self, H, W):
        """Frames with depth are never stretched or enlarged; pictures alone are cut to fit."""
        h, w = self.size
        fits = (H, W) == (h, w) if self.keep else H >= h and H * w == W * h
        if not fits:
            raise BadFrame(f"{H}x{W} pixels, the first frame has {h}x{w}" if self.keep else
                           f"{H}x{W} pixels cannot be scaled down to {h}x{w} without stretching")


# ------------------------------------------------------------------------------------ the mixture

class Batch(NamedTuple):
    rgb: torch.Tensor               # [B, 3, H, W] synthetic
    depth: torch.Tensor             # [B, 3, H, W] its label
    mask: torch.Tensor              # [B, 1, H, W] bool
    real: Optional[torch.Tensor]    # [B, 3, h, w], or None without a real set
    labels: Optional[torch.Tensor]  # of the real pictures, where they were made in advance
    names: list                     # "set/file": B synthetic, then B real
    bad: list                       # "set/file: reason" met on the way and replaced


def deal(weights):
    """Turns in proportion to the weights -> one period of set numbers, e.g. 9 : 1 -> ten.

    After any n turns set k has had n weight_k / sum, give or take less than one: its j-th turn may
    not come before slot j / share and must come by (j + 1) / share; the earliest deadline goes
    first (single-processor scheduling: that order meets every deadline that can be met).
    """
    exact = [Fraction(w).limit_denominator(1000) for w in weights]
    if min(exact) <= 0:
        raise UserError("the weights of the mixture must be positive numbers")
    shares = [w / sum(exact) for w in exact]
    had, turns = [0] * len(shares), []
    for n in range(math.lcm(*(s.denominator for s in shares))):
        ready = [k for k, s in enumerate(shares) if had[k] < s * (n + 1)]
        turns.append(min(ready, key=lambda k: (had[k] + 1) / shares[k]))
        had[turns[-1]] += 1
    return turns


@lru_cache(maxsize=16)
def shuffled(seed, key, epoch, n):
    """The order of a set's n frames in one epoch."""
    return np.random.default_rng((seed, key, 0, epoch)).permutation(n)


class MixedBatches(Dataset):
    """Item m is micro-batch m of the whole run: `micro` synthetic frames of one set (sizes differ
    between sets) and `micro` real pictures.

    It depends on (seed, m) alone, so the state of the sampler is one integer and resuming, or any
    number of workers, changes nothing:
        DataLoader(batches, batch_size=None, sampler=range(start, stop), num_workers=2)
    """

    def __init__(self, synthetic, weights, real, micro, seed, flip=True):
        self.synthetic, self.real, self.micro, self.seed = list(synthetic), real, micro, seed
        self.flip = flip            # mirror half of the samples
        self.turns = deal(weights)

    def __getitem__(self, m):
        period, n = divmod(m, len(self.turns))
        k = self.turns[n]
        turn = period * self.turns.count(k) + self.turns[:n].count(k)  # batches of set k before m
        bad = []
        pairs = self.take(self.synthetic[k], turn, bad)
        photos = [] if self.real is None else self.take(self.real, m, bad)
        rgb, depth, mask = (torch.stack(maps) for maps in list(zip(*pairs))[:3])
        real = torch.stack([photo.rgb for photo in photos]) if photos else None
        kept = photos and photos[0].depth is not None
        labels = torch.stack([photo.depth for photo in photos]) if kept else None
        return Batch(rgb, depth, mask, real, labels, [s.name for s in pairs + photos], bad)

    def take(self, frames, turn, bad):
        """The samples of a set's turn-th micro-batch; appends what could not be used to `bad`."""
        return [self.draw(frames, turn * self.micro + j, bad) for j in range(self.micro)]

    def draw(self, frames, position, bad):
        """The position-th sample of a set: every frame once per epoch, in a new order each time."""
        key = zlib.crc32(frames.name.encode())
        epoch, place = divmod(position, len(frames))
        rng = np.random.default_rng((self.seed, key, 1, position))
        flip = bool(rng.random() < 0.5) and self.flip
        spare = rng.integers(len(frames), size=TRIES)           # for a bad frame
        for i in (shuffled(self.seed, key, epoch, len(frames))[place], *spare):
            try:
                return frames.sample(int(i), flip)
            except BadFrame as error:
                bad.append(f"{frames.name}/{frames.frames[i].rgb}: {error}")
        raise UserError(f"{frames.source}: {TRIES + 1} unusable frames in a "
                        f"row, the last is {bad[-1]}; check the files")


class BadFrames:
    """The bad frames of a run, each once; a checkpoint keeps state() and hands it back."""

    def __init__(self, names=()):
        self.names = dict.fromkeys(names)           # a set that remembers the order

    def add(self, found):
        """-> those not seen before, to be printed."""
        new = [name for name in dict.fromkeys(found) if name not in self.names]
        self.names.update(dict.fromkeys(new))
        return new

    def check(self, total, max_bad):
        """Stop when more than the share `max_bad` of all `total` frames of the sets is bad."""
        if len(self.names) > max_bad * total:
            raise UserError(f"{len(self.names)} of {total} frames are bad, more than --max_bad "
                            f"{max_bad:g}: repair or remove them, or raise it:\n  "
                            + "\n  ".join(self.names))

    def state(self):
        return list(self.names)


# ----------------------------------------------------------------------------------- command line

def split_word(flag, word, known):
    """`name=path` -> name, Path"""
    name, equals, path = word.partition("=")
    if not equals or not path:
        raise UserError(f"{flag} {word}: expected NAME=PATH, as in {flag} {known[0]}=/path")
    if name not in known:
        raise UserError(f"{flag} {word}: unknown name {name}, expected one of {', '.join(known)}")
    path = Path(path).expanduser()                  # no shell expands a ~ after the "="
    if not path.exists():
        raise UserError(f"{flag} {word}: there is no file or folder {path}{remedy(name, path)}")
    return name, path


def parse_sources(sources, lists=(), rows=SETS, flag="--data"):
    """["hypersim=PATH", ...] and ["hypersim=FILE", ...] -> {name: (path, list file or None)}

    flag  that the sources came from, for the sentences
    """
    known = list(dict.fromkeys(row.name for row in rows))
    found = {}
    for name, path in (split_word(flag, word, known) for word in sources):
        if name in found:
            raise UserError(f"{flag} names {name} twice: put both under one folder")
        found[name] = path, None
    for word in lists:
        name, path = split_word("--list", word, list(found) or known)
        if name not in found or path.is_dir():
            raise UserError(f"--list {word}: expected a list file for a set that --data names")
        found[name] = found[name][0], path
    return found
