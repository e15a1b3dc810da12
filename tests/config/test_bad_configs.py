"""Mutated configs: every problem is one line that names key, value and what is allowed."""

import copy
import itertools
import random
from collections.abc import Iterator

import pytest
from composing import composed, report
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mediphi.config import check, load
from mediphi.door.enter import forced
from mediphi.errors import MAX_LINES, ConfigError

LONG = "x" * 5000

ONE_PROBLEM = [
    # Groups and options.
    (
        ["stage=pitt"],
        "stage=pitt: allowed: dapt, doctor, dpo, merge, pit, search, sft; did you mean pit?",
    ),
    (["logger=foo"], "logger=foo: allowed: csv, tensorboard, wandb"),
    (["corpus=medcod"], "did you mean medcode?"),
    (["corpus=paper/medcod"], "corpus=paper/medcod: allowed: paper/clinical, "),
    (["corpus=paper/medcod"], "did you mean paper/medcode?"),
    (["corpus=data/a.jsonl"], "your own: corpus=local corpus.sources.mine.path=data/a.jsonl"),
    (["corpus=a.jsonl"], "corpus=a.jsonl: allowed: clinical, "),
    (["model=runs/pit/a"], "model=runs/pit/a: allowed: phi35_mini, tiny; your own: model.path=ru"),
    (["model=microsoft/Phi-3.5-mini-instruct"], "your own: model.path=microsoft/Phi-3.5-mini-ins"),
    (["model=tinyy"], "model=tinyy: allowed: phi35_mini, tiny; did you mean tiny?"),
    (["hardware=cpuu"], "did you mean cpu?"),
    (["experiment=smok"], "did you mean smoke?"),
    (["stag=pit"], "stag=pit: unknown key; did you mean stage?"),
    (["corpora/medcode=x"], "corpora/medcode=x: unknown key"),
    (["stage@foo=pit"], "unknown key; did you mean stage?"),
    (["stage=[pit,dapt]"], "must be the name of one option"),
    (["stage={a:1}"], "must be the name of one option"),
    (["stage=null"], "must be the name of one option"),
    (["stage=3"], "stage=3: "),
    # Overrides that cannot be read.
    (["seed=[1"], "seed=[1: cannot be read"),
    (["seed==1"], "seed==1: cannot be read"),
    (["seed"], "seed: cannot be read"),
    (["seed=1,2"], "several values need -m"),
    (["stage=pit,dapt"], "several values need -m"),
    (["seed=range(3)"], "several values need -m"),
    (["~nothing"], "~nothing: nothing to delete"),
    (["+seed=1"], "already there, write it without +"),
    (["hydra.swepeer.jobs=2"], "hydra.swepeer.jobs=2: unknown key"),
    (["name=a:b:c"], "name"),
    # Unknown keys.
    (["+x=1"], "x=1: unknown key"),
    (["++x.y=1"], 'x={"y": 1}: unknown key'),
    (["sede=1"], "sede=1: unknown key; did you mean seed?"),
    (["stage.phase2.lrr=1"], "did you mean stage.phase2.lr?"),
    (["stage.phase3.lr=1"], "did you mean stage.phase2?"),
    (["stage.lr=1e-3"], "stage.lr=0.001: unknown key; did you mean stage.phase1.lr?"),
    (["stage.micro_batch=4"], "did you mean hardware.micro_batch?"),
    (["micro_batch=4"], "did you mean hardware.micro_batch?"),
    (["global_batch=4"], "did you mean stage.global_batch?"),
    (["hardware.device=2"], "did you mean hardware.devices?"),
    (["stage.optimizer.betta2=0.9"], "did you mean stage.optimizer.beta2?"),
    (["stage=dapt", "stage.phase2.lr=1"], "stage=dapt has no such key, pit has; did you mean"),
    (["logger.password_file=x"], "unknown key"),
    # Wrong types; text is not a number and true is not one.
    (["seed=abc"], "seed=abc: must be a whole number"),
    (["seed='5'"], "seed=5: must be a whole number"),
    (["seed=true"], "seed=true: must be a whole number"),
    (["seed=1.5"], "seed=1.5: must be a whole number"),
    (["hardware.devices=1e3"], "write 1000"),
    (["seed=[1]"], "seed=[1]: must be a whole number"),
    (["seed={a:1}"], 'seed={"a": 1}: must be a whole number'),
    (["seed=null"], "seed=null: must be a whole number"),
    (["stage.phase1.lr=hello"], "stage.phase1.lr=hello: must be a number"),
    (["stage.phase1.lr=true"], "must be a number"),
    (["stage.phase1.lr=''"], "must be a number"),
    (["stage.phase1=3"], "must be a section with keys lr, schedule, "),
    (["corpus.sources={a:3}"], "corpus.sources.a=3: must be a section with keys of its own"),
    (["stage.quiz=true"], "must be null or a section with keys num_questions, "),
    (["~stage.phase1.lr", "+stage.phase1.lr.x=3"], "must be a number"),
    (["check_only=maybe"], "must be true or false"),
    (["check_only=1"], "must be true or false"),
    (["name=12"], "must be text, write \"'12'\""),
    (["logger.tags=pit"], "must be a list"),
    (["logger.tags=[1]"], "logger.tags.0=1: must be text"),
    (["corpus.task_kinds=summary"], "must be a list"),
    (["corpus.sources=[1]"], "corpus.sources=[1]: Cannot merge"),
    (["hardware.checkpoints=null"], "must be a section"),
    # Bounds.
    (["seed=-1"], "seed=-1: must be >= 0"),
    (["stage.phase1.lr=-1e-3"], "must be > 0"),
    (["stage.phase1.lr=0"], "must be > 0"),
    (["stage.phase1.lr=nan"], "stage.phase1.lr=NaN: must be"),
    (["stage.phase1.lr=inf"], "stage.phase1.lr=Infinity: must be"),
    (["stage.phase1.epochs=0"], "must be > 0"),
    (["stage.phase1.min_lr_ratio=1.5"], "must be <= 1"),
    (["stage.optimizer.beta1=1"], "must be < 1"),
    (["stage.max_length=8"], "must be >= 16"),
    (["stage.global_batch=0"], "must be > 0"),
    (["stage.quiz.num_options=1"], "must be >= 2"),
    (["stage.quiz.difficulties=[]"], "must have at least 1"),
    (["corpus.task_kinds=[]"], "must have at least 1"),
    (["corpus.heldout_fraction=0.9"], "must be <= 0.5"),
    (["corpus.deduplicate.jaccard=0"], "must be > 0"),
    (["paths.runs=''"], "must not be empty"),
    (["name=a/b"], "name=a/b: must match"),
    (["name='../../x'"], "must match"),
    ([f"name={LONG}"], "must match"),
    (["corpus.name='a b'"], "must match"),
    # Choices.
    (["on_existing=resum"], "allowed: resume, overwrite, refuse; did you mean resume?"),
    (["hardware.precision=bf16"], "did you mean bf16-mixed?"),
    (["hardware.precision=fp7"], "hardware.precision=fp7: allowed: "),
    (["hardware.attention=flsh"], "did you mean flash?"),
    (["stage.phase1.schedule=cosin"], "did you mean cosine?"),
    (["corpus.task_kinds=[summry]"], "corpus.task_kinds.0=summry: allowed: "),
    (["stage.kind=sftt"], "stage.kind=sftt: allowed: pit, dapt"),
    (["corpus.on_bad=ignore"], "allowed: strict, skip"),
    # Missing values and interpolations.
    (["~stage.phase1"], "stage.phase1: missing"),
    (["~stage.phase1.lr"], "stage.phase1.lr: missing"),
    (["~stage.kind"], "stage.kind: missing"),
    (["~corpus.sources"], "corpus.sources: missing"),
    (["seed=???"], "seed=???: needs a value"),
    (["seed=${nowhere}"], "seed=${nowhere}: Interpolation key 'nowhere' not found"),
    (["seed=${seed}"], "seed=${seed}: refers to itself"),
    (["seed=${oc.env:MEDIPHI_NOT_SET}"], "Environment variable 'MEDIPHI_NOT_SET' not found"),
    (["seed=${nothing:3}"], "Unsupported interpolation type nothing"),
    (["corpus=medcode", "++corpus.deduplicate=${corpus}"], "corpus.deduplicate"),
    # Keys that do not go together.
    (["hardware.micro_batch=3"], "stage.global_batch=4: must be a multiple of"),
    (["hardware.micro_batch=3"], "nearest: 3 or 6"),
    (["hardware.devices=32"], "nearest: 128"),
    (["stage.phase1.warmup_steps=9", "stage.phase1.max_steps=9"], "below max_steps=9"),
    (["model.init=pretrained"], "model.path: init=pretrained needs"),
    (["~model.architecture"], "model.architecture: init=random needs"),
    (["corpus.task_outputs.generator=files"], "corpus.task_outputs.path: generator=files needs"),
    (["hardware.accelerator=cpu", "hardware.attention=flash"], "accelerator=cpu has auto"),
    (["hardware.precision=32-true", "hardware.attention=flash"], "precision=32-true has auto"),
    (["hardware.num_threads=3000000000"], "must be <= 1024"),
    (["hardware.compile=true", "hardware.strategy=fsdp2"], "hardware.compile=true: strategy=fsdp2"),
    # Secrets, never echoed.
    (["+logger.api_key=canary"], "logger.api_key=***: unknown key"),
    (["logger.tags=['${oc.env:WANDB_API_KEY}']"], "holds a secret"),
    (["model.path='https://user:canary@host/x'"], "model.path: holds a secret"),
]

