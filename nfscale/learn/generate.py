"""Generators of fields, and the table of their samples.

Both kinds are flow matching on standardised differences from theta0, given the class: `pca` over principal components
with an MLP, `tokens` over a token per neuron with a transformer. Training stops by the loss on held-out rows, and what
comes out is scored by `nfscale.learn.scores`, with the same scores of reconstructions and trivial baselines beside it.
"""

import io
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from nfscale.datasets.base import ids_digest
from nfscale.errors import CallerError
from nfscale.job import EncodeJob
from nfscale.learn.flow import TokenFlow, VectorFlow, flow_loss, sample
from nfscale.learn.latents import Latents
from nfscale.learn.scores import Score, Scorer, baselines
from nfscale.learn.subject import Subject
from nfscale.learn.training import Schedule, Trained, train
from nfscale.learn.transforms import Standardizer, Tokens
from nfscale.store.run_folder import Plan, RunFolder
from nfscale.store.schema import Row, restored, stored, to_table
from nfscale.store.writer import write_run

Kind = Literal["pca", "tokens"]

GENERATOR = "generator"
"""Its name among the scores."""
MODEL = "learn/generate/model.npz"
STATISTICS = "learn/generate/statistics.npz"

_HELD_OUT_DRAWS = 8  # noises for each held-out row: the loss at random times is noisy, and stopping goes by it
_DECODED = "decoded.npz"
_SHARD_ROWS = 4096


@dataclass(frozen=True)
class Settings:
    """How a generator is made."""

    kind: Kind = "pca"
    components: int = 64
    """Of `pca`; fewer where a run has fewer weights or rows."""
    steps: int = 8_000
    batch: int = 128
    learning_rate: float = 1e-3
    guidance: float = 1.3
    """Above 1 samples are more like their class and less varied. On digits 1.3 takes label agreement from 90 to 96 %
    and the Frechet distance down by a quarter, for 5 % of recall."""
    seed: int = 0


