"""One model in memory that becomes every candidate of a search, and what it is asked."""

from collections.abc import Mapping
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mediphi import engine
from mediphi.backbone import BackboneSpec, build_model, load_tokenizer, original_positions
from mediphi.config.schema import Config
from mediphi.data.validation_sets import PARTS, Part, ValidationSet
from mediphi.errors import ArtifactError, UserError
from mediphi.fitness import (
    EncodedSets,
    Progress,
    SetScores,
    encode_sets,
    in_rounds,
    score_sets,
)
from mediphi.merge.candidates import Candidates
from mediphi.merge.engine import Job, Parents, open_parents
from mediphi.merge.operators import MergeError
from mediphi.merge.search import CandidateError, Evaluation, Genome, Hopeless, Space
from mediphi.merge.search.genomes import merge_of
from mediphi.merge.settings import values_of
from mediphi.merging import job_of, num_layers_of
from mediphi.sources import Sources


class Bench:
    """One model in memory that becomes every candidate, and the questions that it is asked."""

    def __init__(
        self, config: Config, space: Space, sources: Sources, sets: list[ValidationSet]
    ) -> None:
        assert config.merge is not None
        self._merge = config.merge
        self._space, self._num_layers = space, num_layers_of(sources)
        self._seed = config.seed
        device = engine.resolve(config.hardware, shares_prompts=True)
        self._job = job_of(config, self._merge, sources)
        self._parents = open_parents(self._job)
        folder = str(self._parents.checkpoints[0].folder)
        spec = BackboneSpec(folder=folder, init="pretrained", revision="main", kernel=device.kernel)
        self._model = build_model(spec).to(device.type).eval()  # type: ignore[arg-type]
        tokenizer = load_tokenizer(folder)
        self._sets: dict[Part, EncodedSets] = {
            part: encode_sets(
                {one.name: getattr(one, part) for one in sets},
                tokenizer=tokenizer,
                device=device,
                long_above=original_positions(self._model.config),
            )
            for part in PARTS
        }

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        if "_candidates" in vars(self):
            self._candidates.close()

    @cached_property
    def _candidates(self) -> Candidates:
        """Made for the first candidate: a search that is only told anew needs no deltas."""
        targets = targets_of(self._model, self._parents, self._job)
        return Candidates(self._job, self._parents, targets)

    def fitness(self, genome: Genome, hopeless: Hopeless | None) -> Evaluation:
        """Build the candidate and score it on the search part."""
        merged = merge_of(self._merge, self._space, genome, num_layers=self._num_layers)
        try:
            self._candidates.build(values_of(merged, num_layers=self._num_layers))
        except MergeError as error:
            raise CandidateError(str(error)) from None
        asked = self._sets["search"]
        if hopeless is None:
            return self._scored(asked, None)
        return self._scored(in_rounds(asked, seed=self._order(genome)), hopeless)

    def holdout(self, genome: Genome) -> Evaluation:
        """Score the candidate that was just built on the hold-out part."""
        return self._scored(self._sets["holdout"], None)

    def _order(self, genome: Genome) -> list[int]:
        """Seed of a candidate's own order of questions, the same after a resume."""
        return [self._seed, *sha256(repr(list(genome.items())).encode()).digest()]

    def _scored(self, asked: EncodedSets, hopeless: Hopeless | None) -> Evaluation:
        def gives_up(progress: Mapping[str, Progress]) -> bool:
            assert hopeless is not None
            return hopeless(*zip(*progress.values(), strict=True))

        stop = None if hopeless is None else gives_up
        try:
            return _evaluation(score_sets(self._model, asked, hopeless=stop))
        except UserError as error:  # answers that are not finite
            raise CandidateError(str(error)) from None


def targets_of(model: PreTrainedModel, parents: Parents, job: Job) -> dict[str, Tensor]:
    """The model's weights by the names of the checkpoints, in the type that a merge is written in.

    Only the weights change their type: rotary angles stay in float32.

    Raises:
        ArtifactError: the model has no weight for a tensor of the checkpoints, or one for two.
    """
    first = parents.checkpoints[0]
    weights = dict(model.named_parameters(remove_duplicate=False))
    if missing := [name for name in first.tensors if name not in weights]:
        raise ArtifactError(f"{first.folder}: transformers' model has no weight {missing[0]}")
    names = {id(weights[name]): name for name in first.tensors}
    if twice := [name for name in first.tensors if names[id(weights[name])] != name]:
        raise ArtifactError(
            f"{first.folder}: transformers ties {twice[0]} to {names[id(weights[twice[0]])]}, and "
            "both are stored; remove the copy, or tell config.json that they are not tied"
        )
    for name, own in first.tensors.items():
        dtype = getattr(torch, job.dtype) if job.dtype else own.dtype
        weights[name].data = weights[name].data.to(dtype)
    return {name: weights[name].data for name in first.tensors}


def _evaluation(scores: SetScores) -> Evaluation:
    items = {name: tuple(one.score > 0 for one in own) for name, own in scores.scored.items()}
    by_set = {name: sum(own) / len(own) for name, own in items.items() if own}
    return Evaluation(scores.fitness, by_set, items, stopped=not scores.is_complete)