SFT = ["stage=sft", "corpus=mediflow"]
DPO = ["stage=dpo", "corpus=mediflow_dpo"]
LOCAL = ["stage=sft", "corpus=local", "corpus.sources.mine.format=messages"]

CHAT_PROBLEM = [
    # A stage and its corpus.
    (["stage=sft"], "stage=sft reads conversations, the corpus 'medcode' yields plain text; take"),
    (["stage=sft"], "take corpus=mediflow"),
    (
        ["stage=sft", "corpus=local"],
        "take corpus=mediflow, or set corpus.sources.mine.format to me",
    ),
    ([*LOCAL, "stage=dpo"], "corpus.sources.mine.format to preference or mediflow_dpo"),
    ([*LOCAL, "stage=pit"], "take corpus=medcode, or set corpus.sources.mine.format to text"),
    (["stage=dpo"], "stage=dpo reads preference pairs, the corpus 'medcode' yields plain text"),
    (["stage=dpo", "corpus=mediflow"], "yields conversations; take corpus=mediflow_dpo"),
    (["stage=sft", "corpus=mediflow_dpo"], "yields preference pairs; take corpus=mediflow"),
    (["stage=dapt", "corpus=mediflow"], "take corpus=medcode"),
    (["experiment=smoke_sftt"], "did you mean smoke_sft?"),
    (
        ["stage=sfd", "corpus=mediflow"],
        "stage=sfd: allowed: dapt, doctor, dpo, merge, pit, search, sft",
    ),
    # Sources of rows.
    ([*SFT, "corpus.sources.mediflow.format=mediflw"], "did you mean mediflow?"),
    ([*SFT, "corpus.sources.mediflow.format=mediflow_dpo"], "must all yield the same kind"),
    ([*SFT, "corpus.sources.mediflow.side=test"], "allowed: split, train, heldout"),
    ([*SFT, "corpus.sources.mediflow.choose_by=quality"], "needs max_documents: how many"),
    ([*SFT, "corpus.sources.mediflow.stratify_by=[task]"], "did you mean task_type?"),
    ([*SFT, "corpus.sources.mediflow.stratify_by=[task_type]"], "needs max_documents"),
    ([*LOCAL, "corpus.sources.mine.choose_by=quality"], "format=messages has no such columns"),
    ([*LOCAL, "corpus.sources.mine.kind=text"], "kind=text has plain text only"),
    # Keys of both stages.
    ([*DPO, "stage.too_long=cut"], "stage.too_long=cut: allowed: drop, refuse"),
    ([*SFT, "stage.too_long=refused"], "did you mean refuse?"),
    ([*DPO, "stage.lora=16"], "stage.lora=16: must be null or a section with keys rank, alpha, "),
    (["stage.lora.rank=8"], 'stage.lora={"rank": 8}: stage=pit has no such key, sft and dpo have'),
    (["stage.phase.lr=1"], "stage=pit has no such key, dapt, sft and dpo have; did you mean stage"),
    ([*DPO, "stage.lora.rnak=4"], "did you mean stage.lora.rank?"),
    ([*SFT, "stage.lora.rank=0"], "stage.lora.rank=0: must be > 0"),
    ([*SFT, "stage.lora.alpha=-1"], "stage.lora.alpha=-1: must be > 0"),
    ([*DPO, "stage.lora.dropout=1"], "stage.lora.dropout=1: must be < 1"),
    ([*DPO, "stage.lora.export=adapters"], "allowed: merged, adapter; did you mean adapter?"),
    (
        [*DPO, "stage.lora.target_modules=qkv_proj"],
        "stage.lora.target_modules=qkv_proj: must be a list, or allowed: all-linear",
    ),
    ([*DPO, "stage.lora.target_modules=[1]"], "stage.lora.target_modules.0=1: must be text"),
    ([*SFT, "stage.phase1.lr=1"], "did you mean stage.phase?"),
    # Keys of SFT.
    ([*SFT, "stage.train_on_prompt=2"], "must be true or false"),
    ([*SFT, "stage.num_samples=-1"], "stage.num_samples=-1: must be >= 0"),
    ([*SFT, "stage.exam.per_task=0"], "stage.exam.per_task=0: must be > 0"),
    ([*SFT, "stage.exam.max_tokens=9"], "did you mean stage.exam.max_new_tokens?"),
    ([*SFT, "stage.exam=3"], "stage.exam=3: must be null or a section with keys per_task, max_n"),
    ([*SFT, "stage.beta=0.1"], "stage.beta=0.1: stage=sft has no such key, dpo has"),
    ([*SFT, "stage.quiz=null"], "stage.quiz=null: stage=sft has no such key, pit and dapt have"),
    ([*SFT, "lora.rank=16"], 'lora={"rank": 16}: unknown key; did you mean stage.lora?'),
    ([*SFT, "stage.lr=1e-3"], "stage.lr=0.001: unknown key; did you mean stage.phase.lr?"),
    ([*SFT, "stage.kind=dpo"], "stage=dpo reads preference pairs, the corpus 'mediflow' yields co"),
    # Keys of DPO.
    ([*DPO, "+stage.betta=1"], "stage.betta=1: unknown key; did you mean stage.beta?"),
    ([*DPO, "stage.beta=0"], "stage.beta=0: must be > 0"),
    ([*DPO, "stage.beta=strong"], "stage.beta=strong: must be a number"),
    ([*DPO, "stage.beta=0.1,0.2"], "several values need -m"),
    ([*DPO, "stage.loss=sigmod"], "allowed: sigmoid, hinge, ipo, robust; did you mean sigmoid?"),
    ([*DPO, "stage.loss=robust"], "stage.label_smoothing: loss=robust needs the share"),
    ([*DPO, "stage.loss=ipo", "stage.label_smoothing=0.1"], "loss=ipo has none"),
    ([*DPO, "stage.label_smoothing=0.5"], "stage.label_smoothing=0.5: must be < 0.5"),
    ([*DPO, "stage.sft_weight=-1"], "stage.sft_weight=-1: must be >= 0"),
    ([*DPO, "stage.reference=cache"], "allowed: cached, live, none; did you mean cached?"),
    ([*DPO, "stage.reference=false"], "allowed: cached, live, none"),
    ([*DPO, "stage.share_prompt=maybe"], "must be true or false"),
    ([*DPO, "stage.exam.per_task=2"], "stage=dpo has no such key, sft has"),
    ([*DPO, "beta=0.3"], "beta=0.3: unknown key; did you mean stage.beta?"),
    ([*DPO, "stage.epochs=2"], "stage.epochs=2: unknown key; did you mean stage.phase.epochs?"),
    # An experiment with another stage or corpus than its own.
    (
        ["experiment=smoke_dpo", "corpus=mediflow"],
        "corpus.sources.mediflow_dpo.kind: missing; corpus.sources has mediflow, mediflow_heldout, "
        "questions, questions_heldout: leave out what sets mediflow_dpo (an override, the experi",
    ),
    (["experiment=smoke_dpo", "stage=sft"], "stage=sft reads conversations, the corpus 'mediflow_"),
    (["experiment=smoke", "stage=dapt"], "stage.phase1={"),
    (["experiment=smoke_dapt", "stage=dpo"], "stage=dpo reads preference pairs, the corpus 'medc"),
    ([*SFT, "corpus.sources.mine.path=a"], "has mediflow, mediflow_heldout, questions, questions_"),
    (["corpus.sources.icd10cm.text_field=a"], "kind=icd10cm has no such key, jsonl, parquet, tex"),
]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [*ONE_PROBLEM, *CHAT_PROBLEM],
    ids=lambda case: str(case)[:60] or "none",
)
def test_a_mutated_config_is_told_in_one_line(overrides: list[str], expected: str) -> None:
    lines = report(*overrides)
    assert any(expected in text for text in lines), lines
    assert len(lines) <= 2
    for text in lines:
        assert text.isprintable()
        assert len(text) < 300
        assert "canary" not in text


