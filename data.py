"""Data: files on disk -> pictures and labels in [-1, 1] (paper Sec. 3.2, 3.3 and 4.1).

Synthetic frames have exact depth (Hypersim, Virtual KITTI 2, the small world, your own pairs); real
pictures have none, the teacher labels them while training. Read top to bottom:
storage (a folder or a .tar) -> decoders (bytes to arrays) -> SETS (one row per layout on disk)
-> normalize (metres to [-1, 1]) -> FrameSet (one set) -> MixedBatches (the training mixture).
The last section is what all commands of this project share.

    frames = FrameSet("hypersim", "/data/hypersim", list_file="filename_list_train_filtered.txt")
    rgb, label, mask, name = frames.sample(0, flip=False)   # label: [3, 480, 640] in [-1, 1]

A frame that cannot be used raises BadFrame with the reason: the mixture replaces and names it.
"""
import argparse
import io
import json
import math
import os
import re
import sys
import tarfile
import warnings
import zlib
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
TRIES = 20          # more unusable frames than this in a row: the set itself is wrong


class UserError(Exception):
    """Something the user can put right: one sentence that names the flag or file and the remedy."""

    def __str__(self):
        # A DataLoader worker's error arrives with its traceback in front; the sentence comes last.
        text = super().__str__()
        return text.split("UserError: ")[-1].strip() if text.startswith("Caught ") else text


class BadFrame(Exception):
    """This one frame cannot be used; the text is the reason."""


def explain(error):
    """One line: the first of the error's text, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------- storage

def walk(root, onerror=None):
    """POSIX names of all visible files below a folder, through symbolic links.
    onerror  is called with the OSError of each folder that cannot be read"""
    seen = set()                                    # real paths: a circular link must end
    for folder, subfolders, files in os.walk(root, onerror=onerror, followlinks=True):
        if os.path.realpath(folder) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        inside = Path(folder).relative_to(root)
        yield from ((inside / f).as_posix() for f in files if not f.startswith("."))


def stamp(file):
    """Size and time of a file: another stamp, other content."""
    found = os.stat(file)
    return [found.st_size, found.st_mtime_ns]


class Store:
    """The files of a set: below a folder, or in an uncompressed .tar, which is read in place.

    `shards` looks into a folder's .tar files too: `00000.tar/00000.jpg`.
    .cut  "file: reason" of each .tar that ends early; what lies before the cut is used
    """

    def __init__(self, root, shards=False):
        self.root, self.cut = Path(root), []
        self.places = {}            # name -> (file, offset, bytes) in a .tar; None: a file itself
        if self.root.is_file():
            self.places = self.members(self.root)
            return
        for name in walk(self.root):
            if shards and name.endswith(".tar"):
                members = self.members(self.root / name)
                self.places |= {f"{name}/{member}": place for member, place in members.items()}
            else:
                self.places[name] = None

    def members(self, tar):
        """The index of a .tar, in one pass: name -> (file, offset, bytes)."""
        found = {}
        try:
            with tarfile.open(tar, "r:") as members:
                for member in members:
                    name = member.name.removeprefix("./")      # `tar -cf x.tar .` writes ./name
                    first = member.linkname.removeprefix("./")
                    if member.offset_data + member.size > os.path.getsize(tar):
                        raise tarfile.ReadError("unexpected end of data")
                    if member.isreg():
                        found[name] = tar, member.offset_data, member.size
                    elif member.islnk() and first in found:    # a second name of an earlier file
                        found[name] = found[first]
                members.fileobj.seek(members.offset)           # a whole archive ends with zeros
                if len(members.fileobj.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("its end is missing")
        except (tarfile.TarError, OSError) as error:
            if tar == self.root and not found:
                raise UserError(f"{tar} is not an uncompressed .tar ({explain(error)}): fetch it "
                                "again or unpack it into a folder") from error
            self.cut.append(f"{tar.name}: cut off or damaged after {len(found)} files "
                            f"({explain(error)})")
        return {name: found[name] for name in found if not re.search(r"(^|/)\.", name)}

    def names(self):
        return sorted(self.places)

    def __contains__(self, name):
        return name in self.places or (self.root / name).is_file()     # a list may lead elsewhere

    def read(self, name):
        file, offset, size = self.places.get(name) or (self.root / name, 0, -1)
        try:
            with open(file, "rb") as f:             # opened per read: workers share no position
                f.seek(offset)
                return f.read(size)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BadFrame(f"no {name}") from error
        except OSError as error:
            raise BadFrame(f"{name} cannot be read ({error.strerror})") from error

    def stamp(self, name):
        """Of the file on disk that holds it."""
        return stamp((self.places.get(name) or [self.root / name])[0])


def open_root(name, path, shards=False, flag="--data"):
    """The root of a set, a folder or a .tar, to read from; `flag` named it."""
    if path.is_dir() or path.is_file() and path.suffix.lower() == ".tar":
        return Store(path, shards)
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
    image, heif = None, data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS
    if heif and not has_heif():
        raise BadFrame(f"{what} is HEIF, which needs another package: pip install pillow-heif")
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError as error:         # its own text is a memory address
        raise BadFrame(f"{what} is not an image file, or of a kind that Pillow does not read: "
                       "convert it to PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        raise BadFrame(f"{what} has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels, "
                       "the limit that keeps a file from filling the memory: scale it down, or "
                       "raise the limit (infer.py: --max_megapixels)") from error
    except Exception as error:                      # OSError, SyntaxError, ...
        if image is not None and image.format in unreadable_formats():
            raise BadFrame(f"{what} is a file of the format {image.format}, which Pillow does not "
                           "read: convert it to PNG or JPEG") from error
        raise BadFrame(f"{what} is damaged, or stored in a way that Pillow does not read "
                       f"({explain(error)})") from error
    return image


@lru_cache
def has_heif():
    """Can .heic and .heif be read? A package adds them to Pillow."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


