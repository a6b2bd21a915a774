"""What a job is: one pydantic model, read from YAML, overridden by `a.b=value`, validated at the door.

The keys of a kind (a dataset, signal, field or optimizer) are the fields of its class with their types and
defaults, so a new kind is one file and one line in its dict, and nothing here. Unknown keys and keys of
another kind are refused. The layers below receive values they can trust.
"""

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from nfscale.datasets import DATASETS
from nfscale.datasets.base import Dataset, Opener, Repeated, open_limited
from nfscale.datasets.tiled import Runs, Tiled, counted
from nfscale.engine.learners import LEARNERS, MAML
from nfscale.engine.loop import LADDER_AND_PLAN, LADDER_IS_NO_PLATEAU
from nfscale.engine.problem import unsolvable
from nfscale.engine.result import Stop
from nfscale.engine.sampling import Sampling
from nfscale.errors import CallerError
from nfscale.fields import FIELDS
from nfscale.fields.initializations import NOISES
from nfscale.optim import (
    METHODS,
    OPTIMIZERS,
    SCHEDULES,
    SOLVERS,
    Adam,
    Automatic,
    Circumstances,
    Regularized,
    Schedule,
    Scheduled,
    Solver,
    automatic_kind,
)
from nfscale.signals import SIGNALS, samples_per_axis
from nfscale.signals.tiles import Gridded, Tile
from nfscale.store import step_plan
from nfscale.store.schema import StoreDtype

FORMAT_VERSION = 1
"""Of the run folder and the table; a reader refuses a newer one."""

_RUNTIME = {"dimensions", "channels", "schedule", "learning_rate", "modality"}
"""Fields of a kind's class that the job derives instead of taking them as they are."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DatasetSection(_Section):
    """Keys of every dataset kind."""

    limit: PositiveInt | None = None
    """A seeded sample of this many data, spread over the dataset."""
    repeats: PositiveInt = 1
    """Fields of each datum (after `limit`), each from a seed of its own: ids ID, ID#1, ID#2, ..."""

    def opener(self, modality: str) -> Opener:
        """The opener this section describes, for data of a signal's kind."""
        return _build(DATASETS[self.kind], self, modality=modality)  # type: ignore[attr-defined]


class SignalSection(_Section):
    """Keys of every signal kind."""

    channels: PositiveInt | Literal["auto"] = "auto"
    """auto: the first readable datum decides."""
    tile: Tile | None = None
    """Cut data into blocks that overlap, each a field of its own, which `nfscale decode` blends: the size along all
    axes or along each (256, 64x64; of sounds in seconds), or {size: 256, overlap: 16}. Of image, audio, video, volume.
    """

    @field_validator("tile", mode="before")
    @classmethod
    def _parsed_tile(cls, given: Any) -> Tile | None:
        signal = SIGNALS[cls.model_fields["kind"].default]
        if given is not None and not issubclass(signal, Gridded):
            cut = ", ".join(sorted(kind for kind, one in SIGNALS.items() if issubclass(one, Gridded)))
            raise ValueError(f"such data are no grids that can be cut into blocks; those of {cut} are")
        return None if given is None else Tile.parsed(given, signal.grid_axes, signal.whole_cells)


class FieldSection(_Section):
    """Keys of every field kind."""

    init: Literal["shared", "learned", "per_datum"] = "shared"
    """shared: all fields start from one draw; learned: from what the section `learning` makes of it; per_datum: each
    from its own."""


class LearningSection(_Section):
    """Keys of every kind of learning, see `nfscale.engine.learners`; without effect but for field.init=learned."""


class RateSection(_Section):
    """Keys of every optimizer kind that has a learning rate; solvers that search for their steps have none."""

    learning_rate: PositiveFloat | Literal["auto"] = "auto"
    """auto: the optimiser's own rule in width, weight scale and samples per step."""
    schedule: Literal[tuple(SCHEDULES)] = "cosine"  # type: ignore[valid-type]