def test_the_tables_have_at_least_sixty_and_forty_mutations() -> None:
    assert len({tuple(overrides) for overrides, _ in ONE_PROBLEM}) >= 60
    assert len({tuple(overrides) for overrides, _ in CHAT_PROBLEM}) >= 40


def test_an_untouched_config_has_no_problem() -> None:
    assert report() == []


@pytest.mark.parametrize(
    "override",
    [
        "stage.optimizer.beta2=0.99",
        "stage.phase1.max_steps=50",
        "logger.tags=[a,b]",
        "logger.group=g",
        "corpus.deduplicate.near=false",
        "hardware.checkpoints.keep=3",
        "stage.phase1.lr=1",
        "name=a.b-c_1",
        "stage.quiz=null",
        "~stage.quiz",
    ],
)
def test_every_schema_key_can_be_given_plainly(override: str) -> None:
    assert report(override) == []


@pytest.mark.parametrize(
    "overrides",
    [
        [*SFT, "stage.lora.rank=4", "stage.lora.target_modules=[qkv_proj]"],
        [*SFT, "stage.exam=null", "stage.num_samples=0", "stage.train_on_prompt=true"],
        [*DPO, "stage.loss=robust", "stage.label_smoothing=0.1", "stage.reference=none"],
        [*DPO, "stage.lora={rank: 8, export: adapter}", "stage.share_prompt=false"],
        LOCAL,
    ],
)
def test_every_key_of_a_chat_stage_can_be_given_plainly(overrides: list[str]) -> None:
    assert report(*overrides) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smok", "--config-name=smok: no such config; allowed: config"),
        ("confg", "--config-name=confg: no such config; allowed: config; did you mean config?"),
        (
            "smoke_sft",
            "--config-name=smoke_sft: no such config; allowed: config; "
            "did you mean experiment=smoke_sft?",
        ),
    ],
)
def test_an_unknown_config_name_is_told_once(name: str, expected: str) -> None:
    assert report("seed=1", "stage=sft", name=name) == [expected]


