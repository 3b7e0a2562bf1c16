# mmsegmentation's own UPerNet on a plain ViT, with AdaptFormer. The pyramid stands in the place of the neck; the optimiser
# takes what is trained alone, at a learning rate for adapters; images are normalised as this timm model wants them (the
# mean and std of its pretrained_cfg, times 255). Not run here.
# ("mmseg::…" names the same file where setuptools, older than 81, still has pkg_resources.)
_base_ = __import__("mmseg").__path__[0] + "/.mim/configs/vit/vit_vit-b16_mln_upernet_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(imports=["vpeft.integrations.mmseg"])
model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="vpeft.TimmBackbone",
        model="vit_base_patch16_224.augreg_in21k",
        pretrained=True,
        img_size=512,
        method=dict(name="adaptformer", bottleneck=64),
        out_indices=(2, 5, 8, 11),
        pyramid="feature2pyramid",
    ),
    neck=None,
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="vpeft.TrainedOnly",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01),
)
default_hooks = dict(checkpoint=dict(_delete_=True, type="vpeft.SaveTrained", interval=16000, save_best="mIoU"))
