"""Train a small ladder with transformers.Trainer, in one process or in many."""

import torch
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

import tlfast

torch.manual_seed(0)  # every process makes, or loads, the same backbone
bert = BertModel(BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
model = tlfast.LadderModel(tlfast.freeze(bert), num_labels=2, config=tlfast.LadderConfig(reduction=4))
texts = torch.randint(1, 100, (64, 12))
data = [{"input_ids": ids, "labels": (ids[0] > 50).long()} for ids in texts]

settings = TrainingArguments(
    output_dir="out",
    use_cpu=not torch.cuda.is_available(),  # without it, and without a GPU, each process would train alone
    per_device_train_batch_size=8,
    num_train_epochs=2,
    ddp_find_unused_parameters=False,  # all of a ladder's are used
    save_strategy="no",
    report_to="none",
)
trainer = Trainer(model, settings, train_dataset=data)
trainer.train()
if trainer.is_world_process_zero():
    model.save_pretrained("out")
