"""Every setting of the project. Edit the values here, or give one as a flag of a script that uses it, for one run:

    python train.py --lora_r 8 --num_epochs 1
    python train.py --config experiment.py          # a file with some of these values, which win over those here

This file holds values only. The comment beside a value is its --help text.
"""

# ---- Base model ------------------------------------------------------------------------------------------------------
BASE_MODEL_NAME = "mistralai/Mistral-7B-v0.1"  # Hub id or local folder of a causal LM; README.md lists good choices
USE_4BIT_QUANTIZATION = True  # QLoRA: the frozen base in 4-bit NF4, about a quarter of the memory; False: plain LoRA
USE_FP16 = True  # half precision: bf16 where the GPU has it, fp16 elsewhere; always float32 on a CPU
DEVICE = "cuda"  # "cuda": the GPU, or what the machine has where there is none; "cpu" forces the CPU

# ---- Data ------------------------------------------------------------------------------------------------------------
CUSTOM_DATASET_PATH = None  # .json, .jsonl, .csv, .parquet or a Hub dataset, name:split; None: data/demo.json
VALIDATION_DATASET_PATH = None  # your own validation file; None: VALIDATION_SPLIT of the rows are held out
VALIDATION_SPLIT = 0.1  # share of the rows held out to measure what the model has not seen; 0.05-0.2
DATASET_COLUMNS = {}  # for unusual column names, as JSON: {"instruction": "q", "input": "hint", "response": "a"}
CHOSEN_ONLY = False  # of preferences (chosen and rejected; label) train on the good answers alone; False: refuse them
MAX_SEQ_LENGTH = 512  # tokens a row; longer prompts lose their start. Memory grows with it
ANSWERS_CUT_LIMIT = 0.3  # refuse to train if a larger share of the rows loses its answer's end, or is dropped; 1: never
MAX_TRAIN_ROWS = 0  # use at most this many rows of the file, chosen by SEED, for a quick try; 0: all

# ---- LoRA ------------------------------------------------------------------------------------------------------------
LORA_R = 16  # rank: the capacity of the adapter; 8 for style, 32-64 for much new behaviour
LORA_ALPHA = 32  # scale of the update (alpha / r multiplies it); 2 x LORA_R is a good rule
LORA_DROPOUT = 0.05  # raise to 0.1 on small data that overfits; 0 is faster
USE_RSLORA = False  # scale by alpha / sqrt(r) instead of alpha / r, which keeps ranks above 64 effective
USE_DORA = False  # learn direction and magnitude apart: sometimes better at low ranks, and slower
LORA_PLUS_RATIO = 1.0  # LoRA+: learning rate of B over that of A; 16 learns faster, at a lower LEARNING_RATE; 1: off
LORA_TARGET_MODULES = "all-linear"  # every linear layer but the output; or a comma-separated list: "q_proj,v_proj"

# ---- Training --------------------------------------------------------------------------------------------------------
NUM_EPOCHS = 3  # passes over the data; 1-3 for thousands of rows, more for a few hundred
BATCH_SIZE = 4  # rows of MAX_SEQ_LENGTH that fit the memory at once; halve it when out of memory
GRADIENT_ACCUMULATION_STEPS = 4  # BATCH_SIZE x this = rows to an optimizer step on each GPU; 16-64 in all is usual
LEARNING_RATE = 2e-4  # peak; 1e-4 for larger models or if the loss jumps, up to 5e-4 for short runs
LR_SCHEDULER_TYPE = "cosine"  # how the rate falls after the warm-up: cosine, linear or constant_with_warmup
WARMUP_RATIO = 0.03  # share of the steps in which the learning rate rises from zero
WEIGHT_DECAY = 0.0  # AdamW's decay of the adapter's weights; 0.01 regularises a little
MAX_GRAD_NORM = 1.0  # gradients longer than this are scaled down to it; 0 switches clipping off
MAX_STEPS = 0  # stop after this many optimizer steps, whatever NUM_EPOCHS says; 0: no limit
GRADIENT_CHECKPOINTING = True  # much less memory, a third or more slower: activations are recomputed; "auto": if needed
TORCH_COMPILE = False  # compile the decoder layers: half a minute, and no faster where norms and gates are fused
OPTIMIZER = "adamw_torch"  # adamw_torch, or paged_adamw_8bit (less memory; moved out of a full GPU)
SEED = 42  # fixes the split, the order of rows, the adapter's first weights and dropout

# ---- Logging, evaluation, checkpoints --------------------------------------------------------------------------------
LOGGING_STEPS = 5  # optimizer steps between two logged losses
EVAL_STEPS = 50  # optimizer steps between two evaluations; a checkpoint is saved at each
SAVE_TOTAL_LIMIT = 2  # checkpoints kept on disk: the best and the newest
EVAL_ROWS = 500  # validation rows measured at each evaluation, chosen by SEED; the best checkpoint's on all. 0: all
EARLY_STOPPING_PATIENCE = 0  # stop after this many evaluations without a better validation loss; 0: never
SAMPLE_PROMPTS = 3  # validation prompts that are answered at each evaluation and shown in TensorBoard; 0: none

# ---- Generation ------------------------------------------------------------------------------------------------------
MAX_NEW_TOKENS = 256  # longest answer, in tokens
DO_SAMPLE = True  # False: always the likeliest token, so that the same prompt gives the same answer
TEMPERATURE = 0.7  # below 1 keeps to likely words, above 1 is more daring
TOP_P = 0.9  # sample among the likeliest tokens that hold this share of the probability
REPETITION_PENALTY = 1.0  # above 1 discourages repeated words; 1.1 is a mild dose
SYSTEM_PROMPT = None  # system text that conversations begin with; None: the one that all training rows have; "": none

# ---- Evaluation ------------------------------------------------------------------------------------------------------
EVAL_SAMPLES = 50  # rows that base and tuned model answer; the figures of answers are over these, more narrow them
ANSWER_CHECK = "auto"  # what is right: "number", "choice" (or yes and no), "json"; "auto": seen from the rows; "off"

# ---- Paths (relative ones start at the project's folder) -------------------------------------------------------------
OUTPUT_DIR = "output"  # adapter, checkpoints and evaluation
LOGS_DIR = "logs"  # TensorBoard: tensorboard --logdir logs
MODELS_DIR = "models"  # downloaded base models, the Hub cache
RUN_NAME = None  # name of the run in TensorBoard; None: the start time

# ---- The demo on a machine without a CUDA GPU ------------------------------------------------------------------------
# These replace the values above there, so that `python train.py` shows the whole pipeline in minutes. It is announced
# when they do. A value that you edit above or give on the command line wins, and another base model switches them off.
CPU_DEMO = {
    "BASE_MODEL_NAME": "models/tiny-base",  # 8 M parameters, ships with the project
    "USE_4BIT_QUANTIZATION": False,  # 4 bits work on a CPU, slowly; 32 MB need no saving
    "GRADIENT_CHECKPOINTING": False,
    "LORA_DROPOUT": 0.0,
    "LEARNING_RATE": 1e-3,  # a tiny model learns at five times the rate of a large one
    "NUM_EPOCHS": 4,
    "GRADIENT_ACCUMULATION_STEPS": 2,
    "EVAL_STEPS": 23,  # once an epoch
    "MAX_NEW_TOKENS": 96,
}
