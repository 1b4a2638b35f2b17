"""What a base model must have, found out before anything is trained on it."""
import glob
import os

import common  # noqa: F401  (first: it sets the environment)

import torch
import transformers

from lab.templates import style_of


def check(args):
    """Stop, with one line, on a --model that a later stage could not train. Nothing is loaded but
    its configuration and tokenizer."""
    name = args.model
    if name == "tiny":
        return
    if name.startswith(("/", ".", "~")) and not os.path.isdir(name):
        common.die(f"--model {name} is no folder")
    try:
        config, tokenizer = common.load_config(name, "CausalLM"), common.load_tokenizer(name)
    except (OSError, ValueError, KeyError) as error:
        common.die(f"cannot load --model {name}: {common.first_line(error)[:200]}")
    if os.path.isdir(name) and not glob.glob(f"{name}/*.safetensors"):
        common.die(f"{name} holds no *.safetensors: pickled weights are not loaded; "
                   "save_pretrained of a current transformers writes safetensors")
    try:
        with torch.device("meta"):
            transformers.AutoModelForCausalLM.from_config(config)
            classifier = transformers.AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        common.die(f"{name}: transformers has no sequence classifier for {config.model_type}: no "
                   "reward model can be made of it")
    if not hasattr(classifier, "score"):
        common.die(f"{name}: the classifier of {config.model_type} has no `score` head: it cannot "
                   "be a reward model here")
    if tokenizer.eos_token is None:
        common.die(f"the tokenizer of {name} has no EOS token: every response must end in one")
    embeddings = classifier.get_input_embeddings().num_embeddings
    if max(tokenizer.get_vocab().values()) >= embeddings:
        common.die(f"the tokenizer of {name} has a larger vocabulary than the model's {embeddings} "
                   "embeddings: they do not belong together")
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    end = tokenizer(style_of(name, args.template).end, add_special_tokens=False)["input_ids"]
    # a policy's response that was cut is ended, for a reward model
    needed = args.max_prompt_tokens + args.max_response_tokens + max(len(end), 1)
    if context and needed > context:
        common.die(f"{name} reads {context} tokens, a prompt and its response may have {needed}: "
                   "give a smaller --max_prompt_tokens or --max_response_tokens")
