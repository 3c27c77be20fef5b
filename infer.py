"""From pictures to depth maps: one feed-forward pass each (Eq. 1), no noise, no steps, no ensemble.

    python infer.py photo.jpg holiday/ --out out                  # files, folders, several of each
    python infer.py photo.jpg --checkpoint runs/mine --ply --fov 70

Of photo.jpg it makes photo_depth.npy (float32 [H, W]), photo_depth.png (16 bits, value x 65535),
photo_color.png (to look at: near red, far blue), photo_depth.json (what the values mean) and, with
--ply, photo_cloud.ply. Sub-folders are mirrored. Values are relative, from 0 to 1: of a disparity
model larger is nearer, of a depth model larger is farther.

    model = FiffDepth.from_pretrained("nano/weights/fiffdepth")
    values = predict_image(model, "photo.jpg")                    # float32 [H, W] in [0, 1]
"""
import argparse
import io
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    # diffusers imports transformers for pipelines that are not used here, a fifth of the time this
    # command takes to start. It does without where there is none, so while it loads there is none.
    sys.modules["transformers"] = None
    # Threads that wait should sleep: on a machine with other work, spinning takes twice as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from data import (IMAGE_SUFFIXES, BadFrame, HelpFormatter, UserError, explain, open_image, to_rgb,
                  walk)
from model import FiffDepth, choose_device, choose_dtype, fetch

if __name__ == "__main__":
    del sys.modules["transformers"]  # a folder in the authors' layout needs its text encoder

HERE = Path(__file__).resolve().parent
ENDINGS = ("_depth.json", "_depth.npy", "_depth.png", "_color.png", "_cloud.ply")
SOFTWARE = "FiffDepth"  # stands in each PNG, so that a later run does not take it for a picture
MEANING = {
    "disparity": "relative disparity in [0, 1], larger = nearer (1/depth, scale and shift unknown)",
    "depth": "relative depth in [0, 1], larger = farther (depth, scale and shift unknown)",
}
# What may stop one picture and not the rest; for torch, want of memory is a RuntimeError.
FAILURES = (BadFrame, OSError, MemoryError, RuntimeError)
COLORS = np.array([  # far to near, evenly spaced
    (58, 45, 115), (55, 90, 165), (60, 145, 180), (115, 195, 155), (190, 225, 150), (245, 240, 170),
    (252, 215, 120), (250, 165, 75), (240, 105, 50), (210, 50, 50), (150, 15, 45)])


# ---------------------------------------------------------------- pictures to values


def network_size(height, width, longer, enlarge=False):
    """(H, W) the network sees: never a side of 0, and larger than the picture only to `enlarge`."""
    scale = longer / max(height, width)
    scale = scale if enlarge else min(1, scale)
    return max(1, round(height * scale)), max(1, round(width * scale))


@torch.inference_mode()
def predict_batch(model, rgb, size=None, enlarge=False):
    """Pictures of one size, uint8 [B, H, W, 3] -> values, float32 [B, H, W] in [0, 1].

    size     pixels of the longer side in the network; default: that of the training
    enlarge  scale smaller pictures up to it (a benchmark's protocol); by default they keep theirs
    The scaling is done on the CPU, so that it is the same whatever the device.
    """
    full = rgb.shape[1:3]
    x = torch.tensor(rgb).permute(0, 3, 1, 2).float() / 127.5 - 1  # [B, 3, H, W] in [-1, 1]
    small = network_size(*full, size or model.info["size"], enlarge)
    if small != full:
        x = F.interpolate(x, small, mode="bilinear", antialias=True)
    y = model(x.to(model.prompt.device)).float().cpu()  # [B, 1, h, w] in [-1, 1]
    if not y.isfinite().all():
        raise BadFrame("the network's result is not finite; --dtype float32 has the widest range")
    if small != full:
        y = F.interpolate(y, full, mode="bilinear", antialias=True)
    return ((y[:, 0] + 1) / 2).clamp(0, 1).numpy()


