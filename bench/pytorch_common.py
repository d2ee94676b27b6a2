"""Shared by the PyTorch counterparts: the allocator, the model and its optimizer, the process's peak memory."""

import argparse
import ctypes.util
import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def parser(doc):
    """The arguments that both counterparts take."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="Hugging Face directory")
    options.add_argument("--method", default="lora", help="full, or whatever the initial adapter is of")
    options.add_argument("--learning-rate", type=float, default=2e-4)
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--compile", action="store_true", help="torch.compile")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options.add_argument("--storage", choices=["as-is", "nf4", "nf4-double", "fp4", "int8"], default="as-is",
                         help="of the base's linears: as in the file, or quantized by bitsandbytes")
    options.add_argument("--allocator", choices=["tcmalloc", "default"], default="tcmalloc")
    options.add_argument("--json", help="write the result to this file too")
    return options


def preload(args):
    """Starts the script again with tcmalloc preloaded, by far the faster allocator here (Debian: libtcmalloc-minimal4).

    Call it before torch is imported."""
    if args.allocator == "default" or "tcmalloc" in os.environ.get("LD_PRELOAD", ""):
        return
    library = ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")
    if library is None:
        sys.exit("tcmalloc not found: install libtcmalloc-minimal4, or give --allocator default")
    preloaded = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), library]))
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"LD_PRELOAD": preloaded})


def load(args, adapter):
    """The model in training mode (no dropout), its trainable parameters, and AdamW without decay over them."""
    import torch
    from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    quantized = {} if args.storage == "as-is" else {"quantization_config": quantization(args.storage, dtype), "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa", **quantized)
    model.config.use_cache = False
    if args.method != "full":
        config = PeftConfig.from_pretrained(adapter)
        if config.is_prompt_learning:  # peft refuses to load one for training
            config.inference_mode = False
            model = get_peft_model(model, config)
            set_peft_model_state_dict(model, load_peft_weights(adapter, device="cpu"))
        else:
            model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    return model, trainable, optimizer


def quantization(storage, dtype):
    """bitsandbytes' settings for one of retune's storages."""
    from transformers import BitsAndBytesConfig

    if storage == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    kind, _, double = storage.partition("-")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype,
                              bnb_4bit_use_double_quant=bool(double))


def peak_rss_bytes():
    """Largest resident set since this program started. ru_maxrss would count the starting process's too."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def report(args, result):
    versions = {name: sys.modules[name].__version__ for name in ("torch", "transformers", "peft") if name in sys.modules}
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "save")}
    text = json.dumps(result | {"settings": settings, "versions": versions})
    print(text)
    if args.json:
        with open(args.json, "w") as file:
            file.write(text + "\n")
