"""Everything around the labelled organs (skin, fat, wall, bones, lungs, heart, bowel), in canonical mm."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from custom.data.phantom.shapes import (
    Array,
    Canvas,
    Tissue,
    Tube,
    box_around,
    ellipsoid,
    smooth_max,
    superellipse,
)

BODY_SEMI, WALL_SEMI, CAVITY_SEMI = (170.0, 112.0), (145.0, 90.0), (125.0, 75.0)
CAVITY_Y = 7.0
SPINE_Y = -45.0
T12_Z, THORACIC_PITCH = 52.0, 27.0
L1_Z, LUMBAR_PITCH = 20.0, 35.0

COLON = [  # caecum, hepatic flexure, transverse, splenic flexure, descending, sigmoid, rectum
    [(80, 10, -135, 22), (88, 5, -105, 25), (90, 2, -60, 23), (88, 14, -28, 20)],
    [(88, 14, -28, 20), (66, 50, -36, 20), (20, 60, -52, 21), (-30, 58, -42, 20), (-78, 36, 2, 18)],
    [(-78, 36, 2, 18), (-98, 8, 22, 16), (-101, -8, -20, 15), (-98, -6, -80, 15), (-90, 4, -130, 15)],
    [(-90, 4, -130, 15), (-66, 25, -165, 16), (-20, 20, -158, 17), (10, 0, -170, 17), (0, -32, -205, 18)],
    [(0, -32, -205, 18), (0, -38, -240, 20), (0, -42, -290, 16)],
]


def body_profile(z: Array) -> Array:
    """Width of the trunk at height ``z``, relative to its width at the liver."""
    heights = [-300, -220, -150, -50, 60, 220, 300, 350, 400]
    widths = [1.0, 1.04, 1.02, 0.97, 1.0, 1.0, 0.97, 0.85, 0.6]
    return np.interp(z, heights, widths).astype(np.float32)


def cavity_radius(x: Array, y: Array, z: Array) -> Array:
    """Relative radius inside the body wall: 1 on the inner surface of abdomen and chest."""
    heights = [-300, -220, -130, -50, 60, 220, 300, 350]
    widths = [0.5, 0.62, 0.85, 0.97, 1.0, 0.96, 0.8, 0.4]
    return superellipse(x, y - CAVITY_Y, *CAVITY_SEMI) / np.interp(z, heights, widths).astype(np.float32)


def diaphragm_height(x: Array, y: Array) -> Array:
    """z of the diaphragm: two domes that fall off towards the wall; the right one is higher."""
    radius = np.minimum(superellipse(x, y - CAVITY_Y, *CAVITY_SEMI, power=2.0), 1.3)
    left = 1 / (1 + np.exp((x + 5) / 12))
    return 128 - 9 * left - 82 * radius**4.5 - 7 * np.exp(-((x + 12) ** 2) / 900)


def paint_surroundings(canvas: Canvas, rng: np.random.Generator) -> None:
    """Paint everything that has no label. ``rng`` draws the loops of small bowel and the content of the bowel."""
    _paint_trunk(canvas)
    _paint_chest(canvas)
    _paint_muscles(canvas)
    _paint_ribs(canvas)
    _paint_spine(canvas)
    _paint_pelvis(canvas)
    _paint_small_bowel(canvas, rng)
    _paint_colon(canvas, rng)


def _paint_trunk(canvas: Canvas) -> None:
    profile = body_profile(canvas.z)
    body = superellipse(canvas.x, canvas.y, *BODY_SEMI) / profile
    wall = superellipse(canvas.x, canvas.y, *WALL_SEMI) / profile
    # the linea alba and the groove over the spine: fat dips in at the midline
    wall += 0.05 * np.exp(-((canvas.x / 9) ** 2))
    cavity = cavity_radius(canvas.x, canvas.y, canvas.z)
    tissue = canvas.tissue
    tissue[body < 1] = Tissue.SKIN
    tissue[body < 0.982] = Tissue.FAT
    tissue[(wall < 1) & (body < 0.982)] = Tissue.MUSCLE
    # a sheet of fat between the layers of the abdominal wall's muscles
    layers = (wall < 0.955) & (wall > 0.935) & (canvas.z < 40) & (canvas.z > -120)
    tissue[layers & (tissue == Tissue.MUSCLE)] = Tissue.FAT
    tissue[(cavity < 1) & (tissue != Tissue.AIR)] = Tissue.VISCERAL_FAT


def _paint_chest(canvas: Canvas) -> None:
    inside = [Tissue.VISCERAL_FAT]

    def chest(x: Array, y: Array, z: Array) -> Array:
        return np.maximum((cavity_radius(x, y, z) - 1) * 80, diaphragm_height(x, y) - z)

    def lungs(x: Array, y: Array, z: Array) -> Array:
        pleura = (cavity_radius(x, y, z) - 0.97) * 80
        middle = (1 - superellipse(x + 3, y + 5, 30, 95)) * 30
        return smooth_max(10, pleura, diaphragm_height(x, y) + 3 - z, middle)

    low, high = (-140, -90, 20), (140, 100, 360)
    canvas.paint(Tissue.MUSCLE, chest, low, high, over=inside)  # left over: diaphragm and pleura

    def mediastinum(x: Array, y: Array, z: Array) -> Array:
        return np.maximum(superellipse(x + 3, y + 5, 36, 74) - 1, (diaphragm_height(x, y) + 3 - z) / 30)

    canvas.paint(Tissue.MEDIASTINUM, mediastinum, (-45, -90, 60), (45, 80, 350), over=[Tissue.MUSCLE])
    canvas.paint(Tissue.LUNG, lungs, low, high, over=[Tissue.MUSCLE])
    heart = (-20, 18, 163)
    canvas.paint(Tissue.MYOCARDIUM, ellipsoid(heart, (62, 44, 50), (-25, 0)), *box_around(heart, 70))
    only_heart = [Tissue.MYOCARDIUM]
    for centre, semi in (
        ((-38, 16, 155), (26, 26, 34)),
        ((12, 26, 160), (26, 22, 32)),
        ((-5, -2, 182), (36, 17, 20)),
    ):
        canvas.paint(Tissue.HEART_BLOOD, ellipsoid(centre, semi), *box_around(centre, 40), over=only_heart)
    canvas.paint_tube(Tissue.VEIN, Tube([(20, 8, 190, 10), (20, 6, 250, 9), (24, 4, 330, 8)]))
    canvas.paint_tube(Tissue.TRACHEA, Tube([(3, -4, 248, 8), (2, -4, 300, 9), (2, -2, 360, 9)]))
    for side in (-1, 1):
        bronchus = [(3, -4, 248, 7), (20 * side, -8, 226, 6.5), (48 * side, -12, 205, 5)]
        canvas.paint_tube(Tissue.TRACHEA, Tube(bronchus))
        for end in ((75, 18, 190), (70, -30, 175), (60, 5, 255)):
            vessel = [(18 * side, 0, 218, 9), (42 * side, end[1] / 2, 208, 6), (end[0] * side, *end[1:], 3)]
            canvas.paint_tube(Tissue.VEIN, Tube(vessel), over=[Tissue.LUNG, Tissue.MEDIASTINUM])


def _paint_muscles(canvas: Canvas) -> None:
    for side in (-1, 1):
        psoas = [
            (34, -46, 25, 7),
            (41, -42, -30, 15),
            (48, -36, -90, 22),
            (60, -18, -150, 24),
            (78, 5, -220, 20),
        ]
        canvas.paint_tube(Tissue.MUSCLE, Tube([(x * side, y, z, r) for x, y, z, r in psoas]))
        iliacus = [(88, -22, -125, 12), (90, -12, -160, 20), (86, 0, -200, 20), (82, 6, -240, 16)]
        canvas.paint_tube(Tissue.MUSCLE, Tube([(x * side, y, z, r) for x, y, z, r in iliacus]))
        crus_x = -2 + 17 * side
        crus = [(crus_x, -20, 92, 5), (crus_x + side, -24, 55, 5.5), (crus_x, -29, 5, 4)]
        canvas.paint_tube(Tissue.MUSCLE, Tube(crus))

    def fat_between_back_muscles(x: Array, y: Array, z: Array) -> Array:
        return np.abs(np.hypot(np.abs(x) - 32, y + 74) - 19 - 0.04 * np.abs(z)) - 1.3

    low, high = (-75, -100, -160), (75, -58, 120)
    canvas.paint(Tissue.FAT, fat_between_back_muscles, low, high, over=[Tissue.MUSCLE])


def _paint_ribs(canvas: Canvas) -> None:
    where = canvas.block((-150, -95, -40), (150, 105, 360))
    if where is None:
        return
    x, y, z = canvas.x[where], canvas.y[where], canvas.z[where]
    tissue = canvas.tissue[where]
    radius = superellipse(x, y - 4, 135, 83) / body_profile(z)
    index = np.nonzero((np.abs(radius - 1) < 0.07) & (tissue != Tissue.AIR) & (tissue != Tissue.SKIN))
    x, y, z, radius = x[index], y[index], z[index], radius[index]
    angle = np.arctan2(np.abs(x), -(y - 4))  # 0 at the spine, pi at the sternum
    # ribs fall by 8 cm towards the side and their cartilage climbs back to the sternum
    fall = 80 * np.sin(np.minimum(angle, 2.2) * (np.pi / 4.4)) ** 1.5 - 38 * np.maximum(angle - 2.3, 0)
    order = (z + fall - T12_Z - 6) / THORACIC_PITCH
    number = np.clip(np.round(order), 0, 11)  # 0 is rib 12
    end = np.array([1.15, 1.6, 2.5, 2.7, 2.9] + [3.2] * 7, dtype=np.float32)[number.astype(int)]
    distance = np.hypot((order - number) * THORACIC_PITCH / 7.0, (radius - 1) * 83 / 4.5)
    rib = (distance < 1) & (angle < end)
    bone = np.where(distance < 0.6, Tissue.TRABECULAR, Tissue.CORTICAL)
    painted = np.where(angle > 2.35, Tissue.CARTILAGE, bone)
    sternum = (np.abs(x) < 17) & (y > 0) & (z > 150) & (z < 290) & (np.abs(radius - 1) < 0.06)
    painted = np.where(
        sternum, np.where(np.abs(radius - 1) < 0.03, Tissue.TRABECULAR, Tissue.CORTICAL), painted
    )
    tissue[index] = np.where(rib | sternum, painted, tissue[index])


def _paint_spine(canvas: Canvas) -> None:
    where = canvas.block((-45, -105, -145), (45, -20, 360))
    if where is None:
        return
    x, y, z = canvas.x[where], canvas.y[where], canvas.z[where]
    index = np.nonzero(
        (np.abs(x) < 45) & (y < -20) & (y > -105) & (z > -140) & (canvas.tissue[where] > Tissue.SKIN)
    )
    x, y, z = x[index], y[index], z[index]
    lumbar = z < (L1_Z + T12_Z) / 2
    pitch = np.where(lumbar, LUMBAR_PITCH, THORACIC_PITCH).astype(np.float32)
    phase = (z - np.where(lumbar, L1_Z, T12_Z)) / pitch
    dz = (phase - np.round(phase)) * pitch  # height above the middle of the nearest vertebra
    size = np.interp(z, [-140, 0, 60, 330], [1.08, 1.0, 0.92, 0.68]).astype(np.float32)
    waist = 1 - 0.08 * np.cos(np.pi * 2 * dz / pitch)
    body = (np.hypot(x / (23 * size * waist), (y - SPINE_Y) / (17 * size * waist)) - 1) * 17 * size
    disc = np.abs(dz) > pitch / 2 - np.where(lumbar, 4.5, 3.0)
    canal_y = SPINE_Y - 17 * size - 8
    canal = np.hypot(x / 1.15, y - canal_y) - 8
    arch = np.maximum(canal - 5, np.abs(dz) - pitch * 0.33)
    transverse = np.maximum(np.hypot(y - canal_y + 3, dz - 2) - 5, np.abs(x) - 40 * size)
    spinous = np.maximum(
        np.maximum(np.abs(x) - 3.5, np.abs(dz + 3) - 8), np.maximum(y - canal_y, canal_y - 27 - y)
    )
    bone = np.minimum(np.minimum(np.where(disc, 99.0, body), arch), np.minimum(transverse, spinous))
    end_plate = np.where(disc, -99.0, np.abs(dz) - pitch / 2 + np.where(lumbar, 4.5, 3.0))
    depth = np.where(body < 0, np.maximum(body, end_plate), bone)
    painted = canvas.tissue[where][index]
    painted = np.where(bone < 0, np.where(depth < -2.3, Tissue.TRABECULAR, Tissue.CORTICAL), painted)
    painted = np.where(disc & (body < 0), Tissue.CARTILAGE, painted)
    painted = np.where(canal < 0, np.where(canal < -2.5, Tissue.CORD, Tissue.VISCERAL_FAT), painted)
    canvas.tissue[where][index] = painted


def _paint_pelvis(canvas: Canvas) -> None:
    def bones(x: Array, y: Array, z: Array) -> Array:
        side = np.abs(x)
        crest = z + 100 + 0.006 * (y + 10) ** 2
        plate = np.abs(np.hypot(side / 108, (y + 12) / 70) - 1 - (z + 150) * 0.0016) * 75 - 5.5
        wing = np.maximum(np.maximum(plate, crest), np.maximum(np.maximum(36 - side, y - 38), -225 - z))
        tilt = y + 60 + 0.25 * (z + 140)
        sacrum = np.maximum(
            np.hypot(side / (52 + 0.3 * (z + 140)), tilt / 18) * 18 - 18, np.abs(z + 185) - 48
        )
        head = np.sqrt((side - 92) ** 2 + (y - 2) ** 2 + (z + 240) ** 2) - 25
        return np.minimum(np.minimum(wing, sacrum), head)

    low, high = (-150, -100, -300), (150, 80, -92)
    canvas.paint(Tissue.CORTICAL, bones, low, high)
    canvas.paint(Tissue.TRABECULAR, lambda x, y, z: bones(x, y, z) + 2.6, low, high, over=[Tissue.CORTICAL])
    bladder = (0, 28, -222)
    canvas.paint(Tissue.BOWEL_WALL, ellipsoid(bladder, (42, 34, 32)), *box_around(bladder, 50))
    canvas.paint(Tissue.BLADDER, ellipsoid(bladder, (38, 30, 28)), *box_around(bladder, 50))


def _paint_small_bowel(canvas: Canvas, rng: np.random.Generator) -> None:
    """Paint loops as cells around random centres, different in each patient, because loops have no fixed place."""
    count = 170
    centres = np.array([0.0, 22.0, -95.0]) + rng.uniform(-1, 1, (count, 3)) * [92, 48, 78]
    fillings = [Tissue.BOWEL_FLUID, Tissue.BOWEL_WALL, Tissue.BOWEL_GAS, Tissue.BOWEL_CONTRAST]
    oral_contrast = 0.35 if rng.random() < 0.3 else 0.0
    filling = rng.choice(fillings, count, p=[0.62 - oral_contrast, 0.28, 0.10, oral_contrast])
    where = canvas.block((-95, -30, -180), (95, 72, -8))
    if where is None:
        return
    x, y, z = canvas.x[where], canvas.y[where], canvas.z[where]
    region = (
        (superellipse(x, y - 20, 88, 52) < 1)
        & (np.abs(z + 93) < 80)
        & (canvas.tissue[where] == Tissue.VISCERAL_FAT)
    )
    index = np.nonzero(region)
    points = np.stack([x[index], y[index], z[index]], axis=-1)
    distance, nearest = cKDTree(centres).query(points, k=2)
    gap = distance[:, 1] - distance[:, 0] + 1.5 * np.sin(points[:, 0] / 3) * np.sin(points[:, 2] / 3.4)
    fat = (gap < 2.2) | (distance[:, 0] > 15)
    wall = (gap < 6.5) | (distance[:, 0] > 12.5)
    content = np.where(wall, Tissue.BOWEL_WALL, filling[nearest[:, 0]])
    canvas.tissue[where][index] = np.where(fat, Tissue.VISCERAL_FAT, content)


def _paint_colon(canvas: Canvas, rng: np.random.Generator) -> None:
    for path in COLON:
        tube = Tube(path)
        haustra = 1 + 0.13 * np.sin(tube.arc / 5.0 + rng.uniform(0, 6.28))
        tube.radius = tube.radius * haustra * 0.92
        # how far above the axis the gas begins, slowly changing along the colon
        level = np.interp(tube.arc, np.linspace(0, tube.arc[-1], 5), rng.uniform(-14, 26, 5))
        where = canvas.block(tube.low, tube.high)
        if where is None:
            continue
        x, y, z = canvas.x[where], canvas.y[where], canvas.z[where]
        soft = (
            Tissue.VISCERAL_FAT,
            Tissue.BOWEL_WALL,
            Tissue.BOWEL_FLUID,
            Tissue.BOWEL_GAS,
            Tissue.BOWEL_CONTRAST,
        )
        free = np.isin(canvas.tissue[where], [*soft, Tissue.MUSCLE])
        for axis, coordinate in enumerate((x, y, z)):
            free &= (coordinate >= tube.low[axis]) & (coordinate <= tube.high[axis])
        free &= cavity_radius(x, y, z) < 0.99
        index = np.nonzero(free)
        distance, nearest = tube.nearest(x[index], y[index], z[index])
        near = np.isfinite(distance)
        index = tuple(axis[near] for axis in index)
        distance, nearest = distance[near], nearest[near]
        depth = distance - tube.radius[nearest]
        gas = y[index] - tube.axis[nearest, 1] > level[nearest]
        content = np.where(gas, Tissue.BOWEL_GAS, Tissue.STOOL)
        painted = np.where(depth < -2.6, content, Tissue.BOWEL_WALL)
        canvas.tissue[where][index] = np.where(depth < 0, painted, canvas.tissue[where][index])
