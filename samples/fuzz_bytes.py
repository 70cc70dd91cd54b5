"""Mutates models and data files, byte by byte and field by field, and calibrates each.

    python samples/fuzz_bytes.py [--n 2000] [--seed 0] [--json]
    python samples/fuzz_bytes.py --one SEED [--save DIR]

Every mutant is calibrated in a child process with bounded memory and time. It must end in a model
that `calibrate_model` has verified, or in a `CalibError` of one line, with nothing left behind and
no input changed; a crash, a hang, any other exception is a failure. Mutants are made of the random
graphs of samples/fuzz_graphs.py, of samples/digits, and of models of the fixtures, where these are.
The exit code is 0 only if none failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from corpus_cases import Feed
from fuzz_arrays import mutated_npy, mutated_npz, one_of
from fuzz_graphs import build
from fuzz_mutations import mutate
from fuzz_protobuf import damaged
from isolation import Died, isolated

from calib import CalibError, Rules, Run, Widths, calibrate_model
from calib.capture import Runtime

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "samples" / "digits"
FIXTURES = Path(os.environ.get("OCTAV_FIXTURES") or ROOT.parent / "shared" / "fixtures")
KINDS = ("model", "data", "observations")
STATUSES = ("right", "refused", "failed")
MODELS = ("resnet20_cifar10.onnx", "gtcrn_stream.onnx", "mobilenet_v1_025_128.onnx")
N_GRAPHS = 300
MOST_BYTES = 6 << 30
MOST_CPU_SECONDS = 60
SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one mutant, and why. ``valid``: it passed onnx.checker."""

    seed: int
    kind: str
    made: str
    status: str
    message: str = ""
    valid: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """The folders of one mutant: with its files, for temporary files, for what is told about it."""

    files: Path
    scratch: Path
    told: Path

    @classmethod
    def within(cls, folder: Path) -> Room:
        room = cls(folder / "files", folder / "scratch", folder / "told")
        for path in (room.files, room.scratch, room.told):
            path.mkdir(parents=True, exist_ok=True)
        return room


# --- making -------------------------------------------------------------------------------------


def kind_of(seed: int) -> str:
    return KINDS[(0, 0, 0, 0, 0, 0, 0, 1, 1, 2)[seed % 10]]


def digits() -> tuple[onnx.ModelProto, list[Feed]]:
    with np.load(DIGITS / "digits.npz") as arrays:
        images = arrays["image"]
    return onnx.load(DIGITS / "digits.onnx"), [{"image": images[:3]}, {"image": images[3:6]}]


def original(rng: np.random.Generator) -> tuple[onnx.ModelProto, Sequence[Feed] | None]:
    """A model that is whole, and feeds; None for made-up ones."""
    chance = rng.random()
    fixture = FIXTURES / str(one_of(rng, MODELS))
    if chance < 0.02 and fixture.is_file():
        return onnx.load(fixture), None
    if chance < 0.15:
        return digits()
    return build(int(rng.integers(N_GRAPHS)))


def make_model(rng: np.random.Generator, room: Room) -> tuple[str, Sequence[Feed] | None]:
    model, feeds = original(rng)
    made = "+".join(mutate(rng, model)) if rng.random() < 0.8 else ""
    data = model.SerializeToString()
    if not made:
        data, made = damaged(rng, data), "bytes"
    (room.files / "model.onnx").write_bytes(data)
    (room.files / "weights.bin").write_bytes(rng.bytes(4096))
    return made, feeds if rng.random() < 0.6 else None


