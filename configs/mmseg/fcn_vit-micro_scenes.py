# Runs on one CPU core. Write the data set first, in the folder that data_root is relative to:
#   python -c "from vpeft.tasks.segmentation.scenes import write_scenes; write_scenes('data/scenes', train=400, val=50)"
# then train it like any configuration of mmsegmentation: Runner.from_cfg(Config.fromfile(…)).train().
default_scope = "mmseg"
custom_imports = dict(imports=["vpeft.integrations.mmseg"])
work_dir = "work_dirs/fcn_vit-micro_scenes"
data_root = "data/scenes"
size = (56, 56)
metainfo = dict(
    classes=(
        "background", "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
        "Ankle boot",
    ),
    palette=[
        [0, 0, 0], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48], [145, 30, 180],
        [70, 240, 240], [240, 50, 230], [170, 255, 195], [170, 110, 40],
    ],
)  # fmt: skip
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[72.93] * 3,
        std=[90.015] * 3,
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=size,
    ),
    backbone=dict(
        type="vpeft.TimmBackbone",
        model="vit_micro_patch4_28.vpeft_fashion",
        img_size=56,
        method=dict(name="adaptformer", bottleneck=8),
        out_indices=(-1,),
    ),
    decode_head=dict(
        type="FCNHead",
        in_channels=128,
        in_index=0,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=dict(type="BN"),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss"),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="BaseSegDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/train", seg_map_path="masks/train"),
        img_suffix=".png",
        metainfo=metainfo,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="BaseSegDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/val", seg_map_path="masks/val"),
        img_suffix=".png",
        metainfo=metainfo,
        pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")],
    ),
)
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_pipeline = val_dataloader["dataset"]["pipeline"]  # these three are for tools/test.py and for inference
test_dataloader, test_evaluator, test_cfg = val_dataloader, val_evaluator, dict(type="TestLoop")
visualizer = dict(type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer")
train_cfg = dict(type="IterBasedTrainLoop", max_iters=200, val_interval=200)
val_cfg = dict(type="ValLoop")
optim_wrapper = dict(
    type="OptimWrapper", constructor="vpeft.TrainedOnly", optimizer=dict(type="AdamW", lr=1e-2, weight_decay=1e-4)
)
param_scheduler = [dict(type="PolyLR", power=0.9, begin=0, end=200, eta_min=1e-5, by_epoch=False)]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="vpeft.SaveTrained", interval=50, keep=2, save_best="mIoU"),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
