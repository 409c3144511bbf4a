"""Train a deep translation model with Admin in the Seq2SeqTrainer of Transformers, from text to a vanilla model.

    python examples/trainer.py DATA en de --output_dir runs/en-de --max_steps 20000 --learning_rate 1e-3

DATA is a data set of the Hub, such as bentrevett/multi30k, or a folder with train.jsonl and validation.jsonl. It has
the columns `en` and `de`, and the splits `train` and `validation`. Flags are those of Seq2SeqTrainingArguments;
--push_to_hub publishes the model.
"""

import sys

import numpy as np
import sacrebleu
import transformers
from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from admin_hf import AdminConfig, AdminForConditionalGeneration, AdminProfilingCallback, AdminPublishingCallback


name, *languages = sys.argv[1:4]
defaults = ["--lr_scheduler_type=inverse_sqrt", "--warmup_steps=500", "--predict_with_generate"]
parser = transformers.HfArgumentParser(transformers.Seq2SeqTrainingArguments)
(args,) = parser.parse_args_into_dataclasses([*defaults, *sys.argv[4:]])
data = load_dataset(name)

# One vocabulary for both languages. The model needs tokens for padding and for the end of a sentence.
bpe = Tokenizer(models.BPE(unk_token="<unk>"))
bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
settings = trainers.BpeTrainer(vocab_size=8000, special_tokens=["</s>", "<unk>", "<pad>"])
bpe.train_from_iterator((row[language] for row in data["train"] for language in languages), settings)
bpe.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def encode(rows):
    source, target = (rows[language] for language in languages)
    return tokenizer(source, text_target=target, truncation=True, max_length=256)


def bleu(prediction):
    rows = (np.where(ids < 0, tokenizer.pad_token_id, ids) for ids in (prediction.predictions, prediction.label_ids))
    hypotheses, references = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in rows)
    return {"bleu": sacrebleu.corpus_bleu(hypotheses, [references]).score}


data = data.map(encode, batched=True, remove_columns=data["train"].column_names)
config = AdminConfig.for_tokenizer(tokenizer, d_model=256, encoder_layers=12, decoder_layers=12, label_smoothing=0.1)
model = AdminForConditionalGeneration(config)
collator = transformers.DataCollatorForSeq2Seq(tokenizer, model=model)
callbacks = [AdminProfilingCallback(), AdminPublishingCallback()]  # ω is measured before update 1, folded in the end
sets = {"train_dataset": data["train"], "eval_dataset": data["validation"], "data_collator": collator}
trainer = transformers.Seq2SeqTrainer(
    model, args, **sets, processing_class=tokenizer, compute_metrics=bleu, callbacks=callbacks
)
trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
print(trainer.evaluate())
trainer.push_to_hub() if args.push_to_hub else trainer.save_model()  # the vanilla model, by the second callback
