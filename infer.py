"""From pictures to depth maps: one feed-forward pass each (Eq. 1), no noise, no steps, no ensemble.

    python infer.py photo.jpg holiday/ --out out                  # files, folders, several of each
    python infer.py photo.jpg --known 320,240=2.5 --known 80,400=1.1 --ply     # in metres, a cloud
    values = predict_image(FiffDepth.from_pretrained(folder), "photo.jpg")  # float32 [H, W]

Of photo.jpg it makes photo_depth.npy (float32 [H, W]), photo_depth.png (16 bits, value x 65535),
photo_color.png (to look at: near red, far blue) and photo_depth.json (what the values mean, how
they were made). Sub-folders are mirrored. Values are relative, from 0 to 1: of a disparity model
larger is nearer, of a depth model larger is farther.

The way of a picture in `run`: find_pictures -> open_image -> to_network -> forward -> to_picture
-> find_name -> write_set.
"""
import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple


@contextmanager
def fast_start():
    """For imports of this file as a command: what they need not load is hidden from them.

    diffusers imports transformers, for pipelines that are not used here, wherever it is installed;
    that is a fifth of the command's start. Where it is not installed, diffusers does without.
    """
    as_command = __name__ == "__main__"
    if as_command:
        sys.modules["transformers"] = None
        # Threads that wait should sleep: beside other work, spinning takes twice as long.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    yield
    if as_command:
        del sys.modules["transformers"]  # the authors' layout needs its text encoder


with fast_start():
    import numpy as np
    import torch
    import torch.nn.functional as F
    from filelock import FileLock
    from PIL import Image, ImageOps
    from PIL.PngImagePlugin import PngInfo
    from tqdm import tqdm

    from data import (BadFrame, HelpFormatter, UserError, command, explain, has_heif, open_image,
                      readable_suffixes, stamp, to_rgb, walk)
    from model import FiffDepth, choose_device, choose_dtype, fetch, name_of

HERE = Path(__file__).resolve().parent
ENDINGS = ("_depth.json", "_depth.npy", "_depth.tiff", "_depth.png", "_color.png", "_metres.npy",
           "_metres.tiff", "_cloud.ply")
SOFTWARE = "FiffDepth"  # stands in each picture, so that a later run does not take it for its input
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
    """(height, width) in pixels of what the network sees: no side is 0, and it is larger than the
    picture only to `enlarge`."""
    scale = longer / max(height, width)
    scale = scale if enlarge else min(1, scale)
    return max(1, round(height * scale)), max(1, round(width * scale))


def to_network(rgb, size):
    """Picture, uint8 [H, W, 3] -> float32 [*size, 3] in [-1, 1], scaled.

    One channel after the other: the whole picture in floats would take four times its memory."""
    if size[1] == 1 < size[0]:  # torch 2.13 fills a single column of one channel with its first row
        return to_network(rgb.swapaxes(0, 1), size[::-1]).transpose(0, 1)
    x = torch.empty(*size, 3)
    for c in range(3):
        channel = torch.from_numpy(rgb[..., c].astype(np.float32)).div_(127.5).sub_(1)
        if channel.shape != size:
            channel = F.interpolate(channel[None, None], size, mode="bilinear",
                                    antialias=True)[0, 0]
        x[..., c] = channel
    return x


@torch.inference_mode()
def forward(model, x):
    """[B, *size, 3] in [-1, 1] -> the network's maps [B, *size] in [-1, 1], on the CPU."""
    y = model(x.permute(0, 3, 1, 2).to(model.prompt.device)).float().cpu()[:, 0]
    if not y.isfinite().all():
        raise BadFrame("the network's result is not finite; --dtype float32 has the widest range")
    return y


def to_picture(y, full):
    """A map of the network in [-1, 1] -> values, float32 [H, W] in [0, 1]; full = (H, W)"""
    if y.shape != full:
        y = F.interpolate(y[None, None], full, mode="bilinear", antialias=True)[0, 0]
    return y.add(1).div_(2).clamp_(0, 1).numpy()