@dataclass(frozen=True)
class Generator:
    """A trained flow and the way from its space to weights."""

    settings: Settings
    trained: Trained
    latents: Latents | None
    standardizer: Standardizer
    classes: int
    size: int

    def sample(self, ranks: Tensor, seed: int) -> Tensor:
        """Differences from theta0 of new fields of these classes: int64 [S] -> [S, P]."""
        generator = torch.Generator().manual_seed(seed)
        model, guidance = self.trained.model.eval(), self.settings.guidance if self.classes > 1 else 1.0
        parts = [
            sample(model, self.size, part, self.classes, generator, guidance=guidance) for part in ranks.split(512)
        ]
        found = torch.cat(parts)
        return self.standardizer.inverse(found) if self.latents is None else self.latents.inverse(found)

    def to_bytes(self) -> bytes:
        """Params and the way back, as npz without pickle."""
        arrays = {f"model.{name}": tensor.numpy() for name, tensor in self.trained.model.state_dict().items()}
        if self.latents is not None:
            arrays |= {"directions": self.latents.directions.numpy(), "deviation": self.latents.deviation.numpy()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()


def train_generator(
    subject: Subject,
    parts: dict[str, Tensor],
    settings: Settings,
    progress: Callable[[float], None] = lambda loss: None,
) -> Generator:
    """A flow trained on the rows of `parts["train"]`, stopped by those of `parts["validation"]`.

    Args:
        progress: told the held-out loss as training goes on.
    """
    classes = max(1, len(subject.labels))
    ranks = subject.ranks if len(subject.labels) else torch.zeros_like(subject.ranks)
    rows = subject.weights[parts["train"]]
    standardizer = Standardizer.of(rows, subject.table.layout, per="layer" if settings.kind == "pca" else "scalar")
    torch.manual_seed(settings.seed)
    latents, space = None, standardizer
    if settings.kind == "pca":
        latents = space = Latents.of(rows, standardizer, min(settings.components, min(rows.shape) - 1))
        model: nn.Module = VectorFlow(len(latents.directions), classes)
    else:
        model = TokenFlow(Tokens(subject.table.layout), classes)
    data, held = space(rows), space(subject.weights[parts["validation"]])
    data_ranks, held_ranks = ranks[parts["train"]], ranks[parts["validation"]]
    data_ranks, held_ranks = _or_any(data_ranks, classes), _or_any(held_ranks, classes)
    generator = torch.Generator().manual_seed(settings.seed)
    draws = _HELD_OUT_DRAWS if settings.kind == "pca" else 1

    def held_out(net: nn.Module) -> float:
        fixed = torch.Generator().manual_seed(1)
        losses = [flow_loss(net, held, held_ranks, classes, fixed, any_class=0.0).item() for _ in range(draws)]
        progress(float(np.mean(losses)))
        return float(np.mean(losses))

    schedule = Schedule(
        settings.steps,
        settings.batch,
        settings.learning_rate,
        average=0.999,
        evaluate_every=max(1, settings.steps // 24),
    )
    trained = train(
        model,
        lambda net, at: flow_loss(net, data[at], data_ranks[at], classes, generator),
        len(data),
        schedule,
        settings.seed,
        held_out,
    )
    return Generator(settings, trained, latents, standardizer, classes, data.shape[1])


def _or_any(ranks: Tensor, classes: int) -> Tensor:
    """Class numbers; of rows without a label, the one that stands for any class."""
    return torch.where(ranks < 0, classes, ranks)


def evenly(count: int, classes: int) -> Tensor:
    """Class numbers in turn: int64 [count]."""
    return torch.arange(count) % max(1, classes)


def scored(
    subject: Subject, parts: dict[str, Tensor], generator: Generator, samples: Tensor, ranks: Tensor, seed: int
) -> tuple[list[Score], Scorer]:
    """Scores of samples, of held-out fields as they are and out of the generator's space, and of trivial baselines.

    Held-out fields are what a perfect generator would give, out of its space what this one could give at best.

    Raises:
        CallerError: if there are no classes, or the data cannot be read or compared.
    """
    subject.require_classes()
    originals = subject.originals
    parts = {name: part[subject.ranks[part] >= 0] for name, part in parts.items()}
    data = {name: (originals[part.numpy()], subject.ranks[part]) for name, part in parts.items()}
    train_rows = subject.weights[parts["train"]]
    scorer = Scorer(data, train_rows, subject.decoded(train_rows), len(subject.labels), seed)
    held = torch.cat([parts["validation"], parts["test"]])
    sets = {GENERATOR: (samples, ranks), "reconstructions": (subject.weights[held], subject.ranks[held])}
    if (latents := generator.latents) is not None:
        name = f"through {len(latents.directions)} components"
        sets[name] = latents.inverse(latents(subject.weights[held])), subject.ranks[held]
    trivial = baselines(train_rows, subject.ranks[parts["train"]], ranks, generator.settings.components, seed)
    sets |= {name: (rows, ranks) for name, rows in trivial.items()}
    scores = [
        scorer.score(name, rows, subject.decoded(rows), of, is_baseline=name in trivial)
        for name, (rows, of) in sets.items()
    ]
    return scores, scorer


def best_baseline(scores: list[Score]) -> Score | None:
    """The trivial baseline of the smallest Frechet distance among those that do not memorise."""
    trivial = [one for one in scores if one.is_baseline and not one.memorises]
    return min(trivial, key=lambda one: one.frechet_distance, default=None)


def write_samples(subject: Subject, samples: Tensor, ranks: Tensor, place: str, settings: Settings) -> RunFolder:
    """Samples as a weights table, a run of its own: every command reads it. Its data are what the samples decode to.

    Raises:
        CallerError: if the place holds a run, or decoded data of this signal are no arrays.
    """
    folder, source = RunFolder(place), subject.table.plan
    if folder.has_plan:
        raise CallerError(f"{folder} holds a run already; remove it, or choose another place with --output")
    decoded = subject.decoded(samples)
    labels = [subject.labels.names[rank] for rank in ranks.tolist()] if len(subject.labels) else None
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"data": decoded} | ({} if labels is None else {"labels": np.array(labels)})
    np.savez(buffer, **arrays)
    folder.files.replace(_DECODED, buffer.getvalue())
    plan = _plan_of_samples(source, folder, settings, labels is not None)
    ids = EncodeJob.model_validate(plan.job).open_dataset().ids
    plan = replace(plan, data_count=len(ids), ids_sha256=ids_digest(ids))
    schema = plan.table_schema()
    weights = subject.raw(samples).numpy()
    as_read = restored(stored(weights, plan.dtype, plan.theta0), plan.dtype, plan.theta0)
    quality = _quality(subject, as_read, decoded)

    def tables():
        for start in range(0, len(ids), _SHARD_ROWS):
            places = range(start, min(start + _SHARD_ROWS, len(ids)))
            rows = [
                Row(
                    ids[at],
                    at,
                    "max_steps",
                    start // _SHARD_ROWS,
                    "sampled",
                    settings.seed,
                    label=None if labels is None else labels[at],
                    weights=weights[at],
                    quality=float(quality[at]),
                    metrics=dict(subject.metrics),
                    steps=0,
                )
                for at in places
            ]
            yield to_table(rows, schema, plan.theta0)

    write_run(folder, plan, tables())
    return folder


def _plan_of_samples(source: Plan, folder: RunFolder, settings: Settings, labelled: bool) -> Plan:
    """The plan of a run whose dataset is what the samples decode to."""
    decoded = folder.files.absolute() + "/" + _DECODED
    dataset: dict[str, Any] = {"kind": "npz", "path": decoded, "array": "data"}
    if labelled:
        dataset["labels"] = "labels"
    job = source.job | {
        "name": f"{source.job['name']}-samples",
        "dataset": dataset,
        "output": folder.files.root,
        "seed": settings.seed,
    }
    job = EncodeJob.model_validate(job).model_dump(mode="json")
    versions = source.versions | {"sampled_from": source.id, "generator": str(asdict(settings))}
    return replace(
        source,
        id=uuid.uuid4().hex,
        fingerprint=uuid.uuid4().hex * 2,
        job=job,
        shard_fields=_SHARD_ROWS,
        calibration_positions=(),
        versions=versions,
    )


def _quality(subject: Subject, weights: np.ndarray, decoded: np.ndarray) -> list[float]:
    """Of each sample against what it decodes to, as `verify` will measure it."""
    from nfscale.engine.step import evaluate, stack_samples

    signal, field = subject.table.signal, subject.table.field
    found: list[float] = []
    for start in range(0, len(weights), 64):
        part = slice(start, start + 64)
        samples = [replace(signal.samples(one), heldout=None) for one in decoded[part]]
        if len(samples) == 1:
            samples = samples * 2  # a lone field rounds differently
        rows = torch.from_numpy(weights[part]).expand(len(samples), -1)
        stacked = stack_samples(samples, torch.device("cpu"))
        found += evaluate(field, signal, rows, stacked)[1].tolist()[: len(decoded[part])]
    return found
