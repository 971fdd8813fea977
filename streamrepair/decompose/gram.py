"""The Gram route: one streaming pass builds G = ΔᵀΔ on the short side; its eigenvalues are the squared singular values.

Squaring costs precision: an error ε‖G‖ in G moves small singular values by ε·s_max²/(2s). In float32 products with
float64 sums that error is measured (not assumed) on probes, and the result is used only where it fixes the median and
every side of τ; float64 does, if need be with the largest values taken out, for all but exactly low-rank deltas.

Source: Golub & Van Loan, Matrix Computations, section 8.6; the checks are `certify`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from streamrepair.decompose import certify, deflated, matrix_free, randomized, single
from streamrepair.decompose.arithmetic import Arithmetic, Count, Gram, Precision, Spectrum
from streamrepair.decompose.choose import Estimate
from streamrepair.decompose.convert import Doubles
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.truncation import (
    LEAST_FLOAT32_VALUE,
    BluntError,
    OutgrownError,
    Truncation,
    UnresolvedError,
    check_sums,
    decide,
    errors_along,
    mixing,
    refuse_mixing,
)
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold


def truncate(
    source: PanelSource,
    rule: HardThreshold,
    *,
    arithmetic: Arithmetic,
    precision: Precision,
    krylov: float = 0.0,
    estimate: Estimate = "exact",
    held: float = 0.0,
    left: list[str] | None = None,
    drowning: list[Doubles] | None = None,
) -> Truncation:
    """Decide and factor one delta through its Gram matrix, or without one where few values are kept.

    Args:
        krylov: share of the rank up to which `randomized` goes first; 0: not at all.
        estimate: of the noise; "fast" is `randomized`'s alone.
        held: share up to which `matrix_free` goes before that.
        left: gets why methods were left for the one whose answer, or error, this is.
        drowning: gets, on the CPU, the directions that `deflated` is to take out if they hide the others.

    Raises:
        UnresolvedError: this precision cannot tell the kept rank.
        NonFiniteDeltaError: the sums are not finite.
        NumericalError: LAPACK failed or its answer did not pass the checks.
    """
    left = [] if left is None else left
    host = arithmetic if isinstance(arithmetic, HostArithmetic) else None
    probes = certify.probe_vectors(source.cols)
    if held and precision == "float32" and host is not None:
        try:
            return matrix_free.truncate(source, rule, arithmetic=host, probes=probes, most_kept=held)
        except (ArithmeticError, np.linalg.LinAlgError) as error:
            left.append(f"randomized-float32 without a Gram matrix: {error}")
            krylov = 0.0 if isinstance(error, OutgrownError) and held >= krylov else krylov
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is met just below
        gram = arithmetic.gram(source, probes, precision)
    check_sums(gram.trace, gram.exact_images)
    if krylov and gram.matrix is not None:
        try:
            return randomized.truncate(
                source,
                rule,
                gram=gram,
                probes=probes,
                precision=precision,
                estimate=estimate,
                most_kept=krylov,
                products=None if host is None else partial(host.products, source),
            )
        except (ArithmeticError, np.linalg.LinAlgError) as error:
            left.append(f"randomized-{precision}: {error}")
    if precision == "float32" and host is not None:
        return single.truncate(source, rule, arithmetic=host, gram=gram, probes=probes)
    spectrum = gram.factorise()
    try:
        return conclude(gram, spectrum, rule, source.rows, precision)
    except BluntError:  # nothing that is large but G was made by then
        if host is not None and drowning is not None:
            basis = deflated.directions(spectrum, _factor_error(gram, spectrum)[1])
            drowning.extend([basis] if len(basis) else [])
        raise


def without(drowning: Sequence[Doubles], source: PanelSource, rule: HardThreshold, host: HostArithmetic) -> Truncation:
    """The decision for a delta from which the directions that hide the others are taken out first.

    Args:
        drowning: as `truncate` left them, (r, n).

    Raises:
        UnresolvedError: there are none, or what is left is too near to them, or to rounding.
        NumericalError: a factorisation did not pass the checks.
    """
    if not drowning:
        raise UnresolvedError(f"no {deflated.most(source.cols)} values or fewer stand out")
    rest = host.deflated(source, certify.probe_vectors(source.cols), drowning[-1])

    def of_rest() -> Truncation:
        return conclude(rest.gram, rest.gram.factorise(), rule, source.rows, "float64")

    return deflated.conclude(source, rule, rest, of_rest)


def _factor_error(gram: Gram, spectrum: Spectrum) -> tuple[Doubles, float]:
    """What the factors make of probes less what G does, and how far any eigenvalue may be off by that and by G's error.

    Raises:
        NumericalError: they are not the factors of G.
    """
    n, largest = gram.images.shape[1], float(spectrum.values[-1])
    difference: Doubles = spectrum.product(certify.probe_vectors(n)) - gram.images
    certify.check_factor(difference, largest)
    bound = certify.spectral_bound(gram.images - gram.exact_images) + certify.spectral_bound(difference)
    return difference, bound + certify.solver_bound(largest, n) + gram.moved


def conclude(gram: Gram, spectrum: Spectrum, rule: HardThreshold, m: int, precision: Precision) -> Truncation:
    """The decision for a factorised Gram matrix, and all checks of it.

    Args:
        m: the longer side of the delta.

    Raises:
        UnresolvedError: this precision cannot tell the kept rank.
        NumericalError: the factorisation did not pass the checks.
    """
    n = gram.images.shape[1]
    probes = certify.probe_vectors(n)
    values, largest = spectrum.values, float(spectrum.values[-1])
    if not (np.isfinite(values).all() and largest > 0.0):
        raise NumericalError(f"eigenvalues up to {largest} of a matrix of trace {gram.trace}")
    difference, bound = _factor_error(gram, spectrum)
    threshold, close = decide(values, bound, rule, m, n)
    if precision == "float32" and (close or threshold.s_median**2 < LEAST_FLOAT32_VALUE):
        raise UnresolvedError(f"{close} values within {bound:.1e} of the squared threshold")
    rank = threshold.rank_kept
    close = _checked_count(spectrum.count_above(threshold.tau * threshold.tau, bound), rank, close)
    if precision == "float32" and close:
        raise UnresolvedError(f"a count leaves {close} values near the squared threshold open")
    vectors, kept = spectrum.top(rank), values[n - rank :]
    residuals = certify.check_vectors(vectors, kept, probes, gram.images)
    error = difference + gram.images - gram.exact_images
    # A solver may hand out vectors of a cluster's other side: only their residuals, at the cluster's scale, show it.
    errors = np.hypot(errors_along(vectors, error), residuals)
    undecided = slice(max(0, n - rank - close), n - rank + close)
    refuse_mixing(mixing(values, rank, errors, undecided), kept, gram.weight)
    return Truncation(
        values=np.sqrt(np.maximum(values, 0.0)),
        threshold=threshold,
        vh=vectors,
        frob_delta_in=gram.trace**0.5,
        backend=f"gram-{precision}",
        undecidable=close,
    )


def _checked_count(counted: Count, rank: int, close: int) -> int:
    """How many values are undecidable: those within the bound of τ², or what the count leaves open if that is more.

    Raises:
        NumericalError: the count is another one.
    """
    close = max(close, counted.at_most - counted.at_least)
    for found in (counted.at_least, counted.at_most):
        certify.check_count(found, rank, close)
    return close
