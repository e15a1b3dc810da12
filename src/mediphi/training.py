"""The flow of a training stage: data, phases, exam, artifact. Resumable at every point.

What is done shows on disk, in this order: a phase's checkpoints, its model folder, its exam's
file, and last of all the run's manifest. Every step looks there first.
"""

import json
import time
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from mediphi import engine, tracking
from mediphi.artifacts import (
    check_data,
    plain_folder,
    preflight_space,
    verified_parent,
    verify,
    write_atomic,
)
from mediphi.backbone import (
    BackboneSpec,
    check_vocabulary,
    check_weights,
    load_tokenizer,
    resolve_folder,
)
from mediphi.budget import estimate
from mediphi.chat_exams import TaskScores
from mediphi.checkpointing import remove_checkpoints
from mediphi.config import run_dir, run_name
from mediphi.config.schema import Config
from mediphi.config.stages import ChatStage, DpoStage, SftStage, TaskExam
from mediphi.data.heldout_prompts import heldout_prompts, long_references
from mediphi.errors import ArtifactError, UserError
from mediphi.evaluate.scores import OVERALL, Scored, summarise
from mediphi.examination import CodeQuiz, Exam
from mediphi.heldout_loss import HeldoutLoss
from mediphi.launch import RunResult, rank
from mediphi.modules.meters import UNNAMED
from mediphi.phases import Loggers, PhasePlan, Training, fit_phase, plan_phases
from mediphi.planning.memory import least_state
from mediphi.planning.page import show_phases, show_plan
from mediphi.planning.plan import Planner, available_memory
from mediphi.preparation import prepare
from mediphi.process_group import join_processes, wait_for_all
from mediphi.publication import Answers, publish_run
from mediphi.references import bring_references, preference_exam
from mediphi.stages import metric_groups, objective_of
from mediphi.tracking.names import header
from mediphi.tracking.progress import silence_lightning

EXAM_SLOTS = {"quiz": "difficulty", "exam": "group"}
"""Metric of an exam that has columns of its own -> what its groups fill in their names."""
BEFORE = "before"
"""The moment before the first phase."""


def train(config: Config) -> RunResult:
    """Run a training stage to its artifact, or go on where it was interrupted.

    The caller holds the run directory.

    Raises:
        UserError: whatever the user can mend, in one line.
        Interrupted: a signal came; the state is saved.
    """
    silence_lightning()
    rank_zero_only.rank = rank()  # Lightning's loggers would take Slurm's number for it
    engine.limit_threads(config.hardware)
    join_processes(config.hardware)
    with engine.failing_alone(config.hardware):
        run = _set_up(config)
        if config.check_only:
            if rank() == 0:
                show_plan(Planner(run))
            return RunResult(None, run.folder)
        return _train(run)


def _set_up(config: Config) -> Training:
    """Everything that can be refused is refused here, before the first step."""
    stage = config.stage
    shares = isinstance(stage, DpoStage) and stage.share_prompt
    device = engine.resolve(config.hardware, shares_prompts=shares, planning=config.check_only)
    parent = plain = None
    folder = _planned_folder(config) if config.check_only else resolve_folder(config.model.folder)
    if config.model.is_pretrained and not config.check_only:
        check_weights(folder)
        parent, plain = verified_parent(Path(folder)), plain_folder(folder)
    parents = {} if parent is None else {"model": parent}
    tokenizer = load_tokenizer(folder, revision=config.model.revision)
    budget = estimate(folder, config=config, device=device)
    check_vocabulary(tokenizer, budget.model_config)
    data = prepare(config, tokenizer)
    if rank() == 0 and not config.check_only:
        check_data(run_dir(config), data.fingerprint, parents=parents, folder=plain)
    phases = plan_phases(config, data=data, model_config=budget.model_config)
    return Training(config, device, tokenizer, data, phases, budget, run_dir(config), parents)


