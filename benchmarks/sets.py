"""The test sets of the paper's tables as they lie on disk (Sec. 4.2), and maps of other programs.

Depth sets: Marigold's prepared archives, or what they unpack to; boundary sets and DA-2K: as their
authors publish them. A set is a row of TEST_SETS, which data.FrameSet reads, and its decoder;
DA-2K, which has pairs of points and no depth, is a PairSet.

    frames = FrameSet("nyu", "nyu_labeled_extracted.tar", rows=TEST_SETS)
    rgb, depth, valid = frames.read(0)
"""
import functools
import hashlib
import io
import json
import re
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from data import (IMAGE_SUFFIXES, BadFrame, Layout, UserError, hdf5, kitti_crop, load, mm,
                  npy, open_image, open_root, png16, walk)

# ------------------------------------------- decoders: (store, name of the depth file) -> metres


def kitti_png(store, name):
    return png16(store.read(name)) / 256            # metres; 0 where no laser beam ended


def eth3d_raw(store, name):
    """ETH3D: a headerless array of 4032 x 6048 little-endian float32, inf where nothing was hit."""
    data = store.read(name)
    if len(data) != 4032 * 6048 * 4:
        raise BadFrame(f"depth has {len(data)} bytes, not 4032 x 6048 x 4")
    return np.frombuffer(data, "<f4").reshape(4032, 6048)


def diode_npy(store, name):
    """DIODE: float32 metres, valid where the mask file says so and nowhere else."""
    depth = npy(store.read(name), "depth")
    mask = npy(store.read(diode_mask(name)[0]), "depth mask").astype(bool)
    if depth.shape != mask.shape:
        raise BadFrame(f"depth {depth.shape} and depth mask {mask.shape} differ in size")
    return np.where(mask, depth, 0).astype(np.float32)


def diode_mask(name):
    return [name.removesuffix(".npy") + "_mask.npy"]


def sintel_dpt(store, name):
    """Sintel .dpt: float32 202021.25 (the bytes PIEH), int32 width, height, float32 rows; metres.
    The optional PNG is not 0 where a pixel is invalid."""
    data = store.read(name)
    if data[:4] != b"PIEH" or len(data) < 12:
        raise BadFrame("depth is not a .dpt file (no tag PIEH)")
    W, H = np.frombuffer(data, "<i4", 2, 4)
    if len(data) != 12 + 4 * W * H:
        raise BadFrame(f"depth has {len(data)} bytes, not those of {H}x{W} pixels")
    depth = np.frombuffer(data, "<f4", offset=12).reshape(H, W)
    invalid, = sintel_mask(name)
    if invalid not in store:
        return depth
    return np.where(grey8(store.read(invalid), depth) > 0, np.nan, depth)


def sintel_mask(name):
    return [re.sub(r"depth/([^/]+/[^/]+)\.dpt$", r"invalid/\1.png", name)]


def spring_dsp5(store, name):
    """Spring: disparity of twice the picture's resolution, in pixels of the picture -> metres.

    z = fx 0.065 m / disparity; a disparity of 0 is sky, infinitely far; NaN stays. intrinsics.txt
    has a row `fx fy cx cy` for each frame, and frames count from 1: disp1_left_0001.dsp5.
    """
    frame = PurePosixPath(name).stem.rpartition("_")[2]
    rows = store.read(spring_camera(name)[0]).decode(errors="replace").splitlines()
    try:
        fx = float(rows[int(frame) - 1].split()[0])
    except (IndexError, ValueError) as error:
        raise BadFrame(f"intrinsics.txt has no focal length for frame {frame}") from error
    disparity = hdf5(store.read(name), "disparity")[::2, ::2]
    with np.errstate(divide="ignore"):
        return np.where(disparity <= 0, np.inf, fx * 0.065 / disparity)


def spring_camera(name):
    return [str(PurePosixPath(name).parents[1] / "cam_data/intrinsics.txt")]


