"""Fitness by shared prompts is that of the plain padded reference, and can be stopped early."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_model
from torch.nn.attention import varlen
from transformers import PreTrainedTokenizerBase

from mediphi.backbone import load_tokenizer
from mediphi.engine import Device
from mediphi.errors import UserError
from mediphi.evaluate.multiple_choice import baselines, encode, padded_logps, score
from mediphi.evaluate.scores import Scored
from mediphi.fitness import (
    EncodedSets,
    Progress,
    SetScores,
    encode_sets,
    in_rounds,
    score_sets,
)
from mediphi.records import MultipleChoice

TINY = Path(__file__).parents[1] / "assets" / "models" / "tiny"
CPU = Device(type="cpu", name="test", precision="32-true", kernel="sdpa")
WORDS = [
    "fever",
    "cough",
    "acute",
    "heart",
    "failure",
    "of",
    "the",
    "left",
    "lung",
    "without",
    "pain",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(str(TINY))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return small_model(vocab_size=4096).eval()


def question(name: str, prompt_words: int, *option_words: int, group: str = "s") -> MultipleChoice:
    def words(count: int, start: int) -> str:
        return " ".join(WORDS[(start + n) % len(WORDS)] for n in range(count))

    options = tuple(words(count, 3 * n + len(name)) for n, count in enumerate(option_words))
    prompt = words(prompt_words, len(name))
    return MultipleChoice(name, prompt, options, len(name) % len(options), group, cluster=name)


SETS = {
    "notes": [question("q" * n, 5 + 3 * n, 2, 7, 4, 3, group="notes") for n in range(1, 9)],
    "codes": [question("c" * n, n, 3, 1, 2, group="codes") for n in range(1, 6)],
}


def encoded(
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, list[MultipleChoice]] = SETS,
    device: Device = CPU,
    **keys: int,
) -> EncodedSets:
    return encode_sets(sets, tokenizer=tokenizer, device=device, **keys)


def test_answers_and_order_are_those_of_the_padded_reference(model, tokenizer):
    got = score_sets(model, encoded(tokenizer))
    assert got.is_complete and list(got.scored) == ["notes", "codes"]
    reference = padded_logps(small_model("sdpa", vocab_size=4096).eval())
    for name, own in SETS.items():
        expected = score(own, tokenizer=tokenizer, token_logps=reference)
        assert got.scored[name] == [one.scored() for one in expected]
        assert [one.cluster for one in got.scored[name]] == [one.id for one in own]


@settings(deadline=None, max_examples=15)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 30), st.lists(st.integers(1, 9), min_size=2, max_size=5)),
        min_size=1,
        max_size=6,
    ),
    tokens_per_pass=st.integers(1, 200),
)
def test_log_probabilities_equal_padded_to_1e_4_in_float32(
    model, tokenizer, shapes, tokens_per_pass
):
    asked = [question("q" * n, p, *o) for n, (p, o) in enumerate(shapes, start=1)]
    reference = padded_logps(small_model("sdpa", vocab_size=4096).eval())
    sets = encoded(tokenizer, {"s": asked}, tokens_per_pass=tokens_per_pass)
    for place, logps in option_logps(model, sets):
        coded = encode(asked[place], tokenizer=tokenizer)
        rows = [torch.from_numpy(row[coded.num_shared - 1 :]) for row in reference(coded.sequences)]
        torch.testing.assert_close(logps, torch.cat(rows), atol=1e-4, rtol=0)


def option_logps(model: torch.nn.Module, sets: EncodedSets) -> Iterator[tuple[int, torch.Tensor]]:
    from mediphi.fitness import _logps

    for one, logps in zip(sets.passes, _logps(model, sets), strict=True):  # type: ignore[arg-type]
        lengths = iter(torch.from_numpy(logps).split(list(one.lengths)))
        for place in one.places:
            yield place, torch.cat([next(lengths) for _ in sets.questions[place].options])


def test_scores_do_not_depend_on_how_questions_are_packed(model, tokenizer):
    together = score_sets(model, encoded(tokenizer, tokens_per_pass=10**6))
    apart = score_sets(model, encoded(tokenizer, tokens_per_pass=1))
    assert together == apart
    assert len(encoded(tokenizer, tokens_per_pass=10**6).passes) == 2  # four options, and three
    assert len(encoded(tokenizer, tokens_per_pass=1).passes) == 13


def test_a_prompt_is_forwarded_once(tokenizer):
    sets = encoded(tokenizer)
    whole = [encode(one, tokenizer=tokenizer) for own in SETS.values() for one in own]
    saved = sum((len(one.sequences) - 1) * one.num_shared for one in whole)
    assert sets.num_tokens == sum(one.num_tokens for one in whole) - saved


def test_questions_on_both_sides_of_longropes_boundary_share_no_pass(model, tokenizer):
    """With one long companion a short question's log-probabilities would be others."""
    short, long = question("q", 5, 2, 3), question("qq", 90, 2, 3)
    sets = encoded(tokenizer, {"s": [short, long]}, long_above=64)
    assert [one.places for one in sets.passes] in ([(0,), (1,)], [(1,), (0,)])
    alone = dict(option_logps(model, encoded(tokenizer, {"s": [short]})))
    mixed = dict(option_logps(model, encoded(tokenizer, {"s": [short, long]})))
    apart = dict(option_logps(model, sets))
    assert (mixed[0] - alone[0]).abs().max() > 1e-3  # the control
    torch.testing.assert_close(apart[0], alone[0], atol=1e-5, rtol=0)


