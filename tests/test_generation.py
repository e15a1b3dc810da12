"""Greedy answers in batches are those of each prompt alone, and the model stays as it was."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_models import packed, random_documents, write_small_folder
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from mediphi import attention, generation
from mediphi.backbone import STOP_TOKENS, BackboneSpec, build_model, load_tokenizer
from mediphi.engine import Device
from mediphi.errors import UserError
from mediphi.generation import answer, stop_ids

CPU = Device(type="cpu", name="test", precision="32-true", kernel="sdpa")
NEW = 12
BOUNDARY = 64
VOCAB = 4000  # without the special tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LongRoPE with factors that differ by far, so that the wrong ones change the answer."""
    changes = {
        "max_position_embeddings": 256,
        "original_max_position_embeddings": BOUNDARY,
        "initializer_range": 0.3,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.0, 1.0, 1.0],
            "long_factor": [3.0, 4.0, 5.0, 6.0],
        },
    }
    return write_small_folder(tmp_path_factory.mktemp("small") / "model", **changes)


@pytest.fixture(scope="module")
def spec(folder: Path) -> BackboneSpec:
    return BackboneSpec(str(folder), init="random", revision="main", kernel="sdpa", seed=1)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(str(folder))


@pytest.fixture
def model(spec: BackboneSpec) -> PreTrainedModel:
    return build_model(spec)


def prompts_of(*lengths: int) -> list[list[int]]:
    return [d.tolist() for d in random_documents(lengths, vocab=VOCAB, seed=5)]


def by_argmax(model: PreTrainedModel, prompt: list[int], *, stops: set[int]) -> list[int]:
    """The reference: the whole text again for every token, without cache, padding or batch."""
    ids = list(prompt)
    model.eval().set_attn_implementation("eager")
    with torch.no_grad():
        for _ in range(NEW):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in stops:
                break
    model.set_attn_implementation("mediphi_sdpa")
    return ids[len(prompt) :]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Prompts and ids of every batch."""
    seen: list[tuple[list[list[int]], list[list[int]]]] = []
    real = generation._generate

    def watched(model, prompts, greedy):
        out = real(model, prompts, greedy)
        seen.append(([list(p) for p in prompts], out))
        return out

    monkeypatch.setattr(generation, "_generate", watched)
    return seen


MIXED = (5, 30, 17, 60, 70, 90, 52, 60, 3, 64, 65, 55, 100, 60, 53)


@pytest.fixture
def preallocating(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of a GPU."""
    monkeypatch.setitem(generation.PREALLOCATES, "cpu", True)


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("tokens_per_pass", [1, 300, 8192])
def test_ids_of_a_batch_equal_those_without_batch_cache_and_padding(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    written,
    tokens_per_pass: int,
    is_static: bool,
    request: pytest.FixtureRequest,
) -> None:
    """Below the boundary, beyond it, and across it; with both kinds of cache."""
    if is_static:
        request.getfixturevalue("preallocating")
    prompts = prompts_of(*MIXED)
    texts = answer(
        model, tokenizer, prompts, max_new_tokens=NEW, device=CPU, tokens_per_pass=tokens_per_pass
    )
    stops = stop_ids(model, tokenizer)
    got = {tuple(p): ids for batch in written for p, ids in zip(*batch, strict=True)}
    for prompt, text in zip(prompts, texts, strict=True):
        expected = by_argmax(model, prompt, stops=stops)
        assert got[tuple(prompt)][: len(expected)] == expected
        ended = [one for one in expected if one not in stops]
        assert text == tokenizer.decode(ended, skip_special_tokens=True)
    assert len({tuple(ids) for ids in got.values()}) > len(prompts) // 2, "answers differ"


def test_batches_are_bounded_and_never_mix_rope_factors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, written
) -> None:
    options = {"max_new_tokens": NEW, "device": CPU}
    answer(model, tokenizer, prompts_of(*MIXED), tokens_per_pass=150, **options)
    batches = [[len(p) for p in prompts] for prompts, _ in written]
    assert sorted(n for lengths in batches for n in lengths) == sorted(MIXED)
    assert any(len(lengths) > 1 for lengths in batches)
    for lengths in batches:
        assert len(lengths) == 1 or len(lengths) * (max(lengths) + NEW) <= 150
    assert [60, 60] in batches and [60] in batches, "equal ones that cross share a batch"
    for lengths in batches:
        sides = {"short" if n + NEW <= BOUNDARY else "long" if n > BOUNDARY else n for n in lengths}
        assert len(sides) == 1
    assert all(max(b) <= max(a) for a, b in pairwise(batches)), "longest first"


