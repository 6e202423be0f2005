"""Nothing is forgotten: the logits of every task learnt, after each later one."""

import lightning.pytorch as pl
import torch

import lightning_sparse_cl as scl


class Logits(pl.Callback):
    """Logits of every task learnt on its test data, after every task, from the compact subnetwork and the whole."""

    def __init__(self):
        self.after = []

    @torch.no_grad()
    def on_after_task_end(self, trainer, pl_module, task):
        learnt, data, found = scl.Subnetworks.of(pl_module), trainer.datamodule, []
        assert len(learnt) == task + 1
        training = pl_module.training
        pl_module.eval()
        for t, loader in enumerate(data.test_dataloader()[: task + 1]):
            x = torch.cat([data.prepare(images, augment=False) for images, _ in loader])
            found.append(learnt.network(t)(x))
            with learnt.use(t):
                whole = getattr(pl_module, "network", pl_module)(x)[:, data.classes[t]]
            torch.testing.assert_close(found[-1], whole, rtol=1e-4, atol=1e-4)
            if isinstance(pl_module, scl.IsolatingModule) and data.classes[t] != data.classes[-1]:
                assert torch.equal(pl_module(x)[:, data.classes[t]], found[-1])
        pl_module.train(training)
        self.after.append(found)

    def assert_same(self):
        for i, later in enumerate(self.after):
            for t, logits in enumerate(later):
                assert torch.equal(logits, self.after[t][t]), f"task {t} after task {i}"
