"""The small world: ray-cast rooms and yards with exact depth, in numpy.

    python nano/scenes.py            # nano/data: 108,576 frames of 128x128, on all cores
    python nano/scenes.py OUT --clean 500 --wild 500 --labelled 0 --test 64 --size 96

Two styles with a real gap between them, in the roles of the paper's two kinds of data (Sec. 4.1):
*clean* (the synthetic set: plain materials, neutral light, tidy furniture, exact depth) and *wild*
(the real set: people, trees and clutter, photographic textures, fog, colour casts, blur and noise).
Not needed to understand the paper: it writes an ordinary data-set folder, rgb_*.png (8 bit) and
depth_*.png (16 bit, millimetres of planar depth, 0 = sky or beyond FAR),
which data.py reads as "nano".
"""
import argparse
import functools
import math
import os
import signal
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core; threads inside would fight
import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

FAR = 40.0  # metres; what lies beyond is written as 0 (invalid), like the sky
STYLES = ("clean", "wild")
# part of the seed: no split ever shares a scene
SPLITS = {"train": 0, "labelled": 1, "test": 2, "val": 3}


class Prim(NamedTuple):
    """A unit shape: unit = to_unit @ (world − centre) maps it to the
    cube, ball or tube of radius 1."""
    kind: str  # box, ellipsoid, cylinder, room (a box seen from inside), ground (the plane y = 0)
    centre: np.ndarray  # [3] metres; x right, y up, z ahead
    to_unit: np.ndarray  # [3, 3]
    half: np.ndarray  # [3] half extents, metres
    skins: tuple  # Skin for the sides, top, bottom


class Skin(NamedTuple):
    """What a surface looks like: a two-coloured pattern times a 1/f grain."""
    pattern: str
    a: np.ndarray  # [3] linear rgb
    b: np.ndarray
    per_metre: float  # pattern cells per metre
    grain: float  # strength of the 1/f texture, 0..1
    tile: int  # which 1/f texture
    gloss: float


class Part(NamedTuple):
    """A piece of an object in the object's own frame (base at y = 0);
    slot picks one of its skins."""
    kind: str
    centre: tuple
    half: tuple
    slot: int = 0
    turn: np.ndarray | None = None


# ---------------------------------------------------------------- objects: parts in metres


def rotation(yaw=0.0, pitch=0.0, roll=0.0):
    """Ry(yaw) Rx(pitch) Rz(roll), angles in radians -> [3, 3]"""
    (cy, cp, cr), (sy, sp, sr) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rx = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    return ry @ rx @ np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])


def legs(w, d, h, r, slot=1, kind="box"):
    return [Part(kind, (sx * (w - r), h / 2, sz * (d - r)), (r, h / 2, r), slot)
            for sx in (-1, 1) for sz in (-1, 1)]


def table(g):
    w, d, h = g.uniform(0.35, 0.9), g.uniform(0.3, 0.5), g.uniform(0.45, 0.8)
    return [Part("box", (0, h, 0), (w, 0.025, d))] + legs(w, d, h, g.uniform(0.015, 0.035))


def chair(g):
    w, h, r = g.uniform(0.18, 0.26), g.uniform(0.4, 0.5), g.uniform(0.012, 0.022)
    back = [Part("box", (0, y, w), (w, 0.03, 0.012)) for y in np.linspace(h + 0.15, 2 * h, 3)]
    posts = [Part("box", (s * (w - r), h * 1.5, w), (r, h / 2, r), 1) for s in (-1, 1)]
    return [Part("box", (0, h, 0), (w, 0.02, w))] + legs(w, w, h, r) + back + posts


def stool(g):
    h, r = g.uniform(0.4, 0.75), g.uniform(0.15, 0.2)
    return ([Part("cylinder", (0, h, 0), (r, 0.02, r))]
            + legs(r * 0.8, r * 0.8, h, 0.014, 1, "cylinder"))


def shelf(g):
    w, d, h, n = g.uniform(0.3, 0.7), g.uniform(0.12, 0.2), g.uniform(0.9, 2.0), g.integers(3, 6)
    parts = [Part("box", (0, y, 0), (w, 0.012, d)) for y in np.linspace(0.05, h, n)]
    parts += [Part("box", (s * w, h / 2, 0), (0.012, h / 2, d), 1) for s in (-1, 1)]
    for y in np.linspace(0.05, h, n)[:-1]:
        for _ in range(g.integers(1, 4)):
            s = g.uniform(0.04, 0.1)
            parts.append(Part("box", (g.uniform(-w, w) * 0.8, y + s + 0.012, 0),
                              (s * 0.5, s, d * 0.7), 2))
    return parts


def sofa(g):
    w, d = g.uniform(0.6, 1.0), g.uniform(0.35, 0.45)
    return ([Part("box", (0, 0.22, 0), (w, 0.2, d)), Part("box", (0, 0.55, d), (w, 0.28, 0.1))]
            + [Part("box", (s * w, 0.32, 0), (0.1, 0.3, d), 1) for s in (-1, 1)])


