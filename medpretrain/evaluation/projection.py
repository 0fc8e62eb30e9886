"""Features drawn on a plane: t-SNE and UMAP."""

from __future__ import annotations

import importlib.metadata
import warnings

import numpy as np
import sklearn
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from data_prep.errors import UserError, nearest
from medpretrain.evaluation.results import Value
from medpretrain.evaluation.space_record import Technique

TECHNIQUES: tuple[Technique, ...] = ("tsne", "umap")
DIMENSIONS = 50
"""That features are reduced to before they are drawn; as van der Maaten and Hinton 2008, section 4.2 (30), and usual
for both techniques. Cheap, and it takes noise away."""
PERPLEXITY, UMAP_NEIGHBOURS, UMAP_MIN_DIST = 30.0, 15, 0.1
_FEWEST = 4


def project(name: str, features_ND: NDArray[np.floating], seed: int) -> tuple[NDArray[np.float64], dict[str, Value]]:
    """Where each image is drawn, (N, 2), and the parameters as used.

    Features are taken at unit length, so that as for kNN only their direction counts, and reduced to their 50 first
    principal components. t-SNE starts from the first two of these (not from chance), UMAP from its spectral layout. The
    perplexity is at most a third of the other images, the neighbours of UMAP at most all. Where all features are the
    same, all images are drawn at (0, 0).

    Args:
        name: `tsne` or `umap`.
        features_ND: of at least four images.
        seed: of all that is random; on one machine the same features and seed give the same map.

    Raises:
        UserError: another technique, fewer than four images, features that are not finite.
    """
    if name not in TECHNIQUES:
        raise UserError(f"there is no projection {name!r}{nearest(name, list(TECHNIQUES))}")
    images = len(features_ND)
    if images < _FEWEST:
        raise UserError(f"a map needs at least {_FEWEST} images, and there are {images}")
    if not np.isfinite(features_ND).all():
        raise UserError("the features hold values that are not finite")
    x_ND = features_ND.astype(np.float64)
    x_ND /= np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    dimensions = min(DIMENSIONS, *x_ND.shape)
    # Float32 features that differ by their rounding alone are the same ones.
    alike = bool((np.ptp(x_ND, axis=0) < 1e-6).all())
    x_NP = np.zeros((images, 2)) if alike else PCA(dimensions, random_state=seed).fit_transform(x_ND)
    about: dict[str, Value] = {"features": "unit length", "principal_components": dimensions, "identical": alike}
    if name == "tsne":
        perplexity = min(PERPLEXITY, (images - 1) / 3)
        about |= {"perplexity": perplexity, "init": "pca", "version": f"scikit-learn {sklearn.__version__}"}
        return (x_NP if alike else _tsne(x_NP, perplexity, seed)), about
    neighbours = min(UMAP_NEIGHBOURS, images - 1)
    version = f"umap-learn {importlib.metadata.version('umap-learn')}"
    about |= {"n_neighbors": neighbours, "min_dist": UMAP_MIN_DIST, "init": "spectral", "version": version}
    return (x_NP if alike else _umap(x_NP, neighbours, seed)), about


def _tsne(x_NP: NDArray[np.float64], perplexity: float, seed: int) -> NDArray[np.float64]:
    if x_NP.shape[1] == 1:  # features of one dimension; the start needs two
        x_NP = np.pad(x_NP, ((0, 0), (0, 1)))
    # Its first two principal components are the first two columns, up to scale.
    start_N2 = x_NP[:, :2] / np.std(x_NP[:, 0]) * 1e-4
    tsne = TSNE(perplexity=perplexity, init=start_N2.astype(np.float32), learning_rate="auto", random_state=seed)
    return tsne.fit_transform(x_NP).astype(np.float64)


def _umap(x_NP: NDArray[np.float64], neighbours: int, seed: int) -> NDArray[np.float64]:
    with warnings.catch_warnings():
        # That the images fall into unconnected parts is no fault: it is what is to be seen.
        warnings.filterwarnings("ignore", message=".*(connected|Spectral init).*", category=UserWarning)
        import umap  # type: ignore[import-untyped] # here, for it compiles for seconds

        mapper = umap.UMAP(n_neighbors=neighbours, min_dist=UMAP_MIN_DIST, random_state=seed, n_jobs=1)
        return mapper.fit_transform(x_NP).astype(np.float64)
