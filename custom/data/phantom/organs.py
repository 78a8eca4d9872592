"""The labelled organs of the canonical body: the 13 of FLARE22, with their vessels and contents.

Millimetres; x towards Right, y Anterior, z Superior; x = y = 0 in the middle of the body and z = 0 at L1/L2.
Volumes follow the usual adult ones (liver 1500 ml, kidney 155, spleen 200, pancreas 75, ...).
"""

from __future__ import annotations

import numpy as np

from custom.data.phantom.shapes import Array, Canvas, Tissue, Tube, box_around, ellipsoid, smooth_max
from custom.data.phantom.surroundings import cavity_radius, diaphragm_height

RIGHT_KIDNEY, LEFT_KIDNEY = (66.0, -36.0, -14.0), (-63.0, -37.0, 2.0)
KIDNEY_SEMI = (28.0, 26.0, 57.0)

# paths of tubes: x, y, z and radius in mm
AORTA = [(6, 20, 205, 14), (12, 24, 240, 14), (2, 18, 275, 13), (-18, -4, 285, 13), (-28, -22, 260, 12.5),
         (-27, -24, 200, 12), (-19, -18, 130, 12), (-11, -14, 80, 11.5), (-8, -14, 20, 10.5), (-6, -14, -50, 9.5),
         (-4, -13, -97, 9)]  # fmt: skip
VENA_CAVA = [(17, -12, -100, 10), (19, -13, -45, 10.5), (20, -11, 10, 11), (23, -9, 60, 11.5), (25, -4, 95, 12),
             (18, 4, 128, 12)]  # fmt: skip
ESOPHAGUS = [(0, -20, 335, 8), (-2, -24, 270, 8), (-5, -22, 210, 9), (-9, -18, 160, 9), (-17, -8, 128, 9),
             (-34, -3, 108, 10)]  # fmt: skip
STOMACH = [(-60, -4, 97, 24), (-66, 12, 72, 27), (-58, 32, 38, 24), (-38, 45, 8, 21), (-8, 49, -2, 17),
           (20, 42, 8, 11)]  # fmt: skip
PANCREAS = [(31, 14, -10, 14), (28, 18, 8, 15), (14, 24, 20, 11), (-10, 20, 29, 12), (-42, 2, 39, 12.5),
            (-76, -16, 53, 11)]  # fmt: skip
DUODENUM = [(22, 41, 9, 10), (42, 33, 13, 11), (52, 17, 0, 11), (50, 9, -28, 10.5), (28, 7, -46, 10), (-5, 8, -42, 10),
            (-28, 14, -24, 10)]  # fmt: skip
LIVER_VEINS = [  # hepatic veins run to the vena cava, portal branches from the hilum
    [(24, -2, 108, 5), (55, 0, 85, 4.5), (88, 5, 45, 3)],
    [(24, 0, 110, 5), (40, 25, 95, 4), (52, 52, 62, 2.5)],
    [(20, 2, 112, 4.5), (-5, 25, 102, 3.5), (-28, 40, 96, 2.5)],
    [(38, 8, 48, 6), (62, -8, 58, 5), (92, -18, 62, 3.5)],
    [(38, 8, 48, 6), (68, 22, 45, 4.5), (95, 35, 28, 3)],
    [(38, 8, 48, 5.5), (14, 30, 72, 4.5), (-10, 42, 82, 3)],
]


