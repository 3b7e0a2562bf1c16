"""timm's ViT as one of huggingface transformers, with the same tensors."""

import re
from types import ModuleType

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

# timm's names without ``weight`` and ``bias``; in a block, what follows ``blocks.N.``.
MODEL = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "head": "classifier",
}
BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))


def in_transformers(transformers: ModuleType, model: VisionTransformer) -> nn.Module:
    """A ``ViTForImageClassification`` that computes what ``model`` does."""
    block, patches = model.blocks[0], model.patch_embed
    config = transformers.ViTConfig(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=block.norm1.eps,
        image_size=patches.img_size[0],
        patch_size=patches.patch_size[0],
        qkv_bias=True,
        num_labels=model.num_classes,
        attn_implementation="sdpa",  # "eager" takes the softmax in float32
    )
    made = transformers.ViTForImageClassification(config).to(model.cls_token.dtype).eval()
    made.load_state_dict(translated(model.state_dict()))  # strict: every tensor of theirs is written
    return made


def translated(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by timm's names (values, or gradients) as copies by transformers' names, query, key and value apart."""
    found = {}
    for name, tensor in tensors.items():
        module, _, kind = re.fullmatch(r"(.+?)(\.(weight|bias))?", name).group(1, 2, 3)
        end = f".{kind}" if kind else ""
        if block := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
            prefix, inner = f"vit.encoder.layer.{block[1]}", block[2]
            names = QKV if inner == "attn.qkv" else (BLOCK[inner],)
            names = [f"{prefix}.{n}" for n in names]
        else:
            names = [MODEL[module]]
        found |= {f"{n}{end}": t.detach().clone() for n, t in zip(names, tensor.chunk(len(names)), strict=True)}
    return found
