"""The Hugging Face Trainer with `optimizers=(SPGOptimizer(...), scheduler)`."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from . import training

pytestmark = [pytest.mark.dropin(line=20), pytest.mark.filterwarnings("ignore"),
              pytest.mark.parametrize("inner", training.INNERS)]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = training.network()

    def forward(self, x, labels):
        return {"loss": training.loss_of(self.net, (x, labels))}


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(training.dataset())


def run(model, optimizer, folder, resume=None, **settings):
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=training.STEPS, per_device_train_batch_size=training.BATCH, use_cpu=True, report_to="none",
        save_strategy="steps", save_steps=training.STEPS // 2, disable_tqdm=True, logging_strategy="no", **settings)
    rows = [{"x": x, "labels": y} for x, y in training.dataset()]
    trainer = InOrder(model, arguments, train_dataset=rows, optimizers=(optimizer, training.schedule(optimizer)))
    trainer.train(resume_from_checkpoint=resume)


@pytest.mark.compatibility("Hugging Face Trainer: `optimizers=(opt, scheduler)`, clipping, bf16", "transformers", "works")
@pytest.mark.parametrize("bf16, clip", [(False, 0.0), (False, 0.1), (True, 0.1)])
def test_a_run(inner, bf16, clip, tmp_path):
    model = Model()
    optimizer = training.wrapped(model.net, inner, 0.5)
    run(model, optimizer, tmp_path, bf16=bf16, max_grad_norm=clip)
    training.check(model.net, optimizer, training.plain_run(inner, 0.5, bf16=bf16, clip=clip or None))
    frozen = Model()
    run(frozen, training.wrapped(frozen.net, inner, 1.0), tmp_path, bf16=bf16, max_grad_norm=clip)
    training.check_frozen(frozen.net)


@pytest.mark.compatibility("Hugging Face Trainer, resume_from_checkpoint", "transformers", "works",
                           "the importance is in `optimizer.pt`")
def test_a_resumed_run(inner, tmp_path):
    model = Model()
    run(model, training.wrapped(model.net, inner, 0.5), tmp_path, max_grad_norm=0.0)
    model = Model()
    optimizer = training.wrapped(model.net, inner, None)
    run(model, optimizer, tmp_path, resume=str(tmp_path / f"checkpoint-{training.STEPS // 2}"), max_grad_norm=0.0)
    training.check(model.net, optimizer, training.plain_run(inner, 0.5))