@lru_cache
def unreadable_formats():
    """What Pillow recognises and cannot decode, or only by starting another program."""
    Image.init()
    stubs = {name for name, (opener, _) in Image.OPEN.items()
             if isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)}
    return stubs | {"EPS", "MPEG", "PALM", "PDF"}


@lru_cache
def readable_suffixes():
    """Endings, in lower case, of all pictures that Pillow reads here: what folders are searched
    for. It depends on the packages that are installed; IMAGE_SUFFIXES are the usual ones."""
    has_heif()
    Image.init()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items()
                     if name not in unreadable_formats())


def open_image(source, upright=True, notes=None):
    """A picture, as bytes or path -> uint8 [H, W, 3]. Raises BadFrame.

    upright  turned as its EXIF tag says; False: as stored, for a picture whose depth map is so
    notes    a list: sentences about what was unusual and was read nevertheless are added to it
    """
    notes = [] if notes is None else notes
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        broken = os.path.islink(source) and not os.path.exists(source)
        link = f", a link to {os.path.realpath(source)}" if broken else ""
        raise BadFrame(f"picture cannot be read ({error.strerror}{link})") from error
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = load(data)
        try:                                        # cameras store the rotation beside the pixels
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
        except Exception:                           # sound pixels: as stored
            notes.append("its EXIF data is damaged, so a rotation in it is not known")
    notes += dict.fromkeys(f"Pillow says: {explain(w.message)}" for w in caught if w.category
                           not in (Image.DecompressionBombWarning, DeprecationWarning))
    try:
        return np.asarray(to_rgb(image, notes))
    except ValueError as error:                     # a colour space Pillow cannot convert
        raise BadFrame(f"picture of mode {image.mode} cannot become RGB ({error})") from error


