"""What stands about in the small world: each function draws an object, as parts in metres.

g, everywhere: the numpy Generator of the scene, so that a seed is a scene.
"""
import math
from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """A piece of an object in the object's own frame (base at y = 0, front at −z); slot names its
    material: one of scenes.MATERIALS, or "a", "b", "c" for a random one of this object's."""
    kind: str
    centre: tuple
    half: tuple
    slot: str = "a"
    turn: np.ndarray | None = None


def rotation(yaw=0.0, pitch=0.0, roll=0.0):
    """Ry(yaw) Rx(pitch) Rz(roll), angles in radians -> [3, 3]; a positive pitch looks down"""
    (cy, cp, cr), (sy, sp, sr) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rx = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    return ry @ rx @ np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])


def legs(w, d, h, r, slot="b", kind="box"):
    return [Part(kind, (sx * (w - r), h / 2, sz * (d - r)), (r, h / 2, r), slot)
            for sx in (-1, 1) for sz in (-1, 1)]


def table(g):
    w, d, h = g.uniform(0.35, 0.9), g.uniform(0.3, 0.5), g.uniform(0.45, 0.8)
    slot = g.choice(["a", "wood"])
    return [Part("box", (0, h, 0), (w, 0.025, d), slot)] + legs(w, d, h, g.uniform(0.015, 0.035))


def chair(g):
    w, h, r = g.uniform(0.18, 0.26), g.uniform(0.4, 0.5), g.uniform(0.012, 0.022)
    back = [Part("box", (0, y, w), (w, 0.03, 0.012)) for y in np.linspace(h + 0.15, 2 * h, 3)]
    posts = [Part("box", (s * (w - r), h * 1.5, w), (r, h / 2, r), "b") for s in (-1, 1)]
    return [Part("box", (0, h, 0), (w, 0.02, w))] + legs(w, w, h, r) + back + posts


def shelf(g):
    w, d, h, n = g.uniform(0.3, 0.9), g.uniform(0.12, 0.2), g.uniform(0.9, 2.2), g.integers(3, 7)
    boards = np.linspace(0.05, h, n)
    parts = [Part("box", (0, y, 0), (w, 0.012, d), "wood") for y in boards]
    parts += [Part("box", (s * w, h / 2, 0), (0.012, h / 2, d), "wood") for s in (-1, 1)]
    parts += [Part("box", (0, h / 2, d), (w, h / 2, 0.01), "wood")] * (g.random() < 0.5)
    for y in boards[:-1]:  # rows of books, and single things
        s = min(g.uniform(0.1, 0.16), (boards[1] - boards[0]) * 0.45)
        part = g.uniform(0.2, 0.9) * w
        parts.append(Part("box", (g.uniform(-1, 1) * (w - part), y + s, 0), (part, s, d * 0.7),
                          g.choice(["books", "b", "c"])))
    return parts


def sofa(g):
    w, d = g.uniform(0.4, 1.1), g.uniform(0.35, 0.45)
    seats = [Part("box", (s * w / 2, 0.46, -0.03), (w / 2 - 0.01, 0.06, d - 0.05), "b")
             for s in (-1, 1)]
    return seats + [
        Part("box", (0, 0.22, 0), (w, 0.2, d)), Part("box", (0, 0.55, d), (w, 0.28, 0.1)),
        *(Part("box", (s * w, 0.32, 0), (0.1, 0.3, d)) for s in (-1, 1)),
        Part("ellipsoid", (g.uniform(-0.6, 0.6) * w, 0.62, d - 0.2), (0.2, 0.17, 0.08), "c")]


def bed(g):
    w, l, h = g.uniform(0.45, 0.9), g.uniform(0.95, 1.05), g.uniform(0.25, 0.4)
    pillows = [Part("ellipsoid", (s * w / 2, h + 0.2, l - 0.3), (w * 0.4, 0.1, 0.2), "white")
               for s in (-1, 1)]
    return [Part("box", (0, h / 2, 0), (w, h / 2, l), "wood"),
            Part("box", (0, h + 0.07, -0.01), (w * 1.02, 0.1, l * 0.99)),
            Part("box", (0, h * 1.5, l), (w, h * 1.3, 0.03), "wood")] + pillows


def crate(g):
    w, h, d = g.uniform(0.12, 0.5, 3)
    return [Part("box", (0, h, 0), (w, h, d))]


def cabinet(g):
    """A chest, a wardrobe or a fridge, its doors and handles"""
    w, h, d = g.uniform(0.25, 0.8), g.uniform(0.35, 1.1), g.uniform(0.2, 0.33)
    slot = g.choice(["a", "wood", "white"])
    doors = [Part("box", (s * w / 2, h, -d), (w / 2 - 0.012, h * 0.94, 0.012), slot)
             for s in (-1, 1)]
    return [Part("box", (0, h, 0), (w, h, d), slot),
            Part("box", (g.uniform(-0.1, 0.1), h, -d - 0.02), (0.01, h * 0.2, 0.01), "b")] + doors


