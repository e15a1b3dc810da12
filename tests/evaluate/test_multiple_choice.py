"""Multiple choice by log-likelihood."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

from mediphi.errors import UserError
from mediphi.evaluate.multiple_choice import TokenLogps, encode, padded_logps, score
from mediphi.records import MultipleChoice

PHI = Path(__file__).parents[2] / "assets" / "models" / "phi35_mini" / "tokenizer.json"
PROMPT = "Question: What is the meaning of the ICD-10-CM code A00?\nAnswer:"


@pytest.fixture(scope="module")
def phi() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(PHI))


@pytest.fixture(scope="module")
def model() -> Phi3ForCausalLM:
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=32064,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
    )
    return Phi3ForCausalLM(config)


def question(
    *options: str, answer: int = 0, prompt: str = PROMPT, name: str = "q"
) -> MultipleChoice:
    return MultipleChoice(id=name, prompt=prompt, options=options, answer=answer, group="easy")


OPTIONS = ("Cholera", "Typhoid and paratyphoid fevers", "5-HT (serotonin) syndrome", "Été")


def test_an_option_is_tokenised_as_in_running_text(phi: PreTrainedTokenizerFast) -> None:
    encoded = encode(question(*OPTIONS), tokenizer=phi)
    for ids, option in zip(encoded.sequences, OPTIONS, strict=True):
        assert ids == phi.encode(f"{PROMPT} {option}", add_special_tokens=False)
        assert phi.decode(ids[: encoded.num_shared]) == PROMPT
        assert phi.decode(ids[encoded.num_shared :]).strip() == option


def test_a_prompt_that_ends_in_white_space_gets_no_second_blank(
    phi: PreTrainedTokenizerFast,
) -> None:
    encoded = encode(question("Yes", "No", prompt="Fever?\n"), tokenizer=phi)
    assert [phi.decode(ids) for ids in encoded.sequences] == ["Fever?\nYes", "Fever?\nNo"]
    assert phi.decode([ids[encoded.num_shared] for ids in encoded.sequences]) == "YesNo"


def test_a_token_across_the_border_is_scored_with_every_option(
    phi: PreTrainedTokenizerFast,
) -> None:
    """The blanks at the prompt's end merge with those of the second option only."""
    encoded = encode(question("x", "   x", prompt="a b  "), tokenizer=phi)
    shared = {tuple(ids[: encoded.num_shared]) for ids in encoded.sequences}
    assert len(shared) == 1
    assert phi.decode(list(shared.pop())) in "a b  "
    assert [phi.decode(ids) for ids in encoded.sequences] == ["a b  x", "a b     x"]


def test_nothing_to_condition_on_is_refused(phi: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="question q"):
        encode(question("a", "b", prompt=""), tokenizer=phi)


