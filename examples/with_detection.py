"""torchvision's Faster R-CNN on a timm ViT with a method: boxes of garments in composed scenes."""

import torch
from common import BACKBONE, run
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign, box_iou, masks_to_boxes

import vpeft
from vpeft.tasks.segmentation.scenes import SceneOptions, Scenes

SIZE = 64


class Pyramid(nn.Module):
    """Maps of a plain ViT at two scales, as in ViTDet (arXiv 2203.16527): its last map, enlarged or not."""

    out_channels = 64

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit
        self.up = nn.ConvTranspose2d(vit.embed_dim, self.out_channels, 2, stride=2)
        self.same = nn.Conv2d(vit.embed_dim, self.out_channels, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        last = self.vit.forward_intermediates(images, indices=1, intermediates_only=True)[0]
        return {"0": self.up(last), "1": self.same(last)}


def detector() -> FasterRCNN:
    import timm

    vit = timm.create_model(BACKBONE, pretrained=True, num_classes=0, img_size=SIZE)
    mean, std = vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"]
    return FasterRCNN(
        Pyramid(vit),
        box_head=TwoMLPHead(Pyramid.out_channels * 5**2, 128),
        box_predictor=FastRCNNPredictor(128, num_classes=2),  # background and garment
        rpn_anchor_generator=AnchorGenerator(((16,), (28,)), ((0.7, 1.0, 1.4),) * 2),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], output_size=5, sampling_ratio=2),
        min_size=SIZE,
        max_size=SIZE,
        image_mean=mean,
        image_std=std,
        box_detections_per_img=10,
        box_batch_size_per_image=32,
        **{f"rpn_{when}_nms_top_n_{mode}": 50 for when in ("pre", "post") for mode in ("train", "test")},
    )


def scenes(split: str, number: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Images (3, 64, 64) in [0, 1] with boxes (N, 4) of the garments in them."""
    made = Scenes(split, number, SceneOptions(SIZE, objects=(1, 2), occlusion=False))
    found = []
    for image, mask in (made[i] for i in range(number)):
        values = [v for v in torch.from_numpy(mask).unique() if v > 0]
        boxes = masks_to_boxes(torch.stack([torch.from_numpy(mask) == v for v in values])) if values else torch.zeros(0, 4)
        boxes[:, 2:] += 1
        target = {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)}
        found.append((torch.from_numpy(image).permute(2, 0, 1).float() / 255, target))
    return found


@torch.no_grad()
def recall(model: FasterRCNN, data: list) -> float:
    """Share of garments that one of a scene's three most certain boxes covers with an overlap of one half."""
    model.eval()
    overlaps = [box_iou(t["boxes"], model([x])[0]["boxes"][:3]) for x, t in data]  # (garments, at most 3)
    found = [nn.functional.pad(overlap, (0, 1)).amax(1) > 0.5 for overlap in overlaps]
    return torch.cat(found).float().mean().item()


def heads(model: FasterRCNN) -> dict[str, nn.Module]:
    """All that trains beside the method; the handle saves it too."""
    pyramid = model.backbone
    return {"up": pyramid.up, "same": pyramid.same, "rpn": model.rpn, "roi_heads": model.roi_heads}


def main(epochs: int = 5, images: int = 400, out: str = "detection.safetensors") -> float:
    torch.manual_seed(0)
    model = detector()
    peft = vpeft.attach(model.backbone.vit, "adaptformer", heads=heads(model), bottleneck=16)
    optimizer = torch.optim.AdamW(peft.param_groups(lr=2e-3, weight_decay=1e-4))
    data = scenes("train", images)
    for epoch in range(epochs):
        model.train()  # torchvision returns losses in this mode alone
        peft.train()  # the frozen ViT in eval mode
        for chosen in torch.randperm(len(data)).split(8):
            batch, targets = zip(*(data[i] for i in chosen), strict=True)
            loss = sum(model(list(batch), list(targets)).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")
    peft.save(out)
    fresh = detector()
    vpeft.load(fresh.backbone.vit, out, heads=heads(fresh))
    return recall(fresh, scenes("test", min(images, 100)))


if __name__ == "__main__":
    run(main, __doc__, "detection.safetensors")
