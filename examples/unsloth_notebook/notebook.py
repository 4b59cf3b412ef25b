"""A continued-pretraining notebook for Unsloth on steep: the calls of such a notebook, with changed import lines.

Usage: python notebook.py MODEL [ROWS]    MODEL: a folder, a run of steep or a .gguf file; ROWS: of docstrings.jsonl, default 600.
"""

import sys
from threading import Thread

from datasets import load_dataset
from transformers import TextIteratorStreamer

from steep import memory_plot
from steep.unsloth import (
    FastLanguageModel,
    UnslothTrainer,
    UnslothTrainingArguments,
    gpu_mem_used,
    is_bfloat16_supported,
    torch,  # torch itself on a GPU; without one it reports for the CPU
)

max_seq_length = 512


def stream(prompt: str) -> None:
    """Print the continuation of the prompt piece by piece; it is generated in a separate thread."""
    FastLanguageModel.for_inference(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    inputs.to("cuda")
    streamer = TextIteratorStreamer(tokenizer)
    thread = Thread(target=model.generate, kwargs=dict(inputs, streamer=streamer, max_new_tokens=48, use_cache=True))
    thread.start()
    for piece in streamer:
        print(piece, end="")
    print()
    thread.join()
    FastLanguageModel.for_training(model)


# The model
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=sys.argv[1],
    max_seq_length=max_seq_length,
    dtype=None,
    load_in_4bit=True,
)
memory = {"model": gpu_mem_used()}

# The data: every text ends with the end-of-text token, which Unsloth requires
EOS_TOKEN = tokenizer.eos_token
rows = sys.argv[2] if len(sys.argv) > 2 else "600"
dataset = load_dataset("json", data_files="docstrings.jsonl", split=f"train[:{rows}]")
dataset = dataset.map(lambda examples: {"text": [text + EOS_TOKEN for text in examples["text"]]}, batched=True)

# Before training
gpu_stats = torch.cuda.get_device_properties(0)
start_gpu_memory = round(torch.cuda.max_memory_reserved() / 1024 / 1024 / 1024, 3)
max_memory = round(gpu_stats.total_memory / 1024 / 1024 / 1024, 3)
print(f"{gpu_stats.name}, {max_memory} GB, {start_gpu_memory} GB reserved")
stream("Return a new list containing")
memory["forward pass"] = gpu_mem_used()

# The adapter
model = FastLanguageModel.get_peft_model(
    model,
    r=32,
    lora_alpha=32,
    use_rslora=True,
    target_modules=[
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("embed_tokens", "lm_head"),
    ],
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    loftq_config=None,
)
memory["adapter"] = gpu_mem_used()

# Training
trainer = UnslothTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=max_seq_length,
    dataset_num_proc=8,
    args=UnslothTrainingArguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        num_train_epochs=1,
        learning_rate=2e-3,
        embedding_learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        optim="adamw_8bit",
        weight_decay=0.0,
        logging_steps=5,
        report_to="none",
        seed=3407,
        output_dir="runs",
    ),
)
trainer_stats = trainer.train()
memory["training"] = gpu_mem_used()

# Time and memory
used_memory = round(torch.cuda.max_memory_reserved() / 1024 / 1024 / 1024, 3)
print(f"{trainer_stats.metrics['train_runtime']:.1f} seconds for {trainer_stats.global_step} steps")
print(f"peak {used_memory} GB, {round(used_memory - start_gpu_memory, 3)} GB of it for training")
readings = [float(figure.split()[0]) for figure in memory.values()]
added = {name: (now - before) * 2**30 for name, now, before in zip(memory, readings, [0.0, *readings], strict=False)}
memory_plot(added, used_memory * 2**30, labels=("added by stage", "peak")).savefig("memory.png")

# After training
stream("Return a new list containing")
model.save_pretrained("lora_model")
tokenizer.save_pretrained("lora_model")
