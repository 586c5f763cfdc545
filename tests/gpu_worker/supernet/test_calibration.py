"""Calibrated statistics: what they are, that they help, and the file that keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gpu_worker.supernet.calibration import accuracy_percent, calibrate, load_statistics, save_statistics
from gpu_worker.supernet.insertion import Elastic, insert
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


class AverageMeter:
    """A mean of values, each weighted by the number of examples that it is of."""

    def __init__(self) -> None:
        self.total: torch.Tensor | float = 0.0
        self.n = 0

    def update(self, value: torch.Tensor, n: int) -> None:
        """Add a batch's value."""
        self.total, self.n = self.total + value.double() * n, self.n + n

    @property
    def average(self) -> torch.Tensor:
        """The mean so far."""
        assert isinstance(self.total, torch.Tensor)
        return (self.total / self.n).float()


def once_for_all(plain: nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return each norm's mean and variance, in the order of the modules, as Once for All gathers them.

    Each norm normalises by the batch, with the biased variance, and averages weighted by batch size.

    Source: `set_running_statistics` in ofa/imagenet_classification/elastic_nn/utils.py of the published code.
    """
    meters = {}
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            meters[norm] = found = (AverageMeter(), AverageMeter())

            def forward(
                x: torch.Tensor, norm: nn.BatchNorm2d = norm, found: tuple[AverageMeter, AverageMeter] = found
            ) -> torch.Tensor:
                columns = x.transpose(0, 1).flatten(1)  # (C, B * H * W)
                mean = columns.sum(1) / columns.shape[1]
                variance = ((columns - mean[:, None]) ** 2).sum(1) / columns.shape[1]
                for meter, value in zip(found, (mean, variance), strict=True):
                    meter.update(value, x.shape[0])
                normed = (columns - mean[:, None]) / (variance[:, None] + norm.eps).sqrt()
                scaled = normed * norm.weight[:, None] + norm.bias[:, None]
                return scaled.reshape(x.transpose(0, 1).shape).transpose(0, 1)

            norm.forward = forward  # type: ignore[assignment,method-assign]  # of this copy alone
    with torch.no_grad():
        for batch in batches:
            plain(batch)
    return [meter.average for found in meters.values() for meter in found]


def in_order_of(supernet: Supernet, row: int) -> list[torch.Tensor]:
    """Return a subnet's statistics norm by norm, as `plain_subnet` has them: of those that run."""
    held = supernet.statistics[SUBNETS[row].name]
    parts = torch.split(held.values, [n for channels in held.channels for n in (channels, channels)])
    return [part for part in parts if len(part)]


@pytest.mark.parametrize("sizes", [(16, 16, 16), (64, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("row", range(len(CONTROLS)))
def test_statistics_are_those_that_once_for_all_gathers(row: int, sizes: tuple[int, ...]) -> None:
    """Batches of any sizes count by their examples, with the biased variance; all norms within 1e-5."""
    supernet = small_supernet()
    batches = [images(size, seed) for seed, size in enumerate(sizes)]
    expected = once_for_all(plain_subnet(supernet, row), batches)
    supernet.set_statistics(calibrate(supernet, [SUBNETS[row]], batches))
    found = in_order_of(supernet, row)

    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * max(1.0, float(other.abs().max()))


def test_the_first_norm_sees_each_image_alike() -> None:
    """In front of it no other norm has a say: its mean is that of all 66 images at once."""
    supernet = small_supernet()
    odd = torch.cat([images(64), images(2, seed=2) + 100])
    with torch.no_grad():
        expected = supernet.model.get_submodule("stem")(odd).mean((0, 2, 3))
    [held] = calibrate(supernet, [SUBNETS[3]], list(torch.split(odd, 64))).values()

    torch.testing.assert_close(held.values[: held.channels[0]], expected, rtol=1e-5, atol=1e-5)


class Dropping(nn.Sequential):
    """A linear layer, dropout and a norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(nn.Linear(4, 6), nn.Dropout(0.5), norm)


def test_dropout_is_off_while_norms_gather() -> None:
    """A supernet in training is calibrated as in evaluation, and is in training again afterwards."""
    torch.manual_seed(0)
    supernet = insert(Dropping(nn.BatchNorm1d(6)), elastic=[Elastic("w", ["0"])])
    supernet.model.get_submodule("1").eval()
    subnets, x = [Subnet("whole", {"w": [1.0]})], torch.randn(32, 4)
    before = {name: module.training for name, module in supernet.model.named_modules()}
    [held] = calibrate(supernet.train(), subnets, [x]).values()
    supernet.model.get_submodule("1").eval()
    with torch.no_grad():
        linear = supernet.model.get_submodule("0")(x)

    torch.testing.assert_close(held.values[:6], linear.mean(0))
    torch.testing.assert_close(held.values[6:], linear.var(0, correction=0))
    assert {name: module.training for name, module in supernet.model.named_modules()} == before


class OwnNorm(nn.BatchNorm1d):
    """A user's own."""


class ActivatedNorm(nn.BatchNorm1d):
    """One with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise and rectify."""
        return super().forward(x).relu()


@pytest.mark.parametrize("cls", [nn.SyncBatchNorm, OwnNorm, ActivatedNorm])
def test_a_norm_with_a_class_of_its_own_is_calibrated_alike(cls: type[nn.BatchNorm1d]) -> None:
    """By examples and with the biased variance, in batches of 5 and 1; one behind it sees what it gives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), cls(6), cls(6))
    nn.init.normal_(model.get_parameter("1.weight"))
    supernet = insert(model, elastic=[Elastic("w", ["0"])])
    x = torch.randn(6, 4)
    [held] = calibrate(supernet, [Subnet("half", {"w": [0.5]})], [x[:5], x[5:]]).values()
    with torch.no_grad():
        first = torch.nn.functional.linear(
            x, model.get_parameter("0.weight")[:3], model.get_parameter("0.bias")[:3]
        )
    seconds = []
    for batch in (first[:5], first[5:]):
        normed = (batch - batch.mean(0)) / (batch.var(0, correction=0) + 1e-5).sqrt()
        scaled = normed * model.get_parameter("1.weight")[:3].detach()
        seconds.append(scaled.relu() if cls is ActivatedNorm else scaled)

    assert held.channels == (3, 3)
    for mean, variance, batches in zip(
        (held.values[:3], held.values[6:9]), (held.values[3:6], held.values[9:]),
        ((first[:5], first[5:]), seconds), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mean, sum(len(b) * b.mean(0) for b in batches) / 6)
        torch.testing.assert_close(variance, sum(len(b) * b.var(0, correction=0) for b in batches) / 6)


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


def test_accuracy_counts_class_numbers_too() -> None:
    """A network that answers with classes is judged by them; one number a query is neither."""
    assert accuracy_percent(
        lambda x: x, [(torch.tensor([1, 0, 2]), torch.tensor([1, 0, 0]))]
    ) == pytest.approx(200 / 3)
    for other in (torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2, 2)):
        with pytest.raises(ConfigError, match=r"accuracy: expected logits \(B, classes\) or class numbers"):
            accuracy_percent(lambda x: x, [(other, torch.zeros(3))])
