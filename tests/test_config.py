"""Settings: what is read from YAML, what is laid over it, and that nothing gets lost."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from calib.bounds import Bounds
from calib.config import Config
from calib.errors import OptionError
from calib.images import Preprocessing
from calib.rules import Reduction, Rules, Selection, TensorRule, Widths
from calib.run import Run

ALL = """
model: model.onnx
data: calib.npz
labels: labels.csv
resize: 256
crop: 87.5%
color: rgb
pixel-scale: 1/255
mean: [0.485, 0.456, 0.406]
std: 0.5
layout: nchw
samples: 320
batch-size: 16
seed: 7
feed-back: {conv_cache: conv_cache_out, "1": two}
padding-mask: mask
target: openvino
reduce-range: true
bits: 8
weight-bits: 4
activation-bits: 6
edge-bits: 16
method: percentile
weight-method: mse:10
percentile: 99.9
weight-granularity: per-tensor
activations: asymmetric
reduce: mean
bias-correction: true
equalize: true
mean-batches: 3
only: Conv
exclude: head
op-types: [Conv, Gemm]
save-observations: seen.npz
min-sqnr: 20
min-cosine: 0.99
max-error: 0.5
min-agreement: 0.98
max-top1-drop: 1
max-metric-drop: 0.1
max-size-ratio: 0.3
metric: package.module:f1
keep-failed: true
output: out.onnx
report: out.html
summary: out.json
external-data: always
force: true
dry-run: true
max-memory: 1.5GiB
workers: 2
provider: CPUExecutionProvider
threads: 2
custom-ops: libops.so
quiet: true
rules:
  - {match: conv1, bits: 8, method: max}
  - match: layer\\d
    kind: weight
    granularity: per-channel
  - {match: "head", skip: true}
