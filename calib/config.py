"""All settings of a job in one place: their defaults, their reading from YAML, their checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from calib.bounds import Bounds
from calib.capture import Runtime
from calib.data import Reading
from calib.errors import CalibError, OptionError
from calib.images import Preprocessing
from calib.prepare import QUANTIZABLE_OPS
from calib.qtypes import check_width
from calib.readers import Bits, Origin, expected, is_function, width_of
from calib.rules import Reduction, Rules, Selection, TensorRule, Widths
from calib.run import Run
from calib.settings import first_word, key_of, plain, read_fields
from calib.yaml_text import dump, load

_MEAN_BATCHES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every option of ``octav-calibrate``, by its name there, and ``rules``.

    None is what the option's absence means; ``octav-calibrate --help`` explains them all.

    Raises:
        CalibError: one of its kinds, for a setting that is unknown or out of bounds, or two that
            contradict each other; the message begins with the setting's name.
    """

    model: Path | None = None
    data: str | None = None
    labels: Path | None = None
    resize: str | None = None
    crop: str | None = None
    color: str | None = None
    pixel_scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: str | None = None
    samples: int | None = None
    batch_size: int = 32
    seed: int = 0
    feed_back: Mapping[str, str] = field(default_factory=dict)
    padding_mask: str | None = None
    target: str = "generic"
    reduce_range: bool = False
    bits: int = 8
    weight_bits: int | None = None
    activation_bits: Bits | None = None
    edge_bits: int | None = None
    method: str = "octav"
    weight_method: str | None = None
    percentile: float | None = None
    weight_granularity: str = "per-channel"
    activations: str = "symmetric"
    block_size: int | None = None
    weight_format: str | None = None
    reduce: str = "pool"
    mean_batches: int | None = None
    bias_correction: bool = False
    equalize: bool = False
    only: str | None = None
    exclude: str | None = None
    op_types: tuple[str, ...] | None = None
    save_observations: Path | None = None
    observations: Path | None = None
    min_sqnr: float | None = None
    min_cosine: float | None = None
    max_error: float | None = None
    min_agreement: float | None = None
    max_top1_drop: float | None = None
    max_metric_drop: float | None = None
    max_size_ratio: float | None = None
    metric: str | None = None
    keep_failed: bool = False
    output: Path | None = None
    report: Path | None = None
    summary: Path | None = None
    external_data: str = "auto"
    force: bool = False
    dry_run: bool = False
    max_memory: int | None = None
    workers: int | None = None
    scheduler: str | None = None
    provider: str | None = None
    threads: int = 0
    custom_ops: tuple[Path, ...] = ()
    quiet: bool = False
    verbose: bool = False
    rules: tuple[TensorRule, ...] = ()

    def __post_init__(self) -> None:
        if self.reduce == "mean" and self.mean_batches is None:
            object.__setattr__(self, "mean_batches", _MEAN_BATCHES)
        if self.reduce != "mean" and self.mean_batches is not None:
            raise OptionError(f"mean-batches belongs to reduce mean, reduce is {self.reduce!r}")
        methods = (self.method, self.weight_method, *(rule.method for rule in self.rules))
        if self.percentile is not None and "percentile" not in methods:
            raise OptionError(
                f"percentile belongs to method percentile, the method is {self.method!r}"
            )
        if self.metric is not None and not is_function(self.metric):
            raise OptionError(f"metric must be package.module:function, got {self.metric!r}")
        if self.quiet and self.verbose:
            raise OptionError("quiet and verbose contradict each other")
        self.to_rules()
        self.to_run()

    @classmethod
    def read(cls, path: str | Path) -> Config:
        """What a YAML file says; the paths in it are relative to its folder.

        Raises:
            CalibError: as `parse`, or if the file cannot be read.
        """
        path = Path(path)
        try:
            text = path.read_bytes().decode("utf-8")
        except FileNotFoundError:
            raise OptionError(f"{path}: no such file") from None
        except UnicodeDecodeError as error:
            raise OptionError(f"{path}: is not UTF-8 text, see byte {error.start}") from None
        except OSError as error:
            if path.is_dir():
                raise OptionError(f"{path}: is a directory, not a file") from None
            raise OptionError(f"{path}: cannot be read: {error.strerror}") from None
        return cls.parse(text, str(path), path.parent)

    @classmethod
    def parse(cls, text: str, source: str = "octav.yaml", folder: Path = Path()) -> Config:
        """What YAML text says: the command line's long options without the dashes, and ``rules``.

        Args:
            text: one mapping.
            source: what messages call it.
            folder: what paths in it are relative to.

        Raises:
            CalibError: one of its kinds; the message names ``source`` and the place in it.
        """
        values = load(text, source)
        if values is None:
            raise OptionError(f"{source}: is empty; 'bits: 4' would be a setting")
        if not isinstance(values, dict):
            raise OptionError(expected(f"{source}: it", "a mapping, as 'bits: 4'", values))
        origin = Origin(f"{source}: ", folder)
        read = read_fields(cls, values, origin)
        try:
            return cls(**read)
        except CalibError as error:
            raise _blamed(error, read, origin, source) from None

    def over(self, given: Mapping[str, object]) -> Config:
        """These settings with those of the command line, which win, laid over them.

        What belongs to a setting that is overruled goes with it: with ``--reduce pool`` the file's
        ``mean-batches``, with ``--bits`` its ``weight-bits``. Rules stay.

        Args:
            given: values by the names of this class's fields.

        Raises:
            CalibError: as the class; the message begins with the option.
        """
        origin = Origin("--", Path())
        read = read_fields(Config, {key_of(name): value for name, value in given.items()}, origin)
        try:
            return replace(self, **(self._overruled(read) | read))
        except CalibError as error:
            raise _blamed(error, read, origin, "") from None

    def _overruled(self, given: Mapping[str, object]) -> dict[str, Any]:
        """What of these settings does not hold any more beside ``given``."""
        dropped: dict[str, Any] = {}
        if given.get("reduce", self.reduce) != "mean":
            dropped["mean_batches"] = None
        if "bits" in given:
            kept = self.activation_bits if self.activation_bits == "none" else None
            dropped.update(weight_bits=None, activation_bits=kept)
        if "method" in given:
            dropped["weight_method"] = None
        now = {"method": self.method, "weight_method": self.weight_method, **dropped, **given}
        rules = (rule.method for rule in self.rules)
        if "percentile" not in (now["method"], now["weight_method"], *rules):
            dropped["percentile"] = None
        for name, other in (("quiet", "verbose"), ("verbose", "quiet")):
            if given.get(name):
                dropped[other] = False
        for one, two in (("observations", "save_observations"), ("workers", "scheduler")):
            for name, other in ((one, two), (two, one)):
                if given.get(name):
                    dropped[other] = None
        return dropped

    def read_paths(self) -> tuple[Path, ...]:
        """The files and folders that are read besides the model."""
        data = () if self.data is None or is_function(self.data) else (Path(self.data),)
        others = (path for path in (self.labels, self.observations) if path is not None)
        return (*data, *others, *self.custom_ops)

    def to_yaml(self) -> str:
        """All that is set, as `parse` reads it back to the same; paths as they are."""
        return dump(
            {
                key_of(f.name): plain(getattr(self, f.name))
                for f in fields(self)
                if getattr(self, f.name) not in (None, (), {})
            }
        )

    def to_rules(self) -> Rules:
        """What is quantized, how wide, and by which calibrator."""
        check_width(self.bits, "bits")
        return Rules(
            widths=Widths(
                weights=self.bits if self.weight_bits is None else self.weight_bits,
                activations=width_of(self.activation_bits, self.bits),
                edge=self.edge_bits,
            ),
            method=self._with_percentile(self.method),
            weight_method=self.weight_method and self._with_percentile(self.weight_method),
            weight_granularity=self.weight_granularity,
            activations=self.activations,
            block_size=self.block_size,
            weight_format=self.weight_format,
            reduction=Reduction(
                self.reduce, _MEAN_BATCHES if self.mean_batches is None else self.mean_batches
            ),
            selection=Selection(
                only=self.only,
                exclude=self.exclude,
                op_types=QUANTIZABLE_OPS if self.op_types is None else self.op_types,
            ),
            overrides=tuple(
                replace(rule, method=rule.method and self._with_percentile(rule.method))
                for rule in self.rules
            ),
            target=self.target,
            reduce_range=self.reduce_range,
            bias_correction=self.bias_correction,
            equalize=self.equalize,
        )

    def to_bounds(self) -> Bounds:
        """What the quantized model must keep."""
        return Bounds(**{f.name: getattr(self, f.name) for f in fields(Bounds)})

    def to_run(self) -> Run:
        """How the calibration is carried out: data, runtime, files."""
        return Run(
            samples=self.samples,
            reading=Reading(
                batch_size=self.batch_size,
                seed=self.seed,
                labels=self.labels,
                images=Preprocessing(
                    resize=self.resize,
                    crop=self.crop,
                    color=self.color,
                    pixel_scale=self.pixel_scale,
                    mean=self.mean,
                    std=self.std,
                    layout=self.layout,
                ),
            ),
            runtime=Runtime(self.provider, self.threads, self.custom_ops),
            observations=self.observations,
            save_observations=self.save_observations,
            summary=self.summary,
            external_data=self.external_data,
            feedback=self.feed_back,
            padding_mask=self.padding_mask,
            bounds=self.to_bounds(),
            keep_failed=self.keep_failed,
            metric=self.metric,
            report=self.report,
            force=self.force,
            max_memory=self.max_memory,
            workers=self.workers,
            scheduler=self.scheduler,
        )

    def _with_percentile(self, method: str) -> str:
        takes_it = self.percentile is not None and method == "percentile"
        return f"percentile:{self.percentile}" if takes_it else method


def _blamed(error: CalibError, given: Mapping[str, Any], origin: Origin, source: str) -> CalibError:
    """``error`` with the place of the setting that is to blame, if it is one alone."""
    if first_word(error) in map(key_of, given):
        return type(error)(f"{origin.prefix}{error}")
    for name, value in given.items():
        try:
            Config(**{name: value})
        except CalibError as again:
            if str(again) == str(error):
                return type(error)(f"{origin.prefix}{key_of(name)}: {error}")
    return type(error)(f"{source}: {error}" if source else str(error))