def crate(g):
    w, h, d = g.uniform(0.12, 0.5, 3)
    return [Part("box", (0, h, 0), (w, h, d))]


def cabinet(g):
    w, h, d = g.uniform(0.25, 0.6), g.uniform(0.4, 1.0), g.uniform(0.2, 0.3)
    return [Part("box", (0, h, 0), (w, h, d)), Part("box", (0, h, -d), (0.008, h * 0.95, 0.01), 1)]


def lamp(g):
    h, r = g.uniform(1.2, 1.8), g.uniform(0.12, 0.22)
    return [Part("cylinder", (0, 0.015, 0), (0.14, 0.015, 0.14), 1),
            Part("cylinder", (0, h / 2, 0), (0.012, h / 2, 0.012), 1),
            Part("cylinder", (0, h, 0), (r, r * 0.7, r))]


def vase(g):
    h, r = g.uniform(0.12, 0.35), g.uniform(0.06, 0.15)
    return [Part("ellipsoid", (0, h, 0), (r, h, r)),
            Part("cylinder", (0, 2 * h, 0), (r / 3, h / 3, r / 3), 1)]


def ball(g):
    r = g.uniform(0.1, 0.35)
    return [Part("ellipsoid", (0, r, 0), (r, r, r))]


def column(g):
    r, h = g.uniform(0.1, 0.25), g.uniform(1.2, 2.4)
    return [Part("cylinder", (0, h / 2, 0), (r, h / 2, r)),
            Part("box", (0, 0.1, 0), (r * 1.3, 0.1, r * 1.3), 1)]


def plant(g):
    h = g.uniform(0.5, 1.2)
    parts = [Part("cylinder", (0, 0.14, 0), (0.13, 0.14, 0.13), 1)]
    for _ in range(g.integers(8, 16)):
        yaw, tilt, y = g.uniform(0, 6.3), g.uniform(0.3, 1.2), g.uniform(0.3, h)
        at = np.array([math.sin(yaw), 0, math.cos(yaw)]) * g.uniform(0.08, 0.3) + [0, y, 0]
        parts.append(Part("ellipsoid", at, (0.05, 0.006, g.uniform(0.12, 0.25)), 0,
                          rotation(yaw, tilt)))
    return parts + [Part("cylinder", (0, h / 2, 0), (0.01, h / 2, 0.01), 2)]


def person(g):
    s = g.uniform(0.85, 1.1)
    stride = g.uniform(0, 0.3)
    parts = [Part("ellipsoid", (0, 1.62 * s, 0), (0.1 * s, 0.13 * s, 0.11 * s), 1),
             Part("ellipsoid", (0, 1.15 * s, 0), (0.21 * s, 0.36 * s, 0.13 * s))]
    for x, turn in ((-0.1, stride), (0.1, -stride)):
        parts.append(Part("cylinder", (x * s, 0.42 * s, 0), (0.075 * s, 0.44 * s, 0.08 * s), 2,
                          rotation(0, turn)))
        arm = rotation(0, -turn, math.copysign(g.uniform(0.1, 0.5), x))
        parts.append(Part("cylinder", (x * 2.5 * s, 1.13 * s, 0),
                          (0.045 * s, 0.3 * s, 0.045 * s), 0, arm))
    return parts


def tree(g):
    h, r = g.uniform(1.5, 3.0), g.uniform(0.06, 0.16)
    parts = [Part("cylinder", (0, h / 2, 0), (r, h / 2, r), 1)]
    for _ in range(g.integers(4, 9)):
        at = g.normal(0, 0.5, 3) * [1, 0.6, 1] + [0, h + 0.4, 0]
        parts.append(Part("ellipsoid", at, g.uniform(0.3, 0.8, 3)))
    for _ in range(g.integers(3, 7)):
        turn = rotation(g.uniform(0, 6.3), g.uniform(0.4, 1.1))
        mid = turn @ [0, 0.5, 0] + [0, g.uniform(0.5, 0.9) * h, 0]
        parts.append(Part("cylinder", mid, (r / 4, 0.5, r / 4), 1, turn))
    return parts


def bush(g):
    return [Part("ellipsoid", (*(g.normal(0, 0.3, 2)), g.normal(0, 0.3)), g.uniform(0.25, 0.6, 3))
            for _ in range(g.integers(3, 7))]


def rock(g):
    return [Part("ellipsoid", (g.normal(0, 0.2), 0.1, g.normal(0, 0.2)), g.uniform(0.15, 0.6, 3), 0,
                 rotation(*g.uniform(-0.5, 0.5, 3))) for _ in range(g.integers(1, 4))]


