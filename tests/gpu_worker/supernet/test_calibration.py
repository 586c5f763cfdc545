"""Calibrated statistics: what they are, that they help, and the file that keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.supernet.calibration import accuracy_percent, calibrate, load_statistics, save_statistics
from superserve.errors import ConfigError
from superserve.subnet import Subnet
from tests.gpu_worker.models.plain import CHANNELS, CONTROLS, SUBNETS, images, plain_subnet, small_supernet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gpu_worker.supernet.supernet import Supernet


def run(supernet: Supernet, row: int, x: torch.Tensor) -> torch.Tensor:
    """Run a hosted subnet."""
    with torch.inference_mode():
        output: torch.Tensor = supernet.run_with(supernet.prepared(row).settings, x)
    return output


@pytest.mark.parametrize("row", range(len(CONTROLS)))
def test_statistics_are_those_of_a_plain_network_that_has_seen_the_same(row: int) -> None:
    """A plain network's own BatchNorms, averaging over the same batches, come to the same outputs."""
    supernet = small_supernet()
    batches = [images(16, seed) for seed in range(3)]
    plain = plain_subnet(supernet, row)
    supernet.set_statistics(calibrate(supernet, SUBNETS, batches))
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # torch's own running mean over all batches
            module.reset_running_stats()
    plain.train()
    with torch.no_grad():
        for batch in batches:
            plain(batch)
    with torch.no_grad():
        expected = plain.eval()(images())
    torch.testing.assert_close(run(supernet, row, images()), expected, rtol=1e-4, atol=1e-4)


def test_only_norms_that_run_are_kept() -> None:
    """A subnet's statistics are as long as its channels in the blocks that run, and no longer."""
    supernet = small_supernet()
    for row, held in enumerate(calibrate(supernet, SUBNETS, [images()]).values()):
        depths, channels = CONTROLS[row][0], CHANNELS[row]
        n_norms = [2 * depth + (1 if stage else 0) for stage, depth in enumerate(depths)]
        expected = channels[0] + sum(n * c for n, c in zip(n_norms, channels, strict=True))
        assert sum(held.channels) == expected
        assert held.values.shape == (2 * expected,)


def test_calibration_leaves_the_supernet_as_it_was() -> None:
    """What is actuated, held and answered is the same before and after."""
    supernet = small_supernet()
    before, held = run(supernet, 2, images()), dict(supernet.statistics)
    calibrate(supernet, [Subnet("another", {"d": [1, 3, 1], "w": [0.5, 0.5, 0.5]})], [images()])

    assert supernet.statistics == held
    assert torch.equal(run(supernet, 2, images()), before)
    assert not supernet.training


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    """Any of the subnets, in any order, to the bit."""
    supernet = small_supernet()
    path = tmp_path / "new" / "small.statistics.safetensors"
    save_statistics(path, supernet, "small", SUBNETS)
    found = load_statistics(path, supernet, "small", [SUBNETS[3], SUBNETS[0]])

    assert list(found) == ["3", "0"]
    for name, held in found.items():
        assert held.channels == supernet.statistics[name].channels
        assert torch.equal(held.values, supernet.statistics[name].values)


def test_a_thousand_subnets_make_a_small_file(tmp_path: Path) -> None:
    """The file grows by a subnet's own channels: here 4 bytes for each mean and variance, and its name."""
    supernet = small_supernet()
    many = [Subnet(f"s{i}", SUBNETS[i % 4].control) for i in range(1_000)]
    supernet.set_statistics({subnet.name: supernet.statistics[f"{i % 4}"] for i, subnet in enumerate(many)})
    path = tmp_path / "many.safetensors"
    save_statistics(path, supernet, "small", many)
    values = sum(4 * len(supernet.statistics[subnet.name].values) for subnet in many)

    assert path.stat().st_size < values + 1_000 * 200
    assert len(load_statistics(path, supernet, "small", many)) == 1_000


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a file's tensors; its metadata is lost."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Another supernet's, another control tuple, an unknown subnet, no such file: each has its own error."""
    supernet = small_supernet()
    path = tmp_path / "small.safetensors"
    save_statistics(path, supernet, "small", SUBNETS[:2])
    cases = [
        ("other", [SUBNETS[0]], "expected statistics of other, got those of small"),
        ("small", [SUBNETS[2]], "subnet 2: not in the file"),
        ("small", [Subnet("0", SUBNETS[1].control)], "subnet 0: expected the control tuple"),
    ]
    for name, subnets, message in cases:
        with pytest.raises(ConfigError, match=message) as raised:
            load_statistics(path, supernet, name, subnets)
        assert str(path) in str(raised.value)
    with pytest.raises(ConfigError, match="absent: expected a file of SubnetNorm's statistics"):
        load_statistics(tmp_path / "absent", supernet, "small", SUBNETS)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    """Inconsistent values, and a file without metadata, are refused with the reason."""
    supernet = small_supernet()
    path = tmp_path / "small.safetensors"
    save_statistics(path, supernet, "small", SUBNETS)
    edit(path, lambda tensors: tensors)
    with pytest.raises(ConfigError, match="expected statistics of small, got those of None"):
        load_statistics(path, supernet, "small", SUBNETS)
    path.write_bytes(b"not statistics")
    with pytest.raises(ConfigError, match="expected a file of SubnetNorm's statistics"):
        load_statistics(path, supernet, "small", SUBNETS)


def test_what_was_not_calibrated_is_not_saved(tmp_path: Path) -> None:
    """The error names the subnet."""
    with pytest.raises(ConfigError, match="statistics: subnet nobody was not calibrated"):
        save_statistics(tmp_path / "x", small_supernet(), "small", [Subnet("nobody", SUBNETS[0].control)])


def test_calibration_and_accuracy_need_data() -> None:
    """Without a batch there is nothing to say."""
    with pytest.raises(ConfigError, match="calibration: expected at least one batch"):
        calibrate(small_supernet(), SUBNETS, [])
    with pytest.raises(ConfigError, match="accuracy: expected at least one batch"):
        accuracy_percent(lambda x: x, [])


def test_accuracy_counts_the_peaks() -> None:
    """Two of three by hand."""
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([1, 0, 0])

    assert accuracy_percent(lambda x: x, [(logits, labels)]) == pytest.approx(200 / 3)
