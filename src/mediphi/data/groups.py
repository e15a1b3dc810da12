"""Names that metrics are told apart by, shared by the stores of training and validation."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mediphi.data.tokens import TokenStore
from mediphi.records import LABELS, Label

GroupNames = Mapping[str, Sequence[str]]
"""`source` and each of `LABELS` -> names, in the order of their ids."""


def group_names(stores: Sequence[TokenStore]) -> dict[str, tuple[str, ...]]:
    """All names that rows of any of the stores have; without a label that is ""."""
    names = {"source": tuple(sorted({name for store in stores for name in store.sources}))}
    for label in LABELS:
        names[label] = tuple(sorted({name for store in stores for name in _used(store, label)}))
    return names


class GroupIds:
    """Translates a store's own indices into those of shared names."""

    def __init__(self, store: TokenStore, names: GroupNames | None = None) -> None:
        """`names` None: the store's own, in its order."""
        if names is None:
            names = {"source": store.sources, **store.manifest.labels}
        self._labels = store.labels
        self.sources = _translation(store.sources, names["source"])
        self._translations = [
            _translation(store.manifest.labels[label], names[label]) for label in LABELS
        ]

    def of(self, documents: NDArray[np.int64], label: Label) -> NDArray[np.uint8]:
        """Ids of a label of these documents (rows in the store), uint8 `[documents]`."""
        column = LABELS.index(label)
        return self._translations[column][self._labels[documents, column]]


def _used(store: TokenStore, label: Label) -> list[str]:
    names = store.manifest.labels[label]
    return [names[index] for index in np.unique(store.labels[:, LABELS.index(label)])]


def _translation(own: Sequence[str], shared: Sequence[str]) -> NDArray[np.uint8]:
    """Names that no row has need no number."""
    numbers = [shared.index(name) if name in shared else 0 for name in own]
    return np.array(numbers, dtype=np.uint8)
