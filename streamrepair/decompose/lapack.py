"""The few LAPACK and BLAS routines the Gram route needs, called in place on the caller's arrays.

They are SciPy's own builds (OpenBLAS or MKL), reached through the function pointers that `scipy.linalg.cython_lapack`
exports for compiled code. SciPy's Python wrappers copy their arguments and some hold the interpreter lock; here
nothing is copied, so that projected memory is the memory used, and ctypes releases the lock, so that workers run side
by side.

Arrays are passed as C-ordered NumPy arrays and seen by LAPACK as their Fortran transposes: a symmetric matrix is
itself, its Fortran lower triangle is the C upper one, and a row of a C array is a Fortran column.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamrepair.decompose.convert import Doubles, Singles
from streamrepair.errors import NumericalError

Real = Singles | Doubles
_Float = TypeVar("_Float", np.float32, np.float64)
_Argument = bytes | int | float | Real | NDArray[np.int32] | ctypes.c_int | ctypes.c_double

_LOWER = b"L"  # of the Fortran view: the upper triangle of the C-ordered array
_UPPER = b"U"  # likewise: the C lower triangle, where factors lie beside the matrix they are of

_loading = threading.Lock()


def tables() -> tuple[dict[str, object], ...]:
    """Name → pointer of SciPy's LAPACK and BLAS routines.

    Their modules are loaded by themselves: `scipy.linalg` around them takes a quarter of a second, most of it other
    packages that nothing here needs.
    """
    with _loading:  # while one thread loads a module, another would find half of it
        return _tables()


def is_loaded() -> bool:
    """Whether the libraries are there already: loading them takes memory."""
    return _tables.cache_info().currsize > 0 or "scipy.linalg.cython_lapack" in sys.modules


@cache
def _tables() -> tuple[dict[str, object], ...]:
    import scipy  # sees to the libraries' places

    found = []
    for name in ("scipy.linalg.cython_lapack", "scipy.linalg.cython_blas"):
        # One that is there already is imported all the same: that waits for whoever is about it.
        module = import_module(name) if name in sys.modules else _alone(name, scipy.__path__)
        found.append(module.__pyx_capi__)
    return tuple(found)


def _alone(name: str, folders: Iterable[str]) -> ModuleType:
    """A module of scipy.linalg without its package; whoever imports it properly later gets it as ever."""
    spec = PathFinder.find_spec(name, [str(Path(folder) / "linalg") for folder in folders])
    if spec is None or spec.loader is None:  # installed in some other way
        return import_module(name)
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]  # its package does not know of it
    return module


@cache
def _routine(name: str, arguments: int) -> Callable[..., None]:
    """The compiled routine `name` as a function of `arguments` pointers."""
    capsule = next(table[name] for table in tables() if name in table)
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    pointer = get_pointer(capsule, get_name(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(pointer)


def _call(name: str, *arguments: _Argument, like: Real) -> None:
    """Call a routine with LAPACK's conventions: everything by reference, reals in the precision of `like`."""
    pointers, _held = _by_reference(arguments, like)
    _routine(_letter(like) + name, len(arguments))(*pointers)


def _by_reference(arguments: Sequence[_Argument], like: Real) -> tuple[list[int], list[object]]:
    """Addresses of all arguments, and what lies there, to be kept over the call."""
    real = ctypes.c_float if like.dtype == np.float32 else ctypes.c_double
    held: list[object] = []
    pointers: list[int] = []
    for argument in arguments:
        match argument:
            case np.ndarray():
                held.append(argument)
                pointers.append(argument.ctypes.data)
                continue
            case bytes():
                scalar: object = ctypes.c_char(argument)
            case int():
                scalar = ctypes.c_int(argument)
            case float():
                scalar = real(argument)
            case _:
                scalar = argument
        held.append(scalar)
        pointers.append(ctypes.addressof(scalar))  # type: ignore[arg-type]
    return pointers, held


def _letter(array: Real) -> Literal["s", "d"]:
    return "s" if array.dtype == np.float32 else "d"


