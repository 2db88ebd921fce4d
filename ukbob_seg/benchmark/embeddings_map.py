"""A map of class embeddings by t-SNE, and two numbers of the features themselves that say how far classes lie apart."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd

from ukbob_seg.errors import ConfigError, DatasetError

log = logging.getLogger(__name__)

LARGEST_PERPLEXITY = 30.0  # scikit-learn's default
FEWEST_POINTS = 4  # of which t-SNE makes a map
SEED = 0


@dataclass(frozen=True)
class EmbeddingMap:
    """What was found.

    Attributes:
        points: a row per embedding: case, class, x, y, nearest (the class whose centroid is nearest, the point itself
            left out of its own; None for a class's only point), silhouette (-1 to 1, NaN with one class).
        classes: a row per class in their order: points, correct (share of points whose nearest centroid is that of
            their class), silhouette (mean), confused (the class that they are nearest to else, most often; None).
        accuracy: share of correct points of all that were judged; NaN for none.
        judged: points of classes that have others.
        silhouette: mean over points; NaN with one class, or no class of two points.
        perplexity: of t-SNE.
    """

    points: pd.DataFrame
    classes: pd.DataFrame
    accuracy: float
    judged: int
    silhouette: float
    perplexity: float

    def to_json(self) -> dict[str, Any]:
        """Strict JSON of the numbers; NaN is null."""

        def strict(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {
            "version": 1,
            "points": len(self.points),
            "classes": {
                str(name): {key: strict(value) for key, value in row.items()}
                for name, row in self.classes.astype(object).iterrows()
            },
            "nearest_centroid_accuracy": strict(self.accuracy),
            "judged": self.judged,
            "silhouette": strict(self.silhouette),
            "perplexity": self.perplexity,
        }


def require_tsne() -> tuple[ModuleType, ModuleType]:
    """scikit-learn's modules of maps and of metrics.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from sklearn import manifold, metrics
    except ImportError as error:
        raise ConfigError("ukbob_benchmark embeddings needs scikit-learn: pip install 'ukbob_seg[tsne]'") from error
    return manifold, metrics


def standardised(features: np.ndarray) -> np.ndarray:
    """Features (N, F) with mean 0 and sd 1 over the points; those that are the same in all of them become 0."""
    features = np.asarray(features, np.float64)
    spread = features.std(axis=0)
    constant = spread <= 1e-12 * np.maximum(1.0, np.abs(features).max(axis=0, initial=0.0))
    return np.where(constant, 0.0, (features - features.mean(axis=0)) / np.where(constant, 1.0, spread))


def choose_perplexity(points: int, given: float | None = None) -> float:
    """Neighbours that t-SNE weighs, about: 30, or a third of the other points where these are fewer than 90.

    Raises:
        DatasetError: fewer than four points.
        ConfigError: the given one is below 1, or above a third of the other points.
    """
    if points < FEWEST_POINTS:
        raise DatasetError(f"t-SNE needs at least {FEWEST_POINTS} embeddings (cases times classes), there are {points}")
    most = (points - 1) / 3
    if given is None:
        return min(LARGEST_PERPLEXITY, most)
    if not 1 <= given <= most:
        raise ConfigError(
            f"--perplexity must lie between 1 and {most:g}, a third of the other points ({points} embeddings), "
            f"got {given:g}"
        )
    return given


def tsne(features: np.ndarray, perplexity: float) -> np.ndarray:
    """Places (N, 2) float64 of standardised features (N, F); the same on one machine for the same input.

    It begins with the two principal components, which leaves nothing to chance; where there are no two, with places
    drawn from a fixed seed. One thread works, because several add up in an order that varies.
    """
    manifold, _ = require_tsne()
    from threadpoolctl import threadpool_limits

    if len(features) > 300:  # some seconds
        log.info("t-SNE of %d embeddings", len(features))
    start = "pca" if min(features.shape) >= 2 and np.linalg.matrix_rank(features) >= 2 else "random"
    with threadpool_limits(1):
        method = manifold.TSNE(2, perplexity=perplexity, init=start, learning_rate="auto", random_state=SEED, n_jobs=1)
        return np.asarray(method.fit_transform(features.astype(np.float32)), np.float64)


def nearest_centroids(features: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The class whose centroid is nearest to each point, which takes no part in the centroid of its own class.

    Args:
        features: (N, F).
        labels: (N,) 0 to ``classes`` - 1.
        classes: K.

    Returns:
        (N,) class; -1 for the only point of its class. Where the own class and another are equally near, the other.
    """
    counts = np.bincount(labels, minlength=classes).astype(float)
    centroids = np.zeros((classes, features.shape[1]))
    np.add.at(centroids, labels, features)
    known = counts > 0
    centroids[known] /= counts[known, None]
    own = features - centroids[labels]  # times n / (n - 1): the distance from the centroid of the others
    squares = (features**2).sum(axis=1)[:, None] + (centroids**2).sum(axis=1)[None] - 2 * features @ centroids.T
    squares = np.where(known, np.maximum(squares, 0.0), np.inf)
    rows, n = np.arange(len(labels)), counts[labels]
    alone = n == 1
    squares[rows, labels] = np.inf
    others = squares.argmin(axis=1)
    mine = (own**2).sum(axis=1) * (n / np.where(alone, 1, n - 1)) ** 2
    nearest = np.where(mine < squares[rows, others], labels, others)
    return np.where(alone, -1, nearest)


def make_map(table: pd.DataFrame, perplexity: float | None = None, order: Sequence[str] = ()) -> EmbeddingMap:
    """Map and judge embeddings.

    Args:
        table: of ``embed_cases``: case, class, features.
        perplexity: of t-SNE, None to choose by ``choose_perplexity``.
        order: names of classes in reporting order; those that it lacks follow as they come.

    Raises:
        DatasetError, ConfigError: too few embeddings, a perplexity that does not fit, no scikit-learn.
    """
    _, metrics = require_tsne()
    chosen = choose_perplexity(len(table), perplexity)
    features = standardised(np.stack(table["features"].to_numpy()))  # type: ignore[arg-type]
    there = dict.fromkeys(table["class"])
    names = [*(name for name in order if name in there), *(name for name in there if name not in order)]
    labels = table["class"].map({name: k for k, name in enumerate(names)}).to_numpy(np.int64)
    nearest = nearest_centroids(features, labels, len(names))
    single = np.full(len(labels), np.nan)
    if 2 <= len(names) < len(labels):
        single = np.asarray(metrics.silhouette_samples(features, labels), np.float64)
    places = tsne(features, chosen)
    points = pd.DataFrame(
        {
            "case": table["case"].to_numpy(),
            "class": table["class"].to_numpy(),
            "x": places[:, 0],
            "y": places[:, 1],
            "nearest": [None if k < 0 else names[k] for k in nearest],
            "silhouette": single,
        }
    )
    judged = nearest >= 0
    right = nearest == labels
    return EmbeddingMap(
        points=points,
        classes=_of_classes(points, names),
        accuracy=float(right[judged].mean()) if judged.any() else math.nan,
        judged=int(judged.sum()),
        silhouette=float(single.mean()),
        perplexity=chosen,
    )


def _of_classes(points: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    rows = []
    for name in names:
        own = points[points["class"] == name]
        judged = own[own["nearest"].notna()]
        wrong = judged.loc[judged["nearest"] != name, "nearest"]
        rows.append(
            {
                "class": name,
                "points": len(own),
                "correct": float((judged["nearest"] == name).mean()) if len(judged) else math.nan,
                "silhouette": float(own["silhouette"].mean()),
                "confused": str(wrong.mode().iloc[0]) if len(wrong) else None,
            }
        )
    return pd.DataFrame(rows).set_index("class")
