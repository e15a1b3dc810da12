"""What is learnt and that packing changes nothing: each proof beside a fault that it must find."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_cases import ignore_boundaries, only

from mediphi.batches import PreferenceBatch
from mediphi.doctor import proofs
from mediphi.doctor.checkup import GROUPS, _looked
from mediphi.errors import DataError, UserError

MakeCase = Callable
CANARY = "kanari"
NOTE = f"The {CANARY} has had a cough since Tuesday and takes 2.5 mg."


def messages(number: int) -> dict[str, Any]:
    asked = {"role": "user", "content": f"{NOTE} Question {number}?"}
    return {"messages": [asked, {"role": "assistant", "content": f"Answer {number}, {CANARY}."}]}


def pair(number: int) -> dict[str, Any]:
    row = {"prompt": f"{NOTE} {number}\n", "chosen": f"Yes, {number}.", "rejected": "No, never."}
    return row if number % 2 else {k: [_turn(k, v.strip())] for k, v in row.items()}


def _turn(key: str, text: str) -> dict[str, str]:
    return {"role": "user" if key == "prompt" else "assistant", "content": text}


ROWS = {
    "text": lambda number: {"text": f"{NOTE} Page {number}."},
    "messages": messages,
    "preference": pair,
}


def own_data(folder: Path, layout: str) -> list[str]:
    """A file of 2,000 rows, of which few must be read: the last is broken."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{layout}.jsonl"
    rows = [json.dumps(ROWS[layout](number)) for number in range(2000)]
    path.write_text("\n".join([*rows, "broken"]) + "\n")
    mine = "corpus.sources.mine"
    near = "corpus.deduplicate.near=false"
    return ["corpus=local", f"{mine}.path={path}", f"{mine}.format={layout}", near]


@pytest.mark.parametrize("layout", ROWS)
def test_all_three_kinds_of_data_pass(layout: str, make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case(*own_data(tmp_path, layout))
    assert "8 of mine" in only(proofs.corpus, case, "ok").found
    mask, packing = (
        only(f, case, "ok").found for f in (proofs.loss_mask, proofs.packed_equals_separate)
    )
    noun = {"text": "8 texts", "messages": "8 answers", "preference": "16 answers"}[layout]
    assert f"of 8 records decode to their {noun} and ends, nothing else" in mask
    assert ("pairs" if layout == "preference" else "sequences") in packing
    assert CANARY not in mask + packing


@pytest.mark.parametrize("layout", ROWS)
def test_attention_that_ignores_boundaries_fails(
    layout: str, make_case: MakeCase, tmp_path: Path
) -> None:
    ignore_boundaries()
    case = make_case(*own_data(tmp_path, layout))
    finding = only(proofs.packed_equals_separate, case, "FAIL")
    assert "do not train" in finding.remedy


def test_a_model_that_does_not_attend_proves_little(make_case: MakeCase, tmp_path: Path) -> None:
    """The control of the control: without attention the boundaries cannot matter."""
    case = make_case(*own_data(tmp_path, "text"))
    for layer in case.model().model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    text = only(proofs.packed_equals_separate, case, "warning").found
    assert "it proves little" in text


def shifted(batch: Any) -> Any:
    """Targets one place early: what a wrong shift would learn."""
    if isinstance(batch, PreferenceBatch):
        return replace(batch, label_ids=batch.input_ids[0][batch.logit_index])
    return replace(batch, target_ids=batch.input_ids.clone())


@pytest.mark.parametrize("layout", ROWS)
def test_a_mask_that_is_one_token_off_fails(
    layout: str, make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = proofs.PackedLoader

    class Shifted(real):
        def __iter__(self) -> Iterator[Any]:
            return map(shifted, super().__iter__())

    monkeypatch.setattr(proofs, "PackedLoader", Shifted)
    finding = only(proofs.loss_mask, make_case(*own_data(tmp_path, layout)), "FAIL")
    assert "they do not decode" in finding.found and CANARY not in str(finding)


def test_a_chat_template_that_moves_the_answer_is_refused(
    make_case: MakeCase, tmp_path: Path
) -> None:
    case = make_case(*own_data(tmp_path, "messages"))
    template = tmp_path / "model" / "chat_template.jinja"
    moved = template.read_text().replace("<|assistant|>", "<|assistant|>Answer: ")
    assert moved != template.read_text()
    template.write_text(moved)
    with pytest.raises(UserError, match="chat template gives other tokens"):
        list(proofs.corpus(case))


def test_a_bad_row_is_named_by_its_place(make_case: MakeCase, tmp_path: Path) -> None:
    overrides = own_data(tmp_path, "text")
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"text": "a"}}\n{{"note": "{CANARY}"}}\n')
    with pytest.raises(DataError, match=r"text\.jsonl:2: ") as raised:
        list(proofs.corpus(make_case(*overrides)))
    assert CANARY not in str(raised.value)


def test_what_does_not_fit_into_a_row_is_told(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case(*own_data(tmp_path, "messages"), "stage.max_length=16")
    assert "8 of 8 conversations exceed" in only(proofs.corpus, case, "warning").found


def test_a_crash_among_texts_keeps_them_to_itself(
    make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(case: Any) -> Any:
        raise ValueError(f"cannot read {NOTE!r}")

    monkeypatch.setattr(proofs, "corpus", crash)
    data = next(group for group in GROUPS if group.title == "Data")
    (finding,) = _looked(make_case(), data, "corpus")
    assert finding.status == "FAIL" and "ended by ValueError" in finding.found
    assert CANARY not in str(finding)
