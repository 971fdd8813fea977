"""An estimated threshold and few values kept: block Krylov on Δ itself, without a Gram matrix.

With `estimate="fast"` there is no median to be counted, and so no factorisation that needs G; to form G would take
longer than all that is done with it. Δ is held in float32, and ΔᵀΔ applied by two products with it:

1. block Lanczos finds the top of the spectrum, a start block of its own the density of the rest (`krylov_search`),
   which gives λ_med, τ and its interval;
2. at least k: k Ritz values lie above the interval's lower end (Cauchy's interlacing); at most k: what a random start
   block sees of the complement of their vectors, and what it can have failed to see (`krylov_search.unseen`).

Source: Kuczyński & Woźniakowski 1992; Parlett, The Symmetric Eigenvalue Problem, sections 10.1 and 11.5.
"""

from __future__ import annotations

import numpy as np

from streamrepair.decompose import certify
from streamrepair.decompose.convert import Doubles
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.krylov_search import Search, rotation
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.randomized import Facts, concluded
from streamrepair.decompose.truncation import Truncation, UnresolvedError, check_sums, refuse_estimator, refuse_mixing
from streamrepair.spectral.threshold import HardThreshold


def truncate(
    source: PanelSource, rule: HardThreshold, *, arithmetic: HostArithmetic, probes: Doubles, most_kept: float
) -> Truncation:
    """Decide and factor one delta in float32, with an interval for τ.

    Args:
        probes: (p, n) that enter no computation. most_kept: share of the rank above which it hands over.

    Raises:
        OutgrownError: the basis would have to be larger than pays.
        UnresolvedError: G, or another method, is needed.
        NonFiniteDeltaError: sums over the delta are not finite.
        NumericalError: LAPACK failed, or its answer did not pass the checks.
    """
    refuse_estimator(rule)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is met
        held = arithmetic.hold(source, probes)
        check_sums(held.trace, held.images)
        search = Search(
            held.operator,
            rule=rule,
            shape=(source.rows, source.cols),
            bound=certify.spectral_bound(held.operator.times(probes) - held.images),
            most_kept=most_kept,
        )
        search.begin()
        density = search.density()
        if not density.continuous(search.place):
            raise UnresolvedError("the spectrum is not continuous around its median")
        median = search.estimated(density)
        search.refuse_blunt(median.value, "float32")
        low, high = search.around(median.value, median.bound + search.bound)
        search.settle(low)
        ceiling, following = search.ceiling(low)
        top = search.top(low)
    rest = max(ceiling, top.following + top.following_residual)
    refuse_mixing(rotation(top.values, top.residuals + 0.5 * search.bound, rest), top.values, held.weight)
    top = top._replace(following=max(top.following, following))
    facts = Facts(probes, held.images, held.trace, "float32")
    return concluded(search, median, top, facts, interval=(low, high))