class OptimizerSection(RateSection):
    """Keys of every optimizer kind but solvers."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled, per unit of the learning rate, as AdamW's: at ESGD's rate of 1, 0.01 is a hundredth at each step."""
    clip_norm: PositiveFloat | None = None
    """The longest gradient of a field. With it or with weight decay the update runs in torch, whatever the step."""


class FitSection(_Section):
    """How long and on how many samples a field is fitted."""

    max_steps: PositiveInt = 1000
    target: float | None = None
    """In the unit of the signal's quality."""
    samples: PositiveInt | Literal["full"] = 256
    sampling: Sampling = "stratified"
    """stratified: one sample of every run of neighbours; uniform: independent draws; error: more of those that the last
    check saw represented badly, see `nfscale.engine.sampling`."""
    check_every: PositiveInt = 50
    objective: Literal["fit", "interpolate"] = "fit"
    """Which side `field.weight_scale: auto` takes: speed, or what lies between the samples."""
    plateau_checks: PositiveInt | None = None
    plateau_gain: float = 0.1
    max_restarts: NonNegativeInt = 3
    first_steps: PositiveInt | None = None
    """A ladder of budgets: the schedule ends after so many steps, and a field that has missed its target goes on from
    its best params with the rest of one of twice the length, and so on up to `max_steps`. null: one of `max_steps`."""
    step_plan: str | None = None
    """A file of steps by datum, a path or URI, as `nfscale estimate --budget` writes it: of a field's schedule, and at
    most, in place of `max_steps`, which holds for data that are not in it."""
    batch: PositiveInt | Literal["auto"] = "auto"
    step: Literal["auto", "plain", "torch", "native", "fused"] = "auto"
    """plain: autograd; torch: without autograd; native: C++, on a CPU; fused: Triton, on a GPU; auto: the fastest that
    serves. They agree to rounding, which is that of float16 products in the fused step."""
    precision: Literal["auto", "float32", "tf32", "float16"] = "auto"
    """Of the products between hidden layers. tf32, float16: on a GPU; auto: float16 in the fused step up to weight
    scale 3, float32 otherwise. First layers, weights and what is measured are float32 always."""

    @model_validator(mode="after")
    def _cadence_fits(self) -> "FitSection":
        self.stop()
        if self.first_steps is not None:
            if self.first_steps % self.check_every:
                raise ValueError(
                    f"first_steps={self.first_steps} is not a multiple of check_every={self.check_every}; "
                    "a budget ends at a check"
                )
            if self.plateau_checks is not None:
                raise ValueError(LADDER_IS_NO_PLATEAU)
            if self.step_plan is not None:
                raise ValueError(LADDER_AND_PLAN)
        if self.precision in ("tf32", "float16") and self.step in ("plain", "native"):
            raise ValueError(
                f"fit.precision={self.precision} is of steps on a GPU, and fit.step={self.step} has float32 products; "
                "use fit.step=auto or torch"
            )
        if self.sampling == "error" and self.samples == "full":
            raise ValueError(
                "fit.sampling=error chooses what a step takes, and fit.samples=full takes all; give a number"
            )
        return self

    def stop(self) -> Stop:
        """When a field is looked at and let go."""
        return Stop(
            self.max_steps, self.target, self.check_every, self.plateau_checks, self.plateau_gain, self.max_restarts
        )


class StoreSection(_Section):
    """How weights are stored."""

    dtype: StoreDtype = "float32"
    shard_fields: PositiveInt | Literal["auto"] = "auto"
    ipc_copy: bool = False
    """Beside the table, an uncompressed Arrow IPC copy for training (weights.arrow), which is memory-mapped."""


class TrackSection(_Section):
    """What goes to MLflow."""

    enabled: bool = True
    experiment: str = "nfscale"
    per_datum_limit: NonNegativeInt = 10_000