def pole(g):
    h, r = g.uniform(1.5, 4.0), g.uniform(0.02, 0.06)
    top = [Part("box", (0, h, 0), (0.25, 0.25, 0.015)),
           Part("cylinder", (0, h, 0), (0.25, 0.1, 0.25)),
           Part("box", (0.4, h, 0), (0.45, 0.03, 0.03), 1),
           Part("ellipsoid", (0, h, 0), (0.15, 0.15, 0.15))]
    return [Part("cylinder", (0, h / 2, 0), (r, h / 2, r), 1), top[g.integers(4)]]


def fence(g):
    w, h, n = g.uniform(1.0, 2.5), g.uniform(0.7, 1.3), int(g.integers(5, 14))
    rails = [Part("box", (0, y, 0), (w, 0.025, 0.015), 1) for y in (h * 0.25, h * 0.85)]
    return rails + [Part("box", (x, h / 2, 0), (0.025, h / 2, 0.015))
                    for x in np.linspace(-w, w, n)]


def railing(g):
    w, n = g.uniform(0.8, 2.0), int(g.integers(3, 7))
    rails = [Part("cylinder", (0, y, 0), (0.02, w, 0.02), 0, rotation(0, 0, math.pi / 2))
             for y in (0.5, 1.0)]
    return rails + [Part("cylinder", (x, 0.5, 0), (0.018, 0.5, 0.018), 1)
                    for x in np.linspace(-w, w, n)]


def ladder(g):
    w, h, turn = g.uniform(0.16, 0.25), g.uniform(1.2, 2.2), rotation(0, g.uniform(0.1, 0.4))
    sides = [Part("box", turn @ [s * w, h / 2, 0], (0.02, h / 2, 0.02), 0, turn) for s in (-1, 1)]
    return sides + [Part("box", turn @ [0, y, 0], (w, 0.015, 0.015), 1, turn)
                    for y in np.arange(0.25, h, 0.3)]


def car(g):
    w, l = g.uniform(0.75, 0.9), g.uniform(1.6, 2.2)
    wheels = [Part("cylinder", (sx * w, 0.3, sz * l * 0.6), (0.3, 0.1, 0.3), 2,
                   rotation(0, 0, math.pi / 2))
              for sx in (-1, 1) for sz in (-1, 1)]
    return [Part("box", (0, 0.6, 0), (w, 0.32, l)),
            Part("box", (0, 1.1, l * 0.1), (w * 0.9, 0.25, l * 0.5), 1)] + wheels


def building(g):
    w, h, d = g.uniform(1.5, 5), g.uniform(1.5, 5), g.uniform(1.5, 4)
    return [Part("box", (0, h, 0), (w, h, d)),
            Part("box", (0, 2 * h, 0), (w * 1.06, 0.12, d * 1.06), 1)]


def bench(g):
    w = g.uniform(0.6, 0.9)
    slats = [Part("box", (0, 0.45, z), (w, 0.015, 0.05)) for z in (-0.15, 0, 0.15)]
    back = [Part("box", (0, y, 0.22), (w, 0.05, 0.015)) for y in (0.65, 0.82)]
    return slats + back + legs(w, 0.2, 0.45, 0.025)


INDOOR = {"clean": [table, chair, shelf, sofa, crate, cabinet, lamp, vase, column, stool],
          "wild": [table, chair, chair, shelf, sofa, crate, lamp, stool, plant, plant, person,
                   ladder, ball, railing, cabinet]}
OUTDOOR = {"clean": [building, pole, fence, car, crate, bench, column, ball],
           "wild": [tree, tree, bush, rock, person, person, pole, fence, railing, car, bench,
                    ladder, building]}
SMALL = {"clean": [vase, crate, ball], "wild": [vase, plant, ball, crate, stool]}


# ------------------------------------------------------ a scene: where things stand, what they wear


@functools.cache
def grains(style):
    """16 tiles of 1/f^β noise, [16, 3, 256, 256], mean 0, std 1: the spectrum of photographs."""
    g = np.random.default_rng([99, STYLES.index(style)])
    fy, fx = np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None]
    f = np.sqrt(fx**2 + fy**2)
    f[0, 0] = np.inf
    tiles = []
    for _ in range(16):
        shape = f ** -g.uniform(0.7, 1.8) * np.where(abs(fx) > abs(fy), g.uniform(0.3, 1), 1)
        white = np.fft.rfft2(g.normal(size=(4, 256, 256)))
        n = np.fft.irfft2(white * shape)
        n /= n.std((1, 2), keepdims=True)
        tiles.append(n[:1] * 0.95 + n[1:] * 0.13 * (style == "wild"))
    return np.stack(tiles).astype(np.float32)


def skin(g, style, base=None):
    """A random surface; base [3] fixes the main colour."""
    wild = style == "wild"
    names = ["plain", "checker", "stripes", "bricks", "blots", "grain"]
    chance = [0.45, 0.05, 0.15, 0.1, 0.1, 0.15] if wild else [0.6, 0.1, 0.15, 0.1, 0.05, 0.0]
    hue = (base if base is not None
           else g.uniform(0.05, 0.85) * (1 - g.uniform(0, 0.9 if wild else 0.6) * g.random(3)))
    other = hue * g.uniform(0.35, 1.6) if g.random() < 0.7 else g.uniform(0.05, 0.8, 3)
    return Skin(str(g.choice(names, p=chance)), np.asarray(hue), np.asarray(other),
                float(np.exp(g.uniform(0.3, 2.3))),
                float(g.uniform(0.05, 0.3) if wild else g.uniform(0, 0.2)), int(g.integers(16)),
                float(g.random() < 0.25) * g.uniform(0.1, 0.5))