def to_rgb(image, notes=None):
    """Any PIL mode -> RGB, where .convert alone would clip 16-bit grey and bare hidden colours."""
    if image.mode[0] in "IF":                       # I;16, I;16B, I, F
        image = Image.fromarray(grey_to_8_bits(np.asarray(image), [] if notes is None else notes))
    elif image.has_transparency_data:               # on white, as on a page
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def grey_to_8_bits(grey, notes):
    """Grey of more than 8 bits, [H, W] -> uint8 [H, W].

    White is 65535, as in a 16-bit photograph. But data of 10, 12 or 14 bits, of a thermal camera or
    in floats, would be nearly black or flat so: where all but 0.2 % of the values span less than a
    quarter of the 16 bits, or do not lie within them, that span is stretched to black ... white.
    """
    known = grey[np.isfinite(grey)]
    if not known.size:
        raise ValueError("no value is finite")
    low, high = np.percentile(known, (0.1, 99.9), method="nearest").tolist()
    sixteen_bits = known.min() >= 0 and known.max() <= 65535 and grey.dtype.kind in "iu"
    if sixteen_bits and (high == low or high - low >= 2 ** 14):
        return (grey / np.float32(257)).round().astype(np.uint8)
    if high == low:
        raise ValueError("all values are equal")
    notes.append(f"its grey values {low:g} ... {high:g} are stretched to black ... white")
    share = (np.nan_to_num(grey, nan=low).astype(np.float64) - low) / (high - low)
    return (share.clip(0, 1) * 255).round().astype(np.uint8)


def png16(data):
    """16-bit grey PNG -> float32 [H, W] in the file's unit. 8 bits are a preview, not the depth."""
    image = load(data, "depth")
    if image.mode not in ("I;16", "I;16B", "I"):
        raise BadFrame(f"depth is {image.mode}, not 16-bit grey")
    return np.asarray(image).astype(np.float32)


def mm(store, name):
    return png16(store.read(name)) / 1000           # metres


def cm(store, name):
    return png16(store.read(name)) / 100            # metres; VKITTI's sky is 655.35


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


def hypersim_hdf5(store, name):
    """Raw Hypersim: distance to the camera centre, stored as float16 -> planar depth, metres."""
    return planar(hdf5(store.read(name), "dataset"))


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


def npy(data, what="depth"):
    """.npy file -> array [H, W], without axes of length 1."""
    try:
        array = np.load(io.BytesIO(data)).squeeze()
    except (ValueError, EOFError, OSError, AttributeError) as error:
        raise BadFrame(f"{what} is not a .npy file of numbers ({explain(error)})") from error
    if array.ndim != 2:
        raise BadFrame(f"{what} has the shape {array.shape}, not (height, width)")
    return array


def own_map(data, name):
    """Depth or disparity map, by its ending: float .npy, float TIFF, 16-bit PNG -> float32 [H, W]
    in the file's unit."""
    if name.lower().endswith(".npy"):
        return npy(data).astype(np.float32)
    if name.lower().endswith(".png"):
        return png16(data)
    image = load(data, "depth")
    if image.mode not in ("F", "I", "I;16", "I;16B"):
        raise BadFrame(f"depth is {image.mode}, not a float or 16-bit TIFF")
    return np.asarray(image).astype(np.float32)


# ---------------------------------------------------------------------- the table of layouts

class Layout(NamedTuple):
    """How a data set lies on disk. Rows of one name are alternatives: the first that fits wins."""
    name: str                       # the word before "=" on the command line
    what: str                       # what a user should have on disk, for error messages
    rgb: str                        # regular expression of the picture's whole name ...
    depth: tuple = ()               # ... and its partner's name, the first of these that is there;
    #                                 (): pictures without depth
    load: Callable | None = None    # (store, partner's name) -> depth [H, W] metres
    more: Callable | None = None    # partner's name -> names of further files that load reads
    near: float = 0.0               # metres: valid when near < depth < far
    far: float = math.inf
    crop: Callable | None = None    # (H, W) -> rows, columns to keep
    size: tuple | None = None       # (H, W) fed to the network; None: as stored
    window: tuple | None = None     # (top, bottom, left, right) of a picture of (.., H, W): only
    #                                 these pixels are valid
    sky: bool = False               # what lies beyond far is valid, at the distance far
    count: int | None = None        # known number of frames, printed beside the number found
    listed: tuple | None = None     # (regular expression, name): how public lists name a picture


