# Cascade Mask R-CNN with the box heads of the published rows: four convolutions with SyncBN and one linear layer, GIoU
# loss on decoded boxes, a box for each class (without which a million parameters of the published number are missing).
# In a single process mmengine replaces SyncBN by BatchNorm, so that one CPU or GPU can train it.
_base_ = "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"

box_head = dict(
    type="ConvFCBBoxHead",
    num_shared_convs=4,
    num_shared_fcs=1,
    conv_out_channels=256,
    norm_cfg=dict(type="SyncBN", requires_grad=True),
    reg_class_agnostic=False,
    reg_decoded_bbox=True,
    loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
)
model = dict(roi_head=dict(bbox_head=[{**stage, **box_head} for stage in _base_.model.roi_head.bbox_head]))
