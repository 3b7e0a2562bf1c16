"""A loop of plain PyTorch: bfloat16 autocast, a moving average of the weights, and the file of the averaged adapter."""

import torch
from common import accuracy, backbone, loaders, run
from timm.utils import ModelEmaV3

import vpeft


def main(epochs: int = 5, images: int = 1000, out: str = "plain.safetensors") -> float:
    torch.manual_seed(0)
    model = backbone()
    train, test = loaders(model, images)
    peft = vpeft.attach(model, "lora", rank=8)
    optimizer = torch.optim.AdamW(peft.param_groups(lr=1e-2, weight_decay=0.01))  # biases and the like: no decay
    average = ModelEmaV3(model, decay=0.8)  # a deepcopy of the model: get_handle finds the method in it

    for epoch in range(epochs):
        peft.train()  # what trains; the frozen part stays in eval mode, so its dropout is off
        for images, labels in train:
            with torch.autocast("cpu", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(images), labels) + peft.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            peft.after_step()  # a few methods do something here
            average.update(model)
        print(f"epoch {epoch}: {accuracy(average.module, test):.4f}")

    vpeft.get_handle(average.module).save(out)  # the adapter and its head alone
    fresh = backbone()
    vpeft.load(fresh, out)
    return accuracy(fresh, test)


if __name__ == "__main__":
    run(main, __doc__, "plain.safetensors")
