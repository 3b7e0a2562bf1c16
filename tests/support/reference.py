"""A second, plain statement of ViT and Swin in explicit tensors: no hooks, no timm forward, no vpeft.

A method's formula is a subclass that overrides what the method changes. ``p`` holds the backbone's tensors by timm's
names, ``s`` the method's by the method cards' names.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Reference:
    def __init__(self, model: nn.Module, p: dict[str, Tensor], s: dict[str, Tensor], **options):
        self.model, self.p, self.s, self.options = model, p, s, options

    def __call__(self, image: Tensor) -> Tensor:
        return self.swin(image) if hasattr(self.model, "layers") else self.vit(image)

    # ---- what methods override ----

    def linear(self, path: str, x: Tensor) -> Tensor:
        return F.linear(x, self.p[f"{path}.weight"], self.p.get(f"{path}.bias"))

    def norm(self, path: str, x: Tensor) -> Tensor:
        w, b, eps = self.p[f"{path}.weight"], self.p[f"{path}.bias"], self.model.get_submodule(path).eps
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + eps).sqrt() * w + b

    def conv(self, path: str, x: Tensor) -> Tensor:
        w = self.p[f"{path}.weight"]
        patches = rearrange(x, "b c (h p) (w q) -> b h w (c p q)", p=w.shape[2], q=w.shape[3])
        return patches @ w.flatten(1).T + self.p[f"{path}.bias"]

    def branch1(self, path: str, x: Tensor, b1: Tensor) -> Tensor:
        """The stream after the attention branch, from the block's input and the branch's output."""
        return x + b1

    def branch2(self, path: str, u: Tensor, b2: Tensor) -> Tensor:
        """The stream after the MLP branch."""
        return u + b2

    def enter(self, index: int, path: str, x: Tensor) -> Tensor:
        return x

    def leave(self, index: int, path: str, x: Tensor) -> Tensor:
        return x

    # ---- backbone ----

    def gain(self, path: str, x: Tensor) -> Tensor:
        return x * self.p[f"{path}.gamma"] if f"{path}.gamma" in self.p else x

    def mlp(self, path: str, x: Tensor) -> Tensor:
        h = self.linear(f"{path}.fc1", x)
        return self.linear(f"{path}.fc2", 0.5 * h * (1 + torch.erf(h / 2**0.5)))

    def attend(self, path: str, x: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
        q, k, v = rearrange(self.linear(f"{path}.qkv", x), "b n (t h d) -> t b h n d", t=3, h=heads)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias
        return self.linear(f"{path}.proj", rearrange(scores.softmax(-1) @ v, "b h n d -> b n (h d)"))

    def vit(self, image: Tensor) -> Tensor:
        x = self.conv("patch_embed.proj", image).flatten(1, 2)
        batch, first = len(x), [self.p["cls_token"]]
        if "reg_token" in self.p:
            first.append(self.p["reg_token"])
        prefix = torch.cat(first, 1).expand(batch, -1, -1)
        position = self.p["pos_embed"]
        # With registers, positions are for the patches alone.
        alone = position.shape[1] == x.shape[1]
        x = torch.cat([prefix, x + position], 1) if alone else torch.cat([prefix, x], 1) + position
        for i, block in enumerate(self.model.blocks):
            path = f"blocks.{i}"
            x = self.enter(i, path, x)
            b1 = self.attend(f"{path}.attn", self.norm(f"{path}.norm1", x), block.attn.num_heads)
            u = self.branch1(path, x, self.gain(f"{path}.ls1", b1))
            b2 = self.mlp(f"{path}.mlp", self.norm(f"{path}.norm2", u))
            x = self.leave(i, path, self.branch2(path, u, self.gain(f"{path}.ls2", b2)))
        return self.linear("head", self.norm("norm", x)[:, 0])

    def swin(self, image: Tensor) -> Tensor:
        x = self.norm("patch_embed.norm", self.conv("patch_embed.proj", image))
        index = 0
        for s, stage in enumerate(self.model.layers):
            if s:
                x = rearrange(x, "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)
                x = self.norm(f"layers.{s}.downsample.norm", x) @ self.p[f"layers.{s}.downsample.reduction.weight"].T
            for i, block in enumerate(stage.blocks):
                path = f"layers.{s}.blocks.{i}"
                x = self.enter(index, path, x)
                u = self.branch1(path, x, self.windows(path, block, self.norm(f"{path}.norm1", x)))
                b2 = self.mlp(f"{path}.mlp", self.norm(f"{path}.norm2", u))
                x = self.leave(index, path, self.branch2(path, u, b2))
                index += 1
        return self.linear("head.fc", self.norm("norm", x).mean((1, 2)))

    def windows(self, path: str, block: nn.Module, x: Tensor) -> Tensor:
        (wh, ww), (sh, sw) = block.window_size, block.shift_size
        height, width = x.shape[1:3]
        x = torch.roll(x, (-sh, -sw), (1, 2))
        x = F.pad(x, (0, 0, 0, -width % ww, 0, -height % wh))
        full_h, full_w = x.shape[1:3]
        heads = block.attn.num_heads
        bias = self.relative(f"{path}.attn", wh, ww, heads)
        if sh or sw:
            row = (torch.arange(full_h) >= full_h - wh).long() + (torch.arange(full_h) >= full_h - sh)
            col = (torch.arange(full_w) >= full_w - ww).long() + (torch.arange(full_w) >= full_w - sw)
            region = rearrange(3 * row[:, None] + col, "(a h) (b w) -> (a b) (h w)", h=wh, w=ww)
            apart = (region[:, :, None] != region[:, None, :]).to(x.dtype) * -100.0
            bias = bias + apart.repeat(len(x), 1, 1)[:, None]
        cut = rearrange(x, "n (a h) (b w) c -> (n a b) (h w) c", h=wh, w=ww)
        cut = self.attend(f"{path}.attn", cut, heads, bias)
        x = rearrange(cut, "(n a b) (h w) c -> n (a h) (b w) c", a=full_h // wh, b=full_w // ww, h=wh)
        return torch.roll(x[:, :height, :width], (sh, sw), (1, 2))

    def relative(self, path: str, wh: int, ww: int, heads: int) -> Tensor:
        table = self.p[f"{path}.relative_position_bias_table"]
        y, x = (t.flatten() for t in torch.meshgrid(torch.arange(wh), torch.arange(ww), indexing="ij"))
        index = (y[:, None] - y + wh - 1) * (2 * ww - 1) + (x[:, None] - x + ww - 1)
        return rearrange(table[index], "n m h -> h n m")
