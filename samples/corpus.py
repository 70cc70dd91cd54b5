"""Calibrates every model of the installed onnx wheel at 16 bits and holds it against the original.

    python samples/corpus.py [--only REGEX] [--fast] [--json FILE]

The models are those that onnx tests its backends with: the folders simple, pytorch-converted,
pytorch-operator and light, and of the node cases those that hold a layer this tool quantizes. Each
is calibrated with the case's own data. A model is `quantized` if every float output of the result
keeps 60 dB SQNR at both graph optimisation levels of onnxruntime, `refused` if one clear line says
why it is not, and `crashed` otherwise. The exit code is 0 only if none crashed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped,unused-ignore]
from corpus_cases import Case, Feed, all_cases
from isolation import Died, isolated

from calib import CalibError, Rules, Run, Widths, calibrate_model
from calib.capture import Runtime
from calib.errors import VerificationError

LEAST_DB = 60.0
NOTHING = "nothing to quantize"
RULES = Rules(widths=Widths(16, 16, 16))
STATUSES = ("quantized", "refused", "excepted", "crashed")
# Of the larger kinds every n-th case, so that all of --fast takes less than 30 s.
FAST = {"simple": 8, "pytorch-converted": 2, "pytorch-operator": 4, "node": 8}
FAST_LIGHT = ("light_squeezenet",)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one model.

    Attributes:
        status: quantized, refused or crashed; excepted: not quantized, or not to 60 dB, but its
            inputs hold NaN or infinity.
        message: why, where it was not quantized.
        sqnr_db: the lowest of all float outputs at both levels.
        n_tensors: how many got a QDQ pair.
    """

    name: str
    status: str
    message: str = ""
    sqnr_db: float | None = None
    n_tensors: int = 0
    seconds: float = 0.0


def outcome(case: Case, seconds: float) -> Outcome:
    """Calibrates ``case`` in a child process."""
    start = time.monotonic()
    result = isolated(partial(quantize, case), seconds)
    if isinstance(result, Died):
        result = Outcome(case.name, "crashed", result.reason)
    return Outcome(**{**asdict(result), "seconds": round(time.monotonic() - start, 2)})


def quantize(case: Case) -> Outcome:
    """Calibrates ``case`` and measures what came out."""
    feeds = list(case.feeds())
    status = "refused" if all(map(_finite, feeds)) else "excepted"
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "model.onnx"), Path(folder, "quantized.onnx")
        onnx.save(case.model(), source)
        try:
            run = Run(runtime=Runtime(threads=1))
            result = calibrate_model(source, feeds, RULES, target, run)
        except CalibError as error:
            message = str(error).replace(str(source), "MODEL")
            clear = message.isprintable() and not isinstance(error, VerificationError)
            message = f"{type(error).__name__}: {message}"
            return Outcome(case.name, status if clear else "crashed", message)
        n_tensors = len(result.table.records)
        found = min((sqnr_db(source, target, feed) for feed in feeds), default=np.inf)
    if found > LEAST_DB:
        return Outcome(case.name, "quantized", "", found, n_tensors)
    status = "crashed" if status == "refused" else status
    return Outcome(case.name, status, f"SQNR {found:.1f} dB", found, n_tensors)


def sqnr_db(source: Path, target: Path, feed: Feed) -> float:
    """The lowest SQNR of any float output of ``target`` at both levels, at most 999."""
    expected = execute(source, feed, optimized=False)
    levels = [execute(target, feed, optimized=level) for level in (False, True)]
    return min(
        (
            _sqnr_db(reference, level[name])
            for level in levels
            for name, reference in expected.items()
            if reference.dtype.kind == "f"
        ),
        default=999.0,
    )


def execute(path: Path, feed: Feed, *, optimized: bool) -> Feed:
    """The outputs by name; without this project's own code."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    level = "ORT_ENABLE_ALL" if optimized else "ORT_DISABLE_ALL"
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(names, dict(feed))), strict=True))


def _sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    same = (reference == other) | (np.isnan(reference) & np.isnan(other))
    signal = np.where(same & ~np.isfinite(reference), 0.0, reference.astype(np.float64))
    noise = np.square(np.where(same, 0.0, signal - other)).sum()
    if noise == 0:
        return 999.0
    return float(10 * np.log10(np.square(signal).sum() / noise))


def _finite(feed: Feed) -> bool:
    return all(np.isfinite(a).all() for a in feed.values() if a.dtype.kind == "f")


def select(cases: Sequence[Case], only: str, fast: bool) -> Iterator[Case]:
    """The cases whose name ``only`` is found in; of these a few of each kind if ``fast``."""
    seen: Counter[str] = Counter()
    for case in cases:
        if not re.search(only, case.name):
            continue
        kind, _, name = case.name.partition("/")
        seen[kind] += 1
        if not fast or (name in FAST_LIGHT if kind == "light" else seen[kind] % FAST[kind] == 0):
            yield case


def report(outcomes: Sequence[Outcome]) -> None:
    """Prints counts, distinct refusals and all crashes."""
    kinds = list(dict.fromkeys(o.name.partition("/")[0] for o in outcomes))
    print(f"\n{'':18}{'models':>8}" + "".join(f"{status:>11}" for status in STATUSES))
    for kind in (*kinds, "all"):
        of_kind = [o for o in outcomes if kind in ("all", o.name.partition("/")[0])]
        counts = Counter(o.status for o in of_kind)
        row = "".join(f"{counts[status]:>11}" for status in STATUSES)
        print(f"{kind:18}{len(of_kind):>8}{row}")
    refused = [o for o in outcomes if o.status == "refused"]
    nothing = sum(NOTHING in o.message for o in refused)
    print(f"\nrefused: {len(refused)}, of these with {NOTHING}: {nothing}")
    # Names of nodes and tensors are left out, so that like refusals are counted together.
    messages = Counter(
        re.sub(r"'[^']*'|(?<=: )\w+: (?=inside)", "'...'", o.message) for o in refused
    )
    for message, count in messages.most_common():
        print(f"{count:5}  {message}")
    for title in ("excepted", "crashed"):
        found = [o for o in outcomes if o.status == title]
        print(f"\n{title}: {len(found)}")
        for o in found:
            print(f"  {o.name}: {o.message}")
    measured = [o for o in outcomes if o.status == "quantized" and o.sqnr_db is not None]
    if measured:
        worst = min(measured, key=lambda o: o.sqnr_db or 0.0)
        print(f"\nlowest SQNR of a quantized model: {worst.sqnr_db:.1f} dB, {worst.name}")


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression found in the cases' names")
    parser.add_argument("--fast", action="store_true", help="a subset that takes less than 30 s")
    parser.add_argument("--json", type=Path, help="write all outcomes to this file")
    parser.add_argument("--seconds", type=float, default=900, help="limit of one model (900)")
    parser.add_argument("--verbose", action="store_true", help="print a line for each model")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    outcomes = []
    for case in select(all_cases(), chosen.only, chosen.fast):
        outcomes.append(outcome(case, chosen.seconds))
        if chosen.verbose:
            print(outcomes[-1], flush=True)
    report(outcomes)
    if chosen.json:
        document: Mapping[str, object] = {"outcomes": [asdict(o) for o in outcomes]}
        chosen.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return int(not outcomes or any(o.status == "crashed" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