def counter(g):
    """A kitchen: cupboards, a worktop, things on it, cupboards above"""
    w, slot = g.uniform(0.6, 1.8), g.choice(["a", "wood", "white"])
    n = int(w / 0.25)
    parts = [Part("box", (0, 0.44, 0), (w, 0.44, 0.3), slot),
             Part("box", (0, 0.9, -0.01), (w, 0.02, 0.32), "b")]
    parts += [Part("box", (x, 0.45, -0.3), (w / n - 0.01, 0.36, 0.012), slot)
              for x in np.linspace(-w, w, 2 * n + 1)[1::2]]
    if g.random() < 0.6:
        parts.append(Part("box", (0, 1.75, 0.13), (w, 0.35, 0.17), slot))
    for _ in range(g.integers(1, 5)):
        s = g.uniform(0.05, 0.17)
        parts.append(Part(g.choice(["box", "cylinder"]), (g.uniform(-w, w) * 0.9, 0.92 + s, 0.05),
                          (s * 0.8, s, s * 0.6), g.choice(["c", "white", "dark"])))
    return parts


def desk(g):
    w = g.uniform(0.4, 0.8)
    return ([Part("box", (0, 0.72, 0), (w, 0.02, 0.33), "wood")] + legs(w, 0.33, 0.72, 0.03)
            + [Part("box", (0, 1.0, 0.1), (g.uniform(0.2, 0.32), 0.17, 0.02), "dark"),
               Part("box", (0, 0.8, 0.12), (0.03, 0.08, 0.03), "dark"),
               Part("box", (g.uniform(-0.2, 0.2), 0.75, -0.15), (0.2, 0.01, 0.08), "c")])


def lamp(g):
    h, r = g.uniform(1.2, 1.8), g.uniform(0.12, 0.22)
    return [Part("cylinder", (0, 0.015, 0), (0.14, 0.015, 0.14), "b"),
            Part("cylinder", (0, h / 2, 0), (0.012, h / 2, 0.012), "b"),
            Part("cylinder", (0, h, 0), (r, r * 0.7, r), g.choice(["a", "light"]))]


def vase(g):
    h, r = g.uniform(0.05, 0.35), g.uniform(0.04, 0.15)
    return [Part("ellipsoid", (0, h, 0), (r, h, r)),
            Part("cylinder", (0, 2 * h, 0), (r / 3, h / 3, r / 3), "b")]


def cup(g):
    h, r = g.uniform(0.03, 0.16), g.uniform(0.03, 0.06)
    return [Part("cylinder", (0, h, 0), (r, h, r)),
            Part("box", (r, h, 0), (r * 0.4, h * 0.5, 0.008)),
            Part("cylinder", (0, 2 * h, 0), (r * 0.85, 0.003, r * 0.85), "b")]


def plate(g):
    r = g.uniform(0.08, 0.2)
    food = [Part("ellipsoid", g.normal(0, r / 3, 3) * [1, 0, 1] + [0, 0.02, 0],
                 g.uniform(0.1, 0.4, 3) * r, g.choice(["b", "c", "leaf"]))
            for _ in range(g.integers(0, 6))]
    return [Part("cylinder", (0, 0.01, 0), (r, 0.01, r), g.choice(["a", "white"]))] + food


def book(g):
    """Or up to three, one on the other"""
    parts = []
    for i in range(g.integers(1, 4)):
        w, _ = g.uniform(0.07, 0.16, 2)
        parts.append(Part("box", (0, (i + 0.5) * 0.035, 0), (w, 0.016, 0.1),
                          g.choice(["a", "b", "c", "white"]), rotation(g.normal(0, 0.3))))
    return parts


def ball(g):
    r = g.uniform(0.04, 0.3)
    return [Part("ellipsoid", (0, r, 0), (r, r, r))]


def plant(g):
    h = g.uniform(0.3, 1.2)
    parts = [Part("cylinder", (0, 0.14, 0), (0.13, 0.14, 0.13))]
    for _ in range(g.integers(8, 16)):
        yaw, tilt, y = g.uniform(0, 6.3), g.uniform(0.3, 1.2), g.uniform(0.3, h)
        at = np.array([math.sin(yaw), 0, math.cos(yaw)]) * g.uniform(0.08, 0.3) + [0, y, 0]
        parts.append(Part("ellipsoid", at, (0.05, 0.006, g.uniform(0.12, 0.25)), "leaf",
                          rotation(yaw, tilt)))
    return parts + [Part("cylinder", (0, h / 2, 0), (0.01, h / 2, 0.01), "wood")]