def make_data(rng: np.random.Generator, room: Room) -> tuple[str, Path]:
    model, feeds = digits() if rng.random() < 0.5 else build(int(rng.integers(N_GRAPHS)))
    onnx.save(model, room.files / "model.onnx")
    arrays = {
        name: np.concatenate([feed[name] for feed in feeds]) if array.ndim else array
        for name, array in feeds[0].items()
    }
    if rng.random() < 0.3:
        arrays["labels"] = rng.integers(0, 5, np.size(one_of(rng, list(arrays.values()))) % 9)
    if len(arrays) == 1 and rng.random() < 0.4:
        path = room.files / "data.npy"
        data, made = mutated_npy(rng, next(iter(arrays.values())))
    else:
        path = room.files / "data.npz"
        data, made = mutated_npz(rng, arrays)
    path.write_bytes(data)
    return f"{path.suffix}: {made}", path


def make_observations(rng: np.random.Generator, room: Room) -> tuple[str, Path]:
    model, feeds = digits()
    onnx.save(model, room.files / "model.onnx")
    path = room.files / "seen.npz"
    output = room.scratch / "whole.onnx"
    calibrate_model(room.files / "model.onnx", feeds, None, output, Run(save_observations=path))
    output.unlink()
    with np.load(path) as arrays:
        data, made = mutated_npz(rng, dict(arrays))
    path.write_bytes(data)
    return f"observations: {made}", path


# --- judging ------------------------------------------------------------------------------------


def judge(seed: int, room: Room) -> Verdict:
    """Makes the mutant of ``seed`` and calibrates it."""
    rng, kind = np.random.default_rng(seed), kind_of(seed)
    run = Run(runtime=Runtime(threads=1))
    data: object = None
    if kind == "model":
        made, data = make_model(rng, room)
    elif kind == "data":
        made, data = make_data(rng, room)
    else:
        made, path = make_observations(rng, room)
        run = replace(run, observations=path)
    (room.told / "made").write_text(made, "utf-8")
    path = room.files / "model.onnx"
    valid = False
    if kind == "model":
        valid = _passes_checker(path)
        (room.told / "checked").write_text("valid" if valid else "", "utf-8")
    bits = (int(n) for n in rng.choice([2, 4, 8, 8, 16], 2))
    before = {file.name: file.read_bytes() for file in room.files.iterdir()}
    status, message = _calibrate(path, data, Rules(widths=Widths(*bits)), run)
    if reason := _untidy(room, before, status):
        status, message = "failed", f"{reason}, after: {message or status}"
    return Verdict(seed, kind, made, status, message, valid)


def _passes_checker(path: Path) -> bool:
    try:
        onnx.checker.check_model(str(path))
    except Exception:  # whatever it says
        return False
    return True


def _calibrate(path: Path, data: object, rules: Rules, run: Run) -> tuple[str, str]:
    try:
        calibrate_model(path, data, rules, path.with_name("out.onnx"), run)
    except CalibError as error:
        message = f"{type(error).__name__}: {error}"
        lines = message.splitlines()
        return (
            ("refused", message) if len(lines) == 1 else ("failed", f"{len(lines)} lines: {lines}")
        )
    except Exception as error:
        traceback.print_exc()
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/calib/" in frame.filename] or list(frames)
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return "failed", f"{type(error).__name__} in {where}: {' '.join(str(error).split())}"
    return "right", ""


def _untidy(room: Room, before: dict[str, bytes], status: str) -> str:
    after = {file.name: file for file in room.files.iterdir()}
    written = {"out.onnx", "out.onnx.data"} if status == "right" else set()
    if left := sorted(set(after) - set(before) - written):
        return f"left behind: {left}"
    if any(name not in after or after[name].read_bytes() != data for name, data in before.items()):
        return "an input was changed"
    if status == "right" and "out.onnx" not in after:
        return "nothing was written"
    left = [path.name for path in room.scratch.iterdir()]
    return f"left in the temporary folder: {left}" if left else ""


# --- many seeds ---------------------------------------------------------------------------------