def add_gram(panel: Real, gram: Real, *, beta: float) -> None:
    """gram ← panelᵀ·panel + beta·gram, Fortran lower triangle only (?syrk).

    Args:
        panel: (rows, n), or a stretch of columns of such.
        gram: (n, n), same dtype, rows contiguous; its C upper triangle is written.
        beta: 0 to overwrite, 1 to accumulate.
    """
    rows, n = panel.shape
    assert gram.shape == (n, n)
    assert gram.dtype == panel.dtype
    transposed, leading = _orientation(panel)
    transpose = b"T" if transposed else b"N"
    _call("syrk", _LOWER, transpose, n, rows, 1.0, panel, leading, beta, gram, _rows_apart(gram), like=gram)


def add_product(left: Real, right: Real, out: Real, *, alpha: float = 1.0, beta: float = 1.0) -> None:
    """out ← beta·out + alpha·left·right (?gemm).

    Args:
        left: (rows, k). right: (k, cols). out: (rows, cols), rows contiguous. Each may be part of a larger array.
    """
    (rows, k), cols = left.shape, right.shape[1]
    assert right.shape[0] == k
    assert out.shape == (rows, cols)
    # Fortran sees the transposes: outᵀ ← outᵀ + rightᵀ·leftᵀ.
    (right_flag, right_leading), (left_flag, left_leading) = (
        (b"T" if transposed else b"N", leading) for transposed, leading in (_orientation(right), _orientation(left))
    )
    operands = (right, right_leading, left, left_leading)
    _call("gemm", right_flag, left_flag, cols, rows, k, alpha, *operands, beta, out, _rows_apart(out), like=out)


def _orientation(array: Real) -> tuple[bool, int]:
    """Whether a matrix's columns and not its rows are contiguous, and how far apart those are, in elements."""
    if array.flags.c_contiguous or (not array.flags.f_contiguous and array.strides[1] == array.itemsize):
        return False, _rows_apart(array)
    return True, _rows_apart(array.T)