def person(g):
    s = g.uniform(0.6, 1.1)
    stride = g.uniform(0, 0.4)
    parts = [Part("ellipsoid", (0, 1.62 * s, 0), (0.09 * s, 0.13 * s, 0.1 * s), "flesh"),
             Part("ellipsoid", (0, 1.67 * s, 0.03), (0.1 * s, 0.12 * s, 0.1 * s), "c"),
             Part("ellipsoid", (0, 1.2 * s, 0), (0.21 * s, 0.33 * s, 0.13 * s))]
    for x, turn in ((-0.1, stride), (0.1, -stride)):
        parts.append(Part("cylinder", (x * s, 0.45 * s, 0), (0.075 * s, 0.45 * s, 0.08 * s), "b",
                          rotation(0, turn)))
        arm = rotation(0, -2 * turn, math.copysign(g.uniform(0.1, 0.7), x))
        parts.append(Part("cylinder", (x * 2.5 * s, 1.13 * s, 0),
                          (0.045 * s, 0.3 * s, 0.045 * s), g.choice(["a", "flesh"]), arm))
    return parts


def animal(g):
    s, l = g.uniform(0.2, 0.6), g.uniform(1.0, 1.5)  # height of the back, length against it
    return legs(0.25 * s, 0.6 * s * l, 0.8 * s, 0.07 * s, "a", "cylinder") + [
        Part("ellipsoid", (0, 0.9 * s, 0), (0.25 * s, 0.28 * s, 0.75 * s * l)),
        Part("ellipsoid", (0, 1.25 * s, -0.8 * s * l), (0.18 * s, 0.18 * s, 0.25 * s), "b"),
        Part("cylinder", (0, 1.1 * s, 0.85 * s * l), (0.04 * s, 0.3 * s, 0.04 * s), "a",
             rotation(0, 0.9))]


def tree(g):
    h, r, k = g.uniform(1.5, 5.0), g.uniform(0.06, 0.25), g.uniform(0.8, 2.0)
    parts = [Part("cylinder", (0, h / 2, 0), (r, h / 2, r), "wood")]
    for _ in range(g.integers(4, 9)):
        at = g.normal(0, 0.5 * k, 3) * [1, 0.6, 1] + [0, h + 0.4 * k, 0]
        parts.append(Part("ellipsoid", at, g.uniform(0.3, 0.8, 3) * k, "leaf"))
    for _ in range(g.integers(2, 6)):
        turn = rotation(g.uniform(0, 6.3), g.uniform(0.4, 1.1))
        mid = turn @ [0, 0.5 * k, 0] + [0, g.uniform(0.5, 0.9) * h, 0]
        parts.append(Part("cylinder", mid, (r / 4, 0.5 * k, r / 4), "wood", turn))
    return parts


def bush(g):
    return [Part("ellipsoid", (*(g.normal(0, 0.3, 2)), g.normal(0, 0.3)), g.uniform(0.25, 0.6, 3),
                 "leaf") for _ in range(g.integers(3, 7))]


def grass(g):
    """A tuft of thin blades, or flowers"""
    parts = []
    for _ in range(g.integers(8, 16)):
        x, z, h, turn = *g.normal(0, 0.12, 2), g.uniform(0.1, 0.4), rotation(*g.normal(0, 0.3, 3))
        parts.append(Part("cylinder", (x, h / 2, z), (0.006, h / 2, 0.006), "leaf", turn))
        if g.random() < 0.3:
            parts.append(Part("ellipsoid", (x, h, z), (0.03, 0.02, 0.03)))
    return parts


def rock(g):
    return [Part("ellipsoid", (g.normal(0, 0.2), 0.1, g.normal(0, 0.2)), g.uniform(0.15, 0.6, 3),
                 "ground", rotation(*g.uniform(-0.5, 0.5, 3))) for _ in range(g.integers(1, 4))]


def pole(g):
    h, r = g.uniform(1.5, 6.0), g.uniform(0.02, 0.08)
    top = [Part("box", (0, h, 0), (0.25, 0.25, 0.015)),
           Part("cylinder", (0, h, 0), (0.25, 0.1, 0.25)),
           Part("box", (0.6, h, 0), (0.65, 0.03, 0.05), "b"),
           Part("box", (0, h, 0), (0.12, 0.35, 0.1), "dark")]
    return [Part("cylinder", (0, h / 2, 0), (r, h / 2, r), "b"), top[g.integers(4)]]


def fence(g):
    w, h, n = g.uniform(1.0, 2.5), g.uniform(0.7, 1.3), int(g.integers(5, 14))
    rails = [Part("box", (0, y, 0), (w, 0.025, 0.015), "b") for y in (h * 0.25, h * 0.85)]
    return rails + [Part("box", (x, h / 2, 0), (0.025, h / 2, 0.015))
                    for x in np.linspace(-w, w, n)]