def ibims_png(store, name):
    """iBims-1: 16 bits over 50 m, 0 and 65535 are no data. Despite their names, mask_invalid is
    not 0 where a pixel is valid, and mask_transp where it is not transparent."""
    raw = png16(store.read(name))
    good = (raw > 0) & (raw < 65535)
    for mask in ibims_masks(name):
        good &= grey8(store.read(mask), raw) > 0
    return np.where(good, raw * (50 / 65535), 0)


def ibims_masks(name):
    return [re.sub(r"depth/([^/]+)$", rf"{folder}/\1", name)
            for folder in ("mask_invalid", "mask_transp")]


def grey8(data, like=None):
    """Mask or matte, 8 bits of any mode -> uint8 [H, W], of the size of `like`"""
    mask = np.asarray(load(data, "mask").convert("L"))
    if like is not None and mask.shape != like.shape:
        raise BadFrame(f"mask {mask.shape} and depth {like.shape} differ in size")
    return mask


def matte(store, name):
    """Alpha matte or object mask -> float32 [H, W] in [0, 1]"""
    return grey8(store.read(name)).astype(np.float32) / 255


# ---------------------------------------------------------------- the table of test sets

MM_10 = dict(load=mm, near=1e-3, far=10.0)
MATTE = dict(near=-1.0, far=2.0)                # in [0, 1]: all of it is valid
NO_TEST = r"(?!(?:.*/)?test/)"                  # pictures whose depth is kept secret
SPLIT = r"(\d{4}_\d\d_\d\d)/(\2_drive_\d+_sync)"       # KITTI: day and drive