def _rows_apart(array: Real) -> int:
    """Elements from one contiguous row to the next."""
    if array.flags.c_contiguous:  # the stride of a single row says nothing
        return max(1, int(array.shape[1]))
    assert array.strides[1] == array.itemsize
    return int(array.strides[0] // array.itemsize)


def solve_triangle(upper: Real, rows: Real) -> None:
    """Each row b of (k, n) `rows` ← U⁻¹·b, U in the C upper triangle of (n, n) `upper` (?trsm), in place."""
    n, count = len(upper), len(rows)
    _call("trsm", b"L", _LOWER, b"T", b"N", n, count, 1.0, upper, n, rows, n, like=rows)


def tridiagonalise(gram: NDArray[_Float]) -> tuple[NDArray[_Float], NDArray[_Float], NDArray[_Float]]:
    """Overwrite a symmetric matrix by the reflectors of G = Q·T·Qᵀ (?sytrd).

    Returns:
        (n,) diagonal and (n − 1,) off-diagonal of T, and the reflectors' scales.

    Raises:
        NumericalError: LAPACK refused its arguments.
    """
    n = len(gram)
    diagonal, off, scales = (np.empty(max(1, size), gram.dtype) for size in (n, n - 1, n - 1))
    _with_workspace("sytrd", _LOWER, n, gram, n, diagonal, off, scales, like=gram)
    return diagonal, off[: n - 1], scales


def tridiagonal_values(diagonal: Doubles, off: Doubles) -> Doubles:
    """All eigenvalues of a symmetric tridiagonal matrix, ascending (dsterf: Pal–Walker–Kahan QL/QR, backward stable).

    Raises:
        NumericalError: no convergence.
    """
    values, scratch, info = diagonal.copy(), np.append(off, 0.0), ctypes.c_int()
    _call("sterf", len(values), values, scratch, info, like=values)
    _check("sterf", info)
    return values


def times_tridiagonal(diagonal: Doubles, off: Doubles, rows: Real) -> Doubles:
    """(k, n) T·v for each row v, T symmetric tridiagonal."""
    images: Doubles = rows * diagonal
    images[:, :-1] += rows[:, 1:] * off
    images[:, 1:] += rows[:, :-1] * off
    return images


def tridiagonal_vectors(diagonal: Doubles, off: Doubles, count: int) -> Doubles:
    """The eigenvectors of the `count` largest eigenvalues, as rows of a (count, n) array, ascending (dstemr: MRRR).

    Raises:
        NumericalError: the algorithm failed or found another number of vectors.
    """
    n = len(diagonal)
    values, vectors = np.empty(n), np.empty((count, n))
    scratch = np.append(off, 0.0)
    support, work, iwork = np.empty(2 * count, np.int32), np.empty(18 * n), np.empty(10 * n, np.int32)
    found, accurate, info = ctypes.c_int(), ctypes.c_int(1), ctypes.c_int()
    _call(
        "stemr", b"V", b"I", n, diagonal.copy(), scratch, 0.0, 0.0, n - count + 1, n, found, values, vectors, n, count,
        support, accurate, work, len(work), iwork, len(iwork), info, like=diagonal,
    )  # fmt: skip
    _check("stemr", info)
    if found.value != count:
        raise NumericalError(f"LAPACK stemr found {found.value} eigenvectors where {count} were asked for")
    return vectors


def factor_tridiagonal(diagonal: Doubles, off: Doubles) -> bool:
    """diagonal, off ← D, and L below its diagonal of ones, of T = L·D·Lᵀ (dpttrf); whether T is positive definite.

    Args:
        diagonal: (n,). off: (n,), of which the last entry is unused.
    """
    info = ctypes.c_int()
    _call("pttrf", len(diagonal), diagonal, off, info, like=diagonal)
    return info.value == 0


def twisted_vectors(diagonal: Doubles, lower: Doubles, values: Doubles, out: Doubles) -> None:
    """Each row of (k, n) `out` ← the unit eigenvector of L·D·Lᵀ for one of (k,) eigenvalues (dlar1v).

    Args:
        diagonal, lower: (n,) D and L, as `factor_tridiagonal` leaves them.
    """
    n, products = len(diagonal), lower * diagonal
    value, twist, scale = ctypes.c_double(), ctypes.c_int(), ctypes.c_double()
    counted, ignored, support = ctypes.c_int(), ctypes.c_double(), np.empty(2, np.int32)
    least = float(np.finfo(np.float64).tiny * max(1.0, products.max(initial=0.0)))
    matrix = (value, diagonal, lower, products, lower * products)
    results = (counted, ignored, ignored, twist, support, scale, ignored, ignored, np.empty(4 * n))
    pointers, _held = _by_reference((n, 1, n, *matrix, least, 0.0, out, 0, *results), out)
    routine, at = _routine("dlar1v", len(pointers)), pointers.index(out.ctypes.data)
    out.fill(0.0)
    for place, wanted in enumerate(values):
        value.value, twist.value, pointers[at] = wanted, 0, out[place].ctypes.data
        routine(*pointers)
        out[place] *= scale.value


def rotate_back(reflectors: Real, scales: Real, vectors: Real, *, transpose: bool = False) -> None:
    """Each row v of `vectors` ← Q·v (or Qᵀ·v), Q the product of `tridiagonalise`'s reflectors (?ormtr), in place."""
    n, count = len(reflectors), len(vectors)
    side = b"T" if transpose else b"N"
    _with_workspace("ormtr", b"L", _LOWER, side, n, count, reflectors, n, scales, vectors, n, like=reflectors)


def _with_workspace(name: str, *arguments: bytes | int | Real | NDArray[np.int32], like: Real) -> None:
    """Ask the routine for its best workspace, then call it with that."""
    size, info = np.zeros(1, like.dtype), ctypes.c_int()
    _call(name, *arguments, size, -1, info, like=like)
    work = np.empty(max(1, int(size[0])), like.dtype)
    _call(name, *arguments, work, len(work), info, like=like)
    _check(name, info)


def svd(matrix: Doubles, *, divide: bool) -> tuple[Doubles, Doubles, Doubles]:
    """U, s descending and Vᵀ of (m, n) `matrix`, thin (dgesdd, or dgesvd where not `divide`); it is left as it is.

    SciPy's own way to them holds the interpreter's lock for as long as they take, minutes where n is 8192: no signal
    would be heard, and no other worker would get on.

    Raises:
        NumericalError: it did not converge, or is too large for the routine's 32-bit workspace.
    """
    (m, n), k, info = matrix.shape, min(matrix.shape), ctypes.c_int()
    # What lies here in rows is the transpose to LAPACK, and Aᵀ = V·S·Uᵀ.
    vh, s, u = np.empty((k, n)), np.empty(k), np.empty((m, k))
    ways, more = ((b"S",), (np.empty(8 * k, np.int32),)) if divide else ((b"S", b"S"), ())
    rest = (n, m, matrix.copy(), n, s, vh, n, u, k)
    name, size = "gesdd" if divide else "gesvd", np.zeros(1)
    _call(name, *ways, *rest, size, -1, *more, info, like=s)
    if size[0] > np.iinfo(np.int32).max:
        raise NumericalError(f"LAPACK {name} has no room for its workspace with {m} x {n}")
    work = np.empty(max(1, int(size[0])))
    _call(name, *ways, *rest, work, len(work), *more, info, like=s)
    _check(name, info)
    return u, s, vh


def times_symmetric(matrix: Doubles, vectors: Doubles) -> Doubles:
    """G·v for each row v of `vectors`, where only the C upper triangle of `matrix` is set (dsymm)."""
    images = np.empty_like(vectors)
    n, count = len(matrix), len(vectors)
    _call("symm", b"L", _LOWER, n, count, 1.0, matrix, n, vectors, n, 0.0, images, n, like=matrix)
    return images


def factor_indefinite(matrix: Doubles) -> tuple[NDArray[np.int32], Doubles]:
    """C lower triangle ← Uᵀ of a symmetric matrix P·U·D·Uᵀ·Pᵀ stored there, U unit (dsytrf, dsyconv).

    Returns:
        (n,) pivots as LAPACK has them, and (n,) the entries beside D's diagonal; the diagonal is the matrix's.

    Raises:
        NumericalError: a pivot is exactly zero.
    Source: Bunch & Kaufman 1977.
    """
    n, info = len(matrix), ctypes.c_int()
    pivots, beside = np.zeros(n, np.int32), np.zeros(n)
    _with_workspace("sytrf", _UPPER, n, matrix, n, pivots, like=matrix)
    # Once here and not in every solve (dsytrs2): it walks along rows of a column-major array.
    _call("syconv", _UPPER, b"C", n, matrix, n, pivots, beside, info, like=matrix)
    _check("syconv", info)
    return pivots, beside


def solve_unit_triangle(triangle: Doubles, vectors: Doubles, *, transpose: bool) -> None:
    """Each row v of `vectors` ← U⁻¹·v (or U⁻ᵀ·v), U unit, its transpose in the C lower triangle (dtrsm), in place."""
    n, count, way = len(triangle), len(vectors), b"T" if transpose else b"N"
    _call("trsm", b"L", _UPPER, way, b"U", n, count, 1.0, triangle, n, vectors, n, like=triangle)


def cholesky(matrix: Real) -> bool:
    """C lower triangle ← the Cholesky factor L of a symmetric matrix stored there; whether there is one (?potrf)."""
    n, info = len(matrix), ctypes.c_int()
    _call("potrf", _UPPER, n, matrix, n, info, like=matrix)
    return info.value == 0


def times_cholesky(factor: Real, vectors: Real) -> Real:
    """L·Lᵀ·v for each row v of `vectors` (?trmm)."""
    n, count, images = len(factor), len(vectors), vectors.copy()
    for transpose in (b"N", b"T"):  # of the Fortran view, whose upper triangle is Lᵀ
        _call("trmm", b"L", _UPPER, transpose, b"N", n, count, 1.0, factor, n, images, n, like=factor)
    return images


def add_outer(vectors: Real, matrix: Real) -> None:
    """C lower triangle += Σ v·vᵀ over the rows v of `vectors` (?syrk)."""
    n, count = len(matrix), len(vectors)
    _call("syrk", _UPPER, b"N", n, count, 1.0, vectors, n, 1.0, matrix, n, like=matrix)


def _check(name: str, info: ctypes.c_int) -> None:
    if info.value:
        raise NumericalError(f"LAPACK {name} returned {info.value}")
