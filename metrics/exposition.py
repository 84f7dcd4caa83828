"""What a scrape shows, as a value: every engine's EngineStats read through the table of series. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from metrics.engine import REJECTION_REASONS, EngineStats
from metrics.histogram import Histogram
from metrics.series import SERIES, Kind, Series, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One value under the label values of its family."""

    labels: tuple[str, ...] = ()
    value: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Series of one name.

    Attributes:
        name: without prefix; a counter's without `_total`, which the exposition appends.
        kind: what its values mean; a histogram's values are `Histogram`, the others' numbers.
        help: one sentence for people.
        label_names: its labels, in the order of the samples' label values.
        samples: one per combination of label values.

    Raises:
        ValueError: a label twice, or a sample has the wrong number of labels or the wrong type of value.
    """

    name: str
    kind: Kind
    help: str
    label_names: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.label_names)) != len(self.label_names):
            raise ValueError(f"{self.name}: a label twice in {self.label_names}")
        for sample in self.samples:
            if len(sample.labels) != len(self.label_names):
                raise ValueError(f"{self.name}: labels {sample.labels} do not fit {self.label_names}")
            if isinstance(sample.value, Histogram) != (self.kind == "histogram"):
                raise ValueError(f"{self.name}: a {self.kind} cannot show {type(sample.value).__name__}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSeries:
    """What one engine shows.

    Attributes:
        engine: the label value, vLLM's data-parallel rank as text.
        stats: the snapshot.
        cache_config: labels of `cache_config_info`; every value is shown as text.
        extra: more families, to which the labels model_name and engine are put in front.
    """

    engine: str = "0"
    stats: EngineStats
    cache_config: Mapping[str, object] = field(default_factory=dict)
    extra: tuple[Family, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposition:
    """All that one scrape shows: an immutable snapshot.

    Attributes:
        model_name: the first served name.
        engines: at least one, with distinct labels.

    Raises:
        ValueError: there is no engine, or two have the same label.
    """

    model_name: str
    engines: tuple[EngineSeries, ...]

    def __post_init__(self) -> None:
        labels = [engine.engine for engine in self.engines]
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(f"needs engines with distinct labels, got {labels}")


def families(exposition: Exposition) -> tuple[Family, ...]:
    """Every family of a scrape, names without prefix: the table, rejections, the cache, then the extras.

    Raises:
        ValueError: an extra family has a name of the table, or engines disagree about an extra one.
    """
    core = (
        *(_read(series, exposition) for series in SERIES),
        _rejections(exposition),
        *_cache_config(exposition),
    )
    extra = _extras(exposition)
    taken = {family.name for family in core}
    clash = sorted(name for name in extra if name in taken or name.removesuffix("_total") in taken)
    if clash:
        raise ValueError(f"extra families with a name of the table: {clash}")
    return (*core, *extra.values())


def _read(series: Series, exposition: Exposition) -> Family:
    samples: list[Sample] = []
    for engine in exposition.engines:
        labels = (exposition.model_name, engine.engine)
        value = series.read(engine.stats)
        if isinstance(value, tuple):
            samples += [Sample(labels=(*labels, label), value=part) for label, part in value]
        else:
            samples.append(Sample(labels=labels, value=value))
    third = () if series.label is None else (series.label,)
    return Family(
        name=series.name,
        kind=series.kind,
        help=series.help,
        label_names=("model_name", "engine", *third),
        samples=tuple(samples),
    )


def _rejections(exposition: Exposition) -> Family:
    """One queue stands before all engines, so this family has no engine label (as in vLLM)."""
    totals = {
        reason: sum(engine.stats.rejections.get(reason) for engine in exposition.engines)
        for reason in REJECTION_REASONS
    }
    return Family(
        name="admission_rejections",
        kind="counter",
        help="Requests refused because the queue was full, by the bound that was met.",
        label_names=("model_name", "reason"),
        samples=tuple(
            Sample(labels=(exposition.model_name, reason), value=total) for reason, total in totals.items()
        ),
    )


def _cache_config(exposition: Exposition) -> tuple[Family, ...]:
    """The configuration of the cache as labels of a constant 1; none where no engine gives one."""
    names: dict[str, None] = {}
    for engine in exposition.engines:
        names |= dict.fromkeys(engine.cache_config)
    if not names:
        return ()
    samples = tuple(
        Sample(labels=(engine.engine, *(str(engine.cache_config.get(name)) for name in names)), value=1)
        for engine in exposition.engines
    )
    return (
        Family(
            name="cache_config_info",
            kind="gauge",
            help="The configuration of the KV cache, in the labels.",
            label_names=("engine", *names),
            samples=samples,
        ),
    )


def _extras(exposition: Exposition) -> dict[str, Family]:
    """The engines' extra families by name, one family per name with the samples of every engine."""
    merged: dict[str, Family] = {}
    for engine in exposition.engines:
        labels = (exposition.model_name, engine.engine)
        for extra in engine.extra:
            known = merged.get(extra.name)
            family = Family(
                name=extra.name,
                kind=extra.kind,
                help=extra.help,
                label_names=("model_name", "engine", *extra.label_names),
                samples=(
                    *(known.samples if known else ()),
                    *(Sample(labels=(*labels, *each.labels), value=each.value) for each in extra.samples),
                ),
            )
            if known and (known.kind, known.label_names) != (family.kind, family.label_names):
                raise ValueError(f"engines disagree about the family {extra.name}")
            merged[extra.name] = family
    return merged