def test_sharing_a_batch_across_the_boundary_would_change_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with the boundary forgotten, short prompts get long factors."""
    prompts = prompts_of(20, 30, 100)
    right = answer(model, tokenizer, prompts, max_new_tokens=NEW, device=CPU)
    monkeypatch.setattr(generation, "original_positions", lambda config: None)
    wrong = answer(model, tokenizer, prompts, max_new_tokens=NEW, device=CPU)
    assert wrong[2] == right[2] and wrong[:2] != right[:2]


def test_right_padding_would_change_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The control: the same batch padded on the other side."""
    short, long = prompts_of(8, 30)
    right = answer(model, tokenizer, [short, long], max_new_tokens=NEW, device=CPU)
    rows = torch.tensor([short + [tokenizer.pad_token_id] * 22, long])
    mask = (torch.arange(30) < torch.tensor([[8], [30]])).long()
    greedy = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=[], pad_token_id=0)
    model.eval().set_attn_implementation("sdpa")
    out = model.generate(rows, attention_mask=mask, generation_config=greedy)[:, 30:]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in out]
    assert texts[0] != right[0]
    assert texts[1].startswith(right[1])


@pytest.mark.parametrize("stop", STOP_TOKENS)
def test_an_answer_ends_before_any_stop_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stop: str
) -> None:
    """The head is made to say the stop token in place of the third token of the answer."""
    [prompt] = prompts_of(10)
    free = by_argmax(model, prompt, stops=set())
    third, place = free[2], tokenizer.get_vocab()[stop]
    assert third not in free[:2]
    head = model.get_output_embeddings().weight.data
    head[[third, place]] = head[[place, third]]
    texts = answer(model, tokenizer, [prompt, *prompts_of(4)], max_new_tokens=NEW, device=CPU)
    assert texts[0] == tokenizer.decode(free[:2], skip_special_tokens=True)
    assert not any(token in text for text in texts for token in STOP_TOKENS)


def test_a_model_in_training_is_left_as_it_was_and_learns_on(
    spec: BackboneSpec, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Its next gradient is bitwise the one without the answers."""
    batch = packed(random_documents([9, 14, 90], vocab=VOCAB))

    def gradient(asks: bool) -> torch.Tensor:
        model = build_model(spec)
        model.generation_config.repetition_penalty = 9.0
        before = (model.config.to_dict(), model.generation_config.to_dict())
        if asks:
            answer(model, tokenizer, prompts_of(20, 61, 90), max_new_tokens=NEW, device=CPU)
        assert (model.config.to_dict(), model.generation_config.to_dict()) == before
        assert model.config._attn_implementation == attention.IMPLEMENTATIONS["sdpa"]
        assert all(module.training for module in model.modules())
        where = {"position_ids": batch.position_ids, **attention.boundaries(batch, "sdpa")}
        logits = model(input_ids=batch.input_ids, use_cache=False, **where).logits
        logits.logsumexp(-1).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    assert torch.equal(gradient(asks=True), gradient(asks=False))


def test_dropout_is_off(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = answer(model, tokenizer, prompts_of(20), max_new_tokens=NEW, device=CPU)
    dropouts = [one for one in model.modules() if isinstance(one, torch.nn.Dropout)]
    assert dropouts
    for one in dropouts:
        one.p = 0.9
    assert answer(model, tokenizer, prompts_of(20), max_new_tokens=NEW, device=CPU) == expected


def test_a_failure_leaves_the_model_in_training_too(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(IndexError):
        answer(model, tokenizer, [[10**6]], max_new_tokens=NEW, device=CPU)
    assert model.training and torch.is_grad_enabled()
    assert model.config._attn_implementation == attention.IMPLEMENTATIONS["sdpa"]


def test_a_penalty_in_the_models_generation_config_is_not_applied(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = answer(model, tokenizer, prompts_of(20), max_new_tokens=NEW, device=CPU)
    model.generation_config.repetition_penalty = 50.0
    assert answer(model, tokenizer, prompts_of(20), max_new_tokens=NEW, device=CPU) == plain


def test_a_spec_is_built_and_answers_as_its_model_does(
    spec: BackboneSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = prompts_of(20, 30)
    expected = answer(model, tokenizer, prompts, max_new_tokens=NEW, device=CPU)
    assert answer(spec, tokenizer, prompts, max_new_tokens=NEW, device=CPU) == expected
    assert answer(spec, tokenizer, [], max_new_tokens=NEW, device=CPU) == []


def test_what_does_not_fit_into_the_positions_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=r"250 tokens and an answer of up to 12 exceed .* 256 pos"):
        answer(model, tokenizer, prompts_of(250), max_new_tokens=NEW, device=CPU)
    with pytest.raises(ValueError, match="empty prompt"):
        answer(model, tokenizer, [[5], []], max_new_tokens=NEW, device=CPU)