HYPERSIM = dict(near=1e-5, far=65.0, size=(480, 640))
VKITTI = dict(load=cm, near=1e-5, far=80.0, crop=kitti_crop, size=(352, 1216))
CAMERA = r"/frames/rgb/(Camera_\d)/rgb_(\d+)\.jpg"
SUFFIXES = "(?i:" + "|".join(map(re.escape, IMAGE_SUFFIXES)) + ")"

SETS = (
    Layout("hypersim", "Marigold's PNG export (ai_001_001/rgb_cam_00_fr0000.png with "
           "depth_plane_cam_00_fr0000.png)",
           r"(.*/)?rgb_(cam_\d+_fr\d+)\.png", (r"\1depth_plane_\2.png",), mm, **HYPERSIM),
    Layout("hypersim", "the raw release (ai_001_001/images/scene_cam_00_final_preview/"
           "frame.0000.tonemap.jpg with scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5)",
           r"(.*)_final_preview/(frame\.\d+)\.tonemap\.jpg",
           (r"\1_geometry_hdf5/\2.depth_meters.hdf5",), hypersim_hdf5, **HYPERSIM,
           listed=(r"(.*/)?rgb_(cam_\d+)_fr(\d+)\.png",
                   r"\1images/scene_\2_final_preview/frame.\3.tonemap.jpg")),
    Layout("vkitti", "the archives in vkitti_2.0.3_rgb/ and vkitti_2.0.3_depth/",
           r"(.*/)?vkitti_2\.0\.3_rgb/(.+)" + CAMERA,
           (r"\1vkitti_2.0.3_depth/\2/frames/depth/\3/depth_\4.png",), **VKITTI),
    Layout("vkitti", "Marigold's tree (rgb/Scene01/... and depth/Scene01/...)",
           r"(.*/)?rgb/(Scene.+)" + CAMERA,
           (r"\1depth/\2/frames/depth/\3/depth_\4.png",), **VKITTI),
    Layout("vkitti", "both archives in one place (Scene01/clone/frames/rgb/Camera_0/rgb_00000.jpg "
           "and Scene01/clone/frames/depth/Camera_0/depth_00000.png)",
           r"(.+)" + CAMERA, (r"\1/frames/depth/\2/depth_\3.png",), **VKITTI),
    Layout("nano", "the small world (rgb_00000.png with depth_00000.png; python nano/scenes.py)",
           r"(.*/)?rgb_([^/]+)\.png", (r"\1depth_\2.png",), mm, near=1e-3, far=65.0),
    Layout("pairs", "your own pictures and maps (image/x.jpg with depth/x.png, .npy or .tif, and "
           "pairs.json, which says the unit)",
           r"(.*/)?image/(.+)" + SUFFIXES,
           tuple(rf"\1depth/\2.{kind}" for kind in ("png", "npy", "tif", "tiff"))),
    Layout("photos", "pictures (" + " ".join(IMAGE_SUFFIXES) + "), in sub-folders or .tar shards "
           "if you like", ".+" + SUFFIXES),
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
    depth: str | None


class Sample(NamedTuple):
    """One frame in pixels, as the networks take it."""
    rgb: torch.Tensor               # [3, H, W] in [-1, 1]
    label: torch.Tensor | None      # [3, H, W] in [-1, 1]; None: a real picture, the teacher's turn
    mask: torch.Tensor | None       # [1, H, W] bool, True where the depth is valid
    name: str                       # "set/file"


def cover(rgb, size, share=1.0, place=(0.5, 0.5)):
    """Scale a picture, smaller ones up, until it just covers (H, W), antialiased, and cut the
    centre out; or a window of a share of its sides, at a place from (0, 0), top left, to (1, 1)."""
    (H0, W0), (H, W) = rgb.shape[:2], size
    scale = share * min(H0 / H, W0 / W)     # source pixels per result pixel
    top, left = (int(p * rest) for p, rest in          # whole: scale 1 stays exact
                 zip(place, (H0 - H * scale, W0 - W * scale)))
    box = (left, top, min(left + W * scale, W0), min(top + H * scale, H0))
    return np.asarray(Image.fromarray(rgb).resize((W, H), Image.BILINEAR, box=box))


def nearest(array, size):
    """[H, W] -> size by picking pixels: depths on two sides of an edge must not be averaged."""
    rows, cols = (((np.arange(n) + 0.5) * N / n).astype(int) for n, N in zip(size, array.shape))
    return array[rows[:, None], cols]


def read_list(path, names, rows):
    """List file in Marigold's form, `rgb [depth [more]]` per line -> [Frame].

    A line may be one name, blanks and all. Leading folders of the list that the root has not, such
    as its own name, are dropped. Not read: lines that begin with #, and those whose depth is None.
    """
    def locate(name):
        parts = name.removeprefix("./").split("/")
        tails = ("/".join(parts[k:]) for k in range(len(parts)))
        return next((tail for tail in tails if tail in names), "/".join(parts))

    def in_other_words(line, name):
        """The root's names of a picture with blanks, or that the list names as another release."""
        if len(locate(line).split()) == len(line.split()):      # all of it, no last name of several
            yield locate(line)
        for row in rows:
            if row.listed and (match := re.fullmatch(row.listed[0], name)):
                yield locate(match.expand(row.listed[1]))

    frames = []
    for line in Path(path).read_text("utf-8-sig", errors="replace").splitlines():
        line, fields = line.strip(), line.split()
        if not fields or line[0] == "#" or fields[1:2] == ["None"]:
            continue
        rgb, depth = locate(fields[0]), locate(fields[1]) if fields[1:] else None
        if rgb not in names:
            others = (other for other in in_other_words(line, fields[0]) if other in names)
            rgb, depth = next(((other, None) for other in others), (rgb, depth))
        frames.append(Frame(rgb, depth))
    return frames


def own_layout(row, store, source):
    """The row of your own pairs, with the unit and the range that pairs.json states."""
    wanted = (f"{source}: your own maps need a file pairs.json beside image/ and depth/ (or beside "
              'the list) that says what their values are: {"kind": "depth", "unit": 0.001, "near": '
              '0.1, "far": 80}, where depth in metres = value x unit, or, of the kind "disparity", '
              "1 / (value x unit)")
    if "pairs.json" not in store:
        raise UserError(wanted)
    try:
        told = json.loads(store.read("pairs.json"))
        kind, unit, near, far = (told[k] for k in ("kind", "unit", "near", "far"))
        good = kind in ("depth", "disparity") and unit > 0 and 0 <= near < far
    except (ValueError, KeyError, TypeError, BadFrame):
        good = False
    if not good:
        raise UserError(f"{wanted}; this one does not")
    return row._replace(load=partial(own_metres, kind=kind, unit=unit), near=near, far=far)


def own_metres(store, name, kind, unit):
    values = own_map(store.read(name), name) * np.float32(unit)
    with np.errstate(divide="ignore"):              # 0 becomes inf, which is never valid
        return values if kind == "depth" else 1 / values


class FrameSet(Dataset):
    """One data set: the frames of a root (folder or .tar), all of them or those of a list file.

    name      a name in `rows`
    space     of the label: "disparity" or "depth"
    size      (H, W) to feed; default: the row's, else that of the first readable frame
    cap       use the first so many frames only
    flag      that named the set, for the sentences
    rows      the table that knows the layouts: SETS, or one with test sets
    views     of a picture without depth: the centre, and as many windows less one at random
    .frames   [Frame]     .missing   ["set/file: reason"], frames that lack a file
    .names    of their pictures      .wanted    of all pictures, also those that lack a file
    """

    def __init__(self, name, path, list_file=None, space="disparity", size=None, cap=None,
                 flag="--data", rows=SETS, views=1):
        self.name, self.path, self.space, self.flag = name, Path(path), space, flag
        self.views = views
        rows = [row for row in rows if row.name == name]
        self.store = open_root(name, self.path, not rows[0].depth, flag)
        names = self.store.names()
        listed = read_list(list_file, set(names), rows) if list_file else None
        candidates = names if listed is None else [frame.rgb for frame in listed]
        there = [rgb for rgb in candidates if rgb in self.store] or candidates
        fits = [row for row in rows if any(re.fullmatch(row.rgb, rgb) for rgb in there)]
        if name == "pairs" and listed:
            fits = rows             # a list of one's own may name any files
        if not fits:
            raise self.misfit(rows, list_file or "the root", candidates)
        self.layout = own_layout(fits[0], self.store, self.source) if name == "pairs" else fits[0]
        found = listed or [Frame(n, None) for n in names if re.fullmatch(fits[0].rgb, n)]
        frames = list(dict.fromkeys(map(self.with_partner, found)))[:cap]   # each counts once
        absent = {frame: self.lacks(frame) for frame in frames}
        self.wanted = [frame.rgb for frame in frames]
        self.frames = [frame for frame in frames if not absent[frame]]
        self.missing = [f"{name}/{f.rgb}: no {absent[f]}" for f in frames if absent[f]]
        self.missing += [f"{name}/{line}" for line in self.store.cut]
        if not self.frames:
            raise self.misfit(rows, f"the root ({self.missing[0]})", names)
        self.keep = size is None and self.layout.size is None
        first = self.probe()        # now: a missing h5py must not wait for a worker
        self.size = size or self.layout.size or first

    def misfit(self, rows, where, found):
        expected = ", or ".join(row.what for row in rows)
        more = f" and {len(found) - 1} more" if found[1:] else ""
        more += "".join(f"; {line}" for line in self.store.cut[:1])
        return UserError(f"{self.source}: expected {expected}; "
                         f"found in {where}: {found[0] if found else 'no files'}{more}")

    def with_partner(self, frame):
        """A picture and its depth: the list's, or the one that the picture's name leads to."""
        match = re.fullmatch(self.layout.rgb, frame.rgb)
        if frame.depth and self.layout.depth or not match:
            return frame
        names = [match.expand(name) for name in self.layout.depth]
        there = [name for name in names if name in self.store]
        return Frame(frame.rgb, (there or names or [None])[0])

    def lacks(self, frame):
        """What of a frame is not there, or None; its name, when it is not as the layout's."""
        if frame.rgb not in self.store:
            return frame.rgb
        if self.name != "pairs" and not re.fullmatch(self.layout.rgb, frame.rgb):
            return f"picture named like {self.layout.what}"
        if self.layout.depth and not (frame.depth and frame.depth in self.store):
            return frame.depth or "depth map for it in the list"
        return None

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

    def stamp(self, i):
        """Names, sizes and times of a frame's files: other files are another frame."""
        names = [name for name in self.frames[i] if name]
        if self.layout.more:
            names += [name for name in self.layout.more(self.frames[i].depth) if name in self.store]
        return [[name, *self.store.stamp(name)] for name in names]

    def read(self, i):
        """-> rgb uint8 [H, W, 3], depth float32 [H, W] metres, valid [H, W] bool (or None, None).

        At the stored size, after the layout's crop. NaN and inf become 0, never valid; with the
        layout's `sky`, what is farther than far becomes far.
        """
        frame, row = self.frames[i], self.layout
        rgb = open_image(self.store.read(frame.rgb), upright=frame.depth is None)
        if frame.depth is None:
            return rgb, None, None
        depth = row.load(self.store, frame.depth).astype(np.float32)
        if rgb.shape[:2] != depth.shape:
            raise BadFrame("picture of {}x{} and depth of {}x{} pixels".format(
                *rgb.shape[:2], *depth.shape))
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

    def sample(self, i, flip, view=0):
        """-> Sample; `flip` mirrors left and right; view > 0: a window of three fifths of a
        picture's sides or more, drawn from the picture's name and the view's number."""
        rgb, depth, valid = self.read(i)
        label = mask = None
        if depth is not None:
            self.check_size(*depth.shape)
            valid = nearest(valid, self.size)
            label = normalize(nearest(depth, self.size), valid, self.space)
            mask = torch.from_numpy(valid)[None]
        window = {}
        if view:
            rng = np.random.default_rng((zlib.crc32(self.frames[i].rgb.encode()), view))
            window = {"share": rng.uniform(0.6, 1), "place": rng.random(2)}
        rgb = cover(rgb, self.size, **window).astype(np.float32)
        rgb = torch.from_numpy(rgb).permute(2, 0, 1)
        maps = [rgb / 127.5 - 1, label, mask]
        maps = [m.flip(-1) if flip and m is not None else m for m in maps]
        return Sample(*maps, f"{self.name}/{self.frames[i].rgb}")

    def check_size(self, H0, W0):
        """Frames with depth are never stretched or enlarged; pictures alone are cut to fit."""
        H, W = self.size
        fits = (H0, W0) == (H, W) if self.keep else H0 >= H and H0 * W == W0 * H
        if not fits:
            raise BadFrame(f"{H0}x{W0} pixels, the first frame has {H}x{W}" if self.keep else
                           f"{H0}x{W0} pixels cannot be scaled down to {H}x{W} without stretching")

    def or_stop(self, read, i, *more):
        """read(i, *more), e.g. of self.sample, where no other frame can take its place."""
        try:
            return read(i, *more)
        except BadFrame as error:
            raise UserError(f"{self.path / self.frames[i].rgb}: {error}") from None


# ------------------------------------------------------------------------------------ the mixture

class MicroBatch(NamedTuple):
    synthetic: list                 # of what `load` gives: Samples, or latents
    real: list                      # as many; empty without a real set
    names: list                     # "set/file": the synthetic ones, then the real ones
    bad: list                       # "set/file: reason" met on the way and replaced


def set_order(weights):
    """Turns in proportion to the weights -> one period of set numbers, e.g. 9 : 1 -> ten.

    After any n turns set k has had n weight_k / sum, give or take less than one: a set is ready
    while it has had no more than its share, and of those that are the earliest deadline goes first.
    """
    total, had, order = sum(weights), [0] * len(weights), []
    for n in range(total):
        ready = [k for k, w in enumerate(weights) if had[k] * total < w * (n + 1)]
        order.append(min(ready, key=lambda k: (had[k] + 1) / weights[k]))
        had[order[-1]] += 1
    return order


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

    weights  integers, of the synthetic sets      flip  mirror half of the samples
    load     (frames, i, flip, view) -> what a frame becomes: its Sample, or its latents from a cache
    """

    def __init__(self, synthetic, weights, real, micro, seed, flip=True, load=FrameSet.sample):
        self.synthetic, self.real, self.micro, self.seed = synthetic, real, micro, seed
        self.flip, self.load = flip, load
        self.order = set_order(weights)

    def __getitem__(self, m):
        period, n = divmod(m, len(self.order))
        k = self.order[n]
        turn = period * self.order.count(k) + self.order[:n].count(k)  # batches of set k before m
        names, bad = [], []
        synthetic = [self.pick(self.synthetic[k], turn * self.micro + j, names, bad)
                     for j in range(self.micro)]
        real = [self.pick(self.real, m * self.micro + j, names, bad)
                for j in range(self.micro)] if self.real else []
        return MicroBatch(synthetic, real, names, bad)

    def pick(self, frames, position, names, bad):
        """The position-th frame of a set: every frame once per epoch, in a new order each time.
        Adds its name to `names`, and those that could not be used before it to `bad`."""
        key = zlib.crc32(frames.name.encode())
        epoch, place = divmod(position, len(frames))
        rng = np.random.default_rng((self.seed, key, 1, position))
        flip = bool(rng.random() < 0.5) and self.flip
        spare = rng.integers(len(frames), size=TRIES)           # for a bad frame
        view = int(rng.integers(frames.views))
        for i in (shuffled(self.seed, key, epoch, len(frames))[place], *spare):
            name = f"{frames.name}/{frames.frames[i].rgb}"
            try:
                item = self.load(frames, int(i), flip, view)
                names.append(name)
                return item
            except BadFrame as error:
                bad.append(f"{name}: {error}")
        raise UserError(f"{frames.source}: {TRIES + 1} unusable frames in a "
                        f"row, the last is {bad[-1]}; check the files")


def check_bad(bad, total, max_bad):
    """Stops when more than the share `max_bad` of all `total` frames of the sets is bad."""
    if len(bad) > max_bad * total:
        raise UserError(f"{len(bad)} of {total} frames are bad, more than --max_bad {max_bad:g}: "
                        "repair or remove them, or raise it:\n  " + "\n  ".join(bad))


# ----------------------------------------------------------------- shared by all command lines

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
        listed = name == "pairs" and path.is_file() and path.suffix.lower() != ".tar"
        found[name] = (path.parent, path) if listed else (path, None)
    for word in lists:
        name, path = split_word("--list", word, list(found) or known)
        if name not in found or path.is_dir():
            raise UserError(f"--list {word}: expected a list file for a set that --data names")
        found[name] = found[name][0], path
    return found


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """--help with each flag's default; of None, False and [] there is nothing to say."""

    def _get_help_string(self, action):
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)


