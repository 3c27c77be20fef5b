"""The figures of the README, from the shipped weights and the held-out scenes.

    python nano/figures.py                   # all of them -> assets/
    python nano/figures.py spectrum edges

Each figure is one function; nothing here is needed to understand the paper.
"""
import argparse
import sys
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data import FrameSet, HelpFormatter, UserError, command, normalize_teacher  # noqa: E402
from evaluate import score  # noqa: E402
from infer import colorize, predict_image  # noqa: E402
from losses import add_noise, blend  # noqa: E402
from model import FiffDepth, Teacher  # noqa: E402


class World:
    """What the figures are drawn from: the model, its teacher, held-out wild scenes."""

    def __init__(self, a):
        self.a = a
        self.model = FiffDepth.from_pretrained(a.checkpoint)
        self.teacher = Teacher.from_pretrained(a.teacher)
        if self.model.info["target"] != "disparity":
            raise UserError(f"{a.checkpoint} predicts depth; the figures are drawn of disparity")

    @cached_property
    def frames(self):
        return FrameSet("nano", self.a.data / "wild/test")

    @property
    def shown(self):
        return range(min(self.a.rows, len(self.frames)))

    def maps(self, i):
        """Frame i -> rgb uint8 [H, W, 3], and maps [H, W] in [-1, 1]:
        d_0, d_-1, teacher, truth."""
        sample = self.frames.or_stop(self.frames.sample, i, False)
        return self.frames.read(i)[0], *self.predictions(sample.rgb), sample.label[0].numpy()

    @torch.no_grad()
    def predictions(self, rgb):
        """rgb [3, H, W] in [-1, 1] -> d_0, d_-1, teacher [H, W] in [-1, 1]"""
        d0 = self.model.predict(self.model.encode(rgb[None]))
        both = [self.model.decode(d, rgb.shape[-2:])[0, 0].numpy()
                for d in (d0, self.model.filter(d0))]
        return *both, normalize_teacher(self.teacher(rgb[None])[0], "disparity")[0].numpy()

    def results(self, i):
        """Frame i -> a row of a sheet: picture, d_0, teacher, truth."""
        rgb, d0, _, label, truth = self.maps(i)
        return [rgb, *(colorize(m, "disparity") for m in (d0, label, truth))]


# ---------------------------------------------------------------- pictures from arrays


def grey(values, white):
    """[H, W], 0 black and `white` white -> uint8 [H, W, 3]"""
    shade = np.clip(values / white, 0, 1)
    return (shade * 255 + 0.5).astype(np.uint8)[..., None].repeat(3, -1)


