"""accelerate: prepare, save_state and load_state; start with ``accelerate launch`` for several processes."""

import tempfile

import torch
from accelerate import Accelerator
from common import accuracy, backbone, loaders, run

import vpeft


def main(epochs: int = 5, images: int = 1000, out: str = "accelerate.safetensors") -> float:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = backbone()
    train, test = loaders(model, images)
    peft = vpeft.attach(model, "adaptformer", bottleneck=16)  # before prepare, in every process
    optimizer = torch.optim.AdamW(peft.param_groups(lr=1e-2))
    wrapped, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)

    def steps(epochs: int) -> None:
        for _ in range(epochs):
            peft.train()
            for images, labels in train:
                loss = torch.nn.functional.cross_entropy(wrapped(images), labels) + peft.penalty()
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                peft.after_step()

    steps(epochs - epochs // 2)
    with tempfile.TemporaryDirectory() as folder:  # stop and go on: the state holds the adapter by its names in the model
        accelerator.save_state(folder)
        accelerator.load_state(folder)
    steps(epochs // 2)
    print(f"process {accelerator.process_index}: {accuracy(wrapped, test):.4f}")

    if accelerator.is_main_process:
        peft.save(out)
    accelerator.wait_for_everyone()
    fresh = backbone().to(accelerator.device)
    vpeft.load(fresh, out)
    return accuracy(fresh, test)


if __name__ == "__main__":
    run(main, __doc__, "accelerate.safetensors")
