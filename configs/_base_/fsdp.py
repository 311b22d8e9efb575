# Fully sharded data parallel training, for models as large as DiNAT-Large: beside any config of this folder,
#     _base_ = ["CONFIG.py", "fsdp.py"]
# Every transformer block is a shard of its own; the rest of the model is one more. Checkpoints are whole files, and any
# number of processes can resume from them.
runner_type = "FlexibleRunner"
strategy = dict(
    type="ResumableFSDPStrategy",
    model_wrapper=dict(
        type="MMFullyShardedDataParallel", auto_wrap_policy=dict(type="wrap_dinat_blocks"), use_orig_params=True
    ),
    state_dict_cfg=dict(
        state_dict_type="FULL_STATE_DICT",
        state_dict_config=dict(type="FullStateDictConfig", offload_to_cpu=True, rank0_only=True),
        optim_state_dict_config=dict(type="FullOptimStateDictConfig", offload_to_cpu=True, rank0_only=True),
    ),
)
