"""Lightning: a module that holds the model and its handle; its checkpoints hold the adapter and no frozen weights."""

import tempfile
from pathlib import Path

import lightning
import torch
from common import accuracy, backbone, loaders, run
from lightning.pytorch.callbacks import ModelCheckpoint

import vpeft


class Tuned(lightning.LightningModule):
    """``load_from_checkpoint`` calls ``__init__`` with the saved arguments: the method is there before values come."""

    strict_loading = False  # the frozen weights are not in the checkpoint

    def __init__(self, method: str = "lora", options: dict | None = None, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()  # plain values; never the model or the handle
        self.model = backbone()
        self.peft = vpeft.attach(self.model, method, **(options or {}))

    def on_train_epoch_start(self) -> None:
        self.peft.train()  # Lightning leaves modes as they are; the frozen part belongs in eval mode

    def training_step(self, batch, index):
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.model(images), labels) + self.peft.penalty()

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        self.peft.after_step()

    def validation_step(self, batch, index):
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.peft.param_groups(lr=self.hparams.lr))

    def on_save_checkpoint(self, checkpoint) -> None:
        trained = {f"model.{name}" for name in (*self.peft.state_dict(), *self.peft.head_state_dict())}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: t for n, t in state.items() if n in trained or n.startswith("model.vpeft.")}


def main(epochs: int = 5, images: int = 1000, out: str = "lightning.safetensors") -> float:
    lightning.seed_everything(0)
    module = Tuned(options={"rank": 8})
    train, test = loaders(module.model, images)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="accuracy", mode="max")
        trainer = lightning.Trainer(max_epochs=epochs, callbacks=[best], logger=False, enable_progress_bar=False)
        trainer.fit(module, train, test)
        print(f"checkpoint of {Path(best.best_model_path).stat().st_size / 1e6:.1f} MB")
        module = Tuned.load_from_checkpoint(best.best_model_path)
    module.peft.save(out)
    fresh = backbone()
    vpeft.load(fresh, out)
    return accuracy(fresh, test)


if __name__ == "__main__":
    run(main, __doc__, "lightning.safetensors")
