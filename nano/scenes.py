"""The small world: ray-cast rooms, tables, gardens and streets with exact depth, in numpy.

    python nano/scenes.py            # nano/data: what train.py and evaluate.py read, on all cores
    python nano/scenes.py OUT --clean 500 --wild 500 --test 64 --size 96
    python nano/scenes.py OUT --labelled 8000 --clean 0 --wild 0 --size 160    # for the teacher

Two styles with a real gap between them, in the roles of the paper's two kinds of data (Sec. 4.1):
*clean* (the synthetic set: plain materials, neutral light, tidy furniture, a level camera, exact
depth) and *wild* (the real set: any camera, people, clutter, photographic textures, fog, colour
casts, blur and noise). Not needed to understand the paper: it writes an ordinary data-set folder,
rgb_*.png (8 bit) and depth_*.png (16 bit, millimetres of planar depth, 0 = sky or beyond FAR),
which data.py reads as "nano".
"""
import argparse
import functools
import json
import math
import os
import signal
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from things import (HUNG, INDOOR, OUTDOOR, PAVEMENT, ROAD, SMALL, WALL, Part, legs, person, pick,
                    rotation, tree)

WORLD = 2  # raised with every change of a frame: frames of two worlds are never mixed in a folder
FAR = 65.0  # metres, near the most that 16 bits of millimetres hold; beyond is 0, like the sky
STYLES = ("clean", "wild")
# part of the seed: no split ever shares a scene
SPLITS = {"train": 0, "labelled": 1, "test": 2, "val": 3}
KINDS = ("box", "room", "ground", "cylinder", "ellipsoid")
PATTERNS = ("plain", "checker", "stripes", "bricks", "patches", "windows", "blots", "grain")


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
    pattern: int  # of PATTERNS
    tile: int  # which 1/f texture
    a: np.ndarray  # [3] linear rgb
    b: np.ndarray
    per_metre: float  # pattern cells per metre
    grain: float  # strength of the 1/f texture
    gloss: float
    glow: float  # light of its own, times a


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
        tiles.append(n[:1] * 0.95 + n[1:] * 0.15 * (style == "wild"))
    return np.stack(tiles).astype(np.float32)


# material: its pattern, the cells of it a metre, and its colours (linear rgb), one drawn each time
MATERIALS = {"dark": ("plain", 1, 1, [(0.03, 0.03, 0.035)]),
             "white": ("plain", 1, 1, [(0.8, 0.8, 0.77)]),
             "light": ("plain", 1, 1, [(1.0, 0.97, 0.9)]),
             "flesh": ("plain", 1, 1, [(0.7, 0.42, 0.3), (0.3, 0.16, 0.1)]),
             "leaf": ("blots", 1, 6, [(0.07, 0.16, 0.03), (0.14, 0.25, 0.05), (0.3, 0.22, 0.04)]),
             "wood": ("grain", 1, 4, [(0.35, 0.18, 0.08), (0.15, 0.07, 0.03), (0.5, 0.33, 0.18)]),
             "ground": ("grain", 0.2, 2, [(0.2, 0.2, 0.2), (0.35, 0.33, 0.3), (0.1, 0.2, 0.04),
                                          (0.2, 0.25, 0.08), (0.5, 0.4, 0.25), (0.7, 0.7, 0.72)]),
             "road": ("plain", 1, 1, [(0.15, 0.15, 0.16), (0.3, 0.3, 0.29)]),
             "wall": ("plain", 1, 1, [(0.75, 0.72, 0.65), (0.8, 0.8, 0.8), (0.6, 0.5, 0.35),
                                      (0.45, 0.5, 0.45)]),
             "house": ("windows", 0.2, 0.5, [(0.6, 0.55, 0.45), (0.4, 0.2, 0.13), (0.7, 0.7, 0.68),
                                             (0.35, 0.33, 0.3), (0.6, 0.45, 0.2)]),
             "books": ("patches", 15, 30, None), "patches": ("patches", 3, 12, None),
             "folds": ("stripes", 6, 15, None)}
# of PATTERNS, on any other surface
CHANCE = {"clean": np.cumsum([0.6, 0.1, 0.15, 0.1, 0, 0, 0.05, 0]),
          "wild": np.cumsum([0.5, 0.04, 0.12, 0.06, 0.06, 0, 0.1, 0.12])}