def _planned_folder(config: Config) -> str:
    """A plan needs config and tokenizer alone; what a run would miss is told."""
    model = config.model
    folder = resolve_folder(model.folder)
    if not model.is_pretrained:
        return folder
    try:
        if not Path(folder).is_dir():
            load_tokenizer(folder, revision=model.revision)  # what the hub's cache may hold
        check_weights(folder)
        verified_parent(Path(folder))
    except UserError as error:
        _tell(f"weights     a run would end with: {error}")
        if not Path(folder).is_dir() and model.architecture:
            _tell(f"weights     planned from config and tokenizer in {model.architecture}")
            return model.architecture
    return folder


def _tell(line: str) -> None:
    """Once, whatever the number of processes."""
    if rank() == 0:
        print(line, flush=True)


def _refuse_hopeless(run: Training) -> None:
    """What every plan needs at least; a GPU cannot borrow from anywhere.

    Raises:
        UserError: the training state alone is larger than the GPU's memory.
    """
    least = least_state(run.budget, config=run.config, device=run.device)
    there = available_memory(run.device, config=run.config)
    if least <= there:
        return
    told = (
        f"weights, gradients and moments take {least / 1e9:.1f} GB a process, "
        f"{run.device.name} has {there / 1e9:.1f}: check_only=true says what would fit"
    )
    if run.device.type == "cuda":
        raise UserError(f"hardware.strategy={run.config.hardware.strategy}: {told}")
    _tell(f"memory      {told}")


def _train(run: Training) -> RunResult:
    _refuse_hopeless(run)
    config, exams = run.config, _exams(run)
    preflight_space(run.folder, run.budget.disk_bytes)
    if rank() == 0:
        print(f"run         {run.folder}  ({run.device.name}, {run.device.precision})")
        if isinstance(config.stage, ChatStage) and not config.model.is_pretrained:
            print("weights     random: give model.path=RUN_DIRECTORY to go on from a trained model")
        show_phases(run.phases)
    loggers = tracking.make_loggers(
        config.logger,
        run_dir=run.folder,
        run_name=run_name(config),
        header=header(
            objective_of(config.training),
            {**metric_groups(config.training, run.phases[0].data), **_exam_columns(exams)},
        ),
        config_dict=config.model_dump(mode="json"),
    )
    started, exit_code = time.monotonic(), 1
    try:
        answers = _run_phases(run, exams, loggers)
        exit_code = 0
    finally:
        tracking.finish(loggers, exit_code=exit_code)
    sat = list(zip(exams, answers, strict=True))
    return publish_run(run, sat, seconds=time.monotonic() - started)


def _run_phases(run: Training, exams: list[Exam], loggers: Loggers) -> list[Answers]:
    """Train all phases; what each exam gives before the first and after each."""
    backbone, first = _first_backbone(run), run.phases[0]
    if isinstance(run.config.stage, DpoStage):
        bring_references(run, first, backbone)
    sit = partial(_sit, run, exams, loggers)
    moments = {BEFORE: sit(BEFORE, plan=first, backbone=backbone)}
    for plan in run.phases:
        target = run.model_folder(plan)
        if not target.is_dir():
            fit_phase(run, plan, backbone=backbone, loggers=loggers)
        else:
            _check_model(target)
        if rank() == 0 and plan is not run.phases[-1]:
            remove_checkpoints(run.checkpoints(plan))  # the next phase starts from the model
        wait_for_all()
        backbone = replace(backbone, folder=str(target), init="pretrained", revision="main")
        moment = f"after {plan.name}"
        moments[moment] = sit(moment, plan=plan, backbone=backbone)
    return [{name: own[n] for name, own in moments.items() if own[n]} for n in range(len(exams))]


def _check_model(target: Path) -> None:
    """A folder proves nothing; its manifest does."""
    try:
        verify(target)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; to make it anew, delete {target} and run again") from None


def _first_backbone(run: Training) -> BackboneSpec:
    model, stage = run.config.model, run.config.stage
    return BackboneSpec(
        folder=resolve_folder(model.folder),
        init="pretrained" if model.is_pretrained else "random",
        revision=model.revision,
        kernel=run.device.kernel,
        recomputed_layers=run.budget.recomputed_layers,
        compiled_tokens=run.compiled_tokens,
        loss_chunk_tokens=run.device.loss_chunk_tokens,
        lora=stage.lora if isinstance(stage, ChatStage) else None,
        seed=run.config.seed,
    )