def place(prims, parts, at, yaw, scale, skins):
    """Puts an object's parts into the world at the point at [3]; skins: of its slots, each part
    wears one on all sides."""
    turn = rotation(yaw)
    for p in parts:
        local = turn if p.turn is None else turn @ p.turn
        half = np.asarray(p.half, float) * scale
        centre = turn @ (np.asarray(p.centre, float) * scale) + at
        prims.append(Prim(p.kind, centre, local.T / half[:, None], half, (skins[p.slot],) * 3))


def axis_box(kind, low, high, skins):
    low, high = np.asarray(low, float), np.asarray(high, float)
    half = (high - low) / 2
    return Prim(kind, (low + high) / 2, np.diag(1 / half), half, skins)


class Scene(NamedTuple):
    prims: list
    eye: np.ndarray  # [3]
    look: np.ndarray  # [3, 3] camera to world
    fov: float  # horizontal, radians
    light: np.ndarray  # [3] a point (rooms) or a direction (yards)
    room: bool
    glow: np.ndarray  # [3] colour of the light
    ambient: float
    sky: np.ndarray  # [2, 3] zenith, horizon


def furnish(g, style, prims, kinds, x_at, z_range, eye):
    """Drops 4 to 9 objects that neither overlap nor block the camera; some carry a small one.
    x_at: draws where across, at a distance z"""
    n = int(g.integers(4, 10))
    taken = [(eye[0], eye[2], 0.5)]
    for _ in range(4 * n):
        z = g.uniform(*z_range)
        x = x_at(z)
        parts = kinds[g.integers(len(kinds))](g)
        scale = g.uniform(0.85, 1.15) if style == "clean" else g.uniform(0.85, 1.2)
        reach = scale * max(np.abs(np.asarray(p.centre)[[0, 2]]).max()
                            + min(max(p.half[0], p.half[2]), 1.5) * 0.7 for p in parts)
        if any(math.hypot(x - u, z - v) < reach + r for u, v, r in taken):
            continue
        taken.append((x, z, reach))
        quarter = g.integers(4) * math.pi / 2
        yaw = (quarter + g.normal(0, 0.1) if style == "clean" or g.random() < 0.3
               else g.uniform(0, 6.3))
        place(prims, parts, np.array([x, 0, z]), yaw, scale, three(g, style))
        top = parts[0]
        if top.kind == "box" and top.centre[1] < 0.9 and g.random() < 0.5:
            up = scale * (top.centre[1] + top.half[1])
            small = SMALL[style][g.integers(len(SMALL[style]))](g)
            place(prims, small, np.array([x, up, z]), g.uniform(0, 6.3), 0.7, three(g, style))
        if len(taken) > n:
            return


def build(seed, style):
    """A seed (list of ints) -> Scene, and the generator,
    which goes on to draw the camera's faults."""
    g = np.random.default_rng(seed)  # another order of the draws is another world
    wild, indoors = style == "wild", g.random() < 0.6
    height = g.uniform(0.9, 2.2) if wild else g.uniform(1.0, 1.8)
    pitch = g.uniform(0.0, 0.4) if wild else g.uniform(0.0, 0.3)
    roll = g.normal(0, 0.06 if wild else 0.01)
    fov = math.radians(g.uniform(55, 85) if wild else g.uniform(55, 75))
    # nearer than this, the foot of a thing lies below the frame and nothing tells how far it stands
    foot = height / math.tan(pitch + fov / 2) if wild else 0.0
    prims, eye, yaw, light = (room if indoors else yard)(g, style, height, math.tan(fov / 2), foot)
    warm = (np.array([1, g.uniform(0.75, 1), g.uniform(0.5, 1.1)]) if wild
            else np.array([1, 0.97, 0.92]))
    sky = np.array([[0.35, 0.55, 0.95], [0.8, 0.88, 1]])
    if wild:  # from clear blue to dull grey, sometimes an evening
        sky = (sky + (sky.mean(1, keepdims=True) - sky) * g.uniform(0, 1)
               + g.normal(0, 0.08, (2, 3)) + g.uniform(-0.3, 0.2))
        sky = np.clip(sky, 0.1, 1.2)
    return Scene(prims, eye, rotation(yaw, pitch, roll), fov, light, indoors, warm,
                 g.uniform(0.15, 0.5) if wild else 0.35, sky), g


def three(g, style):
    return [skin(g, style) for _ in range(3)]


