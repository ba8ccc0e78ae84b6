"""A tiny model with random weights, the same in both formats: run by the Python of `.engines`, which has the libraries.

It speaks nonsense, but readable nonsense that ends by itself: the first dimension of its hidden states is constant, so the first column
of the output matrix is a bias per token. Only ASCII and the end are likely; a request that wants something else biases a token.
"""

import json
import random
import string
import sys
from pathlib import Path

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tests.engines import CONTEXT_TOKENS, MODEL

SEED = 11
VOCABULARY = 640
HIDDEN, LAYERS, HEADS = 64, 2, 4
LARGE = 8.0
"""The first dimension of every embedding, and one more of those that call for a certain next token; others are around 0.1."""
UNLIKELY, END, CERTAIN = -30.0, 3.0, 150.0
"""Biases: of what is not spoken, of the end, which makes answers some dozen tokens long, and of what must come next."""

END_OF_TURN = "<|im_end|>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", END_OF_TURN]
CALL = '<tool_call>\n{"name": "echo", "arguments": {"city": "Oslo"}}\n</tool_call>'
"""A whole call as one token: an engine without grammars calls the tool when a request biases it."""
THOUGHT = "the sea\n</think>\n\nis calm"
"""Likewise the end of a thought, and an answer."""
NEXT = [("<tool_call>", "Ċ"), (CALL, END_OF_TURN), ("</tool_call>", END_OF_TURN), (THOUGHT, END_OF_TURN)]
"""What follows what: Ċ is this alphabet's line feed, after which llama.cpp's grammars hold a call."""
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", CALL, THOUGHT]

TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n\\nYou may call one or more functions.\\n\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\n\\nFor each call give a JSON object within <tool_call></tool_call>:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
        {%- if message.content %}{{- message.content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {{- '\\n<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
            {{- function.arguments if function.arguments is string else function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking %}{{- '<think>\\n' }}{%- endif %}
{%- endif %}
"""
"""ChatML with tools as Qwen and Hermes write them; thinking only where `enable_thinking` asks for it."""


def make(home: Path) -> None:
    """A folder for transformers, a GGUF file for llama.cpp, and `tokens.json` with the ids that requests bias."""
    torch.manual_seed(SEED)
    tokenizer = _tokenizer()
    model = _model(tokenizer)
    model.save_pretrained(home / MODEL)
    tokenizer.save_pretrained(home / MODEL)
    _write_gguf(home / f"{MODEL}.gguf", model, tokenizer)
    ids = {"end": END_OF_TURN, "thought": THOUGHT, "call": CALL, "call_start": "<tool_call>"}
    (home / "tokens.json").write_text(
        json.dumps({name: str(tokenizer.convert_tokens_to_ids(token)) for name, token in ids.items()})
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and the pairs of an invented language."""
    chance = random.Random(SEED)
    words = ["".join(chance.choices(string.ascii_lowercase, k=chance.randint(2, 7))) for _ in range(300)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(chance.choices(words, k=12)) for _ in range(400)], trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=SPECIAL[0],
        chat_template=TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.1,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    with torch.no_grad():
        _speak(model, tokenizer)
    return model


def _speak(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Set the first dimensions, which the layers leave alone: the constant, and one for each pair of NEXT."""
    embeddings, outputs, kept = model.model.embed_tokens.weight, model.lm_head.weight, 1 + len(NEXT)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:kept] = layer.mlp.down_proj.weight[:kept] = 0.0
    embeddings[:, 1:kept] = outputs[:, :kept] = 0.0
    embeddings[:, 0] = LARGE
    # The norm makes the root of HIDDEN of one large dimension, and of two of them the root of its half each.
    outputs[:, 0] = torch.tensor([_bias(tokenizer, token) for token in range(len(tokenizer))]) / HIDDEN**0.5
    outputs[tokenizer.convert_tokens_to_ids([END_OF_TURN, *MARKS]), kept:] = 0.0  # as likely in every place
    for dimension, pair in enumerate(NEXT, start=1):
        token, following = tokenizer.convert_tokens_to_ids(pair)
        embeddings[token, dimension] = LARGE
        outputs[following, dimension] = CERTAIN / (HIDDEN / 2) ** 0.5


def _bias(tokenizer: PreTrainedTokenizerFast, token: int) -> float:
    text = tokenizer.convert_ids_to_tokens(token)
    if text == END_OF_TURN:
        return END
    spoken = string.ascii_letters + ",.Ġ"  # Ġ is this alphabet's space
    return 0.0 if text not in SPECIAL + MARKS and all(sign in spoken for sign in text) else UNLIKELY


def _write_gguf(path: Path, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    writer = gguf.GGUFWriter(path, "qwen2")
    config = model.config
    writer.add_name(MODEL)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _write_vocabulary(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    kinds = {
        **dict.fromkeys(SPECIAL, gguf.TokenType.CONTROL),
        **dict.fromkeys(MARKS, gguf.TokenType.USER_DEFINED),
    }
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
