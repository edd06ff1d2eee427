"""Scores of a source's features (N, D) under the labels (N,) of the target; float64 throughout."""

import itertools

import numpy as np
from numpy.typing import ArrayLike

from jaxtransfer.scores.checks import ScoreError, checked

_CHUNK = 1024


def logme(features: ArrayLike, labels: ArrayLike) -> float:
    r"""Log marginal evidence a row of a Bayesian linear model, mean over one-vs-rest targets (You et al. 2021).

    With ``y ~ N(F w, 1/b)`` and ``w ~ N(0, 1/a)``, ``a`` and ``b`` are set by the fixed point
    ``g = sum s/(s + a/b)``, ``a = g / |m|^2``, ``b = (N - g) / |y - F m|^2`` over the eigenvalues s of ``F'F``, m the
    posterior mean (arXiv:2102.11005, algorithm 3, at most 11 steps). Unbounded, and to be compared within one target
    only. Features are not centred, as in the paper.

    Raises:
      ScoreError: see `checks.checked`.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> y = np.arange(100) % 2
      >>> logme(rng.normal(size=(100, 4)) + 3.0 * y[:, None], y) > logme(rng.normal(size=(100, 4)), y)
      True
    """
    f, y = checked(features, labels)
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    return float(np.mean([_evidence(u, s**2, f.shape, (y == c).astype(np.float64)) for c in range(y.max() + 1)]))


def _evidence(u: np.ndarray, eigen: np.ndarray, shape: tuple[int, ...], y: np.ndarray) -> float:
    rows, width = shape
    inside = (u.T @ y) ** 2
    outside = max(float(y @ y - inside.sum()), 0.0)
    a = b = 1.0
    for _ in range(11):
        ratio = a / b
        freedom = np.sum(eigen / (eigen + ratio))
        norm = np.sum(eigen * inside / (eigen + ratio) ** 2)
        error = np.sum(inside / (1.0 + eigen / ratio) ** 2) + outside
        a, b = freedom / (norm + 1e-5), (rows - freedom) / (error + 1e-5)
        if abs(a / b - ratio) <= 1e-3 * ratio:
            break
    # The eigenvalues beyond the rank are zero: each adds log a.
    logdet = np.sum(np.log(a + b * eigen)) + (width - len(eigen)) * np.log(a)
    total = width * np.log(a) + rows * np.log(b / (2.0 * np.pi)) - logdet - b * error - a * norm
    return float(total / (2.0 * rows))


def h_score(features: ArrayLike, labels: ArrayLike, *, shrink: bool = True) -> float:
    """``tr(cov(f)^+ cov(E[f | y]))``, at most C - 1 (Bao et al. 2019, arXiv:1904.05492).

    Args:
      features: (N, D).
      labels: (N,) integers.
      shrink: the covariance by Ledoit and Wolf, and the other shrunk alike (Ibrahim et al. 2021, arXiv:2110.06893).
        Without, the score saturates at C - 1 where D comes near N.

    Raises:
      ScoreError: see `checks.checked`.

    Example:
      >>> y = np.arange(60) % 3
      >>> round(h_score(np.eye(3)[y], y, shrink=False), 6)
      2.0
    """
    f, y = checked(features, labels)
    centred = f - f.mean(axis=0)
    means = np.stack([centred[y == c].mean(axis=0) for c in range(y.max() + 1)])[y]
    if not shrink:
        return float(np.trace(np.linalg.pinv(np.cov(centred.T), rcond=1e-15) @ np.cov(means.T)))
    covariance, share = ledoit_wolf(centred)
    return float((1.0 - share) * np.trace(np.linalg.pinv(covariance, rcond=1e-15) @ np.cov(means.T)))


def ledoit_wolf(centred: np.ndarray) -> tuple[np.ndarray, float]:
    """``(1 - s) S + s (tr S / D) I`` of centred rows (N, D), with the s of least expected error, and s.

    Ledoit & Wolf (2004), "A well-conditioned estimator for large-dimensional covariance matrices".
    """
    rows, width = centred.shape
    sample = centred.T @ centred / rows
    mean = np.trace(sample) / width
    squares = centred**2
    spread = np.sum(squares.T @ squares) / rows - np.sum(sample**2)  # of the products, over the rows
    apart = np.sum(sample**2) - width * mean**2
    share = 0.0 if apart <= 0 else float(min(spread / rows / apart, 1.0))
    return (1.0 - share) * sample + share * mean * np.eye(width), share


def transrate(features: ArrayLike, labels: ArrayLike, *, eps: float = 1e-4) -> float:
    """Mutual information of features and labels by coding rates: ``R(Z) - mean_c R(Z_c)``, Z centred.

    ``R(Z) = log det(I + Z'Z / (N eps)) / 2`` (Huang et al. 2022, arXiv:2106.09362). A class's features are not centred
    anew, so of two classes of one size and covariance, opposite each other, it sees nothing.

    Raises:
      ScoreError: eps is not positive, or see `checks.checked`.
    """
    if eps <= 0:
        raise ScoreError(f"eps: must be positive, got {eps}")
    f, y = checked(features, labels)
    z = f - f.mean(axis=0)
    return _rate(z, eps) - float(np.mean([_rate(z[y == c], eps) for c in range(y.max() + 1)]))


def _rate(z: np.ndarray, eps: float) -> float:
    rows, width = z.shape
    gram = z.T @ z if width <= rows else z @ z.T  # of the same determinant
    return float(0.5 * np.linalg.slogdet(np.eye(len(gram)) + gram / (rows * eps))[1])