def test_log_probabilities_equal_transformers_own_loss(
    phi: PreTrainedTokenizerFast, model: Phi3ForCausalLM
) -> None:
    [scored] = score([question(*OPTIONS)], tokenizer=phi, token_logps=padded_logps(model))
    encoded = encode(question(*OPTIONS), tokenizer=phi)
    for ids, logp in zip(encoded.sequences, scored.option_logps, strict=True):
        labels = torch.tensor([[-100] * encoded.num_shared + ids[encoded.num_shared :]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=labels, use_cache=False).loss
        assert logp == pytest.approx(-loss.item(), abs=1e-5)
    assert scored.prediction == int(np.argmax(scored.option_logps))


def test_scores_do_not_depend_on_how_questions_are_grouped(
    phi: PreTrainedTokenizerFast, model: Phi3ForCausalLM
) -> None:
    rng = random.Random(0)
    questions = [
        question(*rng.sample(OPTIONS, 3), prompt=PROMPT * rng.randint(1, 3), name=str(number))
        for number in range(12)
    ]
    passes: list[int] = []

    def counted(sequences: Sequence[Sequence[int]]) -> Sequence[np.ndarray]:
        passes.append(sum(map(len, sequences)))
        return padded_logps(model)(sequences)

    together = score(questions, tokenizer=phi, token_logps=counted, max_tokens_per_pass=10**6)
    assert len(passes) == 1
    apart = score(questions, tokenizer=phi, token_logps=counted, max_tokens_per_pass=300)
    assert len(passes) > 3
    assert max(passes[1:]) <= 300
    assert [one.id for one in apart] == [one.id for one in questions]
    for one, other in zip(together, apart, strict=True):
        assert one.option_logps == pytest.approx(other.option_logps, abs=1e-5)


def test_the_model_is_scored_in_eval_mode_and_left_as_it_was(model: Phi3ForCausalLM) -> None:
    seen: list[bool] = []
    hook = model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    model.train()
    padded_logps(model)([[5, 6, 7], [5, 6]])
    hook.remove()
    assert seen == [False]
    assert model.training
    model.eval()


def by_table(table: dict[int, float], default: float) -> TokenLogps:
    """Log-probability of a token by its id alone."""

    def token_logps(sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return [np.array([table.get(i, default) for i in ids[1:]]) for ids in sequences]

    return token_logps


def test_the_mean_decides_not_the_sum(phi: PreTrainedTokenizerFast) -> None:
    """lm-eval's two accuracies on one case: the sum takes the short option, the mean the long."""
    asked = question("yes", "no no no no", answer=1)
    [yes, no] = (phi.encode(f"a {word}", add_special_tokens=False)[-1] for word in ("yes", "no"))
    [scored] = score([asked], tokenizer=phi, token_logps=by_table({yes: -1.5, no: -1.0}, -9.0))
    assert scored.option_logps == pytest.approx((-1.5, -1.0))
    assert (-1.5 > 4 * -1.0) and scored.prediction == 1
    assert scored.scored() == ("q", "easy", 1.0, 0.5, None, None)


def test_the_prompt_itself_is_not_scored(phi: PreTrainedTokenizerFast) -> None:
    encoded = encode(question(*OPTIONS), tokenizer=phi)
    inside = dict.fromkeys(encoded.sequences[0][: encoded.num_shared], -1000.0)
    [scored] = score(
        [question("Cholera", "Typhoid")], tokenizer=phi, token_logps=by_table(inside, -1.0)
    )
    assert scored.option_logps == pytest.approx((-1.0, -1.0))


def test_shuffled_answer_keys_bring_an_oracle_down_to_chance(phi: PreTrainedTokenizerFast) -> None:
    rng = random.Random(7)
    words = {"right": -0.1, "wrong": -5.0}
    table = {phi.encode(f"a {word}", add_special_tokens=False)[-1]: v for word, v in words.items()}
    keyed = []
    for number in range(800):
        answer = rng.randrange(4)
        options = tuple("right" if place == answer else "wrong" for place in range(4))
        keyed.append(question(*options, answer=answer, name=str(number)))
    answers = [one.answer for one in keyed]
    rng.shuffle(answers)
    shuffled = [replace(one, answer=key) for one, key in zip(keyed, answers, strict=True)]

    def accuracy(questions: list[MultipleChoice]) -> float:
        judged = score(questions, tokenizer=phi, token_logps=by_table(table, -9.0))
        return float(np.mean([one.correct for one in judged]))

    assert accuracy(keyed) == 1
    assert accuracy(shuffled) == pytest.approx(0.25, abs=0.06)  # four standard deviations


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_number_that_is_not_finite_names_the_question(
    phi: PreTrainedTokenizerFast, bad: float
) -> None:
    with pytest.raises(UserError, match=r"question q7: .*not finite") as caught:
        score([question(*OPTIONS, name="q7")], tokenizer=phi, token_logps=by_table({}, default=bad))
    assert "Cholera" not in str(caught.value)


def test_an_answer_of_the_wrong_shape_is_refused(phi: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="len - 1"):
        score(
            [question(*OPTIONS)],
            tokenizer=phi,
            token_logps=lambda sequences: [np.zeros(len(ids)) for ids in sequences],
        )
    assert score([], tokenizer=phi, token_logps=lambda sequences: []) == []