def pixels(image):
    """[3, H, W] in about [-1, 1] -> uint8 [H, W, 3]"""
    return ((image.clamp(-1, 1).permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()


def sheet(rows, heads, scale=1, left=()):
    """Rows of uint8 [H, W, 3] of one size -> a picture with a head over each column, and with names
    at the left of the rows if there are any."""
    H, W = rows[0][0].shape[:2]
    margin, top = (100 if left else 0), 16
    picture = Image.new("RGB", (margin + len(rows[0]) * W * scale, top + len(rows) * H * scale),
                        "white")
    draw = ImageDraw.Draw(picture)
    for c, head in enumerate(heads):
        draw.text((margin + c * W * scale + 4, 2), head, "black")
    for r, row in enumerate(rows):
        for name in left[r:r + 1]:
            draw.text((4, top + r * H * scale + H * scale // 2), name, "black")
        for c, tile in enumerate(row):
            tile = Image.fromarray(tile).resize((W * scale, H * scale), Image.Resampling.NEAREST)
            picture.paste(tile, (margin + c * W * scale, top + r * H * scale))
    return picture


# ---------------------------------------------------------------- the figures


def strip(w):
    """Results: picture, d_0, teacher, truth of the first held-out wild scenes."""
    return sheet([w.results(i) for i in w.shown],
                 ("picture", "d_0 (FiffDepth)", "teacher", "truth"))


@torch.no_grad()
def trajectory(w):
    """Eq. 2: what is noised, for three gammas, from the clean blend b_0 to pure noise."""
    sample, model = w.frames.or_stop(w.frames.sample, 0, False), w.model
    x0, d0 = model.encode(sample.rgb[None]), model.encode(sample.label[None])
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    times, rows, gammas = (None, 100, 300, 500, 700, 999), [], (1.0, 0.5, 0.0)
    for gamma in gammas:
        b0 = blend(x0, d0, gamma)
        row = [b0 if t is None else add_noise(b0, eps, model.alphas_cumprod[t]) for t in times]
        rows.append([pixels(model.decode_image(b)[0]) for b in row])
    return sheet(rows, ["b_0" if t is None else f"b_t, t = {t}" for t in times],
                 left=[f"gamma {g:g}" for g in gammas])


def edges(w):
    """Eq. 4: the size of the gradient of d_0, of d_-1 and of the teacher's label."""
    rows = []
    for i in w.shown:
        rgb, d0, dm1, label, truth = w.maps(i)
        rows.append([rgb, *(grey(np.hypot(*np.gradient(m)), 0.3)
                            for m in (d0, dm1, label, truth))])
    return sheet(rows, ("picture", "edges of d_0", "of d_-1", "of the teacher", "of the truth"))


def spectrum(w):
    """Fig. 3 as numbers: power over spatial frequency of d_0, d_-1, teacher and truth."""
    pyplot = matplotlib_pyplot()
    power = [np.stack([radial_power(m) for m in w.maps(i)[1:]])
             for i in range(min(w.a.frames, len(w.frames)))]
    mean = np.mean(power, 0)
    figure, axes = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    cycles = np.arange(1, mean.shape[1] + 1)
    for curve, name in zip(mean, ("d_0", "d_-1", "teacher", "truth")):
        axes.loglog(cycles, curve, label=name)
    axes.set(xlabel="cycles per picture", ylabel="power",
             title=f"{len(power)} held-out wild scenes")
    axes.legend()
    return figure


def radial_power(values):
    """[H, W] -> mean power at 1, 2, .. min(H, W) / 2 cycles per picture, under a Hann window."""
    H, W = values.shape
    window = np.hanning(H)[:, None] * np.hanning(W)
    power = np.abs(np.fft.fft2((values - values.mean()) * window)) ** 2 / (H * W)
    radius = np.hypot(np.fft.fftfreq(H)[:, None] * H, np.fft.fftfreq(W) * W).round().astype(int)
    total = np.bincount(radius.ravel(), power.ravel())
    return (total / np.bincount(radius.ravel()))[1:min(H, W) // 2 + 1]


def ablation(w):
    """Fig. 7: d_0 of the variants of nano/ablate.py's widest experiment, seed 0, and the truth."""
    from ablate import VARIANTS, widest_experiment, run_folder

    runs = w.a.runs / widest_experiment(w.a.results)
    trained = {name: folder for name in VARIANTS
               if (folder := run_folder(runs, name, 0)).exists()}
    if not trained:
        raise UserError(f"{runs}: its runs are not there; first: python nano/ablate.py")
    rows, names = [[w.frames.or_stop(w.frames.read, i)[0] for i in w.shown]], ["picture"]
    for name, folder in trained.items():
        model = FiffDepth.from_pretrained(folder)
        rows.append([colorize(predict_image(model, rgb), "disparity") for rgb in rows[0]])
        names.append(name)
    rows.append([colorize(w.maps(i)[4], "disparity") for i in w.shown])
    return sheet(rows, ["" for _ in w.shown], left=[*names, "truth"])


def cloud(w):
    """The paper's Fig. 1: d_0 as points in space, seen from a little behind the camera and from
    either side. Scale, shift and field of view are assumed: depth 1..6, 60 degrees."""
    rows = []
    for i in w.shown:
        rgb, d0, *_ = w.maps(i)
        rows.append([rgb, *(points(rgb, (d0 + 1) / 2, angle) for angle in (-25, 0, 25))])
    return sheet(rows, ("picture", "from the left", "ahead", "from the right"), scale=2)


def points(rgb, disparity, degrees, near=1.0, far=6.0, fov=60.0):
    """Pixels as small squares in space, turned about the middle of the scene -> uint8 [H, W, 3]"""
    H, W = disparity.shape
    z = 1 / (disparity / near + (1 - disparity) / far)
    focal = W / 2 / np.tan(np.radians(fov / 2))
    x, y = (np.arange(W) - W / 2) / focal * z, (np.arange(H)[:, None] - H / 2) / focal * z
    middle, angle = np.median(z), np.radians(degrees)
    u = np.cos(angle) * x + np.sin(angle) * (z - middle)
    v = np.cos(angle) * (z - middle) - np.sin(angle) * x + middle * 1.3
    row, column = (np.round(p / np.maximum(v, 0.1) * focal).astype(int) for p in (y, u))
    picture = np.full((H, W, 3), 255, np.uint8)
    corners = [(H // 2 + dy, W // 2 + dx) for dy in (0, 1) for dx in (0, 1)]
    r = np.stack([row + dy for dy, _ in corners]).ravel()
    c = np.stack([column + dx for _, dx in corners]).ravel()
    v, colour = np.tile(v.ravel(), 4), np.tile(rgb.reshape(-1, 3), (4, 1))
    seen = np.flatnonzero((r >= 0) & (r < H) & (c >= 0) & (c < W) & (v > 0.1))
    seen = seen[np.argsort(-v[seen], kind="stable")]  # far points first, near ones over them
    picture[r[seen], c[seen]] = colour[seen]
    return picture


def failures(w):
    """The held-out scenes with the lowest delta1 after alignment: what the weights do not know."""
    scored = []
    for i in range(min(w.a.frames, len(w.frames))):
        rgb, depth, valid = w.frames.or_stop(w.frames.read, i)
        pred = predict_image(w.model, rgb)
        scored.append((score(pred, depth, valid, "disparity", w.frames.layout.near,
                             w.frames.layout.far)[1], i))
    worst = sorted(scored)[:w.a.rows]
    return sheet([w.results(i) for _, i in worst], ("picture", "d_0", "teacher", "truth"),
                 left=[f"delta1 {100 * share:.0f} %" for share, _ in worst])


def photos(w):
    """Photographs that the weights never saw, as squares of the training size, two in a row."""
    frames = FrameSet("photos", w.a.photos, size=(w.model.info["size"],) * 2)
    rows = []
    for i in range(len(frames)):
        rgb = frames.or_stop(frames.sample, i, False).rgb
        d0, _, label = w.predictions(rgb)
        rows.append([pixels(rgb), *(colorize(m, "disparity") for m in (d0, label))])
    pairs = [sum(rows[k:k + 2], []) for k in range(0, len(rows), 2)]  # two a row of the sheet
    return sheet(pairs, ("picture", "d_0", "teacher") * 2)


def matplotlib_pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("the plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


# ---------------------------------------------------------------- the command

FIGURES = {f.__name__: f for f in (strip, trajectory, edges, spectrum, ablation, cloud, failures,
                                photos)}


def main(argv=None):
    root = HERE.parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    add("figures", nargs="*", default=list(FIGURES), help=", ".join(FIGURES))
    add("--checkpoint", default=str(HERE / "weights/fiffdepth"), metavar="DIR|HUB_ID",
        help="FiffDepth whose maps are drawn")
    add("--teacher", default=str(HERE / "weights/teacher"), metavar="DIR|HUB_ID",
        help="teacher drawn beside it (Sec. 3.3)")
    add("--data", type=Path, default=HERE / "data", help="folder that nano/scenes.py wrote")
    add("--runs", type=Path, default=root / "runs/ablate", help="what nano/ablate.py trained")
    add("--results", type=Path, default=HERE / "ablation.jsonl", help="and what it scored")
    add("--photos", type=Path, default=root / "assets/photos", help="folder of photographs")
    add("--rows", type=int, default=4, help="scenes in a figure")
    add("--frames", type=int, default=256, help="held-out scenes that spectrum and failures use")
    add("--out", type=Path, default=root / "assets", help="folder of the figures")
    a = parser.parse_args(argv)
    for name in a.figures:
        if name not in FIGURES:
            parser.error(f"unknown figure {name}: choose from {', '.join(FIGURES)}")
    if min(a.rows, a.frames) < 1:
        parser.error("--rows and --frames are at least 1")
    world = World(a)
    a.out.mkdir(parents=True, exist_ok=True)
    return int(not all([draw(name, world) for name in a.figures]))


def draw(name, world):
    """One figure -> whether it could be drawn; the others do not wait for what it lacks."""
    try:
        picture, file = FIGURES[name](world), world.a.out / f"{name}.png"
    except (UserError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return False
    picture.save(file) if isinstance(picture, Image.Image) else picture.savefig(file)
    print(file)
    return True


if __name__ == "__main__":
    sys.exit(command(main))