def _build(cls: type, section: BaseModel, **derived: Any) -> Any:
    """An instance of a kind's class from its section and the fields that the job derives."""
    names = {field.name for field in dataclasses.fields(cls)}
    keys = {name: getattr(section, name) for name in type(section).model_fields if name in names - _RUNTIME}
    return cls(**keys | {name: value for name, value in derived.items() if name in names})


def _union(base: type[_Section], kinds: dict[str, type]) -> Any:
    """The discriminated union of one model per kind: the base's keys and those of the kind's class."""
    models = []
    for kind, cls in kinds.items():
        hints = get_type_hints(cls)
        has_rate = base is OptimizerSection and "learning_rate" in hints
        shared = base
        if base is OptimizerSection and kind not in OPTIMIZERS:
            shared = RateSection if has_rate else _Section
        keys: dict[str, Any] = {"kind": (Literal[kind], kind)}
        for field in dataclasses.fields(cls):
            if field.name not in _RUNTIME:
                default = ... if field.default is dataclasses.MISSING else field.default
                keys[field.name] = (hints[field.name], default)
        if hasattr(cls, "auto_weight_scale"):
            keys["weight_scale"] = (PositiveFloat | Literal["auto"], keys["weight_scale"][1])
        if has_rate:
            keys["warmup"] = (NonNegativeInt, getattr(cls, "default_warmup", 0))
        models.append(create_model(f"{cls.__name__}Keys", __base__=shared, __doc__=cls.__doc__, **keys))
    if len(models) == 1:
        return models[0]
    return Annotated[Union[tuple(models)], Field(discriminator="kind")]  # noqa: UP007 (built from a dict)


_DatasetKeys = _union(DatasetSection, DATASETS)
_SignalKeys = _union(SignalSection, SIGNALS)
_FieldKeys = _union(FieldSection, FIELDS)
_OPTIMIZERS: dict[str, type] = METHODS | {"auto": Automatic}
_OptimizerKeys = _union(OptimizerSection, _OPTIMIZERS)
_LearningKeys = _union(LearningSection, LEARNERS)
_KINDS = {
    "dataset": DATASETS,
    "signal": SIGNALS,
    "field": FIELDS,
    "learning": LEARNERS,
    "optimizer": _OPTIMIZERS,
}
_POSSIBLE_CHANNELS = (1, 2, 3, 4)
_DEFAULT_KIND = {"signal": "image", "field": "mlp", "learning": "reptile", "optimizer": "esgd"}