TEST_SETS = (
    Layout("nyu", "Marigold's NYUv2 (test/kitchen_0004/rgb_0001.png with depth_0001.png)",
           r"(.*/)?(test/[^/]+)/rgb_(\d+)\.png", (r"\1\2/depth_\3.png",), **MM_10,
           window=(45, 471, 41, 601, 480, 640), count=654),
    Layout("nyu", "the same without the folder test/",
           r"(.*/)?rgb_(\d+)\.png", (r"\1depth_\2.png",), **MM_10,
           window=(45, 471, 41, 601, 480, 640), count=654),
    Layout("kitti", "Marigold's KITTI Eigen split (2011_09_26/2011_09_26_drive_0002_sync/image_02/"
           "data/0000000069.png with 2011_09_26_drive_0002_sync/proj_depth/groundtruth/...)",
           r"(.*/)?" + SPLIT + r"/image_02/data/(\d+)\.png",
           (r"\1\3/proj_depth/groundtruth/image_02/\4.png",), kitti_png, near=1e-5, far=80.0,
           crop=kitti_crop, window=(117, 321, 43, 1172, 352, 1216), count=652),
    Layout("eth3d", "Marigold's ETH3D (rgb/office/images/dslr_images/DSC_0219.JPG with depth/"
           "office_dslr_depth/office/ground_truth_depth/dslr_images/DSC_0219.JPG)",
           r"(.*/)?rgb/([^/]+)/images/dslr_images/([^/]+\.JPG)",
           (r"\1depth/\2_dslr_depth/\2/ground_truth_depth/dslr_images/\3",), eth3d_raw, near=1e-5,
           count=454),
    Layout("scannet", "Marigold's ScanNet (scene0406_02/color/000300.jpg with depth/000300.png)",
           r"(.*/)?(scene\d+_\d+)/color/(\d+)\.jpg", (r"\1\2/depth/\3.png",), **MM_10, count=800),
    Layout("diode", "DIODE's validation set (indoors/scene_00021/scan_00189/x.png with "
           "x_depth.npy and x_depth_mask.npy)",
           r"(.*/)?((?:indoors|outdoor)/scene_\d+/scan_\d+/[^/]+)\.png", (r"\1\2_depth.npy",),
           diode_npy, more=diode_mask, count=771),
    Layout("da2k", "DA-2K (annotations.json with images/indoor/x.jpg)",
           r"(?i)(.*/)?images/.+(" + "|".join(map(re.escape, IMAGE_SUFFIXES)) + ")"),
    *(Layout(name, f"Sintel's training set with depth ({folder}/alley_1/frame_0001.png with "
             "depth/alley_1/frame_0001.dpt, below training/)",
             NO_TEST + rf"(.*/)?{folder}/([^/]+)/(frame_\d+)\.png", (r"\1depth/\2/\3.dpt",),
             sintel_dpt, near=0.01, far=80.0, sky=True, more=sintel_mask, count=1064)
      for name, folder in (("sintel", "final"), ("sintel-clean", "clean"))),
    Layout("spring", "Spring's training set (0001/frame_left/frame_left_0001.png with disp1_left/"
           "disp1_left_0001.dsp5 and cam_data/intrinsics.txt, below train/)",
           NO_TEST + r"(.*/)?(\d{4})/frame_left/frame_left_(\d+)\.png",
           (r"\1\2/disp1_left/disp1_left_\3.dsp5",), spring_dsp5, near=0.01, far=200.0, sky=True,
           more=spring_camera, count=5000),
    Layout("ibims", "iBims-1, ibims1_core_raw (rgb/x.png with depth/, mask_invalid/, mask_transp/)",
           r"(.*/)?rgb/([^/]+)\.png", (r"\1depth/\2.png",), ibims_png, near=0.1, far=10.0,
           more=ibims_masks, count=100),
    Layout("am2k", "AM-2k (validation/original/m_x.jpg with validation/mask/m_x.png)",
           r"(.*/)?validation/original/([^/]+)\.jpg", (r"\1validation/mask/\2.png",), matte,
           **MATTE, count=200),
    *(Layout(name, f"P3M-10k (validation/{split}/{folder}/x.jpg with mask/x.png)",
             rf"(.*/)?{split}/{folder}/([^/]+)\.jpg", (rf"\1{split}/mask/\2.png",),
             matte, **MATTE, count=500)
      for name, split, folder in (("p3m", "P3M-500-NP", "original_image"),
                                  ("p3m-p", "P3M-500-P", "blurred_image"))),
    Layout("dis5k", "DIS5K (DIS-VD/im/x.jpg with DIS-VD/gt/x.png; the 200 of Depth Pro by --list "
           "dis5k=dis5k_sample_list.txt)",
           r"(.*/)?(DIS-\w+)/im/([^/]+)\.jpg", (r"\1\2/gt/\3.png",), matte, **MATTE, count=200),
)


# ---------------------------------------------------------------- pairs of points


class PairSet:
    """DA-2K: pictures below a root and annotations.json, {picture: [{"point1": [row, column],
    "point2": [row, column], "closer_point": "point1"}, ...]}. Of a FrameSet it has what evaluate.py
    needs, and .pairs: {picture: int [n, 4]}, the nearer point first."""

    def __init__(self, path, cap=None):
        self.name, self.path = "da2k", Path(path)
        self.store = open_root("da2k", self.path)
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
        self.names = self.wanted = list(self.pairs)
        self.missing = []                           # an absent picture is found when it is read
        row = next(row for row in TEST_SETS if row.name == "da2k")
        self.layout = row._replace(count=len(listed))

    def read(self, i):
        """-> rgb uint8 [H, W, 3], pairs int [n, 4], None: no validity"""
        rgb, pairs = open_image(self.store.read(self.names[i])), self.pairs[self.names[i]]
        if (pairs < 0).any() or (pairs.reshape(-1, 2) >= rgb.shape[:2]).any():
            raise BadFrame("a point lies outside the picture")
        return rgb, pairs, None


def nearer_first(pair):
    near = pair["closer_point"]
    return [*pair[near], *pair[{"point1": "point2", "point2": "point1"}[near]]]


