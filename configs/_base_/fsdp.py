# Fully sharded data parallel training, for models as large as DiNAT-Large: beside any config of this folder,
#     _base_ = ["CONFIG.py", "fsdp.py"]
# Every transformer block is a shard of its own; the rest of the model is one more.
runner_type = "FlexibleRunner"
strategy = dict(
    type="FSDPStrategy",
    model_wrapper=dict(
        type="MMFullyShardedDataParallel", auto_wrap_policy=dict(type="wrap_dinat_blocks"), use_orig_params=True
    ),
)