"""


# --- what is read -----------------------------------------------------------------------------


def test_every_setting_is_read_in_its_type() -> None:
    config = Config.parse(ALL)
    assert config == Config(
        model=Path("model.onnx"),
        data="calib.npz",
        labels=Path("labels.csv"),
        resize="256",
        crop="87.5%",
        color="rgb",
        pixel_scale=1 / 255,
        mean=(0.485, 0.456, 0.406),
        std=(0.5,),
        layout="nchw",
        samples=320,
        batch_size=16,
        seed=7,
        feed_back={"conv_cache": "conv_cache_out", "1": "two"},
        padding_mask="mask",
        target="openvino",
        reduce_range=True,
        bits=8,
        weight_bits=4,
        activation_bits=6,
        edge_bits=16,
        method="percentile",
        weight_method="mse:10",
        percentile=99.9,
        weight_granularity="per-tensor",
        activations="asymmetric",
        reduce="mean",
        bias_correction=True,
        equalize=True,
        mean_batches=3,
        only="Conv",
        exclude="head",
        op_types=("Conv", "Gemm"),
        save_observations=Path("seen.npz"),
        min_sqnr=20.0,
        min_cosine=0.99,
        max_error=0.5,
        min_agreement=0.98,
        max_top1_drop=1.0,
        max_metric_drop=0.1,
        max_size_ratio=0.3,
        metric="package.module:f1",
        keep_failed=True,
        output=Path("out.onnx"),
        report=Path("out.html"),
        summary=Path("out.json"),
        external_data="always",
        force=True,
        dry_run=True,
        max_memory=3 << 29,
        workers=2,
        provider="CPUExecutionProvider",
        threads=2,
        custom_ops=(Path("libops.so"),),
        quiet=True,
        rules=(
            TensorRule("conv1", bits=8, method="max"),
            TensorRule(r"layer\d", "weight", granularity="per-channel"),
            TensorRule("head", skip=True),
        ),
    )
    unread = {
        "observations",
        "verbose",
        "scheduler",
        "block_size",
        "weight_format",
    }  # contradict others
    default = Config()
    for f in fields(Config):
        same = getattr(config, f.name) == getattr(default, f.name)
        assert same == (f.name in unread | {"bits"}), f.name


def test_every_setting_reaches_the_rules_and_the_run() -> None:
    config = Config.parse(ALL)
    assert config.to_rules() == Rules(
        widths=Widths(4, 6, 16),
        method="percentile:99.9",
        weight_method="mse:10",
        weight_granularity="per-tensor",
        activations="asymmetric",
        reduction=Reduction("mean", 3),
        selection=Selection("Conv", "head", ("Conv", "Gemm")),
        overrides=config.rules,
        target="openvino",
        reduce_range=True,
        bias_correction=True,
        equalize=True,
    )
    run = config.to_run()
    assert (run.samples, run.reading.batch_size, run.reading.seed) == (320, 16, 7)
    assert run.reading.labels == Path("labels.csv")
    assert run.reading.images == Preprocessing(
        resize="256",
        crop="87.5%",
        color="rgb",
        pixel_scale=1 / 255,
        mean=(0.485, 0.456, 0.406),
        std=(0.5,),
        layout="nchw",
    )
    runtime = run.runtime
    assert (runtime.provider, runtime.threads) == ("CPUExecutionProvider", 2)
    assert runtime.custom_ops == (Path("libops.so"),)
    assert run.feedback == {"conv_cache": "conv_cache_out", "1": "two"}
    assert (run.padding_mask, run.external_data, run.force) == ("mask", "always", True)
    assert run.bounds == Bounds(
        min_sqnr=20,
        min_cosine=0.99,
        max_error=0.5,
        min_agreement=0.98,
        max_top1_drop=1,
        max_metric_drop=0.1,
        max_size_ratio=0.3,
    )
    assert (run.metric, run.keep_failed, run.report) == (
        "package.module:f1",
        True,
        Path("out.html"),
    )
    assert (run.save_observations, run.summary) == (Path("seen.npz"), Path("out.json"))
    assert (run.max_memory, run.workers, run.scheduler) == (3 << 29, 2, None)
    assert Config(scheduler="tcp://there:1").to_run().scheduler == "tcp://there:1"
    assert Config(observations=Path("o.npz")).to_run().observations == Path("o.npz")


def test_the_defaults_are_those_of_the_library() -> None:
    assert Config().to_rules() == Rules()
    assert Config().to_run() == Run()
    assert Config(reduce="mean").to_rules().reduction == Reduction("mean")


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ({}, (8, 8)),
        ({"bits": 4}, (4, 4)),
        ({"bits": 4, "weight_bits": 3}, (3, 4)),
        ({"activation_bits": 16}, (8, 16)),
    ],
)
def test_bits_are_those_of_what_has_none_of_its_own(
    bits: dict[str, Any], expected: tuple[int, int]
) -> None:
    widths = Config(**bits).to_rules().widths
    assert (widths.weights, widths.activations) == expected


@pytest.mark.parametrize(
    ("settings", "methods"),
    [
        ({"method": "percentile", "weight_method": "percentile"}, ("percentile:99.0",) * 2),
        ({"weight_method": "percentile"}, ("octav", "percentile:99.0")),
        ({"method": "percentile", "weight_method": "max"}, ("percentile:99.0", "max")),
    ],
)
def test_percentile_reaches_every_method_that_takes_it(
    settings: dict[str, Any], methods: tuple[str, str]
) -> None:
    rules = Config(percentile=99.0, **settings).to_rules()
    assert (rules.method_for("activation"), rules.method_for("weight")) == methods


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1/255", (1 / 255,)),
        ("[1/255, 0.5, 2]", (1 / 255, 0.5, 2.0)),
        ("0.485, 0.456,1", (0.485, 0.456, 1.0)),
        ("1e-3", (0.001,)),
        ("5.e-1", (0.5,)),
        (".5", (0.5,)),
        ("0", (0.0,)),
        ("[-1]", (-1.0,)),
        ("-1.5/2", (-0.75,)),
    ],
)
def test_numbers_may_be_fractions_single_or_several(text: str, value: tuple[float, ...]) -> None:
    assert Config.parse(f"mean: {text}").mean == value
    assert Config().over({"mean": text.strip("[]")}).mean == value


def test_names_may_stand_in_a_list_or_between_commas() -> None:
    for text in ("[Conv, Gemm]", "Conv, Gemm", "Conv,Gemm"):
        assert Config.parse(f"op-types: {text}").op_types == ("Conv", "Gemm")


def test_words_that_other_yaml_readers_take_for_something_else_stay_words() -> None:
    config = Config.parse("only: no\nexclude: 1:30\nprovider: on\noutput: 2024-01-01\nresize: 010")
    assert (config.only, config.exclude, config.provider) == ("no", "1:30", "on")
    assert (config.output, config.resize) == (Path("2024-01-01"), "010")


def test_a_byte_order_mark_and_comments_are_no_content(tmp_path: Path) -> None:
    path = tmp_path / "octav.yaml"
    path.write_bytes("\ufeff# größe\nbits: 4  # four\n".encode())
    assert Config.read(path) == Config(bits=4)


# --- paths ------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/octav.yaml").write_text(
        "model: m.onnx\ndata: ../d.npz\nlabels: l.csv\noutput: o.onnx\nsummary: s.json\n"
        "observations: b.npz\ncustom-ops: [a.so, /opt/b.so]\n"
    )
    monkeypatch.chdir(tmp_path)
    config, folder = Config.read("sub/octav.yaml"), Path("sub")
    assert config.model == folder / "m.onnx"
    assert config.data == str(folder / "../d.npz")
    assert config.labels == folder / "l.csv"
    assert (config.output, config.summary) == (folder / "o.onnx", folder / "s.json")
    assert config.observations == folder / "b.npz"
    assert config.custom_ops == (folder / "a.so", Path("/opt/b.so"))
    assert Config.read(tmp_path / "sub/octav.yaml").model == tmp_path / "sub/m.onnx"
    laid_over = config.over({"model": Path("m.onnx"), "data": "d.npz", "custom_ops": ("c.so",)})
    assert (laid_over.model, laid_over.data) == (Path("m.onnx"), "d.npz")
    assert laid_over.custom_ops == (Path("c.so"),)


def test_a_function_is_relative_to_nothing_unless_a_file_has_its_name(tmp_path: Path) -> None:
    text = "data: package.module:function"
    config = Config.parse(text, folder=tmp_path)
    assert (config.data, config.read_paths()) == ("package.module:function", ())
    if os.name != "nt":
        (tmp_path / "package.module:function").touch()
        config = Config.parse(text, folder=tmp_path)
        assert config.read_paths() == (tmp_path / "package.module:function",)


def test_what_is_read_is_known_before_it_is_read() -> None:
    config = Config(
        model=Path("m"), data="d", labels=Path("l"), observations=Path("o"), output=Path("x")
    )
    assert config.read_paths() == (Path("d"), Path("l"), Path("o"))
    assert Config(custom_ops=(Path("a"), Path("b"))).read_paths() == (Path("a"), Path("b"))
    assert Config().read_paths() == ()


# --- the command line wins --------------------------------------------------------------------


def test_what_is_laid_over_wins_and_the_rest_stays() -> None:
    config = Config.parse(ALL)
    given = {"edge_bits": 3, "weight_method": "max", "output": Path("b.onnx"), "seed": 0}
    over = config.over(given)
    for f in fields(Config):
        assert getattr(over, f.name) == given.get(f.name, getattr(config, f.name)), f.name
    assert config.over({}) == config


def test_a_switch_can_be_laid_over_both_ways() -> None:
    on = Config(force=True, dry_run=True, quiet=True)
    assert on.over({"force": False, "dry_run": False, "quiet": False}) == Config()
    assert Config().over({"force": True}).force


def test_bits_and_method_laid_over_are_those_of_weights_and_activations_alike() -> None:
    config = Config.parse("weight-bits: 4\nactivation-bits: 6\nedge-bits: 7\nweight-method: mse")
    assert config.over({"bits": 3}) == Config(bits=3, edge_bits=7, weight_method="mse")
    some = config.over({"bits": 3, "weight_bits": 2, "method": "max"})
    assert some == Config(bits=3, weight_bits=2, edge_bits=7, method="max")
    both = config.over({"method": "max", "weight_method": "octav"})
    assert (both.method, both.weight_method, both.weight_bits) == ("max", "octav", 4)
    rules = Config.parse("rules: [{match: a, bits: 4, method: max}]")
    assert rules.over({"bits": 3, "method": "mse"}).rules == rules.rules


def test_what_belongs_to_an_overruled_setting_goes_with_it() -> None:
    mean = Config.parse("reduce: mean\nmean-batches: 9")
    assert mean.over({"reduce": "pool"}) == Config()
    assert mean.over({"bits": 8}) == mean
    percentile = Config.parse("method: percentile\npercentile: 99.9")
    assert percentile.over({"method": "max"}) == Config(method="max")
    weights = Config.parse("weight-method: percentile\npercentile: 99.9")
    assert weights.over({"method": "max"}) == Config(method="max")
    assert weights.over({"bits": 8}) == weights
    assert percentile.over({"weight_method": "max"}).percentile == 99.9
    assert Config(quiet=True).over({"verbose": True}) == Config(verbose=True)
    assert Config(verbose=True).over({"quiet": True}) == Config(quiet=True)
    elsewhere = Config(scheduler="tcp://there:8786")
    assert elsewhere.over({"workers": 2}) == Config(workers=2)
    assert Config(workers=2).over({"scheduler": "tcp://there:8786"}) == elsewhere


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 9}, "--bits must be one of 2 to 8 or 16, got 9"),
        ({"mean_batches": 3}, "--mean-batches belongs to reduce mean, reduce is 'pool'"),
        ({"reduce": "pool", "mean_batches": 3}, "--mean-batches belongs to reduce mean, reduce is"),
        ({"percentile": 99.0}, "--percentile belongs to method percentile, the method is 'octav'"),
        ({"quiet": True, "verbose": True}, "--quiet and verbose contradict each other"),
        ({"method": "percentile:0.9"}, "--method: percentile must be above 1 and at most 100"),
        ({"pixel_scale": "1/x"}, "--pixel-scale must be a number or a fraction, as 1/255, got"),
        ({"mean": "1,x"}, "--mean[1] must be a number or a fraction, as 1/255, got 'x'"),
        ({"exclude": "("}, "--exclude: '(' is no regular expression: missing ), unterminated"),
    ],
)
def test_a_message_about_the_command_line_begins_with_the_option(
    given: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=f"^{re.escape(message)}"):
        Config().over(given)


def test_a_contradiction_within_the_command_line_is_refused() -> None:
    both = {"observations": "b.npz", "save_observations": "a.npz"}
    with pytest.raises(OptionError, match=r"observations and .*save-observations contradict"):
        Config.parse("bits: 4").over(both)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("4000000000", 4_000_000_000),
        ("'4000000000'", 4_000_000_000),
        ("300B", 300),
        ("512MB", 512_000_000),
        ("3GB", 3_000_000_000),
        ("3 gb", 3_000_000_000),
        ("2G", 2_000_000_000),
        ("1.5GiB", 3 << 29),
        ("0.1kB", 100),
        ("1TiB", 1 << 40),
    ],
)
def test_memory_is_a_number_of_bytes_or_has_a_unit(text: str, n_bytes: int) -> None:
    config = Config.parse(f"max-memory: {text}")
    assert config.max_memory == n_bytes
    assert Config.parse(config.to_yaml()) == config


@pytest.mark.parametrize("text", ["true", "1.5", "much", "-3GB", "3XB", "1e9", "[3GB]", "'3GB 4'"])
def test_memory_in_another_form_is_refused(text: str) -> None:
    message = r"^y: max-memory must be a size, as 3GB, 512MB, 1\.5GiB or 4000000000, got "
    with pytest.raises(OptionError, match=message):
        Config.parse(f"max-memory: {text}", "y")