class EncodeJob(_Section):
    """A dataset encoded as fields: everything that decides what comes out, and where it goes."""

    name: str = Field(default="encode", min_length=1)
    dataset: _DatasetKeys  # type: ignore[valid-type]
    signal: _SignalKeys  # type: ignore[valid-type]
    field: _FieldKeys  # type: ignore[valid-type]
    learning: _LearningKeys = Field(default={"kind": "reptile"}, validate_default=True)  # type: ignore[valid-type]
    optimizer: _OptimizerKeys  # type: ignore[valid-type]
    fit: FitSection = FitSection()
    store: StoreSection = StoreSection()
    track: TrackSection = TrackSection()
    workers: NonNegativeInt | Literal["auto"] = "auto"
    """0: in this process, without Ray; auto: as many as there is room for, on a cluster that grows `max_workers`."""
    max_workers: PositiveInt | None = None
    workers_per_gpu: NonNegativeInt | Literal["auto"] = "auto"
    """That share each GPU, asked for also of a cluster that has none yet; 0: workers that leave the GPUs alone; auto:
    one where there are GPUs."""
    checkpoint_minutes: PositiveFloat = 10.0
    """A shard that takes longer keeps what it has so far, so often; another attempt at it goes on from there. Most
    shards are seconds of work. What counts is what the run was planned with."""
    max_failed_fraction: float = Field(default=0.01, ge=0, le=1)
    seed: NonNegativeInt = 0
    output: str = Field(min_length=1)

    @model_validator(mode="after")
    def _parts_fit(self) -> "EncodeJob":
        field = self.build_field(dimensions=SIGNALS[self.signal.kind].dimensions, channels=1)
        optimizer = self.build_optimizer(samples_per_step=1)
        signal = self._possible_signal()
        if self.tile is not None:
            signal.refuse_tile(self.tile)
        if self._learns_rates and self.optimizer.kind not in ("adam", "auto"):
            raise ValueError(
                f"learning.kind={self.learning.kind} learns rates of optimizer.kind=adam, and it is "
                f"{self.optimizer.kind}; use that or learning.kind=maml"
            )
        if isinstance(optimizer, Solver):
            self._solver_can(optimizer, field, signal)
        if self.fit.first_steps is not None and self.optimizer.kind in SOLVERS and not isinstance(optimizer, Scheduled):
            raise ValueError(
                f"fit.first_steps is the length of a schedule, and optimizer.kind={self.optimizer.kind} follows none"
            )
        if self.needs_calibration and self.field.init == "per_datum":
            raise ValueError(
                "optimizer.curvature=shared needs fields that start from one theta0, and field.init is per_datum; "
                "use field.init=shared or optimizer.curvature=per_field"
            )
        if self.store.dtype == "delta_float16" and self.field.init == "per_datum":
            raise ValueError(
                "store.dtype=delta_float16 stores differences from one theta0, and field.init is per_datum; "
                "use field.init=shared or store.dtype=float16"
            )
        update_every = getattr(self.optimizer, "update_every", 1)
        if self.fit.max_steps >= self.fit.check_every and self.fit.check_every % update_every:
            raise ValueError(
                f"fit.check_every={self.fit.check_every} is not a multiple of optimizer.update_every={update_every}"
            )
        return self

    def _solver_can(self, solver: Solver, field: Any, signal: Any) -> None:
        """Raise why a solver cannot fit such fields to such a signal, whatever the data are."""
        kind = self.optimizer.kind
        if solver.full_batch and self.fit.samples != "full":
            raise ValueError(
                f"optimizer.kind={kind} takes all samples of a field at every step, and fit.samples is "
                f"{self.fit.samples}; use fit.samples=full"
            )
        if why := unsolvable(solver, field, signal):
            raise ValueError(f"optimizer.kind={kind} cannot be used: {why}")

    def _possible_signal(self) -> Any:
        """The signal, of any number of channels while `channels: auto` waits for the data.

        Raises what is wrong with its keys whatever the data are.
        """
        keys = self.signal.model_dump(exclude={"kind", "tile"})
        counts = _POSSIBLE_CHANNELS if keys["channels"] == "auto" else (keys["channels"],)
        wrong = []
        for channels in counts:
            try:
                return SIGNALS[self.signal.kind](**keys | {"channels": channels})
            except ValueError as error:
                wrong.append(error)
        raise next((error for error in wrong if "channels" not in str(error)), wrong[0])

    @property
    def needs_calibration(self) -> bool:
        """Whether the fields share curvature that is estimated once per job."""
        return getattr(self.optimizer, "curvature", None) == "shared"

    @property
    def tile(self) -> Tile | None:
        """How data are cut into blocks, if they are."""
        return self.signal.tile

    def tile_description(self) -> dict[str, Any]:
        """Of blocks, for readers without nfscale; empty where data are not cut."""
        return {} if self.tile is None else {"tile": self._possible_signal().tile_description(self.tile)}

    def read_steps(self) -> dict[str, int] | None:
        """The step plan, if the job has one: steps by datum's id.

        Raises:
            CallerError: if there is no such file, or what it says does not go with the job.
        """
        if self.fit.step_plan is None:
            return None
        steps, cadence = step_plan.read(self.fit.step_plan), self.fit.stop().cadence
        for datum_id, count in steps.items():
            if count < 1 or count % cadence:
                raise CallerError(
                    f"fit.step_plan: {self.fit.step_plan!r} gives {datum_id!r} {count} steps, which is no multiple of "
                    f"fit.check_every={cadence}; use the check_every it was made for, or make it again"
                )
        return steps

    def open_dataset(self) -> Dataset:
        """The dataset with its limit and its repeats applied; whole data, where they are to be cut."""
        dataset = open_limited(self.dataset.opener(self.signal.kind), self.dataset.limit, self.seed)
        return dataset if self.dataset.repeats == 1 else Repeated(dataset, self.dataset.repeats)

    def counted_blocks(self, data: Dataset) -> Runs | None:
        """How many blocks each of these data has, which reads them all; None where data are not cut."""
        return None if self.tile is None else counted(data, self._possible_signal(), self.tile)

    def blocks_of(self, data: Dataset, blocks: Runs | None) -> Dataset:
        """These data cut into as many blocks as were counted."""
        if self.tile is None or blocks is None:
            return data
        return Tiled(data, self._possible_signal(), self.tile, blocks)

    def build_signal(self, contents: Sequence[Any]) -> Any:
        """The signal of the run, with what is `auto` decided by these data.

        Raises:
            ValueError: if they do not fit it.
        """
        cls = SIGNALS[self.signal.kind]
        return cls(**cls.settled(self.signal.model_dump(exclude={"kind", "tile"}), contents))

    def build_field(self, dimensions: int, channels: int) -> Any:
        """The field between these numbers of coordinates and channels."""
        derived: dict[str, Any] = {"dimensions": dimensions, "channels": channels}
        if self.field.weight_scale == "auto":  # not settled yet
            derived["weight_scale"] = 1.0
        if self._lacks_centroid:
            derived["spectral_centroid"] = 0.0
        return _build(FIELDS[self.field.kind], self.field, **derived)

    @property
    def _lacks_centroid(self) -> bool:
        keys = self.field
        return getattr(keys, "initialization", None) in NOISES and keys.spectral_centroid is None

    def settled(self, signal: Any, contents: Sequence[Any]) -> "EncodeJob":
        """The job with what it leaves open decided by these data.

        `field.weight_scale: auto`, see `MLP.auto_weight_scale`; the spectral centroid of initialization=winner, the
        median of theirs; `optimizer.kind: auto`, see `automatic_kind`.
        """
        keys, found = self.field, {}
        if keys.weight_scale == "auto":
            axis = samples_per_axis(signal, signal.samples(contents[0]))
            scale = FIELDS[keys.kind].auto_weight_scale(axis, keys.omega_0, keys.depth, self.fit.objective)
            found["weight_scale"] = round(scale, 3)
        if self._lacks_centroid:
            centroid = statistics.median(signal.spectral_centroid(content) for content in contents)
            found["spectral_centroid"] = round(centroid, 4)
        job = self.model_copy(update={"field": keys.model_copy(update=found)}) if found else self
        return job if self.optimizer.kind != "auto" else job._with_optimizer(signal, contents[0])

    def _with_optimizer(self, signal: Any, content: Any) -> "EncodeJob":
        available, wanted = signal.samples(content).count, self.fit.samples
        circumstances = Circumstances(
            target_db=self.fit.target if signal.quality_name.endswith("_db") else None,
            is_in_db=signal.quality_name.endswith("_db"),
            weights=self.build_field(signal.dimensions, signal.channels).layout.size,
            samples=available if wanted == "full" else min(wanted, available),
            values=available * signal.channels,
            takes_all=wanted == "full" and not signal.jittered,
            has_hidden_matrices=self.field.kind == "mlp" and self.field.depth > 1,
            dimensions=signal.dimensions,
            weight_scale=self.field.weight_scale,
            shares_init=self.field.init != "per_datum",
        )
        try:
            return self.model_validate(self.model_dump() | {"optimizer": {"kind": automatic_kind(circumstances)}})
        except ValidationError:  # of a kind that other keys of the job do not go with, such as its checks
            return self.model_validate(self.model_dump() | {"optimizer": {"kind": "adam"}})

    def build_optimizer(self, samples_per_step: int) -> Any:
        """The optimiser for steps of this many samples; of `kind: auto` before the job is settled, its name alone."""
        cls, section = _OPTIMIZERS[self.optimizer.kind], self.optimizer
        if not isinstance(section, RateSection):
            return _build(cls, section)
        rate = section.learning_rate
        if rate == "auto":
            scale = 1.0 if self.field.weight_scale == "auto" else self.field.weight_scale
            rate = cls.auto_learning_rate(self.field.width, scale, samples_per_step)
        schedule = Schedule(section.schedule, self.fit.max_steps, self.optimizer.warmup, self.fit.first_steps)
        optimizer = _build(cls, section, learning_rate=rate, schedule=schedule)
        if not isinstance(section, OptimizerSection) or (not section.weight_decay and section.clip_norm is None):
            return optimizer
        return Regularized(optimizer, section.weight_decay, section.clip_norm)

    def build_learner(self) -> Any:
        """What learns the start of field.init=learned."""
        return _build(LEARNERS[self.learning.kind], self.learning)

    @property
    def _learns_rates(self) -> bool:
        """Whether the start is learned, and with it rates of the job's optimiser, which is Adam."""
        learner = self.build_learner()
        return self.field.init == "learned" and isinstance(learner, MAML) and learner.learns_rates

    def learning_rate_and_betas(self, samples_per_step: int) -> dict[str, Any]:
        """Of Adam in the fits that a start is learned from: where gradients go through them, the job's own Adam's."""
        if not isinstance(self.build_learner(), MAML) or self.optimizer.kind != "adam":
            return {"learning_rate": self.learning_rate_of_adam(samples_per_step)}
        keys, optimizer = self.optimizer, self.build_optimizer(samples_per_step)
        return {"learning_rate": optimizer.learning_rate, "betas": (keys.beta1, keys.beta2)}

    def learning_rate_of_adam(self, samples_per_step: int) -> float:
        """The automatic rate of Adam for the job's field."""
        scale = 1.0 if self.field.weight_scale == "auto" else self.field.weight_scale
        return Adam.auto_learning_rate(self.field.width, scale, samples_per_step)

    def fingerprint(self, ids_digest: str) -> str:
        """SHA-256 of all that changes a result; workers, batch size, tracking and output do not."""
        decides = self.model_dump(
            mode="json",
            include={"dataset", "signal", "field", "learning", "optimizer", "fit", "seed"},
        )
        if self.field.init != "learned":
            decides.pop("learning")
        if self.fit.first_steps is None:
            decides["fit"].pop("first_steps")
        decides["fit"].pop("step_plan")
        if (steps := self.read_steps()) is not None:
            decides["fit"]["steps"] = step_plan.digest(steps)
        if self.fit.precision == "auto":
            decides["fit"].pop("precision")
        for name in ("batch", "step"):
            decides["fit"].pop(name)
        if self.tile is None:
            decides["signal"].pop("tile")
        decides |= {"store_dtype": self.store.dtype, "ids": ids_digest, "format": FORMAT_VERSION}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def load_job(path: str | Path, overrides: list[str] | None = None) -> EncodeJob:
    """Read a job file and apply `a.b=value` overrides.

    Raises:
        CallerError: in one message, with the accepted values, if anything is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise CallerError(f"cannot read the job file {str(path)!r}: {error.strerror or error}") from error
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CallerError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise CallerError(
            f"{path} is not a job: expected sections such as dataset and fit, got {type(settings).__name__}"
        )
    settings.setdefault("name", path.stem)
    return job_from_settings(settings, overrides or [])


def job_from_settings(settings: dict[str, Any], overrides: list[str]) -> EncodeJob:
    """A validated job from nested settings; an override of a kind replaces that section first.

    Raises:
        CallerError: in one message, with the accepted values, if anything is wrong.
    """
    settings = json.loads(json.dumps(settings, default=str))
    parsed = [_parsed(text) for text in overrides]
    for keys, value in sorted(parsed, key=lambda item: item[0][-1] != "kind"):
        _override(settings, keys, value)
    for section, kind in _DEFAULT_KIND.items():
        part = settings.setdefault(section, {})
        if isinstance(part, dict):
            part.setdefault("kind", kind)
    settings.setdefault("output", f"runs/{settings.get('name', 'encode')}")
    try:
        return EncodeJob.model_validate(settings)
    except ValidationError as error:
        raise CallerError(_all_explained(error, settings)) from error


def _parsed(text: str) -> tuple[list[str], Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise CallerError(f"cannot read the override {text!r}; write section.key=value, such as fit.max_steps=500")
    try:
        return key.strip().split("."), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise CallerError(f"the value of the override {text!r} is not valid YAML") from error


def _override(settings: dict[str, Any], keys: list[str], value: Any) -> None:
    *sections, last = keys
    part = settings
    for section in sections:
        part = part.setdefault(section, {})
        if not isinstance(part, dict):
            raise CallerError(f"cannot set {'.'.join(keys)}: {section!r} holds the value {part!r}, not a section")
    if last == "kind" and part.get("kind", _DEFAULT_KIND.get(sections[-1] if sections else "")) != value:
        part.clear()
    part[last] = value


def _all_explained(error: ValidationError, settings: dict[str, Any]) -> str:
    """A line for each wrong key; what the branches of a union type accept is joined by `or`."""
    lines: dict[str, str] = {}
    for problem in error.errors():
        where, line = _explained(problem, settings)
        if where and where in lines:
            expected = line.removeprefix(f"{where}: input should be ").rpartition(", got ")[0]
            before, got, seen = lines[where].rpartition(", got ")
            lines[where] = f"{before} or {expected}{got}{seen}"
        else:
            lines[where or line] = line
    return "\n".join(lines.values())


def _explained(problem: Any, settings: dict[str, Any]) -> tuple[str, str]:
    """Where a validation problem is, and a sentence: what was seen, what is accepted."""
    place = [str(key) for key in problem["loc"]]
    section = place[0] if place else ""
    kinds = _KINDS.get(section, {})
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found") or place[1:] == ["kind"]:
        given = settings.get(section)
        seen = given.get("kind") if isinstance(given, dict) else given
        if seen is None:
            return "", f"{section}.kind is missing; known kinds of {section}: {', '.join(sorted(kinds))}"
        return "", f"unknown {section} {seen!r}; known kinds of {section}: {', '.join(sorted(kinds))}"
    place = [key for position, key in enumerate(place) if not (position == 1 and key in kinds)]
    # Branches of a union type appear in the location as type names, such as "literal['auto']".
    where = ".".join(key for key in place if "[" not in key and key not in ("int", "float", "constrained-int"))
    if problem["type"] == "extra_forbidden":
        return "", f"unknown key {where}; accepted: {', '.join(_accepted(section if len(place) > 1 else '', settings))}"
    if problem["type"] == "missing":
        return "", f"{where} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # ours, and says what was seen
        return "", f"{where}: {message}" if where else message
    return where, f"{where}: {message[0].lower()}{message[1:]}, got {problem['input']!r}"


def _accepted(section: str, settings: dict[str, Any]) -> list[str]:
    """Keys of a section, of its kind where it has one."""
    if not section:
        return list(EncodeJob.model_fields)
    annotation = EncodeJob.model_fields[section].annotation
    models = [m for m in get_args(annotation) or (annotation,) if isinstance(m, type) and issubclass(m, BaseModel)]
    given = settings.get(section)
    kind = given.get("kind") if isinstance(given, dict) else None
    for model in models:
        if "kind" not in model.model_fields or model.model_fields["kind"].default == kind:
            return list(model.model_fields)
    return []
