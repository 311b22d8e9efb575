_base_ = "../../_base_/upernet-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="DiNAT_s",
        arch="dinat_s_tiny",
        dilations="ade20k-512",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="dinat_s_tiny"),
    )
)