def read_json(file):
    """The object, a dict, in a JSON file."""
    try:
        content = json.loads(Path(file).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); fetch it again") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged ({explain(error)}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged (no JSON object); fetch it again")
    return content


def read_lines(file):
    """-> [dict] of a file of JSON lines, of which one may be cut short by a kill or a full disk."""
    found = []
    for line in file.read_text("utf-8", errors="replace").split("\n") if file.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # what it held is computed again
    return [line for line in found if isinstance(line, dict)]


def add_line(file, line):
    """In one write, so that a kill leaves all of it, or a part that read_lines drops."""
    with open(file, "a+b") as out:
        cut = out.tell() and not (out.seek(-1, os.SEEK_END), out.read(1))[1] == b"\n"
        out.write((b"\n" if cut else b"") + json.dumps(line).encode() + b"\n")


UMASK = os.umask(0)
os.umask(UMASK)                                     # the only way to read it sets it


def open_to_others(file):
    """safetensors writes files that their owner alone may read: give them the usual mode."""
    os.chmod(file, 0o666 & ~UMASK)


@contextmanager
def replacing(file):
    """Yields a temporary path beside `file` and renames it into place: whole or not at all."""
    file = Path(file)
    part = file.with_name(f".{os.getpid()}-{zlib.crc32(os.fsencode(file.name)):08x}.part")
    try:
        yield part
        open_to_others(part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def command(run):
    """Runs a script's main -> exit status: 2 and one sentence for what the user can put right, 130
    when interrupted."""
    for stream in (sys.stdout, sys.stderr):         # a path in another script must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or explain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; what was saved is complete, and the same command goes on from there",
              file=sys.stderr)
        return 130
