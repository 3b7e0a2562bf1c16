"""fastai's Learner on a timm model with a method."""

import fastai.callback.schedule  # noqa: F401 - gives Learner its fit_one_cycle
import torch
from common import accuracy, backbone, loaders, run
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy as metric

import vpeft


def main(epochs: int = 5, images: int = 1000, out: str = "fastai.safetensors") -> float:
    torch.manual_seed(0)
    model = backbone()
    train, test = loaders(model, images)
    peft = vpeft.attach(model, "adaptformer", bottleneck=16)
    # Two groups, so that fine_tune() trains the head alone first. Its unfreeze() sets free what the splitter gives: never
    # give model.parameters().
    learner = Learner(
        DataLoaders(train, test, device=torch.device("cpu")),
        model,
        loss_func=torch.nn.CrossEntropyLoss(),
        splitter=lambda model: [list(peft.parameters()), [p for _, p in peft.head_parameters()]],
        metrics=metric,
    )
    learner.remove_cb(ProgressCallback)
    learner.fit_one_cycle(epochs, 1e-2)
    peft.save(out)
    fresh = backbone()
    vpeft.load(fresh, out)
    return accuracy(fresh, test)


if __name__ == "__main__":
    run(main, __doc__, "fastai.safetensors")
