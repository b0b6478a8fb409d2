"""train.py's flags: the words they take, and how those of nanoGPT, llama2.c, nanochat and transformers are read."""

from model.config import BLOCK_FAMILIES, OPTIMIZERS, PRESETS, SCHEDULES

CHOICES = {
    "preset": tuple(PRESETS),
    "blocks": BLOCK_FAMILIES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "compile": ("auto", "on", "off"),
}
# Their names elsewhere
ALIASES = {
    "max-iters": "max-steps",
    "num-iterations": "max-steps",
    "epochs": "max-epochs",
    "num-epochs": "max-epochs",
    "num-train-epochs": "max-epochs",
    "lr": "learning-rate",
    "warmup-iters": "warmup-steps",
    "max-grad-norm": "grad-clip",
    "total-batch-size": "batch-tokens",
    "device-batch-size": "micro-batch",
    "n-layers": "n-layer",
    "n-heads": "n-head",
    "n-kv-heads": "n-kv-head",
    "dim": "n-embd",
    "context-length": "block-size",
    "max-seq-len": "block-size",
    "eval-every": "eval-interval",
    "eval-steps": "eval-interval",
    "save-every": "save-interval",
    "save-steps": "save-interval",
    "logging-steps": "log-interval",
    "save-total-limit": "keep",
    "precision": "dtype",
    "out-dir": "checkpoint-dir",
    "output-dir": "checkpoint-dir",
}
# What does the same as flags without a counterpart
HINTS = {
    name: hint
    for names, hint in {
        "batch-size gradient-accumulation-steps per-device-train-batch-size": "a step takes --batch-tokens, a forward "
        "pass --micro-batch windows",
        "wandb wandb-log wandb-project report-to": "metrics.jsonl has every number, loss_curve.png the plot",
        "eval-iters": "--eval-tokens sets how much is evaluated, --eval-interval how often",
        "lr-decay-iters": "the learning rate always decays to the end of the run",
        "min-lr": "--final-learning-rate is a fraction of the peak",
        "decay-lr": "--schedule and --decay-fraction set how the learning rate falls",
        "resume": "it resumes by itself, unless --fresh starts a new run",
        "always-save-checkpoint": "it always saves, every --save-interval steps",
        "eval-only": "evaluate.py scores a checkpoint",
        "dataset": "--data-dir is the folder of steps 1 to 3",
        "bias": "--blocks gpt2 has biases, modern has none",
        "depth": "--n-layer sets the number of blocks",
        "beta1 beta2": "AdamW's betas are in model/optimizer.py",
        "gradient-checkpointing": "a lower --micro-batch saves memory",
        "bf16 fp16": "--dtype bfloat16 or float16 sets the precision",
        "threads num-threads": "the environment variable OMP_NUM_THREADS sets their number",
    }.items()
    for name in names.split()
}