def limited(seed: int, room: Room) -> Verdict:
    """As `judge`, with bounds on memory and time; where a crash happens is told in a file."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_SECONDS, MOST_CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tempfile.tempdir = str(room.scratch)
    with (room.told / "stderr").open("w") as stderr, (room.told / "stack").open("w") as stack:
        for number in (1, 2):
            os.dup2(stderr.fileno(), number)
        faulthandler.enable(stack)
        faulthandler.dump_traceback_later(SECONDS - 5, file=stack)
        try:
            return judge(seed, room)
        finally:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.disable()


def verdict(seed: int, save: Path | None = None) -> Verdict:
    """As `judge`, in a child process and a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="fuzz-bytes-") as folder:
        room = Room.within(Path(folder))
        result = isolated(partial(limited, seed, room), SECONDS)
        if isinstance(result, Died):
            made, checked = (_read(room.told / name) for name in ("made", "checked"))
            message = f"{result.reason} {_place(room)}"
            result = Verdict(seed, kind_of(seed), made, "failed", message, checked == "valid")
        if save is not None:
            shutil.copytree(folder, save, dirs_exist_ok=True)
    return result


def _read(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.exists() else ""


def _place(room: Room) -> str:
    """Where a child died: the innermost line of calib, or the innermost of all."""
    frames = re.findall(r'File "(?:.*/)?(\w+/\w+\.py)", line (\d+)', _read(room.told / "stack"))
    ours = [frame for frame in frames if frame[0].startswith("calib/")] or frames
    said = " ".join(_read(room.told / "stderr").split())[-300:]
    return (f"in {ours[0][0]}:{ours[0][1]} " if ours else "") + said


def report(verdicts: Sequence[Verdict], seconds: float) -> None:
    """Prints counts, refusals, and every seed that failed."""
    print(f"{'':14}" + "".join(f"{status:>9}" for status in STATUSES))
    for kind in KINDS:
        counts = Counter(v.status for v in verdicts if v.kind == kind)
        print(f"{kind:14}" + "".join(f"{counts[status]:9}" for status in STATUSES))
    print(f"past onnx.checker: {valid_share(verdicts):.0%} of the models")
    print(f"{len(verdicts) / max(seconds, 1e-9):.1f} mutants a second")
    refused = Counter(grouped(v.message) for v in verdicts if v.status == "refused")
    print("\nrefused:")
    for reason, count in refused.most_common(25):
        print(f"{count:5}  {reason[:160]}")
    print("\nfailed:")
    groups: dict[str, list[Verdict]] = {}
    for v in verdicts:
        if v.status == "failed":
            groups.setdefault(grouped(v.message)[:100], []).append(v)
    for found in sorted(groups.values(), key=len, reverse=True):
        print(f"{len(found):5}  {found[0].message[:400]}")
        for v in found[:8]:
            print(f"         --one {v.seed}: {v.made}{', valid' if v.valid else ''}")


def valid_share(verdicts: Sequence[Verdict]) -> float:
    """The share of the models that passed onnx.checker."""
    models = [v.valid for v in verdicts if v.kind == "model"]
    return sum(models) / max(len(models), 1)


def grouped(message: str) -> str:
    """A message without its names and numbers."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\([^)]*\)|\S*/\S+|\b\S*\d\S*", "#", message)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=2000, help="how many mutants (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first (0)")
    parser.add_argument("--one", type=int, help="only this seed")
    parser.add_argument("--save", type=Path, help="with --one: keep its files in this folder")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no mutant after that")
    parser.add_argument("--json", action="store_true", help="print every verdict as JSON")
    chosen = parser.parse_args(arguments)
    start = time.monotonic()
    verdicts: list[Verdict] = []
    last = chosen.seed + chosen.n
    for seed in range(chosen.seed, last) if chosen.one is None else [chosen.one]:
        if time.monotonic() - start > chosen.seconds:
            break
        verdicts.append(verdict(seed, chosen.save))
        if verdicts[-1].status == "failed":
            print(f"--one {seed}: {verdicts[-1].message}", file=sys.stderr, flush=True)
    if chosen.json:
        print(json.dumps([asdict(v) for v in verdicts]))
    else:
        report(verdicts, time.monotonic() - start)
    return int(any(v.status == "failed" for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
