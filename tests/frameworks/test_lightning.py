"""Lightning's Trainer (automatic and manual optimization) and Fabric."""

import pytest
import torch

L = pytest.importorskip("lightning")

from . import training

pytestmark = [pytest.mark.dropin(line=20), pytest.mark.filterwarnings("ignore"),
              pytest.mark.parametrize("inner", training.INNERS)]


class Module(L.LightningModule):
    def __init__(self, inner: str, gamma: float | None, automatic: bool = True):
        super().__init__()
        self.net = training.network()
        self.inner, self.gamma = inner, gamma
        self.automatic_optimization = automatic

    def training_step(self, batch, index):
        loss = training.loss_of(self.net, batch)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.1)
            optimizer.step()
            self.lr_schedulers().step()
        return loss

    def configure_optimizers(self):
        optimizer = training.wrapped(self.net, self.inner, self.gamma)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": training.schedule(optimizer), "interval": "step"}}


def fit(module, folder, epochs=2, checkpoint=None, **settings):
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=folder, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **settings)
    trainer.fit(module, training.loader(), ckpt_path=checkpoint)
    return trainer, trainer.optimizers[0]


@pytest.mark.compatibility("Lightning, automatic optimization: closure, schedule, clipping, bf16", "lightning", "works")
@pytest.mark.parametrize("precision, clip", [("32-true", None), ("32-true", 0.1), ("bf16-mixed", 0.1)])
def test_a_run(inner, precision, clip, tmp_path):
    module = Module(inner, 0.5)
    _, optimizer = fit(module, tmp_path, precision=precision, gradient_clip_val=clip)
    training.check(module.net, optimizer, training.plain_run(inner, 0.5, bf16=precision != "32-true", clip=clip))
    frozen = Module(inner, 1.0)
    fit(frozen, tmp_path, precision=precision, gradient_clip_val=clip)
    training.check_frozen(frozen.net)


@pytest.mark.compatibility("Lightning, manual optimization", "lightning", "works")
def test_a_manual_run(inner, tmp_path):
    module = Module(inner, 0.5, automatic=False)
    _, optimizer = fit(module, tmp_path)
    training.check(module.net, optimizer, training.plain_run(inner, 0.5, clip=0.1))


@pytest.mark.compatibility("Lightning, resume from a checkpoint", "lightning", "works", "the importance is in the checkpoint")
def test_a_resumed_run(inner, tmp_path):
    trainer, _ = fit(Module(inner, 0.5), tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    module = Module(inner, None)
    _, optimizer = fit(module, tmp_path, checkpoint=tmp_path / "half.ckpt")
    training.check(module.net, optimizer, training.plain_run(inner, 0.5))


def run_fabric(net, optimizer, epochs, precision="32-true", clip=None, state=None):
    fabric = L.Fabric(accelerator="cpu", precision=precision)
    model, outer = fabric.setup(net, optimizer)
    scheduler = training.schedule(outer)
    saved = {"model": model, "optimizer": outer, "scheduler": scheduler}
    if state is not None:
        fabric.load(state, saved)
    for _ in range(epochs):
        for batch in fabric.setup_dataloaders(training.loader()):
            outer.zero_grad()
            with fabric.autocast():
                loss = training.loss_of(net, batch)
            fabric.backward(loss)
            if clip is not None:
                fabric.clip_gradients(model, outer, max_norm=clip)
            outer.step()
            scheduler.step()
    return fabric, saved


@pytest.mark.compatibility("Fabric: schedule, clipping, bf16", "lightning", "works")
@pytest.mark.parametrize("precision, clip", [("32-true", None), ("bf16-mixed", 0.1)])
def test_a_fabric_run(inner, precision, clip):
    net = training.network()
    optimizer = training.wrapped(net, inner, 0.5)
    _, saved = run_fabric(net, optimizer, 2, precision, clip)
    training.check(net, optimizer, training.plain_run(inner, 0.5, bf16=precision != "32-true", clip=clip))
    frozen = training.network()
    run_fabric(frozen, training.wrapped(frozen, inner, 1.0), 2, precision, clip)
    training.check_frozen(frozen)
    saved["optimizer"].accumulate_importance()
    assert not torch.equal(optimizer.importance["trunk.0.weight"],
                           training.wrapped(net, inner, 0.5).importance["trunk.0.weight"])


@pytest.mark.compatibility("Fabric, save and load", "lightning", "works", "the importance is in the checkpoint")
def test_a_resumed_fabric_run(inner, tmp_path):
    net = training.network()
    fabric, saved = run_fabric(net, training.wrapped(net, inner, 0.5), 1)
    fabric.save(tmp_path / "half.ckpt", saved)
    net = training.network()
    optimizer = training.wrapped(net, inner, None)
    run_fabric(net, optimizer, 1, state=tmp_path / "half.ckpt")
    training.check(net, optimizer, training.plain_run(inner, 0.5))