def test_varlen_gives_the_answers_of_sdpa(model, tokenizer, monkeypatch: pytest.MonkeyPatch):
    from test_attention import reference_varlen

    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    expected = dict(option_logps(model, encoded(tokenizer)))
    device = Device(type="cpu", name="test", precision="32-true", kernel="varlen")
    other = small_model("mediphi_varlen", vocab_size=4096).eval()
    for place, logps in option_logps(other, encoded(tokenizer, device=device)):
        # bf16 inside the kernel
        torch.testing.assert_close(logps, expected[place], atol=0.25, rtol=0)


def test_bf16_autocast_stays_near_float32(model, tokenizer):
    half = Device(type="cpu", name="test", precision="bf16-mixed", kernel="sdpa")
    exact = dict(option_logps(model, encoded(tokenizer)))
    rounded = dict(option_logps(model, encoded(tokenizer, device=half)))
    error = max(float((exact[place] - rounded[place]).abs().max()) for place in exact)
    assert 1e-4 < error < 0.25


def test_flash_is_refused(tokenizer):
    flash = Device(type="cpu", name="test", precision="bf16-mixed", kernel="flash")
    with pytest.raises(UserError, match="varlen or sdpa"):
        encoded(tokenizer, device=flash)


def test_fitness_is_the_mean_over_sets_not_over_questions(model, tokenizer):
    scores = score_sets(model, encoded(tokenizer))
    means = [sum(one.score for one in own) / len(own) for own in scores.scored.values()]
    assert scores.fitness == pytest.approx(sum(means) / 2)
    one, other = scores.scored["notes"][0], scores.scored["codes"][0]
    good, bad = one._replace(score=1.0), other._replace(score=0.0)
    assert SetScores({"a": [good, bad, bad], "b": [good]}, True).fitness == pytest.approx(2 / 3)


def test_the_hook_sees_every_set_between_passes_and_stops_the_scoring(model, tokenizer):
    sets = encoded(tokenizer, tokens_per_pass=1)
    seen: list[Mapping[str, Progress]] = []

    def hopeless(progress: Mapping[str, Progress]) -> bool:
        seen.append(progress)
        return len(seen) == 3

    stopped = score_sets(model, sets, hopeless=hopeless)
    assert not stopped.is_complete
    assert sum(map(len, stopped.scored.values())) == 3
    assert [sum(p.done for p in progress.values()) for progress in seen] == [1, 2, 3]
    assert [p.total for p in seen[0].values()] == [8, 5]
    everything = score_sets(model, sets)
    for name, own in stopped.scored.items():
        assert set(own) <= set(everything.scored[name])
        assert seen[-1][name].correct == sum(one.score for one in own)


def test_a_hook_that_never_stops_changes_nothing_and_is_not_asked_at_the_end(model, tokenizer):
    sets, calls = encoded(tokenizer, tokens_per_pass=1), []
    got = score_sets(model, sets, hopeless=lambda progress: bool(calls.append(progress)))
    assert got == score_sets(model, sets)
    assert len(calls) == len(sets.passes) - 1


