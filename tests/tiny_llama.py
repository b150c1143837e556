"""A small Llama made on the spot, by which engines are compared: its weights are random, and the same every time.

It writes printable ASCII only, so that every text is whole characters, and never ends by itself.
"""

from __future__ import annotations

import functools
import json
import string
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

BOS, EOS, IMAGE = "<|im_start|>", "<|im_end|>", "<image>"
VOCABULARY = 384
CONTEXT = 2048
SPREAD = 0.1
"""Of the random weights: at the usual 0.02 the model writes one token over and over, and no test would bite."""
CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is the capital of France.",
    "A language model goes on with a text, token after token, and serves many people at the same time.",
    "system user assistant tool You are a helpful assistant. Answer in one sentence, please, and thank you.",
]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content or [] %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, as SmolLM2 and Qwen have it."""


def make_llama(folder: Path) -> Path:
    """A Llama of four layers, hidden size 256, grouped queries, in float32, with tokenizer and chat template."""
    torch.manual_seed(16)
    model = LlamaForCausalLM(_config(4))
    _write_ascii_only(model.lm_head.weight)
    with torch.no_grad():
        for layer in model.model.layers[2:]:  # they change little, so that the first two are a good draft
            layer.self_attn.o_proj.weight *= 0.2
            layer.mlp.down_proj.weight *= 0.2
    model.half().float()  # so that a file of float16 holds the same numbers
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def make_draft(folder: Path, llama: Path) -> Path:
    """The Llama's first two layers as a model of its own: it often foresees what the Llama writes."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def make_adapter(folder: Path, llama: Path, *, seed: int = 1) -> Path:
    """A LoRA adapter of rank 4, in peft's format, with which the Llama writes other tokens."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["v_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(folder)
    return folder


def make_gguf(folder: Path, llama: Path, *, half: bool = False) -> Path:
    """The same Llama as a GGUF file of float32 or, with the same numbers, float16: `folder/llama.gguf`.

    OpenVINO reads no float32 from GGUF; llama.cpp computes float16 less exactly.
    """
    import gguf

    model = AutoModelForCausalLM.from_pretrained(llama)
    config = model.config
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "llama.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny-llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        value = tensor if heads is None else _interleave(tensor, heads)
        kind = torch.float16 if half and value.dim() > 1 else torch.float32
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), value.contiguous().to(kind).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def make_ir(folder: Path, llama: Path) -> Path:
    """The same Llama as a folder of OpenVINO IR, with its tokenizer.

    OpenVINO converts a GGUF file, and then writes numbers of the model's own in 16 bits too: the frequencies of the
    rotary embedding are set right. Its layers get the names that they have where `optimum` exports a model.
    """
    import numpy as np
    import openvino
    import openvino_genai
    from openvino_tokenizers import convert_tokenizer

    gguf_file = make_gguf(folder / "converted", llama, half=True)
    openvino_genai.LLMPipeline(gguf_file, "CPU", enable_save_ov_model=True)
    model = openvino.Core().read_model(gguf_file.parent / "openvino_model.xml")
    config = AutoModelForCausalLM.from_pretrained(llama).config
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequencies = np.float32(1.0) / np.float32(config.rope_parameters["rope_theta"]) ** exponents
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            weight = node.input_value(1).get_node()
            if weight.get_type_name() == "Convert":
                name = weight.input_value(0).get_node().get_friendly_name()
                node.set_friendly_name(name.removesuffix(".weight").replace("[", ".").replace("]", ""))
        elif list(node.get_output_partial_shape(0)) == [1, config.head_dim // 2, 1] and not node.inputs():
            (converted,) = (target.get_node() for target in node.output(0).get_target_inputs())
            exact = openvino.opset13.constant(frequencies[None, :, None])
            converted.output(0).replace(exact.output(0))
    openvino.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)
    for kind, made in zip(
        ("tokenizer", "detokenizer"), convert_tokenizer(_tokenizer(), with_detokenizer=True), strict=True
    ):
        openvino.save_model(made, folder / f"openvino_{kind}.xml")
    return folder


def make_vision_llama(folder: Path) -> Path:
    """A LLaVA: a vision transformer of two layers that sees 56 by 56 pixels, and a Llama of two layers."""
    torch.manual_seed(16)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    tokenizer = _tokenizer()
    config = LlavaConfig(
        vision_config=vision, text_config=_config(2), image_token_index=tokenizer.convert_tokens_to_ids(IMAGE)
    )
    model = LlavaForConditionalGeneration(config)
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=1.0)  # else the photo would hardly matter
    _write_ascii_only(model.lm_head.weight)
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        image_token=IMAGE, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def greedy_tokens(llama: Path, prompt: str, n: int = 32, adapter: Path | None = None) -> list[int]:
    """The tokens that transformers' own `generate` writes after a prompt: the reference for every engine.

    With an adapter, those of peft.
    """
    tokenizer, model = _loaded(llama, adapter)
    prompt_ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model takes ten times as long on two cores that others use too
    try:
        ids = model.generate(**prompt_ids, max_new_tokens=n, do_sample=False)
    finally:
        torch.set_num_threads(threads)
    return [int(token) for token in ids[0, prompt_ids["input_ids"].shape[1] :]]


def greedy_text(llama: Path, prompt: str, n: int = 32, adapter: Path | None = None) -> str:
    return str(_loaded(llama)[0].decode(greedy_tokens(llama, prompt, n, adapter)))


def chat_prompt(llama: Path, text: str) -> str:
    """The prompt of a chat of one message of the user's."""
    messages = [{"role": "user", "content": text}]
    return str(_loaded(llama)[0].apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@functools.cache
def _loaded(llama: Path, adapter: Path | None = None):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return AutoTokenizer.from_pretrained(llama), model.eval()


def _config(layers: int) -> LlamaConfig:
    tokenizer = _tokenizer()
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=CONTEXT, initializer_range=SPREAD, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def _write_ascii_only(head: torch.nn.Parameter) -> None:
    """Give all other tokens the logit 0, which is never the highest, and hardly ever drawn."""
    tokenizer = _tokenizer()
    texts = [tokenizer.decode([token]) for token in range(VOCABULARY)]
    plain = set(string.ascii_letters + string.digits + string.punctuation + " ")
    special = set(tokenizer.all_special_ids)
    written = torch.tensor([set(text) <= plain and token not in special for token, text in enumerate(texts)])
    with torch.no_grad():
        head *= written[:, None] * 4.0  # further apart, so that no two engines differ by a rounding


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2's: the special tokens, 256 bytes, and what the corpus has most often."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, IMAGE)],
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, additional_special_tokens=[IMAGE],
        chat_template=TEMPLATE, model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _add_tokenizer(writer) -> None:
    import gguf

    tokenizer = _tokenizer()
    special = set(tokenizer.all_special_ids)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in range(VOCABULARY)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(range(VOCABULARY))))
    writer.add_token_types(kinds)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(value=False)
    writer.add_chat_template(TEMPLATE)


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a query or key projection in the order of llama.cpp's rotary embedding: pairs side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
