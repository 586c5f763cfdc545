"""What is advised holds: it is inserted and proved, and what stays whole is named with its reason."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from gpu_worker.models.digits_supernet import digits_supernet
from gpu_worker.models.kinds import resident, supernet_kind
from gpu_worker.proof.prove import prove
from profiles.measuring import advise as advising
from profiles.measuring.advise import advise, advise_on, code_of
from profiles.measuring.commands import advise_command
from superserve.errors import ConfigError
from tests.profiles.measuring.test_commands import run

if TYPE_CHECKING:
    from pathlib import Path

    from profiles.measuring.advise import Advice

WIDTH = 16
SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24}
"""Of the published networks."""


class Convolutions(nn.Module):
    """A block that adds its input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum."""
        out: torch.Tensor = x + self.second(self.norm(self.first(x)).relu())
        return out


class Images(nn.Module):
    """A small residual network, in which all weights count."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.blocks = nn.Sequential(*(Convolutions() for _ in range(3)))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, 4) for images (B, 1, H, W)."""
        out: torch.Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return out


class Feed(nn.Module):
    """A block to which its caller adds its input; its attention has one projection for q, k and v."""

    def __init__(self, *, divides_heads: bool) -> None:
        super().__init__()
        self.head_dim, self.divides_heads = 4, divides_heads
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, T, width)."""
        shape = (WIDTH // self.head_dim, -1) if self.divides_heads else (-1, self.head_dim)
        q, k, v = (torch.unflatten(one, -1, shape).transpose(1, 2) for one in self.qkv(x).chunk(3, -1))
        attended = torch.softmax(q @ k.transpose(-2, -1), -1) @ v
        out: torch.Tensor = self.down(torch.relu(self.up(self.out(attended.transpose(1, 2).flatten(2)))))
        return out


class Caller(nn.Module):
    """Adds the input of each block."""

    def __init__(self, *, divides_heads: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Feed(divides_heads=divides_heads) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, T, width)."""
        for layer in self.layers:
            x = x + layer(x)
        return x


def not_a_module() -> int:
    """Return something else."""
    return 3


supernet = digits_supernet


def words(advice: Advice) -> list[str]:
    """Return what is declared, one after the other."""
    lines = code_of(advice, "mine", "build").splitlines()
    return [
        line.strip().removesuffix(",") for line in lines if line.strip().startswith(("Stage(", "Elastic("))
    ]


def reasons(advice: Advice) -> dict[str, str]:
    """Return why what stays whole does."""
    return {one.what: one.why for one in advice.refused}


def test_a_residual_network_is_elastic_inside_its_blocks() -> None:
    """Depth and inner channels; the stream between blocks and the output stay whole, the model as it was."""
    model = Images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    advice = advise(model, torch.randn(2, 1, 8, 8))

    assert words(advice) == ['Stage("blocks")', 'Elastic("blocks.first", ["blocks.*.first"])']
    assert (advice.kinds, advice.n_norms) == ({"Conv2d": 7, "BatchNorm2d": 3, "Linear": 1}, 3)
    added = "it is added to what stays whole, as in a residual stream"
    output = "it is the module's output, of which a subnet would answer with a part"
    assert reasons(advice) == {"stem": added, "blocks.*.second": added, "head": output}
    assert type(model.blocks) is nn.Sequential
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_sum_around_a_block_and_a_fused_projection_are_found() -> None:
    """The caller's sum by skipped="zero", queries, keys and values by parts and whole heads."""
    advice = advise(Caller(), torch.randn(2, 5, WIDTH))

    assert words(advice)[:2] == [
        'Stage("layers", skipped="zero")',
        'Elastic("layers.qkv", ["layers.*.qkv"], parts=3, multiple_of=4)',
    ]
    assert [size.name for size in advice.elastic] == ["layers.qkv", "layers.out", "layers.up"]
    assert set(reasons(advice)) == {"layers.*.down"}


def test_heads_that_would_be_cut_each_are_not_advised() -> None:
    """A view by the number of heads: the projection is refused with the proof's words."""
    advice = advise(Caller(divides_heads=True), torch.randn(2, 5, WIDTH))

    assert [size.name for size in advice.elastic] == ["layers.out", "layers.up"]
    assert "layers.*.qkv" in reasons(advice)


def published(kind: str) -> Any:
    """Return a small network. The library takes seconds to import, and every process reads this file."""
    import transformers  # noqa: PLC0415

    named = {"n_embd": 16, "n_layer": 3, "n_head": 4, "vocab_size": 50}
    sizes = named if kind == "GPT2" else {"num_attention_heads": 4, "num_hidden_layers": 3, **SIZES}
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))


