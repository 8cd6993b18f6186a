"""The paper, in reading order. Tensors in, tensors out; needs nothing but torch.

| equation | function |
|---|---|
| (1) cosine of pixel and prototype | `similarity.cosine_similarity` |
| (1), (2) a class scores as its nearest prototype | `similarity.class_similarity` |
| (3), (4) balanced clustering within each class | `clustering.sinkhorn`, `clustering.balanced_assignment` |
| (2) cross-entropy at label resolution | `losses.segmentation_cross_entropy` |
| (5) pixel-prototype contrast | `losses.pixel_prototype_contrast` |
| (6) pixel-prototype distance | `losses.pixel_prototype_distance` |
| (7) total loss | `losses.total_loss` |
| (8) momentum update | `prototypes.assigned_sums`, `prototypes.momentum_step` |
| all of them | `head.PrototypeHead`; with the classes over ranks `sharded.ShardedPrototypeHead` |
"""