def skin(g, style, slot="a"):
    """A random surface of the material that slot names."""
    wild = style == "wild"
    tint = 1 - g.uniform(0, 0.9 if wild else 0.6) * g.random(3)
    hue = g.uniform(0.05, 0.85) * (np.sort(tint)[::-1] if g.random() < 0.5 else tint)  # often warm
    other = hue * g.uniform(0.35, 1.6) if g.random() < 0.7 else g.uniform(0.05, 0.8, 3)
    pattern = int(np.searchsorted(CHANCE[style], g.random()))
    per_metre = math.exp(g.uniform(0.3, 2.3))
    if slot in MATERIALS:
        name, low, high, hues = MATERIALS[slot]
        pattern, per_metre = PATTERNS.index(name), g.uniform(low, high)
        if hues:
            hue = (np.array(hues[g.integers(len(hues))]) * g.uniform(0.6, 1.25)
                   * np.exp(g.normal(0, 0.15 if wild else 0.05, 3)))
            other = hue * g.uniform(0.3, 0.8) if slot != "house" else g.uniform(0.02, 0.2, 1)
    return Skin(pattern, int(g.integers(16)), hue, np.broadcast_to(other, 3), per_metre,
                g.uniform(0.05, 0.4) if wild else g.uniform(0, 0.2),
                (g.random() < 0.25) * g.uniform(0.1, 0.5),
                (slot == "light") * g.uniform(0.3, 2.5 if wild else 1))


def place(g, style, prims, parts, at, yaw=0.0, scale=1.0):
    """Puts an object's parts into the world at the point at [3]; a part wears the skin of its slot
    on all sides."""
    turn, wear = rotation(yaw), functools.cache(lambda slot: skin(g, style, slot))
    for p in parts:
        local = turn if p.turn is None else turn @ p.turn
        half = np.asarray(p.half, float) * scale
        centre = turn @ (np.asarray(p.centre, float) * scale) + at
        prims.append(Prim(p.kind, centre, local.T / half[:, None], half, (wear(p.slot),) * 3))


def axis_box(kind, low, high, skins):
    """A box from corner to corner, whichever way round."""
    low, high = np.minimum(low, high).astype(float), np.maximum(low, high).astype(float)
    half = (high - low) / 2
    return Prim(kind, (low + high) / 2, np.diag(1 / half), half, skins)


class Scene(NamedTuple):
    prims: list
    eye: np.ndarray  # [3]
    look: np.ndarray  # [3, 3] camera to world
    fov: float  # horizontal, radians
    light: np.ndarray  # [3] a point (rooms) or a direction (outdoors)
    room: bool
    glow: np.ndarray  # [3] colour of the light
    ambient: float
    sky: np.ndarray  # [2, 3] zenith, horizon
    power: float = 1.0  # of the light
    kind: str = ""  # of SCENES


def furnish(g, style, prims, kinds, x_at, z_range, eye):
    """Drops 4 to 12 objects that neither overlap nor block the camera; some carry small ones.
    x_at: draws where across, at a distance z"""
    n = int(g.integers(4, 10 if style == "clean" else 13))
    taken = [(eye[0], eye[2], 0.5)]
    for _ in range(4 * n):
        z = g.uniform(*z_range)
        x = x_at(z)
        parts = pick(g, kinds[style])
        scale = g.uniform(0.85, 1.15) if style == "clean" else g.uniform(0.85, 1.2)
        reach = scale * max(np.abs(np.asarray(p.centre)[[0, 2]]).max()
                            + min(max(p.half[0], p.half[2]), 1.5) * 0.7 for p in parts)
        if any(math.hypot(x - u, z - v) < reach + r for u, v, r in taken):
            continue
        taken.append((x, z, reach))
        quarter = g.integers(4) * math.pi / 2
        yaw = (quarter + g.normal(0, 0.1) if style == "clean" or g.random() < 0.3
               else g.uniform(0, 6.3))
        place(g, style, prims, parts, np.array([x, 0, z]), yaw, scale)
        top = parts[0]
        if top.kind == "box" and top.centre[1] < 0.9 and g.random() < 0.6:
            up = scale * (top.centre[1] + top.half[1])
            strew(g, style, prims, np.array([x, up, z]), scale * min(top.half[0], top.half[2]),
                  1 if style == "clean" else 4)
        if len(taken) > n:
            return


def strew(g, style, prims, at, reach, most):
    """1 to `most` small things around the point at [3], up to reach metres away."""
    for _ in range(g.integers(1, most + 1)):
        x, z = g.uniform(-0.8, 0.8, 2) * reach * (most > 1)
        place(g, style, prims, pick(g, SMALL[style]), at + [x, 0, z], g.uniform(0, 6.3),
              g.uniform(0.6, 1.0))


def along(g, style, prims, kinds, start, yaw, length, gap):
    """Things with their backs to a wall that goes on for `length` metres to the right of start [3];
    yaw: the way into the wall."""
    side, s = rotation(yaw), g.uniform(0.1, 1)
    while True:
        parts = pick(g, kinds[style])
        w = max(abs(p.centre[0]) + p.half[0] for p in parts)
        d = max(p.centre[2] + p.half[2] for p in parts)
        if s + 2 * w > length:
            return
        place(g, style, prims, parts, start + side @ [s + w, 0, -d - 0.02], yaw)
        s += 2 * w + g.exponential(gap * (3 if style == "clean" else 1))


