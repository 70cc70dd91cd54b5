"""Training with several processes that see different data, by `DistributedDataParallel`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from qat_models import draw, images, seeded, state, thresholds, train, two_layers
from torch import Tensor, distributed, nn

from calib import Reduction
from calib.errors import TrainingError
from calib.qat import calibrate, export, prepare, quantizers


def message_for(model: nn.Module, x: Tensor) -> str:
    try:
        model(x)
    except TrainingError as error:
        return str(error)
    return ""


def distributed_rank(rank: int, folder: Path) -> None:
    """What each of two processes does; writes what it found as JSON."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    found: dict[str, Any] = {}
    for gradient in ("mph", "lsq"):
        model = prepare(seeded(two_layers), gradient=gradient)
        wrapped = nn.parallel.DistributedDataParallel(model)
        x = [draw(8, 3, 8, 8, seed=2 * step + rank).abs() for step in range(4)]
        if rank:
            x[2] = -x[2]  # negative values on one rank alone, and late
        train(model, x[:2], compiled=wrapped)
        found[f"{gradient} signed early"] = bool(quantizers(model)["0.activation"].signed)
        train(model, x[2:], compiled=wrapped)
        found[gradient] = {key: t.tolist() for key, t in state(model).items()}
        found[f"{gradient} error"] = message_for(wrapped, x[0] * (torch.nan if rank else 1))
        found[f"{gradient} signed"] = bool(quantizers(model)["0.activation"].signed)
    alone = prepare(seeded(two_layers))
    calibrate(nn.parallel.DistributedDataParallel(alone), [draw(8, 3, 8, 8, seed=rank)])
    found["calibrated"] = {key: t.tolist() for key, t in thresholds(alone).items()}
    if rank == 0:  # what one rank does by itself waits for no other
        own = prepare(seeded(two_layers), reduction=Reduction("pool"), mode="static")
        with pytest.warns(UserWarning, match="before it has seen a training batch"):
            own.eval()(images())
        calibrate(own, [images()])
        found["exported"] = export(wrapped, images(), folder / "q.onnx").sqnr_db
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What two processes with different data found."""
    folder = tmp_path_factory.mktemp("ranks")
    tests = Path(__file__).resolve().parent
    code = f"""
import sys, torch
from pathlib import Path
sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]
torch.set_num_threads(1)
import test_qat_distributed
test_qat_distributed.distributed_rank(int(sys.argv[1]), Path(sys.argv[2]))
"""
    commands = [[sys.executable, "-c", code, str(rank), str(folder)] for rank in range(2)]
    processes = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    return first, second


@pytest.mark.parametrize("gradient", ["mph", "lsq"])
def test_ranks_that_see_different_data_have_the_same_thresholds_and_weights(
    gradient: str, ranks: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    first, second = ranks
    assert first[gradient] == second[gradient]
    assert first["calibrated"] == second["calibrated"]


def test_a_negative_value_on_one_rank_makes_the_grid_signed_on_all(
    ranks: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    for found in ranks:
        assert not found["mph signed early"]
        assert found["mph signed"]
        assert not found["lsq signed"]  # its grid was settled by the first batch


def test_a_threshold_of_several_ranks_is_the_mean_of_theirs(
    ranks: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """Of the input: what comes behind depends on it."""
    alone = [
        thresholds(calibrate(prepare(seeded(two_layers)), [draw(8, 3, 8, 8, seed=rank)]))
        for rank in range(2)
    ]
    values = [float(found["0.activation"][0]) for found in alone]
    assert abs(values[0] - values[1]) > 1e-3
    (mean,) = ranks[0]["calibrated"]["0.activation"]
    assert mean == pytest.approx(sum(values) / 2, rel=1e-5)


def test_a_value_that_is_not_finite_on_one_rank_is_an_error_on_all(
    ranks: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    for found in ranks:
        assert found["mph error"].startswith("0.activation: holds NaN or infinity")


def test_once_nothing_is_shared_any_more_it_is_an_error_where_it_is(
    ranks: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    told = [found["lsq error"].startswith("0.activation: holds NaN") for found in ranks]
    assert sorted(told) == [False, True]


def test_one_rank_exports_the_wrapped_model(
    ranks: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    assert ranks[0]["exported"] > 40
