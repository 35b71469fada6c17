"""The pipeline: the one place where the five parts meet. Read it from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import attrs

from tunekit.core import recipe
from tunekit.core.common import secrets, threads, turns
from tunekit.core.common.random_states import seed_everything
from tunekit.core.component import Component, Context, check_requirements
from tunekit.core.data import dataset
from tunekit.core.data.codec import Codec
from tunekit.core.evaluation.prompted import Baseline, Prompted, baselines
from tunekit.core.fields import as_text, as_tuple, check_types
from tunekit.core.inspection.preview import Preview, first_rows
from tunekit.core.inspection.report import Report
from tunekit.core.inspection.validation import validate
from tunekit.core.interfaces import AdapterMethod, DataSource, Encoded, Evaluator, Example, Quantizer, Trainer
from tunekit.core.memory.memory_plan import MemoryPlan, settle
from tunekit.core.model import added_tokens, attaching, devices
from tunekit.core.model.base import Base, LoadBase, Loaded, context_length, load_base
from tunekit.core.model.precision import Precision, check_dtype, check_scheme, choose_precision
from tunekit.core.registry import default_registry
from tunekit.core.remote.job import Job
from tunekit.core.remote.ray import Ray
from tunekit.core.run import adapter_files, checkpoint, files, run_report
from tunekit.core.run.export import HeldOut, Parts
from tunekit.core.run.facts import Chosen, Facts
from tunekit.core.run.gauge import Gauge, tokens_of_steps
from tunekit.core.run.measuring import Measuring, check_names, check_rows
from tunekit.core.run.observers import Observers
from tunekit.core.run.plan import Plan, count_parameters, standing_memory
from tunekit.core.run.reopening import Reopening
from tunekit.core.run.result import Run
from tunekit.core.run.resume import Opened, Resume, opened
from tunekit.core.run.run_log import RunLog
from tunekit.core.run.verification import Verification, shortened, some_rows
from tunekit.core.run.verify import Bench
from tunekit.core.training import deepspeed, sharded
from tunekit.core.training.parallel import join
from tunekit.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]


def _builtin(kind: str, name: str) -> Any:
    """A built-in component with its own defaults."""
    return default_registry().find(kind, name)()


@attrs.frozen(kw_only=True)
class Pipeline:
    """A fine-tune, composed of its parts. The pipeline is the recipe: `save` writes it, `tunekit.load` reads it.

    Args:
        model: a Hub id, a local directory, or `tunekit.TINY`, the embedded model.
        revision: branch, tag or commit of a Hub model.
        template: a Jinja chat template; None takes the model's own, else a plain one with headings.
        added_tokens: tokens that the model has not, as they are written in the rows or in the template.
        data: where the rows come from.
        validation: the share of rows to hold out (0 for none), or a source of held-out rows.
        adapter: what is trained.
        quantizer: how the base is stored; None takes what the adapter method brings, if any.
        trainer: the loop.
        evaluators: what is measured on the held-out rows, before and after training.
        baselines: longer prompts with which the base is measured as well.
        seed: of the initial adapter, the order of rows, dropout, and the choice of held-out rows.
        device: "cpu", "cuda", "cuda:1"; None takes CUDA where there is one.
        dtype: of the base weights; None takes what is best: bfloat16 if the hardware is quicker so.
        trust_remote_code: whether code in the model's repository may run.
    """

    model: str = attrs.field(converter=as_text)
    revision: str | None = None
    template: str | None = None
    added_tokens: tuple[str, ...] = attrs.field(default=(), converter=as_tuple)
    data: DataSource
    validation: float | DataSource = 0.1
    adapter: AdapterMethod = attrs.field(factory=partial(_builtin, "adapter", "lora"))
    quantizer: Quantizer | None = None
    trainer: Trainer = attrs.field(factory=partial(_builtin, "trainer", "sft"))
    evaluators: tuple[Evaluator, ...] = attrs.field(
        default=attrs.Factory(lambda: (default_registry().find("evaluator", "perplexity")(),)),
        converter=as_tuple,
    )
    baselines: tuple[Prompted, ...] = attrs.field(default=(), converter=as_tuple)
    seed: int = 0
    device: str | None = None
    dtype: Dtype | None = None
    trust_remote_code: bool = False

    def __attrs_post_init__(self) -> None:
        check_types(self)

    # What it is -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain tables; `from_dict` makes an equal pipeline of it."""
        table: dict[str, Any] = recipe.to_table(self, default_registry())
        return table

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Pipeline:
        """The pipeline that a recipe describes; ConfigError with the field's dotted path if it is wrong."""
        pipeline = recipe.from_table(recipe.without_format(table), cls, default_registry())
        assert isinstance(pipeline, Pipeline)
        return pipeline

    def save(self, path: str | Path) -> None:
        """Write the recipe as TOML, every field that is set included."""
        recipe.write(Path(path), self.to_dict())

    # What it would do -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ConfigError for anything that cannot work, before any download or heavy import (no torch)."""
        self._base.check()
        secrets.check_recipe(self.to_dict())
        context = self._context()
        if not isinstance(self.validation, DataSource) and not 0 <= self.validation < 1:
            raise ConfigError(f"a share must be in [0, 1), got {self.validation}", "Pipeline.validation")
        devices.check(self.device)
        check_dtype(self.dtype, self.device)
        check_scheme(context.quantization, self.adapter)
        added_tokens.check_method(self.added_tokens, self.adapter)
        sharded.check(self.trainer, self.adapter, self._quantizer)
        deepspeed.check(self.trainer, self.adapter, self._quantizer)
        check_names(self.evaluators)
        for component in self._components:
            check_requirements(component)
            component.check(context)

    def rows(self) -> tuple[Sequence[Example], Sequence[Example]]:
        """The rows a run trains on, and those it holds out."""
        return dataset.rows(self.data, self.validation, self.seed)

    def validate(self, **rates: Any) -> Report:
        """A report on the data as `run` would read it; `rates` are the last three arguments of `tunekit.validate`."""
        fields = ("model", "revision", "template", "added_tokens", "trust_remote_code", "trainer", "adapter", "seed")
        same = {name: getattr(self, name) for name in fields}
        return validate(self.data, validation=self.validation, **same, **rates)

    def preview(self, rows: int = 3) -> Preview:
        """The first `rows` of the data as the model will see them; see `tunekit.preview`."""
        return first_rows(self._base, self.data, self.template, self.trainer, rows)

    @turns.alone
    def plan(self) -> Plan:
        """What `run` will do: exact steps and tokens from the data, parameters counted without loading weights."""
        config, codec = self._base.config(), self._base.codec(self.template)
        data = self._data(codec, context_length(config))
        steps = self.trainer.planned_steps(len(data.train))
        device = devices.choose(self.device)
        context = self._context(device, codec=codec, total_steps=steps)
        with threads.settled(device) as fewer:
            held, memory = self._settled(data, codec, context)
        context = attrs.evolve(context, dtype=held.dtype)
        trained = self._empty(context)
        trainable, total = count_parameters(trained)
        return Plan(
            rows=len(data.train),
            validation_rows=len(data.validation),
            steps=steps,
            learning_rate=self.trainer.peak_learning_rate(context),
            tokens=data.tokens,
            supervised_tokens=data.supervised_tokens,
            longest=max(len(row["input_ids"]) for row in data.train),
            trainable_parameters=trainable,
            total_parameters=total,
            precision=str(held),
            checkpoint=self.trainer.checkpoint_bytes(trained),
            checkpoints=self.trainer.checkpoints_kept(),
            memory=memory.parts if memory else standing_memory(trained),
            available=memory.budget if memory else None,
            choices={**fewer, **(memory.choices if memory else {})},
            changed=data.changed,
        )

    @turns.alone
    def verify(self) -> Verification:
        """Whether the numerics are right on this model, method and data: a few rows, a few steps, nothing is kept.

        Compared are a step in one pass and in several, training with padding and without, the loss in chunks and whole,
        the method's start and its base, what was saved and what is loaded, merged and live, resumed and uninterrupted.
        """
        codec, trainer, device = self._base.codec(self.template), shortened(self.trainer), devices.choose(self.device)
        room = context_length(self._base.config())
        rows = some_rows(self.data, trainer, codec, room and room - self.adapter.extra_tokens())
        context = self._context(device, codec=codec, total_steps=trainer.planned_steps(len(rows)))
        context = attrs.evolve(context, dtype=self._precision(context).dtype)
        load = partial(load_base, self._base, self._quantizer, codec, context)
        parts: dict[str, Any] = {"adapter": self.adapter, "quantizer": self._quantizer, "trainer": trainer}
        return Bench(**parts, codec=codec, rows=rows, context=context, load=load).verification()

    # Doing it ---------------------------------------------------------------------------------------------------------

    def run(
        self,
        directory: str | Path,
        *,
        resume: Resume = False,
        observers: Iterable[object] = (),
        on: Ray | None = None,
    ) -> Run:
        """Fine-tune, measuring the base before and the result after, and write everything into `directory`.

        Args:
            directory: the run directory; it must be new or empty unless the run is resumed.
            resume: go on from the newest checkpoint of an unfinished run of this same pipeline; "force" goes on though
                it is another, and records every change in the result and the log.
            observers: objects with hook methods (`tunekit_log`, ...), told of this run only.
            on: a cluster, whose processes make the run; None makes it here.

        Raises:
            ConfigError, DataError: before any weights are loaded.
            RunExists: the directory is taken, or another process is at work in it; nothing is overwritten.
            TrainingError: the training went wrong in a way that would have ruined the result.
            KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came; SFT finished the step and wrote a checkpoint.
        """
        directory = Path(directory)
        if on:
            self.check()
            on.make(Job(pipeline=self, directory=directory, resume=resume, observers=tuple(observers)))
            return self._finished(directory)
        return self._run(directory, resume, observers, load_base)

    @turns.alone
    def _run(
        self,
        directory: Path,
        resume: Resume,
        observers: Iterable[object],
        load: LoadBase,
        alike: Sequence[Path] = (),
    ) -> Run:
        """`run`, with a base from `load`: a comparison has one in memory for all its runs. `alike`: see `Measuring`."""
        told = Observers(default_registry(), observers)
        before = Chosen.by(directory) if resume else Chosen()
        processes, device = join(self.trainer, devices.choose(self.device, before.device))
        if not resume:
            processes.first(partial(files.check_free, directory))
        with threads.settled(device, before.threads, processes.count) as fewer:
            config, codec = self._base.config(), self._base.codec(self.template)
            data = processes.in_turn(lambda: self._data(codec, context_length(config)))
            processes.check_same("what the data source gives", data.fingerprint)
            steps = self.trainer.planned_steps(len(data.train))
            told.add(Gauge(device, tokens_of_steps(self.trainer, data.train.lengths, self.seed)))
            asked, end = self.dtype or before.dtype or "", self.adapter.earliest_end(steps)
            facts = {"total_steps": steps, "earliest_end": end, "run_directory": directory}
            context = self._context(device, asked, codec, **facts)
            held, memory = processes.shared(self._settled, data, codec, context, config)
            context = attrs.evolve(context, dtype=held.dtype)
            known = Facts.of(self.to_dict(), self._components, self._base, codec, data.fingerprint, context)

            with opened(directory, known, steps, resume, processes) as found:
                log = RunLog(directory=directory, observers=told, resumed=found.checkpoint, processes=processes)
                settled = None if found.checkpoint else memory  # a run that goes on has settled it before
                chosen = [] if found.checkpoint else [f"base weights: {held}", *map(": ".join, fewer.items())]
                log.begin(steps, [*turns.notes(), *found.notes, *chosen, *(settled.notes if settled else ())])
                try:
                    trainer = settled.trainer if settled else self.trainer
                    run = self._train(log, codec, data, context, found, load, trainer, alike)
                except BaseException as error:
                    log.end(error)
                    raise
                log.end()
                late = partial(self._settled, data, codec, context)
                run_report.leave(log, data, codec, self.trainer, context, memory, late)
                return run

    def _train(
        self,
        log: RunLog,
        codec: Codec,
        data: dataset.Data,
        context: Context,
        found: Opened,
        load: LoadBase,
        trainer: Trainer,
        alike: Sequence[Path],
    ) -> Run:
        began = time.monotonic()
        prompted = [] if log.resumed else self._baselines(codec, data)
        pieces = sharded.Pieces(trainer=self.trainer, context=context, processes=log.processes)
        give = partial(pieces.load, partial(load, self._base, self._quantizer, codec))
        base = None
        measuring = Measuring(self.evaluators, codec.tokenizer, data.validation, context, log.processes, alike)
        if not log.resumed:
            base = pieces.made(give)
            found.start(measuring.measure(base, "base"), measuring.measure_prompted(base, prompted))
            base = pieces.usable(base)  # nothing can be attached to pieces
        before: dict[str, int] = {}

        def prepared() -> Any:
            """The model to be trained, as it starts or as a checkpoint has it; one process alone may be at it."""
            seed_everything(self.seed)
            model = attaching.attach(self.adapter, give() if base is None else base, context)
            if not any(parameter.requires_grad for parameter in model.parameters()):
                raise ConfigError(f"{self.adapter.name} left nothing to train", "Pipeline.adapter")
            before.update(checkpoint.checksums(model))
            if log.resumed:
                log.resumed.load_parameters(model)
                self.adapter.load_train_state(model, log.resumed.state["method"])
            return model

        model = pieces.made(prepared)
        log.device = context.device
        log.method_state = partial(self.adapter.train_state, model)
        log.load_method_state = partial(self.adapter.load_train_state, model)
        if log.resumed:
            found.record()

        fit = partial(trainer.fit, model, codec.tokenizer, data.train, run=log, context=context)
        with attaching.explained(self.adapter, context):
            trained = fit(
                after_step=measuring.counting(self.adapter.after_step),
                extra_loss=self.adapter.extra_loss,
                validate=partial(measuring.measure, model) if data.validation else None,
            )
        checkpoint.check_moved(model, before)
        with sharded.whole(model):
            log.write(files.ADAPTER, lambda at: adapter_files.save(at, self.adapter, model, found.facts.base, codec))
        # Packed weights are fewer numbers than parameters: those of a quantized base are counted on a plain one.
        plain = self._empty(context) if self._quantizer else model
        trainable, total = count_parameters(plain)
        started = files.read_json(log.directory / files.START)
        result = {
            "metrics": measuring.measure(model, "tuned"),
            "base_metrics": started["base_metrics"],
            "prompted": started.get("prompted", {}),
            "intervals": measuring.intervals(),
            "training": {"steps": trained.steps, **trained.metrics, **trained.notes},
            "rows": {"train": len(data.train), "validation": len(data.validation), "changed": data.changed},
            "tokens": {"train": data.tokens, "supervised": data.supervised_tokens},
            "parameters": {"trainable": trainable, "total": total},
            "components": [default_registry().provenance(type(component)) for component in self._components],
            "resumes": started["resumes"],
            "seconds": round(time.monotonic() - began, 3),
        }
        log.write(files.RESULT, lambda at: files.write_json(at, result))
        return self._finished(log.directory, pieces.usable(Loaded(model=model.eval(), codec=codec, context=context)))

    # Its parts --------------------------------------------------------------------------------------------------------

    @property
    def _base(self) -> Base:
        names = ("model", "revision", "trust_remote_code", "added_tokens")
        return Base(**{name: getattr(self, name) for name in names})

    @property
    def _quantizer(self) -> Quantizer | None:
        return self.quantizer or self.adapter.default_quantizer()

    @property
    def _components(self) -> list[Component]:
        parts = [self.data, self.validation, self.adapter, self._quantizer, self.trainer, *self.evaluators]
        return [part for part in parts if isinstance(part, Component)]

    def _empty(self, context: Context) -> Any:
        """The model with the method attached, on the meta device."""
        return attaching.attach(self.adapter, self._base.empty(context.dtype, context.added_ids), context)

    def _settled(
        self, data: dataset.Data, codec: Codec, context: Context, unless_roomy: Any = None
    ) -> tuple[Precision, MemoryPlan | None]:
        """In which dtype the base is held, and how the trainer keeps within the memory there is."""

        def plan(dtype: str) -> MemoryPlan | None:
            facts, parts = attrs.evolve(context, dtype=dtype), (data.train, codec.tokenizer, self._quantizer)
            return self.trainer.plan_memory(partial(self._empty, facts), *parts, facts, unless_roomy=unless_roomy)

        return settle(self._precision(context), plan)

    def _precision(self, context: Context) -> Precision:
        return choose_precision(context.dtype or None, context.device, self.adapter, self._base.empty)

    def _context(self, device: str = "", dtype: str = "", codec: Codec | None = None, **facts: Any) -> Context:
        return Context(
            model_id=self.model,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            model_type=self._base.model_type(),
            seed=self.seed,
            device=device or self.device or "",
            dtype=dtype or self.dtype or "",
            quantization=self._quantizer.scheme if self._quantizer else None,
            learning_rate=self.adapter.learning_rate,
            better={name: way for evaluator in self.evaluators for name, way in evaluator.better.items()},
            template=self.template,
            added_ids=self._base.added_ids(codec) if codec else (),
            **facts,
        )

    def _data(self, codec: Codec, longest: int | None) -> dataset.Data:
        data = dataset.load(self.data, self.validation, self.trainer, codec, longest, self.seed, self.adapter)
        check_rows(self.evaluators, codec.tokenizer, data.validation, self._context())
        return data

    def _held_out(self, codec: Codec) -> Sequence[Encoded]:
        return self._data(codec, context_length(self._base.config())).validation

    def _baselines(self, codec: Codec, data: dataset.Data) -> list[Baseline]:
        room, parts = context_length(self._base.config()), (self.data, self.validation)
        return baselines(self.baselines, *parts, data, codec, self.evaluators, room, self.seed)

    def _finished(self, directory: Path, tuned: Loaded | None = None, held_out: HeldOut | None = None) -> Run:
        def context(codec: Codec) -> Context:
            device = devices.here(self.device)
            return self._context(device, files.dtype_of(directory), codec, run_directory=directory)

        made_of: dict[str, Any] = {"base": self._base, "adapter": self.adapter, "quantizer": self._quantizer}
        again = Reopening(directory=directory, template=self.template, context=context, **made_of)
        parts = Parts(load=again.load, load_plain=again.load_plain, held_out=held_out or self._held_out, **made_of)
        return Run(directory, parts, tuned)
