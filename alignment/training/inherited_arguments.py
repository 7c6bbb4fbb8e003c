"""What is taken from PaddleNLP's TrainingArguments: the fields by group, their limits and help, and old keys."""

from __future__ import annotations

from typing import Any

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial")
UNBUILT_DEGREES = (
    "sep_parallel_degree",
    "context_parallel_degree",
    "expert_parallel_degree",
    "expert_tensor_parallel_degree",
)

INHERITED: dict[str, tuple[str, ...]] = {
    "Length of the run": ("max_steps", "num_train_epochs", "seed"),
    "Batches": (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "per_device_eval_batch_size",
        "dataloader_drop_last",
    ),
    "Optimizer": (
        "learning_rate",
        "lr_scheduler_type",
        "warmup_ratio",
        "warmup_steps",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
    ),
    "Precision and memory": ("bf16", "fp16", "fp16_opt_level", "recompute"),
    "Evaluation": (
        "evaluation_strategy",
        "eval_steps",
        "metric_for_best_model",
        "greater_is_better",
        "load_best_model_at_end",
    ),
    "Output": (
        "output_dir",
        "logging_dir",
        "disable_tqdm",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "use_async_save",
        "overwrite_output_dir",
    ),
    "Parallelism": (
        "tensor_parallel_degree",
        "pipeline_parallel_degree",
        "sharding",
        "sharding_parallel_degree",
        "sharding_degree",
        "sequence_parallel",
        *UNBUILT_DEGREES,
    ),
}
LIMITS: dict[str, dict[str, Any]] = {
    **{name: {"help": "More than 1 is not available yet."} for name in UNBUILT_DEGREES},
    "tensor_parallel_degree": {"help": "Processes that share each large matrix; -1: 1."},
    "pipeline_parallel_degree": {"help": "Processes that share the layers, one stage each; -1: 1."},
    "sharding": {
        "help": 'What processes with the same weights divide: "stage1" the optimizer, "stage2" also gradients, '
        '"stage3" also parameters; "": nothing.'
    },
    "sharding_parallel_degree": {"help": "Processes that divide it; -1: all that the other degrees leave."},
    "sharding_degree": {"help": "The same, by its old name."},
    "sequence_parallel": {"help": "Divide norms' activations over tensor-parallel processes by tokens."},
    "max_steps": {"ge": -1, "help": "Optimizer steps, of PPO iterations; -1: what num_train_epochs gives."},
    "seed": {"ge": 0, "lt": 2**32},
    "per_device_train_batch_size": {
        "ge": 1,
        "help": "Samples of a forward and backward pass, for each share of the data: processes that divide a model "
        "(tensor, pipeline) have one share.",
    },
    "gradient_accumulation_steps": {"ge": 1, "help": "Such passes for an optimizer step."},
    "per_device_eval_batch_size": {"ge": 1, "help": "Samples of a pass that does not train, for each share."},
    "learning_rate": {"gt": 0},
    "lr_scheduler_type": {"choices": SCHEDULES, "help": "Schedule of the learning rate."},
    "warmup_ratio": {"ge": 0, "le": 1},
    "warmup_steps": {"ge": 0},
    "weight_decay": {"ge": 0},
    "adam_beta1": {"ge": 0, "lt": 1},
    "adam_beta2": {"ge": 0, "lt": 1},
    "adam_epsilon": {"gt": 0},
    "max_grad_norm": {"ge": 0, "help": "Gradients are scaled down to this norm; 0 turns clipping off."},
    "num_train_epochs": {"gt": 0, "help": "Passes over the training data; max_steps replaces it."},
    "bf16": {"help": "Train in bfloat16; without a GPU, in float32."},
    "fp16": {"help": "Not available yet (it needs loss scaling); use bf16."},
    "fp16_opt_level": {"choices": ("O1", "O2"), "help": "16-bit training: O2 also keeps the weights in 16 bits."},
    "recompute": {"help": "Compute activations again in the backward pass to save memory."},
    "eval_steps": {"ge": 1, "help": "Evaluate every so many steps, of PPO iterations."},
    "metric_for_best_model": {
        "help": "Metric of an evaluation, by its name in metrics.jsonl (loss means eval/loss), that says which "
        "model is the best; its checkpoint is written at once and kept. Default where it is needed: eval/loss; ppo: "
        "eval/reward_mean."
    },
    "greater_is_better": {"help": "Of that metric; default: false if its name ends with loss."},
    "load_best_model_at_end": {
        "help": "Who loads the run's directory as a model gets the best checkpoint instead of the newest."
    },
    "save_steps": {"ge": 1, "help": "Write a checkpoint every so many steps, of PPO iterations."},
    "save_total_limit": {"ge": 1, "help": "Keep so many checkpoints, and the best."},
    "use_async_save": {
        "help": "Training goes on while a checkpoint is written; until it is, its content takes memory once more."
    },
    "overwrite_output_dir": {"help": "Remove what an earlier run left in output_dir, and start anew."},
    "output_dir": {"help": "Directory for checkpoints, metrics.jsonl, samples.jsonl and run.json."},
    "logging_dir": {"help": "Directory of VisualDL and TensorBoard files; default: output_dir/runs."},
}
LEGACY: frozenset[str] = frozenset(
    # keys of PaddleNLP's own argument files that are no fields of its TrainingArguments
    "use_flash_attention dataset_name_or_path task_name eval_with_do_generation save_generation_output lazy "
    "recompute_granularity recompute_use_reentrant tensor_parallel_output autotuner_benchmark benchmark "
    "use_fused_head_and_loss_fn fused_linear use_attn_mask_start_row_indices tokenizer_name_or_path "
    "min_learning_rate critic_min_learning_rate decay_steps critic_decay_steps critic_recompute_granularity "
    "kl_loss_coeff use_tgt_len_value per_device_rollout_batch_size eos_token use_rm_server chat_template stage "
    "actor_tokenizer_alpha reward_tokenizer_alpha reward_critic_tokenizer_alpha".split()
)
