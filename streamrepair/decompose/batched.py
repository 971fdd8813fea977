"""The Gram route for many small matrices of one shape at once, each with the certificate that it would have alone.

On a GPU a matrix of a few hundred columns takes less time to compute than to launch. Products and factorisations are
done for all of a batch; decisions and checks are `gram`'s, member by member. A member that fails is handed back with
its error, to go up the ladder alone: it takes no other with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streamrepair.decompose import certify, gram
from streamrepair.decompose.arithmetic import BatchArithmetic, GramBatch, Precision
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.truncation import Truncation, check_sums
from streamrepair.errors import NumericalError, brief
from streamrepair.spectral.threshold import HardThreshold


def truncate_batch(
    sources: Sequence[PanelSource],
    rule: HardThreshold,
    arithmetic: BatchArithmetic,
    *,
    precision: Precision = "float64",
) -> list[Truncation | NumericalError]:
    """Decide and factor deltas of equal (tall) shape through their Gram matrices.

    The batch is halved where the device has no memory for it; a single one that does not fit is an error like others.

    Returns:
        For each source its truncation, or why there is none.
    """
    if not sources:
        return []
    assert len({(source.rows, source.cols) for source in sources}) == 1, "a batch has one shape"
    probes = certify.probe_vectors(sources[0].cols)
    failure: NumericalError
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            grams = arithmetic.grams(sources, probes, precision)
    except NumericalError as error:
        failure = _bare(error)
    else:
        return _concluded(grams, rule, sources[0].rows, precision)
    if len(sources) == 1:
        return [failure]
    half = len(sources) // 2
    first = truncate_batch(sources[:half], rule, arithmetic, precision=precision)
    return first + truncate_batch(sources[half:], rule, arithmetic, precision=precision)


def _concluded(
    grams: GramBatch, rule: HardThreshold, m: int, precision: Precision
) -> list[Truncation | NumericalError]:
    results: dict[int, Truncation | NumericalError] = {}
    sound = []
    for number, member in enumerate(grams.members):
        try:
            check_sums(member.trace, member.exact_images)
            sound.append(number)
        except NumericalError as error:  # kept from the others: eigh of a batch with NaN may fail as a whole
            results[number] = _bare(error)
    spectra = grams.factorise(sound) if sound else []
    for number, spectrum in zip(sound, spectra, strict=True):
        if isinstance(spectrum, NumericalError):
            results[number] = _bare(spectrum)
            continue
        try:
            results[number] = gram.conclude(grams.members[number], spectrum, rule, m, precision)
        except NumericalError as error:
            results[number] = _bare(error)
        except (RuntimeError, np.linalg.LinAlgError) as error:  # torch's own
            results[number] = NumericalError(brief(error))
    return [results[number] for number in range(len(grams.members))]


def _bare(error: NumericalError) -> NumericalError:
    """The error without its origins, which would keep a device's memory for as long as the error is kept."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
