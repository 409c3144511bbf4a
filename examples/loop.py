"""Train with Admin in your own training loop, on any number of processes. Differences to other loops are marked (1-4).

    accelerate launch examples/loop.py OUTPUT [UPDATES]

The pairs are artificial: the target is the source backwards. Use your own `DataLoader` instead.
"""

import sys

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import set_seed

from admin_hf import AdminConfig, AdminForConditionalGeneration, profile_and_initialize, reparameterize


output, updates = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2000
accelerator = Accelerator(gradient_accumulation_steps=2)
set_seed(0)  # the same weights on every process
END, PAD = 0, 99
words = torch.randint(2, PAD, (4096, 8))
ends = torch.full((4096, 1), END)
pairs = [
    {"input_ids": source, "labels": target}
    for source, target in zip(torch.cat([words, ends], 1), torch.cat([words.flip(1), ends], 1), strict=True)
]
loader = DataLoader(pairs, batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(0))

config = AdminConfig(vocab_size=100, d_model=64, encoder_layers=6, decoder_layers=6, encoder_attention_heads=4)  # (1)
model = AdminForConditionalGeneration(config)
profile_and_initialize(model, next(iter(loader)), output)  # (2) profile ω on one batch, before anything is wrapped
no_decay = [p for p in model.parameters() if p.ndim < 2]  # (3) no weight decay on ω, nor on biases and LayerNorms
groups = [{"params": [p for p in model.parameters() if p.ndim > 1]}, {"params": no_decay, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
schedule = LambdaLR(optimizer, lambda step: min((step + 1) / 200, (200 / (step + 1)) ** 0.5))
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

model.train()
done = 0
while done < updates:
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            done += 1
            if done % 100 == 0 or done == updates:
                accelerator.print(f"update {done}: loss {loss.item():.3f}")
        if done == updates:
            break

if accelerator.is_main_process:
    reparameterize(accelerator.unwrap_model(model)).save_pretrained(output)  # (4) a vanilla MarianMTModel
accelerator.end_training()