def test_all_problems_come_in_one_report() -> None:
    lines = report(
        "stage=pitt", "logger=foo", "seed=-1", "stage.phase2.lrr=1", "hardware.precision=x"
    )
    assert len(lines) == 5
    starts = {text.partition("=")[0] for text in lines}
    assert starts == {"stage", "logger", "seed", "stage.phase2.lrr", "hardware.precision"}


def test_one_problem_is_told_once() -> None:
    assert len(report("seed=???")) == 1
    assert len(report("stage.phase1.lr=${nowhere}")) == 1


def test_a_report_fits_one_screen() -> None:
    with pytest.raises(ConfigError) as caught:
        load(composed(*[f"+unknown{i}=1" for i in range(60)]))
    assert len(caught.value.lines) == 60
    shown = str(caught.value).splitlines()
    assert len(shown) == MAX_LINES + 2
    assert shown[-1].endswith("and 40 more")


def test_control_characters_are_shown_escaped() -> None:
    cfg = composed()
    cfg.name = "a\x1b[31m\nb"
    with pytest.raises(ConfigError, match=r"\\x1b\[31m\\nb"):
        load(cfg)


ODD = [None, "x", "", -1, 0, 1e400, float("nan"), [], {}, [[]], {"kind": "pit"}, "???", "${a}"]
ODD += [True, 10**30, "\x00\x1b[2J", "é" * 500, {"a": {"b": [None]}}, "${", "${oc.env:X_TOKEN}"]