def room(g, style, height, spread, foot):
    """Walls, things on the far one, furniture -> prims, eye [3], yaw, the lamp [3], metres.
    spread: tan(fov / 2)"""
    w, deep, h = g.uniform(1.4, 3.5), g.uniform(2.5, 6.0), g.uniform(2.3, 3.6)
    eye = np.array([g.uniform(-0.4, 0.4) * w, min(height, h - 0.4), 0])
    floor, wall, roof = (skin(g, style), skin(g, style),
                         skin(g, style, g.uniform(0.5, 0.9) * np.ones(3)))
    prims = [axis_box("room", (-w, 0, -1.5), (w, h, deep), (wall, roof, floor))]
    for _ in range(g.integers(0, 4)):  # pictures, windows, doors: thin boxes on the far wall
        x, y, s, q = (g.uniform(-w, w), g.uniform(0.9, 2), g.uniform(0.2, 0.6),
                      g.uniform(0.2, 0.5))
        prims.append(axis_box("box", (x - s, y - q, deep - 0.04), (x + s, y + q, deep),
                              (skin(g, style),) * 3))
    yaw = g.normal(0, 0.35 if style == "wild" else 0.15)
    light = np.array([g.uniform(-0.8, 0.8) * w, h - 0.2, g.uniform(0, 0.9) * deep])

    def x_at(z):  # between the walls, and in view
        return g.uniform(-1, 1) * min(w - 0.3, eye[0] + (z + 0.3) * spread * 1.1 + 0.2)

    near = min(max(1.5, foot), deep - 0.8)
    furnish(g, style, prims, INDOOR[style], x_at, (near, deep - 0.3), eye)
    return prims, eye, yaw, light


def yard(g, style, height, spread, foot):
    """Ground, something behind, perhaps something along the way, things -> as room; the light is
    a direction."""
    eye = np.array([0, height, 0.0])
    prims = [Prim("ground", np.zeros(3), np.eye(3), np.ones(3), (skin(g, style),) * 3)]
    light = np.array([g.normal(0, 1), g.uniform(0.5, 1.5), g.normal(-0.3, 0.8)])
    back = g.uniform(4, 11)
    x = -back * spread * 1.3
    # a street front, a hedge or hills behind
    while x < back * spread * 1.3 and g.random() < 0.93:
        w, h, z = g.uniform(1, 4.5), g.uniform(0.6, 4.5), back * g.uniform(0.8, 1.3)
        if style == "wild" and g.random() < 0.6:
            part = Part("ellipsoid", (0, 0, 0), (w * 1.3, h, g.uniform(1, 4)))
        else:
            part = Part("box", (0, h, 0), (w, h, g.uniform(1, 4)))
        place(prims, [part], np.array([x + w, 0, z]), g.normal(0, 0.2), 1, three(g, style))
        x += 2 * w * g.uniform(0.8, 1.2)
    for side in (-1, 1):  # a house front or a hedge along the way
        if g.random() < 0.4:
            x, h, z = side * g.uniform(1.5, 4), g.uniform(0.8, 4), g.uniform(1, 4)
            prims.append(axis_box("box", (min(x, 3 * x), 0, z),
                                  (max(x, 3 * x), h, z + g.uniform(2, back)), three(g, style)))
    furnish(g, style, prims, OUTDOOR[style], lambda z: g.uniform(-1.1, 1.1) * z * spread,
            (min(max(2.5, foot), back - 1), back), eye)
    return prims, eye, 0.0, light


# ---------------------------------------- rays: o [3, 1] or [3, N] and d [3, N] in unit coordinates


def hit(kind, o, d):
    """First crossing of a unit shape in front of the origin -> t [N], inf where there is none."""
    if kind == "ground":
        t = -o[1] / np.where(d[1] < -1e-6, d[1], np.nan)
        return np.where(t > 1e-4, t, np.inf)
    if kind in ("box", "room"):
        inverse = 1 / np.where(np.abs(d) < 1e-7, 1e-7, d)
        t1, t2 = (-1 - o) * inverse, (1 - o) * inverse
        enter = np.minimum(t1, t2).max(0)
        leave = np.maximum(t1, t2).min(0)
        if kind == "room":
            return leave
        return np.where((leave > enter) & (enter > 1e-4), enter, np.inf)
    if kind == "ellipsoid":
        a, b, c = (d * d).sum(0), (o * d).sum(0), (o * o).sum(0) - 1
        t = (-b - np.sqrt(np.maximum(b * b - a * c, 0))) / a
        return np.where((b * b > a * c) & (t > 1e-4), t, np.inf)
    a = d[0] ** 2 + d[2] ** 2 + 1e-12  # cylinder: the tube, then the cap that faces the ray
    b, c = o[0] * d[0] + o[2] * d[2], o[0] ** 2 + o[2] ** 2 - 1
    side = (-b - np.sqrt(np.maximum(b * b - a * c, 0))) / a
    ok = (b * b > a * c) & (side > 1e-4) & (np.abs(o[1] + side * d[1]) < 1)
    dy = np.where(np.abs(d[1]) < 1e-7, 1e-7, d[1])
    cap = (-np.sign(dy) - o[1]) / dy
    x, z = o[0] + cap * d[0], o[2] + cap * d[2]
    cap_ok = (x * x + z * z < 1) & (cap > 1e-4)
    return np.minimum(np.where(ok, side, np.inf), np.where(cap_ok, cap, np.inf))


