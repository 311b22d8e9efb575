_base_ = "../../_base_/upernet-160k_ade20k-640x640.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="DiNAT",
        arch="dinat_large",
        dilations="ade20k-640",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="dinat_large_21k"),
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(type="OptimWrapper")