def car(g):
    """Its length along z; sometimes a van or a lorry"""
    w, l, tall = g.uniform(0.75, 0.9), g.uniform(1.7, 2.3), g.random() < 0.2
    h = g.uniform(0.6, 1.2) if tall else 0.25
    back, cabin = (0, 0.9) if tall else (l * 0.12, g.uniform(0.5, 0.65))
    wheels = [Part("cylinder", (sx * w * 0.92, 0.31, sz * l * 0.62), (0.31, 0.1, 0.31), "dark",
                   rotation(0, 0, math.pi / 2)) for sx in (-1, 1) for sz in (-1, 1)]
    return wheels + [
        Part("box", (0, 0.6, 0), (w, 0.3, l)),
        Part("box", (0, 0.9 + h, back), (w * 0.9, h, l * cabin), "a" if tall else "dark"),
        Part("box", (0, 0.92 + 2 * h, back), (w * 0.85, 0.03, l * (cabin - 0.06))),
        *(Part("box", (0, 0.6, s * l), (w * 0.8, 0.07, 0.02), "light" if s < 0 else "b")
          for s in (-1, 1))]


def building(g):
    w, h, d = g.uniform(1.5, 5), g.uniform(1.5, 5), g.uniform(1.5, 4)
    return [Part("box", (0, h, 0), (w, h, d), "house"),
            Part("box", (0, 2 * h, 0), (w * 1.06, 0.12, d * 1.06), "b")]


def bench(g):
    w = g.uniform(0.6, 0.9)
    slats = [Part("box", (0, 0.45, z), (w, 0.015, 0.05)) for z in (-0.15, 0, 0.15)]
    back = [Part("box", (0, y, 0.22), (w, 0.05, 0.015)) for y in (0.65, 0.82)]
    return slats + back + legs(w, 0.2, 0.45, 0.025)


def picture(g):
    y, w, h = g.uniform(1.3, 1.8), g.uniform(0.12, 0.5), g.uniform(0.12, 0.4)
    return [Part("box", (0, y, 0.01), (w, h, 0.015)),
            Part("box", (0, y, -0.005), (w * 0.9, h * 0.9, 0.012), "patches")]


def door(g):
    w, slot = g.uniform(0.35, 0.5), g.choice(["white", "wood", "a"])
    return [Part("box", (0, 1.03, 0.02), (w + 0.08, 1.05, 0.02), g.choice(["white", "wood"])),
            Part("box", (0, 1, 0), (w, 1, 0.025), slot),
            Part("ellipsoid", (w * 0.8, 1, -0.04), (0.03, 0.03, 0.03), "b")]


def glazing(g):
    """A window with its frame, and perhaps curtains"""
    w, h, y = g.uniform(0.3, 1.0), g.uniform(0.4, 0.7), g.uniform(1.4, 1.7)
    bars = [Part("box", (x, y, -0.01), (0.02, h, 0.02), "white") for x in (-w, 0, w)]
    bars += [Part("box", (0, y + s * h, -0.01), (w, 0.03, 0.03), "white") for s in (-1, 1)]
    curtains = [Part("box", (s * w * 1.1, y - 0.2, -0.08), (g.uniform(0.15, 0.3), h + 0.3, 0.03),
                     "folds") for s in (-1, 1)]
    return [Part("box", (0, y, 0.01), (w, h, 0.01), "light")] + bars + curtains * (g.random() < 0.5)


def pick(g, kinds):
    """One of the functions above, called."""
    return kinds[g.integers(len(kinds))](g)


INDOOR = {"clean": [table, chair, shelf, sofa, crate, cabinet, lamp, vase],
          "wild": [table, table, chair, chair, chair, sofa, sofa, crate, lamp, plant, person,
                   person, ball, cabinet, bed, animal]}
WALL = {"clean": [shelf, cabinet, sofa, counter, desk, bed],
        "wild": [shelf, shelf, cabinet, cabinet, sofa, counter, counter, desk, bed, bed, plant,
                 chair, lamp]}
HUNG = dict.fromkeys(("clean", "wild"), [picture, picture, door, glazing])
SMALL = {"clean": [vase, crate, ball, cup, book],
         "wild": [vase, plant, ball, crate, cup, cup, plate, plate, book, book]}
OUTDOOR = {"clean": [building, pole, fence, car, crate, bench, ball],
           "wild": [tree, tree, bush, rock, person, person, pole, fence, fence, car, bench,
                    building, grass, grass, animal]}
PAVEMENT = {"clean": [pole, tree, bench],
            "wild": [pole, pole, tree, tree, person, person, person, bench, bush, fence, animal]}
ROAD = dict.fromkeys(("clean", "wild"), [car])
