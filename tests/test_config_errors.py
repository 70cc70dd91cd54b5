"""Settings that cannot be: each message says in which file and where in it, what, and what else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from calib.config import Config
from calib.errors import CalibError, CalibratorError, OptionError


def refused(text: str, kind: type[CalibError] = OptionError) -> str:
    """The message about ``text``, less the file's name."""
    with pytest.raises(kind) as caught:
        Config.parse(text, "my.yaml")
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.startswith("my.yaml: ")
    assert "\n" not in message
    return message.removeprefix("my.yaml: ")


# --- messages: the file -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "is empty; 'bits: 4' would be a setting"),
        (b"# nothing\n", "is empty; 'bits: 4' would be a setting"),
        (b"bits: 4\xff", "is not UTF-8 text, see byte 7"),
        ("bits: 4".encode("utf-16"), "is not UTF-8 text, see byte 0"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "octav.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError) as caught:
        Config.read(path)
    assert str(caught.value) == f"{path}: {message}"


def test_a_directory_and_a_locked_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        Config.read(tmp_path)
    assert str(caught.value) == f"{tmp_path}: is a directory, not a file"
    locked = tmp_path / "octav.yaml"
    locked.touch(0)
    if os.access(locked, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(OptionError, match=r"cannot be read: Permission denied$"):
        Config.read(locked)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- bits\n- 4", "it must be a mapping, as 'bits: 4', got a list"),
        ("bits", "it must be a mapping, as 'bits: 4', got 'bits'"),
        ("4", "it must be a mapping, as 'bits: 4', got 4"),
        ("bits: [4", "line 1, column 9: while parsing a flow sequence: expected ',' or ']', but"),
        ("bits: 4\n  method: max", "line 2, column 9: mapping values are not allowed here"),
        ("a: b\n\tc: d", "line 2, column 1: while scanning for the next token: found character"),
        ('exclude: "conv\\d"', "line 1, column 16: while scanning a double-quoted scalar: found"),
        ("bits: 4\n---\nbits: 8", "line 2, column 1: expected a single document in the stream"),
        ("a: &x 4\nb: *x", "line 2, column 4: aliases are not read, write the value out"),
        ("<<: {bits: 4}", "unknown key '<<'; allowed are the long options"),
        ("bits: \x00", "character 0x0 at position 6 is not text"),
        ("bits: 4\nseed: 1\nbits: 5", "bits is given twice, again in line 3"),
        ("rules:\n- {match: a, match: b}", "rules[0].match is given twice, again in line 2"),
        ("feed-back: {a: b, a: c}", "feed-back.a is given twice, again in line 1"),
        ("? [a]\n: b", "it: line 1: a key must be text"),
        ("feed-back:\n  ? [a]\n  : b", "feed-back: line 2: a key must be text"),
        ("a: !!python/object/apply:os.system [ls]", "a has the tag 'tag:yaml.org,2002:python/"),
        ("!!set {a, b}", "it has the tag 'tag:yaml.org,2002:set', tags are not read"),
        ("seed: !!int four", "seed: 'four' is no int"),
        ("[" * 9999, "is nested too deeply"),
    ],
)
def test_text_that_is_no_settings_is_refused_with_its_place(text: str, message: str) -> None:
    assert refused(text).startswith(message)


# --- messages: keys and types -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bit: 4", "unknown key 'bit', did you mean 'bits'?"),
        ("weight_bits: 4", "unknown key 'weight_bits', did you mean 'weight-bits'?"),
        ("--bits: 4", "unknown key '--bits', did you mean 'bits'?"),
        (
            "zebra: 4",
            "unknown key 'zebra'; allowed are the long options of --help, without dashes",
        ),
        (
            "rules: [{match: x, bit: 3}]",
            "rules[0]: unknown key 'bit', did you mean 'bits'? allowed: match, kind, bits, method",
        ),
        (
            "rules: [{match: x}, {match: y, zebra: 3}]",
            "rules[1]: unknown key 'zebra'; allowed: match, kind, bits, method, granularity, skip",
        ),
        ("rules: [{bits: 3}]", "rules[0] needs 'match', a regular expression"),
        ("rules: {match: x}", "rules must be a list of rules, as '- {match: head, bits: 8}', got"),
        ("rules: [head]", "rules[0] must be a mapping, as '{match: head, bits: 8}', got 'head'"),
        ("rules: [{match: 3}]", "rules[0].match must be text in quotes, got 3"),
        ("rules: [{match: [a]}]", "rules[0].match must be text, got a list"),
        ("rules: [{match: a, skip: 1}]", "rules[0].skip must be true or false, got 1"),
        ("rules: [{match: a, bits: '4'}]", "rules[0].bits must be a whole number, got '4'"),
        ("bits: '4'", "bits must be a whole number, got '4'"),
        ("bits: yes", "bits must be a whole number, got 'yes'"),
        ("bits: true", "bits must be a whole number, got true"),
        ("bits: 4.0", "bits must be a whole number, got 4.0"),
        ("bits:", "bits must be a whole number, got nothing"),
        ("bits: [4]", "bits must be a whole number, got a list"),
        ("bits: {weights: 4}", "bits must be a whole number, got a mapping"),
        (f"bits: {'9' * 5000}", f"bits must be a whole number, got '{'9' * 59}..."),
        ("samples: 1_000", "samples must be a whole number, got '1_000'"),
        ("force: yes", "force must be true or false, got 'yes'"),
        ("method: 4", "method must be text in quotes, got 4"),
        ("only: true", "only must be text in quotes, got true"),
        ("percentile: 99,9", "percentile must be a number, got '99,9'"),
        ("percentile: .nan", "percentile must be a number, got '.nan'"),
        ("percentile: 1e999", "percentile must be a number, got inf"),
        ("pixel-scale: a/b", "pixel-scale must be a number or a fraction, as 1/255, got 'a/b'"),
        ("pixel-scale: 1/0", "pixel-scale must be a number or a fraction, as 1/255, got '1/0'"),
        ("pixel-scale: .inf", "pixel-scale must be a number or a fraction, as 1/255, got '.inf'"),
        ("pixel-scale: inf", "pixel-scale must be a number or a fraction, as 1/255, got 'inf'"),
        ("pixel-scale: 2/1e-999", "pixel-scale must be a number or a fraction"),
        ("pixel-scale: [1]", "pixel-scale must be a number, got a list"),
        ("mean: red", "mean must be a number or a fraction, as 1/255, got 'red'"),
        ("mean: [1, red]", "mean[1] must be a number or a fraction, as 1/255, got 'red'"),
        ("std: []", "std must be a number or several, got none"),
        ("std: {r: 1}", "std must be a number, got a mapping"),
        ("crop: 0.875", "crop must be a size, as 224, 240x320 or 87.5%, got 0.875"),
        ("resize: [1, 2]", "resize must be a size, as 224, 240x320 or 87.5%, got a list"),
        ("op-types: []", "op-types must be a list of names, got a list"),
        ("op-types: {Conv: 1}", "op-types must be a list of names, got a mapping"),
        ("op-types: [1]", "op-types[0] must be text in quotes, got 1"),
        ("model: 4", "model must be a path, got 4"),
        ("model: ''", "model must be a path, got ''"),
        ('output: "a\\0b"', "output must be a path, got 'a\\x00b'"),
        ("data: [a, b]", "data must be a path, got a list"),
        ("custom-ops: [a.so, 4]", "custom-ops[1] must be a path, got 4"),
        ("feed-back: [a]", "feed-back must be a mapping, as '{input: output}', got a list"),
        ("feed-back: {a: 1}", "feed-back.a must be text in quotes, got 1"),
    ],
)
def test_a_wrong_key_or_type_is_refused_with_its_path(text: str, message: str) -> None:
    found = refused(text)
    assert found == message or (len(message) > 30 and found.startswith(message))