def indoors(g, style, w, near, deep, h):
    """Walls with furniture along them and things on them, a ceiling with lamps -> prims, the lamp
    that shines [3]"""
    floor = skin(g, style, g.choice(["wood", "a", "ground"]))
    wall, roof = skin(g, style, g.choice(["wall", "a"])), skin(g, style, "white")
    prims = [axis_box("room", (-w, 0, -near), (w, h, deep), (wall, roof, floor))]
    for start, yaw, length in (((-w, 0, deep), 0, 2 * w), ((w, 0, deep), math.pi / 2, deep + near),
                               ((-w, 0, -near), -math.pi / 2, deep + near)):
        if g.random() < 0.75:
            along(g, style, prims, WALL, start, yaw, length, 0.4)
        along(g, style, prims, HUNG, start, yaw, length, 0.8)
    if g.random() < 0.3:  # a corner that juts out
        side = g.choice([-w, w])
        prims.append(axis_box("box", (side, 0, deep - g.uniform(0.2, 2)),
                              (side * g.uniform(0.2, 0.9), h, deep), (wall,) * 3))
    for _ in range(g.integers(0, 4)):
        x, z, r = g.uniform(-0.8, 0.8) * w, g.uniform(0.2, 0.9) * deep, g.uniform(0.05, 0.3)
        place(g, style, prims, [Part("cylinder", (x, h, z), (r, 0.05, r), "light")], np.zeros(3))
    if g.random() < 0.3:  # a carpet
        size = (g.uniform(0.5, 1.2), 0.012, g.uniform(0.5, 1.2))
        place(g, style, prims, [Part("box", (0, 0, 0), size, "patches")],
              np.array([g.uniform(-0.4, 0.4) * w, 0, g.uniform(0.3, 0.7) * deep]))
    return prims, np.array([g.uniform(-0.8, 0.8) * w, h - 0.2, g.uniform(-0.1, 0.9) * deep])


def room(g, style, spread):
    """-> prims, the lamp [3], eye [3], yaw, pitch; metres, radians.   spread: tan(fov / 2)"""
    wild = style == "wild"
    w, deep, h = g.uniform(1.2, 4.0), math.exp(g.uniform(0.9, 2.2)), g.uniform(2.3, 3.6)
    prims, light = indoors(g, style, w, 1.5, deep, h)
    height = g.uniform(0.7, 2.0) if wild else g.uniform(1.0, 1.8)
    pitch = slope(g, -0.2, 0.5) if wild else g.uniform(0.0, 0.3)
    eye = np.array([g.uniform(-0.6, 0.6) * w, height, 0])

    def x_at(z):  # between the walls, and in view
        return g.uniform(-1, 1) * min(w - 0.5, eye[0] + (z + 0.3) * spread * 1.1 + 0.2)

    near = min(foot(height, pitch) if wild else 1.5, 2.5, deep - 1)
    furnish(g, style, prims, INDOOR, x_at, (near, deep - 0.4), eye)
    return prims, light, eye, g.normal(0, 0.5 if wild else 0.15), pitch


def slope(g, low, high):
    """The pitch of a wild camera: level, more or less, or else anything to straight down."""
    return g.uniform(low, high) if g.random() < 0.85 else g.uniform(high, math.pi / 2)


def foot(height, pitch):
    """How far off, about, the bottom of the frame meets the ground, metres: things may begin a
    little nearer."""
    return max(0.8, 0.75 * height / math.tan(min(max(pitch + 0.45, 0.1), 1.4)))


def tabletop(g, style, spread):
    """Things on a table or on the floor, from near, from the side to straight above -> as room"""
    wild = style == "wild"
    w, deep, h = g.uniform(1.5, 3.0), g.uniform(2.0, 4.0), g.uniform(2.3, 3.0)
    prims, light = indoors(g, style, w, w, deep, h)
    up, a, b = g.choice([0.0, 0.45, 0.75, 0.75]), *g.uniform(0.35, 1.0, 2)
    at, yaw = np.array([0, up, 0.3]), g.normal(0, 0.4)
    if up:
        top = [Part("box", (0, up - 0.02, 0), (a, 0.02, b), g.choice(["wood", "a", "white"]))]
        place(g, style, prims, top + legs(a, b, up, 0.03), np.array([0, 0, 0.3]))
    elevation = g.uniform(0.2, 1.57) if wild else g.uniform(0.4, 0.9)
    r = math.exp(g.uniform(-0.7, 0.4)) if wild else g.uniform(0.9, 1.6)
    strew(g, style, prims, at, min(a, b, r * spread), 14 if wild else 6)
    if wild and g.random() < 0.4:  # somebody behind it
        place(g, style, prims, person(g), np.array([g.normal(0, 0.3), 0, b + 0.6]),
              g.normal(math.pi, 0.4))
    away = rotation(yaw, elevation) @ [0, 0, -r]
    eye = at + away + [0, 0.06, 0]
    return prims, light, np.minimum(eye, [w, h - 0.2, deep]), yaw, elevation + g.normal(0, 0.1)


