_base_ = "../../_base_/upernet-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="DiNAT",
        arch="dinat_mini",
        dilations="ade20k-512",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="dinat_mini"),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