def gbc(features: ArrayLike, labels: ArrayLike, *, components: int | None = 64, spherical: bool = False) -> float:
    """Overlap of the classes as Gaussians: ``-sum_{i != j} exp(-D_B(i, j))``, D_B the Bhattacharyya distance.

    Pándy et al. 2022 (arXiv:2111.12780): features on their first principal components, covariances diagonal, or of
    one variance a class. A variance is not taken below 1e-4 of the features' own.

    Args:
      features: (N, D).
      labels: (N,) integers.
      components: principal components kept, at most min(N, D); None keeps the features as they are.
      spherical: one variance a class.

    Raises:
      ScoreError: a class with a single row, or see `checks.checked`.
    """
    f, y = checked(features, labels)
    counts = np.bincount(y)
    if counts.min() < 2:
        raise ScoreError(f"gbc: class number {int(counts.argmin())} has one row, which has no variance")
    if components is not None:
        centred = f - f.mean(axis=0)
        f = centred @ np.linalg.svd(centred, full_matrices=False)[2][:components].T
    means = [f[y == c].mean(axis=0) for c in range(len(counts))]
    variances = [f[y == c].var(axis=0) for c in range(len(counts))]
    if spherical:
        variances = [np.full_like(v, v.mean()) for v in variances]
    floor = 1e-4 * f.var(axis=0).mean() + np.finfo(np.float64).tiny
    variances = [np.maximum(v, floor) for v in variances]
    pairs = itertools.combinations(range(len(counts)), 2)
    return -2.0 * float(sum(np.exp(-_bhattacharyya(means[i], variances[i], means[j], variances[j])) for i, j in pairs))


def _bhattacharyya(m1: np.ndarray, v1: np.ndarray, m2: np.ndarray, v2: np.ndarray) -> float:
    v = (v1 + v2) / 2.0
    return float(np.sum((m1 - m2) ** 2 / v) / 8.0 + np.sum(np.log(v) - (np.log(v1) + np.log(v2)) / 2.0) / 2.0)


def parc(features: ArrayLike, labels: ArrayLike, *, most: int = 1000, seed: int = 0) -> float:
    """Do rows that look alike have the same label: 100 x Spearman's correlation of the two dissimilarities.

    ``1 - corr`` of the rows' features, standardised by column, and of their one-hot labels, over all pairs (Bolya et
    al. 2021, arXiv:2111.06977). In [-100, 100]. The labels' dissimilarities are two numbers and rank as two ties; the
    authors' code computes them by correlation, where rounding splits the ties, and differs in the third digit.

    Args:
      features: (N, D).
      labels: (N,) integers.
      most: rows; of more, so many are drawn by ``seed``, for the pairs are N^2.
      seed: of the draw.

    Raises:
      ScoreError: see `checks.checked`.
    """
    from scipy.stats import rankdata

    f, y = checked(features, labels)
    if len(f) > most:
        drawn = np.sort(np.random.default_rng(seed).choice(len(f), most, replace=False))
        f, y = checked(f[drawn], y[drawn])
    scale = f.std(axis=0)
    f = (f - f.mean(axis=0)) / np.where(scale > 0, scale, 1.0)
    pairs = np.triu_indices(len(f), 1)
    alike, same = -rankdata(_correlation(f)[pairs]), (y[:, None] == y)[pairs]
    return float(-100.0 * np.corrcoef(alike, same)[0, 1])


def _correlation(rows: np.ndarray) -> np.ndarray:
    """Pearson's, between rows; rows without variance correlate with nothing."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.where(norm > 0, norm, 1.0)
    return unit @ unit.T


def knn(features: ArrayLike, labels: ArrayLike, *, k: int = 1, cosine: bool = False) -> float:
    """Leave-one-out accuracy of the k nearest neighbours by majority; of equal classes that with the nearest wins.

    Args:
      features: (N, D).
      labels: (N,) integers.
      k: neighbours, fewer than N.
      cosine: by the angle between features instead of the distance.

    Raises:
      ScoreError: k is out of range, or see `checks.checked`.

    Example:
      >>> knn([[0.0], [0.1], [5.0], [5.1]], [0, 0, 1, 1])
      1.0
    """
    f, y = checked(features, labels)
    if not 1 <= k < len(f):
        raise ScoreError(f"knn: k must be from 1 to {len(f) - 1}, the other rows; got {k}")
    if cosine:
        f = f / np.maximum(np.linalg.norm(f, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    squares, hits = np.sum(f * f, axis=1), 0
    for start in range(0, len(f), _CHUNK):
        rows = slice(start, start + _CHUNK)
        apart = squares[None, :] - 2.0 * f[rows] @ f.T  # less the row's own square, the same for all
        own = np.arange(len(apart))
        apart[own, own + start] = np.inf
        near = np.argpartition(apart, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(near, np.argsort(np.take_along_axis(apart, near, axis=1), axis=1, kind="stable"), 1)
        votes = np.zeros((len(apart), y.max() + 1))
        first = np.full_like(votes, k)  # the place of each class's nearest
        np.add.at(votes, (own[:, None], y[near]), 1.0)
        np.minimum.at(first, (own[:, None], y[near]), np.arange(k)[None, :])
        hits += int(np.sum((votes - first / (k + 1)).argmax(axis=1) == y[rows]))
    return hits / len(f)