def sunlight(g):
    return np.array([g.normal(0, 1), g.uniform(0.4, 1.5), g.normal(-0.3, 0.8)])


def garden(g, style, spread):
    """Ground, something behind, perhaps something along the way, things -> as room; the light is
    a direction."""
    wild = style == "wild"
    height = math.exp(g.uniform(-1.2, 1.0)) if wild else g.uniform(1.0, 1.8)
    pitch = slope(g, -0.15, 0.4) if wild else g.uniform(0, 0.3)
    prims = [Prim("ground", np.zeros(3), np.eye(3), np.ones(3), (skin(g, style, "ground"),) * 3)]
    back = math.exp(g.uniform(1.2, 3.4)) if wild else g.uniform(4, 11)
    x = -back * spread * 1.3
    # a street front, a hedge or hills behind
    while x < back * spread * 1.3 and g.random() < 0.93:
        w, h = g.uniform(1, 4.5) * max(1, back / 8), g.uniform(0.6, 4.5) * max(1, back / 12)
        deep = g.uniform(1, 4)
        part = (Part("ellipsoid", (0, 0, 0), (w * 1.3, h, deep), "leaf")
                if wild and g.random() < 0.6 else Part("box", (0, h, 0), (w, h, deep), "house"))
        place(g, style, prims, [part], np.array([x + w, 0, back * g.uniform(0.8, 1.3)]),
              g.normal(0, 0.2))
        x += 2 * w * g.uniform(0.8, 1.2)
    for side in (-1, 1):  # a house front or a hedge along the way
        if g.random() < 0.3:
            x, z = side * g.uniform(1.5, 4), g.uniform(1, 4)
            prims.append(axis_box("box", (x, 0, z), (3 * x, g.uniform(0.8, 4), z + back / 2),
                                  (skin(g, style, g.choice(["house", "leaf"])),) * 3))
    near = min(foot(height, pitch) if wild else 2.5, back - 1)
    eye = np.array([0, height, 0.0])
    furnish(g, style, prims, OUTDOOR, lambda z: g.uniform(-1.1, 1.1) * z * spread,
            (near, min(back, near + 12)), eye)
    return prims, sunlight(g), eye, 0.0, pitch


def street(g, style, spread):
    """A road along z between pavements and houses, with cars, people, trees and lamps -> as
    garden"""
    half, walk, end = g.uniform(2.5, 7), g.uniform(1.2, 4), math.exp(g.uniform(3.0, 4.6))
    road, path, high = skin(g, style, "road"), skin(g, style, "ground"), g.uniform(4, 15)
    prims = [Prim("ground", np.zeros(3), np.eye(3), np.ones(3), (road,) * 3)]
    for side in (-1, 1):
        kerb, front = side * half, side * (half + walk)
        prims.append(axis_box("box", (kerb, -1, -20), (9 * front, 0.13, end + 40), (path,) * 3))
        z = g.uniform(-12, 0)
        while z < end:  # houses, gaps, trees behind the fence
            deep, x = g.uniform(5, 20), front + side * g.uniform(0, 1.5 if high > 7 else 6)
            if g.random() < (0.85 if high > 7 else 0.6):
                prims.append(axis_box("box", (x, 0, z), (x + 9 * side, high * g.uniform(0.7, 1.3),
                                                         z + deep), (skin(g, style, "house"),) * 3))
            else:
                place(g, style, prims, tree(g), np.array([x + 3 * side, 0, z + deep / 2]), 0, 1.5)
            z += deep * g.uniform(1, 1.1)
        for kinds, x, gap in ((ROAD, kerb - 1.1 * side, g.uniform(0.5, 12)),
                              (PAVEMENT, kerb + 0.8 * side, g.uniform(3, 10)),
                              (ROAD, kerb - 3.6 * side, g.uniform(10, 50))):
            z = g.uniform(1, 8) if abs(x) > 1.2 and g.random() < 0.75 else 50
            while z < min(end, 50):
                yaw = (math.pi * (side < 0) + g.normal(0, 0.05) if kinds is ROAD
                       else g.uniform(0, 6.3))
                place(g, style, prims, pick(g, kinds[style]),
                      np.array([x + g.normal(0, 0.2), 0.13 * (kinds is PAVEMENT), z]), yaw)
                z += 5 + g.exponential(gap)
    if g.random() < 0.7:  # lane marks
        dash, paint = g.uniform(1, 4), (skin(g, style, "white"),) * 3
        prims += [axis_box("box", (-0.08, 0, z), (0.08, 0.006, z + dash), paint)
                  for z in np.arange(g.uniform(-2, 2), 45, dash + g.uniform(2, 6))]
    if g.random() < 0.5:  # a house across the end
        prims.append(axis_box("box", (-40, 0, end), (40, high * g.uniform(0.5, 1.3), end + 9),
                              (skin(g, style, "house"),) * 3))
    x = g.uniform(-0.7, 0.7) * half if g.random() < 0.6 else g.choice([-1, 1]) * (half + walk / 2)
    height, yaw, pitch = g.uniform(1.3, 2.2), g.normal(0, 0.15), g.uniform(0, 0.12)
    if style == "wild":
        height = g.uniform(1.0, 2.6) if g.random() < 0.8 else g.uniform(2.6, 9)
        yaw = g.normal(0, 0.3) if g.random() < 0.75 else g.uniform(-1.5, 1.5)
        pitch = g.normal(0.02 + 0.03 * height, 0.1)
    return prims, sunlight(g), np.array([x, height, 0]), yaw, pitch


