"""Searching for the best parameters of a merge; it knows genomes and numbers, and no models."""

from mediphi.merge.search.evaluation import (
    CandidateError,
    Evaluation,
    Fitness,
    Holdout,
    Hopeless,
    Items,
)
from mediphi.merge.search.ledger import Ledger, Record
from mediphi.merge.search.loop import search
from mediphi.merge.search.result import SearchResult
from mediphi.merge.search.selection_bias import Estimate
from mediphi.merge.search.settings import SearchSettings
from mediphi.merge.search.space import Genome, Space, SpaceOptions

__all__ = [
    "CandidateError",
    "Estimate",
    "Evaluation",
    "Fitness",
    "Genome",
    "Holdout",
    "Hopeless",
    "Items",
    "Ledger",
    "Record",
    "SearchResult",
    "SearchSettings",
    "Space",
    "SpaceOptions",
    "search",
]
