"""The merge methods: one table of parameters, defaults and bounds.

The config is judged by it, the operators (`mediphi.merge`) are called by it, and the search walks
through it. It holds no maths, so that it can be read without torch.
"""

from typing import Literal, NamedTuple

Semantics = Literal["mergekit", "paper"]
"""Whose reading of a method, where mergekit and the method's paper differ."""


class Parameter(NamedTuple):
    """A number that steers a method.

    Attributes:
        default: None: it must be given.
        low, high: allowed values, both included; of a switch: False and True.
        searched: bounds within which the search moves; None: it stays as it is.
        per_model: whether every merged model has its own.
        is_whole: whether only whole numbers are allowed.
    """

    name: str
    meaning: str
    default: float | bool | None
    low: float = 0.0
    high: float = 1.0
    searched: tuple[float, float] | None = None
    per_model: bool = False
    is_whole: bool = False

    @property
    def is_switch(self) -> bool:
        return isinstance(self.default, bool)


class Method(NamedTuple):
    """A way to make one model of several.

    Attributes:
        source: paper or, where there is none, whoever described it.
        base: whether the method starts from a base model beside the merged ones.
        min_models, max_models: merged models, the base not counted.
        differs: what `semantics=paper` changes; "": nothing.
    """

    name: str
    title: str
    source: str
    parameters: tuple[Parameter, ...]
    base: Literal["required", "optional", "none"] = "required"
    min_models: int = 1
    max_models: int | None = None
    differs: str = ""

    def parameter(self, name: str) -> Parameter:
        """The parameter of that name; raises KeyError."""
        return {own.name: own for own in self.parameters}[name]


FAR = 1e3
"""Beyond this a weight is a typing error."""

WEIGHT = Parameter("weight", "factor of the model", None, -FAR, FAR, (0.0, 1.0), per_model=True)
DENSITY = Parameter("density", "share of the delta kept", 1.0, searched=(0.05, 1.0), per_model=True)
GAMMA = Parameter(
    "gamma",
    "share of the delta, from its largest, dropped first; above 1 - density only the smallest stay",
    0.01,
    high=2.0,
    searched=(0.0, 0.2),
    per_model=True,
)
LAMBDA = Parameter("lambda", "factor of the merged delta", 1.0, -FAR, FAR, (0.5, 1.5))
NORMALIZE = Parameter("normalize", "divide by the sum of the weights", False)
RESCALE = Parameter("rescale", "give what is kept the size of the whole", False)

_DELTAS = (WEIGHT, NORMALIZE, LAMBDA)
_CRUMBS = (WEIGHT, DENSITY._replace(default=0.9), GAMMA, NORMALIZE, RESCALE, LAMBDA)
_RANDOM = (WEIGHT, DENSITY, NORMALIZE, RESCALE._replace(default=True), LAMBDA)
_NORMALISED = (WEIGHT, DENSITY, NORMALIZE._replace(default=True), RESCALE, LAMBDA)

_ELECTION = "signs are elected before the weights, not after"
_DROPPED = "what is kept is divided by the density, not by the measured loss of size"
_ROWS = "the largest and smallest are sought in every row, not in the whole tensor"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "linear",
            "weighted mean",
            "Wortsman et al. 2022, arXiv 2203.05482",
            (WEIGHT, NORMALIZE._replace(default=True)),
            base="none",
        ),
        Method(
            "uniform_soup",
            "uniform soup",
            "Wortsman et al. 2022, arXiv 2203.05482",
            (),
            base="none",
        ),
        Method(
            "slerp",
            "spherical interpolation from the base",
            "Shoemake 1985, doi 10.1145/325165.325242",
            (Parameter("t", "share of the model; 0 is the base", None, searched=(0.0, 1.0)),),
            max_models=1,
        ),
        Method(
            "multislerp",
            "barycentre on the sphere",
            "Goddard 2025, goddard.blog/posts/multislerp-wow-what-a-cool-idea",
            (WEIGHT, NORMALIZE._replace(default=True, name="normalize_weights")),
            base="optional",
        ),
        Method(
            "karcher",
            "Karcher mean on the sphere",
            "arXiv 2603.04972",
            (
                Parameter("max_iter", "most iterations", 10, 1, 10_000, is_whole=True),
                Parameter("tol", "step at which it ends", 1e-5, 0.0, 1.0),
            ),
            base="none",
        ),
        Method(
            "model_stock",
            "model stock",
            "Jang et al. 2024, arXiv 2403.19522",
            (Parameter("filter_wise", "an angle for every row", False),),
            min_models=2,
        ),
        Method(
            "task_arithmetic",
            "task arithmetic",
            "Ilharco et al. 2023, arXiv 2212.04089",
            _DELTAS,
        ),
        Method(
            "ties",
            "TIES",
            "Yadav et al. 2023, arXiv 2306.01708",
            _NORMALISED,
            differs=_ELECTION,
        ),
        Method(
            "dare_linear", "DARE", "Yu et al. 2024, arXiv 2311.03099", _RANDOM, differs=_DROPPED
        ),
        Method(
            "dare_ties",
            "DARE with TIES' sign election",
            "Yu et al. 2024, arXiv 2311.03099",
            _RANDOM,
            differs=f"{_DROPPED}; {_ELECTION}",
        ),
        Method(
            "breadcrumbs",
            "Model Breadcrumbs",
            "Davari & Belilovsky 2024, arXiv 2312.06795",
            _CRUMBS,
            differs=_ROWS,
        ),
        Method(
            "breadcrumbs_ties",
            "Model Breadcrumbs with TIES' sign election",
            "Davari & Belilovsky 2024, arXiv 2312.06795",
            _CRUMBS,
            differs=f"{_ROWS}; {_ELECTION}",
        ),
    )
}
