"""One eigenvalue of a symmetric matrix by its place in the order, without the others.

A factorisation at a guess counts what lies below it, exactly (Sylvester). The guess is moved until the wanted
eigenvalue is among its nearest neighbours; those are then found by block Lanczos on the inverse, which the factors
give, and counted from the guess.

Source: Ericsson & Ruhe 1980 (spectral transformation Lanczos); Parlett, The Symmetric Eigenvalue Problem, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamrepair.decompose.convert import Doubles
from streamrepair.decompose.krylov import BlockLanczos, Ritz
from streamrepair.decompose.symmetric import SymmetricPair
from streamrepair.decompose.truncation import UnresolvedError

REACH = 14
"""Neighbours of a shift that are found rather than shifted to; further away a second factorisation is cheaper."""
_BLOCK = 16
_MOST_STEPS = 24
_MOST_SHIFTS = 16
_SEED = 0x5EED
_SOUND = 1e-4
"""Residual of a neighbour's inverse, relative, up to which it serves to span the surroundings."""
_BEYOND = 7
"""Neighbours that are kept beyond the wanted one."""


@dataclass(frozen=True, slots=True)
class Located:
    """An eigenvalue found by its place."""

    value: float
    bound: float
    """It is off by no more than this."""
    around: Doubles | None = None
    """(w, n) vectors of consecutive eigenvalues, ascending, as rows."""
    index: int = 0
    """Which of them is the value's."""


def locate(
    matrix: SymmetricPair,
    place: int,
    guess: float,
    slope: float,
    *,
    tolerance: float,
    probes: Doubles,
    around: bool = False,
) -> Located:
    """The eigenvalue with `place` eigenvalues below it.

    Args:
        guess: where to begin, positive. slope: eigenvalues per unit there, roughly.
        tolerance: largest bound that will do, absolute.
        probes: (p, n) for the measurement of the factors' error.
        around: whether some neighbours on either side are wanted too.

    Raises:
        UnresolvedError: it was not found within the bound; another method will have to.
        NumericalError: LAPACK failed.
    """
    low, high = (-np.inf, 0), (np.inf, matrix.size)  # (shift, eigenvalues below it)
    c, stride = guess, 1.0
    for _ in range(_MOST_SHIFTS):
        below = matrix.size - matrix.shift(c)
        if below <= place:
            low = max(low, (c, below))
        else:
            high = min(high, (c, below))
        steps = place - below + (place >= below)  # ±1 is the nearest on that side
        if abs(steps) <= REACH:
            found = _nearby(matrix, c, steps, tolerance, probes, around=around)
            if isinstance(found, Located):
                return found
            c = found
        else:
            # The density may be wrong by any factor: it is trusted less with every step that did not arrive.
            c = _next(c, (place + 0.5, below), slope / stride, low, high)
            stride *= 3.0
    raise UnresolvedError(f"{_MOST_SHIFTS} factorisations did not come near the median eigenvalue")


def _next(c: float, places: tuple[float, int], slope: float, low: tuple[float, int], high: tuple[float, int]) -> float:
    """The next shift, from the wanted place and the one at c: between two counts where there are two, else by slope."""
    place, below = places
    if np.isfinite(low[0]) and np.isfinite(high[0]):
        # Kept off both ends, where the secant of a curved distribution would stick.
        part = float(np.clip((place - low[1]) / max(1, high[1] - low[1]), 0.2, 0.8))
        # A far end with nothing near it would be crept away from: there the middle of the logarithms is nearer.
        if low[0] > 0.0 and high[0] > 2.0 * low[0]:
            return float(low[0] ** (1.0 - part) * high[0] ** part)
        return low[0] + part * (high[0] - low[0])
    if slope <= 0.0:
        raise UnresolvedError("no eigenvalues were seen near the estimated median")
    # Squared singular values are positive: a factor at a time, however wrong the slope.
    return float(np.clip(c + (place - below) / slope, 0.25 * c, 4.0 * c))


def _nearby(
    matrix: SymmetricPair, c: float, steps: int, tolerance: float, probes: Doubles, *, around: bool
) -> Located | float:
    """The eigenvalue so many steps from the shift; if it did not converge, a shift that is nearer."""
    n, count = matrix.size, abs(steps)
    capacity = min(n, (_MOST_STEPS + 1) * _BLOCK)
    lanczos = BlockLanczos(matrix.solve, n, block=min(_BLOCK, n), capacity=capacity, seed=_SEED)
    nu = 0.0
    while not lanczos.full:
        lanczos.extend()
        if lanczos.size < 2 * count + _BLOCK:
            continue
        ritz = lanczos.ritz()
        at = count - 1 if steps > 0 else len(ritz.values) - count
        nu, residual = float(ritz.values[at]), float(ritz.residuals[at])
        # ν = 1/(λ − c), so that an error of ν is one of λ divided by ν².
        if np.sign(nu) == np.sign(steps) and residual <= 0.1 * tolerance * nu * nu:
            vectors, index = _surroundings(lanczos, ritz, steps)
            if around and min(index, len(vectors) - 1 - index) < _BEYOND and not lanczos.full:
                continue
            return _checked(matrix, (c, nu, vectors, index), tolerance, probes)
    if np.sign(nu) != np.sign(steps):
        raise UnresolvedError(f"the {count} eigenvalues next to the estimated median did not converge")
    return c + 1.0 / nu


def _surroundings(lanczos: BlockLanczos, ritz: Ritz, steps: int) -> tuple[Doubles, int]:
    """Vectors of consecutive eigenvalues around the wanted one, ascending, as rows; and its index among them."""
    count = abs(steps)
    sound = ritz.residuals <= _SOUND * np.abs(ritz.values)
    # Nearest to the shift first, on either side of it: as many as are known without a gap.
    sides = []
    for order in (np.flatnonzero(ritz.values > 0.0), np.flatnonzero(ritz.values < 0.0)[::-1]):
        known = len(order) if sound[order].all() else int(np.argmin(sound[order]))
        sides.append(order[: min(known, count + 2 * _BEYOND)])
    above, below = sides
    if len(above if steps > 0 else below) < count:  # one on the way is not known well enough: the wanted one alone
        above, below = (np.array([count - 1]), below[:0]) if steps > 0 else (above[:0], np.array([len(sound) - count]))
        count = 1
    places = np.concatenate([below[::-1], above])
    index = len(below) + count - 1 if steps > 0 else len(below) - count
    return lanczos.vectors(ritz.coefficients[:, places]), index


def _checked(
    matrix: SymmetricPair, found: tuple[float, float, Doubles, int], tolerance: float, probes: Doubles
) -> Located:
    """The eigenvalue from its inverse's Ritz pair, which is tried out once more.

    Some eigenvalue of the inverse lies within the residual of ν, and the factors' matrix differs from G by their error;
    count and solutions come from the same factors, so that the place is right to that error too.
    """
    c, nu, vectors, index = found
    vector = vectors[index : index + 1] / np.linalg.norm(vectors[index])
    residual = float(np.linalg.norm(matrix.solve(vector) - nu * vector))
    error = matrix.shift_error(c, probes)
    if not residual < 0.5 * abs(nu) or not (bound := 2.0 * residual / (nu * nu) + error) <= tolerance:
        raise UnresolvedError(
            f"the median eigenvalue's residual is {residual / (nu * nu):.1e}, its factors' error {error:.1e}"
        )
    return Located(c + 1.0 / nu, bound, vectors, index)