def paint_organs(canvas: Canvas, rng: np.random.Generator) -> None:
    """Paint the 13 organs over the surroundings. ``rng`` draws only the content of stomach and oesophagus."""
    _paint_liver(canvas)
    spleen_centre = (-98.0, -26.0, 52.0)
    canvas.paint(Tissue.SPLEEN, _spleen(spleen_centre), *box_around(spleen_centre, 70))
    _paint_kidney(canvas, Tissue.RIGHT_KIDNEY, Tissue.RIGHT_MEDULLA, RIGHT_KIDNEY, side=1)
    _paint_kidney(canvas, Tissue.LEFT_KIDNEY, Tissue.LEFT_MEDULLA, LEFT_KIDNEY, side=-1)
    _paint_vessels(canvas)
    _paint_adrenals(canvas)
    canvas.paint_tube(Tissue.PANCREAS, Tube(PANCREAS, lumps=1.8))
    gallbladder = (54.0, 47.0, -4.0)
    canvas.paint(
        Tissue.GALLBLADDER, ellipsoid(gallbladder, (16, 15, 30), (18, -20)), *box_around(gallbladder, 33)
    )
    canvas.paint_tube(Tissue.ESOPHAGUS, Tube(ESOPHAGUS))
    if rng.random() < 0.4:
        canvas.paint_tube(Tissue.ESOPHAGUS_GAS, Tube(ESOPHAGUS[:4], shrink=5.5), over=[Tissue.ESOPHAGUS])
    canvas.paint_tube(Tissue.DUODENUM, Tube(DUODENUM, lumps=1.0))
    canvas.paint_tube(Tissue.DUODENUM_FLUID, Tube(DUODENUM, shrink=4.5), over=[Tissue.DUODENUM])
    _paint_stomach(canvas, gas_level=rng.uniform(5.0, 45.0))


def _paint_liver(canvas: Canvas) -> None:
    def liver(x: Array, y: Array, z: Array) -> Array:
        wall = (cavity_radius(x, y, z) - 0.98) * 80
        dome = z - diaphragm_height(x, y) + 4
        lower = (45 - 0.85 * x - 0.2 * y - z) * 0.75
        behind = 0.7 * np.maximum(75 - x, 0) - 75 - y  # stomach and spine lie behind the left lobe
        left_tip = -72 - x
        return smooth_max(14, wall, dome, lower, 0.8 * behind, left_tip)

    canvas.paint(Tissue.LIVER, liver, (-76, -75, -75), (130, 85, 135))
    for path in LIVER_VEINS:
        canvas.paint_tube(Tissue.LIVER_VEIN, Tube(path), over=[Tissue.LIVER])


def _spleen(centre: tuple[float, float, float]):
    body = ellipsoid(centre, (37, 51, 67), (-10, 16))
    hilum = ellipsoid((centre[0] + 52, centre[1] + 30, centre[2] - 4), (36, 40, 62))

    def spleen(x: Array, y: Array, z: Array) -> Array:
        wall = (cavity_radius(x, y, z) - 0.985) * 80
        dome = z - diaphragm_height(x, y) + 4
        return smooth_max(8, body(x, y, z), wall, dome, -hilum(x, y, z))

    return spleen


def _paint_kidney(
    canvas: Canvas, cortex: Tissue, medulla: Tissue, centre: tuple[float, float, float], side: int
) -> None:
    box = box_around(centre, 66)
    tilt = (-14 * side, 10)  # upper poles lean towards the spine and backwards
    canvas.paint(cortex, ellipsoid(centre, KIDNEY_SEMI, tilt, lumps=0.8), *box)
    inner = ellipsoid(centre, [0.74 * s for s in KIDNEY_SEMI], tilt)

    def pyramids(x: Array, y: Array, z: Array) -> Array:
        spokes = np.sin(z / 3.6) * np.cos(np.arctan2(y - centre[1], x - centre[0]) * 4)
        return inner(x, y, z) + 4 * spokes

    canvas.paint(medulla, pyramids, *box, over=[cortex])
    hilum = (centre[0] - 19 * side, centre[1] + 7, centre[2])
    sinus = ellipsoid(hilum, (19, 10, 22), tilt)
    canvas.paint(Tissue.VISCERAL_FAT, sinus, *box, over=[cortex, medulla])
    canvas.paint(Tissue.BLADDER, ellipsoid(hilum, (13, 5, 9), tilt), *box, over=[Tissue.VISCERAL_FAT])