def camera_rays(scene, height, width):
    """Directions [3, H, W] with unit length along the optical axis, so that t is planar depth."""
    focal = width / 2 / math.tan(scene.fov / 2)
    x = (np.arange(width) + 0.5 - width / 2) / focal
    y = -(np.arange(height) + 0.5 - height / 2) / focal
    grid = np.stack(np.broadcast_arrays(x[None], y[:, None], 1.0)).astype(np.float32)
    return np.tensordot(scene.look.astype(np.float32), grid, 1), focal


def window(prim, scene, focal, height, width):
    """Pixel box that holds the projection of prim: most shapes cover a small part of the frame."""
    full = (0, height, 0, width)
    if prim.kind in ("room", "ground"):
        return full
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8)
    corner = np.linalg.inv(prim.to_unit) @ signs + prim.centre[:, None] - scene.eye[:, None]
    x, y, z = scene.look.T @ corner
    if (z < 0.05).any():
        return full if (z > 0.05).any() else (0, 0, 0, 0)
    u, v = x / z * focal + width / 2, height / 2 - y / z * focal
    return (max(0, int(v.min())), min(height, int(v.max()) + 2),
            max(0, int(u.min())), min(width, int(u.max()) + 2))


def trace(scene, rays, focal):
    """-> depth t [H, W] (inf: sky) and the index of the visible prim [H, W] (−1: sky)."""
    _, height, width = rays.shape
    depth = np.full((height, width), np.inf, np.float32)
    which = np.full((height, width), -1, np.int16)
    for k, prim in enumerate(scene.prims):
        y0, y1, x0, x1 = window(prim, scene, focal, height, width)
        if y1 <= y0 or x1 <= x0:
            continue
        d = prim.to_unit.astype(np.float32) @ rays[:, y0:y1, x0:x1].reshape(3, -1)
        o = (prim.to_unit @ (scene.eye - prim.centre)).astype(np.float32)[:, None]
        t = hit(prim.kind, o, d).reshape(y1 - y0, x1 - x0)
        nearer = t < depth[y0:y1, x0:x1]
        depth[y0:y1, x0:x1][nearer] = t[nearer]
        which[y0:y1, x0:x1][nearer] = k
    return depth, which


def lit(scene, points):
    """Shadow rays from points [3, N] to the light -> True where nothing stands between."""
    d = (scene.light[:, None].astype(np.float32) - points if scene.room
         else scene.light[:, None].astype(np.float32) * 30)
    start = points + 0.004 * d / np.linalg.norm(d, axis=0)
    free = np.ones(points.shape[1], bool)
    for prim in scene.prims:
        # rooms and grounds enclose everything; what is this small has a shadow below a pixel
        if prim.kind in ("room", "ground") or prim.half.max() < 0.03:
            continue
        m = prim.to_unit.astype(np.float32)
        free &= hit(prim.kind, m @ (start - prim.centre[:, None].astype(np.float32)),
                    m @ np.broadcast_to(d, points.shape)) > 1
    return free


# ---------------------------------------------------------------- colour


def paint(s, u, v, footprint, style):
    """Colour [3, N] of a skin at the surface coordinates u, v (metres); detail finer than the
    footprint of a pixel (metres) fades, as it would in a lens."""
    f = s.per_metre
    sharp = np.clip(1.2 - footprint * f * 2, 0, 1)
    a, b = np.floor(u * f).astype(np.int32), np.floor(v * f).astype(np.int32)
    if s.pattern == "checker":
        mix = ((a + b) & 1).astype(np.float32)
    elif s.pattern == "stripes":
        mix = (a & 1).astype(np.float32)
    elif s.pattern == "bricks":
        row = np.floor(v * f * 2).astype(np.int32)
        mix = ((v * f * 2 % 1 < 0.12) | ((u * f + row * 0.5) % 1 < 0.06)).astype(np.float32)
    elif s.pattern == "blots":
        n = grains(style)[s.tile, 0][(v * f * 20).astype(np.int32) & 255,
                                     (u * f * 20).astype(np.int32) & 255]
        mix = (n > 0.4).astype(np.float32)
    elif s.pattern == "grain":
        mix = np.clip(grains(style)[(s.tile + 5) % 16, 0][(v * f * 15).astype(np.int32) & 255,
                                                          (u * f * 15).astype(np.int32) & 255]
                      * 0.4 + 0.5, 0, 1)
    else:
        mix = np.zeros_like(u)
    mix = 0.3 + (mix - 0.3) * sharp if s.pattern != "plain" else mix
    colour = s.a[:, None] + (s.b - s.a)[:, None] * mix
    n = grains(style)[s.tile][:, (v * 60).astype(np.int32) & 255, (u * 60).astype(np.int32) & 255]
    return colour * np.clip(1 + s.grain * n * np.clip(1.2 - footprint * 15, 0.25, 1), 0.1, 2.5)


