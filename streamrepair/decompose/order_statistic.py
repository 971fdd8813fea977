"""One eigenvalue of a symmetric matrix by its place in the order, without the others.

A factorisation at a guess counts what lies below it, exactly (Sylvester). The guess is moved until the wanted
eigenvalue is among its nearest neighbours; those are then found by block Lanczos on the inverse, which the factors
give, and counted from the guess.

Source: Ericsson & Ruhe 1980 (spectral transformation Lanczos); Parlett, The Symmetric Eigenvalue Problem, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamrepair.decompose.krylov import BlockLanczos
from streamrepair.decompose.symmetric import SymmetricPair
from streamrepair.decompose.truncation import UnresolvedError

Doubles = NDArray[np.float64]

REACH = 14
"""Neighbours of a shift that are found rather than shifted to; further away a second factorisation is cheaper."""
_BLOCK = 16
_MOST_STEPS = 20
_MOST_SHIFTS = 6
_SEED = 0x5EED


@dataclass(frozen=True, slots=True)
class Located:
    """An eigenvalue found by its place."""

    value: float
    bound: float
    """It is off by no more than this."""


def locate(
    matrix: SymmetricPair, place: int, guess: float, slope: float, *, tolerance: float, probes: Doubles
) -> Located:
    """The eigenvalue with `place` eigenvalues below it.

    Args:
        guess: where to begin. slope: eigenvalues per unit there, roughly.
        tolerance: largest bound that will do, absolute.
        probes: (p, n) for the measurement of the factors' error.

    Raises:
        UnresolvedError: it was not found within the bound; another method will have to.
        NumericalError: LAPACK failed.
    """
    low, high = (-np.inf, 0), (np.inf, matrix.size)  # (shift, eigenvalues below it)
    c = guess
    for _ in range(_MOST_SHIFTS):
        below = matrix.size - matrix.shift(c)
        if below <= place:
            low = max(low, (c, below))
        else:
            high = min(high, (c, below))
        steps = place - below + (place >= below)  # ±1 is the nearest on that side
        if abs(steps) <= REACH:
            return _nearby(matrix, c, steps, tolerance, probes)
        c = _next(c, place - below + 0.5, slope, low, high)
    raise UnresolvedError(f"{_MOST_SHIFTS} factorisations did not come near the median eigenvalue")


def _next(c: float, missing: float, slope: float, low: tuple[float, int], high: tuple[float, int]) -> float:
    """The next shift: by secant between two counts once there are two, by the given slope before."""
    if np.isfinite(low[0]) and np.isfinite(high[0]):
        # Kept off both ends, where the secant of a curved distribution would stick.
        part = (missing + (c == high[0]) * (high[1] - low[1])) / (high[1] - low[1])
        return low[0] + float(np.clip(part, 0.05, 0.95)) * (high[0] - low[0])
    if slope <= 0.0:
        raise UnresolvedError("no eigenvalues were seen near the estimated median")
    return c + missing / slope


def _nearby(matrix: SymmetricPair, c: float, steps: int, tolerance: float, probes: Doubles) -> Located:
    n, count = matrix.size, abs(steps)
    lanczos = BlockLanczos(
        matrix.solve, n, block=min(_BLOCK, n), capacity=min(n, (_MOST_STEPS + 1) * _BLOCK), seed=_SEED
    )
    while not lanczos.full:
        lanczos.extend()
        if lanczos.size < 2 * count + _BLOCK:
            continue
        ritz = lanczos.ritz()
        inverse = ritz.values if steps > 0 else ritz.values[::-1]
        order = np.arange(len(inverse)) if steps > 0 else np.arange(len(inverse))[::-1]
        if np.sign(inverse[count - 1]) != np.sign(steps):
            continue
        nu, residual = float(inverse[count - 1]), float(ritz.residuals[order[count - 1]])
        # ν = 1/(λ − c), so that an error of ν is one of λ divided by ν².
        if residual <= 0.1 * tolerance * nu**2:
            vector = lanczos.vectors(ritz.coefficients[:, order[count - 1 : count]])
            return _checked(matrix, (c, nu, vector), tolerance, probes)
    raise UnresolvedError(f"the {count} eigenvalues next to the estimated median did not converge")


def _checked(matrix: SymmetricPair, found: tuple[float, float, Doubles], tolerance: float, probes: Doubles) -> Located:
    """The eigenvalue from its inverse's Ritz pair, which is tried out once more.

    Some eigenvalue of the inverse lies within the residual of ν, and the factors' matrix differs from G by their error.
    """
    c, nu, vector = found
    vector = vector / np.linalg.norm(vector)
    residual = float(np.linalg.norm(matrix.solve(vector) - nu * vector))
    error = matrix.shift_error(c, probes)
    if not residual < 0.5 * abs(nu) or not (bound := 2.0 * residual / nu**2 + error) <= tolerance:
        raise UnresolvedError(
            f"the median eigenvalue's residual is {residual / nu**2:.1e}, its factors' error {error:.1e}"
        )
    if not error <= 0.5 * abs(1.0 / nu):
        raise UnresolvedError(f"the count at the median is certain to {error:.1e} only")
    return Located(c + 1.0 / nu, bound)
