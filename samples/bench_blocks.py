"""Measure 4-bit weights in blocks on a transformer: size, error, perplexity and speed.

    python samples/bench_blocks.py [gpt.onnx] [--json blocks.json] [--bert]

`python samples/transformer.py gpt.onnx` makes the model; without one, it is trained first. Every
row is written by calibrate_model, without data, activations float. Beside round-to-nearest (`max`)
stand `octav` and `mse`; errors and perplexity are of held-out text, at onnxruntime's default level
(which rounds activations to int8 in blocks of QDQ) and, in the second column of dB, in float32.
Latencies are medians of runs that take turns with the float model's. --bert adds a model of
BERT-base's size, of random weights: its latencies alone, for 1 and 128 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from transformer import BERT, Size, random_weights, text, train, transformer, windows

from calib import Rules, Run, Widths, calibrate_model
from calib.capture import Runtime, Session

Row = dict[str, Any]

_HEAD = ("weights", "method", "MB", "dB", "dB float32", "perplexity", "ms", "of float")
_FLOAT = "float"


def settings(sizes: Sequence[int], methods: Sequence[str]) -> Iterator[tuple[str, str, Rules]]:
    """The rows of the table: their names, and what they are made with."""
    for size in (None, *sizes):
        for method in methods:
            name = "4 bits, per channel" if size is None else f"4 bits, blocks of {size}"
            yield name, method, _rules(method, size)
    smallest = min(sizes)
    for form in ("matmulnbits", "matmulnbits-int8"):
        yield f"blocks of {smallest}, {form}", "octav", _rules("octav", smallest, form)


def _rules(method: str, size: int | None, form: str = "qdq") -> Rules:
    widths = Widths(weights=4, activations=None, edge=4)
    return Rules(widths=widths, method=method, block_size=size, weight_format=form)


def decibels(wanted: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> float:
    """SQNR."""
    noise = float(np.square(wanted.astype(np.float64) - found).sum())
    return 10 * math.log10(float(np.square(wanted.astype(np.float64)).sum()) / max(noise, 1e-30))


def perplexity(logits: np.ndarray[Any, Any], tokens: np.ndarray[Any, Any]) -> float:
    """Of each character after the first, as the exponential of the mean negative log-likelihood."""
    scores = logits[:, :-1].astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(scores, tokens[:, 1:, None], -1)[..., 0]
    return float(np.exp(np.mean(np.log(np.exp(scores).sum(axis=-1)) - chosen)))


def latencies(paths: Sequence[Path], tokens: np.ndarray[Any, Any], runs: int) -> list[float]:
    """Milliseconds a run, medians of ``runs`` in turns."""
    sessions = [Session(path) for path in paths]
    taken: list[list[float]] = [[] for _ in paths]
    for run in range(runs + 1):
        for session, times in zip(sessions, taken, strict=True):
            start = time.perf_counter()
            session.run({"tokens": tokens})
            if run:  # the first warms up
                times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(times) for times in taken]


def measured(
    model: Path, tokens: np.ndarray[Any, Any], rows: Iterator[tuple[str, str, Rules]], runs: int
) -> list[Row]:
    """One row for the float model, and one for each of ``rows``."""
    wanted = Session(model).run({"tokens": tokens})["logits"]
    found: list[Row] = [
        {
            "weights": _FLOAT,
            "method": "",
            "MB": model.stat().st_size / 1e6,
            "perplexity": perplexity(wanted, tokens),
            "ms": None,
        }
    ]
    folder = model.parent
    for number, (name, method, rules) in enumerate(rows):
        path = folder / f"{number}.onnx"
        made = calibrate_model(model, None, rules, path, Run(force=True))
        usual, exact = (
            Session(path, Runtime(exact=exact)).run({"tokens": tokens})["logits"]
            for exact in (False, True)
        )
        found.append(
            {
                "weights": name,
                "method": method,
                "MB": path.stat().st_size / 1e6,
                "dB": decibels(wanted, usual),
                "dB float32": decibels(wanted, exact),
                "perplexity": perplexity(usual, tokens),
                "seconds": made.seconds["calibrate"],
            }
        )
        times = latencies([model, path], tokens[:1], runs)
        found[0]["ms"] = times[0]
        found[-1] |= {"ms": times[1], "of float": times[1] / times[0]}
    return found


def bert(folder: Path, runs: int, size: Size = BERT) -> list[Row]:
    """A transformer of BERT-base's size: latencies for one token and for a full context."""
    model = folder / "bert.onnx"
    onnx.save(transformer(random_weights(size), size), model)
    rows: list[Row] = []
    choices = [("per channel", _rules("max", None))]
    choices += [(f"blocks of {n}", _rules("octav", n)) for n in (32, 128)]
    choices += [(f"blocks of 32, {f}", _rules("octav", 32, f)) for f in ("matmulnbits",)]
    for name, rules in choices:
        path = folder / "quantized.onnx"
        made = calibrate_model(model, None, rules, path, Run(force=True))
        row = {
            "weights": f"BERT's size, {name}",
            "method": rules.method,
            "MB": path.stat().st_size / 1e6,
            "seconds": made.seconds["calibrate"],
        }
        for length in (1, size.context):
            tokens = np.arange(length)[None] % size.symbols
            usual, own = latencies([model, path], tokens, runs)
            row |= {f"float ms {length}": usual, f"ms {length}": own}
        rows.append(row)
    return rows


def show(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """A table."""
    widths = [max(len(c), 11) for c in columns]
    widths[0] = max(len(str(row[columns[0]])) for row in rows) + 1
    print(
        " ".join(
            c.ljust(w) if n < 2 else c.rjust(w)
            for n, (c, w) in enumerate(zip(columns, widths, strict=True))
        )
    )
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        texts = [f"{c:.3f}" if isinstance(c, float) else str(c or "") for c in cells]
        print(
            " ".join(
                t.ljust(w) if n < 2 else t.rjust(w)
                for n, (t, w) in enumerate(zip(texts, widths, strict=True))
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure 4-bit weights in blocks.")
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=900, metavar="N")
    parser.add_argument("--sequences", type=int, default=64, metavar="N")
    parser.add_argument("--blocks", type=int, nargs="+", default=[128, 64, 32], metavar="N")
    parser.add_argument("--methods", nargs="+", default=["max", "octav", "mse"], metavar="NAME")
    parser.add_argument("--runs", type=int, default=30, metavar="N")
    parser.add_argument("--bert", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model, size = Path(name, "gpt.onnx"), Size()
        if arguments.model is None:
            onnx.save(transformer(train(size, arguments.steps)[0], size), model)
        else:
            model.write_bytes(arguments.model.read_bytes())
        tokens = windows(text()[1], arguments.sequences, size.context, 1)
        rows = settings(arguments.blocks, arguments.methods)
        found = measured(model, tokens, rows, arguments.runs)
        show(found, _HEAD)
        if arguments.bert:
            large = bert(Path(name), arguments.runs)
            lengths = (1, BERT.context)
            times = [f"{what}{n}" for n in lengths for what in ("float ms ", "ms ")]
            print()
            show(large, ["weights", "method", "MB", "seconds", *times])
            found += large
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
