"""HDR shown as SDR: the light that PQ and HLG signals stand for, and the curve that brings it into BT.709.

Reference white, 203 cd/m2 (ITU-R BT.2408), becomes SDR white. The primaries become those of BT.709.
Then the largest of R, G and B is compressed by the Moebius curve of FFmpeg's filter `tonemap`, and the
other two with it, so that hues stay: light up to 0.9 of reference white is kept as it is, 1000 cd/m2
becomes 1, and what lies above is cut off. The result is coded with the inverse of BT.1886's gamma, 2.4.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

# As in ITU-T H.273, tables 2 and 3.
BT709, BT2020, P3 = 1, 9, 12
PQ, HLG = 16, 18

REFERENCE_WHITE = 203.0
PEAK = 1000.0
KNEE = 0.9
_CODES = 1 << 16
# Steps of linear light: enough that the darkest are less than a code of 8 bits apart.
_STEPS = 1 << 20
_GAMMA = 2.4
# Rows that are worked on together, so that what is between them and the result stays in the core's cache.
_ROWS = 32
# Of BT.2100's display at 1000 cd/m2.
_HLG_GAMMA = 1.2
_HLG_LUMA = np.array([0.2627, 0.6780, 0.0593])
# Red, green, blue and white, x and y: BT.709, BT.2020, SMPTE EG 432-1.
_D65 = (0.3127, 0.3290)
_CHROMATICITIES = {
    BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), _D65),
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),
    P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65),
}


def is_hdr(transfer: int) -> bool:
    """Whether a transfer characteristic (H.273) is PQ or HLG."""
    return transfer in (PQ, HLG)


def pq_light(signal: np.ndarray) -> np.ndarray:
    """Light in cd/m2 of PQ signals in [0, 1]: the EOTF of SMPTE ST 2084."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = np.asarray(signal, np.float64) ** (1 / m2)
    return 10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def hlg_scene(signal: np.ndarray) -> np.ndarray:
    """Scene light in [0, 1] of HLG signals in [0, 1]: the inverse OETF of ARIB STD-B67."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    signal = np.asarray(signal, np.float64)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def compressed(light: np.ndarray) -> np.ndarray:
    """The tone curve: relative light (1: reference white) in, relative SDR light out."""
    peak, knee = PEAK / REFERENCE_WHITE, KNEE
    a = -(knee**2) * (peak - 1) / (knee**2 - 2 * knee + peak)
    b = (knee**2 - 2 * knee * peak + peak) / (peak - 1)
    curve = (b**2 + 2 * b * knee + knee**2) / (b - a) * (light + a) / (np.maximum(light, knee) + b)
    return np.where(light <= knee, light, curve)


@lru_cache
def to_bt709(primaries: int) -> np.ndarray:
    """The 3x3 matrix from linear RGB of these primaries (unknown ones: BT.2020) to BT.709, as in SMPTE RP 177."""
    return np.linalg.inv(_to_xyz(BT709)) @ _to_xyz(
        primaries if primaries in _CHROMATICITIES else BT2020
    )


def _to_xyz(primaries: int) -> np.ndarray:
    red, green, blue, white = (
        np.array([x / y, 1, (1 - x - y) / y]) for x, y in _CHROMATICITIES[primaries]
    )
    columns = np.stack([red, green, blue], axis=1)
    return columns * np.linalg.solve(columns, white)


@lru_cache
def _light_of_codes(transfer: int) -> np.ndarray:
    """float32 (65536,): light over reference white of each PQ code; scene light of each HLG code."""
    signal = np.arange(_CODES) / (_CODES - 1)
    light = pq_light(signal) / REFERENCE_WHITE if transfer == PQ else hlg_scene(signal)
    return light.astype(np.float32)


@lru_cache
def _codes_of_light() -> np.ndarray:
    """uint8 (_STEPS,): the SDR code of each step of linear light."""
    light = np.arange(_STEPS) / (_STEPS - 1)
    return np.round(255 * light ** (1 / _GAMMA)).astype(np.uint8)


def as_sdr(rgb: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """SDR RGB, uint8 (H, W, 3), of HDR RGB in full range, uint16 (H, W, 3).

    `transfer` is PQ or HLG, `primaries` BT709, BT2020 or P3, as in H.273.
    """
    blocks = range(0, len(rgb), _ROWS)
    return np.concatenate([_as_sdr(rgb[at : at + _ROWS], transfer, primaries) for at in blocks])


def _as_sdr(rgb: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    light = _light_of_codes(transfer)[rgb]
    if transfer == HLG:
        # BT.2100's OOTF: the light of a display of PEAK.
        scene = (light @ _HLG_LUMA.astype(np.float32))[..., None]
        light *= PEAK / REFERENCE_WHITE * scene ** (_HLG_GAMMA - 1)
    light = light @ to_bt709(primaries).T.astype(np.float32)
    np.maximum(light, 0, out=light)
    largest = light.max(axis=-1, keepdims=True)
    bright = largest[..., 0] > KNEE
    light[bright] *= compressed(largest[bright]) / largest[bright]
    steps = np.minimum(light * (_STEPS - 1) + 0.5, _STEPS - 1).astype(np.int32)
    return _codes_of_light()[steps]
