"""From tissues to a CT image: attenuation by contrast phase, texture, partial volume and scanner noise.

The numbers are textbook means; their spreads make tissues overlap in HU on purpose.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from custom.data.phantom.pose import spread_knots
from custom.data.phantom.shapes import Array, Tissue

PHASES = ("non-contrast", "arterial", "portal", "delayed")

# mean HU in each of PHASES, sd between patients, sd of the texture within
_HU: dict[Tissue, tuple[float, float, float, float, float, float]] = {
    Tissue.AIR: (-1000, -1000, -1000, -1000, 0, 0),
    Tissue.LIVER: (57, 68, 108, 90, 9, 6),
    Tissue.RIGHT_KIDNEY: (32, 190, 178, 150, 12, 6),
    Tissue.SPLEEN: (48, 120, 120, 95, 9, 5),
    Tissue.PANCREAS: (40, 105, 90, 75, 10, 14),
    Tissue.AORTA: (42, 320, 155, 110, 10, 4),
    Tissue.VENA_CAVA: (42, 55, 130, 108, 10, 6),
    Tissue.RIGHT_ADRENAL: (35, 75, 80, 65, 8, 5),
    Tissue.LEFT_ADRENAL: (35, 75, 80, 65, 8, 5),
    Tissue.GALLBLADDER: (8, 8, 8, 8, 7, 3),
    Tissue.ESOPHAGUS: (38, 55, 65, 60, 7, 8),
    Tissue.STOMACH: (42, 65, 75, 68, 7, 8),
    Tissue.DUODENUM: (40, 72, 80, 70, 7, 8),
    Tissue.LEFT_KIDNEY: (32, 190, 178, 150, 12, 6),
    Tissue.RIGHT_MEDULLA: (32, 75, 165, 150, 8, 6),
    Tissue.LEFT_MEDULLA: (32, 75, 165, 150, 8, 6),
    Tissue.LIVER_VEIN: (44, 72, 155, 108, 10, 4),
    Tissue.ESOPHAGUS_GAS: (-800, -800, -800, -800, 60, 40),
    Tissue.STOMACH_FLUID: (22, 22, 22, 22, 12, 22),
    Tissue.STOMACH_GAS: (-950, -950, -950, -950, 10, 5),
    Tissue.DUODENUM_FLUID: (18, 22, 24, 22, 10, 15),
    Tissue.SKIN: (10, 10, 15, 15, 10, 8),
    Tissue.FAT: (-102, -102, -102, -102, 7, 7),
    Tissue.MUSCLE: (52, 56, 62, 62, 7, 11),
    Tissue.VISCERAL_FAT: (-97, -97, -97, -97, 8, 10),
    Tissue.LUNG: (-830, -830, -825, -825, 40, 25),
    Tissue.MEDIASTINUM: (-30, -20, -15, -20, 20, 45),
    Tissue.MYOCARDIUM: (45, 90, 105, 85, 8, 8),
    Tissue.HEART_BLOOD: (42, 250, 150, 110, 15, 10),
    Tissue.TRACHEA: (-980, -980, -980, -980, 5, 0),
    Tissue.CORTICAL: (480, 480, 480, 480, 70, 60),
    Tissue.TRABECULAR: (165, 175, 185, 185, 40, 30),
    Tissue.CARTILAGE: (90, 92, 95, 95, 12, 12),
    Tissue.CORD: (28, 30, 32, 32, 5, 4),
    Tissue.ARTERY: (42, 300, 150, 108, 12, 4),
    Tissue.VEIN: (42, 85, 130, 108, 14, 5),
    Tissue.PORTAL_VEIN: (42, 90, 160, 110, 14, 4),
    Tissue.BOWEL_WALL: (40, 70, 80, 70, 8, 12),
    Tissue.BOWEL_FLUID: (18, 20, 22, 22, 8, 25),
    Tissue.BOWEL_CONTRAST: (270, 270, 270, 270, 60, 40),
    Tissue.BOWEL_GAS: (-940, -940, -940, -940, 15, 10),
    Tissue.STOOL: (-20, -20, -20, -20, 40, 95),
    Tissue.BLADDER: (8, 8, 8, 60, 7, 3),
    Tissue.TABLE: (-60, -60, -60, -60, 60, 20),
}
_SAME_BLOOD = ((Tissue.RIGHT_KIDNEY, Tissue.LEFT_KIDNEY), (Tissue.RIGHT_MEDULLA, Tissue.LEFT_MEDULLA))


def acquire(
    tissue: NDArray[np.uint8],
    spacing_mm: tuple[float, ...],
    phase: str,
    body_depth_mm: float,
    rng: np.random.Generator,
) -> NDArray[np.int16]:
    """Image a body.

    Args:
        tissue: (X, Y, Z) of :class:`Tissue`.
        spacing_mm: voxel size.
        phase: one of ``PHASES``.
        body_depth_mm: mean diameter of the trunk, which decides how much noise there is.
        rng: draws the patient, texture and noise.

    Returns:
        Int16 (X, Y, Z) in HU, between -1024 and 3071.
    """
    mean, texture_sd = _draw_hu(phase, rng)
    slow = _smooth_noise(tissue.shape, spacing_mm, 13.0, rng)
    fine = _smooth_noise(tissue.shape, spacing_mm, max(6.0, 1.6 * max(spacing_mm)), rng)
    image = mean[tissue] + texture_sd[tissue] * (0.7 * slow + 0.7 * fine)
    # vessels of mesentery and lung: crests of the fine field
    crest = np.abs(fine) < 0.055
    image[crest & (tissue == Tissue.VISCERAL_FAT) & (slow > 0.6)] = mean[Tissue.VEIN] - 25
    image[(fine > 1.75) & (tissue == Tissue.LUNG)] = -350
    image[(fine > 1.5) & (tissue == Tissue.STOOL)] = -650  # bubbles
    image[(fine > 1.2) & (tissue == Tissue.MUSCLE)] -= 45  # fat within muscles
    if phase == "arterial":  # the spleen fills in stripes
        striped = tissue == Tissue.SPLEEN
        image[striped] += 28 * np.sin(3.0 * slow[striped] + 2.0 * fine[striped])
    image = gaussian_filter(image, rng.uniform(0.45, 0.7), truncate=3.0)  # partial volume
    image += scanner_noise(tissue.shape, spacing_mm, body_depth_mm, rng)
    if rng.random() < 0.2:
        image += streaks(tissue, rng)
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)


def streaks(tissue: NDArray[np.uint8], rng: np.random.Generator) -> Array:
    """Streaks from left to right where rays pass through much bone (hips, shoulders, arms beside the body), in HU."""
    bone = (tissue == Tissue.CORTICAL).mean(axis=0, keepdims=True)  # (1, Y, Z) share of a ray
    lines = gaussian_filter1d(rng.standard_normal(tissue.shape, dtype=np.float32), 12, axis=0)
    strength = rng.uniform(100, 250) * gaussian_filter1d(bone, 2, axis=1)
    return (lines / lines.std() * strength * (tissue != Tissue.AIR)).astype(np.float32)


def _draw_hu(phase: str, rng: np.random.Generator) -> tuple[Array, Array]:
    """Mean and texture sd (HU) of every tissue in one patient."""
    column = PHASES.index(phase)
    between_patients = rng.normal(0, 1, len(Tissue))
    dose = rng.normal(1, 0.12)  # contrast dose and timing differ between patients
    for right, left in _SAME_BLOOD:
        between_patients[left] = between_patients[right]
    mean = np.zeros(len(Tissue), dtype=np.float32)
    texture = np.zeros(len(Tissue), dtype=np.float32)
    for tissue in Tissue:
        *by_phase, sd, texture[tissue] = _HU[tissue]
        uptake = by_phase[column] - by_phase[0]
        mean[tissue] = by_phase[0] + dose * uptake + sd * np.clip(between_patients[tissue], -2, 2)
    mean[Tissue.AIR] = -1000
    if rng.random() < 0.25:  # a fatty pancreas or a fatty liver
        mean[Tissue.PANCREAS] -= rng.uniform(15, 45)
        texture[Tissue.PANCREAS] += 12
    if rng.random() < 0.2:
        mean[Tissue.LIVER] -= rng.uniform(15, 40)
    return mean, texture


def _smooth_noise(
    shape: tuple[int, ...], spacing_mm: tuple[float, ...], scale_mm: float, rng: np.random.Generator
) -> Array:
    """A random field of unit variance that changes over about ``scale_mm``."""
    knots = [max(4, int(np.ceil(n * s / scale_mm)) + 1) for n, s in zip(shape, spacing_mm, strict=True)]
    field = spread_knots(rng.standard_normal((*knots, 1), dtype=np.float32), shape)[..., 0]
    return field / np.float32(field.std())


def scanner_noise(
    shape: tuple[int, ...], spacing_mm: tuple[float, ...], body_depth_mm: float, rng: np.random.Generator
) -> Array:
    """Noise with a band-pass spectrum in the slice (ramp times Gaussian) and blur across slices, in HU."""
    sigma = np.exp(rng.uniform(np.log(8), np.log(30)))
    if rng.random() < 0.05:  # a sharp lung kernel
        sigma = rng.uniform(40, 70)
    sigma *= np.exp(0.035 * (body_depth_mm / 10 - 30)) / np.sqrt(max(spacing_mm[2], 1.0) / 5)
    sigma = float(np.clip(sigma, 6, 70))
    peak = rng.uniform(0.2, 0.35) if rng.random() < 0.6 else rng.uniform(0.08, 0.15)  # FBP, or iterative
    peak = min(peak, 0.35 / max(spacing_mm[:2]))  # below what the pixels can show, cycles per mm
    white = rng.standard_normal(shape, dtype=np.float32)
    fx = fft.fftfreq(shape[0], spacing_mm[0])[:, None]
    fy = fft.rfftfreq(shape[1], spacing_mm[1])[None, :]
    frequency = np.hypot(fx, fy)
    power = frequency * np.exp(-(frequency**2) / (2 * peak**2))  # largest at ``peak``
    spectrum = fft.rfft2(white, axes=(0, 1)) * np.sqrt(power)[..., None].astype(np.float32)
    noise = fft.irfft2(spectrum, s=shape[:2], axes=(0, 1))
    noise = gaussian_filter1d(noise, rng.uniform(0.3, 0.75), axis=2, truncate=3.0)
    return noise * np.float32(sigma / noise.std())