# share of each kind of scene
SCENES = {"clean": {room: 0.55, tabletop: 0.1, garden: 0.15, street: 0.2},
          "wild": {room: 0.46, tabletop: 0.14, garden: 0.18, street: 0.22}}


def build(seed, style):
    """A seed (list of ints) -> Scene, and the generator,
    which goes on to draw the camera's faults."""
    g = np.random.default_rng(seed)  # another order of the draws is another world
    wild = style == "wild"
    kinds, shares = zip(*SCENES[style].items())
    kind = kinds[int(np.searchsorted(np.cumsum(shares)[:-1], g.random()))]
    fov = math.radians(g.uniform(42, 85) if wild else g.uniform(55, 75))
    prims, light, eye, yaw, pitch = kind(g, style, math.tan(fov / 2))
    roll = g.normal(0, 0.05 if wild else 0.01)
    warm = np.array([1, g.uniform(0.85, 1), g.uniform(0.55, 1.1)] if wild else [1, 0.97, 0.92])
    sky = np.array([[0.35, 0.55, 0.95], [0.8, 0.88, 1]])
    if wild:  # from clear blue to dull grey, sometimes an evening
        sky = (sky + (sky.mean(1, keepdims=True) - sky) * g.uniform(0, 1)
               + g.normal(0, 0.05, (2, 3)) + g.uniform(-0.3, 0.2))
        sky = np.clip(sky, 0.1, 1.2)
    return Scene(prims, eye, rotation(yaw, pitch, roll), fov, light, kind in (room, tabletop), warm,
                 g.uniform(0.15, 0.7) if wild else 0.35, sky, g.uniform(0.2, 1) if wild else 1.0,
                 kind.__name__), g


# ---------------------------------------- rays: o [3, 1] or [3, N] and d [3, N] in unit coordinates


def dot(a, b):
    """[3, N] and [3, N] -> [N], several times faster than numpy's sum over so short an axis"""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def hit(kind, o, d):
    """First crossing of a unit shape in front of the origin -> t [N], inf where there is none."""
    if kind == "ground":
        t = -o[1] / np.where(d[1] < -1e-6, d[1], np.nan)
        return np.where(t > 1e-4, t, np.inf)
    if kind in ("box", "room"):
        inverse = 1 / np.where(np.abs(d) < 1e-7, 1e-7, d)
        t1, t2 = (-1 - o) * inverse, (1 - o) * inverse
        low, high = np.minimum(t1, t2), np.maximum(t1, t2)
        enter = np.maximum(np.maximum(low[0], low[1]), low[2])
        leave = np.minimum(np.minimum(high[0], high[1]), high[2])
        if kind == "room":
            return leave
        return np.where((leave > enter) & (enter > 1e-4), enter, np.inf)
    if kind == "ellipsoid":
        a, b, c = dot(d, d), dot(o, d), dot(o, o) - 1
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
    """Directions [3, 2H + 1, 2W + 1] with length 1 along the optical axis, so that t is planar
    depth: two rays a pixel each way, every second one (from 1) through a pixel's centre."""
    focal = width / 2 / math.tan(scene.fov / 2)
    x = (np.arange(2 * width + 1) - width) / 2 / focal
    y = (height - np.arange(2 * height + 1)) / 2 / focal
    grid = np.stack(np.broadcast_arrays(x[None], y[:, None], 1.0)).astype(np.float32)
    return np.tensordot(scene.look.astype(np.float32), grid, 1), focal