def shade(scene, rays, depth, which, sun, pixel, style):
    """Linear rgb [3, H, W]: skins, one light with shadows, ambient light
    that weakens towards corners."""
    rgb = np.zeros(rays.shape, np.float32)
    up = np.clip(rays[1] * 2 + 0.1, 0, 1)
    rows, columns = (np.arange(n) * 256 // n for n in rays.shape[1:])
    cloud = grains(style)[3, 0][np.ix_(rows, columns)] if style == "wild" else 0
    rgb[:] = (scene.sky[1][:, None, None] + (scene.sky[0] - scene.sky[1])[:, None, None]
              * np.clip(up + 0.15 * cloud, 0, 1))
    for k in np.unique(which[which >= 0]):
        prim, sel = scene.prims[k], which == k
        t, d = depth[sel], rays[:, sel]
        world = scene.eye[:, None] + t * d
        q = prim.to_unit @ (world - prim.centre[:, None])
        normal, axis, face = surface(prim, q)
        m = q * prim.half[:, None]
        u = np.choose(axis, [m[1] if prim.kind == "ground" else m[2], m[0], m[0]])
        v = np.choose(axis, [m[1], m[2], m[1]])
        colour = np.empty((3, len(t)))
        for j, s in enumerate(prim.skins):
            part = face == j
            if part.any():
                colour[:, part] = paint(s, u[part], v[part], t[part] * pixel, style)
        to_light = (scene.light[:, None] - world if scene.room
                    else np.broadcast_to(scene.light[:, None], world.shape))
        length = np.linalg.norm(to_light, axis=0)
        cosine = (normal * to_light).sum(0) / length
        power = 6 / (2 + length**2) if scene.room else 1.2
        contact = (0.55 + 0.45 * np.clip(world[1] / 0.4, 0, 1)  # less light near the floor
                   if prim.kind not in ("room", "ground") else 1)
        ambient = scene.ambient * (0.7 + 0.3 * normal[1]) * contact
        if prim.kind == "room":  # corners receive less light
            near = np.sort(prim.half[:, None] * (1 - np.abs(q)), axis=0)[1]
            ambient = ambient * (0.45 + 0.55 * np.clip(near / 0.6, 0, 1))
        direct = np.maximum(cosine, 0) * power * sun[sel]
        back = to_light / length - d / np.linalg.norm(d, axis=0)
        shine = (prim.skins[0].gloss
                 * np.maximum((normal * back).sum(0) / np.linalg.norm(back, axis=0), 0) ** 30)
        rgb[:, sel] = (colour * (ambient + direct) + shine * power * sun[sel]) * scene.glow[:, None]
    return rgb


def surface(prim, q):
    """At the unit point q [3, N]: world normal [3, N], its main axis,
    and which skin (side, top, bottom)."""
    n = np.zeros_like(q)
    if prim.kind in ("box", "room"):
        axis = np.abs(q).argmax(0)
        index = np.arange(q.shape[1])
        n[axis, index] = np.sign(q[axis, index]) * (-1 if prim.kind == "room" else 1)
    elif prim.kind == "ground":
        n[1] = 1
    elif prim.kind == "ellipsoid":
        n = q
    else:
        cap = np.abs(q[1]) > 0.999
        n[0], n[1], n[2] = (np.where(cap, 0, q[0]), np.where(cap, np.sign(q[1]), 0),
                            np.where(cap, 0, q[2]))
    axis = np.abs(n).argmax(0)
    face = np.where(axis == 1, np.where(q[1] > 0, 1, 2), 0)
    world = prim.to_unit.T @ n
    return world / np.maximum(np.linalg.norm(world, axis=0), 1e-9), axis, face


def develop(rgb, depth, style, g):
    """Linear light -> uint8 [H, W, 3]. The wild style has a bad camera and bad weather."""
    wild = style == "wild"
    if wild and g.random() < 0.35:
        haze = np.clip(g.uniform(0.4, 1.0) * (0.8 + 0.4 * g.random(3)), 0, 1)
        clear = np.exp(-np.minimum(depth, 60) * np.exp(g.uniform(-4.0, -2.5)))
        rgb = rgb * clear + haze[:, None, None] * (1 - clear)
    if wild:
        rgb = rgb * np.exp(g.normal(0, 0.12, 3))[:, None, None]
    white = np.quantile(rgb.mean(0), 0.95) + 1e-3
    rgb = np.clip(rgb / white * (g.uniform(0.6, 1.1) if wild else 0.85), 0, 1) ** (1 / 2.2)
    if wild:
        rgb = rgb + g.normal(0, 1, rgb.shape) * np.exp(g.uniform(-5.5, -3.5))
    picture = Image.fromarray((np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
    if wild and g.random() < 0.25:
        picture = picture.filter(ImageFilter.GaussianBlur(g.uniform(0.3, 0.6)))
    return np.asarray(picture)


def render(seed, style="clean", size=128):
    """A seed (int or list of ints), "clean" or "wild", size or (H, W)
    -> rgb uint8 [H, W, 3], depth float32 [H, W] in metres along the optical axis
    (0: sky or beyond FAR)."""
    height, width = (size, size) if isinstance(size, int) else size
    for attempt in range(20):  # a lens pressed against a wall teaches nothing: draw again
        scene, g = build([*np.atleast_1d(seed), attempt], style)
        rays, focal = camera_rays(scene, height, width)  # depth, and shadows, at the pixel centres
        depth, which = trace(scene, rays, focal)
        seen = np.bincount(which.reshape(-1) + 1)
        if ((seen > 0).sum() >= 5 and seen.max() < 0.75 * seen.sum()
                and np.quantile(depth, 0.1) > 0.4):
            break
    points = (scene.eye[:, None].astype(np.float32)
              + np.minimum(depth, 1e3).reshape(-1) * rays.reshape(3, -1))
    sun = lit(scene, points).reshape(height, width)
    fine, focal2 = camera_rays(scene, 2 * height, 2 * width)  # colour from four rays a pixel
    depth2, which2 = trace(scene, fine, focal2)
    sun2, owner = (a.repeat(2, 0).repeat(2, 1) for a in (sun, which))
    rgb = shade(scene, fine, depth2, which2, sun2 | (owner != which2), 1 / focal2, style)
    rgb = rgb.reshape(3, height, 2, width, 2).mean((2, 4))
    return develop(rgb, depth, style, g), np.where(depth < FAR, depth, 0).astype(np.float32)


# ---------------------------------------------------------------- writing a data-set folder


def ignore_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one sentence from the parent is enough


def write(job):
    """Renders one frame and writes it, colour last, each file whole or not at all."""
    folder, style, split, index, size, with_depth = job
    rgb, depth = render([STYLES.index(style), SPLITS[split], index], style, size)
    files = [("depth", (depth * 1000 + 0.5).astype(np.uint16))] * with_depth + [("rgb", rgb)]
    for kind, array in files:
        path = folder / f"{kind}_{index:05d}.png"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        Image.fromarray(array).save(temporary, format="PNG", compress_level=3)
        os.replace(temporary, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).parent / "data",
                        help="folder to write; existing frames are kept")
    parser.add_argument("--clean", type=int, default=24000,
                        help="frames of clean/train (image and depth): the synthetic set")
    parser.add_argument("--wild", type=int, default=20000,
                        help="frames of wild/train (images only): the real set")
    parser.add_argument("--labelled", type=int, default=64000,
                        help="frames of wild/labelled (image and depth): "
                             "for the teacher and the autoencoder; train.py never sees them")
    parser.add_argument("--test", type=int, default=256,
                        help="frames each of clean/test and wild/test (image and depth)")
    parser.add_argument("--val", type=int, default=64,
                        help="frames of wild/val (image and depth): watched while training")
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    a = parser.parse_args(argv)
    if a.workers < 1 or a.size < 8 or min(a.clean, a.wild, a.labelled, a.test, a.val) < 0:
        parser.error("--workers from 1 up, --size from 8 up, numbers of frames from 0 up")
    try:
        return make(a)
    except OSError as error:
        print(f"error: {error.filename or a.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def make(a):
    """Writes all frames that are not there yet."""
    jobs = []
    for style, split, count, with_depth in (
            ("clean", "test", a.test, 1), ("wild", "test", a.test, 1), ("wild", "val", a.val, 1),
            ("clean", "train", a.clean, 1), ("wild", "labelled", a.labelled, 1),
            ("wild", "train", a.wild, 0)):
        folder = a.out / style / split
        folder.mkdir(parents=True, exist_ok=True)
        jobs += [(folder, style, split, i, a.size, with_depth) for i in range(count)
                 if not (folder / f"rgb_{i:05d}.png").exists()]
    ready = next(iter(sorted(a.out.rglob("rgb_*.png"))), None)
    if ready and max(Image.open(ready).size) != a.size:
        sys.exit(f"error: {a.out}: holds frames of {Image.open(ready).size[0]} pixels, not --size "
                 f"{a.size}; choose another folder")
    with get_context("spawn").Pool(a.workers, ignore_interrupts) as pool:
        for _ in tqdm(pool.imap_unordered(write, jobs, chunksize=8), total=len(jobs), unit="frame"):
            pass
    print(f"{a.out}: clean/train {a.clean}, wild/train {a.wild}, wild/labelled {a.labelled}, "
          f"test {a.test} each, wild/val {a.val}")


if __name__ == "__main__":
    sys.exit(main())
