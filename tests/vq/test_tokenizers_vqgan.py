"""VQGANs in their authors' own files: LlamaGen's against a second implementation, Emu3.5's against its class in transformers;
and the same weights in all that trainers put around them.

LlamaGen's forward pass is written here from the architecture that is published (arXiv:2406.06525), with torch's functions alone.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from weights import one_by_one, pixels, save, vqgan, vqgan_state

from wds_tools.errors import TokenizerError
from wds_tools.vq import ImageTokenizer, load_tokenizer, nearest
from wds_tools.vq.chameleon import checkpoint_name, read_config, vq_model
from wds_tools.vq.checkpoints import read_weights
from wds_tools.vq.llamagen import config_of

LEVELS, BLOCKS = (1, 2, 2), 2


# --- LlamaGen: a second implementation -----------------------------------------------------------------------------


class PlainLlamaGen:
    """Encoder and decoder mirror each other; the lowest of their resolutions has attention after each residual block."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.book_KD = self.unit(state["quantize.embedding.weight"])

    def unit(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    def conv(self, name: str, x: Tensor, **settings: Any) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return functional.conv2d(x, weight, self.state[f"{name}.bias"], **{"padding": weight.shape[-1] // 2, **settings})

    def swish_of_norm(self, name: str, x: Tensor) -> Tensor:
        return functional.silu(self.norm(name, x))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return functional.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def residual(self, name: str, x: Tensor) -> Tensor:
        inner = self.conv(f"{name}.conv1", self.swish_of_norm(f"{name}.norm1", x))
        inner = self.conv(f"{name}.conv2", self.swish_of_norm(f"{name}.norm2", inner))
        shortcut = f"{name}.nin_shortcut"
        return inner + (self.conv(shortcut, x) if f"{shortcut}.weight" in self.state else x)

    def attend(self, name: str, x: Tensor) -> Tensor:
        places = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", places).flatten(2).transpose(1, 2) for part in "qkv")
        seen = functional.scaled_dot_product_attention(q, k, v)
        return x + self.conv(f"{name}.proj_out", seen.transpose(1, 2).reshape(x.shape))

    def middle(self, side: str, x: Tensor) -> Tensor:
        return self.residual(f"{side}.mid.2", self.attend(f"{side}.mid.1", self.residual(f"{side}.mid.0", x)))

    def level(self, name: str, x: Tensor, blocks: int) -> Tensor:
        for i in range(blocks):
            x = self.residual(f"{name}.res.{i}", x)
            if f"{name}.attn.{i}.q.weight" in self.state:
                x = self.attend(f"{name}.attn.{i}", x)
        return x

    def codes(self, pixels_BHWC: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", (pixels_BHWC / 255 * 2 - 1).permute(0, 3, 1, 2))
        for i in range(len(LEVELS)):
            x = self.level(f"encoder.conv_blocks.{i}", x, BLOCKS)
            if i < len(LEVELS) - 1:  # a row and a column of zeros, at the end alone
                x = functional.pad(x, (0, 1, 0, 1))
                x = self.conv(f"encoder.conv_blocks.{i}.downsample.conv", x, stride=2, padding=0)
        x = self.conv("encoder.conv_out", self.swish_of_norm("encoder.norm_out", self.middle("encoder", x)))
        latents_BhwD = self.unit(self.conv("quant_conv", x).permute(0, 2, 3, 1))
        return (latents_BhwD @ self.book_KD.T).argmax(-1)  # of unit vectors, the nearest

    def pictures(self, codes_Bhw: Tensor) -> Tensor:
        x = self.conv("post_quant_conv", self.book_KD[codes_Bhw].permute(0, 3, 1, 2))
        x = self.middle("decoder", self.conv("decoder.conv_in", x))
        for i in range(len(LEVELS)):  # from the lowest resolution up
            x = self.level(f"decoder.conv_blocks.{i}", x, BLOCKS + 1)
            if i < len(LEVELS) - 1:
                twice = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
                x = self.conv(f"decoder.conv_blocks.{i}.upsample.conv", twice)
        x = self.conv("decoder.conv_out", self.swish_of_norm("decoder.norm_out", x))
        return ((x.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return vqgan_state(vqgan(LEVELS, BLOCKS, z=16, D=8), llamagen=True)


def load(path: Path) -> ImageTokenizer:
    return load_tokenizer("llamagen", weights=str(path), device="cpu")


def test_codes_and_pictures_of_llamagen_are_those_of_a_plain_forward_pass(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"model": state}, tmp_path / "vq_ds4.pt")
    tokenizer, plain = load(tmp_path / "vq_ds4.pt"), PlainLlamaGen(state)
    assert (tokenizer.name, tokenizer.codebook_size, tokenizer.stride) == ("llamagen", 512, 4)
    for size in ((32, 32), (32, 64)):
        codes = tokenizer.encode(pixels(*size))
        assert torch.equal(codes, one_by_one(plain.codes, pixels(*size)))
        assert len(codes.unique()) > 20, "a comparison of constant codes would prove nothing"
        assert (tokenizer.decode(codes) - plain.pictures(codes)).abs().max() < 0.51


@pytest.mark.parametrize(("levels", "stride"), [((1, 2, 2, 4), 8), ((1, 1, 2, 2, 4), 16)])
def test_the_published_sizes_of_llamagen_are_told_by_the_shapes(levels: tuple[int, ...], stride: int) -> None:
    shapes = {f"encoder.conv_blocks.{i}.res.{j}.conv2.bias": (128 * m,) for i, m in enumerate(levels) for j in (0, 1)}
    shapes |= {"encoder.conv_in.bias": (128,), "encoder.conv_out.bias": (256,), "quantize.embedding.weight": (16384, 8)}
    config = config_of({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, Path("vq.pt"))
    assert (config.ch, config.ch_mult, config.num_res_blocks, config.stride) == (128, levels, 2, stride)
    model = vq_model(config)
    assert 69 < sum(weights.numel() for weights in model.parameters()) / 1e6 < 73  # 70 and 72 million, say the authors
    attentive = [name for name, _ in model.named_modules() if re.fullmatch(r"(en|de)coder.*attentions\.\d", name)]
    assert len(attentive) == 1 + 2 + 1 + 3


# --- Emu3.5: the same weights under its own names and in its class of transformers -----------------------------------


def test_codes_of_emu35s_own_files_are_those_of_the_class_in_transformers(tmp_path: Path) -> None:
    made, encode = save("emu35", tmp_path / "transformers")
    ddconfig = {"z_channels": 8, "resolution": 256, "ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [64]}
    tree = {"n_embed": 512, "embed_dim": 8, "ddconfig": {**ddconfig, "double_z": False, "in_channels": 3, "out_ch": 3}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    state = {}
    for name, weights in made.state_dict().items():
        name = re.sub(r"stages\.(\d)\.layers\.(\d)\.resnet", r"down.\1.block.\2", name)
        name = re.sub(r"stages\.(\d)\.layers\.(\d)\.attention", r"down.\1.attn.\2", name)
        state[re.sub(r"stages\.(\d)\.downsample", r"down.\1.downsample", name)] = weights
    for name, shape in vq_model(read_config(tmp_path / "config.yaml")).state_dict().items():
        if name.startswith(("decoder", "post_quant_conv")):  # which the class of transformers has not
            state[checkpoint_name(name, 3)] = torch.randn(shape.shape) / max(1, shape[:1].numel()) ** 0.5
    torch.save(state, tmp_path / "model.ckpt")
    tokenizer = load_tokenizer("emu35", weights=str(tmp_path), device="cpu")
    codes = tokenizer.encode(pixels())
    assert torch.equal(codes, one_by_one(encode, (pixels().float() / 255 * 2 - 1).permute(0, 3, 1, 2)))
    assert len(codes.unique()) > 8
    assert (tokenizer.name, tokenizer.stride) == ("emu35", 4)
    assert tokenizer.decode(codes).shape == pixels().shape


def test_the_nearest_by_product_is_the_largest_inner_product() -> None:
    rng = torch.Generator().manual_seed(0)
    latents, codebook = torch.randn(300, 16, generator=rng), torch.randn(512, 16, generator=rng) * torch.rand(512, 1)
    assert torch.equal(nearest(latents, codebook, by="product"), (latents @ codebook.T).argmax(1))
    latents[7, 3] = torch.nan
    assert nearest(latents, codebook, by="product")[7] == -1


# --- checkpoints as people have them ---------------------------------------------------------------------------------


class ModelCheckpoint:
    """Stands for a callback of Lightning; pickled by its name, which no loader has to know."""


class AttributeDict(dict[str, Any]):
    """As Lightning keeps hyperparameters."""


class MyConfig:
    def __init__(self) -> None:
        self.lr = 1e-4


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name while the checkpoint is written."""
    module = ModuleType("pytorch_lightning.somewhere")
    for cls in (ModelCheckpoint, AttributeDict):
        setattr(module, cls.__name__, cls)
        monkeypatch.setattr(cls, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


Wrap = Callable[[dict[str, Tensor]], Any]
WRAPPED: dict[str, Wrap] = {
    "a bare state dict": lambda state: state,
    "model, as LlamaGen": lambda state: {"model": state, "steps": 7, "optimizer": {"state": {0: {"step": torch.zeros(1)}}}},
    "parameters": lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
    "state_dict": lambda state: {"state_dict": state, "global_step": 3},
    "DistributedDataParallel": lambda state: {"model": prefixed("module.", state)},
    "torch.compile": lambda state: prefixed("_orig_mod.", state),
    "inside another model": lambda state: {"state_dict": {**prefixed("vq.", state), "head.weight": torch.zeros(2)}},
    "loss and shadow": lambda state: {
        **state,
        "loss.discriminator.weight": torch.zeros(1),
        "model_ema.decay": torch.zeros(1),
        "model_ema.encoderconv_inweight": torch.zeros(1),
        "quantize.cluster_size": torch.zeros(512),
    },
    "an average beside it": lambda state: {"model": {k: t + 1 for k, t in state.items()}, "ema": state},
    "an incomplete average": lambda state: {"model": state, "ema": {k: state[k] for k in [*state][-3:]}},
    "an average inside": lambda state: {"state_dict": {**prefixed("ema_model.", state), **{k: t + 1 for k, t in state.items()}}},
    "Namespace and paths": lambda state: {"args": argparse.Namespace(lr=1, out=Path("x")), "model": state},
    "numpy scalars": lambda state: {"best": np.float64(3), "epoch": np.int64(3), "history": np.zeros(3), "model": state},
    "Lightning": lambda state: {
        "state_dict": state,
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.zeros(1)}, "EarlyStopping": ModelCheckpoint()},
        "hyper_parameters": AttributeDict(lr=1.0, args=argparse.Namespace(a=[1, 2])),
        "loops": {"fit_loop": {"state": {}}},
    },
}


@pytest.mark.usefixtures("lightning")
@pytest.mark.parametrize("kind", WRAPPED)
def test_tensors_are_taken_from_whatever_a_trainer_put_around_them(kind: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(WRAPPED[kind](state), tmp_path / "vq.pt")
    found = read_weights([tmp_path / "vq.pt"])
    assert found.keys() == state.keys() - {"quantize.codebook_used"}
    assert all(torch.equal(found[name], state[name]) for name in found)


class Writes:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return np.save, (str(self.path), 1)


def test_what_stands_for_an_object_never_runs_it(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"best": Writes(tmp_path / "written.npy"), "model": state}, tmp_path / "vq.pt")
    assert len(read_weights([tmp_path / "vq.pt"])) == len(state) - 1
    assert not (tmp_path / "written.npy").exists()


def test_weights_may_be_safetensors_in_every_place_of_a_checkpoint(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(prefixed("vq_model.", state), tmp_path / "vq.safetensors")
    assert torch.equal(load(tmp_path / "vq.safetensors").encode(pixels()), one_by_one(PlainLlamaGen(state).codes, pixels()))


def test_of_two_whole_sets_none_is_taken(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"teacher": state, "student": state}, tmp_path / "vq.pt")
    with pytest.raises(TokenizerError, match=r"vq\.pt: 2 codebooks \(quantize\.embedding\.weight\) in the weights, expected one"):
        load(tmp_path / "vq.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_an_object_that_is_refused_is_named_with_what_saves_the_tensors(
    legacy: bool, state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vq.pt"
    torch.save({"config": MyConfig(), "state_dict": state}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(TokenizerError, match=r"holds more than tensors, and was not loaded: it has a \S+\.MyConfig\. ") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"torch": torch}
    lines = re.findall(r"`([^`]*torch\.[^`]*)`", str(caught.value))
    assert len(lines) == 2
    for line in lines:
        exec(line, names)  # noqa: S102  our own
    assert torch.equal(load(path).encode(pixels()), one_by_one(PlainLlamaGen(state).codes, pixels()))


def test_a_file_without_such_tensors_is_refused_in_one_line(tmp_path: Path) -> None:
    kinds = {"quantize.embedding.weight": torch.zeros(4)}, {"quantize.embedding.weight": torch.zeros(4, 2)}, [1], {"a": {"b": 1}}
    for saved in kinds:
        torch.save(saved, tmp_path / "vq.pt")
        with pytest.raises(TokenizerError, match=r"vq\.pt(: 0 codebooks| has no tensors of LlamaGen's tokenizer)") as caught:
            load(tmp_path / "vq.pt")
        assert "\n" not in str(caught.value)
    cyclic: dict[str, Any] = {}
    cyclic["again"] = cyclic
    torch.save(cyclic, tmp_path / "vq.pt")
    with pytest.raises(TokenizerError, match="damaged"):
        load(tmp_path / "vq.pt")
    with pytest.raises(TokenizerError, match="is no file: expected one such as"):
        load(tmp_path)