@pytest.mark.parametrize(
    ("kind", "stage", "sizes"),
    [
        (
            "Bert",
            "encoder.layer",
            ["encoder.layer.attention.self.query+key+value", "encoder.layer.intermediate.dense"],
        ),
        ("GPT2", "h", ["h.mlp.c_fc"]),
        ("Llama", "layers", ["layers.self_attn.q_proj+k_proj+v_proj", "layers.mlp.gate_proj+up_proj"]),
    ],
)
def test_published_networks_are_elastic_where_the_zoo_says(kind: str, stage: str, sizes: list[str]) -> None:
    """Hugging Face's own code: depth, heads and hidden units, as docs/zoo.md lists them."""
    advice = advise(published(kind), torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(0)))

    assert [one.blocks for one in advice.stages] == [stage]
    assert [one.name for one in advice.elastic] == sizes
    assert advice.proof is not None
    cut = {layer for one in advice.elastic for layer in one.layers}
    assert not cut & set(reasons(advice)), "what is cut with its siblings does not stay whole"
    assert not any("emb" in what for what in reasons(advice)), "an embedding is the stream itself"


def test_too_many_candidates_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one is left out without a word."""
    monkeypatch.setattr(advising, "MAX_TRIED", 3)
    advice = advise(Images(), torch.randn(2, 1, 8, 8))

    assert words(advice) == ['Stage("blocks")', 'Elastic("blocks.first", ["blocks.*.first"])']
    assert advice.n_left == 2
    assert list(advising.lines_of(advice))[-3] == "not tried: 2 more candidates"


def test_what_is_advised_is_served_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file gives a supernet by the options of the command that is printed; all of it is proved."""
    out, example = tmp_path / "advised.py", "1x8x8:float32"
    result = run(advise_command, f"{__name__}:Images", "--example-input", example, "--out", out)
    assert result.exit_code == 0, result.output
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    for command in ("profiles train", "profiles search"):
        assert f"{command} --supernet advised:supernet --example-input {example} --" in result.output
    made = resident(supernet_kind(f"advised:supernet@{example}"), None)
    assert made.controls.space.largest == {"d": [3], "w": [1.0]}
    assert len(prove(made, torch.randn(2, 1, 8, 8)).subnets) >= 4


def test_without_a_file_the_code_is_printed() -> None:
    """To be saved by hand."""
    result = run(advise_command, f"{__name__}:Images", "--example-input", "1x8x8")

    assert result.exit_code == 0, result.output
    assert code_of(*advise_on(f"{__name__}:Images", "1x8x8")) in result.output
    assert "Save this as my_supernet.py" in result.output


def test_a_module_without_anything_elastic_gives_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what stays whole, and why."""
    monkeypatch.setattr(sys.modules[__name__], "single", lambda: nn.Linear(3, 2), raising=False)
    result = run(advise_command, f"{__name__}:single", "--example-input", "3")

    assert result.exit_code == 0, result.output
    assert "may be left out: nothing\nmay be cut: nothing\n" in result.output
    assert "def supernet" not in result.output


def test_a_module_that_is_there_already_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code names it as it is; what builds one is called."""
    monkeypatch.setattr(sys.modules[__name__], "images", Images(), raising=False)

    assert "\n        images,\n" in code_of(*advise_on(f"{__name__}:images", "1x8x8"))
    assert "\n        Images(),\n" in code_of(*advise_on(f"{__name__}:Images", "1x8x8"))


@pytest.mark.parametrize(
    ("name", "example", "message"),
    [
        ("Images", "1x8x8", "expected package.module:function, which returns a module, got 'Images'"),
        (f"{__name__}:absent", "1x8x8", "has no attribute 'absent'"),
        (
            f"{__name__}:words",
            "1x8x8",
            r"expected a function that takes nothing: TypeError: words\(\) missing",
        ),
        (f"{__name__}:not_a_module", "1x8x8", "expected what gives a torch.nn.Module, got int"),
        (f"{__name__}:supernet", "1x20x20", "the model is a supernet already"),
        (
            f"{__name__}:Images",
            "2x8x8",
            r"does not run on an example \(2, 2, 8, 8\) torch.float32: RuntimeError",
        ),
        (f"{__name__}:Images", "1x8xa", "--example-input: expected a shape and dtype"),
    ],
)
def test_what_cannot_be_judged_is_named(name: str, example: str, message: str) -> None:
    """One line, with what was expected."""
    with pytest.raises(ConfigError, match=message):
        advise_on(name, example)


def test_a_module_that_cannot_be_followed_is_refused_as_insert_refuses_it() -> None:
    """The layer is named, and what to do."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].forward = lambda x: x
    with pytest.raises(ConfigError, match=r"0: its forward was replaced on the instance"):
        advise(model, torch.ones(2, 4))