def _places(node: DictConfig | ListConfig, prefix: str = "") -> Iterator[str]:
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        if key != "hydra":
            yield f"{prefix}{key}"
            if isinstance(child := node[key], DictConfig | ListConfig):
                yield from _places(child, f"{prefix}{key}.")


def test_any_value_anywhere_is_accepted_or_told_never_a_crash() -> None:
    plain = load(composed("corpus=datamix")).model_dump(mode="json")
    places = list(_places(OmegaConf.create(plain)))
    accepted = 0
    sample = random.Random(0).sample(list(itertools.product(places, ODD)), 200)
    for place, odd in sample:
        cfg = OmegaConf.create(copy.deepcopy(plain))
        try:
            OmegaConf.update(cfg, place, odd, merge=False)
        except OmegaConfBaseException:
            continue
        config, lines = check(cfg)
        assert (config is None) == bool(lines), (place, odd)
        assert len(lines) < 40
        assert all(text.isprintable() and len(text) < 400 for text in lines), lines
        accepted += config is not None
    assert 0 < accepted < len(sample) / 2


MERGE_PROBLEM = {
    ("stage=merge",): "merge: stage=merge needs a method: merge=slerp, merge=breadcrumbs, ...",
    ("stage=merge", "merge=slerp"): "merge.models: slerp needs 1 or more; give merge.models.NAME",
    ("stage=merge", "merge=slerp", "merge.models.a.path=x", "merge.parameters.t=2"): (
        "merge.parameters.t=2: must be from 0 to 1"
    ),
    ("stage=merge", "merge=slerp", "merge.models.a.path=x", "merge.models.b.path=y"): (
        "slerp merges 1 with the base, here are 2"
    ),
    ("stage=merge", "merge=ties", "merge.models.a.path=x", "merge.parameters.densty=1"): (
        "merge.parameters.densty=1: ties has weight, density, normalize, rescale, lambda; "
        "did you mean density?"
    ),
    ("stage=merge", "merge=linear", "merge.models.a.path=x", "merge.base=y"): (
        "merge.base=y: linear has none; list it among the models"
    ),
    ("stage=merge", "merge=ties", "merge.models.a.path=x", "merge.method=tie"): (
        "did you mean ties?"
    ),
    ("stage=merge", "merge=ties", "merge.models.a.path=x", "merge.models.a.parameters.lambda=1"): (
        "one for all models: merge.parameters.lambda"
    ),
    ("stage=merge", "merge=slerp", "merge.models.a.path=x", "merge.parameters.t=[]"): (
        "merge.parameters.t=[]: must have at least one entry"
    ),
    (
        "stage=merge",
        "merge=karcher",
        "merge.models.a.path=x",
        "merge.models.b.path=y",
        "merge.parameters.max_iter=2.7",
    ): "merge.parameters.max_iter=2.7: must be a whole number from 1 to 10000: most iterations",
    ("stage=merge", "merge=linear", "merge.models.a.path=x", "merge.parameters.weight=nan"): (
        "merge.parameters.weight=NaN: must be a finite number, true or false, a list of numbers "
        "or of {value, filter, layers}"
    ),
    (
        "stage=merge",
        "merge=mergekit",
        "merge.config=null",
        "merge.method=della",
        "merge.backend=mergekit",
        "merge.parameters.weight=[{value:1,layers:[1,0]}]",
    ): "layers must be [first, end), two whole numbers",
    ("stage=merge", "merge=slerp", "merge.models.a.path=x", "merge.config=f.yml"): (
        "merge.method=slerp: give either a method (merge=slerp) or merge.config=FILE"
    ),
    ("stage=merge", "merge=mergekit", "merge.config=f.yml", "merge.models.a.path=x"): (
        "merge.config says it, leave it out here"
    ),
    ("stage=pit", "merge=slerp", "merge.models.a.path=x"): "stage=pit merges nothing",
}


@pytest.mark.parametrize("overrides", MERGE_PROBLEM, ids=lambda one: MERGE_PROBLEM[one][:40])
def test_what_a_merge_may_not_say_is_one_line(overrides: tuple[str, ...]) -> None:
    (line,) = report(*map(forced, overrides))
    assert MERGE_PROBLEM[overrides] in line