def scene_of(image):
    """DA-2K's images/SCENE/x.jpg -> SCENE"""
    return image.rpartition("images/")[2].rpartition("/")[0] or "images"


# ---------------------------------------------------------------- versions of files


def version_of(frames, i):
    """A digest of names, sizes and times of the files that an image's score depends on: where they
    changed, or a list names others, it is scored again."""
    if frames.name == "da2k":
        name = frames.names[i]
        stamps = [name in frames.store and frames.store.stamp(name), frames.pairs[name].tolist()]
    else:
        stamps = frames.stamp(i)
    return hashlib.sha1(repr(stamps).encode()).hexdigest()[:12]


# ---------------------------------------------------------------- maps of other programs

MAP_SUFFIXES = (".npy", ".npz", ".tif", ".tiff", ".png")  # where there are several, the first


@functools.lru_cache(maxsize=4)
def find_maps(folder, frames):
    """-> the file of each image's map, or None. Below folder/SET/ or folder/, in the sub-folders of
    the pictures: NAME, NAME_depth or NAME_jpg_depth (infer.py), pred_NAME or, of rgb_ID, pred_ID
    (Marigold). Never a file of the set itself, never one for two pictures."""
    there = set(walk(folder))
    own = {(frames.path / name).resolve() for frame in getattr(frames, "frames", ())
           for name in frame if name}
    files, owners = [], {}
    for image in frames.names:
        path = Path(image)
        stems = [path.stem, f"{path.stem}_depth", f"{path.stem}_{path.suffix[1:]}_depth",
                 f"pred_{path.stem}"]
        if path.stem.startswith("rgb_"):
            stems.append(f"pred_{path.stem[4:]}")
        places = ((root / path.parent / (stem + suffix)).as_posix() for suffix in MAP_SUFFIXES
                  for root in (Path(frames.name), Path()) for stem in stems)
        file = next((folder / place for place in places
                     if place in there and (folder / place).resolve() not in own), None)
        if file in owners and file is not None:
            raise UserError(f"--predictions {folder}: {file} would be the map of two pictures, "
                            f"{owners[file]} and {image}; give maps the names of their pictures")
        owners[file] = image
        files.append(file)
    return files


def read_map(file):
    """float32 [H, W]. Of .npz the array "depth" (Depth Pro), or the only one; a .png must have 16
    bits, which become 0..1, for it does not say its unit; a .tif must hold floating point."""
    try:
        content = file.read_bytes()
        if file.suffix == ".png":
            return png16(content) / 65535
        if file.suffix in (".tif", ".tiff"):
            image = load(content, "map")
            if image.mode != "F":
                raise BadFrame(f"the map is a .tif of mode {image.mode}, not of floating point")
            return np.asarray(image)
        values = np.load(io.BytesIO(content))
        if hasattr(values, "files"):                # an archive
            if "depth" not in values and len(values.files) != 1:
                raise BadFrame(f"the map's .npz holds {', '.join(values.files) or 'nothing'}; it "
                               "should hold one array, or one of the name depth")
            values = values["depth" if "depth" in values else values.files[0]]
        return values.squeeze().astype(np.float32)
    except (ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile,
            zlib.error) as error:
        raise BadFrame(f"the map is no {file.suffix} file of numbers ({error})") from error


def map_of(frames, i, file, shape):
    """The map of a picture of this shape; one saved before the layout's crop is cut as it was."""
    values, layout = read_map(file), frames.layout
    if values.shape != shape and layout.crop:
        with Image.open(io.BytesIO(frames.store.read(frames.frames[i].rgb))) as stored:
            if values.shape == stored.size[::-1]:
                values = values[layout.crop(*values.shape)]
    if values.shape != shape:
        raise BadFrame("map of {} and picture of {}x{} pixels".format(
            "x".join(map(str, values.shape)), *shape))
    return values
