"""The table of benchmark cases: their sizes, workers and targets.

A worker is a function of benchmarks/*.py that runs in a separate process. Its figure is the work of
one repetition (`work`, in the case's unit) divided by its seconds. The roofline is the machine's
limit: the same work at the speed of its fastest matrix product, or of its memory.
"""

from typing import Literal

from benchmarks.case import Case, Size, Target, new_tokens, requested_tokens, tokens, tuned_tokens

TORCH, JAX = "ours, torch", "ours, JAX"
HF, COMPILED, LITGPT, OPTAX = "HF eager", "HF compiled", "litgpt", "flax/optax loop"
OURS_COMPILED, OURS_REMAT = "ours, torch compiled", "ours, torch remat dots"
ROOFLINE, TRL = "roofline", "TRL"


def _to_shards(name: str, title: str, text: str, documents: int) -> Case:
    """Return a case that compares ours with a loop in a script, on one kind of text."""
    return Case(
        name,
        title,
        {"ours": "pipeline:tokenize", "sentencepiece in a loop": "pipeline:sentencepiece_loop"},
        {"text": text, "documents": documents, "vocab_size": 8000},
        {"text": text, "documents": 300, "vocab_size": 500},
        unit="documents/s",
        work=lambda size: size["documents"],
        targets=(Target("ours", "sentencepiece in a loop", 1.8),),
    )


def _server(name: str, figure: str, title: str, unit: str) -> Case:
    """Return a case of servers; `figure` is what is measured (benchmarks/servers.py)."""
    quantity: Literal["speed", "seconds"] = "speed" if unit == "tokens/s" else "seconds"
    sizes = {"batch_size": 64, "prompt": (20, 400), "new_tokens": 32, "slots": 16, "seconds": 0.25}
    return Case(
        name,
        f"64 requests that arrive at random, four a second, over HTTP: {title}",
        {
            TORCH: "servers:torch_server",
            JAX: "servers:jax_server",
            HF_SERVER: "servers:hf_server",
            VLLM: "servers:vllm_server",
        },
        MEDIUM | sizes | {"figure": figure},
        TINY
        | {"vocab_size": 512, "sequence_length": 64, "batch_size": 3, "prompt": (8, 20)}
        | {"new_tokens": 3, "slots": 2, "seconds": 0.01, "figure": figure},
        unit=unit,
        targets=tuple(
            Target(ours, peer, 1.0, quantity) for ours in (TORCH, JAX) for peer in (HF_SERVER, VLLM)
        ),
        repetitions=2,
    )


TINY = {
    "vocab_size": 128,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 64,
    "sequence_length": 16,
    "batch_size": 2,
}
STEP = {
    "vocab_size": 8192,
    "dim": 512,
    "n_layers": 8,
    "n_heads": 8,
    "hidden_dim": 1376,
    "sequence_length": 512,
    "batch_size": 4,
    "train": {"loss_chunk": 512},
}
# 100 M parameters.
MEDIUM = {
    "vocab_size": 32000,
    "dim": 640,
    "n_layers": 12,
    "n_heads": 10,
    "hidden_dim": 1728,
    "sequence_length": 2048,
}
GENERATE = {
    TORCH: "torch_models:generate",
    OURS_COMPILED: "torch_models:generate_compiled",
    JAX: "jax_models:generate",
    HF: "torch_models:hf_generate",
    COMPILED: "torch_models:hf_generate_compiled",
    ROOFLINE: "roofline:read_weights",
}
ENGINE_TORCH, ENGINE_JAX = "our engine, torch", "our engine, JAX"
DRAFT_TORCH, DRAFT_JAX = "ours, torch, with a draft", "ours, JAX, with a draft"
PRODUCTS = "best products"
PADDED, LLAMA_CPP = "HF padded", "llama.cpp"
HF_SERVER, VLLM = "transformers serve", "vLLM"
REQUESTS = {"batch_size": 16, "chunk": 128}

