# mmsegmentation's own UPerNet on ADE20K, with another backbone and another checkpoint hook. Not run at this length.
# ("mmseg::…" names the same file where setuptools, older than 81, still has pkg_resources.)
_base_ = (
    __import__("mmseg").__path__[0]
    + "/.mim/configs/swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
)
custom_imports = dict(imports=["vpeft.integrations.mmseg"])
model = dict(
    backbone=dict(
        _delete_=True,
        type="vpeft.TimmBackbone",
        model="swin_tiny_patch4_window7_224.ms_in1k",
        pretrained=True,
        img_size=512,
        method=dict(name="lora", rank=8),
        out_indices=(0, 1, 2, 3),
        norm="layer",
    ),
)
default_hooks = dict(checkpoint=dict(_delete_=True, type="vpeft.SaveTrained", interval=16000, save_best="mIoU"))