def in_sizes(tokenizer: PreTrainedTokenizerBase, **sizes: int) -> EncodedSets:
    """Sets of so many questions, each longer than the one before, with two or three options."""
    sets = {
        name: [question(f"{name}{n}", 1 + n, *[2] * (2 + n % 2), group=name) for n in range(size)]
        for name, size in sizes.items()
    }
    return encoded(tokenizer, sets, tokens_per_pass=60)


def test_rounds_hold_as_many_of_every_set_whatever_the_draw(model, tokenizer):
    sets = in_sizes(tokenizer, a=34, b=10, c=3)
    for seed in ([0], [1], [7, 7]):
        seen: list[Mapping[str, Progress]] = []
        got = score_sets(
            model,
            in_rounds(sets, seed=seed),
            hopeless=lambda progress, seen=seen: bool(seen.append(progress)),
        )
        done = [tuple(own.done for own in progress.values()) for progress in seen]
        assert done[:4] == [(4, 1, 1), (8, 2, 2), (12, 3, 3), (16, 4, 3)]
        assert len(done) == 9 and done[-1] == (31, 9, 3)
        assert got == score_sets(model, sets)


def test_rounds_are_drawn_by_the_seed_and_packed_within_the_limit(tokenizer):
    sets = in_sizes(tokenizer, a=34, b=10)
    one, same, other = (in_rounds(sets, seed=[seed]) for seed in (1, 1, 2))
    orders = [[pack.places for pack in own.passes] for own in (one, same, other)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(place for places in order for place in places) == list(range(44))
    for pack in one.passes:
        assert pack.input_ids.shape[1] <= sets.limit or len(pack.places) == 1
        assert len({len(sets.questions[place].options) for place in pack.places}) == 1


def test_what_is_done_at_a_look_is_a_random_sample_of_each_set(tokenizer):
    """Of long and short ones, of those with two options and with three; longest first is not."""
    sets = in_sizes(tokenizer, a=40, b=20)
    for name, places in (("a", range(40)), ("b", range(40, 60))):
        counts = torch.zeros(60)
        for seed in range(300):
            own = in_rounds(sets, seed=[seed])
            first = min(own.looks)
            for pack in own.passes[:first]:
                counts[list(pack.places)] += 1
        share = counts[list(places)] / 300
        # a tenth each: five standard errors
        assert ((share - 0.1).abs() < 5 * (0.09 / 300) ** 0.5).all(), name
    longest_first = {place for pack in sets.passes[:3] for place in pack.places}
    assert min(longest_first - set(range(40, 60))) > 20


def test_the_model_is_scored_in_eval_mode_without_gradients_and_left_as_it_was(tokenizer):
    model = small_model(vocab_size=4096, resid_pdrop=0.5)
    assert model.training
    first, second = (score_sets(model, encoded(tokenizer)) for _ in range(2))
    assert model.training and first == second
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()


def test_weights_changed_in_place_are_seen_by_the_next_call(tokenizer):
    half = Device(type="cpu", name="test", precision="bf16-mixed", kernel="sdpa")
    model, sets = small_model(vocab_size=4096).eval(), encoded(tokenizer, device=half)
    before = dict(option_logps(model, sets))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = dict(option_logps(model, sets))
    assert all((before[place] - after[place]).abs().max() > 1e-3 for place in before)


def test_a_number_that_is_not_finite_names_the_question(tokenizer):
    model = small_model(vocab_size=4096).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"question \w+: .*not finite"):
        score_sets(model, encoded(tokenizer))


def test_baselines_of_rules_that_know_nothing():
    asked = [
        MultipleChoice("1", "a b c", ("x y", "a b c", "zz"), 1, "s"),
        MultipleChoice("2", "a b c", ("a", "xx", "yy"), 2, "s"),
    ]
    told = baselines(asked)
    assert told == pytest.approx(
        {"first": 0, "longest": 0.75, "shortest": 0, "overlap": 0.5, "chance": 1 / 3}
    )
    with pytest.raises(ValueError, match="no questions"):
        baselines([])


def test_a_stopped_scoring_is_estimated_from_the_sets_that_have_an_answer() -> None:
    one = Scored("q", "long", 1.0, 0.25)
    assert SetScores({"long": [one], "short": []}, is_complete=False).fitness == 1.0