CORNERS = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8)


def window(prim, scene, rays):
    """Box of rays that holds the projection of prim: most shapes cover a small part of the frame.
    -> top, bottom, left, right"""
    height, width = rays.shape[1:]
    full = (0, height, 0, width)
    if prim.kind in ("room", "ground"):
        return full
    to_world = prim.to_unit.T * prim.half**2  # the inverse of to_unit = turn.T / half
    x, y, z = scene.look.T @ (to_world @ CORNERS + (prim.centre - scene.eye)[:, None])
    if z.min() < 0.05:
        return full if z.max() > 0.05 else (0, 0, 0, 0)
    focal = (width - 1) / 2 / math.tan(scene.fov / 2)
    u, v = x / z * focal + (width - 1) / 2, (height - 1) / 2 - y / z * focal
    return (max(0, int(v.min())), min(height, int(v.max()) + 2),
            max(0, int(u.min())), min(width, int(u.max()) + 2))


def trace(scene, rays):
    """-> depth t [H, W] (inf: sky) and the index of the visible prim [H, W] (−1: sky)."""
    depth = np.full(rays.shape[1:], np.inf, np.float32)
    which = np.full(rays.shape[1:], -1, np.int16)
    for k, prim in enumerate(scene.prims):
        y0, y1, x0, x1 = window(prim, scene, rays)
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
    light = scene.light.astype(np.float32)[:, None]
    d = light - points if scene.room else np.broadcast_to(light * 60, points.shape)
    toward = d / np.sqrt(dot(d, d))
    start = points + 0.004 * toward
    free = np.ones(points.shape[1], bool)
    for prim in scene.prims:
        # rooms and grounds enclose everything; what is this small has a shadow below a pixel
        distance = np.linalg.norm(prim.centre - scene.eye)
        if prim.kind in ("room", "ground") or prim.half.max() < 0.02 + 0.01 * distance:
            continue
        to_centre = prim.centre.astype(np.float32)[:, None] - points
        ahead = dot(to_centre, toward)  # only rays that pass near enough are tried
        near = free & (dot(to_centre, to_centre) - ahead * ahead < (prim.half**2).sum())
        m, n = prim.to_unit.astype(np.float32), np.flatnonzero(near)
        t = hit(prim.kind, m @ (start[:, n] - prim.centre.astype(np.float32)[:, None]), m @ d[:, n])
        free[n] = t > 1
    return free


# ---------------------------------------------------------------- colour


def paint(s, u, v, footprint, style):
    """Colours [3, N]; s: a Skin of arrays [N] and [3, N]; u, v: surface coordinates in metres.
    Detail finer than the footprint of a pixel (metres) fades, as it would in a lens."""
    def tile(number, channel, per_metre):
        column, row = (((x * per_metre).astype(np.int32) & 255) for x in (u, v))
        return grains(style)[number, channel, row, column]

    f, mix = s.per_metre, np.zeros_like(u)
    x, y = u * f, v * f
    a, b = np.floor(x).astype(np.int32), np.floor(y).astype(np.int32)
    for pattern, value in (
            ("checker", lambda: (a + b) & 1), ("stripes", lambda: a & 1),
            ("bricks", lambda: (y * 2 % 1 < 0.12) | ((x + np.floor(y * 2) * 0.5) % 1 < 0.06)),
            ("patches", lambda: (a * 7919 + b * 104729 + (a * b & 31) * 31) % 97 / 60),
            ("windows", lambda: (np.abs(x % 1 - 0.5) < 0.25) & (np.abs(y * 0.9 % 1 - 0.5) < 0.3)),
            ("blots", lambda: tile(s.tile, 0, f * 20) > 0.4),
            ("grain", lambda: np.clip(tile((s.tile + 5) & 15, 0, f * 15) * 0.4 + 0.5, 0, 1))):
        here = s.pattern == PATTERNS.index(pattern)
        if here.any():
            mix = np.where(here, value(), mix)
    patterned = s.pattern > 0
    mix = np.where(patterned, 0.3 + (mix - 0.3) * np.clip(1.2 - footprint * f * 2, 0, 1), mix)
    colour = s.a + (s.b - s.a) * mix
    fine, coarse = (tile(s.tile[None], np.arange(3)[:, None], scale) for scale in (60, 5))
    grain = fine * np.clip(1.2 - footprint * 15, 0.2, 1) + coarse * 0.5 * (style == "wild")
    return colour * np.clip(1 + s.grain * grain, 0.1, 2.5)


