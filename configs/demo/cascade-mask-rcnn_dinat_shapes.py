# Slim Cascade Mask R-CNN on the shapes, with box heads as in the published rows: convolutions with SyncBN and one
# linear layer, GIoU loss on decoded boxes, a box for each class. `make demo-cascade` runs it.
_base_ = "mask-rcnn_dinat_shapes.py"

width = _base_.width
roi_head = _base_.model.roi_head
rcnn = _base_.model.train_cfg.rcnn
# of the three stages: deviations of the box coder, as in mmdet, and the overlap that makes a positive
stages = [((0.1, 0.1, 0.2, 0.2), 0.5), ((0.05, 0.05, 0.1, 0.1), 0.6), ((0.033, 0.033, 0.067, 0.067), 0.7)]

model = dict(
    type="CascadeRCNN",
    roi_head=dict(
        _delete_=True,
        type="CascadeRoIHead",
        num_stages=len(stages),
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_roi_extractor=roi_head.bbox_roi_extractor,
        bbox_head=[
            dict(
                type="ConvFCBBoxHead",
                num_shared_convs=2,
                num_shared_fcs=1,
                in_channels=width,
                conv_out_channels=width,
                fc_out_channels=256,
                roi_feat_size=7,
                num_classes=len(_base_.classes),
                norm_cfg=dict(type="SyncBN", requires_grad=True),
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=deviations),
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
            )
            for deviations, _ in stages
        ],
        mask_roi_extractor=roi_head.mask_roi_extractor,
        mask_head=roi_head.mask_head,
    ),
    train_cfg=dict(
        rcnn=[
            {**rcnn, "assigner": {**rcnn.assigner, "pos_iou_thr": iou, "neg_iou_thr": iou, "min_pos_iou": iou}}
            for _, iou in stages
        ],
    ),
)
