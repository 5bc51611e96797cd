"""Small random weights of the image tokenizers that load here, in the files that their authors or transformers write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional

from wds_tools.vq.lanes import side_by_side

Codes = Callable[[Tensor], Tensor]
Made = tuple[Any, Codes]
"""A model, and the codes it gives by its own API for pixels in [-1, 1]."""


def pixels(H: int = 32, W: int = 32, count: int = 2) -> Tensor:
    """Smooth noise: uint8 pixels_BHWC."""
    rng = torch.Generator().manual_seed(2)
    small = torch.rand(count, 3, H // 8, W // 8, generator=rng) * 255
    return functional.interpolate(small, (H, W), mode="bilinear").to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def one_by_one(codes: Codes, images_B: Tensor) -> Tensor:
    """What `codes` gives for each image by itself, on one thread: sums in one order, as the tokenizers take them.

    With a batch, or as many threads as there happen to be, a latent that is almost as near to a second entry can get that one.
    """
    found: list[Tensor] = [torch.empty(0)] * len(images_B)

    def work(place: int) -> None:
        with torch.no_grad():
            found[place] = codes(images_B[place : place + 1])

    side_by_side(work, range(len(images_B)))
    return torch.cat(found)


# --- VQGANs in their authors' files ----------------------------------------------------------------------------------


def vqgan(levels: Sequence[int] = (1, 1, 2, 2, 4), blocks: int = 2, z: int = 64, K: int = 512, D: int = 64) -> dict[str, Any]:
    """The settings of a small one."""
    return {"ch": 32, "ch_mult": [*levels], "num_res_blocks": blocks, "z_channels": z, "n_embed": K, "embed_dim": D}


def vqgan_state(config: Mapping[str, Any], *, llamagen: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Random weights, and what real checkpoints have beside them.

    Args:
        config: of `vqgan`.
        llamagen: named as LlamaGen's, which has attention at the lowest resolution; else as those of taming-transformers.
        seed: of the weights.
    """
    rng, state = torch.Generator().manual_seed(seed), {}
    state["quantize.codebook_used" if llamagen else "loss.discriminator.main.0.weight"] = torch.zeros(65536 if llamagen else 2)
    part, one, two, three = ("res", "0", "1", "2") if llamagen else ("block", "block_1", "attn_1", "block_2")

    def conv(name: str, cin: int, cout: int, kernel: int = 3) -> None:
        state[f"{name}.weight"] = torch.randn(cout, cin, kernel, kernel, generator=rng) / (cin * kernel**2) ** 0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(cout, generator=rng)

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(channels, generator=rng)
        state[f"{name}.bias"] = 0.2 * torch.randn(channels, generator=rng)

    def residual(name: str, cin: int, cout: int) -> None:
        norm(f"{name}.norm1", cin)
        conv(f"{name}.conv1", cin, cout)
        norm(f"{name}.norm2", cout)
        conv(f"{name}.conv2", cout, cout)
        if cin != cout:
            conv(f"{name}.nin_shortcut", cin, cout, 1)

    def attention(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        for what in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{what}", channels, channels, 1)

    def middle(name: str, channels: int) -> None:
        residual(f"{name}.{one}", channels, channels)
        attention(f"{name}.{two}", channels)
        residual(f"{name}.{three}", channels, channels)

    def level(name: str, number: int, blocks: int, cin: int) -> int:
        for block in range(blocks):
            residual(f"{name}.{part}.{block}", widths[number] if block else cin, widths[number])
            if llamagen and number == last:
                attention(f"{name}.attn.{block}", widths[number])
        return widths[number]

    widths, last = [config["ch"] * times for times in config["ch_mult"]], len(config["ch_mult"]) - 1
    channels, z, D = config["ch"], config["z_channels"], config["embed_dim"]
    conv("encoder.conv_in", 3, channels)
    for number in range(last + 1):
        name = f"encoder.conv_blocks.{number}" if llamagen else f"encoder.down.{number}"
        channels = level(name, number, config["num_res_blocks"], channels)
        if number < last:
            conv(f"{name}.downsample.conv", channels, channels)
    middle("encoder.mid", channels)
    norm("encoder.norm_out", channels)
    conv("encoder.conv_out", channels, z)
    conv("quant_conv", z, D, 1)
    conv("post_quant_conv", D, z, 1)
    conv("decoder.conv_in", z, channels)
    middle("decoder.mid", channels)
    for number in reversed(range(last + 1)):  # LlamaGen counts from the lowest resolution, the others from the highest
        name = f"decoder.conv_blocks.{last - number}" if llamagen else f"decoder.up.{number}"
        channels = level(name, number, config["num_res_blocks"] + 1, channels)
        if number:
            conv(f"{name}.upsample.conv", channels, channels)
    norm("decoder.norm_out", channels)
    conv("decoder.conv_out", channels, 3)
    state["quantize.embedding.weight"] = torch.randn(config["n_embed"], D, generator=rng)
    return state


def config_tree(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The yaml of `config`, as Lightning nests it; `changes` go to ddconfig, or to params if they belong there."""
    params = {key: changes.pop(key, config[key]) for key in ("n_embed", "embed_dim")}
    ddconfig = {key: config[key] for key in ("ch", "ch_mult", "num_res_blocks", "z_channels")}
    ddconfig |= {"double_z": False, "resolution": 512, "in_channels": 3, "out_ch": 3, "attn_resolutions": []}
    return {"model": {"target": "x.VQModel", "params": {**params, "ddconfig": {**ddconfig, "dropout": 0.0, **changes}}}}


def write_vqgan(folder: Path, tree: Any, state: Any, *, names: tuple[str, str] = ("vqgan.yaml", "vqgan.ckpt")) -> Path:
    """A folder as Chameleon's release has it, or with Emu3.5's names of files."""
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(yaml.safe_dump(tree))
    torch.save({"state_dict": state, "global_step": 3}, folder / names[1])
    return folder


# --- models in the folders of diffusers and transformers -------------------------------------------------------------

THREE = (1, 1, 2)
"""Levels of the smallest: stride 4."""


def vq_model(levels: Sequence[int] = THREE, **settings: Any) -> Made:
    """diffusers' VQModel."""
    import diffusers

    shape = {"latent_channels": 8, "num_vq_embeddings": 512, "vq_embed_dim": 8, **settings}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * len(levels), "up_block_types": ("UpDecoderBlock2D",) * len(levels)}
    model = diffusers.VQModel(block_out_channels=tuple(32 * times for times in levels), **kinds, **shape)

    def codes(pixels_BCHW: Tensor) -> Tensor:
        latents_BDhw = model.encode(pixels_BCHW).latents
        B, _, h, w = latents_BDhw.shape
        return model.quantize(latents_BDhw)[2][2].view(B, h, w)

    return model, codes


OWN: dict[str, dict[str, Any]] = {
    "Chameleon": {"num_embeddings": 512},
    "Emu3": {"codebook_size": 512, "temporal_downsample_factor": 2, "attn_resolutions": [2]},
    "Janus": {"num_embeddings": 512, "num_patches": 8},
}


def vqvae(kind: str, levels: Sequence[int] = THREE, **settings: Any) -> Made:
    """transformers' VQVAE of Chameleon, Emu3 or Janus."""
    import transformers

    shape = {"embed_dim": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [*levels], "num_res_blocks": 1}
    config = getattr(transformers, f"{kind}VQVAEConfig")(**{**shape, **OWN[kind], **settings})
    model = getattr(transformers, f"{kind}VQVAE")(config)
    stride = 1 << (len(levels) - 1)

    def codes(pixels_BCHW: Tensor) -> Tensor:
        B, _, H, W = pixels_BCHW.shape
        if kind == "Emu3":
            return torch.stack(model.encode(pixels_BCHW, torch.tensor([[H, W]] * B)).image_tokens)
        found: Tensor = model.encode(pixels_BCHW).image_tokens
        return found.view(B, H // stride, W // stride)

    return model, codes


def apertus(levels: Sequence[int] = THREE) -> Made:
    """The tokenizer of Apertus 1.5 and Emu3.5."""
    import transformers

    shape = {"embed_dim": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [*levels], "num_res_blocks": 1}
    config = transformers.Apertus1p5VisionTokenizerConfig(**shape, codebook_size=512, attn_resolutions=[64])
    model = transformers.Apertus1p5VisionTokenizerModel(config)
    return model, lambda pixels_BCHW: model.encode(pixels_BCHW).image_tokens


CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


def glm_image(levels: Sequence[int] = THREE) -> Made:
    """GLM-Image, whose tokenizer is inside the language model; it has no levels, but patches of their stride."""
    import transformers

    patch = 1 << (len(levels) - 1)
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "image_size": 32, "patch_size": patch}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = transformers.GlmImageConfig(
        text_config={**text, "num_key_value_heads": 2, "vision_vocab_size": 520, "pad_token_id": 0, "rope_parameters": rope},
        vision_config=vision,
        vq_config={"embed_dim": 16, "num_embeddings": 512, "latent_channels": 32},
    )
    model = transformers.GlmImageForConditionalGeneration(config)
    processor = transformers.GlmImageImageProcessor(
        patch_size=patch, merge_size=1, temporal_patch_size=1, do_resize=False, do_rescale=False, **CLIP
    )

    def codes(pixels_BCHW: Tensor) -> Tensor:
        B, _, H, W = pixels_BCHW.shape
        given = processor(list((pixels_BCHW + 1) / 2), return_tensors="pt")
        features = model.get_image_features(given["pixel_values"], given["image_grid_thw"]).pooler_output
        found: Tensor = model.get_image_tokens(features, given["image_grid_thw"])
        return found.view(B, H // patch, W // patch)

    return model, codes


MODELS: dict[str, Callable[[Sequence[int]], Made]] = {
    "vqmodel": vq_model,
    "chameleon": lambda levels: vqvae("Chameleon", levels),
    "emu3": lambda levels: vqvae("Emu3", levels, hidden_size=32 * levels[-1]),
    "janus": lambda levels: vqvae("Janus", levels),
    "emu35": apertus,
    "glm-image": glm_image,
}
"""Name of the tokenizer -> a model of so many levels."""


def spread(model: Any) -> None:
    """Give the weights a size with which many codebook entries are used; Emu3 makes its own that way, but for the codebook."""
    rng = torch.Generator().manual_seed(1)
    is_emu3 = type(model).__name__ == "Emu3VQVAE"
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim > 1 and (not is_emu3 or "quantize" in name):
                weights.normal_(std=(1 if "quantize" in name else weights[0].numel()) ** -0.5, generator=rng)


def save(name: str, folder: Path, levels: Sequence[int] = THREE) -> Made:
    """Make a model and write its folder."""
    torch.manual_seed(0)
    model, codes = MODELS[name](levels)
    model.eval()
    spread(model)
    model.save_pretrained(folder)
    if name == "glm-image":
        (folder / "preprocessor_config.json").write_text(json.dumps(CLIP))
    return model, codes