# --- messages: values -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits: 9", "bits must be one of 2 to 8 or 16, got 9"),
        ("weight-bits: 1", "weight-bits must be one of 2 to 8 or 16, got 1"),
        ("samples: 9\nedge-bits: 0", "edge-bits must be one of 2 to 8 or 16, got 0"),
        ("samples: 0", "samples must be at least 1, got 0"),
        ("batch-size: 0", "batch-size must be at least 1, got 0"),
        ("seed: -1", "seed must not be negative, got -1"),
        ("threads: 9999", "threads must be 0 to 1024, got 9999"),
        ("max-memory: 0", "max-memory must be at least 1, got 0"),
        ("workers: 0", "workers must be at least 1, got 0"),
        ("external-data: maybe", "external-data must be auto, always, never, got 'maybe'"),
        ("reduce: median", "reduce must be pool or mean, got 'median'"),
        ("reduce: mean\nmean-batches: 0", "mean-batches must be at least 1, got 0"),
        ("mean-batches: 3", "mean-batches belongs to reduce mean, reduce is 'pool'"),
        ("weight-granularity: row", "weight-granularity must be per-channel or per-tensor, got"),
        ("only: '*'", "only: '*' is no regular expression: nothing to repeat at position 0"),
        ("op-types: LSTM", "op-types: 'LSTM' is not supported, only Conv, ConvTranspose, Gemm"),
        ("method: percentile\npercentile: 0.9", "percentile must be above 1 and at most 100, got"),
        ("method: percentile:0.9", "method: percentile must be above 1 and at most 100, got 0.9"),
        ("seed: 1\nweight-method: mse:x", "weight-method: mse:x: points must be a whole number"),
        ("percentile: 99", "percentile belongs to method percentile, the method is 'octav'"),
        ("method: mse\npercentile: 99", "percentile belongs to method percentile, the method is"),
        ("quiet: true\nverbose: true", "quiet and verbose contradict each other"),
        ("rules: [{match: a}, {match: b, bits: 9}]", "rules[1].bits must be one of 2 to 8 or 16"),
        ("rules: [{match: '('}]", "rules[0].match: '(' is no regular expression: missing ),"),
        ("rules: [{match: a, kind: bias}]", "rules[0].kind must be weight or activation, got"),
        ("rules: [{match: a, granularity: row}]", "rules[0].granularity must be per-channel or"),
        ("rules: [{match: a, method: mse:x}]", "rules[0].method: mse:x: points must be a whole"),
        ("rules: [{match: a, skip: true, bits: 4}]", "rules[0].skip keeps tensors float, bits"),
    ],
)
def test_a_value_that_the_settings_refuse_is_refused_with_its_path(text: str, message: str) -> None:
    assert refused(text).startswith(message)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("method: octave", "method"),
        ("method: percentile\npercentile: 99\nweight-method: octave", "weight-method"),
        ("rules: [{match: a, method: octave}]", "rules[0].method"),
    ],
)
def test_an_unknown_method_is_refused_with_its_path(text: str, path: str) -> None:
    message = refused(text, CalibratorError)
    assert message.startswith(f"{path}: No calibrator named 'octave'. Did you mean 'octav'?")


def test_two_settings_that_contradict_each_other_are_refused_by_both_names() -> None:
    message = refused("observations: a.npz\nsave-observations: b.npz")
    assert "observations and " in message
    assert "contradict" in message


def test_workers_are_started_here_or_those_of_a_scheduler() -> None:
    message = refused("workers: 2\nscheduler: tcp://there:8786")
    assert message == (
        "workers and scheduler contradict each other: start workers here, or use others"
    )
