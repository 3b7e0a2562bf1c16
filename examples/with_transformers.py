"""Hugging Face Trainer on transformers' TimmWrapperForImageClassification, whose timm model gets the method."""

import tempfile

import torch
from common import accuracy, backbone, loaders, run
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, Trainer, TrainerCallback, TrainingArguments

import vpeft


class AfterStep(TrainerCallback):
    """What a few methods do after each update."""

    def __init__(self, peft: vpeft.Handle):
        self.peft = peft

    def on_optimizer_step(self, *args, **kwargs) -> None:
        self.peft.after_step()


class WithPenalty(Trainer):
    """Adds the method's penalty to the loss; most methods have none."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + vpeft.get_handle(self.accelerator.unwrap_model(model).timm_model).penalty()
        return (loss, outputs) if return_outputs else loss


def wrapper() -> TimmWrapperForImageClassification:
    """From the Hub it is ``from_pretrained("timm/vit_base_patch16_224.augreg_in21k", num_labels=10)``."""
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="vit_micro_patch4_28", num_labels=10))
    model.timm_model.load_state_dict(backbone().state_dict())
    return model


def as_dicts(loader) -> list[dict]:
    return [{"pixel_values": image, "labels": int(label)} for image, label in loader.dataset]


def main(epochs: int = 5, images: int = 1000, out: str = "transformers.safetensors") -> float:
    torch.manual_seed(0)
    train, test = loaders(backbone(), images)
    model = wrapper()
    peft = vpeft.attach(model.timm_model, "lora", rank=8)  # the timm model inside, not the wrapper
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=25,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,  # the adapter's values come back from the checkpoint by their names in the model
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        optimizer = torch.optim.AdamW(peft.param_groups(lr=1e-2))
        trainer = WithPenalty(
            model,
            arguments,
            train_dataset=as_dicts(train),
            eval_dataset=as_dicts(test),
            optimizers=(optimizer, None),
            callbacks=[AfterStep(peft)],
        )
        trainer.train()

    peft.save(out)
    fresh = wrapper()
    vpeft.load(fresh.timm_model, out)
    return accuracy(fresh.timm_model, test)


if __name__ == "__main__":
    run(main, __doc__, "transformers.safetensors")
