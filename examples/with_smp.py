"""segmentation_models_pytorch: its DPT on a timm ViT with a method; decoder and head train with it, and are in its file."""

import segmentation_models_pytorch as smp
import torch
from common import run
from torch import Tensor, nn

import vpeft
from vpeft.tasks.segmentation.scenes import SCENE_CLASSES, SceneOptions, Scenes

SIZE = 64


def segmenter() -> nn.Module:
    """Of smp's decoders DPT takes plain ViTs; a Swin that timm has taken apart for the others cannot be read."""
    import timm

    model = smp.DPT(
        "tu-vit_micro_patch4_28",
        encoder_depth=4,
        encoder_weights=None,
        decoder_fusion_channels=64,
        classes=len(SCENE_CLASSES),
        dynamic_img_size=True,
    )
    pretrained = timm.create_model("vit_micro_patch4_28.vpeft_fashion", pretrained=True, num_classes=0)
    model.encoder.model.load_state_dict(pretrained.state_dict(), strict=False)  # smp leaves out the last norm
    return model


def scenes(split: str, number: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 64, 64), normalised as for the backbone, and masks (N, 64, 64)."""
    made = Scenes(split, number, SceneOptions(SIZE))
    images, masks = zip(*(made[i] for i in range(number)), strict=True)
    x = torch.stack([torch.from_numpy(i) for i in images]).permute(0, 3, 1, 2).float() / 255
    return (x - 0.286) / 0.353, torch.stack([torch.from_numpy(m) for m in masks]).long()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Mean over classes of the share of a class's pixels that are found."""
    found = model.eval()(images).argmax(1)
    return torch.stack([(found[masks == c] == c).float().mean() for c in masks.unique()]).mean().item()


def main(epochs: int = 5, images: int = 400, out: str = "smp.safetensors") -> float:
    torch.manual_seed(0)
    model = segmenter()
    heads = {"decoder": model.decoder, "segmentation": model.segmentation_head}
    peft = vpeft.attach(model.encoder.model, "adaptformer", heads=heads, bottleneck=16)
    optimizer = torch.optim.AdamW(peft.param_groups(lr=2e-3, weight_decay=1e-4))
    x, masks = scenes("train", images)
    loss_function = smp.losses.DiceLoss("multiclass")
    for epoch in range(epochs):
        peft.train()
        for chosen in torch.randperm(images).split(8):
            logits = model(x[chosen])
            loss = loss_function(logits, masks[chosen]) + nn.functional.cross_entropy(logits, masks[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")
    peft.save(out)
    fresh = segmenter()
    vpeft.load(fresh.encoder.model, out, heads={"decoder": fresh.decoder, "segmentation": fresh.segmentation_head})
    return accuracy(fresh, *scenes("test", 50))


if __name__ == "__main__":
    run(main, __doc__, "smp.safetensors")