def _exams(run: Training) -> list[Exam]:
    """What the stage is examined in, the exam that sweeps compare first."""
    stage, heldout = run.config.stage, run.data.heldout
    if run.data.questions:
        return [CodeQuiz(run.tokenizer, run.data.questions, run.device)]
    if isinstance(stage, DpoStage) and heldout.num_tokens:
        return [preference_exam(run, run.phases[0], _first_backbone(run))]
    if not isinstance(stage, SftStage) or not heldout.num_tokens:
        return []
    # Of answers alone, also where prompts are trained on: one name for one number.
    settings = replace(run.phases[0].data.settings, world_size=1, learnt=("answer",))
    loss = HeldoutLoss(heldout, settings, run.device)
    return [loss] if stage.exam is None else [*_task_scores(run, stage, stage.exam), loss]


def _task_scores(run: Training, stage: SftStage, exam: TaskExam) -> list[Exam]:
    """Only prompts whose reference can be written out: a cut JSON answer scores 0, however good."""
    limits = {"max_prompt_tokens": stage.max_length, "max_answer_tokens": exam.max_new_tokens}
    if rank() == 0:
        _tell_long_references(long_references(run.data.heldout, **limits), exam)
    prompts = heldout_prompts(
        run.data.heldout, run.tokenizer, per_task=exam.per_task, seed=run.config.seed, **limits
    )
    if not prompts:
        return []
    return [TaskScores(run.tokenizer, prompts, exam.max_new_tokens, run.device)]


def _tell_long_references(long: dict[str, tuple[int, int]], exam: TaskExam) -> None:
    if not long:
        return
    counts = (
        f"{few:,} of {asked:,} {task or UNNAMED}{' (left out of the exam)' * (few == asked)}"
        for task, (few, asked) in long.items()
    )
    limit = f"stage.exam.max_new_tokens={exam.max_new_tokens}"
    print(f"exam        not asked, the reference exceeds {limit}: {', '.join(counts)}")


def _exam_columns(exams: list[Exam]) -> dict[str, tuple[str, ...]]:
    """What fills the exams' metric names, as `header` takes it; the loss has its own."""
    columns = {}
    for exam in exams:
        groups = (*exam.groups, OVERALL) if exam.overall else exam.groups
        columns[EXAM_SLOTS.get(exam.metric, "")] = groups
    return columns


def _sit(
    run: Training,
    exams: list[Exam],
    loggers: Loggers,
    moment: str,
    *,
    plan: PhasePlan,
    backbone: BackboneSpec,
) -> list[list[Scored]]:
    """The scores at a moment, taken once; the row is logged before the file says that it is."""
    backbone = replace(backbone, recomputed_layers=0, compiled_tokens=None, lora=None)
    scores: list[list[Scored]] = [[] for _ in exams]
    for number, exam in enumerate(exams if rank() == 0 else []):
        path = run.folder / "exam" / f"{exam.metric}_{moment.replace(' ', '_')}.json"
        if path.is_file():
            scores[number] = [Scored(**row) for row in json.loads(path.read_text())]
            continue
        scores[number] = _without_patient_ids(exam.sit(backbone), run.config)
        if exam.metric in EXAM_SLOTS:
            step = 0 if moment == BEFORE else plan.num_steps
            results = summarise(scores[number], overall=exam.overall, seed=run.config.seed)
            tracking.begin_phase(loggers, plan.name, first_step=plan.first_step, resumed_step=step)
            tracking.log(loggers, {f"{exam.metric}/{r.group}": r.score for r in results}, step=step)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, json.dumps([one._asdict() for one in scores[number]]) + "\n")
    wait_for_all()
    return scores


def _without_patient_ids(scored: list[Scored], config: Config) -> list[Scored]:
    """A row's id may name a patient; where texts hold health information a hash stands for it."""
    guarded = {n for n, source in config.corpus.sources.items() if not source.licence.may_be_shown}
    return [
        one._replace(id=sha256(one.id.encode()).hexdigest()[:16])
        if one.id.partition("/")[0] in guarded
        else one
        for one in scored
    ]