def predict_image(model, image, size=None):
    """PIL image, path or uint8 [H, W, 3] -> float32 [H, W] in [0, 1], at the picture's own size."""
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(ImageOps.exif_transpose(image)))
    elif not isinstance(image, np.ndarray):
        image = open_image(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    return predict_batch(model, image[None], size)[0]


def predict_group(model, group, size):
    """[(picture, rgb)] of one size -> yields (picture, rgb, values or the reason for none).

    When a batch fails, for want of memory or for one bad result, each picture is tried alone."""
    if isinstance(group[0][1], str):  # it could not be read, and this is why
        yield group[0][0], None, group[0][1]
        return
    reason = None
    try:
        maps = predict_batch(model, np.stack([rgb for _, rgb in group]), size)
    except FAILURES as error:
        reason = explain(error)  # the text alone: the exception would keep the batch in memory
    if reason is None:
        yield from ((picture, rgb, values) for (picture, rgb), values in zip(group, maps))
    elif len(group) == 1:
        yield *group[0], reason
    else:
        for one in group:
            yield from predict_group(model, [one], size)


# ---------------------------------------------------------------- values to files


def colorize(values, target):
    """Values [H, W] -> uint8 [H, W, 3]: near red, far blue, whichever the target. The colours span
    the picture's own minimum to maximum: they show structure and do not compare two pictures."""
    near = values if target == "disparity" else 1 - values
    low, high = near.min(), near.max()
    place = (near - low) / (high - low) if high > low else np.full_like(near, 0.5)
    stops = np.linspace(0, 1, len(COLORS))
    channels = [np.interp(place, stops, COLORS[:, c]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def point_cloud(values, rgb, target, fov, near, far):
    """Values [H, W], colours uint8 [H, W, 3] -> the bytes of a binary PLY, one vertex per pixel.

    The camera stands at the origin and looks along +z, x to the right, y down.
    fov        degrees from the left edge to the right
    near, far  metres of z for the nearest and the farthest value there can be
    """
    H, W = values.shape
    near_share = values.astype(np.float64) if target == "disparity" else 1.0 - values
    if target == "disparity":
        z = 1 / (near_share / near + (1 - near_share) / far)  # linear in 1/z
    else:
        z = near_share * near + (1 - near_share) * far
    focal = W / 2 / np.tan(np.radians(fov) / 2)  # pixels
    x = (np.arange(W) + 0.5 - W / 2) / focal  # through the centres of the pixels
    y = (np.arange(H)[:, None] + 0.5 - H / 2) / focal
    vertices = np.empty((H, W), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    vertices["xyz"] = np.stack([x * z, y * z, z], -1)
    vertices["rgb"] = rgb
    header = ["ply", "format binary_little_endian 1.0",
              f"comment x right, y down, z forward; assumed: horizontal view {fov:g} degrees, "
              f"nearest {near:g} m, farthest {far:g} m", f"element vertex {H * W}",
              *(f"property float {name}" for name in "xyz"),
              *(f"property uchar {name}" for name in ("red", "green", "blue")), "end_header\n"]
    return "\n".join(header).encode() + vertices.tobytes()


def png(array, meaning):
    text, file = PngInfo(), io.BytesIO()
    text.add_text("Software", SOFTWARE)
    text.add_text("Description", meaning)
    Image.fromarray(array).save(file, "PNG", pnginfo=text, compress_level=3)  # fast, hardly larger
    return file.getvalue()


def result_files(values, picture, target, checkpoint):
    """{ending: bytes}, each of which carries what its values mean, or has it beside it."""
    meaning, array = MEANING[target], io.BytesIO()
    np.save(array, values)
    note = {"source": str(picture.path), "checkpoint": checkpoint, "target": target,
            "values": meaning, "png": "value x 65535",
            "color": "near red, far blue, over the picture's own range"}
    return {"_depth.json": (json.dumps(note, indent=1) + "\n").encode(),
            "_depth.npy": array.getvalue(),
            "_depth.png": png((values * 65535).round().astype(np.uint16), f"{meaning}; x 65535"),
            "_color.png": png(colorize(values, target), f"near red, far blue; {meaning}")}


def write(base, files):
    """{ending: bytes} -> files. All are complete beside their places before the first is renamed;
    the JSON, which claims the name for its picture, comes first."""
    base.parent.mkdir(parents=True, exist_ok=True)
    parts = {end: base.with_name(f".{base.name}{end}.{os.getpid()}.part") for end in files}
    try:
        for end, content in files.items():
            parts[end].write_bytes(content)
        for end, part in parts.items():
            os.replace(part, f"{base}{end}")
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


# ---------------------------------------------------------------- which pictures, under which names


class Picture(NamedTuple):
    path: Path  # absolute
    keep: int   # how many of its last parts name the result: 1, more below a folder argument


def is_result(file):
    """Did this program write it? Input and output folder may be one, or one inside the other."""
    if not file.name.endswith(("_depth.png", "_color.png")):
        return False
    try:
        with open(file, "rb") as png_file:
            return f"Software\0{SOFTWARE}".encode() in png_file.read(256)
    except OSError:  # reading it as a picture will give the reason
        return False


def find_pictures(arguments):
    """Files and folders -> [Picture], each once, and ["argument: reason"] for what has none."""
    found, problems = {}, []
    for argument in arguments:
        root = Path(os.path.abspath(os.path.expanduser(argument)))
        if os.path.isdir(root):
            names = [Path(n) for n in sorted(walk(root)) if n.lower().endswith(IMAGE_SUFFIXES)]
            new = [Picture(root / n, len(n.parts)) for n in names if not is_result(root / n)]
            reason = f"no pictures in this folder ({' '.join(IMAGE_SUFFIXES)})"
        else:
            new = [Picture(root, 1)] if os.path.exists(root) else []
            reason = "no such file or folder"
        if not new:
            problems.append(f"{argument}: {reason}")
        for picture in new:
            found.setdefault(picture.path, picture)
    return list(found.values()), problems


def taken(base, picture):
    """Who else's results are at `base`; None where there are none, or this picture's own."""
    note = Path(f"{base}_depth.json")
    if note.exists():
        try:
            source = json.loads(note.read_text())["source"]
        except (OSError, ValueError, KeyError, TypeError):  # a JSON of someone else's
            return "another program"
        return None if source == str(picture.path) else source
    return "another program" if any(os.path.exists(f"{base}{end}") for end in ENDINGS) else None


def result_name(out, picture, level=0):
    """Path below out, without ending; from level 1 on with the suffix, then with more folders."""
    folders = picture.path.parts[1:-1]  # part 0 is the root
    first = max(0, len(folders) - (picture.keep - 1) - max(0, level - 1))
    suffix = f"_{picture.path.suffix[1:]}" if level else ""
    return out.joinpath(*folders[first:], picture.path.stem + suffix)


def result_names(pictures, out):
    """{picture: path below out, without ending}, no two alike and none of another picture's.

    a.jpg becomes a. Where that is taken, by a picture of this run or by results of an earlier one,
    a.jpg and a.png become a_jpg and a_png; x/a.jpg and y/a.jpg become x/a_jpg and y/a_jpg.
    """
    levels = dict.fromkeys(pictures, 0)
    while True:
        groups = defaultdict(list)
        for p in pictures:
            groups[result_name(out, p, levels[p])].append(p)
        clashes = [p for base, group in groups.items() if len(group) > 1 or taken(base, group[0])
                   for p in group if levels[p] < len(p.path.parts)]  # beyond, save refuses
        if not clashes:
            return {p: base for base, group in groups.items() for p in group}
        for p in clashes:
            levels[p] += 1


# ---------------------------------------------------------------- the command


def read_groups(pictures, batch):
    """Yields [(picture, rgb)] of one size, at most `batch`, holding at most twice as many pictures;
    what cannot be read comes as [(picture, reason)]."""
    waiting = defaultdict(list)  # (H, W, 3) -> group
    for picture in pictures:
        try:
            rgb = open_image(picture.path)
        except FAILURES as error:
            yield [(picture, explain(error))]
            continue
        waiting[rgb.shape].append((picture, rgb))
        if len(waiting[rgb.shape]) == batch or sum(map(len, waiting.values())) == 2 * batch:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def check_flags(a):
    for flag, value in (("--size", a.size), ("--batch", a.batch)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    if not 0 < a.fov < 180:
        raise UserError(f"--fov {a.fov:g}: must lie between 0 and 180 degrees")
    if not 0 < a.near < a.far < float("inf"):
        raise UserError(f"--near {a.near:g} --far {a.far:g}: metres, with 0 < near < far")
    make_folder(a.out)


def make_folder(out):
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made a folder ({error.strerror})") from None


def load_model(a):
    """-> the model on its device, and "device, precision" for the last line."""
    device = choose_device(a.device)
    dtype = choose_dtype(a.dtype, device)
    model = FiffDepth.from_pretrained(a.checkpoint, vae=a.vae, dtype=dtype)
    if model.info.get("target") not in MEANING or not isinstance(model.info.get("size"), int):
        raise UserError(f"{a.checkpoint}: its fiffdepth.json must hold a target, disparity or "
                        "depth, and a size in pixels")
    if "steps" not in model.info and (fetch(a.checkpoint, "unet/config.json", "") / "scheduler/scheduler_config.json").exists():
        print(f"note: nothing in {a.checkpoint} says that train.py trained it for depth; from a "
              "bare generator expect noise", file=sys.stderr)
    torch.backends.cudnn.deterministic = True  # the same bits each time
    return model.to(device), f"{device}, {str(dtype).removeprefix('torch.')}"


def save(base, picture, rgb, values, target, a):
    """-> None, or the reason why nothing was saved."""
    try:
        other = taken(base, picture)  # again, now: another run may have come between
        if other:
            return f"{base} holds results of {other}: choose another --out"
        files = result_files(values, picture, target, str(a.checkpoint))
        if a.ply:
            files["_cloud.ply"] = point_cloud(values, rgb, target, a.fov, a.near, a.far)
        write(base, files)
    except FAILURES as error:
        return explain(error)


def run(a):
    """All pictures -> exit status: 0, or 1 when some failed."""
    check_flags(a)
    pictures, problems = find_pictures(a.images)
    if not pictures:
        raise UserError("; ".join(problems))
    model, where = load_model(a)
    target, names = model.info["target"], result_names(pictures, a.out)
    print(f"values: {MEANING[target]}")
    for problem in problems:
        print(f"failed: {problem}", file=sys.stderr)
    for picture, base in names.items():
        if base != result_name(a.out, picture):
            print(f"note: {picture.path} is saved as {base}: its name is taken", file=sys.stderr)
    began = time.time()
    # A bar for more than one picture; in a log file, which keeps every state, rarely a new one.
    bar = tqdm(total=len(pictures), unit="picture", disable=len(pictures) == 1, file=sys.stderr,
               mininterval=0.1 if sys.stderr.isatty() else 30)
    done = 0
    for group in read_groups(pictures, a.batch):
        for picture, rgb, values in predict_group(model, group, a.size):
            reason = values if isinstance(values, str) else None
            reason = reason or save(names[picture], picture, rgb, values, target, a)
            if reason:
                problems.append(f"{picture.path}: {reason}")
                bar.write(f"failed: {problems[-1]}", file=sys.stderr)
            done += not reason
            bar.update()
    bar.close()
    seconds = time.time() - began
    print(f"{done} saved in {a.out}, {len(problems)} failed; {seconds:.1f} s on {where}")
    return 1 if problems else 0


def flags():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE|FOLDER", default=[str(HERE / "examples")],
        help="pictures, and folders of them, with their sub-folders")
    add("--checkpoint", default=str(HERE / "nano/weights/fiffdepth"), metavar="DIR|HUB_ID",
        help="weights, ours or in the layout of the paper's authors")
    add("--vae", metavar="DIR|HUB_ID",
        help="another autoencoder of the same latent space; without it, the checkpoint's own")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="folder of the results")
    add("--size", type=int, metavar="PIXELS", help="longer side in the network, smaller pictures "
        "keep their own; without it, that of the training (Sec. 4.1)")
    add("--batch", type=int, default=4, metavar="PICTURES",
        help="pictures of one size computed together; memory grows with it")
    add("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"),
        help="precision of the network; auto is float16 on CUDA, else float32")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu), one of them, or cuda:1")
    add("--ply", action="store_true", help="also write a coloured point cloud (x right, y down, z "
        "forward; 15 bytes a pixel). The map is known up to a scale and a shift and the camera not "
        "at all: --fov, --near and --far are assumptions")
    add("--fov", type=float, default=60.0, metavar="DEGREES",
        help="angle of view from the left edge to the right, for --ply")
    add("--near", type=float, default=1.0, metavar="METRES", help="z of the nearest value (1 of a "
        "disparity map, 0 of a depth map), for --ply; --near and --far set scale and shift: 1/z "
        "(disparity) or z (depth) is linear in the value between them")
    add("--far", type=float, default=10.0, metavar="METRES",
        help="z of the farthest value, for --ply")
    return parser


def main(argv=None):
    try:
        return run(flags().parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: each file that was saved is complete", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
