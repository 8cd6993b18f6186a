"""The blocks of docs/own-network.md run, in their order."""

import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing import assert_close

from protoseg.tasks.training import quiet_lightning

DOC = Path(__file__).parents[1] / "docs" / "own-network.md"


def test_the_head_in_a_network_of_ones_own(tmp_path):
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3, stride=4, padding=1), torch.nn.ReLU())
    batches = [(torch.randn(2, 3, 16, 24), torch.randint(19, (2, 16, 24))) for _ in range(3)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    names = {"backbone": backbone, "loader": loader, "device": "cpu"}
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 9
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    try:
        for block in blocks:
            exec(compile(block, DOC.name, "exec"), names)
    finally:
        dist.destroy_process_group()

    net, images = names["net"], names["images"]
    whole = torch.nn.functional.interpolate(net(images), size=(16, 24), mode="bilinear")
    assert_close(names["labels"].float(), whole.argmax(1).float())
    assert_close(names["head"].prototypes.norm(dim=-1), torch.ones(19, 10))
    wide = torch.randn(3, 64, 5, 7)
    assert_close(names["exported"].module()(wide), net.head(wide))

    trainer = names["lightning"].Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    before = net.head.prototypes.clone()
    with quiet_lightning():
        trainer.fit(names["Module"](net.train()), loader)
    assert not torch.equal(net.head.prototypes, before)
    (copying,) = [line for block in blocks for line in block.splitlines() if line.startswith("average.module.load")]
    assert not torch.equal(names["average"].module.head.prototypes, net.head.prototypes)
    exec(copying, names)
    assert torch.equal(names["average"].module.head.prototypes, net.head.prototypes)