# 25 M parameters.
TUNED = STEP | {"conversations": 64, "conversations_per_step": 8}


def _tuning(name: str, title: str, peer: str, size: Size) -> Case:
    """Return a case of fine-tuning; `size` has what the trainers need more than a model."""
    tiny = {"vocab_size": 320, "sequence_length": 64, "conversations": 6}
    short = {"conversations_per_step": 2, "prompt": (5, 20), "completion": (3, 9)}
    return Case(
        name,
        title,
        {TORCH: "tuning:torch_trainer", JAX: "tuning:jax_trainer", peer: "tuning:trl_trainer"},
        TUNED | size,
        TINY | size | tiny | short,
        work=tuned_tokens,
        targets=(
            Target(TORCH, peer, 1.3),
            Target(JAX, peer, 1.3),
            Target(TORCH, peer, 0.8, "memory"),
        ),
        repetitions=3,
    )


CASES = (
    Case(
        "train",
        "Training step, float32: forward, backward, clipping, AdamW",
        {
            TORCH: "torch_models:train",
            OURS_COMPILED: "torch_models:train_compiled",
            OURS_REMAT: "torch_models:train_remat",
            JAX: "jax_models:train",
            HF: "torch_models:hf_train",
            COMPILED: "torch_models:hf_train_compiled",
            LITGPT: "torch_models:litgpt_train",
            OPTAX: "jax_models:optax_train",
            "MKL products": "roofline:torch_products",
            ROOFLINE: "roofline:products",
        },
        STEP,
        TINY,
        work=tokens,
        targets=(
            Target(TORCH, HF, 1.15),
            Target(OURS_COMPILED, COMPILED, 1.15),
            Target(TORCH, ROOFLINE, 0.9),
            Target(TORCH, "MKL products", 0.9),
            Target(TORCH, HF, 0.7, "memory"),
            Target(OURS_REMAT, HF, 0.7, "memory"),
            Target(OURS_REMAT, HF, 1.15),
            Target(JAX, TORCH, 0.9),
            Target(JAX, OPTAX, 0.7, "memory"),
        ),
    ),
    _tuning(
        "sft",
        "Supervised fine-tuning on conversations of 90 to 420 tokens: tokens that are not padding",
        TRL,
        {"format": "conversations", "prompt": (60, 240), "completion": (30, 180)},
    ),
    _tuning(
        "sft-lora",
        "The same with adapters of rank 16 on all matrices of the layers",
        "PEFT and TRL",
        {"format": "conversations", "prompt": (60, 240), "completion": (30, 180), "lora_rank": 16},
    ),
    _tuning(
        "dpo",
        "DPO on pairs of 60 to 250 tokens each, the reference computed before",
        TRL,
        {"format": "preferences", "prompt": (40, 160), "completion": (20, 90)},
    ),
    Case(
        "loss",
        "Forward and backward with a vocabulary of 64,128: memory of the logits",
        {
            TORCH: "torch_models:gradients",
            JAX: "jax_models:gradients",
            HF: "torch_models:hf_gradients",
        },
        STEP
        | {
            "vocab_size": 64128,
            "dim": 1024,
            "n_layers": 2,
            "n_heads": 16,
            "hidden_dim": 2752,
            "sequence_length": 2048,
            "batch_size": 2,
        },
        TINY,
        work=tokens,
        targets=(Target(TORCH, HF, 0.5, "memory"), Target(TORCH, HF, 1.0)),
        repetitions=3,
    ),
    Case(
        "block",
        "One layer of the 2B model, forward and backward",
        {
            TORCH: "torch_models:block",
            JAX: "jax_models:block",
            HF: "torch_models:hf_block",
            "MKL products": "roofline:torch_products",
            ROOFLINE: "roofline:products",
        },
        # Only the layer: a vocabulary of one costs nothing.
        {
            "vocab_size": 1,
            "dim": 4096,
            "n_layers": 1,
            "n_heads": 32,
            "hidden_dim": 11008,
            "sequence_length": 512,
            "batch_size": 1,
        },
        TINY | {"vocab_size": 1, "n_layers": 1},
        work=tokens,
        targets=(Target(TORCH, ROOFLINE, 0.9), Target(JAX, ROOFLINE, 0.85)),
    ),
    Case(
        "decode-1",
        "Greedy decoding of one sequence, 100 M parameters, float32, prompt included",
        GENERATE | {LLAMA_CPP: "llama_cpp:generate"},
        MEDIUM | {"batch_size": 1, "prompt": 16, "new_tokens": 64},
        TINY | {"vocab_size": 512, "batch_size": 1, "prompt": 4, "new_tokens": 4},
        work=new_tokens,
        targets=(
            Target(TORCH, HF, 1.5),
            Target(OURS_COMPILED, COMPILED, 1.5),
            Target(JAX, HF, 1.5),
            Target(TORCH, ROOFLINE, 0.7),
            Target(OURS_COMPILED, ROOFLINE, 0.7),
            Target(JAX, LLAMA_CPP, 0.9),
        ),
    ),
    Case(
        "decode-16",
        "Greedy decoding of 16 sequences at once",
        GENERATE | {PRODUCTS: "roofline:products_of_rows"},
        MEDIUM | {"batch_size": 16, "prompt": 16, "new_tokens": 32},
        TINY | {"batch_size": 3, "prompt": 4, "new_tokens": 4},
        work=new_tokens,
        targets=(
            Target(TORCH, HF, 2.0),
            Target(JAX, HF, 2.0),
            Target(TORCH, PRODUCTS, 0.8),
            Target(JAX, PRODUCTS, 0.8),
        ),
    ),
    Case(
        "engine",
        "What fixed shapes cost: decode-16 in the engine, and by `generate`",
        {
            TORCH: "torch_models:generate",
            ENGINE_TORCH: "torch_models:engine_on_batch",
            JAX: "jax_models:generate",
            ENGINE_JAX: "jax_models:engine_on_batch",
        },
        MEDIUM | REQUESTS | {"prompt": 16, "new_tokens": 32},
        TINY | {"batch_size": 3, "chunk": 4, "prompt": 4, "new_tokens": 4},
        work=new_tokens,
        targets=(Target(ENGINE_JAX, ENGINE_TORCH, 0.8),),
    ),
    Case(
        "requests",
        "16 requests of unequal lengths at once: tokens that were asked for",
        {
            ENGINE_TORCH: "torch_models:engine",
            ENGINE_JAX: "jax_models:engine",
            PADDED: "torch_models:hf_padded",
        },
        MEDIUM | REQUESTS | {"prompt": (16, 256), "new_tokens": (8, 128)},
        TINY | {"batch_size": 3, "chunk": 4, "prompt": (2, 6), "new_tokens": (2, 5)},
        work=requested_tokens,
        targets=(
            Target(ENGINE_TORCH, PADDED, 2.0),
            Target(ENGINE_JAX, PADDED, 2.0),
            Target(ENGINE_JAX, ENGINE_TORCH, 0.8),
        ),
        repetitions=3,
    ),
    Case(
        "speculative",
        "Greedy decoding of tales with a draft and without, one sequence",
        {
            TORCH: "torch_models:plain",
            DRAFT_TORCH: "torch_models:speculative",
            JAX: "jax_models:plain",
            DRAFT_JAX: "jax_models:speculative",
        },
        {"checkpoint": "runs/demo/large/checkpoints/600", "texts": 20, "prompt": 16}
        | {"draft": "runs/demo/draft/checkpoints/1200", "new_tokens": 64, "draft_tokens": 3},
        TINY | {"vocab_size": 256, "texts": 2, "prompt": 4, "new_tokens": 4, "draft_tokens": 2},
        work=lambda size: size["texts"] * size["new_tokens"],
        targets=(Target(DRAFT_TORCH, TORCH, 1.3), Target(DRAFT_JAX, JAX, 1.3)),
    ),
    _server("serve", "speed", "tokens of all answers", "tokens/s"),
    _server("serve-median", "median", "median time to the first token", "seconds"),
    _server("serve-p95", "p95", "95th percentile of the time to the first token", "seconds"),
    Case(
        "prefill",
        "Prefill of 1,024 tokens into the cache, up to the logits of the next token",
        {
            TORCH: "torch_models:prefill",
            JAX: "jax_models:prefill",
            HF: "torch_models:hf_prefill",
        },
        MEDIUM | {"batch_size": 1, "prompt": 1024},
        TINY | {"batch_size": 1, "prompt": 8},
        work=lambda size: size["prompt"],
        targets=(Target(TORCH, HF, 1.1),),
    ),
    Case(
        "data",
        "Batches for the training loop: shuffled windows of a token file",
        {"ours": "pipeline:batches", "torch DataLoader": "pipeline:dataloader"},
        {"tokens": 2**25, "sequence_length": 1024, "batch_size": 8, "steps": 400, "workers": 2},
        {"tokens": 2**14, "sequence_length": 16, "batch_size": 4, "steps": 8, "workers": 2},
        work=lambda size: tokens(size) * size["steps"],
        targets=(Target("ours", "torch DataLoader", 3.0),),
    ),
    Case(
        "input_pipeline",
        "Training step with the input pipeline, relative to one on a constant batch; in turns",
        {
            TORCH: "torch_models:train_with_pipeline",
            JAX: "jax_models:train_with_pipeline",
        },
        STEP | {"n_layers": 2, "tokens": 2**22, "steps": 10},
        TINY | {"tokens": 2**12, "steps": 2},
        unit="ratio",
        targets=(Target(TORCH, None, 1.01, "ratio"), Target(JAX, None, 1.01, "ratio")),
    ),
    _to_shards(
        "tokenize",
        "Text to token shards, including validation split and deduplication: tales",
        "tales",
        20000,
    ),
    _to_shards(
        "tokenize-docs",
        "Text with many different words to token shards: docstrings of Python's library",
        "docstrings",
        10000,
    ),
    Case(
        "start",
        "From the command to the end of the first step, with the demo's configuration",
        {TORCH: "commands:start_torch", JAX: "commands:start_jax"},
        {},
        {"tiny": True},
        unit="seconds",
        targets=(Target(TORCH, None, 8.0, "seconds"), Target(JAX, None, 12.0, "seconds")),
        repetitions=3,
    ),
    Case(
        "save",
        "Time that saving a checkpoint blocks training, 100 M parameters with moments",
        {
            TORCH: "torch_models:save",
            "blocking, torch": "torch_models:save_blocking",
            JAX: "jax_models:save",
            "blocking, JAX": "jax_models:save_blocking",
        },
        MEDIUM | {"batch_size": 1},
        TINY,
        unit="seconds",
        targets=(
            Target(TORCH, "blocking, torch", 0.1, "seconds"),
            Target(JAX, "blocking, JAX", 0.1, "seconds"),
        ),
        repetitions=3,
    ),
    Case(
        "scaling",
        "Training step by sequence length, width and batch size",
        {TORCH: "torch_models:train", HF: "torch_models:hf_train"},
        STEP | {"n_layers": 2, "batch_size": 1},
        TINY,
        work=tokens,
        repetitions=3,
        grid=(
            *({"sequence_length": T} for T in (256, 512, 1024, 2048, 4096, 8192)),
            *(
                {"dim": d, "n_heads": d // 64, "hidden_dim": d * 43 // 16}
                for d in (256, 1024, 2048)
            ),
            *({"batch_size": B} for B in (2, 4, 8)),
        ),
    ),
)