def shade(scene, rays, depth, which, sun, pixel, style):
    """Linear rgb [3, H, W]: skins, one light with shadows, ambient light
    that weakens towards corners."""
    up = np.clip(rays[1] * 2 + 0.1, 0, 1)
    rows, columns = (np.arange(n) * 256 // n for n in rays.shape[1:])
    cloud = grains(style)[3, 0][np.ix_(rows, columns)] if style == "wild" else 0
    sky = scene.sky.astype(np.float32)[..., None, None]
    rgb = sky[1] + (sky[0] - sky[1]) * np.clip(up + 0.15 * cloud, 0, 1)
    seen = which >= 0
    k, t, d, sun = which[seen], depth[seen], rays[:, seen], sun[seen]
    kind, centre, half, to_unit = (  # of the prim behind each ray: [N], [3, N], [3, N], [3, 3, N]
        np.stack(column, -1).astype(np.float32)[..., k] for column in
        zip(*((KINDS.index(p.kind), p.centre, p.half, p.to_unit) for p in scene.prims)))
    world = scene.eye.astype(np.float32)[:, None] + t * d
    q = world - centre
    q = np.stack([dot(row, q) for row in to_unit])
    normal, axis, face = surface(kind, q)
    normal = np.stack([dot(row, normal) for row in to_unit.swapaxes(0, 1)])
    normal /= np.sqrt(dot(normal, normal)) + 1e-9
    m = q * half
    u, v = np.where(axis == 0, m[2], m[0]), np.where(axis == 1, m[2], m[1])
    # three rows a prim: sides, top, bottom
    skins = Skin(*(np.stack(column, -1)[..., 3 * k + face]
                   for column in zip(*(s for p in scene.prims for s in p.skins))))
    colour = paint(skins, u, v, t * pixel, style)
    light = scene.light.astype(np.float32)[:, None]
    to_light = light - world if scene.room else np.broadcast_to(light, world.shape)
    length = np.sqrt(dot(to_light, to_light))
    to_light = to_light / length
    power = sun * scene.power * (6 / (2 + length**2) if scene.room else 1.2)
    enclosing = (kind == KINDS.index("room")) | (kind == KINDS.index("ground"))
    # less light near the floor, and in the corners of a room
    contact = np.where(enclosing, 1, 0.55 + 0.45 * np.clip(world[1] / 0.4, 0, 1))
    wall = half * (1 - np.abs(q))  # metres to the walls; the middle one of three
    near = np.maximum(np.minimum(wall[0], wall[1]),
                      np.minimum(np.maximum(wall[0], wall[1]), wall[2]))
    corner = np.where(kind == KINDS.index("room"), 0.45 + 0.55 * np.clip(near / 0.6, 0, 1), 1)
    ambient = scene.ambient * (0.7 + 0.3 * normal[1]) * contact * corner
    direct = np.maximum(dot(normal, to_light), 0) * power
    back = to_light - d / np.sqrt(dot(d, d))
    shine = np.maximum(dot(normal, back) / np.sqrt(dot(back, back)), 0) ** 30
    rgb[:, seen] = ((colour * (ambient + direct + skins.glow) + skins.gloss * shine * power)
                    * scene.glow.astype(np.float32)[:, None])
    return rgb


def surface(kind, q):
    """At the unit points q [3, N] of shapes of these kinds [N]: normal [3, N] in unit coordinates,
    its main axis, and which skin (side, top, bottom)."""
    flat = np.abs(q).argmax(0)
    flat = np.where(kind == KINDS.index("ground"), 1, flat)
    tube = kind == KINDS.index("cylinder")
    cap = tube & (np.abs(q[1]) > 0.999)
    flat = np.where(cap, 1, flat)
    inward = np.where(kind == KINDS.index("room"), -1, 1)
    one = inward * np.sign(q) * (np.arange(3)[:, None] == flat)
    one[1] += kind == KINDS.index("ground")
    n = np.where((tube & ~cap) | (kind == KINDS.index("ellipsoid")), q, one)
    n[1] = np.where(tube & ~cap, 0, n[1])
    axis = np.abs(n).argmax(0)
    return n, axis, np.where(axis == 1, np.where(q[1] > 0, 1, 2), 0)


def develop(rgb, depth, style, g):
    """Linear light -> uint8 [H, W, 3]. The wild style has a bad camera and bad weather."""
    wild = style == "wild"
    if wild and g.random() < 0.25:
        haze = np.clip(g.uniform(0.4, 1.0) * (0.8 + 0.4 * g.random(3)), 0, 1)
        clear = np.exp(-np.minimum(depth, 100) * np.exp(g.uniform(-5.0, -2.5)))
        rgb = rgb * clear + haze[:, None, None] * (1 - clear)
    if wild:
        rgb = rgb * np.exp(g.normal(0, 0.12, 3))[:, None, None]
    white = np.quantile(rgb.mean(0), 0.95) + 1e-3
    rgb = np.clip(rgb / white * (g.uniform(0.6, 1.2) if wild else 0.85), 0, 1) ** (1 / 2.2)
    if wild:
        rgb = rgb + g.normal(0, 1, rgb.shape) * np.exp(g.uniform(-5.5, -3.5))
    picture = Image.fromarray((np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
    if wild and g.random() < 0.25:
        picture = picture.filter(ImageFilter.GaussianBlur(g.uniform(0.3, 0.7)))
    return np.asarray(picture)


def soften(sun, radius):
    """Shadows [H, W] with an edge as soft as that of a wide light."""
    picture = Image.fromarray((sun * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(picture, np.float32) / 255


def render(seed, style="clean", size=128):
    """A seed (int or list of ints), "clean" or "wild", size or (H, W)
    -> rgb uint8 [H, W, 3], depth float32 [H, W] in metres along the optical axis
    (0: sky or beyond FAR)."""
    height, width = (size, size) if isinstance(size, int) else size
    for attempt in range(20):  # a lens pressed against a wall teaches nothing: draw again
        scene, g = build([*np.atleast_1d(seed), attempt], style)
        rays, focal = camera_rays(scene, height, width)
        depth, which = trace(scene, rays)
        centre = depth[1::2, 1::2]
        seen = np.bincount(which[1::2, 1::2].reshape(-1) + 1)
        if ((seen > 0).sum() >= 5 and seen.max() < 0.75 * seen.sum()
                and np.quantile(centre, 0.1) > 0.3 and np.isfinite(centre).mean() > 0.4):
            break
    points = (scene.eye[:, None].astype(np.float32)
              + np.minimum(centre, 1e3).reshape(-1) * rays[:, 1::2, 1::2].reshape(3, -1))
    sun = lit(scene, points).reshape(height, width)
    if style == "wild" and g.random() < 0.5:
        sun = soften(sun, g.uniform(0.5, 5) * width / 128)
    # a ray between two pixels takes the shadow of one of them, if it sees the same thing
    sun, owner = (np.pad(a.repeat(2, 0).repeat(2, 1), ((0, 1), (0, 1)), "edge")
                  for a in (sun, which[1::2, 1::2]))
    sun = np.where(owner == which, sun, 1)
    rgb = shade(scene, rays, depth, which, sun, 1 / (2 * focal), style)
    for _ in range(2):  # a pixel is the mean of its square: its centre counts twice its edges
        rgb = (rgb[..., :-2:2, :] + 2 * rgb[..., 1::2, :] + rgb[..., 2::2, :]).swapaxes(1, 2) / 4
    return (develop(rgb, centre, style, g),
            np.where(centre < FAR, centre, 0).astype(np.float32))


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
    parser.add_argument("--clean", type=int, default=4000,
                        help="frames of clean/train (image and depth): the synthetic set")
    parser.add_argument("--wild", type=int, default=4000,
                        help="frames of wild/train (images only): the real set, where there are no "
                             "photographs")
    parser.add_argument("--labelled", type=int, default=0,
                        help="frames of wild/labelled (image and depth): for nano/pretrain.py; "
                             "train.py never sees them")
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
    marker, world = a.out / "world.json", {"world": WORLD, "size": a.size}
    if not marker.exists():
        if next(a.out.rglob("rgb_*.png"), None):
            sys.exit(f"error: {a.out}: holds frames of another version of the small world; remove "
                     "them or choose another folder")
        a.out.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(world) + "\n")
    if (found := json.loads(marker.read_text())) != world:
        sys.exit(f"error: {a.out}: holds world {found['world']} at {found['size']} pixels, not "
                 f"{WORLD} at {a.size}; choose another folder")
    jobs = []
    for style, split, count, with_depth in (
            ("clean", "test", a.test, 1), ("wild", "test", a.test, 1), ("wild", "val", a.val, 1),
            ("clean", "train", a.clean, 1), ("wild", "labelled", a.labelled, 1),
            ("wild", "train", a.wild, 0)):
        folder = a.out / style / split
        folder.mkdir(parents=True, exist_ok=True)
        jobs += [(folder, style, split, i, a.size, with_depth) for i in range(count)
                 if not (folder / f"rgb_{i:05d}.png").exists()]
    with get_context("spawn").Pool(a.workers, ignore_interrupts) as pool:
        for _ in tqdm(pool.imap_unordered(write, jobs, chunksize=8), total=len(jobs), unit="frame"):
            pass
    print(f"{a.out}: clean/train {a.clean}, wild/train {a.wild}, wild/labelled {a.labelled}, "
          f"test {a.test} each, wild/val {a.val}")


if __name__ == "__main__":
    # one process per core, whose threads would fight; read when a new process loads numpy
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