def _paint_vessels(canvas: Canvas) -> None:
    for side in (-1, 1):
        iliac = [(-4 + 4 * side, -12, -92, 7), (30 * side, -8, -135, 6.5), (60 * side, 8, -200, 6)]
        canvas.paint_tube(Tissue.ARTERY, Tube([*iliac, (72 * side, 35, -270, 5)]))
        vein = [(17 + 4 * side, -14, -98, 8), (36 * side, -20, -140, 8), (64 * side, -3, -205, 7)]
        canvas.paint_tube(Tissue.VEIN, Tube([*vein, (70 * side, 25, -270, 6.5)]))
    canvas.paint_tube(Tissue.VEIN, Tube([(20, -6, 6, 5), (-15, 0, 4, 4.5), (-44, -28, 2, 5)]))
    canvas.paint_tube(Tissue.VEIN, Tube([(20, -11, -6, 5), (46, -30, -14, 5)]))
    canvas.paint_tube(Tissue.ARTERY, Tube([(-8, -12, 0, 4), (22, -26, -4, 3.5), (48, -32, -14, 3.5)]))
    canvas.paint_tube(Tissue.ARTERY, Tube([(-8, -12, 0, 4), (-30, -26, 2, 3.5), (-46, -34, 2, 3.5)]))
    canvas.paint_tube(Tissue.ARTERY, Tube([(-9, -14, 24, 4), (-6, 6, 12, 4), (-2, 14, -60, 3)]))
    canvas.paint_tube(Tissue.PORTAL_VEIN, Tube([(8, 14, -50, 5), (10, 12, 15, 6.5), (38, 8, 48, 7)]))
    canvas.paint_tube(Tissue.PORTAL_VEIN, Tube([(10, 12, 18, 5), (-40, -8, 42, 4.5), (-82, -20, 60, 4)]))
    canvas.paint_tube(Tissue.VENA_CAVA, Tube(VENA_CAVA))
    canvas.paint_tube(Tissue.AORTA, Tube(AORTA))


def _paint_adrenals(canvas: Canvas) -> None:
    # each has two thin limbs that meet in front: an inverted Y on axial slices
    for tissue, side, (x, y, z) in (
        (Tissue.RIGHT_ADRENAL, 1, (39.0, -29.0, 46.0)),
        (Tissue.LEFT_ADRENAL, -1, (-35.0, -24.0, 50.0)),
    ):
        inner = Tube(
            [(x, y + 8, z + 12, 3.9), (x - 3 * side, y - 2, z + 4, 4.0), (x - 5 * side, y - 12, z, 3.7)]
        )
        outer = Tube(
            [(x, y + 8, z + 4, 4.2), (x + 4 * side, y, z - 4, 4.2), (x + 11 * side, y - 9, z - 12, 3.7)]
        )
        body = Tube([(x, y + 8, z + 14, 3.9), (x, y + 9, z, 4.2), (x + 2 * side, y + 8, z - 14, 3.7)])
        web = Tube([(x - side, y + 2, z + 10, 3.4), (x + 3 * side, y, z - 8, 3.6)])
        for limb in (inner, outer, body, web):
            canvas.paint_tube(tissue, limb)


def _paint_stomach(canvas: Canvas, gas_level: float) -> None:
    canvas.paint_tube(Tissue.STOMACH, Tube(STOMACH, lumps=1.0))
    lumen = Tube(STOMACH, lumps=1.5, shrink=4.5)
    canvas.paint_tube(Tissue.STOMACH_FLUID, lumen, over=[Tissue.STOMACH])

    # patients lie on their back, so gas gathers in front
    def above_level(x: Array, y: Array, z: Array) -> Array:
        return gas_level - y

    canvas.paint(Tissue.STOMACH_GAS, above_level, lumen.low, lumen.high, over=[Tissue.STOMACH_FLUID])