def predict_batch(model, rgb, size=None, enlarge=False):
    """Pictures of one size, uint8 [B, H, W, 3] -> values, float32 [B, H, W] in [0, 1].

    size     pixels of the longer side in the network; default: that of the training
    enlarge  scale smaller pictures up to it (a benchmark's protocol); by default they keep theirs
    The scaling is done on the CPU, so that it is the same whatever the device.
    """
    small = network_size(*rgb.shape[1:3], size or model.info["size"], enlarge)
    maps = forward(model, torch.stack([to_network(one, small) for one in rgb]))
    return np.stack([to_picture(y, rgb.shape[1:3]) for y in maps])


def predict_image(model, image, size=None):
    """PIL image, path or uint8 [H, W, 3] -> float32 [H, W] in [0, 1], at the picture's own size."""
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(ImageOps.exif_transpose(image)))
    elif not isinstance(image, np.ndarray):
        image = open_image(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    return predict_batch(model, image[None], size)[0]


def identity(where, *nets):
    """A short digest of some numbers of every weight: another training gives another."""
    digest = hashlib.sha1(os.fsencode(where))  # also of a path that is not in UTF-8
    for net in nets:
        for name, value in net.state_dict().items():
            some = value.detach().reshape(-1)[::max(1, value.numel() // 64)].float().cpu().numpy()
            digest.update(name.encode() + some.tobytes())
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------- values to metres and points


def fit_metres(values, known, target):
    """Scale and shift from known distances -> (metres, float32 [H, W], [error at each point, m]).

    known  [(x, y, metres)], two or more, x to the right and y down from the upper left pixel 0,0
    Least squares in the model's space: 1/z (disparity) or z (depth) = scale value + shift. NaN
    where that is no distance in front of the camera.
    """
    H, W = values.shape
    for x, y, _ in known:
        if not (x < W and y < H):
            raise UserError(f"--known {x},{y}: outside the picture, which has {W} x {H} pixels")
    z = np.array([metres for _, _, metres in known])
    at = np.array([values[y, x] for x, y, _ in known], np.float64)
    if np.ptp(at) < 1e-3:
        raise UserError(f"--known: the map is the same at all points ({at.min():.4f} to "
                        f"{at.max():.4f}); choose some that are nearer and some that are farther")
    scale, shift = np.polyfit(at, 1 / z if target == "disparity" else z, 1)
    if scale <= 0 or (scale * at + shift <= 0).any():
        raise UserError("--known: these distances contradict the map, where what is said to be "
                        "nearer is farther away or a point is behind the camera; check x, y and "
                        "metres of each")
    metres = (values * scale + shift).astype(np.float32)
    metres[metres <= 0] = np.nan
    if target == "disparity":
        np.reciprocal(metres, out=metres)
    return metres, [float(metres[y, x]) - distance for x, y, distance in known]


def assumed_metres(values, target, near, far):
    """Values -> z, where the nearest value there can be is `near` metres away, the farthest `far`:
    1/z (disparity) or z (depth) is linear in the value."""
    if target == "disparity":
        return 1 / (values / np.float64(near) + (1 - values) / np.float64(far))
    return (1 - values) * np.float64(near) + values * np.float64(far)


def focal_length(a, path, H, W):
    """-> (pixels, where that comes from): --focal or --fov, the picture's EXIF, or 60 degrees.

    Millimetres are those of 35 mm film, compared by the diagonal of its 36 x 24 mm frame, as the
    makers of cameras do (CIPA DCG-001)."""
    film = math.hypot(W, H) / math.hypot(36, 24)  # pixels a millimetre
    if a.focal:
        number = float(a.focal.removesuffix("mm"))
        return (number * film if a.focal.endswith("mm") else number), f"--focal {a.focal}"
    exif = 0
    if a.fov is None:
        with suppress(Exception), Image.open(path) as image:  # EXIF may be damaged in any way
            exif = float(image.getexif().get_ifd(0x8769).get(0xA405, 0))  # FocalLengthIn35mmFilm
    if exif > 0:
        return exif * film, f"EXIF, {exif:g} mm of 35 mm film"
    fov = 60.0 if a.fov is None else a.fov
    said = "assumed, nothing is known of the camera" if a.fov is None else "--fov"
    return (max(H, W) / 2 / math.tan(math.radians(fov) / 2),
            f"{said}: {fov:g} degrees along the longer side")


def point_cloud(file, z, rgb, focal, comment):
    """z, metres [H, W], and colours, uint8 [H, W, 3] -> a binary PLY, one vertex for each pixel
    whose z is a number. The camera stands at the origin: x to the right, y down, z forward.
    focal: pixels"""
    H, W = z.shape
    vertices = np.empty((H, W), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    vertices["xyz"][..., 0] = (np.arange(W) + 0.5 - W / 2) / focal * z  # pixels' centres
    vertices["xyz"][..., 1] = (np.arange(H)[:, None] + 0.5 - H / 2) / focal * z
    vertices["xyz"][..., 2] = z
    vertices["rgb"] = rgb
    vertices = vertices[np.isfinite(z)]
    header = ["ply", "format binary_little_endian 1.0",
              f"comment x right, y down, z forward; {comment}", f"element vertex {len(vertices)}",
              *(f"property float {name}" for name in "xyz"),
              *(f"property uchar {name}" for name in ("red", "green", "blue")), "end_header\n"]
    file.write("\n".join(header).encode("ascii"))
    file.write(vertices)


# ---------------------------------------------------------------- values to files


def colorize(values, target):
    """Values [H, W] -> uint8 [H, W, 3]: near red, far blue, whichever the target. The colours span
    the picture's own minimum to maximum: they show structure and do not compare two pictures."""
    near = values if target == "disparity" else 1 - values
    low, high = near.min(), near.max()
    if low == high:
        low, high = low - 1, high + 1  # flat: the middle
    shares, stops = np.linspace(0, 1, 65536), np.linspace(0, 1, len(COLORS))
    table = np.stack([np.interp(shares, stops, COLORS[:, c]) for c in range(3)], -1)
    table, colors = table.round().astype(np.uint8), np.empty((*near.shape, 3), np.uint8)
    for top in range(0, len(near), 256):  # strip by strip: what fits into the cache is faster
        place = np.rint((near[top:top + 256] - low) * (65535 / (high - low))).astype(np.uint16)
        table.take(place, 0, colors[top:top + 256], "clip")
    return colors


def save_png(file, array, meaning):
    """uint8 [H, W, 3] or uint16 [H, W] -> PNG; the fastest compression is hardly larger."""
    text = PngInfo()
    text.add_text("Software", SOFTWARE)
    text.add_text("Description", meaning)
    Image.fromarray(array).save(file, "PNG", pnginfo=text, compress_level=1)


def save_floats(file, array, kind, meaning):
    """float32 [H, W] -> .npy or .tiff"""
    if kind == "npy":
        np.save(file, array)
    else:  # tags ImageDescription and Software
        Image.fromarray(array).save(file, "TIFF", tiffinfo={270: meaning, 305: SOFTWARE})


def result_files(values, one, target, a):
    """-> ({ending: what writes it into an open file}, what the JSON says of them)"""
    meaning, kind = MEANING[target], a.out_format
    files = {f"_depth.{kind}": partial(save_floats, array=values, kind=kind, meaning=meaning),
             "_depth.png": lambda file: save_png(file, np.rint(values * 65535).astype(np.uint16),
                                                 f"{meaning}; x 65535"),
             "_color.png": lambda file: save_png(file, colorize(values, target),
                                                 f"near red, far blue; {meaning}")}
    said = {"target": target, "values": meaning, "png": "value x 65535",
            "color": "near red, far blue, over the picture's own range"}
    if a.known:
        metres, errors = fit_metres(values, a.known, target)
        files[f"_metres.{kind}"] = partial(save_floats, array=metres, kind=kind, meaning="metres")
        said["metres"] = {
            "known": a.known, "errors": errors, "note": "least squares of scale and shift; no "
            "better than the map and these points" + (
                "" if len(errors) > 2 else
                ", and two are always met: a third shows how good the fit is")}
    if a.ply:
        focal, source = focal_length(a, one.picture.path, *values.shape)
        said["cloud"] = (f"focal length {focal:.6g} pixels ({source}); " +
                         (f"z from {len(a.known)} known distances" if a.known else
                          f"assumed: nearest {a.near:g} m, farthest {a.far:g} m"))
        files["_cloud.ply"] = lambda file: point_cloud(
            file, metres if a.known else assumed_metres(values, target, a.near, a.far), one.rgb,
            focal, said["cloud"])
    return files, said


# ---------------------------------------------------------------- the names of the results


class Picture(NamedTuple):
    path: Path          # absolute
    place: Path         # below --out: its name, below a folder argument with its sub-folders
    stamp: list | None  # [bytes, nanoseconds of the last change]: another one is another picture


def read_note(base):
    """The JSON at a name, a dict; {} when another program's files are there, None when it is free.
    """
    try:
        note = json.loads(Path(f"{base}_depth.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {} if any(os.path.lexists(f"{base}{end}") for end in ENDINGS) else None
    except OSError:  # a name that is too long would be followed by longer ones
        if not os.path.lexists(f"{base}_depth.json"):
            raise
        return {}
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}


def find_name(out, picture):
    """a, else a_jpg, else a_jpg_2, ...: the first that is free or has this picture's results.
    -> (path without ending, the JSON there or None)"""
    stem, suffix = picture.path.stem, picture.path.suffix.replace(".", "_")
    for n in count():
        base = out / picture.place.parent / (stem + ("", suffix, f"{suffix}_{n}")[min(n, 2)])
        note = read_note(base)
        if note is None or note.get("source") == str(picture.path):
            return base, note


def is_done(out, picture, settings):
    """Are the results there, of the same picture, weights, size, precision and outputs?"""
    with suppress(OSError):  # saving them will give the reason
        base, note = find_name(out, picture)
        return bool(note) and note.get("settings") == settings and all(
            os.path.exists(f"{base}{end}") for end in note["files"])
    return False


def save(out, picture, files, note, again):
    """All files of one picture, under a name of its own -> that name, a path without ending.

    One run at a time: two that write into one folder take no name twice and mix no sets."""
    with FileLock(out / ".lock"):
        base, old = find_name(out, picture)
        if again or not is_done(out, picture, note["settings"]):  # another run may have come before
            write_set(base, files, note, old or {})
        return base


def write_set(base, files, note, old):
    """All files of a picture; earlier files that are not among them go. First complete beside
    their places: a full disk spares what was there. Then renamed, the JSON first and last: a run
    that is killed between leaves one that says that the set is not complete.
    old  the JSON at the name so far
    """
    parts = base.with_name(f".{base.name}_depth")
    shutil.rmtree(parts, ignore_errors=True)  # of a run that was killed
    parts.mkdir(parents=True)
    stale = {*old.get("files", ENDINGS)} - {*files, "_depth.json"}
    begun = {"source": note["source"], "files": sorted({*files, *stale})}
    done = {**note, "files": sorted(files)}
    try:
        for end, write in [*files.items(), ("begun", partial(write_json, note=begun)),
                           ("_depth.json", partial(write_json, note=done))]:
            with open(parts / end, "wb") as file:
                write(file)
        os.replace(parts / "begun", f"{base}_depth.json")
        for end in stale:
            Path(f"{base}{end}").unlink(missing_ok=True)
        for end in [*files, "_depth.json"]:
            os.replace(parts / end, f"{base}{end}")
    finally:
        shutil.rmtree(parts, ignore_errors=True)


def write_json(file, note):
    file.write((json.dumps(note, indent=1) + "\n").encode("ascii"))


# ---------------------------------------------------------------- which pictures


def is_result(file):
    """Did this program write it? Input and output folder may be one, or one inside the other."""
    if not file.name.endswith(ENDINGS):
        return False
    if file.suffix not in (".png", ".tiff"):
        return True
    with suppress(OSError), open(file, "rb") as content:
        return SOFTWARE.encode() in content.read(1024)
    return False  # reading it as a picture will give the reason


def find_pictures(arguments):
    """Files and folders -> [Picture], each once; ["argument: reason"] for what has none; and a
    Counter of the endings of other files in the folders."""
    found, problems, others = {}, [], Counter()
    for argument in arguments:
        root, places = Path(os.path.abspath(os.path.expanduser(argument))), []
        reason = "no such file or folder"
        if os.path.isdir(root):
            unread, reason = [], "no pictures in this folder"
            names = [Path(n) for n in sorted(walk(root, unread.append)) if not is_result(root / n)]
            places = [n for n in names if n.suffix.lower() in readable_suffixes()]
            others.update(n.suffix.lower() or "no ending" for n in set(names) - set(places))
            problems += [f"{error.filename}: {error.strerror}" for error in unread]
        elif os.path.exists(root):
            root, places = root.parent, [Path(root.name)]
        elif os.path.islink(root):
            reason = f"a broken link, to {os.readlink(root)}"
        if not places:
            problems.append(f"{argument}: {reason}")
        for place in places:
            version = None
            with suppress(OSError):  # a broken link: opening it gives the reason
                version = stamp(root / place)
            found.setdefault(root / place, Picture(root / place, place, version))
    return list(found.values()), problems, others


def ignored(others):
    """Counter of endings -> one line"""
    heif = "" if has_heif() else " (pip install pillow-heif)"
    shown = [f"{suffix} {n}{heif if suffix in ('.heic', '.heif') else ''}"
             for suffix, n in others.most_common(8)]
    rest = [f"others {others.total() - sum(dict(others.most_common(8)).values())}"]
    return ("ignored files that are no pictures or that Pillow does not read: "
            + ", ".join(shown + rest * (len(others) > 8)))


# ---------------------------------------------------------------- the command


class Opened(NamedTuple):
    picture: Picture
    x: torch.Tensor          # [*size, 3] in [-1, 1], as the network sees it
    full: tuple              # (H, W)
    rgb: np.ndarray | None   # uint8 [H, W, 3], for the colours of the cloud alone


def open_batches(pictures, size, a, fail, say):
    """Yields [Opened] of one size, at most --batch, holding at most twice as many."""
    waiting = defaultdict(list)  # (*size, 3) -> batch
    for picture in pictures:
        notes = []
        try:
            rgb = open_image(picture.path, notes=notes)
            x = to_network(rgb, network_size(*rgb.shape[:2], size))
        except FAILURES as error:
            fail(picture, error)
            continue
        for note in notes:
            say(f"note: {picture.path}: {note}")
        waiting[x.shape].append(Opened(picture, x, rgb.shape[:2], rgb if a.ply else None))
        del rgb
        if len(waiting[x.shape]) == a.batch or sum(map(len, waiting.values())) == 2 * a.batch:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def predict_each(model, batch, fail):
    """[Opened] -> yields (Opened, the network's map [*size]).

    When a batch fails, for want of memory or for one bad result, each picture is tried alone."""
    try:
        maps = forward(model, torch.stack([one.x for one in batch]))
    except FAILURES as error:
        maps = None  # outside of this clause, as the exception keeps the batch in memory
        if len(batch) == 1:
            fail(batch[0].picture, error)
    if maps is not None:
        yield from zip(batch, maps)
    elif len(batch) > 1:
        for one in batch:
            yield from predict_each(model, [one], fail)


def run(a):
    """All pictures -> exit status: 0, or 1 when some failed."""
    check_flags(a)
    pictures, problems, others = find_pictures(a.images)
    if not pictures:
        raise UserError("; ".join(problems + [ignored(others)] * bool(others)))
    if a.known and len(pictures) > 1:
        raise UserError(f"--known: its points are of one picture, and there are {len(pictures)}")
    model, where = load_model(a)
    target, size = model.info["target"], a.size or model.info["size"]
    settings = {"weights": identity("", model.unet, model.vae), "size": size,
                "precision": name_of(model.unet.dtype), "known": a.known,
                "format": a.out_format, "cloud": [a.focal, a.fov, a.near, a.far] if a.ply else None}
    todo = [p for p in pictures if a.again or not is_done(
        a.out, p, {**settings, "picture": p.stamp})]
    print(f"values: {MEANING[target]}")
    # A bar for more than one picture; in a log file, which keeps every state, rarely a new one.
    bar = tqdm(total=len(todo), unit="picture", disable=len(todo) < 2, file=sys.stderr,
               mininterval=0.1 if sys.stderr.isatty() else 30)
    say, saved, began = partial(bar.write, file=sys.stderr), 0, time.time()

    def fail(picture, error):
        problems.append(f"{picture.path}: {explain(error)}")
        say(f"failed: {problems[-1]}")
        bar.update()

    for line in [f"failed: {problem}" for problem in problems] + [ignored(others)] * bool(others):
        say(line)
    for batch in open_batches(todo, size, a, fail, say):
        for one, y in predict_each(model, batch, fail):
            try:
                files, said = result_files(to_picture(y, one.full), one, target, a)
                note = {"source": str(one.picture.path), "checkpoint": str(a.checkpoint), **said,
                        "device": where, "settings": {**settings, "picture": one.picture.stamp}}
                base = save(a.out, one.picture, files, note, a.again)
            except FAILURES as error:
                fail(one.picture, error)
                continue
            if base.name != one.picture.path.stem:
                say(f"note: {one.picture.path} is saved as {base}: its name is taken")
            if a.known:
                errors = ", ".join(f"{error:+.3g}" for error in said["metres"]["errors"])
                say(f"metres: off by {errors} m at the known points; {said['metres']['note']}")
            saved += 1
            bar.update()
    bar.close()
    skipped = len(pictures) - len(todo)
    skipped = f"{skipped} skipped as done before (--again), " if skipped else ""
    print(f"{saved} saved in {a.out}, {skipped}{len(problems)} failed; "
          f"{time.time() - began:.1f} s on {where}")
    return 1 if problems else 0


def load_model(a):
    """-> the model on its device, and "device, precision" for the last line."""
    device = choose_device(a.device)
    dtype = choose_dtype(a.dtype, device)
    model = FiffDepth.from_pretrained(a.checkpoint, vae=a.vae, dtype=dtype)
    folder = fetch(a.checkpoint, "unet/config.json", "a checkpoint")
    if not {"steps", "peer"} & set(model.info) and (folder / "scheduler/scheduler_config.json").exists():
        print(f"note: nothing in {a.checkpoint} says that train.py trained it for depth; from a "
              "bare generator expect noise", file=sys.stderr)
    torch.backends.cudnn.deterministic = True  # the same bits each time
    return model.to(device), f"{device}, {name_of(dtype)}"


def check_flags(a):
    """Impossible values are a sentence each; --known becomes [[x, y, metres]]."""
    for flag, value in (("--size", a.size), ("--batch", a.batch)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    if not 0 < a.max_megapixels < float("inf"):
        raise UserError(f"--max_megapixels {a.max_megapixels:g}: must be a number above 0")
    if a.fov is not None and not 0 < a.fov < 180:
        raise UserError(f"--fov {a.fov:g}: must lie between 0 and 180 degrees")
    if a.fov is not None and a.focal:
        raise UserError("--fov and --focal say the same thing: give one of them")
    if a.focal and not positive(a.focal.removesuffix("mm")):
        raise UserError(f"--focal {a.focal}: expected pixels, like 1200, or millimetres of 35 mm "
                        "film, like 28mm")
    if not 0 < a.near < a.far < float("inf"):
        raise UserError(f"--near {a.near:g} --far {a.far:g}: metres, with 0 < near < far")
    known = []
    for text in a.known:
        place, _, metres = text.partition("=")
        x, _, y = place.partition(",")
        if not (x.strip().isdecimal() and y.strip().isdecimal() and positive(metres)):
            raise UserError(f"--known {text}: expected X,Y=METRES, like 320,240=2.5")
        known.append([int(x), int(y), float(metres)])
    if len(known) == 1:
        raise UserError("--known: scale and shift are two unknowns, so give two points or more")
    a.known = known
    Image.MAX_IMAGE_PIXELS = round(a.max_megapixels * 1e6 / 2)  # Pillow refuses twice as many
    make_folder(a.out)


def positive(text):
    with suppress(ValueError):
        return 0 < float(text) < float("inf")
    return False


def make_folder(out):
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made a folder ({error.strerror})") from None


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
    add("--again", action="store_true", help="do anew what was done before; by default, results of "
        "the same picture, weights, size, precision and outputs are left as they are")
    add("--size", type=int, metavar="PIXELS", help="longer side in the network, smaller pictures "
        "keep their own; without it, that of the training (Sec. 4.1)")
    add("--batch", type=int, default=4, metavar="PICTURES",
        help="pictures of one size computed together; memory grows with it")
    add("--max_megapixels", type=float, default=179.0, metavar="MEGAPIXELS", help="larger pictures "
        "are refused: a small file may unpack to fill the memory. 50 megapixels take 1.5 GB")
    add("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"),
        help="precision of the network; auto is float16 on CUDA, else float32")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu), one of them, or cuda:1")
    add("--out_format", default="npy", choices=("npy", "tiff"),
        help="of the maps in floats: NumPy's, or TIFF of 32 bits")
    add("--known", action="append", default=[], metavar="X,Y=METRES", help="the distance at a "
        "pixel, x to the right and y down from 0,0; two or more fit the scale and shift of one "
        "picture's map, which is also written in metres (_metres.npy)")
    add("--ply", action="store_true", help="also write a coloured point cloud (x right, y down, z "
        "forward; 15 bytes a pixel). The map is known up to a scale and a shift: without --known, "
        "--near and --far are assumptions, and without EXIF so is the camera")
    add("--focal", metavar="PIXELS|MM", help="focal length for --ply, in pixels of the picture or, "
        "as 28mm, that of 35 mm film; without it and --fov, from EXIF")
    add("--fov", type=float, metavar="DEGREES", help="angle of view along the longer side, for "
        "--ply; without it, --focal and EXIF it is assumed to be 60")
    add("--near", type=float, default=1.0, metavar="METRES", help="z of the nearest value (1 of a "
        "disparity map, 0 of a depth map), for --ply; --near and --far set scale and shift: 1/z "
        "(disparity) or z (depth) is linear in the value between them")
    add("--far", type=float, default=10.0, metavar="METRES",
        help="z of the farthest value, for --ply")
    parser.error = usage_error
    return parser


def usage_error(message):
    """argparse's errors as one sentence, like all others."""
    dash = [word for word in message.split() if word.startswith("-") and os.path.exists(word)]
    remedy = f"write ./{dash[0]} for the file of that name" if dash else "see --help"
    raise UserError(f"{message}; {remedy}")


def main(argv=None):
    return run(flags().parse_args(argv))


if __name__ == "__main__":
    sys.exit(command(main))
